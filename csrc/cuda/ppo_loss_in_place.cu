// ppo_loss_ and rescale_; formulas in ppo_kernels/ppo_loss.py.
//
// A row stays on chip between its statistics and its gradient: the logits cross memory once each
// way. It is shared out over the CTAs of a cluster, so that at least two CTAs, of different rows,
// fit on a multiprocessor: one loads while another computes or stores. Rows that are too long are
// read again, from the second-level cache where it still has them.
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

constexpr int kMostParts = 8;
// Vectors of a thread that are copied together, and how many times.
constexpr int kCopied = 2, kMostCopies = 16;

// What precedes the logits in shared memory.
template <class R>
struct alignas(128) Head {
  Barrier copied[kMostCopies];
  SoftmaxState<R> warps[kMostThreads / kWarp];
  SoftmaxState<R> parts[kMostParts];
  RowGradient<R> gradient;
};

// The statistics of a thread's vectors, which bulk copies bring.
template <class T>
__device__ __forceinline__ SoftmaxState<Real<T>> copied_statistics(const T* row,
                                                                   const InShared<T>& kept,
                                                                   Barrier* copied, Real<T> k) {
  const int together = kCopied * int(blockDim.x);
  const int copies = ceil_div(kept.count, together);
  if (threadIdx.x == 0) {
    for (int i = 0; i < copies; ++i) barrier_init(copied + i);
    barriers_ready();
    for (int i = 0; i < copies; ++i) {
      const int first = i * together;
      bulk_copy(kept.vectors + first, row + first * kVector<T>,
                16 * min(together, kept.count - first), copied + i);
    }
  }
  __syncthreads();
  SoftmaxState<Real<T>> state;
  nothing_seen(state);
  for (int i = 0; i < copies; ++i) {
    barrier_wait(copied + i);
    uint4 x[kCopied];
#pragma unroll
    for (int j = 0; j < kCopied; ++j) x[j] = kept.load(i * kCopied + j);
    absorb<T>(state, x, k);
  }
  return state;
}

// The same where each thread fetches its own.
template <class T, Layout kLayout>
__device__ __forceinline__ SoftmaxState<Real<T>> fetched_statistics(const T* row, int length,
                                                                    const InShared<T>& kept,
                                                                    Real<T> k) {
  SoftmaxState<Real<T>> state;
  nothing_seen(state);
  const int vectors = vectors_each<T>(length);
  for (int i = 0; i < vectors; i += kCopied) {
    uint4 x[kCopied];
#pragma unroll
    for (int j = 0; j < kCopied; ++j) x[j] = load<T, kLayout>(row, length, i + j);
#pragma unroll
    for (int j = 0; j < kCopied; ++j) kept.keep(i + j, x[j]);
    absorb<T>(state, x, k);
  }
  return state;
}

// The state of a row from those of its parts; `parts` in shared memory has room for them. Begun by
// `cluster_arrive_relaxed`, so that the others are known to run when they are written to.
template <class R>
__device__ SoftmaxState<R> merge_parts(const SoftmaxState<R>& state, SoftmaxState<R>* parts,
                                       int part, int count) {
  cluster_wait();
  if (int(threadIdx.x) < count) *in_cluster(parts + part, threadIdx.x) = state;
  cluster_arrive();
  cluster_wait();
  return merge_first(parts, count);
}

// The gradient of a row, by one thread, for all.
template <class T>
__device__ void settle(const Call<T>& call, uint32_t row, const SoftmaxState<Real<T>>& state,
                       Real<T> logit, bool writes, RowGradient<Real<T>>& gradient) {
  const auto scored = score(state, logit, call.k);
  const auto upstream = token_loss(call, row, scored, writes);
  gradient = row_gradient(upstream.logprob, upstream.entropy, scored.entropy, scored.stats,
                          call.temperature, logit, call.k);
}

// How a row is shared out over CTAs: parts of `length` elements.
struct Division {
  int parts, length, threads;
  int64_t shared;  // bytes
};

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, kResident<T, kLayout>)
    on_chip(Call<T> call, Division division, bool by_bulk) {
  using R = Real<T>;
  const int parts = division.parts, part = parts > 1 ? int(cluster_rank()) : 0;
  const uint32_t row = blockIdx.x / parts;
  const int begin = part * division.length, n = max(0, min(division.length, call.length - begin));
  T *z = call.logits[row], *mine = z + begin;
  if (call.mask && !call.mask[row]) {
    write_row<T, kLayout>(mine, n, Zeros<T>{});
    if (part == 0 && threadIdx.x == 0) write_no_loss(call, row);
    return;
  }
  if (parts > 1) cluster_arrive_relaxed();
  auto& head = *reinterpret_cast<Head<R>*>(shared_memory());
  const InShared<T> kept{reinterpret_cast<uint4*>(&head + 1), vectors_kept<T, kLayout>(n)};
  // Read before another thread writes there.
  const int64_t token = call.tokens[row];
  const R logit = logit_of(z, call.length, token);
  SoftmaxState<R> state;
  if (kLayout == Layout::aligned && by_bulk) {
    state = copied_statistics<T>(mine, kept, head.copied, call.k);
  } else {
    state = fetched_statistics<T, kLayout>(mine, n, kept, call.k);
  }
  state = merge_threads(state, head.warps);
  if (parts > 1) state = merge_parts(state, head.parts, part, parts);
  if (threadIdx.x == 0) settle(call, row, state, logit, part == 0, head.gradient);
  __syncthreads();
  write_gradient<T, kLayout>(head.gradient, kept, mine, n, token - begin, call.k);
}

