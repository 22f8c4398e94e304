"""What compression costs in bits per byte, by recipe, on held-out windows.

    python benchmarks/quality/compression.py MODEL --calibration CAL.npy --test TEST.npy [--training TEXT] [--json OUT]

MODEL: a checkpoint folder with a tokenizer. CAL.npy, TEST.npy: token ids [windows, length]; CAL may be given several times, for
the spread over calibration sets. TEXT: what rows with recovery train on; without, they are left out ("tuned": on CAL
alone). Loss is the mean next-token loss within a window, in the compiled program, as bits per byte of the windows' text; what is lost is its
difference to the unchanged model over the same windows, with its standard error. The embedding and the layer that gives the logits
stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
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
from jisu.compiler.recipe import Recipe
from jisu.compiler.schemes import SCHEMES

PLAIN: dict[str, Any] = {"search": 0, "match": 0.0, "refine": 0, "objective": "output"}
INT4, INT3 = {"scheme": "int4", "symmetric": False}, {"scheme": "int3", "symmetric": False}
HALF, OPTIMAL = {"sparsity": 0.5}, {"sparsity": 0.5, "allocation": "optimal"}
RECOVER = {"steps": 700, "minutes": 12}
TUNE = {"steps": 320, "minutes": 8}
BLOCKS = {"blocks": 200, "learning_rate": 0.001}


def coded(entry: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe that quantizes all layers but the head."""
    return {"quantize": [entry, {"layers": "head", "scheme": "none"}], **more}


ROWS: dict[str, dict[str, Any]] = {
    "int8, nearest": coded({"scheme": "int8", "algorithm": "rtn"}),
    "fp8, nearest": coded({"scheme": "fp8", "algorithm": "rtn"}),
    "int4 g128, nearest": coded({**INT4, "algorithm": "rtn"}),
    "int4 g128, AWQ": coded({**INT4, "algorithm": "awq"}),
    "int4 g128, plain GPTQ": coded({**INT4, **PLAIN}),
    "int4 g128": coded(INT4),
    "int4 g128, by outputs": coded({**INT4, "objective": "output"}),
    "int4 g128, tuned": coded(INT4, recover=TUNE),
    "int4 g128, learned": coded({**INT4, "algorithm": "autoround"}, recover={"learning_rate": 0.001}),
    "int4 g32": coded({**INT4, "group": 32}),
    "int3 g128, plain GPTQ": coded({**INT3, **PLAIN}),
    "int3 g128": coded(INT3),
    "int3 g128, tuned": coded(INT3, recover=TUNE),
    "int3 g128, learned": coded({**INT3, "algorithm": "autoround"}, recover={"learning_rate": 0.001}),
    "int2 g64": coded({"scheme": "int2", "symmetric": False, "group": 64}),
    "mxfp4, nearest": coded({"scheme": "mxfp4", "algorithm": "rtn"}),
    "mxfp4": coded({"scheme": "mxfp4"}),
    "nvfp4, nearest": coded({"scheme": "nvfp4", "algorithm": "rtn"}),
    "nvfp4": coded({"scheme": "nvfp4"}),
    "nf4 g64, nearest": coded({"scheme": "nf4", "algorithm": "rtn"}),
    "nf4 g64": coded({"scheme": "nf4"}),
    "W8A8 per token": coded({"scheme": "int8", "algorithm": "rtn", "activations": "int8"}),
    "W8A8 static": coded({"scheme": "int8", "algorithm": "rtn", "activations": "int8", "activation_range": "static"}),
    "W8A8 static, SmoothQuant 0.85": coded(
        {"scheme": "int8", "algorithm": "rtn", "activations": "int8", "activation_range": "static", "smooth": 0.85}
    ),
    "W8A8 fp8": coded({"scheme": "fp8", "algorithm": "rtn", "activations": "fp8"}),
    "int4 g128, A8 per token": coded({**INT4, "activations": "int8", "activation_group": 0}),
    "int4 g128, A8 per group": coded({**INT4, "activations": "int8"}),
    "W4A4 nvfp4": coded({"scheme": "nvfp4", "activations": "nvfp4"}),
    "KV cache int8": {"cache": {"scheme": "int8"}},
    "KV cache int4": {"cache": {"scheme": "int4"}},
    "int4 g128, A8 per group, KV cache int4": coded({**INT4, "activations": "int8"}, cache={"scheme": "int4"}),
    "magnitude 50 %": {"prune": {**HALF, "algorithm": "magnitude"}},
    "Wanda 50 %": {"prune": {**HALF, "algorithm": "wanda", "match": 0}},
    "SparseGPT 50 %": {"prune": {**HALF, "algorithm": "sparsegpt", "match": 0}},
    "50 %": {"prune": HALF},
    "50 %, OWL": {"prune": {**HALF, "allocation": "owl"}},
    "50 %, shares by loss": {"prune": OPTIMAL},
    "60 %, shares by loss": {"prune": {**OPTIMAL, "sparsity": 0.6}},
    "2:4": {"prune": "2:4"},
    "2:4, by outputs": {"prune": {"pattern": "2:4", "objective": "output"}},
    "2:4, blocks": {"prune": "2:4", "recover": BLOCKS},
    "50 % + int4 g128": coded(INT4, prune=HALF),
    "2:4 + int4 g128": coded(INT4, prune="2:4"),
}
"""Recipes by row, made of calibration windows alone, or of none."""

RECOVERED: dict[str, dict[str, Any]] = {
    "50 %, shares by loss, recovered": {"prune": OPTIMAL, "recover": RECOVER},
    "50 %, shares by loss, recovered + int4 g128": coded(INT4, prune=OPTIMAL, recover=RECOVER),
    "2:4, recovered": {"prune": "2:4", "recover": RECOVER},
    "2:4, recovered + int4 g128": coded(INT4, prune="2:4", recover=RECOVER),
}
"""Recipes by row that are trained on text."""


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
    parser.add_argument("--training", type=Path, help="text for rows with recovery")
    parser.add_argument("--row", action="append", default=[], help="a name, or a pattern such as '2:4*' (default: all)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    given = parser.parse_args()
    windows = np.load(given.test).astype(np.int64)
    sets = [np.load(path).astype(np.int64) for path in given.calibration]
    with tempfile.TemporaryDirectory() as cache:
        dense = jisu.compile(given.model, cache_dir=cache)
        size = sum(len(dense.tokenizer.decode(w.tolist()).encode()) for w in windows) / windows.size
        to_bits = 1 / math.log(2) / size
        before = losses(dense, windows) * to_bits
        print(f"unchanged: {before.mean():.4f} bits per byte, {dense.weights_bytes:,} bytes of weights")
        results: dict[str, Any] = {}
        print("| recipe | lost, bits per byte | over calibration sets | seconds |\n|---|---|---|---|")
        rows = ROWS if given.training is None else {**ROWS, **RECOVERED}
        for name, rules in rows.items():
            if given.row and not any(fnmatch.fnmatchcase(name, pattern) for pattern in given.row):
                continue
            recipe = Recipe.from_dict(rules)
            lost, seconds, weights = [], [], 0
            for tokens in sets if recipe.calibrated else [None]:
                begin = time.perf_counter()
                program = jisu.compile(
                    given.model, recipe=recipe, calibration=tokens, cache_dir=cache,
                    training=str(given.training) if name in RECOVERED else None,
                )  # fmt: skip
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
