"""Models of Hugging Face's transformers, as objects or local checkpoint folders.

A decoder is traced once, stateless, over a whole sequence, with one attention op per layer: transformers looks attention,
mask and experts up in registries, and there we stand with custom ops. The mask never becomes a tensor (our mask function
returns what it means), and no cache object is in the trace. A checkpoint folder is traced on the meta device, so that
weights never materialise in torch: they stay references into the memory-mapped safetensors.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jisu.compiler import ops
from jisu.compiler.errors import InputError, JisuError, UnsupportedError
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, Storage, weight
from jisu.compiler.types import TensorType, numpy_dtype
from jisu.frontends.aten import LOWERINGS, Call
from jisu.frontends.checkpoint import Decoder, travelling_files
from jisu.frontends.conversion import Stored, find_parameters
from jisu.frontends.ready_made import find_format
from jisu.frontends.torch_export import Captured, capture

NAME = "jisu"  # under which our functions stand in transformers' registries


@attrs.frozen
class Visible:
    """What a mask means: causal, and only the last `window` keys where that is not 0."""

    window: int = 0


# --- What stands in the registries ---------------------------------------------------------------------------------


@torch.library.custom_op("jisu::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """One attention op per layer: q [b, h, s, d], k [b, g, t, d], v [b, g, t, e] -> [b, s, h, e]; it is traced, never run."""
    raise RuntimeError("jisu::attention exists in traces only")


@_attention_op.register_fake
def _(q, k, v, bias, sinks, scale, causal, window, softcap):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.custom_op("jisu::experts", mutates_args=())
def _experts_op(
    x: torch.Tensor,
    index: torch.Tensor,
    scores: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """A mixture of gated MLPs (see `jisu.compiler.ops.experts`); it is traced, never run."""
    raise RuntimeError("jisu::experts exists in traces only")


@_experts_op.register_fake
def _(x, index, scores, gate_up, down, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("jisu::expert_linear", mutates_args=())
def _expert_linear_op(x: torch.Tensor, index: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """A layer of chosen experts (see `jisu.compiler.ops.expert_linear`); it is traced, never run."""
    raise RuntimeError("jisu::expert_linear exists in traces only")


@_expert_linear_op.register_fake
def _(x, index, w, b):  # type: ignore[no-untyped-def]
    return x.new_empty((*index.shape, w.shape[1]))


_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "attention_mask"}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    strange = [k for k, v in others.items() if isinstance(v, torch.Tensor) and k not in _HARMLESS]
    if strange or others.get("cache") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} gives attention {', '.join(strange) or 'a cache'}, which jisu does not compile"
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    bias, window = None, 0
    if isinstance(attention_mask, Visible):
        is_causal, window = True, attention_mask.window
    elif isinstance(attention_mask, torch.Tensor):
        bias, is_causal = attention_mask, False
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    out = _attention_op(query, key, value, bias, s_aux, scale, is_causal, window, float(softcap or 0.0))
    return out, None


def _mask(
    batch_size: Any,
    q_length: Any,
    kv_length: Any,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> Visible:
    """Our mask function: find out what `mask_function(batch, head, query, key) -> bool` means by asking it."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        window = _probe(mask_function)
    return Visible(window)


def _ask(mask_function: Callable[..., Any], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.long)
    answers = [mask_function(zero, zero, q, k) for q, k in zip(query.unbind(), key.unbind(), strict=True)]
    return torch.stack([torch.as_tensor(a, dtype=torch.bool).reshape(()) for a in answers])


def _probe(mask_function: Callable[..., Any]) -> int:
    """The window of a causal mask (0: none); UnsupportedError where the mask is neither causal nor a sliding window."""
    far = 1 << 22
    visible = lambda q, k: bool(_ask(mask_function, torch.tensor([q]), torch.tensor([k])))  # noqa: E731
    low, high = 0, far  # the smallest key that the query at `far` sees
    if not visible(far, far):
        raise UnsupportedError("the model's mask hides a token from itself")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if visible(far, middle) else (middle + 1, high)
    window = far - low + 1 if low else 0
    generator = torch.Generator().manual_seed(0)
    spans = [4, 64, 4 * window + 4, 1 << 16]
    for span in spans:
        q = torch.randint(0, span, (48,), generator=generator)
        k = torch.randint(0, span, (48,), generator=generator)
        near = q - torch.randint(-2, 3, (48,), generator=generator) - (window if span == spans[2] else 0)
        for keys in (k, near.clamp(min=0)):
            want = (keys <= q) & ((keys > q - window) if window else torch.ones_like(keys, dtype=torch.bool))
            if not torch.equal(_ask(mask_function, q, keys), want):
                raise UnsupportedError("the model's attention mask is neither causal nor a causal sliding window")
    return window


