"""Which nodes get a kernel written for GPUs: a table from ops to choosers. A chooser returns None where the generic kernel has to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import attrs
import sympy

from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim, dim, fixed, product, same_dim
from jisu.targets.cpu.isa import FLOATS, require_activation
from jisu.targets.cuda import choose_layers
from jisu.targets.cuda.choose_layers import Arguments, Then, ceiling, least, one_output_per_panel, present
from jisu.targets.cuda.device import DeviceKernel
from jisu.targets.cuda.kernels import (
    experts,
    hopper,
    norm,
    records,
    rounding,
    sampling,
    single_attention,
)  # fmt: skip
from jisu.targets.cuda.kernels.attention import QUERIES, Form, attend_token, attend_tokens, sharing
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.kernels.tails import Encoding, Tail
from jisu.targets.cuda.lowering import DeviceCall, DeviceFunction
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target


def encoding_of(node: Node) -> Encoding | None:
    """How an `encode_levels` rounds rows, or None where no kernel does it."""
    x, scale = node.operands
    assert x is not None
    if not isinstance(x.shape[-1], int):
        return None
    return Encoding(x.shape[-1], x.dtype, node.scheme, node.group, node.own, scale is not None)


def cut_of(node: Node) -> tuple[Dim, Dim, Dim] | None:
    """Which rows a slice takes, see `Then`; None where it isn't of one axis alone, and of whole rows."""
    (x,) = node.parents
    sliced = [k for k, (a, b) in enumerate(zip(x.shape, node.shape, strict=True)) if not same_dim(a, b)]
    if len(sliced) != 1 or sliced[0] == x.rank - 1 or any(step != 1 for step in node.steps):
        return None
    (axis,) = sliced
    inside = product(x.shape[axis + 1 : -1])
    return node.shape[axis] * inside, x.shape[axis] * inside, node.starts[axis] * inside


def tail_alone(then: Then, target: Target) -> Kernel:
    """What is made of rows that are there: of them, the tail's operands and its results."""
    call = then.call(tuple(range(1 + len(then.tail.pointers))), target)
    return Kernel(DeviceFunction((((), (call,)),)), tuple(Argument(i) for i in range(1 + len(then.tail.operands))))


def _encode_levels(node: Node, target: Target) -> Kernel | None:
    how = encoding_of(node)
    return None if how is None else tail_alone(Then(Tail(None, how), product(node.shape[:-1])), target)


_KEYS_PER_PART = 256  # of one token's attention, at least, so that parts are worth their merging
_BLOCKS = 4  # of one token's attention, per multiprocessor, so that enough reads are under way


def _form(q: Node, kv_heads: int, width: object, **how: object) -> Form | None:
    """How attention works on these heads, or None where no kernel does it."""
    heads, head_dim = fixed(q.shape[2]), fixed(q.shape[3])
    if q.dtype not in FLOATS or width != head_dim:
        return None
    return Form(heads, kv_heads, head_dim, dtype=q.dtype, **how)  # type: ignore[arg-type]


def _many_tokens(form: Form, batch: Dim, rows: Dim, arguments: Arguments, target: Target) -> DeviceCall:
    """Attention of so many new tokens per sequence."""
    own, kernel = QUERIES, attend_tokens
    if form.dtype == "float32":
        own, kernel = single_attention.queries(form), single_attention.attend_single
    return DeviceCall(kernel(form, target), (ceiling(rows, own) * batch, form.heads, 1), arguments)


def _attention(node: Node, target: Target) -> Kernel | None:
    q, k, v, bias, sinks = node.operands
    assert q is not None and k is not None and v is not None
    form = _form(
        q, fixed(k.shape[2]), v.shape[3], scale=node.scale, layout="plain", causal=node.causal, window=node.window,
        softcap=node.softcap, sinks=sinks is not None,
    )  # fmt: skip
    if form is None or bias is not None:
        return None
    batch, rows = q.shape[:2]
    operands = (0, 1, 2, *present(node, 4))
    arguments = (*range(len(operands) + 1), ("size", rows), ("size", k.shape[1]))
    call = _many_tokens(form, batch, rows, arguments, target)
    return Kernel(DeviceFunction((((), (call,)),)), tuple(Argument(i) for i in operands))


