"""Every op of the IR. The signature is the schema, the notation or body the type rule, `meaning` the truth.

`OPS` maps names to ops. Modules by family: elementwise, shape, index, reduce, contract, nn, quantize, sparse, semi_structured, sampling.
"""

from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Op
from jisu.compiler.ops import (
    contract,
    elementwise,
    index,
    nn,
    quantize,
    reduce,
    sampling,
    semi_structured,
    shape,
    sparse,
)
from jisu.compiler.ops.contract import (
    ACTIVATIONS,
    conv,
    gated_linear,
    linear,
    matmul,
    pack,
    pack_gated,
    packed_experts,
    packed_gated_linear,
    packed_linear,
    packed_projections,
    packed_take,
)
from jisu.compiler.ops.elementwise import (
    abs_,
    acos,
    acosh,
    add,
    asin,
    asinh,
    atan,
    atan2,
    atanh,
    bit_and,
    bit_not,
    bit_or,
    bit_xor,
    cast,
    ceil,
    copysign,
    cos,
    cosh,
    div,
    eq,
    erf,
    exp,
    exp2,
    expm1,
    floor,
    floor_div,
    fmod,
    ge,
    gelu,
    gt,
    isnan,
    le,
    log,
    log1p,
    log2,
    log10,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    lt,
    maximum,
    minimum,
    mul,
    ne,
    neg,
    pow_,
    reciprocal,
    relu,
    remainder,
    round_,
    rsqrt,
    shift_left,
    shift_right,
    sigmoid,
    sign,
    silu,
    sin,
    sinh,
    sqrt,
    square,
    sub,
    tan,
    tanh,
    trunc,
    trunc_div,
    where,
)
from jisu.compiler.ops.index import gather, scatter, sort, take
from jisu.compiler.ops.nn import (
    attention,
    attention_cached,
    cache_append,
    expert_linear,
    experts,
    layer_norm,
    rms_norm,
    rotary,
)
from jisu.compiler.ops.quantize import (
    decode_rows,
    dequantize,
    encode_levels,
    encode_rows,
    fake_quantize,
    levels_linear,
    levels_projections,
    pack_bits,
    pack_codes,
    pack_scales,
    pack_zeros,
    quantized_linear,
    quantized_take,
    unpack_bits,
)
from jisu.compiler.ops.reduce import all_, any_, argmax, argmin, prod, reduce_max, reduce_min, scan, softmax, sum_
from jisu.compiler.ops.sampling import draw
from jisu.compiler.ops.semi_structured import pack_places, semi_structured_linear
from jisu.compiler.ops.shape import (
    broadcast_to,
    concat,
    dim_value,
    flip,
    get,
    iota,
    pad,
    reshape,
    slice_,
    transpose,
    windows,
)
from jisu.compiler.ops.sparse import expand, fill_codes, pack_mask, pack_starts, pack_values, sparse_linear, sparse_take

OPS: dict[str, Op] = {
    value.name: value
    for module in (elementwise, shape, index, reduce, contract, nn, quantize, sparse, semi_structured, sampling)
    for value in vars(module).values()
    if isinstance(value, Op)
} | {op.name: op for op in (INPUT, WEIGHT, CONSTANT)}
"""All ops by name."""

ELEMENTWISE: frozenset[Op] = frozenset(v for v in vars(elementwise).values() if isinstance(v, Op))
"""Ops whose result index i reads operand index i alone (after broadcasting)."""

LOOKUPS: dict[Op, int] = {packed_take: 1, quantized_take: 1, sparse_take: 3}
"""Ops that look up rows of a table in panels, and which operand the indices are."""

__all__ = [
    "ACTIVATIONS", "ELEMENTWISE", "LOOKUPS", "OPS", "abs_", "acos", "acosh", "add", "all_", "any_", "argmax", "argmin", "asin",
    "asinh", "atan", "atan2", "atanh", "attention", "attention_cached", "bit_and", "bit_not", "bit_or", "bit_xor",
    "broadcast_to", "cache_append", "cast", "ceil", "concat", "conv", "copysign", "cos", "cosh", "decode_rows",
    "dequantize", "dim_value", "div", "draw", "encode_levels", "encode_rows", "eq", "erf", "exp", "exp2", "expand", "expert_linear", "experts",
    "expm1", "fake_quantize", "fill_codes", "flip", "floor", "floor_div", "fmod", "gated_linear", "gather", "ge",
    "gelu", "get", "gt", "iota", "isnan", "layer_norm", "le", "levels_linear", "levels_projections", "linear", "log", "log10", "log1p",
    "log2", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "matmul", "maximum", "minimum", "mul",
    "ne", "neg", "pack", "pack_bits", "pack_codes", "pack_gated", "pack_mask", "pack_places", "pack_scales", "pack_starts",
    "pack_values", "pack_zeros", "packed_experts", "packed_gated_linear", "packed_linear", "packed_projections",
    "packed_take", "pad", "pow_", "prod", "quantized_linear", "quantized_take", "reciprocal", "reduce_max", "reduce_min", "relu",
    "remainder", "reshape", "rms_norm", "rotary", "round_", "rsqrt", "scan", "scatter", "semi_structured_linear", "shift_left", "shift_right",
    "sigmoid", "sign", "silu", "sin", "sinh", "slice_", "softmax", "sort", "sparse_linear", "sparse_take", "sqrt",
    "square", "sub", "sum_", "take", "tan", "tanh", "transpose", "trunc", "trunc_div", "unpack_bits", "where",
    "windows",
]  # fmt: skip
