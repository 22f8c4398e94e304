"""What all commands share: where results, progress and errors go, and how a command ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer

from jisu.compiler.errors import CompileError, JisuError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of the work that is done, 0 to 1."""

_PATIENCE_S = 1.0  # work that is done sooner shows no bar


class Shell:
    """Where a command's words go: results to standard output, all else to standard error."""

    def __init__(self, out: TextIO, *, as_json: bool = False, quiet: bool = False) -> None:
        self.out = out
        self.as_json = as_json
        self.quiet = quiet

    def finish(self, result: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: as one JSON object, or as `show` does on a console."""
        if self.as_json:
            self.out.write(to_json(result) + "\n")
        else:
            from rich.console import Console

            width = None if self.out.isatty() else 120
            show(Console(file=self.out, width=width, highlight=False, markup=False))
        self.out.flush()

    def note(self, message: str) -> None:
        """Tell the person at the terminal something that is no result."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar with elapsed and estimated remaining time on a terminal's standard error, for work of some seconds."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda stage, done: None
            return
        bar, tell = _bar()
        timer = threading.Timer(_PATIENCE_S, bar.start)
        timer.daemon = True
        timer.start()
        try:
            yield tell
        finally:
            timer.cancel()
            timer.join()
            bar.stop()


def _bar() -> tuple[Any, Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Remaining(ProgressColumn):
        """Rich estimates from the latest speed; stages that report only at their end have none."""

        def render(self, task: Task) -> Text:
            if not task.completed or task.elapsed is None:
                return Text("remaining: ?", style="dim")
            left = task.elapsed * (1 - task.completed) / task.completed
            return Text(f"about {left:.0f} s left", style="dim")

    columns = (TextColumn("{task.description:20}"), BarColumn(), TimeElapsedColumn(), Remaining())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    task = bar.add_task("starting", total=1.0)
    return bar, lambda stage, done: bar.update(task, description=stage, completed=done)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose columns are left-aligned where their name begins with "<", right-aligned elsewhere."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in columns:
        left = name.startswith("<")
        made.add_column(name.removeprefix("<"), justify="left" if left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def to_json(value: Any) -> str:
    """One line of ASCII JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a NumPy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def peak_rss_bytes() -> int:
    """The most memory that this process has had in RAM, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- How a command begins and ends ---------------------------------------------------------------------------------


@contextlib.contextmanager
def session(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[Shell]:
    """Run a command's body: errors become messages and exit codes, and no temporary file outlives it.

    Raises typer.Exit: 1 after a JisuError or a refusal of the system, 130 after Ctrl-C, 3 after any other exception,
    whose traceback is saved; usage errors pass through.
    """
    try:
        with _short_warnings(), _terminable(), _temporary_folder(), _own_output() as out:
            yield Shell(out, as_json=as_json, quiet=quiet)
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output has left: what a killed `| head` means
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        raise typer.Exit(141) from None
    except (JisuError, OSError, MemoryError) as error:
        message = _sentence(error)
        if debug:
            traceback.print_exc()
        report_error(type(error).__name__, message, as_json)
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}; {_save_traceback()}"
        report_error(type(error).__name__, message, as_json)
        raise typer.Exit(3) from None


def report_error(kind: str, message: str, as_json: bool) -> None:
    """Say an error on standard error, and as an object on standard output where JSON was asked for."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if as_json:
        print(to_json({"error": {"type": kind, "message": message}}), flush=True)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, JisuError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _save_traceback() -> str:
    """Save the current exception's traceback; says where, and what to do with it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jisu-error-", suffix=".txt", delete=False) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sys.version}\n{' '.join(sys.argv)}\n\n")
            traceback.print_exc(file=file)
    except OSError:
        return "run it again with --debug and report what it prints, together with `jisu doctor --json`"
    return f"the traceback is in {file.name}: please report it, together with what `jisu doctor --json` prints"


@contextlib.contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output for results alone: whatever else is printed, by libraries in C too, goes to standard error."""
    stream = sys.stdout
    stream.flush()
    try:
        descriptor = stream.fileno()
        saved = os.dup(descriptor)
        os.dup2(sys.stderr.fileno(), descriptor)
    except (OSError, ValueError):  # a stream in memory, or one that is closed: nothing in C knows it
        with contextlib.redirect_stdout(sys.stderr):
            yield stream
        return
    out = open(saved, "w", encoding=stream.encoding, errors="replace", closefd=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        with contextlib.suppress(BrokenPipeError):
            out.close()
        os.dup2(saved, descriptor)
        os.close(saved)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """A folder for all temporary files, of libraries and child processes too, that goes however the command ends.

    Only after a CompileError it stays: its message names the IR that lies there.
    """
    before, environment = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = tempfile.mkdtemp(prefix="jisu-")
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    keep = False
    try:
        yield
    except CompileError:
        keep = True
        raise
    finally:
        tempfile.tempdir = before
        if environment is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = environment
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the place in our code that means nothing to the user."""
    before = warnings.showwarning

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
