"""Log-probabilities of continuations against transformers, and programs as models of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st

import jisu
from jisu.runtime.likelihood import rolling, score
from jisu.runtime.session import DecoderInfo

DEMO = Path(__file__).parent.parent / "jisu" / "demo"
POSITIONS = 40


# --- The arithmetic, on a model whose next token is a function of the tokens before -----------------------------------


class Counting:
    """Stands for a program: the logits behind a sequence are drawn by a seed made of all its tokens."""

    def __init__(self, chunk: int = 512, cached: bool = True) -> None:
        state: Any = (("key.0", None, 0, False),) if cached else ()
        self.decoder = DecoderInfo(11, POSITIONS, 0, chunk, "b", state)
        self.batches: list[int] = []

    def session(self, capacity: int | None = None) -> Any:
        seen: list[list[int]] = []

        def append(ids: np.ndarray, last_only: bool = False) -> np.ndarray:
            if not seen:
                seen.extend([] for _ in ids)
                self.batches.append(len(ids))
            logits = np.zeros((*ids.shape, 11), np.float32)
            for b, row in enumerate(ids):
                for i, token in enumerate(row):
                    seen[b].append(int(token))
                    assert len(seen[b]) <= (capacity or POSITIONS) <= POSITIONS
                    logits[b, i] = self.logits(seen[b])
            return logits[:, -1:] if last_only else logits

        return SimpleNamespace(append=append)

    @staticmethod
    def logits(tokens: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([len(tokens), *tokens]).standard_normal(11).astype(np.float32)

    def alone(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        total, greedy = 0.0, True
        whole = [*context, *continuation]
        for i in range(len(continuation)):
            end = len(context) + i
            logits = self.logits(whole[:-1][-POSITIONS:][: end - max(0, len(whole) - 1 - POSITIONS)]).astype(float)
            total += logits[whole[end]] - np.log(np.exp(logits).sum())
            greedy &= int(logits.argmax()) == whole[end]
        return total, greedy


TOKENS = st.lists(st.integers(0, 10), min_size=1, max_size=60)


@given(
    st.lists(st.tuples(TOKENS, st.lists(st.integers(0, 10), max_size=POSITIONS)), max_size=6),
    st.integers(1, 5),
    st.sampled_from([1, 3, 512]),
    st.booleans(),
)
def test_batches_and_chunks_make_no_difference(pairs: list[Any], batch: int, chunk: int, cached: bool) -> None:
    program = Counting(chunk, cached)
    found = score(program, pairs, batch=batch)  # type: ignore[arg-type]
    for got, pair in zip(found, pairs, strict=True):
        want, greedy = program.alone(*pair)
        assert got.logprob == pytest.approx(want, abs=1e-4) and got.greedy is greedy
    assert all(n <= (batch if cached else 1) for n in program.batches)


def test_choices_of_one_token_are_read_once() -> None:
    program = Counting()
    found = score(program, [([1, 2, 3], [k]) for k in range(11)])  # type: ignore[arg-type]
    assert program.batches == [1]
    assert sum(np.exp(s.logprob) for s in found) == pytest.approx(1) and sum(s.greedy for s in found) == 1


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 9))
def test_rolling_predicts_each_token_once(tokens: list[int], positions: int) -> None:
    pairs = rolling(tokens, -1, positions)
    assert [t for _, continuation in pairs for t in continuation] == tokens
    text, place = [-1, *tokens], 0
    for i, (context, continuation) in enumerate(pairs):
        read = len(context) + len(continuation) - 1
        assert read <= positions and (i == 0 or read == positions)
        assert list(context) == text[place + 1 - len(context) : place + 1]
        place += len(continuation)


def test_what_has_no_likelihood_is_refused() -> None:
    program: Any = Counting()
    with pytest.raises(jisu.InputError, match="at least one token"):
        score(program, [([], [1])])
    with pytest.raises(jisu.InputError, match="41 tokens exceeds the model's 40 positions"):
        score(program, [([1], [1] * 41)])
    with pytest.raises(jisu.InputError, match="batch must be at least 1"):
        score(program, [], batch=0)
    program.decoder = None
    with pytest.raises(jisu.InputError, match="only causal language models"):
        score(program, [([1], [1])])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_likelihoods_equal_transformers(name: str) -> None:
    model = make(name)
    program = jisu.compile(model, num_threads=1)
    rng = np.random.default_rng(0)
    pairs = [
        tuple(rng.integers(0, VOCABULARY, n).tolist() for n in (1 + rng.integers(0, 30), 1 + rng.integers(0, 9)))
        for _ in range(9)
    ]
    for got, (context, continuation) in zip(score(program, pairs, batch=4), pairs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        want = logits.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()
        assert got.logprob == pytest.approx(float(want), abs=1e-3)
        assert got.greedy == (logits.argmax(-1).tolist() == continuation)


# --- The harness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make("llama", vocab_size=2048, max_position_embeddings=64).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


def both(checkpoint: Path, **options: Any) -> tuple[Any, Any]:
    """Our model of the harness, and its own of transformers (which needs more packages than ours)."""
    for package in ("lm_eval", "accelerate", "peft"):
        pytest.importorskip(package)
    from lm_eval.models.huggingface import HFLM

    from jisu.runtime.harness import HarnessModel

    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = HFLM(
        pretrained=model, tokenizer=hf.AutoTokenizer.from_pretrained(checkpoint), batch_size=3, max_length=64, **options
    )  # type: ignore[arg-type]
    return HarnessModel(jisu.compile(checkpoint, num_threads=1), batch=3), theirs


LONG = "the object of a function is a class, and so its methods return None " * 6


def test_harness_gets_what_transformers_gives(checkpoint: Path) -> None:
    ours, theirs = both(checkpoint)
    asked = requests(
        ("If the", " object"), ("If the ", "object"), ("", "A function"), ("A function is", " a very long story"), (LONG, " yes"), (LONG, " no")
    )  # fmt: skip
    for got, want in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert got[0] == pytest.approx(want[0], abs=1e-3) and got[1] == want[1]
    # Its own model also counts the token that begins texts, behind itself, where the tokenizer adds one.
    _, theirs = both(checkpoint, add_bos_token=False)
    texts = requests(("A function is",), (LONG,))
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), rtol=1e-5)


def test_harness_generates_what_transformers_does(checkpoint: Path) -> None:
    ours, theirs = both(checkpoint)
    free = {"max_gen_toks": 8, "do_sample": False, "until": ["\n\n\n\n"]}
    asked = requests(*((text, free) for text in ("A function", "If the object is", LONG, "None")))
    want = theirs.generate_until(asked)
    assert ours.generate_until(asked) == want
    stop = {**free, "until": [want[0].strip()[2:4]], "temperature": 0.0}
    assert ours.generate_until(requests(("A function", stop))) == [want[0].split(stop["until"][0])[0]]  # type: ignore[index]
    with pytest.raises(jisu.InputError, match="asks for 64 new tokens; the model has 64 positions"):
        ours.generate_until(requests(("A", {"max_gen_toks": 64})))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 9))
def test_windows_are_those_of_the_harness(tokens: list[int], positions: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    want = [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(tokens, -1, positions, 1)]
    assert [(list(a), list(b)) for a, b in rolling(tokens, -1, positions)] == want


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over a local file, one for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": f"Which number is {w}?", "choices": ["one", "two", "three and more"], "answer": i % 3}
        for i, w in enumerate("first second third fourth fifth sixth seventh".split())
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n"
    kinds = {
        "choices": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
        "perplexity": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
        "writing": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{common}{text}")
    return folder


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jisu", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
    )


NAMES = "local_choices,local_perplexity,local_writing"


def test_command_line_runs_tasks(
    checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    done = shell("eval", checkpoint, "--tasks", NAMES, "--task-folder", tasks, "--limit", 6, "--batch", 2, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = {(r["task"], r["metric"]): r for r in told["results"]}
    assert told["harness"] == lm_eval.__version__ and all(r["documents"] == 6 for r in told["results"])
    from lm_eval.tasks import TaskManager

    for task, metric in (
        ("choices", "acc"),
        ("choices", "acc_norm"),
        ("perplexity", "bits_per_byte"),
        ("writing", "exact_match"),
    ):
        name = f"local_{task}"
        _, theirs = both(checkpoint, **({"add_bos_token": False} if task == "perplexity" else {}))
        manager = TaskManager(include_path=str(tasks))
        want = lm_eval.simple_evaluate(theirs, tasks=[name], limit=6, task_manager=manager, bootstrap_iters=0)
        assert found[name, metric]["value"] == pytest.approx(want["results"][name][f"{metric},none"], rel=1e-4)
    accuracy = found["local_choices", "acc"]["value"]
    assert found["local_choices", "acc"]["stderr"] == pytest.approx((accuracy * (1 - accuracy) / 5) ** 0.5)
    plain = shell("eval", checkpoint, "--tasks", "local_choices", "--task-folder", tasks)
    assert plain.returncode == 0 and "local_choices" in plain.stdout and "±" in plain.stdout


def test_unknown_tasks_are_refused(checkpoint: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    done = shell("eval", checkpoint, "--tasks", "local_choice", "--task-folder", tasks)
    assert done.returncode == 1 and "near: local_choices" in done.stderr


def test_a_missing_harness_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jisu.commands.shell import Shell
    from jisu.commands.source import Options
    from jisu.commands.tasks import Tasks, run

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(jisu.InputError, match=r'pip install "jisu\[eval\]"'):
        run(Shell(sys.stdout), str(checkpoint), Tasks(("arc_easy",)), Options())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --text or --tasks"),
        (("--text", "x", "--tasks", "y"), "give --text or --tasks"),
        (("--text", "x", "--shots", "2"), "--shots can't be used with --text"),
        (("--tasks", "x", "--window", "8"), "--window can't be used with --tasks"),
    ],
)
def test_options_of_texts_and_tasks_do_not_mix(options: tuple[str, ...], said: str) -> None:
    done = shell("eval", "nowhere", *options)
    assert done.returncode == 2 and said in " ".join(done.stderr.replace("│", " ").split())
