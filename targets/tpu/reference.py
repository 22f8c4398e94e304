"""What a product means, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from jisu.compiler.types import numpy_dtype
from jisu.targets.tpu.spec import MIDDLE, Product

_erf = np.vectorize(math.erf, otypes=[np.float64])
_ACTIVATION: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def weights(named: Mapping[str, np.ndarray], w: str, product: Product) -> np.ndarray:
    """The matrix float64 [k, n] that an operand stands for."""
    levels = named[w].astype(np.float64)
    if not product.group:
        return levels

    def spread(kind: str) -> np.ndarray:
        return np.repeat(named[f"{w}_{kind}"].astype(np.float64), product.group, axis=0)[: len(levels)]

    if product.zeros:
        levels = levels + MIDDLE[product.weights] - spread("zero")
    return levels * spread("scale")


def reference(product: Product, *arrays: np.ndarray, exact: bool = True) -> np.ndarray:
    """The product of arrays in the order of its operands, rounded to its result's dtype.

    exact: what follows the sum is computed in float64 and rounded once; otherwise in float32, step by step as kernels do, which agrees
    with them bit by bit where there is no activation, bias or residual.
    """
    wide = np.float64 if exact else np.float32
    named = dict(zip((o.name for o in product.operands(product.m, product.n, product.k)), arrays, strict=False))

    def scaled(w: str, channel_scale: str) -> np.ndarray:
        # float64 holds all sums that int32 does, and is multiplied fast.
        sums = named["x"].astype(np.float64) @ weights(named, w, product)
        value = sums if exact else sums.astype(np.float32)
        for scale in (channel_scale,) * product.channel_scale + ("row_scale",) * product.row_scale:
            value = value * named[scale].astype(wide)
        return value

    value = scaled("w", "channel_scale")
    if product.bias:
        value = value + named["bias"].astype(wide)
    value = _ACTIVATION[product.activation](value)
    if product.gated:
        value = value * scaled("u", "up_scale")
    if product.residual:
        value = value + named["residual"].astype(wide)
    return value.astype(np.float32).astype(numpy_dtype(product.result))
