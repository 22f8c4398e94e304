"""Canonicalisation: one normal form, so that every later rule needs to know one spelling.

Constant folding (bounded in size), common subexpressions, algebraic identities, and the clean-up of views, transpositions
and casts. Dead code needs no pass: a graph is what its outputs reach.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import JisuError
from jisu.compiler.graph import CONSTANT, INPUT, MAX_INLINE, WEIGHT, ArrayStorage, Graph, Node, Op, constant, weight
from jisu.compiler.interpret import evaluate_node
from jisu.compiler.rewrite import Match, Rule, bind, guard, rewrite, scalar, used_once, variable, variables
from jisu.compiler.types import FLOATS, TensorType, is_float, is_integer, numpy_dtype, same_shape

x, y = variables("x y")

_ORDER = ("float16", "float32", "float64")


def _holds(narrow: str, wide: str) -> bool:
    """Whether every value of dtype `narrow` is exactly a value of dtype `wide`."""
    if narrow == wide or narrow == "bool":
        return True
    if is_float(narrow) and is_float(wide):
        if "bfloat16" in (narrow, wide):
            return narrow == "bfloat16" and wide in ("float32", "float64")
        return _ORDER.index(narrow) <= _ORDER.index(wide)
    if is_integer(narrow) and is_integer(wide):
        a, b = np.iinfo(narrow), np.iinfo(wide)
        return bool(b.min <= a.min and a.max <= b.max)
    return False


def _same_shape_as_root(m: Match) -> bool:
    return same_shape(m["x"].shape, m.root.shape)


def _cast_back(m: Match) -> Node | None:
    """cast(cast(x)) is one cast where the first loses nothing."""
    (outer,) = m.root.parents
    (inner,) = outer.parents
    if not _holds(inner.dtype, outer.dtype):
        return None
    return inner if inner.dtype == m.root.dtype else ops.cast(inner, dtype=m.root.dtype)


def _compose(m: Match) -> Node:
    return ops.transpose(m["x"], perm=tuple(m["inner"][p] for p in m["outer"]))


def _without_broadcast(m: Match) -> Node | None:
    """An elementwise op broadcasts by itself: drop an explicit broadcast where the result's shape stays."""
    node = m.root
    for i, operand in enumerate(node.operands):
        if operand is not None and operand.op is ops.broadcast_to:
            slim = list(node.operands)
            slim[i] = operand.operands[0]
            new = node.with_operands(slim)
            if same_shape(new.shape, node.shape):
                return new
    return None


def _merged_slice(m: Match) -> Node | None:
    """A slice of a slice with unit steps is one slice."""
    outer, inner = m.root, m.root.operands[0]
    assert inner is not None
    if set(outer.steps) | set(inner.steps) - {1} != {1} or set(inner.steps) != {1}:
        return None
    starts = tuple(a + b for a, b in zip(inner.starts, outer.starts, strict=True))
    stops = tuple(a + b for a, b in zip(inner.starts, outer.stops, strict=True))
    return ops.slice_(inner.operands[0], starts=starts, stops=stops, steps=outer.steps)


def _unit_transpose(m: Match) -> Node | None:
    """Moving only axes of size 1 is a reshape."""
    perm, shape = m.root.perm, m["x"].shape
    moved = [p for p in perm if shape[p] != 1]
    return ops.reshape(m["x"], shape=m.root.shape) if moved == sorted(moved) and list(perm) != sorted(perm) else None


def _is_number(value: float) -> Any:
    return guard(f"a constant of {value}", lambda m: m["c"] == value and not isinstance(m["c"], bool))


def _float_root(m: Match) -> bool:
    return m.root.dtype in FLOATS


c = scalar("c")
_keeps = guard("the shape to stay", _same_shape_as_root)
_float = guard("floats", _float_root)
_wide = guard(
    "float32 or float64, where nothing is rounded in between", lambda m: m.root.dtype in ("float32", "float64")
)
_SHAPE = {"x": "any[a b c]"}


