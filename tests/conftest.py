"""Hypothesis draws the same examples on every run; `--update-golden` rewrites the files in tests/golden."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, settings

from jisu.compiler.errors import TargetError
from jisu.compiler.gpu import DRIVER, Driver
from jisu.targets.target import Target, host
from jisu.targets.worker import _BARE_LINKERS, find_linker

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # every core has a process already: PyTorch's threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ci")

GOLDEN = Path(__file__).parent / "golden"
DEMO = Path(__file__).parent.parent / "jisu" / "demo"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt with what the tests give")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """`golden(name, value)`: str(value) is what stands in tests/golden/<name>.txt."""

    def check(name: str, value: object) -> None:
        path, text = GOLDEN / f"{name}.txt", f"{value}\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; run pytest --update-golden and look at what it wrote"
        assert text == path.read_text(encoding="utf-8"), (
            f"differs from {path}; if that is meant: pytest --update-golden"
        )

    return check


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a fixed seed and the bundled tokenizer."""
    import torch
    import transformers as hf

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def built_library(source: str, folder: Path) -> Path:
    """A C++ file of this folder, compiled to a library in `folder`."""
    if find_linker()[0] in _BARE_LINKERS:
        pytest.skip("this machine has no C++ compiler")
    out = folder / "emulated.so"
    command = [*find_linker(), "-O1", "-std=c++17", "-o", str(out), str(Path(__file__).with_name(source))]
    subprocess.run(command, check=True)
    return out


def emulation(source: str, folder: Path) -> ctypes.CDLL:
    """A C++ file of this folder as a library in `folder` whose functions kernels in this process find."""
    return ctypes.CDLL(str(built_library(source, folder)), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVIDIA's driver over an emulated GPU."""
    return built_library("emulated_driver.cc", tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def emulated_driver(driver_library: Path) -> Iterator[ctypes.CDLL]:
    """The same, which the run time takes for this machine's while a module's tests run."""
    before = os.environ.get(DRIVER)
    os.environ[DRIVER] = str(driver_library)
    yield ctypes.CDLL(str(driver_library))
    if before is None:
        del os.environ[DRIVER]
    else:
        os.environ[DRIVER] = before


@pytest.fixture(scope="module")
def emulated_gpu(emulated_driver: ctypes.CDLL) -> Target:
    """A target whose programs run on the emulated GPU."""
    return attrs.evolve(Target.describe("cuda:sm_90"), name="cuda:emulated", mcpu="sm_90", triple=host().triple)


@pytest.fixture(scope="session")
def present() -> Target:
    """This machine's GPU, on which tests/gpu runs; JISU_CUDA_DRIVER may name the emulated driver instead (emulated_driver.cc, compiled)."""
    try:
        target = Target.resolve("cuda")
    except TargetError as error:
        pytest.skip(f"no GPU to run on: {error}")
    return attrs.evolve(target, triple=host().triple) if Driver.open().name == "Emulated GPU" else target
