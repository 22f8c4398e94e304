"""Generation: the same tokens and the same distribution as transformers, text in safe pieces, clear refusals."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.generation import logits_process

from jisu.compiler import ops
from jisu.compiler.errors import ArtifactError, IndexOutOfRangeError, InputError, InputTypeError
from jisu.compiler.ops.sampling import candidates
from jisu.runtime.executable import Finished
from jisu.runtime.generate import (
    DEFAULT_NEW_TOKENS,
    Chunk,
    Generation,
    GenerationConfig,
    TextStream,
    generate,
    penalize,
)
from jisu.runtime.session import Drawn, Sampling
from jisu.runtime.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
VOCAB = 61
HF: Any = transformers  # partly without types


class BigramSession:
    """The next token's logits depend on the last token alone; padding must never be the last."""

    vocab_size = VOCAB

    def __init__(self, *, capacity: int = 200, table: Logits | None = None) -> None:
        self.table = np.random.default_rng(3).standard_normal((VOCAB, VOCAB)).astype(np.float32) * 3
        if table is not None:
            self.table = table
        self.capacity = capacity
        self.length = self.batch = 0
        self.chunks: list[int] = []

    def append(self, token_ids: Ids, *, start: Ids | None = None, last_only: bool = False) -> Logits:
        assert token_ids.dtype == np.int64
        self.batch = len(token_ids) if self.length == 0 else self.batch
        assert len(token_ids) == self.batch
        assert start is None or self.length == 0
        self.chunks.append(token_ids.shape[1])
        self.length += token_ids.shape[1]
        assert self.length <= self.capacity
        logits = self.table[token_ids]
        return logits[:, -1:] if last_only else logits

    def reset(self) -> None:
        self.length = 0


class DrawingSession(BigramSession):
    """Draws tokens, as a program for a GPU does, and tells how often it did and what was taken back."""

    draws = True

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.drawn = 0
        self.undone: list[int] = []

    def draw(
        self, tokens: Ids | Drawn, sampling: Sampling, uniform: Ids | None = None, *, start: Ids | None = None
    ) -> Drawn:
        self.drawn += 1
        logits = self.append(tokens.value if isinstance(tokens, Drawn) else tokens, start=start, last_only=True)
        parts = np.zeros(self.batch, np.int64) if uniform is None else uniform
        heat, top_k, top_p, min_p = (x[:, None] for x in attrs.astuple(sampling, recurse=False))
        heat, top_p, min_p = (x.astype(np.float32) for x in (heat, top_p, min_p))
        assert ops.draw.meaning is not None
        chosen: Any = ops.draw.meaning(logits, parts[:, None], heat, top_k, top_p, min_p)
        return Drawn(Finished(chosen))

    def undo(self, count: int) -> None:
        self.undone.append(count)
        self.length -= count
        assert self.length >= 0


class TorchSession:
    """A transformers model with its own cache as a session."""

    def __init__(self, model: Any) -> None:
        self.model, self.capacity, self.vocab_size = model, 128, model.config.vocab_size
        self.reset()

    def reset(self) -> None:
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.length, self.start = 0, np.zeros(1, np.int64)

    def append(self, token_ids: Ids, *, start: Ids | None = None, last_only: bool = False) -> Logits:
        if self.length == 0:
            self.start = np.zeros(len(token_ids), np.int64) if start is None else start
        slots = np.arange(self.length + token_ids.shape[1])
        mask = torch.from_numpy((slots >= self.start[:, None]).astype(np.int64))
        positions = torch.from_numpy(np.maximum(slots[self.length :] - self.start[:, None], 0))
        self.length = len(slots)
        with torch.no_grad():
            output = self.model(
                torch.from_numpy(token_ids), attention_mask=mask, position_ids=positions, past_key_values=self.cache
            )
        logits: Logits = output.logits.numpy()
        return logits[:, -1:] if last_only else logits


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.6, bos_token_id=1, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return HF.LlamaForCausalLM(config).eval()


# ------------------------------------------------------------------------------------------- equal to transformers


def reference(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, **options)
    result: list[list[int]] = output[:, width:].tolist()
    return result


