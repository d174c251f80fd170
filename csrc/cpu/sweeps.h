// The sweeps over (part of) a row of logits, for the instruction set found when the program runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../ppo_math.h"
#include "../softmax_state.h"

namespace ppo::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A row is reduced in chunks of this many elements, merged in order: the result does not depend on
// how chunks are shared out over threads. Long enough that merging costs little beside summing,
// short enough to share a row of a large vocabulary out over several threads.
constexpr int64_t kChunk = 16384;

// Inputs and outputs of gae as contiguous arrays; mask and dones may be null.
template <class R>
struct GAEScan {
  const R *rewards, *values;
  const bool *mask, *dones;
  R gamma, gamma_lam;
  R *advantages, *returns;
};

// With t_j = k (z_j - shift) and q_j = k (ref_j - ref_shift), over n elements:
template <class T>
struct Sweeps {
  using R = Real<T>;
  SoftmaxState<R> (*statistics)(const T* z, int64_t n, R k);
  // With the bits of `statistics` where it has them.
  Moments<R> (*moments)(const T* z, int64_t n, R k);
  // grad_j = 2^t_j (a + b t_j); `grad` may be `z`.
  void (*gradient)(const T* z, T* grad, int64_t n, R k, R shift, R a, R b);
  JointState<R> (*joint_statistics)(const T* z, const T* ref, int64_t n, R k);
  // grad_j = 2^t_j (a + b (t_j - q_j))
  void (*kl_gradient)(const T* z, const T* ref, T* grad, int64_t n, R k, R shift, R ref_shift, R a,
                      R b);
  // Scans tokens [begin, begin + n), a row, from the G that is handed to its last one.
  void (*gae)(const GAEScan<R>& scan, int64_t begin, int64_t n, R G);
};

struct SweepTable {
  Sweeps<float> fp32;
  Sweeps<double> fp64;
  Sweeps<BFloat16> bf16;
  Sweeps<Half> fp16;
  const char* level;
};

extern const SweepTable kSweepsBaseline;
#if defined(__x86_64__)
extern const SweepTable kSweepsAVX2;
extern const SweepTable kSweepsAVX512;
extern const SweepTable kSweepsAVX512BF16;
#endif

// The table for this processor; PPO_KERNELS_SIMD=avx512, avx2 or baseline in the environment asks
// for less.
const SweepTable& sweep_table();

template <class T>
const Sweeps<T>& sweeps() {
  const SweepTable& table = sweep_table();
  if constexpr (std::is_same_v<T, float>) return table.fp32;
  if constexpr (std::is_same_v<T, double>) return table.fp64;
  if constexpr (std::is_same_v<T, BFloat16>) return table.bf16;
  if constexpr (std::is_same_v<T, Half>) return table.fp16;
}

}  // namespace ppo::cpu
