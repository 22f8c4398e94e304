"""The KV cache, derived: from a causal model traced once over a whole sequence to the program of one chunk of tokens.

`prove_causal` follows the sequence's axis through the graph by the ops' declared axes. Each value either does not depend
on the sequence, or has exactly one axis along which every index belongs to one token. Ops that read other tokens must be
causal attention, whose keys and values then are the state. `derive_step` rebuilds the same graph over a chunk of new
tokens that starts at slot `length`: attention appends its keys and values to a cache and reads the cache. Prefill,
chunked prefill and decode are that one program at different chunk lengths. Keys and values that are decoded from records
(`decode_rows`; see `jisu.passes.compression.cached`) are kept as these records.

No op or model is known by name here except attention itself; a graph for which the proof fails is refused with the op and
the axis that break it.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from jisu.compiler import ops
from jisu.compiler.axes import relate
from jisu.compiler.errors import JisuError
from jisu.compiler.graph import INPUT, Graph, Node, placeholder
from jisu.compiler.ops.shape import reshape_groups
from jisu.compiler.types import Dim, TensorType, TupleType, TypeRuleError, product, same_dim, same_shape, symbol


class NotCausal(JisuError):
    """The proof that a graph works token by token failed; the message names the op, the axis and the reason."""


@attrs.frozen
class Tokens:
    """Where the sequence lies in a value: axis `axis` is (before, sequence, behind), flattened in that order."""

    axis: int
    before: Dim = 1
    behind: Dim = 1


@attrs.frozen
class CacheLayout:
    """How keys and values of earlier tokens are stored.

    page: 0 for one contiguous block [batch, heads, capacity, d] per layer, else the slots of a page: pages
    [pages, heads, page, d] behind a table int32 [batch, pages per sequence]. ring: layers with a sliding window keep
    only as many slots as the window needs (contiguous layout only).
    """

    page: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    ring: bool = True


def _where(node: Node) -> str:
    return f"{node.op.name} ({node.type}){f' at {node.source}' if node.source else ''}"


def _sequence_axes(node_type: TensorType, sequence: str) -> list[int]:
    return [
        i
        for i, d in enumerate(node_type.shape)
        if not isinstance(d, int) and sequence in {s.name for s in d.free_symbols}
    ]


def prove_causal(graph: Graph, sequence: str) -> dict[Node, Tokens | None]:
    """Where the sequence (the symbol `sequence`) lies in each value.

    Raises NotCausal, naming the op and axis, where a value mixes tokens other than by causal attention.
    """
    found: dict[Node, Tokens | None] = {}
    for node in graph.nodes:
        try:
            found[node] = _follow(node, found, sequence)
        except TypeRuleError as error:
            raise NotCausal(f"{_where(node)}: {error}") from None
        types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
        for t in types:
            axes = _sequence_axes(t, sequence)
            place = found[node]
            if axes != ([place.axis] if place is not None else []):
                shown = f"axes {axes}" if len(axes) != 1 else f"axis {axes[0]}"
                raise NotCausal(f"{_where(node)}: the sequence runs along {shown}, but tokens lie along {place}")
    for i, output in enumerate(graph.outputs):
        if found[output] is None:
            raise NotCausal(f"output {i} ({_where(output)}) does not depend on the sequence")
    return found


def _follow(node: Node, found: Mapping[Node, Tokens | None], sequence: str) -> Tokens | None:
    if node.op is INPUT:
        axes = _sequence_axes(node.tensor, sequence)
        if len(axes) > 1 or (axes and not same_dim(node.shape[axes[0]], symbol(sequence))):
            raise NotCausal(f"input {node.name!r} ({node.type}) has more than one axis of the sequence")
        return Tokens(axes[0]) if axes else None
    places = [found[o] if o is not None else None for o in node.operands]
    if all(p is None for p in places):
        return _fresh(node, sequence)
    if node.op is ops.attention:
        return _through_attention(node, places)
    if node.op is ops.reshape:
        return _through_reshape(node, places[0])
    if node.op is ops.get:
        return places[0]
    relations = relate(node)
    if relations is None:
        raise NotCausal(f"{_where(node)}: the op doesn't say how its axes relate, so tokens may mix")
    result: Tokens | None = None
    for i, (place, row) in enumerate(zip(places, relations, strict=True)):
        if place is None or row is None:
            continue
        relation = row[place.axis]
        if relation.kind != "same" or relation.axis is None:
            how = {"prefix": "reads all earlier tokens", "whole": "mixes tokens"}.get(
                relation.kind, "spreads one token over all"
            )
            raise NotCausal(f"{_where(node)}: {how} along axis {place.axis} of operand {i}")
        here = Tokens(relation.axis, place.before, place.behind)
        if result is not None and not _same_place(result, here):
            raise NotCausal(f"{_where(node)}: operands have the sequence at {result} and at {here}")
        result = here
    return result


def _same_place(a: Tokens, b: Tokens) -> bool:
    return a.axis == b.axis and same_dim(a.before, b.before) and same_dim(a.behind, b.behind)


def _fresh(node: Node, sequence: str) -> Tokens | None:
    """A value made from nothing of the sequence: it may repeat over tokens, but not know their number or place."""
    types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    axes = _sequence_axes(types[0], sequence)
    if node.op is ops.broadcast_to and len(axes) == 1:
        # Every index holds the same, so the sequence may lie behind whatever else the axis counts (the batch).
        before = _quotient(node.shape[axes[0]], symbol(sequence))
        if before is not None:
            return Tokens(axes[0], before)
    if axes or (node.op is ops.dim_value and sequence in {s.name for s in node.value.free_symbols}):
        raise NotCausal(f"{_where(node)}: its value depends on the length of the whole sequence")
    return None


def _through_attention(node: Node, places: list[Tokens | None]) -> Tokens:
    if not node.causal:
        raise NotCausal(f"{_where(node)}: attention is not causal, so a token reads later ones (axis 1 of keys)")
    if node.operands[3] is not None:
        raise NotCausal(f"{_where(node)}: attention has a bias or mask over the sequence")
    for i, name in enumerate(("queries", "keys", "values")):
        place = places[i]
        if place is None or not _same_place(place, Tokens(1)):
            raise NotCausal(f"{_where(node)}: {name} have the sequence at {place}, not at axis 1")
    return Tokens(1)


def _through_reshape(node: Node, place: Tokens | None) -> Tokens:
    assert place is not None and node.operands[0] is not None
    old, new = node.operands[0].shape, node.shape
    groups = reshape_groups(old, new)
    for left, right in groups or ():
        if place.axis not in left:
            continue
        position = left.index(place.axis)
        before = product((*(old[a] for a in left[:position]), place.before))
        behind = product((place.behind, *(old[a] for a in left[position + 1 :])))
        for k, axis in enumerate(right):
            outside = product(new[a] for a in right[:k])
            inside = product(new[a] for a in right[k + 1 :])
            # The axis holds the sequence if what stands outside of it divides what stood before, and likewise behind.
            rest_before, rest_behind = _quotient(before, outside), _quotient(behind, inside)
            if rest_before is None or rest_behind is None:
                continue
            if _sequence_free(outside, old[place.axis], place) and same_dim(
                new[axis], product((rest_before, _extent(old[place.axis], place), rest_behind))
            ):
                return Tokens(axis, rest_before, rest_behind)
    raise NotCausal(f"{_where(node)}: the reshape from {old} takes the sequence (axis {place.axis}) apart")


def _extent(size: Dim, place: Tokens) -> Dim:
    found = _quotient(size, product((place.before, place.behind)))
    assert found is not None
    return found


def _sequence_free(outside: Dim, size: Dim, place: Tokens) -> bool:
    extent = _extent(size, place)
    symbols = set() if isinstance(extent, int) else {s.name for s in extent.free_symbols}
    return isinstance(outside, int) or not symbols & {s.name for s in outside.free_symbols}


def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where b divides a, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    import sympy

    value = sympy.cancel(sympy.sympify(a) / b)
    if value.as_numer_denom()[1] != 1:
        return None
    return int(value) if value.is_Integer else value


@attrs.frozen
class StateSpec:
    """One tensor of state: the input and output of the step program that hold it.

    window: slots that the layer's attention looks back over (0: all). type: with the symbols `capacity` (slots, or ring
    rows) and `pages`.
    """

    name: str
    type: TensorType
    window: int
    ring: bool


@attrs.frozen
class Step:
    """The derived program of one chunk.

    graph: inputs token_ids int64 [b, s], length int64 [1] (slots filled before), start int64 [b] (padding slots in front
    of each sequence), with pages also table int32 [b, n], then the state tensors; outputs: the model's outputs over the
    chunk, then the state tensors, in order. With s = 1 it is decode, with more it is prefill.
    """

    graph: Graph
    state: tuple[StateSpec, ...]
    outputs: int


def _positions(batch: Dim, sequence: str, length: Node, start: Node) -> Node:
    """int64 [b, s]: each token's position behind the padding; 0 inside the padding."""
    slots = ops.add(ops.iota(extent=symbol(sequence)), length)
    relative = ops.sub(ops.reshape(slots, shape=(1, symbol(sequence))), ops.reshape(start, shape=(batch, 1)))
    return ops.maximum(relative, 0)


