"""Rotations (QuaRot; Ashkboos et al., 2024): channels mixed by Hadamard matrices, so that none stands out; the function stays.

A root mean square doesn't change when its channels are rotated. So the residual stream may carry x R for an orthogonal R: what writes to
it is multiplied by R, and what reads it, behind a norm, by R's inverse. Norms' gains, which don't commute with R, go into the
layers behind them first. Likewise each head's values may be rotated, and undone in the layer that reads attention's result. All of
it is folded into stored matrices: nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import ArrayStorage, Graph, Node, weight
from jisu.compiler.types import TensorType, same_shape
from jisu.passes.compression.layers import MATRICES
from jisu.passes.layout import is_stored


def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix int8 [n, n]: numbers ±1, rows orthogonal. By Sylvester's doubling and Paley's two constructions.

    Raises ValueError where these give none.
    """
    found = _hadamard(n)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return found


def _hadamard(n: int) -> np.ndarray | None:
    if n == 1:
        return np.ones((1, 1), np.int8)
    if n % 2 == 0 and (half := _hadamard(n // 2)) is not None:
        return np.block([[half, half], [half, -half]]).astype(np.int8)
    if n % 4 == 0 and (n - 1) % 4 == 3 and _is_prime(n - 1):
        border = np.block([[np.zeros((1, 1)), np.ones((1, n - 1))], [-np.ones((n - 1, 1)), _jacobsthal(n - 1)]])
        return (border + np.eye(n)).astype(np.int8)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        border = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _jacobsthal(q)]])
        off, on = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return (np.kron(border, off) + np.kron(np.eye(q + 1), on)).astype(np.int8)
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """1 at i, j where i - j is a square modulo the prime q, 0 on the diagonal, else -1."""
    character = np.full(q, -1)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    return character[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def rotation(n: int, seed: int) -> np.ndarray:
    """A randomised Hadamard matrix float32 [n, n]: orthogonal, rows of random sign. Raises RecipeError where there is none."""
    try:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
        return np.asarray(signs[:, None] * hadamard(n) / np.sqrt(n), np.float32)
    except ValueError as error:
        raise RecipeError(f"rotate: {error}") from None


@attrs.frozen(eq=False)
class Stream:
    """The residual stream: nodes that carry it, embeddings and layers that write to it, norms and layers that read it."""

    width: int
    nodes: frozenset[Node]
    norms: frozenset[Node]


def find_stream(graph: Graph) -> Stream:
    """The residual stream that begins at the embedding of tokens; raises RecipeError with the reason why it can't be rotated."""
    tables = [n for n in graph.nodes if n.op is ops.take and n.axis == 0 and n.rank == 3 and is_stored(n.parents[0])]
    if not tables:
        raise RecipeError("rotate: the model looks up no embedding, where a residual stream would begin")
    width = tables[0].shape[-1]
    found: dict[Node, None] = {}
    norms: set[Node] = set()
    work = [tables[0]]
    while work:
        node = work.pop()
        if node in found:
            continue
        found[node] = None
        if node in graph.outputs:
            _refuse(node, "is an output of the model")
        work += _sources(node)
        for user in graph.users[node]:
            if user.op is ops.rms_norm and user.operands[0] is node:
                norms.add(user)
                _check_readers(graph, user)
            elif user.op in MATRICES and node not in user.operands[1:3]:
                if user.operands[0] is node:
                    _check_matrices(user)
                if user.op is ops.linear and user.operands[3] is node:
                    work.append(user)
            elif user.op in (ops.add, ops.mul) and same_shape(user.shape, node.shape):
                work.append(user)  # where it comes from is looked at in its turn
            else:
                why = ": it subtracts the mean, which a rotation changes" if user.op is ops.layer_norm else ""
                _refuse(user, f"reads the residual stream{why}")
    assert isinstance(width, int)
    return Stream(width, frozenset(found), frozenset(norms))


def _sources(node: Node) -> list[Node]:
    """The operands of a node of the stream that belong to the stream; what else makes the node can be rotated."""
    if node.op is ops.take and is_stored(node.parents[0]):
        return []
    if node.op is ops.linear and node.activation == "none":
        _check_matrices(node)
        return [] if node.operands[3] is None else [node.operands[3]]
    if node.op is ops.add and all(same_shape(p.shape, node.shape) for p in node.parents):
        return list(node.parents)
    if node.op is ops.mul:
        whole = [p for p in node.parents if same_shape(p.shape, node.shape)]
        if len(whole) == 1 and all(p.tensor.size == 1 for p in node.parents if p is not whole[0]):
            return whole
    why = ": its gain scales channels, which a rotation mixes" if node.op in (ops.rms_norm, ops.layer_norm) else ""
    return _refuse(node, f"writes to the residual stream{why}")


def _refuse(node: Node, what: str) -> list[Node]:
    raise RecipeError(f"rotate: {node.op.name}{f' at {node.source}' if node.source else ''} {what}")


def _check_matrices(layer: Node) -> None:
    if not all(p is None or is_stored(p) for p in layer.operands[1:3]):
        _refuse(layer, "has a matrix or bias that isn't stored")


def _check_readers(graph: Graph, norm: Node) -> None:
    for user in graph.users[norm]:
        if user.op not in MATRICES or user.operands[0] is not norm or norm in user.operands[1:]:
            _refuse(user, "reads a norm of the residual stream")
        _check_matrices(user)
    if norm in graph.outputs:
        _refuse(norm, "is an output of the model")


def find_heads(graph: Graph) -> dict[Node, tuple[Node, int]]:
    """The layers that make values and those that read attention's results: (attention, +1 or -1), where both can be rotated."""
    found: dict[Node, tuple[Node, int]] = {}
    for node in graph.nodes:
        if node.op is not ops.attention:
            continue
        flat, uses = node.operands[2], graph.users[node]
        maker = flat.operands[0] if flat is not None and flat.op is ops.reshape else None
        if flat is None or maker is None or len(uses) != 1 or uses[0].op is not ops.reshape:
            continue
        readers = graph.users[uses[0]]
        fits = (
            maker.op is ops.linear
            and maker.activation == "none"
            and maker.operands[3] is None
            and graph.users[maker] == (flat,)
            and graph.users[flat] == (node,)
            and all(p is None or is_stored(p) for p in maker.operands[1:3])
            and maker.shape[-1] == flat.shape[-2] * flat.shape[-1]
            and uses[0].shape[-1] == node.shape[-2] * node.shape[-1]
            and all(r.op is ops.linear and r.operands[3] is not uses[0] and is_stored(r.parents[1]) for r in readers)
        )
        if fits and readers:
            found[maker] = (node, 1)
            found |= dict.fromkeys(readers, (node, -1))
    return found


def _turned(matrix: Node, by: Node) -> Node:
    """matrix [..., k] times a rotation of as many of its last channels as that has, and so on (head by head); rounded once."""
    wide = matrix if matrix.dtype == "float32" else ops.cast(matrix, dtype="float32")
    rows = ops.reshape(wide, shape=(matrix.tensor.size // by.shape[0], by.shape[0]))
    found = ops.reshape(ops.matmul(rows, by), shape=matrix.shape)
    return found if matrix.dtype == "float32" else ops.cast(found, dtype=matrix.dtype)


def _turned_rows(matrix: Node, by: Node) -> Node:
    """A matrix whose outputs are rotated."""
    return ops.transpose(_turned(ops.transpose(matrix, perm=(1, 0)), by), perm=(1, 0))


@attrs.frozen
class Rotate:
    """Rotate the residual stream and, where values and what reads them are plain layers, each head.

    An embedding tied to the head becomes a tensor of its own: the head takes the last norm's gain. Raises RecipeError where the stream
    can't be rotated.
    """

    seed: int = 0
    name: str = "rotate"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        stream, heads = find_stream(graph), find_heads(graph)
        weights = dict(graph.weights)

        def stored(label: str, n: int, seed: int) -> Node:
            if label not in weights:
                weights[label] = ArrayStorage(rotation(n, seed))
            return weight(label, TensorType((n, n), "float32"))

        whole = stored("rotation", stream.width, self.seed)
        turns = {
            layer: (stored(f"rotation of {node.shape[-1]}", int(node.shape[-1]), self.seed + 1), side)
            for layer, (node, side) in heads.items()
        }

        def transform(old: Node, new: Node) -> Node:
            if old in stream.norms:
                return ops.rms_norm.make((new.operands[0], None), {"eps": new.eps}, new.source)
            if old in stream.nodes and old.op is ops.take:
                return new.with_operands((_turned(new.parents[0], whole), *new.operands[1:]))
            return _rotated(old, new, stream, whole, turns) if old.op in MATRICES else new

        return attrs.evolve(graph.map(transform), weights=weights).replace()


def _rotated(old: Node, new: Node, stream: Stream, whole: Node, turns: Mapping[Node, tuple[Node, int]]) -> Node:
    """A layer with the rotations of what it reads and writes in its matrices."""
    operands = list(new.operands)
    read = old.operands[0]
    assert read is not None
    for position in MATRICES[old.op]:
        matrix = operands[position]
        assert matrix is not None
        if read in stream.norms:
            matrix = _gained(matrix, read)
        if read in stream.norms or read in stream.nodes:
            matrix = _turned(matrix, whole)
        if old in turns and turns[old][1] < 0:
            matrix = _turned(matrix, turns[old][0])
        operands[position] = matrix
    writes = [whole] if old in stream.nodes else [turns[old][0]] if old in turns and turns[old][1] > 0 else []
    for by in writes:
        matrix, bias = operands[1:3]
        assert matrix is not None
        operands[1:3] = [_turned_rows(matrix, by), None if bias is None else _turned(bias, by)]
    return new.op.make(operands, new.attributes, new.source)


def _gained(matrix: Node, norm: Node) -> Node:
    """A matrix with the gain of the norm in front of it in its columns."""
    gain = norm.operands[1]
    if gain is None:
        return matrix
    wide = [p if p.dtype == "float32" else ops.cast(p, dtype="float32") for p in (matrix, gain)]
    found = ops.mul(wide[0], ops.add(wide[1], norm.offset) if norm.offset else wide[1])
    return found if matrix.dtype == "float32" else ops.cast(found, dtype=matrix.dtype)
