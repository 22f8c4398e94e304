"""Walking lowered TIR: rebuilding statements, and reading copies, products and waits off them. TVM's own mutators aren't open to Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
from tvm import sym, tirx
from tvm.ir import Call, Range
from tvm.ir.expr import TensorLoad

from jisu.targets.tpu.intrinsics import COPY, HBM, MULTIPLY, ZERO

COMMIT, WAIT, INFLIGHT = "async_commit_queue_scope", "async_wait_queue_scope", "async_wait_inflight_count"
ASYNC = ("async_scope", COMMIT, WAIT, INFLIGHT)
"""Attributes of asynchronous copies."""


def rebuild(statement: Any, visit: Callable[[Any], Any]) -> Any:
    """The statement with each part replaced by what `visit` gives for it; where that is None, the part keeps its kind and its parts are
    visited in turn."""
    replaced = visit(statement)
    if replaced is not None:
        return replaced
    match statement:
        case tirx.SeqStmt():
            return flat([rebuild(part, visit) for part in statement.seq])
        case tirx.For():
            body = rebuild(statement.body, visit)
            s = statement
            return tirx.For(s.loop_var, s.min, s.extent, s.kind, body, s.thread_binding, s.annotations, s.step)
        case tirx.AttrStmt():
            return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, rebuild(statement.body, visit))
        case tirx.IfThenElse():
            other = None if statement.else_case is None else rebuild(statement.else_case, visit)
            return tirx.IfThenElse(statement.condition, rebuild(statement.then_case, visit), other)
        case _:
            return statement


def flat(statements: list[Any]) -> Any:
    """Statements one after another, as one."""
    flattened = [part for s in statements for part in (s.seq if isinstance(s, tirx.SeqStmt) else [s])]
    return flattened[0] if len(flattened) == 1 else tirx.SeqStmt(flattened)


def substitute(statement: Any, variable: Any, value: Any) -> Any:
    """The statement with a number, or another variable, in a variable's place."""
    if isinstance(value, int):
        value = tirx.IntImm(variable.ty.dtype if hasattr(variable, "ty") else variable.dtype, value)
    return tirx.PrimFunc([variable], statement).specialize({variable: value}).body


def parts(statement: Any) -> Iterator[Any]:
    """The statement and all statements in it, outer ones first."""
    yield statement
    match statement:
        case tirx.SeqStmt():
            for part in statement.seq:
                yield from parts(part)
        case tirx.For() | tirx.AttrStmt():
            yield from parts(statement.body)
        case tirx.IfThenElse():
            yield from parts(statement.then_case)
            if statement.else_case is not None:
                yield from parts(statement.else_case)


def loads(expression: Any) -> Iterator[Any]:
    """All that an expression reads of buffers."""
    if isinstance(expression, TensorLoad):
        yield expression
    for inner in operands(expression):
        yield from loads(inner)


def operands(expression: Any) -> tuple[Any, ...]:
    """What an expression is made of."""
    match expression:
        case tirx.Cast():
            return (expression.value,)
        case Call():
            return tuple(expression.args)
        case _ if hasattr(expression, "a") and hasattr(expression, "b"):
            return expression.a, expression.b
        case _:
            return ()


def elementwise(loop: Any) -> bool:
    """Whether a nest of loops computes one value per step, without the chip's instructions."""
    while isinstance(loop, tirx.For):
        loop = loop.body
    return isinstance(loop, tirx.BufferStore)


def commit(queue: int, body: Any) -> Any:
    """The copies of the body as a group of a queue."""
    return tirx.AttrStmt(
        tirx.IntImm("int32", 0),
        COMMIT,
        tirx.IntImm("int32", queue),
        tirx.AttrStmt(tirx.IntImm("int32", 0), ASYNC[0], tirx.IntImm("int32", 1), body),
    )


def wait(queue: int, inflight: int, body: Any) -> Any:
    """The body behind a wait until so many groups of the queue's copies, at most, are under way."""
    inner = tirx.AttrStmt(tirx.IntImm("int32", 0), INFLIGHT, tirx.IntImm("int32", inflight), body)
    return tirx.AttrStmt(tirx.IntImm("int32", 0), WAIT, tirx.IntImm("int32", queue), inner)


