"""Graphs as StableHLO: every op and whole models on JAX's CPU against the interpreter, and libtpu's word for the chips."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np
import pytest
import torch
import transformers as hf
from decoders import make
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_sampling import sampling_rows

import jisu
from jisu.compiler import ops
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, Op, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.types import TensorType, fixed, symbol
from jisu.passes import default_passes
from jisu.passes.cache import CacheLayout, Step, derive_step, keep_last_token
from jisu.targets.tpu import export
from jisu.targets.tpu.stablehlo import EMITTERS, LEAVES, Kernel, emit, signature
from jisu.testing import arrays_for, graph_of, op_calls

needs_jax = pytest.mark.skipif(not export.has_jax(), reason='needs JAX: pip install "jisu[tpu]"')
needs_libtpu = pytest.mark.skipif(
    not (export.has_jax() and export.has_libtpu()), reason='needs JAX and libtpu: pip install "jisu[tpu-aot]"'
)
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-12}
CALLED = sorted((op for op in ops.OPS.values() if not op.leaf and op is not ops.get), key=lambda op: op.name)
every_op = pytest.mark.parametrize("op", CALLED, ids=lambda op: op.name)


def weights_of(graph: Graph) -> list[np.ndarray]:
    return [graph.weights[name].numpy() for name, _ in signature(graph, dict.fromkeys(graph.symbols, 1)).weights]


def renamed(graph: Graph, prefix: str) -> Graph:
    """The graph with a prefix before its weights' names."""
    new = graph.map(lambda old, node: weight(prefix + node.name, node.tensor) if node.op is WEIGHT else node)
    return attrs.evolve(new, weights={prefix + name: storage for name, storage in graph.weights.items()})


def run(graph: Graph, inputs: Sequence[np.ndarray], sizes: Mapping[str, int] | None = None) -> list[np.ndarray]:
    entry = signature(graph, sizes or {})
    return export.runner(emit(graph, sizes or {}), entry)(*inputs, *weights_of(graph))


def check(got: np.ndarray, want: np.ndarray, what: str, exact: Callable[[], np.ndarray] | None = None) -> None:
    """Floats within what kernels may be off (more where the meaning itself is off from `exact`, its value in float64), all else equal."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    if got.dtype.name in TOLERANCE:
        allowed, error = TOLERANCE[got.dtype.name], relative_error(got, want)
        if error > allowed and exact is not None:
            allowed = max(allowed, 3 * relative_error(want, exact()))
            error = relative_error(got, exact().astype(np.float64))
        assert error <= allowed, f"{what}: {error} of {allowed}\n{got}\n{want}"
    else:
        np.testing.assert_array_equal(got, want, err_msg=what)


def check_records(got: np.ndarray, want: np.ndarray) -> None:
    """A compiler may multiply by the reciprocal of a constant: a scale's last bit, and a number between two codes, go either way."""
    apart = np.abs(got.astype(int) - want.astype(int))
    assert got.shape == want.shape and set(apart.reshape(-1)) <= {0, 1, 255} and (apart > 0).mean() <= 0.05


def exactly(graph: Graph, arrays: Sequence[np.ndarray], output: int) -> np.ndarray:
    return interpret(graph, arrays, float64=True)[output]


# --- Ops -----------------------------------------------------------------------------------------------------------------


def test_every_op_has_an_emitter() -> None:
    missing = {op.name for op in ops.OPS.values() if op not in EMITTERS and op not in LEAVES}
    assert not missing, f"no StableHLO for {', '.join(sorted(missing))}"


@needs_jax
@every_op
@settings(max_examples=2, phases=[Phase.generate])  # each compiles a program: too slow to shrink
@given(st.data())
def test_ops_equal_their_meaning(op: Op, data: st.DataObject) -> None:
    """Several drawn calls of an op in one program."""
    calls = []
    for i in range(5):
        graph = graph_of(data.draw(op_calls(op)))
        sample = data.draw(arrays_for(graph, values=data.draw(st.sampled_from(["digits", "normal"]))))
        calls.append((renamed(sample.fill(graph), f"{i}."), sample.inputs))
    held = {name: storage for g, _ in calls for name, storage in g.weights.items()}
    whole = Graph([n for g, _ in calls for n in g.inputs], [n for g, _ in calls for n in g.outputs], held)
    got = iter(run(whole, [a for _, arrays in calls for a in arrays]))
    for graph, arrays in calls:
        for i, want in enumerate(interpret(graph, arrays)):
            exact = functools.partial(exactly, graph, arrays, i)
            if op in (ops.encode_rows, ops.encode_levels):
                check_records(next(got), want)
                continue
            check(next(got), want, f"{graph}\n{arrays}\n{graph.weights}", exact)


