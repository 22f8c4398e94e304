"""NVIDIA GPUs: kernels and what passes need to know of them, as data."""

from __future__ import annotations

from jisu.compiler.levels import Rule, multiplied
from jisu.compiler.ops.semi_structured import fours
from jisu.compiler.schemes import SCHEMES, Scheme
from jisu.targets.defaults import simulated as simulated
from jisu.targets.target import Target, capability


def packing(target: Target) -> tuple[int, dict[str, int]]:
    """How kernels want weights packed: an output's inputs one after another, as checkpoints have them; gates and ups by turns.

    Both 16-byte loads of one output and a tensor core's second operand want that.
    """
    return 1, {"float32": 1, "bfloat16": 1, "float16": 1}


STEP = 64
"""Inputs that kernels multiply at once where both operands have 8 bits; groups of codes are as many, or several times so many."""

TOGETHER = True
"""Kernels do several matrices of one input at once."""

FETCHED = True
"""Results come from the GPU's memory."""

SIMULATED = ""
"""Programs run on a GPU, or nowhere."""


def levels(target: Target) -> Rule:
    """Tensor cores multiply levels of 8 bits: integers, and from sm_89 on fp8; groups end where kernels can scale sums."""
    small_floats = capability(target.mcpu) >= (8, 9)

    def rule(x: Scheme, w: Scheme, k: int, group: int) -> bool:
        return multiplied(x, w) and (x.uniform or small_floats) and k % STEP == 0 and group % (STEP * w.per_byte) == 0

    return rule


_ROWS = 8  # of x that a warp multiplies at least, with 16 of weights


def sparse_gain(form: str, kept: float, target: Target, stored: str = "sparse") -> float | None:
    """How many times as fast a sparse matrix is read for one row as a dense one with zeros, predicted; None where no kernel reads it.

    form: a float dtype, or a scheme of codes. kept: the share of kept numbers. stored: "2:4", what kernels read, or "sparse", what they don't. A
    roofline: bytes of weights and places at the memory's bandwidth, or at the nearest memories' what goes into and out of these, and
    inputs, which sparse tensor cores' threads read twice.
    """
    kind = SCHEMES.get(form)
    if stored != "2:4" or (kind is None and form not in ("bfloat16", "float16")):
        return None
    size = 1 / kind.per_byte if kind else 2.0
    near = target.caches[0].bandwidth if target.caches else 0.0

    def seconds(nbytes: float, reads: int) -> float:
        moved = ((nbytes, target.memory_bandwidth), (2 * nbytes + reads * _ROWS * 2 / 16, near))
        return max(amount / rate for amount, rate in moved if rate)

    return seconds(size, 1) / seconds(kept * size + 1 / 8, 2)


def sparse_limits(target: Target) -> dict[str, float]:
    """No kernel expands matrices whose rows keep unlike numbers of inputs: they are stored dense."""
    return {}


def halves(target: Target) -> dict[str, int]:
    """Per dtype or scheme, of how many inputs kernels read a multiple where a matrix keeps two of each four (2:4), faster than a dense one."""
    forms = ("bfloat16", "float16", *SCHEMES)
    faster = [f for f in forms if (sparse_gain(f, 0.5, target, "2:4") or 0.0) > 1.0]
    return {f: 16 * fours("bfloat16" if f not in SCHEMES else "uint8", f if f in SCHEMES else "none") for f in faster}
