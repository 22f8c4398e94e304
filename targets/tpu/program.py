"""What a whole entry of a program takes on a TPU core, simulated: its ops as the timing model's events, one after the other.

What is assumed, for nothing of it was measured:

- The entry is one executable: launching is counted once.
- Each op begins when the op before it has ended, but copies don't wait for ops: weights, and keys and values cached before, come in panels of at
  most PANEL bytes in the order of their use, as far ahead as half of VMEM holds. So weights stream while products before them run.
- Floats are stored as bfloat16 (or what `floats` says). Rows are padded to sublanes, so that one row costs as much as eight.
- What an op computes stays in VMEM for the next one; only what is larger than SPILL of VMEM goes through HBM, and comes back, once per use.
- All other ops are fused with their neighbours, as XLA does: they cost the vector unit one operation per declared FLOP, no traffic.
- Attention reads each key and value once, of the visible ones only, and takes two products and a softmax. Caches that our kernel reads lie in whole
  lanes: heads of 80 channels take 128, which the least bytes don't count.
- Caches are updated in place: an append writes the new rows alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler import axes, ops, rows
from jisu.compiler.cost import INTEGER, VIEWS
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import INPUT, WEIGHT, Graph, Node
from jisu.compiler.types import TensorType, TupleType, is_float, product, round_up, substitute
from jisu.targets.tpu.attention import beside, padded
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.events import HBM, VMEM, Copy, Event, Matmul, Vector, Wait
from jisu.targets.tpu.kernels import attends
from jisu.targets.tpu.systolic import ceil_div
from jisu.targets.tpu.timing import LABEL, Span, Timeline, simulate, trace

PANEL = 4 << 20
"""Bytes, at most, of what comes to VMEM at once."""
SPILL = 1 / 4
"""The part of VMEM that one op's result may take; a larger one goes to HBM."""
WIDTH = 1024
"""Columns, at most, of a panel of weights: the results of one are scaled and converted while the next one is multiplied."""
SOFTMAX = 4
"""Simple operations of the vector unit on each score: scale, maximum, difference, sum."""

WEIGHTED = frozenset({
    ops.linear, ops.gated_linear, ops.packed_linear, ops.packed_gated_linear, ops.packed_projections, ops.quantized_linear,
    ops.levels_linear, ops.levels_projections, ops.sparse_linear,
})  # fmt: skip
"""Products of rows, the first operand, with weights."""
GENERAL = frozenset({ops.matmul, ops.experts, ops.packed_experts, ops.expert_linear, ops.conv})
"""Other products: they take the MXUs at their peak for their FLOPs."""
LOOKED_UP = frozenset({ops.take, ops.gather, *ops.LOOKUPS})
FEW = {ops.rotary: 4}
"""Operations per number of a result, where the declared FLOPs count more than a chip computes."""
ATTENTION = frozenset({ops.attention, ops.attention_cached})


@attrs.frozen
class OpTime:
    """All ops of a kind: how many, simulated seconds by which they made the program longer, bytes that they moved."""

    op: str
    count: int
    seconds: float
    hbm_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "count": self.count, "simulated_s": self.seconds, "hbm_bytes": self.hbm_bytes}


@attrs.frozen
class ProgramEstimate:
    """An entry's simulated run.

    flops: as declared by the ops. least_bytes: every weight and cached row read once, inputs read and results written once. kv_read and
    kv_written: bytes of keys and values among them. timeline: the run, with spans named by op.
    """

    chip: Chip
    seconds: float
    launch_seconds: float
    flops: int
    hbm_bytes: int
    least_bytes: int
    weight_bytes: int
    kv_read: int
    kv_written: int
    ops: tuple[OpTime, ...]
    timeline: Timeline = attrs.field(repr=False)

    @property
    def hbm_seconds(self) -> float:
        """What HBM alone takes for the least bytes."""
        return self.least_bytes / self.chip.hbm_bandwidth

    @property
    def kv_bytes(self) -> int:
        return self.kv_read + self.kv_written

    def mxu_utilisation(self, dtype: str = "bfloat16") -> float:
        """Declared FLOPs over what the peak in `dtype` allows in the simulated time."""
        return self.flops / self.chip.peak_flops(dtype) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """For a report; every time in it is simulated."""
        return {
            "label": LABEL,
            "chip": self.chip.name,
            "simulated_s": self.seconds,
            "launch_s": self.launch_seconds,
            "flops": self.flops,
            "hbm_bytes": self.hbm_bytes,
            "least_bytes": self.least_bytes,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "hbm_bound_s": self.hbm_seconds,
            "ops": [op.to_json() for op in self.ops],
        }

    def trace(self, path: Path | str | None = None) -> dict[str, Any]:
        """The run for chrome://tracing and Perfetto, in simulated microseconds; written to `path` where one is given."""
        found = trace(self.timeline)
        if path is not None:
            Path(path).write_text(json.dumps(found), encoding="utf-8")
        return found

    def __str__(self) -> str:
        return (
            f"{self.chip.name}, {LABEL}: {self.seconds * 1e3:.3f} ms, {self.hbm_bytes / 1e6:.1f} MB of HBM (at least "
            f"{self.least_bytes / 1e6:.1f}), of which keys and values {self.kv_bytes / 1e6:.2f}"
        )


