"""The recipe: everything that decides how a model is compiled, as one frozen value and one TOML file.

    Recipe.resolve("paged")                       # a preset
    Recipe.resolve("recipe.toml")                 # a file
    Recipe.resolve({"cache": {"page": 32}})       # keys over the default

Unknown keys, presets and values outside their range are RecipeErrors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from jisu.compiler.errors import RecipeError
from jisu.compiler.pattern import Pattern
from jisu.compiler.rows import ROW_BITS
from jisu.compiler.schemes import SCHEMES

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


def _share(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RecipeError(f"{attribute.name} must be a number from 0 to 1, not {value!r}")


def _one_of(known: tuple[str, ...]) -> Any:
    def check(_: Any, attribute: attrs.Attribute[str], value: str) -> None:
        if value not in known:
            raise RecipeError(
                f"unknown {attribute.name} {value!r}{_nearest(str(value), known)} (known: {', '.join(known)})"
            )

    return check


CACHE_SCHEMES = ("none", *ROW_BITS)
"""How the cache stores numbers: as they are, or as records of `jisu.compiler.rows`."""

TRANSFORMS = ("auto", "none", "hadamard", "calibrated")
"""The basis in which keys and values are rounded: as they are; channels mixed; the best one for calibration text. "auto" takes, for few
bits, the last where there is such text, else the one before."""


@attrs.frozen(kw_only=True)
class CacheRecipe:
    """How keys and values of earlier tokens are stored.

    page: slots per page, 0 for one contiguous block per layer. ring: layers with a sliding window keep only the slots
    that they look back over. scheme: one of `CACHE_SCHEMES`; codes have a scale and an offset per token and head. transform: one of
    `TRANSFORMS`.
    """

    page: int = attrs.field(default=0, validator=_between(0, 4096))
    ring: bool = attrs.field(default=True, validator=_is_bool)
    scheme: str = attrs.field(default="none", validator=_one_of(CACHE_SCHEMES))
    transform: str = attrs.field(default="auto", validator=_one_of(TRANSFORMS))

    def __attrs_post_init__(self) -> None:
        if self.scheme == "none" and self.transform != "auto":
            raise RecipeError(
                f'cache: transform is for a cache in few bits; give a scheme, such as scheme = "{next(iter(ROW_BITS))}"'
            )

    @property
    def calibrated(self) -> bool:
        """Whether calibration text changes what is done."""
        return self.transform == "calibrated" or self.transform == "auto" and ROW_BITS.get(self.scheme, 8) < 8

    def transform_with(self, calibration: bool) -> str:
        """The transform that is meant, with calibration text or without."""
        if self.transform != "auto":
            return self.transform
        return "none" if not self.calibrated else "calibrated" if calibration else "hadamard"


_INTEGER_BITS = tuple(s.bits for s in SCHEMES.values() if s.uniform)


ALGORITHMS = ("auto", "rtn", "gptq", "awq", "autoround")
"""How codes are found: "rtn" rounds to the nearest, "gptq" keeps each layer's outputs on calibration text, "awq" scales channels and
clips ranges on it before rounding to the nearest, "autoround" goes on from "gptq" and learns codes and scales block by block (after
AutoRound; Cheng et al., 2024), "auto" does as "gptq" where there is such text."""

OBJECTIVES = ("loss", "output")
"""What GPTQ and ALPS keep: the model's loss, by how errors in a layer's outputs count for it to second order (estimated from gradients
on calibration data, after YAQA; Tseng et al., 2025), or the outputs of each layer by itself. Other algorithms know outputs or numbers only;
and so does a layer with more than 4096 outputs."""

ACTIVATIONS = ("none", *(s.name for s in SCHEMES.values() if s.computes))
"""Schemes to which the values that a layer reads can be rounded at each call."""

RANGES = ("dynamic", "static")
"""Where the scales of such values come from: at each call from the token, or once from calibration text for all tokens."""

ROTATIONS = ("none", "hadamard")
"""How the channels of the residual stream and of heads are mixed before quantizing."""


SMALLEST_GROUP = 16
"""Inputs per scale below which a layer whose inputs the usual groups don't divide is refused: scales would weigh as much as codes."""


