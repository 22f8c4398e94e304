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

import attrs
from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import TargetError
from jisu.compiler.rows import ROW_BITS, record_bytes
from jisu.targets.cpu.isa import Arg, Function, Micro, Val, align_up, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import block_sizes, copy_row, in_tasks, product, row_blocks
from jisu.targets.target import Target

LAYOUTS = ("contiguous", "ring", "paged")
KEYS = 64  # keys per tile
_ROWS = 48  # query rows per task, about
_FEW = 8  # rows up to which keys are used as they lie, not transposed first
_SPLIT = 512  # keys per part when one decoded token attends to many
_PARTS = 16  # parts at most


@attrs.frozen
class _Spec:
    """What one attention kernel computes; the fields are the builders' options."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: bool
    bias: str | None
    nan_rows: bool
    layout: str | None
    page: int
    scheme: str = "none"

    @property
    def stored(self) -> str:
        """The dtype in which the kernel reads keys and values: of a cache of records, what a tile was decoded to."""
        return self.dtype if self.scheme == "none" else "float32"

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def k_stride(self) -> int:
        return self.head_dim * (self.kv_heads if self.layout is None else 1)

    @property
    def v_stride(self) -> int:
        return self.v_dim * (self.kv_heads if self.layout is None else 1)


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
                 sinks, bias, nan_rows, None, 0)  # fmt: skip
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
    return _build("attention", spec, args, target, bias_dtype or dtype)


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
    spec = _spec(heads, kv_heads, head_dim, v_dim, dtype, target, scale, True, window, softcap, sinks, None, False,
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
    return _build("attention_cached", spec, args, target, dtype)


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
        row, stride = _place(f, layout, page, kv_heads, at, at["slot"] + i)
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
    window: int | None, softcap: float | None, sinks: bool, bias: str | None, nan_rows: bool, layout: str | None,
    page: int, scheme: str = "none",
) -> _Spec:  # fmt: skip
    require_dtype(dtype, target)
    if layout is not None:
        _require_layout(layout, page)
    if heads % kv_heads:
        raise TargetError(f"{heads} query heads can't share {kv_heads} key/value heads evenly")
    if bias not in (None, "float", "bool"):
        raise TargetError(f"an attention bias is None, 'float' or 'bool', not {bias!r}")
    return _Spec(heads, kv_heads, head_dim, v_dim, dtype, scale, causal, window, softcap, sinks, bias, nan_rows, layout,
                 page, scheme)  # fmt: skip


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


def _place(
    f: Function, layout: str | None, page: int, kv_heads: int, at: Mapping[str, Val], slot: Val
) -> tuple[Val, Val | int]:
    """Where a slot of sequence at["b"] lies: the row of head 0, and how many rows further each next head is."""
    if layout == "paged":
        number = f.load("i32", f.at(at["table"], at["b"] * at["pages"] + slot / page, "int32"))
        return f.cast("sext", number, "i64") * (kv_heads * page) + slot % page, f.i64(page)
    within = slot % at["cap"] if layout == "ring" else slot
    return at["b"] * kv_heads * at["cap"] + within, at["cap"]


def _build(name: str, spec: _Spec, args: Sequence[Arg], target: Target, bias_dtype: str) -> Any:
    tile = _tiles(spec, args, target, bias_dtype)
    merge = _merge(spec, target)
    per_task = max(1, _ROWS // spec.group)  # query positions
    rows = per_task * spec.group
    state, lanes = _state_words(spec, target), target.lanes("float32")
    operands = [a.name for a in args if a.name not in ("out", "length")]
    score_words = rows * KEYS + spec.head_dim * KEYS + rows * align_up(spec.head_dim, lanes)
    if spec.scheme != "none":
        score_words += KEYS * (spec.head_dim + spec.v_dim)

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
        few = count * spec.group <= _FEW
        wanted = T.max(T.min(T.ceildiv(seen, T.int64(_SPLIT)), T.int64(_PARTS)), T.int64(1))
        parts = T.Select(few, wanted, T.int64(1))
        blocks = T.ceildiv(count, T.int64(per_task))
        tasks = batch * spec.kv_heads * blocks
        # Every part's running maximum, sum and weighted values, per row. TVM hoists allocations above the reading of
        # `length`, so the size depends on dimensions only.
        states = T.alloc_buffer((tasks * T.Select(few, T.int64(_PARTS), T.int64(1)) * (rows * state),), "float32")
        data = [buffers[o].data for o in operands]
        extra = [dims.get(d, T.int64(0)) for d in ("cap", "pages", "bias_b", "bias_h")]

        def place(t: Any) -> list[Any]:
            first = T.floormod(t, blocks) * per_task
            heads = T.floordiv(t, blocks)
            return [T.floordiv(heads, spec.kv_heads), T.floormod(heads, spec.kv_heads), first,
                    T.min(count - first, T.int64(per_task))]  # fmt: skip

        def attend(t: Any) -> None:
            scratch = T.alloc_buffer((score_words,), "float32")
            part = T.floormod(t, parts)
            tile.call(*data, states.data, scratch.data, t * (rows * state), *place(T.floordiv(t, parts)), part, parts, count,
                      total, *extra)  # fmt: skip

        def finish(t: Any) -> None:
            merge.call(
                states.data, buffers["out"].data, t * parts * (rows * state), *place(t), parts, count, rows * state
            )

        small = batch * count * T.max(seen, T.int64(1)) * (spec.heads * (spec.head_dim + spec.v_dim)) <= 1 << 17
        in_tasks(tasks * parts, attend, serial=small)
        in_tasks(tasks, finish, serial=batch * count * (spec.heads * spec.v_dim) * parts <= 1 << 17)

    return prim_func(name, args, [tile, merge], body)


def _state_words(spec: _Spec, target: Target) -> int:
    """Words per row of running state: maximum and sum (in 16), then the weighted values, padded to whole vectors."""
    return 16 + align_up(spec.v_dim, target.lanes("float32"))


def _tiles(spec: _Spec, args: Sequence[Arg], target: Target, bias_dtype: str) -> Micro:
    """One task: its rows against its part of the keys, tile by tile, leaving maximum, sum and weighted values."""
    operands = [a.name for a in args if a.name not in ("out", "length")]
    scalars = ("state0", "b", "hk", "i0", "ni", "part", "parts", "count", "total", "cap", "pages", "bias_b", "bias_h")
    pointers = (*operands, "states", "scratch")
    f = Function("attend", [("ptr", o) for o in pointers] + [("i64", x) for x in scalars], target)
    at = dict(zip((*pointers, *scalars), f.params(), strict=True))
    group, d, lanes = spec.group, spec.head_dim, f.lanes
    d_pad, state = align_up(d, lanes), _state_words(spec, target)
    max_rows = max(1, _ROWS // group) * group
    scores = at["scratch"]
    keys = f.at(scores, max_rows * KEYS, "float32")
    queries = f.at(keys, d * KEYS, "float32")
    states = f.at(at["states"], at["state0"], "float32")
    rows = at["ni"] * group
    base = at["total"] - at["count"] + at["i0"]  # position of the first row

    def prepare(r: Val, _: list[Val]) -> None:
        source = ((at["b"] * at["count"] + at["i0"] + r / group) * spec.heads + at["hk"] * group + r % group) * d

        def scaled(i: Val, mask: Val | None, _: list[Val]) -> None:
            v = f.load_f32(at["q"], source + i, spec.dtype, mask) * spec.scale
            f.store_f32(v, queries, r * d_pad + i, "float32")

        f.vectors(d, scaled)
        mine = f.at(states, r * state, "float32")
        if spec.sinks:
            # A sink is one more key with its own score and no value; exactly one part counts it.
            sink = f.load_f32(at["sinks"], at["hk"] * group + r % group, spec.dtype, None, 1)
            first = at["part"].cmp("eq", 0)
            f.store(f.select(first, sink, float("-inf")), mine)
            f.store(f.select(first, f.const(1.0, "float"), 0.0), f.at(mine, 1, "float32"))
        else:
            f.store(f.const(float("-inf"), "float"), mine)
            f.store(f.const(0.0, "float"), f.at(mine, 1, "float32"))
        f.vectors(state - 16, lambda i, _, __: f.store_f32(f.const(0.0, vec), mine, i + 16, "float32"))

    vec = f"<{lanes} x float>"
    f.loop(0, rows, 1, [], prepare)

    start = f.load("i64", f.at(at["start"], at["b"], "int64")) if spec.layout is not None else f.i64(0)
    low = start if spec.window is None else f.maximum(start, base - (spec.window - 1))
    low = f.maximum(low, 0)
    high = f.minimum(base + at["ni"], at["total"]) if spec.causal else at["total"]
    share = (f.maximum(high - low, 0) + at["parts"] - 1) / at["parts"]
    begin = low + share * at["part"]
    end = f.minimum(high, begin + share)

    def visit(j: Val) -> Val:
        room = f.minimum(end - j, KEYS)
        if spec.layout is None:
            k_at = ((at["b"] * at["total"] + j) * spec.kv_heads + at["hk"]) * d
            v_at = ((at["b"] * at["total"] + j) * spec.kv_heads + at["hk"]) * spec.v_dim
        else:
            if spec.layout == "ring":
                room = f.minimum(room, at["cap"] - j % at["cap"])
            elif spec.layout == "paged":
                room = f.minimum(room, spec.page - j % spec.page)
            row, stride = _place(f, spec.layout, spec.page, spec.kv_heads, at, j)
            place = row + at["hk"] * stride
            k_at, v_at = place * d, place * spec.v_dim
        if spec.scheme == "none":
            k_tile, v_tile = f.at(at["k"], k_at, spec.dtype), f.at(at["v"], v_at, spec.dtype)
        else:
            k_tile = f.at(queries, max_rows * d_pad, "float32")
            v_tile = f.at(k_tile, KEYS * d, "float32")
            for name, tile, width in (("k", k_tile, d), ("v", v_tile, spec.v_dim)):
                records = f.at(at[name], place * record_bytes(spec.scheme, width), "uint8")
                f.use(decode_records(spec.scheme, width, target), records, tile, room)
        f.when(rows <= _FEW, lambda: few(k_tile, room), lambda: many(k_tile, room))
        f.loop(0, rows, 1, [], lambda r, _: weigh(r, j, room))
        _values(f, spec, target, scores, v_tile, states, rows, room, state)
        return j + room

    dots, transpose = _dots(spec, target), _transpose(spec, target)
    score = {mr: product(mr, target, k=d, vectors=2) for mr in block_sizes(target)}

    def few(k_tile: Val, n: Val) -> None:
        f.use(dots, queries, k_tile, scores, rows, n)

    def many(k_tile: Val, n: Val) -> None:
        f.use(transpose, k_tile, keys, n)
        f.loop(0, n, 2 * lanes, [], lambda c, _: row_blocks(f, rows, lambda mr, m: f.use(
            score[mr], f.at(queries, m * d_pad, "float32"), d_pad, f.at(keys, c, "float32"), KEYS,
            f.at(scores, m * KEYS + c, "float32"), KEYS, d), block_sizes(target)))  # fmt: skip

    softmax = _weigh(spec, target, bias_dtype)

    def weigh(r: Val, j: Val, n: Val) -> None:
        i, h = r / group, at["hk"] * group + r % group
        lowest = start if spec.window is None else f.maximum(start, base + i - (spec.window - 1))
        highest = base + i + 1 if spec.causal else at["total"]
        first = f.minimum(f.maximum(lowest - j, 0), n)
        last = f.minimum(f.maximum(highest - j, 0), n)
        more: list[Val] = []
        if spec.bias:
            own_b = f.select(at["bias_b"] > 1, at["b"], f.i64(0))
            own_h = f.select(at["bias_h"] > 1, h, f.i64(0))
            row = ((own_b * at["bias_h"] + own_h) * at["count"] + at["i0"] + i) * at["total"] + j
            more = [f.at(at["bias"], row, "bool" if spec.bias == "bool" else bias_dtype)]
        f.use(softmax, f.at(scores, r * KEYS, "float32"), f.at(states, r * state, "float32"), *more, first, last, n)

    f.walk(begin, end, visit)
    return f.finish()


def _values(
    f: Function, spec: _Spec, target: Target, scores: Val, v_tile: Val, states: Val, rows: Val, n: Val, state: int
) -> None:
    """Add scores[rows, n] @ values[n, v_dim] to the rows' weighted values, two vectors of columns at a time."""
    lanes = f.lanes
    for column in range(0, spec.v_dim, 2 * lanes):
        width = min(2 * lanes, spec.v_dim - column)
        add = {
            mr: product(mr, target, vectors=-(-width // lanes), columns=width, rows_of=spec.stored, accumulate=True)
            for mr in block_sizes(target)
        }

        def multiply(mr: int, m: Val, add: dict[int, Micro] = add, column: int = column) -> None:
            values, sums = f.at(v_tile, column, spec.stored), f.at(states, m * state + (16 + column), "float32")
            f.use(add[mr], f.at(scores, m * KEYS, "float32"), KEYS, values, spec.v_stride, sums, state, n)

        row_blocks(f, rows, multiply, block_sizes(target))


def decode_records(scheme: str, k: int, target: Target) -> Micro:
    """void(records, out, n): out[n, k] in float32, the rows that n records of k numbers stand for."""
    f = Function("decode", [("ptr", "records"), ("ptr", "out"), ("i64", "n")], target)
    records, out, n = f.params()
    bits, size = ROW_BITS[scheme], record_bytes(scheme, k)
    codes = k * bits // 8

    def row(r: Val, _: list[Val]) -> None:
        here, there = f.at(records, r * size, "uint8"), f.at(out, r * k, "float32")
        tail = []
        for i in (codes, codes + 2):  # a record may begin at an odd address
            half = f.op(f"load i16, ptr {f.at(here, i, 'uint8').name}, align 1", "i16")
            tail.append(f.splat(f.widen(half, "bfloat16"), f.lanes))
        scale, offset = tail

        def some(i: Val, mask: Val | None, _: list[Val]) -> None:
            both = f.cast("zext", f.load_raw("i8", f.at(here, i, "uint8"), mask), "i32")
            for part, code in enumerate([both] if bits == 8 else [both & 15, both >> 4]):
                value = f.fma(f.cast("sitofp", code, "float"), scale, offset)
                f.store_f32(value, there, i + part * codes, "float32", mask)

        f.vectors(codes, some)

    f.loop(0, n, 1, [], row)
    return f.finish()


def _dots(spec: _Spec, target: Target) -> Micro:
    """void(q, k, scores, rows, n): scores[r, j] = q[r] k[j], one vector of keys at a time; q is padded with zeros."""
    f = Function("dots", [("ptr", "q"), ("ptr", "k"), ("ptr", "s"), ("i64", "rows"), ("i64", "n")], target)
    q, k, s, rows, n = f.params()
    lanes, d = f.lanes, spec.head_dim
    d_pad = align_up(d, lanes)

    def block(j: Val, _: list[Val]) -> None:
        at = [f.at(k, f.minimum(j + i, n - 1) * spec.k_stride, spec.stored) for i in range(lanes)]

        def row(r: Val, _: list[Val]) -> None:
            sums = [f.const(0.0, f"<{lanes} x float>")] * lanes
            for c in range(0, d, lanes):
                mask = f.mask_below(d - c) if d - c < lanes else None
                x = f.load_f32(q, r * d_pad + c, "float32")
                sums = [f.fma(x, f.load_f32(p, c, spec.stored, mask), t) for p, t in zip(at, sums, strict=True)]
            f.store_f32(_fold(f, sums), s, r * KEYS + j, "float32")

        f.loop(0, rows, 1, [], row)

    f.loop(0, n, lanes, [], block)
    return f.finish()


def _exchange(f: Function, a: Val, b: Val, size: int) -> tuple[Val, Val]:
    """Swap the odd blocks (of `size` lanes) of a with the even blocks of b."""
    lanes = f.lanes
    halves = []
    for odd in (0, 1):
        picks = [(i - i % (2 * size)) + odd * size + i % size + (lanes if i // size % 2 else 0) for i in range(lanes)]
        mask = ", ".join(f"i32 {p}" for p in picks)
        halves.append(f.op(f"shufflevector {a.type} {a.name}, {b.type} {b.name}, <{lanes} x i32> <{mask}>", a.type))
    return halves[0], halves[1]


def _fold(f: Function, values: list[Val]) -> Val:
    """Lane i of the result is the sum of all lanes of values[i]."""
    size = 1
    while len(values) > 1:
        pairs = [_exchange(f, values[i], values[i + 1], size) for i in range(0, len(values), 2)]
        values = [a + b for a, b in pairs]
        size *= 2
    return values[0]


def _transpose(spec: _Spec, target: Target) -> Micro:
    """void(k, out, n): out[c, j] = k[j, c] in float32, for a tile of n keys; columns from n on hold the last key."""
    f = Function("transpose", [("ptr", "k"), ("ptr", "out"), ("i64", "n")], target)
    k, out, n = f.params()
    lanes, d = f.lanes, spec.head_dim

    def block(j: Val, _: list[Val]) -> None:
        at = [f.at(k, f.minimum(j + i, n - 1) * spec.k_stride, spec.stored) for i in range(lanes)]
        for c in range(0, d, lanes):
            mask = f.mask_below(d - c) if d - c < lanes else None
            rows = [f.load_f32(p, c, spec.stored, mask) for p in at]
            size = 1
            while size < lanes:
                for i in (i for i in range(lanes) if not i & size):
                    rows[i], rows[i + size] = _exchange(f, rows[i], rows[i + size], size)
                size *= 2
            for i in range(min(lanes, d - c)):
                f.store_f32(rows[i], out, f.i64((c + i) * KEYS) + j, "float32")

    # Whole pairs of vectors, since the products read two at a time.
    f.loop(0, (n + (2 * lanes - 1)) & (-2 * lanes), lanes, [], block)
    return f.finish()


def _weigh(spec: _Spec, target: Target, bias_dtype: str) -> Micro:
    """void(scores, state, [bias], first, last, n): one row's step of the online softmax.

    Scores become weights e^(score - maximum), 0 outside first…last; sum and weighted values are rescaled when the
    maximum grows.
    """
    extra = [("ptr", "bias")] if spec.bias else []
    scalars = [("i64", "first"), ("i64", "last"), ("i64", "n")]
    f = Function("weigh", [("ptr", "s"), ("ptr", "state"), *extra, *scalars], target)
    s, state, *rest = f.params()
    first, last, n = rest[-3:]
    vec = f"<{f.lanes} x float>"
    lowest = float("-inf")

    def seen(i: Val) -> Val:
        lane = f.iota() + i
        return f.op(f"and <{f.lanes} x i1> {(lane >= first).name}, {(lane < last).name}", f"<{f.lanes} x i1>")

    def scan(i: Val, values: list[Val]) -> list[Val]:
        v = f.load_f32(s, i, "float32")
        visible = seen(i)
        if spec.softcap is not None:
            v = f.tanh(v / spec.softcap) * spec.softcap
        if spec.bias == "float":
            v = v + f.load_f32(rest[0], i, bias_dtype, visible)
        elif spec.bias == "bool":
            v = f.select(f.load_raw("i8", f.at(rest[0], i, "bool"), visible).cmp("ne", 0), v, lowest)
        v = f.select(visible, v, lowest)
        f.store_f32(v, s, i, "float32")
        return [f.maximum(values[0], v)]

    top, _ = f.loop(0, n, f.lanes, [f.const(lowest, vec)], scan)
    old = f.load("float", state)
    new = f.maximum(old, f.reduce("fmax", top))
    f.store(new, state)
    safe = f.select(new.cmp("oeq", lowest), f.const(0.0, "float"), new)

    def weigh(i: Val, values: list[Val]) -> list[Val]:
        v = f.load_f32(s, i, "float32")
        w = f.select(v.cmp("oeq", lowest), f.like(0.0, v), f.exp(v - safe_all))
        f.store_f32(w, s, i, "float32")
        return [values[0] + w]

    safe_all = f.splat(safe, f.lanes)
    sums, _ = f.loop(0, n, f.lanes, [f.const(0.0, vec)], weigh)
    sum_at = f.at(state, 1, "float32")

    def rescale() -> None:
        factor = f.select(old.cmp("oeq", lowest), f.const(0.0, "float"), f.exp(old - safe))
        f.store(f.load("float", sum_at) * factor, sum_at)
        by = f.splat(factor, f.lanes)
        f.vectors(_state_words(spec, target) - 16, lambda i, _, __: f.store_f32(
            f.load_f32(state, i + 16, "float32") * by, state, i + 16, "float32"))  # fmt: skip

    f.when(new > old, rescale)
    f.store(f.load("float", sum_at) + f.reduce("fadd", sums), sum_at)
    return f.finish()


def _merge(spec: _Spec, target: Target) -> Micro:
    """Merge the parts of one task's rows and write them: sum of weighted values over sum of weights."""
    scalars = ("state0", "b", "hk", "i0", "ni", "parts", "count", "apart")
    f = Function("merge", [("ptr", "states"), ("ptr", "out"), *[("i64", x) for x in scalars]], target)
    states, out, state0, b, hk, i0, ni, parts, count, apart = f.params()
    group, state = spec.group, _state_words(spec, target)
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
                vs[0] + f.load_f32(mine, p * apart + i + 16, "float32") * f.splat(factor(p), f.lanes)])  # fmt: skip
            none = f.splat(total, f.lanes).cmp("oeq", 0.0)
            value = f.select(none, f.splat(empty, f.lanes), value / f.splat(total, f.lanes))
            f.store_f32(value, out, target_row + i, spec.dtype, mask)

        f.vectors(spec.v_dim, write)

    f.loop(0, ni * group, 1, [], row)
    return f.finish()
