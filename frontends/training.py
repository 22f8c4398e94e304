"""Training of compressed graphs in PyTorch: a student's outputs are drawn to its teacher's, the whole model's or one block's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from jisu.compiler import masks, ops
from jisu.compiler.errors import InputError
from jisu.compiler.graph import ArrayStorage, Graph, Node, Storage, weight
from jisu.compiler.recipe import RecoverRecipe
from jisu.compiler.schemes import decode_scales, encode_scales, scheme
from jisu.compiler.types import numpy_dtype
from jisu.frontends.gradients import computes_bfloat16
from jisu.frontends.to_torch import from_torch, to_torch

Batch = tuple[Tensor, ...]


def distil(
    student: Graph, teacher: Graph, batches: Callable[[int], Sequence[np.ndarray]], rule: RecoverRecipe, *, language: bool,
    buffers: frozenset[str] = frozenset(), progress: Callable[[float], None] = lambda done: None,
) -> Graph:  # fmt: skip
    """The student with values that bring its outputs nearest to the teacher's (Hinton et al., 2015); masks and codes stay.

    batches: the graphs' inputs at each step. language: outputs are logits, and the loss is the Kullback-Leibler divergence per token; else
    it is the squared error relative to the teacher's. Adam (Kingma & Ba, 2015) with a step relative to each parameter's size, warmed up, then
    lowered to nothing by a cosine, of the steps or of the minutes, whichever end first. A bfloat16 model is computed in that where the
    processor can; what is trained is float32. Raises InputError where the loss isn't finite.
    """
    learner = _Student(student, buffers)
    model = to_torch(teacher, buffers=buffers, dtype="float32")
    half = computes_bfloat16(teacher)

    def loss(step: int) -> Tensor:
        inputs = tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in batches(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.no_grad():
                wanted = model(*inputs)
            found = learner(inputs)
        return _distance(_float32(found), _float32(wanted), language)

    optimizer = torch.optim.Adam(learner.groups(), lr=0.0, betas=(0.9, 0.99))
    for step, share in _schedule(rule.steps, rule.minutes):
        rate = rule.learning_rate * min(1.0, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        _step(optimizer, rate, loss(step), rule)
        progress(share)
    return learner.graph()


def fit_block(
    block: Graph, inputs: Sequence[Sequence[np.ndarray]], wanted: Sequence[np.ndarray], rule: RecoverRecipe, *, steps: int,
    moving: frozenset[str] = frozenset(), buffers: frozenset[str] = frozenset(),
) -> Graph:  # fmt: skip
    """A block with values that bring its output nearest to what is wanted; masks stay, and codes but for those named in `moving`.

    inputs: each of the block's inputs, one array per call; wanted: its output on these. As `distil`, one call a step, with the squared error.
    Codes move as in AutoRound (Cheng et al., 2024): by the sign of the gradient, through a rounding that lets it pass. What fits all calls
    best at a quarter of the steps, or before any, is kept.
    """
    learner = _Student(block, buffers, moving)
    count = len(wanted)
    size = sum(float(np.square(w, dtype=np.float64).sum()) for w in wanted)

    def error(call: int) -> Tensor:
        (found,) = learner(tuple(torch.from_numpy(np.ascontiguousarray(x[call])) for x in inputs))
        return (found - torch.from_numpy(wanted[call])).square().sum() * (count / max(size, 1e-30))

    def total() -> float:
        with torch.no_grad():
            return sum(float(error(call)) for call in range(count)) / count

    best, least = learner.values(), total()
    values = torch.optim.Adam(learner.groups(), lr=0.0, betas=(0.9, 0.98))
    signs = [codes.moved for codes in learner.codes.values()]
    for step, share in _schedule(steps, 0.0):
        order = np.random.default_rng((rule.seed, step // count)).permutation(count)
        _step(values, rule.learning_rate * (1 - share), error(int(order[step % count])), rule)
        with torch.no_grad():
            for moved in signs:
                assert moved.grad is not None
                moved.sub_(moved.grad.sign(), alpha=2 * (1 - share) / steps).clamp_(-1, 1)
                moved.grad = None
        if (step + 1) % max(steps // 4, 1) == 0 or step + 1 == steps:
            now = total()
            if now < least:
                best, least = learner.values(), now
    learner.restore(best)
    return learner.graph()


class _Student:
    """A compressed graph as a module, and what training may change of it: numbers, scales, and those codes that may move."""

    def __init__(self, graph: Graph, buffers: frozenset[str], moving: frozenset[str] = frozenset()) -> None:
        self._graph = graph
        self.codes: dict[str, _Codes] = {}
        weights = dict(graph.weights)

        def loosened(old: Node, new: Node) -> Node:
            if old.op is not ops.dequantize or old.operands[0].name not in moving:  # type: ignore[union-attr]
                return new
            codes = _Codes(old, graph)
            label = f"{codes.names[0]} as numbers"
            self.codes[label] = codes
            weights[label] = ArrayStorage(np.zeros(codes.start.shape, numpy_dtype(old.dtype)))
            return weight(label, old.tensor, old.source)

        new = graph.map(loosened)
        self._loose = attrs.evolve(new, weights=weights).replace()
        self._module = to_torch(self._loose, buffers=buffers | self.codes.keys(), dtype="float32")

    def __call__(self, inputs: Batch) -> tuple[Tensor, ...]:
        made = {label: codes() for label, codes in self.codes.items()}
        found: tuple[Tensor, ...] = functional_call(self._module, made, inputs)
        return found

    def groups(self) -> list[dict[str, object]]:
        """For an optimizer: each parameter with its size, which its steps are relative to."""
        scales = [codes.factors for codes in self.codes.values()]
        return [
            {"params": [p], "size": max(float(p.detach().square().mean().sqrt()), 1e-3)}
            for p in (*self._module.parameters(), *scales)
            if p.numel()
        ]

    def values(self) -> list[Tensor]:
        """A copy of all that training changes."""
        return [p.detach().clone() for p in self._trained()]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Go back to what `values` gave."""
        with torch.no_grad():
            for p, value in zip(self._trained(), values, strict=True):
                p.copy_(value)

    def _trained(self) -> list[Tensor]:
        return [*self._module.parameters(), *(t for c in self.codes.values() for t in (c.factors, c.moved))]

    def graph(self) -> Graph:
        """The graph with the values that there are now."""
        weights = {**self._graph.weights, **from_torch(self._loose, self._module).weights}
        for label, codes in self.codes.items():
            del weights[label]
            weights |= codes.stored()
        return attrs.evolve(self._graph, weights=weights)


