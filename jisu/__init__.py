"""jisu compiles PyTorch language models for fast inference.

import jisu
program = jisu.compile(model, target="cpu")
program.generate("Once upon a time", max_new_tokens=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jisu.compiler.errors import (
    ArtifactError,
    CompileError,
    IndexOutOfRangeError,
    InputError,
    InputTypeError,
    JisuError,
    RecipeError,
    TargetError,
    TensorMemoryError,
    UnsupportedError,
    VerifyError,
)

if TYPE_CHECKING:
    from jisu.compiler.driver import compile, ensemble, export, load, merge, search, to_torch
    from jisu.compiler.recipe import Recipe
    from jisu.runtime.generate import GenerationConfig
    from jisu.runtime.program import Program
    from jisu.targets.target import Target

__version__ = "0.1.0"

_LAZY = {
    "compile": "jisu.compiler.driver",
    "Recipe": "jisu.compiler.recipe",
    "GenerationConfig": "jisu.runtime.generate",
    "Program": "jisu.runtime.program",
    "export": "jisu.compiler.driver",
    "load": "jisu.compiler.driver",
    "search": "jisu.compiler.driver",
    "Target": "jisu.targets.target",
    "ensemble": "jisu.compiler.driver",
    "merge": "jisu.compiler.driver",
    "to_torch": "jisu.compiler.driver",
}

__all__ = [
    "ArtifactError",
    "CompileError",
    "GenerationConfig",
    "IndexOutOfRangeError",
    "InputError",
    "InputTypeError",
    "JisuError",
    "Program",
    "Recipe",
    "RecipeError",
    "Target",
    "TargetError",
    "TensorMemoryError",
    "UnsupportedError",
    "VerifyError",
    "compile",
    "ensemble",
    "export",
    "load",
    "merge",
    "search",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    """Heavy parts are imported when they are first asked for, so that `import jisu` costs nothing."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jisu' has no attribute {name!r}")
