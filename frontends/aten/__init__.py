"""Lowerings of PyTorch's operators, by families; importing this package fills `LOWERINGS`."""

from jisu.frontends.aten import contractions, elementwise, indexing, movement, pooling, reductions, spectral
from jisu.frontends.aten.decompositions import decompositions
from jisu.frontends.aten.table import LOWERINGS, Call, Refusal, lowering, refuse

FAMILIES = (contractions, elementwise, indexing, movement, pooling, reductions, spectral)

__all__ = ["FAMILIES", "LOWERINGS", "Call", "Refusal", "decompositions", "lowering", "refuse"]
