#include "sweeps_includes.h"

#if defined(__x86_64__)

#define PPO_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ppo::cpu {
namespace avx2 {
namespace {
#include "simd.h"
#include "sweeps_impl.h"
}  // namespace
}  // namespace avx2

constinit const SweepTable kSweepsAVX2 = avx2::sweep_table_of("avx2");

}  // namespace ppo::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
