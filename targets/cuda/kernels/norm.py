"""Norms over the last axis on NVIDIA GPUs: a block per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from jisu.targets.cpu.isa import ITEMSIZE, STORED, Val, vector_type
from jisu.targets.cuda.device import WARP, Device

_MOST = 512  # threads of a row, at most


@attrs.frozen
class Norm:
    """A norm: of rows of `width` numbers of `dtype`, about their mean (not for rms), with or without gain and bias; offset is added to the
    gain; round_first: rounded before the gain."""

    width: int
    dtype: str
    eps: float
    rms: bool
    gain: bool
    bias: bool
    offset: float = 0.0
    round_first: bool = False

    @property
    def pointers(self) -> list[str]:
        """Of a kernel: x, the gain and the bias if there are such, y."""
        return ["x", *(["w"] if self.gain else []), *(["b"] if self.bias else []), "y"]


def numbers_at_once(how: Norm) -> int:
    """Numbers that a thread reads at once."""
    at_once = 16 // ITEMSIZE[how.dtype]
    return 1 if how.width % at_once else at_once


def norm_row(f: Device, how: Norm, number: Val, given: Mapping[str, Val]) -> None:
    """The norm of a row by all threads of a block; given: `Norm.pointers`."""
    at_once, threads = numbers_at_once(how), f.threads
    thread = f.thread()
    lane, warp = thread % WARP, thread / WARP
    row = number * how.width
    held = f.shared(2 * (threads // WARP) * 4)

    def several(base: Val, first: Val) -> list[Val]:
        """Neighbouring numbers as float32."""
        address = f.at(base, first, how.dtype)
        if at_once == 1:
            return [f.widen(f.load(STORED[how.dtype], address), how.dtype)]
        type_ = vector_type(STORED[how.dtype], at_once)
        loaded = f.op(f"load {type_}, {address.type} {address.name}, align 16", type_)
        parts = [f.op(f"extractelement {type_} {loaded.name}, i32 {i}", STORED[how.dtype]) for i in range(at_once)]
        return [f.widen(p, how.dtype) for p in parts]

    def over(body: Callable[[Val, list[Val]], list[Val]], carried: list[Val]) -> list[Val]:
        *found, _ = f.loop(thread * at_once, how.width, threads * at_once, carried, body)
        return found

    def summed(value: Val, number: int) -> Val:
        """The sum over all threads, in each of them."""
        part = f.sum_of_warp(value)
        place = f.at(held, number * (threads // WARP), "float32")
        f.when(lane.cmp("eq", 0), lambda: f.store(part, f.at(place, warp, "float32")))
        f.barrier()
        total = f.load("float", place)
        for w in range(1, threads // WARP):
            total = total + f.load("float", f.at(place, w, "float32"))
        return total

    zero = f.const(0.0, "float")
    mean = zero
    if not how.rms:

        def add(i: Val, carried: list[Val]) -> list[Val]:
            (total,) = carried
            for v in several(given["x"], row + i):
                total = total + v
            return [total]

        mean = summed(over(add, [zero])[0], 0) / float(how.width)

    def add_square(i: Val, carried: list[Val]) -> list[Val]:
        (total,) = carried
        for v in several(given["x"], row + i):
            less = v if how.rms else v - mean
            total = f.fma(less, less, total)
        return [total]

    squares = summed(over(add_square, [zero])[0], 1)
    scale = f.call("float", "llvm.sqrt.f32", squares / float(how.width) + how.eps)

    def write(i: Val, _: list[Val]) -> list[Val]:
        results = []
        gains = several(given["w"], i) if how.gain else []
        biases = several(given["b"], i) if how.bias else []
        for n, v in enumerate(several(given["x"], row + i)):
            value = (v if how.rms else v - mean) / scale
            if how.gain:
                value = f.rounded(value, how.dtype) if how.round_first else value
                value = value * (gains[n] + how.offset if how.offset else gains[n])
            results.append(f.narrow(value + biases[n] if how.bias else value, how.dtype))
        address = f.at(given["y"], row + i, how.dtype)
        if at_once == 1:
            f.store(results[0], address)
            return []
        type_ = vector_type(STORED[how.dtype], at_once)
        whole = Val(f, "poison", type_)
        for n, value in enumerate(results):
            whole = f.op(f"insertelement {type_} {whole.name}, {value.type} {value.name}, i32 {n}", type_)
        f.emit(f"store {type_} {whole.name}, {address.type} {address.name}, align 16")
        return []

    over(write, [])
