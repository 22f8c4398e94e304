"""What a decode step costs beside its arithmetic: parallel regions, and the whole way around kernels.

    python benchmarks/cpu/overhead.py --threads 2 [--program 160m.jisu]

A region: a loop of as many empty tasks as there are threads, run in parallel, beside the same loop run serially, 1000 of each in one call.
A step: a Llama of twelve layers so small that its kernels cost next to nothing (width 64, 256 tokens); its step is an upper bound of what
a step of a larger model of twelve layers costs beside arithmetic. With --program, the share of that in a step of the program behind 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, seconds, versions  # noqa: E402

REGIONS = 1000


def regions(threads: int) -> float:
    """Seconds that a parallel region costs."""
    os.environ.update(TVM_NUM_THREADS=str(threads), TVM_BIND_THREADS="0")
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    from jisu.targets.cpu.isa import tvm_target
    from jisu.targets.lowering import KERNEL_PIPELINE
    from jisu.targets.target import Target

    def function(parallel: bool) -> Any:
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("main")
                x = T.match_buffer(T.arg("x", T.handle()), [T.int64(64 * threads)], "int64")
                with T.serial(T.int64(0), T.int64(REGIONS)):
                    with (T.parallel if parallel else T.serial)(T.int64(0), T.int64(threads)) as t:
                        T.buffer_store(x, x[t * 64] + 1, [t * 64])
        return builder.get().with_attr("global_symbol", "main")

    target = tvm_target(Target.resolve("cpu"))
    x = tvm.runtime.empty((64 * threads,), "int64")
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    found = []
    for parallel in (True, False):
        module = tvm.IRModule({"main": function(parallel)})
        run = tvm.compile(module, target=target, tir_pipeline=KERNEL_PIPELINE)["main"]
        found.append(statistics.median(seconds(lambda run=run: run(x), 20)))
    return (found[0] - found[1]) / REGIONS


def step(program: Any, prompt: int) -> float:
    """Seconds of a decode step behind `prompt` tokens."""
    session = program.session(prompt + 8)
    session.append([[1] * prompt], last_only=True)

    def run() -> None:
        session.length = prompt
        session.append([[1]], last_only=True)

    return statistics.median(seconds(run, 500))


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", help="a saved language model of twelve layers")
    given = parser.parse_args()
    import jisu

    found: dict[str, Any] = {"threads": given.threads, "region_s": regions(given.threads)}
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=12, max_position_embeddings=512, **sizes)
    recipe = {"quantize": {"scheme": "int4", "group": 32, "activations": "int8", "algorithm": "rtn"}}
    tiny = jisu.compile(transformers.LlamaForCausalLM(config).eval(), recipe=recipe, num_threads=given.threads)
    found["tiny_step_s"] = step(tiny, 128)
    if given.program:
        found["step_s"] = step(jisu.load(given.program, num_threads=given.threads), 128)
        found["share"] = found["tiny_step_s"] / found["step_s"]
    print(json.dumps({**found, "machine": machine(), "versions": versions()}))


if __name__ == "__main__":
    main()
