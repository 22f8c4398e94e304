/* A GPU's block of threads on a CPU: one fiber per thread, run in turns until all of a warp, or of the block, meet.
 *
 * A launch fails, with a message, where threads don't do together what they should, and where copies are not waited for. Shared memory begins
 * as NaN. Either asynchronous copies come only when they are waited for, and products of warp groups are made at once, or the other way
 * round: what isn't waited for is read too early, or written over too early. Of a launch that may begin before earlier ones end, the first and
 * the last block do (`emulated_begin`): as far as their threads get without waiting for those. */
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>
#include <ucontext.h>

constexpr int SHARED_BYTES = 256 << 10; /* also its alignment: the lower bits of an address are those inside */
extern "C" alignas(SHARED_BYTES) uint8_t jisu_shared[SHARED_BYTES];
alignas(SHARED_BYTES) uint8_t jisu_shared[SHARED_BYTES];

namespace {

constexpr int REGISTERS = 64 << 10; /* of a multiprocessor */
constexpr int ARGUMENTS = 48; /* of a kernel, at most; more than it takes are passed */

struct Copy { void *to; const void *from; int bytes; };

/* A product of a warp group, which adds to the sums of a number. a: a tile, or else own: registers in which this thread has its part of it. */
struct Product { uint32_t sums; const uint32_t *own; uint64_t a, b; int outputs; int kind; };
enum { BF16, F16, S8_U8, E4M3 }; /* kinds of products; sums of the third are int32 */

struct Fiber {
    ucontext_t context;
    bool done = false;
    std::vector<std::vector<Copy>> groups; /* those not waited for, oldest first */
    std::vector<Copy> open;
    bool unfenced = false; /* wrote to shared memory without a fence for the tensor cores that read it themselves */
    bool ready = false; /* its sums may be changed by products */
    std::deque<std::vector<Product>> product_groups;
    std::vector<Product> products; /* begun and not committed */
    std::map<uint32_t, std::vector<float>> sums; /* of products not waited for */
    uint32_t last_sums = 0;
    float *held = nullptr;
    Product product{}; /* the last one begun */
    bool waited = false; /* for earlier launches */
};

/* A matrix as a driver describes it in 128 bytes to those who copy boxes of it. */
struct TensorMap {
    uint64_t mark;
    const char *address;
    int64_t columns, rows, stride;
    int box_columns, box_rows, itemsize, turned; /* bits of the chunk's number in a row */
};
constexpr uint64_t TENSOR_MAP = 0x70616d726f736e65;

struct Box { char *to; const TensorMap *from; int row, column; };

/* A barrier in shared memory. */
struct Barrier {
    int arrivals, pending, maker;
    bool shown;
    int64_t bytes; /* expected that haven't come */
    int64_t phase;
    std::deque<Box> coming;
};

/* What threads do together; the named barriers' kinds are the numbers of threads that they count. */
enum Act {
    BARRIER, SHUFFLE, LOAD_MATRICES, LOAD_TURNED, STORE_MATRICES, STORE_TURNED, MMA_BF16, MMA_F16, MMA_S8, MMA_E4M3, MMA_SPARSE,
    GROUP_PRODUCT = MMA_SPARSE + 4, /* of two dtypes and two pairs of threads each */
    GROUP_PRODUCT_REGISTERS, WAIT_FOR_PRODUCTS, MORE_REGISTERS, FEWER_REGISTERS
};

struct Meeting {
    int arrived = 0, generation = 0, kind = 0;
    uint32_t in[32][16], out[32][4];
    uint64_t tile_a, tile_b;
};

constexpr int STACK_BYTES = 64 << 10;
using Stacks = std::vector<std::unique_ptr<char[]>>;

std::vector<Fiber> fibers;
Stacks stacks; /* kept from block to block */
std::vector<Meeting> warps, warp_groups, named;
std::map<void *, Barrier> barriers;
std::vector<int> registers; /* per thread of each warp group */
int free_registers;
Meeting block;
ucontext_t scheduler;
int current, threads;
bool late_copies, late_products;
int shared_bytes = SHARED_BYTES; /* that a launch asked for */
std::vector<uint8_t> shown(SHARED_BYTES); /* shared memory as copies of boxes and products of warp groups see it */
bool early, ahead; /* whether the launch may begin before earlier ones end, and whether those have yet to run */
int64_t block_x, block_y, block_z, blocks_x;
void *kernel;
int64_t arguments[ARGUMENTS];

char failure[256];
long progress; /* how often a thread came to where others are awaited, or to its end */

void yield() { swapcontext(&fibers[current].context, &scheduler); }

/* The launch ends with the first failure. */
void fail(const char *why) {
    if (!failure[0])
        std::snprintf(failure, sizeof failure, "%s (thread %d of block %ld, %ld)", why, current, (long)block_x, (long)block_y);
    for (;;) yield();
}

template <class Compute> void meet(Meeting &m, int kind, int all, Compute compute) {
    if (m.arrived && m.kind != kind) fail("threads that should act together do different things");
    m.kind = kind;
    progress++;
    int mine = m.generation;
    if (++m.arrived == all) {
        compute();
        m.arrived = 0;
        m.generation++;
    } else {
        while (m.generation == mine) yield();
    }
}

Meeting &warp() { return warps[current / 32]; }
int lane() { return current % 32; }

template <size_t> using One = int64_t;
template <size_t... I> void call(std::index_sequence<I...>) { reinterpret_cast<void (*)(One<I>...)>(kernel)(arguments[I]...); }

void body() {
    call(std::make_index_sequence<ARGUMENTS>());
    for (auto &group : fibers[current].groups)
        if (!group.empty()) fail("copies were never waited for");
    if (!fibers[current].open.empty()) fail("copies were never committed");
    if (!fibers[current].products.empty()) fail("products were never committed");
    if (!fibers[current].product_groups.empty()) fail("products were never waited for");
    if (early && !fibers[current].waited) fail("a thread of an early launch never waits for the launches before it");
    fibers[current].done = true;
    progress++;
    yield();
}

float of_bf16(uint32_t bits) {
    bits <<= 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

float of_f16(uint32_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return bits & 0x8000 ? -size : size;
}

float of_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint32_t bits_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

void come(const std::vector<Copy> &group) {
    for (const Copy &c : group) std::memcpy(c.to, c.from, c.bytes);
}

void copy(void *to, const void *from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) fail("a copy that is not aligned");
    fibers[current].open.push_back({to, from, bytes});
    if (!late_copies) come({{to, from, bytes}});
}

/* A block between two turns, and a launch of which some blocks have begun. */
struct Block {
    int64_t number;
    Stacks stacks;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps, warp_groups, named;
    std::map<void *, Barrier> barriers;
    std::vector<int> registers;
    int free_registers;
    Meeting block;
    std::vector<uint8_t> shared, shown;
};

struct Begun {
    void *function;
    std::vector<int64_t> arguments;
    int64_t grid[3];
    int threads;
    std::vector<Block> blocks;
};

bool prepare(void *function, const int64_t *args, int count, int64_t grid_x, int block_threads, int late) {
    kernel = function;
    threads = block_threads;
    late_copies = late, late_products = !late;
    blocks_x = grid_x;
    failure[0] = 0;
    std::memset(arguments, 0, sizeof arguments);
    if (count > ARGUMENTS) return std::snprintf(failure, sizeof failure, "too many arguments"), false;
    std::memcpy(arguments, args, sizeof(int64_t) * count);
    return true;
}

void place(int64_t number, int64_t grid_x, int64_t grid_y) {
    block_x = number % grid_x, block_y = number / grid_x % grid_y, block_z = number / grid_x / grid_y;
}

void start(int64_t number, int64_t grid_x, int64_t grid_y) {
    place(number, grid_x, grid_y);
    while ((int)stacks.size() < threads) stacks.emplace_back(new char[STACK_BYTES]);
    std::memset(jisu_shared, 0xff, sizeof jisu_shared);
    std::fill(shown.begin(), shown.end(), 0xff);
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Meeting>((threads + 31) / 32);
    warp_groups = std::vector<Meeting>((threads + 127) / 128);
    named = std::vector<Meeting>(16);
    barriers.clear();
    registers = std::vector<int>((threads + 127) / 128, REGISTERS / threads / 8 * 8);
    free_registers = REGISTERS - registers[0] * threads;
    block = Meeting();
    for (Fiber &f : fibers) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks[&f - fibers.data()].get();
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link = nullptr;
        makecontext(&f.context, body, 0);
    }
}

