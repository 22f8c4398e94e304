"""Emitters of products, also with weights in panels.

Products of half precision are summed in float32, those of integers in integers. What is rounded before a product in bfloat16 may go
through a matrix unit in bfloat16; float32 and float16 keep their own precision (`Value.dot`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.types import broadcast
from jisu.targets.tpu.stablehlo.build import HALF, Body, Value
from jisu.targets.tpu.stablehlo.elementwise import ACTIVATIONS, plain
from jisu.targets.tpu.stablehlo.moves import take


def summed(dtype: str) -> str:
    """The dtype in which products of `dtype` are summed."""
    return "float32" if dtype in HALF else "int32" if dtype in ("int8", "uint8", "int16") else dtype


def matmul(a: Value, b: Value) -> Value:
    """Product over the last two axes; leading axes broadcast."""
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    x, y = (v.broadcast((*batch, *v.shape[-2:])) for v in (a, b))  # type: ignore[arg-type]
    to = summed(a.dtype)
    if to == "int32":  # sums that wrap in int32 wrap alike in fewer bits
        x, y = x.astype(to), y.astype(to)
    if to == "int64":  # TPUs have no products of matrices of these
        return (x.expand(-1) * y.expand(-3)).sum(-2)
    pairs = [(i, i) for i in range(len(batch))]
    return x.dot(y, (-1, -2), pairs, to=to).astype(a.dtype)


def rounded(x: Value, dtype: str) -> Value:
    """float32 of numbers rounded to a dtype of half precision; anything else as it is."""
    return x.rounded(dtype) if dtype in HALF else x


def activate(x: Value, activation: str, dtype: str) -> Value:
    """The activation of numbers that are rounded to `dtype`, rounded."""
    return x if activation == "none" else rounded(ACTIVATIONS[activation](x), dtype)


def finish(product: Value, b: Value | None, r: Value | None, activation: str, dtype: str) -> Value:
    """activation(product + b) + r, rounded where a linear layer rounds."""
    if b is not None:
        product = product + b.wide()
    result = activate(rounded(product, dtype), activation, dtype)
    return (result if r is None else result + r.wide()).astype(dtype)


def gate(a: Value, b: Value, activation: str, dtype: str) -> Value:
    """activation(a) * b of two products."""
    return (activate(rounded(a, dtype), activation, dtype) * rounded(b, dtype)).astype(dtype)


def rows_dot(x: Value, w: Value) -> Value:
    """x [*b, k] times w [n, k]: [*b, n], summed wide."""
    return x.dot(w, (-1, 1), to=summed(x.dtype))


def linear(x: Value, w: Value, b: Value | None, r: Value | None, *, activation: str) -> Value:
    """`jisu.compiler.ops.linear`."""
    return finish(rows_dot(x, w), b, r, activation, x.dtype)


def gated(x: Value, g: Value, u: Value, *, activation: str) -> Value:
    """`jisu.compiler.ops.gated_linear`."""
    return gate(rows_dot(x, g), rows_dot(x, u), activation, x.dtype)


def _conv(x: Value, w: Value, *, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Value:
    dtype, to = x.dtype, summed(x.dtype)
    if to == "int32":
        x, w = x.astype(to), w.astype(to)
    space = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
    ]
    shape = (x.shape[0], w.shape[0], *space)
    axes = ", ".join(map(str, range(len(space))))
    result = Value(x.body, "", shape, to)
    exact = ", precision_config = [#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>]" * (
        dtype in ("float16", "float32")
    )
    text = (
        f"stablehlo.convolution({x.name}, {w.name}) dim_numbers = [b, f, {axes}]x[o, i, {axes}]->[b, f, {axes}], window = "
        f"{{stride = {list(strides)}, rhs_dilate = {list(dilations)}}} {{batch_group_count = 1 : i64, feature_group_count = "
        f"{groups} : i64{exact}}} : ({x.type}, {w.type}) -> {result.type}"
    )
    return x.body.value(text, shape, to).astype(dtype)


# --- Weights in panels ------------------------------------------------------------------------------------------------------


def pack(w: Value, *, panel: int, pair: int) -> Value:
    """[..., n, k] as [..., panels, words, panel(, pair)], padded with zeros."""
    *lead, n, k = w.shape
    panels, words = -(-n // panel), -(-k // pair)
    whole = w.padded(-2, panels * panel).padded(-1, words * pair).reshape(*lead, panels, panel, words, pair)
    m = len(lead)
    turned = whole.transpose(*range(m), m, m + 2, m + 1, m + 3)
    return turned if pair > 1 else turned.reshape(*lead, panels, words, panel)


def unpack(w: Value, n: int, k: int) -> Value:
    """The matrix [n, k] of [panels, words, panel(, pair)]."""
    whole = w if w.rank == 4 else w.expand(-1)
    panels, words, panel, pair = whole.shape
    return whole.transpose(0, 2, 1, 3).reshape(panels * panel, words * pair).slice((0, 0), (n, k))


def halves(w: Value, n: int, k: int, axis: int = 1) -> tuple[Value, Value]:
    """Gate and up [n, k] of what `pack_gated` made."""
    return unpack(w.pick(axis, 0), n, k), unpack(w.pick(axis, 1), n, k)


def _pack_gated(g: Value, u: Value, *, panel: int, pair: int) -> Value:
    both = [pack(w, panel=panel, pair=pair) for w in (g, u)]
    return g.body.stack(both, g.rank - 1)


def _packed_linear(x: Value, w: Value, b: Value | None, r: Value | None, *, outputs: int, activation: str) -> Value:
    return linear(x, unpack(w, outputs, x.shape[-1]), b, r, activation=activation)


def _packed_gated(x: Value, w: Value, *, outputs: int, activation: str) -> Value:
    return gated(x, *halves(w, outputs, x.shape[-1]), activation=activation)


def _packed_projections(
    body: Body, x: Value, *operands: Value, outputs: tuple[int, ...], biased: bool
) -> tuple[Value, ...]:
    weights = operands[: len(outputs)]
    biases = operands[len(outputs) :] if biased else (None,) * len(outputs)
    return tuple(
        linear(x, unpack(w, n, x.shape[-1]), b, None, activation="none")
        for w, b, n in zip(weights, biases, outputs, strict=True)
    )


def _packed_take(w: Value, indices: Value, *, rows: int, width: int) -> Value:
    return take(unpack(w, rows, width), indices, axis=0)


# --- Experts ----------------------------------------------------------------------------------------------------------------


def _expert(x: Value, gate_up: Value, down: Value, activation: str, dtype: str) -> Value:
    """x [t, h] through one expert, gate_up [2i, h] and down [h, i]: rounded float32 [t, h]."""
    both = rounded(rows_dot(x, gate_up), dtype)
    half = both.shape[1] // 2
    inner = gate(both.part(1, 0, half), both.part(1, half, 2 * half), activation, dtype)
    return rounded(rows_dot(inner, down), dtype)


def _looked_up(w: Value, e: Value) -> Value:
    """The matrix of expert e, int32 []; the first or last one for a number outside."""
    zero = e.body.full(0, (), "int32")
    return w.dynamic_slice([e, zero, zero], (1, *w.shape[1:])).reshape(*w.shape[1:])


def experts(x: Value, index: Value, scores: Value, gate_up: Value, down: Value, *, activation: str) -> Value:
    """`jisu.compiler.ops.experts`: one choice of a token after the other, or one expert after the other for all tokens.

    The former reads the weights of an expert as often as it is chosen, the latter those of each once and multiplies all tokens by all
    experts; the smaller number of steps decides. Float32 sums over a token's experts are in the order of these steps.
    """
    dtype, count, (tokens, chosen) = x.dtype, gate_up.shape[0], index.shape
    index = index.astype("int32")
    zeros = x.body.full(0, x.shape, summed(dtype))

    def one_choice(
        i: Value, total: Value, x: Value, index: Value, scores: Value, up: Value, down: Value
    ) -> list[Value]:
        t, j, zero = i / chosen, i % chosen, i.body.full(0, (), "int32")
        e, score = (v.dynamic_slice([t, j], (1, 1)) for v in (index, scores))
        place = e.reshape()
        row = x.dynamic_slice([t, zero], (1, x.shape[1]))
        out = _expert(row, _looked_up(up, place), _looked_up(down, place), activation, dtype)
        there = (e >= 0) & (e < count)
        sum_ = total.dynamic_slice([t, zero], (1, x.shape[1])) + there.select(rounded(out * score.wide(), dtype), 0)
        return [total.dynamic_update(sum_, [t, zero]), x, index, scores, up, down]

    def one_expert(
        e: Value, total: Value, x: Value, index: Value, scores: Value, up: Value, down: Value
    ) -> list[Value]:
        out = _expert(x, _looked_up(up, e), _looked_up(down, e), activation, dtype)
        for j in range(chosen):
            score = rounded(out * scores.part(1, j, j + 1).wide(), dtype)
            total = total + index.part(1, j, j + 1).equals(e).select(score, 0)
        return [total, x, index, scores, up, down]

    few = tokens * chosen < count
    state = [zeros, x, index, scores, gate_up, down]
    return x.body.loop(tokens * chosen if few else count, state, one_choice if few else one_expert)[0].astype(dtype)


def _packed_experts(
    x: Value, index: Value, scores: Value, up: Value, down: Value, *, inner: int, activation: str
) -> Value:
    width, body = x.shape[1], x.body
    each = range(up.shape[0])
    gate_up = body.stack([body.concat(halves(up.pick(0, e), inner, width), 0) for e in each], 0)
    out = body.stack([unpack(down.pick(0, e), width, inner) for e in each], 0)
    return experts(x, index, scores, gate_up, out, activation=activation)


def _expert_linear(x: Value, index: Value, w: Value, b: Value | None) -> Value:
    """`jisu.compiler.ops.expert_linear`, one choice of a token after the other or one expert after the other, as `experts`."""
    count, (tokens, chosen), width, shared = w.shape[0], index.shape, w.shape[1], x.shape[1] == 1
    index, body = index.astype("int32"), x.body
    given = [x, index, w, *([] if b is None else [b])]

    def layer(rows: Value, e: Value, w: Value, bias: list[Value]) -> Value:
        """rows [m, c] through expert e, int32 []."""
        zero = zero_of(e)
        own = [v.dynamic_slice([e, zero], (1, width)) for v in bias]
        return finish(rows_dot(rows, _looked_up(w, e)), own[0] if own else None, None, "none", rows.dtype)

    def zero_of(e: Value) -> Value:
        return e.body.full(0, (), "int32")

    def one_choice(i: Value, result: Value, x: Value, index: Value, w: Value, *bias: Value) -> list[Value]:
        t, j, zero = i / chosen, i % chosen, zero_of(i)
        e = index.dynamic_slice([t, j], (1, 1))
        row = x.dynamic_slice([t, zero if shared else j, zero], (1, 1, x.shape[2])).reshape(1, x.shape[2])
        out = ((e >= 0) & (e < count)).select(layer(row, e.reshape(), w, list(bias)), 0)
        return [result.dynamic_update(out.reshape(1, 1, width), [t, j, zero]), x, index, w, *bias]

    def one_expert(e: Value, result: Value, x: Value, index: Value, w: Value, *bias: Value) -> list[Value]:
        own = layer(x.reshape(tokens * x.shape[1], x.shape[2]), e, w, list(bias)).reshape(tokens, x.shape[1], width)
        mine = index.equals(e).reshape(tokens, chosen, 1)
        return [mine.select(own.broadcast(result.shape), result), x, index, w, *bias]

    few = tokens * chosen < count
    zeros = body.full(0, (tokens, chosen, width), x.dtype)
    return body.loop(tokens * chosen if few else count, [zeros, *given], one_choice if few else one_expert)[0]


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.matmul: plain(matmul),
    ops.linear: plain(linear),
    ops.gated_linear: plain(gated),
    ops.conv: plain(_conv),
    ops.pack: plain(pack),
    ops.pack_gated: plain(_pack_gated),
    ops.packed_linear: plain(_packed_linear),
    ops.packed_gated_linear: plain(_packed_gated),
    ops.packed_projections: _packed_projections,
    ops.packed_take: plain(_packed_take),
    ops.experts: plain(experts),
    ops.packed_experts: plain(_packed_experts),
    ops.expert_linear: plain(_expert_linear),
}
