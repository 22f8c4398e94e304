"""Compiled programs on disk: one file or one folder with fixed entry names, a manifest and a hash of everything.

A path with a suffix of letters and digits (``llama.jisu``) is written as ONE file, any other path (``build/llama``,
``llama-3.2``, ``llama.jisu/``) as a folder. A folder holds `manifest.json` and the entries under their names. The
single file is neither zip nor pickle: MAGIC, the manifest's length (eight bytes, little endian), the manifest, then the
entries in the manifest's order, each at the next multiple of PAGE so that weights can be memory-mapped; the gaps are
zero. Offsets follow from the sizes and aren't stored, so they can't be wrong.

Reading trusts nothing: the kind of file first, then sizes, then hashes, then the contents. The manifest carries its own
checksum, every other byte is covered by the hash of its entry. Weights of a file that was found whole before, and that the system
says nobody has written to since, aren't read again. A hash proves that a file is undamaged, not that it is
benign: `library.so` and a GPU's kernels are native code, so load only artifacts from people whose programs you would run.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import contextlib
import ctypes
import errno
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast, get_args, get_origin

import attrs
import cattrs
import numpy as np
import numpy.typing as npt

from jisu.compiler.errors import ArtifactError, InputError
from jisu.compiler.launches import CUBIN, OWN_PTX, PLANS, PTX
from jisu.compiler.storage import TRAVELLING, LazyTensor, cache_folder, map_descriptor, open_safetensors, parse_json

FORMAT = 7
TPU_EXPORT = "jisu-tpu"
"""The format of `jisu.targets.tpu.bundle`, which isn't loaded but run by its own script."""
MAGIC = b"JISU\x00\x01"
PAGE = 4096
PIECE = 1 << 24
MANIFEST = "manifest.json"
LIBRARY = "library.so"
CODE = (LIBRARY, CUBIN, OWN_PTX, PTX, PLANS)
"""What runs: a CPU's library, or a GPU's kernels and plans."""
NAMES = frozenset(
    {
        *CODE,
        "weights.safetensors",
        "graph.txt",
        "recipe.toml",
        "report.json",
        *TRAVELLING,
    }
)

Source = bytes | Path | Callable[[BinaryIO], object]
Features = Iterable[str] | Callable[[], Iterable[str]]

_SERIAL_NAME = re.compile(r"weights-[0-9]{5}\.safetensors|graph-[a-z0-9_]{1,32}\.txt")
_MAX_MANIFEST = 64 << 20
_BLOCK = 1 << 20
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_FOREIGN = (
    (b"\x80", "a pickle, which jisu never reads"),
    (b"PK\x03\x04", "a zip (torch.save and torch.export write these), which jisu never reads"),
    (b"\x7fELF", "a bare shared library"),
    (b"GGUF", "a GGUF file"),
)


def is_entry_name(name: str) -> bool:
    """Whether an artifact may have an entry of this name (`manifest.json` is not an entry)."""
    return name in NAMES or _SERIAL_NAME.fullmatch(name) is not None


# --------------------------------------------------------------------------------------------------------- manifest


@attrs.frozen(kw_only=True)
class TargetInfo:
    """What a program was compiled for: `features` are the processor features that its code needs."""

    name: str
    triple: str = ""
    features: tuple[str, ...] = ()
    fingerprint: str = ""


