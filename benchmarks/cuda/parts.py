"""What compare.py measures, part by part, each in a process of its own: `python parts.py PACK PART OUT`, with OUT a JSON file that grows.

Where torch sees no GPU, all of it runs, too: on the CPU, or on what stands for jisu's GPU there (JISU_CUDA_DRIVER). The times mean nothing then.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import paired_ratio, write_json  # noqa: E402

from jisu.compiler.entry import Entry  # noqa: E402
from jisu.compiler.launches import CUBIN, OWN_PTX, PLANS, PTX  # noqa: E402
from jisu.compiler.types import TensorType, fixed, numpy_dtype  # noqa: E402
from jisu.runtime.cuda import DeviceExecutable  # noqa: E402
from jisu.runtime.program import Program, load  # noqa: E402
from jisu.runtime.session import Sampling  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
_RANDOM = 1 << 24  # numbers that are drawn; tensors are pieces of their repetition
_APART = 0.1  # how far logits may be apart, as the root of the mean square to that of what they should be

Step = Callable[[], Any]


# --- Weights ------------------------------------------------------------------------------------------------------------


@functools.cache
def _repeated(dtype: str, count: int) -> np.ndarray:
    """`count` random numbers: bfloat16 as layers have them, float16 as scales, or bytes."""
    rng = np.random.default_rng(0)
    drawn: np.ndarray
    if dtype == "uint8":
        drawn = rng.integers(0, 256, _RANDOM, np.uint8)
    elif dtype == "float16":
        drawn = (0.002 + 0.002 * rng.random(_RANDOM, np.float32)).astype(np.float16)
    else:
        drawn = (rng.standard_normal(_RANDOM, np.float32) * 0.02).astype(numpy_dtype(dtype))
    return np.resize(drawn, count)


def random_weight(largest: int, rope: float, name: str, kind: TensorType) -> np.ndarray:
    """A weight from its name and type, the same wherever it is asked for; largest: numbers of the largest weight of all."""
    shape = tuple(fixed(d) for d in kind.shape)
    if "inv_freq" in name:
        return (rope ** -(np.arange(shape[0]) / shape[0])).astype(np.float32)
    if name.endswith("norm.weight"):
        return np.ones(shape, numpy_dtype(kind.dtype))
    if "pack_zeros" in name:
        return np.full(shape, 8, np.uint8)
    # A layer has the same numbers however its matrix is shaped: "reshape(NAME, shape=…)".
    begin = zlib.crc32(name.removeprefix("reshape(").partition(",")[0].encode()) % _RANDOM
    return _repeated(kind.dtype, largest + _RANDOM)[begin : begin + int(np.prod(shape))].reshape(shape)


@attrs.frozen
class Pack:
    """What pack.py wrote."""

    folder: Path
    told: dict[str, Any]

    @classmethod
    def at(cls, folder: Path) -> Pack:
        """In a folder."""
        return cls(folder, json.loads((folder / "pack.json").read_text()))

    @property
    def vocabulary(self) -> int:
        """Token ids."""
        return int(self.told["config"]["vocab_size"])

    def weight(self, name: str, kind: TensorType) -> np.ndarray:
        """See `random_weight`."""
        c = self.told["config"]
        return random_weight(
            max(self.vocabulary, 2 * c["intermediate_size"]) * c["hidden_size"], self.told["rope"], name, kind
        )

    def program(self, name: str) -> Program:
        """A program, with random weights."""
        return load(self.folder / f"{name}.jisu", features=tuple, weights=self.weight)

    def kernels(self) -> tuple[DeviceExecutable, dict[str, Entry]]:
        """The kernels alone."""
        files = {n: self.folder / "kernels" / n for n in (CUBIN, OWN_PTX, PTX, PLANS)}
        entries = {name: Entry.from_json(entry) for name, entry in self.told["kernels"].items()}
        return DeviceExecutable({n: p.read_bytes() for n, p in files.items() if p.exists()}, entries), entries

    def ids(self, *shape: int, seed: int = 0) -> np.ndarray:
        """Random tokens."""
        return np.random.default_rng(seed).integers(0, self.vocabulary, shape)


# --- Clocks -------------------------------------------------------------------------------------------------------------


def wait() -> None:
    """Until the GPU has done all."""
    if GPU:
        torch.cuda.synchronize()


def stream() -> int:
    """The address of torch's current stream."""
    return torch.cuda.current_stream().cuda_stream if GPU else 0


