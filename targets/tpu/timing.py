"""A TPU core's units, simulated: when each event of a kernel starts and ends, what moves, and how full VMEM gets.

The core hands events out in program order; DMA engines, MXUs and the vector unit work on their own, each in order. An event starts when its unit
is free, what it reads is there and what it overwrites has been read. Only a Wait holds the core up. That is what a perfect static schedule
reaches: all figures are simulated, not measured. How far they are from what Google's compiler estimates is in
`benchmarks/results/2026-11-29-tpu-timing.json`.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.events import HBM, SMEM, VMEM, Allocate, Copy, Event, Free, Matmul, Repeat, Vector, Wait
from jisu.targets.tpu.systolic import vector_cycles, work

UNITS = ("mxu", "vector", "hbm")
LABEL = "simulated"


@attrs.frozen
class Span:
    """`name` occupied `unit` from cycle `start` to `end`."""

    unit: str
    name: str
    start: float
    end: float


@attrs.frozen
class Timeline:
    """A simulated run: `cycles` from launch to the last event's end, cycles that each unit was `busy`, `ideal` ones at the MXUs' peak.

    hbm_bytes: read and written. high_water: most bytes allocated at once, per scope. leaked: semaphores that were signalled once more than
    waited for. hazards: reads and writes of buffers whose copies nobody waited for. spans: what the picture draws, loops' later turns left out.
    """

    chip: Chip
    cycles: float
    busy: dict[str, float]
    ideal: float
    hbm_bytes: int
    high_water: dict[str, int]
    leaked: tuple[str, ...]
    hazards: tuple[str, ...]
    spans: tuple[Span, ...] = attrs.field(repr=False)

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.clock

    @property
    def mxu_utilisation(self) -> float:
        """Multiply-adds asked for over those that the MXUs could have done meanwhile."""
        return self.ideal / self.cycles if self.cycles else 0.0

    @property
    def vmem_high_water(self) -> int:
        return self.high_water.get(VMEM, 0)

    @property
    def hbm_bound(self) -> float:
        """Cycles that HBM alone would take."""
        return self.hbm_bytes / self.chip.hbm_bytes_per_cycle

    def __str__(self) -> str:
        shares = ", ".join(f"{u} {self.busy[u] / self.cycles:.0%}" for u in UNITS if self.cycles)
        return (
            f"{self.chip.name}, {LABEL}: {self.cycles:,.0f} cycles ({self.seconds * 1e6:.1f} us); busy: {shares}; MXU utilisation "
            f"{self.mxu_utilisation:.1%}; HBM {self.hbm_bytes / 1e6:.2f} MB; VMEM {self.vmem_high_water / 2**20:.2f} MiB"
        )


def simulate(chip: Chip, events: Iterable[Event], *, launch: bool = True, shadow: bool = True) -> Timeline:
    """Run `events` on `chip`.

    `launch` adds what starting a kernel takes. `shadow=False` is an array whose weights can't be pushed ahead (see `systolic.folded`). Raises
    TargetError for a Wait that would never end, and for an Allocate that doesn't fit, naming the buffer.
    """
    core = _Core(chip, shadow)
    core.now = core.end = chip.timing.launch if launch else 0.0
    core.run(events)
    return core.timeline()


@attrs.define
class _Server:
    """Bandwidth shared in order of readiness: a transfer takes the free time from its start on, in pieces where others are in between."""

    gaps: list[tuple[float, float]] = attrs.field(factory=list)
    free: float = 0.0

    def take(self, start: float, length: float, now: float) -> tuple[float, float]:
        """(start, end) of `length` cycles of service from `start` on; nothing later asks for time before `now`."""
        begun: float | None = None
        kept: list[tuple[float, float]] = []
        for a, b in self.gaps:
            at = max(a, start)
            used = min(length, b - at) if at < b else 0.0
            if used <= 0.0:
                kept.append((a, b))
                continue
            begun = at if begun is None else begun
            length -= used
            kept += [(a, at), (at + used, b)]
            end = at + used
        self.gaps = [(a, b) for a, b in kept if b > max(a, now)]
        if length > 0.0 or begun is None:
            at = max(self.free, start)
            if at > self.free:
                self.gaps.append((self.free, at))
            begun = at if begun is None else begun
            end = self.free = at + length
        return begun, end


@attrs.define
class _Pending:
    """A copy that nobody has waited for yet."""

    end: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class _Core:
    def __init__(self, chip: Chip, shadow: bool) -> None:
        self.chip, self.shadow = chip, shadow
        self.now = self.end = self.mxu = self.vector = self.computed = 0.0
        self.hbm = _Server()
        self.queues = [0.0] * chip.dma_queues
        self.written: dict[str, float] = {}
        self.read: dict[str, float] = {}
        self.pending: dict[str, deque[_Pending]] = {}
        self.busy = dict.fromkeys(UNITS, 0.0)
        self.ideal, self.bytes = 0.0, 0
        self.live: dict[str, Allocate] = {}
        self.high: dict[str, int] = {}
        self.hazards: dict[str, None] = {}
        self.spans: list[Span] = []

    def run(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Repeat():
                    self.repeat(event)
                case Copy():
                    self.copy(event)
                case Wait():
                    self.wait(event)
                case Matmul():
                    self.matmul(event)
                case Vector():
                    self.vectors(event)
                case Allocate():
                    self.allocate(event)
                case Free():
                    self.live.pop(event.name, None)

    def copy(self, event: Copy) -> None:
        for name in event.writes:
            if any(name in (*p.reads, *p.writes) for p in self.unwaited()):
                self.hazards[f"{name} is overwritten while a copy of it may be under way"] = None
        ready = self.after(event)
        queue = heapq.heappop(self.queues)
        start = max(ready, queue)
        latency = self.chip.dma_latency * self.chip.clock
        touches = (event.source == HBM) + (event.destination == HBM)
        if touches:
            length = touches * event.bytes / self.chip.hbm_bytes_per_cycle
            begun, end = self.hbm.take(start + latency, length, self.now)
            self.busy["hbm"] += length
            self.bytes += touches * event.bytes
        else:
            begun, end = start, start + latency + event.bytes / self.chip.vmem_bandwidth * self.chip.clock
        heapq.heappush(self.queues, end)
        self.done(event, end)
        self.pending.setdefault(event.semaphore, deque()).append(_Pending(end, event.reads, event.writes))
        self.spans.append(Span("hbm" if touches else "dma", f"{event.source} to {event.destination}", begun, end))

    def wait(self, event: Wait) -> None:
        under_way = self.pending.get(event.semaphore)
        if not under_way:
            raise TargetError(
                f"a wait on semaphore {event.semaphore!r} that no copy signals: on a chip this kernel would hang"
            )
        self.now = max(self.now, under_way.popleft().end)
        self.end = max(self.end, self.now)

    def matmul(self, event: Matmul) -> None:
        self.check(event)
        cost = work(
            self.chip, event.m * event.stack, event.k, event.n, event.dtype, fills=event.fills, shadow=self.shadow
        )
        start = max(self.after(event), self.mxu)
        adding = max(start, self.vector)
        end = start + cost.mxu
        if cost.vector:
            self.vector = adding + cost.vector
            end = max(end, self.vector)
        self.busy["mxu"] += cost.mxu
        self.busy["vector"] += cost.vector
        self.ideal += cost.ideal / event.stack
        self.mxu = self.computed = end
        self.done(event, end)
        self.spans.append(Span("mxu", f"{event.m}x{event.k}x{event.n} {event.dtype}", start, end))

    def vectors(self, event: Vector) -> None:
        self.check(event)
        length = vector_cycles(self.chip, event.elements, event.op)
        start = max(self.after(event), self.vector)
        self.vector = end = start + length
        self.computed = max(self.computed, end)
        self.busy["vector"] += length
        self.done(event, end)
        self.spans.append(Span("vector", f"{event.op} of {event.elements} {event.dtype}", start, end))

    def allocate(self, event: Allocate) -> None:
        if event.name in self.live:
            raise TargetError(f"buffer {event.name!r} is allocated twice")
        self.live[event.name] = event
        total = sum(a.bytes for a in self.live.values() if a.scope == event.scope)
        size = {VMEM: self.chip.vmem_bytes, SMEM: self.chip.smem_bytes, HBM: self.chip.hbm_bytes}.get(event.scope)
        if size is not None and total > size:
            raise TargetError(
                f"buffer {event.name!r} of {event.bytes:,} bytes doesn't fit: {self.chip.name} has {size:,} bytes of {event.scope}, of "
                f"which {total - event.bytes:,} are taken; cut it into smaller tiles"
            )
        self.high[event.scope] = max(self.high.get(event.scope, 0), total)

    def after(self, event: Copy | Matmul | Vector) -> float:
        """When what `event` reads is there and what it overwrites isn't needed any more."""
        if not (event.reads or event.writes):
            return max(self.now, self.computed)
        times = [self.written.get(name, 0.0) for name in (*event.reads, *event.writes)]
        return max(self.now, *times, *(self.read.get(name, 0.0) for name in event.writes))

    def done(self, event: Copy | Matmul | Vector, end: float) -> None:
        for name in event.reads:
            self.read[name] = max(self.read.get(name, 0.0), end)
        for name in event.writes:
            self.written[name] = end
        self.end = max(self.end, end)

    def unwaited(self) -> Iterator[_Pending]:
        return (p for copies in self.pending.values() for p in copies)

    def check(self, event: Matmul | Vector) -> None:
        for p in self.unwaited():
            for name in {*event.reads, *event.writes} & set(p.writes):
                self.hazards[f"{name} is used before the wait for its copy"] = None
            for name in set(event.writes) & set(p.reads):
                self.hazards[f"{name} is overwritten while a copy of it may be under way"] = None

    def repeat(self, event: Repeat) -> None:
        """Turns until two leave the units in the same state; the others are then known to take as long."""
        before: tuple[Any, ...] | None = None
        for turn in range(event.count):
            at, busy, ideal, moved = self.now, dict(self.busy), self.ideal, self.bytes
            self.run(event.body)
            state, period = self.state(), self.now - at
            left = event.count - turn - 1
            if before is not None and left and period > 0 and _same(before, state):
                self.shift(period * left)
                self.busy = {u: v + left * (v - busy[u]) for u, v in self.busy.items()}
                self.ideal += left * (self.ideal - ideal)
                self.bytes += left * (self.bytes - moved)
                self.spans.append(Span("loop", f"{left} more turns", self.now - period * left, self.now))
                return
            before = state

    def state(self) -> tuple[Any, ...]:
        """All times that can still matter, from now."""

        def rest(times: Iterable[float]) -> tuple[float, ...]:
            return tuple(max(t - self.now, 0.0) for t in times)

        gaps = [t for gap in self.hbm.gaps if gap[1] > self.now for t in gap]
        named = [{k: v - self.now for k, v in d.items() if v > self.now} for d in (self.written, self.read)]
        return (
            rest((self.mxu, self.vector, self.computed, self.hbm.free, self.end)),
            rest(sorted(self.queues)),
            rest(gaps),
            *(tuple(x for k in sorted(d) for x in (k, d[k])) for d in named),
            *((k, *rest(p.end for p in self.pending[k])) for k in sorted(self.pending)),
        )

    def shift(self, by: float) -> None:
        self.now, self.end, self.mxu, self.vector, self.computed = (
            t + by for t in (self.now, self.end, self.mxu, self.vector, self.computed)
        )
        self.queues = [t + by for t in self.queues]
        self.hbm = _Server([(a + by, b + by) for a, b in self.hbm.gaps], self.hbm.free + by)
        self.written = {k: v + by for k, v in self.written.items()}
        self.read = {k: v + by for k, v in self.read.items()}
        for copies in self.pending.values():
            for p in copies:
                p.end += by

    def timeline(self) -> Timeline:
        leaked = tuple(sorted(name for name, copies in self.pending.items() if copies))
        return Timeline(
            self.chip,
            self.end,
            self.busy,
            self.ideal,
            self.bytes,
            self.high,
            leaked,
            tuple(self.hazards),
            tuple(self.spans),
        )


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if len(x) != len(y):
            return False
        for u, v in zip(x, y, strict=True):
            if u != v and (isinstance(u, str) or isinstance(v, str) or abs(u - v) > 1e-6):
                return False
    return True


