// Tensors through torch's stable ABI, and errors: what the launchers of every device share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "softmax_state.h"

namespace ppo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Reaches Python as ValueError: torch, which calls the ops, translates std::invalid_argument.
template <class... Args>
[[noreturn]] void value_error(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

// Calls f with a value of the element type.
template <class F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      return f(float{});
  }
}

// The dtype of per-token results computed in R.
template <class R>
constexpr ScalarType kDtype = std::is_same_v<R, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline std::vector<int64_t> shape(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// `x` as R, contiguous; itself where it already is.
template <class R>
Tensor as(const Tensor& x) {
  return packed(x.scalar_type() == kDtype<R> ? x : torch::stable::to(x, kDtype<R>));
}

template <class R>
OptionalTensor as(const OptionalTensor& x) {
  return x ? OptionalTensor(as<R>(*x)) : std::nullopt;
}

inline OptionalTensor packed(const OptionalTensor& x) {
  return x ? OptionalTensor(packed(*x)) : std::nullopt;
}

template <class T>
const T* data_or_null(const OptionalTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

// Of a call whose numbers begin with the temperature; `own` (fp64) may hold one per row.
template <class R>
Temperatures<R> temperatures_of(const OptionalTensor& own, const Tensor& scalars) {
  return {data_or_null<double>(own), Temperature<R>::of(*data<double>(scalars))};
}

// The tensor itself if its last dimension has unit stride, else a copy where it has.
inline Tensor in_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

struct RowDim {
  int64_t size, stride;
};

// The leading dimensions of a tensor (..., V), those that follow on each other as one.
inline std::vector<RowDim> row_dims(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<RowDim> dims;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!dims.empty() && dims.back().stride == strides[d] * sizes[d]) {
      dims.back() = {dims.back().size * sizes[d], strides[d]};
    } else {
      dims.push_back({sizes[d], strides[d]});
    }
  }
  return dims;
}

}  // namespace ppo
