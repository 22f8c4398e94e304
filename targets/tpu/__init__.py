"""The TPU target: graphs as StableHLO in text, which a TPU's compiler takes."""