def trace(timeline: Timeline, path: Path | str | None = None) -> dict[str, Any]:
    """`timeline` for chrome://tracing and Perfetto, times in simulated microseconds; written to `path` where one is given.

    A row per unit, and further ones ("hbm 2") for transfers that share it.
    """
    scale = 1e6 / timeline.chip.clock
    taken: dict[str, float] = dict.fromkeys(UNITS, 0.0)
    drawn: list[dict[str, Any]] = []
    for s in sorted(timeline.spans, key=lambda s: (s.start, s.end)):
        number = 1
        while taken.get(row := s.unit if number == 1 else f"{s.unit} {number}", 0.0) > s.start + 1e-6:
            number += 1
        taken[row] = s.end
        drawn.append({
            "ph": "X", "pid": 0, "tid": row, "name": s.name, "ts": s.start * scale, "dur": (s.end - s.start) * scale,
            "args": {"cycles": s.end - s.start},
        })  # fmt: skip
    rows = {row: i for i, row in enumerate(taken)}
    named = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{timeline.chip.name}, {LABEL}"}},
        *({"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": row}} for row, i in rows.items()),
    ]
    found = {
        "traceEvents": named + [{**e, "tid": rows[e["tid"]]} for e in drawn],
        "displayTimeUnit": "ns",
        "otherData": {"label": LABEL, "chip": timeline.chip.name},
    }
    if path is not None:
        Path(path).write_text(json.dumps(found), encoding="utf-8")
    return found
