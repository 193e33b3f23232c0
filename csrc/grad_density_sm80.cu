// Launches of the kernel in grad_density_sm80.cuh.
#include "grad_density_sm80.cuh"

#include "check.h"

namespace kunbr {

template <class Type>
static int launch(const char *operation, const Arguments &arguments, cudaStream_t stream) {
    constexpr int bytes = Shared<Type>::BYTES;
    // once a device would do; it costs a microsecond and remembers nothing of devices
    KUNBR_TRY(cuda_failure(operation, cudaFuncSetAttribute(density_kernel<Type>,
                                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)));
    const unsigned blocks = static_cast<unsigned>(arguments.schedule.items());
    density_kernel<Type><<<blocks, PORTABLE_THREADS, bytes, stream>>>(arguments);
    return launched(operation);
}

int launch_portable(const char *operation, const Arguments &arguments, int type, cudaStream_t stream) {
    if (type == KUNBR_FP32) return launch<float>(operation, arguments, stream);
    if (type == KUNBR_BF16) return launch<Bf16>(operation, arguments, stream);
    return launch<Fp16>(operation, arguments, stream);
}

}  // namespace kunbr
