// Checks every op's arguments and allocates its results, once for all devices.
//
// A device adds a type K with the static functions below. They receive checked tensors on one
// device: maps in the problem's layout, all others contiguous. Every result is a fresh tensor, and
// they write all of it.
//
//   All phases; train is null in evaluation.
//     forward(const Map&, const Mlp&, const Tensor& out, const TrainResults* train)
//   Its gradients. The norms have all statistics, those of the batch too.
//     backward(const Map&, const Mlp&, const Tensor& dout, const SavedArguments&,
//              const GradientResults&)
//
//   One phase each. mean_dz and mean_dz_xhat are the means of dz and of dz * xhat over batch and
//   pixels. They are given if bn0's statistics are the batch's.
//     batch_statistics(const Map&, const Tensor& mean, const Tensor& var)
//     pool(const Map&, const Tensor& gap)
//     recombine(const Map&, const Tensor& attention, const Tensor& out)
//     pool_backward(const Map&, const Tensor& dout, const Tensor& dattention, const Tensor& sums)
//     prologue_backward(const Problem&, const Tensor& sums, const Tensor& attention,
//                       const Tensor& dgap, const Tensor& dweight, const Tensor& dbias)
//     recombine_backward(const Map&, const Tensor& dout, const Tensor& attention,
//                        const Tensor& dgap, const std::optional<Tensor>& mean_dz,
//                        const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx)
//
//   The running statistics of bn0 and of bn1, one after the other, as both may be the same.
//     update_running_statistics(const Tensor& x, const Running (&norms)[2])
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "ops_generated.h"
#include "problem.h"
#include "prologue_sums.h"

namespace resnest_fused {

// The ops of resnest_fused/ops.py with kernels K.
template <typename K>
struct Calls {
  static Tensor split_attention(MapArguments map_args, NormArguments bn0, FcArguments fcs,
                                NormArguments bn1) {
    check_no_batch_stats("bn1", bn1);
    Map map = make_phase_map(std::move(map_args), std::move(bn0));
    const Mlp mlp = take_mlp(map, std::move(fcs), std::move(bn1));
    const Tensor out = empty_map(map, map.problem.channels);
    K::forward(map, mlp, out, nullptr);
    return out;
  }

  static TrainResults split_attention_train(MapArguments map_args, NormArguments bn0,
                                            FcArguments fcs, NormArguments bn1) {
    Map map = make_map(std::move(map_args), std::move(bn0));
    const Mlp mlp = take_mlp(map, std::move(fcs), std::move(bn1));
    const Problem& p = map.problem;
    const auto sums = [&](std::initializer_list<int64_t> sizes) {
      return empty_on(map.x, sizes, p.acc());
    };
    const int64_t bn0_size = map.bn0.batch_stats ? p.features() : 0;
    const int64_t bn1_size = mlp.bn1.batch_stats ? p.inter : 0;
    const TrainResults results{empty_map(map, p.channels), sums({p.batch, p.channels}),
                               sums({p.batch, p.inter}),   sums({p.batch, p.radix, p.channels}),
                               sums({bn0_size}),           sums({bn0_size}),
                               sums({bn1_size}),           sums({bn1_size})};
    K::forward(map, mlp, results.out, &results);
    return results;
  }

  static GradientResults split_attention_backward(Tensor dout, MapArguments map_args,
                                                  NormArguments bn0, FcArguments fcs,
                                                  NormArguments bn1, SavedArguments saved,
                                                  const std::vector<bool>& needed) {
    Map map = make_map(std::move(map_args), std::move(bn0));
    const Mlp mlp = take_mlp(map, std::move(fcs), std::move(bn1));
    STD_TORCH_CHECK(needed.size() == 9, "needed: expected 9 flags, got ", needed.size());
    STD_TORCH_CHECK(map.relu || !(needed[1] || needed[2]),
                    "needed: bn0 has gradients only where a ReLU follows");
    const Problem& p = map.problem;
    take_dout(map, dout);
    take_sums("gap", saved.gap, {p.batch, p.channels}, p, map.x);
    take_sums("hidden", saved.hidden, {p.batch, p.inter}, p, map.x);
    take_sums("attention", saved.attention, {p.batch, p.radix, p.channels}, p, map.x);

    const auto gradient = [&](bool is_needed, std::initializer_list<int64_t> sizes,
                              const std::optional<Tensor>& like) {
      const ScalarType dtype = like.has_value() ? like->scalar_type() : p.dtype;
      return empty_on(map.x, is_needed ? sizes : std::initializer_list<int64_t>{0}, dtype);
    };
    const NormArguments &norm0 = map.bn0, &norm1 = mlp.bn1;
    const Tensor &fc1 = mlp.fc1_weight, &fc2 = mlp.fc2_weight;
    const GradientResults grads{
        needed[0] ? empty_map(map, p.features()) : empty_on(map.x, {0}, p.dtype),
        gradient(needed[1], {p.features()}, norm0.weight),
        gradient(needed[2], {p.features()}, norm0.bias),
        gradient(needed[3], {p.inter, p.group_channels(), 1, 1}, fc1),
        gradient(needed[4], {p.inter}, fc1),
        gradient(needed[5], {p.features(), p.group_inter(), 1, 1}, fc2),
        gradient(needed[6], {p.features()}, fc2),
        gradient(needed[7], {p.inter}, norm1.weight),
        gradient(needed[8], {p.inter}, norm1.bias)};
    K::backward(map, mlp, dout, saved, grads);
    return grads;
  }

