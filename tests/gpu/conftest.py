"""The tests of programs for GPUs once more, on the GPU of this machine; skipped where there is none."""

from __future__ import annotations

import pytest

from jisu.compiler.errors import TargetError
from jisu.targets.target import Target


@pytest.fixture(scope="session")
def emulated_gpu() -> Target:
    """In place of the emulated one."""
    try:
        return Target.resolve("cuda")
    except TargetError as error:
        pytest.skip(f"no GPU to run on: {error}")
