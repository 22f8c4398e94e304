"""Attention: online softmax over tiles of keys, stateless or over a key/value cache, and the cache's append.

The rows of one task are query positions times the query heads that share a key/value head, so that a tile of keys is
read once for all of them. Every mask but a bias operand makes the visible keys of a row an interval, so whole tiles
outside it are never touched. Sums are float32 and their order depends on the lengths only, never on the threads. Of a cache
of records a tile at a time is decoded into the task's scratch memory.

Cache layouts: "contiguous" (slot s at row s), "ring" (slot s at row s % CAP), "paged" (a table of pages per sequence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import TargetError
from jisu.compiler.rows import record_bytes
from jisu.targets.cpu.isa import Arg, Function, Micro, Val, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import copy_row, in_tasks
from jisu.targets.cpu.kernels.tiles import (
    FEW,
    STATE_VALUES,
    Spec,
    few_rows,
    few_words,
    many_rows,
    many_words,
    place,
    state_words,
)
from jisu.targets.target import Target

LAYOUTS = ("contiguous", "ring", "paged")
_SPLIT = 512  # keys per part when one decoded token attends to many
_PARTS = 16  # parts at most


def attention(
    heads: int, kv_heads: int, head_dim: int, v_dim: int, dtype: str, target: Target, *, scale: float, causal: bool = True,
    window: int | None = None, softcap: float | None = None, sinks: bool = False, bias: str | None = None,
    bias_dtype: str | None = None, nan_rows: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of attention over whole sequences.

    Parameters in order: q[B, S, heads, head_dim], k[B, T, kv_heads, head_dim], v[B, T, kv_heads, v_dim],
    sinks[heads] if `sinks`, bias[B or 1, heads or 1, S, T] if `bias` ("float": added to the scores, of `bias_dtype`,
    `dtype` by default; "bool": True attends), out[B, S, heads, v_dim]. Query i stands at position T - S + i; `causal`
    hides later keys, `window` w also those at or before position - w. Scores are scale * q k, then
    softcap * tanh(score / softcap). A row that sees no key is 0, or NaN with `nan_rows`.
    """
    spec = _spec(heads, kv_heads, head_dim, v_dim, dtype, target, scale, causal or window is not None, window, softcap,
                 sinks, bias, bias_dtype, nan_rows, None, 0)  # fmt: skip
    args = [
        Arg("q", ("b", "s", heads, head_dim), dtype),
        Arg("k", ("b", "t", kv_heads, head_dim), dtype),
        Arg("v", ("b", "t", kv_heads, v_dim), dtype),
    ]
    if sinks:
        args.append(Arg("sinks", (heads,), dtype))
    if bias:
        args.append(Arg("bias", ("bias_b", "bias_h", "s", "t"), "bool" if bias == "bool" else bias_dtype or dtype))
    args.append(Arg("out", ("b", "s", heads, v_dim), dtype))
    return _build("attention", spec, args, target)


def attention_cached(
    heads: int, kv_heads: int, head_dim: int, v_dim: int, dtype: str, target: Target, *, scale: float,
    layout: str = "contiguous", page: int = 0, window: int | None = None, softcap: float | None = None,
    sinks: bool = False, scheme: str = "none",
) -> Any:  # fmt: skip
    """PrimFunc of causal attention of C new tokens over a cache that already holds them.

    Parameters in order: q[B, C, heads, head_dim], k_cache and v_cache ([B, kv_heads, CAP, D], or with layout "paged"
    [P, kv_heads, page, D] and then page_table int32[B, MAXPAGES]), length int64[1] (slots filled before this chunk;
    query i is at slot length + i), start int64[B] (first valid slot per sequence), sinks[heads] if `sinks`,
    out[B, C, heads, v_dim]. A row that sees no key is 0. The call fails where the cache can't hold length + C slots
    (in a ring: where the window's keys of all new tokens exceed CAP) or a page number is outside the pages. With a scheme
    of `jisu.compiler.rows` the caches are uint8, a record in the place of each row of D numbers.
    """
    spec = _spec(heads, kv_heads, head_dim, v_dim, dtype, target, scale, True, window, softcap, sinks, None, None, False,
                 layout, page, scheme)  # fmt: skip
    stored, sizes = dtype, (head_dim, v_dim)
    if scheme != "none":
        stored, sizes = "uint8", (record_bytes(scheme, head_dim), record_bytes(scheme, v_dim))
    args = [
        Arg("q", ("b", "s", heads, head_dim), dtype),
        *_cache_args(layout, kv_heads, *sizes, page, stored),
        Arg("length", (1,), "int64"),
        Arg("start", ("b",), "int64"),
    ]
    if sinks:
        args.append(Arg("sinks", (heads,), dtype))
    args.append(Arg("out", ("b", "s", heads, v_dim), dtype))
    return _build("attention_cached", spec, args, target)


