"""Several models of one architecture become one, tensor by tensor: weighted means, SLERP, TIES.

A merged tensor is a storage like any other: it is computed when it is read, a block at a time, from members that stay where
they are. So a merged model is the members' graph over such storages, and nothing else in the compiler knows of merging.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from jisu.compiler.errors import InputError
from jisu.compiler.graph import Graph, Storage
from jisu.compiler.types import FLOATS, numpy_dtype

METHODS = ("linear", "slerp", "ties")
"""How tensors are merged; see `Merge`."""

_BLOCK = 1 << 20  # elements that are computed at a time
_PARALLEL = 0.9995  # cosine above which an arc and its chord are the same to rounding
_FLOATS = frozenset(numpy_dtype(name) for name in FLOATS)

Array = npt.NDArray[Any]
Combine = Callable[[Sequence[Array], Array], Array]
"""The merged values of one block, from the members' and the base's, all float64."""


@attrs.frozen(kw_only=True)
class Merge:
    """How the tensors x_i of several members become one; the weights w_i add up to 1.

    linear: the weighted mean ∑ w_i x_i (model soups; Wortsman et al., 2022). slerp: the point that divides the arc from x_1 to x_2
    as w_1 and w_2 say (Shoemake, 1985), each tensor taken as one vector; where both point almost in one direction, or in
    opposite ones, the weighted mean. ties: of the differences x_i - base only the `density` share that is largest in each
    tensor stays, each element takes the sign of the weighted sum, and base + `scale` times the weighted mean of those that have that
    sign is the result (TIES; Yadav et al., 2023, which trims over the whole model at once).
    """

    method: str
    weights: tuple[float, ...]
    density: float = 0.2
    scale: float = 1.0

    @classmethod
    def resolve(
        cls,
        method: str,
        members: int,
        weights: Sequence[float] | None = None,
        *,
        base: bool,
        density: float | None = None,
        scale: float | None = None,
    ) -> Merge:
        """The checked options for so many members. Raises InputError for what the method doesn't take or needs."""
        if method not in METHODS:
            near = difflib.get_close_matches(str(method), METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown method {method!r}{hint} (known: {', '.join(METHODS)})")
        if members < 2 or (method == "slerp" and members != 2):
            count = "exactly two" if method == "slerp" else "at least two"
            raise InputError(f"{method} merges {count} models, got {members}")
        ties = method == "ties"
        if ties and not base:
            raise InputError("ties needs base, the model that the members were trained from")
        for name, given in (("base", base), ("density", density is not None), ("scale", scale is not None)):
            if given and not ties:
                raise InputError(f'{name} is for method "ties"; {method} has none')
        for name, value, high in (("density", density, 1.0), ("scale", scale, math.inf)):
            if value is not None and not (_number(value) and 0 < value <= high):
                raise InputError(
                    f"{name} must be a number above 0{' and at most 1' if high == 1 else ''}, not {value!r}"
                )
        extra = {k: float(v) for k, v in (("density", density), ("scale", scale)) if v is not None}
        return cls(method=method, weights=shares(weights, members), **extra)


def shares(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Weights, one per member, divided by their sum; None: all alike. Raises InputError for others."""
    if weights is None:
        return (1 / members,) * members
    given = tuple(weights)
    if len(given) != members:
        raise InputError(f"weights: expected one per model, {members}, got {len(given)}")
    if not all(_number(w) and w >= 0 for w in given) or not sum(given):
        raise InputError(f"weights must be numbers of at least 0, and not all 0; got {list(given)}")
    total = sum(given)
    return tuple(w / total for w in given)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- The mathematics -----------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Merged:
    """A tensor made of the members' tensors of one shape and float dtype, computed at each read.

    Reading holds the result and, for TIES, 4 bytes per element more; members are read a block at a time.
    """

    how: Merge
    members: tuple[Storage, ...]
    base: Storage | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.members[0].shape)

    @property
    def dtype(self) -> Any:
        return self.members[0].dtype

    def numpy(self) -> Array:
        """The merged values, computed now in float64 and rounded once."""
        vectors = [storage.numpy().reshape(-1) for storage in self.members]
        base = vectors[0] if self.base is None else self.base.numpy().reshape(-1)
        combine = _COMBINERS[self.how.method](self.how, vectors, base)
        result = np.empty(vectors[0].size, self.dtype)
        for block in _blocks(result.size):
            result[block] = combine([_wide(v, block) for v in vectors], _wide(base, block))
        return result.reshape(self.shape)

    def release(self) -> None:
        """Let go of the pages of memory-mapped members that reading touched."""
        for storage in (*self.members, *([self.base] if self.base is not None else [])):
            release = getattr(storage, "release", None)
            if release is not None:
                release()


def _blocks(size: int) -> Iterator[slice]:
    return (slice(i, min(i + _BLOCK, size)) for i in range(0, size, _BLOCK))


def _wide(vector: Array, block: slice) -> Array:
    return vector[block].astype(np.float64)


def _linear(how: Merge, vectors: Sequence[Array], base: Array) -> Combine:
    def combine(xs: Sequence[Array], _: Array) -> Array:
        # From the first one on, so that equal members give themselves, to the bit.
        return xs[0] + sum(w * (x - xs[0]) for w, x in zip(how.weights[1:], xs[1:], strict=True))

    return combine


def _slerp(how: Merge, vectors: Sequence[Array], base: Array) -> Combine:
    aa = ab = bb = 0.0
    for block in _blocks(vectors[0].size):
        a, b = (_wide(v, block) for v in vectors)
        aa, ab, bb = aa + float(a @ a), ab + float(a @ b), bb + float(b @ b)
    cosine = ab / math.sqrt(aa * bb) if aa and bb else 1.0
    if not abs(cosine) <= _PARALLEL:
        return _linear(how, vectors, base)
    angle = math.acos(cosine)
    first, second = (math.sin(w * angle) / math.sin(angle) for w in how.weights)
    return lambda xs, _: first * xs[0] + second * xs[1]


def _ties(how: Merge, vectors: Sequence[Array], base: Array) -> Combine:
    kept = max(1, round(how.density * base.size))
    limits = [_largest(vector, base, kept) for vector in vectors]

    def combine(xs: Sequence[Array], origin: Array) -> Array:
        deltas = [x - origin for x in xs]
        deltas = [np.where(_magnitude(d) >= limit, d, 0) for d, limit in zip(deltas, limits, strict=True)]
        elected = np.sign(sum(w * d for w, d in zip(how.weights, deltas, strict=True)))
        agree = [w * ((np.sign(d) == elected) & (elected != 0)) for w, d in zip(how.weights, deltas, strict=True)]
        total = np.asarray(sum(agree))
        mean = sum(a * d for a, d in zip(agree, deltas, strict=True)) / np.where(total, total, 1)
        return origin + how.scale * mean

    return combine


def _largest(vector: Array, base: Array, kept: int) -> float:
    """The magnitude from which on `kept` differences from the base are as large."""
    if not vector.size:
        return 0.0
    sizes = np.empty(vector.size, np.float32)
    for block in _blocks(vector.size):
        sizes[block] = _magnitude(_wide(vector, block) - _wide(base, block))
    sizes.partition(sizes.size - kept)
    return float(sizes[sizes.size - kept])


def _magnitude(delta: Array) -> Array:
    return np.abs(delta).astype(np.float32)


_COMBINERS: Mapping[str, Callable[[Merge, Sequence[Array], Array], Combine]] = {
    "linear": _linear,
    "slerp": _slerp,
    "ties": _ties,
}


# --- Models --------------------------------------------------------------------------------------------------------


def merge_tensors(
    how: Merge,
    members: Sequence[Mapping[str, Storage]],
    base: Mapping[str, Storage] | None,
    names: Sequence[str],
    fixed: frozenset[str] = frozenset(),
) -> dict[str, Storage]:
    """The merged tensors by name, in the first member's order.

    names: what the members are called in errors, the base last. fixed: tensors that are no parameters; they and
    those that aren't of a float dtype must be the same in all members. Raises InputError, naming tensors and members, where names,
    shapes or dtypes differ, all of it at once, and where such a fixed tensor does.
    """
    everyone = [*members, *([base] if base is not None else [])]
    first = members[0]
    complaints = [
        complaint
        for name, tensors in zip(names[1:], everyone[1:], strict=True)
        for complaint in _differences(first, tensors, names[0], name)
    ]
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise InputError(f"the models differ, so they can't be merged: {'; '.join(complaints[:8])}{more}")
    merged: dict[str, Storage] = {}
    for key, storage in first.items():
        if key in fixed or np.dtype(storage.dtype) not in _FLOATS:
            _check_equal(key, [tensors[key] for tensors in everyone], names)
            merged[key] = storage
        else:
            origin = base[key] if base is not None else None
            merged[key] = Merged(how, tuple(tensors[key] for tensors in members), origin)
    return merged


def _differences(
    first: Mapping[str, Storage], other: Mapping[str, Storage], name: str, other_name: str
) -> Iterator[str]:
    for key in [*first, *(k for k in other if k not in first)]:
        mine, theirs = (_described(tensors.get(key)) for tensors in (first, other))
        if mine != theirs:
            yield f"{key} is {mine} in {name} and {theirs} in {other_name}"


def _described(storage: Storage | None) -> str:
    if storage is None:
        return "missing"
    return f"{np.dtype(storage.dtype)}{list(storage.shape)}"


def _check_equal(key: str, storages: Sequence[Storage], names: Sequence[str]) -> None:
    want = np.ascontiguousarray(storages[0].numpy()).tobytes()
    for name, storage in zip(names[1:], storages[1:], strict=True):
        if np.ascontiguousarray(storage.numpy()).tobytes() != want:
            raise InputError(
                f"{key} ({_described(storage)}) differs between {names[0]} and {name}, and it is no parameter that has a mean; "
                "merge first, and compress what comes out of it"
            )


def check_same_graph(graphs: Sequence[Graph], names: Sequence[str]) -> None:
    """Raise InputError, with the first op that differs, unless all graphs compute the same."""
    first = str(graphs[0]).splitlines()
    for name, graph in zip(names[1:], graphs[1:], strict=True):
        lines = str(graph).splitlines()
        if lines != first:
            i = next((i for i, pair in enumerate(zip(first, lines, strict=False)) if len(set(pair)) > 1), 0)
            raise InputError(
                f"{names[0]} and {name} compute differently, so they can't be merged: {first[i]!r} and {lines[i]!r}{_place(graph, i)}"
            )


def _place(graph: Graph, line: int) -> str:
    """Where in the user's model a line of the text form comes from: its node, or what uses it."""
    node = graph.nodes[line - 1] if 0 < line <= len(graph.nodes) else None
    around = (node, *graph.users[node]) if node is not None else ()
    return next((f" at {n.source}" for n in around if n is not None and n.source), "")


def check_same_tokens(files: Sequence[Mapping[str, bytes]], names: Sequence[str]) -> None:
    """Raise InputError, with a token, where tokenizers of models give one text different ids."""
    found = [(n, _vocabulary(f["tokenizer.json"])) for n, f in zip(names, files, strict=True) if "tokenizer.json" in f]
    for name, vocabulary in found[1:]:
        first_name, first = found[0]
        if vocabulary != first:
            token = next(t for t in [*first, *vocabulary] if first.get(t) != vocabulary.get(t))
            ids = " and ".join("none" if v.get(token) is None else str(v[token]) for v in (first, vocabulary))
            raise InputError(f"{first_name} and {name} have different vocabularies: {token!r} has the ids {ids}")


def _vocabulary(raw: bytes) -> dict[str, int]:
    """Ids by token of a tokenizer.json, added tokens included; empty for one that lists none."""
    parsed = json.loads(raw)
    vocabulary = parsed.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{t["content"]: t["id"] for t in parsed.get("added_tokens", ())}}
