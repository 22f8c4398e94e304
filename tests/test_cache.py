"""The KV cache in few bits: rows as records, their kernels, the derived step, and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jisu.compiler import ops, rows
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.interpret import interpret
from jisu.compiler.types import TensorType, TypeRuleError, numpy_dtype, symbol
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

SCHEMES = tuple(rows.ROW_BITS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


# --- Records -------------------------------------------------------------------------------------------------------------


@every_scheme
@settings(max_examples=100, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 16), elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
    exponent=st.integers(-30, 30),
)
def test_a_row_comes_back_within_half_a_step(scheme: str, x: np.ndarray, exponent: int) -> None:
    x = np.ldexp(x, exponent)
    records = rows.encode(x, scheme)
    assert records.dtype == np.uint8 and records.shape == (3, rows.record_bytes(scheme, 16))
    assert rows.row_length(scheme, records.shape[-1]) == 16
    top = 2 ** rows.ROW_BITS[scheme] - 1
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    # Scale and offset are rounded outwards: each by at most 3/2 of 1/256 of itself.
    step = (high - low + np.abs(low) / 128) * (1 + 1 / 128) / top
    assert (np.abs(rows.decode(records, scheme) - x) <= step / 2 * 1.001 + 1e-36).all()
    for i in range(len(x)):
        np.testing.assert_array_equal(rows.encode(x[i], scheme), records[i])


def test_special_rows() -> None:
    for scheme in SCHEMES:
        x = np.zeros((4, 6), np.float32)
        x[1, 2], x[2, 3], x[3] = np.nan, np.inf, 2.5
        back = rows.decode(rows.encode(x, scheme), scheme)
        assert not back[0].any() and not np.isfinite(back[1:3]).any()
        np.testing.assert_allclose(back[3], 2.5, rtol=1e-2 / 2 ** rows.ROW_BITS[scheme])


def test_feedback_moves_errors_where_they_do_not_count() -> None:
    """Errors measured by a quadratic form that knows few directions are far below those of the nearest codes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2, 8)).astype(np.float32)
    root = rng.standard_normal((2, 8, 8)) * np.logspace(0, -1, 8)[:, None]
    form = root.swapaxes(1, 2) @ root + 0.02 * np.eye(8)
    upper = np.linalg.cholesky(form[:, ::-1, ::-1])[:, ::-1, ::-1]
    feedback = (upper / np.diagonal(upper, axis1=1, axis2=2)[:, None]).astype(np.float32)
    plain, fed = (rows.decode(rows.encode(x, "int4", f), "int4") - x for f in (None, feedback))
    lost = [np.einsum("ngi,gij,ngj->n", e, form, e).mean() for e in (plain, fed)]
    assert lost[1] < 0.6 * lost[0]


def test_rows_that_have_no_record() -> None:
    for scheme, k, words in (("int4", 7, "ends inside a byte"), ("int5", 8, "unknown scheme of rows 'int5'")):
        with pytest.raises(TypeRuleError, match=words):
            ops.encode_rows(placeholder("x", TensorType((2, k), "float32")), scheme=scheme)


# --- Kernels -------------------------------------------------------------------------------------------------------------


def test_kernels_make_the_records_of_the_interpreter(tmp_path: Path) -> None:
    entries: dict[str, Graph] = {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        x = placeholder("x", TensorType((symbol("m"), 2, 20), dtype))
        f = placeholder("f", TensorType((2, 20, 20), "float32"))
        made = [ops.encode_rows(x, y, scheme=s) for s in SCHEMES for y in (None, f)]
        back = [ops.decode_rows(r, scheme=r.scheme, dtype=dtype) for r in made]
        entries[dtype] = Graph((x, f), (*made, *back))
    info = compile_graphs(entries, Target.resolve("cpu"), out=tmp_path)
    run = Executable.load(info.library, num_threads=2)
    rng = np.random.default_rng(0)
    for dtype, graph in entries.items():
        for m in (1, 6, 300):
            values = rng.standard_normal((m, 2, 20)) * 10.0 ** rng.integers(-3, 3, (m, 1, 1))
            values[0] = np.rint(values[0])
            if m > 1:
                values[1], values[2, 0, 3], values[3, 1, 4] = 0, np.nan, np.inf
            given = [values.astype(numpy_dtype(dtype)), rng.standard_normal((2, 20, 20)).astype(np.float32) / 4]
            for got, want in zip(run.call(dtype, given), interpret(graph, given), strict=True):
                if want.dtype == np.uint8:
                    # A processor may round a product and a sum at once, and a number between two codes go to the other.
                    finite = np.isfinite(values).all(-1)
                    assert (np.asarray(got)[finite] != want[finite]).mean() < 1e-3
                else:
                    assert (np.isnan(got) == np.isnan(want)).all()