PROMPTS = [[5, 9, 3], [7], [8, 8, 2, 40, 11, 60, 3], [9, 1, 33, 2]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"eos_token_id": [17, 3, 29, 44, 50, 51, 52], "pad_token_id": 0},
        {"eos_token_id": [17, 3, 29, 44, 50, 51, 52]},
        {"eos_token_id": list(range(20, 61)), "pad_token_id": 2, "min_new_tokens": 6},
        {"eos_token_id": list(range(20, 40)), "pad_token_id": 2, "repetition_penalty": 1.3, "min_new_tokens": 3},
    ],
)
@pytest.mark.parametrize(("prompts", "chunk"), [(PROMPTS[2:3], 512), (PROMPTS, 2)])
def test_greedy_tokens_equal_transformers(
    model: Any, prompts: list[list[int]], options: dict[str, Any], chunk: int
) -> None:
    make = functools.partial(TorchSession, model)
    ours = generate(make, prompts, {"max_new_tokens": 14, "prefill_chunk": chunk, **options})
    assert ours.sequences == reference(model, prompts, max_new_tokens=14, do_sample=False, **options)
    assert ours.prompt_ids == prompts
    ends = set(options.get("eos_token_id", ()))
    for row, length, reason in zip(ours.sequences, ours.lengths, ours.finish_reasons, strict=True):
        assert (row[length - 1] in ends) == (reason == "eos")
        assert reason == "eos" or length == 14


def test_transformers_config_is_understood(model: Any) -> None:
    config = HF.GenerationConfig(
        max_new_tokens=7, repetition_penalty=1.4, eos_token_id=[3, 4], pad_token_id=0, do_sample=False
    )
    ours = generate(functools.partial(TorchSession, model), PROMPTS, config)
    assert ours.sequences == reference(model, PROMPTS, generation_config=config)
    total = HF.GenerationConfig(max_length=11)
    ours = generate(functools.partial(TorchSession, model), PROMPTS[:1], total)
    assert ours.sequences == reference(model, PROMPTS[:1], generation_config=total) and ours.lengths == [8]


SCORES = st.integers(0, 2**32 - 1).map(
    lambda seed: (np.random.default_rng(seed).standard_normal(300) * 4).astype(np.float32)
)


@settings(max_examples=150, deadline=None)
@given(
    scores=SCORES,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 50, 299, 300, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.01, 0.3, 1.0]),
    ties=st.booleans(),
)
def test_distribution_equals_transformers(
    scores: Logits, temperature: float, top_k: int, top_p: float, min_p: float | None, ties: bool
) -> None:
    if ties and top_p == 1.0:  # of several equal tokens top-p keeps all, transformers those that come first
        scores = np.round(scores)
    warpers = HF.LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(logits_process.MinPLogitsWarper(min_p))
    warped = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(scores)[None].clone())
    expected = torch.softmax(warped.double(), -1)[0].numpy()
    shares = np.float32(top_p), np.float32(min_p or 0)
    ids, weights = candidates(scores, np.float32(temperature), top_k, *shares)
    got = np.zeros(300)
    got[ids] = weights / weights.sum()
    far = expected < 4e-12 * expected.max()  # whose masses are about one, or none
    assert got[far].sum() < 1e-9
    got[far] = expected[far] = 0
    if np.array_equal(got > 0, expected > 0):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)
    else:  # float32 sums may put one token at the border of the nucleus on the other side
        assert top_p not in (0.0, 1.0) and np.count_nonzero((got > 0) != (expected > 0)) == 1


def test_nucleus_of_a_large_vocabulary() -> None:
    rng = np.random.default_rng(0)
    for scale, top_p in ((1.0, 0.3), (1.0, 0.95), (8.0, 0.9), (0.0, 0.5)):
        scores = (rng.standard_normal(5000) * scale).astype(np.float32)
        ids, _ = candidates(scores, np.float32(1), 0, np.float32(top_p), np.float32(0))
        mass = np.exp(scores.astype(np.float64))
        mass /= mass.sum()
        least = mass[ids].min()
        assert mass[ids].sum() >= top_p - 1e-9 > mass[mass > least].sum() - 1e-9  # all that are equal count alike
        assert least > np.delete(mass, ids).max(initial=0)


