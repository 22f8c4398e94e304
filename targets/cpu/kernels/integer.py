"""Linear layers of integers: levels of x times codes of weights, four products and their sum at once where the machine can.

Codes are unsigned and levels signed, which is what VNNI multiplies; a group's sum of products is an exact integer, whatever the order.
An offset of the codes (their zero, or the middle of a symmetric grid) is where a sum starts: minus the offset times the sum of the group's
levels, which a record holds (see `jisu.compiler.levels`). For few rows codes are taken apart in registers while weights stream by; for
more, each task does it once per panel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler import levels, schemes
from jisu.compiler.errors import TargetError
from jisu.compiler.levels import WORD
from jisu.targets.cpu.isa import ITEMSIZE, Arg, Function, Micro, Val, require_dtype, vector_type
from jisu.targets.cpu.kernels import amx
from jisu.targets.cpu.kernels.codes import Codes, zeros
from jisu.targets.cpu.kernels.matmul import (
    VECTORS,
    ahead,
    block_sizes,
    layer_func,
    panel_width,
    projections,
    row_blocks,
)
from jisu.targets.cpu.kernels.norm import in_rows
from jisu.targets.target import Target

_TILE_WORDS = amx.BLOCK * 32 + amx.CONFIG_WORDS
"""Of scratch memory: the tile unit's sums of a block of rows, and its configuration."""
_MOST_INPUTS = 1 << 16
"""Up to which sums of products of bytes stay within 32 bits."""


def dot4(f: Function, codes: Val, x: Val, total: Val) -> Val:
    """total + per i32 lane the sum of four products of unsigned bytes of `codes` with signed ones of `x`."""
    bits = 32 * f.lanes
    if (
        f.target.has("avx512vnni")
        and (bits == 512 or f.target.has("avx512vl"))
        or bits == 256
        and f.target.has("avxvnni")
    ):
        wide = vector_type("i8", 4 * f.lanes)
        a, b = (f.op(f"bitcast {v.type} {v.name} to {wide}", wide) for v in (codes, x))
        return f.call(total.type, f"llvm.x86.avx512.vpdpbusd.{bits}", total, a, b)
    for i in range(WORD):
        code = (codes >> (8 * i)) & 255
        level = f.op(f"ashr {x.type} {(x << (24 - 8 * i)).name}, {f.like(24, x).name}", x.type)
        total = total + code * level
    return total


