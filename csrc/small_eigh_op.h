// What the CPU and the CUDA form of the operation share: the checks of its arguments.
#pragma once

#include "small_eigh.h"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

namespace blk {

// The matrices, contiguous. The results must be so already: they are written in place.
inline at::Tensor checked_matrices(const at::Tensor& matrices, const at::Tensor& eigenvalues,
                                   const at::Tensor& eigenvectors) {
  TORCH_CHECK_VALUE(matrices.dim() == 3 && matrices.size(1) == matrices.size(2),
                    "small_eigh: expected matrices of shape [L, n, n], got ", matrices.sizes());
  TORCH_CHECK_VALUE(matrices.size(1) <= kMaxN, "small_eigh: expected n <= ", kMaxN, ", got matrices of shape ",
                    matrices.sizes());
  TORCH_CHECK_TYPE(matrices.scalar_type() == at::kFloat || matrices.scalar_type() == at::kDouble,
                   "small_eigh: expected matrices of dtype float32 or float64, got ", matrices.scalar_type());
  const auto check_result = [&](const at::Tensor& result, const char* name, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(result.sizes() == shape && result.is_contiguous(), "small_eigh: expected contiguous ", name,
                      " of shape ", shape, ", got shape ", result.sizes(), " and strides ", result.strides());
    TORCH_CHECK_TYPE(result.scalar_type() == matrices.scalar_type(), "small_eigh: expected ", name, " of dtype ",
                     matrices.scalar_type(), " like the matrices, got ", result.scalar_type());
    TORCH_CHECK_VALUE(result.device() == matrices.device(), "small_eigh: expected ", name, " on ", matrices.device(),
                      " like the matrices, got ", result.device());
    at::assert_no_overlap(result, matrices);
  };
  check_result(eigenvalues, "eigenvalues", matrices.sizes().slice(0, 2));
  check_result(eigenvectors, "eigenvectors", matrices.sizes());
  return matrices.contiguous();
}

}  // namespace blk
