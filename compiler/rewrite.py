"""Rewriting: a rule is a pattern, guards and a replacement, all data; `rewrite` applies rules to a fixed point.

A pattern is written in the graph's own syntax by calling ops on variables:

    x, w, b = variables("x w b")
    product = linear(x, w)
    Rule("bias joins linear", match=add(product, b), replace=linear(x, w, b), where=(used_once(product), rank_is(b, 1)))

In patterns an attribute may be `bind("eps")`, which binds whatever stands there; a Python number matches a scalar
constant of that value; `scalar("c")` binds a scalar constant's value; `maybe(op, x)` matches with or without the op;
`either(p, q)` matches one of two. Attributes of a replacement may be functions of the match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler.errors import JisuError
from jisu.compiler.graph import CONSTANT, WEIGHT, Graph, Node, Op, _leaf
from jisu.compiler.types import TypeRuleError, same_type

VARIABLE = _leaf("variable", "Matches any value and binds it.", "name", "optional")
SCALAR = _leaf("scalar", "Matches a scalar constant and binds its value.", "name")
LITERAL = _leaf("literal", "Matches a scalar constant of one value.", "value")
EITHER = _leaf("either", "Matches one of several patterns.")


class RewriteError(JisuError, RuntimeError):
    """A rule broke a promise (another type, no termination); the message names it."""


@attrs.frozen
class Bind:
    """An attribute in a pattern that binds whatever stands there; in a replacement it gives the bound value."""

    name: str

    def __call__(self, match: Match) -> Any:
        return match[self.name]


def bind(name: str) -> Any:
    """An attribute that binds (in a pattern) or gives back (in a replacement) the value called `name`."""
    return Bind(name)


def variable(name: str, *, optional: bool = False) -> Node:
    """A pattern that matches any value; with `optional`, also an absent operand."""
    return Node(VARIABLE, (), {"name": name, "optional": optional}, None)


def variables(names: str) -> tuple[Node, ...]:
    """Several variables: `x, w = variables("x w")`."""
    return tuple(variable(name) for name in names.split())


def scalar(name: str) -> Node:
    """A pattern that matches a constant of rank 0 and binds its value as a Python number."""
    return Node(SCALAR, (), {"name": name}, None)


def literal(value: float) -> Node:
    """A pattern that matches a constant of rank 0 equal to `value` (in the constant's dtype)."""
    return Node(LITERAL, (), {"value": value}, None)


def either(*patterns: Node) -> Node:
    """A pattern that matches where one of `patterns` does, tried in order."""
    return Node(EITHER, patterns, {}, None)


def maybe(op: Op, x: Node, **attributes: Any) -> Node:
    """A pattern that matches `op(x)` or plain `x`."""
    return either(op(x, **attributes), x)


@attrs.frozen(eq=False)
class Match:
    """A successful match: what names are bound to, and which node each part of the pattern matched."""

    root: Node
    bindings: Mapping[str, Any]
    parts: Mapping[Node, Node]
    uses: Callable[[Node], int]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def at(self, pattern: Node) -> Node:
        """The node that a part of the pattern (or a variable) matched."""
        if pattern.op is VARIABLE:
            return self.bindings[pattern.name]  # type: ignore[no-any-return]
        return self.parts[pattern]

    def get(self, pattern: Node) -> Node | None:
        """As `at`, but None for a part of an `either` that was not taken or an absent operand."""
        return self.bindings.get(pattern.name) if pattern.op is VARIABLE else self.parts.get(pattern)


@attrs.frozen
class Guard:
    """A condition beside the pattern: `check(match)` returns None, or a sentence why the rule does not apply."""

    name: str
    check: Callable[[Match], str | None] = attrs.field(repr=False)


def guard(name: str, condition: Callable[[Match], bool]) -> Guard:
    """A guard that refuses with "needs <name>" where `condition` is false."""
    return Guard(name, lambda m: None if condition(m) else f"needs {name}")


def used_once(*parts: Node) -> Guard:
    """The parts have no other user and are no outputs: otherwise they would be computed twice."""

    def check(match: Match) -> str | None:
        for part in parts:
            node = match.get(part)
            if node is not None and match.uses(node) > 1:
                return f"{node.op.name} has {match.uses(node)} uses, fusing it would compute it again"
        return None

    return Guard("inner values used once", check)


def rank_is(part: Node, rank: int) -> Guard:
    """The part has this rank."""
    return guard(f"rank {rank}", lambda m: m.at(part).rank == rank)


def dtype_in(part: Node, *dtypes: str) -> Guard:
    """The part has one of these dtypes."""
    return guard(f"dtype {' or '.join(dtypes)}", lambda m: m.at(part).dtype in dtypes)


def is_constant(part: Node) -> Guard:
    """The part is a weight or a constant."""
    return guard("a weight or constant", lambda m: m.at(part).op in (WEIGHT, CONSTANT))


@attrs.frozen(eq=False)
class Rule:
    """One rewrite, as data.

    name: said in `explain`, dumps and errors. match: the pattern. replace: a pattern over the same variables, or a
    function of the match that returns a node (None: does not apply after all). where: guards. types: how the test kit
    draws each variable (below). attributes: sample values for what `bind` and `scalar` bind, drawn independently.

    A drawn type is written "float[*b k]". `float`, `int` and `any` are one dtype per draw (a name such as int64 is
    itself). Letters are sizes from 1 to 5, or symbols, equal wherever they stand; `*b` is up to two leading axes; numbers
    and sums such as 2*k are what they say. `k?` may be 1 instead, `*b?` may miss leading axes or have some of size 1, as
    broadcasting allows. A word in front says what the value is: "weight float[n k]", "constant float[4]", or
    "broadcast float[*b k]" (an explicit broadcast to that type). A variable without type is "float[*b? k?]", and an
    optional one without type absent.
    """

    name: str
    match: Node
    replace: Node | Callable[[Match], Node | None]
    where: Sequence[Guard] = ()
    types: Mapping[str, str] = attrs.field(factory=dict)
    attributes: Mapping[str, Sequence[Any]] = attrs.field(factory=dict)

    def __repr__(self) -> str:
        return f"<rule {self.name!r}>"


def scalar_value(node: Node) -> float | int | bool | None:
    """The value of a constant of one element, else None."""
    if node.op is CONSTANT and node.value.array.size == 1:
        item = (
            node.value.array.reshape(()).item()
            if node.value.array.dtype.kind in "biuf"
            else float(node.value.array.reshape(()))
        )
        return item  # type: ignore[no-any-return]
    return None


def _matches(
    pattern: Node | None, node: Node | None, bindings: dict[str, Any], parts: dict[Node, Node]
) -> Iterator[tuple[dict[str, Any], dict[Node, Node]]]:
    """All ways in which `pattern` matches `node`, extending bindings and parts."""
    if pattern is None or node is None:
        if pattern is None and node is None:
            yield bindings, parts
        elif node is None and pattern is not None and pattern.op is VARIABLE and pattern.optional:
            yield {**bindings, pattern.name: None}, parts
        return
    if pattern.op is VARIABLE:
        bound = bindings.get(pattern.name, node)
        if bound is node or (bound is not None and _same_leaf(bound, node)):
            yield {**bindings, pattern.name: bound}, parts
    elif pattern.op is EITHER:
        for choice in pattern.operands:
            yield from _matches(choice, node, bindings, parts)
    elif pattern.op in (SCALAR, LITERAL):
        value = scalar_value(node)
        if value is None or node.rank:
            return
        if pattern.op is SCALAR:
            if bindings.get(pattern.name, value) == value:
                yield {**bindings, pattern.name: value}, {**parts, pattern: node}
        elif np.asarray(pattern.value).astype(node.value.array.dtype) == node.value.array.reshape(()):
            yield bindings, {**parts, pattern: node}
    elif pattern.op is node.op and len(pattern.operands) == len(node.operands):
        attributes = _match_attributes(pattern, node, bindings)
        if attributes is not None:
            yield from _match_operands(pattern, node, attributes, parts)


def _same_leaf(a: Node, b: Node) -> bool:
    return a.op is b.op and a.op in (CONSTANT, WEIGHT) and a.attributes == b.attributes and a.type == b.type


def _match_attributes(pattern: Node, node: Node, bindings: dict[str, Any]) -> dict[str, Any] | None:
    found = dict(bindings)
    for key, want in pattern.attributes.items():
        have = node.attributes[key]
        if isinstance(want, Bind):
            if want.name in found and found[want.name] != have:
                return None
            found[want.name] = have
        elif want != have or isinstance(want, bool) != isinstance(have, bool):
            return None
    return found


def _match_operands(
    pattern: Node, node: Node, bindings: dict[str, Any], parts: dict[Node, Node]
) -> Iterator[tuple[dict[str, Any], dict[Node, Node]]]:
    orders: list[tuple[Node | None, ...]] = [node.operands]
    if pattern.op.commutative and len(node.operands) == 2 and node.operands[0] is not node.operands[1]:
        orders.append(node.operands[::-1])
    for operands in orders:
        states = iter([(bindings, {**parts, pattern: node})])
        for sub, operand in zip(pattern.operands, operands, strict=True):
            states = _advance(states, sub, operand)
        yield from states


def _advance(
    states: Iterator[tuple[dict[str, Any], dict[Node, Node]]], pattern: Node | None, node: Node | None
) -> Iterator[tuple[dict[str, Any], dict[Node, Node]]]:
    for bindings, parts in states:
        yield from _matches(pattern, node, bindings, parts)


def match(pattern: Node, node: Node, uses: Callable[[Node], int] = lambda _: 1) -> Iterator[Match]:
    """All matches of `pattern` rooted at `node`; `uses` tells how often a node is used (outputs count)."""
    for bindings, parts in _matches(pattern, node, {}, {}):
        yield Match(node, bindings, parts, uses)


def instantiate(template: Node, match: Match) -> Node:
    """Build a replacement from its template: variables give their nodes, functions in attributes are called."""
    if template.op is VARIABLE:
        return match[template.name]  # type: ignore[no-any-return]
    operands: list[Any] = []
    for operand in template.operands:
        if operand is not None and operand.op is VARIABLE and operand.optional and match[operand.name] is None:
            operands.append(None)
        elif operand is not None and operand.op is LITERAL:
            operands.append(operand.value)
        elif operand is not None and operand.op is SCALAR:
            operands.append(match[operand.name])
        else:
            operands.append(instantiate(operand, match) if operand is not None else None)
    attributes = {k: v(match) if callable(v) else v for k, v in template.attributes.items()}
    return template.op.make(operands, attributes, match.root.source)


def apply(rule: Rule, node: Node, uses: Callable[[Node], int] = lambda _: 1) -> tuple[Node | None, list[str]]:
    """Try a rule at one node: the replacement (or None) and the reasons of guards that refused a match."""
    refused: list[str] = []
    for found in match(rule.match, node, uses):
        reasons = [reason for g in rule.where if (reason := g.check(found)) is not None]
        if reasons:
            refused += reasons
            continue
        try:
            new = rule.replace(found) if not isinstance(rule.replace, Node) else instantiate(rule.replace, found)
        except TypeRuleError as error:
            raise RewriteError(f"rule {rule.name!r} builds an ill-typed replacement for {node!r}: {error}") from error
        if new is None:
            continue
        if not same_type(new.type, node.type):
            raise RewriteError(f"rule {rule.name!r} replaces {node.type} by {new.type} at {node!r}")
        return new, refused
    return None, refused


@attrs.define
class Trace:
    """What a run of the rewriter did: how often each rule fired, and why near misses were refused."""

    fired: dict[str, int] = attrs.field(factory=dict)
    refused: dict[str, dict[str, int]] = attrs.field(factory=dict)

    def note(self, rule: Rule, new: Node | None, reasons: Iterable[str]) -> None:
        """Record one attempt."""
        if new is not None:
            self.fired[rule.name] = self.fired.get(rule.name, 0) + 1
        for reason in reasons:
            counts = self.refused.setdefault(rule.name, {})
            counts[reason] = counts.get(reason, 0) + 1


def _root_ops(pattern: Node) -> Iterator[Op]:
    if pattern.op is EITHER:
        for choice in pattern.operands:
            assert choice is not None
            yield from _root_ops(choice)
    else:
        yield pattern.op


def rewrite(graph: Graph, rules: Iterable[Rule], *, trace: Trace | None = None, max_sweeps: int = 64) -> Graph:
    """Apply `rules` (in order, at every node, operands first) until none fires; returns `graph` itself if none did.

    Terminates: a sweep rebuilds each node once and applies at most 64 rules in a row to one node; after `max_sweeps`
    sweeps RewriteError names the rules that still fire.
    """
    by_op: dict[Op, list[Rule]] = {}
    for rule in rules:
        for op in dict.fromkeys(_root_ops(rule.match)):
            if op in (VARIABLE, SCALAR, LITERAL):
                raise RewriteError(f"rule {rule.name!r} matches anything at its root; give it an op")
            by_op.setdefault(op, []).append(rule)
    log = trace or Trace()
    for _ in range(max_sweeps):
        before = dict(log.fired)
        graph = _sweep(graph, by_op, log)
        if log.fired == before:
            return graph
    busy = [name for name, n in log.fired.items() if n != before.get(name, 0)]
    raise RewriteError(f"no fixed point after {max_sweeps} sweeps; these rules undo each other: {', '.join(busy)}")


def _sweep(graph: Graph, by_op: Mapping[Op, Sequence[Rule]], trace: Trace) -> Graph:
    count = {node: len(users) for node, users in graph.users.items()}
    for output in graph.outputs:
        count[output] += 1
    uses: dict[Node, int] = {}
    done: dict[Node, Node] = {}
    changed = False
    for node in graph.nodes:
        new = node.with_operands(done[o] if o is not None else None for o in node.operands)
        uses[new] = uses.get(new, 0) + count[node]
        for _ in range(64):
            replacement = _apply_first(by_op.get(new.op, ()), new, lambda n: uses.get(n, 1), trace)
            if replacement is None:
                break
            changed = True
            new = replacement
            uses[new] = uses.get(new, 0) + count[node]
        else:
            raise RewriteError(f"64 rules in a row fired at {node!r}: they undo each other")
        done[node] = new
    if not changed:
        return graph
    return graph.replace(inputs=graph.inputs, outputs=tuple(done[o] for o in graph.outputs))


def _apply_first(rules: Sequence[Rule], node: Node, uses: Callable[[Node], int], trace: Trace) -> Node | None:
    for rule in rules:
        new, refused = apply(rule, node, uses)
        trace.note(rule, new, refused)
        if new is not None:
            return new
    return None
