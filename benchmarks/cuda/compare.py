"""jisu on an NVIDIA GPU beside torch, in one command, of what pack.py compiled elsewhere.

    python benchmarks/cuda/compare.py pack --budget 540 --json out.json

Parts, the most telling first, each in a process of its own: whether a small model is right (`check`; nothing is measured where it isn't), the GPU's copy
bandwidth, decode steps behind a context (batch 1, then, with paged caches, 32 and 128), a prompt's matrix products beside torch.matmul and its attention
beside torch's, and the prompt. The peer of whole models is transformers' with its static cache under `torch.compile(mode="max-autotune")`, on the same
weights. jisu and the peer take turns; a ratio is the median over rounds of the peer's time to jisu's of the same round. Results are compared before they
are timed. The JSON is written whole after each part, so that what was found stays when time or a part gives out; `--json` of an earlier run is gone on
with where `--parts` names others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, versions, write_json  # noqa: E402

GOALS = {
    "decode_1 bfloat16, share of copy bandwidth": 0.85, "decode_1 bfloat16, times torch.compile": 1.2, "decode_1 int4, times bfloat16": 2.8,
    "decode_1 bfloat16, share in kernels": 0.95, "products, least times cuBLAS": 0.85, "attention, times torch": 0.90,
    "prefill bfloat16, times torch.compile": 1.0,
    **{f"decode_{b} {form}, times torch.compile": 1.2 for b in (32, 128) for form in ("bfloat16", "int4")},
    "compile_s bfloat16, at most": 120.0, "compile_s int4, at most": 120.0,
}  # fmt: skip
_LEAST = 20.0  # seconds that a part is worth being begun with
_MOST = 0.6  # of the whole time, for one part
_NOTHING: dict[str, Any] = {}


def run(pack: Path, name: str, rounds: int, limit: float) -> dict[str, Any]:
    """What a part found; under "error", why it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "part.json", Path(folder) / "log"
        command = [
            sys.executable,
            str(Path(__file__).with_name("parts.py")),
            str(pack),
            name,
            str(out),
            "--rounds",
            str(rounds),
        ]
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors, start_new_session=True)
            try:
                code = process.wait(limit)
                error = "\n".join(log.read_text().strip().splitlines()[-12:]) or f"status {code}" if code else ""
            except subprocess.TimeoutExpired:
                error = f"stopped after {limit:.0f} s"
            finally:  # the processes by which torch compiles are of its session
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return {**found, **({"error": error} if error else {})}


def parts_of(told: dict[str, Any]) -> list[str]:
    """All parts, in the order in which they matter."""
    one, *others = (f"decode_{batch}" for batch in told["batches"])
    return ["check", "copy", one, "products", "attention", "prefill", *others]


def figures(parts: dict[str, Any], programs: dict[str, Any]) -> dict[str, float | None]:
    """What is asked for, as far as it was found."""

    def at(*path: str) -> Any:
        here: Any = parts
        for key in path:
            here = here.get(key) if isinstance(here, dict) else None
        return here

    def ratio(one: Any, other: Any) -> float | None:
        return one / other if one and other else None

    attended = [
        c["ratio"]["median"] for c in parts.get("attention", _NOTHING).values() if isinstance(c, dict) and "ratio" in c
    ]
    multiplied = [
        c["ratio"]["median"]
        for n, c in parts.get("products", _NOTHING).items()
        if n.startswith("product") and "ratio" in c
    ]
    behind = ("beside torch.compile", "ratio", "median")
    found: dict[str, float | None] = {
        "decode_1 bfloat16, share of copy bandwidth": ratio(
            at("decode_1", "bfloat16", "bytes_per_s"), at("copy", "bytes_per_s")
        ),
        "decode_1 bfloat16, times torch.compile": at("decode_1", "bfloat16", *behind),
        "decode_1 int4, times bfloat16": ratio(
            at("decode_1", "bfloat16", "median_s", "jisu"), at("decode_1", "int4", "median_s", "jisu")
        ),
        "decode_1 bfloat16, share in kernels": at("decode_1", "bfloat16", "in_kernels", "median"),
        "products, least times cuBLAS": min(multiplied, default=None),
        "attention, times torch": min(attended, default=None),
        "prefill bfloat16, times torch.compile": at("prefill", "bfloat16", *behind),
    }
    for batch in (32, 128):
        for form in ("bfloat16", "int4"):
            found[f"decode_{batch} {form}, times torch.compile"] = at(f"decode_{batch}", form, *behind)
    for form in ("bfloat16", "int4"):
        found[f"compile_s {form}, at most"] = programs.get(form, _NOTHING).get("compile_s")
    return found


def compare(pack: Path, names: list[str] | None, budget: float, rounds: int, out: Path | None) -> dict[str, Any]:
    """Run the parts while there is time; what they found, also written to `out` after each."""
    begin = time.perf_counter()
    told = json.loads((pack / "pack.json").read_text())
    before = json.loads(out.read_text()) if out is not None and out.exists() else _NOTHING
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "pack": told,
        "parts": dict(before.get("parts", _NOTHING)),
    }  # fmt: skip
    for name in parts_of(told) if names is None else names:
        left = budget - (time.perf_counter() - begin)
        wrong = "error" in result["parts"].get("check", _NOTHING)
        if left < _LEAST or wrong:
            why = "the check found wrong results" if wrong else f"{left:.0f} s of {budget:.0f} s were left"
            result["parts"].setdefault(name, {"error": f"not run: {why}"})
        else:
            result["parts"][name] = run(pack, name, rounds, min(left, _MOST * budget))
        error = result["parts"][name].get("error", "")
        print(
            f"{name:11} {time.perf_counter() - begin:5.0f} s {error.splitlines()[-1] if error else 'done'}", flush=True
        )
        result["figures"] = figures(result["parts"], told["programs"])
        if out is not None:
            write_json(out, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, help="the folder that pack.py wrote")
    parser.add_argument("--parts", help="some of them, by commas")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in which all must be done")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.parts.split(",") if options.parts else None
    result = compare(options.pack, names, options.budget, options.rounds, options.json)
    for name, value in result["figures"].items():
        print(f"{name:45} {'not run' if value is None else f'{value:.3g}':>8}   (asked: {GOALS[name]:g})")


if __name__ == "__main__":
    main()
