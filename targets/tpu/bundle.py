"""What a TPU's owner gets: a folder with programs, weights, samples and a script that needs JAX alone.

`manifest.json` says what there is. Per entry and bucket there is a program, as StableHLO text (`.mlir`) and as the bytes of `jax.export`
for TPUs and CPUs (`.export`), if wanted also with our kernels inside (`.kernels.export`, for TPUs); `weights*.safetensors` has what they
take by name, where kernels are wanted in the layout that these read (`layouts` in the manifest); `kernels/` the chip's own kernels of the
products in them, as Pallas source to be read and run (the plain programs leave products to XLA); `samples.safetensors` seeded inputs and what
the simulated program makes of them; `run_tpu.py` loads, checks and times all that. Nothing here needs a TPU, and nothing here has seen one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError, InputError
from jisu.compiler.graph import ArrayStorage, Graph, Node, Storage
from jisu.compiler.storage import check_parent, write_safetensors
from jisu.compiler.types import TensorType, fixed, numpy_dtype, product, substitute
from jisu.targets.tpu import export
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.choose import product_of
from jisu.targets.tpu.kernels import chooser
from jisu.targets.tpu.pallas import source
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.stablehlo import emit, signature

FORMAT = "jisu-tpu"
VERSION = 3
SCRIPT = "run_tpu.py"
PLATFORMS = ("tpu", "cpu")
TOLERANCE = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-6}
"""How far floats may be off the simulation's, over the largest of them, by the coarsest dtype of floats among the weights."""

ROUNDED = 0.15
"""As `TOLERANCE`, where activations or caches are rounded to few levels: the least difference before moves some of them by a level."""

SHARD = 4 << 30
"""Bytes of weights after which another file begins."""

STEPS = 20
"""Times that the script runs a program again to time it; a decoder writes so many tokens."""

PROMPTS = 5
"""Times that it reads a decoder's prompt again, which puts the same keys and values where they are already."""

TOKENS = 8
"""How many of them are compared with the simulation's."""

Run = Callable[[str, Sequence[np.ndarray]], Sequence[Any]]
"""Computes an entry: the simulated program."""

Progress = Callable[[str, float], None]


@attrs.frozen
class Bucket:
    """An entry at fixed sizes of its symbols, which becomes one program.

    rows: tokens at a time, where the entry is a decoder's step. continues: its sample begins where that of the bucket before ended.
    """

    name: str
    entry: str
    sizes: Mapping[str, int]
    rows: int = 0
    continues: bool = False


@attrs.frozen
class Decoding:
    """What the step of a decoder takes beside tokens. table: which pages sequences have, or None; state: how many tensors."""

    vocabulary: int
    capacity: int
    state: int
    table: np.ndarray | None


@attrs.frozen
class Source:
    """What is exported, by entry. graphs: what `run` computes, simulated; programs: what is written, the same or with weights and caches laid
    out for kernels; both hold their weights. layouts: of weights that were laid out, how they follow from the graphs', as text of the IR. files:
    tokenizer and configuration; about: goes into the manifest. with_kernels: whether each program is written a second time, for TPUs alone, with
    our kernels in it."""

    chip: Chip
    graphs: Mapping[str, Graph]
    programs: Mapping[str, Graph]
    run: Run
    batch: int
    decoding: Decoding | None = None
    files: Mapping[str, bytes] = attrs.field(factory=dict)
    about: Mapping[str, Any] = attrs.field(factory=dict)
    layouts: Mapping[str, str] = attrs.field(factory=dict)
    with_kernels: bool = False
    seed: int = 0


@attrs.define
class _Samples:
    """Inputs and results of the programs, computed one after the other."""

    source: Source
    tolerance: float
    arrays: dict[str, np.ndarray] = attrs.Factory(dict)
    state: list[np.ndarray] = attrs.Factory(list)
    results: Sequence[Any] = ()
    length: int = 0
    start: np.ndarray = attrs.Factory(lambda: np.zeros(0, np.int64))

    def add(self, bucket: Bucket, entry: Entry) -> None:
        """Run a bucket's sample; keeps its inputs and its results, but for the state."""
        rng = np.random.default_rng((self.source.seed, bucket.rows))
        if self.source.decoding is None:
            given = [_drawn(rng, kind) for _, kind in entry.inputs]
            self.results = self.source.run(bucket.entry, given)
        else:
            given = self.tokens(bucket, rng)
            held = entry.inputs[len(entry.inputs) - self.source.decoding.state :]
            if not bucket.continues:
                self.state = [np.zeros(t.shape, numpy_dtype(t.dtype)) for _, t in held]  # type: ignore[arg-type]
            self.step(bucket.entry, given)
        for (name, _), array in zip(entry.inputs, given, strict=False):
            self.arrays[f"{bucket.name}.{name}"] = array
        for i, name in enumerate(_outputs(entry)):
            if entry.aliases[i] is None:
                self.arrays[f"{bucket.name}.{name}"] = np.array(self.results[i])

    def tokens(self, bucket: Bucket, rng: np.random.Generator) -> list[np.ndarray]:
        """Tokens, how many there were before, padding, and the table: a prompt that is padded by a quarter, or the likeliest next token."""
        decoding, batch = self.source.decoding, self.source.batch
        assert decoding is not None
        if bucket.continues:
            ids = self.likeliest()
        else:
            self.length, self.start = 0, np.full(batch, bucket.rows // 4, np.int64)
            ids = rng.integers(0, decoding.vocabulary, (batch, bucket.rows))
            ids[:, : bucket.rows // 4] = 0
        table = [] if decoding.table is None else [decoding.table]
        return [ids, np.array([self.length], np.int64), self.start, *table]

    def likeliest(self) -> np.ndarray:
        return np.asarray(self.results[0])[:, -1].argmax(-1)[:, None].astype(np.int64)

    def step(self, entry: str, given: Sequence[np.ndarray]) -> None:
        assert self.source.decoding is not None
        self.results = self.source.run(entry, [*given, *self.state])
        count = len(self.results) - self.source.decoding.state
        self.state, self.results = [np.asarray(s) for s in self.results[count:]], self.results[:count]
        self.length += given[0].shape[1]

    def continued(self, bucket: Bucket, steps: int) -> list[list[int]]:
        """The tokens that follow the last sample, per step those of all sequences."""
        found = []
        for _ in range(steps):
            given = self.tokens(attrs.evolve(bucket, continues=True), np.random.default_rng(0))
            found.append([int(i) for i in given[0][:, 0]])
            self.step(bucket.entry, given)
        return found


def write(folder: Path, given: Source, buckets: Sequence[Bucket], tell: Progress) -> dict[str, Any]:
    """Fill an empty folder; returns the manifest. Raises TargetError without JAX, CompileError for what can't be exported."""
    export.require()
    kernels: dict[Product, Counter[str]] = {}
    programs: list[dict[str, Any]] = []
    weights: dict[str, Storage] = {}
    samples = _Samples(given, _tolerance(given))
    for i, bucket in enumerate(buckets):
        tell(f"exporting {bucket.name}", 0.8 * i / len(buckets))
        graph, simulated = given.programs[bucket.entry], given.graphs[bucket.entry]
        entry = signature(graph, bucket.sizes)
        text = emit(graph, bucket.sizes, name=bucket.name)
        (folder / f"{bucket.name}.mlir").write_text(text, encoding="utf-8")
        (folder / f"{bucket.name}.export").write_bytes(export.export_bytes(text, entry, PLATFORMS, bucket.name))
        if given.with_kernels:
            text = emit(graph, bucket.sizes, chooser(given.chip), name=bucket.name)
            (folder / f"{bucket.name}.kernels.export").write_bytes(export.export_bytes(text, entry, "tpu", bucket.name))
        for node in simulated.nodes:
            spec = product_of(node, given.chip)
            if spec is not None:
                counted = kernels.setdefault(attrs.evolve(spec, m=_rows(node, bucket.sizes)), Counter())
                counted[bucket.name] += 1
        tell(f"simulating {bucket.name}", 0.8 * (i + 0.5) / len(buckets))
        samples.add(bucket, signature(simulated, bucket.sizes))
        programs.append(_described(bucket, entry, samples))
        if given.with_kernels:
            programs[-1]["with_kernels"] = f"{bucket.name}.kernels.export"
        weights |= {name: graph.weights[name] for name, _ in entry.weights}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **given.about,
        "chip": given.chip.name,
        "batch": given.batch,
        "note": "expected results were simulated on a processor; nothing of this was run on a TPU",
        "platforms": PLATFORMS,
        "programs": programs,
    }
    if given.decoding is not None:
        manifest["capacity"] = given.decoding.capacity
        steps = min(STEPS, given.decoding.capacity - samples.length)
        if buckets[-1].rows == 1:
            programs[-1] |= {"steps": steps, "writes": True}
            manifest["tokens"] = samples.continued(buckets[-1], min(TOKENS, steps))
    tell("writing kernels", 0.8)
    manifest["kernels"] = list(_kernels(folder, given.chip, kernels))
    tell("writing weights", 0.9)
    manifest["weights"] = _weights(folder, weights)
    manifest["layouts"] = {name: given.layouts[name] for name in weights if name in given.layouts}
    with open(folder / "samples.safetensors", "wb") as file:
        _tensors(file, {name: ArrayStorage(array) for name, array in samples.arrays.items()})
    for name, data in given.files.items():
        (folder / name).write_bytes(data)
    manifest["files"] = sorted(given.files)
    shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest["sha256"] = {p.relative_to(folder).as_posix(): _sha256(p) for p in found}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def check_place(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises InputError where an export can't stand, or stands already and isn't to go; what isn't one never goes."""
    place, shown = Path(folder), repr(os.fspath(folder))
    if place.is_dir():
        if any(place.iterdir()) and not is_bundle(place):
            raise InputError(f"{shown} holds something else than an export for TPUs; choose another folder")
        if any(place.iterdir()) and not overwrite:
            raise InputError(f"{shown} holds an export already; overwrite=True (--force) replaces it")
    elif place.exists() or place.is_symlink():
        raise InputError(f"{shown} is a file; name a folder")
    check_parent(folder)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is what `write` fills."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _outputs(entry: Entry) -> list[str]:
    """Names of results: of the input that is updated, or by number among the others."""
    numbers = itertools.count()
    return [f"output.{next(numbers)}" if a is None else entry.inputs[a][0] for a in entry.aliases]


def _described(bucket: Bucket, entry: Entry, samples: _Samples) -> dict[str, Any]:
    """A program: it takes inputs, state and weights, in this order, and returns outputs and the new state."""
    results = sum(alias is None for alias in entry.aliases)
    first = len(entry.inputs) - len(entry.aliases) + results
    if entry.aliases != (*(None for _ in range(results)), *range(first, len(entry.inputs))):
        raise CompileError(f"{bucket.name} doesn't end with its last inputs, updated, in their order: {entry.aliases}")
    inputs = [{"name": name, **_type(t)} for name, t in entry.inputs]
    return {
        "name": bucket.name,
        "entry": bucket.entry,
        "sizes": dict(bucket.sizes),
        "mlir": f"{bucket.name}.mlir",
        "export": f"{bucket.name}.export",
        "inputs": inputs[:first],
        "state": inputs[first:],
        "outputs": [
            {"name": name, **_type(t), "tolerance": samples.tolerance if "float" in t.dtype else 0}
            for name, t, alias in zip(_outputs(entry), entry.outputs, entry.aliases, strict=True)
            if alias is None
        ],
        "weights": [name for name, _ in entry.weights],
        "continues": bucket.continues,
        "steps": STEPS if samples.source.decoding is None else PROMPTS,
        "writes": False,
    }


def _type(kind: TensorType) -> dict[str, Any]:
    return {"shape": list(kind.shape), "dtype": kind.dtype}


def _rows(node: Node, sizes: Mapping[str, int]) -> int:
    return substitute(product(node.shape[:-1]), sizes)


def _drawn(rng: np.random.Generator, kind: TensorType) -> np.ndarray:
    """Small values of a type: numbers about 0, integers that are indices of any table with 8 rows, all true."""
    shape, dtype = tuple(map(fixed, kind.shape)), numpy_dtype(kind.dtype)
    if dtype == np.bool_:
        return np.ones(shape, bool)
    if dtype.kind in "iu":
        return rng.integers(0, 8, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _tolerance(given: Source) -> float:
    """Of the coarsest form of numbers in the programs."""
    found = [
        TOLERANCE[w.dtype.name] for g in given.graphs.values() for w in g.weights.values() if w.dtype.name in TOLERANCE
    ]
    rounding = (ops.encode_levels, ops.encode_rows, ops.fake_quantize)
    if any(node.op in rounding for graph in given.graphs.values() for node in graph.nodes):
        found.append(ROUNDED)
    return max(found, default=TOLERANCE["float32"])


def _kernels(folder: Path, chip: Chip, products: Mapping[Product, Mapping[str, int]]) -> Iterator[dict[str, Any]]:
    """Writes a module per product; says which programs have it how often."""
    (folder / "kernels").mkdir()
    for spec, counted in products.items():
        extras = [name for name in ("bias", "residual") if getattr(spec, name)]
        extras += [spec.activation] * (spec.activation != "none") + ["gated"] * spec.gated
        dtypes = (spec.dtype, "by", spec.weights) if spec.widens else (spec.dtype,)
        name = "_".join((*dtypes, f"{spec.m}x{spec.n}x{spec.k}", *extras, "to", spec.result))
        (folder / "kernels" / f"{name}.py").write_text(source(lower(spec, chip)), encoding="utf-8")
        yield {"file": f"kernels/{name}.py", **attrs.asdict(spec), "nodes": dict(counted)}


def _weights(folder: Path, weights: Mapping[str, Storage]) -> list[str]:
    """Writes them one after the other; the names of the files."""

    def nbytes(*stored: Storage) -> int:
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in stored)

    shards: list[dict[str, Storage]] = [{}]
    for name, stored in weights.items():
        if shards[-1] and nbytes(*shards[-1].values(), stored) > SHARD:
            shards.append({})
        shards[-1][name] = stored
    many = len(shards) > 1
    names = [f"weights-{i + 1:05}.safetensors" if many else "weights.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            _tensors(file, shard)
    return names


def _tensors(file: Any, stored: Mapping[str, Storage]) -> None:
    tensors = {name: (s.dtype, s.shape, s.numpy) for name, s in stored.items()}
    write_safetensors(file, tensors, {"format": "jisu"}, alignment=1)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def buckets_of(graph: Graph, name: str, wanted: Sequence[int], sizes: Mapping[str, int]) -> list[Bucket]:
    """The buckets of an entry without state: `sizes` says what symbols are; the one that it doesn't name has each of the wanted sizes.

    Raises InputError where several aren't named, or a size is out of a symbol's range.
    """
    unknown = sorted(set(sizes) - set(graph.symbols))
    if unknown:
        known = ", ".join(graph.symbols) or "none, its shapes are fixed"
        raise InputError(f"the program has no size {unknown[0]!r}; it has {known}")
    free = [symbol for symbol in graph.symbols if symbol not in sizes]
    if len(free) > 1:
        raise InputError(f"the program's sizes {', '.join(free)} vary; give sizes for all but one of them")
    found = [Bucket(name, name, dict(sizes))]
    if free:
        found = [Bucket(f"{name}-{n}", name, {**sizes, free[0]: n}) for n in wanted]
    for bucket in found:
        for symbol, size in bucket.sizes.items():
            low, high = graph.ranges.get(symbol, (1, None))
            if size < low or high is not None and size > high:
                raise InputError(f"{symbol} = {size} is not in {low}..{high}, for which the program was compiled")
    return found
