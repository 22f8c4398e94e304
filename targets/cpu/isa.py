"""From a Target to machine code: LLVM's name for it, and a small builder of LLVM IR text for inner loops.

TIR carries a kernel's signature, symbolic shapes, checks, scratch memory and parallel regions; the body of one task is
LLVM IR text that `pragma_import_llvm` links and inlines. That gives what TIR's own code generator can't: bfloat16 dot
products, masked vectors and vector exp/tanh/erf. The text uses portable vector types only, so the same kernel runs on
any LLVM target; wider vectors and special instructions are taken where the Target has them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from jisu.compiler.errors import TargetError
from jisu.targets.target import Target

FLOATS = ("float32", "bfloat16", "float16")
C_CALL = 1
"""TVM's number of a calling convention other than its own."""
STORED = {
    "float32": "float",
    "bfloat16": "i16",
    "float16": "half",
    "int64": "i64",
    "int32": "i32",
    "bool": "i8",
    "uint8": "i8",
}
"""As what LLVM type elements of a dtype stand in memory."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "bool": 1, "int8": 1, "uint8": 1}


def tvm_target(target: Target) -> Any:
    """The TVM target (LLVM) that generates code for a CPU `target`, or for the CPU that simulates it; raises TargetError for another kind."""
    if target.kind not in ("cpu", "tpu"):
        raise TargetError(f"the CPU kernels can't be built for {target.name!r}")
    level = {"x86-64": 0, "x86-64-v2": 2, "x86-64-v3": 3, "x86-64-v4": 4}
    # Without this, LLVM splits 64-byte vectors for processors that once lowered their clock for them.
    mattr = [f"+{f}" for f in sorted(target.features)] + (["-prefer-256-bit"] if level.get(target.mcpu, 0) == 4 else [])
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "mcpu": target.mcpu}
    return tvm.target.Target({**spec, "mattr": mattr} if mattr else spec)


def require_dtype(dtype: str, target: Target) -> None:
    """Raise TargetError unless kernels of this float `dtype` can be built for `target`."""
    if dtype not in FLOATS:
        raise TargetError(f"the CPU kernels compute in {', '.join(FLOATS)}, not in {dtype}")
    if dtype == "float16" and target.architecture == "x86_64" and not target.has("f16c"):
        raise TargetError(f"float16 needs the processor feature f16c, which target {target.name!r} lacks")


def scalar_type(type_: str) -> str:
    """The element type of an LLVM vector type, or the type itself."""
    return type_.split(" x ")[1].rstrip(">") if type_.startswith("<") else type_


def vector_type(scalar: str, lanes: int) -> str:
    """LLVM's vector of `lanes` scalars; the scalar itself for one lane."""
    return f"<{lanes} x {scalar}>" if lanes > 1 else scalar


def lanes_of(type_: str) -> int:
    """The number of lanes of an LLVM type."""
    return int(type_[1:].split(" x ")[0]) if type_.startswith("<") else 1


