// The ops on the CPU that run all phases: the order of the phases, and how threads share them.
#include "cpu/split_attention.h"

#include <algorithm>
#include <memory>

#include "cpu/attention.h"
#include "cpu/pool.h"
#include "cpu/recombine.h"
#include "cpu/tensors.h"
#include "cpu/units.h"

namespace resnest_fused::cpu {
namespace {

// Bytes of x that one thread takes through all three phases at a time, so that recombine finds them
// in L2 (2 MB was 20% slower at 128@28x28, B=32, on a Xeon with 1.25 MB of it).
constexpr int64_t kBlockBytes = 1024 * 1024;

int64_t sample_elements(const Problem& p) { return p.features() * p.pixels(); }

int64_t weight_elements(const Problem& p) {
  return p.inter * p.group_channels() + p.features() * p.group_inter();
}

// Whether each thread takes samples of its own through all phases; else threads share each phase,
// and each reads a share of the FCs' weights. On its own a thread reads all of them, for every
// block of samples: they must be few beside its samples and beside a block.
bool by_sample(const Problem& p, int64_t weight_bytes) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool balanced = p.batch >= 4 * threads || p.batch % threads == 0;
  return threads == 1 || (balanced && 2 * weight_bytes <= kBlockBytes &&
                          p.batch * sample_elements(p) >= threads * weight_elements(p));
}

template <typename A>
struct Crumbs {
  A* gap;        // (B, C)
  A* hidden;     // (B, I)
  A* attention;  // (B, R, C)
  A* bn0_mean;   // (R*C), the batch's statistics: written only where they normalise
  A* bn0_var;    // (R*C)
  A* bn1_mean;   // (I)
  A* bn1_var;    // (I)
};

template <typename T>
void forward(const Problem& p, const T* x, const PrologueTensors& prologue_tensors,
             const AttentionTensors& tensors, const Crumbs<Acc<T>>& crumbs, T* out) {
  using A = Acc<T>;
  const StoredWeight<A> fc1_weight(tensors.fc1_weight), fc2_weight(tensors.fc2_weight);
  const Widened<A> fc1_bias(tensors.fc1_bias), fc2_bias(tensors.fc2_bias);
  AttentionParameters<A> params{fc1_weight.get(), fc1_bias.get(), fc2_weight.get(), fc2_bias.get(),
                                make_norm<A>(tensors.bn1, p.inter)};
  auto prologue = make_prologue<A>(p, prologue_tensors);
  if (prologue_tensors.bn0.batch_stats) {
    batch_statistics(p, x, crumbs.bn0_mean, crumbs.bn0_var);
    prologue.bn0.set_statistics(crumbs.bn0_mean, crumbs.bn0_var, prologue_tensors.bn0.eps);
    prologue.set_scale_and_shift();
  }
  const int64_t units = units_per_sample(p);
  const auto partial_buffer = uninitialized<A>(p.batch * partials_per_sample(p) * p.channels);
  A* const partial = partial_buffer.get();

  const int64_t weight_bytes =
      weight_elements(p) * static_cast<int64_t>(tensors.fc1_weight.element_size());
  if (!tensors.bn1.batch_stats && by_sample(p, weight_bytes)) {
    const int64_t sample_bytes = sample_elements(p) * static_cast<int64_t>(sizeof(T));
    // Each block reads the weights again, so it should not be smaller than they are.
    const int64_t block = std::max<int64_t>(std::max(kBlockBytes, weight_bytes) / sample_bytes, 1);
    parallel_units(p.batch, sample_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b += block) {
        const int64_t last = std::min(b + block, end);
        pool_units(p, prologue, x, b * units, last * units, partial);
        pool_finish<A>(p, partial, b, last, crumbs.gap);
        A* const hidden = crumbs.hidden + b * p.inter;
        A* const attention = crumbs.attention + b * p.features();
        attention_hidden<A>(p, params, last - b, crumbs.gap + b * p.channels, hidden);
        attention_from_hidden<A>(p, params, last - b, hidden, attention);
        recombine_units<T>(p, prologue, x, crumbs.attention, b * units, last * units, out);
      }
    });
    return;
  }

  const int64_t bytes = unit_bytes(p, sizeof(T));
  parallel_units(p.batch * units, bytes, [&](int64_t begin, int64_t end) {
    pool_units(p, prologue, x, begin, end, partial);
  });
  pool_finish<A>(p, partial, 0, p.batch, crumbs.gap);
  attention_hidden<A>(p, params, p.batch, crumbs.gap, crumbs.hidden);
  if (tensors.bn1.batch_stats) {
    attention_batch_stats<A>(p, crumbs.hidden, crumbs.bn1_mean, crumbs.bn1_var);
    params.bn1.set_statistics(crumbs.bn1_mean, crumbs.bn1_var, tensors.bn1.eps);
  }
  attention_from_hidden<A>(p, params, p.batch, crumbs.hidden, crumbs.attention);
  parallel_units(p.batch * units, bytes, [&](int64_t begin, int64_t end) {
    recombine_units<T>(p, prologue, x, crumbs.attention, begin, end, out);
  });
}

