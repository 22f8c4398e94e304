"""Whole models for a GPU, on an emulated one: the same kernels, plans and driver calls, a block of threads at a time on this CPU."""

from __future__ import annotations

import copy
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import transformers as hf
from decoders import DECODERS, make
from test_quantization import coded

import jisu
from jisu.compiler import ops
from jisu.compiler.entry import stored
from jisu.compiler.errors import ArtifactError, IndexOutOfRangeError, InputError, TargetError
from jisu.compiler.gpu import DRIVER, Driver
from jisu.compiler.graph import ArrayStorage, Graph, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.launches import CUBIN, PLANS, PTX, Plan
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, fixed, numpy_dtype, symbol
from jisu.passes import layout_passes
from jisu.runtime import cuda
from jisu.runtime import program as program_module
from jisu.runtime.cuda import DeviceExecutable
from jisu.targets import facts
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target


def run_all(graphs: dict[str, Graph], target: Target, folder: Path) -> DeviceExecutable:
    info = compile_graphs(graphs, target, out=folder / "out", cache_dir=folder / "cache")
    return DeviceExecutable(info.code(), info.entries)


def test_functions_of_a_machine_without_a_c_library(emulated_gpu: Target, tmp_path: Path) -> None:
    """In float64, far more exactly than float32 wants it, for small, large and special arguments."""
    count = 400
    spread = np.concatenate(
        [np.linspace(-9, 9, count // 2), np.sign(np.linspace(-1, 1, count // 2)) * np.logspace(-12, 9, count // 2)]
    )
    x, y = (placeholder(n, TensorType((count,), "float64")) for n in "xy")
    within = {
        "acosh": np.abs(spread) + 1,
        "asin": np.tanh(spread),
        "acos": np.tanh(spread),
        "atanh": np.tanh(spread) * 0.99,
    }
    positive = {n: np.abs(spread) + 1e-300 for n in ("log", "log2", "log10")} | {"log1p": np.abs(spread) - 0.5}
    small = {n: np.clip(spread, -700, 700) for n in ("sinh", "cosh", "exp", "expm1", "exp2")}
    graphs, given = {}, {}
    for op in ops.OPS.values():
        if op not in ops.ELEMENTWISE or op.name not in {
            *within,
            *positive,
            *small,
            "sin",
            "cos",
            "tan",
            "atan",
            "tanh",
            "erf",
        }:
            continue
        graphs[op.name] = Graph((x,), (op(x),))
        given[op.name] = [{**within, **positive, **small}.get(op.name, spread)]
    graphs |= {
        "pow": Graph((x, y), (ops.pow_(x, y),)),
        "atan2": Graph((x, y), (ops.atan2(x, y),)),
        "fmod": Graph((x, y), (ops.fmod(x, y),)),
    }
    other = np.random.default_rng(0).permutation(spread) + 0.5
    given |= {
        "pow": [np.abs(np.clip(spread, -50, 50)), np.clip(other, -30, 30)],
        "atan2": [spread, other],
        "fmod": [spread, other],
    }
    assert len(graphs) > 20
    run = run_all(graphs, emulated_gpu, tmp_path)
    for name, graph in graphs.items():
        (got,), (want,) = run.call(name, given[name]), interpret(graph, given[name])
        tolerance = 2e-13 if name in ("pow", "tan", "sin", "cos", "acosh") else 2e-15
        np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=1e-15 if name in ("sin", "cos", "tan") else 0, err_msg=name
        )


@pytest.mark.parametrize(
    ("mcpu", "dtype"),
    [
        ("sm_90a", "bfloat16"),
        *(pytest.param("sm_90", d, marks=pytest.mark.slow) for d in ("bfloat16", "float16")),
    ],
)
def test_layers(mcpu: str, dtype: str, emulated_gpu: Target, tmp_path: Path) -> None:
    """Linear layers of floats and of codes, with all that follows them, for few rows and for many."""
    target = attrs.evolve(emulated_gpu, mcpu=mcpu, cores=1)
    rng = np.random.default_rng(0)
    plain: dict[str, Graph] = {}

    def matrix(name: str, shape: tuple[int, ...], held: dict[str, Storage]) -> Any:
        values = rng.standard_normal(shape) * shape[-1] ** -0.5
        held[name] = ArrayStorage(values.astype(numpy_dtype(dtype)))
        return weight(name, TensorType(shape, dtype))

    for k, n in ((64, 70), (160, 130)):
        held: dict[str, Storage] = {}
        x = placeholder("x", TensorType((symbol("m"), k), dtype))
        w, v, u = (matrix(c, (n, k), held) for c in "wvu")
        wider, bias = matrix("wider", (n + 30, k), held), matrix("b", (n,), held)
        outputs: tuple[Any, ...] = (
            ops.linear(x, w), ops.linear(x, w, bias, ops.linear(x, v), activation="gelu_tanh"),
            ops.gated_linear(x, u, v, activation="silu"), ops.linear(x, wider),
        )  # fmt: skip
        plain[f"floats{k}"] = Graph((x,), outputs, held)
    for scheme, symmetric, k, group in (
        ("int4", True, 256, 64),
        ("int4", False, 384, 128),
        ("int8", True, 256, 0),
        ("int8", False, 96, 32),
        ("int3", False, 256, 128),
        ("int6", True, 256, 128),
        ("fp8", True, 256, 0),
        ("mxfp4", True, 256, 32),
        ("nvfp4", True, 256, 16),
        ("nf4", True, 256, 64),
    ):
        held = {}
        x = placeholder("x", TensorType((symbol("m"), k), dtype))
        w, v = (coded(c, SCHEMES[scheme], (70, k), group, symmetric, dtype, held) for c in "wv")
        bias = matrix("b", (70,), held)
        outputs = (
            ops.linear(x, w), ops.linear(x, w, bias, ops.linear(x, v), activation="relu"),
            ops.gated_linear(x, w, v, activation="silu"),
        )  # fmt: skip
        plain[f"{scheme}{group}"] = Graph((x,), outputs, held)
    panel, pair = facts.of(target).packing(target)
    laid_out = {name: Pipeline(layout_passes(panel, pair)).run(graph)[0] for name, graph in plain.items()}
    run = run_all(laid_out, target, tmp_path)
    for name, graph in laid_out.items():
        weights = {n: s.numpy() for n, s in stored(graph).items()}
        for m in (1, 12, 30, 40, 130):
            array = rng.standard_normal((m, int(plain[name].inputs[0].shape[1]))).astype(numpy_dtype(dtype))  # type: ignore[arg-type]
            for got, want in zip(run.call(name, [array], weights), interpret(plain[name], [array]), strict=True):
                assert relative_error(np.asarray(got), want) < (2e-2 if dtype == "bfloat16" else 3e-3), (name, m)


@pytest.mark.parametrize("codes", [False, True])
def test_norms_of_some_of_the_rows(codes: bool, emulated_gpu: Target, tmp_path: Path) -> None:
    """Of a layer's results only the last tokens are normed, by the launch behind it, or, of one token, by the same."""
    b, s, dtype, n = symbol("b"), symbol("s"), "bfloat16", 72
    rng, held = np.random.default_rng(0), dict[str, Storage]()
    x = placeholder("x", TensorType((b, s, 128), dtype))
    if codes:
        w = coded("w", SCHEMES["int8"], (n, 128), 0, True, dtype, held)
    else:
        held["w"] = ArrayStorage((rng.standard_normal((n, 128)) / 11).astype(numpy_dtype(dtype)))
        w = weight("w", TensorType((n, 128), dtype))
    held["g"] = ArrayStorage(rng.standard_normal(n).astype(numpy_dtype(dtype)))
    gain, found = weight("g", TensorType((n,), dtype)), {}
    for name, begin, end in (
        ("last", (0, s - 1), (b, s)),
        ("two", (0, s - 2), (b, s)),
        ("sequence", (b - 1, 0), (b, s)),
    ):
        part = ops.slice_(ops.linear(x, w), starts=(*begin, 0), stops=(*end, n), steps=(1, 1, 1))
        found[name] = Graph((x,), (ops.rms_norm(part, gain, eps=1e-5),), held)
    panel, pair = facts.of(emulated_gpu).packing(emulated_gpu)
    laid_out = {name: Pipeline(layout_passes(panel, pair)).run(graph)[0] for name, graph in found.items()}
    run = run_all(laid_out, emulated_gpu, tmp_path)
    for name, graph in laid_out.items():
        weights = {n: a.numpy() for n, a in stored(graph).items()}
        for batch, length in ((1, 1), (1, 5), (3, 7), (2, 100)):
            if name == "two" and length == 1:
                continue
            env = {"b": batch, "s": length}
            assert len(run._plans[name].launches(env)) == 1 + (batch * length > 1), (name, env)
            array = rng.standard_normal((batch, length, 128)).astype(numpy_dtype(dtype))
            (got,), (want,) = run.call(name, [array], weights), interpret(found[name], [array])
            assert relative_error(np.asarray(got), want) < 2e-2, (name, env)


# --- Models -------------------------------------------------------------------------------------------------------------


def llama(**how: Any) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, max_position_embeddings=1024, **how,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def qwen3() -> Any:
    torch.manual_seed(1)
    config = hf.Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, head_dim=128,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.Qwen3ForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(2)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_positions=128, n_embd=128, n_layer=1, n_head=2)).eval()


