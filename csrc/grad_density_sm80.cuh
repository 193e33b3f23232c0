// A statistic of each sample's weight gradient, with no weight gradient in memory: the kernel for every GPU from sm_80.
//
//     dW_i[n, k] = sum over the tokens t of sample i of dy[t, n] * x[t, k]
//
// A block of 4 warps has one item (schedule.h): TILE_N rows of one sample's dW, walking along a strip of K tile by
// tile. The loads are one sequence over the whole strip, (tile, token block), by cp.async, three steps ahead of the
// products: the next tile's first loads run under this tile's sums. A warp multiplies 64 x 64 by mma.sync.m16n8k16;
// both operands come by ldmatrix.trans, as tokens are the slow axis of both. 69 KiB of shared memory (5 of them for the
// sums of each thread's rows, for which no registers are left), so two blocks share a multiprocessor of sm_80, and
// one's sums run under the other's products too.
//
// FLOPs: 2*T*N*K, and B*N*K additions for the statistic. A token block brings 16 KiB for 2*128*128*32 FLOPs, 64 FLOPs a
// byte from L2. From DRAM T*(N+K) elements, as long as a sample's x and dy fit L2.
// Precision: products of bf16 and fp16 are exact in fp32 and summed in fp32; fp32 is multiplied in full fp32 (not TF32)
// on the CUDA cores, whose threads hold the same elements as an mma.sync would give them. An item's sums are fp32.
// Nothing beyond a sample's tokens, N or K is read: cp.async fills it with zeros.
#pragma once

#include "grad_density.h"
#include "statistics.cuh"

