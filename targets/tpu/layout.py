"""Weights and caches as our Pallas kernels read them, so that no step of a program moves them into that form.

What stands in another form is written into the graph with ops that it has: `jisu.passes.layout.FoldWeights` then stores packed weights, and
what nobody's kernel reads gets the former values back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from jisu.compiler import ops
from jisu.compiler.graph import INPUT, WEIGHT, Graph, Node, constant, placeholder
from jisu.compiler.rows import TAIL
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import Dim, TensorType, fixed, round_up, substitute
from jisu.targets.tpu.attention import beside, padded
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.grouped import inputs_of, reads
from jisu.targets.tpu.kernels import FLOATS, attends, exact_levels

_CODED = (ops.quantized_linear, ops.levels_linear)
_LAID_OUT = (ops.linear, ops.gated_linear, *_CODED)


def lay_out(graph: Graph, chip: Chip, sizes: Mapping[str, int] | None = None) -> Graph:
    """The graph with weights and caches as kernels read them; sizes: of symbols, as far as they are known.

    Weights are transposed, with columns of whole lanes: those of layers in bfloat16 and float32 (`linear`, `gated_linear`), and those of
    `quantized_linear` and `levels_linear` whose codes have 8 bits, which become levels int8; codes of 4 bits stay two in a byte, with their groups'
    scales and zeros. The packing stands in the graph:
    `FoldWeights` stores its results, `PackWeights` goes before. A weight that something else reads, too, stays as it is.

    Caches get rows of whole lanes, and those of records become two inputs each, `name.codes` and `name.tails`, and two outputs: see `_caches`.
    """
    return _caches(_packed(graph, chip), chip, sizes or {})


def _packed(graph: Graph, chip: Chip) -> Graph:
    shared = {o for n in graph.nodes if n.op not in _LAID_OUT for o in n.operands}
    made: dict[tuple[Any, ...], Node] = {}

    def once(key: tuple[Any, ...], make: Callable[[], Node]) -> Node:
        if key not in made:
            made[key] = make()
        return made[key]

    def packs(w: Node | None) -> bool:
        return w is not None and w.op is WEIGHT and w.dtype in FLOATS and w not in shared

    def packed(x: Node, w: Node, b: Node | None, r: Node | None, activation: str, where: str) -> Node:
        panel = round_up(fixed(w.shape[0]), chip.lanes)
        wide = once((ops.pack, w), lambda: ops.pack(w, panel=panel, pair=1))
        return ops.packed_linear.make((x, wide, b, r), {"outputs": w.shape[0], "activation": activation}, where)

    def levelled(old: Node, new: Node) -> Node:
        """A layer of codes on levels."""
        x, codes, scales, zeros, b, r = new.operands
        assert x is not None and codes is not None and scales is not None
        bits, groups = SCHEMES[new.scheme].bits, reads(new) and new.dtype in FLOATS
        exact = groups or (exact_levels(new, zeros is not None) and bits == 8)
        n, k = int(new.outputs), inputs_of(new)
        panel = round_up(n, chip.lanes)
        done = codes.dtype == "int8" or codes.shape[-3:] == (k * bits // 8, panel, 1)
        if not exact or done or old.operands[1] in shared:
            return new

        def levels_of(half: int | None) -> Node:
            words, word = codes.shape[-3], codes.shape[-1]
            single = _out_of_panels(codes, half, n, k if bits == 8 else int(words * word))
            if bits < 8:
                single = _in_order(single, int(word), k)
            wide = ops.pack_codes(single, scheme=new.scheme, k=k, panel=panel, word=1)
            return wide if bits < 8 else ops.cast(ops.sub(ops.cast(wide, dtype="int32"), 128), dtype="int8")

        def rows_of(values: Node, half: int | None) -> Node:
            whole = ops.reshape(values, shape=(*values.shape, 1))
            return _out_of_panels(whole, half, n, fixed(values.shape[-2]))

        def scales_of(half: int | None) -> Node:
            return ops.pack_scales(rows_of(scales, half), scheme=new.scheme, panel=panel)

        def both(made: Callable[[int | None], Node]) -> Node:
            if not new.gated:
                return made(None)
            halves = [made(i) for i in (0, 1)]
            return ops.concat(*(ops.reshape(h, shape=(1, 1, *h.shape[1:])) for h in halves), axis=1)

        ahead = once((codes,), lambda: both(levels_of))
        steps = once((scales,), lambda: both(scales_of))
        middles = zeros and once((zeros,), lambda: both(lambda half: ops.pack_zeros(rows_of(zeros, half), panel=panel)))
        return new.op.make((x, ahead, steps, middles, b, r), new.attributes, new.source)

    def transform(old: Node, new: Node) -> Node:
        if new.op is ops.linear and packs(old.operands[1]):
            x, w, b, r = new.operands
            assert x is not None and w is not None
            return packed(x, w, b, r, new.activation, new.source)
        if new.op is ops.gated_linear and all(packs(w) for w in old.operands[1:]):
            x, g, u = new.parents
            panel = round_up(fixed(g.shape[0]), chip.lanes)
            wide = once((ops.pack_gated, g, u), lambda: ops.pack_gated(g, u, panel=panel, pair=1))
            attributes = {"outputs": g.shape[0], "activation": new.activation}
            return ops.packed_gated_linear.make((x, wide), attributes, new.source)
        return levelled(old, new) if new.op in _CODED else new

    return graph.map(transform)


def _in_order(rows: Node, word: int, k: int) -> Node:
    """Bytes [n, k / 2] of two codes each, one after the other, of rows where the upper one belongs to the input `word` further on."""
    if word > 1:
        n, size = (int(s) for s in rows.shape)
        parts = ops.reshape(ops.unpack_bits(rows, bits=4), shape=(n, size // word, word, 2))
        rows = ops.pack_bits(ops.reshape(ops.transpose(parts, perm=(0, 1, 3, 2)), shape=(n, 2 * size)), bits=4)
    return ops.slice_(rows, starts=(0, 0), stops=(rows.shape[0], k // 2), steps=(1, 1))


def _out_of_panels(packed: Node, half: int | None, n: int, k: int) -> Node:
    """[n, k] of [panels, words, panel, word], or of one of two such that lie panel by panel side by side."""
    if half is not None:
        starts, stops = (
            [half + i if axis == 1 else i * size for axis, size in enumerate(packed.shape)] for i in (0, 1)
        )
        packed = ops.slice_(packed, starts=tuple(starts), stops=tuple(stops), steps=(1,) * packed.rank)
    panels, words, panel, word = (int(size) for axis, size in enumerate(packed.shape) if half is None or axis != 1)
    whole = ops.transpose(ops.reshape(packed, shape=(panels, words, panel, word)), perm=(0, 2, 1, 3))
    rows = ops.reshape(whole, shape=(panels * panel, words * word))
    return ops.slice_(rows, starts=(0, 0), stops=(n, k), steps=(1, 1))


@attrs.frozen
class _Held:
    """How a cache [b, g, rows, width], of records [b, g, rows, width + 4], is stored: [b, g / heads, rows, heads * wide].

    heads: key heads in a row; wide: what each takes of it, `width` and zeros behind it; halves: 2 for two codes in a byte, whose numbers stand in
    two halves.
    """

    groups: int
    width: int
    wide: int
    heads: int
    tail: int = 0
    halves: int = 1

    @staticmethod
    def of(cache: Node, scheme: str, other: int) -> _Held:
        """other: the width of keys for values, and of values for keys: without records both have as many heads in a row, for one product
        of queries reads it whole."""
        g, size = (fixed(n) for n in cache.shape[1::2])
        if scheme == "none":
            heads = beside(g, max(size, other))
            return _Held(g, size, padded(size, heads), heads)
        heads = beside(g, size - TAIL)
        return _Held(g, size - TAIL, padded(size - TAIL, heads), heads, TAIL, 8 // SCHEMES[scheme].bits)

    @property
    def same(self) -> bool:
        """Whether nothing changes."""
        return not self.tail and self.heads == 1 and self.wide == self.width

    def inputs(self, cache: Node) -> tuple[Node, ...]:
        """What is given in place of a cache: it as it is stored, or of records codes and tails."""
        b, g, slots, _ = cache.shape
        whole = TensorType((b, g // self.heads, slots, self.heads * self.wide), cache.dtype)
        if not self.tail:
            return (placeholder(cache.name, whole),)
        tails = TensorType((b, 1, slots, padded(self.groups * self.tail)), cache.dtype)
        return placeholder(f"{cache.name}.codes", whole), placeholder(f"{cache.name}.tails", tails)

    def rows(self, new: Node) -> tuple[Node, ...]:
        """What is appended of rows [b, chunk, g, width], or their records."""
        b, chunk, g, size = new.shape
        found = _widened(_columns(new, 0, self.width), self.wide)
        found = _reshaped(found, b, chunk, g // self.heads, self.heads * self.wide)
        if not self.tail:
            return (found,)
        tails = _reshaped(_columns(new, self.width, size), b, chunk, 1, self.groups * self.tail)
        return found, _widened(tails, padded(self.groups * self.tail))

    def whole(self, stored: tuple[Node, ...], width: int) -> Node:
        """[b, g, rows, width], or their records, of what is stored."""
        found, *tails = stored
        b, _, slots, _ = found.shape
        if self.heads > 1:
            apart = _reshaped(found, b, self.groups // self.heads, slots, self.heads, self.wide)
            found = _reshaped(ops.transpose(apart, perm=(0, 1, 3, 2, 4)), b, self.groups, slots, self.wide)
        found = _columns(found, 0, width)
        each = (_columns(t, 0, self.groups * self.tail) for t in tails)
        single = (ops.transpose(_reshaped(t, b, slots, self.groups, self.tail), perm=(0, 2, 1, 3)) for t in each)
        return ops.concat(found, *single, axis=3) if tails else found


def _caches(graph: Graph, chip: Chip, sizes: Mapping[str, int]) -> Graph:
    """Caches that our kernel reads, with rows of whole lanes: of p key heads side by side (`attention.beside`) where one leaves lanes free, and of
    zeros behind it where heads don't fill them.

    [b, g, rows, d] become [b, g / p, rows, p * d]. Their attention has a group of queries for each row: p times as many, with zeros where the
    other heads' channels are, and of each result those of the own head are taken. So no kernel has to know of it, and nothing is multiplied that
    wasn't before, as a matrix unit has 128 rows and columns.

    Those of records [b, g, rows, n + 4] become their codes [b, g / p, rows, p * n] and tails [b, 1, rows, g * 4 and zeros], and the kernel puts queries
    into their lanes, for each head's scores have scales of their own. Tensors lie in whole lanes: n + 4 bytes of 128 channels would take 256, as
    many as numbers in bfloat16 do, and tails of single rows 128.

    Caches that no kernel reads stay, such as those whose rows aren't whole tiles. What isn't our kernel reads what the caches were.
    """
    caches: dict[Node, _Held] = {}
    for node in graph.nodes:
        if node.op is ops.attention_cached and attends(node):
            both = [_appended(o) for o in node.operands[1:3] if o is not None]
            widths = [fixed(cache.shape[3]) for cache in both]
            forms = [_Held.of(c, node.scheme, w) for c, w in zip(both, reversed(widths), strict=True)]
            caches |= {c: form for c, form in zip(both, forms, strict=True) if c.op is INPUT and not form.same}

    def fits(cache: Node) -> bool:
        """Whether a cache's rows are whole tiles, as far as their number is known."""
        slots: Dim = cache.shape[2]
        known = isinstance(slots, int) or {str(n) for n in slots.free_symbols} <= set(sizes)
        return not known or substitute(slots, sizes) % chip.sublane_tile(cache.dtype) == 0

    parts: dict[Node, tuple[_Held, tuple[Node, ...]]] = {}
    done: dict[Node, Node] = {}
    for node in graph.nodes:
        found = node.with_operands(done[o] if o is not None else None for o in node.operands)
        cache = node.operands[0] if node.op is ops.cache_append else None
        if node in caches and fits(node):
            parts[node] = caches[node], caches[node].inputs(node)
        elif cache in parts:
            held, before = parts[cache]
            _, new, *where = found.operands
            assert new is not None
            written = zip(before, held.rows(new), strict=True)
            parts[node] = held, tuple(node.op.make((c, n, *where), node.attributes, node.source) for c, n in written)
        elif node.op is ops.attention_cached and attends(node) and all(o in parts for o in node.operands[1:3]):
            (keys, k), (values, v) = (parts[o] for o in node.operands[1:3] if o is not None)
            if keys.tail or keys.heads == values.heads:
                found = _attended(found, keys, k, values, v)
        done[node] = parts[node][0].whole(parts[node][1], parts[node][0].width) if node in parts else found

    def each(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        return tuple(n for node in nodes for n in (parts[node][1] if node in parts else (done[node],)))

    return graph.replace(inputs=each(graph.inputs), outputs=each(graph.outputs))


def _attended(node: Node, keys: _Held, k: tuple[Node, ...], values: _Held, v: tuple[Node, ...]) -> Node:
    """Attention to keys and values as they are stored, its queries and results in the lanes of their heads."""
    q, _, _, *others = node.operands
    assert q is not None
    b, s, h, _ = q.shape
    if keys.tail:
        q = _spread(q, keys.halves, keys.width, keys.wide)
        whole = keys.whole(k, keys.wide), values.whole(v, values.wide)
        found = node.op.make((q, *whole, *others), node.attributes, node.source)
        return _gathered(found, values.halves, values.width, values.wide)
    heads, repeats = keys.heads, h // keys.groups
    lead = b, s, keys.groups // heads

    def own(x: Node, i: int) -> Node:
        """Of [b, s, groups / heads, heads, repeats, n] those of a head of each row."""
        return ops.slice_(x, starts=(0, 0, 0, i, 0, 0), stops=(*lead, i + 1, *x.shape[4:]), steps=(1,) * 6)

    apart = _reshaped(q, *lead, heads, repeats, keys.width)
    lanes = [_widened(own(apart, i), heads * keys.wide, i * keys.wide) for i in range(heads)]
    q = _reshaped(_joined(lanes, 3), b, s, h, heads * keys.wide)
    found = node.op.make((q, *k, *v, *others), node.attributes, node.source)
    apart = _reshaped(found, *lead, heads, repeats, heads * values.wide)
    places = [i * values.wide for i in range(heads)]
    kept = [_columns(own(apart, i), at, at + values.width) for i, at in enumerate(places)]
    return _reshaped(_joined(kept, 3), b, s, h, values.width)


def _appended(cache: Node) -> Node:
    """What a cache was before rows were appended to it."""
    while cache.op is ops.cache_append:
        cache = cache.parents[0]
    return cache


def _joined(parts: list[Node], axis: int) -> Node:
    return ops.concat(*parts, axis=axis) if len(parts) > 1 else parts[0]


def _reshaped(x: Node, *shape: Any) -> Node:
    return x if x.shape == shape else ops.reshape(x, shape=shape)


def _columns(x: Node, start: int, stop: int) -> Node:
    """x[..., start:stop]."""
    if (start, stop) == (0, x.shape[-1]):
        return x
    return ops.slice_(x, starts=(0,) * (x.rank - 1) + (start,), stops=(*x.shape[:-1], stop), steps=(1,) * x.rank)


def _widened(x: Node, width: int, at: int = 0) -> Node:
    """x [..., n] in zeros [..., width], its first column at `at`."""
    behind = width - at - fixed(x.shape[-1])
    if not at and not behind:
        return x
    none = (0,) * (x.rank - 1)
    return ops.pad(x, constant(0, x.dtype), low=(*none, at), high=(*none, behind), interior=(0,) * x.rank)


def _spread(x: Node, halves: int, width: int, wide: int) -> Node:
    """x [b, s, h, halves * width] with zeros behind each half, as codes of `wide` bytes have them."""
    *lead, _ = x.shape
    return _reshaped(_widened(_reshaped(x, *lead, halves, width), wide), *lead, halves * wide)


def _gathered(x: Node, halves: int, width: int, wide: int) -> Node:
    """What `_spread` made wider."""
    *lead, _ = x.shape
    return _reshaped(_columns(_reshaped(x, *lead, halves, wide), 0, width), *lead, halves * width)