def gemma2() -> Any:
    torch.manual_seed(3)
    config = hf.Gemma2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=64,
        num_key_value_heads=1, max_position_embeddings=256, sliding_window=24, query_pre_attn_scalar=64,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config).eval()


FAMILIES: dict[str, Callable[[], Any]] = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "gemma2": gemma2}
SLOW = {*((f, torch.float32) for f in ("llama", "qwen3", "gemma2")), *((f, torch.float16) for f in ("llama", "qwen3"))}
PROMPT = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58, 20, 9, 74, 94, 45, 9, 23]]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        # Generic kernels of float32 take an emulated GPU the longest.
        pytest.param(f, d, marks=pytest.mark.slow if (f, d) in SLOW else [])
        for f in FAMILIES
        for d in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_decoders_equal_the_model(family: str, dtype: torch.dtype, emulated_gpu: Target) -> None:
    """Logits of the whole prompt, and the tokens that the CPU's program generates."""
    model = FAMILIES[family]().to(dtype)
    program = jisu.compile(model, target=emulated_gpu)
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        want, exact = model(ids).logits.float(), FAMILIES[family]()(ids).logits
    got = program(ids).logits.float()
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert (got - exact).abs().mean() <= max(1.2 * float((want - exact).abs().mean()), 1e-6)
    if dtype is torch.float32:
        on_cpu = jisu.compile(model).generate(PROMPT, max_new_tokens=12)
        assert program.generate(PROMPT, max_new_tokens=12).sequences == on_cpu.sequences
        assert "narrowed_by_mass" in str(program.explain()["kernels"])
        how: dict[str, Any] = {
            "do_sample": True,
            "top_k": 20,
            "top_p": 0.9,
            "temperature": 0.8,
            "seed": 3,
            "max_new_tokens": 12,
        }
        assert program.generate(PROMPT, **how).sequences == jisu.compile(model).generate(PROMPT, **how).sequences


