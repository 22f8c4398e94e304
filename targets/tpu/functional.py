"""Running lowered TIR on the CPU, for its values: instructions become loops, and LLVM compiles them.

`run` copies when a copy is asked for. `check` emulates asynchronous copies, so that a wait that is missing or comes too late shows: a
copy lands when it is started ("early") or only when it is waited for ("late"), and whatever touches memory that a copy under way reads
or writes is reported. Real copies land somewhere between the two.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Call
from tvm.ir.expr import TensorLoad

from jisu.compiler.errors import CompileError, InputError
from jisu.compiler.types import numpy_dtype
from jisu.targets.tpu.intrinsics import scaled
from jisu.targets.tpu.product import Lowered
from jisu.targets.tpu.walk import (
    ASYNC,
    COMMIT,
    WAIT,
    Copy,
    Multiply,
    Region,
    Zero,
    bound_analyzer,
    elementwise,
    flat,
    instruction,
    loads,
    offset_of,
    operands,
    rebuild,
)

DMA = ("late", "early")
"""When emulated copies land."""
_PREFIX = "jisu.tpu."
_HALF = (numpy_dtype("bfloat16"), numpy_dtype("float16"))
KEPT = {"bfloat16": "uint16", "float16": "uint16", "int4": "int8"}
"""Dtypes that this machine keeps as others: floats as their bits."""


def compile_cpu(function: Any, *, emulated: bool = False) -> Callable[..., None]:
    """The lowered function for this machine, on padded tensors; emulated: copies go through the `Engine` in charge. CompileError: LLVM failed."""
    loops = _Loops(emulated)
    parameters = [loops.stored(parameter) for parameter in function.params]
    lowered = tirx.PrimFunc(parameters, loops.visit(function.body)).with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": lowered.with_attr("tirx.noalias", True)})
    try:
        # TVM would merge buffers of different dtypes.
        with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
            return tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))["main"]
    except Exception as error:
        raise CompileError(f"LLVM can't compile the functional run: {error}") from error


def inlined(lowered: Lowered) -> tuple[list[Any], Any]:
    """The product's operands and result as buffers of this machine (see `KEPT`), and the statement that computes it."""
    loops = _Loops(emulated=False)
    return [loops.stored(parameter) for parameter in lowered.function.params], loops.visit(lowered.function.body)


def run(lowered: Lowered, *arrays: np.ndarray) -> np.ndarray:
    """The product of arrays, padded or not, in the order of operands; the result is cropped. InputError: one doesn't fit its operand."""
    tensors, result = _tensors(lowered, arrays)
    _compiled(lowered)(*tensors)
    return _result(lowered, result)


@attrs.frozen(eq=False)
class Checked:
    """What an emulated run found: the cropped result, accesses that raced with a copy, and copies that nobody had waited for at the end."""

    result: np.ndarray
    races: tuple[str, ...]
    unfinished: int

    @property
    def clean(self) -> bool:
        """Whether copies and waits fit together."""
        return not self.races and not self.unfinished


def check(lowered: Lowered, *arrays: np.ndarray, dma: str = "late") -> Checked:
    """Run with emulated copies that land as `dma` says ("late" or "early"). InputError: an array doesn't fit its operand."""
    if dma not in DMA:
        raise InputError(f"dma must be one of {', '.join(DMA)}, got {dma!r}")
    tensors, result = _tensors(lowered, arrays)
    engine = Engine(late=dma == "late")
    with _IN_CHARGE.lock:
        _IN_CHARGE.engine = engine
        compile_cpu(lowered.function, emulated=True)(*tensors)
    return Checked(_result(lowered, result), tuple(engine.races), engine.unfinished)


@functools.lru_cache(maxsize=64)
def _compiled(lowered: Lowered) -> Callable[..., None]:
    return compile_cpu(lowered.function)


def _tensors(lowered: Lowered, arrays: Sequence[np.ndarray]) -> tuple[list[Any], Any]:
    *operands, result = lowered.operands
    if len(arrays) != len(operands):
        raise InputError(f"expected {len(operands)} arrays ({', '.join(o.name for o in operands)}), got {len(arrays)}")
    tensors = [tvm.runtime.tensor(_bits(o.pad(a))) for o, a in zip(operands, arrays, strict=True)]
    # Not zeros: what isn't written must show.
    empty = np.full(result.padded, np.nan, numpy_dtype(result.dtype))
    tensors.append(tvm.runtime.tensor(_bits(empty)))
    return tensors, tensors[-1]


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype in _HALF else array


def _result(lowered: Lowered, tensor: Any) -> np.ndarray:
    result = lowered.operands[-1]
    return result.crop(tensor.numpy().view(numpy_dtype(result.dtype)))


