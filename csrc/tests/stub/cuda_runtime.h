// What check.h asks of CUDA's runtime, on the host: an error that a call leaves is there until it is asked for.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline cudaError_t left_behind = cudaSuccess;
inline cudaError_t fails() { return left_behind = cudaErrorInvalidValue; }
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = left_behind;
    left_behind = cudaSuccess;
    return error;
}
inline const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
