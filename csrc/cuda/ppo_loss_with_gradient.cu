// ppo_loss_and_gradient, ppo_loss_ and rescale_; formulas in ppo_kernels/ppo_loss.py.
//
// A row stays on chip between its statistics and its gradient: the logits cross memory once each
// way. It is shared out over the CTAs of a cluster, so that two or three of them fit in the shared
// memory of a multiprocessor: one loads while another computes or stores. Rows that are too long
// are read again, from the second-level cache where it still has them.
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

// What precedes the logits in shared memory.
template <class R>
struct Head {
  States<R> states;
  TokenInput<R> token;
  RowGradient<R> gradient;
  Barrier copied[kMostCopies];
};

// 16 bytes of a row in shared memory, from element `first`, a multiple of a vector: threads read
// the aligned vectors that hold them, for single elements of 16 bits would come from a quarter of
// the banks.
template <class T>
__device__ __forceinline__ uint4 shared_vector(const T* row, int first) {
  const int beyond = int(reinterpret_cast<uintptr_t>(row) % 16);
  const auto* vectors =
      reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + first) - beyond);
  const uint4 x = vectors[0], y = vectors[beyond != 0];
  uint32_t words[] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  if (beyond & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (beyond & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  const auto word = [&](int i) {
    return uint32_t((uint64_t(words[i + 1]) << 32 | words[i]) >> beyond % 4 * 8);
  };
  return {word(0), word(1), word(2), word(3)};
}

// Where a row is in shared memory.
template <class T, Layout kLayout>
struct InShared {
  T* row;
  int length;

  template <bool kWhole>
  __device__ __forceinline__ uint4 load(int i) const {
    if constexpr (kLayout == Layout::apart) return cuda::load<T, kLayout, kWhole>(row, length, i);
    const int first = first_of<T, kLayout>(i);
    if (!kWhole && first >= length) return no_vector<T>();
    if constexpr (kLayout == Layout::together) return shared_vector(row, first);
    return reinterpret_cast<const uint4&>(row[first]);
  }
  template <Layout kOther>
  __device__ InShared<T, kOther> part(const Inner& inner) const {
    return {row + inner.begin, inner.length};
  }
};

// Begins to copy a row: its aligned vectors in bulk, kTogether of each thread to a copy, and the
// ends by threads. Returns the number of copies.
template <class T, Layout kLayout>
__device__ int begin_copies(const T* row, const InShared<T, kLayout>& kept, Barrier* copied) {
  const Inner inner = inner_of<T, kLayout>(row, kept.length);
  const int size = kTogether * block_size<T, kLayout>(), copies = ceil_div(inner.length, size);
  if (threadIdx.x == 0) {
    for (int i = 0; i < copies; ++i) barrier_init(copied + i);
    barriers_ready();
    for (int i = 0; i < copies; ++i) {
      const int first = inner.begin + i * size, count = min(size, inner.length - i * size);
      bulk_copy(kept.row + first, row + first, count * sizeof(T), copied + i);
    }
  }
  for_ends(inner, kept.length, [&](int at) { kept.row[at] = row[at]; });
  return copies;
}

// The statistics of a thread's vectors, which so many copies bring.
template <class T, Layout kLayout>
__device__ __forceinline__ SoftmaxState<Real<T>> copied_sums(const InShared<T, kLayout>& kept,
                                                             int copies, Barrier* copied,
                                                             Real<T> k) {
  SoftmaxState<Real<T>> state;
  nothing_seen(state);
  for_vectors<T, kLayout, kTogether>(kept.length, [&](int i, auto whole) {
    const int copy = i / kTogether;
    // At the end of a row there may be elements after the last of the copies.
    if (kLayout == Layout::aligned || copy < copies) barrier_wait(copied + copy);
    uint4 x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) x[j] = kept.template load<whole>(i + j);
    absorb<T, kTogether>(state, x, k);
  });
  return state;
}

// Rows are `kKept` on chip, brought by bulk copies or by their threads, or read twice; `gradient`
// may be where the logits stand.
template <class T, Layout kLayout, bool kKept>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    with_gradient(Call<T> call, Rows<T> gradient, bool in_bulk) {
  using R = Real<T>;
  const Part part(call.division, call.length);
  const bool first = threadIdx.x == 0;
  const T *z = call.logits[part.row], *mine = z + part.begin;
  T* out = gradient[part.row] + part.begin;
  if (excluded(call.mask, part.row)) {
    const InGlobal<T, kLayout> nothing{out, part.length};
    write_gradient<T, kLayout>({}, nothing, out, part.length, kElsewhere, R(0));
    if (first && part.index == 0) write_no_loss(call, part.row);
    return;
  }
  begin_row(call.division);
  auto& head = *reinterpret_cast<Head<R>*>(shared_memory());
  static_assert(sizeof(head) <= kHead);
  // It begins as far from 16 bytes as the row does.
  T* const row =
      reinterpret_cast<T*>(shared_memory() + kHead + reinterpret_cast<uintptr_t>(mine) % 16);
  const InShared<T, kLayout> kept{row, part.length};
  const auto temperature = call.temperatures[part.row];
  SoftmaxState<R> state;
  if (kKept && in_bulk) {
    const int copies = begin_copies(mine, kept, head.copied);
    __syncthreads();
    // While the copies are under way.
    if (first) head.token = token_input(call, part.row, z);
    state = copied_sums(kept, copies, head.copied, temperature.k);
  } else {
    state = thread_sums<T, kLayout>(mine, part.length, temperature.k,
                                    [&](int i, const uint4& vector, auto whole) {
                                      if constexpr (kKept)
                                        store<T, kLayout, whole>(row, part.length, i, vector);
                                    });
    if (first) head.token = token_input(call, part.row, z);
  }
  state = merge_row(state, head.states, call.division, part, temperature.k);
  if (first) {
    const auto scored = score(state, head.token.logit, temperature.k);
    const auto upstream = token_loss(call, part.row, head.token, scored, part.index == 0);
    head.gradient = row_gradient(upstream.logprob, upstream.entropy, scored.entropy, scored.stats,
                                 temperature, head.token.logit);
  }
  __syncthreads();
  const int64_t token = head.token.id - part.begin;
  if constexpr (kKept) {
    write_gradient<T, kLayout>(head.gradient, kept, out, part.length, token, temperature.k);
  } else {
    const InGlobal<T, kLayout> global{mine, part.length};
    write_gradient<T, kLayout>(head.gradient, global, out, part.length, token, temperature.k);
  }
}

