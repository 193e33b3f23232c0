// Gradient density: checks, the choice of a kernel, and the passes before and after it.
//
// Before the kernel the samples are ranked by length. After it the items' partial sums (fp32) are added in float64 in a
// fixed order: some thousand numbers for a weight of a few million elements, which costs microseconds.
#include "grad_density.h"

#include "check.h"
#include "grad_density_passes.cuh"

namespace kunbr {

static int reduce(const char *operation, const Reduction &r, cudaStream_t stream) {
    const int64_t results = r.samples * r.elements;
    if (results == 0) return KUNBR_OK;
    const int64_t blocks = r.elements == 1 ? results : ceil_div(results, HELPER_THREADS);
    if (blocks > 0x7FFFFFFF) return fail(KUNBR_TOO_LARGE, "%s: too many results", operation);
    if (r.elements == 1)
        reduce_kernel<HELPER_THREADS><<<static_cast<unsigned>(blocks), HELPER_THREADS, 0, stream>>>(r);
    else
        reduce_kernel<1><<<static_cast<unsigned>(blocks), HELPER_THREADS, 0, stream>>>(r);
    return launched(operation);
}

// ---------------------------------------------------------------- arguments

constexpr int64_t MAX_SIZE = 1ll << 30;  // of N and K

static int64_t padded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

static int check_operand(const char *operation, const char *name, const void *data, const int64_t *strides, int type,
                         int64_t tokens, int64_t columns, Operand *out) {
    if (columns < 1 || columns > MAX_SIZE)
        return fail(KUNBR_BAD_SIZE, "%s: %s has %lld columns", operation, name, static_cast<long long>(columns));
    if (strides == nullptr) return fail(KUNBR_NULL_POINTER, "%s: %s has no strides", operation, name);
    if (tokens > 0) KUNBR_TRY(check_vector(operation, name, data, type));
    if (strides[0] < 0 || strides[1] < 0)
        return fail(KUNBR_BAD_STRIDE, "%s: %s has strides %lld, %lld, expected 0 or more", operation, name,
                    static_cast<long long>(strides[0]), static_cast<long long>(strides[1]));
    const int bytes = type_bytes(type);
    *out = {data, strides[0], strides[1], columns, strides[1] == 1 && strides[0] * bytes % 16 == 0 && is_aligned(data)};
    return KUNBR_OK;
}

static int check_batch(const char *operation, const void *cu_seqlens, int index_type, int64_t samples,
                       int64_t tokens) {
    if (index_type != KUNBR_INT32 && index_type != KUNBR_INT64)
        return fail(KUNBR_BAD_TYPE, "%s: index_type is %d, expected KUNBR_INT32 or KUNBR_INT64", operation, index_type);
    KUNBR_TRY(check_pointer(operation, "cu_seqlens", cu_seqlens, index_type == KUNBR_INT64 ? 8 : 4));
    if (samples < 0 || samples > 0x7FFFFFFE)
        return fail(KUNBR_BAD_SIZE, "%s: samples is %lld", operation, static_cast<long long>(samples));
    if (tokens < 0 || tokens > MAX_TOKENS)
        return fail(KUNBR_BAD_SIZE, "%s: there are %lld tokens, expected 0 to %lld", operation,
                    static_cast<long long>(tokens), static_cast<long long>(MAX_TOKENS));
    return KUNBR_OK;
}

static int check_type(const char *operation, int type) {
    if (type == KUNBR_FP32 || type == KUNBR_BF16 || type == KUNBR_FP16) return KUNBR_OK;
    return fail(KUNBR_BAD_TYPE, "%s: type is %d, expected KUNBR_FP32, KUNBR_BF16 or KUNBR_FP16", operation, type);
}

static int check_workspace(const char *operation, const void *workspace, int64_t bytes, int64_t needed) {
    if (needed > 0) KUNBR_TRY(check_pointer(operation, "workspace", workspace, 256));
    if (bytes < needed)
        return fail(KUNBR_SMALL_WORKSPACE, "%s: workspace has %lld bytes, %lld are needed", operation,
                    static_cast<long long>(bytes), static_cast<long long>(needed));
    return KUNBR_OK;
}

static int check_items(const char *operation, const Schedule &schedule) {
    // in floating point: the product may not fit an int64
    if (static_cast<double>(schedule.samples) * schedule.n_tiles * schedule.strips > 0x7FFFFFFF)
        return fail(KUNBR_TOO_LARGE, "%s: %lld samples of %d x %d items: split the batch", operation,
                    static_cast<long long>(schedule.samples), schedule.n_tiles, schedule.strips);
    return KUNBR_OK;
}

// The workspace: the samples' order for the portable kernel, what the one for sm_90a needs, and the partial sums.
static int64_t order_bytes(int64_t samples) { return samples > MAX_SORTED ? 0 : padded(samples * 4); }

static int order_samples(const char *operation, Arguments *arguments, void *memory, cudaStream_t stream) {
    const int64_t samples = arguments->schedule.samples;
    arguments->order = nullptr;
    if (samples > MAX_SORTED) return KUNBR_OK;
    int32_t *order = static_cast<int32_t *>(memory);
    arguments->order = order;
    const unsigned blocks = static_cast<unsigned>(ceil_div(samples, HELPER_THREADS));
    const Batch &batch = arguments->batch;
    order_kernel<<<blocks, HELPER_THREADS, 0, stream>>>(batch.cu_seqlens, batch.wide_index, static_cast<int>(samples),
                                                        order);
    return launched(operation);
}

}  // namespace kunbr

