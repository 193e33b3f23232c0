// A statistic of each sample's weight gradient, with no weight gradient in memory: the kernel for Hopper (sm_90a).
//
// Persistent: one block a multiprocessor takes items (schedule.h), longest samples first. Its three warpgroups:
//   producer      one thread asks TMA for what is multiplied, in the order in which it will be, into two rings of
//                 shared memory: x in 4 chunks, dy in 8, a chunk being 64 tokens x 128 columns, 16 KiB
//   2 consumers   take the tiles along K of an item in turns, 128 x 128 of dW in 128 registers a thread. Only one of
//                 them multiplies at a time (a baton goes to and fro): its sums run under the other's products
// A sample of up to 512 tokens keeps its dy, (tokens, 128), in the ring for the whole strip, both consumers use it, and
// only x is loaded for each tile: 128 FLOPs a byte from L2. A longer one has dy loaded for each tile again, 64.
// wgmma reads both operands from shared memory as TMA puts them, tokens being the slow axis of both (MN-major).
//
// No neighbour leaks in: a tensor map for each sample, made on the device from cu_seqlens, ends with the sample, and
// what lies beyond it, N or K is zeros. Nothing waits for the host.
//
// FLOPs: 2*T*N*K, and B*N*K additions for the statistic: at T=64 a tile is 512 clocks of products and 128 of L1 sums,
// so the sums hide. Bytes from DRAM: T*(N+K) elements, as long as a sample fits L2.
// Precision: products of bf16 and fp16 exact in fp32, sums in fp32; an item's sums, one for each consumer, in fp32.
#pragma once

#include "grad_density.h"
#define KUNBR_HOPPER_INSTRUCTIONS
#include "statistics.cuh"

namespace kunbr {

constexpr int HOPPER_THREADS = 384;
constexpr int CONSUMERS = 2;
constexpr int X_CHUNKS = 4, DY_CHUNKS = 8;
constexpr int CHUNK = 2 * BOX_BYTES;  // 64 tokens x 128 columns
constexpr int SWIZZLE_PERIOD = 1024;
constexpr int RINGS_BYTES = (X_CHUNKS + DY_CHUNKS) * CHUNK;
constexpr int HOPPER_BYTES = RINGS_BYTES + SWIZZLE_PERIOD;  // wherever it begins, an aligned part is large enough
constexpr int MAP_BYTES = 128;

struct Segment {  // a sample, by its rank
    int64_t start;
    int32_t length, sample;
};

// ---------------------------------------------------------------- the kernel

// What all roles know of an item.
struct Job {
    Item item;
    Segment segment;
    int32_t tiles, blocks;  // along K, and of tokens
    bool keeps_dy;          // for all tiles

    __device__ __forceinline__ Job(const Schedule &schedule, const Segment *segments, int64_t index)
        : item(schedule.item(index)), segment(segments[item.rank]), tiles(schedule.count_k_tiles(item.strip)),
          blocks((segment.length + HOPPER_TOKENS - 1) / HOPPER_TOKENS), keeps_dy(blocks <= DY_CHUNKS) {}
};

// A position in a ring that never stops counting; the parity of a slot's barrier turns with each round.
template <int SLOTS>
struct Position {
    uint32_t count;
    __device__ __forceinline__ int slot() const { return count % SLOTS; }
    __device__ __forceinline__ int parity() const { return count / SLOTS & 1; }
    __device__ __forceinline__ Position operator+(uint32_t more) const { return {count + more}; }
};

struct Barriers {
    uint64_t x_full[X_CHUNKS], x_empty[X_CHUNKS], dy_full[DY_CHUNKS], dy_empty[DY_CHUNKS];
};

// One thread.
__device__ __forceinline__ void produce(const Arguments &arguments, const Segment *segments, const char *maps,
                                        char *x_ring, char *dy_ring, Barriers &barriers) {
    const Schedule &schedule = arguments.schedule;
    const int64_t items = schedule.items();
    Position<X_CHUNKS> x_at = {0};
    Position<DY_CHUNKS> dy_at = {0};
    const char *acquired = nullptr;  // dy's map; x's is that of the same sample
    Job next(schedule, segments, blockIdx.x);
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const Job job = next;
        if (index + gridDim.x < items) next = Job(schedule, segments, index + gridDim.x);  // there when it is needed
        const int projection = schedule.projection(job.item.n_tile);
        const char *x_map = maps + job.item.rank * (1 + schedule.projections) * MAP_BYTES;
        const char *dy_map = x_map + (1 + projection) * MAP_BYTES;
        if (dy_map != acquired) {
            acquire_map(x_map);
            acquire_map(dy_map);
            acquired = dy_map;
        }
        const int n = (job.item.n_tile - schedule.first_tile(projection)) * TILE_N;
        for (int tile = 0; tile < job.tiles; ++tile) {
            const int k = (schedule.first_k_tile(job.item.strip) + tile) * TILE_K;
            for (int block = 0; block < job.blocks; ++block) {
                if (tile == 0 || !job.keeps_dy) {
                    const int slot = dy_at.slot();
                    wait(&barriers.dy_empty[slot], dy_at.parity() ^ 1);  // the first round finds it empty
                    expect_bytes(&barriers.dy_full[slot], CHUNK);
                    KUNBR_UNROLL
                    for (int box = 0; box < 2; ++box)
                        load_box(dy_ring + slot * CHUNK + box * BOX_BYTES, dy_map, n + box * BOX_COLUMNS,
                                 block * HOPPER_TOKENS, &barriers.dy_full[slot]);
                    ++dy_at.count;
                }
                const int slot = x_at.slot();
                wait(&barriers.x_empty[slot], x_at.parity() ^ 1);
                expect_bytes(&barriers.x_full[slot], CHUNK);
                KUNBR_UNROLL
                for (int box = 0; box < 2; ++box)
                    load_box(x_ring + slot * CHUNK + box * BOX_BYTES, x_map, k + box * BOX_COLUMNS,
                             block * HOPPER_TOKENS, &barriers.x_full[slot]);
                ++x_at.count;
            }
        }
    }
}

