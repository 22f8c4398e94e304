"""Which nodes get a kernel written for GPUs: a table from ops to choosers. A chooser returns None where the generic kernel has to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import attrs
import sympy

from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Node
from jisu.compiler.launches import TensorMap
from jisu.compiler.levels import WORD
from jisu.compiler.ops.quantize import layer_parts
from jisu.compiler.types import Dim, dim, fixed, product, same_dim
from jisu.targets.cpu.isa import FLOATS, require_activation
from jisu.targets.cuda.device import PAIRS, DeviceKernel
from jisu.targets.cuda.kernels import (
    experts,
    hopper,
    levels,
    norm,
    products,
    records,
    rounding,
    sampling,
    semi_structured,
    single,
    single_attention,
    thin,
    top,
)  # fmt: skip
from jisu.targets.cuda.kernels.attention import QUERIES, Form, attend_token, attend_tokens, sharing
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.kernels.levels import Levels
from jisu.targets.cuda.kernels.tails import Encoding, Tail, tailed
from jisu.targets.cuda.lowering import DeviceCall, DeviceFunction
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target

Arguments = tuple[int | TensorMap | tuple[str, Dim], ...]
"""Of a `DeviceCall`."""


def _ceiling(value: Dim, step: int) -> Dim:
    """value / step, rounded up."""
    return -(-value // step) if isinstance(value, int) else sympy.ceiling(value / step)


def _least(a: Dim, b: int) -> Dim:
    return min(a, b) if isinstance(a, int) else sympy.Min(a, b)


@attrs.frozen
class Then:
    """What is made of a node's results: `tail` of `rows` of them. cut: where these aren't all: `kept` of each `whole` ones, from `first` on."""

    tail: Tail
    rows: Dim
    cut: tuple[Dim, Dim, Dim] | None = None

    def call(self, arguments: tuple[int, ...], target: Target) -> DeviceCall:
        """A launch for that alone. arguments: x, then `Tail.pointers`."""
        kernel = tailed(self.tail, target, cut=self.cut is not None)
        return DeviceCall(kernel, (self.rows, 1, 1), (*arguments, *(("size", n) for n in self.cut or ())))


@functools.lru_cache(maxsize=256)
def _layer(layer: Layer, rows: Dim, operands: tuple[int, ...], target: Target, then: Then | None = None) -> Kernel:
    """A linear layer: few rows by streaming weights, many in tiles. operands: of the node, in the order of the layer's parameters.

    then: what is made of the results, whose operands follow the layer's, and whose results the layer's.
    """
    require_activation(layer.activation)
    reader = _reader(layer, target)
    count = len(operands)
    given = tuple(range(count, count + len(then.tail.operands))) if then is not None else ()
    first = count + len(given)  # of the results
    results = tuple(range(first, first + len(layer.outputs)))
    arguments: tuple[int | tuple[str, Dim], ...] = (*range(count), *results, ("size", rows))
    behind: tuple[DeviceCall, ...] = ()
    variants: list[tuple[tuple[tuple[Dim, int], ...], tuple[DeviceCall, ...]]] = []
    if then is not None:
        made = tuple(range(first + 1, first + 1 + len(then.tail.results)))
        behind = (then.call((first, *given, *made), target),)
        if reader.tailed is not None:
            blocks = layer.tiles(thin.outputs(layer, thin.ROWS[0], target))
            call = DeviceCall(reader.tailed(then.tail), (blocks, 1, 1), (*arguments, *given, *made, made[-1] + 1))
            variants.append((((rows, 1),), (call,)))
    for most in reader.rows:
        kernel, outputs = reader.few(most)
        call = DeviceCall(kernel, (layer.tiles(outputs), _ceiling(rows, most), 1), arguments)
        variants.append((((rows, most),), (call, *behind)))
    for call, most in _products(reader, layer, rows, arguments, target):
        variants.append((((rows, most),) if most else (), (call, *behind)))
    if variants[-1][0]:  # no product reads the layer: few rows at a time
        variants.append(((), variants[-1][1]))
    function = DeviceFunction(tuple(variants), counters=0 if then is None else 1)
    return Kernel(function, tuple(Argument(i) for i in operands))


@attrs.frozen(eq=False)
class _Reader:
    """What multiplies a layer. few: the kernel for up to so many rows of x, one of `rows`, and the rows of W of a block. tailed: the kernel for one
    row that does its tail, too. many: in tiles, `small` or `large`; groups: by Hopper's warp groups, which are given `besides` behind the rest. Each
    raises TargetError for a layer that it can't read."""

    few: Callable[[int], tuple[DeviceKernel, int]]
    rows: tuple[int, ...]
    many: Callable[[products.Tile], DeviceKernel]
    small: products.Tile
    large: products.Tile
    groups: Callable[[hopper.Tile], DeviceKernel] | None = None
    besides: tuple[int, ...] = ()
    tailed: Callable[[Tail], DeviceKernel] | None = None


