"""jisu against PyTorch on a Llama of the 160M class, side by side in one run.

    python benchmarks/llama_160m.py --threads 1,2 --json benchmarks/results/llama_160m.json

Every engine stands in a process of its own and they take turns, so that a slow moment of the machine hits all alike.
See benchmarks/README.md for what is measured, and how.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from common import Spread, Worker, machine, one_answer, paired_ratio, versions
from rich.console import Console
from rich.table import Table
from worker import SEED, SHAPE, TINY

ITEMSIZE = {"float32": 4, "bfloat16": 2}
Keep = Callable[[dict[str, Any]], None]


@attrs.frozen
class Lane:
    """One way to generate: an engine, with a kind of cache."""

    engine: str
    cache: str

    def __str__(self) -> str:
        return self.engine if self.cache == "session" else f"{self.engine}, {self.cache} cache"


@attrs.frozen
class Plan:
    """What to measure. subject: the engine that is compared with the peers."""

    subject: str
    peers: tuple[str, ...]
    prompts: tuple[int, ...]
    gen: int
    repeat: int
    folder: Path

    @property
    def engines(self) -> tuple[str, ...]:
        """The subject and its peers."""
        return (self.subject, *self.peers)

    def environment(self, threads: int) -> dict[str, str]:
        """Of a worker that may use so many threads."""
        count = str(threads)
        return {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
        }

    def log(self, name: str) -> Path:
        """Where a worker's standard error goes."""
        return self.folder / f"{name}.log"


# --- Parts of a run ------------------------------------------------------------------------------------------------