@attrs.frozen(eq=False)
class Val:
    """A value of LLVM IR under construction; arithmetic on it appends instructions to its function."""

    fn: Function
    name: str
    type: str

    def _arith(self, other: Val | float | int, integer: str, floating: str, swap: bool = False) -> Val:
        rhs = self.fn.like(other, self)
        a, b = (rhs, self) if swap else (self, rhs)
        is_int = scalar_type(self.type).startswith("i")
        return self.fn.op(f"{integer if is_int else floating} {self.type} {a.name}, {b.name}", self.type)

    def __add__(self, other: Val | float) -> Val:
        return self._arith(other, "add", "fadd")

    def __radd__(self, other: float) -> Val:
        return self._arith(other, "add", "fadd")

    def __sub__(self, other: Val | float) -> Val:
        return self._arith(other, "sub", "fsub")

    def __rsub__(self, other: float) -> Val:
        return self._arith(other, "sub", "fsub", swap=True)

    def __mul__(self, other: Val | float) -> Val:
        return self._arith(other, "mul", "fmul")

    def __rmul__(self, other: float) -> Val:
        return self._arith(other, "mul", "fmul")

    def __truediv__(self, other: Val | float) -> Val:
        return self._arith(other, "sdiv", "fdiv")

    def __rtruediv__(self, other: float) -> Val:
        return self._arith(other, "sdiv", "fdiv", swap=True)

    def __mod__(self, other: Val | int) -> Val:
        return self._arith(other, "srem", "frem")

    def __and__(self, other: Val | int) -> Val:
        return self._arith(other, "and", "and")

    def __or__(self, other: Val | int) -> Val:
        return self._arith(other, "or", "or")

    def __xor__(self, other: Val | int) -> Val:
        return self._arith(other, "xor", "xor")

    def __lshift__(self, other: Val | int) -> Val:
        return self._arith(other, "shl", "shl")

    def __rshift__(self, other: Val | int) -> Val:
        return self._arith(other, "lshr", "lshr")

    def __neg__(self) -> Val:
        floats = scalar_type(self.type) in ("float", "double")
        return self.fn.op(f"fneg {self.type} {self.name}", self.type) if floats else 0 - self

    def cmp(self, predicate: str, other: Val | float | int) -> Val:
        """A comparison: icmp's predicates for integers ("slt"), fcmp's for floats ("olt", "uno")."""
        rhs = self.fn.like(other, self)
        kind = "icmp" if scalar_type(self.type).startswith("i") else "fcmp"
        result = vector_type("i1", lanes_of(self.type))
        return self.fn.op(f"{kind} {predicate} {self.type} {self.name}, {rhs.name}", result)

    def __lt__(self, other: Val | float) -> Val:
        return self.cmp("slt" if scalar_type(self.type).startswith("i") else "olt", other)

    def __le__(self, other: Val | float) -> Val:
        return self.cmp("sle" if scalar_type(self.type).startswith("i") else "ole", other)

    def __gt__(self, other: Val | float) -> Val:
        return self.cmp("sgt" if scalar_type(self.type).startswith("i") else "ogt", other)

    def __ge__(self, other: Val | float) -> Val:
        return self.cmp("sge" if scalar_type(self.type).startswith("i") else "oge", other)


@attrs.frozen
class Micro:
    """A finished LLVM IR function: its symbol (which contains a hash of its text) and all text that it needs."""

    symbol: str
    declares: frozenset[str]
    bodies: tuple[str, ...]

    def call(self, *args: Any) -> None:
        """Emit the call into the TIR under construction: data pointers first, then integers.

        Every integer must be 64 bits wide: LLVM doesn't inline a call whose types differ from the definition's, and
        the function exists nowhere else. TVM narrows bounded index expressions to 32 bits, but not what is stored.
        """
        pointers = [a for a in args if _is_pointer(a)]
        scalars = [a for a in args if not _is_pointer(a)]
        local = T.alloc_buffer((max(len(scalars), 1),), "int64")
        for n, value in enumerate(scalars):
            T.buffer_store(local, T.int64(value) if isinstance(value, int) else T.cast(value, "int64"), [n])
        stored = [local[n] for n in range(len(scalars))]
        T.evaluate(T.call_extern("void", self.symbol, *pointers, *stored))


def _is_pointer(value: Any) -> bool:
    return not isinstance(value, int) and "handle" in str(value.ty)


def link_text(micros: Sequence[Micro]) -> str:
    """The LLVM IR text of these functions and all that they call, each once."""
    declares = sorted(frozenset().union(*(m.declares for m in micros)))
    bodies = dict.fromkeys(body for m in micros for body in m.bodies)
    return "\n".join([*declares, *bodies])