@attrs.frozen(kw_only=True)
class QuantizeRecipe:
    """How the weights of some linear layers are stored.

    layers: a pattern of their names in the model ("*.mlp.down_proj"; "head" is the layer that gives the logits). scheme: a name of
    `jisu.compiler.schemes.SCHEMES`, or "none" to leave them as they are. group: inputs per scale, 0 for a whole row, -1 for
    what is usual for the scheme (of integers, where that doesn't divide a layer's inputs, the largest power of two that does).
    symmetric: no zeros. algorithm: one of `ALGORITHMS`; with calibration also search (how many ranges a group's
    scale is chosen from), match (0 to 1: how far layers make up for errors of those before them), refine (sweeps of coordinate
    descent after it) and objective (one of `OBJECTIVES`). In a layer that a `PruneRecipe` cuts, its match and objective apply.

    activations: the scheme that what the layers read is rounded to, one of `ACTIVATIONS`; activation_group: channels per scale, 0 for
    a whole token, -1 for the scheme's group, which of an integer scheme is that of the weights; activation_range: one of `RANGES`
    ("static": one scale per layer). smooth: SmoothQuant's alpha, how much of the spread
    between channels moves from what the layers read into their weights (0: none of it).
    """

    layers: str = attrs.field(default="*", validator=attrs.validators.instance_of(str))
    scheme: str = attrs.field(default="int8", validator=_one_of(("none", *SCHEMES)))
    group: int = attrs.field(default=-1, validator=_between(-1, 1 << 20))
    symmetric: bool = attrs.field(default=True, validator=_is_bool)
    algorithm: str = attrs.field(default="auto", validator=_one_of(ALGORITHMS))
    search: int = attrs.field(default=16, validator=_between(0, 1000))
    match: float = attrs.field(default=1.0, validator=_share)
    refine: int = attrs.field(default=8, validator=_between(0, 1000))
    objective: str = attrs.field(default="loss", validator=_one_of(OBJECTIVES))
    activations: str = attrs.field(default="none", validator=_one_of(ACTIVATIONS))
    activation_group: int = attrs.field(default=-1, validator=_between(-1, 1 << 20))
    activation_range: str = attrs.field(default="dynamic", validator=_one_of(RANGES))
    smooth: float = attrs.field(default=0.0, validator=_share)

    def __attrs_post_init__(self) -> None:
        if self.scheme == "none":
            for key in ("activations", "smooth"):
                if getattr(self, key) not in ("none", 0):
                    raise RecipeError(
                        f'{key} is for layers whose weights are quantized; give them a scheme, not "none"'
                    )
        if self.activation_group >= 0:
            if self.activations == "none":
                raise RecipeError('activation_group needs activations, such as activations = "int8"')
            if SCHEMES[self.activations].scale != "float16":
                raise RecipeError(f"{self.activations} has groups of its own; leave activation_group out")
            if self.activation_group and self.activation_range == "static":
                raise RecipeError(
                    "a static range is one scale for all of what a layer reads; leave activation_group out"
                )
        if self.smooth and self.algorithm == "awq":
            raise RecipeError("smooth and awq both scale channels: leave one of them out")
        if self.activation_range == "static":
            if self.activations == "none":
                raise RecipeError('activation_range needs activations, such as activations = "int8"')
            if SCHEMES[self.activations].scale == "e8m0":
                raise RecipeError(f'{self.activations} takes its scales from the values: activation_range = "dynamic"')
        if not self.symmetric and self.scheme != "none" and not SCHEMES[self.scheme].uniform:
            raise RecipeError(f"{self.scheme} has no zeros: symmetric = false is for integer schemes")
        if self.algorithm == "autoround" and self.scheme != "none" and not SCHEMES[self.scheme].uniform:
            raise RecipeError(f'{self.scheme} has no steps to learn: algorithm = "autoround" is for integer schemes')

    @property
    def calibrated(self) -> bool:
        """Whether calibration text makes a difference."""
        weights = self.algorithm != "rtn" and self.scheme != "none"
        return weights or self.smooth > 0 or self.activation_range == "static"

    @property
    def channels_per_scale(self) -> int:
        """How many channels of what a layer reads share a scale; 0 for a whole token."""
        kind = SCHEMES.get(self.activations)
        if kind is None or kind.scale != "float16":
            return 0 if kind is None else kind.group
        if self.activation_group >= 0 or self.activation_range == "static" or not kind.uniform:
            return max(self.activation_group, 0)
        return self.inputs_per_scale

    @property
    def inputs_per_scale(self) -> int:
        """The group, where the recipe names none that of the scheme; 0 for a whole row."""
        return SCHEMES[self.scheme].group if self.group < 0 else self.group


