/* NVIDIA's driver, as far as the run time calls it, over an emulated GPU: modules are shared libraries for this CPU, memory is this
 * machine's, and a captured graph is a list of launches. A stream does what it is told only when somebody waits for it, so that whoever
 * doesn't wait, or waits for another stream, finds nothing done. Of a graph's launches that may begin before earlier ones end, up to AHEAD do.
 *
 * Errors that the real driver gives are given here, too: wrong handles, too much shared memory, calls outside of the context; a launch
 * outside of memory that was allocated is not found. */
#include "emulated_gpu.cc"

#include <cstdlib>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unistd.h>
#include <unordered_map>

namespace {

struct Function { void *code; int shared_limit = 48 << 10; };
/* arguments: as kernels on this CPU take them; of tensor maps, which come by value, addresses in `maps`. */
struct Launch {
    Function *function;
    int64_t grid[3];
    int threads;
    std::shared_ptr<std::vector<TensorMap>> maps;
    std::vector<int64_t> arguments;
    bool early;
};
constexpr size_t AHEAD = 3;
struct Graph { std::vector<Launch> launches; };

std::unordered_map<void *, size_t> allocations;
std::map<void *, size_t> pinned;
std::map<void *, std::deque<std::function<int()>>> streams; /* what each has yet to do */
std::vector<void *> contexts;                              /* of the one thread that calls */
Graph *captured;
void *capturing;
std::string last_failure;
long launches_run, graphs_run, allocated_bytes, early_run;

int failed(const char *why) {
    if (!why) return 0;
    last_failure = why;
    std::fprintf(stderr, "emulated GPU: %s\n", why);
    return 700;
}

int run(const Launch &l) {
    launches_run++;
    return failed(emulated_launch(l.function->code, l.arguments.data(), (int)l.arguments.size(), l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1));
}

int run_all(const std::vector<Launch> &launches) {
    std::deque<void *> begun; /* launch i, and those behind it that have begun, too */
    for (size_t i = 0; i < launches.size(); i++) {
        void *mine = begun.empty() ? nullptr : begun.front();
        if (mine) begun.pop_front();
        for (size_t next; begun.size() < AHEAD && (next = i + 1 + begun.size()) < launches.size() && launches[next].early;) {
            const Launch &l = launches[next];
            begun.push_back(emulated_begin(l.function->code, l.arguments.data(), (int)l.arguments.size(), l.grid[0], l.grid[1], l.grid[2], l.threads));
            if (!begun.back()) return failed(emulated_failure());
        }
        launches_run += mine != nullptr, early_run += mine != nullptr;
        if (int error = mine ? failed(emulated_end(mine)) : run(launches[i])) return error;
    }
    return 0;
}

/* Do what a stream was told, up to an event if one is named. */
struct Event { void *stream; bool reached; };
int wait(void *stream, const Event *event = nullptr) {
    auto &queue = streams[stream];
    while (!queue.empty() && !(event && event->reached)) {
        auto next = queue.front();
        queue.pop_front();
        if (int error = next()) return error;
    }
    return 0;
}

int wait_for_all() {
    for (auto &stream : streams)
        if (int error = wait(stream.first)) return error;
    return 0;
}

bool is_pinned(const void *address) {
    auto after = pinned.upper_bound(const_cast<void *>(address));
    return after != pinned.begin() && (const char *)address < (const char *)std::prev(after)->first + std::prev(after)->second;
}

int later(void *stream, std::function<int()> work) {
    if (contexts.empty()) return 201;
    if (captured) return 900;
    streams[stream].push_back(work);
    return 0;
}

} // namespace

extern "C" {

long emulated_launches() { return launches_run; }
long emulated_graphs() { return graphs_run; }
long emulated_bytes() { return allocated_bytes; }
long emulated_early() { return early_run; }

int cuInit(unsigned);
int cuInit(unsigned) {
    /* Modules find here what a CPU lacks. */
    Dl_info here;
    if (dladdr((void *)cuInit, &here)) dlopen(here.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    return std::getenv("JISU_EMULATED_NO_DEVICE") ? 100 : 0;
}
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number ? 101 : 0; }
int cuDeviceGetName(char *name, int size, int) { std::snprintf(name, size, "Emulated GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = size_t(8) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    /* multiprocessors, compute capability, shared memory that a block may ask for */
    *value = attribute == 16 ? 4 : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 227 << 10 : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) { *context = &captured; return 0; }
int cuCtxPushCurrent_v2(void *context) { contexts.push_back(context); return context ? 0 : 201; }
int cuCtxPopCurrent_v2(void **context) {
    if (contexts.empty()) return 201;
    *context = contexts.back();
    contexts.pop_back();
    return 0;
}

int cuModuleLoadData(void **module, const void *image) {
    const char *bytes = (const char *)image;
    if (std::memcmp(bytes, "\177ELF", 4)) return 209; /* no code for this device */
    /* The headers say how long the file is: section headers stand last. */
    uint64_t table;
    uint16_t size, count;
    std::memcpy(&table, bytes + 40, 8);
    std::memcpy(&size, bytes + 58, 2);
    std::memcpy(&count, bytes + 60, 2);
    char path[] = "/tmp/jisu-emulated-XXXXXX";
    int file = mkstemp(path);
    size_t total = table + size_t(size) * count;
    bool written = write(file, bytes, total) == (ssize_t)total;
    close(file);
    *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!*module) std::fprintf(stderr, "emulated GPU: %s\n", dlerror());
    unlink(path);
    return *module ? 0 : 200;
}
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    void *code = dlsym(module, name);
    if (!code) return 500;
    *function = new Function{code};
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute != 8 || value > 227 << 10) return 1;
    ((Function *)function)->shared_limit = value;
    return 0;
}

