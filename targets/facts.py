"""What passes and the driver need to know of a target's kernels, by its kind; nothing here imports TVM."""

from __future__ import annotations

from types import ModuleType

from jisu.targets import cpu, cuda, tpu
from jisu.targets.target import Target

_ROOMS = {"cpu": cpu, "cuda": cuda, "tpu": tpu}


def of(target: Target) -> ModuleType:
    """The module with `packing`, `levels`, `TOGETHER`, `FETCHED`, `SIMULATED`, `simulated`, `sparse_gain`, `sparse_limits` and `halves` for the
    target; see `jisu.targets.defaults` for those that a module has nothing to say of."""
    return _ROOMS[target.kind]
