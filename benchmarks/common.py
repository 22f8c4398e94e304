"""What benchmarks share: the machine described, the noise on it, workers to talk to, and statistics of pairs."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

WORKER = Path(__file__).with_name("worker.py")
FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
PACKAGES = ("jisu", "torch", "transformers", "apache-tvm", "apache-tvm-ffi", "numpy")


class WorkerError(RuntimeError):
    """A worker ended before it answered; the message holds the last lines that it wrote."""


@attrs.frozen
class Spread:
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one number."""
        return cls(statistics.median(values), min(values), max(values))

    def format(self, digits: int) -> str:
        """As "median (low..high)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def machine() -> dict[str, Any]:
    """The processor, its cores, the features that matter to kernels, memory in bytes, and the system."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

    def first(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
        return found.group(1) if found else ""

    flags = set(first("flags").split())
    return {
        "cpu": first("model name") or platform.processor(),
        "family_model": f"{first('cpu family')}/{first('model')}",
        "cores": len(os.sched_getaffinity(0)),
        "features": [f for f in FEATURES if f in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that are compared."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used, steal excluded; 10 ms resolution."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = (int(f) for f in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A process that serves requests one at a time."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        script: Path = WORKER,
        python: str = sys.executable,
    ) -> None:
        """arguments: of the script. environment: added to this process's own. log: where its standard error goes."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def answer(self) -> dict[str, Any]:
        """The next answer; raises WorkerError where the process ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text().splitlines()[-12:])
            raise WorkerError(f"a worker ended with status {code}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why it ended
        return self.answer()

    def measure(self, **request: Any) -> dict[str, Any]:
        """`ask`, with `foreign`: the cores that other processes kept busy meanwhile, on average."""
        time.sleep(0.02)  # thread pools of the engine whose turn it was stop spinning
        begin, busy = time.perf_counter(), busy_seconds()
        found = self.ask(**request)
        wall = time.perf_counter() - begin
        own = sum(v for k, v in found.items() if k.endswith("_cpu_s"))
        return {**found, "foreign": max(0.0, busy_seconds() - busy - own) / wall}


def one_answer(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    """The answer of a worker that gives one and ends."""
    with Worker(arguments, environment, log) as worker:
        return worker.answer()


def seconds(run: Callable[[], object], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs, after one that warms up."""
    run()
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return found


def paired_ratio(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of mine/theirs, round by round: noise that slows a whole round cancels."""
    return Spread.of([a / b for a, b in zip(mine, theirs, strict=True)])
