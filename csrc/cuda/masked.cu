// masked_mean and masked_whiten; formulas in ppo_kernels/masked.py.
#include "means.cuh"

namespace ppo::cuda {
namespace {

// The tokens that count; `mask` may be null.
template <class R>
struct Tokens {
  const R* x;
  const bool* mask;
  int64_t count;

  __device__ bool counts(int64_t i) const { return !mask || mask[i]; }
};

// Parts (2, blocks): the sum of each block, and a 1 whose mean is what a token weighs.
template <class R>
__global__ void __launch_bounds__(kTokenThreads) sum_block(Tokens<R> tokens, double* parts) {
  double sum = 0;
  for_tokens_of_block(tokens.count, [&](int64_t i) {
    if (tokens.counts(i)) sum += double(tokens.x[i]);
  });
  sum = cta_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x > 0) return;
  parts[blockIdx.x] = sum;
  parts[gridDim.x + blockIdx.x] = double(blockIdx.x == 0);
}

std::tuple<Tensor, Tensor> masked_mean(Tensor x, OptionalTensor mask, OptionalTensor denominator) {
  const Device device(x);
  return dispatch(x.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor values = as<R>(x);
    const OptionalTensor counts = packed(mask), total = counted(mask, denominator);
    // One block at least: without tokens too a token weighs something.
    const int64_t count = x.numel(), blocks = std::max<int64_t>(1, token_blocks(count));
    const Tensor parts = empty<double>(x, {2, blocks});
    const Tokens<R> tokens{data<R>(values), data_or_null<bool>(counts), count};
    device.launch(sum_block<R>, Grid{blocks, kTokenThreads, kSumScratch}, tokens,
                  data<double>(parts));
    return means<2, R, double>(device, parts, Denominator{data_or_null<double>(total), count});
  });
}

// Of tokens: how many, their mean, and their squares about it.
struct Moments {
  double count, mean, squares;
};

// By all threads of a CTA: `visit(f)` calls f(x, squares, n) for what each has, n tokens of mean x
// and such squares about it. Sums run from the least x on: what is equal has no variance at all.
template <class Visit>
__device__ Moments cta_moments(const Visit& visit) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  constexpr int kStep = kTokenThreads / kWarp;
  double least = INFINITY, count = 0, sum = 0, squares = 0;
  visit([&](double x, double, double) { least = std::fmin(least, x); });
  least = cta_min(least, scratch);
  visit([&](double x, double, double n) {
    count += n;
    sum += n * (x - least);
  });
  Moments all;
  all.count = cta_sum(count, scratch + kStep);
  const double mean = cta_sum(sum, scratch + 2 * kStep) / (all.count > 1 ? all.count : 1);
  visit([&](double x, double own, double n) {
    const double off = (x - least) - mean;
    squares += own + n * off * off;
  });
  all.mean = least + mean;
  all.squares = cta_sum(squares, scratch + 3 * kStep);
  return all;
}
constexpr int64_t kMomentsScratch = 4 * kSumScratch;

template <class R>
__global__ void __launch_bounds__(kTokenThreads)
    moments_of_block(Tokens<R> tokens, Moments* parts) {
  const Moments moments = cta_moments([&](const auto& f) {
    for_tokens_of_block(tokens.count, [&](int64_t i) {
      if (tokens.counts(i)) f(double(tokens.x[i]), 0.0, 1.0);
    });
  });
  if (threadIdx.x == 0) parts[blockIdx.x] = moments;
}

// Those of `blocks` blocks as one.
__global__ void __launch_bounds__(kTokenThreads)
    merge_moments(const Moments* parts, int64_t blocks, Moments* all) {
  const Moments moments = cta_moments([&](const auto& f) {
    for (int64_t i = threadIdx.x; i < blocks; i += kTokenThreads) {
      if (parts[i].count > 0) f(parts[i].mean, parts[i].squares, parts[i].count);
    }
  });
  if (threadIdx.x == 0) *all = moments;
}

template <class R>
__global__ void __launch_bounds__(kTokenThreads)
    whiten(Tokens<R> tokens, const Moments* moments, double eps, R* whitened) {
  const double count = moments->count > 1 ? moments->count : 1;
  const double scale = whitening_scale(moments->squares / count, eps), mean = moments->mean;
  for_tokens_of_block(tokens.count, [&](int64_t i) {
    whitened[i] = tokens.counts(i) ? R((double(tokens.x[i]) - mean) * scale) : R(0);
  });
}

Tensor masked_whiten(Tensor x, OptionalTensor mask, Tensor scalars) {
  const Device device(x);
  const double eps = *data<double>(scalars);
  return dispatch(x.scalar_type(), [&](auto type) {
    using R = Real<decltype(type)>;
    const Tensor values = as<R>(x), whitened = empty<R>(x, shape(x));
    const OptionalTensor counts = packed(mask);
    const int64_t count = x.numel(), blocks = token_blocks(count);
    const Tensor moments = empty<double>(x, {blocks + 1, 3});
    auto *all = data<Moments>(moments), *parts = all + 1;
    const Tokens<R> tokens{data<R>(values), data_or_null<bool>(counts), count};
    device.launch(moments_of_block<R>, Grid{blocks, kTokenThreads, kMomentsScratch}, tokens, parts);
    device.launch(merge_moments, Grid{1, kTokenThreads, kMomentsScratch}, parts, blocks, all);
    device.launch(whiten<R>, Grid{blocks, kTokenThreads}, tokens, all, eps, data<R>(whitened));
    return whitened;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("masked_mean", PPO_CHECKED(kMaskedMean, &masked_mean));
  m.impl("masked_whiten", PPO_CHECKED(kMaskedWhiten, &masked_whiten));
}

}  // namespace ppo::cuda
