"""Every Python block of the documents runs and prints the text block behind it; and the examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.S | re.M)
BLOCKS = [
    pytest.param(*match.groups(), id=f"{name}-{i}")
    for name in DOCUMENTS
    for i, match in enumerate(BLOCK.finditer((ROOT / name).read_text(encoding="utf-8")))
]


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("block", "shown"), BLOCKS)
def test_block_runs(block: str, shown: str | None, tmp_path: Path) -> None:
    printed = run(["-c", block], tmp_path)
    assert shown is None or printed == shown


@pytest.mark.parametrize("name", ["quickstart.py", "own_rule.py"])
def test_example_runs(name: str, tmp_path: Path) -> None:
    run([str(ROOT / "examples" / name)], tmp_path)
