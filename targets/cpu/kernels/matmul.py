"""Matrix products: linear layers over packed weights, gated MLP projections, batched products of activations.

A weight W[N, K] is packed once into panels of `NR` output columns (two vector registers): panel p holds, for each k, the
NR weights of columns p*NR… side by side, so that both the matrix-vector product (which streams the panels once) and the
register-blocked matrix product (MR rows x NR columns of accumulators) read it in order. 16-bit dtypes keep two
consecutive k together in a 32-bit lane, which is what the bfloat16 dot product wants and is cheap to widen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
from tvm.script.ir_builder import tirx as T

from jisu.compiler import ops
from jisu.compiler.errors import InputError
from jisu.compiler.graph import Op
from jisu.compiler.types import round_up
from jisu.targets.cpu.isa import (
    ITEMSIZE,
    Arg,
    Function,
    Micro,
    Val,
    prim_func,
    require_activation,
    require_dtype,
    vector_type,
)
from jisu.targets.cpu.kernels import amx
from jisu.targets.target import Target

VECTORS = 2  # vector registers per panel row


def panel_width(target: Target) -> int:
    """NR: output columns per panel."""
    return VECTORS * target.lanes("float32")


def block_sizes(target: Target) -> tuple[int, ...]:
    """MR: how many rows of accumulators the register file holds beside the panel row, then smaller blocks for the rest."""
    most = target.schedule.rows or (12 if target.vector_registers >= 32 else 6)
    return (most, *(mr for mr in (8, 4, 2, 1) if mr < most))


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
    return _op_meaning(ops.pack, target, w)


def pack_gated_shape(f: int, k: int, dtype: str, target: Target) -> tuple[int, ...]:
    """Shape of gate[f, k] and up[f, k] packed together: pack_shape with an axis of 2 after the panels."""
    panels, *rest = pack_shape(f, k, dtype, target)
    return (panels, 2, *rest)


def pack_gated(gate: np.ndarray, up: np.ndarray, target: Target) -> np.ndarray:
    """gate[f, k] and up[f, k] packed panel by panel side by side, as `gated_mlp_up` reads them."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(f"gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must have one dtype and shape")
    return _op_meaning(ops.pack_gated, target, gate, up)


def _op_meaning(op: Op, target: Target, *weights: np.ndarray) -> np.ndarray:
    """What the IR's packing op makes of these weights for the target: the layout is defined there alone."""
    pair = 2 if _paired(_matrix_dtype(weights[0])) else 1
    assert op.meaning is not None
    packed: np.ndarray = op.meaning(*weights, panel=panel_width(target), pair=pair)
    return packed


def _matrix_dtype(w: np.ndarray) -> str:
    name = str(w.dtype)
    if w.ndim != 2 or name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"a weight to pack is a matrix of float32, bfloat16 or float16, not {name}{w.shape}")
    return name


