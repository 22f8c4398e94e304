/* NVIDIA's driver, as far as the run time calls it, over an emulated GPU: modules are shared libraries for this CPU, memory is this
 * machine's, and a captured graph is a list of launches. A stream does what it is told only when somebody waits for it, so that whoever
 * doesn't wait, or waits for another stream, finds nothing done. Of a graph's launches that may begin before earlier ones end, up to AHEAD do.
 *
 * Errors that the real driver gives are given here, too: wrong handles, too much shared memory, calls outside of the context, or in a process that
 * was forked from the one that initialised the driver. After a kernel's failure every call fails, until the context is reset. A kernel that leaves
 * the memory that was allocated for it meets pages that nobody may touch: allocations end, to 16 bytes, where such pages begin. */
#include "emulated_gpu.cc"

#include <csignal>
#include <cstdlib>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <sys/mman.h>
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

struct Memory { size_t bytes; char *pages; size_t mapped; };

std::map<void *, Memory> allocations;
std::map<void *, size_t> pinned;
std::map<void *, std::deque<std::function<int()>>> streams{{nullptr, {}}}; /* what each has yet to do */
std::set<void *> modules, functions, graphs, executables, events;
thread_local std::vector<void *> contexts; /* those that the thread pushed */
int process, broken;
std::string refused; /* the function whose next call fails, and how */
int refusal;
Graph *captured;
void *capturing;
std::string last_failure;
long launches_run, graphs_run, allocated_bytes, early_run, copied_bytes;

int failed(const char *why) {
    if (!why) return 0;
    last_failure = why;
    std::fprintf(stderr, "emulated GPU: %s\n", why);
    return broken = 700;
}

ucontext_t outside;
volatile bool left_memory;
void leave(int) {
    left_memory = true;
    setcontext(&outside);
}

