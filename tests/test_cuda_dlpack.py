"""Tensors that libraries lend each other on a GPU, by DLPack: on the emulated one, whose memory is this machine's, so that NumPy and torch say whether
capsules are right, and whose streams do nothing before somebody waits."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_models import as_on_a_gpu, run_all

import jisu
from jisu.compiler import ops
from jisu.compiler.errors import InputError
from jisu.compiler.gpu import Driver
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.storage import aligned
from jisu.compiler.types import TensorType, symbol
from jisu.runtime import cuda, dlpack
from jisu.runtime.cuda import DeviceExecutable
from jisu.runtime.cuda_memory import DeviceArray
from jisu.targets.target import Target

ROWS = 12
SMALL, LARGE = 2 * 8 * 4, ROWS * 8 * 4  # bytes


@pytest.fixture(scope="module")
def run(emulated_gpu: Target, tmp_path_factory: pytest.TempPathFactory) -> DeviceExecutable:
    """Of float32 [n, 8]: "double" gives x + x, "append" writes a row into a cache."""
    x = placeholder("x", TensorType((symbol("n"), 8), "float32"))
    cache = placeholder("cache", TensorType((1, 2, 4, 8), "float32"))
    new = placeholder("new", TensorType((1, 1, 2, 8), "float32"))
    at = placeholder("at", TensorType((1,), "int64"))
    graphs = {
        "double": Graph((x,), (ops.add(x, x),)),
        "append": Graph((cache, new, at), (ops.cache_append(cache, new, at, None, ring=False),)),
    }
    return run_all(graphs, emulated_gpu, tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ROWS` rows are large."""
    monkeypatch.setattr(cuda, "_IN_PLACE_BYTES", LARGE)


def rows(count: int, first: float = 1) -> np.ndarray:
    made = aligned((count, 8), np.float32)
    made[...] = np.arange(first, first + 8 * count).reshape(count, 8)
    return made


class Lender:
    """An array of a library that isn't torch, whose memory counts as the GPU's; NumPy makes its capsules."""

    def __init__(self, array: Any, number: int = 0, begun: Callable[[int], Any] = lambda stream: None) -> None:
        """begun: what the library has told its stream, given the one that is to wait for it."""
        self.array, self.number, self.begun = array, number, begun

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.number

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        self.begun(stream)
        return self.array.__dlpack__(max_version=max_version)


class OldLender(Lender):
    """From before DLPack had versions."""

    def __dlpack__(self, *, stream: int) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


def waited(driver: ctypes.CDLL, stream: Any = None) -> None:
    with Driver.open().current():
        assert driver.cuStreamSynchronize(stream) == 0


def of(array: DeviceArray) -> np.ndarray:
    """What stands in the memory of the emulated GPU now."""
    return np.frombuffer(ctypes.string_at(array.address, array.nbytes), array.dtype).reshape(array.shape)


# --- What programs lend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_numpy_reads_a_copy(dtype: str, run: DeviceExecutable) -> None:
    given = (np.arange(24) % 5).reshape(2, 3, 4).astype(dtype)
    found = np.from_dlpack(run.hold(given), device="cpu")
    assert found.dtype == given.dtype
    np.testing.assert_array_equal(found, given)


def test_torch_reads_a_copy(run: DeviceExecutable) -> None:
    """bfloat16, too, and tensors without elements or axes."""
    given = torch.arange(24.0).reshape(2, 3, 4).bfloat16()
    held = run.hold(given.view(torch.int16).numpy().view("bfloat16"))
    assert torch.equal(torch.utils.dlpack.from_dlpack(held.__dlpack__(dl_device=(dlpack.CPU, 0))), given)
    for shape in ((), (0, 3)):
        found = torch.from_dlpack(run.hold(np.ones(shape, np.float32)).__dlpack__(dl_device=(dlpack.CPU, 0)))
        assert found.shape == shape and found.all()


