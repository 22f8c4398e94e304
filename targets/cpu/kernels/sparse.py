"""Linear layers over sparse weights in panels (see `ops.sparse`), for machines with AVX-512's expanding instructions.

A word of two inputs has 64 bits for a panel of 32 outputs. The kept numbers are loaded from where they stand and spread
over a register's lanes by the bits; the position goes on by their count. One row is multiplied while the weights are
expanded; for several, each task expands a panel once and multiplies by all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler import schemes
from jisu.compiler.errors import TargetError
from jisu.targets.cpu import expands
from jisu.targets.cpu.isa import ITEMSIZE, Function, Micro, Val, require_dtype, vector_type
from jisu.targets.cpu.kernels.codes import Codes, level, scale_and_shift
from jisu.targets.cpu.kernels.matmul import (
    VECTORS,
    ahead,
    block_sizes,
    dot,
    layer_func,
    panel_width,
    product,
    row_blocks,
    uses_dot,
    words_as_floats,
)
from jisu.targets.target import Target


@attrs.frozen
class Sparse:
    """How a layer of `k` inputs reads sparse weights of `dtype`, or of codes."""

    k: int
    dtype: str
    target: Target
    codes: Codes | None = None
    record: int = 0

    @property
    def block(self) -> int:
        """Rows that are multiplied at once."""
        return block_sizes(self.target)[0]

    @property
    def operands(self) -> tuple[str, ...]:
        """What stands in memory behind the values."""
        return ("mask", "starts", *(self.codes.operands if self.codes else ()))

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
    def row(self) -> tuple[str, int]:
        return self.dtype if self.dots else "float32", 2 * self.words

    @property
    def scratch_words(self) -> int:
        """32-bit words of an expanded panel."""
        return self.words * panel_width(self.target) * (1 if self._paired else 2)

    def shapes(self, panels: int, parts: tuple[int, ...]) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the weights and operands."""
        nr = panel_width(self.target)
        coded = self.codes.shapes(panels, parts) if self.codes else {}
        own: dict[str, tuple[int | str, ...]] = {
            "w": ("size",),
            "mask": (panels, *parts, self.words, nr // 4),
            "starts": (panels, *parts),
        }
        return {**coded, **own}

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Dtypes of the operands that differ from the layer's."""
        return {"mask": "uint8", "starts": "int64", **(self.codes.dtypes if self.codes else {})}

    def multipliers(self, f: Function, at: Mapping[str, Val], lda: int) -> Sequence[Callable[[Val, Val], None]]:
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
            coded = self.codes.panel(f, at, number)[1:] if self.codes else []

            def many() -> None:
                f.use(whole, at["w"], bits, first, *coded, at["scratch"])
                row_blocks(
                    f, rows, lambda mr, m: f.use(
                        products[mr], f.at(at["a"], m * lda, "float32"), lda, at["scratch"], nr,
                        f.at(tile, m * nr, "float32"), nr, depth,
                    ), block_sizes(target),
                )  # fmt: skip

            f.when(rows.cmp("eq", 1), lambda: f.use(single, at["w"], bits, first, *coded, at["a"], tile), many)

        return [of]

    def _walk(self, multiply: bool) -> Micro:
        """void(values, mask, first value, [scales, zeros,] out): out = the expanded panel; or, to multiply,

        void(values, mask, first value, [scales, zeros,] a, out): out[NR] = a[k] @ panel.
        """
        names = (
            "w",
            "bits",
            "first",
            *(self.codes.operands if self.codes else ()),
            *(["a"] if multiply else []),
            "out",
        )
        f = Function("sparse_row" if multiply else "expand", [("i64" if n == "first" else "ptr", n) for n in names], self.target)  # fmt: skip
        at = dict(zip(names, f.params(), strict=True))
        nr = panel_width(self.target)
        nothing = [f.const(0.0, vector_type("float", f.lanes))] * (VECTORS if multiply else 0)

        def word(index: Val, position: Val, sums: list[Val], group: Group | None) -> list[Val]:
            """The position behind a word, and the sums with its products; they go on as in `product`, one input after the other."""
            columns, after = self._columns(f, at, index, position, group)
            if group is not None:
                scaling = [*zip(group.scales, group.shifts, strict=True)] * 2
                columns = [f.fma(v, scale, shift) for v, (scale, shift) in zip(columns, scaling, strict=True)]
            if not multiply:
                lanes = nr if self._paired else 2 * nr
                for i, v in enumerate(columns):
                    f.store(v, f.at(at["out"], index * lanes + i * f.lanes, "float32"))
                return [after]
            if self.dots:
                pair = f.splat(f.load("float", f.at(at["a"], index, "float32")), f.lanes)
                return [after, *(dot(f, pair, w, s) for w, s in zip(columns, sums, strict=True))]
            if self._paired:  # halves of each word
                split = [words_as_floats(f, f.cast("bitcast", v, "i32"), self.dtype) for v in columns]
                columns = [part[half] for half in (0, 1) for part in split]
            for i in (0, 1):
                x = f.splat(f.load("float", f.at(at["a"], index * 2 + i, "float32")), f.lanes)
                sums = [f.fma(x, w, s) for w, s in zip(columns[i * VECTORS : (i + 1) * VECTORS], sums, strict=True)]
            return [after, *sums]

        def words(start: Val | int, stop: Val | int, carried: list[Val], group: Group | None) -> list[Val]:
            *carried, _ = f.loop(start, stop, 1, carried, lambda index, v: word(index, v[0], v[1:], group))
            return carried

        if self.codes is None:
            _, *totals = words(0, self.words, [at["first"], *nothing], None)
        else:
            codes, each = self.codes, self.codes.group // 2 or self.words

            def over_group(i: Val, carried: list[Val]) -> list[Val]:
                return words(i * each, f.minimum(i * each + each, self.words), carried, _group(f, codes, at, i))

            _, *totals, _ = f.loop(0, codes.groups, 1, [at["first"], *nothing], over_group)
        for j in range(VECTORS if multiply else 0):
            f.store(totals[j], f.at(at["out"], j * f.lanes, "float32"))
        return f.finish()

    def _columns(
        self, f: Function, at: Mapping[str, Val], index: Val, position: Val, group: Group | None
    ) -> tuple[list[Val], Val]:
        """The registers float32 of a word (16-bit numbers in pairs, levels of codes), and the position behind it."""
        bits = f.load("i64", f.at(at["bits"], index * 8, "i8"))
        after = position + _count(f, bits)
        per_byte = self.codes.kind.per_byte if self.codes else 1
        size = 1 if self.codes else ITEMSIZE[self.dtype]
        byte = position >> 1 if per_byte == 2 else position * size
        for line in range(0, 48 * size // per_byte, 64):  # at most three quarters are there, as a rule
            f.prefetch(f.at(f.at(at["w"], byte, "i8"), ahead(self.target) + line, "i8"))
        if group is None:
            stored, lanes = ("i16", 32) if self._paired else ("float", 16)
            found = []
            for first in range(0, 64, lanes):
                here = position if not first else position + _count(f, bits & ((1 << first) - 1))
                loaded = f.load(vector_type(stored, lanes), f.at(at["w"], here, stored))
                spread = _expand(f, loaded, _lanes(f, bits, first, lanes), f.const(0, loaded.type))
                found.append(f.op(f"bitcast {spread.type} {spread.name} to <16 x float>", "<16 x float>") if self._paired else spread)  # fmt: skip
            return found, after
        assert self.codes is not None
        kind = schemes.scheme(self.codes.scheme)
        loaded = self._codes(f, at["w"], position)
        if kind.uniform:
            loaded = loaded - int(kind.middle)
        codes = _expand(f, loaded, _lanes(f, bits, 0, 64), group.absent)
        found = []
        for i in range(2 * VECTORS):
            chosen = ", ".join(f"i32 {16 * i + lane}" for lane in range(16))
            part = f.op(f"shufflevector {codes.type} {codes.name}, {codes.type} poison, <16 x i32> <{chosen}>", "<16 x i8>")  # fmt: skip
            if kind.uniform:
                found.append(f.cast("sitofp", f.cast("sext", part, "i32"), "float"))
            else:
                found.append(level(f, self.codes.scheme, f.cast("zext", part, "i32")))
        return found, after

    def _codes(self, f: Function, base: Val, position: Val) -> Val:
        """64 codes from `position` on, a byte each."""
        assert self.codes is not None
        if self.codes.kind.per_byte == 1:
            return f.load("<64 x i8>", f.at(base, position, "i8"))
        # Halves of bytes, the first of which may be an upper one: each 8 bytes from a multiple of 4 on hold 8 of them.
        loaded = f.load("<64 x i8>", f.at(base, position >> 1, "i8"))
        places = _bytes([4 * (i // 8) + i % 8 for i in range(64)], f)
        held = f.call("<64 x i8>", "llvm.x86.avx512.permvar.qi.512", loaded, places)
        odd = f.cast("trunc", (position & 1) << 2, "i8")  # a selection would become a branch that can't be foreseen
        chosen = _bytes([4 * (i % 8) for i in range(64)], f) + odd
        return f.call("<64 x i8>", "llvm.x86.avx512.pmultishift.qb.512", chosen, held) & 15


@attrs.frozen(eq=False)
class Group:
    """What turns levels of codes into values (level * scale + shift), and the codes of absent numbers: 64 bytes."""

    scales: list[Val]
    shifts: list[Val]
    absent: Val


def _group(f: Function, codes: Codes, at: Mapping[str, Val], number: Val) -> Group:
    """Levels of uniform schemes are counted from the middle, so that a sum of them is as small as that of the values."""
    kind = codes.kind
    scale, shift = scale_and_shift(f, codes, at["scales"], at.get("zeros"), number)
    if not kind.uniform:
        return Group(scale, shift, f.const(int(np.abs(kind.levels).argmin()), "<64 x i8>"))
    shift = [f.fma(s, f.like(kind.middle, s), t) for s, t in zip(scale, shift, strict=True)]
    if "zeros" not in at:
        return Group(scale, shift, f.const(0, "<64 x i8>"))
    nr = panel_width(codes.target)
    parts = [f.load("<16 x i8>", f.at(at["zeros"], number * nr + j * 16, "i8")) for j in range(VECTORS)]
    lanes = ", ".join(f"i32 {i % 32}" for i in range(64))
    absent = f.op(f"shufflevector <16 x i8> {parts[0].name}, <16 x i8> {parts[1].name}, <64 x i32> <{lanes}>", "<64 x i8>")  # fmt: skip
    return Group(scale, shift, absent - int(kind.middle))


def _bytes(values: list[int], f: Function) -> Val:
    return Val(f, "<" + ", ".join(f"i8 {v}" for v in values) + ">", f"<{len(values)} x i8>")


def _count(f: Function, bits: Val) -> Val:
    return f.call("i64", "llvm.ctpop.i64", bits)


def _lanes(f: Function, bits: Val, first: int, lanes: int) -> Val:
    """`lanes` of 64 bits, from bit `first` on, as a mask."""
    part = f.cast("trunc", bits >> first if first else bits, f"i{lanes}") if lanes < 64 else bits
    return f.op(f"bitcast i{lanes} {part.name} to <{lanes} x i1>", f"<{lanes} x i1>")


def _expand(f: Function, values: Val, mask: Val, other: Val) -> Val:
    """The first values in the lanes of the mask, `other` in the rest."""
    suffix = {"<16 x float>": "v16f32", "<32 x i16>": "v32i16", "<64 x i8>": "v64i8"}[values.type]
    return f.call(values.type, f"llvm.x86.avx512.mask.expand.{suffix}", values, other, mask)


def sparse_linear(
    n: int, k: int, dtype: str, target: Target, *, scheme: str = "none", group: int = 0, scales: str = "float16",
    zeros: bool = False, gated: bool = False, bias: bool = False, activation: str = "none", residual: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of `matmul.linear`, or with `gated` of `gated_mlp_up`, whose weights are sparse (see `ops.sparse_linear`).

    Parameters in order: x[M, k], values, mask uint8, starts int64, of codes scales (of the dtype `scales`) and, if `zeros`, zeros
    uint8, bias[n] if `bias`, residual[M, n] if `residual`, y[M, n]. Raises TargetError where the target can't expand, or two
    inputs of a word belong to different groups.
    """
    require_dtype(dtype, target)
    codes = None if scheme == "none" else Codes(scheme, group, k, scales, zeros, target)
    if not expands("uint8" if codes else dtype, target):
        raise TargetError(f"target {target.name!r} has no instructions that expand sparse weights")
    if group % 2:
        raise TargetError(f"groups of {group} codes cut a word of two inputs")
    return layer_func("sparse_linear", n, k, dtype, target, gated=gated, bias=bias, activation=activation,
                      residual=residual, reader=Sparse(k, dtype, target, codes))  # fmt: skip
