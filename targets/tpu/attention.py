"""Attention for TPUs as Pallas source, written out from one template: prefill, and decode over a contiguous or a paged KV cache.

Keys stay in HBM. A step copies a tile of keys and values into one of two slots in VMEM while the step before computes with the other, across
blocks of queries, too: the last step of a block starts the first copies of the next one. With
a page table in scalar memory, a tile is made of pages that lie anywhere. Softmax runs along: the peak of the scores so far, the sum of
exponentials below it and the weighted sum of values, scaled anew whenever the peak rises (Dao et al., 2022, "FlashAttention"; for the pages Kwon et
al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"). Tiles that no query of a block sees are
neither copied nor computed, so a short sequence beside a long one costs what it holds.

Queries that share keys are rows of one block: a decode step with 8 queries per key head multiplies 8 rows at once.

A cache may hold records (`jisu.compiler.rows`) in two arrays: codes, and the scales and offsets of all key heads of a slot side by side, as rows
of one array would take twice the lanes. Codes are multiplied as they are, exactly; a key's scale and offset then apply to its score, a value's
to its weight. Where a head's codes don't fill the lanes, a row holds those of several key heads. It is
multiplied whole: queries have zeros where other heads' codes are, and of the sums of values those of the own head are taken.

Caches have rows of whole lanes (`layout.lay_out`): XLA stores an array whose last axis is shorter the other way around, with its rows behind each
other in the lanes, and would copy the whole of it before each call of a kernel.
"""

from __future__ import annotations

import attrs

from jisu.compiler.errors import CompileError
from jisu.compiler.rows import TAIL
from jisu.compiler.types import TensorType, round_up
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.splice import Part

_ROWS, _KEYS, _HEADS = 256, 512, 8  # of a tile, at most
_LANES = 128
DTYPES = ("bfloat16", "float32")


