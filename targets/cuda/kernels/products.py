"""Matrix products on NVIDIA GPUs: few rows by streaming weights, many on tensor cores.

Weights are W[N, K] in bfloat16, row by row as checkpoints have them: a row's inputs lie together, which is what both 16-byte loads of one
output and the tensor core's second operand want.
"""

from __future__ import annotations

import functools

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import GROUP, WARP, Device, DeviceKernel
from jisu.targets.target import Target

EIGHT = 8
"""bfloat16 in 16 bytes."""


def floats(f: Device, words: Val, count: int) -> list[Val]:
    """The bfloat16 in i32 words, in order, as float32."""
    found = []
    for i in range(count):
        word = f.op(f"extractelement {words.type} {words.name}, i32 {i}", "i32")
        found += [f.cast("bitcast", part, "float") for part in (word << 16, word & -65536)]
    return found


def matvec(k: int, rows: int, target: Target, *, outputs: int = 4, warps: int = 8) -> DeviceKernel:
    """y[rows, n] = x[rows, k] W[n, k]^T for few rows, weights streamed once: each warp `outputs` outputs at a time.

    Parameters: x, W, y (bfloat16, at multiples of 16 bytes), n. Sums are float32, in an order that depends on k alone. Grid:
    `matvec_grid`. Raises TargetError unless k is a multiple of 8.
    """
    if k % EIGHT:
        raise TargetError(f"rows of {k} bfloat16 don't begin at multiples of 16 bytes")
    parameters = [*(("ptr", p) for p in ("x", "w", "y")), ("i64", "n")]
    f = Device(f"matvec{rows}", parameters, target, warps * WARP)
    x, w, y, n = f.params()
    x, w, y = (f.memory(p) for p in (x, w, y))
    thread = f.thread()
    lane, first = thread % WARP, (f.block() * warps + thread / WARP) * outputs
    places = [
        f.minimum(first + o, n - 1) for o in range(outputs)
    ]  # of outputs beyond n the last one, which isn't stored

    def step(i: Val, sums: list[Val]) -> list[Val]:
        words = [f.load16("<4 x i32>", f.at(w, place * k + i, "bfloat16")) for place in places]
        xs = [floats(f, f.load16("<4 x i32>", f.at(x, i + m * k, "bfloat16")), 4) for m in range(rows)]
        result = list(sums)
        for o, word in enumerate(words):
            for e, weight in enumerate(floats(f, word, 4)):
                for m in range(rows):
                    result[m * outputs + o] = f.fma(xs[m][e], weight, result[m * outputs + o])
        return result

    *sums, _ = f.loop(lane * EIGHT, k, WARP * EIGHT, [f.const(0.0, "float")] * (rows * outputs), step)
    totals = [f.sum_of_warp(s) for s in sums]

    def store(o: int) -> None:
        for m in range(rows):
            f.store_f32(totals[m * outputs + o], y, n * m + (first + o), "bfloat16")

    def store_all() -> None:
        for o in range(outputs):
            f.when(first + o < n, functools.partial(store, o))

    f.when(lane.cmp("eq", 0), store_all)
    return f.built()


