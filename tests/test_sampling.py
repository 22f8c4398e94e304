"""Tokens are drawn by exact arithmetic: the same everywhere, and near enough to what real numbers say."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jisu.compiler import ops
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.ops import sampling
from jisu.compiler.types import TensorType, TypeRuleError, numpy_dtype
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

Array = np.ndarray


def sampling_rows(count: int, size: int, rng: np.random.Generator, dtype: str = "float32") -> list[Array]:
    """Operands of `draw`: rows of all kinds, ties, flat ones, steep ones, and such as are no distribution; options inside and outside their ranges."""
    values = rng.standard_normal((count, size)) * rng.choice([0.0, 0.1, 1.0, 3.0, 30.0], (count, 1))
    values = np.where(rng.random((count, 1)) < 0.3, np.round(values), values)
    values = -np.sort(-values.astype(numpy_dtype(dtype)).astype(np.float32), -1)
    values[rng.random((count, size)) < 0.02] = -np.inf
    for row, odd in zip(range(count // 10), (np.nan, np.inf, -np.inf) * count, strict=False):
        values[row, : 1 + row % size] = odd
    values = values.astype(numpy_dtype(dtype))
    tokens = np.argsort(rng.random((count, size)), -1).astype(np.int64)
    uniform = rng.integers(0, 1 << 31, count)
    uniform[:4] = 0, (1 << 31) - 1, -1, 1 << 40
    temperature = rng.choice([0.0, 0.2, 0.7, 1.0, 1.3, 5.0], count).astype(np.float32)
    top_k = rng.choice([0, 1, 2, size // 2, size - 1, size, size + 1, -3], count).astype(np.int64)
    top_p, min_p = (rng.choice([a, 0.1, 0.5, 0.9, 0.999, b], count).astype(np.float32) for a, b in ((0.0, 1.0), (0, 0)))
    top_p[4:7] = np.nan, -1, 2
    min_p[7:10] = np.nan, -1, 2
    return [values, tokens, uniform, temperature, top_k, top_p, min_p]


def drawn(operands: list[Array]) -> tuple[Array, Array]:
    assert ops.draw.meaning is not None
    chosen, whole = ops.draw.meaning(*operands)
    return chosen, whole


def test_masses_are_powers_of_e() -> None:
    distance = np.linspace(0, 40, 100_001).astype(np.float32)
    mass, want = sampling.masses(distance), 2.0**40 * np.exp(-distance.astype(np.float64))
    assert mass[0] == 2**40 and (np.diff(mass) <= 0).all() and not mass[distance > 27.8].any()
    np.testing.assert_allclose(mass, want, rtol=6e-8, atol=1)
    np.testing.assert_array_equal(sampling.masses(np.array([np.nan, np.inf, -1.0], np.float32)), [0, 0, 2**40])


@given(st.integers(0, 2**62 - 1), st.integers(0, 2**31))
def test_shares_are_exact(total: int, parts: int) -> None:
    assert int(sampling.share(np.int64(total), np.int64(parts))) == total * parts >> 31  # type: ignore[arg-type]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 128]))
def test_the_choice_is_what_exact_numbers_say(seed: int, size: int) -> None:
    """Row by row, in Python's integers and fractions."""
    rows = sampling_rows(40, size, np.random.default_rng(seed))
    chosen, whole = drawn(rows)
    for r, (values, tokens, uniform, heat, top_k, top_p, min_p) in enumerate(zip(*rows, strict=True)):
        if heat == 0:
            assert (chosen[r], whole[r]) == (tokens[0], True)
            continue
        if not np.isfinite(values[0]):
            assert not whole[r]
            continue
        mass = [int(m) for m in sampling.masses((values[0] - values) / heat)]
        inside = [i for i in range(size) if not (0 < top_k <= size and values[i] < values[top_k - 1])]
        assert whole[r] == (size - 1 not in inside or mass[-1] == 0)
        nucleus = Fraction(float(np.clip(np.nan_to_num(top_p), 0, 1))) * sum(mass[i] for i in inside)
        inside = [i for n, i in enumerate(inside) if n == 0 or sum(mass[j] for j in inside[:n]) < int(nucleus)]
        least = int(Fraction(float(np.clip(np.nan_to_num(min_p), 0, 1))) * 2**40)
        inside = [i for i in inside if mass[i] >= least]
        aim = sum(mass[i] for i in inside) * int(uniform % 2**31) >> 31
        assert chosen[r] == next(tokens[i] for n, i in enumerate(inside) if sum(mass[j] for j in inside[: n + 1]) > aim)


def test_draws_follow_the_masses() -> None:
    """Every token comes as often as its part of the numbers says, which are all taken in turn."""
    count, values = 1 << 14, np.log(np.array([0.4, 0.3, 0.2, 0.1, 1e-20], np.float32))
    rows = [np.tile(x, (count, 1)) for x in (values, np.arange(5))]
    options = [np.full(count, x, t) for x, t in ((1, "f4"), (4, "i8"), (1, "f4"), (0, "f4"))]
    chosen, whole = drawn([*rows, np.arange(count) << 17, *options])
    np.testing.assert_allclose(np.bincount(chosen, minlength=5) / count, [0.4, 0.3, 0.2, 0.1, 0], atol=1e-4)
    assert whole.all()


def test_a_tie_with_the_last_one_may_go_on() -> None:
    """The last of the highest logits may be chosen, so what is behind them might be, too; but not where nothing has any mass there."""
    values = np.array([[2, 1, 1], [2, 1, 0], [2, 1, 1], [50, 9, 8]], np.float32)
    options = [
        np.array(x, t) for x, t in (([1, 1, 0, 1], "f4"), ([2, 2, 2, 0], "i8"), ([1] * 4, "f4"), ([0] * 4, "f4"))
    ]
    _, whole = drawn([values, np.tile(np.arange(3), (4, 1)), np.zeros(4, np.int64), *options])
    assert whole.tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpus_kernel_draws_the_same(dtype: str, tmp_path: Path) -> None:
    count, size = 400, 70
    operands = sampling_rows(count, size, np.random.default_rng(0), dtype)
    kinds = (dtype, "int64", "int64", "float32", "int64", "float32", "float32")
    nodes = [
        placeholder(f"x{i}", TensorType(x.shape, kind)) for i, (x, kind) in enumerate(zip(operands, kinds, strict=True))
    ]
    both = ops.draw(*nodes)
    graph = Graph(tuple(nodes), (ops.get(both, index=0), ops.get(both, index=1)))
    info = compile_graphs({"main": graph}, Target.resolve("cpu"), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    found = Executable.load(info.library, info.entries).call("main", operands)
    for got, want in zip(found, drawn(operands), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_is_refused() -> None:
    rows = [placeholder(f"x{i}", TensorType((2,), t)) for i, t in enumerate(("int64", "float32", "int64"))]
    values, tokens = (placeholder(n, TensorType((2, 5), t)) for n, t in (("v", "float32"), ("t", "int64")))
    with pytest.raises(TypeRuleError, match="beside values"):
        ops.draw(values, tokens, *rows, rows[1], rows[2])
    with pytest.raises(TypeRuleError, match="float32 or shorter"):
        ops.draw(tokens, tokens, *rows, rows[1], rows[1])
