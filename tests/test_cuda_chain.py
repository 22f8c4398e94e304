"""Steps on a GPU that draw tokens by themselves, each begun before the tokens of the one before are known here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch
import transformers as hf

import jisu
from jisu.compiler import ops
from jisu.compiler.errors import IndexOutOfRangeError, InputError, TensorMemoryError
from jisu.compiler.gpu import Driver
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.types import TensorType, symbol
from jisu.runtime.cuda import DeviceExecutable
from jisu.runtime.generate import Generation, generate
from jisu.runtime.program import Program
from jisu.runtime.session import Drawn, Session
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43, 38]]
SAMPLED: list[dict[str, Any]] = [
    {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
    {"top_k": 7, "min_p": 0.1, "temperature": 3.0},
    {"top_k": 95},  # with ties at the end
    {"top_k": 0},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "min_p": 0.05},
]
CACHES = {"contiguous": "", "paged": "page = 16", "ring": "ring = true", "int8": 'scheme = "int8"'}
VOCABULARY = 96


def small(cache: str) -> Any:
    """Logits of the least likely tokens are equal, so that the last one of the top 95 isn't alone."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1,
        head_dim=32, num_key_value_heads=1, max_position_embeddings=320, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    if cache == "ring":
        sizes |= {"sliding_window": 6, "layer_types": ["sliding_attention"], "query_pre_attn_scalar": 32}
        model: Any = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes)).eval()
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY // 2 :] = model.lm_head.weight[: VOCABULARY // 2]
    return model


def compiled(cache: str, target: Any) -> Program:
    recipe = jisu.Recipe.from_toml(f"prefill_chunk = 64\n[cache]\n{CACHES[cache]}\n")
    return jisu.compile(small(cache), target=target, recipe=recipe)


@pytest.fixture(scope="module")
def on_gpu(emulated_gpu: Target) -> Any:
    """Programs by cache, each compiled once."""
    return functools.cache(lambda cache: compiled(cache, emulated_gpu))


@pytest.fixture(scope="module")
def on_cpu() -> Any:
    return functools.cache(lambda cache: compiled(cache, "cpu"))


def chunked(program: Program, chunk: int) -> Session:
    """A session that reads so many tokens at once, whose rings are as small as they may be then."""
    assert program.decoder is not None
    return Session(attrs.evolve(program.decoder, prefill_chunk=chunk), program._start, program._runs_here())


def run(session: Session, prompts: Any, **options: Any) -> Generation:
    return generate(lambda: session, prompts, {"prefill_chunk": session._info.prefill_chunk, **options})


@pytest.mark.parametrize(
    "cache", ["contiguous", "ring", *(pytest.param(c, marks=pytest.mark.slow) for c in ("paged", "int8"))]
)
def test_tokens_are_the_cpus(cache: str, on_gpu: Any, on_cpu: Any) -> None:
    """Of batches whose rows end at different times, past the window of a ring; a step that was begun in vain leaves nothing."""
    gpu, cpu = on_gpu(cache), on_cpu(cache)
    options: dict[str, Any] = {"max_new_tokens": 9}
    greedy = cpu.generate(PROMPTS, **options).sequences
    options |= {"eos_token_id": [row[4 + 2 * i] for i, row in enumerate(greedy[:2])], "pad_token_id": 0}
    sampled = SAMPLED if cache == "contiguous" else SAMPLED[:1]
    for how in ({}, *({"do_sample": True, "seed": 3, **how} for how in sampled)):
        got, want = (p.generate(PROMPTS, **options, **how) for p in (gpu, cpu))
        assert got.sequences == want.sequences and got.finish_reasons == want.finish_reasons, how
        assert how or "eos" in got.finish_reasons


def test_a_cache_grows_under_way(on_gpu: Any, on_cpu: Any) -> None:
    prompt = [[(7 * i) % VOCABULARY for i in range(252)]]
    session = on_gpu("contiguous").session()
    got, want = run(session, prompt, max_new_tokens=8), on_cpu("contiguous").generate(prompt, max_new_tokens=8)
    assert got.sequences == want.sequences and session.length == 259 and session._reserved > 256


