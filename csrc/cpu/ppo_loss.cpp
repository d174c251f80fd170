// ppo_loss, ppo_loss_and_gradient and ppo_loss_; formulas in ppo_kernels/ppo_loss.py.
#include "ppo_loss.h"

#include "logprobs.h"

namespace ppo::cpu {
namespace {

using Scalars = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Sums in row order and in fp64, so that they do not depend on the threads.
template <class R>
Scalars summarise(const Objective<R>& objective, const TokenInputs<R>& in, double denominator,
                  const R* logprobs, const R* entropies) {
  double policy = 0, entropy = 0, kl = 0, approx_kl = 0, clipped = 0;
  for (const int64_t row : in.rows) {
    const auto terms = terms_of(objective, in, row, logprobs[row]);
    policy += terms.policy.loss;
    approx_kl += terms.policy.approx_kl;
    clipped += terms.policy.clipped;
    entropy += entropies[row];
    kl += terms.kl.value;
  }
  const double loss = policy - objective.entropy_coef * entropy + objective.kl_coef * kl;
  const auto mean = [&](double sum) { return scalar(R(sum / denominator)); };
  return {mean(loss), mean(policy), mean(entropy), mean(kl), mean(approx_kl), mean(clipped)};
}

// The loss over rows of logits. `finish(row, scored, g, h)` is called with each counted row's
// log-prob, entropy and stats, and ∂loss/∂logprob, ∂loss/∂H; `write(row, begin, n)` after it.
template <class T>
struct Loss {
  using R = Real<T>;
  Rows<T> z;
  Ids ids;
  std::vector<int64_t> out_shape;
  TokenInputs<R> in;
  Objective<R> objective;
  OptionalTensor own;  // what `temperatures` points into
  Temperatures<R> temperatures;
  double denominator;
  Tensor logprobs, entropy;
  R *logprob_of, *entropy_of;  // their elements

  Loss(const Tensor& logits, const Tensor& tokens, TokenInputs<R> inputs, Objective<R> objective,
       const OptionalTensor& denominator, const OptionalTensor& temperatures, const Tensor& scalars)
      : z(logits),
        ids(tokens),
        out_shape(shape(tokens)),
        in(std::move(inputs)),
        objective(objective),
        own(as<double>(temperatures)),
        temperatures(temperatures_of<R>(own, scalars)),
        denominator(denominator_of(denominator, in.rows.size())),
        logprobs(zeros<R>(out_shape)),
        entropy(zeros<R>(out_shape)),
        logprob_of(data<R>(logprobs)),
        entropy_of(data<R>(entropy)) {
    check_ids(ids, in.rows, z.length, out_shape);
    check_temperatures(own, in.rows, out_shape);
    in.check(out_shape);
  }

