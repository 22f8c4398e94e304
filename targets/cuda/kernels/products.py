"""Linear layers of many rows on NVIDIA GPUs: tiles on tensor cores, inputs copied while earlier ones are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import (
    Layer,
    Part,
    Rows,
    decoded,
    finished,
    inputs,
    part_of,
    row_address,
    scale_and_zero,
)
from jisu.targets.target import Target

EIGHT = 8
"""Numbers of 16 bits in 16 bytes."""
_STAGES = 4  # steps whose inputs are under way or in shared memory; three of twice as many inputs
_PART = 32  # inputs of a part of a step of codes, of which each of four threads has eight


@attrs.frozen
class Tile:
    """Rows of x and of W that a block multiplies, and its warps along both. Grid: tiles of rows, then `Layer.tiles(outputs)`, so that blocks of
    one matrix tile run together."""

    rows: int
    outputs: int
    warps: tuple[int, int]

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps[0] * self.warps[1] * WARP

    @property
    def of_warp(self) -> tuple[int, int]:
        """Rows and outputs of a warp."""
        return self.rows // self.warps[0], self.outputs // self.warps[1]


LARGE, SMALL = Tile(128, 128, (2, 4)), Tile(64, 64, (2, 2))
"""Where there are rows enough for blocks on all multiprocessors, and where there aren't."""


class Tiled:
    """A layer in tiles under construction, `inputs` of k per step."""

    def __init__(
        self, f: Device, layer: Layer, tile: Tile, inputs: int, x: Val, part: Part, own: Rows, residual: Val | None, parts: int = 1
    ) -> None:  # fmt: skip
        self.f, self.layer, self.tile, self.x, self.part, self.own, self.residual = (
            f,
            layer,
            tile,
            x,
            part,
            own,
            residual,
        )
        self.inputs, self.steps, self.parts = inputs, layer.k // inputs, parts
        self.step_bytes = inputs * layer.number_bytes  # of a row of x
        self.chunks = self.step_bytes // 16 // parts  # in a row of x of a part
        self.stages = _STAGES - 1 if parts > 1 else _STAGES
        self.row_bytes = inputs * 16 // layer.codes_per_chunk  # of W, per step
        self.stage_bytes = self.tile.rows * self.step_bytes + self.tile.outputs * self.row_bytes
        self.held = f.shared(self.stages * self.stage_bytes, 1024)

    def stage(self, step: Val) -> tuple[Val, Val]:
        """Where a step's rows and weights are in shared memory."""
        rows = self.f.at(self.held, step % self.stages * self.stage_bytes, "i8")
        return rows, self.f.at(rows, self.tile.rows * self.step_bytes, "i8")

    def part_of_rows(self, rows: Val, number: int) -> Val:
        """Where a part of a step's rows begins, one part lying behind the other."""
        return self.f.at(rows, number * self.tile.rows * self.chunks * 16, "i8")

    def code_place(self, row: Val, piece: Val | int) -> Val:
        """Where a piece of 16 bytes of a row of codes lies: of two, rows that lie in the same banks have them the other way round."""
        own = self.f.i64(piece)
        if self.row_bytes == 32 and self.parts > 1:
            own = self.f.op(f"xor i64 {own.name}, {((row >> 2) & 1).name}", "i64")
        return row * self.row_bytes + own * 16

    def fetch(self, step: Val) -> None:
        """Begin to copy a step's inputs."""
        f, part, (rows, weights) = self.f, self.part, self.stage(step)

        def row_of_w(r: Val) -> Val:
            row = f.minimum(part.first + r, part.rows - 1)
            return f.at(row_address(f, self.layer, part, row), step * self.row_bytes, "i8")

        for which in range(self.parts):

            def row_of_x(r: Val, within: int = which * 16 * self.chunks) -> Val:
                return f.at(self.x, self.own.source(r) * self.layer.x_bytes + step * self.step_bytes + within, "i8")

            f.copy_tile(self.part_of_rows(rows, which), self.tile.rows, self.chunks, row_of_x)
        if not self.layer.decodes:
            f.copy_tile(weights, self.tile.outputs, self.chunks, row_of_w)
            return
        per_row = self.row_bytes // 16
        for begin in range(0, self.tile.outputs * per_row, f.threads):
            number = f.thread() + begin

            def copy(number: Val = number) -> None:
                source = f.at(row_of_w(number / per_row), number % per_row * 16, "i8")
                f.copy16(f.at(weights, self.code_place(number / per_row, number % per_row), "i8"), source)

            f.when(number < self.tile.outputs * per_row, copy)

    def begin(self) -> None:
        """Copies of the first steps are under way."""
        for s in range(self.stages - 1):
            if s < self.steps:
                self.fetch(self.f.i64(s))
            self.f.commit_copies()

    def fetch_ahead(self, step: Val) -> None:
        """Begin to copy what is needed `stages` - 1 steps later, into the stage that was read last."""
        later = step + (self.stages - 1)
        self.f.when(later < self.steps, lambda: self.fetch(later))
        self.f.commit_copies()

    def arrived(self, step: Val) -> tuple[Val, Val]:
        """A step's rows and weights, which have come; the stage that was read before is filled again."""
        self.f.copies_done(self.stages - 2)
        self.f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        self.fetch_ahead(step)
        return self.stage(step)

    def store(self, row: Val, column: Val, sums: Sequence[Val]) -> None:
        """Four sums of a thread as `mma` leaves them: two neighbouring columns of a row of the tile, and of the eighth row below."""
        f, part, layer = self.f, self.part, self.layer
        for half in (0, 1):
            at_row, first = self.own.place(row + 8 * half), part.first + column
            pair = list(sums[2 * half : 2 * half + 2])
            results = [(first / 2, pair)] if layer.gated else [(first + i, [value]) for i, value in enumerate(pair)]
            for at_column, own in results:

                def put(at_row: Val = at_row, at_column: Val = at_column, own: list[Val] = own) -> None:
                    value = finished(f, layer, part, at_row, at_column, own, self.residual)
                    value = self.own.weighed(value, at_row)
                    f.store_f32(value, part.y, at_row * part.n + at_column, layer.dtype)

                inside = f.op(f"and i1 {self.own.there(at_row).name}, {(at_column < part.n).name}", "i1")
                f.when(inside, put)