def simulated(
    graph: Graph, sizes: Mapping[str, int], chip: Chip, *, cached: int = 0, floats: str = "bfloat16",
    weights: str | None = None, kv: str | None = None,
) -> ProgramEstimate:  # fmt: skip
    """What running `graph` once takes, with all symbols fixed by `sizes` and `cached` tokens in front of these.

    floats: how the chip stores floats. weights="int8": products of float weights are as if these had 8 bits per number and a scale per
    output. kv: a scheme of `jisu.compiler.rows` ("int8") that cached rows are stored in; None: as the graph says. TargetError: a symbol has
    no size, or the chip has no such products.
    """
    missing = [name for name in graph.symbols if name not in sizes]
    if missing:
        raise TargetError(f"the program's sizes lack {', '.join(missing)}")
    if weights not in (None, "int8"):
        raise TargetError(f"weights can be 'int8' or as they are, not {weights!r}")
    program = _Program(chip, dict(sizes), cached, floats, weights, kv)
    for node in graph.nodes:
        program.add(node)
    return program.estimate(graph)


def simulated_entries(
    graphs: Mapping[str, Graph], sizes: Mapping[str, int], chip: Chip, *, sequence: str | None = None, positions: int | None = None,
    tokens: int = 512, cached: int = 1024,
) -> list[dict[str, Any]]:  # fmt: skip
    """For a report: each entry at `sizes`. Those over a cache are prefill of `tokens` without and decode of one with `cached` tokens in front
    of it, or as many as there are `positions` for; `sequence` names the symbol of new tokens."""
    if positions is not None:
        tokens, cached = min(tokens, positions), min(cached, positions - 1)
    found = []
    for entry, graph in graphs.items():
        over_cache = any(node.op is ops.attention_cached for node in graph.nodes)
        calls = (("prefill", tokens, 0), ("decode", 1, cached)) if over_cache and sequence else (("", 0, 0),)
        for phase, new, before in calls:
            here = dict(sizes)
            if phase:
                here = {name: sizes.get(name, before + new) for name in graph.symbols} | {str(sequence): new}
            run = simulated(graph, here, chip, cached=before)
            known = {name: int(size) for name, size in here.items() if name in graph.symbols}
            found.append(
                {"entry": entry, "phase": phase, "tokens": new, "cached": before, "sizes": known, **run.to_json()}
            )
    return found


@attrs.frozen
class _Work:
    """One op's arithmetic, in pieces: each needs a panel of so many bytes (0: nothing that isn't there) and takes some events."""

    node: Node
    pieces: tuple[tuple[int, tuple[Matmul | Vector, ...]], ...]
    stored: int = 0  # bytes that it writes to HBM
    loaded: int = 0  # bytes that it reads at once, before it begins


