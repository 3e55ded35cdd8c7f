// small_eigh on CUDA: one block per matrix, everything in shared memory.
//
// Model. A sweep is n rounds. Each has two barriers, n^2 / 8 blocks of the triangle (4 loads, 16 operations, 4 stores)
// and n^2 / 2 pairs of vector elements (2 loads, 4 operations, 2 stores): about 4 n^3 operations and 3 n^3 accesses to
// shared memory a sweep, 6 to 10 sweeps. Global memory: the matrix is read once, the results are written once, and
// between sweeps the result serves as scratch for the sort, 3 n^2 numbers that stay in L2. Up to about n = 32 it is
// latency that counts (barriers; three divisions and four square roots one after another in every rotation), which
// only several resident matrices per multiprocessor hide: 3 of n = 74 in float64 fit into the 227 KB of sm_90.
#include "block_team.h"
#include "small_eigh.h"
#include "small_eigh_cuda.h"

namespace blk {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 3)
    small_eigh_kernel(const T* __restrict__ matrices, T* __restrict__ eigenvalues, T* __restrict__ eigenvectors,
                      int* __restrict__ info, T* __restrict__ scratch, int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int order[kMaxN];
  T* memory = reinterpret_cast<T*>(shared);
  const int64_t index = blockIdx.x;
  const int64_t first = index * n * n;
  T* vectors = scratch == nullptr ? memory + workspace_size(n) : scratch + first;
  const int result = small_eigh(BlockTeam{}, matrices + first, eigenvalues + index * n, eigenvectors + first,
                                make_workspace(memory, vectors, order, n), n);
  if (threadIdx.x == 0 && threadIdx.y == 0) info[index] = result;
}

template <typename T>
size_t shared_bytes(int n, bool vectors) {
  return sizeof(T) * (workspace_size(n) + (vectors ? n * n : 0));
}

}  // namespace

template <typename T>
cudaError_t small_eigh_needs_scratch(int n, bool* needed) {
  size_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  *needed = shared_bytes<T>(n, true) + sizeof(int) * kMaxN > limit;
  return error;
}

template <typename T>
cudaError_t small_eigh_cuda(const T* matrices, T* eigenvalues, T* eigenvectors, int* info, T* scratch, int64_t batch,
                            int n, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const size_t bytes = shared_bytes<T>(n, scratch == nullptr);
  const cudaError_t error = cudaFuncSetAttribute(small_eigh_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  small_eigh_kernel<T><<<static_cast<unsigned>(batch), team_shape(n), bytes, stream>>>(matrices, eigenvalues,
                                                                                      eigenvectors, info, scratch, n);
  return cudaGetLastError();
}

template cudaError_t small_eigh_needs_scratch<float>(int, bool*);
template cudaError_t small_eigh_needs_scratch<double>(int, bool*);
template cudaError_t small_eigh_cuda<float>(const float*, float*, float*, int*, float*, int64_t, int, cudaStream_t);
template cudaError_t small_eigh_cuda<double>(const double*, double*, double*, int*, double*, int64_t, int,
                                             cudaStream_t);

}  // namespace blk
