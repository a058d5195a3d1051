// The CPU implementations of the ops that run a single phase, between which any module may stand.
#pragma once

#include <optional>
#include <tuple>

#include "problem.h"

namespace resnest_fused::cpu {

// mean and biased variance of x by feature
std::tuple<Tensor, Tensor> batch_statistics(Tensor x);

// gap
Tensor pool(Tensor x, bool relu, std::optional<Tensor> bn0_weight, std::optional<Tensor> bn0_bias,
            std::optional<Tensor> bn0_mean, std::optional<Tensor> bn0_var, double bn0_eps,
            int64_t radix);

// out
Tensor recombine(Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                 std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                 std::optional<Tensor> bn0_var, double bn0_eps, Tensor attention);

// dattention, and with a prologue the sums that prologue.h names
std::tuple<Tensor, Tensor> pool_backward(Tensor dout, Tensor x, bool relu,
                                         std::optional<Tensor> bn0_weight,
                                         std::optional<Tensor> bn0_bias,
                                         std::optional<Tensor> bn0_mean,
                                         std::optional<Tensor> bn0_var, double bn0_eps,
                                         int64_t radix);

// dbn0_weight, dbn0_bias
std::tuple<Tensor, Tensor> prologue_backward(Tensor sums, Tensor attention, Tensor dgap,
                                             int64_t pixels);

// dx; without mean_dz and mean_dz_xhat for frozen statistics
Tensor recombine_backward(Tensor dout, Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                          std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                          std::optional<Tensor> bn0_var, double bn0_eps, Tensor attention,
                          Tensor dgap, std::optional<Tensor> mean_dz,
                          std::optional<Tensor> mean_dz_xhat);

}  // namespace resnest_fused::cpu
