"""Models merged into one, and models that answer as one, against PyTorch and the published definitions."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as hf
from decoders import VOCABULARY, make
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import jisu
from jisu.compiler.graph import ArrayStorage
from jisu.compiler.merge import METHODS, Merge, Merged

Array = np.ndarray
DTYPES = ("float32", "float16", "bfloat16", "float64")


def merged(how: Merge, members: list[Array], base: Array | None = None) -> Array:
    origin = None if base is None else ArrayStorage(base)
    return Merged(how, tuple(map(ArrayStorage, members)), origin).numpy()


def arrays(count: int, seed: int, dtype: str = "float32", shape: tuple[int, ...] = (7, 5)) -> list[Array]:
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return [rng.standard_normal(shape).astype(kind) for _ in range(count)]


def ids(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def other(name: str, seed: int, **changes: Any) -> hf.PreTrainedModel:
    """A model like `make(name)`, a little apart from it."""
    model = make(name, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


# --- The mathematics -----------------------------------------------------------------------------------------------


@given(
    st.sampled_from(METHODS),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.lists(st.floats(0.01, 9), min_size=2, max_size=2),
)
def test_equal_models_give_themselves(method: str, dtype: str, seed: int, weights: list[float]) -> None:
    x, base = arrays(2, seed, dtype)
    ties = method == "ties"
    how = Merge.resolve(method, 2, weights, base=ties, density=1.0 if ties else None)
    got = merged(how, [x, x], base if ties else None)
    assert got.dtype == x.dtype and got.shape == x.shape
    if ties:
        # base + (x - base) is x to the rounding of the dtype
        np.testing.assert_allclose(got.astype(float), x.astype(float), rtol=1e-9 if dtype == "float64" else 1e-7)
    else:
        assert got.tobytes() == x.tobytes()


@given(st.integers(2, 4), st.integers(0, 99), st.data())
def test_linear_is_the_weighted_mean(count: int, seed: int, data: st.DataObject) -> None:
    xs = arrays(count, seed)
    weights = data.draw(st.lists(st.floats(0.01, 9), min_size=count, max_size=count))
    want = np.average(np.stack(xs).astype(np.float64), axis=0, weights=weights)
    got = merged(Merge.resolve("linear", count, weights, base=False), xs)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 99), st.floats(0, 1))
def test_slerp_stays_on_the_sphere(seed: int, t: float) -> None:
    a, b = arrays(2, seed, "float64")
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    got = merged(Merge.resolve("slerp", 2, (1 - t, t), base=False), [a, b])

    def angle(x: Array, y: Array) -> float:
        return math.acos(np.clip((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))

    assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(a), rel=1e-9)
    assert angle(a, got) == pytest.approx(t * angle(a, b), abs=1e-6)
    assert angle(got, b) == pytest.approx((1 - t) * angle(a, b), abs=1e-6)


@given(st.integers(0, 99), st.sampled_from(DTYPES))
def test_slerp_ends_at_its_ends(seed: int, dtype: str) -> None:
    a, b = arrays(2, seed, dtype)
    assert merged(Merge.resolve("slerp", 2, (1, 0), base=False), [a, b]).tobytes() == a.tobytes()
    assert merged(Merge.resolve("slerp", 2, (0, 1), base=False), [a, b]).tobytes() == b.tobytes()


@pytest.mark.parametrize("factor", [1.0, 2.5, 1.00001, 0.0, -1.0])
def test_slerp_of_one_direction_is_the_mean(factor: float) -> None:
    (a,) = arrays(1, 3, "float64")
    got = merged(Merge.resolve("slerp", 2, (1, 3), base=False), [a, factor * a])
    np.testing.assert_allclose(got, a * (0.25 + 0.75 * factor), rtol=1e-12, atol=1e-12)


def ties(xs: list[Array], base: Array, density: float, scale: float, weights: list[float]) -> Array:
    """TIES as the paper has it: trim, elect signs, merge what agrees; element by element."""
    kept = max(1, round(density * base.size))
    deltas = []
    for x in xs:
        delta = (x.astype(np.float64) - base).ravel()
        order = sorted(range(delta.size), key=lambda i, d=delta: -abs(d[i]))  # type: ignore[misc]
        trimmed = np.zeros(delta.size)
        trimmed[order[:kept]] = delta[order[:kept]]
        deltas.append(trimmed)
    result = base.astype(np.float64).ravel().copy()
    for i in range(base.size):
        total = sum(w * d[i] for w, d in zip(weights, deltas, strict=True))
        chosen = [(w, d[i]) for w, d in zip(weights, deltas, strict=True) if d[i] * total > 0]
        if chosen:
            result[i] += scale * sum(w * d for w, d in chosen) / sum(w for w, _ in chosen)
    return result.reshape(base.shape)


@given(
    st.integers(2, 4),
    st.integers(0, 99),
    st.floats(0.01, 1),
    st.floats(0.1, 2),
    st.data(),
    st.sampled_from([(7, 5), (13,), (1, 1)]),
)
def test_ties_is_that_of_the_paper(
    count: int, seed: int, density: float, scale: float, data: st.DataObject, shape: tuple[int, ...]
) -> None:
    base, *xs = arrays(count + 1, seed, shape=shape)
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=count, max_size=count))
    how = Merge.resolve("ties", count, weights, base=True, density=density, scale=scale)
    np.testing.assert_allclose(merged(how, xs, base), ties(xs, base, density, scale, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_make_no_difference(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *xs = arrays(3, 5, shape=(40, 25))
    how = Merge.resolve(method, 2, (1, 2), base=method == "ties")
    whole = merged(how, xs, base)
    monkeypatch.setattr("jisu.compiler.merge._BLOCK", 37)
    np.testing.assert_allclose(merged(how, xs, base), whole, rtol=1e-6, atol=1e-7)


# --- Merged models -------------------------------------------------------------------------------------------------


def as_merged(models: Sequence[Any], base: Any, method: str) -> dict[str, torch.Tensor]:
    """The merged state by means of the definitions above, in torch."""
    states = [m.state_dict() for m in models]
    result = {}
    for name, first in states[0].items():
        xs = [s[name].double().numpy() for s in states]
        if method == "linear":
            value = np.average(np.stack(xs), axis=0, weights=[1, 3])
        elif method == "ties":
            assert base is not None
            value = ties(xs, base.state_dict()[name].double().numpy(), 0.2, 1.0, [1, 3])
        else:
            a, b = (x.ravel() for x in xs)
            cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
            theta = math.acos(min(cosine, 1))
            parts = (0.25, 0.75) if cosine > 0.9995 else [math.sin(t * theta) / math.sin(theta) for t in (0.25, 0.75)]
            value = (parts[0] * a + parts[1] * b).reshape(xs[0].shape)
        result[name] = torch.from_numpy(value).to(first.dtype)
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("members")
    models = {"base": make("llama_tied"), "a": other("llama_tied", 1), "b": other("llama_tied", 2)}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_equals_pytorch(method: str) -> None:
    members, base = [other("llama", 1), other("llama", 2)], make("llama")
    want = make("llama")
    want.load_state_dict(as_merged(members, base, method))
    soup = jisu.merge(members, method=method, weights=(1, 3), base=base if method == "ties" else None)
    got = jisu.compile(soup, num_threads=1)(ids()).logits
    torch.testing.assert_close(got, want(ids()).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jisu.to_torch(soup)(ids()).logits, want(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_written_checkpoint_equals_pytorch(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = folders["base"] if method == "ties" else None
    soup = jisu.merge([folders["a"], folders["b"]], method=method, weights=(1, 3), base=base, out=tmp_path / "soup")
    load: Any = hf.AutoModelForCausalLM.from_pretrained
    members = [load(folders[name]) for name in "ab"]
    want = as_merged(members, load(folders["base"]), method)
    stored = load_file(tmp_path / "soup" / "model.safetensors")
    assert stored.keys() == load_file(folders["a"] / "model.safetensors").keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-7)
    model, told = load(tmp_path / "soup", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    got = jisu.compile(soup, num_threads=1)(ids()).logits
    torch.testing.assert_close(got, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_written_checkpoint_keeps_dtypes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        other("llama", seed, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    jisu.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "soup")
    stored, member = (load_file(tmp_path / name / "model.safetensors") for name in ("soup", "a"))
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in member.items()}


def test_merged_weights_are_quantized_like_any() -> None:
    members = [other("llama", 1), other("llama", 2)]
    recipe = {"quantize": [{"scheme": "int8"}]}
    want = make("llama")
    want.load_state_dict(as_merged(members, None, "linear"))
    got = jisu.compile(jisu.merge(members, weights=(1, 3)), recipe=recipe, num_threads=1)(ids()).logits
    expected = jisu.compile(want, recipe=recipe, num_threads=1)(ids()).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_plain_modules_merge() -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

    a, b, want, x = net(1), net(2), net(3), torch.randn(4, 6)
    states = a.state_dict(), b.state_dict()
    want.load_state_dict({k: (states[0][k] + states[1][k]) / 2 for k in states[0]})
    program = jisu.compile(jisu.merge([a, b], example_inputs=(x,)), num_threads=1)
    torch.testing.assert_close(program(x), want(x))


# --- Ensembles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("llama", "gpt2"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (("llama", "llama"), ("gemma3", "mistral", "qwen3"))),
    ],
)
def test_ensemble_is_the_weighted_mean(names: tuple[str, ...]) -> None:
    models = [other(name, i) for i, name in enumerate(names)]
    weights = list(range(1, len(names) + 1))
    program = jisu.compile(jisu.ensemble(models, weights), num_threads=1)
    assert program.explain()["cache"] == "derived"
    with torch.no_grad():
        want = sum(w * m(ids()).logits for w, m in zip(weights, models, strict=True)) / sum(weights)
    torch.testing.assert_close(program(ids()).logits, want, rtol=1e-3, atol=1e-3)
    session = program.session()
    steps = [session.append(ids().numpy()[:, i : i + n]) for i, n in ((0, 9), (9, 1), (10, 7))]
    np.testing.assert_allclose(np.concatenate(steps, 1), want.numpy(), rtol=1e-3, atol=1e-3)


def test_mixture_is_the_mean_of_probabilities() -> None:
    models = [other("llama", 1), other("gpt2", 2)]
    program = jisu.compile(jisu.ensemble(models, (3, 1), average="probability"), num_threads=1)
    with torch.no_grad():
        p, q = (m(ids()).logits.double().softmax(-1) for m in models)
    torch.testing.assert_close(program(ids()).logits.double().exp(), 0.75 * p + 0.25 * q, rtol=1e-4, atol=1e-7)


def test_ensemble_generates_saves_and_comes_back(tmp_path: Path) -> None:
    models = [other("llama", 1), other("llama", 2)]
    program = jisu.compile(jisu.ensemble(models), num_threads=1)
    prompt = ids(1, 5)
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            logits = sum(m(tokens).logits[:, -1:] for m in models)
            tokens = torch.cat([tokens, logits.argmax(-1)], 1)
    got = program.generate(prompt[0].tolist(), max_new_tokens=8, do_sample=False)
    assert got.sequences[0] == tokens[0, 5:].tolist()
    program.save(tmp_path / "both.jisu")
    again = jisu.load(tmp_path / "both.jisu", num_threads=1)
    torch.testing.assert_close(again(prompt).logits, program(prompt).logits)


@pytest.mark.slow
def test_members_are_compressed_by_their_own_recipes() -> None:
    models = [other("llama", 1), other("llama", 2)]
    int8 = {"quantize": [{"scheme": "int8"}]}
    int4 = {"quantize": [{"scheme": "int4", "group": 16}, {"layers": "head", "scheme": "none"}]}
    tokens = ids(4, 24).numpy()
    both = jisu.ensemble(models, (1, 3), recipes=(int8, int4), calibration=tokens)
    program = jisu.compile(both, num_threads=1)
    alone = [
        jisu.compile(m, recipe=r, calibration=tokens, num_threads=1) for m, r in zip(models, (int8, int4), strict=True)
    ]
    want = 0.25 * alone[0](ids()).logits + 0.75 * alone[1](ids()).logits
    torch.testing.assert_close(program(ids()).logits, want, rtol=1e-3, atol=1e-3)
    assert program.weights_bytes < 0.7 * jisu.compile(jisu.ensemble(models), num_threads=1).weights_bytes
    told = program.explain()["members"]
    assert ['scheme = "int8"' in told[0], 'scheme = "int4"' in told[1]] == [True, True]
    torch.testing.assert_close(jisu.to_torch(both)(ids()).logits, want, rtol=1e-3, atol=1e-3)


def test_plain_modules_in_an_ensemble() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    b = nn.Sequential(nn.Linear(6, 3)).eval()
    x = torch.randn(4, 6)
    program = jisu.compile(jisu.ensemble([a, b], (1, 2), example_inputs=(x,)), num_threads=1)
    torch.testing.assert_close(program(x), (a(x) + 2 * b(x)) / 3)


# --- What doesn't fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "slurp"}, "did you mean 'slerp'"),
        ({"method": "ties"}, "needs base"),
        ({"density": 0.5}, "density is for method"),
        ({"weights": (1,)}, "one per model, 2"),
        ({"weights": (0, 0)}, "not all 0"),
        ({"weights": (1, -1)}, "at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(jisu.InputError, match=said):
        jisu.merge([nn.Linear(2, 2), nn.Linear(2, 2)], example_inputs=(torch.ones(1, 2),), **options)


def test_slerp_takes_two() -> None:
    with pytest.raises(jisu.InputError, match="exactly two models, got 3"):
        jisu.merge([nn.Linear(2, 2)] * 3, method="slerp", example_inputs=(torch.ones(1, 2),))


def test_models_that_differ_are_refused_by_name() -> None:
    with pytest.raises(
        jisu.InputError, match=r"down_proj.weight is float32\[32, 48\] in model 0 .* and float32\[32, 64\] in model 1"
    ):
        jisu.merge([make("llama"), make("llama", intermediate_size=64)])
    with pytest.raises(jisu.InputError, match=r"q_proj.bias is missing in model 0"):
        jisu.merge([make("llama"), make("qwen2")])
    with pytest.raises(
        jisu.InputError, match=r"compute differently.*value=0.1\d*\).* at model\.layers\.0\.input_layernorm"
    ):
        jisu.merge([make("llama"), make("llama", rms_norm_eps=0.1)])
    theta = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.raises(jisu.InputError, match="inv_freq.*differs between model 0"):
        jisu.merge([make("llama"), make("llama", rope_parameters=theta)])


def test_vocabularies_that_differ_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(jisu.InputError, match="vocabulary of 99 tokens, model 1 .* of 77"):
        jisu.ensemble([make("llama"), make("llama", vocab_size=77)])
    places = []
    for name, tokens in (("a", ["x", "y"]), ("b", ["y", "x"])):
        places.append(shutil.copytree(folders[name], tmp_path / name))
        content = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": []}
        (places[-1] / "tokenizer.json").write_text(json.dumps(content))
    for function in (jisu.merge, jisu.ensemble):
        with pytest.raises(jisu.InputError, match="different vocabularies: 'x' has the ids 0 and 1"):
            function(places)


def test_ensembles_refuse_what_has_no_mean() -> None:
    a, b = nn.Linear(4, 3).eval(), nn.Linear(4, 2).eval()
    with pytest.raises(jisu.InputError, match=r"the same shapes: model 0 \(Linear\) gives float32\[1, 3\]"):
        jisu.ensemble([a, b], example_inputs=(torch.ones(1, 4),))
    with pytest.raises(jisu.InputError, match="weight 0 would be computed for nothing"):
        jisu.ensemble([a, a], (1, 0), example_inputs=(torch.ones(1, 4),))
    with pytest.raises(jisu.InputError, match="calibration is given, but none of the recipes uses it"):
        jisu.ensemble([a, a], calibration="x.txt", example_inputs=(torch.ones(1, 4),))
    with pytest.raises(jisu.InputError, match="average is one of log, probability"):
        jisu.ensemble([a, a], average="median", example_inputs=(torch.ones(1, 4),))
    program = jisu.compile(a, example_inputs=(torch.ones(1, 4),), num_threads=1)
    with pytest.raises(jisu.InputTypeError, match="give the model that it was made from"):
        jisu.ensemble([program, program])


# --- The command line ----------------------------------------------------------------------------------------------


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jisu", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


def test_command_line_merges(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "soup"
    given = [
        "merge",
        folders["a"],
        folders["b"],
        "--method",
        "ties",
        "--base",
        folders["base"],
        "--weights",
        "1,3",
        "--density",
        0.3,
    ]
    done = shell(*given, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["path"] == str(out) and told["method"] == "ties" and told["weights_bytes"] > 0
    want = jisu.merge([folders["a"], folders["b"]], method="ties", weights=(1, 3), base=folders["base"], density=0.3)
    got = jisu.compile(out, num_threads=1)(ids()).logits
    torch.testing.assert_close(got, jisu.compile(want, num_threads=1)(ids()).logits)
    again = shell(*given, "--out", out)
    assert again.returncode == 1 and "exists already" in again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soup"]


def test_command_line_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    done = shell("merge", folders["a"], folders["b"], "--weights", "1;3", "--out", tmp_path / "x")
    assert done.returncode == 1 and "numbers with commas" in done.stderr and not list(tmp_path.iterdir())
