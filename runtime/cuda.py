"""Runs a compiled program on an NVIDIA GPU through its driver alone: no compiler, no CUDA toolkit, no torch.

Kernels come as a cubin, or as PTX that the driver compiles; which are launched, and on what, stands in plans (`jisu.compiler.launches`).
Weights are uploaded once, intermediate values live in one arena, and what is called again with the same shapes on the same memory is
one launch of a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import attrs
import numpy as np

from jisu.compiler.entry import Entry
from jisu.compiler.errors import ArtifactError, IndexOutOfRangeError, InputError
from jisu.compiler.gpu import Driver
from jisu.compiler.interpret import bind_types
from jisu.compiler.launches import COUNTERS, FAULT, PLANS, Plan
from jisu.compiler.storage import aligned
from jisu.compiler.types import fixed, numpy_dtype, substitute
from jisu.runtime import dlpack
from jisu.runtime.cuda_launches import Kernels, Launches, laid_out
from jisu.runtime.cuda_memory import (
    Buffer,
    DeviceArray,
    Order,
    Staging,
    allocated,
    clear,
    download,
    pinned,
    transfer,
    upload,
)
from jisu.runtime.executable import Held, check_apart, hold, owner

_NOTHING: Mapping[str, np.ndarray] = {}
_KEPT_RUNS = 64  # combinations of shapes and memory that are remembered, as long as
_KEPT_BYTES = 256 << 20  # their buffers take no more than so much
_LOADED = 16  # bytes that kernels load at once, from a multiple of so many
_DEFAULT_STREAM = 1  # as DLPack calls it
_AHEAD = 4  # calls that may be under way at a time

Method = TypeVar("Method", bound=Callable[..., Any])


def _there(method: Method) -> Method:
    """A method in the GPU's context, by one thread at a time."""

    @functools.wraps(method)
    def run(self: DeviceExecutable, *args: Any, **how: Any) -> Any:
        with self._lock, self._driver.current():
            return method(self, *args, **how)

    return cast(Method, run)


@attrs.frozen(eq=False)
class Uploaded:
    """An entry's weights on the GPU."""

    arrays: tuple[DeviceArray, ...]


@attrs.define(eq=False)
class _Run:
    """An entry on given shapes and given memory: its launches, which name the arena and the counters.

    inputs, outputs: buffers of its own, None for what is read or written where it is wanted.
    """

    inputs: list[Buffer | None]
    outputs: list[Buffer | None]
    launches: Launches
    arena: DeviceArray
    counters: DeviceArray

    @property
    def nbytes(self) -> int:
        """Of its buffers."""
        return sum(b.array.nbytes for b in (*self.inputs, *self.outputs) if b is not None)


@attrs.frozen(eq=False)
class _Begun:
    """A launch of an entry: what was given, where in this machine's memory stands what it updates (by the input's number), where its results are
    wanted on the GPU, and the pinned memory that is the call's until it ends."""

    given: list[Any]
    results: list[DeviceArray]
    owned: dict[int, np.ndarray]
    run: _Run
    pieces: list[tuple[Buffer, np.ndarray]]


@attrs.define(eq=False)
class StartedCall:
    """A call that the GPU may still be at.

    values: its results where they are, for calls that are started later: what a cache was given as, or an array in memory of the call's
    own, which holds the results until the same entry is started again on the same shapes.
    """

    values: tuple[Any, ...]
    _finish: Callable[[StartedCall], None]
    _found: tuple[Any, ...]
    _pieces: list[tuple[Buffer, np.ndarray]]
    _copies: list[tuple[np.ndarray, np.ndarray]]  # of results here, and where they come through
    _event: ctypes.c_void_p
    _lent: list[DeviceArray]

    def results(self) -> tuple[Any, ...]:
        """Wait, and return what `DeviceExecutable.call` does. Raises IndexOutOfRangeError or InputError for a fault that a kernel met until now."""
        self._finish(self)
        return self._found