/* Run the block's threads to their end, or, ahead of earlier launches, until nobody gets any further; whether nothing failed. */
bool run(int order) {
    std::vector<int> turns(threads);
    for (int i = 0; i < threads; i++) turns[i] = order == -1 ? threads - 1 - i : i;
    std::minstd_rand random(order);
    for (int running = threads; running;) {
        running = 0;
        long before = progress;
        if (order != 1 && order != -1) std::shuffle(turns.begin(), turns.end(), random);
        for (int turn : turns) {
            current = turn;
            if (fibers[current].done) continue;
            swapcontext(&scheduler, &fibers[current].context);
            running += !fibers[current].done;
            if (failure[0]) return false;
        }
        if (running && progress == before) {
            if (ahead) return true;
            return std::snprintf(failure, sizeof failure, "threads wait for each other for ever"), false;
        }
    }
    for (auto &barrier : barriers)
        if (!barrier.second.coming.empty())
            return std::snprintf(failure, sizeof failure, "copies of boxes were never waited for"), false;
    if (std::any_of(jisu_shared + shared_bytes, jisu_shared + SHARED_BYTES, [](uint8_t byte) { return byte != 0xff; }))
        return std::snprintf(failure, sizeof failure, "shared memory is written behind what the launch asked for"), false;
    return true;
}

} // namespace

