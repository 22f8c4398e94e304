"""How programs call NVIDIA's driver: as cuda.h says, and what they say where it refuses."""

from __future__ import annotations

import ast
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import sanitized
from test_cuda_models import llama

import jisu
from jisu.compiler import gpu, ops
from jisu.compiler.entry import stored
from jisu.compiler.errors import InputError, JisuError, TargetError, TensorMemoryError
from jisu.compiler.gpu import DRIVER, Driver
from jisu.compiler.graph import ArrayStorage, Graph, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.launches import CUBIN, OWN_PTX, PLANS, PTX, Plan, TensorMap
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.passes import layout_passes
from jisu.runtime import cuda, cuda_launches, cuda_memory
from jisu.runtime.cuda import DeviceExecutable
from jisu.runtime.cuda_launches import Attribute, Config
from jisu.runtime.program import _as_array
from jisu.targets import facts
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

# Parameters as Itanium's ABI for C++ names their types, but p for all pointers and handles; enumerations are int.
PROTOTYPES = {
    "cuInit": "j", "cuDriverGetVersion": "p", "cuGetErrorString": "ip",
    "cuDeviceGet": "pi", "cuDeviceGetName": "pii", "cuDeviceGetAttribute": "pii",
    "cuDevicePrimaryCtxRetain": "pi", "cuCtxPushCurrent_v2": "p", "cuCtxPopCurrent_v2": "p", "cuCtxSynchronize": "",
    "cuModuleLoadDataEx": "ppjpp", "cuModuleUnload": "p", "cuModuleGetFunction": "ppp", "cuFuncSetAttribute": "pii",
    "cuMemAlloc_v2": "pm", "cuMemFree_v2": "y", "cuMemHostAlloc": "pmj", "cuMemFreeHost": "p",
    "cuMemcpyHtoDAsync_v2": "ypmp", "cuMemcpyDtoHAsync_v2": "pymp", "cuMemcpyDtoDAsync_v2": "yymp", "cuMemsetD8Async": "yhmp",
    "cuStreamCreate": "pj", "cuStreamDestroy_v2": "p", "cuStreamSynchronize": "p",
    "cuStreamBeginCapture_v2": "pi", "cuStreamEndCapture": "pp", "cuGraphInstantiateWithFlags": "ppy", "cuGraphDestroy": "p",
    "cuGraphExecDestroy": "p", "cuGraphLaunch": "pp",
    "cuStreamWaitEvent": "ppj", "cuEventCreate": "pj", "cuEventRecord": "pp", "cuEventSynchronize": "p", "cuEventDestroy_v2": "p",
    "cuLaunchKernel": "pjjjjjjjppp", "cuLaunchKernelEx": "pppp", "cuTensorMapEncodeTiled": "pijpppppiiii",
}  # fmt: skip

_REFERENCE: Any = ctypes.byref(ctypes.c_int())
# Which of ctypes' types pass which of C's: a Python int is an int, or an unsigned one.
PASSED: dict[str, Callable[[Any], bool]] = {
    "j": lambda x: isinstance(x, (ctypes.c_uint, int)) and (not isinstance(x, int) or 0 <= x < 2**31),
    "i": lambda x: isinstance(x, (ctypes.c_int, int)) and (not isinstance(x, int) or -(2**31) <= x < 2**31),
    "h": lambda x: isinstance(x, ctypes.c_ubyte),
    "m": lambda x: isinstance(x, ctypes.c_size_t),
    "y": lambda x: isinstance(x, (ctypes.c_void_p, ctypes.c_ulonglong)),
    "p": lambda x: x is None or isinstance(x, (bytes, ctypes.c_void_p, ctypes.Array)) or type(x) is type(_REFERENCE),
}


def run_of(graph: Graph, target: Target, folder: Path) -> DeviceExecutable:
    info = compile_graphs({"main": graph}, target, out=folder / "out", cache_dir=folder / "cache")
    return DeviceExecutable(info.code(), info.entries)


@pytest.fixture
def added(emulated_gpu: Target, tmp_path: Path) -> DeviceExecutable:
    """x + x of x [n, 8]."""
    x = placeholder("x", TensorType((symbol("n"), 8), "float32"))
    return run_of(Graph((x,), (ops.add(x, x),)), emulated_gpu, tmp_path)


