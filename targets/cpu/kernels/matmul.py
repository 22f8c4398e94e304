"""Matrix products: linear layers over packed weights, gated MLP projections, batched products of activations.

A weight W[N, K] is packed once into panels of `NR` output columns (two vector registers): panel p holds, for each k, the
NR weights of columns p*NR… side by side, so that both the matrix-vector product (which streams the panels once) and the
register-blocked matrix product (MR rows x NR columns of accumulators) read it in order. 16-bit dtypes keep two
consecutive k together in a 32-bit lane, which is what the bfloat16 dot product wants and is cheap to widen elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import InputError
from jisu.targets.cpu.isa import (
    ITEMSIZE,
    Arg,
    Function,
    Micro,
    Val,
    align_up,
    prim_func,
    require_activation,
    require_dtype,
    vector_type,
)
from jisu.targets.target import Target

VECTORS = 2  # vector registers per panel row
_PACK_COLUMNS = 64  # panels transposed at a time while packing


def panel_width(target: Target) -> int:
    """NR: output columns per panel."""
    return VECTORS * target.lanes("float32")


def _row_blocks(target: Target) -> tuple[int, ...]:
    """MR: how many rows of accumulators the register file holds beside the panel row, then the sizes for the rest."""
    return (12, 4, 2, 1) if target.vector_registers >= 32 else (6, 2, 1)


def _paired(dtype: str) -> bool:
    return dtype != "float32"


def pack_shape(n: int, k: int, dtype: str, target: Target) -> tuple[int, ...]:
    """Shape of W[n, k] packed: [panels, k, NR] for float32, [panels, ceil(k/2), NR, 2] for 16-bit dtypes."""
    nr = panel_width(target)
    return (-(-n // nr), -(-k // 2), nr, 2) if _paired(dtype) else (-(-n // nr), k, nr)


def pack(w: np.ndarray, target: Target) -> np.ndarray:
    """W[n, k] in the packed layout of `pack_shape` (padding is zero); reads `w` in blocks, which may be memory-mapped.

    Raises InputError unless `w` is a matrix of float32, float16 or (ml_dtypes) bfloat16.
    """
    dtype = _matrix_dtype(w)
    n, k = w.shape
    out = np.zeros(pack_shape(n, k, dtype, target), w.dtype)
    _pack_into(out, w, panel_width(target))
    return out


def pack_gated_shape(f: int, k: int, dtype: str, target: Target) -> tuple[int, ...]:
    """Shape of gate[f, k] and up[f, k] packed together: pack_shape with an axis of 2 after the panels."""
    panels, *rest = pack_shape(f, k, dtype, target)
    return (panels, 2, *rest)


def pack_gated(gate: np.ndarray, up: np.ndarray, target: Target) -> np.ndarray:
    """gate[f, k] and up[f, k] packed panel by panel side by side, as `gated_mlp_up` reads them."""
    dtype = _matrix_dtype(gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(f"gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must have one dtype and shape")
    out = np.zeros(pack_gated_shape(*gate.shape, dtype, target), gate.dtype)
    _pack_into(out[:, 0], gate, panel_width(target))
    _pack_into(out[:, 1], up, panel_width(target))
    return out


def _matrix_dtype(w: np.ndarray) -> str:
    name = str(w.dtype)
    if w.ndim != 2 or name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"a weight to pack is a matrix of float32, bfloat16 or float16, not {name}{w.shape}")
    return name


def _pack_into(out: np.ndarray, w: np.ndarray, nr: int) -> None:
    """Fill out[panels, k(/2), nr(, 2)] from w[n, k], a few panels at a time; pairs of k move as one 32-bit word."""
    n, k = w.shape
    paired = out.ndim == 4
    step = nr * _PACK_COLUMNS
    for start in range(0, n, step):
        block = w[start : start + step]
        if paired:
            if k % 2:
                block = np.concatenate([block, np.zeros((len(block), 1), w.dtype)], 1)
            block = np.ascontiguousarray(block).view(np.uint32)
        whole = len(block) // nr
        words = out.view(np.uint32)[..., 0] if paired else out
        first = start // nr
        full = block[: whole * nr].reshape(whole, nr, block.shape[1])
        words[first : first + whole] = full.transpose(0, 2, 1)
        if len(block) > whole * nr:
            rest = block[whole * nr :]
            words[first + whole, :, : len(rest)] = rest.T


def product(mr: int, lanes: int, vectors: int, k: int | None, target: Target, *, dot: bool = False) -> Micro:
    """C[mr, vectors*lanes] = A[mr, k] @ B[k, vectors*lanes] in float32 registers; all row-major.

    void(A, lda, B, ldb, C, ldc, k, accumulate): strides in 32-bit words; k words (static where given); where
    `accumulate` is not 0 the product is added to C. With `dot` the words are pairs of bfloat16 and B's are too.
    """
    f = Function(
        f"product{mr}",
        [("ptr", "a"), ("i64", "lda"), ("ptr", "b"), ("i64", "ldb"), ("ptr", "c"), ("i64", "ldc"), ("i64", "k"),
         ("i64", "acc")],
        target,
    )  # fmt: skip
    a, lda, b, ldb, c, ldc, k_arg, accumulate = f.params()
    vec = vector_type("float", lanes)
    depth: Val | int = k_arg if k is None else k
    # One row has too few accumulators to hide the multiply-add's latency: several k go on at once.
    chains = 4 if mr == 1 else 2 if mr == 2 else 1
    rows = [f.at(a, lda * m, "float32") for m in range(mr)]

    def step(index: Val, sums: list[Val]) -> list[Val]:
        at = f.at(b, index * ldb, "float32")
        columns = [f.load(vec, f.at(at, j * lanes, "float32")) for j in range(vectors)]
        if mr <= 2:
            f.prefetch(f.at(at, _PREFETCH_WORDS, "float32"))
        result = []
        for m in range(mr):
            x = f.splat(f.load("float", f.at(rows[m], index, "float32")), lanes)
            for j in range(vectors):
                old = sums[m * vectors + j]
                result.append(_dot(f, x, columns[j], old) if dot else f.fma(x, columns[j], old))
        return result

    def chained(index: Val, sums: list[Val]) -> list[Val]:
        width = mr * vectors
        result: list[Val] = []
        for n in range(chains):
            result += step(index + n, sums[n * width : (n + 1) * width])
        return result

    def zero() -> Val:
        return f.const(0.0, vec)

    width = mr * vectors
    sums = [zero() for _ in range(width * chains)]
    if isinstance(depth, int):
        whole: Val | int = depth // chains * chains
    else:
        whole = depth & -chains
    *sums, end = f.loop(0, whole, chains, sums, chained)
    first = sums[:width]
    if chains > 1:
        *first, _ = f.loop(end, depth, 1, first, step)
        for n in range(1, chains):
            first = [s + t for s, t in zip(first, sums[n * width : (n + 1) * width], strict=True)]
    adds = accumulate.cmp("ne", 0)
    for m in range(mr):
        for j in range(vectors):
            address = f.at(f.at(c, ldc * m, "float32"), j * lanes, "float32")
            total = first[m * vectors + j]
            f.store(f.choose(adds, lambda t=total, p=address: t + f.load(vec, p), lambda t=total: t), address)
    return f.finish()


_PREFETCH_WORDS = 1024


def _dot(f: Function, pairs: Val, weights: Val, total: Val) -> Val:
    """total + the products of both halves of each lane."""
    lanes = f.lanes
    both = [f.op(f"bitcast {v.type} {v.name} to <{2 * lanes} x bfloat>", f"<{2 * lanes} x bfloat>") for v in (pairs, weights)]
    return f.call(total.type, f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", total, *both)
