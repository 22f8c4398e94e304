"""Pallas source from lowered TIR: a module that imports jax and numpy alone, and a person can read.

The TIR is walked statement by statement. Buffers become scratch memory, copies `make_async_copy` with a semaphore per buffer and slot,
serial loops `fori_loop`. A block that the matrix unit multiplies at once (its unrolled loops) becomes one `jnp.dot`, which the chip's
compiler cuts into matrix-unit instructions itself; a nest that computes values one by one becomes vector operations on the whole block.
Source: JAX's Pallas TPU documentation (memory spaces, DMA, semaphores).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from tvm import tirx
from tvm.ir import Call
from tvm.ir.expr import TensorLoad
from tvm_ffi import structural_equal

from jisu.compiler.errors import CompileError
from jisu.compiler.types import TensorType
from jisu.targets.tpu import grouped
from jisu.targets.tpu.intrinsics import HBM
from jisu.targets.tpu.product import Lowered
from jisu.targets.tpu.tiles import usable_vmem
from jisu.targets.tpu.walk import (
    COMMIT,
    WAIT,
    Copy,
    Multiply,
    Region,
    Zero,
    bound_analyzer,
    elementwise,
    instruction,
    loads,
    offset_of,
    operands,
    parts,
)

_BINARY = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}
_CALLS = {"tirx.exp": "jnp.exp", "tirx.tanh": "jnp.tanh", "tirx.erf": "lax.erf"}
_FUNCTIONS = {"Max": "jnp.maximum", "Min": "jnp.minimum", "FloorDiv": "lax.div", "FloorMod": "lax.rem"}


def source(lowered: Lowered) -> str:
    """The module's text. It defines `kernel(*arrays, interpret=False)`: arrays of `inputs`, padded or not; the result is cropped.

    CompileError: the TIR holds something that no product has.
    """
    return _Writer(lowered).module()


def inputs(lowered: Lowered) -> tuple[tuple[str, TensorType, tuple[int, ...]], ...]:
    """What the kernel takes: name, type and padded shape. Those of operands; w and u of a gated product are one array, w [2, k, n], as are the scales and
    zeros of their groups; codes of 4 bits are bytes [k / 2, n] of `ops.pack_codes`."""
    found = []
    for o in lowered.operands[:-1]:
        lead = (2,) if o.name[0] == "w" and lowered.product.gated else ()
        if o.name[0] != "u" or o.name == "up_scale":
            (*shape, dtype), (*padded, _) = (_in_memory(*shape, o.dtype) for shape in (o.shape, o.padded))
            found.append((o.name, TensorType((*lead, *shape), dtype), (*lead, *padded)))
    return tuple(found)


@attrs.define
class _Writer:
    lowered: Lowered
    lines: list[str] = attrs.Factory(list)
    depth: int = 1
    loops: list[Any] = attrs.Factory(list)
    queue: int | None = None
    queues: dict[int, dict[str, Copy]] = attrs.Factory(dict)
    pending: dict[int, list[list[str]]] = attrs.Factory(dict)  # groups of copies to tiles without slots
    counts: Counter[str] = attrs.Factory(Counter)
    assigns: bool = False  # whether a product's sums begin with it

    # The module

    def module(self) -> str:
        """The whole text."""
        function = self.lowered.function
        allocated = [s.buffer for s in parts(function.body) if isinstance(s, tirx.AllocBuffer)]
        copied = list(dict.fromkeys(_name(c.vmem.buffer) for c in _copies(function.body)))
        self._statement(function.body)
        body = "\n".join(self.lines)
        taken, result = inputs(self.lowered), self.lowered.operands[-1]
        hbm = [*(_hbm(name) for name, *_ in taken), _hbm(result.name)]
        groups = hbm, map(_name, allocated), [f"{n}_copied" for n in copied]
        parameters = "".join(f"\n    {', '.join(group)}," for group in groups)
        scratch = [f"pltpu.VMEM({_shape(b)}, jnp.{_dtype(b)})" for b in allocated]
        scratch += [
            f"pltpu.SemaphoreType.DMA(({self._copies(b)},))" for n in copied for b in allocated if _name(b) == n
        ]
        listed = "".join(f"\n            {s}," for s in scratch)
        shapes = "".join(f"\n    {padded},  # {name}, {t.dtype}, {_meaning(t)}" for name, t, padded in taken)
        p, t, chip = self.lowered.product, self.lowered.tiles, self.lowered.chip
        functions = grouped.helper(p, t.rows, t.unit[1], t.inner) if p.group else ""
        if p.group:
            parameters += "\n    grid,"
            listed += f"\n            pltpu.VMEM({grouped.grid_shape(p, t.k, t.inner, t.columns)}, jnp.float32),"
        return f'''"""{_title(p)}