def product(
    mr: int, target: Target, *, weights: str = "float32", k: int | None = None, lanes: int = 0, vectors: int = VECTORS,
    accumulate: bool = False, rows_of: str | None = None, columns: int | None = None, prefetch: str = "none",
    turned: bool = False,
) -> Micro:  # fmt: skip
    """C[mr, vectors*lanes] = A[mr, k] @ B[k, vectors*lanes], accumulated in float32 registers; all row-major.

    An element's sum goes from the first k to the last, whatever mr is, so that a row's result doesn't depend on those beside it.
    void(A, lda, B, ldb, C, ldc, k): strides in 32-bit words, k in words of B (static where given). `weights` says what
    a word of B holds: "float32"; "bfloat16" or "float16": two consecutive k, widened, A being float32; "dot": two
    consecutive k in bfloat16, and so has A. With `rows_of` (a dtype) B is a plain matrix of it, `ldb` counts its
    elements, and only its first `columns` are read. With `accumulate` sums start from C. `turned`: A is
    stored as [k, mr], lda being the stride of k. `prefetch`: "stream" asks for B itself, further on; with "next" a further
    argument is an address from which half a cache line per word of B is asked for, since it will be B next.
    """
    f = Function(
        f"product{mr}",
        [("ptr", "a"), ("i64", "lda"), ("ptr", "b"), ("i64", "ldb"), ("ptr", "c"), ("i64", "ldc"), ("i64", "k"),
         *([("ptr", "next")] if prefetch == "next" else [])],
        target,
    )  # fmt: skip
    a, lda, b, ldb, c, ldc, k_arg, *following = f.params()
    lanes = lanes or f.lanes
    vec = vector_type("float", lanes)
    halves = 2 if weights in ("bfloat16", "float16") else 1
    rows = [f.at(a, f.i64(m) if turned else lda * m, "float32") for m in range(mr)]

    def step(index: Val, sums: list[Val]) -> list[Val]:
        at = f.at(b, index * ldb, rows_of or "float32")
        if prefetch == "next":
            f.prefetch(f.at(following[0], index * 8, "float32"))
        elif prefetch == "stream":
            for j in range(0, vectors * lanes * ITEMSIZE[rows_of or "float32"], 64):
                f.prefetch(f.at(at, ahead(target) + j, "uint8"))
        if rows_of is None:
            cols = [_columns(f, f.at(at, j * lanes, "float32"), weights, lanes) for j in range(vectors)]
        else:
            cols = [[f.load_f32(at, j * lanes, rows_of, masks[j], lanes)] for j in range(vectors)]
        result = list(sums)
        for m in range(mr):
            for half in range(halves):
                place = index * lda if turned else index * halves + half
                x = f.splat(f.load("float", f.at(rows[m], place, "float32")), lanes)
                for j in range(vectors):
                    old = result[m * vectors + j]
                    new = dot(f, x, cols[j][0], old) if weights == "dot" else f.fma(x, cols[j][half], old)
                    result[m * vectors + j] = new
        return result

    left = [(columns or vectors * lanes) - j * lanes for j in range(vectors)]
    masks = [f.mask_below(c, lanes) if c < lanes else None for c in left]

    out = [f.at(f.at(c, ldc * m, "float32"), j * lanes, "float32") for m in range(mr) for j in range(vectors)]
    start = [f.load(vec, address) if accumulate else f.const(0.0, vec) for address in out]
    *sums, _ = f.loop(0, k_arg if k is None else k, 1, start, step)
    for total, address in zip(sums, out, strict=True):
        f.store(total, address)
    return f.finish()


def ahead(target: Target) -> int:
    """Bytes between a streamed weight and the one that is asked for meanwhile."""
    return target.schedule.ahead or 8192


def _columns(f: Function, address: Val, weights: str, lanes: int) -> list[Val]:
    """One vector of B's words as float32: the word itself, or its two halves."""
    if weights in ("float32", "dot"):
        return [f.load(vector_type("float", lanes), address)]
    return words_as_floats(f, f.load(vector_type("i32", lanes), address), weights)


def words_as_floats(f: Function, words: Val, weights: str) -> list[Val]:
    """Both halves of i32 lanes, which are bfloat16 or float16, as float32."""
    if weights == "bfloat16":
        return [f.cast("bitcast", part, "float") for part in (words << 16, words & -65536)]
    return [
        f.cast("fpext", f.cast("bitcast", f.cast("trunc", p, "i16"), "half"), "float") for p in (words, words >> 16)
    ]


def dot(f: Function, pairs: Val, weights: Val, total: Val) -> Val:
    """total + the products of both bfloat16 halves of each lane."""
    wide = vector_type("bfloat", 2 * f.lanes)
    both = [f.op(f"bitcast {v.type} {v.name} to {wide}", wide) for v in (pairs, weights)]
    return f.call(total.type, f"llvm.x86.avx512bf16.dpbf16ps.{32 * f.lanes}", total, *both)


def uses_dot(dtype: str, target: Target) -> bool:
    """Whether pairs of inputs are multiplied at once: where the machine can, and does it faster than widening them."""
    # The peak of a machine with tiles is theirs; Intel's vector units are slower at it than at float32.
    faster = target.peak_flops("bfloat16") > target.peak_flops("float32") and not target.has("amx-bf16")
    return dtype == "bfloat16" and target.has("avx512bf16") and target.vector_bytes == 64 and faster


def row_blocks(f: Function, rows: Val, run: Callable[[int, Val], None], sizes: Sequence[int]) -> None:
    """Cover 0…rows with blocks of these sizes (the last is 1), largest first: run(size, first row)."""
    m = f.i64(0)
    for mr in sizes:

        def block(i: Val, _: list[Val], mr: int = mr) -> None:
            run(mr, i)

        (m,) = f.loop(m, rows - (mr - 1), mr, [], block)


