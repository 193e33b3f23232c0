// A statistic of each sample's weight gradient, with no weight gradient in memory: the kernel for Hopper (sm_90a).
//
// Persistent: one block a multiprocessor takes items (schedule.h), longest samples first. Its three warpgroups:
//   producer      two threads ask TMA for what is multiplied, in the order in which it will be, each into a ring of
//                 shared memory: x in 6 slots of 64 tokens x 128 columns, dy in 4 of 64 tokens x 256, of 16 and 32 KiB
//   2 consumers   each with 128 of an item's 256 rows of N: 128 x 128 of dW in 128 registers a thread. They walk along
//                 the strip of K side by side and share x. A baton lets them multiply in turns, 64 tokens each: one's
//                 sums, waits and ends of items run under the other's products
// A sample of up to 256 tokens keeps its dy in the ring for the whole strip: 256 FLOPs a byte from L2. A longer one has
// dy loaded for each tile again: 85. wgmma reads both operands from shared memory as TMA puts them, tokens being the
// slow axis of both (MN-major). An odd tile of 128 at the end of N costs as much as two.
//
// No neighbour leaks in: a tensor map for each sample, made on the device from cu_seqlens, ends with the sample, and
// what lies beyond it, N or K is zeros. Nothing waits for the host.
//
// FLOPs: 2*T*N*K, and B*N*K additions for the statistic: at T=64 a tile is 512 clocks of products and 128 of L1 sums,
// so the sums hide. Bytes from DRAM: T*(N+K) elements, as long as a sample fits L2.
// Predicted, not seen, for 14336 x 4096 and 2048 tokens on an H200: beside its products a consumer's tile costs about
// 330 clocks (90 to begin, 100 until the last product is there, 40 to release, 100 sums, as the upper half's run under
// the lower half's products), an item 700. Two tiles last max(2 * 512, 512 + 330) clocks at T=64 and, at T=32,
// max(2 * 256, 256 + 330): 500-650 TFLOP/s at T=32, 640-720 at T=64, 680-740 from T=128 on.
// Precision: products of bf16 and fp16 exact in fp32, sums in fp32; an item's sums, one for each warp, in fp32.
#pragma once

#include "grad_density.h"
#define KUNBR_HOPPER_INSTRUCTIONS
#include "statistics.cuh"

namespace kunbr {

constexpr int HOPPER_THREADS = 128 * (1 + CONSUMERS);
constexpr int CHUNK = 2 * BOX_BYTES;  // 64 tokens x 128 columns
constexpr int SWIZZLE_PERIOD = 1024;
constexpr int MAP_BYTES = 128;

struct Segment {  // a sample, by its rank
    int32_t length, sample;
};

// Slots of shared memory that are filled and emptied in turns, each with two barriers. One place in it: each role steps
// through by itself, and the parity that a barrier is waited for with turns with each round.
template <int SLOTS, int BYTES>
struct Ring {
    static constexpr int COUNT = SLOTS, MEMORY = SLOTS * BYTES, BARRIERS = SLOTS * 16;
    uint32_t memory, barriers;  // addresses
    int slot, parity;

    __device__ __forceinline__ uint32_t data() const { return memory + slot * BYTES; }
    __device__ __forceinline__ uint32_t full() const { return barriers + slot * 16; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + slot * 16 + 8; }
    __device__ __forceinline__ void advance() {
        if (++slot < SLOTS) return;
        slot = 0;
        parity ^= 1;
    }
    __device__ __forceinline__ void init() const {  // one thread; each of the consumers' warps empties a slot
        for (Ring at = *this; at.parity == 0; at.advance()) {
            init_barrier(at.full(), 1);
            init_barrier(at.empty(), CONSUMERS * 4);
        }
    }
};
using XRing = Ring<6, CHUNK>;
using DyRing = Ring<4, CONSUMERS * CHUNK>;
// wherever it begins, an aligned part is large enough; a multiprocessor has 232448
constexpr int HOPPER_BYTES = SWIZZLE_PERIOD + XRing::MEMORY + DyRing::MEMORY + XRing::BARRIERS + DyRing::BARRIERS;

struct Rings {
    XRing x;
    DyRing dy;
    __device__ __forceinline__ explicit Rings(uint32_t memory) {
        const uint32_t barriers = memory + XRing::MEMORY + DyRing::MEMORY;
        x = {memory, barriers, 0, 0};
        dy = {memory + XRing::MEMORY, barriers + XRing::BARRIERS, 0, 0};
    }
};

// ---------------------------------------------------------------- the kernel

// What all roles know of an item.
struct Job {
    Item item;
    Segment segment;

