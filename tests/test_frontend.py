"""Capturing PyTorch modules: operators against eager PyTorch through the reference interpreter, signatures, errors."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jisu.compiler.errors import IndexOutOfRangeError, InputError, InputTypeError, UnsupportedError
from jisu.compiler.graph import ArrayStorage
from jisu.compiler.interpret import interpret
from jisu.compiler.signature import Output, Signature, Tree
from jisu.compiler.verify import verify
from jisu.frontends.aten.values import array_of
from jisu.frontends.torch_export import Captured, capture

NAN, INF = float("nan"), float("inf")


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: torch.Tensor) -> Any:
        return self.function(*xs)


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    leaves = captured.signature.flatten_call(args, kwargs)
    outputs = interpret(captured.graph, [array_of(x) for x in leaves])
    return captured.signature.unflatten([to_torch(x) for x in outputs])


def check(module: nn.Module, *args: torch.Tensor, exact: bool = False) -> Captured:
    """Capture, verify, interpret, and compare with eager PyTorch: structure, shapes, dtypes, NaNs, values."""
    with torch.no_grad():
        expected = module(*[a.clone() for a in args])
    captured = capture(module, tuple(a.clone() for a in args))
    verify(captured.graph)
    found = run(captured, *args)
    flat, spec = torch.utils._pytree.tree_flatten(expected)
    got, got_spec = torch.utils._pytree.tree_flatten(found)
    assert spec == got_spec
    for e, g in zip(flat, got, strict=True):
        if isinstance(e, torch.Tensor):
            half = e.dtype in (torch.float16, torch.bfloat16)
            tolerance = 0 if exact or not e.is_floating_point() else 1e-2 if half else 1e-5
            torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert type(e) is type(g) and e == g
    return captured


X = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
INTS = torch.tensor([7, -7, 5, -5, 0, 2**31 - 1, -(2**31)], dtype=torch.int32)
ODD = torch.tensor([[0.0, -0.0, NAN, INF], [-INF, 1.5, -1.5, 2.5]])

OPERATORS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "alpha": (lambda x: (torch.add(x, x, alpha=3), torch.sub(x, 2, alpha=2), torch.rsub(x, x * 2, alpha=2)), (X,)),
    "promotion": (lambda x, i: (x + i, i / 2, i * 2.5, i + True, x.half() + x, i > 1.5), (X[0, 0], INTS[:4])),
    "overflow": (lambda i: (i + 1, i * i, -i, i.abs(), i.sum(), (i << 3)), (INTS,)),
    "integer division": (lambda i: (i // 3, i % 3, torch.div(i, 3, rounding_mode="trunc"), torch.fmod(i, -3)), (INTS,)),
    "odd floats": (lambda x: (x.relu(), x.clamp(-1, 1), x.max(), x.max(1), x.argmax(1), x.sign(), x.isnan()), (ODD,)),
    "softmax of -inf": (lambda x: torch.softmax(torch.full_like(x, -INF), -1), (X,)),
    "rounding": (lambda x: (x.round(), x.floor(), x.trunc(), torch.round(x, decimals=1), x // 0.7, x % 0.7), (X,)),
    "bf16 scalars": (lambda x: (x * 0.1, x + 0.3, x / 3, x - 1e-3, x < 0.1, x.mean(), x.var()), (X.bfloat16(),)),
    "views": (lambda x: (x[:, -1], x[..., ::2], x[1:5, None, -2:], x.flip(0, 2), x.roll((1, -2), (0, 2)), x.mT), (X,)),
    "indices": (
        lambda x, i: (x[:, i], x[i, :, i], x[0, i, 1], x[i[:, None], i], x[-1, [0, -1]]),
        (X, torch.tensor([0, -1])),
    ),
    "index_put": (
        lambda x, i: (x.index_put((i, i), torch.ones(2, 4), accumulate=True), x.masked_fill(x > 0, NAN)),
        (X, torch.tensor([0, 1])),
    ),
    "mask assignment": (lambda x: (x.clone().masked_fill_(x < 0, 2.0), torch.where(x > 1, x, 0.0)), (X,)),
    "scatter": (
        lambda x, i: (
            x.scatter(1, i, 5.0), x.scatter_add(1, i, x), x.scatter_reduce(1, i, x, "mean", include_self=False),
            x.scatter_reduce(1, i, x, "amax"), x.gather(1, i),
        ),
        (X[0], torch.tensor([[0, 1, 1], [3, 3, 2]])),
    ),
    "sorting": (lambda x: (x.sort(descending=True), x.topk(2), x.kthvalue(2), x.median(-1), x.argsort(0)), (X,)),
    "scans": (lambda x: (x.cumsum(1), x.cumprod(0), x.cummax(2), x.cummin(2), x.logcumsumexp(1)), (X,)),
    "reductions": (
        lambda x: (x.std(), torch.var_mean(x, (0, 2)), x.norm(dim=1), x.logsumexp(2), x.prod(1), x.any(0)),
        (X,),
    ),
    "empty": (
        lambda x: (x.sum(), x.prod(), x.mean(), torch.cat([x, x]), x.all(), x.reshape(0, 8)),
        (torch.ones(0, 8),),
    ),
    "scalars": (
        lambda x: (x.softmax(0), x.sum(0), x.sort(), x.cumsum(0), x.argmax(), x.view(1), x * 2),
        (torch.tensor(2.0),),
    ),
    "pooling": (
        lambda x: (
            F.max_pool2d(x, 2, 2, 1, return_indices=True),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            F.adaptive_avg_pool2d(x, (2, 3)), F.adaptive_max_pool2d(x, 2), F.max_pool2d(x, 3, 2, ceil_mode=True),
        ),
        (torch.randn(2, 3, 7, 5),),
    ),
    "convolution": (
        lambda x, w: (F.conv2d(x, w, None, 2, 1, 2, 2), F.conv_transpose2d(x, w, None, 2, 1, 1, 2), F.unfold(x, 3)),
        (torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3)),
    ),
    "interpolation": (
        lambda x: tuple(
            F.interpolate(x, size=(5, 9), mode=m) for m in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
        ),
        (torch.randn(1, 2, 4, 6),),
    ),
    "padding": (
        lambda x: tuple(F.pad(x, (1, 2, 2, 1), mode=m) for m in ("constant", "reflect", "replicate", "circular"))
        + (F.pad(x, (-1, 1, 0, -2)),),
        (torch.randn(1, 2, 4, 6),),
    ),
    "norms": (
        lambda x: (
            F.layer_norm(x, (3, 4)), F.rms_norm(x, (4,)), F.group_norm(x, 3), F.instance_norm(x),
            F.local_response_norm(x, 2), F.normalize(x, dim=1),
        ),
        (X,),
    ),
    "activations": (
        lambda x: (
            F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.elu(x), F.selu(x), F.celu(x, 2.0), F.mish(x),
            F.softplus(x), F.hardswish(x), F.glu(x), F.logsigmoid(x), F.softshrink(x), F.log_softmax(x, 1),
        ),
        (X,),
    ),
    "products": (
        lambda x: (
            x @ x.mT, torch.einsum("bij,bkj->ikb", x, x), torch.addmm(x[0, 0], x[0], x[1].T @ x[0], beta=2, alpha=3),
            x[0] @ x[0, 0], torch.cdist(x, x), F.linear(x, x[0], x[0, :, 0]), torch.baddbmm(x, x, x.mT @ x, beta=0),
        ),
        (X,),
    ),
    "diagonals": (
        lambda x: (x.diagonal(1, 1, 2), torch.diag_embed(x, -1), x.tril(-1), x.triu(1), torch.eye(3, 4) * x), (X,)
    ),
    "embedding bag": (
        lambda w, i, o: tuple(F.embedding_bag(i, w, o, mode=m) for m in ("sum", "mean", "max")),
        (torch.randn(7, 3), torch.tensor([1, 2, 6, 0, 3]), torch.tensor([0, 2, 2])),
    ),
    "buckets": (lambda x: (torch.bucketize(x, torch.arange(-2.0, 3.0)), torch.bucketize(x, x[0, 0], right=True)), (X,)),
    "complex inside": (
        lambda x: (torch.fft.irfft(torch.fft.rfft(x)), torch.view_as_real(torch.polar(x, x)), torch.fft.fft(x).abs()),
        (X,),
    ),
    "return types": (lambda x: {"a": [x, None, 3, "s"], "b": (x.shape[0], x.min(0))}, (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_mean_what_they_mean_in_eager_pytorch(name: str) -> None:
    function, args = OPERATORS[name]
    check(Lambda(function), *args)


@pytest.mark.parametrize("cell", [nn.LSTM(4, 5, 2, batch_first=True), nn.GRU(4, 5, bidirectional=True)])
def test_recurrent_cells_unroll(cell: nn.Module) -> None:
    check(cell.eval(), torch.randn(2, 3, 4))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "broadcast"])
def test_attention_as_eager_also_where_a_row_sees_no_key(mask: str) -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    seen = torch.tensor([[True, True, False, True, False], [False] * 5, [True] * 5])
    given = {
        "none": None, "causal": None, "bool": seen, "broadcast": seen[:1],
        "float": torch.zeros(3, 5).masked_fill(~seen, -INF),
    }[mask]  # fmt: skip

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, given, is_causal=mask == "causal", enable_gqa=True)

    captured = check(Lambda(attend), q, k)
    assert [n.op.name for n in captured.graph.nodes].count("attention") == 1


def test_dynamic_dimensions_keep_their_names_and_ranges() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            n = x.shape[0]
            return (x.reshape(-1) * n, torch.cat([x, y]) / n**0.5, x[1:] + torch.arange(n - 1)[:, None], n)

    batch, other = torch.export.Dim("batch", min=3, max=8), torch.export.Dim("other", max=9)
    shapes = {"x": {0: batch}, "y": {0: other}}
    captured = capture(Model(), (torch.randn(4, 3), torch.randn(5, 3)), dynamic_shapes=shapes)
    verify(captured.graph)
    assert captured.graph.ranges == {"batch": (3, 8), "other": (1, 9)}
    assert [str(n.type) for n in captured.graph.inputs] == ["float32[batch, 3]", "float32[other, 3]"]
    for n in (3, 5, 8):
        x, y = torch.randn(n, 3), torch.randn(1, 3)
        for e, g in zip(Model()(x, y), run(captured, x, y), strict=True):
            torch.testing.assert_close(g, e)
    with pytest.raises(InputError, match=r"'batch' must be in \[3, 8\], got 9"):
        run(captured, torch.randn(9, 3), torch.randn(1, 3))


def test_symbols_without_a_name_are_numbered_and_constraints_are_reported() -> None:
    dynamic = torch.export.Dim.DYNAMIC
    captured = capture(Lambda(lambda x: x + 1), (torch.randn(4, 3),), dynamic_shapes=(({0: dynamic},),))
    assert str(captured.graph.inputs[0].type) == "float32[s0, 3]"
    with pytest.raises(InputError, match="dynamic_shapes"):
        capture(Lambda(lambda x: x + torch.ones(4, 3)), (torch.randn(4, 3),), dynamic_shapes=(({0: dynamic},),))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) * self.scale + torch.zeros(ids.shape[1], 4))


def test_tied_weights_are_one_and_are_not_copied() -> None:
    model, ids = Tied(), torch.tensor([[1, 10, 3]])
    captured = check(model, ids)
    assert len(captured.graph.weights) == 2 and "scale" in captured.graph.weights
    (name,) = set(captured.graph.weights) - {"scale"}
    assert np.shares_memory(captured.graph.weights[name].numpy(), model.embed.weight.detach().numpy())
    for wrong in (11, -1):
        with pytest.raises(IndexOutOfRangeError, match=str(wrong)):
            run(captured, torch.tensor([[1, wrong, 3]]))


def test_a_module_on_the_meta_device_takes_its_values_from_storage() -> None:
    real, ids = Tied(), torch.tensor([[1, 10, 3]])
    with torch.device("meta"):
        model = Tied()
    storage = {
        "embed.weight": ArrayStorage(array_of(real.embed.weight)),
        "scale": ArrayStorage(array_of(real.get_buffer("scale"))),
    }
    captured = capture(model, (ids.to("meta"),), storage=storage)
    torch.testing.assert_close(run(captured, ids), real(ids).detach())
    assert model.embed.weight.is_meta and model.head.weight is model.embed.weight
    with pytest.raises(InputError, match=r"weight '\w+\.weight' has no values"):
        capture(model, (ids,))


def test_bfloat16_weights_and_shared_modules() -> None:
    layer = nn.Linear(4, 4)
    check(nn.Sequential(layer, nn.SiLU(), layer).bfloat16(), X.bfloat16())


def test_mutations_of_inputs_are_outputs_and_of_buffers_are_refused() -> None:
    class Model(nn.Module):
        def forward(self, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x[0] * a

    captured = capture(Model(), (torch.ones(3), torch.zeros(2, 3)))
    assert captured.signature.mutations == ((1, 1),)
    outputs = interpret(captured.graph, [np.ones(3, np.float32), np.zeros((2, 3), np.float32)])
    np.testing.assert_array_equal(outputs[1], np.ones((2, 3), np.float32))
    with pytest.raises(UnsupportedError, match=r"running_mean.*eval"):
        capture(nn.BatchNorm1d(3), (torch.randn(4, 3),))
    check(nn.BatchNorm1d(3).eval(), torch.randn(4, 3))


def test_outputs_that_are_inputs_or_views_of_them() -> None:
    check(Lambda(lambda x: (x, x.view(-1), x.T, x)), torch.randn(3, 3), exact=True)


def test_control_flow_on_tensors_through_torch_cond() -> None:
    model = Lambda(lambda x: torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v * 2, (x,)))
    for sign in (1.0, -1.0):
        x = torch.full((2, 2), sign)
        torch.testing.assert_close(run(capture(model, (torch.ones(2, 2),)), x), model(x))


# ------------------------------------------------------------------------------------------------------- signature


class Structured(nn.Module):
    def forward(self, x: torch.Tensor, flag: bool = True, *rest: torch.Tensor, pair: Any, name: str = "n") -> Any:
        return x + pair[0] * pair[1]["k"] + sum(rest) if flag else x


def test_calls_by_position_and_name_and_what_is_wrong_with_them() -> None:
    x = torch.ones(2)
    captured = capture(Structured(), (x, True, x), {"pair": (x, {"k": x})})
    signature = captured.signature
    assert [i.name for i in signature.inputs] == ["x", "rest.0", "pair.0", "pair.1.k"]
    assert Signature.from_json(signature.to_json()) == signature
    pair = {"pair": [x, {"k": x}]}
    assert len(signature.flatten_call((x, True, x), pair)) == 4
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), pair, "missing input"),
        ((x, True), pair, "missing input 'rest.0'"),
        ((x, True, x), {}, "missing input 'pair.0'"),
        ((x, False, x), pair, "compiled for flag=True, got False"),
        ((x, True, x), {**pair, "name": "m"}, "compiled for name='n', got 'm'"),
        ((x, True, x), {**pair, "extra": x}, "unexpected argument 'extra'"),
        ((x, True, x), {"pair": (x, {"j": x})}, "expected a dict with k"),
        ((x, True, x), {"pair": (x,)}, "expected a tuple of 2"),
        ((None, True, x), pair, "expected a tensor"),
        ((x, True, x), {**pair, "x": x}, "twice"),
    ]
    for args, kwargs, message in wrong:
        with pytest.raises(InputError, match=message):
            signature.flatten_call(args, kwargs)


Point = collections.namedtuple("Point", "x y")


def test_named_results_keep_their_class_or_become_an_output() -> None:
    captured = check(Lambda(lambda x: Point(x, [x + 1])), X)
    assert isinstance(run(captured, X), Point)
    tree = Tree("record", None, (Tree("leaf", 0), Tree("const", None)), ("logits", "cache"), "absent.module:Result")
    found = Signature((), (), tree).unflatten([X])
    assert isinstance(found, Output) and found.logits is X and found[0] is X and found["cache"] is None
    with pytest.raises(AttributeError, match="logits"):
        _ = found.absent


def test_constants_survive_json() -> None:
    tree = Tree("tuple", None, tuple(Tree("const", v) for v in (None, True, 3, 2.5, INF, "text")))
    assert Tree.from_json(tree.to_json()) == tree


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_is_no_module_or_has_no_inputs() -> None:
    with pytest.raises(InputTypeError, match="expected torch.nn.Module, got int"):
        capture(42)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"forward\(\) needs input; give example_inputs=\(input,\)"):
        capture(nn.Linear(2, 2))
    with pytest.raises(InputError, match="don't fit forward"):
        capture(nn.Linear(2, 2), (X, X, X))


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.linalg.eigvals(x).real
        return y + torch.special.bessel_j1(x) + torch.rand_like(x)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


class Mask(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


def line_of(module: type[nn.Module], offset: int = 1) -> str:
    return f"test_frontend.py:{module.forward.__code__.co_firstlineno + offset}"


def test_all_unsupported_operators_are_listed_at_once_with_their_lines() -> None:
    with pytest.raises(UnsupportedError) as caught:
        capture(Several(), (torch.randn(3, 3),))
    rows = str(caught.value).splitlines()
    for name, offset in (("aten.linalg_eigvals", 1), ("aten.special_bessel_j1", 2), ("aten.rand_like", 2)):
        assert any(name in row and line_of(Several, offset) in row for row in rows)


def test_data_dependent_control_flow_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match=f"data-dependent.*{line_of(Branch)}.*torch.cond"):
        capture(Branch(), (X,))
    assert not capfd.readouterr().err
    with pytest.raises(UnsupportedError, match=f"depends on the data; at .*{line_of(Mask)}"):
        capture(Mask(), (X,))


def test_dtypes_without_meaning_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        capture(Lambda(lambda x: x.float()), (X.to(torch.float8_e4m3fn),))
    with pytest.raises(UnsupportedError, match="complex"):
        capture(Lambda(lambda x: torch.fft.fft(x)), (X,))


def test_the_source_of_a_node_is_its_module_and_line() -> None:
    captured = check(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    (relu,) = [n for n in captured.graph.nodes if n.op.name == "relu"]
    assert relu.source.startswith("1 ")


def test_capturing_from_several_threads() -> None:
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        results[i] = run(capture(Lambda(lambda x: x * i), (X,)), X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        torch.testing.assert_close(result, X * i)
