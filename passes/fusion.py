"""Fusion by declared rules: from the spellings that real models use to the ops that targets have kernels for.

Each group is a tuple of rules: linear layers and their epilogues, norms, rotary embedding, attention, gated MLPs. The
test suite proves every rule on its own (`jisu.testing.check_rule`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, WEIGHT, Graph, Node
from jisu.compiler.rewrite import (
    Guard,
    Match,
    Rule,
    bind,
    dtype_in,
    either,
    guard,
    maybe,
    rank_is,
    rewrite,
    scalar,
    used_once,
    variable,
    variables,
)
from jisu.compiler.types import Dim, is_float, product, same_dim, same_shape
from jisu.passes.layout import is_stored

x, w, b, r = variables("x w b r")
eps, count = scalar("eps"), scalar("count")

# --- Linear layers -------------------------------------------------------------------------------------------------

_product = ops.linear(x, w)
_biased = ops.linear(x, w, variable("b", optional=True))
_full = ops.linear(x, w, variable("b", optional=True), activation=bind("act"))
_weight_matrix = Guard(
    "a matrix of weights",
    lambda m: None if m["w"].rank == 2 and _from_weights(m["w"]) else "the right operand is no matrix of weights",
)


def _from_weights(node: Node) -> bool:
    """Whether a value is a stored tensor, a matrix of codes or a sparse one, or a view of one."""
    while node.op in (ops.transpose, ops.reshape, ops.cast) and node.operands[0] is not None:
        node = node.operands[0]
    return node.op is WEIGHT or (node.op in (ops.dequantize, ops.expand) and is_stored(node))


def _linear_of_product(m: Match) -> Node:
    return ops.linear(m["x"], ops.transpose(m["w"], perm=(1, 0)))


def _same_shapes(a: str, b: str) -> Guard:
    return guard("operands of one shape", lambda m: same_shape(m[a].shape, m[b].shape))


def _activated(name: str) -> Rule:
    return Rule(
        f"{name} joins linear",
        _ACTIVATION_PATTERNS[name](_biased),
        ops.linear(x, w, variable("b", optional=True), activation=name),
        (used_once(_biased),),
        {"x": "float[*b k]", "w": "float[n k]", "b": "float[n]"},
    )


_ACTIVATION_PATTERNS: dict[str, Any] = {
    "relu": ops.relu,
    "gelu": lambda p: ops.gelu(p, approximate="none"),
    "gelu_tanh": lambda p: ops.gelu(p, approximate="tanh"),
    "silu": ops.silu,
    "sigmoid": ops.sigmoid,
}

_LINEAR_TYPES = {"x": "float[*b k]", "w": "float[n k]"}

_cube = either(ops.pow_(x, 3.0), ops.mul(x, ops.square(x)))
_inner = ops.add(x, ops.mul(_cube, scalar("cubic")))
_curve = ops.add(ops.tanh(ops.mul(_inner, scalar("slope"))), 1.0)
_near_gelu = guard(
    "the constants of the approximation",
    lambda m: abs(m["cubic"] - 0.044715) < 1e-7 and abs(m["slope"] - 0.7978845608) < 1e-6,
)

ACTIVATIONS: tuple[Rule, ...] = (
    Rule(
        "tanh approximation of gelu",
        ops.mul(ops.mul(x, 0.5), _curve),
        ops.gelu(x, approximate="tanh"),
        # Half precision rounds in between.
        (_near_gelu, dtype_in(x, "float32", "float64")),
        {"x": "float32[*b k]"},
        {"cubic": (0.044715,), "slope": (0.7978845608028654,)},
    ),
)

PROJECTIONS: tuple[Rule, ...] = (
    Rule(
        "product with weights is linear",
        ops.matmul(x, w),
        _linear_of_product,
        (_weight_matrix, guard("floats", lambda m: is_float(m["x"].dtype))),
        {"x": "float[*b m k]", "w": "weight float[k n]"},
    ),
    Rule(
        "bias joins linear",
        ops.add(_product, b),
        ops.linear(x, w, b),
        # A shared product would be computed twice; a full-rank bias is a residual. Half precision rounds in between.
        (used_once(_product), rank_is(b, 1), _same_shapes("b", "b"), dtype_in(x, "float32", "float64"),
         guard("one bias per output", lambda m: same_dim(m["b"].shape[0], m["w"].shape[0]))),
        {**_LINEAR_TYPES, "b": "float[n]"},
    ),
)  # fmt: skip

_flattened = ops.reshape(x, shape=bind("flat"))


def _linear_below(m: Match) -> Node | None:
    """linear(reshape(x)) as reshape(linear(x)), where x's last axes are the layer's inputs together."""
    node, shape, width = m.root, m["x"].shape, m["w"].shape[1]
    for cut in range(len(shape) - 1, -1, -1):
        if same_dim(product(shape[cut:]), width):
            rows = (*shape[:cut], width)
            if same_shape(rows, m["flat"]):
                return None
            below = ops.linear(ops.reshape(m["x"], shape=rows), m["w"], m["b"], activation=node.activation)
            return ops.reshape(below, shape=node.shape)
    return None


_flattened_twin = ops.reshape(variable("y"), shape=bind("twin"))
_flat_product = ops.reshape(_biased, shape=bind("flat"))


def _activation_below(name: str) -> Rule:
    apply = _ACTIVATION_PATTERNS[name]
    return Rule(
        f"{name} above a reshape of a projection",
        apply(_flat_product),
        lambda m: ops.reshape(apply(m.at(_biased)), shape=m.root.shape),
        (used_once(_flat_product),),
        {"x": "float[2 3 4]", "w": "float[5 4]", "b": "float[5]"},
        {"flat": ((6, 5),)},
    )


FLAT_PROJECTIONS: tuple[Rule, ...] = (
    *(_activation_below(name) for name in _ACTIVATION_PATTERNS),
    Rule(
        "product above two reshapes",
        ops.mul(_flattened, _flattened_twin),
        lambda m: ops.reshape(ops.mul(m["x"], m["y"]), shape=m.root.shape),
        (
            used_once(_flattened, _flattened_twin),
            guard("operands of one shape", lambda m: same_shape(m["x"].shape, m["y"].shape) and same_shape(m["flat"], m["twin"])),
        ),
        {"x": "float[2 3 4]", "y": "float[2 3 4]"},
        {"flat": ((6, 4),), "twin": ((6, 4),)},
    ),
    Rule(
        "linear above a reshape",
        ops.linear(_flattened, w, variable("b", optional=True), activation=bind("act")),
        _linear_below,
        (),
        {"x": "float[2 3 2 2]", "w": "float[n 4]", "b": "float[n]"},
        {"flat": ((6, 4), (3, 2, 4)), "act": ("none", "silu")},
    ),
)  # fmt: skip
"""Rows of a matrix are the leading axes of what was flattened: the reshape goes behind, where it often meets its inverse."""

EPILOGUES: tuple[Rule, ...] = (
    *(_activated(name) for name in _ACTIVATION_PATTERNS),
    Rule(
        "residual joins linear",
        ops.add(r, _full),
        ops.linear(x, w, variable("b", optional=True), r, activation=bind("act")),
        (used_once(_full), guard("a residual of the result's shape", lambda m: same_shape(m["r"].shape, m.root.shape)
                                 and same_shape(m.at(_full).shape, m.root.shape) and m["r"].op is not CONSTANT)),
        {**_LINEAR_TYPES, "b": "float[n]", "r": "float[*b n]"},
        {"act": ("none", "relu")},
    ),
)  # fmt: skip

# --- Gated MLP -----------------------------------------------------------------------------------------------------

_gate, _up = variables("gate up")
_gate_product = ops.linear(x, _gate, activation=bind("act"))
_up_product = ops.linear(x, _up)

GATED: tuple[Rule, ...] = (
    Rule(
        "gate and up projections are one",
        ops.mul(_gate_product, _up_product),
        ops.gated_linear(x, _gate, _up, activation=bind("act")),
        (
            used_once(_gate_product, _up_product),
            guard("gate and up of one type", lambda m: m["gate"].type == m["up"].type),
            guard("an activated gate", lambda m: m["act"] != "none"),
        ),
        {"x": "float[*b k]", "gate": "float[n k]", "up": "float[n k]"},
        {"act": ("silu", "gelu_tanh")},
    ),
)


def _split_gate(m: Match) -> Node | None:
    """silu(y[..., :f]) * y[..., f:] of one product y is a gated product of the weight's halves, in either order."""
    whole: Node = m.at(_fused_product)
    low, high = m.root.operands
    assert low is not None and high is not None
    gate_slice = m.at(_gate_slice)
    up_slice = m.at(_up_slice)
    full: Dim = m["w"].shape[0]
    if not isinstance(full, int) or full % 2:
        return None
    half = full // 2
    halves = []
    for part in (gate_slice, up_slice):
        ends = {
            (s, e)
            for s, e, n in zip(part.starts[:-1], part.stops[:-1], whole.shape[:-1], strict=True)
            if s != 0 or not same_dim(e, n)
        }
        if (
            ends
            or set(part.steps) != {1}
            or part.stops[-1] - part.starts[-1] != half
            or part.starts[-1] not in (0, half)
        ):
            return None
        start = part.starts[-1]
        columns = m["w"].shape[1]
        halves.append(ops.slice_(m["w"], starts=(start, 0), stops=(start + half, columns), steps=(1, 1)))
    name = m["act"] if "act" in m.bindings else "none"
    return ops.gated_linear(m["x"], *halves, activation=name)