    __device__ __forceinline__ Job(const Schedule &schedule, const Segment *segments, uint32_t index)
        : item(schedule.item(index)), segment(segments[item.rank]) {}
    __device__ __forceinline__ int blocks() const { return (segment.length + HOPPER_TOKENS - 1) / HOPPER_TOKENS; }
    __device__ __forceinline__ bool keeps_dy() const { return segment.length <= DyRing::COUNT * HOPPER_TOKENS; }
};

// One thread for x and one for dy (operand 0 and 1): BOXES boxes of 64 columns a slot, for each tile's tokens.
template <int BOXES, class AnyRing>
__device__ __forceinline__ void produce(const Arguments &arguments, const Segment *segments, const char *maps,
                                        AnyRing ring, bool dy) {
    const Schedule &schedule = arguments.schedule;
    const uint32_t items = static_cast<uint32_t>(schedule.items());
    const char *acquired = nullptr;
    Job next(schedule, segments, blockIdx.x);
    for (uint32_t index = blockIdx.x; index < items; index += gridDim.x) {
        const Job job = next;
        if (index + gridDim.x < items) next = Job(schedule, segments, index + gridDim.x);  // there when it is needed
        int operand = 0, column = schedule.first_k_tile(job.item.strip) * TILE_K;
        int tiles = schedule.count_k_tiles(job.item.strip);
        if (dy) {
            const int projection = schedule.projection(job.item.n_tile);
            operand = 1 + projection;
            column = (job.item.n_tile - schedule.first_tile(projection)) * HOPPER_TILING.rows;
            if (job.keeps_dy()) tiles = 1;
        }
        const char *map = maps + (int64_t{job.item.rank} * (1 + schedule.projections) + operand) * MAP_BYTES;
        if (map != acquired) acquire_map(map);
        acquired = map;
        for (int tile = 0; tile < tiles; ++tile) {
            for (int token = 0; token < job.segment.length; token += HOPPER_TOKENS) {
                wait(ring.empty(), ring.parity ^ 1);  // the first round finds it empty
                expect_bytes(ring.full(), BOXES * BOX_BYTES);
                KUNBR_UNROLL
                for (int box = 0; box < BOXES; ++box)
                    load_box(ring.data() + box * BOX_BYTES, map, column + box * BOX_COLUMNS, token, ring.full());
                ring.advance();
            }
            if (!dy) column += TILE_K;
        }
    }
}

// acc (+)= dy^T x over the first 16 * STEPS tokens of a chunk of each, the upper half first. A number of steps is a
// template of its own: where it is known at run time alone, the compiler makes each product wait for the one before
// (C7520).
template <class Type, int STEPS>
__device__ __forceinline__ void multiply_tokens(float (&acc)[2][16][4], uint64_t dy, uint64_t x, bool add) {
    fence_operands();
    KUNBR_UNROLL
    for (int half = 0; half < 2; ++half) {
        KUNBR_UNROLL
        for (int step = 0; step < STEPS; ++step)
            multiply_group<Type>(acc[half], dy + half * (BOX_BYTES >> 4) + step * DESCRIPTOR_STEP,
                                 x + step * DESCRIPTOR_STEP, add || step > 0);
        commit_products();
    }
}

// What a thread's rows of an item add up to: at [half][h] row half * 64 + warp * 16 + h * 8 + lane / 4.
__device__ __forceinline__ void write_sums(const Arguments &arguments, const Job &job, const float (&rows)[2][2],
                                           int consumer) {
    const Schedule &schedule = arguments.schedule;
    const int s = arguments.statistic;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float *to = arguments.partial;
    if (arguments.along == ALONG_ROW) {
        const int projection = schedule.projection(job.item.n_tile);
        const int64_t first_n = int64_t{job.item.n_tile - schedule.first_tile(projection)} * HOPPER_TILING.rows +
                                consumer * TILE_N + warp * 16;
        KUNBR_UNROLL
        for (int r = 0; r < 4; ++r) {
            const float sum = join_columns(s, rows[r / 2][r % 2]);
            const int64_t n = first_n + r / 2 * 64 + accumulator_row(lane, r % 2 * 2);
            if (lane % 4 == 0 && n < schedule.sizes[projection])
                to[schedule.place_of_row(job.segment.sample, job.item.strip, schedule.first_row(projection) + n)] = sum;
        }
    } else {
        const float sum = join_lanes(s, join(s, join(s, rows[0][0], rows[0][1]), join(s, rows[1][0], rows[1][1])));
        if (lane == 0)
            to[schedule.place_of_sum(job.segment.sample, job.item.strip, job.item.n_tile, consumer * 4 + warp)] = sum;
    }
}

// One warpgroup. Each warp tells by itself that it is done with a slot.
template <class Type>
__device__ __forceinline__ void consume(const Arguments &arguments, const Segment *segments, Rings rings,
                                        int consumer) {
    const Schedule &schedule = arguments.schedule;
    const uint32_t items = static_cast<uint32_t>(schedule.items());
    const int s = arguments.statistic;
    const int lane = threadIdx.x % 32;
    if (consumer == 1) pass_baton(consumer);  // the first turn is consumer 0's
    Job next(schedule, segments, blockIdx.x);
#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < items; index += gridDim.x) {
        const Job job = next;
        const int blocks = job.blocks(), tiles = schedule.count_k_tiles(job.item.strip);
        const DyRing first_dy = rings.dy;
        float rows[2][2] = {};
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            if (job.keeps_dy()) rings.dy = first_dy;
            const bool drops_dy = !job.keeps_dy() || tile + 1 == tiles;
            float acc[2][16][4];
#pragma unroll 1
            for (int block = 0; block < blocks; ++block) {
                // before the turn, which is to be products alone
                wait(rings.dy.full(), rings.dy.parity);
                wait(rings.x.full(), rings.x.parity);
                const uint64_t x = wgmma_descriptor(rings.x.data());
                const uint64_t dy = wgmma_descriptor(rings.dy.data() + consumer * CHUNK);
                const int tokens = job.segment.length - block * HOPPER_TOKENS;
                take_baton(consumer);
                if (tokens > 48)
                    multiply_tokens<Type, 4>(acc, dy, x, block > 0);
                else if (tokens > 32)
                    multiply_tokens<Type, 3>(acc, dy, x, block > 0);
                else if (tokens > 16)
                    multiply_tokens<Type, 2>(acc, dy, x, block > 0);
                else
                    multiply_tokens<Type, 1>(acc, dy, x, block > 0);
                pass_baton(consumer);
                wait_products<1>();
                if (block + 1 == blocks) join_rows(s, rows[0], acc[0]);  // under the lower half's products
                wait_products<0>();
                if (lane == 0) {
                    arrive(rings.x.empty());
                    if (drops_dy) arrive(rings.dy.empty());
                }
                __syncwarp();  // what follows is for whole warps
                rings.x.advance();
                rings.dy.advance();
            }
            if (blocks > 0) join_rows(s, rows[1], acc[1]);  // a sample without tokens has sums of 0
            // under the other's products, not between two items
            if (tile == 0 && index + gridDim.x < items) next = Job(schedule, segments, index + gridDim.x);
        }
        write_sums(arguments, job, rows, consumer);
    }
    if (consumer == 0) take_baton(consumer);  // consumer 1's last: a barrier is left as it was found
}

template <class Type>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    hopper_kernel(const __grid_constant__ Arguments arguments, const Segment *segments, const char *maps) {
    KUNBR_DYNAMIC_SHARED(memory);
    const uint32_t begin = (shared_address(memory) + SWIZZLE_PERIOD - 1) / SWIZZLE_PERIOD * SWIZZLE_PERIOD;
    const Rings rings(opaque(static_cast<int>(begin)));  // else each use finds out anew where shared memory begins
    if (threadIdx.x == 0) {
        rings.x.init();
        rings.dy.init();
        make_barriers_visible();
    }
    __syncthreads();
    // The accumulators need more than the 168 registers that each thread begins with; the producer gives of its own.
    if (threadIdx.x < 128) {
        keep_registers<40>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            if (elect()) produce<2>(arguments, segments, maps, rings.x, false);
        } else if (warp == 1) {
            if (elect()) produce<2 * CONSUMERS>(arguments, segments, maps, rings.dy, true);
        }
    } else {
        take_registers<232>();
        consume<Type>(arguments, segments, rings, threadIdx.x / 128 - 1);
    }
}

}  // namespace kunbr
