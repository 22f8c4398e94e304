"""A session: the state of a batch of sequences, and the step that appends tokens to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import numpy as np

from jisu.compiler.errors import IndexOutOfRangeError, InputError
from jisu.compiler.types import TensorType, numpy_dtype
from jisu.runtime.executable import Started

APPEND, APPEND_LAST, APPEND_DRAWN = "append", "append_last", "append_drawn"
"""Entries of a decoder: logits of every new token, of the chunk's last one only, and instead of these a token that is drawn by them."""

DRAWING = (("uniform", "int64"), ("temperature", "float32"), ("top_k", "int64"), ("top_p", "float32"), ("min_p", "float32"))  # fmt: skip
"""What `APPEND_DRAWN` takes behind the state, one per sequence: see `jisu.compiler.ops.draw`."""

MAIN = "main"
"""The entry of a program without state."""


@attrs.frozen
class DecoderInfo:
    """What a session needs to know of a decoder.

    vocabulary: size of the logits' last axis. max_positions: the longest sequence. page: slots per page of a paged cache,
    else 0. state: (name, type with symbols, window, ring) per state tensor. batch: the symbol of the batch.
    prefill_chunk: tokens read at a time. draws: whether there is an entry `APPEND_DRAWN`. inputs: names of the stateless
    graph's inputs. reason: why there is no cache, where `state` is empty.
    """

    vocabulary: int
    max_positions: int
    page: int
    prefill_chunk: int
    batch: str
    state: tuple[tuple[str, TensorType, int, bool], ...]
    inputs: tuple[str, ...] = attrs.field(default=(), converter=tuple)
    reason: str = ""
    draws: bool = False

    @property
    def slot_bytes(self) -> int:
        """Bytes of state that a token of a sequence takes, in all layers."""
        return sum(int(kind.shape[1]) * int(kind.shape[3]) * kind.itemsize for _, kind, _, _ in self.state)

    def sizes(self, batch: int, slots: int) -> dict[str, int]:
        """Values of the state types' symbols for `slots` slots per sequence."""
        found = {self.batch: batch, "capacity": slots}
        if self.page:
            found["sequence_pages"] = -(-slots // self.page)
            found["pages"] = found["sequence_pages"] * batch
        for _, _, window, ring in self.state:
            if ring:
                found[f"ring_{window}"] = min(slots, window + self.prefill_chunk - 1)
        return found

    def table(self, batch: int, slots: int) -> np.ndarray:
        """Which pages the sequences have: page n of sequence b stands at n * batch + b, so that a larger table keeps all where they were."""
        pages = self.sizes(batch, slots)["sequence_pages"] * batch
        return np.ascontiguousarray(np.arange(pages, dtype=np.int32).reshape(-1, batch).T)


class Start(Protocol):
    """Begins to run one entry of a program on arrays, on such as are held, or on values of calls that were started before."""

    def __call__(self, entry: str, arrays: Sequence[Any]) -> Started: ...


class Memory(Protocol):
    """Where a program's state lies: this machine's memory, or a GPU's."""

    def zeros(self, shape: Sequence[int], dtype: str, what: str) -> Any:
        """A tensor of zeros; raises TensorMemoryError naming `what` where there is no room."""

    def hold(self, value: np.ndarray) -> Any:
        """A tensor with an array's elements."""

    def read(self, held: Any) -> np.ndarray:
        """A tensor's elements."""


@attrs.frozen(eq=False)
class Sampling:
    """How tokens are drawn, one number per sequence: see `jisu.compiler.ops.draw`; temperature 0 takes the likeliest."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray


@attrs.frozen(eq=False)
class Drawn:
    """Tokens that a step draws, or has drawn: they can be appended before they are known here."""

    started: Started

    @property
    def value(self) -> Any:
        """The tokens int64 [b, 1] where they are."""
        return self.started.values[0]

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the step: the tokens int64 [b], and whether their logits are a distribution, bool [b] (see `jisu.compiler.ops.draw`)."""
        tokens, sound, *_ = self.started.results()
        return np.asarray(tokens)[:, 0], np.asarray(sound)[:, 0]


class Session:
    """The stateful step of a decoder: `append` reads tokens, remembers their keys and values, returns logits.

    A session serves one batch of sequences at a time; its size is fixed by the first `append`. Sequences of unequal
    length are padded on the left, `start` saying by how much. Not safe for use from several threads at once.
    """

    def __init__(self, info: DecoderInfo, start: Start, memory: Memory, capacity: int | None = None) -> None:
        """capacity: slots to reserve (the cache grows beyond as needed, up to `info.max_positions`)."""
        if capacity is not None and not 0 < capacity <= info.max_positions:
            raise InputError(f"capacity {capacity} is not in 1..{info.max_positions}, the positions that the model has")
        self._info = info
        self._run = start
        self._memory = memory
        self._wanted = capacity
        self._state: list[Any] = []  # tensors of `memory`
        self._history: np.ndarray | None = None
        self._table: Any = None  # such, too
        self._reserved = 0
        self._start = np.zeros(0, np.int64)
        self._held_start: Any = None
        self._held_sampling: tuple[Sampling | None, list[Any]] = (None, [])
        self._furthest = 0  # the most slots that were filled since the state was made
        self.length = 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._info.vocabulary

    @property
    def capacity(self) -> int:
        """The most slots that a sequence may fill."""
        return self._info.max_positions if self._wanted is None else self._wanted

    @property
    def nbytes(self) -> int:
        """Bytes of state that are reserved now."""
        return sum(s.nbytes for s in self._state)

    def reset(self) -> None:
        """Forget all sequences; reserved memory is kept for a batch of the same size."""
        self.length = 0
        self._history = None

    def append(self, token_ids: Any, *, start: Any = None, last_only: bool = False) -> np.ndarray:
        """Append tokens int64 [b, c] and return logits float32 [b, c, vocabulary] ([b, 1, vocabulary] with last_only).

        start: int64 [b], padding slots in front of each sequence, given with the first tokens after a reset, maybe more than
        there are first tokens. Raises IndexOutOfRangeError for an id outside the vocabulary, InputError for a wrong shape or a full cache.
        """
        ids = self._begun(token_ids, start)
        if not self._info.state:
            return self._recompute(ids, last_only)
        if last_only:
            for chunk in self._chunks(ids):
                step = self._step(chunk, APPEND_LAST)
            return np.asarray(step.results()[0])
        logits = [np.asarray(self._step(c, APPEND).results()[0]) for c in self._chunks(ids)]
        return logits[0] if len(logits) == 1 else np.concatenate(logits, 1)

    @property
    def draws(self) -> bool:
        """Whether there is `draw`."""
        return self._info.draws

    def draw(self, tokens: Any, sampling: Sampling, uniform: np.ndarray | None = None, *, start: Any = None) -> Drawn:
        """As `append`, but what comes is a token of each sequence, drawn by its last logits.

        tokens: int64 [b, c], or what an earlier step draws: then nothing is waited for. uniform: int64 [b], 31 random bits each, unless all take
        the likeliest. Raises InputError where there is none, and as `append`.
        """
        if not self.draws:
            raise InputError("this program draws no tokens; use append")
        if isinstance(tokens, Drawn):
            self._make_room(1)
            chunks = [tokens.value]
        else:
            chunks = self._chunks(self._begun(tokens, start))
        if self._held_sampling[0] is not sampling:
            options = [np.zeros(len(self._start), np.int64), *attrs.astuple(sampling, recurse=False)]
            held = [
                self._memory.hold(np.ascontiguousarray(x, numpy_dtype(kind))[:, None])
                for x, (_, kind) in zip(options, DRAWING, strict=True)
            ]
            self._held_sampling = (sampling, held)
        unused, *rest = self._held_sampling[1]
        options = [unused if uniform is None else np.ascontiguousarray(uniform, np.int64)[:, None], *rest]
        for chunk in chunks:
            step = self._step(chunk, APPEND_DRAWN, options)
        return Drawn(step)

    @property
    def undoable(self) -> int:
        """How many of the newest tokens can be taken back, all in all since the last that stays."""
        return self._info.prefill_chunk if any(ring for *_, ring in self._info.state) else self._info.max_positions

    def undo(self, count: int) -> None:
        """Take back the `count` newest tokens; steps that are under way may go on. Raises InputError for more than there are, or than `undoable`.

        Later tokens overwrite what the cache has of these, and see nothing of it before. A ring has as many slots beyond its window as fit
        a chunk: whatever so few tokens overwrote, nobody sees any more.
        """
        length = self.length - count
        if not self._info.state or length < 0 or self._furthest - length > self.undoable:
            raise InputError(f"{count} of {self.length} tokens can't be taken back")
        self.length = length

    def _begun(self, token_ids: Any, start: Any) -> np.ndarray:
        """The tokens, for which there is room then."""
        ids = self._checked(token_ids)
        if self.length == 0:
            self._begin(ids.shape[0], start)
        elif start is not None and not np.array_equal(np.asarray(start), self._start):
            raise InputError("start is set with the first tokens; call reset() before another batch")
        if ids.shape[0] != len(self._start):
            raise InputError(f"the session holds {len(self._start)} sequences, got tokens for {ids.shape[0]}")
        self._make_room(ids.shape[1])
        return ids

    def _make_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise InputError(f"{self.length} + {count} tokens exceed the session's capacity of {self.capacity}")
        if self._info.state:
            self._reserve(self.length + count)

    def _chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        step = self._info.prefill_chunk
        return [np.ascontiguousarray(ids[:, i : i + step]) for i in range(0, ids.shape[1], step)]

    def _checked(self, token_ids: Any) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            raise InputError(
                f"token_ids: expected int64[batch, tokens] with at least one token, got {ids.dtype}{list(ids.shape)}"
            )
        ids = np.ascontiguousarray(ids, np.int64)
        wrong = (ids < 0) | (ids >= self._info.vocabulary)
        if wrong.any():
            raise IndexOutOfRangeError(
                f"token id {int(ids[wrong][0])} is outside the vocabulary of {self._info.vocabulary} (0..{self._info.vocabulary - 1})"
            )
        return ids

    def _begin(self, batch: int, start: Any) -> None:
        if batch != len(self._start):
            self._state, self._reserved, self._table, self._held_start = [], 0, None, None
            self._held_sampling = (None, [])
        before, self._furthest = self._start, 0
        self._start = np.zeros(batch, np.int64) if start is None else np.array(start, np.int64)
        if self._start.shape != (batch,) or (self._start < 0).any():
            raise InputError(f"start: expected {batch} counts of padding slots, got {start!r}")
        if self._held_start is None or not np.array_equal(before, self._start):
            self._held_start = self._memory.hold(self._start)

    def _reserve(self, needed: int) -> None:
        """Make room for `needed` slots: all that was asked for at first, doubling later."""
        if needed <= self._reserved:
            return
        info = self._info
        slots = min(max(needed, 2 * self._reserved, self._wanted or 256), info.max_positions)
        if info.page:
            slots = -(-slots // info.page) * info.page
        old, sizes = self._state, info.sizes(len(self._start), slots)
        state = []
        for i, (name, kind, _, ring) in enumerate(info.state):
            shape = [int(d) for d in kind.at(sizes).shape]
            if old and self.length:
                array = np.zeros(shape, numpy_dtype(kind.dtype))
                self._carry(self._memory.read(old[i]), array, ring)
                state.append(self._memory.hold(array))
            else:
                state.append(self._memory.zeros(shape, kind.dtype, f"the KV cache ({name}, {slots} slots)"))
        table = self._memory.hold(info.table(len(self._start), slots)) if info.page else None
        # All at once: where memory is short, the session goes on with what it had.
        self._state, self._table, self._reserved = state, table, slots

    def _carry(self, old: np.ndarray, new: np.ndarray, ring: bool) -> None:
        if self._info.page:
            new[: old.shape[0]] = old
        elif not ring:
            new[:, :, : old.shape[2]] = old
        elif new.shape[2] == old.shape[2]:
            new[...] = old
        else:
            kept = np.arange(max(0, self.length - old.shape[2]), self.length)
            new[:, :, kept % new.shape[2]] = old[:, :, kept % old.shape[2]]

    def _step(self, ids: Any, entry: str, options: Sequence[Any] = ()) -> Started:
        """Begin to append a chunk, an array or a value; options: what the entry takes behind the state."""
        table = [] if self._table is None else [self._table]
        given = [ids, np.array([self.length], np.int64), self._held_start, *table, *self._state, *options]
        started = self._run(entry, given)
        self.length += ids.shape[1]
        self._furthest = max(self._furthest, self.length)
        return started

    def _recompute(self, ids: np.ndarray, last_only: bool) -> np.ndarray:
        """Without a cache: run the whole sequences again (equal lengths only, as padding would be read)."""
        if self._start.any():
            raise InputError(f"prompts must be of one length: the model has no cache ({self._info.reason})")
        history = ids if self._history is None else np.concatenate([self._history, ids], 1)
        positions = np.broadcast_to(np.arange(history.shape[1]), history.shape)
        given = {"input_ids": history, "position_ids": np.ascontiguousarray(positions, np.int64)}
        (logits, *_) = self._run(MAIN, [given[name] for name in self._info.inputs]).results()
        self._history, self.length = history, history.shape[1]
        return np.asarray(logits)[:, -1 if last_only else -ids.shape[1] :]
