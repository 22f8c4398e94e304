"""Weights in few bits: the matrix that codes and scales stand for, their packing, and the linear layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jisu.compiler import levels, masks, rows, schemes
from jisu.compiler.graph import defop
from jisu.compiler.ops.contract import _gated, _linear, layer_result
from jisu.compiler.parallel import in_parts
from jisu.compiler.schemes import decode_scales, scheme
from jisu.compiler.types import TensorType, TupleType, fixed, is_float, numpy_dtype, require, same_shape

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


def _spread(values: np.ndarray, k: int, group: int) -> np.ndarray:
    """Per group [n, groups] as per input [n, k]."""
    return np.repeat(values, group or k, axis=-1)[..., :k]


def _dequantize(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    scheme: str,
    k: int,
    group: int,
    whole: float,
    dtype: str,
) -> np.ndarray:
    kind = _scheme(scheme)
    s = _spread(decode_scales(scales, kind.scale, whole), k, group)
    z = None if zeros is None else _spread(zeros.astype(np.float32), k, group)
    if mask is None:
        return kind.decode(kind.unpack(codes, k), s, z).astype(numpy_dtype(dtype))
    single, there = masks.expand_codes(codes, mask, scheme, k)
    return np.where(there, kind.decode(single, s, z), 0).astype(numpy_dtype(dtype))


_scheme = scheme  # the op's attribute has the same name


def _samples() -> Samples:
    yield (
        ("uint8[3, 4]", "float16[3, 2]", "uint8[3, 2]", None),
        {"scheme": "int4", "k": 7, "group": 4, "whole": 1.0, "dtype": "float32"},
    )
    yield (
        ("uint8[3, 5]", "float32[3, 1]", None, None),
        {"scheme": "int8", "k": 5, "group": 0, "whole": 1.0, "dtype": "float32"},
    )
    yield (
        ("uint8[3, 3]", "float16[3, 2]", None, None),
        {"scheme": "int3", "k": 8, "group": 4, "whole": 1.0, "dtype": "float32"},
    )
    yield (
        ("uint8[2, 2]", "float16[2, 1]", None, None),
        {"scheme": "nf4", "k": 4, "group": 4, "whole": 1.0, "dtype": "float32"},
    )
    yield (
        ("uint8[2, 2]", "float32[2, 2]", None, None),
        {"scheme": "nvfp4", "k": 4, "group": 2, "whole": 1.0, "dtype": "float32"},
    )
    for name, zeros in (("int8", None), ("int4", "uint8[3, 2]"), ("int3", None)):
        yield (
            ("uint8[5]", "float16[3, 2]", zeros, "uint8[3, 1]"),
            {"scheme": name, "k": 7, "group": 4, "whole": 1.0, "dtype": "float32"},
        )


@defop(
    meaning=_dequantize,
    axes=lambda c, s, z, m, **_: f"{'p' if m else 'n p!'}, n g!, {'n g!' if z else ''}, {'m q' if m else ''} -> n k",
    flops=0,
    samples=_samples,
)
def dequantize(
    codes: TensorType, scales: TensorType, zeros: TensorType | None = None, mask: TensorType | None = None, *, scheme: str,
    k: int, group: int, whole: float = 1.0, dtype: str = "float32",
) -> TensorType:  # fmt: skip
    """The matrix [n, k] that packed codes uint8 [n, bytes], scales [n, groups] and zeros uint8 [n, groups] stand for.

    See `jisu.compiler.schemes`. Scales are float16 or float32, or in the scheme's own form. group: inputs per scale (0: a whole
    row). whole: the factor of e4m3 scales. With a mask uint8 [n, ceil(k / 8)] (see `jisu.compiler.masks`) codes uint8 [bytes] are
    there for set bits alone, in row-major order; the rest of the matrix is exactly 0.
    """
    kind = _scheme(scheme)
    n = codes.shape[0] if mask is None else mask.shape[0]
    require(
        mask is None or (isinstance(n, int) and mask == TensorType((n, -(-k // 8)), "uint8") and codes.rank == 1),
        f"codes uint8[bytes] and a mask uint8[n, {-(-k // 8)}] belong together, got {codes} and {mask}",
    )
    require(
        codes.dtype == "uint8" and (mask is not None or codes.rank == 2 and codes.shape[1] == kind.row_bytes(k)),
        f"{k} codes of {kind.bits} bits take {kind.row_bytes(k)} bytes a row, got {codes}",
    )
    wanted = (n, kind.groups(k, group))
    stored = ("float16", "float32", *(() if kind.scale == "float16" else ("uint8",)))
    require(
        scales.dtype in stored and same_shape(scales.shape, wanted),
        f"scales must be {' or '.join(stored)}{list(wanted)}, got {scales}",
    )
    require(zeros is None or kind.uniform, f"{scheme} has no zeros")
    require(zeros is None or zeros == TensorType(wanted, "uint8"), f"zeros must be uint8{list(wanted)}, got {zeros}")
    require(is_float(dtype), f"a weight is a float, not {dtype}")
    return TensorType((n, k), dtype)


# --- Bits ------------------------------------------------------------------------------------------------------------
# Checkpoints hold codes in words, along one axis or the other and in more than one order; these two and the ops that move
# elements bring them into the order of `dequantize`.


def _unpack_bits(x: np.ndarray, *, bits: int) -> np.ndarray:
    stream = np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"), copy=False)).view(np.uint8)
    return schemes.unpack_bits(stream, bits, stream.shape[-1] * 8 // bits)


@defop(
    meaning=_unpack_bits,
    flops=0,
    samples=lambda: iter(
        [(("int32[2, 3]",), {"bits": 4}), (("int32[2, 3]",), {"bits": 3}), (("uint8[2, 4]",), {"bits": 2})]
    ),
)
def unpack_bits(x: TensorType, *, bits: int) -> TensorType:
    """Codes uint8 [..., w * size // bits] of `bits` bits: the bits of integers [..., w] of `size` bits, the lowest first, in
    one row; a code may go on in the next integer."""
    require(x.dtype in ("int8", "uint8", "int32") and x.rank > 0, f"needs integers of 8 or 32 bits, got {x}")
    require(1 <= bits <= 8, f"a code has 1 to 8 bits, not {bits}")
    require(isinstance(x.shape[-1], int), f"needs a last axis of fixed size, got {x}")
    return TensorType((*x.shape[:-1], x.shape[-1] * x.itemsize * 8 // bits), "uint8")


@defop(
    meaning=lambda x, *, bits: schemes.pack_bits(x, bits),
    flops=0,
    samples=lambda: iter([(("uint8[2, 5]",), {"bits": 4}), (("uint8[2, 9]",), {"bits": 3})]),
)
def pack_bits(x: TensorType, *, bits: int) -> TensorType:
    """The lowest `bits` bits of each code uint8 [..., k], in one row, the lowest first: uint8 [..., ceil(k * bits / 8)]."""
    require(x.dtype == "uint8" and x.rank > 0 and isinstance(x.shape[-1], int), f"needs codes, got {x}")
    require(1 <= bits <= 8, f"a code has 1 to 8 bits, not {bits}")
    return TensorType((*x.shape[:-1], -(-x.shape[-1] * bits // 8)), "uint8")


# --- Values rounded at each call --------------------------------------------------------------------------------------


def _fake_quantize(x: np.ndarray, scale: np.ndarray | None, *, scheme: str, group: int) -> np.ndarray:
    kind, k = _scheme(scheme), x.shape[-1]
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, group or k)
    given = None if scale is None else scale.astype(np.float32)
    scales = kind.running_scales(groups, given)
    return (kind.rounded(groups / scales) * scales).reshape(x.shape).astype(x.dtype)


def _fake_axes(x: TensorType, scale: TensorType | None, *, scheme: str, **_: Any) -> str:
    mixes = "!" if scale is None or _scheme(scheme).scale != "float16" else ""
    return f"*b k{mixes}{', ' if scale is not None else ''} -> *b k{mixes}"


@defop(
    meaning=_fake_quantize,
    axes=_fake_axes,
    flops=8,
    samples=lambda: iter(
        [
            (("float32[2, 3, 5]", None), {"scheme": "int8", "group": 0}),
            (("float32[2, 6]", "float32[]"), {"scheme": "int4", "group": 0}),
            (("float32[2, 6]", None), {"scheme": "fp8", "group": 3}),
            (("float32[2, 6]", None), {"scheme": "mxfp4", "group": 2}),
            (("float32[2, 2, 8]", None), {"scheme": "nvfp4", "group": 4}),
            (("float32[2, 8]", "float32[]"), {"scheme": "nvfp4", "group": 4}),
        ]
    ),
)
def fake_quantize(x: TensorType, scale: TensorType | None = None, *, scheme: str, group: int = 0) -> TensorType:
    """x rounded to a scheme's grid: level * scale, where groups of the last axis (0: all of it) have one scale each.

    Without `scale` scales come from x itself, symmetric: an index depends on its own row of the last axis alone (its token). `scale`
    float32 [] is one for all of x, found before (of an e4m3 scheme the step of its scales). Computed in float32, rounded to x's dtype:
    a kernel behind it may take the levels and scales apart and multiply the levels.
    """
    kind, k = _scheme(scheme), x.shape[-1] if x.rank else 0
    require(isinstance(k, int) and k > 0 and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    require(kind.computes, f"{scheme} is a table of levels; values are rounded to integers or small floats")
    require(0 <= group and (not group or k % group == 0), f"groups of {group} don't divide {k} channels")
    require(scale is None or scale == TensorType((), "float32"), f"the scale must be float32[], got {scale}")
    require(scale is None or kind.scale != "e8m0", f"{scheme} takes its scales from the values")
    require(scale is None or kind.scale == "e4m3" or not group, "one scale for all leaves no groups")
    return x


# --- Rows in few bits -------------------------------------------------------------------------------------------------
# What a program makes and keeps, such as the keys and values of a cache: each row is a record (see `jisu.compiler.rows`).


@defop(
    meaning=lambda x, feedback, *, scheme: rows.encode(x, scheme, feedback),
    axes=lambda x, feedback, **_: "*b k! -> *b r" if feedback is None else "*b g k!, g k! l! -> *b g r",
    flops=lambda result, x, feedback, **_: (8 if feedback is None else 2 * x.shape[-1]) * x.size,
    samples=lambda: iter(
        [
            (("float32[2, 3, 6]", None), {"scheme": "int8"}),
            (("float32[2, 6]", None), {"scheme": "int4"}),
            (("float32[2, 3, 6]", None), {"scheme": "fp8"}),
            (("float32[2, 3, 6]", "float32[3, 6, 6]"), {"scheme": "int4"}),
        ]
    ),
)
def encode_rows(x: TensorType, feedback: TensorType | None = None, *, scheme: str) -> TensorType:
    """Records uint8 [*b, bytes] of the rows of x [*b, k]: each has its own scale and offset, so that a row (a token) stands for itself.

    scheme: of `jisu.compiler.rows.ROW_BITS`. Levels are the nearest; with feedback float32 [g, k, k], for x [*b, g, k], number i also
    takes back feedback[g, j, i] of the error made in each number j < i, in the order of the row.
    """
    k = x.shape[-1] if x.rank else 0
    require(isinstance(k, int) and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    require(
        feedback is None or x.rank > 1 and feedback == TensorType((x.shape[-2], k, k), "float32"),
        f"feedback must be float32[g, {k}, {k}] for x [*b, g, {k}], got {feedback} for {x}",
    )
    return TensorType((*x.shape[:-1], rows.record_bytes(scheme, k)), "uint8")


@defop(
    meaning=lambda records, *, scheme, dtype: rows.decode(records, scheme).astype(numpy_dtype(dtype)),
    axes="*b r! -> *b k",
    flops=lambda result, *_, **__: 2 * result.size,
    samples=lambda: iter(
        [
            (("uint8[2, 3, 10]",), {"scheme": "int8", "dtype": "float32"}),
            (("uint8[3, 7]",), {"scheme": "int4", "dtype": "bfloat16"}),
        ]
    ),
)
def decode_rows(records: TensorType, *, scheme: str, dtype: str = "float32") -> TensorType:
    """The rows [*b, k] that records uint8 [*b, bytes] of `encode_rows` stand for, rounded to `dtype`."""
    size = records.shape[-1] if records.rank else 0
    require(isinstance(size, int) and records.dtype == "uint8", f"needs records uint8[..., bytes], got {records}")
    require(is_float(dtype), f"rows are floats, not {dtype}")
    return TensorType((*records.shape[:-1], rows.row_length(scheme, size)), dtype)


# --- Levels in 8 bits ---------------------------------------------------------------------------------------------------


def _encode_levels(x: np.ndarray, scale: np.ndarray | None, *, scheme: str, group: int, own: bool) -> np.ndarray:
    return levels.encode(x, _scheme(scheme), group, own, scale)


@defop(
    meaning=_encode_levels,
    axes=lambda x, scale, **_: f"*b k!{', ' if scale is not None else ''} -> *b r",
    flops=lambda result, x, *_, **__: 8 * x.size,
    samples=lambda: iter(
        [
            (("float32[2, 3, 5]", None), {"scheme": "int8", "group": 0, "own": False}),
            (("float32[2, 6]", "float32[]"), {"scheme": "int8", "group": 4, "own": False}),
            (("bfloat16[2, 70]", None), {"scheme": "int4", "group": 8, "own": True}),
            (("float32[2, 70]", None), {"scheme": "fp8", "group": 0, "own": False}),
        ]
    ),
)
def encode_levels(x: TensorType, scale: TensorType | None = None, *, scheme: str, group: int, own: bool) -> TensorType:
    """Records uint8 [*b, bytes] (see `jisu.compiler.levels`) of x [*b, k], rounded as `fake_quantize` rounds it with a scheme of integers or fp8.

    group: inputs per sum in the record (0: all of them), and if `own` per scale; else x has one per row, or the one given, float32 [].
    """
    kind, k = _scheme(scheme), x.shape[-1] if x.rank else 0
    require(isinstance(k, int) and k > 0 and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    require(levels.multiplied(kind, kind), f"{scheme} has no levels of 8 bits with scales of their own")
    require(group >= 0, f"a group has inputs, not {group}")
    require(scale is None or scale == TensorType((), "float32"), f"the scale must be float32[], got {scale}")
    require(scale is None or not own, "one scale for all leaves none to groups")
    return TensorType((*x.shape[:-1], levels.record_bytes(k, group, own)), "uint8")


# --- Packed for kernels ----------------------------------------------------------------------------------------------
# A kernel reads panels of `panel` outputs. Codes are [panels, words, panel, word]: `word` inputs of an output lie side by
# side; a byte holds one code, or two of up to 4 bits, of which the upper is that of the input `word` further on. Scales and
# zeros are [panels, groups, panel].


def _in_panels(rows: np.ndarray, panel: int) -> np.ndarray:
    """[n, words, …] as [panels, words, panel, …], padded with zeros."""
    n, words, *rest = rows.shape
    padded = np.zeros((-(-n // panel) * panel, words, *rest), rows.dtype)
    padded[:n] = rows
    return np.ascontiguousarray(padded.reshape(-1, panel, words, *rest).swapaxes(1, 2))


def _out_of_panels(packed: np.ndarray, n: int) -> np.ndarray:
    """The first n rows of what `_in_panels` made."""
    panels, words, panel, *rest = packed.shape
    return packed.swapaxes(1, 2).reshape(panels * panel, words, *rest)[:n]


def _pack_codes(codes: np.ndarray, *, scheme: str, k: int, panel: int, word: int) -> np.ndarray:
    kind, n = _scheme(scheme), len(codes)
    words = kind.panel_words(k, word)
    if panel == word == 1 and kind.bits * kind.per_byte == 8:  # as they lie
        return codes.reshape(n, words, 1, 1)
    packed = np.zeros((-(-n // panel), words, panel, word), np.uint8)

    def pack(rows: slice) -> None:
        single = kind.unpack(codes[rows], k)
        padded = np.pad(single, ((0, 0), (0, words * kind.per_byte * word - k)))
        parts = padded.reshape(len(single), words, kind.per_byte, word)
        whole = parts[:, :, 0] | parts[:, :, 1] << 4 if kind.per_byte == 2 else parts[:, :, 0]
        panels = slice(rows.start // panel, -(-rows.stop // panel))
        packed[panels] = _in_panels(whole, panel)

    in_parts(n, k, pack, multiple=panel)
    return packed


def _unpack_codes(packed: np.ndarray, scheme: str, n: int, k: int) -> np.ndarray:
    """Codes uint8 [n, k] of what `_pack_codes` made."""
    kind = _scheme(scheme)
    rows = _out_of_panels(packed, n)
    parts = np.stack([rows & 15, rows >> 4], 2) if kind.per_byte == 2 else rows
    return np.asarray(parts.reshape(n, -1)[:, :k] & (2**kind.bits - 1))


@defop(
    meaning=_pack_codes,
    flops=0,
    samples=lambda: iter(
        [
            (("uint8[5, 2]",), {"scheme": "int4", "k": 3, "panel": 4, "word": 1}),
            (("uint8[5, 3]",), {"scheme": "int8", "k": 3, "panel": 4, "word": 1}),
            (("uint8[5, 5]",), {"scheme": "int4", "k": 10, "panel": 4, "word": 4}),
            (("uint8[5, 6]",), {"scheme": "int8", "k": 6, "panel": 4, "word": 4}),
        ]
    ),
)
def pack_codes(codes: TensorType, *, scheme: str, k: int, panel: int, word: int) -> TensorType:
    """Codes uint8 [n, bytes] of `dequantize` in panels: uint8 [ceil(n / panel), words, panel, word]."""
    require(
        codes.rank == 2 and codes.dtype == "uint8" and isinstance(codes.shape[0], int),
        f"needs packed codes, got {codes}",
    )
    require(word in (1, 4), f"1 or 4 inputs lie side by side, not {word}")
    kind = _scheme(scheme)
    require(
        codes.shape[1] == kind.row_bytes(k),
        f"{k} codes of {kind.bits} bits take {kind.row_bytes(k)} bytes a row, got {codes}",
    )
    return TensorType((-(-codes.shape[0] // panel), kind.panel_words(k, word), panel, word), "uint8")


def _pack_scales(scales: np.ndarray, *, scheme: str, whole: float, panel: int) -> np.ndarray:
    floats = scales if scales.dtype != np.uint8 else decode_scales(scales, _scheme(scheme).scale, whole)
    return _in_panels(floats, panel)


@defop(
    meaning=_pack_scales,
    flops=0,
    samples=lambda: iter(
        [
            (("float16[5, 2]",), {"scheme": "int4", "whole": 1.0, "panel": 4}),
            (("float32[3, 1]",), {"scheme": "int8", "whole": 1.0, "panel": 2}),
            (("uint8[3, 1]",), {"scheme": "mxfp4", "whole": 1.0, "panel": 2}),
        ]
    ),
)
def pack_scales(scales: TensorType, *, scheme: str, whole: float = 1.0, panel: int) -> TensorType:
    """Scales [n, groups] of `dequantize` in panels: [ceil(n / panel), groups, panel], floats as they are, others as float32."""
    require(scales.rank == 2 and isinstance(scales.size, int), f"needs scales [n, groups], got {scales}")
    _scheme(scheme)
    shape = (-(-scales.shape[0] // panel), scales.shape[1], panel)
    return TensorType(shape, "float32" if scales.dtype == "uint8" else scales.dtype)


@defop(
    meaning=lambda zeros, *, panel: _in_panels(zeros, panel),
    flops=0,
    samples=lambda: iter([(("uint8[5, 2]",), {"panel": 4})]),
)
def pack_zeros(zeros: TensorType, *, panel: int) -> TensorType:
    """Zeros uint8 [n, groups] of `dequantize` in panels: [ceil(n / panel), groups, panel]."""
    require(
        zeros.rank == 2 and zeros.dtype == "uint8" and isinstance(zeros.size, int), f"needs zeros uint8, got {zeros}"
    )
    return TensorType((-(-zeros.shape[0] // panel), zeros.shape[1], panel), "uint8")


def _values(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, scheme: str, n: int, group: int
) -> np.ndarray:
    """The numbers float32 [n, k] of codes [n, k], with scales and zeros in panels."""
    kind, k = _scheme(scheme), codes.shape[1]
    s, z = (None if v is None else _spread(_out_of_panels(v, n).astype(np.float32), k, group) for v in (scales, zeros))
    assert s is not None
    return kind.decode(codes, s, z)


def _quantized(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, b: np.ndarray | None, r: np.ndarray | None,
    k: int, outputs: int, scheme: str, group: int, gated: bool, activation: str, dtype: Any,
) -> np.ndarray:  # fmt: skip
    if codes.dtype == np.int8:
        codes = codes.view(np.uint8) ^ np.uint8(128)

    def matrix(own: Any) -> np.ndarray:
        z = None if zeros is None else zeros[own]
        w = _values(_unpack_codes(codes[own], scheme, outputs, k), scales[own], z, scheme, outputs, group)
        return w.astype(x.dtype) if x.dtype.itemsize == 8 else w

    if gated:
        return _gated(x, *(matrix((slice(None), i)) for i in (0, 1)), activation=activation, dtype=dtype)
    return _linear(x, matrix(slice(None)), b, r, activation=activation, dtype=dtype)


def _quantized_linear(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, b: np.ndarray | None, r: np.ndarray | None, *,
    outputs: int, scheme: str, group: int, gated: bool, activation: str,
) -> np.ndarray:  # fmt: skip
    k = x.shape[-1]
    return _quantized(x, codes, scales, zeros, b, r, k, outputs, scheme, group, gated, activation, x.dtype)


def _levels_linear(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, b: np.ndarray | None, r: np.ndarray | None, *,
    outputs: int, k: int, scheme: str, group: int, own: bool, gated: bool, activation: str, dtype: str, records: str = "int8",
) -> np.ndarray:  # fmt: skip
    values, to = levels.decode(x, k, group, own, _scheme(records)), numpy_dtype(dtype)
    return _quantized(values, codes, scales, zeros, b, r, k, outputs, scheme, group, gated, activation, to)


def _quantized_axes(x: Any, c: Any, s: Any, zeros: Any, b: Any, r: Any, *, gated: bool, **_: Any) -> str:
    parts = "e " if gated else ""
    z = f"p {parts}g n" if zeros else ""
    return f"*b k, p {parts}q n w, p {parts}g n, {z}, {'o' if b else ''}, {'*b o' if r else ''} -> *b o"


def _quantized_samples() -> Samples:
    plain = {"outputs": 5, "gated": False, "activation": "relu"}
    yield (
        ("float32[2, 6]", "uint8[2, 3, 4, 1]", "float16[2, 2, 4]", "uint8[2, 2, 4]", "float32[5]", "float32[2, 5]"),
        {**plain, "scheme": "int4", "group": 3},
    )
    yield (
        ("float32[2, 3]", "uint8[2, 3, 4, 1]", "float32[2, 1, 4]", None, None, None),
        {**plain, "scheme": "int8", "group": 0},
    )
    gated = {"outputs": 5, "gated": True, "activation": "silu", "scheme": "int4", "group": 0}
    yield ("float32[2, 3]", "uint8[2, 2, 2, 4, 1]", "float16[2, 2, 1, 4]", None, None, None), gated


def _integer_samples() -> Samples:
    plain = {"outputs": 5, "gated": False, "activation": "relu", "dtype": "float32"}
    yield (
        ("uint8[2, 192]", "uint8[2, 2, 4, 4]", "float16[2, 2, 4]", "uint8[2, 2, 4]", "float32[5]", "float32[2, 5]"),
        {**plain, "scheme": "int4", "group": 8, "k": 14, "own": True},
    )
    yield (
        ("uint8[2, 192]", "uint8[2, 2, 4, 4]", "float32[2, 1, 4]", None, None, None),
        {**plain, "scheme": "int8", "group": 0, "k": 7, "own": False},
    )
    gated = {"outputs": 5, "gated": True, "activation": "silu", "dtype": "bfloat16"}
    yield (
        ("uint8[3, 192]", "uint8[2, 2, 2, 4, 4]", "float16[2, 2, 1, 4]", None, None, None),
        {**gated, "scheme": "int4", "group": 0, "k": 12, "own": False},
    )
    yield (
        ("uint8[2, 192]", "uint8[2, 4, 4, 4]", "float16[2, 2, 4]", None, None, None),
        {**plain, "scheme": "fp8", "group": 8, "k": 14, "own": True, "records": "fp8"},
    )


@defop(
    meaning=_quantized_linear,
    axes=_quantized_axes,
    flops=lambda result, x, *_, gated, **__: (4 if gated else 2) * result.size * x.shape[-1],
    samples=_quantized_samples,
)
def quantized_linear(
    x: TensorType, codes: TensorType, scales: TensorType, zeros: TensorType | None = None, b: TensorType | None = None,
    r: TensorType | None = None, *, outputs: int, scheme: str, group: int, gated: bool = False, activation: str = "none",
) -> TensorType:  # fmt: skip
    """`linear`, or with `gated` `gated_linear`, of weights [outputs, k] that stay codes: `pack_codes`, `pack_scales` and `pack_zeros`
    made them.

    With `gated`, codes, scales and zeros of gate and up lie panel by panel side by side ([panels, 2, …]). Codes of 8 bits may also be
    their levels, int8, as machines widen them that have no offset. Weights are float32 in the product; results are rounded as those of `linear`.
    """
    k = x.shape[-1]
    require(isinstance(k, int) and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    result = x.with_shape(*x.shape[:-1], outputs)
    _check_quantized(codes, scales, zeros, b, r, result, fixed(k), scheme, group, gated, activation)
    return result


@defop(
    meaning=_levels_linear,
    axes=_quantized_axes,
    flops=lambda result, *_, gated, k, **__: (4 if gated else 2) * result.size * k,
    samples=_integer_samples,
)
def levels_linear(
    x: TensorType, codes: TensorType, scales: TensorType, zeros: TensorType | None = None, b: TensorType | None = None,
    r: TensorType | None = None, *, outputs: int, k: int, scheme: str, group: int, own: bool, gated: bool = False,
    activation: str = "none", dtype: str, records: str = "int8",
) -> TensorType:  # fmt: skip
    """`quantized_linear` of levels: x uint8 [*b, bytes] are records of `encode_levels` of the scheme `records` with sums (`own`: and
    scales) of the same group.

    Levels and codes are multiplied as they are, integers by integers and fp8 by fp8, and summed per group, integers exactly and small floats
    in float32; these sums are scaled and added in float32, and rounded as results of `linear` in `dtype`.
    """
    wanted = levels.record_bytes(k, group, own)
    require(x.rank > 0 and x.dtype == "uint8" and x.shape[-1] == wanted, f"needs records uint8[..., {wanted}], got {x}")
    require(levels.multiplied(_scheme(records), _scheme(scheme)), f"levels of {records} aren't multiplied by {scheme}")
    require(is_float(dtype), f"the result is a float, not {dtype}")
    result = TensorType((*x.shape[:-1], outputs), dtype)
    _check_quantized(codes, scales, zeros, b, r, result, k, scheme, group, gated, activation)
    return result


def _quantized_take(
    codes: np.ndarray, indices: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, *, rows: int, width: int, scheme: str,
    group: int, dtype: str,
) -> np.ndarray:  # fmt: skip
    from jisu.compiler.ops.index import _take

    table = _values(_unpack_codes(codes, scheme, rows, width), scales, zeros, scheme, rows, group)
    return _take(table.astype(numpy_dtype(dtype)), indices, axis=0)


def _quantized_take_samples() -> Samples:
    plain = {"rows": 7, "width": 10, "dtype": "float32"}
    for zeros in (None, "uint8[2, 2, 4]"):
        operands = ("uint8[2, 2, 4, 4]", "int64[2, 2] < 7", "float16[2, 2, 4]", zeros)
        yield operands, {**plain, "scheme": "int4", "group": 8}
    operands = ("uint8[2, 10, 4, 1]", "int64[3] < 7", "float32[2, 1, 4]", None)
    yield operands, {**plain, "scheme": "fp8", "group": 0, "dtype": "bfloat16"}


@defop(
    meaning=_quantized_take,
    axes=lambda c, i, s, z, **_: f"p q n w, *b, p g n{', p g n' if z else ', '} -> *b o",
    flops=0,
    samples=_quantized_take_samples,
)
def quantized_take(
    codes: TensorType, indices: TensorType, scales: TensorType, zeros: TensorType | None = None, *, rows: int, width: int,
    scheme: str, group: int, dtype: str,
) -> TensorType:  # fmt: skip
    """Rows of a matrix [rows, width] of codes packed for `quantized_linear` or `levels_linear`: an embedding tied to such a head."""
    require(indices.dtype in ("int64", "int32"), f"indices must be integers, got {indices}")
    require(is_float(dtype), f"rows are floats, not {dtype}")
    result = TensorType((1, rows), dtype)
    require(codes.dtype == "uint8", f"rows are looked up in codes, got {codes}")
    _check_quantized(codes, scales, zeros, None, None, result, width, scheme, group, False, "none")
    return TensorType((*indices.shape, width), dtype)


def layer_parts(operands: Sequence[Any], count: int, offset: bool, biased: bool) -> list[tuple[Any, ...]]:
    """Codes, scales, zeros and bias of each of several layers, whose operands stand kind by kind."""
    kinds = (True, True, offset, biased)
    starts = [count * sum(kinds[:i]) for i in range(4)]
    return [
        tuple(operands[s + i] if there else None for s, there in zip(starts, kinds, strict=True)) for i in range(count)
    ]


def _levels_projections(
    x: np.ndarray, *operands: np.ndarray, outputs: tuple[int, ...], offset: bool, biased: bool, **how: Any
) -> tuple[np.ndarray, ...]:
    parts = layer_parts(operands, len(outputs), offset, biased)
    return tuple(
        _levels_linear(x, c, s, z, b, None, outputs=n, gated=False, activation="none", **how)
        for (c, s, z, b), n in zip(parts, outputs, strict=True)
    )


def _levels_projections_axes(
    x: TensorType, *operands: TensorType, outputs: tuple[int, ...], offset: bool, biased: bool, **_: Any
) -> str:
    kinds = ["p{} q n w", "p{} g n", *(["p{} g n"] if offset else []), *(["o{}"] if biased else [])]
    each = range(len(outputs))
    return f"*b k, {', '.join(kind.format(i) for kind in kinds for i in each)} -> {', '.join(f'*b o{i}' for i in each)}"


def _levels_projections_samples() -> Samples:
    how = {"group": 8, "own": False, "scheme": "int4", "k": 14, "dtype": "float32"}
    codes, scales, zeros = "uint8[2, 2, 4, 4]", "float16[2, 2, 4]", "uint8[2, 2, 4]"
    x = "uint8[2, 192]"
    yield (x, codes, codes, scales, scales, zeros, zeros, "float32[5]", "float32[7]"), {
        "outputs": (5, 7), "offset": True, "biased": True, **how,
    }  # fmt: skip
    yield (x, codes, codes, scales, scales), {"outputs": (5, 8), "offset": False, "biased": False, **how}


@defop(
    meaning=_levels_projections,
    axes=_levels_projections_axes,
    flops=lambda result, *_, k, **__: sum((2 * t.size * k for t in result.items), start=0),
    samples=_levels_projections_samples,
)
def levels_projections(
    x: TensorType, *operands: TensorType, outputs: tuple[int, ...], k: int, scheme: str, group: int, own: bool, offset: bool,
    biased: bool, dtype: str, records: str = "int8",
) -> TupleType:  # fmt: skip
    """Several `levels_linear` of one x at once (queries, keys and values): their results [*b, outputs[i]], in order.

    `operands` are the layers' codes, then their scales, if `offset` their zeros, and if `biased` their biases.
    """
    count = len(outputs)
    wanted = count * (2 + offset + biased)
    require(len(operands) == wanted, f"{count} layers have {wanted} operands beside x, not {len(operands)}")
    how = {"k": k, "scheme": scheme, "group": group, "own": own, "dtype": dtype, "records": records}
    parts = layer_parts(operands, count, offset, biased)
    assert levels_linear.rule is not None
    found = [
        levels_linear.rule(x, c, s, z, b, None, outputs=n, **how)
        for (c, s, z, b), n in zip(parts, outputs, strict=True)
    ]
    return TupleType(tuple(found))  # type: ignore[arg-type]


def _check_quantized(
    codes: TensorType, scales: TensorType, zeros: TensorType | None, b: TensorType | None, r: TensorType | None,
    result: TensorType, k: int, scheme: str, group: int, gated: bool, activation: str,
) -> None:  # fmt: skip
    kind, outputs = _scheme(scheme), fixed(result.shape[-1])
    panel, word = codes.shape[-2:] if codes.rank >= 4 else (1, 1)
    lead = (-(-outputs // panel), *((2,) if gated else ()))  # type: ignore[operator]
    stored = "int8" if kind.bits == 8 and kind.uniform and codes.dtype == "int8" else "uint8"
    want = TensorType((*lead, kind.panel_words(k, word), panel, word), stored)  # type: ignore[arg-type]
    require(codes == want, f"the codes must be {want}, got {codes}")
    groups = (*lead, kind.groups(k, group), panel)
    require(
        scales.dtype in ("float16", "float32") and scales.shape == groups,
        f"the scales must be float16 or float32 {list(groups)}, got {scales}",
    )
    require(zeros is None or kind.uniform, f"{scheme} has no zeros")
    require(
        zeros is None or zeros == TensorType(groups, "uint8"), f"the zeros must be uint8{list(groups)}, got {zeros}"
    )
    layer_result(result, b, r, gated, activation)
