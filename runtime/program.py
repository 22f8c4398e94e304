"""A program: a compiled model that is called, generates, explains itself, and is saved."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.entry import Entry
from jisu.compiler.errors import (
    ArtifactError,
    IndexOutOfRangeError,
    InputError,
    InputTypeError,
    JisuError,
    TargetError,
    TensorMemoryError,
)
from jisu.compiler.graph import ArrayStorage, Graph
from jisu.compiler.interpret import bind_symbols, interpret
from jisu.compiler.launches import PLANS
from jisu.compiler.signature import Signature
from jisu.compiler.storage import TRAVELLING, write_safetensors
from jisu.compiler.text import parse, parse_type
from jisu.compiler.types import TensorType, dtype_name, fixed, numpy_dtype
from jisu.runtime import artifact
from jisu.runtime.cuda import DeviceExecutable, check_writable, is_there
from jisu.runtime.cuda_memory import DeviceArray
from jisu.runtime.executable import Executable, Started
from jisu.runtime.generate import Chunk, Generation, GenerationConfig, Tokenizer, generate
from jisu.runtime.session import MAIN, DecoderInfo, Session


@attrs.define(eq=False)
class Compiled:
    """The parts of a program, as the driver or `load` puts them together.

    code: what runs, by file name: a shared library, or a GPU's kernels and plans. weights: arrays by name. entries: how each
    entry is called. graphs: per entry, the IR text. report: what `explain` shows. files: tokenizer and configuration.
    """

    code: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    entries: Mapping[str, Entry]
    graphs: Mapping[str, str]
    signature: Signature
    target: Mapping[str, Any]
    recipe: str
    report: dict[str, Any]
    decoder: DecoderInfo | None = None
    files: Mapping[str, bytes] = attrs.field(factory=dict)
    producers: Mapping[str, str] = attrs.field(factory=dict)


class Program:
    """A compiled model.

    Calling it equals calling the model: the same arguments, the same structure of results, torch tensors for torch
    tensors and NumPy arrays otherwise. Weights are a snapshot from when it was compiled. Calls from several threads are
    served one after another.
    """

    def __init__(self, parts: Compiled, num_threads: int | None = None, lacks: Sequence[str] = ()) -> None:
        """lacks: what its code needs and this machine doesn't have: such a program can only be saved."""
        self._parts, self._lacks = parts, (f"this machine lacks {', '.join(lacks)}",) if lacks else ()
        self._executable, self._num_threads = None, num_threads
        if not self._lacks:
            try:
                self._executable = _loaded(parts.code, parts.entries, num_threads)
            except TargetError as error:  # there is no such device here, or not the right one
                self._lacks = (str(error),)
        self._weights: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        main = parts.graphs.get(MAIN)
        self._checker = parse(main) if main is not None and parts.decoder is None else None
        self._looked_up = _tables(self._checker) if self._checker is not None else ()

    # --- calling ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the arguments that it was compiled for.

        Raises InputError for a missing, unexpected or ill-shaped argument (InputTypeError for a wrong dtype), naming
        it, what was expected and what came; IndexOutOfRangeError for an index outside its table.
        """
        if self._parts.decoder is not None:
            return self._call_decoder(*args, **kwargs)
        signature = self._parts.signature
        leaves = signature.flatten_call(args, kwargs)
        assert self._checker is not None
        gpu = self._executable if isinstance(self._executable, DeviceExecutable) else None
        arrays = [
            leaf if gpu is not None and is_there(leaf) else _as_array(leaf, node.name, node.tensor)
            for leaf, node in zip(leaves, self._checker.inputs, strict=True)
        ]
        if gpu is not None:
            arrays = gpu.borrowed(arrays)
            for _, index in signature.mutations:
                check_writable(self._checker.inputs[index].name, arrays[index])
        sizes = bind_symbols(self._checker, [tuple(a.shape) for a in arrays])
        for position, size, wraps in self._looked_up:
            if isinstance(arrays[position], np.ndarray):
                _check_indices(arrays[position], self._checker.inputs[position].name, size, wraps)
        try:
            outputs = self._run(MAIN, arrays)
        except TensorMemoryError as error:
            raise TensorMemoryError(_largest(self._checker, sizes)) from error
        except IndexOutOfRangeError as error:
            here = all(isinstance(array, np.ndarray) for array in arrays)  # the interpreter reads no GPU's memory
            raise IndexOutOfRangeError((self._index_at_fault(arrays) if here else "") or str(error)) from None
        as_torch = any(_is_torch(leaf) for leaf in leaves) or (not leaves and "torch" in sys.modules)
        values = [
            o if _is_torch(o) or isinstance(o, DeviceArray) else _to_torch(o) if as_torch else np.asarray(o)
            for o in outputs
        ]
        for position, index in signature.mutations:
            to: Any = arrays[index]
            if gpu is not None and isinstance(to, DeviceArray):
                gpu.write(to, values[position])
            else:
                value = values[position]
                _write_back(
                    leaves[index], gpu.read(value) if gpu is not None and isinstance(value, DeviceArray) else value
                )
        return signature.unflatten(values)

    def _index_at_fault(self, arrays: Sequence[np.ndarray]) -> str:
        """Which computed index lies outside its table: kernels only say that one does, the interpreter finds it."""
        assert self._checker is not None
        graph = attrs.evolve(self._checker, weights={k: ArrayStorage(v) for k, v in self._parts.weights.items()})
        for node in graph.nodes:
            if node.op in (ops.take, ops.gather, ops.scatter) or node.op in ops.LOOKUPS:
                try:
                    interpret(graph.replace(outputs=(node,)), arrays)
                except IndexOutOfRangeError as error:
                    return f"{error} ({node.op.name} of {node.parents[0].type})"
        return ""

    def run(self, entry: str, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """What one entry gives for its inputs, as `ir(entry)` lists them; nothing is checked but shapes and dtypes."""
        return self._run(entry, arrays)

    @property
    def parts(self) -> Compiled:
        """What it is made of."""
        return self._parts

    def _run(self, entry: str, arrays: Sequence[Any]) -> tuple[Any, ...]:
        if isinstance(self._executable, DeviceExecutable) and any(map(is_there, arrays)):
            with self._lock:
                weights = self._prepared(entry)
            return self._executable.call_there(entry, arrays, weights)
        return self._start(entry, arrays).results()

    def _start(self, entry: str, arrays: Sequence[Any]) -> Started:
        with self._lock:
            return cast(Started, self._runs_here().start(entry, arrays, self._prepared(entry)))

    def _prepared(self, entry: str) -> Any:
        """An entry's weights as the executable takes them."""
        if entry not in self._weights:
            self._weights[entry] = self._runs_here().prepare(entry, self._parts.weights)
        return self._weights[entry]

    @property
    def lacks(self) -> str:
        """Why the program can't run on this machine; "" where it can."""
        return "; ".join(self._lacks)

    def _runs_here(self) -> Any:
        """The executable; raises TargetError where this machine can't run it."""
        if self._executable is None:
            raise TargetError(
                f"this program is for {self._parts.target['name']!r}, and can't run here: {self.lacks}; save it, and load it on such a "
                "machine"
            )
        return self._executable

    def _call_decoder(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **others: Any
    ) -> Any:
        info = self._parts.decoder
        assert info is not None
        allowed = {"use_cache": (False, None), "return_dict": (True, None), "logits_to_keep": (0,)}
        for name, value in others.items():
            if name not in allowed or value not in allowed[name]:
                raise InputError(
                    f"unexpected argument {name}={value!r}; the program takes input_ids and attention_mask"
                )
        if input_ids is None:
            raise InputError("missing input 'input_ids'")
        ids = _as_array(input_ids, "input_ids", TensorType((1, 1), "int64"), any_shape=True)
        if ids.ndim != 2:
            raise InputError(f"input_ids: expected rank 2, int64[batch, sequence], got int64{list(ids.shape)}")
        start = _padding(attention_mask, ids.shape)
        if position_ids is not None:
            want = np.maximum(np.arange(ids.shape[1]) - start[:, None], 0)
            if not np.array_equal(np.broadcast_to(np.asarray(position_ids), ids.shape), want):
                raise InputError("position_ids: only positions that count each sequence's tokens from 0 are supported")
        whole = attrs.evolve(info, prefill_chunk=max(ids.shape[1], 1))
        logits = Session(whole, self._start, self._runs_here()).append(ids, start=start)
        result = _to_torch(logits) if _is_torch(input_ids) else logits
        return self._parts.signature.unflatten([result])

    # --- generating ------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that travelled along; raises InputError where the model came without one."""
        if self._tokenizer is None:
            if "tokenizer.json" not in self._parts.files:
                raise InputError(
                    "this program has no tokenizer, since its checkpoint had no tokenizer.json; give prompts as token ids"
                )
            self._tokenizer = Tokenizer.from_files(self._parts.files)
        return self._tokenizer

    def session(self, capacity: int | None = None) -> Session:
        """A new stateful step: `append(token_ids)` returns the new tokens' logits; `length`; `reset()`.

        capacity: slots to reserve per sequence. Raises JisuError where the program is no language model.
        """
        if self._parts.decoder is None:
            raise JisuError("this program is no causal language model: it has no session and can't generate")
        return Session(self._parts.decoder, self._start, self._runs_here(), capacity)

    @overload
    def generate(
        self, prompt: Any, *, generation_config: Any = None, stream: Literal[False] = False, **options: Any
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Any, *, generation_config: Any = None, stream: Literal[True], **options: Any
    ) -> Iterator[Chunk]: ...
    @overload
    def generate(
        self, prompt: Any, *, generation_config: Any = None, stream: bool, **options: Any
    ) -> Generation | Iterator[Chunk]: ...
    def generate(
        self, prompt: Any, *, generation_config: Any = None, stream: bool = False, **options: Any
    ) -> Generation | Iterator[Chunk]:
        """Generate text or ids from one prompt or a list of them.

        prompt: str, list of str, token ids [n] or [b, n], or a list of lists of ids. generation_config: ours, or
        transformers'. options: any field of `GenerationConfig` (max_new_tokens, do_sample, temperature, top_k, top_p,
        min_p, repetition_penalty, seed, stop, …). With `stream`, an iterator of chunks. Raises InputError for what
        doesn't fit.
        """
        info = self._parts.decoder
        if info is None:
            raise JisuError("this program is no causal language model: it can't generate")
        default = generation_config if generation_config is not None else self.default_generation
        if "prefill_chunk" not in options:
            options["prefill_chunk"] = info.prefill_chunk
        config = GenerationConfig.from_any(default, **options)
        tokenizer = self.tokenizer if "tokenizer.json" in self._parts.files else None
        return generate(self.session, prompt, config, tokenizer=tokenizer, stream=stream)

    @property
    def default_generation(self) -> GenerationConfig | None:
        """The options of the checkpoint's generation_config.json, or None where it came without one."""
        raw = self._parts.files.get("generation_config.json")
        return GenerationConfig.from_saved(json.loads(raw)) if raw is not None else None

    # --- saying what it is -----------------------------------------------------------------------------------------

    @property
    def num_threads(self) -> int:
        """Threads of the processor that kernels use."""
        return self._num_threads or 1 if self._executable is None else self._executable.num_threads

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(w.nbytes for w in self._parts.weights.values())

    @property
    def dtype(self) -> str | None:
        """The dtype that most bytes of the weights have; None where there are no weights."""
        sizes: dict[str, int] = {}
        for array in self._parts.weights.values():
            sizes[_dtype(array)] = sizes.get(_dtype(array), 0) + array.nbytes
        return max(sizes, key=sizes.__getitem__, default=None)

    @property
    def decoder(self) -> DecoderInfo | None:
        """What is known of a causal language model; None for other programs."""
        return self._parts.decoder

    def ir(self, entry: str | None = None) -> str:
        """The IR text of one entry (default: the first)."""
        return self._parts.graphs[entry or next(iter(self._parts.graphs))]

    def explain(self) -> dict[str, Any]:
        """What each pass did and what the program is made of: see docs/architecture.md for the keys."""
        return self._parts.report

    @property
    def recipe(self) -> str:
        """The recipe as TOML."""
        return self._parts.recipe

    @property
    def target(self) -> Mapping[str, Any]:
        """The target's description."""
        return self._parts.target

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program as one file (a path with a suffix, "llama.jisu") or a folder (without).

        Writing is atomic. Raises OSError where the path can't be written, or something that is no artifact stands there.
        """
        parts = self._parts
        decoder = parts.decoder
        meta: dict[str, Any] = {
            "entries": {name: entry.to_json() for name, entry in parts.entries.items()},
            "call": parts.signature.to_json(),
        }
        if decoder is not None:
            state = [[n, str(t), w, r] for n, t, w, r in decoder.state]
            meta["decoder"] = {**attrs.asdict(decoder, recurse=False), "state": state}
        manifest = artifact.Manifest(
            kind="module" if decoder is None else "decoder",
            jisu_version=parts.producers.get("jisu", ""),
            producers=dict(parts.producers),
            target=artifact.TargetInfo(
                name=str(parts.target["name"]),
                triple=str(parts.target["triple"]),
                features=tuple(parts.target["features"]),
                fingerprint=str(parts.report.get("target_fingerprint", "")),
            ),
            entry_points=tuple(parts.graphs),
            signature=_described(parts.graphs),
            meta=meta,
        )
        tensors = {name: (array.dtype, array.shape, lambda array=array: array) for name, array in parts.weights.items()}
        files: dict[str, Any] = {
            **parts.code,
            "weights.safetensors": lambda file: write_safetensors(file, tensors, {"format": "jisu"}),
            "recipe.toml": parts.recipe.encode(),
            "report.json": json.dumps(parts.report, indent=1).encode(),
            **{f"graph-{entry}.txt": text.encode() for entry, text in parts.graphs.items()},
            **{name: parts.files[name] for name in TRAVELLING if name in parts.files},
        }
        artifact.write(path, files, manifest)


def _described(graphs: Mapping[str, str]) -> artifact.Signature:
    graph = parse(next(iter(graphs.values())))

    def value(name: str, kind: TensorType) -> artifact.ValueInfo:
        return artifact.ValueInfo(
            name=name, dtype=kind.dtype, shape=tuple(d if isinstance(d, int) else str(d) for d in kind.shape)
        )

    ranges = {k: artifact.SymbolRange(low=low, high=high) for k, (low, high) in graph.ranges.items()}
    return artifact.Signature(
        inputs=tuple(value(n.name, n.tensor) for n in graph.inputs),
        outputs=tuple(value(f"output.{i}", n.tensor) for i, n in enumerate(graph.outputs)),
        symbols=ranges,
    )


def _loaded(code: Mapping[str, bytes], entries: Mapping[str, Entry], num_threads: int | None) -> Any:
    """What runs the entries: a library, loaded from a private folder that is gone afterwards, or a GPU's kernels."""
    if PLANS in code:
        return DeviceExecutable(code, entries)
    with tempfile.TemporaryDirectory(prefix="jisu-") as folder:
        path = Path(folder) / artifact.LIBRARY
        path.write_bytes(code[artifact.LIBRARY])
        return Executable.load(str(path), entries, num_threads)


