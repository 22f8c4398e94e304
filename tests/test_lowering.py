"""Compiled kernels against the NumPy meaning, special values, symbolic sizes, errors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jisu.compiler import ops
from jisu.compiler.entry import Entry, stored
from jisu.compiler.errors import ArtifactError, CompileError, IndexOutOfRangeError, InputError
from jisu.compiler.graph import ArrayStorage, Graph, Node, Op, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.launches import PLANS, Plan
from jisu.compiler.pipeline import relative_error
from jisu.compiler.types import TensorType, is_float, numpy_dtype, symbol
from jisu.runtime.cuda import DeviceExecutable
from jisu.runtime.executable import Executable, zeros
from jisu.targets.arena import Lifetime, share
from jisu.targets.compile import CompiledInfo, compile_graphs
from jisu.targets.fusion import Region, regions, separable
from jisu.targets.target import Target

CPU = Target.resolve("cpu")
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-12}
# What the layout pass computes ahead of time has no kernel; packed operands fit one panel width only (see test_kernels).
KERNELS = [op for op in ops.OPS.values() if not op.leaf and op is not ops.get and not op.name.startswith("pack")]


@attrs.frozen
class Place:
    """Where programs are compiled, and for which machine: this one, or an emulated GPU."""

    path: Path
    target: Target

    def compile(self, entries: dict[str, Graph]) -> tuple[CompiledInfo, Any]:
        """The compiled graphs, and what runs them."""
        out = self.path / f"out{len(list(self.path.iterdir()))}"
        info = compile_graphs(entries, self.target, out=out, cache_dir=self.path / "cache")
        if self.target.kind == "cuda":
            return info, DeviceExecutable(info.code(), info.entries)
        return info, Executable.load(info.library, info.entries, num_threads=2)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    target = CPU if request.param == "cpu" else request.getfixturevalue("emulated_gpu")
    return Place(tmp_path_factory.mktemp("lowering"), target)


def build(place: Place, **entries: Graph) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    weights = {k: {n: s.numpy() for n, s in stored(g).items()} for k, g in entries.items()}
    return place.compile(entries)[1], weights


def check(got: object, want: np.ndarray, dtype: str, what: str) -> None:
    array = np.asarray(got)
    assert array.shape == want.shape and array.dtype == want.dtype, what
    if dtype in TOLERANCE:
        assert relative_error(array, want) <= TOLERANCE[dtype], f"{what}\n{array}\n{want}"
    else:
        np.testing.assert_array_equal(array, want, err_msg=what)


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -2.5, 1e-30, 3.0], np.float32)
PAIRS = [(a, b) for a in SPECIAL for b in SPECIAL]


def test_special_values(place: Place) -> None:
    """NaN, infinities and zeros through every elementwise op of floats."""
    t = TensorType((len(PAIRS),), "float32")
    x, y = placeholder("x", t), placeholder("y", t)
    entries = {}
    for op in KERNELS:
        if op not in ops.ELEMENTWISE or op is ops.cast:
            continue
        try:
            entries[op.name] = Graph((x, y), (op(*(x, y)[: len(op.operand_names)]),))
        except Exception:  # ops of integers and bools
            continue
    assert len(entries) > 40
    entries["same"] = Graph(
        (x, y), (ops.eq(x, x), ops.ne(x, x), ops.le(x, x), ops.ge(x, x), ops.lt(x, x), ops.gt(x, x))
    )
    program, weights = build(place, **entries)
    arrays = [np.array(column, np.float32) for column in zip(*PAIRS, strict=True)]
    for name, graph in entries.items():
        want = interpret(graph, arrays)
        for got, w, output in zip(program.call(name, arrays, weights[name]), want, graph.outputs, strict=True):
            check(got, w, output.dtype, name)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int8"])
def test_integers_wrap(dtype: str, place: Place) -> None:
    info = np.iinfo(dtype)
    values = np.array([info.min, info.min + 1, -1 if info.min else 0, 0, 1, 7, info.max - 1, info.max]).astype(dtype)
    a, b = (np.array(v, dtype) for v in zip(*[(p, q) for p in values for q in values], strict=True))
    t = TensorType(a.shape, dtype)
    x, y = placeholder("x", t), placeholder("y", t)
    outputs = (ops.add(x, y), ops.sub(x, y), ops.mul(x, y), ops.neg(x), ops.abs_(x), ops.sub(x, x), ops.square(x))
    graph = Graph((x, y), outputs)
    program, _ = build(place, main=graph)
    for got, want in zip(program.call("main", [a, b]), interpret(graph, [a, b]), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_symbolic_sizes(place: Place) -> None:
    n, m = symbol("n"), symbol("m")
    x = placeholder("x", TensorType((n, m, 4), "float32"))
    flat = ops.reshape(x, shape=(n * m, 4))
    w = weight("w", TensorType((4, 6), "float32"))
    outputs = (
        ops.softmax(ops.matmul(flat, w), axis=1),
        ops.sum_(x, axes=(0, 1)),
        ops.concat(flat, flat, axis=0),
        ops.slice_(x, starts=(0, m - 1, 0), stops=(n, m, 4), steps=(1, 1, 1)),
        ops.scan(x, axis=1, kind="sum"),
        ops.dim_value(value=n * m + 1),
    )
    graph = Graph(
        (x,), outputs, {"w": ArrayStorage(np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32))}
    )
    program, weights = build(place, main=graph)
    for shape in ((1, 1, 4), (3, 5, 4), (17, 2, 4)):
        array = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        want = interpret(graph, [array])
        for got, w_, output in zip(program.call("main", [array], weights["main"]), want, outputs, strict=True):
            check(got, w_, output.dtype, f"{shape} {output}")


def test_outputs_share_nothing(place: Place) -> None:
    x = placeholder("x", TensorType((4,), "float32"))
    same = ops.reshape(x, shape=(2, 2))
    program, _ = build(place, main=Graph((x,), (x, same, same, ops.neg(x))))
    array = np.arange(4, dtype=np.float32)
    outputs = [np.asarray(o) for o in program.call("main", [array])]
    for i, a in enumerate(outputs):
        assert not np.shares_memory(a, array)
        assert not any(np.shares_memory(a, b) for b in outputs[i + 1 :])


def indexed(op: Op) -> Graph:
    x, i = placeholder("x", TensorType((3, 2), "float32")), placeholder("i", TensorType((4, 2), "int64"))
    if op is ops.scatter:
        return Graph((x, i), (ops.scatter(x, i, ops.cast(i, dtype="float32"), axis=0, mode="add"),))
    return Graph((x, i), (op(x, i, axis=0),))


@pytest.mark.parametrize("op", [ops.take, ops.gather, ops.scatter], ids=lambda o: o.name)
def test_an_index_outside_is_an_error(op: Op, place: Place) -> None:
    program, _ = build(place, main=indexed(op))
    x = np.ones((3, 2), np.float32)
    for wrong in (3, 4, -4, 2**40):
        index = np.zeros((4, 2), np.int64)
        index[3, 1] = wrong
        with pytest.raises(IndexOutOfRangeError):
            program.call("main", [x, index])
    index[3, 1] = -1
    np.testing.assert_allclose(np.asarray(program.call("main", [x, index])[0]), interpret(indexed(op), [x, index])[0])


def test_integer_division_by_zero_is_an_error(place: Place) -> None:
    t = TensorType((2,), "int64")
    x, y = placeholder("x", t), placeholder("y", t)
    program, _ = build(place, main=Graph((x, y), (ops.floor_div(x, y),)))
    with pytest.raises(InputError, match="division by zero"):
        program.call("main", [np.array([1, 2]), np.array([1, 0])])


def test_a_failing_compiler_is_an_error_that_names_the_ir(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    x = placeholder("x", TensorType((2,), "float32"))
    monkeypatch.setenv("CXX", "false")
    from jisu.targets.compile import _WORKER

    _WORKER.stop()  # a new one sees the environment
    try:
        with pytest.raises(CompileError, match="IR in"):
            build(place, main=Graph((x,), (ops.exp(ops.exp(x)),)))
    finally:
        _WORKER.stop()


def test_elementwise_chains_are_one_kernel(place: Place) -> None:
    n = symbol("n")
    x, b = placeholder("x", TensorType((n, 8), "float32")), placeholder("b", TensorType((8,), "float32"))
    gate = ops.tanh(ops.add(x, b))
    chain = ops.where(ops.lt(x, b), ops.mul(gate, x), ops.sub(gate, b))
    total = ops.sum_(ops.square(chain), axes=(1,))
    graph = Graph((x, b), (chain, total, ops.exp(gate)))
    info, program = place.compile({"main": graph})
    # The chain and the exponential share `gate`: one kernel with two results; the sum pulls the square.
    assert sum(count for _, _, count, _ in info.kernels) == 2
    arrays = [np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((5, 8), (8,))]
    for got, want in zip(program.call("main", arrays), interpret(graph, arrays), strict=True):
        check(got, want, "float32", "fused")


def test_fusion_never_makes_a_cycle(place: Place) -> None:
    x = placeholder("x", TensorType((4, 4), "float32"))
    a = ops.exp(x)
    peak = ops.reduce_max(a, axes=(1,), keepdims=True)  # reads a, and b reads it: a and b can't be one kernel
    b = ops.add(ops.sub(a, peak), ops.tanh(a))
    graph = Graph((x,), (ops.mul(b, a), ops.softmax(ops.transpose(b, perm=(1, 0)), axis=1)))
    program, _ = build(place, main=graph)
    array = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    for got, want in zip(program.call("main", [array]), interpret(graph, [array]), strict=True):
        check(got, want, "float32", "cycle")


def angles(how: str) -> Graph:
    """Cosines and sines of tokens' positions as models compute them, with the shapes that tracing gives."""
    b, s, dtype = symbol("b"), symbol("s"), "bfloat16"
    start, length = placeholder("start", TensorType((b,), "int64")), placeholder("length", TensorType((1,), "int64"))
    frequencies, ids = (
        placeholder("frequencies", TensorType((6,), "float32")),
        placeholder("ids", TensorType((b, s), "int64")),
    )
    token = ops.reshape(ops.add(ops.iota(extent=s, dtype="int64"), length), shape=(1, s))
    position = ops.maximum(ops.sub(token, ops.reshape(start, shape=(b, 1))), 0)
    angle = ops.mul(ops.cast(ops.reshape(position, shape=(b, s, 1)), dtype="float32"), frequencies)
    if how == "neighbours":
        pairs = ops.broadcast_to(ops.reshape(angle, shape=(b, s, 6, 1)), shape=(b, s, 6, 2))
        angle = ops.reshape(pairs, shape=(b, s, 12))
    elif how == "unlike halves":
        angle = ops.concat(angle, ops.neg(angle), axis=2)
    elif how != "once":
        angle = ops.concat(angle, angle, axis=2)
    found: tuple[Node, ...] = (ops.cos(angle), ops.sin(angle))
    if how == "scaled":
        found = tuple(ops.mul(x, 1.25) for x in found)
    elif how == "heads":
        found = tuple(ops.reshape(x, shape=(b, s, 1, 12)) for x in found)
    elif how == "part":
        found = tuple(ops.slice_(x, starts=(0, 0, 0), stops=(b, s, 6), steps=(1, 1, 1)) for x in found)
    return Graph((ids, start, length, frequencies), tuple(ops.cast(x, dtype=dtype) for x in found))