@attrs.frozen(kw_only=True)
class ValueInfo:
    """An input or output: `shape` has a number per fixed dimension and a symbol's name per dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@attrs.frozen(kw_only=True)
class SymbolRange:
    """The inclusive range of a dynamic dimension; `high` is None where it has no limit."""

    low: int = attrs.field(validator=attrs.validators.ge(0))
    high: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.high is not None and self.high < self.low:
            raise InputError(f"the range of a dimension is empty: {self.low} to {self.high}")


@attrs.frozen(kw_only=True)
class Signature:
    """What the program takes and returns."""

    inputs: tuple[ValueInfo, ...] = ()
    outputs: tuple[ValueInfo, ...] = ()
    symbols: Mapping[str, SymbolRange] = attrs.field(factory=dict[str, SymbolRange])


@attrs.frozen(kw_only=True)
class FileInfo:
    """Length of an entry, and its hash: the SHA-256 (lower-case hexadecimal) of the SHA-256 digests of its pieces of `PIECE` bytes, one
    after the other, so that several cores can check a large one."""

    bytes: int = attrs.field(validator=attrs.validators.ge(0))
    hash: str = attrs.field(validator=attrs.validators.matches_re("[0-9a-f]{64}"))


@attrs.frozen(kw_only=True)
class Manifest:
    """What an artifact is; `write` fills in `files`, in the order in which the entries lie in a single file."""

    jisu_version: str
    kind: Literal["module", "decoder"]
    target: TargetInfo
    producers: Mapping[str, str] = attrs.field(factory=dict[str, str])
    entry_points: tuple[str, ...] = ()
    signature: Signature = Signature()
    meta: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    files: Mapping[str, FileInfo] = attrs.field(factory=dict[str, FileInfo])
    format: int = FORMAT

    def to_bytes(self, length: int = 0) -> bytes:
        """JSON text, padded with spaces to `length`; its first line is the SHA-256 of all that follows the line.

        Raises: InputError if `meta` isn't plain JSON.
        """
        try:
            body = json.dumps(_CONVERTER.unstructure(self), indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the manifest's meta is not plain JSON: {error}") from None
        data = body[1:].encode("utf-8")  # without the brace, which stands before the checksum
        data += b" " * (length - len(_checksum_line(data)) - len(data))
        return _checksum_line(data) + data

    @classmethod
    def from_bytes(cls, data: bytes, label: str) -> Manifest:
        """Parse and check what `to_bytes` wrote; `label` begins every error message.

        Raises: ArtifactError if it is damaged, of another format version, or has missing, unknown or ill-typed fields.
        """
        parsed = parse_json(data, f"{label}: the manifest")
        if isinstance(parsed, dict) and parsed.get("format") == TPU_EXPORT:
            raise ArtifactError(
                f"{label}: is an export for a TPU, not a saved program; run it there with python {label}/run_tpu.py, or here with --cpu behind that"
            )
        if not isinstance(parsed, dict) or type(parsed.get("format")) is not int:
            raise ArtifactError(f"{label}: the manifest has no format version; this is not an artifact of jisu")
        if parsed["format"] != FORMAT:
            version = parsed["format"]
            raise ArtifactError(
                f"{label}: written in format {version}, this build reads {FORMAT}; compile the model again"
            )
        line, newline, rest = data.partition(b"\n")
        if line + newline != _checksum_line(rest):
            raise ArtifactError(f"{label}: the manifest is damaged (its checksum doesn't match)")
        del parsed["sha256"]
        try:
            manifest = _CONVERTER.structure(parsed, cls)
        except Exception as error:
            reasons = "; ".join(cattrs.transform_error(error, format_exception=_reason))
            raise ArtifactError(f"{label}: the manifest is invalid: {reasons}") from None
        foreign = [name for name in manifest.files if not is_entry_name(name)]
        if foreign:
            raise ArtifactError(f"{label}: the manifest lists {foreign[0]!r}, which is no entry name of an artifact")
        return manifest


def _checksum_line(rest: bytes) -> bytes:
    return b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode("ascii") + b'",\n'


def _reason(error: BaseException, _: type | None) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:  # cattrs would convert: int("5"), int(5.7), str(None)
            raise TypeError(f"expected {kind.__name__}, got {value!r:.80}")
        return value

    return structure


def _dimension(value: Any, _: Any) -> int | str:
    if type(value) is int and value >= 0 or type(value) is str and value:
        return value
    raise TypeError(f"expected a dimension or a symbol's name, got {value!r:.80}")


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _tuple(value: Any, kind: Any) -> Any:
    if type(value) is not list:  # cattrs takes any iterable: a string would become its letters
        raise TypeError(f"expected a list, got {value!r:.80}")
    return tuple(_CONVERTER.structure(item, get_args(kind)[0]) for item in value)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(str, _exactly(str))
    converter.register_structure_hook(int | str, _dimension)
    converter.register_structure_hook_func(_is_tuple, _tuple)
    return converter


_CONVERTER = _converter()

# ---------------------------------------------------------------------------------------------------------- writing


def write(path: str | os.PathLike[str], files: Mapping[str, Source], manifest: Manifest) -> Manifest:
    """Save an artifact at `path` and return its manifest with `files` filled in.

    Each entry is bytes, a file to copy, or a function that writes to the binary file that it is given (front to back).
    All is written beside `path`, flushed to the disk and renamed, so that another process sees either the old artifact
    or the new one; on any failure, KeyboardInterrupt included, the old one stays and nothing is left behind. An
    existing file or folder is replaced only if it is an artifact, or empty.

    Raises: InputError for an unknown entry name; OSError with the path if it can't be written or isn't ours to replace.
    """
    unknown = [name for name in files if not is_entry_name(name)]
    if unknown:
        raise InputError(f"an artifact has no entry {unknown[0]!r}; known: {', '.join(sorted(NAMES))}")
    single = _is_file_path(path)
    path = Path(path)
    temporary = path.parent / f".jisu-{secrets.token_hex(8)}.tmp"
    try:
        _check_replaceable(path, single)
        with _naming(path, temporary):
            if single:
                manifest = _write_single(temporary, files, manifest)
                os.replace(temporary, path)
            else:
                manifest = _write_folder(temporary, files, manifest)
                _move_folder(temporary, path, lambda: _check_replaceable(path, single=False))
            _sync_folder(path.parent)
    finally:
        _remove(temporary)
    return manifest


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], check: Callable[[], None]) -> Iterator[Path]:
    """A new folder to be filled, which stands at `path` when the block has ended, or nowhere if it fails (Ctrl-C included).

    check: raises where what stands at `path` can't be replaced; called first and last.
    """
    path = Path(path)
    temporary = path.parent / f".jisu-{secrets.token_hex(8)}.tmp"
    try:
        check()
        with _naming(path, temporary):
            os.mkdir(temporary)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            _sync_folder(temporary)
            _move_folder(temporary, path, check)
            _sync_folder(path.parent)
    finally:
        _remove(temporary)


def _is_file_path(path: str | os.PathLike[str]) -> bool:
    return not os.fspath(path).endswith(os.sep) and re.fullmatch(r"\.[A-Za-z]\w*", Path(path).suffix) is not None


@contextlib.contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors of the system name the path that the user gave, not our temporary one or none (a full disk)."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is not None and ours:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _check_replaceable(path: Path, single: bool) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        if single:
            raise IsADirectoryError(
                errno.EISDIR, f"is a folder; a path ending in {path.suffix} is written as one file", str(path)
            )
        names = os.listdir(path)
        if names and not (MANIFEST in names and all(name == MANIFEST or is_entry_name(name) for name in names)):
            raise FileExistsError(errno.EEXIST, "is a folder that holds something else than an artifact", str(path))
        return
    if not single:
        raise NotADirectoryError(errno.ENOTDIR, "exists and is not a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(path))
    with open(path, "rb") as file:
        if file.read(4) not in (b"", MAGIC[:4]):
            raise FileExistsError(errno.EEXIST, "exists and is not an artifact", str(path))


class _PieceHash:
    """The hash of an entry (see `FileInfo`) whose bytes come in any portions."""

    def __init__(self) -> None:
        self._whole, self._piece, self._left = hashlib.sha256(), hashlib.sha256(), PIECE

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: self._left]
            self._piece.update(part)
            self._left -= len(part)
            if not self._left:
                self._whole.update(self._piece.digest())
                self._piece, self._left = hashlib.sha256(), PIECE
            data = data[len(part) :]

    def hexdigest(self) -> str:
        whole = self._whole.copy()
        if self._left < PIECE:
            whole.update(self._piece.digest())
        return whole.hexdigest()


class _Sink(io.BufferedIOBase):
    """The write-only file that an entry is written to: it counts and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = _PieceHash()
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._size += view.nbytes
        return view.nbytes

    def info(self) -> FileInfo:
        return FileInfo(bytes=self._size, hash=self._hash.hexdigest())


