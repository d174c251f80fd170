// gae, gae_packed and discounted_sums; formulas in ppo_kernels/gae.py.
//
// Tokens in a row are a map of what comes to them from later ones, and maps compose: see GAEMap. A
// thread walks kTokens tokens, the lanes of a warp compose their maps in a scan, and a warp applies
// those of the later warps of its CTA. Chunks of a longer row leave their maps in memory, and each
// composes those of all later ones, in an order that nothing changes. What is computed from what
// depends on a token's place in its row alone, so that a row comes out bitwise the same wherever it
// stands.
#include "gae.cuh"

namespace ppo::cuda {
namespace {

// The maps of chunks by slot, each with a flag that it is there, and how many chunks have begun.
template <class R>
struct Maps {
  GAEMap<R>* maps;
  uint32_t *there, *begun;

  __device__ void publish(uint32_t slot, const GAEMap<R>& map) const {
    maps[slot] = map;
    store_release(there + slot, 1);
  }
  __device__ GAEMap<R> wait_for(uint32_t slot) const {
    spin_until([&] { return load_acquire(there + slot) != 0; });
    return maps[slot];
  }
};

// `bootstrap` may be null.
template <class R>
struct Call {
  Inputs<R> in;
  const R* bootstrap;
  R gamma, gamma_lam;
  Outputs<R> out;
  Maps<R> maps;

  // The G that reaches a row.
  __device__ __forceinline__ R from_beyond(uint32_t row) const {
    return bootstrap ? gamma * bootstrap[row] : R(0);
  }
};

// What the threads of a CTA share.
template <class R>
struct alignas(16) Head {
  GAEMap<R> warps[kMostThreads / kWarp];
  R carry;
  Chunk chunk;
};

// The map of the lane `distance` later in the same `lanes` lanes.
template <class R>
__device__ __forceinline__ GAEMap<R> from_later_lane(const GAEMap<R>& map, int distance,
                                                     int lanes) {
  const GAEMap<R> later{__shfl_down_sync(kAllLanes, map.g, distance),
                        __shfl_down_sync(kAllLanes, map.c, distance)};
  return (lane_id() & (lanes - 1)) + distance < lanes ? later : no_tokens<R>();
}

// The map from each lane to the last of its `lanes` lanes.
template <class R>
__device__ __forceinline__ GAEMap<R> compose_lanes(GAEMap<R> map, int lanes) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    map = compose_maps(from_later_lane(map, distance, lanes), map);
  }
  return map;
}

// The chunk of this CTA. Chunks begin from the last slot to the first, so that those that a chunk
// waits for are on their way.
template <class R, class Where>
__device__ __forceinline__ decltype(auto) begin_chunk(const Where& where, const Maps<R>& maps,
                                                      Chunk& shared) {
  if constexpr (Where::kLooksBack) {
    if (warp_id() == 0) {
      uint32_t begun = 0;
      if (lane_id() == 0) begun = atomicAdd(maps.begun, 1u);
      const Chunk chunk = where.chunk(gridDim.x - 1 - __shfl_sync(kAllLanes, begun, 0));
      if (lane_id() == 0) shared = chunk;
    }
    __syncthreads();
    return (shared);
  } else {
    return where.chunk(blockIdx.x);
  }
}

// The map of all chunks after this one in its row. By a whole warp, for its lane 0.
template <class R>
__device__ __forceinline__ GAEMap<R> look_back(const Maps<R>& maps, const Chunk& chunk) {
  GAEMap<R> all = no_tokens<R>();
  for (uint32_t seen = 0; seen < chunk.later; seen += kWarp) {
    const uint32_t ahead = seen + lane_id();
    GAEMap<R> map = no_tokens<R>();
    if (ahead < chunk.later) map = maps.wait_for(chunk.slot + 1 + ahead);
    all = compose_maps(compose_lanes(map, kWarp), all);
  }
  return all;
}

// The G that reaches a warp, from the one that reaches its row, in `head.carry`; `map` is that of
// the warp, in its lane 0. One warp waits for later chunks while another tells earlier ones.
template <class Where, class R>
__device__ __forceinline__ R reach_warp(const Maps<R>& maps, const Chunk& chunk,
                                        const GAEMap<R>& map, Head<R>& head) {
  const int warps = int(blockDim.x) / kWarp;
  if (lane_id() == 0) head.warps[warp_id()] = map;
  __syncthreads();
  if constexpr (Where::kLooksBack) {
    if (warp_id() == 0) {
      const GAEMap<R> later = look_back(maps, chunk);
      if (lane_id() == 0) head.carry = apply_map(later, head.carry);
    } else if (warp_id() == 1) {
      const GAEMap<R> warp = lane_id() < warps ? head.warps[lane_id()] : no_tokens<R>();
      const GAEMap<R> whole = compose_lanes(warp, kWarp);
      if (lane_id() == 0) maps.publish(chunk.slot, whole);
    }
    __syncthreads();
  }
  R G = head.carry;
#pragma unroll 4
  for (int i = warps - 1; i > warp_id(); --i) G = apply_map(head.warps[i], G);
  return G;
}