def _attention_cached(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    """Attention over a cache. then: what is made of each token's results, all heads side by side; operands and results follow as in `_layer`."""
    q, keys, _, _, _, table, sinks = node.operands
    assert q is not None and keys is not None
    contiguous = keys.op is ops.cache_append and not keys.attributes["ring"]
    layout = "paged" if table is not None else "contiguous" if contiguous else "ring"
    form = _form(
        q, fixed(keys.shape[1]), node.shape[3], scale=node.scale, layout=layout,
        page=fixed(keys.shape[2]) if table is not None else 0, window=node.window, softcap=node.softcap, sinks=sinks is not None,
        scheme=node.scheme,
    )  # fmt: skip
    if form is None:
        return None
    batch, rows = q.shape[:2]
    cap = keys.shape[2] if table is None else table.shape[1]
    slots = cap if table is None else cap * keys.shape[2]
    wanted = min(node.window, slots) if node.window and isinstance(slots, int) else node.window or slots
    own = form.heads // sharing(form)
    parts = least(ceiling(wanted, _KEYS_PER_PART), ceiling(_BLOCKS * target.cores, own))
    heads, width = form.heads, form.head_dim
    # Operands: q, keys, values, the table, start, length, sinks; behind them the result, then the parts' states and counters.
    operands = (0, 1, 2, *present(node, 5), 4, 3, *present(node, 6))
    tail = None if then is None else then.tail
    count = len(operands) + (0 if tail is None else len(tail.operands))
    given = tuple(range(len(operands), count))
    made = tuple(range(count + 1, count + 1 + (0 if tail is None else len(tail.results))))
    sizes = (("size", cap), *((("size", keys.shape[0]),) if table is not None else ()))
    states = count + 1 + len(made)  # and counters
    own_memory = (*range(len(operands)), count, states, states + 1, *given, *made)
    one = DeviceCall(attend_token(form, target, tail), (parts * batch, own, 1), (*own_memory, *sizes, ("size", parts)))
    variants: list[tuple[tuple[tuple[Dim, int], ...], tuple[DeviceCall, ...]]] = [(((rows, 1),), (one,))]
    many = _many_tokens(form, batch, rows, (*range(len(operands)), count, ("size", rows), *sizes), target)
    behind = () if then is None else (then.call((count, *given, *made), target),)
    variants.append(((), (many, *behind)))
    counters = batch * (own + (then is not None))
    function = DeviceFunction(tuple(variants), (batch * heads * parts * (width + 2) * 4,), counters)
    return Kernel(function, tuple(Argument(i) for i in operands))


def norm_of(node: Node) -> norm.Norm | None:
    """What norm a node is, or None where no kernel does it."""
    x, *given = node.operands
    assert x is not None
    width = x.shape[-1]
    if not isinstance(width, int) or x.dtype not in FLOATS:
        return None
    rms = node.op is ops.rms_norm
    return norm.Norm(
        width, x.dtype, node.eps, rms, given[0] is not None, len(given) > 1 and given[1] is not None,
        node.offset if rms else 0.0, bool(rms and node.round_first),
    )  # fmt: skip


def _norm(node: Node, target: Target) -> Kernel | None:
    x, how = node.operands[0], norm_of(node)
    assert x is not None
    if how is None:
        return None
    return tail_alone(Then(Tail(how), product(x.shape[:-1])), target)


def _fake_quantize(node: Node, target: Target) -> Kernel | None:
    x, scale = node.operands
    assert x is not None
    if scale is not None:
        return None
    size = fixed(node.group or x.shape[-1])
    kernel = rounding.rounded_rows(size, node.dtype, node.scheme, target)
    count = dim(sympy.sympify(x.tensor.size) / size)
    call = DeviceCall(kernel, (ceiling(count, rounding.WARPS), 1, 1), (0, 1, ("size", count)))
    return Kernel(DeviceFunction((((), (call,)),)), (Argument(0),))


def _encode_rows(node: Node, target: Target) -> Kernel | None:
    x, feedback = node.operands
    assert x is not None
    if feedback is not None:
        return None
    kernel = records.encoded_rows(fixed(x.shape[-1]), x.dtype, node.scheme, target)
    count = product(x.shape[:-1])
    call = DeviceCall(kernel, (ceiling(count, rounding.WARPS), 1, 1), (0, 1, ("size", count)))
    return Kernel(DeviceFunction((((), (call,)),)), (Argument(0),))


def _draw(node: Node, target: Target) -> Kernel | None:
    x = node.operands[0]
    assert x is not None
    rows, size = product(x.shape[:-1]), x.shape[-1]
    if not isinstance(size, int):
        return None
    parts, shifts = -(-size // sampling.PART), sampling.SHIFTS[x.dtype]
    logits, uniform, temperature, top_k, top_p, min_p, token, sound, state, numbers, counters = range(11)

    def call(kernel: DeviceKernel, *tensors: int, shift: int | None = None) -> DeviceCall:
        sizes = (size, parts) if shift is None else (size, parts, shift)
        return DeviceCall(kernel, (rows * parts, 1, 1), (logits, *tensors, *(("size", s) for s in sizes)))

    by_count, by_mass = (f(x.dtype, target) for f in (sampling.narrowed_by_count, sampling.narrowed_by_mass))
    calls = (
        call(sampling.highest(x.dtype, target), temperature, top_k, token, sound, state, numbers, counters),
        *(call(by_count, top_k, state, counters, shift=shift) for shift in shifts[1:]),
        *(call(by_mass, temperature, top_p, state, counters, shift=shift) for shift in shifts),
        call(sampling.drawn(x.dtype, target), uniform, temperature, min_p, token, state, numbers, counters),
    )
    scratch = (rows * sampling.STATE * 8, rows * parts * 8)
    function = DeviceFunction((((), calls),), scratch, counters=rows * sampling.COUNTERS)
    return Kernel(function, tuple(Argument(i) for i in range(6)))


@attrs.frozen
class _Step:
    """A layer of experts in a kernel's steps: numbers of its tensors."""

    choice: experts.Choice
    x: int
    w: int
    y: int
    bias: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()


def _through_experts(
    steps: Sequence[_Step],
    index: int,
    scratch: int,
    tokens: Dim,
    chosen: int,
    behind: tuple[DeviceCall, ...],
    target: Target,
) -> DeviceFunction | None:
    """Layers of the same experts one after the other, then `behind`; None where kernels can't read them.

    index: the number of the tensor of experts' numbers. scratch: that of the first of two that begin the function's own memory, behind the results
    of all steps but the last.
    """  # fmt: skip
    first = steps[0].choice
    count, by = first.count, first.products

    def fits(require: Callable[..., None], *given: Target) -> bool:
        """Whether a kind of products reads all layers."""
        with contextlib.suppress(TargetError):
            for step in steps:
                require(step.choice.layer, *given)
            return True
        return False

    if not fits(by.require):  # rows that don't go into chunks
        return None
    pairs = tokens * chosen
    order, names = scratch, scratch + 1
    # Few pairs have an expert each, mostly.
    single = tuple(
        DeviceCall(
            experts.single(s.choice, target), (s.choice.layer.tiles(by.outputs), pairs, 1),
            (s.x, s.w, *s.bias, index, *s.scores, s.y),
        )
        for s in steps
    )  # fmt: skip
    few = max(1, count // 4 // chosen)
    variants: list[tuple[tuple[tuple[Dim, int], ...], tuple[DeviceCall, ...]]] = [
        (((tokens, few),), (*single, *behind))
    ]
    forms = [(by.rows[0], False), (by.rows[-1], False)]  # rows of a group, and whether warp groups multiply it
    if fits(hopper.require_hopper, target):  # the first one that is in the code that a GPU loads
        forms.append((hopper.WIDE.rows, True))
    if fits(by.require_many):
        forms.append((by.tile.rows, False))
    for rows, by_warp_groups in forms:
        # Groups are mostly full where experts have about so many pairs.
        most = () if rows == forms[-1][0] else ((tokens, max(1, count * rows // chosen)),)
        blocks = ceiling(pairs, rows) + count
        group = experts.grouped(first, rows, target)
        calls = [DeviceCall(group, (1, 1, 1), (index, order, names, ("size", pairs), ("size", blocks)))]
        for s in steps:
            layer = s.choice.layer
            numbers = (index,) if s.choice.zeros else ()
            rest: Arguments = (*s.bias, order, names, *s.scores, *numbers, s.y)
            if by_warp_groups:
                kernel = experts.of_groups_hopper(s.choice, target)
                height = count * layer.outputs[0] * layer.per_weight_row
                matrices = hopper.map_of_w(layer, hopper.WIDE, ("step", s.w), height)
                tiles = blocks * layer.tiles(hopper.WIDE.outputs)
                grid: tuple[Dim, Dim] = (least(tiles, target.cores), 1)
                arguments: Arguments = (matrices, s.x, *rest, ("size", blocks))
            else:
                kernel = experts.of_groups(s.choice, rows, target)
                tiled = rows == by.tile.rows
                grid = (blocks, layer.tiles(by.tile.outputs)) if tiled else (layer.tiles(by.outputs), blocks)
                arguments = (s.x, s.w, *rest)
            calls.append(DeviceCall(kernel, (*grid, 1), arguments))
        variants.append((most, (*calls, *behind)))
    own = ((pairs + (count + 1) * forms[-1][0]) * 4, (ceiling(pairs, by.rows[0]) + count) * 4)
    between = tuple(
        pairs * s.choice.layer.outputs[0] * s.choice.layer.number_bytes for s in (steps if behind else steps[:-1])
    )
    return DeviceFunction(tuple(variants), (*own, *between))


def _experts(node: Node, target: Target) -> Kernel | None:
    x, index, _, up, down = node.operands
    assert x is not None and index is not None and up is not None and down is not None
    packed = node.op is ops.packed_experts
    sizes = (up.shape[0], index.shape[1], x.shape[1], node.inner if packed else down.shape[2])
    if (
        x.dtype not in FLOATS
        or index.dtype not in ("int64", "int32")
        or not all(isinstance(s, int) and s for s in sizes)
    ):
        return None
    if packed and not (one_output_per_panel(up, 4) and one_output_per_panel(down, 3)):
        return None
    count, chosen, hidden, width = map(fixed, sizes)
    how = experts.Mixture(count, chosen, hidden, width, x.dtype, node.activation, index.dtype, apart=not packed)
    try:
        require_activation(node.activation)
    except TargetError:
        return None
    tokens = x.shape[0]
    x_, index_, scores, ups, downs, result, order, _, inner, outer = range(10)  # numbers of the step's tensors
    blocks_of_sums = -(-how.hidden // (experts.SUMMING * how.per_chunk))
    summed = DeviceCall(experts.summed(how, target), (tokens, blocks_of_sums, 1), (index_, outer, result))
    steps = (
        _Step(how.choice(False), x_, ups, inner),
        _Step(how.choice(True), inner, downs, outer, scores=(scores,)),
    )
    function = _through_experts(steps, index_, order, tokens, chosen, (summed,), target)
    return None if function is None else Kernel(function, tuple(Argument(i) for i in range(5)))


def _expert_linear(node: Node, target: Target) -> Kernel | None:
    x, index, w, bias = node.operands
    assert x is not None and index is not None and w is not None
    sizes = (*w.shape, index.shape[1])
    if (
        x.dtype not in FLOATS
        or index.dtype not in ("int64", "int32")
        or not all(isinstance(s, int) and s for s in sizes)
    ):
        return None
    count, outputs, inputs, chosen = map(fixed, sizes)
    layer = Layer(inputs, (outputs,), x.dtype, bias=bias is not None)
    choice = experts.Choice(layer, count, chosen if x.shape[1] == 1 else 1, index.dtype, zeros=True)
    operands = (0, 1, 2, *present(node, 3))
    result = len(operands)
    step = _Step(choice, 0, 2, result, bias=tuple(range(3, result)))
    function = _through_experts((step,), 1, result + 1, x.shape[0], chosen, (), target)
    return None if function is None else Kernel(function, tuple(Argument(i) for i in operands))


TAILED = {**choose_layers.TAILED, ops.attention_cached: _attention_cached}
"""Choosers that take what is made of the node's results, too: its operands follow the node's own."""

CHOOSERS: Choosers = {
    **choose_layers.LAYERS,
    ops.draw: _draw,
    ops.experts: _experts,
    ops.packed_experts: _experts,
    ops.expert_linear: _expert_linear,
    ops.encode_rows: _encode_rows,
    ops.fake_quantize: _fake_quantize,
    ops.attention: _attention,
    ops.attention_cached: _attention_cached,
    ops.rms_norm: _norm,
    ops.layer_norm: _norm,
    ops.encode_levels: _encode_levels,
}
"""Choosers by op; see `jisu.targets.cuda.lowering.lower`."""
