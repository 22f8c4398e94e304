"""Generic kernels on a GPU: the bodies of `targets.cpu.generic`, every point of their loops by another thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import sympy
from tvm import ir, tirx

from jisu.compiler.errors import CompileError
from jisu.compiler.types import Dim, numpy_dtype, product
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, Guard, block, i64
from jisu.targets.cuda.device import prefix
from jisu.targets.target import Target

THREADS = 128
"""Of a block of a generic kernel."""
_PRIVATE_BYTES = 1024  # of memory that a thread has for itself; more lies in the pool
_POOL_THREADS = 1 << 12  # at most so many threads share a pool


@attrs.frozen
class Fault:
    """What a kernel may complain of: a Python class's name, and the message."""

    kind: str
    message: str


@attrs.frozen(eq=False)
class GenericKernel:
    """A generic kernel: `function` takes tensors, symbols and results as on a CPU, then (as integers) the addresses of the fault flag and of
    the pool, and the number of its part. parts: per launch, how many points it has. pool: bytes of the pool for each of a launch's threads;
    shared: of all of them.
    """

    function: Any
    parts: tuple[Dim, ...]
    pool: Dim
    shared: Dim

    @property
    def pooled(self) -> bool:
        """Whether it wants a pool."""
        return self.pool != 0 or self.shared != 0

    def blocks(self, part: int, cores: int) -> Dim:
        """Blocks of a launch: threads take several points where there are more than so many multiprocessors keep busy."""
        most = _POOL_THREADS // THREADS if self.pool != 0 else 16 * cores
        needed = sympy.ceiling(sympy.sympify(self.parts[part]) / THREADS)
        return sympy.Min(sympy.Max(needed, 1), most) if not needed.is_Integer else max(1, min(int(needed), most))

    @property
    def pool_bytes(self) -> Dim:
        """Of the launch that has most threads."""
        if self.pool == 0:
            return self.shared
        blocks = [self.blocks(part, 1) for part in range(len(self.parts))]
        most = max(blocks) if all(isinstance(n, int) for n in blocks) else sympy.Max(*blocks)
        return self.shared + self.pool * THREADS * most


