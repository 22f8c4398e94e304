"""How a program is called and what it returns: Python structures around flat lists of tensors, without torch.

A `Tree` describes a nested value whose leaves are positions in a flat list. Everything that is no tensor was
specialised when the model was captured and stands in the tree as a constant.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler.errors import ArtifactError, InputError
from jisu.compiler.types import TensorType

KINDS = ("leaf", "number", "const", "opaque", "tuple", "list", "dict", "record")


@attrs.frozen
class Tree:
    """A nested value. `kind` is one of

    leaf (`value`: position in the flat list), number (the same, but a Python number: int, float or bool, named by
    `name`), const (`value`), opaque (a constant that has no JSON form; `name` shows it), tuple, list, dict (`keys`), or
    record (a named tuple, dataclass or model output: `name` is its class, `keys` its fields).
    """

    kind: str = attrs.field(validator=attrs.validators.in_(KINDS))
    value: Any = None
    items: tuple[Tree, ...] = ()
    keys: tuple[Any, ...] = ()
    name: str = ""

    def leaves(self) -> Iterator[Tree]:
        """Its leaves and numbers, in order."""
        if self.kind in ("leaf", "number"):
            yield self
        for item in self.items:
            yield from item.leaves()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.kind in ("leaf", "number"):
            found["value"] = self.value
        if self.kind == "const":
            found["value"] = _encode(self.value)
        if self.kind in ("tuple", "list", "dict", "record"):
            found["items"] = [item.to_json() for item in self.items]
        if self.kind in ("dict", "record"):
            found["keys"] = [_encode(key) for key in self.keys]
        if self.name:
            found["name"] = self.name
        return found

    @staticmethod
    def from_json(value: Any) -> Tree:
        """The tree that `to_json` wrote; raises ArtifactError for anything else."""
        if not isinstance(value, dict) or value.get("kind") not in KINDS:
            raise ArtifactError(f"the signature has an unknown structure {str(value)[:80]!r}")
        kind, name = value["kind"], value.get("name", "")
        items, keys = value.get("items", []), value.get("keys", [])
        if not isinstance(items, list) or not isinstance(keys, list) or not isinstance(name, str):
            raise ArtifactError(f"the signature has a malformed {kind}")
        if kind in ("dict", "record") and len(items) != len(keys):
            raise ArtifactError(f"the signature has a {kind} with {len(keys)} keys for {len(items)} values")
        held = value.get("value")
        if kind in ("leaf", "number") and (type(held) is not int or held < 0):
            raise ArtifactError(f"the signature has a leaf at {held!r}")
        return Tree(
            kind,
            _decode(held) if kind == "const" else held,
            tuple(Tree.from_json(item) for item in items),
            tuple(_decode(key) for key in keys),
            name,
        )


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("float") not in ("inf", "-inf", "nan"):
            raise ArtifactError(f"the signature has an unknown constant {str(value)[:80]!r}")
        return float(value["float"])
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ArtifactError(f"the signature has an unknown constant {str(value)[:80]!r}")
    return value


@attrs.frozen
class Parameter:
    """One parameter of forward().

    `kind` is "plain" (by position or name), "keyword" (by name only), "positional" (by position only) or "variadic"
    (`*args`: its tree is a tuple). `tree` is what it was captured with; `optional` says that a call may leave it out,
    because it has a default or was left out then.
    """

    name: str
    kind: str = attrs.field(validator=attrs.validators.in_(("plain", "keyword", "positional", "variadic")))
    tree: Tree
    optional: bool = False


@attrs.frozen
class Input:
    """A tensor that a call gives: its dotted name, its type, and its position in the flat list."""

    name: str
    type: TensorType
    position: int


class Output(collections.OrderedDict[str, Any]):
    """A result with named fields: an ordered mapping whose values are also attributes and, by number, items."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this output has no field {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order, without those that are None."""
        return tuple(value for value in self.values() if value is not None)


