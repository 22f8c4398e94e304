"""Matrix products on NVIDIA GPUs: few rows by streaming weights, many on tensor cores.

Weights are W[N, K] in bfloat16, row by row as checkpoints have them: a row's inputs lie together, which is what both 16-byte loads of one
output and the tensor core's second operand want.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


ROWS, OUTPUTS = 128, 128
"""Of the tile of C that a block of `product` or `product_hopper` computes."""
_STAGES = 4  # steps whose inputs are under way or in shared memory


class _Product:
    """A product in tiles of `ROWS` by `OUTPUTS` under construction: y[m, n] = x[m, k] W[n, k]^T, `inputs` of k per step."""

    def __init__(self, name: str, k: int, inputs: int, threads: int, target: Target) -> None:
        if k % inputs:
            raise TargetError(f"{k} inputs are no multiple of {inputs}")
        f = Device(name, [*(("ptr", p) for p in ("x", "w", "y")), ("i64", "m"), ("i64", "n")], target, threads)
        *pointers, self.m, self.n = f.params()
        self.x, self.w, self.y = (f.memory(p) for p in pointers)
        self.f, self.k, self.inputs, self.steps, self.chunks = f, k, inputs, k // inputs, inputs // EIGHT
        self.row0, self.column0 = f.block("y") * ROWS, f.block("x") * OUTPUTS
        self.held = f.shared(_STAGES * (ROWS + OUTPUTS) * inputs * 2, 1024)

    def stage(self, step: Val) -> tuple[Val, Val]:
        """Where a step's rows and weights are in shared memory."""
        rows = self.f.at(self.held, step % _STAGES * ((ROWS + OUTPUTS) * self.inputs * 2), "i8")
        return rows, self.f.at(rows, ROWS * self.inputs * 2, "i8")

    def fetch(self, step: Val) -> None:
        """Begin to copy a step's inputs; rows beyond the last are copies of it, whose results nobody stores."""
        f, (rows, weights) = self.f, self.stage(step)

        def copy(to: Val, source: Val, count: int, begin: Val, end: Val) -> None:
            first = step * self.inputs
            f.copy_tile(to, source, count, self.chunks, lambda r: f.minimum(begin + r, end - 1) * self.k + first)

        copy(rows, self.x, ROWS, self.row0, self.m)
        copy(weights, self.w, OUTPUTS, self.column0, self.n)

    def begin(self) -> None:
        """Copies of the first steps are under way."""
        for s in range(_STAGES - 1):
            if s < self.steps:
                self.fetch(self.f.i64(s))
            self.f.commit_copies()

    def fetch_ahead(self, step: Val) -> None:
        """Begin to copy what is needed `_STAGES` - 1 steps later, into the stage that was read last."""
        later = step + (_STAGES - 1)
        self.f.when(later < self.steps, lambda: self.fetch(later))
        self.f.commit_copies()

    def store(self, row: Val, column: Val, sums: Sequence[Val]) -> None:
        """Four sums of a thread as `mma` and `wgmma` leave them: two neighbouring columns of a row of the tile, and of the eighth row below."""
        f = self.f
        for part, value in enumerate(sums):
            at_row, at_column = self.row0 + row + 8 * (part // 2), self.column0 + column + part % 2
            inside = f.op(f"and i1 {(at_row < self.m).name}, {(at_column < self.n).name}", "i1")
            to = at_row * self.n + at_column
            f.when(inside, functools.partial(f.store_f32, value, self.y, to, "bfloat16"))


_WARPS = (2, 4)  # warps of `product` along rows and outputs
_TILE = (64, 32)  # of a warp


def product(k: int, target: Target) -> DeviceKernel:
    """y[m, n] = x[m, k] W[n, k]^T on tensor cores: tiles of `ROWS` by `OUTPUTS`, inputs copied while earlier ones are multiplied.

    Parameters: x, W, y (bfloat16, at multiples of 16 bytes), m, n. Sums are float32. Grid: `product_grid`. Raises TargetError unless k is a
    multiple of 32.
    """
    p = _Product("product", k, 32, _WARPS[0] * _WARPS[1] * WARP, target)
    f, thread = p.f, p.f.thread()
    lane, warp = thread % WARP, thread / WARP
    tiles_m, tiles_n = _TILE[0] // 16, _TILE[1] // 8
    warp_row, warp_column = warp / _WARPS[1] * _TILE[0], warp % _WARPS[1] * _TILE[1]
    matrix, line = lane / 8, lane % 8
    p.begin()

    def multiply(step: Val, sums: list[Val]) -> list[Val]:
        f.copies_done(_STAGES - 2)
        f.barrier()  # all threads' copies have come, and nobody reads the stage that is filled next
        p.fetch_ahead(step)
        rows, weights = p.stage(step)
        result = list(sums)
        for half in range(p.inputs // 16):
            left = []
            for i in range(tiles_m):
                row, chunk = warp_row + 16 * i + (line + (matrix & 1) * 8), (matrix >> 1) + 2 * half
                left.append(f.fragments(f.at(rows, f.place(row, chunk, p.chunks), "i8")))
            right: list[list[Val]] = []
            for j in range(0, tiles_n, 2):
                row, chunk = warp_column + 8 * j + (line + (matrix >> 1) * 8), (matrix & 1) + 2 * half
                four = f.fragments(f.at(weights, f.place(row, chunk, p.chunks), "i8"))
                right += [four[:2], four[2:]]
            for i in range(tiles_m):
                for j in range(tiles_n):
                    at = 4 * (i * tiles_n + j)
                    result[at : at + 4] = f.mma(left[i], right[j], result[at : at + 4])
        return result

    *sums, _ = f.loop(0, p.steps, 1, [f.const(0.0, "float")] * (4 * tiles_m * tiles_n), multiply)
    for i in range(tiles_m):
        for j in range(tiles_n):
            at = 4 * (i * tiles_n + j)
            p.store(warp_row + 16 * i + lane / 4, warp_column + 8 * j + lane % 4 * 2, sums[at : at + 4])
    return f.built()


def product_hopper(k: int, target: Target) -> DeviceKernel:
    """`product` for sm_90a: two warp groups multiply tiles of 64 rows by 128 outputs straight from shared memory.

    Parameters: x, W, y (bfloat16, at multiples of 16 bytes), m, n. Sums are float32. Grid: `product_grid`. Raises TargetError unless k is a
    multiple of 64 and the target is sm_90a.
    """
    if target.mcpu != "sm_90a":
        raise TargetError(f"warp groups multiply on sm_90a, not on {target.mcpu}")
    p = _Product("product_hopper", k, 64, ROWS // 64 * GROUP, target)
    f, thread = p.f, p.f.thread()
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
            result = f.multiply_group(a + 2 * part, b + 2 * part, result, OUTPUTS)
        f.commit_products()
        p.fetch_ahead(step)
        f.products_done(0)
        return result

    *sums, _ = f.loop(0, p.steps, 1, [f.const(0.0, "float")] * (OUTPUTS // 2), multiply)
    lane, warp = thread % WARP, thread % GROUP / WARP
    for j in range(OUTPUTS // 8):
        p.store(group * 64 + warp * 16 + lane / 4, 8 * j + lane % 4 * 2, sums[4 * j : 4 * j + 4])
    return f.built()


def product_grid(m: int, n: int) -> tuple[int, int]:
    """Blocks of `product` and `product_hopper`."""
    return -(-n // OUTPUTS), -(-m // ROWS)
