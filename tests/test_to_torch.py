"""Graphs as modules of PyTorch: ops mean the same there, gradients are right, trained values come back."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import jisu
from jisu.compiler import ops
from jisu.compiler.errors import InputError, InputTypeError, UnsupportedError
from jisu.compiler.graph import ArrayStorage, Graph, Op, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.schemes import SCHEMES, Scheme
from jisu.compiler.types import TensorType, is_float
from jisu.frontends.aten.values import array_of
from jisu.frontends.to_torch import MEANINGS, from_torch, to_torch
from jisu.passes.compression import Compress
from jisu.testing import arrays_for, graph_of, op_calls

INT4 = {"quantize": [{"scheme": "int4", "group": 16, "symmetric": False}]}
LATER = frozenset(
    (ops.pack, ops.pack_gated, ops.pack_codes, ops.pack_scales, ops.packed_linear, ops.packed_gated_linear, ops.packed_projections,
     ops.packed_take, ops.packed_experts, ops.quantized_linear, ops.cache_append, ops.attention_cached, ops.pack_mask,
     ops.pack_starts, ops.pack_values, ops.fill_codes, ops.sparse_linear, ops.sparse_take, ops.encode_rows, ops.decode_rows,
     ops.encode_levels, ops.levels_linear, ops.levels_projections, ops.pack_zeros, ops.quantized_take, ops.pack_places,
     ops.semi_structured_linear, ops.draw)
)  # fmt: skip
"""What layout, the cache and generation make: never trained."""


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def ids(batch: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- Ops -----------------------------------------------------------------------------------------------------------------


CALLED: list[Op] = sorted(MEANINGS, key=lambda op: str(op.name))


@pytest.mark.parametrize("op", CALLED, ids=lambda op: str(op.name))
@settings(max_examples=25)
@given(data=st.data())
def test_ops_mean_the_same(op: Op, data: st.DataObject) -> None:
    node = data.draw(op_calls(op))
    graph = graph_of(node)
    sample = data.draw(arrays_for(graph, values=data.draw(st.sampled_from(["digits", "normal"]))))
    graph = sample.fill(graph)
    values = interpret(graph, sample.inputs, keep=True)
    if op in (ops.trunc_div, ops.floor_div, ops.remainder, ops.fmod) and not is_float(node.dtype):
        assume(values[node.parents[1]].all())  # PyTorch raises an error where an integer is divided by zero
    want = [values[output] for output in graph.outputs]
    found = to_torch(graph)(*map(tensor, sample.inputs))
    for a, b in zip(want, found, strict=True):
        got = array_of(b)
        assert got.dtype == a.dtype and got.shape == a.shape
        tolerance = {2: 2e-2, 4: 2e-5, 8: 1e-9}[a.dtype.itemsize] if a.dtype.kind not in "biu" else 0
        np.testing.assert_allclose(got.astype(np.float64), a.astype(np.float64), rtol=tolerance, atol=tolerance)


def test_every_op_has_a_meaning_or_comes_later() -> None:
    assert {op for op in ops.OPS.values() if not op.leaf} == MEANINGS.keys() | LATER


def test_what_comes_later_is_refused() -> None:
    w = placeholder("w", TensorType((5, 3), "float32"))
    with pytest.raises(UnsupportedError, match="pack: made by the passes for layout or the cache"):
        to_torch(Graph((w,), (ops.pack(w, panel=4),)))


def sampled(op: Op) -> list[tuple[list[torch.Tensor | None], dict[str, Any]]]:
    """The op's declared samples on normal numbers, floats in float64."""
    generator = torch.Generator().manual_seed(0)
    found = []
    assert op.samples is not None
    for types, attributes in op.samples():
        operands: list[torch.Tensor | None] = []
        for text in types:
            match = re.fullmatch(r"(\w+)\[(.*)\](?: < (\d+))?", text or "")
            if match is None:
                operands.append(None)
                continue
            shape = [int(n) for n in match[2].split(", ") if n]
            if match[1].startswith("float"):
                operands.append(torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_())
            else:
                operands.append(torch.arange(math.prod(shape)).reshape(shape) % int(match[3] or 2))
        found.append((operands, {**op.defaults, **attributes}))
    return found


