// sample_tokens; formulas in ppo_kernels/sampling.py.
#include "sampling.cuh"

namespace ppo::cuda {
namespace {

// What is given and wanted of all rows.
template <class T>
struct Draws {
  Rows<T> logits;
  int length;
  const double* uniforms;
  const bool* mask;
  const double* temperatures;
  double temperature;
  Filters filters;
  int64_t* tokens;
  Real<T>* logprobs;

  // By a row that is masked out.
  __device__ bool skip(uint32_t row) const {
    if (!mask || mask[row]) return false;
    if (threadIdx.x == 0) {
      tokens[row] = 0;
      logprobs[row] = Real<T>(0);
    }
    return true;
  }
  __device__ Scale<Real<T>> scale(uint32_t row, bool divides) const {
    return Scale<Real<T>>::of(temperatures ? temperatures[row] : temperature, divides);
  }
  __device__ void store(uint32_t row, int token, double log2, bool greedy, bool defined) const {
    if (threadIdx.x != 0) return;
    tokens[row] = defined ? token : length;
    logprobs[row] = !defined ? Real<T>(NAN)
                    : greedy ? Real<T>(0)
                             : Real<T>(kLn2 * (log2 < 0 ? log2 : 0.0));
  }
};

// CTAs of so many threads to a multiprocessor; where scores are compared with pivots one has all
// registers.
template <class T>
constexpr int kUnfilteredResident = sizeof(T) == 8 ? 1 : 2;

__device__ __forceinline__ bool is_uniform(double u) { return u >= 0 && u < 1; }

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, kUnfilteredResident<T>)
    unfiltered(const __grid_constant__ Draws<T> draws) {
  using R = Real<T>;
  const uint32_t row = blockIdx.x;
  if (draws.skip(row)) return;
  auto& scratch = *reinterpret_cast<Scratch<R>*>(shared_memory());
  const T* z = draws.logits[row];
  const int length = draws.length, segment = segment_length<T, kLayout>(length);
  const auto scale = draws.scale(row, false);
  const double u = draws.uniforms[row], k = double(scale.k);
  segment_weights<T, kLayout>(z, length, scale.k, scratch);
  __syncthreads();
  R largest;
  const auto own = segment_of_lane(scratch, ceil_div(length, segment), k, largest);
  const double cumulative = lanes_until(own.weight);
  const double all = __shfl_sync(kAllLanes, cumulative, kWarp - 1);
  double before;
  int at = segment_at(own.weight, cumulative, u * all, before);
  if (scale.greedy) at = warp_min(own.top == largest ? lane_id() : kSegments - 1);
  const double weight = __shfl_sync(kAllLanes, own.weight, at);
  const R top = __shfl_sync(kAllLanes, own.top, at);
  // To be greedy is to draw the first of the ids at a cut that only the largest reach.
  const Kept<R> kept{scale.greedy ? largest : -R(INFINITY), -R(INFINITY), R(scale.greedy), 0};
  const Weights<R> weights{scale, false, largest, top, kept};
  const double fraction = scale.greedy ? 0.0 : (u * all - before) / weight;
  const int token = token_at<T, kLayout>(z, length, at * segment, min(length, (at + 1) * segment),
                                         fraction, 0, weights, scratch);
  const double log2 = k * (double(R(z[token])) - double(largest)) - std::log2(all);
  draws.store(row, token, log2, scale.greedy,
              scale.valid && is_uniform(u) && all > 0 && can_be_drawn(largest, scale));
}

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, 1)
    filtered(const __grid_constant__ Draws<T> draws) {
  using R = Real<T>;
  const uint32_t row = blockIdx.x;
  if (draws.skip(row)) return;
  auto& scratch = *reinterpret_cast<Scratch<R>*>(shared_memory());
  const T* z = draws.logits[row];
  const int length = draws.length, segment = segment_length<T, kLayout>(length);
  const int segments = ceil_div(length, segment);
  const Filters& filters = draws.filters;
  const auto scale = draws.scale(row, true);

  segment_weights<T, kLayout>(z, length, R(1), scratch);
  __syncthreads();
  R top;
  const auto unscaled = segment_of_lane(scratch, segments, 1.0, top);
  // NaN where there is one.
  const double all_unscaled = warp_sum(unscaled.weight);
  const bool finite = all_unscaled > 0 && can_be_drawn(top, scale);
  const R largest = finite ? top / scale.temperature : R(0);

  R cut = scale.greedy ? largest : -R(INFINITY);
  double below = 0, all = 0;
  const bool has_top_k = filters.top_k < double(length) && !scale.greedy;
  const bool has_top_p = filters.top_p < 1 && !scale.greedy;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool counts = pass == 0;
    if (counts ? !has_top_k : !has_top_p) continue;
    const WeightsBelow<T, kLayout> sums{z, length, scale, largest, cut, counts, scratch};
    const auto allowed = [&](double part, double total) {
      return counts ? part <= total - filters.top_k
                    : removed_by_top_p<R>(part / total, filters.top_p);
    };
    cut = search<kPivots<R>>(cut, largest, sums, allowed, below, all);
  }
  Kept<R> kept{cut, R(filters.min_p > 0 ? std::log2(filters.min_p) : -INFINITY), R(0), 0};
  __syncthreads();
  for (int i = 0; i < segments; ++i) {
    R above = R(0);
    int ties = 0;
    for_loaded<T, kLayout>(z + i * segment, min(segment, length - i * segment), [&](const auto& x) {
      for_elements<T>(x, [&](R logit) {
        const R s = logit / scale.temperature;
        const R t = exponent_of(s, largest, scale.k);
        const R e = fast_exp2(t);
        above += s > cut && t >= kept.least ? e : R(0);
        ties += s == cut;
      });
    });
    above = warp_sum(above);
    ties = warp_sum(ties);
    if (lane_id() == 0) {
      scratch.sums[i][warp_id()] = above;
      scratch.ties[i][warp_id()] = ties;
    }
  }
  __syncthreads();
  double weight = 0;
  int64_t ties = 0;
  if (lane_id() < segments) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < int(blockDim.x) / kWarp) {
        weight += double(scratch.sums[lane_id()][w]);
        ties += scratch.ties[lane_id()][w];
      }
    }
  }
  const int64_t ties_until = lanes_until(ties), ties_before = ties_until - ties;
  const int64_t all_ties = __shfl_sync(kAllLanes, ties_until, kWarp - 1);
  const R exponent = exponent_of(cut, largest, scale.k);
  const double tie_weight = fast_exp2(double(exponent));
  if (has_top_p) kept.skipped = ties_removed<R>(below, tie_weight, all_ties, all, filters.top_p);
  kept.tie_weight = exponent >= kept.least ? R(tie_weight) : R(0);
  const auto beyond = [&](int64_t n) { return n > kept.skipped ? n - kept.skipped : int64_t(0); };
  weight += double(kept.tie_weight) * double(beyond(ties_until) - beyond(ties_before));

  const double u = draws.uniforms[row], cumulative = lanes_until(weight);
  all = __shfl_sync(kAllLanes, cumulative, kWarp - 1);
  const double target = scale.greedy ? 0.0 : u * all;
  double before;
  const int at = segment_at(weight, cumulative, target, before);
  const double fraction = (target - before) / __shfl_sync(kAllLanes, weight, at);
  const Weights<R> weights{scale, true, largest, largest, kept};
  const int token =
      token_at<T, kLayout>(z, length, at * segment, min(length, (at + 1) * segment), fraction,
                           __shfl_sync(kAllLanes, ties_before, at), weights, scratch);
  const R score = R(z[token]) / scale.temperature;
  const double log2 = kLog2E * (double(score) - double(largest)) - std::log2(all);
  draws.store(row, token, log2, scale.greedy, scale.valid && is_uniform(u) && finite);
}

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, OptionalTensor mask,
                                         OptionalTensor temperatures, Tensor scalars) {
  const Device device(logits);
  const double* given = data<double>(scalars);
  const Filters filters{given[1], given[2], given[3]};
  const Tensor numbers = as<double>(uniforms);
  const auto own = as<double>(temperatures), counted = packed(mask);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    const auto out_shape = shape(uniforms);
    const Tensor tokens = torch::stable::new_empty(logits, out_shape, ScalarType::Long);
    const Tensor logprobs = empty<R>(logits, out_shape);
    const Tensor held = readable(logits);
    const auto z = rows<T>(held);
    const int64_t length = logits.size(-1);
    const Draws<T> draws{z,
                         int(length),
                         data<double>(numbers),
                         data_or_null<bool>(counted),
                         data_or_null<double>(own),
                         given[0],
                         filters,
                         data<int64_t>(tokens),
                         data<R>(logprobs)};
    with_layout(layout_of(length, z), [&](auto layout) {
      const auto kernel = filters.keep_all(length) ? unfiltered<T, layout> : filtered<T, layout>;
      device.launch(kernel,
                    Grid{uniforms.numel(), threads_for<T>(length, length), sizeof(Scratch<R>)},
                    draws);
    });
    return std::tuple(tokens, logprobs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("sample_tokens", PPO_CHECKED(kSampleTokens, &sample_tokens));
}

}  // namespace ppo::cuda