def product(layer: Layer, tile: Tile, target: Target) -> DeviceKernel:
    """The layer on tensor cores. Parameters: `Layer.parameters`. Raises TargetError for a layer that it can't read."""
    require_product(layer)
    return in_tiles(layer, tile, target, multiply_product)


def in_tiles(layer: Layer, tile: Tile, target: Target, work: Callable[..., None]) -> DeviceKernel:
    """A kernel of `Layer.parameters` whose blocks have a tile each: grid (tiles of rows, `Layer.tiles(tile.outputs)`). work(f, layer, tile, x, part,
    own rows, residual or None): what a thread of it does."""
    f = Device(f"product{tile.rows}_{layer.name}", layer.parameters, target, tile.threads)
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=True)}
    residual = f.memory(given["r"]) if layer.residual else None
    own = Rows(f, f.block() * tile.rows, given["m"])
    part = part_of(f, layer, f.block("y"), tile.outputs)
    work(f, layer, tile, f.memory(given["x"]), part, own, residual)
    return f.built()


def require_product(layer: Layer) -> None:
    """Raise TargetError unless `multiply_product` reads the layer."""
    layer.require()
    if layer.k % _PART or (layer.group and layer.group % EIGHT):
        raise TargetError(f"{layer.name}: inputs are no multiple of {_PART}, or groups none of {EIGHT}")


