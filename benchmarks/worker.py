"""One engine in a process of its own: it loads a checkpoint, then answers one-line JSON requests on standard input.

    python worker.py serve --engine eager --checkpoint DIR --threads 2      # until its standard input ends
    python worker.py compile --checkpoint DIR --cache DIR --preload torch   # one answer: what a user waits for
    python worker.py checkpoint --checkpoint DIR --dtype float32            # writes the checkpoint
    python worker.py roofs --threads 2                                      # what the machine can do at best

Answers go to the real standard output; whatever libraries print goes to standard error. While a worker waits for its
next request it computes nothing, so that engines never disturb each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

SEED = 20260101
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    # Larger than usual, so that layers outweigh the embedding and greedy tokens vary: an error in a layer shows.
    "initializer_range": 0.06,
}
"""A Llama of the 160M class: 75.5M parameters in layers, 24.6M in the embedding, 24.6M in the head."""

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""What `--tiny` puts in its place, to try the benchmark itself."""

HEAVY = ("torch", "transformers", "tvm")
"""Packages whose import a user waits for, too."""


class Stopwatch:
    """Wall and CPU seconds since it was made or last read."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """(wall, CPU) seconds since the last lap."""
        wall, cpu = time.perf_counter(), time.process_time()
        passed = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return passed


class Engine(Protocol):
    """Something that generates."""

    @property
    def lanes(self) -> Sequence[str]:
        """The kinds of cache that it can generate with."""
        ...

    def begin(self, lane: str, capacity: int) -> None:
        """Forget the last sequence; what comes next fits into `capacity` tokens."""
        ...

    def append(self, ids: list[int]) -> int:
        """Read tokens and return the most probable next one."""
        ...

    def logits(self, ids: list[int], exact: bool) -> np.ndarray:
        """Logits float32 [tokens, vocabulary] of a whole sequence; `exact`: in float32 arithmetic, where it can."""
        ...


class Jisu:
    """jisu's session, from a checkpoint folder."""

    lanes = ("session",)

    def __init__(self, checkpoint: Path, threads: int, cache: Path) -> None:
        import jisu

        self._program = jisu.compile(checkpoint, num_threads=threads, cache_dir=cache)
        self._session: Any = None
        self._capacity = 0

    def begin(self, lane: str, capacity: int) -> None:
        """Reuse the session's memory where the capacity is the same."""
        if self._session is None or capacity != self._capacity:
            self._session, self._capacity = self._program.session(capacity), capacity
        self._session.reset()

    def append(self, ids: list[int]) -> int:
        """One step of the session."""
        return int(self._session.append([ids], last_only=True)[0, -1].argmax())

    def logits(self, ids: list[int], exact: bool) -> np.ndarray:
        """All logits of one `append`; jisu has no other precision than the checkpoint's."""
        import numpy as np

        if exact:
            raise ValueError("jisu computes in the checkpoint's precision only")
        return np.asarray(self._program.session(len(ids)).append([ids])[0], np.float32)