// For rows that are too long to be kept.
template <class T, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, kResident<T, kLayout>) read_twice(Call<T> call) {
  using R = Real<T>;
  const uint32_t row = blockIdx.x;
  T* z = call.logits[row];
  if (call.mask && !call.mask[row]) {
    write_row<T, kLayout>(z, call.length, Zeros<T>{});
    if (threadIdx.x == 0) write_no_loss(call, row);
    return;
  }
  auto& head = *reinterpret_cast<Head<R>*>(shared_memory());
  const int64_t token = call.tokens[row];
  const R logit = logit_of(z, call.length, token);
  auto state = thread_statistics<T, kLayout>(z, call.length, call.k);
  state = merge_threads(state, head.warps);
  if (threadIdx.x == 0) settle(call, row, state, logit, true, head.gradient);
  __syncthreads();
  write_gradient<T, kLayout>(head.gradient, InGlobal<T, kLayout>{z, call.length}, z, call.length,
                             token, call.k);
}

// The fewest parts of which three, or else two, fit on a multiprocessor; none if rows are too long.
// Of nothing but the device, V and dtype.
template <class T>
std::optional<Division> division_of(const Device& device, int64_t length) {
  constexpr int64_t n = kVector<T>;
  const int64_t shared = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t reserved = device.attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int most_parts = device.has_clusters() ? kMostParts : 1;
  for (const int resident : {3, 2}) {
    for (int parts = 1; parts <= most_parts; parts *= 2) {
      const int64_t part = ceil_div(ceil_div<int64_t>(length, parts), n) * n;
      const int64_t threads = threads_for(part * sizeof(T), 8 * 16);
      // Where elements stand apart there is room for the last vector of every thread.
      const int64_t vectors = length % n == 0 ? part / n : ceil_div(part, threads * n) * threads;
      const int64_t bytes = sizeof(Head<Real<T>>) + vectors * 16;
      if (resident * (bytes + reserved) <= shared && vectors <= kMostCopies * kCopied * threads) {
        return Division{parts, int(part), int(threads), bytes};
      }
    }
  }
  return std::nullopt;
}

template <class T>
void launch_in_place(const Device& device, const Call<T>& call) {
  const auto division = division_of<T>(device, call.length);
  with_layout(layout_of(call.length, call.logits), [&](auto layout) {
    if (division) {
      const Grid grid{call.count * division->parts, division->threads, division->shared,
                      division->parts};
      device.launch(on_chip<T, layout>, grid, call, *division, device.has_clusters());
    } else {
      const Grid grid{call.count, kMostThreads, sizeof(Head<Real<T>>)};
      device.launch(read_twice<T, layout>, grid, call);
    }
  });
}

LossResults ppo_loss_(Tensor logits, Tensor tokens, Tensor old_logprobs, Tensor advantages,
                      OptionalTensor mask, OptionalTensor ref_logprobs, OptionalTensor denominator,
                      Tensor scalars, int64_t kl_estimator) {
  const Device device(logits);
  return dispatch(logits.scalar_type(), [&](auto type) -> LossResults {
    using T = decltype(type);
    Loss<T> loss(logits, tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, scalars,
                 kl_estimator);
    in_place(logits, [&](const Tensor& target) {
      loss.call.logits = rows<T>(target);
      launch_in_place(device, loss.call);
    });
    return loss.results(device);
  });
}

// The elements of a row times a number; zeros stay zeros whatever it is.
template <class T, Layout kLayout>
struct Scaled {
  static constexpr int kVectors = kInFlight<kLayout>;
  using Loaded = uint4;
  InGlobal<T, kLayout> row;
  Real<T> factor;

  __device__ __forceinline__ uint4 load(int i) const { return row.load(i); }
  __device__ __forceinline__ void compute(const uint4& loaded, Real<T> (&x)[kVector<T>]) const {
    unpack_vector<T>(loaded, x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) x[j] = x[j] == Real<T>(0) ? x[j] : x[j] * factor;
  }
};

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kMostThreads, kResident<T, kLayout>)
    rescale(Rows<T> grad, int length, const Real<T>* scale) {
  if (*scale == Real<T>(1)) return;
  T* row = grad[blockIdx.x];
  write_row<T, kLayout>(row, length, Scaled<T, kLayout>{{row, length}, *scale});
}

void rescale_(Tensor grad, Tensor scale) {
  const Device device(grad);
  dispatch(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Tensor factor = as<Real<T>>(scale);
    const int64_t length = grad.size(-1);
    in_place(grad, [&](const Tensor& target) {
      const auto z = rows<T>(target);
      with_layout(layout_of(length, z), [&](auto layout) {
        device.launch(rescale<T, layout>, Grid{grad.numel() / length, threads_for_row(grad)}, z,
                      length, data<Real<T>>(factor));
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("ppo_loss_", TORCH_BOX(&ppo_loss_));
  m.impl("rescale_", TORCH_BOX(&rescale_));
}

}  // namespace ppo::cuda
