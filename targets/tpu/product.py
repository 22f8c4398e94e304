"""A matrix product in TIR, scheduled for a chip: tiles in VMEM, the matrix unit's instructions, and a pipeline of asynchronous copies.

The computation is written once, without tiles (`_computation`); a schedule makes of it what the tiles say. TVM's software pipelining
then gives copied tiles two slots each, starts a step's copies while the step before multiplies, and marks what is started together
(`async_commit_queue_scope`) and how many such groups may still be under way when a step begins (`async_wait_inflight_count`). `steps`
makes blocks of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import tvm
from tvm import s_tir, te, tirx

from jisu.targets.tpu import intrinsics
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.intrinsics import HBM, SUMS, VMEM
from jisu.targets.tpu.spec import Operand, Product
from jisu.targets.tpu.steps import LOAD, overlap
from jisu.targets.tpu.tiles import Tiles, choose_tiles
from jisu.targets.tpu.walk import COMMIT, WAIT, flat, parts, rebuild, substitute


@attrs.frozen(eq=False)
class Lowered:
    """A product's TIR behind the pipeline: buffers still have their axes (slot, row, column), copies and products are `intrinsics`.

    operands: the function's parameters in order, the result last.
    """

    product: Product
    tiles: Tiles
    chip: Chip
    function: Any
    operands: tuple[Operand, ...]


def lower(product: Product, chip: Chip, tiles: Tiles | None = None) -> Lowered:
    """The product's TIR for a chip. CompileError where tiles don't fit, with the tensor named."""
    tiles = choose_tiles(product, chip) if tiles is None else tiles
    tiles.check(product, chip)
    operands = product.operands(*tiles.padded)
    schedule = s_tir.Schedule(_computation(product, operands))
    _Scheduler(schedule, product, tiles, operands).run()
    function = _passes(schedule.mod)["main"]
    function = function.with_body(overlap(function.body, tiles, product.matrices))
    return Lowered(product, tiles, chip, function, operands)


def _passes(module: Any) -> Any:
    t = s_tir.transform
    passes = [
        t.CanonicalizeLoop(),
        t.LowerInitBlock(),
        t.PlanAndUpdateBufferAllocationLocation(),
        t.ConvertBlocksToOpaque(),
        t.CompactBufferAllocation(),
        t.LowerMatchBuffer(),
        t.StmtSimplify(),
        t.InjectSoftwarePipeline(),
        t.LowerOpaqueBlock(),
    ]
    module = tvm.transform.Sequential(passes)(module)
    function = module["main"]
    module = tvm.IRModule({"main": function.with_body(_peel(function.body))})
    return t.StmtSimplify()(module)


def _peel(body: Any) -> Any:
    """The first and last steps of a pipeline one by one: TVM leaves them as loops to be unrolled, with conditions inside."""

    def visit(statement: Any) -> Any:
        if not isinstance(statement, tirx.For) or statement.kind != tirx.ForKind.UNROLLED or not _is_step(statement):
            return None
        first, count = int(statement.min), int(statement.extent)
        return flat([substitute(rebuild(statement.body, visit), statement.loop_var, first + n) for n in range(count)])

    return rebuild(body, visit)


def _is_step(statement: Any) -> bool:
    return any(isinstance(part, tirx.AttrStmt) and part.attr_key in (COMMIT, WAIT) for part in parts(statement))


ACTIVATION: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": lambda x: te.max(x, tirx.const(0, "float32")),
    "relu2": lambda x: te.max(x, tirx.const(0, "float32")) * te.max(x, tirx.const(0, "float32")),
    "gelu": lambda x: (
        x
        * tirx.const(0.5, "float32")
        * (te.erf(x * tirx.const(0.7071067811865476, "float32")) + tirx.const(1, "float32"))
    ),
    "gelu_tanh": lambda x: (
        x
        * tirx.const(0.5, "float32")
        * (
            te.tanh((x + x * x * x * tirx.const(0.044715, "float32")) * tirx.const(0.7978845608028654, "float32"))
            + tirx.const(1, "float32")
        )
    ),
    "silu": lambda x: x / (te.exp(-x) + tirx.const(1, "float32")),
    "sigmoid": lambda x: tirx.const(1, "float32") / (te.exp(-x) + tirx.const(1, "float32")),
}
"""What is computed of a sum x, float32."""


def _computation(product: Product, operands: tuple[Operand, ...]) -> Any:
    """The product without tiles: sums, then everything behind them, as one element of the result needs it."""
    tensors = {o.name: te.placeholder(o.padded, o.dtype, name=o.name) for o in operands[:-1]}
    x, result = tensors["x"], operands[-1]
    summed = product.accumulator

    def multiplied(w: str, name: str) -> Any:
        inner = te.reduce_axis((0, x.shape[1]), name="k")
        grid = [tensors[f"{w}_{n}"] for n in ("scale", "zero") if f"{w}_{n}" in tensors]

        def weight(j: Any) -> Any:
            own = [g[tirx.floordiv(inner, product.group), j] for g in grid]
            return intrinsics.scaled(tensors[w][inner, j].astype(summed), product.weights, *own)

        return te.compute(
            result.padded, lambda i, j: te.sum(x[i, inner].astype(summed) * weight(j), axis=inner), name=name
        )

    sums = multiplied("w", "sums")
    factors = multiplied("u", "factors") if product.gated else None

    def scaled(sum_: Any, channel_scale: str, i: Any, j: Any) -> Any:
        value = sum_[i, j].astype("float32")
        if product.channel_scale:
            value = value * tensors[channel_scale][0, j]
        if product.row_scale:
            value = value * tensors["row_scale"][i, 0]
        return value

    def element(i: Any, j: Any) -> Any:
        value = scaled(sums, "channel_scale", i, j)
        if product.bias:
            value = value + tensors["bias"][0, j]
        value = ACTIVATION[product.activation](value)
        if factors is not None:
            value = value * scaled(factors, "up_scale", i, j)
        if product.residual:
            value = value + tensors["residual"][i, j].astype("float32")
        return value.astype(product.result)

    out = te.compute(result.padded, element, name="result")
    return te.create_prim_func([*tensors.values(), out])


@attrs.define
class _Scheduler:
    """Makes tiles, instructions and the pipeline of a computation."""

    schedule: Any
    product: Product
    tiles: Tiles
    operands: tuple[Operand, ...]

    def run(self) -> None:
        sch, tiles = self.schedule, self.tiles
        result = sch.get_sblock("result")
        products = [sch.get_sblock(name) for name in ("sums", "factors")[: self.product.matrices]]
        store = sch.cache_write(result, 0, VMEM)
        i, j = sch.get_loops(store)
        mo, mi = sch.split(i, [None, tiles.m], preserve_unit_iters=True)
        no, ni = sch.split(j, [None, tiles.n], preserve_unit_iters=True)
        sch.reorder(mo, no, mi, ni)
        tile = no if tiles.order != "panels" else sch.fuse(mo, no)
        sch.compute_at(result, tile, preserve_unit_loops=True)
        for sums in products:
            sch.compute_at(sums, tile, preserve_unit_loops=True)
            sch.set_scope(sums, 0, SUMS)
        loads = {"x": sch.cache_read(products[0], 0, VMEM, products)}
        loads |= {name: sch.cache_read(sums, 1, VMEM) for name, sums in zip("wu", products, strict=False)}
        for sums in (*products, result):
            names = {str(region.source.name): number for number, region in enumerate(sch.get(sums).reads)}
            others = [o.name for o in self.operands[:-1] if o.name in names and o.name not in loads]
            loads |= {name: sch.cache_read(sums, names[name], VMEM) for name in others}
        blocks = [self._blocks(sums) for sums in products]
        pipelined = self._place(loads, tile, mo, blocks[0])
        self._epilogue(result)
        for sums, block in zip(products, blocks, strict=True):
            self._instructions(sch.decompose_reduction(sums, block), sums)
        for name, load in loads.items():
            self._copy(load, self._operand(name).dtype, HBM, VMEM)
        self._copy(store, self.product.result, VMEM, HBM)
        if pipelined is not None:
            self._pipeline(pipelined)

    def _operand(self, name: str) -> Operand:
        return next(o for o in self.operands if o.name == name)

    def _blocks(self, sums: Any) -> Any:
        """Split the product's loops into blocks and the matrix unit's instructions; the outermost of them, before which sums are zeroed."""
        sch, tiles = self.schedule, self.tiles
        i, j, k = sch.get_loops(sums)[-3:]
        ks, k0, k1, k2 = sch.split(k, [None, tiles.k // tiles.inner, tiles.inner // tiles.unit[1], tiles.unit[1]])
        m0, m1 = sch.split(i, [None, tiles.rows])
        n0, n1, n2 = sch.split(j, [None, tiles.columns // tiles.unit[0], tiles.unit[0]])
        sch.reorder(ks, m0, n0, k0, n1, k1, m1, n2, k2)
        # What is multiplied at once: consumers may take these loops as one product.
        sch.unroll(n1)
        sch.unroll(k1)
        return ks

    def _place(self, loads: dict[str, Any], tile: Any, rows: Any, inner: Any) -> Any:
        """Put copies where their tiles are needed first; the loop to be pipelined, or None where it has a single step."""
        sch, tiles = self.schedule, self.tiles
        for name, load in loads.items():
            at = inner if tiles.order == "split" and name in "xw" else tile
            if name in ("x", "row_scale") and tiles.order == "resident":
                at = rows
            sch.compute_at(load, at, preserve_unit_loops=True)
        loop = inner if tiles.order == "split" else tile
        return loop if int(sch.get(loop).extent) > 1 else None

    def _epilogue(self, result: Any) -> None:
        """Blocks of what is computed behind the sums, for the size of code."""
        sch, tiles = self.schedule, self.tiles
        i, j = sch.get_loops(result)[-2:]
        m0, m1 = sch.split(i, [None, tiles.rows], preserve_unit_iters=True)
        n0, n1 = sch.split(j, [None, tiles.columns], preserve_unit_iters=True)
        sch.reorder(m0, n0, m1, n1)

    def _instructions(self, zero: Any, sums: Any) -> None:
        sch, tiles, product = self.schedule, self.tiles, self.product
        loops = sch.get_loops(zero)
        # Zeroing spans the whole tile: its loops by blocks become one instruction each.
        m1, n2 = loops[-2:]
        sch.tensorize(m1, intrinsics.zero_tile(tiles.rows, tiles.unit[0], product.accumulator))
        del n2
        m1 = sch.get_loops(sums)[-3]
        form = product.dtype, product.weights, product.group, product.scales, product.zeros
        sch.tensorize(m1, intrinsics.multiply_tile(tiles.rows, *tiles.unit, *form))

    def _copy(self, block: Any, dtype: str, source: str, to: str) -> None:
        i, j = self.schedule.get_loops(block)[-2:]
        rows, columns = (int(self.schedule.get(loop).extent) for loop in (i, j))
        if columns == 1:
            self.schedule.reorder(j, i)
        self.schedule.tensorize(j if rows == 1 else i, intrinsics.copy_tile(rows, columns, dtype, source, to))

    def _pipeline(self, loop: Any) -> None:
        """Copies to VMEM are the first stage, a step ahead."""
        sch = self.schedule
        kinds = [_kind(part) for part in sch.get(loop).body.seq]
        # Within a step, all copies are started before anything is computed.
        numbers = [n for wanted in ("load", "compute", "store") for n, kind in enumerate(kinds) if kind == wanted]
        if "store" in kinds:
            # While one tile of results is stored, the next one is computed; TVM doesn't see that such a copy takes its time.
            sch.annotate(sch.get_sblock("result"), "double_buffer_scope", 0)
        sch.annotate(loop, "software_pipeline_stage", [LOAD if kind == "load" else LOAD + 1 for kind in kinds])
        sch.annotate(loop, "software_pipeline_order", [numbers.index(n) for n in range(len(kinds))])
        sch.annotate(loop, "software_pipeline_async_stages", [LOAD])


def _kind(part: Any) -> str:
    """What a part of a step does: "load", "store" or "compute"."""
    while isinstance(part, tirx.For):
        part = part.body
    if not isinstance(part, s_tir.SBlockRealize):
        return "compute"  # several blocks in a loop
    name = str(part.block.name_hint)
    if f"_{VMEM}" not in name:
        return "compute"
    return "store" if name.startswith("result_") else "load"
