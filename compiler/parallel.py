"""Work on the rows of large arrays by all cores, in parts that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

NEAR = 1 << 17
"""Numbers that a core works on at once."""


def in_parts(rows: int, width: int, work: Callable[[slice], None], *, multiple: int = 1) -> None:
    """Call work(part) for parts of `rows` rows of `width` numbers, several at a time; each part but the last has a multiple of `multiple` rows.

    NumPy lets go of Python's lock, and memory of the size of a part is used again, while that of a whole matrix comes anew, page by
    page, from the system. The first error of `work` is raised.
    """
    step = max(1, NEAR // max(width, 1) // multiple) * multiple
    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, parts):
            pass
