// masked_mean and masked_whiten; formulas in ppo_kernels/masked.py.
#include "common.h"

namespace ppo::cpu {
namespace {

std::tuple<Tensor, Tensor> masked_mean(Tensor x, OptionalTensor mask, OptionalTensor denominator) {
  return dispatch(x.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor input = as<R>(x);
    const R* values = data<R>(input);
    const auto rows = counted_rows(mask, x.numel());
    const double count = denominator_of(denominator, rows.size());
    double sum = 0;
    for (const int64_t i : rows) sum += values[i];
    return std::tuple(scalar(R(sum / count)), scalar(R(1 / count)));
  });
}

Tensor masked_whiten(Tensor x, OptionalTensor mask, Tensor scalars) {
  const double eps = data<double>(scalars)[0];
  return dispatch(x.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor input = as<R>(x), result = zeros<R>(shape(x));
    const R* values = data<R>(input);
    R* whitened = data<R>(result);
    const auto rows = counted_rows(mask, x.numel());
    const double count = denominator_of(std::nullopt, rows.size());
    // From one of the values on: what is equal has then no variance at all.
    const double first = rows.empty() ? 0 : values[rows[0]];
    double sum = 0, squares = 0;
    for (const int64_t i : rows) sum += values[i] - first;
    const double mean = first + sum / count;
    for (const int64_t i : rows) {
      squares += (values[i] - mean) * (values[i] - mean);
    }
    const double scale = whitening_scale(squares / count, eps);
    for (const int64_t i : rows) whitened[i] = R((values[i] - mean) * scale);
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("masked_mean", PPO_CHECKED(kMaskedMean, &masked_mean));
  m.impl("masked_whiten", PPO_CHECKED(kMaskedWhiten, &masked_whiten));
}

}  // namespace ppo::cpu