def _write_entry(file: BinaryIO, source: Source) -> FileInfo:
    sink = _Sink(file)
    if isinstance(source, bytes):
        sink.write(source)
    elif isinstance(source, Path):
        with open(source, "rb") as origin:
            shutil.copyfileobj(origin, sink, _BLOCK)
    else:
        source(cast(BinaryIO, sink))
    return sink.info()


def _write_single(path: Path, files: Mapping[str, Source], manifest: Manifest) -> Manifest:
    # The manifest comes first in the file but is known last: hold its place with the largest numbers that can occur.
    largest = FileInfo(bytes=2**63, hash="0" * 64)
    length = len(attrs.evolve(manifest, files=dict.fromkeys(files, largest)).to_bytes())
    with open(path, "xb") as file:
        infos: dict[str, FileInfo] = {}
        position = len(MAGIC) + 8 + length
        file.seek(position)
        for name, source in files.items():
            file.write(bytes(-position % PAGE))
            infos[name] = _write_entry(file, source)
            position += -position % PAGE + infos[name].bytes
        manifest = attrs.evolve(manifest, files=infos)
        file.seek(0)
        file.write(MAGIC + length.to_bytes(8, "little") + manifest.to_bytes(length))
        _sync(file)
    return manifest


def _write_folder(path: Path, files: Mapping[str, Source], manifest: Manifest) -> Manifest:
    os.mkdir(path)
    infos: dict[str, FileInfo] = {}
    for name, source in files.items():
        with open(path / name, "xb") as file:
            infos[name] = _write_entry(file, source)
            _sync(file)
    manifest = attrs.evolve(manifest, files=infos)
    with open(path / MANIFEST, "xb") as file:
        file.write(manifest.to_bytes())
        _sync(file)
    _sync_folder(path)
    return manifest


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_folder(temporary: Path, path: Path, check: Callable[[], None]) -> None:
    """Rename a folder to a path where an older one may stand, which `check` allows to go, and which then stands at `temporary`."""
    try:
        os.rename(temporary, path)  # replaces nothing or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    check()  # again: it may have appeared since
    if _exchange(temporary, path):
        return
    backup = temporary.with_suffix(".old")
    os.rename(path, backup)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(backup, path)
        raise
    _remove(backup)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the kernel or the file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, rename_exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove(path: Path) -> None:
    """Remove what an attempt left behind; a failure here must not hide the error that led here."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------- reading


@attrs.frozen
class _Extent:
    descriptor: int
    offset: int
    size: int


class Artifact:
    """An opened artifact whose every byte has been checked; a context manager that closes its files.

    What `mmap` and `tensors` returned stays valid after `close`.
    """

    def __init__(self, path: str, manifest: Manifest, extents: Mapping[str, _Extent], descriptors: list[int]) -> None:
        self.path = path
        self.manifest = manifest
        self._extents = dict(extents)
        self.close = weakref.finalize(self, _close_all, descriptors)

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._extents

    @property
    def names(self) -> tuple[str, ...]:
        """The entries that it has."""
        return tuple(self._extents)

    def bytes(self, name: str) -> builtins.bytes:
        """The contents of an entry, hashed once more since the file may have changed.

        Raises: ArtifactError if there is no such entry or it has changed.
        """
        buffer = io.BytesIO()
        self._copy(name, buffer.write)
        return buffer.getvalue()

    def mmap(self, name: str) -> npt.NDArray[np.uint8]:
        """The entry as a read-only uint8 array [size] in the file's own pages.

        Raises: ArtifactError if there is no such entry.
        """
        extent = self._extent(name)
        # From the file's start, since the processor's pages may be larger than PAGE.
        return map_descriptor(extent.descriptor, extent.offset + extent.size)[extent.offset :]

    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors of all weight entries by name.

        Raises: ArtifactError if an entry isn't a valid safetensors file or two hold the same name.
        """
        result: dict[str, LazyTensor] = {}
        for name in sorted(self._extents):
            if not name.endswith(".safetensors"):
                continue
            for key, tensor in open_safetensors(self.mmap(name), label=f"{self.path}: {name}").items():
                if key in result:
                    raise ArtifactError(f"{self.path}: tensor {key!r} stands in two weight files")
                result[key] = tensor
        return result

    def _extent(self, name: str) -> _Extent:
        if name not in self._extents:
            raise ArtifactError(f"{self.path}: has no {name}; it has {', '.join(self._extents) or 'no entries'}")
        if not self.close.alive:
            raise ArtifactError(f"{self.path}: is closed")
        return self._extents[name]

    def _check(self, name: str) -> None:
        """Raise unless an entry has the manifest's hash.

        Weights whose file is known to be whole aren't read: hashing a gigabyte takes a core most of a second, and mapping it
        no time.
        """
        extent, label = self._extent(name), f"{self.path}: {name}"
        known = _known_whole(extent, self.manifest.files[name]) if name.endswith(".safetensors") else None
        if known is not None and os.path.exists(known):
            return

        def digest(start: int) -> builtins.bytes:
            found = hashlib.sha256()
            for block in _blocks(
                _Extent(extent.descriptor, extent.offset + start, min(PIECE, extent.size - start)), label
            ):
                found.update(block)
            return found.digest()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            whole = hashlib.sha256(b"".join(pool.map(digest, range(0, extent.size, PIECE))))
        self._compare(name, whole.hexdigest())
        if known is not None:
            with contextlib.suppress(OSError):  # a cache that can't be written is no reason to fail
                known.parent.mkdir(parents=True, exist_ok=True)
                known.touch()

    def _copy(self, name: str, receive: Callable[[memoryview], object]) -> None:
        """Pass an entry's bytes on block by block, and raise at its end if they don't have the manifest's hash."""
        digest = _PieceHash()
        for block in _blocks(self._extent(name), f"{self.path}: {name}"):
            digest.update(block)
            receive(block)
        self._compare(name, digest.hexdigest())

    def _compare(self, name: str, found: str) -> None:
        if found != self.manifest.files[name].hash:
            raise ArtifactError(f"{self.path}: {name} is damaged (its hash doesn't match the manifest)")


