"""How a GPU runs an entry: which kernels, in which order, on which memory, on how many blocks of threads.

Sizes are dimensions (numbers, or expressions of the entry's symbols), which are numbers as soon as the inputs' shapes are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

import attrs

from jisu.compiler.text import parse_dim
from jisu.compiler.types import Dim, substitute

CUBIN, OWN_PTX, PTX, PLANS = "kernels.cubin", "kernels.own.ptx", "kernels.ptx", "plans.json"
"""Files of a program for a GPU: machine code (where CUDA's assembler was at hand), PTX with what only that GPU has (where there is such),
PTX for it and later ones, and per entry its plan."""

FAULT = "fault"
"""The address of the number of the first fault that a kernel met (int32, 0 for none; see `Plan.faults`)."""

GAP_S = 1e-6
"""Seconds between the end of a kernel in a CUDA graph and the beginning of the next one that waits for it before it begins: about, not measured."""

COUNTERS = "counters"
"""The address of numbers int32 that are 0 before each launch and after it."""


@attrs.frozen
class TensorMap:
    """A matrix of 16-bit numbers or of bytes, row by row, of which a kernel copies boxes of `box` rows and columns, 32, 64 or 128 bytes a row: what
    GPUs from sm_90 on (their tensor memory accelerator) want to know of it. tensor: as an `Argument` names it. The driver writes it as 128
    bytes, which are the kernel's argument."""

    tensor: tuple[str, int]
    dtype: str
    rows: Dim
    columns: int
    box: tuple[int, int]


Argument = Union[tuple[str, int], TensorMap, "Dim"]
"""("input" | "weight" | "output", number), ("arena", slot), (FAULT, 0), (COUNTERS, 0), a tensor's map, or a number."""


@attrs.frozen
class Launch:
    """A kernel on grid[x] * grid[y] * grid[z] blocks of `threads` threads, each block with `shared` bytes of shared memory.

    early: it may begin before the launches before it end, since it waits for that itself.
    """

    kernel: str
    grid: tuple[Dim, Dim, Dim]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]
    early: bool = False


@attrs.frozen
class Variant:
    """Launches that do where every (dimension, bound) of `at_most` holds."""

    at_most: tuple[tuple[Dim, int], ...]
    launches: tuple[Launch, ...]

    def holds(self, env: Mapping[str, int]) -> bool:
        """Whether it does with these sizes."""
        return all(substitute(dim, env) <= bound for dim, bound in self.at_most)


@attrs.frozen
class Plan:
    """An entry's run: of every step the first variant that holds.

    slots: of the arena, the sizes in bytes of which each takes the largest. equal: dimensions that must be equal, and who says so.
    counters: how many the launches want, of which the largest does for all.
    """

    slots: tuple[tuple[Dim, ...], ...]
    steps: tuple[tuple[Variant, ...], ...]
    equal: tuple[tuple[Dim, Dim, str], ...] = ()
    counters: tuple[Dim, ...] = ()

    def launches(self, env: Mapping[str, int]) -> tuple[Launch, ...]:
        """What is launched with these sizes on the GPU that the plan was made for."""
        chosen = (next(v for v in step if v.holds(env)) for step in self.steps)
        return tuple(
            launch for variant in chosen for launch in variant.launches if all(substitute(n, env) for n in launch.grid)
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; dimensions are numbers or text."""
        return {
            "slots": [[_text(d) for d in sizes] for sizes in self.slots],
            "steps": [
                [
                    {
                        "at_most": [[_text(d), bound] for d, bound in variant.at_most],
                        "launches": [
                            {
                                "kernel": launch.kernel,
                                "grid": [_text(d) for d in launch.grid],
                                "threads": launch.threads,
                                "shared": launch.shared,
                                "arguments": [_argument_text(a) for a in launch.arguments],
                                "early": launch.early,
                            }
                            for launch in variant.launches
                        ],
                    }
                    for variant in step
                ]
                for step in self.steps
            ],
            "equal": [[_text(a), _text(b), who] for a, b, who in self.equal],
            "counters": [_text(d) for d in self.counters],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """What `to_json` wrote; raises ValueError for anything else."""
        try:
            return cls._read(data)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no plan of launches ({type(error).__name__}: {error})") from None

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Plan:
        steps = []
        for step in data["steps"]:
            variants = []
            for variant in step:
                launches = tuple(
                    Launch(
                        str(launch["kernel"]), _grid(launch["grid"]), int(launch["threads"]), int(launch["shared"]),
                        tuple(_argument(a) for a in launch["arguments"]),
                        bool(launch["early"]),
                    )
                    for launch in variant["launches"]
                )  # fmt: skip
                at_most = tuple((_dim(d), int(bound)) for d, bound in variant["at_most"])
                variants.append(Variant(at_most, launches))
            steps.append(tuple(variants))
        slots = tuple(tuple(_dim(d) for d in sizes) for sizes in data["slots"])
        equal = tuple((_dim(a), _dim(b), str(who)) for a, b, who in data["equal"])
        return cls(slots, tuple(steps), equal, tuple(_dim(d) for d in data["counters"]))


def _argument_text(value: Argument) -> Any:
    if isinstance(value, TensorMap):
        return attrs.asdict(value) | {"rows": _text(value.rows)}
    return list(value) if isinstance(value, tuple) else _text(value)


def _argument(value: Any) -> Argument:
    if isinstance(value, Mapping):
        rows, columns = map(int, value["box"])
        kind, number = value["tensor"]
        return TensorMap(
            (str(kind), int(number)), str(value["dtype"]), _dim(value["rows"]), int(value["columns"]), (rows, columns)
        )
    if isinstance(value, list):
        kind, number = value
        return str(kind), int(number)
    return _dim(value)


def _text(value: Dim) -> int | str:
    return value if isinstance(value, int) else int(value) if value.is_Integer else str(value)


def _dim(value: Any) -> Dim:
    return value if isinstance(value, int) else parse_dim(value)


def _grid(sizes: Any) -> tuple[Dim, Dim, Dim]:
    x, y, z = (_dim(size) for size in sizes)
    return x, y, z