class Function:
    """Builds one LLVM IR function with structured control flow: loops carry values, as in a functional language."""

    pointers = "noalias"
    """What LLVM is told of parameters that are pointers."""

    def __init__(self, name: str, params: Sequence[tuple[str, str]], target: Target) -> None:
        self.target = target
        self.lanes = target.lanes("float32")
        self._name = name
        self._params = tuple(params)
        self._lines: list[str] = []
        self._declares: set[str] = set()
        self._bodies: dict[str, None] = {}
        self._count = 0
        self._block = "entry"

    def params(self) -> list[Val]:
        """The function's parameters as values, in order."""
        return [Val(self, f"%{name}", type_) for type_, name in self._params]

    # Plain instructions

    def op(self, text: str, type_: str) -> Val:
        """Append an instruction with a result of `type_`."""
        self._count += 1
        name = f"%v{self._count}"
        self._lines.append(f"  {name} = {text}")
        return Val(self, name, type_)

    def emit(self, text: str) -> None:
        """Append an instruction without a result."""
        self._lines.append(f"  {text}")

    def const(self, value: float | int, type_: str) -> Val:
        """A constant of `type_`, the same in all lanes of a vector."""
        scalar = scalar_type(type_)
        if scalar in ("float", "double"):
            # LLVM writes a float as the bits of the double of the same value.
            held = struct.unpack("<f", struct.pack("<f", value))[0] if scalar == "float" else float(value)
            text = f"0x{struct.unpack('<Q', struct.pack('<d', held))[0]:016X}"
        else:
            text = str(int(value))
        return Val(self, f"splat ({scalar} {text})" if type_.startswith("<") else text, type_)

    def i64(self, value: int | Val) -> Val:
        """An i64 constant; a value stays as it is."""
        return value if isinstance(value, Val) else self.const(value, "i64")

    def like(self, value: Val | float | int, model: Val) -> Val:
        """`value` with the type of `model`: constants and scalars are spread over its lanes."""
        if not isinstance(value, Val):
            return self.const(value, model.type)
        return self.splat(value, lanes_of(model.type)) if value.type == scalar_type(model.type) else value

    def splat(self, value: Val, lanes: int) -> Val:
        """A scalar spread over all lanes."""
        if lanes == 1:
            return value
        vector = vector_type(value.type, lanes)
        one = self.op(f"insertelement {vector} poison, {value.type} {value.name}, i64 0", vector)
        return self.op(f"shufflevector {vector} {one.name}, {vector} poison, <{lanes} x i32> zeroinitializer", vector)

    def call(self, result: str, name: str, *args: Val) -> Val:
        """Call an LLVM intrinsic with these arguments and result type."""
        self._declares.add(f"declare {result} @{name}({', '.join(a.type for a in args)})")
        return self.op(f"call {result} @{name}({', '.join(f'{a.type} {a.name}' for a in args)})", result)

    def run(self, name: str, *args: Val) -> None:
        """Call an LLVM intrinsic without a result."""
        self._declares.add(f"declare void @{name}({', '.join(a.type for a in args)})")
        self.emit(f"call void @{name}({', '.join(f'{a.type} {a.name}' for a in args)})")

    def use(self, micro: Micro, *args: Val | int) -> None:
        """Call another function of ours."""
        self._declares |= micro.declares
        self._bodies.update(dict.fromkeys(micro.bodies))
        values = [self.i64(a) for a in args]
        self.emit(f"call void @{micro.symbol}({', '.join(f'{a.type} {a.name}' for a in values)})")

    def cast(self, kind: str, value: Val, scalar: str) -> Val:
        """One of LLVM's conversions ("zext", "fptrunc", "bitcast"…) to another element type."""
        to = vector_type(scalar, lanes_of(value.type))
        return self.op(f"{kind} {value.type} {value.name} to {to}", to)

    def select(self, condition: Val, then: Val, other: Val | float) -> Val:
        """`then` where the condition holds, else `other`."""
        rhs = self.like(other, then)
        cond = condition
        return self.op(f"select {cond.type} {cond.name}, {then.type} {then.name}, {rhs.type} {rhs.name}", then.type)

    def lookup(self, table: Sequence[float], index: Val) -> Val:
        """The numbers float32 of a table of up to 16 at these indices (i32 lanes)."""
        lanes, size = lanes_of(index.type), len(table)
        if lanes == 16 and self.target.has("avx512f"):
            return self.call("<16 x float>", "llvm.x86.avx512.permvar.sf.512", self._numbers(table, 16), index)
        if lanes == 8 and self.target.has("avx2"):
            halves = [
                self.call("<8 x float>", "llvm.x86.avx2.permps", self._numbers(part, 8), index)
                for part in (table[:8], table[8:])
                if part
            ]
            return halves[0] if size <= 8 else self.select(index < 8, *halves)
        found = self.like(float(table[-1]), self.cast("bitcast", index, "float"))
        for i in range(size - 2, -1, -1):
            found = self.select(index.cmp("eq", i), self.like(float(table[i]), found), found)
        return found

    def _numbers(self, values: Sequence[float], lanes: int) -> Val:
        """A vector of these float32, then zeros."""
        padded = [*values, *[0.0] * (lanes - len(values))]
        text = ", ".join(f"float {self.const(float(v), 'float').name}" for v in padded)
        return Val(self, f"<{text}>", vector_type("float", lanes))

    def minimum(self, a: Val, b: Val | int) -> Val:
        """The lesser of two integers."""
        rhs = self.like(b, a)
        return self.select(a < rhs, a, rhs)

    def maximum(self, a: Val, b: Val | int | float) -> Val:
        """The greater of two; for floats `a` where either is NaN."""
        rhs = self.like(b, a)
        return self.select(rhs > a, rhs, a)

    def fma(self, a: Val, b: Val, c: Val | float) -> Val:
        """a * b + c, fused where the machine can."""
        rhs = self.like(c, a)
        return self.call(a.type, f"llvm.fmuladd.{_suffix(a.type)}", a, self.like(b, a), rhs)

    def reduce(self, kind: str, value: Val) -> Val:
        """All lanes folded into one: "fadd", "fmax"; the order within a vector is the machine's, always the same."""
        if not value.type.startswith("<"):
            return value
        name = f"llvm.vector.reduce.{kind}.{_suffix(value.type)}"
        if kind == "fadd":
            self._declares.add(f"declare float @{name}(float, {value.type})")
            return self.op(f"call reassoc float @{name}(float 0.0, {value.type} {value.name})", "float")
        self._declares.add(f"declare float @{name}({value.type})")
        return self.op(f"call nnan float @{name}({value.type} {value.name})", "float")

    def any(self, mask: Val) -> Val:
        """Whether the mask holds in any lane."""
        return self.call("i1", f"llvm.vector.reduce.or.{_suffix(mask.type)}", mask)

    # Memory

    def at(self, base: Val, index: Val | int, dtype: str) -> Val:
        """The address of element `index` of an array of `dtype` at `base`."""
        scalar = STORED.get(dtype, dtype)
        text = f"getelementptr inbounds {scalar}, {base.type} {base.name}, i64 {self.i64(index).name}"
        return self.op(text, base.type)

    def load(self, type_: str, address: Val) -> Val:
        """A plain load, aligned to the element."""
        size = {"float": 4, "i16": 2, "half": 2, "i64": 8, "i32": 4, "i8": 1, "ptr": 8}[scalar_type(type_)]
        return self.op(f"load {type_}, {address.type} {address.name}, align {size}", type_)

    def store(self, value: Val, address: Val) -> None:
        """A plain store, aligned to the element."""
        size = {"float": 4, "i16": 2, "half": 2, "i64": 8, "i32": 4, "i8": 1, "bfloat": 2}[scalar_type(value.type)]
        self.emit(f"store {value.type} {value.name}, {address.type} {address.name}, align {size}")

    def load_raw(self, scalar: str, address: Val, mask: Val | None, lanes: int = 0) -> Val:
        """A vector of stored elements; lanes outside `mask` are zero and not read."""
        type_ = vector_type(scalar, lanes or self.lanes)
        if mask is None or lanes == 1:
            return self.load(type_, address)
        size = {"float": 4, "i16": 2, "half": 2, "i64": 8, "i32": 4, "i8": 1}[scalar]
        name = f"llvm.masked.load.{_suffix(type_)}.p0"
        self._declares.add(f"declare {type_} @{name}(ptr, i32, {mask.type}, {type_})")
        args = f"ptr {address.name}, i32 {size}, {mask.type} {mask.name}, {type_} zeroinitializer"
        return self.op(f"call {type_} @{name}({args})", type_)

    def store_raw(self, value: Val, address: Val, mask: Val | None) -> None:
        """Store the lanes of a vector that are in `mask`."""
        if mask is None:
            self.store(value, address)
            return
        size = {"float": 4, "i16": 2, "half": 2, "i64": 8, "i32": 4, "i8": 1, "bfloat": 2}[scalar_type(value.type)]
        name = f"llvm.masked.store.{_suffix(value.type)}.p0"
        self._declares.add(f"declare void @{name}({value.type}, ptr, i32, {mask.type})")
        args = f"{value.type} {value.name}, ptr {address.name}, i32 {size}, {mask.type} {mask.name}"
        self.emit(f"call void @{name}({args})")

    def load_f32(self, base: Val, index: Val | int, dtype: str, mask: Val | None = None, lanes: int = 0) -> Val:
        """`lanes` (a full vector unless given) floats of `dtype` from base[index], widened to float32."""
        raw = self.load_raw(STORED[dtype], self.at(base, index, dtype), mask, lanes)
        return self.widen(raw, dtype)

    def widen(self, raw: Val, dtype: str) -> Val:
        """Stored elements of `dtype` as float32 values."""
        if dtype == "float32":
            return raw
        if dtype == "float16":
            return self.cast("fpext", raw, "float")
        return self.cast("bitcast", self.cast("zext", raw, "i32") << 16, "float")

    def store_f32(self, value: Val, base: Val, index: Val | int, dtype: str, mask: Val | None = None) -> None:
        """Round float32 lanes to `dtype` and store them at base[index]."""
        self.store_raw(self.narrow(value, dtype), self.at(base, index, dtype), mask)

    def narrow(self, value: Val, dtype: str) -> Val:
        """float32 values as stored elements of `dtype`, rounded to nearest even."""
        if dtype == "float32":
            return value
        if dtype == "float16":
            return self.cast("fptrunc", value, "half")
        if self.target.has("avx512bf16") and lanes_of(value.type) == 16:
            return self.cast("bitcast", self.cast("fptrunc", value, "bfloat"), "i16")
        bits = self.cast("bitcast", value, "i32")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = self.select(value.cmp("uno", value), (bits >> 16) | 0x40, rounded)
        return self.cast("trunc", kept, "i16")

    def rounded(self, value: Val, dtype: str) -> Val:
        """float32 values rounded to what `dtype` can hold."""
        return value if dtype == "float32" else self.widen(self.narrow(value, dtype), dtype)

    def iota(self, lanes: int = 0) -> Val:
        """0, 1, 2… as i64 lanes."""
        n = lanes or self.lanes
        return Val(self, "<" + ", ".join(f"i64 {i}" for i in range(n)) + ">", f"<{n} x i64>")

    def mask_below(self, count: Val | int, lanes: int = 0) -> Val:
        """The first `count` lanes."""
        n = lanes or self.lanes
        bound = self.const(count, f"<{n} x i64>") if isinstance(count, int) else self.splat(count, n)
        return self.iota(n).cmp("slt", bound)

    def prefetch(self, address: Val) -> None:
        """Ask for the cache line at `address`, to be read soon: into the second cache, which has more room for lines under way."""
        self._declares.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.emit(f"call void @llvm.prefetch.p0(ptr {address.name}, i32 0, i32 2, i32 1)")

    # Control

    def _label(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    def loop(
        self,
        start: Val | int,
        stop: Val | int,
        step: Val | int,
        carried: Sequence[Val],
        body: Callable[[Val, list[Val]], Sequence[Val] | None],
    ) -> list[Val]:
        """for (i = start; i < stop; i += step): the carried values after it; the last one returned is i itself."""
        first, last, by = self.i64(start), self.i64(stop), self.i64(step)
        self._count += 1
        tag, before = self._count, self._block
        self.emit(f"br label %head{tag}")
        self._label(f"head{tag}")
        hole = len(self._lines)
        phis = [Val(self, f"%p{tag}_{n}", v.type) for n, v in enumerate([first, *carried])]
        self._lines.extend([""] * len(phis))
        index, values = phis[0], phis[1:]
        going = index.cmp("slt", last)
        self.emit(f"br i1 {going.name}, label %body{tag}, label %exit{tag}")
        self._label(f"body{tag}")
        new = list(body(index, list(values)) or [])
        after = [index + by, *new]
        latch = self._block
        self.emit(f"br label %head{tag}")
        for n, (phi, old, new_value) in enumerate(zip(phis, [first, *carried], after, strict=True)):
            incoming = f"[ {old.name}, %{before} ], [ {new_value.name}, %{latch} ]"
            self._lines[hole + n] = f"  {phi.name} = phi {phi.type} {incoming}"
        self._label(f"exit{tag}")
        return [*values, index]

    def walk(self, start: Val, stop: Val, body: Callable[[Val], Val]) -> None:
        """i = start; while i < stop: i = body(i), for steps that the body decides."""
        self._count += 1
        tag, before = self._count, self._block
        self.emit(f"br label %head{tag}")
        self._label(f"head{tag}")
        hole = len(self._lines)
        self._lines.append("")
        index = Val(self, f"%p{tag}", "i64")
        going = index < stop
        self.emit(f"br i1 {going.name}, label %body{tag}, label %exit{tag}")
        self._label(f"body{tag}")
        after = body(index)
        self._lines[hole] = f"  {index.name} = phi i64 [ {start.name}, %{before} ], [ {after.name}, %{self._block} ]"
        self.emit(f"br label %head{tag}")
        self._label(f"exit{tag}")

    def when(self, condition: Val, then: Callable[[], None], other: Callable[[], None] | None = None) -> None:
        """Run `then` if the condition holds, else `other`."""
        self._count += 1
        tag = self._count
        self.emit(f"br i1 {condition.name}, label %then{tag}, label %else{tag}")
        self._label(f"then{tag}")
        then()
        self.emit(f"br label %end{tag}")
        self._label(f"else{tag}")
        if other is not None:
            other()
        self.emit(f"br label %end{tag}")
        self._label(f"end{tag}")

    def choose(self, condition: Val, then: Callable[[], Val], other: Callable[[], Val]) -> Val:
        """The value of one of two branches, of which only that one runs."""
        self._count += 1
        tag = self._count
        self.emit(f"br i1 {condition.name}, label %then{tag}, label %else{tag}")
        self._label(f"then{tag}")
        a, block_a = then(), self._block
        self.emit(f"br label %end{tag}")
        self._label(f"else{tag}")
        b, block_b = other(), self._block
        self.emit(f"br label %end{tag}")
        self._label(f"end{tag}")
        return self.op(f"phi {a.type} [ {a.name}, %{block_a} ], [ {b.name}, %{block_b} ]", a.type)

    def vectors(
        self,
        n: Val | int,
        body: Callable[[Val, Val | None, list[Val]], Sequence[Val] | None],
        carried: Sequence[Val] = (),
    ) -> list[Val]:
        """Walk 0…n in full vectors, then one masked vector for the rest: body(i, mask, carried) gives the new carried.

        A constant n leaves out the tail, or the loop, that it doesn't need.
        """

        def run(index: Val, mask: Val | None, values: list[Val]) -> list[Val]:
            return list(body(index, mask, values) or [])

        lanes = self.lanes
        if isinstance(n, int):
            full = n // lanes * lanes
            values = list(carried)
            if full:
                values = self.loop(0, full, lanes, values, lambda i, vs: run(i, None, vs))[:-1]
            return run(self.i64(full), self.mask_below(n - full), values) if n > full else values
        whole = n & -lanes
        *values, end = self.loop(0, whole, lanes, list(carried), lambda i, vs: run(i, None, vs))
        rest = n - end
        *values, _ = self.loop(end, n, lanes, values, lambda i, vs: run(i, self.mask_below(rest), vs))
        return values

    def finish(self) -> Micro:
        """The finished function."""
        if not self._lines or self._lines[-1] != "  ret void":
            self.emit("ret void")
        params = ", ".join(f"{t} {self.pointers} %{n}" if t == "ptr" else f"{t} %{n}" for t, n in self._params)
        body = f"({params}) alwaysinline nounwind {{\nentry:\n" + "\n".join(self._lines) + "\n}\n"
        symbol = f"jisu_{self._name}_{hashlib.sha256(body.encode()).hexdigest()[:12]}"
        return Micro(symbol, frozenset(self._declares), (*self._bodies, f"define void @{symbol}{body}"))

    # Elementary functions on float32 lanes

    def exp(self, x: Val) -> Val:
        """e^x to about 1 ulp (Cephes' expf: x = n ln 2 + r, a polynomial in r, 2^n in two steps for the full range)."""
        x = self.select(x < -104.0, self.like(-104.0, x), x)
        x = self.select(x > 89.0, self.like(89.0, x), x)
        p, n = self._exp_parts(x)
        half = self.op(f"ashr {n.type} {n.name}, {self.like(1, n).name}", n.type)
        return p * self._power_of_two(half) * self._power_of_two(n - half)

    def exp_below(self, x: Val) -> Val:
        """e^x for x of at most 0 to about 1 ulp, and 0 below e^-87: `exp` in one step."""
        p, n = self._exp_parts(x)
        return self.select(x < -87.0, self.like(0.0, x), p * self._power_of_two(n))

    def _exp_parts(self, x: Val) -> tuple[Val, Val]:
        """p and n (i32 lanes) such that e^x is p 2^n and p near 1."""
        shifted = self.fma(x, self.like(1.44269504088896341, x), 12582912.0)
        n = shifted - 12582912.0
        r = self.fma(n, self.like(-0.693359375, x), x)
        r = self.fma(n, self.like(2.12194440e-4, x), r)
        p = self.like(1.9875691500e-4, x)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, c)
        return self.fma(p, r * r, r) + 1.0, self.cast("bitcast", shifted, "i32") - 0x4B400000

    def _power_of_two(self, n: Val) -> Val:
        """2^n of i32 lanes, as float32."""
        return self.cast("bitcast", (n + 127) << 23, "float")

    def tanh(self, x: Val) -> Val:
        """tanh to a few ulp: Cephes' polynomial near 0, else 1 - 2 / (e^2x + 1)."""
        z = x * x
        p = self.like(-5.70498872745e-3, x)
        for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            p = self.fma(p, z, c)
        near = self.fma(p * z, x, x)
        far = 1.0 - 2.0 / (self.exp(x + x) + 1.0)
        return self.select(z < 0.390625, near, far)

    def erf(self, x: Val) -> Val:
        """erf to a few ulp: Eigen's rational approximation on [-4, 4]."""
        x = self.select(x < -4.0, self.like(-4.0, x), x)
        x = self.select(x > 4.0, self.like(4.0, x), x)
        z = x * x
        p = self.like(-2.72614225801306e-10, x)
        for c in (
            2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
            -2.95459980854025e-03, -1.60960333262415e-02,
        ):  # fmt: skip
            p = self.fma(p, z, c)
        q = self.like(-1.45660718464996e-05, x)
        for c in (-2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02):
            q = self.fma(q, z, c)
        return x * p / q

    def sigmoid(self, x: Val) -> Val:
        """1 / (1 + e^-x)."""
        return 1.0 / (self.exp(-x) + 1.0)

    def activate(self, name: str, x: Val) -> Val:
        """The activation `name` (one of `ACTIVATIONS`) of float32 lanes."""
        return _ACTIVATE[name](self, x)


