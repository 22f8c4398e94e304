"""Graphs as modules of PyTorch: ops mean the same there, gradients are right, trained values come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jisu.compiler.graph import Op
from jisu.compiler.interpret import interpret
from jisu.frontends.to_torch import MEANINGS, array_of, to_torch
from jisu.testing import arrays_for, graph_of, op_calls

every_op = pytest.mark.parametrize("op", sorted(MEANINGS, key=lambda op: op.name), ids=lambda op: op.name)


@every_op
@settings(max_examples=25)
@given(st.data())
def test_ops_mean_the_same(op: Op, data: st.DataObject) -> None:

    node = data.draw(op_calls(op))
    graph = graph_of(node)
    sample = data.draw(arrays_for(graph, values=data.draw(st.sampled_from(["digits", "normal"]))))
    graph = sample.fill(graph)
    want = interpret(graph, sample.inputs)
    module = to_torch(graph)
    found = module(
        *(
            torch.from_numpy(np.array(a))
            if a.dtype.name != "bfloat16"
            else torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
            for a in sample.inputs
        )
    )
    for a, b in zip(want, found, strict=True):
        got = array_of(b)
        assert got.dtype == a.dtype and got.shape == a.shape
        tolerance = {2: 2e-2, 4: 2e-5, 8: 1e-9}[max(a.dtype.itemsize, 2)] if a.dtype.kind not in "biu" else 0
        np.testing.assert_allclose(got.astype(np.float64), a.astype(np.float64), rtol=tolerance, atol=tolerance)
