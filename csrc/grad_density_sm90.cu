// The tensor maps for the kernel in grad_density_sm90.cuh, and its launches.
#include "grad_density_sm90.cuh"

#include <cudaTypedefs.h>

#include "check.h"

namespace kunbr {

static_assert(sizeof(CUtensorMap) == MAP_BYTES, "a tensor map is 128 bytes");

struct Templates {
    CUtensorMap map[1 + MAX_PROJECTIONS];  // x and dys, of all tokens
};

// ---------------------------------------------------------------- the samples' segments and tensor maps

__global__ void maps_kernel(const __grid_constant__ Templates templates, const __grid_constant__ Arguments arguments,
                            Segment *segments, char *maps) {
    const int operands = 1 + arguments.schedule.projections;
    const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (index >= arguments.schedule.samples * operands) return;
    const int64_t sample = index / operands, samples = arguments.schedule.samples;
    const int operand = static_cast<int>(index % operands);
    const Batch &batch = arguments.batch;
    const int64_t rank =
        samples > MAX_SORTED ? sample : rank_of(batch.cu_seqlens, batch.wide_index, samples, sample);
    const int64_t start = offset_at(batch.cu_seqlens, batch.wide_index, sample);
    const int32_t length = static_cast<int32_t>(offset_at(batch.cu_seqlens, batch.wide_index, sample + 1) - start);
    if (operand == 0) segments[rank] = {length, static_cast<int32_t>(sample)};
    char *map = maps + (rank * operands + operand) * MAP_BYTES;
    const uint4 *from = reinterpret_cast<const uint4 *>(&templates.map[operand]);
    KUNBR_UNROLL
    for (int i = 0; i < MAP_BYTES / 16; ++i) reinterpret_cast<uint4 *>(map)[i] = from[i];
    const Operand &tensor = operand == 0 ? batch.x : batch.dy[operand - 1];
    // a map has one row at least; of a sample without tokens nothing is loaded
    const int64_t first = length > 0 ? start : 0;
    const char *base = static_cast<const char *>(tensor.data) + first * tensor.stride_token * 2;
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(base) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], 1, %1;" ::"l"(map), "r"(max(length, 1))
                 : "memory");
    asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
}

// ---------------------------------------------------------------- launches

static int64_t segments_bytes(int64_t samples) { return ceil_div(samples * sizeof(Segment), MAP_BYTES) * MAP_BYTES; }

int64_t hopper_workspace(int64_t samples, int projections) {
    return segments_bytes(samples) + samples * (1 + projections) * MAP_BYTES;
}

static bool has_map(const Operand &operand) {
    const int64_t bytes = operand.stride_token * 2;
    return operand.wide && operand.stride_token >= operand.columns && bytes < (1ll << 40);
}

bool hopper_can_run(const Arguments &arguments, int64_t tokens, int type, int capability) {
    bool maps = has_map(arguments.batch.x);
    for (int p = 0; p < arguments.schedule.projections; ++p) maps = maps && has_map(arguments.batch.dy[p]);
    return capability == 90 && type != KUNBR_FP32 && tokens > 0 && maps;
}

// cuTensorMapEncodeTiled is the driver's, and is asked for as the kernel is launched: the library loads without one.
static int encoder(PFN_cuTensorMapEncodeTiled_v12000 *encode) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    KUNBR_TRY(cuda_failure("grad_density", error));
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
        return fail(KUNBR_NO_TENSOR_MAPS, "grad_density: the driver has no cuTensorMapEncodeTiled");
    *encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    return KUNBR_OK;
}

static int encode_map(PFN_cuTensorMapEncodeTiled_v12000 encode, const Operand &operand, int64_t tokens, int type,
                      CUtensorMap *map) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(operand.columns), static_cast<cuuint64_t>(tokens)};
    const cuuint64_t stride[1] = {static_cast<cuuint64_t>(operand.stride_token) * 2};
    const cuuint32_t box[2] = {BOX_COLUMNS, HOPPER_TOKENS}, steps[2] = {1, 1};
    const CUtensorMapDataType kind =
        type == KUNBR_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = encode(map, kind, 2, const_cast<void *>(operand.data), sizes, stride, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return fail(KUNBR_NO_TENSOR_MAPS, "grad_density: cuTensorMapEncodeTiled returned %d", static_cast<int>(result));
    return KUNBR_OK;
}

template <class Type>
static int launch(const Arguments &arguments, const Segment *segments, const char *maps, int blocks,
                  cudaStream_t stream) {
    const auto room = cudaFuncAttributeMaxDynamicSharedMemorySize;
    KUNBR_TRY(cuda_failure("grad_density", cudaFuncSetAttribute(hopper_kernel<Type>, room, HOPPER_BYTES)));
    hopper_kernel<Type><<<blocks, HOPPER_THREADS, HOPPER_BYTES, stream>>>(arguments, segments, maps);
    return launched("grad_density");
}

int launch_hopper(const Arguments &arguments, int64_t tokens, int type, void *memory, cudaStream_t stream) {
    const Schedule &schedule = arguments.schedule;
    PFN_cuTensorMapEncodeTiled_v12000 encode;
    KUNBR_TRY(encoder(&encode));
    Templates templates;
    KUNBR_TRY(encode_map(encode, arguments.batch.x, tokens, type, &templates.map[0]));
    for (int p = 0; p < schedule.projections; ++p)
        KUNBR_TRY(encode_map(encode, arguments.batch.dy[p], tokens, type, &templates.map[1 + p]));
    Segment *segments = static_cast<Segment *>(memory);
    char *maps = static_cast<char *>(memory) + segments_bytes(schedule.samples);
    const int64_t count = schedule.samples * (1 + schedule.projections);
    maps_kernel<<<static_cast<unsigned>(ceil_div(count, 128)), 128, 0, stream>>>(templates, arguments, segments, maps);
    KUNBR_TRY(launched("grad_density"));
    int device = 0, processors = 0;
    KUNBR_TRY(cuda_failure("grad_density", cudaGetDevice(&device)));
    const auto count_processors = cudaDevAttrMultiProcessorCount;
    KUNBR_TRY(cuda_failure("grad_density", cudaDeviceGetAttribute(&processors, count_processors, device)));
    const int blocks = static_cast<int>(smaller(processors, schedule.items()));
    if (type == KUNBR_BF16) return launch<Bf16>(arguments, segments, maps, blocks, stream);
    return launch<Fp16>(arguments, segments, maps, blocks, stream);
}

}  // namespace kunbr
