"""jisu on an NVIDIA GPU beside torch.compile on the same random weights, or, without a GPU, what the cost model predicts.

    python benchmarks/cuda/compare.py --shape llama-3-8b --forms bfloat16,int4 --json out.json

Decode: seconds per token behind a context, batch 1, 32 and 128; prefill: seconds of a prompt. jisu and the peer take turns; a ratio is the
median over rounds of the peer's time to jisu's of the same round. The peer is transformers' model with its static cache under
`torch.compile(mode="max-autotune")`. The GPU's copy bandwidth is measured in the same run. Predicted figures say so: the longer of a
node's arithmetic at the peak and its bytes at the bandwidth of the target's description, added up; beside them stand a decode step's
launches (batch 1), how many of them may begin before those before them end, and the gaps that the others make, and that all of them would
make, at about a microsecond each. On a GPU, the share of a decode step's time in which some kernel runs is what torch's profiler sees.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, versions  # noqa: E402

import jisu  # noqa: E402
from jisu.compiler.cost import graph_cost  # noqa: E402
from jisu.compiler.errors import TargetError  # noqa: E402
from jisu.compiler.launches import GAP_S, PLANS, Plan  # noqa: E402
from jisu.compiler.text import parse  # noqa: E402
from jisu.targets.target import Target  # noqa: E402

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_HEADS},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **_HEADS},
}  # fmt: skip
RECIPES = {"bfloat16": None, "int4": "w4a16", "int8": "w8a16"}
CONTEXT, PROMPT, BATCHES = 512, 2048, (1, 32, 128)


def checkpoint(shape: str, folder: Path, filled: bool) -> Path:
    """A folder with bfloat16 weights of the shape, written once, tensor by tensor: random ones, or, to compile only, a sparse file of zeros."""
    import torch
    import transformers as hf

    folder = folder / (shape if filled else f"{shape}-empty")
    file = folder / "model.safetensors"
    if file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = hf.LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in hf.LlamaForCausalLM(config).state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32) >> 16
    block = random.astype(np.uint16)
    whole = file.with_suffix(".part")
    with open(whole, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        first = out.tell()
        for name, size in shapes.items() if filled else ():
            count = int(np.prod(size))
            out.seek(first + header[name]["data_offsets"][0])
            for piece in range(0, count, block.size):
                part = block[: min(block.size, count - piece)]
                out.write((np.full_like(part, 0x3F80) if name.endswith("norm.weight") else part).tobytes())
        out.truncate(first + end)
    whole.rename(file)
    return folder


def predicted(program: Any, target: Target) -> dict[str, float]:
    """Seconds of a decode step per batch, and of a prompt, by the cost model."""
    step = parse(program.ir("append_last"))
    found = {}
    for batch in BATCHES:
        env = {"batch": batch, "sequence": 1, "capacity": CONTEXT + 1}
        found[f"decode_{batch}_s"] = graph_cost(step, env, target).seconds
    env = {"batch": 1, "sequence": PROMPT, "capacity": PROMPT}
    return {**found, "prefill_s": graph_cost(step, env, target).seconds}


def launched(program: Any) -> dict[str, Any]:
    """A decode step's launches at batch 1, and per layer; the gaps between those that wait for the ones before them, and between all."""
    plan = Plan.from_json(json.loads(program.parts.code[PLANS])["entries"]["append_last"])
    launches = plan.launches({"batch": 1, "sequence": 1, "capacity": CONTEXT + 1})
    early = sum(launch.early for launch in launches[1:])
    layers = [i for i, launch in enumerate(launches) if "attend" in launch.kernel]
    return {
        "launches": len(launches), "early": early, "per_layer": layers[1] - layers[0] if len(layers) > 1 else None,
        "gaps_s": (len(launches) - 1 - early) * GAP_S, "gaps_without_overlap_s": (len(launches) - 1) * GAP_S,
    }  # fmt: skip


