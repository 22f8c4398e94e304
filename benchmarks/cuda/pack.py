"""What compare.py runs on a GPU machine, compiled where there is no GPU: programs without weights, kernels alone, and a small model with its logits.

    python benchmarks/cuda/pack.py --shape llama-3-8b --target nvidia/h200 --out pack

Needs the compiler (TVM); what it writes, some tens of MB, runs with jisu's sources and NVIDIA's driver alone. It says how long compiling took, and what
the cost model predicts: the longer of a node's arithmetic at the peak and its bytes at the bandwidth of the target's description, added up; beside it
stand a decode step's launches (batch 1), how many of them may begin before those before them end, and the gaps that the others make, and that all of
them would make, at about a microsecond each, with the share of a step that is left for kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, versions  # noqa: E402

import jisu  # noqa: E402
from jisu.compiler import ops  # noqa: E402
from jisu.compiler.cost import graph_cost  # noqa: E402
from jisu.compiler.driver import layout  # noqa: E402
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight  # noqa: E402
from jisu.compiler.launches import GAP_S, PLANS, Plan  # noqa: E402
from jisu.compiler.pipeline import Pipeline  # noqa: E402
from jisu.compiler.recipe import CacheRecipe  # noqa: E402
from jisu.compiler.text import parse  # noqa: E402
from jisu.compiler.types import TensorType, numpy_dtype, symbol  # noqa: E402
from jisu.runtime.program import Program  # noqa: E402
from jisu.targets.compile import compile_graphs  # noqa: E402
from jisu.targets.target import Target  # noqa: E402

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_HEADS},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **_HEADS},
}  # fmt: skip
RECIPES = {"bfloat16": None, "int4": "w4a16", "int8": "w8a16"}
LENGTHS = {"context": 512, "prompt": 2048, "batches": [1, 32, 128]}
PAGE = 16  # slots, of caches of batches
ROPE = 500000.0


def config_of(shape: str) -> Any:
    """transformers' configuration."""
    import transformers as hf

    config = hf.LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=ROPE, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    return config


def checkpoint(shape: str, folder: Path) -> Path:
    """A folder with the shape's weights in bfloat16, a sparse file of zeros, of which only names and sizes matter."""
    import torch
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
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
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)
    return folder


def predicted(program: Any, target: Target, lengths: dict[str, Any]) -> dict[str, float]:
    """Seconds of a decode step per batch, and of a prompt, by the cost model."""
    step = parse(program.ir("append_last"))
    found = {}
    for batch in lengths["batches"]:
        slots = lengths["context"] + 1
        env = {"batch": batch, "sequence": 1, **program.decoder.sizes(batch, slots)}
        found[f"decode_{batch}_s"] = graph_cost(step, env, target).seconds
    env = {"batch": 1, "sequence": lengths["prompt"], **program.decoder.sizes(1, lengths["prompt"])}
    return {**found, "prefill_s": graph_cost(step, env, target).seconds}


def launched(program: Any, context: int) -> dict[str, Any]:
    """A decode step's launches at batch 1, and per layer; the gaps between those that wait for the ones before them, and between all."""
    plan = Plan.from_json(json.loads(program.parts.code[PLANS])["entries"]["append_drawn"])
    launches = plan.launches({"sequence": 1, **program.decoder.sizes(1, context + 1)})
    early = sum(launch.early for launch in launches[1:])
    layers = [i for i, launch in enumerate(launches) if "attend" in launch.kernel]
    return {
        "launches": len(launches), "early": early, "per_layer": layers[1] - layers[0] if len(layers) > 1 else None,
        "gaps_s": (len(launches) - 1 - early) * GAP_S, "gaps_without_overlap_s": (len(launches) - 1) * GAP_S,
    }  # fmt: skip


