// Sums over tokens, in fp64 and in an order that depends on their number alone.
#pragma once

#include "common.cuh"

namespace ppo::cuda {

// The denominator of a mean: a number on the device, or a count. 0 counts as 1; below it is NaN.
struct Denominator {
  const double* value;
  int64_t count;

  __device__ double operator()() const {
    const double x = value ? *value : double(count);
    return x == 0 ? 1 : x > 0 ? x : NAN;
  }
};

// The caller's denominator, or how many the mask counts; none where there is neither.
inline OptionalTensor counted(const OptionalTensor& mask, const OptionalTensor& denominator) {
  if (denominator) return as<double>(*denominator);
  if (!mask) return std::nullopt;
  return torch::stable::sum(*mask, std::nullopt, false, ScalarType::Double);
}

template <class R>
__device__ __forceinline__ R warp_sum(R x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// CTAs that take a few numbers per token, each of a block of tokens.
constexpr int kTokenThreads = 512;
constexpr int64_t kTokensOfBlock = 4 * kTokenThreads;

inline int64_t token_blocks(int64_t count) { return ceil_div(count, kTokensOfBlock); }

// f(i) for the tokens that fall to this thread.
template <class F>
__device__ __forceinline__ void for_tokens_of_block(int64_t count, const F& f) {
  const int64_t first = blockIdx.x * kTokensOfBlock + threadIdx.x;
#pragma unroll
  for (int64_t j = 0; j < kTokensOfBlock; j += kTokenThreads) {
    if (first + j < count) f(first + j);
  }
}

constexpr int64_t kSumScratch = kTokenThreads / kWarp * sizeof(double);

// The sum over a CTA of such threads, for each of them. `scratch` serves one sum.
__device__ inline double cta_sum(double x, double* scratch) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  return warp_sum(lane_id() < kTokenThreads / kWarp ? scratch[lane_id()] : 0.0);
}

// The least over a CTA of such threads, for each of them; NaN does not count.
__device__ inline double cta_min(double x, double* scratch) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = std::fmin(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = scratch[lane_id() % (kTokenThreads / kWarp)];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = std::fmin(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

template <class R, int kMeans>
struct Scalars {
  R* at[kMeans];
};

// Mean i is the sum of parts [i * count, (i + 1) * count) over the denominator: a CTA for each, in
// whose threads so many loads are in flight that 65,536 parts take eight round trips to memory.
template <class R, class Summand, int kMeans>
__global__ void __launch_bounds__(kTokenThreads)
    mean_parts(const Summand* parts, int64_t count, Denominator denominator,
               const __grid_constant__ Scalars<R, kMeans> means) {
  const Summand* mine = parts + blockIdx.x * count;
  double sum = 0;
  constexpr int kAtOnce = 16;
  for (int64_t i = threadIdx.x; i < count; i += kAtOnce * kTokenThreads) {
    Summand x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t at = i + j * kTokenThreads;
      x[j] = at < count ? mine[at] : Summand(0);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sum += double(x[j]);
  }
  sum = cta_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) *means.at[blockIdx.x] = R(sum / denominator());
}

// The means of the rows of `parts` (kMeans, count).
template <class R, class Summand, size_t... i>
auto means(const Device& device, const Tensor& parts, const Denominator& denominator,
           std::index_sequence<i...>) {
  constexpr int kMeans = sizeof...(i);
  const Tensor results[] = {(void(i), empty<R>(parts, {}))...};
  device.launch(mean_parts<R, Summand, kMeans>, Grid{kMeans, kTokenThreads, kSumScratch},
                data<Summand>(parts), parts.size(1), denominator,
                Scalars<R, kMeans>{{data<R>(results[i])...}});
  return std::tuple(results[i]...);
}

template <int kMeans, class R, class Summand>
auto means(const Device& device, const Tensor& parts, const Denominator& denominator) {
  return means<R, Summand>(device, parts, denominator, std::make_index_sequence<kMeans>{});
}

}  // namespace ppo::cuda
