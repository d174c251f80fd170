// sample_tokens; formulas in ppo_kernels/sampling.py.
#include "../sampling.h"

#include "common.h"

namespace ppo::cpu {
namespace {

// The block that the number `target` falls into as the sums of weights rise, of those with weight;
// `before` is the sum of those before it.
template <class Weight>
int64_t block_at(double target, int64_t blocks, const Weight& weight_of, double& before) {
  double sum = 0;
  int64_t found = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const double weight = weight_of(b);
    if (!(weight > 0)) continue;
    found = b;
    before = sum;
    sum += weight;
    if (sum > target) break;
  }
  return found;
}

// The element of a block at which the sum of weights passes this fraction of all of them.
template <class R>
int64_t element_at(double fraction, const R* weights, int64_t n) {
  double all = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) all += weights[i];
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(weights[i] > 0)) continue;
    found = i;
    sum += weights[i];
    if (sum > fraction * all) break;
  }
  return found;
}

template <class R>
R logprob_of(R score, R largest, double k, double total) {
  const double log2 = k * (double(score) - double(largest)) - std::log2(total);
  return R(kLn2 * std::min(log2, 0.0));
}

// One row in blocks.
template <class T>
class Row {
 public:
  using R = Real<T>;
  struct Drawn {
    int64_t token;
    R logprob;
  };

  Row(const T* z, int64_t length, const BlockWeight<R>* blocks, R largest, double temperature)
      : z_(z), length_(length), blocks_(blocks), largest_(largest), temperature_(temperature) {}

  Drawn first_of_largest() const {
    int64_t b = 0;
    while (blocks_[b].largest != largest_) ++b;
    int64_t token = b * kDrawBlock;
    while (R(z_[token]) != largest_) ++token;
    return {token, R(0)};
  }

  Drawn draw(double u) const {
    const auto scale = Scale<R>::of(temperature_, false);
    const double k = std::min(kLog2E / double(R(temperature_)), DBL_MAX);
    const auto factor_of = [&](int64_t b) {
      return std::exp2(k * (double(blocks_[b].centre) - double(largest_)));
    };
    const auto weight_of = [&](int64_t b) { return weighed(blocks_[b].sum, factor_of(b)); };
    double total = 0, before = 0;
    for (int64_t b = 0; b < count(); ++b) total += weight_of(b);
    const int64_t b = block_at(u * total, count(), weight_of, before);
    const Scale<R> undivided{R(1), scale.k, false, true};
    const T* z = z_ + b * kDrawBlock;
    R scores[kDrawBlock], weights[kDrawBlock];
    sweeps<T>().scores_and_weights(z, size(b), undivided, blocks_[b].centre, scores, weights);
    const double fraction = (u * total - before) / weight_of(b);
    const int64_t i = element_at(fraction, weights, size(b));
    return {b * kDrawBlock + i, logprob_of(scores[i], largest_, k, total)};
  }

  Drawn draw(double u, const Filters& filters) const {
    const auto scale = Scale<R>::of(temperature_, true);
    const R largest = largest_ / scale.temperature;
    double below = 0, total = 0;
    R cut = -R(INFINITY);
    if (filters.top_k < double(length_)) {
      const auto allowed = [&](double number, double all) { return number <= all - filters.top_k; };
      cut = search<kPivots>(cut, largest, sweep(sweeps<T>().counts_below, scale, largest, cut),
                            allowed, below, total);
    }
    if (filters.top_p < 1) {
      const auto allowed = [&](double weight, double all) {
        return removed_by_top_p<R>(weight / all, filters.top_p);
      };
      cut = search<kPivots>(cut, largest, sweep(sweeps<T>().weights_below, scale, largest, cut),
                            allowed, below, total);
    }
    Kept<R> kept{cut, R(std::log2(filters.min_p)), R(0), 0};
    std::vector<KeptWeight> blocks(count());
    int64_t ties = 0;
    for (int64_t b = 0; b < count(); ++b) {
      blocks[b] = sweeps<T>().kept_weight(z_ + b * kDrawBlock, size(b), scale, largest, kept);
      ties += blocks[b].ties;
    }
    const R exponent = exponent_of(cut, largest, scale.k);
    const double tie_weight = std::exp2(double(exponent));
    if (filters.top_p < 1) {
      kept.skipped = ties_removed<R>(below, tie_weight, ties, total, filters.top_p);
    }
    kept.tie_weight = exponent >= kept.least ? R(tie_weight) : R(0);
    return draw(u, scale, largest, kept, blocks);
  }

 private:
  int64_t count() const { return (length_ + kDrawBlock - 1) / kDrawBlock; }
  int64_t size(int64_t b) const { return std::min(kDrawBlock, length_ - b * kDrawBlock); }

  // For `search`.
  template <class Below>
  auto sweep(const Below& below, const Scale<R>& scale, R largest, R low) const {
    return [&below, &scale, largest, low, this](const R* pivots, double* sums) {
      std::fill_n(sums, kPivots + 1, 0.0);
      for (int64_t b = 0; b < count(); ++b) {
        below(z_ + b * kDrawBlock, size(b), scale, largest, low, pivots, sums);
      }
    };
  }

