"""Layers that read rounded inputs (`jisu.compiler.levels`) on NVIDIA GPUs: levels times codes, of 8 bits both, on tensor cores.

They do twice as many products per second as of 16-bit numbers, and sums of integers are exact. Sums are scaled where a group of weights
ends: by the weights' scale, and by the row's (or the group's own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.levels import record_bytes, scale_offset, sum_offset
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda import STEP, levels
from jisu.targets.cuda.device import GROUP, PAIRS, WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels import hopper, thin
from jisu.targets.cuda.kernels.layers import Layer, Part, Rows
from jisu.targets.cuda.kernels.products import Tile, Tiled, in_tiles
from jisu.targets.cuda.kernels.tails import Tail
from jisu.targets.target import Target


@attrs.frozen
class Levels(Layer):
    """A layer whose x are records of levels of the scheme `levels`, with a scale per row, or if `own` one per group. `dtype` is that of results."""

    levels: str = "int8"
    own: bool = False

    dtypes: ClassVar[Sequence[str]] = FLOATS

    @property
    def integers(self) -> bool:
        """Whether levels and codes are such, or small floats."""
        return SCHEMES[self.scheme].uniform

    @property
    def decodes(self) -> bool:
        """Codes of 4 bits become bytes."""
        return SCHEMES[self.scheme].per_byte > 1

    @property
    def number_bytes(self) -> int:
        """Of a level."""
        return 1

    @property
    def x_bytes(self) -> int:
        """From a record to the next."""
        return record_bytes(self.k, self.group, self.own)

    @property
    def operand(self) -> str:
        """What tensor cores multiply."""
        return "int8" if self.integers else "fp8"

    @property
    def name(self) -> str:
        """What distinguishes its kernels."""
        return f"{self.levels}{'_own' if self.own else ''}_{super().name}"

    def require(self) -> None:
        """Raise TargetError unless kernels can read it: four threads that share a row's inputs come to the end of a group together."""
        super().require()
        if self.k % STEP or self.group % (4 * self.codes_per_chunk):
            raise TargetError(f"{self.name}: inputs or groups are no multiple of {4 * self.codes_per_chunk}")


def require_levels(layer: Levels, target: Target) -> None:
    """Raise TargetError unless the target's tensor cores multiply the layer's levels."""
    layer.require()
    if not levels(target)(SCHEMES[layer.levels], SCHEMES[layer.scheme], layer.k, layer.group):
        raise TargetError(f"{layer.name}: {target.mcpu} multiplies no {layer.levels} by {layer.scheme}")


def words_of_levels(layer: Levels, word: Val) -> list[Val]:
    """Four bytes of codes as words of four levels each, in the order of the inputs; each `factor` times what it means."""
    kind = SCHEMES[layer.scheme]
    if not kind.uniform:
        return [word]
    if kind.per_byte == 1:
        # The grid's middle becomes 0: bytes never carry, and the highest bit is the sign.
        shifted = word if kind.bits == 8 else word + _every(128 - int(kind.middle), 8)
        return [shifted ^ _every(128, 8)]
    shifted = word if kind.bits == 4 else word + _every(8 - int(kind.middle), 4)
    signed = shifted ^ _every(8, 4)
    return [(signed << 4) & _every(0xF0, 8), signed & _every(0xF0, 8)]


def _every(number: int, bits: int) -> int:
    """A number of so many bits in every such part of an i32."""
    word = sum(number << at for at in range(0, 32, bits))
    return word - (1 << 32) if word >= 1 << 31 else word


def factor(layer: Levels) -> float:
    """How often a level is in what `words_of_levels` gives."""
    return 16.0 if SCHEMES[layer.scheme].per_byte == 2 else 1.0


@attrs.frozen(eq=False)
class Scaling:
    """What a group's sums are scaled by."""

    f: Device
    layer: Levels
    part: Part
    x: Val

    def of_weights(self, row: Val, group: Val) -> Val:
        """A group's scale of a row of W, float32."""
        assert self.part.s is not None
        return self.f.load_f32(self.part.s, row * self.layer.groups + group, self.layer.scales, lanes=1) / factor(
            self.layer
        )

    def of_levels(self, row: Val, group: Val | None = None) -> Val:
        """The scale of a row of x, or of its group, float32."""
        begin = self.f.at(self.x, row * self.layer.x_bytes + scale_offset(self.layer.k), "i8")
        return self.f.load("float", begin if group is None else self.f.at(begin, group, "float32"))

    def sum_of_levels(self, row: Val, group: Val) -> Val:
        """The sum of a group's levels, i32."""
        k, how = self.layer.k, (self.layer.group, self.layer.own)
        return self.f.load(
            "i32", self.f.at(self.f.at(self.x, row * self.layer.x_bytes + sum_offset(k, *how), "i8"), group, "float32")
        )

    def zero_of(self, row: Val, group: Val | None = None) -> Val:
        """The code that stands for 0 in a row of W, or its group, i32."""
        if self.part.z is None:
            return self.f.const(int(SCHEMES[self.layer.scheme].middle), "i32")
        at = row if group is None else row * self.layer.groups + group
        return self.f.cast("zext", self.f.load("i8", self.f.at(self.part.z, at, "uint8")), "i32")

    def shift(self, row: Val, group: Val) -> Val:
        """What a group's zero is below the grid's middle, as often as levels are in sums, i32."""
        middle = int(SCHEMES[self.layer.scheme].middle)
        return (self.zero_of(row, group) * -1 + middle) * int(factor(self.layer))

    def number(self, sum_: Val) -> Val:
        """A sum as float32."""
        return self.f.cast("sitofp", sum_, "float") if self.layer.integers else sum_

    def zero(self) -> Val:
        """The empty sum."""
        return self.f.const(0, "i32") if self.layer.integers else self.f.const(0.0, "float")


# --- Few rows --------------------------------------------------------------------------------------------------------------


def few(layer: Levels, rows: int, target: Target, then: Tail | None = None) -> DeviceKernel:
    """As `thin.thin`. Raises TargetError for a layer that it can't read."""
    require_levels(layer, target)
    return thin.of_rows(layer, rows, target, _Few, then)


