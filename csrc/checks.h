// What the CPU and the CUDA form of the operations share: the checks of their arguments.
#pragma once

#include "small_eigh.h"

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

namespace blk {

// Small square matrices [L, n, n].
inline void check_small(const char* where, const char* name, const at::Tensor& matrices) {
  TORCH_CHECK_VALUE(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), where, ": expected ", name,
                    " of shape [L, n, n], got ", matrices.sizes());
  TORCH_CHECK_VALUE(matrices.size(1) <= kMaxN, where, ": expected n <= ", kMaxN, ", got ", name, " of shape ",
                    matrices.sizes());
}

// An argument of the shape, dtype and device that another one, `like`, calls for.
inline void check_like(const char* where, const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                       const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, where, ": expected ", name, " of shape ", shape, ", got shape ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), where, ": expected ", name, " of dtype ",
                   like.scalar_type(), " like the ", like_name, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), where, ": expected ", name, " on ", like.device(), " like the ",
                    like_name, ", got ", tensor.device());
}

// Results are written in place: they must be contiguous already, and apart from what is read.
inline void check_result(const char* where, const char* name, const at::Tensor& result, at::IntArrayRef shape,
                         const char* like_name, const at::Tensor& like) {
  check_like(where, name, result, shape, like_name, like);
  TORCH_CHECK_VALUE(result.is_contiguous(), where, ": expected contiguous ", name, ", got strides ", result.strides());
  at::assert_no_overlap(result, like);
}

inline void check_small_eigh(const at::Tensor& matrices, const at::Tensor& eigenvalues,
                             const at::Tensor& eigenvectors) {
  const char* where = "small_eigh";
  check_small(where, "matrices", matrices);
  TORCH_CHECK_TYPE(matrices.scalar_type() == at::kFloat || matrices.scalar_type() == at::kDouble,
                   "small_eigh: expected matrices of dtype float32 or float64, got ", matrices.scalar_type());
  check_result(where, "eigenvalues", eigenvalues, matrices.sizes().slice(0, 2), "matrices", matrices);
  check_result(where, "eigenvectors", eigenvectors, matrices.sizes(), "matrices", matrices);
}

inline void check_nystrom_eigh(const at::Tensor& core, const at::Tensor& gram, double rounding,
                               const at::Tensor& combination) {
  const char* where = "nystrom_eigh";
  check_small(where, "core", core);
  TORCH_CHECK_TYPE(core.scalar_type() == at::kDouble, "nystrom_eigh: expected core of dtype float64, got ",
                   core.scalar_type());
  TORCH_CHECK_VALUE(rounding >= 0 && rounding < 1, "nystrom_eigh: expected rounding in [0, 1), got ", rounding);
  check_like(where, "gram", gram, core.sizes(), "core", core);
  check_result(where, "combination", combination, core.sizes(), "core", core);
  at::assert_no_overlap(combination, gram);
}

}  // namespace blk
