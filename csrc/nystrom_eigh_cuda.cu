// nystrom_eigh on CUDA: one block per matrix, one launch for all.
//
// Memory. What the sweeps touch is in shared memory: the triangle, 4 n^2 bytes, and the vectors, 8 n^2 bytes; 195 KB at
// n = 128, which the 227 KB of sm_90 and sm_100 hold. Where they do not fit (sm_80, 163 KB: from n = 117) the vectors go
// to global memory and stay in L2. What is written once and read by rows, P and K P, is in global memory: the result,
// and one matrix of scratch.
//
// Model. Two diagonalisations of about 4 n^3 operations and 3 n^3 accesses to shared memory a sweep, 6 to 10 sweeps each
// (see small_eigh_cuda.cu), and two products of 2 n^3 operations, which read n^3 / 2 numbers from L1 or L2. Global memory:
// C, K and W once, and between sweeps 3 n^2 numbers of scratch in L2.
#include "block_team.h"
#include "nystrom_eigh.h"
#include "nystrom_eigh_cuda.h"

namespace blk {
namespace {

// `spilled`: [batch, n, n] for the vectors, or null: they are in shared memory.
__global__ void __launch_bounds__(kMaxThreads, 2)
    nystrom_eigh_kernel(const double* __restrict__ core, const double* __restrict__ gram, double rounding,
                        double* __restrict__ combination, int* __restrict__ info, double* __restrict__ scratch,
                        double* __restrict__ spilled, int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int order[kMaxN];
  double* scale = reinterpret_cast<double*>(shared);
  double* memory = scale + n;
  const int64_t index = blockIdx.x;
  const int64_t first = index * n * n;
  double* vectors = spilled == nullptr ? memory + workspace_size(n) : spilled + first;
  const int result = nystrom_eigh(BlockTeam{}, core + first, gram + first, rounding, combination + first,
                                  scratch + first, scale, make_workspace(memory, vectors, order, n), n);
  if (threadIdx.x == 0 && threadIdx.y == 0) info[index] = result;
}

size_t shared_bytes(int n, bool vectors) { return sizeof(double) * (nystrom_eigh_size(n) + (vectors ? n * n : 0)); }

}  // namespace

cudaError_t nystrom_eigh_scratch(int n, int* matrices) {
  size_t limit = 0;
  const cudaError_t error = shared_limit(&limit);
  *matrices = shared_bytes(n, true) + sizeof(int) * kMaxN > limit ? 2 : 1;
  return error;
}

cudaError_t nystrom_eigh_cuda(const double* core, const double* gram, double rounding, double* combination, int* info,
                              double* scratch, int64_t batch, int n, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  int matrices = 0;
  cudaError_t error = nystrom_eigh_scratch(n, &matrices);
  if (error != cudaSuccess) return error;
  const size_t bytes = shared_bytes(n, matrices == 1);
  error = cudaFuncSetAttribute(nystrom_eigh_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  double* spilled = matrices == 1 ? nullptr : scratch + batch * n * n;
  nystrom_eigh_kernel<<<static_cast<unsigned>(batch), team_shape(n), bytes, stream>>>(
      core, gram, rounding, combination, info, scratch, spilled, n);
  return cudaGetLastError();
}

}  // namespace blk
