"""How many operations of the vector unit libtpu puts into a bundle, from the bytes of its code: none of it is a measurement.

Kernels that differ in the number of equal steps alone differ in code by so many times a step's bytes. A step that stores one register takes a bundle on
v5e, which has one unit that stores: 64 bytes. Two simple operations take half of that: four to a bundle. On words of codes, 15 operations on
each word of 8 codes take 32 bytes per 1024 codes, half a bundle: 0.27 cycles per operation on a register, "alu" in the chips' timing. On v6e
a store takes 32 bytes, operations as many as on v5e: two stores to such a bundle, or bundles of half the size, with two operations; the former is assumed.

    python benchmarks/tpu/bundles.py          # needs libtpu, see jisu.targets.tpu.judges
"""

from __future__ import annotations

from jisu.targets.tpu import judges

KERNEL = """
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PADDED, DTYPES = ({shape},), ("{dtype}",)

def body(x, out):
{lines}

def kernel(x):
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct({out}, jnp.int32), in_specs=[vmem], out_specs=vmem)(x)
"""
STORES = """    for i in range({n}):
        out[i] = x[...]"""
SIMPLE = """    v = [x[i] for i in range(16)]
    for i in range({n}):
        j = i % 16
        v[j] = (v[j] ^ v[(j + 5) % 16]) + jnp.int32(12345 + i % 3)
    for i in range(16):
        out[i] = v[i]"""
CODES = """    total = jnp.zeros((16, 128), jnp.int32)
    for block in range({n}):
        words = pltpu.bitcast(x[block * 64 : block * 64 + 64], jnp.int32)
        for i in range(4):
            moved = words << 3 if i == 0 else lax.shift_right_logical(words, jnp.int32(4 * i - 3))
            total = total ^ (moved & 0x00780078 | 0x3F803F80)
    out[...] = total"""


def step_bytes(
    lines: str, counts: tuple[int, int], shapes: list[str], outs: list[str], dtype: str = "int32"
) -> dict[str, float]:
    """Bytes of code per step and chip."""
    sources = [
        KERNEL.format(lines=lines.format(n=n), shape=shape, out=out, dtype=dtype)
        for n, shape, out in zip(counts, shapes, outs, strict=True)
    ]
    few, many = judges.compile_ahead(sources, ["v5e", "v6e"])
    return {a.chip: (b.code_bytes - a.code_bytes) / (counts[1] - counts[0]) for a, b in zip(few, many, strict=True)}


def main() -> None:
    print(
        "a store of a register:", step_bytes(STORES, (256, 768), ["(8, 128)"] * 2, ["(256, 8, 128)", "(768, 8, 128)"])
    )
    print("two simple operations:", step_bytes(SIMPLE, (512, 1536), ["(16, 8, 128)"] * 2, ["(16, 8, 128)"] * 2))
    codes = step_bytes(CODES, (32, 128), ["(2048, 128)", "(8192, 128)"], ["(16, 128)"] * 2, "uint8")
    print("1024 codes of 4 bits: ", {chip: found / 16 for chip, found in codes.items()})


if __name__ == "__main__":
    main()
