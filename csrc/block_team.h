// A CUDA block as the team of small_eigh.h: its shape, and how much shared memory it may have.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace blk {

struct BlockTeam {
  __device__ int row() const { return threadIdx.y; }
  __device__ int rows() const { return blockDim.y; }
  __device__ int lane() const { return threadIdx.x; }
  __device__ int lanes() const { return blockDim.x; }
  __device__ int rank() const { return threadIdx.y * blockDim.x + threadIdx.x; }
  __device__ int size() const { return blockDim.x * blockDim.y; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool condition) const { return __syncthreads_or(condition); }
};

constexpr int kMaxThreads = 256;

// Half a row of pairs to the lanes, which walk along a row of the triangle.
inline dim3 team_shape(int n) {
  if (n <= 16) return dim3(8, 4);
  if (n <= 32) return dim3(16, 8);
  return dim3(32, 8);
}

// What a block of the current device may have.
inline cudaError_t shared_limit(std::size_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<std::size_t>(limit);
  return error;
}

}  // namespace blk
