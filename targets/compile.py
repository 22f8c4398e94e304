"""From graphs to a shared library, by TVM in a process of its own, behind a compile cache.

TVM and LLVM can crash on a kernel; in the child that is an error with a name, here it would be the end of the user's
process. The child is started at the first compilation and kept, since importing TVM takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import Graph
from jisu.compiler.storage import cache_folder
from jisu.targets.cuda.assembler import which_assembler
from jisu.targets.schedule import Schedules
from jisu.targets.target import Target

LIBRARY = "library.so"
INFO = "info.json"
IR = "module.txt"
TIMEOUT = 1800.0
KEPT_BYTES = 2 << 30
"""How much the cache of compiled libraries may hold."""
_STAGING = "new-"
_FORMAT = 4
_ROOT = Path(__file__).resolve().parent.parent


@attrs.frozen
class CompiledInfo:
    """Compiled graphs.

    folder: where the files lie that run: a library, or a GPU's kernels and plans. entries: how each entry is called. kernels: (name, ops,
    calls, what does it where the shapes of a call decide). seconds: how long this call took; cached: whether the files came from the cache.
    """

    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    kernels: tuple[tuple[str, str, int, tuple[str, ...]], ...]
    seconds: float
    cached: bool

    @property
    def library(self) -> Path:
        """The shared library of a CPU's kernels."""
        return self.folder / LIBRARY

    def code(self) -> dict[str, bytes]:
        """The files' contents by name."""
        return {name: (self.folder / name).read_bytes() for name in self.files}


def compile_graphs(
    entries: Mapping[str, Graph],
    target: Target,
    *,
    out: Path,
    schedules: Schedules | None = None,
    cache_dir: Path | None = None,
    timeout: float = TIMEOUT,
) -> CompiledInfo:
    """Compile the graphs into `out`: as entry functions of one library, library.so, or as kernels for a GPU and plans of their launches.

    Kernels named in `schedules` follow those. `cache_dir` (default: the environment's JISU_CACHE_DIR, else ~/.cache/jisu) keeps libraries by content. Raises
    CompileError where TVM fails, crashes (naming the kernel) or takes longer than `timeout` seconds, or where the machine
    has no linker.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    texts = {name: str(graph) for name, graph in entries.items()}
    cuts = {key: schedule.to_json() for key, schedule in sorted((schedules or {}).items())}
    key = _key(texts, target, cuts)
    folder = cache_folder(cache_dir) / "kernels" / hashlib.sha256(key.encode()).hexdigest()
    found = _read(folder, key)
    if found is not None and all(_copy(folder / name, out / name, digest) for name, digest in found["sha256"].items()):
        return _info(found["info"], out, begin, cached=True)
    info = _WORKER.compile(texts, target, cuts, out, timeout)
    _write(folder, key, info, out)
    return _info(info, out, begin, cached=False)


def _info(info: Mapping[str, Any], out: Path, begin: float, cached: bool) -> CompiledInfo:
    return CompiledInfo(
        folder=out,
        files=tuple(info["files"]),
        entries={name: Entry.from_json(entry) for name, entry in info["entries"].items()},
        kernels=tuple((name, op, count, tuple(choices)) for name, op, count, choices in info["kernels"]),
        seconds=time.perf_counter() - begin,
        cached=cached,
    )


# --- The cache ------------------------------------------------------------------------------------------------------


@functools.cache
def _sources() -> str:
    """A hash of the code that decides what kernels look like."""
    digest = hashlib.sha256()
    for room in ("compiler", "targets"):
        for path in sorted((_ROOT / room).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in ("jisu", "apache-tvm", "apache-tvm-ffi"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _key(texts: Mapping[str, str], target: Target, schedules: Mapping[str, Any]) -> str:
    """Everything that the library depends on, as text; LLVM comes with TVM's wheel, so that its version is TVM's."""
    parts = {
        "format": _FORMAT,
        "entries": dict(texts),
        "target": target.fingerprint(),
        "schedules": dict(schedules),
        **({"assembler": which_assembler()} if target.kind == "cuda" else {}),
        **produced_by(),
    }
    return json.dumps(parts)


def produced_by() -> dict[str, Any]:
    """What kernels' code depends on besides graph, target and schedules."""
    return {"versions": _versions(), "sources": _sources()}


def _read(folder: Path, key: str) -> dict[str, Any] | None:
    """The entry in `folder` if it is whole and was made for exactly this key."""
    try:
        entry = json.loads((folder / INFO).read_bytes())
        if (
            isinstance(entry, dict)
            and entry.get("key") == key
            and isinstance(entry.get("sha256"), dict)
            and "info" in entry
        ):
            with contextlib.suppress(OSError):  # a cache that can't be written serves all the same
                os.utime(folder)  # used just now
            return entry
    except (OSError, ValueError):
        pass
    return None


def _copy(source: Path, destination: Path, digest: str) -> bool:
    """Copy a file if its checksum is right; a damaged cache entry is no error, but a miss."""
    try:
        data = source.read_bytes()
    except OSError:
        return False
    if hashlib.sha256(data).hexdigest() != digest:
        return False
    destination.write_bytes(data)
    return True


