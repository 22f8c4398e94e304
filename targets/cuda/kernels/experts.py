"""Mixtures of experts on NVIDIA GPUs: every token through its chosen experts, whose numbers are read from the GPU's memory.

What is multiplied is pairs of a token and one of its choices, `chosen` per token. Few pairs are multiplied one by one, in the order in
which they lie. Many are put into groups of up to so many pairs of one expert, so that its weights are read once per group
(`grouped`); a group is then the rows of a tile, as in layers of one matrix. Experts' weights lie one behind the other, each as `Layer`
wants a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from jisu.targets.cpu.isa import ITEMSIZE, Val
from jisu.targets.cuda.device import MAP, WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels import hopper, products, thin
from jisu.targets.cuda.kernels import single as exact
from jisu.targets.cuda.kernels.layers import Layer, Part, Rows
from jisu.targets.target import Target

SUMMING = 128
"""Threads of `summed`."""
_GROUPING = 256  # threads of `grouped`
_COUNTED_BYTES = 32 << 10  # of shared memory for its counts


@attrs.frozen(eq=False)
class Products:
    """What multiplies layers of a dtype. few: up to so many rows of x, one of `rows`, times `outputs` rows of W, by `threads`; many: in tiles like
    `tile`. Both raise TargetError, by `require` and `require_many`, for a layer that they can't read."""

    rows: tuple[int, ...]
    outputs: int
    threads: Callable[[Layer], int]
    few: Callable[[Device, Layer, int, Val, Part, Rows], None]
    require: Callable[[Layer], None]
    tile: products.Tile
    many: Callable[[Device, Layer, products.Tile, Val, Part, Rows], None]
    require_many: Callable[[Layer], None]


_ROUNDED = Products(
    thin.ROWS, thin.OUTPUTS, lambda _: thin.WARPS * WARP, thin.multiply_thin, Layer.require,
    products.LARGE, products.multiply_product, products.require_product,
)  # fmt: skip
_EXACT = Products(
    exact.ROWS, exact.OUTPUTS, exact.threads, exact.multiply_thin, exact.require, exact.LARGE, exact.multiply_product, exact.require
)  # fmt: skip


@attrs.frozen
class Choice:
    """A layer of `count` experts, whose matrices are each a `layer`: every pair goes through the one of its expert.

    per: pairs per row of x. index: the dtype of experts' numbers. scored: whether results are multiplied by scores. zeros: whether a pair whose
    number is no expert's has zeros as results; else nobody reads what it has. A bias has a row per expert.
    """

    layer: Layer
    count: int
    per: int
    index: str = "int64"
    scored: bool = False
    zeros: bool = False

    @property
    def products(self) -> Products:
        """What multiplies it."""
        return _EXACT if self.layer.dtype == "float32" else _ROUNDED

    @property
    def name(self) -> str:
        """What distinguishes its kernels."""
        return f"{'down' if self.scored else 'each' if self.zeros else 'up'}_{self.layer.name}"

    def names(self, *chosen: str) -> list[str]:
        """Parameters of kernels: x, the experts' weights and biases, by what rows are found, scores, experts' numbers, y."""
        also = ["index"] if self.zeros and "index" not in chosen else []
        return [
            *("x", "w"), *(["b"] if self.layer.bias else []), *chosen, *(["scores"] if self.scored else []), *also, "y",
        ]  # fmt: skip


@attrs.frozen
class Mixture:
    """`count` experts, of which each token chooses `chosen`. hidden, inner: the widths of tokens and of experts' channels. index: the dtype
    of experts' numbers. apart: whether an expert's gates stand before its ups, instead of by turns."""

    count: int
    chosen: int
    hidden: int
    inner: int
    dtype: str
    activation: str
    index: str = "int64"
    apart: bool = False

    @property
    def up(self) -> Layer:
        """An expert's gates and ups."""
        gated = {"gated": True, "apart": self.apart, "activation": self.activation}
        return Layer(self.hidden, (self.inner,), self.dtype, **gated)  # type: ignore[arg-type]

    @property
    def down(self) -> Layer:
        """An expert's last layer."""
        return Layer(self.inner, (self.hidden,), self.dtype)

    def choice(self, down: bool) -> Choice:
        """One of both, as pairs go through it."""
        if down:
            return Choice(self.down, self.count, 1, self.index, scored=True)
        return Choice(self.up, self.count, self.chosen, self.index)

    @property
    def per_chunk(self) -> int:
        """Numbers in 16 bytes."""
        return 16 // ITEMSIZE[self.dtype]


