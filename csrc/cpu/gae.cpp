// gae, gae_packed and discounted_sums; formulas in ppo_kernels/gae.py.
#include "common.h"

namespace ppo::cpu {
namespace {

// f(row) on the inputs, where row(i, begin, length) scans row i; returns (advantages, returns).
template <class R, class F>
std::tuple<Tensor, Tensor> scan(const Tensor& rewards, const Tensor& values,
                                const OptionalTensor& mask, double gamma, double lam,
                                const OptionalTensor& dones, const OptionalTensor& bootstrap_values,
                                const F& f) {
  const Tensor r = as<R>(rewards), v = as<R>(values);
  const OptionalTensor m = packed(mask), d = packed(dones), bootstrap = as<R>(bootstrap_values);
  const Tensor advantages = empty<R>(shape(r)), returns = empty<R>(shape(r));
  const GAEScan<R> scan{data<R>(r), data<R>(v),     data_or_null<bool>(m), data_or_null<bool>(d),
                        R(gamma),   R(gamma * lam), data<R>(advantages),   data<R>(returns)};
  f([&](int64_t i, int64_t begin, int64_t length) {
    const R G = bootstrap ? scan.gamma * data<R>(*bootstrap)[i] : R(0);
    sweeps<R>().gae(scan, begin, length, G);
  });
  return {advantages, returns};
}

template <class F>
std::tuple<Tensor, Tensor> scan_in_result_type(const Tensor& rewards, const Tensor& values,
                                               const OptionalTensor& mask,
                                               const OptionalTensor& dones,
                                               const OptionalTensor& bootstrap_values,
                                               const Tensor& scalars, const F& f) {
  const double gamma = data<double>(scalars)[0], lam = data<double>(scalars)[1];
  const bool wide =
      rewards.scalar_type() == ScalarType::Double || values.scalar_type() == ScalarType::Double;
  return wide ? scan<double>(rewards, values, mask, gamma, lam, dones, bootstrap_values, f)
              : scan<float>(rewards, values, mask, gamma, lam, dones, bootstrap_values, f);
}

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, OptionalTensor mask,
                               OptionalTensor dones, OptionalTensor bootstrap_values,
                               Tensor scalars) {
  const int64_t batch = rewards.size(0), length = rewards.size(1);
  return scan_in_result_type(
      rewards, values, mask, dones, bootstrap_values, scalars, [&](const auto& row) {
        parallel(batch, length, [&](int64_t i) { row(i, i * length, length); });
      });
}

// Raises unless they rise from 0 to `total`.
void check_boundaries(const Ids& bounds, int64_t total) {
  const int64_t batch = bounds.size() - 1;
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
}

// row(i, begin, length) of each trajectory.
template <class Row>
void for_trajectories(const Ids& bounds, int64_t total, const Row& row) {
  const int64_t batch = bounds.size() - 1;
  parallel(batch, total / std::max<int64_t>(1, batch),
           [&](int64_t i) { row(i, bounds[i], bounds[i + 1] - bounds[i]); });
}

std::tuple<Tensor, Tensor> gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens,
                                      OptionalTensor mask, OptionalTensor dones,
                                      OptionalTensor bootstrap_values, Tensor scalars) {
  const Ids bounds(cu_seqlens);
  const int64_t total = rewards.numel();
  check_boundaries(bounds, total);
  return scan_in_result_type(rewards, values, mask, dones, bootstrap_values, scalars,
                             [&](const auto& row) { for_trajectories(bounds, total, row); });
}

template <class R>
Tensor sums(const Tensor& x, const Tensor& decays, const OptionalTensor& mask,
            const OptionalTensor& dones, const OptionalTensor& cu_seqlens) {
  const Tensor in = as<R>(x), factors = as<R>(decays), result = empty<R>(shape(x));
  const OptionalTensor m = packed(mask), d = packed(dones);
  const GAEScan<R> scan{
      data<R>(in),     data<R>(factors), data_or_null<bool>(m), data_or_null<bool>(d), R(0), R(0),
      data<R>(result), nullptr};
  const auto row = [&](int64_t, int64_t begin, int64_t length) {
    sweeps<R>().discounted_sums(scan, begin, length);
  };
  if (cu_seqlens) {
    const Ids bounds(*cu_seqlens);
    check_boundaries(bounds, x.numel());
    for_trajectories(bounds, x.numel(), row);
  } else {
    const int64_t length = x.size(1);
    parallel(x.size(0), length, [&](int64_t i) { row(i, i * length, length); });
  }
  return result;
}

Tensor discounted_sums(Tensor x, Tensor decays, OptionalTensor mask, OptionalTensor dones,
                       OptionalTensor cu_seqlens) {
  return x.scalar_type() == ScalarType::Double || decays.scalar_type() == ScalarType::Double
             ? sums<double>(x, decays, mask, dones, cu_seqlens)
             : sums<float>(x, decays, mask, dones, cu_seqlens);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("gae", PPO_CHECKED(kGAE, &gae));
  m.impl("gae_packed", PPO_CHECKED(kGAEPacked, &gae_packed));
  m.impl("discounted_sums", PPO_CHECKED(kDiscountedSums, &discounted_sums));
}

}  // namespace ppo::cpu
