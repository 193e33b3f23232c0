// The kernels' arithmetic and index code on the host, as a library that pytest calls: what would run on a GPU, less its
// instructions. Its results are compared with torch's.
#define KUNBR_EMULATED
#include "../grad_density_passes.cuh"
#include "../grad_density_sm80.cuh"
#include "../grad_density_sm90.cuh"
#include "../optimizer_kernel.cuh"

using namespace kunbr;

// ---------------------------------------------------------------- gradient density: what the launchers do

static Operand operand(const void *data, const int64_t *strides, int64_t columns, int bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] * bytes % 16 == 0;
    return {data, strides[0], strides[1], columns, strides[1] == 1 && aligned};
}

static void prepare(Arguments &a, std::vector<int32_t> &order, std::vector<float> &partial, unsigned seed) {
    order.assign(a.schedule.samples, -1);
    partial.assign(a.schedule.partials(a.along), std::nanf(""));
    const Batch &batch = a.batch;
    const int samples = static_cast<int>(a.schedule.samples);
    gpu::launch(static_cast<unsigned>(ceil_div(samples, HELPER_THREADS)), HELPER_THREADS, 0, seed,
                [&] { order_kernel(batch.cu_seqlens, batch.wide_index, samples, order.data()); });
    a.order = order.data();
    a.partial = partial.data();
}

static bool has_nan(const std::vector<float> &values) {
    return std::any_of(values.begin(), values.end(), [](float x) { return x != x; });
}

static void reduce(const Reduction &r, unsigned seed) {
    const int64_t results = r.samples * r.elements;
    const int64_t blocks = r.elements == 1 ? results : ceil_div(results, HELPER_THREADS);
    gpu::launch(static_cast<unsigned>(blocks), HELPER_THREADS, 0, seed, [&] {
        if (r.elements == 1)
            reduce_kernel<HELPER_THREADS>(r);
        else
            reduce_kernel<1>(r);
    });
}

template <class Type>
static void portable(const Arguments &a, unsigned seed) {
    gpu::launch(static_cast<unsigned>(a.schedule.items()), PORTABLE_THREADS, Shared<Type>::BYTES, seed,
                [&] { density_kernel<Type>(a); });
}

static void hopper(const Arguments &a, int blocks, unsigned seed) {
    const int operands = 1 + a.schedule.projections;
    std::vector<Segment> segments(a.schedule.samples);
    std::vector<char> maps(a.schedule.samples * operands * MAP_BYTES);
    for (int64_t rank = 0; rank < a.schedule.samples; ++rank) {  // maps_kernel, with maps of our own
        const Batch &batch = a.batch;
        const int64_t start = offset_at(batch.cu_seqlens, batch.wide_index, a.order[rank]);
        const int64_t length = offset_at(batch.cu_seqlens, batch.wide_index, a.order[rank] + 1) - start;
        segments[rank] = {static_cast<int32_t>(length), a.order[rank]};
        for (int i = 0; i < operands; ++i) {
            const Operand &t = i == 0 ? batch.x : batch.dy[i - 1];
            const EmulatedMap map = {static_cast<const uint16_t *>(t.data) + (length > 0 ? start : 0) * t.stride_token,
                                     t.stride_token, std::max<int64_t>(length, 1), t.columns};
            std::memcpy(maps.data() + (rank * operands + i) * MAP_BYTES, &map, sizeof(map));
        }
    }
    gpu::launch(static_cast<unsigned>(blocks), HOPPER_THREADS, HOPPER_BYTES, seed,
                [&] { hopper_kernel<Bf16>(a, segments.data(), maps.data()); });
}

// ---------------------------------------------------------------- optimisers

template <class Step, int STATES>
static void update(const Step &step, Update u, int wide) {
    u.wide = wide != 0;
    gpu::launch(static_cast<unsigned>(ceil_div(u.size, SPAN)), OPTIMIZER_THREADS, 0, 0, [&] {
        if (u.bad == nullptr)
            update_kernel<Step, STATES, false>(u, step);
        else
            update_kernel<Step, STATES, true>(u, step);
    });
}

