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
from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cuda import device, ptx
from jisu.targets.cuda.kernels import attention, experts, single, single_attention
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


@st.composite
def coded(draw: st.DrawFn) -> tuple[Layer, int]:
    """A layer of codes of any kind, and rows of x."""
    scheme = SCHEMES[draw(st.sampled_from(sorted(SCHEMES)))]
    chunk, word = 16 * scheme.per_byte, 4 * scheme.per_byte
    group = draw(st.sampled_from([0, word, chunk // 2, chunk, 2 * chunk, 4 * chunk]))
    k = draw(st.sampled_from([1, 3, 64, 70])) * max(chunk, group)
    gated = draw(st.booleans())
    layer = Layer(
        k, (draw(st.sampled_from([1, 5, 37, 70])),), "float32", gated, False, draw(st.sampled_from(["none", "silu"])),
        not gated and draw(st.booleans()), not gated and draw(st.booleans()), scheme.name, group,
        draw(st.sampled_from(["float16", "float32"])), scheme.uniform and draw(st.booleans()),
    )  # fmt: skip
    return layer, draw(st.sampled_from([1, 3, 8, 9, 70]))


def codes_of(layer: Layer) -> list[np.ndarray]:
    """Codes, scales and zeros as `quantized_linear` takes them, an output per panel, which is as kernels read them."""
    rng, (n,), kind = np.random.default_rng(layer.k), layer.outputs, SCHEMES[layer.scheme]
    parts = (n, 2) if layer.gated else (n,)
    codes = rng.integers(0, 2**kind.bits, (*parts, layer.k)).astype(np.uint8)
    codes &= np.where(codes & 127 == 127, 254, 255).astype(np.uint8) if layer.scheme == "fp8" else 255  # no NaN
    held = drawn(3, *parts, layer.row_bytes // 4, 1, 1, dtype="float32").view(np.uint8).reshape(*parts, -1, 1, 1)
    held[..., 0, 0] = codes[..., ::2] | codes[..., 1::2] << 4 if kind.per_byte == 2 else codes
    scales = (rng.random((*parts, layer.groups, 1)) / kind.top).astype(layer.scales)
    zeros = rng.integers(0, 2**kind.bits, scales.shape).astype(np.uint8)
    return [held, scales, *([zeros] if layer.zeros else [])]


def multiplied_codes(launch: Launch, layer: Layer, x: np.ndarray, numbers: tuple[int, ...], **how: Any) -> None:
    """Run a layer of codes by its kernels of these numbers: sums of products by what the op's meaning makes of the codes, in float64; exactly those if x
    picks single weights."""
    m, (n,) = x.shape[0], layer.outputs
    bias, residual, y = (drawn(i, *shape, dtype="float32") for i, shape in enumerate(((n,), (m, n), (m + 1, n)), 4))
    matrix = codes_of(layer)
    more = [*([bias] if layer.bias else []), *([residual] if layer.residual else [])]
    operands = [
        *matrix,
        *([] if layer.zeros else [None]),
        *(a if there else None for a, there in ((bias, layer.bias), (residual, layer.residual))),
    ]
    assert ops.quantized_linear.meaning is not None
    want = ops.quantized_linear.meaning(
        x.astype(np.float64), *operands, outputs=n, scheme=layer.scheme, group=layer.group, gated=layer.gated, activation=layer.activation
    )  # fmt: skip
    picks = (np.count_nonzero(x, axis=1) == 1).all()
    for number in numbers:
        kernel, rows, outputs = kernels(layer)[number]
        y[...] = 7
        parts, tiles = -(-m // rows), layer.tiles(outputs)
        launch(kernel, (tiles, parts) if number < 2 else (parts, tiles), x, *matrix, *more, y, m, **how)
        bound = 0.0 if picks else 2e-6 * np.sqrt(layer.k) * (1 + np.abs(want).max())
        np.testing.assert_allclose(y[:m], want, rtol=0 if picks else 1e-5, atol=bound, err_msg=kernel.name)
        assert (y[-1] == 7).all()


@settings(max_examples=15, deadline=None)
@given(coded(), st.integers(0, 3), st.booleans(), st.sampled_from([1, -1]))
def test_layers_of_codes(launch: Launch, case: tuple[Layer, int], number: int, late: bool, order: int) -> None:
    layer, m = case
    multiplied_codes(launch, layer, drawn(0, m, layer.k, dtype="float32"), (number,), late=late, order=order)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("scales", ["float16", "float32"])
def test_codes_become_float32(scheme: str, scales: str, launch: Launch) -> None:
    """To the bit what their meaning says: nothing is rounded to 16 bits."""
    layer = Layer(64, (70,), "float32", scheme=scheme, group=16, scales=scales, zeros=SCHEMES[scheme].uniform)
    x = drawn(0, 64, 64, dtype="float32")
    x[...] = np.eye(64)
    multiplied_codes(launch, layer, x, (0, 1, 2, 3))


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_is_missing_with_codes_shows(
    missing: str, number: int, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    layer = Layer(8192 if number == 1 else 256, (128,), "float32", scheme="int4", group=32)
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        multiplied_codes(launch, layer, drawn(0, 8, layer.k, dtype="float32"), (number,), order=-1)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_is_missing_shows(missing: str, number: int, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        multiplied(launch, 8, 128, 4096 if number == 1 else 256, (number,), order=-1)


def test_layers_that_do_not_fit_are_refused() -> None:
    codes = {"scheme": "int4", "group": 12}
    for layer, why in (
        (Layer(6, (8,), "float32"), "chunks of 4"),
        (Layer(48, (8,), "float32", **codes), "chunks of 32"),  # type: ignore[arg-type]
        (Layer(96, (8,), "float32", **codes), "chunks of 32"),  # type: ignore[arg-type]
        (Layer(64, (8,)), "not a layer in float32"),
        (Layer(64, (8,), "float32", halves=True), "of halves"),
    ):
        for build in (
            lambda one: single.thin_single(one, 4, GPU),
            lambda one: single.product_single(one, single.SMALL, GPU),
        ):
            with pytest.raises(TargetError, match=why):
                build(layer)


@pytest.mark.parametrize("recipe", [pytest.param(None, marks=pytest.mark.slow), "w4a16"])
def test_a_model(recipe: str | None, emulated_gpu: Target) -> None:
    """Every layer has these kernels; logits are the model's, within float32's rounding, for few rows and many: of codes those of the same on a CPU."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128 if recipe else 100, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    program, on_cpu = (jisu.compile(model, target=target, recipe=recipe) for target in (emulated_gpu, "cpu"))
    layers = [k for k in program.explain()["kernels"] if "linear" in k["op"] or "projections" in k["op"]]
    (attends,) = (k for k in program.explain()["kernels"] if k["op"] == "attention_cached")
    assert attends["choices"] == ["attend_token where sequence <= 1", "attend_single"]
    assert {"quantized" in k["op"] for k in layers} == {recipe is not None}
    assert layers and all({"thin4", "thin8"} <= {c.partition("_")[0] for c in k["choices"]} for k in layers), layers
    session = program.session()
    ids = torch.randint(0, 96, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = on_cpu(ids).logits if recipe else model(ids).logits
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
    found = registers(made, text, target)
    assert all(count <= 128 for name, count in found.items() if "256" not in name), found
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have


def registers(made: dict[str, device.DeviceKernel], text: str, target: Target) -> dict[str, int]:
    """Per thread, by ptxas, of kernels whose PTX has nothing in local memory and spills nothing; skips the test where there is no ptxas."""
    assert not re.search(r"\.local\b|call\.uni", text)
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, target)
    assert usage and all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    return {name: usage[ptx.entry_name(k)].registers for name, k in made.items()}


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
    found = registers(made, text, target)
    assert all(count <= 128 for name, count in found.items() if name.startswith(("few4", "many64"))), found
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_of_codes(mcpu: str) -> None:
    """16 bytes of codes at a time for few rows; for many a weight is decoded once in a block, not by each thread that multiplies it."""
    target = attrs.evolve(REAL, mcpu=mcpu)
    hows: tuple[dict[str, Any], ...] = (
        {"scheme": "int4", "group": 128, "zeros": True}, {"scheme": "int8"}, {"scheme": "fp8"}, {"scheme": "nf4", "group": 64},
        {"scheme": "nvfp4", "group": 16, "scales": "float32"}, {"scheme": "mxfp4", "group": 32, "gated": True, "activation": "silu"},
    )  # fmt: skip
    made: dict[str, device.DeviceKernel] = {}
    for how in hows:
        layer = Layer(4096, (4096,), "float32", **how)
        made |= {f"few{rows} {how}": single.thin_single(layer, rows, target) for rows in single.ROWS}
        made |= {
            f"many{tile.rows} {how}": single.product_single(layer, tile, target)
            for tile in (single.LARGE, single.SMALL)
        }
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    for kind, body in bodies.items():
        assert "mma" not in body and "ftz" not in body.replace("ex2.approx.ftz", ""), kind
        assert "cp.async.cg.shared.global" in body and "ld.shared.v4" in body, kind
        if kind.startswith("many"):
            rows = int(re.findall(r"\d+", kind)[0])
            decoded = rows * 16 // 256  # weights of a step that a thread decodes
            assert "st.shared.v4" in body and body.count("fma.rn.f32") >= 4 * (rows // 16) ** 2 * 4, kind
            assert body.count("mul.rn.f32") <= 2 * 2 * decoded + 3 * body.count("div.rn.f32"), kind
    found = registers(made, text, target)
    most = {"few4": 168, "many64": 128}
    assert all(count <= most.get(name.partition(" ")[0], 255) for name, count in found.items()), found
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_of_experts(mcpu: str) -> None:
    """The same products as those of layers of one matrix."""
    target = attrs.evolve(REAL, mcpu=mcpu)
    how = experts.Mixture(8, 2, 4096, 14336, "float32", "silu")
    made: dict[str, device.DeviceKernel] = {"sums": experts.summed(how, target)}
    for down in (False, True):
        made[f"one {down}"] = experts.single(how.choice(down), target)
        made |= {
            f"{rows} {down}": experts.of_groups(how.choice(down), rows, target)
            for rows in (*single.ROWS, single.LARGE.rows)
        }
    text = ptx.to_ptx(list(made.values()), target)
    for kind, kernel in made.items():
        body = text.partition(f".entry {ptx.entry_name(kernel)}(")[2].partition("\n}")[0]
        assert "mma" not in body and re.search(r"ld\.global(\.nc)?\.v4|cp\.async\.cg", body), kind
        assert kind == "sums" or "cp.async.cg.shared.global" in body and "ld.shared.v4" in body, kind
    assert registers(made, text, target)
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have
