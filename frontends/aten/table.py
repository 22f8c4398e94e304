"""The table from PyTorch operators to the IR, and what its entries are made of.

An entry is a function `lower(call, *arguments, **keyword_only)`: `call` tells what PyTorch says about the results, the
arguments come in the order of the operator's schema with defaults filled in, tensors as IR nodes, symbolic integers as
dimensions, real symbolic scalars as float64 nodes of rank 0. It returns a node, or a tuple of nodes (None for a result
that it can't give). What it refuses it refuses with `refuse(reason)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import attrs
import numpy as np
import torch
import torch.fx

from jisu.compiler import ops
from jisu.compiler.errors import UnsupportedError
from jisu.compiler.graph import MAX_INLINE, Node, Op, constant
from jisu.compiler.types import DTYPES, Dim, TensorType, dim, is_float, numpy_dtype, product, same_dim, same_shape

Lowering = Callable[..., Any]

LOWERINGS: dict[Any, Lowering] = {}
"""Lowerings by operator overload (`torch.ops.aten.add.Tensor`), or by name ("transformers.grouped_mm_fallback.default")
for an operator that may not be registered."""

HALF = ("float16", "bfloat16")


class Refusal(UnsupportedError):
    """Why one call can't be lowered; `capture` collects them into one UnsupportedError."""


def refuse(reason: str) -> NoReturn:
    """Refuse the call that is being lowered."""
    raise Refusal(reason)


