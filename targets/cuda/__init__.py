"""NVIDIA GPUs: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jisu.compiler.graph import Graph, Node
from jisu.compiler.levels import Rule, multiplied
from jisu.compiler.schemes import Scheme
from jisu.targets.target import Target, capability


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: an output's inputs one after another, as checkpoints have them; gates and ups by turns.

    Both 16-byte loads of one output and a tensor core's second operand want that.
    """
    return 1, {"float32": 1, "bfloat16": 1, "float16": 1}


STEP = 64
"""Inputs that kernels multiply at once where both operands have 8 bits; groups of codes are as many, or several times so many."""

TOGETHER = True
"""Kernels do several matrices of one input at once."""

FETCHED = True
"""Results come from the GPU's memory."""

SIMULATED = ""
"""Programs run on a GPU, or nowhere."""


def levels(target: Target) -> Rule:
    """Tensor cores multiply levels of 8 bits: integers, and from sm_89 on fp8; groups end where kernels can scale sums."""
    small_floats = capability(target.mcpu) >= (8, 9)

    def rule(x: Scheme, w: Scheme, k: int, group: int) -> bool:
        return multiplied(x, w) and (x.uniform or small_floats) and k % STEP == 0 and group % (STEP * w.per_byte) == 0

    return rule


def variants(node: Node, target: Target) -> dict[str, tuple[int, ...]]:
    """No kernel has numbers to tune yet."""
    return {}


def sparse_gain(form: str, kept: float, target: Target) -> float | None:
    """No kernel expands sparse matrices yet: they are stored dense."""
    return None


def sparse_limits(target: Target) -> dict[str, float]:
    """As `sparse_gain`: none."""
    return {}


def simulated(
    graphs: Mapping[str, Graph], sizes: Mapping[str, int], target: Target, sequence: str | None
) -> list[dict[str, Any]]:
    """What a timing model says of entries: there is none but the cost model."""
    return []
