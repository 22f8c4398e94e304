"""Kernels for NVIDIA GPUs, without one: what they compute, by a CPU that emulates a block of threads; and the PTX that they become."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given as given_drawn
from hypothesis import strategies as st
from test_sampling import sampling_rows

from jisu.compiler import levels, ops, rows
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, numpy_dtype, substitute, symbol
from jisu.targets.cuda import device, emulated, ptx
from jisu.targets.cuda.kernels import (
    attention,
    experts,
    heads,
    hopper,
    norm,
    products,
    records,
    rounding,
    sampling,
    single,
    single_attention,
    tails,
    thin,
)
from jisu.targets.cuda.kernels.attention import Form
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.kernels.tails import Encoding, Tail
from jisu.targets.cuda.lowering import lower
from jisu.targets.target import Target, host, known_targets
from jisu.targets.worker import find_linker

REAL = Target.describe("cuda:sm_90")
GPU = attrs.evolve(REAL, mcpu="sm_80", triple=host().triple)
EARLY = attrs.evolve(REAL, mcpu="sm_90", triple=host().triple)
HOPPER = attrs.evolve(REAL, mcpu="sm_90a", triple=host().triple)
SHARED_BYTES = 227 << 10  # that a block may have at most
RACES = pytest.mark.parametrize(("late", "order"), [(True, 1), (False, -1)])


@pytest.fixture(scope="module")
def emulator(driver_library: Path) -> Any:
    # Kernels find the functions of the library that is loaded first, so there is one in a process: the GPU is in the driver's.
    library = ctypes.CDLL(str(driver_library), mode=ctypes.RTLD_GLOBAL)
    for name in ("launch", "end", "failure"):
        getattr(library, f"emulated_{name}").restype = ctypes.c_char_p
    library.emulated_begin.restype = ctypes.c_void_p
    return library


Launch = Callable[..., None]
Given = tuple[ctypes.c_void_p, Any, int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, int]


def given(kernel: device.DeviceKernel, folder: Path, grid: tuple[int, ...], *values: Any) -> Given:
    """What the emulator is given of a launch; the kernel is compiled into `folder`, once."""
    path = folder / f"{kernel.name}.so"
    if not path.exists():
        emulated.to_library([kernel], GPU, {}, path, find_linker())
    function = ctypes.cast(getattr(ctypes.CDLL(str(path)), ptx.entry_name(kernel)), ctypes.c_void_p)
    numbers = (ctypes.c_int64 * len(values))(*(v.ctypes.data if isinstance(v, np.ndarray) else v for v in values))
    x, y, z = map(ctypes.c_int64, (*grid, 1, 1)[:3])
    return function, numbers, len(values), x, y, z, kernel.threads


@pytest.fixture
def launch(emulator: Any, tmp_path: Path) -> Launch:
    """launch(kernel of the target, grid, *arrays and numbers, late=, order=): runs it on this CPU, writing into the arrays."""

    def run(
        kernel: device.DeviceKernel, grid: tuple[int, ...], *values: Any, late: bool = True, order: int = 1
    ) -> None:
        emulator.emulated_shared(kernel.shared_bytes)
        failure = emulator.emulated_launch(*given(kernel, tmp_path, grid, *values), int(late), order)
        emulator.emulated_shared(SHARED_BYTES)
        if failure:
            raise RuntimeError(failure.decode())

    return run


def drawn(seed: int, *shape: int, dtype: str = "bfloat16") -> np.ndarray:
    """16-bit numbers at a multiple of 128 bytes."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))
    raw = np.empty(values.nbytes + 128, np.uint8)
    begin = -raw.ctypes.data % 128
    out = raw[begin : begin + values.nbytes].view(values.dtype).reshape(shape)
    out[...] = values
    return out


def close(got: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-2, atol=1e-2 * np.sqrt(x.shape[1]))


def multiplied(
    launch: Launch, kernel: device.DeviceKernel, grid: tuple[int, ...], m: int, n: int, k: int, **how: Any
) -> None:
    """Run a plain layer; nothing is written beyond its results."""
    dtype = "float16" if "float16" in kernel.name and "bfloat16" not in kernel.name else "bfloat16"
    x, w, y = (drawn(i, *shape, dtype=dtype) for i, shape in enumerate(((m, k), (n, k), (m + 1, n))))
    guard = y[-1].copy()
    launch(kernel, grid, x, w, y, m, **how)
    close(y[:m], x, w)
    np.testing.assert_array_equal(y[-1], guard)


