"""Weights and caches as our Pallas kernels read them, so that no step of a program moves them into that form.

What stands in another form is written into the graph with ops that it has: `jisu.passes.layout.FoldWeights` then stores packed weights, and
what nobody's kernel reads gets the former values back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import INPUT, WEIGHT, Graph, Node, placeholder
from jisu.compiler.rows import TAIL, row_length
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, fixed, round_up, substitute
from jisu.targets.tpu.attention import beside
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

    Caches of records become two inputs each, `name.codes` and `name.tails`, and two outputs: see `_apart`.
    """
    return _apart(_packed(graph, chip), chip, sizes or {})


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


def _apart(graph: Graph, chip: Chip, sizes: Mapping[str, int]) -> Graph:
    """Caches of records [b, g, rows, n + 4] as their codes [b, g, rows, n] and tails [b, 1, rows, g * 4]; of codes of 4 bits, those of p key heads
    (`attention.beside`) lie in one row: [b, g / p, rows, p * n].

    Tensors lie in whole lanes: n + 4 bytes of 128 channels would take 256, as many as numbers in bfloat16 do, and tails of single rows 128.
    Caches that no kernel reads stay, such as those whose rows aren't whole tiles of bytes. What isn't our kernel reads records that are put
    together first.
    """
    native = chip.sublane_tile("uint8")
    caches: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op is ops.attention_cached and node.scheme != "none" and attends(node):
            read = [_appended(o) for o in node.operands[1:3] if o is not None]
            caches |= {cache: node.scheme for cache in read if cache.op is INPUT}
    known = {
        c for c in caches if isinstance(c.shape[2], int) or {str(n) for n in c.shape[2].free_symbols} <= set(sizes)
    }
    fits = {c for c in caches if c not in known or substitute(c.shape[2], sizes) % native == 0}
    parts: dict[Node, tuple[Node, Node]] = {}
    done: dict[Node, Node] = {}

    def heads_of(cache: Node) -> int:
        g, size = (fixed(n) for n in cache.shape[1::2])
        scheme = caches[_appended(cache)]
        return beside(g, row_length(scheme, size)) if scheme == "int4" else 1

    for node in graph.nodes:
        found = node.with_operands(done[o] if o is not None else None for o in node.operands)
        if node in fits:
            (b, g, slots, size), heads = node.shape, heads_of(node)
            shapes = {"codes": (b, g // heads, slots, heads * (size - TAIL)), "tails": (b, 1, slots, g * TAIL)}
            first, last = (placeholder(f"{node.name}.{n}", TensorType(s, "uint8")) for n, s in shapes.items())
            parts[node] = first, last
        elif node.op is ops.cache_append and node.operands[0] in parts:
            _, new, *where = found.operands
            assert new is not None
            batch, chunk, groups, size = new.shape
            heads = heads_of(node.operands[0])
            tails = ops.reshape(_columns(new, size - TAIL, size), shape=(batch, chunk, 1, groups * TAIL))
            codes = _columns(new, 0, size - TAIL)
            if heads > 1:
                codes = ops.reshape(codes, shape=(batch, chunk, groups // heads, heads * (size - TAIL)))
            written = zip(parts[node.operands[0]], (codes, tails), strict=True)
            first, last = (ops.cache_append.make((c, n, *where), node.attributes, node.source) for c, n in written)
            parts[node] = first, last
        done[node] = _whole(*parts[node]) if node in parts else found

    def each(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        return tuple(n for node in nodes for n in parts.get(node, (done[node],)))

    return graph.replace(inputs=each(graph.inputs), outputs=each(graph.outputs))


def _appended(cache: Node) -> Node:
    """What a cache was before rows were appended to it."""
    while cache.op is ops.cache_append:
        cache = cache.parents[0]
    return cache


def _columns(x: Node, start: int, stop: int) -> Node:
    """x[..., start:stop] of rank 4."""
    return ops.slice_(x, starts=(0, 0, 0, start), stops=(*x.shape[:3], stop), steps=(1, 1, 1, 1))


def _whole(codes: Node, tails: Node) -> Node:
    """Records of codes [b, g / p, rows, p * n] and tails [b, 1, rows, g * 4]."""
    b, rows, slots, width = codes.shape
    g = tails.shape[3] // TAIL
    heads = g // rows
    if heads > 1:
        apart = ops.reshape(codes, shape=(b, rows, slots, heads, width // heads))
        codes = ops.reshape(ops.transpose(apart, perm=(0, 1, 3, 2, 4)), shape=(b, g, slots, width // heads))
    single = ops.transpose(ops.reshape(tails, shape=(b, slots, g, TAIL)), perm=(0, 2, 1, 3))
    return ops.concat(codes, single, axis=3)
