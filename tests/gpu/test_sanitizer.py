"""compute-sanitizer finds nothing in programs' launches: neither memory outside, nor races, barriers that not all meet, or memory that nobody wrote.

python -m pytest tests/gpu/test_sanitizer.py    # about two minutes
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

from jisu.compiler.gpu import Driver
from jisu.targets.target import Target

_ERROR = 99


def sanitizer() -> str:
    """The program, which CUDA's toolkit brings."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if found is None:
        pytest.skip("this machine has no compute-sanitizer (CUDA's toolkit has it)")
    return found


@pytest.fixture(scope="module")
def made(present: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if Driver.open().name == "Emulated GPU":
        pytest.skip("compute-sanitizer watches a GPU, not what emulates one")
    sanitizer()
    folder = tmp_path_factory.mktemp("sanitized")
    sanitized.make(present, folder)
    return folder


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool: str, made: Path) -> None:
    command = [
        sanitizer(), "--tool", tool, "--error-exitcode", str(_ERROR), "--print-limit", "20",
        sys.executable, sanitized.__file__, str(made),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if "Device not supported" in said or "not supported on this device" in said:
        pytest.skip("compute-sanitizer can't watch this machine's GPU")
    assert done.returncode == 0, said[-6000:]
    assert all(name in done.stdout for name in sanitized.RECIPES)