def lowering(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Enter a function into `LOWERINGS` for each of `targets`."""

    def enter(function: Lowering) -> Lowering:
        for target in targets:
            LOWERINGS[target] = function
        return function

    return enter


def dtype_of(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype; refuses complex, float8, quantized and other dtypes by name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        refuse(f"dtype {name}")
    return name


@attrs.frozen(eq=False)
class Call:
    """One call in the exported program: its node, and the types that PyTorch promises for its results."""

    node: torch.fx.Node
    types: tuple[TensorType, ...]

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        return str(self.node.target).split(".")[-2]

    @property
    def type(self) -> TensorType:
        """The type of the only, or first, result."""
        return self.types[0]

    @property
    def dtype(self) -> str:
        """Dtype of the first result."""
        return self.type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape of the first result."""
        return self.type.shape

    def meta(self, index: int) -> Any:
        """What PyTorch knows about a positional argument: a FakeTensor, or the Python value itself."""
        argument = self.node.args[index]
        return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument

    def promoted(self) -> str:
        """The dtype to which PyTorch promotes the first two arguments."""
        plain = [_plain(self.meta(i)) for i in (0, 1)]
        return dtype_of(torch.result_type(*plain))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return 1
    return 1.0 if isinstance(value, torch.SymFloat) else value


# ------------------------------------------------------------------------------------------------------- operands


def cast(x: Node, dtype: str) -> Node:
    """`x` as `dtype`."""
    return x if x.dtype == dtype else ops.cast(x, dtype=dtype)


def operand(x: Any, dtype: str) -> Node:
    """A tensor, number or dimension as a node of `dtype`."""
    if isinstance(x, Node):
        return cast(x, dtype)
    if isinstance(x, (bool, int, float)):
        return constant(x, dtype)
    if isinstance(x, complex):
        refuse("a complex scalar")
    return cast(ops.dim_value(value=x), dtype)


def exact(x: Any, dtype: str) -> bool:
    """Whether PyTorch sees the same value when this operand is rounded to `dtype` first."""
    if isinstance(x, Node):
        return x.dtype == dtype or x.rank > 0
    if isinstance(x, (bool, int, float)):
        return x != x or float(np.asarray(x).astype(numpy_dtype(dtype))) == float(np.float32(x))
    return False


def wide(function: Callable[..., Node], dtype: str, *operands: Any) -> Node:
    """`function` of the operands with result `dtype`; half precision computes in float32 and rounds once."""
    inner = "float32" if dtype in HALF else dtype
    return cast(function(*(None if x is None else operand(x, inner) for x in operands)), dtype)


def rounded(function: Callable[..., Node], dtype: str, *operands: Any) -> Node:
    """As `wide`, but in `dtype` itself where that changes nothing: ops round once, only scalars may lose bits."""
    if dtype in HALF and not all(exact(x, dtype) for x in operands):
        return wide(function, dtype, *operands)
    return function(*(operand(x, dtype) for x in operands))


def as_bool(x: Any) -> Node:
    """Truth of each element."""
    return operand(x, "bool")


# --------------------------------------------------------------------------------------------------------- shapes


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis; a tensor of rank 0 counts as having one."""
    return axis % max(rank, 1)


def axes_of(axes: Iterable[int] | int | None, rank: int) -> tuple[int, ...]:
    """Distinct sorted axes; None or none at all mean all of them."""
    if isinstance(axes, int):
        axes = (axes,)
    axes = tuple(axes or ())
    if rank == 0:
        return ()
    return tuple(sorted({axis_of(a, rank) for a in axes})) if axes else tuple(range(rank))


def view(x: Node, shape: Sequence[Dim]) -> Node:
    """`x` reshaped, where that changes anything."""
    return x if same_shape(x.shape, shape) else ops.reshape(x, shape=tuple(shape))


def expand(x: Node, shape: Sequence[Dim]) -> Node:
    """`x` broadcast, where that changes anything."""
    return x if same_shape(x.shape, shape) else ops.broadcast_to(x, shape=tuple(shape))


def permute(x: Node, perm: Sequence[int]) -> Node:
    """`x` transposed, where that changes anything; two transpositions become one."""
    perm = tuple(perm)
    if x.op is ops.transpose:
        perm, x = tuple(x.perm[p] for p in perm), x.parents[0]
    return x if perm == tuple(range(x.rank)) else ops.transpose(x, perm=perm)


def move_axis(x: Node, source: int, target: int) -> Node:
    """`x` with one axis moved."""
    perm = [i for i in range(x.rank) if i != source]
    perm.insert(target, source)
    return permute(x, perm)


def unsqueeze(x: Node, axis: int) -> Node:
    """`x` with a new axis of size 1 at `axis` of the result."""
    return ops.reshape(x, shape=(*x.shape[:axis], 1, *x.shape[axis:]))


def squeeze(x: Node, axis: int) -> Node:
    """`x` without its axis `axis` of size 1."""
    return ops.reshape(x, shape=(*x.shape[:axis], *x.shape[axis + 1 :]))


def cut(x: Node, axis: int, start: Dim, stop: Dim, step: int = 1) -> Node:
    """`x[start:stop:step]` along one axis, for bounds inside the axis."""
    if step == 1 and start == 0 and same_dim(stop, x.shape[axis]):
        return x
    return ops.slice_(
        x,
        starts=tuple(start if i == axis else 0 for i in range(x.rank)),
        stops=tuple(stop if i == axis else n for i, n in enumerate(x.shape)),
        steps=tuple(step if i == axis else 1 for i in range(x.rank)),
    )


def pick(x: Node, axis: int, index: Dim) -> Node:
    """`x` at one position of an axis."""
    return squeeze(cut(x, axis, index, dim(index + 1)), axis)


def at_least_1d(x: Node) -> Node:
    """A scalar as a vector of one."""
    return ops.reshape(x, shape=(1,)) if x.rank == 0 else x


def filled(value: Any, type: TensorType) -> Node:
    """A tensor that holds one value everywhere."""
    return expand(operand(value, type.dtype), type.shape)


def positions(shape: Sequence[Dim], axis: int, dtype: str = "int64") -> Node:
    """0, 1, … along `axis`, with size 1 along the other axes of `shape`."""
    found = ops.iota(extent=shape[axis], dtype=dtype)
    return view(found, tuple(n if i == axis else 1 for i, n in enumerate(shape)))


def literal(values: Any, dtype: str) -> Node:
    """A small array as a constant; refuses one that is larger than the graph holds."""
    array = np.asarray(values).astype(numpy_dtype(dtype))
    if array.size > MAX_INLINE:
        refuse(f"a table of {array.size} elements")
    return constant(array)


def pad(x: Node, value: Any, low: Sequence[Dim], high: Sequence[Dim], interior: Sequence[int] | None = None) -> Node:
    """`x` padded; negative amounts cut."""
    gaps = tuple(interior or (0,) * x.rank)
    if any(not _negative(n) and n != 0 for n in (*low, *high)) or any(gaps):
        x = ops.pad(
            x,
            operand(value, x.dtype),
            low=tuple(0 if _negative(n) else n for n in low),
            high=tuple(0 if _negative(n) else n for n in high),
            interior=gaps,
        )
    for axis, (before, behind) in enumerate(zip(low, high, strict=True)):
        start = dim(-before) if _negative(before) else 0
        stop = dim(x.shape[axis] + behind) if _negative(behind) else x.shape[axis]
        x = cut(x, axis, start, stop)
    return x


def _negative(n: Dim) -> bool:
    return n < 0 if isinstance(n, int) else bool(n.is_negative)


def lowest(dtype: str) -> Any:
    """The smallest value of a dtype."""
    if dtype == "bool":
        return False
    return -float("inf") if is_float(dtype) else int(np.iinfo(numpy_dtype(dtype)).min)


def highest(dtype: str) -> Any:
    """The largest value of a dtype."""
    if dtype == "bool":
        return True
    return float("inf") if is_float(dtype) else int(np.iinfo(numpy_dtype(dtype)).max)


def count(shape: Sequence[Dim], axes: Sequence[int]) -> Dim:
    """How many elements lie along `axes`."""
    return product(shape[a] for a in axes)


def unary(op: Op) -> Lowering:
    """The lowering of an elementwise function of one tensor: integers become floats where PyTorch says so."""

    def lower(call: Call, x: Node) -> Node:
        return op(cast(x, call.dtype))

    return lower
