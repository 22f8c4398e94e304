"""The kit catches what it is for: each wrong rule or pass beside a right twin that it lets through."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from jisu.compiler import ops
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, constant, defop, placeholder, weight
from jisu.compiler.rewrite import Guard, Match, Rule, bind, guard, rank_is, rewrite, scalar, used_once, variables
from jisu.compiler.types import TensorType, same_dim, same_shape
from jisu.testing import PassFailure, ProgramFailure, RuleFailure, check_pass, check_program, check_rule, graph_of

x, y, w, b = variables("x y w b")
c, eps = scalar("c"), scalar("eps")
product, both = ops.linear(x, w), ops.matmul(x, y)
keeps_shape = guard("the shape to stay", lambda m: same_shape(m["x"].shape, m.root.shape))
keeps_dtype = guard("the dtype to stay", lambda m: m["x"].dtype == m.root.dtype)


def is_value(value: float) -> Guard:
    return guard(f"a constant of {value}", lambda m: m["c"] == value)


def times_one(*guards: Guard) -> Rule:
    return Rule("x * 1", ops.mul(x, c), x, guards, {"x": "float[*b k]"}, {"c": (1, 2)})


def bias(*guards: Guard) -> Rule:
    types = {"x": "float[*b k]", "w": "float[n k]", "b": "float[*b? n]"}
    return Rule("bias joins linear", ops.add(product, b), ops.linear(x, w, b), guards, types)


one_bias_per_output = guard("one bias per output", lambda m: same_dim(m["b"].shape[-1], m["w"].shape[0]))


def casts(inner: str, start: str) -> Rule:
    """A cast there and back that is dropped."""
    back = ops.cast(ops.cast(x, dtype=inner), dtype=bind("outer"))
    return Rule("there and back", back, x, (keeps_dtype,), {"x": f"{start}[n]"}, {"outer": (start,)})


def difference(replace: Node) -> Rule:
    wide = ops.sub(ops.cast(x, dtype="float32"), ops.cast(y, dtype="float32"))
    return Rule("difference", wide, replace, (), {"x": "bfloat16[n]", "y": "bfloat16[n]"})


def negated_sum(replace: Node) -> Rule:
    return Rule("-x + y", ops.add(ops.neg(x), y), replace, (), {"x": "float[*b k]", "y": "float[*b? k?]"})


def transposed_product(first: Node, second: Node) -> Rule:
    replace = ops.matmul(ops.transpose(first, perm=(1, 0)), ops.transpose(second, perm=(1, 0)))
    types = {"x": "float[3 3]", "y": "float[3 3]"}
    return Rule("transposed product", ops.transpose(both, perm=(1, 0)), replace, (used_once(both),), types)


def transposed_sum(axis: int) -> Rule:
    pattern = ops.sum_(ops.transpose(x, perm=(1, 0)), axes=(1,))
    return Rule("transposed sum", pattern, ops.sum_(x, axes=(axis,)), (), {"x": "float[3 3]"})


def merged_slices(extra: int) -> Rule:
    def merged(m: Match) -> Node:
        (a,), (d,), (e,) = m["a"], m["d"], m["e"]
        return ops.slice_(m["x"], starts=(a + d + extra,), stops=(a + e + extra,), steps=(1,))

    inner = ops.slice_(x, starts=bind("a"), stops=bind("b"), steps=(1,))
    samples = {"a": ((1,), (2,)), "b": ((6,),), "d": ((0,), (1,)), "e": ((2,), (3,))}
    outer = ops.slice_(inner, starts=bind("d"), stops=bind("e"), steps=(1,))
    return Rule("slice of slice", outer, merged, (), {"x": "float[8]"}, samples)


def wide_window(missing: int) -> Rule:
    """A window that spans all keys is none."""
    spans = guard("a window over all keys", lambda m: 0 < m["x"].shape[1] <= m["n"] + missing)
    pattern = ops.attention(x, y, y, scale=1.0, causal=True, window=bind("n"))
    types = {"x": "float[1 4 2 3]", "y": "float[1 4 2 3]"}
    return Rule(
        "wide window", pattern, ops.attention(x, y, y, scale=1.0, causal=True), (spans,), types, {"n": (2, 3, 4, 6)}
    )


def norm(replace: Callable[[Match], Node]) -> Rule:
    mean = ops.div(ops.sum_(ops.square(x), axes=(1,), keepdims=True), scalar("count"))
    pattern = ops.mul(x, ops.rsqrt(ops.add(mean, eps)))
    return Rule("norm", pattern, replace, (keeps_shape,), {"x": "float[2 4]"}, {"count": (4.0,), "eps": (1e-6, 1e-1)})


def eps_inside(m: Match) -> Node:
    return ops.rms_norm(m["x"], eps=m["eps"])


def eps_outside(m: Match) -> Node:
    mean = ops.div(ops.sum_(ops.square(m["x"]), axes=(1,), keepdims=True), 4.0)
    return ops.div(m["x"], ops.add(ops.sqrt(mean), m["eps"]))


def times_zero(dtype: str) -> Rule:
    def zeros(m: Match) -> Node:
        return ops.broadcast_to(constant(0, m.root.dtype), shape=m.root.shape)

    return Rule("x * 0", ops.mul(x, c), zeros, (is_value(0),), {"x": f"{dtype}[n]"}, {"c": (0,)})


def sum_of_bytes(dtype: str) -> Rule:
    replace = ops.cast(ops.sum_(ops.cast(x, dtype=dtype), axes=(0,)), dtype="int32")
    return Rule("sum of bytes", ops.sum_(ops.cast(x, dtype="int32"), axes=(0,)), replace, (), {"x": "int8[n]"})


def mean_of_squares(dtype: str) -> Rule:
    replace = ops.cast(ops.sum_(ops.mul(ops.square(ops.cast(x, dtype=dtype)), 0.25), axes=(0,)), dtype="float32")
    pattern = ops.mul(ops.sum_(ops.square(ops.cast(x, dtype="float32")), axes=(0,)), 0.25)
    return Rule(
        "mean of squares", pattern, replace, (guard("a scalar", lambda m: m.root.rank == 0),), {"x": "float16[4]"}
    )


def subtraction(replace: Node) -> Rule:
    return Rule("subtraction", ops.sub(x, y), replace, (), {"x": "float[n]", "y": "float[n]"})


def double_negation(replace: Any, *guards: Guard) -> Rule:
    return Rule("-(-x)", ops.neg(ops.neg(x)), replace, guards, {"x": "float[n]"})


# name, the faulty rule, its right twin, what the failure says
RULES: tuple[tuple[str, Rule, Rule, str], ...] = (
    ("wrong guard", times_one(keeps_shape), times_one(keeps_shape, is_value(1)), "changes the meaning"),
    (
        "missing guard",
        bias(used_once(product)),
        bias(used_once(product), rank_is(b, 1), one_bias_per_output),
        "ill-typed",
    ),
    (
        "lost used_once",
        bias(rank_is(b, 1), one_bias_per_output),
        bias(used_once(product), rank_is(b, 1), one_bias_per_output),
        "used_once",
    ),
    ("dropped truncation", casts("int32", "float32"), casts("float64", "float32"), "changes the meaning"),
    ("dropped rounding", casts("bfloat16", "float32"), casts("float32", "bfloat16"), "changes the meaning"),
    (
        "dropped cast",
        difference(ops.sub(x, y)),
        difference(ops.add(ops.cast(x, dtype="float32"), ops.neg(ops.cast(y, dtype="float32"))),
    ),
     "replaces"),
    ("swapped operands", negated_sum(ops.sub(x, y)), negated_sum(ops.sub(y, x)), "changes the meaning"),
    ("swapped product", transposed_product(x, y), transposed_product(y, x), "changes the meaning"),
    ("wrong axis", transposed_sum(1), transposed_sum(0), "changes the meaning"),
    ("off-by-one slice", merged_slices(1), merged_slices(0), "changes the meaning"),
    ("off-by-one window", wide_window(1), wide_window(0), "changes the meaning"),
    ("wrong eps placement", norm(eps_outside), norm(eps_inside), "changes the meaning"),
    ("dropped NaN", times_zero("float"), times_zero("int"), "where nan belongs"),
    ("int8 accumulation", sum_of_bytes("int8"), sum_of_bytes("int16"), "changes the meaning"),
    ("float16 overflow", mean_of_squares("float16"), mean_of_squares("float64"), "changes the meaning"),
    ("endless", subtraction(ops.neg(ops.sub(y, x))), subtraction(ops.add(x, ops.neg(y))), "undo each other"),
    ("never fires", double_negation(x, rank_is(x, 7)), double_negation(x), "needs rank 7"),
    (
        "crash on a symbol",
        double_negation(lambda m: ops.reshape(m["x"], shape=(int(m["x"].shape[0]),))),
        double_negation(x),
        "TypeError",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("fault", "wrong", "right", "says"), RULES, ids=[name for name, *_ in RULES])
def test_wrong_rule_is_caught_and_its_twin_is_not(fault: str, wrong: Rule, right: Rule, says: str) -> None:
    report = check_rule(right)
    assert report.fired >= report.draws * 0.1
    with pytest.raises(RuleFailure, match=says) as failure:
        check_rule(wrong)
    assert wrong.name in str(failure.value)
    assert fault == "never fires" or "%0 = " in str(failure.value), "the report shows the graph"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "row", [row for row in RULES if row[0] in ("lost used_once", "off-by-one window", "wrong guard")]
)
def test_other_seeds_catch_them_too(row: tuple[str, Rule, Rule, str], seed: int) -> None:
    with pytest.raises(RuleFailure, match=row[3]):
        check_rule(row[1], seed=seed)


# --- Passes --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Step:
    """A pass from a function."""

    name: str
    function: Callable[[Graph], Graph]
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        return self.function(graph)


def _squares(graph: Graph) -> Graph:
    return rewrite(graph, [Rule("x * x", ops.mul(x, x), ops.square(x))])


@defop(meaning=lambda a: np.maximum(a, np.zeros((), a.dtype), out=a), axes="*b -> *b")
def clamp_(a: TensorType) -> TensorType:
    """relu, written over its operand."""
    return a


@defop(meaning=lambda a: np.maximum(a, np.zeros((), a.dtype)), axes="*b -> *b")
def clamp(a: TensorType) -> TensorType:
    """relu."""
    return a


def _negate_weights(graph: Graph, arrays: dict[str, np.ndarray]) -> Graph:
    """Read every weight's negative instead, through a second negation."""
    if any(
        n.op is ops.neg and n.operands[0].op is WEIGHT for n in graph.nodes if n.operands and n.operands[0] is not None
    ):
        return graph
    made = {
        n.name: ops.neg(weight(n.name, n.tensor))
        for n in graph.nodes
        if n.op is WEIGHT and n.dtype in ("float32", "bfloat16")
    }
    new = graph.map(lambda old, rebuilt: made[old.name] if old.op is WEIGHT and old.name in made else rebuilt)
    return attrs.evolve(new, weights={k: ArrayStorage(arrays[k]) if k in made else v for k, v in graph.weights.items()})


