"""Weight layout: each weight is packed once into the order in which its kernel reads it, without loading it here.

`PackWeights` writes the packing into the graph; `MergeProjections` joins layers of one input; `FoldWeights` turns every
value that depends on weights alone into one stored tensor that is computed when it is first read, one at a time, so that
compiling needs no second copy of a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler import masks, ops, schemes
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Storage, weight
from jisu.compiler.interpret import evaluate_node, widen
from jisu.compiler.levels import WORD, Rule, whole_words
from jisu.compiler.ops.semi_structured import fours
from jisu.compiler.text import attribute_text
from jisu.compiler.types import TensorType, TupleType, numpy_dtype


@attrs.frozen
class PackWeights:
    """Pack the weights of linear layers into panels.

    panel: outputs per panel. pair: dtype -> consecutive inputs in one word, for the dtypes that kernels pack. A weight
    that is also an embedding stays one tensor: rows are then looked up in the packed form. sparse: dtype, or
    scheme of codes -> the largest share of kept numbers at which a sparse matrix is smaller than a dense one and kernels read it as
    fast; above, or where there is no entry, it is stored dense with its zeros. halves: dtype, or scheme of codes -> of how many inputs kernels
    read a multiple where a matrix keeps two of each four, and do so faster than of a dense one. levels: whether kernels multiply rounded
    activations and codes as levels; else they are multiplied as what they stand for.
    """

    panel: int
    pair: Mapping[str, int] = attrs.field(hash=False)
    sparse: Mapping[str, float] = attrs.field(factory=dict, hash=False)
    halves: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    levels: Rule = attrs.field(default=whole_words, hash=False)
    name: str = "pack weights"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        packed: dict[tuple[Any, ...], Node] = {}
        packs = {n.operands[1] for n in graph.nodes if n.op is ops.linear and self._packs(n.operands[1])}
        # Matrices of codes that linear layers read, and in which form.
        words = {
            w: WORD if x is not None and self._in_levels(x, w) else 1
            for x, w in (n.operands[:2] for n in graph.nodes if n.op is ops.linear)
            if w is not None and self._quantized(w)
        }
        sparse = _Sparse(self.panel, self.pair, self.sparse, _Halves(graph, self.halves))

        def once(op: Any, *operands: Node) -> Node:
            key = (op, *operands)
            if key not in packed:
                packed[key] = self._in_panels(op, *operands)
            return packed[key]

        def coded(weights: Sequence[Node], word: int) -> list[Node | None]:
            """Codes, scales and zeros of one matrix, or of gate and up side by side, in panels."""
            found = []
            for w in weights:
                key = (w, word)
                if key not in packed:
                    attributes = {"scheme": w.scheme, "panel": self.panel, "k": w.k, "word": word}
                    packed[key] = ops.pack_codes.make(w.operands[:1], attributes)
                found.append([packed[key], *scaled(w, self.panel, packed)])
            return [_together(parts) for parts in zip(*found, strict=True)]

        def quantized(new: Node, weights: Sequence[Node], b: Node | None, r: Node | None, source: str) -> Node:
            first, x = weights[0], new.operands[0]
            assert x is not None
            attributes = {
                "outputs": first.shape[0],
                "scheme": first.scheme,
                "group": first.group,
                "gated": len(weights) > 1,
                "activation": new.activation,
            }
            if not self._in_levels(x, first):
                return ops.quantized_linear.make((x, *coded(weights, 1), b, r), attributes, source)
            how = {"group": first.group, "own": x.attributes["group"] > 0}
            key = (x, first.group)
            if key not in packed:
                packed[key] = ops.encode_levels.make(x.operands, {"scheme": x.scheme, **how}, x.source)
            operands = (packed[key], *coded(weights, WORD), b, r)
            attributes |= {**how, "k": first.k, "dtype": new.dtype, "records": x.scheme}
            return ops.levels_linear.make(operands, attributes, source)

        def transform(old: Node, new: Node) -> Node:
            found = sparse.rewritten(new)
            if found is not None:
                return found
            if new.op is ops.linear and self._quantized(new.operands[1]):
                return quantized(new, new.parents[1:2], new.operands[2], new.operands[3], new.source)
            if new.op is ops.gated_linear and _all_codes(new.parents[1:]):
                data, *weights = new.parents
                if len({_form(w) for w in weights}) == 1 and self._quantized(*weights):
                    return quantized(new, weights, None, None, new.source)
                return ops.mul.make([transform(n, n) for n in _apart(new)], {}, new.source)
            if new.op is ops.take and new.axis == 0 and self._quantized(new.operands[0]):
                if old.operands[0] not in words or new.wrap:
                    return self._looked_up(new)
                table, indices = new.parents
                first, *tail = coded((table,), words[old.operands[0]])
                attributes = {"rows": table.shape[0], "width": table.shape[1], "dtype": table.dtype}
                attributes |= {"scheme": table.scheme, "group": table.group}
                return ops.quantized_take.make((first, indices, *tail), attributes, new.source)
            if new.op is ops.linear and self._packs(old.operands[1]):
                x, w, b, r = new.operands
                assert w is not None
                return ops.packed_linear.make(
                    (x, once(ops.pack, w), b, r), {"outputs": w.shape[0], "activation": new.activation}, new.source
                )
            if self.panel > 1 and new.op is ops.gated_linear and all(map(self._packs, old.operands[1:])):
                x, gate, up = new.operands
                assert gate is not None and up is not None
                both = once(ops.pack_gated, gate, up)
                return ops.packed_gated_linear.make(
                    (x, both), {"outputs": gate.shape[0], "activation": new.activation}, new.source
                )
            if new.op is ops.experts and self._packs(old.operands[3], 3) and self._packs(old.operands[4], 3):
                *rest, gate_up, down = new.operands
                assert gate_up is not None and down is not None
                halves = self._halves(gate_up)
                operands = (*rest, once(ops.pack_gated, *halves), once(ops.pack, down))
                attributes = {"inner": down.shape[2], "activation": new.activation}
                return ops.packed_experts.make(operands, attributes, new.source)
            if new.op is ops.take and new.axis == 0 and old.operands[0] in packs:
                w, indices = new.parents
                rows, width = w.shape
                return ops.packed_take.make((once(ops.pack, w), indices), {"rows": rows, "width": width}, new.source)
            return new

        return graph.map(transform)

    def _in_panels(self, op: Any, *matrices: Node) -> Node:
        """One matrix, or gate and up, in panels."""
        pair = self.pair[matrices[0].dtype]
        if op is ops.pack and self.panel == pair == 1:  # it lies so already
            return ops.reshape(matrices[0], shape=(*matrices[0].shape, 1))
        made: Node = op(*matrices, panel=self.panel, pair=pair)
        return made

    def _packs(self, node: Node | None, rank: int = 2) -> bool:
        return (
            node is not None
            and node.dtype in self.pair
            and node.rank == rank
            and not node.tensor.symbols
            and 0 not in node.shape
            and node.op is not ops.dequantize
            and is_stored(node)
        )

    def _in_levels(self, x: Node, w: Node) -> bool:
        """Whether a product of x and codes is one of levels: x has such, and scales where the codes have."""
        if x.op is not ops.fake_quantize or x.attributes["group"] not in (0, w.group):
            return False
        return self.levels(schemes.scheme(x.scheme), schemes.scheme(w.scheme), w.k, w.group)

    def _quantized(self, *nodes: Node | None) -> bool:
        """Whether all are matrices of codes that kernels read."""
        return all(n is not None and n.op is ops.dequantize and n.operands[3] is None and is_stored(n) for n in nodes)

    @staticmethod
    def _looked_up(node: Node) -> Node:
        """Rows of a matrix of codes: the rows' codes are looked up, not the whole matrix computed."""
        table, indices = node.parents
        flat = ops.reshape(indices, shape=(indices.tensor.size,))
        rows = [None if p is None else ops.take(p, flat, axis=0, wrap=node.wrap) for p in table.operands]
        return ops.reshape(ops.dequantize.make(rows, table.attributes, node.source), shape=node.shape)

    @staticmethod
    def _halves(gate_up: Node) -> tuple[Node, Node]:
        """Gate and up projections of experts' weights [e, 2i, h]."""
        count, both, width = gate_up.shape
        inner = both // 2
        ends = ((0, inner), (inner, both))
        gate, up = (ops.slice_(gate_up, starts=(0, a, 0), stops=(count, b, width), steps=(1, 1, 1)) for a, b in ends)
        return gate, up