_fused_product = ops.linear(x, w)
_gate_slice = ops.slice_(_fused_product, starts=bind("gs"), stops=bind("ge"), steps=bind("gt"))
_up_slice = ops.slice_(_fused_product, starts=bind("us"), stops=bind("ue"), steps=bind("ut"))


def _split_rule(name: str) -> Rule:
    def build(m: Match) -> Node | None:
        bound = attrs.evolve(m, bindings={**m.bindings, "act": name})
        return _split_gate(bound)

    gate = _ACTIVATION_PATTERNS[name](_gate_slice)
    return Rule(
        f"halves of one projection, gated by {name}",
        ops.mul(gate, _up_slice),
        build,
        (used_once(gate, _gate_slice, _up_slice),
         Guard("a product used by its halves only", lambda m: None if m.uses(m.at(_fused_product)) == 2 else "the product has other users")),
        {"x": "float[3 4]", "w": "float[6 4]"},
        {"gs": ((0, 0),), "ge": ((3, 3),), "gt": ((1, 1),), "us": ((0, 3),), "ue": ((3, 6),), "ut": ((1, 1),)},
    )  # fmt: skip


GATED = (*GATED, *(_split_rule(name) for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")))

# --- Norms ---------------------------------------------------------------------------------------------------------

_wide = maybe(ops.cast, x, dtype="float32")
_mean_square = ops.div(ops.sum_(ops.square(_wide), axes=bind("axes"), keepdims=True), count)
_inverse = ops.rsqrt(ops.add(_mean_square, eps))
_normed = ops.mul(_wide, _inverse)
_rounded = ops.cast(_normed, dtype=bind("rounded"))


def _last_axis(m: Match) -> bool:
    rank = m["x"].rank
    return bool(m["axes"] == (rank - 1,)) and same_dim(m["x"].shape[-1], int(m["count"]))


_over_last = guard("the mean over the whole last axis", _last_axis)
_gain = guard(
    "a gain per channel",
    lambda m: m["w"].rank == 1 and m["w"].dtype == m["x"].dtype and m["w"].shape == m["x"].shape[-1:],
)
_NORM_TYPES = {"x": "float32[a b 4]", "w": "float32[4]"}
_NORM_ATTRIBUTES = {"axes": ((2,),), "count": (4.0,), "eps": (1e-6, 1e-2)}


def _gained(offset: float, round_first: bool) -> Any:
    return lambda m: ops.rms_norm(m["x"], m["w"], eps=m["eps"], offset=offset, round_first=round_first)


def _bare_norm(m: Match) -> Node | None:
    normed = ops.rms_norm(m["x"], eps=m["eps"])
    return normed if normed.dtype == m.root.dtype else None


NORMS: tuple[Rule, ...] = (
    # The gain 1 + w, which comes first, as any sum is a gain for those behind; the gain behind the rounding (in float32 there is none), and the gain
    # in float32 before it.
    Rule("RMS norm, gain of 1 + w",
         either(ops.cast(ops.mul(_normed, ops.add(ops.cast(w, dtype="float32"), 1.0)), dtype=bind("rounded")),
                ops.mul(_normed, ops.add(w, 1.0))), _gained(1.0, False),
         (_over_last, _gain, guard("the root in x's dtype", lambda m: m.root.dtype == m["x"].dtype)), _NORM_TYPES,
         {**_NORM_ATTRIBUTES, "rounded": ("float32",)}),
    Rule("RMS norm, gain on the rounded value", ops.mul(w, either(_rounded, _normed)), _gained(0.0, True),
         (_over_last, _gain, guard("the root in x's dtype", lambda m: m.root.dtype == m["x"].dtype)), _NORM_TYPES,
         {**_NORM_ATTRIBUTES, "rounded": ("float32",)}),
    Rule("RMS norm, gain in float32",
         ops.cast(ops.mul(_normed, ops.cast(w, dtype="float32")), dtype=bind("rounded")), _gained(0.0, False),
         (_over_last, _gain, guard("the root in x's dtype", lambda m: m.root.dtype == m["x"].dtype)),
         {"x": "bfloat16[a b 4]", "w": "bfloat16[4]"}, {**_NORM_ATTRIBUTES, "rounded": ("bfloat16",)}),
)  # fmt: skip

_mean = ops.div(ops.sum_(x, axes=bind("axes"), keepdims=True), count)
_centred = ops.sub(x, _mean)
_wide_layer_norm = ops.layer_norm(
    ops.cast(x, dtype="float32"), either(ops.cast(w, dtype="float32"), w), variable("b", optional=True), eps=bind("eps")
)
_unbiased = ops.layer_norm(x, w, eps=bind("eps"))
_BARE_GAIN = {"offset": 0.0, "round_first": bind("first")}


def _narrow_layer_norm(m: Match) -> Node | None:
    gain, bias = m["w"], m["b"]
    if bias is not None and bias.op is ops.cast and bias.operands[0].dtype == m.root.dtype:
        bias = bias.operands[0]
    fits = all(p is None or p.dtype == m.root.dtype for p in (gain, bias))
    return ops.layer_norm(m["x"], gain, bias, eps=m["eps"]) if fits and m["x"].dtype == m.root.dtype else None


LAYER_NORMS: tuple[Rule, ...] = (
    # Written out by hand; in float32 alone, as half precision would round in between.
    Rule("RMS norm of centred values", ops.rms_norm(_centred, variable("w", optional=True), eps=bind("eps"), **_BARE_GAIN),
         ops.layer_norm(x, variable("w", optional=True), None, eps=bind("eps")),
         (_over_last, dtype_in(x, "float32", "float64")), {"x": "float32[a b 4]", "w": "float32[4]"},
         {"axes": ((2,),), "count": (4.0,), "eps": (1e-6, 1e-2), "first": (True, False)}),
    Rule("bias joins layer norm", ops.add(_unbiased, b), ops.layer_norm(x, w, b, eps=bind("eps")),
         (used_once(_unbiased), guard("a bias per channel", lambda m: m["b"].type == m["w"].type), dtype_in(x, "float32", "float64")),
         {"x": "float32[a b 4]", "w": "float32[4]", "b": "float32[4]"}, {"eps": (1e-5,)}),
    Rule("layer norm computed in float32", ops.cast(_wide_layer_norm, dtype=bind("narrow")), _narrow_layer_norm, (),
         {"x": "bfloat16[a b 4]", "w": "bfloat16[4]"}, {"narrow": ("bfloat16",), "eps": (1e-5,)}),
)  # fmt: skip

_wide_rms_norm = ops.rms_norm(
    ops.cast(x, dtype="float32"),
    variable("w", optional=True),
    eps=bind("eps"),
    offset=bind("offset"),
    round_first=bind("first"),
)


def _narrow_rms_norm(m: Match) -> Node | None:
    gain, narrow = m["w"], m.root.dtype
    if gain is not None and gain.op is ops.cast:
        gain = gain.operands[0]
    if m["x"].dtype != narrow or (gain is not None and gain.dtype != narrow):
        return None
    return ops.rms_norm(m["x"], gain, eps=m["eps"], offset=m["offset"], round_first=False)


BARE_NORMS: tuple[Rule, ...] = (
    # Behind the rules with a gain: those would never see the inner product again.
    Rule("RMS norm without gain", either(_rounded, _normed), _bare_norm,
         (_over_last, guard("the root in x's dtype", lambda m: m.root.dtype == m["x"].dtype)), _NORM_TYPES,
         {**_NORM_ATTRIBUTES, "rounded": ("float32",)}),
    # A gain that is made float32 beforehand lets a product in float32 match before the cast behind it is seen.
    Rule("RMS norm computed in float32", ops.cast(_wide_rms_norm, dtype=bind("narrow")), _narrow_rms_norm,
         (used_once(_wide_rms_norm), guard("a cast back to 16 bits", lambda m: m.root.dtype in ("bfloat16", "float16"))),
         {"x": "bfloat16[a b 4]", "w": "bfloat16[4]"},
         {"narrow": ("bfloat16",), "eps": (1e-6,), "offset": (0.0, 1.0), "first": (True, False)}),
)  # fmt: skip

# --- Rotary embedding ----------------------------------------------------------------------------------------------

cos, sin = variables("cos sin")
_high = ops.slice_(x, starts=bind("hs"), stops=bind("he"), steps=bind("ht"))
_low = ops.slice_(x, starts=bind("ls"), stops=bind("le"), steps=bind("lt"))
_half_turned = ops.concat(ops.neg(_high), _low, axis=3)
_turn = ops.add(ops.mul(x, cos), ops.mul(_half_turned, sin))


def _is_last_slice(m: Match, kind: str, start: int, step: int) -> bool:
    """Whether slice `kind` (h or l) takes start::step of the last axis (start: half of it) and all of the others."""
    shape = m["x"].shape
    starts, stops, steps = m[f"{kind}s"], m[f"{kind}e"], m[f"{kind}t"]
    others = all(
        s == 0 and same_dim(e, n) and t == 1
        for s, e, t, n in zip(starts[:-1], stops[:-1], steps[:-1], shape[:-1], strict=True)
    )
    width = shape[-1]
    if not others or not isinstance(width, int) or steps[-1] != step:
        return False
    if step == 2:  # of the odd channels up to the width or to the last of them
        return bool(starts[-1] == start and width % 2 == 0 and width - 1 + start <= stops[-1] <= width)
    begin = start * width // 2
    return bool(starts[-1] == begin and stops[-1] == begin + width // 2)


def _angles(m: Match) -> str | None:
    """cos and sin [b or 1, 1, s, r] (heads second) or [b or 1, s, 1, r] (heads third), as the axis of size 1 tells."""
    for name in ("cos", "sin"):
        node = m[name]
        if node.rank != 4 or not same_dim(node.shape[3], m["x"].shape[3]):
            return "cos and sin of rank 4 and x's width are needed"
        if node.shape[1] != 1 and node.shape[2] != 1:
            return "cos and sin must be shared by the heads"
    return None if same_shape(m["cos"].shape, m["sin"].shape) else "cos and sin differ in shape"


def _rotary(interleaved: bool) -> Callable[[Match], Node | None]:
    def build(m: Match) -> Node | None:
        value, c, s = m["x"], m["cos"], m["sin"]
        heads_second = c.shape[1] == 1 and same_dim(c.shape[2], value.shape[2])
        if not heads_second and not (c.shape[2] == 1 and same_dim(c.shape[1], value.shape[1])):
            return None
        length = c.shape[2] if heads_second else c.shape[1]
        flat = (c.shape[0], length, c.shape[3])
        c3, s3 = ops.reshape(c, shape=flat), ops.reshape(s, shape=flat)
        if not heads_second:
            return ops.rotary(value, c3, s3, interleaved=interleaved)
        swapped = ops.transpose(value, perm=(0, 2, 1, 3))
        return ops.transpose(ops.rotary(swapped, c3, s3, interleaved=interleaved), perm=(0, 2, 1, 3))

    return build


def _doubled(m: Match) -> Match:
    """The match with cos and sin of the whole width where those of half the channels were found: both halves turn by the same."""
    return attrs.evolve(
        m, bindings={**m.bindings, **{name: ops.concat(m[name], m[name], axis=3) for name in ("cos", "sin")}}
    )


def _turned_by_half_angles(m: Match) -> Node | None:
    return _rotary(False)(_doubled(m))


_half_angles = Guard(
    "angles of half the channels, shared by the heads",
    lambda m: _angles(_doubled(m)) if m["cos"].rank == m["sin"].rank == 4 else "cos and sin of rank 4 are needed",
)
_turned_halves = ops.concat(
    ops.sub(ops.mul(_low, cos), ops.mul(_high, sin)), ops.add(ops.mul(_high, cos), ops.mul(_low, sin)), axis=3
)
_shared_angles = Guard("angles shared by the heads", _angles)
_even = ops.slice_(x, starts=bind("ls"), stops=bind("le"), steps=bind("lt"))
_odd = ops.slice_(x, starts=bind("hs"), stops=bind("he"), steps=bind("ht"))
_pairs = ops.reshape(
    ops.concat(ops.reshape(ops.neg(_odd), shape=bind("one")), ops.reshape(_even, shape=bind("two")), axis=4),
    shape=bind("pairs"),
)
_turn_pairs = ops.add(ops.mul(x, cos), ops.mul(_pairs, sin))
_part = ops.slice_(x, starts=bind("ls"), stops=bind("le"), steps=bind("lt"))
_rest = ops.slice_(x, starts=bind("hs"), stops=bind("he"), steps=bind("ht"))
_part_turned = ops.rotary(_part, cos, sin, interleaved=bind("interleaved"))


def _splits_last(m: Match) -> bool:
    """The two slices cut the last axis in two and leave the others whole."""
    shape = m["x"].shape
    whole = all(
        m[k + "s"][i] == 0 and same_dim(m[k + "e"][i], shape[i]) and m[k + "t"][i] == 1
        for k in "lh"
        for i in range(len(shape) - 1)
    )
    last = m["ls"][-1] == 0 and m["le"][-1] == m["hs"][-1] and same_dim(m["he"][-1], shape[-1])
    return bool(whole and last and m["lt"][-1] == m["ht"][-1] == 1)


def _unwrapped(m: Match) -> Node:
    """transpose(slice(transpose(x))) where the transposes undo each other is a slice of x."""
    swap = m["perm"]
    moved = {k: tuple(m[k][p] for p in swap) for k in ("ls", "le", "lt")}
    return ops.slice_(m["x"], starts=moved["ls"], stops=moved["le"], steps=moved["lt"])


def _whole_turned(m: Match) -> Node:
    turned = ops.rotary(m["x"], m["cos"], m["sin"], interleaved=m["interleaved"])
    return ops.transpose(turned, perm=(0, 2, 1, 3))


def _splits_swapped(m: Match) -> bool:
    """As `_splits_last`, where the second slice is taken behind the transpose of the heads."""
    swap = (0, 2, 1, 3)
    moved = {k: tuple(m[k][p] for p in swap) for k in ("hs", "he", "ht")}
    return _splits_last(attrs.evolve(m, bindings={**m.bindings, **moved}))


_swapped_slice = ops.slice_(ops.transpose(x, perm=bind("perm")), starts=bind("ls"), stops=bind("le"), steps=bind("lt"))
_swapped_rest = ops.slice_(ops.transpose(x, perm=(0, 2, 1, 3)), starts=bind("hs"), stops=bind("he"), steps=bind("ht"))
_swapped_turned = ops.transpose(_part_turned, perm=(0, 2, 1, 3))
_PAIR_TYPES = {"x": "float[2 3 2 4]", "cos": "float[1 1 2 4]", "sin": "float[1 1 2 4]"}

ROTARY: tuple[Rule, ...] = (
    Rule("rotary embedding of halves", _turn, _rotary(False),
         (_shared_angles, guard("slices into halves", lambda m: _is_last_slice(m, "h", 1, 1) and _is_last_slice(m, "l", 0, 1))),
         _PAIR_TYPES,
         {"hs": ((0, 0, 0, 2),), "he": ((2, 3, 2, 4),), "ht": ((1, 1, 1, 1),), "ls": ((0, 0, 0, 0),), "le": ((2, 3, 2, 2),),
          "lt": ((1, 1, 1, 1),)}),
    Rule("rotary embedding, each half by itself", _turned_halves, _turned_by_half_angles,
         (guard("slices into halves", lambda m: _is_last_slice(m, "h", 1, 1) and _is_last_slice(m, "l", 0, 1)), _half_angles),
         {"x": "float[2 3 2 4]", "cos": "float[1 1 2 2]", "sin": "float[1 1 2 2]"},
         {"hs": ((0, 0, 0, 2),), "he": ((2, 3, 2, 4),), "ht": ((1, 1, 1, 1),), "ls": ((0, 0, 0, 0),), "le": ((2, 3, 2, 2),),
          "lt": ((1, 1, 1, 1),)}),
    Rule("rotary embedding of neighbours", _turn_pairs, _rotary(True),
         (_shared_angles, guard("slices of odd and even channels", lambda m: _is_last_slice(m, "h", 1, 2) and _is_last_slice(m, "l", 0, 2))),
         _PAIR_TYPES,
         {"hs": ((0, 0, 0, 1),), "he": ((2, 3, 2, 4),), "ht": ((1, 1, 1, 2),), "ls": ((0, 0, 0, 0),), "le": ((2, 3, 2, 4),),
          "lt": ((1, 1, 1, 2),), "one": ((2, 3, 2, 2, 1),), "two": ((2, 3, 2, 2, 1),), "pairs": ((2, 3, 2, 4),)}),
    Rule("rotary embedding of a part of the channels", ops.concat(_part_turned, _rest, axis=3),
         ops.rotary(x, cos, sin, interleaved=bind("interleaved")), (guard("a cut of the last axis", _splits_last),),
         {"x": "float[2 3 2 6]", "cos": "float[1 3 4]", "sin": "float[1 3 4]"},
         {"ls": ((0, 0, 0, 0),), "le": ((2, 3, 2, 4),), "lt": ((1, 1, 1, 1),), "hs": ((0, 0, 0, 4),), "he": ((2, 3, 2, 6),),
          "ht": ((1, 1, 1, 1),), "interleaved": (False, True)}),
    Rule("slice between transposes", ops.transpose(_swapped_slice, perm=bind("perm")), _unwrapped,
         (guard("transposes that undo each other", lambda m: all(m["perm"][p] == i for i, p in enumerate(m["perm"]))),),
         {"x": "float[2 3 4 6]"},
         {"perm": ((0, 2, 1, 3),), "ls": ((0, 1, 0, 0),), "le": ((2, 4, 3, 4),), "lt": ((1, 1, 1, 1),)}),
    Rule("rotary embedding of a part, heads second", ops.concat(_swapped_turned, _swapped_rest, axis=3), _whole_turned,
         (guard("a cut of the last axis", _splits_swapped),), {"x": "float[2 3 2 6]", "cos": "float[1 3 4]", "sin": "float[1 3 4]"},
         {"ls": ((0, 0, 0, 0),), "le": ((2, 3, 2, 4),), "lt": ((1, 1, 1, 1),), "hs": ((0, 0, 0, 4),), "he": ((2, 2, 3, 6),),
          "ht": ((1, 1, 1, 1),), "interleaved": (False, True)}),
)  # fmt: skip

# --- Attention -----------------------------------------------------------------------------------------------------

q, k, v, bias = variables("q k v bias")
scale = scalar("scale")
_keys = ops.transpose(k, perm=(0, 1, 3, 2))
_raw = ops.matmul(q, _keys)
_times, _over = ops.mul(_raw, scale), ops.div(_raw, scalar("divisor"))
_scaled = either(_times, _over, _raw)
_sum = ops.add(_scaled, bias)
_biased_scores = either(_sum, _scaled)
_wide_scores = ops.cast(_biased_scores, dtype="float32")
_softmax = ops.softmax(either(_wide_scores, _biased_scores), axis=3)
_rounded_softmax = ops.cast(_softmax, dtype=bind("back"))
_probabilities = either(_rounded_softmax, _softmax)
_between = (_times, _over, _sum, _wide_scores, _softmax, _rounded_softmax)
_attended = ops.matmul(_probabilities, v)


def _attention(m: Match) -> Node | None:
    """softmax(q kᵀ scale + bias) v with heads second becomes attention with heads third."""
    factor = m.bindings.get("scale", 1.0 / m.bindings["divisor"] if "divisor" in m.bindings else 1.0)
    mask = m.bindings.get("bias")
    if mask is not None and (mask.rank != 4 or mask.dtype != m["q"].dtype):
        return None
    if not m["q"].shape[1] == m["k"].shape[1] == m["v"].shape[1] or not isinstance(m["q"].shape[1], int):
        return None
    if not (same_dim(m["q"].shape[0], m["k"].shape[0]) and same_dim(m["k"].shape[0], m["v"].shape[0])):
        return None
    swap = (0, 2, 1, 3)
    query, key, value = (ops.transpose(m[n], perm=swap) for n in ("q", "k", "v"))
    return ops.transpose(ops.attention(query, key, value, mask, scale=factor), perm=swap)


_repeated_k = ops.reshape(ops.broadcast_to(ops.reshape(k, shape=bind("k5")), shape=bind("kb")), shape=bind("k4"))
_repeated_v = ops.reshape(ops.broadcast_to(ops.reshape(v, shape=bind("v5")), shape=bind("vb")), shape=bind("v4"))
_swapped_k = ops.transpose(_repeated_k, perm=(0, 2, 1, 3))
_swapped_v = ops.transpose(_repeated_v, perm=(0, 2, 1, 3))
_grouped = ops.attention(
    q, _swapped_k, _swapped_v, variable("bias", optional=True), variable("sinks", optional=True),
    scale=bind("scale"), causal=bind("causal"), window=bind("window"), softcap=bind("softcap"),
)  # fmt: skip


def _repeats_heads(m: Match) -> bool:
    """k, v [b, g, t, d] -> [b, g, 1, t, d] -> [b, g, n, t, d] -> [b, g·n, t, d]: every head stands n times in a row."""
    for name in ("k", "v"):
        shape = m[name].shape
        if len(shape) != 4 or not same_shape(m[name + "5"], (*shape[:2], 1, *shape[2:])):
            return False
        repeated = m[name + "b"]
        if not same_shape((*repeated[:2], *repeated[3:]), shape):
            return False
        if not same_shape(m[name + "4"], (shape[0], shape[1] * repeated[2], *shape[2:])):
            return False
    return True


def _group(m: Match) -> Node:
    swap = (0, 2, 1, 3)
    key, value = ops.transpose(m["k"], perm=swap), ops.transpose(m["v"], perm=swap)
    return ops.attention(
        m["q"],
        key,
        value,
        m["bias"],
        m["sinks"],
        scale=m["scale"],
        causal=m["causal"],
        window=m["window"],
        softcap=m["softcap"],
    )


ATTENTION: tuple[Rule, ...] = (
    Rule("attention from its products", _attended, _attention,
         (used_once(_raw, *_between), guard("rank 4", lambda m: m["q"].rank == m["k"].rank == m["v"].rank == 4)),
         {"q": "float32[2 2 3 4]", "k": "float32[2 2 5 4]", "v": "float32[2 2 5 3]", "bias": "float32[1 1 3 5]"},
         {"scale": (0.5,), "divisor": (2.0,), "back": ("float32",)}),
    Rule("repeated KV heads are grouped queries", _grouped, _group, (guard("heads repeated in a row", _repeats_heads),),
         {"q": "float[2 3 4 2]", "k": "float[2 2 3 2]", "v": "float[2 2 3 2]", "bias": "float[1 1 3 3]", "sinks": "float[4]"},
         {"k5": ((2, 2, 1, 3, 2),), "kb": ((2, 2, 2, 3, 2),), "k4": ((2, 4, 3, 2),), "v5": ((2, 2, 1, 3, 2),),
          "vb": ((2, 2, 2, 3, 2),), "v4": ((2, 4, 3, 2),), "scale": (0.5,), "causal": (True,), "window": (0, 2), "softcap": (0.0, 3.0)}),
)  # fmt: skip


@attrs.frozen
class SplitProjections:
    """A product of which only slices of its outputs are used becomes one product per slice, with slices of the weights.

    Weights are sliced when they are packed, once; the slices of values (queries, keys and values of one projection) would
    be copies at every step. Layers of one input are merged again when they are laid out, without copies.
    """

    name: str = "split projections"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        outputs = set(graph.outputs)
        split = {
            node: parts
            for node in graph.nodes
            if node.op is ops.linear and node not in outputs and (parts := self._parts(node, graph.users[node]))
        }
        whole = {part: node for node, parts in split.items() for part in parts}

        def transform(old: Node, new: Node) -> Node:
            if old not in whole:
                return new
            product = new.operands[0]
            assert product is not None
            x, weights, bias, _ = product.operands
            assert x is not None and weights is not None
            begin, end = old.starts[-1], old.stops[-1]
            rows = ops.slice_(weights, starts=(begin, 0), stops=(end, weights.shape[1]), steps=(1, 1))
            own = None if bias is None else ops.slice_(bias, starts=(begin,), stops=(end,), steps=(1,))
            return ops.linear.make((x, rows, own, None), {"activation": product.activation}, old.source)

        return graph.map(transform) if split else graph

    @staticmethod
    def _parts(node: Node, users: tuple[Node, ...]) -> tuple[Node, ...]:
        """The slices that use the product, if nothing else does, and they don't overlap; else none."""
        _, weights, _, residual = node.operands
        assert weights is not None
        if residual is not None or not _from_weights(weights) or len(users) < 2:
            return ()
        cuts = []
        for user in users:
            if user.op is not ops.slice_ or set(user.steps) != {1}:
                return ()
            same = (
                s == 0 and same_dim(e, n)
                for s, e, n in zip(user.starts[:-1], user.stops[:-1], node.shape[:-1], strict=True)
            )
            ends = (user.starts[-1], user.stops[-1])
            if not all(same) or not all(isinstance(e, int) for e in ends):
                return ()
            cuts.append(ends)
        cuts.sort()
        return users if all(a[1] <= b[0] for a, b in zip(cuts, cuts[1:], strict=False)) else ()


@attrs.frozen
class Fusion:
    """Apply one group of fusion rules to a fixed point."""

    name: str
    rules: tuple[Rule, ...] = attrs.field(repr=False)
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, self.rules)


FUSIONS: tuple[Fusion | SplitProjections, ...] = (
    Fusion("fuse activations", ACTIVATIONS),
    Fusion("fuse projections", PROJECTIONS),
    Fusion("unflatten projections", FLAT_PROJECTIONS),
    Fusion("fuse norms", NORMS),
    Fusion("fuse bare norms", BARE_NORMS),
    Fusion("fuse layer norms", LAYER_NORMS),
    Fusion("fuse rotary", ROTARY),
    Fusion("fuse attention", ATTENTION),
    Fusion("fuse epilogues", EPILOGUES[:-1]),
    Fusion("fuse gated", GATED),
    Fusion("fuse residuals", EPILOGUES[-1:]),
    SplitProjections(),
)
"""All fusions, in the order in which they run (between them runs canonicalisation)."""
