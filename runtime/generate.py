"""Text generation over a stateful session: prompts in, tokens and text out, with the meaning of `model.generate`.

The processors run in transformers' order: repetition penalty, minimum length; then, when sampling, temperature, top-k,
top-p, min-p. Only NumPy is used; whose session computes the logits, or draws tokens itself, doesn't matter here.
"""

from __future__ import annotations

import difflib
import math
import operator
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, Protocol, cast, overload

import attrs
import numpy as np
import numpy.typing as npt

from jisu.compiler.errors import IndexOutOfRangeError, InputError, InputTypeError
from jisu.compiler.ops.sampling import PARTS, choose
from jisu.runtime.session import Drawn, Sampling
from jisu.runtime.tokenizer import Tokenizer as Tokenizer

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Reason = Literal["stop", "length", "eos"]

DEFAULT_NEW_TOKENS = 128
_REPLACEMENT = "\ufffd"


class Session(Protocol):
    """A batch of sequences with their cache."""

    @property
    def length(self) -> int:
        """Slots filled per sequence."""

    @property
    def capacity(self) -> int:
        """Slots that the cache has."""

    def append(self, token_ids: Ids, *, start: Ids | None = None, last_only: bool = False) -> Logits:
        """Process int64 [B, C] new tokens; float32 logits [B, C, V], or [B, 1, V] of the last ones.

        `start` int64 [B] is the number of padding slots in front of each sequence, given at the first append after a
        reset and remembered.
        """

    def reset(self) -> None:
        """Forget all sequences."""