int cuMemAlloc_v2(void **pointer, size_t bytes) {
    *pointer = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!*pointer) return 2;
    std::memset(*pointer, 0xff, bytes); /* nobody may rely on what was there */
    allocations[*pointer] = bytes;
    allocated_bytes += bytes;
    return 0;
}
int cuMemFree_v2(void *pointer) {
    if (int error = wait_for_all()) return error;
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return 1;
    allocated_bytes -= found->second;
    allocations.erase(found);
    std::free(pointer);
    return 0;
}
int cuMemHostAlloc(void **pointer, size_t bytes, unsigned) {
    *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (*pointer) pinned[*pointer] = bytes;
    return *pointer ? 0 : 2;
}
int cuMemFreeHost(void *pointer) {
    if (int error = wait_for_all()) return error;
    pinned.erase(pointer);
    std::free(pointer);
    return 0;
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (is_pinned(from)) return later(stream, [=] { std::memcpy(to, from, bytes); return 0; });
    std::vector<char> taken((const char *)from, (const char *)from + bytes);
    return later(stream, [=] { std::memcpy(to, taken.data(), bytes); return 0; });
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    int error = later(stream, [=] { std::memcpy(to, from, bytes); return 0; });
    return error || is_pinned(to) ? error : wait(stream);
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return later(stream, [=] { std::memmove(to, from, bytes); return 0; });
}
int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) {
    return later(stream, [=] { std::memset(to, value, bytes); return 0; });
}

int cuStreamCreate(void **stream, unsigned) { *stream = new int; return 0; }
int cuStreamDestroy_v2(void *stream) { int error = wait(stream); streams.erase(stream); delete (int *)stream; return error; }
int cuStreamSynchronize(void *stream) { return captured ? 900 : wait(stream); }
int cuEventCreate(void **event, unsigned) { *event = new Event{nullptr, true}; return 0; }
int cuEventDestroy_v2(void *event) { int error = wait_for_all(); delete (Event *)event; return error; }
int cuEventRecord(void *event, void *stream) {
    *(Event *)event = {stream, false};
    return later(stream, [=] { ((Event *)event)->reached = true; return 0; });
}
int cuEventSynchronize(void *event) { return captured ? 900 : ((Event *)event)->reached ? 0 : wait(((Event *)event)->stream, (Event *)event); }
int cuStreamBeginCapture_v2(void *stream, int) { captured = new Graph; capturing = stream; return 0; }
int cuStreamEndCapture(void *, void **graph) { *graph = captured; captured = nullptr; return 0; }
int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long) { *made = new Graph(*(Graph *)graph); return 0; }
int cuGraphDestroy(void *graph) { delete (Graph *)graph; return 0; }
int cuGraphExecDestroy(void *graph) {
    int error = wait_for_all();
    delete (Graph *)graph;
    return error;
}
int cuGraphLaunch(void *graph, void *stream) {
    graphs_run++;
    return later(stream, [=] {
        return run_all(((Graph *)graph)->launches);
    });
}

static int launch(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void *stream, void **parameters,
                  void **extra, bool early) {
    Function *f = (Function *)function;
    if (!x || !y || !z || y > 65535 || z > 65535 || tx > 1024 || ty != 1 || tz != 1 || parameters) return 1;
    if ((int)shared > f->shared_limit) return 1;
    if (extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4]) return 1;
    size_t bytes = *(size_t *)extra[3];
    const int64_t *values = (const int64_t *)extra[1], *end = values + bytes / 8;
    Launch l{f, {x, y, z}, (int)tx, std::make_shared<std::vector<TensorMap>>(), {}, early};
    for (TensorMap map; end - values >= 16; values += 16) {
        std::memcpy((void *)&map, values, sizeof map);
        if (map.mark != TENSOR_MAP) break;
        l.maps->push_back(map);
    }
    for (const TensorMap &map : *l.maps) l.arguments.push_back((int64_t)&map);
    l.arguments.insert(l.arguments.end(), values, end);
    if (captured) {
        if (stream != capturing) return 901;
        captured->launches.push_back(l);
        return 0;
    }
    return later(stream, [=] { return run(l); });
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void *stream, void **parameters,
                   void **extra) {
    return launch(function, x, y, z, tx, ty, tz, shared, stream, parameters, extra, false);
}
struct Attribute { int id, pad, value; char rest[60]; };
struct Config { unsigned grid[3], block[3], shared; void *stream; const Attribute *attributes; unsigned count; };
int cuLaunchKernelEx(const Config *c, void *function, void **parameters, void **extra) {
    static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "as in cuda.h");
    if (c->count != 1 || c->attributes->id != 6 || c->attributes->value != 1) return 1;
    return launch(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, parameters, extra, true);
}
int cuGetErrorString(int error, const char **text) { *text = error == 700 ? last_failure.c_str() : "an error of the emulated driver"; return 0; }
}
