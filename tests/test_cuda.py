"""Kernels for NVIDIA GPUs, without one: what they compute, by a CPU that emulates a block of threads; and the PTX that they become."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import pytest
import tvm
from conftest import emulation

from jisu.compiler.errors import TargetError
from jisu.targets.cpu import isa
from jisu.targets.cuda import device, ptx
from jisu.targets.cuda.kernels import attention, products
from jisu.targets.target import Target
from jisu.targets.worker import find_linker

GPU = Target.describe("cuda:sm_90")
HOPPER = attrs.evolve(GPU, mcpu="sm_90a")
HOST = Target.resolve("cpu")
# Several registers come back through memory, since LLVM's and C's ways of returning them differ.
WRAPPERS = {
    "ldmatrix.sync.aligned.m8n8.x4.b16.p3": ("i32", ("ptr addrspace(3)",), "emulated_ldmatrix"),
    "ldmatrix.sync.aligned.m8n8.x4.trans.b16.p3": ("i32", ("ptr addrspace(3)",), "emulated_ldmatrix_trans"),
    "mma.m16n8k16.row.col.bf16": ("float", ("i32",) * 6 + ("float",) * 4, "emulated_mma"),
}


def wrapped(name: str, element: str, types: tuple[str, ...], to: str) -> tuple[str, str]:
    """The start of a declaration that is to go, and the definition in its place."""
    result = "{ " + ", ".join([element] * 4) + " }"
    given = [f"{t} %a{i}" for i, t in enumerate(types)]
    passed = [g.replace("addrspace(3) ", "") if "addrspace" not in g else "ptr %flat" for g in given]
    flat = ["  %flat = addrspacecast ptr addrspace(3) %a0 to ptr"] if "addrspace" in types[0] else []
    lines = [
        f"declare void @{to}(ptr, {', '.join(t.replace(' addrspace(3)', '') for t in types)})",
        f"define {result} @emulated.{name}({', '.join(given)}) {{",
        "  %out = alloca [4 x i32]",
        *flat,
        f"  call void @{to}(ptr %out, {', '.join(passed)})",
        f"  %found = load {result}, ptr %out, align 4",
        f"  ret {result} %found",
        "}",
    ]
    return f"declare {result} @emulated.{name}(", "\n".join(lines)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = emulation("emulated_gpu.cc", tmp_path_factory.mktemp("gpu"))
    library.emulated_launch.restype = ctypes.c_char_p
    return library


Launch = Callable[..., None]


@pytest.fixture
def launch(emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """launch(kernel of the target, grid, *arrays and numbers, late=, order=): runs it on this CPU, writing into the arrays."""
    monkeypatch.setattr(device, "PREFIX", "emulated.")
    loaded: dict[str, Any] = {}

    def load(kernel: device.DeviceKernel) -> Any:
        if kernel.name not in loaded:
            text = isa.link_text([kernel.micro])
            for name, (element, types, to) in WRAPPERS.items():
                declaration, definition = wrapped(name, element, types, to)
                if declaration in text:
                    text = "\n".join(x for x in text.splitlines() if not x.startswith(declaration)) + "\n" + definition
            where = isa.tvm_target(HOST)
            function = ptx.as_function(kernel, "entry", text, where)
            module = tvm.get_global_func("target.build.llvm")(tvm.IRModule({"entry": function}), where)
            path = tmp_path / f"{kernel.name}.o"
            module.write_to_file(str(path), "o")
            library = path.with_suffix(".so")
            subprocess.run([*find_linker(), "-o", str(library), str(path)], check=True)
            loaded[kernel.name] = ctypes.CDLL(str(library))
        return loaded[kernel.name].entry

    def run(kernel: device.DeviceKernel, grid: tuple[int, ...], *given: Any, late: bool = True, order: int = 1) -> None:
        values = [g.ctypes.data if isinstance(g, np.ndarray) else g for g in given]
        numbers = (ctypes.c_int64 * len(values))(*values)
        function = ctypes.cast(load(kernel), ctypes.c_void_p)
        failure = emulator.emulated_launch(
            function,
            numbers,
            len(values),
            *map(ctypes.c_int64, (*grid, 1, 1)[:3]),
            kernel.threads,
            int(late),
            order,
        )
        if failure:
            raise RuntimeError(failure.decode())

    return run


def drawn(seed: int, *shape: int) -> np.ndarray:
    """bfloat16 at a multiple of 128 bytes."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)
    raw = np.empty(values.nbytes + 128, np.uint8)
    begin = -raw.ctypes.data % 128
    out = raw[begin : begin + values.nbytes].view(ml_dtypes.bfloat16).reshape(shape)
    out[...] = values
    return out


