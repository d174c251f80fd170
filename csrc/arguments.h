// What every launcher checks of its tensors before it reads one: whoever calls a registered op by
// hand, with whatever it may be, gets an error and no access outside of a tensor.
#pragma once

#include <algorithm>
#include <string>

#include "tensors.h"

namespace ppo {

// An argument as its op declares it, "name:kind".
//   logits  (..., V) floats, from which follow device, dtype and the shape of what is per token
//   like    logits' shape and dtype
//   floats  of any shape, from which that of what is per token follows
//   rows    the same in two dimensions; scanned: in two unless there are `bounds`
//   ids, real, mask   per token: integers, floats, bool
//   exact   per token, in the dtype of results
//   stats   two of these per token
//   number  one float; double: in fp64
//   bounds  integers in one dimension, at least one
//   row     a float for each row of `rows`; trajectory: for each but one of `bounds`
//   scalarsN  N numbers or more in fp64, on the CPU
//   other   no tensor
struct Argument {
  std::string name, kind;
};

inline std::vector<Argument> arguments_of(const char* declared) {
  std::istringstream words(declared);
  std::vector<Argument> arguments;
  for (std::string word; words >> word;) {
    const size_t colon = word.find(':');
    arguments.push_back({word.substr(0, colon), word.substr(colon + 1)});
  }
  return arguments;
}

inline bool is_floating(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline bool is_integer(const Tensor& x) {
  return x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int;
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t d = 0; d < shape.size(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

class ArgumentCheck {
 public:
  // The tensor that the others are to be like.
  void anchor(const Argument& argument, const Tensor& x) {
    const std::string& kind = argument.kind;
    if (kind == "bounds") bounds_ = x.numel();
    if (!leads(kind)) return;
    first_ = &x;
    per_token_ = shape(x);
    if (kind == "logits") {
      if (per_token_.empty() || per_token_.back() == 0) {
        value_error(argument.name, " must have shape (..., V) with V >= 1, got ", text(shape(x)));
      }
      per_token_.pop_back();
    }
  }

  void check(const Argument& argument, const Tensor& x) const {
    const auto& [name, kind] = argument;
    const auto require = [&](bool kept, const char* rule) {
      if (!kept) value_error(name, " must be ", rule);
    };
    if (kind.starts_with("scalars")) {
      require(x.scalar_type() == ScalarType::Double && x.is_cpu() && x.is_contiguous() &&
                  x.numel() >= std::stoll(kind.substr(7)),
              "contiguous float64 numbers on the CPU, one for each of the call");
      return;
    }
    require(x.is_cpu() == first_->is_cpu() &&
                (x.is_cpu() || x.get_device_index() == first_->get_device_index()),
            "on the device of the other tensors");
    if (kind == "ids" || kind == "bounds") {
      require(is_integer(x), "int64 or int32");
    } else if (kind == "mask") {
      require(x.scalar_type() == ScalarType::Bool, "bool");
    } else {
      require(is_floating(x), "float32, float64, bfloat16 or float16");
    }
    const ScalarType dtype = first_->scalar_type();
    const ScalarType real = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    if (kind == "like") require(x.scalar_type() == dtype, "of the logits' dtype");
    if (kind == "exact" || kind == "stats")
      require(x.scalar_type() == real, "of the results' dtype");
    if (kind == "double") require(x.scalar_type() == ScalarType::Double, "float64");
    if (kind == "number" || kind == "double") {
      require(x.numel() == 1, "one number");
    } else if (kind == "bounds") {
      require(shape(x).size() == 1 && x.numel() > 0, "in one dimension, with one element or more");
    } else if (kind == "rows" || (kind == "scanned" && !bounds_)) {
      if (per_token_.size() != 2) {
        value_error(name, " must have two dimensions, got ", text(per_token_));
      }
    } else if (!leads(kind)) {
      const auto expected = shape_of(kind);
      if (shape(x) != expected) {
        value_error(name, " must have shape ", text(expected), ", got ", text(shape(x)));
      }
    }
  }

 private:
  // Whether others are to be like an argument of this kind.
  static bool leads(const std::string& kind) {
    return kind == "logits" || kind == "floats" || kind == "rows" || kind == "scanned";
  }

  std::vector<int64_t> shape_of(const std::string& kind) const {
    if (kind == "like") return shape(*first_);
    if (kind == "trajectory") return {*bounds_ - 1};
    std::vector<int64_t> expected = per_token_;
    if (kind == "stats") expected.push_back(2);
    if (kind == "row") expected.pop_back();
    return expected;
  }

  const Tensor* first_ = nullptr;
  std::vector<int64_t> per_token_;
  std::optional<int64_t> bounds_;
};

template <class F>
void on_tensor(const Tensor& x, const F& f) {
  f(x);
}
template <class F>
void on_tensor(const OptionalTensor& x, const F& f) {
  if (x) f(*x);
}
template <class Other, class F>
void on_tensor(const Other&, const F&) {}

// f(argument, tensor) for all tensors that are there.
template <class F, class... Given>
void for_tensors(const std::vector<Argument>& arguments, const F& f, const Given&... given) {
  size_t i = 0;
  (on_tensor(given, [&, at = i++](const Tensor& x) { f(arguments[at], x); }), ...);
}

template <size_t n>
struct Declared {
  char text[n];
  constexpr Declared(const char (&given)[n]) { std::copy_n(given, n, text); }
  constexpr size_t count() const { return 1 + std::count(text, text + n, ' '); }
};

// By the launcher's type, for nvcc does not match a specialisation by a value of class type.
template <const auto& declared, auto launcher, class Function = decltype(launcher)>
struct Checked;

template <const auto& declared, auto launcher, class Result, class... Given>
struct Checked<declared, launcher, Result (*)(Given...)> {
  static_assert(declared.count() == sizeof...(Given));

  static Result call(Given... given) {
    static const std::vector<Argument> arguments = arguments_of(declared.text);
    ArgumentCheck check;
    for_tensors(arguments, [&](auto& argument, auto& x) { check.anchor(argument, x); }, given...);
    for_tensors(arguments, [&](auto& argument, auto& x) { check.check(argument, x); }, given...);
    return launcher(given...);
  }
};

// A launcher for `m.impl`, behind the check of what it declares.
#define PPO_CHECKED(declared, launcher) TORCH_BOX((&::ppo::Checked<declared, launcher>::call))

#define PPO_TEMPERATURES "temperatures:real scalars:scalars1"
#define PPO_LOSS_OF_LOGITS                                                                  \
  "logits:logits tokens:ids old_logprobs:real advantages:real mask:mask ref_logprobs:real " \
  "denominator:double temperatures:real scalars:scalars6 kl_estimator:other"

// Of each op, as `schemas.py` names its arguments.
constexpr Declared kTokenLogprobs("logits:logits tokens:ids mask:mask " PPO_TEMPERATURES);
constexpr Declared kTokenLogprobsBackward(
    "grad_logprobs:real grad_entropy:real logits:logits tokens:ids entropy:exact "
    "softmax_stats:stats " PPO_TEMPERATURES);
constexpr Declared kSampleTokens(
    "logits:logits uniforms:real mask:mask temperatures:real scalars:scalars4");
constexpr Declared kKLDivergence("logits:logits ref_logits:like mask:mask " PPO_TEMPERATURES);
constexpr Declared kKLDivergenceBackward(
    "grad_kl:real logits:logits ref_logits:like kl:exact softmax_stats:stats "
    "ref_softmax_stats:stats " PPO_TEMPERATURES);
constexpr Declared kKLEstimate("logprobs:floats ref_logprobs:real estimator:other");
constexpr Declared kGAE(
    "rewards:rows values:real mask:mask dones:mask bootstrap_values:row scalars:scalars2");
constexpr Declared kGAEPacked(
    "rewards:floats values:real cu_seqlens:bounds mask:mask dones:mask "
    "bootstrap_values:trajectory scalars:scalars2");
constexpr Declared kDiscountedSums("x:scanned decays:real mask:mask dones:mask cu_seqlens:bounds");
constexpr Declared kPPOLoss(PPO_LOSS_OF_LOGITS);
constexpr Declared kRowDivision("logits:logits");
constexpr Declared kRescale("grad:logits scale:number");
constexpr Declared kClippedPolicyLoss(
    "logprobs:floats old_logprobs:real advantages:real mask:mask denominator:double "
    "scalars:scalars3");
constexpr Declared kValueLoss(
    "values:floats old_values:real returns:real mask:mask denominator:double scalars:scalars1");
constexpr Declared kMaskedMean("x:floats mask:mask denominator:double");
constexpr Declared kMaskedWhiten("x:floats mask:mask scalars:scalars1");

#undef PPO_TEMPERATURES
#undef PPO_LOSS_OF_LOGITS

}  // namespace ppo
