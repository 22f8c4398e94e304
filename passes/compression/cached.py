"""The KV cache in few bits: keys and values are rounded to records of codes, each token and head by itself.

A pass puts `encode_rows` and `decode_rows` between attention and its keys and values; the derivation of the cache then keeps the records.
In front of the rounding it may change the basis of each head, which changes no score and no result. With rows as vectors

    k' = (k - m) A,   q' = q A⁻ᵀ     k' q'ᵀ = k qᵀ - m qᵀ, and the last term, the same for all keys, vanishes in the softmax
    v' = v A,         o = o' A⁻¹     folded into the layers in front of and behind attention where these are plain

"hadamard": A mixes channels, so that none stands out (QuaRot; Ashkboos et al., 2024). "calibrated": from the second moments K of k - m
and Q of what multiplies its error (the queries, weighted by how much their results depend on scores; for values the layer behind), seen
on calibration text. A step of the grid grows with tr(Aᵀ K A), and the error it makes counts tr(A⁻¹ Q A⁻ᵀ) times. The product is least
where both matrices are equal, A = (K⁻¹ # Q)^½ with the geometric mean #; then a rotation makes all channels alike. What is left of Q is
no multiple of the identity, so that errors in some directions cost more than in others: each number is rounded so that it takes back
errors of those before it, as GPTQ does for weights (Frantar et al., 2023), with Q in the place of the inputs' moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np

from jisu.compiler import ops, rows
from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import ArrayStorage, Graph, Node, weight
from jisu.compiler.types import TensorType, TypeRuleError, numpy_dtype
from jisu.passes.cache import NotCausal, prove_causal
from jisu.passes.compression.calibrate import Run, Samples, Values, stream
from jisu.passes.compression.gptq import damped
from jisu.passes.compression.rotate import find_heads, hadamard
from jisu.passes.layout import Derived

_SAMPLES = 256
"""Tokens on which roundings are compared."""

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are tried beside Q: without, a few directions that nothing read would take all errors."""


@attrs.frozen(eq=False)
class Basis:
    """The basis of the heads of one value.

    mean: float32 [g, 1, d], subtracted from keys; None for none. turn, back: float32 [g, d, d] (or [d, d] for all heads alike), A and A⁻ᵀ.
    feedback: of `encode_rows`.
    """

    turn: np.ndarray
    back: np.ndarray
    mean: np.ndarray | None = None
    feedback: np.ndarray | None = None


