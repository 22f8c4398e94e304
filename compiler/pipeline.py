"""Passes and the pipeline that runs them: verifying, comparing, dumping, timing, stopping, bisecting.

A pass is any callable Graph -> Graph with a `name` and a flag `exact` (meaning kept within the dtype's rounding);
usually a frozen attrs value whose fields are its options. A lossy pass has `exact = False`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np

from jisu.compiler.errors import JisuError, VerifyError
from jisu.compiler.graph import Graph
from jisu.compiler.interpret import interpret
from jisu.compiler.text import to_text
from jisu.compiler.types import numpy_dtype
from jisu.compiler.verify import verify


@runtime_checkable
class Pass(Protocol):
    """What the pipeline asks of a pass."""

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    def __call__(self, graph: Graph) -> Graph: ...


class NumericMismatch(JisuError, AssertionError):
    """An exact pass changed the meaning; the message names pass, output and error."""


@attrs.frozen
class Report:
    """What one pass did. `error` is the largest relative error that `check="numeric"` measured, else None."""

    name: str
    exact: bool
    nodes: int
    seconds: float
    error: float | None = None
    notes: dict[str, Any] = attrs.field(factory=dict)


TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-4, "float64": 1e-9}
"""Largest error of an exact pass, relative to the largest element of the output."""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest magnitude of `want`; inf where NaN or inf stand elsewhere, or shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.astype(np.float64), want.astype(np.float64)
    odd = ~np.isfinite(b)
    if not np.array_equal(np.isnan(a), np.isnan(b)) or not np.array_equal(a[odd & ~np.isnan(b)], b[odd & ~np.isnan(b)]):
        return float("inf")
    if odd.all():
        return 0.0
    return float(np.max(np.abs(a[~odd] - b[~odd])) / max(float(np.max(np.abs(b[~odd]))), 1e-6))


def compare(got: Sequence[np.ndarray], want: Sequence[np.ndarray], dtypes: Sequence[str]) -> tuple[float, str | None]:
    """The largest error over all outputs, and a complaint where one exceeds its dtype's tolerance."""
    worst, complaint = 0.0, None
    for i, (g, w, dtype) in enumerate(zip(got, want, dtypes, strict=True)):
        error = relative_error(g, w)
        worst = max(worst, error)
        if error > TOLERANCE.get(dtype, 0.0):
            complaint = complaint or f"output {i} ({dtype}) is off by {error:.3g} of its largest element"
    return worst, complaint


def _bisect_limit() -> int | None:
    value = os.environ.get("JISU_BISECT")
    return int(value) if value else None


def _passes(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    return tuple(passes)


@attrs.frozen
class Pipeline:
    """A tuple of passes and how to run them.

    check: "verify" (after every pass) or "numeric" (also compare with the interpreter on `samples`). dump: a folder that
    gets the IR before the first and after each pass. stop_after: name of the last pass to run. limit: run the first
    `limit` passes only. The environment's JISU_DUMP, JISU_VERIFY ("0" skips) and JISU_BISECT set dump, check and limit.
    """

    passes: tuple[Pass, ...] = attrs.field(converter=_passes)
    check: str = attrs.field(default="verify", validator=attrs.validators.in_(("none", "verify", "numeric")))
    dump: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    stop_after: str | None = None
    limit: int | None = None
    on_pass: Callable[[Report, Graph], None] | None = None

    def __attrs_post_init__(self) -> None:
        known = [p.name for p in self.passes]
        if self.stop_after is not None and self.stop_after not in known:
            raise JisuError(f"there is no pass {self.stop_after!r} to stop after; known: {', '.join(known)}")

    def run(self, graph: Graph, samples: Sequence[np.ndarray] | None = None) -> tuple[Graph, list[Report]]:
        """Run the passes on `graph`; `samples` are input arrays for check="numeric".

        Raises VerifyError where a pass leaves a broken graph, NumericMismatch where an exact pass changes the meaning.
        """
        if self.check == "numeric" and samples is None:
            raise JisuError('check="numeric" needs sample inputs')
        dump = self.dump or (Path(os.environ["JISU_DUMP"]) if os.environ.get("JISU_DUMP") else None)
        limit = self.limit if self.limit is not None else _bisect_limit()
        verifying = self.check != "none" and os.environ.get("JISU_VERIFY", "1") != "0"
        if verifying:
            verify(graph, "the frontend")
        _dump(dump, 0, "input", graph)
        want = interpret(graph, samples) if self.check == "numeric" and samples is not None else None
        reports: list[Report] = []
        for i, step in enumerate(self.passes[:limit], start=1):
            begin = time.perf_counter()
            new = step(graph)
            seconds = time.perf_counter() - begin
            if verifying and new is not graph:
                verify(new, f"pass {step.name!r}")
            error = None
            if want is not None and samples is not None:
                got = interpret(new, samples)
                error, complaint = compare(got, want, [o.dtype for o in graph.outputs])  # type: ignore[arg-type]
                if complaint and step.exact:
                    raise NumericMismatch(f"pass {step.name!r} claims to be exact, but {complaint}")
                want = want if step.exact else got
            graph = new
            _dump(dump, i, step.name, graph)
            report = Report(
                step.name, step.exact, len(graph.nodes), seconds, error, dict(getattr(step, "notes", {}) or {})
            )
            reports.append(report)
            if self.on_pass is not None:
                self.on_pass(report, graph)
            if step.name == self.stop_after:
                break
        return graph, reports

    def bisect(self, graph: Graph, samples: Sequence[np.ndarray]) -> Pass | None:
        """The first pass after which the graph's outputs on `samples` leave the tolerance (or that raises); None if none."""
        want = interpret(graph, samples)
        dtypes = [o.dtype for o in graph.outputs]

        def breaks(count: int) -> bool:
            try:
                new, _ = attrs.evolve(self, limit=count, check="verify", stop_after=None).run(graph)
                return compare(interpret(new, samples), want, dtypes)[1] is not None  # type: ignore[arg-type]
            except (VerifyError, JisuError):
                return True

        low, high = 0, len(self.passes)
        if not breaks(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if breaks(middle) else (middle, high)
        return self.passes[high - 1]


def _dump(folder: Path | None, index: int, name: str, graph: Graph) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}-{name.replace(' ', '-')}.txt").write_text(to_text(graph, sources=True) + "\n")


def sample_inputs(graph: Graph, seed: int = 0, sizes: int = 5) -> list[np.ndarray]:
    """Small seeded inputs that fit the graph: normal floats, integers 0..7; symbols take sizes inside their ranges."""
    rng = np.random.default_rng(seed)
    env = {}
    for name in graph.symbols:
        low, high = graph.ranges.get(name, (1, None))
        env[name] = int(
            rng.integers(max(low, 1), min(high if high is not None else max(low, 1) + sizes, max(low, 1) + sizes) + 1)
        )
    arrays = []
    for node in graph.inputs:
        shape = tuple(int(d) for d in node.tensor.at(env).shape)
        dtype = numpy_dtype(node.dtype)
        if dtype == np.bool_:
            arrays.append(rng.integers(0, 2, shape).astype(bool))
        elif dtype.kind in "iu":
            arrays.append(rng.integers(0, 8, shape).astype(dtype))
        else:
            arrays.append(rng.standard_normal(shape).astype(dtype))
    return arrays