def test_memory_is_kept_until_it_is_given_back(run: DeviceExecutable, emulated_driver: ctypes.CDLL) -> None:
    """In both forms, as dlpack.h lays them out; and freed where nobody takes the capsule, or NumPy refuses it."""

    def allocated() -> int:
        gc.collect()
        return int(emulated_driver.emulated_bytes())

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
    before = allocated()
    for version, name, tensor, managed in ((None, b"dltensor", 0, 48), ((1, 1), b"dltensor_versioned", 32, 8)):
        held = run.hold(rows(3))
        address = held.address
        capsule: Any = held.__dlpack__(max_version=version)
        del held
        at = pointer(capsule, name)

        def word(offset: int, kind: Any = ctypes.c_uint64, at: int = at) -> int:
            return int(kind.from_address(at + offset).value)

        if version:  # DLManagedTensorVersioned: its version, context, deleter, flags, and only then the tensor
            assert (word(0, ctypes.c_uint32), word(4, ctypes.c_uint32), word(24)) == (1, 0, 0)
        deleter = word(16 if version else 56)
        assert managed and word(tensor) == address
        small = [word(tensor + o, ctypes.c_int32) for o in (8, 12, 16)]
        assert small == [dlpack.CUDA, 0, 2]  # on GPU 0, of two axes
        assert word(tensor + 20, ctypes.c_uint32) == 2 | 32 << 8 | 1 << 16  # a float of 32 bits, one of them
        assert [word(word(tensor + 24) - at + o) for o in (0, 8)] == [3, 8]
        assert not word(tensor + 32) or [word(word(tensor + 32) - at + o) for o in (0, 8)] == [8, 1]
        assert word(tensor + 40) == 0
        used = b"used_" + name
        rename(capsule, used)
        del capsule
        assert allocated() > before
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(at)
        assert allocated() == before
        run.hold(rows(3)).__dlpack__(max_version=version)
        assert allocated() == before
    with pytest.raises((BufferError, RuntimeError), match="[Uu]nsupported device"):
        np.from_dlpack(run.hold(rows(3)))
    assert allocated() == before
    # A copy is memory of its own.
    held = run.hold(rows(3))
    copied = dlpack.borrow(Copied(held), 1)
    waited(emulated_driver)
    assert copied.address != held.address
    del held
    np.testing.assert_array_equal(np.frombuffer(ctypes.string_at(copied.address, 96), np.float32), rows(3).ravel())
    del copied
    assert allocated() == before


class Copied:
    """Lends copies of a tensor."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how, copy=True)


def test_what_cannot_be_lent(run: DeviceExecutable) -> None:
    held = run.hold(rows(3))
    assert held.__dlpack_device__() == (dlpack.CUDA, 0)
    with pytest.raises(ValueError, match="stream 0 could be two"):
        held.__dlpack__(stream=0)
    with pytest.raises(BufferError, match=r"on cuda:0; .* device \(10, 0\)"):
        held.__dlpack__(dl_device=(10, 0))
    with pytest.raises(BufferError, match="there can only be a copy"):
        held.__dlpack__(dl_device=(dlpack.CPU, 0), copy=False)


def test_whoever_takes_a_result_waits_for_it(run: DeviceExecutable, emulated_driver: ctypes.CDLL) -> None:
    """The consumer's stream does, not the host, unless it says that nobody waits."""
    x = rows(ROWS)
    (result,) = run.call_there("double", [Lender(x)])
    assert isinstance(result, DeviceArray)
    unread = result.__dlpack__(stream=-1)
    waited(emulated_driver)
    assert not (of(result) == x + x).any()
    capsule = result.__dlpack__()
    assert not (of(result) == x + x).any()
    waited(emulated_driver)
    np.testing.assert_array_equal(of(result), x + x)
    with Driver.open().current():
        other = Driver.open().stream()
    (second,) = run.call_there("double", [Lender(x)])
    kept = [unread, capsule, second.__dlpack__(stream=other.value)]
    assert not (of(second) == x + x).any()
    waited(emulated_driver, other)
    np.testing.assert_array_equal(of(second), x + x)
    with Driver.open().current():
        assert emulated_driver.cuStreamDestroy_v2(other) == 0
    del kept


