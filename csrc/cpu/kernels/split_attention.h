// All phases on the CPU: their order, and how threads share them.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/pool.h"
#include "cpu/kernels/recombine.h"
#include "cpu/kernels/tensors.h"
#include "cpu/work_items.h"
#include "kernels.h"

namespace resnest_fused::cpu::RF_SET {

// Bytes of x that one thread takes through all three phases at a time. Recombine then finds them in
// L2: 2 MB was 20% slower at 128@28x28, B=32, on a Xeon with 1.25 MB of it.
constexpr int64_t kBlockBytes = 1024 * 1024;

inline int64_t sample_elements(const Problem& p) { return p.features() * p.pixels(); }

inline int64_t weight_elements(const Problem& p) {
  return p.inter * p.group_channels() + p.features() * p.group_inter();
}

// Whether each thread takes samples of its own through all phases; else threads share each phase,
// and each reads a share of the FCs' weights. A thread on its own reads all weights for every block
// of samples: they must be few beside its samples and beside a block.
inline bool by_sample(const Problem& p, int64_t weight_bytes) {
  const int64_t threads = thread_count();
  const bool balanced = p.batch >= kItemsPerThread * threads || p.batch % threads == 0;
  return threads == 1 || (balanced && 2 * weight_bytes <= kBlockBytes &&
                          p.batch * sample_elements(p) >= threads * weight_elements(p));
}

template <typename A>
struct SavedPointers {
  A* gap;        // (B, C)
  A* hidden;     // (B, I)
  A* attention;  // (B, R, C)
  A* bn0_mean;   // (R*C), the batch's statistics: written only where they normalise
  A* bn0_var;    // (R*C)
  A* bn1_mean;   // (I)
  A* bn1_var;    // (I)
};

template <typename T>
void forward(const Map& map, const Mlp& mlp, const SavedPointers<Acc<T>>& saved, T* out) {
  using A = Acc<T>;
  const Problem& p = map.problem;
  const NormArguments &bn0 = map.bn0, &bn1 = mlp.bn1;
  const T* x = const_data<T>(map.x);
  const StoredWeight<A> fc1_weight(mlp.fc1_weight), fc2_weight(mlp.fc2_weight);
  const Widened<A> fc1_bias(mlp.fc1_bias), fc2_bias(mlp.fc2_bias);
  AttentionParameters<A> params{fc1_weight.get(), fc1_bias.get(), fc2_weight.get(), fc2_bias.get(),
                                make_norm<A>(bn1, p.inter)};
  auto prologue = make_prologue<A>(map);
  if (bn0.batch_stats) {
    batch_statistics(p, x, saved.bn0_mean, saved.bn0_var);
    prologue.bn0.set_statistics(saved.bn0_mean, saved.bn0_var, bn0.eps);
    prologue.set_scale_and_shift();
  }
  const int64_t items = items_per_sample(p);
  const auto partial_buffer = uninitialized<A>(p.batch * partials_per_sample(p) * p.channels);
  A* const partial = partial_buffer.get();

  const int64_t weight_bytes =
      weight_elements(p) * static_cast<int64_t>(mlp.fc1_weight.element_size());
  if (!bn1.batch_stats && by_sample(p, weight_bytes)) {
    const int64_t sample_bytes = sample_elements(p) * static_cast<int64_t>(sizeof(T));
    // Each block reads the weights again, so it should not be smaller than they are.
    const int64_t block = std::max<int64_t>(std::max(kBlockBytes, weight_bytes) / sample_bytes, 1);
    parallel_items(p.batch, sample_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b += block) {
        const int64_t last = std::min(b + block, end);
        pool_items(p, prologue, x, b * items, last * items, partial);
        pool_finish<A>(p, partial, b * p.channels, last * p.channels, saved.gap);
        A* const hidden = saved.hidden + b * p.inter;
        A* const attention = saved.attention + b * p.features();
        attention_hidden<A>(p, params, last - b, saved.gap + b * p.channels, hidden);
        attention_from_hidden<A>(p, params, last - b, hidden, attention);
        recombine_items<T>(p, prologue, x, saved.attention, b * items, last * items, out);
      }
    });
    return;
  }

  const int64_t bytes = item_bytes(p, sizeof(T));
  parallel_items(p.batch * items, bytes, [&](int64_t begin, int64_t end) {
    pool_items(p, prologue, x, begin, end, partial);
  });
  pool_finish<A>(p, partial, saved.gap);
  attention_hidden<A>(p, params, p.batch, saved.gap, saved.hidden);
  if (bn1.batch_stats) {
    attention_batch_stats<A>(p, saved.hidden, saved.bn1_mean, saved.bn1_var);
    params.bn1.set_statistics(saved.bn1_mean, saved.bn1_var, bn1.eps);
  }
  attention_from_hidden<A>(p, params, p.batch, saved.hidden, saved.attention);
  parallel_items(p.batch * items, bytes, [&](int64_t begin, int64_t end) {
    recombine_items<T>(p, prologue, x, saved.attention, begin, end, out);
  });
}

