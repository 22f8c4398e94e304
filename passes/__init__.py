"""The passes, and their order as data."""

from __future__ import annotations

from collections.abc import Mapping

from jisu.compiler.levels import Rule, whole_words
from jisu.compiler.pipeline import Pass
from jisu.passes.canonicalize import Canonicalize
from jisu.passes.fusion import FUSIONS
from jisu.passes.layout import FoldWeights, MergeProjections, PackWeights


def default_passes(fuse: bool = True, max_fold_bytes: int = 1 << 20) -> tuple[Pass, ...]:
    """The exact passes that every model goes through before its cache is derived."""
    passes: list[Pass] = [Canonicalize(max_fold_bytes)]
    for fusion in FUSIONS if fuse else ():
        passes += [fusion, Canonicalize(max_fold_bytes, f"canonicalize after {fusion.name}")]
    return tuple(passes)


def layout_passes(
    panel: int,
    pair: Mapping[str, int],
    sparse: Mapping[str, float] | None = None,
    levels: Rule = whole_words,
    together: bool = True,
    halves: Mapping[str, int] | None = None,
) -> tuple[Pass, ...]:
    """The passes that bring weights into their kernels' order; the arguments come from the target (see `PackWeights`). together: whether
    kernels do several layers of one input at once."""
    pack = PackWeights(panel, pair, sparse or {}, halves or {}, levels)
    return (pack, MergeProjections(), FoldWeights()) if together else (pack, FoldWeights())