def _negate_in_place(graph: Graph) -> Graph:
    arrays = {k: v.numpy() for k, v in graph.weights.items()}
    return _negate_weights(
        graph, {k: np.negative(a, out=a) if a.dtype.kind not in "biu" else a for k, a in arrays.items()}
    )


def _negate_copies(graph: Graph) -> Graph:
    arrays = {k: v.numpy() for k, v in graph.weights.items()}
    return _negate_weights(graph, {k: np.negative(a) if a.dtype.kind not in "biu" else a for k, a in arrays.items()})


def _rename(graph: Graph, keep_ties: bool) -> Graph:
    """Weights called after where they stand; with ties, after their first place."""
    names: dict[Any, str] = {}
    stored = {}

    def renamed(old: Node, new: Node) -> Node:
        if old.op is not WEIGHT or old.name.startswith("at"):
            return new
        name = names.setdefault(old.name if keep_ties else old, f"at{len(names)}")
        stored[name] = graph.weights[old.name]
        return weight(name, old.tensor)

    return graph.map(renamed).replace(weights=stored) if not any(k.startswith("at") for k in graph.weights) else graph


def _tied(graph: Graph) -> Graph:
    """The graph with a second node for its first weight."""
    first = next((n for n in graph.nodes if n.op is WEIGHT), None)
    again = [ops.reshape(weight(first.name, first.tensor), shape=(first.tensor.size,))] if first is not None else []
    return attrs.evolve(graph, outputs=(*graph.outputs, *again))