def close(got: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-2, atol=1e-2 * np.sqrt(x.shape[1]))


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 70, 512), (1, 33, 8), (3, 64, 264), (8, 5, 1000)])
def test_few_rows(rows: int, n: int, k: int, launch: Launch) -> None:
    x, w, y = drawn(0, rows, k), drawn(1, n, k), drawn(2, rows + 1, n)
    guard = y[-1].copy()
    launch(products.matvec(k, rows, GPU), products.matvec_grid(n), x, w, y, n)
    close(y[:rows], x, w)
    np.testing.assert_array_equal(y[-1], guard)  # nothing is written beyond


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 64), (1, 1, 32), (130, 70, 160), (17, 200, 96)])
@pytest.mark.parametrize(("late", "order"), [(True, 1), (False, -1)])
def test_many_rows(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    """Edge tiles too; copies that come late or at once, threads in either order: no race."""
    x, w, y = drawn(0, m, k), drawn(1, n, k), drawn(2, m + 1, n)
    guard = y[-1].copy()
    launch(products.product(k, GPU), products.product_grid(m, n), x, w, y, m, n, late=late, order=order)
    close(y[:m], x, w)
    np.testing.assert_array_equal(y[-1], guard)


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 64), (1, 5, 64), (130, 70, 320)])
@pytest.mark.parametrize(("late", "order"), [(True, 1), (False, -1)])
def test_many_rows_on_hopper(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    x, w, y = drawn(0, m, k), drawn(1, n, k), drawn(2, m + 1, n)
    guard = y[-1].copy()
    kernel, grid = products.product_hopper(k, HOPPER), products.product_grid(m, n)
    launch(kernel, grid, x, w, y, m, n, late=late, order=order)
    close(y[:m], x, w)
    np.testing.assert_array_equal(y[-1], guard)


def test_a_fence_that_is_missing_shows_on_hopper(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, "begin_products", lambda self: None)
    x, w, y = drawn(0, 64, 64), drawn(1, 64, 64), drawn(2, 64, 64)
    with pytest.raises(RuntimeError, match="without a fence"):
        launch(products.product_hopper(64, HOPPER), products.product_grid(64, 64), x, w, y, 64, 64)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "past", "parts", "window"),
    [(4, 1, 64, 70, 3, None), (2, 2, 128, 37, 1, None), (4, 2, 256, 9, 4, None), (6, 2, 128, 200, 5, 33)],
)
def test_attention_of_a_token(
    heads: int, kv_heads: int, d: int, past: int, parts: int, window: int | None, launch: Launch
) -> None:
    """Padding, parts without keys, and slots behind the last key that hold NaN."""
    b, cap, scale = 2, past + 5, d**-0.5
    q, k, v, out = (
        drawn(0, b, heads, d),
        drawn(1, b, kv_heads, cap, d),
        drawn(2, b, kv_heads, cap, d),
        drawn(3, b, heads, d),
    )
    k[:, :, past + 1 :] = v[:, :, past + 1 :] = np.nan
    start, length = np.array([0, past // 2], np.int64), np.array([past], np.int64)
    states = np.zeros((b, heads, parts, d + 2), np.float32)
    kernel = attention.attend_token(heads, kv_heads, d, GPU, scale=scale, window=window)
    launch(kernel, (parts, kv_heads, b), q, k, v, start, length, states, cap, parts)
    launch(attention.merge_parts(d, GPU), (b * heads,), states, out, parts)
    for i in range(b):
        first = max(int(start[i]), past + 1 - window if window else 0)
        for h in range(heads):
            keys, values = (x[i, h // (heads // kv_heads), first : past + 1].astype(np.float64) for x in (k, v))
            scores = keys @ q[i, h].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            want = weights @ values / weights.sum()
            np.testing.assert_allclose(out[i, h].astype(np.float64), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "past", "s", "window"),
    [(2, 1, 64, 0, 70, None), (2, 2, 128, 37, 64, None), (4, 2, 64, 130, 5, None), (1, 1, 128, 100, 150, 40)],
)
@pytest.mark.parametrize(("late", "order"), [(True, 1), (False, -1)])
def test_attention_of_many_tokens(
    heads: int, kv_heads: int, d: int, past: int, s: int, window: int | None, late: bool, order: int, launch: Launch
) -> None:
    b, cap, scale = 2, past + s + 3, d**-0.5
    q, out = drawn(0, b, s, heads, d), drawn(3, b, s + 1, heads, d)
    k, v = drawn(1, b, kv_heads, cap, d), drawn(2, b, kv_heads, cap, d)
    k[:, :, past + s :] = v[:, :, past + s :] = np.nan
    start, length = np.array([0, min(past + 2, 40)], np.int64), np.array([past], np.int64)
    guard = out.reshape(-1, heads, d)[b * s :].copy()
    kernel = attention.attend_tokens(heads, kv_heads, d, GPU, scale=scale, window=window)
    launch(kernel, (-(-s // attention.QUERIES), heads, b), q, k, v, start, length, out, s, cap, late=late, order=order)
    np.testing.assert_array_equal(out.reshape(-1, heads, d)[b * s :], guard)  # nothing is written beyond
    out = out.reshape(-1, heads, d)[: b * s].reshape(b, s, heads, d)
    for i in range(b):
        for h in range(heads):
            keys, values = (x[i, h // (heads // kv_heads), : past + s].astype(np.float64) for x in (k, v))
            scores = q[i, :, h].astype(np.float64) @ keys.T * scale
            key, row = np.arange(past + s), past + np.arange(s)[:, None]
            there = (key <= row) & (key >= start[i]) & (key > row - (window or 10**6))
            weights = np.where(there, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
            want = weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            np.testing.assert_allclose(out[i, :, h].astype(np.float64), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
def test_what_is_missing_shows(missing: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the emulation finds a wait, a barrier and a commit that aren't there."""
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    m, n, k = 128, 128, 256
    x, w, y = drawn(0, m, k), drawn(1, n, k), drawn(2, m, n)
    if missing == "barrier":
        launch(products.product(k, GPU), products.product_grid(m, n), x, w, y, m, n, order=-1)
        assert np.isnan(y.astype(np.float32)).any()
    else:
        with pytest.raises(RuntimeError, match="never"):
            launch(products.product(k, GPU), products.product_grid(m, n), x, w, y, m, n)


def test_threads_that_part_are_found(launch: Launch) -> None:
    f = device.Device("apart", [("ptr", "y")], GPU, 32)
    (y,) = (f.memory(p) for p in f.params())
    thread = f.thread()
    half = f.cast("uitofp", f.cast("trunc", thread, "i32"), "float")
    f.when(thread < 16, lambda: f.store(f.sum_of_warp(half), f.at(y, thread, "float32")), f.barrier)
    with pytest.raises(RuntimeError, match="different things|for ever"):
        launch(f.built(), (1, 1), np.zeros(64, np.float32))


def test_inputs_that_do_not_fit_are_refused() -> None:
    builds: list[tuple[Callable[[int], Any], int]] = [
        (lambda k: products.matvec(k, 1, GPU), 12),
        (lambda k: products.product(k, GPU), 48),
        (lambda k: products.product_hopper(k, HOPPER), 96),
    ]
    with pytest.raises(TargetError, match="6 query heads can't share 4 key heads"):
        attention.attend_tokens(6, 4, 64, GPU, scale=1.0)
    with pytest.raises(TargetError, match="96 channels"):
        attention.attend_token(4, 4, 96, GPU, scale=1.0)
    for build, k in builds:
        with pytest.raises(TargetError, match=str(k)):
            build(k)


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90"])
def test_ptx_has_the_instructions(name: str) -> None:
    target = Target.describe(name)
    made = {
        "few": products.matvec(4096, 1, target),
        "many": products.product(4096, target),
        "token": attention.attend_token(32, 8, 128, target, scale=0.1),
        "merge": attention.merge_parts(128, target),
        "tokens": attention.attend_tokens(32, 8, 128, target, scale=0.1),
    }
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    for kind in ("few", "token"):
        assert re.search(r"ld\.global(\.nc)?\.v4", bodies[kind]) and "shfl.sync.bfly" in bodies[kind]
    assert "ex2.approx.ftz" in bodies["token"]
    for word in ("ldmatrix.sync.aligned.m8n8.x4.trans", "cvt.rn.bf16x2.f32", "cp.async.cg.shared.global", "mma.sync"):
        assert word in bodies["tokens"], word
    for word in ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global", "bar.sync"):
        assert word in bodies["many"], word
    assert not re.search(r"\.local\b|call\.uni", text) and f".target {target.mcpu}" in text
    assert "mma.sync" in bodies["many"] and bodies["many"].count("mma.sync") == 32
    if shutil.which("ptxas") is None:
        pytest.skip("there is no ptxas here")
    cubin, usage = ptx.assemble(text, target)
    assert cubin[:4] == b"\x7fELF" and set(usage) == {ptx.entry_name(v) for v in made.values()}
    assert all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    assert usage[ptx.entry_name(made["many"])].registers <= 128  # two blocks of 256 threads per multiprocessor


def test_ptx_of_hopper() -> None:
    kernel = products.product_hopper(4096, HOPPER)
    text = ptx.to_ptx([kernel], HOPPER)
    words = ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
             "fence.proxy.async", "cp.async.cg.shared.global")  # fmt: skip
    for word in words:
        assert word in text, word
    assert ".target sm_90a" in text and text.count("wgmma.mma_async") == 4
    with pytest.raises(TargetError, match="sm_90a"):
        products.product_hopper(4096, GPU)
    if shutil.which("ptxas") is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, HOPPER)
    (used,) = usage.values()
    assert used.spilled_bytes == used.stack_bytes == 0 and used.registers <= 168
