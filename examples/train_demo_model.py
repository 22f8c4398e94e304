"""Train the small language model that `jisu demo` runs, from text that every Python installation already has.

    python examples/train_demo_model.py --out jisu/demo                 # about a quarter of an hour on one core
    python examples/train_demo_model.py --out /tmp/demo --minutes 1     # a quick look

The text is Python's own documentation as the standard library ships it: the language reference (`pydoc_data.topics`)
and the docstrings and comments of its modules, cleaned to plain English prose. The model is a Llama with grouped-query
attention and tied embeddings; the folder that comes out loads with transformers like any other checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

BOS, EOS = "<s>", "</s>"
PROMPT = "When a module is imported"
HELD_OUT_ONE_IN = 20
MAX_FOLDER_BYTES = 3_600_000


# ---------------------------------------------------------------------------------------------------------------- text


@attrs.frozen
class Document:
    """One topic of the language reference, or one module's docstrings and comments, as paragraphs of prose."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, one blank line between them."""
        return "\n\n".join(self.paragraphs)

    @property
    def held_out(self) -> bool:
        """Whether the document is kept from training; a checksum of the name decides, so runs agree."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_ONE_IN == 0


BULLET = re.compile(r"^(\s*)(?:[-*+o]|\(?[0-9a-z][.)]|[0-9]+[.)])\s+(?=\S)")
PLAIN_WORD = re.compile(r"^[\"'(]*(?:[A-Za-z]+(?:['-][A-Za-z]+)*|[0-9]+)[\"')]*[.,;:!?]*[\"')]*$")
NOISE = re.compile(
    r"XXX|TODO|FIXME|noqa|https?:|>>>|::|\$Id|@|[Cc]opyright|\(C\)|[Ll]icens|[Pp]ublic domain|All [Rr]ights"
)
MARKUP = (
    (re.compile(r":[a-z:]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :func:`name`, :ref:`title <target>`
    (re.compile(r"``?([^`]*)``?"), r"\1"),  # ``literal`` and `name`
    (re.compile(r"``?([^`']*)''?"), r"\1"),  # `old style quotes'
    (re.compile(r"(?<![\w*])\*{1,2}([^\s*](?:[^*]*[^\s*])?)\*{1,2}(?![\w*])"), r"\1"),  # *emphasis*, **strong**
    (re.compile(r"\s*\[[0-9]+\]_?"), ""),  # footnote marks
    (re.compile(r"\s+"), " "),
)


def prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that read as English, one line each, without reStructuredText markup.

    A paragraph is a run of lines of equal indentation. It is kept when it starts like a sentence, ends like one, has
    eight words or more and is made of plain words for five sixths; grammar, code, tables and headings fail that.
    """
    for lines in _blocks(text):
        paragraph = " ".join(lines)
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = paragraph.strip()
        words = paragraph.split(" ")
        plain = sum(PLAIN_WORD.match(word) is not None for word in words)
        if (
            len(words) >= 8
            and re.match(r"[\"'(]?[A-Z]", paragraph)
            and paragraph.endswith((".", "!", "?", ".)"))
            and paragraph.isascii()
            and not NOISE.search(paragraph)
            and 6 * plain >= 5 * len(words)
        ):
            yield paragraph


def _blocks(text: str) -> Iterator[list[str]]:
    """Split at blank lines, at bullets and wherever the indentation changes."""
    block: list[str] = []
    indent = -1
    for line in text.expandtabs().splitlines():
        bullet = BULLET.match(line)
        if bullet:
            line = " " * bullet.end() + line[bullet.end() :]
        here = len(line) - len(line.lstrip())
        if block and (not line.strip() or bullet or here != indent):
            yield block
            block = []
        if line.strip():
            block.append(line.strip())
            indent = here
    if block:
        yield block


def reference_texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each topic of the language reference that `help()` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"reference/{name}", topics[name]


