// token_logprobs and its backward; formulas in ppo_kernels/logprobs.py.
#include "logprobs.h"

namespace ppo::cpu {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& tokens,
                                           const OptionalTensor& mask,
                                           const OptionalTensor& temperatures,
                                           const Tensor& scalars) {
  using R = Real<T>;
  const Rows<T> z(logits);
  const Ids ids(tokens);
  const auto rows = counted_rows(mask, z.count);
  auto out_shape = shape(tokens);
  check_ids(ids, rows, z.length, out_shape);
  const auto own = as<double>(temperatures);
  check_temperatures(own, rows, out_shape);
  const auto of = temperatures_of<R>(own, scalars);
  const Tensor logprobs = per_token<R>(out_shape, mask), entropy = per_token<R>(out_shape, mask);
  out_shape.push_back(2);
  const Tensor stats = per_token<R>(out_shape, mask);
  R *logprob_of = data<R>(logprobs), *entropy_of = data<R>(entropy);
  auto* stats_of = data<RowStats<R>>(stats);
  sweep_rows<SoftmaxState<R>>(
      rows, z.length, of,
      [&](int64_t row, int64_t begin, int64_t n) {
        return sweeps<T>().softmax_sums(z[row] + begin, n, of[row].k);
      },
      [&](int64_t row, const SoftmaxState<R>& state) {
        const Scored<R> scored = score(state, R(z[row][ids[row]]), of[row].k);
        logprob_of[row] = scored.logprob;
        entropy_of[row] = scored.entropy;
        stats_of[row] = scored.stats;
      },
      no_write);
  return {logprobs, entropy, stats};
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor tokens, OptionalTensor mask,
                                                  OptionalTensor temperatures, Tensor scalars) {
  return dispatch(logits.scalar_type(), [&](auto t) {
    return forward<decltype(t)>(logits, tokens, mask, temperatures, scalars);
  });
}

// `grad_logits` may be `logits`.
template <class T>
void backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
              const Tensor& logits, const Tensor& tokens, const Tensor& entropy,
              const Tensor& softmax_stats, const OptionalTensor& temperatures,
              const Tensor& scalars, const Tensor& grad_logits) {
  using R = Real<T>;
  const Rows<T> z(logits), grads(grad_logits);
  const Ids ids(tokens);
  const auto g_tensor = as<R>(grad_logprobs), h_tensor = as<R>(grad_entropy);
  const R *g = data_or_null<R>(g_tensor), *h = data_or_null<R>(h_tensor);
  const Tensor entropies = packed(entropy), stats = packed(softmax_stats);
  const R* entropy_of = data<R>(entropies);
  const auto* stats_of = data<RowStats<R>>(stats);
  const auto own = as<double>(temperatures);
  const auto of = temperatures_of<R>(own, scalars);
  const auto upstream = [&](int64_t row) {
    return std::pair(g ? g[row] : R(0), h ? h[row] : R(0));
  };
  // A row without upstream gradient may be one that a mask excluded, whose token is anything.
  const std::pair none(R(0), R(0));
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < z.count; ++row) {
    if (upstream(row) != none && ids[row] != kElsewhere) rows.push_back(row);
  }
  check_ids(ids, rows, z.length, shape(tokens));
  // Before anything is written where the tokens' logits may be.
  std::vector<RowGradient<R>> gradients(z.count);
  parallel(z.count, 64, [&](int64_t row) {
    if (upstream(row) == none) return;
    const auto [g_row, h_row] = upstream(row);
    const R logit = ids[row] == kElsewhere ? R(0) : R(z[row][ids[row]]);
    gradients[row] = row_gradient(g_row, h_row, entropy_of[row], stats_of[row], of[row], logit);
  });
  write_rows(z.count, z.length, [&](int64_t row, int64_t begin, int64_t n) {
    if (upstream(row) == none) {
      std::fill_n(grads[row] + begin, n, T(0));
    } else {
      write_gradient(gradients[row], z[row], grads[row], begin, n, ids[row], of[row].k);
    }
  });
}

Tensor token_logprobs_backward(OptionalTensor grad_logprobs, OptionalTensor grad_entropy,
                               Tensor logits, Tensor tokens, Tensor entropy, Tensor softmax_stats,
                               OptionalTensor temperatures, Tensor scalars) {
  const Tensor grad_logits = empty_logits(logits);
  dispatch(logits.scalar_type(), [&](auto t) {
    backward<decltype(t)>(grad_logprobs, grad_entropy, logits, tokens, entropy, softmax_stats,
                          temperatures, scalars, grad_logits);
  });
  return grad_logits;
}

void token_logprobs_backward_(OptionalTensor grad_logprobs, OptionalTensor grad_entropy,
                              Tensor logits, Tensor tokens, Tensor entropy, Tensor softmax_stats,
                              OptionalTensor temperatures, Tensor scalars) {
  check_unit_stride("logits", logits);
  dispatch(logits.scalar_type(), [&](auto t) {
    backward<decltype(t)>(grad_logprobs, grad_entropy, logits, tokens, entropy, softmax_stats,
                          temperatures, scalars, logits);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("token_logprobs", PPO_CHECKED(kTokenLogprobs, &token_logprobs));
  m.impl("token_logprobs_backward", PPO_CHECKED(kTokenLogprobsBackward, &token_logprobs_backward));
  m.impl("token_logprobs_backward_",
         PPO_CHECKED(kTokenLogprobsBackward, &token_logprobs_backward_));
}

}  // namespace ppo::cpu