def _gelu_tanh(f: Function, x: Val) -> Val:
    inner = (x * x * x * 0.044715 + x) * 0.7978845608028654
    return x * 0.5 * (f.tanh(inner) + 1.0)


_ACTIVATE: dict[str, Callable[[Function, Val], Val]] = {
    "none": lambda f, x: x,
    "relu": lambda f, x: f.select(x < 0.0, f.like(0.0, x), x),
    "relu2": lambda f, x: (lambda r: r * r)(f.select(x < 0.0, f.like(0.0, x), x)),
    "gelu": lambda f, x: x * 0.5 * (f.erf(x * 0.7071067811865476) + 1.0),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda f, x: x * f.sigmoid(x * 1.702),
    "silu": lambda f, x: x / (f.exp(-x) + 1.0),
    "sigmoid": lambda f, x: f.sigmoid(x),
    "tanh": lambda f, x: f.tanh(x),
}
ACTIVATIONS = tuple(_ACTIVATE)


def require_activation(name: str) -> None:
    """Raise TargetError unless the kernels know the activation."""
    if name not in _ACTIVATE:
        raise TargetError(f"the CPU kernels have no activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def _suffix(type_: str) -> str:
    short = {"float": "f32", "half": "f16", "bfloat": "bf16", "double": "f64"}
    scalar = scalar_type(type_)
    lanes = lanes_of(type_)
    return (f"v{lanes}" if lanes > 1 else "") + short.get(scalar, scalar)


@attrs.frozen
class Arg:
    """A buffer in a kernel's signature; a dimension named by a string is symbolic (int64) and shared by name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def prim_func(
    name: str,
    args: Sequence[Arg],
    micros: Sequence[Micro],
    body: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
) -> Any:
    """A TIR PrimFunc with these buffers as parameters (inputs first), its body emitted by `body(buffers, dims)`.

    Symbolic dimensions are solved from the buffers' shapes; `micros` are the LLVM functions that the body calls.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            handles = [T.arg(a.name, T.handle()) for a in args]
            dims: dict[str, Any] = {}
            buffers: dict[str, Any] = {}
            for arg, handle in zip(args, handles, strict=True):
                for d in arg.shape:
                    if isinstance(d, str) and d not in dims:
                        dims[d] = IRBuilder.name(d, T.int64())
                shape = [dims[d] if isinstance(d, str) else T.int64(d) for d in arg.shape]
                # The name appears in the errors about wrong shapes and dtypes.
                buffers[arg.name] = IRBuilder.name(
                    arg.name, T.match_buffer(handle, shape, arg.dtype, align=ITEMSIZE[arg.dtype])
                )
            with T.attr(T.int32(0), "pragma_import_llvm", link_text(micros)):
                body(buffers, dims)
    return builder.get()
