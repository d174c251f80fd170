// Which tokens the threads of a GAE scan have, and how they come and go.
#pragma once

#include "common.cuh"

namespace ppo::cuda {

// Tokens to a thread: 16 bytes of fp32.
constexpr int kTokens = 4;
// Of CTAs for several rows, and for trajectories, whose lengths only the device knows.
constexpr int kFewThreads = 128;

// The tokens of a CTA, where they are of one row: a piece of it as long as the CTA, counted from
// the row's own begin.
struct Chunk {
  uint32_t row;
  int length;
  int64_t first;         // from the begin of the row, or of the first trajectory
  uint32_t slot, later;  // where its map is kept; how many chunks follow it in its row
};

struct Token {
  uint32_t row;
  int64_t t;
  bool inside;
};

// What tells threads their tokens; `kInVectors` if vectors are tried. For rows that share warps,
struct SharedWarps {
  static constexpr bool kOneRow = false, kLooksBack = false, kInVectors = false;
  uint32_t rows;
  int length, shift;  // a row has room for 1 << shift tokens

  __device__ int lanes() const { return (1 << shift) / kTokens; }
  __device__ Chunk chunk(uint32_t) const { return {}; }
  __device__ Token token(const Chunk&, int i) const {
    const int row_of_cta = i >> shift, t = i - (row_of_cta << shift);
    const uint32_t row = blockIdx.x * (uint32_t(kFewThreads * kTokens) >> shift) + row_of_cta;
    return {row, t, row < rows && t < length};
  }
};

struct OneRow {
  static constexpr bool kOneRow = true;

  __device__ int lanes() const { return kWarp; }
  __device__ Token token(const Chunk& chunk, int i) const {
    return {chunk.row, chunk.first + i, i < chunk.length};
  }
};

// for rows of one chunk,
struct OneChunk : OneRow {
  static constexpr bool kLooksBack = false, kInVectors = true;
  int length;

  __device__ Chunk chunk(uint32_t block) const { return {block, length, 0, 0, 0}; }
};

// for longer ones,
struct ManyChunks : OneRow {
  static constexpr bool kLooksBack = true, kInVectors = true;
  static constexpr int64_t kChunk = kMostThreads * kTokens;
  int64_t length;
  uint32_t chunks;  // to a row

  __device__ Chunk chunk(uint32_t slot) const {
    const uint32_t row = slot / chunks, number = slot - row * chunks;
    const int64_t first = number * kChunk;
    return {row, int(min(kChunk, length - first)), first, slot, chunks - 1 - number};
  }
};

// and for trajectories: i has the slots from cu_seqlens[i] / kChunk + i to the like number of i +
// 1, which are enough for its chunks wherever it lies.
struct Trajectories : OneRow {
  static constexpr bool kLooksBack = true, kInVectors = false;
  static constexpr int64_t kChunk = kFewThreads * kTokens;
  Ids cu_seqlens;
  uint32_t count;
  int64_t total;

  // Moved into [0, total] if it is wrong.
  __device__ int64_t boundary(uint32_t i) const {
    return max(int64_t(0), min(cu_seqlens[i], total));
  }
  __device__ int64_t first_slot(uint32_t i) const { return boundary(i) / kChunk + i; }

  // By a whole warp, which tries 32 trajectories at a time. Length 0 where no chunk has the slot.
  __device__ Chunk chunk(uint32_t slot) const {
    uint32_t row = 0, beyond = count;
    while (beyond - row > 1) {
      const uint32_t step = ceil_div(beyond - row, uint32_t(kWarp + 1));
      const uint32_t tried = row + (lane_id() + 1) * step;
      const bool before = tried < beyond && first_slot(tried) <= slot;
      row += __popc(__ballot_sync(kAllLanes, before)) * step;
      beyond = min(beyond, row + step);
    }
    const int64_t number = slot - first_slot(row), first = boundary(row) + number * kChunk;
    const int64_t left = boundary(row + 1) - first;
    if (number < 0 || left <= 0) return {row, 0, 0, slot, 0};
    return {row, int(min(kChunk, left)), first, slot, uint32_t((left - 1) / kChunk)};
  }
};

// A (B, T) tensor with unit stride in T, or (N,); `data` may be null.
template <class T>
struct PerToken {
  T* data;
  int64_t stride;

