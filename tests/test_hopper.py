"""Kernels for Hopper: copies of tiles by tensor maps, barriers in shared memory, products of warp groups; on an emulated block of threads, where
each of these comes as late, or as early, as it may."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cuda import HOPPER, RACES, REAL, Launch, drawn, emulator, launch  # noqa: F401
from test_quantization import coded

from jisu.compiler import ops
from jisu.compiler.errors import JisuError
from jisu.compiler.gpu import tensor_map
from jisu.compiler.graph import ArrayStorage, Graph, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.launches import Plan, TensorMap
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, numpy_dtype, substitute, symbol
from jisu.passes import layout_passes
from jisu.targets import facts
from jisu.targets.cuda import device, ptx
from jisu.targets.cuda.device import Device, DeviceKernel
from jisu.targets.cuda.kernels import experts, hopper, levels
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.kernels.levels import Levels
from jisu.targets.cuda.lowering import lower

Map = Callable[..., np.ndarray]


@pytest.fixture
def mapped(emulator: Any) -> Map:  # noqa: F811
    """mapped(matrix, what a plan says of it): its tensor map, as a driver makes it."""

    def encode(*args: Any) -> None:
        assert emulator.cuTensorMapEncodeTiled(*args) == 0

    def run(matrix: np.ndarray, how: TensorMap) -> np.ndarray:
        assert matrix.shape == (how.rows, how.columns) and matrix.dtype == numpy_dtype(how.dtype)
        raw = tensor_map(encode, matrix.ctypes.data, how.dtype, matrix.shape, how.box)
        return np.frombuffer(raw, np.uint8).copy()

    return run


def activated(name: str, x: np.ndarray) -> np.ndarray:
    return {"none": lambda: x, "relu": lambda: np.maximum(x, 0), "silu": lambda: x / (1 + np.exp(-x))}[name]()


@attrs.frozen(eq=False)
class Matrix:
    """A matrix as a kernel reads it, with the scales and zeros of codes, and its numbers."""

    stored: np.ndarray
    beside: tuple[np.ndarray, ...]
    numbers: np.ndarray


def matrix(seed: int, layer: Layer, rows: int) -> Matrix:
    if not layer.scheme:
        numbers = drawn(seed, rows, layer.k, dtype=layer.dtype)
        return Matrix(numbers, (), numbers.astype(np.float64))
    held: dict[str, Storage] = {f"seed{i}": ArrayStorage(np.zeros(1)) for i in range(seed)}
    node = coded("w", SCHEMES[layer.scheme], (rows, layer.k), layer.group, not layer.zeros, layer.dtype, held)
    codes, scales, zeros, _ = node.operands
    assert codes is not None and scales is not None
    packed = [ops.pack_codes(codes, scheme=node.scheme, k=layer.k, panel=1, word=1)]
    packed += [ops.pack_scales(scales, scheme=node.scheme, whole=node.whole, panel=1)]
    packed += [] if zeros is None else [ops.pack_zeros(zeros, panel=1)]
    parts = interpret(Graph((), (node, *packed), {k: v for k, v in held.items() if "." in k}), [])
    numbers, stored, *beside = (np.ascontiguousarray(part) for part in parts)
    room = drawn(0, stored.size // 2 + 8).view(np.uint8)[: stored.size].reshape(rows, -1)
    room[...] = stored.reshape(rows, -1)
    return Matrix(room, tuple(beside), numbers.astype(np.float64))


def multiplied(
    launch: Launch,  # noqa: F811
    mapped: Map,
    layer: Layer,
    tile: hopper.Tile,
    m: int,
    blocks: int = 3,
    **how: Any,
) -> None:
    """Run a layer; nothing is written beyond its results."""
    per_row, dtype = (1 if layer.apart else layer.per_weight_row), layer.dtype
    x = drawn(0, m, layer.k, dtype=dtype)
    matrices = [matrix(1 + i, layer, n * per_row) for i, n in enumerate(layer.outputs)]
    matrices += [matrix(9, layer, layer.outputs[0])] if layer.apart else []
    if layer.scheme:
        layer = attrs.evolve(layer, scales=matrices[0].beside[0].dtype.name)
    beside = [array for part in zip(*(w.beside for w in matrices), strict=True) for array in part]
    biases = [drawn(20 + i, n, dtype=dtype) for i, n in enumerate(layer.outputs)] if layer.bias else []
    residual = [drawn(30, m, layer.outputs[0], dtype=dtype)] if layer.residual else []
    results = [drawn(40, m + 1, n, dtype=dtype) for n in layer.outputs]
    before = [y.copy() for y in results]
    boxes = [mapped(x, hopper.map_of_x(layer, tile, ("step", 0), m))]
    boxes += [mapped(w.stored, hopper.map_of_w(layer, tile, ("step", 1), len(w.stored))) for w in matrices]
    kernel = hopper.product_hopper(layer, tile, HOPPER)
    assert kernel.parameters[: len(boxes)] == (device.MAP,) * len(boxes)
    launch(kernel, (blocks,), *boxes, *beside, *biases, *residual, *results, m, **how)
    exact = [x.astype(np.float64) @ w.numbers.T for w in matrices]
    size = max(1.0, *(float(np.abs(w.numbers).mean()) for w in matrices)) * np.sqrt(layer.k)
    if layer.gated:
        gates, ups = exact if layer.apart else (exact[0][:, ::2], exact[0][:, 1::2])
        exact, size = [activated(layer.activation, gates) * ups], size * size
    else:
        added = [b.astype(np.float64) for b in biases] or [np.zeros(n) for n in layer.outputs]
        exact = [activated(layer.activation, y + b) for y, b in zip(exact, added, strict=True)]
    exact = [y + residual[0].astype(np.float64) if residual else y for y in exact]
    size *= 4 if layer.scheme else 1  # scales are rounded to the dtype, alike for all numbers of a group
    for got, want, old in zip(results, exact, before, strict=True):
        np.testing.assert_allclose(got[:m].astype(np.float64), want, rtol=2e-2, atol=1e-2 * size)
        np.testing.assert_array_equal(got[m:], old[m:])


@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 64), (1, 5, 64), (130, 300, 320), (300, 72, 128), (2300, 24, 64)])
@pytest.mark.parametrize("tile", [hopper.NARROW, hopper.WIDE])
@RACES
def test_tiles(m: int, n: int, k: int, tile: hopper.Tile, late: bool, order: int, launch: Launch, mapped: Map) -> None:  # noqa: F811
    """Edge tiles, more tiles than blocks, blocks without a tile, and more than one band of rows."""
    layer = Layer(k, (n,), "bfloat16" if late else "float16")
    multiplied(launch, mapped, layer, tile, m, late=late, order=order)


LEVELS = [("int8", False), ("int8", True), ("fp8", False)]
FORMS = [("int4", 128, True), ("int4", 32, False), ("int8", 0, True), ("int8", 64, False), ("int6", 192, True), ("fp8", 0, True), ("mxfp4", 32, True),
         ("nvfp4", 16, True), ("nf4", 64, True)]  # fmt: skip


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """All that may follow a product, in one launch for several matrices."""
    gated, form = draw(st.booleans()), draw(st.one_of(st.none(), st.sampled_from(FORMS)))
    sizes = st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 8 * n))
    outputs = draw(st.lists(sizes, min_size=1, max_size=1 if gated else 3).map(tuple))
    scheme, group, symmetric = form or ("", 0, True)
    step = 192 if group == 192 else 128 if group == 128 else 64
    return Layer(
        step * draw(st.integers(1, 7 if step == 64 else 3)), outputs, draw(st.sampled_from(["bfloat16", "float16"])), gated,
        gated and not scheme and draw(st.booleans()), draw(st.sampled_from(["none", "relu", "silu"])),
        not gated and draw(st.booleans()), not gated and len(outputs) == 1 and draw(st.booleans()),
        scheme, group, zeros=not symmetric,
    )  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_layers(data: st.DataObject, launch: Launch, mapped: Map) -> None:  # noqa: F811
    layer = data.draw(layers())
    tile = data.draw(st.sampled_from(hopper.tiles_of(layer)))
    m, blocks = data.draw(st.integers(1, 280)), data.draw(st.integers(1, 4))
    schedule = {"late": data.draw(st.booleans()), "order": data.draw(st.sampled_from([1, -1, 2, 3, 4]))}
    multiplied(launch, mapped, layer, tile, m, blocks, **schedule)


@pytest.mark.parametrize(("scheme", "group", "symmetric"), FORMS)
def test_codes(scheme: str, group: int, symmetric: bool, launch: Launch, mapped: Map) -> None:  # noqa: F811
    """Every form, with groups that begin within steps and groups of several; more rows than a tile has."""
    for gated, tile in ((False, hopper.HIGH), (True, hopper.NARROW)):
        layer = Layer(384, (136,), gated=gated, scheme=scheme, group=group, zeros=not symmetric)
        multiplied(launch, mapped, layer, tile, 300, late=gated, order=-1 if gated else 1)


def grouped(launch: Launch, mapped: Map, last: bool, apart: bool, **how: Any) -> None:  # noqa: F811
    """Run a layer of experts; groups of no expert stand between others, and not all are full."""
    mixture = experts.Mixture(3, 2, 128, 192, "bfloat16", "silu", apart=apart)
    layer, groups, tokens = mixture.choice(last).layer, 5, 150
    rng = np.random.default_rng(0)
    order = np.full((groups, hopper.WIDE.rows), -1, np.int32)
    names = np.array([2, 0, -1, 0, 1], np.int32)
    free = iter(rng.permutation(tokens * mixture.chosen).astype(np.int32))
    for group, count in enumerate((128, 7, 0, 60, 1)):
        order[group, :count] = [next(free) for _ in range(count)]
    x = drawn(0, tokens * (mixture.chosen if last else 1), layer.k)
    height = layer.outputs[0] * layer.per_weight_row
    w, scores = drawn(1, mixture.count * height, layer.k), drawn(2, tokens * mixture.chosen)
    y = drawn(3, tokens * mixture.chosen, layer.outputs[0])
    want = y.astype(np.float64)
    kernel = experts.of_groups_hopper(mixture.choice(last), HOPPER)
    box = mapped(w, hopper.map_of_w(layer, hopper.WIDE, ("step", 0), len(w)))
    launch(kernel, (4,), box, x, order, names, *([scores] if last else []), y, groups, **how)
    for name, pairs in zip(names, order, strict=True):
        for pair in pairs[pairs >= 0]:
            own = w[name * height : (name + 1) * height].astype(np.float64)
            sums = own @ x[pair if last else pair // mixture.chosen].astype(np.float64)
            if last:
                want[pair] = sums * float(scores[pair])
                continue
            gates, ups = np.split(sums, 2) if apart else (sums[::2], sums[1::2])
            want[pair] = activated("silu", gates) * ups
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=3e-2, atol=1.0 if last else 8.0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@RACES
def test_experts(last: bool, apart: bool, late: bool, order: int, launch: Launch, mapped: Map) -> None:  # noqa: F811
    """Rows that lie anywhere."""
    grouped(launch, mapped, last, apart, late=late, order=order)


# --- Negative controls ----------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def changed(name: str, change: Callable[..., Any]) -> Patch:
    """change(the device function, its receiver, *arguments) instead of a device function."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        before = getattr(Device, name)
        patch.setattr(Device, name, lambda self, *given, **how: change(before, self, *given, **how))

    return apply


