"""A product as libtpu cuts it: its events, for the timing model's judgement. libtpu says into how many blocks it cuts a product, no more.

Each step of the grid multiplies one block of x by one of w, while the next step's blocks are copied into the other slots; results leave through
slots of their own. A block that the next step needs again isn't copied again. Of the two orders of the outer loops, the one that moves
fewer bytes is taken. What our own kernels do is in their TIR (`kernel_events`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.types import round_up
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.events import HBM, VMEM, Allocate, Copy, Event, Matmul, Vector, Wait
from jisu.targets.tpu.systolic import ceil_div

RESULT = "bfloat16"
WEIGHTS = ("hbm", "vmem")
"""Where weights are: the product copies them, or they are in VMEM, whole, beforehand."""


@attrs.frozen
class Blocked:
    """(m, k) by (k, n) in blocks of `tiles` = (rows, depth, columns), the last ones ragged. Raises TargetError for sizes below 1."""

    chip: Chip
    m: int
    k: int
    n: int
    dtype: str
    tiles: tuple[int, int, int]
    weights: str = attrs.field(default="hbm")

    def __attrs_post_init__(self) -> None:
        if min(self.m, self.k, self.n, *self.tiles) < 1:
            raise TargetError(f"a product of {self.m}x{self.k}x{self.n} in tiles of {self.tiles}: sizes start at 1")
        if self.weights not in WEIGHTS:
            raise TargetError(f"weights are in 'hbm' or 'vmem', not in {self.weights!r}")

    @classmethod
    def by_libtpu(
        cls, chip: Chip, m: int, k: int, n: int, dtype: str, blocks_nmk: Sequence[int], weights: str = "hbm"
    ) -> Blocked:
        """The product in so many blocks along n, m and k, padded to registers and matrix units."""
        across, down, deep = blocks_nmk
        tiles = (
            round_up(ceil_div(m, down), chip.sublanes),
            round_up(ceil_div(k, deep), chip.mxu),
            round_up(ceil_div(n, across), chip.lanes),
        )
        return cls(chip, m, k, n, dtype, tiles, weights)

    @property
    def least_bytes(self) -> int:
        """Every operand that is copied read once, the result written once."""
        w = self.k * self.n * (self.weights == "hbm")
        return int((self.m * self.k + w) * itemsize(self.dtype) + self.m * self.n * itemsize(RESULT))

    def events(self) -> Iterator[Event]:
        """Its events, for `simulate`."""
        size, sizes = (
            itemsize(self.dtype),
            [_sizes(s, t) for s, t in zip((self.m, self.k, self.n), self.tiles, strict=True)],
        )
        m_sizes, k_sizes, n_sizes = sizes
        steps = self._steps(len(m_sizes), len(k_sizes), len(n_sizes))
        copied = {"x": 0, "w": 0}
        held: dict[str, tuple[int, int]] = {}
        yield from self._memory(*map(len, sizes))

        def load(step: tuple[int, int, int]) -> list[Copy]:
            i, j, d = step
            found = []
            for name, block, count in (("x", (i, d), m_sizes[i] * k_sizes[d]), ("w", (d, j), k_sizes[d] * n_sizes[j])):
                if held.get(name) == block or (name == "w" and self.weights == "vmem"):
                    continue
                held[name] = block
                slot = f"{name}[{copied[name] % 2}]"
                copied[name] += 1
                found.append(Copy(int(count * size), HBM, VMEM, slot, writes=slot))
            return found

        now = {"x": "x[0]", "w": "w[0]" if self.weights == "hbm" else "w"}
        copies = load(steps[0])
        yield from copies
        turn = 0
        for step, following in itertools.zip_longest(steps, steps[1:]):
            i, j, d = step
            ahead = load(following) if following else []
            yield from ahead
            yield from (Wait(c.semaphore) for c in copies)
            now |= {c.semaphore[0]: c.semaphore for c in copies}
            copies = ahead
            sums, slot = f"sum[{turn % 2}]", f"y[{turn % 2}]"
            yield Matmul(m_sizes[i], k_sizes[d], n_sizes[j], self.dtype, reads=(now["x"], now["w"]), writes=sums)
            if d == len(k_sizes) - 1:
                count = m_sizes[i] * n_sizes[j]
                if turn >= 2:
                    yield Wait(slot)
                yield Vector(count, RESULT, "epilogue", reads=sums, writes=slot)
                yield Copy(int(count * itemsize(RESULT)), VMEM, HBM, slot, reads=slot)
                turn += 1
        yield from (Wait(f"y[{t % 2}]") for t in range(max(turn - 2, 0), turn))

    def _steps(self, down: int, deep: int, across: int) -> list[tuple[int, int, int]]:
        """Blocks of m, n and k, in their order."""

        def reads(outer: int, inner: int) -> tuple[int, int]:
            """How often the operands of the outer and of the inner loop are read: what has one block at a time in depth stays."""
            return (1 if deep == 1 else inner), (1 if deep == inner == 1 else outer)

        x, w = self.m * self.k, self.k * self.n * (self.weights == "hbm")
        (x_kept, w_again), (w_kept, x_again) = reads(down, across), reads(across, down)
        rows_outside = x_kept * x + w_again * w < x_again * x + w_kept * w
        outer = [(i, j) for i in range(down) for j in range(across)]
        if not rows_outside:
            outer.sort(key=lambda ij: (ij[1], ij[0]))
        return [(i, j, d) for i, j in outer for d in range(deep)]

    def _memory(self, down: int, deep: int, across: int) -> Iterator[Allocate]:
        size = itemsize(self.dtype)
        bm, bk, bn = (min(s, t) for s, t in zip((self.m, self.k, self.n), self.tiles, strict=True))
        yield from (Allocate(f"x[{i}]", int(bm * bk * size)) for i in range(min(down * deep, 2)))
        if self.weights == "vmem":
            yield Allocate("w", int(self.k * self.n * size))
        else:
            yield from (Allocate(f"w[{i}]", int(bk * bn * size)) for i in range(min(deep * across, 2)))
        # No chip before v7x tells of accumulators of its own: sums are 32-bit tiles of VMEM.
        for i in range(min(down * across, 2)):
            yield Allocate(f"sum[{i}]", bm * bn * 4)
            yield Allocate(f"y[{i}]", int(bm * bn * itemsize(RESULT)))


def _sizes(size: int, tile: int) -> list[int]:
    whole, rest = divmod(size, tile)
    return [tile] * whole + [rest] * bool(rest)
