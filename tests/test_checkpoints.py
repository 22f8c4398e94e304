"""Checkpoint folders: the tensors of a file become the parameters of a model, whatever form they were published in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import DECODERS, VOCABULARY, make
from safetensors.torch import load_file, save_file

import jisu

FAST = ("llama_tied", "qwen3_moe")
IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
Tensors = dict[str, torch.Tensor]


def difference(folder: Path, model: torch.nn.Module, cache: Path) -> float:
    """The largest difference between a compiled folder's logits and the model's."""
    with torch.no_grad():
        want = model(IDS).logits.float().numpy()
    got = jisu.compile(folder, cache_dir=cache).session().append(IDS.numpy())
    return float(np.abs(np.asarray(got, np.float32) - want).max())


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a saved checkpoint."""
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS])
def test_a_saved_model_equals_the_model(name: str, tmp_path: Path) -> None:
    """Saving writes the published form (experts one by one, old names); the kept trace reads it as well as a new one."""
    model = make(name)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    for _ in range(2):
        assert difference(tmp_path / "model", model, tmp_path / "cache") < 1e-4


def test_experts_stay_where_they_are(tmp_path: Path) -> None:
    """Experts stored one by one are no copy in memory: the graph holds how they are put together."""
    from jisu.compiler.storage import LazyTensor
    from jisu.frontends.checkpoint import load_checkpoint

    make("mixtral").save_pretrained(tmp_path)
    graph = load_checkpoint(tmp_path).graph
    held = {n: s for n, s in graph.weights.items() if not isinstance(s, LazyTensor)}
    assert all(np.prod(s.shape) <= 64 for s in held.values()), held
    assert any(".experts.3." in name for name in graph.weights)


def test_a_base_model_is_a_language_model(tmp_path: Path) -> None:
    """GPT-2 was published without the prefix that its language model gives its parameters."""
    model = make("gpt2")
    model.save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert difference(tmp_path / "model", model, tmp_path / "cache") < 1e-4


def test_other_dtypes_are_cast(tmp_path: Path) -> None:
    """The configuration's dtype decides, not the file's: a norm stored in float32 is rounded as loading would round it."""
    make("llama_tied", torch.bfloat16).save_pretrained(tmp_path / "model")
    same = jisu.compile(tmp_path / "model", cache_dir=tmp_path / "cache").session().append(IDS.numpy())
    rewrite(tmp_path / "model", lambda t: {k: v.float() if "norm" in k else v for k, v in t.items()})
    program = jisu.compile(tmp_path / "model", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(program.session().append(IDS.numpy()), same)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k},
            r"layers\.1\.mlp\.gate_proj.*down_proj.*missing",
        ),
        (
            lambda t: {k: v[:16] if k.endswith("o_proj.weight") else v for k, v in t.items()},
            r"o_proj.*float32\[16, 32\]",
        ),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit(change: Callable[[Tensors], Tensors], words: str, tmp_path: Path) -> None:
    make("llama_tied").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(jisu.ArtifactError, match=words):
        jisu.compile(tmp_path, cache_dir=tmp_path / "cache")


def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    make("llama_tied").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").write_text(config + ', "quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(jisu.UnsupportedError, match="bitsandbytes.*gptq, awq, compressed-tensors, fp8"):
        jisu.compile(tmp_path, cache_dir=tmp_path / "cache")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    """Also where writing fails half-way; nothing else is left in the folder."""
    from jisu.compiler.storage import ALIGNMENT, aligned, whole_file

    place = tmp_path / "new" / "facts.json"
    with whole_file(place) as file:
        file.write(b"first")
        assert not place.exists()
    with pytest.raises(ZeroDivisionError), whole_file(place) as file:
        file.write(b"second")
        _ = 1 / 0
    assert place.read_bytes() == b"first" and [p.name for p in place.parent.iterdir()] == ["facts.json"]
    for shape, dtype in (((0,), "int64"), ((), "uint8"), ((3, 5), "float32")):
        array = aligned(shape, dtype)
        assert array.shape == shape and array.dtype == dtype and array.ctypes.data % ALIGNMENT == 0
