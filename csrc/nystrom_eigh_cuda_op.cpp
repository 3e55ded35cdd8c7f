// bayesian_lora_kernels_native::nystrom_eigh on CUDA tensors: PyTorch's side of nystrom_eigh_cuda.cu. Never
// synchronises.
#include "checks.h"
#include "nystrom_eigh_cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

namespace blk {
namespace {

at::Tensor nystrom_eigh_on_cuda(const at::Tensor& core, const at::Tensor& gram, double rounding,
                                const at::Tensor& combination) {
  check_nystrom_eigh(core, gram, rounding, combination);
  TORCH_CHECK_VALUE(core.size(0) <= std::numeric_limits<int>::max(),
                    "nystrom_eigh: expected at most 2^31 - 1 matrices, got ", core.size(0));
  const c10::cuda::CUDAGuard guard(core.device());
  const at::Tensor c = core.contiguous(), k = gram.contiguous();
  const at::Tensor info = at::empty({c.size(0)}, c.options().dtype(at::kInt));
  const int n = static_cast<int>(c.size(1));
  int matrices = 0;
  C10_CUDA_CHECK(nystrom_eigh_scratch(n, &matrices));
  const at::Tensor scratch = at::empty({matrices, c.size(0), n, n}, c.options());
  C10_CUDA_CHECK(nystrom_eigh_cuda(c.const_data_ptr<double>(), k.const_data_ptr<double>(), rounding,
                                   combination.mutable_data_ptr<double>(), info.mutable_data_ptr<int>(),
                                   scratch.mutable_data_ptr<double>(), c.size(0), n,
                                   c10::cuda::getCurrentCUDAStream()));
  return info;
}

}  // namespace
}  // namespace blk

TORCH_LIBRARY_IMPL(bayesian_lora_kernels_native, CUDA, m) { m.impl("nystrom_eigh", blk::nystrom_eigh_on_cuda); }
