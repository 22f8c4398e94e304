"""Simulated utilisation and traffic of matrix products, from the TIR that also runs on the CPU and becomes Pallas source.

    python benchmarks/tpu/products.py --json benchmarks/results/2026-11-29-tpu-products.json
    python benchmarks/tpu/products.py --chip tpu:v6e

Nothing was measured on a TPU. Three views of each prefill product: `alone` (all operands in HBM, launch counted), `prefetched` (weights are in
VMEM when it starts, as when they stream beside the work before; launch not counted, as a program is launched once) and `inside` (x is in
VMEM, too, as what an op computes stays there for the next). The criteria are stated for `prefetched`; `most` is what no schedule exceeds there.
Decode products have one row, which is padded to eight; their criteria are stated without the launch, and `least` is the time of two
transfers' latency, HBM's for the bytes between them, and nothing else. Programs are a Llama of 1.2 billion parameters, by `jisu.targets.tpu.program`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler import ops
from jisu.compiler.graph import Graph, Node, placeholder, weight
from jisu.compiler.types import TensorType, symbol
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.events import Event, Matmul
from jisu.targets.tpu.kernel_events import events_of
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.program import simulated
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.systolic import vector_cycles, work
from jisu.targets.tpu.tiles import choose_tiles
from jisu.targets.tpu.timing import Timeline, simulate

PREFILL = tuple(
    (m, *kn) for kn in ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)) for m in (128, 512, 1024, 2048)
)
DECODE = ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
GROUPED = ((4096, 4096), (4096, 11008), (14336, 4096))
WANTED = {("int8", False): 0.65, ("bfloat16", False): 0.75, ("int8", True): 0.85, ("bfloat16", True): 0.90}
"""Least utilisation on v5e by dtype, and whether there are at least 512 rows."""
MOST_BYTES, MOST_TIME = 1.05, 1.10


def most(p: Product, chip: Chip) -> float:
    """The greatest use: the latencies of the first copy and the last, and between them the busier of the matrix units and the vector unit,
    which adds up partial sums and computes what is behind them; the copies themselves, and all but one block's filling, left out."""
    one = work(chip, p.m, p.k, p.n, p.dtype, fills=1)
    vector = one.vector + vector_cycles(chip, p.m * p.n, "result")
    return one.ideal / (2 * chip.dma_latency * chip.clock + max(one.mxu, vector))


def shares(chip: Chip, events: list[Event], run: Timeline) -> dict[str, int]:
    """Where a kernel's cycles go, which is all of them: two latencies, the first copies' bytes, then the matrix units: at the peak, pushing more
    weights than rows hide, filling and draining, waiting; then the last results, computed and copied."""
    latency = chip.dma_latency * chip.clock
    shapes = [((chip, e.m, e.k, e.n, e.dtype), e.fills) for e in events if isinstance(e, Matmul)]
    fill = sum(work(*shape, fills=fills).mxu - work(*shape, fills=0).mxu for shape, fills in shapes)
    units = [s for s in run.spans if s.unit == "mxu"]
    begin, end = units[0].start, units[-1].end
    found = {
        "latencies": 2 * latency, "first copies": begin - latency, "peak": run.ideal, "pushes": run.busy["mxu"] - run.ideal - fill, "fills": fill,
        "waits": end - begin - run.busy["mxu"], "last results": run.cycles - end - latency,
    }  # fmt: skip
    return {name: round(cycles) for name, cycles in found.items()}


def product(m: int, k: int, n: int, dtype: str) -> Product:
    scaled = dtype == "int8"
    return Product(m, n, k, dtype, channel_scale=scaled, row_scale=scaled)


def grouped() -> list[Product]:
    """Decode products of 4-bit codes with a scale, and a zero, per group of inputs."""
    return [
        Product(1, n, k, dtype, row_scale=dtype == "int8", weights="int4", group=group, zeros=zeros)
        for k, n in GROUPED
        for dtype in ("bfloat16", "int8")
        for group, zeros in ((128, True), (128, False), (32, True))
    ]


def of_weights(found: dict[str, Any]) -> str:
    """How a decode product's weights are stored."""
    group = f" by {found['group']}" if found["group"] else ""
    return found["weights"] + group + (" -zero" if found["zeros"] else "")


