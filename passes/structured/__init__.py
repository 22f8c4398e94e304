"""Structured removal as a declared, lossy pass: heads, channels, layers and experts go for good, and the model is dense again."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import Graph, Node
from jisu.compiler.interpret import evaluate_node
from jisu.compiler.recipe import RemoveRecipe
from jisu.passes.compression.calibrate import Run, Values, stream
from jisu.passes.layout import Derived
from jisu.passes.structured.blocks import Block, find_blocks, remove_block
from jisu.passes.structured.coupling import Coupling, couple
from jisu.passes.structured.refit import activity, cheapest, collect, solve
from jisu.passes.structured.sites import Consumer, Site, find_sites, is_sole, weights_of
from jisu.passes.structured.surgery import without

Progress = Callable[[float], None]


@attrs.frozen
class Remove:
    """Take out heads, channels, layers or experts, one rule after the other.

    rules: what and how much. tokens: int64 [windows, length] for calibration; without, what has the smallest weights goes, and nothing
    makes up for it. notes: what was removed, filled by the call.
    """

    rules: tuple[RemoveRecipe, ...]
    tokens: np.ndarray | None = attrs.field(default=None, eq=False, repr=False)
    progress: Progress = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "remove"
    exact: bool = False
    notes: dict[str, Any] = attrs.field(factory=dict, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for rule in self.rules:
            if rule.importance == "activation" and self.tokens is None:
                raise RecipeError(
                    f'remove {rule.what}: importance = "activation" needs calibration text; give calibration=…, or importance = "auto"'
                )

    def __call__(self, graph: Graph) -> Graph:
        self.notes.clear()
        self.notes["removed"] = []
        for i, rule in enumerate(self.rules):
            step = _remove_layers if rule.what == "layers" else _remove_units

            def told(done: float, i: int = i) -> None:
                self.progress((i + done) / len(self.rules))

            graph, removed = step(graph, rule, self.tokens, told)
            self.notes["removed"] += removed
        return graph


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _refuse_pattern(rule: RemoveRecipe, names: Sequence[str]) -> RecipeError:
    near = difflib.get_close_matches(rule.layers, names, n=3, cutoff=0.3)
    shown = ", ".join(near or names[:3])
    return RecipeError(f"remove {rule.what}: nothing matches {rule.layers!r}; near: {shown}")


# --- Heads, channels, experts ----------------------------------------------------------------------------------------


def _remove_units(
    graph: Graph, rule: RemoveRecipe, tokens: np.ndarray | None, progress: Progress
) -> tuple[Graph, list[dict[str, Any]]]:
    coupling = couple(graph)
    sites = _choose_sites(graph, coupling, rule)
    counts = {site: _count(site, rule) for site in sites}
    work = _Work(graph, coupling, rule, {site: n for site, n in counts.items() if n}, tokens)
    work.decide(progress)
    removed = [
        {"what": rule.what, "layers": list(site.names), "removed": len(work.gone[site]), "of": site.total}
        for site in work.counts
    ]
    labels = [int(k) for units in work.gone.values() for k in units]
    return without(coupling, labels, work.matrices), removed


def _choose_sites(graph: Graph, coupling: Coupling, rule: RemoveRecipe) -> list[Site]:
    """The sites that a rule means; raises RecipeError where there are none, with the reason."""
    sites = find_sites(graph, coupling, rule.what)
    if not sites:
        raise RecipeError(f"remove {rule.what}: the model has none; {_HAS[rule.what]}")
    matched = [site for site in sites if _matches(site.names, rule.layers)]
    if not matched:
        raise _refuse_pattern(rule, [name for site in sites for name in site.names])
    free = [site for site in matched if not site.refusal]
    if not free:
        site = matched[0]
        raise RecipeError(f"remove {rule.what}: none can be removed; {site.names[0]}: {site.refusal}")
    return free


_HAS = {
    "heads": "only attention over heads has some",
    "channels": "it has no layer that reads what another one made",
    "experts": "only a mixture of experts, chosen by a sort of their scores, has some",
}


def _count(site: Site, rule: RemoveRecipe) -> int:
    """How many units of a site go; raises RecipeError where they are too many."""
    wanted = rule.count or int(site.total * rule.share)
    left = -(-(site.total - wanted) // rule.multiple) * rule.multiple
    wanted = max(site.total - left, 0)
    if wanted > site.limit:
        why = "" if site.limit == len(site.units) or rule.what != "experts" else ", since each token uses the others"
        raise RecipeError(
            f"remove {rule.what}: {wanted} of {site.total} are too many for {site.names[0]}, of which at most {site.limit} can go{why}"
        )
    return wanted


class _Work:
    """Which units of each site go, and the weights that make up for them."""

    def __init__(
        self, graph: Graph, coupling: Coupling, rule: RemoveRecipe, counts: Mapping[Site, int], tokens: np.ndarray | None
    ) -> None:  # fmt: skip
        self.graph, self.coupling, self.rule, self.counts, self.tokens = graph, coupling, rule, counts, tokens
        self.gone: dict[Site, np.ndarray] = {}
        self.matrices: dict[tuple[Node, int], np.ndarray] = {}

    def decide(self, progress: Progress) -> None:
        """Choose all; with tokens in the order in which they flow, each layer on what the changed ones before it give."""
        calibrated = self.rule.calibrated and self.tokens is not None
        for site in self.counts:
            if (
                not calibrated
                or self.rule.importance == "magnitude"
                or not (self.readable(site) or site.node.op is ops.experts)
            ):
                self.take(site, self.magnitudes(site))
        if not calibrated or self.tokens is None:
            return
        nodes = {c.node for site in self.counts for c in site.consumers}
        if self.rule.what == "experts":
            nodes = {site.node for site in self.counts}
        stream(self.graph, self.tokens, nodes, self.visit, unchanged=self.rule.what != "experts", progress=progress)

    def readable(self, site: Site) -> bool:
        """Whether the tokens tell what the site's units do: all that read them are matrices."""
        return all(c.matrix.rank == 2 for c in site.consumers)

    def take(self, site: Site, scores: np.ndarray) -> None:
        """Remove the units with the lowest scores."""
        self.gone[site] = site.units[np.argsort(scores, kind="stable")[: self.counts[site]]]

    def magnitudes(self, site: Site) -> np.ndarray:
        """The sum of squares of all weights that go with each unit."""
        scores = np.zeros(self.coupling.count)
        for name, axis, labels in weights_of(self.coupling, site.units):
            w = np.asarray(self.graph.weights[name].numpy(), np.float32)
            others = tuple(i for i in range(w.ndim) if i != axis)
            scores += np.bincount(labels, np.square(w).sum(others, dtype=np.float64), minlength=self.coupling.count)
        return scores[site.units]

    def visit(self, node: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        """At a layer that reads what may go: decide, make up for it, and let the layers behind it see that."""
        if self.rule.what == "experts":
            for site in self.counts:
                if site.node is node and site not in self.gone:
                    self.take(site, _mass(node, now)[np.isin(self.coupling.experts[node], site.units)])
            return {}
        readers = [c for site in self.counts for c in site.consumers if c.node is node]
        values = {c: self.value(c) for c in readers}
        for site in self.counts:
            mine = [c for c in readers if c in site.consumers]
            if mine and site not in self.gone:
                self.choose(site, mine, values, now, then)
        replaced: dict[int, np.ndarray] = {}
        for c in readers:
            kept = ~np.isin(c.labels, np.concatenate([self.gone[s] for s in self.counts if c in s.consumers]))
            if self.rule.refit and c.matrix.rank == 2 and is_sole(self.graph, c):
                replaced |= self.refit(c, values[c], kept, now, then)
            else:
                shape = [len(kept) if axis == c.axis else 1 for axis in range(values[c].ndim)]
                replaced[c.position] = values[c] * kept.reshape(shape)
        return replaced

    def value(self, consumer: Consumer) -> np.ndarray:
        """What a layer multiplies by, float32."""
        return np.asarray(Derived(consumer.matrix, self.graph.weights).numpy(), np.float32)

    def choose(
        self, site: Site, readers: list[Consumer], values: Mapping[Consumer, np.ndarray], now: Run,
        then: Run,
    ) -> None:  # fmt: skip
        """Which units go, by what they do for the layers that read them first."""
        first = readers[0]
        same = [c for c in readers if c.x is first.x and c.x_axis == first.x_axis]
        w = np.concatenate([_rows(values[c], c.axis) for c in same])
        found = collect(now[first.x], then[first.x], first.x_axis, constant=False)
        units = [np.flatnonzero(first.labels == k) for k in site.units]
        if self.rule.importance == "activation":
            self.take(site, activity(w, found, units))
        else:
            self.gone[site] = site.units[cheapest(w, found, units, self.counts[site])]

    def refit(self, c: Consumer, value: np.ndarray, kept: np.ndarray, now: Run, then: Run) -> dict[int, np.ndarray]:
        """The layer's new weights, its bias with them, by position."""
        bias = c.node.operands[2] if c.node.op is ops.linear else None
        if bias is not None and not _is_own(self.graph, bias):
            bias = None
        w = _rows(value, c.axis)
        if bias is not None:
            b = np.asarray(Derived(bias, self.graph.weights).numpy(), np.float64)
            w, kept = np.concatenate([w, b[:, None]], 1), np.append(kept, True)
        found = solve(w, collect(now[c.x], then[c.x], c.x_axis, constant=bias is not None), kept)
        new = {c.position: found[:, : value.shape[c.axis]]}
        new[c.position] = np.moveaxis(new[c.position], 1, c.axis)
        if bias is not None:
            new[2] = found[:, -1]
        done = {position: np.ascontiguousarray(array, np.float32) for position, array in new.items()}
        self.matrices |= {(c.node, position): array for position, array in done.items()}
        return done


def _rows(w: np.ndarray, axis: int) -> np.ndarray:
    """A matrix with its inputs last, float64."""
    return np.moveaxis(w, axis, -1).astype(np.float64)


def _is_own(graph: Graph, bias: Node) -> bool:
    """Whether a bias is one stored tensor that serves nothing else."""
    return bias.op.name == "weight" and len(graph.users[bias]) == 1


def _mass(node: Node, now: Run) -> np.ndarray:
    """Per expert the sum over tokens of its score times the norm of its output, float64 [experts]."""
    x, index, scores, *weights = (now[o] for o in node.parents)
    count = weights[0][0].shape[0]
    found = np.zeros(count)
    for part in range(len(x)):
        both = [w[part] for w in weights]
        for e in range(count):
            tokens, places = np.nonzero(index[part] == e)
            if tokens.size:
                alone = [x[part][tokens], np.full((len(tokens), 1), e), scores[part][tokens, places][:, None], *both]
                found[e] += float(np.linalg.norm(evaluate_node(node, alone, {}), axis=-1).sum())
    return found


# --- Layers ----------------------------------------------------------------------------------------------------------


def _remove_layers(
    graph: Graph, rule: RemoveRecipe, tokens: np.ndarray | None, progress: Progress
) -> tuple[Graph, list[dict[str, Any]]]:
    blocks = find_blocks(graph)
    if not blocks:
        raise RecipeError(
            "remove layers: the model has no residual stream, in which a value is an earlier one plus something"
        )
    count = rule.count or int(len(blocks) * rule.share)
    removed: list[dict[str, Any]] = []
    total = len(blocks)
    matched = [b for b in blocks if _matches(b.names, rule.layers)]
    if not matched:
        raise _refuse_pattern(rule, [name for b in blocks for name in b.names])
    if count > min(len(matched), total - 1):
        raise RecipeError(
            f"remove layers: {count} are too many of the {len(matched)} that match, of {total} in the model"
        )
    for i in range(count):
        blocks = [b for b in find_blocks(graph) if _matches(b.names, rule.layers)]
        scores = _block_scores(graph, blocks, rule, tokens, lambda done, i=i: progress((i + done) / count))  # type: ignore[misc]
        block = blocks[int(np.argmin(scores))]
        graph = remove_block(graph, block)
        removed.append({"what": "layers", "layers": list(block.names), "removed": 1, "of": total})
    return graph, removed


def _block_scores(
    graph: Graph, blocks: list[Block], rule: RemoveRecipe, tokens: np.ndarray | None, progress: Progress
) -> np.ndarray:
    """What each block is worth: the loss without it, how far it turns the stream, or its weights' sum of squares."""
    if tokens is None or rule.importance == "magnitude":
        return np.array([sum(_squares(graph, name) for name in block.names) for block in blocks])
    if rule.importance == "activation":
        return _turns(graph, blocks, tokens, progress)
    losses = []
    for i, block in enumerate(blocks):
        losses.append(loss(remove_block(graph, block), tokens).mean())
        progress((i + 1) / len(blocks))
    return np.array(losses)


def _squares(graph: Graph, name: str) -> float:
    storage = graph.weights.get(name) or graph.weights[f"{name}.weight"]
    return float(np.square(np.asarray(storage.numpy(), np.float32)).sum(dtype=np.float64))


def _turns(graph: Graph, blocks: list[Block], tokens: np.ndarray, progress: Progress) -> np.ndarray:
    """1 - the mean cosine between a block's input and output, over tokens (Men et al., 2024)."""
    begins: dict[Node, Values] = {}
    found: dict[Node, float] = {}

    def visit(node: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        for block in blocks:
            if block.end is node:
                found[node] = 1 - float(
                    np.mean([_cosines(a, b).mean() for a, b in zip(begins.pop(block.begin), now[node], strict=True)])
                )
            if block.begin is node:
                begins[node] = now[node]
        return {}

    stream(graph, tokens, {n for b in blocks for n in (b.begin, b.end)}, visit, progress=progress)
    return np.array([found[block.end] for block in blocks])


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-30))


def loss(graph: Graph, tokens: np.ndarray) -> np.ndarray:
    """Mean next-token loss in nats of each window of tokens int64 [windows, length], float64 [windows]."""
    (output,) = graph.outputs
    found: list[np.ndarray] = []

    def visit(node: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        scores = now[node][0][:, :-1].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        chosen = np.take_along_axis(scores, ids[:, 1:, None], -1)[..., 0]
        found.append((np.log(np.exp(scores).sum(-1)) - chosen).mean(1))
        return {}

    for begin in range(0, len(tokens), 8):  # logits are large: a few windows at a time
        ids = tokens[begin : begin + 8]
        stream(graph, ids, {output}, visit, batch=8)
    return np.concatenate(found)