def _identity(name: str, pattern: Node, value: float) -> Rule:
    return Rule(name, pattern, x, (_is_number(value), _keeps), {"x": "float[*b k]"}, {"c": (value,)})


def _empty(name: str) -> Any:
    return guard(f"nothing in {name}", lambda m: m[name].shape[m["axis"]] == 0)


def _keeps_last(m: Match) -> bool:
    return bool(m["perm"][-1] == len(m["perm"]) - 1)


def _norm_below(m: Match) -> Node:
    norm = m.root
    below = ops.rms_norm(m["x"], m["w"], eps=norm.eps, offset=norm.offset, round_first=norm.round_first)
    return ops.transpose(below, perm=m["perm"])


_matrix = ops.dequantize(*variables("x s"), variable("z", optional=True), scheme=bind("scheme"), k=bind("k"), group=bind("group"),
                         whole=bind("whole"), dtype=bind("dtype"))  # fmt: skip


def _sliced_rows(m: Match) -> Node | None:
    """Rows of a matrix of codes are rows of its codes, scales and zeros, and stay codes."""
    matrix = m.at(_matrix)
    if (m["a"][1], m["b"][1]) != (0, m["k"]) or m["t"][1] != 1:
        return None
    cut = {"starts": (m["a"][0], 0), "steps": m["t"]}
    rows = [o if o is None else ops.slice_(o, stops=(m["b"][0], o.shape[1]), **cut) for o in matrix.operands]
    return ops.dequantize.make(rows, matrix.attributes, m.root.source)


_inner_slice = ops.slice_(x, starts=bind("a"), stops=bind("b"), steps=bind("s"))