@attrs.frozen(eq=False)
class _Pairs(Rows):
    """Rows of a tile that are pairs: `order` has their numbers, -1 where there is none, or is None for a tile of one pair. most: rows of the tile.
    scores: what results are multiplied by. index: experts' numbers, where a result may be zero for these."""

    choice: Choice
    order: Val | None
    most: int
    scores: Val | None
    index: Val | None

    def place(self, number: Val) -> Val:
        f = self.f
        if self.order is None:
            return f.select(number.cmp("eq", 0), self.first, -1)
        at = f.at(self.order, self.first + f.minimum(number, self.most - 1), "int32")
        return f.cast("sext", f.load("i32", at), "i64")

    def source(self, number: Val) -> Val:
        pair = self.first if self.order is None else self.f.maximum(self.place(number), 0)
        return pair / self.choice.per

    def there(self, place: Val) -> Val:
        return place >= 0

    @property
    def weighs(self) -> bool:
        return self.scores is not None or self.index is not None

    def weighed(self, value: Val, place: Val) -> Val:
        f, dtype = self.f, self.choice.layer.dtype
        if self.scores is not None:
            value = f.rounded(value, dtype) * f.load_f32(self.scores, place, dtype, lanes=1)
        if self.index is not None:
            inside = _inside(f, self.choice.count, _expert(f, self.choice.index, self.index, place))
            value = f.select(inside, value, f.const(0.0, "float"))
        return value


def _expert(f: Device, dtype: str, index: Val, pair: Val) -> Val:
    """The number of a pair's expert, i64. dtype: that of numbers."""
    loaded = f.load({"int64": "i64", "int32": "i32"}[dtype], f.at(index, pair, dtype))
    return loaded if dtype == "int64" else f.cast("sext", loaded, "i64")


def _inside(f: Device, count: int, expert: Val) -> Val:
    """Whether a number is one of an expert."""
    return f.op(f"and i1 {(expert >= 0).name}, {(expert < count).name}", "i1")


def _nearest(f: Device, count: int, expert: Val) -> Val:
    """The number itself, or one of an expert where it isn't."""
    return f.minimum(f.maximum(expert, 0), count - 1)


def _bias(f: Device, layer: Layer, given: Mapping[str, Val], expert: Val) -> Val | None:
    """Where an expert's bias begins."""
    return f.at(given["b"], expert * layer.outputs[0], layer.dtype) if layer.bias else None


def _part(f: Device, layer: Layer, given: Mapping[str, Val], expert: Val, tile: Val, outputs: int) -> Part:
    """What a block works on: a tile of an expert's matrix."""
    (n,) = layer.outputs
    rows = n * layer.per_weight_row
    own = f.at(given["w"], expert * (rows * layer.row_bytes), "i8")
    ups = f.at(own, n * layer.row_bytes, "i8") if layer.apart else None
    bias = _bias(f, layer, given, expert)
    return Part(own, ups, None, None, None, bias, given["y"], f.i64(rows), tile * outputs, f.i64(n), None)


def single(choice: Choice, target: Target) -> DeviceKernel:
    """A layer of every pair by itself. Grid: `Layer.tiles(Products.outputs)`, pairs.

    Parameters: `Choice.names` by experts' numbers. y has a row per pair.
    """
    layer, by = choice.layer, choice.products
    by.require(layer)
    names = choice.names("index")
    f = Device(f"expert_{choice.name}", [("ptr", n) for n in names], target, by.threads(layer))
    given = {n: f.memory(p) for n, p in zip(names, f.params(), strict=True)}
    pair = f.block("y")
    expert = _nearest(f, choice.count, _expert(f, choice.index, given["index"], pair))
    own = _pairs(f, choice, None, pair, 1, given)
    by.few(f, layer, by.rows[0], given["x"], _part(f, layer, given, expert, f.block(), by.outputs), own)
    return f.built()


def of_groups(choice: Choice, rows: int, target: Target) -> DeviceKernel:
    """A layer of every group of up to `rows` pairs: one of `Products.rows`, or those of its tile.

    Grid: `Layer.tiles(Products.outputs)`, groups; of tiles groups, `Layer.tiles(Products.tile.outputs)`.

    Parameters: `Choice.names` by the groups' pairs and experts (see `grouped`); rows of x and y as for `single`. Raises TargetError for a layer that
    it can't read.
    """
    layer, by = choice.layer, choice.products
    tiled = rows == by.tile.rows
    (by.require_many if tiled else by.require)(layer)
    names = choice.names("order", "experts")
    threads = by.tile.threads if tiled else by.threads(layer)
    f = Device(f"experts{rows}_{choice.name}", [("ptr", n) for n in names], target, threads)
    given = {n: f.memory(p) for n, p in zip(names, f.params(), strict=True)}
    group, tile = (f.block(), f.block("y")) if tiled else (f.block("y"), f.block())
    expert = f.cast("sext", f.load("i32", f.at(given["experts"], group, "int32")), "i64")
    own = _pairs(f, choice, given["order"], group * rows, rows, given)

    def multiply() -> None:
        part = _part(f, layer, given, expert, tile, by.tile.outputs if tiled else by.outputs)
        if tiled:
            by.many(f, layer, by.tile, given["x"], part, own)
        else:
            by.few(f, layer, rows, given["x"], part, own)

    f.when(expert >= 0, multiply)  # the block's threads go on together
    return f.built()


