// Small kernels that are right, and the same with one thing removed each, chosen by `Fault`: they
// prove that the emulator finds what is missing. Called from tests/test_cuda_emulator.py.
#include <exception>
#include <string>

#include "../../csrc/cuda/ptx.cuh"

using namespace ppo::cuda;

namespace {

constexpr unsigned kAllLanes = 0xffffffff;

// In the order of FAULTS in the tests.
enum Fault {
  none,
  no_barrier_after_write,
  no_barrier_before_reuse,
  too_little_shared_memory,
  divergent_shuffle,
  exited_lane,
  no_first_cluster_barrier,
  no_second_cluster_barrier,
  no_last_cluster_barrier,
  no_fence_cluster,
  wait_after_read,
  nobody_waits,
  no_barriers_ready,
  no_barrier_init,
  no_syncthreads_after_init,
  misaligned_copy,
  order_of_blocks,
  flag_before_value,
  no_wait_for_flag,
  plain_flag,
  some_do_not_come,
  trap,
  misaligned_access,
};

__device__ float warp_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}

// out[i] = the sum of block i's part of x, twice over the same scratch memory.
__global__ void reduce(const float* x, float* out, Fault fault) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize;
  const int warps = blockDim.x / warpSize;
  float total = 0;
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    const float mine = x[(blockIdx.x * 2 + half) * blockDim.x + threadIdx.x];
    if (fault == divergent_shuffle && lane == 3) {
      sum = __shfl_xor_sync(kAllLanes, mine, 1);
    } else {
      if (fault == exited_lane && lane == 3) return;
      sum = warp_sum(mine);
    }
    if (lane == 0) scratch[warp] = sum;
    if (fault == trap && warp == 1) __trap();
    if (fault == some_do_not_come && warp == 1) {
      while (load_acquire(reinterpret_cast<const uint32_t*>(out)) != 7) {
      }
    }
    if (fault != no_barrier_after_write) __syncthreads();
    for (int i = 0; i < warps; ++i) total += scratch[i];
    if (fault != no_barrier_before_reuse) __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

// Every block writes its part of x to the next one of its cluster of 4: out = the parts of the
// blocks before and after.
__global__ void exchange(const float* x, float* out, Fault fault) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  const uint32_t size = 4, rank = blockIdx.x % size;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (fault != no_first_cluster_barrier) {
    cluster_arrive();
    cluster_wait();
  }
  in_cluster(mine, (rank + 1) % size)[threadIdx.x] = x[i];
  if (fault != no_fence_cluster) fence_cluster();
  if (fault != no_second_cluster_barrier) {
    cluster_arrive();
    cluster_wait();
  }
  __syncwarp();  // which lanes reach while others of their warp have not come to cluster_wait
  out[i] = mine[threadIdx.x] + in_cluster(mine, (rank + 2) % size)[threadIdx.x];
  if (fault != no_last_cluster_barrier) {
    fence_cluster();
    cluster_arrive();
    cluster_wait();
  }
}

// out = x, in two bulk copies to a block.
__global__ void copy(const float* x, float* out, Fault fault) {
  char* memory = shared_memory();
  float* parts = reinterpret_cast<float*>(memory);
  Barrier* barriers = reinterpret_cast<Barrier*>(memory + blockDim.x * sizeof(float));
  const uint32_t half = blockDim.x / 2;
  const float* source = x + blockIdx.x * blockDim.x + (fault == misaligned_copy);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      if (fault != no_barrier_init) barrier_init(barriers + i);
    }
    if (fault != no_barriers_ready) barriers_ready();
    for (int i = 0; i < 2; ++i) {
      bulk_copy(parts + i * half, source + i * half, half * sizeof(float), barriers + i);
    }
  }
  if (fault != no_syncthreads_after_init) __syncthreads();
  if (fault == nobody_waits) return;
  const int part = threadIdx.x / half;
  if (fault != wait_after_read) barrier_wait(barriers + part);
  out[blockIdx.x * blockDim.x + threadIdx.x] = parts[threadIdx.x];
  if (fault == wait_after_read) barrier_wait(barriers + part);
}

