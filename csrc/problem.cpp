// Validation of a call, and fresh tensors for its results.
#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace resnest_fused {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

std::string describe(const int64_t* sizes, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + ")";
}

// PyTorch's own rule: a dimension of size 1 may have any stride.
bool has_strides(const Tensor& t, const int64_t (&expected)[4]) {
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != expected[d]) {
      return false;
    }
  }
  return true;
}

bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  return has_strides(t, {h * w * c, 1, w * c, c});
}

// The tensor in the given layout: itself, or one contiguous copy.
Tensor in_layout(const Tensor& tensor, Layout layout) {
  using torch::headeronly::MemoryFormat;
  const bool fits = layout == Layout::kNchw ? tensor.is_contiguous() : is_channels_last(tensor);
  if (fits) {
    return tensor;
  }
  return torch::stable::contiguous(
      tensor, layout == Layout::kNchw ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
}

Tensor empty_strided(const Tensor& x, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), code, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

void check_dtype(const char* name, const Tensor& tensor, const Tensor& x) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, name,
                  ": expected x's dtype or float32");
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                 const Tensor& x) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), name,
                  ": expected shape ", describe(sizes.begin(), sizes.size()), ", got ",
                  describe(found.data(), found.size()));
  STD_TORCH_CHECK(tensor.device() == x.device(), name, ": expected on x's device");
}

void take_parameter(const char* name, Tensor& tensor, std::initializer_list<int64_t> sizes,
                    const Tensor& x) {
  check_shape(name, tensor, sizes, x);
  check_dtype(name, tensor, x);
  tensor = in_layout(tensor, Layout::kNchw);
}

void take_parameter(const char* name, std::optional<Tensor>& tensor, int64_t size,
                    const Tensor& x) {
  if (tensor.has_value()) {
    take_parameter(name, *tensor, {size}, x);
  }
}

void take_norm(const std::string& name, NormArguments& norm, int64_t features, int64_t elements,
               const Tensor& x) {
  take_parameter((name + "_weight").c_str(), norm.weight, features, x);
  take_parameter((name + "_bias").c_str(), norm.bias, features, x);
  STD_TORCH_CHECK(norm.mean.has_value() == norm.var.has_value(), name, "_mean, ", name,
                  "_var: expected both or neither");
  take_parameter((name + "_mean").c_str(), norm.mean, features, x);
  take_parameter((name + "_var").c_str(), norm.var, features, x);
  STD_TORCH_CHECK(!is_present(norm) || (norm.batch_stats ? norm.eps > 0 : norm.eps >= 0), name,
                  "_eps: expected more than 0 with batch statistics, else at least 0, got ",
                  norm.eps);
  STD_TORCH_CHECK(!norm.batch_stats || elements != 1, name,
                  ": expected more than 1 value per channel when training");
}

// The problem of a map alone, with cardinality 1 and no FCs.
Problem make_problem(const Tensor& x, int64_t radix) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(radix >= 1, "radix: expected at least 1, got ", radix);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x: expected float32, float64, bfloat16 or float16");
  const int64_t features = x.size(1);
  STD_TORCH_CHECK(features > 0 && features % radix == 0,
                  "x: expected channels divisible by radix, got ", features);
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "x: expected at least one pixel");
  Problem problem{};
  problem.batch = x.size(0);
  problem.radix = radix;
  problem.cardinality = 1;
  problem.channels = features / radix;
  problem.height = x.size(2);
  problem.width = x.size(3);
  // A map that is both (one channel, or one pixel) counts as NCHW.
  problem.layout = !x.is_contiguous() && is_channels_last(x) ? Layout::kNhwc : Layout::kNchw;
  problem.dtype = dtype;
  return problem;
}

}  // namespace

Map make_map(MapArguments args, NormArguments bn0) {
  const Problem problem = make_problem(args.x, args.radix);
  STD_TORCH_CHECK(args.relu || !is_present(bn0), "relu: expected True behind bn0");
  take_norm("bn0", bn0, problem.features(), problem.batch * problem.pixels(), args.x);
  args.x = in_layout(args.x, problem.layout);
  return {std::move(args), std::move(bn0), problem};
}

