// Launcher of small_eigh_cuda.cu. Plain CUDA, so that nvcc compiles the kernel without PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace blk {

// Whether the eigenvectors of an n x n matrix have to be kept in global memory, the shared memory of the current device
// being too small. `small_eigh_cuda` then wants `scratch`: batch * n * n numbers.
template <typename T>
cudaError_t small_eigh_needs_scratch(int n, bool* needed);

// All pointers are to device memory: matrices [batch, n, n], eigenvalues [batch, n], eigenvectors [batch, n, n],
// info [batch]. See small_eigh.h for what they mean. T: float or double.
template <typename T>
cudaError_t small_eigh_cuda(const T* matrices, T* eigenvalues, T* eigenvectors, int* info, T* scratch, int64_t batch,
                            int n, cudaStream_t stream);

}  // namespace blk
