// What the op families share on the CPU: rows and threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "simd/sweeps.h"

namespace ppo::cpu {

template <class R>
Tensor empty(const std::vector<int64_t>& shape) {
  return torch::stable::empty(shape, kDtype<R>);
}

// An uninitialised tensor of vocabulary size, on huge pages where the system grants them: clearing
// its pages one by one would take longer than writing it.
inline Tensor empty_logits(const Tensor& like) {
  Tensor result = torch::stable::empty(shape(like), like.scalar_type());
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t end = start + result.numel() * result.element_size();
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  if (first + kPage <= end) {
    madvise(reinterpret_cast<void*>(first), (end - first) / kPage * kPage, MADV_HUGEPAGE);
  }
#endif
  return result;
}

template <class R>
Tensor zeros(const std::vector<int64_t>& shape) {
  Tensor result = empty<R>(shape);
  std::fill_n(data<R>(result), result.numel(), R(0));
  return result;
}

// Of per-token results: what the rows that a mask excludes are left at.
template <class R>
Tensor per_token(const std::vector<int64_t>& shape, const OptionalTensor& mask) {
  return mask ? zeros<R>(shape) : empty<R>(shape);
}

template <class R>
Tensor scalar(R value) {
  Tensor result = empty<R>({});
  *data<R>(result) = value;
  return result;
}

// Ids of either integer type.
class Ids {
 public:
  explicit Ids(const Tensor& x)
      : tensor_(packed(x)),
        data_(data<void>(tensor_)),
        wide_(x.scalar_type() == ScalarType::Long) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  int64_t size() const { return tensor_.numel(); }

 private:
  Tensor tensor_;
  const void* data_;
  bool wide_;
};

// "[2, 17]": where element i of a tensor of this shape stands.
inline std::string position(const std::vector<int64_t>& shape, int64_t i) {
  std::string text = "]";
  for (size_t d = shape.size(); d-- > 0; i /= shape[d]) {
    text = std::to_string(i % shape[d]) + text;
    if (d > 0) text = ", " + text;
  }
  return "[" + text;
}

// The denominator of a mean: the caller's, or the count; 0 counts as 1.
inline double denominator_of(const OptionalTensor& denominator, int64_t count) {
  const double value = denominator ? *data<double>(*denominator) : double(count);
  if (!(value >= 0)) value_error("denominator must be >= 0, got ", value);
  return value == 0 ? 1.0 : value;
}

// The rows of a tensor (..., V), read in place whatever the strides of the leading dimensions.
template <class T>
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : tensor_(in_rows(x)), base_(data<T>(tensor_)), dims_(row_dims(tensor_)) {
    length = x.size(-1);
    for (const RowDim& dim : dims_) count *= dim.size;
  }

  T* operator[](int64_t row) const {
    int64_t offset = 0;
    for (auto dim = dims_.rbegin(); dim != dims_.rend(); ++dim) {
      offset += row % dim->size * dim->stride;
      row /= dim->size;
    }
    return base_ + offset;
  }

  int64_t count = 1;
  int64_t length = 0;

 private:
  Tensor tensor_;
  T* base_;
  std::vector<RowDim> dims_;
};

// Raises where `Rows` would be of a copy, and what is written there lost.
inline void check_unit_stride(const char* name, const Tensor& x) {
  if (x.size(-1) > 1 && x.stride(-1) != 1) {
    value_error(name, " must have stride 1 in its last dimension, got ", x.stride(-1));
  }
}

// Below this many elements the start of a thread costs more than it saves.
constexpr int64_t kSerial = 16384;

// f(i) for i in [0, n), shared out over torch's threads; `cost` is elements touched per call.
template <class F>
void parallel(int64_t n, int64_t cost, const F& f) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (n <= 1 || n * cost <= kSerial) {
    run(0, n);
  } else {
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kSerial / std::max<int64_t>(1, cost)),
                                run);
  }
}

