"""Tuning: variants of kernels measured on this machine, within a time budget, and remembered.

Per kernel a coordinate descent: one number of its schedule after the other is varied, and a change stays if it makes the kernel faster.
A variant is timed beside the kernel as the model in `kernels/` cuts it, in turns, with weights that come from as far away as they do
when the model runs. What was measured is kept by machine and kernel, so that a search that ran out of time goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np

from jisu.compiler import axes, ops
from jisu.compiler.cost import weight_bytes
from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import Graph, Node, placeholder
from jisu.compiler.storage import aligned, whole_file
from jisu.compiler.types import TensorType, TupleType, numpy_dtype, substitute
from jisu.targets import cpu
from jisu.targets.compile import compile_graphs, produced_by
from jisu.targets.schedule import Schedule, kernel_key
from jisu.targets.target import Target, host

SECONDS = 120.0
"""The budget where none is named."""
ROWS = (1, 8, 256)
"""Rows of x at which a kernel is timed: a decoded token, a small batch, a prompt."""
_GAIN = 0.98  # of the time of the best so far that a variant may take at most: less can't be told from noise
_ROUNDS = 5
_ROUND_SECONDS = 4e-3
_MOST_FLOPS = 2e10  # of one call: longer ones say no more
_ENTRY = "kernel"
_clock = time.perf_counter


class Runner(Protocol):
    """A loaded library."""

    def call(self, entry: str, inputs: Sequence[Any]) -> Any:
        """Run an entry on aligned arrays."""
        ...


Loader = Callable[[Path, Mapping[str, Entry]], Runner]
"""Loads a library with these entries."""


@attrs.frozen
class Tuned:
    """What tuning found for a kernel: its schedule, and the time it takes relative to the kernel without (geometric mean over `ROWS`).

    variants: how many were measured, now or before. complete: whether none is left to try.
    """

    key: str
    op: str
    schedule: Schedule
    ratio: float
    variants: int
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**attrs.asdict(self), "schedule": self.schedule.to_json()}


def check_tunable(target: Target) -> None:
    """Raises TargetError unless this machine can run what is compiled for the target, and kernels have something to tune."""
    if target.kind != "cpu":
        raise TargetError(f"kernels for {target.name!r} have nothing to tune yet; leave tune out")
    if missing := target.check_host():
        raise TargetError(
            f"tune measures kernels on this machine, which can't run code for {target.name!r}: it lacks "
            f"{', '.join(missing)}; leave tune out, or compile on the machine that the program is for"
        )


def tune(
    graphs: Mapping[str, Graph],
    target: Target,
    seconds: float,
    *,
    load: Loader,
    num_threads: int | None = None,
    cache_dir: Path,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tuned, ...]:
    """Schedules for the kernels of laid-out graphs, those first that read most weights.

    seconds: how long measuring and compiling variants may take, about; what was measured before costs nothing. load: with as many
    threads as num_threads says (default: all cores). progress: called with the fraction of the budget that is spent. Raises
    TargetError for a target that this machine can't run.
    """
    check_tunable(target)
    kernels: dict[str, list[Node]] = {}
    for graph in graphs.values():
        for node in graph.nodes:
            if cpu.variants(node, target):
                kernels.setdefault(kernel_key(node), []).append(node)
    streamed = max((weight_bytes(graph) for graph in graphs.values()), default=0)
    weights = {key: 1.0 + sum(map(_weight, nodes)) for key, nodes in kernels.items()}
    order = sorted(kernels, key=lambda key: -weights[key])
    begin, found = time.monotonic(), []
    for i, key in enumerate(order):
        node = kernels[key][0]
        left = seconds - (time.monotonic() - begin)
        share = weights[key] / sum(weights[k] for k in order[i:])
        memory = _Memory(cache_dir / "schedules", key, target, num_threads, streamed)
        with contextlib.ExitStack() as stack:

            @functools.cache
            def bench(node: Node = node, stack: contextlib.ExitStack = stack) -> _Bench:
                return stack.enter_context(_bench(node, target, streamed, load, cache_dir))

            variants = cpu.variants(node, target)
            found.append(_search(key, node, target.schedule, variants, max(left, 0.0) * share, memory, bench))
        if progress is not None:
            progress(min((time.monotonic() - begin) / seconds, 1.0) if seconds else 1.0)
    return tuple(found)


def _apart(streamed: int, target: Target) -> int:
    """Bytes that a model with so many of weights reads from one call of a kernel to its next, up to what no cache holds."""
    last = max((c.bytes for c in target.caches), default=1 << 25)
    return min(streamed, 2 * last, host().memory_bytes // 8)


def _weight(node: Node) -> float:
    """Bytes of a kernel's operands whose sizes don't depend on the call: what it streams."""
    return float(sum(t.nbytes for t in _types(node) if not t.symbols))  # type: ignore[misc]


def _types(node: Node) -> list[TensorType]:
    return [o.tensor for o in node.operands if o is not None]


# --- The search ---------------------------------------------------------------------------------------------------------


def _search(
    key: str,
    node: Node,
    base: Schedule,
    variants: Mapping[str, Sequence[int]],
    seconds: float,
    memory: _Memory,
    bench: Callable[[], _Bench],
) -> Tuned:
    """The best schedule of one kernel that is found within `seconds`."""
    deadline = time.monotonic() + seconds

    def measured(schedule: Schedule) -> float | None:
        """The ratio of a schedule; None where it isn't known and there is no time to measure it."""
        if not memory.knows(schedule):
            if time.monotonic() >= deadline:
                return None
            memory.put(schedule, bench().ratio(schedule, _ROUNDS), sure=False)
        return memory.ratios[schedule]

    while True:
        best, ratio, complete = _descend(base, variants, measured)
        # The least of many noisy figures is too low: what is chosen is measured once more, which may change the choice.
        late = time.monotonic() >= deadline
        if best != base and not memory.knows(best, sure=True) and seconds:
            memory.put(best, bench().ratio(best, 3 * _ROUNDS), sure=True)
            if not late:
                continue
            ratio = memory.ratios[best]
        if ratio >= _GAIN or not memory.knows(best, sure=True):
            best, ratio = base, 1.0
        return Tuned(key, node.op.name, best, ratio, len(memory.ratios), complete)


