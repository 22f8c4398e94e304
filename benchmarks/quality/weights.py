"""What quantizing weights costs in bits per byte, by scheme and algorithm, on held-out windows.

    python benchmarks/quality/weights.py MODEL --calibration CAL.npy --test TEST.npy [--json OUT]

MODEL: a checkpoint folder with a tokenizer. CAL.npy, TEST.npy: token ids [windows, length]; CAL may be given several times, for
the spread over calibration sets. Loss is the mean next-token loss within a window, in the compiled program, as bits per byte
of the windows' text; what is lost is its difference to the unchanged model over the same windows, with its standard error. The
embedding and the layer that gives the logits stay as they are.
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

import jisu
from jisu.compiler.schemes import SCHEMES

PLAIN = {"search": 0, "match": 0.0, "refine": 0}
ROWS: dict[str, dict[str, Any]] = {
    "int8, nearest": {"scheme": "int8", "algorithm": "rtn"},
    "fp8, nearest": {"scheme": "fp8", "algorithm": "rtn"},
    "int4 g128, nearest": {"scheme": "int4", "algorithm": "rtn", "symmetric": False},
    "int4 g128, plain GPTQ": {"scheme": "int4", "symmetric": False, **PLAIN},
    "int4 g128": {"scheme": "int4", "symmetric": False},
    "int4 g32": {"scheme": "int4", "symmetric": False, "group": 32},
    "int3 g128, plain GPTQ": {"scheme": "int3", "symmetric": False, **PLAIN},
    "int3 g128": {"scheme": "int3", "symmetric": False},
    "mxfp4, nearest": {"scheme": "mxfp4", "algorithm": "rtn"},
    "mxfp4": {"scheme": "mxfp4"},
    "nvfp4, nearest": {"scheme": "nvfp4", "algorithm": "rtn"},
    "nvfp4": {"scheme": "nvfp4"},
    "nf4 g64, nearest": {"scheme": "nf4", "algorithm": "rtn"},
    "nf4 g64": {"scheme": "nf4"},
}
"""Rows of the table: fields of a recipe's entry for all layers but the head."""


def losses(program: jisu.Program, windows: np.ndarray) -> np.ndarray:
    """Mean next-token loss in nats of each window."""
    found = []
    for part in windows:
        logits = np.asarray(program(input_ids=part[None]).logits[0, :-1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, part[1:, None], -1)[:, 0]
        found.append(float((np.log(np.exp(logits).sum(-1)) - chosen).mean()))
    return np.array(found)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", default="", help="comma-separated names, or parts of them (default: all)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    given = parser.parse_args()
    windows = np.load(given.test).astype(np.int64)
    sets = [np.load(path).astype(np.int64) for path in given.calibration]
    wanted = [w for w in given.rows.split(",") if w]
    with tempfile.TemporaryDirectory() as cache:
        dense = jisu.compile(given.model, cache_dir=cache)
        size = sum(len(dense.tokenizer.decode(w.tolist()).encode()) for w in windows) / windows.size
        to_bits = 1 / math.log(2) / size
        before = losses(dense, windows) * to_bits
        print(f"unchanged: {before.mean():.4f} bits per byte, {dense.weights_bytes:,} bytes of weights")
        results: dict[str, Any] = {}
        print("| weights | lost, bits per byte | over calibration sets | seconds |\n|---|---|---|---|")
        for name, entry in ROWS.items():
            if wanted and not any(w in name for w in wanted):
                continue
            rules = {"quantize": [entry, {"layers": "head", "scheme": "none"}]}
            lost, seconds, weights = [], [], 0
            for tokens in [None] if entry.get("algorithm") == "rtn" else sets:
                begin = time.perf_counter()
                program = jisu.compile(given.model, recipe=rules, calibration=tokens, cache_dir=cache)
                seconds.append(time.perf_counter() - begin)
                lost.append(losses(program, windows) * to_bits - before)
                weights = program.weights_bytes
            means = [float(d.mean()) for d in lost]
            error = float(lost[0].std(ddof=1) / math.sqrt(len(windows)))
            results[name] = {
                "lost": means,
                "stderr": error,
                "seconds": seconds,
                "weights_bytes": weights,
                "recipe": rules,
            }
            spread = f"{min(means):.4f} to {max(means):.4f}" if len(means) > 1 else ""
            print(f"| {name} | {np.mean(means):.4f} ± {error:.4f} | {spread} | {np.mean(seconds):.0f} |", flush=True)
    if given.json:
        whole = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "versions": {n: version(n) for n in ("jisu", "numpy", "apache-tvm")},
            "schemes": {name: {"bits": s.bits, "group": s.group} for name, s in SCHEMES.items()},
            "unchanged_bits_per_byte": float(before.mean()),
            "rows": results,
        }
        given.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
