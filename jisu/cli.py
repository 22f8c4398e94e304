"""The command line: commands and their options. What they do is in `jisu.commands`, imported when it is needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, cast

import attrs
import typer

from jisu import __version__
from jisu.commands.shell import Shell, report_error, session
from jisu.commands.source import Options

app = typer.Typer(
    name="jisu",
    help="Compile PyTorch language models for fast inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True, help="Show or check recipes.")
app.add_typer(recipe_app, name="recipe")

# Typer's own base class of wrong usage; it has no public name in all versions that we accept.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel="Output")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no notes.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local checkpoint folder (config.json and safetensors).")]
Either = Annotated[str, typer.Argument(metavar="DIR|MODEL", help="A saved program, or a local checkpoint folder.")]
Target = Annotated[str | None, typer.Option(help="The machine to compile for; default: cpu, this machine.")]
Recipe = Annotated[str | None, typer.Option(help="A preset's name or a TOML file; see `jisu recipe show`.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the kernels; default: all cores.")]
CacheDir = Annotated[
    str | None,
    typer.Option(help="Where compiled kernels are kept; default: $JISU_CACHE_DIR or ~/.cache/jisu."),
]


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        return int(app(list(arguments), prog_name="jisu", standalone_mode=False) or 0)
    except _UsageError as error:
        message = str(getattr(error, "format_message", error.__str__)())
        if "--json" in arguments:
            report_error("UsageError", message, as_json=True)
        else:
            getattr(error, "show")()  # noqa: B009
        return 2
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        return 130


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jisu {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile PyTorch language models for fast inference."""


_OUTPUT = {"as_json": (Json, False), "quiet": (Quiet, False), "debug": (Debug, False)}
_COMPILING = {
    "target": (Target, None),
    "recipe": (Recipe, None),
    "threads": (Threads, None),
    "cache_dir": (CacheDir, None),
}


def _command(name: str, group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register function(shell, …) as the command `name`, with the options that all commands have.

    A function whose second parameter is `options` is also given those that say how a checkpoint is compiled.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        names = list(inspect.signature(function).parameters)
        compiles = "options" in names
        own = [
            p for n, p in inspect.signature(function, eval_str=True).parameters.items() if n not in ("shell", "options")
        ]
        shared = {**(_COMPILING if compiles else {}), **_OUTPUT}
        extra = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for n, (kind, default) in shared.items()
        ]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            output = {n: given.pop(n) for n in _OUTPUT}
            options = {"options": Options(**{n: given.pop(n) for n in _COMPILING})} if compiles else {}
            with session(**output) as shell:
                function(shell, **options, **given)

        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        setattr(run, "__signature__", inspect.Signature([*keywords, *extra]))  # noqa: B010
        run.__annotations__ = {p.name: p.annotation for p in (*keywords, *extra)}
        group.command(name)(run)
        return function

    return register


@_command("compile")
def compile_command(
    shell: Shell,
    options: Options,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="A folder, or a file such as model.jisu.")],
    check: Annotated[
        Literal["verify", "numeric", "none"],
        typer.Option(help="After each pass: verify the IR, also compare its meaning (slow), or neither."),
    ] = "verify",
    dump: Annotated[str | None, typer.Option(metavar="DIR", help="Write the IR after each pass.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text on which a recipe that compresses keeps the layers' outputs."),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help=r"Text on which a recipe with \[recover] trains; default: the calibration text."
        ),
    ] = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Also measure what each compressed matrix costs, for `jisu explain`.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure variants of kernels on this machine and use the fastest.")
    ] = False,
    tune_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.0, help="As --tune, for about so long (default: 120); 0 uses what is remembered."
        ),
    ] = None,
) -> None:
    """Compile a checkpoint and save the program."""
    from jisu.commands import compile as command

    command.run(
        shell,
        model,
        out,
        attrs.evolve(
            options,
            check=check,
            dump=dump,
            calibration=calibration,
            training=training,
            ledger=ledger,
            tune=tune if tune_seconds is None else tune_seconds,
        ),
    )