def cache_append(
    kv_heads: int, dim: int, dtype: str, target: Target, *, layout: str = "contiguous", page: int = 0
) -> Any:
    """PrimFunc that writes C new rows into one cache (of keys or of values) in place, for call_tir_inplace.

    Parameters in order: cache ([B, kv_heads, CAP, dim]; paged: [P, kv_heads, page, dim], then page_table
    int32[B, MAXPAGES]), length int64[1] (slots filled before), new[B, C, kv_heads, dim]. The call fails rather than
    write beyond CAP (contiguous), more than CAP rows at once (ring) or outside the pages. dtype: a float, or uint8 for records.
    """
    _require_layout(layout, page)
    if dtype != "uint8":
        require_dtype(dtype, target)
    args = [*_cache_args(layout, kv_heads, dim, None, page, dtype), Arg("length", (1,), "int64")]
    args.append(Arg("new", ("b", "s", kv_heads, dim), dtype))
    operands = [a.name for a in args if a.name != "length"]
    scalars = ("b", "slot", "first", "last", "count", "cap", "pages")
    f = Function("append", [("ptr", o) for o in operands] + [("i64", x) for x in scalars], target)
    at = dict(zip((*operands, *scalars), f.params(), strict=True))
    copy = copy_row(dim, dtype, dtype, target)

    def token(i: Val, _: list[Val]) -> None:
        row, stride = place(f, layout, page, kv_heads, at, at["slot"] + i)
        for h in range(kv_heads):
            source = ((at["b"] * at["count"] + i) * kv_heads + h) * dim
            f.use(copy, f.at(at["new"], source, dtype), f.at(at["cache"], (row + stride * h) * dim, dtype))

    f.loop(at["first"], at["last"], 1, [], token)
    micro = f.finish()
    per_task = max(1, 16384 // (kv_heads * dim))

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        length, count = T.bind(buffers["length"][T.int64(0)]), dims["s"]
        _assert_fits(layout, page, buffers, dims, length, None)
        blocks = T.ceildiv(count, T.int64(per_task))

        def run(t: Any) -> None:
            first = T.floormod(t, blocks) * per_task
            last = T.min(count, first + per_task)
            micro.call(*(buffers[o].data for o in operands), T.floordiv(t, blocks), length, first, last, count,
                       dims.get("cap", T.int64(0)), dims.get("pages", T.int64(0)))  # fmt: skip

        in_tasks(dims["b"] * blocks, run, serial=dims["b"] * count * (kv_heads * dim) <= 1 << 17)

    return prim_func("cache_append", args, [micro], body)


def _require_layout(layout: str, page: int) -> None:
    if layout not in LAYOUTS:
        raise TargetError(f"the CPU kernels know no cache layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if (layout == "paged") != (page > 0):
        raise TargetError(
            f"a page size belongs to the layout 'paged' and only to it, got layout {layout!r}, page {page}"
        )


def _spec(
    heads: int, kv_heads: int, head_dim: int, v_dim: int, dtype: str, target: Target, scale: float, causal: bool,
    window: int | None, softcap: float | None, sinks: bool, bias: str | None,
    bias_dtype: str | None, nan_rows: bool, layout: str | None, page: int, scheme: str = "none",
) -> Spec:  # fmt: skip
    require_dtype(dtype, target)
    if layout is not None:
        _require_layout(layout, page)
    if heads % kv_heads:
        raise TargetError(f"{heads} query heads can't share {kv_heads} key/value heads evenly")
    if bias not in (None, "float", "bool"):
        raise TargetError(f"an attention bias is None, 'float' or 'bool', not {bias!r}")
    return Spec(heads, kv_heads, head_dim, v_dim, dtype, scale, causal, window, softcap, sinks, bias,
                bias_dtype or dtype, nan_rows, layout, page, scheme)  # fmt: skip


def _cache_args(layout: str, kv_heads: int, k_dim: int, v_dim: int | None, page: int, dtype: str) -> list[Arg]:
    """The cache operands: one cache if `v_dim` is None, else keys and values; then the page table of a paged one."""
    named = [("cache", k_dim)] if v_dim is None else [("k", k_dim), ("v", v_dim)]
    if layout == "paged":
        table = Arg("table", ("b", "pages"), "int32")
        return [*(Arg(name, ("p", kv_heads, page, dim), dtype) for name, dim in named), table]
    return [Arg(name, ("b", kv_heads, "cap", dim), dtype) for name, dim in named]


def _assert_fits(
    layout: str, page: int, buffers: Mapping[str, Any], dims: Mapping[str, Any], length: Any, window: int | None
) -> None:
    """TIR checks that slots 0 … length + C lie in the cache: nothing outside it is ever read or written."""
    end = length + dims["s"]
    _check(length >= T.int64(0), "the number of cached tokens is negative")
    if layout == "contiguous":
        _check(end <= dims["cap"], "the key/value cache is full: length + new tokens exceed its capacity")
    elif layout == "ring":
        needed = dims["s"] if window is None else T.min(end, dims["s"] + (window - 1))
        _check(needed <= dims["cap"], "the ring cache is too small for the window and this many new tokens")
    else:
        _check(end <= dims["pages"] * page, "the page table is full: length + new tokens exceed its pages")
        with T.serial(T.int64(0), dims["b"]) as b, T.serial(T.int64(0), T.ceildiv(end, T.int64(page))) as n:
            number = buffers["table"][b, n]
            inside = T.And(number >= T.int32(0), T.cast(number, "int64") < dims["p"])
            _check(inside, "the page table names a page that doesn't exist")


def _check(condition: Any, message: str) -> None:
    with T.Assert(condition, message):
        pass


def _build(name: str, spec: Spec, args: Sequence[Arg], target: Target) -> Any:
    few_task, many_task, merge = few_rows(spec, args, target), many_rows(spec, args, target), _merge(spec, target)
    per_task, rows, state = spec.per_task, spec.rows, state_words(spec, target)
    scratch_words = max(few_words(spec, target), many_words(spec, target))
    operands = [a.name for a in args if a.name not in ("out", "length")]

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        batch, count = dims["b"], dims["s"]
        if spec.layout is None:
            total = dims["t"]
            if spec.bias:
                for dim, full in (("bias_b", batch), ("bias_h", T.int64(spec.heads))):
                    _check(
                        T.Or(dims[dim] == 1, dims[dim] == full),
                        "the attention bias doesn't broadcast over batch or heads",
                    )
        else:
            length = T.bind(buffers["length"][T.int64(0)])
            _assert_fits(spec.layout, spec.page, buffers, dims, length, spec.window)
            total = length + count
        seen = total if spec.window is None else T.min(total, T.int64(spec.window))
        few = count * spec.group <= FEW
        wanted = T.max(T.min(T.ceildiv(seen, T.int64(_SPLIT)), T.int64(_PARTS)), T.int64(1))
        parts = T.Select(few, wanted, T.int64(1))
        blocks = T.ceildiv(count, T.int64(per_task))
        tasks = batch * spec.kv_heads * blocks
        # Every part's running maximum, sum and weighted values, per row. TVM hoists allocations above the reading of
        # `length`, so the size depends on dimensions only.
        states = T.alloc_buffer((tasks * T.Select(few, T.int64(_PARTS), T.int64(1)) * (rows * state),), "float32")
        data = [buffers[o].data for o in operands]
        extra = [dims.get(d, T.int64(0)) for d in ("cap", "pages", "bias_b", "bias_h")]

        def of(t: Any) -> list[Any]:
            first = T.floormod(t, blocks) * per_task
            heads = T.floordiv(t, blocks)
            return [T.floordiv(heads, spec.kv_heads), T.floormod(heads, spec.kv_heads), first,
                    T.min(count - first, T.int64(per_task))]  # fmt: skip

        def attend(t: Any) -> None:
            scratch = T.alloc_buffer((scratch_words,), "float32")
            where = [*data, states.data, scratch.data, t * (rows * state), *of(T.floordiv(t, parts)), T.floormod(t, parts),
                     parts, count, total, *extra]  # fmt: skip
            with T.If(few):
                with T.Then():
                    few_task.call(*where)
                with T.Else():
                    many_task.call(*where)

        def finish(t: Any) -> None:
            merge.call(states.data, buffers["out"].data, t * parts * (rows * state), *of(t), parts, count, rows * state)

        small = batch * count * T.max(seen, T.int64(1)) * (spec.heads * (spec.head_dim + spec.v_dim)) <= 1 << 17
        in_tasks(tasks * parts, attend, serial=small)
        in_tasks(tasks, finish, serial=batch * count * (spec.heads * spec.v_dim) * parts <= 1 << 17)

    return prim_func(name, args, [few_task, many_task, merge], body)


def _merge(spec: Spec, target: Target) -> Micro:
    """Merge the parts of one task's rows and write them: sum of weighted values over sum of weights."""
    scalars = ("state0", "b", "hk", "i0", "ni", "parts", "count", "apart")
    f = Function("merge", [("ptr", "states"), ("ptr", "out"), *[("i64", x) for x in scalars]], target)
    states, out, state0, b, hk, i0, ni, parts, count, apart = f.params()
    group, state = spec.group, state_words(spec, target)
    lowest = float("-inf")

    def row(r: Val, _: list[Val]) -> None:
        mine = f.at(states, state0 + r * state, "float32")
        top, _end = f.loop(0, parts, 1, [f.const(lowest, "float")], lambda p, vs: [
            f.maximum(vs[0], f.load("float", f.at(mine, p * apart, "float32")))])  # fmt: skip
        safe = f.select(top.cmp("oeq", lowest), f.const(0.0, "float"), top)

        def factor(p: Val) -> Val:
            return f.exp(f.load("float", f.at(mine, p * apart, "float32")) - safe)

        total, _end = f.loop(0, parts, 1, [f.const(0.0, "float")], lambda p, vs: [
            vs[0] + factor(p) * f.load("float", f.at(mine, p * apart + 1, "float32"))])  # fmt: skip
        empty = f.const(float("nan") if spec.nan_rows else 0.0, "float")
        target_row = ((b * count + i0 + r / group) * spec.heads + hk * group + r % group) * spec.v_dim

        def write(i: Val, mask: Val | None, _: list[Val]) -> None:
            value, _end = f.loop(0, parts, 1, [f.const(0.0, f"<{f.lanes} x float>")], lambda p, vs: [
                vs[0] + f.load_f32(mine, p * apart + i + STATE_VALUES, "float32") * f.splat(factor(p), f.lanes)])  # fmt: skip
            none = f.splat(total, f.lanes).cmp("oeq", 0.0)
            value = f.select(none, f.splat(empty, f.lanes), value / f.splat(total, f.lanes))
            f.store_f32(value, out, target_row + i, spec.dtype, mask)

        f.vectors(spec.v_dim, write)

    f.loop(0, ni * group, 1, [], row)
    return f.finish()
