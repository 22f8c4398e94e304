"""What recipes found by search cost, beside uniform ones of the same bytes.

    python benchmarks/quality/search.py MODEL --calibration CAL.npy --held-out VALID.npy --test TEST.npy [--json OUT]

For each uniform recipe the search gets its bytes as the budget; both are compiled and measured on TEST.npy as in
`benchmarks/quality/compression.py`. VALID.npy: what the search measures its points on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from compression import INT3, INT4, coded, losses

import jisu


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name in ("calibration", "held-out", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    given = parser.parse_args()
    tokens, held_out, windows = (np.load(p).astype(np.int64) for p in (given.calibration, given.held_out, given.test))
    head = {"quantize": {"layers": "head", "scheme": "none"}}
    with tempfile.TemporaryDirectory() as cache:
        dense = jisu.compile(given.model, cache_dir=cache)
        size = sum(len(dense.tokenizer.decode(w.tolist()).encode()) for w in windows) / windows.size
        before = losses(dense, windows) / math.log(2) / size

        def lost(recipe: Any) -> tuple[float, float, int]:
            program = jisu.compile(given.model, recipe=recipe, calibration=tokens, cache_dir=cache)
            found = losses(program, windows) / math.log(2) / size - before
            stored = next(p["weight_bytes"] for p in program.explain()["passes"] if p["name"] == "compress")
            return float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found))), stored

        uniform = {name: lost(coded(entry)) for name, entry in (("int4 g128", INT4), ("int3 g128", INT3))}
        begin = time.perf_counter()
        front = jisu.search(
            given.model,
            calibration=tokens,
            held_out=held_out,
            recipe=head,
            budgets=[u[2] for u in uniform.values()],
            cache_dir=cache,
        )
        seconds = time.perf_counter() - begin
        print("| bytes of | uniform, bits per byte | searched | ratio | bytes |\n|---|---|---|---|---|")
        rows: dict[str, Any] = {}
        for name, point in zip(uniform, front.points, strict=True):
            found, plain = lost(point.recipe), uniform[name]
            rows[name] = {
                "uniform": plain,
                "searched": found,
                "recipe": point.recipe.to_toml(),
                "expected": point.expected,
                "held_out": point.loss,
            }
            print(
                f"| {name} | {plain[0]:.4f} ± {plain[1]:.4f} | {found[0]:.4f} ± {found[1]:.4f} | {found[0] / plain[0]:.2f} | {found[2]} of {plain[2]} |"
            )
    if given.json:
        whole = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "versions": {n: version(n) for n in ("jisu", "numpy", "apache-tvm")},
            "seconds": seconds,
            "rows": rows,
        }
        given.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
