"""NKI source for AWS Trainium: its syntax, its calls, and the addresses that it names. Nothing here executes it."""

from __future__ import annotations

import ast

import pytest

from jisu.compiler.errors import CompileError
from jisu.targets.tpu.trainium import NOTE, nki_source


def calls(tree: ast.AST) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_product_is_python_with_the_machines_instructions(dtype: str) -> None:
    text = nki_source(256, 1024, 512, dtype)
    assert text.startswith(NOTE) and "never executed" in NOTE
    called = calls(ast.parse(text))
    assert called.count("nisa.nc_matmul") == 1 and called.count("nl.load") == 2 and called.count("nl.store") == 1
    loops = [called.count("nl.sequential_range"), called.count("nl.ndarray")]
    assert loops == [3, 4]  # rows, columns and inner axis; x, w, y and sums
    name = {"bfloat16": "nl.bfloat16", "float16": "np.float16", "float32": "np.float32"}[dtype]
    assert f"dtype={name}" in text and ("np.float16" in text) == (dtype == "float16")


def test_narrow_products() -> None:
    """One tile in each axis: no loops are left."""
    tree = ast.parse(nki_source(128, 128, 128, "float32"))
    assert "nl.sequential_range" not in calls(tree) and "nisa.nc_matmul" in calls(tree)


def test_what_is_refused() -> None:
    with pytest.raises(CompileError, match="k = 100 isn't made of whole tiles of 128"):
        nki_source(128, 128, 100)
    with pytest.raises(CompileError, match="not for int8"):
        nki_source(128, 128, 128, "int8")
