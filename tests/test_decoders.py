"""Causal language models against transformers: whole sequences, chunks, single steps, and greedy generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoders import DECODERS, VOCABULARY, make

import jisu

FAST = ("llama_tied", "mistral", "mixtral")


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


def test_unequal_prompts_equal_single_ones() -> None:
    program = jisu.compile(make("llama_tied"))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3], [90, 2, 40]]
    together = program.generate(prompts, max_new_tokens=12, do_sample=False).sequences
    assert together == [program.generate(p, max_new_tokens=12, do_sample=False).sequences[0] for p in prompts]


@pytest.mark.parametrize("name", ["llama", "mistral"])
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
