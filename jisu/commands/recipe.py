"""`jisu recipe`: show presets and files with every key spelled out, and check a file before the long work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from jisu.commands.shell import Shell
from jisu.compiler.errors import RecipeError
from jisu.compiler.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from rich.console import Console


def show(shell: Shell, name: str | None) -> None:
    """Print the recipe of that name or file as TOML (default: the default one, and the presets' names)."""
    recipe = Recipe.resolve(name)

    def text(console: Console) -> None:
        if name is None:
            console.print(f"# presets: {', '.join(PRESETS)}")
        console.print(recipe.to_toml(), end="")

    shell.finish({"name": name or "default", "presets": list(PRESETS), "recipe": attrs.asdict(recipe)}, text)


def check(shell: Shell, file: str) -> None:
    """Raise RecipeError, naming the nearest known key, unless `file` is a recipe."""
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"there is no recipe file {file!r}")
    recipe = Recipe.resolve(path)
    result = {"file": file, "ok": True, "recipe": attrs.asdict(recipe)}
    shell.finish(result, lambda console: console.print(f"{file}: ok"))
