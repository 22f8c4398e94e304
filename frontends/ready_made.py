"""Checkpoints that were quantised by others: their codes, scales and zeros as the operands of `dequantize`, bit for bit.

A format says which of a checkpoint's tensors belong to a matrix of codes, and writes how that matrix is made of them as ordinary
nodes: what moves bits and elements into our order is computed when a weight is packed, and no float copy of a matrix ever exists.
The formats' own definitions:

- GPTQ, as AutoGPTQ and GPTQModel write it: codes [k, n] packed along k, zeros [groups, n] along n. The file format "gptq" holds
  zeros less one, "gptq_v2" as they are. `g_idx` says to which group an input belongs.
- AWQ, as AutoAWQ's "gemm" writes it: codes [k, n] and zeros [groups, n], both packed along n, eight to a word, in an interleaved
  order.
- compressed-tensors: codes [n, k] packed along k, or a matrix of int8 or e4m3; numbers are signed. A matrix of these or of floats may
  be sparse ("sparse-24-bitmask", "sparse-bitmask"): what is kept, row by row, and a bit per number of the matrix.
- FP8 as DeepSeek and Qwen publish it: a matrix of e4m3, scales per block of outputs and inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops, schemes
from jisu.compiler.errors import ArtifactError, UnsupportedError
from jisu.compiler.graph import ArrayStorage, Node, Storage, constant, weight
from jisu.compiler.storage import LazyTensor
from jisu.compiler.types import TensorType, dtype_name

PREFIX = "checkpoint."
"""In front of the names of stored tensors that are no parameter by themselves."""

_FLOATS = ("float16", "bfloat16", "float32")
_SPARSE = frozenset({"bitmask", "compressed", "shape", "row_offsets"})  # tensors of a sparse matrix
_TABLE = "e4m3"  # the name of the stored values of e4m3's codes
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the codes of eight consecutive outputs are


def as_codes(tensor: LazyTensor) -> LazyTensor:
    """A tensor as the IR knows it: it has no floats of 8 bits, they are codes, uint8."""
    small = tensor.dtype.itemsize == 1 and tensor.dtype.kind not in "biu"
    return attrs.evolve(tensor, dtype=np.dtype(np.uint8)) if small else tensor


def reference(tensor: LazyTensor) -> Node:
    """A stored tensor as a node."""
    found = as_codes(tensor)
    return weight(PREFIX + found.name, TensorType(found.shape, dtype_name(found.dtype)))


@attrs.frozen
class Coded:
    """A matrix that a checkpoint holds as codes, or sparse: the module's name there, and its tensors by the last part of their names."""

    module: str
    parts: Mapping[str, LazyTensor]


@attrs.frozen
class Place:
    """Where a matrix [n, k] belongs: names of its module (the checkpoint's, the model's), the module's class, the model's dtype."""

    names: tuple[str, ...]
    kind: str
    n: int
    k: int
    dtype: str


@attrs.frozen
class Matrix:
    """value: `dequantize` or `expand` [n, k]. order: int64 [k], which of the model's inputs each of its columns multiplies; None: in order."""

    value: Node
    order: Node | None = None


@attrs.frozen(eq=False)
class Format:
    """A kind of ready-made checkpoint.

    label: names it in errors. marks: tensors that only matrices of codes have; parts: all tensors of such a matrix. read: makes the
    matrix. notes: what the configuration asks for beside quantised weights, in sentences.
    """

    label: str
    marks: frozenset[str]
    parts: frozenset[str]
    read: Callable[[Coded, Place], Matrix]
    notes: tuple[str, ...] = ()

    def split(self, tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, Coded]]:
        """A checkpoint's plain tensors, and its matrices of codes by the names that their weights would have.

        Layers of one input have equal orders; these become one tensor, so that the input is brought into that order once.
        """
        marked = {m for m, last in map(_parted, tensors) if last in self.marks}
        plain: dict[str, LazyTensor] = {}
        parts: dict[str, dict[str, LazyTensor]] = {}
        orders: dict[tuple[str, bytes], LazyTensor] = {}
        for name, tensor in tensors.items():
            module, last = _parted(name)
            if module in marked and last in self.parts:
                if last.endswith("g_idx"):
                    tensor = orders.setdefault((tensor.dtype.str, tensor.numpy().tobytes()), tensor)
                parts.setdefault(module, {})[last] = tensor
            else:
                plain[name] = tensor
        return plain, {f"{module}.weight": Coded(module, found) for module, found in parts.items()}