def on_gpu(calls: Callable[[int], Any], repeat: int) -> float:
    """Seconds per call on the GPU of calls(0) … calls(repeat - 1), one behind the other, between two events; the host runs ahead of them."""
    calls(0)
    wait()
    if not GPU:
        return wall(calls, repeat)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(repeat):
        calls(i)
    end.record()
    wait()
    return begin.elapsed_time(end) * 1e-3 / repeat


def wall(calls: Callable[[int], Any], repeat: int) -> float:
    """Seconds per call, as the caller sees them; each call has finished when it returns."""
    begin = time.perf_counter()
    for i in range(repeat):
        calls(i)
    return (time.perf_counter() - begin) / repeat


def by_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Each side's seconds, round by round, in alternating order; the peer's to jisu's (the second to the first), with its spread over rounds."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for r in range(rounds):
        for name in list(sides)[:: 1 if r % 2 else -1]:
            times[name].append(sides[name]())
    found: dict[str, Any] = {"seconds": times, "median_s": {n: statistics.median(t) for n, t in times.items()}}
    if len(sides) > 1:
        mine, theirs = times.values()
        found["ratio"] = attrs.asdict(paired_ratio(theirs, mine))
    return found


def apart(got: Any, want: Any) -> float:
    """The root of the mean square of a difference, to that of what it should be; raises ValueError where that is too much."""
    a, b = (
        x.float().cpu().flatten()
        if isinstance(x, torch.Tensor)
        else torch.from_numpy(np.asarray(x, np.float32).flatten())
        for x in (got, want)
    )
    found = float((a - b).norm() / b.norm())
    if not found <= _APART:
        raise ValueError(f"results are wrong: {found:.3f} of their size apart, which is more than {_APART}")
    return found


# --- Parts --------------------------------------------------------------------------------------------------------------

Write = Callable[[], None]


def check(pack: Pack, found: dict[str, Any], write: Write, rounds: int) -> None:
    """A small model's logits beside those of float32 and of the CPU's program, at once and by steps."""
    wanted = np.load(pack.folder / "check.npz")
    ids = wanted["ids"]
    for form in pack.told["forms"]:
        program = load(pack.folder / f"check-{form}.jisu", features=tuple)
        session = program.session(ids.shape[1])
        parts = [session.append(part) for part in np.split(ids, [17, 18, 30, 39], axis=1)]
        found[form] = {
            "whole": apart(np.asarray(program(ids).logits), wanted[form]), "steps": apart(np.concatenate(parts, 1), wanted[form]),
            "exact": float(np.linalg.norm(parts[0] - wanted["exact"][:, :17]) / np.linalg.norm(wanted["exact"][:, :17])),
        }  # fmt: skip
        write()


def copy(pack: Pack, found: dict[str, Any], write: Write, rounds: int) -> None:
    """Bytes per second that a copy on the GPU reads and writes: of 2 GiB, the best of ten."""
    source = torch.empty(1 << (30 if GPU else 10), dtype=torch.int16, device=DEVICE)
    target = torch.empty_like(source)
    best = min(on_gpu(lambda _: target.copy_(source), 1) for _ in range(10))
    found["bytes_per_s"] = 2 * source.numel() * source.element_size() / best
    if GPU:
        found["gpu"] = torch.cuda.get_device_name()


def products(pack: Pack, found: dict[str, Any], write: Write, rounds: int) -> None:
    """Matrix products of a prompt beside torch.matmul (cuBLAS): bfloat16, each with other weights than the one before."""
    executable, entries = pack.kernels()
    for name in (n for n in entries if n.startswith("product")):
        found[name] = _product(executable, name, entries[name].weights[0], int(pack.told["prompt"]), rounds)
        write()


