"""DLPack: tensors that libraries lend each other, by ctypes alone (the structures of dlpack.h 1.0, https://dmlc.github.io/dlpack/latest).

A capsule holds the address of a managed tensor. Whoever takes it renames the capsule and calls the tensor's deleter when the memory isn't needed any
more; of a capsule that nobody took, its own destructor does.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler.types import DTYPES, dtype_name, numpy_dtype

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
VERSION = (1, 0)
_READ_ONLY, _IS_COPIED = 1, 2
_VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"  # older ones make plain capsules, which everyone takes
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}


class Tensor(ctypes.Structure):
    """DLTensor, the DLDevice and the DLDataType in it spelled out."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class Plain(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


_api = ctypes.PyDLL(None)
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)

_FORMS: dict[bytes, tuple[type[Plain] | type[Versioned], bytes]] = {
    b"dltensor_versioned": (Versioned, b"used_dltensor_versioned"),
    b"dltensor": (Plain, b"used_dltensor"),
}
"""By a capsule's name: what it holds, and its name once that is taken."""
for _name in _FORMS.values():  # capsules read that until the process ends, after this module's names are gone
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_name[1]))

_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@attrs.frozen(eq=False)
class _Memory:
    """What NumPy takes for an array's memory, and keeps."""

    __array_interface__: dict[str, Any]
    keep: Any


def lend(
    address: int, shape: Sequence[int], dtype: np.dtype, device: tuple[int, int], keep: Any, *, versioned: bool, copied: bool = False
) -> Any:  # fmt: skip
    """A capsule of a contiguous tensor at an address. keep: stays until the deleter is called. copied: nobody else has the memory.

    NumPy makes it, of an array that nobody reads, and this function says which device that is on: a destructor or a deleter in Python
    would lose the error that is being raised when a capsule goes.
    """
    kind = dtype_name(dtype)
    stored = np.dtype(np.uint16) if kind == "bfloat16" else dtype  # which NumPy knows
    interface = {"version": 3, "shape": tuple(shape), "typestr": stored.str, "data": (address, False)}
    array = np.asarray(_Memory(interface, keep))
    capsule = array.__dlpack__(max_version=VERSION) if versioned and _VERSIONED else array.__dlpack__()
    made, _ = _managed(capsule)
    made.tensor.device_type, made.tensor.device_id = device
    if kind == "bfloat16":
        made.tensor.code = _CODES["bfloat"]
    if copied and isinstance(made, Versioned):
        made.flags |= _IS_COPIED
    return capsule


def _managed(capsule: Any) -> tuple[Plain | Versioned, bytes]:
    """The managed tensor of a capsule that nobody took, and the name of those that somebody did; raises BufferError for others."""
    for name, (form, used) in _FORMS.items():
        if _api.PyCapsule_IsValid(capsule, name):
            return form.from_address(_api.PyCapsule_GetPointer(capsule, name)), used
    raise BufferError("what __dlpack__ gave is no tensor that can be taken")


@attrs.frozen(eq=False)
class Lent:
    """Another library's memory, which is given back with this object."""

    read_only: bool


@attrs.frozen(eq=False)
class Borrowed:
    """A tensor of another library. strides: in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    owner: Lent

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after another, the last axis first."""
        along = zip(self.shape, self.strides, _strides(self.shape), strict=True)
        return 0 in self.shape or all(have == want for size, have, want in along if size > 1)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def device_of(value: Any) -> tuple[int, int] | None:
    """Where a value's memory is, as DLPack says it; None for what doesn't lend its memory."""
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        return None
    kind, number = value.__dlpack_device__()
    return int(kind), int(number)


def borrow(value: Any, stream: int) -> Borrowed:
    """What a value lends. stream: the CUDA stream that reads it (1 is the default one), behind what its library has begun.

    Raises BufferError for a version or a dtype that isn't known.
    """
    try:
        capsule = value.__dlpack__(stream=stream, max_version=VERSION)
    except TypeError:  # from before versions
        capsule = value.__dlpack__(stream=stream)
    managed, used = _managed(capsule)
    _api.PyCapsule_SetName(capsule, used)
    versioned = isinstance(managed, Versioned)
    owner = Lent(versioned and bool(managed.flags & _READ_ONLY))
    if managed.deleter:
        weakref.finalize(owner, _DELETER(managed.deleter), ctypes.addressof(managed))
    if versioned and managed.major != VERSION[0]:  # nothing behind the version is known
        raise BufferError(f"a tensor of DLPack {managed.major}.{managed.minor}, where {VERSION[0]} is known")
    tensor = managed.tensor
    name_of = {code: kind for kind, code in _CODES.items()}.get(tensor.code, f"code {tensor.code}, ")
    kind = name_of if tensor.code == _CODES["bool"] and tensor.bits == 8 else f"{name_of}{tensor.bits}"
    if tensor.lanes != 1 or kind not in DTYPES:
        raise BufferError(
            f"elements of {kind}{f'x{tensor.lanes}' if tensor.lanes != 1 else ''}, not one of {', '.join(DTYPES)}"
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _strides(shape)
    return Borrowed((tensor.data or 0) + tensor.byte_offset, shape, strides, numpy_dtype(kind), owner)
