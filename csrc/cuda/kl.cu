// kl_divergence and kl_estimate; formulas in ppo_kernels/kl.py.
#include "logprobs.cuh"

namespace ppo::cuda {
namespace {

// Vectors of each of the two rows that a thread has in flight.
template <Layout kLayout>
constexpr int kPairs = kInFlight<kLayout> / 2;

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    forward(Rows<T> logits, Rows<T> ref_logits, const bool* mask, int length, Division division,
            Temperatures<Real<T>> temperatures, Real<T>* result, RowStats<Real<T>>* stats,
            RowStats<Real<T>>* ref_stats) {
  using R = Real<T>;
  const Part part(division, length);
  const uint32_t row = part.row;
  const bool writes = threadIdx.x == 0 && part.index == 0;
  if (excluded(mask, row)) {
    if (!writes) return;
    result[row] = 0;
    stats[row] = ref_stats[row] = {};
    return;
  }
  begin_row(division);
  const T *z = logits[row] + part.begin, *ref = ref_logits[row] + part.begin;
  const R k = temperatures[row].k;
  JointState<R> state;
  nothing_seen(state);
  constexpr int n = kPairs<kLayout>;
  for_vectors<T, kLayout, n>(part.length, [&](int i, auto whole) {
    uint4 x[n], y[n];
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = load<T, kLayout, whole>(z, part.length, i + j);
#pragma unroll
    for (int j = 0; j < n; ++j) y[j] = load<T, kLayout, whole>(ref, part.length, i + j);
    absorb<T, n>(state, x, y, k);
  });
  auto& states = *reinterpret_cast<States<R, JointState>*>(shared_memory());
  state = merge_row(state, states, division, part, k);
  if (!writes) return;
  result[row] = kl(state);
  stats[row] = {state.shift, std::log2(state.sum)};
  ref_stats[row] = {state.ref_shift, std::log2(state.ref_sum)};
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence(Tensor logits, Tensor ref_logits,
                                                 OptionalTensor mask, OptionalTensor temperatures,
                                                 Tensor scalars) {
  const Device device(logits);
  const OptionalTensor counts = packed(mask);
  const auto own = as<double>(temperatures);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    auto out_shape = shape(logits);
    out_shape.back() = 2;
    const Tensor stats = empty<R>(logits, out_shape), ref_stats = empty<R>(logits, out_shape);
    out_shape.pop_back();
    const Tensor result = empty<R>(logits, out_shape);
    const Tensor held = readable(logits), ref_held = readable(ref_logits);
    const auto z = rows<T>(held), ref = rows<T>(ref_held);
    const int64_t length = logits.size(-1);
    with_layout(layout_of(length, z, ref), [&](auto layout) {
      const auto kernel = forward<T, layout>;
      const auto division = division_of<T>(device.limits(), length);
      const Grid grid = division.grid(result.numel(), sizeof(States<R, JointState>));
      device.launch(kernel, grid, z, ref, data_or_null<bool>(counts), length, division,
                    temperatures_of<R>(own, scalars), data<R>(result), data<RowStats<R>>(stats),
                    data<RowStats<R>>(ref_stats));
    });
    return std::tuple(result, stats, ref_stats);
  });
}

// p (log p - log q - KL) g / τ = 2^t (a + b (t - t_ref)), 0 where 2^t is.
template <class T, Layout kLayout>
struct JointGradient {
  using R = Real<T>;
  struct Loaded {
    uint4 logits, ref_logits;
  };
  InGlobal<T, kLayout> logits, ref_logits;
  R k, shift, ref_shift, a, b;

  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int i) const {
    return {logits.template load<kWhole>(i), ref_logits.template load<kWhole>(i)};
  }
  __device__ __forceinline__ void compute(const Loaded& loaded, R (&x)[kVector<T>]) const {
    R y[kVector<T>];
    unpack_vector<T>(loaded.logits, x);
    unpack_vector<T>(loaded.ref_logits, y);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const R t = exponent(x[j], k, shift), u = k * (y[j] - ref_shift);
      x[j] = weighed(fast_exp2(t), std::fma(b, t - u, a));
    }
  }
};

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    backward(const Real<T>* grad_kl, Rows<T> logits, Rows<T> ref_logits, int length,
             Division division, const Real<T>* divergence, const RowStats<Real<T>>* stats,
             const RowStats<Real<T>>* ref_stats, Temperatures<Real<T>> temperatures,
             T* grad_logits) {
  using R = Real<T>;
  const Part part(division, length, block_from_last());
  const uint32_t row = part.row;
  T* out = grad_logits + int64_t(row) * length + part.begin;
  const R g = grad_kl[row];
  if (g == R(0)) {
    write_row<T, kLayout>(out, part.length, Zeros<T>{});
    return;
  }
  const RowStats<R> p = stats[row], q = ref_stats[row];
  const auto temperature = temperatures[row];
  const R weight = g * std::exp2(-p.log2_sum) / temperature.value;
  const R a = weight * (R(kLn2) * (q.log2_sum - p.log2_sum) - divergence[row]);
  write_row<T, kLayout>(out, part.length,
                        JointGradient<T, kLayout>{{logits[row] + part.begin, part.length},
                                                  {ref_logits[row] + part.begin, part.length},
                                                  temperature.k,
                                                  p.shift,
                                                  q.shift,
                                                  a,
                                                  weight * R(kLn2)});
}

