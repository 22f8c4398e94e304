"""Attention of many tokens in float32 on NVIDIA GPUs: every product is one of float32 and added in float32, without tensor cores."""

from __future__ import annotations

import functools

from jisu.compiler.errors import TargetError
from jisu.compiler.types import round_up
from jisu.targets.cpu.isa import Val
from jisu.targets.cuda.device import Device, DeviceKernel
from jisu.targets.cuda.kernels.attention import LOG2_E, LOW, Form, check
from jisu.targets.cuda.kernels.products import EIGHT
from jisu.targets.target import Target

_ACROSS = 16  # threads of a row
_ROWS = 4  # of a thread
_FOUR = 4  # numbers of 16 bytes


def queries(form: Form) -> int:
    """Rows of a block of `attend_single`, which lie in shared memory beside keys and values."""
    return 64 if form.head_dim <= 128 else 32


def attend_single(form: Form, target: Target) -> DeviceKernel:
    """Attention of many tokens over keys of a cache that holds theirs, too, or over keys given, in float32: a running softmax over tiles of keys.

    Parameters: as of `attention.attend_tokens`. Grid: (b * ceil(s / `queries(form)`), heads). Keys of the next tile come while values are
    multiplied, and values while keys are. Tiles that no row sees are skipped; a row that sees nothing (padding) becomes zeros. Source:
    FlashAttention-2 (Dao, 2023). Raises TargetError for other dtypes, head dimensions that are no multiples of 16 up to 256, and
    unless heads are a multiple of kv_heads.
    """
    check(form)
    if form.dtype != "float32":
        raise TargetError(f"attention in float32, not in {form.dtype}")
    names = [*form.pointers, *(["sinks"] if form.sinks else []), "out"]
    numbers = [("i64", n) for n in ("s", *form.sizes)]
    f = Device(
        f"attend_single{form.suffix}",
        [*(("ptr", p) for p in names), *numbers],
        target,
        queries(form) // _ROWS * _ACROSS,
    )
    pointers, sizes = f.params()[: len(names)], f.params()[len(names) :]
    given = {name: f.memory(p) for name, p in zip(names, pointers, strict=True)}
    _Attention(f, form, given, *sizes).write()
    return f.built()


