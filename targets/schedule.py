"""Schedules: how a kernel cuts its work, as data that can be measured.

Kernels derive every number from the target's sizes. A schedule overrides some of them: for all kernels in a target's description, or for
one kernel by its key, which is what tuning finds (`targets/tune.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Node
from jisu.compiler.text import attribute_text
from jisu.compiler.types import TensorType, TupleType


def _positive(_: Any, field: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise TargetError(f"schedule: {field.name} is a number of at least 1, or None, not {value!r}")


@attrs.frozen
class Schedule:
    """How kernels cut their work; None is what they derive from the target's sizes. Raises TargetError for numbers below 1.

    rows: rows of x that a product holds in accumulators. chunk: rows of x that a task multiplies, at most. depth: words of an output's
    weights that a product of floats goes through before the next rows, about (parts are nearly equal, in steps of 16). ahead: bytes
    between a streamed weight and the one that is asked for meanwhile. shares: tasks that panels are dealt to where there are many rows.
    """

    rows: int | None = attrs.field(default=None, validator=_positive)
    chunk: int | None = attrs.field(default=None, validator=_positive)
    depth: int | None = attrs.field(default=None, validator=_positive)
    ahead: int | None = attrs.field(default=None, validator=_positive)
    shares: int | None = attrs.field(default=None, validator=_positive)

    def to_json(self) -> dict[str, int]:
        """The numbers that are given, by name."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """What `to_json` made; raises TargetError for unknown fields and for numbers below 1."""
        known = [a.name for a in attrs.fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            raise TargetError(f"a schedule has unknown fields {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**data)


Schedules = Mapping[str, Schedule]
"""By `kernel_key`; kernels that aren't named have the target's own."""


def kernel_key(node: Node) -> str:
    """What tells the kernel of a node from others: its op and attributes, its operands' dtypes and constant dimensions."""

    def form(t: TensorType) -> str:
        return f"{t.dtype}[{', '.join(str(d) if isinstance(d, int) else '?' for d in t.shape)}]"

    operands = ["-" if o is None else "(…)" if isinstance(o.type, TupleType) else form(o.tensor) for o in node.operands]
    attributes = [f"{k}={attribute_text(v)}" for k, v in sorted(node.attributes.items())]
    return f"{node.op.name}({', '.join([*operands, *attributes])})"


def from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Schedule]:
    """Schedules by key from what their `to_json` made."""
    return {key: Schedule.from_json(numbers) for key, numbers in data.items()}
