"""The most memory that compiling a checkpoint folder takes, beside the size of its weights.

    python benchmarks/memory.py                # a Llama of 1.5 billion parameters, a Mixtral stored expert by expert
    python benchmarks/memory.py --shape mixtral --json out.json

Checkpoints have random weights in bfloat16, and are written once to `--folder`. Each is compiled in a new process with an empty
cache; the peak is the process's own high-water mark, mapped pages of the checkpoint included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from common import machine, one_answer, versions

SHAPES = {
    "llama": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8,
    },
}  # fmt: skip
BOUND = 1.3
SPARE = 10**9


def make(shape: str, folder: Path) -> None:
    """A checkpoint with random weights, as `save_pretrained` writes it: sharded, experts one by one."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape], dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="1GB")


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--folder", type=Path, help="for checkpoints, kept between runs")
    given = parser.parse_args()
    folder = given.folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jisu-benchmarks"
    found = {}
    for shape in SHAPES if given.shape == "all" else (given.shape,):
        checkpoint = folder / f"memory-{shape}"
        if not (checkpoint / "config.json").is_file():
            make(shape, checkpoint)
        size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
        with tempfile.TemporaryDirectory() as cache:
            options = ["compile", "--checkpoint", str(checkpoint), "--cache", cache, "--threads", "2"]
            answer = one_answer(options, {"HF_HUB_OFFLINE": "1"}, folder / "memory.log")
        bound = int(BOUND * size + SPARE)
        found[shape] = {"checkpoint_bytes": size, "bound_bytes": bound, **answer}
        print(
            f"{shape}: weights {size / 2**30:.2f} GiB, peak {answer['peak_bytes'] / 2**30:.2f} GiB "
            f"({answer['children_peak_bytes'] / 2**30:.2f} in the compiler's process), "
            f"{BOUND} x weights + 1 GB = {bound / 2**30:.2f} GiB, compiled in {answer['compile_s']:.1f} s"
        )
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "versions": versions(), "shapes": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