@attrs.frozen
class Signature:
    """How to call a program.

    `parameters` of forward() in order; `inputs`, the tensors among them; `outputs`, the structure of the result
    over the program's outputs; `mutations`, (output, input) positions: what such an output holds must be written
    back into that input. Outputs that only serve mutations stand behind those in the structure.
    """

    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]
    outputs: Tree
    mutations: tuple[tuple[int, int], ...] = ()

    def flatten_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The tensors of a call, in the order of `inputs`.

        Raises InputError for a missing or unexpected argument, another structure, or another value of a constant.
        """
        given = self._bound(args, dict(kwargs or {}))
        leaves: list[Any] = [None] * len(self.inputs)
        for parameter in self.parameters:
            if parameter.name in given:
                self._fill(parameter.tree, given[parameter.name], parameter.name, leaves)
            elif any(parameter.tree.leaves()) or not parameter.optional:
                missing = [i.name for i in self.inputs if i.position in {t.value for t in parameter.tree.leaves()}]
                raise InputError(f"missing input {(missing or [parameter.name])[0]!r}; {self._usage()}")
        return leaves

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name."""
        by_position = [p for p in self.parameters if p.kind in ("plain", "positional")]
        variadic = next((p for p in self.parameters if p.kind == "variadic"), None)
        given = {p.name: value for p, value in zip(by_position, args, strict=False)}
        extra = tuple(args[len(by_position) :])
        if variadic is not None:
            if len(extra) < len(variadic.tree.items):
                raise InputError(f"missing input {f'{variadic.name}.{len(extra)}'!r}; {self._usage()}")
            given[variadic.name] = extra
        elif extra:
            raise InputError(
                f"expected at most {len(by_position)} positional arguments, got {len(args)}; {self._usage()}"
            )
        by_name = {p.name for p in self.parameters if p.kind in ("plain", "keyword")}
        for name, value in kwargs.items():
            if name not in by_name:
                raise InputError(f"unexpected argument {name!r}; {self._usage()}")
            if name in given:
                raise InputError(f"argument {name!r} was given twice, by position and by name")
            given[name] = value
        return given

    def _usage(self) -> str:
        inputs = ", ".join(f"{i.name}: {i.type}" for i in self.inputs)
        return f"the program takes {inputs}" if inputs else "the program takes no tensors"

    def _fill(self, tree: Tree, value: Any, where: str, leaves: list[Any]) -> None:
        if tree.kind == "leaf":
            if value is None or isinstance(value, (str, bool, int, float, list, tuple, dict)):
                expected = self.inputs[tree.value]
                raise InputError(f"input {where!r}: expected a tensor {expected.type}, got {_shown(value)}")
            leaves[tree.value] = value
        elif tree.kind == "const":
            if not _same_constant(tree.value, value):
                raise InputError(f"the program was compiled for {where}={tree.value!r}, got {_shown(value)}")
        elif tree.kind == "opaque":
            if _shown(value) != tree.name:
                raise InputError(f"the program was compiled for {where}={tree.name}, got {_shown(value)}")
        elif tree.kind in ("tuple", "list"):
            if not isinstance(value, (tuple, list)) or len(value) != len(tree.items):
                raise InputError(
                    f"argument {where!r}: expected a {tree.kind} of {len(tree.items)}, got {_shown(value)}"
                )
            for i, (item, part) in enumerate(zip(tree.items, value, strict=True)):
                self._fill(item, part, f"{where}.{i}", leaves)
        else:
            self._fill_fields(tree, value, where, leaves)

    def _fill_fields(self, tree: Tree, value: Any, where: str, leaves: list[Any]) -> None:
        found = _fields(tree, value)
        if found is None or list(found) != list(tree.keys) and set(found) != set(tree.keys):
            shown = sorted(map(str, found)) if found is not None else _shown(value)
            wanted = ", ".join(map(str, tree.keys))
            raise InputError(f"argument {where!r}: expected a {tree.kind} with {wanted}, got {shown}")
        for key, item in zip(tree.keys, tree.items, strict=True):
            self._fill(item, found[key], f"{where}.{key}", leaves)

    def unflatten(self, values: Sequence[Any]) -> Any:
        """The structure that forward() returns, from the program's outputs."""
        return _built(self.outputs, values)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` reads them back."""
        return {
            "parameters": [
                {"name": p.name, "kind": p.kind, "optional": p.optional, "tree": p.tree.to_json()}
                for p in self.parameters
            ],
            "inputs": [
                {"name": i.name, "dtype": i.type.dtype, "shape": [str(d) for d in i.type.shape]} for i in self.inputs
            ],
            "outputs": self.outputs.to_json(),
            "mutations": [list(pair) for pair in self.mutations],
        }

    @staticmethod
    def from_json(value: Any) -> Signature:
        """The signature that `to_json` wrote; raises ArtifactError for anything else."""
        from jisu.compiler.errors import JisuError
        from jisu.compiler.text import parse_type

        try:
            inputs = tuple(
                Input(str(i["name"]), parse_type(f"{i['dtype']}[{', '.join(i['shape'])}]"), k)
                for k, i in enumerate(value["inputs"])
            )
            parameters = tuple(
                Parameter(str(p["name"]), p["kind"], Tree.from_json(p["tree"]), bool(p["optional"]))
                for p in value["parameters"]
            )
            mutations = tuple((int(a), int(b)) for a, b in value["mutations"])
            found = Signature(parameters, inputs, Tree.from_json(value["outputs"]), mutations)
        except ArtifactError:
            raise
        except (KeyError, TypeError, ValueError, JisuError) as error:
            raise ArtifactError(f"the signature is malformed: {error}") from None
        positions = {t.value for p in found.parameters for t in p.tree.leaves()}
        if positions - set(range(len(inputs))) or any(b >= len(inputs) for _, b in mutations):
            raise ArtifactError(f"the signature names inputs beyond its {len(inputs)}")
        return found


def _same_constant(expected: Any, value: Any) -> bool:
    if type(value).__module__ not in ("builtins",):
        return False
    return type(expected) is type(value) and (expected == value or (expected != expected and value != value))


def _shown(value: Any) -> str:
    """A value as an error message shows it: short, and tensors without their elements."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(tree: Tree, value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if tree.kind != "record":
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and len(value) == len(tree.keys):
        return dict(zip(tree.keys, value, strict=True))
    return None


def _built(tree: Tree, values: Sequence[Any]) -> Any:
    if tree.kind == "leaf":
        return values[tree.value]
    if tree.kind == "number":
        number = values[tree.value]
        return {"int": int, "float": float, "bool": bool}[tree.name](number)
    if tree.kind == "const":
        return tree.value
    if tree.kind == "opaque":
        return None
    items = [_built(item, values) for item in tree.items]
    if tree.kind == "tuple":
        return tuple(items)
    if tree.kind == "list":
        return items
    fields = dict(zip(tree.keys, items, strict=True))
    if tree.kind == "dict":
        return fields
    found = _record_class(tree)
    if found is None:
        return Output(fields)
    if issubclass(found, tuple):
        return found(*items) if hasattr(found, "_fields") else found(tuple(items))
    return found(**fields)


def _record_class(tree: Tree) -> Any:
    """The class of a record, if its module is loaded and the class is of a kind that only holds fields."""
    module, _, name = tree.name.rpartition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    if issubclass(found, tuple):
        if hasattr(found, "_fields"):
            return found if tuple(found._fields) == tree.keys else None
        return found if getattr(found, "n_fields", None) == len(tree.keys) else None
    if dataclasses.is_dataclass(found):
        return found if {f.name for f in dataclasses.fields(found)} >= set(tree.keys) else None
    return None
