"""What people do wrong when they compile, call, save and load, and what they get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import make
from torch import nn

import jisu
from jisu.compiler.gpu import DRIVER
from jisu.compiler.text import parse

B = torch.export.Dim("b", min=2, max=8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = os.environ.get("JISU_CACHE_DIR")
    os.environ["JISU_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("JISU_CACHE_DIR")
    if before is not None:
        os.environ["JISU_CACHE_DIR"] = before


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def compiled(function: Callable[..., Any], *examples: torch.Tensor) -> jisu.Program:
    return jisu.compile(Apply(function), example_inputs=examples)


def same(function: Callable[..., Any], x: torch.Tensor) -> None:
    """The compiled function equals the eager one in value, dtype and structure."""
    want = function(x.clone())
    got = compiled(function, x)(x.clone())
    assert type(got) is type(want)
    for g, w in zip(
        got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
    ):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g, w, equal_nan=True)


@pytest.fixture(scope="module")
def linear() -> jisu.Program:
    torch.manual_seed(0)
    return jisu.compile(nn.Linear(16, 3).eval(), example_inputs=(torch.randn(4, 16),))


@pytest.fixture(scope="module")
def embedding() -> jisu.Program:
    return jisu.compile(nn.Embedding(10, 4), example_inputs=(torch.zeros(2, 3, dtype=torch.long),))


# --- Targets and what is given to compile ---------------------------------------------------------------------------


def test_target_unknown() -> None:
    with pytest.raises(ValueError, match="unknown target 'cudaa'; known: cpu, .*did you mean 'cuda'"):
        jisu.compile(nn.Linear(2, 2), target="cudaa", example_inputs=(torch.ones(1, 2),))


def test_target_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DRIVER, "libnone.so")
    with pytest.raises(jisu.TargetError, match="target='cpu'"):
        jisu.compile(nn.Linear(2, 2), target="cuda", example_inputs=(torch.ones(1, 2),))


@pytest.mark.parametrize("thing", [42, None, [nn.Linear(2, 2)]], ids=str)
def test_not_a_module(thing: object) -> None:
    with pytest.raises(TypeError, match=f"expected torch.nn.Module, got {type(thing).__name__}"):
        jisu.compile(thing, example_inputs=(torch.ones(1, 2),))


def test_checkpoint_missing(tmp_path: Path) -> None:
    with pytest.raises(jisu.InputError, match="nowhere"):
        jisu.compile(tmp_path / "nowhere")
    with pytest.raises(jisu.InputError, match="config.json"):
        jisu.compile(tmp_path)


def test_data_dep_control_flow() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(jisu.UnsupportedError, match=r"test_bad_input\.py:\d+"):
        compiled(branch, torch.ones(2))


def test_unsupported_op() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real + torch.linalg.svdvals(x)

    with pytest.raises(jisu.UnsupportedError, match=r"(?s)eig.*svd|svd.*eig") as error:
        compiled(both, torch.randn(3, 3))
    assert "test_bad_input.py:" in str(error.value)


def test_graph_break_print(capsys: pytest.CaptureFixture[str]) -> None:
    def talkative(x: torch.Tensor) -> torch.Tensor:
        print(x.shape)
        return x + 1

    same(talkative, torch.ones(3))


def test_no_example_inputs() -> None:
    with pytest.raises(jisu.InputError, match=r"forward\(\) needs input"):
        jisu.compile(nn.Linear(2, 2), example_inputs=())
    with pytest.raises(jisu.InputError, match="needs input"):
        jisu.compile(nn.Linear(2, 2))


def test_options_out_of_range() -> None:
    model, x = nn.Linear(2, 2), (torch.ones(1, 2),)
    with pytest.raises(jisu.InputError, match="num_threads.*-1"):
        jisu.compile(model, example_inputs=x, num_threads=-1)
    with pytest.raises(jisu.InputError, match="check.*'sometimes'"):
        jisu.compile(model, example_inputs=x, check="sometimes")
    with pytest.raises(TypeError, match="a pass is"):
        jisu.compile(model, example_inputs=x, passes=(3,))  # type: ignore[arg-type]
    with pytest.raises(jisu.JisuError, match="no pass 'fuse everything'"):
        jisu.compile(model, example_inputs=x, stop_after="fuse everything")


def test_recipe_typo() -> None:
    for recipe, reason in (
        ({"quantise": "int8"}, "unknown recipe|unknown key 'quantise'"),
        ({"prefill_chnk": 3}, "did you mean 'prefill_chunk'"),
        ("defualt", "did you mean 'default'"),
        ({"cache": {"page": -1}}, "page.*-1"),
        ("nowhere.toml", "nowhere.toml"),
    ):
        with pytest.raises(jisu.RecipeError, match=reason):
            jisu.compile(nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), recipe=recipe)


# --- Values ---------------------------------------------------------------------------------------------------------


def test_empty_graph() -> None:
    same(lambda x: x, torch.arange(3.0))


def test_zero_size() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 8).eval()
    assert jisu.compile(model, example_inputs=(torch.ones(0, 4),))(torch.ones(0, 4)).shape == (0, 8)


def test_zero_dim_scalar() -> None:
    same(lambda x: x * 2 + 1, torch.tensor(3.0))


def test_same_module_twice() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(2, 4)
    program = jisu.compile(model, example_inputs=(x,))
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)
    assert program.ir().count("weight(") == 2


def test_inplace_on_input() -> None:
    def increment(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    program = compiled(increment, torch.ones(3))
    mine, theirs = torch.arange(3.0), torch.arange(3.0)
    torch.testing.assert_close(program(mine), increment(theirs))
    torch.testing.assert_close(mine, theirs)


def test_alias_view_output() -> None:
    same(lambda x: (x.view(-1), x.t(), x), torch.arange(6.0).reshape(2, 3))


def test_output_reuse(linear: jisu.Program) -> None:
    first = linear(torch.ones(4, 16))
    kept = first.clone()
    linear(torch.zeros(4, 16))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_nan_weights() -> None:
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        jisu.compile(model, example_inputs=(x,))(x), model(x), equal_nan=True, atol=1e-5, rtol=1e-5
    )


def test_nan_input() -> None:
    x = torch.tensor([[1.0, float("nan"), -1.0], [float("inf"), 0.0, float("-inf")]])
    same(lambda x: (x.relu(), x.amax(1), x.softmax(1), x.clamp(-1, 1), torch.maximum(x, x.flip(0)), x.argmax(1)), x)


def test_all_masked_softmax() -> None:
    mask = torch.full((1, 1, 3, 3), float("-inf")).triu(1)
    mask[..., 0, :] = float("-inf")
    q = torch.randn(1, 2, 3, 4)
    same(lambda q: nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.to(q.dtype)), q)


def test_int_overflow() -> None:
    big = torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32)
    same(lambda x: (x + 1, x * x, -x, x.abs()), big)
    same(lambda x: x * 3, torch.tensor([2**62, -(2**62), 2**33]))


def test_int_div_neg() -> None:
    x = torch.tensor([-7, -6, -1, 0, 1, 6, 7])
    same(lambda x: (x // 3, torch.div(x, -3, rounding_mode="trunc"), x % 3, x % -3, torch.fmod(x, -3)), x)


# --- Calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [10, 11, -1, -11, 2**40])
def test_embedding_oob(embedding: jisu.Program, index: int) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    ids[1, 2] = index
    with pytest.raises(IndexError, match="10"):
        embedding(ids)


def test_computed_index_oob() -> None:
    """An index that the model computes is named like one that was given."""
    table = torch.arange(12.0).reshape(4, 3)
    program = compiled(lambda x: table[(x * 2).long()], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(program(torch.tensor([1.5, 0.0])), table[[3, 0]])
    with pytest.raises(IndexError, match=r"index 6 is out of range for an axis of size 4.*float32\[4, 3\]"):
        program(torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        (torch.ones(4, 17), ValueError, r"'input'.*float32\[4, 16\].*17|17.*16"),
        (torch.ones(5, 16), ValueError, "'input'.*5"),
        (torch.ones(16), ValueError, "'input'.*rank 2"),
        (torch.ones(4, 16, dtype=torch.float64), TypeError, "'input'.*expected float32, got float64"),
        (torch.ones(4, 16, dtype=torch.long), TypeError, "'input'.*expected float32, got int64"),
    ],
    ids=["call_wrong_shape", "call_other_batch", "call_wrong_rank", "call_wrong_dtype", "call_int_for_float"],
)
def test_call_wrong(linear: jisu.Program, bad: torch.Tensor, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason) as error:
        linear(bad)
    assert isinstance(error.value, jisu.JisuError)


def test_call_too_few_and_too_many(linear: jisu.Program) -> None:
    with pytest.raises(jisu.InputError, match="missing input 'input'"):
        linear()
    with pytest.raises(jisu.InputError, match="at most 1"):
        linear(torch.ones(4, 16), torch.ones(4, 16))
    with pytest.raises(jisu.InputError, match="unexpected argument 'scale'"):
        linear(torch.ones(4, 16), scale=2)
    with pytest.raises(jisu.InputError, match="'input'.*tensor.*'text'"):
        linear("text")


def test_noncontiguous_and_unaligned(linear: jisu.Program) -> None:
    base = torch.randn(16, 4)
    torch.testing.assert_close(linear(base.t()), linear(base.t().contiguous()))
    row = torch.randn(1, 16).expand(4, 16)
    torch.testing.assert_close(linear(row), linear(row.contiguous()))
    flat = torch.randn(65)[1:].reshape(4, 16)
    assert flat.data_ptr() % 64
    torch.testing.assert_close(linear(flat), linear(flat.clone()))


def test_numpy_in_numpy_out(linear: jisu.Program) -> None:
    x = np.ones((4, 16), np.float32)
    got = linear(x)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, linear(torch.from_numpy(x)).numpy())


def test_dynamic_range() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).eval()
    program = jisu.compile(model, example_inputs=(torch.ones(3, 4),), dynamic_shapes=({0: B},))
    for size in (2, 3, 8):
        x = torch.randn(size, 4)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)
    for size in (1, 9):
        with pytest.raises(jisu.InputError, match=rf"'b' must be in \[2, 8\], got {size}"):
            program(torch.ones(size, 4))


def test_weights_changed_after() -> None:
    model = nn.Linear(4, 4).eval()
    x = torch.ones(1, 4)
    program = jisu.compile(model, example_inputs=(x,))
    before = program(x)
    with torch.no_grad():
        model.weight.zero_()
    torch.testing.assert_close(program(x), before, rtol=0, atol=0)


def test_threads_call(linear: jisu.Program) -> None:
    inputs = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    want = [linear(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(inputs[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_oom_compile() -> None:
    def huge(x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(-1, 1) + x).cumsum(0).cumsum(1).sum()  # 2**42 bytes

    with pytest.raises(MemoryError, match=r"float32\[1048576, 1048576\].*GiB"):
        compiled(huge, torch.ones(2**20))(torch.ones(2**20))


# --- Language models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> jisu.Program:
    return jisu.compile(make("llama"))


def test_token_ids(decoder: jisu.Program) -> None:
    with pytest.raises(IndexError, match="99.*vocabulary of 99"):
        decoder(torch.tensor([[1, 99]]))
    with pytest.raises(IndexError, match="-1"):
        decoder.session().append([[-1]])
    with pytest.raises(jisu.InputError, match="rank 2"):
        decoder(torch.tensor([1, 2]))
    with pytest.raises(jisu.InputError, match="input_ids"):
        decoder()
    with pytest.raises(TypeError, match="int64"):
        decoder(torch.ones(1, 2))
    with pytest.raises(jisu.InputError, match="labels"):
        decoder(torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1, 2))


def test_session_limits(decoder: jisu.Program) -> None:
    session = decoder.session(capacity=4)
    session.append([[1, 2, 3]])
    with pytest.raises(jisu.InputError, match="capacity of 4"):
        session.append([[1, 2]])
    with pytest.raises(jisu.InputError, match="holds 1 sequences"):
        session.append([[1], [2]])
    with pytest.raises(jisu.InputError, match="capacity 1000"):
        decoder.session(capacity=1000)
    with pytest.raises(jisu.InputError, match="at least one token"):
        session.append(np.zeros((1, 0), np.int64))


def test_attention_mask(decoder: jisu.Program) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    padded = decoder(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 2:], decoder(ids[:1, 2:]).logits[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(jisu.InputError, match="hole"):
        decoder(ids, attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))


def test_a_module_does_not_generate(linear: jisu.Program) -> None:
    with pytest.raises(jisu.JisuError, match="no causal language model"):
        linear.generate("text")


# --- Saving and loading ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(linear: jisu.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "linear.jisu"
    linear.save(path)
    return path


def test_round_trip(linear: jisu.Program, decoder: jisu.Program, saved: Path, tmp_path: Path) -> None:
    x = torch.randn(4, 16)
    torch.testing.assert_close(jisu.load(saved)(x), linear(x), rtol=0, atol=0)
    jisu.load(saved).save(tmp_path / "again.jisu")
    torch.testing.assert_close(jisu.load(tmp_path / "again.jisu")(x), linear(x), rtol=0, atol=0)
    decoder.save(tmp_path / "folder")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(jisu.load(tmp_path / "folder")(ids).logits, decoder(ids).logits, rtol=0, atol=0)


def test_loads_without_torch(saved: Path) -> None:
    code = (
        "import sys, numpy, jisu; p = jisu.load(sys.argv[1]); p(numpy.ones((4, 16), 'float32'));"
        "assert not {'torch', 'transformers', 'tvm'} & set(sys.modules), 'imported too much'"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


def test_art_empty(tmp_path: Path) -> None:
    path = tmp_path / "x.jisu"
    path.write_bytes(b"")
    with pytest.raises(jisu.ArtifactError, match="empty"):
        jisu.load(path)
    with pytest.raises(OSError, match="nowhere"):
        jisu.load(tmp_path / "nowhere.jisu")


def test_art_bitflips(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 40):
        bad = bytearray(data)
        bad[position] ^= 1 << int(rng.integers(0, 8))
        path = tmp_path / "flipped.jisu"
        path.write_bytes(bad)
        with pytest.raises(jisu.ArtifactError):
            jisu.load(path)


def test_art_truncated(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for size in (3, 17, len(data) // 2, len(data) - 1):
        path = tmp_path / "short.jisu"
        path.write_bytes(data[:size])
        with pytest.raises(jisu.ArtifactError):
            jisu.load(path)


def test_art_pickle_bomb(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "bomb.jisu"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(jisu.ArtifactError, match="pickle"):
        jisu.load(path)
    assert not marker.exists()


def rewritten(linear: jisu.Program, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A saved folder with a changed manifest and a right checksum."""
    import attrs

    from jisu.runtime import artifact

    linear.save(folder)
    manifest = artifact.Manifest.from_bytes((folder / "manifest.json").read_bytes(), "manifest")
    fields = {a.name: getattr(manifest, a.name) for a in attrs.fields(artifact.Manifest)}
    change(fields)
    (folder / "manifest.json").write_bytes(artifact.Manifest(**fields).to_bytes())
    return folder


