"""Local checkpoint folders: what travels along, and traces kept by content, so that a model is traced once.

A folder's config.json and the versions of what traces it decide its graph. A trace that was kept is read back without
torch or transformers; weights are always the folder's own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from jisu.compiler.errors import ArtifactError, InputError, VerifyError
from jisu.compiler.graph import ArrayStorage, Graph, Storage
from jisu.compiler.storage import TRAVELLING, LazyTensor, open_checkpoint, open_safetensors, write_safetensors
from jisu.compiler.text import parse, to_text
from jisu.frontends.ready_made import as_codes

DECISIVE = ("g_idx", "weight_shape")
"""How names of tensors end whose values, not only their shapes, decide a trace."""


@attrs.frozen
class Decoder:
    """A causal language model, captured.

    graph: inputs input_ids and (where the model asks for it) position_ids, int64 [b, s]; output logits [b, s, vocabulary].
    sequence: the symbol of s. max_positions: the longest sequence the model was made for. files: the travelling files'
    contents. result: class of what the model's forward returns, "module:name". notes: what the checkpoint asks for that the graph
    doesn't do, in sentences. buffers: weights that are no parameters.
    """

    graph: Graph
    sequence: str
    vocabulary: int
    max_positions: int
    files: Mapping[str, bytes]
    result: str
    notes: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()


def travelling_files(folder: Path) -> dict[str, bytes]:
    """The contents of the files that travel along (tokenizer, chat template, generation config, config)."""
    return {name: (folder / name).read_bytes() for name in TRAVELLING if (folder / name).is_file()}


def load_checkpoint(folder: Path, cache: Path | None = None) -> Decoder:
    """The causal language model of a local checkpoint folder; its weights stay in the memory-mapped files.

    cache: a folder where traces are kept. Raises InputError for a folder that is no checkpoint, ArtifactError for
    damaged weights, UnsupportedError for a model that can't be compiled.
    """
    if not folder.is_dir():
        raise InputError(
            f"{str(folder)!r} is no folder; give a local checkpoint (config.json + safetensors) or a model object"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{str(folder)!r} has no config.json; give a checkpoint folder as transformers saves it")
    tensors = open_checkpoint(folder)
    key = _key(folder, tensors)
    kept = None if cache is None else cache / "traces" / hashlib.sha256(key.encode()).hexdigest()
    found = None if kept is None else _read(kept, key, tensors, travelling_files(folder))
    if found is None:
        from jisu.frontends.huggingface import trace_checkpoint

        found = trace_checkpoint(folder, tensors)
        if kept is not None:
            _keep(kept, key, found)
    return found


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent
    for path in sorted([*root.rglob("*.py"), *(root.parent / "compiler").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(folder: Path, tensors: Mapping[str, LazyTensor]) -> str:
    """Everything that a trace depends on, as text."""
    versions = {}
    for name in ("jisu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    kinds = {name: f"{t.dtype}{list(t.shape)}" for name, t in sorted(tensors.items())}
    config = (folder / "config.json").read_text(errors="replace")
    decisive = {
        n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in sorted(tensors.items()) if n.endswith(DECISIVE)
    }
    return json.dumps([config, kinds, decisive, versions, _sources()])


def _keep(kept: Path, key: str, decoder: Decoder) -> None:
    """Keep a trace, in one step; where the disk is full or can't be written, it isn't kept."""
    stored = {name: s.name for name, s in decoder.graph.weights.items() if isinstance(s, LazyTensor)}
    own = {name: s for name, s in decoder.graph.weights.items() if name not in stored}
    facts = {
        "sequence": decoder.sequence,
        "vocabulary": decoder.vocabulary,
        "max_positions": decoder.max_positions,
        "result": decoder.result,
        "notes": decoder.notes,
        "buffers": sorted(decoder.buffers),
        "stored": stored,
    }
    staging = None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="new-", dir=kept.parent))
        text = to_text(decoder.graph, sources=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (staging / "graph.txt").write_text(text)
        (staging / "facts.json").write_text(json.dumps({"key": key, "graph": digest, "facts": facts}))
        with open(staging / "constants.safetensors", "wb") as file:
            write_safetensors(file, {n: (np.dtype(s.dtype), tuple(s.shape), s.numpy) for n, s in own.items()}, {})
        os.rename(staging, kept)
    except OSError:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _read(kept: Path, key: str, tensors: Mapping[str, Any], files: Mapping[str, bytes]) -> Decoder | None:
    """The trace in `kept` if it is whole and was made for exactly this key; anything wrong is a miss."""
    try:
        entry = json.loads((kept / "facts.json").read_bytes())
        text = (kept / "graph.txt").read_text()
        if entry["key"] != key or entry["graph"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        facts = entry["facts"]
        weights: dict[str, Storage] = {name: as_codes(tensors[stored]) for name, stored in facts.pop("stored").items()}
        facts["buffers"] = frozenset(facts["buffers"])
        constants = open_safetensors(kept / "constants.safetensors")
        weights |= {name: ArrayStorage(t.numpy().copy()) for name, t in constants.items()}
        notes = tuple(facts.pop("notes"))
        return Decoder(parse(text, weights), files=files, notes=notes, **facts)
    except (OSError, ValueError, KeyError, TypeError, ArtifactError, VerifyError):
        return None
