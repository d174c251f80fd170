#include "sweeps_includes.h"

#if defined(__x86_64__)

#define PPO_AVX512
#define PPO_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace ppo::cpu {
namespace avx512_bf16 {
namespace {
#include "simd.h"
#include "sweeps_impl.h"
}  // namespace
}  // namespace avx512_bf16

constinit const SweepTable kSweepsAVX512BF16 = avx512_bf16::sweep_table_of("avx512_bf16");

}  // namespace ppo::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
