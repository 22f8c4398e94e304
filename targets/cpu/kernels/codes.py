"""Linear layers over weights that are codes: decoded to float32 in registers, each product a float32 multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler import schemes
from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import Function, Micro, Val, vector_type
from jisu.targets.cpu.kernels.matmul import (
    VECTORS,
    ahead,
    block_sizes,
    layer_func,
    panel_width,
    part_inputs,
    product,
    row_blocks,
)
from jisu.targets.target import Target


@attrs.frozen
class Codes:
    """Weights of k inputs that are codes of a scheme, with scales (and zeros) per `group` inputs (0: per output), in panels."""

    scheme: str
    group: int
    k: int
    scales: str
    zeros: bool
    target: Target
    word: int = 1
    scratch_words: int = 0

    @property
    def kind(self) -> schemes.Scheme:
        """The scheme."""
        return schemes.scheme(self.scheme)

    @property
    def words(self) -> int:
        """How often `word` bytes hold codes of an output."""
        return self.kind.panel_words(self.k, self.word)

    @property
    def groups(self) -> int:
        """Scales per output."""
        return self.kind.groups(self.k, self.group)

    @property
    def each(self) -> int:
        """Words per group."""
        return self.group // (self.kind.per_byte * self.word) if self.group else self.words

    @property
    def record(self) -> int:
        return 0

    @property
    def block(self) -> int:
        return block_sizes(self.target)[0]

    @property
    def operands(self) -> tuple[str, ...]:
        return ("scales", "zeros") if self.zeros else ("scales",)

    @property
    def dtypes(self) -> Mapping[str, str]:
        return {"w": "uint8", "scales": self.scales, "zeros": "uint8"}

    @property
    def row(self) -> tuple[str, int]:
        return "float32", self.words * self.kind.per_byte * self.word

    def shapes(self, panels: int, parts: tuple[int, ...]) -> dict[str, tuple[int | str, ...]]:
        nr = panel_width(self.target)
        groups = (panels, *parts, self.groups, nr)
        return {"w": (panels, *parts, self.words, nr, self.word), "scales": groups, "zeros": groups}

    def panel(self, f: Function, at: Mapping[str, Val], number: Val) -> list[Val]:
        """Where a panel's codes, scales and zeros begin."""
        nr = panel_width(self.target)
        first = number * (self.groups * nr)
        found = [f.at(at["w"], number * (self.words * nr * self.word), "uint8"), f.at(at["scales"], first, self.scales)]
        return [*found, f.at(at["zeros"], first, "uint8")] if self.zeros else found

    def multipliers(self, f: Function, at: Mapping[str, Val], lda: int) -> Sequence[Callable[[Val, Val], None]]:
        nr, sizes, inputs = panel_width(self.target), block_sizes(self.target), self.kind.per_byte
        direct = {mr: self._product(mr) for mr in sizes}

        def part(first: int, words: int) -> Callable[[Val, Val], None]:
            expand = self._expand(first, words)
            products = {mr: product(mr, self.target, k=words * inputs, accumulate=first > 0) for mr in sizes}

            def of(number: Val, tile: Val) -> None:
                panel = self.panel(f, at, number)

                def straight(mr: int, m: Val) -> None:
                    x, sums = f.at(at["a"], m * lda, "float32"), f.at(tile, m * nr, "float32")
                    f.use(direct[mr], x, lda, *panel, sums, nr)

                def expanded(mr: int, m: Val) -> None:
                    x, sums = f.at(at["a"], m * lda + first * inputs, "float32"), f.at(tile, m * nr, "float32")
                    f.use(products[mr], x, lda, at["scratch"], nr, sums, nr, words * inputs)

                def many() -> None:
                    f.use(expand, *panel, at["scratch"])
                    row_blocks(f, at["rows"], expanded, sizes)

                # Few rows go through all inputs at once: codes come from memory as a stream.
                all_at_once = None if first else lambda: row_blocks(f, at["rows"], straight, sizes)
                f.when(at["rows"] > sizes[0], many, all_at_once)

            return of

        return [part(first, words) for first, words in self.parts()]

    def parts(self) -> list[tuple[int, int]]:
        """Ranges of words (first, how many), whole groups, that all rows are multiplied by before the next is begun."""
        each = self.each if self.group else 16
        step = max(part_inputs(self.target) // self.kind.per_byte // each, 1) * each
        return [(first, min(step, self.words - first)) for first in range(0, max(self.words, 1), step)]

    def _walk(
        self, f: Function, at: Mapping[str, Val], first: int, words: int, carried: list[Val],
        visit: Callable[[Val, list[list[Val]], list[Val]], list[Val]],
    ) -> list[Val]:  # fmt: skip
        """visit(word, values by input and vector, carried) for each of these words of a panel; what is carried at the end."""
        nr, lanes = panel_width(self.target), f.lanes

        def group(i: Val, carried: list[Val]) -> list[Val]:
            scale, shift = scale_and_shift(f, self, at["s"], at.get("z"), i)

            def word(index: Val, carried: list[Val]) -> list[Val]:
                here = f.at(at["b"], index * nr, "i8")
                f.prefetch(f.at(here, ahead(self.target), "i8"))
                parts: list[list[Val]] = [[] for _ in range(self.kind.per_byte)]
                for j in range(VECTORS):
                    code = f.cast("zext", f.load(vector_type("i8", lanes), f.at(here, j * lanes, "i8")), "i32")
                    for part, one in zip(parts, [code] if len(parts) == 1 else [code & 15, code >> 4], strict=True):
                        part.append(f.fma(level(f, self.scheme, one), scale[j], shift[j]))
                return visit(index, parts, carried)

            begin, end = (
                (i * self.each, f.minimum(i * self.each + self.each, first + words))
                if self.group
                else (first, first + words)
            )
            *carried, _ = f.loop(begin, end, 1, carried, word)
            return carried

        groups = (first // self.each, -(-(first + words) // self.each)) if self.group else (0, 1)
        *carried, _ = f.loop(*groups, 1, carried, group)
        return carried

    def _expand(self, first: int, words: int) -> Micro:
        """void(codes, scales, [zeros,] out): the values float32 of these words of a panel: [inputs, NR]."""
        names = ("b", "s", *(["z"] if self.zeros else []), "out")
        f = Function("expand_codes", [("ptr", n) for n in names], self.target)
        at = dict(zip(names, f.params(), strict=True))
        nr, inputs = panel_width(self.target), self.kind.per_byte

        def store(word: Val, values: list[list[Val]], _: list[Val]) -> list[Val]:
            for i, vectors in enumerate(values):
                for j, v in enumerate(vectors):
                    f.store(v, f.at(at["out"], ((word - first) * inputs + i) * nr + j * f.lanes, "float32"))
            return []

        self._walk(f, at, first, words, [], store)
        return f.finish()

    def _product(self, mr: int) -> Micro:
        """C[mr, NR] = A[mr, k] @ B[k, NR] in float32, B being a panel.

        void(A, lda, codes, scales, [zeros,] C, ldc): strides in float32 words; A is padded with a zero to an even k. An element's sum
        goes from the first input to the last, as in `matmul.product`.
        """
        names = ("a", "lda", "b", "s", *(["z"] if self.zeros else []), "c", "ldc")
        f = Function(f"quantized{mr}", [("i64" if n.startswith("ld") else "ptr", n) for n in names], self.target)
        at = dict(zip(names, f.params(), strict=True))
        vec, inputs = vector_type("float", f.lanes), self.kind.per_byte
        rows = [f.at(at["a"], at["lda"] * m, "float32") for m in range(mr)]
        out = [
            f.at(f.at(at["c"], at["ldc"] * m, "float32"), j * f.lanes, "float32")
            for m in range(mr)
            for j in range(VECTORS)
        ]

        def add(word: Val, values: list[list[Val]], sums: list[Val]) -> list[Val]:
            for i, vectors in enumerate(values):
                for m in range(mr):
                    x = f.splat(f.load("float", f.at(rows[m], word * inputs + i, "float32")), f.lanes)
                    for j, w in enumerate(vectors):
                        sums[m * VECTORS + j] = f.fma(x, w, sums[m * VECTORS + j])
            return sums

        sums = self._walk(f, at, 0, self.words, [f.const(0.0, vec)] * len(out), add)
        for total, o in zip(sums, out, strict=True):
            f.store(total, o)
        return f.finish()


def scale_and_shift(f: Function, codes: Codes, s: Val, z: Val | None, group: Val) -> tuple[list[Val], list[Val]]:
    """What turns levels of a group of a panel into values, level * scale + shift, per vector; `s`, `z` are where the panel's begin."""
    nr = panel_width(codes.target)
    scales = [f.load_f32(s, group * nr + j * f.lanes, codes.scales) for j in range(VECTORS)]
    if z is None:
        return scales, [scale * -codes.kind.middle for scale in scales]
    return scales, [-(zero * scale) for zero, scale in zip(zeros(f, z, group * nr), scales, strict=True)]


def zeros(f: Function, z: Val, first: Val, kind: str = "float") -> list[Val]:
    """A panel's zeros of a group, as float32 or i32 lanes."""
    found = [f.load(vector_type("i8", f.lanes), f.at(z, first + j * f.lanes, "i8")) for j in range(VECTORS)]
    wide = [f.cast("zext", v, "i32") for v in found]
    return [f.cast("sitofp", v, "float") for v in wide] if kind == "float" else wide


def level(f: Function, scheme: str, code: Val) -> Val:
    """The levels float32 of codes (i32 lanes)."""
    kind = schemes.scheme(scheme)
    if kind.uniform:
        return f.cast("sitofp", code, "float")
    if kind.bits <= 4:
        return f.lookup(kind.levels.tolist(), code)
    # Small floats: exponent and mantissa lie as in float32, moved. The few least are subnormal numbers there, which is slow.
    size = (code & (2 ** (kind.bits - 1) - 1)) << (23 - kind.mantissa)
    sign = (code & 2 ** (kind.bits - 1)) << (32 - kind.bits)
    return f.cast("bitcast", size | sign, "float") * 2.0 ** (127 - kind.bias)


def quantized_linear(
    n: int, k: int, dtype: str, target: Target, *, scheme: str, group: int, scales: str = "float16", zeros: bool = False,
    gated: bool = False, bias: bool = False, activation: str = "none", residual: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of `matmul.linear`, or with `gated` of `gated_mlp_up`, whose weights are codes (see `ops.quantized_linear`).

    Parameters in order: x[M, k], codes uint8, scales of the dtype `scales`, zeros uint8 if `zeros`, bias[n] if `bias`,
    residual[M, n] if `residual`, y[M, n]. Raises TargetError where two codes of a byte belong to different groups.
    """
    codes = Codes(scheme, group, k, scales, zeros, target)
    if group % codes.kind.per_byte:
        raise TargetError(f"groups of {group} codes cut a byte of {scheme} in two")
    deepest = max((words for _, words in codes.parts()), default=0) * codes.kind.per_byte
    reader = attrs.evolve(codes, scratch_words=deepest * panel_width(target))
    return layer_func("quantized_linear", n, k, dtype, target, gated=gated, bias=bias, activation=activation,
                       residual=residual, reader=reader)  # fmt: skip
