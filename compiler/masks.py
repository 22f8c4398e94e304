"""Sparse matrices in storage: which numbers of a matrix are kept, a bit each, and the kept numbers one after the other.

A mask is uint8 [n, ceil(k / 8)], the lowest bit first, bits beyond k clear; the kept numbers stand in row-major order. A bit per
number is also what the positions of a 2:4 pattern take (two of two bits for four numbers), so that N:M patterns and blocks
are masks like any other.
"""

from __future__ import annotations

import numpy as np

from jisu.compiler.errors import InputError
from jisu.compiler.schemes import scheme as find_scheme


def pack_mask(keep: np.ndarray) -> np.ndarray:
    """The mask uint8 [n, ceil(k / 8)] of keep bool [n, k]."""
    return np.packbits(keep, axis=-1, bitorder="little")


def unpack_mask(mask: np.ndarray, k: int) -> np.ndarray:
    """bool [n, k] of a mask."""
    return np.unpackbits(mask, axis=-1, count=k, bitorder="little").astype(bool)


_TWO_OF_FOUR = np.array([byte.bit_count() == 4 and (byte & 15).bit_count() == 2 for byte in range(256)])


def two_of_four(mask: np.ndarray, k: int) -> bool:
    """Whether a mask keeps exactly two of each four inputs."""
    return k % 8 == 0 and bool(_TWO_OF_FOUR[mask].all())


def compress(w: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operands (values [nnz], mask) of `ops.expand` for w [n, k] of any dtype, of which keep bool [n, k] says what stays.

    Raises InputError unless both are matrices of one shape.
    """
    if w.ndim != 2 or keep.shape != w.shape or keep.dtype != np.bool_:
        raise InputError(
            f"a matrix [n, k] and a bool for each of its numbers are wanted, got {w.dtype}{list(w.shape)} and {keep.dtype}{list(keep.shape)}"
        )
    return w[keep], pack_mask(keep)


def compress_codes(codes: np.ndarray, keep: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """The operands (codes, mask) of a masked `ops.dequantize` for codes uint8 [n, k], one per number.

    The kept codes' bits stand one after the other, the lowest first: uint8 [ceil(nnz * bits / 8)]. Raises as `compress`.
    """
    values, mask = compress(codes, keep)
    return find_scheme(scheme).pack(values[None])[0], mask


def expand(values: np.ndarray, mask: np.ndarray, k: int) -> np.ndarray:
    """The matrix [n, k] that values [nnz] and mask stand for; 0 where the bit is clear, or has no value."""
    places = np.flatnonzero(unpack_mask(mask, k))[: len(values)]
    out = np.zeros(len(mask) * k, values.dtype)
    out[places] = values[: len(places)]
    return out.reshape(len(mask), k)


def expand_codes(codes: np.ndarray, mask: np.ndarray, scheme: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [n, k], 0 where absent; which are there, bool [n, k]) of what `compress_codes` made."""
    single = single_codes(codes, scheme)
    there = unpack_mask(mask, k)
    there.reshape(-1)[np.flatnonzero(there)[len(single) :]] = False
    return expand(single, mask, k), there


def single_codes(codes: np.ndarray, scheme: str) -> np.ndarray:
    """A run of codes uint8 [bytes] as one code per byte, with those that only fill the last byte."""
    kind = find_scheme(scheme)
    return kind.unpack(codes[None], codes.size * 8 // kind.bits)[0]