def _pairs(f: Device, choice: Choice, order: Val | None, first: Val, rows: int, given: Mapping[str, Val]) -> _Pairs:
    """The pairs of a tile of so many rows, by the kernel's parameters."""
    index = given["index"] if choice.zeros else None
    return _Pairs(f, first, first, choice, order, rows, given.get("scores"), index)


def of_groups_hopper(choice: Choice, target: Target) -> DeviceKernel:
    """`of_groups` of up to `hopper.WIDE.rows` pairs, for sm_90a. Grid: as many blocks as there are tiles (groups times `Layer.tiles(hopper.WIDE.outputs)`) or
    multiprocessors.

    Parameters: all experts' weights as one tensor map, those of `of_groups` without them, and the number of groups. Raises TargetError for a layer that
    it can't read.
    """
    layer = choice.layer
    hopper.require_hopper(layer, target)
    names = ["w", *(n for n in choice.names("order", "experts") if n != "w")]
    kinds = [(MAP if n == "w" else "ptr", n) for n in names] + [("i64", "groups")]
    f = Device(f"experts_hopper_{choice.name}", kinds, target, hopper.THREADS)
    *pointers, groups = f.params()
    given = {n: p if n == "w" else f.memory(p) for n, p in zip(names, pointers, strict=True)}
    (n,) = layer.outputs

    def piece(number: Val) -> hopper.Piece:
        group, tile = number % groups, number / groups
        expert = f.cast("sext", f.load("i32", f.at(given["experts"], group, "int32")), "i64")
        own = expert * (n * layer.per_weight_row)
        first = tile * hopper.WIDE.outputs
        part = Part(
            given["w"], None, None, None, None, _bias(f, layer, given, expert), given["y"], f.i64(n * layer.per_weight_row), first,
            f.i64(n), None,
        )  # fmt: skip
        gates = own + (first / 2 if layer.apart else first)
        weights = ((given["w"], gates), *([(given["w"], gates + n)] if layer.apart else []))
        return hopper.Piece(
            part,
            _pairs(f, choice, given["order"], group * hopper.WIDE.rows, hopper.WIDE.rows, given),
            weights,
            expert >= 0,
        )

    work = hopper.Work(groups * layer.tiles(hopper.WIDE.outputs), piece)
    hopper.multiply_hopper(f, layer, hopper.WIDE, hopper.Gathered(given["x"]), work)
    return f.built()


