// Checks and launches of the kernels in optimizer_kernel.cuh.
#include "optimizer_kernel.cuh"

#include "check.h"

namespace kunbr {

static bool in_unit(double beta) { return beta >= 0.0 && beta < 1.0; }

template <class Step, int STATES>
static int run(const char *operation, Update u, const Step &step, void *stream) {
    const char *state_names[2] = {STATES > 1 ? "exp_avg" : "momentum", "exp_avg_sq"};
    if (u.size < 0)
        return fail(KUNBR_BAD_SIZE, "%s: size is %lld", operation, static_cast<long long>(u.size));
    if (u.size > 0) {  // vectors of nothing have no address
        KUNBR_TRY(check_vector(operation, "param", u.param.data, u.param.type));
        KUNBR_TRY(check_vector(operation, "grad", u.grad.data, u.grad.type));
        for (int i = 0; i < STATES; ++i)
            KUNBR_TRY(check_vector(operation, state_names[i], u.state[i].data, u.state[i].type));
    }
    if (u.half.data != nullptr) KUNBR_TRY(check_vector(operation, "half", u.half.data, u.half.type));
    if (u.bad != nullptr) KUNBR_TRY(check_pointer(operation, "bad", u.bad, 4));
    if (u.stochastic && u.param.type != KUNBR_BF16)
        return fail(KUNBR_BAD_TYPE, "%s: stochastic rounding is for a bf16 param, not type %d", operation,
                    u.param.type);
    const int64_t blocks = ceil_div(u.size, SPAN);
    if (blocks > 0x7FFFFFFF)
        return fail(KUNBR_TOO_LARGE, "%s: size is %lld", operation, static_cast<long long>(u.size));
    int capability = 0;
    KUNBR_TRY(check_device(operation, &capability));
    u.wide = is_aligned(u.param.data) && is_aligned(u.grad.data) && is_aligned(u.state[0].data) &&
             is_aligned(u.state[STATES - 1].data) && is_aligned(u.half.data);
    if (blocks > 0) {
        const auto kernel = u.bad == nullptr ? update_kernel<Step, STATES, false> : update_kernel<Step, STATES, true>;
        kernel<<<static_cast<unsigned>(blocks), OPTIMIZER_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(u, step);
        KUNBR_TRY(launched(operation));
    }
    return KUNBR_OK;
}

}  // namespace kunbr

using namespace kunbr;

extern "C" {

int kunbr_lion(void *param, int param_type, const void *grad, int grad_type, void *momentum, int momentum_type,
               void *half, int half_type, int64_t size, double lr, double beta1, double beta2, double weight_decay,
               int stochastic, uint64_t seed, uint32_t step, int32_t *bad, void *stream) {
    if (!(lr >= 0.0) || !(weight_decay >= 0.0) || !in_unit(beta1) || !in_unit(beta2))
        return fail(KUNBR_BAD_VALUE,
                    "lion: lr=%g, weight_decay=%g, betas=(%g, %g): expected 0 or more, and within [0, 1)", lr,
                    weight_decay, beta1, beta2);
    const Update u = {{param, param_type}, {const_cast<void *>(grad), grad_type}, {{momentum, momentum_type}, {}},
                      {half, half_type},   size, seed, step, bad, stochastic != 0, false};
    return run<LionStep, 1>("lion", u, LionStep::of(lr, beta1, beta2, weight_decay), stream);
}

int kunbr_adamw(void *param, int param_type, const void *grad, int grad_type, void *exp_avg, void *exp_avg_sq,
                int state_type, void *half, int half_type, int64_t size, uint32_t step, double lr, double beta1,
                double beta2, double eps, double weight_decay, int stochastic, uint64_t seed, int32_t *bad,
                void *stream) {
    if (!(lr >= 0.0) || !(weight_decay >= 0.0) || !in_unit(beta1) || !in_unit(beta2) || !(eps >= 0.0) || step == 0)
        return fail(KUNBR_BAD_VALUE,
                    "adamw: lr=%g, weight_decay=%g, betas=(%g, %g), eps=%g, step=%u: expected 0 or more, betas within "
                    "[0, 1), step from 1",
                    lr, weight_decay, beta1, beta2, eps, step);
    const Update u = {{param, param_type}, {const_cast<void *>(grad), grad_type},
                      {{exp_avg, state_type}, {exp_avg_sq, state_type}},
                      {half, half_type},   size, seed, step, bad, stochastic != 0, false};
    return run<AdamWStep, 2>("adamw", u, AdamWStep::of(step, lr, beta1, beta2, eps, weight_decay), stream);
}

}  // extern "C"
