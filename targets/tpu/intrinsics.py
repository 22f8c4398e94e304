"""The chip's instructions in TIR: an external call each, which the consumers of lowered TIR give their meaning.

    tpu.copy(to, source, rows, columns, to's stride, source's stride)    a strided copy between HBM and VMEM, by the DMA engine
    tpu.zero(sums, rows, columns, stride)                                zeroes sums
    tpu.multiply(sums, x, w, rows, columns, inner, sums' stride, x's stride, w's stride)
                                                                         pushes w [inner, columns] into the matrix unit and streams rows
                                                                         of x [rows, inner] past it; results are added to the sums.
                                                                         Weights of another dtype become x's on their way

Strides count numbers, not bytes. Pointers are `tvm_access_ptr`s, whose offset says where a tile begins in its buffer. `tensor_intrinsic`
registers what `Schedule.tensorize` needs to put them into place of loops.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm import s_tir, tirx
from tvm.script import from_source
from tvm.script import tirx as T

from jisu.targets.tpu.events import ACC as SUMS
from jisu.targets.tpu.events import HBM as HBM
from jisu.targets.tpu.events import VMEM as VMEM
from jisu.targets.tpu.spec import ACCUMULATOR, MIDDLE

COPY, ZERO, MULTIPLY = "tpu.copy", "tpu.zero", "tpu.multiply"


@functools.cache
def copy_tile(rows: int, columns: int, dtype: str, source: str, to: str) -> str:
    """The name of a copy of [rows, columns] between scopes."""

    # The scheduler drops loops of a single step, so a row and a column have a loop less.
    described = (
        _row(columns, dtype, source, to) if rows == 1 else _column(rows, dtype, source, to) if columns == 1 else None
    )

    @T.prim_func(s_tir=True)
    def matrix(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, columns), dtype, offset_factor=1, scope=source)
        B = T.match_buffer(b, (rows, columns), dtype, offset_factor=1, scope=to)
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(B[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("copy"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vi, vj] = A[vi, vj]

    @T.prim_func(s_tir=True)
    def instruction(a: T.handle, b: T.handle) -> None:
        sa, sb = T.int32(), T.int32()
        A = T.match_buffer(a, (rows, columns), dtype, offset_factor=1, scope=source, strides=[sa, 1])
        B = T.match_buffer(b, (rows, columns), dtype, offset_factor=1, scope=to, strides=[sb, 1])
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(B[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", COPY, B.access_ptr("w"), A.access_ptr("r"), rows, columns, sb, sa))

    return _register(f"copy_{rows}x{columns}_{dtype}_{source}_{to}", described or matrix, instruction)


@functools.cache
def zero_tile(rows: int, columns: int, dtype: str) -> str:
    """The name of zeroing sums [rows, columns]."""

    @T.prim_func(s_tir=True)
    def description(c: T.handle) -> None:
        C = T.match_buffer(c, (rows, columns), dtype, offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("zero"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = T.Cast(dtype, 0)

    @T.prim_func(s_tir=True)
    def instruction(c: T.handle) -> None:
        sc = T.int32()
        C = T.match_buffer(c, (rows, columns), dtype, offset_factor=1, scope=SUMS, strides=[sc, 1])
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", ZERO, C.access_ptr("w"), rows, columns, sc))

    return _register(f"zero_{rows}x{columns}_{dtype}", description, instruction)


def scaled(level: Any, weights: str, scale: Any = None, zero: Any = None) -> Any:
    """What a level of w stands for, given its group's scale and zero, if it has such."""
    if zero is not None:
        level = level + tirx.const(MIDDLE[weights], "float32") - zero.astype("float32")
    return level if scale is None else level * scale.astype("float32")


@functools.cache
def multiply_tile(
    rows: int, columns: int, inner: int, dtype: str, weights: str, group: int = 0, scales: str = "float16", zeros: bool = False
) -> str:  # fmt: skip
    """The name of adding x [rows, inner] @ w [inner, columns] to sums; `weights` is the dtype of w; group, scales, zeros: as those of `Product`."""
    if group:
        return _multiply_groups(rows, columns, inner, dtype, weights, group, scales, zeros)
    summed = ACCUMULATOR[dtype]

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, inner), dtype, offset_factor=1, scope=VMEM)
        B = T.match_buffer(b, (inner, columns), weights, offset_factor=1, scope=VMEM)
        C = T.match_buffer(c, (rows, columns), summed, offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:rows, 0:inner], B[0:inner, 0:columns])
            T.writes(C[0:rows, 0:columns])
            for i, j, k in T.grid(rows, columns, inner):
                with T.sblock("multiply"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + A[vi, vk].astype(summed) * B[vk, vj].astype(summed)

    @T.prim_func(s_tir=True)
    def instruction(a: T.handle, b: T.handle, c: T.handle) -> None:
        sa, sb, sc = T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (rows, inner), dtype, offset_factor=1, scope=VMEM, strides=[sa, 1])
        B = T.match_buffer(b, (inner, columns), weights, offset_factor=1, scope=VMEM, strides=[sb, 1])
        C = T.match_buffer(c, (rows, columns), summed, offset_factor=1, scope=SUMS, strides=[sc, 1])
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:rows, 0:inner], B[0:inner, 0:columns])
            T.writes(C[0:rows, 0:columns])
            T.evaluate(
                T.call_extern(
                    "int32",
                    MULTIPLY,
                    C.access_ptr("rw"),
                    A.access_ptr("r"),
                    B.access_ptr("r"),
                    rows,
                    columns,
                    inner,
                    sc,
                    sa,
                    sb,
                )
            )

    return _register(f"multiply_{rows}x{columns}x{inner}_{dtype}_{weights}", description, instruction)


