// What the library says of itself, of its errors and of a device.
#include "check.h"

#ifndef KUNBR_SOURCE_HASH
#define KUNBR_SOURCE_HASH "unknown"
#endif
#ifndef KUNBR_TARGETS
#define KUNBR_TARGETS "unknown"
#endif
#define KUNBR_TEXT(x) #x
#define KUNBR_VALUE(x) KUNBR_TEXT(x)

namespace kunbr {

char *detail() {
    static thread_local char text[DETAIL_BYTES] = "";
    return text;
}

static int capability_of(const char *operation, int device, int *capability) {
    int major = 0, minor = 0;
    KUNBR_TRY(cuda_failure(operation, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
    KUNBR_TRY(cuda_failure(operation, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
    *capability = 10 * major + minor;
    if (*capability < 80)
        return fail(KUNBR_OLD_GPU, "%s: device %d has compute capability %d.%d, 8.0 is needed", operation, device,
                    major, minor);
    return KUNBR_OK;
}

int check_device(const char *operation, int *capability) {
    int device = 0;
    KUNBR_TRY(cuda_failure(operation, cudaGetDevice(&device)));
    return capability_of(operation, device, capability);
}

}  // namespace kunbr

extern "C" {

int kunbr_abi_version(void) { return KUNBR_ABI_VERSION; }

// The prefix is what build.py looks for in the file to see whether it is up to date.
static const char source_hash[] = "kunbr-source-hash:" KUNBR_SOURCE_HASH;
const char *kunbr_source_hash(void) { return source_hash + 18; }

const char *kunbr_build(void) {
    return "nvcc " KUNBR_VALUE(__CUDACC_VER_MAJOR__) "." KUNBR_VALUE(__CUDACC_VER_MINOR__) ": " KUNBR_TARGETS;
}

const char *kunbr_message(int code) {
    switch (code) {
        case KUNBR_OK: return "no error";
        case KUNBR_NULL_POINTER: return "a pointer is NULL";
        case KUNBR_BAD_SIZE: return "a size is out of range";
        case KUNBR_BAD_STRIDE: return "a stride does not fit";
        case KUNBR_BAD_TYPE: return "a type is not served";
        case KUNBR_BAD_ALIGNMENT: return "a pointer is not aligned to its elements";
        case KUNBR_BAD_VALUE: return "a value is out of range";
        case KUNBR_SMALL_WORKSPACE: return "the workspace is too small";
        case KUNBR_TOO_LARGE: return "more work than one launch can name";
        case KUNBR_OLD_GPU: return "the GPU is too old: compute capability 8.0 or newer is needed";
        case KUNBR_NOT_HOPPER: return "the sm_90a kernel was asked for where it cannot run";
        case KUNBR_NO_TENSOR_MAPS: return "the driver does not make tensor maps";
    }
    if (code == KUNBR_CUDA + cudaErrorInsufficientDriver)
        return "no CUDA driver, or one older than this library was built for: update it, or build with an older nvcc";
    if (code > KUNBR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(code - KUNBR_CUDA));
    return "an unknown code";
}

const char *kunbr_detail(void) { return kunbr::detail(); }

int kunbr_device(int device, int *capability) {
    if (capability == nullptr) return kunbr::fail(KUNBR_NULL_POINTER, "device: capability is NULL");
    int count = 0;
    KUNBR_TRY(kunbr::cuda_failure("device", cudaGetDeviceCount(&count)));
    if (device < 0 || device >= count)
        return kunbr::fail(KUNBR_BAD_VALUE, "device: index %d, there are %d devices", device, count);
    return kunbr::capability_of("device", device, capability);
}

}  // extern "C"
