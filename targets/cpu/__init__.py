"""The CPU target: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import numpy_dtype
from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: outputs per panel, and per dtype how many inputs share a word."""
    return 2 * target.lanes("float32"), {"float32": 1, "bfloat16": 2, "float16": 2}


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
