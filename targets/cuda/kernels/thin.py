"""Linear layers of few rows on NVIDIA GPUs: weights are streamed once, every thread fetching what it multiplies itself."""

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
_STAGES = (
    5  # chunks of every thread that are under way or being multiplied: enough to hide memory's latency by two blocks
)
_STAGE_BYTES = 2 * 16 * WARPS * WARP


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

    def source(number: Val, half: int) -> Val:
        """Where a chunk of one of both rows of W is."""
        return f.at(part.w, places[half] * layer.row_bytes + number * 16, "i8")

    def multiply(number: Val, words: list[Val], sums: list[Val], inside: Val | None = None) -> list[Val]:
        """Add the products of a chunk; what isn't `inside` counts as zeros."""
        weights = [words[:4], words[4:]]
        if layer.scheme:
            weights = [
                decoded(f, layer, own, *scale_and_zero(f, layer, part, row, number))
                for row, own in zip(places, weights, strict=True)
            ]
        if inside is not None:
            weights = [[f.select(inside, w, 0) for w in own] for own in weights]
        result = list(sums)
        for c, row in enumerate(lines):
            words_of_x: list[Val] = []
            for piece in range(chunk // 8):
                at = f.at(x, row * layer.k + number * chunk + 8 * piece, "bfloat16")
                words_of_x += f.words(f.load16("<4 x i32>", at))
            pairs = inputs(f, layer, words_of_x)
            if inside is not None:
                pairs = [f.select(inside, p, 0) for p in pairs]
            for i in range(0, chunk // 2, 2):
                a = [weights[0][i], weights[1][i], weights[0][i + 1], weights[1][i + 1]]
                result[4 * c : 4 * c + 4] = f.mma(a, pairs[i : i + 2], result[4 * c : 4 * c + 4])
        return result

    step = 4 * WARPS  # chunks of all warps
    begin = warp * 4 + place
    count = 4 * columns
    turns = chunks // step  # in which every warp has a chunk for each of its threads
    sums = [f.const(0.0, "float")] * count
    held = f.shared(max(WARPS * OUTPUTS * rows * 4, _STAGES * _STAGE_BYTES if turns else 0))

    def slot(turn: Val, half: int) -> Val:
        """This thread's own place for a chunk under way: nobody else reads it."""
        return f.at(held, turn % _STAGES * _STAGE_BYTES + (thread * 16 + half * (_STAGE_BYTES // 2)), "i8")

    def fetch(turn: Val) -> None:
        for half in (0, 1):
            f.copy16(slot(turn, half), source(begin + turn * step, half))

    def turned(turn: Val, sums: list[Val]) -> list[Val]:
        f.copies_done(_STAGES - 2)
        words = [w for half in (0, 1) for w in f.words(f.load_shared16(slot(turn, half)))]
        later = turn + (_STAGES - 1)
        f.when(later < turns, lambda: fetch(later))
        f.commit_copies()
        return multiply(begin + turn * step, words, sums)

    if turns:
        for early in range(_STAGES - 1):
            if early < turns:
                fetch(f.i64(early))
            f.commit_copies()
        *sums, _ = f.loop(0, turns, 1, sums, turned)
        f.barrier()  # shared memory is used anew

    def single(first: Val, sums: list[Val]) -> list[Val]:
        number = first + place
        at = number if chunks % 4 == 0 else f.minimum(number, chunks - 1)
        words = [w for half in (0, 1) for w in f.words(f.load16("<4 x i32>", source(at, half)))]
        return multiply(at, words, sums, None if chunks % 4 == 0 else number < chunks)

    # All threads of a warp must multiply together: bounds are those of its first thread.
    if chunks > turns * step:
        *sums, _ = f.loop(warp * 4 + turns * step, chunks, step, sums, single)

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
