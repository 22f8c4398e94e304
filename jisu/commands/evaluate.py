"""`jisu eval`: how well a program predicts a text, and how far its predictions are from another program's."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from jisu.commands.shell import Progress, Shell
from jisu.commands.source import Options, open_program, recipe_name
from jisu.compiler.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.runtime.program import Program


@attrs.frozen
class Window:
    """One piece of text: the tokens that are predicted in it, their summed loss in nats, the bytes that they stand for, and the summed
    divergence from the reference's predictions (None without one)."""

    tokens: int
    loss: float
    bytes: int
    divergence: float | None


def run(
    shell: Shell, path: str, text: str, reference: str | None, window: int, limit: int | None, options: Options
) -> None:
    """Evaluate the program at `path` on the text file `text`."""
    from jisu.runtime.tokenizer import read_text

    content = read_text(text)
    program = open_program(shell, path, options).program
    other = open_program(shell, reference, Options(threads=options.threads)).program if reference is not None else None
    with shell.progress() as tell:
        found = list(evaluate(program, content, other, window, limit, tell))
    tokens, loss, size = (sum(getattr(w, name) for w in found) for name in ("tokens", "loss", "bytes"))
    per_window = [w.loss / math.log(2) / max(w.bytes, 1) for w in found]
    result: dict[str, Any] = {
        "nll_per_token": loss / tokens,
        "perplexity": math.exp(loss / tokens),
        "bits_per_byte": loss / math.log(2) / size,
        "stderr": _stderr(per_window),
        "tokens": tokens,
        "bytes": size,
        "windows": len(found),
        "window": window,
        "recipe": recipe_name(program, options.recipe),
        "weights_bytes": program.weights_bytes,
    }
    if other is not None:
        divergences = [w.divergence / w.tokens for w in found if w.divergence is not None]
        result |= {
            "kl_per_token": statistics.fmean(divergences),
            "kl_stderr": _stderr(divergences),
            "reference": reference,
        }

    def show(console: Console) -> None:
        console.print(f"{os.fspath(path)} on {text}: {tokens:,} tokens in {len(found)} windows of {window}")
        console.print(f"  bits per byte    {result['bits_per_byte']:.4f} ± {result['stderr']:.4f}")
        console.print(f"  loss per token   {result['nll_per_token']:.4f} nats (perplexity {result['perplexity']:.2f})")
        if other is not None:
            console.print(
                f"  KL to {reference}: {result['kl_per_token']:.5f} ± {result['kl_stderr']:.5f} nats per token"
            )

    shell.finish(result, show)


def evaluate(
    program: Program, text: str, reference: Program | None, window: int, limit: int | None, tell: Progress
) -> Iterator[Window]:
    """The windows of a text, one after the other; the first token of each is given, not predicted.

    Raises InputError where the program is no language model or has no tokenizer, or the text is shorter than a window.
    """
    info = program.decoder
    if info is None:
        raise InputError("only causal language models can be evaluated")
    if window > info.max_positions:
        raise InputError(f"--window {window} exceeds the model's {info.max_positions} positions")
    if reference is not None and (reference.decoder is None or reference.decoder.vocabulary != info.vocabulary):
        raise InputError("the reference has another vocabulary")
    ids = program.tokenizer.encode(text, add_special_tokens=False)
    starts = range(0, len(ids) - window + 1, window)[:limit]
    if not starts:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer one, or a smaller --window"
        )
    for i, start in enumerate(starts):
        part = np.array([ids[start : start + window]], np.int64)
        own = _log_probabilities(program, part)
        loss = -float(np.take_along_axis(own, part[0, 1:, None], -1).sum())
        divergence = None
        if reference is not None:
            theirs = _log_probabilities(reference, part)
            divergence = float((np.exp(theirs) * (theirs - own)).sum())
        size = len(program.tokenizer.decode(part[0].tolist()).encode()) - len(
            program.tokenizer.decode([int(part[0, 0])]).encode()
        )
        tell("evaluating", (i + 1) / len(starts))
        yield Window(window - 1, loss, size, divergence)


def _log_probabilities(program: Program, ids: np.ndarray) -> np.ndarray:
    """float64 [tokens - 1, vocabulary], of every token but the first."""
    logits = np.asarray(program(input_ids=ids).logits[0, :-1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _stderr(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