template <typename T>
void backward(const Map& map, const Mlp& mlp, const Tensor& dout_tensor,
              const SavedArguments& saved, const GradientResults& grads) {
  using A = Acc<T>;
  const Problem& p = map.problem;
  const NormArguments &bn0 = map.bn0, &bn1 = mlp.bn1;
  const T* dout = const_data<T>(dout_tensor);
  const T* x = const_data<T>(map.x);
  const A* a = const_data<A>(saved.attention);
  const StoredWeight<A> fc1_weight(mlp.fc1_weight), fc2_weight(mlp.fc2_weight);
  const AttentionParameters<A> params{fc1_weight.get(), nullptr, fc2_weight.get(), nullptr,
                                      make_norm<A>(bn1, p.inter)};
  const auto prologue = make_prologue<A>(map);

  const bool needs_dx = is_needed(grads.dx);
  const bool needs_bn0 =
      is_needed(grads.dbn0_weight) || is_needed(grads.dbn0_bias) || (needs_dx && bn0.batch_stats);
  const Gradient<A> dbn0_weight(grads.dbn0_weight), dbn0_bias(grads.dbn0_bias);
  const Gradient<A> dfc1_weight(grads.dfc1_weight), dfc1_bias(grads.dfc1_bias);
  const Gradient<A> dfc2_weight(grads.dfc2_weight), dfc2_bias(grads.dfc2_bias);
  const Gradient<A> dbn1_weight(grads.dbn1_weight), dbn1_bias(grads.dbn1_bias);

  const int64_t items = p.batch * items_per_sample(p);
  const int64_t bytes = item_bytes(p, sizeof(T));
  const int64_t sample_sums = pool_backward_sums(prologue) * p.features();
  const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) * sample_sums);
  parallel_items(items, bytes, [&](int64_t begin, int64_t end) {
    pool_backward_items(p, prologue, dout, x, begin, end, partial.get());
  });
  const auto sums = uninitialized<A>(p.batch * sample_sums);
  pool_backward_finish<A>(p, prologue, partial.get(), sums.get());
  const A* dattention = sums.get();
  std::unique_ptr<A[]> dattention_buffer;
  if (prologue.active) {
    dattention_buffer = uninitialized<A>(p.batch * p.features());
    prologue_dattention<A>(p, prologue, sums.get(), dattention_buffer.get());
    dattention = dattention_buffer.get();
  }

  const auto dgap = uninitialized<A>(p.batch * p.channels);
  attention_backward<A>(
      p, params, bn1.batch_stats, const_data<A>(saved.gap), const_data<A>(saved.hidden), a,
      dattention,
      {needs_dx || needs_bn0 ? dgap.get() : nullptr, dfc1_weight.get(), dfc1_bias.get(),
       dfc2_weight.get(), dfc2_bias.get(), dbn1_weight.get(), dbn1_bias.get()});

  StatisticsGradient<A> statistics;
  if (needs_bn0) {
    const auto spare = uninitialized<A>(2 * p.features());
    A* const dgamma = dbn0_weight.get() ? dbn0_weight.get() : spare.get();
    A* const dbeta = dbn0_bias.get() ? dbn0_bias.get() : spare.get() + p.features();
    prologue_backward<A>(p, sums.get(), a, dgap.get(), dgamma, dbeta);
    if (needs_dx && bn0.batch_stats) {
      std::vector<A> mean_dz(dbeta, dbeta + p.features());
      std::vector<A> mean_dz_xhat(dgamma, dgamma + p.features());
      const A scale = A(1) / static_cast<A>(p.batch * p.pixels());
      for (int64_t f = 0; f < p.features(); ++f) {
        mean_dz[f] *= scale;
        mean_dz_xhat[f] *= scale;
      }
      statistics = statistics_gradient<A>(prologue, mean_dz.data(), mean_dz_xhat.data());
    }
  }
  if (needs_dx) {
    advise_huge_pages(grads.dx);
    parallel_items(items, bytes, [&](int64_t begin, int64_t end) {
      recombine_backward_items<T>(p, prologue, statistics, dout, x, a, dgap.get(), begin, end,
                                  data<T>(grads.dx));
    });
  }
  for (const auto* grad : {&dbn0_weight, &dbn0_bias, &dfc1_weight, &dfc1_bias, &dfc2_weight,
                           &dfc2_bias, &dbn1_weight, &dbn1_bias}) {
    grad->store();
  }
}

void Kernels::forward(const Map& map, const Mlp& mlp, const Tensor& out,
                      const TrainResults* train) {
  const Problem& p = map.problem;
  advise_huge_pages(out);
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    if (train) {
      RF_SET::forward<T>(map, mlp,
                         {data<A>(train->gap), data<A>(train->hidden), data<A>(train->attention),
                          data<A>(train->bn0_mean), data<A>(train->bn0_var),
                          data<A>(train->bn1_mean), data<A>(train->bn1_var)},
                         data<T>(out));
      return;
    }
    const auto scratch = uninitialized<A>(p.batch * (p.channels + p.inter + p.features()));
    A* const gap = scratch.get();
    A* const hidden = gap + p.batch * p.channels;
    A* const attention = hidden + p.batch * p.inter;
    RF_SET::forward<T>(map, mlp, {gap, hidden, attention, nullptr, nullptr, nullptr, nullptr},
                       data<T>(out));
  });
}

void Kernels::backward(const Map& map, const Mlp& mlp, const Tensor& dout,
                       const SavedArguments& saved, const GradientResults& grads) {
  for_dtype(map.problem.dtype,
            [&](auto tag) { RF_SET::backward<decltype(tag)>(map, mlp, dout, saved, grads); });
}

}  // namespace resnest_fused::cpu::RF_SET
