"""Google's TPUs: chips as data, kernels as scheduled TIR and as Pallas source, any graph as StableHLO, and what it all takes, simulated."""
