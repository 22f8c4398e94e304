"""Linear layers of few rows on NVIDIA GPUs: weights are streamed once, straight into the registers that tensor cores multiply."""

from __future__ import annotations

from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.layers import Layer, decoded, finished, inputs, part_of, scale_and_zero
from jisu.targets.target import Target

OUTPUTS = 16
"""Rows of W that a block multiplies."""
WARPS = 8
ROWS = (8, 16, 32)
"""Rows of x that kernels are made for: up to so many."""
_TOGETHER = 4  # chunks whose loads are under way at a time


def thin(layer: Layer, rows: int, target: Target) -> DeviceKernel:
    """The layer, `rows` rows of x (one of `ROWS`) at a time. Parameters: `Layer.parameters`. Grid: `layer.tiles(OUTPUTS)`, parts of rows.

    A block has 16 rows of W; its warps take turns along the inputs. Of a row, each of four threads loads 16 bytes at a time: the weights of
    such a chunk and the same inputs of x are what `mma` sums over, in whatever order, as long as it is the same for both. Partial sums of
    warps meet in shared memory in a fixed order, which depends on k alone. Raises TargetError for a layer that it can't read.
    """
    layer.require()
    f = Device(f"thin{rows}_{layer.name}", layer.parameters, target, WARPS * WARP)
    part = part_of(f, layer, f.block(), OUTPUTS)
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=True)}
    x, m = f.memory(given["x"]), given["m"]
    residual = f.memory(given["r"]) if layer.residual else None
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    line, place = lane / 4, lane % 4
    columns = rows // 8
    chunk = layer.codes_per_chunk
    chunks = layer.k // chunk
    # Rows beyond the last are copies of it, whose results nobody stores.
    places = [f.minimum(part.first + line + 8 * half, part.rows - 1) for half in (0, 1)]
    first_row = f.block("y") * rows
    lines = [f.minimum(first_row + line + 8 * c, m - 1) for c in range(columns)]

    def load(number: Val) -> tuple[list[list[Val]], list[list[Val]]]:
        """A chunk of both rows of W, and of the rows of x."""
        weights = [
            f.words(f.load16("<4 x i32>", f.at(part.w, row * layer.row_bytes + number * 16, "i8"))) for row in places
        ]
        given_x = []
        for row in lines:
            words: list[Val] = []
            for piece in range(chunk // 8):
                at = f.at(x, row * layer.k + number * chunk + 8 * piece, "bfloat16")
                words += f.words(f.load16("<4 x i32>", at))
            given_x.append(inputs(f, layer, words))
        return weights, given_x

    def multiply(number: Val, loaded: tuple[list[list[Val]], list[list[Val]]], sums: list[Val]) -> list[Val]:
        weights, given_x = loaded
        if layer.scheme:
            weights = [
                decoded(f, layer, words, *scale_and_zero(f, layer, part, row, number))
                for row, words in zip(places, weights, strict=True)
            ]
        result = list(sums)
        for i in range(0, chunk // 2, 2):
            a = [weights[0][i], weights[1][i], weights[0][i + 1], weights[1][i + 1]]
            for c in range(columns):
                result[4 * c : 4 * c + 4] = f.mma(a, given_x[c][i : i + 2], result[4 * c : 4 * c + 4])
        return result

    def blank(loaded: tuple[list[list[Val]], list[list[Val]]], inside: Val) -> tuple[list[list[Val]], list[list[Val]]]:
        """Zeros where a chunk lies behind the end of the rows."""
        weights, given_x = ([[f.select(inside, w, 0) for w in words] for words in side] for side in loaded)
        return weights, given_x

    step = 4 * WARPS  # chunks of all warps
    begin = warp * 4 + place

    def several(first: Val, sums: list[Val]) -> list[Val]:
        loaded = [load(first + i * step) for i in range(_TOGETHER)]
        for i, one in enumerate(loaded):
            sums = multiply(first + i * step, one, sums)
        return sums

    def single(first: Val, sums: list[Val]) -> list[Val]:
        number = first + place
        inside = number < chunks
        held = f.minimum(number, chunks - 1)
        one = load(held) if chunks % 4 == 0 else blank(load(held), inside)
        return multiply(held, one, sums)

    # All threads of a warp must multiply together: bounds are of the warp's first thread.
    sums = [f.const(0.0, "float")] * (4 * columns)
    whole = chunks // (step * _TOGETHER) * (step * _TOGETHER)
    if whole:
        *sums, _ = f.loop(begin, begin + whole, step * _TOGETHER, sums, several)
    if chunks > whole:
        *sums, _ = f.loop(warp * 4 + whole, chunks, step, sums, single)

    held = f.shared(WARPS * OUTPUTS * rows * 4)
    for c in range(columns):
        for i in range(4):
            output, row = line + 8 * (i // 2), place * 2 + (i % 2 + 8 * c)
            f.store(sums[4 * c + i], f.at(held, (warp * OUTPUTS + output) * rows + row, "float32"))
    f.barrier()
    per_row = OUTPUTS // layer.per_weight_row

    def total(output: Val, row: Val) -> Val:
        value = f.load("float", f.at(held, output * rows + row, "float32"))
        for w in range(1, WARPS):
            value = value + f.load("float", f.at(held, (output + w * OUTPUTS) * rows + row, "float32"))
        return value

    for begin_at in range(0, per_row * rows, WARPS * WARP):
        number = thread + begin_at
        output, row = number % per_row, number / per_row
        column, at_row = part.first / layer.per_weight_row + output, first_row + row

        def store(output: Val = output, row: Val = row, at_row: Val = at_row, column: Val = column) -> None:
            own = [total(output * layer.per_weight_row + i, row) for i in range(layer.per_weight_row)]
            value = finished(f, layer, part, at_row, column, own, residual)
            f.store_f32(value, part.y, at_row * part.n + column, layer.dtype)

        inside = f.op(f"and i1 {(at_row < m).name}, {(column < part.n).name}", "i1")
        f.when(inside, store)
    return f.built()
