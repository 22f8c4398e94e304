"""Linear layers on NVIDIA GPUs: which numbers they multiply, and what becomes of the sums.

Weights are W[n, k] row by row (panels of one output): a row's inputs lie together. Of a gated layer W has gates and ups by turns, so that
neighbouring sums belong to one result; in memory they may be two matrices. Codes are as `pack_codes` makes them with words of one: of up to
4 bits two in a byte, the lower half first, of more one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import attrs

from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import ITEMSIZE, Val
from jisu.targets.cuda.device import PAIRS, Device, DeviceKernel
from jisu.targets.target import Target


@attrs.frozen
class Layer:
    """A linear layer, or several of the same input: y = activation(x W^T + bias) + residual, or activation(gates) * ups.

    outputs: results per matrix. apart: whether gates and ups are two matrices. dtype: of x, y, bias and residual. scheme, group, scales,
    zeros: of codes, "" for matrices of `dtype`; group: inputs per scale, 0 for a row; scales: their dtype; zeros: whether there are such,
    uint8. halves: whether W keeps two of each four inputs, the rows of a gated one by turns (see `jisu.compiler.ops.semi_structured`).
    """

    k: int
    outputs: tuple[int, ...]
    dtype: str = "bfloat16"
    gated: bool = False
    apart: bool = False
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    scheme: str = ""
    group: int = 0
    scales: str = "float16"
    zeros: bool = False
    halves: bool = False

    dtypes: ClassVar[Sequence[str]] = tuple(PAIRS)
    """Of results, that kernels have."""

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Of the kernels: x, the matrices, places, of codes scales and zeros, biases, residual, results, and the number of rows."""
        count = range(len(self.outputs))
        names = ["x", *(f"w{i}" for i in count), *(["v0"] if self.apart else [])]
        names += [f"p{i}" for i in count] if self.halves else []
        names += [f"s{i}" for i in count] if self.scheme else []
        names += [f"z{i}" for i in count] if self.zeros else []
        names += [f"b{i}" for i in count] if self.bias else []
        names += ["r"] if self.residual else []
        return [("ptr", name) for name in (*names, *(f"y{i}" for i in count))] + [("i64", "m")]

    @property
    def per_weight_row(self) -> int:
        """Rows of W per result."""
        return 2 if self.gated else 1

    @property
    def codes_per_chunk(self) -> int:
        """Weights in 16 bytes of a row, with those that are not kept."""
        kept = 16 * SCHEMES[self.scheme].per_byte if self.scheme else 16 // ITEMSIZE[self.dtype]
        return 2 * kept if self.halves else kept

    @property
    def per_word(self) -> int:
        """Weights in 4 bytes."""
        return self.codes_per_chunk // 4

    @property
    def decodes(self) -> bool:
        """Whether codes become numbers before they are multiplied."""
        return bool(self.scheme)

    @property
    def number_bytes(self) -> int:
        """Of a number of x."""
        return ITEMSIZE[self.dtype]

    @property
    def x_bytes(self) -> int:
        """From a row of x to the next."""
        return self.k * self.number_bytes

    @property
    def operand(self) -> str:
        """What tensor cores multiply."""
        return self.dtype

    @property
    def row_bytes(self) -> int:
        """Of a row of W."""
        return self.k * 16 // self.codes_per_chunk

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.k // self.group) if self.group else 1

    @property
    def name(self) -> str:
        """What distinguishes its kernels."""
        form = self.scheme + (str(self.group) if self.group else "") if self.scheme else self.dtype
        form += "_2of4" if self.halves else ""
        return f"{form}_{self.k}x{'_'.join(map(str, self.outputs))}{'_gated' if self.gated else ''}"

    def tiles(self, rows: int) -> int:
        """How many tiles of so many rows of W all matrices have."""
        return sum(-(-n * self.per_weight_row // rows) for n in self.outputs)

    def require(self) -> None:
        """Raise TargetError unless kernels can read it: numbers of `dtypes`, and `require_chunks`."""
        if self.dtype not in self.dtypes:
            raise TargetError(f"layers for GPUs compute in {' and '.join(self.dtypes)}, not in {self.dtype}")
        self.require_chunks()

    def require_chunks(self) -> None:
        """Raise TargetError unless rows are whole chunks of 16 bytes, and each chunk lies in one group or words of it do."""
        chunk = self.codes_per_chunk
        shared = self.group and (
            self.group % chunk if self.group > chunk else chunk % self.group or self.group % self.per_word
        )
        if self.k % chunk or shared:
            raise TargetError(f"{self.name}: rows or groups don't go into chunks of {chunk} weights")


@attrs.frozen(eq=False)
class Part:
    """The matrix that a block works on: its pointers (None where the layer has none; v: of ups that lie apart), its rows of W, the block's
    first one, and its results. p: of places. table: of levels, if the scheme is one."""

    w: Val
    v: Val | None
    p: Val | None
    s: Val | None
    z: Val | None
    b: Val | None
    y: Val
    rows: Val
    first: Val
    n: Val
    table: Val | None


@attrs.frozen(eq=False)
class Rows:
    """The rows that a block multiplies: `count` of x from number `first` on, each one's results in the same row of y."""

    f: Device
    first: Val
    count: Val

    def source(self, number: Val) -> Val:
        """Which row of x the block's row `number` is; one beyond the last is a copy of it, whose results nobody stores."""
        return self.f.minimum(self.first + number, self.count - 1)

    def place(self, number: Val) -> Val:
        """Which row of y its results are."""
        return self.first + number

    def there(self, place: Val) -> Val:
        """Whether that is one."""
        return place < self.count

    @property
    def weighs(self) -> bool:
        """Whether `weighed` changes anything."""
        return False

    def weighed(self, value: Val, place: Val) -> Val:
        """A result before it is rounded and stored."""
        return value


def part_of(f: Device, layer: Layer, block: Val, rows: int, *, mapped: bool = False) -> Part:
    """What block number `block` of tiles of `rows` rows of W works on; mapped: whether matrices are tensor maps. Then the table is the caller's,
    for whom this is no place where all threads of a block meet."""
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=False)}

    starts = [0]
    for count in layer.outputs[:-1]:
        starts.append(starts[-1] + -(-count * layer.per_weight_row // rows))
    later = [block.cmp("sge", start) for start in starts[1:]]

    def chosen(values: list[Val]) -> Val:
        found = values[0]
        for is_later, value in zip(later, values[1:], strict=True):
            found = f.select(is_later, value, found)
        return found

    def pointer(letter: str) -> Val | None:
        own = [given[f"{letter}{i}"] for i in range(len(layer.outputs)) if f"{letter}{i}" in given]
        if not own:
            return None
        return chosen(own) if mapped and letter in "wv" else f.memory(chosen(own))

    begin, n = chosen([f.i64(s) for s in starts]), chosen([f.i64(n) for n in layer.outputs])
    w, y = pointer("w"), pointer("y")
    assert w is not None and y is not None
    rows_of_w = n * layer.per_weight_row
    return Part(
        w,
        pointer("v"),
        pointer("p"),
        pointer("s"),
        pointer("z"),
        pointer("b"),
        y,
        rows_of_w,
        (block - begin) * rows,
        n,
        None if mapped else table_of(f, layer),
    )


def in_rows(
    layer: Layer, rows: int, outputs: int, threads: int, target: Target, work: Callable[..., None]
) -> DeviceKernel:
    """A kernel of `Layer.parameters` whose blocks have up to so many rows of x and of W each: grid (`Layer.tiles(outputs)`, parts of rows).
    work(f, layer, rows, x, part, own rows, residual or None): what a thread of it does."""
    f = Device(f"thin{rows}_{layer.name}", layer.parameters, target, threads)
    given = {name: value for (_, name), value in zip(layer.parameters, f.params(), strict=True)}
    residual = f.memory(given["r"]) if layer.residual else None
    own = Rows(f, f.block("y") * rows, given["m"])
    work(f, layer, rows, f.memory(given["x"]), part_of(f, layer, f.block(), outputs), own, residual)
    return f.built()


def multiplied(
    kind: Callable[..., Any],
    f: Device,
    layer: Layer,
    size: Any,
    x: Val,
    part: Part,
    own: Rows,
    residual: Val | None = None,
) -> None:
    """What a thread of a kernel does that is written as a `kind` of kernel under construction: its sums, then the results of these. size: how many rows
    of x there are at most, or a tile."""
    t = kind(f, layer, size, x, part, own)
    t.leave(t.sums(), residual)


def row_address(f: Device, layer: Layer, part: Part, row: Val) -> Val:
    """Where a row of W begins."""
    if part.v is None:
        return f.at(part.w, row * layer.row_bytes, "i8")
    return f.at(f.select((row & 1).cmp("eq", 1), part.v, part.w), row / 2 * layer.row_bytes, "i8")


def finished(f: Device, layer: Layer, part: Part, row: Val, column: Val, sums: list[Val], residual: Val | None) -> Val:
    """A result from its sum, or the sums of gate and up: each step but the last is rounded as the ops' meaning says; float32."""
    if layer.gated:
        gate, up = (f.rounded(s, layer.dtype) for s in sums)
        return f.rounded(f.activate(layer.activation, gate), layer.dtype) * up
    (value,) = sums
    if part.b is not None:
        value = value + f.load_f32(part.b, column, layer.dtype, lanes=1)
    if layer.activation != "none":
        value = f.activate(layer.activation, f.rounded(value, layer.dtype))
    if residual is not None:
        value = f.rounded(value, layer.dtype) + f.load_f32(residual, row * part.n + column, layer.dtype, lanes=1)
    return value


# Bits of a number in whose lowest bits a code stands as an integer above it, and that number; of 16 bits twice.
_ABOVE = {"bfloat16": (0x43004300, 128.0), "float16": (0x64006400, 1024.0), "float32": (0x4B000000, 8388608.0)}
_MANTISSA = {"bfloat16": (7, 127), "float16": (10, 15), "float32": (23, 127)}
"""Mantissa bits, and the exponent's bias."""


def decoded(f: Device, layer: Layer, part: Part, words: list[Val], scales: list[tuple[Val, Val]]) -> list[Val]:
    """Words of codes as pairs of the layer's dtype, i32, in the order that `inputs` gives pairs of x in.

    Codes of up to 4 bits become a power of two plus the code by their bits alone, the grid's middle is taken off exactly, and a pair is
    rounded once, by the scale. Small floats become numbers by moving their bits. Levels of a table are looked up in shared memory. scales:
    per word, see `scale_and_zero`.
    """
    kind = SCHEMES[layer.scheme]
    lowest, halves = (0x000F000F, 4) if kind.per_byte == 2 else (0x00FF00FF, 2)
    found = []
    for word, how in zip(words, scales, strict=True):
        if kind.uniform and kind.per_byte == 1:
            found += [
                _scaled(f, layer, f.pair(_byte(f, word, i), _byte(f, word, i + 2), layer.dtype), *how) for i in range(2)
            ]
        else:
            found += [_numbers(f, layer, part, (word >> (16 // halves * i)) & lowest, *how) for i in range(halves)]
    return found


def decoded_pair(f: Device, layer: Layer, part: Part, word: Val, scale: Val, zero: Val) -> Val:
    """The two codes that stand lowest in a word, neighbours in their row, as a pair of the layer's dtype, i32: see `decoded`."""
    kind = SCHEMES[layer.scheme]
    if kind.uniform and kind.per_byte == 1:
        return _scaled(f, layer, f.pair(_byte(f, word, 0), _byte(f, word, 1), layer.dtype), scale, zero)
    lowest, apart = (0x000F000F, 12) if kind.per_byte == 2 else (0x00FF00FF, 8)
    both = word & ((1 << (16 // kind.per_byte)) - 1)
    return _numbers(f, layer, part, (both | (both << apart)) & lowest, scale, zero)


def decoded_single(f: Device, layer: Layer, part: Part, word: Val, scale: Val, zero: Val) -> list[Val]:
    """The four codes that stand lowest in a word as float32, of layers in float32: the level less the zero, exactly, times the scale, rounded."""
    bits = 8 // SCHEMES[layer.scheme].per_byte
    codes = ((word >> (bits * i)) & ((1 << bits) - 1) for i in range(4))
    return [_level(f, layer, part, code, zero) * scale for code in codes]


def _level(f: Device, layer: Layer, part: Part, code: Val, zero: Val) -> Val:
    """What a code, i32, means before it is scaled, float32."""
    kind = SCHEMES[layer.scheme]
    if part.table is not None:
        return f.load("float", f.at(part.table, f.cast("zext", code, "i64"), "float32"))
    if not kind.mantissa:
        return f.as_type(code | _ABOVE["float32"][0], "float") - zero
    mantissa, bias = _MANTISSA["float32"]
    sign = 1 << (kind.bits - 1)
    moved = ((code & sign) << (32 - kind.bits)) | ((code & (sign - 1)) << (mantissa - kind.mantissa))
    return f.as_type(moved, "float") * 2.0 ** (bias - kind.bias)  # exactly, subnormal numbers included


def _scaled(f: Device, layer: Layer, codes: Val, scale: Val, zero: Val) -> Val:
    """A pair of codes, numbers of the dtype in an i32, less the zero, scaled."""
    pair = PAIRS[layer.dtype]
    less = f.op(f"fsub {pair} {f.as_type(codes, pair).name}, {zero.name}", pair)
    return f.as_type(f.op(f"fmul {pair} {less.name}, {scale.name}", pair), "i32")


def _numbers(f: Device, layer: Layer, part: Part, codes: Val, scale: Val, zero: Val) -> Val:
    """Two codes, in the lowest bits of halves of an i32, in the dtype, scaled."""
    kind, pair = SCHEMES[layer.scheme], PAIRS[layer.dtype]
    if part.table is not None:
        own = (f.cast("zext", code, "i64") for code in (codes & 0xFFFF, codes >> 16))
        low, high = (f.load("float", f.at(part.table, code, "float32")) * scale for code in own)
        return f.pair(low, high, layer.dtype)
    if not kind.mantissa:
        return _scaled(f, layer, codes | _ABOVE[layer.dtype][0], scale, zero)
    mantissa, bias = _MANTISSA[layer.dtype]
    signs = (codes & ((1 << (kind.bits - 1)) * 0x10001)) << (16 - kind.bits)
    sizes = (codes & (((1 << (kind.bits - 1)) - 1) * 0x10001)) << (mantissa - kind.mantissa)
    # The exponent's bias is made up for exactly, subnormal numbers included, before the scale rounds.
    power = f.twice(f.const(2.0 ** (bias - kind.bias), "float"), layer.dtype)
    whole = f.op(f"fmul {pair} {f.as_type(signs | sizes, pair).name}, {power.name}", pair)
    return f.as_type(f.op(f"fmul {pair} {whole.name}, {scale.name}", pair), "i32")


def _byte(f: Device, word: Val, number: int) -> Val:
    """A byte of a word, less 128, as a float."""
    bits = ((word >> (8 * number)) & 0xFF) | 0x4B000000
    return f.cast("bitcast", bits, "float") - (8388608.0 + 128.0)


def table_of(f: Device, layer: Layer) -> Val | None:
    """The levels of a scheme that is a table, float32 in shared memory; a barrier is behind them."""
    if not layer.scheme or SCHEMES[layer.scheme].computes:
        return None
    levels = [float(level) for level in SCHEMES[layer.scheme].levels]
    held, thread = f.shared(4 * len(levels)), f.thread()

    def fill() -> None:
        level = f.const(levels[0], "float")
        for number, value in enumerate(levels[1:], 1):
            level = f.select(thread.cmp("eq", number), f.const(value, "float"), level)
        f.store(level, f.at(held, thread, "float32"))

    f.when(thread < len(levels), fill)
    f.barrier()
    return held


def inputs(f: Device, layer: Layer, words: list[Val]) -> list[Val]:
    """Numbers of x that meet a chunk of weights, as i32 words, in pairs in the order of `decoded`: for floats as they lie."""
    if not layer.scheme:
        return words
    found = []
    step = 2 * SCHEMES[layer.scheme].per_byte  # words per word of codes
    for at in range(0, len(words), step):
        half = step // 2
        for i in range(half):
            low, high = words[at + i], words[at + half + i]
            found += [(low & 0xFFFF) | (high << 16), (low >> 16) | (high & -65536)]
    return found


def scale_and_zero(f: Device, layer: Layer, part: Part, row: Val, first: Val) -> tuple[Val, Val]:
    """Of the codes from a row's number `first` on, each twice, in the layer's dtype; the zero is that of codes as `decoded` makes numbers of them. For a
    table the scale is float32, and for layers in float32 both are once."""
    kind = SCHEMES[layer.scheme]
    group = first / layer.group if layer.group else f.i64(0)
    at = row * layer.groups + group
    assert part.s is not None
    scale = f.load_f32(part.s, at, layer.scales, lanes=1)
    if part.table is not None:
        return scale, scale
    offset = _ABOVE[layer.dtype][1] if kind.per_byte == 2 or layer.dtype == "float32" else -128.0
    if part.z is None:
        zero = f.const(kind.middle + offset, "float")
    else:
        stored = f.load("i8", f.at(part.z, at, "uint8"))
        zero = f.cast("uitofp", stored, "float") + offset
    if layer.dtype == "float32":
        return scale, zero
    return f.twice(scale, layer.dtype), f.twice(zero, layer.dtype)


def scales_of(f: Device, layer: Layer, part: Part, row: Val, number: Val) -> list[tuple[Val, Val]]:
    """Scale and zero of each of the four words of a row's chunk of that number, see `scale_and_zero`."""
    chunk, first = layer.codes_per_chunk, number * layer.codes_per_chunk
    apart = chunk // layer.group if layer.group and layer.group < chunk else 1
    found = [scale_and_zero(f, layer, part, row, first + i * (chunk // apart)) for i in range(apart)]
    return [found[i * apart // 4] for i in range(4)]