class DeviceExecutable:
    """A program's kernels on the GPU. Calls from several threads are served one after another."""

    num_threads = 1

    def __init__(self, code: Mapping[str, bytes], entries: Mapping[str, Entry]) -> None:
        self._driver = Driver.open()
        try:
            data = json.loads(code[PLANS])
            self._plans = {name: Plan.from_json(plan) for name, plan in data["entries"].items()}
            self._faults = [(str(kind), str(message)) for kind, message in data["faults"]]
            built_for = (int(data["capability"][0]), int(data["capability"][1]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the plans of the compiled kernels can't be read: {error}") from error
        self._entries = dict(entries)
        self._lock = threading.RLock()
        self._open(code, built_for)

    @_there
    def _open(self, code: Mapping[str, bytes], built_for: tuple[int, int]) -> None:
        self._kernels = Kernels(self._driver, code, built_for)
        self._stream = self._driver.stream()
        self._order = Order(self._lock, self._stream)
        self._arena = self._array((1,), np.dtype(np.uint8), "intermediate values")
        self._fault = self.hold(np.zeros(1, np.int32))
        self._counters = self.hold(np.zeros(1, np.int32))
        self._seen = pinned(self._driver, 4)
        self._seen[:] = 0
        self._weights: dict[str, tuple[Any, DeviceArray]] = {}
        self._runs: dict[tuple[Any, ...], _Run] = {}
        self._pending: ctypes.c_void_p | None = None  # the stream of a call that nobody waited for
        self._under_way: deque[StartedCall] = deque()  # calls that have pinned memory, oldest first
        self._events: list[ctypes.c_void_p] = []  # that no call uses
        weakref.finalize(self, _release, self._driver, self._kernels.module, self._order, self._runs, self._events)

    @property
    def device(self) -> str:
        """The GPU's name."""
        return self._driver.name

    # Memory

    def _array(self, shape: Sequence[int], dtype: np.dtype, what: str) -> DeviceArray:
        return allocated(self._driver, self._order, shape, dtype, what)

    @_there
    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> DeviceArray:
        """A tensor of zeros on the GPU; raises TensorMemoryError naming `what` where there is no room."""
        made = self._array(shape, numpy_dtype(dtype), what)
        clear(self._driver, made, self._stream)
        self._wait()  # calls may be on other streams
        return made

    @_there
    def hold(self, value: Any) -> DeviceArray:
        """A copy of an array on the GPU."""
        source = hold(value)
        made = self._array(source.shape, source.dtype, "a tensor")
        upload(self._driver, made.address, source.address, made.nbytes, self._stream)
        self._wait()
        return made

    @_there
    def read(self, array: DeviceArray) -> np.ndarray:
        """A copy of a tensor in this machine's memory."""
        found: np.ndarray = aligned(array.shape, array.dtype)
        download(self._driver, found.ctypes.data, array.address, array.nbytes, self._stream)
        self._wait()
        return found

    def _wait(self) -> None:
        self._driver.run("cuStreamSynchronize", self._stream)

    # Weights

    @_there
    def prepare(self, entry: str, weights: Mapping[str, np.ndarray]) -> Uploaded:
        """The weights that an entry takes on the GPU, uploaded once for all entries.

        Raises ArtifactError for a weight that is missing or of another type.
        """
        found = []
        staging: Staging | None = None
        try:
            for name, kind in self._entries[entry].weights:
                if name not in weights:
                    raise ArtifactError(f"weight {name!r} is missing")
                array = weights[name]
                if array.shape != kind.shape or array.dtype != numpy_dtype(kind.dtype):
                    raise ArtifactError(f"weight {name!r}: expected {kind}, got {array.dtype}{list(array.shape)}")
                if name not in self._weights or self._weights[name][0] is not array:
                    staging = staging or Staging(self._driver)
                    made = self._array(array.shape, array.dtype, f"the weight {name!r}")
                    staging.send(np.ascontiguousarray(array), made)
                    self._weights[name] = (array, made)
                found.append(self._weights[name][1])
        finally:
            if staging is not None:
                staging.close()
        return Uploaded(tuple(found))

    # Calls

    def call(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray] = _NOTHING
    ) -> tuple[Any, ...]:
        """Run an entry on `inputs`: arrays, which are copied to the GPU, or `DeviceArray`s.

        Returns one array per output: in this machine's memory, but what the program updates in place (a cache), which is the input that
        was given for it. Raises IndexOutOfRangeError for an index outside its table, InputError for arguments that don't fit,
        TensorMemoryError where memory is short.
        """
        return self.start(entry, inputs, weights).results()

    @_there
    def start(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray] = _NOTHING
    ) -> StartedCall:
        """Begin to `call`, without waiting for anything: among the inputs may be values of calls that are under way. Results of more than 16
        megabytes, and arrays that are updated in place, are waited for."""
        begun = self._started(entry, inputs, weights, self._stream)
        run, pieces, owned = begun.run, begun.pieces, begun.owned
        values: list[Any] = []
        found: list[Any] = []
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        for alias, buffer in zip(self._called(entry).aliases, run.outputs, strict=True):
            if buffer is None:
                assert alias is not None
                source, own = begun.given[alias], run.inputs[alias]
                if isinstance(source, Held) and own is not None:
                    download(self._driver, source.address, own.array.address, own.array.nbytes, self._stream)
                values.append(source)
                found.append(owned.get(alias, source))
                if isinstance(source, Held) and owned[alias] is not source.array:
                    copies.append((owned[alias], source.array))
                continue
            array = buffer.array
            here, piece = aligned(array.shape, array.dtype), buffer.pinned(self._driver)
            to = (here if piece is None else piece).ctypes.data
            download(self._driver, to, array.address, array.nbytes, self._stream)
            if piece is not None:
                pieces.append((buffer, piece))
                copies.append((here, piece[: here.nbytes].view(here.dtype).reshape(here.shape)))
            values.append(DeviceArray(self._driver, self._order, array.address, array.shape, array.dtype, run))
            found.append(here)
        download(self._driver, self._seen.ctypes.data, self._fault.address, 4, self._stream)
        return self._followed(tuple(values), tuple(found), pieces, copies, self._stream)

    def _followed(
        self, values: tuple[Any, ...], found: tuple[Any, ...], pieces: list[tuple[Buffer, np.ndarray]],
        copies: list[tuple[np.ndarray, np.ndarray]], stream: ctypes.c_void_p, lent: Sequence[DeviceArray] = (),
    ) -> StartedCall:  # fmt: skip
        """The call that everything on the stream up to here belongs to. lent: others' memory, which is given back when the call has ended."""
        event = self._events.pop() if self._events else self._driver.event()
        self._driver.run("cuEventRecord", event, stream)
        made = StartedCall(values, self._finish, found, pieces, copies, event, list(lent))
        self._under_way.append(made)
        return made

    @_there
    def _finish(self, call: StartedCall) -> None:
        """Wait for a call and those before it."""
        while call in self._under_way:
            self._end_oldest()
        self._check()

    def _end_oldest(self) -> None:
        """Wait for the oldest call that is under way; its results are here then, and its pinned memory is another one's."""
        call = self._under_way[0]
        self._driver.run("cuEventSynchronize", call._event)
        for here, source in call._copies:
            here[...] = source
        self._under_way.popleft()  # before its memory is another's: whoever interrupts this loses some, and nobody shares it
        self._events.append(call._event)
        for buffer, piece in call._pieces:
            buffer.free.append(piece)
        call._lent.clear()
        if not self._under_way:
            self._pending = None

    def borrowed(self, inputs: Sequence[Any]) -> list[Any]:
        """Arrays of others on this GPU (whatever has DLPack, other programs' tensors among them) as ours, without a copy, behind what their
        owners have begun.

        Raises InputError for another GPU's, and for memory or elements that kernels can't read.
        """
        stream = self._stream_of(inputs).value or _DEFAULT_STREAM
        found = []
        for x in inputs:
            own = is_device_tensor(x) or (isinstance(x, DeviceArray) and x.order is self._order)
            where = None if own else dlpack.device_of(x)
            if where is None or where[0] != dlpack.CUDA:
                found.append(x)
                continue
            self._check_device(where[1], "an array")
            try:
                with self._driver.current():  # and without the lock: their owners have locks, too
                    lent = dlpack.borrow(x, stream)
            except BufferError as error:
                raise InputError(f"an array on the GPU can't be taken: {error}") from None
            if not lent.contiguous:
                raise InputError(
                    f"an array on the GPU has the shape {list(lent.shape)} and the strides {list(lent.strides)} in elements: give one whose "
                    "elements lie one after another, such as cupy.ascontiguousarray(x)"
                )
            found.append(DeviceArray(self._driver, self._order, lent.address, lent.shape, lent.dtype, lent.owner))
        return found

    @_there
    def write(self, to: DeviceArray, value: Any) -> None:
        """Copy a result to an array on the GPU, and wait."""
        transfer(self._driver, to.address, _address(value), to.nbytes, self._stream)
        self._wait()

    def call_there(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray] = _NOTHING
    ) -> tuple[Any, ...]:
        """`call` for tensors on the GPU, torch's, `DeviceArray`s and whatever else has DLPack (arrays may stand among them, but where the program
        updates them), without waiting for it.

        With torch's tensors among them it runs on torch's current stream and returns torch's tensors on the GPU, else on the program's own stream
        and returns `DeviceArray`s. Small tensors are copied to where a graph finds them, and their results from there; those of
        `_IN_PLACE_BYTES` bytes and more are read, and written, where they are. What is updated in place and had to be copied (see `_torchs`) is
        written back; other libraries' arrays that are updated are waited for, since they don't say who reads them next. A fault of a kernel
        is told by the next call.
        """
        return cast("tuple[Any, ...]", self._call_there(entry, self.borrowed(inputs), weights))

    @_there
    def _call_there(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray]
    ) -> tuple[Any, ...]:
        called = self._called(entry)
        stream, torch = self._stream_of(inputs), any(map(is_device_tensor, inputs))
        for i, x in enumerate(inputs):
            name = called.inputs[i][0] if i < len(called.inputs) else ""
            if is_device_tensor(x) and x.device.index is not None:
                self._check_device(x.device.index, "a tensor")
            if i not in called.aliases:
                continue
            if is_device_tensor(x):
                check_apart(name, x.shape, x.stride(), "x.contiguous()")
            elif isinstance(x, DeviceArray):
                check_writable(name, x)
            else:
                raise InputError(
                    f"input {name!r} is updated in place: give a tensor on the GPU, as others are, x.cuda({self._driver.device})"
                )
        given = [self._torchs(x) if is_device_tensor(x) else x for x in inputs]
        begun = self._started(entry, given, weights, stream, self._for_torch if torch else self._for_others)
        results = []
        made = iter(begun.results)
        for alias, buffer in zip(called.aliases, begun.run.outputs, strict=True):
            if alias is not None:
                x, used = inputs[alias], given[alias]
                if is_device_tensor(x) and x.data_ptr() != used.address:
                    x.detach().copy_(used.owner)
                results.append(x)
                continue
            result = next(made)
            if buffer is not None:
                transfer(self._driver, result.address, buffer.array.address, result.nbytes, stream)
            results.append(result.owner if torch else result)
        download(self._driver, self._seen.ctypes.data, self._fault.address, 4, stream)
        lent = [x for x in given if is_lent(x)]
        ended = self._followed((), (), begun.pieces, [], stream, lent)
        if stream is not self._stream:  # what reads our tensors next looks there
            self._driver.run("cuStreamWaitEvent", self._stream, ended._event, ctypes.c_uint(0))
        if any(alias is not None and is_lent(given[alias]) for alias in called.aliases):
            self._finish(ended)
        return tuple(results)

    def _stream_of(self, inputs: Sequence[Any]) -> ctypes.c_void_p:
        """Where a call on these runs: torch's current stream, if some are torch's."""
        if not any(map(is_device_tensor, inputs)):
            return self._stream
        return ctypes.c_void_p(sys.modules["torch"].cuda.current_stream(self._driver.device).cuda_stream)

    def _check_device(self, number: int, what: str) -> None:
        own = self._driver.device
        if number != own:
            raise InputError(f"the program runs on cuda:{own} ({self.device}), got {what} on cuda:{number}")

    def _for_torch(self, shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        """Memory for a result: a torch tensor's, which `owner` is."""
        torch: Any = sys.modules["torch"]
        made = torch.empty(tuple(shape), dtype=getattr(torch, dtype.name), device=f"cuda:{self._driver.device}")
        return DeviceArray(self._driver, self._order, made.data_ptr(), shape, dtype, made)

    def _for_others(self, shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        """Memory for a result, of its own."""
        made = self._array(shape, dtype, "a result")
        return DeviceArray(self._driver, self._order, made.address, shape, dtype, made)  # not there from call to call

    @_there
    def repeated(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray], *, graph: bool
    ) -> Callable[[int], None]:
        """For measurements: a function that launches an entry's kernels again, on a stream of that address, as a graph or one by one.

        They read copies of these inputs. It copies, checks and waits for nothing; other calls of the program must not come between.
        """
        begun = self._started(entry, inputs, weights, self._stream)
        self._finish(self._followed((), (), begun.pieces, [], self._stream))
        return functools.partial(self._again, begun.run, begun.given, graph)

    @_there
    def _again(self, run: _Run, given: Sequence[Any], graph: bool, stream: int) -> None:
        """given: what is read where it is, which must stay."""
        if graph:
            run.launches.again(self._driver, self._stream, ctypes.c_void_p(stream))
        else:
            run.launches.each(self._driver, ctypes.c_void_p(stream))

    def _torchs(self, tensor: Any) -> DeviceArray:
        """torch's tensor as one of ours, without a copy where it is contiguous and where kernels may read 16 bytes at a time."""
        whole = tensor.detach().contiguous()
        whole = whole.clone() if whole.data_ptr() % _LOADED else whole
        kind = numpy_dtype(str(whole.dtype).removeprefix("torch."))
        return DeviceArray(self._driver, self._order, whole.data_ptr(), tuple(whole.shape), kind, whole)

    def _started(
        self, entry: str, inputs: Sequence[Any], weights: Uploaded | Mapping[str, np.ndarray], stream: ctypes.c_void_p,
        memory: Callable[[Sequence[int], np.dtype], DeviceArray] | None = None,
    ) -> _Begun:  # fmt: skip
        """Check the inputs, bring them to the GPU and launch the entry. memory: gives it for results; None where they stay in the run's buffers."""
        called = self._called(entry)
        if self._pending is not None and self._pending.value != stream.value:
            self._settle()  # buffers are used again
        while len(self._under_way) >= _AHEAD:
            self._end_oldest()
        self._check()
        if not isinstance(weights, Uploaded):
            weights = self.prepare(entry, weights)
        given = [x if isinstance(x, DeviceArray) else hold(x) for x in inputs]
        env = bind_types(called.inputs, tuple(x.shape for x in given))
        for held, (name, kind) in zip(given, called.inputs, strict=True):
            if held.dtype != numpy_dtype(kind.dtype):
                raise InputError(f"input {name!r}: expected {kind.dtype}, got {held.dtype}")
        owned = {}
        for i in (a for a in called.aliases if a is not None):
            held = given[i]
            if isinstance(held, Held):
                owned[i] = owner(called.inputs[i][0], inputs[i], held)
        results = [
            memory([substitute(d, env) for d in kind.shape], numpy_dtype(kind.dtype))
            for alias, kind in zip(called.aliases, called.outputs, strict=True)
            if alias is None and memory is not None
        ]
        run = self._run(entry, called, given, env, weights, results)
        self._pending = stream
        pieces: list[tuple[Buffer, np.ndarray]] = []
        for held, buffer in zip(given, run.inputs, strict=True):
            if buffer is None:
                continue
            if isinstance(held, DeviceArray):
                transfer(self._driver, buffer.array.address, held.address, held.nbytes, stream)
                continue
            source, piece = held.address, buffer.pinned(self._driver)
            if piece is not None:
                pieces.append((buffer, piece))
                if held.array.size:
                    piece[: held.nbytes] = held.array.reshape(-1).view(np.uint8)
                source = piece.ctypes.data
            upload(self._driver, buffer.array.address, source, buffer.array.nbytes, stream)
        run.launches.again(self._driver, self._stream, stream)
        return _Begun(given, results, owned, run, pieces)

    def _called(self, entry: str) -> Entry:
        if entry not in self._entries:
            raise InputError(f"the program has no entry {entry!r}")
        return self._entries[entry]

    def _settle(self) -> None:
        """Wait for calls that nobody waited for."""
        while self._under_way:
            self._end_oldest()
        if self._pending is not None:
            self._driver.run("cuStreamSynchronize", self._pending)
            self._pending = None

    def _check(self) -> None:
        """Raise the first fault that a kernel noted; work that is under way may note it, too, so it ends first."""
        number = int(self._seen[:4].view(np.int32)[0])
        if number:
            self._settle()
            self._seen[:] = 0
            clear(self._driver, self._fault, self._stream)
            self._wait()
            kind, message = self._faults[number - 1] if number <= len(self._faults) else ("ValueError", "unknown fault")
            raise IndexOutOfRangeError(message) if kind == "IndexError" else InputError(message)

    def _run(
        self, entry: str, called: Entry, given: Sequence[Any], env: Mapping[str, int], weights: Uploaded, results: Sequence[DeviceArray]
    ) -> _Run:  # fmt: skip
        """The buffers and launches for these shapes and this memory, kept for the next call."""
        places = tuple((x.shape, x.address if _in_place(i, x, called) else 0) for i, x in enumerate(given))
        key = (entry, weights, places, tuple(_is_large(x) and x.address for x in results))
        found = self._runs.pop(key, None)
        if found is None:
            found = self._bound(entry, called, given, env, weights, results)
            # What was used last stands last; a run with large buffers pushes others out, and goes with the next one.
            while self._runs and (len(self._runs) >= _KEPT_RUNS or self._kept_bytes() + found.nbytes > _KEPT_BYTES):
                self._drop(next(iter(self._runs)))
        self._runs[key] = found
        return found

    def _kept_bytes(self) -> int:
        return sum(run.nbytes for run in self._runs.values())

    def _drop(self, key: tuple[Any, ...]) -> None:
        self._settle()
        run = self._runs.pop(key)
        if run.launches.graph is not None:
            self._driver.run("cuGraphExecDestroy", run.launches.graph)

    def _bound(
        self, entry: str, called: Entry, given: Sequence[Any], env: Mapping[str, int], weights: Uploaded, results: Sequence[DeviceArray]
    ) -> _Run:  # fmt: skip
        plan = self._plans[entry]
        for one, other, who in plan.equal:
            if substitute(one, env) != substitute(other, env):
                raise InputError(f"{who}: dimensions {one} and {other} must be equal")
        # What is small is copied to where a graph finds it, so that the next call can be the same graph.
        inputs = [
            None if _in_place(i, x, called) else Buffer(self._array(x.shape, x.dtype, "an input"))
            for i, x in enumerate(given)
        ]
        wanted, outputs, written = iter(results), list[Buffer | None](), list[DeviceArray | None]()
        for alias, kind in zip(called.aliases, called.outputs, strict=True):
            shape = [fixed(d) for d in kind.at(env).shape]
            there = next(wanted, None) if alias is None else None
            own = (
                None
                if alias is not None or (there is not None and _is_large(there))
                else self._array(shape, numpy_dtype(kind.dtype), "a result")
            )
            outputs.append(None if own is None else Buffer(own))
            written.append(there if own is None else own)
        places, total = laid_out(plan, env)
        counters = max((substitute(n, env) for n in plan.counters), default=0)
        if total > self._arena.nbytes or counters > self._counters.shape[0]:
            self._settle()
            for old in list(self._runs):  # their launches name what was before
                self._drop(old)
        if total > self._arena.nbytes:
            self._arena = self._array((total,), np.dtype(np.uint8), "intermediate values")
        if counters > self._counters.shape[0]:
            self._counters = self.zeros((counters,), "int32", "counters")
        base = self._arena.address
        memory: dict[str, Sequence[Any]] = {
            "input": [x if own is None else own.array for own, x in zip(inputs, given, strict=True)],
            "output": written, "weight": weights.arrays,
        }  # fmt: skip

        def address(kind: str, number: int) -> int:
            if kind == "arena":
                return base + places[number]
            own = {FAULT: self._fault, COUNTERS: self._counters}
            return int((own[kind] if kind in own else memory[kind][number]).address)

        launches = Launches(self._kernels.calls(plan, env, address))
        return _Run(inputs, outputs, launches, self._arena, self._counters)


_IN_PLACE_BYTES = 16 << 20
"""Bytes from which on a caller's tensor on the GPU is read, or written, where it is; smaller ones are copied to and from where a graph finds them.

Reasoned, not measured. To copy n bytes takes 2 n / bandwidth: for 16 MiB 7 microseconds at the 4.8 TB/s of an H200, 34 at 1 TB/s. A call at an
address that no graph knows launches its kernels one by one: at 5 microseconds each (by ctypes) 200 of them take the host a millisecond. So a
copy of 16 MiB pays only where more than one call in 140 (or in 30, at 1 TB/s) brings a new address, and torch's allocator gives a loop the
same ones again; without it there is no buffer of that size either."""


def _is_large(array: DeviceArray) -> bool:
    return array.nbytes >= _IN_PLACE_BYTES


def _in_place(number: int, given: Any, called: Entry) -> bool:
    """Whether an input on the GPU is used where it is: what stays there (which `hold` and `zeros` made), what the entry updates, and what is
    large, if kernels may load it."""
    if not isinstance(given, DeviceArray):
        return False
    return given.owner is None or number in called.aliases or (_is_large(given) and given.address % _LOADED == 0)


def is_lent(value: Any) -> bool:
    """Whether a tensor is another library's, by DLPack."""
    return isinstance(value, DeviceArray) and isinstance(value.owner, dlpack.Lent)


def check_writable(name: str, array: Any) -> None:
    """Raise InputError where the input `name` is a tensor on the GPU that can't be updated where it is."""
    if not isinstance(array, DeviceArray):
        return
    if is_lent(array) and array.owner.read_only:
        raise InputError(f"input {name!r} is updated in place, but its array is read-only")
    if array.address % _LOADED:
        raise InputError(
            f"input {name!r} is updated in place, but its memory begins at no multiple of {_LOADED} bytes: give memory of its own, x.copy()"
        )


def _address(tensor: Any) -> int:
    return int(tensor.address if isinstance(tensor, DeviceArray) else tensor.data_ptr())


def _release(
    driver: Driver, module: ctypes.c_void_p, order: Order, runs: Mapping[Any, _Run],
    events: Sequence[ctypes.c_void_p],
) -> None:  # fmt: skip
    """Give back what a program had of the driver, once its work is done, on torch's streams, too."""
    stream, order.stream = order.stream, ctypes.c_void_p()
    graphs = [("cuGraphExecDestroy", run.launches.graph) for run in runs.values() if run.launches.graph is not None]
    driver.let_go(
        ("cuCtxSynchronize",),
        *graphs,
        *(("cuEventDestroy_v2", event) for event in events),
        ("cuStreamDestroy_v2", stream),
        ("cuModuleUnload", module),
    )


def is_there(value: Any) -> bool:
    """Whether a value is in a GPU's memory, whoever's it is."""
    if isinstance(value, np.ndarray):
        return False
    return is_device_tensor(value) or (dlpack.device_of(value) or (None,))[0] == dlpack.CUDA


def is_device_tensor(value: Any) -> bool:
    """Whether a value is torch's tensor in a GPU's memory."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.is_cuda
