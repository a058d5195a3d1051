// A call on its way to the kernels: its tensors as pointers, its workspace, and bn0's parameters.
#pragma once

#include <algorithm>

#include "cuda/context.h"
#include "cuda/launches.h"
#include "problem.h"

namespace resnest_fused::cuda {

// Call f(tag) with a value of the element type.
template <typename F>
void for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      return Dtype::kBFloat16;
  }
}

inline Parameter parameter(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? Parameter{tensor->const_data_ptr(), dtype_of(*tensor)} : Parameter{};
}

inline Result result(const Tensor& gradient) {
  return is_needed(gradient) ? Result{gradient.mutable_data_ptr(), dtype_of(gradient)} : Result{};
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename A>
Norm<A> norm_of(const NormArguments& norm) {
  return {parameter(norm.weight), parameter(norm.bias), parameter(norm.mean), parameter(norm.var),
          static_cast<A>(norm.eps)};
}

inline bool is_aligned(std::initializer_list<const Tensor*> maps) {
  for (const Tensor* map : maps) {
    if (reinterpret_cast<uintptr_t>(map->const_data_ptr()) % 16 != 0) {
      return false;
    }
  }
  return true;
}

// The call as the planner sees it; `maps` are all that it reads and writes in vectors.
inline Workload workload_of(const Map& map, Pass pass, std::initializer_list<const Tensor*> maps) {
  const Problem& p = map.problem;
  Workload w{};
  w.pass = pass;
  w.batch = p.batch;
  w.radix = p.radix;
  w.cardinality = p.cardinality;
  w.channels = p.channels;
  w.inter = p.inter;
  w.pixels = p.pixels();
  w.element_size = static_cast<int64_t>(map.x.element_size());
  w.channels_last = p.layout == Layout::kNhwc;
  w.aligned = is_aligned(maps);
  w.relu = map.relu;
  w.bn0 = is_present(map.bn0);
  w.batch_stats = map.bn0.batch_stats;
  return w;
}

inline MapSizes sizes_of(int64_t radix, int64_t channels, int64_t pixels) {
  return {counted(radix, kMostChannels), counted(channels, kMostChannels),
          counted(pixels, kMostPixels)};
}

// A call with its plan and its workspace.
template <typename T>
class Run {
 public:
  using A = Acc<T>;

  Run(const Context& of_call, const Map& of_map, const Workload& of_work, const Plan& of_plan,
      int64_t workspace_bytes)
      : context(of_call),
        map(of_map),
        work(of_work),
        plan(of_plan),
        sizes(sizes_of(of_work.radix, of_work.channels, of_work.pixels)),
        form{of_work.channels_last, of_work.relu},
        space_(empty_on(of_map.x, {workspace_bytes}, ScalarType::Byte)) {}

  // An array of the workspace.
  template <typename E = A>
  E* at(int64_t offset) const {
    return reinterpret_cast<E*>(data<unsigned char>(space_) + offset);
  }

  // Room for bn0's parameters and, if dx loses something to the batch's statistics, for that.
  Prologue<A> prologue_at(int64_t offset, bool loses) const {
    if (!work.bn0) {
      return {};
    }
    A* const arrays = at(offset);
    const int64_t f = work.features();
    return {arrays,
            arrays + f,
            arrays + 2 * f,
            arrays + 3 * f,
            loses ? arrays + 4 * f : nullptr,
            loses ? arrays + 5 * f : nullptr};
  }

  // A kernel's launch.
  Launch of(Kernel kernel) const { return launch_of(context.device, work, plan, kernel); }

  // The stages of phase 2 with as many items, and its counters.
  template <size_t kStages>
  auto stages(const std::array<int64_t, kStages>& items, int64_t counters) const {
    Stages<static_cast<int>(kStages)> stages{{}, at<unsigned>(counters)};
    std::copy(items.begin(), items.end(), stages.items);
    return stages;
  }

  // bn0's parameters from the statistics it was given, where no pool has left them.
  void prepare(const Launch& planned, const Prologue<A>& prologue, const A* mean_dz = nullptr,
               const A* mean_dz_xhat = nullptr) const {
    cuda::prepare<A>(context.stream, planned,
                     {work.features(), norm_of<A>(map.bn0), prologue, mean_dz, mean_dz_xhat});
  }

  // Mean and squares of each chunk's pixels, by feature, into `rows`;
  void take_statistics(const Launch& planned, A* rows) const {
    const Workload features = statistics_map(work);
    const Tiling tiling = statistics_tiling(context.device, work);
    A* const squares = rows + statistics_rows(context.device, work) * work.features();
    statistics<T>(context.stream, planned, form.nhwc,
                  {sizes_of(1, features.channels, features.pixels), tiling, planned.blocks,
                   const_data<T>(map.x), rows, squares});
  }

  // from them the batch's statistics.
  void combine(const Launch& planned, const A* rows, const Tensor& mean, const Tensor& var) const {
    const Workload features = statistics_map(work);
    const Tiling tiling = statistics_tiling(context.device, work);
    const int64_t count = statistics_rows(context.device, work);
    const int64_t full = tiling.chunk_pixels;
    const int64_t last = features.pixels - (tiling.chunks - 1) * full;
    cuda::combine<A>(context.stream, planned,
                     {{count, work.features(), rows, rows + count * work.features(),
                       static_cast<double>(full), static_cast<double>(last), tiling.chunks,
                       std::max(static_cast<double>(features.batch * features.pixels), 1.0)},
                      data<A>(mean),
                      data<A>(var)});
  }

  const Context& context;
  const Map& map;
  const Workload work;
  const Plan plan;
  const MapSizes sizes;
  const Form form;

 private:
  Tensor space_;
};

}  // namespace resnest_fused::cuda
