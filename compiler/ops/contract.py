"""Contractions: matrix products, the linear layer with its epilogue, convolution. Half precision accumulates in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.ops import elementwise as ew
from jisu.compiler.ops.elementwise import widened
from jisu.compiler.types import TensorType, TupleType, broadcast, dim, is_float, product, require, same_dim, same_shape

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


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
    }
    return np.asarray(functions[activation](x))


def _round(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype).astype(np.float32) if dtype.itemsize == 2 else x


def _wide(x: Any) -> Any:
    """Half precision as float32; anything else, None too, as it is."""
    return x.astype(np.float32) if x is not None and x.dtype.itemsize == 2 else x


def layer_result(
    result: TensorType, b: TensorType | None, r: TensorType | None, gated: bool, activation: str
) -> TensorType:
    """The type `result` [*b, outputs] of a layer; raises TypeRuleError for an unknown activation, for a bias that isn't [outputs] of its dtype, for a
    residual that isn't such a result, and for either of a gated layer."""
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    want = TensorType(result.shape[-1:], result.dtype)
    require(b is None or b == want, f"the bias must be {want}, got {b}")
    require(
        r is None or (r.dtype == result.dtype and same_shape(r.shape, result.shape)),
        f"the residual must be {result}, got {r}",
    )
    require(not gated or (b is None and r is None), "a gated layer has neither bias nor residual")
    return result


def _linear(
    x: np.ndarray, w: np.ndarray, b: np.ndarray | None, r: np.ndarray | None, *, activation: str, dtype: Any = None
) -> np.ndarray:
    """The layer's result; what is rounded is rounded to `dtype`, or else to x's."""
    dtype = dtype or x.dtype
    product = np.matmul(_wide(x), _wide(w).T)  # type: ignore[union-attr]
    if b is not None:
        product = product + _wide(b)
    result = _round(product, dtype)
    if activation != "none":
        result = _round(_activate(result, activation), dtype)
    if r is not None:
        result = result + _wide(r)
    return result.astype(dtype)


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
    require(w.dtype == x.dtype, f"dtypes differ: {x} and {w}")
    return layer_result(x.with_shape(*x.shape[:-1], w.shape[0]), b, r, False, activation)


def _gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, *, activation: str, dtype: Any = None) -> np.ndarray:
    dtype = dtype or x.dtype
    a = _activate(_round(np.matmul(_wide(x), _wide(gate).T), dtype), activation)  # type: ignore[union-attr]
    b = _round(np.matmul(_wide(x), _wide(up).T), dtype)  # type: ignore[union-attr]
    return (_round(a, dtype) * b).astype(dtype)


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


def _conv_flops(result: TensorType, x: TensorType, w: TensorType, **_: Any) -> Any:
    return 2 * result.size * product(w.shape[1:])


