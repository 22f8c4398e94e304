"""Fits the timing model's parameters to half of libtpu's estimates, and says how far off the other half is.

    python benchmarks/tpu/fit.py --json benchmarks/results/2026-11-29-tpu-timing.json           # says it
    python benchmarks/tpu/fit.py --json … --write                                               # and stores the parameters with the chips

Per chip there are six parameters of `jisu.targets.tpu.chip.Timing`: launch, block, push of int8 and of bfloat16, accumulate and epilogue; all
else is the machine's description. They minimise the sum of squared logarithms of the ratios on the half marked "fit". The blocks are those
that libtpu chose. Needs scipy.
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
import numpy as np
from scipy.optimize import minimize

from jisu.compiler.errors import TargetError
from jisu.targets.tpu.chip import CHIPS, Chip, Timing
from jisu.targets.tpu.estimate import Tiles, best_tiles, events, product
from jisu.targets.tpu.systolic import ceil_div, folded
from jisu.targets.tpu.timing import simulate

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
NAMES = ("launch", "block", "push bfloat16", "push int8", "accumulate", "epilogue")
START = (2500.0, 200.0, 30.0, 40.0, 0.5, 4.0)
SLOTS = 4
"""Of the products that are simulated with our own tiles."""

SOURCE = (
    "launch, block, push, accumulate and epilogue: fitted to cycles that libtpu {libtpu} estimates of twelve products "
    "(benchmarks/tpu/fit.py); element and exp: assumed"
)


def tiles(chip: Chip, case: dict[str, Any]) -> Tiles:
    """The blocks that libtpu cut a product into, padded to registers and MXUs."""
    n_blocks, m_blocks, k_blocks = case["blocks_nmk"]

    def padded(size: int, blocks: int, unit: int) -> int:
        return ceil_div(ceil_div(size, blocks), unit) * unit

    return (
        padded(case["m"], m_blocks, chip.sublanes),
        padded(case["k"], k_blocks, chip.mxu),
        padded(case["n"], n_blocks, chip.lanes),
    )


def predicted(chip: Chip, case: dict[str, Any]) -> float:
    """The model's cycles of a product of the fixture."""
    shape = (case["m"], case["k"], case["n"], case["dtype"])
    return product(chip, *shape, tiles(chip, case), weights=case["weights"]).cycles


def timing(values: Any, source: str) -> Timing:
    """Parameters in the order of NAMES."""
    launch, block, bfloat16, int8, accumulate, epilogue = (float(f"{v:.4g}") for v in values)
    push = {"bfloat16": bfloat16, "int8": int8}
    return Timing(launch, block, accumulate, push, {"epilogue": epilogue, "element": 1.0, "exp": 4.0}, source)


def fit(chip: Chip, cases: list[dict[str, Any]], source: str) -> Timing:
    """Nelder and Mead from eight starts around START (seed 0)."""

    def loss(logs: Any) -> float:
        tried = attrs.evolve(chip, timing=timing(np.exp(logs), source))
        return float(sum(np.log(predicted(tried, c) / c["cycles"]) ** 2 for c in cases))

    rng = np.random.default_rng(0)
    starts = [np.log(START) + rng.normal(0, 0.4, len(START)) for _ in range(8)]
    options = {"maxiter": 3000, "maxfev": 3000, "xatol": 1e-4, "fatol": 1e-9}
    found = [minimize(loss, s, method="Nelder-Mead", options=options) for s in starts]
    return timing(np.exp(min(found, key=lambda r: r.fun).x), source)


def roofline(chip: Chip, case: dict[str, Any]) -> float:
    """Cycles by peak and bandwidth alone, nothing fitted: what the model has to beat."""
    shape = (case["m"], case["k"], case["n"], case["dtype"])
    found = product(chip, *shape, tiles(chip, case), weights=case["weights"])
    return max(found.ideal, found.hbm_bound)