// Reduces rows of `length` elements to a state each, then writes to them.
//   sums(row, begin, n) -> State         of one chunk
//   finish(row, state)                   once per row, after all its chunks
//   write(row, begin, n)                 each chunk, after finish; walks back, so that the chunk
//                                        read last is still in cache
// Rows are shared out over threads; the chunks of a row too, when there are few rows. Either way
// chunks are merged in order, so that a row's result depends on nothing but the row.
template <class State, class R, class Sums, class Finish, class Write>
void sweep_rows(const std::vector<int64_t>& rows, int64_t length,
                const Temperatures<R>& temperatures, const Sums& sums, const Finish& finish,
                const Write& write) {
  const int64_t chunks = (length + kChunk - 1) / kChunk;
  const int64_t n = rows.size();
  const auto on_chunk = [&](const auto& f, int64_t row, int64_t chunk) {
    return f(row, chunk * kChunk, std::min(kChunk, length - chunk * kChunk));
  };
  const bool split = chunks > 1 && n < 2 * int64_t(torch::stable::get_num_threads());
  if (!split) {
    parallel(n, length, [&](int64_t i) {
      State state = State::empty();
      const R k = temperatures[rows[i]].k;
      for (int64_t c = 0; c < chunks; ++c) {
        state = merge(state, on_chunk(sums, rows[i], c), k);
      }
      finish(rows[i], state);
      for (int64_t c = chunks; c-- > 0;) on_chunk(write, rows[i], c);
    });
    return;
  }
  std::vector<State> states(n * chunks);
  parallel(n * chunks, kChunk,
           [&](int64_t i) { states[i] = on_chunk(sums, rows[i / chunks], i % chunks); });
  for (int64_t i = 0; i < n; ++i) {
    State state = State::empty();
    const R k = temperatures[rows[i]].k;
    for (int64_t c = 0; c < chunks; ++c) state = merge(state, states[i * chunks + c], k);
    finish(rows[i], state);
  }
  parallel(n * chunks, kChunk, [&](int64_t i) { on_chunk(write, rows[i / chunks], i % chunks); });
}

// write(row, begin, n) for every chunk of every row.
template <class Write>
void write_rows(int64_t rows, int64_t length, const Write& write) {
  const int64_t chunks = (length + kChunk - 1) / kChunk;
  parallel(rows * chunks, std::min(length, kChunk), [&](int64_t i) {
    const int64_t begin = i % chunks * kChunk;
    write(i / chunks, begin, std::min(kChunk, length - begin));
  });
}

constexpr auto no_write = [](int64_t, int64_t, int64_t) {};

// Indices of the positions that count; all n without a mask.
inline std::vector<int64_t> counted_rows(const OptionalTensor& mask, int64_t n) {
  const OptionalTensor held = packed(mask);
  const bool* counts = data_or_null<bool>(held);
  std::vector<int64_t> rows;
  rows.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!counts || counts[i]) rows.push_back(i);
  }
  return rows;
}

// Raises for an id outside [0, vocabulary) in the given rows.
inline void check_ids(const Ids& ids, const std::vector<int64_t>& rows, int64_t vocabulary,
                      const std::vector<int64_t>& shape) {
  for (const int64_t row : rows) {
    if (ids[row] < 0 || ids[row] >= vocabulary) {
      value_error("tokens must be in [0, ", vocabulary, "), got ", ids[row], " at ",
                  position(shape, row));
    }
  }
}

// Raises for a number of the given rows that is none; there may be no tensor.
template <class R>
void check_finite(const char* name, const R* x, const std::vector<int64_t>& rows,
                  const std::vector<int64_t>& shape) {
  if (!x) return;
  for (const int64_t row : rows) {
    if (!std::isfinite(x[row])) {
      const char* got = std::isnan(x[row]) ? "nan" : x[row] > 0 ? "inf" : "-inf";
      value_error(name, " must be finite where they count, got ", got, " at ",
                  position(shape, row));
    }
  }
}

// Raises for a temperature of the given rows that is none; without a tensor they have one.
inline void check_temperatures(const OptionalTensor& temperatures, const std::vector<int64_t>& rows,
                               const std::vector<int64_t>& shape) {
  if (!temperatures) return;
  const double* of = data<double>(*temperatures);
  for (const int64_t row : rows) {
    if (!(of[row] > 0 && std::isfinite(of[row]))) {
      value_error("temperature must be finite and > 0, got ", of[row], " at ",
                  position(shape, row));
    }
  }
}

}  // namespace ppo::cpu
