"""What layers read, in 8 bits: each token is one record of its levels, their scales, and the levels' sums by group.

    value = level * scale

A record is bytes: levels int8 [k], or e4m3 of the scheme fp8, and zeros up to a multiple of 64; the scales, float32: one for the token, or
(`own`) one per group of inputs; per group the sum of its levels, int32, which stands for what an offset of the weights adds (0 of small
floats, which have none); zeros up to an odd number of 64 bytes, so that neighbouring records lie in different sets of a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jisu.compiler.schemes import Scheme, groups_of
from jisu.compiler.types import require

LINE = 64
"""Bytes of a cache line."""


def multiplied(x: Scheme, w: Scheme) -> bool:
    """Whether levels of the scheme x and codes of w may be multiplied as they are: both integers, or both fp8."""
    return (x.uniform and w.uniform and x.scale == "float16") or x.name == w.name == "fp8"


WORD = 4
"""Inputs of an output that lie side by side where products are those of levels."""

Rule = Callable[[Scheme, Scheme, int, int], bool]
"""Whether a machine multiplies levels of one scheme and codes of another, given the inputs and the codes' group."""


def whole_words(x: Scheme, w: Scheme, k: int, group: int) -> bool:
    """A `Rule`: both are integers, and groups of inputs end where words do."""
    return x.uniform and multiplied(x, w) and group % (WORD * w.per_byte) == 0


def scale_offset(k: int) -> int:
    """Where the scales of a record of k levels stand, in bytes."""
    return -(-k // LINE) * LINE


def sum_offset(k: int, group: int, own: bool) -> int:
    """Where the sums stand, behind the scales."""
    return scale_offset(k) + 4 * (groups_of(k, group) if own else 1)


def record_bytes(k: int, group: int, own: bool) -> int:
    """Bytes of the record of k levels with a sum per `group` of them (0: one of all), and if `own` a scale, too."""
    lines = -(-(sum_offset(k, group, own) + 4 * groups_of(k, group)) // LINE)
    return (lines | 1) * LINE


def encode(x: np.ndarray, kind: Scheme, group: int, own: bool, given: np.ndarray | None = None) -> np.ndarray:
    """Records uint8 [*b, record_bytes] of rows [*b, k], rounded as `fake_quantize` does with the scheme `kind`, of integers or fp8.

    What shares a scale (a row, or a group of it) with NaN decodes to NaN; so does what shares it with infinities, unless the scale is
    `given`.
    """
    require(multiplied(kind, kind), f"{kind.name} has no levels of 8 bits with scales of their own")
    *lead, k = x.shape
    size, count = group or k, groups_of(k, group)
    w = np.zeros((*lead, count * size), np.float32)
    w[..., :k] = x
    shared = w.reshape(*lead, count if own else 1, -1)
    with np.errstate(invalid="ignore"):
        scales = kind.running_scales(shared, None if given is None else given.astype(np.float32))
        levels = kind.rounded(shared / scales)
    lost = np.isnan(shared).any(-1, keepdims=True) | ~np.isfinite(scales)
    scales = np.ascontiguousarray(np.where(lost, np.float32(np.nan), scales)[..., 0], np.float32)
    whole: np.ndarray = np.where(np.isnan(levels), 0, levels).astype(_stored(kind)).reshape(*lead, count * size)
    sums = (whole if kind.uniform else np.zeros_like(whole)).reshape(*lead, count, size).astype(np.int32).sum(-1)
    out = np.zeros((*lead, record_bytes(k, group, own)), np.uint8)
    out[..., :k] = whole[..., :k].view(np.uint8)
    tail = np.concatenate([scales.view(np.uint8), np.ascontiguousarray(sums, np.int32).view(np.uint8)], -1)
    out[..., scale_offset(k) : scale_offset(k) + tail.shape[-1]] = tail
    return out


def _stored(kind: Scheme) -> type:
    return np.int8 if kind.uniform else ml_dtypes.float8_e4m3fn


def decode(records: np.ndarray, k: int, group: int, own: bool, kind: Scheme) -> np.ndarray:
    """The rows float32 [*b, k] of records uint8 [*b, bytes] of the scheme `kind`."""
    tail = np.ascontiguousarray(records[..., scale_offset(k) : sum_offset(k, group, own)]).view(np.float32)
    scales = np.repeat(tail, group, -1)[..., :k] if own and group else tail
    with np.errstate(invalid="ignore"):
        return np.asarray(records[..., :k].view(_stored(kind)).astype(np.float32) * scales, np.float32)
