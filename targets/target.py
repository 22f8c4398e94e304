"""A target: a machine as data.

The cost model, the recipe search and the lowering read nothing else of a machine. This module imports no compiler: it
runs in the user's process, where `Target.resolve("cpu")` describes the machine that it runs on.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.types import numpy_dtype
from jisu.targets.schedule import Schedule
from jisu.targets.tpu.chip import chips, description

MACHINES = Path(__file__).with_name("machines")

# Linux's names of x86 features (in /proc/cpuinfo) against LLVM's, only those that a kernel or a level asks for.
_LLVM_FEATURE = {
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "ssse3": "ssse3",
    "pni": "sse3",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "avx": "avx",
    "avx2": "avx2",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "abm": "lzcnt",
    "movbe": "movbe",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_bf16": "avx512bf16",
    "avx512_vnni": "avx512vnni",
    "avx512_fp16": "avx512fp16",
    "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2",
    "avx_vnni": "avxvnni",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
}
_V2 = frozenset({"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# A processor's own name would promise features that a virtual machine may hide; a level promises only what we saw.
_LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2, "x86-64": frozenset[str]()}

_LOWERINGS = ("cpu", "cuda", "tpu")


@attrs.frozen
class Cache:
    """One cache level, as one core sees it: `bytes` it may use, read `bandwidth` in bytes/s, sharing cores."""

    bytes: int
    bandwidth: float
    shared_by: int = 1


def _pairs(peak: Mapping[str, float] | tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    items = peak.items() if isinstance(peak, Mapping) else peak
    return tuple(sorted((str(dtype), float(rate)) for dtype, rate in items))


def _features(names: Iterable[str]) -> frozenset[str]:
    return frozenset(names)


def _levels(caches: Iterable[Cache]) -> tuple[Cache, ...]:
    return tuple(caches)


@attrs.frozen
class Target:
    """A machine as data; hashable and comparable by value.

    `vector_bytes` and `vector_registers` describe the SIMD unit, `caches` run from the nearest level outwards,
    `memory_bandwidth` is bytes/s and `peak` FLOP/s per dtype (of the whole machine, 2 per multiply-add).
    `estimated` says that bandwidths and peaks were derived from clock and unit counts, not measured. `schedule` is how kernels cut
    their work where that doesn't follow from the sizes.
    """

    name: str
    kind: str
    triple: str
    mcpu: str
    features: frozenset[str] = attrs.field(converter=_features)
    vector_bytes: int = 16
    vector_registers: int = 16
    cores: int = 1
    caches: tuple[Cache, ...] = attrs.field(default=(), converter=_levels)
    memory_bytes: int = 0
    memory_bandwidth: float = 0.0
    peak: tuple[tuple[str, float], ...] = attrs.field(default=(), converter=_pairs)
    estimated: bool = True
    source: str = ""
    schedule: Schedule = Schedule()

    @classmethod
    def resolve(cls, target: str | Target) -> Target:
        """The target of that name that this build can compile for; a Target is returned as it is.

        Raises TargetError for an unknown name (with the known and the nearest one) and for a machine that has a
        description but no lowering yet.
        """
        if not isinstance(target, Target) and target == "cuda":
            return _present_gpu()
        found = target if isinstance(target, Target) else cls.describe(target)
        if found.kind not in _LOWERINGS:
            raise TargetError(
                f"this build has no {found.kind.upper()} lowering yet, so it can't compile for {found.name!r}; "
                "use target='cpu'"
            )
        if found.kind == "tpu" and found.triple != host().triple:
            here = host()  # which simulates it
            return attrs.evolve(found, triple=here.triple, mcpu=here.mcpu, features=here.features)
        return found

    @classmethod
    def describe(cls, name: str) -> Target:
        """The machine description of that name, also of machines that this build can't compile for (cost model).

        "cpu" is the machine this runs on, "cpu:generic", "cpu:x86-64-v3" and "cpu:x86-64-v4" are its architecture's
        plainer forms. Raises TargetError for an unknown name.
        """
        if not isinstance(name, str):
            raise TargetError(f"a target is a name or a Target, not {type(name).__name__}")
        known = known_targets()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"unknown target {name!r}; known: {', '.join(known)}{hint}")
        if name == "cpu":
            return host()
        if name in _plain_names():
            return _plainer(host(), name)
        if name in ("tpu", *chips()):
            return cls.from_json(description(name))
        return _load(MACHINES / (re.sub("[:/]", "-", _alias(name)) + ".json"))

    @property
    def required_features(self) -> frozenset[str]:
        """The processor features (LLVM's names) that code compiled for this target may use."""
        return self.features

    def check_host(self) -> list[str]:
        """What code for this target needs and this machine lacks, sorted; empty when it can run here.

        A foreign architecture counts as the one missing feature "architecture <name>".
        """
        if self.kind == "cuda":  # the driver says when the program is loaded
            return []
        here = host()  # a TPU's programs run here, simulated
        if self.architecture != here.architecture:
            return [f"architecture {self.architecture}"]
        return sorted(self.required_features - here.features)

    @property
    def architecture(self) -> str:
        """The first part of the triple: "x86_64", "aarch64", "nvptx64"…"""
        return self.triple.partition("-")[0]

    def fingerprint(self) -> str:
        """A short stable string of all that changes generated code: for cache keys (speeds and core count don't).

        Of the peaks it is which dtypes are faster than float32.
        """
        code = [self.kind, self.triple, self.mcpu, sorted(self.features), self.vector_bytes, self.vector_registers]
        code += [[c.bytes for c in self.caches], [d for d, rate in self.peak if rate > self.peak_flops("float32")]]
        code += [self.schedule.to_json(), self.cores if self.kind == "cuda" else 0]  # how many blocks are launched
        code += [self.name] if self.kind == "tpu" else []  # a chip's kernels follow from all of its numbers
        return f"{self.kind}-{hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]}"

    def has(self, *features: str) -> bool:
        """Whether the target has all of `features` (LLVM's names, such as "avx512bf16")."""
        return self.features.issuperset(features)

    def lanes(self, dtype: str = "float32") -> int:
        """How many elements of `dtype` ("float32", "bfloat16", "int8"…) one vector register holds."""
        return self.vector_bytes // numpy_dtype(dtype).itemsize

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of the whole machine in `dtype`; that of float32 where the description names none."""
        peak = dict(self.peak)
        return peak.get(dtype, peak.get("float32", 0.0))

    def cache_bytes(self, level: int, default: int) -> int:
        """Size of cache `level` (1 is the nearest), or `default` bytes where the description lacks it."""
        return self.caches[level - 1].bytes if 0 < level <= len(self.caches) else default

    def to_json(self) -> dict[str, Any]:
        """This description as plain data; `from_json` inverts it."""
        data = attrs.asdict(self)
        return {
            **data, "features": sorted(self.features), "peak": dict(self.peak), "schedule": self.schedule.to_json()
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Target:
        """The target that `to_json` (or a file in machines/) describes; raises TargetError for unknown fields."""
        known = {a.name for a in attrs.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise TargetError(
                f"target description has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        caches = tuple(Cache(**c) for c in data.get("caches", ()))
        return cls(**{**data, "caches": caches, "schedule": Schedule.from_json(data.get("schedule", {}))})


def known_targets() -> tuple[str, ...]:
    """All target names that `Target.describe` takes."""
    files = sorted(_name_of(p) for p in MACHINES.glob("*.json"))
    by_kind = {kind: [f for f in files if f.startswith(kind)] for kind in ("cpu", "cuda", "nvidia")}
    names = ("cpu", *_plain_names(), *by_kind["cpu"], "cuda", *by_kind["cuda"], *by_kind["nvidia"])
    return (*names, "tpu", *chips())


def _name_of(path: Path) -> str:
    """The name of the machine that a file describes: architectures behind a colon, products behind their maker's slash."""
    return path.stem.replace("-", "/" if path.stem.startswith("nvidia") else ":", 1)


def _plain_names() -> tuple[str, ...]:
    """Plainer forms of this machine's architecture."""
    levels = ("cpu:x86-64-v3", "cpu:x86-64-v4") if platform.machine() in ("x86_64", "AMD64") else ()
    return ("cpu:generic", *levels)


@functools.cache
def host() -> Target:
    """This machine: features from /proc/cpuinfo, caches from /sys, peaks estimated from clock and vector width."""
    machine = platform.machine() or "unknown"
    info = _cpuinfo()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hertz = _hertz(info)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if machine in ("x86_64", "AMD64"):
        flags = info.get("flags", "").split()
        features = frozenset(llvm for linux, llvm in _LLVM_FEATURE.items() if linux in flags)
        if "amx-tile" in features and not _may_use_tiles():
            features = frozenset(f for f in features if not f.startswith("amx"))
        mcpu = next(level for level, needs in _LEVELS.items() if features >= needs)
        triple, vector_bytes, registers = "x86_64-unknown-linux-gnu", *_x86_vector(features)
    else:
        features = frozenset({"neon"} if "asimd" in info.get("Features", "").split() else ())
        mcpu, triple, vector_bytes, registers = "generic", f"{machine}-unknown-linux-gnu", 16, 32 if features else 16
    # Zen 4 runs 64-byte vectors in two halves: one multiply-add of them per cycle; other server cores run two.
    halved = vector_bytes == 64 and info.get("vendor_id") == "AuthenticAMD" and info.get("cpu family") == "25"
    flops = 2.0 * (1 if halved else 2) * vector_bytes / 4 * hertz * cores
    # Intel's cores do bfloat16 dot products at half the rate of float32 multiply-adds, AMD's at twice; tiles do 16 times as many, or
    # 32 of int8.
    dots = 0.5 if info.get("vendor_id") == "GenuineIntel" else 2.0
    dots = 16.0 if "amx-bf16" in features else dots if "avx512bf16" in features else 1.0
    bytes_ = 32.0 if "amx-int8" in features else 4.0 if features & {"avx512vnni", "avxvnni"} else 1.0
    peak = {"float32": flops, "float64": flops / 2, "bfloat16": flops * dots, "int8": flops * bytes_}
    return Target(
        name="cpu",
        kind="cpu",
        triple=triple,
        mcpu=mcpu,
        features=features,
        vector_bytes=vector_bytes,
        vector_registers=registers,
        cores=cores,
        caches=_caches(hertz, vector_bytes),
        memory_bytes=memory_bytes,
        memory_bandwidth=min(cores, 8) * 17e9,
        peak=peak,
        source=f"detected: {info.get('model name', machine)}",
    )


def _may_use_tiles() -> bool:
    """Whether Linux lets this process use AMX's tiles, which it must ask for: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    import ctypes

    arch_prctl, request, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def _plainer(base: Target, name: str) -> Target:
    """`base` with only the features of the level in `name` ("cpu:generic" has none and 16-byte vectors)."""
    level = name.partition(":")[2]
    features = frozenset[str]() if level == "generic" else _LEVELS[level]
    mcpu = level if level != "generic" else "x86-64" if base.architecture == "x86_64" else "generic"
    vector_bytes, registers = _x86_vector(features) if base.architecture == "x86_64" else (16, 32)
    ratio = vector_bytes / base.vector_bytes
    peak = {dtype: base.peak_flops("float32") * ratio for dtype in ("float32", "bfloat16", "int8")}
    return attrs.evolve(
        base, name=name, mcpu=mcpu, features=features, vector_bytes=vector_bytes, vector_registers=registers, peak=peak
    )


def _x86_vector(features: frozenset[str]) -> tuple[int, int]:
    """Bytes and number of the vector registers that these x86 features give."""
    if features >= _V4:
        return 64, 32
    return (32, 16) if features >= {"avx2", "fma"} else (16, 16)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    entries: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            entries[key.strip()] = value.strip()
    return entries


def _hertz(info: Mapping[str, str]) -> float:
    """The core's highest known clock in Hz; 3 GHz where the system hides it."""
    fastest = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if fastest.exists():
        return float(fastest.read_text()) * 1e3
    return float(info.get("cpu MHz", "3000")) * 1e6


def _caches(hertz: float, vector_bytes: int) -> tuple[Cache, ...]:
    """Data caches of core 0, nearest first; a usual server's sizes where /sys has none."""
    found: dict[int, Cache] = {}
    per_cycle = {1: 2.0 * vector_bytes, 2: 1.0 * vector_bytes, 3: 16.0}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (index.joinpath(f).read_text().strip() for f in ("type", "level", "size"))
            shared = index.joinpath("shared_cpu_map").read_text()
        except OSError:
            continue
        if kind != "Instruction":
            factor = {"K": 1024, "M": 1 << 20}.get(size[-1], 1)
            sharers = bin(int(shared.replace(",", ""), 16)).count("1")
            nbytes = int(size.rstrip("KM")) * factor
            found[int(level)] = Cache(nbytes, per_cycle.get(int(level), 8.0) * hertz, max(sharers, 1))
    if not found:
        found = {1: Cache(32 << 10, per_cycle[1] * hertz), 2: Cache(1 << 20, per_cycle[2] * hertz)}
    return tuple(found[level] for level in sorted(found))


def _present_gpu() -> Target:
    """This machine's first GPU: its product's description where there is one, else its architecture's, with its own number of multiprocessors."""
    from jisu.compiler.gpu import Driver

    try:
        driver = Driver.open()
    except TargetError as error:
        raise TargetError(
            f"target 'cuda' means this machine's GPU, and there is none: {error}; use target='cpu', or name an architecture, such as "
            "'cuda:sm_90', to compile for another machine"
        ) from None
    major, minor = driver.capability
    names = [n for n in known_targets() if n.startswith("cuda:sm_")]
    # Code for an older architecture of the same generation runs.
    fits = [n for n in names if capability(n)[0] == major and capability(n)[1] <= minor]
    if not fits:
        raise TargetError(
            f"there is no description of the GPU here ({driver.name}, sm_{major}{minor}); known: {', '.join(names)}"
        )
    words = set(re.split(r"[^a-z0-9]+", driver.name.lower()))
    products = [Target.describe(n) for n in known_targets() if n.startswith("nvidia/")]
    # Smaller ones are sold under the same name: for laptops, or with fewer multiprocessors.
    own = [p for p in products if words >= set(p.name.split("/")[1].split("-")) and p.cores == driver.multiprocessors]
    base = own[0] if own else Target.describe(max(fits, key=capability))
    return attrs.evolve(base, cores=driver.multiprocessors, source=f"detected: {driver.name}; speeds of {base.name}")


def capability(name: str) -> tuple[int, int]:
    """The number of an NVIDIA GPU's architecture: (9, 0) of "cuda:sm_90", "sm_90" and "sm_90a"."""
    digits = name.removeprefix("cuda:").removeprefix("sm_").rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _alias(name: str) -> str:
    """A family's name stands for its machine that most people have."""
    return {"cuda": "cuda:sm_90"}.get(name, name)


@functools.cache
def _load(path: Path) -> Target:
    return Target.from_json(json.loads(path.read_text()))
