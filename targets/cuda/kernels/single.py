"""Linear layers in float32 on NVIDIA GPUs: every product is one of float32 and added in float32, without tensor cores, which would round.

Codes become float32 as their meaning says, a few rows' in registers, a tile's once for all threads of its block.
"""

from __future__ import annotations

from collections.abc import Iterator

from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import (
    Layer,
    Part,
    Rows,
    decoded_single,
    finished,
    in_rows,
    multiplied,
    row_address,
    scale_and_zero,
    scales_of,
)
from jisu.targets.cuda.kernels.products import Tile, in_tiles
from jisu.targets.target import Target

OUTPUTS = 8
"""Rows of W that a block of a thin kernel multiplies."""
ROWS = (4, 8)
"""Rows of x that thin kernels are made for: up to so many."""
_WARPS = 8  # of a thin kernel at most
_FEW_STAGES = 3  # turns of a thin kernel that are under way or being multiplied
LARGE, SMALL = Tile(128, 128, (4, 2)), Tile(64, 64, (4, 2))
"""Tiles of `product_single`, of whose rows and columns each of 16 by 16 threads has every sixteenth."""
_INPUTS = 16  # of a step of a tile: 64 bytes of a row
_STAGES = 4


def require(layer: Layer) -> None:
    """Raise TargetError unless the kernels read the layer: of float32, and `Layer.require_chunks`."""
    if layer.dtype != "float32" or layer.halves:
        raise TargetError(f"{layer.name}: not a layer in float32, or of halves")
    layer.require_chunks()


