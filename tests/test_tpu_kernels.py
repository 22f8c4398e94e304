"""Our Pallas kernels inside exported programs: values through Pallas' interpreter, and libtpu's word for the chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
from ml_dtypes import bfloat16

from jisu.compiler import ops, schemes
from jisu.compiler.graph import WEIGHT, Graph, Node, placeholder
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import relative_error
from jisu.compiler.types import TensorType, symbol
from jisu.passes.layout import FoldWeights
from jisu.targets.tpu import export, kernels
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.stablehlo import emit, signature

V5E, V6E = Chip.named("v5e"), Chip.named("v6e")
needs_jax = pytest.mark.skipif(not export.has_jax(), reason='needs JAX: pip install "jisu[tpu]"')
needs_libtpu = pytest.mark.skipif(
    not (export.has_jax() and export.has_libtpu()), reason='needs JAX and libtpu: pip install "jisu[tpu-aot]"'
)
pytestmark = needs_jax


def tensor(name: str, *shape: Any, dtype: str = "bfloat16") -> Node:
    return placeholder(name, TensorType(shape, dtype))  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(bfloat16)


def run(graph: Graph, arrays: Sequence[np.ndarray], sizes: Mapping[str, int] | None = None) -> tuple[list[Any], str]:
    """Results of the program whose kernels are interpreted, and the text of the one for a TPU."""
    sizes = sizes or {}
    entry = signature(graph, sizes)
    chosen = [kernels.chooser(V5E, smallest=0, platform=platform) for platform in ("cpu", "tpu")]
    weights = [graph.weights[name].numpy() for name, _ in entry.weights]
    return export.runner(emit(graph, sizes, chosen[0]), entry)(*arrays, *weights), emit(graph, sizes, chosen[1])


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-2) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert relative_error(got, want) <= tolerance


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n", "k", "activation"), [(5, 70, 96, "none"), (40, 256, 128, "silu")])
def test_linear(rows: int, n: int, k: int, activation: str, bias: bool, residual: bool) -> None:
    x, w = tensor("x", 1, symbol("rows"), k), tensor("w", n, k)
    b = tensor("b", n) if bias else None
    r = tensor("r", 1, symbol("rows"), n) if residual else None
    inputs = [i for i in (x, w, b, r) if i is not None]
    graph = Graph(inputs, (ops.linear(x, w, b, r, activation=activation),))
    shapes = [tuple(rows if not isinstance(s, int) else s for s in i.shape) for i in inputs]
    arrays = [normal(*shape, seed=i, scale=0.2 if i == 1 else 1) for i, shape in enumerate(shapes)]
    (got,), text = run(graph, arrays, {"rows": rows})
    assert_close(got, interpret(graph, arrays)[0])
    assert text.count("@tpu_custom_call") == 1 and "dot_general" not in text
