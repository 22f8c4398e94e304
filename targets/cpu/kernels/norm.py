"""Row-wise kernels: RMS norm, layer norm, softmax. One row is read twice or thrice, from the nearest cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from jisu.targets.cpu.isa import Arg, Function, Micro, Val, prim_func, require_dtype
from jisu.targets.cpu.kernels.matmul import in_tasks
from jisu.targets.target import Target

_SERIAL = 1 << 16  # elements that one core normalises in less time than waking another takes
_PER_TASK = 1 << 14


def rms_norm(
    d: int, dtype: str, target: Target, *, eps: float, offset: float = 0.0, round_first: bool = True,
    weight: bool = True, residual: bool = False, weight_dtype: str | None = None,
) -> Any:  # fmt: skip
    """PrimFunc y = x / sqrt(mean(x^2) + eps) * (offset + w), row by row, computed in float32.

    Parameters in order: x[M, d], residual[M, d] if `residual`, w[d] if `weight`, then, if `residual`, sum[M, d]
    (= x + residual, which is what is normalised), y[M, d]. With `round_first` the normalised row is rounded to `dtype`
    before w multiplies it (as Llama does), else after (as Gemma does).
    """
    require_dtype(dtype, target)

    def finish(f: Function, at: Mapping[str, Val], row: Val) -> None:
        def square(i: Val, mask: Val | None, values: list[Val]) -> list[Val]:
            v = f.load_f32(at[source], row + i, dtype, mask)
            return [f.fma(v, v, values[0])]

        (squares,) = f.vectors(d, square, [f.const(0.0, f"<{f.lanes} x float>")])
        mean = f.reduce("fadd", squares) * (1.0 / d)
        factor = f.splat(1.0 / f.call("float", "llvm.sqrt.f32", mean + eps), f.lanes)

        def write(i: Val, mask: Val | None, _: list[Val]) -> None:
            v = f.load_f32(at[source], row + i, dtype, mask) * factor
            if weight:
                w = f.load_f32(at["w"], i, weight_dtype or dtype, mask)
                v = (f.rounded(v, dtype) if round_first else v) * (w + offset if offset else w)
            f.store_f32(v, at["y"], row + i, dtype, mask)

        f.vectors(d, write)

    source = "sum" if residual else "x"
    operands = {"w": weight_dtype or dtype} if weight else {}
    return _row_kernel("rms_norm", d, dtype, target, operands, residual, finish)


def layer_norm(
    d: int, dtype: str, target: Target, *, eps: float, weight: bool = True, bias: bool = True, residual: bool = False,
) -> Any:  # fmt: skip
    """PrimFunc y = (x - mean) / sqrt(var + eps) * w + b, row by row, computed in float32 and rounded once.

    Parameters in order: x[M, d], residual[M, d] if `residual`, w[d] if `weight`, b[d] if `bias`, then, if `residual`,
    sum[M, d] (= x + residual, which is what is normalised), y[M, d].
    """
    require_dtype(dtype, target)
    source = "sum" if residual else "x"

    def finish(f: Function, at: Mapping[str, Val], row: Val) -> None:
        zero = f.const(0.0, f"<{f.lanes} x float>")

        def load(i: Val, mask: Val | None) -> Val:
            return f.load_f32(at[source], row + i, dtype, mask)

        (total,) = f.vectors(d, lambda i, mask, vs: [vs[0] + load(i, mask)], [zero])
        mean = f.splat(f.reduce("fadd", total) * (1.0 / d), f.lanes)

        def square(i: Val, mask: Val | None, values: list[Val]) -> list[Val]:
            v = load(i, mask) - mean
            v = v if mask is None else f.select(mask, v, 0.0)
            return [f.fma(v, v, values[0])]

        (squares,) = f.vectors(d, square, [zero])
        variance = f.reduce("fadd", squares) * (1.0 / d)
        factor = f.splat(1.0 / f.call("float", "llvm.sqrt.f32", variance + eps), f.lanes)

        def write(i: Val, mask: Val | None, _: list[Val]) -> None:
            v = (load(i, mask) - mean) * factor
            if weight:
                v = v * f.load_f32(at["w"], i, dtype, mask)
            if bias:
                v = v + f.load_f32(at["b"], i, dtype, mask)
            f.store_f32(v, at["y"], row + i, dtype, mask)

        f.vectors(d, write)

    operands = {name: dtype for name, there in (("w", weight), ("b", bias)) if there}
    return _row_kernel("layer_norm", d, dtype, target, operands, residual, finish)


def softmax(dtype: str, target: Target, *, out_dtype: str | None = None) -> Any:
    """PrimFunc y[M, N] = softmax of x[M, N] along the last axis; both dimensions are symbolic.

    Computed in float32; a row of only -inf gives NaN, as in PyTorch.
    """
    require_dtype(dtype, target)
    out = out_dtype or dtype
    require_dtype(out, target)
    f = Function("softmax", [("ptr", "x"), ("ptr", "y"), ("i64", "first"), ("i64", "last"), ("i64", "n")], target)
    x, y, first, last, n = f.params()
    vec = f"<{f.lanes} x float>"

    def row(r: Val, _: list[Val]) -> None:
        here = r * n

        def load(i: Val, mask: Val | None) -> Val:
            v = f.load_f32(x, here + i, dtype, mask)
            return v if mask is None else f.select(mask, v, float("-inf"))

        (top,) = f.vectors(n, lambda i, mask, vs: [f.maximum(vs[0], load(i, mask))], [f.const(float("-inf"), vec)])
        peak = f.splat(f.reduce("fmax", top), f.lanes)

        def weight(i: Val, mask: Val | None) -> Val:
            w = f.exp(load(i, mask) - peak)
            return w if mask is None else f.select(mask, w, 0.0)

        (total,) = f.vectors(n, lambda i, mask, vs: [vs[0] + weight(i, mask)], [f.const(0.0, vec)])
        factor = f.splat(1.0 / f.reduce("fadd", total), f.lanes)
        f.vectors(n, lambda i, mask, _: f.store_f32(weight(i, mask) * factor, y, here + i, out, mask))

    f.loop(first, last, 1, [], row)
    micro = f.finish()

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        m, width = dims["m"], dims["n"]
        per_task = T.max(T.int64(1), T.floordiv(T.int64(_PER_TASK), T.max(width, T.int64(1))))
        in_tasks(T.ceildiv(m, per_task), lambda t: micro.call(
            buffers["x"].data, buffers["y"].data, t * per_task, T.min(m, (t + 1) * per_task), width),
            serial=m * width <= _SERIAL // 4)  # fmt: skip

    return prim_func("softmax", [Arg("x", ("m", "n"), dtype), Arg("y", ("m", "n"), out)], [micro], body)


def _row_kernel(
    name: str, d: int, dtype: str, target: Target, operands: Mapping[str, str], residual: bool, finish: Any
) -> Any:
    """A PrimFunc over rows of x[M, d]: adds the residual, then finish(function, pointers, offset of the row)."""
    rows: Sequence[str] = ("x", "residual") if residual else ("x",)
    outs: Sequence[str] = ("sum", "y") if residual else ("y",)
    names = (*rows, *operands, *outs)
    f = Function(name, [*(("ptr", n) for n in names), ("i64", "first"), ("i64", "last")], target)
    at = dict(zip((*names, "first", "last"), f.params(), strict=True))

    def row(r: Val, _: list[Val]) -> None:
        here = r * d
        if residual:
            f.vectors(d, lambda i, mask, _: f.store_f32(
                f.load_f32(at["x"], here + i, dtype, mask) + f.load_f32(at["residual"], here + i, dtype, mask),
                at["sum"], here + i, dtype, mask))  # fmt: skip
        finish(f, at, here)

    f.loop(at["first"], at["last"], 1, [], row)
    shapes = [Arg(n, ("m", d), dtype) for n in rows] + [Arg(n, (d,), dt) for n, dt in operands.items()]
    return in_rows(name, d, [*shapes, *(Arg(n, ("m", d), dtype) for n in outs)], f.finish())


def in_rows(name: str, d: int, args: Sequence[Arg], micro: Micro) -> Any:
    """A PrimFunc over rows of `d` elements, `m` of them by its arguments' shapes: micro(pointers…, first row, end) in parts."""
    per_task = max(1, _PER_TASK // d)

    def body(buffers: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        m = dims["m"]
        in_tasks(T.ceildiv(m, T.int64(per_task)), lambda t: micro.call(
            *(buffers[a.name].data for a in args), t * per_task, T.min(m, (t + 1) * per_task)), serial=m * d <= _SERIAL)  # fmt: skip

    return prim_func(name, args, [micro], body)
