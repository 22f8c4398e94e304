"""Checkpoints that hold a model's parameters under other names, in other pieces or dtypes, as expressions over what is stored.

transformers publishes checkpoints in the form in which they were first released and converts them while it loads them
(`transformers.conversion_mapping`): experts stored one by one become one tensor, a fused projection becomes three. Here the same
conversions are traced once and stand in the graph as ordinary nodes over stored tensors, so that nothing is loaded to
be converted, passes see through them, and a trace that is kept needs no transformers when it is read back.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from jisu.compiler import ops
from jisu.compiler.errors import ArtifactError, UnsupportedError
from jisu.compiler.graph import Graph, Node, Storage
from jisu.compiler.storage import LazyTensor
from jisu.compiler.types import TensorType, dtype_name, is_float
from jisu.frontends.aten.table import dtype_of
from jisu.frontends.ready_made import PREFIX, Coded, Format, Matrix, Place, as_codes, reference, tables
from jisu.frontends.torch_export import capture


@attrs.frozen
class Stored:
    """Where a model's parameters are in a checkpoint.

    direct: parameter name -> the stored tensor that it is. converted: parameter name -> its value over weights named
    `PREFIX` + stored name, whose tensors are in `sources`. Tied parameters share one entry's value. coded: which of these values
    are matrices of codes; kernels have to read them as such.
    """

    direct: Mapping[str, LazyTensor]
    converted: Mapping[str, Node]
    sources: Mapping[str, Storage]
    coded: Mapping[Node, Matrix] = attrs.field(factory=dict)


def find_parameters(
    model: transformers.PreTrainedModel, tensors: Mapping[str, LazyTensor], label: str, format: Format | None = None
) -> Stored:
    """Match a checkpoint's tensors to the parameters and persistent buffers of `model` (on the meta device).

    Parameters that transformers keeps in float32 are made float32 in `model`. label: names the checkpoint in errors. format: how
    matrices are stored as codes, where some are. Raises ArtifactError for parameters that the checkpoint lacks or holds in another
    shape, all of them at once, UnsupportedError for a conversion that can't be traced.
    """
    _keep_in_float32(model)
    state = model.state_dict(keep_vars=True)
    plain, matrices = format.split(tensors) if format is not None else (dict(tensors), {})
    direct, pieces = _sorted_out(model, {**plain, **matrices}, state)
    converted = _converted(model, _without_codes(pieces, label), tensors)
    coded: dict[Node, Matrix] = {}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    found_direct: dict[str, LazyTensor] = {}
    found: dict[str, Node] = {}
    complaints: list[str] = []
    for names in groups.values():
        wanted = TensorType(tuple(state[names[0]].shape), dtype_of(state[names[0]].dtype))
        stored = next((direct[n] for n in names if n in direct), None)
        value = next((converted[n] for n in names if n in converted), None)
        if isinstance(stored, Coded):
            assert format is not None
            try:
                value = _decoded(model, format, stored, names[0], wanted, coded)
            except ArtifactError as error:
                complaints.append(str(error))
                continue
        elif stored is not None:
            value = reference(stored)
            if value.type == wanted:
                found_direct |= dict.fromkeys(names, stored)
                continue
        if value is None:
            complaints.append(f"{names[0]} ({wanted}) is missing")
        elif value.shape != wanted.shape or is_float(wanted.dtype) > is_float(value.dtype):
            complaints.append(f"{names[0]} is {wanted} in the model, but the checkpoint holds {value.type}")
        else:
            value = value if value.dtype == wanted.dtype else ops.cast(value, dtype=wanted.dtype)
            found |= dict.fromkeys(names, value)
    if complaints:
        if format is None and any(
            name.endswith((".qweight", ".weight_packed", ".weight_scale", ".bitmask")) for name in tensors
        ):
            complaints.insert(0, "it holds quantised or sparse weights, but config.json has no quantization_config")
        shown = "; ".join(complaints[:8]) + (f"; and {len(complaints) - 8} more" if len(complaints) > 8 else "")
        raise ArtifactError(f"{label}: the weights don't fit config.json: {shown}")
    used = {
        n.name for value in found.values() for n in Graph((), (value,)).nodes if n.op.leaf and "name" in n.attributes
    }
    sources: dict[str, Storage] = {PREFIX + name: as_codes(t) for name, t in tensors.items() if PREFIX + name in used}
    sources |= {name: table for name, table in tables().items() if name in used}
    return Stored(found_direct, found, sources, coded)


def _without_codes(pieces: Pieces, label: str) -> Pieces:
    """Pieces that parameters are put together from; raises UnsupportedError where some are matrices of codes."""
    coded = [
        t.module for _, groups in pieces.values() for group in groups.values() for t in group if isinstance(t, Coded)
    ]
    if coded:
        raise UnsupportedError(
            f"{label}: these quantised layers are put together into larger ones, such as experts, whose kernels read no codes "
            f"yet; give the original checkpoint: {', '.join(_listed(coded))}"
        )
    return pieces


def _listed(names: list[str]) -> list[str]:
    """Names, or, of very many, each that differs in its numbers alone once, with their count."""
    if len(names) <= 64:
        return names
    return [
        f"{name} ({count} of them)"
        for name, count in Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names).items()
    ]


def _decoded(
    model: transformers.PreTrainedModel,
    format: Format,
    stored: Coded,
    name: str,
    wanted: TensorType,
    coded: dict[Node, Matrix],
) -> Node:
    """The value of a parameter that is stored as codes; added to `coded`."""
    module = name.rpartition(".")[0]
    kind = type(model.get_submodule(module)).__name__
    if wanted.rank != 2:
        raise UnsupportedError(f"{stored.module}: a quantised parameter {wanted}; jisu reads quantised matrices only")
    turned = kind == "Conv1D"  # transformers' name for a linear layer whose weight is [k, n]
    n, k = (int(d) for d in (wanted.shape[::-1] if turned else wanted.shape))
    matrix = format.read(stored, Place((stored.module, module), kind, n, k, wanted.dtype))
    value = ops.transpose(matrix.value, perm=(1, 0)) if turned else matrix.value
    coded[value] = matrix
    return value


def _keep_in_float32(model: transformers.PreTrainedModel) -> None:
    """What loading would keep in float32 whatever the model's dtype, here on the meta device."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    kept, groups, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters():
        match = kept.search(name)
        if match is not None and match.lastgroup is not None:
            parameter.data = parameter.data.to(plan[groups[match.lastgroup]])


