"""Tile sizes of a product, by search over all that fit.

A schedule moves tiles of x [m, k] and w [k, n] into VMEM, two of each where the next one comes while this one is multiplied, and one
tile of the result back. Three orders:

- "resident": a tile of x is copied once, by blocks of rows, panels of w stream past it; where it holds all rows, each byte moves once.
- "panels": every step copies a tile of x and a panel of w over the whole inner axis. Each is read again per tile of the other's axis.
- "split": the inner axis is split, too, for products whose panels don't fit into VMEM.

A step multiplies block by block; what is computed of a block's sums, and the copy of its results, run beside the next block. What nothing runs
beside is the first block's copy and the last one's results: the first step begins with few rows (`head`), the last ends with few columns (`tail`).

Schedules are ranked by `Tiles.cycles`, which costs a step's units as the timing model does (`systolic.work`, `vector_cycles`, the chip's
bandwidth and latency): block by block in the first and the last step, in closed form between them; within ERROR of simulating the events of
the lowered TIR. Of the schedules that are at most SLACK slower than the fastest, the one that moves the fewest bytes is taken: what HBM has
left brings the next product's weights.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import attrs

from jisu.compiler.errors import CompileError
from jisu.compiler.types import round_up
from jisu.targets.tpu import grouped
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.systolic import filling, pushing, vector_cycles, work

HEADROOM = 8
"""This part (an eighth) of VMEM is left to the compiler, for spilled registers and its own temporaries."""
ERROR = 0.15
"""How far `Tiles.cycles` may be from the simulated events, relatively."""
SLACK = 0.06
"""How much slower a schedule may be than the fastest one, if it saves at least as large a share of the bytes."""
_MOST_ROWS, _MOST_COLUMNS = 1024, 4096
_BLOCK = 512
"""Rows, columns and inner size of the largest block: none of them has more multiplications, nor more than twice as many results."""
_TURN, _TURNS = 4096, 4
"""Cycles of the matrix units in a turn of a loop, at most; and how many such turns a step may be in straight code."""
_PARTS, _GRAINS = 5, 16
"""Parts of the last block, at most, and of how many pieces of equal width they are made."""
_ROUNDS = 8
"""Of an iteration to the cycles that a step's copies take."""
_BLOCKS = 8
"""Blocks of a step, at most, before the first and the last are cut: the code has them one by one there."""
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
class Block:
    """A part of a step's tile of results: its first row and how many, its first column and how many."""

    row: int
    rows: int
    column: int
    columns: int


