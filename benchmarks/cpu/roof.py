"""What this machine's cores can do at best: bytes read from memory, and products in registers.

python benchmarks/cpu/roof.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import seconds  # noqa: E402

STREAM = 1 << 30
"""Bytes that are read, more than any cache holds."""
LOOPS = 4_000_000


def measure(threads: int) -> dict[str, float]:
    """{"read_bytes_per_s", "float32_flops", "int8_ops"}: the best of five runs each, on so many threads at once."""
    os.environ.update(TVM_NUM_THREADS=str(threads), TVM_BIND_THREADS="0")
    import numpy as np
    import tvm
    from tvm.script.ir_builder import tirx as T

    from jisu.targets.cpu import isa
    from jisu.targets.cpu.kernels.integer import dot4
    from jisu.targets.cpu.kernels.matmul import in_tasks
    from jisu.targets.target import Target

    target = Target.resolve("cpu")
    ints, floats = f"<{target.lanes('float32')} x i32>", f"<{target.lanes('float32')} x float>"

    def build(body: Callable[[isa.Function, isa.Val, isa.Val, isa.Val], None]) -> Any:
        """A function (data, out, count) that runs `body` on each thread with its own part."""
        f = isa.Function("roof", [("ptr", "data"), ("ptr", "out"), ("i64", "count")], target)
        data, out, count = f.params()
        body(f, data, out, count)
        micro = f.finish()

        def tasks(buffers: Any, dims: Any) -> None:
            def run(t: Any) -> None:
                part = T.floordiv(dims["n"], T.int64(threads))
                with T.serial(T.int64(0), T.int64(1)):
                    micro.call(
                        buffers["data"].access_ptr("r", offset=t * part),
                        buffers["out"].access_ptr("w", offset=t * 64),
                        part,
                    )

            in_tasks(T.int64(threads), run)

        arguments = [isa.Arg("data", ("n",), "float32"), isa.Arg("out", (64 * threads,), "float32")]
        func = isa.prim_func("roof", arguments, [micro], tasks).with_attr("global_symbol", "main")
        return tvm.compile(tvm.IRModule({"main": func}), target=isa.tvm_target(target))["main"]

    def read(f: isa.Function, data: isa.Val, out: isa.Val, count: isa.Val) -> None:
        step = 4 * f.lanes

        def body(i: isa.Val, sums: list[isa.Val]) -> list[isa.Val]:
            new = []
            for j, s in enumerate(sums):
                here = f.at(data, i + j * f.lanes, "float32")
                f.prefetch(f.at(here, 4096, "i8"))
                new.append(s + f.load(ints, here))
            return new

        sums = f.loop(0, count - (step - 1), step, [f.const(0, ints)] * 4, body)[:-1]
        f.store(sums[0] + sums[1] + (sums[2] + sums[3]), out)

    def products(kind: str) -> Callable[[isa.Function, isa.Val, isa.Val, isa.Val], None]:
        def write(f: isa.Function, data: isa.Val, out: isa.Val, count: isa.Val) -> None:
            vec = ints if kind == "int8" else floats
            a, b = (f.load(vec, f.at(data, i * f.lanes, "float32")) for i in (0, 1))
            zero = f.const(0 if kind == "int8" else 0.0, vec)

            def body(_: isa.Val, sums: list[isa.Val]) -> list[isa.Val]:
                return [dot4(f, a, b, s) if kind == "int8" else f.fma(a, b, s) for s in sums]

            sums = f.loop(0, LOOPS, 1, [zero] * 16, body)[:-1]
            total = sums[0]
            for s in sums[1:]:
                total = total + s
            f.store(total, out)

        return write

    def best(run: Any, size: int) -> float:
        data = tvm.runtime.empty((size,), "float32").copyfrom(np.full(size, 1e-9, np.float32))
        out = tvm.runtime.empty((64 * threads,), "float32")
        return min(seconds(lambda: run(data, out), 5))

    lanes, small = target.lanes("float32"), 64 * threads
    return {
        "read_bytes_per_s": STREAM / best(build(read), STREAM // 4),
        "float32_flops": threads * LOOPS * 16 * lanes * 2 / best(build(products("float32")), small),
        "int8_ops": threads * LOOPS * 16 * lanes * 8 / best(build(products("int8")), small),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    print(json.dumps(measure(parser.parse_args().threads)))
