"""A tiled matrix product on a TPU core: its events, and in closed form what they take.

The product is cut into blocks of `tiles` = (rows, depth, columns). Each step of the grid multiplies one block of x by one of w, while the blocks
of the steps ahead are copied into other slots: of the next step where there are two slots, of the next three where there are four. Results leave
through slots of their own. A block that the next step needs again isn't copied again. Of the two orders of the outer loops, the one that
moves fewer bytes is taken.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.events import HBM, VMEM, Allocate, Copy, Event, Matmul, Vector, Wait
from jisu.targets.tpu.systolic import ceil_div, vector_cycles, work

Tiles = tuple[int, int, int]

ERROR = 0.3
"""How far the closed form may be from the simulated events, relatively: it is the same on most products, and averages over ragged edges."""


@attrs.frozen
class Product:
    """What a tiled product takes in closed form; cycles and bytes are simulated, not measured.

    mxu, vector, hbm: cycles that each unit is busy. ideal: at the MXUs' peak. least_bytes: every operand read once, the result written once.
    """

    chip: Chip
    tiles: Tiles
    cycles: float
    mxu: float
    vector: float
    hbm: float
    ideal: float
    hbm_bytes: int
    least_bytes: int
    vmem_bytes: int

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.clock

    @property
    def mxu_utilisation(self) -> float:
        return self.ideal / self.cycles

    @property
    def hbm_bound(self) -> float:
        """Cycles that HBM alone takes for the least bytes."""
        return self.least_bytes / self.chip.hbm_bytes_per_cycle

    @property
    def bound(self) -> str:
        """The busiest unit: "mxu", "vector" or "hbm"."""
        return max(("mxu", "vector", "hbm"), key=lambda unit: getattr(self, unit))


@attrs.frozen
class _Plan:
    """Blocks along each axis as (size, count), which outer loop is the outermost, and how often x and w are read."""

    m: tuple[tuple[int, int], ...]
    k: tuple[tuple[int, int], ...]
    n: tuple[tuple[int, int], ...]
    rows_outside: bool
    x_reads: int
    w_reads: int

    @property
    def turns(self) -> tuple[int, int]:
        """How often the outer loop turns, and for how many steps each turn keeps its operand's block."""
        outer, inner = (self.m, self.n) if self.rows_outside else (self.n, self.m)
        return _count(outer), _count(inner) if _count(self.k) == 1 else 1


def _blocks(size: int, tile: int) -> tuple[tuple[int, int], ...]:
    whole, rest = divmod(size, tile)
    return tuple((s, c) for s, c in ((tile, whole), (rest, 1)) if s and c)


def _count(blocks: tuple[tuple[int, int], ...]) -> int:
    return sum(count for _, count in blocks)


def _plan(m: int, k: int, n: int, tiles: Tiles, weights: str, slots: int) -> _Plan:
    if min(m, k, n, *tiles) < 1:
        raise TargetError(f"a product of {m}x{k}x{n} in tiles of {tiles}: sizes start at 1")
    if slots < 2:
        raise TargetError(f"copies beside arithmetic need 2 slots or more, not {slots}")
    if weights not in ("hbm", "vmem"):
        raise TargetError(f"weights are in 'hbm' or 'vmem', not in {weights!r}")
    axes = _blocks(m, tiles[0]), _blocks(k, tiles[1]), _blocks(n, tiles[2])
    mb, kb, nb = (_count(b) for b in axes)
    choices = []
    for rows_outside in (False, True):
        again, kept = (mb, nb) if rows_outside else (nb, mb)
        # The operand of the outer loop stays while the inner one turns, if its depth is one block; the other one is read at each turn.
        inner = 1 if kb == 1 and kept == 1 else again
        outer = 1 if kb == 1 else kept
        x, w = (outer, inner) if rows_outside else (inner, outer)
        w = w if weights == "hbm" else 0
        choices.append((x * m * k + w * k * n, rows_outside, x, w))
    _, rows_outside, x, w = min(choices)
    return _Plan(*axes, rows_outside, x, w)