class TokenizerLike(Protocol):
    """What generation needs of a tokenizer; `decode` leaves special tokens out."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, token_ids: list[int], /) -> str: ...


MakeSession = Callable[[], Session]

# ----------------------------------------------------------------------------------------------------- configuration

# Options of transformers that would change the result and aren't implemented, with the values that change nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([], ()),
    "begin_suppress_tokens": ([], ()),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
# Options that leave the result as it is: storage, speed, beams only, provenance.
_NEUTRAL = frozenset(
    "use_cache use_mtp cache_implementation cache_config max_cache_len return_dict_in_generate early_stopping "
    "length_penalty renormalize_logits bos_token_id decoder_start_token_id is_assistant num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size "
    "assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type "
    "compile_config disable_compile continuous_batching_config low_memory transformers_version _from_model_config "
    "_commit_hash".split()
)
_RENAMED = {"stop": "stop_strings", "prefill_chunk_size": "prefill_chunk"}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def _integer(low: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and (type(value) is not int or value < low):
            raise InputError(f"{field.name} must be an integer >= {low}, got {value!r}")

    return check


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        inside = isinstance(value, float) and low <= value <= high and math.isfinite(value)
        if value is not None and not (inside and not (open_low and value == low)):
            bounds = f"> {low:g}" if open_low else f">= {low:g}"
            bounds += f" and <= {high:g}" if math.isfinite(high) else ""
            hint = "; for greedy decoding leave do_sample off" if field.name == "temperature" else ""
            raise InputError(f"{field.name} must be a number {bounds}, got {value!r}{hint}")

    return check


def _boolean(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if type(value) is not bool:
        raise InputError(f"{field.name} must be True or False, got {value!r}")


def _plain_int(value: Any) -> Any:
    """NumPy's integers become Python's; everything else is left to the validator."""
    return int(value) if isinstance(value, np.integer) else value


def _plain_float(value: Any) -> Any:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else value


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(_plain_int(item) for item in value) if isinstance(value, list | tuple | set) else (_plain_int(value),)


def _token_ids(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not all(type(item) is int and item >= 0 for item in value):
        raise InputError(f"{field.name} must be a token id >= 0 or several, got {value!r}")


def _strings(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{field.name} must be a non-empty string or several, got {value!r}")


@attrs.frozen(kw_only=True)
class GenerationConfig:
    """How to generate. Names, meaning and defaults are those of transformers' GenerationConfig, except the length.

    Without max_new_tokens and max_length (of prompt and new tokens together) up to DEFAULT_NEW_TOKENS are generated.
    `seed` None draws fresh randomness; a number makes each row of a batch repeatable, whatever its neighbours are.
    `prefill_chunk` is the number of prompt tokens that are processed at once.
    """

    max_new_tokens: int | None = attrs.field(default=None, converter=_plain_int, validator=_integer(1))
    max_length: int | None = attrs.field(default=None, converter=_plain_int, validator=_integer(1))
    min_new_tokens: int = attrs.field(default=0, converter=_plain_int, validator=_integer(0))
    do_sample: bool = attrs.field(default=False, validator=_boolean)
    temperature: float = attrs.field(default=1.0, converter=_plain_float, validator=_number(0, math.inf, open_low=True))
    top_k: int = attrs.field(default=50, converter=_plain_int, validator=_integer(0))
    top_p: float = attrs.field(default=1.0, converter=_plain_float, validator=_number(0, 1))
    min_p: float | None = attrs.field(default=None, converter=_plain_float, validator=_number(0, 1))
    repetition_penalty: float = attrs.field(
        default=1.0, converter=_plain_float, validator=_number(0, math.inf, open_low=True)
    )
    seed: int | None = attrs.field(default=None, converter=_plain_int, validator=_integer(0))
    stop_strings: tuple[str, ...] = attrs.field(default=(), converter=_as_tuple, validator=_strings)
    eos_token_id: tuple[int, ...] = attrs.field(default=(), converter=_as_tuple, validator=_token_ids)
    pad_token_id: int | None = attrs.field(default=None, converter=_plain_int, validator=_integer(0))
    prefill_chunk: int = attrs.field(default=512, converter=_plain_int, validator=_integer(1))

    @classmethod
    def from_any(cls, config: object = None, **overrides: Any) -> GenerationConfig:
        """From ours, transformers' GenerationConfig, a dict or None; `overrides` win, and None stands for the default.

        Raises: InputError for a value outside its range, an unknown option (with the nearest known one), or an option
        of transformers that would change the result but isn't implemented.
        """
        if isinstance(config, GenerationConfig):
            given = attrs.asdict(config)
        elif config is None:
            given = {}
        elif isinstance(config, Mapping):
            given = _known(config)
        elif hasattr(config, "max_new_tokens") and hasattr(config, "eos_token_id"):
            given = _known({name: value for name, value in vars(config).items() if _is_option(name)})
        else:
            raise InputTypeError(f"expected a GenerationConfig, a dict or None, got {type(config).__name__}")
        explicit = _known(overrides)
        result = cls(**{**given, **explicit})
        default = cls()
        useless = [name for name in _SAMPLING if explicit.get(name, getattr(default, name)) != getattr(default, name)]
        if useless and not result.do_sample:
            warnings.warn(f"{', '.join(useless)} has no effect without do_sample=True", UserWarning, stacklevel=2)
        return result

    @classmethod
    def from_saved(cls, parsed: Mapping[str, Any]) -> GenerationConfig:
        """From a checkpoint's generation_config.json, in which, as in transformers, foreign entries may stand."""
        return cls(**_known({name: value for name, value in parsed.items() if _is_option(name)}))


def _is_option(name: str) -> bool:
    return name in _FIELDS or name in _RENAMED or name in _REFUSED or name in _NEUTRAL


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields here, under their names; None means unset."""
    result: dict[str, Any] = {}
    for option, value in options.items():
        name = _RENAMED.get(option, option)
        if name in _FIELDS:
            if value is not None:
                result[name] = value
        elif name in _REFUSED:
            if value is not None and not any(value == neutral for neutral in _REFUSED[name]):
                raise InputError(f"{name}={value!r} is not implemented; leave it out")
        elif name not in _NEUTRAL:
            near = difflib.get_close_matches(name, [*_FIELDS, *_REFUSED], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_FIELDS)}"
            raise InputError(f"unknown generation option {option!r}{hint}")
    return result


_FIELDS = tuple(field.name for field in attrs.fields(GenerationConfig))

# ------------------------------------------------------------------------------------------------------------ result


@attrs.frozen
class Chunk:
    """What one step added to one row; `finished` is set in the row's last chunk."""

    row: int
    token_ids: tuple[int, ...]
    text: str
    finished: Reason | None