def _kind(node: Node | None) -> tuple[Any, ...] | None:
    """What sparse matrices must have in common to be read by one kernel; None for a dense one."""
    if node is None or node.op not in (ops.expand, ops.dequantize) or 0 in node.shape:
        return None
    if node.op is ops.expand:
        return (node.dtype,)
    return _form(node) if node.operands[3] is not None else None


def kept_share(node: Node) -> float:
    """Which share of a sparse matrix (`expand` or a masked `dequantize`) is kept."""
    (size,) = node.parents[0].shape
    count = size if node.op is ops.expand else size * 8 // schemes.scheme(node.scheme).bits
    return float(count / max(node.tensor.size, 1))


def _filled(node: Node) -> Node:
    """A masked `dequantize` as one without mask."""
    codes, scales, zeros, mask = node.operands
    attributes = {a: node.attributes[a] for a in ("scheme", "k", "group")}
    filled = ops.fill_codes.make((codes, mask, zeros), attributes, node.source)
    return ops.dequantize.make((filled, scales, zeros, None), node.attributes, node.source)


def _form(w: Node) -> tuple[Any, ...]:
    """What codes of gate and up must have in common to lie side by side."""
    return (w.scheme, w.group, w.operands[2] is None)


def scaled(w: Node, panel: int, made: dict[tuple[Any, ...], Node]) -> list[Node | None]:
    """Scales and zeros of a `dequantize` in panels; each is made once."""
    _, scales, zeros, _ = w.operands
    assert scales is not None
    parts = [ops.pack_scales(scales, scheme=w.scheme, whole=w.whole, panel=panel)]
    parts += [] if zeros is None else [ops.pack_zeros(zeros, panel=panel)]
    found: list[Node | None] = [made.setdefault((w, p.op), p) for p in parts]
    return [*found, None] if zeros is None else found


