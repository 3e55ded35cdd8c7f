// The extension module bayesian_lora_kernels._native: the operators' schemas, and `build_info`.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#ifdef BLK_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#define BLK_STRING_(...) #__VA_ARGS__
#define BLK_STRING(...) BLK_STRING_(__VA_ARGS__)

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
constexpr const char* kCompiler = "msvc " BLK_STRING(_MSC_VER);
#else
constexpr const char* kCompiler = "unknown";
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = kCompiler;
  info["torch"] = TORCH_VERSION;
#ifdef BLK_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = BLK_STRING(BLK_CUDA_ARCHITECTURES);
#else
  info["cuda"] = pybind11::none();
  info["architectures"] = "";
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(bayesian_lora_kernels_native, m) {
  // Returns [L], int32: the number of sweeps, or a negative number that csrc/small_eigh.h names.
  m.def("small_eigh(Tensor matrices, Tensor(a!) eigenvalues, Tensor(b!) eigenvectors) -> Tensor");
  // Likewise, sweeps of both diagonalisations; csrc/nystrom_eigh.h.
  m.def("nystrom_eigh(Tensor core, Tensor gram, float rounding, Tensor(a!) combination) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native operators of bayesian_lora_kernels; importing it registers them with PyTorch.";
  m.def("build_info", &build_info, "Compiler, PyTorch and CUDA versions and GPU architectures of this build.");
}
