/* A GPU's block of threads on a CPU: one fiber per thread, run in turns until all of a warp, or of the block, meet.
 *
 * A launch fails, with a message, where threads don't do together what they should, and where copies are not waited for. Asynchronous
 * copies come either at once or only when they are waited for; shared memory begins as NaN. */
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>
#include <ucontext.h>

constexpr int SHARED_BYTES = 256 << 10; /* also its alignment: the lower bits of an address are those inside */
extern "C" alignas(SHARED_BYTES) uint8_t jisu_shared[SHARED_BYTES];
alignas(SHARED_BYTES) uint8_t jisu_shared[SHARED_BYTES];

namespace {

constexpr int ARGUMENTS = 48; /* of a kernel, at most; more than it takes are passed */

struct Copy { void *to; const void *from; int bytes; };

struct Fiber {
    ucontext_t context;
    bool done;
    std::vector<std::vector<Copy>> groups; /* those not waited for, oldest first */
    std::vector<Copy> open;
    bool unfenced; /* wrote to shared memory without a fence for the tensor cores that read it themselves */
    int products;  /* groups of such products begun and not waited for */
};

struct Meeting {
    int arrived = 0, generation = 0, kind = 0;
    uint32_t in[32][16], out[32][4];
    uint64_t tile_a, tile_b;
};

std::vector<Fiber> fibers;
std::vector<std::vector<char>> stacks; /* kept from block to block */
std::vector<Meeting> warps, warp_groups;
Meeting block;
ucontext_t scheduler;
int current, threads, late_copies;
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
    if (fibers[current].products) fail("products were never waited for");
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

} // namespace