def kernels(shape: str) -> dict[str, Graph]:
    """A layer's products, x[m, k] by w[n, k], and its attention, causal, over as many keys as queries."""
    c = SHAPES[shape]
    hidden, inner, heads, groups = (
        c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    width = hidden // heads
    found = {}
    for k, n in ((hidden, hidden + 2 * groups * width), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)):
        x = placeholder("x", TensorType((symbol("m"), k), "bfloat16"))
        held = {"w": ArrayStorage(np.zeros((n, k), numpy_dtype("bfloat16")))}
        found[f"product_{k}x{n}"] = Graph((x,), (ops.linear(x, weight("w", TensorType((n, k), "bfloat16"))),), held)
    q, k, v = (
        placeholder(name, TensorType((symbol("b"), symbol("s"), count, width), "bfloat16"))
        for name, count in (("q", heads), ("k", groups), ("v", groups))
    )
    found[f"attention_{heads}_{groups}x{width}"] = Graph(
        (q, k, v), (ops.attention(q, k, v, scale=width**-0.5, causal=True),)
    )
    return found


def _checked(target: Target, forms: list[str], folder: Path) -> None:
    """A small model, whole, and what it should give: the logits of the same weights in float32, and of the CPU's program of the same form."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config_of("tiny")).eval()
    ids = np.random.default_rng(0).integers(0, SHAPES["tiny"]["vocab_size"], (3, 40))
    with torch.no_grad():
        exact = model.float()(torch.from_numpy(ids)).logits.numpy()
    wanted = {"ids": ids, "exact": exact}
    for form in forms:
        own = model.bfloat16()
        jisu.compile(own, target=target, recipe=RECIPES[form]).save(folder / f"check-{form}.jisu")
        wanted[form] = np.asarray(jisu.compile(own, recipe=RECIPES[form])(ids).logits, np.float32)
    np.savez(folder / "check.npz", **wanted)


def pack(shape: str, target: Target, folder: Path, forms: list[str], lengths: dict[str, Any]) -> dict[str, Any]:
    """Write it all; what compare.py wants to know of it."""
    folder.mkdir(parents=True, exist_ok=True)
    _checked(target, forms, folder)
    told: dict[str, Any] = {
        "shape": shape, "config": SHAPES[shape], "rope": ROPE, **lengths, "target": target.name, "forms": forms,
        "machine": machine(), "versions": versions(), "programs": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint(shape, Path(scratch) / "model")
        for form in forms:
            for name, page in ((form, 0), (f"{form}-paged", PAGE)):
                recipe = attrs.evolve(
                    jisu.Recipe.resolve(RECIPES[form]), prefill_chunk=lengths["prompt"], cache=CacheRecipe(page=page)
                )
                begin = time.perf_counter()
                program = jisu.compile(str(source), target=target, recipe=recipe, cache_dir=Path(scratch) / name)
                seconds, found = predicted(program, target, lengths), launched(program, lengths["context"])
                shares = {k: seconds["decode_1_s"] / (seconds["decode_1_s"] + found[k]) for k in found if "gaps" in k}
                told["programs"][name] = {
                    "compile_s": time.perf_counter() - begin, "weights_bytes": program.weights_bytes, "predicted": seconds, **found,
                    "share_in_kernels": shares["gaps_s"], "share_without_overlap": shares["gaps_without_overlap_s"],
                }  # fmt: skip
                Program(attrs.evolve(program.parts, weights={})).save(folder / f"{name}.jisu")
                print(f"{name:15} {json.dumps(told['programs'][name])}", flush=True)
                del program
        laid_out = {
            name: Pipeline(layout(jisu.Recipe(), target)).run(graph)[0] for name, graph in kernels(shape).items()
        }
        info = compile_graphs(laid_out, target, out=folder / "kernels", cache_dir=Path(scratch) / "kernels")
    told["kernels"] = {name: entry.to_json() for name, entry in info.entries.items()}
    (folder / "pack.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--forms", default="bfloat16,int4")
    parser.add_argument("--target", default="nvidia/h200")
    parser.add_argument("--out", type=Path, default=Path("pack"))
    options = parser.parse_args()
    pack(options.shape, Target.resolve(options.target), options.out, options.forms.split(","), LENGTHS)


if __name__ == "__main__":
    main()