RULES: tuple[Rule, ...] = (
    Rule("reshape of reshape", ops.reshape(ops.reshape(x, shape=bind("inner")), shape=bind("outer")),
         ops.reshape(x, shape=bind("outer")), (), {"x": "any[6 4]"}, {"inner": ((4, 6), (24,)), "outer": ((2, 12), (24, 1))}),
    Rule("reshape to the same shape", ops.reshape(x, shape=bind("shape")), x, (_keeps,), {"x": "any[2 3]"}, {"shape": ((2, 3),)}),
    Rule("transpose of transpose", ops.transpose(ops.transpose(x, perm=bind("inner")), perm=bind("outer")), _compose, (),
         _SHAPE, {"inner": ((1, 2, 0), (0, 2, 1)), "outer": ((2, 0, 1), (1, 0, 2))}),
    Rule("transpose that moves nothing", ops.transpose(x, perm=bind("perm")), x,
         (guard("the identity", lambda m: list(m["perm"]) == sorted(m["perm"])),), _SHAPE, {"perm": ((0, 1, 2),)}),
    Rule("transpose of unit axes", ops.transpose(x, perm=bind("perm")), _unit_transpose, (), {"x": "any[a 1 c]"},
         {"perm": ((1, 0, 2), (0, 2, 1))}),
    Rule("cast to the same dtype", ops.cast(x, dtype=bind("dtype")), x,
         (guard("the same dtype", lambda m: m["x"].dtype == m["dtype"]),), {"x": "float32[a b]"}, {"dtype": ("float32",)}),
    Rule("cast of a lossless cast", ops.cast(ops.cast(x, dtype=bind("inner")), dtype=bind("outer")), _cast_back, (),
         {"x": "bfloat16[a b]"}, {"inner": ("float32", "float64"), "outer": ("bfloat16", "float32")}),
    Rule("broadcast to the same shape", ops.broadcast_to(x, shape=bind("shape")), x, (_keeps,), {"x": "any[2 3]"},
         {"shape": ((2, 3),)}),
    Rule("slice of everything", ops.slice_(x, starts=bind("starts"), stops=bind("stops"), steps=bind("steps")), x,
         (guard("unit steps", lambda m: set(m["steps"]) <= {1}), _keeps), {"x": "any[2 3]"},
         {"starts": ((0, 0),), "stops": ((2, 3),), "steps": ((1, 1),)}),
    Rule("slice of slice", ops.slice_(_inner_slice, starts=bind("d"), stops=bind("e"), steps=bind("t")), _merged_slice,
         (used_once(_inner_slice),), {"x": "any[6 5]"},
         {"a": ((1, 0),), "b": ((6, 4),), "s": ((1, 1),), "d": ((1, 2),), "e": ((4, 4),), "t": ((1, 1), (2, 1))}),
    Rule("rows of a matrix of codes", ops.slice_(_matrix, starts=bind("a"), stops=bind("b"), steps=bind("t")), _sliced_rows, (),
         {"x": "uint8[6 4]", "s": "float16[6 2]", "z": "uint8[6 2]"},
         {"scheme": ("int4",), "k": (8,), "group": (4,), "whole": (1.0,), "dtype": ("float32",), "a": ((2, 0), (0, 0)), "b": ((5, 8),),
          "t": ((1, 1), (2, 1))}),
    Rule("concat of one", ops.concat(x, axis=bind("axis")), x, (), {"x": "any[a b]"}, {"axis": (0, 1)}),
    Rule("concat with nothing behind", ops.concat(x, y, axis=bind("axis")), x, (_empty("y"),), {"x": "any[2 3]", "y": "any[2 0]"},
         {"axis": (1,)}),
    Rule("concat with nothing in front", ops.concat(x, y, axis=bind("axis")), y, (_empty("x"),), {"x": "any[2 0]", "y": "any[2 3]"},
         {"axis": (1,)}),
    Rule("norm above a transpose",
         ops.rms_norm(ops.transpose(x, perm=bind("perm")), variable("w", optional=True), eps=bind("eps"), offset=bind("offset"),
                      round_first=bind("first")),
         _norm_below, (guard("a transpose that keeps the last axis", _keeps_last),), {"x": "float32[a b c 4]", "w": "float32[4]"},
         {"perm": ((0, 2, 1, 3),), "eps": (1e-6,), "offset": (0.0, 1.0), "first": (True, False)}),
    _identity("x * 1", ops.mul(x, c), 1),
    # Not for floats: -0.0 + 0.0 is 0.0.
    Rule("x + 0", ops.add(x, c), x, (_is_number(0), _keeps, guard("integers", lambda m: is_integer(m.root.dtype))), {"x": "int64[*b k]"},
         {"c": (0,)}),
    _identity("x - 0", ops.sub(x, c), 0),
    _identity("x / 1", ops.div(x, c), 1),
    _identity("x ** 1", ops.pow_(x, c), 1),
    Rule("x ** 2", ops.pow_(x, c), ops.square(x), (_is_number(2), _keeps), {"x": "float[*b k]"}, {"c": (2,)}),
    Rule("x * x", ops.mul(x, x), ops.square(x), (), {"x": "float[*b k]"}),
    Rule("-(-x)", ops.neg(ops.neg(x)), x, (), {"x": "float[*b k]"}),
    Rule("1 / sqrt(x)", ops.reciprocal(ops.sqrt(x)), ops.rsqrt(x), (), {"x": "float[*b k]"}),
    Rule("constant / sqrt(x)", ops.div(c, ops.sqrt(x)), ops.rsqrt(x), (_is_number(1), _keeps, _float), {"x": "float[*b k]"}, {"c": (1,)}),
    Rule("x * sigmoid(x)", ops.mul(x, ops.sigmoid(x)), ops.silu(x), (_wide,), {"x": "float32[*b k]"}),
    Rule("not (not x)", ops.logical_not(ops.logical_not(x)), x, (), {"x": "bool[*b k]"}),
)  # fmt: skip
"""Identities that hold for every dtype named in their types."""

_LOGICAL = {ops.logical_and, ops.logical_or, ops.logical_xor}
_BITS = {ops.bit_and, ops.bit_or, ops.bit_xor, ops.shift_left, ops.shift_right}