@_command("export")
def export(
    shell: Shell,
    path: Either,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A new folder for the TPU's owner.")],
    chip: Annotated[
        str | None, typer.Option(help="The TPU: v4, v5e, v5p, v6e or v7x; default: the program's, or v5e.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    bucket: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens that a program reads at a time; may be given several times; default: 1 and 128.",
        ),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Slots of the caches; default: all positions, 1024 at most.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="A varying size of a program that is no language model.")
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Write the programs with our own kernels, too, besides those with XLA's.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    recipe: Recipe = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write a program for the owner of a TPU, who needs JAX alone."""
    from jisu.commands import export as command

    sizes: dict[str, int] = {}
    for given in size or []:
        name, _, number = given.partition("=")
        if not name or not number.isdecimal():
            raise typer.BadParameter(f"--size is NAME=N, such as --size height=224, got {given!r}")
        sizes[name] = int(number)
    shapes = command.Shapes(batch, tuple(bucket or (1, 128)), capacity, sizes, kernels)
    command.run(shell, path, folder, Options(recipe=recipe, cache_dir=cache_dir), chip, shapes, force)


@_command("generate")
def generate(
    shell: Shell,
    options: Options,
    path: Either,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue (token ids if there's no tokenizer).")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file with the text.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens to write.")] = None,
    sample: Annotated[
        bool | None,
        typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; default: as the model says."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: less daring. Implies --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest. Implies --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this much probability. Implies --sample.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest. Implies --sample.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer repetitions.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
) -> None:
    """Continue a text; the prompt may also come on standard input."""
    from jisu.commands import generate as command

    wanted = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": tuple(stop) if stop else None,
    }
    command.run(shell, path, options, prompt, prompt_file, chat, wanted)


@_command("bench")
def bench(
    shell: Shell,
    options: Options,
    path: Either,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 128,
    gen: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions, of which the median is told.")] = 5,
) -> None:
    """Measure prefill and decode speed."""
    from jisu.commands import bench as command

    command.run(shell, path, options, command.Load(prompt, gen, batch, repeat))


@_command("eval")
def evaluate(
    shell: Shell,
    options: Options,
    path: Either,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="The text to predict.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="DIR|MODEL", help="Also tell how far the predictions are from this one's.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text that are read at a time; default: 256.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,TASK…", help="Benchmarks of lm-evaluation-harness, such as arc_easy.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; default: the task's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of tasks read at a time; default: 8.")] = None,
    task_folder: Annotated[str | None, typer.Option(metavar="DIR", help="A folder with more tasks (YAML).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Tasks go through the model's chat template.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Tasks may fetch their data.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The most windows, or documents of each task.")] = None,
) -> None:
    """Measure how well a model predicts a text, or does on benchmarks."""
    if (text is None) == (tasks is None):
        raise typer.BadParameter("give --text or --tasks, one of them")
    foreign = {
        "--text": {"--shots": shots, "--batch": batch, "--task-folder": task_folder, "--chat": chat, "--download": download},
        "--tasks": {"--reference": reference, "--window": window},
    }  # fmt: skip
    mine = "--text" if tasks is None else "--tasks"
    given = [name for name, value in foreign[mine].items() if value not in (None, False)]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} can't be used with {mine}")
    if text is not None:
        from jisu.commands import evaluate as command

        command.run(shell, path, text, reference, window or 256, limit, options)
    elif tasks is not None:
        from jisu.commands import tasks as benchmarks

        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        wanted = benchmarks.Tasks(names, shots, limit, batch or 8, task_folder, chat, download)
        benchmarks.run(shell, path, wanted, options)


@_command("merge")
def merge(
    shell: Shell,
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Checkpoint folders of one architecture.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="A new folder for the merged checkpoint.")],
    method: Annotated[
        Literal["linear", "slerp", "ties"],
        typer.Option(help="Weighted mean; along the arc between two; or signs and largest changes from --base."),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W…", help="One number per model, such as 0.3,0.7; default: all alike.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="What the models were trained from (ties).")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the changes that is kept in each tensor (ties; default 0.2).")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="How far to go from the base (ties; default 1).")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Merge checkpoints of one architecture into one."""
    from jisu.commands import merge as command

    options = {"method": method, "base": base, "density": density, "scale": scale, "cache_dir": cache_dir}
    command.run(shell, models, out, weights, options)


@_command("search")
def search(
    shell: Shell,
    model: Model,
    calibration: Annotated[str, typer.Option(metavar="FILE", help="Text on which losses are measured.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="A new folder for recipes, figures and plot.")],
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Bytes of all weights, such as 2.5MB; may be given several times."),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="The most milliseconds predicted for one token.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text on which recipes are measured; default: a quarter of the other."),
    ] = None,
    target: Target = None,
    recipe: Recipe = None,
    cache_dir: CacheDir = None,
) -> None:
    """Find the recipes that cost a model least within budgets."""
    from jisu.commands import search as command

    options = Options(target=target, recipe=recipe, cache_dir=cache_dir)
    command.run(shell, model, options, calibration, held_out, out, budget or [], latency)


@_command("explain")
def explain(
    shell: Shell,
    options: Options,
    path: Either,
    timeline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="For TPUs: write the simulated run of one token, for Perfetto and chrome://tracing."
        ),
    ] = None,
) -> None:
    """Tell what each pass did, what layers cost, and which kernels run."""
    from jisu.commands import explain as command

    command.run(shell, path, options, timeline)


@_command("doctor")
def doctor(shell: Shell) -> None:
    """Check this machine and installation; exit code 1 if something stops compiling."""
    from jisu.commands import doctor as command

    command.run(shell)


@_command("demo")
def demo(shell: Shell, threads: Threads = None) -> None:
    """Compile the bundled model, let it write, and measure it against PyTorch eager."""
    from jisu.commands import demo as command

    command.run(shell, threads)


@_command("bisect")
def bisect(
    shell: Shell,
    options: Options,
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to compare on (token ids if there's no tokenizer).")
    ],
) -> None:
    """Find the first pass that changes what a model means."""
    from jisu.commands import bisect as command

    command.run(shell, model, prompt, options)


@_command("show", recipe_app)
def recipe_show(
    shell: Shell,
    name: Annotated[str | None, typer.Argument(metavar="NAME|FILE", help="A preset or a TOML file.")] = None,
) -> None:
    """Print a recipe with every key (default: the default recipe)."""
    from jisu.commands import recipe as command

    command.show(shell, name)


@_command("check", recipe_app)
def recipe_check(shell: Shell, file: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file.")]) -> None:
    """Check a recipe file."""
    from jisu.commands import recipe as command

    command.check(shell, file)
