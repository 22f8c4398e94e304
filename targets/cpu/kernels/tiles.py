"""One task of attention: its query rows against its part of the keys, tile by tile, with a running softmax.

Few rows (a decoded token) are read along the keys as they lie, a vector of keys at a time. Many rows (a prompt) stand in the vectors'
lanes: scores are K Q^T and the result V^T P^T, so that neither keys nor values are turned, and maxima and sums are taken lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from jisu.compiler.rows import ROW_BITS, record_bytes
from jisu.compiler.types import round_up
from jisu.targets.cpu.isa import ITEMSIZE, Arg, Function, Micro, Val
from jisu.targets.cpu.kernels.codes import level
from jisu.targets.cpu.kernels.matmul import ahead, product, row_blocks
from jisu.targets.target import Target

KEYS = 64  # keys per tile
ROWS = 48  # query rows per task, about
FEW = 8  # rows up to which they don't fill vectors
_HEAD = 16  # words of a row's running state in front of its values: the maximum at 0, the sum at 1
_LOWEST = float("-inf")


@attrs.frozen
class Spec:
    """What one attention kernel computes; the fields are the options of `jisu.targets.cpu.kernels.attention`'s builders."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: bool
    bias: str | None
    bias_dtype: str
    nan_rows: bool
    layout: str | None
    page: int
    scheme: str = "none"

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def per_task(self) -> int:
        """Query positions of a task."""
        return max(1, ROWS // self.group)

    @property
    def rows(self) -> int:
        """Query rows of a task, at most."""
        return self.per_task * self.group

    @property
    def k_stride(self) -> int:
        """Elements from one key to the next of the same head."""
        return self.head_dim * (self.kv_heads if self.layout is None else 1)

    @property
    def v_stride(self) -> int:
        """Elements from one value to the next of the same head."""
        return self.v_dim * (self.kv_heads if self.layout is None else 1)


def state_words(spec: Spec, target: Target) -> int:
    """Words per row of running state: maximum, sum, then from `STATE_VALUES` the weighted values, padded to whole vectors."""
    return _HEAD + round_up(spec.v_dim, target.lanes("float32"))


STATE_VALUES = _HEAD
SCALARS = ("state0", "b", "hk", "i0", "ni", "part", "parts", "count", "total", "cap", "pages", "bias_b", "bias_h")
"""The integers that a task takes: offset of its states, batch, key/value head, first position and how many, its part of the keys and how
many there are, then the sizes of the operands."""


class _Task:
    """A task's function under construction: what both kinds of tasks begin with."""

    def __init__(self, name: str, spec: Spec, args: Sequence[Arg], target: Target) -> None:
        operands = [a.name for a in args if a.name not in ("out", "length")]
        pointers = (*operands, "states", "scratch")
        f = Function(name, [("ptr", o) for o in pointers] + [("i64", x) for x in SCALARS], target)
        at = dict(zip((*pointers, *SCALARS), f.params(), strict=True))
        self.f, self.at, self.spec, self.target = f, at, spec, target
        self.states = f.at(at["states"], at["state0"], "float32")
        self.rows = at["ni"] * spec.group
        self.base = at["total"] - at["count"] + at["i0"]  # position of the first row
        self.start = f.load("i64", f.at(at["start"], at["b"], "int64")) if spec.layout is not None else f.i64(0)
        low = f.maximum(self.lowest(f.i64(0)), 0)
        high = f.minimum(self.base + at["ni"], at["total"]) if spec.causal else at["total"]
        share = (f.maximum(high - low, 0) + at["parts"] - 1) / at["parts"]
        self.begin = low + share * at["part"]
        self.end = f.minimum(high, self.begin + share)

    def lowest(self, i: Val) -> Val:
        """The first key that position i sees."""
        spec = self.spec
        return self.start if spec.window is None else self.f.maximum(self.start, self.base + i - (spec.window - 1))

    def highest(self, i: Val) -> Val:
        """The end of the keys that position i sees."""
        return self.base + i + 1 if self.spec.causal else self.at["total"]

    def query(self, r: Val) -> Val:
        """Where row r's query begins."""
        at, spec = self.at, self.spec
        position = at["b"] * at["count"] + at["i0"] + r / spec.group
        return (position * spec.heads + at["hk"] * spec.group + r % spec.group) * spec.head_dim

    def sink(self, r: Val) -> Val:
        """Row r's sink: one more key with its own score and no value, which exactly one part counts."""
        f, at = self.f, self.at
        sink = f.load_f32(at["sinks"], at["hk"] * self.spec.group + r % self.spec.group, self.spec.dtype, None, 1)
        return f.select(at["part"].cmp("eq", 0), sink, _LOWEST)

    def bias(self, r: Val, j: Val) -> Val:
        """The address of row r's bias for key j."""
        f, at, spec = self.f, self.at, self.spec
        own_b = f.select(at["bias_b"] > 1, at["b"], f.i64(0))
        own_h = f.select(at["bias_h"] > 1, at["hk"] * spec.group + r % spec.group, f.i64(0))
        row = ((own_b * at["bias_h"] + own_h) * at["count"] + at["i0"] + r / spec.group) * at["total"] + j
        return f.at(at["bias"], row, "bool" if spec.bias == "bool" else spec.bias_dtype)

    def walk(self, visit: Callable[[Val, Val, Val, Val], None]) -> None:
        """visit(first key, its index among the keys' rows, that among the values' rows, how many) for every tile.

        The indices count elements, or records where the cache holds such.
        """
        f, at, spec = self.f, self.at, self.spec

        def tile(j: Val) -> Val:
            room = f.minimum(self.end - j, KEYS)
            if spec.layout is None:
                row = (at["b"] * at["total"] + j) * spec.kv_heads + at["hk"]
            else:
                if spec.layout == "ring":
                    room = f.minimum(room, at["cap"] - j % at["cap"])
                elif spec.layout == "paged":
                    room = f.minimum(room, spec.page - j % spec.page)
                first, stride = place(f, spec.layout, spec.page, spec.kv_heads, at, j)
                row = first + at["hk"] * stride
            coded = spec.scheme != "none"
            visit(j, row if coded else row * spec.head_dim, row if coded else row * spec.v_dim, room)
            return j + room

        f.walk(self.begin, self.end, tile)

    def decoded(self, name: str, index: Val, width: int, out: Val, n: Val) -> None:
        """Bring n rows of a cache of records, or of another dtype than float32, into `out` [n, width] as float32."""
        f, spec = self.f, self.spec
        if spec.scheme == "none":
            stride = spec.k_stride if name == "k" else spec.v_stride
            f.use(_widened(width, stride, spec.dtype, self.target), f.at(self.at[name], index, spec.dtype), out, n)
        else:
            records = f.at(self.at[name], index * record_bytes(spec.scheme, width), "uint8")
            f.use(decode_records(spec.scheme, width, self.target), records, out, n)


def place(
    f: Function, layout: str | None, page: int, kv_heads: int, at: dict[str, Val], slot: Val
) -> tuple[Val, Val | int]:
    """Where a slot of sequence at["b"] lies: the row of head 0, and how many rows further each next head is."""
    if layout == "paged":
        number = f.load("i32", f.at(at["table"], at["b"] * at["pages"] + slot / page, "int32"))
        return f.cast("sext", number, "i64") * (kv_heads * page) + slot % page, f.i64(page)
    within = slot % at["cap"] if layout == "ring" else slot
    return at["b"] * kv_heads * at["cap"] + within, at["cap"]


def _widened(k: int, stride: int, dtype: str, target: Target) -> Micro:
    """void(x, out, n): out[n, k] in float32 of n rows of k numbers, `stride` elements apart."""
    f = Function("widen", [("ptr", "x"), ("ptr", "out"), ("i64", "n")], target)
    x, out, n = f.params()
    f.loop(0, n, 1, [], lambda r, _: f.vectors(k, lambda i, mask, _: f.store_f32(
        f.load_f32(x, r * stride + i, dtype, mask), out, r * k + i, "float32", mask)))  # fmt: skip
    return f.finish()


def decode_records(scheme: str, k: int, target: Target) -> Micro:
    """void(records, out, n): out[n, k] in float32, the rows that n records of k numbers stand for."""
    f = Function("decode", [("ptr", "records"), ("ptr", "out"), ("i64", "n")], target)
    records, out, n = f.params()
    bits, size = ROW_BITS[scheme], record_bytes(scheme, k)
    codes = k * bits // 8

    def row(r: Val, _: list[Val]) -> None:
        here, there = f.at(records, r * size, "uint8"), f.at(out, r * k, "float32")
        for i in range(0, size, 64):
            f.prefetch(f.at(here, ahead(target) // 2 + i, "uint8"))
        # A record may begin at an odd address; both numbers of its tail are loaded and spread at once.
        both = f.splat(f.op(f"load i32, ptr {f.at(here, codes, 'uint8').name}, align 1", "i32"), f.lanes)
        scale, offset = (f.cast("bitcast", part, "float") for part in (both << 16, both & -65536))

        def some(i: Val, mask: Val | None, _: list[Val]) -> None:
            both = f.cast("zext", f.load_raw("i8", f.at(here, i, "uint8"), mask), "i32")
            for part, code in enumerate([both] if bits == 8 else [both & 15, both >> 4]):
                value = f.fma(level(f, scheme, code), scale, offset)
                f.store_f32(value, there, i + part * codes, "float32", mask)

        f.vectors(codes, some)

    f.loop(0, n, 1, [], row)
    return f.finish()


# --- Few rows ----------------------------------------------------------------------------------------------------------


def few_words(spec: Spec, target: Target) -> int:
    """32-bit words of scratch memory that a task of few rows needs."""
    tiles = 0 if spec.scheme == "none" else KEYS * (spec.head_dim + spec.v_dim)
    return FEW * (KEYS + round_up(spec.head_dim, target.lanes("float32"))) + tiles


def few_rows(spec: Spec, args: Sequence[Arg], target: Target) -> Micro:
    """A task of up to `FEW` rows, which leaves maximum, sum and weighted values in its part of the states."""
    task = _Task("attend_few", spec, args, target)
    f, at, rows, states = task.f, task.at, task.rows, task.states
    d, v_dim, state = spec.head_dim, spec.v_dim, state_words(spec, target)
    d_pad = round_up(d, f.lanes)
    scores = at["scratch"]
    queries = f.at(scores, FEW * KEYS, "float32")
    coded = spec.scheme != "none"
    zero = f.const(0.0, f"<{f.lanes} x float>")

    def prepare(r: Val, _: list[Val]) -> None:
        source = task.query(r)

        def scaled(i: Val, mask: Val | None, _: list[Val]) -> None:
            f.store_f32(
                f.load_f32(at["q"], source + i, spec.dtype, mask) * spec.scale, queries, r * d_pad + i, "float32"
            )

        f.vectors(d, scaled)
        mine = f.at(states, r * state, "float32")
        sink = task.sink(r) if spec.sinks else f.const(_LOWEST, "float")
        f.store(sink, mine)
        one = f.select(sink.cmp("oeq", _LOWEST), f.const(0.0, "float"), f.const(1.0, "float"))
        f.store(one, f.at(mine, 1, "float32"))
        f.vectors(state - _HEAD, lambda i, _, __: f.store_f32(zero, mine, i + _HEAD, "float32"))

    f.loop(0, rows, 1, [], prepare)
    stored, k_stride, v_stride = ("float32", d, v_dim) if coded else (spec.dtype, spec.k_stride, spec.v_stride)
    dots, soften = _dots(spec, stored, k_stride, target), _soften_row(spec, target)

    def visit(j: Val, k_at: Val, v_at: Val, n: Val) -> None:
        if coded:
            k_tile = f.at(queries, FEW * d_pad, "float32")
            v_tile = f.at(k_tile, KEYS * d, "float32")
            task.decoded("k", k_at, d, k_tile, n)
            task.decoded("v", v_at, v_dim, v_tile, n)
        else:
            k_tile, v_tile = f.at(at["k"], k_at, spec.dtype), f.at(at["v"], v_at, spec.dtype)
        f.use(dots, queries, k_tile, scores, rows, n)

        def soft(r: Val, _: list[Val]) -> None:
            first = f.minimum(f.maximum(task.lowest(r / spec.group) - j, 0), n)
            last = f.minimum(f.maximum(task.highest(r / spec.group) - j, 0), n)
            more = [task.bias(r, j)] if spec.bias else []
            f.use(soften, f.at(scores, r * KEYS, "float32"), f.at(states, r * state, "float32"), *more, first, last, n)

        f.loop(0, rows, 1, [], soft)
        _add_values(f, spec, stored, v_stride, target, scores, v_tile, states, rows, n, state)

    task.walk(visit)
    return f.finish()


def _add_values(
    f: Function, spec: Spec, stored: str, v_stride: int, target: Target, scores: Val, v_tile: Val, states: Val, rows: Val,
    n: Val, state: int,
) -> None:  # fmt: skip
    """Add scores[rows, n] @ values[n, v_dim] to the rows' weighted values, four vectors of columns at a time."""
    lanes, sizes = f.lanes, (4, 3, 2, 1) if target.vector_registers >= 32 else (2, 1)
    for column in range(0, spec.v_dim, 4 * lanes):
        width = min(4 * lanes, spec.v_dim - column)
        add = {
            mr: product(
                mr,
                target,
                vectors=-(-width // lanes),
                columns=width,
                rows_of=stored,
                accumulate=True,
                prefetch="stream",
            )
            for mr in sizes
        }

        def multiply(mr: int, m: Val, add: dict[int, Micro] = add, column: int = column) -> None:
            values, sums = f.at(v_tile, column, stored), f.at(states, m * state + (_HEAD + column), "float32")
            f.use(add[mr], f.at(scores, m * KEYS, "float32"), KEYS, values, v_stride, sums, state, n)

        row_blocks(f, rows, multiply, sizes)


def _dots(spec: Spec, stored: str, k_stride: int, target: Target) -> Micro:
    """void(q, k, scores, rows, n): scores[r, j] = q[r] k[j], one vector of keys at a time; q is padded with zeros."""
    f = Function("dots", [("ptr", "q"), ("ptr", "k"), ("ptr", "s"), ("i64", "rows"), ("i64", "n")], target)
    q, k, s, rows, n = f.params()
    lanes, d = f.lanes, spec.head_dim
    d_pad = round_up(d, lanes)

    def block(j: Val, _: list[Val]) -> None:
        at = [f.at(k, f.minimum(j + i, n - 1) * k_stride, stored) for i in range(lanes)]
        for i in range(0, lanes * k_stride * ITEMSIZE[stored] if k_stride == d else 0, 64):
            f.prefetch(f.at(at[0], ahead(target) + i, "uint8"))

        def row(r: Val, _: list[Val]) -> None:
            xs = [f.load_f32(q, r * d_pad + c, "float32") for c in range(0, d, lanes)]
            sums = []
            for p in at:  # key by key, as they lie in memory
                total = f.const(0.0, f"<{lanes} x float>")
                for x, c in zip(xs, range(0, d, lanes), strict=True):
                    mask = f.mask_below(d - c) if d - c < lanes else None
                    total = f.fma(x, f.load_f32(p, c, stored, mask), total)
                sums.append(total)
            f.store_f32(_fold(f, sums), s, r * KEYS + j, "float32")

        f.loop(0, rows, 1, [], row)

    f.loop(0, n, lanes, [], block)
    return f.finish()


def _exchange(f: Function, a: Val, b: Val, size: int) -> tuple[Val, Val]:
    """Swap the odd blocks (of `size` lanes) of a with the even blocks of b."""
    lanes = f.lanes
    halves = []
    for odd in (0, 1):
        picks = [(i - i % (2 * size)) + odd * size + i % size + (lanes if i // size % 2 else 0) for i in range(lanes)]
        mask = ", ".join(f"i32 {p}" for p in picks)
        halves.append(f.op(f"shufflevector {a.type} {a.name}, {b.type} {b.name}, <{lanes} x i32> <{mask}>", a.type))
    return halves[0], halves[1]


def _fold(f: Function, values: list[Val]) -> Val:
    """Lane i of the result is the sum of all lanes of values[i]."""
    size = 1
    while len(values) > 1:
        pairs = [_exchange(f, values[i], values[i + 1], size) for i in range(0, len(values), 2)]
        values = [a + b for a, b in pairs]
        size *= 2
    return values[0]


def _turned(f: Function, rows: list[Val]) -> list[Val]:
    """As many vectors as they have lanes, transposed."""
    rows, size = list(rows), 1
    while size < f.lanes:
        for i in (i for i in range(f.lanes) if not i & size):
            rows[i], rows[i + size] = _exchange(f, rows[i], rows[i + size], size)
        size *= 2
    return rows


def _soften_row(spec: Spec, target: Target) -> Micro:
    """void(scores, state, [bias], first, last, n): one row's step of the online softmax.

    Scores become weights e^(score - maximum), 0 outside first…last; sum and weighted values are rescaled when the
    maximum grows.
    """
    extra = [("ptr", "bias")] if spec.bias else []
    scalars = [("i64", "first"), ("i64", "last"), ("i64", "n")]
    f = Function("soften_row", [("ptr", "s"), ("ptr", "state"), *extra, *scalars], target)
    s, state, *rest = f.params()
    first, last, n = rest[-3:]
    vec = f"<{f.lanes} x float>"

    def seen(i: Val) -> Val:
        lane = f.iota() + i
        return f.op(f"and <{f.lanes} x i1> {(lane >= first).name}, {(lane < last).name}", f"<{f.lanes} x i1>")

    def scan(i: Val, values: list[Val]) -> list[Val]:
        v = _capped(f, spec, f.load_f32(s, i, "float32"))
        visible = seen(i)
        if spec.bias:
            v = _biased(f, spec, v, _bias(f, spec, rest[0], i, visible))
        v = f.select(visible, v, _LOWEST)
        f.store_f32(v, s, i, "float32")
        return [f.maximum(values[0], v)]

    top, _ = f.loop(0, n, f.lanes, [f.const(_LOWEST, vec)], scan)
    old = f.load("float", state)
    new = f.maximum(old, f.reduce("fmax", top))
    f.store(new, state)
    safe = f.select(new.cmp("oeq", _LOWEST), f.const(0.0, "float"), new)

    def weigh(i: Val, values: list[Val]) -> list[Val]:
        w = f.exp_below(f.load_f32(s, i, "float32") - safe_all)
        f.store_f32(w, s, i, "float32")
        return [values[0] + w]

    safe_all = f.splat(safe, f.lanes)
    sums, _ = f.loop(0, n, f.lanes, [f.const(0.0, vec)], weigh)
    sum_at = f.at(state, 1, "float32")

    def rescale() -> None:
        factor = f.select(old.cmp("oeq", _LOWEST), f.const(0.0, "float"), f.exp(old - safe))
        f.store(f.load("float", sum_at) * factor, sum_at)
        by = f.splat(factor, f.lanes)
        f.vectors(state_words(spec, target) - _HEAD, lambda i, _, __: f.store_f32(
            f.load_f32(state, i + _HEAD, "float32") * by, state, i + _HEAD, "float32"))  # fmt: skip

    f.when(new > old, rescale)
    f.store(f.load("float", sum_at) + f.reduce("fadd", sums), sum_at)
    return f.finish()


def _capped(f: Function, spec: Spec, v: Val) -> Val:
    return v if spec.softcap is None else f.tanh(v / spec.softcap) * spec.softcap


def _bias(f: Function, spec: Spec, base: Val, i: Val | int, mask: Val) -> Val:
    """A vector of biases as float32; of a mask, 0 where it is True and -inf elsewhere."""
    if spec.bias == "bool":
        zero = f.const(0.0, f"<{f.lanes} x float>")
        return f.select(f.load_raw("i8", f.at(base, i, "bool"), mask).cmp("ne", 0), zero, _LOWEST)
    return f.load_f32(base, i, spec.bias_dtype, mask)


def _biased(f: Function, spec: Spec, v: Val, bias: Val) -> Val:
    return f.select(bias.cmp("oeq", 0.0), v, _LOWEST) if spec.bias == "bool" else v + bias


# --- Many rows ---------------------------------------------------------------------------------------------------------


def _blocks(target: Target) -> tuple[int, tuple[int, ...]]:
    """Vectors of rows at a time, and how many keys (or values' columns), such that sums, rows and one number fit the registers."""
    return (3, (8, 4, 2, 1)) if target.vector_registers >= 32 else (2, (6, 2, 1))


def _lanes_of_rows(spec: Spec, target: Target) -> int:
    """Rows of a task padded to whole blocks."""
    return round_up(spec.rows, _blocks(target)[0] * target.lanes("float32"))


def many_words(spec: Spec, target: Target) -> int:
    """32-bit words of scratch memory that a task of many rows needs: tiles, scores, queries, and the state of all rows."""
    size = _lanes_of_rows(spec, target)
    tiles = 0 if spec.scheme == "none" and spec.dtype == "float32" else KEYS * (spec.head_dim + spec.v_dim)
    return tiles + size * (
        KEYS + spec.head_dim + len(attrs.fields(_State)) - 1 + round_up(spec.v_dim, target.lanes("float32"))
    )


@attrs.frozen
class _State:
    """What a task of many rows keeps, a word per row each: maxima, sums, maxima of the tile, first and last visible key, values."""

    top: Val
    sum: Val
    found: Val
    first: Val
    last: Val
    values: Val

    @classmethod
    def at(cls, f: Function, base: Val, size: int) -> _State:
        """The state that lies at `base`, of `size` rows."""
        return cls(*(f.at(base, i * size, "float32") for i in range(len(attrs.fields(cls)))))


def many_rows(spec: Spec, args: Sequence[Arg], target: Target) -> Micro:
    """A task of any number of rows, which leaves maximum, sum and weighted values in its part of the states."""
    task = _Task("attend_many", spec, args, target)
    f, at, rows = task.f, task.at, task.rows
    d, v_dim, lanes = spec.head_dim, spec.v_dim, f.lanes
    size, copied = _lanes_of_rows(spec, target), spec.scheme != "none" or spec.dtype != "float32"
    scores = at["scratch"]
    queries = f.at(scores, KEYS * size, "float32")
    own = _State.at(f, f.at(queries, d * size, "float32"), size)
    tiles = f.at(own.values, round_up(v_dim, lanes) * size, "float32")
    k_stride, v_stride = (d, v_dim) if copied else (spec.k_stride, spec.v_stride)
    vectors, sizes = _blocks(target)
    _begin(task, own, queries, size)
    all_first, all_last = task.lowest(at["ni"] - 1), task.highest(f.i64(0))  # the keys that every row sees

    def columns(c: Val, width: int, j: Val, k_tile: Val, v_tile: Val, n: Val) -> None:
        """A tile's keys against a block of `width` vectors of rows from row c on."""
        score = {mr: product(mr, target, k=d, vectors=width) for mr in sizes}
        add = {mr: product(mr, target, vectors=width, accumulate=True, turned=True) for mr in sizes}
        here = f.at(scores, c, "float32")
        state = [f.at(x, c, "float32") for x in (own.top, own.sum, own.found, own.first, own.last, own.values)]
        row_blocks(f, n, lambda mr, m: f.use(
            score[mr], f.at(k_tile, m * k_stride, "float32"), k_stride, f.at(queries, c, "float32"), size,
            f.at(here, m * size, "float32"), size, d), sizes)  # fmt: skip
        if spec.bias:
            f.loop(c, f.minimum(c + width * lanes, rows), lanes, [], lambda first, _: add_bias(first, j, n))
        offset = j - task.begin
        masked = f.op(f"or i1 {(j < all_first).name}, {(j + n > all_last).name}", "i1")
        f.when(masked, lambda: f.use(_scan(spec, width, size, True, target), here, *state[2:5], offset, n),
               lambda: f.use(_scan(spec, width, size, False, target), here, *state[2:5], offset, n))  # fmt: skip
        f.use(_soften(spec, width, size, target), here, *state[:3], state[5], n)
        row_blocks(f, f.i64(v_dim), lambda mr, m: f.use(
            add[mr], f.at(v_tile, m, "float32"), v_stride, here, size, f.at(state[5], m * size, "float32"), size, n),
            sizes)  # fmt: skip

    def add_bias(first: Val, j: Val, n: Val) -> None:
        """Cap the scores of a vector of rows and add their biases, turned."""
        bases = [task.bias(f.minimum(first + i, rows - 1), j) for i in range(lanes)]

        def some(t: Val, _: list[Val]) -> None:
            mask = f.mask_below(n - t)
            for i, bias in enumerate(_turned(f, [_bias(f, spec, b, t, mask) for b in bases])):
                # Keys behind the tile's last are never read, and there is room for them.
                where = first + (t + i) * size
                v = _capped(f, spec, f.load_f32(scores, where, "float32"))
                f.store_f32(_biased(f, spec, v, bias), scores, where, "float32")

        f.loop(0, n, lanes, [], some)

    def visit(j: Val, k_at: Val, v_at: Val, n: Val) -> None:
        if copied:
            k_tile, v_tile = tiles, f.at(tiles, KEYS * d, "float32")
            task.decoded("k", k_at, d, k_tile, n)
            task.decoded("v", v_at, v_dim, v_tile, n)
        else:
            k_tile, v_tile = f.at(at["k"], k_at, "float32"), f.at(at["v"], v_at, "float32")

        def all_columns() -> None:
            f.loop(0, rows, vectors * lanes, [], lambda c, _: columns(c, vectors, j, k_tile, v_tile, n))

        f.when(rows <= lanes, lambda: columns(f.i64(0), 1, j, k_tile, v_tile, n), all_columns)

    task.walk(visit)
    _leave(task, own, size)
    return f.finish()


def _begin(task: _Task, own: _State, queries: Val, size: int) -> None:
    """Queries with rows in lanes, no weight yet, and which keys each row sees."""
    f, at, spec, rows = task.f, task.at, task.spec, task.rows
    d, lanes, group = spec.head_dim, f.lanes, spec.group
    zero = f.const(0.0, f"<{lanes} x float>")

    def turn(r: Val, _: list[Val]) -> None:
        # Rows behind the last are the last once more; nobody reads their results.
        sources = [task.query(f.minimum(r + i, rows - 1)) for i in range(lanes)]
        for c in range(0, d, lanes):
            mask = f.mask_below(d - c) if d - c < lanes else None
            found = [f.load_f32(at["q"], s + c, spec.dtype, mask) * spec.scale for s in sources]
            for i, v in enumerate(_turned(f, found)[: d - c]):
                f.store_f32(v, queries, r + (c + i) * size, "float32")

    def fill(field: Val, value: float, words: int) -> None:
        f.loop(0, words, lanes, [], lambda i, _: f.store_f32(f.like(value, zero), field, i, "float32"))

    f.loop(0, (rows + (lanes - 1)) & -lanes, lanes, [], turn)
    fill(own.values, 0.0, round_up(spec.v_dim, lanes) * size)
    fill(own.top, _LOWEST, size)
    for field in (own.sum, own.first, own.last):
        fill(field, 0.0, size)

    def sink(r: Val, _: list[Val]) -> None:
        value = task.sink(r)
        f.store(value, f.at(own.top, r, "float32"))
        one = f.select(value.cmp("oeq", _LOWEST), f.const(0.0, "float"), f.const(1.0, "float"))
        f.store(one, f.at(own.sum, r, "float32"))

    if spec.sinks:
        f.loop(0, rows, 1, [], sink)

    def limits(i: Val, _: list[Val]) -> None:
        bounds = [f.maximum(x - task.begin, 0) for x in (task.lowest(i), task.highest(i))]
        first, last = (f.cast("trunc", x, "i32") for x in bounds)

        def head(g: Val, _: list[Val]) -> None:
            f.store(first, f.at(own.first, i * group + g, "float32"))
            f.store(last, f.at(own.last, i * group + g, "float32"))

        f.loop(0, group, 1, [], head)

    f.loop(0, at["ni"], 1, [], limits)


def _leave(task: _Task, own: _State, size: int) -> None:
    """Write the rows' states as those of few rows are."""
    f, rows, words, lanes = task.f, task.rows, state_words(task.spec, task.target), task.f.lanes

    def values(r: Val, _: list[Val]) -> None:
        for c in range(0, task.spec.v_dim, lanes):
            found = [f.load_f32(own.values, r + (c + i) * size, "float32") for i in range(lanes)]
            for i, v in enumerate(_turned(f, found)):
                write(r + i, c, v)

    def write(r: Val, c: int, v: Val) -> None:
        f.when(r < rows, lambda: f.store_f32(v, task.states, r * words + (_HEAD + c), "float32"))

    def summary(r: Val, _: list[Val]) -> None:
        for field, to in ((own.top, 0), (own.sum, 1)):
            f.store(f.load("float", f.at(field, r, "float32")), f.at(task.states, r * words + to, "float32"))

    f.loop(0, rows, lanes, [], values)
    f.loop(0, rows, 1, [], summary)


def _scan(spec: Spec, vectors: int, size: int, masked: bool, target: Target) -> Micro:
    """void(scores, found, first, last, j, n): found[r] = the largest score of row r, with -inf for keys that it doesn't see."""
    f = Function("scan", [("ptr", x) for x in ("s", "found", "first", "last")] + [("i64", "j"), ("i64", "n")], target)
    s, found, first, last, j, n = f.params()
    lanes = f.lanes
    vec, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    changes = masked or (spec.softcap is not None and not spec.bias)
    bounds = [[f.load(ints, f.at(p, v * lanes, "float32")) for p in (first, last)] for v in range(vectors)]

    def key(t: Val, tops: list[Val]) -> list[Val]:
        new = []
        for v in range(vectors):
            x = f.load_f32(s, t * size + v * lanes, "float32")
            if spec.softcap is not None and not spec.bias:
                x = _capped(f, spec, x)
            if masked:
                number = f.splat(f.cast("trunc", j + t, "i32"), lanes)
                inside = (number.cmp("sge", bounds[v][0]), number.cmp("slt", bounds[v][1]))
                both = f.op(f"and <{lanes} x i1> {inside[0].name}, {inside[1].name}", f"<{lanes} x i1>")
                x = f.select(both, x, _LOWEST)
            if changes:
                f.store_f32(x, s, t * size + v * lanes, "float32")
            new.append(f.maximum(tops[v], x))
        return new

    *tops, _ = f.loop(0, n, 1, [f.const(_LOWEST, vec)] * vectors, key)
    for v, top in enumerate(tops):
        f.store_f32(top, found, v * lanes, "float32")
    return f.finish()


def _soften(spec: Spec, vectors: int, size: int, target: Target) -> Micro:
    """void(scores, top, sum, found, values, n): a tile's step of the online softmax, lane by lane.

    Scores become weights e^(score - maximum); sums and weighted values of rows are rescaled when their maximum grows.
    """
    f = Function("soften", [("ptr", x) for x in ("s", "top", "sum", "found", "values")] + [("i64", "n")], target)
    s, top, total, found, values, n = f.params()
    lanes = f.lanes
    zero = f.const(0.0, f"<{lanes} x float>")
    bases = []
    for v in range(vectors):
        old, tile = f.load_f32(top, v * lanes, "float32"), f.load_f32(found, v * lanes, "float32")
        new = f.maximum(old, tile)
        base = f.select(new.cmp("oeq", _LOWEST), zero, new)

        def rescale(v: int = v, old: Val = old, new: Val = new, base: Val = base) -> None:
            factor = f.exp_below(old - base)
            f.store_f32(new, top, v * lanes, "float32")
            f.store_f32(f.load_f32(total, v * lanes, "float32") * factor, total, v * lanes, "float32")

            def column(c: Val, _: list[Val]) -> None:
                here = c * size + v * lanes
                f.store_f32(f.load_f32(values, here, "float32") * factor, values, here, "float32")

            f.loop(0, spec.v_dim, 1, [], column)

        f.when(f.any(tile > old), rescale)
        bases.append(base)

    def key(t: Val, sums: list[Val]) -> list[Val]:
        new = []
        for v in range(vectors):
            w = f.exp_below(f.load_f32(s, t * size + v * lanes, "float32") - bases[v])
            f.store_f32(w, s, t * size + v * lanes, "float32")
            new.append(sums[v] + w)
        return new

    *sums, _ = f.loop(0, n, 1, [f.load_f32(total, v * lanes, "float32") for v in range(vectors)], key)
    for v, value in enumerate(sums):
        f.store_f32(value, total, v * lanes, "float32")
    return f.finish()