Mlp take_mlp(Map& map, FcArguments fcs, NormArguments bn1) {
  Problem& problem = map.problem;
  const Tensor& x = map.x;
  const int64_t cardinality = fcs.cardinality;
  STD_TORCH_CHECK(cardinality >= 1, "cardinality: expected at least 1, got ", cardinality);
  STD_TORCH_CHECK(problem.channels % cardinality == 0,
                  "x: expected channels divisible by radix * cardinality, got ",
                  problem.features());
  STD_TORCH_CHECK(fcs.fc1_weight.dim() == 4, "fc1_weight: expected 4 dimensions");
  const int64_t inter = fcs.fc1_weight.size(0);
  STD_TORCH_CHECK(inter > 0 && inter % cardinality == 0,
                  "fc1_weight: expected rows divisible by cardinality, got ", inter);
  problem.cardinality = cardinality;
  problem.inter = inter;
  const int64_t features = problem.features();
  take_parameter("fc1_weight", fcs.fc1_weight, {inter, problem.group_channels(), 1, 1}, x);
  take_parameter("fc1_bias", fcs.fc1_bias, inter, x);
  take_parameter("fc2_weight", fcs.fc2_weight, {features, problem.group_inter(), 1, 1}, x);
  take_parameter("fc2_bias", fcs.fc2_bias, features, x);
  for (const auto* bias : {&fcs.fc1_bias, &fcs.fc2_bias}) {
    const Tensor& weight = bias == &fcs.fc1_bias ? fcs.fc1_weight : fcs.fc2_weight;
    STD_TORCH_CHECK(!bias->has_value() || (*bias)->scalar_type() == weight.scalar_type(),
                    "fc1_bias, fc2_bias: expected their weight's dtype");
  }
  take_norm("bn1", bn1, inter, problem.batch, x);
  return {std::move(fcs), std::move(bn1)};
}

void take_dout(const Map& map, Tensor& dout) {
  const Problem& p = map.problem;
  check_shape("dout", dout, {p.batch, p.channels, p.height, p.width}, map.x);
  STD_TORCH_CHECK(dout.scalar_type() == p.dtype, "dout: expected x's dtype");
  dout = in_layout(dout, p.layout);
}

void take_sums(const char* name, Tensor& sums, std::initializer_list<int64_t> sizes,
               const Problem& problem, const Tensor& x) {
  check_shape(name, sums, sizes, x);
  STD_TORCH_CHECK(sums.scalar_type() == problem.acc(), name,
                  ": expected float32, or float64 if x is float64");
  sums = in_layout(sums, Layout::kNchw);
}

Running take_running(const std::string& name, RunningArguments args, int64_t elements,
                     const Tensor& x) {
  const bool runs = args.running_mean.has_value();
  STD_TORCH_CHECK(args.running_var.has_value() == runs && args.mean.has_value() == runs &&
                      args.var.has_value() == runs,
                  name, ": expected running_mean, running_var, mean and var, or none of them");
  STD_TORCH_CHECK(!runs || elements != 1, name, ": expected more than 1 value per channel");
  STD_TORCH_CHECK(!runs || args.momentum.has_value() || args.num_batches_tracked.has_value(), name,
                  ": expected a momentum, or num_batches_tracked for a cumulative average");
  const int64_t features = runs ? args.running_mean->numel() : 0;
  if (runs) {
    for (auto* running : {&args.running_mean, &args.running_var}) {
      STD_TORCH_CHECK((*running)->is_contiguous(), name, ": expected contiguous statistics");
      take_parameter((name + "_running").c_str(), *running, features, x);
    }
    for (auto* batch : {&args.mean, &args.var}) {
      check_shape((name + "_mean, " + name + "_var").c_str(), **batch, {features}, x);
      STD_TORCH_CHECK((*batch)->scalar_type() == acc_of(x.scalar_type()), name, "_mean, ", name,
                      "_var: expected float32, or float64 if x is float64");
      *batch = in_layout(**batch, Layout::kNchw);
    }
  }
  if (args.num_batches_tracked.has_value()) {
    const Tensor& count = *args.num_batches_tracked;
    STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == 1 &&
                        count.device() == x.device(),
                    name, "_num_batches_tracked: expected one int64 on x's device");
  }
  return {std::move(args), features, elements};
}

Tensor empty_map(const Map& map, int64_t features) {
  const Problem& p = map.problem;
  const std::vector<int64_t> sizes{p.batch, features, p.height, p.width};
  const int64_t sample = features * p.pixels();
  return p.layout == Layout::kNchw
             ? empty_strided(map.x, sizes, {sample, p.pixels(), p.width, 1}, p.dtype)
             : empty_strided(map.x, sizes, {sample, 1, p.width * features, features}, p.dtype);
}

Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(std::data(sizes)[d], 1);
  }
  return empty_strided(x, sizes, strides, dtype);
}

}  // namespace resnest_fused
