"""The kit catches what it is for: each wrong rule or pass beside a right twin that it lets through."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np
import pytest
from jisu.compiler import ops
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, constant, placeholder, weight
from jisu.compiler.rewrite import Match, Rule, bind, guard, rank_is, rewrite, scalar, used_once, variables
from jisu.compiler.types import TensorType, same_shape
from jisu.testing import PassFailure, RuleFailure, check_pass, check_program, check_rule, graph_of

x, y, w, b = variables("x y w b")
c, eps = scalar("c"), scalar("eps")
product = ops.linear(x, w)
mean_square = ops.div(ops.sum_(ops.square(x), axes=bind("axes"), keepdims=True), scalar("count"))
normed = ops.mul(x, ops.rsqrt(ops.add(mean_square, eps)))
is_one = guard("a constant of 1", lambda m: m["c"] == 1)
keeps_shape = guard("the shape to stay", lambda m: same_shape(m["x"].shape, m.root.shape))
LINEAR = {"x": "float[*b k]", "w": "float[n k]", "b": "float[n]"}
NORM = ({"x": "float[2 4]"}, {"axes": ((1,),), "count": (4.0,), "eps": (1e-6, 1e-1)})


def bias_rule(*guards: object) -> Rule:
    return Rule("bias joins linear", ops.add(product, b), ops.linear(x, w, b), guards, LINEAR)  # type: ignore[arg-type]


def one_rule(*guards: object) -> Rule:
    return Rule("x * 1", ops.mul(x, c), x, guards, {"x": "float[*b k]"}, {"c": (1, 2)})  # type: ignore[arg-type]


def norm_rule(inner: Callable[[Match], Node]) -> Rule:
    last = guard("the last axis", lambda m: same_shape(m["x"].shape, m.root.shape))
    return Rule("norm", normed, inner, (last,), *NORM)


def fused_norm(m: Match) -> Node:
    return ops.rms_norm(m["x"], eps=m["eps"])


def eps_outside(m: Match) -> Node:
    total = ops.sum_(ops.square(m["x"]), axes=m["axes"], keepdims=True)
    return ops.div(m["x"], ops.add(ops.sqrt(ops.div(total, float(m["count"]))), m["eps"]))


def slice_of_slice(extra: int) -> Rule:
    def merged(m: Match) -> Node:
        (a,), (d,), (e,) = m["a"], m["d"], m["e"]
        return ops.slice_(m["x"], starts=(a + d,), stops=(a + e + extra,), steps=(1,))

    inner = ops.slice_(x, starts=bind("a"), stops=bind("b"), steps=(1,))
    return Rule("slice of slice", ops.slice_(inner, starts=bind("d"), stops=bind("e"), steps=(1,)), merged, (),
                {"x": "float[8]"}, {"a": ((1,), (2,)), "b": ((6,),), "d": ((0,), (1,)), "e": ((2,), (3,))})  # fmt: skip


def window_rule(offset: int) -> Rule:
    def windowed(m: Match) -> Node:
        return ops.attention(m["x"], m["y"], m["y"], scale=1.0, causal=True, window=m["n"] + offset)

    pattern = ops.attention(x, y, y, scale=1.0, causal=True, window=bind("n"))
    return Rule("window", pattern, windowed, (guard("an odd window", lambda m: m["n"] % 2 == 1),),
                {"x": "float[1 5 2 3]", "y": "float[1 5 2 3]"}, {"n": (1, 3)})  # fmt: skip


def softmax_axis(axis: int) -> Rule:
    e = ops.exp(x)
    total = ops.sum_(e, axes=(1,), keepdims=True)
    return Rule("softmax", ops.div(e, total), ops.softmax(x, axis=axis), (), {"x": "float[a b]"})


def transposed_product(swapped: bool) -> Rule:
    left, right = (x, y) if swapped else (y, x)
    # (x y)ᵀ = yᵀ xᵀ, not xᵀ yᵀ
    return Rule("transposed product", ops.transpose(ops.matmul(x, y), perm=(1, 0)),
                ops.matmul(ops.transpose(left, perm=(1, 0)), ops.transpose(right, perm=(1, 0))),
                (used_once(ops.matmul(x, y)),)[:0], {"x": "float[4 4]", "y": "float[4 4]"})  # fmt: skip


def unscaled(where: tuple[object, ...]) -> Rule:
    return Rule("scalar into product", ops.mul(ops.matmul(x, y), c), ops.matmul(ops.mul(x, c), y), where,  # type: ignore[arg-type]
                {"x": "float[m k]", "y": "float[k n]"}, {"c": (2.0, 0.5)})  # fmt: skip


_xy = ops.matmul(x, y)


def scaled_rule(*guards: object) -> Rule:
    whole = guard("a scalar without axes", lambda m: m.root.rank == 2 and m.root.operands != ())
    return Rule("scalar into product", ops.mul(_xy, c), ops.matmul(ops.mul(x, c), y), (whole, *guards),  # type: ignore[arg-type]
                {"x": "float[m k]", "y": "float[k n]"}, {"c": (2.0, 0.5)})  # fmt: skip


def accumulate(dtype: str) -> Rule:
    """The sum of widened int8 values; in int8 it wraps."""

    def narrow(m: Match) -> Node:
        return ops.cast(ops.sum_(ops.cast(m["x"], dtype=dtype), axes=(0,)), dtype="int32")

    wide = ops.sum_(ops.cast(x, dtype="int32"), axes=(0,))
    return Rule("sum", wide, narrow, (guard("not narrow yet", lambda m: m["x"].dtype == "int8" and m.root.operands[0].dtype == "int32"
                                            and m["x"].rank == 1 and m.root.axes == (0,) and m.uses(m.root) < 99),),
                {"x": "int8[n]"})  # fmt: skip


def half_mean(dtype: str) -> Rule:
    """A mean of squares whose sum overflows float16."""

    def build(m: Match) -> Node:
        squares = ops.square(ops.cast(m["x"], dtype=dtype))
        return ops.cast(ops.sum_(ops.mul(squares, 0.25), axes=(0,)), dtype="float32")

    pattern = ops.mul(ops.sum_(ops.square(ops.cast(x, dtype="float32")), axes=(0,)), 0.25)
    return Rule("mean of squares", pattern, build, (), {"x": "float16[4]"})


RULES: list[tuple[str, Rule, Rule, str]] = [
    ("wrong guard", one_rule(keeps_shape), one_rule(is_one, keeps_shape), "changes the meaning"),
    ("missing broadcasting", one_rule(is_one), one_rule(is_one, keeps_shape), "replaces"),
    ("bias of another shape", bias_rule(used_once(product)),
     bias_rule(used_once(product), rank_is(b, 1)), "fails"),
    ("lost used_once", bias_rule(rank_is(b, 1)), bias_rule(rank_is(b, 1), used_once(product)), "used_once"),
    ("dropped truncation", Rule("casts", ops.cast(ops.cast(x, dtype="int32"), dtype=bind("d")), x,
                                (guard("the dtype to stay", lambda m: m["x"].dtype == m["d"]),), {"x": "float32[n]"}, {"d": ("float32",)}),
     Rule("casts", ops.cast(ops.cast(x, dtype="float64"), dtype=bind("d")), x,
          (guard("the dtype to stay", lambda m: m["x"].dtype == m["d"]),), {"x": "float32[n]"}, {"d": ("float32",)}), "changes the meaning"),
    ("dropped rounding", Rule("casts", ops.cast(ops.cast(x, dtype="bfloat16"), dtype="float32"), x, (), {"x": "float32[n]"}),
     Rule("casts", ops.cast(ops.cast(x, dtype="float32"), dtype="bfloat16"), x, (), {"x": "bfloat16[n]"}), "changes the meaning"),
    ("dropped cast", Rule("casts", ops.add(ops.cast(x, dtype="float32"), ops.cast(y, dtype="float32")), ops.add(x, y), (),
                          {"x": "bfloat16[n]", "y": "bfloat16[n]"}),
     Rule("casts", ops.add(ops.cast(x, dtype="float32"), ops.cast(x, dtype="float32")), ops.mul(ops.cast(x, dtype="float32"), 2.0), (),
          {"x": "bfloat16[n]"}), "replaces"),
    ("swapped operands", Rule("subtraction", ops.add(ops.neg(x), y), ops.sub(x, y), (), {"x": "float[*b k]", "y": "float[*b? k?]"}),
     Rule("subtraction", ops.add(ops.neg(x), y), ops.sub(y, x), (), {"x": "float[*b k]", "y": "float[*b? k?]"}), "changes the meaning"),
    ("swapped product", transposed_product(True), transposed_product(False), "changes the meaning"),
    ("wrong axis", softmax_axis(0), Rule("softmax", ops.softmax(x, axis=bind("i")), lambda m: _spelled_softmax(m), (),
                                         {"x": "float[a b]"}, {"i": (1,)}), "changes the meaning"),
    ("off-by-one slice", slice_of_slice(1), slice_of_slice(0), "replaces"),
    ("off-by-one window", window_rule(1), window_rule(0), "changes the meaning"),
    ("wrong eps placement", norm_rule(eps_outside), norm_rule(fused_norm), "changes the meaning"),
    ("dropped NaN", Rule("x * 0", ops.mul(x, c), lambda m: ops.broadcast_to(constant(0, m.root.dtype), shape=m.root.shape),
                         (guard("0", lambda m: m["c"] == 0),), {"x": "float[n]"}, {"c": (0,)}),
     Rule("x * 0", ops.mul(x, c), lambda m: ops.broadcast_to(constant(0, m.root.dtype), shape=m.root.shape),
          (guard("0", lambda m: m["c"] == 0),), {"x": "int[n]"}, {"c": (0,)}), "nan"),
    ("int8 accumulation", accumulate("int8"), accumulate("int16"), "changes the meaning"),
    ("float16 overflow", half_mean("float16"), half_mean("float32"), "changes the meaning"),
    ("endless", Rule("swap", ops.sub(x, y), ops.neg(ops.sub(y, x)), (), {"x": "float[n]", "y": "float[n]"}),
     Rule("swap", ops.sub(x, y), ops.add(x, ops.neg(y)), (), {"x": "float[n]", "y": "float[n]"}), "undo each other"),
    ("never fires", Rule("relu", ops.relu(x), x, (rank_is(x, 7),), {"x": "float[*b]"}),
     Rule("relu", ops.relu(ops.relu(x)), ops.relu(x), (), {"x": "float[*b]"}), "needs rank 7"),
    ("crashes on symbols", Rule("half", ops.relu(x), lambda m: ops.slice_(ops.relu(m["x"]), starts=(0,), stops=(int(m["x"].shape[0]),),
                                                                           steps=(1,)), (), {"x": "float[n]"}),
     Rule("relu", ops.relu(ops.relu(x)), ops.relu(x), (), {"x": "float[n]"}), "fails"),
]  # fmt: skip
