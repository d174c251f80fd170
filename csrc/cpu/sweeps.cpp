// Chooses the sweeps for this processor.
#include "sweeps.h"

#include <cstdlib>
#include <cstring>

namespace ppo::cpu {
namespace {

const SweepTable& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("PPO_KERNELS_SIMD");
  const bool baseline = limit && !std::strcmp(limit, "baseline");
  const bool avx2 = limit && !std::strcmp(limit, "avx2");
  __builtin_cpu_init();
  if (!baseline && !avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kSweepsAVX512;
  }
  if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kSweepsAVX2;
  }
#endif
  return kSweepsBaseline;
}

}  // namespace

const SweepTable& sweep_table() {
  static const SweepTable& table = choose();
  return table;
}

}  // namespace ppo::cpu