def test_angles_are_one_launch(emulated_gpu: Target, tmp_path: Path) -> None:
    """However models write them."""
    place = Place(tmp_path, emulated_gpu)
    entries = {how: angles(how) for how in ("halves", "unlike halves", "neighbours", "once", "scaled", "heads", "part")}
    info, run = place.compile(entries)
    plans = json.loads(info.code()[PLANS])["entries"]
    for how, graph in entries.items():
        assert len(Plan.from_json(plans[how]).launches({"b": 1, "s": 1})) == 1, how
        for batch, length in ((1, 1), (3, 7)):
            ids = np.zeros((batch, length), np.int64)
            given = [ids, np.arange(batch) % 3, np.array([40]), (10.0 ** -np.arange(6)).astype(np.float32)]
            for got, want in zip(run.call(how, given), interpret(graph, given), strict=True):
                check(got, want, "bfloat16", how)


def test_what_launches_pull(emulated_gpu: Target, tmp_path: Path) -> None:
    """Concatenations and reshapes of any dtype; what is made of less than it is, again and again, but nothing costly, nor what reads as much."""
    n = symbol("n")
    place, entries, launches = Place(tmp_path, emulated_gpu), {}, {}
    for dtype in ("float32", "bfloat16", "float64", "int64", "uint8", "bool"):
        x, y = placeholder("x", TensorType((n, 6), dtype)), placeholder("y", TensorType((n, 9), dtype))
        both = ops.concat(x, y, x, axis=1)
        turned = ops.reshape(ops.transpose(ops.reshape(both, shape=(n, 3, 7)), perm=(0, 2, 1)), shape=(n, 7, 1, 3))
        same = ops.concat(x, x, axis=0)
        entries[f"joined {dtype}"] = Graph((x, y), (turned, ops.logical_not(ops.ne(same, same))))
        launches[f"joined {dtype}"] = 2
    x, y = placeholder("x", TensorType((n, 1), "float32")), placeholder("y", TensorType((n, 9), "float32"))
    costly, little = ops.exp(x), ops.mul(ops.add(x, 1.0), ops.neg(x))
    entries["costly"] = Graph((x, y), (ops.add(costly, y),))
    outer = ops.mul(ops.sub(ops.reshape(little, shape=(n,)), 2.0), 3.0)
    wide = ops.mul(ops.reshape(ops.sub(x, 2.0), shape=(n, 1)), ops.iota(extent=9, dtype="float32"))
    rest = (
        ops.sum_(wide, axes=(1,)),
        ops.reduce_max(ops.add(wide, y), axes=(0,)),
        ops.sum_(ops.mul(wide, wide), axes=(0,)),
    )
    entries["little"] = Graph((x, y), rest)
    # A value that is as large as what it is made of is read in memory by its many users.
    large = ops.mul(ops.add(y, 1.0), ops.neg(y))
    entries["large"] = Graph((x, y), tuple(ops.sum_(ops.mul(large, float(k)), axes=(k,)) for k in (0, 1)))
    entries["siblings"] = Graph(
        (x, y),
        (
            ops.tanh(outer),
            ops.exp(outer),
            *(ops.slice_(y, starts=(0, k), stops=(n, k + 4), steps=(1, 1)) for k in (0, 5)),
        ),
    )
    launches |= {"costly": 2, "little": 3, "large": 3, "siblings": 2}
    info, run = place.compile({name.replace(" ", "_"): graph for name, graph in entries.items()})
    plans = json.loads(info.code()[PLANS])["entries"]
    rng = np.random.default_rng(0)
    for name, graph in entries.items():
        entry = name.replace(" ", "_")
        assert len(Plan.from_json(plans[entry]).launches({"n": 4})) == launches[name], name
        given = [rng.integers(0, 2, (4, int(x.shape[1]))).astype(numpy_dtype(x.dtype)) for x in graph.inputs]  # type: ignore[call-overload]
        for got, want in zip(run.call(entry, given), interpret(graph, given), strict=True):
            check(got, want, graph.outputs[0].dtype, name)


