// What the op families share on the GPU: streams, launches, rows, per-token inputs.
//
// Nothing waits for the device, so nothing raises for what a tensor holds.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <bit>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../arguments.h"
#include "ptx.cuh"

// Of libtorch_cuda. Weak, so that the extension loads where torch is built without CUDA.
extern "C" {
struct CUDAGuardOpaque;
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardOpaque**);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardOpaque*);
}

namespace ppo::cuda {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // Or whoever asks next takes it for his own.
  throw std::runtime_error(cudaGetErrorString(error));
}

template <class T>
__host__ __device__ constexpr T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Of a CTA.
constexpr int kMostThreads = 512;

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

// What a kernel runs on: CTAs of so many threads, with `shared` bytes of dynamic shared memory
// each, in clusters of so many.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;
  int cluster = 1;
};

// CTAs of a cluster: what every device with clusters has, though a part of one may not.
constexpr int kMostParts = 8;

// What a device is asked once, for an answer takes microseconds: device.cu.
struct Limits {
  int shared_per_multiprocessor, shared_per_block, reserved_per_block;  // bytes
  int multiprocessors;
  // Whether the code that runs there was compiled for sm_90 or later: the driver may have compiled
  // the PTX of an older one.
  bool has_sm90;
  // CTAs of the largest cluster that can be placed, whatever else it needs.
  int most_parts;
};
const Limits& limits_of(int32_t device);
// Lets a kernel have all the shared memory of the current device, which is this one.
void grant_shared_memory(const void* kernel, int32_t device);

// A grid as the runtime takes it.
class LaunchConfig {
 public:
  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    config_.gridDim = dim3(unsigned(grid.blocks));
    config_.blockDim = dim3(unsigned(grid.threads));
    config_.dynamicSmemBytes = size_t(grid.shared);
    config_.stream = stream;
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    config_.attrs = &cluster_;
    config_.numAttrs = grid.cluster > 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

// The device and current stream of a tensor; its device is the current one meanwhile.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard_));
  }
  ~Device() { aoti_torch_delete_cuda_guard(guard_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Limits& limits() const { return limits_of(index_); }

  cudaStream_t stream() const { return stream_; }

  // No block is no launch.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Grid& grid,
              const Arguments&... arguments) const {
    if (grid.blocks == 0) return;
    if (grid.blocks > INT32_MAX) {
      value_error("tensors must have fewer rows for a GPU: ", grid.blocks,
                  " blocks are more than 2^31 - 1");
    }
    prepare(kernel, grid);
    const LaunchConfig config(grid, stream_);
    check(cudaLaunchKernelEx(config.get(), kernel, Parameters(arguments)...));
  }

  // How many CTAs of a kernel a multiprocessor holds at a time, and how many of its clusters the
  // device does; without clusters 0.
  template <class... Parameters>
  std::pair<int, int> occupancy(void (*kernel)(Parameters...), const Grid& grid) const {
    prepare(kernel, grid);
    const LaunchConfig config(grid, stream_);
    int ctas = 0, clusters = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, grid.threads,
                                                        size_t(grid.shared)));
    if (grid.cluster > 1) check(cudaOccupancyMaxActiveClusters(&clusters, kernel, config.get()));
    return {ctas, clusters};
  }

 private:
  template <class... Parameters>
  void prepare(void (*kernel)(Parameters...), const Grid& grid) const {
    constexpr int64_t kGranted = 48 << 10;  // without asking
    if (grid.shared <= kGranted) return;
    grant_shared_memory(reinterpret_cast<const void*>(kernel), index_);
  }

  int32_t index_;
  CUDAGuardOpaque* guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

template <class R>
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, kDtype<R>);
}

inline Tensor empty_logits(const Tensor& like) {
  return torch::stable::new_empty(like, shape(like));
}

// Ids of either integer type, contiguous.
class Ids {
 public:
  explicit Ids(const Tensor& x)
      : data_(data<void>(x)), wide_(x.scalar_type() == ScalarType::Long) {}
  __device__ int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

// The rows of a tensor (..., V) that two strides tell the place of: row i starts at
// (i / inner) * outer_stride + (i % inner) * inner_stride.
template <class T>
struct Rows {
  T* data;
  uint32_t inner;
  int64_t outer_stride, inner_stride;

  __device__ T* operator[](uint32_t row) const {
    const uint32_t outer = row / inner;
    return data + outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

// Whether a mask, or none, leaves a row out.
__device__ __forceinline__ bool excluded(const bool* mask, uint32_t row) {
  return mask && !mask[row];
}

// `x`, or a copy if two strides do not tell where its rows are.
inline Tensor readable(const Tensor& x) {
  constexpr int64_t kLongest = int64_t(1) << 30;
  if (x.size(-1) > kLongest) {
    value_error("logits must have V <= 2^30, got ", x.size(-1));
  }
  const Tensor y = in_rows(x);
  return row_dims(y).size() <= 2 ? y : torch::stable::contiguous(y);
}

// Of a `readable` tensor.
template <class T>
Rows<T> rows(const Tensor& x) {
  auto dims = row_dims(x);
  dims.insert(dims.begin(), 2 - dims.size(), RowDim{1, 0});
  return {data<T>(x), uint32_t(dims[1].size), dims[0].stride, dims[1].stride};
}

// f(`x` in readable form); what it writes there is in `x` afterwards.
template <class F>
void written_in_place(const Tensor& x, const F& f) {
  const Tensor target = readable(x);
  f(target);
  if (data<void>(target) != data<void>(x)) {
    Tensor original = x;
    torch::stable::copy_(original, target);
  }
}

}  // namespace ppo::cuda
