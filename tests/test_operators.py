"""A sample of PyTorch's own operator database, compiled: every case equals eager PyTorch or is refused by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import jisu
from jisu.frontends.torch_export import capture

DTYPES = (torch.float32, torch.float32, torch.int64, torch.bfloat16, torch.float64, torch.int32, torch.bool)
"""float32 stands twice, as it is the most used."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7, torch.bfloat16: 3e-2, torch.float16: 3e-3}
TOGETHER = 20
"""Cases per program; a program that fails is halved until the culprit stands alone."""


@attrs.frozen(eq=False)
class Case:
    """One call of one operator: `leaves` are its arguments, tensors among them become inputs."""

    name: str
    op: Any
    leaves: tuple[Any, ...]
    spec: Any

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(*args, **kwargs)


class Together(nn.Module):
    """All cases' results at once."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *tensors: torch.Tensor) -> Any:
        results, at = [], 0
        for case in self.cases:
            results.append(case(tensors[at : at + len(case.tensors)]))
            at += len(case.tensors)
        return tuple(results)


def copies(case: Case) -> list[torch.Tensor]:
    return [t.clone() for t in case.tensors]


def eager(case: Case, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        return case(copies(case))


def equal(got: Any, want: Any) -> str:
    """Empty where two results agree in structure, dtype and value, else how they differ."""
    a, first = pytree.tree_flatten(got)
    b, second = pytree.tree_flatten(want)
    if len(a) != len(b) or first != second:
        return f"structure {first} for {second}"
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or x != y:
                return f"{x!r} for {y!r}"
            continue
        tolerance = TOLERANCE.get(y.dtype, 0)
        try:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        except (AssertionError, TypeError) as error:
            return " ".join(str(error).split())[:300]
    return ""


def drawn(count: int, seed: int) -> list[Case]:
    """Cases whose result eager PyTorch computes, and computes alike twice."""
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    rng = random.Random(seed)
    database = sorted(methods.op_db, key=lambda op: op.formatted_name)
    rng.shuffle(database)
    cases: list[Case] = []
    for op in database:
        if len(cases) == count:
            break
        dtypes = [d for d in DTYPES if d in op.supported_dtypes("cpu")]
        if not dtypes or op.op is None or "empty" in op.name or "jiterator" in op.name:  # no values; CUDA only
            continue
        dtype = rng.choice(dtypes)
        torch.manual_seed(seed)
        samples = list(itertools.islice(op.sample_inputs("cpu", dtype), 8))
        if not samples:
            continue
        sample = rng.choice(samples)
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        case = Case(f"{op.formatted_name} {str(dtype)[6:]}", op.op, tuple(leaves), spec)
        if any(t.is_complex() or t.layout is not torch.strided for t in case.tensors):
            continue
        try:
            one, two = eager(case, 0), eager(case, 1)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
            continue
        if op.name == "topk" and case.tensors[0].unique().numel() < case.tensors[0].numel():
            continue  # which of several equal elements it picks isn't specified
        results = pytree.tree_leaves(one)
        if not case.tensors or not results or not all(isinstance(r, torch.Tensor) for r in results):
            continue
        if any(r.is_complex() or r.layout is not torch.strided for r in results) or equal(one, two):
            continue
        cases.append(case)
    return cases


def outcomes(cases: Sequence[Case], cache: Path) -> dict[str, str]:
    """For each case "right", "refused", or what was wrong."""
    found: dict[str, str] = {}
    accepted: list[Case] = []
    for case in cases:
        try:
            capture(Together([case]), copies(case))
        except jisu.UnsupportedError:
            found[case.name] = "refused"
        except Exception as error:  # any other kind is what this test looks for
            found[case.name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            accepted.append(case)
    for start in range(0, len(accepted), TOGETHER):
        found |= _compiled(accepted[start : start + TOGETHER], cache)
    return found


def _compiled(cases: Sequence[Case], cache: Path) -> dict[str, str]:
    try:
        program = jisu.compile(
            Together(cases), example_inputs=tuple(t for c in cases for t in copies(c)), cache_dir=cache
        )
        results = program(*(t for c in cases for t in copies(c)))
    except Exception as error:
        if len(cases) > 1:
            middle = len(cases) // 2
            return _compiled(cases[:middle], cache) | _compiled(cases[middle:], cache)
        refused = isinstance(error, jisu.UnsupportedError)
        return {cases[0].name: "refused" if refused else f"{type(error).__name__}: {str(error)[:300]}"}
    return {c.name: equal(r, eager(c)) or "right" for c, r in zip(cases, results, strict=True)}


@pytest.fixture(scope="module", params=[(25, 0), pytest.param((150, 1), marks=pytest.mark.slow)], ids=str)
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    count, seed = request.param
    cases = drawn(count, seed)
    assert len(cases) == count
    return outcomes(cases, tmp_path_factory.mktemp("cache"))


def test_right_or_refused(sample: dict[str, str]) -> None:
    wrong = {name: outcome for name, outcome in sample.items() if outcome not in ("right", "refused")}
    assert not wrong, "\n".join(f"{name}: {outcome}" for name, outcome in wrong.items())


def test_most_are_right(sample: dict[str, str]) -> None:
    """What is refused are matrix decompositions, special functions, random numbers and sizes that depend on the data."""
    refused = sorted(name for name, outcome in sample.items() if outcome == "refused")
    assert len(refused) <= 0.35 * len(sample), f"refused: {', '.join(refused)}"
