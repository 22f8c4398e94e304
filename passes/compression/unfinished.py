"""What is done of a long compression, kept on disk so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jisu.compiler.graph import Graph
from jisu.compiler.storage import whole_file
from jisu.passes.compression.calibrate import Samples

Arrays = Mapping[str, np.ndarray]


class Unfinished:
    """Named groups of arrays in a folder whose name says what they belong to: graph, weights, samples and everything in `facts`."""

    def __init__(self, parent: Path, graph: Graph, samples: Samples, facts: Iterable[Any]) -> None:
        digest = hashlib.blake2b(str(graph).encode(), digest_size=16)
        for name, storage in sorted(graph.weights.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(storage.numpy()).view(np.uint8).data)
        for call in [samples] if isinstance(samples, np.ndarray) else [x for given in samples for x in given]:
            digest.update(f"{call.dtype}{call.shape}".encode())
            digest.update(np.ascontiguousarray(call).view(np.uint8).data)
        for fact in facts:
            digest.update(repr(fact).encode())
        self.folder = parent / digest.hexdigest()

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The group of that name; None where there is none, or none that can be read."""
        try:
            with np.load(self._path(name)) as stored:
                return {key.partition(":")[0]: _from_bits(key, stored[key]) for key in stored.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, name: str, arrays: Arrays) -> None:
        """Keep a group, whole or not at all."""
        with whole_file(self._path(name)) as file:
            np.savez(file, **dict(map(_to_bits, arrays.items())))  # type: ignore[arg-type]

    def done(self) -> None:
        """Forget everything: the compression is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / (hashlib.blake2b(name.encode(), digest_size=12).hexdigest() + ".npz")


def _to_bits(item: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """NumPy's files don't know bfloat16: its bits, and a mark in the key."""
    key, array = item
    return (f"{key}:bfloat16", array.view(np.uint16)) if array.dtype == ml_dtypes.bfloat16 else item


def _from_bits(key: str, array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if key.endswith(":bfloat16") else array
