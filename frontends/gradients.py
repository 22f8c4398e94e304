"""Gradients at the outputs of a graph's linear layers, in PyTorch."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jisu.compiler.graph import Graph, Node
from jisu.frontends.to_torch import GraphModule, Meaning

_LARGE = 4 << 30
"""Bytes of weights in float32 beyond which there is no such copy."""


def output_gradients(
    graph: Graph, calls: Sequence[Sequence[np.ndarray]], layers: Mapping[Node, Sequence[int]], *, language: bool, seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[tuple[Node, int], tuple[np.ndarray, float, int]]:  # fmt: skip
    """Of the gradients g [n] at the products of layers with their matrices, sums over tokens: g gᵀ float32 [n, n], |g|⁴, and the
    number of tokens; by layer and position.

    calls: the graph's inputs, call by call. layers: with the positions of their matrices among their operands. The gradients are, of a
    language model, those of the log-likelihood of tokens drawn from its own predictions, so that the mean of g gᵀ is the Fisher information;
    of others, those of the sum of all outputs with random signs, so that it is the Gauss-Newton matrix of their squared error. A product is
    what is there before bias and activation. Weights stay where they are and get no gradients. A bfloat16 model is computed in that where the
    processor can, or where a copy in float32 would be large; else in float32. Layers that no float output depends on are left out.

    Raises UnsupportedError for ops that only layout and the cache make.
    """
    wide = sum(4 * math.prod(w.shape) for w in graph.weights.values()) <= _LARGE and not computes_bfloat16(graph)
    module = _Watched(graph, layers, "float32" if wide else None)
    random = torch.Generator().manual_seed(seed)
    for i, call in enumerate(calls):
        outputs = module._run([torch.from_numpy(np.ascontiguousarray(x)) for x in call])
        floats = [o.float() for o in outputs if o.is_floating_point() and o.requires_grad]
        if not floats:
            break
        score = (
            _likelihood(floats[0], random) if language else torch.stack([_signed_sum(o, random) for o in floats]).sum()
        )
        torch.autograd.backward(score)
        progress((i + 1) / len(calls))
    return {key: (square.numpy(), module.fourths[key], module.counts[key]) for key, square in module.squares.items()}


def computes_bfloat16(graph: Graph) -> bool:
    """Whether products are computed in bfloat16: those of a model that gives it, on a processor with instructions for it."""
    return all(o.dtype == "bfloat16" for o in graph.outputs) and torch.cpu._is_avx512_bf16_supported()


def _likelihood(logits: Tensor, random: torch.Generator) -> Tensor:
    """The log-likelihood of tokens drawn from the model's own predictions."""
    chances = logits.log_softmax(-1).flatten(0, -2)
    sums = chances.detach().exp().cumsum(-1)
    drawn = torch.searchsorted(sums, torch.rand(len(sums), 1, generator=random) * sums[:, -1:])
    return chances.gather(-1, drawn.clamp(max=sums.shape[-1] - 1)).sum()


def _signed_sum(x: Tensor, random: torch.Generator) -> Tensor:
    return (x * (torch.randint(0, 2, x.shape, generator=random) * 2 - 1)).sum()


class _Watched(GraphModule):
    """A module that sums moments of the gradients at products of some of its layers."""

    def __init__(self, graph: Graph, layers: Mapping[Node, Sequence[int]], dtype: Any) -> None:
        super().__init__(graph, buffers=graph.weights.keys(), dtype=dtype)
        self.requires_grad_(False)
        self._layers = layers
        self.squares: dict[tuple[Node, int], Tensor] = {}
        self.fourths: dict[tuple[Node, int], float] = defaultdict(float)
        self.counts: dict[tuple[Node, int], int] = defaultdict(int)

    def _compute(self, node: Node, meaning: Meaning, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        if node not in self._layers:
            return super()._compute(node, meaning, operands, attributes)
        with _Products() as products:
            result = super()._compute(node, meaning, operands, attributes)
        for position, product in zip(self._layers[node], products.found, strict=True):
            product.register_hook(functools.partial(self._add, (node, position)))  # type: ignore[no-untyped-call]
        return result

    def _add(self, key: tuple[Node, int], gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        if key not in self.squares:
            self.squares[key] = g.new_zeros(g.shape[1], g.shape[1])
        self.squares[key].addmm_(g.T, g)
        self.fourths[key] += float(g.double().square().sum(-1).square().sum())
        self.counts[key] += len(g)


class _Products(TorchFunctionMode):
    """Lists products with matrices as they are computed, each where a gradient can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.linear:
            # Nothing in front of the first layers has a gradient, so that they begin one.
            self.found.append(result if result.requires_grad else result.requires_grad_())
        return result
