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
        nr = panel_width(self.target)
        products = {mr: self._product(mr) for mr in block_sizes(self.target)}

        def of(number: Val, tile: Val) -> None:
            panel = self.panel(f, at, number)

            def run(mr: int, m: Val) -> None:
                rows, out = f.at(at["a"], m * lda, "float32"), f.at(tile, m * nr, "float32")
                f.use(products[mr], rows, lda, *panel, out, nr)

            row_blocks(f, at["rows"], run, block_sizes(self.target))

        return [of]

    def _product(self, mr: int) -> Micro:
        """C[mr, NR] = A[mr, k] @ B[k, NR] in float32, B being one panel.

        void(A, lda, codes, scales, [zeros,] C, ldc): strides in float32 words; A is padded with a zero to an even k.
        """
        names = ("a", "lda", "b", "s", *(["z"] if self.zeros else []), "c", "ldc")
        f = Function(f"quantized{mr}", [("i64" if n.startswith("ld") else "ptr", n) for n in names], self.target)
        at = dict(zip(names, f.params(), strict=True))
        nr, per_byte = panel_width(self.target), self.kind.per_byte
        vec = vector_type("float", f.lanes)
        rows = [f.at(at["a"], at["lda"] * m, "float32") for m in range(mr)]

        def step(word: Val, sums: list[Val], scale: list[Val], shift: list[Val]) -> list[Val]:
            result = list(sums)
            here = f.at(at["b"], word * nr, "i8")
            if mr <= 2:
                f.prefetch(f.at(here, ahead(self.target), "i8"))
            for j in range(VECTORS):
                both = f.cast("zext", f.load(vector_type("i8", f.lanes), f.at(here, j * f.lanes, "i8")), "i32")
                parts = [both] if per_byte == 1 else [both & 15, both >> 4]
                for half, code in enumerate(parts):
                    w = f.fma(level(f, self.scheme, code), scale[j], shift[j])
                    for m in range(mr):
                        x = f.splat(f.load("float", f.at(rows[m], word * per_byte + half, "float32")), f.lanes)
                        slot = (half * mr + m) * VECTORS + j
                        result[slot] = f.fma(x, w, result[slot])
            return result

        def group(i: Val, sums: list[Val]) -> list[Val]:
            scale, shift = scale_and_shift(f, self, at["s"], at.get("z"), i)
            first = i * self.each
            last = f.minimum(first + self.each, self.words)

            *sums, _ = f.loop(first, last, 1, sums, lambda w, v: step(w, v, scale, shift))
            return sums

        *sums, _ = f.loop(0, self.groups, 1, [f.const(0.0, vec)] * (mr * VECTORS * per_byte), group)
        for m in range(mr):
            for j in range(VECTORS):
                first, *others = [sums[(half * mr + m) * VECTORS + j] for half in range(per_byte)]
                total = sum(others, first)
                f.store(total, f.at(f.at(at["c"], at["ldc"] * m, "float32"), j * f.lanes, "float32"))
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
    if kind.mantissa:  # exponent and mantissa lie as in float32, moved
        size = (code & (2 ** (kind.bits - 1) - 1)) << (23 - kind.mantissa)
        sign = (code & 2 ** (kind.bits - 1)) << (32 - kind.bits)
        return f.cast("bitcast", size | sign, "float") * 2.0 ** (127 - kind.bias)
    return f.lookup(kind.levels.tolist(), code)


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
    return layer_func("quantized_linear", n, k, dtype, target, gated=gated, bias=bias, activation=activation,
                       residual=residual, reader=codes)  # fmt: skip