def matvec_grid(n: int, *, outputs: int = 4, warps: int = 8) -> tuple[int, int]:
    """Blocks of `matvec`."""
    return -(-n // (outputs * warps)), 1


ROWS, OUTPUTS, INPUTS = 128, 128, 32
"""Of the tile of C that a block of `product` computes, and inputs per step."""
_STAGES = 4  # steps whose inputs are under way or in shared memory
_WARPS = (2, 4)  # warps along rows and outputs
_TILE = (64, 32)  # of a warp
_CHUNKS = INPUTS // EIGHT  # of 16 bytes in a row of a step's inputs


def _place(row: Val, chunk: Val) -> Val:
    """Where a chunk of a row lies in shared memory, in bytes: turned so that eight rows of one chunk lie in different banks."""
    f = row.fn
    turned = f.op(f"xor i64 {chunk.name}, {((row >> 1) & (_CHUNKS - 1)).name}", "i64")
    return (row * _CHUNKS + turned) * 16


def product(k: int, target: Target) -> DeviceKernel:
    """y[m, n] = x[m, k] W[n, k]^T on tensor cores: tiles of `ROWS` by `OUTPUTS`, inputs copied while earlier ones are multiplied.

    Parameters: x, W, y (bfloat16, at multiples of 16 bytes), m, n. Sums are float32. Grid: `product_grid`. Raises TargetError unless k is a
    multiple of 32.
    """
    if k % INPUTS:
        raise TargetError(f"{k} inputs are no multiple of {INPUTS}")
    parameters = [*(("ptr", p) for p in ("x", "w", "y")), ("i64", "m"), ("i64", "n")]
    threads = _WARPS[0] * _WARPS[1] * WARP
    f = Device("product", parameters, target, threads)
    x, w, y, m, n = f.params()
    x, w, y = (f.memory(p) for p in (x, w, y))
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    row0, column0 = f.block("y") * ROWS, f.block("x") * OUTPUTS
    stage_bytes = (ROWS + OUTPUTS) * INPUTS * 2
    shared = f.shared(_STAGES * stage_bytes)
    steps = k // INPUTS

    def fetch(step: Val) -> None:
        """Begin to copy a step's inputs; rows beyond the last are copies of it, whose results nobody stores."""
        to = f.at(shared, step % _STAGES * stage_bytes, "i8")
        for source, begin, end, offset, count in (
            (x, row0, m, 0, ROWS),
            (w, column0, n, ROWS * INPUTS * 2, OUTPUTS),
        ):
            for part in range(count * _CHUNKS // threads):
                number = thread + part * threads
                row, chunk = number / _CHUNKS, number % _CHUNKS
                here = f.minimum(begin + row, end - 1) * k + step * INPUTS + chunk * EIGHT
                f.copy16(f.at(to, _place(row, chunk) + offset, "i8"), f.at(source, here, "bfloat16"))

    for s in range(_STAGES - 1):
        if s < steps:
            fetch(f.i64(s))
        f.commit_copies()
    tiles_m, tiles_n = _TILE[0] // 16, _TILE[1] // 8
    warp_row, warp_column = warp / _WARPS[1] * _TILE[0], warp % _WARPS[1] * _TILE[1]
    matrix, line = lane / 8, lane % 8

    def multiply(step: Val, sums: list[Val]) -> list[Val]:
        f.copies_done(_STAGES - 2)
        f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        f.when(step + (_STAGES - 1) < steps, lambda: fetch(step + (_STAGES - 1)))
        f.commit_copies()
        here = f.at(shared, step % _STAGES * stage_bytes, "i8")
        result = list(sums)
        for half in range(INPUTS // 16):
            left = []
            for i in range(tiles_m):
                row, chunk = warp_row + 16 * i + (line + (matrix & 1) * 8), (matrix >> 1) + 2 * half
                left.append(f.fragments(f.at(here, _place(row, chunk), "i8")))
            right: list[list[Val]] = []
            for j in range(0, tiles_n, 2):
                row, chunk = warp_column + 8 * j + (line + (matrix >> 1) * 8), (matrix & 1) + 2 * half
                four = f.fragments(f.at(here, _place(row, chunk) + ROWS * INPUTS * 2, "i8"))
                right += [four[:2], four[2:]]
            for i in range(tiles_m):
                for j in range(tiles_n):
                    at = 4 * (i * tiles_n + j)
                    result[at : at + 4] = f.mma(left[i], right[j], result[at : at + 4])
        return result

    *sums, _ = f.loop(0, steps, 1, [f.const(0.0, "float")] * (4 * tiles_m * tiles_n), multiply)
    for i in range(tiles_m):
        for j in range(tiles_n):
            for part in range(4):
                row = row0 + (warp_row + 16 * i + 8 * (part // 2)) + lane / 4
                column = column0 + (warp_column + 8 * j) + (lane % 4 * 2 + part % 2)
                inside = f.op(f"and i1 {(row < m).name}, {(column < n).name}", "i1")
                value, place = sums[4 * (i * tiles_n + j) + part], row * n + column
                f.when(inside, functools.partial(f.store_f32, value, y, place, "bfloat16"))
    return f.built()


def product_grid(m: int, n: int) -> tuple[int, int]:
    """Blocks of `product`."""
    return -(-n // OUTPUTS), -(-m // ROWS)


HOPPER_ROWS, HOPPER_OUTPUTS, HOPPER_INPUTS = 128, 128, 64
"""Of the tile of C that a block of `product_hopper` computes, and inputs per step: a row of them is 128 bytes."""
_HOPPER_STAGES = 4


def product_hopper(k: int, target: Target) -> DeviceKernel:
    """`product` for sm_90a: two warp groups multiply tiles of 64 rows by 128 outputs straight from shared memory.

    Parameters: x, W, y (bfloat16, at multiples of 16 bytes), m, n. Grid: `product_hopper_grid`. Raises TargetError unless k is a multiple of 64
    and the target is sm_90a.
    """
    if k % HOPPER_INPUTS:
        raise TargetError(f"{k} inputs are no multiple of {HOPPER_INPUTS}")
    if target.mcpu != "sm_90a":
        raise TargetError(f"warp groups multiply on sm_90a, not on {target.mcpu}")
    parameters = [*(("ptr", p) for p in ("x", "w", "y")), ("i64", "m"), ("i64", "n")]
    threads = HOPPER_ROWS // 64 * GROUP
    f = Device("product_hopper", parameters, target, threads)
    x, w, y, m, n = f.params()
    x, w, y = (f.memory(p) for p in (x, w, y))
    thread = f.thread()
    row0, column0 = f.block("y") * HOPPER_ROWS, f.block("x") * HOPPER_OUTPUTS
    line, chunks, steps = 2 * HOPPER_INPUTS, 2 * HOPPER_INPUTS // 16, k // HOPPER_INPUTS
    stage_bytes = (HOPPER_ROWS + HOPPER_OUTPUTS) * line
    shared = f.shared(_HOPPER_STAGES * stage_bytes, 1024)
    # What a thread copies: the same chunk of rows that are `threads // chunks` apart.
    row, chunk = thread / chunks, thread % chunks
    turned = f.op(f"xor i64 {chunk.name}, {(row & 7).name}", "i64")
    place = row * line + turned * 16
    apart = threads // chunks

    def fetch(step: Val) -> None:
        to = f.at(shared, step % _HOPPER_STAGES * stage_bytes + place, "i8")
        for source, begin, end, offset, count in (
            (x, row0, m, 0, HOPPER_ROWS),
            (w, column0, n, HOPPER_ROWS, HOPPER_OUTPUTS),
        ):
            for part in range(0, count, apart):
                here = f.minimum(begin + row + part, end - 1) * k + step * HOPPER_INPUTS + chunk * EIGHT
                f.copy16(f.at(to, (offset + part) * line, "i8"), f.at(source, here, "bfloat16"))

    for s in range(_HOPPER_STAGES - 1):
        if s < steps:
            fetch(f.i64(s))
        f.commit_copies()
    group = thread / GROUP

    def multiply(step: Val, sums: list[Val]) -> list[Val]:
        f.copies_done(_HOPPER_STAGES - 2)
        f.begin_products()
        f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        here = f.at(shared, step % _HOPPER_STAGES * stage_bytes, "i8")
        a = f.tile_address(f.at(here, group * (64 * line), "i8"))
        b = f.tile_address(f.at(here, HOPPER_ROWS * line, "i8"))
        result = list(sums)
        for part in range(HOPPER_INPUTS // 16):
            result = f.multiply_group(a + 2 * part, b + 2 * part, result, HOPPER_OUTPUTS)
        f.commit_products()
        f.when(step + (_HOPPER_STAGES - 1) < steps, lambda: fetch(step + (_HOPPER_STAGES - 1)))
        f.commit_copies()
        f.products_done(0)
        return result

    *sums, _ = f.loop(0, steps, 1, [f.const(0.0, "float")] * (HOPPER_OUTPUTS // 2), multiply)
    lane, warp = thread % WARP, thread % GROUP / WARP
    for j in range(HOPPER_OUTPUTS // 8):
        for part in range(4):
            at_row = row0 + (group * 64 + warp * 16 + 8 * (part // 2)) + lane / 4
            column = column0 + 8 * j + (lane % 4 * 2 + part % 2)
            inside = f.op(f"and i1 {(at_row < m).name}, {(column < n).name}", "i1")
            value, to = sums[4 * j + part], at_row * n + column
            f.when(inside, functools.partial(f.store_f32, value, y, to, "bfloat16"))
    return f.built()


def product_hopper_grid(m: int, n: int) -> tuple[int, int]:
    """Blocks of `product_hopper`."""
    return -(-n // HOPPER_OUTPUTS), -(-m // HOPPER_ROWS)
