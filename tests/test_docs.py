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


@pytest.mark.slow
def test_case_study_halves_a_network(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run([str(ROOT / "examples" / "case_study.py"), "--quick", "--weights", "weights.pt"], tmp_path)
    table = [line for line in printed.splitlines() if " ± " in line]
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in table}
    assert list(rows) == ["dense", "pruned 50 %", "int8", "pruned 50 %, int8"]
    size, accuracy = ({name: float(row[i]) for name, row in rows.items()} for i in (1, 2))
    assert size["pruned 50 %, int8"] < size["int8"] < size["pruned 50 %"] < size["dense"]
    assert accuracy["dense"] > 0.2 and accuracy["pruned 50 %, int8"] >= 0.97 * accuracy["dense"]
    assert "smallest of those that halve the parameters" in printed and (tmp_path / "weights.pt").exists()