_SETTLED = 2.0
"""Seconds after its last change from which on a file's time of change tells whether it changed again: clocks tick, and files are
written within a tick."""


def _known_whole(extent: _Extent, info: FileInfo) -> Path | None:
    """The file whose existence says that an entry, in the state in which its file is now, was found whole; None if it is too new, or
    nothing can be kept."""
    status = os.fstat(extent.descriptor)
    if time.time() - status.st_ctime < _SETTLED:
        return None
    # The system sets the time of change (ctime) itself, at every write, and nobody can set it back.
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = json.dumps([*state, extent.offset, extent.size, info.hash])
    try:
        return cache_folder(None) / "whole" / hashlib.sha256(key.encode()).hexdigest()
    except RuntimeError:  # there is no home folder
        return None


def read(path: str | os.PathLike[str], *, features: Features | None) -> Artifact:
    """Open an artifact and check all of it: kind of file, sizes, hashes, manifest, and that this host can run it.

    `features` are the processor features of this host, or a function that finds them; with None the artifact can be
    inspected on any host.

    Raises: ArtifactError that says what is wrong; OSError with the path if it can't be opened.
    """
    label = os.fspath(path)
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise ArtifactError(f"{label}: is a symbolic link; give the path that it leads to, {os.path.realpath(path)}")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ArtifactError(f"{label}: is neither a regular file nor a folder")
    descriptors: list[int] = []
    try:
        load = _read_folder if stat.S_ISDIR(mode) else _read_single
        manifest, extents = load(label, descriptors)
        artifact = Artifact(label, manifest, extents, descriptors)
        for name in extents:
            artifact._check(name)
        if features is not None and PLANS not in extents:  # what runs on a device is compared with it when it is called
            _check_host(manifest.target, features, label)
    except BaseException:
        _close_all(descriptors)
        raise
    return artifact