def _mutate_attributes(graph: Graph) -> Graph:
    for node in graph.nodes:
        if node.op is ops.rms_norm:
            node.attributes["eps"] = 0.25  # type: ignore[index]
    return graph


def _round_trip(dtype: str) -> Callable[[Graph], Graph]:
    def narrowed(graph: Graph) -> Graph:
        outputs = [
            o if o.dtype != "float32" or o.op is ops.cast else ops.cast(ops.cast(o, dtype=dtype), dtype="float32")
            for o in graph.outputs
        ]
        return attrs.evolve(graph, outputs=tuple(outputs))

    return narrowed


def _swap_outputs(graph: Graph) -> Graph:
    return attrs.evolve(graph, outputs=graph.outputs[::-1])


def _drop_ranges(graph: Graph) -> Graph:
    return attrs.evolve(_squares(graph), ranges={})


def _with(op: Any) -> Callable[[Graph], Graph]:
    return lambda graph: rewrite(graph, [Rule("clamp", ops.relu(x), op(x))])


_counter = itertools.count()


def _numbered(graph: Graph) -> Graph:
    return _rename(graph, keep_ties=True).map(
        lambda old, new: (
            new
            if old.op is not ops.rms_norm
            else new.op.make(new.operands, {**new.attributes, "eps": 1e-9 * next(_counter)})
        )
    )


