// What the losses of logits and of log-probs share: what a token adds to them.
#pragma once

#include <array>

#include "common.h"

namespace ppo::cpu {

// Per-token inputs, contiguous, in R; `ref_logprobs` and `mask` may be null.
template <class R>
struct TokenInputs {
  std::array<OptionalTensor, 4> held;  // what the pointers point into
  const R *old_logprobs, *advantages, *ref_logprobs;
  const bool* mask;
  std::vector<int64_t> rows;  // those that count

  TokenInputs(const Tensor& old_logprobs, const Tensor& advantages,
              const OptionalTensor& ref_logprobs, const OptionalTensor& mask)
      : held{as<R>(old_logprobs), as<R>(advantages), as<R>(ref_logprobs), packed(mask)},
        old_logprobs(data_or_null<R>(held[0])),
        advantages(data_or_null<R>(held[1])),
        ref_logprobs(data_or_null<R>(held[2])),
        mask(data_or_null<bool>(held[3])),
        rows(counted_rows(held[3], advantages.numel())) {}

  void check(const std::vector<int64_t>& shape) const {
    check_finite("old_logprobs", old_logprobs, rows, shape);
    check_finite("advantages", advantages, rows, shape);
    check_finite("ref_logprobs", ref_logprobs, rows, shape);
  }
};

template <class R>
TokenTerms<R> terms_of(const Objective<R>& objective, const TokenInputs<R>& in, int64_t row,
                       R logprob) {
  return token_terms(objective, logprob, in.old_logprobs[row], in.advantages[row],
                     in.ref_logprobs != nullptr, in.ref_logprobs ? in.ref_logprobs[row] : R(0));
}

}  // namespace ppo::cpu