def product(
    chip: Chip, m: int, k: int, n: int, dtype: str, tiles: Tiles, *, weights: str = "hbm", output: str = "bfloat16",
    slots: int = 2, launch: bool = True,
) -> Product:  # fmt: skip
    """(m, k) by (k, n) in blocks of `tiles` through `slots` slots per operand, in closed form.

    weights="vmem": they are there already, as when a copy beside the work before has brought them. The first blocks' copy and the last
    block's results are exposed; in between, each step takes as long as its busiest unit, or as its copies if they can't be started early enough
    for their latency. Within ERROR of `simulate(chip, events(...))`.
    """
    plan = _plan(m, k, n, tiles, weights, slots)
    size, out = itemsize(dtype), itemsize(output)
    mxu = vector = epilogue = ideal = 0.0
    for (bm, cm), (bk, ck), (bn, cn) in itertools.product(plan.m, plan.k, plan.n):
        cost = work(chip, bm, bk, bn, dtype)
        count = cm * ck * cn
        mxu, vector, ideal = mxu + count * cost.mxu, vector + count * cost.vector, ideal + count * cost.ideal
    for (bm, cm), (bn, cn) in itertools.product(plan.m, plan.n):
        epilogue += cm * cn * vector_cycles(chip, bm * bn, "epilogue")
    adding, vector = vector, vector + epilogue
    last_m, last_n = plan.m[-1][0], plan.n[-1][0]
    rate = chip.hbm_bytes_per_cycle
    x, w, y = int(m * k * size), int(k * n * size), int(m * n * out)
    moved = plan.x_reads * x + plan.w_reads * w + y
    first = int(plan.m[0][0] * plan.k[0][0] * size) + (int(plan.k[0][0] * plan.n[0][0] * size) if plan.w_reads else 0)
    last = int(last_m * last_n * out)
    tail = vector_cycles(chip, last_m * last_n, "epilogue")
    steps, latency = _count(plan.m) * _count(plan.k) * _count(plan.n), chip.dma_latency * chip.clock
    results = _count(plan.m) * _count(plan.n)
    steady = _steady(
        plan, slots, rate, latency, mxu / steps, adding / steps, epilogue / results, plan.x_reads * x, plan.w_reads * w, y / results
    )  # fmt: skip
    ends = 2 * latency + (first + last) / rate + tail
    cycles = steady + ends + (chip.timing.launch if launch else 0.0)
    least = x + y + (w if weights == "hbm" else 0)
    vmem = sum(a.bytes for a in _buffers(m, k, n, dtype, tiles, weights, output, slots))
    return Product(chip, tiles, cycles, mxu, vector, moved / rate, ideal, moved, least, vmem)


def _steady(
    plan: _Plan, slots: int, rate: float, latency: float, mxu: float, adding: float, epilogue: float, x: float, w: float, result: float
) -> float:  # fmt: skip
    """Cycles from the first product's start to the last one's end.

    mxu and adding (of partial sums) are cycles of a step, epilogue and `result` cycles and bytes of a block of results, x and w bytes read in
    all. An epilogue holds up the sums of the next step.
    """
    results, depth = _count(plan.m) * _count(plan.n), _count(plan.k)
    # A slot of results turns around when the epilogue has filled it and a copy has emptied it.
    turnaround = (epilogue + latency + result / rate) / slots if results > slots else 0.0
    within, last = max(mxu, adding), max(mxu, adding + epilogue, turnaround / depth)

    def step(nbytes: float, pace: float) -> float:
        """A slot of operands turns around when a copy has filled it and the MXUs have read it."""
        return max(pace, nbytes / rate, (nbytes / rate + latency + mxu) / slots if nbytes else 0.0)

    if depth > 1:
        both = (x + w) / (results * depth)
        found = (results - 1) * step(both + result, last) + results * (depth - 1) * step(both, within)
        return max(found, turnaround * (results - 1)) + within
    turns, kept = plan.turns
    outer, inner = (x, w) if plan.rows_outside else (w, x)
    outer, inner = outer / turns, inner / results if kept > 1 else 0.0
    each = max(step(inner, last), (inner + result) / rate)
    # The outer operand's next block is copied during the last steps of a turn, as many as slots allow.
    window = min(slots - 1, kept)
    burst = max(window * each, (outer + window * (inner + result)) / rate)
    turn = burst + (kept - window) * each
    if outer:
        turn = max(turn, (outer / rate + latency + kept * mxu) / slots)
    return within + (kept - 1) * each + (turns - 1) * turn


def _buffers(m: int, k: int, n: int, dtype: str, tiles: Tiles, weights: str, output: str, slots: int) -> list[Allocate]:
    bm, bk, bn = (min(size, tile) for size, tile in zip((m, k, n), tiles, strict=True))
    mb, kb, nb = (ceil_div(size, tile) for size, tile in zip((m, k, n), tiles, strict=True))
    size = itemsize(dtype)
    x_slots, w_slots, y_slots = min(mb * kb, slots), min(kb * nb, slots), min(mb * nb, slots)
    found = [Allocate(f"x[{i}]", int(bm * bk * size)) for i in range(x_slots)]
    if weights == "vmem":
        found.append(Allocate("w", int(k * n * size)))
    else:
        found += [Allocate(f"w[{i}]", int(bk * bn * size)) for i in range(w_slots)]
    # No chip before v7x tells of accumulators of its own: sums are 32-bit tiles of VMEM.
    found += [Allocate(f"sum[{i}]", bm * bn * 4) for i in range(min(y_slots, 2))]
    return found + [Allocate(f"y[{i}]", int(bm * bn * itemsize(output))) for i in range(y_slots)]