extern "C" {

/* Run a kernel over a grid; what went wrong, or nothing. order: -1 runs blocks, and each one's threads, from the last to the first, 1 from the
 * first; any other number has a block's threads take their turns in an order of its own. */
const char *emulated_launch(void *function, const int64_t *args, int count, int64_t grid_x, int64_t grid_y, int64_t grid_z, int block_threads, int late, int order) {
    early = false;
    if (!prepare(function, args, count, grid_x, block_threads, late)) return failure;
    int64_t blocks = grid_x * grid_y * grid_z;
    for (int64_t number = 0; number < blocks; number++) {
        start(order == -1 ? blocks - 1 - number : number, grid_x, grid_y);
        if (!run(order)) return failure;
    }
    return nullptr;
}

/* Begin a launch that may run before earlier ones have ended; nothing where it failed, see `emulated_failure`. */
void *emulated_begin(void *function, const int64_t *args, int count, int64_t grid_x, int64_t grid_y, int64_t grid_z, int block_threads) {
    early = true;
    auto launch = std::make_unique<Begun>();
    if (!prepare(function, args, count, grid_x, block_threads, 0)) return nullptr;
    ahead = true;
    launch->function = function, launch->arguments.assign(args, args + count);
    launch->grid[0] = grid_x, launch->grid[1] = grid_y, launch->grid[2] = grid_z, launch->threads = block_threads;
    int64_t last = grid_x * grid_y * grid_z - 1;
    for (int64_t number = 0; number <= last; number += last ? last : 1) {
        Block b;
        std::swap(stacks, b.stacks);
        start(number, grid_x, grid_y);
        bool sound = run(1);
        std::swap(stacks, b.stacks);
        if (!sound) return ahead = false, nullptr;
        b.number = number;
        b.fibers.swap(fibers), b.warps.swap(warps), b.warp_groups.swap(warp_groups), b.named.swap(named);
        b.barriers.swap(barriers), b.registers.swap(registers);
        b.free_registers = free_registers, b.block = block;
        b.shared.assign(jisu_shared, jisu_shared + sizeof jisu_shared), b.shown = shown;
        launch->blocks.push_back(std::move(b));
    }
    ahead = false;
    return launch.release();
}

/* The rest of a launch that was begun: earlier ones have ended. */
const char *emulated_end(void *begun) {
    std::unique_ptr<Begun> launch((Begun *)begun);
    early = true;
    const int64_t *grid = launch->grid;
    if (!prepare(launch->function, launch->arguments.data(), (int)launch->arguments.size(), grid[0], launch->threads, 1)) return failure;
    for (int64_t number = 0; number < grid[0] * grid[1] * grid[2]; number++) {
        Block *b = nullptr;
        for (Block &other : launch->blocks)
            if (other.number == number) b = &other;
        if (!b) {
            start(number, grid[0], grid[1]);
            if (!run(1)) return failure;
            continue;
        }
        late_copies = false, late_products = true;
        place(number, grid[0], grid[1]);
        fibers.swap(b->fibers), warps.swap(b->warps), warp_groups.swap(b->warp_groups), named.swap(b->named);
        barriers.swap(b->barriers), registers.swap(b->registers);
        free_registers = b->free_registers, block = b->block;
        std::memcpy(jisu_shared, b->shared.data(), sizeof jisu_shared), shown = b->shown;
        if (!run(1)) return failure;
        late_copies = true, late_products = false;
    }
    return nullptr;
}

const char *emulated_failure() { return failure; }

/* So many bytes of shared memory have the launches that follow. */
void emulated_shared(int bytes) { shared_bytes = bytes; }

void emulated_wait_for_launches() __asm__("emulated.griddepcontrol.wait");
void emulated_wait_for_launches() {
    fibers[current].waited = true;
    progress++;
    while (ahead) yield();
}
void emulated_launch_dependents() __asm__("emulated.griddepcontrol.launch_dependents");
void emulated_launch_dependents() {}

uint32_t emulated_tid() __asm__("emulated.read.ptx.sreg.tid.x");
uint32_t emulated_tid() { return current; }
uint32_t emulated_block_x() __asm__("emulated.read.ptx.sreg.ctaid.x");
uint32_t emulated_block_x() { return block_x; }
uint32_t emulated_block_y() __asm__("emulated.read.ptx.sreg.ctaid.y");
uint32_t emulated_block_y() { return block_y; }

uint32_t emulated_blocks_x() __asm__("emulated.read.ptx.sreg.nctaid.x");
uint32_t emulated_blocks_x() { return blocks_x; }
uint32_t emulated_block_z() __asm__("emulated.read.ptx.sreg.ctaid.z");
uint32_t emulated_block_z() { return block_z; }

/* What LLVM calls on processors that don't round to bfloat16: the result is in the low half of the register. */
float rounded_to_bf16(float x) __asm__("__truncsfbf2");
float rounded_to_bf16(float x) {
    uint32_t bits = bits_of(x);
    return of_bits(x != x ? bits >> 16 | 64 : (bits + 32767 + (bits >> 16 & 1)) >> 16);
}

float emulated_exp2(float x) __asm__("emulated.ex2.approx.ftz.f");
float emulated_exp2(float x) {
    float y = std::exp2(x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

void emulated_barrier() __asm__("emulated.barrier0");
void emulated_barrier() { meet(block, BARRIER, threads, [] {}); }

float emulated_shuffle(int32_t mask, float value, int32_t distance, int32_t clamp) __asm__("emulated.shfl.sync.bfly.f32");
float emulated_shuffle(int32_t mask, float value, int32_t distance, int32_t clamp) {
    if (mask != -1 || clamp != 31) fail("a shuffle of a part of the warp");
    Meeting &w = warp();
    w.in[lane()][0] = bits_of(value);
    w.in[lane()][1] = distance;
    meet(w, SHUFFLE, 32, [&] {
        for (int i = 0; i < 32; i++) w.out[i][0] = w.in[i ^ w.in[i][1]][0];
    });
    return of_bits(w.out[lane()][0]);
}

void emulated_copy(void *to, const void *from) __asm__("emulated.cp.async.cg.shared.global.16");
void emulated_copy(void *to, const void *from) { copy(to, from, 16); }
void emulated_copy8(void *to, const void *from) __asm__("emulated.cp.async.ca.shared.global.8");
void emulated_copy8(void *to, const void *from) { copy(to, from, 8); }

void emulated_commit() __asm__("emulated.cp.async.commit.group");
void emulated_commit() {
    Fiber &f = fibers[current];
    f.groups.push_back(f.open);
    f.open.clear();
}

void emulated_wait(int32_t but) __asm__("emulated.cp.async.wait.group");
void emulated_wait(int32_t but) {
    Fiber &f = fibers[current];
    while ((int)f.groups.size() > but) {
        if (late_copies) come(f.groups.front());
        f.unfenced |= !f.groups.front().empty();
        f.groups.erase(f.groups.begin());
    }
}

void emulated_fence() __asm__("emulated.fence.proxy.async.shared_cta");
void emulated_fence() {
    fibers[current].unfenced = false;
    shown.assign(jisu_shared, jisu_shared + SHARED_BYTES); /* others' stores, too: whose they are isn't known */
}

/* Barriers in shared memory, and copies of boxes. */

static Barrier &barrier_at(void *at) {
    auto found = barriers.find(at);
    if (found == barriers.end()) fail("a barrier in shared memory that nobody made");
    if (!found->second.shown && found->second.maker != current) fail("a barrier in shared memory that its maker didn't show");
    return found->second;
}

static void settle(Barrier &b) {
    if (b.pending < 0) fail("more threads arrive at a barrier in shared memory than it counts");
    if (b.pending == 0 && b.bytes < 0) fail("more bytes come than a barrier in shared memory expects");
    if (b.pending || b.bytes) return;
    b.phase++, b.pending = b.arrivals;
    progress++;
}

static void come(Barrier &b, Box box) {
    const TensorMap &m = *box.from;
    for (int r = 0; r < m.box_rows; r++)
        for (int c = 0; c < m.box_columns; c++) {
            uintptr_t to = reinterpret_cast<uintptr_t>(box.to) + (int64_t(r) * m.box_columns + c) * m.itemsize;
            to ^= ((to >> 7) & ((1 << m.turned) - 1)) << 4;
            int64_t row = int64_t(box.row) + r, column = int64_t(box.column) + c;
            if (row < 0 || row >= m.rows || column < 0 || column >= m.columns) std::memset((void *)to, 0, m.itemsize);
            else std::memcpy((void *)to, m.address + row * m.stride + column * m.itemsize, m.itemsize);
            std::memcpy(&shown[to % SHARED_BYTES], (void *)to, m.itemsize);
        }
    b.bytes -= int64_t(m.box_rows) * m.box_columns * m.itemsize;
    settle(b);
}

void emulated_make(void *at, int32_t arrivals) __asm__("emulated.mbarrier.init.shared");
void emulated_make(void *at, int32_t arrivals) {
    if (reinterpret_cast<uintptr_t>(at) % 8) fail("a barrier in shared memory that is not aligned");
    if (barriers.count(at)) fail("a barrier in shared memory that is made twice");
    barriers[at] = Barrier{arrivals, arrivals, current, false, 0, 0, {}};
}

void emulated_made() __asm__("emulated.fence.mbarrier_init.release.cluster");
void emulated_made() {
    for (auto &b : barriers) b.second.shown |= b.second.maker == current;
}

int64_t emulated_arrive(void *at) __asm__("emulated.mbarrier.arrive.shared");
int64_t emulated_arrive(void *at) {
    Barrier &b = barrier_at(at);
    b.pending--;
    settle(b);
    return 0;
}

int64_t emulated_expect(void *at, int32_t bytes) __asm__("emulated.mbarrier.arrive.expect.tx.scope.cta.space.cta");
int64_t emulated_expect(void *at, int32_t bytes) {
    Barrier &b = barrier_at(at);
    b.bytes += bytes;
    b.pending--;
    settle(b);
    return 0;
}

bool emulated_try(void *at, int32_t parity) __asm__("emulated.mbarrier.try.wait.parity.scope.cta.space.cta");
bool emulated_try(void *at, int32_t parity) {
    Barrier &b = barrier_at(at);
    while ((b.phase & 1) == parity && !b.pending && !b.coming.empty()) {
        Box box = b.coming.front();
        b.coming.pop_front();
        come(b, box);
    }
    if ((b.phase & 1) != parity) return true;
    yield();
    return false;
}

void emulated_box(char *to, void *at, const TensorMap *from, int32_t column, int32_t row, int16_t, int64_t, bool, bool, int32_t)
    __asm__("emulated.cp.async.bulk.tensor.g2s.tile.2d");
void emulated_box(char *to, void *at, const TensorMap *from, int32_t column, int32_t row, int16_t, int64_t, bool, bool, int32_t) {
    Barrier &b = barrier_at(at);
    if (!b.shown) fail("a copy names a barrier in shared memory that its maker didn't show");
    if (from->mark != TENSOR_MAP) fail("a copy of a box names no tensor map");
    if (reinterpret_cast<uintptr_t>(to) % 128) fail("a box that is not aligned");
    if (to < (char *)jisu_shared || to + from->box_rows * from->box_columns * from->itemsize > (char *)jisu_shared + SHARED_BYTES)
        fail("a box outside of shared memory");
    if (late_copies) b.coming.push_back({to, from, row, column});
    else come(b, {to, from, row, column});
}

/* The driver's, for matrices: what it refuses is refused. */
int cuTensorMapEncodeTiled(TensorMap *map, int dtype, uint32_t rank, void *address, const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    int itemsize = dtype == 6 || dtype == 9 ? 2 : dtype == 0 ? 1 : 0; /* float16, bfloat16 and bytes */
    auto fits = [](uint64_t size, uint32_t box) { return size && size <= uint64_t(1) << 32 && box && box <= 256; };
    if (reinterpret_cast<uintptr_t>(map) % 64 || !itemsize || rank != 2 || reinterpret_cast<uintptr_t>(address) % 16) return 1;
    if (!fits(sizes[0], box[0]) || !fits(sizes[1], box[1]) || strides[0] % 16 || strides[0] >= uint64_t(1) << 40) return 1;
    if (strides[0] < sizes[0] * itemsize || steps[0] != 1 || steps[1] != 1 || interleave || promotion < 0 || promotion > 3 || fill) return 1;
    if (swizzle < 1 || swizzle > 3 || box[0] * itemsize != 16u << swizzle) return 1; /* rows with the swizzle of as many bytes */
    std::memset((void *)map, 0xff, 128);
    *map = {TENSOR_MAP, (const char *)address, (int64_t)sizes[0], (int64_t)sizes[1], (int64_t)strides[0], (int)box[0], (int)box[1], itemsize, swizzle};
    return 0;
}

void emulated_meet(int32_t number, int32_t count) __asm__("emulated.barrier.cta.sync.aligned.count");
void emulated_meet(int32_t number, int32_t count) {
    if (number < 1 || number > 15 || count % 32) fail("a barrier of a number or of threads that there isn't");
    meet(named[number], count, count, [] {});
}

static void share_registers(int count, bool more) {
    int group = current / 128, before = registers[group];
    if (count % 8 || count < 24 || count > 256 || (more ? count < before : count > before)) fail("a number of registers that can't be");
    meet(warp_groups[group], more ? MORE_REGISTERS : FEWER_REGISTERS, 128, [] {});
    if (current % 128 == 0) {
        while (free_registers < (count - before) * 128) yield();
        free_registers -= (count - before) * 128;
        registers[group] = count;
        progress++;
    }
    while (registers[group] != count) yield();
}

void emulated_more(int32_t count) __asm__("emulated.setmaxnreg.inc.sync.aligned.u32");
void emulated_more(int32_t count) { share_registers(count, true); }
void emulated_fewer(int32_t count) __asm__("emulated.setmaxnreg.dec.sync.aligned.u32");
void emulated_fewer(int32_t count) { share_registers(count, false); }

/* Products of a warp group. What isn't waited for is not a number: it says which sums it stands for. */

constexpr uint32_t SUMS_TO_COME = 0x7fc00000;

void emulated_wgmma_fence() __asm__("emulated.wgmma.fence.sync.aligned");
void emulated_wgmma_fence() { fibers[current].ready = true; }

void emulated_wgmma_commit() __asm__("emulated.wgmma.commit_group.sync.aligned");
void emulated_wgmma_commit() {
    Fiber &f = fibers[current];
    f.product_groups.push_back(f.products);
    f.products.clear();
}

static float of_e4m3(uint32_t bits);

/* Tensor cores add products of fp8 to a sum with 13 bits behind the first one of the largest of them all, where the others are cut off (SageAttention2,
 * Zhang et al., 2024; DeepSeek-V3 Technical Report, 2024). */
static float added_in_few_bits(float sum, const float *a, const float *b) {
    float largest = std::fabs(sum);
    for (int k = 0; k < 32; k++) largest = std::max(largest, std::fabs(a[k] * b[k]));
    if (largest == 0 || !std::isfinite(largest)) largest = 1;
    double step = std::ldexp(1.0, std::ilogb(largest) - 13), total = std::trunc(sum / step);
    for (int k = 0; k < 32; k++) total += std::trunc(a[k] * b[k] / step);
    return float(total * step);
}

/* 32 bytes of numbers of some rows of a tile that a descriptor names: rows of 128 bytes in blocks of eight, with the swizzle of 128 bytes. */
static void read_tile(float (*to)[32], uint64_t descriptor, int first, int rows, int kind, bool left) {
    if (descriptor >> 62 != 1) fail("a tile with another swizzle than that of 128 bytes");
    if ((descriptor & ~((uint64_t)3 << 62 | (uint64_t)0x3fff << 32 | 0x3fff)) != 0) fail("a tile with a base offset, or a leading one");
    uint64_t stride = ((descriptor >> 32) & 0x3fff) << 4;
    if ((descriptor >> 3) & 7 || stride % 1024) fail("a tile whose blocks of eight rows aren't at multiples of 1024");
    for (int row = first; row < first + rows; row++)
        for (int k = 0, size = kind < S8_U8 ? 2 : 1; k < 32 / size; k++) {
            uint64_t at = ((descriptor & 0x3fff) << 4) + row / 8 * stride + row % 8 * 128 + size * k;
            at ^= ((at >> 7) & 7) << 4;
            if (at >= SHARED_BYTES) fail("a tile outside of shared memory");
            uint16_t bits = 0;
            std::memcpy(&bits, jisu_shared + at, size);
            if (std::memcmp(&bits, &shown[at], size)) fail("shared memory is multiplied without a fence behind what was stored there");
            to[row - first][k] = kind == F16 ? of_f16(bits) : kind == BF16 ? of_bf16(bits) : kind == E4M3 ? of_e4m3(bits) : left ? int8_t(bits) : uint8_t(bits);
        }
}

/* Add a product of each of some threads, whole warps, to what they hold. */
static void add_product(int begin, int count, const std::function<const Product &(int)> &product, const std::function<float *(int)> &held) {
    static float a[64][32], b[256][32];
    const Product &p = product(begin);
    if (p.own) {
        for (int i = 0; i < count; i++)
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++) {
                    uint32_t bits = product(begin + i).own[r] >> (16 * h) & 0xffff;
                    a[i / 32 * 16 + i % 32 / 4 + 8 * (r & 1)][2 * (i % 4) + h + 8 * (r >> 1)] = p.kind == F16 ? of_f16(bits) : of_bf16(bits);
                }
    } else {
        read_tile(a, p.a, begin % 128 / 2, count / 2, p.kind, true); /* 16 rows per warp */
    }
    read_tile(b, p.b, 0, p.outputs, p.kind, false);
    for (int i = 0; i < count; i++) {
        float *sums = held(begin + i);
        int line = i / 32 * 16 + i % 32 / 4;
        for (int j = 0; j < p.outputs / 8; j++)
            for (int part = 0; part < 4; part++) {
                if (p.kind == E4M3) {
                    sums[4 * j + part] = added_in_few_bits(sums[4 * j + part], a[line + 8 * (part / 2)], b[8 * j + i % 4 * 2 + part % 2]);
                    continue;
                }
                for (int k = 0; k < (p.kind < S8_U8 ? 16 : 32); k++) {
                    float one = a[line + 8 * (part / 2)][k] * b[8 * j + i % 4 * 2 + part % 2][k];
                    float &sum = sums[4 * j + part];
                    sum = p.kind == S8_U8 ? of_bits(bits_of(sum) + uint32_t(int32_t(one))) : sum + one;
                }
            }
    }
}

/* The number of this thread's sums that stand here and are to come; 0 where these are numbers already. */
static uint32_t to_come(const float *sums) {
    uint32_t number = bits_of(sums[0]) - SUMS_TO_COME;
    return fibers[current].sums.count(number) ? number : 0;
}

static void begin_product(float *sums, int32_t count, Product p) {
    Fiber &f = fibers[current];
    Meeting &g = warp_groups[current / 128];
    if (!f.ready) fail("sums are changed without a fence behind what was done to them");
    if (p.outputs % 8 || p.outputs > 256 || count != p.outputs / 2) fail("a product of another form");
    if (!g.arrived) g.tile_a = p.a, g.tile_b = p.b;
    if (p.a != g.tile_a || p.b != g.tile_b) fail("threads of a warp group name different tiles");
    auto read = [&](const std::vector<Product> &under_way) {
        for (const Product &other : under_way)
            if (p.own && other.own == p.own) fail("registers are written that products under way read");
    };
    read(f.products);
    std::for_each(f.product_groups.begin(), f.product_groups.end(), read);
    f.held = sums, f.product = p;
    int begin = current / 128 * 128;
    meet(g, p.own ? GROUP_PRODUCT_REGISTERS : GROUP_PRODUCT, 128, [&] {
        for (Fiber &other : fibers)
            if (other.unfenced) fail("shared memory is multiplied without a fence behind what was copied to it");
        if (!late_products)
            add_product(begin, 128, [](int t) -> const Product & { return fibers[t].product; }, [](int t) { return fibers[t].held; });
    });
    if (!late_products) return;
    uint32_t number = to_come(sums);
    if (!number) f.sums[number = ++f.last_sums].assign(sums, sums + count);
    p.sums = number;
    f.products.push_back(p);
    for (int i = 0; i < count; i++) sums[i] = of_bits(SUMS_TO_COME + number);
}

void emulated_wgmma(float *sums, int32_t count, uint64_t a, uint64_t b, int32_t outputs, int32_t kind) __asm__("emulated.wgmma");
void emulated_wgmma(float *sums, int32_t count, uint64_t a, uint64_t b, int32_t outputs, int32_t kind) {
    begin_product(sums, count, {0, nullptr, a, b, outputs, kind});
}

void emulated_wgmma_registers(float *sums, int32_t count, const uint32_t *own, uint64_t b, int32_t outputs, int32_t kind)
    __asm__("emulated.wgmma.registers");
void emulated_wgmma_registers(float *sums, int32_t count, const uint32_t *own, uint64_t b, int32_t outputs, int32_t kind) {
    begin_product(sums, count, {0, own, 0, b, outputs, kind});
}

void emulated_wgmma_wait(float *sums, int32_t count, int32_t but) __asm__("emulated.wgmma.wait");
void emulated_wgmma_wait(float *sums, int32_t count, int32_t but) {
    Fiber &f = fibers[current];
    f.ready = false;
    int begin = current / 32 * 32;
    meet(warp(), WAIT_FOR_PRODUCTS, 32, [&] {
        for (int i = begin; i < begin + 32; i++) {
            const auto &other = fibers[i].product_groups;
            bool alike = other.size() == f.product_groups.size();
            for (size_t k = 0; alike && k < other.size(); k++) alike = other[k].size() == f.product_groups[k].size();
            if (!alike) fail("threads of a warp committed different products");
        }
        while ((int)f.product_groups.size() > but) {
            for (size_t i = 0; i < f.product_groups.front().size(); i++) {
                auto own = [&](int t) -> const Product & { return fibers[t].product_groups.front()[i]; };
                add_product(begin, 32, own, [&](int t) { return fibers[t].sums[own(t).sums].data(); });
            }
            for (int i = 0; i < 32; i++) fibers[begin + i].product_groups.pop_front();
        }
    });
    uint32_t number = to_come(sums);
    bool changing = false;
    for (auto &group : f.product_groups)
        for (const Product &p : group) changing |= p.sums == number;
    if (!number || changing) return;
    std::memcpy(sums, f.sums[number].data(), count * sizeof *sums);
    f.sums.erase(number);
}

/* Results of several registers come back through memory. */
void emulated_ldmatrix(uint32_t *result, const uint8_t *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], row, 16);
    meet(w, LOAD_MATRICES, 32, [&] {
        for (int i = 0; i < 32; i++)
            for (int matrix = 0; matrix < 4; matrix++) w.out[i][matrix] = w.in[8 * matrix + i / 4][i % 4];
    });
    std::memcpy(result, w.out[lane()], 16);
}