// acc (+)= dy^T x over the first 16 * STEPS tokens of a chunk of each. A number of steps is a template of its own:
// where it is known at run time alone, the compiler makes each product wait for the one before (C7520).
template <class Type, int STEPS>
__device__ __forceinline__ void multiply_tokens(float (&acc)[2][16][4], uint64_t dy, uint64_t x, bool add) {
    fence_operands();
    KUNBR_UNROLL
    for (int step = 0; step < STEPS; ++step) {
        KUNBR_UNROLL
        for (int half = 0; half < 2; ++half)
            multiply_group<Type>(acc[half], dy + half * (BOX_BYTES >> 4) + step * DESCRIPTOR_STEP,
                                 x + step * DESCRIPTOR_STEP, add || step > 0);
    }
    commit_products();
}

// One warpgroup. Each warp tells by itself that it is done with a chunk: x_empty waits for the four warps that used it,
// dy_empty for eight: those of both consumers, or twice those of the one that used it.
template <class Type>
__device__ __forceinline__ void consume(const Arguments &arguments, const Segment *segments, const char *x_ring,
                                        const char *dy_ring, Barriers &barriers, int consumer, float *warps) {
    const Schedule &schedule = arguments.schedule;
    const int64_t items = schedule.items();
    const int s = arguments.statistic;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint64_t x_first = wgmma_descriptor(shared_address(x_ring));
    const uint64_t dy_first = wgmma_descriptor(shared_address(dy_ring));
    Position<X_CHUNKS> x_at = {0};
    Position<DY_CHUNKS> dy_at = {0};
    if (consumer == 1) pass_baton(consumer);  // the first turn is consumer 0's
    Job next(schedule, segments, blockIdx.x);
#pragma unroll 1
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const Job job = next;
        if (index + gridDim.x < items) next = Job(schedule, segments, index + gridDim.x);  // there when it is needed
        const uint32_t dy_of_tile = job.keeps_dy ? 0 : job.blocks;
        float rows[4] = {};  // of row half * 64 + warp * 16 + h * 8 + lane / 4, at 2 * half + h
        // as many turns for each consumer: with an odd number of tiles the last one of consumer 1 is empty
#pragma unroll 1
        for (int tile = consumer; tile < job.tiles + (job.tiles & 1); tile += CONSUMERS) {
            take_baton(consumer);
            if (tile < job.tiles && job.blocks > 0) {  // a sample without tokens has sums of 0
                float acc[2][16][4];
                const Position<X_CHUNKS> x_tile = x_at + tile * job.blocks;
                const Position<DY_CHUNKS> dy_tile = dy_at + tile * dy_of_tile;
                auto release = [&](int block) {
                    if (lane == 0) {
                        arrive(&barriers.x_empty[(x_tile + block).slot()], 1);
                        if (!job.keeps_dy) arrive(&barriers.dy_empty[(dy_tile + block).slot()], CONSUMERS);
                    }
                    __syncwarp();  // what follows is for whole warps
                };
#pragma unroll 1
                for (int block = 0; block < job.blocks; ++block) {
                    const Position<X_CHUNKS> x_now = x_tile + block;
                    const Position<DY_CHUNKS> dy_now = dy_tile + block;
                    wait(&barriers.dy_full[dy_now.slot()], dy_now.parity());
                    wait(&barriers.x_full[x_now.slot()], x_now.parity());
                    const uint64_t x = x_first + x_now.slot() * (CHUNK >> 4);
                    const uint64_t dy = dy_first + dy_now.slot() * (CHUNK >> 4);
                    const int tokens = job.segment.length - block * HOPPER_TOKENS;
                    if (tokens > 48)
                        multiply_tokens<Type, 4>(acc, dy, x, block > 0);
                    else if (tokens > 32)
                        multiply_tokens<Type, 3>(acc, dy, x, block > 0);
                    else if (tokens > 16)
                        multiply_tokens<Type, 2>(acc, dy, x, block > 0);
                    else
                        multiply_tokens<Type, 1>(acc, dy, x, block > 0);
                    if (block > 0) {
                        wait_products<1>();
                        release(block - 1);
                    }
                }
                pass_baton(consumer);
                wait_products<0>();
                release(job.blocks - 1);
                if (s == KUNBR_L1) join_rows<KUNBR_L1>(rows, acc);
                if (s == KUNBR_L2SQ) join_rows<KUNBR_L2SQ>(rows, acc);
                if (s == KUNBR_LINF) join_rows<KUNBR_LINF>(rows, acc);
            } else {
                pass_baton(consumer);
            }
        }
        if (job.keeps_dy) {
            for (int block = 0; block < job.blocks; ++block) {
                const Position<DY_CHUNKS> dy_now = dy_at + block;
                // a consumer that had no tile must not be a round ahead of the other one
                wait(&barriers.dy_full[dy_now.slot()], dy_now.parity());
                if (lane == 0) arrive(&barriers.dy_empty[dy_now.slot()], 1);
                __syncwarp();
            }
        }
        x_at.count += job.tiles * job.blocks;
        dy_at.count += job.keeps_dy ? job.blocks : job.tiles * job.blocks;

        const int projection = schedule.projection(job.item.n_tile);
        const int part = job.item.strip * CONSUMERS + consumer;
        float *to = arguments.partial;
        if (arguments.along == ALONG_ROW) {
            const int64_t first_n =
                static_cast<int64_t>(job.item.n_tile - schedule.first_tile(projection)) * TILE_N + warp * 16;
            KUNBR_UNROLL
            for (int r = 0; r < 4; ++r) {
                const float sum = join_columns(s, rows[r]);
                const int64_t n = first_n + r / 2 * 64 + accumulator_row(lane, r % 2 * 2);
                if (lane % 4 == 0 && n < schedule.sizes[projection])
                    to[schedule.place(ALONG_ROW, job.segment.sample, part, schedule.first_row(projection) + n)] = sum;
            }
        } else {
            const float mine = join(s, join(s, rows[0], rows[1]), join(s, rows[2], rows[3]));
            const float sum = join_lanes(s, mine);
            if (lane == 0) warps[warp] = sum;
            meet(consumer);
            if (threadIdx.x % 128 == 0)
                to[schedule.place(ALONG_ALL, job.segment.sample, part, job.item.n_tile)] =
                    join(s, join(s, warps[0], warps[1]), join(s, warps[2], warps[3]));
            meet(consumer);
        }
    }
    if (consumer == 0) take_baton(consumer);  // consumer 1's last: a barrier is left as it was found
}

