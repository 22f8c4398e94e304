"""NVIDIA's driver library, which comes with every GPU's driver: all that a program needs to run on one."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jisu.compiler.errors import JisuError, TargetError, TensorMemoryError
from jisu.compiler.types import numpy_dtype

DRIVER = "JISU_CUDA_DRIVER"
"""The environment variable that names another library than the system's libcuda.so.1."""
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_…
_OUT_OF_MEMORY = 2
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
_MAP_DTYPES = {"uint8": 0, "float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_…
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_…B
_PROMOTION_256B = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_GRAPHS_OVERLAP = 12030  # CUDA 12.3
_NON_BLOCKING = 1
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


class Driver:
    """NVIDIA's driver library, opened once, with the first GPU's context."""

    _lock = threading.Lock()
    _opened: dict[str, Driver] = {}

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise TargetError(f"this machine has no NVIDIA driver ({error})") from None
        code = self._library.cuInit(0)
        if code:
            raise TargetError(f"NVIDIA's driver finds no GPU here (cuInit: error {code})")
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.run("cuDeviceGet", ctypes.byref(device), 0)
        self.device = device.value
        self.run("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
        name = ctypes.create_string_buffer(128)
        self.run("cuDeviceGetName", name, 128, self.device)
        self.name = name.value.decode(errors="replace")
        self.capability = (self.attribute(_MAJOR), self.attribute(_MINOR))
        self.multiprocessors = self.attribute(_MULTIPROCESSORS)
        version = ctypes.c_int()
        self.run("cuDriverGetVersion", ctypes.byref(version))
        self.overlaps = self.capability >= (9, 0) and version.value >= _GRAPHS_OVERLAP
        """Whether a launch, in a graph too, may begin before the one before it has ended."""

    @classmethod
    def open(cls) -> Driver:
        """The driver; raises TargetError where there is none, or no GPU."""
        path = os.environ.get(DRIVER, "libcuda.so.1")
        with cls._lock:
            if path not in cls._opened:
                cls._opened[path] = cls(path)
            return cls._opened[path]

    def attribute(self, number: int) -> int:
        """A property of the GPU."""
        value = ctypes.c_int()
        self.run("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def run(self, name: str, *args: Any) -> None:
        """Call a function of the driver; raises TensorMemoryError where memory is short, JisuError for other errors."""
        code = getattr(self._library, name)(*args)
        if code:
            self.fail(name, code)

    def fail(self, name: str, code: int) -> None:
        """Raise what stands for a driver's error."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode(errors="replace")
        if code == _OUT_OF_MEMORY:
            raise TensorMemoryError(f"the GPU ({self.name}) has no memory left: {said}")
        raise JisuError(f"the GPU's driver failed in {name}: {said} (error {code})")

    def code_of(self, name: str, *args: Any) -> int:
        """The error code of a function of the driver."""
        return int(getattr(self._library, name)(*args))

    @contextmanager
    def current(self) -> Iterator[None]:
        """The GPU's context is this thread's meanwhile; after that the one that was before is again."""
        self.run("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.code_of("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int, what: str) -> int:
        """The address of memory on the GPU."""
        pointer = ctypes.c_void_p()
        code = self.code_of("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        if code == _OUT_OF_MEMORY:
            raise TensorMemoryError(f"the GPU ({self.name}) has no {nbytes / 2**30:.2f} GiB left for {what}")
        if code:
            self.fail("cuMemAlloc", code)
        return int(pointer.value or 0)

    def tensor_map(self, address: int, dtype: str, shape: tuple[int, int], box: tuple[int, int]) -> bytes:
        """See the function `tensor_map`; raises JisuError for what the GPU can't copy."""
        return tensor_map(lambda *args: self.run("cuTensorMapEncodeTiled", *args), address, dtype, shape, box)

    def stream(self) -> ctypes.c_void_p:
        """A new stream."""
        made = ctypes.c_void_p()
        self.run("cuStreamCreate", ctypes.byref(made), _NON_BLOCKING)
        return made

    def event(self) -> ctypes.c_void_p:
        """A new event, for places on streams to wait for."""
        made = ctypes.c_void_p()
        self.run("cuEventCreate", ctypes.byref(made), _NO_TIMING)
        return made


def tensor_map(
    encode: Callable[..., Any], address: int, dtype: str, shape: tuple[int, int], box: tuple[int, int]
) -> bytes:
    """The 128 bytes by which kernels know a matrix of `shape` in the GPU's memory, to copy boxes of rows of 32, 64 or 128 bytes out of it, chunks
    of 16 bytes swizzled over as many, and zeros for what lies beyond its end. encode: the driver's cuTensorMapEncodeTiled."""
    room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    begin = -ctypes.addressof(room) % _MAP_ALIGNMENT
    (rows, columns), itemsize = shape, numpy_dtype(dtype).itemsize
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * itemsize)
    extents, steps = (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1)
    encode(
        ctypes.c_void_p(ctypes.addressof(room) + begin), _MAP_DTYPES[dtype], ctypes.c_uint32(2), ctypes.c_void_p(address),
        sizes, strides, extents, steps, 0, _SWIZZLES[box[1] * itemsize], _PROMOTION_256B, 0,
    )  # fmt: skip
    return room.raw[begin : begin + _MAP_BYTES]