def test_a_session_goes_on_where_memory_is_short(on_gpu: Any, emulated_driver: Any) -> None:
    session, other = on_gpu("contiguous").session(), on_gpu("contiguous").session()
    ids = np.arange(260)[None] * 7 % VOCABULARY
    for s in (session, other):
        s.append(ids[:, :250], last_only=True)
    emulated_driver.emulated_refuse(b"cuMemAlloc_v2", 2)
    with pytest.raises(TensorMemoryError, match="KV cache|a tensor"):
        session.append(ids[:, 250:])
    emulated_driver.emulated_refuse(b"", 0)
    np.testing.assert_array_equal(session.append(ids[:, 250:]), other.append(ids[:, 250:]))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """What the driver is told, and the events that are meant."""
    told: list[tuple[str, Any]] = []
    real = Driver.run

    def wrapper(self: Driver, name: str, *args: Any) -> None:
        told.append((name, args[0].value if name.startswith("cuEvent") and name != "cuEventCreate" else None))
        real(self, name, *args)

    monkeypatch.setattr(Driver, "run", wrapper)
    yield told


@pytest.mark.parametrize("sampled", [False, True])
def test_a_token_is_one_launch_and_no_wait(sampled: bool, on_gpu: Any, log: list[tuple[str, Any]]) -> None:
    """A step's event is waited for when the next step has been launched; besides there are six small copies at most."""
    how: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 0, "top_p": 0.9} if sampled else {}
    stream = on_gpu("contiguous").generate(PROMPTS[:1], max_new_tokens=16, stream=True, **how)
    for _ in range(3):  # the first steps are launched kernel by kernel
        next(stream)
    log.clear()
    for _ in range(10):
        next(stream)
    names = [name for name, _ in log]
    assert names.count("cuGraphLaunch") == names.count("cuEventSynchronize") == 10
    assert not {"cuStreamSynchronize", "cuLaunchKernel", "cuLaunchKernelEx", "cuMemAlloc_v2"} & set(names)
    assert sum("Memcpy" in name for name in names) == 10 * (6 if sampled else 5)
    # What is waited for was recorded before the last launch.
    recorded: list[Any] = []
    for name, event in log:
        if name == "cuGraphLaunch":
            before = list(recorded)
        elif name == "cuEventRecord":
            recorded.append(event)
        elif name == "cuEventSynchronize" and recorded:
            assert event in before or len(recorded) == 1
    stream.close()


@pytest.mark.parametrize("chunk", [1, 3])
def test_what_is_taken_back_of_a_ring(chunk: int, on_gpu: Any, on_cpu: Any) -> None:
    """Of a ring of as few slots as its window and a chunk need a step that was begun in vain is taken back, and no more than a chunk's tokens may be."""
    session = chunked(on_gpu("ring"), chunk)
    stream = generate(lambda: session, PROMPTS, {"max_new_tokens": 9}, stream=True)
    chunks = [next(stream) for _ in range(3 * 4)]
    stream.close()
    rows = [list(chunk.token_ids) for chunk in chunks[-3:]]
    got = session.append(np.array(rows), last_only=True)[:, -1]
    want = on_cpu("ring").generate(PROMPTS, max_new_tokens=5).sequences
    assert got.argmax(-1).tolist() == [row[4] for row in want]
    assert session.undoable == chunk
    with pytest.raises(InputError, match="can't be taken back"):
        session.undo(chunk + 1)


@pytest.mark.parametrize("cache", ["contiguous", "paged", "ring"])
def test_what_was_taken_back_is_forgotten(cache: str, on_cpu: Any) -> None:
    """Tokens appended and taken back at random, as far as may be: logits are those of a session that never saw these."""
    rng, refused = np.random.default_rng(0), 0
    for chunk in (1, 2, 5):
        session, other = chunked(on_cpu(cache), chunk), chunked(on_cpu(cache), chunk)
        kept = np.zeros((2, 0), np.int64)
        while session.length < 40:
            new = rng.integers(0, VOCABULARY, (2, int(rng.integers(1, 2 * chunk + 1))))
            got = session.append(new, last_only=True)
            kept = np.concatenate([kept, new], 1)
            other.reset()
            np.testing.assert_allclose(got, other.append(kept, last_only=True), rtol=1e-4, atol=1e-4)
            back = int(rng.integers(0, chunk + 2))
            try:
                session.undo(back)
                kept = kept[:, : kept.shape[1] - back]
            except InputError:
                refused += 1
    assert refused