void emulated_ldmatrix_trans(uint32_t *result, const uint8_t *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], row, 16);
    meet(w, LOAD_TURNED, 32, [&] {
        for (int i = 0; i < 32; i++)
            for (int matrix = 0; matrix < 4; matrix++) {
                w.out[i][matrix] = 0;
                for (int h = 0; h < 2; h++) {
                    uint16_t number;
                    std::memcpy(&number, reinterpret_cast<char *>(w.in[8 * matrix + 2 * (i % 4) + h]) + 2 * (i / 4), 2);
                    w.out[i][matrix] |= uint32_t(number) << (16 * h);
                }
            }
    });
    std::memcpy(result, w.out[lane()], 16);
}

static float of_e4m3(uint32_t bits) {
    int e = bits >> 3 & 15, m = bits & 7;
    if (e == 15 && m == 7) return __builtin_nanf("");
    float value = e ? std::ldexp(1 + m / 8.0f, e - 7) : std::ldexp(m / 8.0f, -6);
    return bits & 128 ? -value : value;
}

/* To the nearest e4m3, halves to the even one; numbers beyond the largest become it. */
static uint32_t to_e4m3(float value) {
    if (std::isnan(value)) return 0x7f;
    uint32_t best = 0;
    float size = std::min(std::fabs(value), 448.0f);
    for (uint32_t code = 0; code < 0x7f; code++) {
        float near = std::fabs(of_e4m3(code) - size), least = std::fabs(of_e4m3(best) - size);
        if (near < least || (near == least && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(value) ? 128 : 0);
}

uint16_t emulated_e4m3(float high, float low) __asm__("emulated.ff.to.e4m3x2.rn");
uint16_t emulated_e4m3(float high, float low) { return uint16_t(to_e4m3(high) << 8 | to_e4m3(low)); }

/* As float16, which holds every e4m3. */
static uint32_t half_of_e4m3(uint32_t code) {
    float value = of_e4m3(code);
    uint32_t bits, sign = code >> 7 << 15;
    std::memcpy(&bits, &value, 4);
    if (value == 0) return sign;
    return std::isnan(value) ? 0x7fff : sign | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023);
}

uint32_t emulated_of_e4m3(uint16_t both) __asm__("emulated.e4m3x2.to.f16x2.rn");
uint32_t emulated_of_e4m3(uint16_t both) { return half_of_e4m3(both & 255) | half_of_e4m3(both >> 8) << 16; }

/* Products of bytes: int8 with sums of 32 bits, or e4m3 with sums in float32. */
static void multiply_bytes(uint32_t *result, const uint32_t *mine, bool integers) {
    Meeting &w = warp();
    std::memcpy(w.in[lane()], mine, 10 * sizeof *mine);
    meet(w, integers ? MMA_S8 : MMA_E4M3, 32, [&] {
        uint32_t a[16][32], b[8][32];
        float x[16][32], y[8][32];
        for (int i = 0; i < 32; i++)
            for (int h = 0; h < 4; h++)
                for (int r = 0; r < 4; r++) {
                    a[i / 4 + 8 * (r & 1)][4 * (i % 4) + h + 16 * (r >> 1)] = w.in[i][r] >> (8 * h) & 255;
                    if (r < 2) b[i / 4][4 * (i % 4) + h + 16 * r] = w.in[i][4 + r] >> (8 * h) & 255;
                }
        for (int k = 0; k < 32; k++) {
            for (int row = 0; row < 16; row++) x[row][k] = of_e4m3(a[row][k]);
            for (int column = 0; column < 8; column++) y[column][k] = of_e4m3(b[column][k]);
        }
        for (int i = 0; i < 32; i++)
            for (int r = 0; r < 4; r++) {
                int row = i / 4 + 8 * (r >> 1), column = 2 * (i % 4) + (r & 1);
                int32_t whole = int32_t(w.in[i][6 + r]);
                for (int k = 0; k < 32; k++) whole += int8_t(a[row][k]) * int8_t(b[column][k]);
                w.out[i][r] = integers ? uint32_t(whole) : bits_of(added_in_few_bits(of_bits(w.in[i][6 + r]), x[row], y[column]));
            }
    });
    std::memcpy(result, w.out[lane()], 16);
}

void emulated_mma_s8(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1,
                     uint32_t c2, uint32_t c3) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, c0, c1, c2, c3};
    multiply_bytes(result, mine, true);
}