extern "C" {

/* Run a kernel over a grid; what went wrong, or nothing. order: -1 runs a block's threads from the last to the first, 1 from the first. */
const char *emulated_launch(void *function, const int64_t *args, int count, int64_t grid_x, int64_t grid_y, int64_t grid_z, int block_threads, int late, int order) {
    kernel = function;
    threads = block_threads;
    late_copies = late;
    failure[0] = 0;
    std::memset(arguments, 0, sizeof arguments);
    if (count > ARGUMENTS) return "too many arguments";
    std::memcpy(arguments, args, sizeof(int64_t) * count);
    while ((int)stacks.size() < threads) stacks.emplace_back(64 << 10);
    blocks_x = grid_x;
    for (int64_t number = 0; number < grid_x * grid_y * grid_z; number++) {
            block_x = number % grid_x, block_y = number / grid_x % grid_y, block_z = number / grid_x / grid_y;
            std::memset(jisu_shared, 0xff, sizeof jisu_shared);
            fibers = std::vector<Fiber>(threads);
            warps = std::vector<Meeting>((threads + 31) / 32);
            warp_groups = std::vector<Meeting>((threads + 127) / 128);
            block = Meeting();
            for (Fiber &f : fibers) {
                f.done = f.unfenced = false;
                f.products = 0;
                auto &stack = stacks[&f - fibers.data()];
                getcontext(&f.context);
                f.context.uc_stack.ss_sp = stack.data();
                f.context.uc_stack.ss_size = stack.size();
                f.context.uc_link = nullptr;
                makecontext(&f.context, body, 0);
            }
            for (int running = threads; running;) {
                running = 0;
                long before = progress;
                for (int i = 0; i < threads; i++) {
                    current = order > 0 ? i : threads - 1 - i;
                    if (fibers[current].done) continue;
                    swapcontext(&scheduler, &fibers[current].context);
                    running += !fibers[current].done;
                    if (failure[0]) return failure;
                }
                if (running && progress == before) return "threads wait for each other for ever";
            }
        }
    return nullptr;
}

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
void emulated_barrier() { meet(block, 1, threads, [] {}); }

float emulated_shuffle(int32_t mask, float value, int32_t distance, int32_t clamp) __asm__("emulated.shfl.sync.bfly.f32");
float emulated_shuffle(int32_t mask, float value, int32_t distance, int32_t clamp) {
    if (mask != -1 || clamp != 31) fail("a shuffle of a part of the warp");
    Meeting &w = warp();
    w.in[lane()][0] = bits_of(value);
    w.in[lane()][1] = distance;
    meet(w, 2, 32, [&] {
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

void emulated_fence() __asm__("emulated.fence.proxy.async.shared.cta");
void emulated_fence() { fibers[current].unfenced = false; }
void emulated_wgmma_fence() __asm__("emulated.wgmma.fence.sync.aligned");
void emulated_wgmma_fence() {}
void emulated_wgmma_commit() __asm__("emulated.wgmma.commit_group.sync.aligned");
void emulated_wgmma_commit() { fibers[current].products++; }
void emulated_wgmma_wait(int64_t but) __asm__("emulated.wgmma.wait_group.sync.aligned");
void emulated_wgmma_wait(int64_t but) {
    if (fibers[current].products > but) fibers[current].products = but;
}

/* A row's element of a tile that a descriptor names: rows of 128 bytes in blocks of eight, with the swizzle of 128 bytes. */
static float tile_element(uint64_t descriptor, int row, int k, bool half) {
    if (descriptor >> 62 != 1) fail("a tile with another swizzle than that of 128 bytes");
    uint64_t stride = ((descriptor >> 32) & 0x3fff) << 4;
    uint64_t at = ((descriptor & 0x3fff) << 4) + row / 8 * stride + row % 8 * 128 + 2 * k;
    at ^= ((at >> 7) & 7) << 4;
    if (at >= SHARED_BYTES) fail("a tile outside of shared memory");
    uint16_t bits;
    std::memcpy(&bits, jisu_shared + at, 2);
    return half ? of_f16(bits) : of_bf16(bits);
}

void emulated_wgmma(float *sums, uint64_t a, uint64_t b, int32_t outputs, int32_t half) __asm__("emulated.wgmma");
void emulated_wgmma(float *sums, uint64_t a, uint64_t b, int32_t outputs, int32_t half) {
    Meeting &g = warp_groups[current / 128];
    if (!g.arrived) g.tile_a = a, g.tile_b = b;
    if (a != g.tile_a || b != g.tile_b) fail("threads of a warp group name different tiles");
    meet(g, 5, 128, [] {
        for (Fiber &f : fibers)
            if (f.unfenced) fail("shared memory is multiplied without a fence behind what was copied to it");
    });
    int thread = current % 128, line = thread / 32 * 16 + thread % 32 / 4;
    for (int j = 0; j < outputs / 8; j++)
        for (int part = 0; part < 4; part++)
            for (int k = 0; k < 16; k++)
                sums[4 * j + part] += tile_element(a, line + 8 * (part / 2), k, half) * tile_element(b, 8 * j + thread % 4 * 2 + part % 2, k, half);
}

/* Results of several registers come back through memory. */
void emulated_ldmatrix(uint32_t *result, const uint8_t *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], row, 16);
    meet(w, 3, 32, [&] {
        for (int i = 0; i < 32; i++)
            for (int matrix = 0; matrix < 4; matrix++) w.out[i][matrix] = w.in[8 * matrix + i / 4][i % 4];
    });
    std::memcpy(result, w.out[lane()], 16);
}

void emulated_ldmatrix_trans(uint32_t *result, const uint8_t *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned");
    Meeting &w = warp();
    std::memcpy(w.in[lane()], row, 16);
    meet(w, 6, 32, [&] {
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

static void multiply(uint32_t *result, const uint32_t *mine, float (*number)(uint32_t)) {
    Meeting &w = warp();
    std::memcpy(w.in[lane()], mine, 10 * sizeof *mine);
    meet(w, 4, 32, [&] {
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
    meet(w, 7 + selector, 32, [&] {
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
