"""Linear layers over sparse weights in panels (see `ops.sparse`), for machines with AVX-512's expanding instructions.

A word of two inputs has 64 bits for a panel of 32 outputs. The kept numbers are loaded from where they stand and spread
over a register's lanes by the bits; the position goes on by their count. One row is multiplied while the weights are
expanded; for several, each task expands a panel once and multiplies by all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import ITEMSIZE, Function, Micro, Val, require_dtype, vector_type
from jisu.targets.cpu.kernels.matmul import (
    PREFETCH_WORDS,
    VECTORS,
    Codes,
    block_sizes,
    dot,
    layer_func,
    level,
    panel_width,
    product,
    row_blocks,
    uses_dot,
    words_as_floats,
)
from jisu.targets.target import Target


def expands(dtype: str, target: Target) -> bool:
    """Whether the target has the instructions that expand float32, or smaller numbers ("uint8": codes)."""
    needed = ("avx512f",) if dtype == "float32" else ("avx512f", "avx512vbmi2")
    return target.vector_bytes == 64 and target.has(*needed)


@attrs.frozen
class Sparse:
    """How a layer of `k` inputs reads sparse weights of `dtype`, or of codes."""

    k: int
    dtype: str
    target: Target
    codes: Codes | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """What stands in memory behind the values."""
        return ("mask", "starts", *(("scales",) if self.codes else ()))

    @property
    def words(self) -> int:
        """Pairs of inputs."""
        return -(-self.k // 2)

    @property
    def dots(self) -> bool:
        """Whether pairs of numbers are multiplied at once."""
        return self.codes is None and uses_dot(self.dtype, self.target)

    @property
    def _paired(self) -> bool:
        """Whether two inputs of an output stand side by side."""
        return self.codes is None and self.dtype != "float32"

    @property
    def scratch_words(self) -> int:
        """32-bit words of an expanded panel."""
        return self.words * panel_width(self.target) * (1 if self._paired else 2)

    def shapes(self, panels: int, parts: tuple[int, ...], size: str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the operands."""
        nr = panel_width(self.target)
        shapes: dict[str, tuple[int | str, ...]] = {
            "w": (size,),
            "mask": (panels, *parts, self.words, nr // 4),
            "starts": (panels, *parts),
        }
        if self.codes:
            shapes["scales"] = (panels, *parts, self.codes.groups(self.k), 2, nr)
        return shapes

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtypes of the operands that differ from the layer's."""
        coded = {"w": "uint8", "scales": "float32"} if self.codes else {}
        return {"mask": "uint8", "starts": "int64", **coded}

    def multiplier(self, f: Function, at: Mapping[str, Val], lda: int) -> Callable[[Val, Val], None]:
        """What multiplies all copied rows by a panel, given its number and a tile."""
        nr, target = panel_width(self.target), self.target
        sizes = block_sizes(target)
        kind = "dot" if self.dots else self.dtype if self._paired else "float32"
        depth = self.words if self._paired else 2 * self.words
        products = {mr: product(mr, target, weights=kind, k=depth) for mr in sizes}
        single, whole = self._walk(multiply=True), self._walk(multiply=False)
        rows = at["rows"]

        def of(number: Val, tile: Val) -> None:
            first = f.load("i64", f.at(at["starts"], number, "int64"))
            bits = f.at(at["mask"], number * (self.words * nr // 4), "i8")
            coded = []
            if self.codes:
                coded = [f.at(at["scales"], number * (self.codes.groups(self.k) * 2 * nr), "float32")]

            def many() -> None:
                f.use(whole, at["w"], bits, first, *coded, at["expanded"])
                row_blocks(
                    f, rows, lambda mr, m: f.use(
                        products[mr], f.at(at["a"], m * lda, "float32"), lda, at["expanded"], nr,
                        f.at(tile, m * nr, "float32"), nr, depth,
                    ), target,
                )  # fmt: skip

            f.when(rows.cmp("eq", 1), lambda: f.use(single, at["w"], bits, first, *coded, at["a"], tile), many)

        return of

    def _walk(self, multiply: bool) -> Micro:
        """void(values, mask, first value, [scales,] out): out = the expanded panel; or, to multiply,

        void(values, mask, first value, [scales,] a, out): out[NR] = a[k] @ panel.
        """
        pointers = [("ptr", "w"), ("ptr", "bits"), ("i64", "first"), *([("ptr", "scales")] if self.codes else [])]
        f = Function("sparse_row" if multiply else "expand", [*pointers, *([("ptr", "a")] if multiply else []), ("ptr", "out")], self.target)  # fmt: skip
        at = dict(zip([n for _, n in f._params], f.params(), strict=True))
        nr, vec = panel_width(self.target), vector_type("float", f.lanes)
        width = VECTORS if self.dots else 2 * VECTORS  # accumulators of one word
        chains = 8 // width if multiply else 1

        def word(index: Val, position: Val, sums: list[Val], group: list[Val]) -> tuple[list[Val], Val]:
            columns, after = self._columns(f, at, index, position, group)
            if not multiply:
                lanes = nr if self._paired else 2 * nr
                for i, v in enumerate(columns):
                    f.store(v, f.at(at["out"], index * lanes + i * f.lanes, "float32"))
                return sums, after
            if self.dots:
                pair = f.splat(f.load("float", f.at(at["a"], index, "float32")), f.lanes)
                return [dot(f, pair, w, s) for w, s in zip(columns, sums, strict=True)], after
            if self._paired:  # halves of each word
                split = [words_as_floats(f, f.cast("bitcast", v, "i32"), self.dtype) for v in columns]
                columns = [part[half] for half in (0, 1) for part in split]
            xs = [f.splat(f.load("float", f.at(at["a"], index * 2 + i, "float32")), f.lanes) for i in (0, 1)]
            return [f.fma(xs[i // VECTORS], w, sums[i]) for i, w in enumerate(columns)], after

        def run(start: Val | int, stop: Val | int, carried: list[Val], group: list[Val]) -> list[Val]:
            def several(index: Val, values: list[Val]) -> list[Val]:
                position, new = values[0], []
                for n in range(chains):
                    sums, position = word(index + n, position, values[1 + n * width : 1 + (n + 1) * width], group)
                    new += sums
                return [position, *new]

            def one(index: Val, values: list[Val]) -> list[Val]:
                sums, position = word(index, values[0], values[1:], group)
                return [position, *sums]

            if chains == 1:
                return f.loop(start, stop, 1, carried, one)[:-1]
            *carried, end = f.loop(start, f.i64(stop) - (chains - 1), chains, carried, several)
            *first, _ = f.loop(end, stop, 1, carried[: 1 + width], one)
            return [*first, *carried[1 + width :]]

        carried = [at["first"], *([f.const(0.0, vec)] * (width * chains if multiply else 0))]
        if self.codes is None:
            carried = run(0, self.words, carried, [])
        else:
            each = self.codes.group // 2 or self.words

            def group(i: Val, values: list[Val]) -> list[Val]:
                scales = f.at(at["scales"], i * (2 * nr), "float32")
                loaded = [f.load(vec, f.at(scales, j * f.lanes, "float32")) for j in range(2 * VECTORS)]
                return run(i * each, f.minimum(i * each + each, self.words), values, loaded)

            *carried, _ = f.loop(0, self.codes.groups(self.k), 1, carried, group)
        for j in range(VECTORS if multiply else 0):
            total, *rest = carried[1 + j :: VECTORS]
            for part in rest:
                total = total + part
            f.store(total, f.at(at["out"], j * f.lanes, "float32"))
        return f.finish()

    def _columns(
        self, f: Function, at: Mapping[str, Val], index: Val, position: Val, group: list[Val]
    ) -> tuple[list[Val], Val]:
        """The registers float32 (16-bit numbers in pairs) of a word, and the position behind it.

        group: of codes, two registers of scales and two of shifts.
        """
        bits = f.load("i64", f.at(at["bits"], index * 8, "i8"))
        after = position + _count(f, bits)
        size = 1 if self.codes else ITEMSIZE[self.dtype]
        for line in range(0, 64 * size, 128):  # half of the numbers are there, as a rule
            f.prefetch(f.at(f.at(at["w"], position * size, "i8"), 4 * PREFETCH_WORDS + line // 2, "i8"))
        if self.codes is None:
            stored, lanes = ("i16", 32) if self._paired else ("float", 16)
            found = []
            for first in range(0, 64, lanes):
                here = position if not first else position + _count(f, bits & ((1 << first) - 1))
                loaded = f.load(vector_type(stored, lanes), f.at(at["w"], here, stored))
                spread = _expand(f, loaded, _lanes(f, bits, first, lanes))
                found.append(f.op(f"bitcast {spread.type} {spread.name} to <16 x float>", "<16 x float>") if self._paired else spread)  # fmt: skip
            return found, after
        codes = _expand(f, self._codes(f, at["w"], position), _lanes(f, bits, 0, 64))
        found = []
        for i in range(2 * VECTORS):
            chosen = ", ".join(f"i32 {16 * i + lane}" for lane in range(16))
            part = f.op(f"shufflevector {codes.type} {codes.name}, {codes.type} poison, <16 x i32> <{chosen}>", "<16 x i8>")  # fmt: skip
            j = i % VECTORS
            w = f.fma(level(f, self.codes.scheme, f.cast("zext", part, "i32")), group[j], group[VECTORS + j])
            found.append(f.select(_lanes(f, bits, 16 * i, 16), w, 0.0))
        return found, after

    def _codes(self, f: Function, base: Val, position: Val) -> Val:
        """64 codes from `position` on, a byte each."""
        assert self.codes is not None
        if self.codes.per_byte == 1:
            return f.load("<64 x i8>", f.at(base, position, "i8"))
        # Halves of bytes: those from an odd position on lie in two bytes.
        begin, odd = position >> 1, (position & 1) << 2
        low, high = (f.cast("zext", f.load("<32 x i8>", f.at(base, begin + i, "i8")), "i16") for i in (0, 1))
        both = f.op(f"lshr <32 x i16> {(low | (high << 8)).name}, {f.splat(f.cast('trunc', odd, 'i16'), 32).name}", "<32 x i16>")  # fmt: skip
        apart = (both & 15) | ((both & 240) << 4)
        return f.op(f"bitcast <32 x i16> {apart.name} to <64 x i8>", "<64 x i8>")


def _count(f: Function, bits: Val) -> Val:
    return f.call("i64", "llvm.ctpop.i64", bits)


def _lanes(f: Function, bits: Val, first: int, lanes: int) -> Val:
    """`lanes` of 64 bits, from bit `first` on, as a mask."""
    part = f.cast("trunc", bits >> first if first else bits, f"i{lanes}") if lanes < 64 else bits
    return f.op(f"bitcast i{lanes} {part.name} to <{lanes} x i1>", f"<{lanes} x i1>")


def _expand(f: Function, values: Val, mask: Val) -> Val:
    """The first values in the lanes of the mask, 0 in the others."""
    suffix = {"<16 x float>": "v16f32", "<32 x i16>": "v32i16", "<64 x i8>": "v64i8"}[values.type]
    nothing = f.const(0.0 if "float" in values.type else 0, values.type)
    return f.call(values.type, f"llvm.x86.avx512.mask.expand.{suffix}", values, nothing, mask)


def sparse_linear(
    n: int, k: int, dtype: str, target: Target, *, scheme: str = "none", group: int = 0, gated: bool = False,
    bias: bool = False, activation: str = "none", residual: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of `matmul.linear`, or with `gated` of `gated_mlp_up`, whose weights are sparse (see `ops.sparse_linear`).

    Parameters in order: x[M, k], values, mask uint8, starts int64, scales float32 of codes, bias[n] if `bias`, residual[M, n] if
    `residual`, y[M, n]. Raises TargetError where the target can't expand, or two inputs of a word belong to different groups.
    """
    require_dtype(dtype, target)
    codes = None if scheme == "none" else Codes(scheme, group)
    if not expands("uint8" if codes else dtype, target):
        raise TargetError(f"target {target.name!r} has no instructions that expand sparse weights")
    if group % 2:
        raise TargetError(f"groups of {group} codes cut a word of two inputs")
    return layer_func("sparse_linear", n, k, dtype, target, gated=gated, bias=bias, activation=activation,
                      residual=residual, sparse=Sparse(k, dtype, target, codes))  # fmt: skip
