"""Products in AMX's tile unit: what is computed, by an emulation of the unit that checks what the processor would; and the instructions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch
import tvm
from conftest import emulation

import jisu
from jisu.compiler import levels
from jisu.compiler.schemes import SCHEMES
from jisu.runtime.artifact import ArtifactError
from jisu.targets import target as described
from jisu.targets.cpu import isa, packing
from jisu.targets.cpu.kernels import amx, integer, matmul
from jisu.targets.target import Target, known_targets

HERE = Target.resolve("cpu")
TILED = attrs.evolve(
    HERE, features=HERE.features | {"amx-tile", "amx-int8", "amx-bf16"}, peak={**dict(HERE.peak), "bfloat16": 1e15}
)
needs_vectors = pytest.mark.skipif(HERE.vector_bytes != 64, reason="this machine has no vectors of 64 bytes")
ROWS = (1, 2, 12, 13, 16, 17, 31, 32, 33, 63, 70, 260)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated unit, in this process."""
    return emulation("emulated_tiles.cc", tmp_path_factory.mktemp("tiles"))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_PREFIX", "emulated_")


def text(function: Any) -> str:
    """A kernel's TIR with the LLVM IR that it links."""
    return str(function.script(show_meta=True))


def compiled(function: Any, target: Target) -> Callable[..., np.ndarray]:
    """A kernel that returns what it wrote into its last array."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    main = tvm.compile(module, target=isa.tvm_target(target))["main"]

    def run(*arrays: np.ndarray) -> np.ndarray:
        tensors = [tvm.runtime.empty(a.shape, str(a.dtype)).copyfrom(a) for a in arrays]
        main(*tensors)
        return np.asarray(tensors[-1].numpy()).view(arrays[-1].dtype).reshape(arrays[-1].shape)

    return run


def operands(
    n: int, k: int, group: int, scheme: str, own: bool, zeros: bool, gated: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Codes, scales and zeros in panels, and records of many rows."""
    random, kind, panel = np.random.default_rng(0), SCHEMES[scheme], packing(HERE)[0]
    panels = (-(-n // panel), *((2,) if gated else ()))
    groups = (*panels, kind.groups(k, group), panel)
    codes = random.integers(0, 256, (*panels, kind.panel_words(k, 4), panel, 4), np.uint8)
    scales = random.uniform(0.01, 0.02, groups).astype(np.float16)
    offsets = [random.integers(0, 2**kind.bits, groups, np.uint8)] if zeros else []
    x = random.standard_normal((max(ROWS), k)).astype(np.float32)
    return [codes, scales, *offsets], levels.encode(x, SCHEMES["int8"], group, own)


@needs_vectors
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("n", "k", "group", "scheme", "own", "zeros", "gated"),
    [
        (96, 192, 0, "int8", False, False, False),
        (70, 256, 128, "int4", False, True, False),
        (32, 96, 32, "int4", True, False, True),
        (40, 160, 0, "int8", False, True, True),
    ],
)
def test_integers_are_the_vector_units(
    n: int, k: int, group: int, scheme: str, own: bool, zeros: bool, gated: bool
) -> None:
    """Bit by bit, of any number of rows."""
    options: dict[str, Any] = {"scheme": scheme, "group": group, "own": own, "zeros": zeros, "gated": gated}
    weights, records = operands(n, k, group, scheme, own, zeros, gated)
    made = {t: integer.levels_linear(n, k, "float32", t, **options) for t in (HERE, TILED)}
    assert "emulated_tdpbsud" in text(made[TILED]) and "emulated" not in text(made[HERE])
    plain_run, tiled_run = (compiled(f, t) for t, f in made.items())
    for rows in ROWS:
        plain, tiled = (f(records[:rows], *weights, np.zeros((rows, n), np.float32)) for f in (plain_run, tiled_run))
        assert np.abs(plain).max() > 0.1
        np.testing.assert_array_equal(tiled, plain, err_msg=str(rows))


@needs_vectors
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("n", "k"), [(96, 64), (70, 48), (32, 5120)])
def test_bfloat16_is_summed_in_one_order_whatever_the_rows(n: int, k: int) -> None:
    random = np.random.default_rng(0)
    w = (random.standard_normal((n, k)) * k**-0.5).astype(ml_dtypes.bfloat16)
    x = random.standard_normal((max(ROWS), k)).astype(ml_dtypes.bfloat16)
    function, packed = matmul.linear(n, k, "bfloat16", TILED, out_dtype="float32"), matmul.pack(w, TILED)
    assert "emulated_tdpbf16ps" in text(function)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    run = compiled(function, TILED)
    whole = run(x, packed, np.zeros((len(x), n), np.float32))
    np.testing.assert_allclose(whole, want, rtol=1e-2, atol=1e-2)
    for rows in ROWS:
        got = run(x[:rows], packed, np.zeros((rows, n), np.float32))
        np.testing.assert_array_equal(got, whole[:rows], err_msg=str(rows))


