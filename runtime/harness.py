"""A compiled program as a model of lm-evaluation-harness (package lm-eval, which `pip install "jisu[eval]"` brings).

    results = lm_eval.simple_evaluate(HarnessModel(program), tasks=["arc_easy"])

Texts become tokens as the harness's own model of transformers makes them, so that figures can be compared; but where the
likelihood of a whole text is asked for, the token that stands before it is given and never predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from jisu.compiler.errors import InputError
from jisu.runtime.likelihood import rolling, score
from jisu.runtime.program import Program

_NEW_TOKENS = 256  # the harness's own default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class HarnessModel(LM):
    """The harness's view of a program with a tokenizer.

    batch: sequences that are read at a time. progress: called with the fraction of the running kind of request that is
    done. Raises InputError for a program that is no language model or has no tokenizer.
    """

    def __init__(self, program: Program, batch: int = 8, progress: Callable[[float], None] | None = None) -> None:
        super().__init__()
        if program.decoder is None:
            raise InputError("only causal language models can be evaluated")
        self.program, self.batch, self.progress = program, batch, progress
        self.tokenizer, self.positions = program.tokenizer, program.decoder.max_positions

    # --- What the harness calls ------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-probability (nats) of each request's continuation behind its context, and whether it is the greedy one."""
        found = score(self.program, [self._pair(*r.args) for r in requests], batch=self.batch, progress=self.progress)
        return [(s.logprob, s.greedy) for s in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability (nats) of each request's whole text."""
        texts = [self.tokenizer.encode(r.args[0], add_special_tokens=False) for r in requests]
        windows = [rolling(ids, self.prefix, self.positions) for ids in texts]
        scores = iter(
            score(self.program, [p for pairs in windows for p in pairs], batch=self.batch, progress=self.progress)
        )
        return [sum(next(scores).logprob for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the program writes behind each request's context, up to its stop texts, which are left out."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        assert self.program.decoder is not None
        size = self.batch if self.program.decoder.state else 1  # without a cache prompts must be of one length
        found, done = [""] * len(requests), 0
        for places in groups.values():
            options, stops = _options(requests[places[0]].args[1])
            room = self.positions - options["max_new_tokens"]
            if room < 1:
                raise InputError(
                    f"a task asks for {options['max_new_tokens']} new tokens; the model has {self.positions} positions"
                )
            for k in range(0, len(places), size):
                part = places[k : k + size]
                prompts = [self._encode(requests[i].args[0])[-room:] for i in part]
                generation = self.program.generate(prompts, **options)
                for i, ids, length in zip(part, generation.sequences, generation.lengths, strict=True):
                    found[i] = _until(self.tokenizer.decode(ids[:length]), stops)
                done += len(part)
                if self.progress is not None:
                    self.progress(done / len(requests))
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for messages, by the model's chat template."""
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the model's chat template, which the harness notes beside results."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's notes."""
        return "jisu"

    # --- Texts to tokens -------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> int:
        """The token that stands before a text without context: that which begins texts, else that which ends them."""
        begin = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if begin is None else begin
        if found is None:
            raise InputError("the tokenizer has neither a token that begins texts nor one that ends them")
        return found

    def _encode(self, text: str) -> list[int]:
        begin = self.tokenizer.special_tokens.get("bos_token")
        return self.tokenizer.encode(text, add_special_tokens=not (begin and text.startswith(begin)))

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. They are encoded together, since tokens reach over the seam; spaces belong to what follows them."""
        if not context:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = self._encode(bare + continuation), self._encode(bare)
        return before or [self.prefix], whole[len(before) :]


def _options(asked: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A task's generation options as ours, and the texts at which it stops."""
    options = dict(asked)
    until = options.pop("until", None) or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    lengths = [options.pop(name) for name in _LENGTHS if name in options]
    temperature = options.pop("temperature", None)
    sample = bool(options.pop("do_sample", bool(temperature))) and temperature != 0
    if sample and temperature is not None:
        options["temperature"] = temperature
    if not sample:  # what greedy generation has no use for
        options = {k: v for k, v in options.items() if k not in ("top_k", "top_p", "min_p")}
    length = int(lengths[0]) if lengths else _NEW_TOKENS
    return {
        **options,
        "do_sample": sample,
        "max_new_tokens": length,
        "stop_strings": tuple(s for s in stops if s),
    }, stops


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
