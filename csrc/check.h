// Checks of arguments on the host: a code for the caller, and a sentence for kunbr_detail().
#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "kunbr.h"

namespace kunbr {

char *detail();  // of the calling thread, DETAIL_BYTES
constexpr int DETAIL_BYTES = 256;

__attribute__((format(printf, 2, 3))) inline int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail(), DETAIL_BYTES, format, arguments);
    va_end(arguments);
    return code;
}

inline int cuda_failure(const char *what, cudaError_t error) {
    if (error == cudaSuccess) return KUNBR_OK;
    cudaGetLastError();  // or the next launch, whose ever it is, would be taken for the one that failed
    return fail(KUNBR_CUDA + error, "%s: %s (CUDA error %d)", what, cudaGetErrorString(error), static_cast<int>(error));
}

// After a launch. An error that an earlier call of someone else left behind shows here too, as everywhere in CUDA.
inline int launched(const char *what) { return cuda_failure(what, cudaGetLastError()); }

inline int type_bytes(int type) { return type == KUNBR_FP32 ? 4 : 2; }

inline int check_pointer(const char *operation, const char *name, const void *pointer, int bytes) {
    if (pointer == nullptr) return fail(KUNBR_NULL_POINTER, "%s: %s is NULL", operation, name);
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        return fail(KUNBR_BAD_ALIGNMENT, "%s: %s is not aligned to its elements of %d bytes", operation, name, bytes);
    return KUNBR_OK;
}

inline int check_vector(const char *operation, const char *name, const void *pointer, int type) {
    if (type != KUNBR_FP32 && type != KUNBR_BF16 && type != KUNBR_FP16)
        return fail(KUNBR_BAD_TYPE, "%s: %s has type %d, expected KUNBR_FP32, KUNBR_BF16 or KUNBR_FP16", operation,
                    name, type);
    return check_pointer(operation, name, pointer, type_bytes(type));
}

inline bool is_aligned(const void *pointer, int bytes = 16) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

#define KUNBR_TRY(call)                             \
    do {                                            \
        const int kunbr_code = (call);              \
        if (kunbr_code != KUNBR_OK) return kunbr_code; \
    } while (0)

// The current device's compute capability; KUNBR_OLD_GPU below 8.0.
int check_device(const char *operation, int *capability);

}  // namespace kunbr
