"""From a torch.nn.Module to a Graph, by way of torch.export."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import io
import logging
import os
import re
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import attrs
import sympy
import torch
import torch.export
import torch.fx
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from jisu.compiler import ops
from jisu.compiler.errors import InputError, InputTypeError, JisuError, UnsupportedError
from jisu.compiler.graph import MAX_INLINE, ArrayStorage, Graph, Node, Storage, constant, placeholder, weight
from jisu.compiler.signature import Input, Parameter, Signature, Tree
from jisu.compiler.types import Dim, TensorType, TypeRuleError, dim, dtype_name, same_dim, symbol
from jisu.frontends.aten import LOWERINGS, Call, Refusal, decompositions
from jisu.frontends.aten.spectral import COMPLEX, Complex
from jisu.frontends.aten.table import cast, dtype_of
from jisu.frontends.aten.values import array_of

_LOCK = threading.RLock()  # torch.export keeps global state and is not safe from several threads

_IGNORED_KEYWORDS = ("layout", "device", "pin_memory", "memory_format", "generator")
_ASSERTIONS = re.compile(
    r"_assert_tensor_metadata|_assert_async|_assert_scalar|sym_constrain_range|_functional_assert|_check|"
    r"_functional_sym_constrain|_make_dep_token"
)
_RANDOM = re.compile(r"aten\.(bernoulli|rand|randn|randint|randperm|normal|uniform|multinomial|exponential|poisson|"
                     r"native_dropout|rrelu|cauchy|geometric|log_normal|_fused_dropout)")  # fmt: skip


@attrs.frozen(eq=False)
class Captured:
    """A captured model: its graph, how it is called, and which of its weights are no parameters."""

    graph: Graph
    signature: Signature
    buffers: frozenset[str] = frozenset()


def capture(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    storage: Mapping[str, Storage] | None = None,
) -> Captured:
    """Trace `module` on example inputs into a Graph and a Signature.

    `args`, `kwargs`: what forward() is called with; tensors become inputs, everything else is specialised.
    `dynamic_shapes`: as torch.export takes it; dimensions keep the names of their `Dim`s.
    `storage`: values of parameters and buffers by their fully qualified name, for modules on the meta device; others
    are referenced where they are, without a copy.

    The module is traced in the mode that it is in (call `eval()` first). Mutations of inputs become further outputs,
    listed in the signature.

    Raises InputTypeError for anything but a module, InputError for inputs that don't fit forward(), UnsupportedError
    for what can't be captured: all unsupported operators at once, with the lines of the model that use them.
    """
    if not isinstance(module, torch.nn.Module):
        raise InputTypeError(f"expected torch.nn.Module, got {type(module).__name__}")
    if isinstance(args, torch.Tensor):
        args = (args,)
    args, kwargs = tuple(args), dict(kwargs or {})
    _check_arguments(module, args, kwargs)
    args, kwargs = _off_meta((args, kwargs))
    with _LOCK, torch.no_grad(), warnings.catch_warnings(), _off_meta_weights(module):
        warnings.simplefilter("ignore")
        program = _export(module, args, kwargs, dynamic_shapes)
        return _Builder(module, program, tuple(args), dict(kwargs), dynamic_shapes, storage or {}).build()


def _check_arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    forward = inspect.signature(module.forward)
    try:
        forward.bind(*args, **kwargs)
    except TypeError as error:
        required = [
            p
            for p in forward.parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not args and not kwargs:
            plain = [p.name for p in required if p.kind is not p.KEYWORD_ONLY]
            named = [f"{p.name!r}: {p.name}" for p in required if p.kind is p.KEYWORD_ONLY]
            remedies = [f"example_inputs=({', '.join(plain)}{',' if len(plain) == 1 else ''})"] if plain else []
            remedies += [f"example_kwargs={{{', '.join(named)}}}"] if named else []
            needs = ", ".join(p.name for p in required)
            raise InputError(f"forward() needs {needs}; give {' and '.join(remedies)}") from None
        raise InputError(f"the example inputs don't fit forward{forward}: {error}") from None


def _off_meta(arguments: Any) -> Any:
    """Example inputs on the meta device as zeros: only their types matter."""
    return pytree.tree_map(
        lambda x: torch.zeros_like(x, device="cpu") if isinstance(x, torch.Tensor) and x.is_meta else x, arguments
    )


@contextlib.contextmanager
def _off_meta_weights(module: torch.nn.Module) -> Iterator[None]:
    """While tracing, weights on the meta device are fake tensors on the CPU, as tensors that forward() makes are."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        yield
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    fakes: dict[int, torch.Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for owner in module.modules():
            both: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for slots in both:
                for name, tensor in slots.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in fakes:
                        with mode:
                            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        fakes[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    replaced.append((slots, name, tensor))
                    slots[name] = fakes[id(tensor)]
        yield
    finally:
        for slots, name, tensor in replaced:
            slots[name] = tensor


# ---------------------------------------------------------------------------------------------------------- export


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from logging, and from printing half a graph, where it raises: the error says all of it."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    partial = ""
    held = io.StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with contextlib.redirect_stderr(held):
            yield
    except Exception as error:
        partial = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        for logger, state in zip(loggers, before, strict=True):
            logger.disabled = state
        text = held.getvalue()
        sys.stderr.write(text.replace(partial, "").lstrip() if partial else text)


def _export(module: torch.nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with _quiet():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            return program.run_decompositions(dict(decompositions()))
    except JisuError:
        raise
    except RecursionError:
        raise UnsupportedError("torch.export ran out of stack; the model's structure is too deep") from None
    except Exception as error:
        _explain(error, dynamic_shapes)


def _explain(error: BaseException, dynamic_shapes: Any) -> NoReturn:
    """Turn what torch.export raised into an error that names the user's line and a remedy."""
    where = _user_line(error)
    text = _first_lines(str(error))
    kind = type(error).__name__
    place = f" at {where}" if where else ""
    if kind == "UserError" and dynamic_shapes is not None and not _data_dependent(error):
        raise InputError(f"dynamic_shapes don't fit the model{place}: {text}") from error
    if _data_dependent(error):
        raise UnsupportedError(
            f"data-dependent control flow or size{place}: what runs depends on a tensor's values ({text}); "
            "use torch.where or torch.cond, or give the value as a constant"
        ) from error
    raise UnsupportedError(
        f"torch.export can't trace the model{place}: {kind}: {text}; rewrite that line, or check that the "
        "example inputs fit the model"
    ) from error


def _data_dependent(error: BaseException) -> bool:
    names = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
    return any(
        type(e).__name__ in names or "data-dependent" in str(e).lower() or "unbacked" in str(e).lower()
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:4])[:400] if lines else "no message"


_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HERE = os.path.dirname(os.path.realpath(__file__)) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


def _is_user_file(path: str) -> bool:
    """Whether a frame's file belongs to the model, rather than to torch, this package or Python itself."""
    if path.startswith("<"):
        return path == "<stdin>"
    real = os.path.realpath(path)
    standard = real.startswith(_STANDARD) and "site-packages" not in real
    return os.path.exists(real) and not real.startswith((_TORCH, _HERE)) and not standard


def _user_line(error: BaseException) -> str:
    """file:line of the deepest frame of the user's model in an exception and its causes."""
    for e in _chain(error):
        frames = [f for f in traceback.extract_tb(e.__traceback__) if _is_user_file(f.filename)]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}"
        for path, line in re.findall(r'File "([^"]+)", line (\d+)', str(e)):
            if _is_user_file(path):
                return f"{path}:{line}"
    return ""


def _source(node: torch.fx.Node) -> str:
    """Module path and file:line of the call that a node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    path = re.sub(r"^L\['self'\]\.?|@\d+$", "", str(path))
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [f for f in lines if _is_user_file(f[0])] or lines
    line = f"{users[-1][0]}:{users[-1][1]}" if users else ""
    return " ".join(part for part in (path, line) if part) or node.name


# --------------------------------------------------------------------------------------------------------- building


@attrs.frozen
class _Unsupported:
    """One operator that can't be lowered: its name, why, and where the model uses it."""

    name: str
    reason: str
    source: str


@attrs.frozen(eq=False)
class _Poison:
    """Stands for a value that couldn't be lowered; whatever uses it can't be lowered either, and isn't listed again.

    A number that depends on the data is only a fault (`pending`) if something besides an assertion uses it.
    """

    pending: _Unsupported | None = None


class _Dims:
    """torch's symbolic integers as dimensions over named symbols."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)

    def dim(self, value: Any) -> Dim:
        """A Python or symbolic integer as a dimension; refuses one that depends on data."""
        if isinstance(value, int):
            return value
        return dim(self._expression(value.node.expr))

    def _expression(self, expr: Any) -> Any:
        if isinstance(expr, sympy.Symbol):
            if expr.name not in self.names:
                raise Refusal("a size that depends on the data")
            return symbol(self.names[expr.name])
        if not expr.args:
            return expr
        args = [self._expression(a) for a in expr.args]
        name = type(expr).__name__
        if name in ("FloorDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv"):
            quotient = sympy.sympify(args[0]) / args[1]
            return sympy.floor(quotient) if name == "FloorDiv" else quotient
        if name in ("Mod", "PythonMod"):
            return sympy.Mod(*args)
        if name in ("Max", "Min"):
            return getattr(sympy, name)(*args)
        if name in ("TruncToInt", "FloorToInt"):
            return sympy.floor(args[0])
        if name == "CeilToInt":
            return sympy.ceiling(args[0])
        if name in ("ToFloat", "Identity"):
            return args[0]
        if name in ("Add", "Mul", "Pow", "floor", "ceiling", "Abs"):
            return expr.func(*args)
        if name in ("PowByNatural", "FloatPow"):
            return sympy.Pow(*args)
        raise Refusal(f"a dimension computed as {expr}")

    def real(self, expr: Any) -> Node:
        """A real symbolic scalar as a float64 node."""
        if not expr.free_symbols:
            return constant(float(expr), "float64")
        name = type(expr).__name__
        if name == "ToFloat" or isinstance(expr, sympy.Symbol):
            inner = expr.args[0] if name == "ToFloat" else expr
            return cast(ops.dim_value(value=dim(self._expression(inner))), "float64")
        if name in ("FloatTrueDiv", "IntTrueDiv"):
            return ops.div(*(self.real(a) for a in expr.args))
        if name in ("FloatPow", "Pow", "PowByNatural"):
            return ops.pow_(*(self.real(a) for a in expr.args))
        if name in ("Add", "Mul"):
            first, *rest = (self.real(a) for a in expr.args)
            for other in rest:
                first = (ops.add if name == "Add" else ops.mul)(first, other)
            return first
        unary = {"sqrt": ops.sqrt, "log": ops.log, "exp": ops.exp, "log2": ops.log2}
        short = name.removeprefix("OpaqueUnaryFn_")
        if short in unary:
            return unary[short](self.real(expr.args[0]))
        return cast(ops.dim_value(value=dim(self._expression(expr))), "float64")


class _Builder:
    """Turns one exported program into a Graph."""

    def __init__(
        self, module: torch.nn.Module, program: torch.export.ExportedProgram, args: tuple[Any, ...],
        kwargs: dict[str, Any], dynamic_shapes: Any, storage: Mapping[str, Storage],
    ) -> None:  # fmt: skip
        self.module, self.program, self.storage = module, program, storage
        self.args, self.kwargs, self.dynamic_shapes = args, kwargs, dynamic_shapes
        self.values: dict[torch.fx.Node, Any] = {}
        self.unsupported: list[_Unsupported] = []
        self.weights: dict[str, Storage] = {}
        self.buffers: set[str] = set()
        self.tied: dict[Any, Node] = {}
        self.names: dict[str, tuple[str, ...]] | None = None
        self.inputs: list[Node] = []
        self.input_position: dict[str, int] = {}
        self.dims = _Dims({})

    # -- the parts of the program

    def build(self) -> Captured:
        signature = self.program.graph_signature
        self._refuse_state(signature)
        parameters = self._parameters()
        self._name_symbols()
        self._declare(signature, parameters)
        graph_module = self.program.graph_module
        results = self._run(graph_module, None)
        self.unsupported += [r.pending for r in results if isinstance(r, _Poison) and r.pending]
        self._raise_unsupported()
        return self._finish(signature, parameters, results)

    def _refuse_state(self, signature: ExportGraphSignature) -> None:
        changed = sorted(
            spec.target or "?" for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION
        )
        changed += sorted(
            spec.target or "?"
            for spec in signature.output_specs
            if getattr(OutputKind, "PARAMETER_MUTATION", None) is spec.kind
        )
        if changed:
            hint = "call model.eval() before compiling" if self.module.training else "return the new value instead"
            raise UnsupportedError(f"forward() changes the model's state {', '.join(map(repr, changed))}; {hint}")

    def _placeholders(self) -> dict[str, torch.fx.Node]:
        return {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}

    def _name_symbols(self) -> None:
        """Give every symbol of the inputs a name: its Dim's, or s0, s1, … in order of appearance."""
        shapes = self._combined_shapes()
        specs = [s for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        nodes = self._placeholders()
        given = iter(shapes)
        names: dict[str, str] = {}
        order: list[str] = []
        for spec in specs:
            if not isinstance(spec.arg, TensorArgument):
                if isinstance(spec.arg, (SymIntArgument, SymFloatArgument)):
                    raise UnsupportedError(
                        f"input {spec.arg.name!r} is a dynamic number; give it as a tensor or a constant"
                    )
                continue
            tensor = nodes[spec.arg.name].meta["val"]
            declared = next(given, None)
            for axis, size in enumerate(tensor.shape):
                if not isinstance(size, torch.SymInt):
                    continue
                found = _declared_dim(declared, axis)
                for s in sorted(size.node.expr.free_symbols, key=str):
                    order.append(s.name)
                if found and isinstance(size.node.expr, sympy.Symbol):
                    names.setdefault(size.node.expr.name, found)
        taken = set(names.values())
        fresh = (f"s{i}" for i in range(len(order) + len(taken) + 1) if f"s{i}" not in taken)
        for name in order:
            if name not in names:
                names[name] = next(fresh)
        self.dims = _Dims(names)

    def _combined_shapes(self) -> list[Any]:
        """The dynamic shape of each input tensor, in order."""
        shapes = self.dynamic_shapes
        if shapes is None:
            return []
        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        values = dict(bound.arguments)
        for p in inspect.signature(self.module.forward).parameters.values():
            if p.kind is p.VAR_KEYWORD and p.name in values:
                values.update(values.pop(p.name))
        if isinstance(shapes, Mapping):
            extra = {k: v for k, v in shapes.items() if k not in values}
            if len(extra) == 1 and "kwargs" in extra and isinstance(extra["kwargs"], Mapping):
                shapes = {**shapes, **extra["kwargs"]}
            pairs = [(v, shapes.get(k)) for k, v in values.items()]
        else:
            pairs = list(zip(values.values(), shapes, strict=False))
        return [s for value, shape in pairs for _, s in _leaf_shapes(value, shape)]

    def _declare(self, signature: ExportGraphSignature, parameters: tuple[Parameter, ...]) -> None:
        """Inputs and weights for the program's placeholders."""
        names = dict(_leaf_names(parameters))
        nodes = self._placeholders()
        position = 0
        for spec in signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                if hasattr(spec.arg, "name") and spec.arg.name in nodes:
                    self.values[nodes[spec.arg.name]] = getattr(spec.arg, "value", None)
                continue
            node = nodes[spec.arg.name]
            if spec.kind is not InputKind.USER_INPUT and not node.users:
                continue
            try:
                type = self._type(node.meta["val"])
            except Refusal as error:
                self._note(spec.target or spec.arg.name, str(error), spec.target or f"input {spec.arg.name}")
                self.values[node] = _Poison()
                if spec.kind is InputKind.USER_INPUT:
                    position += 1
                continue
            if spec.kind is InputKind.USER_INPUT:
                found = placeholder(names[position], type)
                self.inputs.append(found)
                self.input_position[spec.arg.name] = position
                position += 1
                self.values[node] = found
            else:
                self.values[node] = self._weight(spec, type)

    def _weight(self, spec: Any, type: TensorType) -> Node:
        name = spec.target
        lifted = spec.kind is InputKind.CONSTANT_TENSOR
        tensor = self.program.state_dict.get(name)
        if tensor is None:
            tensor = self.program.constants.get(name)
        given = next((self.storage[n] for n in (name, *self._aliases(name)) if n in self.storage), None)
        if given is None and isinstance(tensor, torch.Tensor) and not _valueless(tensor) and lifted:
            array = array_of(tensor)
            if array.size <= MAX_INLINE:
                return constant(array)
        key = self._identity(name, tensor, given)
        if key in self.tied:
            return self.tied[key]
        if given is None:
            if not isinstance(tensor, torch.Tensor) or _valueless(tensor):
                raise InputError(f"weight {name!r} has no values (it is on the meta device); give its storage")
            given = ArrayStorage(array_of(tensor))
        stored = TensorType(tuple(given.shape), dtype_name(given.dtype))
        if stored != type:
            raise InputError(f"weight {name!r} is {type} in the model, but its storage holds {stored}")
        self.weights[name] = given
        if spec.kind is not InputKind.PARAMETER:
            self.buffers.add(name)
        self.tied[key] = weight(name, type, name)
        return self.tied[key]

    def _aliases(self, name: str) -> tuple[str, ...]:
        """The names under which the module has the very same parameter or buffer."""
        if self.names is None:
            groups: dict[int, list[str]] = {}
            for found in (self.module.named_parameters, self.module.named_buffers):
                for alias, tensor in found(remove_duplicate=False):
                    groups.setdefault(id(tensor), []).append(alias)
            self.names = {alias: tuple(group) for group in groups.values() for alias in group}
        return self.names.get(name, ())

    @staticmethod
    def _identity(name: str, tensor: Any, given: Storage | None) -> Any:
        """What tied weights have in common."""
        if given is not None:
            return ("storage", id(given))
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            place = tensor.untyped_storage()._cdata
            return (place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        return name

    # -- nodes

    def _run(self, graph_module: torch.fx.GraphModule, arguments: Sequence[Any] | None) -> Any:
        """Lower a graph module on IR values; `arguments` are None for the outermost, whose inputs are declared."""
        given = iter(arguments or ())
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                if arguments is not None:
                    self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = _attribute_of(graph_module, node.target)
            elif node.op == "output":
                return self._mapped(node.args[0])
            else:
                self.values[node] = self._call(node)
        return ()

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, (tuple, list)):
            return (
                type(value)(self._mapped(v) for v in value)
                if type(value) in (tuple, list)
                else [self._mapped(v) for v in value]
            )
        if isinstance(value, dict):
            return {k: self._mapped(v) for k, v in value.items()}
        return value

    def _call(self, node: torch.fx.Node) -> Any:
        target = node.target
        name = str(target)
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)) and not isinstance(
            target, torch._ops.HigherOrderOperator
        ):
            used = [self.values.get(n) for n in node.all_input_nodes]
            poison = next((v for v in used if isinstance(v, _Poison)), None)
            return poison or self._scalar(node, value)
        if _ASSERTIONS.search(name):
            return None
        arguments = [self._mapped(a) for a in node.args]
        if name == "<built-in function getitem>":
            return self._item(node, arguments)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(node, arguments)
        flat = pytree.tree_leaves((arguments, self._mapped(node.kwargs)))
        poisons = [a for a in flat if isinstance(a, _Poison)]
        if poisons:
            self.unsupported += [p.pending for p in poisons if p.pending and p.pending not in self.unsupported]
            return _Poison()
        try:
            return self._lower(node, arguments)
        except Refusal as error:
            return self._poisoned(node, str(error))
        except TypeRuleError as error:
            return self._poisoned(node, f"this form of it can't be lowered ({error})")
        except Exception as error:  # a fault in a lowering must not hide the other operators
            reason = f"its lowering failed ({type(error).__name__}: {error}); please report this"
            return self._poisoned(node, reason)

    def _scalar(self, node: torch.fx.Node, value: Any) -> Any:
        try:
            if isinstance(value, torch.SymInt):
                return self.dims.dim(value)
            if isinstance(value, torch.SymFloat):
                return self.dims.real(value.node.expr)
        except Refusal as error:
            return _Poison(_Unsupported(_operator_name(node), str(error), _source(node)))
        return None if isinstance(value, torch.SymBool) else value

    def _item(self, node: torch.fx.Node, arguments: list[Any]) -> Any:
        container, index = arguments
        if isinstance(container, _Poison):
            return container
        found = container[index]
        if found is None and isinstance(node.meta.get("val"), torch.Tensor):
            producer = node.args[0]
            name = _operator_name(producer) if isinstance(producer, torch.fx.Node) else "?"
            self._note(name, f"result {index} of it isn't supported", _source(node))
            return _Poison()
        return found

    def _inline(self, node: torch.fx.Node, arguments: list[Any]) -> Any:
        assert isinstance(node.target, torch._ops.HigherOrderOperator)
        short = node.target.name().rpartition(".")[2]
        if short == "wrap_with_set_grad_enabled":
            _, body, *rest = arguments
        elif short == "wrap_with_autocast":
            device, dtype, enabled, _, body, *rest = arguments
            if enabled and device == "cpu":
                self._note("torch.autocast", f"autocast to {dtype} is on; disable it and cast the model", _source(node))
                return _Poison()
        elif short == "cond":
            return self._select(node, *arguments)
        elif short == "auto_functionalized":
            self._note(str(arguments[0]), "a custom operator that changes its arguments", _source(node))
            return _Poison()
        else:
            self._note(f"torch.{short}", "control flow inside the program isn't supported", _source(node))
            return _Poison()
        if not isinstance(body, torch.fx.GraphModule):
            self._note(f"torch.{short}", "its body isn't a graph", _source(node))
            return _Poison()
        return self._run(body, rest)

    def _select(self, node: torch.fx.Node, predicate: Any, yes: Any, no: Any, operands: Sequence[Any]) -> Any:
        """torch.cond: both branches are pure, so both run and the predicate selects."""
        if any(isinstance(v, _Poison) for v in pytree.tree_leaves((predicate, list(operands)))):
            return _Poison()
        branches = [self._run(branch, operands) for branch in (yes, no)]
        found: list[Node | _Poison] = []
        for a, b in zip(*branches, strict=True):
            if isinstance(a, _Poison) or isinstance(b, _Poison):
                found.append(_Poison())
            elif isinstance(a, Node) and isinstance(b, Node) and isinstance(predicate, Node):
                found.append(attrs.evolve(ops.where(cast(predicate, "bool"), a, b), source=_source(node)))
            else:
                return self._poisoned(node, "its branches return something other than tensors")
        return tuple(found)

    def _poisoned(self, node: torch.fx.Node, reason: str) -> _Poison:
        self._note(_operator_name(node), reason, _source(node))
        return _Poison()

    def _note(self, name: str, reason: str, source: str) -> None:
        self.unsupported.append(_Unsupported(name, reason, source))

    def _types(self, value: Any) -> tuple[TensorType, ...]:
        """The types of a call's results; for complex ones, those of their real parts."""
        found = value if isinstance(value, (tuple, list)) else [value]
        return tuple(
            self._type(v, v.dtype.to_real() if v.is_complex() else v.dtype)
            for v in found
            if isinstance(v, torch.Tensor)
        )

    def _type(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> TensorType:
        if tensor.layout is not torch.strided:
            raise Refusal(f"layout {str(tensor.layout).removeprefix('torch.')}")
        return TensorType(tuple(self.dims.dim(n) for n in tensor.shape), dtype_of(dtype or tensor.dtype))

    def _lower(self, node: torch.fx.Node, arguments: list[Any]) -> Any:
        value = node.meta.get("val")
        gives_complex = isinstance(value, torch.Tensor) and value.is_complex()
        if gives_complex or any(
            isinstance(a, Complex) for a in pytree.tree_leaves((arguments, self._mapped(node.kwargs)))
        ):
            function = COMPLEX.get(node.target)
            if function is None:
                dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
                raise Refusal(f"dtype {dtype}" if gives_complex else "complex numbers")
        else:
            function = LOWERINGS.get(node.target) or LOWERINGS.get(str(node.target))
        if function is None:
            if _RANDOM.match(str(node.target)):
                raise Refusal("random operators have no reproducible meaning in a compiled program")
            raise Refusal("no lowering")
        call = Call(node, self._types(node.meta.get("val")))
        positional, keywords = _normalised(node.target, arguments, self._mapped(node.kwargs))
        result = function(call, *positional, **keywords)
        return self._settled(node, call, result)

    def _settled(self, node: torch.fx.Node, call: Call, result: Any) -> Any:
        """The result with its source noted, checked against what PyTorch promises."""
        source = _source(node)
        done: dict[Node, Node] = {}
        if isinstance(result, Complex):
            return Complex(_located(result.re, source, done), _located(result.im, source, done))
        if isinstance(result, Node):
            results: list[Any] = [result]
        elif isinstance(result, (tuple, list)):
            results = list(result)
        else:
            return result
        located = [_located(r, source, done) if isinstance(r, Node) else r for r in results]
        for r, type in zip(located, call.types, strict=False):
            if isinstance(r, Node):
                self._check(node, r, type)
        return located[0] if isinstance(result, Node) else tuple(located)

    def _check(self, node: torch.fx.Node, result: Node, type: TensorType) -> None:
        fits = (
            result.dtype == type.dtype
            and result.rank == type.rank
            and all(same_dim(a, b) or _agree(a, b) for a, b in zip(result.shape, type.shape, strict=True))
        )
        if not fits:
            raise Refusal(f"its lowering gives {result.type} where PyTorch gives {type}; please report this")

    # -- the face of the program

    def _parameters(self) -> tuple[Parameter, ...]:
        """forward()'s parameters with the structure that they were captured with."""
        spec = self.program.call_spec.in_spec
        assert spec is not None
        kinds = [
            isinstance(s.arg, TensorArgument)
            for s in self.program.graph_signature.input_specs
            if s.kind is InputKind.USER_INPUT
        ]
        numbers = iter(range(len(kinds)))
        leaves: list[Any] = [Tree("leaf", next(numbers)) if is_tensor else None for is_tensor in kinds]
        constants = [s.arg for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        for i, argument in enumerate(constants):
            if leaves[i] is None:
                leaves[i] = _constant_tree(getattr(argument, "value", None))
        args, kwargs = _spec_trees(spec, iter(leaves))
        forward = inspect.signature(self.module.forward)
        found: list[Parameter] = []
        positional = list(args.items)
        named = dict(zip(kwargs.keys, kwargs.items, strict=True))
        for p in forward.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                found.append(Parameter(p.name, "variadic", Tree("tuple", None, tuple(positional)), not positional))
                positional = []
            elif p.kind is p.VAR_KEYWORD:
                found += [Parameter(k, "keyword", t, False) for k, t in named.items()]
                named = {}
            else:
                keyword_only, positional_only = p.kind is p.KEYWORD_ONLY, p.kind is p.POSITIONAL_ONLY
                kind = "keyword" if keyword_only else "positional" if positional_only else "plain"
                if positional and p.kind is not p.KEYWORD_ONLY:
                    tree = positional.pop(0)
                elif p.name in named:
                    tree = named.pop(p.name)
                else:
                    found.append(Parameter(p.name, kind, _constant_tree(p.default), True))
                    continue
                found.append(Parameter(p.name, kind, tree, p.default is not p.empty))
        return tuple(found)

    def _finish(self, signature: ExportGraphSignature, parameters: tuple[Parameter, ...], results: Any) -> Captured:
        outputs: list[Node] = []
        mutated: list[tuple[Node, int]] = []
        leaves: list[Tree] = []
        for spec, value in zip(signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_INPUT_MUTATION:
                mutated.append((value, self.input_position[str(spec.target)]))
            elif spec.kind is OutputKind.USER_OUTPUT:
                leaves.append(self._output(spec.arg, value, outputs))
            elif spec.kind is not OutputKind.TOKEN:
                raise UnsupportedError(f"the program has an output of the kind {spec.kind.name}")
        mutations = []
        for value, position in mutated:
            mutations.append((len(outputs), position))
            outputs.append(value)
        out_spec = self.program.call_spec.out_spec
        assert out_spec is not None
        tree = _spec_tree(out_spec, iter(leaves))
        graph = Graph(tuple(self.inputs), tuple(outputs), self.weights, self._ranges())
        inputs = tuple(Input(n.name, n.tensor, i) for i, n in enumerate(self.inputs))
        call = Signature(parameters, inputs, tree, tuple(mutations))
        return Captured(graph.replace(), call, frozenset(self.buffers))

    def _output(self, argument: Any, value: Any, outputs: list[Node]) -> Tree:
        if isinstance(argument, ConstantArgument):
            return _constant_tree(argument.value)
        if isinstance(argument, (SymIntArgument, SymFloatArgument, SymBoolArgument)):
            if isinstance(value, (bool, int, float)):
                return _constant_tree(value)
            kind = "int" if isinstance(argument, SymIntArgument) else "float"
            outputs.append(value if isinstance(value, Node) else ops.dim_value(value=value))
            return Tree("number", len(outputs) - 1, name=kind)
        if isinstance(value, Complex):
            raise UnsupportedError("forward() returns a complex tensor; return torch.view_as_real of it")
        if not isinstance(value, Node):
            return _constant_tree(value)
        outputs.append(value)
        return Tree("leaf", len(outputs) - 1)

    def _ranges(self) -> dict[str, tuple[int, int | None]]:
        found: dict[str, tuple[int, int | None]] = {}
        for s, bounds in self.program.range_constraints.items():
            if str(s) in self.dims.names:
                low = int(bounds.lower) if bounds.lower.is_Integer else 1
                high = int(bounds.upper) if bounds.upper.is_Integer else None
                found[self.dims.names[str(s)]] = (max(low, 1), high)
        return found

    def _raise_unsupported(self) -> None:
        if not self.unsupported:
            return
        groups: dict[tuple[str, str], list[str]] = {}
        for u in self.unsupported:
            places = groups.setdefault((u.name, u.reason), [])
            if u.source not in places:
                places.append(u.source)
        number = collections.Counter((u.name, u.reason) for u in self.unsupported)
        lines = []
        for (name, reason), places in groups.items():
            times = f" ({number[name, reason]} times)" if number[name, reason] > 1 else ""
            shown = "; ".join(places[:4]) + (f"; and {len(places) - 4} more places" if len(places) > 4 else "")
            lines.append(f"  {name}{times}: {reason}; at {shown}")
        count = len({u.name for u in self.unsupported})
        raise UnsupportedError(f"the model uses {count} unsupported operation(s):\n" + "\n".join(lines))


# ---------------------------------------------------------------------------------------------------------- details


def _valueless(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _operator_name(node: torch.fx.Node) -> str:
    """An operator's name, behind that of the function which the model calls, where PyTorch took that apart."""
    name = str(node.target).removesuffix(".default")
    called = str((node.meta.get("torch_fn") or ("", ""))[1]).rpartition(".")[2]
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or called == packet.__name__ or not hasattr(torch.ops.aten, called or "-"):
        return name
    return f"aten.{called} (through {name})"


def _attribute_of(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return constant(array_of(found)) if isinstance(found, torch.Tensor) else found


def _normalised(target: Any, arguments: list[Any], keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword-only arguments by the operator's schema, defaults filled in, placement dropped."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return arguments, keywords
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(arguments):
            value = arguments[i]
        elif argument.name in keywords:
            value = keywords[argument.name]
        else:
            value = argument.default_value
        if not argument.kwarg_only:
            positional.append(value)
        elif argument.name not in _IGNORED_KEYWORDS:
            named[argument.name] = value
    return positional, named


def _located(root: Node, source: str, done: dict[Node, Node]) -> Node:
    """The nodes that a lowering made, up to those that have a source already, with `source` noted."""
    if root in done:
        return done[root]
    if root.source or root.op.leaf:
        return root
    operands = tuple(None if o is None else _located(o, source, done) for o in root.operands)
    done[root] = attrs.evolve(root, operands=operands, source=source)
    return done[root]


def _agree(a: Dim, b: Dim) -> bool:
    """Whether two dimensions agree at many sizes, where sympy can't prove it (floors of shifted quotients)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = sympy.sympify(a) - b
    symbols = sorted(difference.free_symbols, key=str)
    for base in (*range(2, 40), 64, 97, 1000, 1001, 4095):
        if difference.subs({s: base + 3 * i for i, s in enumerate(symbols)}) != 0:
            return False
    return True


def _declared_dim(declared: Any, axis: int) -> str:
    """The name of the Dim that dynamic_shapes gives to an axis, if it is a name of the user's."""
    if isinstance(declared, Mapping):
        found = declared.get(axis)
    elif isinstance(declared, (tuple, list)):
        found = declared[axis] if axis < len(declared) else None
    else:
        return ""
    name = found if isinstance(found, str) else getattr(found, "__name__", "")
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) else ""


def _leaf_shapes(value: Any, shape: Any) -> Iterator[tuple[Any, Any]]:
    """Every tensor in a nested value with its declared shape (None where there is none)."""
    if isinstance(value, torch.Tensor):
        yield value, shape
    elif isinstance(value, (tuple, list)):
        shapes = shape if isinstance(shape, (tuple, list)) else [None] * len(value)
        for v, s in zip(value, shapes, strict=False):
            yield from _leaf_shapes(v, s)
    elif isinstance(value, Mapping):
        for key, v in value.items():
            yield from _leaf_shapes(v, shape.get(key) if isinstance(shape, Mapping) else None)


def _leaf_names(parameters: tuple[Parameter, ...]) -> Iterator[tuple[int, str]]:
    def walk(tree: Tree, path: str) -> Iterator[tuple[int, str]]:
        if tree.kind == "leaf":
            yield tree.value, path
        keys = tree.keys or range(len(tree.items))
        for key, item in zip(keys, tree.items, strict=True):
            yield from walk(item, f"{path}.{key}")

    for parameter in parameters:
        yield from walk(parameter.tree, parameter.name)


def _constant_tree(value: Any) -> Tree:
    if value is None or type(value) in (bool, int, float, str):
        return Tree("const", value)
    if type(value) in (tuple, list):
        return Tree(type(value).__name__, None, tuple(_constant_tree(v) for v in value))
    text = repr(value)
    return Tree("opaque", name=text if len(text) <= 60 else text[:57] + "...")


def _spec_trees(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> tuple[Tree, Tree]:
    tree = _spec_tree(spec, leaves)
    return tree.items[0], tree.items[1]


def _spec_tree(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Tree:
    """A Tree from torch's description of a nested value."""
    if spec.is_leaf():
        leaf: Tree = next(leaves)
        return leaf
    items = tuple(_spec_tree(child, leaves) for child in spec.children())
    kind = spec.type
    if kind in (tuple, list):
        return Tree(kind.__name__, None, items)
    if kind in (dict, collections.OrderedDict):
        return Tree("dict", None, items, tuple(spec.context))
    return _record(kind, spec.context, items)


def _record(kind: Any, context: Any, items: tuple[Tree, ...]) -> Tree:
    """A named tuple, dataclass, model output, or one of torch's return types."""
    if kind is collections.namedtuple:
        kind = context
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(kind, type) and issubclass(kind, tuple):
        fields = getattr(kind, "_fields", None)
        if fields is None:
            fields = [k for k in vars(kind) if inspect.ismemberdescriptor(getattr(kind, k)) and not k.startswith("_")]
        return Tree("record", None, items, tuple(fields)[: len(items)], name)
    if dataclasses.is_dataclass(kind):
        # torch describes a dataclass by its fields' names, a model output (a mapping as well) by its keys
        nested = isinstance(context, (tuple, list)) and context and isinstance(context[0], (list, tuple))
        keys = context[0] if nested else context
        keys = keys if isinstance(keys, (list, tuple)) else [f.name for f in dataclasses.fields(kind)]
        if len(keys) == len(items):
            return Tree("record", None, items, tuple(keys), name)
    raise UnsupportedError(
        f"forward() takes or returns a {kind.__qualname__}; "
        "use tensors, tuples, lists, dicts, named tuples or dataclasses"
    )
