"""What a matrix product computes, and how its operands lie in HBM.

Every operand has a logical shape and a padded one. Padding is declared, not done by clipped copies: the chip lays arrays out in whole
(sublane, lane) tiles anyway, its copies move whole tiles only, and zeros in the inner axis add nothing to a sum. So the TIR, its run on
the CPU and the emitted source all see the padded shapes, weights are padded once when a model is compiled, and what lies in the padding
of a result is unspecified: `crop` drops it.
"""

from __future__ import annotations

import attrs
import numpy as np

from jisu.compiler.errors import CompileError, InputError
from jisu.compiler.types import numpy_dtype

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid")
ACCUMULATOR = {"int8": "int32", "bfloat16": "float32"}
"""Operands' dtypes that the matrix unit multiplies, with what it sums in."""
RESULTS = ("bfloat16", "float32")


@attrs.frozen
class Operand:
    """A tensor in HBM: `shape` as the caller knows it, `padded` as kernels see it."""

    name: str
    shape: tuple[int, int]
    padded: tuple[int, int]
    dtype: str

    def pad(self, array: np.ndarray) -> np.ndarray:
        """The array with zeros behind its rows and columns; one that is padded already is returned as it is. InputError: it fits neither."""
        array = np.asarray(array)
        if array.dtype != numpy_dtype(self.dtype):
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
        raise CompileError(f"the matrix unit multiplies {' and '.join(ACCUMULATOR)}, not {value}")


@attrs.frozen
class Product:
    """activation(x [m, k] @ w [k, n] * channel_scale [1, n] * row_scale [m, 1] + bias [1, n]) + residual [m, n].

    x and w have `dtype` (int8, summed in int32; or bfloat16, summed in float32). Scales and bias are float32, the residual has the
    result's dtype. Everything behind the sum is computed in float32, in this order, and rounded once.
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

    @property
    def accumulator(self) -> str:
        """The dtype of sums."""
        return ACCUMULATOR[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of x and w."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def result_itemsize(self) -> int:
        """Bytes of a number of the result."""
        return numpy_dtype(self.result).itemsize

    def operands(self, m: int, n: int, k: int) -> tuple[Operand, ...]:
        """Its operands in the order of parameters, padded to m, n and k; the result comes last."""
        named = [
            (True, Operand("x", (self.m, self.k), (m, k), self.dtype)),
            (True, Operand("w", (self.k, self.n), (k, n), self.dtype)),
            (self.channel_scale, Operand("channel_scale", (1, self.n), (1, n), "float32")),
            (self.row_scale, Operand("row_scale", (self.m, 1), (m, 1), "float32")),
            (self.bias, Operand("bias", (1, self.n), (1, n), "float32")),
            (self.residual, Operand("residual", (self.m, self.n), (m, n), self.result)),
            (True, Operand("result", (self.m, self.n), (m, n), self.result)),
        ]
        return tuple(operand for wanted, operand in named if wanted)
