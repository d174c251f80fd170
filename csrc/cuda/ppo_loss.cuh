// What the ops of the loss share: what a token adds to the loss, and its gradient.
#pragma once

#include "logprobs.cuh"

namespace ppo::cuda {

// What a kernel is given: `ref_logprobs` and `mask` may be null, and so may be what is kept for the
// backward.
template <class T>
struct Call {
  using R = Real<T>;
  Rows<T> logits;
  int length;
  Division division;
  Temperatures<R> temperatures;
  Ids tokens;
  const R *old_logprobs, *advantages, *ref_logprobs;
  const bool* mask;
  Denominator denominator;
  Objective<R> objective;
  int64_t count;
  R *logprobs, *entropy, *terms;  // `terms` (6, count): what the scalars are means of
  RowStats<R>* stats;
  R *grad_logprobs, *grad_entropy;
};

// ∂loss/∂logprob and ∂loss/∂H of a token.
template <class R>
struct Upstream {
  R logprob, entropy;
};

template <class T>
__device__ void write_results(const Call<T>& call, uint32_t row, const Scored<Real<T>>& scored,
                              const Real<T> (&terms)[6], const Upstream<Real<T>>& upstream) {
  call.logprobs[row] = scored.logprob;
  call.entropy[row] = scored.entropy;
#pragma unroll
  for (int i = 0; i < 6; ++i) call.terms[i * call.count + row] = terms[i];
  if (call.stats) {
    call.stats[row] = scored.stats;
    call.grad_logprobs[row] = upstream.logprob;
    call.grad_entropy[row] = upstream.entropy;
  }
}

// By one thread of a row that does not count.
template <class T>
__device__ void write_no_loss(const Call<T>& call, uint32_t row) {
  write_results(call, row, Scored<Real<T>>{}, {}, Upstream<Real<T>>{});
}

// What the first thread of a CTA reads of a row's token.
template <class R>
struct TokenInput {
  int64_t id;
  R logit, old_logprob, advantage, ref_logprob, denominator;
};

template <class T>
__device__ TokenInput<Real<T>> token_input(const Call<T>& call, uint32_t row, const T* z) {
  using R = Real<T>;
  const int64_t id = call.tokens[row];
  const R ref_logprob = call.ref_logprobs ? call.ref_logprobs[row] : R(0);
  return {id,          logit_of(z, call.length, id), call.old_logprobs[row], call.advantages[row],
          ref_logprob, R(call.denominator())};
}

// By one thread of a row; the results are written by one that `writes`. The loss is NaN where a
// log-probability or the advantage is not finite.
template <class T>
__device__ Upstream<Real<T>> token_loss(const Call<T>& call, uint32_t row,
                                        const TokenInput<Real<T>>& token,
                                        const Scored<Real<T>>& scored, bool writes) {
  using R = Real<T>;
  const Objective<R>& objective = call.objective;
  const auto of = token_terms(objective, scored.logprob, token.old_logprob, token.advantage,
                              call.ref_logprobs != nullptr, token.ref_logprob);
  const Upstream<R> upstream{of.grad(objective) / token.denominator,
                             -objective.entropy_coef / token.denominator};
  if (writes) {
    const R loss =
        of.policy.loss - objective.entropy_coef * scored.entropy + objective.kl_coef * of.kl.value;
    const bool finite = std::isfinite(scored.logprob) && std::isfinite(token.old_logprob) &&
                        std::isfinite(token.advantage) && std::isfinite(token.ref_logprob);
    const R terms[] = {finite ? loss : R(NAN), of.policy.loss,      scored.entropy, of.kl.value,
                       of.policy.approx_kl,    R(of.policy.clipped)};
    write_results(call, row, scored, terms, upstream);
  }
  return upstream;
}

// A call of one of them: its per-token tensors, and what its kernels are given of them.
template <class T>
class Loss {
  using R = Real<T>;

 public:
  Loss(const Tensor& logits, const Tensor& tokens, const Tensor& old_logprobs,
       const Tensor& advantages, const OptionalTensor& mask, const OptionalTensor& ref_logprobs,
       const OptionalTensor& denominator, const OptionalTensor& temperatures, const Tensor& scalars,
       int64_t kl_estimator)
      : held_{packed(tokens),          as<R>(old_logprobs), as<R>(advantages),
              as<R>(ref_logprobs),     packed(mask),        counted(mask, denominator),
              as<double>(temperatures)},
        logprobs_(empty<R>(logits, shape(tokens))),
        entropy_(empty<R>(logits, shape(tokens))),
        terms_(empty<R>(logits, {6, tokens.numel()})),
        call(call_of(scalars, logits.size(-1), kl_estimator)) {}

  // After the kernel: the scalars, and what is there of each token.
  auto results(const Device& device) const {
    return std::tuple_cat(means<6, R, R>(device, terms_, call.denominator),
                          std::tuple(logprobs_, entropy_));
  }

 private:
  Call<T> call_of(const Tensor& scalars, int64_t length, int64_t kl_estimator) const {
    const double* s = data<double>(scalars);
    const int64_t count = logprobs_.numel();
    return {{},
            int(length),
            {},
            temperatures_of<R>(held_[6], scalars),
            Ids(*held_[0]),
            data_or_null<R>(held_[1]),
            data_or_null<R>(held_[2]),
            data_or_null<R>(held_[3]),
            data_or_null<bool>(held_[4]),
            {data_or_null<double>(held_[5]), count},
            {R(1 - s[1]), R(1 + s[2]), R(s[3]), R(s[4]), R(s[5]), KLEstimator(kl_estimator)},
            count,
            data<R>(logprobs_),
            data<R>(entropy_),
            data<R>(terms_),
            nullptr,
            nullptr,
            nullptr};
  }

  const std::array<OptionalTensor, 7> held_;  // what the pointers of `call` point into
  const Tensor logprobs_, entropy_, terms_;

 public:
  Call<T> call;  // its logits and division are yet to be set
};

using LossResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace ppo::cuda