@attrs.define
class _Loops:
    """Puts loops, or calls of the engine, into the place of instructions.

    Floats of 16 bits are kept as their bits, and converted where they are read and written: left to itself, TVM keeps buffers in float32.
    """

    emulated: bool
    buffers: dict[Any, Any] = attrs.Factory(dict)
    loops: list[Any] = attrs.Factory(list)
    queue: int | None = None
    inside: bool = False

    def visit(self, statement: Any) -> Any:
        """The statement with loops in the place of instructions."""
        return rebuild(statement, self._part)

    def stored(self, buffer: Any) -> Any:
        """The buffer as this machine keeps it."""
        dtype = KEPT.get(str(buffer.dtype))
        if dtype is None:
            return buffer
        if buffer not in self.buffers:
            self.buffers[buffer] = tirx.decl_buffer(buffer.shape, dtype, buffer.name, scope=buffer.scope())
        return self.buffers[buffer]

    def _load(self, buffer: Any, indices: list[Any]) -> Any:
        value, dtype = tirx.BufferLoad(self.stored(buffer), indices), str(buffer.dtype)
        if dtype == "bfloat16":
            return tirx.reinterpret("float32", tirx.Cast("uint32", value) << tirx.const(16, "uint32"))
        return _half(value) if dtype == "float16" else value

    def _store(self, buffer: Any, value: Any, indices: list[Any]) -> Any:
        """The value is float32 for bfloat16, and rounded to the nearest, to even between two."""
        if str(buffer.dtype) == "bfloat16":
            bits, half = tirx.reinterpret("uint32", value), tirx.const(16, "uint32")
            rounded = bits + tirx.const(0x7FFF, "uint32") + ((bits >> half) & tirx.const(1, "uint32"))
            number = tirx.Cast("uint16", rounded >> half)
            value = tirx.Select(value != value, tirx.const(0x7FC0, "uint16"), number)
        return tirx.BufferStore(self.stored(buffer), value, indices)

    def _expression(self, e: Any) -> Any:
        """The expression with bfloat16 as its bits."""
        match e:
            case TensorLoad():
                return self._load(e.source, list(e.indices))
            case tirx.Cast():
                inner = self._expression(e.value)
                narrow = "bfloat16" in (_dtype(e), _dtype(e.value))
                return inner if narrow else tirx.Cast(_dtype(e), inner)
            case Call():
                return tirx.call_intrin(_dtype(e), e.op.name, *(self._expression(a) for a in e.args))
            case _ if operands(e):
                return type(e)(*(self._expression(o) for o in operands(e)))
            case _:
                return e

    def _part(self, s: Any) -> Any:
        if isinstance(s, tirx.For):
            if self.emulated and elementwise(s) and not self.inside:
                self.inside = True
                statement = flat([*self._touched(s), self._part(s)])
                self.inside = False
                return statement
            self.loops.append(s)
            body = self.visit(s.body)
            self.loops.pop()
            return tirx.For(s.loop_var, s.min, s.extent, tirx.ForKind.SERIAL, body)
        if isinstance(s, tirx.AttrStmt) and s.attr_key in ASYNC:
            return self._asynchronous(s)
        if isinstance(s, tirx.BufferStore):
            return self._store(s.buffer, self._expression(s.value), list(s.indices))
        if isinstance(s, tirx.AllocBuffer):
            return tirx.AllocBuffer(self.stored(s.buffer))
        found = instruction(s)
        match found:
            case Copy():
                return self._copy(found)
            case Zero():
                return self._zero(found)
            case Multiply():
                return self._multiply(found)
        return None

    def _asynchronous(self, s: Any) -> Any:
        if not self.emulated:
            return self.visit(s.body)
        if s.attr_key == COMMIT:
            self.queue = int(s.value)
            body = self.visit(s.body)
            self.queue = None
            return flat([body, _call("commit", s.value)])
        if s.attr_key == WAIT:
            return flat([_call("wait", s.value, s.body.value), self.visit(s.body.body)])
        return self.visit(s.body)

    def _at(self, region: Region) -> list[Any]:
        return region.indices(bound_analyzer(self.loops))

    def _address(self, region: Region) -> Any:
        return tirx.address_of(tirx.BufferLoad(self.stored(region.buffer), self._at(region)))

    def _copy(self, copy: Copy) -> Any:
        to, source = copy.to, copy.source
        if self.emulated:
            begin = -1 if self.queue is None else self.queue
            size = _itemsize(to.buffer)
            sizes = to.rows, to.columns * size, to.stride * size, source.stride * size
            return _call(
                "start", begin, self._address(to), self._address(source), *sizes, int(to.in_hbm), to.buffer.name
            )
        at, from_ = self._at(to), self._at(source)
        kept, read = self.stored(to.buffer), self.stored(source.buffer)
        return _nest(
            (to.rows, to.columns),
            lambda i, j: tirx.BufferStore(kept, tirx.BufferLoad(read, _moved(from_, i, j)), _moved(at, i, j)),
        )

    def _zero(self, zero: Zero) -> Any:
        buffer, at = zero.sums.buffer, self._at(zero.sums)
        nothing = tirx.const(0, str(buffer.dtype))
        return _nest(
            (zero.sums.rows, zero.sums.columns), lambda i, j: tirx.BufferStore(buffer, nothing, _moved(at, i, j))
        )

    def _multiply(self, product: Multiply) -> Any:
        sums, x, w = product.sums, product.x, product.w
        at, x_at, w_at = self._at(sums), self._at(x), self._at(w)
        grid = [(g, self._at(g)) for g in product.grid]
        dtype = str(sums.buffer.dtype)

        def add(i: Any, k: Any, j: Any) -> Any:
            a, b = self._load(x.buffer, _moved(x_at, i, k)), self._load(w.buffer, _moved(w_at, k, j))
            a, b = (v if _dtype(v) == dtype else tirx.Cast(dtype, v) for v in (a, b))
            own = [self._load(g.buffer, _moved(at, _over(k, product.group), j)) for g, at in grid]
            b = scaled(b, str(w.buffer.dtype), *(tirx.Cast("float32", v) for v in own))
            to = _moved(at, i, j)
            return tirx.BufferStore(sums.buffer, tirx.BufferLoad(sums.buffer, to) + a * b, to)

        loops = _nest((x.rows, x.columns, w.columns), add)
        if not self.emulated:
            return loops
        return flat([*(self._access(r, 0) for r in (x, w, *product.grid)), loops])

    def _access(self, region: Region, writes: int) -> Any:
        """A call that reports a read or write of a region."""
        size = _itemsize(region.buffer)
        sizes = region.rows, region.columns * size, region.stride * size
        return _call("access", self._address(region), *sizes, region.buffer.name, writes)

    def _touched(self, nest: Any) -> list[Any]:
        """Calls that report what an elementwise nest reads and writes."""
        loops = []
        while isinstance(nest, tirx.For):
            loops.append(nest)
            nest = nest.body
        first = {loop.loop_var: tirx.IntImm("int32", int(loop.min)) for loop in loops}
        accesses = [(nest.buffer, nest.indices, 1), *((load.source, load.indices, 0) for load in loads(nest.value))]
        calls, seen = [], set()
        for buffer, indices, writes in accesses:
            if "vmem" not in str(buffer.scope()) or buffer.name in seen:
                continue
            seen.add(buffer.name)
            height, width = (int(n) for n in buffer.shape[-2:])
            rows, columns = (int(loop.extent) for loop in loops[-2:])
            offset = _at(offset_of(buffer, indices), first)
            region = Region(buffer, offset, min(rows, height), min(columns, width), width)
            calls.append(self._access(region, writes))
        return calls


