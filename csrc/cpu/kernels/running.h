// Running statistics on the CPU.
#pragma once

#include <cstdint>

#include "cpu/kernels/tensors.h"
#include "formulas.h"
#include "kernels.h"

namespace resnest_fused::cpu::RF_SET {

// One of a norm's two statistics; the batch's is multiplied by `correction` first.
template <typename A>
void update_running(const Tensor& running, const Tensor& batch, A correction, A momentum) {
  using V = Vec<A>;
  for_dtype(running.scalar_type(), [&](auto tag) {
    using P = decltype(tag);
    if constexpr (kMeets<A, P>) {
      P* const to = data<P>(running);
      const A* const from = const_data<A>(batch);
      const int64_t features = running.numel();
      if constexpr (std::is_same_v<A, double> && std::is_same_v<P, float>) {
        for (int64_t f = 0; f < features; ++f) {
          const A before = to[f];
          to[f] = static_cast<P>(running_statistic(before, from[f] * correction, momentum));
        }
      } else {
        for_vectors<V>(features, [&](int64_t f, auto lanes) {
          const V before = load<V>(to + f, lanes), of_batch = load<V>(from + f, lanes) * correction;
          store(to + f, running_statistic(before, of_batch, V{} + momentum), lanes);
        });
      }
    }
  });
}

// A few thousand numbers: for one thread.
void Kernels::update_running_statistics(const Tensor& x, const Running (&norms)[2]) {
  for (const Running& norm : norms) {
    int64_t batches = 0;
    if (norm.num_batches_tracked.has_value()) {
      batches = ++*data<int64_t>(*norm.num_batches_tracked);
    }
    if (norm.features == 0 || norm.elements == 0) {
      continue;
    }
    const double momentum = norm.momentum.value_or(1.0 / static_cast<double>(batches));
    for_dtype(x.scalar_type(), [&](auto tag) {
      using A = Acc<decltype(tag)>;
      const auto weight = static_cast<A>(momentum);
      update_running<A>(*norm.running_mean, *norm.mean, A(1), weight);
      update_running<A>(*norm.running_var, *norm.var, static_cast<A>(norm.correction()), weight);
    });
  }
}

}  // namespace resnest_fused::cpu::RF_SET
