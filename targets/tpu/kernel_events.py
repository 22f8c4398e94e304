"""Lowered TIR as the timing model's events: what runs through LLVM and becomes Pallas source is also what is timed.

Each copy, wait, product and epilogue of the TIR is an event, each queue of copies a semaphore, each slot of a buffer a buffer of its own. A nest
of loops over the matrix unit's instructions is one product per block of sums, as they stream through it without a pause; where weights are
widened on their way, that is an operation of the vector unit per number (libtpu 0.0.42.1 estimates at most 0.9 cycles per register for 8 rows
of bfloat16 by 4096 x 4096 of int8 on v5e). Zeroing is no event: the model counts the first partial sums of a product as being added, too.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import attrs
from tvm import tirx
from tvm.ir import Call

from jisu.compiler.errors import CompileError
from jisu.targets.tpu import grouped, walk
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.events import ACC, HBM, VMEM, Allocate, Copy, Event, Free, Matmul, Vector, Wait
from jisu.targets.tpu.product import Lowered
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.tiles import Tiles, bytes_in_vmem
from jisu.targets.tpu.walk import COMMIT, INFLIGHT, WAIT, Multiply, Region, Zero, elementwise, instruction, parts

Env = dict[Any, int]
"""Values of loops' variables."""
Number = Callable[[Env], int]
Part = Callable[[Env], Iterator[Event]]

AT_ONCE = "at once"
"""The semaphore of copies that belong to no queue: they are waited for where they are started."""

COSTLY = ("exp", "tanh", "erf", "sigmoid", "pow", "log", "sqrt")
"""Functions that count as the vector unit's "exp"."""


def events_of(lowered: Lowered, *, prefetched: Collection[str] = ()) -> Iterator[Event]:
    """The events of a lowered product, in program order, for `simulate`.

    prefetched: operands that are in VMEM, whole, when the kernel starts; their copies are left out. CompileError: a statement that isn't
    understood.
    """
    walker = _Walker(lowered.chip, lowered.tiles, lowered.product, frozenset(prefetched))
    for operand in lowered.operands:
        if operand.name in walker.prefetched:
            size = itemsize(operand.dtype)
            yield Allocate(operand.name, bytes_in_vmem(*operand.padded, size, lowered.chip))
    yield from walker.part(lowered.function.body)({})


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Div": operator.floordiv,
    "Mod": operator.mod,
    "Min": min,
    "Max": max,
}


def number(expression: Any) -> Number:
    """An index expression as a function of loops' variables; none of them is negative."""
    if isinstance(expression, int):
        return lambda env: expression
    if isinstance(expression, tirx.IntImm):
        value = int(expression.value)
        return lambda env: value
    if isinstance(expression, tirx.Var):
        return lambda env: env[expression]
    if isinstance(expression, tirx.Cast):
        return number(expression.value)
    apply = OPERATIONS.get(type(expression).__name__)
    if apply is None:
        raise CompileError(f"the timing walk can't evaluate the index {expression}")
    a, b = number(expression.a), number(expression.b)
    return lambda env: apply(a(env), b(env))


