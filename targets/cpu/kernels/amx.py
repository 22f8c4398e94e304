"""Products by AMX's tile unit: 16 rows by 16 outputs at a time, 64 bytes of inputs of each.

Panels already lie as the unit wants them: per word of inputs (four codes, or two bfloat16) the outputs side by side, half of a panel
being a tile's width. Rows that don't fill a tile are left out by its configuration, so that nothing is padded.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and TDPBSUD, TDPBF16PS in volume 2.
"""

from __future__ import annotations

from collections.abc import Callable

from jisu.targets.cpu.isa import Function, Val
from jisu.targets.target import Target

ROWS = 16
"""Rows of a tile."""
BLOCK = 2 * ROWS
"""Rows that are multiplied at once."""
CONFIG_WORDS = 16
"""32-bit words of scratch memory that a configuration takes."""
_PREFIX = "llvm.x86."
_LINE = 64  # bytes of a tile's row, at most
# Tiles by number: sums (row of tiles, half of the panel), rows of x, halves of the panel.
_SUMS, _X, _W = ((0, 1), (2, 3)), (4, 5), (6, 7)
_PALETTE, _COLUMNS_AT, _ROWS_AT = 1, 16, 48  # of a configuration: its kind, and where sizes of the tiles stand


def step_bytes(inputs: int) -> int:
    """Bytes of inputs per tile so that whole tiles make up `inputs` bytes; 0 where tiles would stay nearly empty."""
    return next((size for size in (_LINE, _LINE // 2) if inputs and inputs % size == 0), 0)


def multiplies(kind: str, inputs: int, target: Target) -> bool:
    """Whether the target's tile unit multiplies rows of so many bytes of `kind` ("int8" or "bf16")."""
    return target.has("amx-tile", f"amx-{kind}") and target.lanes("float32") == ROWS and step_bytes(inputs) > 0


class Tiles:
    """The tile unit inside a function: emits what configures it, fills it and multiplies."""

    def __init__(self, f: Function, config: Val, size: int, stride: int) -> None:
        """config: 64 bytes of memory for the configuration. size: bytes of inputs per tile; stride: from one word of a panel to the next."""
        self.f, self.config, self.size, self.stride = f, config, size, f.i64(stride)

    def blocks(self, rows: Val, block: Callable[[Val, int, Val], None]) -> None:
        """block(first row, rows of tiles, rows) for all rows: `BLOCK` at a time, then for what is left."""
        f = self.f
        self._configure(f.i64(ROWS), f.i64(ROWS))
        (done,) = f.loop(0, rows - (BLOCK - 1), BLOCK, [], lambda m, _: block(m, 2, f.i64(BLOCK)))
        left = rows - done

        def two() -> None:
            self._configure(f.i64(ROWS), left - ROWS)
            block(done, 2, left)

        def one() -> None:
            self._configure(left, f.i64(ROWS))
            block(done, 1, left)

        f.when(left > ROWS, two, lambda: f.when(left > 0, one))
        self._emit("tilerelease")

    def clear(self, count: int) -> None:
        """Zero the sums of `count` rows of tiles."""
        for tile in (t for row in _SUMS[:count] for t in row):
            self._emit("tilezero", tile)

    def load_sums(self, count: int, address: Val, stride: Val) -> None:
        """Sums from memory, rows `stride` bytes apart."""
        self._sums("tileloadd64", count, address, stride)

    def store_sums(self, count: int, address: Val, stride: Val) -> None:
        """Sums to memory."""
        self._sums("tilestored64", count, address, stride)

    def multiply(self, instruction: str, count: int, x: Val, x_stride: Val, w: Val, ahead: int) -> None:
        """Add to the sums the products of a tile's inputs: rows from x, `x_stride` bytes apart, a panel's words from w.

        instruction: "tdpbsud" (levels times codes) or "tdpbf16ps". ahead: how many bytes further the panel is asked for; 0: not.
        """
        f = self.f
        for i, tile in enumerate(_W):
            self._load(tile, f.at(w, i * _LINE, "i8"), self.stride)
        for i in range(0, self.size // 4 * 2 * _LINE if ahead else 0, _LINE):
            f.prefetch(f.at(w, ahead + i, "i8"))
        for m in range(count):
            self._load(_X[m], f.at(x, x_stride * (ROWS * m), "i8"), x_stride)
            for i, tile in enumerate(_W):
                self._emit(instruction, _SUMS[m][i], _X[m], tile)

    def _configure(self, first: Val, second: Val) -> None:
        """Tiles of sums and of x have so many rows."""
        f = self.f
        for i in range(0, 64, 8):
            f.store(f.i64(_PALETTE if i == 0 else 0), f.at(self.config, i, "i8"))
        sizes = {_X[0]: (first, self.size), _X[1]: (second, self.size)}
        sizes |= {tile: (rows, _LINE) for row, rows in zip(_SUMS, (first, second), strict=True) for tile in row}
        sizes |= {tile: (f.i64(self.size // 4), _LINE) for tile in _W}
        for tile, (rows, columns) in sizes.items():
            f.store(f.const(columns, "i16"), f.at(self.config, _COLUMNS_AT + 2 * tile, "i8"))
            f.store(f.cast("trunc", rows, "i8"), f.at(self.config, _ROWS_AT + tile, "i8"))
        f.run(f"{_PREFIX}ldtilecfg", self.config)

    def _sums(self, name: str, count: int, address: Val, stride: Val) -> None:
        f = self.f
        for m in range(count):
            for i, tile in enumerate(_SUMS[m]):
                here = f.at(f.at(address, stride * (ROWS * m), "i8"), i * _LINE, "i8")
                f.run(f"{_PREFIX}{name}", f.const(tile, "i8"), here, stride)

    def _load(self, tile: int, address: Val, stride: Val) -> None:
        self.f.run(f"{_PREFIX}tileloadd64", self.f.const(tile, "i8"), address, stride)

    def _emit(self, name: str, *tiles: int) -> None:
        self.f.run(f"{_PREFIX}{name}", *(self.f.const(t, "i8") for t in tiles))
