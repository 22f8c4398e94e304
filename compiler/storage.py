"""Weights on disk: a reader and a writer of safetensors files that never hold more than one tensor in memory.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length (little endian), a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, then the tensors' bytes
without holes. Every number of the header is checked against the file's real size before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import ml_dtypes
import numpy as np
import numpy.typing as npt

from jisu.compiler.errors import ArtifactError, InputError
from jisu.compiler.graph import Storage

Bytes = npt.NDArray[np.uint8]
Producer = Callable[[], npt.NDArray[Any]]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_CODES: Mapping[np.dtype[Any], str] = {dtype: code for code, dtype in DTYPES.items()}

ALIGNMENT = 64
MAX_HEADER = 100_000_000  # the limit of the reference implementation
_MAX_RANK = 64  # NumPy's
_MAX_BYTES = 2**63 - 1
_PADDING = "__padding__"  # prefix of the filler entries between tensors whose size is no multiple of ALIGNMENT


# ------------------------------------------------------------------------------------------------------------ files


TRAVELLING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "config.json",
)
"""Files of a checkpoint that travel along with a compiled program."""


def check_parent(path: str | os.PathLike[str]) -> None:
    """Raises InputError where nothing new can stand at a path: its folder is missing, or can't be written."""
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise InputError(f"{os.fspath(path)!r} can't be written: there is no folder {str(parent)!r}")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{os.fspath(path)!r} can't be written: no permission to write in {str(parent)!r}")


