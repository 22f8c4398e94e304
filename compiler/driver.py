"""The composition root: `compile` wires frontend, passes, target and runtime. The only module that imports every room."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from jisu.compiler.cost import graph_cost, weight_bytes
from jisu.compiler.entry import Entry, stored
from jisu.compiler.errors import InputError, InputTypeError, JisuError, RecipeError, TargetError
from jisu.compiler.graph import ArrayStorage, Graph, Storage, placeholder
from jisu.compiler.launches import GAP_S, PLANS, Plan
from jisu.compiler.pipeline import Pass, Pipeline, Report, sample_inputs
from jisu.compiler.recipe import QuantizeRecipe, Recipe
from jisu.compiler.signature import Signature, Tree
from jisu.compiler.types import TensorType

if TYPE_CHECKING:
    from jisu.frontends.to_torch import GraphModule
    from jisu.passes.compression.search import Front
    from jisu.runtime.program import Program
    from jisu.targets.schedule import Schedule
    from jisu.targets.target import Target

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of the whole work that is done, 0 to 1."""


@attrs.frozen
class Source:
    """A model that was captured: what frontends find, and what `merge` and `ensemble` return; `compile` and `to_torch` take it.

    graph, signature: what it computes, and how it is called. sequence: for a causal language model, the symbol of its tokens.
    buffers: weights that are no parameters of the model. recipe: whose lossy part the graph went through already; members: the
    same of each member of an ensemble. notes: what the model's files ask for that the graph doesn't do, in sentences.
    """

    graph: Graph
    signature: Signature
    sequence: str | None = None
    vocabulary: int = 0
    max_positions: int = 0
    files: Mapping[str, bytes] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()
    recipe: Recipe | None = None
    members: tuple[Recipe, ...] = ()


def compile(
    model: Any,
    target: str | Target = "cpu",
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: Any = None,
    passes: Sequence[Pass] = (),
    dynamic_shapes: Any = None,
    num_threads: int | None = None,
    check: str = "verify",
    dump: str | os.PathLike[str] | None = None,
    stop_after: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    calibration: Any = None,
    training: Any = None,
    ledger: bool = False,
    tune: bool | float = False,
    progress: Progress | None = None,
) -> Program:
    """Compile a model for a target.

    model: a torch.nn.Module (with `example_inputs`, a tuple, and `example_kwargs`), a causal language model of
    transformers, the path of a local checkpoint folder, what `merge` returned, or what `to_torch` or `ensemble` did (then without
    a recipe their own holds, and nothing is compressed again). target: a name such as "cpu", or a Target. recipe: a preset's
    name, a TOML file, a mapping or a Recipe. passes: extra passes, run behind the fusions and before the cache is derived. dynamic_shapes: as
    `torch.export` takes them. num_threads: threads that kernels use (default: all cores). check: "verify" runs the
    verifier after each pass, "numeric" also compares meanings with the interpreter, "none" neither. dump: a folder for
    the IR after each pass. stop_after: the name of the last pass to run. cache_dir: where compiled libraries are kept
    (default: $JISU_CACHE_DIR or ~/.cache/jisu). calibration: for recipes that compress a model: of a language model a text file's path or
    token ids int64 [windows, length], of another module a list of calls, each a tuple of arguments; without, numbers are rounded to
    the nearest, and the smallest weights go. training: for recipes with `recover`, what the compressed model is trained on, in the
    forms of calibration (default: the calibration data). ledger: also measure on the calibration data what each lossy pass and each compressed
    matrix costs the model, for `explain()["ledger"]` (see `passes/compression/ledger.py`). tune: measure variants of kernels on this
    machine and use the fastest, for at most about so many seconds (True: 120); what was measured is kept in `cache_dir` by machine and
    kernel, and `explain()["tuning"]` tells what came of it (see `targets/tune.py`).

    Raises TargetError, RecipeError, InputError (what was given doesn't fit together), UnsupportedError (all that can't be
    compiled, at once), VerifyError, CompileError.
    """
    from jisu.compiler.storage import cache_folder
    from jisu.targets.target import Target

    machine = Target.resolve(target)
    chosen = Recipe.resolve(recipe)
    _check_options(num_threads, check, passes)
    budget = _tuning_seconds(tune, machine)
    tell = progress or (lambda stage, done: None)
    begin = time.perf_counter()
    tell("tracing", 0.0)
    kept = cache_folder(Path(cache_dir) if cache_dir is not None else None)
    source = capture(model, example_inputs, example_kwargs, dynamic_shapes, kept)
    times = {"trace_s": time.perf_counter() - begin}
    for note in source.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    with _memory_errors():
        if ledger and calibration is None:
            raise InputError("a ledger is measured on calibration data; give calibration=…")
        chosen, lossy = _still_to_do(source, None if recipe is None else chosen, calibration, training, tell, kept)
        samples = _calibration_samples(source, chosen, calibration) if ledger else None
        return _build(
            source, machine, chosen, (*passes, *lossy), num_threads, check, dump, stop_after, kept, tell, times, samples,
            budget,
        )  # fmt: skip


def load(path: str | os.PathLike[str], *, num_threads: int | None = None) -> Program:
    """Load a saved program; needs neither torch nor TVM's compiler.

    A saved program holds native code: load only what you would run. num_threads: threads that kernels use (default: all
    cores). Raises ArtifactError for what is damaged, foreign, of another format version, or made for a processor with
    features that this one lacks, OSError for a path that can't be read.
    """
    from jisu.runtime import program
    from jisu.targets.target import host

    return program.load(path, features=lambda: host().features, num_threads=num_threads)