# --- What is lent to programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Lender, OldLender])
def test_arrays_of_other_libraries(kind: type[Lender], run: DeviceExecutable, emulated_driver: ctypes.CDLL) -> None:
    """Large ones are read where they are, and so are their results written; small ones are copied, and given back when that is done."""
    for count, copied in ((2, 2 * SMALL), (ROWS, 0)):
        x = rows(count)
        alive = weakref.ref(x)
        before = emulated_driver.emulated_copied()
        (result,) = run.call_there("double", [kind(x)])
        assert emulated_driver.emulated_copied() - before == copied
        want = x + x
        del x
        gc.collect()
        assert alive() is not None  # the GPU has yet to read it
        np.testing.assert_array_equal(np.from_dlpack(result, device="cpu"), want)
        run.call("double", [rows(1)])
        gc.collect()
        assert alive() is None


def test_a_library_s_own_work_comes_first(run: DeviceExecutable, emulated_driver: ctypes.CDLL) -> None:
    """It is told which stream is to wait for it: the program's, or, with torch's tensors, torch's."""
    for count in (2, ROWS):
        x = rows(count)

        def begun(stream: int, x: np.ndarray = x) -> None:  # zeros, on its way
            assert stream == run._stream.value
            driver = Driver.open()
            driver.run(
                "cuMemsetD8Async",
                x.ctypes.data_as(ctypes.c_void_p),
                0,
                ctypes.c_size_t(x.nbytes),
                ctypes.c_void_p(stream),
            )

        (result,) = run.call_there("double", [Lender(x, begun=begun)])
        assert x.any()
        assert not np.from_dlpack(result, device="cpu").any()
        del result  # to free memory waits for all that is under way