@pytest.mark.parametrize(("size", "top_k"), [(20_000, 30), (20_000, 5000), (20_001, 1), (128, 3)])
def test_top_k_of_a_large_vocabulary(size: int, top_k: int) -> None:
    scores = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    for values in (scores, np.sort(scores), np.round(scores * 4), np.where(scores > 1, scores, -np.inf)):
        ids, _ = candidates(values.astype(np.float32), np.float32(1), top_k, np.float32(1), np.float32(0))
        np.testing.assert_array_equal(ids, np.flatnonzero(values >= np.sort(values)[-top_k]))


def test_repetition_penalty_equals_transformers() -> None:
    scores = np.array([2.0, -1.0, 0.0, -np.inf, 3.0], np.float32)
    seen = np.array([0, 1, 2, 3])
    expected = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor(seen[None]), torch.tensor(scores[None])
    )
    ours = scores.copy()
    penalize(ours, seen, 1.3)
    np.testing.assert_array_equal(ours, expected[0].numpy())


def test_samples_of_a_row_do_not_depend_on_its_neighbours() -> None:
    config = GenerationConfig(max_new_tokens=30, do_sample=True, seed=11, temperature=2.0)
    first = generate(BigramSession, [[5], [6, 7], [8]], config)
    second = generate(BigramSession, [[5], [9, 9, 9]], config)
    assert first.sequences[0] == second.sequences[0] and first.sequences[0] != first.sequences[1]
    assert generate(BigramSession, [5], GenerationConfig.from_any(config, seed=12)).sequences != [first.sequences[0]]


def test_equal_rows_of_a_batch_are_drawn_independently() -> None:
    config = GenerationConfig(max_new_tokens=30, do_sample=True, seed=11, temperature=2.0)
    first, second = generate(BigramSession, [[5], [5]], config).sequences
    assert first != second


@pytest.mark.parametrize("kind", [BigramSession, DrawingSession])
def test_sampling_refuses_what_is_no_distribution(kind: type[BigramSession]) -> None:
    """Where a row still needs a token: behind its end it may be anything."""
    config: dict[str, Any] = {"do_sample": True, "seed": 0, "max_new_tokens": 3}
    end = generate(BigramSession, [4], config).sequences[0][0]
    for value in (np.nan, np.inf, -np.inf):
        table = BigramSession().table
        table[[3, end]] = value
        with pytest.raises(InputError, match="can't sample"):
            generate(functools.partial(kind, table=table), [[1], [3]], config)
        ended = generate(functools.partial(kind, table=table), [[4], [1]], {**config, "eos_token_id": end})
        assert ended.sequences[0][0] == end and ended.finish_reasons == ["eos", "length"]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 4, "top_p": 0.9}, {"top_k": 3, "min_p": 0.1, "temperature": 2.0}, {"top_k": 0}, {"top_k": 0, "top_p": 0.7},
     {"top_k": 0, "min_p": 0.2}, {"top_k": 1000, "top_p": 0.0}, {"top_k": 4, "repetition_penalty": 1.2}, {"min_new_tokens": 3},
     {"top_k": 3, "temperature": 1e-50}],
)  # fmt: skip
@pytest.mark.parametrize("ties", [False, True])
def test_a_session_that_draws_gives_the_same_tokens(options: dict[str, Any], ties: bool) -> None:
    """The host chooses only where tokens' logits depend on what was written."""
    table = BigramSession().table
    table = (np.round(table / 6) * 6).astype(np.float32) if ties else table
    drawing = DrawingSession(table=table)
    sessions = [BigramSession(table=table), drawing]
    config = {"max_new_tokens": 40, "seed": 5, "do_sample": bool(options), **options}
    found = [generate(functools.partial(lambda s: s, s), [[1, 2], [3, 4]], config) for s in sessions]
    assert found[0].sequences == found[1].sequences
    assert drawing.length == 2 + 39 and not drawing.undone
    assert drawing.drawn == (0 if options.keys() & {"repetition_penalty", "min_new_tokens"} else 40)


class Letters:
    """A tokenizer of which each token is a letter."""

    def encode(self, text: str, /) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(chr(97 + t % 26) for t in token_ids)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("end", ["eos", "stop", "length"])
