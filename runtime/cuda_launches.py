"""A plan's launches on an NVIDIA GPU: its kernels, as the driver loads them; what they are launched on; graphs of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler.errors import ArtifactError, TargetError
from jisu.compiler.gpu import Driver, checked_grid
from jisu.compiler.launches import CUBIN, OWN_PTX, PTX, Plan, TensorMap, Variant
from jisu.compiler.types import substitute

_ALIGNMENT = 256  # bytes, of every value in the arena
_PLAIN_SHARED = 48 << 10  # bytes of shared memory that a kernel gets without asking
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NOT_FOUND = 500
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, with a value that is a number."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


_EARLY = Attribute(6, 0, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed


@attrs.frozen(eq=False)
class Call:
    """A launch with everything settled: what cuLaunchKernel takes, or, where it may begin early, cuLaunchKernelEx. parameters: addresses of the
    values."""

    function: ctypes.c_void_p
    grid: tuple[int, int, int]
    threads: int
    shared: int
    values: Sequence[Any]
    parameters: Any
    early: bool


class Kernels:
    """The kernels of a program that this GPU runs: machine code where it was made for it, else PTX, which the driver compiles.

    built_for: the capability that they were compiled for. Raises TargetError where the GPU can't load them.
    """

    def __init__(self, driver: Driver, code: Mapping[str, bytes], built_for: tuple[int, int]) -> None:
        self.driver = driver
        self.module = self._loaded(code, built_for)
        self._functions: dict[str, ctypes.c_void_p | None] = {}

    def _loaded(self, code: Mapping[str, bytes], built_for: tuple[int, int]) -> ctypes.c_void_p:
        here = self.driver.capability
        if here < built_for:
            raise TargetError(
                f"this program was compiled for sm_{built_for[0]}{built_for[1]} and newer, and the GPU here ({self.driver.name}) is "
                f"sm_{here[0]}{here[1]}; compile it for that"
            )
        # Machine code is for later GPUs of one generation, too; what only one GPU has isn't.
        fits, same = here[0] == built_for[0], here == built_for
        wanted = (*((CUBIN,) if fits and (same or OWN_PTX not in code) else ()), *((OWN_PTX,) if same else ()), PTX)
        said = []
        for name in [n for n in wanted if n in code]:
            module, error = self.driver.module(code[name])
            if module is not None:
                return module
            said.append(f"{name}: {error}")
        raise TargetError(
            f"the GPU here ({self.driver.name}, sm_{here[0]}{here[1]}) can't load this program's kernels, which were compiled for "
            f"sm_{built_for[0]}{built_for[1]} ({'; '.join(said) or 'there is no PTX'}): compile it for this GPU, or update NVIDIA's driver"
        )

    def calls(self, plan: Plan, env: Mapping[str, int], address: Callable[[str, int], int]) -> list[Call]:
        """A plan's launches for sizes. address(kind, number): where a tensor of the plan lies."""

        def value(argument: Any) -> bytes:
            """As the kernel's parameter."""
            if isinstance(argument, TensorMap):
                shape = (substitute(argument.rows, env), argument.columns)
                return self.driver.tensor_map(address(*argument.tensor), argument.dtype, shape, argument.box)
            number = address(*argument) if isinstance(argument, tuple) else substitute(argument, env)
            return number.to_bytes(8, sys.byteorder, signed=True)

        calls: list[Call] = []
        for launch in (launch for step in plan.steps for launch in self._chosen(step, env).launches):
            x, y, z = (substitute(d, env) for d in launch.grid)
            grid = checked_grid((x, y, z), launch.kernel)
            if 0 in grid:
                continue
            function = self._function(launch.kernel)
            assert function is not None
            if launch.shared > _PLAIN_SHARED:
                self.driver.run("cuFuncSetAttribute", function, _MAX_SHARED, launch.shared)
            # The first one follows whatever others left on the stream.
            early = launch.early and self.driver.overlaps and bool(calls)
            # One by one: only the driver knows where each one lies. Before a tensor map the assembler leaves room that no rule tells.
            values = [ctypes.create_string_buffer(raw, len(raw)) for raw in map(value, launch.arguments)]
            parameters = (ctypes.c_void_p * (len(values) + 1))(*map(ctypes.addressof, values), None)
            calls.append(Call(function, grid, launch.threads, launch.shared, values, parameters, early))
        return calls

    def _chosen(self, step: Sequence[Variant], env: Mapping[str, int]) -> Variant:
        """The first variant whose bounds hold and whose kernels this module has."""
        for variant in step:
            if variant.holds(env) and all(self._function(launch.kernel) is not None for launch in variant.launches):
                return variant
        raise ArtifactError(f"the program has no kernel for {step[0].launches[0].kernel} on this GPU")

    def _function(self, name: str) -> ctypes.c_void_p | None:
        if name not in self._functions:
            found = ctypes.c_void_p()
            status = self.driver.code_of("cuModuleGetFunction", ctypes.byref(found), self.module, name.encode())
            if status not in (0, _NOT_FOUND):
                self.driver.fail("cuModuleGetFunction", status)
            self._functions[name] = found if status == 0 else None
        return self._functions[name]


@attrs.define(eq=False)
class Launches:
    """Launches on given memory and, from the second time on, their graph."""

    calls: Sequence[Call]
    graph: ctypes.c_void_p | None = None
    used: int = 0

    def again(self, driver: Driver, own: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        """Launch all on a stream. own: another one, on which a graph may be captured."""
        self.used += 1
        if self.graph is None and self.used > 1 and self.calls:
            self.graph = self._captured(driver, own)
        if self.graph is not None:
            driver.run("cuGraphLaunch", self.graph, stream)
        else:
            self.each(driver, stream)

    def each(self, driver: Driver, stream: ctypes.c_void_p) -> None:
        """Launch them one by one."""
        for call in self.calls:
            if call.early:
                config = Config(call.grid, (call.threads, 1, 1), call.shared, stream, ctypes.pointer(_EARLY), 1)
                driver.run("cuLaunchKernelEx", ctypes.byref(config), call.function, call.parameters, None)
                continue
            block = (call.threads, 1, 1)
            driver.run("cuLaunchKernel", call.function, *call.grid, *block, call.shared, stream, call.parameters, None)

    def _captured(self, driver: Driver, stream: ctypes.c_void_p) -> ctypes.c_void_p:
        """Their graph."""
        driver.run("cuStreamBeginCapture_v2", stream, _RELAXED)
        captured, made = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self.each(driver, stream)
            driver.run("cuStreamEndCapture", stream, ctypes.byref(captured))
            driver.run("cuGraphInstantiateWithFlags", ctypes.byref(made), captured, ctypes.c_ulonglong(0))
        except BaseException:
            if not captured:  # the stream stays unusable until its capture ends
                driver.code_of("cuStreamEndCapture", stream, ctypes.byref(captured))
            raise
        finally:
            if captured:
                driver.code_of("cuGraphDestroy", captured)
        return made


def laid_out(plan: Plan, env: Mapping[str, int]) -> tuple[list[int], int]:
    """Where each slot of the arena begins, and how many bytes all take."""
    places, total = [], 0
    for sizes in plan.slots:
        places.append(total)
        largest = max(substitute(s, env) for s in sizes)
        total += -(-largest // _ALIGNMENT) * _ALIGNMENT
    return places, total
