"""Which nodes become one kernel written for GPUs: what stands between projections and attention, what is made of results (norms, levels), and layers of
one input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import attrs
import sympy

from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Graph, Node
from jisu.compiler.launches import FAULT
from jisu.compiler.types import Dim, dim, fixed, product, same_dim, same_shape
from jisu.targets.cpu.generic.nn import BEYOND, NEGATIVE, NO_PAGE
from jisu.targets.cuda.builder import Fault
from jisu.targets.cuda.choose import CHOOSERS, TAILED, cut_of, encoding_of, norm_of, tail_alone
from jisu.targets.cuda.choose_layers import Then, together
from jisu.targets.cuda.kernels.heads import WARPS, Chain, Heads, prepared
from jisu.targets.cuda.kernels.tails import Tail
from jisu.targets.cuda.lowering import DeviceCall, DeviceFunction
from jisu.targets.fusion import Region
from jisu.targets.steps import Argument, Joiner, Joint, Kernel
from jisu.targets.target import Target

_NEGATIVE, _BEYOND, _OUTSIDE = Fault("ValueError", NEGATIVE), Fault("ValueError", BEYOND), Fault("IndexError", NO_PAGE)


@attrs.frozen
class _Found:
    """A chain in a graph: its nodes from the last to the first, what it reads in the order of `Chain.pointers` but for where it writes, and
    how many rows of angles there are."""

    chain: Chain
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    angles: Dim


def _chain(last: Node, graph: Graph) -> _Found | None:
    """The longest chain that ends with `last`; None where it is none, or `last` is already a chain's input."""
    nodes: list[Node] = []
    here = last

    def taken(*kinds: object) -> Node | None:
        """`here`, if it is of these ops and, but for `last`, nobody else wants it; then `here` is what it reads."""
        nonlocal here
        node = here
        alone = node is last or (len(graph.users[node]) == 1 and node not in graph.outputs)
        if node.op not in kinds or not alone:
            return None
        nodes.append(node)
        here = node.parents[1 if node.op is ops.cache_append else 0]
        return node

    append = taken(ops.cache_append)
    if append is not None and append.ring and append.operands[3] is not None:
        return None  # pages in a ring have no kernel
    encoded = taken(ops.encode_rows) if append is not None and len(here.parents) == 1 else None
    turned = taken(ops.rotary)
    norm, how = None, None
    if here.op in (ops.rms_norm, ops.layer_norm):
        how = norm_of(here)
        norm = taken(ops.rms_norm, ops.layer_norm) if how is not None else None
    x = here
    if not nodes or x.op is ops.cache_append or x.rank != 4 or not isinstance(x.shape[2], int):
        return None
    cache = ""
    if append is not None:
        cache = "paged" if append.operands[3] is not None else "ring" if append.ring else "contiguous"
    angles = turned.parents[1:] if turned is not None else ()
    chain = Chain(
        x.shape[2], how if norm is not None else None, fixed(angles[0].shape[2]) if angles else 0,
        bool(turned is not None and turned.interleaved), encoded.scheme if encoded is not None else "none", cache,
    )  # fmt: skip
    leaves = (x, *(norm.parents[1:] if norm is not None else ()), *angles)
    return _Found(chain, tuple(nodes), leaves, product(angles[0].shape[:2]) if angles else 0)


def heads_of_attention(graph: Graph, target: Target) -> Iterator[Joint]:
    """Per attention over a cache: norms, rotary embeddings and records of its queries, keys and values, and their appending."""
    done: set[Node] = set()
    for attention in (n for n in graph.nodes if n.op is ops.attention_cached):
        lasts = [n for n in dict.fromkeys(attention.parents[:3]) if n not in done]
        found = [f for f in (_chain(n, graph) for n in lasts) if f is not None]
        found = [f for f in found if _alike(f, found[-1])]
        joint = _joint(found, target) if found else None
        if joint is not None:
            done.update(n for f in found for n in f.nodes)
            yield joint


def layers_of_one_input(graph: Graph, target: Target) -> Iterator[Joint]:
    """Layers of codes that read one tensor and differ in their outputs alone."""
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if (
            node.op is ops.quantized_linear
            and not node.gated
            and node.activation == "none"
            and node.operands[5] is None
        ):
            x, _, scales, zeros, bias, _ = node.operands
            assert scales is not None
            alike = (x, node.scheme, node.group, node.dtype, scales.dtype, zeros is None, bias is None)
            groups.setdefault(alike, []).append(node)
    for nodes in groups.values():
        with contextlib.suppress(TargetError):
            kernel = together(nodes, target) if len(nodes) > 1 else None
            if kernel is not None:
                kinds = zip(*(node.operands[1:] for node in nodes), strict=True)
                yield _of_operands(nodes, [nodes[0].operands[0], *(o for kind in kinds for o in kind)], kernel)


def _of_operands(nodes: Sequence[Node], operands: Sequence[Node | None], kernel: Kernel) -> Joint:
    """A joint whose kernel takes these operands, as far as they are there."""
    read = [n for n in operands if n is not None]
    leaves = tuple(dict.fromkeys(read))
    given = tuple(Argument(leaves.index(n)) for n in read)
    return Joint(Region(tuple(nodes), leaves), Kernel(kernel.function, given))


