// The ops of single phases on the CPU.
#include "cpu/phases.h"

#include <memory>

#include "cpu/pool.h"
#include "cpu/recombine.h"
#include "cpu/tensors.h"
#include "cpu/units.h"

namespace resnest_fused::cpu {
namespace {

// The map and its prologue, checked; x in its layout.
struct Map {
  PrologueTensors tensors;
  Problem problem;

  Map(Tensor& x, bool relu, std::optional<Tensor>& weight, std::optional<Tensor>& bias,
      std::optional<Tensor>& mean, std::optional<Tensor>& var, double eps, int64_t radix)
      : tensors{relu, {weight, bias, mean, var, eps, false}}, problem(make_problem(x, radix)) {
    take_prologue(problem, tensors, x);
    x = in_layout(x, problem.layout);
  }

  // Call f<T> with the prologue, in x's type.
  template <typename F>
  void run(const F& f) const {
    for_dtype(problem.dtype, [&](auto tag) {
      using T = decltype(tag);
      f(tag, make_prologue<Acc<T>>(problem, tensors));
    });
  }
};

// Call f(begin, end) on units of the map.
template <typename T, typename F>
void for_units(const Problem& p, const F& f) {
  parallel_units(p.batch * units_per_sample(p), unit_bytes(p, sizeof(T)), f);
}

int64_t radix_of(const Tensor& attention) {
  STD_TORCH_CHECK(attention.dim() == 3, "attention: expected 3 dimensions (B, R, C)");
  return attention.size(1);
}

}  // namespace

std::tuple<Tensor, Tensor> batch_statistics(Tensor x) {
  const Problem p = make_problem(x, 1);
  x = in_layout(x, p.layout);
  const Tensor mean = empty_on(x, {p.features()}, p.acc());
  const Tensor var = empty_on(x, {p.features()}, p.acc());
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    batch_statistics<T>(p, const_data<T>(x), data<A>(mean), data<A>(var));
  });
  return {mean, var};
}

Tensor pool(Tensor x, bool relu, std::optional<Tensor> bn0_weight, std::optional<Tensor> bn0_bias,
            std::optional<Tensor> bn0_mean, std::optional<Tensor> bn0_var, double bn0_eps,
            int64_t radix) {
  const Map map(x, relu, bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, radix);
  const Problem& p = map.problem;
  const Tensor gap = empty_on(x, {p.batch, p.channels}, p.acc());
  map.run([&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) * p.channels);
    for_units<T>(p, [&](int64_t begin, int64_t end) {
      pool_units<T>(p, prologue, const_data<T>(x), begin, end, partial.get());
    });
    pool_finish<A>(p, partial.get(), 0, p.batch, data<A>(gap));
  });
  return gap;
}

Tensor recombine(Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                 std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                 std::optional<Tensor> bn0_var, double bn0_eps, Tensor attention) {
  const Map map(x, relu, bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, radix_of(attention));
  const Problem& p = map.problem;
  take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, x);
  const Tensor out = empty_map(p, p.channels, x);
  advise_huge_pages(out);
  map.run([&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    for_units<T>(p, [&](int64_t begin, int64_t end) {
      recombine_units<T>(p, prologue, const_data<T>(x), const_data<Acc<T>>(attention), begin, end,
                         data<T>(out));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pool_backward(Tensor dout, Tensor x, bool relu,
                                         std::optional<Tensor> bn0_weight,
                                         std::optional<Tensor> bn0_bias,
                                         std::optional<Tensor> bn0_mean,
                                         std::optional<Tensor> bn0_var, double bn0_eps,
                                         int64_t radix) {
  const Map map(x, relu, bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, radix);
  const Problem& p = map.problem;
  take_dout(p, dout, x);
  const Tensor dattention = empty_on(x, {p.batch, p.radix, p.channels}, p.acc());
  const Tensor sums = relu ? empty_on(x, {p.batch, kPrologueSums, p.radix, p.channels}, p.acc())
                           : empty_on(x, {0}, p.acc());
  map.run([&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) *
                                          pool_backward_sums(prologue) * p.features());
    for_units<T>(p, [&](int64_t begin, int64_t end) {
      pool_backward_units<T>(p, prologue, const_data<T>(dout), const_data<T>(x), begin, end,
                             partial.get());
    });
    pool_backward_finish<A>(p, prologue, partial.get(), 0, p.batch,
                            data<A>(relu ? sums : dattention));
    if (relu) {
      prologue_dattention<A>(p, prologue, data<A>(sums), data<A>(dattention));
    }
  });
  return {dattention, sums};
}

std::tuple<Tensor, Tensor> prologue_backward(Tensor sums, Tensor attention, Tensor dgap,
                                             int64_t pixels) {
  STD_TORCH_CHECK(sums.dim() == 4 && sums.size(1) == kPrologueSums,
                  "sums: expected the shape (B, 4, R, C)");
  STD_TORCH_CHECK(pixels > 0, "pixels: expected at least 1, got ", pixels);
  Problem p{};
  p.batch = sums.size(0);
  p.radix = sums.size(2);
  p.channels = sums.size(3);
  p.height = pixels;
  p.width = 1;
  p.dtype = sums.scalar_type();
  take_crumb("sums", sums, {p.batch, kPrologueSums, p.radix, p.channels}, p, sums);
  take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, sums);
  take_crumb("dgap", dgap, {p.batch, p.channels}, p, sums);
  const Tensor dweight = empty_on(sums, {p.features()}, p.dtype);
  const Tensor dbias = empty_on(sums, {p.features()}, p.dtype);
  for_dtype(p.dtype, [&](auto tag) {
    using A = Acc<decltype(tag)>;
    prologue_backward<A>(p, const_data<A>(sums), const_data<A>(attention), const_data<A>(dgap),
                         data<A>(dweight), data<A>(dbias));
  });
  return {dweight, dbias};
}

Tensor recombine_backward(Tensor dout, Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                          std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                          std::optional<Tensor> bn0_var, double bn0_eps, Tensor attention,
                          Tensor dgap, std::optional<Tensor> mean_dz,
                          std::optional<Tensor> mean_dz_xhat) {
  const Map map(x, relu, bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, radix_of(attention));
  const Problem& p = map.problem;
  take_dout(p, dout, x);
  take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, x);
  take_crumb("dgap", dgap, {p.batch, p.channels}, p, x);
  STD_TORCH_CHECK(mean_dz.has_value() == mean_dz_xhat.has_value() &&
                      (!mean_dz.has_value() || map.tensors.bn0.present()),
                  "mean_dz, mean_dz_xhat: expected both or neither, and neither without bn0");
  for (auto* mean : {&mean_dz, &mean_dz_xhat}) {
    if (mean->has_value()) {
      take_crumb("mean_dz, mean_dz_xhat", **mean, {p.features()}, p, x);
    }
  }
  const Tensor dx = empty_map(p, p.features(), x);
  advise_huge_pages(dx);
  map.run([&](auto tag, const auto& prologue) {
    using T = decltype(tag);
    using A = Acc<T>;
    StatisticsGradient<A> statistics;
    if (mean_dz.has_value()) {
      statistics =
          statistics_gradient(prologue, const_data<A>(*mean_dz), const_data<A>(*mean_dz_xhat));
    }
    for_units<T>(p, [&](int64_t begin, int64_t end) {
      recombine_backward_units<T>(p, prologue, statistics, const_data<T>(dout), const_data<T>(x),
                                  const_data<A>(attention), const_data<A>(dgap), begin, end,
                                  data<T>(dx));
    });
  });
  return dx;
}

}  // namespace resnest_fused::cpu