_ACTIVATIONS: dict[str, str] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Our experts function: one op for plain gated experts; of all others two layers, with what the module does between and behind them."""
    from transformers.integrations.moe import _default_apply_gate

    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    plain = (
        module.has_gate
        and not module.has_bias
        and not module.is_transposed
        and module.is_concatenated
        and not module.has_post_expert_norm
        and type(module)._apply_gate is _default_apply_gate
        and activation is not None
    )
    if not plain:
        return _layer_by_layer(module, hidden_states, top_k_index, top_k_weights)
    scores = top_k_weights.to(hidden_states.dtype)
    return _experts_op(hidden_states, top_k_index, scores, module.gate_up_proj, module.down_proj, activation)


def _layer_by_layer(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' `batched_mm_experts_forward`, without copies of the chosen matrices."""

    def layer(x: torch.Tensor, name: str) -> torch.Tensor:
        """x [tokens, k or 1, inputs] -> [tokens * k, outputs], as modules expect it."""
        w = getattr(module, name)
        w = w.transpose(1, 2) if module.is_transposed else w
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return _expert_linear_op(x, top_k_index, w, bias).flatten(0, 1)

    inner = layer(hidden_states.unsqueeze(1), "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = layer(inner.unflatten(0, top_k_index.shape), "down_proj")
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    weighed = out.unflatten(0, top_k_index.shape) * top_k_weights.unsqueeze(-1)
    return weighed.sum(1).to(hidden_states.dtype)


def register() -> None:
    """Put our functions into transformers' registries, and our custom ops into the frontend's table (idempotent)."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    LOWERINGS[torch.ops.jisu.attention.default] = _lower_attention
    LOWERINGS[torch.ops.jisu.experts.default] = _lower_experts
    LOWERINGS[torch.ops.jisu.expert_linear.default] = lambda call, x, index, w, b: ops.expert_linear(x, index, w, b)


def _lower_attention(
    call: Call,
    q: Node,
    k: Node,
    v: Node,
    bias: Node | None,
    sinks: Node | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Node:
    swap = (0, 2, 1, 3)
    query, key, value = (ops.transpose(n, perm=swap) for n in (q, k, v))
    if sinks is not None and sinks.dtype != q.dtype:
        sinks = ops.cast(sinks, dtype=q.dtype)
    return ops.attention(query, key, value, bias, sinks, scale=scale, causal=causal, window=window, softcap=softcap)


def _lower_experts(call: Call, x: Node, index: Node, scores: Node, gate_up: Node, down: Node, activation: str) -> Node:
    return ops.experts(x, index, scores, gate_up, down, activation=activation)


# --- Tracing -------------------------------------------------------------------------------------------------------


class _Whole(nn.Module):
    """A decoder as a function of token ids and positions alone."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # A mask of ones keeps transformers from looking for packed sequences in the positions.
        extra = {"position_ids": position_ids} if self.takes_positions else {}
        mask = torch.ones_like(input_ids)
        out = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True, **extra)
        return out.logits  # type: ignore[no-any-return]


_REGISTRIES = {"attention": "_attn_implementation_internal", "experts": "_experts_implementation_internal"}


@contextlib.contextmanager
def _our_functions(model: transformers.PreTrainedModel, *kinds: str) -> Iterator[None]:
    """Let `model` (and its parts) look up our functions of these kinds; restored at the end."""
    register()
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if isinstance(getattr(m, "config", None), transformers.PreTrainedConfig)
    }
    fields = [_REGISTRIES[kind] for kind in kinds]
    before = [(c, f, getattr(c, f)) for c in configs.values() for f in fields if hasattr(c, f)]
    for c, f, _ in before:
        setattr(c, f, NAME)
    try:
        yield
    finally:
        for c, f, old in before:
            setattr(c, f, old)


_FROM_TOKENS = "create_position_ids_from_input_ids"


def _counts_positions(model: nn.Module) -> bool:
    """Whether a model that is given no positions counts tokens from 0; else it makes them from the tokens (skipping padding,
    behind an offset), and has to do so here as well."""
    return not any(
        hasattr(m, _FROM_TOKENS) or hasattr(sys.modules[type(m).__module__], _FROM_TOKENS) for m in model.modules()
    )


_LONGEST = 1 << 24


