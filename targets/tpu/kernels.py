"""Which nodes of a graph our Pallas kernels compute, and the functions that stand in their place in the exported program.

A layer's kernel is the one that `product.lower` schedules: the same TIR that the functional run proves. Around it stand, in StableHLO, what
brings operands into its form: rows of any rank as a matrix, weights [n, k] as [k, n], levels and scales out of records. Transposing weights
costs their bytes twice at each call; `jisu.targets.tpu.layout` stores them as kernels read them instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler import levels, ops
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import Node
from jisu.compiler.ops.quantize import layer_parts
from jisu.compiler.rows import ROW_BITS, TAIL, row_length
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, fixed, round_up
from jisu.targets.tpu import attention, grouped, splice
from jisu.targets.tpu.attention import Attention
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.grouped import inputs_of
from jisu.targets.tpu.pallas import inputs, source
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.splice import Part
from jisu.targets.tpu.stablehlo.build import Value
from jisu.targets.tpu.stablehlo.contract import unpack
from jisu.targets.tpu.stablehlo.emit import Chooser, Kernel
from jisu.targets.tpu.stablehlo.quantize import code_levels, out_of_panels, pack_bits, unpack_codes
from jisu.targets.tpu.tiles import choose_tiles

SMALLEST = 1 << 20
"""Multiplications, at least, of a product that gets a kernel by default: fewer are faster as part of what stands around them."""


def chooser(chip: Chip, *, smallest: int = SMALLEST, platform: str = "tpu") -> Chooser:
    """What `stablehlo.emit` asks: our kernel for a node, or None where StableHLO has to do.

    Kernels compute layers in bfloat16 and float32 (`linear`, `gated_linear`, and packed ones), those and rounded ones of integer codes
    (`quantized_linear`, `levels_linear`, with one scale per output and no zeros, or with one per group of `grouped.GROUPS` inputs), from
    `smallest` multiplications on, and attention in both, with or without a cache. platform: "tpu", or "cpu" for a program whose kernels
    Pallas' interpreter runs. Needs JAX; raises TargetError without it when a kernel is chosen.
    """

    def choose(node: Node, sizes: Mapping[str, int]) -> Kernel | None:
        if node.op in _LAYERS:
            return _layer(chip, node, sizes, smallest, platform)
        if node.op in (ops.attention, ops.attention_cached):
            return _attention(chip, node, sizes, smallest, platform)
        return None

    return choose


# --- Layers ---------------------------------------------------------------------------------------------------------------


@attrs.frozen
class _Product:
    """One product of a layer: where its operands stand among the node's, and what it computes."""

    outputs: int
    weight: int
    half: int | None = None  # of weights in which gate and up lie side by side
    scales: int | None = None
    zeros: int | None = None
    bias: int | None = None
    residual: int | None = None
    activation: str = "none"


@attrs.frozen
class _Layer:
    """Products of one x. kind: how weights are stored ("groups": codes with a scale per group); gated: the first product times the second,
    as one."""

    kind: str
    products: tuple[_Product, ...]
    gated: bool = False


def _present(node: Node, index: int) -> int | None:
    return None if node.operands[index] is None else index


def _single(kind: str, node: Node, outputs: int, bias: int, *grid: int | None) -> _Layer:
    b, r = _present(node, bias), _present(node, bias + 1)
    scales, zeros = grid or (None, None)
    return _Layer(kind, (_Product(outputs, 1, None, scales, zeros, b, r, node.activation),))


def _linear(node: Node) -> _Layer:
    return _single("rows", node, fixed(node.parents[1].shape[0]), 2)


def _gated(node: Node) -> _Layer:
    n = fixed(node.parents[1].shape[0])
    return _Layer("rows", (_Product(n, 1, activation=node.activation), _Product(n, 2)), True)


def _packed_gated(node: Node) -> _Layer:
    n = node.outputs
    return _Layer("panels", (_Product(n, 1, 0, activation=node.activation), _Product(n, 1, 1)), True)