def _parted(name: str) -> tuple[str, str]:
    """A stored tensor's module, and what it is of it; sparse matrices may name their parts behind the parameter."""
    module, _, last = name.rpartition(".")
    return (module.removesuffix(".weight") if last in _SPARSE else module), last


def tables() -> dict[str, Storage]:
    """Stored tensors that formats use and no checkpoint holds."""
    return {_TABLE: ArrayStorage(schemes.scheme("fp8").levels)}


def find_format(fields: Mapping[str, Any]) -> Format:
    """The format that a configuration's `quantization_config` declares; raises UnsupportedError for one that isn't read."""
    method = str(fields.get("quant_method", "of an unnamed method"))
    known: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
    }
    if method not in known:
        raise UnsupportedError(
            f"the checkpoint is quantised ({method}), which jisu doesn't read; give the original and a recipe such as "
            f'"int4", or a checkpoint quantised as {", ".join(known)}'
        )
    return known[method](fields)


# --- Parts ---------------------------------------------------------------------------------------------------------------


def _part(coded: Coded, name: str, shape: tuple[int, ...], *dtypes: str) -> LazyTensor:
    """One of a matrix's tensors, of this shape and one of these dtypes."""
    tensor = coded.parts.get(name)
    if tensor is None:
        raise ArtifactError(f"{coded.module}.{name} is missing ({' or '.join(dtypes)}{list(shape)})")
    if tensor.shape != shape or str(tensor.dtype) not in dtypes:
        raise ArtifactError(
            f"{coded.module}.{name} is {tensor.dtype}{list(tensor.shape)}, expected {' or '.join(dtypes)}{list(shape)}"
        )
    return tensor


def _words(coded: Coded, name: str, shape: tuple[int, ...]) -> Node:
    return reference(_part(coded, name, shape, "int32"))


def _scale(coded: Coded, name: str, shape: tuple[int, ...]) -> Node:
    """A float tensor as `dequantize` reads scales: float16 or float32."""
    return _widened(reference(_part(coded, name, shape, *_FLOATS)))


def _widened(node: Node) -> Node:
    return ops.cast(node, dtype="float32") if node.dtype == "bfloat16" else node


def _columns(node: Node, count: int) -> Node:
    """The first `count` columns of a matrix."""
    if node.shape[1] == count:
        return node
    return ops.slice_(node, starts=(0, 0), stops=(node.shape[0], count), steps=(1, 1))


def _turned(node: Node) -> Node:
    return ops.transpose(node, perm=(1, 0))


def _bits(value: Any, label: str) -> int:
    if value not in (2, 3, 4, 8):
        raise UnsupportedError(f"{label}: codes of {value} bits, which jisu doesn't read; it reads 2, 3, 4 and 8")
    return int(value)


def _group(value: Any, k: int, module: str) -> int:
    """Inputs per group, from a configuration where -1 or nothing means all of them."""
    group = k if value in (None, -1, 0) else int(value)
    if group < 1 or k % group:
        raise ArtifactError(f"{module}: groups of {group} don't divide its {k} inputs")
    return group


def _matrix(
    coded: Coded,
    place: Place,
    codes: Node,
    scales: Node,
    zeros: Node | None,
    bits: int,
    group: int,
    g_idx: str = "g_idx",
) -> Matrix:
    """A matrix of packed codes on a uniform grid, with its columns sorted by group where a tensor `g_idx` says that they aren't."""
    order = _order(coded, g_idx, place.k, group)
    if order is not None:
        single = ops.take(_columns(ops.unpack_bits(codes, bits=bits), place.k), order, axis=1, wrap=False)
        codes = ops.pack_bits(single, bits=bits)
    return Matrix(_dequantized(place, codes, scales, zeros, f"int{bits}", group), order)


def _dequantized(
    place: Place, codes: Node, scales: Node, zeros: Node | None, scheme: str, group: int, mask: Node | None = None
) -> Node:
    attributes = {"scheme": scheme, "k": place.k, "group": 0 if group >= place.k else group, "dtype": place.dtype}
    return ops.dequantize(codes, scales, zeros, mask, **attributes)