def _captured(model: transformers.PreTrainedModel, takes_positions: bool, limit: int, storage: Any) -> Captured:
    """The trace, by the first way that works.

    With our attention in the registry no mask is a tensor. A model that computes with its mask, or whose mask isn't causal,
    is traced with transformers' own attention, and one that doesn't accept any length for lengths up to about `limit`.
    """
    device = next(model.parameters()).device
    ids = torch.zeros((2, 7), dtype=torch.long, device=device)
    # Distinct, increasing positions, as the shapes of the trace are all that matters.
    positions = torch.arange(7, device=device).expand(2, 7)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    fault: JisuError | None = None
    for kinds in (("attention", "experts"), ("experts",)):
        for longest in (
            _LONGEST,
            limit,
            limit - 1,
        ):  # slices of a table of `limit` rows have another trace at `limit` itself
            sequence = torch.export.Dim("sequence", min=1, max=longest)
            shapes = {"input_ids": {0: batch, 1: sequence}, "position_ids": {0: batch, 1: sequence}}
            whole = _Whole(model, takes_positions and "attention" in kinds)
            try:
                with _our_functions(model, *kinds):
                    return capture(whole, (ids, positions), {}, shapes, storage=storage)
            except UnsupportedError as error:
                fault = error
                break  # another range of lengths won't help
            except InputError as error:
                fault = error
    if isinstance(fault, UnsupportedError):
        raise fault
    raise UnsupportedError(
        f"{type(model).__name__} can't be traced for sequences of any length: {fault}; "
        "give example_inputs=(input_ids,) to compile it for one length"
    ) from fault


