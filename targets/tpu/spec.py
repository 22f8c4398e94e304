"""What a matrix product computes, and how its operands lie in HBM.

Every operand has a logical shape and a padded one. Padding is declared, not done by clipped copies: the chip lays arrays out in whole
(sublane, lane) tiles anyway, its copies move whole tiles only, and zeros in the inner axis add nothing to a sum. So the TIR, its run on
the CPU and the emitted source all see the padded shapes, weights are padded once when a model is compiled, and what lies in the padding
of a result is unspecified: `crop` drops it.
"""

from __future__ import annotations

import math

import attrs
import numpy as np

from jisu.compiler.errors import CompileError, InputError
from jisu.compiler.types import numpy_dtype
from jisu.targets.tpu.chip import itemsize

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid")
ACCUMULATOR = {"int8": "int32", "bfloat16": "float32", "float32": "float32"}
"""Dtypes that the matrix unit multiplies, with what it sums in; float32 in six passes over parts in bfloat16, which keep its precision."""
NARROW = "int8"
"""What w may be stored in where x has floats: its numbers become x's dtype, exactly, on their way into the matrix unit."""
MIDDLE = {"int8": 128, "int4": 8}
"""The code that stands for 0 where a group has no zero, of levels of so many bits: a level is a code less that."""
RESULTS = ("bfloat16", "float32")


@attrs.frozen
class Operand:
    """A tensor in HBM: `shape` as the caller knows it, `padded` as kernels see it. On this machine int4 are kept as int8."""

    name: str
    shape: tuple[int, int]
    padded: tuple[int, int]
    dtype: str

    def pad(self, array: np.ndarray) -> np.ndarray:
        """The array with zeros behind its rows and columns; one that is padded already is returned as it is. InputError: it fits neither."""
        array = np.asarray(array)
        if array.dtype != numpy_dtype("int8" if self.dtype == "int4" else self.dtype):
            raise InputError(f"{self.name} must be {self.dtype}, got {array.dtype}")
        if array.shape == self.padded:
            return np.ascontiguousarray(array)
        if array.shape != self.shape:
            raise InputError(f"{self.name} must be {list(self.shape)} or {list(self.padded)}, got {list(array.shape)}")
        return np.pad(array, [(0, p - s) for s, p in zip(self.shape, self.padded, strict=True)])

    def crop(self, array: np.ndarray) -> np.ndarray:
        """The array without its padding."""
        return array[: self.shape[0], : self.shape[1]]


def _multipliable(_: object, attribute: object, value: str) -> None:
    if value not in ACCUMULATOR:
        raise CompileError(f"the matrix unit multiplies {', '.join(ACCUMULATOR)}, not {value}")


def _held(instance: Product, _: object, value: str) -> None:
    if value not in (instance.dtype, *(MIDDLE if instance.group else (NARROW,))):
        raise CompileError(f"weights of a product in {instance.dtype} are that or {NARROW}, not {value}")


def _grouped(instance: Product, _: object, value: int) -> None:
    if value and instance.weights not in MIDDLE:
        raise CompileError(f"weights with a scale per group are codes, not {instance.weights}")
    if value and instance.channel_scale:
        raise CompileError("weights with a scale per group have none per output")


def _alone(instance: Product, _: object, value: bool) -> None:
    if value and (instance.bias or instance.residual):
        raise CompileError("a gated product has neither bias nor residual")


