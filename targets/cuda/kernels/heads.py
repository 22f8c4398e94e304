"""What becomes of queries, keys and values between their projections and attention, on NVIDIA GPUs: a warp per head of a token.

Heads are normed, turned by their position, made records, and written where attention reads them: in a tensor of their own, or in a cache.
All of a token's heads are one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.rows import ROW_BITS, record_bytes
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.norm import Norm
from jisu.targets.cuda.kernels.records import store_record
from jisu.targets.target import Target

WARPS = 4
"""Heads of a block."""


@attrs.frozen
class Chain:
    """What becomes of one tensor's heads, x [b, s, heads, head_dim]: each step's result is rounded.

    norm: of each head, or None. turned: channels that the rotary embedding turns, 0 for none; `interleaved` as for `rotary`. scheme: of records
    that heads become, or "none". cache: the layout of the cache that they are written to ("contiguous", "ring" or "paged"), "" for a
    result like x.
    """

    heads: int
    norm: Norm | None = None
    turned: int = 0
    interleaved: bool = False
    scheme: str = "none"
    cache: str = ""

    @property
    def pointers(self) -> list[str]:
        """Its parameters: x, of the norm gain and bias, the rotary embedding's angles, and where the heads are written."""
        norm = self.norm
        own = ["gain"] * (norm is not None and norm.gain) + ["bias"] * (norm is not None and norm.bias)
        return ["x", *own, *(["cos", "sin"] if self.turned else []), "to"]


@attrs.frozen
class Heads:
    """Chains of tensors [b, s, …, head_dim] of one dtype. page: slots of a page of paged caches."""

    chains: tuple[Chain, ...]
    head_dim: int
    dtype: str
    page: int = 0

    @property
    def cached(self) -> str:
        """The caches' layout, "" where there is none."""
        return next((chain.cache for chain in self.chains if chain.cache), "")

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Of the kernel: every chain's pointers, of caches the length, the table of paged ones and the flag of faults; then the numbers of
        tokens and of tokens per sequence, of rows of angles for each chain that turns, of slots (of paged caches pages per sequence, and
        pages), and what faults are called: a negative length, slots beyond the last, a page that isn't there."""
        names = [f"{n}{i}" for i, chain in enumerate(self.chains) for n in chain.pointers]
        sizes = ["tokens", "s", *(f"angles{i}" for i, chain in enumerate(self.chains) if chain.turned)]
        if self.cached:
            names += ["length", *(["table"] if self.cached == "paged" else []), "fault"]
            sizes += ["cap", *(["pages"] if self.cached == "paged" else []), "negative", "beyond"]
            sizes += ["outside"] if self.cached == "paged" else []
        return [("ptr", n) for n in names] + [("i64", n) for n in sizes]

    @property
    def count(self) -> int:
        """Heads of a token."""
        return sum(chain.heads for chain in self.chains)


