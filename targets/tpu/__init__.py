"""Google's TPUs: chips as data, kernels as scheduled TIR and as Pallas source, any graph as StableHLO, and what it all takes, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a target's description comes from here
    from jisu.compiler.graph import Graph, Node
    from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """Weights of floats stay as checkpoints have them; codes lie output by output."""
    return 1, {}


INTEGERS = True
"""Rounded activations and codes are multiplied as integers, by the matrix units."""

TOGETHER = False
"""Kernels do one layer at a time; XLA runs what reads the same one after the other anyway."""

FETCHED = False
"""What runs here is a simulation, in this machine's memory."""

SIMULATED = "simulated on this machine's processor; not run on a TPU"
"""How its programs run, where that isn't on the target; "" for targets whose programs do."""


def variants(node: Node, target: Target) -> dict[str, tuple[int, ...]]:
    """Tiles follow from the chip's sizes."""
    return {}


def sparse_gain(form: str, kept: float, target: Target) -> float | None:
    """Matrix units read dense tiles."""
    return None


def sparse_limits(target: Target) -> dict[str, float]:
    """As `sparse_gain`: none."""
    return {}


def simulated(
    graphs: Mapping[str, Graph], sizes: Mapping[str, int], target: Target, sequence: str | None
) -> list[dict[str, Any]]:
    """Each entry's time on the chip, simulated; see `jisu.targets.tpu.program.simulated_entries`."""
    from jisu.targets.tpu.chip import Chip
    from jisu.targets.tpu.program import simulated_entries

    return simulated_entries(graphs, sizes, Chip.named(target.name), sequence=sequence)