class _Attention:
    """The kernel under construction. Thread (ty, tx) has every `down`-th row of a block's queries from ty on, of a tile the keys tx + 16 j, and of a
    row's results the chunks of four channels tx + 16 c. State: tops of scores (in powers of two), sums of weights, and a row's results after another's."""

    def __init__(self, f: Device, form: Form, given: dict[str, Val], s: Val, cap: Val, *pages: Val) -> None:
        self.f, self.form, self.given, self.s = f, form, given, s
        self.height, self.keys = queries(form), 32 if form.head_dim <= 128 else 16
        self.down = self.height // _ROWS
        self.chunks = form.head_dim // _FOUR
        self.pitch = round_up(self.chunks, EIGHT)
        self.parts = -(-self.chunks // _ACROSS)  # chunks of a row that a thread has, at most
        tiles = (s + (self.height - 1)) / self.height
        self.row0, self.head, self.b = f.block() % tiles * self.height, f.block("y"), f.block() / tiles
        self.tx, self.ty = f.thread() % _ACROSS, f.thread() / _ACROSS
        self.past, self.pad, self.total = form.extent(f, given, self.b, s, cap)
        self.row_of = form.row(f, self.b, self.head / (form.heads // form.kv_heads), cap, given.get("table"), *pages)
        line = 16 * self.pitch
        self.held_q, self.held_k, self.held_v = (f.shared(n * line) for n in (self.height, self.keys, self.keys))
        self.held_p = f.shared(self.height * self.keys * 4)

    def row(self, i: int) -> Val:
        """A row of this thread."""
        return self.row0 + (self.ty + self.down * i)

    def fetch(self, name: str, to: Val, first: Val) -> None:
        """Begin to copy a tile of keys or values from key `first` on; beyond the last they are copies of it, which no row sees."""
        f, form, base = self.f, self.form, self.given[name]

        def key(row: Val) -> Val:
            return self.row_of(f.minimum(first + row, self.total - 1))

        if form.scheme == "none":
            f.copy_tile(to, self.keys, self.chunks, lambda r: f.at(base, key(r) * form.head_dim, "float32"), self.pitch)
            return
        for row, eight in f.chunks(self.keys, form.head_dim // EIGHT, f.threads):
            found = form.numbers(f, form.words(f, base, key(row), eight * EIGHT), eight * EIGHT)
            for i in (0, 1):
                place = f.at(to, f.place(row, eight * 2 + i, self.pitch), "i8")
                f.store16(f.packed(found[4 * i : 4 * i + 4], "float32"), place)

    def write(self) -> None:
        """What a block does."""
        f, form = self.f, self.form
        window, block_end = form.window, self.past + self.row0 + self.height
        lowest = f.maximum(self.pad, self.past + self.row0 - (window - 1)) if window else self.pad
        highest = f.minimum(self.total, block_end) if form.causal else self.total
        begin = lowest / self.keys * self.keys
        q = self.given["q"]

        def row_of_q(row: Val) -> Val:
            here = f.minimum(self.row0 + row, self.s - 1)
            return f.at(q, ((self.b * self.s + here) * form.heads + self.head) * form.head_dim, "float32")

        f.copy_tile(self.held_q, self.height, self.chunks, row_of_q, self.pitch)
        f.when(begin < highest, lambda: self.fetch("k", self.held_k, begin))
        f.commit_copies()
        f.when(begin < highest, lambda: self.fetch("v", self.held_v, begin))
        f.commit_copies()
        low, zero = f.const(LOW, "float"), f.const(0.0, "float")
        state = [*[low] * _ROWS, *[zero] * (_ROWS + _ROWS * self.parts * _FOUR)]
        step = functools.partial(self.step, highest)
        *state, _ = f.loop(begin, highest, self.keys, state, step)
        f.copies_done(0)
        self.leave(state)

    def step(self, highest: Val, first: Val, carried: list[Val]) -> list[Val]:
        """A tile of keys."""
        f, later = self.f, first + self.keys
        tops, weights, sums = carried[:_ROWS], carried[_ROWS : 2 * _ROWS], carried[2 * _ROWS :]
        f.copies_done(1)
        f.barrier()  # the keys have come
        scores = self.scores()
        f.barrier()  # and were read
        f.when(later < highest, lambda: self.fetch("k", self.held_k, later))
        f.commit_copies()
        seen = self.seen(first)
        for i in range(_ROWS):
            tops[i], weights[i], factor = self.soften(i, scores[i], seen[i], tops[i], weights[i])
            own = slice(i * self.parts * _FOUR, (i + 1) * self.parts * _FOUR)
            sums[own] = [x * factor for x in sums[own]]
        f.copies_done(1)
        f.barrier()  # the values have come, and the weights are in shared memory
        sums = self.weighed(sums)
        f.barrier()
        f.when(later < highest, lambda: self.fetch("v", self.held_v, later))
        f.commit_copies()
        return [*tops, *weights, *sums]

    def scores(self) -> list[list[Val]]:
        """The products of this thread's queries and keys."""
        f, count = self.f, self.keys // _ACROSS

        def chunk(number: Val, sums: list[Val]) -> list[Val]:
            q = [self.four(self.held_q, self.ty + self.down * i, number, self.pitch) for i in range(_ROWS)]
            k = [self.four(self.held_k, self.tx + _ACROSS * j, number, self.pitch) for j in range(count)]
            for n in range(_FOUR):
                sums = [f.fma(q[i][n], k[j][n], sums[i * count + j]) for i in range(_ROWS) for j in range(count)]
            return sums

        *found, _ = f.loop(0, self.chunks, 1, [f.const(0.0, "float")] * (_ROWS * count), chunk)
        return [found[i * count : (i + 1) * count] for i in range(_ROWS)]

    def seen(self, first: Val) -> list[list[Val]]:
        """Whether this thread's rows see its keys of the tile from key `first` on. Compared are distances, which take few registers."""
        f, form = self.f, self.form

        def short(distance: Val) -> Val:
            return f.cast("trunc", distance, "i32")

        newest = short(self.past + self.row0 - first)  # of the block's first row
        behind, before, padded = short(self.tx - self.ty), short(self.total - first), short(self.pad - first)

        def visible(i: int, j: int) -> Val:
            key, apart = short(self.tx) + _ACROSS * j, behind + (_ACROSS * j - self.down * i)
            limits = [key < before, key >= padded]
            limits += [apart <= newest] if form.causal else []
            limits += [apart > newest - form.window] if form.window else []
            return functools.reduce(lambda a, b: f.op(f"and i1 {a.name}, {b.name}", "i1"), limits)

        return [[visible(i, j) for j in range(self.keys // _ACROSS)] for i in range(_ROWS)]

    def soften(self, i: int, scores: list[Val], seen: list[Val], top: Val, weight: Val) -> tuple[Val, Val, Val]:
        """A tile's step of row i's running softmax, whose weights go to shared memory: its top, its weight, and by what its sums are multiplied."""
        f = self.f
        scores = [f.select(s, self.form.softened(f, x), LOW) for s, x in zip(seen, scores, strict=True)]
        highest = functools.reduce(f.maximum, scores)
        for distance in (1, 2, 4, 8):
            highest = f.maximum(highest, f.other(highest, distance))
        higher = f.maximum(top, highest)
        factor = f.exp2(top - higher)
        weight = weight * factor
        for j, (there, score) in enumerate(zip(seen, scores, strict=True)):
            share = f.select(there, f.exp2(score - higher), 0.0)
            weight = weight + share
            column = self.tx + _ACROSS * j
            at = f.place(self.ty + self.down * i, column / _FOUR, self.keys // _FOUR) + column % _FOUR * 4
            f.store(share, f.at(self.held_p, at, "i8"))
        return higher, weight, factor

    def weighed(self, sums: list[Val]) -> list[Val]:
        """The sums with a tile's values times their weights."""
        f, found, width = self.f, list(sums), self.parts * _FOUR
        for first in range(0, self.parts, 2):  # two chunks of a row at a time: more would take too many registers
            own = range(first, min(first + 2, self.parts))
            places = [i * width + c * _FOUR + n for i in range(_ROWS) for c in own for n in range(_FOUR)]

            def four_keys(number: Val, sums: list[Val], own: range = own) -> list[Val]:
                shares = [
                    self.four(self.held_p, self.ty + self.down * i, number, self.keys // _FOUR) for i in range(_ROWS)
                ]
                for n in range(_FOUR):
                    values = [x for c in own for x in self.four(self.held_v, number * 4 + n, self.chunk(c), self.pitch)]
                    each = [(share[n], x) for share in shares for x in values]
                    sums = [f.fma(share, x, total) for (share, x), total in zip(each, sums, strict=True)]
                return sums

            *some, _ = f.loop(0, self.keys // _FOUR, 1, [sums[p] for p in places], four_keys)
            for place, total in zip(places, some, strict=True):
                found[place] = total
        return found

    def chunk(self, c: int) -> Val:
        """The number of one of this thread's chunks of a row; where there is none, of the last."""
        own = self.tx + _ACROSS * c
        return own if (c + 1) * _ACROSS <= self.chunks else self.f.minimum(own, self.chunks - 1)

    def four(self, held: Val, row: Val, chunk: Val, pitch: int) -> list[Val]:
        """The numbers of a chunk in shared memory."""
        f = self.f
        return f.unpacked(f.load_shared16(f.at(held, f.place(row, chunk, pitch), "i8")), "float32")

    def leave(self, state: list[Val]) -> None:
        """Divide by the weights, and store."""
        f, form = self.f, self.form
        for i in range(_ROWS):
            top, weight = state[i], f.sum_of_lanes(state[_ROWS + i], _ACROSS)
            if form.sinks:
                sink = f.load_f32(self.given["sinks"], self.head, "float32", lanes=1) * LOG2_E
                higher = f.maximum(top, sink)
                kept = f.exp2(top - higher)
                share = kept / f.fma(weight, kept, f.exp2(sink - higher))
            else:
                share = f.select(weight > 0.0, 1.0 / weight, 0.0)
            begin = 2 * _ROWS + i * self.parts * _FOUR
            line = ((self.b * self.s + self.row(i)) * form.heads + self.head) * form.head_dim
            for c in range(self.parts):
                own = [x * share for x in state[begin + c * _FOUR : begin + (c + 1) * _FOUR]]
                chunk = self.tx + _ACROSS * c

                def store(own: list[Val] = own, line: Val = line, chunk: Val = chunk) -> None:
                    to = f.at(self.given["out"], line + chunk * _FOUR, "float32")
                    f.store16(f.packed(own, "float32"), to)

                there = self.row(i) < self.s
                f.when(f.op(f"and i1 {there.name}, {(chunk < self.chunks).name}", "i1"), store)
