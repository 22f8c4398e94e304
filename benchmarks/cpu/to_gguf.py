"""A Llama or Qwen3 checkpoint folder as GGUF, bfloat16, for llama.cpp: its own converter refuses tokenizers that it doesn't know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def _named(name: str) -> str:
    base = name.removesuffix(".weight")
    if base in ENDS:
        return f"{ENDS[base]}.weight"
    _, _, layer, *rest = base.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.weight"


def _frequencies(config: dict[str, Any], head: int) -> list[float] | None:
    """What divides each rotary frequency, of Llama 3's scaling."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    theta = config.get("rope_theta") or rope["rope_theta"]
    low, high, first = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    found = []
    for i in range(0, head, 2):
        length = 2 * math.pi * theta ** (i / head)
        if length < first / high:
            found.append(1.0)
        elif length > first / low:
            found.append(float(rope["factor"]))
        else:
            smooth = (first / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def write(checkpoint: Path, out: Path) -> None:
    """Write the file; tensors are copied one at a time."""
    import gguf
    import ml_dtypes
    import numpy as np
    import safetensors

    config = json.loads((checkpoint / "config.json").read_text())
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    kind = config["model_type"]
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"no GGUF for {kind} here")
    w = gguf.GGUFWriter(str(out), kind)
    w.add_vocab_size(config["vocab_size"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_rope_dimension_count(head)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(theta)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    frequencies = _frequencies(config, head)
    if frequencies is not None:
        w.add_tensor("rope_freqs.weight", np.array(frequencies, np.float32))
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as stored:
            for name in stored.keys():
                array = stored.get_tensor(name)
                if kind == "llama" and ("q_proj" in name or "k_proj" in name):  # the other order of rotary pairs
                    n = heads if "q_proj" in name else kv
                    array = (
                        array.reshape(n, 2, len(array) // n // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
                    )
                if array.ndim == 1:
                    w.add_tensor(_named(name), array.astype(np.float32))
                    continue
                raw = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)).view(np.uint8)
                w.add_tensor(_named(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16, raw_shape=raw.shape)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