@attrs.frozen(eq=False)
class Region:
    """A tile [rows, columns] of a buffer that begins at `offset` numbers, its rows `stride` numbers apart."""

    buffer: Any
    offset: Any
    rows: int
    columns: int
    stride: int

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in HBM, in an operand."""
        return str(self.buffer.scope()) == HBM

    def indices(self, analyzer: Any) -> list[Any]:
        """Where it begins, per axis of the buffer."""
        left, indices = self.offset, []
        for size in reversed([int(size) for size in self.buffer.shape[1:]]):
            indices.append(analyzer.simplify(tirx.floormod(left, size)))
            left = analyzer.simplify(tirx.floordiv(left, size))
        return [left, *reversed(indices)]


def offset_of(buffer: Any, indices: Any) -> Any:
    """How many numbers of a buffer stand in front of an element."""
    offset: Any = 0
    for index, size in zip(indices, buffer.shape, strict=True):
        offset = offset * int(size) + index
    return offset


@attrs.frozen(eq=False)
class Copy:
    """A copy between HBM and VMEM."""

    to: Region
    source: Region

    @property
    def vmem(self) -> Region:
        """Its end in VMEM."""
        return self.source if self.to.in_hbm else self.to


@attrs.frozen(eq=False)
class Zero:
    """Zeroes sums."""

    sums: Region


@attrs.frozen(eq=False)
class Multiply:
    """Adds x @ w to sums; of codes with scales per group of inputs, and perhaps zeros."""

    sums: Region
    x: Region
    w: Region
    group: int = 0
    grid: tuple[Region, ...] = ()


def instruction(statement: Any) -> Copy | Zero | Multiply | None:
    """The chip's instruction that a statement calls, None for other statements."""
    if not isinstance(statement, tirx.Evaluate) or not isinstance(statement.value, Call):
        return None
    call = statement.value
    if call.op.name != "tirx.call_extern":
        return None
    name, *arguments = call.args

    # A pointer's second argument is the address of its buffer, a call whose argument the buffer is.
    def region(pointer: Any, rows: Any, columns: Any, stride: Any) -> Region:
        return Region(pointer.args[1].args[0], pointer.args[2], int(rows), int(columns), int(stride))

    if name.value == COPY:
        to, source, rows, columns, ts, ss = arguments
        return Copy(region(to, rows, columns, ts), region(source, rows, columns, ss))
    if name.value == ZERO:
        sums, rows, columns, stride = arguments
        return Zero(region(sums, rows, columns, stride))
    if name.value == MULTIPLY:
        sums, x, w, rows, columns, inner, cs, xs, ws, *more = arguments
        group, *more = more or [0]
        deep = max(int(inner) // int(group), 1) if more else 0
        grid = tuple(region(p, deep, columns, stride) for p, stride in zip(more[::2], more[1::2], strict=True))
        operands = region(sums, rows, columns, cs), region(x, rows, inner, xs), region(w, inner, columns, ws)
        return Multiply(*operands, int(group), grid)
    return None


def statement(found: Copy | Zero | Multiply) -> Any:
    """The statement that calls an instruction: the inverse of `instruction`."""

    def pointer(region: Region, access: str) -> Any:
        extent = (region.rows - 1) * region.stride + region.columns
        return region.buffer.access_ptr(access, offset=region.offset, extent=extent)

    arguments: list[Any]
    if isinstance(found, Copy):
        to, source = found.to, found.source
        arguments = [COPY, pointer(to, "w"), pointer(source, "r"), to.rows, to.columns, to.stride, source.stride]
    elif isinstance(found, Zero):
        sums = found.sums
        arguments = [ZERO, pointer(sums, "w"), sums.rows, sums.columns, sums.stride]
    else:
        sums, x, w = found.sums, found.x, found.w
        pointers = [pointer(sums, "rw"), pointer(x, "r"), pointer(w, "r")]
        arguments = [MULTIPLY, *pointers, x.rows, w.columns, x.columns, sums.stride, x.stride, w.stride]
        if found.group:
            arguments += [found.group, *(a for g in found.grid for a in (pointer(g, "r"), g.stride))]
    return tirx.Evaluate(tirx.call_extern("int32", *arguments))


def bound_analyzer(loops: list[Any]) -> Any:
    """An analyzer that knows the ranges of loops' variables."""
    analyzer = sym.Analyzer()
    for loop in loops:
        analyzer.bind(loop.loop_var, Range.from_min_extent(loop.min, loop.extent))
    return analyzer