ScalarType dtype_of(const std::optional<Tensor>& tensor, ScalarType otherwise) {
  return tensor.has_value() ? tensor->scalar_type() : otherwise;
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Problem& p, const Tensor& dout_tensor, const Tensor& x_tensor,
                   const PrologueTensors& prologue_tensors, const AttentionTensors& tensors,
                   const Tensor& gap, const Tensor& hidden, const Tensor& attention,
                   const std::vector<bool>& needed) {
  using A = Acc<T>;
  const T* dout = const_data<T>(dout_tensor);
  const T* x = const_data<T>(x_tensor);
  const A* a = const_data<A>(attention);
  const NormTensors &bn0 = prologue_tensors.bn0, &bn1 = tensors.bn1;
  const StoredWeight<A> fc1_weight(tensors.fc1_weight), fc2_weight(tensors.fc2_weight);
  const AttentionParameters<A> params{fc1_weight.get(), nullptr, fc2_weight.get(), nullptr,
                                      make_norm<A>(bn1, p.inter)};
  const auto prologue = make_prologue<A>(p, prologue_tensors);

  const bool needs_dx = needed[0];
  const bool needs_bn0 = needed[1] || needed[2] || (needs_dx && bn0.batch_stats);
  const ScalarType fc1_dtype = tensors.fc1_weight.scalar_type();
  const ScalarType fc2_dtype = tensors.fc2_weight.scalar_type();
  const Tensor dx =
      needs_dx ? empty_map(p, p.features(), x_tensor) : empty_on(x_tensor, {0}, p.dtype);
  Gradient<A> dbn0_weight(needed[1], x_tensor, {p.features()}, dtype_of(bn0.weight, p.dtype));
  Gradient<A> dbn0_bias(needed[2], x_tensor, {p.features()}, dtype_of(bn0.bias, p.dtype));
  Gradient<A> dfc1_weight(needed[3], x_tensor, {p.inter, p.group_channels(), 1, 1}, fc1_dtype);
  Gradient<A> dfc1_bias(needed[4], x_tensor, {p.inter}, fc1_dtype);
  Gradient<A> dfc2_weight(needed[5], x_tensor, {p.features(), p.group_inter(), 1, 1}, fc2_dtype);
  Gradient<A> dfc2_bias(needed[6], x_tensor, {p.features()}, fc2_dtype);
  Gradient<A> dbn1_weight(needed[7], x_tensor, {p.inter}, dtype_of(bn1.weight, p.dtype));
  Gradient<A> dbn1_bias(needed[8], x_tensor, {p.inter}, dtype_of(bn1.bias, p.dtype));

  const int64_t units = p.batch * units_per_sample(p);
  const int64_t bytes = unit_bytes(p, sizeof(T));
  const int64_t sample_sums = pool_backward_sums(prologue) * p.features();
  const auto partial = uninitialized<A>(p.batch * partials_per_sample(p) * sample_sums);
  parallel_units(units, bytes, [&](int64_t begin, int64_t end) {
    pool_backward_units(p, prologue, dout, x, begin, end, partial.get());
  });
  const auto sums = uninitialized<A>(p.batch * sample_sums);
  pool_backward_finish<A>(p, prologue, partial.get(), 0, p.batch, sums.get());
  const A* dattention = sums.get();
  std::unique_ptr<A[]> dattention_buffer;
  if (prologue.active) {
    dattention_buffer = uninitialized<A>(p.batch * p.features());
    prologue_dattention<A>(p, prologue, sums.get(), dattention_buffer.get());
    dattention = dattention_buffer.get();
  }

  const auto dgap = uninitialized<A>(p.batch * p.channels);
  attention_backward<A>(
      p, params, bn1.batch_stats, const_data<A>(gap), const_data<A>(hidden), a, dattention,
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
    advise_huge_pages(dx);
    parallel_units(units, bytes, [&](int64_t begin, int64_t end) {
      recombine_backward_units<T>(p, prologue, statistics, dout, x, a, dgap.get(), begin, end,
                                  data<T>(dx));
    });
  }
  return {dx,
          dbn0_weight.take(),
          dbn0_bias.take(),
          dfc1_weight.take(),
          dfc1_bias.take(),
          dfc2_weight.take(),
          dfc2_bias.take(),
          dbn1_weight.take(),
          dbn1_bias.take()};
}

}  // namespace

