"""Sparse matrices of weights: the matrix that kept numbers and a mask stand for, their packing, and the layers that read them.

See `jisu.compiler.masks` for the form in storage. A kernel reads panels of `panel` outputs. For each panel and each word of
two consecutive inputs there are 2 * panel bits: by input and then output (`pair` = 1), or by output and then input (`pair` =
2), which is the order in which dense kernels read float32 and codes, or 16-bit floats. The kept numbers stand in the bits' order,
panel after panel, so that a kernel expands one word's numbers by its bits and goes on by their count. Codes of up to 4 bits
stand two in a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler import masks
from jisu.compiler.graph import defop
from jisu.compiler.ops.contract import _gated, _linear, layer_result
from jisu.compiler.ops.quantize import _spread, _values
from jisu.compiler.schemes import scheme as find_scheme
from jisu.compiler.types import TensorType, fixed, is_float, numpy_dtype, require

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


@defop(
    meaning=lambda values, mask, *, k: masks.expand(values, mask, k),
    axes=lambda *_, **__: "v, m q -> n k",
    flops=0,
    samples=lambda: iter([(("float32[9]", "uint8[3, 1]"), {"k": 7}), (("bfloat16[8]", "uint8[2, 2]"), {"k": 9})]),
)
def expand(values: TensorType, mask: TensorType, *, k: int) -> TensorType:
    """The matrix [n, k] whose numbers are values [nnz], in row-major order, where the bits of mask uint8 [n, ceil(k / 8)] are set,
    and 0 elsewhere. Set bits for which there is no value count as clear."""
    require(values.rank == 1 and isinstance(values.shape[0], int), f"values must be [nnz] of fixed size, got {values}")
    return values.with_shape(_rows(mask, k), k)


def _rows(mask: TensorType, k: int) -> int:
    """The rows of a mask for k inputs, checked."""
    n = mask.shape[0] if mask.rank == 2 else None
    require(
        isinstance(n, int) and mask == TensorType((n, -(-k // 8)), "uint8"),
        f"the mask of {k} inputs must be uint8[n, {-(-k // 8)}], got {mask}",
    )
    return n  # type: ignore[return-value]


def _fill_codes(
    codes: np.ndarray, mask: np.ndarray, zeros: np.ndarray | None, *, scheme: str, k: int, group: int
) -> np.ndarray:
    kind = find_scheme(scheme)
    single, there = masks.expand_codes(codes, mask, scheme, k)
    if zeros is not None:
        nothing = _spread(zeros, k, group)
    else:
        nothing = np.broadcast_to(np.uint8(np.abs(kind.levels - kind.middle).argmin()), single.shape)
    return kind.pack(np.where(there, single, nothing))


@defop(
    meaning=_fill_codes,
    flops=0,
    samples=lambda: iter(
        [
            (("uint8[4]", "uint8[3, 1]", None), {"scheme": "int4", "k": 7, "group": 0}),
            (("uint8[4]", "uint8[3, 1]", "uint8[3, 2]"), {"scheme": "int3", "k": 7, "group": 4}),
        ]
    ),
)
def fill_codes(
    codes: TensorType, mask: TensorType, zeros: TensorType | None = None, *, scheme: str, k: int, group: int
) -> TensorType:
    """Codes uint8 [n, bytes] of a `dequantize` without mask that means the same: a code that stands for 0 is written wherever
    none is kept."""
    n, kind = _rows(mask, k), find_scheme(scheme)
    require(codes.rank == 1 and codes.dtype == "uint8", f"masked codes must be uint8[bytes], got {codes}")
    require(
        zeros is None or zeros == TensorType((n, kind.groups(k, group)), "uint8"), f"zeros {zeros} don't fit {mask}"
    )
    return TensorType((n, kind.row_bytes(k)), "uint8")


# --- Packed for kernels ----------------------------------------------------------------------------------------------


def _ordered(rows: np.ndarray, panel: int, pair: int) -> np.ndarray:
    """[n, k] as [panels, words, 2 * panel] in the order in which kernels read it, padded with zeros."""
    n, k = rows.shape
    padded = np.zeros((-(-n // panel) * panel, -(-k // 2) * 2), rows.dtype)
    padded[:n, :k] = rows
    found: np.ndarray = ordered(padded, panel, pair)
    return found


def ordered(rows: Any, panel: int, pair: int) -> Any:
    """[n, k] of whole panels and words as [panels, words, 2 * panel]; rows: an array, or what is reshaped and transposed like one."""
    n, k = rows.shape
    apart = rows.reshape(n // panel, panel, k // 2, 2)
    whole = apart.transpose(0, 2, 3, 1) if pair == 1 else apart.transpose(0, 2, 1, 3)
    return whole.reshape(n // panel, k // 2, 2 * panel)


def disordered(whole: Any, pair: int) -> Any:
    """[n, k] of what `ordered` made."""
    panels, words, both = whole.shape
    panel = both // 2
    if pair == 1:
        rows = whole.reshape(panels, words, 2, panel).transpose(0, 3, 1, 2)
    else:
        rows = whole.reshape(panels, words, panel, 2).transpose(0, 2, 1, 3)
    return rows.reshape(panels * panel, 2 * words)


def mask_shape(n: int, k: int, panel: int) -> tuple[int, int, int]:
    """Shape of a mask [n, k] packed in panels."""
    return (-(-n // panel), -(-k // 2), panel // 4)


def _check_panel(panel: int, pair: int) -> None:
    require(panel % 4 == 0 and pair in (1, 2), f"panels of {panel} outputs and {pair} inputs have no masks")


@defop(
    meaning=lambda mask, *, k, panel, pair: masks.pack_mask(_ordered(masks.unpack_mask(mask, k), panel, pair)),
    flops=0,
    samples=lambda: iter([(("uint8[5, 1]",), {"k": 7, "panel": 4, "pair": pair}) for pair in (1, 2)]),
)
def pack_mask(mask: TensorType, *, k: int, panel: int, pair: int) -> TensorType:
    """A mask uint8 [n, ceil(k / 8)] in panels: uint8 [ceil(n / panel), ceil(k / 2), panel / 4]."""
    _check_panel(panel, pair)
    return TensorType(mask_shape(_rows(mask, k), k, panel), "uint8")


def _pack_starts(mask: np.ndarray, *, k: int, panel: int) -> np.ndarray:
    counts = masks.unpack_mask(mask, k).sum(1, dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts)])[: len(mask) : panel].astype(np.int64)


@defop(
    meaning=_pack_starts,
    flops=0,
    samples=lambda: iter([(("uint8[5, 1]",), {"k": 7, "panel": 4})]),
)
def pack_starts(mask: TensorType, *, k: int, panel: int) -> TensorType:
    """How many numbers are kept before each panel: int64 [ceil(n / panel)]."""
    return TensorType((-(-_rows(mask, k) // panel),), "int64")


def _kept(values: TensorType, scheme: str) -> int:
    """How many numbers the values of a sparse matrix have at most."""
    (size,) = values.shape
    return int(size) if scheme == "none" else int(size) * 8 // find_scheme(scheme).bits


def _packed_size(count: int, scheme: str, panel: int) -> int:
    """Elements of packed values: kernels load 2 * panel from wherever they stand."""
    return (count if scheme == "none" else find_scheme(scheme).panel_words(count)) + 2 * panel


def _pack_values(values: np.ndarray, mask: np.ndarray, *, k: int, panel: int, pair: int, scheme: str) -> np.ndarray:
    size = values.size if scheme == "none" else values.size * 8 // find_scheme(scheme).bits
    single = values if scheme == "none" else masks.single_codes(values, scheme)
    out = np.zeros(size, single.dtype)
    step = panel * 64  # a block of panels at a time: no second copy of the whole weight
    done = 0
    for first in range(0, len(mask), step):
        part = mask[first : first + step]
        keep = masks.unpack_mask(part, k)
        count = min(int(keep.sum()), size - done)
        block = masks.expand(single[done : done + count], part, k)
        found = _ordered(block, panel, pair)[_ordered(keep, panel, pair)]
        out[done : done + count] = found[:count]
        done += count
    if scheme != "none" and find_scheme(scheme).per_byte == 2:
        both = np.pad(out, (0, size % 2))
        out = both[::2] | (both[1::2] << 4)
    return np.concatenate([out, np.zeros(2 * panel, out.dtype)])


def _pack_values_samples() -> Samples:
    yield ("float32[9]", "uint8[5, 1]"), {"k": 7, "panel": 4, "pair": 1}
    yield ("bfloat16[9]", "uint8[5, 1]"), {"k": 7, "panel": 4, "pair": 2}
    for scheme in ("int4", "int8"):
        yield ("uint8[5]", "uint8[5, 1]"), {"k": 7, "panel": 4, "pair": 1, "scheme": scheme}


@defop(
    meaning=_pack_values,
    flops=0,
    samples=_pack_values_samples,
)
def pack_values(
    values: TensorType, mask: TensorType, *, k: int, panel: int, pair: int, scheme: str = "none"
) -> TensorType:
    """The values of `expand`, or with a scheme the codes of a masked `dequantize`, in the order of `pack_mask`'s bits.

    2 * panel zeros stand behind them.
    """
    _check_panel(panel, pair)
    _rows(mask, k)
    require(values.rank == 1 and isinstance(values.shape[0], int), f"values must be [nnz] of fixed size, got {values}")
    return values.with_shape(_packed_size(_kept(values, scheme), scheme, panel))


def _unpack(
    values: np.ndarray, mask: np.ndarray, starts: np.ndarray, scales: np.ndarray | None, zeros: np.ndarray | None, *, n: int,
    k: int, pair: int, scheme: str, group: int,
) -> np.ndarray:  # fmt: skip
    """The matrix [n, k]; of codes float32."""
    panels, words, _ = mask.shape
    bits = np.unpackbits(mask, axis=-1, bitorder="little").astype(bool)
    flat = bits.reshape(panels, -1)
    at = starts[:, None] + np.cumsum(flat, 1) - flat
    single = values
    if scheme != "none" and find_scheme(scheme).per_byte == 2:
        single = np.stack([values & 15, values >> 4], -1).reshape(-1)
    there = flat & (at >= 0) & (at < single.size)
    found = np.where(there, single[np.where(there, at, 0)], np.zeros((), single.dtype))
    dense, keep = (disordered(v.reshape(bits.shape), pair)[:n, :k] for v in (found, there))
    if scales is None:
        return dense
    codes = dense & (2 ** find_scheme(scheme).bits - 1)
    return np.where(keep, _values(codes, scales, zeros, scheme, n, group), 0).astype(np.float32)


def _sparse_linear(
    x: np.ndarray, values: np.ndarray, mask: np.ndarray, starts: np.ndarray, scales: np.ndarray | None, zeros: np.ndarray | None,
    b: np.ndarray | None, r: np.ndarray | None, *, outputs: int, pair: int, scheme: str, group: int, gated: bool, activation: str,
) -> np.ndarray:  # fmt: skip
    def part(i: int) -> np.ndarray:
        own = (slice(None), i) if gated else (slice(None),)
        s, z = (None if v is None else v[own] for v in (scales, zeros))
        w = _unpack(
            values, mask[own], starts[own], s, z, n=outputs, k=x.shape[-1], pair=pair, scheme=scheme, group=group
        )
        return w.astype(x.dtype) if x.dtype.itemsize == 8 else w

    if gated:
        return _gated(x, part(0), part(1), activation=activation)
    return _linear(x, part(0), b, r, activation=activation)


def _sparse_axes(
    x: Any, v: Any, m: Any, s: Any, scales: Any, zeros: Any, b: Any, r: Any, *, gated: bool, **_: Any
) -> str:
    parts = "p e" if gated else "p"
    more = ", ".join(f"{parts} g l" if there else "" for there in (scales, zeros))
    return f"*b k, v, {parts} q u, {parts}, {more}, {'o' if b else ''}, {'*b o' if r else ''} -> *b o"


def _sparse_samples() -> Samples:
    plain = {"outputs": 5, "activation": "relu"}
    mask, starts = "uint8[2, 2, 1]", "int64[2]"
    for pair in (1, 2):
        yield (
            ("float32[2, 3]", "float32[12]", mask, starts, None, None, "float32[5]", "float32[2, 5]"),
            {**plain, "pair": pair},
        )
    gated = {"outputs": 5, "gated": True, "activation": "silu"}
    both = ("uint8[2, 2, 2, 1]", "int64[2, 2]")
    yield ("float32[2, 4]", "float32[12]", *both, None, None, None, None), {**gated, "pair": 1}
    for scheme, zeros in (("int4", "uint8[2, 2, 4]"), ("int8", None)):
        coded = {"pair": 1, "scheme": scheme, "group": 2}
        operands = ("float32[2, 3]", "uint8[12]", mask, starts, "float16[2, 2, 4]", zeros, None, None)
        yield operands, {**plain, **coded}
    yield (
        ("float32[2, 4]", "uint8[12]", *both, "float32[2, 2, 1, 4]", None, None, None),
        {**gated, "pair": 1, "scheme": "int8"},
    )


@defop(
    meaning=_sparse_linear,
    axes=_sparse_axes,
    flops=lambda result, x, *_, gated, **__: (4 if gated else 2) * result.size * x.shape[-1],
    samples=_sparse_samples,
)
def sparse_linear(
    x: TensorType, values: TensorType, mask: TensorType, starts: TensorType, scales: TensorType | None = None,
    zeros: TensorType | None = None, b: TensorType | None = None, r: TensorType | None = None, *, outputs: int, pair: int,
    scheme: str = "none", group: int = 0, gated: bool = False, activation: str = "none",
) -> TensorType:  # fmt: skip
    """`linear`, or with `gated` `gated_linear`, of sparse weights [outputs, k]: `pack_values`, `pack_mask` and `pack_starts` made them.

    With a scheme values are codes, with scales of `pack_scales` and zeros of `pack_zeros`; the weights are float32 in the product. With
    `gated`, masks, starts, scales and zeros of gate and up lie panel by panel side by side ([panels, 2, …]). FLOPs count the zeros: kernels
    skip reading them, not multiplying by them.
    """
    k = x.shape[-1]
    require(isinstance(k, int) and is_float(x.dtype), f"needs floats with a last axis of fixed size, got {x}")
    _check_sparse(values, mask, starts, scales, zeros, outputs, k, pair, scheme, group, (2,) if gated else ())  # type: ignore[arg-type]
    require(scheme != "none" or values.dtype == x.dtype, f"dtypes differ: {x} and {values}")
    return layer_result(x.with_shape(*x.shape[:-1], outputs), b, r, gated, activation)


def _check_sparse(
    values: TensorType, mask: TensorType, starts: TensorType, scales: TensorType | None, zeros: TensorType | None, n: int, k: int,
    pair: int, scheme: str, group: int, parts: tuple[int, ...],
) -> None:  # fmt: skip
    panel = fixed(mask.shape[-1]) * 4
    _check_panel(panel, pair)
    panels, words, nbytes = mask_shape(n, k, panel)
    want = TensorType((panels, *parts, words, nbytes), "uint8")
    require(mask == want, f"the mask must be {want}, got {mask}")
    want = TensorType((panels, *parts), "int64")
    require(starts == want, f"the starts must be {want}, got {starts}")
    require(values.rank == 1 and isinstance(values.shape[0], int) and values.shape[0] >= 2 * panel, f"values {values}")
    require((scales is None) == (scheme == "none"), "codes have scales, and only they")
    require(zeros is None or scales is not None, "zeros belong to codes")
    if scales is not None:
        require(values.dtype == "uint8" and pair == 1, f"codes are uint8, input by input, got {values}")
        groups = (panels, *parts, find_scheme(scheme).groups(k, group), panel)
        require(
            scales.dtype in ("float16", "float32") and scales.shape == groups,
            f"the scales must be float16 or float32 {list(groups)}, got {scales}",
        )
        require(
            zeros is None or (find_scheme(scheme).uniform and zeros == TensorType(groups, "uint8")),
            f"the zeros must be uint8{list(groups)}, of an integer scheme, got {zeros}",
        )


def _sparse_take(
    values: np.ndarray, mask: np.ndarray, starts: np.ndarray, indices: np.ndarray, scales: np.ndarray | None,
    zeros: np.ndarray | None, *, rows: int, width: int, pair: int, scheme: str, group: int, dtype: str,
) -> np.ndarray:  # fmt: skip
    from jisu.compiler.ops.index import _take

    table = _unpack(values, mask, starts, scales, zeros, n=rows, k=width, pair=pair, scheme=scheme, group=group)
    return _take(table.astype(numpy_dtype(dtype)), indices, axis=0)


def _sparse_take_samples() -> Samples:
    packed = ("uint8[2, 2, 1]", "int64[2]", "int64[2, 2]")
    plain = {"rows": 7, "width": 3, "dtype": "float32"}
    for pair in (1, 2):
        yield ("float32[12]", *packed, None, None), {**plain, "pair": pair}
    yield (
        ("uint8[12]", *packed, "float16[2, 2, 4]", "uint8[2, 2, 4]"),
        {**plain, "pair": 1, "scheme": "int4", "group": 2},
    )


@defop(
    meaning=_sparse_take,
    axes=lambda v, m, s, i, *tail, **_: f"v, p q u, p, *b, {', '.join('p g l' if t else '' for t in tail)} -> *b o",
    flops=0,
    samples=_sparse_take_samples,
)
def sparse_take(
    values: TensorType, mask: TensorType, starts: TensorType, indices: TensorType, scales: TensorType | None = None,
    zeros: TensorType | None = None, *, rows: int, width: int, pair: int, scheme: str = "none", group: int = 0, dtype: str,
) -> TensorType:  # fmt: skip
    """Rows of a sparse matrix [rows, width] packed as for `sparse_linear`: an embedding tied to a sparse head."""
    _check_sparse(values, mask, starts, scales, zeros, rows, width, pair, scheme, group, ())
    require(scheme != "none" or values.dtype == dtype, f"rows of {values} are not {dtype}")
    require(indices.dtype in ("int64", "int32"), f"indices must be integers, got {indices}")
    return TensorType((*indices.shape, width), dtype)
