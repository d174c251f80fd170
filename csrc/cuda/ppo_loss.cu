// ppo_loss; formulas in ppo_kernels/ppo_loss.py.
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, kResident<T, kLayout>) saved(Call<T> call) {
  const uint32_t row = blockIdx.x;
  if (call.mask && !call.mask[row]) {
    if (threadIdx.x == 0) write_no_loss(call, row);
    return;
  }
  const T* z = call.logits[row];
  const Real<T> logit = logit_of(z, call.length, call.tokens[row]);
  const auto scored = score_row<T, kLayout>(z, call.length, logit, call.k);
  if (threadIdx.x == 0) token_loss(call, row, scored, true);
}

using Results = decltype(std::tuple_cat(LossResults{}, std::tuple<Tensor, Tensor, Tensor>{}));

Results ppo_loss(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                 OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                 Tensor scalars, int64_t kl_estimator) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) -> Results {
    using T = decltype(type);
    using R = Real<T>;
    Loss<T> loss(logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, scalars,
                 kl_estimator);
    auto out_shape = shape(tokens);
    const Tensor g = empty<R>(logits, out_shape), h = empty<R>(logits, out_shape);
    out_shape.push_back(2);
    const Tensor stats = empty<R>(logits, out_shape), held = readable(logits);
    auto& call = loss.call;
    call.logits = rows<T>(held);
    call.stats = data<RowStats<R>>(stats);
    call.grad_logprobs = data<R>(g);
    call.grad_entropy = data<R>(h);
    const Grid grid{call.count, threads_for_row(logits), kScratch<T>};
    with_layout(layout_of(call.length, call.logits),
                [&](auto layout) { device.launch(saved<T, layout>, grid, call); });
    return std::tuple_cat(loss.results(device), std::tuple(stats, g, h));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) { m.impl("ppo_loss", TORCH_BOX(&ppo_loss)); }

}  // namespace ppo::cuda
