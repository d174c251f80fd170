// The device language of CUDA C++ for the host compiler. Included before a .cu file, which then
// compiles as it is; its kernels run on the CPU, each thread a fiber (emulator.cpp).
#pragma once

// Everything of torch that a .cu file includes comes before the macros at the end.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// <math.h> and <string.h> also put float overloads and memcpy where device code expects them.
#include <math.h>
#include <string.h>

#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <type_traits>

#include "cuda_runtime.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

constexpr int warpSize = 32;
// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(emulator::Site at = emulator::Site::current()) {
  emulator::sync_threads(at);
}

inline void __syncwarp(unsigned mask = 0xffffffff, emulator::Site at = emulator::Site::current()) {
  emulator::exchange(emulator::Collective::sync, mask, 0, emulator::lane(), at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Site at = emulator::Site::current()) {
  return unsigned(
      emulator::exchange(emulator::Collective::ballot, mask, predicate != 0, emulator::lane(), at));
}

namespace emulator {

template <class T>
T shuffle(unsigned mask, T value, int source, Site at) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const uint64_t got =
      exchange(Collective::shuffle, mask, std::bit_cast<Bits>(value), uint32_t(source), at);
  return std::bit_cast<T>(Bits(got));
}

// First and last lane of this lane's segment of `width` lanes.
inline int first_lane(int width) { return int(lane()) & ~(width - 1); }
inline int last_lane(int width) { return first_lane(width) + width - 1; }

}  // namespace emulator

// A lane whose source is outside of its segment gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Site at = emulator::Site::current()) {
  const int from = emulator::first_lane(width) + (source & (width - 1));
  return emulator::shuffle(mask, value, from, at);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulator::Site at = emulator::Site::current()) {
  const int lane = int(emulator::lane()), from = lane ^ lane_mask;
  return emulator::shuffle(mask, value, from > emulator::last_lane(width) ? lane : from, at);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulator::Site at = emulator::Site::current()) {
  const int lane = int(emulator::lane()), from = lane - int(delta);
  return emulator::shuffle(mask, value, from < emulator::first_lane(width) ? lane : from, at);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulator::Site at = emulator::Site::current()) {
  const int lane = int(emulator::lane()), from = lane + int(delta);
  return emulator::shuffle(mask, value, from > emulator::last_lane(width) ? lane : from, at);
}

inline unsigned atomicAdd(unsigned* address, unsigned value,
                          emulator::Site at = emulator::Site::current()) {
  emulator::maybe_yield(at);
  const unsigned old = *address;
  *address = old + value;
  emulator::flag_changed();
  return old;
}

[[noreturn]] inline void __trap(emulator::Site at = emulator::Site::current()) {
  emulator::fail("__trap()", at);
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }

template <std::integral A, std::integral B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}

template <std::integral A, std::integral B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

#include "ptx.h"

// STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_native, CUDA, m) registers for CPU tensors, elsewhere.
#define ppo_kernels_native ppo_kernels_emulated
#define CUDA CPU
