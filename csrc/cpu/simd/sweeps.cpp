// Chooses the sweeps for this processor.
#include "sweeps.h"

#include <cstdlib>
#include <string>

namespace ppo::cpu {
namespace {

const SweepTable& choose() {
#if defined(__x86_64__)
  const char* variable = std::getenv("PPO_KERNELS_SIMD");
  const std::string limit = variable ? variable : "";
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, which Clang 14 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (limit == "baseline" || !avx2) return kSweepsBaseline;
  if (limit == "avx2" || !avx512) return kSweepsAVX2;
  if (limit == "avx512" || !__builtin_cpu_supports("avx512bf16")) return kSweepsAVX512;
  return kSweepsAVX512BF16;
#else
  return kSweepsBaseline;
#endif
}

}  // namespace

const SweepTable& sweep_table() {
  static const SweepTable& table = choose();
  return table;
}

}  // namespace ppo::cpu