class Transformers:
    """transformers' model with a cache of its own; `compiled`: its forward went through torch.compile."""

    def __init__(self, checkpoint: Path, threads: int, compiled: bool, freezing: bool) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        transformers.logging.set_verbosity_error()
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
        self._compiled = compiled
        self.lanes: Sequence[str] = ("static",) if compiled else ("dynamic", "static")
        self._cache: Any = None
        self._static: dict[int, Any] = {}
        if compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = freezing
            self._model.forward = torch.compile(self._model.forward, fullgraph=True, dynamic=False)

    @contextmanager
    def _no_grad(self) -> Iterator[None]:
        # Inference mode is the faster of the two, but its tensors can't be mutated in a compiled graph.
        with self._torch.no_grad() if self._compiled else self._torch.inference_mode():
            yield

    def begin(self, lane: str, capacity: int) -> None:
        """A new dynamic cache, or the static one of this capacity, emptied."""
        if lane == "dynamic":
            self._cache = self._transformers.DynamicCache(config=self._model.config)
            return
        if capacity not in self._static:
            self._static[capacity] = self._new_static(capacity)
        self._cache = self._static[capacity]
        self._cache.reset()

    def _new_static(self, capacity: int) -> Any:
        config = self._model.config
        cache = self._transformers.StaticCache(config=config, max_cache_len=capacity)
        head = config.hidden_size // config.num_attention_heads
        # Else the compiled prefill would allocate it, and recompile once it's there.
        cache.early_initialization(1, config.num_key_value_heads, head, self._model.dtype, self._model.device)
        return cache

    def append(self, ids: list[int]) -> int:
        """One forward call, with the logits of the last token only."""
        with self._no_grad():
            given = self._torch.tensor([ids])
            out = self._model(input_ids=given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

    def logits(self, ids: list[int], exact: bool) -> np.ndarray:
        """Without a cache; `exact` runs a float32 copy of the weights."""
        if self._compiled:
            raise ValueError("logits are asked of the eager model")
        model = self._model
        if exact and model.dtype != self._torch.float32:
            config = type(model.config).from_dict(model.config.to_dict())
            model = type(model)(config).to(self._torch.float32).eval()
            model.load_state_dict(self._model.state_dict())
        with self._no_grad():
            out: torch.Tensor = model(input_ids=self._torch.tensor([ids]), use_cache=False).logits
        return out[0].float().numpy()


def make_engine(name: str, checkpoint: Path, threads: int, cache: Path) -> Engine:
    """An engine by name: jisu, eager, compile, or frozen (torch.compile with weights folded in and packed)."""
    if name == "jisu":
        return Jisu(checkpoint, threads, cache)
    return Transformers(checkpoint, threads, compiled=name != "eager", freezing=name == "frozen")


def generate(engine: Engine, lane: str, prompt: list[int], steps: int) -> dict[str, Any]:
    """Read a prompt, then generate `steps` tokens greedily, timing both; the first token belongs to the prompt."""
    engine.begin(lane, len(prompt) + steps)
    watch = Stopwatch()
    tokens = [engine.append(prompt)]
    prefill, prefill_cpu = watch.lap()
    for _ in range(steps):
        tokens.append(engine.append([tokens[-1]]))
    decode, decode_cpu = watch.lap()
    return {
        "prefill_s": prefill,
        "prefill_cpu_s": prefill_cpu,
        "decode_s": decode,
        "decode_cpu_s": decode_cpu,
        "tokens": tokens,
    }


def roofs(threads: int) -> dict[str, float]:
    """What torch reaches on this machine: reads in bytes/s, matrix products in FLOP/s (best of 5)."""
    import torch

    torch.set_num_threads(threads)
    block = torch.ones(128 << 20, dtype=torch.float32)
    single, half = torch.ones(1536, 1536), torch.ones(1536, 1536, dtype=torch.bfloat16)

    def best(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return {
        "read_bytes_per_s": block.nbytes / best(block.sum),
        "float32_flops": 2 * 1536**3 / best(lambda: single @ single),
        "bfloat16_flops": 2 * 1536**3 / best(lambda: half @ half),
    }


def serve(engine: Engine, requests: IO[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        asked = json.loads(line)
        if asked["do"] == "generate":
            answer(generate(engine, asked["lane"], asked["prompt"], asked["steps"]))
        elif asked["do"] == "logits":
            import numpy as np

            np.save(asked["path"], engine.logits(asked["ids"], asked["exact"]))
            answer({})
        else:
            raise ValueError(f"unknown request {asked['do']!r}")


def peak_bytes(process: str = "self") -> int:
    """The most memory that a process held at once, pages of mapped files included; 0 where it has ended.

    From the kernel's count of its address space: `ru_maxrss` would also remember the parent that was forked.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def children_peak_bytes() -> int:
    """The greatest peak among this process's children, ended or running."""
    running = [task.read_text().split() for task in Path("/proc/self/task").glob("*/children")]
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max([ended, *(peak_bytes(child) for found in running for child in found)])


def measure_compile(checkpoint: Path, threads: int, cache: Path, preload: Sequence[str]) -> dict[str, Any]:
    """Seconds and memory of `jisu.compile(checkpoint)` in this process, with the imports that it needs timed apart."""
    import importlib

    watch = Stopwatch()
    import jisu

    for name in preload:
        importlib.import_module(name)
    imports, _ = watch.lap()
    before = peak_bytes()
    program = jisu.compile(checkpoint, num_threads=threads, cache_dir=cache)
    compiled, compiled_cpu = watch.lap()
    after = peak_bytes()
    program.session(32).append([[1, 2, 3, 4]], last_only=True)
    first, _ = watch.lap()
    return {
        "imports_s": imports,
        "compile_s": compiled,
        "compile_cpu_s": compiled_cpu,
        "first_call_s": first,
        "stages": program.explain()["times"],
        "imported": [name for name in HEAVY if name in sys.modules],
        "peak_before_bytes": before,
        "peak_bytes": after,
        "children_peak_bytes": children_peak_bytes(),
        "weights_bytes": program.weights_bytes,
    }


def make_checkpoint(folder: Path, dtype: str, tiny: bool) -> dict[str, Any]:
    """A Llama with random weights from a fixed seed, as `save_pretrained` writes it."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(**(SHAPE | TINY if tiny else SHAPE))
    with torch.no_grad():
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(folder)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    total = sum(p.numel() for p in model.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    return {
        "parameters": total,
        "layer_parameters": layers,
        "embedding_parameters": embedding,
        "vocab": config.vocab_size,
    }


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("serve", "compile", "checkpoint", "roofs"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--engine", choices=("jisu", "eager", "compile", "frozen"), default="jisu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--preload", default="")
    given = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    if given.role == "checkpoint":
        answer(make_checkpoint(given.checkpoint, given.dtype, given.tiny))
    elif given.role == "roofs":
        answer(roofs(given.threads))
    elif given.role == "compile":
        preload = [name for name in given.preload.split(",") if name]
        answer(measure_compile(given.checkpoint, given.threads, given.cache, preload))
    else:
        begin = time.perf_counter()
        engine = make_engine(given.engine, given.checkpoint, given.threads, given.cache)
        answer({"load_s": time.perf_counter() - begin, "lanes": list(engine.lanes)})
        serve(engine, sys.stdin, answer)


if __name__ == "__main__":
    main()