@needs_vectors
@pytest.mark.parametrize("k", [33, 40])
def test_inputs_that_fill_no_tiles_are_left_to_vectors(k: int) -> None:
    assert "tdpbf16ps" not in text(matmul.linear(32, k, "bfloat16", TILED))
    assert "tdpbsud" not in text(integer.levels_linear(32, k, "float32", TILED, scheme="int8", group=0))


def test_the_described_machine_gets_the_instructions() -> None:
    """Compiled here, run where there is such a unit."""
    machine = Target.resolve("cpu:sapphire-rapids")
    assert "cpu:sapphire-rapids" in known_targets() and machine.has("amx-tile", "amx-int8", "amx-bf16")
    layer: dict[str, Any] = {"scheme": "int4", "group": 64, "zeros": True}
    for target, there in ((machine, True), (attrs.evolve(machine, features=machine.features - {"amx-tile"}), False)):
        functions = {
            "integers": integer.levels_linear(96, 256, "float32", target, **layer),
            "floats": matmul.linear(96, 256, "bfloat16", target),
        }
        for name, words in (("integers", {"tdpbsud", "vpdpbusd"}), ("floats", {"tdpbf16ps"})):
            module = tvm.IRModule({"main": functions[name].with_attr("global_symbol", "main")})
            assembly = tvm.compile(module, target=isa.tvm_target(target)).mod.inspect_source("asm")
            unit = {"ldtilecfg", "tileloadd", "tilestored", "tilerelease"}
            for word in words | unit:
                assert (word in assembly) == (there or word == "vpdpbusd"), (name, word)


@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_are_used_where_the_system_lets_us(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    described.host.cache_clear()
    described._cpuinfo.cache_clear()
    flags = " ".join(linux for linux in described._LLVM_FEATURE)
    info = {"flags": flags, "vendor_id": "GenuineIntel", "cpu MHz": "2000"}
    monkeypatch.setattr(described, "_cpuinfo", lambda: info)
    monkeypatch.setattr(described, "_may_use_tiles", lambda: allowed)
    try:
        machine = described.host()
    finally:
        described.host.cache_clear()
    assert machine.has("amx-tile") == machine.has("amx-int8") == allowed and machine.has("avx512vnni")
    assert (machine.peak_flops("bfloat16") > machine.peak_flops("float32")) == allowed


def test_a_program_for_tiles_is_refused_without_them(tmp_path: Path) -> None:
    """It compiles and saves, and neither runs here nor loads."""
    if HERE.has("amx-tile"):
        pytest.skip("this machine has them")
    model, x = torch.nn.Linear(64, 64).bfloat16().eval(), torch.ones(2, 64, dtype=torch.bfloat16)
    program = jisu.compile(model, "cpu:sapphire-rapids", example_inputs=(x,))
    with pytest.raises(jisu.TargetError, match="this machine lacks .*amx-tile.*; save it"):
        program(x)
    program.save(tmp_path / "p.jisu")
    with pytest.raises(ArtifactError, match="amx"):
        jisu.load(tmp_path / "p.jisu")
