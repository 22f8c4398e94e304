"""Products of codes with a scale per group of inputs: TIR through LLVM, Pallas source in JAX's interpreter, timing, programs, libtpu."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from test_tpu_product import run_everywhere

from jisu.compiler import ops, schemes
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import ArrayStorage, Graph, Node, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import relative_error
from jisu.compiler.types import TensorType, numpy_dtype
from jisu.passes.layout import FoldWeights
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target
from jisu.targets.tpu import export, grouped, judges, kernels
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.choose import product_of
from jisu.targets.tpu.functional import run
from jisu.targets.tpu.kernel_events import events_of
from jisu.targets.tpu.layout import lay_out
from jisu.targets.tpu.pallas import source
from jisu.targets.tpu.product import Lowered, lower
from jisu.targets.tpu.reference import reference
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.stablehlo import emit, signature
from jisu.targets.tpu.tiles import ERROR, choose_tiles, make_tiles
from jisu.targets.tpu.timing import simulate

V5E, V6E = Chip.named("v5e"), Chip.named("v6e")
needs_jax = pytest.mark.skipif(not export.has_jax(), reason='needs JAX: pip install "jisu[tpu]"')
needs_libtpu = pytest.mark.skipif(
    judges.aot_python() is None,
    reason=f'libtpu is not installed: pip install "jisu[tpu-aot]", or let {judges.AOT_PYTHON} name a Python that has it',
)
RELAXED = list(HealthCheck)
KINDS = [(x, w) for x in ("bfloat16", "float32", "int8") for w in ("int4", "int8")]
"""Dtypes of x and w."""


def draw_arrays(product: Product, seed: int = 0, *, exact: bool = True) -> list[np.ndarray]:
    """Operands; exact: small integers, and powers of two as scales, so that neither place of the scales rounds anything."""
    random = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for operand in product.operands(product.m, product.n, product.k)[:-1]:
        name, shape = operand.name, operand.shape
        if name in "wu":
            half = 2 ** (schemes.SCHEMES[product.weights].bits - 1)
            found.append(random.integers(-half, half, shape).astype(np.int8))
            continue
        array: np.ndarray
        if name.endswith("zero"):
            array = random.integers(0, 16 if product.weights == "int4" else 256, shape)
        elif name.endswith("scale"):
            array = 2.0 ** random.integers(-4, 1, shape) if exact else random.random(shape) * 0.01 + 0.001
        else:
            array = random.integers(-4, 5, shape) if exact or operand.dtype == "int8" else random.standard_normal(shape)
        found.append(array.astype(numpy_dtype(operand.dtype)))
    return found


def taken(product: Product, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The operands as the Pallas kernel takes them."""
    named = dict(zip((o.name for o in product.operands(product.m, product.n, product.k)), arrays, strict=False))
    if product.weights == "int4":
        for name in "wu"[: product.matrices]:
            codes = (named[name].astype(np.int16) + 8).astype(np.uint8)
            codes = np.pad(codes, [(0, len(codes) % 2), (0, 0)])
            named[name] = codes[::2] | codes[1::2] << 4
    if product.gated:
        for name in [name for name in named if name[0] == "u"]:
            first = f"w{name[1:]}"
            named[first] = np.stack([named[first], named.pop(name)])
    return list(named.values())


def assert_right(lowered: Lowered, seed: int = 0) -> None:
    """LLVM's run, emulated copies that come late or early, and the interpreter in both modes: all equal NumPy, no race, nothing left."""
    product = lowered.product
    arrays = draw_arrays(product, seed)
    want = reference(product, *arrays)

    def agrees(result: np.ndarray, where: str) -> None:
        if product.activation == "none" and not product.gated:
            np.testing.assert_array_equal(result, want, err_msg=where)
        else:
            assert relative_error(result, want) <= 1e-2, where

    run_everywhere(lowered, arrays, taken(product, arrays), agrees)


