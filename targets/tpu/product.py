"""A tiled matrix product on a TPU core: its events, and in closed form what they take.

The product is cut into blocks of `tiles` = (rows, depth, columns). Each step of the grid multiplies one block of x by one of w; the next step's
blocks are copied meanwhile into second slots, results leave through two slots of their own. A block that the next step needs again isn't copied
again. Of the two orders of the outer loops, the one that moves fewer bytes is taken.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.events import HBM, VMEM, Allocate, Copy, Event, Matmul, Vector, Wait
from jisu.targets.tpu.systolic import ceil_div, vector_cycles, work

Tiles = tuple[int, int, int]


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


def _blocks(size: int, tile: int) -> tuple[tuple[int, int], ...]:
    whole, rest = divmod(size, tile)
    return tuple((s, c) for s, c in ((tile, whole), (rest, 1)) if s and c)


def _count(blocks: tuple[tuple[int, int], ...]) -> int:
    return sum(count for _, count in blocks)


def _plan(m: int, k: int, n: int, dtype: str, tiles: Tiles, weights: str) -> _Plan:
    if min(m, k, n, *tiles) < 1:
        raise TargetError(f"a product of {m}x{k}x{n} in tiles of {tiles}: sizes start at 1")
    if weights not in ("hbm", "vmem"):
        raise TargetError(f"weights are in 'hbm' or 'vmem', not in {weights!r}")
    blocks = [_blocks(size, tile) for size, tile in zip((m, k, n), tiles, strict=True)]
    mb, kb, nb = (_count(b) for b in blocks)
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
    return _Plan(*blocks, rows_outside, x, w)


def product(
    chip: Chip, m: int, k: int, n: int, dtype: str, tiles: Tiles, *, weights: str = "hbm", output: str = "bfloat16",
    launch: bool = True,
) -> Product:  # fmt: skip
    """(m, k) by (k, n) in blocks of `tiles`, double-buffered, in closed form.

    weights="vmem": they are there already, as when a copy beside the work before has brought them. The first blocks' copy and the last
    block's results are exposed; between them the busiest unit sets the pace. Against `simulate(chip, events(...))` it is at most as long, and
    within 15 % on the products of `tests/test_tpu_timing.py` (ragged edges and few blocks overlap less well than sums say).
    """
    plan = _plan(m, k, n, dtype, tiles, weights)
    size, out = itemsize(dtype), itemsize(output)
    mxu = vector = ideal = 0.0
    for (bm, cm), (bk, ck), (bn, cn) in itertools.product(plan.m, plan.k, plan.n):
        cost = work(chip, bm, bk, bn, dtype)
        count = cm * ck * cn
        mxu, vector, ideal = mxu + count * cost.mxu, vector + count * cost.vector, ideal + count * cost.ideal
    for (bm, cm), (bn, cn) in itertools.product(plan.m, plan.n):
        vector += cm * cn * vector_cycles(chip, bm * bn, "epilogue")
    last_m, last_n = plan.m[-1][0], plan.n[-1][0]
    first = int(plan.m[0][0] * plan.k[0][0] * size) + (int(plan.k[0][0] * plan.n[0][0] * size) if plan.w_reads else 0)
    last = int(last_m * last_n * out)
    x, w, y = int(m * k * size), int(k * n * size), int(m * n * out)
    moved = plan.x_reads * x + plan.w_reads * w + y
    rate = chip.hbm_bytes_per_cycle
    tail = vector_cycles(chip, last_m * last_n, "epilogue")
    steady = max(mxu, vector - tail, (moved - first - last) / rate)
    ends = 2 * chip.dma_latency * chip.clock + (first + last) / rate + tail
    cycles = steady + ends + (chip.timing.launch if launch else 0.0)
    least = x + y + (w if weights == "hbm" else 0)
    vmem = sum(a.bytes for a in _buffers(m, k, n, dtype, tiles, weights, output))
    return Product(chip, tiles, cycles, mxu, vector, moved / rate, ideal, moved, least, vmem)


def _buffers(m: int, k: int, n: int, dtype: str, tiles: Tiles, weights: str, output: str) -> list[Allocate]:
    bm, bk, bn = (min(size, tile) for size, tile in zip((m, k, n), tiles, strict=True))
    mb, kb, nb = (ceil_div(size, tile) for size, tile in zip((m, k, n), tiles, strict=True))
    size = itemsize(dtype)
    x_slots, w_slots, y_slots = min(mb * kb, 2), min(kb * nb, 2), min(mb * nb, 2)
    found = [Allocate(f"x[{i}]", int(bm * bk * size)) for i in range(x_slots)]
    if weights == "vmem":
        found.append(Allocate("w", int(k * n * size)))
    else:
        found += [Allocate(f"w[{i}]", int(bk * bn * size)) for i in range(w_slots)]
    # No chip before v7x tells of accumulators of its own: sums are 32-bit tiles of VMEM.
    found += [Allocate(f"sum[{i}]", bm * bn * 4) for i in range(y_slots)]
    return found + [Allocate(f"y[{i}]", int(bm * bn * itemsize(output))) for i in range(y_slots)]


def events(
    chip: Chip, m: int, k: int, n: int, dtype: str, tiles: Tiles, *, weights: str = "hbm", output: str = "bfloat16"
) -> Iterator[Event]:
    """The same product as `product` as a stream of events, for `simulate`."""
    plan = _plan(m, k, n, dtype, tiles, weights)
    size, out = itemsize(dtype), itemsize(output)
    m_sizes, k_sizes, n_sizes = ([s for s, c in axis for _ in range(c)] for axis in (plan.m, plan.k, plan.n))
    outer = [(i, j) for i in range(len(m_sizes)) for j in range(len(n_sizes))]
    if not plan.rows_outside:
        outer.sort(key=lambda ij: (ij[1], ij[0]))
    steps = [(i, j, d) for i, j in outer for d in range(len(k_sizes))]
    slots = {"x": -1, "w": -1}
    held: dict[str, tuple[int, int]] = {}
    yield from _buffers(m, k, n, dtype, tiles, weights, output)

    def load(step: tuple[int, int, int]) -> Iterator[Copy]:
        i, j, d = step
        for name, block, nbytes in (
            ("x", (i, d), int(m_sizes[i] * k_sizes[d] * size)),
            ("w", (d, j), int(k_sizes[d] * n_sizes[j] * size)),
        ):
            if held.get(name) == block or (name == "w" and weights == "vmem"):
                continue
            held[name] = block
            slots[name] += 1
            slot = f"{name}[{slots[name] % 2}]"
            yield Copy(nbytes, HBM, VMEM, slot, writes=slot)

    copies = list(load(steps[0]))
    now = {"x": "x[0]", "w": "w[0]" if weights == "hbm" else "w"}
    yield from copies
    turn = 0
    for s, (i, j, d) in enumerate(steps):
        following = list(load(steps[s + 1])) if s + 1 < len(steps) else []
        yield from following
        yield from (Wait(c.semaphore) for c in copies)
        now |= {c.semaphore[0]: c.semaphore for c in copies}
        copies = following
        slot = turn % 2
        yield Matmul(
            m_sizes[i], k_sizes[d], n_sizes[j], dtype, reads=(now["x"], now["w"]), writes=f"sum[{slot}]"
        )  # fmt: skip
        if d == len(k_sizes) - 1:
            count = m_sizes[i] * n_sizes[j]
            if turn >= 2:
                yield Wait(f"y[{slot}]")
            yield Vector(count, output, "epilogue", reads=f"sum[{slot}]", writes=f"y[{slot}]")
            yield Copy(int(count * out), VMEM, HBM, f"y[{slot}]", reads=f"y[{slot}]")
            turn += 1
    yield from (Wait(f"y[{t % 2}]") for t in range(max(turn - 2, 0), turn))


@functools.cache
def best_tiles(
    chip: Chip, m: int, k: int, n: int, dtype: str, *, weights: str = "hbm", output: str = "bfloat16"
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
        if sum(a.bytes for a in _buffers(m, k, n, dtype, tiles, weights, output)) > chip.vmem_bytes:
            continue
        found = product(chip, m, k, n, dtype, tiles, weights=weights, output=output)
        key = (found.cycles, found.vmem_bytes, tiles)
        best = key if best is None else min(best, key)
    if best is None:
        raise TargetError(f"no tiles of {m}x{k}x{n} {dtype} fit into the {chip.vmem_bytes:,} bytes of VMEM of {chip.name}")
    return best[2]