def test_a_session_that_draws_streams_the_same(sampled: bool, end: str) -> None:
    """Piece by piece, whatever ends it; then the session is as long as if nothing had been begun ahead."""
    options: dict[str, Any] = {"do_sample": True, "top_k": 5, "seed": 2} if sampled else {}
    options |= {"max_new_tokens": 12}
    free = generate(BigramSession, [[1, 2], [3, 4]], options)
    text = Letters().decode(free.sequences[0])
    if end == "eos":
        options["eos_token_id"] = [row[4] for row in free.sequences]
    elif end == "stop":
        options["stop_strings"] = [text[5:7], Letters().decode(free.sequences[1])[3:6]]
    found, lengths = [], []
    for session in (BigramSession(), DrawingSession()):
        stream = generate(
            functools.partial(lambda s: s, session), [[1, 2], [3, 4]], options, tokenizer=Letters(), stream=True
        )
        found.append(list(stream))
        lengths.append(session.length)
    assert found[0] == found[1] and lengths[0] == lengths[1]
    assert isinstance(session, DrawingSession) and session.undone == ([] if end == "length" else [1])
    assert {chunk.finished for chunk in found[0]} - {None} == {end}


def test_a_stream_that_is_left_takes_back_what_was_begun() -> None:
    session = DrawingSession()
    stream = generate(lambda: session, [5, 9], {"max_new_tokens": 12}, stream=True)
    next(stream), next(stream)
    stream.close()
    assert session.length == 2 + 1 and session.undone == [1]


def test_ties_go_to_the_lowest_token() -> None:
    make = functools.partial(BigramSession, table=np.zeros((VOCAB, VOCAB), np.float32))
    assert generate(make, [5], {"max_new_tokens": 2}).sequences == [[0, 0]]


# ------------------------------------------------------------------------------------------------------------- text

CORPUS = [
    "the cat sat on the mat. ",
    "schöne Grüße aus Köln — 极速 编译器 ",
    "naïve 🙂 emoji 👩‍👩‍👧 stop. END\n\n",
    "the end, the end. ",
]


def make_fast(kind: str) -> FastTokenizer:
    fast = FastTokenizer(
        models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>" if kind == "metaspace" else None)
    )
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        letters = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *letters], limit_alphabet=40)
    fast.train_from_iterator(CORPUS * 3, trainer)
    if kind == "metaspace":  # the trainer marks all of them special, and decode would leave the bytes out
        saved = json.loads(fast.to_str())
        saved["added_tokens"] = saved["added_tokens"][:3]
        fast = FastTokenizer.from_str(json.dumps(saved))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast


@functools.cache
def make_tokenizer(kind: str = "bytes") -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    return Tokenizer({
        "tokenizer.json": make_fast(kind).to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    })  # fmt: skip


def script(tokens: list[int], vocab: int = 400) -> Any:
    """make_session of a session that forces these tokens, then token 2."""

    class Script(BigramSession):
        vocab_size = vocab

        def append(self, token_ids: Ids, *, start: Ids | None = None, last_only: bool = False) -> Logits:
            self.steps = getattr(self, "steps", -1) + 1
            logits = np.zeros((len(token_ids), 1, vocab), np.float32)
            logits[:, :, tokens[self.steps] if self.steps < len(tokens) else 2] = 1
            return logits

    return functools.partial(Script, capacity=10_000)


TEXTS = st.lists(
    st.one_of(st.sampled_from(CORPUS), st.text(max_size=10), st.sampled_from(["\ufffd", "END", " ", "\u0301", "▁"])),
    max_size=12,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, kind=st.sampled_from(["bytes", "metaspace"]), special=st.lists(st.integers(0, 80), max_size=4))
@example(text="👩‍👩‍👧" * 20, kind="bytes", special=[])
@example(text=" " * 60, kind="metaspace", special=[0])
def test_streamed_text_is_the_decoded_text(text: str, kind: str, special: list[int]) -> None:
    tokenizer = make_tokenizer(kind)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for place in special:
        tokens.insert(place, 1)
    stream = TextStream(tokenizer.decode)
    whole = tokenizer.decode(tokens)
    emitted = ""
    for token in tokens:
        emitted += stream.push(token)
        assert whole.startswith(emitted)
    assert emitted + stream.finish() == whole


