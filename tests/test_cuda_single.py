"""Linear layers and attention in float32 for NVIDIA GPUs, on an emulated one; and the PTX that they become."""

# ruff: noqa: F401, F811 (fixtures)
from __future__ import annotations

import re
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import GPU, RACES, REAL, Launch, attended, drawn, emulator, launch

import jisu
from jisu.compiler.errors import TargetError
from jisu.targets.cuda import device, ptx
from jisu.targets.cuda.kernels import attention, single, single_attention
from jisu.targets.cuda.kernels.attention import Form
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.target import Target


def kernels(layer: Layer) -> list[tuple[device.DeviceKernel, int, int]]:
    """All kernels of a layer, each with the rows of x and of W of a block."""
    few = [(single.thin_single(layer, rows, GPU), rows, single.OUTPUTS) for rows in single.ROWS]
    tiles = (single.SMALL, single.LARGE)
    return [*few, *((single.product_single(layer, tile, GPU), tile.rows, tile.outputs) for tile in tiles)]


def multiplied(launch: Launch, m: int, n: int, k: int, numbers: tuple[int, ...] = (0, 1, 2, 3), **how: Any) -> None:
    """Run a plain layer by its kernels of these numbers; nothing is written beyond its results, which are those of sums in float32."""
    layer = Layer(k, (n,), "float32")
    x, w, y = (drawn(i, *shape, dtype="float32") for i, shape in enumerate(((m, k), (n, k), (m + 1, n))))
    want = x.astype(np.float64) @ w.astype(np.float64).T
    for number in numbers:
        kernel, rows, outputs = kernels(layer)[number]
        y[...] = 7
        parts, tiles = -(-m // rows), layer.tiles(outputs)
        launch(kernel, (tiles, parts) if number < 2 else (parts, tiles), x, w, y, m, **how)
        np.testing.assert_allclose(y[:m], want, rtol=1e-5, atol=1e-6 * np.sqrt(k), err_msg=kernel.name)
        assert (y[-1] == 7).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 1028), (3, 5, 4), (9, 33, 2064), (130, 140, 44)])