def _broadcast_types(op: Op) -> dict[str, str]:
    kind = "bool" if op in _LOGICAL else "int" if op in _BITS else "float"
    return {"x": f"broadcast {kind}[*b k]", "y": f"{kind}[*b? k?]"}


BROADCAST_RULES: tuple[Rule, ...] = (
    *(
        Rule(f"{op.name} broadcasts by itself", op(*variables("x y")), _without_broadcast, (), _broadcast_types(op))
        for op in sorted(ops.ELEMENTWISE, key=lambda o: o.name)
        if len(op.operand_names) == 2
    ),
    Rule("where broadcasts by itself", ops.where(*variables("x y z")), _without_broadcast, (),
         {"x": "bool[*b k]", "y": "broadcast float[*b k]", "z": "float[*b? k?]"}),
)  # fmt: skip
"""Elementwise ops broadcast their operands, so an explicit broadcast before them is only a copy."""


def deduplicate(graph: Graph) -> Graph:
    """Common subexpressions become one node; a weight's name, not its node, is its identity."""
    seen: dict[Any, Node] = {}

    def unique(old: Node, new: Node) -> Node:
        if new.op is INPUT:
            return new
        operands = [id(o) if o is not None else None for o in new.operands]
        if new.op.commutative:
            operands.sort(key=lambda i: i or 0)
        key = (new.op, tuple(operands), tuple(new.attributes.items()), new.type if new.op.leaf else None)
        return seen.setdefault(key, new)

    return graph.map(unique)


def fold_constants(graph: Graph, max_bytes: int) -> Graph:
    """Evaluate nodes whose operands are constants or small weights, where the result has at most `max_bytes`."""
    weights = dict(graph.weights)
    values: dict[Node, np.ndarray] = {}

    def value(node: Node) -> np.ndarray | None:
        if node.op is CONSTANT:
            return node.value.array  # type: ignore[no-any-return]
        if node.op is WEIGHT and not isinstance(node.tensor.nbytes, int):
            return None
        if node.op is WEIGHT and node.tensor.nbytes <= max_bytes:
            if node not in values:
                values[node] = weights[node.name].numpy()
            return values[node]
        return None

    def fold(old: Node, new: Node) -> Node:
        if (
            new.op.leaf
            or new.op in (ops.broadcast_to, ops.dim_value, ops.dequantize)
            or not isinstance(new.type, TensorType)
            or new.tensor.symbols
        ):
            return new
        if (
            _symbolic(new.attributes.values())
            or new.tensor.nbytes > max_bytes
            or not new.parents
            and new.op is not ops.iota
        ):
            return new
        if all(p.op is WEIGHT for p in new.parents) and new.parents:
            return new  # a view of a stored tensor stays lazy: `fold_weights` deals with it
        operands = [value(o) if o is not None else None for o in new.operands]
        if any(v is None and o is not None for v, o in zip(operands, new.operands, strict=True)):
            return new
        try:
            result = np.asarray(evaluate_node(new, operands, {})).astype(numpy_dtype(new.dtype))
        except JisuError:
            return new  # an index out of range stays an error at run time
        if result.size <= MAX_INLINE:
            return constant(result)
        name = f"folded.{len(weights)}"
        while name in weights:
            name += "_"
        weights[name] = ArrayStorage(result)
        return weight(name, new.tensor, new.source)

    new = graph.map(fold)
    return new.replace(weights=weights) if new.outputs != graph.outputs else graph


def _symbolic(values: Iterable[Any]) -> bool:
    return any(
        _symbolic(v) if isinstance(v, tuple) else hasattr(v, "free_symbols") and bool(v.free_symbols) for v in values
    )


@attrs.frozen
class Canonicalize:
    """Bring a graph to normal form. max_fold_bytes: the largest tensor that constant folding makes."""

    max_fold_bytes: int = 1 << 20
    name: str = "canonicalize"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        for _ in range(8):
            before = graph
            graph = fold_constants(graph, self.max_fold_bytes)
            graph = rewrite(deduplicate(graph), (*RULES, *BROADCAST_RULES))
            if str(graph) == str(before):
                break
        return graph
