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

_STAGING = 16 << 20  # bytes of each of the two pinned buffers through which weights go
_PINNED = 16 << 20  # bytes up to which a buffer has pinned memory beside it


class DeviceArray:
    """A tensor in the GPU's memory; `owner` keeps that alive, and may put something else there later, else it is freed with this object."""

    __slots__ = ("__weakref__", "address", "dtype", "owner", "shape")

    def __init__(self, driver: Driver, address: int, shape: Sequence[int], dtype: np.dtype, owner: Any = None) -> None:
        self.address, self.shape, self.dtype, self.owner = address, tuple(shape), dtype, owner
        if owner is None:
            weakref.finalize(self, _free, driver, address)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def _free(driver: Driver, address: int) -> None:
    driver.let_go(("cuMemFree_v2", ctypes.c_void_p(address)))


def allocated(driver: Driver, shape: Sequence[int], dtype: np.dtype, what: str) -> DeviceArray:
    """A tensor with whatever is there; raises TensorMemoryError naming `what` where the GPU has no room."""
    return DeviceArray(driver, driver.allocate(math.prod(shape) * dtype.itemsize, what), shape, dtype)


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


def copy(driver: Driver, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
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
