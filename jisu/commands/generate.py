"""`jisu generate`: text from a saved program or a checkpoint, streamed as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from jisu.commands.shell import Shell, peak_rss_bytes
from jisu.commands.source import Options, open_program, token_ids
from jisu.compiler.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.runtime.generate import Chunk, Generation
    from jisu.runtime.program import Program

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def run(
    shell: Shell,
    path: str,
    options: Options,
    prompt: str | None,
    prompt_file: str | None,
    chat: bool,
    wanted: Mapping[str, Any],
) -> None:
    """Continue one prompt; `wanted` are fields of GenerationConfig, None where the user said nothing."""
    text = _prompt(prompt, prompt_file)
    chosen = {k: v for k, v in wanted.items() if v is not None}
    if "do_sample" not in chosen and any(name in chosen for name in _SAMPLING):
        chosen["do_sample"] = True
    opened = open_program(shell, path, options)
    program = opened.program
    simulation = program.explain().get("simulation", "")
    if simulation:
        shell.note(f"for {program.target['name']}: {simulation}")
    stream = program.generate(_encoded(program, text, chat), stream=True, **chosen)
    live = not shell.as_json
    generation = _follow(shell, stream, live, plain="tokenizer.json" not in program.parts.files)
    written = generation.text if isinstance(generation.text, str) else (generation.text or [""])[0]
    result = {
        "text": written,
        "prompt": text,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "token_ids": generation.sequences[0],
        "finish_reason": generation.finish_reasons[0],
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "compile_s": opened.compile_s,
        "load_s": opened.load_s,
        "threads": program.num_threads,
        "simulation": simulation,
        "peak_rss_bytes": peak_rss_bytes(),
    }

    def show(console: Console) -> None:
        if not written.endswith("\n"):
            console.print()

    shell.finish(result, show)
    if live and sys.stderr.isatty():
        speed = generation.decode_tokens_per_s
        shell.note(f"[{generation.new_tokens} tokens, {speed:.1f} tokens/s, ended by {generation.finish_reasons[0]}]")


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    try:
        if prompt_file is not None:
            return Path(prompt_file).read_text(encoding="utf-8")
        if sys.stdin is None or sys.stdin.isatty():
            raise typer.BadParameter(
                "there is no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input"
            )
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{prompt_file or 'standard input'}: the prompt is not UTF-8 text ({error.reason})") from None


def _encoded(program: Program, text: str, chat: bool) -> str | list[int]:
    """The prompt for `generate`: the text, or the ids of the chat template's text, which has its own special tokens, or without a tokenizer
    those that the text names."""
    if not chat:
        return text if "tokenizer.json" in program.parts.files else token_ids(text)
    tokenizer = program.tokenizer
    message = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(message, add_special_tokens=False)


def _follow(shell: Shell, stream: Iterator[Chunk], live: bool, plain: bool) -> Generation:
    """Print a stream's text as it comes, or its token ids where they are `plain`, if `live`; returns what the stream returns at its end."""
    while True:
        try:
            chunk = next(stream)
        except StopIteration as end:
            return cast("Generation", end.value)
        said = "".join(f"{token} " for token in chunk.token_ids) if plain else chunk.text
        if live and said:
            shell.out.write(said)
            shell.out.flush()