def load(
    path: str | os.PathLike[str],
    *,
    features: Callable[[], Iterable[str]],
    num_threads: int | None = None,
    weights: Callable[[str, TensorType], np.ndarray] | None = None,
) -> Program:
    """Load a saved program; `features` tells this processor's features. See `jisu.load` for the errors.

    weights: gives an array for a weight's name and type, in place of those that were saved.
    """
    saved = artifact.read(path, features=features)
    manifest = saved.manifest
    try:
        meta = manifest.meta
        decoder = None
        if "decoder" in meta:
            fields = dict(meta["decoder"])
            state = tuple((n, parse_type(t), int(w), bool(r)) for n, t, w, r in fields.pop("state"))
            decoder = DecoderInfo(state=state, **fields)
        signature = Signature.from_json(meta["call"])
        entries = {name: Entry.from_json(entry) for name, entry in meta["entries"].items()}
        if weights is None:
            arrays = {name: tensor.numpy() for name, tensor in saved.tensors().items()}
        else:
            arrays = {
                name: weights(name, kind) for name, kind in dict(w for e in entries.values() for w in e.weights).items()
            }
        report = json.loads(saved.bytes("report.json"))
        graphs = {e: saved.bytes(f"graph-{e}.txt").decode() for e in manifest.entry_points}
        missing = {name for entry in entries.values() for name, _ in entry.weights} - set(arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{os.fspath(path)}: the manifest is incomplete ({type(error).__name__}: {error})"
        ) from error
    if missing:
        raise ArtifactError(f"{os.fspath(path)}: weights are missing: {', '.join(sorted(missing)[:5])}")
    files = {name: saved.bytes(name) for name in TRAVELLING if name in saved}
    target = {
        "name": manifest.target.name,
        "triple": manifest.target.triple,
        "features": list(manifest.target.features),
    }
    code = {name: saved.bytes(name) for name in artifact.CODE if name in saved}
    if not code:
        raise ArtifactError(f"{os.fspath(path)}: has no compiled kernels")
    parts = Compiled(
        code, arrays, entries, graphs, signature, target, saved.bytes("recipe.toml").decode(), report, decoder, files,
        manifest.producers,
    )  # fmt: skip
    return Program(parts, num_threads)


