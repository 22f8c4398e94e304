"""Compile a module and the bundled language model; call, generate, explain, save, load."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

import jisu


def a_module() -> None:
    """Any torch.nn.Module, with example inputs; the batch may vary."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4)).eval()
    x = torch.randn(3, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = jisu.compile(model, example_inputs=(x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        print("largest difference:", float((program(x) - model(x)).abs().max()))
    print(program.ir())


def a_language_model() -> None:
    """A local checkpoint folder: here the one that comes with the package."""
    program = jisu.compile(str(files("jisu") / "demo"), target="cpu")
    text = program.generate("A function is", max_new_tokens=24, do_sample=True, seed=3)
    print(text)
    session = program.session()
    logits = session.append(np.array([[1, 2, 3]]))
    print("logits", logits.shape, "after", session.length, "tokens")
    last = program.explain()["passes"][-1]
    print("kernel launches per step:", last["launches"], "predicted seconds:", last["predicted_s"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.jisu"
        program.save(path)
        again = jisu.load(path)
        assert np.array_equal(again.session().append(np.array([[1, 2, 3]])), logits)


if __name__ == "__main__":
    a_module()
    a_language_model()
