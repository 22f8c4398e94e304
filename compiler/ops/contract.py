"""Contractions: matrix products, the linear layer with its epilogue, convolution. Half precision accumulates in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.ops import elementwise as ew
from jisu.compiler.ops.elementwise import widened
from jisu.compiler.types import TensorType, broadcast, dim, is_float, require, same_dim, same_shape

Samples = Iterator[tuple[tuple[str, ...], dict[str, Any]]]


@defop(meaning=widened(np.matmul), axes="*b m k, *b k n -> *b m n", flops=2)
def matmul(a: TensorType, b: TensorType) -> TensorType:
    """Product over the last two axes; leading axes broadcast."""
    require(min(a.rank, b.rank) >= 2, f"needs matrices, got {a} and {b}")
    require(a.dtype == b.dtype and a.dtype != "bool", f"needs numbers of one dtype, got {a} and {b}")
    (*batch_a, rows, inner_a), (*batch_b, inner_b, columns) = a.shape, b.shape
    require(same_dim(inner_a, inner_b), f"inner axes differ: {a} and {b}")
    return a.with_shape(*broadcast(tuple(batch_a), tuple(batch_b)), rows, columns)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: ew.relu(x),
    "relu2": lambda x: ew.square(ew.relu(x)),
    "gelu": lambda x: ew.gelu(x, approximate="none"),
    "gelu_tanh": lambda x: ew.gelu(x, approximate="tanh"),
    "silu": lambda x: ew.silu(x),
    "sigmoid": lambda x: ew.sigmoid(x),
    "tanh": lambda x: ew.tanh(x),
}
"""Activations that kernels apply before a result is stored; each value builds the same from elementwise ops."""


def _activate(x: np.ndarray, activation: str) -> np.ndarray:
    from jisu.compiler.ops.elementwise import _gelu, _sigmoid

    functions = {
        "none": lambda v: v,
        "relu": lambda v: np.maximum(v, 0),
        "relu2": lambda v: np.square(np.maximum(v, 0)),
        "gelu": lambda v: _gelu(v, approximate="none"),
        "gelu_tanh": lambda v: _gelu(v, approximate="tanh"),
        "silu": lambda v: v * _sigmoid(v),
        "sigmoid": _sigmoid,
        "tanh": np.tanh,
    }
    return np.asarray(functions[activation](x))


def _round(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype).astype(np.float32) if dtype.itemsize == 2 else x


def _wide(x: np.ndarray | None) -> np.ndarray | None:
    return x.astype(np.float32) if x is not None and x.dtype.itemsize == 2 else x


def _linear(
    x: np.ndarray, w: np.ndarray, b: np.ndarray | None, r: np.ndarray | None, *, activation: str
) -> np.ndarray:
    product = np.matmul(_wide(x), _wide(w).T)  # type: ignore[union-attr]
    if b is not None:
        product = product + _wide(b)
    result = _round(product, x.dtype)
    if activation != "none":
        result = _round(_activate(result, activation), x.dtype)
    if r is not None:
        result = result + _wide(r)
    return result.astype(x.dtype)


def _linear_samples() -> Samples:
    yield ("float32[2, 3]", "float32[4, 3]", "float32[4]", "float32[2, 4]"), {"activation": "silu"}
    yield ("float32[2, 2, 3]", "float32[4, 3]", None, None), {"activation": "none"}  # type: ignore[misc]


@defop(meaning=_linear, axes="*b k, n k, n, *b n -> *b n", flops=2, samples=_linear_samples)
def linear(
    x: TensorType, w: TensorType, b: TensorType | None = None, r: TensorType | None = None, *, activation: str = "none"
) -> TensorType:
    """activation(x @ w.T + b) + r: the layer that every target has a fast kernel for. `w` is [outputs, inputs]."""
    require(x.rank >= 1 and w.rank == 2 and is_float(x.dtype), f"needs floats and a matrix of weights, got {x} and {w}")
    require(same_dim(x.shape[-1], w.shape[1]), f"inner axes differ: {x} and {w}")
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    result = x.with_shape(*x.shape[:-1], w.shape[0])
    require(w.dtype == x.dtype, f"dtypes differ: {x} and {w}")
    require(b is None or b == TensorType((w.shape[0],), x.dtype), f"the bias must be {x.dtype}[{w.shape[0]}], got {b}")
    require(
        r is None or (r.dtype == x.dtype and same_shape(r.shape, result.shape)), f"the residual must be {result}, got {r}"
    )
    return result


def _gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, *, activation: str) -> np.ndarray:
    a = _activate(_round(np.matmul(_wide(x), _wide(gate).T), x.dtype), activation)  # type: ignore[union-attr]
    b = _round(np.matmul(_wide(x), _wide(up).T), x.dtype)  # type: ignore[union-attr]
    return (_round(a, x.dtype) * b).astype(x.dtype)


def _gated_samples() -> Samples:
    yield ("float32[2, 3]", "float32[4, 3]", "float32[4, 3]"), {"activation": "silu"}


@defop(meaning=_gated, axes="*b k, n k, n k -> *b n", flops=4, samples=_gated_samples)
def gated_linear(x: TensorType, gate: TensorType, up: TensorType, *, activation: str) -> TensorType:
    """activation(x @ gate.T) * (x @ up.T), the first half of a gated MLP (Shazeer, 2020)."""
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    require(gate == up, f"gate and up differ: {gate} and {up}")
    return linear.rule(x, gate)  # type: ignore[misc, return-value]


def _conv(x: np.ndarray, w: np.ndarray, *, strides: Any, dilations: Any, groups: int) -> np.ndarray:
    from jisu.compiler.ops.shape import _windows

    n = x.ndim - 2
    axes = tuple(range(2, 2 + n))
    patches = _windows(x, axes=axes, sizes=w.shape[2:], strides=strides, dilations=dilations)
    batch, channels, *rest = patches.shape
    out = w.shape[0]
    patches = patches.reshape(batch, groups, channels // groups, *rest)
    kernel = w.reshape(groups, out // groups, *w.shape[1:])
    letters = "pqrs"[:n]
    inner = "uvwt"[:n]
    result = np.einsum(f"bgc{letters}{inner},goc{inner}->bgo{letters}", patches, kernel)
    return result.reshape(batch, out, *result.shape[3:])


def _conv_axes(x: TensorType, w: TensorType, *, strides: Any, dilations: Any, groups: int) -> str:
    inside = " ".join(f"p{i}" for i in range(x.rank - 2))
    kernel = " ".join(f"u{i}" for i in range(x.rank - 2))
    out = " ".join(f"q{i}" for i in range(x.rank - 2))
    channels = "c" if groups == 1 else "gc"
    return f"b {channels} {inside}, o c {kernel} -> b o {out}"


def _conv_samples() -> Samples:
    yield ("float32[2, 4, 6]", "float32[6, 2, 3]"), {"strides": (2,), "dilations": (1,), "groups": 2}
    yield ("float32[1, 2, 5, 5]", "float32[3, 2, 2, 3]"), {"strides": (1, 2), "dilations": (2, 1), "groups": 1}


@defop(meaning=widened(_conv), axes=_conv_axes, flops=2, samples=_conv_samples)
def conv(
    x: TensorType, w: TensorType, *, strides: tuple[int, ...], dilations: tuple[int, ...], groups: int = 1
) -> TensorType:
    """Cross-correlation of x [batch, channels, *space] with w [outputs, channels / groups, *kernel], without padding."""
    n = x.rank - 2
    require(n >= 1 and w.rank == x.rank, f"needs [batch, channels, space…] and [outputs, channels, kernel…], got {x} and {w}")
    require(len(strides) == len(dilations) == n, f"strides and dilations need {n} entries each")
    require(x.dtype == w.dtype and x.dtype != "bool", f"dtypes differ: {x} and {w}")
    require(same_dim(x.shape[1], dim(w.shape[1] * groups)), f"{x} has {x.shape[1]} channels, w takes {w.shape[1]} x {groups}")
    require(not isinstance(w.shape[0], int) or w.shape[0] % groups == 0, f"{w.shape[0]} outputs in {groups} groups")
    space = []
    for size, kernel, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True):
        span = dilation * (kernel - 1) + 1
        require(not isinstance(size, int) or not isinstance(span, int) or size >= span, f"kernel span {span} exceeds {size}")
        space.append(dim(size - span + 1) if stride == 1 else dim((size - span) // stride + 1))
    return x.with_shape(x.shape[0], w.shape[0], *space)
