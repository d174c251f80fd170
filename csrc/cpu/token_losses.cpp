// clipped_policy_loss and value_loss, from a few numbers per token; formulas in
// ppo_kernels/token_losses.py.
#include "ppo_loss.h"

namespace ppo::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> clipped_policy_loss(Tensor logprobs, Tensor old_logprobs,
                                                               Tensor advantages,
                                                               OptionalTensor mask,
                                                               OptionalTensor denominator,
                                                               Tensor scalars) {
  return dispatch(logprobs.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const TokenInputs<R> in(old_logprobs, advantages, std::nullopt, mask);
    const Tensor input = as<R>(logprobs), result = zeros<R>(shape(logprobs));
    const R* x = data<R>(input);
    check_finite("logprobs", x, in.rows, shape(logprobs));
    in.check(shape(logprobs));
    R* grad = data<R>(result);
    const double* s = data<double>(scalars);
    const Objective<R> objective{R(1 - s[0]), R(1 + s[1]), R(s[2]), R(0), R(0), KLEstimator::k1};
    const double count = denominator_of(denominator, in.rows.size());
    double loss = 0, approx_kl = 0, clipped = 0;
    for (const int64_t row : in.rows) {
      const auto policy = terms_of(objective, in, row, x[row]).policy;
      loss += policy.loss;
      approx_kl += policy.approx_kl;
      clipped += policy.clipped;
      grad[row] = policy.grad / count;
    }
    return std::tuple(scalar(R(loss / count)), scalar(R(approx_kl / count)),
                      scalar(R(clipped / count)), result);
  });
}

std::tuple<Tensor, Tensor, Tensor> value_loss(Tensor values, Tensor old_values, Tensor returns,
                                              OptionalTensor mask, OptionalTensor denominator,
                                              Tensor scalars) {
  return dispatch(values.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor inputs[] = {as<R>(values), as<R>(old_values), as<R>(returns)};
    const R *x = data<R>(inputs[0]), *old = data<R>(inputs[1]), *target = data<R>(inputs[2]);
    const Tensor result = zeros<R>(shape(values));
    R* grad = data<R>(result);
    const R clip = R(*data<double>(scalars));
    const auto rows = counted_rows(mask, values.numel());
    const double count = denominator_of(denominator, rows.size());
    double loss = 0, clipped = 0;
    for (const int64_t row : rows) {
      const auto term = value_term(x[row], old[row], target[row], clip);
      loss += term.loss;
      clipped += term.clipped;
      grad[row] = term.grad / count;
    }
    return std::tuple(scalar(R(loss / count)), scalar(R(clipped / count)), result);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("clipped_policy_loss", PPO_CHECKED(kClippedPolicyLoss, &clipped_policy_loss));
  m.impl("value_loss", PPO_CHECKED(kValueLoss, &value_loss));
}

}  // namespace ppo::cpu
