// One validated call: its sizes, layout, dtype and tensors, shared by every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
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

// The map x with what it goes through.
struct Map {
  Problem problem;  // cardinality 1 and inter 0 where there are no FCs
  Tensor x;         // (B, R*C, H, W), in the problem's layout
  PrologueTensors prologue;
};

// What the forward in training hands on, in the accumulator's dtype; statistics without elements
// where they are not the batch's.
struct Crumbs {
  Tensor gap;        // (B, C)
  Tensor hidden;     // (B, I)
  Tensor attention;  // (B, R, C)
  Tensor bn0_mean;   // (R*C)
  Tensor bn0_var;    // (R*C), biased
  Tensor bn1_mean;   // (I)
  Tensor bn1_var;    // (I), biased
};

// The gradients, in the order of the op's results, each of the shape and the dtype of what it
// belongs to; absent where not needed.
struct Gradients {
  std::optional<Tensor> x;
  std::optional<Tensor> bn0_weight;
  std::optional<Tensor> bn0_bias;
  std::optional<Tensor> fc1_weight;
  std::optional<Tensor> fc1_bias;
  std::optional<Tensor> fc2_weight;
  std::optional<Tensor> fc2_bias;
  std::optional<Tensor> bn1_weight;
  std::optional<Tensor> bn1_bias;
};

// The functions below check what memory safety needs and throw (RuntimeError in Python) naming the
// tensor. Parameters have x's dtype or float32; those given are made contiguous.

// The map x in `radix` splits, brought into one of the layouts; no FCs as yet.
Map make_map(const Tensor& x, int64_t radix, PrologueTensors prologue);

// The FCs and bn1 behind the map; sets its cardinality and inter.
void take_attention(Map& map, AttentionTensors& tensors, int64_t cardinality);

// dout, brought into x's layout.
void take_dout(const Map& map, Tensor& dout);

// A crumb that this library made: of this shape, in the accumulator's dtype, made contiguous.
void take_crumb(const char* name, Tensor& crumb, std::initializer_list<int64_t> sizes,
                const Problem& problem, const Tensor& x);

// The radix of an attention (B, R, C).
int64_t radix_of(const Tensor& attention);

// A fresh (batch, features, H, W) tensor in x's dtype and layout and on its device.
Tensor empty_map(const Map& map, int64_t features);

// A fresh contiguous tensor on x's device.
Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype);

}  // namespace resnest_fused