def _multiply_groups(
    rows: int, columns: int, inner: int, dtype: str, weights: str, group: int, scales: str, zeros: bool
) -> str:
    """`multiply_tile` of codes in groups; the functions' parameters depend on whether there are zeros."""
    deep = max(inner // group, 1)
    grid = [("S", scales), *([("Z", "uint8")] if zeros else [])]
    shapes = {"A": (rows, inner, dtype, VMEM), "B": (inner, columns, weights, VMEM)}
    shapes |= {name: (deep, columns, kind, VMEM) for name, kind in grid} | {"C": (rows, columns, "float32", SUMS)}
    # In the order in which the sum reads them.
    reads = ", ".join(f"{n}[0:{shapes[n][0]}, 0:{shapes[n][1]}]" for n in ("A", "B", *"Z" * zeros, "S"))
    value = (
        "B[vk, vj].astype('float32')"
        + f" + T.float32({MIDDLE[weights]}) - Z[vk // {group}, vj].astype('float32')" * zeros
    )
    pointers = [
        "C.access_ptr('rw')",
        *(f"{n}.access_ptr('r')" for n in "AB"),
        rows,
        columns,
        inner,
        "sC",
        "sA",
        "sB",
        group,
    ]
    pointers += [text for n, _ in grid for text in (f"{n}.access_ptr('r')", f"s{n}")]

    def function(strided: bool, body: str) -> Any:
        def buffer(name: str) -> str:
            height, width, kind, scope = shapes[name]
            strides = f", strides=[s{name}, 1]" if strided else ""
            return f"    {name} = T.match_buffer(p{name}, ({height}, {width}), '{kind}', offset_factor=1, scope='{scope}'{strides})"

        return from_source("\n".join([
            "@T.prim_func(s_tir=True)",
            f"def function({', '.join(f'p{name}: T.handle' for name in shapes)}) -> None:",
            *([f"    s{name} = T.int32()" for name in shapes] if strided else []),
            *map(buffer, shapes),
            "    with T.sblock('root'):",
            f"        T.reads(C[0:{rows}, 0:{columns}], {reads})",
            f"        T.writes(C[0:{rows}, 0:{columns}])",
            body,
        ]), {"T": T})  # fmt: skip

    description = function(
        False,
        f"""
        for i, j, k in T.grid({rows}, {columns}, {inner}):
            with T.sblock('multiply'):
                vi, vj, vk = T.axis.remap('SSR', [i, j, k])
                C[vi, vj] = C[vi, vj] + A[vi, vk].astype('float32') * (({value}) * S[vk // {group}, vj].astype('float32'))
""",
    )
    call = ", ".join(map(str, pointers))
    instruction = function(True, f"        T.evaluate(T.call_extern('int32', '{MULTIPLY}', {call}))")
    name = f"multiply_{rows}x{columns}x{inner}_{dtype}_{weights}_{group}_{scales}{'_zeros' * zeros}"
    return _register(name, description, instruction)


def _row(columns: int, dtype: str, source: str, to: str) -> Any:
    @T.prim_func(s_tir=True)
    def row(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (1, columns), dtype, offset_factor=1, scope=source)
        B = T.match_buffer(b, (1, columns), dtype, offset_factor=1, scope=to)
        with T.sblock("root"):
            T.reads(A[0, 0:columns])
            T.writes(B[0, 0:columns])
            for j in range(columns):
                with T.sblock("copy"):
                    vj = T.axis.spatial(columns, j)
                    B[0, vj] = A[0, vj]

    return row


def _column(rows: int, dtype: str, source: str, to: str) -> Any:
    @T.prim_func(s_tir=True)
    def column(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, 1), dtype, offset_factor=1, scope=source)
        B = T.match_buffer(b, (rows, 1), dtype, offset_factor=1, scope=to)
        with T.sblock("root"):
            T.reads(A[0:rows, 0])
            T.writes(B[0:rows, 0])
            for i in range(rows):
                with T.sblock("copy"):
                    vi = T.axis.spatial(rows, i)
                    B[vi, 0] = A[vi, 0]

    return column


def _register(name: str, description: Any, instruction: Any) -> str:
    full = f"jisu.tpu.{name}"
    s_tir.TensorIntrin.register(full, description, instruction, override=True)
    return full
