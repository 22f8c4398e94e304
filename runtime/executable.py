"""Runs a compiled library through TVM's runtime alone: nothing of TVM's compiler or of its Python package is loaded.

Entries take addresses (`jisu.compiler.entry`), so that inputs and outputs share memory with NumPy, or with torch through it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import mmap
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np

from jisu.compiler.entry import Entry
from jisu.compiler.errors import ArtifactError, IndexOutOfRangeError, InputError, JisuError, TensorMemoryError
from jisu.compiler.interpret import bind_types
from jisu.compiler.storage import ALIGNMENT, aligned
from jisu.compiler.types import numpy_dtype

_NOTHING: Mapping[str, np.ndarray] = {}
_KEPT_SHAPES = 1024  # combinations of input shapes for which an entry remembers what follows from them

_runtime_lock = threading.Lock()
_runtime: Any = None


def _load_runtime() -> Any:
    """tvm_ffi, with TVM's runtime library in the process; `import tvm`, before or later, finds the same library."""
    global _runtime
    with _runtime_lock:
        if _runtime is None:
            # Waking threads costs less than cores that spin while other programs want them; binding them is worse.
            os.environ.setdefault("TVM_BIND_THREADS", "0")
            # A pool can't grow beyond what TVM takes for the number of cores, which on x86 is half of them.
            os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
            tvm_ffi = _import_ffi()

            if "tvm" not in sys.modules:
                spec = importlib.util.find_spec("tvm")
                folders = list(spec.submodule_search_locations or ()) if spec is not None else []
                paths = [Path(f) / "lib" / "libtvm_runtime.so" for f in folders]
                path = next((p for p in paths if p.is_file()), None)
                if path is None:
                    raise JisuError("TVM's runtime library is missing; install apache-tvm==0.27.0.post1")
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            _runtime = tvm_ffi
    return _runtime


def _import_ffi() -> Any:
    """tvm_ffi, which imports torch if it can; where the program hasn't, that would cost a second and is of no use here."""
    if "torch" in sys.modules:
        import tvm_ffi

        return tvm_ffi
    sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed", for this import only
    try:
        import tvm_ffi
    finally:
        del sys.modules["torch"]
    return tvm_ffi


class Held:
    """An array whose elements lie one after another from an aligned address, with that address, which costs a microsecond to ask for."""

    __slots__ = ("address", "array", "dtype", "shape", "writeable")

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.writeable = array, array.shape, array.dtype, array.flags.writeable
        self.address: int = array.__array_interface__["data"][0]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.array.nbytes


@attrs.frozen(eq=False)
class Prepared:
    """Weights in the form in which `Executable.call` takes them; keeps the arrays alive."""

    addresses: np.ndarray
    arrays: tuple[np.ndarray, ...]


@attrs.frozen(eq=False)
class _Bound:
    """What follows from the shapes of an entry's inputs: the values of its symbols, the results' shapes, bytes of the arena."""

    sizes: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    arena: int


class Started(Protocol):
    """A call that was begun.

    values: its results where they are, which calls that are started later take as inputs; see what made it for how long.
    """

    @property
    def values(self) -> tuple[Any, ...]: ...

    def results(self) -> tuple[Any, ...]:
        """Wait for it: its results as arrays in this machine's memory, and what was updated in place as it was given. Raises what the call does."""


@attrs.frozen(eq=False)
class Finished:
    """A call that was done at once."""

    values: tuple[Any, ...]

    def results(self) -> tuple[Any, ...]:
        """Its results."""
        return self.values