def module_texts(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each module under `root`, the standard library.

    Tests and installed packages are left out, and so is every file that states a copyright of its own: what remains
    is under Python's licence alone.
    """
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if re.search(r"(^|/)(tests?|idle_test|site-packages|_vendor|_bundled|config-[^/]*|pydoc_data)/", name):
            continue
        source = path.read_bytes().decode("utf-8", "replace")
        if not re.search(r"copyright|all rights reserved", source, re.IGNORECASE):
            yield name, "\n\n".join(_commentary(source))


def compiled_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each module written in C, built in or in `folder`; its docstrings are the text."""
    names = {*sys.builtin_module_names, *(path.name.split(".")[0] for path in folder.glob("*.so"))}
    for name in sorted(name for name in names if "test" not in name):
        try:
            module = importlib.import_module(name)
        except ImportError:  # built against a library that this machine lacks
            continue
        things: list[object] = [module]
        for thing in vars(module).values():
            things += [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]
        texts = (getattr(thing, "__doc__", None) for thing in things)
        yield f"compiled/{name}", "\n\n".join(text for text in texts if isinstance(text, str))


def _commentary(source: str) -> list[str]:
    """The docstrings and the blocks of whole-line comments of a module, in the order of its lines."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((node.body[0].lineno, docstring))
    previous = (-1, -1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            row, column = token.start
            text = token.string.lstrip("#!:")
            if previous == (row - 1, column):
                found[-1] = (found[-1][0], f"{found[-1][1]}\n{text}")
            else:
                found.append((row, text))
            previous = (row, column)
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def documents() -> list[Document]:
    """The corpus: every paragraph once, where it first occurs, and only documents that keep two or more."""
    seen: set[str] = set()
    result = []
    stdlib = Path(sysconfig.get_path("stdlib"))
    for texts in (reference_texts(), module_texts(stdlib), compiled_texts(stdlib / "lib-dynload")):
        for name, text in texts:
            fresh = []
            for paragraph in prose(text):
                key = re.sub(r"\W+", " ", paragraph).lower()
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            if len(fresh) >= 2:
                result.append(Document(name, tuple(fresh)))
    return result


# ----------------------------------------------------------------------------------------------------------- the model


def train_tokenizer(texts: Sequence[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary` tokens; every encoded text starts with the beginning-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.7 million float32 parameters: the most that fits the folder's size in bfloat16."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one int64 tensor [tokens], each text between its beginning and end tokens."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(stream: torch.Tensor, context: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield windows [context + 1] of the stream for ever: each epoch covers it once, cut and ordered anew."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - context, context)
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            yield stream[start : start + context + 1]


def next_token_loss(model: LlamaForCausalLM, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of each next token of `batch`, int64 [windows, context + 1]."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """Nats per token over the whole stream, cut into consecutive windows of at most `context` tokens."""
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, context):
        total += next_token_loss(model, stream[None, start : start + context + 1], "sum").item()
    model.train()
    return total / (len(stream) - 1)


@attrs.frozen
class Training:
    """How to train: seconds (or a fixed number of steps), and the choices that the schedule needs."""

    seconds: float
    steps: int | None
    context: int = 256
    batch: int = 8
    peak_rate: float = 4e-3
    final_rate: float = 1e-4
    warmup_steps: int = 60
    weight_decay: float = 0.3
    clip_norm: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at `step`: linear warm-up, then half a cosine down to the final rate."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.final_rate + (self.peak_rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, how: Training, seed: int) -> int:
    """Train in place with AdamW in float32 and return the number of steps.

    Without a given number of steps, the steps of the warm-up are timed and the schedule is made as long as the time
    allows; the seed and the number of steps together then repeat the run.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    source = windows(stream, how.context, torch.Generator().manual_seed(seed))
    steps = how.steps or how.warmup_steps
    step, begin, smooth = 0, time.monotonic(), math.nan
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step, steps)
        loss = next_token_loss(model, torch.stack([next(source) for _ in range(how.batch)]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip_norm)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        step += 1
        elapsed = time.monotonic() - begin
        if step == how.warmup_steps and how.steps is None:
            steps = max(how.warmup_steps, round(how.seconds * step / elapsed))
        if step % 100 == 0 or step in (10, how.warmup_steps, steps):
            epochs = step * how.batch * how.context / len(stream)
            left = elapsed / step * (steps - step) / 60
            print(
                f"step {step}/{steps}  epoch {epochs:.2f}  loss {smooth:.3f}  "
                f"{step * how.batch * how.context / elapsed:.0f} tokens/s  {left:.1f} min left",
                file=sys.stderr,
            )
        if step % 500 == 0:
            print(f"  held-out loss {evaluate(model, held_out, how.context):.4f} nats per token", file=sys.stderr)
    return steps


# ------------------------------------------------------------------------------------------------------------- output

README = """\
---
license: other
license_name: psf-2.0
language: en
library_name: transformers
---
# The model of `jisu demo`

A Llama of {parameters:,} parameters in bfloat16: d {hidden}, {layers} layers, {heads} query and {kv_heads} key/value
heads of {head_dim}, feed-forward {intermediate}, {vocabulary} tokens of byte-level BPE, tied embeddings. It writes
sentences in the manner of Python's documentation. It is there to show and measure the compiler on a really trained
model without any download; what it says about Python is often wrong.

A good prompt is `{prompt}`; others are `An object is`, `If the object` and `The return statement`.
Sample, as `generation_config.json` says: greedy text repeats itself, as it does with any model this small.

## Provenance
`examples/train_demo_model.py` made every file of this folder from random weights. The text is Python's own
documentation as the standard library of {python} ships it: the language reference in
`pydoc_data/topics.py`, and the docstrings and comments of its modules, except files that state a copyright of their
own. Only paragraphs of plain prose were kept, each once: {documents} documents, {text_bytes:,} bytes. The text is
under the PSF License Agreement, version 2 (PSF-2.0; `PSF-LICENSE.txt`,
https://docs.python.org/3/license.html): {copyright}

## Training
| | |
|---|---|
| command | `{command}` |
| training text | {train_tokens:,} tokens of {train_documents} documents |
| held-out text | {held_tokens:,} tokens, {held_bytes:,} bytes of {held_documents} documents |
| steps | {steps:,} of {batch} windows of {context} tokens ({epochs:.2f} epochs) |
| optimizer | AdamW in float32, cosine from {peak_rate:g} to {final_rate:g}, {warmup} steps of \
warm-up, weight decay {decay:g}, clipped at {clip:g} |
| time | {minutes:.1f} minutes on one thread |
| held-out loss | {loss:.4f} nats per token (bfloat16 weights; float32 before rounding: {loss32:.4f}) |
| held-out bits per byte | {bits:.4f} |
| made with | torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The held-out loss is over consecutive windows of {context} tokens. Positions up to {max_length} are accepted; training
saw {context}. Whole documents are held out and repeated paragraphs are removed before the split.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with the tokenizer and the defaults for sampling."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Compact JSON: the vocabulary's share of the folder halves.
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")


def replace_folder(new: Path, out: Path) -> None:
    """Put `new` where `out` is, so that a reader meets the old folder or the new one, never a mixture."""
    new.chmod(0o755)
    for path in new.iterdir():
        path.chmod(0o644)
    if not out.exists():
        os.replace(new, out)
        return
    old = new.with_name(new.name + ".old")
    os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def show_samples(folder: Path, seed: int) -> None:
    """Print one greedy and two sampled continuations from the saved folder, as a user would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    for sample in (False, True, True):
        choice = {} if sample else {"do_sample": False, "temperature": None, "top_p": None}
        ids = model.generate(**inputs, max_new_tokens=120, **choice)
        kind = "sampled" if sample else "greedy, with the repetition penalty"
        print(f"--- {kind}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message on values that can't work."""
    parser = argparse.ArgumentParser(description="Train the language model of `jisu demo` on Python's documentation.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an earlier checkpoint is replaced")
    parser.add_argument("--minutes", type=float, default=12.0, help="time to train (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train this many steps instead: repeats a run exactly")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    out: Path = options.out
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out} exists and holds no checkpoint; name a new or an empty folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the text, the tokenizer and the model; write them to one folder; print the held-out figures."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    torch.manual_seed(options.seed)
    how = Training(seconds=60 * options.minutes, steps=options.steps)

    corpus = documents()
    kept = [document.text for document in corpus if not document.held_out]
    held = [document.text for document in corpus if document.held_out]
    tokenizer = train_tokenizer(kept, vocabulary=2048, max_length=1024)
    stream, held_stream = token_stream(tokenizer, kept), token_stream(tokenizer, held)
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    held_bytes = sum(len(text.encode()) for text in held)
    print(
        f"{len(corpus)} documents, {len(stream):,} tokens to train on, {len(held_stream):,} held out; "
        f"{parameters:,} parameters",
        file=sys.stderr,
    )

    begin = time.monotonic()
    steps = train(model, stream, held_stream, how, options.seed)
    minutes = (time.monotonic() - begin) / 60
    loss32 = evaluate(model, held_stream, how.context)

    out: Path = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        save(model, tokenizer, folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        loss = evaluate(saved, held_stream, how.context)
        bits = loss * (len(held_stream) - 1) / math.log(2) / held_bytes
        config = model.config
        (folder / "README.md").write_text(
            README.format(
                parameters=parameters,
                hidden=config.hidden_size,
                layers=config.num_hidden_layers,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                intermediate=config.intermediate_size,
                vocabulary=config.vocab_size,
                prompt=PROMPT,
                python=f"{platform.python_implementation()} {platform.python_version()}",
                documents=len(corpus),
                text_bytes=held_bytes + sum(len(text.encode()) for text in kept),
                copyright=" ".join(sys.copyright.splitlines()[:2]),
                command=f"python examples/train_demo_model.py --out jisu/demo --steps {steps} --seed {options.seed}",
                train_tokens=len(stream),
                train_documents=len(kept),
                held_tokens=len(held_stream),
                held_bytes=held_bytes,
                held_documents=len(held),
                steps=steps,
                batch=how.batch,
                context=how.context,
                epochs=steps * how.batch * how.context / len(stream),
                peak_rate=how.peak_rate,
                final_rate=how.final_rate,
                warmup=how.warmup_steps,
                clip=how.clip_norm,
                decay=how.weight_decay,
                minutes=minutes,
                loss=loss,
                loss32=loss32,
                bits=bits,
                max_length=tokenizer.model_max_length,
                torch=torch.__version__,
                transformers=importlib.import_module("transformers").__version__,
                tokenizers=importlib.import_module("tokenizers").__version__,
            )
        )
        license_text = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
        if license_text.is_file():  # some distributions keep it elsewhere; the address in README.md serves there
            shutil.copyfile(license_text, folder / "PSF-LICENSE.txt")
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MAX_FOLDER_BYTES:
            sys.exit(f"the folder has {size:,} bytes, more than the {MAX_FOLDER_BYTES:,} that the package allows")
        replace_folder(folder, out)
    print(f"held-out loss {loss:.4f} nats per token, {bits:.4f} bits per byte; {size:,} bytes in {out}")
    show_samples(out, options.seed)


if __name__ == "__main__":
    main()