def export(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    batch: int = 1,
    buckets: Sequence[int] = (1, 128),
    capacity: int | None = None,
    sizes: Mapping[str, int] | None = None,
    chip: str | None = None,
    kernels: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a program that was compiled for a TPU as a folder for the owner of one, who needs JAX alone; returns its manifest.

        program = jisu.compile(model, target="tpu:v5e")
        jisu.export(program, "llama-v5e", buckets=(1, 128, 512), capacity=2048)     # python llama-v5e/run_tpu.py

    A TPU's programs have fixed shapes. buckets: of a language model, how many tokens a program reads at a time (1 writes); of another
    one, what its varying size is. batch: sequences at a time. capacity: slots of the caches, per sequence (default: what the
    model has positions for, 1024 at most). sizes: of a module, those of its other varying sizes, by name. chip: whose kernels are
    written (default: the program's). kernels: whether programs are written a second time, for TPUs alone, with our Pallas kernels in the place
    of XLA's products and attention (`run_tpu.py --kernels`); weights and caches are then in the form that kernels read. overwrite: whether an
    older export at `folder` may go. The folder appears whole or not at all; see `jisu.targets.tpu.bundle` for what is in it. Results to compare
    with are computed by the program, simulated.

    Raises TargetError for a program that isn't for a TPU and without JAX, InputError for sizes that don't fit and for a place where no
    folder can stand, OSError where writing fails.
    """
    from jisu.compiler.storage import TRAVELLING
    from jisu.compiler.text import parse
    from jisu.passes.layout import Derived, FoldWeights
    from jisu.runtime.artifact import whole_folder
    from jisu.runtime.session import APPEND_LAST, MAIN
    from jisu.targets.tpu import bundle
    from jisu.targets.tpu.chip import Chip
    from jisu.targets.tpu.export import require
    from jisu.targets.tpu.layout import lay_out

    name = str(program.target["name"])
    if name.partition(":")[0] != "tpu":
        raise TargetError(f'this program is for {name!r}; compile the model for a TPU, such as target="tpu:v5e"')
    machine = Chip.named(chip or name)
    require()
    tell = progress or (lambda stage, done: None)
    rows = _bucket_sizes(batch, buckets)
    parts, info, decoding = program.parts, program.decoder, None
    if info is None or not info.state:
        given = dict(sizes or {})
        graph = parse(program.ir(MAIN))
        common = "batch" if info is None else info.batch
        if common in graph.symbols:
            given.setdefault(common, batch)
        elif batch != 1:
            raise InputError(
                f"the program has no size 'batch' that could be {batch}; it has {', '.join(graph.symbols) or 'fixed shapes'}"
            )
        found = bundle.buckets_of(graph, MAIN, rows, given)
        graphs = {MAIN: graph}
    else:
        if sizes:
            raise InputError("sizes are for modules; a language model has batch, buckets and capacity")
        slots = min(info.max_positions, 1024) if capacity is None else capacity
        if not 0 < slots <= info.max_positions:
            raise InputError(f"capacity {slots} is not in 1..{info.max_positions}, the positions that the model has")
        if rows[-1] > slots:
            raise InputError(f"a bucket of {rows[-1]} tokens exceeds the capacity of {slots}")
        info = attrs.evolve(info, prefill_chunk=rows[-1])
        slots = -(-slots // info.page) * info.page if info.page else slots
        graphs = {APPEND_LAST: parse(program.ir(APPEND_LAST))}
        known = info.sizes(batch, slots)
        (sequence,) = set(graphs[APPEND_LAST].symbols) - set(known)
        order = [n for n in rows if n > 1] + [n for n in rows if n == 1]
        found = [
            bundle.Bucket(
                f"{APPEND_LAST}-{n}", APPEND_LAST, {**known, sequence: n}, n, n == 1 and 1 < len(order) and order[-2] < slots
            )
            for n in order
        ]  # fmt: skip
        table = info.table(batch, slots) if info.page else None
        decoding = bundle.Decoding(info.vocabulary, slots, len(info.state), table)
    held = {name: ArrayStorage(array) for name, array in parts.weights.items()}
    graphs = {entry: graph.replace(weights=held) for entry, graph in graphs.items()}
    programs = graphs
    if kernels:
        fixed = {name: n for name, n in found[0].sizes.items() if all(b.sizes[name] == n for b in found)}
        programs = {entry: FoldWeights()(lay_out(graph, machine, fixed)) for entry, graph in graphs.items()}
    laid = {n: w for graph in programs.values() for n, w in graph.weights.items() if isinstance(w, Derived)}
    source = bundle.Source(
        machine, graphs, programs, program.run, batch, decoding,
        {n: data for n, data in parts.files.items() if n in TRAVELLING},
        {"jisu": parts.producers.get("jisu", ""), "kind": "module" if info is None else "decoder", "recipe": program.recipe},
        {name: str(Graph((), (w.node,))) for name, w in laid.items()}, with_kernels=kernels,
    )  # fmt: skip
    with whole_folder(folder, lambda: bundle.check_place(folder, overwrite)) as new:
        manifest = bundle.write(new, source, found, tell)
    tell("done", 1.0)
    return manifest


def _bucket_sizes(batch: int, buckets: Sequence[int]) -> list[int]:
    """The buckets, from the smallest on."""
    for what, value in (("batch", batch), *(("a bucket", b) for b in buckets)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{what} is a number from 1 on, got {value!r}")
    if not buckets:
        raise InputError("buckets: give at least one, such as (1, 128)")
    return sorted(set(buckets))


def to_torch(
    model: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: Any = None,
    passes: Sequence[Pass] = (),
    dynamic_shapes: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    calibration: Any = None,
    training: Any = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> GraphModule:
    """The model as a recipe compresses it, as a torch.nn.Module: to be trained (fine-tuned, distilled), then compiled.

        student = jisu.to_torch(model, recipe="int4", calibration="text.txt")
        ...                                     # train student(input_ids).logits against model(input_ids).logits
        program = jisu.compile(student)         # as it is now: nothing is traced or compressed again

    The module is called like the model. Its parameters are copies and have the model's names; codes and masks are
    buffers, and what training can change of a compressed matrix are its scales. dtype: torch.float32 or float64, in which
    parameters of a narrower dtype are held and computed; compiling brings them back into their own. All else is as
    in `compile`, and so are the errors.
    """
    from jisu.compiler.storage import cache_folder
    from jisu.frontends.to_torch import GraphModule

    chosen = Recipe.resolve(recipe)
    _check_options(None, "verify", passes)
    tell = progress or (lambda stage, done: None)
    tell("tracing", 0.0)
    kept = cache_folder(Path(cache_dir) if cache_dir is not None else None)
    source = capture(model, example_inputs, example_kwargs, dynamic_shapes, kept)
    with _memory_errors():
        source = compressed(source, None if recipe is None else chosen, passes, calibration, training, tell, kept)
        module = GraphModule(source.graph, buffers=source.buffers, dtype=dtype, signature=source.signature,
                             decoder=source.sequence is not None, source=source)  # fmt: skip
    tell("done", 1.0)
    return module


def merge(
    models: Sequence[Any],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Any = None,
    density: float | None = None,
    scale: float | None = None,
    out: str | os.PathLike[str] | None = None,
    example_inputs: Sequence[Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Several models of one architecture as one, whose parameters are made of theirs.

        soup = jisu.merge(["checkpoints/a", "checkpoints/b"], method="slerp", weights=(0.3, 0.7))
        program = jisu.compile(soup, recipe="int4")

    models, base: whatever `compile` takes; base is the model that the members were trained from. method: "linear", "slerp" (of two) or
    "ties" (with base, and density and scale), see `jisu.compiler.merge.Merge`. weights: one per model, at least 0 (default: all alike);
    they are divided by their sum. out: a new folder that gets the merged checkpoint, where all models are checkpoint folders; its
    tensors keep their names and dtypes, its other files are the first model's. example_inputs: for plain modules.
    Nothing is computed before the model is compiled or written, and then tensor by tensor.

    Raises InputError for options that don't fit the method and for models that differ in more than their parameters' values
    (naming what differs), OSError where `out` can't be written; otherwise as `compile`.
    """
    from jisu.compiler.merge import Merge, check_same_graph, check_same_tokens, merge_tensors
    from jisu.compiler.storage import cache_folder, open_checkpoint, write_checkpoint

    how = Merge.resolve(method, len(_several(models)), weights, base=base is not None, density=density, scale=scale)
    everyone = [*models, *([base] if base is not None else [])]
    names = _names(everyone)
    kept = cache_folder(Path(cache_dir) if cache_dir is not None else None)
    if out is not None and not all(isinstance(model, (str, os.PathLike)) for model in everyone):
        raise InputTypeError("out takes checkpoint folders; models in memory are merged without it, and saved compiled")
    sources = [capture(model, example_inputs, None, None, kept) for model in everyone]
    first, members = sources[0], [source.graph.weights for source in sources[: len(models)]]
    check_same_tokens([source.files for source in sources], names)
    merged = merge_tensors(how, members, sources[-1].graph.weights if base is not None else None, names, first.buffers)
    check_same_graph([source.graph for source in sources], names)
    if out is None:
        return attrs.evolve(first, graph=first.graph.replace(weights=merged))
    stored = [open_checkpoint(model) for model in everyone]
    tensors = merge_tensors(how, stored[: len(models)], stored[-1] if base is not None else None, names)
    write_checkpoint(Path(out), Path(everyone[0]), tensors, progress)
    return capture(out, None, None, None, kept)


def ensemble(
    models: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    average: str = "log",
    recipes: Any = None,
    calibration: Any = None,
    training: Any = None,
    example_inputs: Sequence[Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Several models that answer as one: the weighted mean of what they give, compiled into one program.

        both = jisu.ensemble(["checkpoints/a", "checkpoints/b"], (2, 1), recipes=("int4", "int8"))
        program = jisu.compile(both)

    models: whatever `compile` takes, of one vocabulary; their architectures may differ. weights: one per model, above 0 (default: all
    alike); they are divided by their sum. average: "log" (logits: a product of experts) or "probability" (a mixture), see
    `jisu.compiler.ensemble.join`. recipes: how each model is compressed before they are joined, one per model or one for all;
    calibration, training: as in `compile`, for those that use them. example_inputs: for plain modules, whose outputs are averaged.

    Raises InputError for models whose inputs, outputs, calls or tokens don't fit together; otherwise as `compile`.
    """
    from jisu.compiler.ensemble import join, prefix
    from jisu.compiler.merge import check_same_tokens, shares
    from jisu.compiler.storage import cache_folder

    _several(models)
    shared = recipes is None or isinstance(recipes, (str, os.PathLike, Mapping, Recipe))
    given = [recipes] * len(models) if shared else list(recipes)
    if len(given) != len(models):
        raise InputError(f"recipes: expected one per model, {len(models)}, got {len(given)}")
    chosen = [None if recipe is None else Recipe.resolve(recipe) for recipe in given]
    parts, names = shares(weights, len(models)), _names(models)
    for i, (what, data) in enumerate((("calibration", calibration), ("training", training))):
        if data is not None and all(_of_use(recipe, calibration, training)[i] is None for recipe in chosen):
            raise InputError(f"{what} is given, but none of the recipes uses it")
    tell = progress or (lambda stage, done: None)
    kept = cache_folder(Path(cache_dir) if cache_dir is not None else None)
    sources = [capture(model, example_inputs, None, None, kept) for model in models]
    check_same_tokens([source.files for source in sources], names)
    first = sources[0]
    for name, source in zip(names[1:], sources[1:], strict=True):
        if source.signature != first.signature or (source.sequence is None) != (first.sequence is None):
            raise InputError(f"{names[0]} and {name} are called differently; members of an ensemble share their call")
        if source.vocabulary != first.vocabulary:
            raise InputError(
                f"{names[0]} has a vocabulary of {first.vocabulary} tokens, {name} of {source.vocabulary}; an ensemble shares one"
            )
    if first.signature.mutations:
        raise InputError(f"{names[0]} changes its arguments, of which there is no mean")
    join([source.graph for source in sources], parts, average, names)  # refused before compressing, if it is
    with _memory_errors():
        done = [
            compressed(source, recipe, (), *_of_use(recipe, calibration, training), tell, kept)
            for source, recipe in zip(sources, chosen, strict=True)
        ]
    graph = join([source.graph for source in done], parts, average, names)
    return attrs.evolve(
        first,
        graph=graph,
        max_positions=min(source.max_positions for source in sources),
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
        buffers=frozenset(prefix(i) + name for i, source in enumerate(done) for name in source.buffers),
        recipe=Recipe(),
        members=tuple(source.recipe or Recipe() for source in done),
    )


def _of_use(recipe: Recipe | None, calibration: Any, training: Any) -> tuple[Any, Any]:
    """The data that a member's recipe uses."""
    if recipe is None:
        return None, None
    return calibration if recipe.calibrated else None, training if recipe.recover.steps else None


def _several(models: Any) -> Sequence[Any]:
    if not isinstance(models, (list, tuple)):
        raise InputTypeError(f"models must be a list of models, got {type(models).__name__}")
    if len(models) < 2:
        raise InputError(f"it takes at least two models, got {len(models)}")
    return models


def _names(models: Sequence[Any]) -> list[str]:
    """What errors call the models: their paths, or their kind and place in the list."""
    return [
        repr(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else f"model {i} ({type(model).__name__})"
        for i, model in enumerate(models)
    ]


def search(
    model: Any,
    target: str | Target = "cpu",
    *,
    calibration: Any,
    budgets: Sequence[float] = (),
    seconds: float = math.inf,
    held_out: Any = None,
    recipe: Any = None,
    options: Sequence[Any] | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Front:
    """The recipes that cost a model least within budgets: sparsity, bits and groups, layer by layer.

    budgets: bytes of all weights, one recipe for each; without, eight between the smallest and the largest that there are. seconds: the
    most that the target's cost model may predict for one token. calibration: as in `compile`; what results are measured on is `held_out`
    or, without it, the last quarter of the calibration data. recipe: for the layers that its entries name, which are then not
    searched, and for all that isn't about weights. options: ways to store a matrix (`jisu.passes.compression.search.Option`). Every point of the
    result was made and measured; its `recipe` makes it again by `compile` with the same calibration. An interrupted search goes on where it was.

    Raises what `compile` raises, and InputError for a budget that nothing fits, naming the least that there is.
    """
    from jisu.compiler.storage import cache_folder
    from jisu.frontends.gradients import output_gradients
    from jisu.passes import default_passes
    from jisu.passes.compression.search import OPTIONS
    from jisu.passes.compression.search import search as find
    from jisu.passes.compression.unfinished import Unfinished
    from jisu.targets.target import Target

    machine, base = Target.resolve(target), Recipe.resolve(recipe)
    if calibration is None:
        raise InputError("a search measures on calibration data; give calibration=…")
    if base.remove or base.rotate != "none":
        raise InputError(
            "search: the recipe may settle layers by prune and quantize entries; remove and rotate come before"
        )
    wanted = [float(b) for b in budgets]
    tell = progress or (lambda stage, done: None)
    tell("tracing", 0.0)
    kept = cache_folder(Path(cache_dir) if cache_dir is not None else None)
    source = capture(model, example_inputs, example_kwargs, dynamic_shapes, kept)
    samples = _calibration_samples(source, base, calibration)
    if held_out is None:
        most = len(samples) - max(len(samples) // 4, 1)
        if not most:
            raise InputError("search: one call is too little calibration data to hold some out; give held_out=…")
        samples, rest = samples[:most], samples[most:]
    else:
        rest = _calibration_samples(source, base, held_out)
    with _memory_errors():
        graph, _ = Pipeline(default_passes(base.fuse, base.max_fold_bytes)).run(source.graph)
        pairs = [(b, seconds) for b in wanted] or ([(math.inf, seconds)] if seconds < math.inf else [])
        unfinished = Unfinished(kept / "unfinished", graph, samples, ("search",))
        found = find(
            graph, base, samples, rest, pairs, latency=lambda g: _predicted(g, base, machine), options=options or OPTIONS,
            differentiate=output_gradients, kept=unfinished, progress=lambda done: tell("searching", done),
        )  # fmt: skip
        unfinished.done()
    return found


def _predicted(graph: Graph, recipe: Recipe, machine: Target) -> float:
    """Predicted seconds of one token, laid out for a machine."""
    laid = _lay_out(graph, recipe, machine, "none", None, None)
    return graph_cost(laid, dict.fromkeys(laid.symbols, 1), machine).seconds


def _check_options(num_threads: int | None, check: str, passes: Sequence[Pass]) -> None:
    if num_threads is not None and (
        isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1
    ):
        raise InputError(f"num_threads must be a positive integer, not {num_threads!r}")
    if check not in ("none", "verify", "numeric"):
        raise InputError(f"check is 'none', 'verify' or 'numeric', not {check!r}")
    for step in passes:
        if not isinstance(step, Pass):
            raise InputTypeError(f"a pass is a callable with `name` and `exact`, got {type(step).__name__}: {step!r}")


def _tuning_seconds(tune: bool | float, target: Target) -> float | None:
    """The budget of tuning, None for none; raises where it is no time, or the machine can't run what it is to measure."""
    if tune is False:
        return None
    from jisu.targets.tune import SECONDS, check_tunable

    if not isinstance(tune, (bool, int, float)) or not 0 <= tune < float("inf"):
        raise InputError(f"tune is True, False or seconds, not {tune!r}")
    check_tunable(target)
    return SECONDS if tune is True else float(tune)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    from jisu.compiler.errors import TensorMemoryError

    try:
        yield
    except MemoryError as error:
        if isinstance(error, JisuError):
            raise
        raise TensorMemoryError(f"out of memory while compiling: {error}") from error


# --- Frontends -----------------------------------------------------------------------------------------------------


def capture(model: Any, example_inputs: Any, example_kwargs: Any, dynamic_shapes: Any, kept: Path) -> Source:
    """What `compile` takes as a model, traced; traces of folders stay in `kept`. Raises as `compile`."""
    from jisu.runtime.program import Program

    if isinstance(model, Source):
        if example_inputs is not None or example_kwargs is not None or dynamic_shapes is not None:
            raise InputError("a captured model is not traced again; drop example inputs and dynamic_shapes")
        return model
    if isinstance(model, Program):
        raise InputTypeError("a compiled program has no graph to compile; give the model that it was made from")
    if isinstance(model, (str, os.PathLike)):
        from jisu.frontends.checkpoint import load_checkpoint

        if example_inputs is not None or dynamic_shapes is not None:
            raise InputError(
                "a checkpoint folder is traced with dynamic batch and sequence; drop example_inputs and dynamic_shapes"
            )
        return _from_decoder(load_checkpoint(Path(model), kept))
    from jisu.frontends.to_torch import GraphModule

    if isinstance(model, GraphModule):
        if example_inputs is not None or example_kwargs is not None or dynamic_shapes is not None:
            raise InputError("a module that to_torch made is not traced again; drop example inputs and dynamic_shapes")
        graph, buffers = model.graph, frozenset(name for name, _ in model.named_buffers())
        return attrs.evolve(model.source or Source(graph, model.signature), graph=graph, buffers=buffers)
    if example_inputs is None and example_kwargs is None and _comes_from_transformers(model):
        from jisu.frontends.huggingface import is_decoder, trace_decoder

        if is_decoder(model):
            return _from_decoder(trace_decoder(model))
    from jisu.frontends import torch_export

    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InputTypeError(
            f"example_inputs must be a tuple of arguments, got {type(example_inputs).__name__}; write (x,)"
        )
    captured = torch_export.capture(model, tuple(example_inputs or ()), dict(example_kwargs or {}), dynamic_shapes)
    return Source(captured.graph, captured.signature, buffers=captured.buffers)


def _comes_from_transformers(model: Any) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def _from_decoder(decoder: Any) -> Source:
    result = Tree("record", items=(Tree("leaf", 0),), keys=("logits",), name=decoder.result)
    signature = Signature((), (), result)
    return Source(
        decoder.graph,
        signature,
        decoder.sequence,
        decoder.vocabulary,
        decoder.max_positions,
        decoder.files,
        decoder.notes,
        decoder.buffers,
    )


# --- Passes --------------------------------------------------------------------------------------------------------


def _build(
    source: Source,
    machine: Target,
    recipe: Recipe,
    extra: tuple[Pass, ...],
    num_threads: int | None,
    check: str,
    dump: Any,
    stop_after: str | None,
    kept: Path,
    tell: Progress,
    times: dict[str, float],
    measured_on: Any,
    tuning_s: float | None,
) -> Program:
    from jisu.passes import default_passes
    from jisu.passes.layout import sparse_matrices
    from jisu.runtime.program import Compiled, Program
    from jisu.targets import facts
    from jisu.targets.compile import compile_graphs

    begin = time.perf_counter()
    tell("rewriting", 0.3)
    report: dict[str, Any] = {"passes": [], "target_fingerprint": machine.fingerprint()}
    env = _typical_sizes(source.graph)
    seen: list[tuple[str, bool, Graph]] = [("frontend", True, source.graph)]

    def note(done: Report, graph: Graph) -> None:
        report["passes"].append(_pass_report(done, graph, env, machine))
        if measured_on is not None:
            seen.append((done.name, done.exact, graph))

    report["passes"].append(
        _pass_report(Report("frontend", True, len(source.graph.nodes), times["trace_s"]), source.graph, env, machine)
    )
    pipeline = Pipeline(
        (*default_passes(recipe.fuse, recipe.max_fold_bytes), *extra),
        check=check,
        dump=dump,
        stop_after=stop_after,
        on_pass=note,
    )
    samples = sample_inputs(source.graph) if check == "numeric" else None
    graph, _ = pipeline.run(source.graph, samples)
    if measured_on is not None:
        report["ledger"] = _ledger(
            source, seen, measured_on, lambda done: tell("measuring what it costs", 0.38 + 0.02 * done)
        )
    entries, decoder = _entries(source, graph, recipe, report, facts.of(machine).FETCHED)
    finished: dict[str, Graph] = {}
    for entry, step in entries.items():
        told = note if entry == next(iter(entries)) else None
        folder = dump or os.environ.get("JISU_DUMP")
        finished[entry] = _lay_out(step, recipe, machine, check, told, Path(folder) / entry if folder else None)
    times["passes_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    schedules: dict[str, Schedule] = {}
    if tuning_s is not None:
        from jisu.runtime.executable import Executable
        from jisu.targets.tune import tune

        tell("tuning kernels", 0.4)
        tuned = tune(
            finished, machine, tuning_s, num_threads=num_threads, cache_dir=kept,
            load=lambda library, found: Executable.load(library, found, num_threads),
            progress=lambda done: tell("tuning kernels", 0.4 + 0.15 * done),
        )  # fmt: skip
        schedules = {t.key: t.schedule for t in tuned if t.schedule != machine.schedule}
        report["tuning"] = [t.to_json() for t in tuned]
        times["tuning_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
    tell("compiling kernels", 0.4 if tuning_s is None else 0.55)
    out = Path(tempfile.mkdtemp(prefix="jisu-"))  # stays where compiling fails: the error names it
    info = compile_graphs(finished, machine, out=out, schedules=schedules, cache_dir=kept)
    code = info.code()
    shutil.rmtree(out, ignore_errors=True)
    times["kernels_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    weights = _materialise(finished, info.entries, tell, in_place=not facts.of(machine).FETCHED)
    times["weights_s"] = time.perf_counter() - begin
    report |= {
        "simulation": facts.of(machine).SIMULATED,
        "times": times,
        "kernels": [{"name": n, "op": op, "count": k, "choices": list(c)} for n, op, k, c in info.kernels],
        "predicted": {name: _op_report(graph, env, machine) for name, graph in finished.items()},
        "simulated": _simulated(finished, env, machine, source),
        "launches": _launch_report(code, finished, env, source.sequence),
        "sparse": [
            {**m, "predicted_gain": facts.of(machine).sparse_gain(m["form"], m["kept"], machine, m["stored"])}
            for m in sparse_matrices(next(iter(finished.values())))
        ],
        "layers": _layer_report(next(iter(finished.values())), env, machine),
        "cache": None if decoder is None else decoder.reason or "derived",
        "cache_bytes_per_token": None if decoder is None else decoder.slot_bytes,
        "notes": list(source.notes),
        "members": [recipe.to_toml() for recipe in source.members],
    }
    parts = Compiled(
        code=code,
        weights=weights,
        entries=info.entries,
        graphs={k: str(g) for k, g in finished.items()},
        signature=source.signature,
        target={"name": machine.name, "triple": machine.triple, "features": sorted(machine.required_features)},
        recipe=recipe.to_toml(),
        report=report,
        decoder=decoder,
        files=source.files,
        producers=_producers(),
    )
    tell("done", 1.0)
    return Program(parts, num_threads, machine.check_host())


def _ledger(
    source: Source, seen: Sequence[tuple[str, bool, Graph]], samples: Any, progress: Callable[[float], None]
) -> Any:
    """What each lossy pass among those seen, and each matrix, costs; None where none of them changed anything."""
    from jisu.passes.compression.ledger import keep_ledger

    pairs = zip(seen, seen[1:], strict=False)
    steps = [
        (name, before, after) for (_, _, before), (name, exact, after) in pairs if not exact and after is not before
    ]
    return keep_ledger(source.graph, steps, samples, progress).as_dict() if steps else None


def _still_to_do(
    source: Source, recipe: Recipe | None, calibration: Any, training: Any, tell: Progress, kept: Path
) -> tuple[Recipe, tuple[Pass, ...]]:
    """The recipe that holds, and its lossy passes: none where a graph comes back from training and no other is named."""
    done = recipe is None and source.recipe is not None
    lossy = _lossy_passes(source, Recipe() if done or recipe is None else recipe, calibration, training, tell, kept)
    return recipe or source.recipe or Recipe(), lossy


def compressed(
    source: Source,
    recipe: Recipe | None,
    passes: Sequence[Pass],
    calibration: Any,
    training: Any,
    tell: Progress,
    kept: Path,
) -> Source:
    """The model behind the exact passes and the recipe's lossy ones."""
    from jisu.passes import default_passes

    chosen, lossy = _still_to_do(source, recipe, calibration, training, tell, kept)
    tell("rewriting", 0.3)
    exact, _ = Pipeline(default_passes(chosen.fuse, chosen.max_fold_bytes)).run(source.graph)
    graph, _ = Pipeline((*passes, *lossy)).run(exact)
    buffers = source.buffers | (exact.weights.keys() - source.graph.weights.keys())  # those that folding made
    return attrs.evolve(source, graph=graph, buffers=buffers, recipe=chosen)


def _lossy_passes(
    source: Source, recipe: Recipe, calibration: Any, training: Any, tell: Progress, kept: Path
) -> tuple[Pass, ...]:
    """The passes that a recipe's lossy part asks for, with their data; what is unfinished stays in `kept`."""
    coded = recipe.cache.scheme != "none"
    if coded and source.sequence is None:
        raise RecipeError("cache.scheme is for causal language models; other modules have no cache")
    lossy = recipe.prune or recipe.quantize or recipe.remove or coded
    if calibration is not None and not recipe.calibrated:
        if not lossy:
            raise InputError('calibration is given, but the recipe compresses nothing; give a recipe such as "int4"')
        raise InputError(
            "calibration is given, but the recipe only rounds to the nearest and removes by magnitude; "
            'use algorithm = "auto", importance = "auto"'
        )
    if training is not None and not recipe.recover.steps:
        raise InputError("training is given, but the recipe doesn't train: give it [recover] steps = 400")
    samples = None if calibration is None else _calibration_samples(source, recipe, calibration)

    def during(stage: str, begin: float, end: float) -> Callable[[float], None]:
        return lambda done: tell(stage, begin + (end - begin) * done)

    found: list[Pass] = []
    if recipe.remove:
        from jisu.passes.structured import Remove

        if samples is not None and not isinstance(samples, np.ndarray):
            raise InputError("remove: only language models are calibrated; leave calibration out")
        found.append(Remove(recipe.remove, samples, during("removing", 0.3, 0.32)))
    if recipe.rotate == "hadamard":
        from jisu.passes.compression.rotate import Rotate

        found.append(Rotate())
    rounding: list[Pass] = []
    if coded:
        from jisu.passes.compression.cached import QuantizeCache

        transform = recipe.cache.transform_with(samples is not None)
        told = during("choosing the cache's basis", 0.32, 0.33)
        rounding.append(QuantizeCache(recipe.cache.scheme, transform, samples, told))
    # Training goes through no records. Else they come first, so that matrices take the basis in before they are rounded.
    trained = (
        recipe.recover.steps > 0
        or recipe.recover.blocks > 0
        or any(rule.algorithm == "autoround" for rule in recipe.quantize)
    )
    if not trained:
        found += rounding
    if any(rule.smooth or rule.algorithm == "awq" for rule in recipe.quantize):
        from jisu.passes.compression.equalize import Equalize

        found.append(Equalize(recipe.quantize, samples, during("equalizing", 0.32, 0.33)))
    if any(rule.activations != "none" for rule in recipe.quantize):
        from jisu.passes.compression.activations import QuantizeActivations

        found.append(QuantizeActivations(recipe.quantize, samples, during("rounding activations", 0.33, 0.34)))
    if recipe.prune or recipe.quantize:
        from jisu.frontends.gradients import output_gradients
        from jisu.passes.compression import Compress

        # What is trained is what was pruned; its codes are then found for the trained numbers.
        apart = (recipe.recover.steps > 0 or recipe.recover.blocks > 0) and recipe.prune and recipe.quantize
        steps = (
            [("prune", recipe.prune, ()), ("quantize", (), recipe.quantize)]
            if apart
            else [("compress", recipe.prune, recipe.quantize)]
        )
        for i, (name, prune, quantize) in enumerate(steps):
            begin = 0.34 + 0.06 * i / len(steps)
            told = during(f"{name.removesuffix('e')}ing", begin, begin + 0.02)
            folder = kept / "unfinished"
            found.append(Compress(prune, quantize, samples, told, folder, name, differentiate=output_gradients))
            learned = any(rule.algorithm == "autoround" for rule in quantize)
            if learned or recipe.recover.blocks:
                told = during("reconstructing blocks", begin + 0.02, begin + 0.025)
                found.append(_reconstruct(source, recipe, quantize if learned else (), samples, name, told))
            if recipe.recover.steps:
                told = during("recovering", begin + 0.025, begin + 0.03)
                found.append(_recover(source, recipe, training, samples, name, told))
    if trained:
        found += rounding
    return tuple(found)


def _reconstruct(
    source: Source, recipe: Recipe, learned: tuple[QuantizeRecipe, ...], samples: Any, behind: str, progress: Callable[[float], None]
) -> Pass:  # fmt: skip
    """The pass that trains the blocks of what the pass named `behind` left, and codes of the rules `learned`."""
    from jisu.frontends.training import fit_block
    from jisu.passes.compression.blocks import ITERATIONS, Reconstruct

    if samples is None:
        raise RecipeError("blocks are trained on calibration data; give calibration=…")
    fit = functools.partial(fit_block, buffers=source.buffers)
    steps = recipe.recover.blocks or ITERATIONS
    return Reconstruct(
        recipe.recover, steps, learned, source.graph, samples, fit, progress, f"reconstruct behind {behind}"
    )


def _recover(
    source: Source, recipe: Recipe, training: Any, samples: Any, behind: str, progress: Callable[[float], None]
) -> Pass:
    """The pass that trains what the pass named `behind` left."""
    from jisu.frontends.training import distil
    from jisu.passes.compression.recover import Recover

    rule = recipe.recover
    if training is not None:
        drawn = attrs.evolve(recipe.calibration, windows=min(rule.steps * rule.batch, 1 << 16))
        samples = _calibration_samples(source, attrs.evolve(recipe, calibration=drawn), training)
    if samples is None:
        raise RecipeError("recover: training needs data; give training=… or calibration=…")
    if behind == "quantize":  # only scales and what isn't compressed are left to train
        rule = attrs.evolve(rule, steps=max(rule.steps // 4, 1), minutes=rule.minutes / 4)
    train = functools.partial(distil, buffers=source.buffers)
    return Recover(rule, source.graph, samples, train, progress, f"recover behind {behind}")


def _calibration_samples(source: Source, recipe: Recipe, calibration: Any) -> np.ndarray | list[tuple[np.ndarray, ...]]:
    """Token ids int64 [windows, length] of a language model, or the inputs of each call of another module."""
    if source.sequence is not None:
        return _calibration_tokens(source, recipe, calibration)
    if isinstance(calibration, (str, os.PathLike)) or not isinstance(calibration, Sequence) or not calibration:
        raise InputError(
            "calibration of a module is a list of calls, each a tuple of its arguments; text is for causal language models"
        )
    found = []
    for i, call in enumerate(calibration):
        arguments = call if isinstance(call, (tuple, list)) else (call,)
        try:
            found.append(tuple(_array(a) for a in source.signature.flatten_call(arguments, {})))
        except JisuError as error:
            raise InputError(f"calibration[{i}]: {error}") from error
    return found


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _calibration_tokens(source: Source, recipe: Recipe, calibration: Any) -> np.ndarray:
    """Token ids int64 [windows, length] from ids, or from a text file by the model's own tokenizer."""
    if isinstance(calibration, (str, os.PathLike)):
        from jisu.runtime.tokenizer import Tokenizer, read_text

        if "tokenizer.json" not in source.files:
            raise InputError("the model has no tokenizer for calibration text; give token ids [windows, length]")
        ids = np.asarray(Tokenizer.from_files(source.files).encode(read_text(calibration)), np.int64)
        length, wanted = min(recipe.calibration.length, source.max_positions), recipe.calibration.windows
        if len(ids) <= length:
            raise InputError(
                f"{calibration}: {len(ids)} tokens are too few for windows of {length}; see the recipe's calibration.length"
            )
        starts = np.random.default_rng(recipe.calibration.seed).integers(0, len(ids) - length, wanted)
        return np.stack([ids[s : s + length] for s in starts])
    tokens = np.asarray(calibration)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise InputError(
            f"calibration: expected a text file or token ids int64 [windows, length], got {tokens.dtype}{list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= source.vocabulary:
        raise InputError(
            f"calibration: token ids from {tokens.min()} to {tokens.max()} are not in the vocabulary of {source.vocabulary}"
        )
    if tokens.shape[1] > source.max_positions:
        raise InputError(
            f"calibration: windows of {tokens.shape[1]} tokens exceed the model's {source.max_positions} positions"
        )
    return tokens.astype(np.int64)


def _entries(
    source: Source, graph: Graph, recipe: Recipe, report: dict[str, Any], fetched: bool
) -> tuple[dict[str, Graph], Any]:
    """The entry functions: `main` for a module, the derived steps for a causal language model; `fetched`: also a step that draws its token."""
    from jisu.passes.cache import CacheLayout, NotCausal, derive_step, keep_last_token
    from jisu.runtime.session import APPEND, APPEND_DRAWN, APPEND_LAST, MAIN, DecoderInfo

    if source.sequence is None:
        return {MAIN: graph}, None
    batch = next(str(d) for d in graph.inputs[0].shape[:1])
    facts: dict[str, Any] = {
        "vocabulary": source.vocabulary,
        "max_positions": source.max_positions,
        "prefill_chunk": recipe.prefill_chunk,
        "batch": batch,
        "inputs": tuple(n.name for n in graph.inputs),
    }
    try:
        step = derive_step(graph, sequence=source.sequence, layout=CacheLayout(recipe.cache.page, recipe.cache.ring))
    except NotCausal as reason:
        return {MAIN: graph}, DecoderInfo(page=0, state=(), reason=str(reason), **facts)
    last = keep_last_token(step, source.sequence)
    state = tuple((s.name, s.type, s.window, s.ring) for s in step.state)
    entries = {APPEND: step.graph, APPEND_LAST: last.graph}
    if fetched:
        facts["draws"] = True
        entries[APPEND_DRAWN] = _drawing(last.graph)
    return entries, DecoderInfo(page=recipe.cache.page, state=state, **facts)


def _drawing(graph: Graph) -> Graph:
    """A step that draws a token by the logits instead of giving them."""
    from jisu.compiler import ops
    from jisu.runtime.session import DRAWING

    logits, *state = graph.outputs
    options = [placeholder(name, TensorType(logits.shape[:-1], dtype)) for name, dtype in DRAWING]
    drawn = ops.draw(logits, *options)
    outputs = (ops.get(drawn, index=0), ops.get(drawn, index=1), *state)
    return graph.replace(inputs=(*graph.inputs, *options), outputs=outputs)


def layout(recipe: Recipe, machine: Target) -> tuple[Pass, ...]:
    """The passes that bring weights into the order of a machine's kernels."""
    from jisu.passes import layout_passes
    from jisu.targets import facts

    kernels = facts.of(machine)
    panel, pair = kernels.packing(machine)
    limits, halves = (f(machine) if recipe.pack else {} for f in (kernels.sparse_limits, kernels.halves))
    return layout_passes(panel, pair if recipe.pack else {}, limits, kernels.levels(machine), kernels.TOGETHER, halves)


def _lay_out(graph: Graph, recipe: Recipe, machine: Target, check: str, note: Any, dump: Path | None) -> Graph:
    steps = layout(recipe, machine)
    # The kernels need every layout pass, so that JISU_BISECT, which limits the passes before, doesn't count here.
    light = "verify" if check == "numeric" else check
    return Pipeline(steps, check=light, dump=dump, limit=len(steps), on_pass=note).run(graph)[0]


# --- Weights -------------------------------------------------------------------------------------------------------


def _materialise(
    graphs: Mapping[str, Graph], entries: Mapping[str, Entry], tell: Progress, in_place: bool
) -> dict[str, np.ndarray]:
    """What the entries take as weights: computed one at a time, sources' pages let go, mapped files used as they are.

    in_place: whether kernels read them where they are, and want them aligned.
    """
    storages: dict[str, Storage] = {}
    for name, graph in graphs.items():
        known = stored(graph)
        storages |= {weight: known[weight] for weight, _ in entries[name].weights}
    arrays: dict[str, np.ndarray] = {}
    for i, (name, storage) in enumerate(storages.items()):
        array = storage.numpy()
        mapped = hasattr(storage, "release") and not array.flags.writeable
        if not (mapped and (_aligned(array) or not in_place)):
            array = _aligned_copy(array)
            release = getattr(storage, "release", None)
            if release is not None:
                release()
        arrays[name] = array
        tell("packing weights", 0.6 + 0.4 * (i + 1) / len(storages))
    return arrays


def _aligned(array: np.ndarray) -> bool:
    return array.ctypes.data % 64 == 0 and array.flags.c_contiguous


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    from jisu.compiler.types import dtype_name
    from jisu.runtime.executable import zeros

    copy = zeros(array.shape, dtype_name(array.dtype), "a weight")
    copy[...] = array
    copy.flags.writeable = False
    return copy


# --- Reports -------------------------------------------------------------------------------------------------------


def _typical_sizes(graph: Graph) -> dict[str, int]:
    """Sizes at which costs are stated: batch 1 and 128 tokens, or the smallest allowed."""
    names = [str(d) for n in graph.inputs[:1] for d in n.shape if not isinstance(d, int)]
    env = {name: max(graph.ranges.get(name, (1, None))[0], 1) for name in graph.symbols}
    if len(names) > 1:
        high = graph.ranges.get(names[1], (1, None))[1]
        env[names[1]] = min(128, high or 128)
    return env


def _pass_report(done: Report, graph: Graph, env: Mapping[str, int], machine: Any) -> dict[str, Any]:
    from jisu.passes.memory import plan_memory

    sizes = _complete(graph, env)
    cost = graph_cost(graph, sizes, machine)
    return {
        "name": done.name,
        "exact": done.exact,
        "nodes": done.nodes,
        "seconds": done.seconds,
        "weight_bytes": weight_bytes(graph),
        "flops": cost.flops,
        "launches": cost.launches,
        "peak_bytes": plan_memory(graph, sizes).peak_bytes,
        "predicted_s": cost.seconds,
        "measured_s": None,
        "error": done.error,
        "notes": done.notes,
    }


def _complete(graph: Graph, env: Mapping[str, int]) -> dict[str, int]:
    """`env` with a size for the cache's symbols: 256 slots."""
    return {name: env.get(name, 256) for name in graph.symbols}


def _layer_report(graph: Graph, env: Mapping[str, int], machine: Any) -> list[dict[str, Any]]:
    """Costs per module of the user's model, in the graph's order."""
    from jisu.compiler.cost import Cost, node_cost

    sizes = _complete(graph, env)
    found: dict[str, Cost] = {}
    for node in graph.nodes:
        if not node.op.leaf:
            where = node.source.partition(" ")[0] or "(other)"
            found[where] = found.get(where, Cost()) + node_cost(node, sizes, machine)
    return [
        {"layer": k, "flops": c.flops, "bytes": c.bytes, "launches": c.launches, "predicted_s": c.seconds}
        for k, c in found.items()
    ]


def _launch_report(
    code: Mapping[str, bytes], graphs: Mapping[str, Graph], env: Mapping[str, int], sequence: str | None
) -> list[dict[str, Any]]:
    """Per entry of a decoder on a GPU how many launches one token takes, how many of them may begin before those before them end, and the
    gaps between the others."""
    found: list[dict[str, Any]] = []
    if PLANS not in code or sequence is None:
        return found
    for name, plan in json.loads(code[PLANS])["entries"].items():
        launches = Plan.from_json(plan).launches({**_complete(graphs[name], env), sequence: 1})
        early = sum(launch.early for launch in launches[1:])
        gaps = (len(launches) - 1 - early) * GAP_S
        found.append({"entry": name, "launches": len(launches), "early": early, "gaps_s": gaps})
    return found


def _simulated(
    graphs: Mapping[str, Graph], env: Mapping[str, int], machine: Any, source: Source
) -> list[dict[str, Any]]:
    """What the timing model says of each entry, for machines that have one."""
    from jisu.targets import facts

    known = {name: 1 for graph in graphs.values() for name in graph.symbols if not source.sequence} | dict(env)
    positions = source.max_positions or None
    found: list[dict[str, Any]] = facts.of(machine).simulated(graphs, known, machine, source.sequence, positions)
    return found


def _op_report(graph: Graph, env: Mapping[str, int], machine: Any) -> list[dict[str, Any]]:
    """What each kind of op costs, the dearest first."""
    from jisu.compiler.cost import Cost, node_cost

    sizes = _complete(graph, env)
    found: dict[str, Cost] = {}
    for node in graph.nodes:
        if not node.op.leaf:
            found[node.op.name] = found.get(node.op.name, Cost()) + node_cost(node, sizes, machine)
    told = [
        {"op": name, "count": c.launches, "flops": c.flops, "bytes": c.bytes, "predicted_s": c.seconds}
        for name, c in found.items()
        if c.launches
    ]
    return sorted(told, key=lambda c: -float(c["predicted_s"]))  # type: ignore[arg-type]


def _producers() -> dict[str, str]:
    found = {}
    for name in ("jisu", "apache-tvm", "apache-tvm-ffi", "torch", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
