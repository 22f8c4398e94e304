"""jisu beside the engines that people use on CPUs, on one machine, at the same number of bits, in one run.

    python benchmarks/cpu/compare.py --shape 160m --forms int4,int8 --threads 1,2 \\
        --python openvino=venvs/ov/bin/python --python ctranslate2=venvs/ct2/bin/python --json out.json --markdown out.md --plot out.html

All engines have the same random weights, each converted to its own form by its own tools, once, under --folder. For a number of
bits and of threads every engine stands in a process of its own; they take turns, A B C, C B A, …, with a new prompt each time. A
ratio is the median over rounds of jisu's speed to the other's of the same round. An engine whose package is missing, or that can't
run a form, is named with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

sys.path.insert(0, str(Path(__file__).parent.parent))
import models  # noqa: E402
from common import Spread, Worker, WorkerError, machine, paired_ratio, versions  # noqa: E402
from engines import ENGINES, FORMS  # noqa: E402

SCRIPT = Path(__file__).with_name("engines.py")
SUBJECT = "jisu"


@attrs.frozen
class Plan:
    """What is run, and where."""

    folder: Path
    pythons: Mapping[str, str]
    engines: tuple[str, ...]
    rounds: int

    def worker(self, engine: str, arguments: Sequence[str], threads: int) -> Worker:
        """A process of an engine."""
        count = str(threads)
        environment = {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
        }
        python = self.pythons.get(engine.removesuffix("-fa"), sys.executable)
        log = self.folder / f"{engine}.log"
        return Worker(["--engine", engine, *arguments], environment, log, script=SCRIPT, python=python)

    def one(self, engine: str, *arguments: str) -> dict[str, Any]:
        """One answer of such a process."""
        with self.worker(engine, arguments, 2) as worker:
            return worker.answer()


def converted(plan: Plan, engine: str, shape: str, form: str) -> tuple[Path | None, str]:
    """Where an engine finds the model in this form, or why it has none."""
    name = engine.removesuffix("-fa")
    out = plan.folder / shape / f"{name}-{form}"
    if (out / "complete").exists():
        return out, ""
    # jisu computes in the checkpoint's dtype; codes are multiplied to float32, as in the other engines.
    dtype = "float32" if form == "float32" or (name == SUBJECT and form.startswith("int")) else "bfloat16"
    checkpoint = plan.folder / shape / f"checkpoint-{dtype}"
    models.make(shape, dtype, checkpoint)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = out / "program.jisu" if name == SUBJECT else out
    try:
        plan.one(engine, "--checkpoint", str(checkpoint), "--form", form, "--out", str(model), "convert")
    except WorkerError as error:
        shutil.rmtree(out, ignore_errors=True)
        return None, str(error).strip().splitlines()[-1]
    (out / "complete").touch()
    return out, ""


def measure(
    plan: Plan,
    found: Mapping[str, Path],
    shape: str,
    threads: int,
    cells: Sequence[tuple[int, int]],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Speeds by engine and cell (prompt, steps; of an encoder length, batch): prefill and decode in tokens per second, a number per
    round; and who couldn't start."""
    vocabulary = str(models.SHAPES[shape]["vocab_size"])
    facts: dict[str, Any] = {}
    speeds: dict[str, dict[str, dict[str, list[float]]]] = {}
    left_out: dict[str, str] = {}
    encodes = shape in models.ENCODERS
    with ExitStack() as stack:
        workers = {}
        for engine, folder in found.items():
            model = folder / "program.jisu" if engine == SUBJECT else folder
            arguments = ["--model", str(model), "--threads", str(threads), "--vocabulary", vocabulary, "serve"]
            worker = stack.enter_context(plan.worker(engine, arguments, threads))
            try:
                facts[engine] = worker.answer()
            except WorkerError as error:  # some find out when they load a model that they can't run it
                if engine == SUBJECT:
                    raise
                left_out[engine] = str(error).strip().splitlines()[-1]
                continue
            workers[engine], speeds[engine] = worker, {}
        for prompt, number in cells:
            cell = f"{prompt}{'x' if encodes else '+'}{number}"
            steps, batch = (0, number) if encodes else (number, 0)
            # Some compile for these lengths, allocate or measure at the first call.
            for engine, worker in workers.items():
                worker.ask(prompt=prompt, steps=steps, batch=batch, seed=1)
                speeds[engine][cell] = {"prefill": [], "decode": [], "foreign": []}
            for turn in range(plan.rounds):
                for engine in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                    got = workers[engine].measure(prompt=prompt, steps=steps, batch=batch, seed=100 + turn)
                    mine = speeds[engine][cell]
                    mine["prefill"].append(prompt * max(batch, 1) / got["prefill_s"])
                    mine["foreign"].append(got["foreign"])
                    if steps:
                        mine["decode"].append(steps / got["decode_s"])
                    facts[engine]["rss_bytes"] = got["rss_bytes"]
            note(f"{shape} {threads} thread(s) {cell}")
    return {"facts": facts, "speeds": speeds, "left_out": left_out}


