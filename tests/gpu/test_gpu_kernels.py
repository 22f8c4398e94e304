"""What tests say of kernels that an emulation runs, on a real GPU: every kernel, over the same shapes.

python -m pytest tests/gpu
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import pytest
import test_cuda
import test_cuda_levels
import test_cuda_single
import test_cuda_sparse
import test_hopper
from test_cuda import (  # noqa: F401
    Launch,
    test_a_row_and_its_norm,
    test_a_token_of_many,
    test_attention_of_a_token,
    test_attention_of_a_token_and_its_levels,
    test_attention_of_many_tokens,
    test_attention_reads_e4m3_by_instructions,
    test_few_rows,
    test_groups_of_experts,
    test_heads,
    test_many_rows,
    test_many_rows_of_codes,
    test_norms,
    test_powers_of_e,
    test_records,
    test_tokens_are_drawn_as_their_meaning_says,
)
from test_cuda_levels import (  # noqa: F401
    test_a_row_and_its_levels,  # noqa: F401
    test_sums_of_fp8_lose_nothing,
    test_sums_of_fp8_lose_nothing_on_hopper,
)
from test_cuda_levels import test_few_rows as test_few_rows_of_levels  # noqa: F401
from test_cuda_levels import test_many_rows as test_many_rows_of_levels  # noqa: F401
from test_cuda_levels import test_many_rows_on_hopper as test_many_rows_of_levels_on_hopper  # noqa: F401
from test_cuda_levels import test_records as test_records_of_levels  # noqa: F401
from test_cuda_single import test_attention_of_a_token as test_float32_attention_of_a_token  # noqa: F401
from test_cuda_single import test_attention_of_many_tokens as test_float32_attention_of_many_tokens  # noqa: F401
from test_cuda_single import test_codes_become_float32, test_layers_of_codes  # noqa: F401
from test_cuda_single import test_layers as test_layers_in_float32  # noqa: F401
from test_cuda_sparse import test_few_rows as test_few_rows_of_halves  # noqa: F401
from test_cuda_sparse import test_many_rows as test_many_rows_of_halves  # noqa: F401
from test_hopper import test_codes, test_experts, test_layers, test_tiles  # noqa: F401

from jisu.compiler.entry import Entry
from jisu.compiler.launches import CUBIN, PLANS, PTX, Plan, TensorMap, Variant
from jisu.compiler.launches import Launch as OfPlan
from jisu.compiler.types import TensorType, dtype_name
from jisu.runtime.cuda import DeviceExecutable
from jisu.targets.cuda import emulated, ptx
from jisu.targets.cuda.device import MAP, DeviceKernel
from jisu.targets.target import Target, capability
from jisu.targets.worker import find_linker

MODULES: tuple[ModuleType, ...] = (test_cuda, test_cuda_levels, test_cuda_single, test_cuda_sparse, test_hopper)


@pytest.fixture(scope="session")
def here(present: Target) -> Target:
    """This machine's GPU, without what only one architecture has."""
    return attrs.evolve(present, mcpu=present.mcpu.rstrip("a"))


@pytest.fixture(autouse=True)
def for_this_gpu(here: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests make kernels for the GPU instead of the emulation."""
    for module in MODULES:
        for name in ("GPU", "ADA", "EARLY", "HOPPER"):
            if hasattr(module, name):
                own = attrs.evolve(here, mcpu="sm_90a") if name == "HOPPER" else here
                monkeypatch.setattr(module, name, own)


@attrs.frozen(eq=False)
class Mapped:
    """A matrix of which a kernel takes a tensor map."""

    matrix: np.ndarray
    how: TensorMap


@pytest.fixture
def mapped() -> Callable[[np.ndarray, TensorMap], Mapped]:
    """In place of the emulated driver's: a plan makes the map."""
    return Mapped


def code_of(kernel: DeviceKernel, target: Target, plan: Plan, folder: Path) -> dict[str, bytes]:
    """The kernel and the plan as a program has them."""
    plans = {"capability": capability(target.mcpu), "faults": [], "entries": {"run": plan.to_json()}}
    if emulated.is_emulated(target):
        library = folder / f"{kernel.name}.so"
        emulated.to_library([kernel], target, {}, library, find_linker())
        return {PLANS: json.dumps(plans).encode(), CUBIN: library.read_bytes()}
    text = ptx.to_ptx([kernel], target)
    cubin = ptx.assembled(text, target)
    return {PLANS: json.dumps(plans).encode(), **({PTX: text.encode()} if cubin is None else {CUBIN: cubin})}


@pytest.fixture
def launch(here: Target, tmp_path: Path) -> Launch:
    """launch(kernel, grid, *arrays, maps and numbers): runs it on the GPU, writing into the arrays, as a plan of a program does."""

    def run(kernel: DeviceKernel, grid: tuple[int, ...], *given: Any, late: bool = True, order: int = 1) -> None:
        target = here if kernel.portable else attrs.evolve(here, mcpu="sm_90a")
        if not kernel.portable and capability(here.mcpu) != (9, 0):
            pytest.skip(f"a kernel for sm_90a, and this GPU is {here.mcpu}")
        matrices = [g.matrix if isinstance(g, Mapped) else g for g in given]
        arrays = list({id(m): m for m in matrices if isinstance(m, np.ndarray)}.values())
        places = {id(array): number for number, array in enumerate(arrays)}
        arguments = tuple(
            attrs.evolve(g.how, tensor=("input", places[id(m)])) if isinstance(g, Mapped)
            else ("input", places[id(m)]) if isinstance(m, np.ndarray) else int(m)
            for g, m in zip(given, matrices, strict=True)
        )  # fmt: skip
        assert [k == MAP for k in kernel.parameters] == [isinstance(g, Mapped) for g in given]
        x, y, z, *_ = (*grid, 1, 1)
        one = OfPlan(ptx.entry_name(kernel), (x, y, z), kernel.threads, kernel.shared_bytes, arguments)
        plan = Plan((), ((Variant((), (one,)),),))
        types = tuple(TensorType(array.shape, dtype_name(array.dtype)) for array in arrays)
        entry = Entry(tuple((f"a{i}", t) for i, t in enumerate(types)), (), types, tuple(range(len(types))), ())
        results = DeviceExecutable(code_of(kernel, target, plan, tmp_path), {"run": entry}).call("run", arrays)
        for array, result in zip(arrays, results, strict=True):
            array[...] = result

    return run