def _packed_projections(node: Node) -> _Layer:
    count = len(node.outputs)
    parts = enumerate(node.outputs)
    return _Layer("panels", tuple(_Product(n, 1 + i, bias=1 + count + i if node.biased else None) for i, n in parts))


def _coded(node: Node) -> _Layer | None:
    kind = _kind(node, node.operands[3] is not None)
    if kind is None:
        return None
    grid = 2, _present(node, 3)
    if node.gated:
        first = _Product(node.outputs, 1, 0, *grid, activation=node.activation)
        return _Layer(kind, (first, _Product(node.outputs, 1, 1, *grid)), True)
    return _single(kind, node, node.outputs, 4, *grid)


def _levels_projections(node: Node) -> _Layer | None:
    kind = _kind(node, node.offset)
    if kind is None:
        return None
    numbers = layer_parts(range(1, len(node.operands)), len(node.outputs), node.offset, node.biased)
    return _Layer(
        kind, tuple(_Product(n, w, None, s, z, b) for (w, s, z, b), n in zip(numbers, node.outputs, strict=True))
    )


def _kind(node: Node, zeros: bool) -> str | None:
    return "codes" if exact_levels(node, zeros) else "groups" if grouped.reads(node) else None


def exact_levels(node: Node, zeros: bool) -> bool:
    """Whether a layer of codes is one product of levels, whose sums are scaled."""
    return node.group == 0 and not zeros and SCHEMES[node.scheme].uniform and _result(node) in FLOATS


def _result(node: Node) -> str:
    """The dtype of a layer's results."""
    x = node.operands[0]
    assert x is not None
    return str(node.attributes.get("dtype", x.dtype))


FLOATS = ("bfloat16", "float32")
"""What layers are computed in."""


_LAYERS: Mapping[Any, Any] = {
    ops.linear: _linear,
    ops.gated_linear: _gated,
    ops.packed_linear: lambda node: _single("panels", node, node.outputs, 2),
    ops.packed_gated_linear: _packed_gated,
    ops.packed_projections: _packed_projections,
    ops.quantized_linear: _coded,
    ops.levels_linear: _coded,
    ops.levels_projections: _levels_projections,
}


def _layer(chip: Chip, node: Node, sizes: Mapping[str, int], smallest: int, platform: str) -> Kernel | None:
    x = node.operands[0]
    assert x is not None
    result, k = _result(node), inputs_of(node)
    integer = x.dtype == "uint8"  # records of levels
    layer = _LAYERS[node.op](node) if result in FLOATS else None
    if layer is None:
        return None
    *lead, _ = (fixed(n) for n in x.tensor.at(sizes).shape)
    rows, coded = math.prod(lead), layer.kind == "codes"
    if rows * k * sum(p.outputs for p in layer.products) < smallest:
        return None
    groups = [layer.products] if layer.gated else [(p,) for p in layer.products]

    def product(p: _Product) -> Product:
        grid: dict[str, Any] = {}
        if layer.kind == "groups":
            scales = node.operands[p.scales or 0]
            assert scales is not None
            grid = {"group": node.group, "zeros": p.zeros is not None, "scales": scales.dtype}
        weights = node.scheme if grid else "int8" if coded else x.dtype
        return Product(
            rows, p.outputs, k, "int8" if integer else x.dtype, result, channel_scale=coded, row_scale=integer,
            bias=p.bias is not None, activation=p.activation, residual=p.residual is not None, weights=weights,
            gated=layer.gated, **grid,
        )  # fmt: skip

    products = [product(p) for p, *_ in groups]
    name = _name(node, products, chip)
    form = _Form(node, layer.kind, rows, k)
    try:
        parts = [
            (f"{name}.{'product' if len(products) == 1 else i}", _part(p, chip, form.columns(specs[0], p, chip)))
            for i, (specs, p) in enumerate(zip(groups, products, strict=True))
        ]
    except CompileError:  # a gated product of which not even the smallest tiles fit into VMEM
        return None
    shown = [(f"o{i}", o.tensor.at(sizes)) for i, o in enumerate(node.operands) if o is not None]

    def compute(*values: Value) -> list[Value]:
        there = iter(values)
        operands = [None if o is None else next(there) for o in node.operands]
        first = operands[0]
        assert first is not None
        found = []
        for specs, product, (called, part) in zip(groups, products, parts, strict=True):
            given = form.given(operands, specs, product, part)
            found.append(part.call(first.body, called, *given).reshape(*lead, product.n))
        return found

    return splice.kernel(name, shown, parts, compute, platform)


