"""Programs that between them launch most kinds of kernels: made here, run by `python sanitized.py FOLDER`, as under compute-sanitizer.

Running needs neither the compiler nor torch. Each program reads a prompt and takes steps behind it, of which the second and later ones are graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import jisu
from jisu.targets.target import Target

RECIPES = {
    "bfloat16": "",
    "paged": "[cache]\npage = 16\nscheme = 'int8'",
    "codes": "[[quantize]]\nscheme = 'int4'\nsymmetric = false",
    "levels": "[[quantize]]\nscheme = 'int8'\nactivations = 'int8'",
}
PARTS = (34, 35, 36, 37)  # of PROMPT: a prompt and three tokens
IDS = np.arange(2 * 37).reshape(2, 37) * 7 % 96


def make(target: Target, folder: Path) -> None:
    """Compile the programs and save them, with the logits of the CPU's ones."""
    from test_cuda_models import llama

    model = llama().bfloat16()
    for name, text in RECIPES.items():
        recipe = jisu.Recipe.from_toml(text)
        jisu.compile(model, target=target, recipe=recipe).save(folder / f"{name}.jisu")
        np.save(folder / f"{name}.npy", np.asarray(jisu.compile(model, recipe=recipe)(IDS).logits, np.float32))


def run(folder: Path) -> None:
    """Run what `make` saved; raises AssertionError where logits differ."""
    for name in RECIPES:
        session = jisu.load(folder / f"{name}.jisu").session(len(IDS[0]))
        parts = [session.append(part) for part in np.split(IDS, PARTS[:-1], axis=1)]
        got, want = np.concatenate(parts, 1).astype(np.float32), np.load(folder / f"{name}.npy")
        assert np.abs(got - want).max() <= 4e-2 * np.abs(want).max(), name
        print(name, flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
