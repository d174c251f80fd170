// Stands in for csrc/cuda/ptx.cuh: the same functions, in C++, which also check what the hardware
// leaves undefined.
#pragma once
#define PPO_CUDA_PTX

#include <cfloat>

namespace ppo::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using Barrier = uint64_t;

inline char* shared_memory() { return emulator::shared_memory(); }

template <class F>
void spin_until(const F& there) {
  while (!there()) {
  }
}

inline void cluster_arrive(emulator::Site at = emulator::Site::current()) {
  emulator::cluster_arrive(at);
}

inline void cluster_wait(emulator::Site at = emulator::Site::current()) {
  emulator::cluster_wait(at);
}

inline void fence_cluster(emulator::Site at = emulator::Site::current()) {
  emulator::fence_cluster(at);
}

template <class P>
P* in_cluster(P* p, uint32_t rank, emulator::Site at = emulator::Site::current()) {
  return static_cast<P*>(const_cast<void*>(emulator::in_cluster(p, rank, at)));
}

inline void barrier_init(Barrier* barrier, emulator::Site at = emulator::Site::current()) {
  emulator::barrier_init(barrier, at);
}

inline void barriers_ready(emulator::Site at = emulator::Site::current()) {
  emulator::barriers_ready(at);
}

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier,
                      emulator::Site at = emulator::Site::current()) {
  emulator::bulk_copy(shared, global, bytes, barrier, at);
}

inline void barrier_wait(Barrier* barrier, emulator::Site at = emulator::Site::current()) {
  emulator::barrier_wait(barrier, at);
}

inline uint32_t load_acquire(const uint32_t* flag, emulator::Site at = emulator::Site::current()) {
  emulator::yield(at);
  return emulator::acquire(flag, at);
}

inline void store_release(uint32_t* flag, uint32_t value,
                          emulator::Site at = emulator::Site::current()) {
  emulator::maybe_yield(at);
  emulator::release(flag, value, at);
  emulator::maybe_yield(at);
}

inline uint4 load_vector(const void* global, emulator::Site at = emulator::Site::current()) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned load_vector", at);
  return *static_cast<const uint4*>(global);
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}
inline double fast_exp2(double x) { return std::exp2(x); }

template <class T>
T max_or_nan(T x, T y) {
  return x > y || x != x ? x : y;
}

namespace emulated {

inline float to_float(uint32_t bits, BFloat16) { return std::bit_cast<float>(bits << 16); }
inline float to_float(uint32_t bits, Half) { return Half(uint16_t(bits), Half::from_bits()); }

}  // namespace emulated

template <class T>
float2 unpack(uint32_t word, T type) {
  return {emulated::to_float(word & 0xffff, type), emulated::to_float(word >> 16, type)};
}

template <class T>
uint32_t pack(float2 x, T) {
  return uint32_t(T(x.x).x) | uint32_t(T(x.y).x) << 16;
}

template <class T>
uint32_t max_of_packed(uint32_t x, uint32_t y, T type) {
  const float2 a = unpack(x, type), b = unpack(y, type);
  return pack({std::fmax(a.x, b.x), std::fmax(a.y, b.y)}, type);
}

}  // namespace ppo::cuda
