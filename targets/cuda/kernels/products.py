"""Linear layers of many rows on NVIDIA GPUs: tiles on tensor cores, inputs copied while earlier ones are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import GROUP, WARP, Device, DeviceKernel
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
"""Where there are rows enough for blocks on all multiprocessors, and where there aren't. Warp groups of Hopper multiply large ones."""


class _Product:
    """A layer in tiles under construction, `inputs` of k per step."""

    def __init__(
        self, f: Device, layer: Layer, tile: Tile, inputs: int, x: Val, part: Part, own: Rows, residual: Val | None
    ) -> None:
        self.f, self.layer, self.tile, self.x, self.part, self.own, self.residual = (
            f,
            layer,
            tile,
            x,
            part,
            own,
            residual,
        )
        self.k, self.inputs, self.steps = layer.k, inputs, layer.k // inputs
        self.parts = inputs // _PART if layer.scheme else 1
        self.chunks = inputs // EIGHT // self.parts  # in a row of x of a part
        self.stages = _STAGES - 1 if self.parts > 1 else _STAGES
        self.row_bytes = inputs * 16 // layer.codes_per_chunk  # of W, per step
        self.stage_bytes = self.tile.rows * inputs * 2 + self.tile.outputs * self.row_bytes
        self.held = f.shared(self.stages * self.stage_bytes, 1024)

    def stage(self, step: Val) -> tuple[Val, Val]:
        """Where a step's rows and weights are in shared memory."""
        rows = self.f.at(self.held, step % self.stages * self.stage_bytes, "i8")
        return rows, self.f.at(rows, self.tile.rows * self.inputs * 2, "i8")

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
        first = step * self.inputs

        def row_of_w(r: Val) -> Val:
            row = f.minimum(part.first + r, part.rows - 1)
            return f.at(row_address(f, self.layer, part, row), step * self.row_bytes, "i8")

        for which in range(self.parts):

            def row_of_x(r: Val, inputs: int = which * _PART) -> Val:
                return f.at(self.x, self.own.source(r) * self.k + first + inputs, self.layer.dtype)

            f.copy_tile(self.part_of_rows(rows, which), self.tile.rows, self.chunks, row_of_x)
        if not self.layer.scheme:
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

    def store(self, row: Val, column: Val, sums: Sequence[Val]) -> None:
        """Four sums of a thread as `mma` and `wgmma` leave them: two neighbouring columns of a row of the tile, and of the eighth row below."""
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
    require_product(layer, target)
    return _of_layer("product" if tile is LARGE else "product_small", layer, tile, target, multiply_product)


def _of_layer(name: str, layer: Layer, tile: Tile, target: Target, multiply: Callable[..., None]) -> DeviceKernel:
    f = Device(f"{name}_{layer.name}", layer.parameters, target, tile.threads)
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=True)}
    residual = f.memory(given["r"]) if layer.residual else None
    own = Rows(f, f.block() * tile.rows, given["m"])
    multiply(f, layer, tile, f.memory(given["x"]), part_of(f, layer, f.block("y"), tile.outputs), own, residual)
    return f.built()


def require_product(layer: Layer, target: Target, inputs: int = 32) -> None:
    """Raise TargetError unless `multiply_product` reads the layer."""
    layer.require()
    if layer.k % inputs or (layer.group and layer.group % EIGHT):
        raise TargetError(f"{layer.name}: inputs are no multiple of {inputs}, or groups none of {EIGHT}")


def multiply_product(
    f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows, residual: Val | None = None
) -> None:
    """What a thread of `product` does: up to a tile's rows of x times its rows of W."""
    # Of codes of 4 bits 64 make whole sectors of 32 bytes.
    wide = layer.codes_per_chunk == 32 and layer.k % 64 == 0
    p, thread = _Product(f, layer, tile, 64 if wide else 32, x, part, own, residual), f.thread()
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


def _arrived(p: _Product, step: Val) -> tuple[Val, Val]:
    """A step's rows and weights, which have come; the stage that was read before is filled again."""
    p.f.copies_done(p.stages - 2)
    p.f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
    p.fetch_ahead(step)
    return p.stage(step)


def _plain(p: _Product, lane: Val, warp_row: Val, warp_column: Val) -> Callable[[Val], _Halves]:
    """Both operands of the two products of a step, from tiles of floats."""
    f, matrix, line = p.f, lane / 8, lane % 8

    def read(step: Val) -> _Halves:
        rows, weights = _arrived(p, step)

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


def _coded(p: _Product, lane: Val, warp_row: Val, warp_column: Val) -> Callable[[Val], _Halves]:
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
        rows, weights = _arrived(p, step)

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


def product_hopper(layer: Layer, target: Target) -> DeviceKernel:
    """`product` for sm_90a: two warp groups multiply tiles of 64 rows by 128 rows of W straight from shared memory.

    Raises TargetError unless k is a multiple of 64, W is no matrix of codes and the target is sm_90a.
    """
    require_hopper(layer, target)
    return _of_layer("product_hopper", layer, LARGE, target, multiply_hopper)


def require_hopper(layer: Layer, target: Target) -> None:
    """Raise TargetError unless `multiply_hopper` reads the layer."""
    if target.mcpu != "sm_90a" or layer.scheme:
        raise TargetError(f"warp groups multiply floats on sm_90a, not {layer.scheme or layer.dtype} on {target.mcpu}")
    require_product(layer, target, 64)


def multiply_hopper(
    f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows, residual: Val | None = None
) -> None:
    """What a thread of `product_hopper` does, as `multiply_product`."""
    p, thread = _Product(f, layer, tile, 64, x, part, own, residual), f.thread()
    group = thread / GROUP
    p.begin()

    def multiply(step: Val, sums: list[Val]) -> list[Val]:
        f.copies_done(_STAGES - 2)
        f.begin_products()
        f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        rows, weights = p.stage(step)
        a, b = f.tile_address(f.at(rows, group * (64 * p.inputs * 2), "i8")), f.tile_address(weights)
        result = list(sums)
        for part in range(p.inputs // 16):
            result = f.multiply_group(a + 2 * part, b + 2 * part, result, tile.outputs, layer.dtype)
        f.commit_products()
        p.fetch_ahead(step)
        f.products_done(0)
        return result

    *sums, _ = f.loop(0, p.steps, 1, [f.const(0.0, "float")] * (tile.outputs // 2), multiply)
    lane, warp = thread % WARP, thread % GROUP / WARP
    for j in range(tile.outputs // 8):
        p.store(group * 64 + warp * 16 + lane / 4, 8 * j + lane % 4 * 2, sums[4 * j : 4 * j + 4])