@st.composite
def lowereds(draw: Any) -> Lowered:
    """Ragged products, few rows and many, in both orders of tiles that they have."""
    chip, (dtype, weights) = draw(st.sampled_from([V5E, V6E])), draw(st.sampled_from(KINDS))
    m, n, k = draw(st.sampled_from([1, 5, 40, 150])), draw(st.integers(1, 600)), draw(st.integers(1, 700))
    gated = draw(st.booleans())
    product = Product(
        m, n, k, dtype, draw(st.sampled_from(["bfloat16", "float32"])), row_scale=dtype == "int8", bias=not gated and draw(st.booleans()),
        activation=draw(st.sampled_from(["none", "none", "silu"])), weights=weights, gated=gated,
        group=draw(st.sampled_from(grouped.GROUPS)), zeros=draw(st.booleans()), scales=draw(st.sampled_from(["float16", "float32"])),
    )  # fmt: skip
    order = draw(st.sampled_from(["chosen", "resident", "panels"]))
    if order == "chosen":
        return lower(product, chip)
    rows = -(-m // 32) * 32 if order == "resident" else 32
    return lower(
        product, chip, make_tiles(product, chip, order, rows, draw(st.sampled_from([128, 256])), -(-k // 128) * 128)
    )


@needs_jax
@settings(max_examples=4, deadline=None, suppress_health_check=RELAXED, derandomize=True)
@given(lowereds(), st.integers(0, 9))
def test_drawn_products(lowered: Lowered, seed: int) -> None:
    assert_right(lowered, seed)


@needs_jax
@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(lowereds(), st.integers(0, 9))
def test_many_drawn_products(lowered: Lowered, seed: int) -> None:
    assert_right(lowered, seed)


@needs_jax
@pytest.mark.parametrize(
    ("m", "group", "dtype", "weights"),
    [
        pytest.param(*rows, *kind, marks=[] if place == n % 2 else pytest.mark.slow)
        for n, kind in enumerate(KINDS)
        for place, rows in enumerate(((5, 32), (150, 64)))
    ],
)
def test_both_places_of_scales(m: int, group: int, dtype: str, weights: str) -> None:
    """Few rows: sums are scaled, x being stacked where a group is smaller than the matrix unit; many rows: numbers are, but for x int8."""
    product = Product(m, 100, 200, dtype, weights=weights, group=group, zeros=m == 5, row_scale=dtype == "int8")
    lowered = lower(product, V5E)
    place = grouped.Grouped(product, lowered.tiles.rows, lowered.tiles.unit[1]).place
    assert place == ("sums" if m == 5 or dtype == "int8" else "tile")
    assert_right(lowered)


@needs_jax
def test_a_gate_of_codes() -> None:
    product = Product(5, 500, 300, activation="silu", weights="int4", gated=True, group=64, zeros=True)
    lowered = lower(product, V5E)
    assert [o.name for o in lowered.operands] == "x w u w_scale w_zero u_scale u_zero result".split()
    assert_right(lowered)


@needs_jax
@pytest.mark.parametrize("m", [5, 150])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float32", 2e-6)])
def test_reals(dtype: str, tolerance: float, m: int) -> None:
    """float32 keeps its precision: x is multiplied in three parts of bfloat16, which hold it whole."""
    product = Product(m, 130, 515, dtype, dtype, weights="int4", group=32, zeros=True)
    arrays, lowered = draw_arrays(product, exact=False), lower(product, V5E)
    want = reference(product, *arrays).astype(np.float64)
    for found in (run(lowered, *arrays), judges.interpret(source(lowered), *taken(product, arrays)).result):
        assert np.abs(found.astype(np.float64) - want).max() <= tolerance * np.abs(want).max()


@needs_jax
def test_scales_of_every_size() -> None:
    """float16 is read by its bits: subnormal numbers, negative ones and zero, too."""
    product = Product(8, 128, 128, "float32", "float32", weights="int4", group=128)
    arrays = draw_arrays(product)
    arrays[2] = np.array([6e-8, 5.9e-5, 6.2e-5, -3e-6, 0.0, -2.5, 60000.0, 1.0] * 16, np.float16).reshape(1, 128)
    want = reference(product, *arrays)
    lowered = lower(product, V5E)
    for found in (run(lowered, *arrays), judges.interpret(source(lowered), *taken(product, arrays)).result):
        np.testing.assert_allclose(found, want, rtol=1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=RELAXED, derandomize=True)
@given(lowereds())
def test_tir_moves_what_its_tiles_say(lowered: Lowered) -> None:
    """Bytes, VMEM, the MXUs' useful work and cycles of the walked TIR are those of the closed form."""
    product, tiles, found = lowered.product, lowered.tiles, simulate(lowered.chip, events_of(lowered))
    assert not found.leaked and not found.hazards
    assert found.hbm_bytes == tiles.hbm_bytes(product)
    assert found.vmem_high_water <= sum(tiles.vmem(product, lowered.chip).values())
    m, n, k = tiles.padded
    ideal = 2 * m * n * k * product.matrices / lowered.chip.peak_flops(product.dtype) * lowered.chip.clock
    assert found.ideal == pytest.approx(ideal)
    assert tiles.cycles(product, lowered.chip) == pytest.approx(found.cycles, rel=ERROR)


SIZES = [(4096, 4096), (11008, 4096), (4096, 14336)]
"""n and k of a decoder's layers."""


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.name)
def test_decode_reads_codes_as_they_are_stored(chip: Chip, dtype: str) -> None:
    """Half of the bytes of int8, and near what HBM alone takes; smaller products are bound by latencies, and v6e by pushing weights."""
    for (n, k), group, zeros in itertools.product(SIZES, (32, 128), (False, True)):
        product = Product(1, n, k, dtype, row_scale=dtype == "int8", weights="int4", group=group, zeros=zeros)
        tiles, least = choose_tiles(product, chip), product.least_bytes
        assert tiles.hbm_bytes(product) <= 1.05 * least
        bound = least / chip.hbm_bytes_per_cycle
        if chip is V5E and group == 128 and bound > 30000:
            assert tiles.cycles(product, chip, launch=False) <= 1.10 * bound


def test_many_rows_scale_numbers_once() -> None:
    """512 rows of groups of 32: scaling sums would take the matrix unit four times as long."""
    product = Product(512, 4096, 4096, weights="int4", group=32)
    found = simulate(V5E, events_of(lower(product, V5E)), launch=False)
    assert found.mxu_utilisation >= 0.7


def test_what_groups_refuse() -> None:
    with pytest.raises(CompileError, match="weights with a scale per group are codes, not bfloat16"):
        Product(1, 1, 1, group=32)
    with pytest.raises(CompileError, match="have none per output"):
        Product(1, 1, 1, weights="int4", group=32, channel_scale=True)
    with pytest.raises(CompileError, match="weights of a product in bfloat16 are that or int8, not int4"):
        Product(1, 1, 1, weights="int4")
    product = Product(60, 500, 300, weights="int4", group=32)
    with pytest.raises(CompileError, match="the inner axis of a product with scales per group isn't split"):
        lower(product, V5E, make_tiles(product, V5E, "split", 32, 128, 128))


# --- Programs --------------------------------------------------------------------------------------------------------------


def layer(
    scheme: str, group: int, *, zeros: bool, gated: bool, rounded: bool, rows: int = 9, n: int = 80, k: int = 192, panel: int = 16,
    dtype: str = "bfloat16", stored: bool = False,
) -> tuple[Graph, list[np.ndarray]]:  # fmt: skip
    """A layer of codes with scales per group, in panels; stored: as weights of the graph, which are packed when they are folded."""
    bits, groups, rng = schemes.SCHEMES[scheme].bits, schemes.groups_of(k, group), np.random.default_rng(0)
    held: dict[str, np.ndarray] = {}
    parts: list[list[Node]] = [[], [], []]
    for i in range(1 + gated):
        held |= {
            f"c{i}": rng.integers(0, 256, (n, k * bits // 8)).astype(np.uint8),
            f"s{i}": (rng.random((n, groups)) * 0.01).astype(np.float16),
            f"z{i}": rng.integers(0, 2**bits, (n, groups)).astype(np.uint8),
        }
        make: Any = weight if stored else placeholder
        c, s, z = (make(m, TensorType(held[m].shape, str(held[m].dtype))) for m in (f"c{i}", f"s{i}", f"z{i}"))
        parts[0].append(ops.pack_codes(c, scheme=scheme, k=k, panel=panel, word=4 if rounded else 1))
        parts[1].append(ops.pack_scales(s, scheme=scheme, whole=1.0, panel=panel))
        parts[2].append(ops.pack_zeros(z, panel=panel))
    x = placeholder("x", TensorType((rows, k), dtype))

    def together(nodes: list[Node]) -> Node:
        if not gated:
            return nodes[0]
        return ops.concat(*(ops.reshape(v, shape=(v.shape[0], 1, *v.shape[1:])) for v in nodes), axis=1)

    operands = [together(parts[0]), together(parts[1]), together(parts[2]) if zeros else None]
    how: dict[str, Any] = {"outputs": n, "scheme": scheme, "group": group, "gated": gated, "activation": "silu"}
    if rounded:
        records = ops.encode_levels(x, scheme="int8", group=group, own=False)
        out = ops.levels_linear(records, *operands, k=k, own=False, dtype=dtype, **how)
    else:
        out = ops.quantized_linear(x, *operands, **how)
    arrays = [rng.standard_normal((rows, k)).astype(bfloat16 if dtype == "bfloat16" else dtype)]
    if stored:
        used = {m: ArrayStorage(a) for m, a in held.items() if zeros or m[0] != "z"}
        return Graph((x,), (out,), used), arrays
    names = [m for m in held if zeros or m[0] != "z"]
    given = {o.name: o for o in _leaves(out)}
    return Graph((x, *(given[m] for m in names)), (out,)), [*arrays, *(held[m] for m in names)]


def _leaves(node: Node) -> set[Node]:
    found = {n for o in node.parents for n in _leaves(o)}
    return found or {node}


FORMS: list[dict[str, Any]] = [
    {"scheme": scheme, "group": group, "zeros": zeros, "gated": gated, "rounded": rounded}
    for scheme, group, zeros, gated, rounded in [
        ("int4", 64, True, False, False),
        ("int4", 32, True, True, False),
        ("int4", 128, False, False, True),
        ("int4", 32, True, True, True),
        ("int8", 64, True, False, False),
        ("int8", 32, False, True, True),
    ]
]


@needs_jax
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_layers_in_programs(form: dict[str, Any], dtype: str) -> None:
    """Codes in a CPU's panels become what the kernel reads at each call."""
    graph, arrays = layer(**form, dtype=dtype)
    (want,) = interpret(graph, arrays)
    text = emit(graph, {}, kernels.chooser(V5E, smallest=0, platform="cpu"))
    (got,) = export.runner(text, signature(graph, {}))(*arrays)
    assert relative_error(got, want) <= (1e-2 if dtype == "bfloat16" else 1e-3 if form["rounded"] else 1e-5)
    assert emit(graph, {}, kernels.chooser(V5E, smallest=0)).count("@tpu_custom_call") == 1


@needs_jax
@pytest.mark.parametrize(
    "folded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["packed here", "stored packed"]
)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_codes_are_laid_out_once(form: dict[str, Any], folded: bool) -> None:
    """As bytes of two codes, transposed, beside scales and zeros: the program has no step for them, and weights take no more bytes."""
    graph, arrays = layer(**form, stored=True, n=128, panel=1 if folded else 16)
    (want,) = interpret(graph, arrays)
    laid = FoldWeights()(lay_out(FoldWeights()(graph) if folded else graph, V5E))
    assert relative_error(interpret(laid, arrays)[0], want) <= 1e-2
    entry = signature(laid, {})
    weights = [laid.weights[name].numpy() for name, _ in entry.weights]
    for chosen in (None, kernels.chooser(V5E, smallest=0, platform="cpu")):
        (got,) = export.runner(emit(laid, {}, chosen), entry)(*arrays, *weights)
        assert relative_error(got, want) <= 1e-2
    text = emit(laid, {}, kernels.chooser(V5E, smallest=0))
    assert text.count("@tpu_custom_call") == 1 and not re.search(r"stablehlo.transpose .*x(ui8|i8|f16)>", text)
    assert sum(w.nbytes for w in weights) == sum(s.numpy().nbytes for s in graph.weights.values())
    again = lay_out(laid, V5E)
    assert [str(n) for n in again.weights] == [str(n) for n in laid.weights]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_simulated_programs_compute_by_these_products(form: dict[str, Any], tmp_path: Path) -> None:
    """`compile` for a TPU runs the same TIR: codes lie row by row there."""
    graph, arrays = layer(**form, panel=1, stored=True)
    graph = FoldWeights()(graph)
    product = product_of(graph.outputs[0], V5E)
    assert product is not None
    assert (product.group, product.weights, product.zeros) == (form["group"], form["scheme"], form["zeros"])
    info = compile_graphs(
        {"main": graph}, Target.resolve("tpu:v5e"), out=tmp_path / "out", cache_dir=tmp_path / "cache"
    )
    weights = {name: storage.numpy() for name, storage in graph.weights.items()}
    (found,) = Executable.load(info.library, info.entries).call("main", arrays, weights)
    assert relative_error(np.asarray(found), interpret(graph, arrays)[0]) <= 1e-2


def test_other_groups_stay_stablehlo() -> None:
    for scheme, group in (("int4", 16), ("nf4", 64)):
        graph, _ = layer(scheme, group, zeros=False, gated=False, rounded=False)
        assert not grouped.reads(graph.outputs[0])
        assert kernels.chooser(V5E, smallest=0)(graph.outputs[0], {}) is None


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.name)
def test_libtpu_compiles_products(chip: Chip) -> None:
    products = [
        Product(1, 4096, 4096, weights="int4", group=128, zeros=True),
        Product(1, 4096, 4096, "float32", "float32", weights="int4", group=32),
        Product(1, 4096, 4096, "int8", row_scale=True, weights="int4", group=128, zeros=True),
        Product(512, 2048, 2048, weights="int4", group=64, zeros=True),
        Product(100, 2048, 2048, weights="int8", group=128),
        Product(100, 300, 200, "float32", "float32", weights="int4", group=64, bias=True),
        Product(512, 2048, 2048, "int8", row_scale=True, weights="int4", group=32, zeros=True),
        Product(1, 4096, 4096, weights="int4", group=64, zeros=True, gated=True, activation="silu"),
        Product(3, 300, 200, weights="int8", group=32, zeros=True, scales="float32"),
    ]
    accepted = judges.compile_ahead([source(lower(p, chip)) for p in products], [chip.short])
    assert all(row[0].code_bytes > 0 for row in accepted)