void emulated_mma_e4m3(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                       float c2, float c3) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, bits_of(c0), bits_of(c1), bits_of(c2), bits_of(c3)};
    multiply_bytes(result, mine, false);
}

static void store_fragments(uint8_t *row, const uint32_t *mine, bool turned) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], mine, 16);
    std::memcpy(w.in[lane()] + 4, &row, sizeof row);
    meet(w, turned ? STORE_TURNED : STORE_MATRICES, 32, [&] {
        for (int i = 0; i < 32; i++) {
            uint8_t *to;
            std::memcpy(&to, w.in[i] + 4, sizeof to);
            for (int c = 0; c < 8; c++) {
                int r = turned ? c : i % 8, column = turned ? i % 8 : c;
                uint16_t number = w.in[4 * r + column / 2][i / 8] >> (16 * (column % 2));
                std::memcpy(to + 2 * c, &number, 2);
            }
        }
    });
}

void emulated_stmatrix(uint8_t *row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) __asm__("emulated.stmatrix.sync.aligned.m8n8.x4.b16.p3");
void emulated_stmatrix(uint8_t *row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t mine[] = {a, b, c, d};
    store_fragments(row, mine, false);
}
void emulated_stmatrix_trans(uint8_t *row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) __asm__("emulated.stmatrix.sync.aligned.m8n8.x4.trans.b16.p3");
void emulated_stmatrix_trans(uint8_t *row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t mine[] = {a, b, c, d};
    store_fragments(row, mine, true);
}

