// Launcher of nystrom_eigh_cuda.cu. Plain CUDA, so that nvcc compiles the kernel without PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace blk {

// How many n x n matrices of doubles `nystrom_eigh_cuda` wants as scratch for each of the batch: 1, or 2 where the
// shared memory of the current device is too small for the vectors.
cudaError_t nystrom_eigh_scratch(int n, int* matrices);

// All pointers are to device memory: core, gram, combination [batch, n, n], info [batch]; scratch holds batch * n * n
// doubles as often as `nystrom_eigh_scratch` said. See nystrom_eigh.h for what they mean.
cudaError_t nystrom_eigh_cuda(const double* core, const double* gram, double rounding, double* combination, int* info,
                              double* scratch, int64_t batch, int n, cudaStream_t stream);

}  // namespace blk
