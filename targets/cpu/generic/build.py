"""A small builder of TIR functions: statements go into nested scopes, buffers are flat, dimensions come from sympy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import sympy
from tvm import ir, tirx
from tvm.tirx.stmt import ForKind

from jisu.compiler.errors import CompileError
from jisu.compiler.types import Dim, TensorType, product

Expr = Any
Index = Sequence[Expr]

PARALLEL_WORK = 1 << 15  # scalar operations that one core does in less time than waking another takes
_CHUNK = 1 << 12  # elements of a flat loop that one task does


def i64(value: int) -> Expr:
    """An int64 literal."""
    return tirx.IntImm("int64", int(value))


def literal(value: Any, dtype: str) -> Expr:
    """A literal of any dtype, kept from TVM's folding of floats (which takes 0 * x for 0) by going through its bits."""
    if dtype == "bool":
        return tirx.IntImm("bool", int(bool(value)))
    if dtype not in FLOAT_BITS:
        return tirx.IntImm(dtype, int(value))
    bits, storage = FLOAT_BITS[dtype]
    raw = np.asarray(value).astype(storage).view(f"uint{bits}").item()
    if raw == 0 and dtype != "bfloat16":  # TVM takes a reinterpreted 0 for a null pointer
        return tirx.call_llvm_pure_intrin(dtype, "llvm.fabs", tirx.FloatImm(dtype, 0.0))
    if bits == 64 and raw >= 1 << 63:
        return tirx.reinterpret(dtype, tirx.IntImm("int64", raw - (1 << 64)))
    return tirx.reinterpret(dtype, tirx.IntImm(f"uint{bits}", raw))


def _float_bits() -> dict[str, tuple[int, Any]]:
    from jisu.compiler.types import FLOATS, numpy_dtype

    return {name: (numpy_dtype(name).itemsize * 8, numpy_dtype(name)) for name in FLOATS}


FLOAT_BITS = _float_bits()


def expression(value: Dim, symbols: Mapping[str, Expr]) -> Expr:
    """A dimension as an int64 TIR expression over the variables in `symbols`; divisions are exact or under a floor."""
    if isinstance(value, int) or value.is_Integer:
        return i64(int(value))
    if value.is_Symbol:
        return symbols[value.name]
    if isinstance(value, sympy.floor):
        numerator, denominator = sympy.together(value.args[0]).as_numer_denom()
        return tirx.floordiv(expression(numerator, symbols), expression(denominator, symbols))
    if isinstance(value, sympy.ceiling):
        numerator, denominator = sympy.together(value.args[0]).as_numer_denom()
        return tirx.floordiv(expression(numerator + denominator - 1, symbols), expression(denominator, symbols))
    if isinstance(value, (sympy.Add, sympy.Mul)):
        numerator, denominator = sympy.together(value).as_numer_denom()
        if denominator != 1:
            return tirx.floordiv(expression(numerator, symbols), expression(denominator, symbols))
        parts = [expression(a, symbols) for a in value.args]
        total = parts[0]
        for part in parts[1:]:
            total = total + part if isinstance(value, sympy.Add) else total * part
        return total
    if isinstance(value, sympy.Pow) and value.args[1].is_Integer and value.args[1] > 0:
        total = expression(value.args[0], symbols)
        base = total
        for _ in range(int(value.args[1]) - 1):
            total = total * base
        return total
    binary = {sympy.Max: tirx.max, sympy.Min: tirx.min}
    for kind, build in binary.items():
        if isinstance(value, kind):
            parts = [expression(a, symbols) for a in value.args]
            total = parts[0]
            for part in parts[1:]:
                total = build(total, part)
            return total
    if isinstance(value, sympy.Mod):
        return tirx.floormod(*(expression(a, symbols) for a in value.args))
    if isinstance(value, sympy.Abs):
        inside = expression(value.args[0], symbols)
        return tirx.max(inside, i64(0) - inside)
    raise CompileError(f"dimension {value} ({type(value).__name__}) can't be computed by a kernel")


class Flat:
    """A tensor in memory seen as one dimension, with its logical shape."""

    def __init__(self, buffer: Any, shape: Sequence[Expr], dtype: str) -> None:
        self.buffer, self.shape, self.dtype = buffer, tuple(shape), dtype

    def offset(self, index: Index) -> Expr:
        """The row-major position of `index`."""
        total: Expr = i64(0)
        for size, i in zip(self.shape, index, strict=True):
            total = total * size + i
        return total

    def __getitem__(self, index: Index | Expr) -> Expr:
        at = self.offset(index) if isinstance(index, (tuple, list)) else index
        return tirx.BufferLoad(self.buffer, [at])


def _is_one(extent: Expr | int) -> bool:
    return int(extent) == 1 if isinstance(extent, (int, tirx.IntImm)) else False


