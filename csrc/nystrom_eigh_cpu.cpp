// bayesian_lora_kernels_native::nystrom_eigh on the CPU: the matrices are shared out among PyTorch's threads.
#include "checks.h"
#include "multiversion.h"
#include "nystrom_eigh.h"

#include <ATen/Parallel.h>

#include <vector>

namespace blk {
namespace {

BLK_MULTIVERSION int solve(const double* core, const double* gram, double rounding, double* combination,
                           double* scratch, double* scale, const Workspace<double>& w, int n) {
  return nystrom_eigh(SerialTeam{}, core, gram, rounding, combination, scratch, scale, w, n);
}

at::Tensor nystrom_eigh_cpu(const at::Tensor& core, const at::Tensor& gram, double rounding,
                            const at::Tensor& combination) {
  check_nystrom_eigh(core, gram, rounding, combination);
  const at::Tensor c = core.contiguous(), k = gram.contiguous();
  const at::Tensor info = at::empty({c.size(0)}, c.options().dtype(at::kInt));
  const int n = static_cast<int>(c.size(1));
  const double* from_core = c.const_data_ptr<double>();
  const double* from_gram = k.const_data_ptr<double>();
  double* to = combination.mutable_data_ptr<double>();
  int* to_info = info.mutable_data_ptr<int>();
  // a few tens of microseconds of work per task, below which waking a thread costs more than it brings
  const int64_t grain = 1 + 4096 / (n * n * n + 1);
  at::parallel_for(0, c.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<double> memory(nystrom_eigh_size(n) + 2 * n * n);
    std::vector<int> order(n);
    double* vectors = memory.data() + nystrom_eigh_size(n);
    const auto w = make_workspace(memory.data() + n, vectors, order.data(), n);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * n * n;
      to_info[i] = solve(from_core + first, from_gram + first, rounding, to + first, vectors + n * n, memory.data(), w,
                         n);
    }
  });
  return info;
}

}  // namespace
}  // namespace blk

TORCH_LIBRARY_IMPL(bayesian_lora_kernels_native, CPU, m) { m.impl("nystrom_eigh", blk::nystrom_eigh_cpu); }