def test_what_is_joined_can_be_computed_one_after_another() -> None:
    """Two regions that need each other, a region that needs itself, and a node of two regions are none."""
    x = placeholder("x", TensorType((4, 4), "float32"))
    a, b = ops.exp(x), ops.tanh(x)
    c, d = ops.matmul(b, x), ops.matmul(a, x)
    graph = Graph((x,), (ops.add(c, d), ops.matmul(c, c)))
    last = graph.outputs[1]
    one, other = Region((a, c), (x, b)), Region((b, d), (x, a))
    assert separable(graph, [one]) and separable(graph, [other]) and separable(graph, [])
    assert not separable(graph, [one, other])
    assert not separable(graph, [Region((b, last), (x, c))])
    assert not separable(graph, [one, Region((a, d), (x,))])
    (first, second) = (r for r in regions(graph, {}, [one]) if r is one or d in r.results)
    assert first is one and second.leaves == (a, x)


def halves_swapped(a: Node) -> Node:
    left, right = (ops.slice_(a, starts=(0, k), stops=(4, k + 2), steps=(1, 1)) for k in (0, 2))
    return ops.concat(right, left, axis=1)


GROWN: tuple[Callable[[Node, Node], Node], ...] = (
    lambda a, b: ops.add(a, b), lambda a, b: ops.mul(a, b), lambda a, b: ops.exp(a), lambda a, b: ops.neg(a),
    lambda a, b: ops.reduce_max(a, axes=(1,), keepdims=True), lambda a, b: ops.transpose(a, perm=(1, 0)),
    lambda a, b: halves_swapped(a), lambda a, b: ops.flip(a, axes=(0,)), lambda a, b: ops.matmul(a, a),
    lambda a, b: ops.reshape(ops.reshape(a, shape=(4, 2, 2)), shape=(4, 4)),
)  # fmt: skip


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_regions_read_what_stands_before_them(seed: int, launched: bool) -> None:
    """Of random graphs: every region behind those that it reads, every result once, results of one kernel of one shape."""
    rng = random.Random(seed)
    joined = 0
    for _ in range(100):
        values = [
            placeholder(n, TensorType(shape, "float32")) for n, shape in (("x", (4, 4)), ("y", (4, 1)), ("z", (4, 4)))
        ]
        inputs = tuple(values)
        for _ in range(rng.randint(5, 30)):
            a, b = rng.choice([v for v in values[-6:] if v.shape == (4, 4)] or inputs[:1]), rng.choice(values)
            values.append(rng.choice(GROWN)(a, b))
        graph = Graph(inputs, tuple(dict.fromkeys([values[-1], *rng.sample(values[3:], 3)])))
        known = set(inputs)
        for region in regions(graph, {}, launched=launched):
            assert known >= set(region.leaves) and not known & set(region.results), graph
            assert len({r.shape for r in region.results}) == 1
            known |= set(region.results)
            joined += len(region.results) > 1
        assert known >= set(graph.outputs), graph
    assert joined > 10


