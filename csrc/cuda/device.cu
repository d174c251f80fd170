// What is asked of a device, or told of a kernel there, once.
#include <mutex>
#include <set>

#include "common.cuh"

namespace ppo::cuda {
namespace {

constexpr int kMostDevices = 128;  // torch counts them in eight bits

// Stands for all kernels: they are compiled for the same devices.
__global__ void nothing() {}

// Whether the current device has room for a cluster of CTAs of which each takes up a
// multiprocessor, all the `shared` memory of which it asks for. Then any kernel of ours fits in so
// many parts: the question, and so the bits of a row, depends on none of them. A driver that cannot
// answer has no room.
bool can_be_placed(int parts, int shared) {
  const LaunchConfig config({parts, kMostThreads, shared, parts}, nullptr);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, nothing, config.get()) != cudaSuccess) {
    cudaGetLastError();  // Or whoever asks next takes it for his own.
    return false;
  }
  return clusters > 0;
}

// Of the current device.
Limits ask(int32_t device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, nothing));
  Limits limits{attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                attribute(cudaDevAttrReservedSharedMemoryPerBlock),
                attribute(cudaDevAttrMultiProcessorCount),
                code.ptxVersion >= 90,
                1};
  if (!limits.has_sm90) return limits;
  check(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits.shared_per_block));
  while (limits.most_parts < kMostParts &&
         can_be_placed(2 * limits.most_parts, limits.shared_per_block)) {
    limits.most_parts *= 2;
  }
  return limits;
}

}  // namespace

const Limits& limits_of(int32_t device) {
  static std::once_flag asked[kMostDevices];
  static Limits limits[kMostDevices];
  std::call_once(asked[device], [&] { limits[device] = ask(device); });
  return limits[device];
}

void grant_shared_memory(const void* kernel, int32_t device) {
  static std::mutex one_at_a_time;
  static std::set<std::pair<int32_t, const void*>> granted;
  const std::lock_guard lock(one_at_a_time);
  if (granted.contains({device, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits_of(device).shared_per_block));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  granted.emplace(device, kernel);
}

}  // namespace ppo::cuda
