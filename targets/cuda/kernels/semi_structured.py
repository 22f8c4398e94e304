"""Linear layers whose weights keep two of each four inputs (2:4), on sparse tensor cores.

Weights are `mma.sp`'s sparse operand (y^T = W x^T): half as many bytes and products as of dense ones. In what order inputs are multiplied follows
from the weights' 16-byte pieces: of a row, thread t of four has piece t, and so the fours of inputs that it stands for; of x it needs
the first halves (t even) or the second ones of the fours of threads t / 2 and t / 2 + 2. See `jisu.compiler.ops.semi_structured`.
"""

from __future__ import annotations

import functools

from jisu.compiler.errors import TargetError
from jisu.compiler.ops.semi_structured import INPUTS, ROWS
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import (
    Layer,
    Part,
    Rows,
    decoded,
    finished,
    in_rows,
    multiplied,
    row_address,
    scales_of,
)
from jisu.targets.cuda.kernels.products import Tile, in_tiles
from jisu.targets.cuda.kernels.thin import OUTPUTS, WARPS, Thin
from jisu.targets.target import Target

THIN_ROWS = (8, 16)
"""Rows of x that thin kernels are made for: up to so many."""
_AHEAD = 4  # steps of a thin kernel that are under way
_PIECES = 2 * 16 * WARPS * WARP  # bytes of weights of a thin kernel's step
LARGE, SMALL, CODED = Tile(128, 128, (4, 2)), Tile(64, 64, (4, 2)), Tile(64, 128, (2, 4))
"""Tiles of `product_halves`, as those of `products`; of codes, whose steps have more inputs, the large ones are `CODED`."""
_PLACES = ROWS * INPUTS // 8  # bytes of places of 16 rows and 256 inputs


def require(layer: Layer) -> None:
    """Raise TargetError unless kernels can read the layer: in steps of four pieces of a row."""
    layer.require()
    step = 4 * layer.codes_per_chunk
    if not layer.halves or layer.k % step:
        raise TargetError(f"{layer.name}: {layer.k} inputs are no multiple of {step}")


def thin_halves(layer: Layer, rows: int, target: Target) -> DeviceKernel:
    """As `thin.thin`, `rows` one of `THIN_ROWS`. A warp does 256 inputs at a time, of which it has all places by one load.

    Raises TargetError for a layer that it can't read.
    """
    require(layer)
    return in_rows(layer, rows, OUTPUTS, WARPS * WARP, target, functools.partial(multiplied, _ThinHalves))


