"""Tile sizes of a product, by search over all that fit.

A schedule moves tiles of x [m, k] and w [k, n] into VMEM, two of each where the next one comes while this one is multiplied, and one
tile of the result back. Three orders:

- "resident": a tile of x is copied once, panels of w stream past it; where it holds all rows, each byte moves once.
- "panels": every step copies a tile of x and a panel of w over the whole inner axis. Each is read again per tile of the other's axis.
- "split": the inner axis is split, too, for products whose panels don't fit into VMEM.

Schedules are ranked by `Tiles.cycles`, which costs a step's units as the timing model does (`systolic.work`, `vector_cycles`, the chip's
bandwidth and latency) and adds up its pipeline in closed form: within ERROR of simulating the events of the lowered TIR. Of the schedules that
are at most SLACK slower than the fastest, the one that moves the fewest bytes is taken: what HBM has left brings the next product's weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs

from jisu.compiler.errors import CompileError
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.spec import Product, round_up
from jisu.targets.tpu.systolic import vector_cycles, work

HEADROOM = 8
"""This part (an eighth) of VMEM is left to the compiler, for spilled registers and its own temporaries."""
ERROR = 0.15
"""How far `Tiles.cycles` may be from the simulated events, relatively."""
SLACK = 0.06
"""How much slower a schedule may be than the fastest one, if it moves fewer bytes."""
_MOST_ROWS, _MOST_COLUMNS = 1024, 4096
_BLOCK = 512  # rows, columns and inner size, at most, of what is multiplied at once
_BLOCKS = (_BLOCK, _BLOCK // 2, _BLOCK // 4)
ACTIVATION_WORK: dict[str, tuple[int, int]] = {
    "none": (0, 0),
    "relu": (1, 0),
    "relu2": (2, 0),
    "gelu": (4, 1),
    "gelu_tanh": (8, 1),
    "silu": (3, 1),
    "sigmoid": (3, 1),
}
"""Simple and costly operations of the vector unit per number, of each activation."""


@attrs.frozen
class Tiles:
    """Sizes of a product's tiles; m, n and k of one step, `padded` those of the whole product, multiples of them.

    order: see the module. rows, columns, inner: the block of m, n and k that is multiplied at once, from VMEM; it bounds the size of code.
    unit: columns and inner size of what the matrix unit holds of w.
    """

    order: str
    m: int
    n: int
    k: int
    padded: tuple[int, int, int]
    rows: int
    columns: int
    inner: int
    unit: tuple[int, int]

    @property
    def steps(self) -> int:
        """Steps of the pipelined loop over the whole product."""
        return (self.padded[0] // self.m) * (self.padded[1] // self.n) * (self.padded[2] // self.k)

    def hbm_bytes(self, product: Product) -> int:
        """Bytes that copies between HBM and VMEM move."""
        pm, pn, pk = self.padded
        x_times = 1 if self.order == "resident" else pn // self.n
        x, w = x_times * pm * pk * product.itemsize, pm // self.m * pk * pn * product.weight_itemsize * product.matrices
        rows, columns = (
            x_times * pm * 4 * product.row_scale,
            pm // self.m * pn * 4 * (product.channel_scale * product.matrices + product.bias),
        )
        return x + w + rows + columns + pm * pn * product.result_itemsize * (1 + product.residual)

    def vmem(self, product: Product, chip: Chip) -> dict[str, int]:
        """Bytes of VMEM per tensor, as the chip lays it out, slots included."""
        two = 2
        x_slots = 1 if self.order == "resident" else two
        tile_slots = 1 if self.order == "split" else two

        def size(rows: int, columns: int, itemsize: int) -> int:
            return bytes_in_vmem(rows, columns, itemsize, chip)

        sizes = {
            "x": x_slots * size(self.m, self.k, product.itemsize),
            "w": two * size(self.k, self.n, product.weight_itemsize),
            "accumulator": product.matrices * size(self.m, self.n, 4),
            "result": tile_slots * size(self.m, self.n, product.result_itemsize),
        }
        if product.gated:
            sizes["u"] = sizes["w"]
        if product.channel_scale:
            sizes["channel_scale"] = product.matrices * tile_slots * size(1, self.n, 4)
        if product.row_scale:
            sizes["row_scale"] = min(x_slots, tile_slots) * size(self.m, 1, 4)
        if product.bias:
            sizes["bias"] = tile_slots * size(1, self.n, 4)
        if product.residual:
            sizes["residual"] = tile_slots * size(self.m, self.n, product.result_itemsize)
        return sizes

    def check(self, product: Product, chip: Chip) -> None:
        """CompileError where a tile isn't made of whole native tiles, or doesn't fit; it names the tensor and its bytes."""
        pm, pn, pk = self.padded
        packed = row_multiple(product, chip)
        for name, size, multiple in (
            ("rows of x", self.m, packed if self.m != pm else chip.sublanes),
            ("columns of w", self.n, chip.lanes),
            ("columns of x", self.k, chip.lanes),
        ):
            if size % multiple:
                raise CompileError(
                    f"a tile has {size} {name}, which is no multiple of {multiple}: {product.dtype} on {chip.name}"
                )
        if product.gated and self.order == "split":
            raise CompileError("the inner axis of a gated product isn't split: it has two sums")
        nests = [
            ("m", pm, self.m),
            ("n", pn, self.n),
            ("k", pk, self.k),
            ("rows", self.m, self.rows),
            ("inner", self.k, self.inner),
            ("columns", self.n, self.columns),
            ("unit n", self.columns, self.unit[0]),
            ("unit k", self.inner, self.unit[1]),
        ]
        for name, whole, part in nests:
            if whole % part:
                raise CompileError(f"{whole} isn't made of whole tiles of {part} ({name}): {self}")
        sizes = self.vmem(product, chip)
        usable = usable_vmem(chip)
        if sum(sizes.values()) > usable:
            largest = max(sizes, key=sizes.__getitem__)
            raise CompileError(
                f"tiles need {sum(sizes.values())} bytes of VMEM, {chip.name} has {usable} to give; "
                f"the largest is {largest} with {sizes[largest]} bytes: {sizes}"
            )

    def cycles(self, product: Product, chip: Chip, *, prefetched: bool = False, launch: bool = True) -> float:
        """Simulated cycles in closed form; prefetched: weights are in VMEM beforehand; launch: starting the kernel is counted."""
        rate, latency = chip.hbm_bytes_per_cycle, chip.dma_latency * chip.clock
        blocks = (self.m // self.rows) * (self.n // self.columns)
        one = work(chip, self.rows, self.k, self.columns, product.dtype)
        one = attrs.evolve(one, mxu=one.mxu * product.matrices, vector=one.vector * product.matrices)
        # Weights of another dtype become x's, an operation each, every time that they are multiplied.
        widened = self.k * self.columns * product.widens * product.matrices
        adding = one.vector + vector_cycles(chip, widened, "element")
        behind = sum(
            vector_cycles(chip, self.rows * self.columns * turns, op)
            for turns, op in zip((1, *ACTIVATION_WORK[product.activation]), ("epilogue", "element", "exp"), strict=True)
        )
        more = product.bias + product.residual + product.gated * (1 + product.channel_scale + product.row_scale)
        behind += vector_cycles(chip, self.rows * self.columns * more, "element")
        held = product.matrices * self.k * self.n * product.weight_itemsize
        x, w = self.m * self.k * product.itemsize, 0 if prefetched else held
        store = self.m * self.n * product.result_itemsize
        columns = self.n * 4 * (product.channel_scale * product.matrices + product.bias) + store * product.residual
        rows = self.m * 4 * product.row_scale
        turns = [whole // tile for whole, tile in zip(self.padded, (self.m, self.n, self.k), strict=True)]
        started = chip.timing.launch if launch else 0.0
        multiply = blocks * max(one.mxu, adding)
        # The epilogue of one block runs beside the product of the next; a tile that is one block has nothing beside it.
        whole = max(blocks * one.mxu, blocks * (adding + behind)) if blocks > 1 else multiply + behind
        if self.order == "split":
            both = (x + w) / rate
            pace = max(multiply, both, (both + latency + multiply) / 2 if x + w else 0.0)
            scales = latency + (rows + columns) / rate if rows + columns else 0.0
            tile = latency + both + (turns[2] - 1) * pace + multiply + scales + blocks * behind + latency + store / rate
            return started + turns[0] * turns[1] * tile
        resident = self.order == "resident"
        once, load = (x + rows, w + columns) if resident else (0, x + w + columns + rows)
        steps = turns[1] if resident else turns[0] * turns[1]
        turnaround = (load / rate + latency + blocks * one.mxu) / 2 if load else 0.0
        pace = max(whole, (load + store) / rate, turnaround)
        last = whole if blocks == 1 else max(multiply, whole - behind) + behind
        # Where copies set the pace, the first two steps' come together with what is copied once.
        run = latency + (once + load) / rate + (steps - 1) * pace + last + latency + store / rate
        return started + (turns[0] if resident else 1) * run


def usable_vmem(chip: Chip) -> int:
    """Bytes of VMEM that tiles may take."""
    return chip.vmem_bytes - chip.vmem_bytes // HEADROOM


def bytes_in_vmem(rows: int, columns: int, itemsize: int, chip: Chip) -> int:
    """Bytes of a tile as the chip lays it out: a row or a column of numbers still takes whole sublanes and lanes."""
    packed = chip.packed_sublanes(itemsize) if rows > chip.sublanes else chip.sublanes
    return round_up(rows, packed) * round_up(columns, chip.lanes) * itemsize


def row_multiple(product: Product, chip: Chip) -> int:
    """Rows of whole native tiles, of x and of the result."""
    return max(chip.packed_sublanes(product.itemsize), chip.packed_sublanes(product.result_itemsize))


def choose_tiles(product: Product, chip: Chip, *, prefetched: bool = False, frugal: bool = False) -> Tiles:
    """The tiles with the least simulated time. CompileError: not even the smallest fit; it names the tensor and its bytes.

    prefetched: where weights are in VMEM beforehand. frugal: w is padded to whole lanes and no further, so that one that is stored like this needs no copy.
    """
    fitting: list[tuple[float, int, int, Tiles]] = []
    refused: CompileError | None = None
    least = tuple(round_up(size, chip.lanes) for size in (product.n, product.k))
    for tiles in _candidates(product, chip):
        if frugal and tiles.padded[1:] != least:
            continue
        try:
            tiles.check(product, chip)
        except CompileError as error:
            refused = error
            continue
        vmem = sum(tiles.vmem(product, chip).values())
        cycles = tiles.cycles(product, chip, prefetched=prefetched)
        fitting.append((cycles, tiles.hbm_bytes(product), vmem, tiles))
    if not fitting:
        raise refused or CompileError(f"no tiles for {product}")
    limit = (1 + SLACK) * min(cycles for cycles, *_ in fitting)
    near = [found for found in fitting if found[0] <= limit]
    fewest = min(moved for _, moved, *_ in near) * 1.001
    return min((f for f in near if f[1] <= fewest), key=lambda f: (f[0], f[2]))[-1]


def make_tiles(product: Product, chip: Chip, order: str, m: int, n: int, k: int, *, block: int = _BLOCK) -> Tiles:
    """Tiles of m rows, n columns and k of the inner axis, with what follows from them; block: of columns, at most, that are multiplied at
    once. Not checked: `Tiles.check` does."""
    padded = round_up(product.m, m), round_up(product.n, n), round_up(round_up(product.k, chip.lanes), k)
    rows = _divisor(m, _BLOCK, row_multiple(product, chip))
    columns, inner = _divisor(n, block, chip.lanes), _divisor(k, _BLOCK, chip.lanes)
    unit = (_divisor(columns, chip.mxu, chip.lanes), _divisor(inner, chip.mxu, chip.lanes))
    return Tiles(order, m, n, k, padded, rows, columns, inner, unit)


def _candidates(product: Product, chip: Chip) -> Iterator[Tiles]:
    """All schedules worth a look, the most frugal last."""
    packed = row_multiple(product, chip)
    depth = round_up(product.k, chip.lanes)
    few = next((s for s in (chip.sublanes, 2 * chip.sublanes) if product.m <= s <= packed), None)
    whole = few or round_up(product.m, packed)
    columns = [n for n in _doubling(chip.lanes, _MOST_COLUMNS) if n < 2 * product.n or n == chip.lanes]
    rows = [m for m in _doubling(packed, _MOST_ROWS) if m < whole]
    for n, block in itertools.product(columns, (b for b in _BLOCKS if b >= chip.mxu)):
        if block > n > chip.lanes:
            continue
        for m in [*rows, whole]:
            yield make_tiles(product, chip, "resident", m, n, depth, block=block)
            yield make_tiles(product, chip, "panels", m, n, depth, block=block)
    if product.gated:
        return
    for k in (k for k in _doubling(chip.lanes, depth) if k < depth):
        for n in columns:
            for m in [*rows, whole]:
                yield make_tiles(product, chip, "split", m, n, k)
    yield make_tiles(product, chip, "split", rows[0] if rows else whole, chip.lanes, chip.lanes)


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return sizes


def _divisor(size: int, most: int, step: int) -> int:
    """The largest multiple of `step` up to `most` that divides the size, or the size itself where none does."""
    return next((d for d in range(min(most, size) // step * step, 0, -step) if size % d == 0), size)
