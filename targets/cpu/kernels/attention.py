"""Attention: online softmax over tiles of keys, stateless or over a key/value cache, and the cache's append.

The rows of one task are query positions times the query heads that share a key/value head, so that a tile of keys is
read once for all of them. Every mask but a bias operand makes the visible keys of a row an interval, so whole tiles
outside it are never touched. Sums are float32 and their order depends on the lengths only, never on the threads.

Cache layouts: "contiguous" (slot s at row s), "ring" (slot s at row s % CAP), "paged" (a table of pages per sequence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import Arg, Function, Micro, Val, align_up, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import copy_row, in_tasks, panel_width, product, row_blocks
from jisu.targets.cpu.kernels.matmul import block_sizes
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
    sinks: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc of causal attention of C new tokens over a cache that already holds them.

    Parameters in order: q[B, C, heads, head_dim], k_cache and v_cache ([B, kv_heads, CAP, D], or with layout "paged"
    [P, kv_heads, page, D] and then page_table int32[B, MAXPAGES]), length int64[1] (slots filled before this chunk;
    query i is at slot length + i), start int64[B] (first valid slot per sequence), sinks[heads] if `sinks`,
    out[B, C, heads, v_dim]. A row that sees no key is 0. The call fails where the cache can't hold length + C slots
    (in a ring: where the window's keys of all new tokens exceed CAP) or a page number is outside the pages.
    """
    spec = _spec(heads, kv_heads, head_dim, v_dim, dtype, target, scale, True, window, softcap, sinks, None, False,
                 layout, page)  # fmt: skip
    args = [
        Arg("q", ("b", "s", heads, head_dim), dtype),
        *_cache_args(layout, kv_heads, head_dim, v_dim, page, dtype),
        Arg("length", (1,), "int64"),
        Arg("start", ("b",), "int64"),
    ]
    if sinks:
        args.append(Arg("sinks", (heads,), dtype))
    args.append(Arg("out", ("b", "s", heads, v_dim), dtype))
    return _build("attention_cached", spec, args, target, dtype)


def cache_append(kv_heads: int, dim: int, dtype: str, target: Target, *, layout: str = "contiguous", page: int = 0) -> Any:
    """PrimFunc that writes C new rows into one cache (of keys or of values) in place, for call_tir_inplace.

    Parameters in order: cache ([B, kv_heads, CAP, dim]; paged: [P, kv_heads, page, dim], then page_table
    int32[B, MAXPAGES]), length int64[1] (slots filled before), new[B, C, kv_heads, dim]. The call fails rather than
    write beyond CAP (contiguous), more than CAP rows at once (ring) or outside the pages.
    """
    _require_layout(layout, page)
    require_dtype(dtype, target)
    args = [*_cache_args(layout, kv_heads, dim, None, page, dtype), Arg("length", (1,), "int64")]
    args.append(Arg("new", ("b", "s", kv_heads, dim), dtype))
    copy = copy_row(dim, dtype, dtype, target)
    f = Function("append", [("ptr", "cache"), ("ptr", "table"), ("ptr", "new"), *[("i64", n) for n in _APPEND]], target)
    cache, table, new, b, slot, head0, cap, pages, count = f.params()

    def token(i: Val, _: list[Val]) -> None:
        def head(h: Val, _: list[Val]) -> None:
            row = _row(f, layout, page, kv_heads, b, h, slot + i, cap, table, pages)
            source = ((b * count + i) * kv_heads + h) * dim
            f.use(copy, f.at(new, source, dtype), f.at(cache, row * dim, dtype))

        f.loop(0, kv_heads, 1, [], head)

    first, last = head0 & 0xFFFFFFFF, head0 >> 32
    f.loop(first, last, 1, [], token)
    micro = f.finish()

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        length, c = buffers["length"][T.int64(0)], dims["s"]
        _assert_fits(layout, page, buffers, dims, None)
        table_data = buffers["table"].data if layout == "paged" else buffers["length"].data
        per_task = max(1, 16384 // (kv_heads * dim))
        blocks = T.ceildiv(c, T.int64(per_task))

        def run(t: Any) -> None:
            first = T.floormod(t, blocks) * per_task
            span = first + T.min(c, first + T.int64(per_task)) * T.int64(1 << 32)
            cap = dims.get("cap", T.int64(0))
            micro.call(buffers["cache"].data, table_data, buffers["new"].data, T.floordiv(t, blocks), length, span, cap,
                       dims.get("maxpages", T.int64(0)), c)  # fmt: skip

        in_tasks(dims["b"] * blocks, run, serial=dims["b"] * c * (kv_heads * dim) <= 1 << 16)

    return prim_func("cache_append", args, [micro], body)


_APPEND = ("b", "slot", "span", "cap", "pages", "count")