SYMBOL = symbol("n")
PRODUCERS: dict[str, Callable[[Node, Node], Node]] = {
    "as it is": lambda x, ids: x,
    "square": lambda x, ids: ops.square(x),
    "silu": lambda x, ids: ops.silu(x),
    "gelu": lambda x, ids: ops.gelu(x, approximate="tanh"),
    "scaled": lambda x, ids: ops.add(ops.mul(x, 0.5), 1.0),
    "broadcast": lambda x, ids: ops.sub(x, ops.slice_(x, starts=(0, 0), stops=(1, 37), steps=(1, 1))),
    "transposed": lambda x, ids: ops.transpose(ops.transpose(ops.neg(x), perm=(1, 0)), perm=(1, 0)),
    "looked up": lambda x, ids: ops.take(x, ids, axis=0),
    "wide": lambda x, ids: ops.cast(x, dtype="float32"),
    "chosen": lambda x, ids: ops.where(ops.gt(x, 0.0), x, ops.exp(x)),
}
CONSUMERS: dict[str, Callable[[Node], Node]] = {
    "sum rows": lambda x: ops.sum_(x, axes=(1,), keepdims=True),
    "sum columns": lambda x: ops.sum_(x, axes=(0,)),
    "sum all": lambda x: ops.sum_(x, axes=(0, 1)),
    "prod": lambda x: ops.prod(ops.mul(x, 0.1), axes=(1,)),
    "largest": lambda x: ops.reduce_max(x, axes=(1,), keepdims=True),
    "least": lambda x: ops.reduce_min(x, axes=(0,)),
    "any": lambda x: ops.any_(ops.gt(x, 1.0), axes=(1,)),
    "all": lambda x: ops.all_(ops.gt(x, -1.0), axes=(0,)),
    "where largest": lambda x: ops.argmax(x, axis=1),
    "where least": lambda x: ops.argmin(x, axis=0),
    "softmax rows": lambda x: ops.softmax(x, axis=1),
    "softmax columns": lambda x: ops.softmax(x, axis=0),
    "running sum": lambda x: ops.scan(x, axis=1, kind="sum"),
    "running sum down": lambda x: ops.scan(x, axis=0, kind="sum"),
    "sorted": lambda x: ops.get(ops.sort(x, axis=1), index=0),
    "twice": lambda x: ops.concat(x, ops.neg(x), axis=1),
    "padded": lambda x: ops.pad(x, 0.5, low=(1, 2), high=(0, 3), interior=(0, 0)),
    "reversed": lambda x: ops.flip(x, axes=(1,)),
    "turned": lambda x: ops.transpose(x, perm=(1, 0)),
    "every other": lambda x: ops.slice_(x, starts=(0, 1), stops=x.shape, steps=(1, 2)),
    "normalised": lambda x: ops.rms_norm(x, eps=1e-5),
    "centred": lambda x: ops.layer_norm(x, eps=1e-5),
    "product": lambda x: ops.matmul(ops.transpose(x, perm=(1, 0)), x),
}


