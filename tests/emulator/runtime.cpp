// The host side: the emulated device, launches and their limits, and what is torch's own where it
// is built for CUDA.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_runtime.h"

namespace emulator {

int device_major = 9, ptx_version = 90;

namespace {

constexpr size_t kGrantedSharedBytes = 48 << 10;
constexpr uint64_t kMostThreads = 1024;
constexpr uint64_t kMostBlocksInCluster = 8;

struct Device {
  int shared_per_block, shared_per_sm;
} device{232448, 233472};  // of sm_90

std::map<const void*, size_t> shared_bytes_granted;
uint64_t launches = 0, last_cluster = 0, largest_cluster = 0;
std::mutex one_launch;  // calls may come from several threads of Python

Dimensions dimensions(const dim3& d) { return {d.x, d.y, d.z}; }

cudaError_t check(const Launch& kernel, const void* function) {
  const auto& [grid, block, cluster, shared_bytes, run, arguments] = kernel;
  if (grid.count() == 0 || block.count() == 0 || cluster.count() == 0 ||
      block.count() > kMostThreads || block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster.count() > 1 &&
      (ptx_version < 90 || cluster.count() > kMostBlocksInCluster || grid.x % cluster.x != 0 ||
       grid.y % cluster.y != 0 || grid.z % cluster.z != 0)) {
    return cudaErrorInvalidConfiguration;
  }
  const auto granted = shared_bytes_granted.find(function);
  const size_t most = granted == shared_bytes_granted.end() ? kGrantedSharedBytes : granted->second;
  return shared_bytes > most || shared_bytes > size_t(device.shared_per_block)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device.shared_per_block) return cudaErrorInvalidValue;
  shared_bytes_granted[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function,
                   void (*run)(const void* arguments), const void* arguments) {
  const std::lock_guard lock(one_launch);
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
  const cudaError_t error = check(kernel, function);
  if (error != cudaSuccess) return error;
  ++launches;
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
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_sm;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

extern "C" {

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

AOTI_TORCH_EXPORT void emulator_device(int major, int shared_per_block, int shared_per_sm,
                                       int ptx) {
  device_major = major;
  ptx_version = ptx;
  device = {shared_per_block, shared_per_sm};
  largest_cluster = bulk_copies = bulk_end = 0;
  bulk_begin = UINTPTR_MAX;
}

AOTI_TORCH_EXPORT void emulator_seed(uint64_t value) { seed(value); }
AOTI_TORCH_EXPORT uint64_t emulator_switches() { return switches; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_copies() { return bulk_copies; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_begin() { return bulk_begin; }
AOTI_TORCH_EXPORT uint64_t emulator_bulk_end() { return bulk_end; }
AOTI_TORCH_EXPORT uint64_t emulator_launches() { return launches; }
AOTI_TORCH_EXPORT uint64_t emulator_last_cluster() { return last_cluster; }
AOTI_TORCH_EXPORT uint64_t emulator_largest_cluster() { return largest_cluster; }

}  // extern "C"