@defop(meaning=widened(_conv), axes=_conv_axes, flops=_conv_flops, samples=_conv_samples)
def conv(
    x: TensorType, w: TensorType, *, strides: tuple[int, ...], dilations: tuple[int, ...], groups: int = 1
) -> TensorType:
    """Cross-correlation of x [batch, channels, *space] with w [outputs, channels / groups, *kernel], without padding."""
    n = x.rank - 2
    require(
        n >= 1 and w.rank == x.rank,
        f"needs [batch, channels, space…] and [outputs, channels, kernel…], got {x} and {w}",
    )
    require(len(strides) == len(dilations) == n, f"strides and dilations need {n} entries each")
    require(x.dtype == w.dtype and x.dtype != "bool", f"dtypes differ: {x} and {w}")
    require(
        same_dim(x.shape[1], dim(w.shape[1] * groups)),
        f"{x} has {x.shape[1]} channels, w takes {w.shape[1]} x {groups}",
    )
    require(not isinstance(w.shape[0], int) or w.shape[0] % groups == 0, f"{w.shape[0]} outputs in {groups} groups")
    space = []
    for size, kernel, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True):
        span = dilation * (kernel - 1) + 1
        require(
            not isinstance(size, int) or not isinstance(span, int) or size >= span, f"kernel span {span} exceeds {size}"
        )
        space.append(dim(size - span + 1) if stride == 1 else dim((size - span) // stride + 1))
    return x.with_shape(x.shape[0], w.shape[0], *space)


# --- Packed weights ------------------------------------------------------------------------------------------------
# A kernel reads a weight [n, k] in panels of `panel` outputs, for each of which it wants the inputs next to each other
# (`pair` = 1), or two consecutive inputs in one word (`pair` = 2): [ceil(n / panel), ceil(k / pair), panel(, pair)].


def packed_shape(n: int, k: int, panel: int, pair: int) -> tuple[int, ...]:
    """Shape of a weight [n, k] packed in panels."""
    return (-(-n // panel), -(-k // pair), panel) + ((pair,) if pair > 1 else ())


def _pack(w: np.ndarray, *, panel: int, pair: int) -> np.ndarray:
    if w.ndim == 3:
        return np.stack([_pack(expert, panel=panel, pair=pair) for expert in w])
    n, k = w.shape
    out = np.zeros(packed_shape(n, k, panel, pair), w.dtype)
    step = panel * 64  # a block of panels at a time: no second copy of the whole weight
    for first in range(0, n, step):
        block = np.ascontiguousarray(w[first : first + step])
        rows = -(-len(block) // panel)
        if len(block) % panel or k % pair:
            block = np.pad(block, ((0, rows * panel - len(block)), (0, -k % pair)))
        place = out[first // panel : first // panel + rows]
        if pair > 1:  # move whole words
            word = np.dtype(f"u{pair * w.dtype.itemsize}")
            place.view(word)[..., 0] = block.view(word).reshape(rows, panel, -1).transpose(0, 2, 1)
        else:
            place[...] = block.reshape(rows, panel, k).transpose(0, 2, 1)
    return out


def _unpack(w: np.ndarray, n: int, k: int) -> np.ndarray:
    if w.ndim == 3:
        return w.transpose(0, 2, 1).reshape(-1, w.shape[1])[:n]
    return w.transpose(0, 2, 1, 3).reshape(w.shape[0] * w.shape[2], -1)[:n, :k]


def _pack_samples() -> Samples:
    yield ("float32[5, 3]",), {"panel": 4, "pair": 1}
    yield ("bfloat16[5, 3]",), {"panel": 2, "pair": 2}


@defop(meaning=_pack, flops=0, samples=_pack_samples)
def pack(w: TensorType, *, panel: int, pair: int = 1) -> TensorType:
    """A weight [n, k], or one per expert [e, n, k], in panels of `panel` outputs, padded with zeros."""
    require(w.rank in (2, 3) and w.size and isinstance(w.size, int), f"needs matrices of fixed size, got {w}")
    return w.with_shape(*w.shape[:-2], *packed_shape(*w.shape[-2:], panel, pair))  # type: ignore[arg-type, call-arg]


def _pack_gated(gate: np.ndarray, up: np.ndarray, *, panel: int, pair: int) -> np.ndarray:
    both = [_pack(w, panel=panel, pair=pair) for w in (gate, up)]
    return np.stack(both, gate.ndim - 1)


@defop(
    meaning=_pack_gated,
    flops=0,
    samples=lambda: iter([(("float32[5, 3]", "float32[5, 3]"), {"panel": 4, "pair": 1})]),
)
def pack_gated(gate: TensorType, up: TensorType, *, panel: int, pair: int = 1) -> TensorType:
    """Gate and up projections [n, k], or one per expert [e, n, k], panel by panel side by side."""
    require(gate == up and gate.rank in (2, 3), f"needs matrices of one type, got {gate} and {up}")
    first, *rest = packed_shape(*gate.shape[-2:], panel, pair)  # type: ignore[arg-type, call-arg]
    return gate.with_shape(*gate.shape[:-2], first, 2, *rest)


def _packed_rule(x: TensorType, w: TensorType, outputs: int, gated: bool) -> TensorType:
    shape = (w.shape[0], *w.shape[2:]) if gated else w.shape
    require(len(shape) in (3, 4) and w.dtype == x.dtype, f"needs a packed weight of {x.dtype}, got {w}")
    pair = shape[3] if len(shape) == 4 else 1
    want = packed_shape(outputs, x.shape[-1], shape[2], pair)  # type: ignore[arg-type]
    require(tuple(shape) == want, f"{w} is not [{outputs}, {x.shape[-1]}] packed in panels of {shape[2]}")
    return x.with_shape(*x.shape[:-1], outputs)


def _packed_flops(result: TensorType, x: TensorType, *_: Any, **__: Any) -> Any:
    return 2 * result.size * x.shape[-1]


def _packed_linear_samples() -> Samples:
    yield ("float32[2, 3]", "float32[2, 3, 4]", "float32[5]", "float32[2, 5]"), {"outputs": 5, "activation": "relu"}
    yield ("float32[2, 3]", "float32[2, 2, 4, 2]", None, None), {"outputs": 7}  # type: ignore[misc]


@defop(
    meaning=lambda x, w, b, r, *, outputs, activation: _linear(
        x, _unpack(w, outputs, x.shape[-1]), b, r, activation=activation
    ),
    axes=lambda x, w, b, r, **_: (
        f"*b k, {'p q n' if w.rank == 3 else 'p q n t'}, {'o' if b else ''}, {'*b o' if r else ''} -> *b o"
    ),
    flops=_packed_flops,
    samples=_packed_linear_samples,
)
def packed_linear(
    x: TensorType,
    w: TensorType,
    b: TensorType | None = None,
    r: TensorType | None = None,
    *,
    outputs: int,
    activation: str = "none",
) -> TensorType:
    """`linear` with a weight [outputs, k] that `pack` made."""
    return layer_result(_packed_rule(x, w, outputs, gated=False), b, r, False, activation)


@defop(
    meaning=lambda x, w, *, outputs, activation: _gated(
        x, _unpack(w[:, 0], outputs, x.shape[-1]), _unpack(w[:, 1], outputs, x.shape[-1]), activation=activation
    ),
    axes=lambda x, w, **_: f"*b k, {'p g q n' if w.rank == 4 else 'p g q n t'} -> *b o",
    flops=lambda result, x, w, **_: 2 * _packed_flops(result, x),
    samples=lambda: iter([(("float32[2, 3]", "float32[2, 2, 3, 4]"), {"outputs": 5, "activation": "silu"})]),
)
def packed_gated_linear(x: TensorType, w: TensorType, *, outputs: int, activation: str) -> TensorType:
    """`gated_linear` with weights that `pack_gated` made."""
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return _packed_rule(x, w, outputs, gated=True)


def _packed_projections(x: np.ndarray, *operands: np.ndarray, outputs: tuple[int, ...], biased: bool) -> Any:
    ws, bs = operands[: len(outputs)], operands[len(outputs) :] if biased else (None,) * len(outputs)
    unpacked = [_unpack(w, n, x.shape[-1]) for w, n in zip(ws, outputs, strict=True)]
    return tuple(_linear(x, w, b, None, activation="none") for w, b in zip(unpacked, bs, strict=True))


def _packed_projections_axes(x: TensorType, *operands: TensorType, outputs: tuple[int, ...], biased: bool) -> str:
    ws = operands[: len(outputs)]
    packs = [f"p{i} q n" if w.rank == 3 else f"p{i} q n t" for i, w in enumerate(ws)]
    biases = [f"o{i}" for i in range(len(outputs))] if biased else []
    return f"{', '.join(['*b k', *packs, *biases])} -> {', '.join(f'*b o{i}' for i in range(len(outputs)))}"


def _packed_projections_flops(result: TupleType, x: TensorType, *_: Any, **__: Any) -> Any:
    return sum((2 * t.size * x.shape[-1] for t in result.items), start=0)


def _packed_projections_samples() -> Samples:
    biases = ("float32[5]", "float32[7]")
    yield ("float32[2, 3]", "float32[2, 3, 4]", "float32[2, 3, 4]", *biases), {"outputs": (5, 7), "biased": True}
    yield ("float32[2, 3]", "float32[2, 2, 4, 2]", "float32[1, 2, 4, 2]"), {"outputs": (7, 3), "biased": False}


@defop(
    meaning=_packed_projections,
    axes=_packed_projections_axes,
    flops=_packed_projections_flops,
    samples=_packed_projections_samples,
)
def packed_projections(
    x: TensorType, *operands: TensorType, outputs: tuple[int, ...], biased: bool = False
) -> TupleType:
    """Several linear layers of one x at once (queries, keys and values): their results [*b, outputs[i]], in order.

    `operands` are the layers' weights, packed one by one, and then, if `biased`, their biases.
    """
    count = len(outputs)
    require(len(operands) == count * (2 if biased else 1), f"{count} layers with {len(operands)} weights and biases")
    results = tuple(_packed_rule(x, w, n, gated=False) for w, n in zip(operands, outputs, strict=False))
    for b, n in zip(operands[count:], outputs, strict=False):
        require(b == TensorType((n,), x.dtype), f"the bias must be {x.dtype}[{n}], got {b}")
    return TupleType(results)


def _packed_take(w: np.ndarray, indices: np.ndarray, *, rows: int, width: int) -> np.ndarray:
    from jisu.compiler.ops.index import _take

    return _take(_unpack(w, rows, width), indices, axis=0)


@defop(
    meaning=_packed_take,
    axes=lambda w, i, **_: f"{'p q n' if w.rank == 3 else 'p q n t'}, *b -> *b o",
    flops=0,
    samples=lambda: iter([(("float32[2, 3, 4]", "int64[2, 2] < 7"), {"rows": 7, "width": 3})]),
)
def packed_take(w: TensorType, indices: TensorType, *, rows: int, width: int) -> TensorType:
    """Rows of a packed weight [rows, width]: an embedding tied to a packed head."""
    pair = w.shape[3] if w.rank == 4 else 1
    require(tuple(w.shape) == packed_shape(rows, width, w.shape[2], pair), f"{w} is not [{rows}, {width}] packed")  # type: ignore[arg-type]
    require(indices.dtype in ("int64", "int32"), f"indices must be integers, got {indices}")
    return TensorType((*indices.shape, width), w.dtype)


def _packed_experts(
    x: np.ndarray,
    index: np.ndarray,
    scores: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    *,
    inner: int,
    activation: str,
) -> np.ndarray:
    from jisu.compiler.ops.nn import _experts

    width = x.shape[-1]
    gate_up = np.stack([np.concatenate([_unpack(e[:, i], inner, width) for i in (0, 1)]) for e in up])
    out = np.stack([_unpack(e, width, inner) for e in down])
    return _experts(x, index, scores, gate_up, out, activation=activation)


def _packed_experts_samples() -> Samples:
    yield (
        ("float32[3, 4]", "int64[3, 2] < 5", "float32[3, 2]", "float32[5, 1, 2, 4, 4]", "float32[5, 1, 3, 4]"),
        {"inner": 3, "activation": "silu"},
    )


@defop(
    meaning=_packed_experts,
    axes=lambda x, i, s, up, down, **_: (
        f"t h!, t k, t k, e p g {'q n' if up.rank == 5 else 'q n d'}, e u v w{'' if up.rank == 5 else ' d'} -> t h!"
    ),
    flops=lambda result, x, index, scores, up, down, *, inner, **_: 6 * index.size * inner * x.shape[1],
    samples=_packed_experts_samples,
)
def packed_experts(
    x: TensorType,
    index: TensorType,
    scores: TensorType,
    up: TensorType,
    down: TensorType,
    *,
    inner: int,
    activation: str,
) -> TensorType:
    """`experts` of `inner` channels, with gate and up projections packed by `pack_gated` and down ones by `pack`."""
    require(x.rank == 2 and same_shape(index.shape, scores.shape), f"index {index} and scores {scores} don't fit {x}")
    _packed_rule(x, up.with_shape(*up.shape[1:]), inner, gated=True)
    _packed_rule(x.with_shape(x.shape[0], inner), down.with_shape(*down.shape[1:]), x.shape[1], gated=False)  # type: ignore[arg-type]
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return x