class _Codes(nn.Module):
    """Codes of one matrix on an integer grid, and how far training moved them: numbers between codes, rounded when the matrix is made."""

    def __init__(self, node: Node, graph: Graph) -> None:
        super().__init__()
        names = [None if o is None else str(o.name) for o in node.operands]
        assert names[0] is not None and names[1] is not None
        codes, scales, zeros, mask = (None if name is None else graph.weights[name].numpy() for name in names)
        assert codes is not None and scales is not None
        self.names, self.node = (names[0], names[1]), node
        self.kind, k, self.kept = scheme(node.scheme), int(node.k), None
        if mask is None:
            self.start = torch.from_numpy(self.kind.unpack(codes, k).astype(np.float32))
        else:
            self.kept = masks.unpack_mask(mask, k)
            single, there = masks.expand_codes(codes, mask, self.kind.name, k)
            self.start = torch.from_numpy(single.astype(np.float32))
            self.there = torch.from_numpy(there)
        self.scales = torch.from_numpy(np.array(decode_scales(scales, self.kind.scale, node.whole)))
        self.zeros = torch.tensor(self.kind.middle) if zeros is None else self._spread(torch.from_numpy(zeros).float())
        self.moved = nn.Parameter(torch.zeros_like(self.start))
        self.factors = nn.Parameter(torch.ones_like(self.scales))

    def _spread(self, values: Tensor) -> Tensor:
        """Per group as per input [n, k]."""
        return values.repeat_interleave(self.node.group or self.node.k, -1)[:, : self.node.k]

    def forward(self) -> Tensor:
        """The matrix float32 [n, k]."""
        between = (self.start + self.moved).clamp(0, 2**self.kind.bits - 1)
        codes = between + (between.round() - between).detach()
        found = (codes - self.zeros) * self._spread(self.scales * self.factors)
        return found if self.kept is None else found * self.there

    def stored(self) -> dict[str, Storage]:
        """Codes and scales in storage, by name."""
        with torch.no_grad():
            codes = (self.start + self.moved).clamp(0, 2**self.kind.bits - 1).round().numpy().astype(np.uint8)
            scales = (self.scales * self.factors).numpy()
        packed = self.kind.pack(codes)
        if self.kept is not None:
            packed, _ = masks.compress_codes(codes, self.kept, self.kind.name)
        return {
            self.names[0]: ArrayStorage(packed),
            self.names[1]: ArrayStorage(encode_scales(scales, self.kind.scale)[0]),
        }


def _step(optimizer: torch.optim.Optimizer, rate: float, loss: Tensor, rule: RecoverRecipe) -> None:
    """One step down the loss."""
    if not bool(loss.isfinite()):
        raise InputError(f"recover: the loss became {float(loss.detach())}; lower learning_rate ({rule.learning_rate})")
    parameters = []
    for group in optimizer.param_groups:
        group["lr"] = rate * group["size"]
        parameters += group["params"]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _schedule(steps: int, minutes: float) -> Iterator[tuple[int, float]]:
    """Each step, and how much of the whole is behind it: of the steps, or of the minutes (0: as many as it takes)."""
    begin = time.monotonic()
    for step in range(steps):
        spent = (time.monotonic() - begin) / (60 * minutes) if minutes else 0.0
        if spent >= 1:
            return
        yield step, max((step + 0.5) / steps, spent)


def _float32(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.float() if v.is_floating_point() else v for v in values]


def _distance(got: Sequence[Tensor], wanted: Sequence[Tensor], language: bool) -> Tensor:
    if language:
        pairs = [
            (F.log_softmax(a, -1).flatten(0, -2), F.log_softmax(b, -1).flatten(0, -2))
            for a, b in zip(got, wanted, strict=True)
        ]
        return torch.stack([F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in pairs]).sum()
    floats = [(a, b) for a, b in zip(got, wanted, strict=True) if b.is_floating_point()]
    error = torch.stack([(a - b).square().sum() for a, b in floats]).sum()
    return error / torch.stack([b.square().sum() for _, b in floats]).sum().clamp(min=1e-30)
