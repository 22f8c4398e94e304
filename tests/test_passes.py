"""The passes: every rule proven on its own, every pass on random graphs, and goldens of the IR before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from jisu.compiler import ops
from jisu.compiler.graph import ArrayStorage, Graph, Node, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.rewrite import Rule
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.compiler.verify import verify
from jisu.passes import default_passes, layout_passes
from jisu.passes.cache import CacheLayout, NotCausal, Step, derive_step, keep_last_token
from jisu.passes.canonicalize import BROADCAST_RULES, RULES, Canonicalize
from jisu.passes.fusion import FUSIONS, Fusion, SplitProjections
from jisu.passes.layout import FoldWeights, PackWeights
from jisu.passes.memory import plan_memory
from jisu.testing import check_pass, check_rule

ALL_RULES = [
    *RULES,
    *BROADCAST_RULES,
    *(rule for fusion in FUSIONS if isinstance(fusion, Fusion) for rule in fusion.rules),
]
BATCH, LENGTH = symbol("b"), symbol("s")


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: r.name)
def test_rule_keeps_the_meaning(rule: Rule) -> None:
    report = check_rule(rule, examples=20)
    assert report.fired


@pytest.mark.parametrize("fusion", [f for f in FUSIONS if isinstance(f, Fusion)], ids=lambda f: f.name)
def test_fusion_keeps_the_meaning(fusion: Fusion) -> None:
    check_pass(fusion, plant=fusion.rules, examples=20)


def test_canonicalisation_keeps_the_meaning() -> None:
    check_pass(Canonicalize(), plant=RULES, examples=30, may_add_weights=True)


class Model:
    """A small causal model, built by hand."""

    def __init__(self, layers: int = 2, *, tied: bool = False, mixing: Callable[[Node], Node] | None = None) -> None:
        self.rng = np.random.default_rng(0)
        self.weights: dict[str, ArrayStorage] = {}
        ids = placeholder("input_ids", TensorType((BATCH, LENGTH), "int64"))
        positions = placeholder("position_ids", TensorType((BATCH, LENGTH), "int64"))
        table = self.weight("table", 20, 8)
        h = ops.add(ops.take(table, ids, axis=0), ops.take(self.weight("places", 32, 8), positions, axis=0))
        for i in range(layers):
            h = self.layer(h, i, window=3 if i % 2 else 0)
        if mixing is not None:
            h = mixing(h)
        head = table if tied else self.weight("head", 20, 8)
        out = ops.linear(ops.rms_norm(h, eps=1e-6), head)
        self.graph = verify(Graph((ids, positions), (out,), self.weights))

    def weight(self, name: str, *shape: int) -> Node:
        if name not in self.weights:
            values = self.rng.standard_normal(shape) / np.sqrt(shape[-1])
            self.weights[name] = ArrayStorage(values.astype(np.float32))
        return weight(name, TensorType(shape, "float32"))

    def layer(self, h: Node, i: int, window: int) -> Node:
        x = ops.rms_norm(h, self.weight(f"norm{i}", 8), eps=1e-6)
        q = ops.reshape(ops.linear(x, self.weight(f"q{i}", 8, 8)), shape=(BATCH, LENGTH, 4, 2))
        k = ops.reshape(ops.linear(x, self.weight(f"k{i}", 4, 8)), shape=(BATCH, LENGTH, 2, 2))
        v = ops.reshape(ops.linear(x, self.weight(f"v{i}", 4, 8)), shape=(BATCH, LENGTH, 2, 2))
        a = ops.reshape(ops.attention(q, k, v, scale=0.7, causal=True, window=window), shape=(BATCH, LENGTH, 8))
        h = ops.add(h, ops.linear(a, self.weight(f"o{i}", 8, 8)))
        flat = ops.reshape(h, shape=(BATCH * LENGTH, 8))
        inner = ops.mul(
            ops.silu(ops.linear(flat, self.weight(f"gate{i}", 12, 8))), ops.linear(flat, self.weight(f"up{i}", 12, 8))
        )
        return ops.add(h, ops.reshape(ops.linear(inner, self.weight(f"down{i}", 8, 12)), shape=(BATCH, LENGTH, 8)))

    def tokens(self, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng(1).integers(0, 20, (2, length))
        return ids, np.ascontiguousarray(np.broadcast_to(np.arange(length), ids.shape))


def caches(step: Step, slots: int, chunk: int, batch: int = 2) -> list[np.ndarray]:
    sizes = {"b": batch, "capacity": slots, "pages": batch * slots // 4}
    sizes |= {f"ring_{s.window}": s.window + chunk - 1 for s in step.state}
    return [np.zeros([int(d) for d in s.type.at(sizes).shape], s.type.dtype) for s in step.state]


@pytest.mark.parametrize("layout", [CacheLayout(), CacheLayout(ring=False), CacheLayout(page=4)], ids=str)
@pytest.mark.parametrize("chunks", [[9], [4, 1, 4], [1] * 9], ids=str)
def test_steps_equal_the_whole(layout: CacheLayout, chunks: list[int]) -> None:
    model = Model()
    ids, positions = model.tokens()
    (want,) = interpret(model.graph, [ids, positions])
    step = derive_step(model.graph, sequence="s", layout=layout)
    last = keep_last_token(step, "s")
    verify(step.graph)
    verify(last.graph)
    state, done = caches(step, 16, max(chunks)), 0
    start = np.zeros(2, np.int64)
    table = [np.array([[0, 2, 4, 6], [1, 3, 5, 7]], np.int32)] if layout.page else []
    for size in chunks:
        given = [ids[:, done : done + size], np.array([done]), start, *table, *state]
        out, *state = interpret(step.graph, given)
        np.testing.assert_allclose(out, want[:, done : done + size], atol=1e-5)
        np.testing.assert_allclose(interpret(last.graph, given)[0], out[:, -1:], atol=1e-5)
        done += size


def test_padded_prompts_equal_their_own() -> None:
    model = Model()
    ids, positions = model.tokens(6)
    (want,) = interpret(model.graph, [ids, positions])
    step = derive_step(model.graph, sequence="s")
    padded = np.concatenate([np.zeros((2, 3), np.int64), ids], 1)
    out, *_ = interpret(step.graph, [padded, np.array([0]), np.array([3, 3]), *caches(step, 16, 9)])
    np.testing.assert_allclose(out[:, 3:], want, atol=1e-5)


MIXERS: dict[str, tuple[Callable[[Node], Node], str]] = {
    "a running sum": (lambda h: ops.scan(h, axis=1, kind="sum"), "scan.*reads all earlier tokens along axis 1"),
    "a softmax over the sequence": (lambda h: ops.softmax(h, axis=1), "softmax.*mixes tokens along axis 1"),
    "a mean over the sequence": (
        lambda h: ops.add(h, ops.sum_(h, axes=(1,), keepdims=True)),
        "sum.*mixes tokens along axis 1",
    ),
    "tokens in reverse order": (lambda h: ops.flip(h, axes=(1,)), "flip.*mixes tokens along axis 1"),
    "a transposed sequence": (
        lambda h: ops.reshape(ops.transpose(h, perm=(0, 2, 1)), shape=(BATCH, LENGTH, 8)),
        "reshape.*takes the sequence",
    ),
    "attention that is not causal": (
        lambda h: ops.reshape(
            ops.attention(*[ops.reshape(h, shape=(BATCH, LENGTH, 2, 4))] * 3, scale=1.0), shape=(BATCH, LENGTH, 8)
        ),
        "attention.*not causal",
    ),
    "the number of tokens": (
        lambda h: ops.mul(h, ops.cast(ops.dim_value(value=LENGTH), dtype="float32")),
        "length of the whole sequence",
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_proof_refuses(name: str) -> None:
    mixing, reason = MIXERS[name]
    with pytest.raises(NotCausal, match=f"(?s){reason}"):
        derive_step(Model(1, mixing=mixing).graph, sequence="s")


def test_shared_keys_share_a_cache() -> None:
    def attend_again(h: Node) -> Node:
        parts = [ops.reshape(h, shape=(BATCH, LENGTH, 2, 4))] * 3
        first = ops.attention(*parts, scale=1.0, causal=True)
        return ops.add(
            h, ops.reshape(ops.attention(first, *parts[1:], scale=1.0, causal=True), shape=(BATCH, LENGTH, 8))
        )

    step = derive_step(Model(0, mixing=attend_again).graph, sequence="s")
    assert len(step.state) == 2


def test_ties_survive_packing() -> None:
    model = Model(1, tied=True)
    packed, _ = Pipeline((PackWeights(4, {"float32": 1}), FoldWeights())).run(model.graph)
    names = {n.name for n in packed.nodes if n.op.name == "weight"}
    assert not any(name == "table" for name in names)
    assert sum("table" in name for name in names) == 1
    inputs = model.tokens()
    np.testing.assert_allclose(interpret(packed, inputs)[0], interpret(model.graph, inputs)[0], atol=1e-6)


def test_folded_weights_are_named_by_their_whole_expression() -> None:
    x = placeholder("x", TensorType((2, 4), "float32"))
    w = weight("w", TensorType((6, 4), "float32"))
    halves = [ops.slice_(w, starts=(a, 0), stops=(a + 3, 4), steps=(1, 1)) for a in (0, 3)]
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    graph = Graph((x,), tuple(ops.linear(x, half) for half in halves), {"w": ArrayStorage(values)})
    folded = FoldWeights()(graph)
    assert len(folded.weights) == 2
    for got, want in zip(interpret(folded, [np.eye(2, 4, dtype=np.float32)]), (values[:3], values[3:]), strict=True):
        np.testing.assert_array_equal(got, want.T[:2])


def fused_projection(*cuts: tuple[int, int], more: Callable[[Node], tuple[Node, ...]] = lambda _: ()) -> Graph:
    """One projection of which slices are used."""
    rng = np.random.default_rng(0)
    x = placeholder("x", TensorType((BATCH, LENGTH, 4), "float32"))
    w, b = weight("w", TensorType((12, 4), "float32")), weight("b", TensorType((12,), "float32"))
    whole = ops.linear(x, w, b)
    parts = [
        ops.slice_(whole, starts=(0, 0, begin), stops=(BATCH, LENGTH, end), steps=(1, 1, 1)) for begin, end in cuts
    ]
    stored = {
        "w": ArrayStorage(rng.standard_normal((12, 4), np.float32)),
        "b": ArrayStorage(rng.standard_normal(12, np.float32)),
    }
    return verify(Graph((x,), (*map(ops.exp, parts), *more(whole)), stored))


def test_slices_of_a_projection_are_projections() -> None:
    graph = fused_projection((0, 8), (8, 10), (10, 12))
    split = verify(SplitProjections()(graph))
    assert split.count(ops.linear) == 3
    laid_out = verify(Pipeline(layout_passes(4, {"float32": 1})).run(split)[0])
    assert laid_out.count(ops.packed_projections) == 1 and not laid_out.count(ops.slice_, ops.packed_linear)
    assert SplitProjections()(split) is split
    x = np.random.default_rng(1).standard_normal((2, 3, 4), np.float32)
    for changed in (split, laid_out):
        for got, want in zip(interpret(changed, [x]), interpret(graph, [x]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("plus_one", [True, False], ids=["Gemma", "GPT-OSS"])
def test_norms_that_16_bits_leave_and_come_back_to(plus_one: bool) -> None:
    """The gain is float32 before it is multiplied, the cast back stands behind the product: one norm, which no cast is left beside."""
    x, w = placeholder("x", TensorType((BATCH, LENGTH, 4), "bfloat16")), weight("w", TensorType((4,), "bfloat16"))
    wide, gain = ops.cast(x, dtype="float32"), ops.cast(w, dtype="float32")
    mean = ops.div(ops.sum_(ops.square(wide), axes=(2,), keepdims=True), np.float32(4))
    normed = ops.mul(wide, ops.rsqrt(ops.add(mean, np.float32(1e-6))))
    y = ops.cast(ops.mul(normed, ops.add(gain, np.float32(1)) if plus_one else gain), dtype="bfloat16")
    rng = np.random.default_rng(0)
    graph = Graph((x,), (y,), {"w": ArrayStorage(rng.standard_normal(4).astype(numpy_dtype("bfloat16")))})
    fused = verify(Pipeline(default_passes()).run(graph)[0])
    (norm,) = (n for n in fused.nodes if n.parents)
    assert norm.op is ops.rms_norm and (norm.offset, norm.round_first) == (float(plus_one), False)
    given = [rng.standard_normal((2, 3, 4)).astype(numpy_dtype("bfloat16"))]
    np.testing.assert_array_equal(interpret(fused, given)[0], interpret(graph, given)[0])


@pytest.mark.parametrize(
    "graph",
    [
        fused_projection((0, 8), (6, 12)),
        fused_projection((0, 12)),
        fused_projection((0, 6), (6, 12), more=lambda whole: (ops.neg(whole),)),
        fused_projection((0, 6), (6, 12), more=lambda whole: (whole,)),
    ],
    ids=["overlapping", "one", "another user", "an output"],
)
def test_projections_that_stay_whole(graph: Graph) -> None:
    assert SplitProjections()(graph) is graph


def test_only_plain_layers_of_one_input_are_merged() -> None:
    rng = np.random.default_rng(0)
    x, y = (placeholder(name, TensorType((3, 4), "float32")) for name in "xy")
    stored = {name: ArrayStorage(rng.standard_normal((4, 4), np.float32)) for name in "abcde"}
    a, b, c, d, e = (weight(name, TensorType((4, 4), "float32")) for name in "abcde")
    outputs = (
        ops.linear(x, a),
        ops.linear(x, b, activation="relu"),
        ops.linear(x, c),
        ops.linear(y, d),
        ops.linear(x, e, None, y),
    )
    graph = Graph((x, y), outputs, stored)
    laid_out = verify(Pipeline(layout_passes(4, {"float32": 1})).run(graph)[0])
    assert laid_out.count(ops.packed_projections) == 1 and laid_out.count(ops.packed_linear) == 3
    given = [rng.standard_normal((3, 4), np.float32) for _ in range(2)]
    for got, want in zip(interpret(laid_out, given), interpret(graph, given), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_golden_pipeline(golden: Callable[[str, object], None]) -> None:
    graph = Model(1).graph
    golden("model-before", graph)
    fused, _ = Pipeline(default_passes()).run(graph)
    golden("model-fused", fused)
    step = derive_step(fused, sequence="s")
    golden("model-step", step.graph)
    golden(
        "model-last-packed",
        Pipeline(layout_passes(4, {"float32": 1})).run(keep_last_token(step, "s").graph)[0],
    )


def test_memory_plan_reuses_what_is_dead() -> None:
    x = placeholder("x", TensorType((LENGTH, 4), "float32"))
    h = x
    for _ in range(5):
        h = ops.exp(h)
    plan = plan_memory(Graph((x,), (h,)), {"s": 10})
    assert (plan.peak_bytes, plan.total_bytes) == (2 * 160, 5 * 160)
