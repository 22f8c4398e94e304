"""Recovery: a compressed model is trained until it gives the outputs of the unchanged one as nearly as it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import numpy as np

from jisu.compiler.graph import Graph
from jisu.compiler.recipe import RecoverRecipe
from jisu.passes.compression.calibrate import Samples, calls_of


class Trainer(Protocol):
    """What trains: given by whoever runs the pass, since passes know no framework."""

    def __call__(
        self, student: Graph, teacher: Graph, batches: Callable[[int], Sequence[np.ndarray]], rule: RecoverRecipe, *, language: bool,
        progress: Callable[[float], None],
    ) -> Graph: ...  # fmt: skip


@attrs.frozen
class Recover:
    """Train the numbers and scales of a compressed graph on `samples`, against `dense`, the model as it was."""

    rule: RecoverRecipe
    dense: Graph = attrs.field(eq=False, repr=False)
    samples: Samples = attrs.field(eq=False, repr=False)
    train: Trainer = attrs.field(eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "recover"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        batches = _batches(graph, self.samples, self.rule)
        language = isinstance(self.samples, np.ndarray)
        return self.train(graph, self.dense, batches, self.rule, language=language, progress=self.progress)


def _batches(graph: Graph, samples: Samples, rule: RecoverRecipe) -> Callable[[int], Sequence[np.ndarray]]:
    """The inputs of each step: all samples in a random order, then again in another."""
    size = rule.batch if isinstance(samples, np.ndarray) else 1
    per_round = -(-len(samples) // size)

    def batch(step: int) -> Sequence[np.ndarray]:
        order = np.random.default_rng((rule.seed, step // per_round)).permutation(len(samples))
        chosen = order[(step % per_round) * size :][:size]
        if isinstance(samples, np.ndarray):
            return calls_of(graph, samples[chosen], len(chosen))[0]
        return samples[chosen[0]]

    return batch