def _product(
    executable: DeviceExecutable, name: str, weight: tuple[str, TensorType], m: int, rounds: int
) -> dict[str, Any]:
    copies, repeat = (8, 24) if GPU else (2, 2)
    label, kind = weight
    k, n = (int(d) for d in name.removeprefix("product_").split("x"))
    rng = np.random.default_rng(0)
    x, *ws = (rng.standard_normal((rows, k), np.float32).astype(numpy_dtype("bfloat16")) for rows in (m, *[n] * copies))
    shape = tuple(fixed(d) for d in kind.shape)
    weights = [executable.prepare(name, {label: w.reshape(shape)}) for w in ws]
    mine = [executable.repeated(name, [x], w, graph=False) for w in weights]
    there, *matrices = (_tensor(array) for array in (x, *ws))
    (got,) = executable.call(name, [x], weights[0])
    found = {"m": m, "k": k, "n": n, "apart": apart(got, there.float() @ matrices[0].float().T)}
    found |= by_turns(
        {
            "jisu": lambda: on_gpu(lambda i: mine[i % copies](stream()), repeat),
            "torch.matmul": lambda: on_gpu(lambda i: there @ matrices[i % copies].T, repeat),
        },
        rounds,
    )
    return {**found, "flops_per_s": {side: 2 * m * n * k / s for side, s in found["median_s"].items()}}