@pytest.mark.parametrize(
    "recipe", ["w4a16", "int8", *(pytest.param(r, marks=pytest.mark.slow) for r in ("w8a16", "int4"))]
)
def test_compressed_decoders(recipe: str, emulated_gpu: Target) -> None:
    model = llama().bfloat16()
    program, on_cpu = (jisu.compile(model, target=t, recipe=recipe) for t in (emulated_gpu, "cpu"))
    ids = np.array(PROMPT)
    got, want = (np.asarray(p(ids).logits, np.float32) for p in (program, on_cpu))
    assert np.abs(got - want).max() <= 3e-2 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral(dtype: torch.dtype, emulated_gpu: Target) -> None:
    torch.manual_seed(5)
    exact = hf.AutoModelForCausalLM.from_config(DECODERS["mixtral"]()).eval()
    model = copy.deepcopy(exact).to(dtype)
    program = jisu.compile(model, target=emulated_gpu)
    used = {name for k in program.explain()["kernels"] if "experts" in k["op"] for name in k["choices"]}
    assert any("expert" in name for name in used), used
    ids = torch.tensor([[1, 5, 7, 2, 9]])
    with torch.no_grad():
        want = model(ids).logits.float()
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    assert (program(ids).logits.float() - want).abs().max() <= tolerance * want.abs().max()
    if dtype is torch.float32:
        on_cpu = jisu.compile(model).generate(ids.tolist(), max_new_tokens=8)
        assert program.generate(ids.tolist(), max_new_tokens=8).sequences == on_cpu.sequences


