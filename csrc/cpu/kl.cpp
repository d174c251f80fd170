// kl_divergence and kl_estimate; formulas in ppo_kernels/kl.py.
#include "common.h"

namespace ppo::cpu {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& ref_logits,
                                           const OptionalTensor& mask,
                                           const OptionalTensor& temperatures,
                                           const Tensor& scalars) {
  using R = Real<T>;
  const Rows<T> z(logits), ref(ref_logits);
  auto out_shape = shape(logits);
  out_shape.back() = 2;
  const Tensor stats = per_token<R>(out_shape, mask), ref_stats = per_token<R>(out_shape, mask);
  out_shape.pop_back();
  const Tensor result = per_token<R>(out_shape, mask);
  const auto rows = counted_rows(mask, z.count);
  const auto own = as<double>(temperatures);
  check_temperatures(own, rows, out_shape);
  const auto of = temperatures_of<R>(own, scalars);
  sweep_rows<JointState<R>>(
      rows, z.length, of,
      [&](int64_t row, int64_t begin, int64_t n) {
        return sweeps<T>().joint_sums(z[row] + begin, ref[row] + begin, n, of[row].k);
      },
      [&](int64_t row, const JointState<R>& state) {
        data<R>(result)[row] = kl(state);
        data<RowStats<R>>(stats)[row] = {state.shift, std::log2(state.sum)};
        data<RowStats<R>>(ref_stats)[row] = {state.ref_shift, std::log2(state.ref_sum)};
      },
      no_write);
  return {result, stats, ref_stats};
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence(Tensor logits, Tensor ref_logits,
                                                 OptionalTensor mask, OptionalTensor temperatures,
                                                 Tensor scalars) {
  return dispatch(logits.scalar_type(), [&](auto t) {
    return forward<decltype(t)>(logits, ref_logits, mask, temperatures, scalars);
  });
}

template <class T>
Tensor backward(const Tensor& grad_kl, const Tensor& logits, const Tensor& ref_logits,
                const Tensor& kl, const Tensor& softmax_stats, const Tensor& ref_softmax_stats,
                const OptionalTensor& temperatures, const Tensor& scalars) {
  using R = Real<T>;
  const Rows<T> z(logits), ref(ref_logits);
  const Tensor grad_logits = empty_logits(logits);
  const Tensor upstream = as<R>(grad_kl), divergence = packed(kl);
  const Tensor stats = packed(softmax_stats), ref_stats = packed(ref_softmax_stats);
  const auto own = as<double>(temperatures);
  const auto of = temperatures_of<R>(own, scalars);
  write_rows(z.count, z.length, [&](int64_t row, int64_t begin, int64_t n) {
    T* grad = data<T>(grad_logits) + row * z.length + begin;
    const R g = data<R>(upstream)[row];
    if (g == R(0)) {
      std::fill_n(grad, n, T(0));
      return;
    }
    const RowStats<R> p = data<RowStats<R>>(stats)[row], q = data<RowStats<R>>(ref_stats)[row];
    const R weight = g * std::exp2(-p.log2_sum) / of[row].value;
    const R a = weight * (R(kLn2) * (q.log2_sum - p.log2_sum) - data<R>(divergence)[row]);
    sweeps<T>().kl_gradient(z[row] + begin, ref[row] + begin, grad, n, of[row].k, p.shift, q.shift,
                            a, weight * R(kLn2));
  });
  return grad_logits;
}

Tensor kl_divergence_backward(Tensor grad_kl, Tensor logits, Tensor ref_logits, Tensor kl,
                              Tensor softmax_stats, Tensor ref_softmax_stats,
                              OptionalTensor temperatures, Tensor scalars) {
  return dispatch(logits.scalar_type(), [&](auto t) {
    return backward<decltype(t)>(grad_kl, logits, ref_logits, kl, softmax_stats, ref_softmax_stats,
                                 temperatures, scalars);
  });
}

template <class R>
std::tuple<Tensor, Tensor> estimate(const Tensor& logprobs, const Tensor& ref_logprobs,
                                    KLEstimator estimator) {
  const Tensor x = as<R>(logprobs), ref = as<R>(ref_logprobs);
  const Tensor values = empty<R>(shape(x)), derivatives = empty<R>(shape(x));
  const R *p = data<R>(x), *q = data<R>(ref);
  R *value = data<R>(values), *derivative = data<R>(derivatives);
  parallel(x.numel(), 8, [&](int64_t i) {
    const KLTerm<R> term = kl_term(estimator, p[i] - q[i]);
    value[i] = term.value;
    derivative[i] = term.grad;
  });
  return {values, derivatives};
}

std::tuple<Tensor, Tensor> kl_estimate(Tensor logprobs, Tensor ref_logprobs, int64_t estimator) {
  return dispatch(logprobs.scalar_type(), [&](auto t) {
    return estimate<Real<decltype(t)>>(logprobs, ref_logprobs, KLEstimator(estimator));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("kl_divergence", PPO_CHECKED(kKLDivergence, &kl_divergence));
  m.impl("kl_divergence_backward", PPO_CHECKED(kKLDivergenceBackward, &kl_divergence_backward));
  m.impl("kl_estimate", PPO_CHECKED(kKLEstimate, &kl_estimate));
}

}  // namespace ppo::cpu
