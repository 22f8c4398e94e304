"""`jisu explain`: what each pass did, what the layers cost, which kernels there are, and why there is no cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jisu.commands import units
from jisu.commands.shell import Shell, table
from jisu.commands.source import Options, open_program
from jisu.compiler.errors import InputError
from jisu.compiler.storage import check_parent

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.runtime.program import Program

_TOKENS, _SLOTS, _REPEAT = 128, 256, 5  # the sizes at which the report states costs


def run(shell: Shell, path: str, options: Options, timeline: str | None = None) -> None:
    """Explain the program at `path`, with the measured time of the step where it is a decoder; timeline: where its simulated run is written."""
    if timeline is not None:
        check_parent(timeline)
    program = open_program(shell, path, options).program
    report = dict(program.explain())
    if timeline is not None:
        _draw(program, report.get("simulated", ()), timeline)
    passes = [dict(entry) for entry in report.get("passes", ())]
    measured = _measure(program)
    if measured is not None and passes:
        passes[-1]["measured_s"] = measured["step_s"]
    report |= {
        "passes": passes,
        "measured": measured,
        "not_run": program.lacks,
        "target": program.target,
        "recipe": program.recipe,
    }

    def show(console: Console) -> None:
        _show(console, path, report, program)

    shell.finish(report, show)


def _draw(program: Program, simulated: Sequence[Mapping[str, Any]], path: str) -> None:
    """Write the timeline of the last of the simulated calls: of a decoder, of one token."""
    if not simulated:
        raise InputError(f"only programs for TPUs have a simulated timeline; this one is for {program.target['name']}")
    from jisu.compiler.text import parse
    from jisu.targets.tpu.chip import Chip
    from jisu.targets.tpu.program import simulated as simulate

    call = simulated[-1]
    chip = Chip.named(call["chip"])
    simulate(parse(program.ir(call["entry"])), call["sizes"], chip, cached=call["cached"]).trace(path)


def _measure(program: Program) -> dict[str, Any] | None:
    """Median seconds of reading _TOKENS tokens (what the passes' predicted_s is about) and of writing one more."""
    info = program.decoder
    if info is None or info.reason or program.lacks:
        return None
    tokens = min(_TOKENS, info.max_positions // 2)
    session = program.session(min(_SLOTS, info.max_positions))
    ids = np.random.default_rng(0).integers(0, info.vocabulary, (1, tokens))
    step, decode = [], []
    for _ in range(_REPEAT + 1):
        session.reset()
        begin = time.perf_counter()
        session.append(ids)
        middle = time.perf_counter()
        session.append(ids[:, :1], last_only=True)
        step.append(middle - begin)
        decode.append(time.perf_counter() - middle)
    return {"tokens": tokens, "step_s": statistics.median(step[1:]), "decode_s": statistics.median(decode[1:])}


def _show(console: Console, path: str, report: Mapping[str, Any], program: Program) -> None:
    console.print(f"{path}: for {program.target['name']}, {units.nbytes(program.weights_bytes)} of weights\n")
    if report.get("simulation"):
        console.print(
            f"{report['simulation']}; what is predicted is for the chip, what is measured for the simulation\n"
        )
    console.print(_passes(report["passes"]))
    layers = [
        [
            e["layer"],
            units.count(e["flops"]),
            units.nbytes(e["bytes"]),
            str(e["launches"]),
            units.seconds(e["predicted_s"]),
        ]
        for e in report.get("layers", ())
    ]
    console.print(table("Layers", ("<layer", "flops", "bytes", "launches", "predicted"), layers))
    kernels = [[k["name"], k["op"], str(k["count"]), "\n".join(k["choices"])] for k in report.get("kernels", ())]
    if any(k[-1] for k in kernels):
        console.print(table("Kernels", ("<kernel", "<op", "calls", "<by"), kernels))
    else:
        console.print(table("Kernels", ("<kernel", "<op", "calls"), [k[:-1] for k in kernels]))
    sparse = [
        [m["name"], m["form"], f"{m['kept']:.0%}", m["stored"], _gain(m["predicted_gain"])]
        for m in report.get("sparse", ())
    ]
    if sparse:
        columns = ("<matrix", "<of", "kept", "<stored", "<sparse against dense, one row (predicted)")
        console.print(table("Sparse matrices", columns, sparse))
    for entry in report.get("simulated", ()):
        _show_simulated(console, entry)
    for entry in report.get("launches", ()):
        console.print(
            f"{entry['entry']}: {entry['launches']} launches for a token, {entry['early']} of which may begin before the ones before them end; "
            f"gaps in front of the others take {units.seconds(entry['gaps_s'])} (predicted)"
        )
    if report.get("tuning"):
        _show_tuning(console, report["tuning"])
    if report.get("ledger"):
        _show_ledger(console, report["ledger"])
    cache = report.get("cache")
    if cache == "derived" and program.decoder is not None:
        console.print(f"KV cache: derived, {units.nbytes(program.decoder.slot_bytes)} per token")
    elif cache is not None:
        console.print(f"no KV cache: {cache}")
    measured = report["measured"]
    if measured is not None:
        of = " (the simulation)" if report.get("simulation") else ""
        console.print(
            f"measured{of}: {units.seconds(measured['step_s'])} for {measured['tokens']} tokens at once, "
            f"{units.seconds(measured['decode_s'])} for one after them ({program.num_threads} threads)"
        )
    if program.lacks:
        console.print(f"not measured: {program.lacks}")


def _gain(gain: float | None) -> str:
    return "no kernel for it on this target" if gain is None else f"{gain:.2f} times as fast"


def _show_simulated(console: Console, entry: Mapping[str, Any]) -> None:
    """What the timing model says of an entry, by kind of op."""
    rows = [
        [op["op"], str(op["count"]), units.seconds(op["simulated_s"]), units.nbytes(op["hbm_bytes"])]
        for op in entry["ops"]
    ]
    rows.append(["(all)", "", units.seconds(entry["simulated_s"]), units.nbytes(entry["hbm_bytes"])])
    new = "one token" if entry["tokens"] == 1 else f"{entry['tokens']} tokens"
    what = f"{entry['phase']} of {new} behind {entry['cached']}, " if entry["phase"] else ""
    console.print(
        f"{entry['entry']}: {what}simulated on {entry['chip']}, not measured; HBM alone {units.seconds(entry['hbm_bound_s'])}, "
        f"keys and values {units.nbytes(entry['kv_bytes'])}"
    )
    console.print(table("", ("<op", "calls", "simulated", "HBM"), rows))


def _show_tuning(console: Console, tuning: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            t["op"],
            t["key"].partition("(")[2].partition(", activation")[0],
            ", ".join(f"{name} {value}" for name, value in t["schedule"].items()) or "as without",
            f"{t['ratio']:.2f}",
            str(t["variants"]) + ("" if t["complete"] else " (out of time)"),
        ]
        for t in tuning
    ]
    columns = ("<kernel", "<of", "<schedule", "time against none", "variants measured")
    console.print(table("Tuned kernels", columns, rows))


def _show_ledger(console: Console, ledger: Mapping[str, Any]) -> None:
    rows = [
        [
            e["layer"],
            e["form"],
            units.nbytes(e["bytes"]),
            units.nbytes(e["int8_bytes"]),
            f"{e['output_error']:.1%}",
            f"{e['loss']:.2g}",
            f"{e['share']:.0%}",
        ]
        for e in ledger["layers"]
    ]
    columns = ("<matrix", "<form", "bytes", "at int8", "output error", "loss", "share")
    passes = ", ".join(f"{p['loss']:.3g} behind {p['name']}" for p in ledger["passes"])
    console.print(table(f"What compression costs ({ledger['unit']}): {passes}", columns, rows))
    first = next(iter(ledger["layers"]), None)
    if first is not None and first["share"] > 0:
        more = first["int8_bytes"] - first["bytes"]
        spared = f"; at int8 it would take {units.nbytes(more)} more" if more > 0 else ""
        console.print(f"{first['layer']} at {first['form']} costs {first['share']:.0%} of the loss{spared}")


def _passes(passes: Sequence[Mapping[str, Any]]) -> Any:
    columns = ("<pass", "<exact", "nodes", "launches", "flops", "weights", "peak", "predicted", "measured", "error")
    rows = [
        [
            p["name"],
            "yes" if p["exact"] else "no",
            str(p["nodes"]),
            str(p["launches"]),
            units.count(p["flops"]),
            units.nbytes(p["weight_bytes"]),
            units.nbytes(p["peak_bytes"]),
            units.seconds(p["predicted_s"]),
            units.seconds(p["measured_s"]),
            "-" if p["error"] is None else f"{p['error']:.2g}",
        ]
        for p in passes
    ]
    return table(f"Passes (costs at batch 1, {_TOKENS} tokens)", columns, rows)
