// Every op's arguments checked and its results allocated, once for all devices.
//
// What a device adds is a type K with the static functions below. They receive checked tensors on
// one device: maps in the problem's layout, all others contiguous. Every result is fresh, and they
// write all of it.
//
//   All phases; crumbs are null in evaluation.
//     forward(const Map&, const AttentionTensors&, const Tensor& out, const Crumbs* crumbs)
//   Its gradients. The AttentionTensors lack the FCs' biases; statistics are in the norms, those of
//   the batch too.
//     backward(const Map&, const AttentionTensors&, const Tensor& dout, const Tensor& gap,
//              const Tensor& hidden, const Tensor& attention, const Gradients&)
//
//   One phase each. mean_dz and mean_dz_xhat, the means of dz and of dz * xhat over batch and
//   pixels, are given where bn0's statistics are the batch's.
//     batch_statistics(const Map&, const Tensor& mean, const Tensor& var)
//     pool(const Map&, const Tensor& gap)
//     recombine(const Map&, const Tensor& attention, const Tensor& out)
//     pool_backward(const Map&, const Tensor& dout, const Tensor& dattention, const Tensor& sums)
//     prologue_backward(const Problem&, const Tensor& sums, const Tensor& attention,
//                       const Tensor& dgap, const Tensor& dweight, const Tensor& dbias)
//     recombine_backward(const Map&, const Tensor& dout, const Tensor& attention,
//                        const Tensor& dgap, const std::optional<Tensor>& mean_dz,
//                        const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx)
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"
#include "prologue_sums.h"

namespace resnest_fused {

// The ops as the dispatcher calls them, with the arguments of schemas.h.
template <typename K>
struct Calls {
  using OptionalTensor = std::optional<Tensor>;

  // out
  static Tensor split_attention(Tensor x, bool relu, OptionalTensor bn0_weight,
                                OptionalTensor bn0_bias, OptionalTensor bn0_mean,
                                OptionalTensor bn0_var, double bn0_eps, Tensor fc1_weight,
                                OptionalTensor fc1_bias, Tensor fc2_weight, OptionalTensor fc2_bias,
                                OptionalTensor bn1_weight, OptionalTensor bn1_bias,
                                OptionalTensor bn1_mean, OptionalTensor bn1_var, double bn1_eps,
                                int64_t radix, int64_t cardinality) {
    Map map = make_map(x, radix, {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}});
    AttentionTensors tensors{fc1_weight,
                             fc1_bias,
                             {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, false},
                             fc2_weight,
                             fc2_bias};
    take_attention(map, tensors, cardinality);
    const Tensor out = empty_map(map, map.problem.channels);
    K::forward(map, tensors, out, nullptr);
    return out;
  }