@attrs.frozen(kw_only=True)
class Generation:
    """The result of `generate`.

    `sequences` has the generated part of each row, the end token included; rows that ended early are filled up with
    the padding id, and `lengths` counts their own tokens. `text` is None without a tokenizer, a str for a single str
    prompt.
    """

    sequences: list[list[int]]
    lengths: list[int]
    prompt_ids: list[list[int]]
    text: str | list[str] | None
    finish_reasons: list[Reason]
    prefill_s: float
    decode_s: float

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens over all rows, padding not counted."""
        return sum(map(len, self.prompt_ids))

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens over all rows, padding not counted."""
        return sum(self.lengths)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second, without the first of each row, which prefill pays for."""
        return (self.new_tokens - len(self.lengths)) / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        if self.text is None:
            return str(self.sequences)
        return self.text if isinstance(self.text, str) else "\n".join(self.text)


# ---------------------------------------------------------------------------------------------------------- sampling


def _options(config: GenerationConfig) -> tuple[np.float32, int, np.float32, np.float32]:
    """temperature, top_k, top_p and min_p as `jisu.compiler.ops.draw` takes them; the temperature isn't so low that it were none."""
    heat = max(np.float32(config.temperature), np.finfo(np.float32).tiny)
    return heat, config.top_k, np.float32(config.top_p), np.float32(config.min_p or 0.0)


def _no_distribution() -> InputError:
    return InputError("can't sample: a sequence's highest logit is infinite or NaN")


def penalize(scores: Logits, token_ids: Ids, penalty: float) -> None:
    """Repetition penalty in place: scores [V] of `token_ids` are divided by it where positive, multiplied elsewhere.

    Source: Keskar et al., CTRL, 2019, https://arxiv.org/abs/1909.05858.
    """
    chosen = scores[token_ids]
    factor = np.float32(penalty)
    scores[token_ids] = np.where(chosen < 0, chosen * factor, chosen / factor)


# -------------------------------------------------------------------------------------------------------------- text


