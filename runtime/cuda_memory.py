"""Memory of an NVIDIA GPU as programs use it: tensors, pinned memory here that they come and go through, and copies on a stream."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler.gpu import Driver
from jisu.compiler.storage import aligned
from jisu.runtime import dlpack

_STAGING = 16 << 20  # bytes of each of the two pinned buffers through which weights go
_PINNED = 16 << 20  # bytes up to which a buffer has pinned memory beside it


@attrs.define(eq=False)
class Order:
    """A program's stream, behind which its tensors are what they should be: once the program is gone, and all its work done, the default one.

    lock: is held by who tells the stream something.
    """

    lock: Any
    stream: ctypes.c_void_p

    def before(self, driver: Driver, stream: ctypes.c_void_p) -> None:
        """Have another stream wait for what this one has been told until now."""
        event = driver.event()
        driver.run("cuEventRecord", event, self.stream)
        driver.run("cuStreamWaitEvent", stream, event, ctypes.c_uint(0))
        driver.run("cuEventDestroy_v2", event)


class DeviceArray:
    """A tensor in the GPU's memory, which other libraries can take by DLPack (`cupy.from_dlpack(x)`, `torch.from_dlpack(x)`), and NumPy as a copy
    (`numpy.from_dlpack(x, device="cpu")`).

    `owner` keeps the memory alive, and may put something else there later, else it is freed with this object.
    """

    __slots__ = ("__weakref__", "_driver", "address", "dtype", "order", "owner", "shape")

    def __init__(
        self, driver: Driver, order: Order, address: int, shape: Sequence[int], dtype: np.dtype, owner: Any = None
    ) -> None:
        self._driver, self.order, self.owner = driver, order, owner
        self.address, self.shape, self.dtype = address, tuple(shape), dtype
        if owner is None:
            weakref.finalize(self, _free, driver, address)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._driver.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None, dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:  # fmt: skip
        """A capsule of this memory, which is kept until its deleter is called. What the program has been told to do to it is done before what
        `stream` is told from now on.

        stream: the CUDA stream that reads it: its address, 1 or None for the default stream, 2 for the thread's default one, -1 for nobody who
        waits. dl_device: where it is wanted: here, or in this machine's memory, to which it is copied. copy: True for memory of its own.
        Raises BufferError for another device or a copy that isn't allowed, ValueError for stream 0, which could be two.
        """
        here, host = self.__dlpack_device__(), (dlpack.CPU, 0)
        wanted = here if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
        if stream == 0:
            raise ValueError(
                "stream 0 could be two: give 1 for the legacy default stream, 2 for the thread's default stream"
            )
        if wanted not in (here, host):
            raise BufferError(f"this tensor is on cuda:{here[1]}; it can't be had on DLPack's device {wanted}")
        if wanted == host and copy is False:
            raise BufferError(f"this tensor is on cuda:{here[1]}: in this machine's memory there can only be a copy")
        kept: Any = self
        address = self.address
        with self.order.lock, self._driver.current():
            if wanted == host:
                kept = aligned(self.shape, self.dtype)
                address = kept.ctypes.data
                download(self._driver, address, self.address, self.nbytes, self.order.stream)
                self._driver.run("cuStreamSynchronize", self.order.stream)
            elif copy:
                kept = allocated(self._driver, self.order, self.shape, self.dtype, "a copy of a tensor")
                address = kept.address
                transfer(self._driver, address, self.address, self.nbytes, self.order.stream)
            if wanted == here and stream != -1:
                self.order.before(self._driver, ctypes.c_void_p(0 if stream in (None, 1) else stream))
        versioned = max_version is not None and max_version[0] >= dlpack.VERSION[0]
        return dlpack.lend(address, self.shape, self.dtype, wanted, kept, versioned=versioned, copied=kept is not self)


def _free(driver: Driver, address: int) -> None:
    driver.let_go(("cuMemFree_v2", ctypes.c_void_p(address)))


def allocated(driver: Driver, order: Order, shape: Sequence[int], dtype: np.dtype, what: str) -> DeviceArray:
    """A tensor with whatever is there; raises TensorMemoryError naming `what` where the GPU has no room."""
    return DeviceArray(driver, order, driver.allocate(math.prod(shape) * dtype.itemsize, what), shape, dtype)


def pinned(driver: Driver, nbytes: int) -> np.ndarray:
    """Bytes of this machine's memory that the GPU reads and writes at full speed."""
    address = driver.pinned(nbytes)
    view = (ctypes.c_ubyte * nbytes).from_address(address)
    array: np.ndarray = np.ctypeslib.as_array(view)
    weakref.finalize(view, _unpin, driver, address)
    return array


def _unpin(driver: Driver, address: int) -> None:
    driver.let_go(("cuMemFreeHost", ctypes.c_void_p(address)))


@attrs.define(eq=False)
class Buffer:
    """Memory on the GPU and, unless it is large, pinned memory here through which its contents come and go: a piece for each call under way.

    free: pieces that no call uses.
    """

    array: DeviceArray
    free: list[np.ndarray] = attrs.field(factory=list)

    def pinned(self, driver: Driver) -> np.ndarray | None:
        """A piece for a call, which gives it back to `free`; None where the memory is large."""
        if self.array.nbytes > _PINNED:
            return None
        return self.free.pop() if self.free else pinned(driver, max(self.array.nbytes, 1))


# --- Copies, each behind what the stream has to do already -----------------------------------------------------------------


def upload(driver: Driver, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
    """From this machine's memory to the GPU's."""
    _copied(driver, "cuMemcpyHtoDAsync_v2", to, source, nbytes, stream)


def download(driver: Driver, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
    """The other way."""
    _copied(driver, "cuMemcpyDtoHAsync_v2", to, source, nbytes, stream)


def transfer(driver: Driver, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
    """From one place in the GPU's memory to another."""
    _copied(driver, "cuMemcpyDtoDAsync_v2", to, source, nbytes, stream)


def _copied(driver: Driver, how: str, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
    if nbytes:
        driver.run(how, ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), stream)


def clear(driver: Driver, array: DeviceArray, stream: ctypes.c_void_p) -> None:
    """Zeros in all of a tensor."""
    address, nbytes = ctypes.c_void_p(array.address), ctypes.c_size_t(array.nbytes)
    driver.run("cuMemsetD8Async", address, ctypes.c_ubyte(0), nbytes, stream)


class Staging:
    """Two pinned buffers in turn, by which mapped files go to the GPU: one is filled while the other one is sent."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.turn = driver, 0
        self.buffers = [(pinned(driver, _STAGING), driver.stream()) for _ in range(2)]

    def send(self, array: np.ndarray, to: DeviceArray) -> None:
        """Begin to copy an array, whose elements lie one after another."""
        raw = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
        for begin in range(0, raw.size, _STAGING):
            piece = raw[begin : begin + _STAGING]
            buffer, stream = self.buffers[self.turn]
            self.turn = 1 - self.turn
            self.driver.run("cuStreamSynchronize", stream)
            buffer[: piece.size] = piece
            upload(self.driver, to.address + begin, buffer.ctypes.data, piece.size, stream)

    def close(self) -> None:
        """Wait for all that was sent, and let the streams go."""
        for _, stream in self.buffers:
            self.driver.run("cuStreamSynchronize", stream)
            self.driver.run("cuStreamDestroy_v2", stream)