  __device__ __forceinline__ T* operator[](const Token& token) const {
    return data + token.row * stride + token.t;
  }
};

template <class T>
PerToken<T> per_token(const OptionalTensor& x) {
  if (!x) return {nullptr, 0};
  return {data<T>(*x), x->dim() == 2 ? x->stride(0) : 0};
}

// Whether all rows begin where a vector can.
template <class... T>
bool have_vectors(const PerToken<T>&... x) {
  return ((reinterpret_cast<uintptr_t>(x.data) % std::min<size_t>(16, kTokens * sizeof(T)) == 0 &&
           x.stride % kTokens == 0) &&
          ...);
}

template <class R>
struct Inputs {
  PerToken<const R> rewards, values;
  PerToken<const uint8_t> mask, dones;  // 0 or 1
};

template <class R>
struct Outputs {
  PerToken<R> advantages, returns;  // `returns` may be null
};

template <class R>
struct alignas(16) Vector {
  R x[kTokens];
};

// The tokens of a thread; bit j of `counted` and `done` stands for token j.
template <class R>
struct Tokens {
  Vector<R> rewards, values;
  uint32_t counted, done;
};

constexpr uint32_t kAllTokens = (1u << kTokens) - 1;

// Bit j from byte j: the factor moves all four of them into the highest byte.
__device__ __forceinline__ uint32_t bits_of(const uint8_t* bytes) {
  return (*reinterpret_cast<const uint32_t*>(bytes) & 0x01010101u) * 0x01020408u >> 24;
}

// Threads read and write their tokens as vectors, where these are aligned in memory,
template <class R>
struct Vectors {
  template <class Where>
  __device__ __forceinline__ Tokens<R> load(const Inputs<R>& in, const Where& where,
                                            const Chunk& chunk) {
    const Token token = where.token(chunk, int(threadIdx.x) * kTokens);
    if (!token.inside) return {};
    return {*reinterpret_cast<const Vector<R>*>(in.rewards[token]),
            *reinterpret_cast<const Vector<R>*>(in.values[token]),
            in.mask.data ? bits_of(in.mask[token]) : kAllTokens,
            in.dones.data ? bits_of(in.dones[token]) : 0u};
  }

  template <class Where>
  __device__ __forceinline__ void store(const Outputs<R>& out, const Where& where,
                                        const Chunk& chunk, const Vector<R>& advantages,
                                        const Vector<R>& returns) {
    const Token token = where.token(chunk, int(threadIdx.x) * kTokens);
    if (!token.inside) return;
    *reinterpret_cast<Vector<R>*>(out.advantages[token]) = advantages;
    *reinterpret_cast<Vector<R>*>(out.returns[token]) = returns;
  }
};

// or, by way of shared memory, so that the lanes of a warp are side by side: a lane reads and
// writes the warp's tokens lane, 32 + lane, ... and has the tokens from 4 lane on. One to a warp.
template <class R>
struct alignas(16) Elements {
  R x[2][kWarp * kTokens];
  uint8_t flags[2][kWarp * kTokens];

  template <class Where>
  __device__ __forceinline__ Tokens<R> load(const Inputs<R>& in, const Where& where,
                                            const Chunk& chunk) {
    R rewards[kTokens], values[kTokens];
    uint8_t counted[kTokens], done[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const Token token = where.token(chunk, warp_id() * kWarp * kTokens + side_by_side(j));
      rewards[j] = token.inside ? *in.rewards[token] : R(0);
      values[j] = token.inside ? *in.values[token] : R(0);
      counted[j] = token.inside ? (in.mask.data ? *in.mask[token] : 1) : 0;
      done[j] = token.inside && in.dones.data ? *in.dones[token] : 0;
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      x[0][side_by_side(j)] = rewards[j];
      x[1][side_by_side(j)] = values[j];
      flags[0][side_by_side(j)] = counted[j];
      flags[1][side_by_side(j)] = done[j];
    }
    __syncwarp();
    return {own(0), own(1), bits_of(flags[0] + lane_id() * kTokens),
            bits_of(flags[1] + lane_id() * kTokens)};
  }

  // After `load`: what a lane writes over is its own.
  template <class Where>
  __device__ __forceinline__ void store(const Outputs<R>& out, const Where& where,
                                        const Chunk& chunk, const Vector<R>& advantages,
                                        const Vector<R>& returns) {
    own(0) = advantages;
    own(1) = returns;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const Token token = where.token(chunk, warp_id() * kWarp * kTokens + side_by_side(j));
      if (!token.inside) continue;
      *out.advantages[token] = x[0][side_by_side(j)];
      if (out.returns.data) *out.returns[token] = x[1][side_by_side(j)];
    }
  }

 private:
  __device__ __forceinline__ static int side_by_side(int j) { return j * kWarp + lane_id(); }

  __device__ __forceinline__ Vector<R>& own(int which) {
    return reinterpret_cast<Vector<R>*>(x[which])[lane_id()];
  }
};

}  // namespace ppo::cuda
