// One validated call: its sizes, layout and dtype, shared by every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace resnest_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Layout { kNchw, kNhwc };

struct Problem {
  int64_t batch;
  int64_t radix;
  int64_t cardinality;
  int64_t channels;  // of the output; x has radix * channels
  int64_t inter;     // inter_channels, the width between the FCs
  int64_t height;
  int64_t width;
  Layout layout;
  ScalarType dtype;  // of x and out

  int64_t pixels() const { return height * width; }
  int64_t features() const { return radix * channels; }
  int64_t group_channels() const { return channels / cardinality; }
  int64_t group_inter() const { return inter / cardinality; }
};

// The parameters as the ops receive them; float32 or x's dtype.
struct Parameters {
  Tensor fc1_weight;                 // (I, C/K, 1, 1)
  std::optional<Tensor> fc1_bias;    // (I)
  Tensor fc2_weight;                 // (R*C, I/K, 1, 1)
  std::optional<Tensor> fc2_bias;    // (R*C)
  std::optional<Tensor> bn1_weight;  // (I)
  std::optional<Tensor> bn1_bias;    // (I)
  std::optional<Tensor> bn1_mean;    // (I)
  std::optional<Tensor> bn1_var;     // (I), biased
  double bn1_eps;
  bool batch_stats;  // bn1 normalises with statistics of this batch

  bool has_bn1() const { return batch_stats || bn1_mean.has_value(); }
};

// Check what memory safety needs of x and the parameters, make the parameters contiguous, and
// describe the call. Throws (RuntimeError in Python) naming the tensor.
Problem make_problem(const Tensor& x, Parameters& params, int64_t radix, int64_t cardinality);

// The tensor in the given layout: itself, or one contiguous copy.
Tensor in_layout(const Tensor& tensor, Layout layout);

// A fresh (batch, features, H, W) tensor in the problem's dtype and layout on x's device.
Tensor empty_map(const Problem& problem, int64_t features, const Tensor& x);

// A fresh contiguous tensor on x's device.
Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Throw unless the tensor has exactly this shape and device.
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                 const Tensor& x);

}  // namespace resnest_fused