  Drawn draw(double u, const Scale<R>& scale, R largest, const Kept<R>& kept,
             const std::vector<KeptWeight>& blocks) const {
    // Of the ids at the cut, how many come before each block.
    std::vector<int64_t> ties_before(count() + 1, 0);
    for (int64_t b = 0; b < count(); ++b) ties_before[b + 1] = ties_before[b] + blocks[b].ties;
    const auto kept_ties_before = [&](int64_t b) {
      return std::max<int64_t>(0, ties_before[b] - kept.skipped);
    };
    const auto weight_of = [&](int64_t b) {
      const int64_t ties = kept_ties_before(b + 1) - kept_ties_before(b);
      return blocks[b].above + double(kept.tie_weight) * double(ties);
    };
    double total = 0, before = 0;
    for (int64_t b = 0; b < count(); ++b) total += weight_of(b);
    const int64_t b = block_at(u * total, count(), weight_of, before);
    R scores[kDrawBlock], weights[kDrawBlock];
    sweeps<T>().scores_and_weights(z_ + b * kDrawBlock, size(b), scale, largest, scores, weights);
    int64_t tie = ties_before[b];
    for (int64_t j = 0; j < size(b); ++j) {
      if (scores[j] == kept.cut) {
        weights[j] = tie++ < kept.skipped ? R(0) : kept.tie_weight;
      } else if (!(scores[j] > kept.cut) ||
                 !(exponent_of(scores[j], largest, scale.k) >= kept.least)) {
        weights[j] = R(0);
      }
    }
    const double fraction = (u * total - before) / weight_of(b);
    const int64_t i = element_at(fraction, weights, size(b));
    return {b * kDrawBlock + i, logprob_of(scores[i], largest, kLog2E, total)};
  }

  const T* z_;
  int64_t length_;
  const BlockWeight<R>* blocks_;
  R largest_;
  double temperature_;
};

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& uniforms,
                                   const OptionalTensor& mask, const OptionalTensor& temperatures,
                                   const Tensor& scalars) {
  using R = Real<T>;
  const Rows<T> z(logits);
  const auto rows = counted_rows(packed(mask), z.count);
  const auto out_shape = shape(uniforms);
  const Tensor numbers = as<double>(uniforms);
  const auto own = as<double>(temperatures);
  const double* given = data<double>(scalars);
  const Filters filters{given[1], given[2], given[3]};
  const auto temperature_of = [&](int64_t row) { return own ? data<double>(*own)[row] : given[0]; };
  for (const int64_t row : rows) {
    const double u = data<double>(numbers)[row], temperature = temperature_of(row);
    if (!Scale<R>::of(temperature, false).valid) {
      value_error("temperature must be finite and >= 0, got ", temperature, " at ",
                  position(out_shape, row));
    }
    if (!(u >= 0 && u < 1)) {
      value_error("uniforms must be in [0, 1), got ", u, " at ", position(out_shape, row));
    }
  }
  const Tensor logprobs = zeros<R>(out_shape);
  const Tensor tokens = torch::stable::empty(out_shape, ScalarType::Long);
  std::fill_n(data<int64_t>(tokens), tokens.numel(), int64_t(0));

  const int64_t per_row = (z.length + kDrawBlock - 1) / kDrawBlock, n = rows.size();
  std::vector<BlockWeight<R>> blocks(n * per_row);
  constexpr int64_t kBlocksEach = kChunk / kDrawBlock;
  const int64_t chunks = (per_row + kBlocksEach - 1) / kBlocksEach;
  parallel(n * chunks, std::min(z.length, kChunk), [&](int64_t i) {
    const int64_t row = i / chunks, first = i % chunks * kBlocksEach;
    const T* logits = z[rows[row]];
    const R k = Scale<R>::of(temperature_of(rows[row]), false).k;
    R seen = -R(INFINITY);
    for (int64_t b = first; b < std::min(first + kBlocksEach, per_row); ++b) {
      const int64_t begin = b * kDrawBlock, size = std::min(kDrawBlock, z.length - begin);
      auto& block = blocks[row * per_row + b];
      block = sweeps<T>().block_weight(logits + begin, size, k, seen);
      seen = std::max(seen, block.largest);
    }
  });
  std::vector<R> largest(n, -R(INFINITY));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t b = 0; b < per_row; ++b) {
      largest[i] = common_shift(largest[i], blocks[i * per_row + b].largest);
    }
    const auto scale = Scale<R>::of(temperature_of(rows[i]), false);
    if (!can_be_drawn(largest[i], scale)) {
      value_error(
          "logits / temperature must have a finite maximum and no NaN where a token is drawn, got ",
          largest[i] / scale.temperature, " at ", position(out_shape, rows[i]));
    }
  }
  const bool filtered = !filters.keep_all(z.length);
  parallel(n, filtered ? z.length : kDrawBlock, [&](int64_t i) {
    const int64_t at = rows[i];
    const double u = data<double>(numbers)[at], temperature = temperature_of(at);
    const Row<T> row(z[at], z.length, &blocks[i * per_row], largest[i], temperature);
    const auto drawn = R(temperature) == R(0) ? row.first_of_largest()
                       : filtered             ? row.draw(u, filters)
                                              : row.draw(u);
    data<int64_t>(tokens)[at] = drawn.token;
    data<R>(logprobs)[at] = drawn.logprob;
  });
  return {tokens, logprobs};
}

std::tuple<Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, OptionalTensor mask,
                                         OptionalTensor temperatures, Tensor scalars) {
  return dispatch(logits.scalar_type(), [&](auto t) {
    return forward<decltype(t)>(logits, uniforms, mask, temperatures, scalars);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CPU, m) {
  m.impl("sample_tokens", PPO_CHECKED(kSampleTokens, &sample_tokens));
}

}  // namespace ppo::cpu