def balanced(moment: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A float64 [d, d] for K = `moment` and Q = `counts`, both positive definite: AᵀKA = A⁻¹QA⁻ᵀ but for order, its diagonal level."""
    root, inverse = _power(moment, 0.5), _power(moment, -0.5)
    half = _power(inverse @ _power(root @ counts @ root, 0.5) @ inverse, 0.5)
    _, axes = np.linalg.eigh(half @ moment @ half)
    return np.asarray(half @ axes @ _mixing(len(moment)))


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric matrix, its eigenvalues kept positive."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.maximum(values, values.max() * 1e-9) ** exponent @ vectors.T)


def _mixing(d: int) -> np.ndarray:
    """An orthogonal float64 [d, d] whose entries are of like size: Hadamard's, else Hartley's."""
    try:
        return np.asarray(hadamard(d) / np.sqrt(d))
    except ValueError:
        angles = 2 * np.pi / d * np.outer(np.arange(d), np.arange(d))
        return np.asarray((np.cos(angles) + np.sin(angles)) / np.sqrt(d))


def _feedback(counts: np.ndarray) -> np.ndarray:
    """float32 [d, d] for errors that count e Q eᵀ: with Q = U D Uᵀ, U upper and of diagonal 1, number i takes back U[j, i] of error j."""
    upper = np.linalg.cholesky(counts[::-1, ::-1])[::-1, ::-1]
    return np.triu(upper / np.diagonal(upper), 1).astype(np.float32)


@attrs.define(eq=False)
class Moments:
    """Sums over the tokens of calibration text for one value of `groups` heads of `width` channels."""

    groups: int
    width: int
    tokens: int = 0
    total: np.ndarray = attrs.field(init=False)
    square: np.ndarray = attrs.field(init=False)
    counts: np.ndarray = attrs.field(init=False)
    samples: list[np.ndarray] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.total = np.zeros((self.groups, 1, self.width))
        self.square, self.counts = (np.zeros((self.groups, self.width, self.width)) for _ in range(2))

    def see(self, values: Values) -> None:
        """Add keys or values [b, s, g, d]."""
        each = max(1, _SAMPLES // len(values))
        for value in values:
            flat = value.reshape(-1, self.groups, self.width).transpose(1, 0, 2).astype(np.float64)
            self.tokens += flat.shape[1]
            self.total += flat.sum(1, keepdims=True)
            self.square += flat.swapaxes(1, 2) @ flat
            self.samples.append(flat[:, :: max(1, flat.shape[1] // each)][:, :each])

    def count(self, queries: Sequence[np.ndarray]) -> None:
        """Add what multiplies errors: queries [b, s, h, d], heads of one group side by side."""
        for value in queries:
            apart = value.reshape(-1, self.groups, value.shape[2] // self.groups, self.width).astype(np.float64)
            flat = apart.transpose(1, 0, 2, 3).reshape(self.groups, -1, self.width)
            self.counts += flat.swapaxes(1, 2) @ flat

    def basis(self, scheme: str, centred: bool) -> Basis:
        """The basis in which records of the scheme lose least."""
        mean = self.total / self.tokens if centred else np.zeros_like(self.total)
        moment = self.square / self.tokens - mean.swapaxes(1, 2) @ mean
        seen = np.concatenate(self.samples, 1) - mean
        found = [self._head(scheme, moment[g], self.counts[g], seen[g]) for g in range(self.groups)]
        turn, back, feedback = (np.stack(parts).astype(np.float32) for parts in zip(*found, strict=True))
        return Basis(turn, back, mean.astype(np.float32) if centred else None, feedback)

    @staticmethod
    def _head(scheme: str, moment: np.ndarray, counts: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, ...]:
        counts = damped(counts, _DAMPING[0])
        turn = balanced(damped(moment, 1e-3), counts)
        back = np.linalg.inv(turn).T
        left = back.T @ counts @ back
        turned = (seen @ turn)[:, None]
        tried = [np.zeros_like(left, np.float32), *(_feedback(damped(left, share)) for share in (0.0, *_DAMPING[1:]))]

        def lost(feedback: np.ndarray) -> float:
            error = rows.decode(rows.encode(turned, scheme, feedback[None]), scheme)[:, 0] - turned[:, 0]
            return float(np.einsum("ni,ij,nj->", error, left, error))

        return turn, back, min(tried, key=lost)


@attrs.frozen
class QuantizeCache:
    """Keep keys and values of causal attention as records of a scheme of `jisu.compiler.rows`.

    transform: "none", "hadamard" or "calibrated", which needs samples. Raises RecipeError where there is no cache or
    a head's channels fill no bytes.
    """

    scheme: str
    transform: str = "none"
    samples: Samples | None = attrs.field(default=None, eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "quantize cache"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        attentions = self._attentions(graph)
        keys, values = (dict.fromkeys(n.parents[i] for n in attentions) for i in (1, 2))
        plain = _plain_heads(graph)
        makers = {node: layer for layer, (node, side) in plain.items() if side > 0}
        bases = self._bases(graph, attentions, plain)
        weights = dict(graph.weights)
        kept: dict[Node, Node] = {}

        def stored(label: str, array: np.ndarray, dtype: str) -> Node:
            weights[f"cache.{label}"] = ArrayStorage(array.astype(numpy_dtype(dtype)))
            return weight(f"cache.{label}", TensorType(array.shape, dtype))

        names = {
            node: f"{role}.{i}" for role, found in (("key", keys), ("value", values)) for i, node in enumerate(found)
        }
        folded = {n.parents[2] for n in attentions if n in makers}

        def matrix(node: Node, side: str, dtype: str) -> Node:
            return stored(f"{names[node]}.{side}", getattr(bases[node], side), dtype)

        def rounded(old: Node, new: Node) -> Node:
            if old not in kept:
                basis = bases.get(old)
                if basis is not None:
                    if basis.mean is not None:
                        new = ops.sub(new, stored(f"{names[old]}.mean", basis.mean[:, 0], new.dtype))
                    new = new if old in folded else _turned(new, matrix(old, "turn", new.dtype))
                feedback = None
                if basis is not None and basis.feedback is not None:
                    feedback = matrix(old, "feedback", "float32")
                records = ops.encode_rows(new, feedback, scheme=self.scheme)
                kept[old] = ops.decode_rows(records, scheme=self.scheme, dtype=new.dtype)
            return kept[old]

        def transform(old: Node, new: Node) -> Node:
            if old in plain and bases:
                node, side = plain[old]
                return _folded(new, matrix(node.parents[2], "turn" if side > 0 else "back", "float32"), side)
            if old not in attentions:
                return new
            q, k, v, *others = new.operands
            assert q is not None and k is not None and v is not None
            old_k, old_v = old.parents[1:3]
            if old_k in bases:
                q = _turned(q, matrix(old_k, "back", q.dtype))
            result = new.with_operands((q, rounded(old_k, k), rounded(old_v, v), *others))
            if old_v in bases and old_v not in folded:
                basis = bases[old_v]
                inverse = stored(
                    f"{names[old_v]}.inverse", np.ascontiguousarray(basis.back.swapaxes(-1, -2)), result.dtype
                )
                result = _turned(result, inverse)
            return result

        return attrs.evolve(graph.map(transform), weights=weights).replace()

    def _attentions(self, graph: Graph) -> dict[Node, None]:
        try:
            prove_causal(graph, str(graph.inputs[0].shape[1]))
        except NotCausal as reason:
            raise RecipeError(f"cache: the model gets no cache that could be quantized: {reason}") from None
        found = dict.fromkeys(n for n in graph.nodes if n.op is ops.attention)
        if not found:
            raise RecipeError("cache: the model has no attention whose keys and values could be quantized")
        for node in found:
            for p in node.parents[1:3]:
                try:
                    rows.record_bytes(self.scheme, int(p.shape[3]))
                except TypeRuleError as reason:
                    raise RecipeError(
                        f"cache: {self.scheme} doesn't suit heads of {p.shape[3]} channels: {reason}"
                    ) from None
        return found

    def _bases(
        self, graph: Graph, attentions: Mapping[Node, None], plain: Mapping[Node, tuple[Node, int]]
    ) -> dict[Node, Basis]:
        """The basis of each value that attention reads as keys or values."""
        read = dict.fromkeys(p for n in attentions for p in n.parents[1:3])
        if self.transform == "none":
            return {}
        if self.transform == "hadamard":
            mixing = {int(p.shape[3]): _mixing(int(p.shape[3])).astype(np.float32) for p in read}
            return {p: Basis(mixing[int(p.shape[3])], mixing[int(p.shape[3])]) for p in read}
        if self.samples is None:
            raise RecipeError(
                'cache: transform = "calibrated" needs calibration text; give calibration=…, or transform = "hadamard"'
            )
        moments = {p: Moments(int(p.shape[2]), int(p.shape[3])) for p in read}

        def visit(node: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
            q, k, v = node.parents[:3]
            for p in (k, v):
                if not moments[p].tokens:
                    moments[p].see(now[p])
            moments[k].count([a * _doubt(node, a, b) for a, b in zip(now[q], now[k], strict=True)])
            moments[v].count(_readers(graph, node, plain))
            return {}

        stream(graph, self.samples, set(attentions), visit, progress=self.progress)
        # A sink or a bound on scores tells scores that are all larger by one number from those that are not.
        fixed = {n.parents[1] for n in attentions if n.softcap or n.operands[4] is not None}
        centred = {n.parents[1] for n in attentions} - {n.parents[2] for n in attentions} - fixed
        return {p: m.basis(self.scheme, p in centred) for p, m in moments.items()}


def _doubt(attention: Node, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """(1 - Σ p²)^½ float32 [b, s, h, 1] of each query's weights p: what errors of scores do to them; none, where one key has it all."""
    s, repeat = q.shape[1], q.shape[2] // k.shape[2]
    scores = q.transpose(0, 2, 1, 3) @ np.repeat(k, repeat, 2).transpose(0, 2, 3, 1) * np.float32(attention.scale)
    if attention.softcap:
        scores = attention.softcap * np.tanh(scores / attention.softcap)
    i, j = np.arange(s)[:, None], np.arange(s)
    hidden = (j > i) | (j <= i - attention.window) if attention.window else j > i
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    doubt = np.sqrt(np.maximum(1 - np.square(weights).sum(-1, keepdims=True), 0))
    return np.asarray(doubt.transpose(0, 2, 1, 3), np.float32)


def _plain_heads(graph: Graph) -> dict[Node, tuple[Node, int]]:
    """`find_heads` without those whose layers have codes or masks, which turning would undo."""
    found = find_heads(graph)
    fixed = {
        node for layer, (node, _) in found.items() if Graph((), layer.parents[1:2]).count(ops.dequantize, ops.expand)
    }
    return {layer: (node, side) for layer, (node, side) in found.items() if node not in fixed}


def _readers(graph: Graph, attention: Node, plain: Mapping[Node, tuple[Node, int]]) -> Sequence[np.ndarray]:
    """What multiplies the errors of attention's results, as if it were queries: the rows of the layers behind, where these are plain."""
    layers = [layer for layer, (node, side) in plain.items() if node is attention and side < 0]
    if not layers:
        return [
            np.broadcast_to(
                np.eye(attention.shape[3]), (1, attention.shape[2], attention.shape[3], attention.shape[3])
            ).swapaxes(1, 2)
        ]
    return [
        Derived(p, graph.weights).wide().reshape(1, -1, *attention.shape[2:])
        for layer in layers
        for p in layer.parents[1:2]
    ]


def _turned(x: Node, by: Node) -> Node:
    """x [..., h, d] times by [d, d], or by [g, d, d], each for h / g heads side by side."""
    if by.rank == 2:
        return ops.matmul(x, by)
    *outer, heads, width = x.shape
    groups = by.shape[0]
    apart = ops.reshape(x, shape=(*outer, groups, heads // groups, width))
    return ops.reshape(ops.matmul(apart, by), shape=x.shape)


def _folded(new: Node, by: Node, side: int) -> Node:
    """A layer in front of attention (side +1) whose outputs are turned, or behind it (-1) whose inputs are turned back."""
    x, matrix, bias, *others = new.operands
    assert matrix is not None

    def turned(stored: Node) -> Node:
        wide = stored if stored.dtype == "float32" else ops.cast(stored, dtype="float32")
        *outer, size = stored.shape
        width = by.shape[-1]
        found = ops.reshape(_turned(ops.reshape(wide, shape=(*outer, size // width, width)), by), shape=stored.shape)
        return found if stored.dtype == "float32" else ops.cast(found, dtype=stored.dtype)

    if side < 0:
        return new.with_operands((x, turned(matrix), bias, *others))
    rotated = ops.transpose(turned(ops.transpose(matrix, perm=(1, 0))), perm=(1, 0))
    return new.with_operands((x, rotated, None if bias is None else turned(bias), *others))


__all__ = ["Basis", "Moments", "QuantizeCache", "balanced"]
