"""Cycles of kernels by the code that libtpu makes of them, and the timing model's parameters of such code.

    python benchmarks/tpu/fit_code.py --json tests/fixtures/tpu_code.json           # needs libtpu, see jisu.targets.tpu.judges
    python benchmarks/tpu/fit_code.py --json … --write                              # and stores the parameters with the chips

libtpu's bundles are replayed (`jisu.targets.tpu.code`): a compiler's static schedule, no measurement. `blocks` are single products of operands in
VMEM, with what is behind their sums; parameters follow from them: `fill`, what the products with most rows take beyond the time in which these pass at the
peak, the median; `push` and `begin`, a line through those with fewest rows, over rounds of weights. `kernels` are products of our own, as
emitted; nothing is fitted to them, and how far the simulation is from them, by the parameters that are stored, is printed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

from jisu.targets.tpu import judges
from jisu.targets.tpu.chip import CHIPS, Chip
from jisu.targets.tpu.kernel_events import events_of
from jisu.targets.tpu.pallas import source
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.spec import Product
from jisu.targets.tpu.systolic import ceil_div
from jisu.targets.tpu.tiles import Tiles, choose_tiles
from jisu.targets.tpu.timing import simulate

NAMES = ("v5e", "v6e")
DTYPES = ("int8", "bfloat16")
ROWS = (8, 64, 256)
BLOCKS = tuple((m, k, n) for k, n in ((512, 1024), (2048, 256), (4096, 512)) for m in ROWS)
KERNELS = (
    (1, 2048, 2048), (1, 4096, 1024), (64, 4096, 1024), (128, 2048, 2048), (256, 2048, 1024), (512, 1024, 1024),
)  # fmt: skip
SOURCE = (
    "fill, push and begin: of {count} single products in the code of libtpu {libtpu} (benchmarks/tpu/fit_code.py); pop and result: a bundle has two slots that "
    "pop partial sums, and four simple operations, of which scaling by column and row, converting and packing take 3.5 per register"
)

BLOCK = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PADDED, DTYPES = (({m}, {k}), ({k}, {n}), (1, {n}), ({m}, 1)), ("{dtype}", "{dtype}", "float32", "float32")

def body(x, w, columns, rows, out):
    sums = jnp.dot(x[...], w[...], preferred_element_type=jnp.{sums})
    out[...] = (sums.astype(jnp.float32) * columns[...] * rows[...]).astype(jnp.bfloat16)

def kernel(*operands):
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(({m}, {n}), jnp.bfloat16), in_specs=[vmem] * 4, out_specs=vmem)(*operands)
"""


def rounds(chip: Chip, k: int, n: int) -> int:
    """How often the matrix units take new weights."""
    return ceil_div(ceil_div(k, chip.mxu) * ceil_div(n, chip.mxu), chip.mxus)


def streamed(chip: Chip, case: dict[str, Any]) -> float:
    """Cycles in which a block's rows pass at the peak."""
    return rounds(chip, case["k"], case["n"]) * case["m"] / chip.rows_per_cycle(case["dtype"])


def parameters(chip: Chip, blocks: list[dict[str, Any]], libtpu: str) -> dict[str, Any]:
    """What `jisu.targets.tpu.chip.KernelTiming` holds."""
    found: dict[str, dict[str, float]] = {"fill": {}, "push": {}, "begin": {}}
    for dtype in DTYPES:
        few, many = ([c for c in blocks if (c["m"], c["dtype"]) == (m, dtype)] for m in (ROWS[0], ROWS[-1]))
        found["fill"][dtype] = round(statistics.median(c["cycles"] - streamed(chip, c) for c in many), 1)
        line = statistics.linear_regression([rounds(chip, c["k"], c["n"]) for c in few], [c["cycles"] for c in few])
        found["push"][dtype], found["begin"][dtype] = round(line.slope, 2), round(line.intercept, 1)
    return {**found, "pop": 1 / 2, "result": 3.5 / 4, "source": SOURCE.format(count=len(blocks), libtpu=libtpu)}


def off(case: dict[str, Any]) -> float:
    """By how much the simulation of an emitted kernel, copies left out, is above its replayed code, relatively."""
    chip, scaled = Chip.named(case["chip"]), case["dtype"] == "int8"
    product = Product(case["m"], case["n"], case["k"], case["dtype"], channel_scale=scaled, row_scale=scaled)
    numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in case["tiles"].items()}
    at_once = attrs.evolve(chip, dma_latency=0.0, hbm_bandwidth=1e18)
    return (
        simulate(at_once, events_of(lower(product, chip, Tiles(**numbers))), launch=False).cycles / case["cycles"] - 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="store the parameters in targets/tpu/chips")
    options = parser.parse_args()
    libtpu = judges.libtpu_version()
    products: list[dict[str, Any]] = []
    for name in NAMES:
        chip = Chip.named(name)
        cases, texts = [], []
        for dtype, (kind, shapes) in itertools.product(DTYPES, {"block": BLOCKS, "kernel": KERNELS}.items()):
            for m, k, n in shapes:
                case: dict[str, Any] = {"kind": kind, "m": m, "k": k, "n": n, "dtype": dtype}
                if kind == "block":
                    texts.append(BLOCK.format(**case, sums="int32" if dtype == "int8" else "float32"))
                else:
                    product = Product(m, n, k, dtype, channel_scale=dtype == "int8", row_scale=dtype == "int8")
                    lowered = lower(product, chip, choose_tiles(product, chip, prefetched=m > 1))
                    case["tiles"] = attrs.asdict(lowered.tiles)
                    texts.append(source(lowered))
                cases.append(case)
        for case, code in zip(cases, judges.codes(texts, name), strict=True):
            products.append({"chip": name, **case, "bundles": code.bundles, "cycles": round(code.replayed(chip))})
            print({k: v for k, v in products[-1].items() if k != "tiles"}, file=sys.stderr)
        if options.write:
            path = CHIPS / f"{name}.json"
            blocks = [p for p in products if p["chip"] == name and p["kind"] == "block"]
            path.write_text(
                json.dumps({**json.loads(path.read_text()), "code": parameters(chip, blocks, libtpu)}, indent=1) + "\n"
            )
    found = {
        "date": datetime.date.today().isoformat(),
        "versions": {"jisu": version("jisu"), "libtpu": libtpu},
        "command": "python " + " ".join(sys.argv),
        "judge": "bundles that libtpu makes, replayed; not measured",
        "products": products,
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    told(products)


def told(products: list[dict[str, Any]]) -> None:
    """Print how far the simulation is off."""
    kernels = [p for p in products if p["kind"] == "kernel"]
    many, one = ([off(p) for p in kernels if (p["m"] > 1) == several] for several in (True, False))
    sizes = [abs(error) for error in many]
    print(
        f"{len(many)} kernels of more than one row: simulated cycles are {statistics.median(sizes):.1%} off in the median, "
        f"{max(sizes):.1%} at worst; {len(one)} of one row: {min(one):+.1%} to {max(one):+.1%}"
    )


if __name__ == "__main__":
    main()
