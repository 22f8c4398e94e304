"""Products whose weights are codes with a scale per group of inputs: how a block is multiplied, as Pallas source and as work of the units.

Codes of 4 bits lie two in a byte, as `ops.pack_codes` packs them, and stay so in HBM and in VMEM. Eight rows of inputs are a row of words of 32
bits. The vector unit takes one nibble out of each half of the words (for x int8: out of each byte) and makes numbers of all lanes at once: moved behind
the exponent of 1, a nibble c is the bfloat16 1 + c / 16, exactly. So rows come out in another order than that of the inputs, and x is put
into the same order before the kernel (`ordering`). What the numbers are too large by, the 1 and the zero, is taken off the sums: it is the
same for all inputs of a group, times the sum of x.

Groups are scaled in one of two places. Few rows ("sums"): each group's sum is scaled; where a matrix unit is deeper than a group, x is
stacked, once per group with zeros elsewhere, so that weights are pushed once. Many rows ("tile"): numbers are scaled before they are multiplied,
and rounded to x's dtype, as weights in that dtype are.
"""

from __future__ import annotations

import attrs

from jisu.compiler.graph import Node
from jisu.compiler.schemes import SCHEMES
from jisu.targets.tpu.chip import Chip, itemsize
from jisu.targets.tpu.spec import MIDDLE, Product

LANES = 128
"""Inputs whose order is changed together."""
GROUPS = (32, 64, 128)
"""Sizes of groups that kernels read."""
_SUM, _TILE, _GRID, _STACK = 3, 4, 8, 3
"""Operations of the vector unit: on each scaled sum, each scaled number, each scale (and zero), each number of x that is stacked and summed."""
_UNPACK = 11
"""Operations on a word of 8 codes: four times a bit field is taken out and an exponent put in, three times bits are moved."""


def reads(node: Node) -> bool:
    """Whether kernels read the weights of a `quantized_linear` or `levels_linear` as codes with a scale per group: of 4 or 8 bits, integers."""
    kind, k = SCHEMES[node.scheme], inputs_of(node)
    rounded = "records" in node.attributes
    if node.group not in GROUPS or not kind.uniform or kind.bits not in (4, 8) or k % 8:
        return False
    return not rounded or (not node.own and SCHEMES[node.records].uniform)


def inputs_of(node: Node) -> int:
    """Inputs of a layer."""
    x = node.operands[0]
    assert x is not None
    return int(node.attributes.get("k", x.shape[-1]))


