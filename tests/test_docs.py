"""Every Python block of the documents runs, and so do the examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name in DOCUMENTS
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
]


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path) -> None:
    run(["-c", block], tmp_path)


@pytest.mark.parametrize("name", ["quickstart.py", "own_rule.py"])
def test_example_runs(name: str, tmp_path: Path) -> None:
    run([str(ROOT / "examples" / name)], tmp_path)
