// Every function of csrc/cuda/ptx.cuh in a kernel of its own, for tests/test_cuda_order.py. Around
// one that orders memory stand a store that is dead and a load of what was stored, unless it does.
#include "../../csrc/cuda/ptx.cuh"

using namespace ppo::cuda;

#define KERNEL extern "C" __global__ void
#define BETWEEN(data, ...) \
  *data = 1;               \
  __VA_ARGS__;             \
  *data = *data + 1

KERNEL shared_memory_(uint32_t* out) { *out = shared_address(shared_memory()); }
KERNEL shared_address_(uint32_t* out, const void* p) { *out = shared_address(p); }
KERNEL cluster_arrive_(int* data) { BETWEEN(data, cluster_arrive()); }
KERNEL cluster_wait_(int* data) { BETWEEN(data, cluster_wait()); }
KERNEL fence_cluster_(int* data) { BETWEEN(data, fence_cluster()); }
KERNEL in_cluster_(int* data, uint32_t rank) { *in_cluster(data, rank) = 1; }
KERNEL barrier_init_(int* data, Barrier* barrier) { BETWEEN(data, barrier_init(barrier)); }
KERNEL barriers_ready_(int* data) { BETWEEN(data, barriers_ready()); }
KERNEL bulk_copy_(int* data, void* shared, const void* global, Barrier* barrier) {
  BETWEEN(data, bulk_copy(shared, global, 32, barrier));
}
KERNEL barrier_wait_(int* data, Barrier* barrier) { BETWEEN(data, barrier_wait(barrier)); }
KERNEL load_acquire_(int* data, const uint32_t* flag, uint32_t* out) {
  BETWEEN(data, *out = load_acquire(flag));
}
KERNEL spin_until_(int* data, const uint32_t* flag) {
  BETWEEN(data, spin_until([&] { return load_acquire(flag) != 0; }));
}
KERNEL store_release_(int* data, uint32_t* flag) { BETWEEN(data, store_release(flag, 7)); }
KERNEL load_vector_(int* data, const void* global, uint4* out) {
  BETWEEN(data, const uint4 x = load_vector(global));
  *out = x;
}

KERNEL fast_exp2_(float* x) { *x = fast_exp2(*x); }
KERNEL fast_exp2_of_double_(double* x) { *x = fast_exp2(*x); }
KERNEL max_or_nan_(float* x) { *x = max_or_nan(*x, x[1]); }
KERNEL max_or_nan_of_doubles_(double* x) { *x = max_or_nan(*x, x[1]); }
KERNEL unpack_bfloat16_(float2* x, uint32_t word) { *x = unpack(word, BFloat16{}); }
KERNEL unpack_half_(float2* x, uint32_t word) { *x = unpack(word, Half{}); }
KERNEL pack_bfloat16_(uint32_t* word, float2 x) { *word = pack(x, BFloat16{}); }
KERNEL pack_half_(uint32_t* word, float2 x) { *word = pack(x, Half{}); }
KERNEL max_of_packed_bfloat16_(uint32_t* x, uint32_t y) { *x = max_of_packed(*x, y, BFloat16{}); }
KERNEL max_of_packed_half_(uint32_t* x, uint32_t y) { *x = max_of_packed(*x, y, Half{}); }
