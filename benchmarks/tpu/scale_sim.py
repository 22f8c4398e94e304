"""What SCALE-Sim says of weight-stationary arrays: the fixture of `tests/test_tpu_timing.py`.

SCALE-Sim (Samajdar et al., ISPASS 2020) needs numpy < 2, so it runs in a Python of its own:

    python -m venv scale && scale/bin/pip install "numpy<2" scalesim==3.0.0
    scale/bin/python benchmarks/tpu/scale_sim.py --json tests/fixtures/tpu_scale_sim.json

It models an array that pushes weights, streams rows and drains, one fold after another, without shadow weights: it judges how a product is
cut into folds, not a TPU's time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# rows and columns of the array; m, k, n of the product: whole folds, ragged ones, arrays that aren't square, single rows and columns.
SHAPES = (
    (32, 32, 64, 96, 128),
    (32, 32, 17, 50, 70),
    (16, 16, 1, 33, 47),
    (8, 32, 40, 100, 90),
    (32, 8, 40, 100, 90),
    (128, 128, 128, 256, 384),
    (128, 128, 8, 300, 200),
    (256, 256, 64, 512, 300),
)

CONFIG = """[general]
run_name = product
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {columns}
IfmapSramSzkB = 8192
FilterSramSzkB = 8192
OfmapSramSzkB = 8192
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = ws
Bandwidth = 100000
ReadRequestBuffer = 512
WriteRequestBuffer = 512
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""
TOPOLOGY = "Layer, M, N, K, Sparsity,\nproduct, {m}, {n}, {k}, 1:1,\n"


def simulate(rows: int, columns: int, m: int, k: int, n: int) -> dict[str, int]:
    """The compute cycles and stalls that SCALE-Sim reports for one product on an array of `rows` by `columns`."""
    from scalesim.scale_sim import scalesim

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "config": CONFIG.format(rows=rows, columns=columns),
            "topology": TOPOLOGY.format(m=m, k=k, n=n),
            # It asks for a layout file although custom layouts are off.
            "layout": "Layer," + ",".join(f"field {i}" for i in range(20)) + ",\nproduct," + "1," * 20 + "\n",
        }
        paths = {key: folder / f"{key}.csv" for key in files}
        for key, text in files.items():
            paths[key].write_text(text)
        with contextlib.redirect_stdout(io.StringIO()):
            run = scalesim(
                save_disk_space=True,
                verbose=False,
                config=str(paths["config"]),
                topology=str(paths["topology"]),
                layout=str(paths["layout"]),
                input_type_gemm=True,
            )
            run.run_scale(top_path=str(folder))
        with open(next(folder.rglob("COMPUTE_REPORT.csv")), newline="") as file:
            row = {k.strip(): v for k, v in next(csv.DictReader(file, skipinitialspace=True)).items() if k}
    total = next(int(float(v)) for k, v in row.items() if k.startswith("Total Cycles") and "incl" not in k)
    return {"cycles": total, "stalls": int(float(row["Stall Cycles"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    keys = ("rows", "columns", "m", "k", "n")
    products = [{**dict(zip(keys, shape, strict=True)), **simulate(*shape)} for shape in SHAPES]
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "versions": {"scalesim": version("scalesim"), "numpy": version("numpy"), "python": platform.python_version()},
        "command": "python " + " ".join(sys.argv),
        "judge": "SCALE-Sim, weight-stationary, no shadow weights",
        "products": products,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
