"""Every op keeps its word: its type rule, its axis notation and its text agree with what its meaning does."""

from __future__ import annotations

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jisu.compiler import ops
from jisu.compiler.axes import flops, relate
from jisu.compiler.errors import JisuError
from jisu.compiler.graph import Graph, Node, Op, constant, placeholder
from jisu.compiler.interpret import evaluate_node, interpret
from jisu.compiler.text import parse, to_text
from jisu.compiler.types import TensorType, TupleType, TypeRuleError, dtype_name, is_float, numpy_dtype
from jisu.compiler.verify import verify
from jisu.testing import arrays_for, graph_of, op_calls

CALLED = sorted((op for op in ops.OPS.values() if not op.leaf), key=lambda op: op.name)
every_op = pytest.mark.parametrize("op", CALLED, ids=lambda op: op.name)


def results(value: object, node: Node) -> list[np.ndarray]:
    return list(value) if isinstance(node.type, TupleType) else [np.asarray(value)]  # type: ignore[call-overload]


def types_of(node: Node) -> tuple[TensorType, ...]:
    return node.type.items if isinstance(node.type, TupleType) else (node.type,)


def evaluated(node: Node, operands: list[np.ndarray | None]) -> list[np.ndarray]:
    return results(evaluate_node(node, operands, {}), node)


@every_op
@settings(max_examples=15)
@given(st.data())
def test_type_rule_says_what_the_meaning_gives(op: Op, data: st.DataObject) -> None:
    node = data.draw(op_calls(op))
    graph = graph_of(node)
    sample = data.draw(arrays_for(graph, values=data.draw(st.sampled_from(["digits", "normal"]))))
    values = interpret(sample.fill(graph), sample.inputs, keep=True)
    assert isinstance(values, dict)
    for value, type in zip(results(values[node], node), types_of(node), strict=True):
        assert value.shape == type.shape, f"{op.name}: {type} but {value.shape}"
    # Beside the dtype that the interpreter settles, integers and bools must come out by themselves.
    raw = evaluated(node, [values[o] if o is not None else None for o in node.operands])
    for value, type in zip(raw, types_of(node), strict=True):
        assert dtype_name(value.dtype) == type.dtype, f"{op.name}: {type} but {value.dtype}"