class _ThinHalves(Thin):
    """The kernel under construction: units of 256 inputs, each of some steps of four pieces a row."""

    def __init__(self, f: Device, layer: Layer, rows: int, x: Val, part: Part, own: Rows) -> None:
        self.fours = layer.codes_per_chunk // 4
        self.per_unit = INPUTS // (4 * layer.codes_per_chunk)  # steps
        self.steps, self.units = layer.k // (4 * layer.codes_per_chunk), -(-layer.k // INPUTS)
        self.slots = _AHEAD // self.per_unit  # units under way
        self.unit_bytes = self.per_unit * _PIECES + 16 * f.threads
        super().__init__(f, layer, rows, x, part, own)

    def stage_bytes(self) -> int:
        return self.slots * self.unit_bytes

    def sums(self) -> list[Val]:
        f = self.f
        sums = [f.const(0.0, "float")] * (4 * self.columns)
        for early in range(self.slots):
            for step in range(self.per_unit):
                self.begin_step(self.warp + early * WARPS, step, early)
        *sums, _, _ = f.loop(self.warp, self.units, WARPS, [*sums, f.i64(0)], self.unit)
        f.barrier()  # shared memory is used anew
        return sums

    def begin_step(self, unit: Val, step: int, slot: Val | int) -> None:
        """Begin to copy this thread's pieces of a step, and with the first of a unit its places; nothing behind the last unit."""
        f = self.f
        held = self.at_slot(slot)

        def fetch() -> None:
            for half in (0, 1):
                to = f.at(held, self.thread * 16 + (step * 2 + half) * (_PIECES // 2), "i8")
                f.copy16(to, self.source(self.inside(unit, step)[0] * 4 + self.place, half))
            if step == 0:
                assert self.part.p is not None
                tile = self.part.first / ROWS * self.units + unit
                source = f.at(self.part.p, tile * _PLACES + self.thread % WARP * 16, "i8")
                f.copy16(self.places_at(held), source)

        f.when(unit < self.units, fetch)
        f.commit_copies()

    def at_slot(self, slot: Val | int) -> Val:
        return self.f.at(self.held, self.f.i64(slot) * self.unit_bytes, "i8")

    def places_at(self, held: Val) -> Val:
        """Where this thread's places are in a slot."""
        return self.f.at(held, self.thread * 16 + self.per_unit * _PIECES, "i8")

    def inside(self, unit: Val, step: int) -> tuple[Val, Val | None]:
        """The number of a unit's step, and whether there is one, if that isn't sure."""
        number = unit * self.per_unit + step
        if self.steps % self.per_unit == 0:
            return number, None
        return self.f.minimum(number, self.steps - 1), number < self.steps

    def unit(self, unit: Val, carried: list[Val]) -> list[Val]:
        """A unit's products, while later ones are under way."""
        f, *sums, turn = self.f, *carried
        slot: Val | int = turn % self.slots if self.slots > 1 else 0
        held = self.at_slot(slot)
        places: list[Val] = []
        for step in range(self.per_unit):
            f.copies_done(_AHEAD - 1)
            at = [f.at(held, self.thread * 16 + (step * 2 + half) * (_PIECES // 2), "i8") for half in (0, 1)]
            words = [f.words(f.load_shared16(a)) for a in at]
            places = places or f.words(f.load_shared16(self.places_at(held)))
            # Nobody else reads what is filled anew.
            self.begin_step(unit + self.slots * WARPS, step, slot)
            number, inside = self.inside(unit, step)
            sums = self.products(number, words, places, step, sums, inside)
        return [*sums, turn + 1]

    def products(
        self, number: Val, words: list[list[Val]], places: list[Val], step: int, sums: list[Val], inside: Val | None
    ) -> list[Val]:
        """Add the products of a step; of one that isn't `inside` they count as zeros."""
        f, layer, weights = self.f, self.layer, words
        if layer.scheme:
            weights = [
                decoded(f, layer, self.part, own, scales_of(f, layer, self.part, row, number * 4 + self.place))
                for row, own in zip(self.places, weights, strict=True)
            ]
        if inside is not None:
            weights = [[f.select(inside, w, 0) for w in own] for own in weights]
        low, high = weights
        first = (number * 4 + self.place / 2) * self.chunk  # of the inputs of thread t / 2
        odd = (self.place & 1).cmp("eq", 1)
        result = list(sums)
        for c, row in enumerate(self.lines):
            for i in range(self.fours // 2):
                b: list[Val] = []
                pieces = []
                for other in (0, 2 * self.chunk):
                    at = f.at(self.x, row * layer.k + first + (other + 8 * i), layer.dtype)
                    pieces.append(f.words(f.load16("<4 x i32>", at)))
                for four in (0, 2):
                    b += [f.select(odd, piece[four + 1], piece[four]) for piece in pieces]
                if inside is not None:
                    b = [f.select(inside, word, 0) for word in b]
                a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
                which = step * self.fours // 2 + i
                own = result[4 * c : 4 * c + 4]
                result[4 * c : 4 * c + 4] = f.mma_sparse(a, b, own, places[which // 2], which % 2, layer.dtype)
        return result


def product_halves(layer: Layer, tile: Tile, target: Target) -> DeviceKernel:
    """The layer in tiles, one of those above. Parameters: `Layer.parameters`. Grid: tiles of rows, `Layer.tiles(tile.outputs)`.

    Raises TargetError for a layer that it can't read.
    """
    require(layer)
    return in_tiles(layer, tile, target, functools.partial(multiplied, _Product))


class _Product:
    """The kernel under construction. A step is four pieces of every row of W and the inputs that these stand for; places come for 256 inputs."""

    def __init__(self, f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows) -> None:
        self.f, self.layer, self.tile, self.x, self.part, self.own = f, layer, tile, x, part, own
        self.fours = layer.codes_per_chunk // 4
        self.inputs = 4 * layer.codes_per_chunk
        self.steps, self.per_unit = layer.k // self.inputs, INPUTS // self.inputs
        self.units = -(-layer.k // INPUTS)
        self.stages = 2 if layer.scheme else 3
        self.x_bytes = tile.rows * self.inputs * 2
        self.stage_bytes = self.x_bytes + tile.outputs * 64
        self.places_bytes = tile.outputs // ROWS * _PLACES
        self.pitch = tile.outputs + 4  # of results, so that a warp's lie in different banks
        copied = self.stages * self.stage_bytes + 2 * self.places_bytes
        self.held = f.shared(max(copied, tile.rows * self.pitch * 4))
        thread = f.thread()
        self.lane, warp = thread % WARP, thread / WARP
        self.first_row = warp / tile.warps[1] * tile.of_warp[0]
        self.first_output = warp % tile.warps[1] * tile.of_warp[1]
        self.tiles_of_rows, self.tiles_of_outputs = tile.of_warp[0] // 8, tile.of_warp[1] // ROWS

    def stage(self, step: Val) -> tuple[Val, Val]:
        """Where a step's rows of x and of W are in shared memory."""
        rows = self.f.at(self.held, step % self.stages * self.stage_bytes, "i8")
        return rows, self.f.at(rows, self.x_bytes, "i8")

    def places_at(self, unit: Val) -> Val:
        """Where a unit's places are in shared memory."""
        return self.f.at(self.held, (unit & 1) * self.places_bytes + self.stages * self.stage_bytes, "i8")

    def fetch(self, step: Val, first: bool) -> None:
        """Begin to copy what a step multiplies, with the places of a unit if it is the `first` one of that."""
        f, part, (rows, weights) = self.f, self.part, self.stage(step)
        per_row = self.inputs // 4  # pieces of 8 bytes, which are fours: those of two threads lie side by side
        for row, four in f.chunks(self.tile.rows, per_row, f.threads):
            thread, p = four / self.fours, four % self.fours
            to = self.place(row, thread / 2 * self.fours + p) + (thread & 1) * 8
            source = self.own.source(row) * self.layer.k + step * self.inputs + four * 4
            f.copy8(f.at(rows, to, "i8"), f.at(self.x, source, self.layer.dtype))
        for output, piece in f.chunks(self.tile.outputs, 4, f.threads):
            row = f.minimum(part.first + output, part.rows - 1)
            source = f.at(row_address(f, self.layer, part, row), step * 64 + piece * 16, "i8")
            f.copy16(f.at(weights, output * 64 + piece * 16, "i8"), source)
        if first:
            assert part.p is not None
            last, unit = (part.rows + (ROWS - 1)) / ROWS - 1, step / self.per_unit
            for sixteen, lane in f.chunks(self.tile.outputs // ROWS, WARP, f.threads):
                tile = f.minimum(part.first / ROWS + sixteen, last) * self.units + unit
                source = f.at(part.p, tile * _PLACES + lane * 16, "i8")
                f.copy16(f.at(self.places_at(unit), sixteen * _PLACES + lane * 16, "i8"), source)

    def place(self, row: Val, piece: Val) -> Val:
        """Where a piece of 16 bytes of a row of x lies in shared memory: the same one of eight rows in different banks."""
        turned = self.f.op(f"xor i64 {piece.name}, {(row & 7).name}", "i64")
        return row * (2 * self.inputs) + turned * 16

    def sums(self) -> list[Val]:
        """This thread's sums: of tiles of 16 outputs by 8 rows, as `mma` leaves them."""
        f, ahead = self.f, self.stages - 1
        for early in range(ahead):
            if early < self.steps:
                self.fetch(f.i64(early), early % self.per_unit == 0)
            f.commit_copies()
        sums = [f.const(0.0, "float")] * (4 * self.tiles_of_rows * self.tiles_of_outputs)
        whole = self.steps // self.per_unit
        *sums, _ = f.loop(0, whole, 1, sums, lambda unit, own: self.unit(unit, self.per_unit, own))
        return self.unit(f.i64(whole), self.steps % self.per_unit, sums)

    def unit(self, unit: Val, steps: int, sums: list[Val]) -> list[Val]:
        """Add the products of a unit's first steps."""
        f = self.f
        places: list[list[Val]] = []
        for number in range(steps):
            step, ahead = unit * self.per_unit + number, self.stages - 1
            f.copies_done(ahead - 1)
            f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
            later, first = step + ahead, (number + ahead) % self.per_unit == 0
            f.when(later < self.steps, lambda later=later, first=first: self.fetch(later, first))  # type: ignore[misc]
            f.commit_copies()
            places = places or [self.places_of(unit, i) for i in range(self.tiles_of_outputs)]
            sums = self.products(step, number, places, sums)
        return sums

    def places_of(self, unit: Val, i: int) -> list[Val]:
        """This thread's places of a unit and 16 outputs."""
        at = (self.first_output / ROWS + i) * _PLACES + self.lane * 16
        return self.f.words(self.f.load_shared16(self.f.at(self.places_at(unit), at, "i8")))

    def products(self, step: Val, number: int, places: list[list[Val]], sums: list[Val]) -> list[Val]:
        """Add the products of a step, the unit's one of that number."""
        f, (rows, weights) = self.f, self.stage(step)
        line, thread, matrix = self.lane / 4, self.lane % 4, self.lane / 8
        left = []
        for half in range(2 * self.tiles_of_outputs):
            output = self.first_output + line + 8 * half
            words = f.words(f.load_shared16(f.at(weights, output * 64 + thread * 16, "i8")))
            left.append(self.decoded(output, step * 4 + thread, words))
        result = list(sums)
        for i in range(self.fours // 2):
            which = number * self.fours // 2 + i
            for j in range(self.tiles_of_rows):
                row = self.first_row + 8 * j + self.lane % 8
                b = f.fragments(f.at(rows, self.place(row, (matrix & 1) * self.fours + matrix / 2 + 2 * i), "i8"))
                for t in range(self.tiles_of_outputs):
                    low, high = left[2 * t], left[2 * t + 1]
                    a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
                    at = 4 * (t * self.tiles_of_rows + j)
                    result[at : at + 4] = f.mma_sparse(
                        a, b, result[at : at + 4], places[t][which // 2], which % 2, self.layer.dtype
                    )  # fmt: skip
        return result

    def decoded(self, output: Val, piece: Val, words: list[Val]) -> list[Val]:
        """A piece of a row of W as pairs of numbers."""
        if not self.layer.scheme:
            return words
        row = self.f.minimum(self.part.first + output, self.part.rows - 1)
        scales = scales_of(self.f, self.layer, self.part, row, piece)
        return decoded(self.f, self.layer, self.part, words, scales)

    def leave(self, sums: list[Val], residual: Val | None) -> None:
        """Bring the sums together by rows of x, finish and store the results."""
        f, layer, part, thread = self.f, self.layer, self.part, self.lane % 4
        f.barrier()  # shared memory is used anew
        for t in range(self.tiles_of_outputs):
            for j in range(self.tiles_of_rows):
                for i in range(4):
                    output = self.first_output + self.lane / 4 + (16 * t + 8 * (i // 2))
                    row = self.first_row + thread * 2 + (8 * j + i % 2)
                    at = f.at(self.held, row * self.pitch + output, "float32")
                    f.store(sums[4 * (t * self.tiles_of_rows + j) + i], at)
        f.barrier()
        per_row = self.tile.outputs // layer.per_weight_row

        def one(number: Val, _: list[Val]) -> None:
            row, output = number / per_row, number % per_row
            at_row, column = self.own.place(row), part.first / layer.per_weight_row + output

            def store() -> None:
                first = row * self.pitch + output * layer.per_weight_row
                own = [f.load("float", f.at(self.held, first + i, "float32")) for i in range(layer.per_weight_row)]
                value = self.own.weighed(finished(f, layer, part, at_row, column, own, residual), at_row)
                f.store_f32(value, part.y, at_row * part.n + column, layer.dtype)

            f.when(f.op(f"and i1 {self.own.there(at_row).name}, {(column < part.n).name}", "i1"), store)

        f.loop(f.thread(), self.tile.rows * per_row, f.threads, [], one)
