// The host side: the emulated device, launches and their limits, and what is torch's own where it
// is built for CUDA.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <compare>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {

int device_major = 9, ptx_version = 90;

namespace {

constexpr size_t kGrantedSharedBytes = 48 << 10;
constexpr uint64_t kMostThreads = 1024;
constexpr int kMostThreadsPerSM = 2048;
constexpr int kReservedSharedBytes = 1024;

// `most_blocks`: in a cluster that can be placed; of 0 the driver cannot even be asked.
struct Device {
  int major, shared_per_block, shared_per_sm, ptx, most_blocks, multiprocessors;
  auto operator<=>(const Device&) const = default;
};
// As many as were asked for; tensors lie on the current one.
std::vector<Device> devices{{9, 232448, 233472, 90, 8, 132}};
size_t current = 0;
const Device& device() { return devices[current]; }

// By device, as a GPU has it.
std::map<std::pair<size_t, const void*>, size_t> shared_bytes_granted;
uint64_t launches = 0, last_blocks = 0, last_cluster = 0, largest_cluster = 0;
std::atomic<uint64_t> questions{0};
std::mutex one_launch;  // calls may come from several threads of Python

Dimensions dimensions(const dim3& d) { return {d.x, d.y, d.z}; }

// What a kernel may have on the current device.
size_t shared_bytes_of(const void* function) {
  const auto granted = shared_bytes_granted.find({current, function});
  return granted == shared_bytes_granted.end() ? kGrantedSharedBytes : granted->second;
}

cudaError_t check(const Launch& kernel, const void* function) {
  const auto& [grid, block, cluster, shared_bytes, run, arguments] = kernel;
  if (grid.count() == 0 || block.count() == 0 || cluster.count() == 0 ||
      block.count() > kMostThreads || block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster.count() > 1 &&
      (ptx_version < 90 || cluster.count() > uint64_t(device().most_blocks) ||
       grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0)) {
    return cudaErrorInvalidConfiguration;
  }
  return shared_bytes > shared_bytes_of(function) ? cudaErrorInvalidValue : cudaSuccess;
}

// A launch as the scheduler takes it.
Launch described(const cudaLaunchConfig_t& config, void (*run)(const void*) = nullptr,
                 const void* arguments = nullptr) {
  Launch kernel{dimensions(config.gridDim),
                dimensions(config.blockDim),
                {1, 1, 1},
                config.dynamicSmemBytes,
                run,
                arguments};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    kernel.cluster = {size.x, size.y, size.z};
  }
  return kernel;
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(one_launch);
  ++questions;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device().shared_per_block) return cudaErrorInvalidValue;
  shared_bytes_granted[{current, kernel}] = size_t(value);
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes) {
  ++questions;
  *attributes = {ptx_version, device_major * 10};
  return cudaSuccess;
}

// Of registers nothing is known here.
cudaError_t active_blocks(int* blocks, const void* kernel, int threads, size_t shared_bytes) {
  const std::lock_guard lock(one_launch);
  ++questions;
  if (shared_bytes > shared_bytes_of(kernel)) return cudaErrorInvalidValue;
  *blocks = std::min(device().shared_per_sm / (int(shared_bytes) + kReservedSharedBytes),
                     kMostThreadsPerSM / threads);
  return cudaSuccess;
}

// As if each cluster that can be placed had a place of its own on a GPU of one such place.
cudaError_t active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard lock(one_launch);
  ++questions;
  if (ptx_version < 90) return cudaErrorNotSupported;
  const Launch asked = described(config);
  if (asked.shared_bytes > shared_bytes_of(kernel) || asked.grid.x % asked.cluster.x != 0) {
    return cudaErrorInvalidValue;
  }
  if (device().most_blocks == 0) return cudaErrorNotSupported;
  *clusters = asked.cluster.count() <= uint64_t(device().most_blocks);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function,
                   void (*run)(const void* arguments), const void* arguments) {
  const std::lock_guard lock(one_launch);
  const Launch kernel = described(config, run, arguments);
  const cudaError_t error = check(kernel, function);
  if (error != cudaSuccess) return error;
  ++launches;
  last_blocks = kernel.grid.count();
  last_cluster = kernel.cluster.count();
  largest_cluster = std::max(largest_cluster, last_cluster);
  launch(kernel);
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  ++questions;
  const Device& device = devices[size_t(index)];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_sm;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

extern "C" {

// Of tensors, which torch knows to lie on the CPU: the emulated device.
AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = int32_t(current);
  return AOTI_TORCH_SUCCESS;
}

struct CUDAGuardOpaque {};

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardOpaque** guard) {
  static CUDAGuardOpaque the_guard;
  *guard = &the_guard;
  return AOTI_TORCH_SUCCESS;
}

AOTI_TORCH_EXPORT AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardOpaque*) {
  return AOTI_TORCH_SUCCESS;
}

// Called where an access is misaligned, because .cu files are compiled with -fsanitize=alignment;
// begins as GCC's and Clang's description of the place does.
struct Misaligned {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Misaligned* place, uintptr_t) {
  misaligned(place->file, place->line);
}

// --- called from Python

// The same arguments name the same device: what is known of it is not to be asked again.
AOTI_TORCH_EXPORT void emulator_device(int major, int shared_per_block, int shared_per_sm, int ptx,
                                       int most_blocks, int multiprocessors) {
  const Device named{major, shared_per_block, shared_per_sm, ptx, most_blocks, multiprocessors};
  current = size_t(std::find(devices.begin(), devices.end(), named) - devices.begin());
  if (current == devices.size()) devices.push_back(named);
  device_major = major;
  ptx_version = ptx;
  largest_cluster = bulk_copies = bulk_end = 0;
  bulk_begin = UINTPTR_MAX;
}

AOTI_TORCH_EXPORT void emulator_seed(uint64_t value) { seed(value); }
AOTI_TORCH_EXPORT void emulator_leave_out(const char* file, uint32_t line) {
  leave_out(file, line);
}
AOTI_TORCH_EXPORT uint64_t emulator_left_out() { return left_out; }
AOTI_TORCH_EXPORT uint64_t emulator_switches() { return switches; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_copies() { return bulk_copies; }
AOTI_TORCH_EXPORT uint64_t emulator_questions() { return questions; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_begin() { return bulk_begin; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_end() { return bulk_end; }
AOTI_TORCH_EXPORT uint64_t emulator_launches() { return launches; }
AOTI_TORCH_EXPORT uint64_t emulator_last_blocks() { return last_blocks; }
AOTI_TORCH_EXPORT uint64_t emulator_last_cluster() { return last_cluster; }
AOTI_TORCH_EXPORT uint64_t emulator_largest_cluster() { return largest_cluster; }

}  // extern "C"
