"""`jisu eval --tasks`: benchmarks of lm-evaluation-harness, run on a compiled program."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from rich.console import Console

from jisu.commands.shell import Shell, table
from jisu.commands.source import Options, open_program, recipe_name
from jisu.compiler.errors import InputError


@attrs.frozen
class Tasks:
    """What is run: names of tasks, examples shown before each question, the most documents per task, sequences read at a time, a folder
    with more tasks, whether prompts go through the chat template, and whether data may be fetched."""

    names: tuple[str, ...]
    shots: int | None = None
    limit: int | None = None
    batch: int = 8
    folder: str | None = None
    chat: bool = False
    download: bool = False


def run(shell: Shell, path: str, tasks: Tasks, options: Options) -> None:
    """Run `tasks` on the program at `path`."""
    if tasks.download:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.pop(name, None)
    else:
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f'--tasks needs lm-evaluation-harness ({error}): pip install "jisu[eval]"') from None
    from jisu.runtime.harness import HarnessModel

    manager = TaskManager(include_path=tasks.folder)
    _check_known(tasks.names, manager)
    program = open_program(shell, path, options).program
    with shell.progress() as tell:
        model = HarnessModel(program, tasks.batch, lambda done: tell("evaluating", done))
        try:
            # Means have closed standard errors; a thousand resamplings are for the rest, such as perplexities.
            told = lm_eval.simple_evaluate(
                model, tasks=list(tasks.names), num_fewshot=tasks.shots, limit=tasks.limit, task_manager=manager,
                apply_chat_template=tasks.chat, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
        except (ConnectionError, FileNotFoundError) as error:
            hint = "" if tasks.download else "; --download lets the harness fetch data that isn't on this machine"
            raise InputError(f"a task's data can't be had: {error}{hint}") from error
    results = list(_results(told))
    recipe = recipe_name(program, options.recipe)
    found = {
        "results": [attrs.asdict(r) for r in results],
        "recipe": recipe,
        "weights_bytes": program.weights_bytes,
        "harness": lm_eval.__version__,
    }

    def show(console: Console) -> None:
        rows = [
            [r.task, str(r.documents), r.metric, f"{r.value:.4f}", "" if r.stderr is None else f"± {r.stderr:.4f}"]
            for r in results
        ]
        title = f"{path} (recipe {recipe}) by lm-evaluation-harness {lm_eval.__version__}"
        console.print(table(title, ("<task", "documents", "<metric", "value", "stderr"), rows))

    shell.finish(found, show)


@attrs.frozen
class Result:
    """One metric of a task: its value over so many documents, and the standard error, where the harness gives one."""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int


def _results(told: Mapping[str, Any]) -> Iterator[Result]:
    """The harness keeps them as {task: {"metric,filter": value, "metric_stderr,filter": error}}."""
    for task, values in told["results"].items():
        count = told.get("n-samples", {}).get(task, {}).get("effective") or sum(
            told["n-samples"][t]["effective"] for t in told.get("group_subtasks", {}).get(task, ())
        )
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield Result(
                task, name, float(value), float(error) if isinstance(error, (int, float)) else None, int(count)
            )


def _check_known(names: Sequence[str], manager: Any) -> None:
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise InputError(f"there is no task {name!r}{'; near: ' + ', '.join(near) if near else ''}")
