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
  ScalarType acc() const {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

// A batch normalisation as the ops receive it; absent without statistics.
struct NormTensors {
  std::optional<Tensor> weight;  // (F)
  std::optional<Tensor> bias;    // (F)
  std::optional<Tensor> mean;    // (F)
  std::optional<Tensor> var;     // (F), biased
  double eps;
  bool batch_stats;  // normalise with statistics of this batch

  bool present() const { return batch_stats || mean.has_value(); }
};

// The prologue: z = relu(bn0(x)), relu(x), or x.
struct PrologueTensors {
  bool relu;
  NormTensors bn0;
};

// What stands between gap and logits.
struct AttentionTensors {
  Tensor fc1_weight;               // (I, C/K, 1, 1)
  std::optional<Tensor> fc1_bias;  // (I)
  NormTensors bn1;
  Tensor fc2_weight;               // (R*C, I/K, 1, 1)
  std::optional<Tensor> fc2_bias;  // (R*C)
};

// The three functions below check what memory safety needs and throw (RuntimeError in Python)
// naming the tensor. Parameters have x's dtype or float32; those given are made contiguous.

// The map that x is, in `radix` splits; cardinality 1 and no FCs.
Problem make_problem(const Tensor& x, int64_t radix);
void take_prologue(const Problem& problem, PrologueTensors& tensors, const Tensor& x);
// Also sets the problem's cardinality and inter.
void take_attention(Problem& problem, AttentionTensors& tensors, int64_t cardinality,
                    const Tensor& x);

// A crumb that this library made: of this shape, in the accumulator's dtype, made contiguous.
void take_crumb(const char* name, Tensor& crumb, std::initializer_list<int64_t> sizes,
                const Problem& problem, const Tensor& x);

// dout, checked and in x's layout.
void take_dout(const Problem& problem, Tensor& dout, const Tensor& x);

// The tensor in the given layout: itself, or one contiguous copy.
Tensor in_layout(const Tensor& tensor, Layout layout);

// A fresh (batch, features, H, W) tensor in the problem's dtype and layout on x's device.
Tensor empty_map(const Problem& problem, int64_t features, const Tensor& x);

// A fresh contiguous tensor on x's device.
Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype);

}  // namespace resnest_fused
