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
    """Operands of `draw`: rows of all kinds, ties, flat ones, steep ones, huge ones, and such as are no distribution; options inside and outside their
    ranges."""
    scale = rng.choice([0.0, 1e-3, 0.1, 1.0, 3.0, 30.0, 1e4], (count, 1))
    logits = rng.standard_normal((count, size)) * scale
    logits = np.where(rng.random((count, 1)) < 0.5, np.round(logits), logits).astype(np.float32)
    logits[rng.random((count, size)) < 0.02] = -np.inf
    logits[rng.random((count, size)) < 0.02] = -0.0
    for row, odd in zip(range(count // 8), (np.nan, np.inf, -np.inf) * count, strict=False):
        logits[row, rng.random(size) < (1.0 if row % 2 else 0.3)] = odd
    uniform = rng.integers(0, 1 << 31, count)
    uniform[:4] = 0, (1 << 31) - 1, -1, 1 << 40
    temperature = rng.choice([0.0, 2e-38, 0.2, 0.7, 1.0, 1.3, 5.0, 1e30], count).astype(np.float32)
    top_k = rng.choice([0, 1, 2, size // 2, size - 1, size, size + 1, -3], count).astype(np.int64)
    top_p, min_p = (rng.choice([a, 0.1, 0.5, 0.9, 0.999, b], count).astype(np.float32) for a, b in ((0.0, 1.0), (0, 0)))
    top_p[-3:] = np.nan, -1, 2
    min_p[-6:-3] = np.nan, -1, 2
    return [logits.astype(numpy_dtype(dtype)), uniform, temperature, top_k, top_p, min_p]


def plainly(
    logits: Array, uniform: int, heat: np.float32, top_k: int, top_p: np.float32, min_p: np.float32
) -> tuple[int, bool]:
    """What `draw` chooses of one row, as its text says."""
    with np.errstate(all="ignore"):
        logits = logits.astype(np.float32)
        highest, first = logits.max(), int(logits.argmax())
        if heat == 0 or not np.isfinite(highest):
            return first, bool(heat == 0)
        mass = sampling.masses((highest - logits) / heat)
    nucleus, likely = (Fraction(float(np.clip(np.nan_to_num(x), 0, 1))) for x in (top_p, min_p))
    inside = np.ones(logits.size, bool)
    if 0 < top_k < logits.size:
        inside = logits >= np.sort(logits)[-top_k]
    before = np.array([mass[inside & (logits > v)].sum() for v in logits])
    inside &= (logits == highest) | (before < int(nucleus * int(mass[inside].sum())))
    inside &= mass >= int(likely * 2**40)
    aim = int(mass[inside].sum()) * (int(uniform) % 2**31) >> 31
    return int(np.argmax(np.cumsum(np.where(inside, mass, 0)) > aim)), True


def drawn(operands: list[Array]) -> tuple[Array, Array]:
    assert ops.draw.meaning is not None
    token, sound = ops.draw.meaning(*operands)
    return token, sound


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
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 90]), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_the_choice_is_what_exact_numbers_say(seed: int, size: int, dtype: str) -> None:
    rows = sampling_rows(24, size, np.random.default_rng(seed), dtype)
    tokens, sound = drawn(rows)
    assert list(zip(tokens, sound, strict=True)) == [plainly(*row) for row in zip(*rows, strict=True)]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 4.0])
def test_the_choice_among_many(scale: float) -> None:
    """Where not all logits are put in order."""
    rng, size = np.random.default_rng(int(scale)), 1500
    logits = (rng.standard_normal(size) * scale).astype(np.float32)
    for top_k, top_p, min_p in ((0, 0.3, 0), (7, 1, 0), (400, 0.95, 0), (0, 0.999, 0.01), (0, 1, 0)):
        row = (logits, 123456789, np.float32(1), top_k, np.float32(top_p), np.float32(min_p))
        for values in (logits, np.sort(logits), np.round(logits * 4) / 4):
            assert sampling.choose(values, *row[1:]) == plainly(values, *row[1:])[0]


def test_draws_follow_the_masses() -> None:
    """Every token comes as often as its part of the numbers says, which are all taken in turn."""
    count, logits = 1 << 14, np.log(np.array([0.4, 0.3, 1e-20, 0.2, 0.1], np.float32))
    options = [np.full(count, x, t) for x, t in ((1, "f4"), (0, "i8"), (1, "f4"), (0, "f4"))]
    tokens, sound = drawn([np.tile(logits, (count, 1)), np.arange(count) << 17, *options])
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / count, [0.4, 0.3, 0, 0.2, 0.1], atol=1e-4)
    assert sound.all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpus_kernel_draws_the_same(dtype: str, tmp_path: Path) -> None:
    count, size = 400, 70
    operands = sampling_rows(count, size, np.random.default_rng(0), dtype)
    kinds = (dtype, "int64", "float32", "int64", "float32", "float32")
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
    whole, real = (placeholder(t, TensorType((2,), t)) for t in ("int64", "float32"))
    logits, tokens, most = (
        placeholder(n, TensorType((2, size), t))
        for n, t, size in (("v", "float32", 5), ("t", "int64", 5), ("m", "float32", 1 << 23))
    )
    with pytest.raises(TypeRuleError, match="beside logits"):
        ops.draw(logits, whole, real, real, real, real)
    with pytest.raises(TypeRuleError, match="float32 or shorter"):
        ops.draw(tokens, whole, real, whole, real, real)
    with pytest.raises(TypeRuleError, match="at most 4194304 tokens"):
        ops.draw(most, whole, real, whole, real, real)
