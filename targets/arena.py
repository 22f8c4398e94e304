"""Memory for intermediate values: which of them share a place, with sizes that are known at run time only."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import sympy

from jisu.compiler.types import Dim

_PROBE = 96  # the value of every symbol where sizes are compared


@attrs.frozen
class Lifetime:
    """A value's bytes and the numbers of the first and the last step that touch it."""

    nbytes: Dim
    first: int
    last: int


@attrs.frozen
class Slots:
    """place: per value, its slot. sizes: per slot, the sizes of which it takes the largest."""

    place: tuple[int, ...]
    sizes: tuple[tuple[Dim, ...], ...]


def share(values: Sequence[Lifetime]) -> Slots:
    """Slots for `values`, such that no two that live at the same time share one.

    Greedy, in the order of `first`: the free slot that grows or is wasted least, the latest used of several, since that is
    in the cache.
    """
    free: list[tuple[int, int]] = []  # (slot, since when)
    busy: list[tuple[int, int]] = []  # (last step, slot)
    sizes: list[dict[Dim, None]] = []
    rooms: list[int] = []  # bytes of each slot at the probe
    place = [0] * len(values)
    for number in sorted(range(len(values)), key=lambda n: values[n].first):
        value = values[number]
        free += [(slot, last) for last, slot in busy if last < value.first]
        busy = [(last, slot) for last, slot in busy if last >= value.first]
        need = _probed(value.nbytes)

        def cost(item: tuple[int, int], need: int = need, value: Lifetime = value) -> tuple[float, int]:
            room = max(rooms[item[0]], 1)
            return (0.0 if value.nbytes in sizes[item[0]] else max(room / max(need, 1), need / room), -item[1])

        best = min(free, key=cost, default=None)
        if best is not None and cost(best)[0] <= 8.0:
            free.remove(best)
            slot = best[0]
        else:
            slot = len(sizes)
            sizes.append({})
            rooms.append(0)
        sizes[slot][value.nbytes] = None
        rooms[slot] = max(rooms[slot], need)
        busy.append((value.last, slot))
        place[number] = slot
    return Slots(tuple(place), tuple(tuple(s) for s in sizes))


def _probed(value: Dim) -> int:
    if isinstance(value, int):
        return value
    # A division that is exact for the sizes that occur may leave a rest here.
    return int(sympy.floor(value.subs(dict.fromkeys(value.free_symbols, _PROBE))))
