// Lion and AdamW in place over vectors: the active block's flat buffer, in one pass.
//
// Each element is read and written once, 16 bytes at a time. Bytes an element for Lion: bf16 gradient 2, fp32 momentum
// 4 + 4, fp32 weight 4 + 4, its bf16 copy 2, so 20; AdamW has a second moment, 28. At 4.3 TB/s that is 4.7 and 6.5 ms for
// 10^9 weights. FLOPs: about 10 and 15 an element, which is nothing beside them; random bits are 30 integer operations
// an element, below the 130 that fit into the time of its bytes on an H200.
//
// The gradient's sum of squares and the count of what is not finite cost no byte more: each block adds up what it reads
// (in fp32 in a thread, 64 elements, then in float64) and writes it to its place; a second pass adds the blocks' in a
// fixed order. Blocks have the same elements on every GPU, so the sums have the same bits on every GPU.
//
// Types are run-time values: all threads of a launch take the same way, and the kernel waits for memory anyway. What is
// loaded is converted after all loads of a thread were issued, so they are in flight together.
#pragma once

#include "kunbr.h"
#include "optimizer.h"
#if defined(KUNBR_EMULATED)
#include "tests/gpu_emulator.h"
#else
#include "instructions.cuh"
#endif

namespace kunbr {

constexpr int WIDTH = 8;  // elements of a thread: one 16-byte access in bf16, two in fp32
constexpr int OPTIMIZER_THREADS = 256;
constexpr int TURNS = 8;
constexpr int SPAN = WIDTH * OPTIMIZER_THREADS * TURNS;  // elements of a block
constexpr int SUMMARY_THREADS = 1024;

struct Vector {
    void *data;
    int type;
};

struct Update {
    Vector param, grad, state[2], half;
    int64_t size;
    double2 *partial;  // of each block: sum of squares, count; or NULL
    uint64_t seed;
    uint32_t step;
    bool stochastic, wide;  // wide: all pointers are aligned to 16 bytes
};

struct Raw {
    uint4 words[2];
};

// ---------------------------------------------------------------- elements in memory

__device__ __forceinline__ Raw load_eight(const Vector &v, int64_t first) {
    Raw raw;
    if (opaque(v.type) == KUNBR_FP32) {
        const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const float *>(v.data) + first);
        raw.words[0] = from[0];
        raw.words[1] = from[1];
    } else {
        raw.words[0] = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(v.data) + first);
        raw.words[1] = raw.words[0];
    }
    return raw;
}

__device__ __forceinline__ float widen(uint32_t bits, int type) {
    return type == KUNBR_BF16 ? float_of(bits << 16) : half_bits_to_float(static_cast<uint16_t>(bits));
}

__device__ __forceinline__ uint16_t narrow(float x, int type) {
    return type == KUNBR_BF16 ? to_bf16(x) : float_to_half_bits(x);
}

__device__ __forceinline__ void decode(const Raw &raw, int type, float (&x)[WIDTH]) {
    type = opaque(type);
    const uint32_t words[8] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w,
                               raw.words[1].x, raw.words[1].y, raw.words[1].z, raw.words[1].w};
    if (type == KUNBR_FP32) {
        KUNBR_UNROLL
        for (int i = 0; i < WIDTH; ++i) x[i] = float_of(words[i]);
    } else {
        KUNBR_UNROLL
        for (int i = 0; i < WIDTH; ++i) x[i] = widen(words[i / 2] >> (16 * (i % 2)) & 0xFFFF, type);
    }
}

__device__ __forceinline__ void store_eight(const Vector &v, int64_t first, const float (&x)[WIDTH]) {
    const int type = opaque(v.type);
    if (type == KUNBR_FP32) {
        uint4 *to = reinterpret_cast<uint4 *>(static_cast<float *>(v.data) + first);
        to[0] = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
        to[1] = make_uint4(bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7]));
    } else {
        uint32_t words[4];
        KUNBR_UNROLL
        for (int i = 0; i < 4; ++i)
            words[i] = narrow(x[2 * i], type) | static_cast<uint32_t>(narrow(x[2 * i + 1], type)) << 16;
        *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(v.data) + first) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__device__ __forceinline__ float load_one(const Vector &v, int64_t i) {
    const int type = opaque(v.type);
    return type == KUNBR_FP32 ? static_cast<const float *>(v.data)[i]
                              : widen(static_cast<const uint16_t *>(v.data)[i], type);
}

__device__ __forceinline__ void store_one(const Vector &v, int64_t i, float x) {
    const int type = opaque(v.type);
    if (type == KUNBR_FP32)
        static_cast<float *>(v.data)[i] = x;
    else
        static_cast<uint16_t *>(v.data)[i] = narrow(x, type);
}

