"""Mixture of experts: every token through its chosen experts only, over packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from jisu.targets.cpu.isa import Arg, Function, Val, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import in_tasks, layer, pack, pack_gated, pack_gated_shape, pack_shape
from jisu.targets.target import Target

OUT_OF_RANGE = "experts: an expert number is outside the experts"


def pack_experts(w: np.ndarray, target: Target) -> np.ndarray:
    """Weights of all experts w[E, n, k], each packed as `pack` does: [E, *pack_shape(n, k)]."""
    return np.stack([pack(one, target) for one in w])


def pack_gated_experts(gate: np.ndarray, up: np.ndarray, target: Target) -> np.ndarray:
    """gate[E, f, k] and up[E, f, k], each expert's packed as `pack_gated` does: [E, *pack_gated_shape(f, k)]."""
    return np.stack([pack_gated(g, u, target) for g, u in zip(gate, up, strict=True)])


def experts(
    count: int, hidden: int, inner: int, chosen: int, dtype: str, target: Target, *, activation: str = "silu", gated: bool = True,
) -> Any:  # fmt: skip
    """PrimFunc y[t] = sum over j of weights[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])), e = idx[t, j].

    Parameters in order: x[T, hidden], idx int64[T, chosen], weights[T, chosen], up[count, ...] (pack_gated_experts; or
    pack_experts without `gated`, where the inner value is act(up_e(x[t]))), down[count, ...] (pack_experts),
    y[T, hidden]. Tokens are sorted by expert, so that each used expert's weights are read once and no others at all; the
    sum over j is float32, in order. The call fails with `OUT_OF_RANGE` for an expert number outside 0…count-1.
    """
    require_dtype(dtype, target)
    first = layer("expert_up", inner, hidden, dtype, target, gated=gated, activation=activation, gather=chosen)
    second = layer("expert_down", hidden, inner, dtype, target)
    up_shape = (pack_gated_shape if gated else pack_shape)(inner, hidden, dtype, target)
    down_shape = pack_shape(hidden, inner, dtype, target)
    words = 2 if dtype != "float32" else 1
    up_words, down_words = (int(np.prod(s)) // words for s in (up_shape, down_shape))

    sort = _sort(count, target)
    f = Function(
        "combine", [*(("ptr", n) for n in ("d", "place", "weights", "y")), ("i64", "first"), ("i64", "last")], target
    )
    d, place, weights, y, start, stop = f.params()

    def token(t: Val, _: list[Val]) -> None:
        def write(i: Val, mask: Val | None, _: list[Val]) -> None:
            total = f.const(0.0, f"<{f.lanes} x float>")
            for j in range(chosen):
                row = f.load("i64", f.at(place, t * chosen + j, "int64"))
                w = f.load_f32(weights, t * chosen + j, dtype, None, 1)
                total = f.fma(f.load_f32(d, row * hidden + i, dtype, mask), f.splat(w, f.lanes), total)
            f.store_f32(total, y, t * hidden + i, dtype, mask)

        f.vectors(hidden, write)

    f.loop(start, stop, 1, [], token)
    combine = f.finish()

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        tokens = dims["t"]
        slots = tokens * chosen
        with T.serial(T.int64(0), tokens) as t, T.serial(T.int64(0), T.int64(chosen)) as j:
            number = buffers["idx"][t, j]
            with T.Assert(T.And(number >= T.int64(0), number < T.int64(count)), OUT_OF_RANGE):
                pass
        # order[s]: the slot (t * chosen + j) that stands at place s when sorted by expert; place inverts it.
        order, place = T.alloc_buffer((slots,), "int64"), T.alloc_buffer((slots,), "int64")
        bounds = T.alloc_buffer((count + 1,), "int64")
        h, d = T.alloc_buffer((slots * inner,), dtype), T.alloc_buffer((slots * hidden,), dtype)
        sort.call(buffers["idx"].data, order.data, place.data, bounds.data, slots)

        def stage(plan: Any, weight_words: int, data: list[Any]) -> None:
            """Tasks are used experts by groups of panels; the rows of an expert go in chunks inside the task."""
            group = plan.groups(T.floordiv(slots, T.int64(count)))
            groups = T.ceildiv(T.int64(plan.panels), group)

            def run(t: Any) -> None:
                e, p0 = T.floordiv(t, groups), T.floormod(t, groups) * group
                begin, end = bounds[e], bounds[e + 1]
                with T.serial(T.int64(0), T.ceildiv(end - begin, T.int64(plan.chunk))) as c:
                    m0 = begin + c * plan.chunk
                    plan.call(data, m0, T.min(end - m0, T.int64(plan.chunk)), p0,
                              T.min(p0 + group, T.int64(plan.panels)), e * weight_words)  # fmt: skip

            in_tasks(T.Select(slots == 0, T.int64(0), count * groups), run)

        stage(first, up_words, [first.rows(buffers["x"].data, slots, order.data), buffers["up"].data, h.data])
        stage(second, down_words, [second.rows(h.data, slots), buffers["down"].data, d.data])
        per_task = max(1, (1 << 14) // (hidden * chosen))
        in_tasks(T.ceildiv(tokens, T.int64(per_task)), lambda t: combine.call(
            d.data, place.data, buffers["weights"].data, buffers["y"].data, t * per_task,
            T.min(tokens, (t + 1) * per_task)), serial=slots * hidden <= 1 << 16)  # fmt: skip

    args = [
        Arg("x", ("t", hidden), dtype),
        Arg("idx", ("t", chosen), "int64"),
        Arg("weights", ("t", chosen), dtype),
        Arg("up", (count, *up_shape), dtype),
        Arg("down", (count, *down_shape), dtype),
        Arg("y", ("t", hidden), dtype),
    ]
    return prim_func("experts", args, [*first.micros, *second.micros, sort, combine], body)


def _sort(count: int, target: Target) -> Any:
    """void(idx, order, place, bounds, n): a counting sort of n slots by expert, stable; bounds[e] is e's first place."""
    f = Function("sort_by_expert", [*(("ptr", n) for n in ("idx", "order", "place", "bounds")), ("i64", "n")], target)
    idx, order, place, bounds, n = f.params()

    def expert(e: Val, values: list[Val]) -> list[Val]:
        f.store(values[0], f.at(bounds, e, "int64"))

        def slot(s: Val, at: list[Val]) -> list[Val]:
            hit = f.load("i64", f.at(idx, s, "int64")).cmp("eq", e)

            def put() -> None:
                f.store(s, f.at(order, at[0], "int64"))
                f.store(at[0], f.at(place, s, "int64"))

            f.when(hit, put)
            return [f.select(hit, at[0] + 1, at[0])]

        after, _ = f.loop(0, n, 1, [values[0]], slot)
        return [after]

    end, _ = f.loop(0, count, 1, [f.i64(0)], expert)
    f.store(end, f.at(bounds, count, "int64"))
    return f.finish()
