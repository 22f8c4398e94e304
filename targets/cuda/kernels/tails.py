"""What a block makes of a row of results on NVIDIA GPUs: its norm, its record of levels (`jisu.compiler.levels`), or that of its norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.levels import multiplied, record_bytes, scale_offset, sum_offset
from jisu.compiler.schemes import SCHEMES, groups_of
from jisu.targets.cpu.isa import FLOATS, ITEMSIZE, STORED, Val, vector_type
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.norm import Norm, norm_row, numbers_at_once
from jisu.targets.target import Target, capability

_MOST = 512  # threads of a row, at most
_QUAD = 4  # numbers that a thread rounds at once


@attrs.frozen
class Encoding:
    """`encode_levels` of rows of k numbers of `dtype`; given: whether one scale is."""

    k: int
    dtype: str
    scheme: str
    group: int
    own: bool
    given: bool = False

    def require(self, target: Target) -> None:
        """Raise TargetError unless kernels for the target do it."""
        kind, k = SCHEMES[self.scheme], self.k
        known = kind.uniform or capability(target.mcpu) >= (8, 9)
        if not multiplied(kind, kind) or not known or self.dtype not in FLOATS or k % _QUAD or self.group % _QUAD:
            raise TargetError(
                f"no kernel for {target.mcpu} makes levels of {self.scheme} of {k} numbers of {self.dtype}"
            )


@attrs.frozen
class Tail:
    """What is made of rows: their norm, if there is one, and the levels of that or of the rows."""

    norm: Norm | None = None
    encoding: Encoding | None = None

    @property
    def dtype(self) -> str:
        """Of the rows."""
        how = self.norm or self.encoding
        assert how is not None
        return how.dtype

    @property
    def operands(self) -> list[str]:
        """What is read beside the rows: the norm's gain and bias, a scale."""
        norm = [] if self.norm is None else self.norm.pointers[1:-1]
        return [*norm, *(["scale"] if self.encoding is not None and self.encoding.given else [])]

    @property
    def results(self) -> list[str]:
        """What is written: the norm, the records."""
        return [*(["y"] if self.norm is not None else []), *(["records"] if self.encoding is not None else [])]

    @property
    def pointers(self) -> list[str]:
        """Of a kernel, behind its own parameters."""
        return [*self.operands, *self.results]

    @property
    def name(self) -> str:
        """What tells of it in kernels' names."""
        return ("_normed" if self.norm is not None else "") + ("_levels" if self.encoding is not None else "")


