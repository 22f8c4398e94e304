"""Fits the timing model's parameters to half of libtpu's estimates, and says how far off the other half is.

    python benchmarks/tpu/fit.py --json benchmarks/results/2026-11-29-tpu-timing.json           # says it
    python benchmarks/tpu/fit.py --json … --write                                               # and stores the parameters with the chips

What is compared are simulated events of the products as libtpu cuts them (`jisu.targets.tpu.blocked`). Per chip there are six parameters of
`jisu.targets.tpu.chip.Timing`: launch, block, push of int8 and of bfloat16, accumulate and epilogue; all else is the machine's description. They
minimise the sum of squared logarithms of the ratios on the half marked "fit". `depth` isn't fitted: for v5e, libtpu estimates an int8 product of
(m, k, n) like a bfloat16 one of (m, k / 2, n), to the cycle wherever it cuts both into the same blocks of at least 128 rows (`tpu_libtpu_pairs.json`
among the fixtures), so that a partial sum spans 256 numbers of int8 and half as many are added up; for v6e it does nothing of the kind. Needs scipy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from scipy.optimize import minimize

from jisu.targets.tpu.blocked import Blocked
from jisu.targets.tpu.chip import CHIPS, Chip, Timing
from jisu.targets.tpu.systolic import folded
from jisu.targets.tpu.timing import Timeline, simulate

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
NAMES = ("launch", "block", "push bfloat16", "push int8", "accumulate", "epilogue")
START = (2500.0, 200.0, 30.0, 40.0, 0.5, 4.0)
SOURCE = (
    "launch, block, push, accumulate and epilogue: fitted to cycles that libtpu {libtpu} estimates of 24 products "
    "(benchmarks/tpu/fit.py); depth: see there; element and exp: assumed; alu: benchmarks/tpu/bundles.py (v5e), assumed to be the same (v6e)"
)


def blocked(chip: Chip, case: dict[str, Any]) -> Blocked:
    """A product of the fixture."""
    return Blocked.by_libtpu(chip, *(case[key] for key in ("m", "k", "n", "dtype", "blocks_nmk", "weights")))


def run(chip: Chip, case: dict[str, Any]) -> Timeline:
    """The simulated product."""
    return simulate(chip, blocked(chip, case).events())


def timing(chip: Chip, values: Any, source: str) -> Timing:
    """Parameters in the order of NAMES, and those of the chip's that aren't fitted."""
    launch, block, bfloat16, int8, accumulate, epilogue = (float(f"{v:.4g}") for v in values)
    push = {"bfloat16": bfloat16, "int8": int8}
    vector = {**chip.timing.vector, "epilogue": epilogue}
    return Timing(launch, block, accumulate, push, chip.timing.depth, vector, source)


def fit(chip: Chip, cases: list[dict[str, Any]], source: str) -> Timing:
    """Nelder and Mead from eight starts around START (seed 0)."""

    def loss(logs: Any) -> float:
        tried = attrs.evolve(chip, timing=timing(chip, np.exp(logs), source))
        return float(sum(np.log(run(tried, c).cycles / c["cycles"]) ** 2 for c in cases))

    rng = np.random.default_rng(0)
    starts = [np.log(START) + rng.normal(0, 0.4, len(START)) for _ in range(8)]
    options = {"maxiter": 3000, "maxfev": 3000, "xatol": 1e-4, "fatol": 1e-9}
    found = [minimize(loss, s, method="Nelder-Mead", options=options) for s in starts]
    return timing(chip, np.exp(min(found, key=lambda r: r.fun).x), source)


def roofline(chip: Chip, case: dict[str, Any]) -> float:
    """Cycles by peak and bandwidth alone, nothing fitted: what the model has to beat."""
    return max(run(chip, case).ideal, blocked(chip, case).least_bytes / chip.hbm_bytes_per_cycle)


def errors(chip: Chip, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the model against libtpu's estimates, and of a plain roofline."""
    rows = []
    for c in cases:
        cycles = run(chip, c).cycles
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
        tables = {name: dict(getattr(chip.timing, name)) for name in ("push", "depth", "vector")}
        parameters = {**attrs.asdict(chip.timing), **tables}
        chips[name] = {
            "parameters": parameters,
            **{half: errors(chip, part) for half, part in halves.items()},
            "later": errors(chip, [c for c in later if c["chip"] == name]),
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