def test_art_other_version(linear: jisu.Program, tmp_path: Path) -> None:
    path = rewritten(linear, tmp_path / "program", lambda f: f.update(format=99))
    with pytest.raises(jisu.ArtifactError, match="99"):
        jisu.load(path)


def test_art_other_isa(linear: jisu.Program, tmp_path: Path) -> None:
    import attrs

    def demand(fields: dict[str, Any]) -> None:
        fields["target"] = attrs.evolve(fields["target"], features=("avx1024",))

    with pytest.raises(jisu.ArtifactError, match="avx1024"):
        jisu.load(rewritten(linear, tmp_path / "program", demand))


def test_art_readonly_dir(linear: jisu.Program, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    with pytest.raises(OSError, match="file"):
        linear.save(blocker / "x.jisu")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises((OSError, jisu.ArtifactError), match="folder"):
        linear.save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert blocker.read_text() == (folder / "mine.txt").read_text() == "mine"


def test_art_concurrent_cache(tmp_path: Path) -> None:
    code = (
        "import torch, jisu; torch.manual_seed(0); m = torch.nn.Linear(5, 3).eval(); x = torch.ones(2, 5);"
        "p = jisu.compile(m, example_inputs=(x,)); assert torch.allclose(p(x), m(x), atol=1e-5)"
    )
    environment = {**os.environ, "JISU_CACHE_DIR": str(tmp_path / "cache")}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [r.wait(300) for r in runs] == [0, 0]
    assert not [p for p in (tmp_path / "cache" / "kernels").iterdir() if p.name.startswith("new-")]


def test_damaged_checkpoint(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(jisu.ArtifactError, match=r"model\.safetensors"):
        jisu.compile(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(jisu.JisuError):
        jisu.compile(tmp_path)


# --- The IR by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("graph\n%0 = neg(%1): float32[2]\n%1 = neg(%0): float32[2]\nreturn %1", "%1 is used before"),
        ('graph\n%0 = input(name="x"): float32[2]\n%0 = neg(%0): float32[2]\nreturn %0', "%0 is defined twice"),
        ('graph\n%0 = input(name="x"): float32[2]\nreturn %3', "%3, which is not defined"),
        ('graph\n%0 = input(name="x"): float32[2]\n%1 = negate(%0): float32[2]\nreturn %1', "no op 'negate'"),
    ],
    ids=["cycle", "duplicate", "dangling", "unknown"],
)
def test_ir_cycle(text: str, reason: str) -> None:
    with pytest.raises(jisu.VerifyError, match=reason):
        parse(text)


def test_a_program_may_outlive_the_interpreter() -> None:
    """What a module still holds when Python ends is let go too late to call Python back."""
    code = (
        "import json, torch, jisu\n"
        "def keep(): pass\n"
        "json.keep = keep\n"  # whose globals thereby outlive this module
        "m = torch.nn.Linear(4, 4).to(torch.bfloat16)\n"
        "program = jisu.compile(m, example_inputs=(torch.ones(2, 4, dtype=torch.bfloat16),))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