class TextStream:
    """Text of a growing sequence of tokens, in pieces that never need to be taken back.

    A piece never ends inside a UTF-8 character nor in what may become a stop string. Only the last few tokens are
    decoded again at each step; bytes that make no character are held back until one follows, and are looked at again then.
    """

    _WINDOW, _CONTEXT = 32, 12

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._tokens: list[int] = []
        self._taken = 0  # characters of the window's text that went into _pending or out
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain; `stopped` is set when a stop string was met."""
        self._tokens.append(token)
        # No character is longer than the context: where that ends with a broken one, so does all of it.
        if len(self._tokens) > self._WINDOW and self._decode(self._tokens[-self._CONTEXT :]).endswith(_REPLACEMENT):
            return ""
        text = self._decode(self._tokens)
        if text.endswith(_REPLACEMENT):
            return ""
        self._take(text)
        if len(self._tokens) > self._WINDOW:
            self._shorten(text)
        return self._emit()

    def finish(self) -> str:
        """The rest of the text."""
        if self.stopped:
            return ""
        self._take(self._decode(self._tokens))
        text = self._emit()
        if not self.stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _take(self, text: str) -> None:
        self._pending += text[self._taken :]
        self._taken = max(self._taken, len(text))

    def _shorten(self, text: str) -> None:
        """Forget the oldest tokens, if the rest alone decodes to the end of the text."""
        for size in range(self._CONTEXT, self._CONTEXT + 4):  # one of them doesn't begin inside a character
            head, tail = self._tokens[:-size], self._tokens[-size:]
            rest = self._decode(tail)
            if not rest or self._taken != len(text) or not text.endswith(rest):
                continue
            # Bytes that make no character all look alike: those of the rest are its own if nothing is missing before it.
            if not rest.startswith(_REPLACEMENT) or self._decode(head) + rest == text:
                self._tokens, self._taken = tail, len(rest)
                return

    def _emit(self) -> str:
        found = [position for position in map(self._pending.find, self._stops) if position >= 0]
        if found:
            text, self._pending, self.stopped = self._pending[: min(found)], "", True
            return text
        held = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        certain = len(self._pending) - held
        text, self._pending = self._pending[:certain], self._pending[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ----------------------------------------------------------------------------------------------------------- prompts


def _encode(prompts: Any, config: GenerationConfig, tokenizer: TokenizerLike | None) -> tuple[list[list[int]], bool]:
    """The prompts as lists of ids without padding, and whether it was one single str."""
    single = isinstance(prompts, str)
    if single:
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        rows = _masked(prompts)
    elif isinstance(prompts, list | tuple) and any(isinstance(prompt, str) for prompt in prompts):
        rows = [_encode_text(prompt, tokenizer) for prompt in prompts]
    elif isinstance(prompts, list | tuple):
        rows = _rows_of_list(prompts)
    else:
        rows = _strip_padding(_array(prompts), config)
    if not rows:
        raise InputError("no prompt was given")
    return [_begun(row, number, tokenizer) for number, row in enumerate(rows)], single


def _encode_text(prompt: Any, tokenizer: TokenizerLike | None) -> list[int]:
    if not isinstance(prompt, str):
        raise InputTypeError(f"expected only str prompts, got {type(prompt).__name__} among them")
    if tokenizer is None:
        raise InputError("a text prompt needs a tokenizer; give token ids, or a checkpoint that has tokenizer.json")
    return tokenizer.encode(prompt)


def _rows_of_list(prompts: Sequence[Any]) -> list[list[int]]:
    if all(_is_id(item) for item in prompts):
        return [[operator.index(item) for item in prompts]] if prompts else []
    rows = []
    for row in prompts:
        row = row if isinstance(row, list | tuple) else _array(row)
        if isinstance(row, np.ndarray) and row.ndim != 1 or not all(_is_id(item) for item in row):
            raise InputTypeError(f"expected lists of token ids, got {row!r:.80}")
        rows.append([operator.index(item) for item in row])
    return rows


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _array(prompts: Any) -> npt.NDArray[Any]:
    if hasattr(prompts, "__array__"):
        array = np.asarray(prompts)
    elif hasattr(prompts, "__dlpack__"):
        array = np.from_dlpack(prompts)
    else:
        raise InputTypeError(f"expected text, token ids or an array of them, got {type(prompts).__name__}")
    if array.dtype.kind not in "iu":
        raise InputTypeError(f"expected an integer array of token ids, got {array.dtype}")
    if array.ndim not in (1, 2):
        raise InputError(f"expected token ids of rank 1 or 2, got shape {list(array.shape)}")
    return array


def _masked(prompts: Mapping[Any, Any]) -> list[list[int]]:
    """A tokenizer's output: input_ids with an attention_mask that hides padding on the left."""
    if "input_ids" not in prompts:
        raise InputError(f"expected input_ids among the prompt's entries, got {', '.join(map(str, prompts))}")
    if prompts.get("attention_mask") is None:
        return _rows_of_list(prompts["input_ids"])
    rows = []
    every, masks = _rows_of_list(prompts["input_ids"]), _rows_of_list(prompts["attention_mask"])
    if len(every) != len(masks):
        raise InputError(f"got {len(every)} prompts and an attention mask for {len(masks)}")
    for ids, mask in zip(every, masks, strict=True):
        count = sum(map(bool, mask))
        if len(mask) != len(ids) or not all(mask[len(mask) - count :]):
            raise InputError("the attention mask may hide padding on the left only; tokenize with padding_side='left'")
        rows.append(ids[len(ids) - count :])
    return rows


