"""Causal language models against transformers: whole sequences, chunks, single steps, and greedy generation."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoders import DECODERS, VOCABULARY, make
from transformers.integrations.moe import batched_mm_experts_forward

import jisu
from jisu.compiler import ops
from jisu.frontends import huggingface
from jisu.frontends.to_torch import MEANINGS

FAST = ("llama_tied", "mistral", "mixtral", "gpt_oss")


def parameters() -> list[object]:
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]


@pytest.mark.parametrize("name", parameters())
def test_equals_transformers(name: str) -> None:
    model = make(name)
    program = jisu.compile(model, recipe={"prefill_chunk": 16})
    assert program.decoder is not None and not program.decoder.reason, program.decoder
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids).logits.numpy()
    atol = 1e-4 * max(1.0, float(np.abs(want).max()))
    got = program(ids)
    assert type(got).__name__ == "CausalLMOutputWithPast"
    np.testing.assert_allclose(got.logits.numpy(), want, atol=atol, rtol=0)

    for chunks in ([13, 1, 16, 10], [1] * 40):
        session, done = program.session(), 0
        for size in chunks:
            part = session.append(ids[:, done : done + size].numpy())
            np.testing.assert_allclose(part, want[:, done : done + size], atol=atol, rtol=0)
            done += size
        assert session.length == 40

    prompt = ids[:1, :20]
    with torch.no_grad():
        tokens = model.generate(prompt, max_new_tokens=64, do_sample=False)[0, 20:].tolist()  # type: ignore[operator]
    assert program.generate(prompt.numpy(), max_new_tokens=64, do_sample=False).sequences[0] == tokens


class _Experts(torch.nn.Module):
    """What transformers' `use_experts_implementation` says of experts, of any form."""

    def __init__(self, gate: bool, bias: bool, transposed: bool, normed: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = gate, bias, transposed, normed
        self.num_experts, self._is_expert_parallel, self.is_concatenated = 5, False, False
        self.post_expert_norm = torch.nn.LayerNorm(6)
        self.act_fn = torch.nn.Tanh()
        for name, rows, columns in (("gate_up_proj" if gate else "up_proj", 8, 6), ("down_proj", 6, 4 if gate else 8)):
            shape = (5, columns, rows) if transposed else (5, rows, columns)
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(5, rows)))

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return both[:, ::2].clamp(max=1) * (both[:, 1::2] + 1)


