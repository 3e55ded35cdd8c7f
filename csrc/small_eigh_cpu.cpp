// bayesian_lora_kernels_native::small_eigh on the CPU: the matrices are shared out among PyTorch's threads.
#include "checks.h"
#include "multiversion.h"
#include "small_eigh.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

namespace blk {
namespace {

BLK_MULTIVERSION int solve(const double* matrix, double* values, double* vectors, const Workspace<double>& w, int n) {
  return small_eigh(SerialTeam{}, matrix, values, vectors, w, n);
}
BLK_MULTIVERSION int solve(const float* matrix, float* values, float* vectors, const Workspace<float>& w, int n) {
  return small_eigh(SerialTeam{}, matrix, values, vectors, w, n);
}

at::Tensor small_eigh_cpu(const at::Tensor& matrices, const at::Tensor& eigenvalues, const at::Tensor& eigenvectors) {
  check_small_eigh(matrices, eigenvalues, eigenvectors);
  const at::Tensor input = matrices.contiguous();
  const at::Tensor info = at::empty({input.size(0)}, input.options().dtype(at::kInt));
  const int n = static_cast<int>(input.size(1));
  // a few tens of microseconds of work per task, below which waking a thread costs more than it brings
  const int64_t grain = 1 + 8192 / (n * n * n + 1);
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "small_eigh", [&] {
    const scalar_t* from = input.const_data_ptr<scalar_t>();
    scalar_t* to_values = eigenvalues.mutable_data_ptr<scalar_t>();
    scalar_t* to_vectors = eigenvectors.mutable_data_ptr<scalar_t>();
    int* to_info = info.mutable_data_ptr<int>();
    at::parallel_for(0, input.size(0), grain, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> memory(workspace_size(n) + n * n);
      std::vector<int> order(n);
      const auto w = make_workspace(memory.data(), memory.data() + workspace_size(n), order.data(), n);
      for (int64_t i = begin; i < end; ++i) {
        to_info[i] = solve(from + i * n * n, to_values + i * n, to_vectors + i * n * n, w, n);
      }
    });
  });
  return info;
}

}  // namespace
}  // namespace blk

TORCH_LIBRARY_IMPL(bayesian_lora_kernels_native, CPU, m) { m.impl("small_eigh", blk::small_eigh_cpu); }