def _strip_padding(array: npt.NDArray[Any], config: GenerationConfig) -> list[list[int]]:
    """Rows without the padding id in front; as in transformers it counts as padding unless it's also an end token."""
    rows = cast("list[list[int]]", array.tolist() if array.ndim == 2 else [array.tolist()])
    pad = config.pad_token_id
    if array.ndim == 1 or pad is None or pad in config.eos_token_id:
        return rows
    result = []
    for number, row in enumerate(rows):
        start = next((place for place, token in enumerate(row) if token != pad), len(row))
        if pad in row[start:]:
            raise InputError(f"prompt {number} has the padding id {pad} behind other tokens; pad on the left")
        result.append(row[start:])
    return result


def _begun(row: list[int], number: int, tokenizer: TokenizerLike | None) -> list[int]:
    if row:
        return row
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not getattr(tokenizer, "add_bos_token", False):
        raise InputError(f"prompt {number} is empty; give at least one token")
    return [int(bos)]


def _check_ids(rows: list[list[int]], vocab_size: int | None) -> None:
    limit = math.inf if vocab_size is None else vocab_size
    for number, row in enumerate(rows):
        for token in (min(row), max(row)):
            if not 0 <= token < limit:
                size = "" if vocab_size is None else f" of size {vocab_size}"
                raise IndexOutOfRangeError(f"prompt {number} has token id {token}, outside the vocabulary{size}")


# -------------------------------------------------------------------------------------------------------- generation


class _Row:
    """The state of one sequence."""

    def __init__(self, number: int, prompt: list[int], config: GenerationConfig, text: TextStream | None) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.text = text
        self.parts: list[str] = []
        self.reason: Reason | None = None
        self._config = config
        self._rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(number,)))
        self._uniform: list[int] = []
        self._seen = np.array(sorted(set(prompt)), dtype=np.int64)

    def uniform(self, step: int) -> int:
        """The 31 random bits of the row's token number `step`."""
        while len(self._uniform) <= step:
            self._uniform.append(int(self._rng.random() * 2**PARTS))
        return self._uniform[step]

    def choose(self, scores: Logits) -> int:
        """The next token for scores float32 [V]."""
        config = self._config
        muted = config.eos_token_id if len(self.tokens) < config.min_new_tokens else ()
        if config.repetition_penalty != 1.0 or muted:
            scores = scores.copy()
        if config.repetition_penalty != 1.0:
            penalize(scores, self._seen[self._seen < scores.size], config.repetition_penalty)
        if muted:
            scores[[token for token in muted if token < scores.size]] = -np.inf
        if not config.do_sample:
            return int(scores.argmax())
        if not np.isfinite(scores.max()):
            raise _no_distribution()
        return choose(scores, self.uniform(len(self.tokens)), *_options(config))

    def push(self, token: int, last: bool) -> Chunk:
        """Take a token, the `last` one that there's room for."""
        self.tokens.append(token)
        if self._config.repetition_penalty != 1.0:
            place = int(np.searchsorted(self._seen, token))
            if place == self._seen.size or self._seen[place] != token:
                self._seen = np.insert(self._seen, place, token)
        text = self.text.push(token) if self.text else ""
        if token in self._config.eos_token_id:
            self.reason = "eos"
        elif last:
            self.reason = "length"
        if self.text and self.reason:
            text += self.text.finish()
        if self.text and self.text.stopped:
            self.reason = "stop"
        if text:
            self.parts.append(text)
        return Chunk(self.number, (token,), text, self.reason)


@overload
def generate(
    make_session: MakeSession,
    prompts: Any,
    config: object = None,
    *,
    tokenizer: TokenizerLike | None = None,
    stream: Literal[False] = False,
) -> Generation: ...


