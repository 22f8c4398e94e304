"""Runs a compiled library through TVM's runtime alone: nothing of TVM's compiler or of its Python package is loaded.

Tensors cross by DLPack, so that inputs and outputs share memory with NumPy or torch. bfloat16, which NumPy can't export,
crosses by a hand-made DLPack capsule.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jisu.compiler.errors import ArtifactError, IndexOutOfRangeError, InputError, JisuError, TensorMemoryError
from jisu.compiler.types import numpy_dtype

_ALIGNMENT = 64
_CPU = 1
_POOLED = 2
_BFLOAT16 = numpy_dtype("bfloat16")
_BFLOAT = 4  # DLPack's type code of bfloat16

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


class Prepared(tuple[Any, ...]):
    """Weights in the form in which `Executable.call` takes them; keeps the arrays alive."""

    __slots__ = ()


class Executable:
    """A compiled library, ready to be called. Calls from several threads are served one after another."""

    def __init__(self, path: str, num_threads: int) -> None:
        ffi = _load_runtime()
        try:
            self._library = ffi.load_module(path, keep_module_alive=False)
            self._machine = self._library["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU, 0, _POOLED)
        except Exception as error:
            raise ArtifactError(f"can't load the compiled library {path}: {_first_line(error)}") from error
        self._configure = ffi.get_global_func("runtime.config_threadpool")
        self._functions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self.num_threads = num_threads

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_threads: int | None = None) -> Executable:
        """The library at `path`; kernels use `num_threads` threads (default: the processor cores that this process may use).

        Raises ArtifactError where the file is no compiled library.
        """
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if num_threads < 1:
            raise InputError(f"num_threads must be at least 1, got {num_threads}")
        return cls(os.fspath(path), num_threads)

    def prepare(self, weights: Sequence[Any]) -> Prepared:
        """Weights (arrays or anything with DLPack) in an entry's order, made ready once for many calls."""
        return Prepared(as_tensor(w) for w in weights)

    def call(self, entry: str, tensors: Sequence[Any], weights: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Run an entry on `tensors` (NumPy arrays, or anything with DLPack; copied where strided or unaligned).

        Returns one NumPy array per output, in memory that no later call touches; an output that the program updates in
        place (a cache) shares memory with the input that was given for it. Raises IndexOutOfRangeError for an index
        outside its table, ZeroDivisionError as InputError, InputError for arguments that don't fit.
        """
        if not isinstance(weights, Prepared):
            weights = self.prepare(weights)
        arguments = [as_tensor(t) for t in tensors]
        with self._lock:
            self._use_threads()
            function = self._functions.get(entry)
            if function is None:
                try:
                    function = self._functions[entry] = self._machine[entry]
                except AttributeError:
                    raise InputError(f"the library has no entry {entry!r}") from None
            try:
                results = function(*arguments, *weights)
            except Exception as error:
                raise _translated(error) from None
        return tuple(as_array(r) for r in results)

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


# --- Tensors across the border --------------------------------------------------------------------------------------


def as_tensor(value: Any) -> Any:
    """A TVM tensor on `value`'s memory, or on an aligned copy where it is strided or unaligned."""
    ffi = _load_runtime()
    if isinstance(value, ffi.Tensor):
        return value
    if not isinstance(value, np.ndarray):
        if hasattr(value, "__dlpack__"):
            try:
                return ffi.from_dlpack(value, require_alignment=_ALIGNMENT, require_contiguous=True)
            except Exception:
                value = _copied(value)
        else:
            value = np.asarray(value)
    if not value.flags.c_contiguous or _address(value) % _ALIGNMENT or value.dtype.byteorder == ">":
        value = aligned_copy(value)
    if value.dtype == _BFLOAT16 or not value.flags.writeable or not value.size:
        return ffi.from_dlpack(_Exported(value))
    return ffi.from_dlpack(value)


def _copied(value: Any) -> Any:
    """An aligned copy of something with DLPack that isn't a NumPy array (a torch tensor, also a bfloat16 one)."""
    if "bfloat16" in str(getattr(value, "dtype", "")):
        ffi = _load_runtime()
        value = value.contiguous() if hasattr(value, "contiguous") else value
        return aligned_copy(as_array(ffi.from_dlpack(value)))
    return aligned_copy(np.from_dlpack(value))


def _address(array: np.ndarray) -> int:
    """Where an array's elements begin; `array.ctypes.data` says the same in three times the time."""
    address: int = array.__array_interface__["data"][0]
    return address


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy in memory aligned to 64 bytes."""
    dtype = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    raw = np.empty(array.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    shift = -_address(raw) % _ALIGNMENT
    result = raw[shift : shift + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    result[...] = array
    return result


def as_array(tensor: Any) -> np.ndarray:
    """A NumPy array on a TVM tensor's memory, which it keeps alive."""
    name = str(tensor.dtype)
    shape = tuple(tensor.shape)
    if name != "bfloat16" and all(shape):
        return np.from_dlpack(tensor)
    dtype = numpy_dtype(name)
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    return np.asarray(_Words(tensor, count)).view(dtype).reshape(shape)


class _Words:
    """`count` 16-bit words of a tensor, as something that NumPy can wrap and that keeps the tensor alive."""

    def __init__(self, tensor: Any, count: int) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (count,),
            "typestr": "<u2",
            "version": 3,
        }


# DLPack by hand (dlpack.h, version 0.8), for what NumPy's own export refuses: bfloat16, read-only and empty arrays.


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]

_exports: dict[int, tuple[Any, ...]] = {}  # what exported tensors need, until their consumer lets them go


@_Deleter
def _release(managed: Any) -> None:
    _exports.pop(ctypes.addressof(managed.contents), None)


@atexit.register
def _leave_exports() -> None:
    """Programs may outlive the interpreter, which can't be called back any more: let their memory go with the process."""
    for *_, managed in _exports.values():
        managed.deleter = _Deleter()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_exports))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_CODES = {"b": 6, "i": 0, "u": 1, "f": 2}


class _Exported:
    """A contiguous array as a DLPack producer."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)

    def __dlpack__(self, **_: Any) -> Any:
        array = self.array
        shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        managed = _DLManagedTensor()
        managed.tensor = _DLTensor(
            array.ctypes.data,
            _CPU,
            0,
            array.ndim,
            _BFLOAT if array.dtype.name == "bfloat16" else _CODES[array.dtype.kind],
            array.dtype.itemsize * 8,
            1,
            shape,
            None,
            0,
        )
        managed.deleter = _release
        address = ctypes.addressof(managed)
        _exports[address] = (array, shape, managed)
        return _new_capsule(address, b"dltensor", None)
