"""What a target's room says of its kernels where it has nothing of its own to say; rooms import from here what they don't define."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a TPU's description comes from a room that imports this
    from jisu.compiler.graph import Graph
    from jisu.targets.target import Target


def sparse_gain(form: str, kept: float, target: Target, stored: str = "sparse") -> float | None:
    """How many times as fast a sparse matrix is read as a dense one with zeros: None, no kernel expands sparse matrices."""
    return None


def sparse_limits(target: Target) -> dict[str, float]:
    """The largest share of kept numbers at which a sparse matrix pays, per form: for none it does."""
    return {}


def halves(target: Target) -> dict[str, int]:
    """Per form, of how many inputs kernels read a multiple where a matrix keeps two of each four, faster than a dense one: for none they do."""
    return {}


def simulated(
    graphs: Mapping[str, Graph], sizes: Mapping[str, int], target: Target, sequence: str | None, positions: int | None
) -> list[dict[str, Any]]:
    """What a timing model says of entries: there is none but the cost model."""
    return []
