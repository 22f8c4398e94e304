"""What a kernel does, as events: the vocabulary between whoever walks a kernel's TIR and the timing model.

Events come in program order. Copies run beside what follows until a Wait on their semaphore; products and vector work run in order on their own
unit. `reads` and `writes` name buffers (with their slot: "x[0]"), so that an event waits for what it needs and not for more; an event that
names none waits for all arithmetic before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from jisu.compiler.errors import TargetError

HBM = "global"
VMEM = "global.vmem"
SMEM = "global.smem"
ACC = "global.acc"
SCOPES = (HBM, VMEM, SMEM, ACC)


def _names(names: Iterable[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _tuple(events: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(events)


def _scope(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in SCOPES:
        raise TargetError(f"unknown memory scope {value!r}; known: {', '.join(SCOPES)}")


def _count(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise TargetError(f"{type(instance).__name__}.{attribute.name} is {value}, which is less than nothing")


@attrs.frozen
class Copy:
    """`bytes` from scope `source` to scope `destination` by a DMA engine, which then signals `semaphore`."""

    bytes: int = attrs.field(validator=_count)
    source: str = attrs.field(validator=_scope)
    destination: str = attrs.field(validator=_scope)
    semaphore: str
    reads: tuple[str, ...] = attrs.field(default=(), converter=_names)
    writes: tuple[str, ...] = attrs.field(default=(), converter=_names)


@attrs.frozen
class Wait:
    """Until the oldest copy that signals `semaphore`, and wasn't waited for, has arrived."""

    semaphore: str


@attrs.frozen
class Matmul:
    """(m, k) by (k, n) on the matrix units, summed into what `writes` names; stack: each row is streamed so often, with the rest as zeros.

    fills: how often the matrix units fill and drain, in a kernel of our own: 0 behind a product that runs into this one; None: as libtpu
    estimates products of its own.
    """

    m: int = attrs.field(validator=_count)
    k: int = attrs.field(validator=_count)
    n: int = attrs.field(validator=_count)
    dtype: str
    reads: tuple[str, ...] = attrs.field(default=(), converter=_names)
    writes: tuple[str, ...] = attrs.field(default=(), converter=_names)
    stack: int = 1
    fills: int | None = None


@attrs.frozen
class Vector:
    """One `op` ("epilogue", of our own kernels "result": scale, convert and store; "element", "exp") over `elements` of 32 bits on the vector unit.

    `dtype` is what they are stored as; registers hold 32-bit elements whatever it is.
    """

    elements: int = attrs.field(validator=_count)
    dtype: str
    op: str = "element"
    reads: tuple[str, ...] = attrs.field(default=(), converter=_names)
    writes: tuple[str, ...] = attrs.field(default=(), converter=_names)


@attrs.frozen
class Allocate:
    """`bytes` of `scope` for buffer `name`, from here to its Free or the kernel's end."""

    name: str
    bytes: int = attrs.field(validator=_count)
    scope: str = attrs.field(default=VMEM, validator=_scope)


@attrs.frozen
class Free:
    """Buffer `name` is given back."""

    name: str


@attrs.frozen
class Repeat:
    """`body`, `count` times over."""

    count: int = attrs.field(validator=_count)
    body: tuple[Any, ...] = attrs.field(converter=_tuple)


Event = Copy | Wait | Matmul | Vector | Allocate | Free | Repeat