def _below_one(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise RecipeError(f"{attribute.name} must be at least 0 and below 1, not {value!r}")


PRUNINGS = ("auto", "magnitude", "wanda", "sparsegpt", "alps")
"""How a mask and the numbers that stay are found: the largest numbers (the only way without calibration data); Wanda (Sun et al., 2023);
SparseGPT (Frantar & Alistarh, 2023); "alps": masks by ADMM, then least squares (Meng et al., 2024). "auto" is the last where there is
calibration data, else the first."""

ALLOCATIONS = ("uniform", "global", "owl", "optimal")
"""How an entry's share of zeros is spread over its layers: the same for all; by one threshold of magnitudes; by outliers of what layers
read (OWL; Yin et al., 2024); so that the loss measured layer by layer is least."""


def _is_pattern(_: Any, attribute: attrs.Attribute[str], value: str) -> None:
    try:
        Pattern.parse(value)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _share_or_none(_: Any, attribute: attrs.Attribute[float], value: float | None) -> None:
    if value is not None:
        _below_one(_, attribute, value)


@attrs.frozen(kw_only=True)
class PruneRecipe:
    """Which numbers of the matrices of some linear layers become 0.

    layers: as in `QuantizeRecipe`; but "*" leaves out the layer that gives the logits, which is named "head". sparsity: the share of
    zeros, 0 to leave the layers dense; N:M patterns have their own. pattern: "unstructured", "N:M" (at most N of M consecutive
    inputs stay) or blocks of outputs x inputs such as "16x1". algorithm: one of `PRUNINGS`. allocation: one of `ALLOCATIONS`.
    match, objective: as in `QuantizeRecipe`.
    """

    layers: str = attrs.field(default="*", validator=attrs.validators.instance_of(str))
    sparsity: float | None = attrs.field(default=None, validator=_share_or_none)
    pattern: str = attrs.field(default="unstructured", validator=_is_pattern)
    algorithm: str = attrs.field(default="auto", validator=_one_of(PRUNINGS))
    allocation: str = attrs.field(default="uniform", validator=_one_of(ALLOCATIONS))
    match: float = attrs.field(default=1.0, validator=_share)
    objective: str = attrs.field(default="loss", validator=_one_of(OBJECTIVES))

    def __attrs_post_init__(self) -> None:
        own = self.shape.sparsity
        if own is None and self.sparsity is None:
            raise RecipeError("prune: sparsity is missing, the share of zeros (0.5)")
        if own is not None and self.sparsity not in (None, 0, own):
            raise RecipeError(
                f"prune: {self.pattern} removes {own:g} of the numbers, not {self.sparsity!r}; leave sparsity out"
            )
        if own is not None and self.allocation != "uniform":
            raise RecipeError(f"prune: {self.pattern} removes the same share everywhere; leave allocation out")
        if self.allocation == "global" and self.algorithm not in ("auto", "magnitude"):
            raise RecipeError('prune: allocation = "global" compares magnitudes; it goes with algorithm = "magnitude"')

    @property
    def shape(self) -> Pattern:
        """The pattern."""
        return Pattern.parse(self.pattern)

    @property
    def share(self) -> float:
        """The share of zeros."""
        own = self.shape.sparsity
        return float(self.sparsity if self.sparsity is not None else own or 0.0)

    @property
    def method(self) -> str | None:
        """The algorithm where it is settled without knowing whether there is calibration data."""
        return "magnitude" if self.allocation == "global" else None if self.algorithm == "auto" else self.algorithm

    @property
    def calibrated(self) -> bool:
        """Whether calibration data changes what is done."""
        return self.share > 0 and (self.method != "magnitude" or self.allocation in ("owl", "optimal"))


REMOVALS = ("heads", "channels", "layers", "experts")
"""What can be removed: groups of key/value heads with their query heads, channels between two layers, whole blocks of the residual
stream, experts of a mixture."""

IMPORTANCES = ("auto", "magnitude", "activation")
"""What is removed first: what has the smallest weights; what does least on calibration text; or, with "auto", what costs least there
once everything left has made up for it (without such text: the smallest weights)."""


@attrs.frozen(kw_only=True)
class RemoveRecipe:
    """What is removed from a model for good, which leaves a smaller dense one.

    what: one of `REMOVALS`. share or count: how much of it, of each layer that has some (of "layers": of the model). layers: a pattern
    of the names of weights; where one of those that lose something matches, it applies, the last entry that does. importance: one of
    `IMPORTANCES`. For heads and channels: refit (with calibration text, what reads them makes up for those that are gone) and
    multiple (of how many as many stay).
    """

    what: str = attrs.field(validator=_one_of(REMOVALS))
    share: float = attrs.field(default=0.0, validator=_below_one)
    count: int = attrs.field(default=0, validator=_between(0, 1 << 20))
    layers: str = attrs.field(default="*", validator=attrs.validators.instance_of(str))
    importance: str = attrs.field(default="auto", validator=_one_of(IMPORTANCES))
    refit: bool = attrs.field(default=True, validator=_is_bool)
    multiple: int = attrs.field(default=1, validator=_between(1, 1 << 20))

    def __attrs_post_init__(self) -> None:
        if bool(self.share) == bool(self.count):
            raise RecipeError(f"remove {self.what}: give share (above 0) or count (at least 1), one of them")
        if self.what in ("layers", "experts") and (self.multiple != 1 or not self.refit):
            raise RecipeError(f"remove {self.what}: multiple and refit are for heads and channels")

    @property
    def calibrated(self) -> bool:
        """Whether calibration text changes what is done."""
        return self.importance != "magnitude" or (self.refit and self.what in ("heads", "channels"))


def _positive(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RecipeError(f"{attribute.name} must be a number, 0 or above, not {value!r}")


@attrs.frozen(kw_only=True)
class RecoverRecipe:
    """How a compressed model is trained to give the outputs of the unchanged one again (distillation; masks and codes stay).

    blocks: steps of training for each block of the residual stream alone, before the whole, each on one part of the calibration data (8
    windows, or a call); 0 for none. steps: of training the whole, 0 for none; each on `batch` windows of calibration.length tokens (of
    a module that is no language model: on one call). learning_rate: of Adam, relative to the size of each parameter. minutes: ends the
    training of the whole early (0: never). seed: of the order of windows.
    """

    blocks: int = attrs.field(default=0, validator=_between(0, 1 << 20))
    steps: int = attrs.field(default=0, validator=_between(0, 1 << 20))
    batch: int = attrs.field(default=8, validator=_between(1, 1 << 16))
    learning_rate: float = attrs.field(default=0.003, validator=_positive)
    minutes: float = attrs.field(default=0.0, validator=_positive)
    seed: int = attrs.field(default=0, validator=_between(0, 1 << 31))


@attrs.frozen(kw_only=True)
class CalibrationRecipe:
    """How calibration text is used: `windows` pieces of `length` tokens, drawn by `seed` from all of it."""

    windows: int = attrs.field(default=128, validator=_between(1, 1 << 20))
    length: int = attrs.field(default=256, validator=_between(2, 1 << 20))
    seed: int = attrs.field(default=0, validator=_between(0, 1 << 31))


@attrs.frozen(kw_only=True)
class Recipe:
    """All that decides how a model is compiled, beside the target.

    fuse: run the fusion rules. pack: bring weights into their kernels' order. max_fold_bytes: the largest tensor that
    constant folding makes. prefill_chunk: tokens of a prompt that are read at a time. remove: what is taken out, one entry after the
    other. prune: which numbers become 0, of several entries the last that matches a layer. quantize: how weights are stored, the same
    way; a scheme's name alone means all layers.
    recover: training of what is left. rotate: one of
    `ROTATIONS`, done first. calibration: how its text is cut.
    """

    fuse: bool = attrs.field(default=True, validator=_is_bool)
    pack: bool = attrs.field(default=True, validator=_is_bool)
    max_fold_bytes: int = attrs.field(default=1 << 20, validator=_between(0, 1 << 30))
    prefill_chunk: int = attrs.field(default=512, validator=_between(1, 1 << 20))
    remove: tuple[RemoveRecipe, ...] = ()
    prune: tuple[PruneRecipe, ...] = ()
    quantize: tuple[QuantizeRecipe, ...] = ()
    recover: RecoverRecipe = attrs.field(factory=RecoverRecipe)
    rotate: str = attrs.field(default="none", validator=_one_of(ROTATIONS))
    calibration: CalibrationRecipe = attrs.field(factory=CalibrationRecipe)
    cache: CacheRecipe = attrs.field(factory=CacheRecipe)

    def __attrs_post_init__(self) -> None:
        if self.rotate != "none" and all(rule.scheme == "none" for rule in self.quantize):
            raise RecipeError("rotate is for models that are quantized; give quantize, too")
        if self.rotate != "none" and (self.recover.blocks or any(r.algorithm == "autoround" for r in self.quantize)):
            raise RecipeError(
                "rotate turns the residual stream, so that blocks can't be drawn to the unchanged model's; leave out rotate, or "
                'recover.blocks and algorithm = "autoround"'
            )

    @property
    def calibrated(self) -> bool:
        """Whether calibration data changes what is done."""
        return (
            self.recover.steps > 0
            or self.cache.calibrated
            or self.recover.blocks > 0
            or any(r.calibrated for entries in (self.remove, self.prune, self.quantize) for r in entries)
        )

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

        def written(entry: Any) -> list[str]:
            return [f"{k} = {_toml(v)}" for k, v in attrs.asdict(entry).items() if v is not None]

        for key, value in attrs.asdict(self, recurse=False).items():
            if isinstance(value, tuple):
                tables += ["\n".join([f"\n[[{key}]]", *written(v)]) for v in value]
            elif attrs.has(type(value)):
                tables.append("\n".join([f"\n[{key}]", *written(value)]))
            else:
                lines.append(f"{key} = {_toml(value)}")
        return "\n".join([*lines, *tables]) + "\n"


def _int4(activations: str) -> tuple[QuantizeRecipe, ...]:
    """Weights in 4 bits, those of the layer that gives the logits in 8."""
    return (
        QuantizeRecipe(scheme="int4", symmetric=False, activations=activations),
        QuantizeRecipe(layers="head", scheme="int8", activations=activations),
    )


PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "paged": Recipe(cache=CacheRecipe(page=16)),
    "reference": Recipe(fuse=False, pack=False),
    "int8": Recipe(quantize=(QuantizeRecipe(scheme="int8", activations="int8"),)),
    "int4": Recipe(quantize=_int4("int8")),
    "w8a16": Recipe(quantize=(QuantizeRecipe(scheme="int8"),)),
    "w4a16": Recipe(quantize=_int4("none")),
    "2:4": Recipe(prune=(PruneRecipe(pattern="2:4"),)),
    "2:4+int4": Recipe(prune=(PruneRecipe(pattern="2:4"),), quantize=_int4("none")),
    "fp8": Recipe(quantize=(QuantizeRecipe(scheme="fp8"),)),
}
"""Recipes by name: the default; a paged KV cache; everything without fusion and packing (to compare with); weights in
few bits with what layers read in 8, so that products are those of integers, or (w8a16, w4a16, fp8) with what they read as it is;
two of four weights."""


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _quantize_entries(value: Any, _: Any) -> tuple[QuantizeRecipe, ...]:
    """A scheme's name, one entry, or a list of entries; `bits` names an integer scheme."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    found = []
    for entry in entries:
        if isinstance(entry, QuantizeRecipe):
            found.append(entry)
            continue
        fields = {"scheme": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping):
            raise RecipeError(f"expected a scheme's name or a table, got {entry!r}")
        fields = dict(fields)
        if "bits" in fields:
            bits = fields.pop("bits")
            if isinstance(bits, bool) or bits not in _INTEGER_BITS:
                raise RecipeError(f"bits must be one of {', '.join(map(str, sorted(_INTEGER_BITS)))}, not {bits!r}")
            if "scheme" in fields:
                raise RecipeError("give scheme or bits, not both")
            fields["scheme"] = f"int{int(bits)}"
        found.append(_CONVERTER.structure(fields, QuantizeRecipe))
    return tuple(found)


def _prune_entries(value: Any, _: Any) -> tuple[PruneRecipe, ...]:
    """A share of zeros, a pattern, one entry, or a list of entries."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    found = []
    for entry in entries:
        if isinstance(entry, PruneRecipe):
            found.append(entry)
        elif isinstance(entry, Mapping):
            found.append(_CONVERTER.structure(dict(entry), PruneRecipe))
        elif isinstance(entry, str):
            found.append(PruneRecipe(pattern=entry))
        else:
            found.append(PruneRecipe(sparsity=entry))
    return tuple(found)


def _remove_entries(value: Any, _: Any) -> tuple[RemoveRecipe, ...]:
    """One entry, or a list of entries."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    found = []
    for entry in entries:
        if not isinstance(entry, (RemoveRecipe, Mapping)):
            raise RecipeError(f'expected a table such as {{what = "channels", share = 0.25}}, got {entry!r}')
        if isinstance(entry, Mapping) and "what" not in entry:
            raise RecipeError(f"what is missing; known: {', '.join(REMOVALS)}")
        found.append(entry if isinstance(entry, RemoveRecipe) else _CONVERTER.structure(dict(entry), RemoveRecipe))
    return tuple(found)


def _strictly(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if type(value) is not kind:
            raise RecipeError(f"expected {'true or false' if kind is bool else 'an integer'}, got {value!r}")
        return value

    return structure


def _text(value: Any, _: type) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"expected text, got {value!r}")
    return value


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
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(float, lambda value, _: value)  # the field's validator says what is wrong
    converter.register_structure_hook_func(lambda kind: kind == float | None, lambda value, _: value)
    converter.register_structure_hook_func(lambda kind: kind == tuple[QuantizeRecipe, ...], _quantize_entries)
    converter.register_structure_hook_func(lambda kind: kind == tuple[PruneRecipe, ...], _prune_entries)
    converter.register_structure_hook_func(lambda kind: kind == tuple[RemoveRecipe, ...], _remove_entries)
    return converter


_CONVERTER = _converter()
