"""Cycles of products on weight-stationary systolic arrays, without and with shadow weights.

An array of R rows and C columns holds R x C weights. A fold pushes weights (R cycles), then streams M rows of inputs, whose last sum leaves
R + C - 2 cycles after it entered. Without shadow weights, folds follow one another (SCALE-Sim's model). A TPU's MXU pushes the next fold's
weights into shadow registers while rows stream through the present ones: a fold takes the longer of the two, and filling and draining are
paid once per uninterrupted stream.
"""

from __future__ import annotations

import attrs

from jisu.targets.tpu.chip import Chip, Table, itemsize


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def folded(rows: int, columns: int, m: int, k: int, n: int) -> int:
    """Cycles of (m, k) by (k, n) on one rows x columns array that has no shadow weights.

    ceil(k / R) * ceil(n / C) * (2 R + C + m - 2) - 1, as SCALE-Sim 3.0.0 counts (`tests/fixtures/tpu_scale_sim.json`): no error on its eight
    products.
    """
    fold = rows + (m + rows + columns - 2)
    return ceil_div(k, rows) * ceil_div(n, columns) * fold - 1


@attrs.frozen
class Work:
    """What a product asks of each unit, in cycles: the MXUs, the vector unit that adds their partial sums up; `ideal` at the peak rate."""

    mxu: float
    vector: float
    ideal: float


def work(
    chip: Chip, m: int, k: int, n: int, dtype: str, *, fills: int | None = None, shadow: bool = True
) -> Work:  # fmt: skip
    """Cycles of one uninterrupted product on all MXUs of `chip`: tiles of weights are dealt out evenly.

    fills: how often the MXUs fill and drain, by `chip.code`: that of a kernel of our own; None: a product of libtpu's, as it estimates it.

    Rows are padded to sublanes, those of bytes to their native tile: libtpu's estimate of 100 rows of int8 is that of 128. Tiles are padded to the
    MXU's size. Without `shadow`, one array's folds follow one another, nothing else counted.
    """
    if not (m and k and n):
        return Work(0.0, 0.0, 0.0)
    rate = chip.rows_per_cycle(dtype)
    ideal = 2 * m * k * n / chip.peak_flops(dtype) * chip.clock
    tiles = ceil_div(k, chip.mxu) * ceil_div(n, chip.mxu)
    if not shadow:
        return Work(float(folded(chip.mxu, chip.mxu, m, k, n)), 0.0, ideal)
    timing = chip.timing
    if fills is not None:
        rows = ceil_div(m, chip.sublane_tile(dtype)) * chip.sublane_tile(dtype)
        popped = chip.code.pop * ceil_div(m, chip.sublanes) * ceil_div(n, chip.lanes) * ceil_div(k, chip.mxu)
        rounds = ceil_div(tiles, chip.mxus)
        streamed = max(rounds * rows / rate, popped) + fills * filling(chip, dtype)
        pushed = rounds * pushing(chip, dtype) + fills * of_dtype(chip.code.begin, dtype)
        return Work(max(streamed, pushed), popped, ideal)
    packed = chip.sublane_tile(dtype) if itemsize(dtype) == 1 else chip.sublanes
    rows = ceil_div(m, packed) * packed
    stream = max(rows / rate, of_dtype(timing.push, dtype))
    depth = of_dtype(timing.depth, dtype)
    registers = ceil_div(m, chip.sublanes) * ceil_div(n, chip.lanes) * ceil_div(k, int(depth))
    return Work(ceil_div(tiles, chip.mxus) * stream + timing.block, timing.accumulate * registers, ideal)


def of_dtype(table: Table, dtype: str) -> float:
    """A table's number for a dtype; one without a number of its own counts as bfloat16."""
    numbers = dict(table)
    return numbers.get(dtype, numbers["bfloat16"])


def pushing(chip: Chip, dtype: str) -> float:
    """Cycles of pushing a tile of weights, in code of our own kernels."""
    return of_dtype(chip.code.push, dtype)


def filling(chip: Chip, dtype: str) -> float:
    """Cycles of filling and draining the matrix units around a stretch of straight code."""
    return of_dtype(chip.code.fill, dtype)


def vector_cycles(chip: Chip, elements: int, op: str) -> float:
    """Cycles of the vector unit for `op` on so many 32-bit elements, "result" by `chip.code`; an op without a rate counts as "element"."""
    rates = {**dict(chip.timing.vector), "result": chip.code.result}
    return ceil_div(elements, chip.register_elements) * rates.get(op, rates["element"])
