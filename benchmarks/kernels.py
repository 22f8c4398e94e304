"""Speed of the CPU kernels beside PyTorch's on the shapes of a 160M-parameter decoder, batch 1.

    python benchmarks/kernels.py [--threads N] [--dtype float32|bfloat16] [--only NAME]

Prints, per kernel and shape, the best of several runs of both, GFLOP/s, GB/s of operands, and PyTorch's time over ours.
Each run finds its data as the model's step would: weights are rotated through copies that together exceed the caches.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

from common import seconds


def main() -> None:
    """Parse the options, fix the thread counts before either library starts its pool, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--only", default="", help="run the kernels whose name contains this")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    os.environ.update(TVM_NUM_THREADS=str(options.threads), TVM_BIND_THREADS="0", OMP_NUM_THREADS=str(options.threads))
    print(f"{'kernel':34}{'rows':>6}{'ours us':>10}{'torch us':>10}{'GFLOP/s':>9}{'GB/s':>7}{'ratio':>7}")
    for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        for name, rows, ours, theirs, flops, nbytes in _cases(dtype, options.target, options.only):
            a, b = (min(seconds(run, options.repeat)) for run in (ours, theirs))
            speed = f"{flops / a / 1e9:9.1f}{nbytes / a / 1e9:7.1f}{b / a:7.2f}"
            print(f"{name + ' ' + dtype:34}{rows:6}{a * 1e6:10.1f}{b * 1e6:10.1f}{speed}", flush=True)


Case = tuple[str, int, Callable[[], object], Callable[[], object], float, float]


def _cases(dtype: str, target_name: str, only: str) -> Iterator[Case]:
    """(name, rows, our run, PyTorch's run, FLOPs, bytes) of every hot kernel."""
    import itertools

    import ml_dtypes
    import numpy as np
    import torch
    import torch.nn.functional as F
    import tvm

    from jisu.targets.cpu import isa
    from jisu.targets.cpu.kernels import attention, matmul, norm, rotary
    from jisu.targets.target import Target

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    target, kind = Target.resolve(target_name), getattr(torch, dtype)
    size = isa.ITEMSIZE[dtype]

    def build(func: Any) -> Any:
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        return tvm.compile(module, target=isa.tvm_target(target))["main"]

    def numpy(w: torch.Tensor) -> np.ndarray:
        return w.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == "bfloat16" else w.numpy()

    def tensor(w: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(w.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(w)

    def linear(name: str, n: int, k: int, rows: tuple[int, ...]) -> Iterator[Case]:
        run = build(matmul.linear(n, k, dtype, target))
        copies = max(1, (96 << 20) // (n * k * size))
        weights = [torch.randn(n, k).to(kind) for _ in range(copies)]
        packed = [tensor(matmul.pack(numpy(w), target)) for w in weights]
        ours, theirs = itertools.cycle(packed), itertools.cycle(weights)
        for m in rows:
            x, y = torch.randn(m, k).to(kind), torch.empty(m, n, dtype=kind)
            yield (name, m, lambda x=x, y=y: run(x, next(ours), y), lambda x=x: F.linear(x, next(theirs)),
                   2.0 * m * n * k, size * (n * k + m * (n + k)))  # fmt: skip

    def gated(f: int, k: int, rows: tuple[int, ...]) -> Iterator[Case]:
        run = build(matmul.gated_mlp_up(f, k, dtype, target))
        copies = max(1, (96 << 20) // (2 * f * k * size))
        pairs = [(torch.randn(f, k).to(kind), torch.randn(f, k).to(kind)) for _ in range(copies)]
        packed = [tensor(matmul.pack_gated(numpy(a), numpy(b), target)) for a, b in pairs]
        ours, theirs = itertools.cycle(packed), itertools.cycle(pairs)

        def eager(x: torch.Tensor) -> torch.Tensor:
            a, b = next(theirs)
            return F.silu(F.linear(x, a)) * F.linear(x, b)

        for m in rows:
            x, y = torch.randn(m, k).to(kind), torch.empty(m, f, dtype=kind)
            yield ("gated_mlp_up", m, lambda x=x, y=y: run(x, next(ours), y), lambda x=x: eager(x),
                   4.0 * m * f * k, size * (2 * f * k + m * (f + k)))  # fmt: skip

    def cached(chunk: int, filled: int) -> Case:
        run = build(attention.attention_cached(12, 4, 64, 64, dtype, target, scale=0.125))
        q = torch.randn(1, chunk, 12, 64).to(kind)
        k, v = (torch.randn(1, 4, 1024, 64).to(kind) for _ in range(2))
        out, length, start = torch.empty_like(q), torch.tensor([filled]), torch.zeros(1, dtype=torch.int64)
        total, qt = filled + chunk, q.transpose(1, 2)

        def eager() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                qt, k[:, :, :total], v[:, :, :total], is_causal=chunk > 1, scale=0.125, enable_gqa=True
            )

        visible = chunk * filled + chunk * (chunk + 1) / 2
        return (f"attention_cached at {filled}", chunk, lambda: run(q, k, v, length, start, out), eager,
                4.0 * 12 * 64 * visible, size * 2.0 * 4 * 64 * total)  # fmt: skip

    def rows_of(m: int) -> Iterator[Case]:
        x, w = torch.randn(m, 768).to(kind), torch.randn(768).to(kind)
        y = torch.empty_like(x)
        run = build(norm.rms_norm(768, dtype, target, eps=1e-5))
        yield (
            "rms_norm 768",
            m,
            lambda: run(x, w, y),
            lambda: F.rms_norm(x, (768,), w, 1e-5),
            4.0 * x.numel(),
            2.0 * size * x.numel(),
        )
        heads, tables = torch.randn(1, m, 12, 64).to(kind), [torch.randn(1, m, 64).to(kind) for _ in range(2)]
        turned = torch.empty_like(heads)
        turn = build(rotary.rotary(12, 64, 64, dtype, target))

        def eager() -> torch.Tensor:
            cos, sin = (t[:, :, None] for t in tables)
            half = torch.cat((-heads[..., 32:], heads[..., :32]), -1)
            return heads * cos + half * sin

        yield (
            "rotary 12x64",
            m,
            lambda: turn(heads, *tables, turned),
            eager,
            3.0 * heads.numel(),
            2.0 * size * heads.numel(),
        )

    def everything() -> Iterator[Callable[[], Iterator[Case]]]:
        for name, n, k in (
            ("linear qkv 1280x768", 1280, 768),
            ("linear out 768x768", 768, 768),
            ("linear down 768x2048", 768, 2048),
        ):
            yield lambda name=name, n=n, k=k: linear(name, n, k, (1, 4, 128, 512)) if only in name else iter(())
        yield lambda: gated(2048, 768, (1, 4, 128, 512)) if only in "gated_mlp_up" else iter(())
        yield lambda: linear("linear head 32000x768", 32000, 768, (1, 128)) if only in "linear head" else iter(())
        for chunk, filled in ((1, 128), (1, 512), (1, 1000), (128, 0), (512, 0)):
            yield lambda c=chunk, n=filled: iter([cached(c, n)]) if only in "attention_cached" else iter(())
        for m in (1, 128, 512):
            yield lambda m=m: rows_of(m) if only in "rms_norm rotary" else iter(())

    for group in everything():
        yield from group()


if __name__ == "__main__":
    main()