/* What a kernel's work gives, or that it touched memory that is nobody's. */
template <class Work> int watched(Work work) {
    struct sigaction mine = {}, before;
    mine.sa_handler = leave;
    sigaction(SIGSEGV, &mine, &before);
    left_memory = false;
    getcontext(&outside);
    int error = left_memory ? failed("a kernel touched memory outside of what was allocated") : work();
    early = ahead = false;
    sigaction(SIGSEGV, &before, nullptr);
    return error;
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
struct Event { void *stream; std::shared_ptr<bool> reached; };
int wait(void *stream, std::shared_ptr<bool> reached = nullptr) {
    auto &queue = streams[stream];
    while (!queue.empty() && !(reached && *reached)) {
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

/* The allocation in which an address lies; of memory that others have (torch's) nothing is known. */
std::map<void *, Memory>::iterator allocation(const void *address) {
    auto after = allocations.upper_bound(const_cast<void *>(address));
    if (after == allocations.begin()) return allocations.end();
    auto found = std::prev(after);
    return (const char *)address < (const char *)found->first + found->second.bytes ? found : allocations.end();
}

bool fits(const void *address, size_t bytes) {
    auto found = allocation(address);
    return found == allocations.end() || (const char *)address + bytes <= (const char *)found->first + found->second.bytes;
}

/* Why a function can't be called now, if it can't. */
int refuses(const char *name, bool in_context) {
    if (getpid() != process) return 3; /* not initialised */
    if (broken) return broken;
    if (refused == name) return refused.clear(), refusal;
    return in_context && contexts.empty() ? 201 : 0;
}

int later(void *stream, std::function<int()> work) {
    if (!streams.count(stream)) return 400;
    if (captured && stream == capturing) return 900; /* copies would be nodes, which no graph of ours has */
    streams[stream].push_back(work);
    return 0;
}

} // namespace

extern "C" {

long emulated_launches() { return launches_run; }
long emulated_graphs() { return graphs_run; }
long emulated_bytes() { return allocated_bytes; }
long emulated_early() { return early_run; }
long emulated_copied() { return copied_bytes; } /* from one place of the GPU's memory to another */
/* The next call of a function fails with a code. */
void emulated_refuse(const char *function, int code) { refused = function, refusal = code; }

#define CALLED(in_context) if (int error = refuses(__func__, in_context)) return error

int cuInit(unsigned);
int cuInit(unsigned) {
    /* Modules find here what a CPU lacks. */
    Dl_info here;
    if (dladdr((void *)cuInit, &here)) dlopen(here.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    process = getpid();
    return std::getenv("JISU_EMULATED_NO_DEVICE") ? 100 : 0;
}
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { CALLED(false); *device = number; return number ? 101 : 0; }
int cuDeviceGetName(char *name, int size, int) { std::snprintf(name, size, "Emulated GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = size_t(8) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    /* multiprocessors, compute capability, shared memory that a block may ask for */
    *value = attribute == 16 ? 4 : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 227 << 10 : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) { CALLED(false); *context = &captured; return 0; }
int cuDevicePrimaryCtxReset_v2(int) { broken = 0; return 0; } /* other things stay */
int cuCtxPushCurrent_v2(void *context) {
    CALLED(false);
    if (context != &captured) return 201;
    contexts.push_back(context);
    return 0;
}
int cuCtxPopCurrent_v2(void **context) {
    if (contexts.empty()) return 201;
    *context = contexts.back();
    contexts.pop_back();
    return 0;
}
int cuCtxSynchronize() {
    CALLED(true);
    return captured ? 900 : wait_for_all();
}

int cuModuleLoadDataEx(void **module, const void *image, unsigned count, const int *options, void **values) {
    CALLED(true);
    const char *bytes = (const char *)image;
    if (std::memcmp(bytes, "\177ELF", 4)) {
        if (count == 2 && options[0] == 5 && options[1] == 6) /* where the log of errors goes, and how long it may be */
            std::snprintf((char *)values[0], (size_t)values[1], "ptxas fatal   : this driver compiles no PTX");
        return 218; /* not valid */
    }
    /* The headers say how long the file is: section headers stand last. */
    uint64_t table;
    uint16_t size, sections;
    std::memcpy(&table, bytes + 40, 8);
    std::memcpy(&size, bytes + 58, 2);
    std::memcpy(&sections, bytes + 60, 2);
    char path[] = "/tmp/jisu-emulated-XXXXXX";
    int file = mkstemp(path);
    size_t total = table + size_t(size) * sections;
    bool written = write(file, bytes, total) == (ssize_t)total;
    close(file);
    *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!*module) std::fprintf(stderr, "emulated GPU: %s\n", dlerror());
    unlink(path);
    if (!*module) return 200;
    modules.insert(*module);
    return 0;
}
int cuModuleUnload(void *module) {
    CALLED(true);
    for (auto &stream : streams)
        if (!stream.second.empty()) std::fprintf(stderr, "emulated GPU: a module is unloaded before its kernels have run\n"), std::abort();
    return modules.erase(module) ? 0 : 400;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    CALLED(true);
    if (!modules.count(module)) return 400;
    void *code = dlsym(module, name);
    if (!code) return 500;
    functions.insert(*function = new Function{code});
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    CALLED(true);
    if (!functions.count(function)) return 400;
    if (attribute != 8 || value > 227 << 10) return 1;
    ((Function *)function)->shared_limit = value;
    return 0;
}

int cuMemAlloc_v2(void **pointer, size_t bytes) {
    CALLED(true);
    if (!bytes) return 1;
    /* The last pages may not be touched. */
    size_t page = 4096, room = (bytes + page - 1) / page * page;
    char *pages = (char *)mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return 2;
    mprotect(pages + room, page, PROT_NONE);
    *pointer = pages + (room - bytes) / 16 * 16;
    std::memset(pages, 0xff, room); /* nobody may rely on what was there */
    allocations[*pointer] = {bytes, pages, room + page};
    allocated_bytes += bytes;
    return 0;
}
int cuMemFree_v2(void *pointer) {
    CALLED(true);
    if (int error = wait_for_all()) return error;
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return 1;
    allocated_bytes -= found->second.bytes;
    munmap(found->second.pages, found->second.mapped);
    allocations.erase(found);
    return 0;
}
int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    CALLED(true);
    if (!bytes || flags) return 1;
    *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (*pointer) pinned[*pointer] = bytes;
    return *pointer ? 0 : 2;
}
int cuMemFreeHost(void *pointer) {
    CALLED(true);
    if (!pinned.count(pointer)) return 1;
    if (int error = wait_for_all()) return error;
    pinned.erase(pointer);
    std::free(pointer);
    return 0;
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    CALLED(true);
    if (!fits(to, bytes)) return 1;
    if (is_pinned(from)) return later(stream, [=] { std::memcpy(to, from, bytes); return 0; });
    std::vector<char> taken((const char *)from, (const char *)from + bytes);
    return later(stream, [=] { std::memcpy(to, taken.data(), bytes); return 0; });
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    CALLED(true);
    if (!fits(from, bytes)) return 1;
    int error = later(stream, [=] { std::memcpy(to, from, bytes); return 0; });
    return error || is_pinned(to) ? error : wait(stream);
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    CALLED(true);
    if (!fits(to, bytes) || !fits(from, bytes)) return 1;
    copied_bytes += bytes;
    return later(stream, [=] { std::memmove(to, from, bytes); return 0; });
}
int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) {
    CALLED(true);
    if (!fits(to, bytes)) return 1;
    return later(stream, [=] { std::memset(to, value, bytes); return 0; });
}

int cuStreamCreate(void **stream, unsigned flags) {
    CALLED(true);
    if (flags > 1) return 1;
    streams[*stream = new int];
    return 0;
}
int cuStreamDestroy_v2(void *stream) {
    CALLED(true);
    if (!stream || !streams.count(stream)) return 400;
    int error = wait(stream);
    streams.erase(stream);
    delete (int *)stream;
    return error;
}
int cuStreamSynchronize(void *stream) {
    CALLED(true);
    if (!streams.count(stream)) return 400;
    return captured ? 900 : wait(stream);
}
int cuEventCreate(void **event, unsigned flags) {
    CALLED(true);
    if (flags != 2) return 1; /* one that takes time would be slower */
    events.insert(*event = new Event{nullptr, std::make_shared<bool>(true)});
    return 0;
}
int cuEventDestroy_v2(void *event) {
    CALLED(true);
    if (!events.erase(event)) return 400;
    delete (Event *)event; /* whoever waits for it goes on to */
    return 0;
}
int cuEventRecord(void *event, void *stream) {
    CALLED(true);
    if (!events.count(event)) return 400;
    auto reached = std::make_shared<bool>(false);
    *(Event *)event = {stream, reached};
    return later(stream, [=] { *reached = true; return 0; });
}
int cuEventSynchronize(void *event) {
    CALLED(true);
    if (!events.count(event)) return 400;
    if (captured) return 900;
    Event *e = (Event *)event;
    return *e->reached ? 0 : wait(e->stream, e->reached);
}
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    CALLED(true);
    if (!events.count(event)) return 400;
    if (flags) return 1;
    Event e = *(Event *)event; /* as it was recorded last; what is recorded later is another wait's */
    return later(stream, [=] { return *e.reached ? 0 : wait(e.stream, e.reached); });
}
int cuStreamBeginCapture_v2(void *stream, int mode) {
    CALLED(true);
    if (!stream || mode < 0 || mode > 2) return stream ? 1 : 900; /* that stream can't be captured */
    if (!streams.count(stream)) return 400;
    if (captured) return 401;
    captured = new Graph;
    capturing = stream;
    return 0;
}
int cuStreamEndCapture(void *stream, void **graph) {
    CALLED(true);
    *graph = nullptr;
    if (!captured || stream != capturing) return 401;
    graphs.insert(*graph = captured);
    captured = nullptr;
    return 0;
}
int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long flags) {
    CALLED(true);
    if (!graphs.count(graph)) return 400;
    if (flags) return 1;
    executables.insert(*made = new Graph(*(Graph *)graph));
    return 0;
}
int cuGraphDestroy(void *graph) {
    CALLED(true);
    if (!graphs.erase(graph)) return 400;
    delete (Graph *)graph;
    return 0;
}
int cuGraphExecDestroy(void *graph) {
    CALLED(true);
    if (!executables.erase(graph)) return 400;
    int error = wait_for_all();
    delete (Graph *)graph;
    return error;
}
int cuGraphLaunch(void *graph, void *stream) {
    CALLED(true);
    if (!executables.count(graph)) return 400;
    graphs_run++;
    return later(stream, [=] { return watched([=] { return run_all(((Graph *)graph)->launches); }); });
}