@overload
def generate(
    make_session: MakeSession,
    prompts: Any,
    config: object = None,
    *,
    tokenizer: TokenizerLike | None = None,
    stream: Literal[True],
) -> Generator[Chunk, None, Generation]: ...


@overload
def generate(
    make_session: MakeSession,
    prompts: Any,
    config: object = None,
    *,
    tokenizer: TokenizerLike | None = None,
    stream: bool,
) -> Generation | Generator[Chunk, None, Generation]: ...


def generate(
    make_session: MakeSession,
    prompts: Any,
    config: object = None,
    *,
    tokenizer: TokenizerLike | None = None,
    stream: bool = False,
) -> Generation | Generator[Chunk, None, Generation]:
    """Continue prompts, with the meaning of transformers' `model.generate`.

    `make_session()` returns a session, which takes its batch size from the first tokens.
    `prompts` is a str, a list of them, token ids as a list, a list of lists, an integer array or tensor of rank 1 or 2,
    or a tokenizer's output (`input_ids`, `attention_mask`). `config` is anything that GenerationConfig.from_any takes.
    With `stream` an iterator of Chunk is returned, whose texts per row add up to the final text; everything is
    checked before it is returned.

    Raises: InputError if the prompts don't fit into the cache, are empty or can't be encoded; IndexOutOfRangeError for
    a token id outside of the session's `vocab_size`.
    """
    config = GenerationConfig.from_any(config)
    rows, single = _encode(prompts, config, tokenizer)
    _check_ids(rows, None)
    if config.stop_strings and tokenizer is None:
        raise InputError("stop_strings need a tokenizer")
    width = max(map(len, rows))
    wanted = config.max_new_tokens
    if wanted is None and config.max_length is not None:
        wanted = config.max_length - width
        if wanted < 1:
            raise InputError(f"max_length is {config.max_length}, but the prompt has {width} tokens already")
    session = make_session()
    if session.length:
        session.reset()
    _check_ids(rows, getattr(session, "vocab_size", None))
    room = session.capacity - width
    if config.max_new_tokens is None:  # the other limits are upper bounds, not orders
        wanted = min(wanted or DEFAULT_NEW_TOKENS, max(room, 1))
    if wanted is None or wanted > room:
        raise InputError(
            f"the prompt has {width} tokens and {wanted} new ones are wanted: {width + (wanted or 0)} in all, "
            f"but the cache has {session.capacity} slots"
        )
    chunks = _run(session, rows, config, wanted, tokenizer, single)
    if stream:
        return chunks
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            return cast(Generation, end.value)