def copy_row(n: int, dtype: str, out: str, target: Target, *, padded: int | None = None) -> Micro:
    """void(x, y): y[0:padded] = x[0:n] of `dtype`, converted to `out`, then zeros."""
    f = Function("copy", [("ptr", "x"), ("ptr", "y")], target)
    x, y = f.params()

    def body(i: Val, mask: Val | None, _: list[Val]) -> None:
        f.store_f32(f.load_f32(x, i, dtype, mask), y, i, out, mask)

    def raw(i: Val, mask: Val | None, _: list[Val]) -> None:
        scalar = {1: "i8", 2: "i16", 4: "i32"}[ITEMSIZE[dtype]]
        f.store_raw(f.load_raw(scalar, f.at(x, i, scalar), mask), f.at(y, i, scalar), mask)

    f.vectors(n, raw if dtype == out else body)
    for i in range(n, padded or n):
        f.store(f.const(0, "i16" if ITEMSIZE[out] == 2 else "float"), f.at(y, i, out))
    return f.finish()


class Reader(Protocol):
    """How a layer of k inputs reads its weights, and what it wants of its x."""

    @property
    def operands(self) -> tuple[str, ...]:
        """What stands in memory behind the weights `w`."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Dtypes of operands (x too) that differ from the layer's."""
        ...

    @property
    def scratch_words(self) -> int:
        """32-bit words that a task needs besides."""
        ...

    @property
    def record(self) -> int:
        """Bytes of a row of x where that is a record; 0 where x holds numbers of the layer's dtype."""
        ...

    @property
    def block(self) -> int:
        """Rows that are multiplied at once."""
        ...

    @property
    def row(self) -> tuple[str, int]:
        """How rows of x that aren't records are arranged for the product: their dtype ("float32", or "bfloat16" in pairs) and the inputs,
        zeros at the end included."""
        ...

    def shapes(self, panels: int, parts: tuple[int, ...]) -> dict[str, tuple[int | str, ...]]:
        """Shapes of `w` and the operands."""
        ...

    def multipliers(self, f: Function, at: Mapping[str, Val], lda: int) -> Sequence[Callable[[Val, Val], None]]:
        """What multiplies all rows (`lda` 32-bit words apart at `a`) by a panel, given its number and a tile [rows, NR].

        Where there are several, each does a part of the inputs, and all but the first add to the tile.
        """
        ...


def chunk_rows(target: Target) -> int:
    """Rows of x that one task multiplies, if the cache holds as many."""
    return target.schedule.chunk or 240


def part_inputs(target: Target) -> int:
    """Inputs float32 of a chunk's rows that stay in the second cache while panels go by."""
    return target.cache_bytes(2, 1 << 20) // 2 // (4 * chunk_rows(target))


