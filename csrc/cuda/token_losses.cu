// clipped_policy_loss and value_loss, from a few numbers per token; formulas in
// ppo_kernels/token_losses.py.
#include <initializer_list>

#include "means.cuh"

namespace ppo::cuda {
namespace {

// The inputs of a loss, and where its gradient and the sums of each block, `parts` (sums, blocks),
// go. `mask` may be null.
template <class R>
struct Tokens {
  const R* in[3];
  const bool* mask;
  int64_t count;
  Denominator denominator;
  R* grad;
  double* parts;
};

// `loss(x, y, z)` of a token gives its gradient in x and adds to `sums`.
template <int kSums, class R, class Loss>
__device__ __forceinline__ void sum_block(const Tokens<R>& tokens, const Loss& loss) {
  const double denominator = tokens.denominator();
  double sums[kSums]{};
  for_tokens_of_block(tokens.count, [&](int64_t i) {
    const bool counts = !tokens.mask || tokens.mask[i];
    const R grad = counts ? loss(tokens.in[0][i], tokens.in[1][i], tokens.in[2][i], sums) : R(0);
    tokens.grad[i] = R(grad / denominator);
  });
  auto* scratch = reinterpret_cast<double*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const double sum = cta_sum(sums[i], scratch + i * kTokenThreads / kWarp);
    if (threadIdx.x == 0) tokens.parts[i * gridDim.x + blockIdx.x] = sum;
  }
}

template <class R>
__global__ void __launch_bounds__(kTokenThreads)
    policy_loss(Tokens<R> tokens, R low, R high, R dual_clip) {
  sum_block<3>(tokens, [&](R logprob, R old_logprob, R advantage, double (&sums)[3]) {
    const auto term = policy_term(logprob - old_logprob, advantage, low, high, dual_clip);
    sums[0] += term.loss;
    sums[1] += term.approx_kl;
    sums[2] += term.clipped;
    return term.grad;
  });
}

template <class R>
__global__ void __launch_bounds__(kTokenThreads) critic_loss(Tokens<R> tokens, R clip) {
  sum_block<2>(tokens, [&](R value, R old_value, R target, double (&sums)[2]) {
    const auto term = value_term(value, old_value, target, clip);
    sums[0] += term.loss;
    sums[1] += term.clipped;
    return term.grad;
  });
}

// The means of so many sums, and the gradient, of `kernel` with the numbers of the call.
template <int kSums, class R, class... Numbers>
auto loss_of(void (*kernel)(Tokens<R>, Numbers...), const Tensor& x, const Tensor& y,
             const Tensor& z, const OptionalTensor& mask, const OptionalTensor& denominator,
             const Numbers&... numbers) {
  const Device device(x);
  const Tensor in[] = {as<R>(x), as<R>(y), as<R>(z)};
  const OptionalTensor counts = packed(mask), total = counted(mask, denominator);
  const int64_t count = x.numel(), blocks = token_blocks(count);
  const Tensor grad = empty<R>(x, shape(x)), parts = empty<double>(x, {kSums, blocks});
  const Tokens<R> tokens{{data<R>(in[0]), data<R>(in[1]), data<R>(in[2])},
                         data_or_null<bool>(counts),
                         count,
                         {data_or_null<double>(total), count},
                         data<R>(grad),
                         data<double>(parts)};
  device.launch(kernel, Grid{blocks, kTokenThreads, kSums * kSumScratch}, tokens, numbers...);
  return std::tuple_cat(means<kSums, R, double>(device, parts, tokens.denominator),
                        std::tuple(grad));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clipped_policy_loss(Tensor logprobs, Tensor old_logprobs,
                                                               Tensor advantages,
                                                               OptionalTensor mask,
                                                               OptionalTensor denominator,
                                                               Tensor scalars) {
  const double* s = data<double>(scalars);
  return dispatch(logprobs.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    return loss_of<3>(policy_loss<R>, logprobs, old_logprobs, advantages, mask, denominator,
                      R(1 - s[0]), R(1 + s[1]), R(s[2]));
  });
}

std::tuple<Tensor, Tensor, Tensor> value_loss(Tensor values, Tensor old_values, Tensor returns,
                                              OptionalTensor mask, OptionalTensor denominator,
                                              Tensor scalars) {
  const double clip = *data<double>(scalars);
  return dispatch(values.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    return loss_of<2>(critic_loss<R>, values, old_values, returns, mask, denominator, R(clip));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("clipped_policy_loss", PPO_CHECKED(kClippedPolicyLoss, &clipped_policy_loss));
  m.impl("value_loss", PPO_CHECKED(kValueLoss, &value_loss));
}

}  // namespace ppo::cuda
