"""Where CUDA's assembler is; nothing here imports TVM."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def find_assembler() -> str | None:
    """The path of ptxas: where pip's nvidia-cuda-nvcc puts it, whose version is this environment's choice, or on PATH; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(path)
    return shutil.which("ptxas")


def which_assembler() -> str:
    """The assembler, and as what it was found: a program that was compiled without one, or by another one, is another program."""
    found = find_assembler()
    if found is None:
        return ""
    stat = os.stat(found)
    return f"{found} {stat.st_size} {stat.st_mtime_ns}"