def tailed(tail: Tail, target: Target, *, cut: bool = False) -> DeviceKernel:
    """A tail alone. Parameters: x, `Tail.pointers`. Grid: rows. Raises TargetError for what no kernel does.

    cut: of each `whole` rows of x only `kept` are taken, from the row `first` on; these three numbers follow as parameters.
    """
    width, each = tail.encoding.k if tail.encoding is not None else 0, 2 * _QUAD
    if tail.norm is not None:
        width, each = tail.norm.width, numbers_at_once(tail.norm)
    threads = min(_MOST, max(WARP, -(-width // each // WARP) * WARP))
    names, sizes = ("x", *tail.pointers), ("kept", "whole", "first") if cut else ()
    kinds = [*(("ptr", n) for n in names), *(("i64", n) for n in sizes)]
    f = Device(f"rows{tail.name}{'_cut' if cut else ''}_{width}", kinds, target, threads)
    given, number = f.params(), f.block()
    found = {n: f.memory(p) for n, p in zip(names, given, strict=False)}
    if cut:
        kept, whole, first = given[len(names) :]
        source = number / kept * whole + (first + number % kept)
        found["x"] = f.at(found["x"], (source - number) * width, tail.dtype)
    finish_row(f, tail, number, found)
    return f.built()


def finish_row(f: Device, tail: Tail, number: Val, given: Mapping[str, Val]) -> None:
    """A row's tail by all threads of a block. given: x and `Tail.pointers`. Raises TargetError for what no kernel does."""
    x = given["x"]
    if tail.norm is not None:
        norm_row(f, tail.norm, number, given)
        x = given["y"]
    if tail.encoding is not None:
        tail.encoding.require(f.target)
        if tail.norm is not None:
            f.barrier()  # the row is there
        _Row(f, tail.encoding, number, x, given["records"], given.get("scale")).encode()


class _Row:
    """A block's work on a row. Groups of the row are shared out to the block's warps, one group is the block's; every thread has each so many
    quads of neighbouring numbers of its group, which it reads once. Behind the last quad it has that one, too."""

    def __init__(self, f: Device, how: Encoding, number: Val, x: Val, records: Val, scale: Val | None) -> None:
        self.f, self.how, self.kind = f, how, SCHEMES[how.scheme]
        self.size, self.count = how.group or how.k, groups_of(how.k, how.group)
        self.warps = f.threads // WARP
        self.alone = self.count == 1  # the block is one team
        self.team = f.threads if self.alone else WARP
        thread = f.thread()
        self.lane = thread if self.alone else thread % WARP
        self.warp = thread / WARP
        self.row = f.at(x, number * how.k, how.dtype)
        self.record = f.at(records, number * record_bytes(how.k, how.group, how.own), "i8")
        self.given = None if scale is None else f.load("float", scale)

    def encode(self) -> None:
        """Write the record."""
        f, how, one = self.f, self.how, self.f.const(1.0, "float")
        turns = 1 if self.alone else -(-self.count // self.warps)
        groups = [
            f.i64(0) if self.alone else f.minimum(self.warp + i * self.warps, self.count - 1) for i in range(turns)
        ]
        held = [[(at, there, self.read(at)) for at, there in self.quads(group)] for group in groups]
        reaches = [self.reach([q for _, _, q in quads]) for quads in held]
        first = self.lane.cmp("eq", 0)
        if not how.own:
            reach, lost = (functools.reduce(f.maximum, values) for values in zip(*reaches, strict=True))
            shared = self.scales(self.of_block(reach, f.maximum), self.of_block(lost, f.maximum))
            f.when(f.thread().cmp("eq", 0), lambda: f.store(shared[1], f.at(self.record, scale_offset(how.k), "i8")))
        for group, quads, (reach, lost) in zip(groups, held, reaches, strict=True):
            scale, kept = (
                self.scales(self.of_team(reach, f.maximum), self.of_team(lost, f.maximum)) if how.own else shared
            )
            total = f.const(0.0, "float")
            for at, there, values in quads:
                levels = [self.level(v, scale) for v in values]
                f.store(self.word(levels), f.at(self.record, at, "i8"))
                own = functools.reduce(lambda a, b: a + b, levels)
                total = total + (own if there is None else own * f.select(there, one, 0.0))
            # Sums of levels are below 2^24: exact. Those of small floats stand for nothing.
            total = self.of_team(total, lambda a, b: a + b)
            whole = f.cast("fptosi", total, "i32") if self.kind.uniform else f.const(0, "i32")

            def finish(group: Val = group, whole: Val = whole, kept: Val = kept) -> None:
                base = self.record
                f.store(whole, f.at(f.at(base, sum_offset(how.k, how.group, how.own), "i8"), group, "float32"))
                if how.own:
                    f.store(kept, f.at(f.at(base, scale_offset(how.k), "i8"), group, "float32"))

            f.when(first, finish)
        self.clear()

    def quads(self, group: Val) -> list[tuple[Val, Val | None]]:
        """The first numbers of this thread's quads of a group, and whether they are not only that of the last one (None: always)."""
        f = self.f
        found: list[tuple[Val, Val | None]] = []
        end = f.minimum(group * self.size + self.size, f.i64(self.how.k))
        for i in range(-(-self.size // (_QUAD * self.team))):
            at = group * self.size + (self.lane + i * self.team) * _QUAD
            whole = (i + 1) * self.team * _QUAD <= self.size and self.how.k % self.size == 0
            found.append((at, None) if whole else (f.minimum(at, end - _QUAD), at < end))
        return found

    def read(self, first: Val) -> list[Val]:
        """A quad as float32."""
        f, dtype = self.f, self.how.dtype
        type_ = vector_type(STORED[dtype], _QUAD)
        address = f.at(self.row, first, dtype)
        loaded = f.op(f"load {type_}, {address.type} {address.name}, align {_QUAD * ITEMSIZE[dtype]}", type_)
        stored = [f.op(f"extractelement {type_} {loaded.name}, i32 {i}", STORED[dtype]) for i in range(_QUAD)]
        return [f.widen(v, dtype) for v in stored]

    def reach(self, quads: Sequence[Sequence[Val]]) -> tuple[Val, Val]:
        """The largest of this thread's numbers, and 1 where NaN is among them."""
        f, reach, lost = self.f, self.f.const(0.0, "float"), self.f.const(0.0, "float")
        for value in (v for quad in quads for v in quad):
            reach = f.maximum(reach, f.call("float", "llvm.fabs.f32", value))
            lost = f.select(value.cmp("uno", value), f.const(1.0, "float"), lost)
        return reach, lost

    def of_warp(self, value: Val, join: Callable[[Val, Val], Val]) -> Val:
        """All of a warp's joined, in each thread."""
        for distance in (16, 8, 4, 2, 1):
            value = join(value, self.f.other(value, distance))
        return value

    def of_block(self, value: Val, join: Callable[[Val, Val], Val]) -> Val:
        """All of a block's joined, in each thread."""
        f, own = self.f, self.of_warp(value, join)
        held = f.shared(4 * self.warps)
        f.when((f.thread() % WARP).cmp("eq", 0), lambda: f.store(own, f.at(held, self.warp, "float32")))
        f.barrier()
        return functools.reduce(join, [f.load("float", f.at(held, w, "float32")) for w in range(self.warps)])

    def of_team(self, value: Val, join: Callable[[Val, Val], Val]) -> Val:
        """All of those joined who share a group."""
        return self.of_block(value, join) if self.alone else self.of_warp(value, join)

    def scales(self, reach: Val, lost: Val) -> tuple[Val, Val]:
        """The scale as it divides, and as it is stored."""
        f = self.f
        scale = reach / self.kind.top if self.given is None else self.given
        scale = f.select(scale.cmp("oeq", 0.0), f.const(1.0, "float"), scale)
        infinite = f.call("float", "llvm.fabs.f32", scale).cmp("oeq", float("inf"))
        sound = f.select(infinite, f.const(float("nan"), "float"), scale)
        return scale, f.select(lost > 0.0, f.const(float("nan"), "float"), sound)

    def level(self, value: Val, scale: Val) -> Val:
        """The level as float32; 0 of NaN."""
        f, kind, found = self.f, self.kind, value / scale
        if kind.uniform:
            found = f.call("float", "llvm.rint.f32", found)
        low = -kind.top - kind.uniform
        found = f.select(found < low, f.const(low, "float"), found)
        found = f.select(found > kind.top, f.const(kind.top, "float"), found)
        return f.select(found.cmp("uno", found), f.const(0.0, "float"), found)

    def word(self, values: Sequence[Val]) -> Val:
        """Four levels in bytes."""
        f = self.f
        if not self.kind.uniform:
            halves = [f.to_e4m3(values[i], values[i + 1]) for i in (0, 2)]
            return f.cast("zext", halves[0], "i32") | (f.cast("zext", halves[1], "i32") << 16)
        bytes_ = [f.cast("fptosi", v, "i32") & 255 for v in values]
        return bytes_[0] | (bytes_[1] << 8) | (bytes_[2] << 16) | (bytes_[3] << 24)

    def clear(self) -> None:
        """Zeros between levels and scales, and behind the sums."""
        f, (k, group, own) = self.f, (self.how.k, self.how.group, self.how.own)
        ends = ((k, scale_offset(k)), (sum_offset(k, group, own) + 4 * self.count, record_bytes(k, group, own)))
        for begin, end in ends:

            def put(at: Val, _: list[Val]) -> list[Val]:
                f.store(f.const(0, "i32"), f.at(self.record, at, "i8"))
                return []

            f.loop(f.thread() * 4 + begin, end, 4 * f.threads, [], put)
