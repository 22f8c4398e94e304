"""The hot CPU kernels, one module per family: each builder is a pure function of static sizes, dtype and Target."""
