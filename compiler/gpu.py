"""NVIDIA's driver library, which comes with every GPU's driver: all that a program needs to run on one."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jisu.compiler.errors import InputError, JisuError, TargetError, TensorMemoryError
from jisu.compiler.types import numpy_dtype

DRIVER = "JISU_CUDA_DRIVER"
"""The environment variable that names another library than the system's libcuda.so.1."""
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_…
_OUT_OF_MEMORY = 2
_BROKEN = {214, 220, 226, 700, 702, 710, *range(714, 720), 721}
"""Errors after which every call of the process gives the same error (cuda.h: "the process must be terminated and relaunched")."""
_ERROR_LOG, _ERROR_LOG_BYTES = 5, 6  # CU_JIT_ERROR_LOG_BUFFER, …_SIZE_BYTES
_LOG_BYTES = 8 << 10
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)
_MAP_BYTES, _MAP_ALIGNMENT = 128, 128  # of a CUtensorMap
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
        self._process = os.getpid()
        code = self._library.cuInit(0)
        if code:
            raise TargetError(f"NVIDIA's driver finds no GPU here (cuInit: {self._said(code)}, error {code})")
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.run("cuDeviceGet", ctypes.byref(device), 0)
        self.device = device.value
        name = ctypes.create_string_buffer(128)
        self.run("cuDeviceGetName", name, 128, self.device)
        self.name = name.value.decode(errors="replace")
        self.run("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
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
        said = self._said(code)
        if code == _OUT_OF_MEMORY:
            raise TensorMemoryError(f"the GPU ({self.name}) has no memory left: {said}")
        remedy = (
            "; nothing runs on the GPU in this process any more, so end it and start another one; if it happens again, "
            "`compute-sanitizer python …` finds the kernel"
        )
        raise JisuError(f"the GPU's driver failed in {name}: {said} (error {code}){remedy if code in _BROKEN else ''}")

    def _said(self, code: int) -> str:
        """The driver's words for an error."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return (text.value or b"an unknown error").decode(errors="replace")

    def code_of(self, name: str, *args: Any) -> int:
        """The error code of a function of the driver."""
        return int(getattr(self._library, name)(*args))

    @contextmanager
    def current(self) -> Iterator[None]:
        """The GPU's context is this thread's meanwhile; after that the one that was before is again.

        Raises JisuError in a process that was forked: the driver's state doesn't follow there.
        """
        if os.getpid() != self._process:
            raise JisuError(
                "this process was forked from one that uses the GPU, and can't use it; start processes afresh, as by "
                'multiprocessing.get_context("spawn")'
            )
        self.run("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.code_of("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def let_go(self, *calls: tuple[Any, ...]) -> None:
        """Give back what this process had of the driver, by calls (a function's name, its arguments), as far as it still can."""
        if os.getpid() == self._process and self.code_of("cuCtxPushCurrent_v2", self.context) == 0:
            for name, *args in calls:
                self.code_of(name, *args)
            self.code_of("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def module(self, image: bytes) -> tuple[ctypes.c_void_p | None, str]:
        """Kernels of a cubin or of PTX, loaded; else None, and what the driver says against them."""
        made, log = ctypes.c_void_p(), ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
        # The number stands in the pointer's place.
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        # PTX is text that a zero ends.
        code = self.code_of("cuModuleLoadDataEx", ctypes.byref(made), image + b"\0", ctypes.c_uint(2), options, values)
        if code == _OUT_OF_MEMORY or code in _BROKEN:
            self.fail("cuModuleLoadDataEx", code)
        told = log.value.decode(errors="replace").strip()
        return (made, "") if code == 0 else (None, f"{self._said(code)}, error {code}{f': {told}' if told else ''}")

    def pinned(self, nbytes: int) -> int:
        """The address of this machine's memory that the GPU reads and writes at full speed."""
        pointer = ctypes.c_void_p()
        code = self.code_of("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes), ctypes.c_uint(0))
        if code == _OUT_OF_MEMORY:
            raise TensorMemoryError(
                f"this machine has no {nbytes / 2**20:.0f} MiB of memory that can be pinned, through which the GPU gets its data"
            )
        if code:
            self.fail("cuMemHostAlloc", code)
        return int(pointer.value or 0)

    def allocate(self, nbytes: int, what: str) -> int:
        """The address of memory on the GPU."""
        pointer = ctypes.c_void_p()
        code = self.code_of("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        if code == _OUT_OF_MEMORY:
            raise TensorMemoryError(f"the GPU ({self.name}) has no {nbytes / 2**30:.2f} GiB left for {what}")
        if code:
            self.fail("cuMemAlloc_v2", code)
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


def checked_grid(grid: tuple[int, int, int], kernel: str) -> tuple[int, int, int]:
    """The blocks of a launch; raises InputError where there are more than GPUs take."""
    if any(size > most for size, most in zip(grid, _MOST_BLOCKS, strict=True)):
        raise InputError(
            f"{kernel} would take {' x '.join(map(str, grid))} blocks, and a GPU takes {' x '.join(map(str, _MOST_BLOCKS))} at most; "
            "give fewer rows at once"
        )
    return grid


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