def _name(node: Node, products: Sequence[Product], chip: Chip) -> str:
    """A name by what a kernel was made for."""
    p = products[0]
    columns = "_".join(str(product.n) for product in products)
    flags = [node.attributes.get("scheme", p.dtype), p.result, p.activation]
    flags += [f"group{p.group}"] if p.group else []
    flags += [word for word, there in (("bias", p.bias), ("residual", p.residual), ("gated", p.gated)) if there]
    forms = [
        f"{'x'.join(str(n) for n in o.shape)}_{o.dtype}"
        for o in node.operands[1:]
        if o is not None and o.rank > 2 and not o.tensor.symbols
    ]
    return "_".join([node.op.name, f"{p.m}x{p.k}x{columns}", *flags, *forms[:1], chip.short])


@functools.lru_cache(256)
def _part(product: Product, chip: Chip, columns: int) -> Part:
    """columns: of w as it is given, n or more."""
    lowered = lower(product, chip, choose_tiles(product, chip, frugal=True))
    types, result = [t for _, t, _ in inputs(lowered)], lowered.operands[-1]
    for i in range(1, 2 + (product.group > 0) * (1 + product.zeros)):  # w, and scales and zeros of its groups
        types[i] = types[i].with_shape(*types[i].shape[:-1], columns)
    return Part(source(lowered), tuple(types), TensorType(result.shape, result.dtype))  # type: ignore[arg-type]