def cache_folder(given: Path | None) -> Path:
    """Where compiled libraries, traces, and what is known of files are kept: as given, $JISU_CACHE_DIR, or ~/.cache/jisu."""
    if given is not None:
        return given
    if os.environ.get("JISU_CACHE_DIR"):
        return Path(os.environ["JISU_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jisu"


def aligned(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array whose elements begin at a multiple of `ALIGNMENT` bytes; raises MemoryError as NumPy does."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    shift = -raw.__array_interface__["data"][0] % ALIGNMENT
    return np.ndarray(tuple(shape), kind, raw, shift)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path` when all is written, and not at all where that fails; its folder is made.

    Raises OSError where it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{secrets.token_hex(8)}.part")
    try:
        with staging.open("xb") as file:
            yield file
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def map_file(path: str | os.PathLike[str]) -> Bytes:
    """Map a regular file into memory for reading; the result is a read-only uint8 array [size].

    Symbolic links are followed (download caches are made of them). The pages belong to the file: shortening the file
    while it is mapped kills the process at the next access, as with every memory map.

    Raises: ArtifactError if the path isn't a regular file; OSError with the path if it can't be opened.
    """
    # without O_NONBLOCK a FIFO would block for ever
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{os.fspath(path)}: not a regular file")
        return map_descriptor(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def map_descriptor(descriptor: int, size: int) -> Bytes:
    """Map the first `size` bytes of an open file for reading; the descriptor may be closed afterwards."""
    if size == 0:  # an empty mapping is an error of the operating system
        empty = np.empty(0, dtype=np.uint8)
        empty.setflags(write=False)
        return empty
    return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), dtype=np.uint8)


def release_pages(array: npt.NDArray[Any]) -> None:
    """Give the whole pages of a memory-mapped array back to the kernel; reading it again reads the file again.

    The pages at both ends may hold neighbours and stay. Does nothing for arrays that aren't read-only file mappings.
    """
    mapping = _mapping_of(array)
    if mapping is None or array.nbytes == 0 or not array.flags.c_contiguous:
        return
    base = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    begin = -(-(array.ctypes.data - base) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data - base + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _mapping_of(array: npt.NDArray[Any]) -> mmap.mmap | None:
    owner: object = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:  # dropping the pages of a private mapping would lose what was written
            return None
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def parse_json(data: bytes, what: str) -> Any:
    """Parse JSON from a file that nobody vouches for: a name that occurs twice is refused, as is NaN.

    Raises: ArtifactError that begins with `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return result

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is not valid JSON: {error}") from None


# ---------------------------------------------------------------------------------------------------------- reading


@attrs.frozen(eq=False)
class LazyTensor:
    """A tensor that stays on disk until it is looked at.

    `memory` is the read-only uint8 array [nbytes] of its bytes inside the mapped file.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    memory: Bytes = attrs.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return int(self.memory.nbytes)

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view of `shape` and `dtype`, without a copy (possibly unaligned, as the file has it).

        Raises: ArtifactError for a BOOL tensor with other bytes than 0 and 1, for which NumPy's results are undefined.
        """
        if self.dtype == np.bool_ and self.nbytes and self.memory.max() > 1:
            raise ArtifactError(f"tensor {self.name!r} has dtype BOOL but holds other bytes than 0 and 1")
        return self.memory.view(self.dtype).reshape(self.shape)

    def release(self) -> None:
        """Drop its pages from this process's memory; they come back from the file when they are read again."""
        release_pages(self.memory)


class TensorFile(Mapping[str, LazyTensor]):
    """The tensors of one safetensors file by name, in the file's order, and its `metadata`."""

    def __init__(self, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
        self._tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata)

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_safetensors(source: str | os.PathLike[str] | Bytes, *, label: str | None = None) -> TensorFile:
    """Open a safetensors file (a path, or the read-only uint8 array of a mapped one) and check its whole header.

    `label` stands for the file in error messages; by default its path.

    Raises: ArtifactError for anything that isn't a whole, consistent safetensors file; OSError if it can't be opened.
    """
    if isinstance(source, np.ndarray):
        memory, label = source, label or "<memory>"
        if memory.dtype != np.uint8 or memory.ndim != 1 or memory.flags.writeable:
            raise InputError(
                f"{label}: expected a read-only uint8 array of rank 1, got {memory.dtype} of {memory.shape}"
            )
    else:
        memory, label = map_file(source), label or os.fspath(source)
    header, begin = _header(memory, label)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ArtifactError(f"{label}: __metadata__ must map strings to strings")
    entries = [_entry(name, entry, memory.size - begin, label) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    tensors: dict[str, LazyTensor] = {}
    position = 0
    for name, dtype, shape, first, last in entries:
        if first != position:
            fault = "overlaps the tensor before it" if first < position else "has unused bytes before it"
            raise ArtifactError(f"{label}: tensor {name!r} {fault} (it begins at {first}, expected {position})")
        position = last
        if not name.startswith(_PADDING):
            tensors[name] = LazyTensor(name, dtype, shape, memory[begin + first : begin + last])
    if position != memory.size - begin:
        raise ArtifactError(f"{label}: the tensors need {position} bytes, the file has {memory.size - begin} for them")
    return TensorFile(tensors, metadata)


def _header(memory: Bytes, label: str) -> tuple[dict[str, Any], int]:
    """The parsed header and the position of the first tensor's byte."""
    if memory.size < 8:
        fault = "truncated" if memory.size else "empty"
        raise ArtifactError(f"{label}: {fault} safetensors file ({memory.size} bytes)")
    length = int.from_bytes(memory[:8].tobytes(), "little")
    if length > MAX_HEADER:
        raise ArtifactError(f"{label}: not a safetensors file (it would have a header of {length} bytes)")
    if length > memory.size - 8:
        raise ArtifactError(f"{label}: truncated safetensors file (header of {length} bytes, file of {memory.size})")
    data = memory[8 : 8 + length].tobytes()
    if not data.startswith(b"{"):
        raise ArtifactError(f"{label}: not a safetensors file (its header doesn't start with '{{')")
    header = parse_json(data, f"{label}: the safetensors header")
    if not isinstance(header, dict):
        raise ArtifactError(f"{label}: the safetensors header is not an object")
    return header, 8 + length


def _entry(name: str, entry: object, size: int, label: str) -> tuple[str, np.dtype[Any], tuple[int, ...], int, int]:
    """One checked entry of the header: name, dtype, shape, first byte, end."""
    what = f"{label}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{what} needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ArtifactError(f"{what} has the unknown dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise ArtifactError(f"{what} has the invalid shape {_short(shape)}")
    if math.prod(max(dim, 1) for dim in shape) * dtype.itemsize > _MAX_BYTES:
        raise ArtifactError(f"{what} has the shape {_short(shape)}, whose size overflows 64 bits")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ArtifactError(f"{what} has data_offsets {_short(offsets)} outside of the file's {size} bytes of data")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise ArtifactError(f"{what} ({entry['dtype']}{shape}) needs {needed} bytes, has {offsets[1] - offsets[0]}")
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def open_checkpoint(folder: str | os.PathLike[str]) -> Mapping[str, LazyTensor]:
    """The weights of a checkpoint folder by name: `model.safetensors`, or the shards of `model.safetensors.index.json`.

    Raises: ArtifactError if the folder has neither, or index and shards disagree; OSError if it can't be read.
    """
    root = Path(folder)
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    names = set(os.listdir(root))
    if index.name in names:
        return _open_shards(root, index)
    if single.name in names:
        return open_safetensors(single)
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    hint = (
        f"; {pickled[0]} is a pickle, which jisu never reads: save it again with safe_serialization=True"
        if pickled
        else ""
    )
    raise ArtifactError(f"{root}: no {single.name} and no {index.name} in this folder{hint}")


def _open_shards(root: Path, index: Path) -> Mapping[str, LazyTensor]:
    parsed = parse_json(map_file(index).tobytes(), str(index))
    where = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(where, dict) or not where:
        raise ArtifactError(f"{index}: weight_map is missing or empty")
    shards: dict[str, TensorFile] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, shard in where.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise ArtifactError(
                f"{index}: tensor {name!r} names {shard!r}, not a plain *.safetensors name in this folder"
            )
        if shard not in shards:
            try:
                shards[shard] = open_safetensors(root / shard)
            except FileNotFoundError:
                raise ArtifactError(f"{index}: the shard {shard} is missing in {root}") from None
        if name not in shards[shard]:
            raise ArtifactError(f"{index}: tensor {name!r} is not in {shard}")
        tensors[name] = shards[shard][name]
    return tensors


# ---------------------------------------------------------------------------------------------------------- writing


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, tuple[npt.DTypeLike, tuple[int, ...], Producer]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = ALIGNMENT,
) -> int:
    """Write tensors `{name: (dtype, shape, producer)}` one at a time and return the number of bytes written.

    Each producer is called once, when its tensor's turn has come, and its array is dropped before the next is produced.
    Every tensor begins at a multiple of `alignment` from the file's start. Since the format allows no holes, tensors
    whose size is a multiple of it come first (in the given order) and the rest is separated by small uint8 entries,
    which this reader hides; files for other readers are written with an alignment of 1, and have none.

    Raises: InputError for a dtype the format lacks, a reserved name, or an array that isn't what was declared.
    """
    specs = [(name, np.dtype(dtype), tuple(shape), producer) for name, (dtype, shape, producer) in tensors.items()]
    specs.sort(key=lambda spec: math.prod(spec[2]) * spec[1].itemsize % alignment != 0)
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name, dtype, shape, _ in specs:
        if name == "__metadata__" or name.startswith(_PADDING):
            raise InputError(f"a tensor can't have the reserved name {name!r}")
        if dtype not in _CODES:
            raise InputError(f"tensor {name!r}: safetensors has no dtype {dtype}; it has {', '.join(DTYPES)}")
        gap = -position % alignment
        if gap:
            header[f"{_PADDING}{position}"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": [position, position + gap],
            }
        begin = position + gap
        position = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, position]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise InputError(f"{len(specs)} tensors need a header of {len(text)} bytes; the format allows {MAX_HEADER}")
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for name, dtype, shape, producer in specs:
        gap = -written % alignment
        file.write(bytes(gap))
        written += gap + _write_tensor(file, name, dtype, shape, producer)
    return 8 + len(text) + written


def _write_tensor(file: BinaryIO, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], producer: Producer) -> int:
    array = producer()
    if array.dtype != dtype or array.shape != shape:
        raise InputError(
            f"tensor {name!r}: declared as {dtype}{list(shape)}, produced {array.dtype}{list(array.shape)}"
        )
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    file.write(data)
    return data.nbytes


_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
)