@pytest.mark.parametrize("rows", [5, SYMBOL], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_consumer_of_every_producer(dtype: str, rows: int, place: Place) -> None:
    """What is computed inside its user's kernel equals what the interpreter computes; rows are longer than vectors."""
    x, ids = placeholder("x", TensorType((rows, 37), dtype)), placeholder("ids", TensorType((rows,), "int64"))
    ranges = {"n": (1, 64)} if rows is SYMBOL else {}
    entries = {
        f"{p} {c}".replace(" ", "_"): Graph((x, ids), (consume(produce(x, ids)),), ranges=ranges)
        for p, produce in PRODUCERS.items()
        for c, consume in CONSUMERS.items()
    }
    run, _ = build(place, **entries)
    rng = np.random.default_rng(0)
    array = rng.standard_normal((5, 37)).astype(numpy_dtype(dtype))
    given = [array, rng.integers(0, 5, 5)]
    for name, graph in entries.items():
        (want,), (got,) = interpret(graph, given), run.call(name, given)
        exact = interpret(graph, given, float64=True)[0]
        assert np.asarray(got).shape == want.shape and np.asarray(got).dtype == want.dtype, name
        if is_float(graph.outputs[0].dtype):
            # Where the meaning itself rounds in between, it is off from float64 as well.
            allowed = max(TOLERANCE[graph.outputs[0].dtype], 3 * relative_error(want, exact))
            error = relative_error(np.asarray(got), exact.astype(np.float64))
            assert error <= allowed, f"{name}: {error} of {allowed}\n{graph}"
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


# --- How entries are called ------------------------------------------------------------------------------------------------

SIZES = [64, 1000, 4 * symbol("m"), 4 * symbol("m") * symbol("n"), 12 * symbol("m") + 8]
LIVES = st.tuples(st.sampled_from(SIZES), st.integers(0, 12), st.integers(0, 6))


@given(st.lists(LIVES, max_size=24))
def test_values_that_live_at_once_share_no_place(drawn: list[tuple[Any, int, int]]) -> None:
    values = [Lifetime(size, first, first + length) for size, first, length in drawn]
    slots = share(values)
    assert len(slots.place) == len(values)
    for i, a in enumerate(values):
        assert a.nbytes in slots.sizes[slots.place[i]]
        for j, b in enumerate(values[:i]):
            if a.first <= b.last and b.first <= a.last:
                assert slots.place[i] != slots.place[j]


def test_a_chain_takes_two_places() -> None:
    size = 4 * symbol("m")
    assert len(share([Lifetime(size, i, i + 1) for i in range(20)]).sizes) == 2


def test_entries_survive_json_and_refuse_nonsense() -> None:
    m = symbol("m")
    entry = Entry(
        inputs=(("x", TensorType((m, 3), "float32")), ("cache", TensorType((2, m), "uint8"))),
        weights=(("w", TensorType((3, 3), "bfloat16")),),
        outputs=(TensorType((m, 3), "float32"), TensorType((2, m), "uint8")),
        aliases=(None, 1),
        symbols=("m",),
    )
    data = json.loads(json.dumps(entry.to_json()))
    assert Entry.from_json(data) == entry
    for change in (
        {"aliases": [None]},
        {"aliases": [None, 2]},
        {"symbols": ["q"]},
        {"outputs": ["float32[q]", "uint8[2, m]"]},
    ):
        with pytest.raises(ValueError, match="entry"):
            Entry.from_json({**data, **change})


def test_calls_that_do_not_fit(place: Place) -> None:
    m = symbol("m")
    x, y = placeholder("x", TensorType((m, 4), "float32")), placeholder("y", TensorType((m,), "float32"))
    w = weight("w", TensorType((4,), "float32"))
    held = {"w": ArrayStorage(np.ones(4, np.float32))}
    graph = Graph((x, y), (ops.add(ops.mul(x, w), ops.reshape(y, shape=(m, 1))),), held)
    program, weights = build(place, main=graph)
    good = [np.ones((3, 4), np.float32), np.ones(3, np.float32)]
    np.testing.assert_array_equal(program.call("main", good, weights["main"])[0], np.full((3, 4), 2))
    for wrong, message in (
        ([good[0], np.ones(2, np.float32)], "input 'y'.*dimension of 2"),
        ([good[0][:, :3], good[1]], "input 'x'"),
        ([good[0].astype(np.float64), good[1]], "input 'x': expected float32, got float64"),
        (good[:1], "expected 2 inputs"),
    ):
        with pytest.raises(InputError, match=message):
            program.call("main", wrong, weights["main"])
    with pytest.raises(InputError, match="no entry 'other'"):
        program.call("other", good)
    with pytest.raises(ArtifactError, match="weight 'w' is missing"):
        program.call("main", good)
    with pytest.raises(ArtifactError, match="weight 'w': expected float32"):
        program.call("main", good, {"w": np.ones(5, np.float32)})
    # Strided, unaligned and foreign arrays are copied.
    strided = np.ones((3, 8), np.float32)[:, ::2]
    unaligned = np.ones(3 * 4 + 1, np.float32)[1:].reshape(3, 4)
    for copied in (strided, unaligned, good[0].astype(">f4")):
        np.testing.assert_array_equal(program.call("main", [copied, good[1]], weights["main"])[0], np.full((3, 4), 2))


def test_sizes_that_divide_exactly(place: Place) -> None:
    """A size may be a quotient that is whole only for the lengths that occur."""
    m = symbol("m")
    x = placeholder("x", TensorType((m,), "float32"))
    halves = ops.exp(ops.reshape(x, shape=(5, m / 5)))
    graph = Graph((x,), (ops.sum_(ops.softmax(halves, axis=1), axes=(0,)),))
    program, _ = build(place, main=graph)
    for n in (5, 35):
        array = np.linspace(-1, 1, n, dtype=np.float32)
        check(program.call("main", [array])[0], interpret(graph, [array])[0], "float32", f"{n}")


def test_what_is_updated_in_place_is_the_callers(place: Place) -> None:
    """An array that had to be copied (strided, unaligned, in another byte order, behind DLPack) is written back to, or refused."""
    cache = placeholder("cache", TensorType((1, 2, 4, 8), "float32"))
    new = placeholder("new", TensorType((1, 1, 2, 8), "float32"))
    at = placeholder("at", TensorType((1,), "int64"))
    program, _ = build(place, main=Graph((cache, new, at), (ops.cache_append(cache, new, at, None, ring=False),)))
    given = [zeros((1, 2, 4, 8), "float32", "a cache"), np.ones((1, 1, 2, 8), np.float32), np.array([2])]
    given[0].flags.writeable = False
    with pytest.raises(InputError, match="'cache' is updated in place"):
        program.call("main", given)
    given[0].flags.writeable = True
    assert program.call("main", given)[0] is given[0] and given[0][0, :, 2].all() and given[0].sum() == 16
    strided = np.zeros((1, 4, 2, 8), np.float32).transpose(0, 2, 1, 3)
    unaligned = zeros((65,), "float32", "a cache")[1:].reshape(1, 2, 4, 8)
    for array in (strided, unaligned, np.zeros((1, 2, 4, 8), ">f4"), strided[..., ::-1]):
        array[...] = 0
        assert program.call("main", [array, *given[1:]])[0] is array and array[0, :, 2].all() and array.sum() == 16
    tensor = torch.zeros(1, 4, 2, 8).transpose(1, 2)
    program.call("main", [tensor, *given[1:]])
    assert tensor[0, :, 2].all() and tensor.sum() == 16
    with pytest.raises(InputError, match=r"'cache' .* share memory .*strides \[32, 0, 8, 1\].*ascontiguousarray"):
        program.call("main", [torch.zeros(1, 1, 4, 8).expand(1, 2, 4, 8), *given[1:]])
    unaligned.flags.writeable = False
    with pytest.raises(InputError, match="'cache' is updated in place.*read-only"):
        program.call("main", [unaligned, *given[1:]])


def test_shapes_may_change_from_call_to_call(place: Place) -> None:
    m = symbol("m")
    x = placeholder("x", TensorType((m, 8), "float32"))
    hidden = ops.softmax(ops.matmul(x, ops.transpose(x, perm=(1, 0))), axis=1)
    graph = Graph((x,), (ops.matmul(hidden, x), ops.sum_(hidden, axes=(0,))))
    program, _ = build(place, main=graph)
    for rows in (1, 300, 7, 301, 1):
        array = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float32)
        for got, want in zip(program.call("main", [array]), interpret(graph, [array]), strict=True):
            check(got, want, "float32", f"{rows} rows")
