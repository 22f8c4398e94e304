"""Linear layers of few rows on NVIDIA GPUs: weights are streamed once, every thread fetching what it multiplies itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import (
    Layer,
    Part,
    Rows,
    decoded,
    finished,
    inputs,
    multiplied,
    part_of,
    row_address,
    scales_of,
)
from jisu.targets.cuda.kernels.tails import Tail, finish_row
from jisu.targets.target import Target

OUTPUTS = 16
"""Rows of W in a tile, of which a block multiplies one or two."""
WARPS = 8
ROWS = (8, 16, 32)
"""Rows of x that kernels are made for: up to so many."""
# By tiles, turns whose chunks are under way or being multiplied: enough to hide memory's latency by two blocks.
_STAGES = {1: 5, 2: 3}
_HALF_BYTES = 16 * WARPS * WARP  # of a turn's chunks of half of a tile


def outputs(layer: Layer, rows: int, target: Target) -> int:
    """Rows of W of a block of `thin`.

    A block reads `rows` rows of x. With 16 of W in bfloat16 that is as many bytes for 16 rows of x and twice as many for 32 (of 4-bit codes four times as
    many again), which the second cache, less than twice as fast as memory, would take longer for than memory for W: then it is 32 of W,
    where enough blocks remain for three of four multiprocessors.
    """
    two = rows > 8 and 4 * layer.tiles(2 * OUTPUTS) >= 3 * target.cores
    return 2 * OUTPUTS if two else OUTPUTS


def thin(layer: Layer, rows: int, target: Target, then: Tail | None = None) -> DeviceKernel:
    """The layer, `rows` rows of x (one of `ROWS`) at a time. Parameters: `Layer.parameters`. Grid: `layer.tiles(outputs(…))`, parts of rows.

    then: what is made of the one row that results are, by the block that is done last; more parameters: `Tail.pointers` and a counter int32
    (0 before and after).

    A block has 16 or 32 rows of W; its warps take turns along the inputs. Of a row, each of four threads loads 16 bytes at a time: the weights of
    such a chunk and the same inputs of x are what `mma` sums over, in whatever order, as long as it is the same for both. Partial sums of
    warps meet in shared memory in a fixed order, which depends on k alone. Raises TargetError for a layer that it can't read.
    """
    layer.require()
    return of_rows(layer, rows, target, Thin, then)


def of_rows(
    layer: Layer, rows: int, target: Target, kind: Callable[..., Thin], then: Tail | None = None
) -> DeviceKernel:
    """A kernel as `thin`, whose threads do what `kind` says."""
    weights = [name for _, name in layer.parameters if name[0] in "wv"]
    behind = [] if then is None else [("ptr", f"tail_{name}") for name in (*then.pointers, "counter")]
    name, parameters = f"thin{rows}_{layer.name}{'' if then is None else then.name}", [*layer.parameters, *behind]
    f = Device(name, parameters, target, WARPS * WARP, ahead=weights)
    given = {name: value for (_, name), value in zip(parameters, f.params(), strict=True)}
    residual = f.memory(given["r"]) if layer.residual else None
    own = Rows(f, f.block("y") * rows, given["m"])
    count = outputs(layer, rows, target)
    part = part_of(f, layer, f.block(), count)
    multiplied(
        functools.partial(kind, tiles=count // OUTPUTS), f, layer, rows, f.memory(given["x"]), part, own, residual
    )
    if then is not None:
        found = {"x": part.y, **{n: f.memory(given[f"tail_{n}"]) for n in then.pointers}}
        others = f.const(layer.tiles(count) - 1, "i32")
        is_last = f.is_last(f.memory(given["tail_counter"]), others)
        f.when(is_last, lambda: finish_row(f, then, f.i64(0), found))
    return f.built()


def multiply_thin(
    f: Device, layer: Layer, rows: int, x: Val, part: Part, own: Rows, residual: Val | None = None, tiles: int = 1
) -> None:
    """What a thread of `thin` does: up to `rows` rows of x times one or two tiles of 16 rows of W, with `WARPS` warps."""
    multiplied(functools.partial(Thin, tiles=tiles), f, layer, rows, x, part, own, residual)


class Thin:
    """The kernel under construction: what one thread of it does. Sums: per eight rows of x, and of these per tile of W, those of `mma`."""

    def __init__(self, f: Device, layer: Layer, rows: int, x: Val, part: Part, own: Rows, tiles: int = 1) -> None:
        self.tiles, self.outputs, self.stages = tiles, tiles * OUTPUTS, _STAGES[tiles]
        self.f, self.layer, self.rows, self.x, self.part, self.own = f, layer, rows, x, part, own
        self.thread = f.thread()
        lane, self.warp = self.thread % WARP, self.thread / WARP
        self.line, self.place = lane / 4, lane % 4
        self.columns = rows // 8
        self.chunk = layer.codes_per_chunk
        self.chunks = layer.k // self.chunk
        self.step = 4 * WARPS  # chunks of all warps
        self.turns = self.chunks // self.step  # in which every thread has a chunk
        self.begin = self.warp * 4 + self.place
        # Rows beyond the last are copies of it, whose results nobody stores.
        self.places = [
            f.minimum(self.part.first + self.line + 8 * half, self.part.rows - 1) for half in range(2 * tiles)
        ]
        self.lines = [own.source(self.line + 8 * c) for c in range(self.columns)]
        self.held = f.shared(max(WARPS * self.outputs * rows * 4, self.stage_bytes()))

    def stage_bytes(self) -> int:
        """Of shared memory for chunks under way."""
        return self.stages * 2 * self.tiles * _HALF_BYTES if self.turns else 0

    def sums(self) -> list[Val]:
        """The sums of this thread's chunks."""
        return self.along([self.f.const(0.0, "float")] * (4 * self.columns * self.tiles))

    def along(self, sums: list[Val]) -> list[Val]:
        """`multiply` of all of this thread's chunks, one after the other."""
        f = self.f
        for early in range(self.stages - 1) if self.turns else ():
            if early < self.turns:
                self.fetch(f.i64(early))
            f.commit_copies()
        f.wait()  # for what is multiplied with them
        if self.turns:
            *sums, _ = f.loop(0, self.turns, 1, sums, self.turn)
            f.barrier()  # shared memory is used anew
        # All threads of a warp must multiply together: bounds are those of its first thread.
        if self.chunks > self.turns * self.step:
            *sums, _ = f.loop(self.warp * 4 + self.turns * self.step, self.chunks, self.step, sums, self.single)
        return sums

    def source(self, number: Val, half: int) -> Val:
        """Where a chunk of one of this thread's rows of W is."""
        return self.f.at(row_address(self.f, self.layer, self.part, self.places[half]), number * 16, "i8")

    def slot(self, turn: Val, half: int) -> Val:
        """This thread's own place for a chunk under way: nobody else reads it."""
        own = self.thread * 16 + half * _HALF_BYTES
        return self.f.at(self.held, turn % self.stages * (2 * self.tiles * _HALF_BYTES) + own, "i8")

    def fetch(self, turn: Val) -> None:
        """Begin to copy this thread's chunks of a turn."""
        for half in range(2 * self.tiles):
            self.f.copy16(self.slot(turn, half), self.source(self.begin + turn * self.step, half))

    def turn(self, turn: Val, sums: list[Val]) -> list[Val]:
        """A turn's products, while later chunks are under way."""
        f = self.f
        f.copies_done(self.stages - 2)
        words = [f.words(f.load_shared16(self.slot(turn, half))) for half in range(2 * self.tiles)]
        later = turn + (self.stages - 1)
        f.when(later < self.turns, lambda: self.fetch(later))
        f.commit_copies()
        return self.multiply(self.begin + turn * self.step, words, sums, None)

    def single(self, first: Val, sums: list[Val]) -> list[Val]:
        """The products of a chunk behind the last whole turn."""
        f, number, whole = self.f, first + self.place, self.chunks % 4 == 0
        at = number if whole else f.minimum(number, self.chunks - 1)
        words = [f.words(f.load16("<4 x i32>", self.source(at, half))) for half in range(2 * self.tiles)]
        return self.multiply(at, words, sums, None if whole else number < self.chunks)

    def multiply(self, number: Val, words: list[list[Val]], sums: list[Val], inside: Val | None) -> list[Val]:
        """Add the products of a chunk; what isn't `inside` counts as zeros."""
        f, layer, result, pieces = self.f, self.layer, list(sums), self.chunk // 8
        scales = [scales_of(f, layer, self.part, row, number) if layer.scheme else [] for row in self.places]
        for piece in range(pieces):  # of 16 bytes of x
            own = slice(4 * piece // pieces, 4 * (piece + 1) // pieces)
            weights = [part[own] for part in words]
            if layer.scheme:
                both = zip(weights, scales, strict=True)
                weights = [decoded(f, layer, self.part, part, scale[own]) for part, scale in both]
            if inside is not None:
                weights = [[f.select(inside, w, 0) for w in part] for part in weights]
            for c, row in enumerate(self.lines):
                at = f.at(self.x, row * layer.k + number * self.chunk + 8 * piece, layer.dtype)
                pairs = inputs(f, layer, f.words(f.load16("<4 x i32>", at)))
                if inside is not None:
                    pairs = [f.select(inside, p, 0) for p in pairs]
                for i in (0, 2):
                    for tile in range(self.tiles):
                        low, high = weights[2 * tile : 2 * tile + 2]
                        a, first = [low[i], high[i], low[i + 1], high[i + 1]], 4 * (c * self.tiles + tile)
                        result[first : first + 4] = f.mma(a, pairs[i : i + 2], result[first : first + 4], layer.dtype)
        return result

    def leave(self, sums: list[Val], residual: Val | None) -> None:
        """Join the warps' sums, finish and store the results."""
        f, layer, part = self.f, self.layer, self.part
        for which, own in enumerate(sums):
            (c, tile), i = divmod(which // 4, self.tiles), which % 4
            output, row = self.line + (8 * (i // 2) + OUTPUTS * tile), self.place * 2 + (i % 2 + 8 * c)
            at = (self.warp * self.outputs + output) * self.rows + row
            f.store(own, f.at(self.held, at, "float32"))
        f.barrier()
        per_row = self.outputs // layer.per_weight_row
        for begin in range(0, per_row * self.rows, WARPS * WARP):
            number = self.thread + begin
            output, row = number % per_row, number / per_row
            column = part.first / layer.per_weight_row + output
            at_row = self.own.place(row)

            def store(output: Val = output, row: Val = row, at_row: Val = at_row, column: Val = column) -> None:
                own = [self.total(output * layer.per_weight_row + i, row) for i in range(layer.per_weight_row)]
                value = self.own.weighed(finished(f, layer, part, at_row, column, own, residual), at_row)
                f.store_f32(value, part.y, at_row * part.n + column, layer.dtype)

            valid = [row < self.rows, self.own.there(at_row), column < part.n]
            inside = f.op(f"and i1 {valid[0].name}, {valid[1].name}", "i1")
            f.when(f.op(f"and i1 {inside.name}, {valid[2].name}", "i1"), store)

    def total(self, output: Val, row: Val) -> Val:
        """The sum of all warps."""
        f = self.f
        value = f.load("float", f.at(self.held, output * self.rows + row, "float32"))
        for w in range(1, WARPS):
            value = value + f.load("float", f.at(self.held, (output + w * self.outputs) * self.rows + row, "float32"))
        return value