// What an exception is to the caller in Python: 2, and a line on stderr.
template <class Run>
static int guarded(const Run &run) {
    try {
        return run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}

extern "C" {

// type: 0 fp32, 1 bf16; cu_seqlens: int64; blocks: 0 for the portable kernel, else of the one for sm_90a. 1 if a
// partial sum is NaN: not written, or made of what was not loaded yet; 2 for what the emulator stops at.
int emulate_grad_density(const void *x, const int64_t *x_strides, int64_t K, int projections, const void *const *dys,
                         const int64_t *dy_strides, const int64_t *sizes, int type, const void *cu_seqlens,
                         int64_t samples, int statistic, int along, double *const *outs, int blocks, int longest_strip,
                         unsigned seed) {
    return guarded([&] {
        Arguments a = {};
        const int bytes = type == 0 ? 4 : 2;
        a.batch.x = operand(x, x_strides, K, bytes);
        for (int p = 0; p < projections; ++p) a.batch.dy[p] = operand(dys[p], dy_strides + 2 * p, sizes[p], bytes);
        a.batch.cu_seqlens = cu_seqlens;
        a.batch.wide_index = true;
        a.statistic = statistic;
        a.along = along;
        a.schedule = Schedule::of(samples, K, projections, sizes, blocks > 0 ? HOPPER_TILING : PORTABLE_TILING);
        a.schedule.cut(longest_strip);  // as if there were many samples
        std::vector<int32_t> order;
        std::vector<float> partial;
        prepare(a, order, partial, seed);
        if (blocks > 0)
            hopper(a, blocks, seed);
        else if (type == 0)
            portable<float>(a, seed);
        else
            portable<Bf16>(a, seed);
        for (int p = 0; p < projections; ++p)
            reduce(Reduction::of(a.schedule, along, statistic, p, partial.data(), outs[p]), seed);
        return has_nan(partial) ? 1 : 0;
    });
}

// types: of param, grad, state and half, 0 fp32, 1 bf16. wide: all pointers are aligned to 16 bytes.
int emulate_lion(void *param, void *grad, void *momentum, void *half, const int *types, int64_t size, double lr,
                 double beta1, double beta2, double weight_decay, int stochastic, uint64_t seed, uint32_t step,
                 int32_t *bad, int wide) {
    return guarded([&] {
        const Update u = {{param, types[0]}, {grad, types[1]}, {{momentum, types[2]}, {}}, {half, types[3]},
                          size, seed, step, bad, stochastic != 0, false};
        update<LionStep, 1>(LionStep::of(lr, beta1, beta2, weight_decay), u, wide);
        return 0;
    });
}

int emulate_adamw(void *param, void *grad, void *exp_avg, void *exp_avg_sq, void *half, const int *types, int64_t size,
                  uint32_t step, double lr, double beta1, double beta2, double eps, double weight_decay, int stochastic,
                  uint64_t seed, int32_t *bad, int wide) {
    return guarded([&] {
        const Update u = {{param, types[0]}, {grad, types[1]}, {{exp_avg, types[2]}, {exp_avg_sq, types[2]}},
                          {half, types[3]}, size, seed, step, bad, stochastic != 0, false};
        update<AdamWStep, 2>(AdamWStep::of(step, lr, beta1, beta2, eps, weight_decay), u, wide);
        return 0;
    });
}

void emulate_random_bits(uint32_t *out, int64_t size, uint64_t seed, uint32_t step) {
    for (int64_t i = 0; i < size; ++i) out[i] = random_bits(i / 4, seed, step)[i % 4];
}

void emulate_to_bf16(uint16_t *out, const float *x, int64_t size) {
    for (int64_t i = 0; i < size; ++i) out[i] = to_bf16(x[i]);
}

}  // extern "C"
