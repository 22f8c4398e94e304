"""Attention on NVIDIA GPUs: of one token split along its keys, of many tokens on tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import attrs

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import ITEMSIZE, Val
from jisu.targets.cuda.device import PAIRS, WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.products import EIGHT
from jisu.targets.cuda.kernels.records import numbers_of_record, words_of_record
from jisu.targets.cuda.kernels.tails import Tail, finish_row
from jisu.targets.target import Target

LOG2_E = 1.4426950408889634
LOW = -1e30  # stands for minus infinity, without the NaN of its difference with itself
_ATTENTION_WARPS = 4
LAYOUTS = ("contiguous", "ring", "paged", "plain")


@attrs.frozen
class Form:
    """What is attended to, and how.

    layout: of keys and values: "contiguous" [b, kv_heads, cap, d], "ring" (a slot is the position modulo cap), "paged" [pages, kv_heads,
    page, d] behind a table int32 [b, cap] of page numbers, or "plain" [b, cap, kv_heads, d] without a cache. causal: always with a cache.
    window, softcap: 0 for none. sinks: [heads] that join the denominators. dtype: of all tensors, bfloat16, float16 or
    float32, but for a cache with a scheme, whose rows are records of `jisu.compiler.rows`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: str = "contiguous"
    page: int = 0
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: str = "bfloat16"
    scheme: str = "none"

    @property
    def keys(self) -> int:
        """Keys per step of `attend_tokens`."""
        return 64 if self.head_dim <= 128 else 16

    @property
    def suffix(self) -> str:
        """What is told of it in kernels' names."""
        return "" if self.scheme == "none" else f"_{self.scheme}"

    @property
    def cached(self) -> bool:
        """Whether keys come from a cache, to which `start` and `length` belong."""
        return self.layout != "plain"

    @property
    def pointers(self) -> list[str]:
        """Tensors that every kernel over the keys takes, in order."""
        own = ["table"] if self.layout == "paged" else []
        return ["q", "k", "v", *own, *(["start", "length"] if self.cached else [])]

    @property
    def sizes(self) -> list[str]:
        """Numbers that every kernel over the keys takes behind the tensors: slots (of a paged cache pages per sequence), and how many pages
        there are."""
        return ["cap", "pages"] if self.layout == "paged" else ["cap"]

    def reach(self, f: Device, total: Val, cap: Val) -> Val:
        """So many keys as there is room for: a cache that is too small is a fault that has been noted by now, and no reason to read beyond it."""
        if self.layout == "contiguous":
            return f.minimum(total, cap)
        return f.minimum(total, cap * self.page) if self.layout == "paged" else total

    def row(
        self, f: Device, b: Val, head: Val, cap: Val, table: Val | None, pages: Val | None = None
    ) -> Callable[[Val], Val]:
        """The number of a key's row of `head_dim` elements, by its position."""
        if self.layout == "plain":
            return lambda key: (b * cap + key) * self.kv_heads + head
        if table is not None and pages is not None:

            def paged(key: Val) -> Val:
                page = f.cast("sext", f.load("i32", f.at(table, b * cap + key / self.page, "i32")), "i64")
                page = f.maximum(f.minimum(page, pages - 1), 0)  # others are a fault that has been noted
                return (page * self.kv_heads + head) * self.page + key % self.page

            return paged
        base = (b * self.kv_heads + head) * cap
        return lambda key: base + (key % cap if self.layout == "ring" else key)

    def words(self, f: Device, base: Val, row: Val, channel: Val) -> list[Val]:
        """What is read for eight channels of a key or value."""
        if self.scheme != "none":
            return words_of_record(f, base, row, channel, self.head_dim, self.scheme)
        return eight_of(f, base, row * self.head_dim + channel, self.dtype)

    def numbers(self, f: Device, words: list[Val], channel: Val) -> list[Val]:
        """The channels, float32, of what `words` read."""
        if self.scheme != "none":
            return numbers_of_record(f, words, channel, self.head_dim, self.scheme)
        return [number for four in words for number in f.unpacked(four, self.dtype)]

    def copy(self, f: Device, to: Val, base: Val, row: Callable[[Val], Val]) -> None:
        """Begin to copy a tile of `keys` keys or values, key r of which is row(r); records become numbers on their way."""
        chunks = self.head_dim // EIGHT

        def eight(r: Val, chunk: Val) -> list[Val]:
            return self.numbers(f, self.words(f, base, row(r), chunk * EIGHT), chunk * EIGHT)

        if self.scheme == "none":
            f.copy_tile(
                to, self.keys, chunks, lambda r: f.at(base, row(r) * self.head_dim, self.dtype), _power_of_two(chunks)
            )
        else:
            f.fill_tile(to, self.keys, chunks, eight, self.dtype, _power_of_two(chunks))

    def extent(self, f: Device, given: Mapping[str, Val], b: Val, s: Val, cap: Val) -> tuple[Val, Val, Val]:
        """Of sequence b with s new tokens: keys before these, slots of padding, and keys in all that there is room for."""
        if not self.cached:
            return cap - s, f.i64(0), cap
        past = f.load("i64", given["length"])
        return past, f.load("i64", f.at(given["start"], b, "int64")), self.reach(f, past + s, cap)

    def softened(self, f: Device, product: Val) -> Val:
        """A score in powers of two, from the product of a query and a key."""
        if not self.softcap:
            return product * (self.scale * LOG2_E)
        return f.tanh(product * (self.scale / self.softcap)) * (self.softcap * LOG2_E)


