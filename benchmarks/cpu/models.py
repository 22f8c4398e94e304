"""Checkpoints of real shapes with random weights from fixed seeds, and a tokenizer in which every id is a token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "160m": {
        **_LLAMA,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "bert-base": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "pad_token_id": 0,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "position_embedding_type": "absolute",  # which transformers no longer writes, and CTranslate2's converter reads
    },
}
"""Models by name; "160m" is the class of SmolLM-135M, the others are the published configurations."""


ENCODERS = frozenset({"bert-base"})
"""Models that read a whole sequence at once and generate nothing."""


def make(name: str, dtype: str, folder: Path) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "complete").exists():
        return
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        kind = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(default)
    _tokenizer(folder, SHAPES[name]["vocab_size"])
    (folder / "complete").touch()


def _tokenizer(folder: Path, vocabulary: int) -> None:
    """Byte-level BPE of made-up words, filled up with products of two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(4000)]
    text = [" ".join(draw.choice(words) for _ in range(40)) for _ in range(800)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4000), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    whole = json.loads(tokenizer.to_str())
    known, merges = whole["model"]["vocab"], whole["model"]["merges"]
    parts = [t for t in sorted(known, key=known.get) if t not in special]
    fillers = ((a, b) for a in parts for b in parts)
    while len(known) < vocabulary:
        a, b = next(fillers)
        if a + b not in known:
            known[a + b] = len(known)
            merges.append([a, b])
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<pad>",  # which CTranslate2's converter of encoders wants named
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