template <class Type>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    hopper_kernel(const __grid_constant__ Arguments arguments, const Segment *segments, const char *maps) {
    KUNBR_DYNAMIC_SHARED(memory);
    __shared__ Barriers barriers;
    __shared__ float warps[CONSUMERS][4];
    char *rings = memory + (SWIZZLE_PERIOD - shared_address(memory) % SWIZZLE_PERIOD) % SWIZZLE_PERIOD;
    char *x_ring = rings, *dy_ring = rings + X_CHUNKS * CHUNK;
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_CHUNKS; ++i) {
            init_barrier(&barriers.x_full[i], 1);
            init_barrier(&barriers.x_empty[i], 4);
        }
        for (int i = 0; i < DY_CHUNKS; ++i) {
            init_barrier(&barriers.dy_full[i], 1);
            init_barrier(&barriers.dy_empty[i], 4 * CONSUMERS);
        }
        make_barriers_visible();
    }
    __syncthreads();
    // The accumulators need more than the 168 registers that each thread begins with; the producer gives of its own.
    if (threadIdx.x < 128) {
        keep_registers<40>();
        if (threadIdx.x == 0) produce(arguments, segments, maps, x_ring, dy_ring, barriers);
    } else {
        take_registers<232>();
        const int consumer = threadIdx.x / 128 - 1;
        consume<Type>(arguments, segments, x_ring, dy_ring, barriers, consumer, warps[consumer]);
    }
}

}  // namespace kunbr