@attrs.frozen
class Attention:
    """softmax(softcap·tanh(scale·q·k / softcap)) v of q [batch, queries, groups * repeats, d] over keys and values, with d and e channels.

    causal: query i sits in slot first + i, and sees slots from `start` to its own, with `window` only the last so many; both int32 [batch].
    Else all keys are seen. cached: keys lie in a cache [batch, groups, keys, d], where row r holds the newest slot n with n % keys == r; with `page`
    in pages [pages, groups, page, d] behind a table int32 [batch, keys / page]. Else they are [batch, keys, groups, d].
    records: of a cache, bits of the codes (8 or 4) that are in the place of numbers, uint8, with the tails of their records beside them: uint8
    [batch, keys, groups * 4 and zeros to whole lanes], or by pages. Codes are [batch, groups / p, keys, p * d * records / 8], p being `beside`
    (and so are pages).
    """

    batch: int
    queries: int
    groups: int
    repeats: int
    d: int
    e: int
    keys: int
    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    cached: bool = False
    page: int = 0
    pages: int = 0
    dtype: str = "bfloat16"
    records: int = 0

    @property
    def stored(self) -> str:
        """The dtype of keys and values in HBM."""
        return "uint8" if self.records else self.dtype

    def heads_of(self, channels: int) -> int:
        """Key heads whose codes lie in one row, of keys or values of so many channels."""
        return beside(self.groups, channels * self.records // 8) if self.records else 1

    def lanes_of(self, channels: int) -> int:
        """What such a row has of numbers."""
        return self.heads_of(channels) * channels

    def width_of(self, channels: int) -> int:
        """What it has of elements: numbers, or bytes of codes."""
        return self.lanes_of(channels) * (self.records or 8) // 8

    @property
    def tails(self) -> int:
        """Bytes of the tails of a slot's records."""
        return padded(self.groups * TAIL)

    @property
    def inputs(self) -> tuple[tuple[str, TensorType], ...]:
        """What the kernel takes, by name."""
        b, g, d = self.batch, self.groups, self.d

        def held(channels: int) -> tuple[int, ...]:
            heads, width = g // self.heads_of(channels), self.width_of(channels)
            if self.page:
                return self.pages, heads, self.page, width
            return (b, heads, self.keys, width) if self.cached else (b, self.keys, heads, width)

        where = [("first", TensorType((b,), "int32")), ("start", TensorType((b,), "int32"))]
        table = [("table", TensorType((b, self.keys // self.page), "int32"))] if self.page else []
        q = ("q", TensorType((b, self.queries, g * self.repeats, d), self.dtype))
        both = (("k", TensorType(held(d), self.stored)), ("v", TensorType(held(self.e), self.stored)))
        slots = (self.pages, self.page) if self.page else (b, self.keys)
        tails = [(f"{n}_tails", TensorType((*slots, self.tails), "uint8")) for n in "kv" if self.records]
        return (*where, *table, q, *both, *tails)

    @property
    def result(self) -> TensorType:
        """What it returns."""
        return TensorType((self.batch, self.queries, self.groups * self.repeats, self.e), self.dtype)


def beside(groups: int, width: int) -> int:
    """How many key heads' elements, so many each, lie side by side in a cache's row: as many as fill its lanes."""
    return max(n for n in (1, 2, 4, 8) if groups % n == 0 and (n == 1 or n * width <= _LANES))


def padded(width: int, heads: int = 1) -> int:
    """Elements that a key head takes in rows of whole lanes that so many share."""
    return round_up(width, _LANES // heads)


@attrs.frozen
class Blocks:
    """Sizes of blocks. rows: of queries' rows, `padded` in all; heads: key heads of a step; a step's keys are `pieces` of `piece` keys, and
    `keys` in all, padded."""

    rows: int
    padded: int
    heads: int
    piece: int
    pieces: int
    keys: int


def choose_blocks(a: Attention, chip: Chip) -> Blocks:
    """Blocks for a chip. CompileError where a cache's rows, or a page's, aren't whole native tiles."""
    if a.dtype not in DTYPES:
        raise CompileError(f"attention is computed in {' or '.join(DTYPES)}, not in {a.dtype}")
    native = chip.sublane_tile(a.stored)
    rows = a.queries * a.repeats
    tile = min(round_up(rows, chip.sublane_tile(a.dtype)), _ROWS)
    whole_rows = max(a.heads_of(a.d), a.heads_of(a.e))
    counts = range(whole_rows, _HEADS + 1, whole_rows)
    heads = whole_rows if rows > _ROWS // 4 else max(n for n in counts if a.groups % n == 0)
    if not a.cached:
        piece = min(round_up(a.keys, chip.lanes), _KEYS)
        return Blocks(tile, round_up(rows, tile), heads, piece, 1, round_up(a.keys, piece))
    whole = a.page or a.keys
    if whole % native:
        raise CompileError(
            f"a cache of {whole} rows{' per page' if a.page else ''} isn't made of whole tiles of {native} rows of {a.stored} on {chip.name}"
        )
    if a.page:
        table = a.keys // a.page
        pieces = max((n for n in range(1, table + 1) if table % n == 0 and n * a.page <= _KEYS), default=1)
        return Blocks(tile, round_up(rows, tile), heads, a.page, pieces, a.keys)
    piece = max(n for n in range(native, min(_KEYS, whole) + 1, native) if whole % n == 0)
    return Blocks(tile, round_up(rows, tile), heads, piece, 1, a.keys)


def part(a: Attention, chip: Chip) -> Part:
    """The kernel with the types that it takes, for `splice`."""
    return Part(source(a, chip), tuple(t for _, t in a.inputs), a.result)


def source(a: Attention, chip: Chip, blocks: Blocks | None = None) -> str:
    """The module's text. It defines `kernel(*arrays, interpret=False)`: arrays in the order of `Attention.inputs`.

    CompileError: the cache can't be copied in whole tiles.
    """
    n = choose_blocks(a, chip) if blocks is None else blocks
    names = [name for name, _ in a.inputs]
    shapes = "".join(f"\n    {tuple(t.shape)},  # {name}, {t.dtype}" for name, t in a.inputs)
    scalars = ["first", "start", *(["table"] if a.page else [])]
    flat = ["first", "start", *(["table.reshape(-1)"] if a.page else [])]
    step = n.piece * n.pieces
    in_pages = f" in {n.pieces} pages" if a.page else ""

    def packed(channels: int) -> str:
        return f"(2, {n.pieces}, {n.heads // a.heads_of(channels)}, {n.piece}, {a.width_of(channels)})"

    more = ("k_tails", "v_tails") if a.records else ()
    hbm, vmem = ("".join(f", {name}{suffix}" for name in more) for suffix in ("_hbm", ""))
    return f'''"""{_title(a)}

For TPU {chip.name}: blocks of {n.rows} rows of queries and {step} keys{in_pages}, {n.heads} key heads at once; written by jisu.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Shapes in HBM.
PADDED = ({shapes}
)
DTYPES = ({", ".join(repr(t.dtype) for _, t in a.inputs)})

BATCH, QUERIES, GROUPS, REPEATS = {a.batch}, {a.queries}, {a.groups}, {a.repeats}  # queries' heads are groups * repeats
D, E = {a.lanes_of(a.d)}, {a.lanes_of(a.e)}  # channels of keys and of values{_shared(a)}
KEYS = {a.keys}{f"  # at most; {a.keys // a.page} pages of {a.page}" if a.page else ""}
ROWS, BLOCK = {n.padded}, {n.rows}  # rows of queries, padded, and those of a block: row r is of query r / REPEATS
BLOCKS = ROWS // BLOCK
HEADS = {n.heads}  # key heads of a block
PIECES, PIECE = {n.pieces}, {n.piece}  # what a step copies of keys
STEP = PIECES * PIECE
STEPS = {n.keys // step}
SCALE = {a.scale!r}
NOTHING = -1e30  # a score of what isn't seen


copy = pltpu.make_async_copy

{_grid(a)}
# Memory: scalars; blocks of queries and of their numbers; keys and values in HBM; the block of results; two slots of keys and values;
# per head the peak, the sum of exponentials and the sum of values; how many steps went before; semaphores.
def body({", ".join(scalars)}, q, number, k_hbm, v_hbm{hbm}, result, keys, values{vmem}, peak, total, sums, before, copied):
    def extent(b, i):
        """Where the steps begin and end whose keys some query of a block sees."""
{_extent(a)}
        return begin, end

    def copies(b, g, step, slot):
        """Of a step's keys and values into a slot."""
        found = []
        for piece in range(PIECES):
{_places(a)}
            found.append(copy(k_hbm.at[{_place(a, a.d)}], keys.at[slot, piece], copied.at[0, slot]))
            found.append(copy(v_hbm.at[{_place(a, a.e)}], values.at[slot, piece], copied.at[1, slot]))
{_copied_tails(a)}        return found

    def start_block(block, slot):
        """Start the first step's copies of a block, if there is one that sees any keys."""
        i = lax.rem(block, BLOCKS)
        g = lax.rem(lax.div(block, BLOCKS), GROUPS // HEADS)
        b = jnp.minimum(lax.div(block, BLOCKS * (GROUPS // HEADS)), BATCH - 1)
        begin, end = extent(b, i)

        @pl.when((block < BATCH * (GROUPS // HEADS) * BLOCKS) & (begin < end))
        def _():
            for c in copies(b, g, begin, slot):
                c.start()

    b, g, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block = (b * (GROUPS // HEADS) + g) * BLOCKS + i
    begin, end = extent(b, i)
{_slots(a)}
    @pl.when(block == 0)
    def _():
        before[0] = 0
        start_block(0, 0)

    done = before[0]
    before[0] = done + jnp.maximum(end - begin, 0)
    peak[...] = jnp.full((HEADS, BLOCK, 1), NOTHING, jnp.float32)
    total[...] = jnp.zeros((HEADS, BLOCK, 1), jnp.float32)
    sums[...] = jnp.zeros((HEADS, BLOCK, E), jnp.float32)
{_sums_of_queries(a)}
    def attend(step, carry):
        slot = lax.rem(done + step - begin, 2)

        @pl.when(step + 1 < end)
        def _():
            for c in copies(b, g, step + 1, 1 - slot):
                c.start()

        @pl.when(step + 1 == end)
        def _():
            start_block(block + 1, 1 - slot)

        for c in copies(b, g, step, slot):
            c.wait()
        place = step * STEP + lax.broadcasted_iota(jnp.int32, (1, STEP), 1)
{_visible(a)}
{_grids(a)}        for h in range(HEADS):
{_numbers(a)}
            scores = lax.dot_general(q[0, h], k, (((1,), (1,)), ((), ())){_precise(a)}, preferred_element_type=jnp.float32){_scaled(a)}
{_softcap(a)}            old = peak[h]
            new = jnp.maximum(old, jnp.max(jnp.where(visible, scores, NOTHING), axis=1, keepdims=True))
            weight = jnp.where(visible, jnp.exp(scores - new), 0.0)
            kept = jnp.exp(old - new)
            peak[h] = new
            total[h] = total[h] * kept + jnp.sum(weight, axis=1, keepdims=True)
{_added(a)}
        return carry

    @pl.when(begin >= end)
    def _():
        start_block(block + 1, lax.rem(done, 2))

    lax.fori_loop(begin, end, attend, 0)
    for h in range(HEADS):
        # A row that sees nothing gives 0.
        result[0, h] = (sums[h] / jnp.where(total[h] > 0.0, total[h], 1.0)).astype(result.dtype)


def kernel({", ".join(names)}, interpret=False):
    """The attention of arrays in HBM, {", ".join(names)}; interpret: False on a TPU, else pltpu.InterpretParams()."""
    q = q.reshape(BATCH, QUERIES, GROUPS, REPEATS, {a.d}).transpose(0, 2, 1, 3, 4).reshape(BATCH, GROUPS, QUERIES * REPEATS, {a.d})
{_spread_queries(a)}    q = jnp.pad(q, [(0, 0), (0, 0), (0, ROWS - QUERIES * REPEATS), (0, 0)])
{_keys(a)}    number = lax.div(lax.iota(jnp.int32, ROWS), jnp.int32(REPEATS)).reshape(ROWS, 1)
    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((BATCH, GROUPS, ROWS, E), jnp.{a.dtype}),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch={len(scalars)},
            grid=(BATCH, GROUPS // HEADS, BLOCKS),
            in_specs=[
                pl.BlockSpec((1, HEADS, BLOCK, D), lambda b, g, i, *_: (b, g, i, 0)),
                pl.BlockSpec((BLOCK, 1), lambda b, g, i, *_: (i, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * {2 + len(more)},
            ],
            out_specs=pl.BlockSpec((1, HEADS, BLOCK, E), lambda b, g, i, *_: (b, g, i, 0)),
            scratch_shapes=[
                pltpu.VMEM({packed(a.d)}, jnp.{a.stored}),
                pltpu.VMEM({packed(a.e)}, jnp.{a.stored}),
{_held_tails(a)}                pltpu.VMEM((HEADS, BLOCK, 1), jnp.float32),
                pltpu.VMEM((HEADS, BLOCK, 1), jnp.float32),
                pltpu.VMEM((HEADS, BLOCK, E), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA(({2 + len(more)}, 2)),
            ],
        ),
        interpret=interpret,
    )({", ".join(flat)}, q, number, k, v{vmem})
    result = result[:, :, : QUERIES * REPEATS]
{_own_values(a)}    result = result.reshape(BATCH, GROUPS, QUERIES, REPEATS, {a.e})
    return result.transpose(0, 2, 1, 3, 4).reshape(BATCH, QUERIES, GROUPS * REPEATS, {a.e})
'''


def _title(a: Attention) -> str:
    kind = "over a paged cache" if a.page else "over a cache" if a.cached else "causal" if a.causal else "of all keys"
    kind += f" of records int{a.records}" if a.records else ""
    more = f", the last {a.window} keys" if a.window else ""
    return f"Attention {kind}{more}: [{a.batch}, {a.queries}, {a.groups * a.repeats}, {a.d}] on up to {a.keys} keys, {a.dtype}."


def _lines(indent: int, *lines: str) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _extent(a: Attention) -> str:
    if not a.causal:
        return _lines(8, "begin, end = 0, STEPS")
    low = f"jnp.maximum(start[b], oldest - {a.window - 1})" if a.window else "start[b]"
    lines = [
        "# Slots of the newest key, and of the block's first and last query.",
        "newest = first[b] + (QUERIES - 1)",
        *(["oldest = first[b] + lax.div(i * BLOCK, REPEATS)"] if a.window else []),
        "youngest = jnp.minimum(first[b] + lax.div(i * BLOCK + (BLOCK - 1), REPEATS), newest)",
        f"begin = lax.div(jnp.maximum({low}, 0), STEP)",
        "end = lax.div(youngest, STEP) + 1",
    ]
    if a.cached:
        lines += [
            "# A cache that is full has gone around: its rows are in no order.",
            "begin = jnp.where(newest >= KEYS, 0, begin)",
            "end = jnp.where(newest >= KEYS, STEPS, end)",
        ]
    return _lines(8, *lines)


def _slots(a: Attention) -> str:
    """What the slots of a cache's rows are computed from."""
    if not a.cached:
        return ""
    lines = [
        "# A cache's first row holds slot `turn`, rows behind the newest key those of the turn before.",
        "newest = first[b] + (QUERIES - 1)",
        "turn = newest - lax.rem(newest, KEYS)",
    ]
    return _lines(4, *lines) + "\n"


def _places(a: Attention) -> str:
    if a.page:
        return _lines(12, f"page = table[b * {a.keys // a.page} + step * PIECES + piece]")
    return _lines(12, "at = pl.ds(pl.multiple_of(step * STEP, STEP), STEP)")


def _place(a: Attention, channels: int) -> str:
    heads = "HEADS" if a.heads_of(channels) == 1 else f"(HEADS // {a.heads_of(channels)})"
    heads = f"pl.ds(g * {heads}, {heads})"
    return f"page, {heads}" if a.page else f"b, {heads}, at"


def _copied_tails(a: Attention) -> str:
    if not a.records:
        return ""
    place = "page" if a.page else "b, at"
    texts = [
        f"found.append(copy({n}_tails_hbm.at[{place}], {n}_tails.at[slot, piece], copied.at[{i}, slot]))"
        for n, i in (("k", 2), ("v", 3))
    ]
    return _lines(12, *texts) + "\n"


def _held_tails(a: Attention) -> str:
    held = f"pltpu.VMEM((2, PIECES, PIECE, {a.tails}), jnp.uint8),"
    return _lines(16, held, held) + "\n" if a.records else ""


def _grid(a: Attention) -> str:
    """The function that reads scales and offsets out of bytes: a matrix unit picks those of some heads, and turns them along the keys."""
    if not a.records:
        return ""
    return f'''
def grid(tails, g):
    """Per head of a block and key, [8, STEP]: scales, and what a level of 0, code {2 ** (a.records - 1)}, stands for."""
    shape = (32, {a.tails})
    row, column = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
    # Row 8 * i + h is byte i of head h.
    picked = column == {TAIL} * (g * HEADS + (row & 7)) + (row >> 3)
    one, numbers = (a.astype(jnp.float32).astype(jnp.bfloat16) for a in (picked, tails.astype(jnp.int32)))
    found = lax.dot_general(one, numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(jnp.int32)
    scale, offset = (
        lax.bitcast_convert_type(found[i : i + 8] << 16 | found[i + 8 : i + 16] << 24, jnp.float32) for i in (0, 16)
    )
    return scale, offset + {2.0 ** (a.records - 1)} * scale


def levels(codes):
    """Codes about 0."""
    codes = codes.astype(jnp.int32){_NIBBLES if a.records == 4 else ""}
    return (codes - {2 ** (a.records - 1)}).astype(jnp.float32).astype(jnp.{a.dtype})

'''


def _sums_of_queries(a: Attention) -> str:
    if not a.records:
        return ""
    return (
        _lines(4, "whole = [jnp.sum(q[0, h].astype(jnp.float32), axis=1, keepdims=True) for h in range(HEADS)]") + "\n"
    )


def _grids(a: Attention) -> str:
    if not a.records:
        return ""
    return _lines(8, *(f"{n}_scale, {n}_zero = grid({n}_tails[slot].reshape(STEP, {a.tails}), g)" for n in "kv")) + "\n"


_NIBBLES = """
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=1)"""


def _numbers(a: Attention) -> str:
    lines = []
    for name, tile, width, channels in (("k", "keys", "D", a.d), ("v", "values", "E", a.e)):
        heads = a.heads_of(channels)
        again = f" if h % {heads} == 0 else {name}" if heads > 1 else ""
        row = f"h // {heads}" if heads > 1 else "h"
        text = f"{tile}[slot, :, {row}].reshape(STEP, {width}{' // 2' if a.records == 4 else ''})"
        lines.append(f"{name} = levels({text}){again}" if a.records else f"{name} = {text}")
    return _lines(12, *lines)


def _shared(a: Attention) -> str:
    return ", those of several heads where their codes share a row" if a.records else ""


def _spread_queries(a: Attention) -> str:
    """Queries with zeros in the lanes of other heads' codes."""
    heads, halves = a.heads_of(a.d), 8 // (a.records or 8)
    if heads == 1:
        return ""
    return (
        _lines(
            4,
            "# A row of codes holds those of its heads one after the other; of two in a byte the lower ones first, then the upper ones.",
            f"q = q.reshape(BATCH, GROUPS // {heads}, {heads}, QUERIES * REPEATS, {halves}, 1, {a.d // halves})",
            f"own = jnp.eye({heads}, dtype=bool).reshape(1, 1, {heads}, 1, 1, {heads}, 1)",
            "q = jnp.where(own, q, 0).reshape(BATCH, GROUPS, QUERIES * REPEATS, D)",
        )
        + "\n"
    )


def _own_values(a: Attention) -> str:
    """Of the sums of all values of a row, those of the own head."""
    heads, halves = a.heads_of(a.e), 8 // (a.records or 8)
    if heads == 1:
        return ""
    return (
        _lines(
            4,
            f"result = result.reshape(BATCH, GROUPS // {heads}, {heads}, QUERIES * REPEATS, {halves}, {heads}, {a.e // halves})",
            f"result = jnp.stack([result[:, :, i, :, :, i] for i in range({heads})], axis=2)",
        )
        + "\n"
    )


def _scaled(a: Attention) -> str:
    if not a.records:
        return " * SCALE"
    return "\n" + _lines(12, "scores = (scores * k_scale[h : h + 1] + whole[h] * k_zero[h : h + 1]) * SCALE")


def _added(a: Attention) -> str:
    if not a.records:
        return _lines(
            12,
            f"sums[h] = sums[h] * kept + jnp.dot(weight.astype(v.dtype), v{_precise(a)}, preferred_element_type=jnp.float32)",
        )
    return _lines(
        12,
        "zeros = jnp.sum(weight * v_zero[h : h + 1], axis=1, keepdims=True)",
        "weight = (weight * v_scale[h : h + 1]).astype(v.dtype)",
        f"sums[h] = sums[h] * kept + zeros + jnp.dot(weight, v{_precise(a)}, preferred_element_type=jnp.float32)",
    )


def _precise(a: Attention) -> str:
    """float32 is multiplied in as many passes as its precision takes."""
    return ", precision=lax.Precision.HIGHEST" if a.dtype == "float32" else ""


def _visible(a: Attention) -> str:
    if not a.causal:
        return _lines(8, "visible = place < KEYS")
    lines = ["slots = place"]
    if a.cached:
        lines = ["slots = jnp.where(turn + place > newest, turn + place - KEYS, turn + place)"]
    lines += ["own = first[b] + number[...]", "visible = (slots <= own) & (slots >= jnp.maximum(start[b], 0))"]
    if a.window:
        lines.append(f"visible = visible & (slots > own - {a.window})")
    return _lines(8, *lines)


def _softcap(a: Attention) -> str:
    return _lines(12, f"scores = jnp.tanh(scores / {a.softcap!r}) * {a.softcap!r}") + "\n" if a.softcap else ""


def _keys(a: Attention) -> str:
    """Keys and values as the kernel copies them."""
    if a.cached:
        return ""
    pad = "[(0, 0), (0, 0), (0, STEPS * STEP - KEYS), (0, 0)]"
    return _lines(4, f"k, v = (jnp.pad(a.transpose(0, 2, 1, 3), {pad}) for a in (k, v))") + "\n"