def eight_of(f: Device, base: Val, first: Val, dtype: str) -> list[Val]:
    """What is read, <4 x i32>, for eight numbers from number `first` on, at a multiple of 16 bytes."""
    return [f.load16("<4 x i32>", f.at(base, first + i, dtype)) for i in range(0, EIGHT, 16 // ITEMSIZE[dtype])]


# --- Attention of one token ---------------------------------------------------------------------------------------------


_MOST_SHARING = 8  # query heads of a key whose sums a thread of `attend_token` holds in registers
_READ_AT_ONCE = 16  # numbers of each kind that a thread of the block that joins the parts asks for at once


def sharing(form: Form) -> int:
    """How many query heads of a key a block of `attend_token` works on."""
    group = form.heads // form.kv_heads
    return max(n for n in range(1, _MOST_SHARING + 1) if group % n == 0)


def _power_of_two(count: int) -> int:
    """The least one that isn't smaller."""
    return 1 << (count - 1).bit_length()


def check(form: Form) -> None:
    """Raise TargetError unless the kernels are made for such heads."""
    if form.kv_heads < 1 or form.heads % form.kv_heads:
        raise TargetError(f"{form.heads} query heads can't share {form.kv_heads} key heads evenly")
    if form.head_dim % 16 or not 16 < form.head_dim <= 256:
        raise TargetError(f"heads of {form.head_dim} channels: attention has kernels for 32 to 256, in steps of 16")


def attend_token(form: Form, target: Target, then: Tail | None = None) -> DeviceKernel:
    """Attention of one new token per sequence over a cache, split along the keys; the last block that is done with a part joins all.

    Parameters: q[b, heads, head_dim], k and v (at multiples of 16 bytes), the table of a paged cache, start[b] and length[1] (int64:
    slots of padding, and of keys before the new one, which is in the cache already), the sinks if there are any, out like q, states float32
    [b, heads, parts, head_dim + 2], counters int32 [b, heads / sharing] (0 before and after), of `then` its pointers, `Form.sizes`, parts. A block does a part
    of the keys for `sharing` query heads that share them. Parts are joined in their order. Grid: (b * parts, heads / sharing).
    then: what is made of a token's results, all heads side by side, by the block that is done last with its sequence, for which there is one more
    counter per sequence. Source: FlashDecoding (Dao et al., 2023). Raises TargetError for head dimensions that are no multiples of 16 up to 256,
    and unless heads are a multiple of kv_heads.
    """
    heads, head_dim = form.heads, form.head_dim
    check(form)
    group = sharing(form)
    reading = head_dim // EIGHT  # threads that read a key together, among `lanes`
    lanes = _power_of_two(reading)
    at_once = WARP // lanes  # keys that a warp reads at once
    warps = _ATTENTION_WARPS
    names = [*form.pointers, *(["sinks"] if form.sinks else []), "out", "states", "counters"]
    names += [] if then is None else [f"tail_{n}" for n in then.pointers]
    numbers = [("i64", n) for n in (*form.sizes, "parts")]
    f = Device(
        f"attend_token{form.suffix}{'' if then is None else then.name}",
        [*(("ptr", p) for p in names), *numbers],
        target,
        warps * WARP,
    )
    pointers, (cap, *pages, parts) = f.params()[: len(names)], f.params()[len(names) :]
    given = {name: f.memory(p) for name, p in zip(names, pointers, strict=True)}
    q, k, v, start, length, states = (given[n] for n in ("q", "k", "v", "start", "length", "states"))
    part, own, b = f.block() % parts, f.block("y"), f.block() / parts
    kv = own * group / (heads // form.kv_heads)
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    channel, own_key = lane % lanes * EIGHT, lane / lanes
    reads = None if reading == lanes else channel < head_dim  # those that don't add zeros
    place = channel if reads is None else f.minimum(channel, head_dim - EIGHT)
    total = form.reach(f, f.load("i64", length) + 1, cap)
    low = f.load("i64", f.at(start, b, "int64"))
    if form.window:
        low = f.maximum(low, total - form.window)
    share = (total - low + parts - 1) / parts
    begin = low + share * part
    end = f.minimum(total, begin + share)
    head0, row_of = b * heads + own * group, form.row(f, b, kv, cap, given.get("table"), *pages)
    queries = []
    for g in range(group):
        query = eight_of(f, q, (head0 + g) * head_dim + place, form.dtype)
        numbers_of = [number for four in query for number in f.unpacked(four, form.dtype)]
        queries.append(numbers_of if reads is None else [f.select(reads, x, 0.0) for x in numbers_of])

    def fetch(first: Val) -> list[Val]:
        """The words of the key and the value that this thread has of those from `first` on."""
        row = row_of(f.minimum(first + own_key, end - 1))
        return [word for x in (k, v) for word in form.words(f, x, row, place)]

    def step(first: Val, carried: list[Val]) -> list[Val]:
        carried, here = carried[:-held_words], carried[-held_words:]
        there = first + own_key < end
        ahead = fetch(f.minimum(first + warps * at_once, end - 1))  # while these are multiplied
        keys, values = (form.numbers(f, words, place) for words in (here[: held_words // 2], here[held_words // 2 :]))
        new = []
        for g in range(group):
            top, total_weight, *sums = carried[g * 10 : g * 10 + 10]
            dot = f.const(0.0, "float")
            for x, y in zip(queries[g], keys, strict=True):
                dot = f.fma(x, y, dot)
            score = f.select(there, form.softened(f, f.sum_of_lanes(dot, lanes)), LOW)
            higher = f.maximum(top, score)
            factor, weight = f.exp2(top - higher), f.select(there, f.exp2(score - higher), 0.0)
            new += [higher, f.fma(total_weight, factor, weight)]
            new += [f.fma(s, factor, weight * y) for s, y in zip(sums, values, strict=True)]
        return [*new, *ahead]

    empty = [f.const(LOW, "float"), *[f.const(0.0, "float")] * 9] * group
    first = begin + warp * at_once
    here = fetch(f.maximum(f.minimum(first, end - 1), 0))
    held_words = len(here)
    *state, _ = f.loop(first, end, warps * at_once, [*empty, *here], step)
    for g in range(group):  # the warp's threads that read different keys, then the warps by way of shared memory
        distance = lanes
        while distance < WARP:
            mine = state[g * 10 : g * 10 + 10]
            theirs = [f.other(x, distance) for x in mine]
            state[g * 10 : g * 10 + 10] = _joined(f, mine, theirs)
            distance *= 2
    size = head_dim + 2
    held = f.shared(warps * group * size * 4)

    def leave() -> None:
        for g in range(group):
            here = (warp * group + g) * size
            f.when(channel.cmp("eq", 0), functools.partial(_store_all, f, state[g * 10 : g * 10 + 2], held, here))
            _store_all(f, state[g * 10 + 2 : g * 10 + 10], held, here + 2 + channel)

    writes = lane < lanes
    f.when(writes if reads is None else f.op(f"and i1 {writes.name}, {reads.name}", "i1"), leave)
    f.barrier()
    for g in range(group):

        def join(c: Val, _: list[Val], g: int = g) -> None:
            def of(w: int) -> list[Val]:
                here = f.at(held, (w * group + g) * size, "float32")
                return [f.load("float", f.at(here, i, "float32")) for i in (0, 1, c + 2)]

            found = of(0)
            for w in range(1, warps):
                found = _joined(f, found, of(w))
            out = f.at(states, ((head0 + g) * parts + part) * size, "float32")
            f.when(c.cmp("eq", 0), functools.partial(_store_all, f, found[:2], out, 0))
            f.store(found[2], f.at(out, c + 2, "float32"))

        f.loop(thread, head_dim, warps * WARP, [], join)
    blocks = heads // group
    first = b * (blocks + (then is not None))
    is_last = f.is_last(f.at(given["counters"], first + own, "int32"), f.cast("trunc", parts - 1, "i32"))

    def join_all() -> None:
        _join_parts(f, form, group, parts, own * group, head0, given)
        if then is None:
            return
        found = {"x": given["out"], **{n: given[f"tail_{n}"] for n in then.pointers}}
        of_all = f.is_last(f.at(given["counters"], first + blocks, "int32"), f.const(blocks - 1, "i32"))
        f.when(of_all, lambda: finish_row(f, then, b, found))

    f.when(is_last, join_all)
    return f.built()


def _join_parts(f: Device, form: Form, group: int, parts: Val, first: Val, row: Val, given: Mapping[str, Val]) -> None:
    """The results of `group` heads from number `first` on, whose states begin with row `row`, of all parts that blocks left."""
    head_dim, size = form.head_dim, form.head_dim + 2
    at_once = max(1, _READ_AT_ONCE // group)

    def channels(c: Val, _: list[Val]) -> None:
        def step(part: Val, carried: list[Val]) -> list[Val]:
            read = []
            for i in range(at_once):
                here = f.minimum(part + i, parts - 1)
                for g in range(group):
                    at = f.at(given["states"], ((row + g) * parts + here) * size, "float32")
                    read.append([f.load("float", f.at(at, n, "float32")) for n in (0, 1, c + 2)])
            result = list(carried)
            for n, (top, *rest) in enumerate(read):
                there, own = part + n // group < parts, slice(n % group * 3, n % group * 3 + 3)
                state = [f.select(there, top, LOW), *(f.select(there, x, 0.0) for x in rest)]
                result[own] = _joined(f, result[own], state)
            return result

        empty = [f.const(x, "float") for x in (LOW, 0.0, 0.0)]
        found = f.loop(0, parts, at_once, empty * group, step)
        for g in range(group):
            joined = found[3 * g : 3 * g + 3]
            if form.sinks:
                sink = f.load_f32(given["sinks"], first + g, form.dtype, lanes=1) * LOG2_E
                joined = _joined(f, joined, [sink, f.const(1.0, "float"), f.const(0.0, "float")])
            f.store_f32(joined[2] / joined[1], given["out"], (row + g) * head_dim + c, form.dtype)

    f.loop(f.thread(), head_dim, f.threads, [], channels)


def _store_all(f: Device, values: list[Val], base: Val, first: Val | int) -> None:
    for i, value in enumerate(values):
        f.store(value, f.at(f.at(base, first, "float32"), i, "float32"))


def _joined(f: Device, a: list[Val], b: list[Val]) -> list[Val]:
    """Two parts of a softmax as one: maximum, sum of weights, weighted values."""
    top = f.maximum(a[0], b[0])
    by_a, by_b = f.exp2(a[0] - top), f.exp2(b[0] - top)
    return [top, *(f.fma(x, by_a, y * by_b) for x, y in zip(a[1:], b[1:], strict=True))]


# --- Attention of many tokens -------------------------------------------------------------------------------------------

QUERIES = 64
"""Rows of a block of `attend_tokens`."""


def _soften(f: Device, scores: list[Val], tops: list[Val], weights: list[Val], sums: list[Val]) -> None:
    """One tile's step of a running softmax over a thread's two rows, in place: scores (in powers of two) become weights, `LOW` ones 0; what was
    summed before is brought to the new maxima."""
    factors, above = [], []
    for half in (0, 1):
        highest = functools.reduce(f.maximum, [score for i, score in enumerate(scores) if i // 2 % 2 == half])
        for distance in (1, 2):  # four threads share a row
            highest = f.maximum(highest, f.other(highest, distance))
        top = f.maximum(tops[half], highest)
        factors.append(f.exp2(tops[half] - top))
        tops[half], weights[half] = top, weights[half] * factors[half]
        above.append(f.maximum(top, LOW / 2))  # than `LOW`, where a row sees nothing
    for i, score in enumerate(scores):
        half = i // 2 % 2
        scores[i] = f.exp2(score - above[half])
        weights[half] = weights[half] + scores[i]
    sums[:] = [x * factors[i // 2 % 2] for i, x in enumerate(sums)]


def attend_tokens(form: Form, target: Target) -> DeviceKernel:
    """Attention of many tokens over keys of a cache that holds theirs, too, or over keys given: a running softmax, both products on tensor cores.

    Parameters: q[b, s, heads, head_dim], k and v (at multiples of 16 bytes), the table of a paged cache, with a cache start[b] and
    length[1] (int64: slots of padding, and of keys before the new ones), the sinks if there are any, out like q, s, `Form.sizes`. Tiles that no row
    sees are skipped. A row that sees nothing (padding) becomes zeros. Grid: (b * ceil(s / `QUERIES`), heads). Source: FlashAttention-2 (Dao,
    2023). Raises TargetError for head dimensions that are no multiples of 16 up to 256, unless heads are a multiple of kv_heads, and for float32,
    which tensor cores would round (see `single_attention`).
    """
    heads, kv_heads, head_dim, window = form.heads, form.kv_heads, form.head_dim, form.window
    check(form)
    if form.dtype not in PAIRS:
        raise TargetError(f"tensor cores would round {form.dtype}")
    warps, at_once = QUERIES // 16, form.keys
    threads = warps * WARP
    names = [*form.pointers, *(["sinks"] if form.sinks else []), "out"]
    numbers = [("i64", n) for n in ("s", *form.sizes)]
    f = Device(f"attend_tokens{form.suffix}", [*(("ptr", p) for p in names), *numbers], target, threads)
    pointers, (s, cap, *pages) = f.params()[: len(names)], f.params()[len(names) :]
    given = {name: f.memory(p) for name, p in zip(names, pointers, strict=True)}
    q, k, v, out = (given[n] for n in ("q", "k", "v", "out"))
    tiles = (s + (QUERIES - 1)) / QUERIES
    row0, head, b = f.block() % tiles * QUERIES, f.block("y"), f.block() / tiles
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    matrix, line = lane / 8, lane % 8
    past, pad, total = form.extent(f, given, b, s, cap)
    lowest = f.maximum(pad, past + row0 - (window - 1)) if window else pad
    highest = f.minimum(total, past + row0 + QUERIES) if form.causal else total
    chunks = head_dim // EIGHT
    pitch = _power_of_two(chunks)  # chunks of a row in shared memory
    row_bytes = 16 * pitch
    tile_bytes = at_once * row_bytes
    held_q, held = f.shared(QUERIES * row_bytes), f.shared(4 * tile_bytes)  # keys and values, twice
    row_of = form.row(f, b, head / (heads // kv_heads), cap, given.get("table"), *pages)

    def fetch(first: Val, to: Val) -> None:
        """Begin to copy keys and values from `first` on; beyond the last they are copies of it, which no row sees."""

        def key(row: Val) -> Val:
            return row_of(f.minimum(first + row, total - 1))

        for number, base in enumerate((k, v)):
            form.copy(f, f.at(to, number * tile_bytes, "i8"), base, key)

    begin = lowest / at_once * at_once

    def row_of_q(row: Val) -> Val:
        return f.at(q, ((b * s + f.minimum(row0 + row, s - 1)) * heads + head) * head_dim, form.dtype)

    f.copy_tile(held_q, QUERIES, chunks, row_of_q, pitch)
    f.when(begin < highest, lambda: fetch(begin, held))
    f.commit_copies()
    f.copies_done(0)
    f.barrier()

    def query_of(part: int) -> list[Val]:
        place = f.place(warp * 16 + line + (matrix & 1) * 8, (matrix >> 1) + 2 * part, pitch)
        return f.fragments(f.at(held_q, place, "i8"))

    # Wide heads, and records on their way, leave no registers for them.
    in_registers = head_dim <= 128 and form.scheme == "none"
    queries = [query_of(part) for part in range(head_dim // 16)] if in_registers else []
    positions = [past + row0 + warp * 16 + lane / 4 + 8 * half for half in (0, 1)]  # of this thread's two rows
    lows = [f.maximum(pad, p - (window - 1)) if window else pad for p in positions]
    lasts = [f.minimum(p, total - 1) for p in positions] if form.causal else [total - 1, total - 1]
    score_tiles, value_tiles = at_once // 8, head_dim // 8
    zero = f.const(0.0, "float")

    def step(first: Val, carried: list[Val]) -> list[Val]:
        tops, weights, sums = carried[:2], carried[2:4], carried[4:]
        odd = (first - begin) / at_once % 2
        here, there = (f.at(held, which * (2 * tile_bytes), "i8") for which in (odd, 1 - odd))
        f.copies_done(0)
        f.barrier()  # the tile has come, and nobody reads the other one any more
        f.when(first + at_once < highest, lambda: fetch(first + at_once, there))
        f.commit_copies()
        scores = [zero] * (4 * score_tiles)
        for part in range(head_dim // 16):
            query = queries[part] if queries else query_of(part)
            for j in range(0, score_tiles, 2):
                row, chunk = 8 * j + line + (matrix >> 1) * 8, (matrix & 1) + 2 * part
                four = f.fragments(f.at(here, f.place(row, chunk, pitch), "i8"))
                for n, keys in enumerate((four[:2], four[2:])):
                    at = 4 * (j + n)
                    scores[at : at + 4] = f.mma(query, keys, scores[at : at + 4], form.dtype)
        own = first + lane % 4 * 2  # numbers of keys from here on are constants, which 32 bits compare at once
        ends = [
            [f.cast("trunc", f.minimum(f.maximum(x - own, -1), at_once), "i32") for x in two] for two in (lows, lasts)
        ]
        for i, score in enumerate(scores):
            key, half = 8 * (i // 4) + i % 2, i // 2 % 2
            visible = f.op(f"and i1 {(ends[1][half] >= key).name}, {(ends[0][half] <= key).name}", "i1")
            scores[i] = f.select(visible, form.softened(f, score), LOW)
        _soften(f, scores, tops, weights, sums)
        values = f.at(here, tile_bytes, "i8")
        for part in range(at_once // 16):
            left = [f.pair(scores[i], scores[i + 1], form.dtype) for i in range(8 * part, 8 * part + 8, 2)]
            for j in range(0, value_tiles, 2):
                row, chunk = 16 * part + line + (matrix & 1) * 8, (matrix >> 1) + j
                four = f.fragments(f.at(values, f.place(row, chunk, pitch), "i8"), turned=True)
                for n, right in enumerate((four[:2], four[2:])):
                    at = 4 * (j + n)
                    sums[at : at + 4] = f.mma(left, right, sums[at : at + 4], form.dtype)
        return [*tops, *weights, *sums]

    state = [*[f.const(LOW, "float")] * 2, zero, zero, *[zero] * (4 * value_tiles)]
    *state, _ = f.loop(begin, highest, at_once, state, step)
    shares = []
    for top, weight in zip(state[:2], state[2:4], strict=True):
        whole = f.sum_of_lanes(weight, 4)
        if form.sinks:
            sink = f.load_f32(given["sinks"], head, form.dtype, lanes=1) * LOG2_E
            higher = f.maximum(top, sink)
            kept = f.exp2(top - higher)
            shares.append(kept / f.fma(whole, kept, f.exp2(sink - higher)))
        else:
            shares.append(f.select(whole > 0.0, 1.0 / whole, 0.0))
    for half in (0, 1):
        row = row0 + warp * 16 + lane / 4 + 8 * half

        def store(half: int = half, row: Val = row) -> None:
            line_at = ((b * s + row) * heads + head) * head_dim + lane % 4 * 2
            for j in range(value_tiles):
                low, high = (state[4 + 4 * j + 2 * half + i] * shares[half] for i in (0, 1))
                f.store(f.pair(low, high, form.dtype), f.at(out, line_at + 8 * j, form.dtype))

        f.when(row < s, store)
    return f.built()
