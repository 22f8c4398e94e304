"""The graph as a value: text form, verifier, interpreter, symbols, drawing, equality."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jisu.compiler import ops
from jisu.compiler.drawing import layers
from jisu.compiler.errors import IndexOutOfRangeError, InputError, VerifyError
from jisu.compiler.graph import ArrayStorage, Constant, Graph, Node, constant, placeholder, weight
from jisu.compiler.interpret import bind_symbols, interpret
from jisu.compiler.text import parse, parse_type, to_text
from jisu.compiler.types import TensorType, TypeRuleError, broadcast, fixed, same_dim, substitute, symbol
from jisu.compiler.verify import complaints, verify
from jisu.testing import Sample, arrays_for, graph_of, graphs, tensors

f32 = "float32"
s0 = symbol("s0")


def x_of(*shape: object, dtype: str = f32, name: str = "x") -> Node:
    return placeholder(name, TensorType(shape, dtype))  # type: ignore[arg-type]


# --- Text ----------------------------------------------------------------------------------------------------------


@given(st.booleans().flatmap(lambda symbolic: graphs(symbolic=symbolic, dtypes=("float32", "bfloat16", "float16"))))
def test_text_round_trip_of_drawn_graphs(graph: Graph) -> None:
    text = str(graph)
    again = parse(text, graph.weights)
    assert str(again) == text and again == graph and hash(again) == hash(graph)
    verify(again)


@given(st.data())
def test_parsed_graph_means_the_same(data: st.DataObject) -> None:
    graph = data.draw(graphs(symbolic=True))
    sample = data.draw(arrays_for(graph))
    graph = sample.fill(graph)
    for a, b in zip(
        interpret(graph, sample.inputs), interpret(parse(str(graph), graph.weights), sample.inputs), strict=True
    ):
        np.testing.assert_array_equal(a, b)


VALUES = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.integers(-5, 5).map(float),
    st.sampled_from([-0.0, 1e-45]),
)


@given(st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "bool"]), st.data())
def test_constants_round_trip_bit_by_bit(dtype: str, data: st.DataObject) -> None:
    elements = VALUES if dtype.startswith(("float", "bfloat")) else st.integers(0, 1)
    shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]))
    flat = data.draw(st.lists(elements, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    node = constant(np.array(flat).reshape(shape), dtype)
    (again,) = parse(str(Graph((), (node,)))).outputs
    assert again.type == node.type
    got, want = again.value.array, node.value.array
    finite = got == got
    assert got[finite].tobytes() == want[want == want].tobytes() and np.array_equal(finite, want == want)


@pytest.mark.parametrize(
    "name", ['quote " and \\ slash', "line\nbreak", "percent %3 and # hash", "a.b.c/d", "ünïcode 极", "): float32[2]"]
)
def test_names_round_trip(name: str) -> None:
    graph = Graph((x_of(2, name=name),), (ops.neg(x_of(2, name=name)),))
    graph = Graph((node := x_of(2, name=name),), (ops.neg(node), weight(name, TensorType((2,), f32))))
    again = parse(str(graph), {name: ArrayStorage(np.zeros(2, f32))})
    assert again.inputs[0].name == name and again == graph


@pytest.mark.parametrize("dim", [s0, 2 * s0, s0 + 3, s0 * symbol("s1"), (s0 + 1) ** 2])
def test_symbolic_types_round_trip(dim: object) -> None:
    type = TensorType((dim, 4), f32)  # type: ignore[arg-type]
    assert parse_type(str(type)) == type


def test_a_dimension_that_has_to_be_fixed() -> None:
    n, m = symbol("n"), symbol("m")
    assert fixed(3) == 3 and fixed(n - n + 4) == 4 and type(fixed(n / n)) is int
    with pytest.raises(TypeRuleError, match=r"fixed number here, and .* varies with m, n"):
        fixed(2 * n + m)
    assert fixed(substitute(2 * n + m, {"n": 3, "m": 1})) == 7


def test_attributes_round_trip() -> None:
    x = x_of(s0, 6)
    nodes = [
        ops.rms_norm(x, eps=float("inf")),
        ops.reshape(x, shape=(2, 3 * s0)),
        ops.sum_(x, axes=(0,), keepdims=True),
        ops.iota(extent=2 * s0),
    ]
    graph = Graph((x,), tuple(nodes), {}, {"s0": (1, None)})
    assert parse(str(graph)) == graph
    assert "s0 in 1..inf" in str(graph)


def test_sources_stand_in_the_text_on_demand() -> None:
    x = x_of(2)
    node = ops.neg.make((x,), {}, source="model.py:7")
    text = to_text(Graph((x,), (node,)), sources=True)
    assert text.endswith("# model.py:7\nreturn %1") and parse(text).outputs[0].source == "model.py:7"
    assert "model.py" not in str(Graph((x,), (node,)))


GOOD = """graph [s0 in 1..8]
%0 = input(name="x"): float32[s0, 4]
%1 = relu(%0): float32[s0, 4]
%2 = add(%0, %1): float32[s0, 4]
return %2"""

MALFORMED = {
    "cycle": (GOOD.replace("relu(%0)", "relu(%2)"), r"%2 is used before it is defined"),
    "self": (GOOD.replace("relu(%0)", "relu(%1)"), r"%1 is used before it is defined"),
    "unsorted": ("\n".join(np.array(GOOD.splitlines())[[0, 1, 3, 2, 4]]), r"%1 is used before it is defined"),
    "dangling operand": (GOOD.replace("relu(%0)", "relu(%7)"), r"%7 is used before it is defined"),
    "dangling output": (GOOD.replace("return %2", "return %9"), r"returns %9, which is not defined"),
    "duplicate number": (GOOD.replace("%2 = add", "%1 = add"), r"%1 is defined twice"),
    "unknown op": (GOOD.replace("relu", "rely"), r"%1: there is no op 'rely'"),
    "wrong type": (
        GOOD.replace("relu(%0): float32[s0, 4]", "relu(%0): float32[s0, 5]"),
        r"%1 = relu: the text says float32\[s0, 5\]",
    ),
    "wrong arity": (GOOD.replace("relu(%0)", "relu(%0, %0)"), r"%1 = relu: relu takes 1 operands, got 2"),
    "unknown attribute": (GOOD.replace("relu(%0)", "relu(%0, slope=1)"), r"%1 = relu: relu has no attribute slope"),
    "unknown dtype": (GOOD.replace("relu(%0): float32", "relu(%0): float12"), r"float12|float32"),
    "unknown dtype of an input": (GOOD.replace('name="x"): float32', 'name="x"): float12'), r"unknown dtype 'float12'"),
    "no header": (GOOD.partition("\n")[2], r"starts with the line 'graph'"),
    "no return": (GOOD.rpartition("\n")[0], r"ends with a line 'return"),
    "garbage": (GOOD.replace("%1 = relu", "%1 == relu"), r"can't read the line"),
    "syntax": (GOOD.replace("relu(%0)", "relu(%0,, 1)"), r"%1 = relu"),
    "python": (GOOD.replace("relu(%0)", "relu(__import__('os'))"), r"can't read"),
    "a number as operand": (GOOD.replace("relu(%0)", "relu('text')"), r"%1 = relu"),
    "constant without value": ("graph\n%0 = constant(): float32[]\nreturn %0", r"%0 = constant"),
    "constant of another size": ("graph\n%0 = constant(value=[1.0, 2.0]): float32[3]\nreturn %0", r"%0 = constant"),
    "input without name": ("graph\n%0 = input(): float32[]\nreturn %0", r"%0 = input"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text_is_a_verify_error_that_says_where(case: str) -> None:
    text, says = MALFORMED[case]
    with pytest.raises(VerifyError, match=says):
        parse(text)
    parse(GOOD)


def test_duplicate_input_name_is_found() -> None:
    lines = ("graph", '%0 = input(name="x"): float32[2]', '%1 = input(name="x"): float32[2]', "return %0, %1")
    text = "\n".join(lines)
    with pytest.raises(VerifyError, match=r"%1 = input: a second input is called 'x'"):
        verify(parse(text))


# --- Verifier ------------------------------------------------------------------------------------------------------


def forged(node: Node, **changes: object) -> Node:
    return Node(**{**{a.name: getattr(node, a.name) for a in attrs.fields(Node)}, **changes})  # type: ignore[arg-type]


def test_forged_type_is_found() -> None:
    x = x_of(2, 3)
    wrong = forged(ops.relu(x), type=TensorType((3, 2), f32))
    with pytest.raises(
        VerifyError,
        match=r"after pass 'p' breaks 1 rule\(s\):\n%1 = relu: has type float32\[3, 2\], its rule says float32\[2, 3\]",
    ):
        verify(Graph((x,), (wrong,)), "pass 'p'")


def test_forged_operands_are_found() -> None:
    x = x_of(2, 3)
    wrong = forged(ops.add(x, x), operands=(x, x_of(5, name="y")))
    found = list(complaints(Graph((x,), (wrong,))))
    assert any("'y' is not among the graph's inputs" in c for c in found)
    assert any(c.startswith("%2 = add") and "broadcast" in c for c in found)


def test_forged_cycle_is_found_without_hanging() -> None:
    x = x_of(2)
    a = ops.relu(x)
    b = ops.neg(a)
    object.__setattr__(a, "operands", (b,))
    with pytest.raises(VerifyError, match="cycle"):
        verify(Graph((x,), (b,)))


def test_missing_storage_and_wrong_storage_are_found() -> None:
    w = weight("w", TensorType((2,), f32))
    with pytest.raises(VerifyError, match="weight 'w' has no storage"):
        verify(Graph((), (w,)))
    with pytest.raises(VerifyError, match=r"float32\[2\] in the graph but float64\[3\] in storage"):
        verify(Graph((), (w,), {"w": ArrayStorage(np.zeros(3))}))


def test_pattern_and_tuple_and_empty_range_are_found() -> None:
    x = x_of(s0)
    several = ops.sort(x, axis=0)
    with pytest.raises(VerifyError, match="has several results"):
        verify(Graph((x,), (several,)))
    with pytest.raises(VerifyError, match=r"range 5\.\.3 is empty"):
        verify(Graph((x,), (x,), {}, {"s0": (5, 3)}))
    with pytest.raises(VerifyError, match="pattern got into the graph"):
        verify(Graph((x,), (forged(ops.relu(x), type=None),)))


# --- Interpreter and symbols ---------------------------------------------------------------------------------------


def test_symbols_are_solved_and_checked() -> None:
    graph = Graph((x := x_of(2 * s0, s0), y := x_of(s0 + 1, name="y")), (ops.relu(x), y), {}, {"s0": (2, 4)})
    assert bind_symbols(graph, [(6, 3), (4,)]) == {"s0": 3}
    with pytest.raises(InputError, match=r"'s0' must be in \[2, 4\], got 5"):
        bind_symbols(graph, [(10, 5), (6,)])
    with pytest.raises(InputError, match="input 'y'"):
        bind_symbols(graph, [(6, 3), (5,)])
    with pytest.raises(InputError, match="expected 2 inputs, got 1"):
        bind_symbols(graph, [(6, 3)])
    with pytest.raises(InputError, match="expected rank 2"):
        bind_symbols(graph, [(6,), (4,)])
    with pytest.raises(InputError, match="expected float32, got float64"):
        interpret(graph, [np.zeros((6, 3)), np.zeros(4, f32)])


def test_a_symbol_that_only_stands_in_an_expression_is_solved() -> None:
    graph = Graph((x := x_of(2 * s0 + 1),), (ops.relu(x),), {}, {"s0": (1, 8)})
    assert bind_symbols(graph, [(7,)]) == {"s0": 3}
    with pytest.raises(InputError, match="got a dimension of 6"):
        bind_symbols(graph, [(6,)])
    with pytest.raises(InputError, match="doesn't settle"):
        bind_symbols(Graph((y := x_of(s0 * symbol("s1")),), (y,)), [(6,)])


def test_float64_yardstick_and_keep() -> None:
    x = x_of(3, dtype="bfloat16")
    third = ops.mul(x, 1 / 3)
    graph = Graph((x,), (ops.cast(third, dtype="float32"),))
    arrays = [np.ones(3).astype(constant(0, "bfloat16").value.array.dtype)]
    values = interpret(graph, arrays, keep=True)
    assert isinstance(values, dict) and set(values) == set(graph.nodes)
    (wide,) = interpret(graph, arrays, float64=True)  # type: ignore[misc]
    assert wide.dtype == np.float64  # type: ignore[union-attr]


def test_index_outside_its_table_names_it() -> None:
    table, index = x_of(4, 2), x_of(3, dtype="int64", name="i")
    graph = Graph((table, index), (ops.take(table, index, axis=0),))
    with pytest.raises(IndexOutOfRangeError, match="index 9 is out of range for an axis of size 4"):
        interpret(graph, [np.zeros((4, 2), f32), np.array([0, 9, 1])])


@given(st.data())
def test_drawn_indices_stay_inside(data: st.DataObject) -> None:
    table, index = x_of(s0, 2), x_of(2, 3, dtype="int64", name="i")
    moved = ops.transpose(ops.reshape(index, shape=(3, 2)), perm=(1, 0))
    graph = Graph((table, index), (ops.take(table, ops.cast(moved, dtype="int32"), axis=0),), {}, {"s0": (1, 3)})
    sample = data.draw(arrays_for(graph))
    assert 1 <= sample.sizes["s0"] <= 3
    interpret(graph, sample.inputs)


@given(tensors("int64[2, 3] < 4"), tensors("bfloat16[2]"), tensors("bool[3]"))
def test_tensors_have_their_type(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    assert a.shape == (2, 3) and a.dtype == np.int64 and a.min() >= 0 and a.max() < 4
    assert b.dtype.name == "bfloat16" and c.dtype == bool


def test_symbolic_arithmetic() -> None:
    assert same_dim(s0 * 2, s0 + s0) and not same_dim(s0, 2)
    assert broadcast((s0, 1), (1, 3)) == (s0, 3)
    with pytest.raises(TypeRuleError, match="don't broadcast"):
        broadcast((2,), (3,))


# --- Graphs as values ----------------------------------------------------------------------------------------------


def test_graphs_and_nodes_are_immutable() -> None:
    x = x_of(2)
    graph = Graph((x,), (ops.relu(x),))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        graph.outputs = ()  # type: ignore[misc]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        x.type = TensorType((), f32)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        constant([1.0, 2.0], f32).value.array[0] = 5
    source = np.ones(2, f32)
    held = Constant(source)
    source[0] = 7
    assert held.array[0] == 1


def test_equality_is_by_content() -> None:
    def build(op: object) -> Graph:
        x = x_of(2)
        return Graph((x,), (op(x),))  # type: ignore[operator]

    assert build(ops.relu) == build(ops.relu) and hash(build(ops.relu)) == hash(build(ops.relu))
    assert build(ops.relu) != build(ops.neg)
    assert Constant(np.float32(np.nan)) == Constant(np.float32(np.nan)) and Constant(np.float32(0.0)) != Constant(
        np.float32(-0.0)
    )


def test_replace_drops_weights_that_nothing_uses() -> None:
    x, w = x_of(2), weight("w", TensorType((2,), f32))
    graph = Graph((x,), (ops.add(x, w),), {"w": ArrayStorage(np.ones(2, f32))})
    assert not graph.replace(outputs=(ops.relu(x),)).weights


def test_deep_graphs_do_not_recurse() -> None:
    x = x_of(2)
    node = x
    for _ in range(5000):
        node = ops.neg(node)
    graph = verify(Graph((x,), (node,)))
    assert len(graph.nodes) == 5001 and graph.count(ops.neg) == 5000
    assert parse(str(graph)) == graph
    (value,) = interpret(graph, [np.ones(2, f32)])  # type: ignore[misc]
    assert value[0] == 1  # type: ignore[index]
    assert len(graph.map(lambda old, new: new).nodes) == 5001
    assert graph.digraph.number_of_edges() == 5000
    assert max(layers(graph).values()) == 5000


def test_draws_dot_and_svg(tmp_path: object) -> None:
    import xml.etree.ElementTree as ElementTree
    from pathlib import Path

    folder = Path(str(tmp_path))
    x, w = x_of(2, 3), weight('w<">&', TensorType((4, 3), f32))
    graph = graph_of(ops.silu(ops.linear(x, w)), ops.mul(x, x))
    dot, svg = graph.draw(str(folder / "g.dot")), graph.draw(str(folder / "g.svg"))
    assert (folder / "g.dot").read_text() == dot == graph.draw() and (folder / "g.svg").read_text() == svg
    assert dot.startswith("digraph {") and dot.count("->") == 5 + 2 and 'w<\\">&' in dot
    root = ElementTree.fromstring(svg)
    assert sum(e.tag.endswith("rect") for e in root.iter()) == len(graph.nodes)
    depth = {node.op.name: layer for node, layer in layers(graph).items()}
    assert depth["silu"] == depth["linear"] + 1 == depth["weight"] + 2
    with pytest.raises(InputError, match=r"\*\.dot and \*\.svg"):
        graph.draw("g.png")
    assert Graph((), ()).draw() and isinstance(Sample((), {}, {}), Sample)