def _kept(attention: Node) -> tuple[tuple[Node, Node], str]:
    """What stands in the cache for an attention's keys and values, and its scheme: their records where both come from such."""
    keys, values = attention.parents[1:3]
    if keys.op is values.op is ops.decode_rows and keys.scheme == values.scheme:
        return (keys.parents[0], values.parents[0]), keys.scheme
    return (keys, values), "none"


def derive_step(
    graph: Graph,
    *,
    sequence: str,
    tokens: str = "input_ids",
    positions: str = "position_ids",
    layout: CacheLayout | None = None,
) -> Step:
    """Derive the program of one chunk from a stateless causal graph.

    graph: takes `tokens` int64 [b, s] and, if the model asks for it, `positions` int64 [b, s]; `sequence` names the symbol
    s. Raises NotCausal where the proof fails.
    """
    layout = layout or CacheLayout()
    prove_causal(graph, sequence)
    inputs = {node.name: node for node in graph.inputs}
    if tokens not in inputs or set(inputs) - {tokens, positions}:
        raise NotCausal(f"the model takes {', '.join(inputs)}; the step program knows {tokens} and {positions} only")
    ids = inputs[tokens]
    batch = ids.shape[0]
    length = placeholder("length", TensorType((1,), "int64"))
    start = placeholder("start", TensorType((batch,), "int64"))
    table = placeholder("table", TensorType((batch, symbol("sequence_pages")), "int32")) if layout.page else None
    done: dict[Node, Node] = {ids: ids}
    if positions in inputs:
        done[inputs[positions]] = _positions(batch, sequence, length, start)
    caches: dict[tuple[Node, int, int], Node] = {}
    state: list[tuple[StateSpec, Node, Node]] = []

    def cached(role: str, old: Node, window: int) -> Node:
        """The cache with a value of the chunk appended; attentions that share keys (and their window) share the cache."""
        new = done[old]
        ring = bool(window) and layout.ring and not layout.page
        key = (old, window if ring else 0, 0 if role == "key" else 1)
        if key not in caches:
            capacity = symbol(f"ring_{window}") if ring else symbol("capacity")
            rows = (symbol("pages"), new.shape[2], layout.page) if layout.page else (batch, new.shape[2], capacity)
            number = sum(s.name.startswith(role) for s, _, _ in state)  # attentions may share keys and not values
            spec = StateSpec(f"{role}.{number}", TensorType((*rows, new.shape[3]), new.dtype), window, ring)
            cache = placeholder(spec.name, spec.type)
            caches[key] = ops.cache_append(cache, new, length, table, ring=ring)
            state.append((spec, cache, caches[key]))
        return caches[key]

    for node in graph.nodes:
        if node in done:
            continue
        operands = [done[o] if o is not None else None for o in node.operands]
        if node.op is ops.attention:
            q, sinks = operands[0], operands[4]
            assert q is not None
            (k, v), scheme = _kept(node)
            keys, values = cached("key", k, node.window), cached("value", v, node.window)
            done[node] = ops.attention_cached(
                q, keys, values, length, start, table, sinks, scale=node.scale, window=node.window, softcap=node.softcap,
                scheme=scheme,
            )  # fmt: skip
        else:
            done[node] = node.with_operands(operands)
    for old, new in ((o, done[o]) for o in graph.outputs):
        assert same_shape(old.shape, new.shape)
    step_inputs = (ids, length, start, *([table] if table is not None else []), *(cache for _, cache, _ in state))
    step = graph.replace(
        inputs=step_inputs, outputs=(*(done[o] for o in graph.outputs), *(appended for _, _, appended in state))
    )
    return Step(step, tuple(spec for spec, _, _ in state), len(graph.outputs))