// out[i] = x[0] + ... + x[i], block after block; `state` = a ticket, then a flag of each block.
__global__ void chain(const float* x, float* out, uint32_t* state, Fault fault) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  if (threadIdx.x == 0) {
    shared[0] = fault == order_of_blocks ? blockIdx.x : atomicAdd(state, 1u);
  }
  __syncthreads();
  const uint32_t i = shared[0];
  if (threadIdx.x > 0) return;
  uint32_t* flags = state + 1;
  float sum = x[i];
  if (i > 0) {
    while (fault != no_wait_for_flag && load_acquire(flags + i - 1) == 0) {
    }
    sum += out[i - 1];
  }
  if (fault == flag_before_value) store_release(flags + i, 1);
  out[i] = sum;
  if (fault == plain_flag) flags[i] = 1;
  if (fault != flag_before_value && fault != plain_flag) store_release(flags + i, 1);
}

__global__ void shuffles(const int64_t* x, int64_t* out, int width) {
  const int n = blockDim.x, i = threadIdx.x;
  out[i] = __shfl_sync(kAllLanes, x[i], i + 1, width);
  out[n + i] = __shfl_xor_sync(kAllLanes, x[i], 5, width);
  out[2 * n + i] = __shfl_up_sync(kAllLanes, x[i], 3, width);
  out[3 * n + i] = __shfl_down_sync(kAllLanes, x[i], 3, width);
  out[4 * n + i] = __ballot_sync(kAllLanes, x[i] > 0);
}

__global__ void vectors(const float* x, float4* out, Fault fault) {
  const char* bytes = reinterpret_cast<const char*>(x);
  out[threadIdx.x] =
      reinterpret_cast<const float4*>(bytes + (fault == misaligned_access ? 4 : 0))[threadIdx.x];
}

// Many synchronisations, to time them.
__global__ void meet(int times) {
  for (int i = 0; i < times; ++i) __syncthreads();
}

thread_local std::string last_message;

template <class... Parameters, class... Arguments>
const char* launch(unsigned blocks, unsigned threads, unsigned cluster, size_t shared,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  try {
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error == cudaSuccess) return nullptr;
    last_message = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    last_message = error.what();
  }
  return last_message.c_str();
}

}  // namespace

// Each returns what went wrong, or null.
#define SAMPLE extern "C" __attribute__((visibility("default"))) const char*

SAMPLE sample_reduce(const float* x, float* out, int blocks, int threads, Fault fault) {
  const size_t shared = (threads / warpSize - (fault == too_little_shared_memory)) * sizeof(float);
  return launch(blocks, threads, 1, shared, reduce, x, out, fault);
}
SAMPLE sample_exchange(const float* x, float* out, int blocks, int threads, Fault fault) {
  return launch(blocks, threads, 4, threads * sizeof(float), exchange, x, out, fault);
}
SAMPLE sample_copy(const float* x, float* out, int blocks, int threads, Fault fault) {
  return launch(blocks, threads, 1, threads * sizeof(float) + 16, copy, x, out, fault);
}
SAMPLE sample_chain(const float* x, float* out, uint32_t* state, int blocks, int threads,
                    Fault fault) {
  return launch(blocks, threads, 1, 16, chain, x, out, state, fault);
}
SAMPLE sample_shuffles(const int64_t* x, int64_t* out, int width) {
  return launch(1, 64, 1, 0, shuffles, x, out, width);
}
SAMPLE sample_vectors(const float* x, float4* out, Fault fault) {
  return launch(1, 32, 1, 0, vectors, x, out, fault);
}
SAMPLE sample_meet(int blocks, int threads, int cluster, size_t shared, int times) {
  return launch(blocks, threads, cluster, shared, meet, times);
}