DIFFERENTIABLE = (
    ops.linear, ops.gated_linear, ops.conv, ops.rms_norm, ops.layer_norm, ops.rotary, ops.attention, ops.experts, ops.expert_linear, ops.softmax,
    ops.take, ops.gather, ops.scatter, ops.expand, ops.sum_, ops.prod, ops.scan, ops.slice_, ops.concat, ops.pad, ops.windows,
)  # fmt: skip


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: str(op.name))
def test_gradients_are_differences(op: Op) -> None:
    checked = 0
    for operands, attributes in sampled(op):
        inputs = tuple(o for o in operands if o is not None and o.requires_grad)

        def function(*given: torch.Tensor, operands: Any = operands, attributes: Any = attributes) -> Any:
            rest = iter(given)
            return MEANINGS[op](
                *(next(rest) if o is not None and o.requires_grad else o for o in operands), **attributes
            )

        if inputs:
            assert torch.autograd.gradcheck(function, inputs)
            checked += 1
    assert checked


def test_a_query_without_keys_has_zero_and_finite_gradients() -> None:
    q = torch.randn(1, 2, 2, 4, requires_grad=True)
    for sinks, softcap in ((None, 0.0), (None, 5.0), (torch.zeros(2), 0.0)):
        bias = torch.tensor([[False, False], [True, True]])[None, None]
        out = MEANINGS[ops.attention](q, q, q, bias, sinks, scale=1.0, causal=False, window=0, softcap=softcap)
        assert (out[:, 0] == 0).all()
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.isfinite().all() and gradient.any()


def test_gradients_pass_rounding_but_not_clipping() -> None:
    x = torch.tensor([[0.3, -0.76, 2.0, -9.0]], requires_grad=True)
    out = MEANINGS[ops.fake_quantize](x, torch.tensor(0.5), scheme="int4", group=0)
    assert out.tolist() == [[0.5, -1.0, 2.0, -4.0]]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [[1, 1, 1, 0]]


def test_a_symbol_is_bound_at_each_call() -> None:
    graph = jisu.to_torch(make("llama_tied")).graph
    module = to_torch(graph)
    for length in (1, 5):
        positions = torch.arange(length).expand(2, length)
        assert module(ids(2, length), positions)[0].shape == (2, length, VOCABULARY)


# --- Weights -------------------------------------------------------------------------------------------------------------


def coded(kind: Scheme, symmetric: bool = True) -> Graph:
    """A linear layer of codes in groups of 8 (a whole row where the scheme is per row), and its norm's gain."""
    rng = np.random.default_rng(0)
    w = weight("layer.weight", TensorType((6, 20), "float32"))
    x = placeholder("x", TensorType((3, 20), "float32"))
    graph = Graph((x,), (ops.linear(x, w),), {"layer.weight": ArrayStorage(rng.standard_normal((6, 20), np.float32))})
    rule = QuantizeRecipe(scheme=kind.name, group=4 if kind.group else 0, symmetric=symmetric, algorithm="rtn")
    return Compress((), (rule,))(graph)


def same_weights(a: Graph, b: Graph) -> bool:
    arrays = [{k: v.numpy() for k, v in g.weights.items()} for g in (a, b)]
    return arrays[0].keys() == arrays[1].keys() and all(
        v.dtype == arrays[1][k].dtype and v.tobytes() == arrays[1][k].tobytes() for k, v in arrays[0].items()
    )


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=lambda s: str(s.name))
def test_scales_are_trained_and_stored_as_before(kind: Scheme) -> None:
    graph = coded(kind)
    module = to_torch(graph)
    assert [(n, p.dtype) for n, p in module.named_parameters()] == [("layer.scales", torch.float32)]
    assert same_weights(from_torch(graph, module), graph)
    x = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    (out,) = module(tensor(x))
    np.testing.assert_allclose(out.detach().numpy(), interpret(graph, [x])[0], rtol=1e-5, atol=1e-5)
    (scales,) = module.parameters()
    (slope,) = torch.autograd.grad(out.square().sum(), scales)
    step = torch.zeros_like(scales)
    step[2, 0] = 1e-2 * float(scales[2, 0].detach())
    sides = []
    for sign in (1, -1):
        other = copy.deepcopy(module)
        with torch.no_grad():
            next(other.parameters()).add_(sign * step)
        sides.append(float(other(tensor(x))[0].square().sum().detach()))
    assert (sides[0] - sides[1]) / 2 == pytest.approx(float((slope * step).sum()), rel=2e-2)
    with torch.no_grad():
        scales.mul_(2)  # a power of two, which all forms hold, unless it leaves the range
    trained = from_torch(graph, module)
    assert trained.weights["layer.codes"] is graph.weights["layer.codes"]
    assert str(trained) == str(graph)
    if kind.scale != "e4m3":  # the largest is at the end of the range already
        np.testing.assert_allclose(
            interpret(trained, [x])[0], module(tensor(x))[0].detach().numpy(), rtol=1e-3, atol=1e-3
        )
    assert np.isfinite(interpret(trained, [x])[0]).all()


