"""Patterns of sparsity: which numbers of a matrix may be kept together: unstructured, N of every M inputs, or whole blocks."""

from __future__ import annotations

import re

import attrs
import numpy as np


@attrs.frozen
class Pattern:
    """A shape of sparsity of matrices [n, k].

    keep, of: in every run of `of` inputs of a row at most `keep` are kept (of 0: no such rule). rows, columns: numbers that are kept
    or removed together, a block of so many outputs and inputs.
    """

    keep: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """ "unstructured", "2:4" (N:M) or "16x1" (blocks of outputs x inputs); raises ValueError for anything else."""
        if text == "unstructured":
            return cls()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            keep, of = map(int, found.groups())
            if 0 < keep < of <= 64:
                return cls(keep=keep, of=of)
        if found := re.fullmatch(r"(\d+)x(\d+)", text):
            rows, columns = map(int, found.groups())
            if rows and columns and rows * columns > 1:
                return cls(rows=rows, columns=columns)
        raise ValueError(f'a pattern is "unstructured", "N:M" such as "2:4", or blocks such as "16x1", not {text!r}')

    @property
    def sparsity(self) -> float | None:
        """The share that the pattern itself removes; None where it leaves that open."""
        return 1 - self.keep / self.of if self.of else None

    def misfit(self, n: int, k: int) -> str | None:
        """Why the pattern doesn't divide a matrix [n, k]; None where it does."""
        if self.of and k % self.of:
            return f"runs of {self.of} don't divide its {k} inputs"
        if n % self.rows or k % self.columns:
            return f"blocks of {self.rows}x{self.columns} don't divide its shape {n}x{k}"
        return None

    def choose(self, score: np.ndarray, sparsity: float, *, by_row: bool = False) -> np.ndarray:
        """The mask bool [n, k] of the numbers with the highest scores [n, k] that the pattern allows.

        sparsity: the share of zeros, rounded down to whole numbers or blocks; an N:M pattern has its own. by_row: the same share of
        every row (of blocks).
        """
        n, k = score.shape
        if self.of:
            runs = score.reshape(n, k // self.of, self.of)
            order = np.argsort(-runs, axis=-1, kind="stable")
            mask = np.zeros(runs.shape, bool)
            np.put_along_axis(mask, order[..., : self.keep], True, -1)
            return mask.reshape(n, k)
        blocks = score.reshape(n // self.rows, self.rows, k // self.columns, self.columns).sum((1, 3))
        flat = blocks if by_row else blocks.reshape(1, -1)
        drop = int(flat.shape[1] * sparsity)
        order = np.argpartition(flat, drop - 1, axis=-1)[:, :drop] if drop else np.empty((len(flat), 0), np.int64)
        kept = np.ones(flat.shape, bool)
        np.put_along_axis(kept, order, False, -1)
        return np.repeat(np.repeat(kept.reshape(blocks.shape), self.rows, 0), self.columns, 1)