def grouped(choice: Choice, rows: int, target: Target) -> DeviceKernel:
    """Groups of up to `rows` pairs of one expert. Grid: 1.

    Parameters: experts' numbers, the groups' pairs int32[groups, rows] (-1 behind the last of a group), the groups' experts int32[groups] (-1
    for none), the numbers of pairs and of groups. Pairs of an expert keep their order; those of none are in no group, or with `Choice.zeros` in one of
    some expert. Each of some threads counts a stretch of the pairs, so that all know where theirs go.
    """
    stretches = _GROUPING
    while stretches > 1 and stretches * choice.count * 4 > _COUNTED_BYTES:
        stretches //= 2
    parameters = [("ptr", n) for n in ("index", "order", "experts")] + [("i64", n) for n in ("pairs", "groups")]
    f = Device(
        f"grouped{rows}_{choice.count}_{choice.index}{'_all' if choice.zeros else ''}", parameters, target, _GROUPING
    )
    *pointers, pairs, count = f.params()
    index, order, experts = map(f.memory, pointers)
    thread, none = f.thread(), f.const(-1, "i32")
    counts = f.shared(stretches * choice.count * 4)
    begins = f.shared((choice.count + 1) * 4)

    def place(stretch: Val, expert: Val) -> Val:
        return f.at(counts, stretch * choice.count + expert, "int32")

    def fill(base: Val, size: Val, value: Val) -> None:
        f.loop(thread, size, _GROUPING, [], lambda i, _: f.store(value, f.at(base, i, "int32")))  # type: ignore[func-returns-value]

    def each(do: Callable[[Val, Val], None]) -> None:
        """do(pair, expert) for the pairs of this thread's stretch."""
        length = (pairs + (stretches - 1)) / stretches
        begin = f.minimum(thread * length, pairs)

        def one(pair: Val, _: list[Val]) -> None:
            expert = _expert(f, choice.index, index, pair)
            if choice.zeros:
                do(pair, _nearest(f, choice.count, expert))
            else:
                f.when(_inside(f, choice.count, expert), lambda: do(pair, expert))

        end = f.select(thread < stretches, f.minimum(begin + length, pairs), begin)
        f.loop(begin, end, 1, [], one)

    def add(pair: Val, expert: Val) -> None:
        at = place(thread, expert)
        f.store(f.load("i32", at) + 1, at)

    def share(expert: Val, _: list[Val]) -> None:
        """Instead of how many pairs a stretch has how many are before it."""

        def before(stretch: Val, carried: list[Val]) -> list[Val]:
            at = place(stretch, expert)
            own = f.load("i32", at)
            f.store(carried[0], at)
            return [carried[0] + own]

        total = f.loop(0, stretches, 1, [f.const(0, "i32")], before)[0]
        f.store((total + (rows - 1)) / rows, f.at(begins, expert + 1, "int32"))

    def gather() -> None:
        """Instead of how many groups each expert has with which its own begin."""
        f.store(f.const(0, "i32"), f.at(begins, 0, "int32"))

        def next_one(expert: Val, carried: list[Val]) -> list[Val]:
            at = f.at(begins, expert + 1, "int32")
            total = carried[0] + f.load("i32", at)
            f.store(total, at)
            return [total]

        f.loop(0, choice.count, 1, [f.const(0, "i32")], next_one)

    def begin_of(expert: Val) -> Val:
        return f.cast("sext", f.load("i32", f.at(begins, expert, "int32")), "i64")

    def name_groups(expert: Val, _: list[Val]) -> None:
        number = f.cast("trunc", expert, "i32")
        f.loop(
            begin_of(expert), begin_of(expert + 1), 1, [],
            lambda i, _: f.store(number, f.at(experts, i, "int32")),  # type: ignore[func-returns-value]
        )  # fmt: skip

    def put(pair: Val, expert: Val) -> None:
        at = place(thread, expert)
        own = f.load("i32", at)
        f.store(own + 1, at)
        slot = begin_of(expert) * rows + f.cast("sext", own, "i64")
        f.store(f.cast("trunc", pair, "i32"), f.at(order, slot, "int32"))

    fill(counts, f.i64(stretches * choice.count), f.const(0, "i32"))
    fill(order, count * rows, none)
    fill(experts, count, none)
    f.barrier()
    each(add)
    f.barrier()
    f.loop(thread, choice.count, _GROUPING, [], share)
    f.barrier()
    f.when(thread.cmp("eq", 0), gather)
    f.barrier()
    f.loop(thread, choice.count, _GROUPING, [], name_groups)
    each(put)
    return f.built()


def summed(how: Mixture, target: Target) -> DeviceKernel:
    """The sum of each token's results, in the order of its choices, in float32. Parameters: experts' numbers, the pairs' results, y. Grid:
    tokens, ceil(hidden / (`SUMMING` * `Mixture.per_chunk`))."""
    f = Device(
        f"experts_summed_{how.count}_{how.chosen}x{how.hidden}_{how.index}_{how.dtype}", [("ptr", n) for n in ("index", "x", "y")], target, SUMMING
    )  # fmt: skip
    index, x, y = map(f.memory, f.params())
    token, first = f.block(), (f.block("y") * SUMMING + f.thread()) * how.per_chunk

    def add() -> None:
        def one(choice: Val, sums: list[Val]) -> list[Val]:
            pair = token * how.chosen + choice
            inside = _inside(f, how.count, _expert(f, how.index, index, pair))
            values = f.unpacked(f.load16("<4 x i32>", f.at(x, pair * how.hidden + first, how.dtype)), how.dtype)
            # A result of no expert may be anything.
            return [f.select(inside, s + v, s) for s, v in zip(sums, values, strict=True)]

        *sums, _ = f.loop(0, how.chosen, 1, [f.const(0.0, "float")] * how.per_chunk, one)
        f.store16(f.packed(sums, how.dtype), f.at(y, token * how.hidden + first, how.dtype))

    f.when(first < how.hidden, add)
    return f.built()
