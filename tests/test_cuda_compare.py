"""The benchmark for GPUs, on an emulated one at tiny shapes: all of it but what the times mean."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jisu.targets.target import Target

CUDA = Path(__file__).parent.parent / "benchmarks" / "cuda"


def script(name: str) -> ModuleType:
    """A file of benchmarks/cuda."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", CUDA / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("bfloat16,int4", marks=pytest.mark.slow)])
def packed(request: pytest.FixtureRequest, emulated_gpu: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    lengths = {"context": 6, "prompt": 20, "batches": [1, 2]}
    script("pack").pack("tiny", emulated_gpu, folder, request.param.split(","), lengths)
    return folder


@pytest.mark.slow
def test_every_part_runs(packed: Path, tmp_path: Path) -> None:
    """In processes of their own; results are compared before they are timed, and everything that is asked for is found."""
    compare, out = script("compare"), tmp_path / "out.json"
    result = compare.compare(packed, None, 500.0, 1, out)
    assert not {n: p["error"] for n, p in result["parts"].items() if "error" in p}
    assert json.loads(out.read_text()) == result and not list(tmp_path.glob("*.part"))
    assert set(result["figures"]) == set(compare.GOALS)
    forms = json.loads((packed / "pack.json").read_text())["forms"]
    missing = {name for name, value in result["figures"].items() if value is None}
    absent = {
        name
        for name in compare.GOALS
        if "int4" in name and "int4" not in forms or "decode_32" in name or "decode_128" in name
    }
    assert missing == {*absent, "decode_1 bfloat16, share in kernels"}
    for cell in (result["parts"][f"decode_{batch}"]["bfloat16"] for batch in (1, 2)):
        assert 0 < cell["apart_from_peer"] < 0.02 and cell["apart_from_prefill"] < 0.02
        assert set(cell["beside torch.compile"]["ratio"]) == {"median", "low", "high"}


def test_what_fails_takes_nothing_else_along(packed: Path, tmp_path: Path) -> None:
    """A part that ends early keeps what it found; wrong results are not timed; time that is up is said; what was found before stays."""
    compare, out = script("compare"), tmp_path / "out.json"
    parts = {"copy": {"bytes_per_s": 5.0}, "prefill": {"bfloat16": {}}}
    out.write_text(json.dumps({"parts": parts}))
    result = compare.compare(packed, ["nonsense", "prefill"], 10.0, 1, out)
    assert result["parts"]["copy"] == parts["copy"] and result["parts"]["prefill"] == parts["prefill"]
    assert "were left" in result["parts"]["nonsense"]["error"]
    assert "KeyError" in compare.run(packed, "nonsense", 1, 100.0)["error"]
    assert "stopped after" in compare.run(packed, "copy", 1, 0.1)["error"]
    (packed / "check.npz").rename(tmp_path / "check.npz")
    result = compare.compare(packed, ["check", "copy"], 500.0, 1, None)
    (tmp_path / "check.npz").rename(packed / "check.npz")
    assert "check.npz" in result["parts"]["check"]["error"] and "wrong results" in result["parts"]["copy"]["error"]


def test_shares_of_time_in_kernels() -> None:
    """Kernels that overlap count once."""
    spans = [(0.0, 4.0), (3.0, 5.0), (6.0, 10.0), (100.0, 104.0), (104.0, 105.0), (105.0, 110.0)]
    assert script("parts").shares(spans, 3) == {"median": 0.95, "least": 0.9, "kernels": 3}


def test_wrong_results_are_errors() -> None:
    parts = script("parts")
    assert parts.apart([1.0, 2.0], [1.0, 2.01]) < 0.01
    for wrong in ([2.0, 1.0], [float("nan"), 2.0]):
        with pytest.raises(ValueError, match="apart"):
            parts.apart(wrong, [1.0, 2.0])