  template <class Finish, class Write>
  Scalars run(const Finish& finish, const Write& write) {
    sweep_rows<SoftmaxState<R>>(
        in.rows, z.length, temperatures,
        [&](int64_t row, int64_t begin, int64_t n) {
          return sweeps<T>().softmax_sums(z[row] + begin, n, temperatures[row].k);
        },
        [&](int64_t row, const SoftmaxState<R>& state) {
          const Scored<R> scored = score(state, R(z[row][ids[row]]), temperatures[row].k);
          logprob_of[row] = scored.logprob;
          entropy_of[row] = scored.entropy;
          const auto terms = terms_of(objective, in, row, scored.logprob);
          finish(row, scored, R(terms.grad(objective) / denominator),
                 R(-objective.entropy_coef / denominator));
        },
        write);
    for (const int64_t row : in.rows) {
      const R logprob = logprob_of[row];
      if (!std::isfinite(logprob)) {
        value_error("tokens must have finite log-probability, got ",
                    std::isnan(logprob) ? "nan" : "-inf", " for token ", ids[row], " at ",
                    position(out_shape, row), ": mask it out or mend its logits");
      }
    }
    return summarise(objective, in, denominator, logprob_of, entropy_of);
  }
};

using Result = decltype(std::tuple_cat(Scalars{}, std::tuple<Tensor, Tensor>{}));
using GradientResult = decltype(std::tuple_cat(Result{}, std::tuple<Tensor>{}));
using SavedResult = decltype(std::tuple_cat(Result{}, std::tuple<Tensor, Tensor, Tensor>{}));

// Raises where fp16 has digits for no element of a gradient, given as a bound on each row's.
template <class R>
void check_holds(const std::vector<R>& bounds) {
  const R least = R(1) / 16384, largest = *std::max_element(bounds.begin(), bounds.end());
  if (largest > 0 && largest < least) {
    value_error("logits must be wider than float16 to hold a gradient of at most ", largest,
                ", below its normal numbers: under autograd a loss scale makes it larger");
  }
}

// The gradient is written while a row of logits is in cache; `out` may be where they stand.
template <class T>
Result with_gradient(Loss<T>& loss, const Rows<T>& out) {
  using R = Real<T>;
  const auto& z = loss.z;
  std::vector<RowGradient<R>> gradients(z.count);
  std::vector<R> bounds(z.count + 1);
  const Scalars scalars = loss.run(
      [&](int64_t row, const Scored<R>& scored, R g, R h) {
        gradients[row] = row_gradient(g, h, scored.entropy, scored.stats, loss.temperatures[row],
                                      R(z[row][loss.ids[row]]));
        bounds[row] = std::max(std::fabs(g), std::fabs(h)) / loss.temperatures[row].value;
      },
      [&](int64_t row, int64_t begin, int64_t n) {
        write_gradient(gradients[row], z[row], out[row], begin, n, loss.ids[row],
                       loss.temperatures[row].k);
      });
  if (std::is_same_v<T, Half>) check_holds(bounds);
  if (loss.in.mask) {
    parallel(z.count, z.length, [&](int64_t row) {
      if (!loss.in.mask[row]) std::fill_n(out[row], z.length, T(0));
    });
  }
  return std::tuple_cat(scalars, std::tuple(loss.logprobs, loss.entropy));
}

// What the backward needs is kept: `softmax_stats`, ∂loss/∂logprob and ∂loss/∂H of each row.
template <class T>
SavedResult saved(Loss<T>& loss) {
  using R = Real<T>;
  auto stats_shape = loss.out_shape;
  stats_shape.push_back(2);
  const Tensor stats = zeros<R>(stats_shape);
  const Tensor g = zeros<R>(loss.out_shape), h = zeros<R>(loss.out_shape);
  auto* stats_of = data<RowStats<R>>(stats);
  R *g_of = data<R>(g), *h_of = data<R>(h);
  const Scalars scalars = loss.run(
      [&](int64_t row, const Scored<R>& scored, R grad_logprob, R grad_entropy) {
        stats_of[row] = scored.stats;
        g_of[row] = grad_logprob;
        h_of[row] = grad_entropy;
      },
      no_write);
  return std::tuple_cat(scalars, std::tuple(loss.logprobs, loss.entropy, stats, g, h));
}

// f(loss), as of the logits' type.
template <class F>
auto of_loss(const F& f, const Tensor& logits, const Tensor& tokens, const Tensor& old_logprobs,
             const Tensor& advantages, const OptionalTensor& mask,
             const OptionalTensor& ref_logprobs, const OptionalTensor& denominator,
             const OptionalTensor& temperatures, const Tensor& scalars, int64_t kl_estimator) {
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    const double* s = data<double>(scalars);
    Loss<T> loss(logits, tokens, TokenInputs<R>(old_logprobs, advantages, ref_logprobs, mask),
                 Objective<R>{R(1 - s[1]), R(1 + s[2]), R(s[3]), R(s[4]), R(s[5]),
                              KLEstimator(kl_estimator)},
                 denominator, temperatures, scalars);
    return f(loss);
  });
}

SavedResult ppo_loss(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                     OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                     OptionalTensor temperatures, Tensor scalars, int64_t kl_estimator) {
  return of_loss([](auto& loss) { return saved(loss); }, logits, tokens, old_logprobs, advantages,
                 mask, ref_logprobs, denominator, temperatures, scalars, kl_estimator);
}

GradientResult ppo_loss_and_gradient(Tensor logits, Tensor tokens, Tensor old_logprobs,
                                     Tensor advantages, OptionalTensor mask,
                                     OptionalTensor ref_logprobs, OptionalTensor denominator,
                                     OptionalTensor temperatures, Tensor scalars,
                                     int64_t kl_estimator) {
  const auto run = [&](auto& loss) {
    const Tensor grad = empty_logits(logits);
    return std::tuple_cat(with_gradient(loss, decltype(loss.z)(grad)), std::tuple(grad));
  };
  return of_loss(run, logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator,
                 temperatures, scalars, kl_estimator);
}

Result ppo_loss_(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                 OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                 OptionalTensor temperatures, Tensor scalars, int64_t kl_estimator) {
  check_unit_stride("logits", logits);
  return of_loss([](auto& loss) { return with_gradient(loss, loss.z); }, logits, tokens,
                 old_logprobs, advantages, mask, ref_logprobs, denominator, temperatures, scalars,
                 kl_estimator);
}

// grad *= scale, untouched where scale is 1; a zero of either makes a zero, whatever the other is.
void rescale_(Tensor grad, Tensor scale) {
  check_unit_stride("grad", grad);
  const double factor = *data<double>(as<double>(scale));
  if (factor == 1.0) return;
  dispatch(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Rows<T> rows(grad);
    write_rows(rows.count, rows.length, [&](int64_t row, int64_t begin, int64_t n) {
      T* x = rows[row] + begin;
      if (factor == 0.0) std::fill_n(x, n, T(0));
      for (int64_t i = 0; i < n; ++i) {
        const Real<T> value = x[i];
        if (value != Real<T>(0)) x[i] = T(value * Real<T>(factor));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("ppo_loss", PPO_CHECKED(kPPOLoss, &ppo_loss));
  m.impl("ppo_loss_and_gradient", PPO_CHECKED(kPPOLoss, &ppo_loss_and_gradient));
  m.impl("ppo_loss_", PPO_CHECKED(kPPOLoss, &ppo_loss_));
  m.impl("rescale_", PPO_CHECKED(kRescale, &rescale_));
}

}  // namespace ppo::cpu