def in_kernels(step: Callable[[], Any], launches: int, repeat: int = 20) -> dict[str, float]:
    """The share of a step's time, from its first kernel's beginning to its last one's end, in which some kernel runs: the median over steps, and
    the least, by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(repeat):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in traced.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Mem")
    )
    shares = []
    for first in range(0, len(spans) - launches + 1, launches):
        own = spans[first : first + launches]
        busy, end = 0.0, own[0][0]
        for begin, stop in own:
            busy, end = busy + max(0.0, stop - max(begin, end)), max(end, stop)
        shares.append(busy / (end - own[0][0]))
    return {"median": statistics.median(shares), "least": min(shares), "kernels": len(spans) / repeat}


def timed(call: Callable[[], Any], repeat: int) -> float:
    """Median seconds of a call that has finished on the GPU when it returns."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def ours(program: Any, batch: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """A decode step behind the context, and (batch 1) a prompt."""
    rng = np.random.default_rng(0)
    session = program.session(CONTEXT + 256)
    session.append(rng.integers(0, vocabulary, (batch, CONTEXT)), last_only=True)
    token = rng.integers(0, vocabulary, (batch, 1))

    def decode() -> None:
        session.append(token, last_only=True)
        session.length -= 1  # every step stands behind the same context

    found: dict[str, Callable[[], Any]] = {f"decode_{batch}_s": decode}
    if batch == 1:
        reader = program.session(PROMPT)

        def prefill() -> None:
            reader.reset()
            reader.append(rng.integers(0, vocabulary, (1, PROMPT)), last_only=True)

        found["prefill_s"] = prefill
    return found


def peer(folder: Path, batch: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """The same of torch.compile, on the GPU that torch sees."""
    import torch
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    cache = hf.StaticCache(config=model.config, max_cache_len=CONTEXT + 256)
    forward = torch.compile(model.forward, mode="max-autotune", fullgraph=True)
    ids = torch.randint(vocabulary, (batch, CONTEXT), device="cuda")
    token, place = ids[:, :1].clone(), torch.tensor([CONTEXT], device="cuda")
    with torch.no_grad():
        model(ids, past_key_values=cache, cache_position=torch.arange(CONTEXT, device="cuda"))

    @torch.no_grad()
    def decode() -> None:
        forward(token, past_key_values=cache, cache_position=place, logits_to_keep=1).logits.argmax(-1).cpu()

    found: dict[str, Callable[[], Any]] = {f"decode_{batch}_s": decode}
    if batch == 1:
        whole = torch.compile(model.forward, mode="max-autotune-no-cudagraphs")

        @torch.no_grad()
        def prefill() -> None:
            prompt = torch.randint(vocabulary, (1, PROMPT), device="cuda")
            whole(prompt, use_cache=False, logits_to_keep=1).logits.argmax(-1).cpu()

        found["prefill_s"] = prefill
    return found


def copy_bandwidth() -> float:
    """Bytes per second that a copy on the GPU reads and writes, the best of ten of 2 GiB."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * 2 / best


def measured(program: Any, folder: Path, form: str, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Both sides by turns; the peer is in bfloat16 whatever the form."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        sides = {"jisu": ours(program, batch, vocabulary), "torch.compile": peer(folder, batch, vocabulary)}
        if batch == 1:
            found["in_kernels"] = in_kernels(sides["jisu"]["decode_1_s"], launched(program)["launches"])
            print(f"{form:9} in kernels {found['in_kernels']['median']:.1%} of a decode step")
        for cell in sides["jisu"]:
            for side in sides.values():
                for _ in range(3):
                    side[cell]()
            times: dict[str, list[float]] = {name: [] for name in sides}
            for r in range(rounds):
                for name in list(sides)[:: 1 if r % 2 else -1]:
                    times[name].append(timed(sides[name][cell], 20 if "decode" in cell else 3))
            ratios = [b / a for a, b in zip(times["jisu"], times["torch.compile"], strict=True)]
            found[cell] = {**times, "ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
            print(
                f"{form:9} {cell:14} {statistics.median(times['jisu']) * 1e3:9.3f} ms, ratio {found[cell]['ratio']:.2f}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--forms", default="bfloat16,int4")
    parser.add_argument("--target", default="nvidia/h200", help="what is predicted where there is no GPU")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "jisu-cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        target, reason = Target.resolve("cuda"), ""
    except TargetError as error:
        target, reason = Target.resolve(options.target), str(error)
    folder = checkpoint(options.shape, options.folder, filled=not reason)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "shape": options.shape,
        "target": target.name, "not_run": reason, "forms": {}, "context": CONTEXT, "prompt": PROMPT,
    }  # fmt: skip
    if reason:
        print(f"not run: {reason}\npredicted for {target.name}:")
    else:
        result["copy_bandwidth"] = copy_bandwidth()
    for form in options.forms.split(","):
        begin = time.perf_counter()
        program = jisu.compile(str(folder), target=target, recipe=RECIPES[form])
        cells: dict[str, Any] = {"compile_s": time.perf_counter() - begin, "weights": program.weights_bytes}
        cells["predicted"], cells["launches"] = predicted(program, target), launched(program)
        if not reason:
            cells["measured"] = measured(program, folder, form, SHAPES[options.shape]["vocab_size"], options.rounds)
        result["forms"][form] = cells
        told = ", ".join(f"{k.removesuffix('_s')} {v * 1e3:.2f} ms" for k, v in cells["predicted"].items())
        print(f"{form:9} compiled in {cells['compile_s']:.0f} s; predicted: {told}")
        counts, seconds = cells["launches"], cells["predicted"]["decode_1_s"]
        shares = [seconds / (seconds + counts[gaps]) for gaps in ("gaps_without_overlap_s", "gaps_s")]
        print(
            f"{form:9} {counts['launches']} launches a step, {counts['per_layer']} a layer, {counts['early']} of which may begin early; "
            f"predicted share in kernels: {shares[0]:.1%} if none did, {shares[1]:.1%} if all of those did"
        )
        del program
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