def _at(expression: Any, values: dict[Any, Any]) -> Any:
    """The expression with variables' values in their place."""
    if expression in values:
        return values[expression]
    inner = operands(expression)
    return type(expression)(*(_at(o, values) for o in inner)) if inner else expression


def _dtype(expression: Any) -> str:
    return str(expression.ty.dtype)


def _nest(sizes: Sequence[int], body: Callable[..., Any]) -> Any:
    variables = [tirx.Var(f"i{n}", "int32") for n in range(len(sizes))]
    statement = body(*variables)
    for variable, size in reversed(list(zip(variables, sizes, strict=True))):
        statement = tirx.For(
            variable, tirx.IntImm("int32", 0), tirx.IntImm("int32", size), tirx.ForKind.SERIAL, statement
        )
    return statement


def _itemsize(buffer: Any) -> int:
    """Bytes of a number as this machine keeps it."""
    return numpy_dtype(KEPT.get(str(buffer.dtype), str(buffer.dtype)).replace("uint16", "int16")).itemsize


def _half(bits: Any) -> Any:
    """float32 of the bits of float16."""
    word = tirx.Cast("uint32", bits)
    size = word & tirx.const(0x7FFF, "uint32")
    sign = (word & tirx.const(0x8000, "uint32")) << tirx.const(16, "uint32")
    moved = sign | size << tirx.const(13, "uint32")
    return tirx.reinterpret("float32", moved) * tirx.const(2.0**112, "float32")


def _over(k: Any, group: int) -> Any:
    return tirx.floordiv(k, tirx.const(group, "int32"))


def _moved(at: list[Any], i: Any, j: Any) -> list[Any]:
    return [*at[:-2], at[-2] + i, at[-1] + j]