@attrs.frozen
class Product:
    """activation(x [m, k] @ w [k, n] * channel_scale [1, n] * row_scale [m, 1] + bias [1, n]) + residual [m, n]; or, gated,
    activation(x @ w * channel_scale * row_scale) * (x @ u * up_scale * row_scale), without bias and residual. With `group`, the number in row i and
    column j of w (and of u) is (w + middle - w_zero[i // group, j]) * w_scale[i // group, j], the middle being that of its codes, and the zero,
    unless `zeros`, too.

    x has `dtype` (int8, summed in int32; bfloat16 or float32, summed in float32), and so have w and u, unless `weights` says that they are
    stored in int8; in groups they are levels int8 or int4, summed in float32. Scales and bias are float32, those of groups have the dtype
    `scales`, zeros are codes uint8, the residual has the result's dtype. Everything behind the sum is computed in float32, in this order, and
    rounded once.
    """

    m: int = attrs.field(validator=attrs.validators.ge(1))
    n: int = attrs.field(validator=attrs.validators.ge(1))
    k: int = attrs.field(validator=attrs.validators.ge(1))
    dtype: str = attrs.field(default="bfloat16", validator=_multipliable)
    result: str = attrs.field(default="bfloat16", validator=attrs.validators.in_(RESULTS))
    channel_scale: bool = False
    row_scale: bool = False
    bias: bool = False
    activation: str = attrs.field(default="none", validator=attrs.validators.in_(ACTIVATIONS))
    residual: bool = False
    weights: str = attrs.field(
        default=attrs.Factory(lambda self: self.dtype, takes_self=True), validator=_held, kw_only=True
    )
    gated: bool = attrs.field(default=False, validator=_alone, kw_only=True)
    group: int = attrs.field(default=0, validator=_grouped, kw_only=True)
    zeros: bool = attrs.field(default=False, kw_only=True)
    scales: str = attrs.field(default="float16", validator=attrs.validators.in_(("float16", "float32")), kw_only=True)

    @property
    def accumulator(self) -> str:
        """The dtype of sums."""
        return "float32" if self.group else ACCUMULATOR[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of x."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def weight_itemsize(self) -> float:
        """Bytes of a number of w."""
        return itemsize(self.weights)

    def grid_bytes(self, k: int, n: int) -> int:
        """Bytes of all scales and zeros of groups of w [k, n], and of u."""
        return self.matrices * sum(self.grids(k, n))

    def grids(self, k: int, n: int) -> tuple[int, ...]:
        """Bytes of the scales of groups of w [k, n], and of their zeros."""
        each = (itemsize(self.scales), *((1,) if self.zeros else ())) if self.group else ()
        return tuple(int(k // self.group * n * size) for size in each)

    @property
    def matrices(self) -> int:
        """How many matrices x is multiplied by."""
        return 1 + self.gated

    @property
    def widens(self) -> bool:
        """Whether w's numbers become another dtype before they are multiplied."""
        return self.weights != self.dtype and not self.group

    @property
    def result_itemsize(self) -> int:
        """Bytes of a number of the result."""
        return numpy_dtype(self.result).itemsize

    @property
    def least_bytes(self) -> int:
        """Bytes of all operands, read once as they are stored, and of the result, written once."""
        return sum(int(math.prod(o.shape) * itemsize(o.dtype)) for o in self.operands(self.m, self.n, self.k))

    def operands(self, m: int, n: int, k: int) -> tuple[Operand, ...]:
        """Its operands in the order of parameters, padded to m, n and k; the result comes last."""
        named = [
            (True, Operand("x", (self.m, self.k), (m, k), self.dtype)),
            (True, Operand("w", (self.k, self.n), (k, n), self.weights)),
            (self.gated, Operand("u", (self.k, self.n), (k, n), self.weights)),
            *self._grids(n, k),
            (self.channel_scale, Operand("channel_scale", (1, self.n), (1, n), "float32")),
            (self.channel_scale and self.gated, Operand("up_scale", (1, self.n), (1, n), "float32")),
            (self.row_scale, Operand("row_scale", (self.m, 1), (m, 1), "float32")),
            (self.bias, Operand("bias", (1, self.n), (1, n), "float32")),
            (self.residual, Operand("residual", (self.m, self.n), (m, n), self.result)),
            (True, Operand("result", (self.m, self.n), (m, n), self.result)),
        ]
        return tuple(operand for wanted, operand in named if wanted)

    def _grids(self, n: int, k: int) -> list[tuple[bool, Operand]]:
        """Scales and zeros of groups."""
        if not self.group:
            return []
        shapes = (-(-self.k // self.group), self.n), (-(-k // self.group), n)
        kinds = (("scale", True, self.scales), ("zero", self.zeros, "uint8"))
        return [
            (there and (w == "w" or self.gated), Operand(f"{w}_{name}", *shapes, dtype))
            for w in "wu"
            for name, there, dtype in kinds
        ]
