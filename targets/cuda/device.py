"""Kernels for NVIDIA GPUs as LLVM IR: what one thread of a block does, with what its warp and its block do together.

LLVM's NVPTX back end, which comes with TVM, makes PTX of them (`ptx.py`); compiling needs neither CUDA's compiler nor a GPU. Everything
that a CPU lacks (thread numbers, shared memory, barriers, shuffles, tensor cores, asynchronous copies) is a function whose name begins
with `prefix`: for a target whose triple is a CPU's it is another one, so that the same text runs there, thread by thread, with those
functions emulated.
From sm_90 on a launch may begin while those before it run (programmatic dependent launch), so that its threads are there, and its first
weights on their way, when those end. **The rule**: every thread waits (`Device.wait`) before it reads or writes memory for the first time,
but for weights, which no kernel ever writes. Since no kernel ends before it has waited, whoever waits for the one launch before it waits
for all; so nobody sees what isn't written yet, nor writes what is still read. A kernel that reads ahead what turns out to be no weight is
launched behind the end of what was before, and so are all on older architectures (see `jisu.compiler.launches.Launch`).
Source: LLVM's User Guide for NVPTX Back-end; NVIDIA's PTX ISA (griddepcontrol).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from jisu.compiler.errors import CompileError
from jisu.targets.cpu.isa import Function, Micro, Val
from jisu.targets.target import Target, capability

WARP = 32
"""Threads of a warp."""
_REAL, _EMULATED = "llvm.nvvm.", "emulated."
GROUP = 4 * WARP
"""Threads of a warp group, which multiplies together on Hopper."""
PAIRS = {"bfloat16": "<2 x bfloat>", "float16": "<2 x half>"}
"""LLVM's vectors of two 16-bit floats."""
GLOBAL, SHARED = "ptr addrspace(1)", "ptr addrspace(3)"
_SHARED_NAME = "jisu_shared"
_CLUSTER = "ptr addrspace(7)"  # shared memory of a cluster of blocks, which a block alone is, too
MAP = "map"
"""The kind of a parameter that is a tensor map (see `compiler.launches.TensorMap`): 128 bytes by value, reached by a pointer."""
_LOG2_E, _LOG2_E_LOW = 1.4426950216293335, 1.925963033500011e-8  # log2(e) in two float32
_MOST_SUMS, _MOST_OPERANDS = 128, 16  # of products of an emulated warp group
_MOST_HELD = _MOST_SUMS + 4 * _MOST_OPERANDS


_GROUP_KINDS = {
    "bfloat16": (16, "f32.bf16.bf16"),
    "float16": (16, "f32.f16.f16"),
    "int8": (32, "s32.s8.u8"),
    "fp8": (32, "f32.e4m3.e4m3"),
}
"""Inputs of a product of a warp group, and PTX's name of its numbers, by what is multiplied."""


def prefix(target: Target) -> str:
    """What the names of functions begin with that a CPU lacks."""
    return _REAL if target.architecture == "nvptx64" else _EMULATED


def overlaps(target: Target) -> bool:
    """Whether launches may begin before earlier ones end."""
    return capability(target.mcpu) >= (9, 0)