def make_checkpoint(plan: Plan, dtype: str, tiny: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's folder and its sizes; made where it isn't there yet."""
    key = hashlib.sha256(json.dumps([SEED, SHAPE, TINY if tiny else {}]).encode()).hexdigest()[:12]
    folder = plan.folder / f"llama-{key}-{dtype}"
    facts = folder / "facts.json"
    if not facts.exists():
        options = ["checkpoint", "--checkpoint", str(folder), "--dtype", dtype, *(["--tiny"] if tiny else [])]
        facts.write_text(json.dumps(one_answer(options, plan.environment(1), plan.log("checkpoint"))))
    found: dict[str, Any] = json.loads(facts.read_text())
    return folder, {**found, "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}


def measure_compile(plan: Plan, checkpoint: Path, threads: int) -> dict[str, Any]:
    """Compile a checkpoint in new processes: with an empty cache, then with what that left there.

    A process before each imports nothing beforehand, and so tells what `jisu.compile` needs: the measured one imports
    just that first, so that imports stand apart.
    """
    cache = Path(tempfile.mkdtemp(prefix="cold-", dir=plan.folder))
    base = ["compile", "--checkpoint", str(checkpoint), "--cache", str(cache), "--threads", str(threads)]

    def run(preload: Sequence[str]) -> dict[str, Any]:
        options = [*base, "--preload", ",".join(preload)]
        return one_answer(options, plan.environment(threads), plan.log("compile-jisu"))

    try:
        cold_needs = run(())["imported"]
        shutil.rmtree(cache)
        cold = run(cold_needs)
        warm_needs = run(())["imported"]
        return {"cold": cold, "warm": run(warm_needs)}
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def check(plan: Plan, workers: Mapping[str, Worker], dtype: str, prompt: list[int]) -> dict[str, Any]:
    """Compare the subject with eager before anything is timed.

    Both continue the prompt greedily (float32 has to agree), and give logits over prompt and continuation, held
    against eager in float32.
    """
    subject, eager = workers[plan.subject], workers["eager"]
    lane = "session" if plan.subject == "jisu" else "static"
    mine = subject.ask(do="generate", lane=lane, prompt=prompt, steps=plan.gen)["tokens"]
    theirs = eager.ask(do="generate", lane="dynamic", prompt=prompt, steps=plan.gen)["tokens"]
    found: dict[str, Any] = {
        "greedy_tokens": len(theirs),
        "distinct_tokens": len(set(theirs)),
        "greedy_agree": next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs)),
    }
    if plan.subject != "jisu":
        return found
    path = plan.folder / "logits.npy"

    def logits(worker: Worker, exact: bool) -> np.ndarray:
        worker.ask(do="logits", ids=[*prompt, *theirs[:-1]], exact=exact, path=str(path))
        return np.asarray(np.load(path))

    truth = logits(eager, True)
    found["logit_scale"] = float(truth.std())
    found["max_logit_difference"] = float(np.abs(logits(subject, False) - truth).max())
    if dtype != "float32":
        found["eager_max_logit_difference"] = float(np.abs(logits(eager, False) - truth).max())
    path.unlink()
    return found


def measure_speed(
    plan: Plan,
    workers: Mapping[str, Worker],
    lanes: Sequence[Lane],
    prompts: Mapping[int, list[int]],
    note: Callable[[str], None],
) -> dict[int, dict[Lane, list[dict[str, Any]]]]:
    """Per prompt length and lane, one measurement per round; odd rounds go through the lanes backwards."""
    found: dict[int, dict[Lane, list[dict[str, Any]]]] = {n: {lane: [] for lane in lanes} for n in prompts}
    for n, prompt in prompts.items():
        for lane in lanes:  # warm-up: torch.compile compiles, caches are allocated
            workers[lane.engine].ask(do="generate", lane=lane.cache, prompt=prompt, steps=plan.gen)
        note(f"{n} tokens: warmed up")
        for turn in range(plan.repeat):
            for lane in lanes if turn % 2 == 0 else reversed(lanes):
                worker = workers[lane.engine]
                found[n][lane].append(worker.measure(do="generate", lane=lane.cache, prompt=prompt, steps=plan.gen))
            note(f"{n} tokens: round {turn + 1} of {plan.repeat}")
    return found


# --- Results -------------------------------------------------------------------------------------------------------


def summarise(
    plan: Plan, dtype: str, threads: int, n: int, runs: Mapping[Lane, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Tokens/s per lane with the ratio of the subject to it, and per peer the ratio to its fastest lane.

    `…_cpu` counts tokens per CPU second and thread: on a loaded machine it says more, spinning threads apart.
    """
    speeds = {
        "prefill": {lane: [n / r["prefill_s"] for r in rs] for lane, rs in runs.items()},
        "decode": {lane: [plan.gen / r["decode_s"] for r in rs] for lane, rs in runs.items()},
        "prefill_cpu": {lane: [threads * n / r["prefill_cpu_s"] for r in rs] for lane, rs in runs.items()},
        "decode_cpu": {lane: [threads * plan.gen / r["decode_cpu_s"] for r in rs] for lane, rs in runs.items()},
    }
    mine = {kind: next(v for lane, v in by.items() if lane.engine == plan.subject) for kind, by in speeds.items()}
    lanes = {}
    for lane, rs in runs.items():
        row: dict[str, Any] = {"foreign_cores": attrs.asdict(Spread.of([r["foreign"] for r in rs]))}
        for kind, by in speeds.items():
            row[kind] = attrs.asdict(Spread.of(by[lane]))
            row[f"{kind}_ratio"] = attrs.asdict(paired_ratio(mine[kind], by[lane]))
            row[f"{kind}_rounds"] = by[lane]
        lanes[str(lane)] = row
    best: dict[str, Any] = {}
    for peer in plan.peers:
        best[peer] = {}
        for kind, by in speeds.items():
            fastest = max((lane for lane in by if lane.engine == peer), key=lambda lane: Spread.of(by[lane]).median)
            best[peer][kind] = {"lane": str(fastest), **attrs.asdict(paired_ratio(mine[kind], by[fastest]))}
    return {"dtype": dtype, "threads": threads, "prompt": n, "gen": plan.gen, "lanes": lanes, "ratios": best}


def limits(facts: Mapping[str, Any], dtype: str, roof: Mapping[str, float]) -> dict[str, float]:
    """Tokens/s that the machine allows: decode reads layers and head once per token, prefill multiplies layers only.

    Products count at torch's float32 rate or the dtype's own, whichever is higher.
    """
    flops = max(roof["float32_flops"], roof[f"{dtype}_flops"])
    read = facts["parameters"] - facts["embedding_parameters"]
    return {
        "decode": roof["read_bytes_per_s"] / (read * ITEMSIZE[dtype]),
        "prefill": flops / (2 * facts["layer_parameters"]),
    }


def speed_table(result: Mapping[str, Any], bound: Mapping[str, float]) -> Table:
    """One table per dtype, threads and prompt."""
    title = f"{result['dtype']}, {result['threads']} thread(s), prompt {result['prompt']}, {result['gen']} generated"
    caption = f"roofline: prefill {bound['prefill']:.0f}, decode {bound['decode']:.1f} tokens/s"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("engine")
    heads = ("prefill tokens/s", "ratio", "CPU ratio", "decode tokens/s", "ratio", "CPU ratio", "foreign")
    for name in heads:
        table.add_column(name, justify="right")
    for name, row in result["lanes"].items():
        table.add_row(
            name,
            Spread(**row["prefill"]).format(0),
            Spread(**row["prefill_ratio"]).format(2),
            f"{row['prefill_cpu_ratio']['median']:.2f}",
            Spread(**row["decode"]).format(1),
            Spread(**row["decode_ratio"]).format(2),
            f"{row['decode_cpu_ratio']['median']:.2f}",
            f"{row['foreign_cores']['median']:.1f}",
        )
    return table


def compile_table(dtype: str, found: Mapping[str, Any]) -> Table:
    """Seconds and memory of compiling the checkpoint, cold and warm."""
    table = Table(title=f"jisu.compile, {dtype}", title_justify="left")
    table.add_column("process")
    heads = ("imports s", "compile s", "first call s", "peak MiB", "peak before MiB", "children MiB", "weights MiB")
    for name in heads:
        table.add_column(name, justify="right")
    for name, row in found.items():
        sizes = ("peak_bytes", "peak_before_bytes", "children_peak_bytes", "weights_bytes")
        seconds = ("imports_s", "compile_s", "first_call_s")
        table.add_row(name, *(f"{row[k]:.2f}" for k in seconds), *(f"{row[k] / 2**20:.0f}" for k in sizes))
    return table


# --- The run -------------------------------------------------------------------------------------------------------


def run(plan: Plan, dtypes: Sequence[str], threads: Sequence[int], tiny: bool, console: Console, keep: Keep) -> None:
    """All measurements, shown as they come; `keep` is given what there is so far, time and again."""
    results: dict[str, Any] = {"checks": [], "compile": {}, "speed": [], "limits": [], "roofs": {}, "model": {}}
    for n in threads:
        results["roofs"][n] = one_answer(["roofs", "--threads", str(n)], plan.environment(n), plan.log("roofs"))
    for dtype in dtypes:
        checkpoint, facts = make_checkpoint(plan, dtype, tiny)
        results["model"][dtype] = facts
        generator = np.random.default_rng(SEED)
        prompts = {n: generator.integers(3, facts["vocab"], n).tolist() for n in plan.prompts}
        if plan.subject == "jisu":
            results["compile"][dtype] = measure_compile(plan, checkpoint, max(threads))
            console.print(compile_table(dtype, results["compile"][dtype]))
        for n in threads:
            bound = limits(facts, dtype, results["roofs"][n])
            results["limits"].append({"dtype": dtype, "threads": n, **bound})
            with ExitStack() as stack, console.status("starting") as status:
                workers, lanes = start(plan, stack, checkpoint, n)
                if "eager" in workers:
                    verdict = {"dtype": dtype, "threads": n, **check(plan, workers, dtype, prompts[plan.prompts[0]])}
                    results["checks"].append(verdict)
                    console.print(verdict)
                runs = measure_speed(plan, workers, lanes, prompts, status.update)
            for length, found in runs.items():
                results["speed"].append(summarise(plan, dtype, n, length, found))
                console.print(speed_table(results["speed"][-1], bound))
            keep(results)


def start(plan: Plan, stack: ExitStack, checkpoint: Path, threads: int) -> tuple[dict[str, Worker], list[Lane]]:
    """A worker per engine, which lives as long as `stack`, and the lanes that they offer."""
    workers: dict[str, Worker] = {}
    lanes: list[Lane] = []
    for engine in plan.engines:
        options = ["serve", "--engine", engine, "--checkpoint", str(checkpoint), "--threads", str(threads)]
        options += ["--cache", str(plan.folder / "jisu")]
        worker = stack.enter_context(Worker(options, plan.environment(threads), plan.log(f"{engine}-{threads}")))
        lanes += [Lane(engine, cache) for cache in worker.answer()["lanes"]]
        workers[engine] = worker
    return workers, lanes


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--threads", type=_numbers, default=(1, 2), help="comma-separated (default: 1,2)")
    parser.add_argument("--prompt", type=_numbers, default=(128, 512), help="comma-separated (default: 128,512)")
    parser.add_argument("--gen", type=int, default=32, help="tokens to generate after the first (default: 32)")
    parser.add_argument("--repeat", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--peers", default="eager,compile", help="of eager, compile, frozen (default: eager,compile)")
    parser.add_argument("--subject", default="jisu", help="the engine that peers are compared with (default: jisu)")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--folder", type=Path, help="for checkpoints and compiled kernels, kept between runs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    given = parser.parse_args()
    folder = given.folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jisu-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    peers = tuple(name for name in given.peers.split(",") if name)
    plan = Plan(given.subject, peers, given.prompt, given.gen, given.repeat, folder)
    dtypes = ("float32", "bfloat16") if given.dtype == "both" else (given.dtype,)
    console = Console(width=None if sys.stdout.isatty() else 150)
    header = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "load_before": os.getloadavg()[0],
    }
    console.print(header)

    def keep(results: dict[str, Any]) -> None:
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            whole = {**header, **results, "load_after": os.getloadavg()[0]}
            given.json.write_text(json.dumps(whole, indent=1) + "\n")

    run(plan, dtypes, given.threads, given.tiny, console, keep)


if __name__ == "__main__":
    main()