static void multiply(uint32_t *result, const uint32_t *mine, float (*number)(uint32_t)) {
    Meeting &w = warp();
    std::memcpy(w.in[lane()], mine, 10 * sizeof *mine);
    meet(w, number == of_f16 ? MMA_F16 : MMA_BF16, 32, [&] {
        float a[16][16], b[16][8];
        for (int i = 0; i < 32; i++)
            for (int h = 0; h < 2; h++)
                for (int r = 0; r < 4; r++) {
                    a[i / 4 + 8 * (r & 1)][2 * (i % 4) + h + 8 * (r >> 1)] = number((w.in[i][r] >> (16 * h)) & 0xffff);
                    if (r < 2) b[2 * (i % 4) + h + 8 * r][i / 4] = number((w.in[i][4 + r] >> (16 * h)) & 0xffff);
                }
        for (int i = 0; i < 32; i++)
            for (int r = 0; r < 4; r++) {
                float sum = of_bits(w.in[i][6 + r]);
                for (int k = 0; k < 16; k++) sum += a[i / 4 + 8 * (r >> 1)][k] * b[k][2 * (i % 4) + (r & 1)];
                w.out[i][r] = bits_of(sum);
            }
    });
    std::memcpy(result, w.out[lane()], 16);
}

void emulated_mma(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2,
                  float c3) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, bits_of(c0), bits_of(c1), bits_of(c2), bits_of(c3)};
    multiply(result, mine, of_bf16);
}