@attrs.frozen
class _Form:
    """How a node's operands become those of a product of `rows` rows and k inputs."""

    node: Node
    kind: str
    rows: int
    k: int

    def columns(self, spec: _Product, product: Product, chip: Chip) -> int:
        """Columns of w as the kernel gets it: with the padding that it is stored with, if that is what the kernel wants."""
        w = self.node.operands[spec.weight]
        assert w is not None
        wide = round_up(product.n, chip.lanes)
        return wide if self.laid_out(w.shape, w.dtype, product, wide) else product.n

    def laid_out(self, shape: Sequence[Any], dtype: str, product: Product, columns: int) -> bool:
        """Whether weights are stored as the kernel reads them."""
        lead = (1, 2) if product.gated else (1,)
        word, k = (1,) if self.kind in ("codes", "groups") else (), product.k
        if product.weights == "int4":
            return tuple(shape) == (*lead, k // 2, columns, 1)
        return tuple(shape) == (*lead, k, columns, *word) and (self.kind == "panels" or dtype == "int8")

    def given(
        self, operands: Sequence[Value | None], specs: Sequence[_Product], product: Product, part: Part
    ) -> list[Value]:
        """Inputs of a product's kernel."""
        spec = specs[0]

        def value(index: int) -> Value:
            found = operands[index]
            assert found is not None
            return found

        def matrix(index: int) -> Value:
            return value(index).reshape(self.rows, value(index).shape[-1])

        def half(index: int, spec: _Product) -> Value:
            return value(index) if spec.half is None else value(index).pick(1, spec.half)

        w, wanted = value(spec.weight), part.inputs[1]
        if self.laid_out(w.shape, w.dtype, product, fixed(wanted.shape[-1])):
            found = [matrix(0), w.reshape(*(fixed(n) for n in wanted.shape))]
        else:
            each = [self.weight(half(s.weight, s), product) for s in specs]
            found = [matrix(0), w.body.stack(each, 0) if product.gated else each[0]]
        for name in ("scales", "zeros") if self.kind == "groups" else ():
            each = [self.grid(half(at, s), wanted.shape[-1]) for s in specs if (at := getattr(s, name)) is not None]
            found += [each[0].body.stack(each, 0) if product.gated else each[0]] if each else []
        for s in specs:
            if s.scales is not None and self.kind == "codes":
                found.append(half(s.scales, s).reshape(1, -1).part(1, 0, product.n).astype("float32"))  # one per output
        if product.row_scale:
            at = levels.scale_offset(self.k)
            records = found[0]
            found[0] = records.part(1, 0, self.k).bits("int8")
            found.append(records.part(1, at, at + 4).bits("float32").reshape(self.rows, 1))
        if spec.bias is not None:
            found.append(value(spec.bias).astype("float32").reshape(1, product.n))
        if spec.residual is not None:
            found.append(matrix(spec.residual))
        return found

    def weight(self, w: Value, product: Product) -> Value:
        """[k, n] of weights in another form."""
        n, k = product.n, product.k
        if self.kind == "rows":
            return w.transpose(1, 0)
        if product.weights == "int4":
            return pack_bits(unpack_codes(w, SCHEMES[self.node.scheme], n, k), 4).transpose(1, 0)
        if self.kind in ("codes", "groups"):
            return code_levels(w, SCHEMES[self.node.scheme], n, k).transpose(1, 0)
        return unpack(w, n, k).transpose(1, 0)

    def grid(self, values: Value, columns: Any) -> Value:
        """[groups, columns] of scales or zeros in panels."""
        panels, groups, panel = values.shape
        if panels == 1 and panel == columns:
            return values.reshape(groups, panel)
        return out_of_panels(values, int(columns)).transpose(1, 0)


# --- Attention --------------------------------------------------------------------------------------------------------------


def attends(node: Node) -> bool:
    """Whether our kernel computes an attention, if its cache's rows are whole native tiles: without bias and sinks, over numbers or
    records of integers."""
    others = node.operands[6:] if node.op is ops.attention_cached else node.operands[3:]
    scheme = node.attributes.get("scheme", "none")
    reads = scheme == "none" or SCHEMES[scheme].uniform
    return node.dtype in attention.DTYPES and reads and all(o is None for o in others)


def _attention(chip: Chip, node: Node, sizes: Mapping[str, int], smallest: int, platform: str) -> Kernel | None:
    """Prefill, or over a cache; None for what `attends` doesn't, and rows that aren't whole tiles."""
    if not attends(node):
        return None
    cached = node.op is ops.attention_cached
    shapes = [None if o is None else tuple(fixed(n) for n in o.tensor.at(sizes).shape) for o in node.operands]
    q, k, v = shapes[:3]
    records = ROW_BITS.get(node.scheme, 0) if cached else 0
    assert q is not None and k is not None and v is not None
    table = shapes[5] if cached else None
    batch, queries, heads, d = q
    groups = k[1] if cached else k[2]
    page = k[2] if table else 0
    keys = page * table[1] if table else k[2] if cached else k[1]
    values = row_length(node.scheme, v[3]) if records else v[3]
    if batch * queries * heads * keys * (d + values) < smallest:
        return None
    spec = Attention(
        batch, queries, groups, heads // groups, d, values, keys, node.scale, cached or node.causal, node.window, node.softcap,
        cached, page, k[0] if page else 0, node.dtype, records,
    )  # fmt: skip
    try:
        part = _attention_part(spec, chip)
    except CompileError:  # rows that aren't whole tiles: StableHLO reads such a cache
        return None
    name = _attention_name(spec, chip)
    taken = [o for o in node.operands if o is not None]
    apart = [_stored(o, spec.heads_of(n)) for o, n in zip(taken[1:3], (d, values), strict=True)] if records else []
    laid_out = bool(records) and all(apart)
    if laid_out:
        name += "_apart"
        taken[1:3] = [part for both in apart if both for part in both]
    shown = [(f"o{i}", o.tensor.at(sizes)) for i, o in enumerate(taken)]

    def compute(*given: Value) -> list[Value]:
        body = given[0].body
        if not cached:
            where = [body.full(keys - queries, (batch,), "int32"), body.full(0, (batch,), "int32")]
            return [part.call(body, f"{name}.pallas", *where, *given)]
        q, *caches = given[: 5 if laid_out else 3]
        length, start, *pages = given[1 + len(caches) :]
        pages = [p.maximum(0).minimum(spec.pages - 1) for p in pages]
        tails: list[Value] = []
        if laid_out:
            caches, tails = caches[::2], caches[1::2]
        elif records:
            tails = [v.part(3, v.shape[3] - TAIL, v.shape[3]).transpose(0, 2, 1, 3) for v in caches]
            codes = [v.part(3, 0, v.shape[3] - TAIL) for v in caches]
            caches = [_side_by_side(v, spec.heads_of(n)) for v, n in zip(codes, (d, values), strict=True)]
            tails = [t.reshape(*t.shape[:2], groups * TAIL) for t in tails]
            tails = [t.padded(-1, spec.tails) for t in tails]
        flat = [t.reshape(t.shape[0], page or keys, spec.tails) for t in tails]
        where = [length.astype("int32").broadcast((batch,)), start.astype("int32")]
        return [part.call(body, f"{name}.pallas", *where, *pages, q, *caches, *flat)]

    made = splice.kernel(name, shown, [(f"{name}.pallas", part)], compute, platform)
    return attrs.evolve(made, takes=tuple(taken)) if laid_out else made


def _stored(records: Node, heads: int) -> tuple[Node, Node] | None:
    """Codes [b, g / heads, slots, heads * n] and tails [b, 1, slots, g * 4 and zeros] that `layout` put together, or None where records are made otherwise.

    The kernel takes what is stored: left to itself, XLA takes records of several heads apart by copies of whole caches.
    """
    path = [ops.reshape, ops.transpose, ops.reshape] if heads > 1 else []
    if records.op is not ops.concat or len(records.parents) != 2:
        return None
    codes, tails = (_behind(o, p) for o, p in zip(records.parents, (path, [ops.transpose, ops.reshape]), strict=True))
    if codes is None or tails is None:
        return None
    tails = tails.parents[0] if tails.op is ops.slice_ else tails
    b, g, slots, size = records.shape
    shapes = (
        (b, fixed(g) // heads, slots, heads * (fixed(size) - TAIL)),
        (b, 1, slots, attention.padded(fixed(g) * TAIL)),
    )
    return (codes, tails) if (codes.shape, tails.shape) == shapes else None


def _behind(node: Node, path: Sequence[Any]) -> Node | None:
    """The operand behind ops of these kinds, the last one's first."""
    for op in path:
        if node.op is not op:
            return None
        node = node.parents[0]
    return node


def _side_by_side(codes: Value, heads: int) -> Value:
    """[b, g / heads, slots, heads * n] of [b, g, slots, n]."""
    b, g, slots, n = codes.shape
    if heads == 1:
        return codes
    return (
        codes.reshape(b, g // heads, heads, slots, n).transpose(0, 1, 3, 2, 4).reshape(b, g // heads, slots, heads * n)
    )


def _attention_name(a: Attention, chip: Chip) -> str:
    kind = f"pages{a.pages}x{a.page}" if a.page else "cached" if a.cached else "causal" if a.causal else "all"
    kind += f"_records{a.records}" if a.records else ""
    limits = "".join(f"_{word}{value}" for word, value in (("window", a.window), ("cap", a.softcap)) if value)
    kind += "_float32" if a.dtype == "float32" else ""
    size = f"{a.batch}x{a.queries}x{a.groups}x{a.repeats}x{a.d}x{a.e}_on{a.keys}"
    return f"attention_{kind}_{size}_scale{a.scale}{limits}_{chip.short}"


_attention_part = functools.lru_cache(64)(attention.part)