def test_gpt_oss(emulated_gpu: Target) -> None:
    """Experts with biases and a gate of their own: both products are kernels, of a prompt and of single tokens."""
    model = make("gpt_oss")
    program = jisu.compile(model, target=emulated_gpu)
    layers = [k for k in program.explain()["kernels"] if "expert_linear" in k["op"]]
    assert layers and all("expert" in k["choices"][0] for k in layers), layers
    ids = torch.tensor([[1, 5, 7, 2, 9, 11, 3, 8, 4, 13, 2]])
    with torch.no_grad():
        want = model(ids).logits
    assert (program(ids).logits - want).abs().max() <= 1e-4 * want.abs().max()
    session = program.session()
    steps = np.concatenate([session.append(ids[:, i : i + 1].numpy()) for i in range(ids.shape[1])], 1)
    assert np.abs(steps - want.numpy()).max() <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize(("mcpu", "dtype"), [("sm_90a", "bfloat16"), ("sm_90", "bfloat16"), ("sm_90", "float32")])
def test_expert_linear(mcpu: str, dtype: str, emulated_gpu: Target, tmp_path: Path) -> None:
    """As `test_experts`, layer by layer: inputs of a token for all its choices and of each, with biases and without."""
    rng = np.random.default_rng(1)
    graphs: dict[str, Graph] = {}
    for count, chosen, rows, inputs, outputs, index, biased in (
        (4, 2, 1, 64, 136, "int64", True),
        (9, 3, 3, 72, 64, "int32", False),
        (2, 1, 1, 24, 20, "int64", True),
    ):
        placed = [
            placeholder(n, TensorType((symbol("t"), *shape), kind))
            for n, shape, kind in (("x", (rows, inputs), dtype), ("index", (chosen,), index))
        ]
        held = {"w": rng.standard_normal((count, outputs, inputs)), "b": rng.standard_normal((count, outputs))}
        weights = {
            n: ArrayStorage((v * inputs**-0.5).astype(numpy_dtype(dtype)))
            for n, v in held.items()
            if n == "w" or biased
        }
        made = [weight(n, TensorType(s.shape, dtype)) for n, s in weights.items()]
        graphs[f"e{count}"] = Graph(tuple(placed), (ops.expert_linear(*placed, *made),), weights)
    run = run_all(graphs, attrs.evolve(emulated_gpu, mcpu=mcpu), tmp_path)
    for name, graph in graphs.items():
        x, numbers = (n.tensor for n in graph.inputs)
        count = graph.weights["w"].shape[0]
        arrays = {n: w.numpy() for n, w in graph.weights.items()}
        for tokens in (1, 9, 50, 100, 300) if name == "e4" else (1, 50):
            given = [
                rng.standard_normal((tokens, *map(fixed, x.shape[1:]))).astype(numpy_dtype(dtype)),
                rng.integers(-1, count + 1, (tokens, fixed(numbers.shape[1]))).astype(numbers.dtype),
            ]
            (got,), (want,) = run.call(name, given, arrays), interpret(graph, given)
            assert relative_error(np.asarray(got), want) < (1e-5 if dtype == "float32" else 2e-2), (name, tokens)
            outside = (given[1] < 0) | (given[1] >= count)
            assert not np.asarray(got, np.float32)[outside].any()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mcpu", ["sm_90", "sm_90a"])
