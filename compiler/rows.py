"""Rows of numbers in few bits, made while a program runs: each row is one record of its codes, its scale and its offset.

    value = level * scale + offset

A record is uint8 [record_bytes]: codes of 8 bits one after the other, or codes of 4 bits, number i of k in the lower half of byte i and
number i + k / 2 in the upper one (so that a vector of bytes is two vectors of neighbours); then scale and offset, bfloat16 with the
lower byte first. Levels of integers are 0, 1, 2, … and span the row's least to its largest number; levels of fp8 are e4m3 about an offset of
0, the largest being that of the row; but for the rounding of scale and offset.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jisu.compiler.schemes import SCHEMES, Scheme
from jisu.compiler.types import require

ROW_BITS = {name: SCHEMES[name].bits for name in ("int8", "int4", "fp8")}
"""Schemes of rows (of `jisu.compiler.schemes`), and the bits of a code."""

TAIL = 4
"""Bytes of a record behind its codes: scale and offset."""


def record_bytes(scheme: str, k: int) -> int:
    """Bytes of the record of a row of k numbers; raises TypeRuleError for an unknown scheme or a row that ends inside a byte."""
    require(scheme in ROW_BITS, f"unknown scheme of rows {scheme!r}; known: {', '.join(ROW_BITS)}")
    require(
        k > 0 and k * ROW_BITS[scheme] % 8 == 0, f"a row of {k} numbers of {ROW_BITS[scheme]} bits ends inside a byte"
    )
    return k * ROW_BITS[scheme] // 8 + TAIL


def row_length(scheme: str, size: int) -> int:
    """The numbers in a record of `size` bytes; raises TypeRuleError as `record_bytes` does."""
    require(scheme in ROW_BITS, f"unknown scheme of rows {scheme!r}; known: {', '.join(ROW_BITS)}")
    require(size > TAIL, f"a record has more than {TAIL} bytes, not {size}")
    return (size - TAIL) * 8 // ROW_BITS[scheme]


def _stored(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def encode(x: np.ndarray, scheme: str, feedback: np.ndarray | None = None) -> np.ndarray:
    """Records uint8 [*b, record_bytes] of rows [*b, k].

    feedback: float32 [*b, k, k] (broadcast); entry j, i says how much of the error made in number j number i > j takes back. A row
    with NaN or infinities becomes one that decodes to NaN.
    """
    kind, w = SCHEMES[scheme], np.asarray(x, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind.uniform:
            low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
            offset = _stored(low)
            scale = _stored((high - offset) / np.float32(2**kind.bits - 1))
        else:
            scale = _stored(np.abs(w).max(-1, keepdims=True) / np.float32(kind.top))
            offset = np.zeros_like(scale)
        steps = (w - offset) / np.where(scale == 0, np.float32(1), scale)
        found = _nearest(steps, kind) if feedback is None else _fed_back(steps, kind, feedback)
    found = np.where(np.isnan(found), np.float32(0), found)
    codes = found.astype(np.uint8) if kind.uniform else found.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    if kind.bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | codes[..., half:] << np.uint8(4)
    tail = np.concatenate([scale, offset], -1).astype(ml_dtypes.bfloat16).view(np.uint8)
    return np.concatenate([codes, tail], -1)


def _nearest(steps: np.ndarray, kind: Scheme) -> np.ndarray:
    """Levels nearest to numbers in steps of the grid; NaN stays."""
    return np.clip(np.rint(steps), 0, 2**kind.bits - 1) if kind.uniform else kind.rounded(steps)


def _fed_back(steps: np.ndarray, kind: Scheme, feedback: np.ndarray) -> np.ndarray:
    """Levels of numbers in steps of the grid, one number after the other."""
    wanted, found = steps.copy(), np.empty_like(steps)
    for j in range(steps.shape[-1]):
        found[..., j] = _nearest(wanted[..., j], kind)
        error = found[..., j] - steps[..., j]
        wanted[..., j + 1 :] -= feedback[..., j, j + 1 :] * error[..., None]
    return found


def decode(records: np.ndarray, scheme: str) -> np.ndarray:
    """The rows float32 [*b, k] of records uint8 [*b, bytes]."""
    codes = records[..., :-TAIL]
    if ROW_BITS[scheme] == 4:
        codes = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], -1)
    tail = np.ascontiguousarray(records[..., -TAIL:]).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(SCHEMES[scheme].levels[codes] * tail[..., :1] + tail[..., 1:], np.float32)
