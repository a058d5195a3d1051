// One validated call: its sizes, layout, dtype and tensors, shared by every device.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "ops_generated.h"

namespace resnest_fused {

using torch::headeronly::ScalarType;

enum class Layout { kNchw, kNhwc };

// The dtype of sums over elements of this one.
inline ScalarType acc_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

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
  ScalarType acc() const { return acc_of(dtype); }
};

// Whether there is a norm: it has statistics, or will take those of the batch.
inline bool is_present(const NormArguments& bn) { return bn.batch_stats || bn.mean.has_value(); }

// The checked map: its tensor in the problem's layout, and the prologue z = relu(bn0(x)), relu(x)
// or x. The problem has cardinality 1 and inter 0 if there are no FCs.
struct Map : MapArguments {
  NormArguments bn0;
  Problem problem;
};

// The layers between gap and logits.
struct Mlp : FcArguments {
  NormArguments bn1;
};

// A norm's running statistics, and the batch's over so many elements a feature, which they take in.
struct Running : RunningArguments {
  int64_t features;  // 0 where there is nothing to update
  int64_t elements;

  // From the batch's biased variance to the unbiased one.
  double correction() const {
    return static_cast<double>(elements) / static_cast<double>(elements - 1);
  }
};

// A gradient without elements is not needed.
inline bool is_needed(const Tensor& gradient) { return gradient.numel() > 0; }

// The functions below check what memory safety needs. They throw an exception (RuntimeError in
// Python) that names the tensor. Parameters must have x's dtype or float32; those given are made
// contiguous.

// The map, brought into one of the layouts, without FCs.
Map make_map(MapArguments args, NormArguments bn0);

// The FCs and bn1 behind the map. Sets the map's cardinality and inter.
Mlp take_mlp(Map& map, FcArguments fcs, NormArguments bn1);

// dout, brought into x's layout.
void take_dout(const Map& map, Tensor& dout);

// Sums that this library computed. They must have this shape and the accumulator's dtype, and are
// made contiguous.
void take_sums(const char* name, Tensor& sums, std::initializer_list<int64_t> sizes,
               const Problem& problem, const Tensor& x);

// Running statistics, contiguous, of x's dtype or float32.
Running take_running(const std::string& name, RunningArguments args, int64_t elements,
                     const Tensor& x);

// A fresh (batch, features, H, W) tensor in x's dtype and layout and on its device.
Tensor empty_map(const Map& map, int64_t features);

// A fresh contiguous tensor on x's device.
Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype);

}  // namespace resnest_fused