def least_bytes(shape: str, form: str) -> tuple[float, float]:
    """Bytes of weights that one token needs at least (layers in this form, the head in 8 bits of codes), and products of the layers."""
    c = models.SHAPES[shape]
    h, f, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head, encodes = c.get("head_dim") or h // heads, shape in models.ENCODERS
    layer = h * head * (2 * heads + 2 * c.get("num_key_value_heads", heads)) + (2 if encodes else 3) * h * f
    layers, top = layer * c["num_hidden_layers"], 0 if encodes else h * c["vocab_size"]
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4 + 16 / 128}[form]
    return (layers * bits + top * min(max(bits, 8), 32)) / 8, layers


def rows(result: Mapping[str, Any], roof: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row per cell and kind: each engine's spread, jisu's ratio to it, and the bound of the machine."""
    found = []
    weights, products = least_bytes(result["shape"], result["form"])
    peak = roof["int8_ops" if result["form"].startswith("int") else "float32_flops"]
    for kind in ("prefill", "decode"):
        for cell in result["speeds"][SUBJECT]:
            by = {e: s[cell][kind] for e, s in result["speeds"].items() if s[cell][kind]}
            if not by:
                continue
            bound = peak / (2 * products) if kind == "prefill" else roof["read_bytes_per_s"] / weights
            ratios = {e: paired_ratio(by[SUBJECT], v) for e, v in by.items() if e != SUBJECT}
            best = min(ratios, key=lambda e: ratios[e].median) if ratios else None
            found.append({
                "kind": kind, "cell": cell, "bound": bound, "best_peer": best,
                "speeds": {e: attrs.asdict(Spread.of(v)) for e, v in by.items()},
                "ratios": {e: attrs.asdict(r) for e, r in ratios.items()},
                "foreign_cores": max(max(s[cell]["foreign"]) for s in result["speeds"].values()),
            })  # fmt: skip
    return found


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table per shape, form and threads."""
    lines: list[str] = []
    for result in results:
        engines = list(result["speeds"])
        lines += ["", f"### {result['shape']}, {result['form']}, {result['threads']} thread(s), tokens/s", ""]
        lines += [
            f"| | {' | '.join(engines)} | ratio to the best | of the roofline |",
            "|---" * (len(engines) + 3) + "|",
        ]
        for row in result["rows"]:
            cells = [f"{row['speeds'][e]['median']:.1f}" if e in row["speeds"] else "" for e in engines]
            best = row["best_peer"]
            spread = Spread(**row["ratios"][best]).format(2) + f" ({best})" if best else ""
            share = row["speeds"][SUBJECT]["median"] / row["bound"]
            length, _, steps = row["cell"].replace("x", "+").partition("+")
            name = f"prefill {length}" if row["kind"] == "prefill" else f"decode {steps} behind {length}"
            name = f"batch {steps} of {length}" if "x" in row["cell"] else name
            lines.append(f"| {name} | {' | '.join(cells)} | {spread} | {share:.0%} |")
        lines += [f"- {engine}: left out: {why}" for engine, why in result["left_out"].items()]
    return "\n".join(lines).strip() + "\n"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars by engine with the machine's bound, as a page that stands alone."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = [f"{r['shape']} {r['form']} {r['threads']} thread(s)" for r in results]
    figure = make_subplots(
        rows=len(results), cols=2, subplot_titles=[f"{t}: {k}" for t in titles for k in ("prefill", "decode")]
    )
    for number, result in enumerate(results, 1):
        for column, kind in enumerate(("prefill", "decode"), 1):
            found = [row for row in result["rows"] if row["kind"] == kind]
            names = [row["cell"] for row in found]
            for engine in result["speeds"]:
                heights = [row["speeds"].get(engine, {}).get("median") for row in found]
                figure.add_trace(go.Bar(name=engine, x=names, y=heights), row=number, col=column)
            bound = go.Scatter(name="roofline", x=names, y=[row["bound"] for row in found], mode="lines+markers")
            figure.add_trace(bound, row=number, col=column)
    figure.update_layout(height=320 * len(results), title="tokens/s")
    figure.write_html(path, include_plotlyjs=True)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=models.SHAPES)
    parser.add_argument("--forms", default="int4,int8", help=", ".join(FORMS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--cells", help="prompt+generated, …; of an encoder lengthxbatch, …")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PYTHON", help="the Python that has an engine"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "jisu-benchmarks" / "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    plan = Plan(
        given.folder, dict(p.split("=", 1) for p in given.python), tuple(given.engines.split(",")), given.rounds
    )
    plan.folder.mkdir(parents=True, exist_ok=True)

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    left_out, found_versions = {}, {}
    for engine in plan.engines:
        try:
            answer = plan.one(engine, "missing")
            why = f"package {answer['missing']} is missing" if answer["missing"] else ""
            found_versions |= answer["versions"]
        except (WorkerError, OSError) as error:
            why = str(error).splitlines()[-1]
        if why:
            left_out[engine] = why
            note(f"{engine}: {why}")
    roofs, results = {}, []
    for threads in map(int, given.threads.split(",")):
        command = [sys.executable, str(SCRIPT.with_name("roof.py")), "--threads", str(threads)]
        roofs[threads] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        for shape in given.shape or ["160m"]:
            for form in given.forms.split(","):
                out = dict(left_out)
                models_of = {}
                for engine in plan.engines:
                    if engine not in out:
                        folder, why = converted(plan, engine, shape, form)
                        if folder is None:
                            out[engine] = why
                        else:
                            models_of[engine] = folder
                wanted = given.cells or ("128x1,128x8" if shape in models.ENCODERS else "128+32,512+0,1024+32,2048+0")
                pairs = (c.replace("x", "+").partition("+") for c in wanted.split(","))
                cells = [(int(a), int(b)) for a, _, b in pairs]
                measured = measure(plan, models_of, shape, threads, cells, note)
                result = {"shape": shape, "form": form, "threads": threads, **measured}
                result["left_out"] = {**out, **measured["left_out"]}
                results.append({**result, "rows": rows(result, roofs[threads])})
                print(markdown(results[-1:]), flush=True)
                keep(given, found_versions, roofs, results)


def keep(
    given: argparse.Namespace, packages: Mapping[str, str], roofs: Any, results: Sequence[Mapping[str, Any]]
) -> None:
    """Write what there is so far."""
    whole = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {**versions(), **packages},
        "roofs": roofs,
        "results": results,
    }
    if given.json:
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    if given.markdown:
        given.markdown.write_text(markdown(results))
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
