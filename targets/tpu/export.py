"""From the text of a StableHLO module to what JAX runs: the bytes of `jax.export`, calls on this machine, executables for named chips.

Needs JAX (`pip install "jisu[tpu]"`); `compile_for` also libtpu (`jisu[tpu-aot]`), which compiles for TPUs without one. Nothing here
traces the program in JAX: the module's text goes in as it is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.types import TensorType, numpy_dtype

if TYPE_CHECKING:
    from jax.export import Exported

CHIPS: Mapping[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
"""Chips by name, and the smallest topology of each that libtpu describes; programs are compiled for its first device."""


def has_jax() -> bool:
    """Whether JAX can be imported."""
    return importlib.util.find_spec("jax") is not None


def has_libtpu() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def require() -> None:
    """Raises TargetError where what `export_bytes` needs isn't installed."""
    missing = [name for name in ("jax", "flatbuffers") if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetError(f'exporting for TPUs needs {" and ".join(missing)}: pip install "jisu[tpu]"')


def _jax() -> Any:
    if not has_jax():
        raise TargetError('JAX is not installed; it comes with pip install "jisu[tpu]"')
    import jax

    return jax


def _specs(types: Sequence[TensorType], **more: Any) -> list[Any]:
    jax = _jax()
    return [jax.ShapeDtypeStruct(t.shape, numpy_dtype(t.dtype), **more) for t in types]


def _parameters(entry: Entry) -> list[TensorType]:
    return [t for _, t in (*entry.inputs, *entry.weights)]


def donated(entry: Entry) -> tuple[int, ...]:
    """The numbers of `main`'s parameters that are updated in place, for `donate_argnums`."""
    return tuple(sorted(a for a in entry.aliases if a is not None))


def exported(text: str, entry: Entry, platform: str | Sequence[str] = "tpu", name: str = "jisu") -> Exported:
    """The module `text`, with `main` as `entry` (of `stablehlo.signature`) says, as JAX's Exported for "tpu", "cpu", or both.

    It is what exporting a function of these types gives, with the module in the place of the function's. Raises TargetError without
    JAX, CompileError for text that StableHLO refuses.
    """
    jax = _jax()
    from jax import export
    from jax.extend import mlir

    def shaped(*_: Any) -> list[Any]:
        return [jax.numpy.zeros(t.shape, numpy_dtype(t.dtype)) for t in entry.outputs]

    shaped.__name__ = re.sub(r"\W", "_", name)
    platforms = [platform] if isinstance(platform, str) else list(platform)
    if len(platforms) > 1:  # then JAX says first which of them it is
        text = text.replace("@main(\n", "@main(\n      %platform_index: tensor<i32>,\n", 1)
    with jax.enable_x64(True):
        frame = export.export(jax.jit(shaped, keep_unused=True), platforms=platforms)(*_specs(_parameters(entry)))
    version = re.search(rb"StableHLO_v([\d.]+)", frame.mlir_module_serialized)
    if version is None:
        raise CompileError("this version of JAX serializes modules in a way that isn't known; use jax 0.10")
    try:
        module = mlir.serialize_portable_artifact(text, version[1].decode())
    except Exception as error:  # whatever the bindings raise
        raise CompileError(f"StableHLO refuses the module: {error}") from error
    return dataclasses.replace(frame, mlir_module_serialized=module)


def export_bytes(text: str, entry: Entry, platform: str | Sequence[str] = "tpu", name: str = "jisu") -> bytes:
    """What `jax.export.deserialize` reads, on any machine with JAX; raises as `exported`.

    The reader calls it with 64-bit numbers enabled, and says itself what is donated:

        program = jax.export.deserialize(data)
        step = jax.jit(program.call, donate_argnums=donated)
    """
    return bytes(exported(text, entry, platform, name).serialize())


def runner(text: str, entry: Entry) -> Callable[..., list[np.ndarray]]:
    """A function of NumPy arrays (inputs, then weights) that runs the module on this machine's CPU; nothing is donated."""
    jax = _jax()
    program = jax.jit(exported(text, entry, "cpu").call)
    device = jax.devices("cpu")[0]

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        with jax.enable_x64(True), jax.default_device(device):
            return [np.asarray(a) for a in program(*arrays)]

    return call


@attrs.frozen
class Compiled:
    """What libtpu says of a program for a chip; nothing of it was measured.

    memory: bytes of arguments, outputs, aliased arguments, temporaries and code. cost: its estimates (flops, bytes accessed and more).
    hlo: the optimised program in text.
    """

    chip: str
    memory: Mapping[str, int]
    cost: Mapping[str, float]
    hlo: str = attrs.field(repr=False)


_MEMORY = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "temporary": "temp_size_in_bytes",
    "code": "generated_code_size_in_bytes",
}


def compile_for(chip: str, text: str, entry: Entry, donate: bool = True) -> Compiled:
    """Compile a module with libtpu for one device of a chip of `CHIPS`, ahead of time: no TPU is needed.

    donate: updated caches are given away by the caller. Raises TargetError for an unknown chip or without JAX or libtpu, CompileError
    with libtpu's message where it refuses the program.
    """
    return _compiled_for(chip, exported(text, entry, "tpu"), donated(entry) if donate else ())


def compile_bytes_for(chip: str, data: bytes, donated: Sequence[int] = ()) -> Compiled:
    """As `compile_for`, what `export_bytes` gave; donated: the numbers of parameters that the caller gives away."""
    return _compiled_for(chip, _jax().export.deserialize(bytearray(data)), donated)


def _compiled_for(chip: str, program: Exported, given: Sequence[int]) -> Compiled:
    jax = _jax()
    if not has_libtpu():
        raise TargetError('libtpu is not installed; it comes with pip install "jisu[tpu-aot]"')
    if chip not in CHIPS:
        raise TargetError(f"unknown chip {chip!r}; known: {', '.join(CHIPS)}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU that two processes could want
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    try:
        device = topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0]
        sharding = SingleDeviceSharding(device)
        step = jax.jit(program.call, donate_argnums=tuple(given), keep_unused=True, out_shardings=sharding)
        with jax.enable_x64(True):
            made = step.lower(
                *[jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in program.in_avals]
            ).compile()
    except Exception as error:  # whatever the run time raises
        raise CompileError(f"libtpu refuses the program for {chip}: {error}") from error
    memory, cost = made.memory_analysis(), made.cost_analysis() or {}
    return Compiled(
        chip,
        {name: int(getattr(memory, field, 0)) for name, field in _MEMORY.items()},
        {key: float(value) for key, value in cost.items()},
        made.as_text(),
    )
