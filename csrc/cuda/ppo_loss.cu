// ppo_loss; formulas in ppo_kernels/ppo_loss.py.
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    saved(Call<T> call) {
  using R = Real<T>;
  const Part part(call.division, call.length);
  const bool writes = part.index == 0 && threadIdx.x == 0;
  if (excluded(call.mask, part.row)) {
    if (writes) write_no_loss(call, part.row);
    return;
  }
  begin_row(call.division);
  const T* z = call.logits[part.row];
  const R k = call.temperatures[part.row].k;
  auto state = thread_sums<T, kLayout>(z + part.begin, part.length, k, KeepNothing{});
  TokenInput<R> token{};
  if (writes) token = token_input(call, part.row, z);
  state = merge_row(state, *reinterpret_cast<States<R>*>(shared_memory()), call.division, part, k);
  if (!writes) return;
  token_loss(call, part.row, token, score(state, token.logit, k), true);
}

using Results = decltype(std::tuple_cat(LossResults{}, std::tuple<Tensor, Tensor, Tensor>{}));

Results ppo_loss(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                 OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                 OptionalTensor temperatures, Tensor scalars, int64_t kl_estimator) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) -> Results {
    using T = decltype(type);
    using R = Real<T>;
    Loss<T> loss(logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator,
                 temperatures, scalars, kl_estimator);
    auto out_shape = shape(tokens);
    const Tensor g = empty<R>(logits, out_shape), h = empty<R>(logits, out_shape);
    out_shape.push_back(2);
    const Tensor stats = empty<R>(logits, out_shape), held = readable(logits);
    auto& call = loss.call;
    call.logits = rows<T>(held);
    call.stats = data<RowStats<R>>(stats);
    call.grad_logprobs = data<R>(g);
    call.grad_entropy = data<R>(h);
    with_layout(layout_of(call.length, call.logits), [&](auto layout) {
      const auto kernel = saved<T, layout>;
      call.division = division_of<T>(device.limits(), call.length);
      device.launch(kernel, call.division.grid(call.count, sizeof(States<R>)), call);
    });
    return std::tuple_cat(loss.results(device), std::tuple(stats, g, h));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("ppo_loss", PPO_CHECKED(kPPOLoss, &ppo_loss));
}

}  // namespace ppo::cuda
