"""The recipe: everything that decides how a model is compiled, as one frozen value and one TOML file.

    Recipe.resolve("paged")                       # a preset
    Recipe.resolve("recipe.toml")                 # a file
    Recipe.resolve({"cache": {"page": 32}})       # keys over the default

Unknown keys, presets and values outside their range are RecipeErrors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from jisu.compiler.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _between(low: int, high: int) -> Any:
    def check(_: Any, attribute: attrs.Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RecipeError(f"{attribute.name} must be an integer from {low} to {high}, not {value!r}")

    return check


def _is_bool(_: Any, attribute: attrs.Attribute[bool], value: bool) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{attribute.name} must be true or false, not {value!r}")


@attrs.frozen(kw_only=True)
class CacheRecipe:
    """How keys and values of earlier tokens are stored.

    page: slots per page, 0 for one contiguous block per layer. ring: layers with a sliding window keep only the slots
    that they look back over.
    """

    page: int = attrs.field(default=0, validator=_between(0, 4096))
    ring: bool = attrs.field(default=True, validator=_is_bool)


@attrs.frozen(kw_only=True)
class Recipe:
    """All that decides how a model is compiled, beside the target.

    fuse: run the fusion rules. pack: bring weights into their kernels' order. max_fold_bytes: the largest tensor that
    constant folding makes. prefill_chunk: tokens of a prompt that are read at a time.
    """

    fuse: bool = attrs.field(default=True, validator=_is_bool)
    pack: bool = attrs.field(default=True, validator=_is_bool)
    max_fold_bytes: int = attrs.field(default=1 << 20, validator=_between(0, 1 << 30))
    prefill_chunk: int = attrs.field(default=512, validator=_between(1, 1 << 20))
    cache: CacheRecipe = attrs.field(factory=CacheRecipe)

    @classmethod
    def resolve(cls, recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any] | None) -> Recipe:
        """A recipe from itself, a preset's name, a TOML file's path, a mapping of keys, or None for the default.

        Raises RecipeError for an unknown preset, key or value, naming the nearest known one.
        """
        if recipe is None:
            return cls()
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        if isinstance(recipe, str) and recipe in PRESETS:
            return PRESETS[recipe]
        path = Path(recipe)
        if path.is_file():
            return cls.from_toml(path.read_text(), str(path))
        if path.suffix == ".toml" or isinstance(recipe, os.PathLike):
            raise RecipeError(f"there is no recipe file {str(path)!r}")
        raise RecipeError(f"unknown recipe {recipe!r}; known: {', '.join(PRESETS)}{_nearest(str(recipe), PRESETS)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], label: str = "recipe") -> Recipe:
        """A recipe from nested plain values; keys left out keep their defaults."""
        try:
            return _CONVERTER.structure(dict(values), cls)
        except (RecipeError, cattrs.BaseValidationError) as error:
            raise RecipeError(f"{label}: {_explain(error)}") from None

    @classmethod
    def from_toml(cls, text: str, label: str = "recipe") -> Recipe:
        """A recipe from TOML text; `label` names it in errors."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{label} is no TOML: {error}") from None
        return cls.from_dict(values, label)

    def to_toml(self) -> str:
        """The recipe as TOML, every key spelled out."""
        lines, tables = [], []
        for key, value in attrs.asdict(self, recurse=False).items():
            if attrs.has(type(value)):
                inside = attrs.asdict(value).items()
                tables.append("\n".join([f"\n[{key}]", *(f"{k} = {_toml(v)}" for k, v in inside)]))
            else:
                lines.append(f"{key} = {_toml(value)}")
        return "\n".join([*lines, *tables]) + "\n"


PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "paged": Recipe(cache=CacheRecipe(page=16)),
    "reference": Recipe(fuse=False, pack=False),
}
"""Recipes by name: the default; a paged KV cache; everything without fusion and packing (to compare with)."""


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _strictly(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if type(value) is not kind:
            raise RecipeError(f"expected {'true or false' if kind is bool else 'an integer'}, got {value!r}")
        return value

    return structure


def _explain(error: BaseException) -> str:
    """The first cause inside cattrs' tree of errors, as a sentence."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [a.name for a in attrs.fields(error.cl)]
        unknown = sorted(error.extra_fields)
        return "; ".join(f"unknown key {k!r}{_nearest(k, known)} (known: {', '.join(known)})" for k in unknown)
    if isinstance(error, ClassValidationError):
        inner = error.exceptions[0]
        notes = [str(n) for n in getattr(inner, "__notes__", ())]
        field = notes[0].rpartition(" ")[2] if notes else ""
        return (
            f"{field}: {_explain(inner)}"
            if field and not isinstance(inner, ForbiddenExtraKeysError)
            else _explain(inner)
        )
    return str(error)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, bool):
        converter.register_structure_hook(kind, _strictly(kind))
    return converter


_CONVERTER = _converter()