def threads(layer: Layer) -> int:
    """Of a thin kernel: for no more chunks than a row of W has, and for the results of 8 rows of x."""
    return WARP * max(2, min(_WARPS, layer.k // layer.codes_per_chunk // WARP))


def _add_products(f: Device, a: list[Val], b: list[Val], total: Val) -> Val:
    """total + a[0] b[0] + a[1] b[1] + …, one after the other."""
    for x, w in zip(a, b, strict=True):
        total = f.fma(x, w, total)
    return total


def thin_single(layer: Layer, rows: int, target: Target) -> DeviceKernel:
    """The layer, `rows` rows of x (one of `ROWS`) at a time. Parameters: `Layer.parameters`. Grid: `layer.tiles(OUTPUTS)`, parts of rows.

    Each thread of a block has other inputs, 16 bytes at a time of all the block's rows of W, which it fetches itself; threads' sums meet in an order
    that depends on the layer alone. Raises TargetError for a layer that it can't read.
    """
    require(layer)
    return in_rows(layer, rows, OUTPUTS, threads(layer), target, multiply_thin)


def multiply_thin(
    f: Device, layer: Layer, rows: int, x: Val, part: Part, own: Rows, residual: Val | None = None
) -> None:
    """What a thread of `thin_single` does: up to `rows` rows of x times `OUTPUTS` rows of W, with `threads`."""
    multiplied(_Thin, f, layer, rows, x, part, own, residual)


class _Thin:
    """The kernel under construction. Sums: of a row of x those of all rows of W, then those of the next."""

    def __init__(self, f: Device, layer: Layer, rows: int, x: Val, part: Part, own: Rows) -> None:
        self.f, self.layer, self.rows, self.x, self.part, self.own = f, layer, rows, x, part, own
        self.thread = f.thread()
        self.warps, self.chunk = f.threads // WARP, layer.codes_per_chunk
        self.chunks = layer.k // self.chunk
        self.turns = self.chunks // f.threads
        self.count = rows * OUTPUTS
        self.places = [f.minimum(part.first + i, part.rows - 1) for i in range(OUTPUTS)]
        self.weights = [row_address(f, layer, part, place) for place in self.places]
        self.lines = [f.at(x, own.source(f.i64(c)) * layer.k, "float32") for c in range(rows)]
        self.turn_bytes = OUTPUTS * 16 * f.threads
        stages = _FEW_STAGES * self.turn_bytes if self.turns else 0
        self.held = f.shared(max(self.warps * self.count * 4, stages))

    def slot(self, turn: Val, i: int) -> Val:
        """This thread's own place for a chunk of a row of W: nobody else reads it."""
        at = turn % _FEW_STAGES * self.turn_bytes + self.thread * 16 + i * 16 * self.f.threads
        return self.f.at(self.held, at, "i8")

    def fetch(self, turn: Val) -> None:
        """Begin to copy this thread's chunks of a turn."""
        at = (turn * self.f.threads + self.thread) * 16
        for i, row in enumerate(self.weights):
            self.f.copy16(self.slot(turn, i), self.f.at(row, at, "i8"))

    def sums(self) -> list[Val]:
        """The sums of this thread's chunks."""
        f = self.f
        sums = [f.const(0.0, "float")] * self.count
        if self.turns:
            for early in range(_FEW_STAGES - 1):
                if early < self.turns:
                    self.fetch(f.i64(early))
                f.commit_copies()
            *sums, _ = f.loop(0, self.turns, 1, sums, self.turn)
            f.barrier()  # shared memory is used anew
        if self.chunks % f.threads:
            *sums, _ = f.loop(self.thread + self.turns * f.threads, self.chunks, f.threads, sums, self.single)
        return sums

    def turn(self, turn: Val, sums: list[Val]) -> list[Val]:
        """A turn's products, while later chunks are under way."""
        f = self.f
        f.copies_done(_FEW_STAGES - 2)
        weights = [f.load_shared16(self.slot(turn, i)) for i in range(OUTPUTS)]
        later = turn + (_FEW_STAGES - 1)
        f.when(later < self.turns, lambda: self.fetch(later))
        f.commit_copies()
        return self.multiply(turn * f.threads + self.thread, weights, sums)

    def single(self, chunk: Val, sums: list[Val]) -> list[Val]:
        """The products of a chunk behind the last whole turn."""
        f = self.f
        weights = [f.load16("<4 x i32>", f.at(row, chunk * 16, "i8")) for row in self.weights]
        return self.multiply(chunk, weights, sums)

    def multiply(self, chunk: Val, weights: list[Val], sums: list[Val]) -> list[Val]:
        """Add the products of a chunk."""
        f, result = self.f, list(sums)
        for number, columns in enumerate(self.numbers(chunk, weights)):
            for c, line in enumerate(self.lines):
                x = f.unpacked(f.load16("<4 x i32>", f.at(line, chunk * self.chunk + 4 * number, "float32")), "float32")
                for at, column in enumerate(columns, c * OUTPUTS):
                    result[at] = _add_products(f, x, column, result[at])
        return result

    def numbers(self, chunk: Val, weights: list[Val]) -> Iterator[list[list[Val]]]:
        """The weights in a chunk of each row, four neighbours at a time."""
        f, layer = self.f, self.layer
        if not layer.scheme:
            yield [f.unpacked(four, "float32") for four in weights]
            return
        words = [f.words(four) for four in weights]
        scales = [scales_of(f, layer, self.part, place, chunk) for place in self.places]
        for first in range(0, self.chunk, 4):
            word, within = divmod(first, layer.per_word)
            yield [
                decoded_single(f, layer, self.part, own[word] >> (32 // layer.per_word * within), *how[word])
                for own, how in zip(words, scales, strict=True)
            ]

    def leave(self, sums: list[Val], residual: Val | None) -> None:
        """Join the threads' sums, finish and store the results."""
        f, layer, part = self.f, self.layer, self.part
        lane, warp = self.thread % WARP, self.thread / WARP
        distance = WARP // 2
        while distance:  # each thread goes on with half of the sums, and gives its neighbour the others
            upper, half = (lane & distance).cmp("ne", 0), len(sums) // 2
            pairs = list(zip(sums[:half], sums[half:], strict=True))
            sums = [f.select(upper, b, a) + f.other(f.select(upper, a, b), distance) for a, b in pairs]
            distance //= 2
        for i, value in enumerate(sums):
            f.store(value, f.at(self.held, warp * self.count + lane * len(sums) + i, "float32"))
        f.barrier()
        per_row = OUTPUTS // layer.per_weight_row
        row, output = self.thread / per_row, self.thread % per_row
        at_row, column = self.own.place(row), part.first / layer.per_weight_row + output

        def store() -> None:
            first = row * OUTPUTS + output * layer.per_weight_row
            own = [self.total(first + i) for i in range(layer.per_weight_row)]
            value = self.own.weighed(finished(f, layer, part, at_row, column, own, residual), at_row)
            f.store_f32(value, part.y, at_row * part.n + column, layer.dtype)

        f.when(_all(f, row < self.rows, self.own.there(at_row), column < part.n), store)

    def total(self, number: Val) -> Val:
        """The sum of all warps."""
        f = self.f
        value = f.load("float", f.at(self.held, number, "float32"))
        for w in range(1, self.warps):
            value = value + f.load("float", f.at(self.held, number + w * self.count, "float32"))
        return value


def _all(f: Device, first: Val, *others: Val) -> Val:
    for other in others:
        first = f.op(f"and i1 {first.name}, {other.name}", "i1")
    return first


def product_single(layer: Layer, tile: Tile, target: Target) -> DeviceKernel:
    """The layer in tiles, `LARGE` or `SMALL`. Parameters: `Layer.parameters`. Grid: tiles of rows, `Layer.tiles(tile.outputs)`.

    Raises TargetError for a layer that it can't read.
    """
    require(layer)
    return in_tiles(layer, tile, target, multiply_product)


def multiply_product(
    f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows, residual: Val | None = None
) -> None:
    """What a thread of `product_single` does: up to a tile's rows of x times its rows of W."""
    multiplied(_Product, f, layer, tile, x, part, own, residual)


class _Product:
    """The kernel under construction. Thread (ty, tx) has rows ty + 16 i of x and those of W that lie in shared memory at tx + 16 j; there gates
    come before ups. Sums: of a row of x those of all rows of W, then those of the next. Codes are asked for a step ahead, and become numbers behind
    the products of that step."""

    def __init__(self, f: Device, layer: Layer, tile: Tile, x: Val, part: Part, own: Rows) -> None:
        self.f, self.layer, self.tile, self.x, self.part, self.own = f, layer, tile, x, part, own
        self.steps = layer.k // _INPUTS
        self.mine = (tile.rows // 16, tile.outputs // 16)
        self.stage_bytes = (tile.rows + tile.outputs) * _INPUTS * 4
        self.held = f.shared(_STAGES * self.stage_bytes)
        lane, warp = f.thread() % WARP, f.thread() / WARP
        # Threads that load at once read one row of x, and rows of W that lie in different banks.
        self.tx, self.ty = lane % 8 + warp % 2 * 8, lane / 8 + warp / 2 * 4

    def stage(self, step: Val) -> tuple[Val, Val]:
        """Where a step's rows of x and of W are in shared memory."""
        rows = self.f.at(self.held, step % _STAGES * self.stage_bytes, "i8")
        return rows, self.f.at(rows, self.tile.rows * _INPUTS * 4, "i8")

    def row_of_x(self, row: Val) -> Val:
        """Where a row of the tile begins in memory."""
        return self.f.at(self.x, self.own.source(row) * self.layer.k, "float32")

    def number_of_w(self, slot: Val) -> Val:
        """Which row of W has this place in shared memory."""
        half = self.tile.outputs // 2
        row = slot % half * 2 + slot / half if self.layer.gated else slot
        return self.f.minimum(self.part.first + row, self.part.rows - 1)

    def row_of_w(self, slot: Val) -> Val:
        """Where that row begins in memory."""
        return row_address(self.f, self.layer, self.part, self.number_of_w(slot))

    def fetch(self, step: Val) -> None:
        """Begin to copy a step's inputs, and its weights unless they are codes."""
        f, (rows, weights) = self.f, self.stage(step)
        at, chunks = step * (_INPUTS * 4), _INPUTS // 4
        f.copy_tile(rows, self.tile.rows, chunks, lambda r: f.at(self.row_of_x(r), at, "i8"))
        if not self.layer.scheme:
            f.copy_tile(weights, self.tile.outputs, chunks, lambda r: f.at(self.row_of_w(r), at, "i8"))

    def codes(self, step: Val) -> list[tuple[Val, Val, Val]]:
        """This thread's share of a step's codes: four of a row in the lowest bits of an i32, their scale and zero; see `place_codes`."""
        f, layer, found = self.f, self.layer, []
        per_byte = SCHEMES[layer.scheme].per_byte
        for slot, chunk in f.chunks(self.tile.outputs, _INPUTS // 4, f.threads):
            first = step * _INPUTS + chunk * 4
            at = f.at(self.row_of_w(slot), first / per_byte, "i8")
            word = f.load("i32", at) if per_byte == 1 else f.cast("zext", f.load("i16", at), "i32")
            found.append((word, *scale_and_zero(f, layer, self.part, self.number_of_w(slot), first)))
        return found

    def place_codes(self, step: Val, codes: list[tuple[Val, Val, Val]]) -> None:
        """Store the numbers of `codes` to shared memory."""
        f, (_, weights) = self.f, self.stage(step)
        slots = f.chunks(self.tile.outputs, _INPUTS // 4, f.threads)
        for (slot, chunk), own in zip(slots, codes, strict=True):
            four = f.packed(decoded_single(f, self.layer, self.part, *own), "float32")
            f.store16(four, f.at(weights, f.place(slot, chunk, _INPUTS // 4), "i8"))

    def sums(self) -> list[Val]:
        """This thread's sums."""
        f = self.f
        for early in range(_STAGES - 1):
            if early < self.steps:
                self.fetch(f.i64(early))
            f.commit_copies()
        if self.layer.scheme:
            self.place_codes(f.i64(0), self.codes(f.i64(0)))
        sums = [f.const(0.0, "float")] * (self.mine[0] * self.mine[1])
        *sums, _ = f.loop(0, self.steps, 1, sums, self.step)
        for chunk in range(self.steps * _INPUTS // 4, self.layer.k // 4):  # behind the last whole step
            at = chunk * 16
            x = [f.load16("<4 x i32>", f.at(self.row_of_x(self.ty + 16 * i), at, "i8")) for i in range(self.mine[0])]
            w = [f.load16("<4 x i32>", f.at(self.row_of_w(self.tx + 16 * j), at, "i8")) for j in range(self.mine[1])]
            sums = self.multiply(x, w, sums)
        return sums

    def step(self, step: Val, sums: list[Val]) -> list[Val]:
        """A step's products, while later inputs are under way."""
        f, following = self.f, step + 1
        codes = self.codes(f.minimum(following, self.steps - 1)) if self.layer.scheme else []
        f.copies_done(_STAGES - 2)
        f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        later = step + (_STAGES - 1)
        f.when(later < self.steps, lambda: self.fetch(later))
        f.commit_copies()
        rows, weights = self.stage(step)
        for chunk in range(_INPUTS // 4):
            own, four = f.i64(chunk), _INPUTS // 4
            places = (
                [f.place(first + 16 * i, own, four) for i in range(count)]
                for first, count in zip((self.ty, self.tx), self.mine, strict=True)
            )
            x, w = (
                [f.load_shared16(f.at(base, at, "i8")) for at in part]
                for base, part in zip((rows, weights), places, strict=True)
            )
            sums = self.multiply(x, w, sums)
        if codes:  # in the last step once more, where nobody reads them: a branch would cost registers
            self.place_codes(following, codes)
        return sums

    def multiply(self, x: list[Val], w: list[Val], sums: list[Val]) -> list[Val]:
        """Add the products of four inputs of each row."""
        f = self.f
        columns = [f.unpacked(four, "float32") for four in w]
        rows = [f.unpacked(four, "float32") for four in x]
        return [
            _add_products(f, row, column, sums[i * self.mine[1] + j])
            for i, row in enumerate(rows)
            for j, column in enumerate(columns)
        ]

    def leave(self, sums: list[Val], residual: Val | None) -> None:
        """Finish and store the results."""
        f, layer, part = self.f, self.layer, self.part
        results = self.mine[1] // layer.per_weight_row
        for i in range(self.mine[0]):
            at_row = self.own.place(self.ty + 16 * i)
            for j in range(results):
                column = part.first / layer.per_weight_row + (self.tx + 16 * j)
                own = [sums[i * self.mine[1] + j + results * part_] for part_ in range(layer.per_weight_row)]

                def store(at_row: Val = at_row, column: Val = column, own: list[Val] = own) -> None:
                    value = self.own.weighed(finished(f, layer, part, at_row, column, own, residual), at_row)
                    f.store_f32(value, part.y, at_row * part.n + column, layer.dtype)

                f.when(_all(f, self.own.there(at_row), column < part.n), store)