@pytest.fixture
def refuse(emulated_driver: ctypes.CDLL) -> Iterator[Callable[[str, int], None]]:
    """refuse(function, code): its next call fails with the code."""
    yield lambda name, code: emulated_driver.emulated_refuse(name.encode(), code)
    emulated_driver.emulated_refuse(b"", 0)
    assert emulated_driver.cuDevicePrimaryCtxReset_v2(0) == 0


# --- As cuda.h has it -----------------------------------------------------------------------------------------------------


def header() -> Path | None:
    """A folder with CUDA's header, if this machine has it: the toolkit's, or that of pip's nvidia-cuda-runtime."""
    roots = [
        Path(p) for p in (os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")))) if p
    ]
    folders = [r / "include" for r in roots] + [f for p in sys.path for f in Path(p).glob("nvidia/*/include")]
    return next((f for f in folders if (f / "cuda.h").exists()), None)


def test_prototypes_and_structures_are_those_of_cuda_h(tmp_path: Path) -> None:
    """The names (with their versions), parameters, layouts and numbers that this project takes for the driver's."""
    folder = header()
    if folder is None:
        pytest.skip("this machine has no cuda.h")
    numbers = {
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 16, "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 75,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 76, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": 8,
        "CU_STREAM_CAPTURE_MODE_RELAXED": 2, "CU_STREAM_NON_BLOCKING": 1, "CU_EVENT_DISABLE_TIMING": 2, "CU_JIT_ERROR_LOG_BUFFER": 5,
        "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES": 6, "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": 6,
        "CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT": 1, "CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT": 2, "CU_LAUNCH_PARAM_END_AS_INT": 0,
        "CU_TENSOR_MAP_DATA_TYPE_UINT8": 0, "CU_TENSOR_MAP_DATA_TYPE_FLOAT16": 6, "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16": 9,
        "CU_TENSOR_MAP_INTERLEAVE_NONE": 0, "CU_TENSOR_MAP_SWIZZLE_32B": 1, "CU_TENSOR_MAP_SWIZZLE_64B": 2,
        "CU_TENSOR_MAP_SWIZZLE_128B": 3, "CU_TENSOR_MAP_L2_PROMOTION_L2_256B": 3, "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE": 0,
        "CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_ILLEGAL_ADDRESS": 700, "CUDA_ERROR_LAUNCH_FAILED": 719,
        "sizeof(CUtensorMap)": 128, "alignof(CUtensorMap) <= 128": 1, "sizeof(CUdeviceptr)": 8, "sizeof(CUresult)": 4,
        "sizeof(CUlaunchConfig)": ctypes.sizeof(Config), "sizeof(CUlaunchAttribute)": ctypes.sizeof(Attribute),
        "offsetof(CUlaunchConfig, sharedMemBytes)": Config.shared.offset, "offsetof(CUlaunchConfig, hStream)": Config.stream.offset,
        "offsetof(CUlaunchConfig, attrs)": Config.attributes.offset, "offsetof(CUlaunchConfig, numAttrs)": Config.count.offset,
        "offsetof(CUlaunchAttribute, value)": Attribute.value.offset,
        "offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed)": 0,
    }  # fmt: skip
    source = tmp_path / "header.cc"
    source.write_text(
        """#include <cstddef>
#include <cstdio>
#include <cuda.h>
#include <type_traits>
template <class T> char letter() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_enum<T>::value || std::is_same<T, int>::value) return 'i';
    if (std::is_same<T, unsigned>::value) return 'j';
    if (std::is_same<T, unsigned char>::value) return 'h';
    if (std::is_same<T, std::size_t>::value) return 'm';
    return std::is_same<T, unsigned long long>::value ? 'y' : '?';
}
template <class... T> void told(const char *name, CUresult(CUDAAPI *)(T...)) {
    char letters[] = {letter<T>()..., 0};
    std::printf("%s=%s\\n", name, letters);
}
int main() {
"""
        + "".join(f'    told("{name}", (decltype(&{name}))nullptr);\n' for name in PROTOTYPES)
        + "".join(f'    std::printf("%s=%lld\\n", "{n}", (long long)({n}));\n' for n in numbers)
        + "}\n"
    )
    command = ["c++", "-std=c++17", "-w", f"-I{folder}", "-o", str(tmp_path / "header"), str(source)]
    if subprocess.run(command, capture_output=True).returncode == 127:
        pytest.skip("this machine has no C++ compiler")
    said = subprocess.run([tmp_path / "header"], capture_output=True, text=True, check=True).stdout
    found = dict(line.rsplit("=", 1) for line in said.splitlines())
    assert found == {**PROTOTYPES, **{name: str(value) for name, value in numbers.items()}}


class Checked:
    """The driver's library, whose calls must pass what its prototypes say."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.called.add(name)
            assert len(args) == len(PROTOTYPES[name]), name
            for letter, value in zip(PROTOTYPES[name], args, strict=True):
                assert PASSED[letter](value), (name, letter, value)
            return getattr(self.library, name)(*args)

        return call


def test_prototypes_of_all_functions_are_known() -> None:
    sources = "".join(Path(str(m.__file__)).read_text() for m in (gpu, cuda, cuda_launches, cuda_memory))
    assert set(re.findall(r'"(cu[A-Z]\w+)"', sources)) <= set(PROTOTYPES)


def test_calls_pass_what_the_prototypes_say(
    emulated_gpu: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product by tensor maps, an early launch, graphs, results and weights; by type, since ctypes passes anything as anything."""
    rng = np.random.default_rng(0)
    x = placeholder("x", TensorType((symbol("m"), 64), "bfloat16"))
    held: dict[str, Storage] = {}
    for name, shape in (("w", (160, 64)), ("v", (64, 160))):
        held[name] = ArrayStorage(rng.standard_normal(shape).astype(numpy_dtype("bfloat16")))
    w, v = (weight(name, TensorType(held[name].shape, "bfloat16")) for name in ("w", "v"))
    target = attrs.evolve(emulated_gpu, mcpu="sm_90a", cores=1)
    plain = Graph((x,), (ops.linear(ops.linear(x, w), v),), held)
    graph = Pipeline(layout_passes(*facts.of(target).packing(target))).run(plain)[0]
    driver = Driver.open()
    checked = Checked(driver._library)
    monkeypatch.setattr(driver, "_library", checked)
    run = run_of(graph, target, tmp_path)
    weights = run.prepare("main", {n: s.numpy() for n, s in stored(graph).items()})
    assert not run.read(run.zeros((4,), "float32", "zeros")).any()
    given = rng.standard_normal((130, 64)).astype(numpy_dtype("bfloat16"))
    for _ in range(2):
        (got,) = run.call("main", [given], weights)
    assert relative_error(np.asarray(got), interpret(plain, [given])[0]) < 2e-2
    for how in ({}, {"copy": True}, {"dl_device": (1, 0)}):
        run.hold(given).__dlpack__(**how)
    del run
    gc.collect()
    once = {
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
    }
    seldom = {"cuGetErrorString", "cuLaunchKernel", "cuFuncSetAttribute"}
    assert checked.called >= set(PROTOTYPES) - once - seldom


PARAMETER = re.compile(r"\.param \.(?:align (\d+) \.b8|b64|u64) \w+(?:\[(\d+)\])?")


def test_arguments_lie_where_kernels_look_for_them() -> None:
    """A plan's arguments, one behind the other, are the parameters of the PTX, with their alignments; so are threads and shared memory."""
    program = jisu.compile(llama().bfloat16(), target="nvidia/h200", recipe="w4a16")
    code, used = program.parts.code, 0
    entries: dict[str, tuple[list[int], int, int]] = {}
    for name in (PTX, OWN_PTX):
        text = code.get(name, b"").decode()
        shared = re.findall(r"\.shared .*", text)
        assert all(line.startswith(".extern") or "[" in line for line in shared)
        for found in re.finditer(r"\.visible \.entry (\w+)\((.*?)\)\s*\.maxntid (\d+), 1, 1", text, re.S):
            offsets: list[int] = []
            end = 0
            for align, size in PARAMETER.findall(found[2]):
                begin = -(-end // int(align or 8)) * int(align or 8)
                offsets, end = [*offsets, begin], begin + int(size or 8)
            assert len(offsets) == found[2].count(".param")
            entries[found[1]] = offsets, end, int(found[3])
    for plan in json.loads(code[PLANS])["entries"].values():
        for launch in (one for step in Plan.from_json(plan).steps for variant in step for one in variant.launches):
            sizes = [128 if isinstance(a, TensorMap) else 8 for a in launch.arguments]
            begins = [sum(sizes[:i]) for i in range(len(sizes))]
            assert (begins, sum(sizes), launch.threads) == entries[launch.kernel], launch.kernel
            assert launch.shared <= 227 << 10
            used += any(isinstance(a, TensorMap) for a in launch.arguments)
    assert used


# --- What the driver refuses --------------------------------------------------------------------------------------------


def test_memory_that_there_is_not(added: DeviceExecutable, refuse: Callable[[str, int], None]) -> None:
    """The GPU's, and this machine's that can be pinned; afterwards all is as before."""
    x = np.ones((3, 8), np.float32)
    for function, said in (("cuMemAlloc_v2", "no .* GiB left for an input"), ("cuMemHostAlloc", "can be pinned")):
        refuse(function, 2)
        with pytest.raises(TensorMemoryError, match=said):
            added.call("main", [x])
        np.testing.assert_array_equal(added.call("main", [x])[0], x + x)
        x = np.ones((len(x) + 1, 8), np.float32)


def test_an_illegal_address_says_what_to_do(added: DeviceExecutable, refuse: Callable[[str, int], None]) -> None:
    """What a kernel does outside of its memory is found, and the GPU is of no use to the process from then on."""
    x = np.ones((3, 8), np.float32)
    plan = added._plans["main"]
    (step,) = plan.steps
    (launch,) = step[0].launches
    wrong = attrs.evolve(launch, arguments=(*launch.arguments[:-1], 1 << 16))
    added._plans["main"] = attrs.evolve(plan, steps=((attrs.evolve(step[0], launches=(wrong,)),),))
    for rows in (x, x, np.ones((5, 8), np.float32)):
        with pytest.raises(JisuError, match="error 700.*start another one.*compute-sanitizer"):
            added.call("main", [rows])


def test_a_kernel_that_cannot_be_had(added: DeviceExecutable, refuse: Callable[[str, int], None]) -> None:
    """Of which the driver says more than that the module lacks it."""
    refuse("cuModuleGetFunction", 2)
    with pytest.raises(TensorMemoryError):
        added.call("main", [np.ones((3, 8), np.float32)])


def test_kernels_that_the_driver_refuses(emulated_gpu: Target, tmp_path: Path) -> None:
    """Every form is tried, and what the driver's compiler says is told."""
    x = placeholder("x", TensorType((2, 8), "float32"))
    info = compile_graphs(
        {"main": Graph((x,), (ops.add(x, x),))}, emulated_gpu, out=tmp_path / "out", cache_dir=tmp_path
    )
    code = {**info.code(), CUBIN: b"\x7fELF" + bytes(200), PTX: b".version 9.9"}
    with pytest.raises(
        TargetError, match="kernels.cubin: .*; kernels.ptx: .*error 218: ptxas fatal.*update NVIDIA's driver"
    ):
        DeviceExecutable(code, info.entries)


def test_more_blocks_than_a_gpu_takes(added: DeviceExecutable) -> None:
    x = np.ones((3, 8), np.float32)
    plan = added._plans["main"]
    (step,) = plan.steps
    for grid in ((1, 1 << 16, 1), (1 << 31, 1, 1)):
        wrong = attrs.evolve(step[0].launches[0], grid=grid)
        added._plans["main"] = attrs.evolve(plan, steps=((attrs.evolve(step[0], launches=(wrong,)),),))
        with pytest.raises(InputError, match="blocks.*fewer rows"):
            added.call("main", [x])
    added._plans["main"] = plan
    assert added.call("main", [np.ones((0, 8), np.float32)])[0].shape == (0, 8)


def test_no_gpu_says_why(driver_library: Path, tmp_path: Path) -> None:
    code = "from jisu.compiler.gpu import Driver; Driver.open()"
    environment = {**os.environ, DRIVER: str(driver_library), "JISU_EMULATED_NO_DEVICE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.search(r"TargetError: NVIDIA's driver finds no GPU here \(cuInit: .+, error 100\)", done.stderr)


def test_a_forked_process_says_what_to_do(added: DeviceExecutable) -> None:
    x = np.ones((3, 8), np.float32)
    added.call("main", [x])
    read, write = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover
        said = []
        sys.unraisablehook = lambda how: said.append(str(how.exc_value))
        try:
            added.call("main", [x])
        except JisuError as error:
            said.append(str(error))
        finally:
            del added
            gc.collect()
            os.write(write, "\n".join(said).encode())
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1 << 16).decode().splitlines()
    os.close(read)
    os.close(write)
    assert len(said) == 1 and "forked" in said[0] and "spawn" in said[0], said
    np.testing.assert_array_equal(added.call("main", [x])[0], x + x)


def test_a_program_goes_when_its_work_is_done(added: DeviceExecutable, emulated_driver: ctypes.CDLL) -> None:
    """On streams that aren't its own, too: the emulated driver ends a process that unloads kernels that have yet to run."""
    held = added.hold(np.ones(4, np.float32))
    with Driver.open().current():
        assert emulated_driver.cuMemsetD8Async(ctypes.c_void_p(held.address), 0, ctypes.c_size_t(16), None) == 0
    del added
    gc.collect()


def test_arrays_of_other_devices() -> None:
    """What numpy can't take by DLPack is an error of the argument."""

    class Elsewhere:
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("Unsupported device in DLTensor.")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    with pytest.raises(InputError, match="input 'x'.*runs on the CPU.*a copy in this machine's memory"):
        _as_array(Elsewhere(), "x", TensorType((1,), "float32"))


# --- tests/gpu ------------------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).parent
ONLY_EMULATED = {
    "test_a_row_that_is_normed_too_early_shows", "test_what_is_missing_with_codes_shows", "test_what_is_missing_shows",
    "test_threads_that_part_are_found", "test_launches_that_begin_early", "test_parts_that_are_joined_wrongly_show",
    "test_places_of_the_other_pair_show", "test_what_is_wrong_shows", "test_what_is_wrong_with_gathered_rows_shows",
    "test_what_is_right_does_not", "test_steps_are_graphs", "test_tensors_of_torch_on_the_gpu", "test_no_doubles",
    "test_what_attention_lacks_shows", "test_shared_memory_that_nobody_asked_for", "test_tiles_that_threads_store",
    "test_tensors_of_torch_that_are_updated", "test_threads_that_commit_different_products",
    "test_a_launch_that_can_not_begin_leaves_nothing",
}  # fmt: skip
"""Tests of what the emulation finds, or its driver counts."""


def test_a_gpu_runs_all_tests_of_kernels_and_programs() -> None:
    """What takes the emulated GPU, tests/gpu takes over for a real one."""
    taken = {
        (node.module, alias.name)
        for path in (FOLDER / "gpu").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    modules = (
        "test_cuda",
        "test_cuda_chain",
        "test_cuda_functions",
        "test_cuda_levels",
        "test_cuda_models",
        "test_cuda_single",
        "test_cuda_sparse",
        "test_hopper",
    )
    wanted = {
        (module, test.name)
        for module in modules
        for test in ast.parse((FOLDER / f"{module}.py").read_text()).body
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_") and test.name not in ONLY_EMULATED
        if {a.arg for a in test.args.args} & {"launch", "emulated_gpu"}
    }
    assert wanted and wanted <= taken


@pytest.mark.parametrize(
    "chosen",
    ["test_powers_of_e or test_faults_are_told", pytest.param("test_norms or test_tiles", marks=pytest.mark.slow)],
)
def test_tests_of_the_gpu_are_rehearsed(chosen: str, driver_library: Path) -> None:
    """tests/gpu, a few of them, on the emulated driver: kernels alone, some with tensor maps, and a program."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        str(FOLDER / "gpu"),
        "-k",
        f"{chosen} or test_nothing_is_found",
    ]
    environment = {**os.environ, DRIVER: str(driver_library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0 and "not what emulates one" in done.stdout, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 1  # type: ignore[index]


@pytest.mark.slow
def test_what_the_sanitizer_watches(emulated_gpu: Target, driver_library: Path, tmp_path: Path) -> None:
    """The programs that tests/gpu gives to compute-sanitizer run, and nothing of the compiler with them."""
    sanitized.make(emulated_gpu, tmp_path)
    code = f"import pathlib, sanitized, sys; sanitized.run(pathlib.Path({str(tmp_path)!r})); assert 'tvm' not in sys.modules"
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, DRIVER: str(driver_library), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == list(sanitized.RECIPES), done.stderr[-2000:]