def attention(pack: Pack, found: dict[str, Any], write: Write, rounds: int) -> None:
    """Causal attention of a prompt beside torch's, by whichever of its backends is fastest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    executable, entries = pack.kernels()
    (name,) = (n for n in entries if n.startswith("attention"))
    s, copies, repeat = int(pack.told["prompt"]), 8 if GPU else 2, 24 if GPU else 2
    shapes = [tuple(fixed(d) for d in kind.shape[2:]) for _, kind in entries[name].inputs]
    rng = np.random.default_rng(0)
    sets = [
        [rng.standard_normal((1, s, *shape), np.float32).astype(numpy_dtype("bfloat16")) for shape in shapes]
        for _ in range(copies)
    ]
    mine = [executable.repeated(name, [executable.hold(a) for a in arrays], {}, graph=False) for arrays in sets]
    there = [[_tensor(a).transpose(1, 2).contiguous() for a in arrays] for arrays in sets]
    whole = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    (got,) = executable.call(name, sets[0])
    found["apart"] = apart(got, whole(*(t.float() for t in there[0])).transpose(1, 2))
    write()

    def peer(backend: Any) -> float:
        with sdpa_kernel(backend):
            return on_gpu(lambda i: whole(*there[i % copies]), repeat)

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if GPU else [SDPBackend.MATH]
    for backend in backends:
        try:
            found[backend.name] = by_turns(
                {
                    "jisu": lambda: on_gpu(lambda i: mine[i % copies](stream()), repeat),
                    "torch": functools.partial(peer, backend),
                },
                rounds,
            )
        except RuntimeError as error:  # this torch has no such one
            found[backend.name] = {"error": str(error).splitlines()[0]}
        write()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A bfloat16 array as torch's, on the GPU."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(DEVICE)


class Peer:
    """transformers' model, with the weights that jisu's has in bfloat16, and its static cache; `compiled`: by torch.compile(mode="max-autotune")."""

    def __init__(self, pack: Pack) -> None:
        import transformers as hf

        config = hf.LlamaConfig(
            **pack.told["config"], max_position_embeddings=8192, rope_theta=pack.told["rope"], dtype="bfloat16"
        )
        with torch.device(DEVICE):
            self.model = hf.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(_tensor(pack.weight(name, TensorType(tuple(tensor.shape), "bfloat16"))))
        self.config, self.pack = config, pack

    @torch.no_grad()
    def logits(self, ids: np.ndarray) -> torch.Tensor:
        """Of the last tokens, without a cache."""
        return self.model(torch.from_numpy(ids).to(DEVICE), use_cache=False, logits_to_keep=1).logits

    def decoding(self, context: np.ndarray, slots: int, compiled: bool) -> tuple[Step, Callable[[int], None]]:
        """(go back to the context's end, a step behind it)."""
        import transformers as hf

        cache = hf.StaticCache(config=self.config, max_cache_len=slots)
        ids = torch.from_numpy(context).to(DEVICE)
        with torch.no_grad():
            self.model(ids, past_key_values=cache, logits_to_keep=1)
        forward: Any = self.model
        if compiled and GPU:
            forward = torch.compile(self.model.forward, mode="max-autotune", fullgraph=True)
        token = ids[:, :1].clone()

        def back() -> None:
            for layer in cache.layers:
                length = getattr(layer, "cumulative_length", None)
                if isinstance(length, torch.Tensor):
                    length.fill_(context.shape[1])
                else:  # what is zero counts as empty
                    layer.keys[:, :, context.shape[1] :].zero_()

        @torch.no_grad()
        def step(_: int) -> Any:
            return forward(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).cpu()

        return back, step

    def reading(self, compiled: bool) -> Callable[[int], None]:
        """Read a prompt, another one each time."""
        forward: Any = self.model
        if compiled and GPU:
            forward = torch.compile(self.model.forward, mode="max-autotune-no-cudagraphs")

        @torch.no_grad()
        def read(i: int) -> Any:
            ids = torch.from_numpy(self.pack.ids(1, self.pack.told["prompt"], seed=i)).to(DEVICE)
            return forward(ids, use_cache=False, logits_to_keep=1).logits.argmax(-1).cpu()

        return read


def _decoding(program: Program, context: np.ndarray, slots: int) -> tuple[Any, Step, Callable[[int], None]]:
    """jisu's session and the same of it; as in `generate`, a step is begun before the one before it is waited for."""
    session = program.session(slots)
    session.append(context, last_only=True)
    token, under_way = context[:, :1], []
    greedy = Sampling(*np.zeros((4, len(token))))

    def back() -> None:
        session.length = context.shape[1]
        under_way.clear()

    def step(_: int) -> Any:
        if not session.draws:
            return session.append(token, last_only=True)
        if not under_way:
            under_way.append(session.draw(token, greedy))
        under_way.append(session.draw(under_way[0], greedy))
        return under_way.pop(0).results()

    return session, back, step


def decode(pack: Pack, found: dict[str, Any], write: Write, rounds: int, *, batch: int) -> None:
    """A decode step behind the context; jisu's figures stand before the peer, which takes minutes to compile, is asked for."""
    context = pack.ids(batch, int(pack.told["context"]))
    steps = 20 if GPU else 2
    slots = context.shape[1] + steps + 2  # a first one that isn't counted, and one begun ahead
    peer = Peer(pack)
    exact = peer.logits(np.concatenate([context, context[:, :1]], 1))
    sides: dict[str, Callable[[], float]] = {}
    for form in pack.told["forms"]:
        program = pack.program(form if batch == 1 else f"{form}-paged")
        session, back, step = _decoding(program, context, slots)
        stepped = session.append(context[:, :1], last_only=True)
        whole = program.session(slots).append(np.concatenate([context, context[:, :1]], 1), last_only=True)
        cell: dict[str, Any] = {"apart_from_prefill": apart(stepped, whole)}
        if form == "bfloat16":
            cell["apart_from_peer"] = apart(stepped, exact)
        sides[form] = functools.partial(_run, back, step, steps)
        cell |= by_turns({"jisu": sides[form]}, rounds)
        assert program.decoder is not None
        table = program.parts.weights["model.embed_tokens.weight"].nbytes  # of which a row is read
        read = program.weights_bytes - table + program.decoder.slot_bytes * context.size
        cell |= {"bytes_read": read, "bytes_per_s": read / cell["median_s"]["jisu"]}
        found[form] = cell
        write()
        if batch == 1 and GPU:
            back()
            try:
                cell["in_kernels"] = in_kernels(lambda: step(0), pack.told["programs"][form]["launches"])  # noqa: B023
            except Exception as error:  # there is no CUPTI, or it sees nothing
                cell["in_kernels"] = {"error": str(error)}
            write()
    begin = time.perf_counter()
    back, step = peer.decoding(context, slots, compiled=True)
    theirs = functools.partial(_run, back, step, steps)
    back()
    found["peer_agrees"] = float(
        (step(0) == exact.argmax(-1).cpu()).float().mean()
    )  # of first tokens; near ones may change places
    theirs()
    found["peer_compile_s"] = time.perf_counter() - begin
    write()
    for form, own in sides.items():
        found[form]["beside torch.compile"] = by_turns({"jisu": own, "torch.compile": theirs}, rounds)
        write()


def _run(back: Step, step: Callable[[int], Any], steps: int) -> float:
    back()
    wait()
    return wall(step, steps)


def prefill(pack: Pack, found: dict[str, Any], write: Write, rounds: int) -> None:
    """A prompt, read whole, another one each time."""
    peer = Peer(pack)
    length, repeat = int(pack.told["prompt"]), 3 if GPU else 1
    sides: dict[str, Callable[[], float]] = {}
    for form in pack.told["forms"]:
        reader = pack.program(form).session(length)

        def read(i: int, reader: Any = reader) -> None:
            reader.reset()
            reader.append(pack.ids(1, length, seed=i), last_only=True)

        cell: dict[str, Any] = {}
        if form == "bfloat16":
            cell["apart_from_peer"] = apart(
                reader.append(pack.ids(1, length), last_only=True), peer.logits(pack.ids(1, length))
            )
        sides[form] = functools.partial(wall, read, repeat)
        found[form] = cell | by_turns({"jisu": sides[form]}, rounds)
        write()
    theirs = functools.partial(wall, peer.reading(compiled=True), repeat)
    for form, own in sides.items():
        found[form]["beside torch.compile"] = by_turns({"jisu": own, "torch.compile": theirs}, rounds)
        write()


def in_kernels(step: Step, launches: int, repeat: int = 20) -> dict[str, Any]:
    """The share of a step's time, from its first kernel's beginning to its last one's end, in which some kernel runs: the median over steps, and
    the least, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(repeat):
            step()
        wait()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in traced.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Mem")
    )
    return shares(spans, len(spans) // repeat) | {"planned": launches}


def shares(spans: list[tuple[float, float]], launches: int) -> dict[str, Any]:
    """Of kernels' (begin, end), in order, `launches` a step: what share of each step, from its first begin to its last end, some kernel runs."""
    found = []
    for first in range(0, len(spans) - launches + 1, launches):
        own = spans[first : first + launches]
        busy, end = 0.0, own[0][0]
        for begin, stop in own:
            busy, end = busy + max(0.0, stop - max(begin, end)), max(end, stop)
        found.append(busy / (end - own[0][0]))
    return {"median": statistics.median(found), "least": min(found), "kernels": launches}


PARTS: dict[str, Callable[..., None]] = {
    "check": check, "copy": copy, "products": products, "attention": attention, "prefill": prefill,
}  # fmt: skip


def part(name: str) -> Callable[..., None]:
    """A part by its name; "decode_N" is of batch N."""
    if name.startswith("decode_"):
        return functools.partial(decode, batch=int(name.removeprefix("decode_")))
    return PARTS[name]


@contextmanager
def written(path: Path) -> Iterator[tuple[dict[str, Any], Write]]:
    """What a part finds, and how it is kept; what it found before an error stays."""
    found: dict[str, Any] = {}
    begin = time.perf_counter()

    def write() -> None:
        write_json(path, {**found, "part_s": time.perf_counter() - begin})

    try:
        yield found, write
    finally:
        write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with written(options.out) as (found, write):
        part(options.part)(Pack.at(options.pack), found, write, options.rounds)


if __name__ == "__main__":
    main()
