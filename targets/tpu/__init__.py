"""The TPU target: s_tir with the chip's memories, matrix units and asynchronous copies, run on the CPU and emitted as Pallas source."""
