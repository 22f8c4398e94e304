"""The CPU target: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import numpy_dtype
from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: outputs per panel, and per dtype how many inputs share a word."""
    return 2 * target.lanes("float32"), {"float32": 1, "bfloat16": 2, "float16": 2}


_FLOATS = frozenset({ops.packed_linear, ops.packed_gated_linear, ops.packed_projections})
_CODES = frozenset({ops.quantized_linear, ops.integer_linear, ops.integer_projections})


def variants(node: Node, target: Target) -> dict[str, tuple[int, ...]]:
    """Numbers of a schedule that are worth measuring for the node's kernel, besides what it has without; none where it has no schedule."""
    if node.op not in _FLOATS | _CODES:
        return {}
    # Words of a panel's outputs that half of the nearest cache holds, and some more.
    near = target.cache_bytes(1, 1 << 15) // (2 * 4 * packing(target)[0]) // 16 * 16
    found = {"depth": (near, 2 * near, 4 * near)} if node.op in _FLOATS else {}
    rows = (8, 14) if target.vector_registers >= 32 else (4,)
    return {**found, "rows": rows, "chunk": (96, 144, 480), "ahead": (2048, 4096, 16384), "shares": (8, 32, 64)}


# Seconds in which one core computes with a word (64 weights), dense and sparse, where they come from its cache: measured on Zen 5
# with AVX-512. Other schemes' codes are decoded faster than sparse ones are expanded, whatever they weigh.
_WORD_SECONDS = {
    "float32": (0.5e-9, 2.0e-9),
    "bfloat16": (0.5e-9, 1.8e-9),
    "float16": (1.8e-9, 4.3e-9),
    "int8": (1.8e-9, 2.0e-9),
    "nf4": (15e-9, 15e-9),
}


def sparse_limits(target: Target) -> dict[str, float]:
    """Per dtype or scheme, the largest share of kept numbers at which a sparse matrix is smaller than a dense one and is read as fast.

    A roofline: a word takes the longer of its arithmetic and its bytes at a core's share of the memory's bandwidth.
    """
    from jisu.targets.cpu.kernels.sparse import expands

    bandwidth = target.memory_bandwidth / target.cores
    found = {}
    for name, (dense_s, sparse_s) in _WORD_SECONDS.items():
        coded = name in SCHEMES
        bits = 8 // SCHEMES[name].per_byte if coded else 8 * int(numpy_dtype(name).itemsize)
        dense, mask = 8 * bits, 8  # bytes of a word's numbers, and of its bits
        dense_s = max(dense_s, dense / bandwidth) if bandwidth else dense_s
        if expands("uint8" if coded else name, target) and sparse_s <= dense_s:
            found[name] = 1 - mask / dense
    return found