def test_experts(mcpu: str, packed: bool, dtype: str, emulated_gpu: Target, tmp_path: Path) -> None:
    """From one token to so many that experts multiply tiles; numbers that are no expert's; widths that end within tiles."""
    if mcpu == "sm_90a" and (dtype == "float32" or not packed):
        pytest.skip("the same as on sm_90")
    target = attrs.evolve(emulated_gpu, mcpu=mcpu)
    rng = np.random.default_rng(1)
    graphs: dict[str, Graph] = {}
    plain: dict[str, Graph] = {}
    panel, pair = facts.of(target).packing(target)
    for count, chosen, hidden, inner, index in (
        (4, 2, 64, 72, "int64"),
        (9, 3, 128, 64, "int32"),
        (3, 1, 20, 12, "int64"),
    ):
        held: dict[str, Storage] = {}
        x, numbers, scores = (
            placeholder(n, TensorType((symbol("t"), width), kind))
            for n, width, kind in (("x", hidden, dtype), ("index", chosen, index), ("scores", chosen, dtype))
        )
        matrices: list[Any] = []
        for name, shape in (("up", (count, 2 * inner, hidden)), ("down", (count, hidden, inner))):
            held[name] = ArrayStorage((rng.standard_normal(shape) * shape[-1] ** -0.5).astype(numpy_dtype(dtype)))
            matrices.append(weight(name, TensorType(shape, dtype)))
        name = f"e{count}"
        plain[name] = Graph(
            (x, numbers, scores), (ops.experts(x, numbers, scores, *matrices, activation="silu"),), held
        )
        passes = layout_passes(panel, pair) if packed else ()
        graphs[name] = Pipeline(passes).run(plain[name])[0]
        assert packed == (ops.packed_experts in {n.op for n in graphs[name].nodes})
    run = run_all(graphs, target, tmp_path)
    for name, graph in graphs.items():
        weights = {n: s.numpy() for n, s in stored(graph).items()}
        _, chosen, hidden = (fixed(d) for d in (0, plain[name].inputs[1].shape[1], plain[name].inputs[0].shape[1]))
        count = int(name[1:])
        for tokens in (1, 3, 20, 150, 500):
            given = [
                rng.standard_normal((tokens, hidden)).astype(numpy_dtype(dtype)),
                rng.integers(-1, count + 1, (tokens, chosen)).astype(plain[name].inputs[1].dtype),
                rng.random((tokens, chosen)).astype(numpy_dtype(dtype)),
            ]
            (got,), (want,) = run.call(name, given, weights), interpret(plain[name], given)
            bound = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}[dtype]
            assert relative_error(np.asarray(got), want) < bound, (name, tokens)


def test_an_encoder(emulated_gpu: Target) -> None:
    torch.manual_seed(4)
    config = hf.BertConfig(
        vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192,
        max_position_embeddings=64,
    )  # fmt: skip
    model = hf.BertModel(config).eval()
    ids = torch.tensor([list(range(1, 41))])
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        own = model.to(dtype)
        program = jisu.compile(own, target=emulated_gpu, example_inputs=(ids,))
        with torch.no_grad():
            want = own(ids).last_hidden_state.float()
        got = program(ids).last_hidden_state.float()
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_batches_padding_and_growing_caches(emulated_gpu: Target) -> None:
    """Sequences of unlike length alone and together, past the slots that a session reserves at first."""
    program = jisu.compile(llama().bfloat16(), target=emulated_gpu)
    long = [(7 * i) % 96 for i in range(250)]
    alone = [program.generate([p], max_new_tokens=10).sequences[0] for p in (long, PROMPT[0])]
    assert program.generate([long, PROMPT[0]], max_new_tokens=10).sequences == alone


def test_steps_are_graphs(emulated_gpu: Target, emulated_driver: ctypes.CDLL) -> None:
    """Most launches of which begin early; memory comes back."""
    program = jisu.compile(llama().bfloat16(), target=emulated_gpu)
    before, early = emulated_driver.emulated_graphs(), emulated_driver.emulated_early()
    program.generate(PROMPT, max_new_tokens=10)
    assert emulated_driver.emulated_graphs() - before > 6
    assert emulated_driver.emulated_early() - early > 6 * 20
    held = emulated_driver.emulated_bytes()
    for _ in range(3):
        program.generate(PROMPT, max_new_tokens=3)
    assert emulated_driver.emulated_bytes() <= held * 1.05


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_generate_token_for_token(dtype: torch.dtype, emulated_gpu: Target) -> None:
    """As transformers generates; in bfloat16 another token may stand where rounding lets two change places."""
    model = llama().to(dtype)
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        logits = model(wanted).logits.float()
    program = jisu.compile(model, target=emulated_gpu)
    if dtype is torch.float32:
        assert program.generate(PROMPT, max_new_tokens=12).sequences == wanted[:, ids.shape[1] :].tolist()
    session = program.session()
    given = wanted.numpy()
    session.append(given[:, : ids.shape[1] - 1], last_only=True)
    for place in range(ids.shape[1] - 1, wanted.shape[1] - 1):
        chosen = int(np.asarray(session.append(given[:, place : place + 1])).argmax())
        best = logits[0, place]
        assert best.max() - best[chosen] <= (0 if dtype is torch.float32 else 2e-2) * best.abs().max(), place