class _Few(thin.Thin):
    """As there, but sums are those of levels, scaled where a group ends: every chunk of four threads is in one."""

    layer: Levels

    def __init__(self, f: Device, layer: Levels, rows: int, x: Val, part: Part, own: Rows, tiles: int) -> None:
        super().__init__(f, layer, rows, x, part, own, tiles)
        self.scaling = Scaling(f, layer, part, x)

    def sums(self) -> list[Val]:
        """Without groups sums of integers go on to the end."""
        if self.layer.group:
            return super().sums()
        return [self.scaling.number(s) for s in self.along([self.scaling.zero()] * (4 * self.columns * self.tiles))]

    def multiply(self, number: Val, words: list[list[Val]], sums: list[Val], inside: Val | None) -> list[Val]:
        """Add the products of a chunk; what isn't `inside` counts as zeros."""
        f, layer, scaling = self.f, self.layer, self.scaling
        weights = [[level for w in own for level in words_of_levels(layer, w)] for own in words]
        if inside is not None:
            weights = [[f.select(inside, w, 0) for w in own] for own in weights]
        result = list(sums)
        group = number * self.chunk / layer.group if layer.group else f.i64(0)
        steps = [scaling.of_weights(row, group) for row in self.places] if layer.group else []
        for c, row in enumerate(self.lines):
            inputs: list[Val] = []
            for piece in range(0, self.chunk, 16):
                place = row * layer.x_bytes + number * self.chunk + piece
                inputs += f.words(f.load16("<4 x i32>", f.at(self.x, place, "i8")))
            rows = [self.own.source(self.place * 2 + (side + 8 * c)) for side in (0, 1)] if layer.own else []
            levels_of = [scaling.of_levels(r, group) for r in rows]
            for tile in range(self.tiles):
                low, high = weights[2 * tile : 2 * tile + 2]
                at = 4 * (c * self.tiles + tile)
                mine = result[at : at + 4]
                found = [scaling.zero()] * 4 if layer.group else mine
                for i in range(0, len(inputs), 2):
                    found = f.mma_bytes([low[i], high[i], low[i + 1], high[i + 1]], inputs[i : i + 2], found)
                if layer.group:
                    found = [scaling.number(s) * steps[2 * tile + i // 2] for i, s in enumerate(found)]
                    if layer.own:
                        found = [s * levels_of[i % 2] for i, s in enumerate(found)]
                    found = [a + b for a, b in zip(mine, found, strict=True)]
                result[at : at + 4] = found
        return result

    def total(self, output: Val, row: Val) -> Val:
        """The sum of all warps, scaled by what belongs to whole rows, with what zeros add."""
        f, layer, scaling = self.f, self.layer, self.scaling
        value, source = super().total(output, row), self.own.source(row)
        place = f.minimum(self.part.first + output, self.part.rows - 1)
        if not layer.group:
            value = value * scaling.of_weights(place, f.i64(0))

        def more(group: Val, carried: list[Val]) -> list[Val]:
            added = scaling.number(scaling.shift(place, group) * scaling.sum_of_levels(source, group))
            added = added * scaling.of_weights(place, group)
            return [carried[0] + (added * scaling.of_levels(source, group) if layer.own else added)]

        if layer.zeros:
            value, _ = f.loop(0, layer.groups, 1, [value], more)
        return value if layer.own else value * scaling.of_levels(source)


# --- Many rows -------------------------------------------------------------------------------------------------------------


def many(layer: Levels, tile: Tile, target: Target) -> DeviceKernel:
    """As `products.product`. Raises TargetError for a layer that it can't read."""
    require_levels(layer, target)
    return in_tiles(layer, tile, target, lambda *given: _Many(*given).run())


class _Many(Tiled):
    """The kernel under construction: `mma` sums a group's products, and then they are scaled and added."""

    layer: Levels

    def __init__(
        self, f: Device, layer: Levels, tile: Tile, x: Val, part: Part, own: Rows, residual: Val | None
    ) -> None:
        super().__init__(f, layer, tile, STEP, x, part, own, residual)
        self.scaling = Scaling(f, layer, part, x)
        thread = f.thread()
        lane, warp = thread % WARP, thread / WARP
        self.line, self.place, self.matrix = lane / 4, lane % 4, lane / 8
        self.row = warp / tile.warps[1] * tile.of_warp[0]
        self.column = warp % tile.warps[1] * tile.of_warp[1]
        self.tiles = tile.of_warp[0] // 16, tile.of_warp[1] // 8

    def run(self) -> None:
        """Everything that a thread does."""
        f, layer, scaling, (tiles_m, tiles_n) = self.f, self.layer, self.scaling, self.tiles
        count = 4 * tiles_m * tiles_n
        per_group = layer.group // STEP if layer.group else self.steps
        rows = [self.own.source(self.row + 16 * i + self.line + 8 * half) for i in range(tiles_m) for half in (0, 1)]
        outputs = [
            f.minimum(self.part.first + self.column + 8 * j + self.place * 2 + side, self.part.rows - 1)
            for j in range(tiles_n)
            for side in (0, 1)
        ]
        self.begin()

        def of_group(group: Val, totals: list[Val]) -> list[Val]:
            # What sums are scaled by comes from the GPU's memory: it is asked for before they are made.
            steps = [scaling.of_weights(output, group) for output in outputs]
            levels = [scaling.of_levels(row, group) for row in rows] if layer.own else []
            shifts = [scaling.shift(output, group) for output in outputs] if layer.zeros else []
            added = [scaling.sum_of_levels(row, group) for row in rows] if layer.zeros else []
            first = group * per_group
            *sums, _ = f.loop(first, first + per_group, 1, [scaling.zero()] * count, self.multiply)
            result = list(totals)
            for i in range(tiles_m):
                for j in range(tiles_n):
                    for part in range(4):
                        at, row, output = 4 * (i * tiles_n + j) + part, 2 * i + part // 2, 2 * j + part % 2
                        whole_sum = sums[at] + added[row] * shifts[output] if layer.zeros else sums[at]
                        scaled = scaling.number(whole_sum) * steps[output]
                        result[at] = result[at] + (scaled * levels[row] if layer.own else scaled)
            return result

        *totals, _ = f.loop(0, layer.groups, 1, [f.const(0.0, "float")] * count, of_group)
        whole = [] if layer.own else [scaling.of_levels(row) for row in rows]
        for i in range(tiles_m):
            for j in range(tiles_n):
                at = 4 * (i * tiles_n + j)
                for part in range(0 if layer.own else 4):
                    totals[at + part] = totals[at + part] * whole[2 * i + part // 2]
                self.store(self.row + 16 * i + self.line, self.column + 8 * j + self.place * 2, totals[at : at + 4])

    def multiply(self, step: Val, sums: list[Val]) -> list[Val]:
        """A step's products."""
        rows, weights = self.arrived(step)
        result = list(sums)
        for half in (0, 1):  # of 32 inputs
            left, right = (self.coded if self.layer.decodes else self.plain)(rows, weights, half)
            for i, a in enumerate(left):
                for j, b in enumerate(right):
                    at = 4 * (i * self.tiles[1] + j)
                    result[at : at + 4] = self.f.mma_bytes(a, b, result[at : at + 4])
        return result

    def plain(self, rows: Val, weights: Val, half: int) -> tuple[list[list[Val]], list[list[Val]]]:
        """Both operands from tiles of bytes: four threads have a row's 16 bytes, as `mma` wants them."""
        f, matrix, line = self.f, self.matrix, self.f.thread() % 8
        left = []
        for i in range(self.tiles[0]):
            row, chunk = self.row + 16 * i + (line + (matrix & 1) * 8), (matrix >> 1) + 2 * half
            left.append(f.fragments(f.at(rows, f.place(row, chunk, self.chunks), "i8")))
        right: list[list[Val]] = []
        for j in range(0, self.tiles[1], 2):
            row, chunk = self.column + 8 * j + (line + (matrix >> 1) * 8), (matrix & 1) + 2 * half
            four = f.fragments(f.at(weights, f.place(row, chunk, self.chunks), "i8"))
            levels = [word for w in four for word in words_of_levels(self.layer, w)]
            right += [levels[:2], levels[2:]]
        return left, right

    def coded(self, rows: Val, weights: Val, half: int) -> tuple[list[list[Val]], list[list[Val]]]:
        """The same with two codes in a byte: four threads share 32 inputs of a row, each of them eight neighbouring ones."""
        f, left, right = self.f, [], []
        within = half * 2 + self.place / 2
        for i in range(self.tiles[0]):
            both = []
            for lower in (0, 1):
                chunk = f.place(self.row + 16 * i + self.line + 8 * lower, within, self.chunks)
                at = f.at(rows, chunk + self.place % 2 * 8, "i8")
                both.append([f.load("i32", f.at(at, 4 * n, "i8")) for n in (0, 1)])
            left.append([both[0][0], both[1][0], both[0][1], both[1][1]])
        for j in range(self.tiles[1]):
            at = (self.column + 8 * j + self.line) * self.row_bytes + (self.place * 4 + 16 * half)
            right.append(words_of_levels(self.layer, f.load("i32", f.at(weights, at, "i8"))))
        return left, right


# --- Many rows on Hopper -----------------------------------------------------------------------------------------------------


def many_hopper(layer: Levels, tile: hopper.Tile, target: Target) -> DeviceKernel:
    """As `hopper.product_hopper`: records and codes of a byte are multiplied as they lie. Parameters: those, and the records' address.

    Raises TargetError unless rows of W have one scale, k is a multiple of 128, results have 16 bits, the tile is the layer's and the target is sm_90a.
    """
    require_levels(layer, target)
    if tile not in hopper.tiles_of(layer):
        raise TargetError(f"{layer.name}: there are no registers for sums of {tile.rows} by {tile.outputs}")
    if target.mcpu != "sm_90a" or layer.dtype not in PAIRS or layer.decodes or layer.group:
        raise TargetError(f"{layer.name}: no product of warp groups on {target.mcpu}")
    if layer.k % hopper.inputs_of(layer):
        raise TargetError(f"{layer.name}: inputs are no multiple of {hopper.inputs_of(layer)}")

    def scaled(f: Device, given: dict[str, Val]) -> hopper.Scaled:
        x = f.memory(given["records"])

        def scale(piece: hopper.Piece, group: Val, sum_of: Callable[[int], Val]) -> Callable[[int], Val]:
            scaling, thread = Scaling(f, layer, piece.part, x), f.thread() % GROUP
            lane, none = thread % WARP, f.i64(0)
            line = group * 64 + thread / WARP * 16 + lane / 4
            rows = [piece.rows.source(line + 8 * half) for half in (0, 1)]
            steps = [scaling.of_levels(row) for row in rows]
            totals = [scaling.sum_of_levels(row, none) for row in rows] if layer.integers else []

            def one(number: int) -> Val:
                column, half = lane % 4 * 2 + (number // 4 * 8 + number % 2), number // 2 % 2
                output, own = f.minimum(piece.part.first + column, piece.part.rows - 1), sum_of(number)
                if layer.integers:  # codes stand for what they are above their zero
                    own = own - scaling.zero_of(output) * totals[half]
                return scaling.number(own) * scaling.of_weights(output, none) * steps[half]

            return one

        return scale

    return hopper.of_layer(layer, tile, target, [("ptr", "records")], scaled)
