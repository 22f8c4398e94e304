"""A TPU chip as data: what tile sizes and schedules depend on."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from jisu.compiler.errors import TargetError

SUBLANE_BYTES = 4
"""Bytes that a sublane holds per lane: one float32, two bfloat16 or four int8."""


@attrs.frozen
class Chip:
    """One core's view of a chip.

    mxu: rows and columns of a matrix unit; mxus: how many there are. vmem_bytes, smem_bytes: on-chip memory for vectors and scalars.
    hbm_bandwidth: bytes per second. clock: Hz. peak: operations per second by dtype of the operands, a multiply-add being two.
    """

    name: str
    mxu: int
    mxus: int
    vmem_bytes: int
    smem_bytes: int
    hbm_bandwidth: float
    clock: float
    peak: Mapping[str, float] = attrs.field(hash=False)
    sublanes: int = 8
    lanes: int = 128

    def packed_sublanes(self, itemsize: int) -> int:
        """Rows of a native tile: (8, 128) for four bytes, (16, 128) for two, (32, 128) for one."""
        return self.sublanes * SUBLANE_BYTES // itemsize


# Sources: Google Cloud's TPU documentation (peaks, bandwidths); jax's `pltpu.get_tpu_info_for_chip` (arrays, memories).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 128, 4, 128 << 20, 1 << 20, 820e9, 1.5e9, {"bfloat16": 197e12, "int8": 394e12}),
        Chip("v6e", 256, 2, 128 << 20, 1 << 20, 1640e9, 1.75e9, {"bfloat16": 918e12, "int8": 1836e12}),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of that name; TargetError lists the known ones."""
    if name not in CHIPS:
        raise TargetError(f"unknown TPU chip {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]
