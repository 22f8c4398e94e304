"""Linear layers of many rows on Hopper: of a block's three warp groups one fetches tiles, two multiply them straight from shared memory.

Tiles of x and W come into a ring of stages. Two barriers per stage say that it is full and that it is empty again, so that copies, products
and the block's other groups never wait for all threads. Blocks stay, one per multiprocessor, and take tiles of the results in turn: the first
inputs of one come while the one before is finished and stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import GROUP, MAP, WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import Layer, Part, Rows, finished, part_of
from jisu.targets.target import Target

ROWS = 128
"""Rows of x in a tile: 64 for each of the warp groups that multiply."""
WIDE, NARROW = 256, 128
"""Rows of W in a tile: where there are tiles enough for all multiprocessors, and where there aren't."""
INPUTS = 64
"""Inputs per stage: rows of 128 bytes, which is what the swizzle is for."""
THREADS = 3 * GROUP
_ROW_BYTES = 2 * INPUTS
_RING_BYTES = 192 << 10  # of shared memory; what else there is, results pass through
_SLICE = 64  # results of a row that pass through shared memory at a time
_FETCHING, _MULTIPLYING = 56, 224  # registers per thread
_BAND = 16  # tiles of rows whose results are computed together, so that what blocks read at a time stays in the second cache
_LAG = 2  # stages of gathered rows that are under way when the next one is begun


@attrs.frozen(eq=False)
class Boxed:
    """Rows of x that lie one behind the other, copied by its tensor map."""

    tensor: Val


@attrs.frozen(eq=False)
class Gathered:
    """Rows of x at the addresses that `Rows.source` names, copied by all threads of the warp group that fetches."""

    x: Val


Source = Boxed | Gathered


@attrs.frozen(eq=False)
class Piece:
    """A tile of the results. weights: tensor maps and rows from which on they have the tile's rows of W, each as many. there: whether it is one;
    None if all are."""

    part: Part
    rows: Rows
    weights: tuple[tuple[Val, Val], ...]
    there: Val | None = None


@attrs.frozen(eq=False)
class Work:
    """Tiles of results, numbered: how many there are, and each one."""

    count: Val
    piece: Callable[[Val], Piece]


def parameters(layer: Layer) -> list[tuple[str, str]]:
    """Those of `Layer`, but x and the matrices as tensor maps of boxes of `INPUTS` columns, of x `ROWS` rows, of the matrices `rows_of_box`."""
    return [(MAP if name == "x" or name[0] in "wv" else kind, name) for kind, name in layer.parameters]


def rows_of_box(layer: Layer, outputs: int) -> int:
    """Rows of W that are copied at once for tiles of `outputs`: all, or the gates, or the ups."""
    return outputs // 2 if layer.apart else outputs


def product_hopper(layer: Layer, outputs: int, target: Target) -> DeviceKernel:
    """The layer by tiles of `ROWS` rows of x and `outputs` of W (`WIDE` or `NARROW`). Parameters: `parameters`. Grid: as many blocks as there are
    tiles or multiprocessors.

    Raises TargetError unless k is a multiple of 64, W is no matrix of codes and the target is sm_90a.
    """
    require_hopper(layer, target)
    f = Device(f"product_hopper{outputs}_{layer.name}", parameters(layer), target, THREADS)
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=True)}
    row_tiles, matrix_tiles = (given["m"] + (ROWS - 1)) / ROWS, layer.tiles(outputs)

    def piece(number: Val) -> Piece:
        """Tile by tile of W, the bands' rows first."""
        band, rest = number / (_BAND * matrix_tiles), number % (_BAND * matrix_tiles)
        first = band * _BAND
        high = f.minimum(row_tiles - first, _BAND)
        part = part_of(f, layer, rest / high, outputs, mapped=True)
        rows = Rows(f, (first + rest % high) * ROWS, given["m"])
        if part.v is None:
            return Piece(part, rows, ((part.w, part.first),))
        return Piece(part, rows, ((part.w, part.first / 2), (part.v, part.first / 2)))

    residual = f.memory(given["r"]) if layer.residual else None
    work = Work(row_tiles * matrix_tiles, piece)
    multiply_hopper(f, layer, outputs, Boxed(given["x"]), work, residual)
    return f.built()


