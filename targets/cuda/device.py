"""Kernels for NVIDIA GPUs as LLVM IR: what one thread of a block does, with what its warp and its block do together.

LLVM's NVPTX back end, which comes with TVM, makes PTX of them (`ptx.py`); compiling needs neither CUDA's compiler nor a GPU. Everything
that a CPU lacks (thread numbers, shared memory, barriers, shuffles, tensor cores, asynchronous copies) is a function whose name begins
with `prefix`: for a target whose triple is a CPU's it is another one, so that the same text runs there, thread by thread, with those
functions emulated.
Source: LLVM's User Guide for NVPTX Back-end; NVIDIA's PTX ISA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from jisu.targets.cpu.isa import Function, Micro, Val
from jisu.targets.target import Target

WARP = 32
"""Threads of a warp."""
_REAL, _EMULATED = "llvm.nvvm.", "emulated."
GROUP = 4 * WARP
"""Threads of a warp group, which multiplies together on Hopper."""
PAIRS = {"bfloat16": "<2 x bfloat>", "float16": "<2 x half>"}
"""LLVM's vectors of two 16-bit floats."""
GLOBAL, SHARED = "ptr addrspace(1)", "ptr addrspace(3)"
_SHARED_NAME = "jisu_shared"


def prefix(target: Target) -> str:
    """What the names of functions begin with that a CPU lacks."""
    return _REAL if target.architecture == "nvptx64" else _EMULATED


def _generation(target: Target) -> int:
    """9 of sm_90a."""
    return int(target.mcpu.removeprefix("sm_").rstrip("af")[:-1])


@attrs.frozen
class DeviceKernel:
    """A finished kernel: its function, its parameters ("ptr" or "i64"), threads per block and bytes of shared memory; `portable`: whether
    later GPUs than the target run it, too."""

    micro: Micro
    parameters: tuple[str, ...]
    threads: int
    shared_bytes: int
    portable: bool = True

    @property
    def name(self) -> str:
        """Its symbol."""
        return self.micro.symbol