// CTAs of kMostThreads to a multiprocessor, at least.
template <class R, class Where>
constexpr int kResident = sizeof(R) == 8   ? 1
                          : Where::kOneRow ? 3
                                           : 2;

// With kSums the scan of `discounted_sums`: the decays stand in `values`, the sums in `advantages`.
template <class R, class Where, class Memory, bool kSums>
__global__ void __launch_bounds__(kMostThreads, (kResident<R, Where>))
    scan(Call<R> call, Where where) {
  auto& head = *reinterpret_cast<Head<R>*>(shared_memory());
  auto& memory = reinterpret_cast<Memory*>(&head + 1)[warp_id()];
  const Chunk& chunk = begin_chunk(where, call.maps, head.chunk);
  if (Where::kLooksBack && chunk.length == 0) {
    if (threadIdx.x == 0) call.maps.publish(chunk.slot, no_tokens<R>());
    return;
  }
  const Tokens<R> tokens = memory.load(call.in, where, chunk);
  if (Where::kOneRow && threadIdx.x == 0) head.carry = call.from_beyond(chunk.row);

  // From this thread's last token to its first; returns the G that it hands on.
  const auto walk = [&](R G, const auto& visit) {
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      const bool counted = tokens.counted >> j & 1, done = tokens.done >> j & 1;
      const R reward = tokens.rewards.x[j], value = tokens.values.x[j];
      if constexpr (kSums) {
        visit(j, counted, done, sum_step(reward, value, counted, done, G));
      } else {
        visit(j, counted, done,
              gae_step(reward, value, counted, done, call.gamma, call.gamma_lam, G));
      }
    }
    return G;
  };
  GAEMap<R> map = no_tokens<R>();
  map.g = walk(R(0), [&](int j, bool counted, bool done, R) {
    const R decay = kSums ? tokens.values.x[j] : call.gamma_lam;
    map.c = done ? R(NAN) : counted ? decay * map.c : map.c;
  });

  const int lanes = where.lanes();
  map = compose_lanes(map, lanes);
  R G;
  if constexpr (Where::kOneRow) {
    G = reach_warp<Where>(call.maps, chunk, map, head);
  } else {
    const Token token = where.token(chunk, int(threadIdx.x) * kTokens);
    G = token.inside ? call.from_beyond(token.row) : R(0);
  }
  G = apply_map(from_later_lane(map, 1, lanes), G);

  Vector<R> advantages, returns;
  walk(G, [&](int j, bool counted, bool, R advantage) {
    advantages.x[j] = advantage;
    returns.x[j] = counted ? advantage + tokens.values.x[j] : R(0);
  });
  memory.store(call.out, where, chunk, advantages, returns);
}

OptionalTensor rows_of(const OptionalTensor& x) {
  return x ? OptionalTensor(in_rows(*x)) : std::nullopt;
}

// Of the type R; the tensor itself where that is so.
template <class R>
Tensor rows_of(const Tensor& x) {
  return in_rows(x.scalar_type() == kDtype<R> ? x : torch::stable::to(x, kDtype<R>));
}

// A scan of an op's arguments.
template <class R, bool kSums>
struct Run {
  Device device;
  Tensor rewards, values;
  OptionalTensor mask, dones, bootstrap_values;
  R gamma, gamma_lam;

  template <class Where>
  std::tuple<Tensor, Tensor> operator()(const Where& where, int64_t ctas, int threads) const {
    const Tensor advantages = empty<R>(rewards, shape(rewards));
    OptionalTensor returns;
    if constexpr (!kSums) returns = empty<R>(rewards, shape(rewards));
    const auto results = [&] { return std::tuple(advantages, returns.value_or(advantages)); };
    if (rewards.numel() == 0) return results();
    Call<R> call{{per_token<const R>(rewards), per_token<const R>(values),
                  per_token<const uint8_t>(mask), per_token<const uint8_t>(dones)},
                 data_or_null<R>(bootstrap_values),
                 gamma,
                 gamma_lam,
                 {per_token<R>(advantages), per_token<R>(returns)},
                 {}};
    OptionalTensor workspace;
    if constexpr (Where::kLooksBack) {
      // Two numbers and a flag to a slot, and the counter.
      workspace = empty<R>(rewards, {3 * ctas + 1});
      call.maps.maps = data<GAEMap<R>>(*workspace);
      call.maps.there = reinterpret_cast<uint32_t*>(call.maps.maps + ctas);
      call.maps.begun = call.maps.there + ctas;
      check(cudaMemsetAsync(call.maps.there, 0, (ctas + 1) * sizeof(uint32_t), device.stream()));
    }
    auto kernel = scan<R, Where, Elements<R>, kSums>;
    int64_t shared = sizeof(Elements<R>);
    if constexpr (Where::kInVectors && !kSums) {
      const auto& in = call.in;
      const auto& out = call.out;
      if (have_vectors(in.rewards, in.values, in.mask, in.dones, out.advantages, out.returns)) {
        kernel = scan<R, Where, Vectors<R>, kSums>;
        shared = 0;
      }
    }
    shared = sizeof(Head<R>) + threads / kWarp * shared;
    device.launch(kernel, {ctas, threads, shared}, call, where);
    return results();
  }
};