def _together(parts: Sequence[Node | None]) -> Node | None:
    """What belongs to one matrix, or to gate and up side by side; scales of both in one dtype."""
    there = [p for p in parts if p is not None]
    if len({p.dtype for p in there}) > 1:
        there = [ops.cast(p, dtype="float32") for p in there]
    return _beside(*there) if len(there) == 2 else there[0] if there else None


def _all_codes(weights: Sequence[Node]) -> bool:
    return all(w.op is ops.dequantize and is_stored(w) for w in weights)


@attrs.frozen(eq=False)
class _Sparse:
    """Sparse matrices in panels; each is packed once. limits: see `PackWeights.sparse`. halves: those that are packed in another way."""

    panel: int
    pair: Mapping[str, int]
    limits: Mapping[str, float]
    halves: _Halves
    made: dict[Any, tuple[Node | None, ...]] = attrs.field(factory=dict)

    def reads(self, *nodes: Node | None) -> bool:
        """Whether all are sparse matrices of one kind that kernels read as fast as dense ones."""
        kinds = {_kind(n) for n in nodes}
        if len(kinds) != 1 or None in kinds:
            return False
        matrices = [n for n in nodes if n is not None and is_stored(n)]
        limits = [self.limits.get(n.scheme if n.op is ops.dequantize else n.dtype, -1.0) for n in matrices]
        return len(matrices) == len(nodes) and all(
            kept_share(n) <= top for n, top in zip(matrices, limits, strict=True)
        )

    def rewritten(self, node: Node) -> Node | None:
        """A node that reads the packed form of a sparse matrix, or a dense one with its zeros, in place of `node`."""
        found = self.halves.rewritten(node)
        if found is not None or self.halves.reads(node):
            return found
        if node.op is ops.dequantize and node.operands[3] is not None and is_stored(node) and not self.reads(node):
            return _filled(node)
        if node.op is ops.linear and self.reads(node.operands[1]):
            return self._linear(node, node.parents[1:2], node.operands[2:])
        if node.op is ops.gated_linear and self.reads(*node.operands[1:]):
            return self._linear(node, node.parents[1:], (None, None))
        if node.op is ops.take and node.axis == 0 and self.reads(node.operands[0]):
            table, indices = node.parents
            values, mask, starts, scales, zeros = self.parts((table,))
            attributes = {"rows": table.shape[0], "width": table.shape[1], "dtype": table.dtype}
            operands = (values, mask, starts, indices, scales, zeros)
            return ops.sparse_take.make(operands, {**attributes, **self.attributes(table)}, node.source)
        return None

    def _linear(self, node: Node, weights: Sequence[Node], epilogue: Sequence[Node | None]) -> Node:
        attributes = {"outputs": weights[0].shape[0], "gated": len(weights) > 1, "activation": node.activation}
        operands = (node.operands[0], *self.parts(weights), *epilogue)
        return ops.sparse_linear.make(operands, {**attributes, **self.attributes(weights[0])}, node.source)

    def attributes(self, w: Node) -> dict[str, Any]:
        """The attributes of ops that read the packed form of `w`."""
        if w.op is ops.expand:
            return {"pair": self.pair[w.dtype]}
        return {"pair": 1, "scheme": w.scheme, "group": w.group}

    def parts(self, weights: Sequence[Node]) -> tuple[Node | None, ...]:
        """Values, mask, starts and (of codes) scales and zeros of one matrix, or of gate and up side by side."""
        found = [self._packed(w) for w in weights]
        if len(found) == 1:
            return found[0]
        (values, _, _, *_), (more, _, starts, *_) = found
        assert values is not None and more is not None and starts is not None
        # The second matrix' values stand behind the first's.
        per_byte = schemes.scheme(weights[0].scheme).per_byte if weights[0].op is ops.dequantize else 1
        moved = ops.add(starts, int(values.shape[0]) * per_byte)
        mask, scales, zeros = (_together((found[0][i], found[1][i])) for i in (1, 3, 4))
        return ops.concat(values, more, axis=0), mask, _together((found[0][2], moved)), scales, zeros

    def _packed(self, w: Node) -> tuple[Node | None, ...]:
        if w not in self.made:
            mask = w.operands[-1]
            attributes = {"k": w.k, "panel": self.panel}
            order = {**attributes, "pair": self.attributes(w)["pair"]}
            scheme = {"scheme": w.scheme} if w.op is ops.dequantize else {}
            self.made[w] = (
                ops.pack_values.make((w.operands[0], mask), {**order, **scheme}),
                ops.pack_mask.make((mask,), order),
                ops.pack_starts.make((mask,), attributes),
                *(scaled(w, self.panel, {}) if w.op is ops.dequantize else (None, None)),
            )
        return self.made[w]


