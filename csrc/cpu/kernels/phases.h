// Single phases on the CPU: how threads share each.
#pragma once

#include <memory>

#include "cpu/huge_pages.h"
#include "cpu/kernels/pool.h"
#include "cpu/kernels/recombine.h"
#include "cpu/kernels/tensors.h"
#include "cpu/work_items.h"
#include "kernels.h"

namespace resnest_fused::cpu::RF_SET {

// Call f(T{}, prologue) in the map's dtype T.
template <typename F>
void with_prologue(const Map& map, const F& f) {
  for_dtype(map.problem.dtype, [&](auto tag) { f(tag, make_prologue<Acc<decltype(tag)>>(map)); });
}

// Call f(begin, end) on work items of the map.
template <typename T, typename F>
void for_items(const Problem& p, const F& f) {
  parallel_items(p.batch * items_per_sample(p), item_bytes(p, sizeof(T)), f);
}

void Kernels::batch_statistics(const Map& map, const Tensor& mean, const Tensor& var) {
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    RF_SET::batch_statistics<T>(map.problem, const_data<T>(map.x), data<A>(mean), data<A>(var));
  });
}

void Kernels::pool(const Map& map, const Tensor& gap) {
  const Problem& p = map.problem;
  with_prologue(map, [&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) * p.channels);
    for_items<T>(p, [&](int64_t begin, int64_t end) {
      pool_items<T>(p, prologue, const_data<T>(map.x), begin, end, partial.get());
    });
    pool_finish<A>(p, partial.get(), data<A>(gap));
  });
}

void Kernels::recombine(const Map& map, const Tensor& attention, const Tensor& out) {
  const Problem& p = map.problem;
  advise_huge_pages(out);
  with_prologue(map, [&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    for_items<T>(p, [&](int64_t begin, int64_t end) {
      recombine_items<T>(p, prologue, const_data<T>(map.x), const_data<Acc<T>>(attention), begin,
                         end, data<T>(out));
    });
  });
}

void Kernels::pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,
                            const Tensor& sums) {
  const Problem& p = map.problem;
  with_prologue(map, [&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) *
                                          pool_backward_sums(prologue) * p.features());
    for_items<T>(p, [&](int64_t begin, int64_t end) {
      pool_backward_items<T>(p, prologue, const_data<T>(dout), const_data<T>(map.x), begin, end,
                             partial.get());
    });
    pool_backward_finish<A>(p, prologue, partial.get(),
                            data<A>(prologue.active ? sums : dattention));
    if (prologue.active) {
      prologue_dattention<A>(p, prologue, data<A>(sums), data<A>(dattention));
    }
  });
}

void Kernels::prologue_backward(const Problem& p, const Tensor& sums, const Tensor& attention,
                                const Tensor& dgap, const Tensor& dweight, const Tensor& dbias) {
  for_dtype(p.dtype, [&](auto tag) {
    using A = Acc<decltype(tag)>;
    RF_SET::prologue_backward<A>(p, const_data<A>(sums), const_data<A>(attention),
                                 const_data<A>(dgap), data<A>(dweight), data<A>(dbias));
  });
}

void Kernels::recombine_backward(const Map& map, const Tensor& dout, const Tensor& attention,
                                 const Tensor& dgap, const std::optional<Tensor>& mean_dz,
                                 const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx) {
  const Problem& p = map.problem;
  advise_huge_pages(dx);
  with_prologue(map, [&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    StatisticsGradient<A> statistics;
    if (mean_dz.has_value()) {
      statistics =
          statistics_gradient(prologue, const_data<A>(*mean_dz), const_data<A>(*mean_dz_xhat));
    }
    for_items<T>(p, [&](int64_t begin, int64_t end) {
      recombine_backward_items<T>(p, prologue, statistics, const_data<T>(dout),
                                  const_data<T>(map.x), const_data<A>(attention),
                                  const_data<A>(dgap), begin, end, data<T>(dx));
    });
  });
}

}  // namespace resnest_fused::cpu::RF_SET
