"""Tile sizes of a product, by search over all that fit.

A schedule moves tiles of x [m, k] and w [k, n] into VMEM, two of each where the next one comes while this one is multiplied, and one
tile of the result back. Three orders:

- "resident": all rows are one tile; x is copied once, panels of w stream past it. Least traffic, as each byte moves once.
- "panels": every step copies a tile of x and a panel of w over the whole inner axis. Each is read again per tile of the other's axis.
- "split": the inner axis is split, too, for products whose panels don't fit into VMEM.

The estimated time is first copy + steps * max(multiply, copy) + last store, where multiplying a tile costs what the peak allows for its
rows, but at least half a matrix unit's worth, for pushing weights takes that long. It ranks schedules, and is no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from jisu.compiler.errors import CompileError
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.spec import Product, round_up

HEADROOM = 8
"""This part (an eighth) of VMEM is left to the compiler, for spilled registers and its own temporaries."""
STEP_SECONDS = 4e-7
"""What a step costs besides its work: starting copies, waiting for them, filling the matrix unit."""
_MOST_ROWS, _MOST_COLUMNS = 1024, 4096
_BLOCK = 512  # rows, columns and inner size, at most, of what is multiplied at once


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
        x, w = x_times * pm * pk * product.itemsize, pm // self.m * pk * pn * product.itemsize
        rows, columns = x_times * pm * 4 * product.row_scale, pm // self.m * pn * 4 * (product.channel_scale + product.bias)
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
            "w": two * size(self.k, self.n, product.itemsize),
            "accumulator": size(self.m, self.n, 4),
            "result": tile_slots * size(self.m, self.n, product.result_itemsize),
        }
        if product.channel_scale:
            sizes["channel_scale"] = tile_slots * size(1, self.n, 4)
        if product.row_scale:
            sizes["row_scale"] = tile_slots * size(self.m, 1, 4)
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

    def seconds(self, product: Product, chip: Chip) -> float:
        """The estimate that ranks schedules."""
        x, w = self.m * self.k * product.itemsize, self.k * self.n * product.itemsize
        store = self.m * self.n * product.result_itemsize / chip.hbm_bandwidth
        rows = max(self.m, chip.mxu // 2)
        multiply = 2.0 * rows * self.n * self.k / chip.peak_flops(product.dtype)
        inner = self.padded[2] // self.k
        tile = (self.m * self.n * product.result_itemsize) * (1 + product.residual)
        moved = (0 if self.order == "resident" else x) + w + tile / inner
        step = max(multiply, moved / chip.hbm_bandwidth) + STEP_SECONDS
        # Where the inner axis is split, the pipeline is filled and drained per tile of the result.
        fills = self.steps // inner if self.order == "split" else 1
        return fills * ((x + w) / chip.hbm_bandwidth + store) + self.steps * step


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


def choose_tiles(product: Product, chip: Chip) -> Tiles:
    """The tiles with the least estimated time. CompileError: not even the smallest fit; it names the tensor and its bytes."""
    best: tuple[float, Tiles] | None = None
    refused: CompileError | None = None
    for tiles in _candidates(product, chip):
        try:
            tiles.check(product, chip)
        except CompileError as error:
            refused = error
            continue
        seconds = tiles.seconds(product, chip)
        if best is None or seconds < best[0]:
            best = seconds, tiles
    if best is None:
        raise refused or CompileError(f"no tiles for {product}")
    return best[1]


def make_tiles(product: Product, chip: Chip, order: str, m: int, n: int, k: int) -> Tiles:
    """Tiles of m rows, n columns and k of the inner axis, with what follows from them. Not checked: `Tiles.check` does."""
    padded = round_up(product.m, m), round_up(product.n, n), round_up(round_up(product.k, chip.lanes), k)
    rows = _divisor(m, _BLOCK, row_multiple(product, chip))
    columns, inner = _divisor(n, _BLOCK, chip.lanes), _divisor(k, _BLOCK, chip.lanes)
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
    for n in columns:
        yield make_tiles(product, chip, "resident", whole, n, depth)
        for m in [*rows, whole]:
            yield make_tiles(product, chip, "panels", m, n, depth)
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