def test_who_stops_in_the_middle_leaves_a_session_that_goes_on(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = on_gpu("contiguous")
    session = program.session()
    want = run(session, PROMPTS, max_new_tokens=8).sequences
    stream = generate(lambda: session, PROMPTS, {"max_new_tokens": 8}, stream=True)
    for _ in range(3 * 3):
        next(stream)
    assert session.length == 7 + 3  # a step is under way
    stream.close()
    assert session.length == 7 + 2
    again = session.append(np.array([row[2:3] for row in want]), last_only=True)
    assert again[:, -1].argmax(-1).tolist() == [row[3] for row in want]
    real, count = Driver.run, iter(range(5))

    def interrupted(self: Driver, name: str, *args: Any) -> None:
        if name == "cuEventSynchronize" and next(count, None) is None:
            monkeypatch.setattr(Driver, "run", real)
            raise KeyboardInterrupt
        real(self, name, *args)

    monkeypatch.setattr(Driver, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(session, PROMPTS, max_new_tokens=8)
    assert session.length == 7 + 5
    assert run(session, PROMPTS, max_new_tokens=8).sequences == want


def test_steps_are_refused_where_there_is_no_room(on_gpu: Any) -> None:
    session = on_gpu("contiguous").session(12)
    assert run(session, PROMPTS, max_new_tokens=5).lengths == [5, 5, 5] and session.length == 11
    with pytest.raises(InputError, match="the cache has 12 slots"):
        run(session, PROMPTS, max_new_tokens=6)


# --- Calls that are started before others have ended --------------------------------------------------------------------


def test_calls_under_way(emulated_gpu: Target, tmp_path: Path) -> None:
    """Each gives what it was given, in whatever order they are asked; values go from one to the next; a fault is told."""
    n = symbol("n")
    table, ids = placeholder("table", TensorType((7,), "int64")), placeholder("ids", TensorType((n,), "int64"))
    graph = Graph((table, ids), (ops.take(table, ids, axis=0, wrap=False),))
    info = compile_graphs({"main": graph}, emulated_gpu, out=tmp_path / "out", cache_dir=tmp_path / "cache")
    executable = DeviceExecutable(info.code(), info.entries)
    turned = np.roll(np.arange(7), -1)
    held = executable.hold(turned)
    for _ in range(3):  # launches first, then graphs
        started = [executable.start("main", [held, np.array([i % 7, 0])]) for i in range(9)]
        for i in (8, 2, 5, 0, 7, 1):
            assert started[i].results()[0].tolist() == [(i + 1) % 7, 1]
        chain = [executable.start("main", [held, np.array([0, 3])])]
        for _ in range(6):
            chain.append(executable.start("main", [held, chain[-1].values[0]]))
        assert [c.results()[0].tolist() for c in chain] == [[(1 + i) % 7, (4 + i) % 7] for i in range(7)]
    executable.start("main", [held, np.array([9])])
    with pytest.raises(IndexOutOfRangeError):
        executable.start("main", [held, np.array([1])]).results()
    assert executable.call("main", [held, np.array([1])])[0].tolist() == [2]


def test_a_step_reads_what_another_draws(on_gpu: Any) -> None:
    """Nothing is waited for between a prompt and the last of its tokens, and only the last is asked for."""
    from jisu.runtime.session import Sampling

    session, greedy = on_gpu("contiguous").session(), Sampling(*(np.zeros(1) for _ in range(4)))
    want = run(session, PROMPTS[:1], max_new_tokens=4).sequences[0]
    session.reset()
    drawn: Any = np.array(PROMPTS[:1])
    for _ in range(4):
        drawn = session.draw(drawn, greedy)
    tokens, sound = cast(Drawn, drawn).results()
    assert (tokens.tolist(), sound.tolist()) == ([want[3]], [True])