class _Callable:
    """An entry with the two tables that it is called with: addresses, and sizes."""

    def __init__(self, ffi: Any, library: Any, name: str, entry: Entry) -> None:
        self.entry = entry
        self.run, self.measure = library[name], library[f"{name}_arena"]
        count = len(entry.inputs) + len(entry.weights) + len(entry.outputs) + 1
        self.addresses, self.sizes = (
            _aligned((n,), np.dtype(np.int64)).array for n in (count, max(len(entry.symbols), 1))
        )
        self.tables = tuple(map(ffi.from_dlpack, (self.addresses, self.sizes)))
        self.bytes = _aligned((1,), np.dtype(np.int64)).array
        self.bytes_table = ffi.from_dlpack(self.bytes)
        self.dtypes = tuple(numpy_dtype(t.dtype) for _, t in entry.inputs)
        self.results = tuple(numpy_dtype(t.dtype) for t in entry.outputs)
        self.written = tuple(a for a in entry.aliases if a is not None)
        self.bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def bind(self, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        """What follows from `shapes`, kept for the next call; raises InputError where they don't fit."""
        found = self.bound.get(shapes)
        if found is None:
            env = bind_types(self.entry.inputs, shapes)
            self.sizes[: len(self.entry.symbols)] = [env[s] for s in self.entry.symbols]
            self.measure(self.tables[1], self.bytes_table)
            results = tuple(tuple(int(d) for d in t.at(env).shape) for t in self.entry.outputs)
            if len(self.bound) >= _KEPT_SHAPES:
                self.bound.clear()
            found = self.bound[shapes] = _Bound(self.sizes.copy(), results, int(self.bytes[0]))
        return found


class Executable:
    """A compiled library, ready to be called. Calls from several threads are served one after another."""

    def __init__(self, path: str, entries: Mapping[str, Entry], num_threads: int) -> None:
        ffi = _load_runtime()
        try:
            self._library = ffi.load_module(path, keep_module_alive=False)
            self._entries = {name: _Callable(ffi, self._library, name, entry) for name, entry in entries.items()}
        except Exception as error:
            raise ArtifactError(f"can't load the compiled library {path}: {_first_line(error)}") from error
        self._configure = ffi.get_global_func("runtime.config_threadpool")
        self._arena = Held(zeros((1,), "uint8", "intermediate values"))
        self._lock = threading.Lock()
        self.num_threads = num_threads

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], entries: Mapping[str, Entry], num_threads: int | None = None
    ) -> Executable:
        """The library at `path` with these entries; kernels use `num_threads` threads (default: the processor cores that this
        process may use).

        Raises ArtifactError where the file is no compiled library or lacks an entry.
        """
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if num_threads < 1:
            raise InputError(f"num_threads must be at least 1, got {num_threads}")
        return cls(os.fspath(path), entries, num_threads)

    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> Held:
        """A tensor of zeros that entries update in place; raises TensorMemoryError naming `what` where the system has no room."""
        return Held(zeros(shape, dtype, what))

    def hold(self, value: np.ndarray) -> Held:
        """An array where entries read and update it."""
        return hold(value)

    def read(self, held: Held) -> np.ndarray:
        """What a tensor holds."""
        return held.array

    def prepare(self, entry: str, weights: Mapping[str, np.ndarray]) -> Prepared:
        """The weights that an entry takes, from arrays by name, made ready once for many calls.

        Raises ArtifactError for a weight that is missing or of another type.
        """
        arrays = []
        for name, kind in self._callable(entry).entry.weights:
            if name not in weights:
                raise ArtifactError(f"weight {name!r} is missing")
            array = hold(weights[name])
            if array.shape != kind.shape or array.dtype != numpy_dtype(kind.dtype):
                raise ArtifactError(f"weight {name!r}: expected {kind}, got {array.dtype}{list(array.shape)}")
            arrays.append(array)
        return Prepared(np.array([a.address for a in arrays], np.int64), tuple(a.array for a in arrays))

    def call(
        self, entry: str, inputs: Sequence[Any], weights: Prepared | Mapping[str, np.ndarray] = _NOTHING
    ) -> tuple[Any, ...]:
        """Run an entry on `inputs` (`Held` ones, arrays, or anything with DLPack; copied where strided or unaligned).

        Returns one array per output, in memory that no later call touches; an output that the program updates in place (a
        cache) is the input that was given for it, written back to where that had to be copied. Raises IndexOutOfRangeError for
        an index outside its table, ZeroDivisionError as InputError, InputError for arguments that don't fit, TensorMemoryError where memory is short.
        """
        called = self._callable(entry)
        if not isinstance(weights, Prepared):
            weights = self.prepare(entry, weights)
        given = [hold(x) for x in inputs]
        with self._lock:
            self._use_threads()
            bound = called.bind(tuple([a.shape for a in given]))
            for held, dtype in zip(given, called.dtypes, strict=True):
                if held.dtype != dtype:
                    name, kind = called.entry.inputs[given.index(held)]
                    raise InputError(f"input {name!r}: expected {kind.dtype}, got {held.dtype}")
            owned: dict[int | None, np.ndarray] = {
                i: owner(called.entry.inputs[i][0], inputs[i], given[i])
                for i in called.written
                if inputs[i] is not given[i] or not given[i].writeable
            }
            if self._arena.array.nbytes < bound.arena:
                self._arena = Held(zeros((bound.arena,), "uint8", "intermediate values"))
            outputs = [
                _aligned(shape, dtype) if alias is None else given[alias]
                for shape, dtype, alias in zip(bound.shapes, called.results, called.entry.aliases, strict=True)
            ]
            called.sizes[:] = bound.sizes
            first, last = len(given), len(given) + len(weights.addresses)
            called.addresses[:first] = [a.address for a in given]
            called.addresses[first:last] = weights.addresses
            called.addresses[last:-1] = [a.address for a in outputs]
            called.addresses[-1] = self._arena.address
            try:
                called.run(*called.tables)
            except Exception as error:
                raise _translated(error) from None
            results = [owned.get(i, a.array) for a, i in zip(outputs, called.entry.aliases, strict=True)]
            for array, a in zip(results, outputs, strict=True):
                if array is not a.array:
                    array[...] = a.array
        return tuple(results)

    def start(
        self, entry: str, inputs: Sequence[Any], weights: Prepared | Mapping[str, np.ndarray] = _NOTHING
    ) -> Finished:
        """`call`, for those who would go on meanwhile on another machine."""
        return Finished(self.call(entry, inputs, weights))

    def _callable(self, entry: str) -> _Callable:
        try:
            return self._entries[entry]
        except KeyError:
            raise InputError(f"the library has no entry {entry!r}") from None

    def _use_threads(self) -> None:
        """TVM keeps one pool of threads per calling thread."""
        if getattr(_POOLS, "size", None) != self.num_threads:
            self._configure(1, self.num_threads)
            _POOLS.size = self.num_threads


