"""Quantization schemes: how a matrix of weights is stored in few bits, declared once per scheme.

A row of a matrix [n, k] is cut into groups of consecutive inputs. A group has a scale and, on an asymmetric grid, a zero;
each number has a code, and means

    value = (levels[code] - zero) * scale

A new scheme is an entry of `SCHEMES`: its levels, its usual group, and how its scales are stored. Everything else
(quantising, packing, bytes, kernels' tables) follows from that.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import ml_dtypes
import numpy as np

from jisu.compiler.types import require

SCALES = ("float16", "e8m0", "e4m3")
"""How a group's scale is stored: a float (float32 where float16 has not the range), a power of two, or e4m3 times one
float32 of the whole matrix. The latter two take one byte."""


def _fp4() -> np.ndarray:
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([positive, -positive])


def _fp8() -> np.ndarray:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(values), 0, values)  # e4m3 has two codes for NaN; no weight gets one


# Quantiles of the normal distribution, with an exact zero (Dettmers et al., "QLoRA", 2023, appendix E).
_NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., ceil(k * bits / 8)] of codes uint8 [..., k]: their lowest `bits` bits one after the other, the lowest first."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    k = codes.shape[-1]
    if bits == 4 and k % 2 == 0:  # the usual ones, two by two
        pairs = np.ascontiguousarray(codes).view("<u2") & np.uint16(0x0F0F)
        return (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    eights = _in_eights(codes, k, 8)  # eight codes take `bits` bytes
    packed = np.zeros((*eights.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights[..., i] & np.uint8(2**bits - 1)
        packed[..., byte] |= code << np.uint8(shift)
        if shift + bits > 8:
            packed[..., byte + 1] |= code >> np.uint8(8 - shift)
    return np.ascontiguousarray(packed.reshape(*codes.shape[:-1], -1)[..., : -(-k * bits // 8)])


def unpack_bits(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The first k codes uint8 [..., k] of what `pack_bits` made."""
    if bits == 8:
        return packed[..., :k]
    if bits == 4:
        pairs = packed.astype("<u2", order="C")  # which a view as bytes wants
        return ((pairs | pairs << np.uint16(4)) & np.uint16(0x0F0F)).view(np.uint8)[..., :k]
    eights = _in_eights(packed, k, bits)
    codes = np.empty((*eights.shape[:-1], 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights[..., byte] >> np.uint8(shift)
        if shift + bits > 8:
            code |= eights[..., byte + 1] << np.uint8(8 - shift)
        codes[..., i] = code & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :k]


def _in_eights(row: np.ndarray, k: int, size: int) -> np.ndarray:
    """The last axis in parts of `size` bytes, one for eight of k codes, padded with zeros."""
    parts = -(-k // 8)
    short = parts * size - row.shape[-1]
    if short > 0:
        row = np.concatenate([row, np.zeros((*row.shape[:-1], short), np.uint8)], -1)
    return row[..., : parts * size].reshape(*row.shape[:-1], parts, size)


def groups_of(k: int, group: int) -> int:
    """Groups of k inputs (group 0: one of all)."""
    return -(-k // group) if group else 1


@attrs.frozen(eq=False)
class Scheme:
    """One way to store numbers.

    bits: of a code. levels: float32 [2**bits], what a code means before scaling. group: inputs per scale where the user
    names none (0: a whole row). scale: one of `SCALES`. uniform: levels are 0, 1, 2, …, so that zeros can move the grid;
    without zeros the middle level is 0. mantissa, bias: of levels that are small floats (sign, exponent, mantissa bits), else 0:
    kernels then decode by moving bits.
    """

    name: str
    bits: int
    levels: np.ndarray = attrs.field(repr=False)
    group: int = 128
    scale: str = attrs.field(default="float16", validator=attrs.validators.in_(SCALES))
    uniform: bool = False
    mantissa: int = 0
    bias: int = 0

    @property
    def middle(self) -> float:
        """The zero of a symmetric grid."""
        return float(2 ** (self.bits - 1)) if self.uniform else 0.0

    @property
    def top(self) -> float:
        """How far the levels reach from the middle, in the direction in which they reach less far."""
        return float(2 ** (self.bits - 1) - 1) if self.uniform else float(self.levels.max())

    @property
    def per_byte(self) -> int:
        """Codes in a byte where kernels read them: two of up to 4 bits, or one."""
        return 2 if self.bits <= 4 else 1

    def panel_words(self, k: int, word: int = 1) -> int:
        """How often `word` bytes hold codes of an output of k inputs where kernels read them."""
        return -(-k // (self.per_byte * word))

    def groups(self, k: int, group: int) -> int:
        """How many groups a row of k inputs has (group 0: one)."""
        return groups_of(k, group)

    def grid(
        self, low: np.ndarray, high: np.ndarray, symmetric: bool = True, shrink: np.ndarray | float = 1.0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(scales, zeros) float32 [n, groups] of groups whose numbers go from `low` to `high` float32 [n, groups]; zeros is None for a
        symmetric grid.

        shrink: the range that the grid covers, relative to that of the numbers (numbers outside are clipped).
        """
        if symmetric or not self.uniform:
            reach = np.maximum(high, -low) * shrink
            return self.stored(np.where(reach > 0, reach / self.top, 1.0)), None
        low, high = np.minimum(low, 0) * shrink, np.maximum(high, 0) * shrink
        span = (high - low).astype(np.float32)
        scale = self.stored(np.where(span > 0, span / (2**self.bits - 1), 1.0))
        return scale, np.clip(np.rint(-low / scale), 0, 2**self.bits - 1).astype(np.float32)

    def stored(self, scales: np.ndarray) -> np.ndarray:
        """Scales as they come back from storage, float32; never 0."""
        codes, whole = encode_scales(scales, self.scale)
        return decode_scales(codes, self.scale, whole)

    def encode(self, w: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
        """The codes uint8, of w's shape, of the nearest levels; scales and zeros broadcast against w."""
        v = np.asarray(w / scales, np.float32)
        if self.uniform:
            v += np.float32(self.middle) if zeros is None else zeros
            np.minimum(np.maximum(np.rint(v, out=v), 0, out=v), 2**self.bits - 1, out=v)
            return v.astype(np.uint8)
        order = np.argsort(self.levels, kind="stable")
        ranked = self.levels[order]
        return order[np.searchsorted((ranked[1:] + ranked[:-1]) / 2, v)].astype(np.uint8)

    def decode(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
        """float32 values of codes."""
        shift = (self.middle if self.uniform else 0.0) if zeros is None else zeros
        return np.asarray((self.levels[codes] - np.float32(shift)) * scales, np.float32)

    def on_grid(self, w: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
        """What `decode` makes of `encode`'s codes, of w's shape and dtype, without the codes; scales and zeros broadcast against w."""
        if not self.uniform:
            return self.decode(self.encode(w, scales, zeros), scales, zeros).astype(w.dtype)
        shift = self.middle if zeros is None else zeros
        found = np.rint(w / scales + shift)
        np.minimum(np.maximum(found, 0, out=found), 2**self.bits - 1, out=found)
        return np.asarray((found - shift) * scales)

    @property
    def computes(self) -> bool:
        """Whether rounding to the levels is arithmetic (integers, small floats), so that values can be rounded at each call."""
        return self.uniform or self.mantissa > 0

    def rounded(self, v: np.ndarray) -> np.ndarray:
        """The nearest levels, relative to the middle, of numbers float32; halves go to the even one, NaN stays."""
        require(self.computes, f"{self.name} is a table of levels; values are rounded to integers or small floats")
        if self.uniform:
            return np.asarray(np.clip(np.rint(v), -self.middle, self.top), np.float32)
        step = np.ldexp(np.float32(1), np.maximum(exponent(v), 1 - self.bias) - self.mantissa)
        return np.asarray(np.clip(np.rint(v / step) * step, -self.top, self.top), np.float32)

    def running_scales(self, groups: np.ndarray, given: np.ndarray | None = None) -> np.ndarray:
        """Scales float32 [*b, groups, 1] of numbers [*b, groups, g] that are rounded at each call; never 0 for finite numbers.

        Each comes from its group (an e4m3 scale also from its row, whose largest is 448 steps), or is the one `given` for all: of an
        e4m3 scale that step.
        """
        reach = np.abs(groups).max(-1, keepdims=True)
        if self.scale == "e8m0":
            require(given is None, f"{self.name} takes its scales from the values")
            return np.asarray(
                np.ldexp(np.float32(1), np.clip(exponent(reach) - exponent(np.float32(self.top)), -126, 127))
            )
        if self.scale == "e4m3":
            largest = reach.max(-2, keepdims=True)
            step = given if given is not None else _positive(largest / np.float32(self.top * 448))
            codes = SCHEMES["fp8"].rounded(reach / np.float32(self.top) / step)
            return np.asarray(np.maximum(codes, np.float32(2.0**-9)) * step, np.float32)
        return np.broadcast_to(_positive(reach / np.float32(self.top)) if given is None else given, reach.shape)

    def row_bytes(self, k: int) -> int:
        """Bytes of the codes of k numbers."""
        return -(-k * self.bits // 8)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [n, row_bytes(k)] of codes [n, k] (see `pack_bits`)."""
        return pack_bits(codes, self.bits)

    def unpack(self, packed: np.ndarray, k: int) -> np.ndarray:
        """codes uint8 [n, k] of what `pack` made."""
        return unpack_bits(packed, self.bits, k)


def exponent(v: np.ndarray | np.float32) -> np.ndarray:
    """The exponent int32 in float32's bits: floor(log2 |v|) of normal numbers, -127 of zeros and subnormal ones."""
    return ((np.asarray(v, np.float32).view(np.int32) >> 23) & 255) - 127


def _positive(scales: np.ndarray) -> np.ndarray:
    """Scales with 1 where nothing is to be scaled; NaN stays."""
    return np.where(scales == 0, np.float32(1), scales)


def _uniform(bits: int, group: int) -> Scheme:
    return Scheme(f"int{bits}", bits, np.arange(2**bits, dtype=np.float32), group, uniform=True)


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        _uniform(8, 0),
        _uniform(6, 128),
        _uniform(5, 128),
        _uniform(4, 128),
        _uniform(3, 128),
        _uniform(2, 64),
        Scheme("fp8", 8, _fp8(), 0, mantissa=3, bias=7),
        Scheme("mxfp4", 4, _fp4(), 32, "e8m0", mantissa=1, bias=1),
        Scheme("nvfp4", 4, _fp4(), 16, "e4m3", mantissa=1, bias=1),
        Scheme("nf4", 4, _NF4, 64),
    )
}
"""Schemes by name. fp8 is e4m3 (Micikevicius et al., 2022); mxfp4 and nvfp4 are e2m1 in groups of 32 and 16 (OCP MX 1.0; NVIDIA)."""


def encode_scales(scales: np.ndarray, kind: str, whole: float | None = None) -> tuple[np.ndarray, float]:
    """Scales in storage, and the factor that belongs to all of them (1 but for e4m3); `whole` keeps a given one.

    float16 (float32 where some scale is outside of its normal range), or uint8 codes.
    """
    scales = np.asarray(scales, np.float32)
    if kind == "e8m0":  # as OCP MX: the power of two below the largest number maps to that below the largest level, 6
        exponent = np.floor(np.log2(scales * np.float32(1.5)))
        return (np.clip(exponent, -127, 127) + 127).astype(np.uint8), 1.0
    if kind == "e4m3":
        whole = whole or float(scales.max() / 448) or 1.0
        codes = np.clip(scales / np.float32(whole), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes.view(np.uint8), whole
    info = np.finfo(np.float16)
    fits = scales.size == 0 or (scales.min() >= info.smallest_normal and scales.max() <= info.max)
    return scales.astype(np.float16 if fits else np.float32), 1.0


def decode_scales(stored: np.ndarray, kind: str, whole: float = 1.0) -> np.ndarray:
    """float32 scales of what `encode_scales` made of scales of this kind; floats are themselves."""
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    if kind == "e8m0":
        return np.exp2(stored.astype(np.float32) - 127)
    return stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(whole)


def scheme(name: str) -> Scheme:
    """The scheme called `name`; raises TypeRuleError for an unknown one."""
    require(name in SCHEMES, f"unknown scheme {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