void emulated_mma_f16(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                      float c2, float c3) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, bits_of(c0), bits_of(c1), bits_of(c2), bits_of(c3)};
    multiply(result, mine, of_f16);
}

/* PTX ISA, "Matrix fragments for sparse mma.m16n8k32": of a row's four neighbours a register has two, whose places the threads say that the
 * selector names: the first of the pair those of columns 0 to 15, the second of the others; rows 0 to 7 in the lower half of the word. */
static void multiply_sparse(uint32_t *result, const uint32_t *mine, int selector, float (*number)(uint32_t)) {
    if (selector != 0 && selector != 1) fail("a selector that names no pair of threads");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], mine, 13 * sizeof *mine);
    meet(w, MMA_SPARSE + 2 * (number == of_f16) + selector, 32, [&] {
        float a[16][32] = {}, b[32][8];
        for (int i = 0; i < 32; i++)
            for (int r = 0; r < 4; r++) {
                int row = i / 4 + 8 * (r & 1), column = 4 * (i % 4) + 16 * (r >> 1);
                uint32_t word = w.in[i / 4 * 4 + 2 * selector + (r >> 1)][12] >> (16 * (r & 1));
                int places = word >> (4 * (i % 4)) & 15;
                if ((places & 3) >= places >> 2) fail("places of two numbers that are not in order");
                for (int h = 0; h < 2; h++) {
                    a[row][column + (places >> (2 * h) & 3)] = number((w.in[i][r] >> (16 * h)) & 0xffff);
                    b[2 * (i % 4) + h + 8 * r][i / 4] = number((w.in[i][4 + r] >> (16 * h)) & 0xffff);
                }
            }
        for (int i = 0; i < 32; i++)
            for (int r = 0; r < 4; r++) {
                float sum = of_bits(w.in[i][8 + r]);
                for (int k = 0; k < 32; k++) sum += a[i / 4 + 8 * (r >> 1)][k] * b[k][2 * (i % 4) + (r & 1)];
                w.out[i][r] = bits_of(sum);
            }
    });
    std::memcpy(result, w.out[lane()], 16);
}

void emulated_mma_sparse(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3,
                         float c0, float c1, float c2, float c3, uint32_t places, int32_t selector) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, b2, b3, bits_of(c0), bits_of(c1), bits_of(c2), bits_of(c3), places};
    multiply_sparse(result, mine, selector, of_bf16);
}

void emulated_mma_sparse_f16(uint32_t *result, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t b2,
                             uint32_t b3, float c0, float c1, float c2, float c3, uint32_t places, int32_t selector) {
    uint32_t mine[] = {a0, a1, a2, a3, b0, b1, b2, b3, bits_of(c0), bits_of(c1), bits_of(c2), bits_of(c3), places};
    multiply_sparse(result, mine, selector, of_f16);
}
}
