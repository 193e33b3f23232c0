// Launches of the kernel in grad_density_sm80.cuh.
#include "grad_density_sm80.cuh"

#include "check.h"

namespace kunbr {

template <class Type, Mode MODE>
static int launch(const char *operation, const Arguments &arguments, cudaStream_t stream) {
    constexpr int bytes = Shared<Type, MODE>::BYTES;
    // once a device would do; it costs a microsecond and remembers nothing of devices
    KUNBR_TRY(cuda_failure(operation, cudaFuncSetAttribute(density_kernel<Type, MODE>,
                                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)));
    const unsigned blocks = static_cast<unsigned>(arguments.schedule.items());
    density_kernel<Type, MODE><<<blocks, PORTABLE_THREADS, bytes, stream>>>(arguments);
    return launched(operation);
}

template <class Type>
static int launch_mode(const char *operation, const Arguments &arguments, Mode mode, cudaStream_t stream) {
    if (mode == MODE_ROWS) return launch<Type, MODE_ROWS>(operation, arguments, stream);
    if (mode == MODE_COLUMNS) return launch<Type, MODE_COLUMNS>(operation, arguments, stream);
    return launch<Type, MODE_PAIR>(operation, arguments, stream);
}

int launch_portable(const char *operation, const Arguments &arguments, int type, Mode mode, cudaStream_t stream) {
    if (type == KUNBR_FP32) return launch_mode<float>(operation, arguments, mode, stream);
    if (type == KUNBR_BF16) return launch_mode<Bf16>(operation, arguments, mode, stream);
    return launch_mode<Fp16>(operation, arguments, mode, stream);
}

}  // namespace kunbr