@pytest.mark.parametrize(
    "cache",
    [
        "page = 16",
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ("ring = true", 'scheme = "int8"', 'scheme = "fp8"', 'page = 16\nscheme = "int4"')
        ),
    ],
)
def test_caches(cache: str, emulated_gpu: Target) -> None:
    recipe = jisu.Recipe.from_toml(f"[cache]\n{cache}\n")
    model = gemma2() if "ring" in cache else qwen3() if "int4" in cache else llama()
    for dtype in (torch.float32, torch.bfloat16):
        own = model.to(dtype)
        program = jisu.compile(own, target=emulated_gpu, recipe=recipe)
        session, on_cpu = (p.session() for p in (program, jisu.compile(own, recipe=recipe)))
        for part in np.array_split(np.array(PROMPT), 5, axis=1):
            got, want = (np.asarray(s.append(part), np.float32) for s in (session, on_cpu))
            assert np.abs(got - want).max() <= (1e-4 if dtype is torch.float32 else 4e-2) * np.abs(want).max()


def test_a_program_is_saved_and_loaded(emulated_gpu: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3().bfloat16()
    program = jisu.compile(model, target=emulated_gpu)
    path = tmp_path / "q.jisu"
    program.save(path)
    one, other = (p.generate(PROMPT, max_new_tokens=5).sequences for p in (jisu.load(path), program))
    assert one == other
    monkeypatch.setenv(DRIVER, str(tmp_path / "libnone.so"))
    elsewhere = jisu.load(path)  # to look at it
    assert elsewhere.explain()["kernels"]
    with pytest.raises(TargetError, match="NVIDIA driver"):
        elsewhere.generate(PROMPT, max_new_tokens=2)


def test_programs_for_machines_that_are_not_here(tmp_path: Path, emulated_driver: ctypes.CDLL) -> None:
    """Compiled anywhere: PTX and, with an assembler, machine code; what runs says so where it can't."""
    model = qwen3().bfloat16()
    for name in ("cuda:sm_80", "cuda:sm_90", "nvidia/h200", "cuda:sm_120"):
        program = jisu.compile(model, target=name)
        code = program._parts.code
        assert {PTX, PLANS} <= set(code) and b".entry" in code[PTX]
        data = json.loads(code[PLANS])
        plans = {entry: Plan.from_json(plan) for entry, plan in data["entries"].items()}
        for step in (step for plan in plans.values() for step in plan.steps):
            kernels = [[launch.kernel for launch in variant.launches] for variant in step if not variant.at_most]
            # On a GPU that is newer than the machine code, one of them is there.
            assert any(all(f".entry {k}(".encode() in code[PTX] for k in own) for own in kernels), kernels
        if CUBIN in code:
            assert code[CUBIN][:4] == b"\x7fELF"
        program.save(tmp_path / f"{name.replace('/', '-')}.jisu")
    with pytest.raises(TargetError, match="compiled for sm_120 and newer, and the GPU here .* is sm_90"):
        program.generate(PROMPT, max_new_tokens=1)


@pytest.mark.parametrize(
    ("target", "early"), [pytest.param("cuda:sm_80", False, marks=pytest.mark.slow), ("cuda:sm_90", True)]
)
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", ""),
        ("qwen3", "[cache]\npage = 16"),
        ("llama", "w4a16"),
        ("qwen3", '[cache]\nscheme = "int8"'),
        ("llama", "int8"),
        ("llama", "int4"),
    ],
)
def test_launches_of_a_layer(family: str, recipe: str, target: str, early: bool) -> None:
    """One token takes six of them: queries, keys and values; their heads; attention; its output and a norm; gates and ups; down and a norm.
    Outside layers it takes four more: its embedding, that one's norm, rotary angles, logits.
    From sm_90 on launches may begin before those before them end."""
    how = jisu.Recipe.from_toml(recipe) if "[" in recipe else recipe or None
    layers, config = 3, FAMILIES[family]().config
    config.num_hidden_layers, config.layer_types, config.intermediate_size = layers, ["full_attention"] * layers, 256
    torch.manual_seed(0)
    program = jisu.compile(hf.AutoModelForCausalLM.from_config(config).bfloat16().eval(), target=target, recipe=how)
    plan = Plan.from_json(json.loads(program._parts.code[PLANS])["entries"]["append_last"])
    # Norms of several rows, and records of gates and ups, are launches of their own.
    for batch, each in ((1, 6), (2, 9 if recipe.startswith("int") else 8)):
        launches = plan.launches({"batch": batch, "sequence": 1, "capacity": 64, "pages": 8, "sequence_pages": 4})
        heads = [i for i, launch in enumerate(launches) if "_heads_" in launch.kernel]
        assert [b - a for a, b in zip(heads, heads[1:], strict=False)] == [each] * (layers - 1)
        assert batch > 1 or len(launches) == 6 * layers + 4
        assert {launch.early for launch in launches} == {early}
    (told,) = (e for e in program.explain()["launches"] if e["entry"] == "append_last")
    launches = plan.launches({"batch": 1, "sequence": 1, "capacity": 256, "pages": 256, "sequence_pages": 256})
    assert (told["launches"], told["early"]) == (len(launches), (len(launches) - 1) * early)
    assert told["gaps_s"] == pytest.approx(0 if early else (len(launches) - 1) * 1e-6)