@attrs.frozen(eq=False)
class _Halves:
    """Matrices that keep two of each four inputs, as `ops.semi_structured_linear` reads them. multiples: see `PackWeights.halves`."""

    graph: Graph
    multiples: Mapping[str, int]
    known: dict[Node, bool] = attrs.field(factory=dict)
    made: dict[Any, tuple[Node | None, ...]] = attrs.field(factory=dict)

    def reads(self, *nodes: Node | None) -> bool:
        """Whether all are such matrices of one kind, which only layers read."""
        kinds = {_kind(n) for n in nodes}
        return len(kinds) == 1 and None not in kinds and all(n is not None and self._reads(n) for n in nodes)

    def _reads(self, w: Node) -> bool:
        if w not in self.known:
            step = self.multiples.get(w.scheme if w.op is ops.dequantize else w.dtype, 0)
            self.known[w] = (
                step > 0 and w.dtype in self.multiples and w.k % step == 0
                and (kept_share(w) == 0.5 if w.op is ops.expand else kept_share(w) >= 0.5 and _fits(w.group, step // 4))
                and is_stored(w) and not self._looked_up(w)
                and masks.two_of_four(Derived(w.parents[-1], self.graph.weights).numpy(), w.k)
            )  # fmt: skip
        return self.known[w]

    def _looked_up(self, w: Node) -> bool:
        """Whether rows of a matrix of this mask are looked up: an embedding tied to it."""
        return any(n.op is ops.take and w.operands[-1] in n.parents[0].operands for n in self.graph.nodes)

    def rewritten(self, node: Node) -> Node | None:
        """A node that reads the packed form, in place of `node`."""
        if node.op is ops.linear and self.reads(node.operands[1]):
            weights, epilogue = node.parents[1:2], node.operands[2:]
        elif node.op is ops.gated_linear and self.reads(*node.operands[1:]):
            weights, epilogue = node.parents[1:], (None, None)
        else:
            return None
        first = weights[0]
        attributes = {"outputs": first.shape[0], "gated": len(weights) > 1, "activation": node.activation}
        if first.op is ops.dequantize:
            attributes |= {"scheme": first.scheme, "group": first.group}
        key = tuple(weights)
        if key not in self.made:
            self.made[key] = _halved(key)
        return ops.semi_structured_linear.make(
            (node.operands[0], *self.made[key], *epilogue), attributes, node.source
        )  # fmt: skip


def _fits(group: int, chunk: int) -> bool:
    """Whether groups go into chunks of so many inputs, in quarters at least, or chunks into groups."""
    return group % chunk == 0 or (chunk % group == 0 and group % (chunk // 4) == 0)


def _halved(weights: Sequence[Node]) -> tuple[Node | None, ...]:
    """Values, places, scales and zeros of one matrix, or of gate and up by turns."""

    def by_turns(parts: Sequence[Node | None]) -> Node | None:
        both = _together(parts)
        if both is None or len(parts) == 1:
            return both
        return ops.reshape(both, shape=(2 * both.shape[0], *both.shape[2:]))

    first = weights[0]
    scheme = first.scheme if first.op is ops.dequantize else "none"
    mask = by_turns([w.operands[-1] for w in weights])
    places = ops.pack_places.make((mask,), {"k": first.k, "fours": fours(first.dtype, scheme)})
    if scheme == "none":
        return by_turns([ops.reshape(w.operands[0], shape=(w.shape[0], w.k // 2)) for w in weights]), places, None, None
    scales, zeros = (by_turns(parts) for parts in zip(*(scaled(w, 1, {}) for w in weights), strict=True))
    return by_turns([_half_codes(w) for w in weights]), places, scales, zeros


def _half_codes(w: Node) -> Node:
    """Codes uint8 [n, bytes] of what a masked `dequantize` keeps; in 4 bytes the first ones of their fours, then the second ones."""
    kind, (n, k) = schemes.scheme(w.scheme), w.shape
    packed, word = w.parents[0], 2 * kind.per_byte
    single = ops.unpack_bits(ops.reshape(packed, shape=(1, packed.shape[0])), bits=kind.bits)
    kept = ops.slice_(single, starts=(0, 0), stops=(1, n * k // 2), steps=(1, 1))
    words = ops.transpose(ops.reshape(kept, shape=(n, k // 4 // word, word, 2)), perm=(0, 1, 3, 2))
    return ops.pack_bits(ops.reshape(words, shape=(n, k // 2)), bits=8 // kind.per_byte)


def _beside(a: Node, b: Node) -> Node:
    """Two values in panels as one: [panels, 2, …]."""
    return ops.concat(*(ops.reshape(p, shape=(p.shape[0], 1, *p.shape[1:])) for p in (a, b)), axis=1)


def sparse_matrices(graph: Graph) -> list[dict[str, Any]]:
    """How the sparse matrices of a laid-out graph are stored: `name` (of the mask, without ".mask"), `form` (dtype of the numbers, or scheme
    of the codes), share of numbers `kept`, and `stored`: "sparse", "2:4" or "dense with zeros" (which is faster, or no larger)."""
    found: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        if node.op is ops.semi_structured_linear:
            form = node.dtype if node.scheme == "none" else node.scheme
            for name in _weights_of(node.parents[2], graph):
                own = name.removesuffix(".mask")
                found[f"{own} 2:4"] = {"name": own, "form": form, "kept": 0.5, "stored": "2:4"}
        storage = graph.weights.get(node.name) if node.op is WEIGHT else None
        inside = Graph((), (storage.node,), {}).nodes if isinstance(storage, Derived) else (node,)
        for part in inside:
            if part.op not in (ops.pack_values, ops.expand, ops.fill_codes) and _kind(part) is None:
                continue
            size, mask = part.parents[0].shape[0], part.parents[-1 if part.op is not ops.fill_codes else 1]
            scheme = part.attributes.get("scheme", "none")
            count = size if scheme == "none" else size * 8 // schemes.scheme(scheme).bits
            stored = "dense with zeros" if part.op in (ops.expand, ops.fill_codes) else "sparse"
            name = mask.attributes.get("name", mask.op.name).removesuffix(".mask")
            kept = count / max(mask.shape[0] * part.k, 1)
            form = part.parents[0].dtype if scheme == "none" else scheme
            found[f"{name} {stored}"] = {"name": name, "form": form, "kept": kept, "stored": stored}
    return list(found.values())


def _weights_of(node: Node, graph: Graph) -> list[str]:
    """Names of the weights of the model that a value is made of."""
    storage = graph.weights.get(node.name) if node.op is WEIGHT else None
    return [
        n.name for n in Graph((), (storage.node if isinstance(storage, Derived) else node,), {}).nodes if n.op is WEIGHT
    ]


def is_stored(node: Node) -> bool:
    """Whether a value depends on weights and constants alone."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op is INPUT or (current.op.leaf and current.op not in (WEIGHT, CONSTANT)):
            return False
        stack += current.parents
    return any(n.op is WEIGHT for n in seen)


@attrs.define(eq=False)
class Derived:
    """A stored tensor defined by an expression over other stored tensors; computed at each read, never kept."""

    node: Node
    weights: Mapping[str, Storage] = attrs.field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.node.shape)

    @property
    def dtype(self) -> np.dtype:
        return numpy_dtype(self.node.dtype)

    def numpy(self) -> np.ndarray:
        """The value, computed now."""
        return self._computed("").astype(self.dtype, copy=False)

    def wide(self) -> np.ndarray:
        """The value float32, computed now without rounding to narrower dtypes on the way."""
        return self._computed("float32").astype(np.float32, copy=False)

    def _computed(self, floats: str) -> np.ndarray:
        values: dict[Node, Any] = {}
        nodes = Graph((), (self.node,), {}).nodes
        last = {parent: node for node in nodes for parent in node.parents}
        for node in nodes:
            if node.op in (WEIGHT, CONSTANT):
                array = self.weights[node.name].numpy() if node.op is WEIGHT else node.value.array
                values[node] = widen(array, floats) if floats else array
            else:
                operands = [values[o] if o is not None else None for o in node.operands]
                values[node] = evaluate_node(node, operands, {}, floats)
            for parent in set(node.parents):
                if last[parent] is node:
                    del values[parent]  # the largest of them are as large as a matrix
        return np.asarray(values[self.node])

    def release(self) -> None:
        """Let go of pages of memory-mapped sources that reading touched."""
        for node in Graph((), (self.node,), {}).nodes:
            release = getattr(self.weights.get(node.name), "release", None) if node.op is WEIGHT else None
            if release is not None:
                release()


@attrs.frozen
class MergeProjections:
    """Linear layers of one x (queries, keys and values) become one op with several results: x is read once, in one region.

    Layers with an activation or a residual keep their own epilogue and stay apart; so do those whose bias isn't stored, and
    integer ones whose codes are of another form.
    """

    name: str = "merge projections"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        groups: dict[tuple[Any, ...], list[Node]] = {}
        for node in graph.nodes:
            if node.op not in (ops.packed_linear, ops.levels_linear) or node.attributes.get("gated", False):
                continue
            bias, residual = node.operands[-2:]
            if node.activation == "none" and residual is None and (bias is None or is_stored(bias)):
                groups.setdefault((node.operands[0], bias is not None, *_alike(node)), []).append(node)
        member = {n: (group, i) for group in groups.values() if len(group) > 1 for i, n in enumerate(group)}
        merged: dict[int, Node] = {}

        def transform(old: Node, new: Node) -> Node:
            if old not in member:
                return new
            group, index = member[old]
            if id(group) not in merged:
                kinds = zip(*(n.operands[1:-1] for n in group), strict=True)
                stored = [o for kind in kinds for o in kind if o is not None]
                attributes = {"outputs": tuple(n.outputs for n in group), "biased": old.operands[-2] is not None}
                op = ops.packed_projections
                if old.op is ops.levels_linear:
                    op = ops.levels_projections
                    attributes |= {a: old.attributes[a] for a in ("k", "scheme", "group", "own", "dtype", "records")}
                    attributes["offset"] = old.operands[3] is not None
                merged[id(group)] = op.make((new.operands[0], *stored), attributes, new.source)
            return ops.get(merged[id(group)], index=index)

        return graph.map(transform)


def _apart(gated: Node) -> list[Node]:
    """A gated layer's two layers, whose product it is."""
    data, *weights = gated.parents
    kinds = zip(weights, (gated.activation, "none"), strict=True)
    return [ops.linear.make((data, m, None, None), {"activation": kind}, gated.source) for m, kind in kinds]


def _alike(node: Node) -> tuple[Any, ...]:
    """What layers of one x that become one op have in common: the op, and how codes are stored."""
    if node.op is ops.packed_linear:
        return (node.op,)
    _, _, scales, zeros, *_ = node.operands
    assert scales is not None
    return (node.op, node.scheme, node.group, scales.dtype, zeros is not None)


_LONGEST = 200  # characters of an expression that is spelled out


def _expression(node: Node, known: dict[Node, str]) -> str:
    """The expression as a name, so that equal names mean equal values: pack(model.w, panel=32, pair=1).

    An operand whose own expression is long (experts stored one by one) is named by its op and the expression's hash.
    """
    if node.op is WEIGHT:
        return str(node.name)
    if node not in known:
        shown = ["none" if o is None else _short(o, known) for o in node.operands]
        attributes = (f"{k}={attribute_text(v)}" for k, v in node.attributes.items())
        known[node] = f"{node.op.name}({', '.join([*shown, *attributes])})"
    return known[node]


def _short(node: Node, known: dict[Node, str]) -> str:
    whole = _expression(node, known)
    return whole if len(whole) <= _LONGEST else f"{node.op.name}#{hashlib.sha256(whole.encode()).hexdigest()[:32]}"


@attrs.frozen
class FoldWeights:
    """Replace the largest values that depend on weights alone by stored tensors, computed lazily."""

    name: str = "fold weights"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        stored: dict[Node, bool] = {}
        for node in graph.nodes:
            if node.op in (WEIGHT, CONSTANT):
                stored[node] = True
            else:
                several = not isinstance(node.type, TensorType)
                fixed = several or not node.tensor.symbols
                grows = node.op in (ops.iota, ops.dim_value, ops.dequantize) or node.op is INPUT
                stored[node] = fixed and not grows and bool(node.parents) and all(stored[p] for p in node.parents)
        # What only repeats is stored within a larger expression, never by itself; an op of several results, by its results.
        for node in reversed(graph.nodes):
            if node.op is ops.broadcast_to or isinstance(node.type, TupleType):
                stored[node] &= node not in graph.outputs and all(stored[u] for u in graph.users[node])
        weights = dict(graph.weights)
        names: dict[Node, str] = {}
        known: dict[Node, str] = {}

        def transform(old: Node, new: Node) -> Node:
            if not stored[old] or old.op in (WEIGHT, CONSTANT):
                return new
            outside = any(not stored[u] for u in graph.users[old]) or old in graph.outputs
            if not outside:
                return new
            name = _short(old, known)
            weights[name] = Derived(old, graph.weights)
            names[old] = name
            return weight(name, old.tensor, old.source)

        new = graph.map(transform)
        return new.replace(weights=weights) if names else graph