def test_scales_that_training_turned_around_stay_in_their_form() -> None:
    graph = coded(SCHEMES["mxfp4"])
    module = to_torch(graph)
    with torch.no_grad():
        next(module.parameters()).neg_()
    assert (from_torch(graph, module).weights["layer.scales"].numpy() == 1).all()  # the smallest normal number


def test_codes_share_memory_and_parameters_do_not() -> None:
    graph = coded(SCHEMES["int4"])
    module = to_torch(graph)
    buffers = dict(module.named_buffers())
    assert np.shares_memory(buffers["layer.codes"].numpy(), graph.weights["layer.codes"].numpy())
    model = make("llama_tied")
    student, before = jisu.to_torch(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Named(nn.Module):
    """Modules and parameters whose names a module of ours uses itself, and buffers that aren't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.run = nn.Linear(4, 4)
        self.source = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.signature = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.source(self.run(x) * self.signature + self.shift)}


def test_plain_modules_keep_names_buffers_and_results() -> None:
    model = Named().eval()
    x = torch.randn(3, 4)
    module = jisu.to_torch(model, example_inputs=(x,))
    assert set(dict(module.named_parameters())) == set(dict(model.named_parameters()))
    assert set(dict(module.named_buffers())) <= set(dict(model.named_buffers()))
    assert set(module.state_dict()) <= set(model.state_dict())
    torch.testing.assert_close(module(x)["y"], model(x)["y"])
    program = jisu.compile(module)
    torch.testing.assert_close(program(x)["y"], model(x)["y"].detach())
    again = jisu.to_torch(module)
    assert set(dict(again.named_parameters())) == set(dict(model.named_parameters()))


def test_files_stay_as_they_are_and_bfloat16_comes_back(tmp_path: Path) -> None:
    make("llama_tied", torch.bfloat16).save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").read_bytes()
    module = jisu.to_torch(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    graph = module.graph
    assert {s.dtype.name for n, s in graph.weights.items() if "inv_freq" not in n} == {"bfloat16"}
    assert same_weights(graph, jisu.to_torch(tmp_path).graph)
    narrow = jisu.to_torch(tmp_path)(ids()).logits
    assert narrow.dtype == torch.bfloat16
    wide = module(ids()).logits
    inputs = [ids().numpy(), np.broadcast_to(np.arange(17), (2, 17))]
    np.testing.assert_allclose(wide.detach().numpy(), interpret(graph, inputs, float64=True)[0], atol=1e-4, rtol=1e-4)
    assert (narrow.float() - wide).abs().max() < 0.2
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    doubled = module.graph.weights["model.norm.weight"].numpy()
    np.testing.assert_array_equal(
        doubled.astype(np.float32), 2 * graph.weights["model.norm.weight"].numpy().astype(np.float32)
    )
    assert (tmp_path / "model.safetensors").read_bytes() == stored


def test_values_that_do_not_fit_are_named() -> None:
    graph = coded(SCHEMES["int4"])
    module = to_torch(graph)
    with torch.no_grad():
        next(module.parameters())[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layer\.scales.*NaN"):
        from_torch(graph, module)
    with torch.no_grad():
        next(module.parameters())[0, 0] = 1e6
    with pytest.raises(InputError, match=r"layer\.scales.*float16"):
        from_torch(graph, module)
    with pytest.raises(InputError, match=r"layer\.\w+' is not in the module"):
        from_torch(graph, nn.Linear(2, 2))
    other = nn.Module()
    other.layer = nn.Module()
    other.layer.register_buffer("codes", torch.zeros(2, 2, dtype=torch.uint8))
    other.layer.register_buffer("scales", torch.zeros(2, 2))
    with pytest.raises(InputError, match=r"stores \[6, \d+\], the module has \[2, 2\]"):
        from_torch(graph, other)
    with pytest.raises(InputError, match="float32 or float64"):
        to_torch(graph, dtype=torch.float16)
    with pytest.raises(InputTypeError, match=r"input 'x': expected a tensor float32\[3, 20\], got float64"):
        module(torch.zeros(3, 20, dtype=torch.float64))
    with pytest.raises(InputError, match="expected float32"):
        module(torch.zeros(4, 20))


# --- Models --------------------------------------------------------------------------------------------------------------

TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "phi3", "mistral", "qwen3_moe", "gemma3", "deepseek_v3"])
def test_models_and_their_gradients(name: str) -> None:
    model = make(name)
    module = jisu.to_torch(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    assert dict(module.named_parameters()).keys() <= names.keys()
    assert {id(names[n]) for n, _ in module.named_parameters()} == {id(p) for p in model.parameters()}
    want, got = model(ids()).logits, module(ids()).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * direction).sum().backward()
    (got * direction).sum().backward()
    for n, parameter in module.named_parameters():
        want = names[n].grad
        assert parameter.grad is not None and want is not None and want.any(), n
        torch.testing.assert_close(parameter.grad, want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama_tied", INT4), ("gemma3", None), ("phi3", INT4), ("qwen3_moe", "int8")]
)
def test_what_was_not_trained_compiles_to_the_same_bytes(name: str, recipe: Any) -> None:
    model = make(name)
    module = jisu.to_torch(model, recipe=recipe)
    direct, back = jisu.compile(model, recipe=recipe), jisu.compile(module)
    assert direct._parts.weights.keys() == back._parts.weights.keys()
    assert all(v.tobytes() == back._parts.weights[k].tobytes() for k, v in direct._parts.weights.items())
    assert direct._parts.graphs == back._parts.graphs and direct.recipe == back.recipe
    torch.testing.assert_close(module(ids()).logits.detach(), back(ids()).logits, atol=1e-4, rtol=1e-4)


def divergence(student: Any, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean KL of the student's predictions to the teacher's, in nats per token."""
    logits = student(tokens).logits.log_softmax(-1)
    return (teacher.exp() * (teacher - logits)).sum(-1).mean()


def test_distillation_moves_scales_and_keeps_codes() -> None:
    model = make("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(0.5)  # predictions that aren't all certain
    tokens, held_out = ids(8, 24, seed=1), ids(8, 24, seed=2)
    teacher = {id(t): model(t).logits.detach().log_softmax(-1) for t in (tokens, held_out)}
    recipe = {"quantize": [{"scheme": "int3", "group": 16, "symmetric": False}]}
    student = jisu.to_torch(model, recipe=recipe)
    before = float(divergence(student, teacher[id(held_out)], held_out).detach())
    codes = {n: b.clone() for n, b in student.named_buffers()}
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        divergence(student, teacher[id(tokens)], tokens).backward()
        optimizer.step()
    after = float(divergence(student, teacher[id(held_out)], held_out).detach())
    assert after < 0.8 * before
    assert all(torch.equal(b, codes[n]) for n, b in student.named_buffers())
    program = jisu.compile(student)
    assert float(divergence(program, teacher[id(held_out)], held_out)) == pytest.approx(after, rel=0.02)


def test_a_recipe_of_its_own_compresses_what_came_back() -> None:
    """After training a dense student, a recipe that is named runs on its values."""
    model = make("llama_tied")
    module = jisu.to_torch(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.125)
    program = jisu.compile(module, recipe=INT4)
    assert "quantized_linear" in program.ir() and 'scheme = "int4"' in program.recipe
    assert (program(ids()).logits - module(ids()).logits).abs().mean() < 2
    with pytest.raises(InputError, match="calibration is given"):
        jisu.compile(module, calibration=ids().numpy())
    with pytest.raises(InputError, match="not traced again"):
        jisu.compile(module, example_inputs=(ids(),))


def test_calls_of_a_language_model() -> None:
    model = make("llama_tied")
    module = jisu.to_torch(model)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0
    want = model(ids(), attention_mask=mask).logits
    got = module(input_ids=ids(), attention_mask=mask, use_cache=False)
    assert type(got) is type(model(ids()))
    torch.testing.assert_close(got.logits[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)
    positions = torch.arange(3, 20).expand(2, 17)
    torch.testing.assert_close(
        module(ids(), position_ids=positions).logits, model(ids(), position_ids=positions).logits, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match="padding on the right only"):
        module(ids(), attention_mask=mask.flip(1))
    with pytest.raises(InputError, match="labels"):
        module(ids(), labels=ids())
    with pytest.raises(InputError, match="input_ids"):
        module()


def test_copies_and_states_are_those_of_any_module() -> None:
    module = jisu.to_torch(make("llama_tied"), recipe=INT4)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(module(ids()).logits, other(ids()).logits)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(ids()).logits, other(ids()).logits)
