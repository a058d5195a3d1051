// The CPU implementations of the ops that run all phases.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace resnest_fused::cpu {

// out
Tensor split_attention(Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                       std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                       std::optional<Tensor> bn0_var, double bn0_eps, Tensor fc1_weight,
                       std::optional<Tensor> fc1_bias, Tensor fc2_weight,
                       std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
                       std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean,
                       std::optional<Tensor> bn1_var, double bn1_eps, int64_t radix,
                       int64_t cardinality);

// out, gap, hidden, attention, and the batch's mean and biased variance for bn0 and for bn1
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_train(
    Tensor x, bool relu, std::optional<Tensor> bn0_weight, std::optional<Tensor> bn0_bias,
    std::optional<Tensor> bn0_mean, std::optional<Tensor> bn0_var, double bn0_eps,
    bool bn0_batch_stats, Tensor fc1_weight, std::optional<Tensor> fc1_bias, Tensor fc2_weight,
    std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
    std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
    double bn1_eps, bool bn1_batch_stats, int64_t radix, int64_t cardinality);

// dx, dbn0_weight, dbn0_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dbn1_weight,
// dbn1_bias; without elements where not needed
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
split_attention_backward(Tensor dout, Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                         std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                         std::optional<Tensor> bn0_var, double bn0_eps, bool bn0_batch_stats,
                         Tensor fc1_weight, Tensor fc2_weight, std::optional<Tensor> bn1_weight,
                         std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean,
                         std::optional<Tensor> bn1_var, double bn1_eps, bool bn1_batch_stats,
                         Tensor gap, Tensor hidden, Tensor attention, int64_t radix,
                         int64_t cardinality, std::vector<bool> needed);

}  // namespace resnest_fused::cpu
