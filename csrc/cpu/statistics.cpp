// token_statistics; formulas in ppo_kernels/statistics.py.
#include "common.h"

namespace ppo::cpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Results forward(const Tensor& logits, const Tensor& tokens, const OptionalTensor& mask,
                const OptionalTensor& temperatures, const Tensor& scalars) {
  using R = Real<T>;
  const Rows<T> z(logits);
  const Ids ids(tokens);
  const auto rows = counted_rows(mask, z.count);
  const auto out_shape = shape(tokens);
  check_ids(ids, rows, z.length, out_shape);
  const auto own = as<double>(temperatures);
  check_temperatures(own, rows, out_shape);
  const auto temperature_of = temperatures_of<R>(own, scalars);
  const auto results = [&] { return per_token<R>(out_shape, mask); };
  const Tensor logprobs = results(), entropy = results(), max_prob = results();
  const Tensor sum_sq_probs = results(), varentropy = results();
  const Tensor top1 = torch::stable::empty(out_shape, ScalarType::Bool);
  if (mask) std::fill_n(data<bool>(top1), top1.numel(), false);
  sweep_rows<Moments<R>>(
      rows, z.length, temperature_of,
      [&](int64_t row, int64_t begin, int64_t n) {
        return sweeps<T>().moments(z[row] + begin, n, temperature_of[row].k);
      },
      [&](int64_t row, const Moments<R>& moments) {
        const TokenStatistics<R> of =
            token_statistics(moments, R(z[row][ids[row]]), temperature_of[row].k);
        data<R>(logprobs)[row] = of.logprob;
        data<R>(entropy)[row] = of.entropy;
        data<R>(max_prob)[row] = of.max_prob;
        data<R>(sum_sq_probs)[row] = of.sum_sq_probs;
        data<bool>(top1)[row] = of.top1;
        data<R>(varentropy)[row] = of.varentropy;
      },
      no_write);
  return {logprobs, entropy, max_prob, sum_sq_probs, top1, varentropy};
}

Results token_statistics(Tensor logits, Tensor tokens, OptionalTensor mask,
                         OptionalTensor temperatures, Tensor scalars) {
  return dispatch(logits.scalar_type(), [&](auto t) {
    return forward<decltype(t)>(logits, tokens, mask, temperatures, scalars);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("token_statistics", PPO_CHECKED(kTokenLogprobs, &token_statistics));
}

}  // namespace ppo::cpu
