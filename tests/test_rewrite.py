"""Matching, rewriting to a fixed point, refusals, and the pipeline that runs passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest

from jisu.compiler import ops
from jisu.compiler.errors import JisuError, VerifyError
from jisu.compiler.graph import Graph, Node, constant, placeholder, weight
from jisu.compiler.pipeline import NumericMismatch, Pipeline, Report, sample_inputs
from jisu.compiler.rewrite import (
    Match,
    RewriteError,
    Rule,
    Trace,
    bind,
    dtype_in,
    either,
    guard,
    is_constant,
    match,
    maybe,
    rank_is,
    rewrite,
    scalar,
    used_once,
    variable,
    variables,
)
from jisu.compiler.types import TensorType
from jisu.testing import graph_of

x, y, z, w, b = variables("x y z w b")
M, N, V = TensorType((2, 3), "float32"), TensorType((4, 3), "float32"), TensorType((4,), "float32")
p, q, u = placeholder("p", M), placeholder("q", M), placeholder("u", V)
weights = weight("w", N)


def matches(pattern: Node, node: Node) -> list[Match]:
    return list(match(pattern, node))


# --- Matching ------------------------------------------------------------------------------------------------------


def test_variable_binds_and_must_be_the_same_value() -> None:
    assert matches(ops.mul(x, x), ops.mul(p, p)) and not matches(ops.mul(x, x), ops.mul(p, q))
    # Two nodes of one constant or one weight are one value.
    assert matches(ops.mul(x, x), ops.mul(constant(2.0, "float32"), constant(2.0, "float32")))
    assert matches(ops.sub(x, x), ops.sub(weight("w", N), weight("w", N)))
    assert not matches(ops.sub(x, x), ops.sub(weight("w", N), weight("v", N)))


def test_commutative_operands_match_either_way_with_backtracking() -> None:
    pattern = ops.add(ops.neg(x), ops.relu(x))
    assert matches(pattern, ops.add(ops.relu(p), ops.neg(p)))
    assert not matches(pattern, ops.add(ops.relu(p), ops.neg(q)))
    # Both operands are negations: only one of the two orders lets the outer x agree.
    nested = ops.add(ops.mul(x, y), ops.neg(x))
    (found,) = matches(nested, ops.add(ops.neg(q), ops.mul(p, q)))
    assert found["x"] is q and found["y"] is p
    assert not matches(ops.sub(x, ops.neg(y)), ops.sub(ops.neg(p), q))
    assert len(matches(ops.add(x, y), ops.add(p, q))) == 2 and len(matches(ops.add(x, y), ops.add(p, p))) == 1


def test_deep_backtracking_across_commutative_ops() -> None:
    pattern = ops.add(ops.add(x, y), ops.mul(y, z))
    (found,) = matches(pattern, ops.add(ops.mul(p, q), ops.add(q, ops.relu(p))))
    assert found["y"] is q and found["z"] is p and found["x"].op is ops.relu


def test_optional_operand() -> None:
    bare, full = ops.linear(p, weights), ops.linear(p, weights, u)
    assert not matches(ops.linear(x, w), full) and not matches(ops.linear(x, w, b), bare)
    pattern = ops.linear(x, w, variable("b", optional=True))
    assert matches(pattern, bare)[0]["b"] is None and matches(pattern, full)[0]["b"] is u
    rule = Rule("r", ops.relu(pattern), ops.linear(x, w, variable("b", optional=True), activation="relu"))
    for node in (bare, full):
        (made,) = rewrite(graph_of(ops.relu(node)), [rule]).outputs
        assert made.op is ops.linear and made.activation == "relu" and made.operands[2] is node.operands[2]


def test_either_and_maybe() -> None:
    pattern = either(ops.relu(x), ops.neg(x))
    assert matches(pattern, ops.relu(p)) and matches(pattern, ops.neg(p)) and not matches(pattern, ops.exp(p))
    upcast = maybe(ops.cast, x, dtype="float32")
    assert matches(ops.square(upcast), ops.square(p))[0]["x"] is p
    half = placeholder("h", M.with_dtype("bfloat16"))
    found = matches(ops.square(upcast), ops.square(ops.cast(half, dtype="float32")))
    assert [m["x"] for m in found][0] is half
    first, second = ops.relu(x), ops.neg(x)
    (taken,) = matches(either(first, second), ops.neg(p))
    assert taken.get(first) is None and taken.at(second) is taken.root


def test_attributes() -> None:
    node = ops.sum_(p, axes=(1,), keepdims=True)
    assert matches(ops.sum_(x, axes=(1,), keepdims=True), node) and not matches(ops.sum_(x, axes=(1,)), node)
    assert matches(ops.sum_(x, axes=bind("axes"), keepdims=bind("keep")), node)[0].bindings | {"x": 0} == {  # type: ignore[operator]
        "x": 0,
        "axes": (1,),
        "keep": True,
    }
    same = ops.reshape(ops.reshape(x, shape=bind("s")), shape=bind("s"))
    assert matches(same, ops.reshape(ops.reshape(p, shape=(6,)), shape=(6,))) and not matches(
        same, ops.reshape(ops.reshape(p, shape=(6,)), shape=(3, 2))
    )
    # True is not 1.
    assert not matches(ops.attention(x, y, z, scale=1.0, causal=True, window=bind("n")), ops.relu(p))


def test_scalars_and_literals() -> None:
    node = ops.mul(p, 0.1)
    assert matches(ops.mul(x, scalar("c")), node)[0]["c"] == pytest.approx(0.1)
    assert matches(ops.mul(x, 0.1), node) and not matches(ops.mul(x, 0.2), node)
    assert not matches(ops.mul(x, scalar("c")), ops.mul(p, constant([1.0, 2.0, 3.0], "float32")))
    half = placeholder("h", M.with_dtype("bfloat16"))
    assert matches(ops.mul(x, 0.1), ops.mul(half, 0.1)), "a literal is rounded to the constant's dtype"
    both = ops.add(ops.mul(x, scalar("c")), scalar("c"))
    assert matches(both, ops.add(ops.mul(p, 2.0), 2.0)) and not matches(both, ops.add(ops.mul(p, 2.0), 3.0))


# --- Rewriting -----------------------------------------------------------------------------------------------------

DOUBLE_NEGATION = Rule("-(-x)", ops.neg(ops.neg(x)), x)


def test_runs_to_a_fixed_point_and_returns_the_graph_itself_where_nothing_fires() -> None:
    node = p
    for _ in range(9):
        node = ops.neg(node)
    trace = Trace()
    new = rewrite(graph_of(node), [DOUBLE_NEGATION], trace=trace)
    assert new.count(ops.neg) == 1 and trace.fired == {"-(-x)": 4}
    assert rewrite(new, [DOUBLE_NEGATION]) is new


def test_earlier_rules_come_first() -> None:
    rules = [Rule("a", ops.relu(x), ops.neg(x)), Rule("b", ops.relu(x), ops.exp(x))]
    assert rewrite(graph_of(ops.relu(p)), rules).outputs[0].op is ops.neg
    assert rewrite(graph_of(ops.relu(p)), rules[::-1]).outputs[0].op is ops.exp


def test_shared_results_stay_shared() -> None:
    shared = ops.neg(ops.neg(ops.relu(p)))
    new = rewrite(graph_of(ops.exp(shared), ops.sin(shared)), [DOUBLE_NEGATION])
    assert new.count(ops.relu) == 1 and new.outputs[0].operands[0] is new.outputs[1].operands[0]


def test_ping_pong_is_an_error_that_names_both() -> None:
    there, back = (
        Rule("there", ops.sub(x, y), ops.add(x, ops.neg(y))),
        Rule("back", ops.add(x, ops.neg(y)), ops.sub(x, y)),
    )
    with pytest.raises(RewriteError, match="undo each other"):
        rewrite(graph_of(ops.sub(p, q)), [there, back])
    grow = Rule("grow", ops.relu(x), ops.relu(ops.relu(x)))
    with pytest.raises(RewriteError, match="undo each other"):
        rewrite(graph_of(ops.relu(p)), [grow])


def test_a_replacement_of_another_type_is_an_error() -> None:
    with pytest.raises(RewriteError, match=r"rule 'sum' replaces float32\[2\] by float32\[3\]"):
        rewrite(graph_of(ops.sum_(p, axes=(1,))), [Rule("sum", ops.sum_(x, axes=(1,)), ops.sum_(x, axes=(0,)))])
    with pytest.raises(RewriteError, match="rule 'bad' builds an ill-typed replacement"):
        rewrite(graph_of(ops.relu(p)), [Rule("bad", ops.relu(x), ops.matmul(x, x))])
    with pytest.raises(RewriteError, match="matches anything"):
        rewrite(graph_of(ops.relu(p)), [Rule("any", x, x)])


def test_guards_refuse_with_a_sentence() -> None:
    product = ops.linear(x, w)
    rule = Rule("bias", ops.add(product, b), ops.linear(x, w, b), (used_once(product), rank_is(b, 1)))
    dense = ops.linear(p, weights)
    trace = Trace()
    graph = graph_of(ops.add(dense, u), dense)
    assert rewrite(graph, [rule], trace=trace) is graph
    reasons = trace.refused["bias"]
    assert "linear has 2 uses, fusing it would compute it again" in reasons
    assert rewrite(graph_of(ops.add(dense, u)), [rule]).outputs[0].op is ops.linear
    trace = Trace()
    rewrite(graph_of(ops.add(dense, placeholder("r", TensorType((2, 4), "float32")))), [rule], trace=trace)
    assert "needs rank 1" in trace.refused["bias"] and not trace.fired


@pytest.mark.parametrize(
    ("refusing", "says"),
    [
        (dtype_in(x, "bfloat16", "float16"), "needs dtype bfloat16 or float16"),
        (is_constant(x), "needs a weight or constant"),
        (guard("three axes", lambda m: m["x"].rank == 3), "needs three axes"),
    ],
)
def test_guard_sentences(refusing: object, says: str) -> None:
    trace = Trace()
    rewrite(graph_of(ops.relu(p)), [Rule("r", ops.relu(x), x, (refusing,))], trace=trace)  # type: ignore[arg-type]
    assert trace.refused == {"r": {says: 1}}


def test_replacement_function_may_decline() -> None:
    graph = graph_of(ops.relu(p))
    assert rewrite(graph, [Rule("r", ops.relu(x), lambda m: None)]) is graph


def test_uses_count_outputs() -> None:
    inner = ops.neg(x)
    rule = Rule("r", ops.relu(inner), ops.exp(x), (used_once(inner),))
    negated = ops.neg(p)
    assert rewrite(graph_of(ops.relu(negated), negated), [rule]).count(ops.exp) == 0
    assert rewrite(graph_of(ops.relu(negated)), [rule]).count(ops.exp) == 1


def test_golden_before_and_after(golden: Callable[[str, object], None]) -> None:
    product = ops.linear(x, w)
    rules = [
        Rule("bias", ops.add(product, b), ops.linear(x, w, b), (used_once(product), rank_is(b, 1))),
        Rule("relu", ops.relu(ops.linear(x, w, b)), ops.linear(x, w, b, activation="relu")),
    ]
    graph = graph_of(ops.relu(ops.add(u, ops.linear(p, weights))), ops.neg(ops.neg(p)))
    golden("rewrite_before", graph)
    golden("rewrite_after", rewrite(graph, [*rules, DOUBLE_NEGATION]))


# --- Pipeline ------------------------------------------------------------------------------------------------------


@attrs.frozen
class Step:
    """A pass from a function."""

    name: str
    function: Callable[[Graph], Graph]
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        return self.function(graph)


def to(op: object) -> Callable[[Graph], Graph]:
    return lambda graph: rewrite(graph, [Rule("r", ops.relu(x), op(x))])  # type: ignore[operator]


def broken(graph: Graph) -> Graph:
    (output,) = graph.outputs
    fields = {a.name: getattr(output, a.name) for a in attrs.fields(Node)}
    return attrs.evolve(graph, outputs=(Node(**{**fields, "type": TensorType((7,), "float32")}),))


IDLE = Step("idle", lambda g: g)
SIMPLIFY = Step("simplify", lambda g: rewrite(g, [DOUBLE_NEGATION]))
GRAPH = graph_of(ops.neg(ops.neg(ops.relu(p))))
SAMPLES = [np.array([[1, -2, 3], [-1, 2, 0.5]], np.float32)]


def test_runs_reports_and_stops(tmp_path: Path) -> None:
    seen: list[str] = []
    passes = (IDLE, SIMPLIFY, Step("last", to(ops.silu), exact=False))
    new, reports = Pipeline(passes, dump=tmp_path / "ir", on_pass=lambda r, g: seen.append(r.name)).run(GRAPH)
    assert [r.name for r in reports] == seen == ["idle", "simplify", "last"] and all(
        isinstance(r, Report) for r in reports
    )
    assert [r.nodes for r in reports] == [4, 2, 2] and [r.exact for r in reports] == [True, True, False]
    assert sorted(f.name for f in (tmp_path / "ir").iterdir()) == [
        "00-input.txt",
        "01-idle.txt",
        "02-simplify.txt",
        "03-last.txt",
    ]
    assert (tmp_path / "ir" / "03-last.txt").read_text() == f"{new}\n"
    stopped, some = Pipeline(passes, stop_after="simplify").run(GRAPH)
    assert len(some) == 2 and stopped.count(ops.relu) == 1
    assert len(Pipeline(passes, limit=1).run(GRAPH)[1]) == 1
    with pytest.raises(JisuError, match="no pass 'nowhere' to stop after; known: idle, simplify, last"):
        Pipeline(passes, stop_after="nowhere")


def test_numeric_check_catches_a_wrong_exact_pass() -> None:
    wrong = Step("wrong", to(ops.silu))
    with pytest.raises(NumericMismatch, match=r"pass 'wrong' claims to be exact, but output 0 \(float32\) is off by"):
        Pipeline((SIMPLIFY, wrong), check="numeric").run(GRAPH, SAMPLES)
    _, reports = Pipeline((SIMPLIFY, Step("lossy", to(ops.silu), exact=False), IDLE), check="numeric").run(
        GRAPH, SAMPLES
    )
    assert reports[0].error == 0 and reports[1].error is not None and reports[1].error > 0.05
    assert reports[2].error == 0, "what comes after a lossy pass is measured against its result"
    with pytest.raises(JisuError, match="needs sample inputs"):
        Pipeline((), check="numeric").run(GRAPH)


def test_verifies_after_every_pass() -> None:
    with pytest.raises(VerifyError, match="after pass 'broken' breaks"):
        Pipeline((IDLE, Step("broken", broken))).run(GRAPH)
    new, _ = Pipeline((Step("broken", broken),), check="none").run(GRAPH)
    assert new.outputs[0].shape == (7,)


@pytest.mark.parametrize("at", range(5))
def test_bisect_finds_the_pass_that_breaks(at: int) -> None:
    passes: list[Step] = [Step(f"idle{i}", lambda g: g) for i in range(4)]
    passes.insert(at, Step("culprit", to(ops.exp)))
    found = Pipeline(tuple(passes)).bisect(GRAPH, SAMPLES)
    assert found is not None and found.name == "culprit"


def test_bisect_finds_crashes_and_nothing() -> None:
    assert Pipeline((IDLE, SIMPLIFY)).bisect(GRAPH, SAMPLES) is None
    found = Pipeline((IDLE, Step("broken", broken), SIMPLIFY)).bisect(GRAPH, SAMPLES)
    assert found is not None and found.name == "broken"


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JISU_DUMP", str(tmp_path))
    monkeypatch.setenv("JISU_BISECT", "1")
    _, reports = Pipeline((IDLE, SIMPLIFY)).run(GRAPH)
    assert len(reports) == 1 and (tmp_path / "01-idle.txt").exists() and not (tmp_path / "02-simplify.txt").exists()
    monkeypatch.delenv("JISU_BISECT")
    monkeypatch.setenv("JISU_VERIFY", "0")
    assert Pipeline((Step("broken", broken),)).run(GRAPH)[0].outputs[0].shape == (7,)


def test_sample_inputs_fit() -> None:
    from jisu.compiler.interpret import interpret
    from jisu.compiler.types import symbol

    s = placeholder("s", TensorType((symbol("n"), 2), "bfloat16"))
    graph = Graph((s,), (ops.relu(s),), {}, {"n": (3, 4)})
    (array,) = sample_inputs(graph)
    assert array.shape[0] in (3, 4) and len(interpret(graph, [array])) == 1
