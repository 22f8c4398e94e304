"""What runs beside what in a lowered product: its steps cut into blocks, each of whose results leave when they are there.

TVM's pipeline starts copies of w ahead and says which to wait for; what a step does is a product per matrix, one nest behind them, one copy. Here
a step becomes its tiles' blocks, one after the other: multiply, compute what is behind the sums, start the copy of the results. Copies of
results are waited for two steps later, when their slot is needed again. What is copied once starts in front of all, x by the first step's
blocks of rows: the first one before the weights, and each is waited for where it is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from tvm import sym, tirx

from jisu.targets.tpu.tiles import Block, Tiles
from jisu.targets.tpu.walk import (
    COMMIT,
    WAIT,
    Copy,
    Multiply,
    Region,
    Zero,
    commit,
    flat,
    instruction,
    parts,
    rebuild,
    statement,
    substitute,
    wait,
)

LOAD, ONCE, STORE = 0, 1, 2
"""Queues of copies: of what each step needs, of what is needed once before, of results."""


def overlap(body: Any, tiles: Tiles, matrices: int) -> Any:
    """The body with its steps in blocks, and with all its copies asynchronous; matrices: by how many x is multiplied."""

    def visit(s: Any) -> Any:
        if not isinstance(s, tirx.SeqStmt) or not any(_stores(part) for part in s.seq):
            return None
        return _Flow(tiles, matrices).sequence(list(s.seq))

    return rebuild(body, visit)


def _stores(s: Any) -> bool:
    found = instruction(s)
    return isinstance(found, Copy) and found.to.in_hbm


def _loads(s: Any) -> bool:
    found = instruction(s)
    return isinstance(found, Copy) and not found.to.in_hbm


@attrs.frozen(eq=False)
class _Step:
    """A step of a pipeline, its first block's first instruction and first elements standing for all of them.

    before: statements that nothing is awaited for. zeroed: whether its sums begin at zero. awaited: the queue that is waited for in front of its
    products, and how many groups of copies may be under way. behind: the variables of a row and a column, and what is computed of that
    element's sums.
    """

    before: tuple[Any, ...]
    zeroed: bool
    awaited: tuple[int, int] | None
    products: tuple[Multiply, ...]
    behind: tuple[Any, Any, Any]
    store: Copy

    @classmethod
    def parsed(cls, found: Sequence[Any]) -> _Step:
        """Of statements that hold products, and end with the nest behind them and the copy of results."""
        *computed, behind, store = found
        products = [s for s in computed if _first_product(s) is not None]
        # The first wait is for all that a step loads.
        waits = [s for s in products if isinstance(s, tirx.AttrStmt) and s.attr_key == WAIT]
        awaited = (int(waits[0].value), int(waits[0].body.value)) if waits else None
        others = [s for s in computed if _first_product(s) is None]
        before = [s for s in others if not _zeroes(s)]
        multiplies, copy = [m for m in map(_first_product, products) if m is not None], instruction(store)
        assert isinstance(copy, Copy)
        loops = []
        while isinstance(behind, tirx.For):
            loops.append(behind)
            behind = behind.body
        *outer, i, j = loops
        for loop in outer:
            behind = substitute(behind, loop.loop_var, 0)
        zeroed = len(before) < len(others)
        return cls(tuple(before), zeroed, awaited, tuple(multiplies), (i.loop_var, j.loop_var, behind), copy)

    @property
    def slotted(self) -> bool:
        """Whether results alternate between slots."""
        return len(self.store.source.buffer.shape) > 2


def _zeroes(s: Any) -> bool:
    return any(isinstance(instruction(part), Zero) for part in parts(s))


def _first_product(s: Any) -> Multiply | None:
    """The first instruction of a nest that multiplies, with its loops' first values; None for other statements."""
    first = next((p for p in parts(s) if isinstance(instruction(p), Multiply)), None)
    if first is None:
        return None
    for loop in parts(s):
        if isinstance(loop, tirx.For):
            first = substitute(first, loop.loop_var, 0)
    found = instruction(first)
    assert isinstance(found, Multiply)
    return found


