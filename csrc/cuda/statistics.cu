// token_statistics; formulas in ppo_kernels/statistics.py.
#include "logprobs.cuh"

namespace ppo::cuda {
namespace {

// Where the results of all rows go.
template <class R>
struct Results {
  R *logprobs, *entropy, *max_prob, *sum_sq_probs;
  bool* top1;
  R* varentropy;

  __device__ void write(uint32_t row, const TokenStatistics<R>& of) const {
    logprobs[row] = of.logprob;
    entropy[row] = of.entropy;
    max_prob[row] = of.max_prob;
    sum_sq_probs[row] = of.sum_sq_probs;
    top1[row] = of.top1;
    varentropy[row] = of.varentropy;
  }
};

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    forward(Rows<T> logits, Ids tokens, const bool* mask, int length, Division division,
            Temperatures<Real<T>> temperatures, Results<Real<T>> results) {
  using R = Real<T>;
  const Part part(division, length);
  const bool writes = threadIdx.x == 0 && part.index == 0;
  if (excluded(mask, part.row)) {
    if (writes) results.write(part.row, {});
    return;
  }
  begin_row(division);
  const T* z = logits[part.row];
  const R k = temperatures[part.row].k;
  auto moments = thread_sums<T, kLayout, Moments<R>>(z + part.begin, part.length, k, KeepNothing{});
  const R logit = writes ? logit_of(z, length, tokens[part.row]) : R(0);
  auto& states = *reinterpret_cast<States<R, Moments>*>(shared_memory());
  moments = merge_row(moments, states, division, part, k);
  if (!writes) return;
  results.write(part.row, ppo::token_statistics(moments, logit, k));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_statistics(
    Tensor logits, Tensor tokens, OptionalTensor mask, OptionalTensor temperatures,
    Tensor scalars) {
  const Device device(logits);
  const OptionalTensor counts = packed(mask);
  const auto own = as<double>(temperatures);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    const auto out_shape = shape(tokens);
    const Tensor logprobs = empty<R>(logits, out_shape), entropy = empty<R>(logits, out_shape);
    const Tensor max_prob = empty<R>(logits, out_shape), sum_sq = empty<R>(logits, out_shape);
    const Tensor top1 = torch::stable::new_empty(logits, out_shape, ScalarType::Bool);
    const Tensor varentropy = empty<R>(logits, out_shape);
    const Results<R> results{data<R>(logprobs), data<R>(entropy), data<R>(max_prob),
                             data<R>(sum_sq),   data<bool>(top1), data<R>(varentropy)};
    const Tensor held = readable(logits), ids = packed(tokens);
    const auto z = rows<T>(held);
    const int64_t length = logits.size(-1);
    with_layout(layout_of(length, z), [&](auto layout) {
      const auto kernel = forward<T, layout>;
      const auto division = division_of<T>(device.limits(), length);
      device.launch(kernel, division.grid(tokens.numel(), sizeof(States<R, Moments>)), z, Ids(ids),
                    data_or_null<bool>(counts), length, division, temperatures_of<R>(own, scalars),
                    results);
    });
    return std::tuple(logprobs, entropy, max_prob, sum_sq, top1, varentropy);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("token_statistics", PPO_CHECKED(kTokenLogprobs, &token_statistics));
}

}  // namespace ppo::cuda
