"""Checkpoints quantised by others. Each format's packing is written here once more, by itself, from the format's definition."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.storage import LazyTensor
from jisu.compiler.types import TensorType
from jisu.frontends.checkpoint import load_checkpoint
from jisu.frontends.ready_made import PREFIX, Matrix, Place, as_codes, find_format, tables
from jisu.passes import layout_passes
from jisu.passes.layout import Derived, FoldWeights
from jisu.targets import cuda
from jisu.targets.target import Target

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20))
Tensors = dict[str, np.ndarray]
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


# --- The formats, from their definitions ---------------------------------------------------------------------------------


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [rows, ceil(count * bits / 32)] of codes [rows, count]: code i has the bits from i * bits on of its row."""
    rows, count = codes.shape
    packed = np.zeros((rows, -(-count * bits // 32)), np.uint64)
    for i in range(count):
        for b in range(bits):
            word, at = divmod(i * bits + b, 32)
            packed[:, word] |= ((codes[:, i].astype(np.uint64) >> np.uint64(b)) & np.uint64(1)) << np.uint64(at)
    return packed.astype(np.uint32).view(np.int32)


def interleaved(codes: np.ndarray) -> np.ndarray:
    """AWQ: eight codes of a row to a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(packed.shape[1]):
        for i, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed[:, column] |= codes[:, 8 * column + which].astype(np.uint32) << np.uint32(4 * i)
    return packed.view(np.int32)


@attrs.frozen
class Grid:
    """Codes [n, k] with scales and zeros [n, groups] of some weights, and to which group each input belongs."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray
    bits: int

    @property
    def values(self) -> np.ndarray:
        scale, zero = (v[:, self.group_of].astype(np.float32) for v in (self.scales, self.zeros))
        return np.asarray((self.codes - zero) * scale, np.float32)


def rounded(w: np.ndarray, bits: int, group: int, symmetric: bool = True, shuffle: bool = False, seed: int = 0) -> Grid:
    """Weights on a uniform grid, groups of which are consecutive inputs or, shuffled, any."""
    n, k = w.shape
    group = k if group == -1 else group
    group_of = np.arange(k) // group
    if shuffle:
        np.random.default_rng(seed).shuffle(group_of)
    scales, zeros = np.zeros((n, k // group), np.float16), np.zeros((n, k // group), np.int64)
    for g in range(k // group):
        part, top = w[:, group_of == g], 2**bits - 1
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        reach = np.abs(part).max(1)
        scales[:, g] = (2 * reach if symmetric else high - low) / top + 1e-4
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.rint(-low / scales[:, g].astype(np.float32))
    # AutoGPTQ can't hold a zero of 0.
    zeros = np.clip(zeros, 1, 2**bits - 1)
    codes = np.rint(w / scales[:, group_of].astype(np.float32)) + zeros[:, group_of]
    return Grid(np.clip(codes, 0, 2**bits - 1).astype(np.int64), scales, zeros, group_of, bits)


def gptq(grid: Grid, v2: bool = False) -> Tensors:
    return {
        "qweight": words(grid.codes, grid.bits).T.copy(),
        "qzeros": words(grid.zeros.T - (0 if v2 else 1), grid.bits),
        "scales": grid.scales.T.copy(),
        "g_idx": grid.group_of.astype(np.int32),
    }


def awq(grid: Grid) -> Tensors:
    return {
        "qweight": interleaved(grid.codes.T),
        "qzeros": interleaved(grid.zeros.T),
        "scales": grid.scales.T.copy(),
    }


def packed(grid: Grid, symmetric: bool, loose: bool = False) -> Tensors:
    """compressed-tensors' "pack-quantized"; loose: as before it packed across words."""

    def pack(codes: np.ndarray) -> np.ndarray:
        per = 32 // grid.bits
        if not loose:
            return words(codes, grid.bits)
        parts = [words(codes[:, i : i + per], grid.bits) for i in range(0, codes.shape[1], per)]
        return np.concatenate(parts, 1)

    found = {
        "weight_packed": pack(grid.codes),
        "weight_scale": grid.scales.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(grid.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack(grid.zeros.T).T.copy()
    if (np.diff(grid.group_of) < 0).any():
        found["weight_g_idx"] = grid.group_of.astype(np.int32)
    return found


def eights(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes of e4m3 [n, k], scales float32 per block, values)."""
    n, k = w.shape
    shape = (-(-n // block[0]), -(-k // block[1]))
    scales = np.zeros(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            part = w[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(part).max() / 448
    each = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:n, :k]
    codes = (w / each).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales, codes.astype(np.float32) * each


def kept_two_of_four(w: np.ndarray) -> np.ndarray:
    """bool [n, k]: the two largest of each four."""
    place = np.argsort(-np.abs(w.reshape(-1, 4)), 1, kind="stable")[:, :2]
    keep = np.zeros((w.size // 4, 4), bool)
    np.put_along_axis(keep, place, True, 1)
    return keep.reshape(w.shape)


def sparse(numbers: np.ndarray, keep: np.ndarray, halves: bool) -> Tensors:
    """compressed-tensors' "sparse-24-bitmask" (halves), or "sparse-bitmask", whose names go on behind the parameter's."""
    bits = np.zeros((len(keep), -(-keep.shape[1] // 8)), np.uint8)
    for i, j in np.argwhere(keep):
        bits[i, j // 8] |= 1 << j % 8
    if halves:
        return {
            "compressed": numbers[keep].reshape(len(keep), -1),
            "bitmask": bits,
            "shape": np.array(keep.shape)[:, None],
        }
    starts = np.cumsum(keep.sum(1)) - keep.sum(1)
    found = {"compressed": numbers[keep], "bitmask": bits, "shape": np.array(keep.shape), "row_offsets": starts}
    return {f"weight.{last}": a for last, a in found.items()}


# --- Codes come over bit for bit -----------------------------------------------------------------------------------------


def tensors(module: str, parts: Tensors) -> dict[str, LazyTensor]:
    return {
        f"{module}.{last}": LazyTensor(f"{module}.{last}", a.dtype, a.shape, np.frombuffer(a.tobytes(), np.uint8))
        for last, a in parts.items()
    }


def read(fields: dict[str, Any], parts: Tensors, n: int, k: int) -> np.ndarray:
    """The matrix that the frontend makes of a module's tensors, with the model's order of columns."""
    format, stored = find_format(fields), tensors("m", parts)
    plain, coded = format.split(stored)
    assert not plain and list(coded) == ["m.weight"]
    matrix = format.read(coded["m.weight"], Place(("m",), "Linear", n, k, "float32"))
    assert matrix.value.op in (ops.dequantize, ops.expand)
    held = {PREFIX + name: as_codes(t) for name, t in stored.items()} | tables()
    values = Derived(matrix.value, held).numpy()
    return values if matrix.order is None else restored(matrix, held, values)


def restored(matrix: Matrix, held: Any, values: np.ndarray) -> np.ndarray:
    assert matrix.order is not None
    back = np.empty_like(values)
    back[:, Derived(matrix.order, held).numpy()] = values
    return back


def compressed(layout: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, **more}


@st.composite
def grids(draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4, 8), shuffle: bool = True) -> tuple[Grid, bool, int]:
    """(grid, symmetric, group as configurations have it)."""
    n, k = 8 * draw(st.integers(1, 4)), 32 * draw(st.integers(1, 3))
    group = draw(st.sampled_from([-1, 8, 16, 32]))
    symmetric, shuffled = draw(st.booleans()), shuffle and draw(st.booleans())
    w = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((n, k)).astype(np.float32)
    return rounded(w, draw(st.sampled_from(bits)), group, symmetric, shuffled), symmetric, group


@settings(max_examples=60, deadline=None)
@given(drawn=grids(), v2=st.booleans())
def test_gptq_bit_for_bit(drawn: tuple[Grid, bool, int], v2: bool) -> None:
    grid, symmetric, group = drawn
    layout = {"checkpoint_format": "gptq_v2"} if v2 else {}
    fields = {"quant_method": "gptq", "bits": grid.bits, "group_size": group, "sym": symmetric, **layout}
    np.testing.assert_array_equal(read(fields, gptq(grid, v2), *grid.codes.shape), grid.values)


@settings(max_examples=30, deadline=None)
@given(drawn=grids(bits=(4,), shuffle=False))
def test_awq_bit_for_bit(drawn: tuple[Grid, bool, int]) -> None:
    grid, _, group = drawn
    fields = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    np.testing.assert_array_equal(read(fields, awq(grid), *grid.codes.shape), grid.values)


@settings(max_examples=60, deadline=None)
@given(drawn=grids(), loose=st.booleans())
def test_packed_bit_for_bit(drawn: tuple[Grid, bool, int], loose: bool) -> None:
    grid, symmetric, group = drawn
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    fields = compressed("pack-quantized", {"num_bits": grid.bits, "symmetric": symmetric, **strategy})
    grid = attrs.evolve(grid, scales=grid.scales.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(read(fields, packed(grid, symmetric, loose), *grid.codes.shape), grid.values)


@settings(max_examples=40, deadline=None)
@given(drawn=grids(bits=(4, 8), shuffle=False), whole=st.booleans())
def test_int8_bit_for_bit(drawn: tuple[Grid, bool, int], whole: bool) -> None:
    grid, symmetric, group = drawn
    strategy: dict[str, Any] = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    if whole and group == -1:
        strategy = {"strategy": "tensor"}
        first = lambda v: np.broadcast_to(v[:1, :1], v.shape)  # noqa: E731
        grid = attrs.evolve(grid, scales=first(grid.scales), zeros=first(grid.zeros))
    middle = 2 ** (grid.bits - 1)
    parts = {"weight": (grid.codes - middle).astype(np.int8), "weight_scale": grid.scales}
    if not symmetric:
        parts["weight_zero_point"] = (grid.zeros - middle).astype(np.int8)
    elif (grid.zeros != middle).any():
        return
    if strategy == {"strategy": "tensor"}:
        parts = {name: a if name == "weight" else a[0, :1] for name, a in parts.items()}
    fields = compressed("int-quantized", {"num_bits": grid.bits, "symmetric": symmetric, **strategy})
    np.testing.assert_array_equal(read(fields, parts, *grid.codes.shape), grid.values)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["block", "channel", "tensor"]),
)
def test_fp8_bit_for_bit(n: int, k: int, seed: int, kind: str) -> None:
    """Blocks at the edges are smaller; both names of the scales."""
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    block = {"block": (16, 8), "channel": (1, k), "tensor": (n, k)}[kind]
    codes, scales, values = eights(w, block)
    how: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": kind}
    if kind == "block":
        how["block_structure"] = [16, 8]
        fields = {"quant_method": "fp8", "weight_block_size": [16, 8]}
        np.testing.assert_array_equal(read(fields, {"weight": codes, "weight_scale_inv": scales}, n, k), values)
    scales = scales.reshape(-1)[0] if kind == "tensor" else scales
    fields = compressed("float-quantized", how)
    np.testing.assert_array_equal(read(fields, {"weight": codes, "weight_scale": np.asarray(scales)}, n, k), values)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 99), halves=st.booleans(),
    kind=st.sampled_from(["float32", "bfloat16", "float16", "int8", "fp8"]),
)  # fmt: skip
def test_sparse_bit_for_bit(n: int, k: int, seed: int, halves: bool, kind: str) -> None:
    """What isn't kept is 0, what is kept comes over: floats, and codes with a scale per output."""
    k, rng = 4 * k if halves else k, np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    keep = kept_two_of_four(w) if halves else rng.random((n, k)) < 0.4
    scales = rng.uniform(0.5, 2, (n, 1)).astype(np.float32)
    if kind in ("int8", "fp8"):
        numbers = (
            np.rint(40 * w).clip(-128, 127).astype(np.int8) if kind == "int8" else w.astype(ml_dtypes.float8_e4m3fn)
        )
        values = numbers.astype(np.float32) * scales
        how = {"num_bits": 8, "type": "float" if kind == "fp8" else "int", "strategy": "channel"}
        fields = compressed("float-quantized" if kind == "fp8" else "int-quantized", how)
        parts: Tensors = {"weight_scale": scales}
    else:
        numbers = w.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
        values, fields, parts = (
            numbers.astype(np.float32),
            {"quant_method": "compressed-tensors", "format": "dense"},
            {},
        )
    fields["sparsity_config"] = {"format": "sparse-24-bitmask" if halves else "sparse-bitmask"}
    np.testing.assert_array_equal(read(fields, parts | sparse(numbers, keep, halves), n, k), np.where(keep, values, 0))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 99), kind=st.sampled_from(["nvfp4", "mxfp4"]))
def test_fp4_bit_for_bit(n: int, groups: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    group = 16 if kind == "nvfp4" else 32
    codes = rng.integers(0, 16, (n, groups * group)).astype(np.uint8)
    parts: Tensors = {"weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4)}
    if kind == "nvfp4":
        parts["weight_scale"] = rng.uniform(1, 448, (n, groups)).astype(ml_dtypes.float8_e4m3fn)
        parts["weight_global_scale"] = np.array([rng.uniform(1, 5000)], np.float32)
        scales = parts["weight_scale"].astype(np.float32) / parts["weight_global_scale"]
    else:
        parts["weight_scale"] = rng.integers(110, 130, (n, groups)).astype(np.uint8)
        scales = np.exp2(parts["weight_scale"].astype(np.float32) - 127)
    how = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": group}
    got = read(compressed(f"{kind}-pack-quantized", how), parts, *codes.shape)
    np.testing.assert_array_equal(got, E2M1[codes] * np.repeat(scales, group, 1))


def test_e4m3_codes_mean_what_the_format_says() -> None:
    table = tables()["e4m3"].numpy()
    np.testing.assert_array_equal(table[~np.isnan(E4M3)], E4M3[~np.isnan(E4M3)])


# --- Folders -------------------------------------------------------------------------------------------------------------


Quantiser = Callable[[str, np.ndarray], tuple[Tensors, np.ndarray]]


def layers(model: transformers.PreTrainedModel, more: Iterable[str] = ()) -> dict[str, torch.nn.Module]:
    """The model's linear layers but the head, and the modules named."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head" or n in more}


def publish(
    folder: Path,
    model: transformers.PreTrainedModel,
    fields: dict[str, Any],
    quantise: Quantiser,
    more: Iterable[str] = (),
) -> np.ndarray:
    """Write the model's checkpoint with its layers quantised; the logits of the model on the dequantised weights."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, module in layers(model, more).items():
        turned = isinstance(module, transformers.pytorch_utils.Conv1D)
        w = module.weight.detach().float().numpy()  # type: ignore[union-attr, operator]
        parts, values = quantise(name, np.ascontiguousarray(w.T) if turned else w)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{last}": np.ascontiguousarray(a) for last, a in parts.items()}
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(values.T if turned else values))  # type: ignore[union-attr, operator]
    save_file(stored, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()  # type: ignore[no-any-return]


def as_gptq(bits: int = 4, group: int = 16, **options: Any) -> tuple[dict[str, Any], Quantiser]:
    fields = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": bool(options.get("shuffle"))}

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        grid = rounded(w, bits, group, **options)
        return gptq(grid), grid.values

    return fields, quantise


def as_awq() -> tuple[dict[str, Any], Quantiser]:
    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        grid = rounded(w, 4, 16, False)
        return awq(grid), grid.values

    return {"quant_method": "awq", "bits": 4, "group_size": 16, "modules_to_not_convert": ["lm_head"]}, quantise


def as_packed() -> tuple[dict[str, Any], Quantiser]:
    """Two groups: one by a regular expression, one by the class of the modules."""
    how = {"type": "int", "strategy": "group", "group_size": 16}
    groups = {
        "group_0": {"targets": ["Linear", "Embedding"], "weights": {**how, "num_bits": 4, "symmetric": False}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {**how, "num_bits": 8, "symmetric": True}},
    }
    fields = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        down = name.endswith("down_proj")
        grid = rounded(w, 8 if down else 4, 16, down)
        grid = attrs.evolve(grid, scales=grid.scales.astype(ml_dtypes.bfloat16))
        return packed(grid, down), grid.values

    return {**fields, "ignore": ["lm_head"]}, quantise


def as_int8() -> tuple[dict[str, Any], Quantiser]:
    """Weights and activations in eight bits, as W8A8 checkpoints are."""
    fields = compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, ignore=["lm_head"])
    fields["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        grid = rounded(w, 8, -1)
        return {"weight": (grid.codes - 128).astype(np.int8), "weight_scale": grid.scales}, grid.values

    return fields, quantise


def as_fp8(block: bool) -> tuple[dict[str, Any], Quantiser]:
    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        codes, scales, values = eights(w, (16, 32) if block else w.shape)
        scales = scales if block else scales.reshape(1)
        return {"weight": codes, "weight_scale_inv" if block else "weight_scale": scales}, values

    if block:
        return {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}, quantise
    return compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}), quantise


def as_nvfp4() -> tuple[dict[str, Any], Quantiser]:
    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        whole = np.array([448 * 6 / np.abs(w).max()], np.float32)
        scales = (np.abs(w.reshape(n, -1, 16)).max(-1) / 6 * whole).astype(ml_dtypes.float8_e4m3fn)
        each = np.repeat(scales.astype(np.float32) / whole, 16, 1)
        codes = np.abs((w / each)[..., None] - E2M1).argmin(-1).astype(np.uint8)
        parts = {
            "weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4),
            "weight_scale": scales,
            "weight_global_scale": whole,
        }
        return parts, E2M1[codes] * each

    how = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return compressed("nvfp4-pack-quantized", how), quantise


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: most kernels are the same, and what decides a trace is in its key."""
    return tmp_path_factory.mktemp("cache")


def program(folder: Path, cache: Path, **options: Any) -> jisu.Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return jisu.compile(folder, cache_dir=cache, **options)


def logits(found: jisu.Program) -> np.ndarray:
    return np.asarray(found.session().append(IDS), np.float32)


CASES: dict[str, tuple[str, tuple[dict[str, Any], Quantiser], tuple[str, ...]]] = {
    "gptq": ("llama", as_gptq(), ()),
    "gptq in order of activations, with the head": ("llama", as_gptq(symmetric=False, shuffle=True), ("lm_head",)),
    "gptq of 3 bits": ("llama", as_gptq(bits=3, group=-1), ()),
    "gptq of one product for queries, keys and values": ("phi3", as_gptq(shuffle=True), ()),
    "gptq of transposed layers": ("gpt2", as_gptq(bits=8, shuffle=True), ()),
    "awq": ("qwen2", as_awq(), ()),
    "packed": ("llama", as_packed(), ()),
    "packed, with the table of tokens": ("llama", as_packed(), ("model.embed_tokens",)),
    "int8": ("llama", as_int8(), ()),
    "fp8": ("phi3", as_fp8(block=False), ()),
    "fp8 in blocks": ("llama", as_fp8(block=True), ("lm_head",)),
    "nvfp4": ("llama", as_nvfp4(), ()),
}


FAST = (
    "gptq in order of activations, with the head",
    "gptq of one product for queries, keys and values",
    "awq",
    "packed",
)


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_folder_equals_the_model_on_its_dequantised_weights(case: str, tmp_path: Path, cache: Path) -> None:
    """By a new trace and by the kept one; every layer reads codes, and the file that is saved does as well."""
    architecture, (fields, quantise), more = CASES[case]
    changes: dict[str, Any] = {} if architecture == "gpt2" else {"intermediate_size": 64}
    model = make(architecture, **changes)
    model.config.tie_word_embeddings = model.config.tie_word_embeddings and not more
    want = publish(tmp_path / "model", model, fields, quantise, more)
    for _ in range(2):
        found = program(tmp_path / "model", cache)
        assert np.abs(logits(found) - want).max() < 2e-4
    ir = found.ir()
    # Rows of a table are dequantised where they are looked up.
    assert ir.count("= dequantize(") == more.count("model.embed_tokens") and ir.count("= quantized_linear(") >= 2 * 4
    assert ir.count("= packed_linear(") + ir.count("= packed_projections(") == (0 if "lm_head" in more else 1)
    found.save(tmp_path / "program.jisu")
    np.testing.assert_array_equal(logits(jisu.load(tmp_path / "program.jisu")), logits(found))


def as_sparse(kind: str) -> tuple[dict[str, Any], Quantiser]:
    """2:4: of floats, or of codes of eight bits."""
    fields: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    if kind == "fp8":
        fields = compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"})

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        keep = kept_two_of_four(w)
        if kind != "fp8":
            return sparse(w, keep, True), np.where(keep, w, 0)
        codes, scales, values = eights(w, w.shape)
        return sparse(codes, keep, True) | {"weight_scale": scales.reshape(1)}, np.where(keep, values, 0)

    return fields | {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}}, quantise


@pytest.mark.parametrize("kind", ["floats", pytest.param("fp8", marks=pytest.mark.slow)])
def test_sparse_folders_stay_sparse(kind: str, tmp_path: Path, cache: Path) -> None:
    want = publish(tmp_path, make("llama", intermediate_size=64), *as_sparse(kind))
    found = program(tmp_path, cache)
    assert np.abs(logits(found) - want).max() < 2e-4
    told = found.explain()["sparse"]
    assert len(told) == 2 * 7 and {s["form"] for s in told} == {"float32" if kind == "floats" else "fp8"}
    assert {s["kept"] for s in told} == {0.5}


@pytest.mark.parametrize("kind", ["floats", "fp8"])
def test_sparse_folders_are_what_sparse_tensor_cores_read(kind: str, tmp_path: Path) -> None:
    model = make("llama", torch.bfloat16, hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    publish(tmp_path, model, *as_sparse(kind))
    target = Target.describe("cuda:sm_90")
    passes = layout_passes(*cuda.packing(target), levels=cuda.levels(target), halves=cuda.halves(target))
    packed = Pipeline(passes).run(load_checkpoint(tmp_path).graph)[0]
    assert packed.count(ops.semi_structured_linear) == 7


def test_codes_take_the_room_of_codes(tmp_path: Path, cache: Path) -> None:
    """A wide layer's weights take their bits and their scales, not their floats; nothing of them is held before they are packed."""
    model = make("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=1)
    publish(tmp_path, model, *as_gptq(group=64))
    held = {n: s for n, s in load_checkpoint(tmp_path).graph.weights.items() if not isinstance(s, LazyTensor)}
    assert sum(int(np.prod(s.shape)) for s in held.values()) < 100
    coded = sum(m.weight.numel() for m in layers(model).values())  # type: ignore[misc, union-attr, operator]
    floats = sum(p.numel() for p in model.parameters()) - coded
    # Per group of 64 inputs there are 32 bytes of codes, a scale and a shift.
    assert program(tmp_path, cache).weights_bytes < 4 * floats * 1.3 + coded * (0.5 + 8 / 64) * 1.1


def test_layers_of_one_input_share_its_order(tmp_path: Path, cache: Path) -> None:
    """And the gated layer stays one kernel."""
    publish(tmp_path / "model", make("llama", intermediate_size=64), *as_gptq(shuffle=True))
    ir = program(tmp_path / "model", cache).ir()
    assert len(re.findall(r"= take\(.*axis=2", ir)) == 2 * 4 and ir.count("gated=true") == 2


def test_half_precision(tmp_path: Path, cache: Path) -> None:
    """As such checkpoints are published; weights aren't rounded a second time in the products."""
    model = make("llama", torch.float16, intermediate_size=64)
    want = publish(tmp_path / "model", model, *as_gptq(symmetric=False))
    found = program(tmp_path / "model", cache)
    assert np.abs(logits(found) - want).max() < 0.02 * np.abs(want).max()


def test_a_kept_trace_knows_its_order(tmp_path: Path, cache: Path) -> None:
    """Of two folders that differ in the order of groups alone, neither gets the other's trace."""
    for name, shuffle in (("straight", False), ("shuffled", True)):
        want = publish(tmp_path / name, make("llama", intermediate_size=64), *as_gptq(shuffle=shuffle))
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["quantization_config"]["desc_act"] = True
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert np.abs(logits(program(tmp_path / name, cache)) - want).max() < 2e-4


def test_gptqmodel_options_per_module(tmp_path: Path, cache: Path) -> None:
    fields, _ = as_gptq()
    fields["dynamic"] = {"+:.*down_proj": {"bits": 8, "group_size": 32}, "-:.*o_proj": {}}

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        if name.endswith("o_proj"):
            return {"weight": w}, w
        grid = rounded(w, 8, 32) if name.endswith("down_proj") else rounded(w, 4, 16)
        return gptq(grid), grid.values

    want = publish(tmp_path / "model", make("llama", intermediate_size=64), fields, quantise)
    found = program(tmp_path / "model", cache)
    assert np.abs(logits(found) - want).max() < 2e-4
    assert found.ir().count('scheme="int8"') >= 2


def test_a_recipe_quantises_what_is_left(tmp_path: Path, cache: Path) -> None:
    """Codes that are there stay; the head, which is still float, becomes what the recipe says."""
    publish(tmp_path / "model", make("llama", intermediate_size=64), *as_gptq())
    plain = program(tmp_path / "model", cache)
    found = program(tmp_path / "model", cache, recipe={"quantize": {"layers": "head", "scheme": "int8"}})
    assert found.ir().count("= quantized_linear(") == plain.ir().count("= quantized_linear(") + 1
    assert 0 < np.abs(logits(found) - logits(plain)).max() < 0.2


def test_what_stays_float_is_said(tmp_path: Path, cache: Path) -> None:
    publish(tmp_path / "model", make("llama", intermediate_size=64), *as_int8())
    for _ in range(2):  # by a kept trace, too
        with pytest.warns(UserWarning, match="asks for activations of int8; only its weights are quantised"):
            found = jisu.compile(tmp_path / "model", cache_dir=cache)
    assert "activations of int8" in found.explain()["notes"][0]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    model = make("llama", intermediate_size=64)
    want = publish(tmp_path / "model", model, *as_packed())
    command = [sys.executable, "-m", "jisu", "compile", str(tmp_path / "model"), "-o", str(tmp_path / "out.jisu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert np.abs(logits(jisu.load(tmp_path / "out.jisu")) - want).max() < 2e-4


# --- What is refused -----------------------------------------------------------------------------------------------------


def broken(change: Callable[[str, np.ndarray], np.ndarray | None]) -> Quantiser:
    _, quantise = as_gptq()

    def other(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        parts, values = quantise(name, w)
        changed = {last: change(f"{name}.{last}", a) for last, a in parts.items()}
        return {last: a for last, a in changed.items() if a is not None}, values

    return other


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda n, a: None if n.endswith("1.mlp.up_proj.scales") else a, {}, r"1\.mlp\.up_proj\.scales is missing \(float16"),
        (lambda n, a: a[1:] if n.endswith("k_proj.qweight") else a, {}, r"0\.self_attn\.k_proj\.qweight is int32\[3, 16\], expected int32\[4, 16\].*1\.self"),
        (lambda n, a: a.astype(np.int16) if n.endswith("o_proj.qzeros") else a, {}, r"o_proj\.qzeros is int16\[2, 4\], expected int32"),
        (lambda n, a: np.zeros_like(a) if n.endswith("v_proj.g_idx") else a, {}, r"v_proj\.g_idx: not every one of the 2 groups has 16 inputs"),
        (lambda n, a: a, {"bits": 8}, r"q_proj\.qweight is int32\[4, 32\], expected int32\[8, 32\]"),
        (lambda n, a: a, {"group_size": 24}, r"groups of 24 don't divide its 32 inputs"),
        (lambda n, a: a, {"bits": 5}, r"codes of 5 bits.*2, 3, 4 and 8"),
        (lambda n, a: a, {"checkpoint_format": "marlin"}, r"gptq in the file format 'marlin'"),
        (lambda n, a: a, {"pack_dtype": "int16"}, r"pack_dtype is 'int16'; jisu reads 'int32' only"),
    ],
    ids=["missing", "shape", "dtype", "order", "bits", "group", "odd bits", "layout", "words"],
)  # fmt: skip
def test_folders_that_do_not_fit(
    change: Callable[[str, np.ndarray], np.ndarray | None],
    options: dict[str, Any],
    words: str,
    tmp_path: Path,
    cache: Path,
) -> None:
    fields, _ = as_gptq()
    publish(tmp_path / "model", make("llama", intermediate_size=64), fields | options, broken(change))
    with pytest.raises((jisu.ArtifactError, jisu.UnsupportedError), match=words):
        jisu.compile(tmp_path / "model", cache_dir=cache)


def test_sparse_matrices_that_do_not_fit(tmp_path: Path) -> None:
    fields, quantise = as_sparse("floats")

    def cut(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        parts, values = quantise(name, w)
        if name.endswith("k_proj"):
            parts["bitmask"] = parts["bitmask"] & 0xFE
        if name.endswith("o_proj"):
            parts["shape"] = parts["shape"][::-1]
        return parts, values

    publish(tmp_path / "model", make("llama", intermediate_size=64), fields, cut)
    with pytest.raises(
        jisu.ArtifactError, match=r"k_proj\.bitmask keeps \d+ of 16 x 32 numbers, but .*k_proj\.compressed has 256"
    ):
        jisu.compile(tmp_path / "model", cache_dir=tmp_path / "cache")


def test_codes_without_a_configuration(tmp_path: Path, cache: Path) -> None:
    publish(tmp_path, make("llama", intermediate_size=64), *as_gptq())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        jisu.ArtifactError, match="quantised or sparse weights, but config.json has no quantization_config"
    ):
        jisu.compile(tmp_path, cache_dir=cache)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "mxfp4"}, r"quantised \(mxfp4\).*recipe such as .*gptq, awq, compressed-tensors, fp8"),
        ({"quant_method": "awq", "version": "gemv"}, r"awq: version is 'gemv'; jisu reads 'gemm' only"),
        ({"quant_method": "awq", "bits": 3}, "awq: codes of 3 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8: the checkpoint holds e5m2"),
        (compressed("marlin-24", {}), "compressed-tensors in the format 'marlin-24'.*pack-quantized"),
        (
            compressed("pack-quantized", {}, sparsity_config={"format": "sparse-8-16"}),
            "sparse .*'sparse-8-16'.*it reads sparse-24-bitmask",
        ),
    ],
)
def test_formats_that_are_not_read(fields: dict[str, Any], words: str, tmp_path: Path, cache: Path) -> None:
    publish(tmp_path, make("llama"), fields, lambda name, w: ({"weight": w}, w))
    with pytest.raises(jisu.UnsupportedError, match=words):
        jisu.compile(tmp_path, cache_dir=cache)


@pytest.mark.parametrize("depth", [1, 6])
def test_experts_in_codes_are_refused_by_name(depth: int, tmp_path: Path, cache: Path) -> None:
    """All of them; very many by what their names have in common."""
    make("mixtral", intermediate_size=64, num_hidden_layers=depth).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    experts = [name.removesuffix(".weight") for name in stored if ".experts." in name]
    for name in experts:
        parts, _ = as_gptq()[1](name, stored.pop(f"{name}.weight"))
        stored |= {f"{name}.{last}": np.ascontiguousarray(a) for last, a in parts.items()}
    save_file(stored, path, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": as_gptq()[0]}))
    with pytest.raises(jisu.UnsupportedError, match="put together into larger ones") as caught:
        jisu.compile(tmp_path, cache_dir=cache)
    assert len(experts) == depth * 12
    shown = experts if depth == 1 else [f"experts.*.w{i} (24 of them)" for i in (1, 2, 3)]
    assert all(name in str(caught.value) for name in shown), caught.value


def test_a_table_with_its_columns_sorted_is_refused(tmp_path: Path, cache: Path) -> None:
    """Its rows would have to be put back into order at every look-up."""
    fields, _ = as_packed()

    def quantise(name: str, w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        down = name.endswith("down_proj")
        grid = rounded(w, 8 if down else 4, 16, down, shuffle=True)
        return packed(grid, down), grid.values

    publish(tmp_path, make("llama", intermediate_size=64), fields, quantise, ("model.embed_tokens",))
    with pytest.raises(
        jisu.UnsupportedError, match=r"other than by linear layers.*: model\.embed_tokens\.weight \(take\)"
    ):
        jisu.compile(tmp_path, cache_dir=cache)


def test_scales_that_repeat_are_folded() -> None:
    """One scale for a matrix is repeated within what is stored; where a call reads it, it isn't stored repeated."""
    one = weight("one", TensorType((1, 1), "float32"))
    x = placeholder("x", TensorType((6, 4), "float32"))
    each = ops.broadcast_to(one, shape=(6, 4))
    graph = Graph(
        (x,), (ops.mul(x, ops.add(each, 1.0)), ops.sub(x, each)), {"one": ArrayStorage(np.full((1, 1), 2, np.float32))}
    )
    folded = FoldWeights()(graph)
    assert sorted(s.shape for s in folded.weights.values()) == [(1, 1), (6, 4)]
    sample = np.ones((6, 4), np.float32)
    for got, want in zip(interpret(folded, [sample]), interpret(graph, [sample]), strict=True):
        np.testing.assert_array_equal(got, want)