class Builder:
    """A PrimFunc under construction.

    Parameters are the buffers of `inputs`, one int64 per symbol that no input's shape gives alone, the buffers of
    `outputs`. points_fail: whether what is computed point by point may call `require` (on several cores it can't). launches: whether each of a
    function's outermost loops is a launch, which costs more than a branch at each point.
    """

    points_fail = False
    launches = False

    def __init__(
        self, name: str, inputs: Sequence[TensorType], outputs: Sequence[TensorType], symbols: Iterable[str]
    ) -> None:
        self.name = name
        self.symbols = {s: tirx.Var(s, "int64") for s in sorted(symbols)}
        self.scopes: list[list[Any]] = [[]]
        self.parameters: list[Any] = []
        self.count = 0
        self.vectors = False  # inside a loop that becomes vector instructions
        self.inputs = [self._parameter(f"x{i}", t) for i, t in enumerate(inputs)]
        self.parameters += [self.symbols[s] for s in extra_symbols(inputs, self.symbols)]
        self.outputs = [self._parameter(f"y{i}", t) for i, t in enumerate(outputs)]

    def _parameter(self, name: str, type: TensorType) -> Flat:
        shape = [self.dim(d) for d in type.shape]
        buffer = tirx.decl_buffer(shape, type.dtype, name)
        self.parameters.append(buffer)
        flat = tirx.decl_buffer([self.dim(product(type.shape))], type.dtype, f"{name}_flat", data=buffer.data)
        self.emit(tirx.DeclBuffer(flat, data=buffer.data))
        return Flat(flat, shape, type.dtype)

    def dim(self, value: Dim) -> Expr:
        """A dimension as an expression."""
        return expression(value, self.symbols)

    def emit(self, statement: Any) -> None:
        """Append a statement to the innermost scope."""
        self.scopes[-1].append(statement)

    def let(self, value: Expr, hint: str = "v") -> Expr:
        """Bind `value` to a fresh variable, so that it is computed once; literals and variables stay as they are."""
        if isinstance(value, (tirx.Var, tirx.IntImm, tirx.FloatImm)):
            return value
        if dtype_of(value) == "bfloat16":  # TVM's legalisation of bfloat16 forgets the type of a bound variable
            return tirx.reinterpret("bfloat16", self.let(tirx.reinterpret("uint16", value), hint))
        self.count += 1
        name = tirx.Var(f"{hint}{self.count}", dtype_of(value))
        if "int" not in dtype_of(value) and not self.vectors:  # a cell would be one for all lanes
            # By way of memory, which LLVM removes: TVM's simplifier puts a bound value wherever its name stands, and a
            # chain of selections grows exponentially. Indices it may see through.
            cell = self.scratch(1, dtype_of(value))
            self.store(cell, i64(0), value)
            value = cell[i64(0)]
        self.emit(tirx.Bind(name, value))
        return name

    def store(self, target: Flat, index: Index | Expr, value: Expr) -> None:
        """target[index] = value."""
        at = target.offset(index) if isinstance(index, (tuple, list)) else index
        self.emit(tirx.BufferStore(target.buffer, value, [at]))

    def scratch(self, size: Dim | Expr, dtype: str, *, shared: bool = False) -> Flat:
        """Uninitialised memory of the enclosing scope: TVM puts less than a kilobyte, if static, on the stack, else on the heap.

        shared: several tasks use it.
        """
        self.count += 1
        size = self.dim(size) if isinstance(size, (int, sympy.Expr)) else size
        buffer = tirx.decl_buffer([size], dtype, f"t{self.count}")
        self.emit(tirx.AllocBuffer(buffer))
        return Flat(buffer, [size], dtype)

    @contextmanager
    def scope(self) -> Iterator[list[Any]]:
        """Statements emitted inside go into the list that is yielded, not into the function."""
        self.scopes.append([])
        try:
            yield self.scopes[-1]
        finally:
            self.scopes.pop()

    @contextmanager
    def loop(self, extent: Expr | int, kind: ForKind = ForKind.SERIAL, start: Expr | int = 0) -> Iterator[Expr]:
        """for i in start … start + extent - 1; a loop that runs once is its body (TVM would unroll it, inlining every value)."""
        if _is_one(extent):
            yield i64(start) if isinstance(start, int) else start
            return
        self.count += 1
        index = tirx.Var(f"i{self.count}", "int64")
        vectors = self.vectors or kind == ForKind.VECTORIZED
        with self.scope() as body:
            before, self.vectors = self.vectors, vectors
            yield index
            self.vectors = before
        start, extent = (i64(v) if isinstance(v, int) else v for v in (start, extent))
        self.emit(tirx.For(index, start, extent, kind, block(body)))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """if condition."""
        with self.scope() as body:
            yield
        self.emit(tirx.IfThenElse(condition, block(body), None))

    @contextmanager
    def loops(self, extents: Sequence[Expr]) -> Iterator[list[Expr]]:
        """Nested serial loops over `extents`, outermost first."""
        indices: list[Expr] = []
        for extent in extents:
            self.count += 1
            indices.append(i64(0) if _is_one(extent) else tirx.Var(f"i{self.count}", "int64"))
        with self.scope() as body:
            yield indices
        for index, extent in zip(reversed(indices), reversed(list(extents)), strict=True):
            if _is_one(extent):
                continue
            body = [tirx.For(index, i64(0), extent, ForKind.SERIAL, block(body))]
        for statement in body:
            self.emit(statement)

    def spread(self, extents: Sequence[Dim], work: Dim, body: Any, *, parallel: bool = True) -> None:
        """Run body(indices) for every point of `extents`, on several cores where `work` (scalar operations) is worth it.

        For symbolic work the decision is made at run time, between two copies of the loops.
        """
        sizes = [self.dim(d) for d in extents]

        def serial() -> None:
            with self.loops(sizes) as indices:
                body(list(indices))

        def fused() -> None:
            total = self.let(self.dim(product(extents)), "total")
            with self.loop(total, ForKind.PARALLEL) as flat:
                body(self.unravel(flat, sizes))

        known = isinstance(work, int)
        if not extents or not parallel or (known and work < PARALLEL_WORK):
            serial()
        elif known:
            fused()
        else:
            with self.scope() as small:
                serial()
            with self.scope() as large:
                fused()
            self.emit(tirx.IfThenElse(self.dim(work) < i64(PARALLEL_WORK), block(small), block(large)))

    def points(self, extents: Sequence[Dim], work: Dim, body: Any, *, parallel: bool = True) -> None:
        """Run body(index) for every point of `extents`, row by row."""

        def row(outer: list[Expr]) -> None:
            with self.loop(self.dim(extents[-1])) as i:
                body([*outer, i])

        self.spread(extents[:-1], work, row, parallel=parallel)

    @contextmanager
    def by_one(self) -> Iterator[None]:
        """What one task does, after all that stands before."""
        yield

    def flat_loop(self, size: Dim, cost: int, body: Any, *, parallel: bool = True) -> None:
        """body(i) for i in 0 … size - 1, in chunks on several cores where worth it; the inner loop is LLVM's to vectorise."""
        chunks = -(-size // _CHUNK) if isinstance(size, int) else sympy.floor((size + _CHUNK - 1) / _CHUNK)
        total = self.dim(size)

        def serial() -> None:
            with self.loop(total) as i:
                body(i)

        def fused() -> None:
            with self.loop(self.dim(chunks), ForKind.PARALLEL) as chunk:
                begin = self.let(chunk * i64(_CHUNK), "begin")
                count = self.let(tirx.min(i64(_CHUNK), total - begin), "count")
                with self.loop(count) as i:
                    body(begin + i)

        work = size * cost
        if not parallel or (isinstance(work, int) and work < PARALLEL_WORK):
            serial()
        elif isinstance(work, int):
            fused()
        else:
            with self.scope() as small:
                serial()
            with self.scope() as large:
                fused()
            self.emit(tirx.IfThenElse(total < i64(max(PARALLEL_WORK // cost, 1)), block(small), block(large)))

    def unravel(self, flat: Expr, sizes: Sequence[Expr]) -> list[Expr]:
        """The index into `sizes` at row-major position `flat`."""
        result: list[Expr] = []
        rest = flat
        for k, size in enumerate(reversed(sizes)):
            last = k == len(sizes) - 1
            result.append(rest if last else self.let(tirx.floormod(rest, size), "u"))
            rest = rest if last else self.let(tirx.floordiv(rest, size), "q")
        return result[::-1]

    def require(self, condition: Expr, kind: str, message: str) -> None:
        """Make the call fail with an error of Python class `kind` unless `condition` holds."""
        # The wrapper names its first two parameters in the other order than the constructor behind it takes them.
        self.emit(tirx.AssertStmt(condition, ir.StringImm(kind), [ir.StringImm(message)]))

    def finish(self) -> Any:
        """The PrimFunc."""
        function = tirx.PrimFunc(self.parameters, block(self.scopes[0]))
        for key, value in (("global_symbol", self.name), ("tirx.noalias", True), ("s_tir", True)):
            function = function.with_attr(key, value)
        return function


def extra_symbols(inputs: Sequence[TensorType], symbols: Iterable[str]) -> list[str]:
    """The symbols that no dimension of an input is alone, sorted: a kernel must be told them."""
    solved = {d.name for t in inputs for d in t.shape if not isinstance(d, int) and d.is_Symbol}
    return sorted(set(symbols) - solved)


@attrs.frozen(eq=False)
class Guard:
    """Stands among statements: those behind it run where the condition holds, else `otherwise` does."""

    condition: Expr
    otherwise: Any


def block(statements: Sequence[Any]) -> Any:
    """Statements in sequence as one."""
    for i, statement in enumerate(statements):
        if isinstance(statement, Guard):
            rest = tirx.IfThenElse(statement.condition, block(statements[i + 1 :]), statement.otherwise)
            return block([*statements[:i], rest])
    if not statements:
        return tirx.Evaluate(i64(0))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def dtype_of(value: Expr) -> str:
    """The dtype name of an expression."""
    return str(value.ty)
