// The extension module `_C`: importing it registers the kernels (csrc/cpu, csrc/cuda) with torch.

// Nothing here touches torch, and pybind11 as torch ships it refuses to be included under a target.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/simd/sweeps.h"

// The GPUs that csrc/cuda was compiled for, if it was: setup.py.
#ifndef PPO_CUDA_ARCHS
#define PPO_CUDA_ARCHS ""
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
  info["simd_compiled"] = pybind11::make_tuple("avx512_bf16", "avx512", "avx2", "baseline");
#else
  info["simd_compiled"] = pybind11::make_tuple("baseline");
#endif
  info["simd"] = ppo::cpu::sweep_table().level;
  info["cuda_archs"] = pybind11::tuple(pybind11::str(PPO_CUDA_ARCHS).attr("split")());
  info["torch_target"] = PPO_TORCH_TARGET;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of ppo_kernels; importing it registers them with torch.";
  m.def("build_info", &build_info, "Compiler, SIMD levels, CUDA archs and torch target.");
}
