// Runs the kernels of csrc/ on the host, as they are written: each thread of a block is a fiber, and the functions of
// instructions.cuh do what PTX's manual says of their instructions. Where hardware may be early or late (copies in the
// background, wgmma, which thread goes next) chance decides, by a seed, so that a missing wait or a barrier that comes
// too late shows as a wrong number, and a wrong phase as a deadlock, which is found and reported.
//
// It knows nothing of speed, of registers, of memory ordering between threads, or of instructions that are misused in a
// way that assembles: what it finds right can be wrong on a GPU.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fragments.h"
#include "../optimizer.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define KUNBR_DYNAMIC_SHARED(name) char *const name = kunbr::gpu::shared.data() + kunbr::gpu::SHARED_BEGIN

namespace kunbr {

struct Bf16 {};
struct Fp16 {};
struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace gpu {

constexpr int SHARED_BEGIN = 512;  // where a kernel's dynamic memory begins: not at a multiple of the swizzle's period
constexpr int STACK = 256 << 10;

struct Index {
    unsigned x;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    Index thread;
    std::vector<std::function<void()>> copies, products;                         // not yet committed
    std::deque<std::vector<std::function<void()>>> copy_groups, product_groups;  // not yet waited for
};
struct Barrier {  // of a number of threads
    int count = 0;
    uint64_t generation = 0;
};
struct MemoryBarrier {
    int arrivals, pending, phase;
    int64_t bytes;
};
struct Warp {
    Barrier barrier;
    uint32_t word[32][6];
};

inline std::vector<char> shared;
inline std::vector<Fiber> fibers;
inline Fiber *current;  // none while the scheduler runs
inline std::string failure;
inline ucontext_t scheduler;
inline Index block, grid, block_size;
inline uint64_t progress;
inline std::mt19937 chance;
inline std::map<int, Barrier> named;
inline std::map<uint32_t, MemoryBarrier> in_memory;  // by address
inline std::vector<Warp> warps;
inline std::vector<std::function<void()>> engine;  // TMA's copies under way
inline std::function<void()> body;

inline bool maybe() { return chance() & 1; }
// An exception of launch(): a fiber's stack is left as it is.
[[noreturn]] inline void stop(const std::string &why) {
    const std::string where = "block " + std::to_string(block.x);
    if (current == nullptr) throw std::runtime_error(where + ": " + why);
    failure = where + ", thread " + std::to_string(current->thread.x) + ": " + why;
    for (;;) swapcontext(&current->context, &scheduler);
}
inline void require(bool holds, const char *what) {
    if (!holds) stop(what);
}
inline void yield() { swapcontext(&current->context, &scheduler); }
template <class Condition>
void wait_until(const Condition &condition) {
    while (!condition()) yield();
    ++progress;
}
inline bool arrive(Barrier &barrier, int threads) {
    if (++barrier.count < threads) return false;
    barrier.count = 0;
    ++barrier.generation;
    ++progress;
    return true;
}
inline void sync(Barrier &barrier, int threads) {
    const uint64_t generation = barrier.generation;
    if (!arrive(barrier, threads)) wait_until([&] { return barrier.generation != generation; });
}
inline Warp &warp() { return warps[current->thread.x / 32]; }
inline int lane() { return current->thread.x % 32; }

// All lanes' words, for each lane.
template <class Use>
void exchange(const uint32_t *mine, int words, const Use &use) {
    std::copy(mine, mine + words, warp().word[lane()]);
    sync(warp().barrier, 32);
    use(warp().word);
    sync(warp().barrier, 32);
}

inline void entry() {
    body();
    current->done = true;
    ++progress;
    yield();
}

// One block after the other, each with shared memory full of NaN.
inline void launch(unsigned blocks, unsigned threads, int shared_bytes, unsigned seed, std::function<void()> kernel) {
    engine.clear();
    chance.seed(seed);
    body = std::move(kernel);
    grid = {blocks}, block_size = {threads};
    for (block.x = 0; block.x < blocks; ++block.x) {
        shared.assign(SHARED_BEGIN + shared_bytes, '\xFF');
        named.clear(), in_memory.clear(), warps.assign(threads / 32, {});
        fibers = std::vector<Fiber>(threads);
        for (unsigned i = 0; i < threads; ++i) {
            Fiber &fiber = fibers[i];
            fiber.thread = {i};
            fiber.stack.reset(new char[STACK]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, entry, 0);
        }
        std::vector<Fiber *> alive;
        for (Fiber &fiber : fibers) alive.push_back(&fiber);
        int idle = 0;  // rounds in which nothing was seen to happen; a few are chance
        while (!alive.empty()) {
            const uint64_t before = progress;
            if (maybe()) std::shuffle(alive.begin(), alive.end(), chance);
            for (Fiber *fiber : alive) {
                current = fiber;
                swapcontext(&scheduler, &fiber->context);
                current = nullptr;
                if (!failure.empty()) throw std::runtime_error(std::exchange(failure, ""));
            }
            alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber *f) { return f->done; }), alive.end());
            while (!engine.empty() && (maybe() || progress == before)) {
                const size_t which = chance() % engine.size();
                const std::function<void()> copy = engine[which];
                engine.erase(engine.begin() + which);
                copy();
                ++progress;
            }
            idle = progress == before ? idle + 1 : 0;
            if (idle > 20 && !alive.empty())
                stop("deadlock of " + std::to_string(alive.size()) + " threads, the first being " +
                     std::to_string((*std::min_element(alive.begin(), alive.end()))->thread.x));
        }
        for (const auto &barrier : named) require(barrier.second.count == 0, "a named barrier was left half full");
        require(engine.empty(), "copies under way at the end");
    }
}

