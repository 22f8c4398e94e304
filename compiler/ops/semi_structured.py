"""Matrices that keep two of each four inputs (2:4), as sparse tensor cores read them: the layers, and the packing of places.

The kept numbers of a row stand side by side, values [n, k / 2]; codes as `pack_codes` makes them with words of one, but within each 4 bytes
first the first ones of their fours, then the second ones. Which of its four inputs a number belongs to takes 2 bits. A row has 64 fours
in 256 inputs; a warp multiplies 16 rows of these by eight instructions, whose operand it loads at 16 bytes a thread:

    places uint8 [ceil(n / 16), ceil(k / 256), 32 threads, 4 words of 4 bytes]

In memory's order, fours are (step, a, p): 16 bytes of a row hold `fours` of them (p), a thread a of four each, in a step. Instruction i =
step * fours / 2 + p / 2 takes word i / 2 of the threads 4 (row % 8) + 2 (i % 2) + p % 2; there the four bits of a four stand at 4 a, of
the rows from 8 on at 16 + 4 a: the place of its first number, then that of its second one.
Source: NVIDIA's PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.ops.contract import _gated, _linear, layer_result
from jisu.compiler.schemes import pack_bits, unpack_bits
from jisu.compiler.schemes import scheme as find_scheme
from jisu.compiler.types import TensorType, is_float, require

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]

ROWS, INPUTS = 16, 256
"""Rows and inputs whose places stand together."""
_FOURS = INPUTS // 4


def fours(dtype: str, scheme: str = "none") -> int:
    """How many fours of inputs the kept numbers in 16 bytes of a row belong to."""
    return 8 * find_scheme(scheme).per_byte if scheme != "none" else {2: 4, 4: 2, 8: 1}[TensorType((), dtype).itemsize]


def places_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """Shape of the places of a matrix [n, k]."""
    return -(-n // ROWS), -(-k // INPUTS), 32, 16


def _bits_of(kept: int) -> int:
    """The places of the first two bits that are set in four, the lower one in the lower two bits; clear ones make up for set ones."""
    chosen = sorted(sorted(range(4), key=lambda i: not kept >> i & 1)[:2])
    return chosen[0] | chosen[1] << 2


PLACES = np.array([_bits_of(kept) for kept in range(16)], np.uint8)
"""By the four bits of a mask, those of the places of what it keeps."""


def _pack_places(mask: np.ndarray, *, k: int, fours: int) -> np.ndarray:
    n, (tiles, units, *_) = len(mask), places_shape(len(mask), k)
    found = np.full((tiles * ROWS, units * _FOURS), PLACES[0], np.uint8)
    found[:n, : k // 4] = PLACES[unpack_bits(mask, 4, k // 4)]
    half = fours // 2
    apart = found.reshape(
        tiles, 2, 8, units, 16 // fours, 4, half, 2
    )  # half of the tile, row, unit, step, a, p / 2, p % 2
    by_step = apart.transpose(0, 3, 2, 4, 6, 7, 1, 5).reshape(
        tiles, units, 8, 4, 2, 2, 8
    )  # row, i / 2, i % 2, p % 2, bits
    return pack_bits(by_step.transpose(0, 1, 2, 4, 5, 3, 6).reshape(tiles, units, 32, 32), 4)


def _unpack_places(places: np.ndarray, n: int, k: int, fours: int) -> np.ndarray:
    """uint8 [n, k / 4]: the bits of each four, of what `_pack_places` made."""
    tiles, units = places.shape[:2]
    half = fours // 2
    bits = unpack_bits(places, 4, 32).reshape(tiles, units, 8, 2, 2, 4, 8).transpose(0, 1, 2, 5, 3, 4, 6)
    apart = bits.reshape(tiles, units, 8, 16 // fours, half, 2, 2, 4).transpose(0, 6, 2, 1, 3, 7, 4, 5)
    return apart.reshape(tiles * ROWS, units * _FOURS)[:n, : k // 4]


@defop(
    meaning=_pack_places,
    flops=0,
    samples=lambda: iter([(("uint8[5, 1]",), {"k": 8, "fours": 4}), (("uint8[18, 33]",), {"k": 260, "fours": 16})]),
)
def pack_places(mask: TensorType, *, k: int, fours: int) -> TensorType:
    """The places of what a mask uint8 [n, ceil(k / 8)] keeps, two of each four inputs: uint8, see above."""
    require(k % 4 == 0 and fours in (2, 4, 8, 16), f"{k} inputs, {fours} fours in 16 bytes")
    n = mask.shape[0] if mask.rank == 2 else None
    require(isinstance(n, int) and mask == TensorType((n, -(-k // 8)), "uint8"), f"no mask of {k} inputs: {mask}")
    return TensorType(places_shape(n, k), "uint8")  # type: ignore[arg-type]


def _in_pairs(values: np.ndarray, scheme: str) -> np.ndarray:
    """[n, k / 4, 2] of values; of codes single ones."""
    if scheme == "none":
        return values.reshape(len(values), -1, 2)
    kind = find_scheme(scheme)
    single = unpack_bits(values, 8 // kind.per_byte, values.shape[1] * kind.per_byte)
    words = single.reshape(len(values), -1, 2, 2 * kind.per_byte)
    return words.swapaxes(2, 3).reshape(len(values), -1, 2) & np.uint8(2**kind.bits - 1)


def _dense(
    values: np.ndarray, places: np.ndarray, scales: np.ndarray | None, zeros: np.ndarray | None, k: int, scheme: str, group: int,
) -> np.ndarray:  # fmt: skip
    """The matrix [n, k], float32 or wider; numbers of one place are added."""
    n, dtype = len(values), str(values.dtype)
    found, bits = _in_pairs(values, scheme), _unpack_places(places, n, k, fours(dtype, scheme))
    if scales is not None:
        groups = np.arange(k // 4) * 4 // (group or k)
        s, z = (None if v is None else v.astype(np.float32)[:, groups] for v in (scales, zeros))
        assert s is not None
        found = find_scheme(scheme).decode(found, s, z)
    wide = found if found.dtype == np.float64 else found.astype(np.float32)
    at = np.stack([bits & 3, bits >> 2], -1)[..., None] == np.arange(4)
    return np.where(at, wide[..., None], 0).sum(2, dtype=wide.dtype).reshape(n, k)


def _semi_structured(
    x: np.ndarray, values: np.ndarray, places: np.ndarray, scales: np.ndarray | None, zeros: np.ndarray | None, b: np.ndarray | None,
    r: np.ndarray | None, *, outputs: int, scheme: str, group: int, gated: bool, activation: str,
) -> np.ndarray:  # fmt: skip
    w = _dense(values, places, scales, zeros, x.shape[-1], scheme, group)
    w = w.astype(x.dtype) if x.dtype.itemsize == 8 else w
    return _gated(x, w[::2], w[1::2], activation=activation) if gated else _linear(x, w, b, r, activation=activation)


def _samples() -> Samples:
    plain = {"outputs": 5, "activation": "relu"}
    yield (
        ("float32[2, 8]", "float32[5, 4]", "uint8[1, 1, 32, 16]", None, None, "float32[5]", "float32[2, 5]"), plain
    )  # fmt: skip
    gated = {"outputs": 9, "gated": True, "activation": "silu"}
    yield ("bfloat16[3, 260]", "bfloat16[18, 130]", "uint8[2, 2, 32, 16]", None, None, None, None), gated
    for scheme, nbytes, zeros in (("int4", 8, "uint8[5, 2, 1]"), ("int8", 16, None), ("mxfp4", 8, None)):
        yield (
            ("float32[2, 32]", f"uint8[5, {nbytes}]", "uint8[1, 1, 32, 16]", "float16[5, 2, 1]", zeros, None, None),
            {**plain, "scheme": scheme, "group": 16},
        )


def _axes(x: Any, v: Any, p: Any, s: Any, zeros: Any, b: Any, r: Any, **_: Any) -> str:
    more = ", ".join("n g l" if there else "" for there in (s, zeros))
    return f"*b k, n h, q u t w, {more}, {'o' if b else ''}, {'*b o' if r else ''} -> *b o"


@defop(
    meaning=_semi_structured,
    axes=_axes,
    flops=lambda result, x, *_, gated, **__: (2 if gated else 1) * result.size * x.shape[-1],
    samples=_samples,
)
def semi_structured_linear(
    x: TensorType, values: TensorType, places: TensorType, scales: TensorType | None = None, zeros: TensorType | None = None,
    b: TensorType | None = None, r: TensorType | None = None, *, outputs: int, scheme: str = "none", group: int = 0,
    gated: bool = False, activation: str = "none",
) -> TensorType:  # fmt: skip
    """`linear`, or with `gated` `gated_linear`, of weights [outputs, k] that keep two of each four inputs.

    values [rows, k / 2] of x's dtype, or with a scheme codes uint8 [rows, bytes] with scales [rows, groups, 1] and, of integers, zeros
    uint8 of that shape; places: of `pack_places`. With `gated` gates and ups are rows by turns. A matrix of codes is float32 in the product.
    FLOPs are those of what is kept.
    """
    k = x.shape[-1]
    require(isinstance(k, int) and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    require(k % 4 == 0 and group % 4 == 0, f"{k} inputs or groups of {group} are no multiples of four")  # type: ignore[operator]
    rows = outputs * (2 if gated else 1)
    stored = find_scheme(scheme).per_byte if scheme != "none" else 1
    want = TensorType((rows, k // 2 // stored), x.dtype if scheme == "none" else "uint8")  # type: ignore[operator]
    require(values == want and (scheme == "none" or want.shape[1] % 4 == 0), f"the values must be {want}, got {values}")  # type: ignore[operator]
    want = TensorType(places_shape(rows, k), "uint8")  # type: ignore[arg-type]
    require(places == want, f"the places must be {want}, got {places}")
    require((scales is None) == (scheme == "none"), "codes have scales, and only they")
    if scales is not None:
        wanted = (rows, find_scheme(scheme).groups(k, group), 1)  # type: ignore[arg-type]
        require(
            scales.dtype in ("float16", "float32") and scales.shape == wanted,
            f"the scales must be float16 or float32 {list(wanted)}, got {scales}",
        )
    require(
        zeros is None
        or (scales is not None and find_scheme(scheme).uniform and zeros == TensorType(scales.shape, "uint8")),
        f"the zeros must be uint8, one per scale of integers, got {zeros}",
    )
    return layer_result(x.with_shape(*x.shape[:-1], outputs), b, r, gated, activation)