namespace kunbr {

constexpr int PORTABLE_THREADS = 128;
constexpr int PORTABLE_STAGES = 4;

template <class Type>
struct Element {  // Bf16 and Fp16
    static constexpr int BYTES = 2, TOKENS = 32;
    static constexpr bool MATRIX = true;
};
template <>
struct Element<float> {
    static constexpr int BYTES = 4, TOKENS = 16;
    static constexpr bool MATRIX = false;
};

constexpr int MT = 4;  // of 16 rows, a warp's; two warps along N
constexpr int NT = 8;  // of 8 columns, a warp's; two warps along K
static_assert(32 * MT == TILE_N && 16 * NT == TILE_K, "four warps make a tile");

template <class Type>
struct Shared {
    static constexpr int X_BYTES = Element<Type>::TOKENS * TILE_K * Element<Type>::BYTES;
    static constexpr int DY_BYTES = Element<Type>::TOKENS * TILE_N * Element<Type>::BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + DY_BYTES;
    static constexpr int BYTES = PORTABLE_STAGES * STAGE_BYTES;
};

// ---------------------------------------------------------------- loads

// COLUMNS columns from `column`, of the token block that begins `tokens_left` tokens before the sample's end, at row
// `row` of the operand. Zeros beyond both ends.
template <class Type, int COLUMNS>
__device__ __forceinline__ void load_tile(char *to, const Operand &from, int64_t row, int tokens_left,
                                          int64_t column) {
    constexpr int BYTES = Element<Type>::BYTES, TOKENS = Element<Type>::TOKENS;
    constexpr int CHUNKS = COLUMNS * BYTES / CHUNK_BYTES, PER_CHUNK = CHUNK_BYTES / BYTES;
    const char *data = static_cast<const char *>(from.data);
    if (from.wide) {
        const int chunk = threadIdx.x % CHUNKS;
        const int64_t columns_left = from.columns - column - chunk * PER_CHUNK;
        const int inside = columns_left <= 0           ? 0
                           : columns_left >= PER_CHUNK ? CHUNK_BYTES
                                                       : static_cast<int>(columns_left) * BYTES;
        constexpr int STEP = PORTABLE_THREADS / CHUNKS;  // tokens that the block's threads copy at a time
        int token = threadIdx.x / CHUNKS;
        const char *source = data + ((row + token) * from.stride_token + column + chunk * PER_CHUNK) * BYTES;
        KUNBR_UNROLL
        for (int i = 0; i < TOKENS / STEP; ++i) {
            const int bytes = token < tokens_left ? inside : 0;
            copy_async(shared_address(to + tile_byte(token, chunk, CHUNKS, Element<Type>::MATRIX)),
                       bytes > 0 ? source : data, bytes);
            source += from.stride_token * (STEP * BYTES);
            token += STEP;
        }
    } else {  // any strides, an element at a time; not seen in models
#pragma unroll 1
        for (int i = 0; i < TOKENS * COLUMNS / PORTABLE_THREADS; ++i) {
            const int place = i * PORTABLE_THREADS + threadIdx.x;
            const int token = place / COLUMNS, within = place % COLUMNS;
            const bool inside = token < tokens_left && column + within < from.columns;
            const int64_t offset = (row + token) * from.stride_token + (column + within) * from.stride_column;
            char *target = to + tile_byte(token, within / PER_CHUNK, CHUNKS, Element<Type>::MATRIX) +
                           within % PER_CHUNK * BYTES;
            if (BYTES == 4)
                *reinterpret_cast<uint32_t *>(target) = inside ? reinterpret_cast<const uint32_t *>(data)[offset] : 0;
            else
                *reinterpret_cast<uint16_t *>(target) = inside ? reinterpret_cast<const uint16_t *>(data)[offset] : 0;
        }
    }
}

// ---------------------------------------------------------------- products

// acc += the product of one token block.
template <class Type>
__device__ __forceinline__ void add_product(float (&acc)[MT][NT][4], const char *x, const char *dy, int first_row,
                                            int first_column) {
    constexpr int BYTES = Element<Type>::BYTES, TOKENS = Element<Type>::TOKENS;
    constexpr int X_CHUNKS = TILE_K * BYTES / CHUNK_BYTES, DY_CHUNKS = TILE_N * BYTES / CHUNK_BYTES;
    const int lane = threadIdx.x % 32;
    if constexpr (Element<Type>::MATRIX) {
        KUNBR_UNROLL
        for (int token = 0; token < TOKENS; token += 16) {
            uint32_t b[NT / 2][4];
            KUNBR_UNROLL
            for (int pair = 0; pair < NT / 2; ++pair) {
                const TokenChunk source = b_source(lane, token, first_column + pair * 16);
                load_transposed(b[pair], shared_address(x + tile_byte(source.token, source.chunk, X_CHUNKS, true)));
            }
            KUNBR_UNROLL
            for (int mt = 0; mt < MT; ++mt) {
                uint32_t a[4];
                const TokenChunk source = a_source(lane, token, first_row + mt * 16);
                load_transposed(a, shared_address(dy + tile_byte(source.token, source.chunk, DY_CHUNKS, true)));
                KUNBR_UNROLL
                for (int nt = 0; nt < NT; ++nt)
                    multiply<Type>(acc[mt][nt], a, b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]);
            }
        }
    } else {
        const float *x_tile = reinterpret_cast<const float *>(x) + first_column + accumulator_column(lane, 0);
        const float *dy_tile = reinterpret_cast<const float *>(dy) + first_row + accumulator_row(lane, 0);
#pragma unroll 1
        for (int token = 0; token < TOKENS; ++token) {
            float2 b[NT];
            KUNBR_UNROLL
            for (int nt = 0; nt < NT; ++nt)
                b[nt] = *reinterpret_cast<const float2 *>(x_tile + token * TILE_K + nt * 8);
            KUNBR_UNROLL
            for (int mt = 0; mt < MT; ++mt) {
                KUNBR_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const float a = dy_tile[token * TILE_N + mt * 16 + h * 8];
                    KUNBR_UNROLL
                    for (int nt = 0; nt < NT; ++nt) {
                        acc[mt][nt][2 * h] = fmaf(a, b[nt].x, acc[mt][nt][2 * h]);
                        acc[mt][nt][2 * h + 1] = fmaf(a, b[nt].y, acc[mt][nt][2 * h + 1]);
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ void clear(float (&acc)[MT][NT][4]) {
    KUNBR_UNROLL
    for (int i = 0; i < MT * NT * 4; ++i) acc[i / (NT * 4)][i / 4 % NT][i % 4] = 0.0f;
}

// ---------------------------------------------------------------- partial sums

// Statistic S of a thread's rows of a tile, added to those of the tiles before.
template <int S>
__device__ __forceinline__ void add_rows(const float (&acc)[MT][NT][4], float (*rows)[PORTABLE_THREADS]) {
    KUNBR_UNROLL
    for (int r = 0; r < 2 * MT; ++r) {
        float &sum = rows[r][threadIdx.x];
        sum = join<S>(sum, row_statistic<S>(acc[r / 2], r % 2));
    }
}

// The sum over a block's threads, for thread 0.
__device__ __forceinline__ float block_statistic(int s, float x, float *warps) {
    x = join_lanes(s, x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    return join(s, join(s, warps[0], warps[1]), join(s, warps[2], warps[3]));
}

// ---------------------------------------------------------------- the kernel

template <class Type>
__global__ void __launch_bounds__(PORTABLE_THREADS, 2) density_kernel(const __grid_constant__ Arguments arguments) {
    constexpr int TOKENS = Element<Type>::TOKENS;
    using Memory = Shared<Type>;
    KUNBR_DYNAMIC_SHARED(stages);
    __shared__ float sums[2][TILE_N];
    __shared__ float rows[2 * MT][PORTABLE_THREADS];
    __shared__ float warps[4];

    const Schedule &schedule = arguments.schedule;
    const Batch &batch = arguments.batch;
    const Item item = schedule.item(blockIdx.x);
    const int64_t sample = arguments.order == nullptr ? item.rank : arguments.order[item.rank];
    const int projection = schedule.projection(item.n_tile);
    const int64_t first_n = static_cast<int64_t>(item.n_tile - schedule.first_tile(projection)) * TILE_N;
    const int32_t first_tile = schedule.first_k_tile(item.strip), tiles = schedule.count_k_tiles(item.strip);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp / 2 * 16 * MT, first_column = warp % 2 * 64;

    const int64_t start = offset_at(batch.cu_seqlens, batch.wide_index, sample);
    const int length = static_cast<int>(offset_at(batch.cu_seqlens, batch.wide_index, sample + 1) - start);
    Steps loaded;
    loaded.count = Steps::blocks(length, TOKENS);
    const int total = loaded.count * tiles;  // at most longest_strip * MAX_TOKENS / 16, which an int holds

    auto load = [&](int step) {
        if (step < total) {
            char *stage = stages + step % PORTABLE_STAGES * Memory::STAGE_BYTES;
            const int token = loaded.block * TOKENS;
            const int64_t row = start + token;
            const int left = length - token;
            const int64_t first_k = (first_tile + loaded.tile) * static_cast<int64_t>(TILE_K);
            load_tile<Type, TILE_K>(stage, batch.x, row, left, first_k);
            load_tile<Type, TILE_N>(stage + Memory::X_BYTES, batch.dy[projection], row, left, first_n);
            loaded.advance();
        }
        commit_copies();  // of nothing beyond the end, so that the count of groups stays in step
    };
    KUNBR_UNROLL
    for (int step = 0; step < PORTABLE_STAGES - 1; ++step) load(step);

    KUNBR_UNROLL
    for (int r = 0; r < 2 * MT; ++r) rows[r][threadIdx.x] = 0.0f;  // each thread's own: no barrier

    int step = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        float acc[MT][NT][4];
        clear(acc);
#pragma unroll 1
        for (int block = 0; block < loaded.count; ++block, ++step) {
            wait_copies<PORTABLE_STAGES - 2>();
            __syncthreads();  // all threads' copies of this step are there, and its predecessor's stage is free
            load(step + PORTABLE_STAGES - 1);
            const char *stage = stages + step % PORTABLE_STAGES * Memory::STAGE_BYTES;
            add_product<Type>(acc, stage, stage + Memory::X_BYTES, first_row, first_column);
        }
        if (arguments.statistic == KUNBR_L1) add_rows<KUNBR_L1>(acc, rows);
        if (arguments.statistic == KUNBR_L2SQ) add_rows<KUNBR_L2SQ>(acc, rows);
        if (arguments.statistic == KUNBR_LINF) add_rows<KUNBR_LINF>(acc, rows);
    }

    const int s = arguments.statistic;
    KUNBR_UNROLL
    for (int r = 0; r < 2 * MT; ++r) {
        const float sum = join_columns(s, rows[r][threadIdx.x]);
        if (lane % 4 == 0) sums[warp % 2][first_row + r / 2 * 16 + accumulator_row(lane, r % 2 * 2)] = sum;
    }
    __syncthreads();
    const int row = threadIdx.x;  // there are as many rows as threads
    const float sum = join(s, sums[0][row], sums[1][row]);
    if (arguments.along == ALONG_ROW) {
        const int64_t n = first_n + row;
        if (n < schedule.sizes[projection])
            arguments.partial[schedule.place_of_row(sample, item.strip, schedule.first_row(projection) + n)] = sum;
    } else {
        const float whole = block_statistic(s, sum, warps);
        if (threadIdx.x == 0) arguments.partial[schedule.place_of_sum(sample, item.strip, item.n_tile, 0)] = whole;
    }
}

}  // namespace kunbr