def _read_single(label: str, descriptors: list[int]) -> tuple[Manifest, dict[str, _Extent]]:
    descriptor, size = _open(label, label, descriptors)
    head = _contents(_Extent(descriptor, 0, min(size, len(MAGIC) + 8)), label)
    if head[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{label}: {_foreign(head)}")
    if len(head) < len(MAGIC) + 8:
        raise ArtifactError(f"{label}: truncated after {size} bytes")
    length = int.from_bytes(head[len(MAGIC) :], "little")
    position = len(head) + length
    if length > _MAX_MANIFEST or position > size:
        raise ArtifactError(f"{label}: damaged or truncated (manifest of {length} bytes in a file of {size})")
    manifest = Manifest.from_bytes(_contents(_Extent(descriptor, len(head), length), label), label)
    extents: dict[str, _Extent] = {}
    gaps: list[_Extent] = []
    for name, info in manifest.files.items():
        gap = -position % PAGE
        gaps.append(_Extent(descriptor, position, gap))
        extents[name] = _Extent(descriptor, position + gap, info.bytes)
        position += gap + info.bytes
    if position != size:
        fault = "truncated" if size < position else "has foreign bytes at its end"
        raise ArtifactError(f"{label}: {fault} (the file has {size} bytes, the manifest describes {position})")
    if any(any(block) for gap in gaps for block in _blocks(gap, label)):
        raise ArtifactError(f"{label}: damaged (bytes between two entries aren't zero)")
    return manifest, extents


def _read_folder(label: str, descriptors: list[int]) -> tuple[Manifest, dict[str, _Extent]]:
    names = os.listdir(label)
    if MANIFEST not in names:
        checkpoint = "config.json" in names and any(name.endswith(".safetensors") for name in names)
        hint = "; it looks like a checkpoint, which jisu.compile takes" if checkpoint else ""
        raise ArtifactError(f"{label}: is a folder without {MANIFEST}, not an artifact{hint}")
    descriptor, size = _open(os.path.join(label, MANIFEST), label, descriptors)
    if size > _MAX_MANIFEST:
        raise ArtifactError(f"{label}: the manifest has {size} bytes, the limit is {_MAX_MANIFEST}")
    manifest = Manifest.from_bytes(_contents(_Extent(descriptor, 0, size), label), label)
    extents: dict[str, _Extent] = {}
    for name, info in manifest.files.items():
        if name not in names:
            raise ArtifactError(f"{label}: {name} is missing")
        descriptor, size = _open(os.path.join(label, name), f"{label}: {name}", descriptors)
        if size != info.bytes:
            raise ArtifactError(f"{label}: {name} has {size} bytes, the manifest says {info.bytes}")
        extents[name] = _Extent(descriptor, 0, size)
    return manifest, extents


def _open(path: str, label: str, descriptors: list[int]) -> tuple[int, int]:
    """Open a regular file that isn't a symbolic link: its descriptor (also added to `descriptors`) and its size."""
    try:  # without O_NONBLOCK a FIFO would block for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ArtifactError(f"{label}: is a symbolic link") from None
        raise
    descriptors.append(descriptor)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{label}: is not a regular file")
    return descriptor, status.st_size


def _blocks(extent: _Extent, label: str) -> Iterator[memoryview]:
    """The bytes of an extent, as views of one buffer that is overwritten from block to block."""
    buffer = memoryview(bytearray(min(_BLOCK, extent.size)))
    done = 0
    while done < extent.size:
        block = buffer[: min(_BLOCK, extent.size - done)]
        count = os.preadv(extent.descriptor, [block], extent.offset + done)
        if count == 0:
            raise ArtifactError(f"{label}: was shortened while it was read")
        yield block[:count]
        done += count


def _contents(extent: _Extent, label: str) -> builtins.bytes:
    return b"".join(bytes(block) for block in _blocks(extent, label))


def _foreign(head: bytes) -> str:
    if not head:
        return "is empty"
    if head[:4] == MAGIC[:4] and len(head) >= len(MAGIC):
        return f"has the container version {head[4:6].hex()}, this build reads {MAGIC[4:6].hex()}"
    if MAGIC.startswith(head):
        return f"truncated after {len(head)} bytes"
    kinds = [kind for prefix, kind in _FOREIGN if head.startswith(prefix)]
    return f"is {kinds[0]}, not an artifact of jisu" if kinds else "is not an artifact of jisu"


def _check_host(target: TargetInfo, features: Features, label: str) -> None:
    machine = platform.machine().lower()
    machine = _MACHINES.get(machine, machine)
    wanted = target.triple.partition("-")[0].lower()
    wanted = _MACHINES.get(wanted, wanted)
    if wanted and wanted != machine:
        raise ArtifactError(f"{label}: was compiled for {target.triple}, this host is {machine}; compile it again here")
    host = frozenset(features() if callable(features) else features)
    missing = [feature for feature in target.features if feature not in host]
    if missing:
        has = ", ".join(sorted(host)) or "none"
        raise ArtifactError(
            f"{label}: needs {', '.join(missing)}, which this host lacks (it has {has}); compile it again here"
        )


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