Pieces = Mapping[str, tuple[WeightConverter, Mapping[str, list[Any]]]]
"""By the first parameter that a converter makes: the converter, and what it collects by its patterns."""


def _sorted_out(
    model: transformers.PreTrainedModel, tensors: Mapping[str, LazyTensor | Coded], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, LazyTensor | Coded], Pieces]:
    """Stored tensors by the parameter that they are, and by the first parameter that they are converted to."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, names = model.base_model_prefix, dict(state)
    direct: dict[str, LazyTensor | Coded] = {}
    pieces: dict[str, tuple[WeightConverter, dict[str, list[Any]]]] = {}
    for key in sorted(tensors, key=dot_natural_key):  # a converter stacks its pieces in this order
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if renamed not in state and key in state:
            renamed, pattern = key, None
        if renamed not in state:
            continue  # the checkpoint may hold more than the model: heads of other tasks, buffers of old versions
        if pattern is None:
            direct[renamed] = tensors[key]
        else:
            collected = pieces.setdefault(renamed, (by_pattern[pattern], {}))[1]
            collected.setdefault(pattern, []).append(tensors[key])
    return direct, pieces


class _Conversion(nn.Module):
    """A converter of transformers as a function of the tensors that it collects."""

    def __init__(self, converter: WeightConverter, model: Any, first: str, counts: Mapping[str, int]) -> None:
        super().__init__()
        # Neither as a submodule, whose weights would be captured along.
        self.__dict__["parts"] = (converter, model, first, dict(counts))

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        converter, model, first, counts = self.__dict__["parts"]
        own, given = copy.deepcopy(converter), iter(tensors)
        for pattern, count in counts.items():
            own.collected_tensors[pattern] = [next(given) for _ in range(count)]
        results = own.convert(first, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in results.items()}


def _converted(
    model: transformers.PreTrainedModel,
    pieces: Pieces,
    tensors: Mapping[str, LazyTensor],
) -> dict[str, Node]:
    """Values of converted parameters; a conversion is traced once per set of shapes, so that layers share it."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    traced: dict[Any, Graph] = {}
    found: dict[str, Node] = {}
    for first, (converter, collected) in pieces.items():
        parts = [t for group in collected.values() for t in group]
        conversion = _Conversion(converter, model, first, {p: len(group) for p, group in collected.items()})
        blanks = [torch.empty(t.shape, dtype=_torch_dtype(t), device="meta") for t in parts]
        key = (
            id(converter),
            tuple((p, len(g)) for p, g in collected.items()),
            tuple((t.shape, t.dtype) for t in parts),
        )
        try:
            targets = list(conversion(*blanks))
            if key not in traced:
                traced[key] = capture(conversion, blanks).graph
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"{first}: {type(converter).__name__} over {', '.join(names[id(t)] for t in parts[:3])} … can't be traced: {error}"
            ) from error
        values = traced[key].apply([reference(t) for t in parts])
        found |= dict(zip(targets, values, strict=True))
    return found


def _torch_dtype(tensor: LazyTensor) -> torch.dtype:
    found = getattr(torch, dtype_name(tensor.dtype))
    assert isinstance(found, torch.dtype)
    return found
