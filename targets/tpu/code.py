"""What libtpu makes of a kernel: its bundles, and the cycles that they take when one is issued per cycle.

A TensorCore issues a bundle of instructions per cycle, in order, and the compiler knows all latencies: its final bundles are a schedule. What they
don't show are waits for copies, whose time it can't know, and a matrix unit that is still busy: libtpu issues rows somewhat faster than the peak
lets them through. `replayed` therefore holds an instruction that multiplies up until its matrix unit has taken the rows before. The text is what libtpu
writes with `--xla_jf_dump_to`; its form is nobody's promise, and what isn't understood is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from jisu.compiler.errors import CompileError
from jisu.targets.tpu.chip import Chip

DELAY = 4
"""Bundles that are still issued behind a branch."""

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +([A-Z]{2}:)? *(?:[A-Z]{2}:)? *[:> ]*\{")
_LOOP = re.compile(r"LB:.*?Start region (\d+)")
_BACK = re.compile(r"sbr\.rel \(!%(p\w+)\) target = \$region(\d+)")
_MULTIPLY = re.compile(r"vmatmul(?:\.mubr)?\.(\w+)\.[\w.]*mxu(\d)")
_DTYPES = {"bf16": "bfloat16", "s8": "int8", "f32": "float32"}


@attrs.frozen
class Loop:
    """Bundles `begin` to `end` (excluded), `turns` times."""

    begin: int
    end: int
    turns: int


@attrs.frozen
class Code:
    """A kernel's bundles: how many, which of them multiply (per bundle the matrix unit and the dtype), and its loops, outer ones first."""

    bundles: int
    multiplies: dict[int, tuple[tuple[int, str], ...]]
    loops: tuple[Loop, ...]

    @classmethod
    def parsed(cls, text: str) -> Code:
        """Of libtpu's final bundles; CompileError for a loop that isn't understood."""
        bundles, opened = 0, []
        multiplies, loops = {}, []
        for line in text.splitlines():
            if (found := _BUNDLE.match(line)) is None:
                continue
            at = int(found[1], 16)
            bundles = at + 1
            if (loop := _LOOP.search(line)) is not None:
                opened.append((at, loop[1]))
            issued = tuple((int(unit), _DTYPES[dtype]) for dtype, unit in _MULTIPLY.findall(line))
            if issued:
                multiplies[at] = issued
            for test, region in _BACK.findall(line):
                if opened and opened[-1][1] == region:
                    loops.append(Loop(opened.pop()[0], at + 1 + DELAY, _turns(text, test)))
        if opened or not bundles:
            raise CompileError("these aren't the bundles of a kernel, or one of its loops doesn't end")
        return cls(bundles, multiplies, tuple(sorted(loops, key=lambda loop: (loop.begin, -loop.end))))

    def replayed(self, chip: Chip) -> float:
        """Cycles, without waiting for copies."""
        now, free = 0.0, dict.fromkeys(range(chip.mxus), 0.0)
        for bundle in self._issued(0, self.bundles, self.loops):
            for unit, dtype in self.multiplies.get(bundle, ()):
                now = max(now, free[unit])
                free[unit] = now + chip.sublane_tile(dtype) / chip.rows_per_cycle(dtype)
            now += 1
        return max(now, *free.values())

    def _issued(self, begin: int, end: int, loops: tuple[Loop, ...]) -> Iterator[int]:
        """Bundles in the order in which they are issued."""
        at = begin
        while at < end:
            loop = next((one for one in loops if one.begin == at), None)
            if loop is None:
                yield at
                at += 1
                continue
            inner = tuple(one for one in loops if one is not loop and loop.begin <= one.begin and one.end <= loop.end)
            for _ in range(loop.turns):
                yield from self._issued(loop.begin, loop.end, inner)
            at = loop.end


def _turns(text: str, test: str) -> int:
    """How often a loop turns that ends when a test is true: its variable begins at a number, grows by one, and is compared with another."""
    variable, begin, end = r"(?:\(!?%\w+\), )?%(\w+)", "", ""
    if (found := re.search(rf"%{test} = scmp\.ge\.s32\.totalorder {variable}, (\d+)", text)) is not None:
        end = found[2]
        following = re.search(rf"%{found[1]} = sadd\.s32 (?:\(!?%\w+\), )?1, {variable}", text)
        first = following and re.search(rf"%{following[1]} = sphi {variable},", text)
        start = first and re.search(rf"%{first[1]} = smov\.u32 (?:\(!?%\w+\), )?(\d+)", text)
        begin = start[1] if start else ""
    if not begin:
        raise CompileError(f"how often the loop turns that {test} ends isn't known")
    return int(end) - int(begin)