def _reader(layer: Layer, target: Target) -> _Reader:
    if isinstance(layer, Levels):
        return _Reader(
            lambda rows: (levels.few(layer, rows, target), thin.outputs(layer, rows, target)), thin.ROWS,
            lambda tile: levels.many(layer, tile, target), products.SMALL, products.LARGE,
            lambda tile: levels.many_hopper(layer, tile, target), (0,),  # records' scales, which the map doesn't show
            lambda then: levels.few(layer, thin.ROWS[0], target, then),
        )  # fmt: skip
    if layer.halves:
        return _Reader(
            lambda rows: (semi_structured.thin_halves(layer, rows, target), thin.OUTPUTS), semi_structured.THIN_ROWS,
            lambda tile: semi_structured.product_halves(layer, tile, target), semi_structured.SMALL,
            semi_structured.CODED if layer.scheme else semi_structured.LARGE,
        )  # fmt: skip
    if layer.dtype == "float32":
        return _Reader(
            lambda rows: (single.thin_single(layer, rows, target), single.OUTPUTS), single.ROWS,
            lambda tile: single.product_single(layer, tile, target), single.SMALL, single.LARGE,
        )  # fmt: skip
    return _Reader(
        lambda rows: (thin.thin(layer, rows, target), thin.outputs(layer, rows, target)), thin.ROWS,
        lambda tile: products.product(layer, tile, target), products.SMALL, products.LARGE,
        lambda tile: hopper.product_hopper(layer, tile, target),
        tailed=lambda then: thin.thin(layer, thin.ROWS[0], target, then),
    )  # fmt: skip


def _products(
    reader: _Reader, layer: Layer, rows: Dim, arguments: Arguments, target: Target
) -> Iterator[tuple[DeviceCall, int]]:
    """The products that can read the layer, each with the rows up to which it is taken (0 for any): the first that is in the code that a GPU
    loads is."""
    small, large = reader.small, reader.large
    on_hopper = list(_on_hopper(reader, layer, rows, arguments, target))
    # So many large tiles as there are multiprocessors keep all of them busy; on half of them, warp groups should still be faster than small tiles
    # on all: by peak rates, `wgmma` does about twice what `mma` does.
    few = target.cores // (2 if on_hopper else 1) // max(1, layer.tiles(large.outputs)) * large.rows

    def call(tile: products.Tile) -> DeviceCall:
        grid = (_ceiling(rows, tile.rows), layer.tiles(tile.outputs), 1)
        return DeviceCall(reader.many(tile), grid, arguments)

    with contextlib.suppress(TargetError):  # not for this layer
        if few >= small.rows:
            yield call(small), few
        yield from on_hopper
        yield call(large), 0


def _on_hopper(
    reader: _Reader, layer: Layer, rows: Dim, arguments: Arguments, target: Target
) -> Iterator[tuple[DeviceCall, int]]:
    """The same of Hopper's warp groups, if they can."""
    if reader.groups is None:
        return
    with contextlib.suppress(TargetError):  # not for this layer, or not on this machine
        narrow, wide = hopper.tiles_of(layer)
        few = target.cores // max(1, layer.tiles(wide.outputs)) * wide.rows
        for tile, most in ((narrow, few), (wide, 0)) if few and narrow is not wide else ((wide, 0),):
            kernel = reader.groups(tile)
            matrices = layer.outputs * 2 if layer.apart else [n * layer.per_weight_row for n in layer.outputs]
            maps = [hopper.map_of_x(layer, tile, ("step", 0), rows)]
            maps += [hopper.map_of_w(layer, tile, ("step", i), n) for i, n in enumerate(matrices, 1)]
            grid = (_least(_ceiling(rows, tile.rows) * layer.tiles(tile.outputs), target.cores), 1, 1)
            yield DeviceCall(kernel, grid, (*maps, *arguments[len(maps) :], *reader.besides)), most