def keep_last_token(step: Step, sequence: str) -> Step:
    """The same step with the model's outputs for the chunk's last token only ([b, 1, …]).

    The selection moves up through everything that works token by token, so that the head, which is large, runs for one
    token; state is appended for all.
    """
    graph = step.graph
    places = prove_step(step, sequence)
    users = graph.users
    last: dict[Node, Node] = {}

    def select(node: Node) -> Node:
        if node in last:
            return last[node]
        place = places[node]
        assert place is not None
        moves = (
            node.op not in (INPUT, ops.attention_cached, ops.cache_append, ops.reshape, ops.get)
            and all(o is None or places[o] is None or (users[o] == (node,) or o.op is INPUT) for o in node.operands)
            and "shape" not in node.attributes
            and node.op is not ops.slice_
            and isinstance(node.type, TensorType)
            and relate(node) is not None
        )
        if moves:
            picked = [o if o is None or places[o] is None else select(o) for o in node.operands]
            last[node] = node.with_operands(picked)
        else:
            size = node.shape[place.axis]
            starts = tuple(size - 1 if i == place.axis else 0 for i in range(node.rank))
            last[node] = ops.slice_(node, starts=starts, stops=node.shape, steps=(1,) * node.rank)
        return last[node]

    outputs = [select(o) for o in graph.outputs[: step.outputs]]
    return attrs.evolve(step, graph=graph.replace(outputs=(*outputs, *graph.outputs[step.outputs :])))


def prove_step(step: Step, sequence: str) -> dict[Node, Tokens | None]:
    """Where the chunk's tokens lie in each value of a step program (None for values that are not per token)."""
    found: dict[Node, Tokens | None] = {}
    for node in step.graph.nodes:
        if node.op is ops.attention_cached:
            found[node] = Tokens(1)
        elif node.op is ops.cache_append:
            found[node] = None
        elif node.op is ops.iota and _sequence_axes(node.tensor, sequence):
            found[node] = Tokens(0)
        else:
            found[node] = _follow(node, found, sequence)
    return found
