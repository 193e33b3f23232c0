/* kunbr-fast's CUDA kernels as a C library: one header, no torch, no Python.
 *
 * Every function takes device pointers, sizes, strides in elements and a stream (a cudaStream_t; NULL: the default
 * stream), enqueues its work on the current device and returns at once. It checks all arguments before it enqueues
 * anything. It returns 0 (KUNBR_OK) or a code that kunbr_message() explains; kunbr_detail() names the argument of the
 * calling thread's last failure. Nothing is allocated: the caller gives scratch memory, of the size that the
 * operation's *_workspace() function returns.
 *
 * No function keeps state, and the same call on the same kind of GPU gives the same bits.
 */
#ifndef KUNBR_H
#define KUNBR_H

#include <stdint.h>

#if defined(__GNUC__)
#define KUNBR_API __attribute__((visibility("default")))
#else
#define KUNBR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a function changes or goes. */
#define KUNBR_ABI_VERSION 3

enum kunbr_status {
    KUNBR_OK = 0,
    KUNBR_NULL_POINTER = 1,
    KUNBR_BAD_SIZE = 2,
    KUNBR_BAD_STRIDE = 3,
    KUNBR_BAD_TYPE = 4,
    KUNBR_BAD_ALIGNMENT = 5,
    KUNBR_BAD_VALUE = 6,
    KUNBR_SMALL_WORKSPACE = 7,
    KUNBR_TOO_LARGE = 8,
    KUNBR_OLD_GPU = 9,
    KUNBR_NOT_HOPPER = 10,
    KUNBR_NO_TENSOR_MAPS = 11,
    /* CUDA's own errors: KUNBR_CUDA + a cudaError_t. 1035, say: no driver, or one older than this library needs. */
    KUNBR_CUDA = 1000
};

/* Element types. */
enum kunbr_type { KUNBR_FP32 = 0, KUNBR_BF16 = 1, KUNBR_FP16 = 2, KUNBR_INT32 = 3, KUNBR_INT64 = 4 };

/* ---------------------------------------------------------------- the library */

KUNBR_API int kunbr_abi_version(void);
/* A hash of the sources that this library was built from, and "nvcc 13.0: sm_80 sm_90a, PTX for later ones". */
KUNBR_API const char *kunbr_source_hash(void);
KUNBR_API const char *kunbr_build(void);
/* What a code means: a static string, never NULL. */
KUNBR_API const char *kunbr_message(int code);
/* The calling thread's last failure, such as "lion: param is NULL". Valid until the thread's next call. */
KUNBR_API const char *kunbr_detail(void);
/* *capability: 10 * major + minor of the device of that index. KUNBR_OLD_GPU below 80. */
KUNBR_API int kunbr_device(int device, int *capability);

/* ---------------------------------------------------------------- optimisers
 *
 * In place over vectors of `size` elements, each of its own type: fp32, bf16 or fp16; arithmetic in fp32, one rounding
 * for each stored value.
 *
 *   Lion    param    -= lr * (sign(beta1 * momentum + (1 - beta1) * grad) + weight_decay * param)
 *           momentum  = beta2 * momentum + (1 - beta2) * grad
 *   AdamW   exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
 *           exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
 *           param     -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
 *                        + lr * weight_decay * param
 *
 * half: NULL, or becomes a copy of param in half_type. stochastic: not 0: param (bf16) is rounded stochastically, by
 * bits that depend on seed, step and place alone. Where all pointers are aligned to 16 bytes, accesses are
 * 16 bytes wide. bad: NULL, or on the device, set to 1 where a stored value of param, its copy or the state is not
 * finite; never cleared.
 */

KUNBR_API int kunbr_lion(void *param, int param_type, const void *grad, int grad_type, void *momentum,
                         int momentum_type, void *half, int half_type, int64_t size, double lr, double beta1,
                         double beta2, double weight_decay, int stochastic, uint64_t seed, uint32_t step,
                         int32_t *bad, void *stream);

/* state_type: of exp_avg and exp_avg_sq. step: from 1. */
KUNBR_API int kunbr_adamw(void *param, int param_type, const void *grad, int grad_type, void *exp_avg, void *exp_avg_sq,
                          int state_type, void *half, int half_type, int64_t size, uint32_t step, double lr,
                          double beta1, double beta2, double eps, double weight_decay, int stochastic, uint64_t seed,
                          int32_t *bad, void *stream);

/* ---------------------------------------------------------------- statistics of weight gradients
 *
 * Samples lie one after the other in x (tokens, K) and dys[p] (tokens, sizes[p]): sample i has the rows cu_seqlens[i]
 * to cu_seqlens[i + 1]. dW_i = dy_i^T x_i, (sizes[p], K), is never in memory.
 */

enum kunbr_statistic { KUNBR_L1 = 0, KUNBR_L2SQ = 1, KUNBR_LINF = 2 }; /* sum |dW|, sum dW^2, max |dW| */
enum kunbr_along { KUNBR_ALL = 0, KUNBR_ROW = 1 };
enum kunbr_variant { KUNBR_FASTEST = 0, KUNBR_PORTABLE = 80, KUNBR_HOPPER = 90 };

/* x: strides x_strides[0] along tokens, [1] along K. dys: `projections` (1 to 3) pointers, in host memory, as are
 * sizes, dy_strides (2 for each) and outs. type: of x and all dys: bf16, fp16 or fp32. cu_seqlens: samples + 1 of
 * index_type, on the device, from 0 up to tokens.
 * outs[p]: doubles on the device, (samples) for KUNBR_ALL or (samples, sizes[p]) for KUNBR_ROW (over K).
 * variant: KUNBR_HOPPER (compute capability 9.0; bf16 or fp16; rows that are aligned to 16 bytes and no wider than
 * their stride) fails where it cannot run; KUNBR_FASTEST takes it where it can.
 */
KUNBR_API int64_t kunbr_grad_density_workspace(int64_t K, int projections, const int64_t *sizes, int64_t samples,
                                               int along);
KUNBR_API int kunbr_grad_density(const void *x, const int64_t *x_strides, int64_t tokens, int64_t K, int projections,
                                 const void *const *dys, const int64_t *dy_strides, const int64_t *sizes, int type,
                                 const void *cu_seqlens, int index_type, int64_t samples, int statistic, int along,
                                 double *const *outs, void *workspace, int64_t workspace_bytes, int variant,
                                 void *stream);

#ifdef __cplusplus
}
#endif
#endif
