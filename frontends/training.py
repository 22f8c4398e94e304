"""Training of compressed graphs in PyTorch: a student's outputs are drawn to its teacher's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jisu.compiler.errors import InputError
from jisu.compiler.graph import Graph
from jisu.compiler.recipe import RecoverRecipe
from jisu.frontends.to_torch import from_torch, to_torch

Batch = tuple[Tensor, ...]


def distil(
    student: Graph, teacher: Graph, batches: Callable[[int], Sequence[np.ndarray]], rule: RecoverRecipe, *, language: bool,
    buffers: frozenset[str] = frozenset(), progress: Callable[[float], None] = lambda done: None,
) -> Graph:  # fmt: skip
    """The student with values that bring its outputs nearest to the teacher's (Hinton et al., 2015); masks and codes stay.

    batches: the graphs' inputs at each step. language: outputs are logits, and the loss is the Kullback-Leibler divergence per token; else
    it is the squared error relative to the teacher's. Adam (Kingma & Ba, 2015) with a step relative to each parameter's size, warmed up, then
    lowered to nothing by a cosine, of the steps or of the minutes, whichever end first. Raises InputError where the loss isn't finite.
    """
    module, model = (
        to_torch(student, buffers=buffers, dtype="float32"),
        to_torch(teacher, buffers=buffers, dtype="float32"),
    )
    groups = [
        {"params": [p], "size": max(float(p.detach().square().mean().sqrt()), 1e-3)}
        for p in module.parameters()
        if p.numel()
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98))
    for share, inputs in _schedule(rule, batches):
        with torch.no_grad():
            wanted = model(*inputs)
        rate = rule.learning_rate * min(1.0, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["size"]
        loss = _distance(module(*inputs), wanted, language)
        if not bool(loss.isfinite()):
            raise InputError(f"recover: the loss became {float(loss)}; lower learning_rate ({rule.learning_rate})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        progress(share)
    return from_torch(student, module)


def _schedule(rule: RecoverRecipe, batches: Callable[[int], Sequence[np.ndarray]]) -> Iterator[tuple[float, Batch]]:
    """For each step how much of the whole is behind it, and its inputs."""
    begin = time.monotonic()
    for step in range(rule.steps):
        spent = (time.monotonic() - begin) / (60 * rule.minutes) if rule.minutes else 0.0
        if spent >= 1:
            return
        yield (
            max((step + 0.5) / rule.steps, spent),
            tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in batches(step)),
        )


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
