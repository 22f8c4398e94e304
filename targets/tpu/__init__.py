"""Google's TPUs: chips as data, kernels as scheduled TIR and as Pallas source, any graph as StableHLO, and what it all takes, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jisu.compiler.levels import Rule, whole_words
from jisu.targets.defaults import halves as halves
from jisu.targets.defaults import sparse_gain as sparse_gain
from jisu.targets.defaults import sparse_limits as sparse_limits

if TYPE_CHECKING:  # a target's description comes from here
    from jisu.compiler.graph import Graph
    from jisu.targets.target import Target


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """Weights of floats stay as checkpoints have them; codes lie output by output."""
    return 1, {}


def levels(target: Target) -> Rule:
    """Rounded activations and codes are multiplied as integers where both are such, by the matrix units."""
    return whole_words


TOGETHER = False
"""Kernels do one layer at a time; XLA runs what reads the same one after the other anyway."""

FETCHED = False
"""What runs here is a simulation, in this machine's memory."""

SIMULATED = "simulated on this machine's processor; not run on a TPU"
"""How its programs run, where that isn't on the target; "" for targets whose programs do."""


def simulated(
    graphs: Mapping[str, Graph], sizes: Mapping[str, int], target: Target, sequence: str | None, positions: int | None
) -> list[dict[str, Any]]:
    """Each entry's time on the chip, simulated; see `jisu.targets.tpu.program.simulated_entries`."""
    from jisu.targets.tpu.chip import Chip
    from jisu.targets.tpu.program import simulated_entries

    return simulated_entries(graphs, sizes, Chip.named(target.name), sequence=sequence, positions=positions)
