// bayesian_lora_kernels_native::small_eigh on CUDA tensors: PyTorch's side of small_eigh_cuda.cu. Never synchronises.
#include "checks.h"
#include "small_eigh_cuda.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

namespace blk {
namespace {

at::Tensor small_eigh_on_cuda(const at::Tensor& matrices, const at::Tensor& eigenvalues,
                              const at::Tensor& eigenvectors) {
  check_small_eigh(matrices, eigenvalues, eigenvectors);
  const c10::cuda::CUDAGuard guard(matrices.device());
  const at::Tensor input = matrices.contiguous();
  TORCH_CHECK_VALUE(input.size(0) <= std::numeric_limits<int>::max(),
                    "small_eigh: expected at most 2^31 - 1 matrices, got ", input.size(0));
  const at::Tensor info = at::empty({input.size(0)}, input.options().dtype(at::kInt));
  const int n = static_cast<int>(input.size(1));
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "small_eigh", [&] {
    bool needs_scratch = false;
    C10_CUDA_CHECK(small_eigh_needs_scratch<scalar_t>(n, &needs_scratch));
    const at::Tensor scratch = needs_scratch ? at::empty_like(input) : at::Tensor();
    C10_CUDA_CHECK(small_eigh_cuda(input.const_data_ptr<scalar_t>(), eigenvalues.mutable_data_ptr<scalar_t>(),
                                   eigenvectors.mutable_data_ptr<scalar_t>(), info.mutable_data_ptr<int>(),
                                   needs_scratch ? scratch.mutable_data_ptr<scalar_t>() : nullptr, input.size(0), n,
                                   c10::cuda::getCurrentCUDAStream()));
  });
  return info;
}

}  // namespace
}  // namespace blk

TORCH_LIBRARY_IMPL(bayesian_lora_kernels_native, CUDA, m) { m.impl("small_eigh", blk::small_eigh_on_cuda); }