_POOLS = threading.local()


def _translated(error: Exception) -> Exception:
    text = _first_line(error)
    if "out of range" in text or "outside" in text:
        return IndexOutOfRangeError(text)
    if "division by zero" in text:
        return InputError(text)
    if isinstance(error, MemoryError) or re.search(r"bad_alloc|[Oo]ut of memory|posix_memalign", str(error)):
        return TensorMemoryError(f"an intermediate tensor doesn't fit into memory: {text}")
    return InputError(text)


def _first_line(error: Exception) -> str:
    """The message without TVM's backtrace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("Traceback", "File "))), repr(error))[:500]


# --- Arrays ---------------------------------------------------------------------------------------------------------


def hold(value: Any) -> Held:
    """`value` as an array in native byte order, contiguous and aligned; a copy where it is not."""
    if isinstance(value, Held):
        return value
    value = _array(value)
    if value.flags.c_contiguous and value.dtype.isnative:
        held = Held(value)
        if held.address % ALIGNMENT == 0:
            return held
    copy = _aligned(value.shape, value.dtype if value.dtype.isnative else value.dtype.newbyteorder("="))
    copy.array[...] = value
    return copy


def owner(name: str, value: Any, held: Held) -> np.ndarray:
    """The array that the caller of an entry gave for the input `name`, which the entry updates in place: that of `held`, or what `held` is a copy of.

    Raises InputError where it can't be written to.
    """
    array = held.array if isinstance(value, Held) else _array(value)
    if array.__array_interface__["data"][0] == held.address:
        array = held.array
    if not array.flags.writeable:
        raise InputError(f"input {name!r} is updated in place, but its array is read-only")
    if array is not held.array:
        check_apart(name, array.shape, [s // array.itemsize for s in array.strides], "numpy.ascontiguousarray(x)")
    return array


def check_apart(name: str, shape: Sequence[int], strides: Sequence[int], remedy: str) -> None:
    """Raise InputError where elements may share memory, so that the input `name` can't be updated; strides: in elements."""
    reach = 1
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride < reach:
            raise InputError(
                f"input {name!r} is updated in place, but elements of it share memory (shape {list(shape)}, strides {list(strides)} "
                f"in elements): give memory of its own, {remedy}"
            )
        reach += stride * (size - 1)


def _array(value: Any) -> np.ndarray:
    """`value` as an array, in its own memory where it has DLPack."""
    if isinstance(value, np.ndarray):
        return value
    return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> Held:
    """An uninitialised array in memory aligned to 64 bytes."""
    try:
        return Held(aligned(shape, dtype))
    except (MemoryError, ValueError):
        nbytes = math.prod(shape) * dtype.itemsize
        raise TensorMemoryError(f"no memory for a result of {nbytes / 2**30:.1f} GiB") from None


def zeros(shape: Sequence[int], dtype: str, what: str) -> np.ndarray:
    """An array of zeros on pages of its own, hence aligned; memory is used as it is touched.

    Raises TensorMemoryError naming `what` where the system has no room.
    """
    kind = numpy_dtype(dtype)
    count = math.prod(shape)
    try:
        buffer = mmap.mmap(-1, max(count * kind.itemsize, 1))
    except (OSError, OverflowError, ValueError):
        size = count * kind.itemsize
        raise TensorMemoryError(f"no memory for {what}: {dtype}{list(shape)} needs {size / 2**30:.1f} GiB") from None
    return np.frombuffer(buffer, kind, count).reshape(shape)