  static StatisticsResults batch_statistics(Tensor x) {
    const Map map = make_map({std::move(x), false, 1}, {});
    const Problem& p = map.problem;
    const StatisticsResults results{empty_on(map.x, {p.features()}, p.acc()),
                                    empty_on(map.x, {p.features()}, p.acc())};
    K::batch_statistics(map, results.mean, results.var);
    return results;
  }

  static Tensor pool(MapArguments map_args, NormArguments bn0) {
    const Map map = make_phase_map(std::move(map_args), std::move(bn0));
    const Problem& p = map.problem;
    const Tensor gap = empty_on(map.x, {p.batch, p.channels}, p.acc());
    K::pool(map, gap);
    return gap;
  }

  static Tensor recombine(MapArguments map_args, NormArguments bn0, Tensor attention) {
    const Map map = make_phase_map(std::move(map_args), std::move(bn0));
    const Problem& p = map.problem;
    take_sums("attention", attention, {p.batch, p.radix, p.channels}, p, map.x);
    const Tensor out = empty_map(map, p.channels);
    K::recombine(map, attention, out);
    return out;
  }

  static PoolBackwardResults pool_backward(Tensor dout, MapArguments map_args, NormArguments bn0) {
    const Map map = make_phase_map(std::move(map_args), std::move(bn0));
    const Problem& p = map.problem;
    take_dout(map, dout);
    const PoolBackwardResults results{
        empty_on(map.x, {p.batch, p.radix, p.channels}, p.acc()),
        map.relu ? empty_on(map.x, {p.batch, kPrologueSums, p.radix, p.channels}, p.acc())
                 : empty_on(map.x, {0}, p.acc())};
    K::pool_backward(map, dout, results.dattention, results.sums);
    return results;
  }

  static PrologueBackwardResults prologue_backward(Tensor sums, Tensor attention, Tensor dgap,
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
    take_sums("sums", sums, {p.batch, kPrologueSums, p.radix, p.channels}, p, sums);
    take_sums("attention", attention, {p.batch, p.radix, p.channels}, p, sums);
    take_sums("dgap", dgap, {p.batch, p.channels}, p, sums);
    const PrologueBackwardResults results{empty_on(sums, {p.features()}, p.dtype),
                                          empty_on(sums, {p.features()}, p.dtype)};
    K::prologue_backward(p, sums, attention, dgap, results.dbn0_weight, results.dbn0_bias);
    return results;
  }

  // mean_dz and mean_dz_xhat are absent if bn0's statistics are frozen.
  static Tensor recombine_backward(Tensor dout, MapArguments map_args, NormArguments bn0,
                                   Tensor attention, Tensor dgap, std::optional<Tensor> mean_dz,
                                   std::optional<Tensor> mean_dz_xhat) {
    const Map map = make_phase_map(std::move(map_args), std::move(bn0));
    const Problem& p = map.problem;
    take_dout(map, dout);
    take_sums("attention", attention, {p.batch, p.radix, p.channels}, p, map.x);
    take_sums("dgap", dgap, {p.batch, p.channels}, p, map.x);
    STD_TORCH_CHECK(mean_dz.has_value() == mean_dz_xhat.has_value() &&
                        (!mean_dz.has_value() || is_present(map.bn0)),
                    "mean_dz, mean_dz_xhat: expected both or neither, and neither without bn0");
    for (auto* mean : {&mean_dz, &mean_dz_xhat}) {
      if (mean->has_value()) {
        take_sums("mean_dz, mean_dz_xhat", **mean, {p.features()}, p, map.x);
      }
    }
    const Tensor dx = empty_map(map, p.features());
    K::recombine_backward(map, dout, attention, dgap, mean_dz, mean_dz_xhat, dx);
    return dx;
  }

  static void update_running_statistics(Tensor x, RunningArguments bn0, RunningArguments bn1) {
    STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
    const int64_t batch = x.size(0);
    const Running norms[2] = {take_running("bn0", std::move(bn0), batch * x.size(2) * x.size(3), x),
                              take_running("bn1", std::move(bn1), batch, x)};
    K::update_running_statistics(x, norms);
  }

 private:
  static void check_no_batch_stats(const char* name, const NormArguments& bn) {
    STD_TORCH_CHECK(!bn.batch_stats, name,
                    "_batch_stats: expected False, as this op takes statistics only as mean and "
                    "var");
  }

  // The map of an op that computes no batch statistics itself.
  static Map make_phase_map(MapArguments args, NormArguments bn0) {
    check_no_batch_stats("bn0", bn0);
    return make_map(std::move(args), std::move(bn0));
  }
};

}  // namespace resnest_fused