def test_with_torch_s_tensors_it_is_torch_s_stream(
    run: DeviceExecutable, emulated_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    asked: list[int] = []
    cache, new = torch.zeros(1, 2, 4, 8), aligned((1, 1, 2, 8), np.float32)
    new[...] = 3
    (found,) = run.call_there("append", [cache, Lender(new, begun=asked.append), torch.tensor([2])])
    assert found is cache and asked == [1]  # the default one
    assert not cache.any()
    waited(emulated_driver)
    assert cache.sum() == 48


def test_values_of_another_program(
    run: DeviceExecutable, emulated_gpu: Target, tmp_path: Any, emulated_driver: ctypes.CDLL
) -> None:
    """Whose stream is another one: this one's waits for it."""
    x = placeholder("x", TensorType((symbol("n"), 8), "float32"))
    other = run_all({"negative": Graph((x,), (ops.neg(x),))}, emulated_gpu, tmp_path)
    for count in (2, ROWS):
        given = rows(count)
        (doubled,) = run.call_there("double", [Lender(given)])
        before = emulated_driver.emulated_copied()
        (result,) = other.call_there("negative", [doubled])
        assert emulated_driver.emulated_copied() - before == (2 * SMALL if count == 2 else 0)
        del doubled
        np.testing.assert_array_equal(np.from_dlpack(result, device="cpu"), -2 * given)
    del other
    gc.collect()
    np.testing.assert_array_equal(np.from_dlpack(result, device="cpu"), -2 * given)  # outlives its program


def test_what_is_updated_is_waited_for(run: DeviceExecutable) -> None:
    """Their library doesn't know our stream."""
    cache, new = aligned((1, 2, 4, 8), np.float32), np.ones((1, 1, 2, 8), np.float32)
    cache[...] = 0
    lender = Lender(cache)
    run.call_there("append", [lender, new, np.array([2])])
    assert cache[0, :, 2].all() and cache.sum() == 16
    cache.flags.writeable = False
    with pytest.raises(InputError, match="'cache' is updated in place, but its array is read-only"):
        run.call_there("append", [lender, new, np.array([2])])
    raw = aligned((68,), np.float32)
    with pytest.raises(InputError, match="'cache' .* no multiple of 16 bytes"):
        run.call_there("append", [Lender(raw[1:65].reshape(1, 2, 4, 8)), new, np.array([2])])
    with pytest.raises(InputError, match="'cache' is updated in place: give a tensor on the GPU"):
        run.call_there("append", [np.zeros((1, 2, 4, 8), np.float32), Lender(new), np.array([2])])


def test_what_cannot_be_taken(run: DeviceExecutable) -> None:
    """Of unaligned memory there is a copy, of any size; what is refused is given back."""
    raw = aligned((ROWS * 8 + 1,), np.float32)
    raw[...] = 1
    (result,) = run.call_there("double", [Lender(raw[1:].reshape(ROWS, 8))])
    assert (np.from_dlpack(result, device="cpu") == 2).all()
    strided, halves = rows(ROWS)[:, ::2], rows(2).astype(np.complex64)
    alive = weakref.ref(halves)
    with pytest.raises(InputError, match=r"strides \[8, 2\] in elements.*cupy.ascontiguousarray"):
        run.call_there("double", [Lender(strided)])
    with pytest.raises(InputError, match="elements of code 5, 64, not one of bool, "):
        run.call_there("double", [Lender(halves)])
    del halves
    gc.collect()
    assert alive() is None
    with pytest.raises(InputError, match="runs on cuda:0 .* got an array on cuda:1"):
        run.call_there("double", [Lender(rows(2), number=1)])
    with pytest.raises(InputError, match="'x': expected float32, got float64"):
        run.call_there("double", [Lender(rows(2).astype(np.float64))])


# --- torch's tensors --------------------------------------------------------------------------------------------------------


def test_large_tensors_of_torch_are_never_copied(
    run: DeviceExecutable, emulated_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result's memory is what kernels wrote, and a call at addresses that come again is a graph; small ones are copied."""
    as_on_a_gpu(monkeypatch)
    weights = run.prepare("double", {})
    for count, copied in ((2, 2 * SMALL), (ROWS, 0)):
        x, out = torch.from_numpy(rows(count)), torch.from_numpy(aligned((count, 8), np.float32))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, out=out, **k: out)  # a caching allocator
            for turn in range(3):
                out.zero_()
                before, graphs = emulated_driver.emulated_copied(), emulated_driver.emulated_graphs()
                (result,) = run.call_there("double", [x], weights)
                assert result is out and not out.any()
                waited(emulated_driver)
                assert torch.equal(out, x + x)
                assert emulated_driver.emulated_copied() - before == copied
                assert emulated_driver.emulated_graphs() - graphs == (turn > 0)
        # Elsewhere it isn't that graph's memory.
        out.zero_()
        y = torch.from_numpy(rows(count, 7))
        (result,) = run.call_there("double", [y], weights)
        waited(emulated_driver)
        assert torch.equal(result, y + y) and not out.any()


def test_addresses_that_never_come_again_are_forgotten(
    run: DeviceExecutable, emulated_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "_KEPT_RUNS", 3)
    kept = [torch.from_numpy(rows(ROWS, i)) for i in range(6)]
    for x in kept:
        run.call_there("double", [x])
        assert len(run._runs) <= 3
    waited(emulated_driver)


# --- Programs ----------------------------------------------------------------------------------------------------------------


def test_a_program_on_other_libraries_arrays(emulated_gpu: Target) -> None:
    """Results stay on the GPU, and go into the next call; what the model changes of an input is changed there."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            total.add_(x)
            return x * 2

    x, total = rows(2), rows(2, 5)
    want = x + total
    program = jisu.compile(Model(), target=emulated_gpu, example_inputs=(torch.from_numpy(x), torch.zeros(2, 8)))
    result = program(Lender(x), Lender(total))
    assert isinstance(result, DeviceArray)
    np.testing.assert_array_equal(total, want)
    again = program(result, total)
    np.testing.assert_array_equal(np.from_dlpack(again, device="cpu"), 4 * x)
    np.testing.assert_array_equal(total, want + 2 * x)
    total.flags.writeable = False
    with pytest.raises(InputError, match="'total' is updated in place, but its array is read-only"):
        program(Lender(x), Lender(total))
