"""Any graph as one StableHLO module in text, without JAX: what compiles for a CPU also goes out for a TPU."""

from jisu.targets.tpu.stablehlo.emit import EMITTERS, LEAVES, Chooser, Kernel, emit, signature

__all__ = ["EMITTERS", "LEAVES", "Chooser", "Kernel", "emit", "signature"]
