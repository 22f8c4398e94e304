"""A graph goes back to PyTorch, to be trained there, and its trained values come back into the graph.

    module = to_torch(graph)              # a torch.nn.Module over the graph's stored weights
    ...                                   # train it: fine-tune, or distil against the dense model
    graph = from_torch(graph, module)     # the same graph with the trained values

Weights keep their names and their stored form where that is integer: codes and masks are buffers, so that training can't
move a pruned weight or a code; scales are float32 parameters, through which gradients flow into the matrix that they give.
`MEANINGS` says what each op is in PyTorch. It is written down once more beside the NumPy meaning because gradients and
speed need PyTorch's own functions; the tests hold both to each other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jisu.compiler import ops
from jisu.compiler.errors import InputError, InputTypeError, UnsupportedError
from jisu.compiler.graph import CONSTANT, WEIGHT, ArrayStorage, Graph, Node, Op, Storage
from jisu.compiler.interpret import bind_symbols
from jisu.compiler.schemes import Scheme, decode_scales, encode_scales, scheme
from jisu.compiler.signature import Input, Parameter, Signature, Tree
from jisu.compiler.types import dtype_name, substitute
from jisu.frontends.aten.values import array_of

# --- Ops -----------------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _indices(indices: Tensor, size: int) -> Tensor:
    """Indices from -size to size - 1 as PyTorch's int64 ones from 0."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _shift(function: Callable[[Tensor, Tensor], Tensor], fill: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def shifted(a: Tensor, b: Tensor) -> Tensor:
        inside = (b >= 0) & (b < a.element_size() * 8)
        return torch.where(inside, function(a, torch.where(inside, b, 0)), fill(a))

    return shifted


def _slice(x: Tensor, *, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Tensor:
    return x[tuple(slice(*k) for k in zip(starts, stops, steps, strict=True))]


def _pad(x: Tensor, value: Tensor, *, low: Sequence[int], high: Sequence[int], interior: Sequence[int]) -> Tensor:
    shape = [lo + hi + n + max(n - 1, 0) * i for n, lo, hi, i in zip(x.shape, low, high, interior, strict=True)]
    result = value.expand(shape).clone()
    inside = tuple(slice(lo, size - hi, i + 1) for lo, hi, i, size in zip(low, high, interior, shape, strict=True))
    result[inside] = x
    return result


def _windows(x: Tensor, *, axes: Any, sizes: Any, strides: Any, dilations: Any) -> Tensor:
    for axis, size, stride, dilation in zip(axes, sizes, strides, dilations, strict=True):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def _take(x: Tensor, indices: Tensor, *, axis: int, wrap: bool) -> Tensor:
    indices = _indices(indices, x.shape[axis]) if wrap else indices.long()
    if axis == 0 and x.ndim == 2:
        return F.embedding(indices, x)
    return x.index_select(axis, indices.reshape(-1)).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    return x.gather(axis, _indices(indices, x.shape[axis]))


def _scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, mode: str) -> Tensor:
    places = _indices(indices, x.shape[axis])
    if mode == "set":
        return x.scatter(axis, places, updates)
    if mode == "add":
        return x.scatter_add(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, {"mul": "prod", "min": "amin", "max": "amax"}[mode])