@needs_jax
def test_tokens_are_drawn_as_their_meaning_says() -> None:
    operands = sampling_rows(200, 40, np.random.default_rng(3))
    nodes = [placeholder(f"x{i}", TensorType(x.shape, x.dtype.name)) for i, x in enumerate(operands)]
    both = ops.draw(*nodes)
    graph = Graph(tuple(nodes), (ops.get(both, index=0), ops.get(both, index=1)))
    for got, want in zip(run(graph, operands), interpret(graph, operands), strict=True):
        np.testing.assert_array_equal(got, want)


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -2.5, 1e-30, 3.0], np.float32)
PAIRS = [(a, b) for a in SPECIAL for b in SPECIAL]


@needs_jax
def test_special_values() -> None:
    """NaN, infinities and zeros through every elementwise op of floats."""
    t = TensorType((len(PAIRS),), "float32")
    x, y = placeholder("x", t), placeholder("y", t)
    outputs: list[Node] = []
    for op in CALLED:
        if op not in ops.ELEMENTWISE or op is ops.cast:
            continue
        try:
            outputs.append(op(*(x, y)[: len(op.operand_names)]))
        except Exception:  # ops of integers and bools
            continue
    assert len(outputs) > 40
    arrays = [np.array(column, np.float32) for column in zip(*PAIRS, strict=True)]
    graph = Graph((x, y), outputs)
    for node, got, want in zip(outputs, run(graph, arrays), interpret(graph, arrays), strict=True):
        check(got, want, node.op.name)


