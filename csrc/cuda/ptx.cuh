// What CUDA C++ has no words for, each behind a name. The tests have a stand-in for this file that
// runs on the CPU.
#ifndef PPO_CUDA_PTX
#define PPO_CUDA_PTX

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace ppo::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Clusters, barriers that count bytes and bulk copies are there from sm_90 on; a kernel compiled
// for less must not reach them, and its launcher does not ask for them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PPO_SM90(...) __trap()
#else
#define PPO_SM90(...) __VA_ARGS__
#endif

// The dynamic shared memory of this CTA, aligned to 128 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- spins

// Until `there()`, which another CTA or a copy will see to. A build for tests, with PPO_WATCHDOG
// defined, traps where that has not come in five seconds.
template <class F>
__device__ __forceinline__ void spin_until(const F& there) {
#ifdef PPO_WATCHDOG
  const auto now = [] {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
  };
  const uint64_t begun = now();
  while (!there()) {
    if (now() - begun > 5'000'000'000) __trap();
  }
#else
  while (!there()) {
  }
#endif
}

// --- clusters

// All threads of a cluster meet between `arrive` and `wait`. What a thread wrote before it arrived,
// also to the shared memory of others, is seen by those that waited, and what it read it read
// before they write, if it called `fence_cluster` before it arrived.
__device__ __forceinline__ void cluster_arrive() {
  PPO_SM90(asm volatile("barrier.cluster.arrive.relaxed;" :: : "memory"));
}

__device__ __forceinline__ void cluster_wait() {
  PPO_SM90(asm volatile("barrier.cluster.wait.acquire;" :: : "memory"));
}

__device__ __forceinline__ void fence_cluster() {
  PPO_SM90(asm volatile("fence.acq_rel.cluster;" :: : "memory"));
}

// Where the CTA `rank` of the cluster has what this one has at `p` in shared memory.
template <class P>
__device__ __forceinline__ P* in_cluster(P* p, uint32_t rank) {
  uint64_t there = 0;
  PPO_SM90(asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(p)),
                        "r"(rank)));
  return reinterpret_cast<P*>(there);
}

// --- bulk copies, and barriers in shared memory that wait for their bytes

using Barrier = uint64_t;

// To be followed by `barriers_ready` and a `__syncthreads` before another thread uses it.
__device__ __forceinline__ void barrier_init(Barrier* barrier) {
  PPO_SM90(asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory"));
}

// Makes barriers that this thread has initialised visible to bulk copies.
__device__ __forceinline__ void barriers_ready() {
  PPO_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

// Copies `bytes`, a multiple of 16, from `global` to `shared`, both aligned to 16 bytes; `barrier`,
// used once, opens when they are there.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          Barrier* barrier) {
  PPO_SM90(asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n\t"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
}

// Waits until the barrier opens for the first time. To the compiler the loop is one instruction,
// and loops that wait in each of their rounds can be unrolled.
__device__ __forceinline__ void barrier_wait(Barrier* barrier) {
#ifdef PPO_WATCHDOG
  spin_until([&] {
    uint32_t open = 0;
    PPO_SM90(
        asm volatile("{\n\t"
                     ".reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t"
                     "}" : "=r"(open) : "r"(shared_address(barrier)) : "memory"));
    return open != 0;
  });
#else
  PPO_SM90(
      asm volatile("{\n\t"
                   ".reg .pred open;\n\t"
                   "again:\n\t"
                   "mbarrier.try_wait.parity.shared::cta.b64 open, [%0], 0;\n\t"
                   "@!open bra again;\n\t"
                   "}" ::"r"(shared_address(barrier)) : "memory"));
#endif
}

// --- flags in global memory

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// --- 16 bytes at a time

// Past the first-level cache, where nobody would look for them again.
__device__ __forceinline__ uint4 load_vector(const void* global) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global)
               : "memory");
  return x;
}

// --- arithmetic

// 2^x within 2 units in the last place, 0 for what is below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

// The larger one; NaN where either is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ double max_or_nan(double x, double y) { return x > y || x != x ? x : y; }

// --- two elements of 16 bits in a word, the first in its lower half

__device__ __forceinline__ float2 unpack(uint32_t word, BFloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ float2 unpack(uint32_t word, Half) {
  float2 x;
  asm("{\n\t"
      ".reg .f16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low;\n\t"
      "cvt.f32.f16 %1, high;\n\t"
      "}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(word));
  return x;
}

__device__ __forceinline__ uint32_t pack(float2 x, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x.y), "f"(x.x));
  return word;
}

__device__ __forceinline__ uint32_t pack(float2 x, Half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x.y), "f"(x.x));
  return word;
}

// The larger of each pair.
__device__ __forceinline__ uint32_t max_of_packed(uint32_t x, uint32_t y, BFloat16) {
  uint32_t z;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

__device__ __forceinline__ uint32_t max_of_packed(uint32_t x, uint32_t y, Half) {
  uint32_t z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

}  // namespace ppo::cuda

#endif
