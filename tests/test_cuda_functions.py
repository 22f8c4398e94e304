"""Functions of float32 on NVIDIA GPUs, which compute them themselves: within 2 ulp, over all magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_models import run_all

from jisu.compiler import ops
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.types import TensorType, symbol
from jisu.runtime.cuda import DeviceExecutable
from jisu.targets.cuda import ptx
from jisu.targets.cuda.lowering import lower
from jisu.targets.target import Target

FUNCTIONS: dict[str, Callable[..., object]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "tanh": np.tanh, "erf": np.vectorize(math.erf), "sin": np.sin, "cos": np.cos,
}  # fmt: skip


def graphs() -> dict[str, Graph]:
    x = placeholder("x", TensorType((symbol("n"),), "float32"))
    return {name: Graph((x,), (ops.OPS[name](x),)) for name in FUNCTIONS}


@pytest.fixture(scope="module")
def run(emulated_gpu: Target, tmp_path_factory: pytest.TempPathFactory) -> DeviceExecutable:
    return run_all(graphs(), emulated_gpu, tmp_path_factory.mktemp("functions"))


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """How many units in a float32's last place (of subnormal numbers: their one) results are off from float64 ones."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(np.float32)
        unit = np.spacing(np.maximum(np.abs(rounded), np.float32(2.0**-126))).astype(np.float64)
        off = np.abs(got.astype(np.float64) - want) / unit
    same = (got == rounded) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isfinite(off), off, np.inf))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_magnitudes(name: str, run: DeviceExecutable) -> None:
    """Each 16381st number of both signs, and closer where functions turn; angles up to the largest float."""
    bits = np.concatenate([np.arange(0, 0x7F800001, 16381), np.arange(0x38000000, 0x42B00000, 4093)]).astype(np.uint32)
    x = np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)
    (got,) = run.call(name, [x])
    with np.errstate(all="ignore"):
        want = np.asarray(FUNCTIONS[name](x.astype(np.float64)), np.float64)
    off = ulps(np.asarray(got), want)
    worst = int(off.argmax())
    assert off[worst] <= 2.0, (x[worst], np.asarray(got)[worst], want[worst], off[worst])


def test_angles_near_quarter_turns(run: DeviceExecutable) -> None:
    """Where sine or cosine is nearly 0, up to where one step is many turns, against mpmath; the positions of long contexts among them."""
    k = np.concatenate([np.arange(1, 3000), np.logspace(3.5, 37, 1500)])
    near = (k * (math.pi / 2)).astype(np.float32)
    x = np.concatenate([near, np.nextafter(near, np.float32(0)), -near, np.arange(60000, 70000, 7).astype(np.float32)])
    with mpmath.workdps(80):
        for name, function in (("sin", mpmath.sin), ("cos", mpmath.cos)):
            (got,) = run.call(name, [x])
            want = np.array([float(function(mpmath.mpf(float(v)))) for v in x])
            assert ulps(np.asarray(got), want).max() <= 2.0, name


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(FUNCTIONS)), numbers=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_numbers(name: str, numbers: list[float], run: DeviceExecutable) -> None:
    """NaN, infinities, zeros and subnormal numbers as they come."""
    x = np.array(numbers, np.float32)
    (got,) = run.call(name, [x])
    with np.errstate(all="ignore"):
        want = np.asarray(FUNCTIONS[name](x.astype(np.float64)), np.float64)
    assert ulps(np.asarray(got), want).max() <= 2.0
    if name in ("sin", "erf"):
        np.testing.assert_array_equal(np.signbit(got[x == 0]), np.signbit(x[x == 0]))


def test_no_doubles(emulated_gpu: Target) -> None:
    """None in the PTX of these functions of float32."""
    target = attrs.evolve(Target.describe("cuda:sm_90"), mcpu="sm_90")
    found = lower(graphs(), target)
    text = ptx.to_ptx(found.written, target, found.functions)
    assert "fma.rn.f32" in text and ".f64" not in text and ".local" not in text
