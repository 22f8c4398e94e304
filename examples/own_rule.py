"""A rewrite rule of your own: x * sigmoid(a * x), "swish" with a constant slope a, becomes silu(a * x) / a.

Both sides take as many ops: the example is about how a rule is written, proven and used, not about speed.
"""

from __future__ import annotations

import attrs
import torch

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import Graph
from jisu.compiler.rewrite import Rule, guard, rewrite, scalar, used_once, variables
from jisu.testing import check_rule

(x,) = variables("x")
slope = ops.mul(x, scalar("a"))
gate = ops.sigmoid(slope)

SWISH = Rule(
    "swish is a scaled silu",
    match=ops.mul(x, gate),
    replace=lambda m: ops.div(ops.silu(ops.mul(m["x"], m["a"])), m["a"]),
    where=(
        used_once(slope, gate),
        guard("a slope that is not zero, in float32", lambda m: m["a"] != 0 and m["x"].dtype == "float32"),
    ),
    types={"x": "float32[*b k]"},
    attributes={"a": (1.702, 0.5)},
)


@attrs.frozen
class FuseSwish:
    """The rule as a pass."""

    name: str = "fuse swish"
    exact: bool = True

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, (SWISH,))


class QuickGelu(torch.nn.Module):
    """What several vision models use for GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def main() -> None:
    print(check_rule(SWISH))
    inputs = (torch.randn(2, 5),)
    plain = jisu.compile(QuickGelu(), example_inputs=inputs)
    fused = jisu.compile(QuickGelu(), example_inputs=inputs, passes=(FuseSwish(),))
    print(plain.ir(), fused.ir(), sep="\n\n")
    assert "silu" in fused.ir()
    print("largest difference:", float((fused(*inputs) - QuickGelu()(*inputs)).abs().max()))


if __name__ == "__main__":
    main()
