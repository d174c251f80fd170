// gae and gae_packed; formulas in ppo_kernels/gae.py.
#include "common.h"

namespace ppo::cpu {
namespace {

template <class T, class R>
struct Scan {
  const T *rewards, *values;
  const bool *mask, *dones;  // may be null
  R gamma, gamma_lam;
  R *advantages, *returns;

  template <bool kMask, bool kDones>
  GAECarry<R> step(int64_t i, GAECarry<R> next) const {
    if (kMask && !mask[i]) {
      advantages[i] = returns[i] = R(0);
      return next;
    }
    const R value = R(values[i]);
    const GAECarry<R> carry =
        gae_step(R(rewards[i]), value, kDones && dones[i], gamma, gamma_lam, next);
    advantages[i] = carry.advantage;
    returns[i] = carry.advantage + value;
    return carry;
  }

  // A step waits for the one after it; rows of equal length are walked together, so that one's
  // wait is another's work.
  template <int kRows, bool kMask, bool kDones>
  void rows(int64_t begin, int64_t length, const R* bootstrap) const {
    GAECarry<R> carry[kRows];
    for (int r = 0; r < kRows; ++r) carry[r] = {bootstrap ? bootstrap[r] : R(0), R(0)};
    for (int64_t t = length; t-- > 0;) {
      for (int r = 0; r < kRows; ++r) {
        carry[r] = step<kMask, kDones>(begin + r * length + t, carry[r]);
      }
    }
  }

  template <int kRows>
  void rows(int64_t begin, int64_t length, const R* bootstrap) const {
    if (mask) {
      dones ? rows<kRows, true, true>(begin, length, bootstrap)
            : rows<kRows, true, false>(begin, length, bootstrap);
    } else {
      dones ? rows<kRows, false, true>(begin, length, bootstrap)
            : rows<kRows, false, false>(begin, length, bootstrap);
    }
  }
};

constexpr int kTogether = 8;

// Calls f(scan, bootstrap) with the inputs as contiguous arrays; returns (advantages, returns).
template <class F>
std::tuple<Tensor, Tensor> with_scan(const Tensor& rewards, const Tensor& values,
                                     const OptionalTensor& mask, double gamma, double lam,
                                     const OptionalTensor& dones,
                                     const OptionalTensor& bootstrap_values, const F& f) {
  const bool mixed = rewards.scalar_type() != values.scalar_type();
  const bool wide = rewards.scalar_type() == ScalarType::Double ||
                    values.scalar_type() == ScalarType::Double;
  const ScalarType common = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor r = packed(mixed ? torch::stable::to(rewards, common) : rewards);
  const Tensor v = packed(mixed ? torch::stable::to(values, common) : values);
  const OptionalTensor m = packed(mask), d = packed(dones);
  return dispatch(r.scalar_type(), [&](auto t) -> std::tuple<Tensor, Tensor> {
    using T = decltype(t);
    using R = Real<T>;
    const OptionalTensor bootstrap = as<R>(bootstrap_values);
    const Tensor advantages = empty<R>(shape(r)), returns = empty<R>(shape(r));
    const Scan<T, R> scan{data<T>(r),
                          data<T>(v),
                          data_or_null<bool>(m),
                          data_or_null<bool>(d),
                          R(gamma),
                          R(gamma * lam),
                          data<R>(advantages),
                          data<R>(returns)};
    f(scan, data_or_null<R>(bootstrap));
    return {advantages, returns};
  });
}

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, OptionalTensor mask, double gamma,
                               double lam, OptionalTensor dones, OptionalTensor bootstrap_values) {
  const int64_t batch = rewards.size(0), length = rewards.size(1);
  return with_scan(
      rewards, values, mask, gamma, lam, dones, bootstrap_values,
      [&](const auto& scan, const auto* bootstrap) {
        const auto at = [&](int64_t row) { return bootstrap ? bootstrap + row : nullptr; };
        const int64_t groups = batch / kTogether;
        parallel(groups, kTogether * length, [&](int64_t group) {
          const int64_t row = group * kTogether;
          scan.template rows<kTogether>(row * length, length, at(row));
        });
        const int64_t done = groups * kTogether;
        parallel(batch - done, length, [&](int64_t i) {
          scan.template rows<1>((done + i) * length, length, at(done + i));
        });
      });
}

std::tuple<Tensor, Tensor> gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens,
                                      OptionalTensor mask, double gamma, double lam,
                                      OptionalTensor dones, OptionalTensor bootstrap_values) {
  const Ids bounds(cu_seqlens);
  const int64_t batch = bounds.size() - 1, total = rewards.numel();
  if (bounds[0] != 0 || bounds[batch] != total) {
    value_error("cu_seqlens must rise from 0 to ", total, ", the length of rewards, got ",
                bounds[0], " and ", bounds[batch], " at its ends");
  }
  for (int64_t i = 0; i < batch; ++i) {
    if (bounds[i + 1] < bounds[i]) {
      value_error("cu_seqlens must not fall, got ", bounds[i], " before ", bounds[i + 1], " at ",
                  i + 1);
    }
  }
  return with_scan(rewards, values, mask, gamma, lam, dones, bootstrap_values,
                   [&](const auto& scan, const auto* bootstrap) {
                     parallel(batch, total / std::max<int64_t>(1, batch), [&](int64_t i) {
                       scan.template rows<1>(bounds[i], bounds[i + 1] - bounds[i],
                                             bootstrap ? bootstrap + i : nullptr);
                     });
                   });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("gae_packed", TORCH_BOX(&gae_packed));
}

}  // namespace ppo::cpu
