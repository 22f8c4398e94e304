"""What tests of programs on the emulated GPU say, on a real one.

python -m pytest tests/gpu
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_chain import (  # noqa: F401
    log,
    on_cpu,
    on_gpu,
    test_a_cache_grows_under_way,
    test_a_step_reads_what_another_draws,
    test_a_token_is_one_launch_and_no_wait,
    test_calls_under_way,
    test_tokens_are_the_cpus,
    test_what_is_taken_back_of_a_ring,
    test_who_stops_in_the_middle_leaves_a_session_that_goes_on,
)
from test_cuda_levels import test_layers_of_rounded_inputs  # noqa: F401
from test_cuda_models import (  # noqa: F401
    test_a_program_is_saved_and_loaded,
    test_an_encoder,
    test_batches_padding_and_growing_caches,
    test_caches,
    test_compressed_decoders,
    test_decoders_equal_the_model,
    test_expert_linear,
    test_experts,
    test_faults_are_told,
    test_functions_of_a_machine_without_a_c_library,
    test_generate_token_for_token,
    test_gpt_oss,
    test_layers,
    test_mixtral,
    test_norms_of_some_of_the_rows,
)
from test_cuda_single import test_a_model as test_a_model_in_float32  # noqa: F401
from test_cuda_sparse import test_a_pruned_model  # noqa: F401
from test_cuda_sparse import test_layers as test_layers_of_halves  # noqa: F401

import jisu
from jisu.runtime.cuda_memory import DeviceArray
from jisu.targets.target import Target


@pytest.fixture(scope="session")
def emulated_gpu(present: Target) -> Target:
    """In place of the emulated one: this machine's."""
    return present


def test_tensors_of_torch_stay_on_the_gpu(emulated_gpu: Target) -> None:
    """What comes from the GPU goes there, on torch's stream, and equals what goes by way of this machine's memory."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU()).bfloat16()
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    program = jisu.compile(layer, target=emulated_gpu, example_inputs=(x,))
    with torch.cuda.stream(torch.cuda.Stream()):
        got = program(x.cuda())
        assert got.is_cuda
        np.testing.assert_array_equal(got.float().cpu().numpy(), program(x).float().numpy())


class Lender:
    """A library's array that isn't torch's, as far as anybody sees."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.asked = tensor, list[int]()

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self.tensor.__dlpack_device__()
        return int(kind), number

    def __dlpack__(self, *, stream: int, **how: Any) -> Any:
        self.asked.append(stream)
        return self.tensor.__dlpack__(stream=stream, **how)


@pytest.mark.parametrize("rows", [7, 1 << 17])
def test_tensors_are_lent(rows: int, emulated_gpu: Target) -> None:
    """By DLPack both ways, small and large (32 MiB), each library's stream waiting for the other's; torch's allocator brings addresses again."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    layer = torch.nn.Linear(64, 64, bias=False).eval()
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    program = jisu.compile(
        layer, target=emulated_gpu, example_inputs=(x[:7],), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    want = torch.from_numpy(np.asarray(program(x.numpy())))
    for turn in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            given = x.cuda()
            torch.cuda._sleep(10_000_000)  # its library is late
            lender = Lender(given * 2)
            result = program(lender)
            assert isinstance(result, DeviceArray) and len(lender.asked) == 1
            found = torch.from_dlpack(result)
            assert found.data_ptr() == result.address
            del result
            assert torch.equal(found.cpu(), want * 2)
            torch.cuda._sleep(10_000_000)
            straight = program(given + turn)
            np.testing.assert_allclose(straight.cpu(), layer(x + turn).detach(), rtol=1e-4, atol=1e-4)
