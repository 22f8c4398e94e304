"""The CPU target: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from collections.abc import Mapping

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.levels import Rule, whole_words
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import numpy_dtype
from jisu.targets.defaults import halves as halves
from jisu.targets.defaults import simulated as simulated
from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: outputs per panel, and per dtype how many inputs share a word."""
    return 2 * target.lanes("float32"), {"float32": 1, "bfloat16": 2, "float16": 2}


TOGETHER = True
"""Kernels do several matrices of one input at once."""

FETCHED = False
"""Whether results come from another memory, so that a step had better give the likeliest tokens alone."""

SIMULATED = ""
"""This machine is the target."""


def levels(target: Target) -> Rule:
    """Rounded activations and codes are multiplied as integers where both are such."""
    return whole_words


_FLOATS = frozenset({ops.packed_linear, ops.packed_gated_linear, ops.packed_projections})
_CODES = frozenset({ops.quantized_linear, ops.levels_linear, ops.levels_projections})


def variants(node: Node, target: Target) -> dict[str, tuple[int, ...]]:
    """Numbers of a schedule that are worth measuring for the node's kernel, besides what it has without; none where it has no schedule."""
    if node.op not in _FLOATS | _CODES:
        return {}
    # Words of a panel's outputs that half of the nearest cache holds, and some more.
    near = target.cache_bytes(1, 1 << 15) // (2 * 4 * packing(target)[0]) // 16 * 16
    x = node.parents[0].tensor
    depths = [
        d for d in (near, 2 * near, 4 * near) if node.op in _FLOATS and d * packing(target)[1][x.dtype] < x.shape[-1]
    ]
    found = {"depth": tuple(depths)} if depths else {}
    rows = (8, 14) if target.vector_registers >= 32 else (4,)
    return {**found, "rows": rows, "chunk": (96, 144, 480), "ahead": (2048, 4096, 16384), "shares": (8, 32, 64)}


_MASK_BYTES = 8
# Seconds that one core computes for a word (64 weights) and a row of x, dense and sparse, by dtype, or by how many codes share a byte:
# measured on an Intel Xeon (family 6, model 207) with AVX-512, weights from its caches.
_WORD_SECONDS: Mapping[str | int, tuple[float, float]] = {
    "float32": (4.3e-9, 5.5e-9),
    "bfloat16": (4.5e-9, 3.7e-9),
    "float16": (5.1e-9, 6.5e-9),
    1: (5.4e-9, 5.2e-9),
    2: (3.8e-9, 6.4e-9),
}


def expands(dtype: str, target: Target) -> bool:
    """Whether the target has the instructions that expand float32, or smaller numbers ("uint8": codes)."""
    needed = ("avx512f",) if dtype == "float32" else ("avx512vbmi", "avx512vbmi2")
    return target.vector_bytes == 64 and target.has(*needed)


def sparse_gain(form: str, kept: float, target: Target, stored: str = "sparse") -> float | None:
    """How many times as fast a sparse matrix is read for one row as a dense one with zeros, predicted; None where no kernel expands it.

    form: a float dtype, or a scheme of codes. kept: the share of kept numbers. stored: "sparse", or "2:4", which none
    reads. A roofline: a word takes the longer of its arithmetic and its bytes at a core's share of the memory's bandwidth.
    """
    kind = SCHEMES.get(form)
    seconds = _WORD_SECONDS.get(kind.per_byte if kind else form)
    if stored == "2:4" or seconds is None or not expands("uint8" if kind else form, target):
        return None
    bandwidth, nbytes = target.memory_bandwidth / target.cores or float("inf"), _word_bytes(form)
    dense, sparse = (max(s, b / bandwidth) for s, b in zip(seconds, (nbytes, _MASK_BYTES + kept * nbytes), strict=True))
    return dense / sparse


def sparse_limits(target: Target) -> dict[str, float]:
    """Per dtype or scheme, the largest share of kept numbers at which a sparse matrix is smaller than a dense one and is read as fast.

    Of the schemes of codes only int8 has one: others are decoded faster than they are expanded, whatever they weigh.
    """
    found = {}
    for form in ("float32", "bfloat16", "float16", "int8"):
        smaller = 1 - _MASK_BYTES / _word_bytes(form)
        if (sparse_gain(form, smaller, target) or 0.0) >= 1.0:
            found[form] = smaller
    return found


def _word_bytes(form: str) -> float:
    """Bytes of a word's 64 numbers."""
    return 64 / SCHEMES[form].per_byte if form in SCHEMES else 64.0 * numpy_dtype(form).itemsize