static int launch(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void *stream, void **parameters,
                  void **extra, bool early) {
    if (!functions.count(function)) return 400;
    Function *f = (Function *)function;
    if (!x || x > 0x7fffffff || !y || !z || y > 65535 || z > 65535 || !tx || tx > 1024 || ty != 1 || tz != 1 || extra || !parameters) return 1;
    if ((int)shared > f->shared_limit) return 1;
    Launch l{f, {x, y, z}, (int)tx, std::make_shared<std::vector<TensorMap>>(), {}, early};
    /* A kernel on this CPU doesn't say what it takes: a zero ends its parameters, and maps, which stand first, bear a mark. */
    for (; *parameters && *(const uint64_t *)*parameters == TENSOR_MAP; parameters++) {
        l.maps->emplace_back();
        std::memcpy((void *)&l.maps->back(), *parameters, sizeof(TensorMap));
    }
    for (const TensorMap &map : *l.maps) l.arguments.push_back((int64_t)&map);
    for (; *parameters; parameters++) l.arguments.push_back(*(const int64_t *)*parameters);
    if (captured) {
        if (stream != capturing) return 901;
        captured->launches.push_back(l);
        return 0;
    }
    return later(stream, [=] { return watched([=] { return run(l); }); });
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void *stream, void **parameters,
                   void **extra) {
    CALLED(true);
    return launch(function, x, y, z, tx, ty, tz, shared, stream, parameters, extra, false);
}
struct Attribute { int id, pad, value; char rest[60]; };
struct Config { unsigned grid[3], block[3], shared; void *stream; const Attribute *attributes; unsigned count; };
int cuLaunchKernelEx(const Config *c, void *function, void **parameters, void **extra) {
    static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "as in cuda.h");
    CALLED(true);
    if (c->count != 1 || c->attributes->id != 6 || c->attributes->value != 1) return 1;
    return launch(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, parameters, extra, true);
}
int cuGetErrorString(int error, const char **text) { *text = error == 700 ? last_failure.c_str() : "an error of the emulated driver"; return 0; }
}