def _descend(
    base: Schedule, variants: Mapping[str, Sequence[int]], measured: Callable[[Schedule], float | None]
) -> tuple[Schedule, float, bool]:
    """The best schedule from `base` on, its ratio, and whether all was measured that the search asked for."""
    best, ratio = base, 1.0
    for name, values in variants.items():
        around = best
        for value in values:
            schedule = attrs.evolve(around, **{name: value})
            found = measured(schedule)
            if found is None:
                return best, ratio, False
            if found < _GAIN * ratio:
                best, ratio = schedule, found
    return best, ratio, True


class _Memory:
    """What was measured of one kernel, in a file of its own.

    A variant that can't be compiled has the ratio infinity.
    """

    def __init__(self, folder: Path, key: str, target: Target, num_threads: int | None, streamed: int) -> None:
        self.about = {
            # In powers of two: how far away weights are decides what is fast.
            "apart": _apart(streamed, target).bit_length(),
            "kernel": key,
            "target": target.fingerprint(),
            "machine": host().source,
            "threads": num_threads or host().cores,
            "rows": list(ROWS),
            **produced_by(),
        }
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest}.json"
        self.ratios: dict[Schedule, float] = {}
        self.sure: set[Schedule] = set()
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            data = json.loads(self.path.read_bytes())
            if data["about"] == self.about:
                for numbers, ratio, sure in data["measured"]:
                    self._note(Schedule(**numbers), math.inf if ratio is None else float(ratio), bool(sure))

    def knows(self, schedule: Schedule, sure: bool = False) -> bool:
        """Whether a schedule's ratio is known, or known for sure."""
        return schedule in (self.sure if sure else self.ratios)

    def put(self, schedule: Schedule, ratio: float, sure: bool) -> None:
        """Note a ratio, and write all in one step; a cache that can't be written is no reason to fail."""
        self._note(schedule, ratio, sure)
        rows = [[s.to_json(), None if math.isinf(r) else r, s in self.sure] for s, r in self.ratios.items()]
        data = {"about": self.about, "measured": rows}
        with contextlib.suppress(OSError), whole_file(self.path) as file:
            file.write(json.dumps(data).encode())

    def _note(self, schedule: Schedule, ratio: float, sure: bool) -> None:
        self.ratios[schedule] = ratio
        if sure:
            self.sure.add(schedule)


def _folder(schedule: Schedule) -> str:
    return "-".join(f"{name}{value}" for name, value in schedule.to_json().items()) or "without"


