"""Products for TPUs: the same TIR through LLVM, through JAX's TPU interpreter as Pallas source, and against NumPy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import tirx

from jisu.compiler.errors import CompileError, InputError
from jisu.compiler.types import numpy_dtype
from jisu.targets.tpu import export, judges
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.functional import check, run
from jisu.targets.tpu.pallas import source
from jisu.targets.tpu.product import Lowered, lower
from jisu.targets.tpu.reference import reference
from jisu.targets.tpu.spec import ACTIVATIONS, Product
from jisu.targets.tpu.steps import LOAD, ONCE, STORE
from jisu.targets.tpu.tiles import Tiles, choose_tiles, make_tiles, row_multiple
from jisu.targets.tpu.walk import COMMIT, WAIT, Copy, Multiply, instruction, parts, rebuild

V5E, V6E = Chip.named("v5e"), Chip.named("v6e")
AOT = judges.aot_python()
needs_libtpu = pytest.mark.skipif(
    AOT is None,
    reason=f'libtpu is not installed: pip install "jisu[tpu-aot]", or let {judges.AOT_PYTHON} name a Python that has it',
)


KINDS = [("int8", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "float32"), ("float32", "int8")]
"""Dtypes of x and w."""


def draw_arrays(product: Product, seed: int = 0, *, exact: bool = True) -> list[np.ndarray]:
    """Operands; exact: of integers so small that bfloat16 products sum up without rounding."""
    random = np.random.default_rng(seed)
    arrays = []
    for operand in product.operands(product.m, product.n, product.k)[:-1]:
        dtype = numpy_dtype(operand.dtype)
        array: np.ndarray
        if operand.dtype == "int8":
            array = random.integers(-128, 128, operand.shape)
        elif operand.name.endswith("scale"):
            array = random.random(operand.shape) * 0.01 + 0.001
        elif operand.name in ("x", "w") and exact:
            array = random.integers(-8, 9, operand.shape)
        else:
            array = random.standard_normal(operand.shape)
        arrays.append(array.astype(dtype))
    return arrays


def ulps(result: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """The greatest difference in units of bfloat16's last place; below `floor`, places are those of the floor."""
    a, b = result.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(a).all()
    magnitude = np.maximum(np.maximum(np.abs(a), np.abs(b)), max(floor, 1e-30))
    return float((np.abs(a - b) / 2.0 ** (np.floor(np.log2(magnitude)) - 7)).max())


def interpreted(text: str, *arrays: np.ndarray, dma: str = "on_wait") -> judges.Interpreted:
    """Of JAX's TPU interpreter; skips the rest of the test where there is no JAX."""
    if not export.has_jax():
        pytest.skip('needs JAX: pip install "jisu[tpu]"')
    return judges.interpret(text, *arrays, dma=dma)


def run_everywhere(
    lowered: Lowered,
    arrays: Sequence[np.ndarray],
    taken: Sequence[np.ndarray],
    agrees: Callable[[np.ndarray, str], None],
) -> None:
    """agrees(result, where) of LLVM's run, of emulated copies that come late or early, and of the interpreter in both modes, which takes operands as
    `taken`; no race, nothing left."""
    agrees(run(lowered, *arrays), "LLVM")
    for dma in ("late", "early"):
        checked = check(lowered, *arrays, dma=dma)
        assert checked.clean, (dma, checked.races, checked.unfinished)
        agrees(checked.result, dma)
    text = source(lowered)
    for dma in judges.DMA:
        found = interpreted(text, *taken, dma=dma)
        assert found.clean, (dma, found.raced, found.left)
        agrees(found.result, dma)


def assert_right(lowered: Lowered, seed: int = 0) -> None:
    """LLVM's run, emulated copies that come late or early, and the interpreter in both modes: all equal NumPy, no race, nothing left."""
    product = lowered.product
    arrays = draw_arrays(product, seed)
    plain = product.activation == "none" and not (product.bias or product.residual or product.gated)
    expected = reference(product, *arrays, exact=not plain)
    floor = float(np.abs(expected.astype(np.float64)).max()) / 64

    def agrees(result: np.ndarray, where: str) -> None:
        if plain:
            np.testing.assert_array_equal(result, expected, err_msg=where)
        else:
            assert ulps(result, expected, floor) <= 1, where

    taken = [arrays[0], np.stack(arrays[1:3]), *arrays[3:]] if product.gated else arrays
    run_everywhere(lowered, arrays, taken, agrees)