@attrs.define
class _Walker:
    """Makes of each statement a function from loops' variables to its events, once; state is which copies are under way."""

    chip: Chip
    tiles: Tiles
    product: Product
    prefetched: frozenset[str]
    queue: str | None = None
    open: int = 0
    interrupted: bool = True  # whether the next product begins behind a wait or a loop
    groups: dict[str, deque[int]] = attrs.Factory(dict)

    def part(self, s: Any) -> Part:
        match s:
            case tirx.SeqStmt():
                return self._sequence([self.part(p) for p in s.seq], [p for p in s.seq if self._allocates(p)])
            case tirx.AllocBuffer():
                return self._allocation(s.buffer)
            case tirx.AttrStmt() if s.attr_key == COMMIT:
                return self._group(_queue(s.value), self.part(s.body))
            case tirx.AttrStmt() if s.attr_key == WAIT:
                if s.body.attr_key != INFLIGHT:
                    raise CompileError(f"a wait without its count of copies under way: {s}")
                return self._wait(_queue(s.value), int(s.body.value), self.part(s.body.body))
            case tirx.AttrStmt():
                return self.part(s.body)
            case tirx.For() if elementwise(s):
                return self._vectors(s)
            case tirx.For() if _multiplies(s):
                return self._products(s)
            case tirx.For():
                return self._loop(s.loop_var, number(s.min), number(s.extent), self.part(s.body))
            case tirx.Evaluate() if isinstance(s.value, tirx.IntImm):
                return lambda env: iter(())
        found = instruction(s)
        match found:
            case walk.Copy():
                return self._copy(found)
            case Zero() | Multiply():
                return self._products(s)
        raise CompileError(f"the timing walk doesn't know the statement {s}")

    @staticmethod
    def _allocates(s: Any) -> bool:
        return isinstance(s, tirx.AllocBuffer)

    def _sequence(self, found: list[Part], allocated: list[Any]) -> Part:
        names = [name for a in allocated for name, _ in self._slots(a.buffer)]

        def events(env: Env) -> Iterator[Event]:
            for part in found:
                yield from part(env)
            yield from map(Free, names)

        return events

    def _loop(self, variable: Any, first: Number, count: Number, body: Part) -> Part:
        def events(env: Env) -> Iterator[Event]:
            begin = first(env)
            for turn in range(begin, begin + count(env)):
                self.interrupted = True
                yield from body({**env, variable: turn})
            self.interrupted = True

        return events

    def _slots(self, buffer: Any) -> list[tuple[str, int]]:
        """Names of a buffer's slots with their bytes; none where it holds tiles of a prefetched operand."""
        name, (*slots, rows, columns) = _name(buffer), (int(n) for n in buffer.shape)
        if name in self.prefetched:
            return []
        size = bytes_in_vmem(rows, columns, itemsize(str(buffer.dtype)), self.chip)
        return [(f"{name}[{slot}]", size) for slot in range(math.prod(slots))]

    def _allocation(self, buffer: Any) -> Part:
        # No chip before v7x tells of accumulators of its own: sums are tiles of VMEM.
        found = [Allocate(name, size) for name, size in self._slots(buffer)]
        return lambda env: iter(found)

    def _group(self, queue: str, body: Part) -> Part:
        def events(env: Env) -> Iterator[Event]:
            self.queue, self.open = queue, 0
            yield from body(env)
            self.groups.setdefault(queue, deque()).append(self.open)
            self.queue = None

        return events

    def _wait(self, queue: str, inflight: int, body: Part) -> Part:
        def events(env: Env) -> Iterator[Event]:
            groups = self.groups.setdefault(queue, deque())
            while len(groups) > inflight:
                count = groups.popleft()
                self.interrupted = self.interrupted or count > 0
                yield from [Wait(queue)] * count
            yield from body(env)

        return events

    def _copy(self, copy: walk.Copy) -> Part:
        vmem = copy.vmem
        if _name(vmem.buffer) in self.prefetched:
            return lambda env: iter(())
        nbytes = int(vmem.rows * vmem.columns * itemsize(str(vmem.buffer.dtype)))
        parts_of, stores = self._parts(vmem), copy.to.in_hbm

        def events(env: Env) -> Iterator[Event]:
            semaphore, names = self.queue or AT_ONCE, parts_of(env)
            if stores:
                yield Copy(nbytes, VMEM, HBM, semaphore, reads=names)
            else:
                yield Copy(nbytes, HBM, VMEM, semaphore, writes=names)
            if self.queue is None:
                yield Wait(AT_ONCE)
            else:
                self.open += 1

        return events

    def _parts(self, region: Region) -> Callable[[Env], tuple[str, ...]]:
        """The names of the parts of a slot that a region lies in: those of rows where x is copied and multiplied by blocks of them, of rows and
        columns where results and sums are; of other buffers the whole."""
        name, offset = _name(region.buffer), number(region.offset)
        height, width = (int(n) for n in region.buffer.shape[-2:])
        if name in self.prefetched:
            return lambda env: (name,)
        cut = name == "result" or str(region.buffer.scope()) == ACC
        rows = math.gcd(self.tiles.rows, *self.tiles.head) if name == "x" or cut else height
        columns = self.tiles.unit[0] if cut else width
        known: dict[int, tuple[str, ...]] = {}

        def names(env: Env) -> tuple[str, ...]:
            begin = offset(env)
            if begin not in known:
                slot, inside = divmod(begin, height * width)
                row, column = divmod(inside, width)
                down = range(row // rows, -(-(row + region.rows) // rows))
                across = range(column // columns, -(-(column + region.columns) // columns))
                whole = rows == height and columns == width
                known[begin] = tuple(f"{name}[{slot}]" + f" {i}, {j}" * (not whole) for i in down for j in across)
            return known[begin]

        return names

    def _products(self, nest: Any) -> Part:
        """One product per block of sums, of the sizes that the instructions in a nest of loops add up to."""
        instructions = _instructions(nest)
        inner = {loop.loop_var: 0 for loop in parts(nest) if isinstance(loop, tirx.For)}
        first = next((m for m in map(instruction, parts(nest)) if isinstance(m, Multiply)), None)
        if first is None:
            return lambda env: iter(())
        loops = [p for p in parts(nest) if isinstance(p, tirx.For) and p.kind == tirx.ForKind.SERIAL]
        # Where scales are applied group by group, all is one stretch.
        counted = 1 if self.product.group else math.prod(int(loop.extent) for loop in loops)
        x, sums = self._parts(first.x), number(first.sums.offset)
        weights = [self._parts(r) for r in (first.w, *first.grid)]
        known: dict[
            int, list[tuple[Callable[[Env], tuple[str, ...]], int, int, int]]
        ] = {}  # outer loops choose slots and the first block, no more

        def events(env: Env) -> Iterator[Event]:
            outer = {**env, **inner}
            held = tuple(name for part in weights for name in part(outer))
            reads, begin = (*x(outer), *held), sums(outer)
            if begin not in known:
                known[begin] = self._blocks(instructions(env))
            turns = counted // len(known[begin])  # of each block
            for block, m, k, n in known[begin]:
                stack, operations = self._before(m, k, n)
                fills = turns if turns > 1 else int(self.interrupted)
                self.interrupted = counted > 1
                for op, count in operations.items():
                    if count:
                        yield Vector(count, self.product.dtype, op, held)
                yield Matmul(m, k, n, self.product.dtype, reads, block(outer), stack, fills)

        return events

    def _before(self, m: int, k: int, n: int) -> tuple[int, dict[str, int]]:
        """How often a row is streamed, and what the vector unit does with weights before they are multiplied."""
        p = self.product
        if not p.group:
            return 1, {"element": k * n * p.widens}
        how = grouped.Grouped(p, m, grouped.depth(self.chip, k))
        return how.stack, how.operations(m, k, n)

    def _blocks(self, instructions: Iterable[tuple[Multiply, int, int, int]]) -> list[tuple[Any, int, int, int]]:
        """(names of sums, m, k, n) of the blocks that instructions make up, in their order."""
        found: dict[int, tuple[Multiply, set[int], set[int], set[int]]] = {}
        for multiply, *offsets in instructions:
            block = self._block_of(offsets[0], int(multiply.sums.buffer.shape[-1]))
            _, *tiles = found.setdefault(block, (multiply, set(), set(), set()))
            for seen, offset in zip(tiles, offsets, strict=True):
                seen.add(offset)
        blocks = []
        for multiply, *tiles in found.values():
            # Sums are m x n tiles, x is m x k, w k x n: three numbers that are known for three that aren't.
            sums, x, w = map(len, tiles)
            m = math.isqrt(sums * x // w)
            rows, columns = m * multiply.sums.rows, sums // m * multiply.sums.columns
            whole = attrs.evolve(multiply.sums, offset=min(tiles[0]), rows=rows, columns=columns)
            blocks.append((self._parts(whole), rows, x // m * multiply.x.columns, columns))
        return blocks

    def _block_of(self, offset: int, width: int) -> int:
        row, column = divmod(offset, width)
        return row // self.tiles.rows * (width // self.tiles.columns) + column // self.tiles.columns

    def _vectors(self, nest: Any) -> Part:
        """An epilogue per block of sums, and what it computes beyond scaling."""
        loops = []
        while isinstance(nest, tirx.For):
            loops.append(nest)
            nest = nest.body
        read = list(walk.loads(nest.value))
        rows, columns = (int(loop.extent) for loop in loops[-2:])
        outer, inner = loops[:-2], {loop.loop_var: 0 for loop in loops[-2:]}
        sources = [self._elements(load.source, load.indices, loops[-2:]) for load in read]
        target = self._elements(nest.buffer, nest.indices, loops[-2:])
        dtype, size = str(nest.buffer.dtype), rows * columns
        adds, costly = _work(nest.value)

        def events(env: Env) -> Iterator[Event]:
            for here in _turns(outer, env):
                here = {**here, **inner}
                reads, writes = tuple(dict.fromkeys(name for names in sources for name in names(here))), target(here)
                for turns, op in ((1, "result"), (adds, "element"), (costly, "exp")):
                    if turns:
                        yield Vector(size * turns, dtype, op, reads, writes)

        return events

    def _elements(self, buffer: Any, indices: Any, loops: list[Any]) -> Callable[[Env], tuple[str, ...]]:
        """The names of what a nest's two innermost loops go over in a buffer."""
        rows, columns = (
            int(loop.extent) if int(whole) > 1 else 1 for loop, whole in zip(loops, buffer.shape[-2:], strict=True)
        )
        return self._parts(Region(buffer, walk.offset_of(buffer, indices), rows, columns, int(buffer.shape[-1])))


def _name(buffer: Any) -> str:
    return str(buffer.name).partition("_global")[0]


def _queue(value: Any) -> str:
    return f"queue {int(value)}"


def _multiplies(nest: Any) -> bool:
    """Whether a nest of loops does nothing but zero sums and multiply."""
    leaves = [p for p in parts(nest) if not isinstance(p, tirx.For | tirx.SeqStmt)]
    return all(isinstance(instruction(p), Zero | Multiply) for p in leaves)


def _turns(loops: list[Any], env: Env) -> Iterator[Env]:
    if not loops:
        yield env
        return
    loop, *rest = loops
    first = number(loop.min)(env)
    for turn in range(first, first + number(loop.extent)(env)):
        yield from _turns(rest, {**env, loop.loop_var: turn})


def _instructions(nest: Any) -> Callable[[Env], Iterator[tuple[Multiply, int, int, int]]]:
    """The products in a nest, in order, with the offsets of their sums, x and w."""
    match nest:
        case tirx.SeqStmt():
            found = [_instructions(part) for part in nest.seq]
            return lambda env: (one for part in found for one in part(env))
        case tirx.For():
            body = _instructions(nest.body)
            return lambda env: (one for here in _turns([nest], env) for one in body(here))
    multiply = instruction(nest)
    if not isinstance(multiply, Multiply):
        return lambda env: iter(())
    sums, x, w = (number(region.offset) for region in (multiply.sums, multiply.x, multiply.w))
    return lambda env: iter(((multiply, sums(env), x(env), w(env)),))


def _work(value: Any) -> tuple[int, int]:
    """How many operations an expression has beyond two scales, and how many costly functions; what it names twice is computed once."""
    simple = costly = 0
    pending, seen = [value], set()
    while pending:
        e = pending.pop()
        if (text := str(e)) in seen:
            continue
        seen.add(text)
        pending += walk.operands(e)
        if isinstance(e, Call):
            costly += any(name in str(e.op.name) for name in COSTLY)
        elif type(e).__name__ in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
            simple += 1
    return max(simple - 2, 0), costly