@attrs.frozen
class Tiles:
    """Sizes of a product's tiles; m, n and k of one step, `padded` those of the whole product, multiples of them.

    order: see the module. rows, columns, inner: the block of m, n and k that is multiplied at once, from VMEM. turn: how much of k a turn of
    a loop goes through, in straight code, block after block: it bounds the size of code. unit: columns and inner size of what the matrix unit
    holds of w. head: the rows of the first step's blocks, few of them first; where it is the only step, `rows` are all. tail: the columns of
    the parts that the last step's last block is cut into.
    """

    order: str
    m: int
    n: int
    k: int
    padded: tuple[int, int, int]
    rows: int
    columns: int
    inner: int
    turn: int
    unit: tuple[int, int]
    head: tuple[int, ...]
    tail: tuple[int, ...]

    def blocks(self, *, first: bool = False, last: bool = False) -> list[Block]:
        """The blocks of a step, in their order."""
        heights = self.head if first else (self.rows,) * (self.m // self.rows)
        rows = zip(itertools.accumulate(heights, initial=0), heights, strict=False)
        found = [Block(*r, column, self.columns) for r in rows for column in range(0, self.n, self.columns)]
        if last:
            end = found.pop()
            columns = itertools.accumulate(self.tail, initial=end.column)
            found += [Block(end.row, end.rows, c, width) for c, width in zip(columns, self.tail, strict=False)]
        return found

    @property
    def steps(self) -> int:
        """Steps of the pipelined loop over the whole product."""
        return (self.padded[0] // self.m) * (self.padded[1] // self.n) * (self.padded[2] // self.k)

    def hbm_bytes(self, product: Product) -> int:
        """Bytes that copies between HBM and VMEM move."""
        pm, pn, pk = self.padded
        x_times = 1 if self.order == "resident" else pn // self.n
        x, w = x_times * pm * pk * product.itemsize, int(pk * pn * product.weight_itemsize) * product.matrices
        w = pm // self.m * (w + product.grid_bytes(pk, pn))
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

        def size(rows: int, columns: int, each: float) -> int:
            return bytes_in_vmem(rows, columns, each, chip)

        sizes = {
            "x": x_slots * size(self.m, self.k, product.itemsize),
            "w": two * size(self.k, self.n, product.weight_itemsize),
            "accumulator": product.matrices * size(self.m, self.n, 4),
            "result": tile_slots * size(self.m, self.n, product.result_itemsize),
        }
        if product.gated:
            sizes["u"] = sizes["w"]
        if product.group:
            deep = self.k // product.group
            each = size(deep, self.n, itemsize(product.scales)) + product.zeros * size(deep, self.n, 1)
            sizes["scales of groups"] = product.matrices * tile_slots * each
            sizes["scales of a block"] = grouped.grid_bytes(product, self.k, self.inner, self.columns, chip)
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
        if product.group and self.order == "split":
            raise CompileError("the inner axis of a product with scales per group isn't split")
        nests = [
            ("m", pm, self.m),
            ("n", pn, self.n),
            ("k", pk, self.k),
            ("rows", self.m, self.rows),
            ("turn", self.k, self.turn),
            ("inner", self.turn, self.inner),
            ("columns", self.n, self.columns),
            *(("head", rows, chip.sublanes) for rows in self.head),
            *(("unit n", columns, self.unit[0]) for columns in (self.columns, *self.tail)),
            ("unit k", self.inner, self.unit[1]),
        ]
        if sum(self.head) != self.m:
            raise CompileError(f"the first step's blocks have {self.head} rows, {self.m} in all: {self}")
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
        down, across, _ = self._turns
        if self.order == "split":
            cycles = down * across * self._split_cycles(product, chip, prefetched)
        elif self.order == "resident":
            cycles = down * self._pipelined_cycles(product, chip, prefetched, across)
        else:
            cycles = self._pipelined_cycles(product, chip, prefetched, down * across)
        return cycles + (chip.timing.launch if launch else 0.0)

    @property
    def _turns(self) -> tuple[int, int, int]:
        """How many tiles there are along m, n and k."""
        return self.padded[0] // self.m, self.padded[1] // self.n, self.padded[2] // self.k

    def _copied(self, product: Product, prefetched: bool) -> tuple[int, int, int, int]:
        """Bytes of a step's tiles: of x, of w, of what comes with each column, of the scales of rows."""
        held = int(product.matrices * self.k * self.n * product.weight_itemsize) + product.grid_bytes(self.k, self.n)
        x, w = self.m * self.k * product.itemsize, 0 if prefetched else held
        columns = self.n * 4 * (product.channel_scale * product.matrices + product.bias)
        columns += self.m * self.n * product.result_itemsize * product.residual
        return x, w, columns, self.m * 4 * product.row_scale

    def _pipelined_cycles(self, product: Product, chip: Chip, prefetched: bool, steps: int) -> float:
        """Of the steps that follow one another without a pause."""
        rate, latency = chip.hbm_bytes_per_cycle, chip.dma_latency * chip.clock
        x, w, columns, rows = self._copied(product, prefetched)
        # Where x is copied once, its first block of rows comes before the weights, the others behind them.
        by_rows = self.order == "resident" or steps == 1
        once, load = (x + rows, w + columns) if by_rows else (0, x + w + columns + rows)
        early = self.head[0] * self.k * product.itemsize + rows if by_rows else 0
        chain, row = _Chain(latency), -1
        for block in self.blocks(first=True, last=steps == 1):
            later = (block.row + block.rows) * self.k * product.itemsize + rows - early if by_rows else 0
            waits, row = row < 0 or (by_rows and block.row != row), block.row
            chain.add(self._block(product, chip, block), latency + (early + load + later) / rate, waits)
        if steps > 1:
            costs = [self._block(product, chip, block) for block in self.blocks()]
            store, multiply = sum(c.store for c in costs), sum(c.multiply for c in costs)
            turnaround = (load / rate + latency + multiply) / 2 if load else 0.0
            step = max(_steady(costs), load / rate + store, turnaround)
            between = (steps - 2) * self._queued(product, chip, prefetched, by_rows, costs, step)
            second = latency + (once + 2 * load) / rate if load else 0.0
            chain = _Chain(latency, max(chain.mxu, second) + between, chain.vector + between)
            ready = latency + (once + steps * load) / rate + (steps - 2) * store if load else 0.0
            self._end(chain, product, chip, ready)
        return chain.stored

    def _queued(
        self, product: Product, chip: Chip, prefetched: bool, by_rows: bool, blocks: Sequence[_Cost], least: float
    ) -> float:  # fmt: skip
        """Cycles of a step, at least so many, whose copies may have to wait for queues. Each takes the queue that is free first, a step's stores
        before the loads that follow; a load of the next step but one has two steps' time."""
        rate, latency = chip.hbm_bytes_per_cycle, chip.dma_latency * chip.clock
        x, w, columns, rows = self._copied(product, prefetched)
        small = product.matrices * product.channel_scale + product.bias + product.residual
        loads = [] if by_rows else [x / rate]
        # Scales and zeros of groups are copied apart.
        grids = [g / rate for g in product.grids(self.k, self.n)]
        loads += [] if prefetched else [w / product.matrices / rate - sum(grids), *grids] * product.matrices
        loads += [columns / small / rate] * small if small else []
        loads += [rows / rate] if product.row_scale and not by_rows else []
        if not loads:
            return least
        ends = list(itertools.accumulate(loads))
        multiplied = itertools.accumulate(block.multiply for block in blocks)
        stores = [end + b.behind + latency + b.store for end, b in zip(multiplied, blocks, strict=True)]
        idle = [0.0] * (chip.dma_queues - len(loads) - len(stores))
        cycles = least
        for _ in range(_ROUNDS):
            # A store's bytes wait for those of loads that HBM is at.
            left = [end if end <= cycles - ends[-1] else max(end, cycles) for end in stores]
            before = sorted([*idle, *(end - cycles for end in left), *(cycles - (ends[-1] - end) for end in ends)])
            free = sorted([*before[-chip.dma_queues :][len(left) :], *left])
            due = [(start + latency + load) / 2 for start, load in zip(free, loads, strict=False)]
            cycles = max([least, *due])
        return cycles

    def _split_cycles(self, product: Product, chip: Chip, prefetched: bool) -> float:
        """Of a tile of results, whose inner axis is split."""
        rate, latency = chip.hbm_bytes_per_cycle, chip.dma_latency * chip.clock
        x, w, columns, rows = self._copied(product, prefetched)
        costs = [self._block(product, chip, block) for block in self.blocks()]
        multiply, copy, steps = sum(c.multiply for c in costs), (x + w) / rate, self._turns[2]
        ready = latency + copy + (columns + rows) / rate
        if steps > 1:
            turnaround = (copy + latency + multiply) / 2 if copy else 0.0
            ready += max(multiply, copy) + (steps - 2) * max(multiply, copy, turnaround)
        chain = _Chain(latency, ready, ready)
        self._end(chain, product, chip, ready)
        return chain.stored

    def _end(self, chain: _Chain, product: Product, chip: Chip, ready: float) -> None:
        """Add the last step, whose operands are there at a time."""
        for number, block in enumerate(self.blocks(last=True)):
            chain.add(self._block(product, chip, block), ready, number == 0)

    def _block(self, product: Product, chip: Chip, block: Block) -> _Cost:
        return _cost(product, chip, self.k, block.rows, block.columns, self.k // self.turn)


@attrs.frozen
class _Cost:
    """Cycles of a block: for each of its matrices those of the matrix units, of the vector unit before them, which widens weights, and beside
    them; then those of what is computed of the sums, and of the results' copy. turns: in how many stretches of straight code a matrix is
    multiplied; filled: cycles of the matrix units where these begin behind a wait or a loop, mxu: where the block runs on from the one before."""

    matrices: int
    turns: int
    widened: float
    filled: float
    mxu: float
    vector: float
    behind: float
    store: float

    @property
    def multiply(self) -> float:
        """Of all its matrices, one after the other, behind a wait."""
        return sum(max(self.units(number, waits=True), self.widened + self.vector) for number in range(self.matrices))

    def units(self, matrix: int, *, waits: bool) -> float:
        """Cycles of the matrix units for a matrix; waits: whether the block begins behind a wait or a loop."""
        return self.filled if self.turns > 1 or (waits and matrix == 0) else self.mxu


@functools.lru_cache(4096)
def _cost(product: Product, chip: Chip, k: int, rows: int, columns: int, turns: int) -> _Cost:
    stack = grouped.Grouped(product, rows, grouped.depth(chip, k)).stack if product.group else 1
    turns = 1 if product.group else turns
    one, filled = (work(chip, rows * stack, k, columns, product.dtype, fills=fills) for fills in (0, turns))
    behind = sum(
        vector_cycles(chip, rows * columns * times, op)
        for times, op in zip((1, *ACTIVATION_WORK[product.activation]), ("result", "element", "exp"), strict=True)
    )
    more = product.bias + product.residual + product.gated * (1 + product.channel_scale + product.row_scale)
    behind += vector_cycles(chip, rows * columns * more, "element")
    store = rows * columns * product.result_itemsize / chip.hbm_bytes_per_cycle
    widened = _widened(product, chip, k, rows, columns)
    return _Cost(product.matrices, turns, widened, filled.mxu, one.mxu, one.vector, behind, store)


def _widened(product: Product, chip: Chip, k: int, rows: int, columns: int) -> float:
    """Cycles of making a block's weights x's dtype, an operation each, every time that they are multiplied; of groups, all that they take."""
    if product.group:
        operations = grouped.Grouped(product, rows, grouped.depth(chip, k)).operations(rows, k, columns)
        return sum(vector_cycles(chip, count, op) for op, count in operations.items())
    return vector_cycles(chip, k * columns * product.widens, "element")


@attrs.define
class _Chain:
    """Blocks one after another: when the matrix units and the vector unit are done with them, and their results are in HBM."""

    latency: float
    mxu: float = 0.0
    vector: float = 0.0
    stored: float = 0.0

    def add(self, cost: _Cost, ready: float, waits: bool) -> None:
        for number in range(cost.matrices):
            filled = cost.units(number, waits=waits)
            start, free = max(self.mxu, ready), max(self.vector, ready)
            self.vector = max(start, free + cost.widened) + cost.vector
            self.mxu = max(start + filled, self.vector)
        self.vector = self.mxu + cost.behind
        self.stored = max(self.stored, self.vector + self.latency) + cost.store


def _steady(blocks: Sequence[_Cost]) -> float:
    """Cycles of a step whose blocks follow those of another such step; sums of a single block hold the next step up."""
    if len(blocks) == 1:
        return blocks[0].multiply + blocks[0].behind
    chain, ends = _Chain(0.0), []
    for _ in range(3):
        for block in blocks:
            chain.add(block, 0.0, True)
        ends.append(chain.mxu)
    return ends[2] - ends[1]


def usable_vmem(chip: Chip) -> int:
    """Bytes of VMEM that tiles may take."""
    return chip.vmem_bytes - chip.vmem_bytes // HEADROOM


def bytes_in_vmem(rows: int, columns: int, size: float, chip: Chip) -> int:
    """Bytes of a tile as the chip lays it out: a row or a column of numbers still takes whole sublanes and lanes."""
    packed = chip.packed_sublanes(size) if rows > chip.sublanes else chip.sublanes
    return int(round_up(rows, packed) * round_up(columns, chip.lanes) * size)


def row_multiple(product: Product, chip: Chip) -> int:
    """Rows of whole native tiles, of x and of the result."""
    return max(chip.packed_sublanes(product.itemsize), chip.packed_sublanes(product.result_itemsize))


def choose_tiles(product: Product, chip: Chip, *, prefetched: bool = False, frugal: bool = False) -> Tiles:
    """The tiles with the least simulated time, or nearly (`SLACK`). CompileError: not even the smallest fit; it names the tensor and its bytes.

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
    return min(near, key=lambda f: (f[0] * f[1], f[2]))[-1]


def make_tiles(
    product: Product, chip: Chip, order: str, m: int, n: int, k: int, *, block: int = _BLOCK, rows: int = _BLOCK
) -> Tiles:  # fmt: skip
    """Tiles of m rows, n columns and k of the inner axis, with what follows from them; block, rows: columns and rows, at most, that are
    multiplied at once. Not checked: `Tiles.check` does."""
    padded = round_up(product.m, m), round_up(product.n, n), round_up(round_up(product.k, chip.lanes), k)
    packed = row_multiple(product, chip)
    rows, columns = _divisor(m, rows, packed), _divisor(n, block, chip.lanes)
    most = min(_BLOCK, max(_BLOCK**3 // (rows * columns), chip.lanes))
    inner = grouped.chunk(k, most) if product.group else _divisor(k, most, chip.lanes)
    unit = (_divisor(columns, chip.mxu, chip.lanes), _divisor(inner, chip.mxu, chip.lanes))
    several, alone = m > rows or n > columns, padded == (m, n, k) and order != "split"
    first = _head(product, chip, rows, columns, k) if alone or order == "resident" else rows
    head = (*((first, rows - first) if first < rows else (rows,)), *(rows,) * (m // rows - 1))
    turn = _turn(product, chip, rows, columns, m * n, k, inner, alone) if order != "split" else inner
    if inner < _BLOCK // 2 and not product.group:  # pieces that leave matrix units without a tile
        inner, unit = turn, (unit[0], _divisor(turn, chip.mxu, chip.lanes))
    tail = _tail(product, chip, k, k // turn, rows, columns, unit[0], several)
    equal = Tiles(order, m, n, k, padded, rows, columns, inner, turn, unit, head, tail)
    if not alone or first == m:
        return equal
    # A single step's blocks needn't be of equal rows: fewer of them may follow the first one.
    heads = [(first, *_shared(m - first, count, packed)) for count in range(1, _BLOCKS)]
    cuts = []
    for h in heads:
        if max(h) * columns <= 2 * _BLOCK**2 and h[-1]:
            turn = _turn(product, chip, max(h), columns, m * n, k, equal.inner, alone)
            end = _tail(product, chip, k, k // turn, h[-1], columns, unit[0], True)
            cuts.append(attrs.evolve(equal, rows=m, turn=turn, head=h, tail=end))
    return min([equal, *cuts], key=lambda tiles: tiles.cycles(product, chip, prefetched=True))


def _turn(product: Product, chip: Chip, rows: int, columns: int, step: int, k: int, inner: int, alone: bool) -> int:
    """How much of k a turn of a loop goes through, in pieces of `inner`, for blocks of rows x columns; step: all results of a step, each of whose
    blocks may be written out; alone: whether there is no other step."""
    if product.group:  # is cut where scales are applied
        return inner
    # Of few rows, pushing weights takes longer.
    row = max(1.0, pushing(chip, product.dtype) * chip.rows_per_cycle(product.dtype) / rows)
    rate = 1.01 * chip.rows_per_cycle(product.dtype)  # published peaks are a little off the clock
    most = _TURN * rate * chip.mxus * chip.mxu**2 / (row * product.matrices)
    if alone and step * k <= _TURNS * most:
        return k
    fits = (
        t for t in range(k, inner, -inner) if k % t == 0 and rows * columns * t <= most and step * t <= _TURNS * most
    )
    return next(fits, inner)


def _shared(total: int, count: int, step: int) -> list[int]:
    """A number as a sum of so many multiples of a step, as equal as can be, the larger ones first."""
    least, more = divmod(total // step, count)
    return [(least + (i < more)) * step for i in range(count)]


def _head(product: Product, chip: Chip, rows: int, columns: int, k: int) -> int:
    """Rows with which to begin: so many that pushing weights isn't what takes the time, where waiting for more costs more than another block."""
    rows_meanwhile = pushing(chip, product.dtype) * chip.rows_per_cycle(product.dtype)
    head = round_up(math.ceil(rows_meanwhile), row_multiple(product, chip))
    if head >= rows:
        return rows
    if product.group:  # a kernel applies scales in one place
        sizes = head, rows - head, rows
        if len({grouped.Grouped(product, m, grouped.depth(chip, k)).place for m in sizes}) > 1:
            return rows
    later = (rows - head) * k * product.itemsize / chip.hbm_bytes_per_cycle
    another = filling(chip, product.dtype) + product.matrices * _widened(product, chip, k, rows - head, columns)
    return head if later > another else rows


@functools.lru_cache(4096)
def _tail(
    product: Product, chip: Chip, k: int, turns: int, rows: int, columns: int, unit: int, several: bool
) -> tuple[int, ...]:  # fmt: skip
    """How the last block's columns are cut, so that all is done the earliest: a part's results leave while the next one is multiplied."""
    grain = max(unit, round_up(columns // _GRAINS, unit))
    cuts = (
        [tuple(grain * part for part in cut) for cut in _falling(columns // grain, _PARTS)]
        if columns % grain == 0
        else [(columns,)]
    )

    def time(cut: tuple[int, ...]) -> float:
        latency = chip.dma_latency * chip.clock
        chain = _Chain(latency, 0.0, _cost(product, chip, k, rows, columns, turns).behind if several else 0.0)
        for number, width in enumerate(cut):
            chain.add(_cost(product, chip, k, rows, width, turns), 0.0, number == 0)
        return chain.stored

    return min(cuts, key=time)


@functools.cache
def _falling(total: int, parts: int, most: int | None = None) -> list[tuple[int, ...]]:
    """All ways to write a number as a sum of at most so many others, none of them larger than the one before."""
    if total == 0:
        return [()]
    largest = min(total, most or total) if parts else 0
    return [(first, *rest) for first in range(largest, 0, -1) for rest in _falling(total - first, parts - 1, first)]


def _candidates(product: Product, chip: Chip) -> Iterator[Tiles]:
    """All schedules worth a look, the most frugal last."""
    packed = row_multiple(product, chip)
    depth = round_up(product.k, chip.lanes)
    few = next((s for s in (chip.sublanes, 2 * chip.sublanes) if product.m <= s <= packed), None)
    whole = few or round_up(product.m, packed)
    columns = [n for n in _doubling(chip.lanes, _MOST_COLUMNS) if n < 2 * product.n or n == chip.lanes]
    rows = [m for m in _doubling(packed, _MOST_ROWS) if m < whole]
    for n, m in itertools.product(columns, [*rows, whole]):
        for block, height in _block_sizes(product, chip, m, n):
            yield make_tiles(product, chip, "resident", m, n, depth, block=block, rows=height)
            yield make_tiles(product, chip, "panels", m, n, depth, block=block, rows=height)
    if product.gated or product.group:
        return
    for k in (k for k in _doubling(chip.lanes, depth) if k < depth):
        for n in columns:
            for m in [*rows, whole]:
                yield make_tiles(product, chip, "split", m, n, k)
    yield make_tiles(product, chip, "split", rows[0] if rows else whole, chip.lanes, chip.lanes)


def _block_sizes(product: Product, chip: Chip, m: int, n: int) -> Iterator[tuple[int, int]]:
    """Columns and rows of blocks of a tile."""
    heights = {_divisor(m, max(m >> i, 1), row_multiple(product, chip)) for i in range(_BLOCKS.bit_length())}
    for rows, columns in itertools.product(sorted(heights), _doubling(max(chip.lanes, min(chip.mxu, n)), n)):
        if rows * columns <= 2 * _BLOCK**2 and m * n <= _BLOCKS * rows * columns:
            yield columns, rows


def _doubling(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return sizes


def _divisor(size: int, most: int, step: int) -> int:
    """The largest multiple of `step` up to `most` that divides the size, or the size itself where none does."""
    return next((d for d in range(min(most, size) // step * step, 0, -step) if size % d == 0), size)