def _present(node: Node, *indices: int) -> tuple[int, ...]:
    return tuple(i for i in indices if node.operands[i] is not None)


def _one_output_per_panel(packed: Node | None, axis: int) -> bool:
    """Whether weights lie row by row."""
    return packed is not None and all(d == 1 for d in packed.shape[axis:])


def _levels_in_rows(codes: Node | None) -> bool:
    """Whether codes that levels are multiplied by lie row by row, in words as kernels take them apart."""
    return codes is not None and codes.dtype == "uint8" and codes.shape[-2:] == (1, WORD)


def _linear(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not _one_output_per_panel(w, 2):
        return None
    layer = Layer(
        int(x.shape[-1]), (node.outputs,), node.dtype, activation=node.activation,
        bias=node.operands[2] is not None, residual=node.operands[3] is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, *_present(node, 2, 3)), target, then)


def _gated(node: Node, target: Target) -> Kernel | None:
    x, gate, _ = node.operands
    assert x is not None and gate is not None
    outputs, k = gate.shape
    if not isinstance(outputs, int) or not isinstance(k, int):
        return None
    layer = Layer(k, (outputs,), node.dtype, gated=True, apart=True, activation=node.activation)
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2), target)


def _projections(node: Node, target: Target) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not _one_output_per_panel(w, 2):
        return None
    layer = Layer(int(x.shape[-1]), tuple(node.outputs), x.dtype, bias=node.biased)
    return _layer(layer, product(x.shape[:-1]), tuple(range(len(node.operands))), target)


def together(nodes: Sequence[Node], target: Target) -> Kernel | None:
    """Layers of codes of one input, alike but for their outputs, with neither activation nor residual: the kernel's arguments are numbers of x,
    then all codes, all scales, all zeros and all biases."""
    x, codes, scales, zeros, bias, _ = nodes[0].operands
    assert x is not None and scales is not None
    if not all(_one_output_per_panel(node.operands[1], -2) for node in nodes):
        return None
    layer = Layer(
        int(x.shape[-1]), tuple(node.outputs for node in nodes), x.dtype, bias=bias is not None,
        scheme=nodes[0].scheme, group=nodes[0].group, scales=scales.dtype, zeros=zeros is not None,
    )  # fmt: skip
    given = sum(operand is not None for operand in (codes, scales, zeros, bias))
    return _layer(layer, product(x.shape[:-1]), tuple(range(1 + given * len(nodes))), target)