def prefill(chip: Chip, m: int, k: int, n: int, dtype: str) -> dict[str, Any]:
    """One product in three views. Where weights don't fit beside the tiles, VMEM is taken to be larger; `fits` says so."""
    p = product(m, k, n, dtype)
    ideal = 2 * m * k * n / chip.peak_flops(dtype) * chip.clock
    alone, ahead = lower(p, chip), lower(p, chip, choose_tiles(p, chip, prefetched=True))
    roomy = attrs.evolve(chip, vmem_bytes=8 * chip.vmem_bytes)
    run = simulate(chip, events_of(alone))
    events = {
        name: list(events_of(ahead, prefetched=operands))
        for name, operands in (("prefetched", ("w",)), ("inside", ("w", "x")))
    }
    views = {name: simulate(roomy, each, launch=False) for name, each in events.items()}
    used = {name: round(ideal / view.cycles, 4) for name, view in views.items()}
    wanted = WANTED[dtype, m >= 512]
    return {
        "m": m, "k": k, "n": n, "dtype": dtype, "order": alone.tiles.order, "tiles": [alone.tiles.m, alone.tiles.k, alone.tiles.n],
        "tiles_prefetched": [ahead.tiles.order, ahead.tiles.m, ahead.tiles.k, ahead.tiles.n],
        "most": round(most(p, chip), 4), "cycles": round(run.cycles), "alone": round(ideal / run.cycles, 4), **used, "wanted": wanted,
        "cycles_prefetched": shares(chip, events["prefetched"], views["prefetched"]),
        "met": used["prefetched"] >= wanted, "met_inside": used["inside"] >= wanted,
        "bytes_over_least": round(run.hbm_bytes / p.least_bytes, 4),
        "fits": views["prefetched"].vmem_high_water <= chip.vmem_bytes,
        "closed_form_over_simulated": round(alone.tiles.cycles(p, chip) / run.cycles, 4),
    }  # fmt: skip


def decode(chip: Chip, p: Product) -> dict[str, Any]:
    """A product of one row beside the time of its least bytes."""
    events = list(events_of(lower(p, chip)))
    run, whole = (simulate(chip, events, launch=launch) for launch in (False, True))
    bound = p.least_bytes / chip.hbm_bytes_per_cycle
    over, times = run.hbm_bytes / p.least_bytes, run.cycles / bound
    return {
        "k": p.k, "n": p.n, "dtype": p.dtype, "weights": p.weights, "group": p.group, "zeros": p.zeros, "cycles": round(run.cycles),
        "bytes_over_least": round(over, 4), "time_over_bound": round(times, 4),
        "least": round(1 + 2 * chip.dma_latency * chip.clock / bound, 4), "with_launch": round(whole.cycles / bound, 4),
        "shares": decode_shares(chip, run, p),
        "met": over <= MOST_BYTES and times <= MOST_TIME,
    }  # fmt: skip


def decode_shares(chip: Chip, run: Timeline, p: Product) -> dict[str, int]:
    """Where the cycles of a product go that HBM bounds, which is all of them: two latencies, HBM's time for the least bytes and for those that padding
    adds, and what it isn't busy in: mostly the last panel, which is multiplied when all weights are there."""
    latencies, moved = 2 * chip.dma_latency * chip.clock, run.hbm_bytes / chip.hbm_bytes_per_cycle
    least = p.least_bytes / chip.hbm_bytes_per_cycle
    found = {
        "latencies": latencies,
        "least bytes": least,
        "other bytes": moved - least,
        "last panel": run.cycles - latencies - moved,
    }
    return {name: round(cycles) for name, cycles in found.items()}


def llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Graph:
    """A decoder's step over a cache, of a Llama's shape; weights have no values."""
    d, s, capacity = hidden // heads, symbol("sequence"), symbol("capacity")

    def matrix(name: str, *shape: int) -> Node:
        return weight(name, TensorType(shape, "bfloat16"))

    ids = placeholder("ids", TensorType((1, s), "int64"))
    length, start = (placeholder(name, TensorType((1,), "int64")) for name in ("length", "start"))
    cos, sin = (placeholder(name, TensorType((1, s, d), "bfloat16")) for name in ("cos", "sin"))
    table = matrix("table", vocabulary, hidden)
    x = ops.take(table, ids, axis=0)
    inputs, state = [ids, length, start, cos, sin], []
    for i in range(layers):
        h = ops.rms_norm(x, matrix(f"{i}.norm", hidden), eps=1e-5)
        q, k, v = (
            ops.reshape(ops.linear(h, matrix(f"{i}.{name}", count * d, hidden)), shape=(1, s, count, d))
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        caches = [placeholder(f"{i}.{name}", TensorType((1, kv_heads, capacity, d), "bfloat16")) for name in "kv"]
        inputs += caches
        caches = [ops.cache_append(cache, new, length) for cache, new in zip(caches, (k, v), strict=True)]
        state += caches
        seen = ops.reshape(ops.attention_cached(q, *caches, length, start, scale=d**-0.5), shape=(1, s, hidden))
        x = ops.linear(seen, matrix(f"{i}.o", hidden, hidden), None, x)
        h = ops.rms_norm(x, matrix(f"{i}.norm2", hidden), eps=1e-5)
        gate, up = (matrix(f"{i}.{name}", inner, hidden) for name in ("gate", "up"))
        x = ops.linear(ops.gated_linear(h, gate, up, activation="silu"), matrix(f"{i}.down", hidden, inner), None, x)
    last = ops.slice_(x, starts=(0, s - 1, 0), stops=(1, s, hidden), steps=(1, 1, 1))
    logits = ops.linear(ops.rms_norm(last, matrix("norm", hidden), eps=1e-5), table)
    return Graph(inputs, [logits, *state])


def programs(chip: Chip, trace: Path | None) -> list[dict[str, Any]]:
    """Prefill and decode of a Llama 3.2 1B's shape."""
    graph = llama(16, 2048, 32, 8, 8192, 128256)
    found = []
    for (tokens, cached), weights, kv in itertools.product(((512, 0), (1, 1024), (1, 16384)), (None, "int8"), (None, "int8")):  # fmt: skip
        sizes = {"sequence": tokens, "capacity": cached + tokens}
        run = simulated(graph, sizes, chip, cached=cached, weights=weights, kv=kv)
        told = {
            "tokens": tokens, "cached": cached, "weights": weights or "bfloat16", "kv": kv or "bfloat16", **run.to_json(),
            "time_over_bound": round(run.seconds / run.hbm_seconds, 4), "bytes_over_least": round(run.hbm_bytes / run.least_bytes, 4),
            "mxu_utilisation": round(run.mxu_utilisation(weights or "bfloat16"), 4),
        }  # fmt: skip
        found.append(told)
        print(f"{tokens} tokens behind {cached}, weights {told['weights']}, keys and values {told['kv']}: {run}")
        if trace is not None and tokens == 1 and cached == 1024 and weights == kv == "int8":
            run.trace(trace)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="tpu:v5e")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="a decode step's simulated timeline, for Perfetto")
    options = parser.parse_args()
    chip = Chip.named(options.chip)
    prefills = [prefill(chip, *shape, dtype) for dtype in ("int8", "bfloat16") for shape in PREFILL]
    print(f"{chip.name}, simulated: MXU utilisation of prefill products\n")
    print("    m     k     n dtype     alone  prefetched    most  inside  wanted         bytes/least  form/simulated")
    for r in prefills:
        met = "met" if r["met"] else "inside" if r["met_inside"] else "missed"
        print(
            f"{r['m']:5} {r['k']:5} {r['n']:5} {r['dtype']:8} {r['alone']:6.1%} {r['prefetched']:11.1%} {r['most']:7.1%} {r['inside']:7.1%} {r['wanted']:7.0%} "
            f"{met:7} {r['bytes_over_least']:10.3f} {r['closed_form_over_simulated']:10.3f}"
        )
    print("\nwhere the cycles of the smallest go, weights in VMEM beforehand\n")
    for r in prefills:
        if r["k"] == r["n"] == PREFILL[0][1]:
            print(
                f"{r['m']:5} {r['dtype']:8}", ", ".join(f"{name} {n:,}" for name, n in r["cycles_prefetched"].items())
            )
    rows = [product(1, *shape, dtype) for dtype in ("int8", "bfloat16") for shape in DECODE]
    decodes = [decode(chip, p) for p in (*rows, *grouped())]
    print(
        "\ndecode products (one row)\n\n    k     n dtype    weights        bytes/least  time/bound  least  with launch"
    )
    for r in decodes:
        print(
            f"{r['k']:5} {r['n']:5} {r['dtype']:8} {of_weights(r):14} {r['bytes_over_least']:11.3f} {r['time_over_bound']:11.3f} "
            f"{r['least']:6.3f} {r['with_launch']:12.3f} "
            f"{'met' if r['met'] else 'missed'}"
        )
    print("\nwhere the cycles of the smallest go\n")
    for r in decodes:
        if r["k"] == r["n"] == DECODE[0][0]:
            print(f"{r['dtype']:8}", ", ".join(f"{name} {n:,}" for name, n in r["shares"].items()))
    print()
    found = {
        "date": datetime.date.today().isoformat(),
        "label": "simulated; nothing was measured on a TPU",
        "versions": {"jisu": version("jisu"), "apache-tvm": version("apache-tvm")},
        "command": "python " + " ".join(sys.argv),
        "chip": chip.name,
        "prefill": prefills,
        "decode": decodes,
        "programs": programs(chip, options.trace),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
