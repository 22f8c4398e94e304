"""Which operators PyTorch takes apart before they are lowered, and which stay whole because the IR has them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch._decomp

aten = torch.ops.aten

_EXTRA = (
    "upsample_bilinear2d.default", "upsample_bilinear2d.vec", "upsample_bicubic2d.default", "upsample_bicubic2d.vec",
    "upsample_trilinear3d.default", "upsample_trilinear3d.vec", "upsample_linear1d.default", "upsample_linear1d.vec",
    "upsample_nearest1d.default", "upsample_nearest1d.vec", "upsample_nearest2d.default", "upsample_nearest2d.vec",
    "upsample_nearest3d.default", "upsample_nearest3d.vec", "_upsample_nearest_exact1d.default",
    "_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.default", "_upsample_nearest_exact2d.vec",
    "_upsample_nearest_exact3d.default", "_upsample_nearest_exact3d.vec", "grid_sampler_2d.default",
    "native_batch_norm.default", "affine_grid_generator.default",
)  # fmt: skip

_WHOLE = (
    "linear.default", "scaled_dot_product_attention.default", "rms_norm.default", "layer_norm.default",
    "group_norm.default", "silu.default", "gelu.default", "matmul.default", "mv.default", "dot.default",
    "softmax.int", "log_softmax.int", "_safe_softmax.default", "embedding.default", "hardswish.default",
    "hardsigmoid.default", "mish.default", "softplus.default", "_prelu_kernel.default", "leaky_relu.default",
    "elu.default", "glu.default", "log_sigmoid_forward.default", "logaddexp.default", "logaddexp2.default",
    "logsumexp.default", "addcmul.default", "addcdiv.default", "lerp.Scalar", "lerp.Tensor", "xlogy.Tensor",
    "xlogy.Scalar_Self", "xlogy.Scalar_Other", "nan_to_num.default", "threshold.default", "hardshrink.default",
    "softshrink.default", "heaviside.default", "baddbmm.default", "addmm.default", "addbmm.default", "addr.default",
    "addmv.default", "roll.default", "tril.default", "triu.default", "diag_embed.default",
    "diagonal_scatter.default", "select_scatter.default", "slice_scatter.default", "stack.default",
    "unbind.int", "split.Tensor", "split_with_sizes.default", "std.correction", "std_mean.correction",
    "var_mean.correction", "count_nonzero.default", "count_nonzero.dim_IntList", "aminmax.default",
    "all.default", "all.dim", "all.dims", "any.default", "any.dim", "any.dims", "index_add.default",
    "index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor", "masked_scatter.default",
    "linspace.default", "eye.default", "eye.m", "im2col.default", "reflection_pad1d.default",
    "reflection_pad2d.default", "reflection_pad3d.default", "replication_pad1d.default",
    "replication_pad2d.default", "replication_pad3d.default", "max_pool1d.default", "max_pool2d.default",
    "max_pool3d.default", "adaptive_avg_pool1d.default", "adaptive_max_pool1d.default", "rsub.Tensor", "rsub.Scalar",
    "clamp_min.default", "clamp_max.default", "clamp_min.Tensor", "clamp_max.Tensor", "take.default",
    "isfinite.default", "round.decimals", "nansum.default", "repeat_interleave.self_int", "masked_fill.Scalar",
    "masked_fill.Tensor", "floor_divide.default", "square.default", "norm.ScalarOpt_dim", "norm.Scalar",
    "_unsafe_index.Tensor", "_unsafe_index_put.default", "_unsafe_masked_index.default", "frac.default",
    "argsort.default", "argsort.stable", "hypot.default",
)  # fmt: skip


def _overloads(names: tuple[str, ...]) -> list[Any]:
    found = []
    for name in names:
        packet, overload = name.split(".")
        operator = getattr(getattr(aten, packet, None), overload, None)
        if operator is not None:
            found.append(operator)
    return found


@functools.cache
def whole() -> tuple[Any, ...]:
    """The operators that are lowered whole although PyTorch could take them apart."""
    return tuple(_overloads(_WHOLE))


def decompositions() -> Mapping[Any, Any]:
    """A fresh decomposition table for `ExportedProgram.run_decompositions`."""
    table = torch.export.default_decompositions()
    extra = _overloads(_EXTRA)
    for operator, function in torch._decomp.get_decompositions(extra).items():
        table[operator] = function
    for operator in whole():
        table.pop(operator, None)
    return table