template <class T, Layout kLayout>
auto kernel_of(const Division& division) {
  return division.kept ? with_gradient<T, kLayout, true> : with_gradient<T, kLayout, false>;
}

// A row that does not begin at 16 bytes is as far from them in shared memory, and ends later.
template <Layout kLayout>
Grid grid_of(const Division& division, int64_t rows) {
  return division.grid(rows, division.shared + (kLayout == Layout::aligned ? 0 : 16));
}

template <class T>
void launch(const Device& device, Call<T>& call, const Rows<T>& gradient) {
  with_layout(layout_of(call.length, call.logits, gradient), [&](auto layout) {
    const auto division = call.division = division_of<T>(device.limits(), call.length);
    device.launch(kernel_of<T, layout>(division), grid_of<layout>(division, call.count), call,
                  gradient, device.limits().has_sm90);
  });
}

using GradientResults = decltype(std::tuple_cat(LossResults{}, std::tuple<Tensor>{}));

GradientResults ppo_loss_and_gradient(Tensor logits, Tensor tokens, Tensor old_logprobs,
                                      Tensor advantages, OptionalTensor mask,
                                      OptionalTensor ref_logprobs, OptionalTensor denominator,
                                      OptionalTensor temperatures, Tensor scalars,
                                      int64_t kl_estimator) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) -> GradientResults {
    using T = decltype(type);
    Loss<T> loss(logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator,
                 temperatures, scalars, kl_estimator);
    const Tensor held = readable(logits), grad = empty_logits(logits);
    loss.call.logits = rows<T>(held);
    launch(device, loss.call, rows<T>(grad));
    return std::tuple_cat(loss.results(device), std::tuple(grad));
  });
}

LossResults ppo_loss_(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                      OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                      OptionalTensor temperatures, Tensor scalars, int64_t kl_estimator) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) -> LossResults {
    using T = decltype(type);
    Loss<T> loss(logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator,
                 temperatures, scalars, kl_estimator);
    written_in_place(logits, [&](const Tensor& target) {
      loss.call.logits = rows<T>(target);
      launch(device, loss.call, loss.call.logits);
    });
    return loss.results(device);
  });
}

// How a row of such logits is divided: parts, threads and bytes of shared memory of each, whether
// it is kept there; and the occupancy of the kernel.
std::tuple<int64_t, int64_t, int64_t, bool, int64_t, int64_t> row_division(Tensor logits) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t length = logits.size(-1);
    const auto division = division_of<T>(device.limits(), length);
    return with_layout(layout_of(length, rows<T>(readable(logits))), [&](auto layout) {
      const Grid grid = grid_of<layout>(division, 1);
      const auto [ctas, clusters] = device.occupancy(kernel_of<T, layout>(division), grid);
      return std::tuple<int64_t, int64_t, int64_t, bool, int64_t, int64_t>(
          grid.cluster, grid.threads, grid.shared, division.kept, ctas, clusters);
    });
  });
}

// The elements of a row times a number; a zero of either makes a zero, whatever the other is.
template <class T, Layout kLayout>
struct Scaled {
  using Loaded = uint4;
  InGlobal<T, kLayout> row;
  Real<T> factor;

  template <bool kWhole>
  __device__ __forceinline__ uint4 load(int i) const {
    return row.template load<kWhole>(i);
  }
  __device__ __forceinline__ void compute(const uint4& loaded, Real<T> (&x)[kVector<T>]) const {
    unpack_vector<T>(loaded, x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      x[j] = x[j] == Real<T>(0) || factor == Real<T>(0) ? Real<T>(0) : x[j] * factor;
    }
  }
};

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kThreadBound<kLayout>, (kResident<T, kLayout>))
    rescale(Rows<T> grad, int length, Division division, const Real<T>* scale) {
  if (*scale == Real<T>(1)) return;
  const Part part(division, length, block_from_last());
  T* row = grad[part.row] + part.begin;
  write_row<T, kLayout>(row, part.length, Scaled<T, kLayout>{{row, part.length}, *scale});
}

void rescale_(Tensor grad, Tensor scale) {
  const Device device(grad);
  dispatch(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Tensor factor = as<Real<T>>(scale);
    const int64_t length = grad.size(-1), count = grad.numel() / length;
    const auto division = elementwise_division<T>(device.limits(), count, length);
    written_in_place(grad, [&](const Tensor& target) {
      const auto z = rows<T>(target);
      with_layout(layout_of(length, z), [&](auto layout) {
        device.launch(rescale<T, layout>, Grid{count * division.parts, division.threads}, z, length,
                      division, data<Real<T>>(factor));
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("ppo_loss_and_gradient", PPO_CHECKED(kPPOLoss, &ppo_loss_and_gradient));
  m.impl("ppo_loss_", PPO_CHECKED(kPPOLoss, &ppo_loss_));
  m.impl("row_division", PPO_CHECKED(kRowDivision, &row_division));
  m.impl("rescale_", PPO_CHECKED(kRescale, &rescale_));
}

}  // namespace ppo::cuda