@attrs.frozen
class Integers(Codes):
    """Codes that are multiplied by levels of x; `word` is `WORD`. own: groups of x have scales of their own."""

    word: int = WORD
    own: bool = False

    @property
    def dtypes(self) -> Mapping[str, str]:
        return {**super().dtypes, "x": "uint8"}

    @property
    def record(self) -> int:
        """Bytes of a row of x."""
        return levels.record_bytes(self.k, self.group, self.own)

    @property
    def tiled(self) -> bool:
        """Whether a tile unit multiplies where there are more rows than are multiplied straight from memory."""
        return amx.multiplies("int8", self.group or self.k, self.target) and self.k % (self.group or 1) == 0

    @property
    def block(self) -> int:
        return amx.BLOCK if self.tiled else super().block

    def multipliers(self, f: Function, at: Mapping[str, Val], lda: int) -> Sequence[Callable[[Val, Val], None]]:
        nr, shared = panel_width(self.target), self.kind.per_byte == 2
        sizes = block_sizes(self.target)
        direct = {mr: self._integer_product(mr, shared) for mr in sizes}
        single = {mr: self._integer_product(mr, False) for mr in sizes} if shared else direct
        apart = self._take_apart() if shared else None
        tiles = self._tiles() if self.tiled else None

        def of(number: Val, tile: Val) -> None:
            w, *tail = self.panel(f, at, number)
            following = self.panel(f, at, number + 1)[0]

            def rows(products: Mapping[int, Micro], w: Val) -> None:
                def run(mr: int, m: Val) -> None:
                    here = f.at(at["a"], m * lda, "float32")
                    f.use(products[mr], here, w, following, *tail, f.at(tile, m * nr, "float32"))

                row_blocks(f, at["rows"], run, sizes)

            def many() -> None:
                codes = w
                if apart is not None:
                    codes = f.at(at["scratch"], _TILE_WORDS if tiles else 0, "float32")
                    f.use(apart, w, codes)
                if tiles is None:
                    rows(single, codes)
                else:
                    f.use(tiles, at["a"], codes, *tail, tile, at["scratch"], at["rows"])

            if apart is None and tiles is None:
                rows(direct, w)
            else:
                f.when(at["rows"] <= sizes[0], lambda: rows(direct, w), many)

        return [of]

    def _take_apart(self) -> Micro:
        """void(codes, out): a panel's codes, two of which share a byte, one in each: [2 words, NR, WORD]."""
        f = Function("take_apart", [("ptr", "b"), ("ptr", "out")], self.target)
        b, out = f.params()
        size = panel_width(self.target) * WORD

        def word(i: Val, _: list[Val]) -> None:
            for j in range(VECTORS):
                line = f.at(b, i * size + j * 4 * f.lanes, "i8")
                f.prefetch(f.at(line, ahead(self.target), "i8"))
                for half, part in enumerate(_halves(f.load(vector_type("i32", f.lanes), line))):
                    f.store(part, f.at(out, (i * 2 + half) * size + j * 4 * f.lanes, "i8"))

        f.loop(0, self.words, 1, [], word)
        return f.finish()

    def _tiles(self) -> Micro:
        """void(A, codes, scales, [zeros,] C, scratch, rows): C[rows, NR] = A @ B in the tile unit, of codes that share no byte."""
        operands = ("s", *(["z"] if self.zeros else []))
        g = Function(
            "tiles", [*(("ptr", n) for n in ("a", "w", *operands, "c", "scratch")), ("i64", "rows")], self.target
        )
        at = dict(zip(("a", "w", *operands, "c", "scratch", "rows"), g.params(), strict=True))
        nr, each = panel_width(self.target), self.group or self.k
        size, ints, vec = amx.step_bytes(each), vector_type("i32", g.lanes), vector_type("float", g.lanes)
        tail, sums_at = levels.scale_offset(self.k), levels.sum_offset(self.k, self.group, self.own)
        tiles = amx.Tiles(g, g.at(at["scratch"], amx.BLOCK * nr, "float32"), size, nr * WORD)
        row_bytes, line = g.i64(self.record), g.i64(4 * nr)

        def block(first: Val, count: int, rows: Val) -> None:
            here, out = g.at(at["a"], first * self.record, "i8"), g.at(at["c"], first * nr, "float32")
            g.loop(0, rows * VECTORS, 1, [], lambda i, _: g.store(g.const(0.0, vec), g.at(out, i * g.lanes, "float32")))

            def group(number: Val, _: list[Val]) -> None:
                begin = number * each
                tiles.clear(count)
                g.loop(begin, begin + each, size, [], lambda i, _: tiles.multiply(
                    "tdpbsud", count, g.at(here, i, "i8"), row_bytes, g.at(at["w"], i * nr, "i8"), 0))  # fmt: skip
                tiles.store_sums(count, at["scratch"], line)

                def scale(m: Val, _: list[Val]) -> None:
                    record = g.at(here, m * self.record, "i8")
                    start, scaled = self._scaling(
                        g, at, number, [g.at(record, sums_at, "i8")], [g.at(record, tail, "i8")]
                    )
                    for j in range(VECTORS):
                        place = m * nr + j * g.lanes
                        total = start[j] + g.load(ints, g.at(at["scratch"], place, "float32"))
                        to = g.at(out, place, "float32")
                        g.store(scaled(j, total, g.load(vec, to)), to)

                g.loop(0, rows, 1, [], scale)

            g.loop(0, self.groups, 1, [], group)

            def whole(m: Val, _: list[Val]) -> None:
                factor = g.splat(g.load("float", g.at(here, m * self.record + tail, "i8")), g.lanes)
                for j in range(VECTORS):
                    to = g.at(out, m * nr + j * g.lanes, "float32")
                    g.store(g.load(vec, to) * factor, to)

            if not self.own:
                g.loop(0, rows, 1, [], whole)

        tiles.blocks(at["rows"], block)
        return g.finish()

    def _integer_product(self, mr: int, shared: bool) -> Micro:
        """C[mr, NR] = A[mr, k] @ B[k, NR], A being records and B one panel, whose codes share bytes or (not `shared`) don't.

        void(A, codes, following panel's codes, scales, [zeros,] C), C row-major float32.
        """
        names = ("a", "b", "next", "s", *(["z"] if self.zeros else []), "c")
        f = Function(f"integers{mr}", [("ptr", n) for n in names], self.target)
        at = dict(zip(names, f.params(), strict=True))
        nr, vec, ints = panel_width(self.target), vector_type("float", f.lanes), vector_type("i32", f.lanes)
        rows = [f.at(at["a"], m * self.record, "uint8") for m in range(mr)]
        tail, sums_at = levels.scale_offset(self.k), levels.sum_offset(self.k, self.group, self.own)
        per_word = 2 if shared else 1
        # Few rows have too few sums to hide the instruction's latency: both halves of a byte, or two words, go on at once.
        chains = 2 if mr <= 4 else 1
        step = chains
        words, each = (self.words, self.each) if shared or self.kind.per_byte == 1 else (2 * self.words, 2 * self.each)
        width = mr * VECTORS
        # A tile that doesn't fit the registers beside the sums stays in memory.
        kept = mr <= 4
        # Blocks of all rows that there are read codes from memory as a stream; others bring the next panel nearer meanwhile.
        streams = mr < block_sizes(self.target)[0]
        line_bytes = nr * WORD if shared or self.kind.per_byte == 1 else nr * WORD // 2

        def accumulate(word: Val, sums: list[Val], steps: int) -> list[Val]:
            result = list(sums)
            for n in range(steps):
                here = f.at(at["b"], (word + n) * (nr * WORD), "i8")
                lines = [f.at(here, j * 4 * f.lanes, "i8") for j in range(VECTORS)]
                for j in range(0, nr * WORD if streams else line_bytes, 64):
                    f.prefetch(
                        f.at(here, ahead(self.target) + j, "i8")
                        if streams
                        else f.at(at["next"], (word + n) * line_bytes + j, "i8")
                    )
                codes = [_halves(c, chains == 2) if shared else [c] for c in (f.load(ints, line) for line in lines)]
                # Row by row, so that no more than one of x's words needs a register at a time.
                for m in range(mr):
                    for half in range(per_word):
                        x = f.load("i32", f.at(rows[m], (word + n) * (WORD * per_word) + half * WORD, "i8"))
                        spread, chain = f.splat(x, f.lanes), (half if shared else n) % chains
                        for j in range(VECTORS):
                            slot = (chain * mr + m) * VECTORS + j
                            result[slot] = dot4(f, codes[j][half], spread, result[slot])
            return result

        def group(i: Val, before: list[Val]) -> list[Val]:
            start, scaled = self._scaling(
                f, at, i, [f.at(r, sums_at, "i8") for r in rows], [f.at(r, tail, "i8") for r in rows]
            )
            first = i * each
            last = f.minimum(first + each, words) if words % each else first + each
            found = [*start, *[f.const(0, ints)] * (width * (chains - 1))]
            *found, end = f.loop(first, last - (step - 1), step, found, lambda w, v: accumulate(w, v, step))
            if step > 1:
                *found, _ = f.loop(end, last, 1, found, lambda w, v: accumulate(w, v, 1))
            if shared and chains == 2:
                found[width:] = [f.op(f"ashr {v.type} {v.name}, {f.like(4, v).name}", v.type) for v in found[width:]]
            totals = [found[slot] if chains == 1 else found[slot] + found[width + slot] for slot in range(width)]
            new = []
            for slot, total in enumerate(totals):
                here = f.at(at["c"], slot * f.lanes, "float32")
                new.append(scaled(slot, total, before[slot] if kept else f.load(vec, here)))
                if not kept:
                    f.store(new[-1], here)
            return new if kept else []

        if not kept:
            for slot in range(width):
                f.store(f.const(0.0, vec), f.at(at["c"], slot * f.lanes, "float32"))
        *sums, _ = f.loop(0, self.groups, 1, [f.const(0.0, vec)] * width if kept else [], group)
        for slot in range(width if kept or not self.own else 0):
            here = f.at(at["c"], slot * f.lanes, "float32")
            total = sums[slot] if kept else f.load(vec, here)
            if not self.own:
                total = total * f.splat(f.load("float", f.at(rows[slot // VECTORS], tail, "i8")), f.lanes)
            f.store(total, here)
        return f.finish()

    def _scaling(
        self, f: Function, at: Mapping[str, Val], group: Val, sums: list[Val], scales: list[Val]
    ) -> tuple[list[Val], Callable[[int, Val, Val], Val]]:
        """Where a group's sums of products start, and what adds a finished one to a total float32: of slot, sum and total.

        sums, scales: of the rows' records.
        """
        nr, ints = panel_width(self.target), vector_type("i32", f.lanes)
        of_x = [f.load("i32", f.at(s, group, "int32")) for s in sums]
        for name, size in (("s", ITEMSIZE[self.scales]), ("z", 1)):
            if name in at:
                f.prefetch(f.at(at[name], (group * nr + 16 * nr) * size, "i8"))
        scale = [f.load_f32(at["s"], group * nr + j * f.lanes, self.scales) for j in range(VECTORS)]
        own = []
        if self.own:
            own = [f.splat(f.load("float", f.at(s, group, "float32")), f.lanes) for s in scales]
        shifts: list[Val] = []
        if not self.zeros:
            start = [f.splat(s * -int(self.kind.middle), f.lanes) for s in of_x for _ in range(VECTORS)]
        elif 128 * (2**self.kind.bits - 1) * (self.group or self.k) < 1 << 24:  # float32 holds the sum exactly
            start = [f.const(0, ints)] * (len(of_x) * VECTORS)
            offsets = zeros(f, at["z"], group * nr)
            shifts = [f.splat(f.cast("sitofp", 0 - s, "float"), f.lanes) for s in of_x]
        else:
            start = [o * f.splat(0 - s, f.lanes) for s in of_x for o in zeros(f, at["z"], group * nr, "i32")]

        def scaled(slot: int, total: Val, before: Val) -> Val:
            m, j = divmod(slot, VECTORS)
            value = f.cast("sitofp", total, "float")
            if shifts:
                value = f.fma(offsets[j], shifts[m], value)
            return f.fma(value * own[m] if own else value, scale[j], before)

        return start, scaled


def _halves(both: Val, in_place: bool = False) -> list[Val]:
    """The lower and the upper codes of bytes (i32 lanes); the upper ones 16 times too large if they stay `in_place`."""
    return [both & 0x0F0F0F0F, both & -0x0F0F0F10 if in_place else (both >> 4) & 0x0F0F0F0F]


def _reader(k: int, target: Target, scheme: str, group: int, own: bool, scales: str, zeros: bool) -> Integers:
    """Raises TargetError for codes that are no integers, for too many inputs, and where a word belongs to different groups."""
    kind = schemes.scheme(scheme)
    if not kind.uniform:
        raise TargetError(f"codes of {scheme} are no integers")
    if group % (WORD * kind.per_byte):
        raise TargetError(f"groups of {group} codes cut a word of {WORD * kind.per_byte}")
    if k > _MOST_INPUTS:
        raise TargetError(f"a sum of {k} products may leave 32 bits")
    # A panel of codes that are taken apart.
    scratch = panel_width(target) * 2 * kind.panel_words(k, WORD) if kind.per_byte == 2 else 0
    reader = Integers(scheme, group, k, scales, zeros, target, scratch_words=scratch, own=own)
    return attrs.evolve(reader, scratch_words=scratch + _TILE_WORDS) if reader.tiled else reader


def levels_linear(
    n: int, k: int, dtype: str, target: Target, *, scheme: str, group: int, own: bool = False, scales: str = "float16",
    zeros: bool = False, gated: bool = False, bias: bool = False, activation: str = "none", residual: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of `codes.quantized_linear` for x in integers (see `ops.levels_linear`): x uint8 [M, record] instead of floats.

    Raises TargetError for codes that are no integers, and where a word belongs to different groups.
    """
    reader = _reader(k, target, scheme, group, own, scales, zeros)
    return layer_func("levels_linear", n, k, dtype, target, gated=gated, bias=bias, activation=activation,
                       residual=residual, reader=reader)  # fmt: skip


def levels_projections(
    outputs: Sequence[int], k: int, dtype: str, target: Target, *, scheme: str, group: int, own: bool = False,
    scales: str = "float16", zeros: bool = False, bias: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of several `levels_linear` of one x (see `ops.levels_projections`), in one parallel region."""
    reader = _reader(k, target, scheme, group, own, scales, zeros)
    return projections(outputs, k, dtype, target, bias=bias, reader=reader)


def encode_levels(
    k: int, dtype: str, target: Target, *, scheme: str, group: int, own: bool = False, given: bool = False
) -> Any:
    """PrimFunc records[M, bytes] of x[M, k] (see `ops.encode_levels`).

    Parameters in order: x[M, k], scale[] float32 if `given`, records uint8.
    """
    require_dtype(dtype, target)
    kind, size, record = schemes.scheme(scheme), group or k, levels.record_bytes(k, group, own)
    names = ("x", *(["scale"] if given else []), "y")
    f = Function("encode_levels", [*(("ptr", n) for n in names), ("i64", "first"), ("i64", "last")], target)
    at = dict(zip((*names, "first", "last"), f.params(), strict=True))
    ints = vector_type("i32", f.lanes)

    def row(r: Val, _: list[Val]) -> None:
        x, y = f.at(at["x"], r * k, dtype), f.at(at["y"], r * record, "i8")
        scales, sums = (f.at(y, at_, "i8") for at_ in (levels.scale_offset(k), levels.sum_offset(k, group, own)))
        for i in range(k, levels.scale_offset(k)):
            f.store(f.const(0, "i8"), f.at(y, i, "i8"))

        def scale_of(here: Val, count: int, out: Val) -> Val:
            scale = _scale(f, here, count, dtype, kind, f.load("float", at["scale"]) if given else None)
            f.store(scale, out)
            return f.splat(scale, f.lanes)

        whole = None if own else scale_of(x, k, scales)

        def part(number: Val | int, count: int) -> None:
            """Writes the levels of a group, their sum and (if `own`) their scale."""
            begin = f.i64(number) * size
            here, out = f.at(x, begin, dtype), f.at(y, begin, "i8")
            given_scale = whole or scale_of(here, count, f.at(scales, number, "float32"))
            # Near the ends of float32's range a reciprocal leaves it: both sides are moved towards the middle, exactly.
            one = f.like(1.0, given_scale)
            far = f.select(given_scale > 2.0**64, f.like(2.0**-64, one), one)
            move = f.select(given_scale < 2.0**-64, f.like(2.0**64, one), far)
            spread = given_scale * move
            inverse = 1.0 / spread

            def some(i: Val, mask: Val | None, totals: list[Val]) -> list[Val]:
                v = f.load_f32(here, i, dtype, mask) * move
                # Markstein's division: rounded as a true one but for the rarest cases.
                q = v * inverse
                q = f.fma(f.fma(-q, spread, v), inverse, q)
                q = f.select(q < kind.top, q, kind.top)  # NaN, too
                q = f.select(q > -kind.middle, q, -kind.middle)
                level = f.cast("bitcast", q + 12582912.0, "i32") - 0x4B400000  # to the nearest, ties to even
                f.store_raw(f.cast("trunc", level, "i8"), f.at(out, i, "i8"), mask)
                return [totals[0] + (level if mask is None else f.select(mask, level, f.const(0, ints)))]

            (total,) = f.vectors(count, some, [f.const(0, ints)])
            if total.type.startswith("<"):
                total = f.call("i32", f"llvm.vector.reduce.add.v{f.lanes}i32", total)
            f.store(total, f.at(sums, number, "int32"))

        f.loop(0, k // size, 1, [], lambda g, _: part(g, size))
        if k % size:
            part(k // size, k % size)

    f.loop(at["first"], at["last"], 1, [], row)
    arguments = [Arg("x", ("m", k), dtype), *([Arg("scale", (), "float32")] if given else [])]
    return in_rows("encode_levels", k, [*arguments, Arg("y", ("m", record), "uint8")], f.finish())


def _scale(f: Function, x: Val, k: int, dtype: str, kind: schemes.Scheme, given: Val | None) -> Val:
    """The scale of a row: as given, or its largest magnitude over the top level, 1 of zeros.

    NaN where there are NaN, or infinities and no scale is given.
    """
    ints = vector_type("i32", f.lanes)

    def largest(i: Val, mask: Val | None, tops: list[Val]) -> list[Val]:
        bits = (
            f.cast("bitcast", f.load_f32(x, i, dtype, mask), "i32") & 0x7FFFFFFF
        )  # ordered as magnitudes are, NaN last
        return [f.select(bits > tops[0], bits, tops[0])]

    (top,) = f.vectors(k, largest, [f.const(0, ints)])
    bits = f.call("i32", f"llvm.vector.reduce.smax.v{f.lanes}i32", top) if top.type.startswith("<") else top
    reach = f.cast("bitcast", bits, "float")
    if given is not None:
        return f.select(reach.cmp("uno", reach), reach, given)
    scale = reach / kind.top
    scale = f.select(scale.cmp("oeq", 0.0), f.const(1.0, "float"), scale)
    return scale + (scale - scale)  # an infinity becomes NaN