def tails_of_results(graph: Graph, target: Target) -> Iterator[Joint]:
    """Layers and attention with what is made of their results: norms, levels, levels of norms; and norms with their levels."""
    done: set[Node] = set()
    for node in sorted(graph.nodes, key=lambda n: n.op is not ops.encode_levels):  # the longest tails first
        found = _tail(node, graph)
        if found is None or done & set(found[1]):
            continue
        tail, nodes = found
        x = source = nodes[0].parents[0]
        cut = None
        # What is computed element by element is better computed for those rows alone.
        if x.op is ops.slice_ and x.parents[0].op in CHOOSERS and _only_for(nodes[0], x, graph):
            cut = cut_of(x)
            x = source = x if cut is None else x.parents[0]
        if source.op is ops.reshape and _only_for(nodes[0], x, graph):
            source = source.parents[0]
        then = Then(tail, product(nodes[0].shape[:-1]), cut)
        own = [operand for n in nodes for operand in n.operands[1:] if operand is not None]
        with contextlib.suppress(TargetError):
            kernel = None
            # Attention's rows are other ones than its tail's, which a cut counts.
            if (
                source.op in TAILED
                and (source is x or (source.op is ops.attention_cached and cut is None))
                and source not in done
            ):
                kernel = TAILED[source.op](source, target, then)
            if kernel is not None:
                read = [source.operands[argument.operand] for argument in kernel.arguments]
                joint = _of_operands((source, *nodes), [*read, *own], kernel)
                done |= {source, *nodes}
                yield joint
            elif len(nodes) > 1 or cut is not None:
                kernel = tail_alone(then, target)
                joint = _of_operands(nodes, [x, *own], kernel)
                done |= set(nodes)
                yield joint


def _only_for(user: Node, node: Node, graph: Graph) -> bool:
    """Whether nobody else wants a node."""
    return graph.users[node] == (user,) and node not in graph.outputs


def _tail(node: Node, graph: Graph) -> tuple[Tail, tuple[Node, ...]] | None:
    """The tail that ends with a node, and its nodes."""
    encoding = encoding_of(node) if node.op is ops.encode_levels else None
    last = node.parents[0] if encoding is not None else node
    how = norm_of(last) if last.op in (ops.rms_norm, ops.layer_norm) else None
    if how is None and encoding is None:
        return None
    return Tail(how, encoding), (*([last] if how is not None else []), *([node] if encoding is not None else []))


def _alike(one: _Found, other: _Found) -> bool:
    """Whether two chains are of the same tokens, and of heads of one size."""
    a, b = one.leaves[0], other.leaves[0]
    return a.dtype == b.dtype and same_shape(a.shape[:2], b.shape[:2]) and same_dim(a.shape[3], b.shape[3])


def _joint(found: list[_Found], target: Target) -> Joint | None:
    """The chains as one kernel; None where there is none for them."""
    appends = [f.nodes[0] for f in found if f.chain.cache]
    first, x = (appends[0] if appends else None), found[0].leaves[0]
    width = x.shape[3]
    if not isinstance(width, int) or any(
        a.operands[2:] != first.operands[2:] or not same_shape(a.shape[:3], first.shape[:3]) or a.ring != first.ring
        for a in appends
        if first is not None
    ):
        return None
    table = None if first is None else first.operands[3]
    page = fixed(first.shape[2]) if first is not None and table is not None else 0
    how = Heads(tuple(f.chain for f in found), width, x.dtype, page)
    try:
        kernel = prepared(how, target)
    except TargetError:
        return None
    results = [f.nodes[0] for f in found]
    caches = {f.nodes[0]: f.nodes[0].parents[0] for f in found if f.chain.cache}
    shared = [] if first is None else [n for n in first.operands[2:] if n is not None]
    leaves = list(dict.fromkeys([*(leaf for f in found for leaf in f.leaves), *shared, *caches.values()]))
    # Behind what is read stand the results, but for caches, which are written where they are.
    numbers = {n: i for i, n in enumerate([*leaves, *(n for n in results if n not in caches)])}
    arguments: list[int | Fault | tuple[str, Dim]] = []
    for f, result in zip(found, results, strict=True):
        arguments += [numbers[leaf] for leaf in f.leaves] + [numbers[caches.get(result, result)]]
    tokens = product(x.shape[:2])
    sizes: list[Dim] = [tokens, x.shape[1], *(f.angles for f in found if f.chain.turned)]
    if first is not None:
        arguments += [numbers[n] for n in shared] + [(FAULT, 0)]
        sizes += [first.shape[2]] if table is None else [table.shape[1], first.shape[0]]
    arguments += [("size", size) for size in sizes]
    if first is not None:
        arguments += [_NEGATIVE, _BEYOND, *([_OUTSIDE] if table is not None else [])]
    blocks = dim(sympy.ceiling(sympy.sympify(tokens * how.count) / WARPS))
    call = DeviceCall(kernel, (blocks, 1, 1), tuple(arguments))
    function = DeviceFunction((((), (call,)),))
    return Joint(
        Region(tuple(results), tuple(leaves)), Kernel(function, tuple(Argument(i) for i in range(len(leaves))))
    )


JOINERS: tuple[Joiner, ...] = (heads_of_attention, tails_of_results, layers_of_one_input)
"""See `jisu.targets.cuda.lowering.lower`."""
