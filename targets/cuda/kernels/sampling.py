"""Choosing tokens on NVIDIA GPUs; see `jisu.compiler.ops.sampling`, whose arithmetic this is.

A block reads a part of a row of logits; integers are added up in whatever order, and the last block of a row sees the sums and says what comes
next, which the row's blocks of the next launch read. A logit's key is its bits in the order of numbers, 32 of them. What is the least key that
counts, by top-k or by top-p, comes of three launches each (two for 16-bit logits), which look at up to 11 bits: the blocks add weights (1, or
masses) to bins of the keys that still can be it, whose bin is the first, from the highest on, with which the weight reaches a goal (a radix
descent; Alabi et al., Fast k-selection algorithms for graphics processing units, 2012). Nothing is sorted. Launches of which a row has no need
end as they begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jisu.compiler.errors import TargetError
from jisu.compiler.ops.sampling import FARTHEST, FINE, LOG2_E, ONE, PARTS, POWERS
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.target import Target

THREADS = 256
_EACH = 8
PART = THREADS * _EACH
"""Logits of a block, bins of keys, and parts of a row at most."""
SHIFTS = {"float32": (22, 11, 0), "bfloat16": (24, 13), "float16": (24, 13)}
"""How many bits of a key a bin leaves open, launch by launch; in the end all logits of the dtype are told apart."""
HIGHEST, LEAST, BASE, GOAL, STATE = range(5)
"""What is known of a row, int64: the highest logit (its float32's bits; -1: a token is chosen already), the least key that counts, the least one
of the bin where it is looked for, the weight in that bin that the keys from it on must reach; and how many numbers these are."""
COUNTERS = 2 * (PART + 1)
"""How many numbers int32 of a row are 0 before and after each launch: int64 bins, then how many blocks have come."""
_LOW = 21  # bits of a mass that a block's bins add up apart, so that no sum of PART of them exceeds 32


class _Row:
    """What a thread of every launch begins with."""

    def __init__(self, label: str, names: Sequence[str], sizes: Sequence[str], dtype: str, target: Target) -> None:
        if dtype not in FLOATS:
            raise TargetError(f"no kernel for GPUs draws tokens by logits of {dtype}")
        params = [*(("ptr", name) for name in names), *(("i64", name) for name in ("size", "parts", *sizes))]
        self.f = f = Device(f"{label}_{dtype}", params, target, THREADS)
        values = f.params()
        self.of = dict(zip(names, (f.memory(p) for p in values[: len(names)]), strict=True))
        self.size, self.parts, *self.given = values[len(names) :]
        self.dtype, self.thread = dtype, f.thread()
        self.row, self.part = f.block() / self.parts, f.block() % self.parts

    def option(self, name: str, dtype: str) -> Val:
        """A number of the row's."""
        return self.f.load("float" if dtype == "float32" else "i64", self.f.at(self.of[name], self.row, dtype))

    def state(self, number: int) -> Val:
        """The address of what is known."""
        return self.f.at(self.of["state"], self.row * STATE + number, "int64")

    def known(self, number: int) -> Val:
        """What is known."""
        return self.f.load("i64", self.state(number))

    def highest(self) -> tuple[Val, Val]:
        """Whether the token is still to be drawn, and the highest logit."""
        bits = self.known(HIGHEST)
        return bits >= 0, _as_float(self.f, bits)

    def number(self, part: Val) -> Val:
        """The address of what a part leaves for the last block."""
        return self.f.at(self.of["numbers"], self.row * self.parts + part, "int64")

    def logits(self, first: Val, step: int) -> list[tuple[Val, Val, Val]]:
        """This thread's logits, every `step`-th from a place on: whether it is one, where it stands, and itself; all are asked for at once."""
        places = [first + i * step for i in range(_EACH)]
        at = [self.row * self.size + self.f.minimum(place, self.size - 1) for place in places]
        read = [self.f.load_f32(self.of["logits"], i, self.dtype, lanes=1) for i in at]
        return [(place < self.size, place, value) for place, value in zip(places, read, strict=True)]

    def own_logits(self) -> list[tuple[Val, Val, Val]]:
        """Those of the block's part, neighbours by neighbouring threads."""
        return self.logits(self.part * PART + self.thread, THREADS)

    def last(self, then: Callable[[], None]) -> None:
        """In the last of the row's blocks, with what all of them left."""
        f = self.f
        f.when(f.is_last(self._bin(f.i64(PART)), f.cast("trunc", self.parts - 1, "i32")), then)

    def tally(self, weights: Sequence[tuple[Val, Val, Val]], *, wide: bool) -> None:
        """Add this thread's weights to the row's bins: of each whether it counts, its bin, and itself, i64, masses being `wide`."""
        f, thread = self.f, self.thread
        held = [f.shared(4 * PART) for _ in range(2 if wide else 1)]
        for sums in held:
            for i in range(_EACH):
                f.store(f.const(0, "i32"), f.at(sums, thread + i * THREADS, "int32"))
        f.barrier()
        for counts, bin_, weight in weights:
            parts = (weight & ((1 << _LOW) - 1), weight >> _LOW) if wide else (weight,)

            def add(bin_: Val = bin_, parts: Sequence[Val] = parts) -> None:
                for sums, part in zip(held, parts, strict=True):
                    f.increase(f.cast("trunc", part, "i32"), f.at(sums, bin_, "int32"))

            f.when(counts, add)
        f.barrier()
        for i in range(_EACH):
            bin_ = thread + i * THREADS
            total, *high = (f.cast("zext", f.load("i32", f.at(sums, bin_, "int32")), "i64") for sums in held)
            total = total + (high[0] << _LOW) if high else total

            def pass_on(total: Val = total, bin_: Val = bin_) -> None:
                f.increase(total, self._bin(bin_))

            f.when(total > 0, pass_on)

    def _bin(self, number: Val) -> Val:
        return self.f.at(self.of["counters"], self.row * (PART + 1) + number, "int64")

    def descend(self, least: Val, base: Val, shift: Val, goal: Callable[[Val], Val]) -> None:
        """Find the bin in which the weight reaches goal(all of it), and empty all. least: the least key that counts so far."""
        f = self.f
        bins = [(PART - 1) - (self.thread * _EACH + i) for i in range(_EACH)]  # the highest keys first
        weights = [f.load("i64", self._bin(b)) for b in bins]
        for b in bins:
            f.store(f.i64(0), self._bin(b))

        def found(place: Val, left: Val) -> None:
            low, done = base + (((PART - 1) - place) << shift), shift.cmp("eq", SHIFTS[self.dtype][-1])
            f.store(f.select(done, low, least), self.state(LEAST))
            f.store(f.select(done, f.i64(0), low), self.state(BASE))
            f.store(left, self.state(GOAL))

        self.crossing(weights, goal, found)

    def crossing(self, weights: Sequence[Val], goal: Callable[[Val], Val], found: Callable[[Val, Val], None]) -> None:
        """found(n, left) in one thread: the first of the block's weights with which their sum reaches goal(all of it), which is 1 or more, and what
        it takes of that one. weights: this thread's `_EACH`, behind those of threads before it."""
        f = self.f
        before, total = _before(f, _sum(weights))
        aim = goal(total)
        reached, count, short = before, self.thread * _EACH, before
        for weight in weights:
            reached = reached + weight
            less = reached < aim
            count, short = f.select(less, count + 1, count), f.select(less, reached, short)
        f.when((before < aim) & (reached >= aim), lambda: found(count, aim - short))


def highest(dtype: str, target: Target) -> DeviceKernel:
    """The first launch: the highest logit of each row, the token where it's that one, and where top-k's least key lies. Parameters: logits,
    temperature, top_k, token, sound, state int64 [rows, STATE], numbers int64 [rows, parts], counters [rows, COUNTERS], size of a row, parts. Grid:
    rows * parts. Raises TargetError for logits that aren't floats."""
    names = ("logits", "temperature", "top_k", "token", "sound", "state", "numbers", "counters")
    r = _Row("highest", names, (), dtype, target)
    f, last_place = r.f, (1 << 31) - 1
    greedy, top_k = r.option("temperature", "float32").cmp("oeq", 0.0), r.option("top_k", "int64")
    limited = (greedy ^ 1) & _limits(r, top_k)
    logits = r.own_logits()
    keys = [_key(f, value) for *_, value in logits]
    best = f.i64(0)
    for (inside, place, _), key in zip(logits, keys, strict=True):
        # Of equal keys the first one's is the greatest.
        best = f.maximum(best, f.select(inside, (key << 31) | (place ^ last_place), f.i64(0)))
    best = _greatest(f, best)
    f.when(r.thread.cmp("eq", 0), lambda: f.store(best, r.number(r.part)))

    def count() -> None:
        r.tally([(i, k >> SHIFTS[dtype][0], f.i64(1)) for (i, *_), k in zip(logits, keys, strict=True)], wide=False)

    f.when(limited, count)

    def end() -> None:
        best = f.i64(0)
        for i in range(_EACH):
            best = f.maximum(best, f.load("i64", r.number(f.minimum(r.thread + i * THREADS, r.parts - 1))))
        best = _greatest(f, best)
        bits = _bits(f, best >> 31)
        value = _as_float(f, bits)
        finite = (value - value).cmp("oeq", 0.0)

        def tell() -> None:
            f.store((best & last_place) ^ last_place, f.at(r.of["token"], r.row, "int64"))
            f.store(f.cast("zext", greedy | finite, "i8"), f.at(r.of["sound"], r.row, "bool"))
            f.store(f.select(finite & (greedy ^ 1), bits, f.i64(-1)), r.state(HIGHEST))
            f.store(f.i64(0), r.state(LEAST))
            f.store(f.i64(0), r.state(BASE))

        f.when(r.thread.cmp("eq", 0), tell)
        f.barrier()
        f.when(limited, lambda: r.descend(f.i64(0), f.i64(0), f.i64(SHIFTS[dtype][0]), lambda _: top_k))

    r.last(end)
    return f.built()


def narrowed_by_count(dtype: str, target: Target) -> DeviceKernel:
    """One of the launches after the first that end with the least key that counts by top-k. Parameters: logits, top_k, state, counters, size of a row, parts,
    how many bits bins leave open. Grid: rows * parts."""
    r = _Row("narrowed_by_count", ("logits", "top_k", "state", "counters"), ("shift",), dtype, target)
    f, (shift,) = r.f, r.given
    drawn, _ = r.highest()

    def narrow() -> None:
        base, goal = r.known(BASE), r.known(GOAL)
        weights = []
        for inside, _, value in r.own_logits():
            bin_ = (_key(f, value) - base) >> shift
            weights.append((inside & bin_.cmp("ult", PART), bin_, f.i64(1)))
        r.tally(weights, wide=False)
        r.last(lambda: r.descend(f.i64(0), base, shift, lambda _: goal))

    f.when(drawn & _limits(r, r.option("top_k", "int64")), narrow)
    return f.built()


def narrowed_by_mass(dtype: str, target: Target) -> DeviceKernel:
    """One of the launches that end with the least key that counts by top-p. Parameters: logits, temperature, top_p, state, counters, size of a
    row, parts, how many bits bins leave open. Grid: rows * parts."""
    names = ("logits", "temperature", "top_p", "state", "counters")
    r = _Row("narrowed_by_mass", names, ("shift",), dtype, target)
    f, (shift,) = r.f, r.given
    drawn, highest = r.highest()
    heat, nucleus = r.option("temperature", "float32"), _units(f, r.option("top_p", "float32"), PARTS)

    def narrow() -> None:
        least, base, left = (r.known(n) for n in (LEAST, BASE, GOAL))
        weights = []
        for inside, _, value in r.own_logits():
            key = _key(f, value)
            bin_, mass = (key - base) >> shift, _mass(f, highest, value, heat)
            weights.append((inside & bin_.cmp("ult", PART) & (key >= least) & (mass > 0), bin_, mass))
        r.tally(weights, wide=True)
        first = shift.cmp("eq", SHIFTS[dtype][0])

        def goal(total: Val) -> Val:
            return f.select(first, f.maximum(_share(f, total, nucleus), 1), left)

        r.last(lambda: r.descend(least, base, shift, goal))

    f.when(drawn & (nucleus < 1 << PARTS), narrow)
    return f.built()


def drawn(dtype: str, target: Target) -> DeviceKernel:
    """The last launch: the token of rows that have none yet. Parameters: logits, uniform, temperature, min_p, token, state, numbers, counters, size of a
    row, parts. Grid: rows * parts."""
    names = ("logits", "uniform", "temperature", "min_p", "token", "state", "numbers", "counters")
    r = _Row("drawn", names, (), dtype, target)
    f = r.f
    wanted, highest = r.highest()

    def draw() -> None:
        least, heat = r.known(LEAST), r.option("temperature", "float32")
        smallest = _units(f, r.option("min_p", "float32"), ONE)
        uniform = r.option("uniform", "int64") & ((1 << PARTS) - 1)

        def masses(logits: Sequence[tuple[Val, Val, Val]]) -> list[Val]:
            found = []
            for inside, _, value in logits:
                mass = _mass(f, highest, value, heat)
                counts = inside & (_key(f, value) >= least) & (mass >= smallest)
                found.append(f.select(counts, mass, f.i64(0)))
            return found

        _, total = _before(f, _sum(masses(r.own_logits())))
        f.when(r.thread.cmp("eq", 0), lambda: f.store(total, r.number(r.part)))

        def end() -> None:
            parts = [r.thread * _EACH + i for i in range(_EACH)]
            sums = [f.select(p < r.parts, f.load("i64", r.number(f.minimum(p, r.parts - 1))), f.i64(0)) for p in parts]
            where = f.shared(16)

            def enter(part: Val, left: Val) -> None:
                f.store(part, f.at(where, 0, "int64"))
                f.store(left, f.at(where, 1, "int64"))

            r.crossing(sums, lambda total: _share(f, total, uniform) + 1, enter)
            f.barrier()
            begin = f.load("i64", f.at(where, 0, "int64")) * PART
            left = f.load("i64", f.at(where, 1, "int64"))

            def tell(place: Val, _: Val) -> None:
                f.store(begin + place, f.at(r.of["token"], r.row, "int64"))

            r.crossing(masses(r.logits(begin + r.thread * _EACH, 1)), lambda _: left, tell)

        r.last(end)

    f.when(wanted, draw)
    return f.built()


def _limits(r: _Row, top_k: Val) -> Val:
    return (top_k > 0) & (top_k < r.size)


def _key(f: Device, value: Val) -> Val:
    """A float32's bits in the order of numbers, NaN being the greatest, as i64; both zeros are one."""
    bits = f.cast("zext", f.as_type(value + 0.0, "i32"), "i64")
    key = bits ^ f.select(bits < 1 << 31, f.i64(1 << 31), f.i64((1 << 32) - 1))
    return f.select(value.cmp("uno", value), f.i64((1 << 32) - 1), key)


def _bits(f: Device, key: Val) -> Val:
    return key ^ f.select(key < 1 << 31, f.i64((1 << 32) - 1), f.i64(1 << 31))


def _as_float(f: Device, bits: Val) -> Val:
    return f.as_type(f.cast("trunc", bits, "i32"), "float")


def _mass(f: Device, highest: Val, value: Val, heat: Val) -> Val:
    distance = (highest - value) / heat
    near = f.select(distance < FARTHEST, distance, FARTHEST)
    near = f.select(near > 0.0, near, 0.0)
    power = (f.cast("fptosi", near * 2.0**FINE, "i64") * LOG2_E) >> FINE
    part, total = power & ((1 << PARTS) - 1), f.i64(POWERS[-1])
    for term in POWERS[-2::-1]:
        total = f.i64(term) - ((total * part) >> PARTS)
    return f.select(value.cmp("oeq", highest), f.i64(1 << ONE), (total << (ONE - PARTS)) >> (power >> PARTS))


def _share(f: Device, total: Val, parts: Val) -> Val:
    return (total >> PARTS) * parts + (((total & ((1 << PARTS) - 1)) * parts) >> PARTS)


def _units(f: Device, value: Val, bits: int) -> Val:
    inside = f.select(value < 1.0, value, 1.0)
    return f.cast("fptosi", f.select(value > 0.0, inside, 0.0) * 2.0**bits, "i64")


def _sum(values: Sequence[Val]) -> Val:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _greatest(f: Device, value: Val) -> Val:
    """The greatest i64 of the block."""
    distance = 1
    while distance < WARP:
        value = f.maximum(value, f.other_integer(value, distance))
        distance *= 2
    for other in _of_warps(f, value):
        value = f.maximum(value, other)
    return value


def _before(f: Device, value: Val) -> tuple[Val, Val]:
    """The sums of an i64 over the threads before this one, and over all."""
    thread, before, total = f.thread(), f.i64(0), value
    distance = 1
    while distance < WARP:
        other = f.other_integer(total, distance)
        before = f.select((thread & distance) > 0, before + other, before)
        total = total + other
        distance *= 2
    warps = _of_warps(f, total)
    for number, other in enumerate(warps):
        before = f.select(thread >= (number + 1) * WARP, before + other, before)
    return before, _sum(warps)


def _of_warps(f: Device, value: Val) -> list[Val]:
    """A number that is the same in all threads of a warp, of each warp."""
    held = f.shared(8 * THREADS // WARP)
    f.store(value, f.at(held, f.thread() / WARP, "int64"))
    f.barrier()
    return [f.load("i64", f.at(held, number, "int64")) for number in range(THREADS // WARP)]