inline float half_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }  // bf16 alone

inline uint16_t shared_half(int64_t at) {
    require(at >= 0 && at + 2 <= static_cast<int64_t>(shared.size()), "read beyond shared memory");
    uint16_t x;
    std::memcpy(&x, shared.data() + at, 2);
    return x;
}

template <int PENDING>
void wait_groups(std::deque<std::vector<std::function<void()>>> &groups) {
    while (static_cast<int>(groups.size()) > PENDING) {
        for (const auto &act : groups.front()) act();
        groups.pop_front();
    }
}

}  // namespace gpu

#define threadIdx (::kunbr::gpu::current->thread)
#define blockIdx (::kunbr::gpu::block)
#define gridDim (::kunbr::gpu::grid)
#define blockDim (::kunbr::gpu::block_size)

// ---------------------------------------------------------------- CUDA's own functions

using std::max;
inline int __float_as_int(float x) { return static_cast<int>(bits_of(x)); }
inline float __int_as_float(int x) { return float_of(static_cast<uint32_t>(x)); }
inline void __syncthreads() { gpu::sync(gpu::named[0], static_cast<int>(gpu::block_size.x)); }
inline void __syncwarp() { gpu::sync(gpu::warp().barrier, 32); }
template <class T>
T __shfl_xor_sync(unsigned, T mine, int distance) {
    uint32_t words[2] = {};
    std::memcpy(words, &mine, sizeof(T));
    T other;
    gpu::exchange(words, 2,
                  [&](const uint32_t(*all)[6]) { std::memcpy(&other, all[gpu::lane() ^ distance], sizeof(T)); });
    return other;
}

// ---------------------------------------------------------------- instructions.cuh's

inline int opaque(int value) { return value; }
inline float half_bits_to_float(uint16_t) { gpu::stop("fp16 is not emulated"); }
inline uint16_t float_to_half_bits(float) { gpu::stop("fp16 is not emulated"); }

inline uint32_t shared_address(const void *pointer) {
    const int64_t at = static_cast<const char *>(pointer) - gpu::shared.data();
    gpu::require(at >= 0 && at <= static_cast<int64_t>(gpu::shared.size()), "not an address in shared memory");
    return static_cast<uint32_t>(at);
}

inline void copy_async(uint32_t to, const void *from, int bytes) {
    gpu::require(to % 16 == 0 && bytes >= 0 && bytes <= 16, "cp.async's operands");
    gpu::require(bytes == 0 || reinterpret_cast<uintptr_t>(from) % 16 == 0,
                 "cp.async from an address that is not aligned");
    gpu::require(to + 16 <= gpu::shared.size(), "cp.async beyond shared memory");
    auto act = [=] {
        char sixteen[16] = {};
        if (bytes > 0) std::memcpy(sixteen, from, bytes);
        std::memcpy(gpu::shared.data() + to, sixteen, 16);
    };
    if (gpu::maybe()) {
        act();  // at once
    } else {  // or when it is waited for; until then nobody knows what is there
        std::memset(gpu::shared.data() + to, 0xFF, 16);
        gpu::current->copies.push_back(act);
    }
}
inline void commit_copies() {
    gpu::current->copy_groups.push_back(std::move(gpu::current->copies));
    gpu::current->copies.clear();
}
template <int PENDING>
void wait_copies() {
    gpu::wait_groups<PENDING>(gpu::current->copy_groups);
}

inline void load_transposed(uint32_t (&to)[4], uint32_t from) {
    gpu::require(from % 16 == 0, "ldmatrix from an address that is not aligned");
    gpu::exchange(&from, 1, [&](const uint32_t(*all)[6]) {
        const int lane = gpu::lane();
        for (int m = 0; m < 4; ++m) {  // lane 8 * m + r has the address of row r of matrix m
            const uint32_t low = gpu::shared_half(all[8 * m + lane % 4 * 2][0] + lane / 4 * 2);
            const uint32_t high = gpu::shared_half(all[8 * m + lane % 4 * 2 + 1][0] + lane / 4 * 2);
            to[m] = low | high << 16;
        }
    });
}