@attrs.frozen
class Grouped:
    """How a product in blocks of `rows` rows is multiplied by a matrix unit whose tiles of weights are `depth` deep."""

    product: Product
    rows: int
    depth: int

    @property
    def place(self) -> str:
        """Where scales apply: "sums" or "tile"."""
        few = self.rows <= min(self.product.group, self.depth)
        return "sums" if few or self.product.dtype == "int8" else "tile"

    @property
    def stack(self) -> int:
        """How often a row of x stands in the block that is multiplied."""
        return max(self.depth // self.product.group, 1) if self.place == "sums" else 1

    def operations(self, rows: int, k: int, columns: int) -> dict[str, int]:
        """Operations of the vector unit on 32-bit elements, for x [rows, k] and w [k, columns]: simple ones, and those that make another dtype."""
        p, numbers = self.product, k * columns
        grid = k // p.group * columns * _GRID * (1 + p.zeros)
        scaled = rows * columns * (k // self.depth) * self.stack * _SUM + rows * k * self.stack * _STACK
        scaled = scaled if self.place == "sums" else numbers * _TILE
        unpacked = numbers * _UNPACK // 8 * (p.weights == "int4")
        widened = numbers * (p.weights == "int8" and p.dtype != "int8")
        return {"alu": unpacked + grid + scaled, "element": widened}


def depth(chip: Chip, k: int) -> int:
    """How deep a matrix unit's tile of weights is, of k inputs."""
    return chip.mxu if k % chip.mxu == 0 else LANES


def chunk(k: int, most: int) -> int:
    """How many inputs are multiplied at once."""
    return next(n for n in (512, 256, LANES) if k % n == 0 and (n <= most or n == LANES))


def lanes_of_word(dtype: str) -> int:
    """Numbers that a word of 32 bits gives at once: x float32 is multiplied as parts in bfloat16."""
    return 4 if dtype == "int8" else 2


def ordering(product: Product) -> list[str]:
    """Lines that put x into the order in which codes of 4 bits come out: a product with zeros and ones, which is exact, and faster for a chip than
    moving lanes."""
    per = lanes_of_word(product.dtype)
    how = {
        "int8": ", preferred_element_type=jnp.int32).astype(jnp.int8)",
        "bfloat16": ", preferred_element_type=jnp.float32).astype(jnp.bfloat16)",
        "float32": ", precision=lax.Precision.HIGHEST)",
    }[product.dtype]
    return [
        "# In the order in which codes come out of words, 128 inputs by 128.",
        f"order = jnp.arange({LANES}).reshape({LANES // 8}, {per}, {8 // per}).transpose(2, 0, 1).reshape(1, {LANES})",
        f"moved = (lax.broadcasted_iota(jnp.int32, ({LANES}, {LANES}), 0) == order).astype(jnp.{product.dtype})",
        f"arrays[0] = jnp.dot(arrays[0].reshape(PADDED[0][0], -1, {LANES}), moved{how}.reshape(PADDED[0])",
    ]


def helper(product: Product, rows: int, unit: int, inner: int) -> str:
    """Functions of a kernel's module, of which `add_product(sums, x, w, scale[, zero], grid)` adds a block of x @ w; all are references."""
    how, p = Grouped(product, rows, unit), product
    packed, floats = p.weights == "int4", p.dtype != "int8"
    multiplied = "bfloat16" if p.dtype == "float32" and how.place == "sums" else p.dtype
    # A number is (code + added) / unit_of; what it is too large by is taken off.
    size = 16 if packed and floats else 1
    middle = MIDDLE[p.weights]
    # The zero's code as a number: int8 are levels, about the middle.
    constant = (1.0 + middle / size if size > 1 else middle) if packed else 0.0
    bias = 1.0 if size > 1 else 0.0 if packed else -float(middle)
    slabs = 8 // lanes_of_word(p.dtype) if packed else 1
    zero = ", zero" if p.zeros else ""
    shift = f" - grid[1, c, g : g + 1, :columns] * {'whole[at]' if how.place == 'sums' else '1.0'}" if p.zeros else ""
    if not p.zeros and constant:
        shift = f" - {constant!r} * whole[at]" if how.place == "sums" else f" - {constant!r}"
    shift = shift.removesuffix(" * 1.0")
    lines = [
        f"GROUP, CHUNK, DEPTH = {p.group}, {inner}, {unit}  # inputs: of a group, multiplied at once, of a matrix unit's tile of weights",
        "PER = CHUNK // GROUP",
        "",
        "",
        *(_HALVES if p.scales == "float16" else ()),
        *(_unpack(p) if packed else ()),
        f"def add_product(sums, x, w, scale{zero}, grid):",
        f'    """Add x @ w to sums; {_TOLD[how.place]}"""',
        "    rows, columns = sums.shape",
        f"    scales = {'halves(scale[...])' if p.scales == 'float16' else 'scale[...]'}"
        + f" * {float(size)!r}" * (size > 1),
    ]
    if p.zeros:
        text = "zero[...].astype(jnp.int32).astype(jnp.float32)" + f" * {1 / size!r}" * (size > 1)
        lines.append(f"    zeros = {text}" + (f" + {bias!r}" if bias else ""))
    lines += [
        "    for c in range(x.shape[1] // CHUNK):",
        "        grid[0, c, :, :columns] = scales[c * PER : (c + 1) * PER]",
        *(["        grid[1, c, :, :columns] = zeros[c * PER : (c + 1) * PER]"] if p.zeros else []),
        "",
        "    def chunk(c, carry):",
        "        part = x[:, pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)]",
    ]
    high = "CHUNK // 2" if packed else "CHUNK"
    read = f"w[pl.ds(pl.multiple_of(c * ({high}), {high}), {high})]"
    lines.append(f"        numbers = {f'unpack({read})' if packed else f'{read}.astype(jnp.{multiplied})'}")
    lines += _sums(p, how, slabs, shift) if how.place == "sums" else _tile(p, slabs, shift)
    lines += ["        return carry", "", "    lax.fori_loop(0, x.shape[1] // CHUNK, chunk, 0)", "", "", ""]
    return "\n".join(lines)


_TOLD = {
    "sums": "each group's sum is scaled.",
    "tile": "numbers are scaled before they are multiplied.",
}

_HALVES = '''def halves(bits):
    """float32 of the bits of float16."""
    bits = bits.astype(jnp.int32)
    size, sign = bits & 0x7FFF, (bits & 0x8000) << 16
    normal = lax.bitcast_convert_type(sign | size << 13, jnp.float32) * 2.0**112
    small = size.astype(jnp.float32) * jnp.where(sign == 0, 2.0**-24, -(2.0**-24))
    return jnp.where(size < 0x400, small, normal)

'''.splitlines()
_HALVES = [*_HALVES, ""]


def _unpack(p: Product) -> list[str]:
    if p.dtype == "int8":
        told = '"""Codes int8 of nibbles: of each byte the low ones of 128 inputs, then the high ones."""'
        parts = ["pltpu.bitcast(lax.shift_right_logical(block, jnp.int32(4 * i)) & 0x0F0F0F0F, jnp.int8)", "2"]
    else:
        told = '"""1 + code / 16 of nibbles, bfloat16: of each half of a word the lowest ones of 128 inputs, then the next."""'
        moved = "(block << 3 if i == 0 else lax.shift_right_logical(block, jnp.int32(4 * i - 3)))"
        parts = [f"pltpu.bitcast({moved} & 0x00780078 | 0x3F803F80, jnp.bfloat16)", "4"]
    return [
        "def unpack(codes):",
        f"    {told}",
        "    words, found = pltpu.bitcast(codes, jnp.int32), []",
        "    for first in range(0, words.shape[0], 16):",
        "        block = words[first : first + 16]",
        f"        found += [{parts[0]} for i in range({parts[1]})]",
        "    return jnp.concatenate(found, axis=0)",
        "",
        "",
    ]


def _sums(p: Product, how: Grouped, slabs: int, shift: str) -> list[str]:
    parts = 3 if p.dtype == "float32" else 1
    lines = []
    if parts > 1:
        lines += [
            "        # Parts in bfloat16 that add up to x: bits of float32, eight by eight.",
            "        high = lax.bitcast_convert_type(lax.bitcast_convert_type(part, jnp.int32) & -65536, jnp.float32)",
            "        middle = lax.bitcast_convert_type(lax.bitcast_convert_type(part - high, jnp.int32) & -65536, jnp.float32)",
            "        part = jnp.concatenate([high, middle, part - high - middle], axis=0)",
        ]
    dtype = "bfloat16" if parts > 1 else p.dtype
    summed = "int32" if p.dtype == "int8" else "float32"
    wide = "int32" if p.dtype == "int8" else "float32"
    lines += [
        "        total = jnp.zeros((rows, columns), jnp.float32)",
        "        for first in range(0, CHUNK, DEPTH):",
        f"            stack = part[:, first : first + DEPTH].astype(jnp.{wide})",
    ]
    if how.stack > 1:
        inputs = 8 // slabs  # of a row of words that come out next to one another
        per_slab = LANES // slabs
        group = f"lax.shift_right_logical(lane & {per_slab - 1}, jnp.int32({(p.group // slabs).bit_length() - 1}))"
        if p.group == LANES:
            group = "0"
        del inputs
        lines += [
            "            # Once per group, with zeros elsewhere.",
            f"            lane = lax.broadcasted_iota(jnp.int32, ({parts} * rows, DEPTH), 1)",
            f"            group = lax.shift_right_logical(lane, jnp.int32(7)) * {LANES // p.group} + {group}",
            f"            stack = jnp.concatenate([jnp.where(group == g, stack, 0) for g in range({how.stack})], axis=0)",
        ]
    whole = ".astype(jnp.float32)" if wide == "int32" else ""
    lines += [
        f"            found = jnp.dot(stack.astype(jnp.{dtype}), numbers[first : first + DEPTH], preferred_element_type=jnp.{summed})"
        + ".astype(jnp.float32)" * (summed == "int32"),
        *([f"            whole = jnp.sum(stack, axis=1, keepdims=True){whole}"] if shift else []),
    ]
    if parts > 1:
        names = ["found", *(["whole"] if shift else [])]
        for name in names:
            width = "columns" if name == "found" else "1"
            lines.append(f"            {name} = {name}.reshape({how.stack}, 3, rows, {width})")
            lines.append(
                f"            {name} = ({name}[:, 2] + {name}[:, 1] + {name}[:, 0]).reshape({how.stack} * rows, {width})"
            )
    lines += [
        f"            for i in range({how.stack}):",
        "                at, g = slice(i * rows, (i + 1) * rows), first // GROUP + i",
        f"                total += (found[at]{shift}) * grid[0, c, g : g + 1, :columns]",
        "        sums[...] += total",
    ]
    return lines


def _tile(p: Product, slabs: int, shift: str) -> list[str]:
    """Rows of a block of 128 come by slabs, each of which has rows of all its groups."""
    high = ", precision=lax.Precision.HIGHEST" if p.dtype == "float32" else ""
    return [
        "        scaled = []",
        f"        for first in range(0, CHUNK, {min(p.group, LANES) // slabs}):",
        f"            g = first // 128 * {LANES // p.group} + first % {LANES // slabs} // {p.group // slabs}",
        f"            found = numbers[first : first + {p.group // slabs}].astype(jnp.float32)",
        f"            scaled.append((found{shift}) * grid[0, c, g : g + 1, :columns])",
        f"        tile = jnp.concatenate(scaled, axis=0).astype(jnp.{p.dtype})",
        f"        sums[...] += jnp.dot(part, tile{high}, preferred_element_type=jnp.float32)",
    ]


def grid_shape(product: Product, k: int, inner: int, columns: int) -> tuple[int, int, int, int]:
    """Of the scratch memory that holds a block's scales, and what is taken off, in float32."""
    return 1 + product.zeros, k // inner, inner // product.group, columns


def grid_bytes(product: Product, k: int, inner: int, columns: int, chip: Chip) -> int:
    """Bytes of that memory, as the chip lays it out."""
    kinds, chunks, per, _ = grid_shape(product, k, inner, columns)
    return int(kinds * chunks * -(-per // chip.sublanes) * chip.sublanes * columns * itemsize("float32"))
