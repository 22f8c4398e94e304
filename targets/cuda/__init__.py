"""NVIDIA GPUs: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from jisu.targets.defaults import simulated as simulated
from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: an output's inputs one after another, as checkpoints have them; gates and ups by turns.

    Both 16-byte loads of one output and a tensor core's second operand want that.
    """
    return 1, {"float32": 1, "bfloat16": 1, "float16": 1}


TOGETHER = True
"""Kernels do several matrices of one input at once."""

FETCHED = True
"""Results come from the GPU's memory."""

SIMULATED = ""
"""Programs run on a GPU, or nowhere."""

INTEGERS = False
"""Rounded activations are multiplied as the bfloat16 that they stand for."""


def sparse_gain(form: str, kept: float, target: Target) -> float | None:
    """No kernel expands sparse matrices yet: they are stored dense."""
    return None


def sparse_limits(target: Target) -> dict[str, float]:
    """As `sparse_gain`: none."""
    return {}
