"""Linear layers of many rows on Hopper: of a block's three warp groups one fetches tiles, two multiply them.

Tiles of x and W come into a ring of stages. Two barriers per stage say that it is full and that it is empty again, so that copies, products
and the block's other groups never wait for all threads. Floats are multiplied straight from shared memory; codes of W become floats in registers,
from which tensor cores take them: then it is W's rows that are the sums' rows. Blocks stay, one per multiprocessor, and take tiles of the results
in turn: the first inputs of one come while the one before is finished and stored.
Source: NVIDIA's PTX ISA (asynchronous warpgroup level matrix instructions); CUTLASS (warp-specialised kernels for sm_90, also of mixed inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.launches import TensorMap
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import Dim
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import GROUP, MAP, PAIRS, WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import (
    Layer,
    Part,
    Rows,
    decoded_pair,
    finished,
    part_of,
    scale_and_zero,
    table_of,
)
from jisu.targets.target import Target

INPUTS = 64
"""Inputs per stage: of 16-bit floats rows of 128 bytes, as many as a swizzle goes over."""
THREADS = 3 * GROUP
_ROW_BYTES = 2 * INPUTS
_RING_BYTES, _MOST_STAGES = 192 << 10, 8  # of shared memory; through what there is besides, results pass
_SLICE = 64  # results of each of 64 rows, or rows of 64 results, that pass through shared memory at a time
_RESULT_BYTES = 64 * _SLICE * 2  # of a warp group's slice
_FETCHING, _MULTIPLYING = 56, 224  # registers per thread
_BAND = 2048  # rows whose results are computed together, so that what blocks read at a time stays in the second cache
_LAG = 2  # stages of gathered rows that are under way when the next one is begun


@attrs.frozen
class Tile:
    """Rows of x and of W whose products a block computes at a time."""

    rows: int
    outputs: int


NARROW, WIDE, HIGH = Tile(128, 128), Tile(128, 256), Tile(256, 128)


def tiles_of(layer: Layer) -> tuple[Tile, Tile]:
    """The tiles where there are few of them for so many multiprocessors, and where there are enough. A warp group has 64 rows of what it multiplies:
    of x or, for codes, which pass through its registers, of W; all groups multiply them by the same up to 256 rows of the other one. Sums of fp8
    take registers twice."""
    return NARROW, HIGH if layer.decodes else NARROW if _adds_itself(layer) else WIDE


def _adds_itself(layer: Layer) -> bool:
    """Whether tensor cores are only let add a step's products. They add those of fp8 with 13 bits of mantissa, which in a sum of thousands lose as much
    as 2 % (DeepSeek-V3 Technical Report, 2024, 3.3.2)."""
    return layer.operand == "fp8"


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
    """Those of `Layer`, but x and the matrices as tensor maps, see `map_of_x` and `map_of_w`."""
    return [(MAP if name == "x" or name[0] in "wv" else kind, name) for kind, name in layer.parameters]


def map_of_x(layer: Layer, tile: Tile, tensor: tuple[str, int], rows: Dim) -> TensorMap:
    """How kernels copy so many rows of x."""
    return TensorMap(tensor, _stored(layer), rows, layer.x_bytes // layer.number_bytes, (tile.rows, inputs_of(layer)))


def map_of_w(layer: Layer, tile: Tile, tensor: tuple[str, int], rows: int) -> TensorMap:
    """How kernels copy a matrix of so many rows: all of a tile, or its gates, or its ups."""
    height = tile.outputs // 2 if layer.apart else tile.outputs
    if layer.decodes:
        return TensorMap(tensor, "uint8", rows, layer.row_bytes, (height, _code_bytes(layer)))
    return TensorMap(tensor, _stored(layer), rows, layer.k, (height, inputs_of(layer)))


def inputs_of(layer: Layer) -> int:
    """Inputs per stage: as many as a swizzle goes over."""
    return _ROW_BYTES // layer.number_bytes


def _stored(layer: Layer) -> str:
    """What maps say of numbers."""
    return "uint8" if layer.number_bytes == 1 else layer.dtype


def _code_bytes(layer: Layer) -> int:
    """Of a row of codes, per stage."""
    return INPUTS * 16 // layer.codes_per_chunk


def product_hopper(layer: Layer, tile: Tile, target: Target) -> DeviceKernel:
    """The layer by tiles of a form (one of `tiles_of`). Parameters: `parameters`. Grid: as many blocks as there are tiles or multiprocessors.

    Raises TargetError unless k is a multiple of 64, groups of codes are parts or multiples of 64 and the target is sm_90a.
    """
    require_hopper(layer, target)
    return of_layer(layer, tile, target)


def of_layer(
    layer: Layer, tile: Tile, target: Target, beside: Sequence[tuple[str, str]] = (),
    scaled: Callable[[Device, dict[str, Val]], Scaled] | None = None,
) -> DeviceKernel:  # fmt: skip
    """A kernel as `product_hopper`. beside: more parameters, behind the others; scaled(f, the parameters): what is done to sums."""
    kinds = [*parameters(layer), *beside]
    f = Device(f"product_hopper{tile.rows}x{tile.outputs}_{layer.name}", kinds, target, THREADS)
    given = {name: value for (_, name), value in zip(kinds, f.params(), strict=True)}
    row_tiles = (given["m"] + (tile.rows - 1)) / tile.rows
    matrix_tiles, band_tiles, table = layer.tiles(tile.outputs), _BAND // tile.rows, table_of(f, layer)

    def piece(number: Val) -> Piece:
        """Tile by tile of W, the bands' rows first."""
        band, rest = number / (band_tiles * matrix_tiles), number % (band_tiles * matrix_tiles)
        first = band * band_tiles
        high = f.minimum(row_tiles - first, band_tiles)
        part = attrs.evolve(part_of(f, layer, rest / high, tile.outputs, mapped=True), table=table)
        rows = Rows(f, (first + rest % high) * tile.rows, given["m"])
        if part.v is None:
            return Piece(part, rows, ((part.w, part.first),))
        return Piece(part, rows, ((part.w, part.first / 2), (part.v, part.first / 2)))

    residual = f.memory(given["r"]) if layer.residual else None
    work = Work(row_tiles * matrix_tiles, piece)
    how = None if scaled is None else scaled(f, given)
    multiply_hopper(f, layer, tile, Boxed(given["x"]), work, residual, how)
    return f.built()


