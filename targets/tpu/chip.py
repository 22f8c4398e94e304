"""TPU chips as data: what `chips/*.json` say, each number with its source.

A Chip is one TensorCore: a kernel runs on one. `Target.describe` takes its figures, of the whole chip, from the same file.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler.errors import TargetError

CHIPS = Path(__file__).with_name("chips")
DEFAULT = "tpu:v5e"
"""What "tpu" alone stands for."""

_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "uint8": 8, "float8": 8, "int4": 4, "int32": 32, "float16": 16}


def itemsize(dtype: str) -> float:
    """Bytes of an element: 0.5 for "int4"."""
    if dtype not in _BITS:
        raise TargetError(f"a TPU has no {dtype!r}; known: {', '.join(_BITS)}")
    return _BITS[dtype] / 8


Table = tuple[tuple[str, float], ...]


def _table(values: Mapping[str, float] | Table) -> Table:
    items = values.items() if isinstance(values, Mapping) else values
    return tuple(sorted((str(k), float(v)) for k, v in items))


@attrs.frozen
class Timing:
    """What the timing model needs beyond the machine's sizes, in cycles, and how it was come by.

    launch: starting and ending a kernel, transfers left out. block: filling and draining the MXUs around each Matmul. push: of one tile of
    weights (mxu x mxu) into an MXU, per dtype; hidden behind the rows streamed through the tile before, if those take longer. depth: numbers of
    the inner axis that one partial sum spans, per dtype. accumulate: of the vector unit on each register of partial sums. vector: on each
    register of results, per op of a Vector event.
    """

    launch: float
    block: float
    accumulate: float
    push: Table = attrs.field(converter=_table)
    depth: Table = attrs.field(converter=_table)
    vector: Table = attrs.field(converter=_table)
    source: str


@attrs.frozen
class KernelTiming:
    """What straight code of our own kernels takes, in cycles, by the bundles that libtpu makes of it, where `Timing` says what libtpu estimates of
    products of its own.

    A stretch is what nothing interrupts: from a wait or a loop's turn to the next. fill: pushing its first weights and draining its last sums, with
    what is behind them, per dtype. push: of one tile of weights, on all matrix units at once; begin: what a stretch takes beyond its pushes, where
    these take longer than its rows. pop: on each register of partial sums, which span mxu numbers; result: of the vector unit on each register
    of results: scaled, converted and packed.
    """

    fill: Table = attrs.field(converter=_table)
    push: Table = attrs.field(converter=_table)
    begin: Table = attrs.field(converter=_table)
    pop: float
    result: float
    source: str


@attrs.frozen
class Chip:
    """One TensorCore of a TPU.

    mxu: rows and columns of a matrix unit, mxus: how many; sublanes x lanes: of a vector register of 32-bit elements; sizes in bytes,
    bandwidths in bytes/s, clock in Hz, peak in FLOP/s per dtype (2 per multiply-add), dma_latency in seconds; accumulators: buffers
    of sublanes x mxu 32-bit sums per MXU, 0 where they live in VMEM. `cores` TensorCores make a chip. `sources` says where each number is from.
    """

    name: str
    cores: int
    mxu: int
    mxus: int
    sublanes: int
    lanes: int
    vector_registers: int
    vmem_bytes: int
    smem_bytes: int
    hbm_bytes: int
    hbm_bandwidth: float
    vmem_bandwidth: float
    clock: float
    peak: Table = attrs.field(converter=_table)
    dma_queues: int
    dma_latency: float
    accumulators: int
    timing: Timing
    code: KernelTiming
    sources: tuple[tuple[str, str], ...] = attrs.field(repr=False, eq=False)

    @classmethod
    def named(cls, name: str) -> Chip:
        """The chip "tpu:v5e" ("v5e", and "tpu" for the default); raises TargetError for one that isn't described."""
        if name == "tpu":
            name = DEFAULT
        known = chips()
        full = name if name.startswith("tpu:") else f"tpu:{name}"
        if full not in known:
            near = difflib.get_close_matches(full, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"unknown TPU {name!r}; known: {', '.join(known)}{hint}")
        return _load(full)

    @property
    def short(self) -> str:
        """Its name among TPUs: "v5e"."""
        return self.name.removeprefix("tpu:")

    def source(self, field: str) -> str:
        """Where the number `field` is from; "derived: …" or "assumed: …" where nobody publishes it."""
        sources = dict(self.sources)
        if field not in sources:
            raise TargetError(f"{self.name} has no number {field!r}; known: {', '.join(sources)}")
        return sources[field]

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of this core in `dtype`; raises TargetError where the chip has no such products."""
        peak = dict(self.peak)
        if dtype not in peak:
            raise TargetError(f"{self.name} multiplies no {dtype}; it does {', '.join(peak)}")
        return peak[dtype]

    def rows_per_cycle(self, dtype: str) -> float:
        """Rows of `dtype` that stream through each MXU per cycle at the peak."""
        return self.peak_flops(dtype) / (2 * self.mxu**2 * self.mxus * self.clock)

    def sublane_tile(self, dtype: str) -> int:
        """Rows of a native tile: 8 of 32 bits, 16 of 16, 32 of 8; other heights are padded to a multiple of it."""
        return self.packed_sublanes(itemsize(dtype))

    def packed_sublanes(self, size: float) -> int:
        """Rows of a native tile of elements of so many bytes."""
        return int(self.sublanes * 4 / size)

    @property
    def register_elements(self) -> int:
        """32-bit elements of a vector register."""
        return self.sublanes * self.lanes

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bandwidth / self.clock


def chips() -> tuple[str, ...]:
    """The names of all chips that are described."""
    return tuple(sorted(f"tpu:{path.stem}" for path in CHIPS.glob("*.json")))


def description(name: str) -> dict[str, Any]:
    """The whole chip `name` in the terms of `jisu.targets.target.Target`, for its `from_json`."""
    chip = Chip.named(name)
    return {
        "name": chip.name,
        "kind": "tpu",
        "triple": "tpu-google",
        "mcpu": chip.short,
        "features": [],
        "vector_bytes": 4 * chip.register_elements,
        "vector_registers": chip.vector_registers,
        "cores": chip.cores,
        "caches": [{"bytes": chip.vmem_bytes, "bandwidth": chip.vmem_bandwidth, "shared_by": 1}],
        "memory_bytes": chip.cores * chip.hbm_bytes,
        "memory_bandwidth": chip.cores * chip.hbm_bandwidth,
        "peak": {dtype: chip.cores * rate for dtype, rate in chip.peak},
        "estimated": True,
        "source": f"targets/tpu/chips/{chip.short}.json, which names a source for each number",
    }


@functools.cache
def _load(name: str) -> Chip:
    data = json.loads((CHIPS / f"{name.removeprefix('tpu:')}.json").read_text(encoding="utf-8"))
    numbers = {field: entry["value"] for field, entry in data["numbers"].items()}
    sources = tuple((field, str(entry["source"])) for field, entry in data["numbers"].items())
    if isinstance(data["timing"], str):  # nobody fitted this chip: another one's, cycle for cycle
        like, peak = _load(data["timing"]), numbers["peak"]
        equal = peak["int8"] <= peak["bfloat16"]
        doubt = ", doubtful for the depth of int8, which is no faster than bfloat16 here" if equal else ""
        said = f"assumed: those of {like.name}{doubt}; "
        timing = attrs.evolve(like.timing, source=said + like.timing.source)
        code = attrs.evolve(like.code, source=said + like.code.source)
    else:
        timing, code = Timing(**data["timing"]), KernelTiming(**data["code"])
    return Chip(name=data["name"], **numbers, timing=timing, code=code, sources=sources)