def errors(chip: Chip, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the model against libtpu's estimates, and of a plain roofline."""
    rows = []
    for c in cases:
        cycles = predicted(chip, c)
        name = {k: c[k] for k in ("m", "k", "n", "dtype")}
        rows.append(
            {**name, "libtpu": c["cycles"], "model": round(cycles), "error": round(cycles / c["cycles"] - 1, 4)}
        )
    sizes = [abs(r["error"]) for r in rows]
    plain = [abs(roofline(chip, c) / c["cycles"] - 1) for c in cases]
    return {
        "median": round(statistics.median(sizes), 4), "worst": max(sizes),
        "roofline_median": round(statistics.median(plain), 4), "roofline_worst": round(max(plain), 4), "products": rows,
    }  # fmt: skip


def utilisation(chip: Chip) -> list[dict[str, Any]]:
    """Simulated MXU use of prefill products with our tiles: weights read from HBM, and weights that are in VMEM beforehand.

    Beside it: the same with the launch of a kernel, and the most that reading and writing everything once at HBM's bandwidth allows.
    """
    rows = []
    for dtype, (k, n), m in itertools.product(
        ("int8", "bfloat16"), ((2048, 2048), (4096, 4096), (4096, 14336)), (128, 512, 2048)
    ):
        row: dict[str, Any] = {"m": m, "k": k, "n": n, "dtype": dtype}
        for weights in ("hbm", "vmem"):
            try:
                cut = best_tiles(chip, m, k, n, dtype, weights=weights, slots=SLOTS)
            except TargetError:  # weights that VMEM doesn't hold
                continue
            run = simulate(chip, events(chip, m, k, n, dtype, cut, weights=weights, slots=SLOTS), launch=False)
            bound = product(chip, m, k, n, dtype, cut, weights=weights, slots=SLOTS).hbm_bound
            row[weights] = {
                "tiles": cut,
                "mxu_use": round(run.mxu_utilisation, 4),
                "mxu_use_with_launch": round(run.ideal / (run.cycles + chip.timing.launch), 4),
                "most_that_hbm_allows": round(min(1.0, run.ideal / bound), 4),
            }
        rows.append(row)
    return rows


def decode(chip: Chip) -> list[dict[str, Any]]:
    """Simulated products of one step of decoding (one row padded to 8): bytes and time over the least possible."""
    rows = []
    for dtype, (k, n) in itertools.product(
        ("int8", "bfloat16"), ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
    ):
        cut = best_tiles(chip, 8, k, n, dtype, slots=SLOTS)
        run = simulate(chip, events(chip, 8, k, n, dtype, cut, slots=SLOTS), launch=False)
        found = product(chip, 8, k, n, dtype, cut, slots=SLOTS)
        rows.append({
            "m": 8, "k": k, "n": n, "dtype": dtype, "tiles": cut,
            "bytes_over_least": round(run.hbm_bytes / found.least_bytes, 4),
            "time_over_hbm_bound": round(run.cycles / found.hbm_bound, 4),
            "with_launch": round((run.cycles + chip.timing.launch) / found.hbm_bound, 4),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="store the fitted parameters in targets/tpu/chips")
    options = parser.parse_args()
    estimates = json.loads((FIXTURES / "tpu_libtpu.json").read_text())
    later = json.loads((FIXTURES / "tpu_libtpu_later.json").read_text())["products"]
    folds = json.loads((FIXTURES / "tpu_scale_sim.json").read_text())
    source = SOURCE.format(**estimates["versions"])
    chips: dict[str, Any] = {}
    for name in sorted({c["chip"] for c in estimates["products"]}):
        cases = [c for c in estimates["products"] if c["chip"] == name]
        halves = {half: [c for c in cases if c["half"] == half] for half in ("fit", "held out")}
        chip = attrs.evolve(Chip.named(name), timing=fit(Chip.named(name), halves["fit"], source))
        parameters = {**attrs.asdict(chip.timing), "push": dict(chip.timing.push), "vector": dict(chip.timing.vector)}
        chips[name] = {
            "parameters": parameters,
            **{half: errors(chip, part) for half, part in halves.items()},
            "later": errors(chip, [c for c in later if c["chip"] == name]),
            "prefill": utilisation(chip),
            "decode": decode(chip),
        }
        if options.write:
            path = CHIPS / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "timing": parameters}, indent=1) + "\n")

    def over_chips(half: str) -> dict[str, Any]:
        sizes = [abs(r["error"]) for c in chips.values() for r in c[half]["products"]]
        return {"estimates": len(sizes), "median": round(statistics.median(sizes), 4), "worst": max(sizes)}

    found = {
        "date": datetime.date.today().isoformat(),
        "label": "simulated; libtpu's figures are a compiler's estimates; nothing was measured on a TPU",
        "versions": {"jisu": version("jisu"), "estimates": estimates["versions"], "folds": folds["versions"]},
        "command": "python " + " ".join(sys.argv),
        "held_out": over_chips("held out"),
        "later": over_chips("later"),
        "scale_sim": [
            {**p, "model": folded(*(p[k] for k in ("rows", "columns", "m", "k", "n")))} for p in folds["products"]
        ],
        "slots": SLOTS,
        "chips": chips,
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(
        found["held_out"],
        found["later"],
        {n: (c["parameters"], c["fit"]["median"], c["fit"]["worst"]) for n, c in chips.items()},
    )


if __name__ == "__main__":
    main()
