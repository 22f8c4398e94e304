"""`jisu demo`: the bundled model writes text, and races PyTorch's eager mode on the same weights, dtype and threads."""

from __future__ import annotations

import statistics
import time
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import jisu
from jisu.commands.bench import spread
from jisu.commands.shell import Shell
from jisu.commands.source import Options, compile_checkpoint
from jisu.commands.units import seconds

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.commands.eager import Eager
    from jisu.runtime.program import Program

PROMPT = "When a module is imported"
SEED = 3
TEXT_TOKENS = 80
RACE_TOKENS, RACES = 64, 5
_BUSY = 0.2  # cores; a quiet machine's services use less
_PAUSE_S = 0.2  # in which the other side's idle threads stop spinning


def run(shell: Shell, threads: int | None) -> None:
    """Compile the bundled model, let it write, and measure it against eager mode, turn by turn."""
    with resources.as_file(resources.files("jisu") / "demo") as folder:
        opened = compile_checkpoint(shell, str(folder), Options(threads=threads))
        program = opened.program
        written = program.generate(PROMPT, max_new_tokens=TEXT_TOKENS, seed=SEED)
        text = f"{PROMPT}{written}"
        with _Others() as others:
            ours, theirs = _race(shell, program, folder)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    result: dict[str, Any] = {
        "text": text,
        **spread("decode_tokens_per_s", ours),
        **spread("eager_decode_tokens_per_s", theirs),
        **spread("ratio", ratios),
        "ratio_of_best": max(ours) / max(theirs),
        "cores_used_by_others": others.cores,
        "threads": program.num_threads,
        "dtype": "bfloat16",
        "prompt_tokens": len(program.tokenizer.encode(PROMPT)),
        "tokens": RACE_TOKENS,
        "repeat": RACES,
        "compile_s": opened.compile_s,
        "versions": {
            "jisu": jisu.__version__,
            **{n: metadata.version(n) for n in ("torch", "transformers", "apache-tvm")},
        },
    }

    def show(console: Console) -> None:
        console.print(f"{text}\n")
        console.print(
            f"compiled in {seconds(opened.compile_s)}; then greedy decoding, bfloat16, {program.num_threads} threads,"
        )
        console.print(f"median of {RACES} runs of {RACE_TOKENS} tokens each, taken in turn (smallest to largest):")
        for name, values in (("jisu", ours), ("PyTorch eager", theirs)):
            middle = statistics.median(values)
            console.print(f"  {name:14} {middle:8,.0f} tokens/s  ({min(values):,.0f} to {max(values):,.0f})")
        console.print(
            f"  {'ratio':14} {statistics.median(ratios):8.1f}           ({min(ratios):.1f} to {max(ratios):.1f})"
        )

    shell.finish(result, show)
    if others.cores > _BUSY:
        shell.note(
            f"warning: other programs used {others.cores:.1f} cores meanwhile; threads that wait for each other suffer "
            "from that, PyTorch's more than ours, so run this on an idle machine before you quote the ratio"
        )


class _Others:
    """How many cores other programs used, on average, while a `with` block ran."""

    cores = 0.0

    def __enter__(self) -> _Others:
        self._begin, self._before = time.perf_counter(), self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = max(self._seconds() - self._before, 0.0) / (time.perf_counter() - self._begin)

    @staticmethod
    def _seconds() -> float:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return float(every.user + every.nice + every.system - own.user - own.system)


def _race(shell: Shell, program: Program, folder: Path) -> tuple[list[float], list[float]]:
    """Greedy decode speeds in tokens/s of us and of eager mode, in turn; the first round is not counted."""
    from jisu.commands.eager import Eager

    eager = Eager(folder, program.num_threads)
    ids = program.tokenizer.encode(PROMPT)
    ours, theirs = [], []
    with shell.progress() as tell:
        for turn in range(RACES + 1):
            a, b = _ours(program, ids), _theirs(eager, ids)
            tell("measuring", (turn + 1) / (RACES + 1))
            if turn:
                ours.append(a)
                theirs.append(b)
    return ours, theirs


def _ours(program: Program, ids: list[int]) -> float:
    time.sleep(_PAUSE_S)
    session = program.session(len(ids) + RACE_TOKENS)
    logits = session.append(np.array([ids]), last_only=True)
    token = logits[:, -1].argmax(-1)
    begin = time.perf_counter()
    for _ in range(RACE_TOKENS - 1):
        token = session.append(token[:, None], last_only=True)[:, -1].argmax(-1)
    return (RACE_TOKENS - 1) / (time.perf_counter() - begin)


def _theirs(eager: Eager, ids: list[int]) -> float:
    time.sleep(_PAUSE_S)
    return eager.decode_tokens_per_s(ids, RACE_TOKENS)
