"""What Google's TPU compiler estimates of matrix products: the fixture of `tests/test_tpu_timing.py`.

libtpu compiles ahead of time for named chips without a TPU, and writes the cycles that it expects of each instruction into the text of the
compiled program (`Compiled.as_text()`, a public call). These are a compiler's estimates, never measurements. In a Python of its own:

    python -m venv aot && aot/bin/pip install jax==0.10.2 libtpu==0.0.52
    aot/bin/python benchmarks/tpu/libtpu_estimates.py --json tests/fixtures/tpu_libtpu.json
    aot/bin/python benchmarks/tpu/libtpu_estimates.py --set later --json tests/fixtures/tpu_libtpu_later.json
    aot/bin/python benchmarks/tpu/libtpu_estimates.py --set pairs --json tests/fixtures/tpu_libtpu_pairs.json

Every product is an int8 one with int32 sums, scaled per column to bfloat16, or a bfloat16 one with float32 sums rounded to bfloat16.
Beside the cycles stands how the compiler cut the product into blocks, and whether it reads the weights from VMEM (where a copy that isn't in
the estimate brings them beforehand).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

CHIPS = ("v5e", "v6e")
DTYPES = ("int8", "bfloat16")
# m, k, n: chosen before any of their estimates was seen; ragged ones among them.
SHAPES = (
    (8, 4096, 14336),
    (16, 2048, 6144),
    (32, 3072, 3072),
    (64, 8192, 2048),
    (128, 2048, 8192),
    (192, 4096, 6144),
    (256, 1024, 4096),
    (384, 5120, 5120),
    (512, 3072, 8192),
    (768, 4096, 1024),
    (1024, 2560, 6912),
    (2048, 1536, 4608),
    (8, 3584, 18944),
    (24, 2048, 2048),
    (40, 1000, 3000),
    (72, 6144, 1536),
    (100, 4096, 4096),
    (160, 2304, 9216),
    (320, 8192, 1024),
    (448, 2048, 5632),
    (640, 3584, 3584),
    (896, 1280, 10240),
    (1536, 4096, 2048),
    (3072, 2560, 2560),
)
# Chosen after the model and its parameters were finished, but with estimates of 2048 x 2048 and of 1024 rows known; small ones among them.
LATER = (
    (8, 2048, 2048),
    (32, 5120, 5120),
    (64, 2048, 6144),
    (96, 4096, 4096),
    (128, 2048, 2048),
    (256, 2048, 2048),
    (384, 1536, 6144),
    (512, 2048, 2048),
    (512, 1024, 8192),
    (1024, 2048, 2048),
    (1024, 5120, 5120),
    (2048, 2048, 2048),
)
# Half as deep, in bfloat16: what estimates of int8 are compared with.
PAIRS = tuple((m, k // 2, n) for m, k, n in (*SHAPES, *LATER) if k % 256 == 0)


def estimate(chip: str, m: int, k: int, n: int, dtype: str) -> dict[str, Any]:
    """Cycles, blocks and place of the weights of one compiled product."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices
    here = SingleDeviceSharding(devices[0])

    def tensor(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def integers(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return (jax.lax.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32) * scale).astype(jnp.bfloat16)

    def floats(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    operands = [tensor((m, k), dtype), tensor((k, n), dtype)]
    if dtype == "int8":
        compiled = jax.jit(integers).trace(*operands, tensor((n,), "float32")).lower().compile()
    else:
        compiled = jax.jit(floats).trace(*operands).lower().compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    cycles = [int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', entry)]
    bounds = [json.loads(b) for b in re.findall(r'"iteration_bounds":(\[[^\]]*\])', entry)]
    # Arguments keep their order: %w's copy to memory space 1 is what S(1) in its layout says.
    in_vmem = bool(re.search(rf"copy-done\S* = \w+\[{k},{n}\]\{{[^}}]*S\(1\)\}}", entry))
    cost = compiled.cost_analysis()
    return {
        "chip": chip, "m": m, "k": k, "n": n, "dtype": dtype, "cycles": sum(cycles), "instructions": len(cycles),
        "blocks_nmk": [int(b) for b in bounds[0]] if bounds else [], "weights": "vmem" if in_vmem else "hbm",
        "flops": cost.get("flops"), "bytes": cost.get("bytes accessed"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--set", choices=["fitted", "later", "pairs"], default="fitted", help="see SHAPES, LATER, PAIRS"
    )
    options = parser.parse_args()
    shapes = {"fitted": SHAPES, "later": LATER, "pairs": PAIRS}[options.set]
    path, products = options.json, []
    for chip in CHIPS:
        for i, shape in enumerate(shapes):
            for j, dtype in enumerate(DTYPES if options.set != "pairs" else ("bfloat16",)):
                # A chessboard: each shape is fitted in one dtype and held out in the other.
                half = options.set if options.set != "fitted" else "fit" if (i + j) % 2 == 0 else "held out"
                products.append({**estimate(chip, *shape, dtype), "half": half})
                print(products[-1], file=sys.stderr)
    found = {
        "date": datetime.date.today().isoformat(),
        "versions": {p: version(p) for p in ("jax", "libtpu")} | {"python": platform.python_version()},
        "command": "python " + " ".join(sys.argv),
        "judge": "cycles estimated by libtpu, not measured",
        "products": products,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
