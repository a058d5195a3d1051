// The CPU's kernels without torch: reads a call from the standard input, runs it forward and
// backward, and writes the results to the standard output. So they can be run as any compiler makes
// them for any processor. For test_compilers.py.
//
// What they need of torch is here, over plain memory and on one thread.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "calls.h"
#include "kernels.h"

struct AtenTensorOpaque {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  std::shared_ptr<char[]> memory;

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes) {
      count *= size;
    }
    return count;
  }
};

namespace {

// torch's numbers of the dtypes.
enum Dtype : int32_t { kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15 };

int64_t element_size(int32_t dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

AtenTensorHandle make_tensor(std::vector<int64_t> sizes, std::vector<int64_t> strides,
                             int32_t dtype) {
  auto* tensor = new AtenTensorOpaque{std::move(sizes), std::move(strides), dtype, nullptr};
  const auto bytes = static_cast<size_t>(tensor->numel() * element_size(dtype));
  // As poisonous as uninitialised memory can be: all its numbers are NaN.
  tensor->memory = std::make_unique<char[]>(bytes);
  std::fill_n(tensor->memory.get(), bytes, '\xff');
  return tensor;
}

}  // namespace

extern "C" {

#define RF_CONSTANT(name, value) \
  int32_t aoti_torch_##name() { return value; }
RF_CONSTANT(device_type_cpu, 0)
RF_CONSTANT(device_type_cuda, 1)
RF_CONSTANT(device_type_xpu, 12)
RF_CONSTANT(device_type_mps, 13)
RF_CONSTANT(device_type_meta, 14)
RF_CONSTANT(device_type_privateuse1, 20)
RF_CONSTANT(dtype_uint8, 0)
RF_CONSTANT(dtype_int8, 1)
RF_CONSTANT(dtype_int16, 2)
RF_CONSTANT(dtype_int32, 3)
RF_CONSTANT(dtype_int64, 4)
RF_CONSTANT(dtype_float16, kHalf)
RF_CONSTANT(dtype_float32, kFloat)
RF_CONSTANT(dtype_float64, kDouble)
RF_CONSTANT(dtype_complex32, 8)
RF_CONSTANT(dtype_complex64, 9)
RF_CONSTANT(dtype_complex128, 10)
RF_CONSTANT(dtype_bool, 11)
RF_CONSTANT(dtype_bfloat16, kBFloat16)
RF_CONSTANT(dtype_float8_e5m2, 23)
RF_CONSTANT(dtype_float8_e4m3fn, 24)
RF_CONSTANT(dtype_float8_e5m2fnuz, 25)
RF_CONSTANT(dtype_float8_e4m3fnuz, 26)
RF_CONSTANT(dtype_uint16, 27)
RF_CONSTANT(dtype_uint32, 28)
RF_CONSTANT(dtype_uint64, 29)
RF_CONSTANT(memory_format_contiguous_format, 0)
RF_CONSTANT(memory_format_preserve_format, 1)
RF_CONSTANT(memory_format_channels_last, 2)
RF_CONSTANT(memory_format_channels_last_3d, 3)

size_t aoti_torch_dtype_element_size(int32_t dtype) {
  return static_cast<size_t>(element_size(dtype));
}

#define RF_GET(name, T, value)                                               \
  AOTITorchError aoti_torch_get_##name(AtenTensorHandle tensor, T* result) { \
    *result = value;                                                         \
    return 0;                                                                \
  }
RF_GET(dim, int64_t, static_cast<int64_t>(tensor->sizes.size()))
RF_GET(numel, int64_t, tensor->numel())
RF_GET(dtype, int32_t, tensor->dtype)
RF_GET(sizes, int64_t*, tensor->sizes.data())
RF_GET(strides, int64_t*, tensor->strides.data())
RF_GET(device_type, int32_t, ((void)tensor, 0))
RF_GET(device_index, int32_t, ((void)tensor, -1))

AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t d, int64_t* result) {
  *result = tensor->sizes[static_cast<size_t>(d)];
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t d, int64_t* result) {
  *result = tensor->strides[static_cast<size_t>(d)];
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* result) {
  int64_t expected = 1;
  *result = true;
  for (size_t d = tensor->sizes.size(); d-- > 0; expected *= tensor->sizes[d]) {
    *result = *result && (tensor->sizes[d] == 1 || tensor->strides[d] == expected);
  }
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** result) {
  *result = tensor->memory.get();
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** result) {
  *result = tensor->memory.get();
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* result) {
  *result = new AtenTensorOpaque(*tensor);
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete tensor;
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t, AtenTensorHandle* result) {
  *result = make_tensor({sizes, sizes + dim}, {strides, strides + dim}, dtype);
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* result) {
  *result = 1;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc piece,
                                  void* context) {
  piece(begin, end, context);
  return 0;
}

uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }
AOTITorchError torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t) {
  std::abort();  // only copies into another layout, which the test does not ask for
}
}

namespace resnest_fused {
namespace {

// The numbers and tensors of the standard input.
template <typename T>
T read() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) {
    throw std::runtime_error("the input is too short");
  }
  return value;
}

std::vector<int64_t> read_sizes() {
  std::vector<int64_t> sizes(static_cast<size_t>(read<int64_t>()));
  for (int64_t& size : sizes) {
    size = read<int64_t>();
  }
  return sizes;
}

std::optional<Tensor> read_optional() {
  const auto dtype = static_cast<int32_t>(read<int64_t>());
  if (dtype < 0) {
    return std::nullopt;
  }
  std::vector<int64_t> sizes = read_sizes();
  AtenTensorHandle tensor = make_tensor(std::move(sizes), read_sizes(), dtype);
  const auto count = static_cast<size_t>(tensor->numel());
  if (std::fread(tensor->memory.get(), static_cast<size_t>(element_size(dtype)), count, stdin) !=
      count) {
    throw std::runtime_error("the input is too short");
  }
  return Tensor(tensor);
}

Tensor read_tensor() { return read_optional().value(); }

NormArguments read_norm() {
  NormArguments norm;
  norm.weight = read_optional();
  norm.bias = read_optional();
  norm.mean = read_optional();
  norm.var = read_optional();
  norm.eps = read<double>();
  norm.batch_stats = read<int64_t>() != 0;
  return norm;
}

// The statistics that the forward took, for the backward.
void set_statistics(NormArguments& norm, const Tensor& mean, const Tensor& var) {
  if (norm.batch_stats) {
    norm.mean = mean;
    norm.var = var;
  }
}

void write(const Tensor& tensor) {
  std::fwrite(tensor.const_data_ptr(), tensor.element_size(), static_cast<size_t>(tensor.numel()),
              stdout);
}

void run() {
  using Ops = Calls<cpu::Kernels>;
  MapArguments map{read_tensor(), read<int64_t>() != 0, 0};
  map.radix = read<int64_t>();
  NormArguments bn0 = read_norm();
  FcArguments fcs{read_tensor(), std::nullopt, read_tensor(), std::nullopt, 0};
  fcs.fc1_bias = read_optional();
  fcs.fc2_bias = read_optional();
  fcs.cardinality = read<int64_t>();
  NormArguments bn1 = read_norm();
  const Tensor dout = read_tensor();
  std::vector<bool> needed;
  for (int i = 0; i < 9; ++i) {
    needed.push_back(read<int64_t>() != 0);
  }

  const TrainResults results = Ops::split_attention_train(map, bn0, fcs, bn1);
  write(results.out);
  set_statistics(bn0, results.bn0_mean, results.bn0_var);
  set_statistics(bn1, results.bn1_mean, results.bn1_var);
  const SavedArguments saved{results.gap, results.hidden, results.attention};
  const auto grads = Ops::split_attention_backward(dout, map, bn0, fcs, bn1, saved, needed);
  for (const Tensor& grad :
       {grads.dx, grads.dbn0_weight, grads.dbn0_bias, grads.dfc1_weight, grads.dfc1_bias,
        grads.dfc2_weight, grads.dfc2_bias, grads.dbn1_weight, grads.dbn1_bias}) {
    write(grad);
  }
}

}  // namespace
}  // namespace resnest_fused

int main() {
  try {
    resnest_fused::run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