  // out, gap, hidden, attention, and the batch's mean and biased variance for bn0 and for bn1
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
  split_attention_train(Tensor x, bool relu, OptionalTensor bn0_weight, OptionalTensor bn0_bias,
                        OptionalTensor bn0_mean, OptionalTensor bn0_var, double bn0_eps,
                        bool bn0_batch_stats, Tensor fc1_weight, OptionalTensor fc1_bias,
                        Tensor fc2_weight, OptionalTensor fc2_bias, OptionalTensor bn1_weight,
                        OptionalTensor bn1_bias, OptionalTensor bn1_mean, OptionalTensor bn1_var,
                        double bn1_eps, bool bn1_batch_stats, int64_t radix, int64_t cardinality) {
    Map map = make_map(x, radix,
                       {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats}});
    AttentionTensors tensors{fc1_weight,
                             fc1_bias,
                             {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats},
                             fc2_weight,
                             fc2_bias};
    take_attention(map, tensors, cardinality);
    const Problem& p = map.problem;
    const Tensor out = empty_map(map, p.channels);
    const auto crumb = [&](std::initializer_list<int64_t> sizes) {
      return empty_on(map.x, sizes, p.acc());
    };
    const int64_t bn0_size = bn0_batch_stats ? p.features() : 0;
    const int64_t bn1_size = bn1_batch_stats ? p.inter : 0;
    const Crumbs crumbs{crumb({p.batch, p.channels}),
                        crumb({p.batch, p.inter}),
                        crumb({p.batch, p.radix, p.channels}),
                        crumb({bn0_size}),
                        crumb({bn0_size}),
                        crumb({bn1_size}),
                        crumb({bn1_size})};
    K::forward(map, tensors, out, &crumbs);
    return {out,
            crumbs.gap,
            crumbs.hidden,
            crumbs.attention,
            crumbs.bn0_mean,
            crumbs.bn0_var,
            crumbs.bn1_mean,
            crumbs.bn1_var};
  }

  // dx, dbn0_weight, dbn0_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dbn1_weight,
  // dbn1_bias; without elements where not needed
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
  split_attention_backward(Tensor dout, Tensor x, bool relu, OptionalTensor bn0_weight,
                           OptionalTensor bn0_bias, OptionalTensor bn0_mean, OptionalTensor bn0_var,
                           double bn0_eps, bool bn0_batch_stats, Tensor fc1_weight,
                           Tensor fc2_weight, OptionalTensor bn1_weight, OptionalTensor bn1_bias,
                           OptionalTensor bn1_mean, OptionalTensor bn1_var, double bn1_eps,
                           bool bn1_batch_stats, Tensor gap, Tensor hidden, Tensor attention,
                           int64_t radix, int64_t cardinality, std::vector<bool> needed) {
    Map map = make_map(x, radix,
                       {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats}});
    AttentionTensors tensors{fc1_weight,
                             std::nullopt,
                             {bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats},
                             fc2_weight,
                             std::nullopt};
    take_attention(map, tensors, cardinality);
    STD_TORCH_CHECK(needed.size() == 9, "needed: expected 9 flags, got ", needed.size());
    STD_TORCH_CHECK(relu || !(needed[1] || needed[2]),
                    "needed: bn0 has no gradients where it is not given");
    const Problem& p = map.problem;
    take_dout(map, dout);
    take_crumb("gap", gap, {p.batch, p.channels}, p, map.x);
    take_crumb("hidden", hidden, {p.batch, p.inter}, p, map.x);
    take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, map.x);

    Gradients grads;
    const auto absent = [&](ScalarType dtype) { return empty_on(map.x, {0}, dtype); };
    if (needed[0]) {
      grads.x = empty_map(map, p.features());
    }
    const auto parameter = [&](OptionalTensor& grad, bool is_needed,
                               std::initializer_list<int64_t> sizes, ScalarType dtype) {
      if (is_needed) {
        grad = empty_on(map.x, sizes, dtype);
      }
      return is_needed ? *grad : absent(dtype);
    };
    const auto dtype_of = [&](const OptionalTensor& of_norm) {
      return of_norm.has_value() ? of_norm->scalar_type() : p.dtype;
    };
    const NormTensors &bn0 = map.prologue.bn0, &bn1 = tensors.bn1;
    const ScalarType fc1_dtype = tensors.fc1_weight.scalar_type();
    const ScalarType fc2_dtype = tensors.fc2_weight.scalar_type();
    const std::tuple results{
        needed[0] ? *grads.x : absent(p.dtype),
        parameter(grads.bn0_weight, needed[1], {p.features()}, dtype_of(bn0.weight)),
        parameter(grads.bn0_bias, needed[2], {p.features()}, dtype_of(bn0.bias)),
        parameter(grads.fc1_weight, needed[3], {p.inter, p.group_channels(), 1, 1}, fc1_dtype),
        parameter(grads.fc1_bias, needed[4], {p.inter}, fc1_dtype),
        parameter(grads.fc2_weight, needed[5], {p.features(), p.group_inter(), 1, 1}, fc2_dtype),
        parameter(grads.fc2_bias, needed[6], {p.features()}, fc2_dtype),
        parameter(grads.bn1_weight, needed[7], {p.inter}, dtype_of(bn1.weight)),
        parameter(grads.bn1_bias, needed[8], {p.inter}, dtype_of(bn1.bias))};
    K::backward(map, tensors, dout, gap, hidden, attention, grads);
    return results;
  }

  // mean and biased variance of x by feature
  static std::tuple<Tensor, Tensor> batch_statistics(Tensor x) {
    const Map map = make_map(x, 1, {});
    const Problem& p = map.problem;
    const Tensor mean = empty_on(map.x, {p.features()}, p.acc());
    const Tensor var = empty_on(map.x, {p.features()}, p.acc());
    K::batch_statistics(map, mean, var);
    return {mean, var};
  }

  // gap
  static Tensor pool(Tensor x, bool relu, OptionalTensor bn0_weight, OptionalTensor bn0_bias,
                     OptionalTensor bn0_mean, OptionalTensor bn0_var, double bn0_eps,
                     int64_t radix) {
    const Map map =
        make_map(x, radix, {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}});
    const Problem& p = map.problem;
    const Tensor gap = empty_on(map.x, {p.batch, p.channels}, p.acc());
    K::pool(map, gap);
    return gap;
  }

  // out
  static Tensor recombine(Tensor x, bool relu, OptionalTensor bn0_weight, OptionalTensor bn0_bias,
                          OptionalTensor bn0_mean, OptionalTensor bn0_var, double bn0_eps,
                          Tensor attention) {
    const Map map = make_map(x, radix_of(attention),
                             {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}});
    const Problem& p = map.problem;
    take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, map.x);
    const Tensor out = empty_map(map, p.channels);
    K::recombine(map, attention, out);
    return out;
  }

  // dattention, and with a prologue the sums that prologue_sums.h names, else no elements
  static std::tuple<Tensor, Tensor> pool_backward(Tensor dout, Tensor x, bool relu,
                                                  OptionalTensor bn0_weight,
                                                  OptionalTensor bn0_bias, OptionalTensor bn0_mean,
                                                  OptionalTensor bn0_var, double bn0_eps,
                                                  int64_t radix) {
    const Map map =
        make_map(x, radix, {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}});
    const Problem& p = map.problem;
    take_dout(map, dout);
    const Tensor dattention = empty_on(map.x, {p.batch, p.radix, p.channels}, p.acc());
    const Tensor sums =
        relu ? empty_on(map.x, {p.batch, kPrologueSums, p.radix, p.channels}, p.acc())
             : empty_on(map.x, {0}, p.acc());
    K::pool_backward(map, dout, dattention, sums);
    return {dattention, sums};
  }

  // dbn0_weight, dbn0_bias
  static std::tuple<Tensor, Tensor> prologue_backward(Tensor sums, Tensor attention, Tensor dgap,
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
    K::prologue_backward(p, sums, attention, dgap, dweight, dbias);
    return {dweight, dbias};
  }

  // dx; without mean_dz and mean_dz_xhat for frozen statistics
  static Tensor recombine_backward(Tensor dout, Tensor x, bool relu, OptionalTensor bn0_weight,
                                   OptionalTensor bn0_bias, OptionalTensor bn0_mean,
                                   OptionalTensor bn0_var, double bn0_eps, Tensor attention,
                                   Tensor dgap, OptionalTensor mean_dz,
                                   OptionalTensor mean_dz_xhat) {
    const Map map = make_map(x, radix_of(attention),
                             {relu, {bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, false}});
    const Problem& p = map.problem;
    take_dout(map, dout);
    take_crumb("attention", attention, {p.batch, p.radix, p.channels}, p, map.x);
    take_crumb("dgap", dgap, {p.batch, p.channels}, p, map.x);
    STD_TORCH_CHECK(mean_dz.has_value() == mean_dz_xhat.has_value() &&
                        (!mean_dz.has_value() || map.prologue.bn0.present()),
                    "mean_dz, mean_dz_xhat: expected both or neither, and neither without bn0");
    for (auto* mean : {&mean_dz, &mean_dz_xhat}) {
      if (mean->has_value()) {
        take_crumb("mean_dz, mean_dz_xhat", **mean, {p.features()}, p, map.x);
      }
    }
    const Tensor dx = empty_map(map, p.features());
    K::recombine_backward(map, dout, attention, dgap, mean_dz, mean_dz_xhat, dx);
    return dx;
  }
};

// Register every op with kernels K on m, the handle that STABLE_TORCH_LIBRARY_IMPL gives.
template <typename K, typename Library>
void implement_ops(Library& m) {
  m.impl("split_attention", TORCH_BOX(&Calls<K>::split_attention));
  m.impl("split_attention_train", TORCH_BOX(&Calls<K>::split_attention_train));
  m.impl("split_attention_backward", TORCH_BOX(&Calls<K>::split_attention_backward));
  m.impl("batch_statistics", TORCH_BOX(&Calls<K>::batch_statistics));
  m.impl("pool", TORCH_BOX(&Calls<K>::pool));
  m.impl("recombine", TORCH_BOX(&Calls<K>::recombine));
  m.impl("pool_backward", TORCH_BOX(&Calls<K>::pool_backward));
  m.impl("prologue_backward", TORCH_BOX(&Calls<K>::prologue_backward));
  m.impl("recombine_backward", TORCH_BOX(&Calls<K>::recombine_backward));
}

}  // namespace resnest_fused
