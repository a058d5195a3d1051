// The CPU's kernels: each call goes to those compiled for the best instruction set.
#include "kernels.h"

#include "cpu/instruction_set.h"

RF_KERNELS(cpu::baseline)
#if defined(__x86_64__)
RF_KERNELS(cpu::avx2)
RF_KERNELS(cpu::avx512)
#endif

namespace resnest_fused::cpu {
namespace {

// Call f with the instruction set's class of kernels.
template <typename F>
void with_kernels(const F& f) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return f(avx512::Kernels{});
    case Capability::kAvx2:
      return f(avx2::Kernels{});
    case Capability::kBaseline:
      break;
  }
#endif
  f(baseline::Kernels{});
}

}  // namespace

void Kernels::forward(const Map& map, const Mlp& mlp, const Tensor& out,
                      const TrainResults* train) {
  with_kernels([&](auto kernels) { kernels.forward(map, mlp, out, train); });
}

void Kernels::backward(const Map& map, const Mlp& mlp, const Tensor& dout,
                       const SavedArguments& saved, const GradientResults& grads) {
  with_kernels([&](auto kernels) { kernels.backward(map, mlp, dout, saved, grads); });
}

void Kernels::batch_statistics(const Map& map, const Tensor& mean, const Tensor& var) {
  with_kernels([&](auto kernels) { kernels.batch_statistics(map, mean, var); });
}

void Kernels::pool(const Map& map, const Tensor& gap) {
  with_kernels([&](auto kernels) { kernels.pool(map, gap); });
}

void Kernels::recombine(const Map& map, const Tensor& attention, const Tensor& out) {
  with_kernels([&](auto kernels) { kernels.recombine(map, attention, out); });
}

void Kernels::pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,
                            const Tensor& sums) {
  with_kernels([&](auto kernels) { kernels.pool_backward(map, dout, dattention, sums); });
}

void Kernels::prologue_backward(const Problem& problem, const Tensor& sums, const Tensor& attention,
                                const Tensor& dgap, const Tensor& dweight, const Tensor& dbias) {
  with_kernels([&](auto kernels) {
    kernels.prologue_backward(problem, sums, attention, dgap, dweight, dbias);
  });
}

void Kernels::recombine_backward(const Map& map, const Tensor& dout, const Tensor& attention,
                                 const Tensor& dgap, const std::optional<Tensor>& mean_dz,
                                 const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx) {
  with_kernels([&](auto kernels) {
    kernels.recombine_backward(map, dout, attention, dgap, mean_dz, mean_dz_xhat, dx);
  });
}

void Kernels::update_running_statistics(const Tensor& x, const Running (&norms)[2]) {
  with_kernels([&](auto kernels) { kernels.update_running_statistics(x, norms); });
}

}  // namespace resnest_fused::cpu