def _call(name: str, *arguments: Any) -> Any:
    return tirx.Evaluate(tirx.call_packed(_PREFIX + name, *arguments))


@attrs.frozen
class _Area:
    """Rows of a buffer: the first one's address, how many, bytes of each and from one to the next."""

    begin: int
    rows: int
    width: int
    stride: int

    def overlaps(self, other: _Area) -> bool:
        """Whether some byte lies in both; areas of different strides are taken for all that lies between their rows, too."""
        a, b = (area.begin + (area.rows - 1) * area.stride + area.width for area in (self, other))
        if other.begin >= a or self.begin >= b:
            return False
        if self.stride != other.stride:
            return True
        down, across = divmod(other.begin - self.begin, self.stride)

        def rows_meet(first: int) -> bool:
            return first < self.rows and first + other.rows > 0

        # The other's rows begin behind this one's, and may reach into its next ones.
        beside, behind = across < self.width, across + other.width > self.stride
        return (beside and rows_meet(down)) or (behind and rows_meet(down + 1))


@attrs.frozen(eq=False)
class _Transfer:
    """A copy under way: addresses, rows and bytes of a row, strides in bytes; which end lies in VMEM."""

    to: int
    source: int
    rows: int
    width: int
    to_stride: int
    source_stride: int
    stores: bool
    name: str

    def land(self) -> None:
        for row in range(self.rows):
            ctypes.memmove(self.to + row * self.to_stride, self.source + row * self.source_stride, self.width)

    def vmem(self) -> _Area:
        begin, stride = (self.source, self.source_stride) if self.stores else (self.to, self.to_stride)
        return _Area(begin, self.rows, self.width, stride)


@attrs.define(eq=False)
class Engine:
    """Emulated asynchronous copies: queues of groups, each of which lands when it is waited for (late) or when it is started."""

    late: bool
    open: list[_Transfer] = attrs.Factory(list)
    queues: dict[int, deque[list[_Transfer]]] = attrs.Factory(dict)
    races: list[str] = attrs.Factory(list)

    @property
    def unfinished(self) -> int:
        """Copies that nobody has waited for."""
        return len(self.open) + sum(len(group) for queue in self.queues.values() for group in queue)

    def start(self, queue: int, transfer: _Transfer) -> None:
        """Begin a copy; one outside of a group (queue < 0) is waited for at once."""
        self.access(transfer.vmem(), transfer.name, writes=not transfer.stores)
        if queue < 0:
            transfer.land()
            return
        if not self.late:
            transfer.land()
        self.open.append(transfer)

    def commit(self, queue: int) -> None:
        """The copies started since the last call are a group of the queue."""
        self.queues.setdefault(queue, deque()).append(self.open)
        self.open = []

    def wait(self, queue: int, inflight: int) -> None:
        """The oldest groups land until so many are under way."""
        groups = self.queues.setdefault(queue, deque())
        while len(groups) > inflight:
            for transfer in groups.popleft():
                if self.late:
                    transfer.land()

    def access(self, area: _Area, name: str, *, writes: bool) -> None:
        """VMEM is read or written: a race where a copy under way writes it, or reads what is written here."""
        for transfer in (*self.open, *(t for queue in self.queues.values() for group in queue for t in group)):
            if (writes or not transfer.stores) and area.overlaps(transfer.vmem()):
                self.races.append(
                    f"{name} is {'written' if writes else 'read'} while a copy of {transfer.name} is under way"
                )


@attrs.define(eq=False)
class _InCharge:
    engine: Engine | None = None
    lock: Any = attrs.Factory(threading.Lock)


_IN_CHARGE = _InCharge()


def _engine() -> Engine:
    if _IN_CHARGE.engine is None:
        raise CompileError("no emulated copy engine is in charge")
    return _IN_CHARGE.engine


def _pointer(value: Any) -> int:
    return int(value.value if hasattr(value, "value") else value)


def _start(queue: int, to: Any, source: Any, rows: int, width: int, ts: int, ss: int, stores: int, name: str) -> None:
    _engine().start(queue, _Transfer(_pointer(to), _pointer(source), rows, width, ts, ss, bool(stores), name))


tvm.register_global_func(_PREFIX + "start", _start, override=True)
tvm.register_global_func(_PREFIX + "commit", lambda queue: _engine().commit(queue), override=True)
tvm.register_global_func(_PREFIX + "wait", lambda queue, inflight: _engine().wait(queue, inflight), override=True)
tvm.register_global_func(
    _PREFIX + "access",
    lambda begin, rows, width, stride, name, writes: _engine().access(
        _Area(_pointer(begin), rows, width, stride), name, writes=bool(writes)
    ),
    override=True,
)
