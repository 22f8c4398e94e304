# ruff: noqa: F811
"""Products of levels of 8 bits on NVIDIA GPUs: kernels on an emulated one, against the ops' meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from test_cuda import GPU, HOPPER, RACES, REAL, Launch, drawn, emulator, launch  # noqa: F401
from test_cuda_models import run_all
from test_hopper import Map, mapped  # noqa: F401
from test_quantization import coded

from jisu.compiler import levels as records
from jisu.compiler import ops
from jisu.compiler.entry import stored
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import ArrayStorage, Graph, Storage, placeholder, weight
from jisu.compiler.interpret import evaluate_node, interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.passes import layout_passes
from jisu.passes.compression.gptq import choose_grid
from jisu.targets import facts
from jisu.targets.cuda import ptx
from jisu.targets.cuda.device import Device
from jisu.targets.cuda.kernels import hopper, levels, products, thin
from jisu.targets.cuda.kernels.levels import Levels
from jisu.targets.cuda.kernels.norm import Norm
from jisu.targets.cuda.kernels.tails import Encoding, Tail, tailed
from jisu.targets.cuda.lowering import lower
from jisu.targets.target import Target

ADA = attrs.evolve(GPU, mcpu="sm_89")


def case(layer: Levels, m: int, seed: int = 0, one_sign: bool = False) -> tuple[list[np.ndarray], np.ndarray]:
    """What a kernel reads (records, codes, scales and, if there are, zeros, bias, residual), and what the op makes of it; one_sign: all products are
    positive."""
    rng = np.random.default_rng(seed)
    (n,), k, kind = layer.outputs, layer.k, SCHEMES[layer.scheme]
    x_ = rng.standard_normal((m, k)).astype(np.float32)
    x = records.encode(np.abs(x_) if one_sign else x_, SCHEMES[layer.levels], layer.group, layer.own)
    rows = n * layer.per_weight_row
    grid = choose_grid(
        rng.standard_normal((rows, k)).astype(np.float32) + 0.3, kind, layer.group, symmetric=not layer.zeros
    )
    values = grid.values(rng.integers(0, 2**kind.bits, (rows, k), np.uint8))
    codes = grid.nearest(np.abs(values) if one_sign else values)
    packing = ops.pack_codes(
        placeholder("codes", TensorType((rows, kind.row_bytes(k)), "uint8")), scheme=kind.name, k=k, panel=1, word=4
    )
    packed = evaluate_node(packing, [kind.pack(codes)], {})
    given_: list[Any] = [
        x,
        packed,
        grid.scales.astype(layer.scales),
        None if grid.zeros is None else grid.zeros.astype(np.uint8),
    ]
    bias = drawn(seed + 1, n) if layer.bias else None
    residual = drawn(seed + 2, m, n) if layer.residual else None
    lead = (n, 2) if layer.gated else (n,)
    shaped = [
        x,
        packed.reshape(*lead, *packed.shape[1:]),
        *(None if v is None else v.reshape(*lead, -1, 1) for v in given_[2:]),
        bias,
        residual,
    ]
    node = ops.levels_linear.make(
        [None if v is None else placeholder(f"o{i}", TensorType(v.shape, v.dtype.name)) for i, v in enumerate(shaped)],
        {
            "outputs": n, "k": k, "scheme": layer.scheme, "group": layer.group, "own": layer.own, "gated": layer.gated,
            "activation": layer.activation, "dtype": layer.dtype, "records": layer.levels,
        },
    )  # fmt: skip
    want = evaluate_node(node, shaped, {})
    return [v for v in (*given_, bias, residual) if v is not None], want


def check(
    layer: Levels, m: int, launch: Launch, many: products.Tile | None = None, tolerance: float = 1e-2, one_sign: bool = False, **how: Any
) -> None:  # fmt: skip
    arrays, want = case(layer, m, one_sign=one_sign)
    y = drawn(9, m + 1, layer.outputs[0], dtype=layer.dtype)
    guard = y[-1].copy()
    if many is None:
        rows = min(r for r in thin.ROWS if r >= min(m, thin.ROWS[-1]))
        launch(
            levels.few(layer, rows, ADA),
            (layer.tiles(thin.outputs(layer, rows, ADA)), -(-m // rows)),
            *arrays,
            y,
            m,
            **how,
        )
    else:
        launch(levels.many(layer, many, ADA), (-(-m // many.rows), layer.tiles(many.outputs)), *arrays, y, m, **how)
    close(y[:m], want, tolerance)
    np.testing.assert_array_equal(y[-1], guard)


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    scale = float(np.abs(want.astype(np.float32)).max())
    np.testing.assert_allclose(
        got.astype(np.float32), want.astype(np.float32), rtol=tolerance, atol=0.1 * tolerance * scale
    )


FORMS = [
    Levels(128, (40,), scheme="int8", scales="float32"),
    Levels(256, (33,), scheme="int8", group=64, own=True, scales="float32", residual=True, bias=True),
    Levels(256, (40,), scheme="int4", group=128, zeros=True, scales="float32"),
    Levels(
        1152, (20,), scheme="int4", group=128, zeros=True, own=True, gated=True, activation="silu", scales="float32"
    ),
    Levels(256, (24,), scheme="int8", zeros=True, scales="float32"),
    Levels(128, (40,), scheme="int6", group=64, scales="float32", activation="relu"),
    Levels(256, (40,), scheme="int3", group=256, scales="float32"),
    Levels(128, (40,), scheme="fp8", levels="fp8", scales="float32"),
    Levels(256, (40,), scheme="fp8", levels="fp8", group=128, own=True, scales="float32"),
]


@pytest.mark.parametrize("layer", FORMS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("m", [1, 11, 20])
def test_few_rows(layer: Levels, m: int, launch: Launch) -> None:
    check(layer, m, launch)


@pytest.mark.parametrize("layer", FORMS, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("late", "order"), [(True, 1), (False, -1)])
def test_many_rows(layer: Levels, late: bool, order: int, launch: Launch) -> None:
    check(layer, 70, launch, products.SMALL, late=late, order=order)


@pytest.mark.parametrize(
    "layer",
    [
        Levels(384, (140,), scheme="int8", scales="float32"),
        Levels(256, (264,), scheme="int8", zeros=True, scales="float32", residual=True, bias=True),
        Levels(128, (133,), scheme="int6", scales="float32", gated=True, activation="silu"),
        Levels(256, (130,), scheme="fp8", levels="fp8", scales="float32"),
    ],
    ids=lambda layer: layer.name,
)
@pytest.mark.parametrize("wide", [False, True])
@RACES
def test_many_rows_on_hopper(layer: Levels, wide: bool, late: bool, order: int, launch: Launch, mapped: Map) -> None:
    check_on_hopper(layer, wide, 150, launch, mapped, late=late, order=order)


LONG = Levels(4096, (8,), "float16", scheme="fp8", levels="fp8", scales="float32")


@pytest.mark.parametrize("many", [None, products.SMALL])
def test_sums_of_fp8_lose_nothing(many: products.Tile | None, launch: Launch) -> None:
    """Tensor cores add them with few bits."""
    check(LONG, 4, launch, many, tolerance=2e-3, one_sign=True)


def test_sums_of_fp8_lose_nothing_on_hopper(launch: Launch, mapped: Map) -> None:
    check_on_hopper(LONG, False, 4, launch, mapped, tolerance=2e-3, one_sign=True)
    with pytest.raises(TargetError, match="no registers for sums of 128 by 256"):
        levels.many_hopper(LONG, hopper.WIDE, HOPPER)


def check_on_hopper(
    layer: Levels, wide: bool, m: int, launch: Launch, mapped: Map, tolerance: float = 1e-2, one_sign: bool = False, **how: Any
) -> None:  # fmt: skip
    tile = hopper.tiles_of(layer)[wide]
    (x, packed, *given), want = case(layer, m, one_sign=one_sign)
    y = drawn(9, m + 1, layer.outputs[0], dtype=layer.dtype)
    guard = y[-1].copy()
    w = packed.reshape(-1, layer.k)
    maps = [
        mapped(x, hopper.map_of_x(layer, tile, ("step", 0), m)),
        mapped(w, hopper.map_of_w(layer, tile, ("step", 1), len(w))),
    ]
    launch(levels.many_hopper(layer, tile, HOPPER), (2,), *maps, *given, y, m, x, **how)
    close(y[:m], want, tolerance)
    np.testing.assert_array_equal(y[-1], guard)


@pytest.mark.parametrize("missing", ["copies_done", "barrier"])
def test_what_is_missing_shows(missing: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, missing, lambda self, *_: None)
    with pytest.raises((AssertionError, RuntimeError)):
        check(Levels(512, (64,), scheme="int8", scales="float32"), 64, launch, products.SMALL)


@pytest.mark.parametrize(
    ("k", "scheme", "group", "own"),
    [(64, "int8", 0, False), (260, "int8", 128, True), (384, "int4", 128, False), (192, "fp8", 0, False), (100, "fp8", 64, True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("static", [False, True])
def test_records(k: int, scheme: str, group: int, own: bool, dtype: str, static: bool, launch: Launch) -> None:
    """Byte by byte what the op means; rows that are no numbers decode to none."""
    if static and own:
        return
    x = np.random.default_rng(k).standard_normal((7, k)).astype(np.float32) * 10
    x[2], x[3, 5], x[4, 6], x[5, -1] = 0, np.nan, np.inf, -np.inf
    x = x.astype(numpy_dtype(dtype))
    scale = np.array(0.05, np.float32) if static else None
    got = np.full((8, records.record_bytes(k, group, own)), 77, np.uint8)
    kernel = tailed(Tail(None, Encoding(k, dtype, scheme, group, own, static)), ADA)
    launch(kernel, (7,), x, *([] if scale is None else [scale]), got)
    want = records.encode(x.astype(np.float32), SCHEMES[scheme], group, own, scale)
    assert (got[7] == 77).all()
    with np.errstate(invalid="ignore"):
        values, wanted = (records.decode(r, k, group, own, SCHEMES[scheme]) for r in (got[:7], want))
    np.testing.assert_array_equal(values, wanted)
    sound = [0, 1, 2, 6]  # what rows hold that decode to NaN is nobody's business
    np.testing.assert_array_equal(got[sound], want[sound])


@pytest.mark.parametrize(
    ("layer", "how"),
    [
        (Levels(256, (192,), scheme="int8", scales="float32"), Encoding(192, "bfloat16", "int8", 0, False)),
        (Levels(256, (192,), scheme="int4", group=128, own=True, scales="float32"), Encoding(192, "bfloat16", "int8", 64, True)),
        (Levels(128, (256,), scheme="int8", gated=True, activation="silu", scales="float32"), Encoding(256, "bfloat16", "int8", 128, False)),
        (Levels(128, (64,), scheme="fp8", levels="fp8", scales="float32"), Encoding(64, "bfloat16", "fp8", 0, False)),
    ],
    ids=lambda value: str(value.scheme),
)  # fmt: skip
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_a_row_and_its_levels(layer: Levels, how: Encoding, normed: bool, order: int, launch: Launch) -> None:
    """Whichever block is done last writes the record of the results, or of their norm: to the byte what kernels one after the other do."""
    arrays, _ = case(layer, 1)
    n = layer.outputs[0]
    tail = Tail(Norm(n, "bfloat16", 1e-5, True, True, False) if normed else None, how)
    gain = [drawn(7, n)] if normed else []
    results = [
        (drawn(i, 1, n), drawn(i, 1, n), np.full((2, records.record_bytes(n, how.group, how.own)), 77, np.uint8))
        for i in (8, 9)
    ]
    (y, norm, record), (other, other_norm, other_record) = results
    grid, counter = (layer.tiles(thin.OUTPUTS), 1), np.zeros(1, np.int32)
    made = ([norm] if normed else []), ([other_norm] if normed else [])
    launch(levels.few(layer, 8, ADA, tail), grid, *arrays, y, 1, *gain, *made[0], record, counter, order=order)
    assert not counter.any()
    launch(levels.few(layer, 8, ADA), grid, *arrays, other, 1, order=order)
    launch(tailed(tail, ADA), (1,), other, *gain, *made[1], other_record)
    np.testing.assert_array_equal(y, other)
    if normed:  # sums have an order for each number of threads
        np.testing.assert_allclose(norm.astype(np.float32), other_norm.astype(np.float32), rtol=1e-2, atol=1e-2)
    want = records.encode((norm if normed else y).astype(np.float32), SCHEMES[how.scheme], how.group, how.own)
    np.testing.assert_array_equal(record[:1], want)
    assert (record[1] == 77).all()


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a"])
def test_ptx_has_the_instructions(mcpu: str) -> None:
    target = attrs.evolve(REAL, mcpu=mcpu)
    made = {
        "bytes": levels.many(Levels(4096, (4096,), scheme="int8"), products.LARGE, target),
        "few bytes": levels.few(Levels(4096, (4096,), scheme="int8"), 8, target),
        "codes": levels.many(Levels(4096, (4096,), scheme="int4", group=128, zeros=True), products.LARGE, target),
        "few codes": levels.few(Levels(4096, (4096,), scheme="int4", group=128, zeros=True), 8, target),
        "gated": levels.many(Levels(4096, (14336,), scheme="int4", group=128, zeros=True, gated=True), products.LARGE, target),
        "few bytes, a norm and records": levels.few(
            Levels(4096, (4096,), scheme="int8"), 8, target,
            Tail(Norm(4096, "bfloat16", 1e-5, True, True, False), Encoding(4096, "bfloat16", "int8", 0, False)),
        ),
        "few bytes and records": levels.few(
            Levels(4096, (14336,), scheme="int8", gated=True), 8, target, Tail(None, Encoding(14336, "bfloat16", "int8", 0, False))
        ),
        "few codes and records": levels.few(
            Levels(4096, (14336,), scheme="int4", group=128, own=True, gated=True), 8, target, Tail(None, Encoding(14336, "bfloat16", "int8", 128, True))
        ),
        "records": tailed(Tail(None, Encoding(4096, "bfloat16", "int8", 128, False, False)), target),
    }  # fmt: skip
    if mcpu != "sm_80":
        fp8 = Levels(4096, (4096,), scheme="fp8", levels="fp8")
        made |= {"floats": levels.many(fp8, products.LARGE, target), "few floats": levels.few(fp8, 8, target)}
        byte = attrs.evolve(fp8, scheme="int8", levels="int8")
        made |= {
            "hopper": levels.many_hopper(byte, hopper.WIDE, target),
            "hopper floats": levels.many_hopper(fp8, hopper.NARROW, target),
        }
        made["records of floats"] = tailed(Tail(None, Encoding(4096, "bfloat16", "fp8", 0, False, False)), target)
    else:
        with pytest.raises(TargetError, match="sm_80 multiplies no fp8"):
            levels.few(Levels(4096, (4096,), scheme="fp8", levels="fp8"), 8, target)
        # LLVM has no such conversion, and would end the process.
        with pytest.raises(TargetError, match="sm_80 makes levels of fp8"):
            tailed(Tail(None, Encoding(4096, "bfloat16", "fp8", 0, False)), target)
    text = ptx.to_ptx(list(made.values()), target)
    for kind, kernel in made.items():
        body = text.partition(f".entry {ptx.entry_name(kernel)}(")[2].partition("\n}")[0]
        if "hopper" in kind:
            form = "n128k32.f32.e4m3.e4m3" if "floats" in kind else "n256k32.s32.s8.u8"
            assert f"wgmma.mma_async.sync.aligned.m64{form}" in body and "cp.async.bulk.tensor" in body, kind
        elif "records" not in kind:
            form = "f32.e4m3.e4m3.f32" if "floats" in kind else "s32.s8.s8.s32"
            assert f"mma.sync.aligned.m16n8k32.row.col.{form}" in body and "cp.async.cg.shared.global" in body, kind
        assert not re.search(r"\.local\b|call\.uni", body), kind
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, target)
    assert usage and all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    # Two blocks, whose copies under way hide the memory's latency, share a multiprocessor even where the last one makes a record.
    most = {kind: 128 if "records" in kind else 64 for kind in made if kind.startswith("few")}
    assert all(usage[ptx.entry_name(made[kind])].registers <= count for kind, count in most.items()), usage
    assert all(k.shared_bytes <= 227 << 10 for k in made.values())


@pytest.mark.parametrize(("scheme", "group", "symmetric"), [("int8", 0, True), ("int4", 128, False), ("fp8", 0, True)])
@pytest.mark.parametrize(("dtype", "mcpu"), [("bfloat16", "sm_90"), ("bfloat16", "sm_90a"), ("float32", "sm_90")])
def test_layers_of_rounded_inputs(
    scheme: str, group: int, symmetric: bool, dtype: str, mcpu: str, emulated_gpu: Target, tmp_path: Path
) -> None:
    """From the graph to the GPU: records once, projections in one launch, epilogues, few rows and many."""
    target, rng, k = attrs.evolve(emulated_gpu, cores=1, mcpu=mcpu), np.random.default_rng(0), 256
    graphs = {}
    activations = "fp8" if scheme == "fp8" else "int8"
    for own in (False, True) if group else (False,):
        held: dict[str, Storage] = {}
        x = placeholder("x", TensorType((symbol("m"), k), dtype))
        read = ops.fake_quantize(x, scheme=activations, group=group if own else 0)
        w, v, u = (coded(c, SCHEMES[scheme], (70, k), group, symmetric, dtype, held) for c in "wvu")
        held["b"] = ArrayStorage(rng.standard_normal(70).astype(numpy_dtype(dtype)))
        bias = weight("b", TensorType((70,), dtype))
        outputs = (
            ops.linear(read, w), ops.linear(read, v), ops.linear(read, u, bias, ops.linear(read, v), activation="relu"),
            ops.gated_linear(read, w, v, activation="silu"),
        )  # fmt: skip
        graphs[f"own_{own}"] = Graph((x,), outputs, held)
    room = facts.of(target)
    panel, pair = room.packing(target)
    layout = layout_passes(panel, pair, levels=room.levels(target))
    laid_out = {name: Pipeline(layout).run(graph)[0] for name, graph in graphs.items()}
    for graph in laid_out.values():
        assert graph.count(ops.encode_levels) == 1 and not graph.count(ops.quantized_linear, ops.fake_quantize)
        assert graph.count(ops.levels_linear) == 2 and graph.count(ops.levels_projections) == 1
    layers = [k for k in lower(laid_out, target).kernels if "levels_" in k.op]
    assert layers and not any("generic" in k.choices for k in layers), layers
    run = run_all(laid_out, target, tmp_path)
    # Tensor cores keep 13 bits of the sums of 32 products of fp8.
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-4 if scheme == "fp8" else 2e-5
    for name, graph in laid_out.items():
        weights = {n: s.numpy() for n, s in stored(graph).items()}
        for m in (1, 12, 40, 130):
            array = rng.standard_normal((m, k)).astype(numpy_dtype(dtype))
            for got, want in zip(run.call(name, [array], weights), interpret(graphs[name], [array]), strict=True):
                assert relative_error(np.asarray(got), want) < tolerance, (name, m)


def test_rounded_inputs_that_tensor_cores_do_not_take() -> None:
    """What has no kernel is multiplied as the numbers that it stands for."""
    kinds = [SCHEMES[name] for name in ("int8", "int4", "fp8", "mxfp4")]
    rules = {mcpu: facts.of(REAL).levels(attrs.evolve(REAL, mcpu=mcpu)) for mcpu in ("sm_80", "sm_90a")}
    byte, half, small, tiny = kinds
    for rule in rules.values():
        assert rule(byte, byte, 4096, 0) and rule(byte, half, 4096, 128) and rule(half, byte, 4096, 64)
        assert not rule(byte, half, 4096, 64) and not rule(byte, byte, 4080, 0) and not rule(byte, tiny, 4096, 32)
        assert not rule(byte, small, 4096, 0) and not rule(small, byte, 4096, 0)
    assert rules["sm_90a"](small, small, 4096, 0) and not rules["sm_80"](small, small, 4096, 0)
