// The sweeps over (part of) a row of logits, for the instruction set found when the program runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../../ppo_math.h"
#include "../../sampling.h"
#include "../../softmax_state.h"

namespace ppo::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A row is reduced in chunks of this many elements, merged in order: the result does not depend on
// how chunks are shared out over threads. Long enough that merging costs little beside summing,
// short enough to share a row of a large vocabulary out over several threads.
constexpr int64_t kChunk = 16384;

// Inputs and outputs of gae as contiguous arrays; mask and dones may be null. For discounted sums
// of `rewards` the decays stand in `values`, the sums in `advantages`, and nothing else is looked
// at.
template <class R>
struct GAEScan {
  const R *rewards, *values;
  const bool *mask, *dones;
  R gamma, gamma_lam;
  R *advantages, *returns;
};

// sample_tokens sums up weights over blocks of this many elements, and looks into one of them.
constexpr int64_t kDrawBlock = 1024;

// Scores that one of its sweeps compares all others with.
constexpr int kPivots = 15;

// Of a block, with weights 2^(k (z - centre)) and its largest logit, NaN where it has a NaN.
template <class R>
struct BlockWeight {
  R largest, centre;
  double sum;
};

// Of a block what is kept: the weight of ids above the cut, and how many are at it.
struct KeptWeight {
  double above;
  int64_t ties;
};

// With t_j = k (z_j - shift) and q_j = k (ref_j - ref_shift), over n elements:
template <class T>
struct Sweeps {
  using R = Real<T>;
  SoftmaxState<R> (*softmax_sums)(const T* z, int64_t n, R k);
  // With the bits of `softmax_sums` where it has them.
  Moments<R> (*moments)(const T* z, int64_t n, R k);
  // grad_j = 2^t_j (a + b t_j); `grad` may be `z`.
  void (*gradient)(const T* z, T* grad, int64_t n, R k, R shift, R a, R b);
  JointState<R> (*joint_sums)(const T* z, const T* ref, int64_t n, R k);
  // grad_j = 2^t_j (a + b (t_j - q_j))
  void (*kl_gradient)(const T* z, const T* ref, T* grad, int64_t n, R k, R shift, R ref_shift, R a,
                      R b);
  // Of blocks of at most kDrawBlock elements. `seen` is the largest logit before the block, or
  // -inf.
  BlockWeight<R> (*block_weight)(const T* z, int64_t n, R k, R seen);
  // The scores are logits over a temperature, the weights relative to a largest score.
  KeptWeight (*kept_weight)(const T* z, int64_t n, const Scale<R>& scale, R largest,
                            const Kept<R>& kept);
  // Adds to sums[i] the weight, or the number, of scores in [low, pivots[i]), and to the last one
  // that of all from `low` on; those of -inf have no weight and no number.
  void (*weights_below)(const T* z, int64_t n, const Scale<R>& scale, R largest, R low,
                        const R* pivots, double* sums);
  void (*counts_below)(const T* z, int64_t n, const Scale<R>& scale, R largest, R low,
                       const R* pivots, double* sums);
  void (*scores_and_weights)(const T* z, int64_t n, const Scale<R>& scale, R largest, R* scores,
                             R* weights);
  // Scans tokens [begin, begin + n), a row, from the G that is handed to its last one.
  void (*gae)(const GAEScan<R>& scan, int64_t begin, int64_t n, R G);
  void (*discounted_sums)(const GAEScan<R>& scan, int64_t begin, int64_t n);
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