def tiles(layer: Layer, m: int, tile: products.Tile = products.LARGE) -> tuple[int, int]:
    return -(-m // tile.rows), layer.tiles(tile.outputs)


@pytest.mark.parametrize(("rows", "m", "n", "k"), [(8, 1, 70, 512), (8, 1, 33, 8), (8, 3, 64, 1288), (16, 11, 5, 1024), (32, 70, 40, 6144)])  # fmt: skip
@RACES
def test_few_rows(rows: int, m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    layer = Layer(k, (n,), "bfloat16" if late else "float16")
    for target in (GPU, attrs.evolve(GPU, cores=1)):  # tiles by two where there are blocks enough
        grid = (layer.tiles(thin.outputs(layer, rows, target)), -(-m // rows))
        multiplied(launch, thin.thin(layer, rows, target), grid, m, n, k, late=late, order=order)


@pytest.mark.parametrize(
    ("n", "k", "scheme"), [(64, 512, ""), (1000, 64, ""), (72, 96, ""), (4096, 128, "int4"), (48, 256, "int8")]
)
@pytest.mark.parametrize("rms", [True, False])
@RACES
def test_a_row_and_its_norm(n: int, k: int, scheme: str, rms: bool, late: bool, order: int, launch: Launch) -> None:
    """Whichever block is done last norms the results: to the bit what the two kernels give one after the other."""
    how = norm.Norm(n, "bfloat16", 1e-5, rms, True, not rms)
    layer = Layer(k, (n,), residual=True, scheme=scheme)
    x, gain, bias, r = (drawn(i, *shape) for i, shape in enumerate(((1, k), (n,), (n,), (1, n))))
    w = (
        drawn(4, n, k)
        if not scheme
        else np.random.default_rng(4).integers(0, 256, (n, layer.row_bytes)).astype(np.uint8)
    )
    scales = [np.full((n, 1), 0.01, np.float16)] if scheme else []
    found = [drawn(i, 2, n) for i in (5, 6, 5, 6)]
    given_norm, counter = [gain] if rms else [gain, bias], np.zeros(1, np.int32)
    grid, both = (layer.tiles(thin.OUTPUTS), 1), {"late": late, "order": order}
    kernel = thin.thin(layer, 8, GPU, Tail(how))
    launch(kernel, grid, x, w, *scales, r, found[0], 1, *given_norm, found[1], counter, **both)
    assert not counter.any()
    launch(thin.thin(layer, 8, GPU), grid, x, w, *scales, r, found[2], 1, **both)
    launch(tails.tailed(Tail(how), GPU), (1,), found[2], *given_norm, found[3])
    tolerance = (
        0 if tails.tailed(Tail(how), GPU).threads == kernel.threads else 1e-2
    )  # sums have an order for each number of threads
    for one, other in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fault", ["the first joins", "counters stay"])
def test_a_row_that_is_normed_too_early_shows(fault: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = device.Device.counted
    wrong = {
        "the first joins": lambda self, address, most: most - counted(self, address, most),
        "counters stay": lambda self, address, most: counted(self, address, most + 1),
    }
    monkeypatch.setattr(device.Device, "counted", wrong[fault])
    with pytest.raises(AssertionError):
        test_a_row_and_its_norm(64, 512, "", True, True, 1, launch)


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 64), (1, 1, 32), (130, 70, 160), (17, 200, 96)])
@RACES
def test_many_rows(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    """Edge tiles too; copies that come late or at once, threads in either order: no race."""
    layer = Layer(k, (n,), "bfloat16" if late else "float16")
    for tile in (products.LARGE, products.SMALL):
        kernel = products.product(layer, tile, GPU)
        multiplied(launch, kernel, tiles(layer, m, tile), m, n, k, late=late, order=order)


def multiplied_codes(launch: Launch, tile: products.Tile, m: int, n: int, k: int, **how: Any) -> None:
    """Run a layer of int4 in groups of 32, in the order in which kernels read codes."""
    layer = Layer(k, (n,), scheme="int4", group=32)
    rng = np.random.default_rng(k)
    codes, scales = rng.integers(0, 16, (n, k)).astype(np.uint8), drawn(2, n, k // 32, dtype="float16")
    packed = drawn(3, n, k // 4, dtype="float16").view(np.uint8)
    packed[...] = codes[:, ::2] | codes[:, 1::2] << 4
    x, y = drawn(0, m, k), drawn(1, m + 1, n)
    guard = y[-1].copy()
    launch(products.product(layer, tile, GPU), tiles(layer, m, tile), x, packed, scales, y, m, **how)
    w = (codes.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), 32, 1)
    want = x.astype(np.float64) @ w.T
    np.testing.assert_allclose(y[:m].astype(np.float64), want, rtol=1e-2, atol=5e-2 * np.sqrt(k))
    np.testing.assert_array_equal(y[-1], guard)


@pytest.mark.parametrize(("m", "n", "k"), [(70, 200, 320), (130, 70, 96), (1, 128, 64)])
@RACES
def test_many_rows_of_codes(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    """Steps of 64 inputs, so that each copies whole sectors, or of 32 where 64 don't divide them."""
    for tile in (products.LARGE, products.SMALL):
        multiplied_codes(launch, tile, m, n, k, late=late, order=order)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
def test_what_is_missing_with_codes_shows(missing: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        multiplied_codes(launch, products.LARGE, 128, 128, 320, order=-1)


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
@pytest.mark.parametrize("few", [False, True])
def test_what_is_missing_shows(missing: str, few: bool, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the emulation finds a wait, a barrier and a commit that aren't there."""
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    k = 2048 if few else 256
    layer = Layer(k, (128,))
    kernel = thin.thin(layer, 8, GPU) if few else products.product(layer, products.LARGE, GPU)
    m, grid = (8, (8, 1)) if few else (128, (1, 1))
    with pytest.raises(RuntimeError if missing != "barrier" else AssertionError):
        multiplied(launch, kernel, grid, m, 128, k, order=-1)


def test_threads_that_part_are_found(launch: Launch) -> None:
    f = device.Device("apart", [("ptr", "y")], GPU, 32)
    (y,) = (f.memory(p) for p in f.params())
    thread = f.thread()
    half = f.cast("uitofp", f.cast("trunc", thread, "i32"), "float")
    f.when(thread < 16, lambda: f.store(f.sum_of_warp(half), f.at(y, thread, "float32")), f.barrier)
    with pytest.raises(RuntimeError, match="different things|for ever"):
        launch(f.built(), (1, 1), np.zeros(64, np.float32))


def test_a_launch_that_can_not_begin_leaves_nothing(emulator: Any, launch: Launch, tmp_path: Path) -> None:
    """Threads that wait for ever fail as they did before it."""
    f = device.Device("for_ever", [("ptr", "y")], GPU, 32)
    f.when(f.thread() < 16, f.barrier)
    kernel, y = f.built(), np.zeros(64, np.float32)
    function, _, _, *rest = given(kernel, tmp_path, (1, 1), y)
    numbers = (ctypes.c_int64 * 49)()
    assert emulator.emulated_begin(function, numbers, 49, *rest) is None
    assert emulator.emulated_failure() == b"too many arguments"
    with pytest.raises(RuntimeError, match="for ever"):
        launch(kernel, (1, 1), y)


def test_powers_of_e(launch: Launch) -> None:
    f = device.Device("exp", [("ptr", "x"), ("ptr", "y")], GPU, 256)
    x, y = (f.memory(p) for p in f.params())
    at = f.block() * 256 + f.thread()
    f.store(f.exp(f.load("float", f.at(x, at, "float32"))), f.at(y, at, "float32"))
    given = np.concatenate([np.linspace(-87, 88.7, 508), [-np.inf, np.inf, np.nan, -0.0]]).astype(np.float32)
    got = np.zeros(512, np.float32)
    launch(f.built(), (2,), given, got)
    np.testing.assert_allclose(got, np.exp(given.astype(np.float64)), rtol=5e-7, atol=0)


@pytest.mark.parametrize("fault", ["", "never", "late"])
@pytest.mark.parametrize("streams", [True, False])
def test_launches_that_begin_early(
    streams: bool, fault: str, emulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer (or a norm) of a norm's results, begun when those aren't there: that is right as long as it waits in time for them. Negative
    controls: a kernel that doesn't wait, and one that waits behind its reads."""
    k = 4096
    x, w, y, out, want = (
        drawn(i, *shape) for i, shape in ((0, (2, k)), (1, (16, k)), (2, (2, k)), (3, (2, k)), (3, (2, k)))
    )
    how = norm.Norm(k, "bfloat16", 1e-5, True, True, False)
    first = tails.tailed(Tail(how), EARLY)
    if fault:
        monkeypatch.setattr(device.Device, "wait", lambda self: setattr(self, "waited", True))
    if fault == "late":
        finish = device.Device.finish
        monkeypatch.setattr(
            device.Device, "finish", lambda self: (self._special("griddepcontrol.wait"), finish(self))[1]
        )
    second = thin.thin(Layer(k, (16,)), 8, EARLY) if streams else tails.tailed(Tail(attrs.evolve(how, eps=1e-6)), EARLY)
    assert first.early and second.early and second.ahead == ((1,) if streams else ())

    def of(y: np.ndarray, out: np.ndarray) -> Given:
        return given(second, tmp_path, (1 if streams else 2,), y, w, out, *([2] if streams else []))

    begun = emulator.emulated_begin(*of(y, out))
    if begun is None:
        assert fault == "never" and b"never waits" in emulator.emulated_failure()
        return
    assert emulator.emulated_launch(*given(first, tmp_path, (2,), x, w, y), 1, 1) is None
    assert emulator.emulated_end(ctypes.c_void_p(begun)) is None
    monkeypatch.undo()
    assert emulator.emulated_launch(*of(y, want), 1, 1) is None
    assert np.array_equal(out, want) == (fault == "") and fault != "never"


# --- Experts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 7, 300, 1000])
@pytest.mark.parametrize(("count", "rows", "index"), [(8, 8, "int64"), (5, 128, "int32"), (300, 32, "int64")])
@RACES
def test_groups_of_experts(
    pairs: int, count: int, rows: int, index: str, late: bool, order: int, launch: Launch
) -> None:
    """Every pair of an expert is in a group of that one, in order; the others, and those behind the last, are in none."""
    how = experts.Mixture(count, 1, 64, 64, "bfloat16", "silu", index)
    numbers = np.random.default_rng(pairs).integers(-1, count + 1, pairs).astype(index)
    groups = -(-pairs // rows) + count
    slots, names = np.zeros((groups + 1, rows), np.int32), np.full(groups + 1, 77, np.int32)
    launch(
        experts.grouped(how.choice(False), rows, GPU),
        (1,),
        numbers,
        slots,
        names,
        pairs,
        groups,
        late=late,
        order=order,
    )
    assert names[-1] == 77 and not slots[-1].any()
    for expert in range(count):
        held = slots[:-1][names[:-1] == expert].ravel()
        want = np.flatnonzero(numbers == expert)
        assert len(held) == -(-len(want) // rows) * rows
        np.testing.assert_array_equal(held[: len(want)], want)
        assert (held[len(want) :] == -1).all()
    assert (slots[:-1][names[:-1] == -1] == -1).all()


# --- Attention ----------------------------------------------------------------------------------------------------------


def rows_of(form: Form, keys: np.ndarray, cap: int, table: np.ndarray | None) -> np.ndarray:
    """Keys [b, t, kv_heads, d] where the form wants them; what is no key holds NaN."""
    b, t, heads, d = keys.shape
    if form.layout == "plain":
        return keys
    shape = (b * cap, heads, form.page, d) if table is not None else (b, heads, cap, d)
    held = drawn(9, *shape, dtype=form.dtype)
    held[...] = np.nan
    if form.scheme != "none":
        keys = rows.encode(keys.astype(np.float32), form.scheme)
        held = np.full((*shape[:-1], keys.shape[-1]), 255, np.uint8)
    for i in range(b):
        for key in range(t):
            if table is not None:
                held[table[i, key // form.page], :, key % form.page] = keys[i, key]
            else:
                held[i, :, key % cap] = keys[i, key]
    return held


def attended(
    form: Form,
    launch: Launch,
    past: int,
    s: int,
    parts: int = 0,
    target: Target | None = None,
    then: Encoding | None = None,
    **how: Any,
) -> None:
    """Attention of s new tokens behind `past` others, for two sequences of which one is padded; parts: of one token's keys; then: what one
    token's results become, too."""
    b, total, target = 2, past + s, target or GPU
    cap = {
        "contiguous": total + 5,
        "plain": total,
        "paged": -(-total // max(form.page, 1)) + 1,
        "ring": form.window + s,
    }[form.layout]
    q, out = (drawn(i, b, n, form.heads, form.head_dim, dtype=form.dtype) for i, n in ((0, s), (3, s + 1)))
    keys, values = (drawn(i, b, total, form.kv_heads, form.head_dim, dtype=form.dtype) for i in (1, 2))
    table = np.random.default_rng(5).permutation(b * cap).astype(np.int32).reshape(b, cap) if form.page else None
    k, v = (rows_of(form, x, cap, table) for x in (keys, values))
    if form.scheme != "none":
        keys, values = (
            rows.decode(rows.encode(x.astype(np.float32), form.scheme), form.scheme) for x in (keys, values)
        )
    start = np.array([0, past // 2 if form.cached else 0], np.int64)
    sinks = drawn(4, form.heads, dtype=form.dtype)
    guard = out.reshape(-1, form.heads, form.head_dim)[b * s :].copy()
    given = [
        q,
        k,
        v,
        *([] if table is None else [table]),
        *([start, np.array([past], np.int64)] if form.cached else []),
    ]
    sink = [sinks] if form.sinks else []
    sizes = [cap] if table is None else [cap, b * cap]
    if parts:
        states = np.full((b, form.heads, parts, form.head_dim + 2), np.nan, np.float32)
        own = form.heads // attention.sharing(form)
        counters = np.zeros(b * (own + (then is not None)), np.int32)
        size = 0 if then is None else levels.record_bytes(then.k, then.group, then.own)
        made = np.full((b + 1, size), 77, np.uint8)
        own_memory = (*sink, out, states, counters, *([] if then is None else [made]))
        kernel = attention.attend_token(form, target, None if then is None else Tail(None, then))
        launch(kernel, (parts * b, own), *given, *own_memory, *sizes, parts, **how)
        if then is not None:
            rows_of_tokens = out.reshape(-1, then.k)[:b].astype(np.float32)
            encoded = levels.encode(rows_of_tokens, SCHEMES[then.scheme], then.group, then.own)
            np.testing.assert_array_equal(made, np.concatenate([encoded, np.full((1, size), 77, np.uint8)]))
        assert not counters.any()  # so that the next launch may count
    else:
        rows_of_block, make = attention.QUERIES, attention.attend_tokens
        if form.dtype == "float32":
            rows_of_block, make = single_attention.queries(form), single_attention.attend_single
        grid = (-(-s // rows_of_block) * b, form.heads)
        launch(make(form, target), grid, *given, *sink, out, s, *sizes, **how)
    np.testing.assert_array_equal(out.reshape(-1, form.heads, form.head_dim)[b * s :], guard)  # nothing beyond
    out = out.reshape(-1, form.heads, form.head_dim)[: b * s].reshape(b, s, form.heads, form.head_dim)
    for i in range(b):
        for h in range(form.heads):
            ours, weighed = (x[i, :, h // (form.heads // form.kv_heads)].astype(np.float64) for x in (keys, values))
            scores = q[i, :, h].astype(np.float64) @ ours.T * form.scale
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            key, row = np.arange(total), past + np.arange(s)[:, None]
            there = (key >= start[i]) & ((key <= row) | (not form.causal)) & (key > row - (form.window or 10**6))
            weights = np.where(there, np.exp(scores), 0.0)
            sums = weights.sum(-1, keepdims=True) + (np.exp(float(sinks[h])) if form.sinks else 0.0)
            want = weights @ weighed / np.maximum(sums, 1e-300)
            bound = 2e-6 if form.dtype == "float32" else 2e-2
            np.testing.assert_allclose(out[i, :, h].astype(np.float64), want, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("form", "past", "parts"),
    [
        (Form(4, 1, 64, 0.125), 70, 3),
        (Form(2, 2, 128, 0.09, softcap=5.0), 37, 1),
        (Form(4, 2, 256, 0.06), 9, 4),
        (Form(6, 2, 128, 0.09, window=33), 200, 5),
        (Form(4, 2, 64, 0.125, "ring", window=20, sinks=True), 77, 2),
        (Form(4, 2, 64, 0.125, "paged", 16, sinks=True), 50, 2),
        (Form(4, 2, 64, 0.125, sinks=True, dtype="float16"), 50, 2),
        (Form(6, 2, 32, 0.2), 50, 2),
        (Form(20, 2, 80, 0.1), 50, 2),
        (Form(3, 1, 96, 0.1, "paged", 16), 50, 2),
        (Form(4, 2, 64, 0.125, scheme="int8"), 70, 3),
        (Form(4, 2, 128, 0.09, "paged", 16, scheme="int4", dtype="float16"), 70, 2),
        (Form(2, 2, 32, 0.2, "ring", window=20, scheme="int4"), 70, 2),
        (Form(4, 2, 64, 0.125, "paged", 16, scheme="fp8"), 70, 2),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_attention_of_a_token(form: Form, past: int, parts: int, order: int, launch: Launch) -> None:
    """Padding, parts without keys, and slots that hold no key; whichever block is the last one joins the parts."""
    attended(form, launch, past, 1, parts, order=order)


@pytest.mark.parametrize("order", [1, -1])
def test_attention_of_a_token_and_its_levels(order: int, launch: Launch) -> None:
    """Whichever block is the last one of a sequence writes its record."""
    encodings = Encoding(256, "bfloat16", "int8", 0, False), Encoding(256, "bfloat16", "int8", 64, True)
    for then in encodings:
        attended(Form(4, 2, 64, 0.125), launch, 70, 1, 3, then=then, order=order)
        attended(Form(16, 1, 16 * 2, 0.125), launch, 5, 1, 2, then=attrs.evolve(then, k=512), order=order)


@pytest.mark.parametrize("fault", ["the first joins", "counters stay", "no barrier"])
def test_parts_that_are_joined_wrongly_show(fault: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = device.Device.counted
    if fault == "the first joins":
        monkeypatch.setattr(device.Device, "counted", lambda self, address, most: most - counted(self, address, most))
    elif fault == "counters stay":
        monkeypatch.setattr(device.Device, "counted", lambda self, address, most: counted(self, address, most + 1))
    else:
        monkeypatch.setattr(device.Device, "barrier", lambda self: None)
    with pytest.raises(AssertionError):
        attended(Form(4, 1, 64, 0.125), launch, 70, 1, 3, order=-1)


@pytest.mark.parametrize(
    ("form", "past", "s"),
    [
        (Form(2, 1, 64, 0.125), 0, 70),
        (Form(2, 2, 128, 0.09, softcap=3.0, sinks=True), 37, 64),
        (Form(4, 2, 64, 0.125), 130, 5),
        (Form(1, 1, 128, 0.09, window=40), 100, 150),
        (Form(2, 1, 64, 0.125, "ring", window=30), 90, 20),
        (Form(2, 2, 64, 0.125, "paged", 16), 40, 30),
        (Form(2, 1, 64, 0.125, "plain"), 0, 70),
        (Form(2, 1, 64, 0.125, "plain", causal=False, sinks=True), 0, 130),
        (Form(2, 1, 64, 0.125, "plain"), 20, 30),
        (Form(2, 1, 64, 0.125, sinks=True, dtype="float16"), 20, 70),
        (Form(6, 2, 32, 0.2), 20, 70),
        (Form(2, 1, 80, 0.1), 20, 70),
        (Form(2, 1, 256, 0.06, window=40), 50, 70),
        (Form(12, 1, 96, 0.1, "plain"), 20, 30),
        (Form(1, 1, 144, 0.08), 10, 30),  # tiles that threads don't share evenly
        (Form(2, 1, 64, 0.125, scheme="int8"), 70, 70),
        (Form(2, 1, 128, 0.09, "paged", 16, scheme="int4", dtype="float16"), 20, 70),
        (Form(2, 1, 32, 0.2, "ring", window=30, scheme="int4"), 90, 20),
        (Form(2, 1, 64, 0.125, scheme="fp8"), 20, 70),
    ],
)
@RACES
def test_attention_of_many_tokens(form: Form, past: int, s: int, late: bool, order: int, launch: Launch) -> None:
    attended(form, launch, past, s, late=late, order=order)


@pytest.mark.parametrize("cached", [False, True])
def test_attention_reads_e4m3_by_instructions(cached: bool, launch: Launch) -> None:
    """From sm_89 on; `GPU` moves bits instead."""
    form, past, s, parts = (Form(4, 2, 64, 0.125, scheme="fp8"), 40, *((1, 2) if cached else (20, 0)))
    attended(form, launch, past, s, parts, target=EARLY)


@pytest.mark.parametrize(("k", "scheme"), [(32, "int8"), (64, "int4"), (128, "int8"), (128, "int4"), (96, "fp8")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("converts", [False, True])
def test_records(k: int, scheme: str, dtype: str, converts: bool, launch: Launch) -> None:
    """Bit by bit, but for rows without sense, which decode to NaN; converts: with instructions for fp8."""
    target = EARLY if converts else GPU
    x = drawn(0, 7, k, dtype=dtype)
    x[6] = (x[6].astype(np.float32) * np.exp2(-(np.arange(k) % 16))).astype(
        x.dtype
    )  # levels that are subnormal numbers, too
    x[1], x[2, 3], x[3, 5] = 0.5, np.nan, np.inf
    got = np.zeros((8, rows.record_bytes(scheme, k)), np.uint8)
    launch(records.encoded_rows(k, dtype, scheme, target), (2,), x, got, 7)
    sound = [0, 1, 4, 5, 6]
    np.testing.assert_array_equal(got[sound], rows.encode(x[sound].astype(np.float32), scheme))
    assert np.isnan(rows.decode(got[[2, 3]], scheme)).all() and not got[7].any()


@st.composite
def chains(draw: st.DrawFn) -> tuple[heads.Heads, int, int, int]:
    """Heads of any kind, a batch, new tokens, and tokens before."""
    dtype, cache = (
        draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        draw(st.sampled_from(["contiguous", "ring", "paged"])),
    )
    size = draw(st.sampled_from([32, 48, 64, 80, 128]))
    scheme = draw(st.sampled_from(["none", "int8", "int4", "fp8"])) if size % 64 == 0 else "none"
    found = []
    for kind in draw(st.sampled_from([("q", "k", "v"), ("k", "v"), ("q",), ("q", "k")])):
        how = norm.Norm(
            size, dtype, 1e-5, draw(st.booleans()), draw(st.booleans()), False, draw(st.sampled_from([0.0, 1.0])), draw(st.booleans())
        )  # fmt: skip
        how = how if how.rms else attrs.evolve(how, bias=draw(st.booleans()), offset=0.0, round_first=False)
        has_norm, turned = kind != "v" and draw(st.booleans()), kind != "v" and draw(st.booleans())
        found.append(
            heads.Chain(
                draw(st.integers(1, 5)), how if has_norm else None, draw(st.sampled_from([size, 16])) if turned else 0,
                draw(st.booleans()), "none" if kind == "q" else scheme, "" if kind == "q" else cache,
            )
        )  # fmt: skip
    tokens, past = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    return heads.Heads(tuple(found), size, dtype, 4 if cache == "paged" else 0), draw(st.integers(1, 2)), tokens, past


def prepared_by_ops(chain: heads.Chain, arrays: dict[str, np.ndarray], length: np.ndarray, table: Any) -> np.ndarray:
    """What the ops' meanings make of a chain."""
    held = {**arrays, "length": length, **({} if table is None else {"table": table})}
    nodes = {n: placeholder(n, TensorType(a.shape, a.dtype.name)) for n, a in held.items()}
    value = nodes["x"]
    if chain.norm is not None and chain.norm.rms:
        rest = {"offset": chain.norm.offset, "round_first": chain.norm.round_first}
        value = ops.rms_norm(value, nodes.get("gain"), eps=chain.norm.eps, **rest)
    elif chain.norm is not None:
        value = ops.layer_norm(value, nodes.get("gain"), nodes.get("bias"), eps=chain.norm.eps)
    if chain.turned:
        value = ops.rotary(value, nodes["cos"], nodes["sin"], interleaved=chain.interleaved)
    if chain.scheme != "none":
        value = ops.encode_rows(value, scheme=chain.scheme)
    if chain.cache:
        value = ops.cache_append(nodes["to"], value, nodes["length"], nodes.get("table"), ring=chain.cache == "ring")
    return interpret(Graph(tuple(nodes.values()), (value,)), list(held.values()))[0]


@given_drawn(chains())
def test_heads(launch: Launch, drawn_: tuple[heads.Heads, int, int, int]) -> None:
    """Against the ops' meanings: exactly, but where a norm's sum has another order, or float32 products are added in one rounding."""
    how, b, s, past = drawn_
    kind, rng = numpy_dtype(how.dtype), np.random.default_rng(past)
    length, cap = np.array([past], np.int64), past + s + 1
    if how.cached == "ring":
        cap = max(s, past)
    table = rng.permutation(b * cap).astype(np.int32).reshape(b, cap) if how.page else None
    own: list[dict[str, np.ndarray]] = []
    for chain in how.chains:
        width = how.head_dim if chain.scheme == "none" else rows.record_bytes(chain.scheme, how.head_dim)
        shapes = {"x": (b, s, chain.heads, how.head_dim), "gain": (how.head_dim,), "bias": (how.head_dim,)}
        shapes |= dict.fromkeys(("cos", "sin"), (b if chain.interleaved else 1, s, chain.turned))
        shapes["to"] = shapes["x"]
        if chain.cache:
            shapes["to"] = (b * cap if how.page else b, chain.heads, how.page or cap, width)
        own.append({n: rng.standard_normal(shapes[n]).astype(kind) for n in chain.pointers})
        if chain.scheme != "none":
            own[-1]["to"] = rng.integers(0, 256, shapes["to"]).astype(np.uint8)
    want = [prepared_by_ops(chain, arrays, length, table) for chain, arrays in zip(how.chains, own, strict=True)]
    fault = np.zeros(1, np.int32)
    arguments: list[Any] = [a for arrays in own for a in arrays.values()]
    arguments += [length, *([] if table is None else [table]), fault] if how.cached else []
    arguments += [b * s, s, *(a["cos"].shape[0] * s for a in own if "cos" in a)]
    arguments += [cap, *([b * cap] if how.page else []), 1, 2, *([3] if how.page else [])] if how.cached else []
    grid = (-(-b * s * how.count // heads.WARPS),)
    launch(heads.prepared(how, GPU), grid, *arguments)
    assert not fault.any()
    for chain, arrays, expected in zip(how.chains, own, want, strict=True):
        if chain.norm is None and not (chain.turned and how.dtype == "float32"):
            np.testing.assert_array_equal(arrays["to"], expected)
            continue
        got, exact = (
            rows.decode(a, chain.scheme) if chain.scheme != "none" else a.astype(np.float64)
            for a in (arrays["to"], expected)
        )
        step = {"none": 0.0, "int8": 0.1, "int4": 1.0, "fp8": 0.5}[chain.scheme]
        tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[how.dtype]
        assert (np.isnan(got) == np.isnan(exact)).all()
        np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance + step)
    if not how.cached:
        return
    # What there is no room for is a fault, and nothing is written.
    before = [a["to"].copy() for a in own]
    length[0] = -1 if past % 2 or how.cached == "ring" else cap * max(how.page, 1) - s + 1
    launch(heads.prepared(how, GPU), grid, *arguments)
    assert fault[0] == (1 if length[0] < 0 else 2)
    for chain, a, kept in zip(how.chains, own, before, strict=True):
        assert not chain.cache or np.array_equal(a["to"].view(np.uint8), kept.view(np.uint8))


def draws(launch: Launch, operands: list[np.ndarray], dtype: str, order: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What a GPU's launches draw, in its memory what was there before."""
    (rows, size), names = operands[0].shape, ("logits", "uniform", "temperature", "top_k", "top_p", "min_p")
    parts, shifts = -(-size // sampling.PART), sampling.SHIFTS[dtype]
    of = dict(zip(names, operands, strict=True))
    of |= {"token": np.full(rows, 7), "sound": np.zeros(rows, bool), "state": np.full((rows, sampling.STATE), 77)}
    of |= {"numbers": np.full((rows, parts), 777), "counters": np.zeros((rows, sampling.COUNTERS), np.int32)}

    def run(kernel: device.DeviceKernel, names: str, *shift: int) -> None:
        launch(kernel, (rows * parts,), *(of[name] for name in names.split()), size, parts, *shift, order=order)

    run(sampling.highest(dtype, GPU), "logits temperature top_k token sound state numbers counters")
    for shift in shifts[1:]:
        run(sampling.narrowed_by_count(dtype, GPU), "logits top_k state counters", shift)
    for shift in shifts:
        run(sampling.narrowed_by_mass(dtype, GPU), "logits temperature top_p state counters", shift)
    run(sampling.drawn(dtype, GPU), "logits uniform temperature min_p token state numbers counters")
    assert not of["counters"].any()
    return of["token"], of["sound"]


def same_draws(launch: Launch, operands: list[np.ndarray], dtype: str, order: int = 1) -> None:
    assert ops.draw.meaning is not None
    for got, want in zip(draws(launch, operands, dtype, order), ops.draw.meaning(*operands), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("size", "dtype", "order"),
    [(1, "float32", 1), (200, "float32", -1), (200, "bfloat16", 1), (200, "float16", -1), (4099, "float32", 1)],
)
def test_tokens_are_drawn_as_their_meaning_says(size: int, dtype: str, order: int, launch: Launch) -> None:
    """Bit by bit, whatever the logits and the options; of a row that a block reads alone, and of one that three do."""
    same_draws(launch, sampling_rows(64, size, np.random.default_rng(size), dtype), dtype, order)


def test_a_token_of_many(launch: Launch) -> None:
    """63 blocks read a row; where all logits are equal, all weight goes to one bin."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((5, 128256)) * 3).astype(np.float32)
    logits[-1] = 2.5
    top_p, min_p = np.array([[0.9, 1, 0.5, 0.99, 0.5], [0.1, 0, 0, 0.001, 0]], np.float32)
    heat = np.array([1, 2, 0.7, 1, 1], np.float32)
    same_draws(
        launch, [logits, rng.integers(0, 1 << 31, 5), heat, np.array([50, 0, 64128, 0, 50]), top_p, min_p], "float32"
    )


@pytest.mark.parametrize("width", [64, 72, 75, 1000, 4096])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms(width: int, rms: bool, dtype: str, launch: Launch) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    x, w, b, y = (np.zeros((3, width + 64), np.float32) for _ in range(4))
    x, w, b, y = (drawn(i, 3, width).astype(kind) for i, _ in enumerate((x, w, b, y)))
    how = norm.Norm(width, dtype, 1e-5, rms, True, not rms, offset=1.0 if rms else 0.0)
    launch(tails.tailed(Tail(how), GPU), (3,), x, w, *([] if rms else [b]), y)
    wide = x.astype(np.float64)
    centred = wide if rms else wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-5) * (w[0].astype(np.float64) + how.offset)
    want = want if rms else want + b[0].astype(np.float64)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=tolerance, atol=tolerance)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TargetError, match="6 query heads can't share 4 key heads"):
        attention.attend_tokens(Form(6, 4, 64, 1.0), GPU)
    with pytest.raises(TargetError, match="72 channels"):
        attention.attend_token(Form(4, 4, 72, 1.0), GPU)
    for build in (
        lambda: thin.thin(Layer(12, (8,)), 8, GPU),
        lambda: products.product(Layer(48, (8,)), products.LARGE, GPU),
    ):
        with pytest.raises(TargetError, match="12|48"):
            build()
    with pytest.raises(TargetError, match="float64"):
        thin.thin(Layer(64, (8,), "float64"), 8, GPU)
    with pytest.raises(TargetError, match="sm_90a"):
        hopper.product_hopper(Layer(4096, (8,)), hopper.WIDE, GPU)


# --- PTX ----------------------------------------------------------------------------------------------------------------

MIXTRAL = experts.Mixture(8, 2, 4096, 14336, "bfloat16", "silu")
CODES: dict[str, Any] = {"scheme": "int4", "group": 128}


def of_hot_kernels(target: Target) -> dict[str, device.DeviceKernel]:
    wide, form = Layer(4096, (4096,)), Form(32, 8, 128, 0.1)
    made = {
        "few": thin.thin(wide, 8, target),
        "few codes": thin.thin(Layer(4096, (4096,), **CODES), 8, target),
        "few codes and a norm": thin.thin(
            Layer(4096, (4096,), residual=True, **CODES),
            8,
            target,
            Tail(norm.Norm(4096, "bfloat16", 1e-5, True, True, False)),
        ),
        "32 rows": thin.thin(wide, 32, target),
        "32 rows of codes": thin.thin(Layer(4096, (4096,), **CODES), 32, target),
        "32 rows of bytes": thin.thin(Layer(4096, (4096,), scheme="int8"), 32, target),
        "many": products.product(wide, products.LARGE, target),
        "some": products.product(wide, products.SMALL, target),
        "some codes": products.product(Layer(4096, (4096,), **CODES), products.SMALL, target),
        "many codes": products.product(Layer(4096, (4096,), **CODES), products.LARGE, target),
        "few small floats": thin.thin(Layer(4096, (4096,), scheme="fp8"), 8, target),
        "many small floats": products.product(Layer(4096, (4096,), scheme="mxfp4", group=32), products.LARGE, target),
        "few of a table": thin.thin(Layer(4096, (4096,), scheme="nf4", group=64), 8, target),
        "gated": products.product(
            Layer(4096, (14336,), gated=True, apart=True, activation="silu"), products.LARGE, target
        ),
        "token": attention.attend_token(form, target),
        "tokens": attention.attend_tokens(form, target),
        "heads": heads.prepared(
            heads.Heads(
                (
                    heads.Chain(32, norm.Norm(128, "bfloat16", 1e-6, True, True, False, 0.0, True), 128),
                    heads.Chain(
                        8, norm.Norm(128, "bfloat16", 1e-6, True, True, False, 0.0, True), 128, False, "int8", "paged"
                    ),
                    heads.Chain(8, scheme="int8", cache="paged"),
                ),
                128,
                "bfloat16",
                16,
            ),
            target,
        ),
        "highest": sampling.highest("float32", target),
        "counts": sampling.narrowed_by_count("float32", target),
        "masses": sampling.narrowed_by_mass("float32", target),
        "draw": sampling.drawn("bfloat16", target),
        "norm": tails.tailed(Tail(norm.Norm(4096, "bfloat16", 1e-5, True, True, False)), target),
        "expert": experts.single(MIXTRAL.choice(False), target),
        "expert's last layer": experts.single(MIXTRAL.choice(True), target),
        "groups": experts.grouped(MIXTRAL.choice(False), 8, target),
        "few of experts": experts.of_groups(MIXTRAL.choice(False), 8, target),
        "many of experts": experts.of_groups(MIXTRAL.choice(False), 128, target),
        "many of experts' last layer": experts.of_groups(MIXTRAL.choice(True), 128, target),
        "sums of experts": experts.summed(MIXTRAL, target),
        "records": records.encoded_rows(128, "bfloat16", "int8", target),
        "rounded rows": rounding.rounded_rows(4096, "bfloat16", "int8", target),
        "token of records": attention.attend_token(attrs.evolve(form, scheme="int8"), target),
        "small floats": records.encoded_rows(128, "bfloat16", "fp8", target),
        "token of small floats": attention.attend_token(attrs.evolve(form, scheme="fp8"), target),
        "tokens of small floats": attention.attend_tokens(attrs.evolve(form, scheme="fp8"), target),
        "token of 256": attention.attend_token(Form(16, 8, 256, 0.1), target),
        "tokens of 80": attention.attend_tokens(Form(32, 32, 80, 0.1), target),
        "tokens of 256": attention.attend_tokens(Form(16, 8, 256, 0.1), target),
        "tokens of records": attention.attend_tokens(attrs.evolve(form, scheme="int4"), target),
    }
    if target.mcpu == "sm_90a":
        made["hopper"] = hopper.product_hopper(wide, hopper.WIDE, target)
        made["narrow on hopper"] = hopper.product_hopper(wide, hopper.NARROW, target)
        gated = Layer(4096, (14336,), gated=True, apart=True, activation="silu")
        made["gated on hopper"] = hopper.product_hopper(gated, hopper.WIDE, target)
        projections = Layer(4096, (4096, 1024, 1024), bias=True)
        made["projections on hopper"] = hopper.product_hopper(projections, hopper.WIDE, target)
        made["residual on hopper"] = hopper.product_hopper(Layer(4096, (4099,), residual=True), hopper.WIDE, target)
        made["codes on hopper"] = hopper.product_hopper(Layer(4096, (4096,), **CODES), hopper.HIGH, target)
        made["hopper of experts"] = experts.of_groups_hopper(MIXTRAL.choice(False), target)
        made["hopper of experts' last layer"] = experts.of_groups_hopper(MIXTRAL.choice(True), target)
    return made


WORDS = {
    "few": ("mma.sync.aligned.m16n8k16", "cp.async.cg.shared.global", "ld.shared.v4"),
    "few codes": ("mma.sync.aligned.m16n8k16", "cp.async.cg.shared.global"),
    "many": ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global", "bar.sync"),
    "many codes": ("mma.sync.aligned.m16n8k16", "cp.async.cg.shared.global", "ld.shared.v4"),
    "gated": ("mma.sync.aligned.m16n8k16", "fma.rn.f32", "div.rn.f32"),
    "token": ("shfl.sync.bfly", "ex2.approx.ftz", "ld.global", "atom", ".inc.u32", "fence.acq_rel.gpu"),
    "tokens": ("ldmatrix.sync.aligned.m8n8.x4.trans", "cvt.rn.bf16x2.f32", "cp.async.cg.shared.global", "mma.sync"),
    "norm": ("sqrt.rn", "ld.global", "st.global"),
    "masses": ("div.rn.f32", "cvt.rzi.s64.f32", "atom.shared.add.u32", "atom.global.add.u64", "atom.global.inc.u32"),
    "draw": ("div.rn.f32", "cvt.rzi.s64.f32"),
    "hopper": ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "wgmma.fence", "wgmma.commit_group",
               "wgmma.wait_group.sync.aligned 1", "cp.async.bulk.tensor.2d.shared::cluster.global", "mbarrier.try_wait.parity",
               "mbarrier.arrive.expect_tx", "setmaxnreg.inc", "setmaxnreg.dec", "cvta.param", ".minnctapersm 1",
               "st.global.v4"),
    "narrow on hopper": ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "cp.async.bulk.tensor.2d"),
    "codes on hopper": ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "cp.async.bulk.tensor.2d", "ld.shared.v4"),
    "hopper of experts": ("wgmma.mma_async.sync.aligned.m64n256k16", "cp.async.bulk.tensor.2d", "cp.async.cg.shared.global",
                          "fence.proxy.async"),
}  # fmt: skip
MOST_REGISTERS = {
    "few": 64,
    "expert": 64,
    "expert's last layer": 64,
    "few of experts": 64,
    "few codes": 80,
    "few codes and a norm": 80,
    "few small floats": 80,
    "few of a table": 80,
    "32 rows": 128,
    "32 rows of codes": 168,
    "many": 128,
    "many of experts": 168,
    "many of experts' last layer": 168,
    "gated": 128,
    "many codes": 168,
}


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_has_the_instructions(mcpu: str) -> None:
    target = attrs.evolve(REAL, mcpu=mcpu)
    made = of_hot_kernels(target)
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    for kind, words in WORDS.items():
        for word in words if kind in made else ():
            assert word in bodies[kind], (kind, word)
    for kind, body in bodies.items():
        before, waits, _ = body.partition("griddepcontrol.wait")
        assert bool(waits) == ("griddepcontrol.launch_dependents" in before) == (mcpu != "sm_80"), kind
        # Nothing is touched before the wait; layers of few rows have weights under way.
        touched = re.findall(r"ld\.global|st\.global|atom|\bred\.|cp\.async\.cg", before) if waits else []
        assert set(touched) == ({"cp.async.cg"} if waits and made[kind].ahead else set()), kind
    for kind, word in (
        ("small floats", "cvt.rn.satfinite.e4m3x2.f32"),
        ("token of small floats", "cvt.rn.f16x2.e4m3x2"),
        ("tokens of small floats", "cvt.rn.f16x2.e4m3x2"),
    ):
        assert (word in bodies[kind]) == (mcpu != "sm_80"), kind
    for kind in ("token", "norm"):
        assert re.search(r"ld\.global(\.nc)?\.v4", bodies[kind]), kind
    assert not re.search(r"\.local\b|call\.uni", text) and f".target {mcpu}" in text
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    cubin, usage = ptx.assemble(text, target)
    assert cubin[:4] == b"\x7fELF" and set(usage) == {ptx.entry_name(v) for v in made.values()}
    assert all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    for kind, most in MOST_REGISTERS.items():  # so many that blocks enough share a multiprocessor
        assert kind not in made or usage[ptx.entry_name(made[kind])].registers <= most, kind
    assert all(k.shared_bytes <= 227 << 10 for k in made.values())


@pytest.mark.parametrize("name", [n for n in known_targets() if n.startswith("cuda:")])
def test_blocks_fit_into_shared_memory(name: str) -> None:
    """Of each architecture: what a multiprocessor has beside 28 KiB of its cache and the KiB that a block takes (CUDA C++ Programming Guide)."""
    target = Target.describe(name)
    made = of_hot_kernels(target)
    made["float32 by codes"] = single.thin_single(Layer(4096, (4096,), "float32", scheme="int8"), 8, target)
    most = target.caches[0].bytes - (29 << 10)
    assert most in (99 << 10, 163 << 10, 227 << 10)
    assert {k: v.shared_bytes for k, v in made.items() if v.shared_bytes > most} == {}


def test_an_assembler_of_yesterday_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "ptxas"
    old.write_text(
        "#!/bin/sh\necho \"ptxas fatal : Unsupported .version 8.4; current version is '7.8'\" >&2; exit 255\n"
    )
    old.chmod(0o755)
    monkeypatch.setattr(ptx, "find_assembler", lambda: str(old))
    with pytest.raises(CompileError, match=r"too old for sm_90a and PTX of version 8\.4.*pip install nvidia-cuda-nvcc"):
        ptx.assembled("", attrs.evolve(REAL, mcpu="sm_90a"))


# --- Plans --------------------------------------------------------------------------------------------------------------


def test_generic_kernels_use_threads_and_take_memory_for_no_others() -> None:
    x, y = (placeholder(n, TensorType(s, "float32")) for n, s in (("x", (1, 128256)), ("y", (1, 512, 768))))
    plans = lower(
        {
            "softmax": Graph((x,), (ops.softmax(x, axis=1),)),
            "sum": Graph((y,), (ops.sum_(y, axes=(1,), keepdims=False),)),
        },
        REAL,
    ).plans
    assert sum(int(max(sizes)) for sizes in plans["softmax"].slots) < 128 << 20  # type: ignore[type-var, call-overload]
    (launch,) = plans["sum"].steps[0][0].launches
    assert launch.grid == (6, 1, 1)


@pytest.mark.parametrize(("dtype", "launches"), [("float32", 7), ("bfloat16", 5)])
def test_launches_of_a_draw(dtype: str, launches: int) -> None:
    """Blocks spread over a row, and no more launches than it takes."""
    kinds = ("int64", "float32", "int64", "float32", "float32")
    options = [placeholder(f"x{i}", TensorType((symbol("b"),), kind)) for i, kind in enumerate(kinds)]
    logits = placeholder("logits", TensorType((symbol("b"), 128256), dtype))
    both = ops.draw(logits, *options)
    graph = Graph((logits, *options), (ops.get(both, index=0), ops.get(both, index=1)))
    found = lower({"draw": graph}, REAL).plans["draw"].launches({"b": 3})
    assert [substitute(launch.grid[0], {"b": 3}) for launch in found] == [3 * 63] * launches
    assert all(launch.early for launch in found)


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_read_ahead_is_weights(stored: bool) -> None:
    """A layer whose matrix another kernel may just have written isn't launched early."""
    x, kind = placeholder("x", TensorType((1, 64), "bfloat16")), TensorType((32, 64, 1), "bfloat16")
    held = {"w": ArrayStorage(np.zeros((32, 64, 1), numpy_dtype("bfloat16")))}
    w = weight("w", kind) if stored else placeholder("w", kind)
    y = ops.packed_linear(x, w, None, None, outputs=32, activation="none")
    graph = Graph((x,) if stored else (x, w), (ops.exp(y),), held if stored else {})
    thin_one, other = lower({"main": graph}, REAL).plans["main"].launches({})
    assert "thin" in thin_one.kernel and thin_one.early == stored and other.early
    assert not any(step.early for step in lower({"main": graph}, GPU).plans["main"].launches({}))
