"""AWS Trainium as a second machine of this kind: TVM's own `trn` target writes NKI source of a matrix product from TIR.

Source only, never executed here: what runs NKI comes with AWS's Neuron SDK, which no public package index has. The text names the modules of its
first generation (`neuronxcc.nki`). The schedule is the plain one that the machine asks for: tiles in SBUF, 128 partitions each, sums of one tile in a
bank of PSUM, the inner axis in partitions, so x comes transposed.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from jisu.compiler.errors import CompileError

MACHINE = "aws/trn1/trn1.2xlarge"
PARTITIONS, BANK = 128, 512
"""Partitions of SBUF and PSUM, rows and inner size of what is multiplied at once; float32 sums per partition in a bank of PSUM."""
DTYPES = ("bfloat16", "float16", "float32")
NOTE = (
    "# Source only, never executed here: written by TVM's trn target from TIR, and by nothing checked but its syntax."
)


def nki_source(m: int, n: int, k: int, dtype: str = "bfloat16") -> str:
    """NKI source of result [m, n] = lhsT [k, m] transposed @ rhs [k, n], summed in float32. Source only, never executed here.

    CompileError: another dtype than bfloat16, float16 and float32, or sizes that aren't whole tiles of 128 (of n: 128 or a multiple of 512).
    """
    if dtype not in DTYPES:
        raise CompileError(f"Trainium source is written for {', '.join(DTYPES)}, not for {dtype}")
    columns = BANK if n % BANK == 0 else PARTITIONS
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size < 1 or size % PARTITIONS:
            raise CompileError(f"{name} = {size} isn't made of whole tiles of {PARTITIONS}; pad it with zeros")
    # TVM's code generator ends the process on bfloat16. Only the tiles' declarations name a dtype.
    stored = "float16" if dtype == "bfloat16" else dtype
    target = tvm.target.Target(MACHINE)
    with target:
        built = tvm.compile(
            tvm.IRModule({"main": _product(m, n, k, columns, stored)}), target=target, tir_pipeline="trn"
        )
    text = str(built.mod.imports[0].inspect_source()).strip()
    if dtype == "bfloat16":
        text = text.replace("np.float16", "nl.bfloat16")
    return f"{NOTE}\n{text}\n"


def _product(m: int, n: int, k: int, columns: int, dtype: str) -> Any:
    """The product in TIR, each instruction a nest of loops over partitions (P) and what lies behind each other in one (F)."""
    tile, zero = PARTITIONS, T.float32(0)
    rows, panels, depth = m // tile, n // columns, k // tile
    partition, free = {"nki_dim": "P"}, {"nki_dim": "F"}
    stationary, moving = {"nki_dim": "lhs_F"}, {"nki_dim": "rhs_F"}
    instruction = "tensorized_nki_instruction"

    @T.prim_func
    def main(a: T.handle, b: T.handle, c: T.handle) -> None:
        T.func_attr({"num_inputs": 2})
        lhsT = T.match_buffer(a, (k, m), dtype)
        rhs = T.match_buffer(b, (k, n), dtype)
        result = T.match_buffer(c, (m, n), dtype)
        T.device_entry()
        x = T.alloc_buffer((tile, tile), dtype, scope="trn.sbuf")
        w = T.alloc_buffer((tile, columns), dtype, scope="trn.sbuf")
        y = T.alloc_buffer((tile, columns), dtype, scope="trn.sbuf")
        sums = T.alloc_buffer((1, tile, columns), "float32", scope="trn.psum")
        for i in range(rows):
            for j in range(panels):
                with T.attr(0, instruction, 1):
                    for p in T.serial(0, tile, annotations=partition):
                        for f in T.serial(0, columns, annotations=free):
                            T.evaluate(T.nki.memset(sums[0, p, f], zero))
                for s in range(depth):
                    with T.attr(0, instruction, 1):
                        for p in T.serial(0, tile, annotations=partition):
                            for f in T.serial(0, tile, annotations=free):
                                T.evaluate(T.nki.load(x[p, f], lhsT[s * tile + p, i * tile + f]))
                    with T.attr(0, instruction, 1):
                        for p in T.serial(0, tile, annotations=partition):
                            for f in T.serial(0, columns, annotations=free):
                                T.evaluate(T.nki.load(w[p, f], rhs[s * tile + p, j * columns + f]))
                    with T.attr(0, instruction, 1):
                        for p in T.serial(0, tile, annotations=partition):
                            for r in T.serial(0, tile, annotations=stationary):
                                for f in T.serial(0, columns, annotations=moving):
                                    T.evaluate(T.nki.matmul(sums[0, r, f], x[p, r], w[p, f]))
                with T.attr(0, instruction, 1):
                    for p in T.serial(0, tile, annotations=partition):
                        for f in T.serial(0, columns, annotations=free):
                            T.evaluate(T.nki.tensor_copy(y[p, f], sums[0, p, f]))
                with T.attr(0, instruction, 1):
                    for p in T.serial(0, tile, annotations=partition):
                        for f in T.serial(0, columns, annotations=free):
                            T.evaluate(T.nki.store(result[i * tile + p, j * columns + f], y[p, f]))

    return main
