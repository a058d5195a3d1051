// From the ops' tensors to what the kernels take, and back: dtypes and norms.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/norm.h"
#include "cpu/kernels/prologue.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "problem.h"

namespace resnest_fused::cpu::RF_SET {

// to[i] = from[i] in another dtype, rounding once; float64 meets only float32.
template <typename To, typename From>
void convert(const From* from, int64_t count, To* to) {
  using V = Vec<float>;
  constexpr int64_t kChunk = 4096;
  parallel_items((count + kChunk - 1) / kChunk, kChunk * (sizeof(To) + sizeof(From)),
                 [&](int64_t begin, int64_t end) {
                   const int64_t first = begin * kChunk, last = std::min(end * kChunk, count);
                   if constexpr (sizeof(To) + sizeof(From) >= 12) {
                     std::copy(from + first, from + last, to + first);
                   } else {
                     for (int64_t i = first; i < last; i += kLanes<V>) {
                       store_lanes(to + i, load_lanes<V>(from + i, last - i), last - i);
                     }
                   }
                 });
}

// Whether a parameter of type P may stand beside accumulators A: float32, or x's own dtype.
template <typename A, typename P>
inline constexpr bool kMeets = std::is_same_v<P, float> || kReads<A, P>;

// A parameter in the accumulator's type: in place if it has that already, else converted.
template <typename A>
class Widened {
 public:
  explicit Widened(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) {
      return;
    }
    for_dtype(tensor->scalar_type(), [&](auto tag) {
      using P = decltype(tag);
      const P* from = static_cast<const P*>(tensor->const_data_ptr());
      if constexpr (std::is_same_v<P, A>) {
        data_ = from;
      } else if constexpr (kMeets<A, P>) {
        const int64_t count = tensor->numel();
        owned_ = uninitialized<A>(count);
        convert(from, count, owned_.get());
        data_ = owned_.get();
      }
    });
  }

  const A* get() const { return data_; }

  std::vector<A> vector(int64_t size, A otherwise) const {
    return data_ ? std::vector<A>(data_, data_ + size)
                 : std::vector<A>(static_cast<size_t>(size), otherwise);
  }

 private:
  const A* data_ = nullptr;
  std::unique_ptr<A[]> owned_;
};

// An FC's weight as the kernels read it: as it is stored, except float32 beside float64.
template <typename A>
class StoredWeight {
 public:
  explicit StoredWeight(const Tensor& tensor)
      : widened_(std::is_same_v<A, double> ? std::optional(tensor) : std::nullopt),
        weight_{tensor.const_data_ptr(), tensor.scalar_type()} {
    if constexpr (std::is_same_v<A, double>) {
      weight_ = {widened_.get(), ScalarType::Double};
    }
  }

  Weight get() const { return weight_; }

 private:
  Widened<A> widened_;
  Weight weight_;
};

// The norm over F features with its own statistics; those of the batch come later.
template <typename A>
Norm<A> make_norm(const NormArguments& tensors, int64_t features) {
  Norm<A> norm;
  norm.mean.assign(static_cast<size_t>(features), A{});
  norm.invstd.assign(static_cast<size_t>(features), A(1));
  norm.gamma = Widened<A>(tensors.weight).vector(features, A(1));
  norm.beta = Widened<A>(tensors.bias).vector(features, A{});
  if (tensors.mean.has_value()) {
    const Widened<A> mean(tensors.mean), var(tensors.var);
    norm.set_statistics(mean.get(), var.get(), tensors.eps);
  }
  return norm;
}

template <typename A>
Prologue<A> make_prologue(const Map& map) {
  Prologue<A> prologue;
  prologue.active = map.relu;
  if (prologue.active) {
    prologue.bn0 = make_norm<A>(map.bn0, map.problem.features());
    prologue.set_scale_and_shift();
  }
  return prologue;
}

template <typename A>
const A* const_data(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

template <typename A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// A gradient in the accumulator's type on its way to a tensor of its parameter's dtype.
template <typename A>
class Gradient {
 public:
  explicit Gradient(const Tensor& tensor) : tensor_(tensor) {
    if (is_needed(tensor) && tensor.scalar_type() != kAccDtype<A>) {
      buffer_ = uninitialized<A>(tensor.numel());
    }
  }

  // Null where the gradient is not needed.
  A* get() const {
    return buffer_ ? buffer_.get() : is_needed(tensor_) ? data<A>(tensor_) : nullptr;
  }

  // Write the gradient into the tensor, unless it is there already.
  void store() const {
    if (!buffer_) {
      return;
    }
    for_dtype(tensor_.scalar_type(), [&](auto tag) {
      using P = decltype(tag);
      if constexpr (kMeets<A, P> && !std::is_same_v<A, P>) {
        convert(buffer_.get(), tensor_.numel(), data<P>(tensor_));
      }
    });
  }

 private:
  Tensor tensor_;
  std::unique_ptr<A[]> buffer_;
};

}  // namespace resnest_fused::cpu::RF_SET