def is_decoder(model: object) -> bool:
    """Whether `model` is a transformers model that generates text from token ids alone."""
    return (
        isinstance(model, transformers.PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
        and model.main_input_name == "input_ids"
    )


def trace_decoder(
    model: transformers.PreTrainedModel,
    *,
    storage: Mapping[str, Storage] | None = None,
    converted: Stored | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Decoder:
    """Capture a causal language model, batch and sequence dynamic.

    storage: where weights' values are, by the model's parameter names, for a model on the meta device. converted: what
    other parameters are made of. Raises UnsupportedError for what can't be compiled, all of it at once.
    """
    import inspect

    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters and _counts_positions(model)
    text = model.config.get_text_config()
    was_training = model.training
    model.eval()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limit = next((int(n) for n in (getattr(text, name, None) for name in names) if n), 1 << 20)
    made = converted.converted if converted is not None else {}
    blanks = {value: _Blank(value.tensor) for value in made.values()}
    given = {**(storage or {}), **{name: blanks[value] for name, value in made.items()}}
    prefixed = {f"model.{k}": v for k, v in given.items()} or None
    try:
        captured = _captured(model, takes_positions, limit, prefixed)
    finally:
        model.train(was_training)
    graph = captured.graph
    if converted is not None and made:
        graph = _with_conversions(graph, converted)
    graph = _named_as_in(graph)
    buffers = {_unwrapped(name) for name in captured.buffers}
    for name in buffers & made.keys():  # a converted buffer is made of tensors that aren't trained either
        buffers |= {n.name for n in Graph((), (made[name],)).nodes if n.op is WEIGHT}
    # Positions that the trace doesn't use are no input.
    graph = graph.replace(inputs=tuple(i for i in graph.inputs if i.name != "position_ids" or graph.users[i]))
    (name,) = graph.inputs[0].shape[1].free_symbols  # type: ignore[union-attr]
    return Decoder(
        graph,
        name.name,
        int(graph.outputs[0].shape[-1]),
        min(limit, graph.ranges[name.name][1] or limit),
        dict(files or {}),
        _result_class(model),
        buffers=frozenset(buffers),
    )


@attrs.frozen(eq=False)
class _Blank:
    """A parameter without a value of its own: what it is made of takes its place in the graph."""

    type: TensorType

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.type.shape)

    @property
    def dtype(self) -> np.dtype:
        return numpy_dtype(self.type.dtype)

    def numpy(self) -> np.ndarray:
        raise RuntimeError("a converted parameter was read before its conversion stood in the graph")


def _with_conversions(graph: Graph, stored: Stored) -> Graph:
    """The graph with what converted parameters are made of in their place."""
    values = {f"model.{name}": value for name, value in stored.converted.items()}
    weights = {**{n: s for n, s in graph.weights.items() if n not in values}, **stored.sources}

    def changed(old: Node, new: Node) -> Node:
        if new.op is WEIGHT:
            return values.get(new.name, new)
        if new.op not in (ops.linear, ops.matmul):
            return new
        x, w, *rest = new.operands
        assert x is not None and w is not None
        order = orders.get(w)
        if order is None:
            return new
        # The matrix has its columns sorted by group, and so it needs its inputs.
        return new.with_operands((ops.take(x, order, axis=x.rank - 1, wrap=False), w, *rest))

    orders = {value: matrix.order for value, matrix in stored.coded.items() if matrix.order is not None}
    _check_users(graph, {name: value in orders for name, value in values.items() if value in stored.coded})
    return attrs.evolve(graph.map(changed), weights=weights).replace()


def _check_users(graph: Graph, coded: Mapping[str, bool]) -> None:
    """Raise UnsupportedError for matrices of codes that something else than a linear layer or a look-up reads.

    coded: their names, and whether their columns are sorted.
    """
    strange = {
        f"{_WRAPPER.sub('', parent.name)} ({node.op.name})"
        for node in graph.nodes
        for i, parent in enumerate(node.operands)
        if parent is not None and parent.op is WEIGHT and parent.name in coded
        if (node.op, i) not in ((ops.linear, 1), (ops.matmul, 1))
        if (node.op, i) != (ops.take, 0) or coded[parent.name]
    }
    if strange:
        raise UnsupportedError(
            f"quantised weights are used other than by linear layers, where no kernel reads codes: {', '.join(sorted(strange))}"
        )


_WRAPPER = re.compile(r"^model(\.|(?= )|$)")


def _unwrapped(name: str) -> str:
    return _WRAPPER.sub("", name, count=1)


def _named_as_in(graph: Graph) -> Graph:
    """Weights and sources by their names in the user's model, not in the module that we wrapped around it."""

    def named(old: Node, new: Node) -> Node:
        source = _unwrapped(new.source).lstrip()
        if new.op is WEIGHT:
            return weight(_unwrapped(new.name), new.tensor, source)
        return new if source == new.source else attrs.evolve(new, source=source)

    weights = {_unwrapped(name): storage for name, storage in graph.weights.items()}
    return attrs.evolve(graph.map(named), weights=weights).replace()


def _result_class(model: nn.Module) -> str:
    cls = transformers.modeling_outputs.CausalLMOutputWithPast
    return f"{cls.__module__}:{cls.__qualname__}"


# --- Checkpoint folders --------------------------------------------------------------------------------------------


def _real_buffers(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Buffers that are in no checkpoint (rotary frequencies) are computed for real; all else stays on meta."""
    values: dict[str, np.ndarray] = {}
    for name, buffer in model.named_non_persistent_buffers():
        parent = model.get_submodule(name.rpartition(".")[0])
        parent._buffers[name.rpartition(".")[2]] = torch.full_like(buffer, -1, device="cpu")
        model._init_weights(parent)
        values[name] = parent._buffers[name.rpartition(".")[2]].numpy()  # type: ignore[union-attr]
        if values[name].size and (values[name] == -1).all():
            raise UnsupportedError(f"{type(parent).__name__} doesn't say how its buffer {name!r} is computed")
    return values


def load_config(folder: Path) -> transformers.PreTrainedConfig:
    """The configuration of a checkpoint folder; InputError says what is missing or unknown."""
    if not folder.is_dir():
        raise InputError(
            f"{str(folder)!r} is no folder; give a local checkpoint (config.json + safetensors) or a model object"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{str(folder)!r} has no config.json; give a checkpoint folder as transformers saves it")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedError(f"transformers can't read {folder / 'config.json'}: {error}") from error


def trace_checkpoint(folder: Path, tensors: Mapping[str, Any]) -> Decoder:
    """Capture the causal language model of a local checkpoint folder; its weights stay in the memory-mapped files.

    tensors: the checkpoint's tensors by name.

    Raises InputError for a folder that is no checkpoint, UnsupportedError for a model that can't be compiled.
    """
    config = load_config(folder)
    model_type = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in model_type:
        raise UnsupportedError(f"{folder}: {config.model_type!r} has no causal language model in transformers")
    quantization = config.__dict__.pop("quantization_config", None)  # transformers makes the dense model then
    format = None
    if quantization is not None:
        try:
            format = find_format(quantization if isinstance(quantization, dict) else quantization.to_dict())
        except UnsupportedError as error:
            raise UnsupportedError(f"{folder}: {error}") from None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    stored = find_parameters(model, tensors, str(folder), format)
    storage: dict[str, Storage] = {**stored.direct}
    storage |= {name: ArrayStorage(value) for name, value in _real_buffers(model).items()}
    decoder = trace_decoder(model, storage=storage, converted=stored, files=travelling_files(folder))
    return attrs.evolve(decoder, notes=() if format is None else format.notes)