@st.composite
def lowereds(draw: Any) -> Lowered:
    """Products of ragged shapes with all kinds of epilogue, in all orders of tiles, small enough to be interpreted."""
    chip = draw(st.sampled_from([V5E, V6E]))
    m, n, k = draw(st.integers(1, 150)), draw(st.integers(1, 700)), draw(st.integers(1, 700))
    dtype, weights = draw(st.sampled_from(KINDS))
    flags = {name: draw(st.booleans()) for name in ("channel_scale", "row_scale", "bias", "residual")}
    flags["gated"] = not (flags["bias"] or flags["residual"])
    product = Product(
        m,
        n,
        k,
        dtype,
        draw(st.sampled_from(["bfloat16", "float32"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        weights=weights,
        **flags,
    )
    order = draw(st.sampled_from(["chosen", "resident", "panels", *([] if product.gated else ["split"])]))
    if order == "chosen":
        return lower(product, chip)
    rows = -(-m // 32) * 32 if order == "resident" else draw(st.sampled_from([32, 64]))
    depth = -(-k // 128) * 128 if order != "split" else 128
    width, block = draw(st.sampled_from([128, 256, 512])), draw(st.sampled_from([128, 512]))
    tiles = make_tiles(
        product, chip, order, rows, width, depth, block=max(block, chip.mxu), rows=draw(st.sampled_from([32, 64, 512]))
    )
    return lower(product, chip, draw(st.sampled_from([tiles, *recut(tiles, product, chip)])))


def recut(tiles: Tiles, product: Product, chip: Chip) -> list[Tiles]:
    """The tiles with other beginnings and ends of what is multiplied."""
    step = row_multiple(product, chip)
    heads = [(h, tiles.m - h) for h in range(step, tiles.m, step)] if tiles.order != "split" else []
    units = tiles.columns // tiles.unit[0]
    tails = [((units - n) * tiles.unit[0], n * tiles.unit[0]) for n in range(1, units)]
    return [attrs.evolve(tiles, head=h, tail=t) for h in [*heads[:2], tiles.head] for t in [*tails[:2], tiles.tail]]


RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=6, deadline=None, suppress_health_check=RELAXED, derandomize=True)
@given(lowereds(), st.integers(0, 9))
def test_drawn_products(lowered: Lowered, seed: int) -> None:
    assert_right(lowered, seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(lowereds(), st.integers(0, 9))
def test_many_drawn_products(lowered: Lowered, seed: int) -> None:
    assert_right(lowered, seed)


@pytest.mark.parametrize(("dtype", "weights"), KINDS)
@pytest.mark.parametrize("order", ["resident", "panels", "split"])
def test_orders(order: str, dtype: str, weights: str) -> None:
    """Every order of tiles, over several steps of its pipeline, ragged in all axes."""
    product = Product(60, 500, 300, dtype, channel_scale=weights == "int8", row_scale=dtype == "int8", weights=weights)
    assert_right(lower(product, V5E, several_steps(product, order)))


@pytest.mark.parametrize(("dtype", "weights"), KINDS)
@pytest.mark.parametrize("order", ["resident", "panels"])
def test_gates(order: str, dtype: str, weights: str) -> None:
    """Two products of one x, of which the second scales the first's activation: neither leaves VMEM."""
    scaled: dict[str, Any] = {"channel_scale": weights == "int8", "row_scale": dtype == "int8"}
    product = Product(60, 500, 300, dtype, activation="gelu_tanh", weights=weights, gated=True, **scaled)
    lowered = lower(product, V5E, several_steps(product, order))
    assert_right(lowered)
    assert [o.name for o in lowered.operands[:3]] == ["x", "w", "u"]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_pipelines(steps: int) -> None:
    """With so few steps, the pipeline is little but its first and last ones."""
    product = Product(32 * steps - 5, 100, 100, "int8")
    lowered = lower(product, V5E, make_tiles(product, V5E, "panels", 32, 128, 128))
    assert lowered.tiles.steps == steps
    assert_right(lowered)


def several_steps(product: Product, order: str) -> Tiles:
    """Tiles with at least three steps."""
    depth = 128 if order == "split" else -(-product.k // 128) * 128
    return make_tiles(product, V5E, order, 64 if order == "resident" else 32, 128, depth)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_reals_within_an_ulp(weights: str) -> None:
    """Sums of reals are rounded on the way, in another order than NumPy's."""
    product = Product(33, 130, 515, channel_scale=True, bias=True, activation="silu", residual=True, weights=weights)
    arrays = draw_arrays(product, exact=False)
    expected = reference(product, *arrays)
    lowered = lower(product, V5E)
    assert ulps(run(lowered, *arrays), expected, floor=1.0) <= 1
    assert ulps(interpreted(source(lowered), *arrays).result, expected, floor=1.0) <= 1


def test_float32_keeps_its_precision() -> None:
    """Errors are those of float32's sums; parts of bfloat16 alone would be a thousand times further off."""
    product = Product(33, 130, 515, "float32", "float32")
    arrays = draw_arrays(product, exact=False)
    expected = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64)
    lowered = lower(product, V5E)
    for found in (run(lowered, *arrays), interpreted(source(lowered), *arrays).result):
        assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()
    assert source(lowered).count("precision=lax.Precision.HIGHEST") == source(lowered).count("jnp.dot(")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_narrow_weights_move_fewer_bytes(dtype: str) -> None:
    """A decode step's product moves its weights as they are stored."""
    narrow, wide = (Product(1, 4096, 4096, dtype, weights=w) for w in ("int8", dtype))
    moved = [choose_tiles(p, V5E).hbm_bytes(p) for p in (narrow, wide)]
    assert moved[0] <= 4096 * 4096 * 1.02 and moved[1] >= 4096 * 4096 * wide.itemsize


def test_a_decode_row_becomes_eight() -> None:
    assert choose_tiles(Product(1, 4096, 4096, "int8"), V5E).padded[0] == 8


def test_padded_operands_are_taken_as_they_are() -> None:
    lowered = lower(Product(5, 100, 70), V5E)
    arrays = draw_arrays(lowered.product)
    padded = [operand.pad(array) for operand, array in zip(lowered.operands, arrays, strict=False)]
    np.testing.assert_array_equal(run(lowered, *padded), run(lowered, *arrays))
    with pytest.raises(InputError, match=r"w must be \[70, 100\] or \[128, 128\], got \[100, 70\]"):
        run(lowered, arrays[0], arrays[1].T)
    with pytest.raises(InputError, match="x must be bfloat16, got float32"):
        run(lowered, arrays[0].astype(np.float32), arrays[1])


@pytest.mark.parametrize(("dtype", "weights"), KINDS)
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.name)
@pytest.mark.parametrize("m", [1, 16, 100, 512, 2048])
def test_chosen_tiles_fit_and_read_little(m: int, chip: Chip, dtype: str, weights: str) -> None:
    """Whatever is chosen passes its own check, and weights are read once where rows are few."""
    for n, k in ((4096, 4096), (11008, 4096), (4096, 14336), (300, 200)):
        product = Product(m, n, k, dtype, weights=weights)
        tiles = choose_tiles(product, chip)
        tiles.check(product, chip)
        assert all(p >= s for p, s in zip(tiles.padded, (m, n, k), strict=True))
        least = m * k * product.itemsize + k * n * product.weight_itemsize + 2 * m * n
        if m <= 512 and n > 300:
            assert tiles.hbm_bytes(product) <= 1.05 * least


def test_source_stands_alone_and_holds_no_python_division() -> None:
    lowered = lower(Product(60, 500, 300, "int8", channel_scale=True), V5E)
    text = source(lowered)
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"jax"}
    body = text[text.index("def body(") : text.index("def kernel(")]
    assert "//" not in body and "%" not in body


def test_sums_begin_with_their_first_product() -> None:
    """In straight code nothing is zeroed; in front of a loop over k it is."""
    product = Product(32, 256, 1024, "int8")
    straight = make_tiles(product, V5E, "resident", 32, 256, 1024)
    assert straight.turn == 1024 == 2 * straight.inner
    text = source(lower(product, V5E, straight))
    assert (
        "jnp.zeros" not in text and text.count("] = jnp.dot(") == text.count("] += jnp.dot(") == len(straight.tail) == 2
    )
    looped = source(lower(product, V5E, attrs.evolve(straight, turn=512)))
    assert (
        looped.count("jnp.zeros((32, 128), jnp.int32)") == looped.count("] += jnp.dot(") == 2
        and "] = jnp.dot(" not in looped
    )


def test_products_walk_as_the_chips_instructions() -> None:
    """The matrix unit's size shows in the TIR, and copies have two slots."""
    for chip in (V5E, V6E):
        product = Product(60, 512, 512)
        lowered = lower(product, chip, make_tiles(product, chip, "resident", 64, 256, 512))
        multiplied = [f for f in map(instruction, parts(lowered.function.body)) if isinstance(f, Multiply)]
        assert {(m.w.rows, m.w.columns) for m in multiplied} == {(chip.mxu, chip.mxu)}
        assert "software_pipeline" not in lowered.function.script()
        assert "async_wait_inflight_count" in lowered.function.script()


# Faults on purpose: each must be refused or seen.


def changed(lowered: Lowered, visit: Callable[[Any], Any]) -> Lowered:
    return attrs.evolve(lowered, function=lowered.function.with_body(rebuild(lowered.function.body, visit)))


def without_wait(lowered: Lowered, queue: int) -> Lowered:
    """The TIR without the last wait for a queue."""
    waits = [
        s
        for s in parts(lowered.function.body)
        if isinstance(s, tirx.AttrStmt) and s.attr_key == WAIT and int(s.value) == queue
    ]
    return changed(lowered, lambda s: s.body.body if s.same_as(waits[-1]) else None)


def in_one_slot(lowered: Lowered, name: str) -> Lowered:
    """The TIR with a buffer's two slots being one: its copies and products address the first."""
    buffer = next(
        s.buffer
        for s in parts(lowered.function.body)
        if isinstance(s, tirx.AllocBuffer) and s.buffer.name.startswith(name + "_")
    )
    size = int(np.prod([int(n) for n in buffer.shape[1:]]))

    def first(pointer: Any) -> Any:
        if not hasattr(pointer, "args") or len(pointer.args) != 5 or not pointer.args[1].args[0].same_as(buffer):
            return pointer
        kind, data, offset, *rest = pointer.args
        return type(pointer)(pointer.op, [kind, data, tirx.floormod(offset, size), *rest], ret_ty=pointer.ty)

    def visit(s: Any) -> Any:
        if instruction(s) is None:
            return None
        call = s.value
        return tirx.Evaluate(type(call)(call.op, [first(a) for a in call.args], ret_ty=call.ty))

    return changed(lowered, visit)


@pytest.fixture(scope="module")
def pipelined() -> Lowered:
    product = Product(60, 700, 300, "int8", "float32")
    return lower(product, V5E, several_steps(product, "panels"))


def judged(lowered: Lowered, arrays: list[np.ndarray]) -> dict[str, tuple[bool, bool]]:
    """Per judge: whether copies and waits fit together, and whether values are right."""
    expected = reference(lowered.product, *arrays, exact=False)
    text = source(lowered)
    verdicts = {}
    for dma in ("late", "early"):
        checked = check(lowered, *arrays, dma=dma)
        verdicts[dma] = checked.clean, np.array_equal(checked.result, expected)
    for dma in judges.DMA:
        found = interpreted(text, *arrays, dma=dma)
        verdicts[dma] = found.clean, np.array_equal(found.result, expected)
    return verdicts


def test_a_dropped_wait_is_seen(pipelined: Lowered) -> None:
    arrays = draw_arrays(pipelined.product)
    assert set(judged(pipelined, arrays).values()) == {(True, True)}
    faulty = without_wait(pipelined, LOAD)
    assert all(check(faulty, *arrays, dma=dma).races for dma in ("late", "early"))
    verdicts = judged(faulty, arrays)
    assert verdicts["late"] == (False, False) and not verdicts["early"][0]
    assert not verdicts["on_wait"][1]  # tiles that have not come are multiplied
    assert not verdicts["eager"][0]  # values may be right by luck; a semaphore is left


def test_a_store_that_nobody_awaits_is_seen(pipelined: Lowered) -> None:
    verdicts = judged(without_wait(pipelined, STORE), draw_arrays(pipelined.product))
    assert not any(clean and right for clean, right in verdicts.values()), verdicts


def test_two_tiles_in_one_slot_are_seen(pipelined: Lowered) -> None:
    # Both operands: were it one alone, a wait for the other slot would never end.
    verdicts = judged(in_one_slot(in_one_slot(pipelined, "x"), "w"), draw_arrays(pipelined.product))
    assert not any(clean and right for clean, right in verdicts.values()), verdicts


@pytest.fixture(scope="module")
def cut() -> Lowered:
    """A product whose x comes by three blocks of rows, and whose last block is multiplied in three parts; one step."""
    product = Product(90, 500, 300, "int8", channel_scale=True, row_scale=True)
    tiles = make_tiles(product, V5E, "resident", 128, 512, 384, rows=64)
    return lower(product, V5E, attrs.evolve(tiles, head=(32, 32, 64), tail=(256, 128, 128)))


def test_first_and_last_blocks_are_cut(cut: Lowered) -> None:
    assert_right(cut)
    copies = [c for c in map(instruction, parts(cut.function.body)) if isinstance(c, Copy)]
    assert [c.to.rows for c in copies if c.to.buffer.name.startswith("x_")] == [32, 32, 64]
    assert [(c.to.rows, c.to.columns) for c in copies if c.to.in_hbm] == [
        (32, 512),
        (32, 512),
        (64, 256),
        (64, 128),
        (64, 128),
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_block_of_rows_that_nobody_awaits_is_seen(cut: Lowered, number: int) -> None:
    waits = [
        s
        for s in parts(cut.function.body)
        if isinstance(s, tirx.AttrStmt) and s.attr_key == WAIT and int(s.value) == ONCE
    ]
    assert len(waits) == 3
    # A wait is for all groups before its own, too: without the first one, the second comes too late.
    faulty = changed(cut, lambda s: s.body.body if s.same_as(waits[number]) else None)
    arrays = draw_arrays(cut.product)
    expected = reference(cut.product, *arrays)
    assert all(check(faulty, *arrays, dma=dma).races for dma in ("late", "early"))
    text = source(faulty)
    on_wait, eager = (interpreted(text, *arrays, dma=dma) for dma in judges.DMA)
    assert not np.array_equal(on_wait.result, expected)
    assert number < 2 or not eager.clean


def test_results_leave_block_by_block(pipelined: Lowered) -> None:
    """In the loop, too: a block's results are stored before the next block is multiplied, and awaited two steps later."""
    loop = next(
        s for s in parts(pipelined.function.body) if isinstance(s, tirx.For) and isinstance(s.body, tirx.SeqStmt)
    )
    marks = {
        int(s.value): s.attr_key for s in parts(loop) if isinstance(s, tirx.AttrStmt) and s.attr_key in (COMMIT, WAIT)
    }
    assert marks == {LOAD: WAIT, STORE: COMMIT}


def test_vmem_overflow_names_the_tensor() -> None:
    product = Product(64, 8192, 16384)
    with pytest.raises(CompileError, match=r"bytes of VMEM.*the largest is w with 536870912 bytes"):
        lower(product, V5E, make_tiles(product, V5E, "resident", 64, 8192, 16384))
    tiny = attrs.evolve(V5E, vmem_bytes=64 << 10)
    with pytest.raises(CompileError, match="the largest is"):
        choose_tiles(product, tiny)


@pytest.mark.parametrize(
    ("m", "n", "k", "said"),
    [(12, 128, 128, "rows of x"), (32, 100, 128, "columns of w"), (32, 128, 96, "columns of x")],
)
def test_misaligned_tiles_are_refused(m: int, n: int, k: int, said: str) -> None:
    product = Product(100, 300, 500, "int8")
    with pytest.raises(CompileError, match=f"{said}, which is no multiple of"):
        lower(product, V5E, make_tiles(product, V5E, "split", m, n, k))


def test_what_gates_refuse() -> None:
    product = Product(60, 500, 300, gated=True)
    with pytest.raises(CompileError, match="the inner axis of a gated product isn't split"):
        lower(product, V5E, several_steps(product, "split"))
    with pytest.raises(CompileError, match="neither bias nor residual"):
        Product(1, 1, 1, bias=True, gated=True)


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(CompileError, match="int8, bfloat16, float32, not float16"):
        Product(1, 1, 1, "float16")
    with pytest.raises(CompileError, match="weights of a product in bfloat16 are that or int8, not float32"):
        Product(1, 1, 1, weights="float32")


# Google's compiler


LIBTPU_SHAPES = [
    Product(1, 1000, 1000, "int8", channel_scale=True, row_scale=True),
    Product(1, 4096, 4096),
    Product(100, 300, 200, "int8", channel_scale=True, bias=True, activation="gelu", residual=True),
    Product(512, 2048, 2048, "int8", channel_scale=True),
    Product(512, 2048, 2048, activation="silu"),
    Product(1500, 1000, 3000, result="float32"),
    Product(1, 4096, 4096, channel_scale=True, weights="int8"),
    Product(512, 2048, 2048, channel_scale=True, activation="silu", weights="int8"),
    Product(100, 300, 200, "float32", "float32", channel_scale=True, bias=True, residual=True, weights="int8"),
    Product(512, 1024, 2048, "float32", "float32"),
    Product(1, 4096, 4096, activation="silu", gated=True),
    Product(512, 2048, 2048, "int8", channel_scale=True, row_scale=True, activation="silu", gated=True),
    Product(64, 1024, 2048, channel_scale=True, activation="gelu_tanh", weights="int8", gated=True),
]


@needs_libtpu
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.name)
def test_libtpu_compiles_products(chip: Chip) -> None:
    sources = [source(lower(product, chip)) for product in LIBTPU_SHAPES]
    for order in ("resident", "panels", "split"):
        sources.append(
            source(
                lower(
                    LIBTPU_SHAPES[2],
                    chip,
                    make_tiles(LIBTPU_SHAPES[2], chip, order, 128, 128, 128 if order == "split" else 256),
                )
            )
        )
    accepted = judges.compile_ahead(sources, [chip.short])
    assert len(accepted) == len(sources)
    assert all(row[0].chip == chip.short and row[0].code_bytes > 0 for row in accepted)


@needs_libtpu
@pytest.mark.slow
@settings(max_examples=1, deadline=None, suppress_health_check=RELAXED)
@given(st.lists(lowereds(), min_size=30, max_size=30))
def test_libtpu_compiles_drawn_products(drawn: list[Lowered]) -> None:
    for chip in (V5E, V6E):
        judges.compile_ahead([source(lowered) for lowered in drawn if lowered.chip is chip], [chip.short])


@pytest.mark.slow
def test_without_jax_the_rest_is_tested_and_the_interpreter_skipped() -> None:
    arguments = ["-q", "-rs", "-p", "no:cacheprovider", __file__, "-k", "reals_within_an_ulp or dropped_wait"]
    code = f"import sys; sys.modules['jax'] = None; import pytest; sys.exit(pytest.main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0 and "3 skipped" in done.stdout and 'needs JAX: pip install "jisu[tpu]"' in done.stdout