def events(
    chip: Chip, m: int, k: int, n: int, dtype: str, tiles: Tiles, *, weights: str = "hbm", output: str = "bfloat16",
    slots: int = 2,
) -> Iterator[Event]:  # fmt: skip
    """The same product as `product` as a stream of events, for `simulate`."""
    plan = _plan(m, k, n, tiles, weights, slots)
    size, out = itemsize(dtype), itemsize(output)
    m_sizes, k_sizes, n_sizes = ([s for s, c in axis for _ in range(c)] for axis in (plan.m, plan.k, plan.n))
    outer = [(i, j) for i in range(len(m_sizes)) for j in range(len(n_sizes))]
    if not plan.rows_outside:
        outer.sort(key=lambda ij: (ij[1], ij[0]))
    steps = [(i, j, d) for i, j in outer for d in range(len(k_sizes))]
    copied = {"x": 0, "w": 0}
    held: dict[str, tuple[int, int]] = {}
    yield from _buffers(m, k, n, dtype, tiles, weights, output, slots)

    def load(step: tuple[int, int, int]) -> Iterator[Copy]:
        i, j, d = step
        for name, block, nbytes in (
            ("x", (i, d), int(m_sizes[i] * k_sizes[d] * size)),
            ("w", (d, j), int(k_sizes[d] * n_sizes[j] * size)),
        ):
            if held.get(name) == block or (name == "w" and weights == "vmem"):
                continue
            held[name] = block
            slot = f"{name}[{copied[name] % slots}]"
            copied[name] += 1
            yield Copy(nbytes, HBM, VMEM, slot, writes=slot)

    now = {"x": "x[0]", "w": "w[0]" if weights == "hbm" else "w"}
    ahead: deque[list[Copy]] = deque()
    for step in steps[: slots - 1]:
        ahead.append(list(load(step)))
        yield from ahead[-1]
    turn = 0
    for s, (i, j, d) in enumerate(steps):
        if s + slots - 1 < len(steps):
            ahead.append(list(load(steps[s + slots - 1])))
            yield from ahead[-1]
        copies = ahead.popleft()
        yield from (Wait(c.semaphore) for c in copies)
        now |= {c.semaphore[0]: c.semaphore for c in copies}
        sums, slot = f"sum[{turn % 2}]", f"y[{turn % slots}]"
        yield Matmul(
            m_sizes[i], k_sizes[d], n_sizes[j], dtype, reads=(now["x"], now["w"]), writes=sums
        )  # fmt: skip
        if d == len(k_sizes) - 1:
            count = m_sizes[i] * n_sizes[j]
            if turn >= slots:
                yield Wait(slot)
            yield Vector(count, output, "epilogue", reads=sums, writes=slot)
            yield Copy(int(count * out), VMEM, HBM, slot, reads=slot)
            turn += 1
    yield from (Wait(f"y[{t % slots}]") for t in range(max(turn - slots, 0), turn))


@functools.cache
def best_tiles(
    chip: Chip, m: int, k: int, n: int, dtype: str, *, weights: str = "hbm", output: str = "bfloat16", slots: int = 2
) -> Tiles:
    """The tiles of `product` that take the fewest cycles (then the least VMEM) and fit into VMEM; a whole axis, or whole MXU tiles of it.

    Raises TargetError if nothing fits.
    """
    step = chip.sublane_tile(dtype)
    heights = {min(m, step << i) for i in range(12)} | {m}
    depths = {min(k, chip.mxu << i) for i in range(9)} | {k}
    widths = {min(n, chip.mxu << i) for i in range(9)} | {n}
    best: tuple[float, int, Tiles] | None = None
    for tiles in itertools.product(sorted(heights), sorted(depths), sorted(widths)):
        if sum(a.bytes for a in _buffers(m, k, n, dtype, tiles, weights, output, slots)) > chip.vmem_bytes:
            continue
        found = product(chip, m, k, n, dtype, tiles, weights=weights, output=output, slots=slots)
        key = (found.cycles, found.vmem_bytes, tiles)
        best = key if best is None else min(best, key)
    if best is None:
        raise TargetError(
            f"no tiles of {m}x{k}x{n} {dtype} fit into the {chip.vmem_bytes:,} bytes of VMEM of {chip.name}"
        )
    return best[2]