def _order(coded: Coded, name: str, k: int, group: int) -> Node | None:
    """Inputs int64 [k] sorted by their groups, or None where they are already.

    The values decide how the matrix is computed; traces that are kept depend on them (see `jisu.frontends.checkpoint`).
    """
    if name not in coded.parts:
        return None
    tensor = _part(coded, name, (k,), "int32", "int64")
    values, even = tensor.numpy(), np.arange(k) // group
    if np.array_equal(values, even) or (values == -1).all():
        return None
    if not np.array_equal(np.sort(values), even):
        raise ArtifactError(f"{coded.module}.{name}: not every one of the {k // group} groups has {group} inputs")
    return ops.get(ops.sort(reference(tensor), axis=0), index=1)


# --- GPTQ ----------------------------------------------------------------------------------------------------------------


def _gptq(fields: Mapping[str, Any]) -> Format:
    layout = fields.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f'the checkpoint is quantised (gptq in the file format {layout!r}), which jisu doesn\'t read; save it as "gptq"'
        )
    _only(fields, "pack_dtype", "int32", "gptq")

    def read(coded: Coded, place: Place) -> Matrix:
        options = _for_module(fields, place.names)
        bits = _bits(options.get("bits"), "gptq")
        n, k, group = place.n, place.k, _group(options.get("group_size"), place.k, coded.module)
        if k * bits % 32:
            raise ArtifactError(f"{coded.module}: {k} inputs of {bits} bits don't fill whole words")
        codes = ops.unpack_bits(_turned(_words(coded, "qweight", (k * bits // 32, n))), bits=8)
        scales = _turned(_scale(coded, "scales", (k // group, n)))
        zeros = _columns(ops.unpack_bits(_words(coded, "qzeros", (k // group, -(-n * bits // 32))), bits=bits), n)
        if layout == "gptq":  # modulo 2**bits: a stored 2**bits - 1 is a zero of 0
            zeros = ops.bit_and(ops.add(zeros, 1), 2**bits - 1)
        return _matrix(coded, place, codes, scales, _turned(zeros), bits, group)

    return Format("gptq", frozenset({"qweight"}), frozenset({"qweight", "qzeros", "scales", "g_idx"}), read)


def _for_module(fields: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    """A configuration with what GPTQModel's `dynamic` (regular expressions to options) says of one module."""
    for pattern, options in (fields.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and any(re.match(pattern.removeprefix("+:"), name) for name in names):
            return {**fields, **options}
    return fields


def _only(fields: Mapping[str, Any], key: str, wanted: str, label: str) -> None:
    if str(fields.get(key) or wanted).lower() != wanted:
        raise UnsupportedError(f"{label}: {key} is {fields[key]!r}; jisu reads {wanted!r} only")


# --- AWQ -----------------------------------------------------------------------------------------------------------------


def _awq(fields: Mapping[str, Any]) -> Format:
    _only(fields, "version", "gemm", "awq")
    _only(fields, "checkpoint_format", "gemm", "awq")
    if fields.get("bits", 4) != 4:
        raise UnsupportedError(f"awq: codes of {fields['bits']} bits; the format is defined for 4")

    def read(coded: Coded, place: Place) -> Matrix:
        n, k, group = place.n, place.k, _group(fields.get("group_size"), place.k, coded.module)
        if n % 8:
            raise ArtifactError(f"{coded.module}: {n} outputs don't fill whole words of 8")
        codes = ops.pack_bits(_turned(_in_order(_words(coded, "qweight", (k, n // 8)))), bits=4)
        zeros = _turned(_in_order(_words(coded, "qzeros", (k // group, n // 8))))
        scales = _turned(_scale(coded, "scales", (k // group, n)))
        return _matrix(coded, place, codes, scales, zeros, 4, group)

    return Format("awq", frozenset({"qweight"}), frozenset({"qweight", "qzeros", "scales"}), read)


def _in_order(words: Node) -> Node:
    """Codes [rows, 8 * words] of AWQ's words, in order."""
    rows, count = words.shape
    mixed = ops.reshape(ops.unpack_bits(words, bits=4), shape=(rows, count, 8))
    return ops.reshape(ops.take(mixed, constant(np.array(_AWQ_ORDER)), axis=2, wrap=False), shape=(rows, count * 8))


# --- compressed-tensors --------------------------------------------------------------------------------------------------

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_WHOLE = ("int-quantized", "float-quantized", "naive-quantized")
_MASKED = ("sparse-24-bitmask", "sparse-bitmask")


def _compressed_tensors(fields: Mapping[str, Any]) -> Format:
    groups: Mapping[str, Mapping[str, Any]] = fields.get("config_groups") or {}
    if (fields.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedError(
            "compressed-tensors: the checkpoint has a transform_config, which jisu doesn't read; give one without"
        )
    kept = (fields.get("sparsity_config") or {}).get("format") or "dense"
    if kept not in ("dense", *_MASKED):
        raise UnsupportedError(
            f"the checkpoint is sparse (compressed-tensors in the format {kept!r}), which jisu doesn't read; it reads {', '.join(_MASKED)}"
        )
    default = fields.get("format", "dense")
    layouts = {g.get("format") or default for g in groups.values()}
    if strange := sorted(layouts - {*_PACKED, *_WHOLE}):
        advice = "" if strange[0] != "marlin-24" else (
            ": its codes stand in the order of one kernel, and are rounded to float16 scales; save the model "
            'with quantization_format="pack-quantized" (llm-compressor), and its zeros come along as codes'
        )  # fmt: skip
        raise UnsupportedError(
            f"the checkpoint is quantised (compressed-tensors in the format {strange[0]!r}), which jisu doesn't read; "
            f"it reads {', '.join((*_PACKED, *_WHOLE))}{advice}"
        )

    def read(coded: Coded, place: Place) -> Matrix:
        if "bitmask" in coded.parts and "weight_scale" not in coded.parts:
            return _expanded(coded, place)
        fitting = (g for match in (_named, _of_class) for g in groups.values() if match(g.get("targets"), place))
        chosen = next(fitting, None)  # a name says more than a class
        if chosen is None or not chosen.get("weights"):
            raise ArtifactError(f"{coded.module}: no group of config_groups says how its codes are to be read")
        layout, how = chosen.get("format") or default, chosen["weights"]
        if layout in _WHOLE:
            return _whole(coded, place, how)
        if layout == "pack-quantized":
            return _packed(coded, place, how)
        return _fp4(coded, place, how, layout)

    activations = sorted({_kind(g["input_activations"]) for g in groups.values() if g.get("input_activations")})
    notes = [_stays(f"activations of {', '.join(activations)}")] if activations else []
    notes += [_stays("a quantised KV cache")] if fields.get("kv_cache_scheme") else []
    marks = frozenset({"weight_packed", "weight_scale", "bitmask"})
    parts = marks | _SPARSE | {"weight", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"}
    return Format("compressed-tensors", marks, parts, read, tuple(notes))


def _stays(what: str) -> str:
    """What is said of a part of a configuration that concerns no weight: computing in floats is nearer to the unquantised model."""
    return f"the checkpoint asks for {what}; only its weights are quantised here, everything else stays in floats"


def _kind(arguments: Mapping[str, Any]) -> str:
    return f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}"


def _named(targets: Iterable[str] | None, place: Place) -> bool:
    """Whether a target names the module, or is a regular expression that its name begins with."""
    return any(
        re.match(target.removeprefix("re:"), name) if target.startswith("re:") else target == name
        for target in targets or ()
        for name in place.names
    )


def _of_class(targets: Iterable[str] | None, place: Place) -> bool:
    return place.kind in (targets or ())


def _steps(how: Mapping[str, Any], place: Place, coded: Coded) -> int:
    """Inputs per scale of a strategy other than blocks."""
    strategy = how.get("strategy") or ("group" if how.get("group_size") not in (None, -1) else "tensor")
    if strategy in ("group", "tensor_group"):
        return _group(how.get("group_size"), place.k, coded.module)
    if strategy not in ("tensor", "channel"):
        raise UnsupportedError(f"{coded.module}: scales per {strategy}, which jisu doesn't read")
    return place.k


def _per_group(coded: Coded, name: str, place: Place, group: int, *dtypes: str) -> Node:
    """Scales or zeros [n, groups] of one for all, one per output, or one per group."""
    n, whole, tensor = place.n, group == place.k, coded.parts.get(name)
    if tensor is not None and whole and tensor.shape in ((), (1,), (1, 1)):
        one = ops.reshape(reference(_part(coded, name, tensor.shape, *dtypes)), shape=(1, 1))
        return ops.broadcast_to(one, shape=(n, 1))
    if tensor is not None and whole and tensor.shape == (n,):
        return ops.reshape(reference(_part(coded, name, (n,), *dtypes)), shape=(n, 1))
    return reference(_part(coded, name, (n, place.k // group), *dtypes))


def _scales(coded: Coded, name: str, place: Place, group: int) -> Node:
    return _widened(_per_group(coded, name, place, group, *_FLOATS))


def _signed(node: Node, bits: int) -> Node:
    """Signed numbers int8 as codes and zeros: 2**(bits - 1) more, uint8."""
    return ops.add(ops.cast(node, dtype="uint8"), 2 ** (bits - 1))


def _packed(coded: Coded, place: Place, how: Mapping[str, Any]) -> Matrix:
    """Codes of `num_bits` bits in words, in one row; older files leave the bits at a word's end that hold no whole code."""
    n, k = place.n, place.k
    if how.get("type", "int") != "int":
        raise UnsupportedError(f"{coded.module}: packed codes of type {how['type']!r}, which jisu doesn't read")
    bits, group = _bits(how.get("num_bits"), "compressed-tensors"), _steps(how, place, coded)
    _check_shape(coded, place)
    codes = _columns(_unpacked(coded, "weight_packed", bits, n, k), k)
    zeros = None
    if not how.get("symmetric", True):
        rows = k // group
        stored = coded.parts.get("weight_zero_point")
        if stored is not None and stored.dtype == np.int8:  # as older files have them
            one = _part(coded, "weight_zero_point", (n, rows), "int8")
            zeros = _signed(reference(one), bits)
        else:
            zeros = _turned(_columns(_unpacked(coded, "weight_zero_point", bits, rows, n, turned=True), n))
    scales = _scales(coded, "weight_scale", place, group)
    return _matrix(coded, place, ops.pack_bits(codes, bits=bits), scales, zeros, bits, group, "weight_g_idx")


def _unpacked(coded: Coded, name: str, bits: int, rows: int, count: int, turned: bool = False) -> Node:
    """Codes uint8 [rows, at least count] of words that are packed along rows (`turned`: along columns)."""
    dense, loose = -(-count * bits // 32), -(-count // (32 // bits))
    tensor = coded.parts.get(name)
    width = loose if tensor is not None and tensor.shape == ((loose, rows) if turned else (rows, loose)) else dense
    words = _words(coded, name, (width, rows) if turned else (rows, width))
    words = _turned(words) if turned else words
    if width == dense:
        return ops.unpack_bits(words, bits=bits)
    single = ops.unpack_bits(ops.reshape(words, shape=(rows, width, 1)), bits=bits)
    return ops.reshape(single, shape=(rows, width * (32 // bits)))


def _check_shape(coded: Coded, place: Place) -> None:
    tensor = coded.parts.get("weight_shape")
    if tensor is not None and tensor.numpy().tolist() != [place.n, place.k]:
        raise ArtifactError(
            f"{coded.module}.weight_shape is {tensor.numpy().tolist()}, the model has {[place.n, place.k]}"
        )


def _expanded(coded: Coded, place: Place) -> Matrix:
    """A sparse matrix of floats."""
    values, mask = _stored(coded, place, *_FLOATS)
    values = values if values.dtype == place.dtype else ops.cast(values, dtype=place.dtype)
    return Matrix(ops.expand(values, mask, k=place.k))


def _stored(coded: Coded, place: Place, *dtypes: str) -> tuple[Node, Node | None]:
    """A matrix's numbers [n, k], or of a sparse one those that are kept, [nnz], and its mask (see `jisu.compiler.masks`)."""
    n, k = place.n, place.k
    if "bitmask" not in coded.parts:
        return reference(_part(coded, "weight", (n, k), *dtypes)), None
    bits = _part(coded, "bitmask", (n, -(-k // 8)), "uint8")
    mask = bits.numpy()
    beyond, count = bool(k % 8 and (mask[:, -1] >> k % 8).any()), int(np.bitwise_count(mask).sum(dtype=np.int64))
    tensor = coded.parts.get("compressed")
    rows = tensor is not None and tensor.shape == (n, k // 2)  # two of four
    values = _part(coded, "compressed", (n, k // 2) if rows else (count,), *dtypes)
    if beyond or count != math.prod(values.shape):
        raise ArtifactError(
            f"{coded.module}.bitmask keeps {count} of {n} x {k} numbers, but {coded.module}.compressed has {math.prod(values.shape)}"
        )
    shape = coded.parts.get("shape")
    if shape is not None and shape.numpy().reshape(-1).tolist() != [n, k]:
        raise ArtifactError(f"{coded.module}.shape is {shape.numpy().reshape(-1).tolist()}, the model has {[n, k]}")
    return ops.reshape(reference(values), shape=(count,)), reference(bits)


def _whole(coded: Coded, place: Place, how: Mapping[str, Any]) -> Matrix:
    """A matrix of int8 or e4m3, with scales for all of it, per output, group, or block."""
    stored = coded.parts.get("weight")
    if stored is not None and str(stored.dtype) in _FLOATS:
        raise UnsupportedError(
            f"{coded.module}.weight is {stored.dtype}: the checkpoint isn't compressed; save it compressed"
        )
    if how.get("type", "int") == "float":
        return _eights(coded, place, "weight_scale", how)
    codes, mask = _stored(coded, place, "int8")
    group = _steps(how, place, coded)
    scales, zeros = _scales(coded, "weight_scale", place, group), None
    if mask is not None:
        if not how.get("symmetric", True) or _order(coded, "weight_g_idx", place.k, group) is not None:
            raise UnsupportedError(
                f"{coded.module}: sparse codes with zero points, or in an order of activations, which jisu doesn't read"
            )
        return Matrix(_dequantized(place, _signed(codes, 8), scales, None, "int8", group, mask))
    if not how.get("symmetric", True):
        zeros = _signed(_per_group(coded, "weight_zero_point", place, group, "int8"), 8)
    return _matrix(coded, place, _signed(codes, 8), scales, zeros, 8, group, "weight_g_idx")


def _eights(coded: Coded, place: Place, name: str, how: Mapping[str, Any]) -> Matrix:
    """A matrix of e4m3."""
    codes, mask = _stored(coded, place, "float8_e4m3fn")
    block = how.get("block_structure")
    if block:
        scales, group = _blocks(coded, name, place, tuple(map(int, block))), int(block[1])
    else:
        group = _steps(how, place, coded)
        scales = _scales(coded, name, place, group)
    return Matrix(_dequantized(place, codes, scales, None, "fp8", group, mask))


def _blocks(coded: Coded, name: str, place: Place, block: tuple[int, ...]) -> Node:
    """Scales [n, groups] of scales per block of outputs and inputs; the last blocks may be smaller."""
    if len(block) != 2 or min(block) < 1:
        raise UnsupportedError(f"{coded.module}: blocks of {list(block)}; jisu reads blocks of outputs and inputs")
    rows, groups = -(-place.n // block[0]), -(-place.k // block[1])
    single = ops.reshape(_scale(coded, name, (rows, groups)), shape=(rows, 1, groups))
    each = ops.reshape(ops.broadcast_to(single, shape=(rows, block[0], groups)), shape=(rows * block[0], groups))
    return ops.slice_(each, starts=(0, 0), stops=(place.n, groups), steps=(1, 1))


def _fp4(coded: Coded, place: Place, how: Mapping[str, Any], layout: str) -> Matrix:
    """Two codes e2m1 to a byte; scales are e4m3 over one float of the whole matrix, or powers of two."""
    n, k, group = place.n, place.k, _steps(how, place, coded)
    codes = _part(coded, "weight_packed", (n, k // 2), "uint8")
    kind = "nvfp4" if layout.startswith("nvfp4") else "mxfp4"
    wanted = "float8_e4m3fn" if kind == "nvfp4" else "uint8"
    stored = _part(coded, "weight_scale", (n, k // group), wanted)
    scales = reference(stored)
    if kind == "nvfp4":
        table = weight(_TABLE, TensorType((256,), "float32"))
        whole = _part(coded, "weight_global_scale", (1,), "float32")
        scales = ops.div(ops.take(table, ops.cast(scales, dtype="int64"), axis=0, wrap=False), reference(whole))
    return Matrix(_dequantized(place, reference(codes), scales, None, kind, group))


# --- FP8 -----------------------------------------------------------------------------------------------------------------


def _fp8(fields: Mapping[str, Any]) -> Format:
    if fields.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedError(f"fp8: the checkpoint holds {fields['fmt']}, which jisu doesn't read; it reads e4m3")
    how = {"block_structure": fields.get("weight_block_size")}
    marks = frozenset({"weight_scale_inv"})
    return Format(
        "fp8",
        marks,
        marks | {"weight"},
        lambda coded, place: _eights(coded, place, "weight_scale_inv", how),
        (_stays("activations of float8"),),
    )