@RACES
def test_layers(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    multiplied(launch, m, n, k, late=late, order=order)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_is_missing_shows(missing: str, number: int, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        multiplied(launch, 8, 128, 4096 if number == 1 else 256, (number,), order=-1)


def test_layers_that_do_not_fit_are_refused() -> None:
    for layer in (Layer(6, (8,), "float32"), Layer(64, (8,)), Layer(64, (8,), "float32", scheme="int8")):
        with pytest.raises(TargetError, match="chunks of 4"):
            single.thin_single(layer, 4, GPU)


def test_a_model(emulated_gpu: Target) -> None:
    """Every layer has these kernels; logits are the model's, within float32's rounding, for few rows and many."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    program = jisu.compile(model, target=emulated_gpu)
    layers = [k for k in program.explain()["kernels"] if "linear" in k["op"] or "projections" in k["op"]]
    (attends,) = (k for k in program.explain()["kernels"] if k["op"] == "attention_cached")
    assert attends["choices"] == ["attend_token where sequence <= 1", "attend_single"]
    assert layers and all({"thin4", "thin8"} <= {c.partition("_")[0] for c in k["choices"]} for k in layers), layers
    session = program.session()
    ids = torch.randint(0, 96, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
    parts = [np.asarray(session.append(part.numpy())) for part in ids.split([140, 1, 7, 2], 1)]
    assert np.abs(np.concatenate(parts, 1) - want.numpy()).max() <= 2e-5 * want.abs().max()


@st.composite
def forms(draw: st.DrawFn, cached: bool) -> tuple[Form, int, int]:
    """Attention of any kind, the keys before, and the new tokens."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 8]))
    layout = draw(st.sampled_from(["contiguous", "ring", "paged", *([] if cached else ["plain"])]))
    head_dim = draw(st.sampled_from([32, 48, 64, 80, 96, 128, 144, 256]))
    scheme = draw(st.sampled_from(["none", "none", "int8", "int4", "fp8"])) if layout != "plain" else "none"
    window = draw(st.sampled_from([7, 30, 70])) if layout == "ring" or draw(st.booleans()) else 0
    form = Form(
        kv_heads * group, kv_heads, head_dim, head_dim**-0.5, layout, 16 if layout == "paged" else 0,
        layout != "plain" or draw(st.booleans()), window, draw(st.sampled_from([0.0, 5.0])), draw(st.booleans()), "float32", scheme,
    )  # fmt: skip
    form = attrs.evolve(form, window=form.window if form.causal else 0)
    return form, draw(st.integers(0, 90)), 1 if cached else draw(st.sampled_from([1, 5, 33, 64, 70]))


@settings(max_examples=12, deadline=None)
@given(forms(cached=True), st.integers(1, 4), st.sampled_from([1, -1]))
def test_attention_of_a_token(launch: Launch, case: tuple[Form, int, int], parts: int, order: int) -> None:
    attended(case[0], launch, case[1], 1, parts, order=order)


@settings(max_examples=12, deadline=None)
@given(forms(cached=False), st.booleans(), st.sampled_from([1, -1]))
def test_attention_of_many_tokens(launch: Launch, case: tuple[Form, int, int], late: bool, order: int) -> None:
    attended(*(case[0], launch, *case[1:]), late=late, order=order)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
def test_what_attention_lacks_shows(missing: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        attended(Form(1, 1, 64, 0.1, dtype="float32"), launch, 70, 64, order=-1)


def test_attention_that_tensor_cores_would_round_is_refused() -> None:
    with pytest.raises(TargetError, match="tensor cores would round float32"):
        attention.attend_tokens(Form(1, 1, 64, 0.1, dtype="float32"), GPU)
    with pytest.raises(TargetError, match="in float32, not in bfloat16"):
        single_attention.attend_single(Form(1, 1, 64, 0.1), GPU)


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_of_attention(mcpu: str) -> None:
    """Fused multiply-adds of what lies in shared memory, and no tensor core; two blocks and more share a multiprocessor."""
    target = attrs.evolve(REAL, mcpu=mcpu)
    plain = Form(32, 8, 128, 0.1, dtype="float32")
    forms = {str(how): attrs.evolve(plain, **how) for how in (  # type: ignore[arg-type]
        {}, {"layout": "paged", "page": 16, "scheme": "int8"}, {"head_dim": 256, "window": 100}, {"head_dim": 80, "softcap": 3.0},
        {"layout": "plain", "causal": False, "sinks": True}, {"scheme": "fp8"},
    )}  # fmt: skip
    made = {f"many {how}": single_attention.attend_single(form, target) for how, form in forms.items()}
    made |= {f"one {how}": attention.attend_token(form, target) for how, form in forms.items() if form.cached}
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    for kind, body in bodies.items():
        assert "mma" not in body and "ex2.approx.ftz" in body and "shfl.sync.bfly" in body, kind
        if kind.startswith("many"):
            assert "ld.shared.v4" in body and "cp.async.cg.shared.global" in body and body.count("fma.rn.f32") >= 64, (
                kind
            )
        elif "scheme" not in kind:
            assert re.search(r"ld\.global(\.nc)?\.v4", body), kind
    assert not re.search(r"\.local\b|call\.uni", text)
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, target)
    assert usage and all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    found = {name: usage[ptx.entry_name(k)].registers for name, k in made.items()}
    assert all(count <= 128 for name, count in found.items() if "256" not in name), found
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_has_the_instructions(mcpu: str) -> None:
    """One fused multiply-add per product, 16 bytes at a time, and no tensor core."""
    target = attrs.evolve(REAL, mcpu=mcpu)
    made = {}
    for how in ({}, {"gated": True, "apart": True, "activation": "silu"}, {"bias": True, "residual": True}):
        layer = Layer(4096, (4096,), "float32", **how)  # type: ignore[arg-type]
        for rows in single.ROWS:
            made[f"few{rows} {how}"] = single.thin_single(layer, rows, target)
        for tile in (single.LARGE, single.SMALL):
            made[f"many{tile.rows} {how}"] = single.product_single(layer, tile, target)
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    for kind, body in bodies.items():
        assert "mma" not in body and "cp.async.cg.shared.global" in body and "ld.shared.v4" in body, kind
        rows = int(re.findall(r"\d+", kind)[0])
        products = rows * single.OUTPUTS * 4 if kind.startswith("few") else (rows // 16) ** 2 * 16
        assert body.count("fma.rn.f32") >= products and ("silu" in kind or "mul.rn.f32" not in body), kind
    assert not re.search(r"\.local\b|call\.uni", text)
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, target)
    assert usage and all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    found = {name: usage[ptx.entry_name(k)].registers for name, k in made.items()}
    assert all(count <= 128 for name, count in found.items() if name.startswith(("few4", "many64"))), found
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have