Tensor split_attention(Tensor x, bool relu, std::optional<Tensor> bn0_weight,
                       std::optional<Tensor> bn0_bias, std::optional<Tensor> bn0_mean,
                       std::optional<Tensor> bn0_var, double bn0_eps, Tensor fc1_weight,
                       std::optional<Tensor> fc1_bias, Tensor fc2_weight,
                       std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
                       std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean,
                       std::optional<Tensor> bn1_var, double bn1_eps, int64_t radix,
                       int64_t cardinality) {
  PrologueTensors prologue{relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}};
  AttentionTensors tensors{fc1_weight,
                           fc1_bias,
                           {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, false},
                           fc2_weight,
                           fc2_bias};
  Problem p = make_problem(x, radix);
  take_prologue(p, prologue, x);
  take_attention(p, tensors, cardinality, x);
  x = in_layout(x, p.layout);
  const Tensor out = empty_map(p, p.channels, x);
  advise_huge_pages(out);
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto crumbs = uninitialized<A>(p.batch * (p.channels + p.inter + p.features()));
    A* const gap = crumbs.get();
    A* const hidden = gap + p.batch * p.channels;
    A* const attention = hidden + p.batch * p.inter;
    forward<T>(p, const_data<T>(x), prologue, tensors,
               {gap, hidden, attention, nullptr, nullptr, nullptr, nullptr}, data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_train(
    Tensor x, bool relu, std::optional<Tensor> bn0_weight, std::optional<Tensor> bn0_bias,
    std::optional<Tensor> bn0_mean, std::optional<Tensor> bn0_var, double bn0_eps,
    bool bn0_batch_stats, Tensor fc1_weight, std::optional<Tensor> fc1_bias, Tensor fc2_weight,
    std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
    std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
    double bn1_eps, bool bn1_batch_stats, int64_t radix, int64_t cardinality) {
  PrologueTensors prologue{relu,
                           {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats}};
  AttentionTensors tensors{fc1_weight,
                           fc1_bias,
                           {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats},
                           fc2_weight,
                           fc2_bias};
  Problem p = make_problem(x, radix);
  take_prologue(p, prologue, x);
  take_attention(p, tensors, cardinality, x);
  x = in_layout(x, p.layout);
  const Tensor out = empty_map(p, p.channels, x);
  advise_huge_pages(out);
  const Tensor gap = empty_on(x, {p.batch, p.channels}, p.acc());
  const Tensor hidden = empty_on(x, {p.batch, p.inter}, p.acc());
  const Tensor attention = empty_on(x, {p.batch, p.radix, p.channels}, p.acc());
  const int64_t bn0_size = bn0_batch_stats ? p.features() : 0;
  const int64_t bn1_size = bn1_batch_stats ? p.inter : 0;
  const Tensor mean0 = empty_on(x, {bn0_size}, p.acc()), var0 = empty_on(x, {bn0_size}, p.acc());
  const Tensor mean1 = empty_on(x, {bn1_size}, p.acc()), var1 = empty_on(x, {bn1_size}, p.acc());
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    forward<T>(p, const_data<T>(x), prologue, tensors,
               {data<A>(gap), data<A>(hidden), data<A>(attention), data<A>(mean0), data<A>(var0),
                data<A>(mean1), data<A>(var1)},
               data<T>(out));
  });
  return {out, gap, hidden, attention, mean0, var0, mean1, var1};
}

Gradients split_attention_backward(Tensor dout, Tensor x, bool relu,
                                   std::optional<Tensor> bn0_weight, std::optional<Tensor> bn0_bias,
                                   std::optional<Tensor> bn0_mean, std::optional<Tensor> bn0_var,
                                   double bn0_eps, bool bn0_batch_stats, Tensor fc1_weight,
                                   Tensor fc2_weight, std::optional<Tensor> bn1_weight,
                                   std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean,
                                   std::optional<Tensor> bn1_var, double bn1_eps,
                                   bool bn1_batch_stats, Tensor gap, Tensor hidden,
                                   Tensor attention, int64_t radix, int64_t cardinality,
                                   std::vector<bool> needed) {
  PrologueTensors prologue{relu,
                           {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats}};
  AttentionTensors tensors{fc1_weight,
                           std::nullopt,
                           {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats},
                           fc2_weight,
                           std::nullopt};
  Problem p = make_problem(x, radix);
  take_prologue(p, prologue, x);
  take_attention(p, tensors, cardinality, x);
  STD_TORCH_CHECK(needed.size() == 9, "needed: expected 9 flags, got ", needed.size());
  STD_TORCH_CHECK(relu || !(needed[1] || needed[2]),
                  "needed: bn0 has no gradients where it is not given");
  take_dout(p, dout, x);
  take_crumb("gap", gap, {p.batch, p.channels}, p, x);
  take_crumb("hidden", hidden, {p.batch, p.inter}, p, x);
  take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, x);
  x = in_layout(x, p.layout);
  Gradients grads;
  for_dtype(p.dtype, [&](auto tag) {
    grads = backward<decltype(tag)>(p, dout, x, prologue, tensors, gap, hidden, attention, needed);
  });
  return grads;
}

}  // namespace resnest_fused::cpu