@attrs.frozen
class Floats:
    """Weights that are floats of the layer's dtype, in the layout of `pack`."""

    k: int
    dtype: str
    target: Target
    operands: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    record: int = 0

    @property
    def depth(self) -> int:
        """Words per output."""
        return -(-self.k // 2) if _paired(self.dtype) else self.k

    @property
    def tiled(self) -> bool:
        """Whether a tile unit multiplies, however many rows there are."""
        return self.dtype == "bfloat16" and amx.multiplies("bf16", 2 * self.k, self.target)

    @property
    def scratch_words(self) -> int:
        return amx.CONFIG_WORDS if self.tiled else 0

    @property
    def block(self) -> int:
        return amx.BLOCK if self.tiled else block_sizes(self.target)[0]

    @property
    def row(self) -> tuple[str, int]:
        paired = 2 if _paired(self.dtype) else 1
        narrow = self.tiled or uses_dot(self.dtype, self.target)
        return self.dtype if narrow else "float32", paired * self.depth

    def shapes(self, panels: int, parts: tuple[int, ...]) -> dict[str, tuple[int | str, ...]]:
        _, *rest = pack_shape(1, self.k, self.dtype, self.target)
        return {"w": (panels, *parts, *rest)}

    def multipliers(self, f: Function, at: Mapping[str, Val], lda: int) -> Sequence[Callable[[Val, Val], None]]:
        nr, depth, sizes = panel_width(self.target), self.depth, block_sizes(self.target)
        kind = "dot" if self.row[0] == "bfloat16" else self.dtype
        words = 2 if kind in ("bfloat16", "float16") else 1  # of a row, per word of the panel
        room = part_inputs(self.target) // words
        parts = -(-depth // (self.target.schedule.depth or max(room // 64 * 64, 64)))
        step = round_up(-(-depth // parts), 16)

        def part(first: int) -> Callable[[Val, Val], None]:
            deep = min(step, depth - first)
            if self.tiled:
                return self._tiles(f, at, lda, first, deep)
            # Few rows read weights from memory as a stream; whole blocks of rows bring the next panel nearer meanwhile.
            products = {
                mr: product(mr, self.target, weights=kind, k=deep, accumulate=first > 0,
                            prefetch="next" if mr == sizes[0] else "stream")
                for mr in sizes
            }  # fmt: skip

            def of(number: Val, tile: Val) -> None:
                here = f.at(at["w"], at["w0"] + number * (depth * nr) + first * nr, "float32")

                def run(mr: int, m: Val) -> None:
                    rows, out = f.at(at["a"], m * lda + first * words, "float32"), f.at(tile, m * nr, "float32")
                    following = []
                    if mr == sizes[0]:
                        quarter = f.minimum(m / mr, 3) * (deep * 8)
                        following = [f.at(here, quarter + depth * nr, "float32")]
                    f.use(products[mr], rows, lda, here, nr, out, nr, deep, *following)

                row_blocks(f, at["rows"], run, sizes)

            return of

        return [part(first) for first in range(0, depth, step)]

    def _tiles(self, f: Function, at: Mapping[str, Val], lda: int, first: int, deep: int) -> Callable[[Val, Val], None]:
        """What multiplies all rows by `deep` words of a panel from the `first` on, in the tile unit."""
        nr, size = panel_width(self.target), amx.step_bytes(4 * deep)
        g = Function("tiles", [*(("ptr", n) for n in ("a", "w", "c", "config")), ("i64", "rows")], self.target)
        a, w, c, config, rows = g.params()
        tiles, row_bytes, line = amx.Tiles(g, config, size, 4 * nr), g.i64(4 * lda), g.i64(4 * nr)

        def block(m: Val, count: int, _: Val) -> None:
            here, out = g.at(a, m * lda, "float32"), g.at(c, m * nr, "float32")
            if first:
                tiles.load_sums(count, out, line)
            else:
                tiles.clear(count)
            g.loop(0, deep, size // 4, [], lambda i, _: tiles.multiply(
                "tdpbf16ps", count, g.at(here, i, "float32"), row_bytes, g.at(w, i * nr, "float32"),
                ahead(self.target) if count == 1 else 0))  # fmt: skip
            tiles.store_sums(count, out, line)

        tiles.blocks(rows, block)
        micro = g.finish()

        def of(number: Val, tile: Val) -> None:
            here = f.at(at["w"], at["w0"] + number * (self.depth * nr) + first * nr, "float32")
            f.use(micro, f.at(at["a"], first, "float32"), here, tile, at["scratch"], at["rows"])

        return of


@attrs.frozen
class Layer:
    """A linear layer over packed weights as tasks: each computes a chunk of rows by a group of panels."""

    task: Micro
    operands: tuple[str, ...]
    panels: int
    chunk: int  # rows of x that a task keeps in its cache, at most
    block: int  # rows that its product does at once
    tile_words: int
    rows_per_core: int  # rows from which on a task is compute bound
    shares: int  # tasks that panels are then dealt to
    scratch_words: int  # what its reader needs
    arranged: Arranged | None  # None where x is read as it lies

    @property
    def micros(self) -> list[Micro]:
        """What a PrimFunc that calls it must link."""
        return [self.task, *([] if self.arranged is None else [self.arranged.copy])]

    def chunks(self, m: Any) -> tuple[Any, Any]:
        """For m rows (TIR): how many chunks, and rows of each, nearly equal and whole blocks."""
        count = T.max(T.ceildiv(m, T.int64(self.chunk)), T.int64(1))
        return count, T.ceildiv(T.ceildiv(m, count), T.int64(self.block)) * self.block

    def groups(self, rows: Any) -> Any:
        """Panels per task for this many rows (TIR)."""
        # A streamed weight wants equal shares for every thread.
        few, many = -(-self.panels // 32), max(-(-self.panels // self.shares), min(3, self.panels))
        return T.Select(rows <= self.rows_per_core, T.int64(few), T.int64(many))

    def rows(self, x: Any, m: Any, index: Any = None) -> Any:
        """Emit (TIR) what brings all m rows into the form that tasks read; the pointer that they take for x."""
        return x if self.arranged is None else self.arranged.emit(x, m, index)

    def call(self, data: Sequence[Any], *scalars: Any) -> None:
        """Emit one task (TIR): scalars are first row, rows, first panel, end of panels, word offset into w."""
        words = [w for w in (self.tile_words, self.scratch_words) if w]
        self.task.call(*data, *(T.alloc_buffer((w,), "float32").data for w in words), *scalars)


@attrs.frozen
class Arranged:
    """Rows as products read them: in the dtype of their arithmetic, an odd number of cache lines apart.

    copy: void(x, [index], a, first row, end), row i coming from x[index[i] / gather].
    """

    copy: Micro
    words: int
    k: int

    def emit(self, x: Any, m: Any, index: Any = None) -> Any:
        """TIR that arranges m rows; the pointer to them."""
        a = T.alloc_buffer((m * self.words,), "float32")
        per_task = max(1, (1 << 14) // self.k)
        data = [x, *([] if index is None else [index]), a.data]
        in_tasks(T.ceildiv(m, T.int64(per_task)), lambda t: self.copy.call(
            *data, t * per_task, T.min(m, (t + 1) * per_task)), serial=m * self.k <= 1 << 16)  # fmt: skip
        return a.data


def layer(
    name: str, n: int, k: int, dtype: str, target: Target, *, gated: bool = False, bias: bool = False,
    activation: str = "none", residual: bool = False, scale: float | None = None, softcap: float | None = None,
    out_dtype: str | None = None, gather: int = 0, reader: Reader | None = None,
) -> Layer:  # fmt: skip
    """The tasks of a linear layer; with `gather` g, row i is computed from x[index[i] / g].

    reader: how weights are stored, floats unless given; its operands follow the weights.
    """
    require_dtype(dtype, target)
    require_activation(activation)
    out = out_dtype or dtype
    require_dtype(out, target)
    reads: Reader = reader or Floats(k, dtype, target)
    nr, parts = panel_width(target), 2 if gated else 1
    panels = -(-n // nr)
    record, (row_dtype, row_inputs) = reads.record, reads.row
    lines = -(-row_inputs * ITEMSIZE[row_dtype] // 64)
    block = reads.block
    # Rows of float32 are read where they lie, unless more of a block fall into one set of the nearest cache than that has ways.
    ways, in_a_set = target.cache_bytes(1, 1 << 15) // 4096, block * math.gcd(k // 16, 64) // 64
    as_it_lies = bool(record) or (dtype == "float32" and not gather and k % 16 == 0 and in_a_set <= ways)
    lda = record // 4 or (k if as_it_lies else 16 * (lines | 1))  # else an odd number of cache lines apart
    biases = (["bias_gate", "bias_up"] if gated else ["bias"]) if bias else []
    operands = (
        "x",
        "w",
        *reads.operands,
        *biases,
        *(["residual"] if residual else []),
        "y",
    )
    scalars = ("m0", "rows", "p0", "p1", "w0")
    buffers = ("tile", *(["scratch"] if reads.scratch_words else []))
    f = Function(name, [("ptr", o) for o in (*operands, *buffers)] + [("i64", s) for s in scalars], target)
    at = dict(zip((*operands, *buffers, *scalars), f.params(), strict=True))
    rows = at["rows"]
    at["a"] = f.at(at["x"], at["m0"] * lda, "float32")
    multipliers = reads.multipliers(f, at, lda)
    half_l2 = target.cache_bytes(2, 1 << 20) // 2
    chunk = max(block, min(chunk_rows(target), half_l2 // (4 * -(-lda // len(multipliers)))) // block * block)

    def finish(v: Val, gate: Val | None, y_at: Val, mask: Val | None) -> Val:
        if scale is not None:
            v = f.rounded(v * scale, dtype)
        if softcap is not None:
            v = f.rounded(f.rounded(f.tanh(f.rounded(v / softcap, dtype)), dtype) * softcap, dtype)
        if activation != "none":
            v = f.rounded(f.activate(activation, v), dtype)
        if gate is not None:
            v = f.rounded(v * gate, dtype)
        if residual:
            v = f.rounded(v + f.load_f32(at["residual"], y_at, dtype, mask), dtype)
        return v

    def epilogue(column: Val, tile: Val, row: Val, masks: list[Val | None]) -> None:
        y_row = (at["m0"] + row) * n + column
        for j, mask in enumerate(masks):
            here = row * nr + j * f.lanes
            values = []
            for part in range(parts):
                v = f.load(vector_type("float", f.lanes), f.at(tile, here + part * chunk * nr, "float32"))
                if bias:
                    v = v + f.load_f32(at[biases[part]], column + j * f.lanes, dtype, mask)
                values.append(f.rounded(v, dtype))
            y_at = y_row + j * f.lanes
            f.store_f32(finish(values[0], values[1] if gated else None, y_at, mask), at["y"], y_at, out, mask)

    together = 1 if len(multipliers) == 1 else 4  # panels that a part of the rows is read for before the next one is
    tile_words = parts * chunk * nr

    def finished(p: Val, tile: Val) -> None:
        column = p * nr

        def full() -> None:
            f.loop(0, rows, 1, [], lambda r, _: epilogue(column, tile, r, [None] * VECTORS))

        def tail() -> None:
            masks: list[Val | None] = [f.mask_below(n - column - j * f.lanes) for j in range(VECTORS)]
            f.loop(0, rows, 1, [], lambda r, _: epilogue(column, tile, r, masks))

        if n % nr == 0:
            full()
        else:
            f.when(p < panels - 1, full, tail)

    def some(first: Val, _: list[Val]) -> None:
        for multiply in multipliers:

            def one(i: Val, _: list[Val], multiply: Callable[[Val, Val], None] = multiply) -> None:
                p, tile = first + i, f.at(at["tile"], i * tile_words, "float32")
                for part in range(parts):
                    multiply(p * parts + part, f.at(tile, part * chunk * nr, "float32"))
                if multiply is multipliers[-1]:
                    finished(p, tile)

            f.loop(0, f.minimum(at["p1"] - first, together), 1, [], one)

    f.loop(at["p0"], at["p1"], together, [], some)
    arranged = None if as_it_lies else _arranged(k, dtype, row_dtype, row_inputs, lda, gather, target)
    shares = target.schedule.shares or 16
    return Layer(
        f.finish(), operands, panels, chunk, block, together * tile_words, 8, shares, reads.scratch_words, arranged
    )


def _arranged(k: int, dtype: str, row_dtype: str, inputs: int, words: int, gather: int, target: Target) -> Arranged:
    f = Function(
        "arrange",
        [*(("ptr", n) for n in ("x", *(["index"] if gather else []), "a")), ("i64", "first"), ("i64", "last")],
        target,
    )
    x, *index, a, first, last = f.params()
    copy = copy_row(k, dtype, row_dtype, target, padded=inputs)

    def row(i: Val, _: list[Val]) -> None:
        source = f.load("i64", f.at(index[0], i, "int64")) / gather if gather else i
        f.use(copy, f.at(x, source * k, dtype), f.at(a, i * words, "float32"))

    f.loop(first, last, 1, [], row)
    return Arranged(f.finish(), words, k)


def layer_func(
    name: str,
    n: int,
    k: int,
    dtype: str,
    target: Target,
    *,
    gated: bool = False,
    out_dtype: str | None = None,
    **options: Any,
) -> Any:
    """The PrimFunc of one `layer`, whose parameters are its operands; options are those of `layer`."""
    plan = layer(name, n, k, dtype, target, gated=gated, out_dtype=out_dtype, **options)
    reads: Reader = options.get("reader") or Floats(k, dtype, target)
    shapes: dict[str, tuple[int | str, ...]] = {b: (n,) for b in ("bias", "bias_gate", "bias_up")}
    shapes |= {"x": ("m", reads.record or k), "residual": ("m", n), "y": ("m", n)}
    shapes |= reads.shapes(plan.panels, (2,) if gated else ())
    dtypes = {"y": out_dtype or dtype, **reads.dtypes}

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        m = dims["m"]
        group = plan.groups(m)
        chunks, chunk = plan.chunks(m)
        groups = T.ceildiv(T.int64(plan.panels), group)
        tasks = T.Select(m == 0, T.int64(0), groups * chunks)

        x = plan.rows(buffers["x"].data, m)

        def run(t: Any) -> None:
            # Panels go by while the rows of a chunk stay in the cache.
            p0, m0 = T.floormod(t, groups) * group, T.floordiv(t, groups) * chunk
            plan.call([x, *(buffers[o].data for o in plan.operands[1:])], m0, T.min(m - m0, chunk), p0,
                      T.min(p0 + group, T.int64(plan.panels)), 0)  # fmt: skip

        in_tasks(tasks, run, serial=m * (n * k * (2 if gated else 1)) <= SERIAL_WORK)

    return prim_func(name, [Arg(o, shapes[o], dtypes.get(o, dtype)) for o in plan.operands], plan.micros, body)


SERIAL_WORK = 1 << 16  # multiply-adds that one core does in less time than waking another takes


def in_tasks(tasks: Any, run: Callable[[Any], None], serial: Any = False) -> None:
    """TIR under construction: run(0) … run(tasks - 1), in parallel unless `serial` (a condition) holds."""
    if serial is False:
        with T.parallel(T.int64(0), tasks) as t:
            run(t)
        return
    with T.If(serial):
        with T.Then():
            with T.serial(T.int64(0), tasks) as t:
                run(t)
        with T.Else():
            with T.parallel(T.int64(0), tasks) as t:
                run(t)


def linear(
    n: int, k: int, dtype: str, target: Target, *, bias: bool = False, activation: str = "none", residual: bool = False,
    scale: float | None = None, softcap: float | None = None, out_dtype: str | None = None,
) -> Any:  # fmt: skip
    """PrimFunc y[M, n] = act(cap(scale * (x[M, k] W^T + b))) + residual, with W[n, k] packed by `pack`.

    Parameters in order: x[M, k], w[pack_shape], bias[n] if `bias`, residual[M, n] if `residual`, y[M, n] (`out_dtype`).
    Sums are float32; every step that PyTorch's eager mode writes out is rounded to `dtype`, the last then converted.
    cap(v) = softcap * tanh(v / softcap). Raises TargetError for a dtype or activation that the kernels lack.
    """
    return layer_func("linear", n, k, dtype, target, bias=bias, activation=activation, residual=residual, scale=scale,
                       softcap=softcap, out_dtype=out_dtype)  # fmt: skip


def projections(
    outputs: Sequence[int], k: int, dtype: str, target: Target, *, bias: bool = False, reader: Reader | None = None,
) -> Any:  # fmt: skip
    """PrimFunc y_i[M, outputs[i]] = x[M, k] W_i^T + b_i for several layers in one parallel region.

    Parameters in order: x[M, k], every w_i, the same of every operand of the reader, every b_i[outputs[i]] if `bias`, every y_i. reader: as
    of `layer`.
    """
    reads: Reader = reader or Floats(k, dtype, target)
    plans = [layer("linear", n, k, dtype, target, bias=bias, reader=reads) for n in outputs]
    shapes = [{**reads.shapes(plan.panels, ()), "bias": (n,)} for plan, n in zip(plans, outputs, strict=True)]
    args = [Arg("x", ("m", reads.record or k), reads.dtypes.get("x", dtype))]
    for name in ("w", *reads.operands, *(["bias"] if bias else [])):
        args += [Arg(f"{name}{i}", shape[name], reads.dtypes.get(name, dtype)) for i, shape in enumerate(shapes)]
    args += [Arg(f"y{i}", ("m", n), dtype) for i, n in enumerate(outputs)]

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        m = dims["m"]
        chunks, chunk = plans[0].chunks(m)  # which depend on k alone
        groups = [plan.groups(m) for plan in plans]
        counts = [T.ceildiv(T.int64(plan.panels), group) * chunks for plan, group in zip(plans, groups, strict=True)]
        ends = [sum(counts[: i + 1], start=T.int64(0)) for i in range(len(counts))]
        x = plans[0].rows(buffers["x"].data, m)

        def run(t: Any, i: int = 0) -> None:
            def one() -> None:
                plan, group = plans[i], groups[i]
                own = t - (ends[i] - counts[i])
                parts = T.floordiv(counts[i], chunks)
                p0, m0 = T.floormod(own, parts) * group, T.floordiv(own, parts) * chunk
                data = [buffers[f"{o}{i}"].data for o in plan.operands[1:]]
                plan.call([x, *data], m0, T.min(m - m0, chunk), p0, T.min(p0 + group, T.int64(plan.panels)), 0)

            if i == len(plans) - 1:
                one()
                return
            with T.If(t < ends[i]):
                with T.Then():
                    one()
                with T.Else():
                    run(t, i + 1)

        in_tasks(T.Select(m == 0, T.int64(0), ends[-1]), run, serial=m * (sum(outputs) * k) <= SERIAL_WORK)

    micros = {micro.symbol: micro for plan in plans for micro in plan.micros}
    return prim_func("projections", args, list(micros.values()), body)


def gated_mlp_up(f: int, k: int, dtype: str, target: Target, *, activation: str = "silu", bias: bool = False) -> Any:
    """PrimFunc y[M, f] = act(x Wg^T + bg) * (x Wu^T + bu), with both weights packed together by `pack_gated`.

    Parameters in order: x[M, k], w[pack_gated_shape], bias_gate[f] and bias_up[f] if `bias`, y[M, f].
    """
    return layer_func("gated_mlp_up", f, k, dtype, target, gated=True, bias=bias, activation=activation)


def matmul(dtype: str, target: Target, *, out_dtype: str | None = None, transpose_b: bool = False) -> Any:
    """PrimFunc y[B, M, N] = a[B, M, K] @ b[B or 1, K, N] of activations, all dimensions symbolic.

    Parameters in order: a, b (b[B or 1, N, K] with `transpose_b`), y. Sums are float32, rounded once to `out_dtype`. Each
    task packs the columns of b that it needs, then runs the same register-blocked product as the linear layers.
    """
    require_dtype(dtype, target)
    out = out_dtype or dtype
    require_dtype(out, target)
    nr, block = panel_width(target), block_sizes(target)[0]
    chunk = 8 * block  # rows per task
    depth = 256  # k at a time, so that a packed panel stays in the nearest cache
    scalars = ("i", "j", "m0", "rows", "n0", "m", "n", "k")
    f = Function("matmul", [(t, o) for t, o in (*(("ptr", o) for o in ("a", "b", "y", "scratch")),
                                                *(("i64", s) for s in scalars))], target)  # fmt: skip
    a, b, y, scratch, i, j, m0, rows, n0, m, n, k = f.params()
    left, right = scratch, f.at(scratch, chunk * depth, "float32")
    tile = f.at(right, depth * nr, "float32")
    a_base, b_base, y_base = (i * m + m0) * k, j * n * k, (i * m + m0) * n + n0
    columns = f.minimum(n - n0, nr)
    products = {mr: product(mr, target, accumulate=True) for mr in block_sizes(target)}
    zero = f.const(0.0, vector_type("float", f.lanes))
    f.loop(0, rows * nr, f.lanes, [], lambda t, _: f.store_f32(zero, tile, t, "float32"))

    def slab(k0: Val, _: list[Val]) -> None:
        deep = f.minimum(k - k0, depth)

        def copy_left(r: Val, _: list[Val]) -> None:
            f.vectors(deep, lambda c, mask, _: f.store_f32(
                f.load_f32(a, a_base + r * k + k0 + c, dtype, mask), left, r * depth + c, "float32", mask))  # fmt: skip

        def copy_right(r: Val, _: list[Val]) -> None:
            for v in range(VECTORS):
                mask = f.mask_below(columns - v * f.lanes)
                source = b_base + (k0 + r) * n + n0 + v * f.lanes
                f.store_f32(f.load_f32(b, source, dtype, mask), right, r * nr + v * f.lanes, "float32")

        def turn_right(c: Val, _: list[Val]) -> None:
            f.loop(0, deep, 1, [], lambda r, _: f.store(
                f.load_f32(b, b_base + (n0 + c) * k + k0 + r, dtype, None, 1), f.at(right, r * nr + c, "float32")))  # fmt: skip

        f.loop(0, rows, 1, [], copy_left)
        if transpose_b:
            f.loop(0, deep * nr, f.lanes, [], lambda t, _: f.store_f32(zero, right, t, "float32"))
            f.loop(0, columns, 1, [], turn_right)
        else:
            f.loop(0, deep, 1, [], copy_right)
        row_blocks(f, rows, lambda mr, r: f.use(
            products[mr], f.at(left, r * depth, "float32"), depth, right, nr, f.at(tile, r * nr, "float32"), nr, deep),
            block_sizes(target))  # fmt: skip

    f.loop(0, k, depth, [], slab)
    f.loop(0, rows, 1, [], lambda r, _: f.vectors(columns, lambda c, mask, _: f.store_f32(
        f.load_f32(tile, r * nr + c, "float32", mask), y, y_base + r * n + c, out, mask)))  # fmt: skip
    micro = f.finish()

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        batch, m, n, k = (dims[d] for d in ("batch", "m", "n", "k"))
        with T.Assert(T.Or(dims["batch_b"] == 1, dims["batch_b"] == batch), "matmul: the batches don't broadcast"):
            pass
        chunks, panels = T.max(T.ceildiv(m, chunk), T.int64(1)), T.max(T.ceildiv(n, nr), T.int64(1))

        def run(t: Any) -> None:
            scratch = T.alloc_buffer((chunk * depth + depth * nr + chunk * nr,), "float32")
            one, i = T.floormod(t, chunks * panels), T.floordiv(t, chunks * panels)
            m0 = T.floormod(one, chunks) * chunk
            micro.call(*(buffers[o].data for o in ("a", "b", "y")), scratch.data, i,
                       T.Select(dims["batch_b"] == 1, T.int64(0), i), m0, T.min(m - m0, T.int64(chunk)),
                       T.floordiv(one, chunks) * nr, m, n, k)  # fmt: skip

        tasks = T.Select(T.Or(m == 0, n == 0), T.int64(0), batch * chunks * panels)
        in_tasks(tasks, run, serial=batch * m * n * k <= SERIAL_WORK * 4)

    b_shape = ("batch_b", "n", "k") if transpose_b else ("batch_b", "k", "n")
    args = [Arg("a", ("batch", "m", "k"), dtype), Arg("b", b_shape, dtype), Arg("y", ("batch", "m", "n"), out)]
    return prim_func("matmul", args, [micro], body)