template <class Type>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    gpu::exchange(mine, 6, [&](const uint32_t(*all)[6]) {
        const int lane = gpu::lane();
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                // A: register 0 rows 0-7, tokens 0-7; 1 rows 8-15; 2 tokens 8-15; 3 both.
                // B: register 0 tokens 0-7; 1 8-15
                const uint32_t left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> (k % 2 * 16) & 0xFFFF;
                const uint32_t right = all[column * 4 + k % 8 / 2][4 + k / 8] >> (k % 2 * 16) & 0xFFFF;
                d[i] +=
                    gpu::half_to_float(static_cast<uint16_t>(left)) * gpu::half_to_float(static_cast<uint16_t>(right));
            }
        }
    });
}

// ---------------------------------------------------------------- those for sm_90a

inline void make_barriers_visible() {}
inline void init_barrier(uint32_t barrier, int arrivals) {
    gpu::require(barrier % 8 == 0 && barrier + 8 <= gpu::shared.size(), "where a barrier is");
    gpu::in_memory[barrier] = {arrivals, arrivals, 0, 0};
}
inline void phase_may_end(gpu::MemoryBarrier &barrier) {
    gpu::require(barrier.pending >= 0, "more arrivals than a barrier in memory expects");
    ++gpu::progress;
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
}
inline void arrive(uint32_t barrier) {
    gpu::MemoryBarrier &b = gpu::in_memory.at(barrier);
    --b.pending;
    phase_may_end(b);
    if (gpu::maybe()) gpu::yield();
}
inline void expect_bytes(uint32_t barrier, int bytes) {
    gpu::in_memory.at(barrier).bytes += bytes;
    arrive(barrier);
}
inline void wait(uint32_t barrier, int parity) {
    const gpu::MemoryBarrier &b = gpu::in_memory.at(barrier);
    gpu::wait_until([&] { return b.phase != parity; });
}

inline bool elect() {
    __syncwarp();
    return gpu::lane() == 0;
}

struct EmulatedMap {  // in the place of a CUtensorMap
    const uint16_t *data;
    int64_t stride, rows, columns;
};
inline void load_box(uint32_t at, const char *map, int column, int token, uint32_t barrier) {
    EmulatedMap m;
    std::memcpy(&m, map, sizeof(m));
    gpu::require(at % 1024 == 0 && at + BOX_BYTES <= gpu::shared.size(), "where a box goes");
    std::memset(gpu::shared.data() + at, 0xFF, BOX_BYTES);
    gpu::engine.push_back([=] {
        for (int t = 0; t < HOPPER_TOKENS; ++t)
            for (int c = 0; c < BOX_COLUMNS; ++c) {
                const bool inside = token + t < m.rows && column + c < m.columns;
                const uint16_t x = inside ? m.data[(token + t) * m.stride + column + c] : 0;
                const uint32_t linear = at + t * 128 + c * 2;  // the swizzle is one of address bits
                std::memcpy(gpu::shared.data() + (linear ^ (linear >> 7 & 7) << 4), &x, 2);
            }
        gpu::MemoryBarrier &b = gpu::in_memory.at(barrier);
        b.bytes -= BOX_BYTES;
        phase_may_end(b);
    });
}
inline void acquire_map(const char *) {}

// Element (mn, token) of 16 tokens of an MN-major operand with the 128-byte swizzle.
inline float by_descriptor(uint64_t descriptor, int mn, int token) {
    const int64_t address = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const int64_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int64_t linear = address + mn / 64 * leading + token / 8 * stride + token % 8 * 128 + mn % 64 * 2;
    return gpu::half_to_float(gpu::shared_half(linear ^ (linear >> 7 & 7) << 4));
}
template <class Type>
void multiply_group(float (&d)[16][4], uint64_t dy, uint64_t x, int add) {
    gpu::require(dy >> 62 == 1 && x >> 62 == 1, "a descriptor without the 128-byte swizzle");
    const int warp = gpu::current->thread.x / 32 % 4, lane = gpu::lane();
    float(*into)[4] = d;
    gpu::current->products.push_back([=] {
        for (int nt = 0; nt < 16; ++nt)
            for (int i = 0; i < 4; ++i) {
                float sum = add ? into[nt][i] : 0.0f;
                for (int token = 0; token < 16; ++token)
                    sum += by_descriptor(dy, warp * 16 + lane / 4 + i / 2 * 8, token) *
                           by_descriptor(x, nt * 8 + lane % 4 * 2 + i % 2, token);
                into[nt][i] = sum;
            }
    });
}
inline void fence_operands() {}
inline void commit_products() {
    gpu::current->product_groups.push_back(std::move(gpu::current->products));
    gpu::current->products.clear();
    if (gpu::maybe()) gpu::yield();
}
template <int PENDING>
void wait_products() {
    if (gpu::maybe()) gpu::yield();
    gpu::wait_groups<PENDING>(gpu::current->product_groups);
    __syncwarp();  // .sync.aligned: a warp waits as a whole
}
inline void take_baton(int consumer) { gpu::sync(gpu::named[1 + consumer], 256); }
inline void pass_baton(int consumer) { gpu::arrive(gpu::named[2 - consumer], 256); }
template <int>
void keep_registers() {}
template <int>
void take_registers() {}

}  // namespace kunbr