def _largest(graph: Graph, sizes: Mapping[str, int]) -> str:
    """Which value was too much: the largest, with its size."""
    types = [(n, n.tensor.at(sizes)) for n in graph.nodes if isinstance(n.type, TensorType)]
    node, kind = max(types, key=lambda item: fixed(item[1].nbytes))
    where = f" at {node.source}" if node.source else ""
    return f"out of memory: {node.op.name} gives {kind}, {fixed(kind.nbytes) / 2**30:.1f} GiB{where}"


def _tables(graph: Graph) -> tuple[tuple[int, int, bool], ...]:
    """(input position, size of the table, whether negative indices count from its end) for inputs that are indices."""
    found = []
    position = {node: i for i, node in enumerate(graph.inputs)}
    for node in graph.nodes:
        if node.op is not ops.take and node.op not in ops.LOOKUPS:
            continue
        indices = node.operands[ops.LOOKUPS.get(node.op, 1)]
        while indices is not None and indices.op in (ops.reshape, ops.cast):
            indices = indices.operands[0]
        size = node.rows if node.op in ops.LOOKUPS else node.parents[0].shape[node.axis]
        if indices in position and isinstance(size, int):
            found.append((position[indices], size, bool(node.attributes.get("wrap", False))))
    return tuple(found)