BROKEN = [
    b"\xff",
    b"\xff\xe4",
    b"\xff\xe4\xbd",
    b"\xe4\xbd",
    b"\xbd",
    b"\xf0\x9f",
    "\ufffd".encode(),
    b"\xffa",
    b"\xe4\xbda",
    "a你\ufffd".encode(),
]


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.one_of(st.sampled_from(BROKEN), st.binary(max_size=4)), st.integers(1, 60)), max_size=5
    ),
    special=st.lists(st.integers(0, 200), max_size=4),
)
@example(parts=[(b"\xffa", 40)], special=[])
@example(parts=[(b"\xff", 80), ("你".encode(), 30)], special=[])
def test_bytes_that_make_no_character_are_streamed(parts: list[tuple[bytes, int]], special: list[int]) -> None:
    """Tokens of single bytes, as a model makes them up: the text is what all of it decodes to, and the work grows with its length."""
    tokenizer, data = make_tokenizer("bytes"), b"".join(part * times for part, times in parts)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves in vocabularies of bytes
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in data]
    vocabulary = json.loads(tokenizer.files["tokenizer.json"])["model"]["vocab"]
    tokens = [vocabulary[letter] for letter in letters]
    for place in special:
        tokens.insert(place, 1)
    decoded = 0

    def decode(some: list[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return tokenizer.decode(some)

    stream, whole, emitted = TextStream(decode), data.decode(errors="replace"), ""
    for token in tokens:
        emitted += stream.push(token)
        assert whole.startswith(emitted)
    assert emitted + stream.finish() == whole == tokenizer.decode(tokens)
    assert decoded <= 100 * len(tokens)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abE", max_size=40),
    stops=st.lists(st.text("abE", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example(text="aabaab", stops=["aab"])
def test_stop_strings_cut_at_the_first_that_is_complete(text: str, stops: list[str]) -> None:
    stream = TextStream(lambda tokens: "".join(map(chr, tokens)), stops)
    ends = [min(len(text[:n]) - len(s) for s in stops if text[:n].endswith(s))
            for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]  # fmt: skip
    expected = text[: ends[0]] if ends else text
    emitted = ""
    for letter in text:
        emitted += stream.push(ord(letter))
        assert expected.startswith(emitted)
        if stream.stopped:
            break
    assert emitted + stream.finish() == expected
    assert stream.stopped == bool(ends)


def test_a_decoder_that_looks_at_the_beginning_is_not_cut_short() -> None:
    stream = TextStream(lambda tokens: "".join(map(chr, tokens)).capitalize())
    text = "abcdefgh" * 20
    assert "".join(stream.push(ord(letter)) for letter in text) + stream.finish() == text.capitalize()


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("stop", [(), "END", ("zzz", "the mat", "ö")])
def test_text_and_its_stream_agree(kind: str, stop: Any) -> None:
    tokenizer = make_tokenizer(kind)
    text = "".join(CORPUS)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    config = {"max_new_tokens": 500, "eos_token_id": 2, "stop": stop}
    whole = generate(script(tokens), "the cat", config, tokenizer=tokenizer)
    chunks = list(generate(script(tokens), "the cat", config, tokenizer=tokenizer, stream=True))
    expected = min((text.partition(s)[0] for s in ([stop] if isinstance(stop, str) else stop)), key=len, default=text)
    assert whole.text == str(whole) == "".join(chunk.text for chunk in chunks) == expected
    assert whole.finish_reasons == ["stop" if stop else "eos"]
    assert [chunk.finished for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finished == whole.finish_reasons[0]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.sequences[0]


def test_a_character_that_stays_incomplete_comes_at_the_end() -> None:
    tokenizer = make_tokenizer("bytes")
    half = tokenizer.encode("a极", add_special_tokens=False)[:-1]
    chunks = list(generate(script(half), "x", {"max_new_tokens": len(half)}, tokenizer=tokenizer, stream=True))
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(half)
    assert all("\ufffd" not in chunk.text for chunk in chunks[:-1]) and chunks[-1].finished == "length"


def test_rows_stream_until_each_has_finished() -> None:
    config = {"max_new_tokens": 40, "eos_token_id": tuple(range(0, VOCAB, 9)), "pad_token_id": 60}
    prompts = [[4], [17, 2], [33]]
    whole = generate(BigramSession, prompts, config)
    stream = generate(BigramSession, prompts, config, stream=True)
    chunks: list[Chunk] = []
    while True:
        try:
            chunks.append(next(stream))
        except StopIteration as end:
            assert end.value.sequences == whole.sequences
            break
    assert len(set(whole.lengths)) > 1
    for row in range(3):
        own = [token for chunk in chunks if chunk.row == row for token in chunk.token_ids]
        assert own == whole.sequences[row][: whole.lengths[row]]
        assert set(whole.sequences[row][whole.lengths[row] :]) <= {60}


def test_closing_a_stream_early_is_clean() -> None:
    sessions: list[BigramSession] = []

    def make() -> BigramSession:
        sessions.append(BigramSession())
        return sessions[-1]

    stream = generate(make, [3], {"max_new_tokens": 50}, stream=True)
    next(stream)
    stream.close()
    assert next(stream, None) is None
    assert sessions[0].chunks == [1]


# ---------------------------------------------------------------------------------------------------------- prompts


def test_all_kinds_of_prompts_mean_the_same() -> None:
    config = {"max_new_tokens": 5}
    expected = generate(BigramSession, [[1, 2, 3], [4, 5, 6]], config).sequences
    array = np.array([[1, 2, 3], [4, 5, 6]])
    for prompts in (
        array, array.astype(np.int32), torch.tensor(array), torch.tensor(array).int(), list(array),
        tuple(array.tolist()),
        list(torch.tensor(array)), transformers.BatchEncoding({"input_ids": torch.tensor(array)}),
        {"input_ids": array.tolist(), "attention_mask": [[1, 1, 1]] * 2},
    ):  # fmt: skip
        assert generate(BigramSession, prompts, config).sequences == expected
    for single in ([1, 2, 3], (1, 2, 3), array[0], torch.tensor(array[0]), list(array[0])):
        assert generate(BigramSession, single, config).sequences == expected[:1]


def test_padding_on_the_left_is_recognized() -> None:
    padded = np.array([[0, 0, 3], [4, 5, 6]])
    mask = padded != 0
    for prompts in (padded, {"input_ids": padded, "attention_mask": mask.astype(int)}):
        result = generate(BigramSession, prompts, {"max_new_tokens": 1, "pad_token_id": 0})
        assert result.prompt_ids == [[3], [4, 5, 6]] and result.prompt_tokens == 4
    kept = generate(BigramSession, padded, {"max_new_tokens": 1, "pad_token_id": 0, "eos_token_id": 0})
    assert kept.prompt_ids == padded.tolist()
    with pytest.raises(InputError, match="pad on the left"):
        generate(BigramSession, padded[:, ::-1], {"pad_token_id": 0})
    with pytest.raises(InputError, match="padding on the left"):
        generate(BigramSession, {"input_ids": padded, "attention_mask": mask[:, ::-1].astype(int)})
    with pytest.raises(InputError, match="2 prompts and an attention mask for 1"):
        generate(BigramSession, {"input_ids": padded, "attention_mask": mask[:1].astype(int)})


def test_long_prompts_are_fed_in_chunks() -> None:
    session = BigramSession()
    generate(lambda: session, list(range(23)), {"prefill_chunk": 10, "max_new_tokens": 3})
    assert session.chunks == [10, 10, 3, 1, 1]
    session.chunks.clear()
    generate(lambda: session, [1], {"max_new_tokens": 1})  # a used session is reset
    assert session.length == 1


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], InputError, "no prompt"),
        (np.zeros((0, 3), int), InputError, "no prompt"),
        ([[]], InputError, "prompt 0 is empty"),
        ([[1], []], InputError, "prompt 1 is empty"),
        (np.zeros(0, int), InputError, "prompt 0 is empty"),
        (42, InputTypeError, "got int"),
        (None, InputTypeError, "got NoneType"),
        ([1.5], InputTypeError, "got float"),
        ([True], InputTypeError, "got bool"),
        ([[1, 2.5]], InputTypeError, "lists of token ids"),
        (np.zeros((1, 2)), InputTypeError, "float64"),
        (np.zeros((1, 2, 3), int), InputError, r"shape \[1, 2, 3\]"),
        (["a", [1]], InputError, "tokenizer"),
        ("text", InputError, "needs a tokenizer"),
        ({"ids": [1]}, InputError, "input_ids"),
        ([[1], [2, VOCAB]], IndexOutOfRangeError, f"prompt 1 has token id {VOCAB}, outside the vocabulary of size"),
        ([-1], IndexOutOfRangeError, "token id -1"),
        ([2**70], IndexOutOfRangeError, "token id"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(BigramSession, prompts, stream=True)  # before the first step


def test_prompts_must_fit() -> None:
    with pytest.raises(InputError, match="prompt has 150 tokens and 51 new ones are wanted: 201 .* 200 slots"):
        generate(BigramSession, [1] * 150, {"max_new_tokens": 51})
    assert generate(BigramSession, [1] * 150, {"max_new_tokens": 50}).lengths == [50]
    assert generate(BigramSession, [1] * 150).lengths == [50]  # the default is only an upper bound
    assert generate(BigramSession, [1] * 150, {"max_length": 10_000}).lengths == [50]
    assert generate(BigramSession, [1]).lengths == [DEFAULT_NEW_TOKENS]
    with pytest.raises(InputError, match="200 tokens and 1 new"):
        generate(BigramSession, [1] * 200)
    with pytest.raises(InputError, match="max_length is 10, but the prompt has 10"):
        generate(BigramSession, [1] * 10, {"max_length": 10})


def test_an_empty_text_begins_with_bos_where_the_tokenizer_says_so() -> None:
    class Words:
        bos_token_id, add_bos_token = 7, True

        def encode(self, text: str, /) -> list[int]:
            return []

        def decode(self, token_ids: list[int], /) -> str:
            return ""

    words = Words()
    assert generate(BigramSession, "", {"max_new_tokens": 1}, tokenizer=words).prompt_ids == [[7]]
    words.add_bos_token = False
    with pytest.raises(InputError, match="empty"):
        generate(BigramSession, "", tokenizer=words)


def test_the_result_counts_and_times() -> None:
    result = generate(BigramSession, [[1, 2], [3]], {"max_new_tokens": 9})
    assert isinstance(result, Generation)
    assert (result.prompt_tokens, result.new_tokens, result.text) == (3, 18, None)
    assert result.decode_tokens_per_s == 16 / result.decode_s and result.prefill_tokens_per_s > 0
    assert str(result) == str(result.sequences)


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens .* got 2.5"),
        ({"max_new_tokens": True}, "got True"),
        ({"temperature": 0}, "temperature must be a number > 0, got 0.0; for greedy"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": "hot"}, "got 'hot'"),
        ({"top_p": 1.2}, "top_p must be a number >= 0 and <= 1, got 1.2"),
        ({"top_k": -1}, "top_k must be an integer >= 0, got -1"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number > 0"),
        ({"do_sample": 1}, "do_sample must be True or False, got 1"),
        ({"stop": ""}, "stop_strings must be a non-empty string"),
        ({"stop_strings": ["a", 3]}, "stop_strings"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"seed": -1}, "seed"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"max_new_token": 3}, "unknown generation option 'max_new_token'; did you mean 'max_new_tokens'"),
        ({"temprature": 3}, "did you mean 'temperature'"),
        ({"qqq": 3}, "unknown generation option 'qqq'; known: max_new_tokens"),
        ({"num_beams": 4}, "num_beams=4 is not implemented"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 is not implemented"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"output_scores": True}, "output_scores"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationConfig.from_any(options)
    with pytest.raises(InputError, match=message):
        GenerationConfig.from_any(None, **options)


def test_every_option_of_transformers_is_known() -> None:
    for name in vars(HF.GenerationConfig()):
        GenerationConfig.from_any({name: None})
    for config in (HF.GenerationConfig(), HF.GenerationConfig(num_beams=1, use_cache=True)):
        assert GenerationConfig.from_any(config) == GenerationConfig()
    for name, value in HF.GenerationConfig._get_default_generation_params().items():
        GenerationConfig.from_any({name: value})
    for options in ({"num_beams": 3}, {"bad_words_ids": [[3]]}, {"sequence_bias": {(3,): 1.0}}, {"min_length": 4}):
        with pytest.raises(InputError, match=f"{next(iter(options))}=.* is not implemented"):
            GenerationConfig.from_any(HF.GenerationConfig(**options))


def test_overrides_win_and_none_means_unset() -> None:
    base = GenerationConfig(max_new_tokens=3, eos_token_id=5)
    config = GenerationConfig.from_any(base, max_new_tokens=np.int64(9), eos_token_id=None, do_sample=True, top_p=0.5)
    assert (config.max_new_tokens, config.eos_token_id, config.top_p) == (9, (5,), 0.5)
    with pytest.raises(InputTypeError, match="got int"):
        GenerationConfig.from_any(3)
    saved = {"eos_token_id": [2], "chat_format": "foreign entries are fine here", "transformers_version": "5.23.0"}
    assert GenerationConfig.from_saved(saved) == GenerationConfig(eos_token_id=2)
    with pytest.raises(InputError, match="stop_strings need a tokenizer"):
        generate(BigramSession, [1], {"stop": "x"})
    with pytest.warns(UserWarning, match="temperature has no effect without do_sample"):
        GenerationConfig.from_any(None, temperature=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig.from_any(None, temperature=1.0, seed=3)


# --------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_tokenizer_equals_transformers(tmp_path: Path, kind: str) -> None:
    hf = HF.PreTrainedTokenizerFast(tokenizer_object=make_fast(kind), bos_token="<s>", eos_token="</s>")
    hf.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}<{{ m.role }}>{{ m['content'] | tojson }}"
        "{% endgeneration %}{% if loop.index > 8 %}{% break %}{% endif %}\n{% endfor %}"
        "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{% if add_generation_prompt %}<a>{% endif %}"
    )
    hf.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("", "the cat", "naïve 🙂 <s>x</s>", "  two  spaces\n", *CORPUS):
        assert ours.encode(text) == hf(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == hf(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == hf.decode(hf(text)["input_ids"], skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (hf.bos_token_id, hf.eos_token_id, len(hf))
    messages = [{"role": "user", "content": "<极速> & 'x'"}, {"role": "assistant", "content": "y"}]
    for prompt in (True, False):
        expected = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    again = Tokenizer(ours.files)
    assert again.encode("the cat") == ours.encode("the cat") and again.chat_template == ours.chat_template


def test_tokenizer_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"{tmp_path}: there is no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ArtifactError, match="tokenizer.json can't be read"):
        Tokenizer({"tokenizer.json": b"{}"})
    with pytest.raises(InputError, match="no chat template"):
        make_tokenizer().apply_chat_template([])
    with pytest.raises(ArtifactError, match="chat_template is no text"):
        Tokenizer({**make_tokenizer().files, "tokenizer_config.json": b'{"chat_template": 3}'})
    assert Tokenizer.from_files({**make_tokenizer().files, "recipe.toml": b""}).files == make_tokenizer().files


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(3) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 3 %}", "namespace"),
        ("{% if %}", "refused"),
    ],
)
def test_templates_are_sandboxed(template: str, message: str) -> None:
    tokenizer = Tokenizer({**make_tokenizer().files, "chat_template.jinja": template.encode()})
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat_template([])


# ---------------------------------------------------------------------------------------------------- cost and border


def test_overhead_per_token_is_small() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 1, 32_000)).astype(np.float32)

    class Constant(BigramSession):
        vocab_size = 32_000

        def append(self, token_ids: Ids, *, start: Ids | None = None, last_only: bool = False) -> Logits:
            return logits

    make = functools.partial(Constant, capacity=1000)

    def best(**options: Any) -> float:
        return min(generate(make, [1], {"max_new_tokens": 200, **options}).decode_s for _ in range(5)) / 200

    assert best() < 150e-6
    assert best(do_sample=True, top_k=50, top_p=0.9, seed=0) < 1.5e-3


def test_no_torch_is_needed() -> None:
    names = "('torch', 'transformers', 'tvm')"
    code = f"import sys, jisu.runtime.artifact, jisu.runtime.generate; print([m for m in {names} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