def multiply_product(
    f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows, residual: Val | None = None
) -> None:
    """What a thread of `product` does: up to a tile's rows of x times its rows of W."""
    # Of codes of 4 bits 64 make whole sectors of 32 bytes.
    wide = 64 if layer.codes_per_chunk == 32 and layer.k % 64 == 0 else _PART
    p = Tiled(f, layer, tile, wide, x, part, own, residual, wide // _PART if layer.scheme else 1)
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    tiles_m, tiles_n = tile.of_warp[0] // 16, tile.of_warp[1] // 8
    warp_row, warp_column = warp / tile.warps[1] * tile.of_warp[0], warp % tile.warps[1] * tile.of_warp[1]
    read = _coded(p, lane, warp_row, warp_column) if layer.scheme else _plain(p, lane, warp_row, warp_column)
    p.begin()

    def multiply(step: Val, sums: list[Val]) -> list[Val]:
        halves = read(step)
        result = list(sums)
        for left, right in halves():
            for i in range(tiles_m):
                for j in range(tiles_n):
                    at = 4 * (i * tiles_n + j)
                    result[at : at + 4] = f.mma(left[i], right[j], result[at : at + 4], layer.dtype)
        return result

    *sums, _ = f.loop(0, p.steps, 1, [f.const(0.0, "float")] * (4 * tiles_m * tiles_n), multiply)
    for i in range(tiles_m):
        for j in range(tiles_n):
            at = 4 * (i * tiles_n + j)
            p.store(warp_row + 16 * i + lane / 4, warp_column + 8 * j + lane % 4 * 2, sums[at : at + 4])


_Halves = Callable[[], Iterator[tuple[list[list[Val]], list[list[Val]]]]]


def _plain(p: Tiled, lane: Val, warp_row: Val, warp_column: Val) -> Callable[[Val], _Halves]:
    """Both operands of the two products of a step, from tiles of floats."""
    f, matrix, line = p.f, lane / 8, lane % 8

    def read(step: Val) -> _Halves:
        rows, weights = p.arrived(step)

        def halves() -> Iterator[tuple[list[list[Val]], list[list[Val]]]]:
            for half in range(p.inputs // 16):
                left = []
                for i in range(p.tile.of_warp[0] // 16):
                    row, chunk = warp_row + 16 * i + (line + (matrix & 1) * 8), (matrix >> 1) + 2 * half
                    left.append(f.fragments(f.at(rows, f.place(row, chunk, p.chunks), "i8")))
                right: list[list[Val]] = []
                for j in range(0, p.tile.of_warp[1] // 8, 2):
                    row, chunk = warp_column + 8 * j + (line + (matrix >> 1) * 8), (matrix & 1) + 2 * half
                    four = f.fragments(f.at(weights, f.place(row, chunk, p.chunks), "i8"))
                    right += [four[:2], four[2:]]
                yield left, right

        return halves

    return read


def _coded(p: Tiled, lane: Val, warp_row: Val, warp_column: Val) -> Callable[[Val], _Halves]:
    """The same from a tile of codes: four threads share a row's inputs, eight neighbouring ones each, in whatever order `decoded` gives."""
    f, layer, line, place = p.f, p.layer, lane / 4, lane % 4
    slice_bytes = 8 // SCHEMES[layer.scheme].per_byte  # of eight codes
    outputs = [warp_column + 8 * j + line for j in range(p.tile.of_warp[1] // 8)]

    apart = p.parts if layer.group and layer.group % p.inputs else 1  # parts that may have other scales

    def read(step: Val) -> _Halves:
        # Scales come from the GPU's memory: they are asked for before the wait.
        scales = [
            [
                scale_and_zero(
                    f, layer, p.part, f.minimum(p.part.first + output, p.part.rows - 1),
                    step * p.inputs + place * EIGHT + number * _PART,
                )
                for output in outputs
            ]
            for number in range(apart)
        ]  # fmt: skip
        rows, weights = p.arrived(step)

        def halves() -> Iterator[tuple[list[list[Val]], list[list[Val]]]]:
            for number in range(p.parts):
                left, right = [], []
                for i in range(p.tile.of_warp[0] // 16):
                    both = []
                    for half in (0, 1):
                        own = f.place(warp_row + 16 * i + line + 8 * half, place, p.chunks)
                        at = f.at(p.part_of_rows(rows, number), own, "i8")
                        both.append(inputs(f, layer, f.words(f.load_shared16(at))))
                    left.append(both)
                for output, (scale, zero) in zip(outputs, scales[number % apart], strict=True):
                    at = f.at(weights, p.code_place(output, number) + place * slice_bytes, "i8")
                    words = [f.load("i32", f.at(at, 4 * i, "i8")) for i in range(slice_bytes // 4)]
                    right.append(decoded(f, layer, p.part, words, [(scale, zero)] * len(words)))
                for half in (0, 2):
                    yield (
                        [[low[half], high[half], low[half + 1], high[half + 1]] for low, high in left],
                        [pairs[half : half + 2] for pairs in right],
                    )

        return halves

    return read