def _along(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction over several axes; PyTorch takes no axes for all of them."""

    def reduced(x: Tensor, *, axes: tuple[int, ...], keepdims: bool) -> Tensor:
        return function(x, axes, keepdims) if axes else x

    return reduced


def _prod(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keepdims, dtype=x.dtype)
    return x


def _ordered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch has no largest and smallest bool."""
    return lambda x, *, axis: function(x.to(torch.uint8) if x.dtype == torch.bool else x, axis)


def _scan(x: Tensor, *, axis: int, kind: str) -> Tensor:
    if kind == "sum":
        return x.cumsum(axis, dtype=x.dtype)
    if kind == "prod":
        return x.cumprod(axis, dtype=x.dtype)
    return (x.cummax(axis) if kind == "max" else x.cummin(axis)).values


def _linear(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, *, activation: str) -> Tensor:
    result = ACTIVATIONS[activation](F.linear(x, w, b))
    return result if r is None else result + r


def _gated_linear(x: Tensor, gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv(x: Tensor, w: Tensor, *, strides: Any, dilations: Any, groups: int) -> Tensor:
    return _CONVOLUTIONS[x.ndim - 2](x, w, stride=strides, dilation=dilations, groups=groups)


def _rms_norm(x: Tensor, w: Tensor | None, *, eps: float, offset: float, round_first: bool) -> Tensor:
    gain = w + offset if w is not None and offset else w
    if x.dtype.itemsize > 2:
        return F.rms_norm(x, x.shape[-1:], gain, eps)
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    if w is None:
        return normed.to(x.dtype)
    normed = normed.to(x.dtype).float() if round_first else normed
    return (normed * (w.float() + offset)).to(x.dtype)


def _layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        rotated = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        rotated = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    result = turned * cos + rotated * sin
    return torch.cat([result, rest], -1) if rest.shape[-1] else result


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, *,
    scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    s, t = q.shape[1], k.shape[1]
    visible = bias if bias is not None and bias.dtype == torch.bool else None
    added = None if visible is not None else bias
    plain = causal and visible is None and s == t and (not window or window >= t)
    if causal and not plain:
        i, j = torch.arange(t - s, t, device=q.device)[:, None], torch.arange(t, device=q.device)
        seen = (j <= i) & (j > i - window) if window else j <= i
        visible = seen if visible is None else visible & seen
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    if not softcap and sinks is None and added is None:
        attended = F.scaled_dot_product_attention(q, k, v, visible, is_causal=plain, scale=scale)
        return attended.transpose(1, 2)
    if plain:
        visible = torch.ones(s, t, dtype=torch.bool, device=q.device).tril()
    return _attend(q, k, v, visible, added, sinks, scale, softcap).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, added: Tensor | None, sinks: Tensor | None,
    scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention [b, h, s, d] written out, for what PyTorch's own function lacks; half precision is computed in float32."""
    dtype = q.dtype
    q, k, v = (x.float() if dtype.itemsize == 2 else x for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if visible is not None:
        # A number instead of -inf: a query that sees nothing would have NaN as its gradient, even behind the mask below.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    if visible is not None:
        weights = weights.masked_fill(~visible, 0)
    return (weights @ v).to(dtype)


def _experts(x: Tensor, index: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    result = torch.zeros_like(x, dtype=torch.float32 if x.dtype.itemsize == 2 else x.dtype)
    for e in range(gate_up.shape[0]):
        token, choice = torch.where(index == e)
        if token.numel():
            gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
            out = F.linear(ACTIVATIONS[activation](gate) * up, down[e]) * scores[token, choice, None]
            result = result.index_add(0, token, out.to(result.dtype))
    return result.to(x.dtype)


def _expert_linear(x: Tensor, index: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    rows = x.expand(*index.shape, x.shape[-1])
    result = x.new_zeros((*index.shape, w.shape[1]))
    for e in range(w.shape[0]):
        chosen = torch.where(index == e)
        if chosen[0].numel():
            result = result.index_put(chosen, F.linear(rows[chosen], w[e], None if b is None else b[e]))
    return result


def _places(count: int, x: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=x.device)


def _unpacked(packed: Tensor, bits: int, k: int) -> Tensor:
    """The first k codes uint8 [..., k] of what `schemes.pack_bits` made."""
    if bits == 8:
        return packed[..., :k]
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :k]
    single = ((packed[..., None] >> _places(8, packed)) & 1).flatten(-2)[..., : k * bits]
    return (single.unflatten(-1, (k, bits)) << _places(bits, packed)).sum(-1, dtype=torch.uint8)


def _unpack_bits(x: Tensor, *, bits: int) -> Tensor:
    stream = x.contiguous().view(torch.uint8)
    return _unpacked(stream, bits, stream.shape[-1] * 8 // bits)


def _pack_bits(x: Tensor, *, bits: int) -> Tensor:
    single = ((x[..., None] >> _places(bits, x)) & 1).flatten(-2)
    single = F.pad(single, (0, -single.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (single << _places(8, x)).sum(-1, dtype=torch.uint8)


def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, mask: Tensor | None, *, scheme: str, k: int, group: int, whole: float,
    dtype: str,
) -> Tensor:  # fmt: skip
    kind = _scheme(scheme)
    single = _unpacked(codes, kind.bits, k if mask is None else codes.shape[-1] * 8 // kind.bits)
    levels = single.float() if kind.uniform else torch.from_numpy(kind.levels).to(codes.device)[single.int()]
    if mask is not None:
        levels, there = _expand(levels, mask, k=k), _expand(torch.ones_like(levels), mask, k=k)
    decoded = scales.float() if scales.is_floating_point() else _decoded(scales, kind, whole)
    if zeros is not None:
        levels = levels - _spread(zeros.float(), k, group)
    elif kind.middle:
        levels = levels - kind.middle
    if mask is not None:
        levels = levels * there
    return (levels * _spread(decoded, k, group)).to(_dtype(dtype))


_scheme = scheme  # the op's attribute has the same name


def _decoded(stored: Tensor, kind: Scheme, whole: float) -> Tensor:
    return torch.from_numpy(decode_scales(array_of(stored.cpu()), kind.scale, whole)).to(stored.device)


def _spread(values: Tensor, k: int, group: int) -> Tensor:
    """Per group [n, groups] as per input [n, k]."""
    if values.shape[-1] == 1:
        return values
    return values.repeat_interleave(group, -1)[..., :k]


def _expand(values: Tensor, mask: Tensor, *, k: int) -> Tensor:
    bits = ((mask[..., None] >> _places(8, mask)) & 1).flatten(-2)[..., :k]
    places = bits.flatten().nonzero()[: values.shape[0], 0]
    flat = values.new_zeros(bits.numel()).index_copy(0, places, values[: places.shape[0]])
    return flat.unflatten(0, bits.shape)


def _fake_quantize(x: Tensor, scale: Tensor | None, *, scheme: str, group: int) -> Tensor:
    """Rounded, with the gradient of the identity where nothing is clipped (straight-through; Bengio et al., 2013)."""
    kind = _scheme(scheme)
    groups = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    given = None if scale is None else array_of(scale.detach().cpu()).astype(np.float32)
    found = kind.running_scales(array_of(groups.detach().cpu()), given)
    scales = torch.from_numpy(np.array(found)).to(x.device)
    inside = (groups.detach() / scales).clamp(-kind.middle or -kind.top, kind.top)
    rounded = torch.from_numpy(kind.rounded(array_of(inside.cpu()))).to(x.device)
    clipped = groups.clamp(scales * (-kind.middle or -kind.top), scales * kind.top)
    return (clipped + (rounded * scales - clipped).detach()).flatten(-2).to(x.dtype)


def _elementwise(name: str) -> Callable[..., Tensor]:
    found = getattr(torch, name)
    assert callable(found)
    return found  # type: ignore[no-any-return]


_SAME_NAME = (
    ops.neg, ops.abs_, ops.sign, ops.relu, ops.square, ops.exp, ops.exp2, ops.expm1, ops.log, ops.log2, ops.log10, ops.log1p,
    ops.sqrt, ops.rsqrt, ops.reciprocal, ops.sin, ops.cos, ops.tan, ops.asin, ops.acos, ops.atan, ops.sinh, ops.cosh,
    ops.tanh, ops.asinh, ops.acosh, ops.atanh, ops.erf, ops.sigmoid, ops.floor, ops.ceil, ops.round_, ops.trunc, ops.add,
    ops.sub, ops.mul, ops.div, ops.remainder, ops.fmod, ops.pow_, ops.maximum, ops.minimum, ops.atan2, ops.copysign, ops.eq,
    ops.ne, ops.lt, ops.le, ops.gt, ops.ge, ops.logical_and, ops.logical_or, ops.logical_xor, ops.logical_not, ops.isnan,
    ops.where, ops.matmul,
)  # fmt: skip
"""Ops that PyTorch has under the same name, with the same meaning."""

Meaning = Callable[..., Any]
"""An op in PyTorch: operands as tensors (None where one is left out), attributes by name."""

MEANINGS: Mapping[Op, Meaning] = {
    **{op: _elementwise(op.name) for op in _SAME_NAME},
    ops.silu: F.silu,
    ops.gelu: F.gelu,
    ops.trunc_div: functools.partial(torch.div, rounding_mode="trunc"),
    ops.floor_div: functools.partial(torch.div, rounding_mode="floor"),
    ops.bit_and: torch.bitwise_and,
    ops.bit_or: torch.bitwise_or,
    ops.bit_xor: torch.bitwise_xor,
    ops.bit_not: torch.bitwise_not,
    ops.shift_left: _shift(torch.bitwise_left_shift, torch.zeros_like),
    ops.shift_right: _shift(torch.bitwise_right_shift, lambda a: torch.where(a < 0, -1, 0).to(a.dtype)),
    ops.cast: lambda x, *, dtype: x.to(_dtype(dtype)),
    ops.reshape: lambda x, *, shape: x.reshape(shape),
    ops.transpose: lambda x, *, perm: x.permute(perm),
    ops.broadcast_to: lambda x, *, shape: x.expand(shape),
    ops.slice_: _slice,
    ops.concat: lambda *xs, axis: torch.cat(xs, axis),
    ops.pad: _pad,
    ops.flip: lambda x, *, axes: x.flip(axes),
    ops.iota: lambda *, extent, dtype: torch.arange(extent).to(_dtype(dtype)),
    ops.dim_value: lambda *, value: torch.tensor(value, dtype=torch.int64),
    ops.windows: _windows,
    ops.get: lambda xs, *, index: xs[index],
    ops.take: _take,
    ops.gather: _gather,
    ops.scatter: _scatter,
    ops.sort: lambda x, *, axis, descending: tuple(torch.sort(x, dim=axis, descending=descending, stable=True)),
    ops.sum_: _along(lambda x, axes, keepdims: x.sum(axes, keepdim=keepdims, dtype=x.dtype)),
    ops.prod: _along(_prod),
    ops.reduce_max: _along(torch.amax),
    ops.reduce_min: _along(torch.amin),
    ops.any_: _along(torch.any),
    ops.all_: _along(torch.all),
    ops.argmax: _ordered(torch.argmax),
    ops.argmin: _ordered(torch.argmin),
    ops.scan: _scan,
    ops.softmax: lambda x, *, axis: x.softmax(axis),
    ops.linear: _linear,
    ops.gated_linear: _gated_linear,
    ops.conv: _conv,
    ops.rms_norm: _rms_norm,
    ops.layer_norm: _layer_norm,
    ops.rotary: _rotary,
    ops.attention: _attention,
    ops.experts: _experts,
    ops.expert_linear: _expert_linear,
    ops.dequantize: _dequantize,
    ops.expand: _expand,
    ops.fake_quantize: _fake_quantize,
    ops.unpack_bits: _unpack_bits,
    ops.pack_bits: _pack_bits,
}
"""What each op is in PyTorch: tensors in, attributes by keyword, tensors out, differentiable where there are gradients. Ops
that only layout and the cache make have no entry."""


# --- Weights -------------------------------------------------------------------------------------------------------


def _tensor_of(array: np.ndarray) -> Tensor:
    """A tensor over the array's memory."""
    if not array.flags.aligned or not array.flags.c_contiguous or not array.flags.writeable and array.size == 0:
        array = np.array(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # buffers are never written
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _scales_of(graph: Graph) -> dict[str, tuple[Scheme, float]]:
    """Stored scales by name, with their scheme and the factor of the whole matrix."""
    found = {}
    for node in graph.nodes:
        if node.op is ops.dequantize and node.parents[1].op is WEIGHT:
            found[str(node.parents[1].name)] = (scheme(node.scheme), float(node.whole))
    return found


_NARROWER = {"": (), "float32": ("float16", "bfloat16"), "float64": ("float16", "bfloat16", "float32")}


def _floats(dtype: Any) -> str:
    name = "" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _NARROWER:
        raise InputError(f"dtype is float32 or float64, in which narrower floats are computed, or None; not {dtype!r}")
    return name


@attrs.frozen(eq=False)
class _Plan:
    """How a graph is run: computed once, shared by copies of a module."""

    graph: Graph
    floats: str
    steps: tuple[tuple[Node, Meaning, Mapping[str, Any], bool, tuple[Node, ...]], ...]
    signature: Signature
    decoder: bool
    source: Any

    def __deepcopy__(self, memo: Any) -> _Plan:
        return self


def _planned(graph: Graph, floats: str, signature: Signature, decoder: bool, source: Any) -> _Plan:
    refused = sorted({n.op.name for n in graph.nodes if not n.op.leaf and n.op not in MEANINGS})
    if refused:
        raise UnsupportedError(
            f"{', '.join(refused)}: made by the passes for layout or the cache, and not in PyTorch; convert the graph before them"
        )
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        last |= dict.fromkeys(node.parents, node)
    dead: dict[Node, list[Node]] = {}
    for node, user in last.items():
        if node not in graph.outputs:
            dead.setdefault(user, []).append(node)
    steps = []
    for node in graph.nodes:
        if node.op.leaf:
            continue
        attributes = dict(node.attributes)
        if attributes.get("dtype") in _NARROWER[floats]:
            attributes["dtype"] = floats
        steps.append((node, MEANINGS[node.op], attributes, _symbolic(attributes.values()), tuple(dead.get(node, ()))))
    return _Plan(graph, floats, tuple(steps), signature, decoder, source)


def _symbolic(values: Any) -> bool:
    return any(_symbolic(v) if isinstance(v, tuple) else hasattr(v, "free_symbols") for v in values)


def _by_position(graph: Graph) -> Signature:
    """How a bare graph is called: its inputs in order, or by name; it returns its outputs as a tuple."""
    inputs = tuple(Input(n.name, n.tensor, i) for i, n in enumerate(graph.inputs))
    parameters = tuple(Parameter(i.name, "plain", Tree("leaf", i.position)) for i in inputs)
    return Signature(parameters, inputs, Tree("tuple", items=tuple(Tree("leaf", i) for i in range(len(graph.outputs)))))


class GraphModule(nn.Module):
    """A graph as a module of PyTorch; `to_torch` and `jisu.to_torch` make it.

    It is called like the model that the graph was captured from, and returns what that returns. Training mode changes
    nothing: the graph is that of the mode in which the model was captured. `source` is what `jisu.compile` knew of the model,
    so that it can take the module back.
    """

    def __init__(
        self, graph: Graph, *, buffers: Collection[str] = (), dtype: Any = None, signature: Signature | None = None,
        decoder: bool = False, source: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._plan = _planned(graph, _floats(dtype), signature or _by_position(graph), decoder, source)
        scales = _scales_of(graph)
        for name, storage in graph.weights.items():
            self._place(name, self._loaded(name, storage, scales, name not in buffers))

    def _loaded(self, name: str, storage: Storage, scales: Mapping[str, Any], trained: bool) -> Tensor:
        array = storage.numpy()
        if name in scales:
            kind, whole = scales[name]
            return nn.Parameter(torch.from_numpy(np.array(decode_scales(array, kind.scale, whole))))
        tensor = _tensor_of(array)
        if not tensor.is_floating_point():
            return tensor
        floats = self._plan.floats
        wide = tensor.to(_dtype(floats)) if _name(tensor.dtype) in _NARROWER[floats] else tensor
        if not trained:
            return wide
        # A copy: the values belong to a file or to the user's model, which training must not write to.
        return nn.Parameter(wide if wide is not tensor else tensor.clone())

    def _place(self, name: str, tensor: Tensor) -> None:
        """Register under a dotted name, in modules that are made on the way."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:  # past add_module, which refuses names of our own attributes
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner._buffers[leaf] = tensor

    @property
    def graph(self) -> Graph:
        """The graph with the values that the module has now; see `from_torch`."""
        return from_torch(self._plan.graph, self)

    @property
    def signature(self) -> Signature:
        """How the module is called."""
        return self._plan.signature

    @property
    def source(self) -> Any:
        """What the driver knew of the model; None for the module of a bare graph."""
        return self._plan.source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        A causal language model takes input_ids int64 [batch, sequence], attention_mask (padding on the right only) and
        position_ids. Raises InputError for what doesn't fit, naming the input, what was expected and what came.
        """
        signature = self._plan.signature
        if self._plan.decoder:
            inputs = _decoder_inputs(self._plan.graph, *args, **kwargs)
        else:
            inputs = signature.flatten_call(args, kwargs)
        outputs = self._run(inputs)
        with torch.no_grad():
            for position, index in signature.mutations:
                inputs[index].copy_(outputs[position])
        return signature.unflatten(outputs)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The graph's outputs on its inputs, in order."""
        plan = self._plan
        values: dict[Node, Any] = {}
        for node, x in zip(plan.graph.inputs, inputs, strict=True):
            if not isinstance(x, Tensor) or _name(x.dtype) not in (node.dtype, self._held(node.dtype)):
                shown = _name(x.dtype) if isinstance(x, Tensor) else type(x).__name__
                raise InputTypeError(f"input {node.name!r}: expected a tensor {node.tensor}, got {shown}")
            values[node] = self._wide(x)
        env = bind_symbols(plan.graph, [tuple(x.shape) for x in inputs])
        stored = {name: tensor for group in (self.named_parameters, self.named_buffers) for name, tensor in group()}
        device = next((x.device for x in (*inputs, *stored.values())), torch.device("cpu"))
        for node in plan.graph.nodes:
            if node.op is WEIGHT:
                values[node] = stored[node.name]
            elif node.op is CONSTANT:
                values[node] = self._wide(_tensor_of(np.array(node.value.array))).to(device)
        for node, meaning, attributes, symbolic, dead in plan.steps:
            if symbolic:
                attributes = {k: substitute(v, env) for k, v in attributes.items()}
            result = self._compute(node, meaning, [None if o is None else values[o] for o in node.operands], attributes)
            values[node] = result if node.operands else result.to(device)
            for parent in dead:
                del values[parent]
        return tuple(values[o] for o in plan.graph.outputs)

    def _compute(self, node: Node, meaning: Meaning, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        """The value of a node; where a subclass can look on."""
        return meaning(*operands, **attributes)

    def _held(self, dtype: str) -> str:
        """The dtype in which values of a dtype are held."""
        return self._plan.floats if dtype in _NARROWER[self._plan.floats] else dtype

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(_dtype(self._held(_name(x.dtype))))


_WITHOUT_EFFECT = {"use_cache": (False, None), "return_dict": (True, None), "logits_to_keep": (0,)}


def _decoder_inputs(
    graph: Graph, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
    **others: Any,
) -> list[Tensor]:  # fmt: skip
    """The graph's inputs from a causal language model's arguments."""
    for name, value in others.items():
        if name not in _WITHOUT_EFFECT or value not in _WITHOUT_EFFECT[name]:
            raise InputError(f"unexpected argument {name}={value!r}; the module takes input_ids and attention_mask")
    if input_ids is None or input_ids.ndim != 2:
        raise InputError("input_ids: expected int64 [batch, sequence]")
    if attention_mask is not None:
        mask = attention_mask.bool()
        if mask.shape != input_ids.shape or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
            raise InputError("attention_mask: expected the shape of input_ids, with padding on the right only")
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    given = {"input_ids": input_ids, "position_ids": position_ids}
    return [given[node.name] for node in graph.inputs]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_torch(graph: Graph, *, buffers: Collection[str] = (), dtype: torch.dtype | str | None = None) -> GraphModule:
    """A graph as a module of PyTorch, to be trained there. It takes the graph's inputs in order and returns a tuple.

    The module's parameters and buffers are the graph's stored weights under their own names; a weight with several uses is one
    parameter. Integers (codes, masks) are buffers and share the graph's memory; floats are parameters, but for those named in
    `buffers` (what the model never trains: rotary frequencies, running means). Scales of codes are float32 parameters
    whatever their storage. dtype: float32 or float64, in which narrower floats are held and computed instead.

    Raises UnsupportedError for ops that only layout and the cache make, InputError for another dtype.
    """
    return GraphModule(graph, buffers=buffers, dtype=dtype)


def from_torch(graph: Graph, module: nn.Module) -> Graph:
    """`graph` with the values of `module`'s parameters and buffers of the same names, each in its stored dtype.

    Nothing else changes. Arrays share the module's memory where the dtype allows it: train on, and the graph sees it. Raises
    InputError for a weight that the module lacks, has in another shape, or holds NaN or infinities in where it was trained.
    """
    state = {
        name: tensor
        for group in (module.named_parameters, module.named_buffers)
        for name, tensor in group(remove_duplicate=False)
    }
    scales = _scales_of(graph)
    weights: dict[str, Storage] = {}
    for name, storage in graph.weights.items():
        if name not in state:
            raise InputError(f"weight {name!r} is not in the module")
        tensor = state[name].detach()
        if tuple(tensor.shape) != tuple(storage.shape):
            raise InputError(
                f"weight {name!r}: the graph stores {list(storage.shape)}, the module has {list(tensor.shape)}"
            )
        array = _stored(tensor, np.dtype(storage.dtype), scales.get(name))
        if isinstance(state[name], nn.Parameter) and not _finite(array):
            raise InputError(
                f"weight {name!r}: training left NaN or infinite numbers, or numbers beyond {storage.dtype}"
            )
        unmoved = array.ctypes.data == storage.numpy().ctypes.data
        weights[name] = storage if unmoved else ArrayStorage(array)
    return attrs.evolve(graph, weights=weights)


def _stored(tensor: Tensor, dtype: np.dtype, scales: tuple[Scheme, float] | None) -> np.ndarray:
    """Values in the form in which they are stored."""
    if scales is not None and dtype == np.uint8 and tensor.is_floating_point():
        kind, whole = scales
        positive = tensor.clamp(min=torch.finfo(torch.float32).tiny)
        return encode_scales(array_of(positive), kind.scale, whole)[0]
    wanted = _dtype(dtype_name(dtype))
    return array_of(tensor if tensor.dtype == wanted else tensor.to(wanted))


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "biu" or bool(np.isfinite(array).all())
