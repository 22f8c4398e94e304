"""The process that runs TVM: what happens when it crashes, hangs, is forked, and what its cache keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.types import TensorType
from jisu.targets import compile as compiling
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

X = placeholder("x", TensorType((2, 3), "float32"))
GRAPH = Graph((X,), (ops.softmax(X, axis=1),))

CRASHING = """
import json, os, signal, sys
sink = os.fdopen(int(sys.argv[2]), "w")
for line in os.fdopen(int(sys.argv[1])):
    stage = "kernel softmax_2x3" if json.loads(line)["single"] else "code generation"
    sink.write(json.dumps({"stage": stage}) + "\\n")
    sink.flush()
    print("LLVM ERROR: out of registers", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
"""
HANGING = "import time; time.sleep(600)"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> compiling._Worker:
    """A worker of the test's own, so that the session's stays as it is."""
    own = compiling._Worker()
    monkeypatch.setattr(compiling, "_WORKER", own)
    return own


def test_a_crash_names_the_kernel(worker: compiling._Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = compiling._START
    monkeypatch.setattr(compiling, "_START", CRASHING)
    with pytest.raises(jisu.CompileError) as error:
        compile_graphs({"main": GRAPH}, Target.resolve("cpu"), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    for part in ("SIGSEGV", "out of registers", "kernel softmax_2x3", str(tmp_path / "out" / "module.txt")):
        assert part in str(error.value)
    assert not (tmp_path / "cache" / "kernels").exists()
    monkeypatch.setattr(compiling, "_START", start)  # and the next request gets a new process
    compile_graphs({"main": GRAPH}, Target.resolve("cpu"), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    worker.stop()


def test_a_hang_is_an_error(worker: compiling._Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "_START", HANGING)
    with pytest.raises(jisu.CompileError, match="longer than 1 s"):
        compile_graphs({"main": GRAPH}, Target.resolve("cpu"), out=tmp_path, cache_dir=tmp_path / "cache", timeout=1.0)
    assert worker.process is None


def test_a_forked_child_has_a_worker_of_its_own(tmp_path: Path) -> None:
    """Parent and child compile different graphs at once; neither takes the other's answer."""
    code = """
import os, sys
from pathlib import Path
from jisu.compiler import ops
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.types import TensorType
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

def build(op, name):
    x = placeholder("x", TensorType((2, 3), "float32"))
    out = Path(sys.argv[1]) / name
    found = compile_graphs({name: Graph((x,), (op(x),))}, Target.resolve("cpu"), out=out, cache_dir=out / "cache")
    assert name in found.entries, found

build(ops.exp, "before")
pid = os.fork()
build(ops.tanh, "child") if pid == 0 else build(ops.sin, "parent")
if pid == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
build(ops.cos, "after")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch, jisu; from jisu.targets import compile as c;"
        "jisu.compile(torch.nn.ReLU(), example_inputs=(torch.ones(2),), cache_dir=sys.argv[1]);"
        "print(c._WORKER.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        import time

        time.sleep(0.1)
    pytest.fail("the compiler process is still there")


def test_the_cache_forgets_what_was_not_used_longest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    for i, name in enumerate("abcd"):
        (folder / name).mkdir(parents=True)
        (folder / name / "library.so").write_bytes(b"x" * 1000)
        os.utime(folder / name, (i, i))
    (folder / "new-x").mkdir()  # what another process is writing
    compiling.prune(folder, 2500)
    assert sorted(p.name for p in folder.iterdir()) == ["c", "d", "new-x"]
    compiling.prune(folder, 0)
    assert sorted(p.name for p in folder.iterdir()) == ["new-x"]
