"""The other side of `jisu demo`: the same checkpoint in PyTorch's eager mode, as transformers runs it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers


class _Clock:
    """A streamer that notes when each token came: the prompt first, then one call per token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Eager:
    """A causal language model in eager mode, with its checkpoint's own dtype and transformers' DynamicCache."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        library: Any = transformers  # most of it is untyped
        library.utils.logging.disable_progress_bar()
        self.model = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
        # No end token: both sides write the same number of tokens.
        self.model.generation_config = library.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

    @torch.inference_mode()
    def decode_tokens_per_s(self, ids: list[int], tokens: int) -> float:
        """Speed of greedy decoding after the first token, which the prompt's reading gives."""
        clock = _Clock()
        given = torch.tensor([ids])
        self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=transformers.DynamicCache(config=self.model.config),
            max_new_tokens=tokens,
            streamer=clock,
        )
        times = clock.times[1:]
        return (len(times) - 1) / (times[-1] - times[0])
