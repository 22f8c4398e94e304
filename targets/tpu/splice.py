"""A Pallas module's text as functions of a StableHLO module: traced once by JAX, for a TPU or for the CPU.

For a TPU a kernel is one `tpu_custom_call`, which holds Mosaic's bytes. For the CPU it is what Pallas' interpreter makes of the same text, plain
StableHLO without copies that take time: so a whole program runs with its kernels where there is no TPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs

from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.types import TensorType, fixed, numpy_dtype
from jisu.targets.tpu.stablehlo.build import Body, Value, type_text
from jisu.targets.tpu.stablehlo.emit import Kernel

PLATFORMS = ("tpu", "cpu")
Compute: TypeAlias = "Callable[..., Sequence[Value]]"


@attrs.frozen
class Part:
    """A kernel's text and what it takes and returns: arrays of these types."""

    source: str
    inputs: tuple[TensorType, ...]
    result: TensorType

    def call(self, body: Body, name: str, *values: Value) -> Value:
        """Write the call of the function `name` that `functions` made of this kernel."""
        given = tuple(TensorType(v.shape, v.dtype) for v in values)
        if given != self.inputs:
            raise CompileError(
                f"{name} takes {', '.join(map(str, self.inputs))} and is given {', '.join(map(str, given))}"
            )
        shape, dtype = tuple(fixed(n) for n in self.result.shape), self.result.dtype
        types = f"({', '.join(v.type for v in values)}) -> {type_text(shape, dtype)}"
        return body.value(f"call @{name}({', '.join(v.name for v in values)}) : {types}", shape, dtype)


def functions(part: Part, name: str, platform: str = "tpu") -> str:
    """The text of private functions that run a kernel, of which @name is the one to call; others' names begin with it.

    Raises TargetError without JAX and for an unknown platform, CompileError where JAX refuses the kernel.
    """
    if platform not in PLATFORMS:
        raise TargetError(f"kernels are traced for {' or '.join(PLATFORMS)}, not for {platform!r}")
    text = _traced(part, platform)
    symbols = re.findall(r"func\.func (?:public|private) @([\w.$-]+)\(", text)
    new = {symbol: name if symbol == "main" else f"{name}.{symbol}" for symbol in symbols}
    text = re.sub(r"(?<=[ (,])@([\w.$-]+)(?=\()", lambda m: f"@{new.get(m[1], m[1])}", text)
    return text.replace("func.func public", "func.func private")


@functools.lru_cache(256)
def _traced(part: Part, platform: str) -> str:
    try:
        import jax
        from jax import export
        from jax._src.interpreters import mlir
        from jaxlib.mlir import ir
    except ImportError as error:
        raise TargetError('Pallas kernels are traced by JAX: pip install "jisu[tpu]"') from error
    module: dict[str, Any] = {"__name__": "kernel"}
    exec(compile(part.source, "<kernel>", "exec"), module)
    arrays = [jax.ShapeDtypeStruct(t.shape, numpy_dtype(t.dtype)) for t in part.inputs]
    with jax.enable_x64(False):
        try:
            program = jax.jit(functools.partial(module["kernel"], interpret=platform == "cpu"))
            made = export.export(program, platforms=[platform])(*arrays)
        except Exception as error:  # whatever tracing and lowering raise
            raise CompileError(f"JAX refuses a kernel: {error}") from error
        (result,) = made.out_avals
        if TensorType(tuple(result.shape), str(result.dtype)) != part.result:
            raise CompileError(f"a kernel gives {result}, not {part.result}")
        with mlir.make_ir_context():
            text = str(ir.Module.parse(made.mlir_module()).operation.get_asm(enable_debug_info=False))
    lines = text.rstrip().splitlines()[1:-1]  # without the module's braces
    return re.sub(r' \{jax\.result_info = "[^"]*"\}', "", "\n".join(lines))


def kernel(
    name: str,
    inputs: Sequence[tuple[str, TensorType]],
    parts: Sequence[tuple[str, Part]],
    compute: Compute,
    platform: str = "tpu",
) -> Kernel:
    """A kernel of named inputs, whose `compute(*values)` calls the functions of `parts` by their names."""
    body = Body()
    given = [Value(body, f"%{n}", t.shape, t.dtype) for n, t in inputs]  # type: ignore[arg-type]
    results = compute(*given)
    types = ", ".join(v.type for v in results)
    head = f"  func.func private @{name}({', '.join(f'{v.name}: {v.type}' for v in given)}) -> ({types}) {{"
    end = f"    return {', '.join(v.name for v in results)} : {types}"
    called = [functions(part, called, platform) for called, part in parts]
    return Kernel(name, "\n".join([head, *body.lines, end, "  }", *called]))