def _grow_outputs(graph: Graph) -> Graph:
    return attrs.evolve(graph, outputs=tuple(ops.neg(ops.neg(o)) if o.dtype != "bool" else o for o in graph.outputs))


SQUARES = (Rule("x * x", ops.mul(x, x), ops.square(x), (), {"x": "float[*b k]"}),)
RELU = (Rule("clamp", ops.relu(x), clamp(x), (), {"x": "float[*b k]"}),)
NORMS = (Rule("norm", ops.rms_norm(x, w, eps=bind("eps")), x, (), {"x": "float[*b k]", "w": "weight float[k]"}),)
PASSES: tuple[tuple[str, Any, Any, Any, str], ...] = (
    ("in-place op on an input", _with(clamp_), _with(clamp), RELU, "writes into the input arrays"),
    ("in-place change of weights", _negate_in_place, _negate_copies, NORMS, "wrote into the weights"),
    ("lost tie", lambda g: _rename(g, False), lambda g: _rename(g, True), NORMS, "loses a tie|weights larger"),
    ("changed argument", _mutate_attributes, lambda g: g, NORMS, "changed the graph that it was given"),
    ("lossy but exact by its word", _round_trip("bfloat16"), _round_trip("float64"), SQUARES, "claims to be exact"),
    ("order of outputs", _swap_outputs, lambda g: g, SQUARES, "claims to be exact|types of the outputs|second time"),
    ("lost ranges", _drop_ranges, _squares, SQUARES, "ranges of symbols"),
    ("not a function", _numbered, lambda g: _rename(g, True), NORMS, "another result"),
    ("not idempotent", _grow_outputs, _squares, SQUARES, "second time"),
)


@pytest.mark.parametrize(
    ("wrong", "right", "plant", "says"), [row[1:] for row in PASSES], ids=[row[0] for row in PASSES]
)
def test_wrong_pass_is_caught_and_its_twin_is_not(wrong: Any, right: Any, plant: Any, says: str) -> None:
    from hypothesis import strategies as st

    from jisu.testing import graphs

    drawn = st.booleans().flatmap(lambda symbolic: graphs(plant, symbolic=symbolic)).map(_tied)
    check_pass(Step("twin", right), plant=plant, graphs=drawn, share=0.0)
    with pytest.raises(PassFailure, match=says) as failure:
        check_pass(Step("fault", wrong), plant=plant, graphs=drawn, share=0.0)
    assert "fault" in str(failure.value)


def test_lossy_pass_reports_its_error() -> None:
    report = check_pass(Step("half", _round_trip("bfloat16"), exact=False), plant=SQUARES, max_error=0.01)
    assert 1e-4 < report.error < 0.01
    with pytest.raises(PassFailure, match="allowed"):
        check_pass(Step("half", _round_trip("bfloat16"), exact=False), plant=SQUARES, max_error=1e-5)


def test_pass_that_never_does_anything_is_caught() -> None:
    with pytest.raises(PassFailure, match="changed 0 of"):
        check_pass(Step("idle", lambda g: g), plant=SQUARES)


# --- Programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda a: a * 2 + 1e-3, "off by"),
        (lambda a: np.multiply(a, 2, out=a), "wrote into its inputs"),
        (lambda a: (a * 2).astype(np.float64), "float64"),
        (lambda a: [a * 2, a], "2 outputs"),
        (lambda a: np.nan_to_num(a * 2), "belongs"),
    ],
)
def test_wrong_program_is_caught(program: Callable[[np.ndarray], Any], says: str) -> None:
    graph = graph_of(ops.mul(placeholder("a", TensorType((2, 3), "float32")), 2.0))
    check_program(lambda a: a * 2, graph)
    values = "special" if says == "belongs" else "normal"
    with pytest.raises(ProgramFailure, match=says):
        check_program(program, graph, values=values, examples=30)
