"""Small models of real architectures, made from a configuration with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 99
WINDOW = 8

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN3_MOE: dict[str, Any] = {**_BASE, **_MOE, "num_experts": 4, "head_dim": 8}
_PLAIN: dict[str, Any] = {k: v for k, v in _BASE.items() if k not in ("num_key_value_heads", "intermediate_size")}

DECODERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_BASE),
    "llama_tied": lambda: hf.LlamaConfig(**_BASE, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**_BASE),
    "qwen3": lambda: hf.Qwen3Config(**_BASE, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**_BASE, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**_BASE, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_BASE, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: hf.Phi3Config(**_BASE, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=160),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_PLAIN, intermediate_size=48),
    "opt": lambda: hf.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "starcoder2": lambda: hf.Starcoder2Config(**_BASE, sliding_window=WINDOW),
    "olmo2": lambda: hf.Olmo2Config(**_BASE),
    "cohere2": lambda: hf.Cohere2Config(
        **_BASE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": lambda: hf.MixtralConfig(**_BASE, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_QWEN3_MOE),
    "gpt_oss": lambda: hf.GptOssConfig(
        **_BASE,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**_BASE, "num_key_value_heads": 4},
        **_MOE,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),  # fmt: skip
}
"""Configurations by name; windows are shorter than the prompts of the tests."""


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> hf.PreTrainedModel:
    """A model with weights large enough that every part of it shows in the logits. changes: to its configuration."""
    torch.manual_seed(0)
    config = DECODERS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    if dtype == torch.float64:  # torch's grouped product, the default for experts, has no float64
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(0.1 * noise)
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return model
