"""The text form of a graph: stable, readable, and parsed back to an equal graph.

graph [s0 in 1..64]
%0 = input(name="x"): float32[s0, 4]
%1 = weight(name="w"): float32[3, 4]
%2 = linear(%0, %1, none, none, activation="silu"): float32[s0, 3]
return %2
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy

from jisu.compiler.errors import VerifyError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Constant, Graph, Node, Storage
from jisu.compiler.types import Dim, TensorType, TypeRuleError, numpy_dtype, same_type, symbol


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value)


def attribute_text(value: Any) -> str:
    """An attribute's value as it stands in the text form."""
    if isinstance(value, Constant):
        return _array(value.array)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(attribute_text, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def _array(array: np.ndarray) -> str:
    if array.ndim:
        return f"[{', '.join(_array(a) for a in array)}]"
    value = array.item() if array.dtype.kind in "biuf" else float(array)
    if isinstance(value, bool):
        return str(value).lower()
    return _number(value)


def to_text(graph: Graph, sources: bool = False) -> str:
    """The graph as text; with `sources`, each line ends with where in the user's model its node came from."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    bounds = [
        f"{name} in {low}..{'inf' if high is None else high}"
        for name, (low, high) in sorted(graph.ranges.items())
        if name in graph.symbols
    ]
    lines = [f"graph [{', '.join(bounds)}]" if bounds else "graph"]
    for node, i in number.items():
        shown = ["none" if o is None else f"%{number[o]}" for o in node.operands]
        shown += [f"{k}={attribute_text(v)}" for k, v in node.attributes.items()]
        line = f"%{i} = {node.op.name}({', '.join(shown)}): {node.type}"
        lines.append(f"{line}  # {node.source}" if sources and node.source else line)
    lines.append(f"return {', '.join(f'%{number[o]}' for o in graph.outputs)}".rstrip())
    return "\n".join(lines)


_LINE = re.compile(r"^%(\d+) = (\w+)\((.*)\): (.+?)(?:  # (.*))?$")
_REFERENCE = re.compile(r'"(?:[^"\\]|\\.)*"|%(\d+)')  # %3, and strings, in which it means nothing
_TYPE = re.compile(r"^(\w+)\[(.*)\]$")
_FUNCTIONS = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Mod": sympy.Mod,
    "Abs": sympy.Abs,
}
_NAMES = {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}


class _Reader:
    """Evaluates the literals of the text form; nothing else of Python's syntax is accepted."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        self.nodes = nodes

    def value(self, tree: ast.expr) -> Any:
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.Name):
            if re.fullmatch(r"_node_\d+", tree.id):
                index = int(tree.id[6:])
                if index not in self.nodes:
                    raise VerifyError(f"%{index} is used before it is defined (nodes must stand behind their operands)")
                return self.nodes[index]
            return _NAMES[tree.id] if tree.id in _NAMES else symbol(tree.id)
        if isinstance(tree, ast.Tuple):
            return tuple(self.value(e) for e in tree.elts)
        if isinstance(tree, ast.List):
            return [self.value(e) for e in tree.elts]
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -self.value(tree.operand)
        if isinstance(tree, ast.BinOp):
            return self.arithmetic(tree)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS:
            return _FUNCTIONS[tree.func.id](*map(self.value, tree.args))
        raise VerifyError(f"can't read {ast.unparse(tree)!r}")

    def arithmetic(self, tree: ast.BinOp) -> Any:
        a, b = self.value(tree.left), self.value(tree.right)
        if isinstance(tree.op, ast.Add):
            return a + b
        if isinstance(tree.op, ast.Sub):
            return a - b
        if isinstance(tree.op, ast.Mult):
            return a * b
        if isinstance(tree.op, ast.Div):
            return sympy.sympify(a) / b
        if isinstance(tree.op, ast.Pow) and isinstance(b, int) and abs(b) < 64:
            return sympy.sympify(a) ** b
        raise VerifyError(f"can't read {ast.unparse(tree)!r}")