# --- The measurement ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bench(node: Node, target: Target, streamed: int, load: Loader, cache_dir: Path) -> Iterator[_Bench]:
    folder = Path(tempfile.mkdtemp(prefix="jisu-tune-"))
    try:
        yield _Bench(node, target, streamed, load, cache_dir, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Bench:
    """One kernel, in the form that its schedule gives it, on made-up data; `streamed`: bytes of all weights that its model reads."""

    def __init__(self, node: Node, target: Target, streamed: int, load: Loader, cache_dir: Path, folder: Path) -> None:
        self.target, self.load, self.cache_dir, self.folder = target, load, cache_dir, folder
        self.apart = _apart(streamed, target)
        inputs = {o: placeholder(f"x{i}", o.tensor) for i, o in enumerate(dict.fromkeys(node.parents))}
        self.node = node.with_operands(None if o is None else inputs[o] for o in node.operands)
        self.types = [n.tensor for n in inputs.values()]
        self.graph, self.key = Graph(tuple(inputs.values()), _results(self.node)), kernel_key(self.node)
        self.base = self._compiled(target.schedule)
        self.weights = self._weights()
        self.data = {rows: self._data(rows) for rows in self._row_counts()}
        self.calls = {rows: self._calls(rows) for rows in self.data}

    def ratio(self, schedule: Schedule, rounds: int) -> float:
        """The time with `schedule` relative to that without: medians of turns, the geometric mean over counts of rows."""
        try:
            other = self._compiled(schedule)
        except CompileError:
            return math.inf
        found = []
        for rows in self.data:
            pairs = []
            for turn in range(rounds):
                seconds = {}
                for which in (self.base, other) if turn % 2 == 0 else (other, self.base):
                    seconds[which] = self._seconds(which, rows, self.calls[rows])
                pairs.append(seconds[other] / seconds[self.base])
            found.append(math.log(statistics.median(pairs)))
        return math.exp(sum(found) / len(found))

    def _compiled(self, schedule: Schedule) -> Runner:
        out = self.folder / _folder(schedule)
        info = compile_graphs(
            {_ENTRY: self.graph}, self.target, out=out, schedules={self.key: schedule}, cache_dir=self.cache_dir
        )
        return self.load(info.library, info.entries)

    def _row_counts(self) -> list[int]:
        """`ROWS`, as far as the call's sizes are free and it stays short."""
        if not self.graph.symbols:
            return [1]
        most = _MOST_FLOPS / max(float(substitute(axes.flops(self.node), dict.fromkeys(self.graph.symbols, 1))), 1.0)  # type: ignore[arg-type]
        return [ROWS[0], *(rows for rows in ROWS[1:] if rows <= most)]

    def _env(self, rows: int) -> dict[str, int]:
        """Sizes of which x has `rows` rows: its last symbol is as large, all others are 1."""
        free = [str(s) for d in self.types[0].shape[:-1] if not isinstance(d, int) for s in d.free_symbols]
        env = dict.fromkeys(self.graph.symbols, 1)
        return {**env, max(free): rows} if free else env

    def _weights(self) -> list[list[np.ndarray | None]]:
        """What doesn't depend on the call (else None), so many times as lie `apart`."""
        random = np.random.default_rng(0)
        made = [None if t.symbols else _made_up(t, {}, random) for t in self.types]
        fixed = sum(a.nbytes for a in made if a is not None)
        copies = max(1, -(-self.apart // max(fixed, 1)))
        return [made, *([None if a is None else _copied(a) for a in made] for _ in range(copies - 1))]

    def _data(self, rows: int) -> list[list[np.ndarray]]:
        """Inputs for calls in turn."""
        env, random = self._env(rows), np.random.default_rng(0)
        own = {i: _made_up(t, env, random) for i, t in enumerate(self.types) if t.symbols}
        sets = self.weights if rows <= 16 else self.weights[:1]
        return [[own[i] if a is None else a for i, a in enumerate(weights)] for weights in sets]

    def _calls(self, rows: int) -> int:
        """Calls that make a round long enough for the clock."""
        self._seconds(self.base, rows, 1)  # touches memory for the first time
        return max(1, math.ceil(_ROUND_SECONDS / self._seconds(self.base, rows, 2)))

    def _seconds(self, which: Runner, rows: int, calls: int) -> float:
        data = self.data[rows]
        which.call(_ENTRY, data[-1])
        begin = _clock()
        for i in range(calls):
            which.call(_ENTRY, data[i % len(data)])
        return (_clock() - begin) / calls


def _results(node: Node) -> tuple[Node, ...]:
    if not isinstance(node.type, TupleType):
        return (node,)
    return tuple(ops.get(node, index=i) for i in range(len(node.type.items)))


def _made_up(kind: TensorType, env: Mapping[str, int], random: np.random.Generator) -> np.ndarray:
    """An array of a type: numbers of a usual size, any codes; of what depends on the call zeros, since records have scales in them."""
    shape = tuple(int(d) for d in kind.at(env).shape)
    dtype = numpy_dtype(kind.dtype)
    if kind.symbols or dtype.kind == "i":
        return _copied(np.zeros(shape, dtype))
    block = random.integers(0, 256, 1 << 16, np.uint8) if dtype.kind == "u" else random.uniform(0.5, 1.0, 1 << 16)
    return _copied(np.resize(block.astype(dtype), shape))


def _copied(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