@attrs.define
class _Program:
    chip: Chip
    sizes: dict[str, int]
    cached: int
    floats: str
    weights: str | None
    kv: str | None
    works: list[_Work] = attrs.Factory(list)
    spilled: set[Node] = attrs.Factory(set)
    flops: int = 0
    weight_bytes: int = 0
    kv_read: int = 0
    kv_written: int = 0
    least: int = 0

    # Sizes

    def number(self, value: Any) -> int:
        return substitute(value, self.sizes)

    def shape(self, t: TensorType) -> tuple[int, ...]:
        return tuple(self.number(d) for d in t.shape)

    def nbytes(self, t: TensorType) -> int:
        """Bytes as the chip stores them."""
        if is_float(t.dtype):
            return int(self.number(t.size) * itemsize(self.floats))
        return self.number(t.nbytes)

    def results(self, node: Node) -> tuple[TensorType, ...]:
        return tuple(node.type.items) if isinstance(node.type, TupleType) else (node.tensor,)

    # Ops

    def add(self, node: Node) -> None:
        if node.op.leaf or node.op in VIEWS:
            return
        self.flops += self.number(axes.flops(node))
        if node.op is ops.cache_append:
            self._append(node)
            return
        if node.op in WEIGHTED:
            pieces = self._product(node)
        elif node.op in GENERAL:
            pieces = self._general(node)
        elif node.op in ATTENTION:
            pieces = self._attention(node)
        else:
            pieces = ((0, self._elementwise(node)),)
        size = sum(self.nbytes(t) for t in self.results(node))
        spills = size > SPILL * self.chip.vmem_bytes
        if spills:
            self.spilled.add(node)
        loaded = sum(self.nbytes(p.tensor) for p in map(_behind_views, node.parents) if p in self.spilled)
        if node.op in LOOKED_UP:
            loaded += size
            self.least += size
        self.works.append(_Work(node, pieces, size if spills else 0, loaded))

    def _held(self, node: Node) -> int:
        """Bytes of the weights that a node reads; those it shares with others count each time, for they don't stay in VMEM."""
        found = {p for p in map(_behind_views, node.parents) if p.op is WEIGHT}
        if self.weights == "int8" and node.op not in INTEGER | {ops.quantized_linear}:
            matrices = sum(self.number(p.tensor.size) for p in found if p.tensor.rank > 1)
            return matrices + sum(self.nbytes(p.tensor) for p in found if p.tensor.rank == 1)
        return sum(self.nbytes(p.tensor) if is_float(p.dtype) else self.number(p.tensor.nbytes) for p in found)

    def _product(self, node: Node) -> tuple[Any, ...]:
        first = node.operands[0]
        assert first is not None
        shape = self.shape(first.tensor)
        integer = node.op in INTEGER
        m, k = int(product(shape[:-1])), int(node.k) if integer else shape[-1]
        n = max(self.number(axes.flops(node)) // (2 * m * k), 1)
        held = self._held(node)
        self.weight_bytes += held
        dtype = "int8" if integer or self.weights == "int8" else self.floats
        behind = self._behind(node)
        widened = node.op in (ops.quantized_linear, ops.sparse_linear)
        width = max(min(PANEL * n // max(held, 1), WIDTH) // self.chip.lanes, 1) * self.chip.lanes
        pieces = []
        for begin in range(0, n, width):
            columns = min(width, n - begin)
            nbytes = held * (begin + columns) // n - held * begin // n
            vector = Vector(m * columns, self.floats, "epilogue")
            events: list[Matmul | Vector] = [Matmul(m, k, columns, dtype), vector]
            events += [Vector(m * columns * behind, self.floats)] if behind else []
            if widened:  # codes become floats before they are multiplied
                events.insert(0, Vector(k * columns, self.floats))
            pieces.append((nbytes, tuple(events)))
        if dtype == "int8" and not integer:  # rows are rounded to 8 bits as they come: a maximum, a product
            pieces.insert(0, (0, (Vector(2 * m * k, self.floats),)))
        return tuple(pieces)

    @staticmethod
    def _behind(node: Node) -> int:
        """Simple operations on each number of a product's result, besides scaling and converting it."""
        gated = node.op in (ops.gated_linear, ops.packed_gated_linear) or bool(node.attributes.get("gated"))
        active = node.attributes.get("activation", "none") != "none"
        return 4 * active + gated

    def _general(self, node: Node) -> tuple[Any, ...]:
        count, held = self.number(axes.flops(node)), self._held(node)
        if node.op in (ops.experts, ops.packed_experts, ops.expert_linear):
            # Of the experts, only those that tokens choose are read.
            index, first = node.operands[1], node.operands[0]
            assert index is not None and first is not None
            stored = next((p for p in node.parents if p.op is WEIGHT and p.tensor.rank >= 3), None)
            if stored is not None:
                held = held * min(self.number(index.tensor.size), self.number(stored.tensor.shape[0])) // self.number(stored.tensor.shape[0])  # fmt: skip
        self.weight_bytes += held
        size = sum(self.number(t.size) for t in self.results(node))
        unit = self.chip.mxu
        rows_ = max(ceil_div(count, 2 * unit * unit * self.chip.mxus), 1)
        panels = max(ceil_div(held, PANEL), 1)
        matmul = Matmul(max(rows_ // panels, 1), unit, unit * self.chip.mxus, self.floats)
        last = (matmul, Vector(size, self.floats, "epilogue"))
        return (*(((held // panels, (matmul,)),) * (panels - 1)), (held - held // panels * (panels - 1), last))

    def _attention(self, node: Node) -> tuple[Any, ...]:
        q, k, v = node.operands[:3]
        assert q is not None and k is not None and v is not None
        b, s, h, d = self.shape(q.tensor)
        cached = node.op is ops.attention_cached
        g = self.shape(k.tensor)[1 if cached else 2]
        dv = self.shape(self.results(node)[0])[3]
        window, causal = int(node.window), cached or bool(node.causal)
        total = self.cached + s if cached else self.shape(k.tensor)[1]
        if window:
            total = min(total, window + s - 1)
        old = max(total - s, 0) if cached else 0
        # Blocks of keys that none of a block's queries sees are left out: half of the new ones' square.
        visible = round_up(total - (s - 1) // 2 if causal else total, self.chip.sublanes)
        kept = b * g * old * (self._row(node, d) + self._row(node, dv))
        self.kv_read += kept
        read = b * old * (self._stored(node, g, d, dv) + self._stored(node, g, dv, d)) if cached else kept
        grouped = s * h // g
        scores = b * g * round_up(grouped, self.chip.sublanes) * visible
        panels = max(ceil_div(read, PANEL), 1)
        pieces: list[Any] = []
        for number in range(panels):
            keys = max((number + 1) * visible // panels - number * visible // panels, 1)
            part = scores * keys // visible
            events: tuple[Matmul | Vector, ...] = (
                Matmul(grouped, d, b * g * keys, self.floats),
                Vector(part * SOFTMAX, self.floats),
                Vector(part, self.floats, "exp"),
                Matmul(grouped, keys, b * g * round_up(dv, self.chip.mxu), self.floats),
            )
            if self._scheme(node) != "none":  # records become floats
                events = (Vector(b * g * keys * (d + dv), self.floats), *events)
            pieces.append((read * (number + 1) // panels - read * number // panels, events))
        pieces.append((0, (Vector(b * s * h * dv, self.floats, "epilogue"),)))
        return tuple(pieces)

    def _scheme(self, node: Node) -> str:
        return str(node.attributes.get("scheme", "none")) if self.kv is None else self.kv

    def _row(self, node: Node, size: int) -> int:
        """Bytes of a cached row of so many numbers."""
        scheme = self._scheme(node)
        return int(size * itemsize(self.floats)) if scheme == "none" else rows.record_bytes(scheme, size)

    def _stored(self, node: Node, groups: int, size: int, other: int) -> int:
        """Bytes of a slot's rows of so many numbers, of all key heads, as our kernel reads them: in whole lanes (`layout.lay_out`). other: numbers
        of values' rows for keys', and the other way around."""
        scheme = self._scheme(node)
        if not attends(node):
            return groups * self._row(node, size)
        if scheme == "none":
            return int(groups * padded(size, beside(groups, max(size, other))) * itemsize(self.floats))
        width = rows.record_bytes(scheme, size) - rows.TAIL
        return groups * padded(width, beside(groups, width)) + padded(groups * rows.TAIL)

    def _append(self, node: Node) -> None:
        cache, new = node.operands[:2]
        assert cache is not None and new is not None
        size = self.number(new.tensor.nbytes)
        if is_float(new.dtype):
            *outer, d = self.shape(new.tensor)
            row = int(d * itemsize(self.floats)) if self.kv is None else rows.record_bytes(self.kv, d)
            size = int(product(outer)) * row
        self.kv_written += size
        self.works.append(_Work(node, ((0, (Vector(self.number(new.tensor.size), self.floats),)),), stored=size))

    def _elementwise(self, node: Node) -> tuple[Vector, ...]:
        size = sum(self.number(t.size) for t in self.results(node))
        count = FEW.get(node.op, 0) * size or self.number(axes.flops(node))
        return (Vector(max(count, size), self.floats),)

    # The run

    def estimate(self, graph: Graph) -> ProgramEstimate:
        kept = {_behind_views(n) for n in graph.outputs}
        results = sum(
            self.nbytes(t) for n in kept if n.op not in (ops.cache_append, INPUT, WEIGHT) for t in self.results(n)
        )
        state = {n.operands[0] for n in graph.nodes if n.op is ops.cache_append}
        inputs = sum(self.nbytes(n.tensor) for n in graph.inputs if n not in state and not self._cache(n, graph))
        self.least += self.weight_bytes + self.kv_read + self.kv_written + inputs + results
        unstored = results - sum(self.nbytes(t) for n in kept & self.spilled for t in self.results(n))
        labels: list[tuple[str, int]] = []
        run = simulate(self.chip, self._events(labels, inputs, unstored))
        spans = tuple(
            attrs.evolve(span, name=f"{name}: {span.name}") for span, (name, _) in zip(run.spans, labels, strict=True)
        )
        timeline = attrs.evolve(run, spans=spans)
        return ProgramEstimate(
            self.chip, run.seconds, self.chip.timing.launch / self.chip.clock, self.flops, run.hbm_bytes, self.least,
            self.weight_bytes, self.kv_read, self.kv_written, self._per_op(spans, labels, run), timeline,
        )  # fmt: skip

    @staticmethod
    def _cache(node: Node, graph: Graph) -> bool:
        return any(user.op is ops.attention_cached and node in user.operands[1:3] for user in graph.users[node])

    def _events(self, labels: list[tuple[str, int]], inputs: int, results: int) -> Iterator[Event]:
        """The program's events; `labels` gets each span's op and, in a second place, how many bytes it moves."""
        panels = [(w, nbytes) for w in self.works for nbytes, _ in w.pieces if nbytes]
        slots = max(self.chip.vmem_bytes // 2 // PANEL, 2)
        started = used = 0
        held: deque[str] = deque()

        def start() -> Iterator[Copy]:
            nonlocal started
            work, nbytes = panels[started]
            slot = f"panel {started % slots}"
            held.append(slot)
            started += 1
            yield label(Copy(nbytes, HBM, VMEM, "panels", writes=slot), work.node.op.name)

        def label(event: Any, name: str) -> Any:
            labels.append((name, event.bytes if isinstance(event, Copy) else 0))
            return event

        if inputs:
            yield label(Copy(inputs, HBM, VMEM, "inputs"), "input")
            yield Wait("inputs")
        stores = 0
        for place, work in enumerate(self.works):
            name, before, after = work.node.op.name, f"result {place - 1}", f"result {place}"
            if work.loaded:
                yield label(Copy(work.loaded, HBM, VMEM, "loads", reads=before, writes=f"loaded {place}"), name)
                yield Wait("loads")
            for nbytes, events in work.pieces:
                reads: tuple[str, ...] = (before,)
                if nbytes:
                    while started < len(panels) and started < used + slots:
                        yield from start()
                    yield Wait("panels")
                    reads = before, held.popleft()
                    used += 1
                for number, event in enumerate(events):
                    inside = f"{after}, part {number - 1}"
                    chained = reads if number == 0 else (*reads, inside)
                    final = number == len(events) - 1
                    writes = (f"{after}, part {number}", after) if final else (f"{after}, part {number}",)
                    yield label(attrs.evolve(event, reads=chained, writes=writes[-1:] if final else writes), name)
            if work.stored:
                yield label(Copy(work.stored, VMEM, HBM, "stores", reads=after), name)
                stores += 1
        if results:
            yield label(Copy(results, VMEM, HBM, "stores", reads=f"result {len(self.works) - 1}"), "output")
            stores += 1
        yield from [Wait("stores")] * stores

    def _per_op(self, spans: tuple[Span, ...], labels: list[tuple[str, int]], run: Timeline) -> tuple[OpTime, ...]:
        """Per kind of op, by how much its arithmetic moved the end of all arithmetic; what launching, inputs and the last stores take is
        "(start and end)"."""
        seconds: dict[str, float] = {}
        moved: dict[str, int] = {}
        counts: dict[str, int] = {}
        for work in self.works:
            counts[work.node.op.name] = counts.get(work.node.op.name, 0) + 1
        reached = 0.0
        first = min((s.start for s in spans if s.unit in ("mxu", "vector")), default=0.0)
        if self.works:
            reached = min(first, self.chip.timing.launch + self.chip.dma_latency * self.chip.clock)
        begin = reached
        for span, (name, nbytes) in zip(spans, labels, strict=True):
            moved[name] = moved.get(name, 0) + nbytes
            if span.unit in ("mxu", "vector") and span.end > reached:
                seconds[name] = seconds.get(name, 0.0) + (span.end - reached) / self.chip.clock
                reached = span.end
        rest = (begin + run.cycles - reached) / self.chip.clock
        found = [OpTime(name, count, seconds.get(name, 0.0), moved.get(name, 0)) for name, count in counts.items()]
        outside = sum(v for name, v in moved.items() if name not in counts)
        return (*sorted(found, key=lambda o: -o.seconds), OpTime("(start and end)", 1, rest, outside))


def _behind_views(node: Node) -> Node:
    while node.op in VIEWS and node.parents:
        node = node.parents[0]
    return node