@every_op
@settings(max_examples=15)
@given(st.data())
def test_text_round_trip_and_verifier(op: Op, data: st.DataObject) -> None:
    graph = verify(graph_of(data.draw(op_calls(op))))
    again = parse(to_text(graph), graph.weights)
    assert again == graph and str(again) == str(graph)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where two arrays differ, NaN being equal to itself."""
    a, b = (v.astype(np.float64) if v.dtype.kind not in "biu" else v for v in (before, after))
    same = (a == b) | ((a != a) & (b != b))
    return np.argwhere(~same)


def nudged(array: np.ndarray, index: tuple[int, ...], table: bool) -> np.ndarray:
    """A copy with one element changed; indices stay small."""
    new = array.copy()
    if array.dtype == np.bool_:
        new[index] = not new[index]
    elif array.dtype.kind in "iu":
        new[index] = 0 if table and new[index] else new[index] + 1
    else:
        new[index] = np.asarray(float(new[index]) * 1.5 + 1.25).astype(array.dtype)
    return new


@every_op
@settings(max_examples=15)
@given(st.data())
def test_notation_bounds_what_an_element_reaches(op: Op, data: st.DataObject) -> None:
    """Change one element: "same" may change that index only, "prefix" that and later ones; a missing axis any."""
    node = data.draw(op_calls(op))
    relations = relate(node)
    sample = data.draw(arrays_for(graph_of(node), values="normal"))
    values = interpret(sample.fill(graph_of(node)), sample.inputs, keep=True)
    assert isinstance(values, dict)
    operands = [values[o] if o is not None else None for o in node.operands]
    if relations is None or any(isinstance(o, tuple) for o in operands):
        return
    places = [i for i, o in enumerate(operands) if o is not None and o.size]
    if not places:
        return
    which = data.draw(st.sampled_from(places))
    operand, rows = operands[which], relations[which]
    assert operand is not None and rows is not None
    index = tuple(data.draw(st.integers(0, n - 1)) for n in operand.shape)
    before = evaluated(node, operands)[0]
    try:
        after = evaluated(node, [*operands[:which], nudged(operand, index, True), *operands[which + 1 :]])[0]
    except JisuError:  # an index left its table
        return
    for place in changed(before, after):
        for at, relation in zip(index, rows, strict=True):
            if relation.axis is None:
                continue
            reached = int(place[relation.axis])
            if relation.kind == "same":
                assert reached == at, (
                    f"{op.name}: operand {which} at {index} reaches {place}, the notation says same {rows}"
                )
            elif relation.kind == "prefix":
                assert reached >= at, f"{op.name}: operand {which} at {index} reaches back to {place}"


def test_reduced_prefix_is_causal() -> None:
    """`attention` with t< on its keys: a later key never reaches an earlier query."""
    q = placeholder("q", TensorType((1, 4, 2, 3), "float32"))
    node = ops.attention(q, q, q, scale=1.0, causal=True)
    relations = relate(node)
    assert relations is not None and relations[1] is not None and relations[1][1].kind == "prefix"
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 4, 2, 3)).astype(np.float32) for _ in range(3)]
    before = evaluated(node, [*arrays, None, None])[0]
    for t in range(4):
        key = arrays[1].copy()
        key[0, t] += 1
        after = evaluated(node, [arrays[0], key, arrays[2], None, None])[0]
        assert changed(before, after)[:, 1].min() >= t


@every_op
@settings(max_examples=4)
@given(st.data())
def test_flops_are_a_natural_number(op: Op, data: st.DataObject) -> None:
    assert int(flops(data.draw(op_calls(op)))) >= 0


@every_op
def test_refuses_nonsense(op: Op) -> None:
    """A wrong number of operands and an unknown attribute are the op's own error, never Python's."""
    a = placeholder("a", TensorType((2, 3), "float32"))
    with pytest.raises(TypeRuleError, match=op.name):
        op.make((a,) * (len(op.operand_names) + 1) if not op.variadic else (), {k: 0 for k in op.defaults})
    with pytest.raises(TypeRuleError, match="nonsense"):
        op.make((a,) * len(op.operand_names), {"nonsense": 1})


# --- Agreement with PyTorch ----------------------------------------------------------------------------------------

UNARY = {
    ops.neg: torch.neg, ops.abs_: torch.abs, ops.sign: torch.sign, ops.relu: torch.relu, ops.square: torch.square,
    ops.exp: torch.exp, ops.exp2: torch.exp2, ops.expm1: torch.expm1, ops.log: torch.log, ops.log2: torch.log2,
    ops.log10: torch.log10, ops.log1p: torch.log1p, ops.sqrt: torch.sqrt, ops.rsqrt: torch.rsqrt,
    ops.reciprocal: torch.reciprocal, ops.sin: torch.sin, ops.cos: torch.cos, ops.tan: torch.tan, ops.asin: torch.asin,
    ops.acos: torch.acos, ops.atan: torch.atan, ops.sinh: torch.sinh, ops.cosh: torch.cosh, ops.tanh: torch.tanh,
    ops.asinh: torch.asinh, ops.acosh: torch.acosh, ops.atanh: torch.atanh, ops.erf: torch.erf,
    ops.sigmoid: torch.sigmoid, ops.silu: torch.nn.functional.silu, ops.floor: torch.floor, ops.ceil: torch.ceil,
    ops.round_: torch.round, ops.trunc: torch.trunc, ops.gelu: torch.nn.functional.gelu,
}  # fmt: skip
BINARY = {
    ops.add: torch.add, ops.sub: torch.sub, ops.mul: torch.mul, ops.div: torch.div, ops.fmod: torch.fmod,
    ops.remainder: torch.remainder, ops.floor_div: torch.floor_divide, ops.maximum: torch.maximum,
    ops.minimum: torch.minimum, ops.atan2: torch.atan2, ops.copysign: torch.copysign, ops.pow_: torch.pow,
    ops.trunc_div: lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    ops.eq: torch.eq, ops.ne: torch.ne, ops.lt: torch.lt, ops.le: torch.le, ops.gt: torch.gt, ops.ge: torch.ge,
}  # fmt: skip
ODD = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.1, 3.7, -3.7, 88.0, -120.0, np.inf, -np.inf, np.nan]
TOLERANCE = {"float32": 3e-6, "float64": 1e-12, "bfloat16": 9e-3, "float16": 2e-3}


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def agree(got: np.ndarray, want: torch.Tensor, dtype: str) -> None:
    assert got.shape == tuple(want.shape)
    expected = want.to(torch.float64).numpy() if want.dtype.is_floating_point else want.numpy()
    if not want.dtype.is_floating_point:
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 8)


def applied(op: Op, *arrays: np.ndarray, **attributes: object) -> np.ndarray:
    inputs = [placeholder(f"x{i}", TensorType(a.shape, dtype_name(a.dtype))) for i, a in enumerate(arrays)]
    (value,) = interpret(Graph(tuple(inputs), (op(*inputs, **attributes),)), arrays)  # type: ignore[misc]
    assert isinstance(value, np.ndarray)
    return value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("op", UNARY, ids=lambda op: op.name)
def test_unary_agrees_with_torch(op: Op, dtype: str) -> None:
    with np.errstate(all="ignore"):
        x = np.array(ODD).astype(numpy_dtype(dtype))
        got, want = applied(op, x), UNARY[op](to_torch(x))  # type: ignore[operator]
        if op is ops.gelu:  # torch's vectorised gelu(inf) is NaN, and its error function is good to 1e-6 only
            finite = np.isfinite(x)
            np.testing.assert_allclose(got[finite].astype(float), want.double().numpy()[finite], rtol=1e-2, atol=1e-6)
        else:
            agree(got, want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "int8", "uint8"])
@pytest.mark.parametrize("op", BINARY, ids=lambda op: op.name)
def test_binary_agrees_with_torch(op: Op, dtype: str) -> None:
    floating = is_float(dtype)
    if not floating and op in (ops.div, ops.atan2, ops.copysign):
        with pytest.raises(TypeRuleError):
            applied(op, np.zeros(1, dtype), np.zeros(1, dtype))
        return
    with np.errstate(all="ignore"):
        whole = [0, 1, -1, 2, 3, -7, 5, 100, -100, 127]
        x = np.array(ODD if floating else whole).astype(np.int64 if not floating else dtype).astype(dtype)
        if not floating and op in (ops.floor_div, ops.trunc_div, ops.remainder, ops.fmod):
            y = np.where(x == 0, 3, x).astype(dtype)
        else:
            y = x
        a, b = x[:, None], y[None, :]
        if op is ops.pow_ and not floating:
            b = np.abs(b.astype(np.int64)).clip(0, 4).astype(dtype)
        if floating and op in (ops.fmod, ops.remainder, ops.floor_div, ops.trunc_div):
            a, b = a[np.isfinite(a[:, 0])], b[:, np.isfinite(b[0])]
        agree(applied(op, a, b), BINARY[op](to_torch(a), to_torch(b)), dtype)  # type: ignore[operator]


ints = np.arange(-4, 5)
RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
IMAGE, KERNEL = (
    RNG.standard_normal((2, 4, 6, 5)).astype(np.float32),
    RNG.standard_normal((6, 2, 3, 2)).astype(np.float32),
)
Q, K, V = (RNG.standard_normal(s).astype(np.float32) for s in [(2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)])
t = torch.from_numpy


def sdpa(causal: bool) -> torch.Tensor:
    q, k, v = (t(a).transpose(1, 2) for a in (Q, K, V))
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2) if causal else None
    return torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, scale=0.3
    ).transpose(1, 2)


CASES = {
    "matmul": lambda: (applied(ops.matmul, X, X.swapaxes(1, 2)), t(X) @ t(X).transpose(1, 2)),
    "linear": lambda: (
        applied(ops.linear, X, KERNEL[:, 0, 0].reshape(3, 4), X[0, 0, :3], activation="gelu_tanh"),
        torch.nn.functional.gelu(
            torch.nn.functional.linear(t(X), t(KERNEL[:, 0, 0].reshape(3, 4)), t(X[0, 0, :3])), approximate="tanh"
        ),
    ),
    "conv": lambda: (
        applied(ops.conv, IMAGE, KERNEL, strides=(2, 1), dilations=(1, 2), groups=2),
        torch.nn.functional.conv2d(t(IMAGE), t(KERNEL), stride=(2, 1), dilation=(1, 2), groups=2),
    ),
    "softmax": lambda: (applied(ops.softmax, X, axis=1), torch.softmax(t(X), 1)),
    "sum": lambda: (applied(ops.sum_, X, axes=(0, 2), keepdims=True), t(X).sum((0, 2), keepdim=True)),
    "prod": lambda: (applied(ops.prod, X, axes=(1,)), t(X).prod(1)),
    "reduce_max": lambda: (applied(ops.reduce_max, X, axes=(0, 1)), t(X).amax((0, 1))),
    "argmax": lambda: (
        applied(ops.argmax, np.array([1, 3, 3, 2], np.int32), axis=0),
        torch.tensor([1, 3, 3, 2]).argmax(0),
    ),
    "argmin of NaN": lambda: (
        applied(ops.argmin, np.array([1, np.nan, 0], np.float32), axis=0), torch.tensor([1, torch.nan, 0]).argmin(0)
    ),
    "cumsum": lambda: (applied(ops.scan, X, axis=2, kind="sum"), t(X).cumsum(2)),
    "cummax": lambda: (applied(ops.scan, X, axis=1, kind="max"), t(X).cummax(1).values),
    "layer_norm": lambda: (
        applied(ops.layer_norm, X, X[0, 0], X[1, 1], eps=1e-3),
        torch.nn.functional.layer_norm(t(X), (4,), t(X[0, 0]), t(X[1, 1]), 1e-3),
    ),
    "rms_norm": lambda: (
        applied(ops.rms_norm, X, X[0, 0], eps=1e-3),
        torch.nn.functional.rms_norm(t(X), (4,), t(X[0, 0]), 1e-3),
    ),
    "attention": lambda: (applied(ops.attention, Q, K, V, scale=0.3), sdpa(False)),
    "causal attention": lambda: (applied(ops.attention, Q, K, V, scale=0.3, causal=True), sdpa(True)),
    "transpose": lambda: (applied(ops.transpose, X, perm=(2, 0, 1)), t(X).permute(2, 0, 1)),
    "flip": lambda: (applied(ops.flip, X, axes=(0, 2)), t(X).flip(0, 2)),
    "concat": lambda: (applied(ops.concat, X, X, axis=1), torch.cat([t(X), t(X)], 1)),
    "take": lambda: (
        applied(ops.take, X[0], np.array([[2, 0], [1, 1]]), axis=0),
        t(X[0])[torch.tensor([[2, 0], [1, 1]])],
    ),
    "gather": lambda: (
        applied(ops.gather, X[0], np.array([[2, 0, 1, 1]]), axis=0),
        torch.gather(t(X[0]), 0, torch.tensor([[2, 0, 1, 1]])),
    ),
    "scatter": lambda: (
        applied(ops.scatter, X[0], np.array([[2, 0, 1, 1]]), X[1, :1], axis=0),
        torch.scatter(t(X[0]), 0, torch.tensor([[2, 0, 1, 1]]), t(X[1, :1])),
    ),
    "scatter add": lambda: (
        applied(ops.scatter, X[0], np.array([[2, 0, 1, 1], [2, 2, 2, 2]]), X[1, :2], axis=0, mode="add"),
        torch.scatter_add(t(X[0]), 0, torch.tensor([[2, 0, 1, 1], [2, 2, 2, 2]]), t(X[1, :2])),
    ),
    "windows": lambda: (
        applied(ops.windows, X, axes=(1,), sizes=(2,), strides=(1,), dilations=(1,)), t(X).unfold(1, 2, 1)
    ),
    "where": lambda: (applied(ops.where, X > 0, X, X[:1]), torch.where(t(X) > 0, t(X), t(X[:1]))),
    "shift_left": lambda: (applied(ops.shift_left, ints, np.full(9, 3)), t(ints) << 3),
    "shift_right": lambda: (applied(ops.shift_right, ints, np.full(9, 1)), t(ints) >> 1),
    "bit_not": lambda: (applied(ops.bit_not, ints), ~t(ints)),
    "cast": lambda: (
        applied(ops.cast, np.array([1.7, -1.7, 0.0], np.float32), dtype="int32"),
        torch.tensor([1.7, -1.7, 0.0]).int(),
    ),
    "cast to bool": lambda: (
        applied(ops.cast, np.array([0.5, 0.0, np.nan], np.float32), dtype="bool"),
        torch.tensor([0.5, 0.0, torch.nan]).bool(),
    ),
    "gelu tanh": lambda: (applied(ops.gelu, X, approximate="tanh"), torch.nn.functional.gelu(t(X), approximate="tanh")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str) -> None:
    got, want = CASES[name]()
    agree(got, want, "float32")


@pytest.mark.parametrize("descending", [False, True])
def test_sort_agrees_with_torch(descending: bool) -> None:
    x = np.array([2, 1, np.nan, 1, -np.inf, 3, 2], np.float32)
    node = ops.sort(placeholder("x", TensorType((7,), "float32")), axis=0, descending=descending)
    graph = graph_of(node)
    values, indices = interpret(graph, [x])  # type: ignore[misc]
    want = torch.sort(t(x), stable=True, descending=descending)
    np.testing.assert_array_equal(values, want.values.numpy())
    np.testing.assert_array_equal(indices, want.indices.numpy())


def test_half_precision_accumulates_in_float32() -> None:
    ones = np.ones((1, 4096), ml_dtypes.bfloat16)
    assert float(applied(ops.sum_, ones, axes=(1,))[0]) == 4096
    assert float(applied(ops.matmul, ones, ones.T)[0, 0]) == 4096
    assert float(applied(ops.linear, ones, ones)[0, 0]) == 4096


def test_python_numbers_take_the_operand_dtype() -> None:
    node = ops.mul(placeholder("x", TensorType((2,), "bfloat16")), 0.1)
    assert node.dtype == "bfloat16" and node.operands[1] is not None and node.operands[1].dtype == "bfloat16"
    assert attrs.has(type(node)) and constant(3, "int8").type == TensorType((), "int8")
