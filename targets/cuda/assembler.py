"""Where CUDA's assembler is; nothing here imports TVM."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path


def find_assembler() -> str | None:
    """The path of ptxas: on PATH, or where pip's nvidia-cuda-nvcc puts it; None where there is none."""
    found = shutil.which("ptxas")
    spec = None if found else importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(path)
    return found
