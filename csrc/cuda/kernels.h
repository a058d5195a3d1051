// The kernels that calls.h asks of a device, on CUDA.
#pragma once

#include <optional>

#include "problem.h"

namespace resnest_fused::cuda {

struct Kernels {
  // All phases: split_attention.cu.
  static void forward(const Map& map, const Mlp& mlp, const Tensor& out, const TrainResults* train);
  static void backward(const Map& map, const Mlp& mlp, const Tensor& dout,
                       const SavedArguments& saved, const GradientResults& grads);

  // One phase each: phases.cu.
  static void batch_statistics(const Map& map, const Tensor& mean, const Tensor& var);
  static void pool(const Map& map, const Tensor& gap);
  static void recombine(const Map& map, const Tensor& attention, const Tensor& out);
  static void pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,
                            const Tensor& sums);
  static void prologue_backward(const Problem& problem, const Tensor& sums, const Tensor& attention,
                                const Tensor& dgap, const Tensor& dweight, const Tensor& dbias);
  static void recombine_backward(const Map& map, const Tensor& dout, const Tensor& attention,
                                 const Tensor& dgap, const std::optional<Tensor>& mean_dz,
                                 const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx);
};

}  // namespace resnest_fused::cuda
