// The instructions that CUDA C++ has no name for, one function each. tests/gpu_emulator.h has the same functions for
// the host, where the kernels run as they are written here, thread by thread.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fragments.h"

namespace kunbr {

struct Bf16 {};  // element types: no arithmetic is done on them but by the matrix instructions
struct Fp16 {};

#define KUNBR_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

// ---------------------------------------------------------------- all GPUs

// A value that the compiler knows nothing of. Without it, it follows each combination of the vectors' types through the
// whole kernel by itself, and is not done after ten minutes.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

// ---------------------------------------------------------------- sm_80: copies in the background, mma.sync

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes in the background, of which the first `bytes` are read and the others are zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

template <class Type>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<Type, Fp16>::value)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- sm_90a: TMA, barriers in memory, wgmma
#if defined(KUNBR_HOPPER_INSTRUCTIONS)

__device__ __forceinline__ void make_barriers_visible() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Barriers in shared memory, by address.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of that parity has ended.
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra.uni retry;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// One lane of a warp of which all come here. The compiler then knows that it is one, and puts no loop over lanes around
// each of its load_box.
__device__ __forceinline__ bool elect() {
    uint32_t elected;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
    return elected != 0;
}

// A box of 64 tokens x 64 columns; `barrier` counts its bytes.
__device__ __forceinline__ void load_box(uint32_t to, const char *map, int column, int token, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(token), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void fence_operands() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// m64n128k16: 64 x 128 of fp32 in 64 registers, both operands in shared memory and transposed (the last two 1s).
#define KUNBR_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define KUNBR_WGMMA(TYPE) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
    "}, %64, %65, add, 1, 1, 1, 1;\n}" \
    : KUNBR_D(0), KUNBR_D(1), KUNBR_D(2), KUNBR_D(3), KUNBR_D(4), KUNBR_D(5), KUNBR_D(6), KUNBR_D(7), KUNBR_D(8), \
      KUNBR_D(9), KUNBR_D(10), KUNBR_D(11), KUNBR_D(12), KUNBR_D(13), KUNBR_D(14), KUNBR_D(15) \
    : "l"(dy), "l"(x), "r"(add))

// d (+)= dy^T x over 16 tokens, dy and x as descriptors.
template <class Type>
__device__ __forceinline__ void multiply_group(float (&d)[16][4], uint64_t dy, uint64_t x, int add) {
    if constexpr (std::is_same<Type, Fp16>::value)
        KUNBR_WGMMA("f16");
    else
        KUNBR_WGMMA("bf16");
}

// Named barriers: 0 is __syncthreads', 1 and 2 the consumers' batons.
__device__ __forceinline__ void take_baton(int consumer) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
}
__device__ __forceinline__ void pass_baton(int consumer) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory");
}

// The copy engine sees the tensor map as threads wrote it.
__device__ __forceinline__ void acquire_map(const char *map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// Registers of a warpgroup's threads: what one gives the others take.
template <int REGISTERS>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif
}  // namespace kunbr