class Device(Function):
    """One thread of a kernel under construction. Memory of the caller is reached through `memory`."""

    def __init__(self, name: str, params: Sequence[tuple[str, str]], target: Target, threads: int) -> None:
        super().__init__(name, params, target)
        self.threads, self.shared_bytes, self.prefix = threads, 0, prefix(target)
        self.portable = True

    def built(self) -> DeviceKernel:
        """The finished kernel."""
        return DeviceKernel(
            self.finish(), tuple(t for t, _ in self._params), self.threads, self.shared_bytes, self.portable
        )

    # Where this thread is

    def thread(self) -> Val:
        """Its number in the block, i64."""
        return self._register("tid.x")

    def block(self, axis: str = "x") -> Val:
        """The block's number along an axis of the grid, i64."""
        return self._register(f"ctaid.{axis}")

    def _register(self, name: str) -> Val:
        return self.cast("zext", self.call("i32", f"{self.prefix}read.ptx.sreg.{name}"), "i64")

    # Memory

    def memory(self, pointer: Val) -> Val:
        """A parameter as an address in the GPU's memory."""
        return self.op(f"addrspacecast ptr {pointer.name} to {GLOBAL}", GLOBAL)

    def shared(self, nbytes: int, alignment: int = 128) -> Val:
        """So many bytes of the block's shared memory, from a multiple of `alignment` (up to 1024) on."""
        self._declares.add(f"@{_SHARED_NAME} = external addrspace(3) global [0 x i8], align 1024")
        begin = -(-self.shared_bytes // alignment) * alignment
        self.shared_bytes = begin + nbytes
        return self.op(f"getelementptr inbounds i8, {SHARED} @{_SHARED_NAME}, i64 {begin}", SHARED)

    def load16(self, type_: str, address: Val) -> Val:
        """16 bytes that nobody writes while the kernel runs, in one load from an address that is a multiple of 16."""
        return self.op(f"load {type_}, {address.type} {address.name}, align 16, !invariant.load !0", type_)

    def load_shared16(self, address: Val) -> Val:
        """16 bytes of shared memory, <4 x i32>, from an address that is a multiple of 16."""
        return self.op(f"load <4 x i32>, {address.type} {address.name}, align 16", "<4 x i32>")

    def copy16(self, to: Val, source: Val) -> None:
        """Begin to copy 16 bytes from the GPU's memory into shared memory; see `copies_done`."""
        self.run(f"{self.prefix}cp.async.cg.shared.global.16", to, source)

    def copy8(self, to: Val, source: Val) -> None:
        """As `copy16`, 8 bytes, through the nearest cache."""
        self.run(f"{self.prefix}cp.async.ca.shared.global.8", to, source)

    def place(self, row: Val, chunk: Val, chunks: int) -> Val:
        """Where a chunk of 16 bytes of a tile's row lies in shared memory, in bytes, `chunks` (4 or more) making up a row.

        Chunks are turned so that one chunk of eight rows lies in different banks; with 8 per row it is the swizzle of 128 bytes.
        """
        by = ((row >> 1) & 3) if chunks == 4 else row & 7
        turned = self.op(f"xor i64 {chunk.name}, {by.name}", "i64")
        return row * (16 * chunks) + turned * 16

    def copy_tile(self, to: Val, rows: int, chunks: int, begin: Callable[[Val], Val], pitch: int = 0) -> None:
        """Begin to copy rows of `chunks` times 16 bytes to their places, by all threads of the block: row r from the address begin(r) on.

        pitch: chunks of a row in shared memory, a power of two; `chunks` unless given.
        """
        for row, chunk in self._chunks(rows, chunks):
            self.copy16(
                self.at(to, self.place(row, chunk, pitch or chunks), "i8"), self.at(begin(row), chunk * 16, "i8")
            )

    def fill_tile(
        self, to: Val, rows: int, chunks: int, eight: Callable[[Val, Val], list[Val]], dtype: str, pitch: int
    ) -> None:
        """As `copy_tile`, but of numbers that are computed: eight(row, chunk) float32, rounded to a 16-bit dtype; they are there after a barrier."""
        for row, chunk in self._chunks(rows, chunks):
            values = eight(row, chunk)
            words = Val(self, "poison", "<4 x i32>")
            for i in range(4):
                pair = self.pair(values[2 * i], values[2 * i + 1], dtype)
                words = self.op(f"insertelement <4 x i32> {words.name}, i32 {pair.name}, i32 {i}", "<4 x i32>")
            address = self.at(to, self.place(row, chunk, pitch), "i8")
            self.emit(f"store <4 x i32> {words.name}, {address.type} {address.name}, align 16")

    def _chunks(self, rows: int, chunks: int) -> Iterator[tuple[Val, Val]]:
        """This thread's share of a tile's chunks, as row and chunk."""
        thread = self.thread()
        for part in range(rows * chunks // self.threads):
            number = thread + part * self.threads
            yield number / chunks, number % chunks

    def commit_copies(self) -> None:
        """The copies begun since the last call are one group."""
        self.run(f"{self.prefix}cp.async.commit.group")

    def copies_done(self, but: int) -> None:
        """Wait until all groups of this thread's copies have come, except for the last `but` ones."""
        self.run(f"{self.prefix}cp.async.wait.group", self.const(but, "i32"))

    # Together

    def barrier(self) -> None:
        """Wait for all threads of the block; what they wrote to shared memory before can be read after."""
        self.run(f"{self.prefix}barrier0")

    def sum_of_warp(self, value: Val) -> Val:
        """The sum of float32 over the warp's threads, the same in all of them; the order is fixed."""
        return self.sum_of_lanes(value, WARP)

    def sum_of_lanes(self, value: Val, count: int) -> Val:
        """The sum of float32 over each `count` neighbouring threads of the warp (a power of two), the same in all of them."""
        while count > 1:
            count //= 2
            value = value + self.other(value, count)
        return value

    def other(self, value: Val, distance: int) -> Val:
        """The float32 of the thread whose number in the warp differs in the bit `distance`."""
        every, clamp = self.const(-1, "i32"), self.const(31, "i32")
        return self.call("float", f"{self.prefix}shfl.sync.bfly.f32", every, value, self.const(distance, "i32"), clamp)

    def exp2(self, x: Val) -> Val:
        """2^x of float32 to 2 ulp, subnormal results being 0."""
        return self.call("float", f"{self.prefix}ex2.approx.ftz.f", x)

    def fragments(self, address: Val, *, turned: bool = False) -> list[Val]:
        """Four 8x8 matrices of 16-bit numbers from shared memory, as `mma` wants them: i32 [4]; `turned`: each transposed.

        address: of a row of 16 bytes; threads 8 i to 8 i + 7 give the rows of matrix i.
        """
        kind = "{ i32, i32, i32, i32 }"
        both = self.call(
            kind, f"{self.prefix}ldmatrix.sync.aligned.m8n8.x4{'.trans' if turned else ''}.b16.p3", address
        )
        return [self.op(f"extractvalue {kind} {both.name}, {i}", "i32") for i in range(4)]

    def words(self, four: Val) -> list[Val]:
        """The i32 of a <4 x i32>."""
        return [self.op(f"extractelement {four.type} {four.name}, i32 {i}", "i32") for i in range(4)]

    def as_type(self, value: Val, type_: str) -> Val:
        """The same bits as another type."""
        return self.op(f"bitcast {value.type} {value.name} to {type_}", type_)

    def twice(self, value: Val, dtype: str) -> Val:
        """A float32 rounded to a 16-bit dtype, twice, as LLVM's vector of two."""
        return self.as_type(self.pair(value, value, dtype), PAIRS[dtype])

    def pair(self, low: Val, high: Val, dtype: str) -> Val:
        """Two float32 rounded to a 16-bit dtype in one i32."""
        both = self.op("insertelement <2 x float> poison, float " + f"{low.name}, i32 0", "<2 x float>")
        both = self.op(f"insertelement <2 x float> {both.name}, float {high.name}, i32 1", "<2 x float>")
        rounded = self.op(f"fptrunc <2 x float> {both.name} to {PAIRS[dtype]}", PAIRS[dtype])
        return self.as_type(rounded, "i32")

    def mma(self, a: Sequence[Val], b: Sequence[Val], sums: Sequence[Val], dtype: str) -> list[Val]:
        """sums[16, 8] + a[16, 16] b[16, 8] in a 16-bit dtype on the tensor cores, by the warp: a i32 [4], b i32 [2], sums float [4] per thread."""
        kind = "{ float, float, float, float }"
        if dtype == "bfloat16":
            found = self.call(kind, f"{self.prefix}mma.m16n8k16.row.col.bf16", *a, *b, *sums)
        else:
            halves = [self.as_type(x, PAIRS[dtype]) for x in (*a, *b)]
            found = self.call(kind, f"{self.prefix}mma.m16n8k16.row.col.f32.f32", *halves, *sums)
        return [self.op(f"extractvalue {kind} {found.name}, {i}", "float") for i in range(4)]

    def mma_sparse(
        self, a: Sequence[Val], b: Sequence[Val], sums: Sequence[Val], places: Val, pair: int, dtype: str
    ) -> list[Val]:
        """`mma` of a[16, 32], of whose rows each four inputs have two numbers, and b[32, 8]: a i32 [4], b i32 [4], sums float [4] per thread.

        places: i32, of which two of each four threads' count: the first two (pair 0) or the last two (pair 1); see
        `jisu.compiler.ops.semi_structured`.
        """
        kind = "{ float, float, float, float }"
        ordered = ".ordered.metadata" if self.prefix == _REAL and _generation(self.target) >= 10 else ""
        name = f"{self.prefix}mma.sp{ordered}.m16n8k32.row.col.{'bf16' if dtype == 'bfloat16' else 'f32.f32'}"
        given = [x if dtype == "bfloat16" else self.as_type(x, PAIRS[dtype]) for x in (*a, *b)]
        found = self.call(kind, name, *given, *sums, places, self.const(pair, "i32"))
        return [self.op(f"extractvalue {kind} {found.name}, {i}", "float") for i in range(4)]

    # Hopper: products of a warp group, straight from shared memory

    def tile_address(self, address: Val) -> Val:
        """A descriptor of a tile in shared memory for `multiply_group`: rows of 128 bytes, eight of which are a block of 1024 at a multiple of
        1024, chunk c of row r standing at c ^ (r & 7) (the swizzle of 128 bytes)."""
        place = self.op(f"ptrtoint {SHARED} {address.name} to i64", "i64")
        stride, swizzle = (1024 >> 4) << 32, 1 << 62
        return ((place & 0x3FFFF) >> 4) | self.i64(stride | swizzle)

    def begin_products(self) -> None:
        """What this thread wrote to shared memory, and its sums, are ready for `multiply_group`; a barrier must follow for those of others."""
        self._special("fence.proxy.async.shared::cta")
        self.run(f"{self.prefix}wgmma.fence.sync.aligned")

    def multiply_group(self, a: Val, b: Val, sums: Sequence[Val], outputs: int, dtype: str) -> list[Val]:
        """Begin sums[64, outputs] += a[64, 16] b[outputs, 16]^T in a 16-bit dtype, by the warp group.

        a, b: descriptors, advanced by 2 for each 16 inputs of a row. sums: float [outputs / 2] of this thread; thread t has, for each 8 outputs
        j, columns 8 j + 2 (t % 4) and the next of row 16 (t / 32) + (t % 32) / 4, then of that row + 8. They may be used after
        `products_done`.
        """
        self.portable = False
        count = outputs // 2
        kind = "{ " + ", ".join(["float"] * count) + " }"
        given = ", ".join([*(f"float {s.name}" for s in sums), f"i64 {a.name}", f"i64 {b.name}"])
        if self.prefix != _REAL:
            return self._multiply_elsewhere(a, b, sums, outputs, dtype)
        registers = ",".join(f"${i}" for i in range(count))
        short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        text = f"wgmma.mma_async.sync.aligned.m64n{outputs}k16.f32.{short}.{short} {{{registers}}}, ${2 * count}, ${2 * count + 1}, 1, 1, 1, 0, 0;"
        constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l"])
        both = self.op(f'call {kind} asm sideeffect "{text}", "{constraints}"({given}) convergent', kind)
        return [self.op(f"extractvalue {kind} {both.name}, {i}", "float") for i in range(count)]

    def _multiply_elsewhere(self, a: Val, b: Val, sums: Sequence[Val], outputs: int, dtype: str) -> list[Val]:
        """The same through memory, for an emulation."""
        held = self.op(f"alloca [{len(sums)} x float], align 16", "ptr")
        for i, s in enumerate(sums):
            self.store(s, self.at(held, i, "float32"))
        how = [self.const(n, "i32") for n in (outputs, dtype == "float16")]
        self.run(f"{self.prefix}wgmma", held, a, b, *how)
        return [self.load("float", self.at(held, i, "float32")) for i in range(len(sums))]

    def commit_products(self) -> None:
        """The products begun since the last call are one group."""
        self.run(f"{self.prefix}wgmma.commit_group.sync.aligned")

    def products_done(self, but: int) -> None:
        """Wait until all groups of products are done, except for the last `but` ones."""
        self.run(f"{self.prefix}wgmma.wait_group.sync.aligned", self.i64(but))

    def _special(self, name: str) -> None:
        """An instruction without operands that LLVM has no function for."""
        if self.prefix == _REAL:
            self.emit(f'call void asm sideeffect "{name};", "~{{memory}}"() convergent')
        else:
            self.run(self.prefix + name.replace("::", "."))