For TPU {chip.name}: tiles of {t.m} rows, {t.n} columns and {t.k} of the inner axis ("{t.order}"), written by jisu from TIR.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Shapes in HBM: whole tiles. Arrays that are smaller get zeros behind their rows and columns.
PADDED = ({shapes}
)
DTYPES = ({", ".join(repr(t.dtype) for _, t, _ in taken)})
RESULT = {result.shape}  # of {result.padded}


copy = pltpu.make_async_copy


def pad(array, shape):
    """The array with zeros behind its rows and columns."""
    return array if array.shape == shape else jnp.pad(array, [(0, p - s) for s, p in zip(array.shape, shape)])


def await_copy(tile, copied, slot):
    """Wait until all of a tile's slot is copied, at once or in parts: semaphores count bytes."""
    copy(tile.at[slot], tile.at[slot], copied.at[slot]).wait()


{functions}# Memory: operands in HBM; tiles in VMEM, by slots where one is filled while another is used; semaphores of their copies.
def body({parameters}
):
{_halves(taken) if p.gated else ""}{body}


def kernel(*arrays, interpret=False):
    """The product of arrays in HBM, {", ".join(name for name, *_ in taken)}; interpret: False on a TPU, else pltpu.InterpretParams()."""
    arrays = [pad(array, padded) for array, padded in zip(arrays, PADDED, strict=True)]
{_arranged(p)}    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct({result.padded}, jnp.{result.dtype}),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * {len(taken)},
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[{listed}
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes={self._limit()}),
        interpret=interpret,
    )(*arrays)
    return result[: RESULT[0], : RESULT[1]]