class DeviceBuilder(Builder):
    """A PrimFunc that a GPU's threads run. Loops over independent points become launches of their own, so that one sees what those before
    it wrote; what stands beside them every thread does for itself."""

    points_fail = True
    launches = True

    def __init__(self, *args: Any, target: Target, faults: list[Fault]) -> None:
        self.faults = faults
        self.parts: list[Dim] = []
        self.pool: Dim = 0
        self.shared: Dim = 0
        self.alone = False
        self.fault, self.pool_at, self.part = (tirx.Var(n, "int64") for n in ("fault", "pool", "part"))
        self.own_at = tirx.Var("own", "int64")  # where threads' own parts of the pool begin, behind what they share
        super().__init__(*args)
        block_, thread, blocks = (
            tirx.Cast("int64", tirx.call_pure_extern("int32", f"{prefix(target)}read.ptx.sreg.{r}"))
            for r in ("ctaid.x", "tid.x", "nctaid.x")
        )
        self.number = self.let(block_ * i64(THREADS) + thread, "number")
        self.count_of_threads = self.let(blocks * i64(THREADS), "threads")
        self.inside = False

    def spread(self, extents: Sequence[Dim], work: Dim, body: Any, *, parallel: bool = True) -> None:
        """Run body(indices) for every point of `extents`, by all threads of a launch."""
        sizes = [self.dim(d) for d in extents]
        if self.inside or self.alone:
            with self.loops(sizes) as indices:
                body(list(indices))
            return
        with self.launch(product(extents)) as point:
            body(self.unravel(point, sizes) if sizes else [])

    def flat_loop(self, size: Dim, cost: int, body: Any, *, parallel: bool = True) -> None:
        """body(i) for i in 0 … size - 1, by all threads of a launch."""
        self.spread([size], size, lambda index: body(index[0]))

    def points(self, extents: Sequence[Dim], work: Dim, body: Any, *, parallel: bool = True) -> None:
        """body(index) for every point; neighbours by neighbouring threads."""
        self.spread(extents, work, body)

    @contextmanager
    def launch(self, total: Dim) -> Iterator[Expr]:
        """A launch of its own: the number of a thread's point."""
        number = len(self.parts)
        self.parts.append(total)
        points = self.dim(total)
        rounds = tirx.floordiv(
            tirx.max(points - self.number, i64(0)) + self.count_of_threads - i64(1), self.count_of_threads
        )
        with self.when(tirx.EQ(self.part, i64(number))), self.loop(rounds) as turn:
            self.inside = True
            yield self.let(self.number + turn * self.count_of_threads, "point")
            self.inside = False

    @contextmanager
    def by_one(self) -> Iterator[None]:
        """A launch in which one thread does what stands inside."""
        with self.when(tirx.all(tirx.EQ(self.part, i64(len(self.parts))), tirx.EQ(self.number, i64(0)))):
            self.parts.append(1)
            self.inside = True
            yield
            self.inside = False

    def scratch(self, size: Dim | Expr, dtype: str, *, shared: bool = False) -> Flat:
        """Uninitialised memory of the thread (`shared`: of all threads, from one launch to the next): registers and local memory, or a
        part of the pool."""
        if isinstance(size, tirx.IntImm):
            size = int(size)
        if not isinstance(size, (int, sympy.Expr)):
            raise CompileError(f"{self.name} needs memory whose size only the kernel knows")
        nbytes = size * numpy_dtype(dtype).itemsize
        if isinstance(size, int) and int(nbytes) <= _PRIVATE_BYTES and not shared:
            return super().scratch(size, dtype)
        whole = sympy.ceiling(sympy.sympify(nbytes) / 16) * 16
        if shared:
            place = self.pool_at + self.dim(self.shared)
            self.shared = self.shared + whole
        else:  # nothing of it lasts from one launch to the next
            place = self.own_at + self.dim(self.pool) * self.count_of_threads + self.number * self.dim(whole)
            self.pool = self.pool + whole
        self.count += 1
        data, bound = _pointer(f"t{self.count}", dtype, place)
        extent = self.dim(size)
        self.emit(bound)
        buffer = tirx.decl_buffer([extent], dtype, f"t{self.count}", data=data)
        self.emit(tirx.DeclBuffer(buffer, data=data))
        return Flat(buffer, [extent], dtype)

    def require(self, condition: Expr, kind: str, message: str) -> None:
        """Unless `condition` holds, leave what follows undone and note the fault, which the host looks at when it takes the results."""
        fault = Fault(kind, message)
        if fault not in self.faults:
            self.faults.append(fault)
        code = tirx.IntImm("int32", self.faults.index(fault) + 1)
        self.count += 1
        data, bound = _pointer(f"f{self.count}", "int32", self.fault)
        flag = tirx.decl_buffer([i64(1)], "int32", f"f{self.count}", data=data)
        note = [
            bound,
            tirx.DeclBuffer(flag, data=data),
            tirx.BufferStore(flag, code, [i64(0)]),
        ]
        self.emit(Guard(condition, block(note)))

    def finish(self) -> GenericKernel:
        """The kernel."""
        self.parameters += [self.fault, self.pool_at, self.part]
        if not self.parts:  # every thread would do all of it
            self.scopes[0] = [tirx.IfThenElse(tirx.EQ(self.number, i64(0)), block(self.scopes[0]), None)]
            self.parts.append(1)
        self.scopes[0].insert(0, tirx.Bind(self.own_at, self.pool_at + self.dim(self.shared)))
        return GenericKernel(super().finish(), tuple(self.parts), self.pool, self.shared)


def _pointer(name: str, dtype: str, address: Expr) -> tuple[Expr, Any]:
    """A pointer variable, and the statement that gives it an address."""
    kind = ir.PointerType(ir.PrimType(dtype))
    variable = tirx.Var(name, kind)
    return variable, tirx.Bind(variable, ir.Call("tirx.reinterpret", [address], ret_ty=kind))