// f(run) in the type of the results.
template <bool kSums, class F>
std::tuple<Tensor, Tensor> with_run(const Tensor& rewards, const Tensor& values,
                                    const OptionalTensor& mask, const OptionalTensor& dones,
                                    const OptionalTensor& bootstrap_values,
                                    const OptionalTensor& scalars, const F& f) {
  const double gamma = scalars ? data<double>(*scalars)[0] : 0;
  const double lam = scalars ? data<double>(*scalars)[1] : 0;
  const auto run_in = [&]<class R>(R) {
    return f(Run<R, kSums>{Device(rewards), rows_of<R>(rewards), rows_of<R>(values), rows_of(mask),
                           rows_of(dones), as<R>(bootstrap_values), R(gamma), R(gamma * lam)});
  };
  const bool wide =
      rewards.scalar_type() == ScalarType::Double || values.scalar_type() == ScalarType::Double;
  return wide ? run_in(double{}) : run_in(float{});
}

// Of rows (batch, length).
constexpr auto scan_rows = [](const auto& run) {
  const int64_t batch = run.rewards.size(0), length = run.rewards.size(1);
  constexpr int64_t kOfWarp = kWarp * kTokens;
  if (length <= kOfWarp) {
    const int shift = std::bit_width(uint64_t(std::max<int64_t>(length, kTokens)) - 1);
    return run(SharedWarps{uint32_t(batch), int(length), shift},
               ceil_div<int64_t>(batch << shift, kFewThreads * kTokens), kFewThreads);
  }
  if (length <= ManyChunks::kChunk) {
    return run(OneChunk{{}, int(length)}, batch, int(ceil_div(length, kOfWarp)) * kWarp);
  }
  const int64_t chunks = ceil_div(length, ManyChunks::kChunk);
  return run(ManyChunks{{}, length, uint32_t(chunks)}, batch * chunks, kMostThreads);
};

// f(scan of trajectories).
template <class F>
auto with_trajectories(const Tensor& cu_seqlens, int64_t total, const F& f) {
  const int64_t count = cu_seqlens.numel() - 1;
  if (count == 0 && total > 0) {
    value_error("cu_seqlens must rise from 0 to ", total,
                ", the length of rewards, got one boundary");
  }
  const Tensor bounds = packed(cu_seqlens);
  return f([&](const auto& run) {
    return run(Trajectories{{}, Ids(bounds), uint32_t(count), total},
               total / Trajectories::kChunk + count, kFewThreads);
  });
}

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, OptionalTensor mask,
                               OptionalTensor dones, OptionalTensor bootstrap_values,
                               Tensor scalars) {
  return with_run<false>(rewards, values, mask, dones, bootstrap_values, scalars, scan_rows);
}

std::tuple<Tensor, Tensor> gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens,
                                      OptionalTensor mask, OptionalTensor dones,
                                      OptionalTensor bootstrap_values, Tensor scalars) {
  return with_trajectories(cu_seqlens, rewards.numel(), [&](const auto& scan) {
    return with_run<false>(rewards, values, mask, dones, bootstrap_values, scalars, scan);
  });
}

Tensor discounted_sums(Tensor x, Tensor decays, OptionalTensor mask, OptionalTensor dones,
                       OptionalTensor cu_seqlens) {
  const auto sums = [&](const auto& scan) {
    return std::get<0>(with_run<true>(x, decays, mask, dones, std::nullopt, std::nullopt, scan));
  };
  return cu_seqlens ? with_trajectories(*cu_seqlens, x.numel(), sums) : sums(scan_rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) {
  m.impl("gae", PPO_CHECKED(kGAE, &gae));
  m.impl("gae_packed", PPO_CHECKED(kGAEPacked, &gae_packed));
  m.impl("discounted_sums", PPO_CHECKED(kDiscountedSums, &discounted_sums));
}

}  // namespace ppo::cuda