'''

    def _limit(self) -> int:
        """Bytes of VMEM that the compiler may use: what tiles take, and as much again as its temporaries may need."""
        chip = self.lowered.chip
        used = sum(self.lowered.tiles.vmem(self.lowered.product, chip).values())
        spare = chip.vmem_bytes - usable_vmem(chip)
        return min(used + spare, chip.vmem_bytes)

    # Statements

    def _put(self, text: str) -> None:
        self.lines.append(("    " * self.depth + text).rstrip())

    @contextmanager
    def _indented(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def _statement(self, s: Any) -> None:
        match s:
            case tirx.SeqStmt():
                for part, following in itertools.zip_longest(s.seq, s.seq[1:]):
                    if self._begins(part, following):
                        self.assigns = True
                    else:
                        self._statement(part)
            case tirx.AllocBuffer():
                pass
            case tirx.AttrStmt() if s.attr_key == COMMIT:
                self.queue = int(s.value)
                self.pending.setdefault(self.queue, []).append([])
                self._statement(s.body)
                self.queue = None
            case tirx.AttrStmt() if s.attr_key == WAIT:
                self._wait(int(s.value), int(s.body.value), s.body.body)
                self._statement(s.body.body)
            case tirx.AttrStmt():
                self._statement(s.body)
            case tirx.For():
                self._loop(s)
            case tirx.BufferStore():
                self._elementwise(s)
            case tirx.Evaluate():
                self._instruction(s)
            case _:
                raise CompileError(f"no Pallas source for {type(s).__name__}")

    def _loop(self, loop: Any) -> None:
        found = _multiplied(loop, bool(self.lowered.product.group))
        if found is not None:
            self._block(*found)
        elif elementwise(loop) and not isinstance(loop.body.body, tirx.For):
            self._elementwise(loop)
        else:
            self._serial(loop)

    def _serial(self, loop: Any) -> None:
        variable = self._variable(loop)
        self._put("")
        self._put(f"def step_{variable}({variable}, carry):")
        self.loops.append(loop)
        begin = len(self.lines)
        with self._indented():
            self._statement(loop.body)
            self._share_quotients(begin, variable)
            self._put("return carry")
        self.loops.pop()
        self._put("")
        first, count = int(loop.min), int(loop.extent)
        self._put(f"lax.fori_loop({first}, {first + count}, step_{variable}, 0)")

    def _share_quotients(self, begin: int, variable: str) -> None:
        """Give names to quotients and remainders of a loop's variable that the lines from `begin` on use again and again."""
        pattern = re.compile(rf"lax\.(?:rem|div)\({variable}(?: [+-] \d+)?, \d+\)")
        counts = Counter(found for line in self.lines[begin:] for found in pattern.findall(line))
        for text in (text for text, count in counts.items() if count > 1):
            kind = (
                "slot" if text.endswith(", 2)") and text.startswith("lax.rem") else "rest" if "rem" in text else "whole"
            )
            self.counts[kind] += 1
            name = kind if self.counts[kind] == 1 else f"{kind}_{self.counts[kind]}"
            self.lines[begin:] = [line.replace(text, name) for line in self.lines[begin:]]
            self.lines.insert(begin, "    " * self.depth + f"{name} = {text}")

    def _variable(self, loop: Any) -> str:
        """A readable name of a loop's variable, distinct from those of loops around it."""
        return self._names().get(loop.loop_var) or _LETTERS[len(self.loops) % len(_LETTERS)]

    def _names(self) -> dict[Any, str]:
        return {loop.loop_var: _LETTERS[n % len(_LETTERS)] for n, loop in enumerate(self.loops)}

    def _instruction(self, s: Any) -> None:
        found = instruction(s)
        match found:
            case Copy():
                self._copy(found)
            case Zero() | Multiply():
                self._block(found, [])
            case None:
                if not isinstance(s.value, tirx.IntImm):
                    raise CompileError(f"no Pallas source for {s}")

    # Copies

    def _copy(self, copy: Copy) -> None:
        text = self._transfer(copy)
        if self.queue is None:
            self._put(f"{text}.start()")
            self._put(f"{text}.wait()")
            return
        self.queues.setdefault(self.queue, {})[_name(copy.vmem.buffer)] = copy
        if not copy.to.in_hbm and len(copy.to.buffer.shape) == 2:
            self.pending[self.queue][-1].append(text)
        self._put(f"{text}.start()")

    def _transfer(self, copy: Copy) -> str:
        pieces = self._pieces(copy.vmem.buffer)
        slot = self._slot(copy.vmem) if copy.to.in_hbm or not pieces else pieces.index(int(copy.vmem.offset))
        semaphore = f"{_name(copy.vmem.buffer)}_copied.at[{slot}]"
        return f"copy({self._ref(copy.source)}, {self._ref(copy.to)}, {semaphore})"

    def _slot(self, region: Region, inner: Any = None) -> str:
        """A region's slot; `inner` has the loops between here and the region."""
        loops = [part for part in parts(inner) if isinstance(part, tirx.For)] if inner is not None else []
        analyzer = bound_analyzer([*self.loops, *loops])
        return self._index(region.indices(analyzer)[0]) if len(region.buffer.shape) == 3 else "0"

    def _pieces(self, buffer: Any) -> list[int]:
        """Where the pieces begin by which a tile without slots is filled; each has a semaphore, for they may come in any order."""
        if len(buffer.shape) > 2:
            return []
        copies = (c.to for c in _copies(self.lowered.function.body) if not c.to.in_hbm and c.to.buffer.same_as(buffer))
        return sorted({int(region.offset) for region in copies})

    def _copies(self, buffer: Any) -> int:
        """How many semaphores a buffer's copies have."""
        return len(self._pieces(buffer)) or (int(buffer.shape[0]) if len(buffer.shape) == 3 else 1)

    def _wait(self, queue: int, inflight: int, body: Any) -> None:
        """Wait for the copies to or from the slots that the body reads or writes; without a body, for the oldest groups, or all that leave."""
        started = self.queues.get(queue, {})
        slots = {_name(r.buffer): self._slot(r, body) for r in _used(body)}
        slot = next((slots[name] for name in started if name in slots), None)
        if slot is not None:
            for name in started:
                self._put(f"await_copy({name}, {name}_copied, {slot})")
            return
        groups = self.pending.get(queue, [])
        if any(groups):
            while len(groups) > inflight:
                for text in groups.pop(0):
                    self._put(f"{text}.wait()")
            return
        for name, copy in started.items():
            shape = copy.vmem.buffer.shape
            if len(shape) == 2:
                self._put(f"copy({name}, {name}, {name}_copied.at[0]).wait()")
            for number in range(int(shape[0]) if len(shape) == 3 else 0):
                self._put(f"await_copy({name}, {name}_copied, {number})")

    # Blocks

    def _block(self, found: Zero | Multiply, unrolled: list[Any]) -> None:
        """One instruction, or all that a nest of unrolled loops around it does."""
        analyzer = self._analyzer()
        if isinstance(found, Zero):
            sums = self._widened(found.sums, unrolled)
            dtype = f"jnp.{sums.buffer.dtype}"
            self._put(f"{self._value(sums, analyzer)} = jnp.zeros(({sums.rows}, {sums.columns}), {dtype})")
            return
        sums, x, w, *grid = (self._widened(r, unrolled) for r in (found.sums, found.x, found.w, *found.grid))
        if (x.rows, w.columns) != (sums.rows, sums.columns) or x.columns != w.rows:
            raise CompileError(f"unrolled products don't make up a whole one: {found}")
        if grid:
            given = ", ".join(map(self._ref, (sums, x, w, *grid)))
            self._put(f"add_product({given}, grid)")
            return
        self._put(f"{self._value(sums, analyzer)} {'=' if self.assigns else '+='} jnp.dot(")
        self.assigns = False
        with self._indented():
            self._put(f"{self._value(x, analyzer)},")
            dtype = str(x.buffer.dtype)
            widened = "" if str(w.buffer.dtype) == dtype else f".astype(jnp.{dtype})"
            self._put(f"{self._value(w, analyzer)}{widened},")
            if dtype == "float32":
                self._put("precision=lax.Precision.HIGHEST,")
            self._put(f"preferred_element_type=jnp.{sums.buffer.dtype},")
        self._put(")")

    def _begins(self, zero: Any, following: Any) -> bool:
        """Whether sums that are zeroed are then added to, once and all of them: that product may be assigned to them."""
        zeroed, group = instruction(zero), bool(self.lowered.product.group)
        added, loops = _multiplied(following, group) or (instruction(following), [])
        if not isinstance(zeroed, Zero) or not isinstance(added, Multiply) or added.grid:
            return False
        sums = self._widened(added.sums, loops)
        same = sums.rows == zeroed.sums.rows and sums.columns == zeroed.sums.columns
        return same and bound_analyzer(self.loops).can_prove_equal(sums.offset, zeroed.sums.offset)

    def _widened(self, region: Region, unrolled: list[Any]) -> Region:
        """All that a nest of loops makes of a region; CompileError where that isn't one region, without a gap."""
        offset, rows, columns = region.offset, region.rows, region.columns
        for loop in reversed(unrolled):
            step = _coefficient(offset, loop.loop_var)
            offset = _at_value(offset, loop.loop_var, int(loop.min))
            count = int(loop.extent)
            if step == 0:
                continue
            if step == columns and columns * count <= region.stride:
                columns *= count
            elif step == rows * region.stride:
                rows *= count
            else:
                raise CompileError(f"{region.buffer.name}: steps of {step} in a block of {rows}x{columns}")
        return Region(region.buffer, offset, rows, columns, region.stride)

    def _elementwise(self, statement: Any) -> None:
        nest = []
        while isinstance(statement, tirx.For):
            nest.append(statement)
            statement = statement.body
        values = _Values(self, nest)
        value = values.text(statement.value)
        target = values.read(statement.buffer, list(statement.indices))
        for name, text in values.shared:
            self._put(f"{name} = {text}")
        self._put(f"{target} = {value}")

    # Where things are

    def _analyzer(self) -> Any:
        return bound_analyzer(self.loops)

    def _ref(self, region: Region) -> str:
        """A region as what a copy takes."""
        return self._sliced(region.buffer, region.indices(self._analyzer()), (region.rows, region.columns), ref=True)

    def _value(self, region: Region, analyzer: Any) -> str:
        """A region as values."""
        return self._sliced(region.buffer, region.indices(analyzer), (region.rows, region.columns), ref=False)

    def _sliced(self, buffer: Any, indices: list[Any], sizes: tuple[int, int], *, ref: bool) -> str:
        name, shape = _name(buffer), [int(n) for n in buffer.shape]
        if str(buffer.dtype) == "int4":  # bytes of two rows
            indices[-2] = bound_analyzer([]).simplify(tirx.floordiv(indices[-2], 2))
            shape[-2], sizes = shape[-2] // 2, (sizes[0] // 2, sizes[1])
        texts = [self._index(i) for i in indices[:-2]]
        for index, size, whole in zip(indices[-2:], sizes, shape[-2:], strict=True):
            texts.append(":" if size == whole else self._slice(index, size))
        while texts and texts[-1] == ":":
            texts.pop()
        if ref:
            return f"{name}.at[{', '.join(texts)}]" if texts else name
        return f"{name}[{', '.join(texts) if texts else '...'}]"

    def _slice(self, index: Any, size: int) -> str:
        if isinstance(index, tirx.IntImm):
            return f"{int(index)}:{int(index) + size}"
        multiple = math.gcd(_multiple(index), size)
        text = self._index(index)
        return f"pl.ds(pl.multiple_of({text}, {multiple}), {size})" if multiple > 1 else f"pl.ds({text}, {size})"

    def _index(self, index: Any, above: int = 0) -> str:
        """An index as text. Divisions are lax's: Python's ask for the chip while they are traced."""
        if isinstance(index, (int, tirx.IntImm)):
            return str(int(index))
        names = self._names()
        if index in names:
            return names[index]
        kind = type(index).__name__
        if kind in ("FloorDiv", "FloorMod"):
            return f"{_FUNCTIONS[kind]}({self._index(index.a)}, {self._index(index.b)})"
        if kind in _BINARY and kind != "Div":
            rank = 1 if kind in ("Add", "Sub") else 2
            text = f"{self._index(index.a, rank)} {_BINARY[kind]} {self._index(index.b, rank + (kind == 'Sub'))}"
            return f"({text})" if rank < above else text
        raise CompileError(f"no Pallas source for the index {index}")


@attrs.define
class _Values:
    """Expressions of one element as expressions of the block that a nest's two innermost loops make up."""

    writer: _Writer
    nest: list[Any]
    seen: dict[str, str] = attrs.Factory(dict)
    shared: list[tuple[str, str]] = attrs.Factory(list)

    def text(self, e: Any, above: int = 0, around: int = 1) -> str:
        """The expression; what occurs more often than what it is a part of (`around` times) gets a name."""
        kind, uses = type(e).__name__, self.uses(e)

        def part(inner: Any, rank: int = 0) -> str:
            return self.text(inner, rank, uses)

        rank = 3
        match e:
            case tirx.IntImm() | tirx.FloatImm():
                return repr(e.value)
            case TensorLoad():
                return self.read(e.source, list(e.indices))
            case tirx.Cast():
                text = f"{part(e.value, 3)}.astype(jnp.{e.ty.dtype})"
            case Call() if e.op.name in _CALLS:
                text = f"{_CALLS[e.op.name]}({', '.join(map(part, e.args))})"
            case _ if kind in _FUNCTIONS:
                text = f"{_FUNCTIONS[kind]}({', '.join(map(part, operands(e)))})"
            case _ if kind in _BINARY:
                rank = 1 if kind in ("Add", "Sub") else 2
                text = f"{part(e.a, rank)} {_BINARY[kind]} {part(e.b, rank + (kind in ('Sub', 'Div')))}"
            case _:
                raise CompileError(f"no Pallas source for {e}")
        if uses <= around:
            return f"({text})" if rank < above else text
        if text not in self.seen:
            self.seen[text] = f"value_{len(self.seen)}" if self.seen else "value"
            self.shared.append((self.seen[text], text))
        return self.seen[text]

    def uses(self, e: Any) -> int:
        """How often an equal expression occurs in the value that is computed."""
        statement = self.nest[-1].body

        def count(inner: Any) -> int:
            return int(structural_equal(inner, e)) + sum(count(o) for o in operands(inner))

        return count(statement.value)

    def read(self, buffer: Any, indices: list[Any]) -> str:
        """A buffer's part that the block's loops go over: a row, a column or a whole block."""
        rows, columns = self.nest[-2:]
        sizes = []
        for axis, loop in zip((-2, -1), (rows, columns), strict=True):
            inside = _mentions(indices[axis], loop.loop_var)
            sizes.append(int(loop.extent) if inside else 1)
            indices[axis] = _at_value(indices[axis], loop.loop_var, 0)
        return self.writer._sliced(buffer, indices, (sizes[0], sizes[1]), ref=False)


_LETTERS = "ijlpqstu"


def _multiplied(loop: Any, whole: bool) -> tuple[Zero | Multiply, list[Any]] | None:
    """The instruction inside a nest of unrolled loops, with the loops; whole: all loops around a product count as such."""
    unrolled = []
    inner: Any = loop
    while isinstance(inner, tirx.For) and (whole or inner.kind == tirx.ForKind.UNROLLED):
        unrolled.append(inner)
        inner = inner.body
    found = instruction(inner)
    return (found, unrolled) if unrolled and isinstance(found, (Zero, Multiply)) else None


def _copies(statement: Any) -> Iterator[Copy]:
    for part in parts(statement):
        found = instruction(part)
        if isinstance(found, Copy):
            yield found


def _used(statement: Any) -> Iterator[Region]:
    """Tiles in VMEM that a statement's products and elementwise nests read or write."""
    for part in parts(statement):
        found = instruction(part)
        if isinstance(found, Multiply):
            yield from (found.x, found.w, *found.grid)
        if isinstance(part, tirx.BufferStore):
            yield Region(part.buffer, offset_of(part.buffer, part.indices), 1, 1, 1)
            for load in loads(part.value):
                yield Region(load.source, offset_of(load.source, load.indices), 1, 1, 1)


def _mentions(expression: Any, variable: Any) -> bool:
    return expression.same_as(variable) or any(_mentions(o, variable) for o in operands(expression))


def _at_value(expression: Any, variable: Any, value: int) -> Any:
    """The expression with the variable's value in its place, simplified."""
    if expression.same_as(variable):
        return tirx.IntImm("int32", value)
    inner = operands(expression)
    if not inner or not _mentions(expression, variable):
        return expression
    return bound_analyzer([]).simplify(type(expression)(*(_at_value(o, variable, value) for o in inner)))


def _coefficient(expression: Any, variable: Any) -> int:
    """By how much the expression grows when the variable does, by one."""
    if isinstance(expression, int) or not _mentions(expression, variable):
        return 0
    step = bound_analyzer([]).simplify(_at_value(expression, variable, 1) - _at_value(expression, variable, 0))
    if not isinstance(step, tirx.IntImm):
        raise CompileError(f"{expression} isn't linear in {variable}")
    return int(step)


def _multiple(index: Any) -> int:
    """A number that the index is a multiple of."""
    match index:
        case tirx.IntImm():
            return int(index)
        case tirx.Mul():
            return _multiple(index.a) * _multiple(index.b)
        case tirx.Add() | tirx.Sub():
            return math.gcd(_multiple(index.a), _multiple(index.b))
        case _:
            return 1


def _name(buffer: Any) -> str:
    """A buffer's name in the source."""
    name, scope = str(buffer.name), str(buffer.scope())
    return _hbm(name) if scope == HBM else name.split("_global")[0]


def _hbm(name: str) -> str:
    return f"{name}_hbm"


def _in_memory(*kind: Any) -> tuple[Any, ...]:
    """A shape and dtype as memory holds it: two codes of 4 bits in a byte."""
    *lead, rows, columns, dtype = kind
    return (*lead, -(-rows // 2), columns, "uint8") if dtype == "int4" else kind


def _shape(buffer: Any) -> str:
    return f"({', '.join(str(n) for n in _in_memory(*map(int, buffer.shape), str(buffer.dtype))[:-1])})"


def _dtype(buffer: Any) -> str:
    """A buffer's dtype in kernels, which know float16 as its bits."""
    dtype = str(_in_memory(*buffer.shape, str(buffer.dtype))[-1])
    return "uint16" if dtype == "float16" else dtype


def _arranged(p: Any) -> str:
    """What happens to operands before the kernel: those that it reads in another form."""
    lines = grouped.ordering(p) if p.weights == "int4" else []
    if p.group and p.scales == "float16":
        lines.append(
            "arrays = [lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.float16 else a for a in arrays]"
        )
    return "".join(f"    {line}\n" for line in lines)


def _halves(taken: Any) -> str:
    """Names of two matrices that lie one behind the other, and of their scales and zeros."""
    pairs = [(_hbm(name), _hbm(f"u{name[1:]}")) for name, *_ in taken if name[0] == "w"]
    return "".join(f"    {w}, {u} = {w}.at[0], {w}.at[1]\n" for w, u in pairs)


def _meaning(kind: TensorType) -> str:
    return f"of which {' x '.join(map(str, kind.shape))} are used"


def _title(product: Any) -> str:
    p = product
    text = "x @ w" + " * channel_scale" * p.channel_scale + " * row_scale" * p.row_scale + " + bias" * p.bias
    text = text if p.activation == "none" else f"{p.activation}({text})"
    if p.gated:
        text += " * (x @ u" + " * up_scale" * p.channel_scale + " * row_scale" * p.row_scale + ")"
    text += " + residual" * p.residual
    dtypes = f"{p.dtype} @ {p.weights}" if p.weights != p.dtype else p.dtype
    dtypes += f" in groups of {p.group}" * (p.group > 0) + " with zeros" * p.zeros
    return f"{text}: [{p.m}, {p.k}] @ [{p.k}, {p.n}], {dtypes}, summed in {p.accumulator}, result {p.result}."
