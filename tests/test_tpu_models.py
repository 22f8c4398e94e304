"""Whole models for TPUs, simulated on this machine: their products are the chip's TIR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from test_cuda_models import PROMPT, gpt2, llama, qwen3

import jisu
from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import relative_error
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

FAMILIES = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen3", None), ("gpt2", None), ("llama", "int8"),
        *(pytest.param(f, "int8", marks=pytest.mark.slow) for f in ("qwen3", "gpt2")),
        *(pytest.param("llama", r, marks=pytest.mark.slow) for r in (None, "w8a16", "int4", "w4a16")),
    ],
)  # fmt: skip
def test_decoders(family: str, recipe: str | None) -> None:
    """Logits beside the model's, and the tokens of the CPU's program of the same graph."""
    model = FAMILIES[family]().bfloat16()
    program = jisu.compile(model, target="tpu:v5e", recipe=recipe)
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        want = model(ids).logits.float()
    got = program(ids).logits.float()
    tolerance = {None: 2e-2, "int8": 5e-2, "w8a16": 5e-2, "int4": 0.3, "w4a16": 0.3}[recipe]
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    on_cpu = jisu.compile(model, recipe=recipe).generate(PROMPT, max_new_tokens=12)
    assert program.generate(PROMPT, max_new_tokens=12).sequences == on_cpu.sequences
    used = {k["op"] for k in program.explain()["kernels"]}
    assert ("linear" if recipe is None else "quantized_linear" if recipe.endswith("a16") else "levels_linear") in used


def test_an_encoder_for_another_chip() -> None:
    torch.manual_seed(4)
    config = hf.BertConfig(
        vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192,
        max_position_embeddings=64,
    )  # fmt: skip
    model = hf.BertModel(config).eval().bfloat16()
    ids = torch.tensor([list(range(1, 41))])
    program = jisu.compile(model, target="tpu:v6e", example_inputs=(ids,))
    with torch.no_grad():
        want = model(ids).last_hidden_state.float()
    assert (program(ids).last_hidden_state.float() - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float32", 1e-5)])
def test_layers_of_any_number_of_rows(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """With everything that may follow a product; many rows, few, and both."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(numpy_dtype(dtype))

    held = {n: ArrayStorage(array(*s)) for n, s in (("w", (70, 96)), ("v", (70, 96)), ("b", (70,)))}
    w, v, bias = (weight(n, TensorType(s.shape, dtype)) for n, s in held.items())
    x = placeholder("x", TensorType((symbol("m"), 96), dtype))
    outputs = (
        ops.linear(x, w),
        ops.linear(x, w, bias, ops.linear(x, v), activation="gelu_tanh"),
        ops.gated_linear(x, w, v, activation="silu"),
    )
    graph = Graph((x,), outputs, held)
    target = Target.resolve("tpu:v5e")
    info = compile_graphs({"main": graph}, target, out=tmp_path / "out", cache_dir=tmp_path / "cache")
    run = Executable.load(info.library, info.entries)
    assert {op for _, op, *_ in info.kernels} >= {"linear", "gated_linear"}
    alone = array(300, 96)
    weights = {n: s.numpy() for n, s in held.items()}
    for m in (1, 16, 17, 128, 300):
        got = run.call("main", [alone[:m]], weights)
        for found, want in zip(got, interpret(graph, [alone[:m]]), strict=True):
            assert relative_error(np.asarray(found), want) < tolerance, m
        np.testing.assert_array_equal(np.asarray(got[0])[:1], np.asarray(run.call("main", [alone[:1]], weights)[0]))


def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program = jisu.compile(qwen3().bfloat16(), target="tpu")
    path = tmp_path / "q.jisu"
    program.save(path)
    one, other = (p.generate(PROMPT, max_new_tokens=4).sequences for p in (jisu.load(path), program))
    assert one == other


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(TargetError, match="tpu:v9.*did you mean 'tpu:v"):
        jisu.compile(qwen3(), target="tpu:v9")
