// What the two kernels of gradient density share with their launcher.
#pragma once

#include "schedule.h"
#if !defined(KUNBR_EMULATED)
#include <cuda_runtime.h>
#endif

namespace kunbr {

struct Operand {
    const void *data;
    int64_t stride_token, stride_column;  // elements
    int64_t columns;
    bool wide;  // rows are contiguous and aligned to 16 bytes
};

struct Batch {
    Operand x, dy[MAX_PROJECTIONS];
    const void *cu_seqlens;
    bool wide_index;
};

struct Arguments {
    Schedule schedule;
    Batch batch;
    const int32_t *order;  // for the portable kernel: the samples, longest first; NULL: as they come
    float *partial;
    int32_t statistic, along;
};

constexpr int TILE_N = 128;  // rows of a tile of dW, and of one warpgroup's accumulators on Hopper
constexpr int CONSUMERS = 2;  // warpgroups of Hopper's kernel, and tiles of its items along N
constexpr Tiling PORTABLE_TILING = {TILE_N, 16, 1};
constexpr Tiling HOPPER_TILING = {CONSUMERS * TILE_N, 32, CONSUMERS * 4};  // each of four warps leaves a sum

#if !defined(KUNBR_EMULATED)

// grad_density_sm80.cu. type: KUNBR_FP32, KUNBR_BF16 or KUNBR_FP16.
int launch_portable(const char *operation, const Arguments &arguments, int type, cudaStream_t stream);

// grad_density_sm90.cu: what its tensor maps need in the workspace, and the launch.
int64_t hopper_workspace(int64_t samples, int projections);
bool hopper_can_run(const Arguments &arguments, int64_t tokens, int type, int capability);
int launch_hopper(const Arguments &arguments, int64_t tokens, int type, void *memory, cudaStream_t stream);

#endif
}  // namespace kunbr