def without(*names: str) -> Patch:
    """Device functions that do nothing."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for name in names:
            changed(name, lambda *_, **__: None)(patch)

    return apply


def no_wait_for(which: str) -> Patch:
    """Those who fetch, or those who multiply, don't wait."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        kept, before = getattr(hopper, which), Device.wait_for

        def run(*given: Any) -> None:
            patch.setattr(Device, "wait_for", lambda *_: None)
            kept(*given)
            patch.setattr(Device, "wait_for", before)

        patch.setattr(hopper, which, run)

    return apply


WRONG: dict[str, Patch] = {
    "no wait for what comes": no_wait_for("_multiply"),
    "no wait for what is read": no_wait_for("_fetch"),
    "no wait for products": changed("products_done", lambda _, f, but, sums: sums),
    "products are released early": changed(
        "products_done", lambda old, f, but, sums: old(f, but + 1 if but else 0, sums)
    ),
    "no commit": without("commit_products"),
    "no fence before products": changed("begin_products", lambda _, f, registers: registers),
    "barriers are not shown": without("barriers_made"),
    "no barrier behind new barriers": without("barrier", "registers"),
    "too few bytes": changed("arrive_expecting", lambda old, f, b, n: old(f, b, n - 16384)),
    "too many bytes": changed("arrive_expecting", lambda old, f, b, n: old(f, b, n + 16)),
    "another parity": changed("wait_for", lambda old, f, b, p: old(f, b, 1 - p)),
    "stages are never released": without("arrive"),
    "too many arrivals": changed("make_barrier", lambda old, f, b, n: old(f, b, n + 1)),
    "too few arrivals": changed("make_barrier", lambda old, f, b, n: old(f, b, max(1, n // 2))),
    "barriers are made again": changed("make_barrier", lambda old, f, b, n: (old(f, b, n), old(f, b, n))),
    "too many registers": changed("registers", lambda old, f, n, more: old(f, n, more=more) if more else None),
    "results are taken early": without("meet"),
}
WRONG_WHERE_GATHERED: dict[str, Patch] = {
    "no wait for copies": without("copies_done"),
    "copies are not shown": without("copies_shown"),
    "no swizzle": changed("place", lambda _, f, row, chunk, chunks: row * (16 * chunks) + chunk * 16),
}
SCHEDULES = [(late, order) for late in (True, False) for order in (1, -1, 2)]


def shows(run: Callable[[bool, int], None]) -> bool:
    """Whether a schedule of threads and copies finds it."""
    for late, order in SCHEDULES:
        try:
            run(late, order)
        except (RuntimeError, AssertionError):
            return True
    return False


CONTROLLED = {
    "floats": (Layer(64 * 34, (256,)), hopper.WIDE),
    "codes": (Layer(64 * 34, (128,), scheme="int4", group=32), hopper.HIGH),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("kind", list(CONTROLLED))
def test_what_is_wrong_shows(
    wrong: str,
    kind: str,
    launch: Launch,  # noqa: F811
    mapped: Map,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    WRONG[wrong](monkeypatch)
    layer, tile = CONTROLLED[kind]
    assert shows(lambda late, order: multiplied(launch, mapped, layer, tile, tile.rows, 1, late=late, order=order))


@pytest.mark.parametrize("wrong", list(WRONG_WHERE_GATHERED))
def test_what_is_wrong_with_gathered_rows_shows(
    wrong: str,
    launch: Launch,  # noqa: F811
    mapped: Map,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    WRONG_WHERE_GATHERED[wrong](monkeypatch)
    assert shows(lambda late, order: grouped(launch, mapped, False, False, late=late, order=order))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_right_does_not(schedule: tuple[bool, int], launch: Launch, mapped: Map) -> None:  # noqa: F811
    """What the controls run, as it is."""
    late, order = schedule
    for layer, tile in CONTROLLED.values():
        multiplied(launch, mapped, layer, tile, tile.rows, 1, late=late, order=order)
    grouped(launch, mapped, False, False, late=late, order=order)


def of_stores(begin: int, fenced: bool, committing: int = device.GROUP) -> DeviceKernel:
    """The product of two tiles that threads store to shared memory themselves, from byte `begin` on, of which the first `committing` commit it.
    Parameters: a, b, sums float32 [64, 8]."""
    f = Device("of_stores", [("ptr", name) for name in "aby"], HOPPER, device.GROUP)
    a, b, y = map(f.memory, f.params())
    held, thread = f.at(f.shared(1024 + 72 * 128, 1024), begin, "i8"), f.thread()
    tiles = held, f.at(held, 64 * 128, "i8")
    for matrix, tile, rows in ((a, tiles[0], 64), (b, tiles[1], 8)):
        for row, chunk in f.chunks(max(rows, 16), 8, device.GROUP):
            words = f.load16("<4 x i32>", f.at(matrix, f.minimum(row, rows - 1) * 128 + chunk * 16, "i8"))
            f.when(row < rows, functools.partial(f.store16, words, f.at(tile, f.place(row, chunk, 8), "i8")))
    if fenced:
        f.copies_shown()
    f.barrier()
    left, right = map(f.tile_address, tiles)
    sums = f.begin_products([f.const(0.0, "float")] * 4)
    for part in range(4):
        sums = f.multiply_group(left + 2 * part, right + 2 * part, sums, 8, "bfloat16")
    f.when(thread < committing, f.commit_products)
    for i, value in enumerate(f.products_done(0, sums)):
        row, column = thread / 32 * 16 + thread % 32 / 4 + i // 2 * 8, thread % 4 * 2 + i % 2
        f.store(value, f.at(y, row * 8 + column, "float32"))
    return f.built()


@RACES
def test_tiles_that_threads_store(late: bool, order: int, launch: Launch) -> None:  # noqa: F811
    """Products see them behind a fence alone, and where their rows are at multiples of 1024."""
    a, b, y = drawn(0, 64, 64), drawn(1, 8, 64), np.zeros((64, 8), np.float32)
    launch(of_stores(0, True), (1,), a, b, y, late=late, order=order)
    np.testing.assert_allclose(y, a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-4, atol=1e-4)
    for begin, fenced, why in ((0, False, "without a fence"), (512, True, "multiples of 1024")):
        with pytest.raises(RuntimeError, match=why):
            launch(of_stores(begin, fenced), (1,), a, b, y, late=late, order=order)


def test_threads_that_commit_different_products(launch: Launch) -> None:  # noqa: F811
    values = (drawn(0, 64, 64), drawn(1, 8, 64), np.zeros((64, 8), np.float32))
    with pytest.raises(RuntimeError, match="committed different products"):
        launch(of_stores(0, True, 48), (1,), *values, late=False)


def test_shared_memory_that_nobody_asked_for(launch: Launch) -> None:  # noqa: F811
    kernel = of_stores(0, True)
    values = (drawn(0, 64, 64), drawn(1, 8, 64), np.zeros((64, 8), np.float32))
    with pytest.raises(RuntimeError, match="behind what the launch asked for"):
        launch(attrs.evolve(kernel, shared_bytes=71 * 128), (1,), *values)


# --- Plans ----------------------------------------------------------------------------------------------------------------


def test_plans_say_what_is_copied() -> None:
    """Of rows as many as a call has; plans come back from JSON as they were. Other GPUs get other kernels."""
    x = placeholder("x", TensorType((symbol("m"), 128), "bfloat16"))
    w = weight("w", TensorType((5120, 128), "bfloat16"))
    storage = ArrayStorage(np.zeros((5120, 128), numpy_dtype("bfloat16")))
    graph = Graph((x,), (ops.linear(x, w),), {"w": storage})
    for mcpu in ("sm_80", "sm_90", "sm_90a"):
        target = attrs.evolve(REAL, mcpu=mcpu, cores=64)
        panel, pair = facts.of(target).packing(target)
        lowered = lower({"main": Pipeline(layout_passes(panel, pair)).run(graph)[0]}, target)
        plan = lowered.plans["main"]
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        damages: list[Any] = [{}, [], {**plan.to_json(), "steps": [[{}]]}, {**plan.to_json(), "slots": [["2 +"]]}]
        for damaged in damages:
            with pytest.raises(ValueError):
                Plan.from_json(damaged)
        launches = [own for variant in plan.steps[0] for own in variant.launches if "hopper" in own.kernel]
        assert len(launches) == 2 * (mcpu == "sm_90a")
        for own, tile in zip(launches, (hopper.NARROW, hopper.WIDE), strict=False):
            of_x, of_w = (a for a in own.arguments if isinstance(a, TensorMap))
            assert of_x == TensorMap(("input", 0), "bfloat16", symbol("m"), 128, (128, 64))
            assert of_w == TensorMap(("weight", 0), "bfloat16", 5120, 128, (tile.outputs, 64))
            for m in (1, 300, 5000):
                tiles = -(-m // tile.rows) * (5120 // tile.outputs)
                assert substitute(own.grid[0], {"m": m}) == min(tiles, 64) and own.grid[1:] == (1, 1)


def test_maps_that_a_gpu_cannot_use_are_refused(emulator: Any) -> None:  # noqa: F811
    """As by the driver: memory that isn't aligned, rows of other than whole 16 bytes, boxes of too many, nothing."""
    matrix = drawn(0, 64, 128)

    def encode(*args: Any) -> None:
        if emulator.cuTensorMapEncodeTiled(*args):
            raise JisuError("refused")

    for address, shape, box in (
        (2, (64, 128), (64, 64)), (0, (64, 100), (64, 64)), (0, (64, 128), (257, 64)),
        (0, (0, 128), (64, 64)),
    ):  # fmt: skip
        with pytest.raises(JisuError):
            tensor_map(encode, matrix.ctypes.data + address, "bfloat16", shape, box)


# --- PTX ------------------------------------------------------------------------------------------------------------------


_MULTIPLY = re.compile(r"wgmma\.mma_async\S+ \{(.*?)\}, (?:\{(.*?)\})?")


def registers_that_products_lose(entry: str) -> list[str]:
    """What a kernel's PTX writes to registers that products under way add to or read, and which of those they read it wrote behind the last fence.

    PTX ISA: an accumulator, or a register with A, isn't to be touched before the group of the product has been waited for, and there must be a
    fence between such an access and a product. The loop over steps is followed for two turns.
    """
    lines = [line.strip() for line in entry.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("wgmma.fence"))
    last = next(i for i, line in enumerate(lines) if line.startswith("wgmma.wait_group.sync.aligned 0"))
    places = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
    jumps = (
        (places.get(line.rstrip(";").split()[-1], last), i) for i, line in enumerate(lines[:last]) if "bra" in line
    )
    begin, end, turns = next(((to, i, 2) for to, i in jumps if to < first < i), (0, last, 1))
    groups: list[set[str]] = [set()]  # registers of products; the last group is open
    written: set[str] = set()  # behind the last fence
    found = []
    for line in lines[begin:end] * turns:
        if match := _MULTIPLY.match(line):
            sums, own = (set(part.split(",")) if part else set() for part in match.groups())
            groups[-1] |= sums | own
            found += [f"no fence: {line}"] if written & (sums | own) else []
        elif line.startswith("wgmma.fence"):
            written = set()
        elif line.startswith("wgmma.commit_group"):
            groups.append(set())
        elif wait := re.match(r"wgmma\.wait_group\S+ (\d+);", line):
            groups = groups[-1 - int(wait[1]) :]
        elif not line.startswith(("st.", "bar", "//", "$")):
            to = set(
                re.findall(
                    r"%\w+", line.partition("{")[2].partition("}")[0] if " \t{" in line else line.partition(",")[0]
                )
            )
            written |= to
            found += [line] if to & set().union(*groups) else []
    return found


@pytest.mark.parametrize("wide", [True, False])
def test_the_assembler_serialises_nothing(wide: bool, tmp_path: Path) -> None:
    """It says so where it gives up products that are under way, or the warp groups' registers. Nothing touches registers of products under way."""
    target = attrs.evolve(HOPPER, triple=REAL.triple)
    tile = hopper.WIDE if wide else hopper.NARROW
    layers = [Layer(4096, (4096,), residual=True), Layer(4096, (512, 256), bias=True), Layer(64, (8,))]
    kernels = [hopper.product_hopper(layer, tile, target) for layer in layers]
    both = Layer(4096, (14336,), gated=True, apart=True, activation="silu")
    kernels.append(hopper.product_hopper(both, tile, target))
    forms: list[dict[str, Any]] = [
        {"scheme": "int4", "group": 128, "zeros": True},
        {"scheme": "int8"},
        {"scheme": "nvfp4", "group": 16},
    ]
    for form in forms:
        for gated in (False, True):
            layer = Layer(4096, (4096,), gated=gated, bias=not gated, **form)
            kernels.append(hopper.product_hopper(layer, hopper.tiles_of(layer)[wide], target))
    kernels.append(
        experts.of_groups_hopper(experts.Mixture(8, 2, 4096, 14336, "bfloat16", "silu").choice(wide), target)
    )
    for scheme, zeros in LEVELS:
        layer = Levels(4096, (4096,), scheme=scheme, levels=scheme, zeros=zeros)
        kernels.append(levels.many_hopper(layer, hopper.tiles_of(layer)[wide], target))
    text = ptx.to_ptx(kernels, target)
    for entry in text.split(".visible .entry")[1:]:
        assert not registers_that_products_lose(entry)
    assembler = ptx.find_assembler()
    if assembler is None:
        pytest.skip("there is no ptxas here")
    source = tmp_path / "k.ptx"
    source.write_text(text)
    command = [assembler, "-arch=sm_90a", "-v", "-o", str(tmp_path / "k.cubin"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.count(" 0 bytes spill stores") == len(kernels) and "Potential Performance Loss" not in said, said