def _moved(region: Region, row: Any, rows: int, column: Any, columns: int) -> Region:
    offset = sym.Analyzer().simplify(region.offset + row * region.stride + column)
    return Region(region.buffer, offset, rows, columns, region.stride)


def _loop(name: str, count: int, kind: Any, body: Any) -> Any:
    """A loop over body(variable), or body(0) where there is one turn."""
    if count == 1:
        return body(tirx.IntImm("int32", 0))
    variable = tirx.Var(name, "int32")
    return tirx.For(variable, tirx.IntImm("int32", 0), tirx.IntImm("int32", count), kind, body(variable))


@attrs.define
class _Flow:
    """Writes a sequence anew."""

    tiles: Tiles
    matrices: int
    groups: list[int] = attrs.Factory(list)  # of copies of results: how many each step so far has

    def sequence(self, found: list[Any]) -> Any:
        ahead, steps = self.steps(found)
        memory, once = [s for s in ahead if isinstance(s, tirx.AllocBuffer)], [s for s in ahead if _loads(s)]
        ahead = [s for s in ahead if not isinstance(s, tirx.AllocBuffer) and not _loads(s)]
        end = len(steps) - 1
        groups = self.once(once, steps[0][1], self.tiles.blocks(first=True, last=end == 0))
        # The first block of rows of x, the first weights, the other rows, the other weights.
        begun = 1 if ahead and isinstance(ahead[0], tirx.AttrStmt) and ahead[0].attr_key == COMMIT else 0
        done = [*memory, *groups[:1], *ahead[:begun], *groups[1:], *ahead[begun:]]
        for number, (loop, step) in enumerate(steps):
            one_by_one = self.tiles.blocks(first=number == 0, last=number == end) if number in (0, end) else []
            body = self.step(step, one_by_one, len(groups) if number == 0 else 0)
            done.append(body if loop is None else tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body))
        return flat([*done, wait(STORE, 0, tirx.Evaluate(0))])

    def steps(self, found: list[Any]) -> tuple[list[Any], list[tuple[Any, _Step]]]:
        """The statements in front of all steps, with copies that stand between a product and what reads them; and the steps, with the loop
        around those that are in one. The first two are peeled off a loop: before them, no results are under way."""
        ahead: list[Any] = []
        steps: list[tuple[Any, _Step]] = []
        here: list[Any] = []
        for s in found:
            if isinstance(s, tirx.For) and isinstance(s.body, tirx.SeqStmt) and any(map(_stores, s.body.seq)):
                ahead, here = here, []
                first, count = int(s.min), int(s.extent)
                peeled = 2 if count > 3 else count
                turns = [substitute(s.body, s.loop_var, first + turn) for turn in range(peeled)]
                steps += [(None, _Step.parsed(turn.seq)) for turn in turns]
                if count > peeled:
                    loop = tirx.For(s.loop_var, first + peeled, count - peeled, s.kind, s.body)
                    steps.append((loop, _Step.parsed(s.body.seq)))
                continue
            here.append(s)
            if _stores(s):
                if not steps:
                    own, size = [h for h in here if not _loads(h)], 2 * self.matrices + 1
                    size += len(own) > size and _zeroes(own[-size - 1])
                    ahead, here = [h for h in here if _loads(h)] + own[:-size], own[-size:]
                steps.append((None, _Step.parsed(here)))
                here = []
        return ahead, steps

    def once(self, copies: list[Any], step: _Step, blocks: list[Block]) -> list[Any]:
        """What is copied once, in groups: the first block of rows of x and all that isn't x, then x's other blocks of rows."""
        whole = {c.to.buffer: c for c in map(instruction, copies) if isinstance(c, Copy)}
        x = whole.pop(step.products[0].x.buffer, None)
        groups: list[list[Any]] = [[]]
        if x is not None:
            rows = dict.fromkeys((b.row, b.rows) for b in blocks)
            pieces = [Copy(*(_moved(r, row, count, 0, r.columns) for r in (x.to, x.source))) for row, count in rows]
            groups = [[statement(piece)] for piece in pieces]
        groups[0] += [statement(copy) for copy in whole.values()]
        return [commit(ONCE, flat(group)) for group in groups if group]

    def step(self, step: _Step, blocks: Sequence[Block] = (), once: int = 0) -> Any:
        """A step; blocks: in which it is done, if not in a loop; once: groups of copies that are needed once, under way until it begins."""
        done: list[Any] = []
        if blocks:
            row = -1
            for block in blocks:
                if block.row != row and once:
                    once, row = once - 1, block.row
                    done.append(wait(ONCE, once, tirx.Evaluate(0)))
                done.append(self.block(step, block.row, block.rows, block.column, block.columns))
        else:
            done.append(self.loops(step))
        body = flat(done)
        if step.awaited is not None:
            body = wait(*step.awaited, body)
        if step.slotted and len(self.groups) > 1:
            body = wait(STORE, self.groups[-1], body)
        self.groups.append(len(blocks) or len(self.tiles.blocks()))
        return flat([*step.before, body])

    def loops(self, step: _Step) -> Any:
        """All blocks of a step, in loops."""
        t = self.tiles
        return _loop(
            "rows", t.m // t.rows, tirx.ForKind.SERIAL,
            lambda i: _loop(
                "columns", t.n // t.columns, tirx.ForKind.SERIAL,
                lambda j: self.block(step, i * t.rows, t.rows, j * t.columns, t.columns),
            ),
        )  # fmt: skip

    def block(self, step: _Step, row: Any, rows: int, column: Any, columns: int) -> Any:
        """Multiply, compute what is behind the sums, start the copy of the results."""
        n, k = self.tiles.unit

        def multiply(p: Multiply, outer: Any, across: Any, inner: Any) -> Any:
            depth, to = outer * self.tiles.inner + inner * k, column + across * n
            sums, x = _moved(p.sums, row, rows, to, n), _moved(p.x, row, rows, depth, k)
            grid = tuple(_moved(g, tirx.floordiv(depth, p.group), g.rows, to, n) for g in p.grid)
            return statement(Multiply(sums, x, _moved(p.w, depth, k, to, n), p.group, grid))

        t = self.tiles

        def piece(p: Multiply, outer: Any, number: int) -> Any:
            # What is multiplied at once is unrolled: consumers may take these loops as one product.
            at_once, begin = tirx.ForKind.UNROLLED, outer * (t.turn // t.inner) + number
            return _loop(
                "across", columns // n, at_once,
                lambda a: _loop("inner", t.inner // k, at_once, lambda i: multiply(p, begin, a, i)),
            )  # fmt: skip

        products = []
        for p in step.products:
            if step.zeroed:
                products.append(statement(Zero(_moved(p.sums, row, rows, column, columns))))
            # Pieces of a turn follow one another: the matrix units run through.
            products.append(
                _loop(
                    "outer", t.k // t.turn, tirx.ForKind.SERIAL,
                    lambda o, p=p: flat([piece(p, o, number) for number in range(t.turn // t.inner)]),
                )
            )  # fmt: skip
        i, j, element = step.behind
        variables = tirx.Var("i", "int32"), tirx.Var("j", "int32")
        for variable, new, first in ((i, variables[0], row), (j, variables[1], column)):
            element = substitute(element, variable, new + first)
        for variable, count in ((variables[1], columns), (variables[0], rows)):
            element = tirx.For(
                variable, tirx.IntImm("int32", 0), tirx.IntImm("int32", count), tirx.ForKind.SERIAL, element
            )
        store = Copy(*(_moved(r, row, rows, column, columns) for r in (step.store.to, step.store.source)))
        return flat([*products, element, commit(STORE, statement(store))])