@needs_jax
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int8"])
def test_integers_wrap_and_divide(dtype: str) -> None:
    info = np.iinfo(dtype)
    values = np.array([info.min, info.min + 1, -1 if info.min else 0, 0, 1, 7, info.max - 1, info.max]).astype(dtype)
    a, b = (np.array(v, dtype) for v in zip(*[(p, q) for p in values for q in values], strict=True))
    t = TensorType(a.shape, dtype)
    x, y, z = placeholder("x", t), placeholder("y", t), placeholder("z", t)
    outputs = (
        ops.add(x, y), ops.sub(x, y), ops.mul(x, y), ops.neg(x), ops.abs_(x), ops.square(x), ops.sum_(x, axes=(0,)),
        ops.floor_div(x, z), ops.trunc_div(x, z), ops.remainder(x, z), ops.fmod(x, z), ops.shift_left(x, y), ops.shift_right(x, y),
        ops.scan(x, axis=0, kind="sum"), ops.bit_not(x), ops.maximum(x, y), ops.sign(x), ops.lt(x, y), ops.ge(x, y),
        ops.matmul(ops.reshape(x, shape=(8, 8)), ops.reshape(y, shape=(8, 8))),
    )  # fmt: skip
    graph, divisor = Graph((x, y, z), outputs), np.where(b == 0, 3, b).astype(dtype)
    arrays = [a, b, divisor]
    for node, got, want in zip(outputs, run(graph, arrays), interpret(graph, arrays), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{node.op.name} {node.attributes}")


# --- The text ------------------------------------------------------------------------------------------------------------


def layer() -> Graph:
    """A layer with a cache, small enough to be read."""
    rows = symbol("rows")
    held: dict[str, Storage] = {}

    def matrix(name: str, *shape: int) -> Node:
        held[name] = ArrayStorage(np.random.default_rng(len(held)).standard_normal(shape).astype(np.float32))
        return weight(name, TensorType(shape, "float32"))

    x = placeholder("x", TensorType((1, rows, 8), "float32"))
    length, start = (placeholder(n, TensorType((1,), "int64")) for n in ("length", "start"))
    cache = placeholder("cache", TensorType((1, 2, symbol("capacity"), 4), "float32"))
    normed = ops.rms_norm(x, matrix("norm.weight", 8), eps=1e-6)
    heads = ops.reshape(ops.linear(normed, matrix("q.weight", 8, 8)), shape=(1, rows, 2, 4))
    new = ops.cache_append(cache, heads, length)
    found = ops.attention_cached(heads, new, new, length, start, scale=0.5)
    out = ops.linear(ops.reshape(found, shape=(1, rows, 8)), matrix("o.weight", 8, 8), None, x)
    return Graph((x, length, start, cache), (ops.rms_norm(out, matrix("norm.weight", 8), eps=1e-6), new), held)


SIZES = {"rows": 2, "capacity": 5}


def test_text(golden: Callable[[str, object], None]) -> None:
    golden("tpu-stablehlo", emit(layer(), SIZES))


def test_signature() -> None:
    entry = signature(layer(), SIZES)
    assert [name for name, _ in entry.inputs] == ["x", "length", "start", "cache"]
    assert [name for name, _ in entry.weights] == ["norm.weight", "q.weight", "o.weight"]
    assert entry.aliases == (None, 3) and export.donated(entry) == (3,)
    assert str(entry.outputs[1]) == "float32[1, 2, 5, 4]"
    assert "aliasing" in emit(layer(), SIZES) and "aliasing" not in emit(layer(), SIZES, donate=False)


DOUBLED = """  func.func private @twice(%x: tensor<2x3xf32>) -> tensor<2x3xf32> {
    %0 = stablehlo.add %x, %x : tensor<2x3xf32>
    return %0 : tensor<2x3xf32>
  }"""


@needs_jax
def test_a_kernel_takes_a_nodes_place() -> None:
    x = placeholder("x", TensorType((symbol("n"), 3), "float32"))
    first, second = ops.exp(x), ops.exp(ops.neg(x))
    graph = Graph((x,), (ops.add(first, second),))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    def choose(node: Node, sizes: Mapping[str, int]) -> Kernel | None:
        assert sizes == {"n": 2}
        return Kernel("twice", DOUBLED) if node.op is ops.exp else None

    for kernels, want in ((choose, 0 * array), ({first: Kernel("twice", DOUBLED)}, 2 * array + np.exp(-array))):
        text = emit(graph, {"n": 2}, kernels)  # type: ignore[arg-type]
        assert text.count("func.func private @twice") == 1
        (got,) = export.runner(text, signature(graph, {"n": 2}))(array)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(CompileError, match="two kernels are named 'twice'"):
        emit(graph, {"n": 2}, {first: Kernel("twice", DOUBLED), second: Kernel("twice", DOUBLED + "\n")})


@needs_jax
def test_what_is_refused() -> None:
    graph = layer()
    text, entry = emit(graph, SIZES), signature(graph, SIZES)
    with pytest.raises(CompileError, match="StableHLO refuses"):
        export.exported(
            text.replace("stablehlo.rsqrt", "stablehlo.sqr").replace("stablehlo.sqrt", "stablehlo.sqr"), entry
        )
    with pytest.raises(jisu.JisuError, match="needs a value for capacity"):
        emit(graph, {"rows": 2})
    if export.has_libtpu():
        with pytest.raises(TargetError, match="unknown chip 'v9'"):
            export.compile_for("v9", text, entry)


# --- Models --------------------------------------------------------------------------------------------------------------

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
CAPACITY = 32


def decoder(name: str, layout: CacheLayout | None = None) -> Step:
    """The step of a tiny decoder, with results for the last token."""
    from jisu.frontends.huggingface import trace_decoder

    found = trace_decoder(make(name))
    graph, _ = Pipeline(default_passes()).run(found.graph)
    return keep_last_token(derive_step(graph, sequence=found.sequence, layout=layout), found.sequence)


def bucket(step: Step, rows: int, capacity: int = CAPACITY) -> dict[str, int]:
    """Sizes for chunks of `rows` tokens; rings have as many rows as a cache."""
    sizes = {"batch": 1, "sequence": rows, "pages": 12, "sequence_pages": capacity // 4}
    return {s: sizes.get(s, capacity) for s in step.graph.symbols}


def encoder() -> Graph:
    from jisu.frontends.torch_export import capture

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.tensor([PROMPT])
    return Pipeline(default_passes()).run(capture(model, (ids,), {}, None).graph)[0]


@needs_jax
def test_an_encoder_equals_the_interpreter() -> None:
    graph, ids = encoder(), np.array([PROMPT])
    for got, want in zip(run(graph, [ids]), interpret(graph, [ids]), strict=True):
        check(got, want, "bert")


def generated(step: Step, prompt: Sequence[int], rows: int, count: int) -> list[int]:
    """Greedy tokens by the exported programs of two buckets, with the caches given away at each step."""
    import jax

    weights = weights_of(step.graph)
    programs = {}
    for n in (rows, 1):
        sizes = bucket(step, n)
        entry = signature(step.graph, sizes)
        data = export.export_bytes(emit(step.graph, sizes), entry, "cpu")
        donated = export.donated(entry)
        assert len(donated) == len(step.state)
        programs[n] = jax.jit(jax.export.deserialize(bytearray(data)).call, donate_argnums=donated)
    named = dict(entry.inputs)
    state = [jax.numpy.zeros(named[s.name].shape, named[s.name].dtype) for s in step.state]
    padding = rows - len(prompt)
    start, length = np.array([padding]), 0
    table = [np.arange(CAPACITY // 4, dtype=np.int32)[None] + 2] if "table" in named else []
    ids = [0] * padding + list(prompt)
    found: list[int] = []
    with jax.enable_x64(True):
        while len(found) < count:
            old = state
            logits, *state = programs[len(ids)](np.array([ids]), np.array([length]), start, *table, *state, *weights)
            assert all(s.is_deleted() for s in old)
            length += len(ids)
            ids = [int(np.asarray(logits)[0, -1].argmax())]
            found += ids
    return found


FAST = ("llama", "qwen3", "gpt2")
SLOW = ("mistral", "gemma2", "gpt_neox", "mixtral", "qwen3_moe")


@needs_jax
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_decoders_generate_what_the_cpu_does(name: str) -> None:
    """Prefill in a bucket that is longer than the prompt, then decode: the tokens of the CPU's program."""
    pytest.importorskip("flatbuffers", reason='needs flatbuffers: pip install "jisu[tpu]"')
    want = jisu.compile(make(name)).generate([PROMPT], max_new_tokens=10).sequences[0]
    layout = CacheLayout(page=4) if name == "qwen3" else None
    assert generated(decoder(name, layout), PROMPT, 12, 10) == list(want)[-10:]


@needs_jax
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_chunk_equals_the_interpreter(name: str) -> None:
    step = decoder(name)
    for rows, length in ((6, 0), (1, 9)):
        sizes = bucket(step, rows)
        rng = np.random.default_rng(0)
        state = [rng.standard_normal(s.type.at(sizes).shape).astype(np.float32) for s in step.state]
        given = [rng.integers(0, 99, (1, rows)), np.array([length]), np.array([1]), *state]
        for got, want in zip(run(step.graph, given, sizes), interpret(step.graph, given), strict=True):
            check(got, want, f"{name} {rows}")


# --- What Google's compiler says -----------------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_models_compile_for_chips(name: str, chip: str) -> None:
    """Prefill and decode, the caches in place, and an encoder."""
    graphs: list[tuple[Graph, dict[str, int]]] = []
    if name == "bert":
        graphs.append((encoder(), {}))
    else:
        step = decoder(name)
        graphs += [(step.graph, bucket(step, rows, 256)) for rows in (128, 1)]
    for graph, sizes in graphs:
        entry = signature(graph, sizes)
        made = export.compile_for(chip, emit(graph, sizes), entry)
        cache = sum(fixed(entry.inputs[i][1].nbytes) for i in export.donated(entry))
        assert made.memory["aliased"] >= cache and made.memory["code"] > 0
        assert made.cost


@needs_libtpu
@pytest.mark.slow
@every_op
def test_ops_compile_for_a_chip(op: Op) -> None:
    """The op's samples, or else its plain form, in one program."""
    from jisu.compiler.testing import _calls

    graphs = []
    for i, call in enumerate(_calls(op)):
        try:
            node = op.make([None if o is None else sample(f"x{i}", call.types[o.name]) for o in call.pattern.operands],
                           call.pattern.attributes)  # fmt: skip
        except jisu.JisuError:
            continue
        graphs.append(graph_of(node))
    assert graphs
    whole = Graph([n for g in graphs for n in g.inputs], [n for g in graphs for n in g.outputs])
    export.compile_for("v5e", emit(whole, {}), signature(whole, {}))


def sample(name: str, text: str) -> Node:
    """An input of a type in the kit's notation, with 2 for every size that it leaves open."""
    from jisu.compiler.testing import _spec

    spec = _spec(text)
    dims = [int(t) if t.isdecimal() else 2 for t in spec.dims]
    return placeholder(name, TensorType(tuple(dims), "float32" if spec.dtype == "float" else spec.dtype))