def require_hopper(layer: Layer, target: Target) -> None:
    """Raise TargetError unless `multiply_hopper` reads the layer."""
    layer.require()
    if layer.halves or layer.number_bytes != 2:
        raise TargetError(f"{layer.name}: warp groups multiply dense matrices by numbers of 16 bits, or by levels")
    if target.mcpu != "sm_90a" or layer.dtype not in PAIRS:
        raise TargetError(f"warp groups multiply floats of 16 bits on sm_90a, not {layer.dtype} on {target.mcpu}")
    if layer.k % INPUTS or (layer.group and (layer.group % 16 or (layer.group % INPUTS and INPUTS % layer.group))):
        raise TargetError(f"{layer.name}: inputs or groups don't go into steps of {INPUTS}")


def multiply_hopper(
    f: Device, layer: Layer, tile: Tile, source: Source, work: Work, residual: Val | None = None, scaled: Scaled | None = None
) -> None:  # fmt: skip
    """What a thread does: its share of all tiles of the block. scaled: what is done to sums before they are finished."""
    ring = _Ring(f, layer, tile, source)
    f.when(f.thread() < GROUP, lambda: _fetch(ring, work), lambda: _multiply(ring, work, residual, scaled))


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

    def __init__(self, f: Device, layer: Layer, tile: Tile, source: Source) -> None:
        self.f, self.layer, self.tile, self.source = f, layer, tile, source
        self.gathered = isinstance(source, Gathered)
        self.row_part = tile.rows * _ROW_BYTES
        self.weight_part = tile.outputs * (_code_bytes(layer) if layer.decodes else _ROW_BYTES)
        self.stage_bytes = self.row_part + self.weight_part
        self.stages = min(_MOST_STAGES, _RING_BYTES // self.stage_bytes)
        self.held = f.shared(self.stages * self.stage_bytes, 1024)
        self.results = f.shared(2 * _RESULT_BYTES, 1024)  # of both warp groups that multiply
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
        """Where all begin."""
        return _Turn(self.f.i64(0), self.f.i64(0))

    def after(self, turn: _Turn) -> _Turn:
        """The next stage's turn."""
        f, last = self.f, turn.stage.cmp("eq", self.stages - 1)
        return _Turn(f.select(last, f.i64(0), turn.stage + 1), f.select(last, 1 - turn.parity, turn.parity))

    def before(self, stage: Val, count: int) -> Val:
        """The stage of `count` steps ago."""
        return self.f.select(stage < count, stage + (self.stages - count), stage - count)

    def each(self, work: Work, do: Callable[[Piece, Val, _Turn], _Turn]) -> None:
        """do(piece, its number of steps, turn) for the block's pieces, from one turn to the next."""
        f = self.f

        def one(number: Val, values: list[Val]) -> list[Val]:
            piece, steps = work.piece(number), f.i64(self.layer.k // inputs_of(self.layer))
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
    columns = _code_bytes(ring.layer) if ring.layer.decodes else inputs_of(ring.layer)
    for number, (tensor, row) in enumerate(piece.weights):
        own = f.at(to, number * (ring.weight_part // len(piece.weights)), "i8")
        f.copy_box(own, tensor, row, step * columns, barrier)


def _fetch_boxes(ring: _Ring, source: Boxed, piece: Piece, steps: Val, turn: _Turn) -> _Turn:
    """All inputs of a tile."""
    f = ring.f

    def fetch(step: Val, values: list[Val]) -> list[Val]:
        now = _Turn(*values)
        f.wait_for(ring.empty(now.stage), 1 - now.parity)
        _weights(ring, piece, step, now.stage, ring.row_part)
        rows, _ = ring.tiles(now.stage)
        f.copy_box(rows, source.tensor, piece.rows.first, step * inputs_of(ring.layer), ring.full(now.stage))
        return ring.after(now).values

    *values, _ = f.loop(0, steps, 1, turn.values, fetch)
    return _Turn(*values)


def _fetch_gathered(ring: _Ring, source: Gathered, one: Val, piece: Piece, steps: Val, turn: _Turn) -> _Turn:
    """The same, rows copied by all threads, which say so when their copies have come; `one` of them copies the weights."""
    f, layer = ring.f, ring.layer
    chunks, lag = INPUTS // 8, min(_LAG, layer.k // INPUTS)
    places = list(f.chunks(ring.tile.rows, chunks, GROUP))
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


_Operand = Val | list[Val]
_Read = Callable[[Val, Val, list[Val]], Callable[[], tuple[Iterator[list[_Operand]], list[Val]]]]
"""read(step, stage, what is held): asks for what the GPU's memory has; called where the stage is full it gives groups of operands, each of which is
to be multiplied before the next one is made, and what is held for the next step."""


_Sum = Callable[[int], Val]
Scaled = Callable[[Piece, Val, _Sum], _Sum]
"""scaled(piece, the warp group's number, sums by number): float32 of sums that come as `Device.multiply_group` leaves them, each when it is wanted."""


def _multiply(ring: _Ring, work: Work, residual: Val | None, scaled: Scaled | None) -> None:
    """What the other warp groups do: each 64 rows of every tile, one step's products under way while the next one's inputs are awaited."""
    f, layer = ring.f, ring.layer
    group = f.thread() / GROUP - 1
    one = (f.thread() % WARP).cmp("eq", 0)
    other = ring.tile.rows if layer.decodes else ring.tile.outputs
    # Registers that products read belong to these until they are done. Those of 16 inputs of codes are written anew four groups of products later, so
    # three groups might be under way then; two are, as the assembler may begin to decode before the wait that stands in front of it.
    adds = _adds_itself(layer)
    under_way = INPUTS // 16 - 2 if layer.decodes else 0 if adds else 1
    zeros = [f.const(0, "i32") if layer.operand == "int8" else f.const(0.0, "float")] * (other // 2)
    f.registers(_MULTIPLYING, more=True)

    def release(stage: Val, when: Val) -> None:
        f.when(f.op(f"and i1 {one.name}, {when.name}", "i1"), lambda: f.arrive(ring.empty(stage)))

    def tile(piece: Piece, steps: Val, turn: _Turn) -> _Turn:
        held, read = _codes(ring, piece, group) if layer.decodes else _as_they_lie(ring, group)

        def multiply(step: Val, values: list[Val]) -> list[Val]:
            totals, held, now = values[: other // 2], values[other // 2 : -2], _Turn(*values[-2:])
            sums = zeros if adds else totals
            operands = read(step, now.stage, held)
            f.wait_for(ring.full(now.stage), now.parity)
            groups, held = operands()
            right = f.tile_address(ring.tiles(now.stage)[0 if layer.decodes else 1])
            for number, left in enumerate(groups):
                registers = [word for own in left if not isinstance(own, Val) for word in own]
                ready = f.begin_products([*sums, *registers])
                sums, registers = ready[: len(sums)], ready[len(sums) :]
                left = [registers] if registers else left
                for part, own in enumerate(left, number * len(left)):
                    sums = f.multiply_group(own, right + 2 * part, sums, other, layer.operand)
                f.commit_products()
                sums = f.products_done(under_way, sums)
                if number == max(under_way, 1) - 1:
                    release(ring.before(now.stage, 1), step > 0)
            sums = [total + own for total, own in zip(totals, sums, strict=True)] if adds else sums
            return [*sums, *held, *ring.after(now).values]

        *values, _ = f.loop(0, steps, 1, [*zeros, *held, *turn.values], multiply)
        sums, after = values[: other // 2], _Turn(*values[-2:])
        sums = f.products_done(0, sums) if under_way else sums
        sum_of = sums.__getitem__ if scaled is None else scaled(piece, group, sums.__getitem__)
        release(ring.before(after.stage, 1), steps > 0)
        store = functools.partial(_store_turned if layer.decodes else _store, ring, piece, group, sum_of, residual)
        if piece.there is None:
            store()
        else:
            f.when(piece.there, store)
        return after

    ring.each(work, tile)


def _as_they_lie(ring: _Ring, group: Val) -> tuple[list[Val], _Read]:
    """A warp group's rows of x, as they lie in shared memory."""
    f = ring.f

    def read(step: Val, stage: Val, held: list[Val]) -> Callable[[], tuple[Iterator[list[_Operand]], list[Val]]]:
        rows = f.tile_address(f.at(ring.tiles(stage)[0], group * (64 * _ROW_BYTES), "i8"))
        return lambda: (iter([[rows + 2 * part for part in range(_ROW_BYTES // 32)]]), held)

    return [], read


def _codes(ring: _Ring, piece: Piece, group: Val) -> tuple[list[Val], _Read]:
    """A warp group's rows of W, each thread's numbers in its registers; held from step to step: their scales, which come from the GPU's memory and
    are asked for a step before."""
    f, layer, part = ring.f, ring.layer, piece.part
    lane = f.thread() % WARP
    place, lines = lane % 4, [group * 64 + f.thread() % GROUP / WARP * 16 + (lane / 4 + 8 * half) for half in (0, 1)]
    outputs = [f.minimum(part.first + line, part.rows - 1) for line in lines]
    of_step = range(0, INPUTS, layer.group) if layer.group and layer.group < INPUTS else (0,)
    in_byte = SCHEMES[layer.scheme].per_byte

    def scales(step: Val) -> list[Val]:
        """Scale and zero, by group and row."""
        return [
            v
            for first in of_step
            for row in outputs
            for v in scale_and_zero(f, layer, part, row, step * INPUTS + first)
        ]

    def words(at: Val) -> list[Val]:
        """Of 16 bytes of a row: the words in whose lowest bits this thread's pairs stand, two per 16 inputs."""
        if in_byte == 2:  # eight inputs in a word, of which four threads take two each
            shift = f.cast("trunc", place * 8, "i32")
            own = f.words(f.load_shared16(at))
        else:  # four inputs
            shift = f.cast("trunc", place % 2 * 16, "i32")
            own = [f.load("i32", f.at(at, place / 2 * 4 + 8 * half, "i8")) for half in (0, 1)]
        return [f.op(f"lshr i32 {word.name}, {shift.name}", "i32") for word in own]

    once = None if layer.group else scales(f.i64(0))

    def read(step: Val, stage: Val, held: list[Val]) -> Callable[[], tuple[Iterator[list[_Operand]], list[Val]]]:
        later = scales(f.minimum(step + 1, layer.k // INPUTS - 1)) if once is None else []
        now, (_, weights) = once or held, ring.tiles(stage)
        chunks = _code_bytes(layer) // 16

        def operands() -> tuple[Iterator[list[_Operand]], list[Val]]:
            pairs: list[list[list[Val]]] = []  # by 16 inputs, row and eight inputs
            for chunk in range(chunks):
                both = [words(f.at(weights, f.place(line, f.i64(chunk), chunks), "i8")) for line in lines]
                pairs += [[own[at : at + 2] for own in both] for at in range(0, len(both[0]), 2)]
            return (scaled(number, by_row) for number, by_row in enumerate(pairs)), later

        def scaled(number: int, by_row: list[list[Val]]) -> list[_Operand]:
            at = number * 16 // layer.group if len(of_step) > 1 else 0
            found = [
                [decoded_pair(f, layer, part, word, *now[4 * at + 2 * row : 4 * at + 2 * row + 2]) for word in own]
                for row, own in enumerate(by_row)
            ]
            return [[found[row][eight] for eight in (0, 1) for row in (0, 1)]]

        return operands

    return ([] if once is not None else scales(f.i64(0))), read


def _pass(
    ring: _Ring, group: Val, put: Callable[[Val, int], None], take: Callable[[Val, int], None], count: int
) -> None:
    """Parts of a warp group's results pass through its shared memory: put(there, part) by the threads that have them, take(there, part) by those that
    store them."""
    f = ring.f
    own = f.at(ring.results, group * _RESULT_BYTES, "i8")
    for part in range(count):
        put(own, part)
        f.meet(group + 1, GROUP)
        take(own, part)
        f.meet(group + 1, GROUP)


def _store(ring: _Ring, piece: Piece, group: Val, sum_of: _Sum, residual: Val | None) -> None:
    """Finish a warp group's sums and store them, by way of shared memory, so that neighbouring threads store neighbouring 16 bytes."""
    f, layer, part = ring.f, ring.layer, piece.part
    thread = f.thread() % GROUP
    lane, row = thread % WARP, thread / WARP * 16
    pair, first = lane % 4 * 2, part.first / layer.per_weight_row

    def result(column: Val | int, own: list[Val]) -> Val:
        # Columns beyond the last are copies of it, which nobody stores.
        return finished(f, layer, part, row, f.minimum(first + column, part.n - 1), own, None)

    def put_neighbours(own: Val, slice_: int) -> None:
        """Results of two neighbouring gates and ups each."""
        for block in range(2 * _SLICE // 8):
            for half in (0, 1):
                at = 4 * (slice_ * (2 * _SLICE // 8) + block) + 2 * half
                column = lane % 4 + 4 * block
                value = f.narrow(result(column + slice_ * _SLICE, [sum_of(at), sum_of(at + 1)]), layer.dtype)
                f.store(value, f.at(own, f.place(row + lane / 4 + 8 * half, column / 8, 8) + column % 8 * 2, "i8"))

    def put_pairs(own: Val, slice_: int) -> None:
        """Results of single sums, or of gates and ups that stand in halves."""
        ups = [ring.tile.outputs // 4] if layer.gated else []
        for block in range(0, _SLICE // 8, 2):
            four = []
            for number in (block, block + 1):
                for half in (0, 1):
                    at, column = 4 * (slice_ * (_SLICE // 8) + number) + 2 * half, pair + (slice_ * _SLICE + 8 * number)
                    both = [result(column + i, [sum_of(at + i + more) for more in (0, *ups)]) for i in (0, 1)]
                    four.append(f.pair(both[0], both[1], layer.dtype))
            matrix = lane / 8
            at_row, chunk = row + lane % 8 + (matrix & 1) * 8, (matrix >> 1) + block
            f.store_fragments(f.at(own, f.place(at_row, chunk, 8), "i8"), four)

    def take(own: Val, slice_: int) -> None:
        for line, chunk in f.chunks(64, 8, GROUP, thread):
            words = f.load_shared16(f.at(own, f.place(line, chunk, 8), "i8"))
            _store_eight(ring, piece, group * 64 + line, first + (chunk * 8 + slice_ * _SLICE), words, residual)

    put = put_neighbours if layer.gated and not layer.apart else put_pairs
    _pass(ring, group, put, take, ring.tile.outputs // layer.per_weight_row // _SLICE)


def _store_turned(ring: _Ring, piece: Piece, group: Val, sum_of: _Sum, residual: Val | None) -> None:
    """The same of sums whose rows are W's, and whose columns are x's. Gates and ups are other threads' and meet in shared memory."""
    f, layer, part = ring.f, ring.layer, piece.part
    thread, per = f.thread() % GROUP, layer.per_weight_row
    lane, warp, first = thread % WARP, thread / WARP, part.first + group * 64

    def put(own: Val, slice_: int) -> None:
        matrix = lane / 8
        for block in range(0, _SLICE // 8, 2):
            four = []
            for number in (block, block + 1):
                for half in (0, 1):
                    at, row = 4 * (slice_ * (_SLICE // 8) + number) + 2 * half, warp * 16 + (lane / 4 + 8 * half)
                    both = [sum_of(at), sum_of(at + 1)]
                    if not layer.gated:
                        at_row = f.minimum(first + row, part.rows - 1)
                        both = [finished(f, layer, part, row, at_row, [value], None) for value in both]
                    four.append(f.pair(both[0], both[1], layer.dtype))
            line, chunk = lane % 8 + ((matrix >> 1) + block) * 8, warp * 2 + (matrix & 1)
            f.store_fragments(f.at(own, f.place(line, chunk, 8), "i8"), four, turned=True)

    def take(own: Val, slice_: int) -> None:
        for line, chunk in f.chunks(_SLICE, 8 // per, GROUP, thread):
            found = [f.load_shared16(f.at(own, f.place(line, chunk * per + i, 8), "i8")) for i in range(per)]
            words, at_column = found[0], first / per + chunk * 8
            if layer.gated:
                both = [value for four in found for value in f.unpacked(four, layer.dtype)]
                results = [finished(f, layer, part, line, at_column, both[i : i + 2], None) for i in range(0, 16, 2)]
                words = f.packed(results, layer.dtype)
            _store_eight(ring, piece, line + slice_ * _SLICE, at_column, words, residual)

    _pass(ring, group, put, take, ring.tile.rows // _SLICE)


def _store_eight(ring: _Ring, piece: Piece, line: Val, column: Val, words: Val, residual: Val | None) -> None:
    """Store eight results of a row of the tile, in one piece where rows of y consist of such."""
    f, layer, part, rows = ring.f, ring.layer, piece.part, piece.rows
    row = rows.place(line)
    at = row * part.n + column
    whole = all(n % 8 == 0 for n in layer.outputs)

    def put() -> None:
        if whole and residual is None and not rows.weighs:
            f.store16(words, f.at(part.y, at, layer.dtype))
            return
        values = f.unpacked(words, layer.dtype)
        if not whole:
            for i, value in enumerate(values):
                f.when(column + i < part.n, functools.partial(put_one, i, value))
            return
        if residual is not None:
            others = f.unpacked(f.load16("<4 x i32>", f.at(residual, at, layer.dtype)), layer.dtype)
            values = [value + other for value, other in zip(values, others, strict=True)]
        f.store16(f.packed([rows.weighed(value, row) for value in values], layer.dtype), f.at(part.y, at, layer.dtype))

    def put_one(i: int, value: Val) -> None:
        if residual is not None:
            value = value + f.load_f32(residual, at + i, layer.dtype, lanes=1)
        f.store_f32(rows.weighed(value, row), part.y, at + i, layer.dtype)

    f.when(f.op(f"and i1 {rows.there(row).name}, {(column < part.n).name}", "i1"), put)
