"""Text to token ids and back, from the files of a checkpoint or an artifact; needs neither torch nor transformers."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
import tokenizers

from jisu.compiler.errors import ArtifactError, InputError
from jisu.compiler.storage import parse_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A saved fast tokenizer: `encode` adds the special tokens that its post-processor names, `decode` leaves them out.

    `files` are the bytes that it was made from, ready to be written into an artifact; `special_tokens` maps names such
    as `eos_token` to their text.
    """

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """From the contents of the files by name; others than FILES are passed over. Raises: ArtifactError."""
        return cls({name: files[name] for name in FILES if name in files})

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise ArtifactError("there is no tokenizer.json; save the tokenizer with a fast (Rust) backend")
        self.files = dict(files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # the library raises the base class
            raise ArtifactError(f"tokenizer.json can't be read: {error}") from None
        self._tokenizer.no_padding()  # what the file says about them belongs to training
        self._tokenizer.no_truncation()
        config = self._json("tokenizer_config.json")
        texts = {**self._json("special_tokens_map.json"), **config}
        self.special_tokens = {name: _text(texts[name]) for name in _SPECIAL if texts.get(name)}
        self.add_bos_token = config.get("add_bos_token") is True
        self.chat_template = self._template(config)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises: ArtifactError if it has no usable tokenizer.json."""
        paths = [Path(folder) / name for name in FILES]
        try:
            return cls({path.name: path.read_bytes() for path in paths if path.is_file()})
        except ArtifactError as error:
            raise ArtifactError(f"{os.fspath(folder)}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, if there is one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, if there is one."""
        return self._special_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; without special tokens for a prompt that a chat template made, which has its own."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for messages `{"role": ..., "content": ...}`; `variables` (tools, ...) go to the template.

        Templates are code from the checkpoint: they run in jinja's immutable sandbox, as in transformers.

        Raises: InputError if there is no template or it refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; give the prompt as text")
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **{**self.special_tokens, **variables}
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refused the messages: {error}") from error

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _json(self, name: str) -> dict[str, Any]:
        parsed = parse_json(self.files[name], name) if name in self.files else {}
        if not isinstance(parsed, dict):
            raise ArtifactError(f"{name} is not an object")
        return parsed

    def _template(self, config: Mapping[str, Any]) -> str | None:
        if "chat_template.jinja" in self.files:
            return _utf8(self.files["chat_template.jinja"], "chat_template.jinja")
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str | None):
            raise ArtifactError(f"tokenizer_config.json: chat_template is no text but {template!r:.80}")
        return template


def _text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)


def read_text(path: str | os.PathLike[str]) -> str:
    """The contents of a text file; raises InputError where it isn't UTF-8, OSError where it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)}: not UTF-8 text (byte {error.start})") from None


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{name} is not UTF-8: {error}") from None


class _Namespace(jinja2.utils.Namespace):
    """Attributes that begin with an underscore lead into Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja's own escapes HTML


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is just rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment
