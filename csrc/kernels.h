// The kernels that calls.h asks of a device, declared once for all devices, and for all instruction
// sets of the CPU. Their files are in <device>/, the CPU's in cpu/kernels/.
#pragma once

#include <optional>

#include "problem.h"

// A macro, because each device has the class in a namespace of its own.
#define RF_KERNELS(device)                                                                       \
  namespace resnest_fused::device {                                                              \
  struct Kernels {                                                                               \
    /* All phases: split_attention. */                                                           \
    static void forward(const Map& map, const Mlp& mlp, const Tensor& out,                       \
                        const TrainResults* train);                                              \
    static void backward(const Map& map, const Mlp& mlp, const Tensor& dout,                     \
                         const SavedArguments& saved, const GradientResults& grads);             \
    /* One phase each: phases. */                                                                \
    static void batch_statistics(const Map& map, const Tensor& mean, const Tensor& var);         \
    static void pool(const Map& map, const Tensor& gap);                                         \
    static void recombine(const Map& map, const Tensor& attention, const Tensor& out);           \
    static void pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,      \
                              const Tensor& sums);                                               \
    static void prologue_backward(const Problem& problem, const Tensor& sums,                    \
                                  const Tensor& attention, const Tensor& dgap,                   \
                                  const Tensor& dweight, const Tensor& dbias);                   \
    static void recombine_backward(const Map& map, const Tensor& dout, const Tensor& attention,  \
                                   const Tensor& dgap, const std::optional<Tensor>& mean_dz,     \
                                   const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx); \
    /* After a forward. */                                                                       \
    static void update_running_statistics(const Tensor& x, const Running (&norms)[2]);           \
  };                                                                                             \
  }
RF_KERNELS(cpu)
RF_KERNELS(cuda)