Tensor kl_divergence_backward(Tensor grad_kl, Tensor logits, Tensor ref_logits, Tensor kl,
                              Tensor softmax_stats, Tensor ref_softmax_stats,
                              OptionalTensor temperatures, Tensor scalars) {
  const Device device(logits);
  const auto own = as<double>(temperatures);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    const Tensor g = as<R>(grad_kl), divergence = packed(kl), grad_logits = empty_logits(logits);
    const Tensor stats = packed(softmax_stats), ref_stats = packed(ref_softmax_stats);
    const Tensor held = readable(logits), ref_held = readable(ref_logits);
    const auto z = rows<T>(held), ref = rows<T>(ref_held);
    const int64_t length = logits.size(-1), count = divergence.numel();
    const auto division = elementwise_division<T>(device.limits(), count, length);
    const Grid grid{count * division.parts, division.threads};
    with_layout(layout_of(length, z, ref, rows<T>(grad_logits)), [&](auto layout) {
      device.launch(backward<T, layout>, grid, data<R>(g), z, ref, length, division,
                    data<R>(divergence), data<RowStats<R>>(stats), data<RowStats<R>>(ref_stats),
                    temperatures_of<R>(own, scalars), data<T>(grad_logits));
    });
    return grad_logits;
  });
}

template <class R>
__global__ void __launch_bounds__(kTokenThreads)
    estimate(const R* logprobs, const R* ref_logprobs, int64_t count, KLEstimator estimator,
             R* values, R* derivatives) {
  for_tokens_of_block(count, [&](int64_t i) {
    const KLTerm<R> term = kl_term(estimator, logprobs[i] - ref_logprobs[i]);
    values[i] = term.value;
    derivatives[i] = term.grad;
  });
}

std::tuple<Tensor, Tensor> kl_estimate(Tensor logprobs, Tensor ref_logprobs, int64_t estimator) {
  const Device device(logprobs);
  return dispatch(logprobs.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor x = as<R>(logprobs), ref = as<R>(ref_logprobs);
    const Tensor values = empty<R>(x, shape(x)), derivatives = empty<R>(x, shape(x));
    device.launch(estimate<R>, Grid{token_blocks(x.numel()), kTokenThreads}, data<R>(x),
                  data<R>(ref), x.numel(), KLEstimator(estimator), data<R>(values),
                  data<R>(derivatives));
    return std::tuple(values, derivatives);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("kl_divergence", PPO_CHECKED(kKLDivergence, &kl_divergence));
  m.impl("kl_divergence_backward", PPO_CHECKED(kKLDivergenceBackward, &kl_divergence_backward));
  m.impl("kl_estimate", PPO_CHECKED(kKLEstimate, &kl_estimate));
}

}  // namespace ppo::cuda
