// token_logprobs and its backward; formulas in ppo_kernels/logprobs.py.
#include "logprobs.cuh"

namespace ppo::cuda {
namespace {

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    forward(Rows<T> logits, Ids tokens, const bool* mask, int length, Division division,
            Temperatures<Real<T>> temperatures, Real<T>* logprobs, Real<T>* entropy,
            RowStats<Real<T>>* stats) {
  using R = Real<T>;
  const Part part(division, length);
  const bool writes = threadIdx.x == 0 && part.index == 0;
  const auto write = [&](const Scored<R>& scored) {
    logprobs[part.row] = scored.logprob;
    entropy[part.row] = scored.entropy;
    stats[part.row] = scored.stats;
  };
  if (excluded(mask, part.row)) {
    if (writes) write({});
    return;
  }
  begin_row(division);
  const R k = temperatures[part.row].k;
  const T* z = logits[part.row];
  auto state = thread_sums<T, kLayout>(z + part.begin, part.length, k, KeepNothing{});
  const R logit = writes ? logit_of(z, length, tokens[part.row]) : R(0);
  state = merge_row(state, *reinterpret_cast<States<R>*>(shared_memory()), division, part, k);
  if (!writes) return;
  write(score(state, logit, k));
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor tokens, OptionalTensor mask,
                                                  OptionalTensor temperatures, Tensor scalars) {
  const Device device(logits);
  const OptionalTensor counts = packed(mask);
  const auto own = as<double>(temperatures);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    auto out_shape = shape(tokens);
    const Tensor logprobs = empty<R>(logits, out_shape), entropy = empty<R>(logits, out_shape);
    out_shape.push_back(2);
    const Tensor stats = empty<R>(logits, out_shape);
    const Tensor held = readable(logits), ids = packed(tokens);
    const auto z = rows<T>(held);
    const int64_t length = logits.size(-1);
    with_layout(layout_of(length, z), [&](auto layout) {
      const auto kernel = forward<T, layout>;
      const auto division = division_of<T>(device.limits(), length);
      device.launch(kernel, division.grid(tokens.numel(), sizeof(States<R>)), z, Ids(ids),
                    data_or_null<bool>(counts), length, division, temperatures_of<R>(own, scalars),
                    data<R>(logprobs), data<R>(entropy), data<RowStats<R>>(stats));
    });
    return std::tuple(logprobs, entropy, stats);
  });
}

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    backward(const Real<T>* grad_logprobs, const Real<T>* grad_entropy, Rows<T> logits, Ids tokens,
             const Real<T>* entropy, const RowStats<Real<T>>* stats, int length, Division division,
             Temperatures<Real<T>> temperatures, Rows<T> grad_logits) {
  using R = Real<T>;
  const Part part(division, length, block_from_last());
  const uint32_t row = part.row;
  const R g = grad_logprobs ? grad_logprobs[row] : R(0);
  const R h = grad_entropy ? grad_entropy[row] : R(0);
  T* out = grad_logits[row] + part.begin;
  // A row without upstream gradient may be one that a mask excluded, whose token is anything.
  if (g == R(0) && h == R(0)) {
    const InGlobal<T, kLayout> nothing{out, part.length};
    write_gradient<T, kLayout>({}, nothing, out, part.length, kElsewhere, R(0));
    return;
  }
  const T* z = logits[row] + part.begin;
  const int64_t token = tokens[row], at = token - part.begin;
  // NaN, as the log-probability of a token outside of the row.
  const bool known = token == kElsewhere || (token >= 0 && token < length);
  // Its logit is for the thread alone that writes there.
  const auto inner = inner_of<T, kLayout>(out, part.length);
  const R logit = writes<T>(inner, part.length, at) ? R(z[at]) : R(0);
  const auto temperature = temperatures[row];
  const auto gradient =
      row_gradient(known ? g : R(NAN), h, entropy[row], stats[row], temperature, logit);
  write_gradient<T, kLayout>(gradient, InGlobal<T, kLayout>{z, part.length}, out, part.length, at,
                             temperature.k);
}

// From `readable` logits to a `readable` tensor, which may be the same.
void write_backward(const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                    const Tensor& logits, const Tensor& tokens, const Tensor& entropy,
                    const Tensor& softmax_stats, const OptionalTensor& temperatures,
                    const Tensor& scalars, const Tensor& grad_logits) {
  const Device device(logits);
  const auto own = as<double>(temperatures);
  dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using R = Real<T>;
    const auto g = as<R>(grad_logprobs), h = as<R>(grad_entropy);
    const Tensor ids = packed(tokens), entropies = packed(entropy), stats = packed(softmax_stats);
    const auto z = rows<T>(logits), out = rows<T>(grad_logits);
    const int64_t length = logits.size(-1), count = tokens.numel();
    const auto division = elementwise_division<T>(device.limits(), count, length);
    with_layout(layout_of(length, z, out), [&](auto layout) {
      device.launch(backward<T, layout>, Grid{count * division.parts, division.threads},
                    data_or_null<R>(g), data_or_null<R>(h), z, Ids(ids), data<R>(entropies),
                    data<RowStats<R>>(stats), length, division, temperatures_of<R>(own, scalars),
                    out);
    });
  });
}

Tensor token_logprobs_backward(OptionalTensor grad_logprobs, OptionalTensor grad_entropy,
                               Tensor logits, Tensor tokens, Tensor entropy, Tensor softmax_stats,
                               OptionalTensor temperatures, Tensor scalars) {
  const Tensor grad_logits = empty_logits(logits);
  write_backward(grad_logprobs, grad_entropy, readable(logits), tokens, entropy, softmax_stats,
                 temperatures, scalars, grad_logits);
  return grad_logits;
}

void token_logprobs_backward_(OptionalTensor grad_logprobs, OptionalTensor grad_entropy,
                              Tensor logits, Tensor tokens, Tensor entropy, Tensor softmax_stats,
                              OptionalTensor temperatures, Tensor scalars) {
  written_in_place(logits, [&](const Tensor& target) {
    write_backward(grad_logprobs, grad_entropy, target, tokens, entropy, softmax_stats,
                   temperatures, scalars, target);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("token_logprobs", PPO_CHECKED(kTokenLogprobs, &token_logprobs));
  m.impl("token_logprobs_backward", PPO_CHECKED(kTokenLogprobsBackward, &token_logprobs_backward));
  m.impl("token_logprobs_backward_",
         PPO_CHECKED(kTokenLogprobsBackward, &token_logprobs_backward_));
}

}  // namespace ppo::cuda