def _run(
    session: Session,
    prompts: list[list[int]],
    config: GenerationConfig,
    limit: int,
    tokenizer: TokenizerLike | None,
    single: bool,
) -> Generator[Chunk, None, Generation]:
    def text_stream() -> TextStream | None:
        return TextStream(tokenizer.decode, config.stop_strings) if tokenizer else None

    rows = [_Row(number, prompt, config, text_stream()) for number, prompt in enumerate(prompts)]
    begin = time.perf_counter()
    ids, start = _padded(prompts)
    chunk = config.prefill_chunk
    for position in range(0, ids.shape[1] - chunk, chunk):
        session.append(ids[:, position : position + chunk], start=None if position else start, last_only=True)
    left = (ids.shape[1] - 1) // chunk * chunk
    prefill_s = decode_s = 0.0
    with closing(_choices(session, config, rows, ids[:, left:], None if left else start, limit)) as choices:
        for step, chosen in enumerate(choices):
            spent = time.perf_counter() - begin
            prefill_s, decode_s = (prefill_s, decode_s + spent) if step else (spent, decode_s)
            begin = time.perf_counter()
            alive = [row for row in rows if row.reason is None]
            chunks = [row.push(chosen[row.number], step + 1 == limit) for row in alive]
            decode_s += time.perf_counter() - begin
            yield from chunks
            if all(row.reason for row in rows):
                break
            begin = time.perf_counter()
    pad = config.pad_token_id if config.pad_token_id is not None else (*config.eos_token_id, 0)[0]
    longest = max(len(row.tokens) for row in rows)
    texts = ["".join(row.parts) for row in rows]
    return Generation(
        sequences=[row.tokens + [pad] * (longest - len(row.tokens)) for row in rows],
        lengths=[len(row.tokens) for row in rows],
        prompt_ids=prompts,
        text=None if tokenizer is None else texts[0] if single else texts,
        finish_reasons=[cast(Reason, row.reason) for row in rows],
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


_Choices = Generator[list[int], None, None]
"""A token of each row, which is pushed to it before the next one is asked for."""


def _choices(
    session: Session, config: GenerationConfig, rows: Sequence[_Row], ids: Ids, start: Ids | None, limit: int
) -> _Choices:
    """`limit` tokens behind ids [B, C], the last part of the prompts; start: see `Session.append`."""
    plain = config.repetition_penalty == 1.0 and not config.min_new_tokens
    if plain and getattr(session, "draws", False):
        return _drawn_there(cast(_Drawing, session), config, rows, ids, start, limit)
    return _drawn_here(session, config, rows, ids, start, limit)


def _drawn_here(
    session: Session, config: GenerationConfig, rows: Sequence[_Row], ids: Ids, start: Ids | None, limit: int
) -> _Choices:
    greedy = config.repetition_penalty == 1.0 and not config.min_new_tokens and not config.do_sample
    for step in range(limit):
        scores = session.append(ids, start=None if step else start, last_only=True)[:, -1]
        yield scores.argmax(-1).tolist() if greedy else [_choice(row, scores) for row in rows]
        ids = _newest(rows)


def _drawn_there(
    session: _Drawing, config: GenerationConfig, rows: Sequence[_Row], ids: Ids, start: Ids | None, limit: int
) -> _Choices:
    """By the session's own machine, which begins with the next step before this one's tokens are known here."""
    options = _options(config) if config.do_sample else (0.0, 0, 1.0, 0.0)
    sampling = Sampling(*(np.full(len(rows), option) for option in options))

    def begin(step: int, tokens: Ids | Drawn) -> Drawn:
        uniform = np.array([row.uniform(step) for row in rows], np.int64) if config.do_sample else None
        return session.draw(tokens, sampling, uniform, start=None if step else start)

    drawn: Drawn | None = begin(0, ids)
    ahead: Drawn | None = None
    step = 0
    try:
        while drawn is not None:
            step += 1
            ahead = begin(step, drawn) if step < limit else None
            tokens, sound = drawn.results()
            if not all(sound[row.number] for row in rows if row.reason is None):
                raise _no_distribution()
            yield tokens.tolist()
            drawn, ahead = ahead, None
    finally:
        if ahead is not None:  # nobody wants to know what comes next
            session.undo(1)


def _choice(row: _Row, scores: Logits) -> int:
    """What a row chooses of scores [B, V]; nothing behind its end."""
    return row.choose(scores[row.number]) if row.reason is None else 0


def _newest(rows: Sequence[_Row]) -> Ids:
    """The rows' last tokens, [B, 1]."""
    return np.array([row.tokens[-1] if row.reason is None else 0 for row in rows], np.int64)[:, None]


class _Drawing(Session, Protocol):
    """A session whose machine draws tokens by itself: `jisu.runtime.session.Session` for a GPU."""

    def draw(
        self, tokens: Ids | Drawn, sampling: Sampling, uniform: Ids | None = None, *, start: Ids | None = None
    ) -> Drawn: ...

    def undo(self, count: int) -> None: ...


def _padded(prompts: list[list[int]]) -> tuple[Ids, Ids | None]:
    """The prompts, padded on the left to one length, and by how much, if at all."""
    width = max(map(len, prompts))
    start = np.array([width - len(prompt) for prompt in prompts], dtype=np.int64)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, start[row] :] = prompt
    return ids, start if start.any() else None