def _quantized(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and scales is not None
    if not _one_output_per_panel(codes, -2):
        return None
    layer = Layer(
        int(x.shape[-1]), (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        node.scheme, node.group, scales.dtype, zeros is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *_present(node, 3, 4, 5)), target, then)


def _levels(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and codes is not None and scales is not None
    if not _levels_in_rows(codes):
        return None
    layer = Levels(
        node.k, (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        node.scheme, node.group, scales.dtype, zeros is not None, levels=node.records, own=node.own,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *_present(node, 3, 4, 5)), target, then)


def _levels_projections(node: Node, target: Target) -> Kernel | None:
    x, *given = node.operands
    assert x is not None
    parts = layer_parts(given, len(node.outputs), node.offset, node.biased)
    codes, scales, zeros, biases = zip(*parts, strict=True)
    if not all(map(_levels_in_rows, codes)):
        return None
    layer = Levels(
        node.k, tuple(node.outputs), node.attributes["dtype"], bias=node.biased, scheme=node.scheme, group=node.group, scales=scales[0].dtype,
        zeros=node.offset, levels=node.records, own=node.own,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), tuple(range(len(node.operands))), target)


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


def _semi_structured(node: Node, target: Target) -> Kernel | None:
    x, values, _, scales, zeros, bias, residual = node.operands
    assert x is not None and values is not None
    if x.dtype not in PAIRS:
        return None
    layer = Layer(
        int(x.shape[-1]), (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        "" if scales is None else node.scheme, node.group, "float16" if scales is None else scales.dtype, zeros is not None, True,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *_present(node, 3, 4, 5, 6)), target)


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
    return DeviceCall(kernel(form, target), (_ceiling(rows, own) * batch, form.heads, 1), arguments)


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
    operands = (0, 1, 2, *_present(node, 4))
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
    parts = _least(_ceiling(wanted, _KEYS_PER_PART), _ceiling(_BLOCKS * target.cores, own))
    heads, width = form.heads, form.head_dim
    # Operands: q, keys, values, the table, start, length, sinks; behind them the result, then the parts' states and counters.
    operands = (0, 1, 2, *_present(node, 5), 4, 3, *_present(node, 6))
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
    call = DeviceCall(kernel, (_ceiling(count, rounding.WARPS), 1, 1), (0, 1, ("size", count)))
    return Kernel(DeviceFunction((((), (call,)),)), (Argument(0),))


def _encode_rows(node: Node, target: Target) -> Kernel | None:
    x, feedback = node.operands
    assert x is not None
    if feedback is not None:
        return None
    kernel = records.encoded_rows(fixed(x.shape[-1]), x.dtype, node.scheme, target)
    count = product(x.shape[:-1])
    call = DeviceCall(kernel, (_ceiling(count, rounding.WARPS), 1, 1), (0, 1, ("size", count)))
    return Kernel(DeviceFunction((((), (call,)),)), (Argument(0),))


def _sort(node: Node, target: Target) -> Kernel | None:
    (x,) = node.parents
    size, first = x.shape[-1], int(node.first)
    if node.axis != x.tensor.rank - 1 or not node.descending or not 0 < first <= top.MOST or not isinstance(size, int):
        return None
    rows = product(x.shape[:-1])
    calls: list[DeviceCall] = []
    scratch: list[Dim] = []
    source = 0
    while True:
        parts = -(-size // top.part_of(size, first))
        kernel = top.largest(size, first, x.dtype, bool(calls), parts == 1, target)
        to = (1, 2) if parts == 1 else (3 + len(scratch),)
        calls.append(DeviceCall(kernel, (rows * parts, 1, 1), (source, *to, ("size", parts))))
        if parts == 1:
            return Kernel(DeviceFunction((((), tuple(calls)),), tuple(scratch)), (Argument(0),))
        size, source = parts * top.kept(first), to[0]
        scratch.append(rows * size * 8)


def _draw(node: Node, target: Target) -> Kernel | None:
    values = node.operands[0]
    assert values is not None
    size = values.shape[-1]
    if not isinstance(size, int) or size > sampling.MOST:
        return None
    call = DeviceCall(sampling.drawn(size, values.dtype, target), (product(values.shape[:-1]), 1, 1), tuple(range(9)))
    return Kernel(DeviceFunction((((), (call,)),)), tuple(Argument(i) for i in range(7)))


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
        blocks = _ceiling(pairs, rows) + count
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
                grid: tuple[Dim, Dim] = (_least(tiles, target.cores), 1)
                arguments: Arguments = (matrices, s.x, *rest, ("size", blocks))
            else:
                kernel = experts.of_groups(s.choice, rows, target)
                tiled = rows == by.tile.rows
                grid = (blocks, layer.tiles(by.tile.outputs)) if tiled else (layer.tiles(by.outputs), blocks)
                arguments = (s.x, s.w, *rest)
            calls.append(DeviceCall(kernel, (*grid, 1), arguments))
        variants.append((most, (*calls, *behind)))
    own = ((pairs + (count + 1) * forms[-1][0]) * 4, (_ceiling(pairs, by.rows[0]) + count) * 4)
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
    if packed and not (_one_output_per_panel(up, 4) and _one_output_per_panel(down, 3)):
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
    operands = (0, 1, 2, *_present(node, 3))
    result = len(operands)
    step = _Step(choice, 0, 2, result, bias=tuple(range(3, result)))
    function = _through_experts((step,), 1, result + 1, x.shape[0], chosen, (), target)
    return None if function is None else Kernel(function, tuple(Argument(i) for i in operands))


TAILED = {
    ops.packed_linear: _linear,
    ops.quantized_linear: _quantized,
    ops.levels_linear: _levels,
    ops.attention_cached: _attention_cached,
}
"""Choosers that take what is made of the node's results, too: its operands follow the node's own."""

CHOOSERS: Choosers = {
    ops.sort: _sort,
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
    ops.packed_linear: _linear,
    ops.gated_linear: _gated,
    ops.packed_projections: _projections,
    ops.quantized_linear: _quantized,
    ops.levels_linear: _levels,
    ops.levels_projections: _levels_projections,
    ops.encode_levels: _encode_levels,
    ops.semi_structured_linear: _semi_structured,
}
"""Choosers by op; see `jisu.targets.cuda.lowering.lower`."""
