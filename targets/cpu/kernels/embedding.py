"""Rows of a table by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import tirx as T

from jisu.targets.cpu.isa import Arg, Function, Val, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import copy_row, in_tasks
from jisu.targets.target import Target

OUT_OF_RANGE = "embedding: an index is outside the table"


def embedding(d: int, dtype: str, target: Target, *, out_dtype: str | None = None, scale: float | None = None) -> Any:
    """PrimFunc out[M, d] = table[ids] (times `scale`, rounded to `dtype`), converted to `out_dtype`.

    Parameters in order: table[V, d], ids int64[M], out[M, d]. The call fails with `OUT_OF_RANGE` where an id is negative
    or at least V; nothing outside the table is read.
    """
    require_dtype(dtype, target)
    out = out_dtype or dtype
    require_dtype(out, target)
    f = Function(
        "gather", [("ptr", "table"), ("ptr", "ids"), ("ptr", "out"), ("i64", "first"), ("i64", "last")], target
    )
    table, ids, result, first, last = f.params()

    def row(m: Val, _: list[Val]) -> None:
        source = f.load("i64", f.at(ids, m, "int64")) * d
        if scale is None:
            f.use(copy_row(d, dtype, out, target), f.at(table, source, dtype), f.at(result, m * d, out))
        else:
            f.vectors(d, lambda i, mask, _: f.store_f32(
                f.rounded(f.load_f32(table, source + i, dtype, mask) * scale, dtype), result, m * d + i, out, mask))  # fmt: skip

    f.loop(first, last, 1, [], row)
    micro = f.finish()
    per_task = max(1, (1 << 14) // d)

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        m = dims["m"]
        with T.serial(T.int64(0), m) as i:
            index = buffers["ids"][i]
            with T.Assert(T.And(index >= T.int64(0), index < dims["v"]), OUT_OF_RANGE):
                pass
        in_tasks(T.ceildiv(m, T.int64(per_task)), lambda t: micro.call(
            *(buffers[n].data for n in ("table", "ids", "out")), t * per_task, T.min(m, (t + 1) * per_task)),
            serial=m * d <= 1 << 17)  # fmt: skip

    args = [Arg("table", ("v", d), dtype), Arg("ids", ("m",), "int64"), Arg("out", ("m", d), out)]
    return prim_func("embedding", args, [micro], body)