def parse_type(text: str) -> TensorType:
    """The type printed as `text`, such as "float32[2, 3*s0]"."""
    found = _TYPE.match(text.strip())
    if not found:
        raise VerifyError(f"{text!r} is no type; expected something like float32[2, s0]")
    inside = found[2].strip()
    try:
        dims = _Reader({}).value(ast.parse(f"({inside},)", mode="eval").body) if inside else ()
        return TensorType(dims, found[1])
    except (SyntaxError, TypeRuleError) as error:
        raise VerifyError(f"{text!r} is no type: {error}") from None


def parse_dim(text: str) -> Dim:
    """The dimension printed as `text`, such as "3*s0"."""
    (found,) = parse_type(f"int64[{text}]").shape
    return found


def _parse_line(line: str, nodes: dict[int, Node]) -> None:
    from jisu.compiler.ops import OPS

    found = _LINE.match(line)
    if not found:
        raise VerifyError(f"can't read the line {line!r}")
    index, name, inside, type_text, source = int(found[1]), found[2], found[3], found[4], found[5] or ""
    if index in nodes:
        raise VerifyError(f"%{index} is defined twice")
    if name not in OPS:
        raise VerifyError(f"%{index}: there is no op {name!r}")
    inside = _REFERENCE.sub(lambda m: m[0] if m[1] is None else f"_node_{m[1]}", inside)
    try:
        call = ast.parse(f"_({inside})", mode="eval").body
    except SyntaxError as error:
        raise VerifyError(f"%{index} = {name}: {error.msg} in {inside!r}") from None
    assert isinstance(call, ast.Call)
    reader = _Reader(nodes)
    op = OPS[name]
    operands = tuple(reader.value(a) for a in call.args)
    attributes = {k.arg: reader.value(k.value) for k in call.keywords if k.arg}
    if not all(o is None or isinstance(o, Node) for o in operands):
        raise VerifyError(f"%{index} = {name}: operands are written %0 or none, not {inside!r}")
    if op.leaf and (operands or set(attributes) != set(op.defaults)):
        raise VerifyError(f"%{index} = {name}: needs exactly the attribute {', '.join(op.defaults)}")
    if op in (INPUT, WEIGHT):
        nodes[index] = Node(op, (), attributes, parse_type(type_text), source)
    elif op is CONSTANT:
        type = parse_type(type_text)
        try:
            with np.errstate(over="ignore"):
                array = np.array(attributes["value"]).astype(numpy_dtype(type.dtype)).reshape(type.shape)
        except (ValueError, TypeError) as error:
            raise VerifyError(f"%{index} = {name}: its value is no {type}: {error}") from None
        nodes[index] = Node(op, (), {"value": Constant(array)}, type, source)
    else:
        try:
            nodes[index] = op.make(operands, attributes, source)
        except TypeRuleError as error:
            raise VerifyError(f"%{index} = {name}: {error}") from None
        if str(nodes[index].type) != type_text:
            printed = None if type_text.startswith("(") else parse_type(type_text)
            if printed is None or not same_type(nodes[index].type, printed):
                raise VerifyError(f"%{index} = {name}: the text says {type_text}, the op's rule {nodes[index].type}")


def parse(text: str, weights: Mapping[str, Storage] | None = None) -> Graph:
    """The graph whose text form is `text`; `weights` gives the storage of its weights.

    Raises VerifyError for malformed lines, use before definition (hence cycles), double definition, unknown ops, and
    types that disagree with the ops' rules.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines or not lines[0].startswith("graph"):
        raise VerifyError("a graph's text starts with the line 'graph'")
    if not lines[-1].startswith("return"):
        raise VerifyError("a graph's text ends with a line 'return …'")
    ranges: dict[str, tuple[int, int | None]] = {}
    for name, low, high in re.findall(r"(\w+) in (\d+)\.\.(\w+)", lines[0]):
        ranges[name] = (int(low), None if high == "inf" else int(high))
    nodes: dict[int, Node] = {}
    for line in lines[1:-1]:
        _parse_line(line, nodes)
    outputs = []
    for item in re.findall(r"%(\d+)", lines[-1]):
        if int(item) not in nodes:
            raise VerifyError(f"the graph returns %{item}, which is not defined")
        outputs.append(nodes[int(item)])
    inputs = tuple(n for n in nodes.values() if n.op is INPUT)
    return Graph(inputs, tuple(outputs), dict(weights or {}), ranges)