// What a copy in another type is made from: x as it is stored.
__device__ __forceinline__ float stored(float x, int type) {
    type = opaque(type);
    return type == KUNBR_FP32 ? x : widen(narrow(x, type), type);
}

// ---------------------------------------------------------------- sums of a block

__device__ __forceinline__ double2 add(double2 a, double2 b) { return make_double2(a.x + b.x, a.y + b.y); }

// The sum over a block's threads, in an order that depends on their number alone. For thread 0.
template <int THREADS>
__device__ double2 block_sum(double2 mine) {
    __shared__ double2 warps[THREADS / 32];
    KUNBR_UNROLL
    for (int distance = 16; distance > 0; distance /= 2)
        mine = add(mine, make_double2(__shfl_xor_sync(~0u, mine.x, distance), __shfl_xor_sync(~0u, mine.y, distance)));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    double2 total = make_double2(0, 0);
    if (threadIdx.x == 0)
        for (int i = 0; i < THREADS / 32; ++i) total = add(total, warps[i]);
    return total;
}

// ---------------------------------------------------------------- the kernels

template <class Step, int STATES>
__global__ void __launch_bounds__(OPTIMIZER_THREADS) update_kernel(const Update u, const Step step) {
    float squares = 0.0f;
    int not_finite = 0;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t first =
            blockIdx.x * static_cast<int64_t>(SPAN) + (turn * OPTIMIZER_THREADS + threadIdx.x) * WIDTH;
        if (first >= u.size) break;
        if (u.wide && first + WIDTH <= u.size) {
            const Raw raw_p = load_eight(u.param, first), raw_g = load_eight(u.grad, first);
            const Raw raw_m = load_eight(u.state[0], first), raw_v = STATES > 1 ? load_eight(u.state[1], first) : raw_m;
            float p[WIDTH], g[WIDTH], m[WIDTH], v[WIDTH];
            decode(raw_p, u.param.type, p);
            decode(raw_g, u.grad.type, g);
            decode(raw_m, u.state[0].type, m);
            decode(raw_v, u.state[STATES - 1].type, v);
            Random4 random[2] = {};
            if (u.stochastic) {
                random[0] = random_bits(first / 4, u.seed, u.step);
                random[1] = random_bits(first / 4 + 1, u.seed, u.step);
            }
            KUNBR_UNROLL
            for (int i = 0; i < WIDTH; ++i) {
                squares = fmaf(g[i], g[i], squares);
                not_finite += !is_finite(g[i]);
                step.update(p[i], g[i], m[i], v[i]);
                if (u.stochastic) p[i] = narrow_stochastically(p[i], random[i / 4].word[i % 4]);
            }
            store_eight(u.state[0], first, m);
            if (STATES > 1) store_eight(u.state[1], first, v);
            store_eight(u.param, first, p);
            if (u.half.data != nullptr) {
                KUNBR_UNROLL
                for (int i = 0; i < WIDTH; ++i) p[i] = stored(p[i], u.param.type);
                store_eight(u.half, first, p);
            }
        } else {
            // the last elements, or vectors that begin anywhere: not fast, and not worth the code of eight copies
#pragma unroll 1
            for (int i = 0; i < WIDTH; ++i) {
                const int64_t place = first + i;
                if (place < u.size) {
                    float p = load_one(u.param, place), m = load_one(u.state[0], place);
                    float v = STATES > 1 ? load_one(u.state[1], place) : 0.0f;
                    const float g = load_one(u.grad, place);
                    squares = fmaf(g, g, squares);
                    not_finite += !is_finite(g);
                    step.update(p, g, m, v);
                    if (u.stochastic) p = narrow_stochastically(p, random_bits(place / 4, u.seed, u.step)[place % 4]);
                    store_one(u.state[0], place, m);
                    if (STATES > 1) store_one(u.state[1], place, v);
                    store_one(u.param, place, p);
                    if (u.half.data != nullptr) store_one(u.half, place, stored(p, u.param.type));
                }
            }
        }
    }
    if (u.partial != nullptr) {
        const double2 total = block_sum<OPTIMIZER_THREADS>(make_double2(squares, not_finite));
        if (threadIdx.x == 0) u.partial[blockIdx.x] = total;
    }
}

__global__ void __launch_bounds__(SUMMARY_THREADS) summary_kernel(const double2 *partial, int64_t blocks, double *out) {
    double2 mine = make_double2(0, 0);
    for (int64_t i = threadIdx.x; i < blocks; i += SUMMARY_THREADS) mine = add(mine, partial[i]);
    const double2 total = block_sum<SUMMARY_THREADS>(mine);
    if (threadIdx.x == 0) {
        out[0] = total.x;
        out[1] = total.y;
    }
}

}  // namespace kunbr