using namespace kunbr;

extern "C" {

int64_t kunbr_grad_density_workspace(int64_t K, int projections, const int64_t *sizes, int64_t samples, int along) {
    if (K < 1 || projections < 1 || projections > MAX_PROJECTIONS || sizes == nullptr || samples <= 0) return 0;
    // for either kernel: the caller does not know which it will be
    int64_t partials = 0;
    for (const Tiling &tiling : {PORTABLE_TILING, HOPPER_TILING}) {
        const int64_t of_one = Schedule::of(samples, K, projections, sizes, tiling).partials(along);
        partials = of_one > partials ? of_one : partials;
    }
    return order_bytes(samples) + padded(hopper_workspace(samples, projections)) + padded(partials * 4);
}

int kunbr_grad_density(const void *x, const int64_t *x_strides, int64_t tokens, int64_t K, int projections,
                       const void *const *dys, const int64_t *dy_strides, const int64_t *sizes, int type,
                       const void *cu_seqlens, int index_type, int64_t samples, int statistic, int along,
                       double *const *outs, void *workspace, int64_t workspace_bytes, int variant, void *stream_) {
    const char *operation = "grad_density";
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    if (projections < 1 || projections > MAX_PROJECTIONS)
        return fail(KUNBR_BAD_SIZE, "%s: %d projections, expected 1 to %d", operation, projections, MAX_PROJECTIONS);
    if (statistic < KUNBR_L1 || statistic > KUNBR_LINF)
        return fail(KUNBR_BAD_VALUE, "%s: statistic is %d, expected one of kunbr_statistic", operation, statistic);
    if (along < ALONG_ALL || along > ALONG_ROW)
        return fail(KUNBR_BAD_VALUE, "%s: along is %d, expected one of kunbr_along", operation, along);
    if (variant != KUNBR_FASTEST && variant != KUNBR_PORTABLE && variant != KUNBR_HOPPER)
        return fail(KUNBR_BAD_VALUE, "%s: variant is %d, expected one of kunbr_variant", operation, variant);
    KUNBR_TRY(check_type(operation, type));
    KUNBR_TRY(check_batch(operation, cu_seqlens, index_type, samples, tokens));
    if (dys == nullptr || dy_strides == nullptr || sizes == nullptr || outs == nullptr)
        return fail(KUNBR_NULL_POINTER, "%s: dys, dy_strides, sizes or outs is NULL", operation);
    Arguments a = {};
    KUNBR_TRY(check_operand(operation, "x", x, x_strides, type, tokens, K, &a.batch.x));
    for (int p = 0; p < projections; ++p) {
        const char *names[] = {"dys[0]", "dys[1]", "dys[2]"}, *out_names[] = {"outs[0]", "outs[1]", "outs[2]"};
        KUNBR_TRY(
            check_operand(operation, names[p], dys[p], dy_strides + 2 * p, type, tokens, sizes[p], &a.batch.dy[p]));
        if (samples > 0) KUNBR_TRY(check_pointer(operation, out_names[p], outs[p], 8));
    }
    if (samples == 0) return KUNBR_OK;
    a.batch.cu_seqlens = cu_seqlens;
    a.batch.wide_index = index_type == KUNBR_INT64;
    a.statistic = statistic;
    a.along = along;
    a.schedule = Schedule::of(samples, K, projections, sizes, PORTABLE_TILING);
    const Schedule hopper_schedule = Schedule::of(samples, K, projections, sizes, HOPPER_TILING);
    KUNBR_TRY(check_items(operation, a.schedule));
    KUNBR_TRY(check_items(operation, hopper_schedule));
    KUNBR_TRY(check_workspace(operation, workspace, workspace_bytes,
                              kunbr_grad_density_workspace(K, projections, sizes, samples, along)));
    int capability = 0;
    KUNBR_TRY(check_device(operation, &capability));

    const bool hopper = variant != KUNBR_PORTABLE && hopper_can_run(a, tokens, type, capability);
    if (variant == KUNBR_HOPPER && !hopper)
        return fail(KUNBR_NOT_HOPPER, "%s: compute capability %d, type %d, or rows that are not aligned to 16 bytes",
                    operation, capability, type);
    const int64_t maps_at = order_bytes(samples);
    char *memory = static_cast<char *>(workspace);
    a.partial = reinterpret_cast<float *>(memory + maps_at + padded(hopper_workspace(samples, projections)));
    if (hopper) {
        a.schedule = hopper_schedule;
        KUNBR_TRY(launch_hopper(a, tokens, type, memory + maps_at, stream));
    } else {
        KUNBR_TRY(order_samples(operation, &a, memory, stream));
        KUNBR_TRY(launch_portable(operation, a, type, stream));
    }

    for (int p = 0; p < projections; ++p)
        KUNBR_TRY(reduce(operation, Reduction::of(a.schedule, along, statistic, p, a.partial, outs[p]), stream));
    return KUNBR_OK;
}

}  // extern "C"