def test_the_gpu_that_is_present(emulated_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Target.resolve("cuda")
    assert found.cores == 4 and "Emulated GPU" in found.source and found.mcpu.startswith("sm_90")
    monkeypatch.setenv(DRIVER, str(tmp_path / "libnone.so"))
    with pytest.raises(TargetError, match="no NVIDIA driver.*'cuda:sm_90'"):
        Target.resolve("cuda")


@pytest.mark.parametrize(
    ("name", "number", "cores", "found"),
    [
        ("NVIDIA H200", (9, 0), 132, "nvidia/h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "nvidia/h100"),
        ("NVIDIA H100 PCIe", (9, 0), 114, "cuda:sm_90"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "nvidia/a100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "nvidia/rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, "cuda:sm_89"),
        ("NVIDIA GeForce RTX 4080", (8, 9), 76, "cuda:sm_89"),
    ],
)
def test_a_gpu_has_the_speeds_of_its_product(
    name: str, number: tuple[int, int], cores: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimpleNamespace(name=name, capability=number, multiprocessors=cores)
    monkeypatch.setattr(Driver, "open", lambda: driver)
    target = Target.resolve("cuda")
    assert (target.name, target.cores) == (found, cores) and name in target.source
    assert target.memory_bandwidth == Target.describe(found).memory_bandwidth


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated GPU's memory is this machine's: any tensor counts as one there."""
    kept, zeros = [], torch.zeros

    def keeping(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            kept.append(make(*args))  # a GPU's allocator gives memory to later work of the same stream only
            return kept[-1]

        return made

    for name in ("_torchs", "_for_torch"):
        monkeypatch.setattr(DeviceExecutable, name, keeping(getattr(DeviceExecutable, name)))
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "is_device_tensor", lambda v: isinstance(v, torch.Tensor))


def test_tensors_of_torch_on_the_gpu(
    emulated_gpu: Target, emulated_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is done before torch's stream is waited for, and then all of it."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU())
    table = torch.nn.Embedding(5, 64)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    program = jisu.compile(layer, target=emulated_gpu, example_inputs=(x,))
    looked_up = jisu.compile(table, target=emulated_gpu, example_inputs=(torch.tensor([1, 2]),))
    want = program(x)

    def waited(result: Any) -> np.ndarray:
        with Driver.open().current():
            assert emulated_driver.cuStreamSynchronize(None) == 0
        return np.asarray(result.detach().numpy())

    as_on_a_gpu(monkeypatch)
    for _ in range(3):
        found = program(x)
        assert not found.detach().any()
        np.testing.assert_array_equal(waited(found), want.detach().numpy())
    for strided in (torch.cat([x, x], 1)[:, ::2][:, :64], torch.cat([x[0, :1], x.flatten()])[1:].view(7, 64)):
        np.testing.assert_allclose(waited(program(strided)), layer(strided).detach(), rtol=1e-4, atol=1e-5)
    waited(looked_up(torch.tensor([1, 5])))
    with monkeypatch.context() as patch, pytest.raises(IndexOutOfRangeError):
        patch.setattr(program_module, "interpret", lambda *_: pytest.fail("nothing here reads a GPU's memory"))
        looked_up(torch.tensor([1, 2]))
    np.testing.assert_array_equal(waited(looked_up(torch.tensor([1, 2]))), table(torch.tensor([1, 2])).detach())


def test_tensors_of_torch_that_are_updated(
    emulated_gpu: Target, emulated_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of the caller's changes also where kernels updated a copy of it: strided, or not aligned; what can't change is refused."""
    cache = placeholder("cache", TensorType((1, 2, 4, 8), "float32"))
    new = placeholder("new", TensorType((1, 1, 2, 8), "float32"))
    at = placeholder("at", TensorType((1,), "int64"))
    run = run_all(
        {"main": Graph((cache, new, at), (ops.cache_append(cache, new, at, None, ring=False),))}, emulated_gpu, tmp_path
    )
    as_on_a_gpu(monkeypatch)
    copied = torch.Tensor.copy_

    def copy_behind(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:  # as on torch's stream
        with Driver.open().current():
            assert emulated_driver.cuStreamSynchronize(None) == 0
        return copied(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_behind)
    whole, strided, unaligned = (
        torch.zeros(1, 2, 4, 8),
        torch.zeros(1, 4, 2, 8).transpose(1, 2),
        torch.zeros(68)[1:65].view(1, 2, 4, 8),
    )
    step = [torch.ones(1, 1, 2, 8), torch.tensor([2])]
    for tensor in (whole, strided, unaligned):
        assert run.call_there("main", [tensor, *step])[0] is tensor
        with Driver.open().current():
            assert emulated_driver.cuStreamSynchronize(None) == 0
        assert tensor[0, :, 2].all() and tensor.sum() == 16
    with pytest.raises(InputError, match=r"'cache' .* share memory .*strides \[32, 0, 8, 1\].*x.contiguous"):
        run.call_there("main", [torch.zeros(1, 1, 4, 8).expand(1, 2, 4, 8), *step])
    with pytest.raises(InputError, match="'cache' is updated in place: give a tensor on the GPU"):
        run.call_there("main", [np.zeros((1, 2, 4, 8), np.float32), *step])


def test_faults_are_told(emulated_gpu: Target, tmp_path: Path) -> None:
    """An index outside is an error of the call that met it, and of no other."""
    n = symbol("n")
    table, ids = placeholder("table", TensorType((5, 8), "float32")), placeholder("ids", TensorType((n,), "int64"))
    graph = Graph((table, ids), (ops.take(table, ids, axis=0, wrap=False),))
    run = run_all({"main": graph}, emulated_gpu, tmp_path)
    rows = np.arange(40, dtype=np.float32).reshape(5, 8)
    for _ in range(3):  # the second and third time it is a graph
        with pytest.raises(IndexOutOfRangeError, match="axis of size 5"):
            run.call("main", [rows, np.array([1, 5])])
        np.testing.assert_array_equal(run.call("main", [rows, np.array([4, 0])])[0], rows[[4, 0]])
    with pytest.raises(InputError, match="expected float32"):
        run.call("main", [rows.astype(np.float64), np.array([1])])
    with pytest.raises(ArtifactError, match="plans"):
        DeviceExecutable({PLANS: b"{}"}, {})