def require_hopper(layer: Layer, target: Target) -> None:
    """Raise TargetError unless `multiply_hopper` reads the layer."""
    layer.require()
    if target.mcpu != "sm_90a" or layer.scheme:
        raise TargetError(f"warp groups multiply floats on sm_90a, not {layer.scheme or layer.dtype} on {target.mcpu}")
    if layer.k % INPUTS:
        raise TargetError(f"{layer.name}: inputs are no multiple of {INPUTS}")


def multiply_hopper(
    f: Device, layer: Layer, outputs: int, source: Source, work: Work, residual: Val | None = None
) -> None:
    """What a thread does: its share of all tiles of the block."""
    ring = _Ring(f, layer, outputs, source)
    f.when(f.thread() < GROUP, lambda: _fetch(ring, work), lambda: _multiply(ring, work, residual))


@attrs.frozen(eq=False)
class _Turn:
    """A stage of the ring and the parity of the round that it is in."""

    stage: Val
    parity: Val

    @property
    def values(self) -> list[Val]:
        return [self.stage, self.parity]


class _Ring:
    """Stages in shared memory, each with its barriers."""

    def __init__(self, f: Device, layer: Layer, outputs: int, source: Source) -> None:
        self.f, self.layer, self.outputs, self.source = f, layer, outputs, source
        self.gathered = isinstance(source, Gathered)
        self.row_part, self.weight_part = ROWS * _ROW_BYTES, outputs * _ROW_BYTES
        self.stage_bytes = self.row_part + self.weight_part
        self.stages = _RING_BYTES // self.stage_bytes
        self.held = f.shared(self.stages * self.stage_bytes, 1024)
        self.results = f.shared(2 * 64 * 2 * _SLICE, 1024)  # of both warp groups that multiply
        self.barriers = f.shared(16 * self.stages, 16)

        def make() -> None:
            for stage in map(f.i64, range(self.stages)):
                f.make_barrier(self.full(stage), 1 + (GROUP if self.gathered else 0))
                f.make_barrier(self.empty(stage), 2 * GROUP // WARP)
            f.barriers_made()

        f.when(f.thread().cmp("eq", 0), make)
        f.barrier()

    def full(self, stage: Val) -> Val:
        """Its barrier for those who fetch."""
        return self.f.at(self.barriers, stage * 16, "i8")

    def empty(self, stage: Val) -> Val:
        """Its barrier for those who have read it."""
        return self.f.at(self.barriers, stage * 16 + 8, "i8")

    def tiles(self, stage: Val) -> tuple[Val, Val]:
        """Where a stage's rows and weights are."""
        rows = self.f.at(self.held, stage * self.stage_bytes, "i8")
        return rows, self.f.at(rows, self.row_part, "i8")

    def first(self) -> _Turn:
        return _Turn(self.f.i64(0), self.f.i64(0))

    def after(self, turn: _Turn) -> _Turn:
        """The next stage's turn."""
        f, last = self.f, turn.stage.cmp("eq", self.stages - 1)
        return _Turn(f.select(last, 0 * turn.stage, turn.stage + 1), f.select(last, 1 - turn.parity, turn.parity))

    def before(self, stage: Val, count: int) -> Val:
        """The stage of `count` steps ago."""
        return self.f.select(stage < count, stage + (self.stages - count), stage - count)

    def each(self, work: Work, do: Callable[[Piece, Val, _Turn], _Turn]) -> None:
        """do(piece, its number of steps, turn) for the block's pieces, from one turn to the next."""
        f = self.f

        def one(number: Val, values: list[Val]) -> list[Val]:
            piece, steps = work.piece(number), f.i64(self.layer.k // INPUTS)
            if piece.there is not None:
                steps = f.select(piece.there, steps, 0)
            return do(piece, steps, _Turn(*values)).values

        f.loop(f.block(), work.count, f.blocks(), self.first().values, one)


def _fetch(ring: _Ring, work: Work) -> None:
    """What the first warp group does: all its threads where rows are gathered, else one of them."""
    f, source = ring.f, ring.source
    one = f.thread().cmp("eq", 0)
    f.registers(_FETCHING, more=False)
    if isinstance(source, Boxed):
        f.when(one, lambda: ring.each(work, lambda *of: _fetch_boxes(ring, source, *of)))
    else:
        ring.each(work, lambda *of: _fetch_gathered(ring, source, one, *of))


def _weights(ring: _Ring, piece: Piece, step: Val, stage: Val, more: int = 0) -> None:
    """Begin to copy a step's weights; `more` bytes are expected besides."""
    f, (_, to), barrier = ring.f, ring.tiles(stage), ring.full(stage)
    f.arrive_expecting(barrier, ring.weight_part + more)
    for number, (tensor, row) in enumerate(piece.weights):
        own = f.at(to, number * (ring.weight_part // len(piece.weights)), "i8")
        f.copy_box(own, tensor, row, step * INPUTS, barrier)


def _fetch_boxes(ring: _Ring, source: Boxed, piece: Piece, steps: Val, turn: _Turn) -> _Turn:
    """All inputs of a tile."""
    f = ring.f

    def fetch(step: Val, values: list[Val]) -> list[Val]:
        now = _Turn(*values)
        f.wait_for(ring.empty(now.stage), 1 - now.parity)
        _weights(ring, piece, step, now.stage, ring.row_part)
        rows, _ = ring.tiles(now.stage)
        f.copy_box(rows, source.tensor, piece.rows.first, step * INPUTS, ring.full(now.stage))
        return ring.after(now).values

    *values, _ = f.loop(0, steps, 1, turn.values, fetch)
    return _Turn(*values)


def _fetch_gathered(ring: _Ring, source: Gathered, one: Val, piece: Piece, steps: Val, turn: _Turn) -> _Turn:
    """The same, rows copied by all threads, which say so when their copies have come; `one` of them copies the weights."""
    f, layer = ring.f, ring.layer
    chunks, lag = INPUTS // 8, min(_LAG, layer.k // INPUTS)
    places = list(f.chunks(ROWS, chunks, GROUP))
    begins = [f.at(source.x, piece.rows.source(row) * layer.k + chunk * 8, layer.dtype) for row, chunk in places]

    def arrived(stage: Val, but: int) -> None:
        f.copies_done(but)
        f.copies_shown()
        f.arrive(ring.full(stage))

    def fetch(step: Val, values: list[Val]) -> list[Val]:
        now = _Turn(*values)
        f.wait_for(ring.empty(now.stage), 1 - now.parity)
        f.when(one, lambda: _weights(ring, piece, step, now.stage))
        rows, _ = ring.tiles(now.stage)
        for (row, chunk), begin in zip(places, begins, strict=True):
            f.copy16(f.at(rows, f.place(row, chunk, chunks), "i8"), f.at(begin, step * INPUTS, layer.dtype))
        f.commit_copies()
        f.when(step >= lag, lambda: arrived(ring.before(now.stage, lag), lag))
        return ring.after(now).values

    *values, _ = f.loop(0, steps, 1, turn.values, fetch)
    after = _Turn(*values)

    def last() -> None:
        for but in reversed(range(lag)):
            arrived(ring.before(after.stage, but + 1), but)

    f.when(steps > 0, last)
    return after


def _multiply(ring: _Ring, work: Work, residual: Val | None) -> None:
    """What the other warp groups do: each 64 rows of every tile, one step's products under way while the next one's inputs are awaited."""
    f, layer, outputs = ring.f, ring.layer, ring.outputs
    group = f.thread() / GROUP - 1
    one = (f.thread() % WARP).cmp("eq", 0)
    f.registers(_MULTIPLYING, more=True)

    def release(stage: Val, when: Val) -> None:
        f.when(f.op(f"and i1 {one.name}, {when.name}", "i1"), lambda: f.arrive(ring.empty(stage)))

    def multiply(step: Val, values: list[Val]) -> list[Val]:
        *sums, stage, parity = values
        now = _Turn(stage, parity)
        f.wait_for(ring.full(stage), parity)
        rows, weights = ring.tiles(stage)
        a, b = f.tile_address(f.at(rows, group * (64 * _ROW_BYTES), "i8")), f.tile_address(weights)
        f.begin_products()
        for part in range(INPUTS // 16):
            sums = f.multiply_group(a + 2 * part, b + 2 * part, sums, outputs, layer.dtype)
        f.commit_products()
        sums = f.products_done(1, sums)
        release(ring.before(stage, 1), step > 0)
        return [*sums, *ring.after(now).values]

    def tile(piece: Piece, steps: Val, turn: _Turn) -> _Turn:
        zeros = [f.const(0.0, "float")] * (outputs // 2)
        *sums, stage, parity, _ = f.loop(0, steps, 1, [*zeros, *turn.values], multiply)
        sums = f.products_done(0, sums)
        release(ring.before(stage, 1), steps > 0)
        if piece.there is None:
            _store(ring, piece, group, sums, residual)
        else:
            f.when(piece.there, lambda: _store(ring, piece, group, sums, residual))
        return _Turn(stage, parity)

    ring.each(work, tile)


def _store(ring: _Ring, piece: Piece, group: Val, sums: Sequence[Val], residual: Val | None) -> None:
    """Finish a warp group's sums and store them, by way of shared memory, so that neighbouring threads store neighbouring 16 bytes."""
    f, layer, part = ring.f, ring.layer, piece.part
    thread = f.thread() % GROUP
    row, pair = thread / WARP * 16 + thread % WARP / 4, thread % 4 * 2
    own = f.at(ring.results, group * (64 * 2 * _SLICE), "i8")
    first = part.first / layer.per_weight_row

    def put(row: Val, begin: int, column: Val, results: Sequence[list[Val]]) -> None:
        """Into shared memory; columns beyond the last are copies of it, which nobody stores."""
        done = []
        for number, own_sums in enumerate(results):
            at_column = f.minimum(first + (column + (begin + number)), part.n - 1)
            done.append(finished(f, layer, part, row, at_column, own_sums, None))
        at = f.at(own, f.place(row, column / 8, 8) + column % 8 * 2, "i8")
        f.store(f.pair(done[0], done[1], layer.dtype) if len(done) == 2 else f.narrow(done[0], layer.dtype), at)

    def take(line: Val, chunk: Val, begin: int) -> None:
        """From there to y."""
        at_row, at_column = piece.rows.place(group * 64 + line), first + (chunk * 8 + begin)
        words = f.load_shared16(f.at(own, f.place(line, chunk, 8), "i8"))
        inside = f.op(f"and i1 {piece.rows.there(at_row).name}, {(at_column < part.n).name}", "i1")
        f.when(inside, lambda: _store_eight(f, layer, piece, at_row, at_column, words, residual))

    for begin in range(0, ring.outputs // layer.per_weight_row, _SLICE):
        for half in (0, 1):
            pairs = [sums[i + 2 * half : i + 2 * half + 2] for i in range(0, len(sums), 4)]
            for column, results in _results(layer, begin, pair, pairs):
                put(row + 8 * half, begin, column, results)
        f.meet(group + 1, GROUP)
        for line, chunk in f.chunks(64, 8, GROUP, thread):
            take(line, chunk, begin)
        f.meet(group + 1, GROUP)


def _results(layer: Layer, begin: int, pair: Val, sums: Sequence[Sequence[Val]]) -> list[tuple[Val, list[list[Val]]]]:
    """Of the results from `begin` on of a slice, what a thread has: columns in the slice, and there the sums of one or two neighbouring results.
    sums: two per 8 rows of W."""
    blocks = _SLICE // 8
    if layer.gated and not layer.apart:  # a gate and its up are neighbours
        return [(pair / 2 + 4 * j, [list(sums[begin // 4 + j])]) for j in range(2 * blocks)]
    if layer.gated:
        ups = len(sums) // 2
        both = [(sums[begin // 8 + j], sums[begin // 8 + j + ups]) for j in range(blocks)]
        return [(pair + 8 * j, [[g, u] for g, u in zip(*own, strict=True)]) for j, own in enumerate(both)]
    return [(pair + 8 * j, [[s] for s in sums[begin // 8 + j]]) for j in range(blocks)]


def _store_eight(
    f: Device, layer: Layer, piece: Piece, row: Val, column: Val, words: Val, residual: Val | None
) -> None:
    """Store eight results of a row, in one piece where rows of y consist of such."""
    part, at = piece.part, row * piece.part.n + column
    whole = all(n % 8 == 0 for n in layer.outputs)
    if whole and residual is None and not piece.rows.weighs:
        f.store16(words, f.at(part.y, at, layer.dtype))
        return
    values = f.unpacked(words, layer.dtype)
    if whole:
        if residual is not None:
            others = f.unpacked(f.load16("<4 x i32>", f.at(residual, at, layer.dtype)), layer.dtype)
            values = [value + other for value, other in zip(values, others, strict=True)]
        values = [piece.rows.weighed(value, row) for value in values]
        f.store16(f.packed(values, layer.dtype), f.at(part.y, at, layer.dtype))
        return
    for i, value in enumerate(values):

        def put(i: int = i, value: Val = value) -> None:
            if residual is not None:
                value = value + f.load_f32(residual, at + i, layer.dtype, lanes=1)
            f.store_f32(piece.rows.weighed(value, row), part.y, at + i, layer.dtype)

        f.when(column + i < part.n, put)