@pytest.mark.parametrize("form", list(itertools.product((False, True), repeat=4)))
def test_experts_layer_by_layer(form: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gates and without, biases, matrices either way round, norms behind: what transformers computes of them."""
    torch.manual_seed(0)
    monkeypatch.setattr(huggingface, "_expert_linear_op", MEANINGS[ops.expert_linear])
    module, x = _Experts(*form), torch.randn(7, 6)
    index, scores = torch.randint(0, 5, (7, 3)), torch.rand(7, 3)
    got = huggingface._experts(module, x, index, scores)
    torch.testing.assert_close(got, batched_mm_experts_forward(module, x, index, scores))


def test_unequal_prompts_equal_single_ones() -> None:
    program = jisu.compile(make("llama_tied"))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3], [90, 2, 40]]
    together = program.generate(prompts, max_new_tokens=12, do_sample=False).sequences
    assert together == [program.generate(p, max_new_tokens=12, do_sample=False).sequences[0] for p in prompts]


@pytest.mark.parametrize("name", ["mistral", pytest.param("llama", marks=pytest.mark.slow)])
def test_paged_cache_equals_contiguous(name: str) -> None:
    model = make(name)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 37))
    plain, paged = jisu.compile(model), jisu.compile(model, recipe={"cache": {"page": 4}})
    a, b = plain.session(), paged.session()
    for size in (10, 1, 1, 20, 5):
        piece = ids[:, a.length : a.length + size]
        np.testing.assert_allclose(a.append(piece), b.append(piece), atol=1e-5)


def test_a_ring_is_as_long_as_the_window() -> None:
    program = jisu.compile(make("mistral"), recipe={"prefill_chunk": 4})
    session = program.session()
    for _ in range(10):
        session.append(np.ones((1, 13), np.int64))
    assert {s.shape[2] for s in session._state} == {8 + 4 - 1}


def test_bfloat16_is_as_close_as_eager() -> None:
    """The distance to the float32 model is that of eager bfloat16, within a factor for another order of rounding."""
    exact = make("llama")
    rounded = make("llama", torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, eager = exact(ids).logits, rounded(ids).logits
    got = jisu.compile(rounded)(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 1.5 * (eager.float() - want).abs().mean()


UNCACHED: dict[str, tuple[transformers.PreTrainedConfig, str]] = {
    # Biases that grow with the distance, computed from the mask.
    "bloom": (
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "scan.*earlier tokens",
    ),
    # Adds its mask to its scores by itself.
    "falcon": (
        transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
        ),
        "length of the whole sequence",
    ),
    # Every token reads every other.
    "bert": (
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
        ".",
    ),
    # Makes positions from its tokens, behind an offset.
    "roberta": (
        transformers.RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            is_decoder=True,
        ),
        "scan.*earlier tokens",
    ),
    # Slices a table of positions.
    "openai-gpt": (
        transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4),
        "operands have the sequence",
    ),
}
"""Models for which no cache is derived, with what the reason says."""


@pytest.mark.parametrize("name", [n if n == "falcon" else pytest.param(n, marks=pytest.mark.slow) for n in UNCACHED])
def test_without_a_cache(name: str) -> None:
    """Where the proof fails, the program computes whole sequences, gives the same results, and says why."""
    config, reason = UNCACHED[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    program = jisu.compile(model)
    assert program.decoder is not None and re.search(reason, program.decoder.reason), program.decoder
    assert program.explain()["cache"] == program.decoder.reason
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids).logits.numpy()
    np.testing.assert_allclose(program(ids).logits.numpy(), want, atol=1e-4)
    greedy = ids[:1]
    for _ in range(5):
        with torch.no_grad():
            token = model(greedy).logits[:, -1:].argmax(-1)
        greedy = torch.cat([greedy, token], 1)
    tokens = program.generate(ids[:1].numpy(), max_new_tokens=5, do_sample=False, eos_token_id=None).sequences[0]
    assert tokens == greedy[0, 12:].tolist()


@pytest.mark.slow
def test_attentions_that_share_keys() -> None:
    """Two attentions of a layer read the same keys with other values: each value has a cache, the keys have one."""
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(config).eval()
    program = jisu.compile(model)
    assert program.decoder is not None and not program.decoder.reason
    ids = torch.randint(3, VOCABULARY, (1, 9))
    with torch.no_grad():
        want = model(ids).logits.numpy()
    session = program.session()
    got = np.concatenate([session.append(ids[:, i : i + 3].numpy()) for i in (0, 3, 6)], 1)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_a_model_of_one_length_is_refused_by_name() -> None:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(jisu.UnsupportedError, match=r"MambaForCausalLM.*any length.*example_inputs"):
        jisu.compile(transformers.MambaForCausalLM(config).eval())


_INTEGERS = [{"scheme": "int4", "group": 16, "activations": "int8"}, {"layers": "head", "activations": "int8"}]


@pytest.mark.parametrize(
    ("name", "dtype", "recipe", "op"),
    [
        ("llama_tied", "float32", {"quantize": _INTEGERS}, "levels_projections"),
        ("gpt2", "float32", None, "packed_linear"),
        ("gemma2", "bfloat16", None, "packed_gated_linear"),
        ("mixtral", "float32", None, "packed_experts"),
        ("gpt_oss", "float32", None, "expert_linear"),
        ("qwen3", "float32", {"quantize": {"scheme": "int4", "group": 16}}, "quantized_linear"),
        ("llama", "bfloat16", {"quantize": {"scheme": "nf4", "group": 16}}, "quantized_linear"),
        ("llama", "float32", {"prune": {"pattern": "2:4"}}, "sparse_linear"),
        ("llama", "float32", {"prune": {"pattern": "2:4"}, "quantize": "int8"}, "sparse_linear"),
    ],
)
def test_logits_depend_neither_on_threads_nor_on_the_batch(
    name: str, dtype: str, recipe: Any, op: str, tmp_path: Path
) -> None:
    """Bit by bit: a sequence alone or beside others, with one thread or two, of a prompt and of single tokens."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 21))
    compiled = jisu.compile(make(name, getattr(torch, dtype)), recipe=recipe)
    if op != "sparse_linear" or all(m["predicted_gain"] for m in compiled.explain()["sparse"]):
        assert f"{op}(" in compiled.ir()
    compiled.save(tmp_path / "p.jisu")
    found = []
    for threads in (1, 2):
        program = jisu.load(tmp_path / "p.jisu", num_threads=threads)
        for rows in (slice(0, 3), slice(1, 2)):
            session = program.session()
            steps = [session.append(ids[rows, :19]), session.append(ids[rows, 19:20]), session.append(ids[rows, 20:])]
            found.append(np.concatenate([np.asarray(s) for s in steps], 1)[1 if rows.stop == 3 else 0])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
