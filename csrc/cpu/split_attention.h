// The CPU implementations of the ops in ops.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace resnest_fused::cpu {

// out
Tensor split_attention(Tensor x, Tensor fc1_weight, std::optional<Tensor> fc1_bias,
                       Tensor fc2_weight, std::optional<Tensor> fc2_bias,
                       std::optional<Tensor> bn1_weight, std::optional<Tensor> bn1_bias,
                       std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
                       double bn1_eps, int64_t radix, int64_t cardinality);

// out, gap, hidden, attention, batch mean, biased batch var
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_train(
    Tensor x, Tensor fc1_weight, std::optional<Tensor> fc1_bias, Tensor fc2_weight,
    std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
    std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
    double bn1_eps, bool batch_stats, int64_t radix, int64_t cardinality);

// dx, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dbn1_weight, dbn1_bias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_backward(
    Tensor dout, Tensor x, Tensor fc1_weight, Tensor fc2_weight, std::optional<Tensor> bn1_weight,
    std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
    Tensor gap, Tensor hidden, Tensor attention, double bn1_eps, bool batch_stats, int64_t radix,
    int64_t cardinality, std::vector<bool> needed);

}  // namespace resnest_fused::cpu
