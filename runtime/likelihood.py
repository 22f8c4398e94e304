"""Log-probabilities of continuations: what benchmarks of language models ask for, in batches, with the head run where it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs
import numpy as np

from jisu.compiler.errors import InputError
from jisu.runtime.session import DecoderInfo, Session

Tokens = Sequence[int]


class Decoder(Protocol):
    """What is asked of a program."""

    @property
    def decoder(self) -> DecoderInfo | None: ...
    def session(self, capacity: int | None = None) -> Session: ...


@attrs.frozen
class Score:
    """The summed log-probability of a continuation in nats, and whether each of its tokens was the likeliest."""

    logprob: float
    greedy: bool


@attrs.frozen
class _Row:
    """Tokens that are read, and what is asked of their last predictions: (place of the request, continuation)."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, tuple[int, ...]]]

    @property
    def first(self) -> int:
        """The first position whose prediction is asked for."""
        return len(self.tokens) - max(len(continuation) for _, continuation in self.asked)


def score(
    program: Decoder,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch: int = 8,
    progress: Callable[[float], None] | None = None,
) -> list[Score]:
    """Log-probabilities of continuations behind their contexts, pairs of token ids, in the order in which they were given.

    A context that is too long for the model loses its beginning. Pairs that differ in their last token alone are read
    once. batch: sequences that are read at a time. Raises InputError for an empty context, and a continuation that is
    longer than the model's positions.
    """
    info = program.decoder
    if info is None:
        raise InputError("only causal language models have log-probabilities of tokens")
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    rows = sorted(_rows(pairs, info.max_positions).values(), key=lambda row: -len(row.tokens))
    # Behind the end of a sequence stands padding, which a model that is proven causal doesn't see.
    size = batch if info.state else 1
    found = [Score(0.0, True)] * len(pairs)
    for i in range(0, len(rows), size):
        for place, result in _scored(program.session, info, rows[i : i + size]):
            found[place] = result
        if progress is not None:
            progress(min(i + size, len(rows)) / len(rows))
    return found


def _rows(pairs: Sequence[tuple[Tokens, Tokens]], positions: int) -> dict[tuple[int, ...], _Row]:
    """By the tokens that are read: no row is there twice."""
    rows: dict[tuple[int, ...], _Row] = {}
    for place, (context, continuation) in enumerate(pairs):
        if not context:
            raise InputError("a context needs at least one token; begin with that which begins texts")
        if len(continuation) > positions:
            raise InputError(f"a continuation of {len(continuation)} tokens exceeds the model's {positions} positions")
        if continuation:
            tokens = (*context, *continuation)[:-1][-positions:]
            rows.setdefault(tokens, _Row(tokens, [])).asked.append((place, tuple(continuation)))
    return rows


def _scored(session: Callable[[int], Session], info: DecoderInfo, rows: Sequence[_Row]) -> Iterator[tuple[int, Score]]:
    width, first = max(len(row.tokens) for row in rows), min(row.first for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = row.tokens
    step, state = (info.prefill_chunk if info.state else width), session(width)
    begin = first if info.state else 0
    if begin:
        state.append(ids[:, :begin], last_only=True)  # of these tokens nothing but the state is needed
    totals = {place: (0.0, True) for row in rows for place, _ in row.asked}
    for left in range(begin, width, step):
        logits = state.append(ids[:, left : left + step])
        for i, row in enumerate(rows):
            for place, continuation in row.asked:
                start = len(row.tokens) - len(continuation)
                low, high = max(start, left), min(len(row.tokens), left + step)
                if low < high:
                    wanted = np.array(continuation[low - start : high - start])
                    picked, greedy = _picked(logits[i, low - left : high - left], wanted)
                    totals[place] = (totals[place][0] + picked, totals[place][1] and greedy)
    yield from ((place, Score(*total)) for place, total in totals.items())


def _picked(logits: np.ndarray, wanted: np.ndarray) -> tuple[float, bool]:
    """The summed log-probability of one token per row of logits, and whether each is the largest of its row."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    there = wide[np.arange(len(wanted)), wanted]
    total = float((there - top - np.log(np.exp(wide - top[:, None]).sum(-1))).sum())
    return total, bool((wide.argmax(-1) == wanted).all())


def rolling(tokens: Tokens, prefix: int, positions: int) -> list[tuple[Tokens, Tokens]]:
    """Pairs of context and continuation whose scores add up to that of a whole text: each token is predicted once.

    prefix: the token that stands before the text. Windows hold as many tokens as the model has positions; the last one
    reaches back over tokens that are predicted already.
    """
    pairs: list[tuple[Tokens, Tokens]] = []
    for begin in range(0, len(tokens), positions):
        end = min(begin + positions, len(tokens))
        context = tokens[end - positions - 1 : begin] if begin else [prefix]
        pairs.append((context, tokens[begin:end]))
    return pairs