def write_checkpoint(
    out: Path, like: Path, tensors: Mapping[str, Storage], progress: Callable[[str, float], None] | None = None
) -> None:
    """A new checkpoint folder with these tensors, one in memory at a time; its other files are those of the folder `like`.

    The folder appears whole or not at all. Raises: InputError where something stands at `out` already or nothing can, OSError
    with the path if writing fails.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{os.fspath(out)!r} exists already; choose a new folder for the checkpoint")
    check_parent(out)
    done = 0

    def values(storage: Storage) -> npt.NDArray[Any]:
        nonlocal done
        array = storage.numpy()
        release = getattr(storage, "release", None)
        if release is not None:
            release()
        done += 1
        if progress is not None:
            progress("writing", done / len(tensors))
        return array

    staging = out.absolute().parent / f".jisu-{secrets.token_hex(8)}.tmp"
    staging.mkdir()
    try:
        for file in sorted(like.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, staging / file.name)
        with open(staging / "model.safetensors", "xb") as binary:
            specs = {name: (s.dtype, tuple(s.shape), functools.partial(values, s)) for name, s in tensors.items()}
            write_safetensors(binary, specs, {"format": "pt"}, alignment=1)  # which transformers asks for
            binary.flush()
            os.fsync(binary.fileno())
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