def _check_indices(indices: np.ndarray, name: str, size: int, wraps: bool) -> None:
    """A kernel would refuse them too, but without their name and value."""
    wrong = (indices < (-size if wraps else 0)) | (indices >= size)
    if wrong.any():
        raise IndexOutOfRangeError(f"input {name!r}: index {indices[wrong][0]} is outside the table of {size} rows")


# --- Arrays in and out ---------------------------------------------------------------------------------------------


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_array(value: Any, name: str, kind: TensorType, any_shape: bool = False) -> np.ndarray:
    """`value` as an array of exactly the declared dtype and rank, without a copy where possible."""
    if _is_torch(value):
        array = _from_torch(value)
    elif isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "__dlpack__"):
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError) as error:
            raise InputError(
                f"input {name!r}: its memory can't be read here ({error}); this program runs on the CPU: of an array on a GPU give it a copy "
                "in this machine's memory"
            ) from None
    elif isinstance(value, (bool, int, float, list, tuple)):
        array = np.asarray(value, None if not isinstance(value, float) else np.float32)
    else:
        raise InputTypeError(f"input {name!r}: expected a tensor ({kind}), got {type(value).__name__}")
    if array.dtype != numpy_dtype(kind.dtype):
        raise InputTypeError(f"input {name!r}: expected {kind.dtype}, got {_dtype(array)}")
    if not any_shape and array.ndim != kind.rank:
        raise InputError(f"input {name!r}: expected rank {kind.rank}, {kind}, got {_dtype(array)}{list(array.shape)}")
    return array


def _dtype(array: np.ndarray) -> str:
    try:
        return dtype_name(array.dtype)
    except JisuError:
        return str(array.dtype)


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.device.type != "cpu":
        raise InputError(f"expected a tensor on the CPU, got one on {tensor.device}, where this program doesn't run")
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return cast("np.ndarray", tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return cast("np.ndarray", tensor.numpy())


def _to_torch(value: Any) -> Any:
    import torch

    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _write_back(leaf: Any, value: Any) -> None:
    if _is_torch(leaf):
        import torch

        with torch.no_grad():
            leaf.copy_(value if _is_torch(value) else _to_torch(value))
    else:
        leaf[...] = np.asarray(value)


def _padding(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Padding slots in front of each sequence; right padding needs nothing, as later tokens are never read."""
    if attention_mask is None:
        return np.zeros(shape[0], np.int64)
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != shape:
        raise InputError(f"attention_mask: expected shape {shape}, as input_ids, got {mask.shape}")
    start = mask.argmax(1).astype(np.int64)
    lengths = mask.sum(1)
    for b in range(shape[0]):
        if not mask[b, start[b] : start[b] + lengths[b]].all():
            raise InputError(f"attention_mask: sequence {b} has a hole; only padding on the left or right is supported")
    return start