def _write(folder: Path, key: str, info: Mapping[str, Any], made: Path) -> None:
    """Put an entry into the cache in one step; a cache that can't be written is no reason to fail."""
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder.parent))
        code = {name: (made / name).read_bytes() for name in info["files"]}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in code.items()}
        entry = {"key": key, "sha256": digests, "info": dict(info)}
        for name, content in (*code.items(), (INFO, json.dumps(entry).encode())):
            with open(staging / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists() and not _whole(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(staging, folder)
        prune(folder.parent)
    except OSError:
        if staging is not None:  # another process was faster, or the disk is full or read-only
            shutil.rmtree(staging, ignore_errors=True)


def prune(folder: Path, limit: int = KEPT_BYTES) -> None:
    """Drop the entries of a cache that were not used for longest until the rest fits `limit` bytes.

    What other processes are just writing stays, and an entry that is gone is only a miss to whoever looks for it.
    """
    entries = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):  # another process drops entries, too
            if not entry.name.startswith(_STAGING):
                entries.append((entry.stat().st_mtime, sum(f.stat().st_size for f in entry.iterdir()), entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries, key=lambda e: e[0]):
        if total <= limit:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= size


def _whole(folder: Path, key: str) -> bool:
    entry = _read(folder, key)
    try:
        return entry is not None and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in entry["sha256"].items()
        )
    except OSError:
        return False


# --- The worker -----------------------------------------------------------------------------------------------------

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from jisu.targets.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class _Worker:
    """The process that runs TVM, one per process, one request at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.log: Any = None
        self.requests = self.answers = -1

    def compile(
        self, texts: Mapping[str, str], target: Target, schedules: Mapping[str, Any], out: Path, timeout: float
    ) -> dict[str, Any]:
        """The worker's answer; raises CompileError where it fails or dies."""
        request = {
            "entries": dict(texts), "target": target.to_json(), "schedules": dict(schedules), "out": str(out.resolve()),
            "single": False,
        }  # fmt: skip
        with self.lock:
            try:
                return self.ask(request, timeout)
            except _Died as death:
                raise CompileError(
                    f"TVM crashed ({death.reason}) on {self.culprit(request, death.stage, timeout)}; "
                    f"the IR is in {out.resolve() / IR}"
                ) from None

    def culprit(self, request: Mapping[str, Any], stage: str, timeout: float) -> str:
        """Which kernel TVM doesn't survive, found by compiling one after the other in a new process."""
        if stage != "code generation":
            return f"the stage {stage!r}"
        try:
            self.ask({**request, "single": True}, timeout)
        except _Died as death:
            return death.stage
        except CompileError as error:
            return str(error)
        return f"the stage {stage!r}"

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        stage = "starting"
        deadline = time.monotonic() + timeout
        try:
            self.send(json.dumps(request).encode() + b"\n")
            for line in self.lines(deadline):
                message = json.loads(line)
                if "stage" in message:
                    stage = message["stage"]
                elif "result" in message:
                    result: dict[str, Any] = message["result"]
                    return result
                else:
                    prefix = (
                        "" if message["kind"] == "CompileError" else f"TVM failed while {stage}: {message['kind']}: "
                    )
                    raise CompileError(f"{prefix}{message['error'][-4000:]} (IR in {Path(request['out']) / IR})")
        except TimeoutError:
            self.stop()
            raise CompileError(
                f"TVM took longer than {timeout:.0f} s ({stage}); the IR is in {request['out']}/{IR}"
            ) from None
        except (BrokenPipeError, ConnectionError):
            pass
        except BaseException:  # the answer to an interrupted request would be taken for the next one's
            if not isinstance(sys.exc_info()[1], CompileError):
                self.stop()
            raise
        raise _Died(stage, self.reason())

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.requests, view) :]

    def lines(self, deadline: float) -> Any:
        """The lines that the worker writes, until it closes its end."""
        pending = b""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            poll = select.poll()
            poll.register(self.answers, select.POLLIN)
            if not poll.poll(min(left, 3600) * 1000):
                continue
            chunk = os.read(self.answers, 1 << 16)
            if not chunk:
                return
            *whole, pending = (pending + chunk).split(b"\n")
            yield from whole

    def start(self) -> None:
        """Start the process: in a session of its own, so that Ctrl-C reaches this process alone, which then ends it."""
        self.stop()
        if not sys.executable:
            raise CompileError("can't start the compiler process: Python doesn't know its own executable")
        theirs, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        self.log = tempfile.TemporaryFile()
        environment = {**os.environ, "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(theirs), str(answers), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=(theirs, answers),
                start_new_session=True,
                env=environment,
            )
        except OSError as error:
            raise CompileError(f"can't start the compiler process: {error}") from error
        finally:
            os.close(theirs)
            os.close(answers)

    def reason(self) -> str:
        """How the process ended, with the last that it wrote."""
        assert self.process is not None
        code = self.process.wait()
        self.log.seek(0)
        tail = self.log.read()[-1500:].decode(errors="replace").strip()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}: {tail}" if tail else how

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.log.close()
            for descriptor in (self.requests, self.answers):
                os.close(descriptor)
            self.process = None

    def forget(self) -> None:
        """After a fork, the worker is the parent's: drop it without a word to it."""
        self.lock = threading.Lock()
        if self.process is not None:
            for descriptor in (self.requests, self.answers):
                os.close(descriptor)
            self.process.returncode = 0  # not our child: never wait for it
            self.process = None


class _Died(Exception):
    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage, self.reason = stage, reason


_WORKER = _Worker()
atexit.register(_WORKER.stop)
os.register_at_fork(after_in_child=_WORKER.forget)