@attrs.frozen
class DeviceKernel:
    """A finished kernel: its function, its parameters ("ptr", "i64", or MAP, which stand first), threads per block and bytes of shared memory;
    `portable`: whether later GPUs than the target run it, too. alone: whether a block may take all registers of a multiprocessor. early: whether
    it waits for the launches before it; ahead: numbers of parameters that it reads before, which must be weights."""

    micro: Micro
    parameters: tuple[str, ...]
    threads: int
    shared_bytes: int
    portable: bool = True
    alone: bool = False
    early: bool = False
    ahead: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its symbol."""
        return self.micro.symbol


class Device(Function):
    """One thread of a kernel under construction. Memory of the caller is reached through `memory`.

    ahead: names of parameters that it reads before it waits for earlier launches, which it does itself, by `wait`; without such it waits
    at its beginning.
    """

    pointers = ""  # restricted ones LLVM would read before the wait

    def __init__(
        self, name: str, params: Sequence[tuple[str, str]], target: Target, threads: int, ahead: Sequence[str] = ()
    ) -> None:
        super().__init__(name, [("ptr" if kind == MAP else kind, own) for kind, own in params], target)
        self.threads, self.shared_bytes, self.prefix = threads, 0, prefix(target)
        self.portable, self.alone = True, False
        self._kinds = tuple(kind for kind, _ in params)
        # An emulation's memory for sums is taken once, not in every turn of a loop.
        self._held = None if self.prefix == _REAL else self.op(f"alloca [{_MOST_HELD} x float], align 16", "ptr")
        self._operands = 0  # of those that products read from registers, in that memory behind the sums
        self.early, self.waited = overlaps(target), False
        self.ahead = tuple(n for n, (_, name) in enumerate(self._params) if name in ahead)
        if self.early:
            self._special("griddepcontrol.launch_dependents")
        if not self.ahead:
            self.wait()

    def wait(self) -> None:
        """Wait until earlier launches have ended and what they wrote is there; the first call in a kernel does that for all."""
        if self.early and not self.waited:
            self._special("griddepcontrol.wait")
        self.waited = True

    def built(self) -> DeviceKernel:
        """The finished kernel; raises CompileError for one that never waits for earlier launches."""
        if not self.waited:
            raise CompileError(f"{self._name} doesn't wait for the launches before it")
        return DeviceKernel(
            self.finish(), self._kinds, self.threads, self.shared_bytes, self.portable, self.alone, self.early,
            self.ahead if self.early else (),
        )  # fmt: skip

    # Where this thread is

    def thread(self) -> Val:
        """Its number in the block, i64."""
        return self._register("tid.x")

    def block(self, axis: str = "x") -> Val:
        """The block's number along an axis of the grid, i64."""
        return self._register(f"ctaid.{axis}")

    def blocks(self) -> Val:
        """How many blocks the grid has along its first axis, i64."""
        return self._register("nctaid.x")

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
        """16 bytes in one load from an address that is a multiple of 16."""
        return self.op(f"load {type_}, {address.type} {address.name}, align 16", type_)

    def load_shared16(self, address: Val) -> Val:
        """16 bytes of shared memory, <4 x i32>, from an address that is a multiple of 16."""
        return self.op(f"load <4 x i32>, {address.type} {address.name}, align 16", "<4 x i32>")

    def store16(self, words: Val, address: Val) -> None:
        """Store <4 x i32> to an address that is a multiple of 16."""
        self.emit(f"store <4 x i32> {words.name}, {address.type} {address.name}, align 16")

    def packed(self, values: Sequence[Val], dtype: str) -> Val:
        """Eight float32 rounded to a 16-bit dtype, or four as they are, as <4 x i32>."""
        if dtype == "float32":
            four = [self.as_type(value, "i32") for value in values]
        else:
            four = [self.pair(low, high, dtype) for low, high in zip(values[::2], values[1::2], strict=True)]
        words = Val(self, "poison", "<4 x i32>")
        for i, word in enumerate(four):
            words = self.op(f"insertelement <4 x i32> {words.name}, i32 {word.name}, i32 {i}", "<4 x i32>")
        return words

    def unpacked(self, words: Val, dtype: str) -> list[Val]:
        """The eight numbers of a 16-bit dtype in a <4 x i32>, or the four float32, as float32."""
        if dtype == "float32":
            return [self.as_type(word, "float") for word in self.words(words)]
        pairs = [self.as_type(word, PAIRS[dtype]) for word in self.words(words)]
        halves = [self.op(f"extractelement {p.type} {p.name}, i32 {i}", p.type[5:-1]) for p in pairs for i in (0, 1)]
        return [self.cast("fpext", half, "float") for half in halves]

    def copy16(self, to: Val, source: Val) -> None:
        """Begin to copy 16 bytes from the GPU's memory into shared memory; see `copies_done`."""
        self.run(f"{self.prefix}cp.async.cg.shared.global.16", to, source)

    def copy8(self, to: Val, source: Val) -> None:
        """As `copy16`, 8 bytes, through the nearest cache."""
        self.run(f"{self.prefix}cp.async.ca.shared.global.8", to, source)

    def place(self, row: Val, chunk: Val, chunks: int) -> Val:
        """Where a chunk of 16 bytes of a tile's row lies in shared memory, in bytes, `chunks` (2, 4, 8 or more) making up a row.

        Chunks are turned so that one chunk of eight rows lies in different banks; with up to 8 per row it is the swizzle of as many bytes.
        """
        by = {2: (row >> 2) & 1, 4: (row >> 1) & 3}.get(chunks, row & 7)
        turned = self.op(f"xor i64 {chunk.name}, {by.name}", "i64")
        return row * (16 * chunks) + turned * 16

    def copy_tile(self, to: Val, rows: int, chunks: int, begin: Callable[[Val], Val], pitch: int = 0) -> None:
        """Begin to copy rows of `chunks` times 16 bytes to their places, by all threads of the block: row r from the address begin(r) on.

        pitch: chunks of a row in shared memory, a power of two; `chunks` unless given.
        """
        for row, chunk in self.chunks(rows, chunks, self.threads):
            self.copy16(
                self.at(to, self.place(row, chunk, pitch or chunks), "i8"), self.at(begin(row), chunk * 16, "i8")
            )

    def fill_tile(
        self, to: Val, rows: int, chunks: int, eight: Callable[[Val, Val], list[Val]], dtype: str, pitch: int
    ) -> None:
        """As `copy_tile`, but of numbers that are computed: eight(row, chunk) float32, rounded to a 16-bit dtype; they are there after a barrier."""
        for row, chunk in self.chunks(rows, chunks, self.threads):
            self.store16(self.packed(eight(row, chunk), dtype), self.at(to, self.place(row, chunk, pitch), "i8"))

    def chunks(self, rows: int, chunks: int, threads: int, thread: Val | None = None) -> Iterator[tuple[Val, Val]]:
        """A thread's share of a tile's chunks among so many, as row and chunk; thread: its number among them, if not that in the block. Where
        not all have equally many, some have the last one as well."""
        thread, count = self.thread() if thread is None else thread, rows * chunks
        for part in range(-(-count // threads)):
            number = thread + part * threads
            number = number if (part + 1) * threads <= count else self.minimum(number, count - 1)
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

    def visible(self) -> None:
        """What this thread wrote, and what it saw of others, is there for other blocks before what it writes from now on."""
        self.emit('fence syncscope("device") acq_rel')

    def counted(self, address: Val, most: Val) -> Val:
        """How many threads of the launch counted before this one at an i32 that was 0, which the last of most + 1 makes 0 again; i32."""
        return self.op(
            f'atomicrmw uinc_wrap {address.type} {address.name}, i32 {most.name} syncscope("device") monotonic', "i32"
        )

    def increase(self, value: Val, address: Val) -> None:
        """Add an integer to one in memory, of the block or of the GPU, to which others add, too."""
        scope = "block" if address.type == SHARED else "device"
        self.op(
            f'atomicrmw add {address.type} {address.name}, {value.type} {value.name} syncscope("{scope}") monotonic',
            value.type,
        )

    def is_last(self, counter: Val, others: Val) -> Val:
        """Whether this block is the last of others + 1 (i32) that come here, for which what all of them wrote before is there; see `counted`."""
        word = self.shared(4, 4)

        def count() -> None:
            self.visible()
            self.store(self.counted(counter, others), word)
            self.visible()

        self.barrier()
        self.when(self.thread().cmp("eq", 0), count)
        self.barrier()
        return self.load("i32", word).cmp("eq", others)

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

    def other_integer(self, value: Val, distance: int) -> Val:
        """`other` of an i64."""
        halves = [self.as_type(self.cast("trunc", part, "i32"), "float") for part in (value, value >> 32)]
        low, high = (self.cast("zext", self.as_type(self.other(half, distance), "i32"), "i64") for half in halves)
        return low | (high << 32)

    def exp2(self, x: Val) -> Val:
        """2^x of float32 to 2 ulp, subnormal results being 0."""
        return self.call("float", f"{self.prefix}ex2.approx.ftz.f", x)

    def exp(self, x: Val) -> Val:
        """e^x to a few ulp, subnormal results being 0: a power of two, and what rounding x log2(e) lost."""
        x = self.select(x < -104.0, self.like(-104.0, x), x)
        x = self.select(x > 89.0, self.like(89.0, x), x)
        power = x * _LOG2_E
        lost = self.fma(x, self.like(_LOG2_E_LOW, x), self.fma(x, self.like(_LOG2_E, x), -power))
        return self.exp2(power) * self.fma(lost, self.like(0.6931471805599453, x), 1.0)

    def fragments(self, address: Val, *, turned: bool = False) -> list[Val]:
        """Four 8x8 matrices of 16-bit numbers from shared memory, as `mma` wants them: i32 [4]; `turned`: each transposed.

        address: of a row of 16 bytes; threads 8 i to 8 i + 7 give the rows of matrix i.
        """
        kind = "{ i32, i32, i32, i32 }"
        both = self.call(
            kind, f"{self.prefix}ldmatrix.sync.aligned.m8n8.x4{'.trans' if turned else ''}.b16.p3", address
        )
        return [self.op(f"extractvalue {kind} {both.name}, {i}", "i32") for i in range(4)]

    def store_fragments(self, address: Val, four: Sequence[Val], *, turned: bool = False) -> None:
        """Store four 8x8 matrices of 16-bit numbers, i32 [4], that lie as `fragments` gives them, to rows of 16 bytes of shared memory; `turned`: each
        transposed. address: as for `fragments`. From sm_90 on."""
        kind = f"{self.prefix}stmatrix.sync.aligned.m8n8.x4{'.trans' if turned else ''}.b16.p3"
        self.run(kind, address, *four)

    def words(self, four: Val) -> list[Val]:
        """The i32 of a <4 x i32>."""
        return [self.op(f"extractelement {four.type} {four.name}, i32 {i}", "i32") for i in range(4)]

    def as_type(self, value: Val, type_: str) -> Val:
        """The same bits as another type."""
        return self.op(f"bitcast {value.type} {value.name} to {type_}", type_)

    def twice(self, value: Val, dtype: str) -> Val:
        """A float32 rounded to a 16-bit dtype, twice, as LLVM's vector of two."""
        return self.as_type(self.pair(value, value, dtype), PAIRS[dtype])

    def narrow(self, value: Val, dtype: str) -> Val:
        """float32 as a stored element of `dtype`, rounded to nearest even: of bfloat16 as one of a pair, which GPUs do faster than one alone."""
        if dtype != "bfloat16":
            return super().narrow(value, dtype)
        if self.prefix != _REAL:
            return self.as_type(self.op(f"fptrunc float {value.name} to bfloat", "bfloat"), "i16")
        # LLVM would take the conversion of one number, which is slow.
        both = f'call i32 asm "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"(float 0.0, float {value.name})'
        return self.cast("trunc", self.op(both, "i32"), "i16")

    def pair(self, low: Val, high: Val, dtype: str) -> Val:
        """Two float32 rounded to a 16-bit dtype in one i32."""
        both = self.op("insertelement <2 x float> poison, float " + f"{low.name}, i32 0", "<2 x float>")
        both = self.op(f"insertelement <2 x float> {both.name}, float {high.name}, i32 1", "<2 x float>")
        rounded = self.op(f"fptrunc <2 x float> {both.name} to {PAIRS[dtype]}", PAIRS[dtype])
        return self.as_type(rounded, "i32")

    def to_e4m3(self, low: Val, high: Val) -> Val:
        """Two float32 rounded to e4m3 in one i16, numbers beyond the largest becoming it. From sm_89 on."""
        return self.call("i16", f"{self.prefix}ff.to.e4m3x2.rn", high, low)

    def from_e4m3(self, both: Val) -> list[Val]:
        """The two e4m3 in an i16 as float32. From sm_89 on."""
        kind = PAIRS["float16"]
        given = kind if self.prefix == _REAL else "i32"  # a C compiler and LLVM return such vectors in different ways
        halves = self.as_type(self.call(given, f"{self.prefix}e4m3x2.to.f16x2.rn", both), kind)
        return [
            self.cast("fpext", self.op(f"extractelement {kind} {halves.name}, i32 {i}", "half"), "float")
            for i in (0, 1)
        ]

    def mma(self, a: Sequence[Val], b: Sequence[Val], sums: Sequence[Val], dtype: str) -> list[Val]:
        """sums[16, 8] + a[16, 16] b[16, 8] in a 16-bit dtype on the tensor cores, by the warp: a i32 [4], b i32 [2], sums float [4] per thread."""
        kind = "{ float, float, float, float }"
        if dtype == "bfloat16":
            found = self.call(kind, f"{self.prefix}mma.m16n8k16.row.col.bf16", *a, *b, *sums)
        else:
            halves = [self.as_type(x, PAIRS[dtype]) for x in (*a, *b)]
            found = self.call(kind, f"{self.prefix}mma.m16n8k16.row.col.f32.f32", *halves, *sums)
        return [self.op(f"extractvalue {kind} {found.name}, {i}", "float") for i in range(4)]

    def mma_bytes(self, a: Sequence[Val], b: Sequence[Val], sums: Sequence[Val]) -> list[Val]:
        """sums[16, 8] + a[16, 32] b[32, 8] of numbers of 8 bits on the tensor cores, by the warp: of int8 where the sums are i32, of fp8 (e4m3)
        where they are float; a i32 [4], b i32 [2], sums [4] per thread.

        Products of fp8 are added to the sums by the thread: tensor cores (of Ada; of Hopper those of warp groups) add them with 13 bits of mantissa, though
        it is called float32 (SageAttention2, Zhang et al., 2024).
        """
        element = sums[0].type
        kind = f"{{ {', '.join([element] * 4)} }}"
        form = {"i32": "s8", "float": "f32.e4m3.e4m3.f32"}[element]
        begin = sums if element == "i32" else [self.const(0.0, "float")] * 4
        both = self.call(kind, f"{self.prefix}mma.m16n8k32.row.col.{form}", *a, *b, *begin)
        found = [self.op(f"extractvalue {kind} {both.name}, {i}", element) for i in range(4)]
        return found if element == "i32" else [total + own for total, own in zip(sums, found, strict=True)]

    # Hopper: barriers in shared memory (mbarriers), which count arrivals and bytes; copies of tiles, whose bytes they count

    def make_barrier(self, barrier: Val, arrivals: int) -> None:
        """Make 8 bytes of shared memory a barrier whose phases, of parity 0, 1, 0…, each end with so many arrivals and all bytes that are
        expected. One thread makes it; `barriers_made` and the block's barrier must follow."""
        self.run(f"{self.prefix}mbarrier.init.shared", barrier, self.const(arrivals, "i32"))

    def barriers_made(self) -> None:
        """Those that this thread made are seen by all, copies of tiles among them, that meet it at the block's barrier."""
        self.run(f"{self.prefix}fence.mbarrier_init.release.cluster")

    def arrive(self, barrier: Val) -> None:
        """Arrive; what this thread did before is seen by who waited for the phase."""
        self.call("i64", f"{self.prefix}mbarrier.arrive.shared", barrier)

    def arrive_expecting(self, barrier: Val, nbytes: int) -> None:
        """Arrive, and let the phase wait for so many bytes of copies."""
        name = f"{self.prefix}mbarrier.arrive.expect.tx.scope.cta.space.cta"
        self.call("i64", name, barrier, self.const(nbytes, "i32"))

    def wait_for(self, barrier: Val, parity: Val) -> None:
        """Wait until the barrier's phase of a parity (i64) has ended: the current one, or the one before, which has."""
        self._count += 1
        tag = self._count
        wanted = self.cast("trunc", parity, "i32")
        self.emit(f"br label %wait{tag}")
        self._label(f"wait{tag}")
        name = f"{self.prefix}mbarrier.try.wait.parity.scope.cta.space.cta"
        done = self.call("i1", name, barrier, wanted)
        self.emit(f"br i1 {done.name}, label %come{tag}, label %wait{tag}")
        self._label(f"come{tag}")

    def copy_box(self, to: Val, tensor: Val, row: Val, column: Val, barrier: Val) -> None:
        """Begin to copy a box of a tensor map's matrix, from a row and a column on, to a multiple of 1024 in shared memory; its bytes count for
        the barrier. Chunks come to their `place`; what lies beyond the matrix's end is zero."""
        where = self.op(f"addrspacecast {SHARED} {to.name} to {_CLUSTER}", _CLUSTER)
        at = (self.cast("trunc", c, "i32") for c in (column, row))
        unused = (self.const(0, "i16"), self.i64(0), self.const(0, "i1"), self.const(0, "i1"), self.const(0, "i32"))
        self.run(f"{self.prefix}cp.async.bulk.tensor.g2s.tile.2d", where, barrier, tensor, *at, *unused)

    def copies_shown(self) -> None:
        """What this thread's other copies and stores put into shared memory is seen by copies of boxes and by `multiply_group`, from a
        synchronisation on."""
        self.run(f"{self.prefix}fence.proxy.async.shared_cta")

    def registers(self, count: int, *, more: bool) -> None:
        """Let each thread of the warp group have so many registers (a multiple of 8), `more` than before or fewer; waits until there are so many.
        Threads begin with what is left to each if a block has a multiprocessor to itself."""
        self.alone = True
        kind = "inc" if more else "dec"
        self.run(f"{self.prefix}setmaxnreg.{kind}.sync.aligned.u32", self.const(count, "i32"))

    def meet(self, number: Val, threads: int) -> None:
        """`barrier` of so many threads alone, all that name the same number (i64, 1 to 15)."""
        name = f"{self.prefix}barrier.cta.sync.aligned.count"
        self.run(name, self.cast("trunc", number, "i32"), self.const(threads, "i32"))

    def mma_sparse(
        self, a: Sequence[Val], b: Sequence[Val], sums: Sequence[Val], places: Val, pair: int, dtype: str
    ) -> list[Val]:
        """`mma` of a[16, 32], of whose rows each four inputs have two numbers, and b[32, 8]: a i32 [4], b i32 [4], sums float [4] per thread.

        places: i32, of which two of each four threads' count: the first two (pair 0) or the last two (pair 1); see
        `jisu.compiler.ops.semi_structured`.
        """
        kind = "{ float, float, float, float }"
        ordered = ".ordered.metadata" if self.prefix == _REAL and capability(self.target.mcpu) >= (10, 0) else ""
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

    def begin_products(self, registers: Sequence[Val]) -> list[Val]:
        """This thread's sums, and what else it has in registers for `multiply_group`, are ready: as what is returned they may be multiplied. LLVM would
        write them behind a mere fence."""
        if self._held is not None:
            self.run(f"{self.prefix}wgmma.fence.sync.aligned")
            return list(registers)
        return self._changed("wgmma.fence.sync.aligned;", registers)

    def multiply_group(
        self, a: Val | Sequence[Val], b: Val, sums: Sequence[Val], outputs: int, dtype: str
    ) -> list[Val]:
        """Begin sums[64, outputs] += a[64, 16] b[outputs, 16]^T in a 16-bit dtype, or of 32 inputs of 8 bits: "fp8" (e4m3), or "int8", levels
        int8 times codes uint8 with sums i32; by the warp group.

        a, b: descriptors, advanced by 2 for each 32 bytes of a row; or, of 16 bits, a: i32 [4], each warp's 16 rows as `mma` takes them, which must be
        computed behind a `products_done` that covers the products that this place in the program began before: what they read from registers
        isn't to be written till they are done. sums: float
        [outputs / 2] of this thread; thread t has, for each 8 outputs j, columns 8 j + 2 (t % 4) and the next of row
        16 (t / 32) + (t % 32) / 4, then of that row + 8. What is returned may be given to another product or to `products_done`, which
        returns the numbers.
        """
        self.portable = False
        left = (a,) if isinstance(a, Val) else tuple(a)
        if self._held is not None:
            given = (self.const(outputs, "i32"), self.const(list(_GROUP_KINDS).index(dtype), "i32"))
            own = left if len(left) == 1 else (self._registers_of(left),)
            return self._through_memory("wgmma" if len(left) == 1 else "wgmma.registers", sums, *own, b, *given)
        count = outputs // 2
        registers = ",".join(f"${i}" for i in range(count))
        operand = ",".join(f"${2 * count + i}" for i in range(len(left)))
        of_a, turned = (operand, ", 0, 0") if len(left) == 1 else (f"{{{operand}}}", ", 0")
        depth, form = _GROUP_KINDS[dtype]
        signs = "" if dtype == "int8" else ", 1, 1"
        text = (
            f"wgmma.mma_async.sync.aligned.m64n{outputs}k{depth}.{form} {{{registers}}}, {of_a}, "
            f"${2 * count + len(left)}, 1{signs}{turned if depth == 16 else ''};"
        )
        return self._changed(text, sums, *left, b)

    def commit_products(self) -> None:
        """The products begun since the last call are one group."""
        self.run(f"{self.prefix}wgmma.commit_group.sync.aligned")

    def products_done(self, but: int, sums: Sequence[Val]) -> list[Val]:
        """Wait until all groups of products are done, except for the last `but` ones; the sums, numbers where none of those changes them."""
        if self._held is not None:
            return self._through_memory("wgmma.wait", sums, self.const(but, "i32"))
        return self._changed(f"wgmma.wait_group.sync.aligned {but};", sums)

    def _changed(self, text: str, sums: Sequence[Val], *given: Val) -> list[Val]:
        """An instruction that changes registers, which nothing else may use meanwhile."""
        letters = {"i64": "l", "i32": "r", "float": "f"}
        kind = "{ " + ", ".join(v.type for v in sums) + " }"
        operands = ", ".join(f"{v.type} {v.name}" for v in (*sums, *given))
        tied, kinds = [str(i) for i in range(len(sums))], [letters[v.type] for v in given]
        constraints = ",".join([*(f"={letters[v.type]}" for v in sums), *tied, *kinds, "~{memory}"])
        both = self.op(f'call {kind} asm sideeffect "{text}", "{constraints}"({operands}) convergent', kind)
        return [self.op(f"extractvalue {kind} {both.name}, {i}", v.type) for i, v in enumerate(sums)]

    def _registers_of(self, words: Sequence[Val]) -> Val:
        """Where an emulation finds what this place in the program has in registers: each time in the same ones."""
        assert self._held is not None
        own = self.at(self._held, _MOST_SUMS + 4 * self._operands, "int32")
        self._operands += 1
        for i, word in enumerate(words):
            self.store(word, self.at(own, i, "int32"))
        return own

    def _through_memory(self, name: str, sums: Sequence[Val], *given: Val) -> list[Val]:
        """The same by an emulation's function."""
        assert self._held is not None
        for i, s in enumerate(sums):
            self.store(s, self.at(self._held, i, "float32"))
        self.run(self.prefix + name, self._held, self.const(len(sums), "i32"), *given)
        return [self.load(s.type, self.at(self._held, i, "float32")) for i, s in enumerate(sums)]

    def _special(self, name: str) -> None:
        """An instruction without operands that LLVM has no function for."""
        if self.prefix == _REAL:
            self.emit(f'call void asm sideeffect "{name};", "~{{memory}}"() convergent')
        else:
            self.run(self.prefix + name)
