"""Rotary position embedding, whole or partial, half-split or interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import Arg, Function, Val, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import in_tasks
from jisu.targets.target import Target


def rotary(
    heads: int, d: int, r: int, dtype: str, target: Target, *, interleaved: bool = False, table_dtype: str | None = None,
) -> Any:  # fmt: skip
    """PrimFunc y = x * cos + rotate(x) * sin on the first `r` of `d` channels, the others passed through.

    Parameters in order: x[B, S, heads, d], cos[B or 1, S, r], sin[B or 1, S, r] (of `table_dtype`, `dtype` by default),
    y[B, S, heads, d]. rotate maps (a, b) to (-b, a), where b is r/2 channels after a, or the next one if `interleaved`.
    Products and sum are rounded to `dtype` as in eager mode, unless the table is float32. Raises TargetError for an odd
    or too large r.
    """
    require_dtype(dtype, target)
    table = table_dtype or dtype
    require_dtype(table, target)
    if r % 2 or not 0 < r <= d:
        raise TargetError(f"rotary channels must be even, positive and at most head_dim {d}, not {r}")
    step = dtype if table == dtype else "float32"
    f = Function("rotary", [*(("ptr", n) for n in ("x", "cos", "sin", "y")), *(("i64", n) for n in _SCALARS)], target)
    x, cos, sin, y, first, last, period = f.params()
    lanes = f.lanes

    def turn(a: Val, b: Val, c: Val, s: Val) -> Val:
        return f.rounded(a * c, step) + f.rounded(b * s, step)

    def token(t: Val, _: list[Val]) -> None:
        row = (t % period) * r

        def head(h: Val, _: list[Val]) -> None:
            here = (t * heads + h) * d

            def halves(i: Val, mask: Val | None, _: list[Val]) -> None:
                a, b = (f.load_f32(x, here + i + o, dtype, mask) for o in (0, r // 2))
                for o, v, w in ((0, a, -b), (r // 2, b, a)):
                    c, s = (f.load_f32(tab, row + i + o, table, mask) for tab in (cos, sin))
                    f.store_f32(turn(v, w, c, s), y, here + i + o, dtype, mask)

            def pairs(i: Val, mask: Val | None, _: list[Val]) -> None:
                v = f.load_f32(x, here + i, dtype, mask)
                order = ", ".join(f"i32 {n ^ 1}" for n in range(lanes))
                swapped = f.op(f"shufflevector {v.type} {v.name}, {v.type} poison, <{lanes} x i32> <{order}>", v.type)
                even = Val(f, "<" + ", ".join(f"i1 {1 - n % 2}" for n in range(lanes)) + ">", f"<{lanes} x i1>")
                c, s = (f.load_f32(tab, row + i, table, mask) for tab in (cos, sin))
                f.store_f32(turn(v, f.select(even, -swapped, swapped), c, s), y, here + i, dtype, mask)

            if interleaved:
                f.vectors(r, pairs)
            else:
                f.vectors(r // 2, halves)
            if r < d:
                f.vectors(d - r, lambda i, mask, _: f.store_f32(
                    f.load_f32(x, here + r + i, dtype, mask), y, here + r + i, dtype, mask))  # fmt: skip

        f.loop(0, heads, 1, [], head)

    f.loop(first, last, 1, [], token)
    micro = f.finish()
    per_task = max(1, (1 << 14) // (heads * d))

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        b, s, tables = dims["b"], dims["s"], dims["tables"]
        with T.Assert(T.Or(tables == 1, tables == b), "the rotary tables don't broadcast over the batch"):
            pass
        data = [buffers[n].data for n in ("x", "cos", "sin", "y")]
        tokens = b * s
        in_tasks(T.ceildiv(tokens, T.int64(per_task)), lambda t: micro.call(
            *data, t * per_task, T.min(tokens, (t + 1) * per_task), T.max(tables * s, T.int64(1))),
            serial=tokens * (heads * d) <= 1 << 16)  # fmt: skip

    rows, tabs = ("b", "s", heads, d), ("tables", "s", r)
    args = [Arg("x", rows, dtype), Arg("cos", tabs, table), Arg("sin", tabs, table), Arg("y", rows, dtype)]
    return prim_func("rotary", args, [micro], body)


_SCALARS = ("first", "last", "period")