@functools.lru_cache(maxsize=64)
def prepared(how: Heads, target: Target) -> DeviceKernel:
    """The heads' kernel. Parameters: `Heads.parameters`. Grid: ceil(tokens * `Heads.count` / `WARPS`). A cache without room for all of the
    new slots stays as it is, and the fault is noted. Raises TargetError for other dtypes, and for records of rows of unfit length."""
    for chain in how.chains:
        if how.dtype not in FLOATS:
            raise TargetError(f"heads on GPUs are {', '.join(FLOATS)}, not {how.dtype}")
        if chain.scheme != "none" and how.head_dim % (WARP * 8 // ROW_BITS[chain.scheme]):
            raise TargetError(f"no kernel for GPUs makes records of {how.head_dim} numbers")
    f = Device(f"heads_{how.count}x{how.head_dim}", how.parameters, target, WARPS * WARP)
    given = {
        name: f.memory(p) if type_ == "ptr" else p for (type_, name), p in zip(how.parameters, f.params(), strict=True)
    }
    number = f.block() * WARPS + f.thread() / WARP
    token, head = number / how.count, number % how.count

    def of_token() -> None:
        begin = 0
        for i, chain in enumerate(how.chains):
            own = head - begin
            inside = f.op(f"and i1 {(head >= begin).name}, {(own < chain.heads).name}", "i1")
            pointers = {n: given[f"{n}{i}"] for n in chain.pointers}
            angles = given.get(f"angles{i}")
            f.when(inside, functools.partial(_Head(f, how, chain, {**given, **pointers}, token, own, angles).write))
            begin += chain.heads

    f.when(token < given["tokens"], of_token)
    return f.built()


class _Head:
    """A warp's work: one head of a token. Thread t has channels t, t + 32 and so on."""

    def __init__(
        self, f: Device, how: Heads, chain: Chain, given: Mapping[str, Val], token: Val, head: Val, angles: Val | None
    ) -> None:
        self.f, self.how, self.chain, self.given, self.token, self.head = f, how, chain, given, token, head
        self.angles, self.lane = angles, f.thread() % WARP
        self.channels = [self.lane + i for i in range(0, how.head_dim, WARP)]

    def write(self) -> None:
        """The head, to where it belongs."""
        f, how, chain = self.f, self.how, self.chain
        self.base = (self.token * chain.heads + self.head) * how.head_dim
        self.mean, self.scale = self.statistics()
        values = [self.turned(self.within(c)) for c in self.channels]
        if not chain.cache:
            self.store(values, self.base)
            return
        faults, row = self.slot()
        broken = functools.reduce(lambda a, b: f.op(f"or i1 {a.name}, {b.name}", "i1"), [fails for fails, _ in faults])

        def note() -> None:
            code = faults[-1][1]
            for fails, other in reversed(faults[:-1]):
                code = f.select(fails, other, code)
            f.store(f.cast("trunc", code, "i32"), self.given["fault"])

        def put() -> None:
            if chain.scheme == "none":
                self.store(values, row * how.head_dim)
            else:
                begin = row * record_bytes(chain.scheme, how.head_dim)
                store_record(f, values, self.given["to"], begin, self.lane, chain.scheme)

        f.when(broken, note, put)

    def store(self, values: Sequence[Val], base: Val) -> None:
        """The channels from number `base` on."""
        f, how = self.f, self.how
        for channel, value in zip(self.channels, values, strict=True):

            def put(channel: Val = channel, value: Val = value) -> None:
                f.store_f32(value, self.given["to"], base + channel, how.dtype)

            f.when(channel < how.head_dim, put)

    def within(self, channel: Val) -> Val:
        """The channel, or, where that is none, the last one."""
        return channel if self.how.head_dim % WARP == 0 else self.f.minimum(channel, self.how.head_dim - 1)

    def read(self, channel: Val) -> Val:
        """A channel as it was."""
        return self.f.load_f32(self.given["x"], self.base + channel, self.how.dtype, lanes=1)

    def statistics(self) -> tuple[Val, Val]:
        """What the norm takes off and divides by."""
        f, norm, size = self.f, self.chain.norm, self.how.head_dim
        zero = f.const(0.0, "float")
        if norm is None:
            return zero, zero
        values = [self.read(self.within(c)) for c in self.channels]

        def mean_of(numbers: Sequence[Val]) -> Val:
            own = [f.select(c < size, v, 0.0) for c, v in zip(self.channels, numbers, strict=True)]
            return f.sum_of_warp(functools.reduce(lambda a, b: a + b, own)) / float(size)

        mean = zero if norm.rms else mean_of(values)
        less = values if norm.rms else [v - mean for v in values]
        return mean, f.call("float", "llvm.sqrt.f32", mean_of([v * v for v in less]) + norm.eps)

    def normed(self, channel: Val) -> Val:
        """A channel behind the norm."""
        f, norm, dtype, value = self.f, self.chain.norm, self.how.dtype, self.read(channel)
        if norm is None:
            return value
        value = (value if norm.rms else value - self.mean) / self.scale
        if norm.gain:
            gain = f.load_f32(self.given["gain"], channel, dtype, lanes=1)
            value = f.rounded(value, dtype) if norm.round_first else value
            value = value * (gain + norm.offset if norm.offset else gain)
        if norm.bias:
            value = value + f.load_f32(self.given["bias"], channel, dtype, lanes=1)
        return f.rounded(value, dtype)

    def turned(self, channel: Val) -> Val:
        """A channel behind the rotary embedding."""
        f, how, chain, width = self.f, self.how, self.chain, self.chain.turned
        value = self.normed(channel)
        if self.angles is None:
            return value
        own = channel if width == how.head_dim else f.minimum(channel, width - 1)
        if chain.interleaved:
            low, other = (own & 1).cmp("eq", 0), f.op(f"xor i64 {own.name}, 1", "i64")
        else:
            low = own < width // 2
            other = f.select(low, own + width // 2, own - width // 2)
        partner = self.normed(other)
        place = self.token % self.angles * width + own
        cos, sin = (f.load_f32(self.given[n], place, how.dtype, lanes=1) for n in ("cos", "sin"))
        products = value * cos, f.select(low, -partner, partner) * sin
        found = f.rounded(f.rounded(products[0], how.dtype) + f.rounded(products[1], how.dtype), how.dtype)
        return found if width == how.head_dim else f.select(channel < width, found, value)

    def slot(self) -> tuple[list[tuple[Val, Val]], Val]:
        """What may be wrong, with its number, and the number of the row in the cache."""
        f, how, given = self.f, self.how, self.given
        length, s, cap = f.load("i64", given["length"]), given["s"], given["cap"]
        slots = cap * how.page if how.cached == "paged" else cap
        faults = [(length < 0, given["negative"])]
        if how.cached != "ring":
            faults.append((length + s > slots, given["beyond"]))
        sequence, place = self.token / s, f.maximum((length + self.token % s) % f.maximum(slots, 1), 0)
        rows: Val | int = cap
        if how.cached == "paged":
            at = f.at(given["table"], sequence * cap + f.minimum(place / how.page, cap - 1), "int32")
            page = f.cast("sext", f.load("i32", at), "i64")
            faults += [(page < 0, given["outside"]), (page >= given["pages"], given["outside"])]
            sequence, place, rows = page, place % how.page, how.page
        return faults, (sequence * self.chain.heads + self.head) * rows + place
