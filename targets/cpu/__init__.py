"""The CPU target: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: outputs per panel, and per dtype how many inputs share a word."""
    return 2 * target.lanes("float32"), {"float32": 1, "bfloat16": 2, "float16": 2}


def sparse_limits(target: Target) -> dict[str, float]:
    """Per dtype, and for codes, the largest share of kept numbers at which a sparse matrix is read as fast as a dense one."""
    return dict.fromkeys(("float32", "bfloat16", "float16", "codes"), 1.0)
