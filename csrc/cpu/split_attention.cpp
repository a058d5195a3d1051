// The ops on the CPU: dtypes, scratch memory, and the order of the three phases.
#include "cpu/split_attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/attention.h"
#include "cpu/dtype.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/recombine.h"

namespace resnest_fused::cpu {
namespace {

// Bytes of x that one thread takes through all three phases at a time, so that recombine finds them
// in L2 (2 MB was 20% slower at 128@28x28, B=32, on a Xeon with 1.25 MB of it).
constexpr int64_t kBlockBytes = 1024 * 1024;

// Fresh memory of this size comes page by page from the kernel; huge pages cost a fifth of it.
constexpr int64_t kHugePageThreshold = 4 * 1024 * 1024;

void advise_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const auto bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (bytes >= kHugePageThreshold && first < last) {
    // Only advice: where the kernel does not take it, nothing changes.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)fresh;
#endif
}

// to[i] = from[i] in another dtype, rounding once; float64 meets only float32.
template <typename To, typename From>
struct Convert {
  template <typename Isa>
  static RF_INLINE void run(const From* from, int64_t count, To* to) {
    if constexpr (sizeof(To) + sizeof(From) >= 12) {
      std::copy_n(from, count, to);
    } else {
      for (int64_t i = 0; i < count; i += kLanes<float>) {
        const int64_t n = std::min<int64_t>(kLanes<float>, count - i);
        store_lanes(to + i, load_lanes(from + i, n), n);
      }
    }
  }
};

template <typename To, typename From>
void convert(const From* from, int64_t count, To* to) {
  constexpr int64_t kChunk = 4096;
  parallel_units((count + kChunk - 1) / kChunk, kChunk * (sizeof(To) + sizeof(From)),
                 [&](int64_t begin, int64_t end) {
                   const int64_t first = begin * kChunk;
                   const int64_t n = std::min(end * kChunk, count) - first;
                   dispatch<Convert<To, From>>(from + first, n, to + first);
                 });
}

// Whether a parameter of type P may stand beside accumulators A: float32, or x's own dtype.
template <typename A, typename P>
inline constexpr bool kMeets = std::is_same_v<P, float> || kReads<A, P>;

// A parameter in the accumulator's type: in place where it has it already, else converted.
template <typename A>
class Widened {
 public:
  explicit Widened(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) {
      return;
    }
    for_dtype(tensor->scalar_type(), [&](auto tag) {
      using P = decltype(tag);
      const P* from = static_cast<const P*>(tensor->const_data_ptr());
      if constexpr (std::is_same_v<P, A>) {
        data_ = from;
      } else if constexpr (kMeets<A, P>) {
        const int64_t count = tensor->numel();
        owned_ = std::make_unique_for_overwrite<A[]>(static_cast<size_t>(count));
        convert(from, count, owned_.get());
        data_ = owned_.get();
      }
    });
  }

  const A* get() const { return data_; }

  std::vector<A> vector(int64_t size, A otherwise) const {
    return data_ ? std::vector<A>(data_, data_ + size)
                 : std::vector<A>(static_cast<size_t>(size), otherwise);
  }

 private:
  const A* data_ = nullptr;
  std::unique_ptr<A[]> owned_;
};

// An FC's weight as the kernels read it: as it is stored, but for float32 beside float64.
template <typename A>
class StoredWeight {
 public:
  explicit StoredWeight(const Tensor& tensor)
      : widened_(std::is_same_v<A, double> ? std::optional(tensor) : std::nullopt),
        weight_{tensor.const_data_ptr(), tensor.scalar_type()} {
    if constexpr (std::is_same_v<A, double>) {
      weight_ = {widened_.get(), ScalarType::Double};
    }
  }

  Weight get() const { return weight_; }

 private:
  Widened<A> widened_;
  Weight weight_;
};

template <typename A>
void set_invstd(Norm<A>& bn, const A* var, double eps) {
  for (size_t i = 0; i < bn.invstd.size(); ++i) {
    bn.invstd[i] = A(1) / std::sqrt(var[i] + static_cast<A>(eps));
  }
}

// bn1 with the given statistics; those of the batch, when they are not known yet, come later.
template <typename A>
Norm<A> make_norm(const Problem& p, const Parameters& params) {
  Norm<A> bn;
  bn.mean = Widened<A>(params.bn1_mean).vector(p.inter, A{});
  bn.invstd = std::vector<A>(static_cast<size_t>(p.inter), A(1));
  bn.gamma = Widened<A>(params.bn1_weight).vector(p.inter, A(1));
  bn.beta = Widened<A>(params.bn1_bias).vector(p.inter, A{});
  if (params.bn1_var.has_value()) {
    set_invstd(bn, Widened<A>(params.bn1_var).get(), params.bn1_eps);
  }
  return bn;
}

int64_t pool_unit_bytes(const Problem& p, int64_t element_size) {
  const int64_t elements =
      p.layout == Layout::kNchw ? p.radix * p.pixels() : kPixelsPerUnit * p.features();
  return elements * element_size;
}

int64_t sample_elements(const Problem& p) { return p.features() * p.pixels(); }

int64_t weight_elements(const Problem& p) {
  return p.inter * p.group_channels() + p.features() * p.group_inter();
}

// Whether each thread takes samples of its own through all phases; else threads share each phase.
// On its own a thread reads all the FCs' weights, which its samples must outweigh.
bool by_sample(const Problem& p) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool balanced = p.batch >= 4 * threads || p.batch % threads == 0;
  return threads == 1 || (balanced && p.batch * sample_elements(p) >= threads * weight_elements(p));
}

template <typename A>
struct Crumbs {
  A* gap;         // (B, C)
  A* hidden;      // (B, I)
  A* attention;   // (B, R, C)
  A* batch_mean;  // (I), written with batch statistics only
  A* batch_var;   // (I)
};

template <typename T>
void forward(const Problem& p, const T* x, const Parameters& tensors, const Crumbs<Acc<T>>& crumbs,
             T* out) {
  using A = Acc<T>;
  const StoredWeight<A> fc1_weight(tensors.fc1_weight), fc2_weight(tensors.fc2_weight);
  const Widened<A> fc1_bias(tensors.fc1_bias), fc2_bias(tensors.fc2_bias);
  AttentionParameters<A> params{fc1_weight.get(), fc1_bias.get(), fc2_weight.get(), fc2_bias.get(),
                                make_norm<A>(p, tensors)};
  const int64_t units = pool_units_per_sample(p);
  const int64_t sample_partials = pool_partials(p) * p.channels;
  const auto partial_buffer =
      std::make_unique_for_overwrite<A[]>(static_cast<size_t>(p.batch * sample_partials));
  A* const partial = partial_buffer.get();

  if (!tensors.batch_stats && by_sample(p)) {
    const int64_t sample_bytes = sample_elements(p) * static_cast<int64_t>(sizeof(T));
    // Each block reads the weights again, so it should not be smaller than they are.
    const int64_t weight_bytes = weight_elements(p) * static_cast<int64_t>(sizeof(A));
    const int64_t block = std::max<int64_t>(std::max(kBlockBytes, weight_bytes) / sample_bytes, 1);
    parallel_units(p.batch, sample_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b += block) {
        const int64_t last = std::min(b + block, end);
        pool_units(p, x, b * units, last * units, partial);
        pool_finish(p, const_cast<const A*>(partial), b, last, crumbs.gap);
        A* const hidden = crumbs.hidden + b * p.inter;
        A* const attention = crumbs.attention + b * p.features();
        attention_hidden<A>(p, params, last - b, crumbs.gap + b * p.channels, hidden);
        attention_from_hidden<A>(p, params, last - b, hidden, attention);
        recombine_units<T>(p, x, crumbs.attention, b * units, last * units, out);
      }
    });
    return;
  }

  const int64_t unit_bytes = pool_unit_bytes(p, sizeof(T));
  parallel_units(p.batch * units, unit_bytes,
                 [&](int64_t begin, int64_t end) { pool_units(p, x, begin, end, partial); });
  pool_finish<A>(p, partial, 0, p.batch, crumbs.gap);
  attention_hidden<A>(p, params, p.batch, crumbs.gap, crumbs.hidden);
  if (tensors.batch_stats) {
    attention_batch_stats<A>(p, crumbs.hidden, crumbs.batch_mean, crumbs.batch_var);
    params.bn1.mean.assign(crumbs.batch_mean, crumbs.batch_mean + p.inter);
    set_invstd(params.bn1, crumbs.batch_var, tensors.bn1_eps);
  }
  attention_from_hidden<A>(p, params, p.batch, crumbs.hidden, crumbs.attention);
  parallel_units(p.batch * units, unit_bytes, [&](int64_t begin, int64_t end) {
    recombine_units<T>(p, x, crumbs.attention, begin, end, out);
  });
}

template <typename A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// A gradient in the accumulator's type that becomes a tensor of its parameter's dtype and shape.
template <typename A>
class Gradient {
 public:
  Gradient(bool needed, const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype)
      : tensor_(needed ? empty_on(x, sizes, dtype) : empty_on(x, {0}, dtype)), needed_(needed) {
    if (needed && dtype != kAccDtype<A>) {
      buffer_ = std::make_unique_for_overwrite<A[]>(static_cast<size_t>(tensor_.numel()));
    }
  }

  A* get() const { return !needed_ ? nullptr : buffer_ ? buffer_.get() : data<A>(tensor_); }

  Tensor take() {
    if (buffer_) {
      for_dtype(tensor_.scalar_type(), [&](auto tag) {
        using P = decltype(tag);
        if constexpr (kMeets<A, P> && !std::is_same_v<A, P>) {
          convert(const_cast<const A*>(buffer_.get()), tensor_.numel(), data<P>(tensor_));
        }
      });
    }
    return tensor_;
  }

 private:
  Tensor tensor_;
  bool needed_;
  std::unique_ptr<A[]> buffer_;
};

ScalarType dtype_of(const std::optional<Tensor>& tensor, ScalarType otherwise) {
  return tensor.has_value() ? tensor->scalar_type() : otherwise;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Problem& p, const Tensor& dout_tensor, const Tensor& x_tensor,
                   const Parameters& tensors, const Tensor& gap, const Tensor& hidden,
                   const Tensor& attention, const std::vector<bool>& needed) {
  using A = Acc<T>;
  const T* dout = static_cast<const T*>(dout_tensor.const_data_ptr());
  const T* x = static_cast<const T*>(x_tensor.const_data_ptr());
  const StoredWeight<A> fc1_weight(tensors.fc1_weight), fc2_weight(tensors.fc2_weight);
  const AttentionParameters<A> params{fc1_weight.get(), nullptr, fc2_weight.get(), nullptr,
                                      make_norm<A>(p, tensors)};

  const ScalarType fc1_dtype = tensors.fc1_weight.scalar_type();
  const ScalarType fc2_dtype = tensors.fc2_weight.scalar_type();
  Gradient<A> dfc1_weight(needed[1], x_tensor, {p.inter, p.group_channels(), 1, 1}, fc1_dtype);
  Gradient<A> dfc1_bias(needed[2], x_tensor, {p.inter}, fc1_dtype);
  Gradient<A> dfc2_weight(needed[3], x_tensor, {p.features(), p.group_inter(), 1, 1}, fc2_dtype);
  Gradient<A> dfc2_bias(needed[4], x_tensor, {p.features()}, fc2_dtype);
  Gradient<A> dbn1_weight(needed[5], x_tensor, {p.inter}, dtype_of(tensors.bn1_weight, p.dtype));
  Gradient<A> dbn1_bias(needed[6], x_tensor, {p.inter}, dtype_of(tensors.bn1_bias, p.dtype));
  const Tensor dx =
      needed[0] ? empty_map(p, p.features(), x_tensor) : empty_on(x_tensor, {0}, p.dtype);

  const int64_t units = pool_units_per_sample(p);
  const int64_t unit_bytes = pool_unit_bytes(p, sizeof(T));
  const auto partial_buffer = std::make_unique_for_overwrite<A[]>(
      static_cast<size_t>(p.batch * pool_partials(p) * p.features()));
  A* const partial = partial_buffer.get();
  parallel_units(p.batch * units, unit_bytes, [&](int64_t begin, int64_t end) {
    pool_backward_units(p, dout, x, begin, end, partial);
  });
  const auto dattention =
      std::make_unique_for_overwrite<A[]>(static_cast<size_t>(p.batch * p.features()));
  pool_backward_finish<A>(p, partial, 0, p.batch, dattention.get());

  const auto dgap = std::make_unique_for_overwrite<A[]>(static_cast<size_t>(p.batch * p.channels));
  attention_backward<A>(p, params, tensors.batch_stats, data<A>(gap), data<A>(hidden),
                        data<A>(attention), dattention.get(),
                        {needed[0] ? dgap.get() : nullptr, dfc1_weight.get(), dfc1_bias.get(),
                         dfc2_weight.get(), dfc2_bias.get(), dbn1_weight.get(), dbn1_bias.get()});
  if (needed[0]) {
    advise_huge_pages(dx);
    parallel_units(p.batch * units, unit_bytes, [&](int64_t begin, int64_t end) {
      recombine_backward_units<T>(p, dout, data<A>(attention), dgap.get(), begin, end, data<T>(dx));
    });
  }
  return {dx,
          dfc1_weight.take(),
          dfc1_bias.take(),
          dfc2_weight.take(),
          dfc2_bias.take(),
          dbn1_weight.take(),
          dbn1_bias.take()};
}

}  // namespace

Tensor split_attention(Tensor x, Tensor fc1_weight, std::optional<Tensor> fc1_bias,
                       Tensor fc2_weight, std::optional<Tensor> fc2_bias,
                       std::optional<Tensor> bn1_weight, std::optional<Tensor> bn1_bias,
                       std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
                       double bn1_eps, int64_t radix, int64_t cardinality) {
  Parameters params{fc1_weight, fc1_bias, fc2_weight, fc2_bias, bn1_weight,
                    bn1_bias,   bn1_mean, bn1_var,    bn1_eps,  false};
  const Problem p = make_problem(x, params, radix, cardinality);
  x = in_layout(x, p.layout);
  const Tensor out = empty_map(p, p.channels, x);
  advise_huge_pages(out);
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto scratch = std::make_unique_for_overwrite<A[]>(
        static_cast<size_t>(p.batch * (p.channels + p.inter + p.features())));
    A* const gap = scratch.get();
    A* const hidden = gap + p.batch * p.channels;
    A* const attention = hidden + p.batch * p.inter;
    forward<T>(p, static_cast<const T*>(x.const_data_ptr()), params,
               {gap, hidden, attention, nullptr, nullptr}, data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_train(
    Tensor x, Tensor fc1_weight, std::optional<Tensor> fc1_bias, Tensor fc2_weight,
    std::optional<Tensor> fc2_bias, std::optional<Tensor> bn1_weight,
    std::optional<Tensor> bn1_bias, std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
    double bn1_eps, bool batch_stats, int64_t radix, int64_t cardinality) {
  Parameters params{fc1_weight, fc1_bias, fc2_weight, fc2_bias, bn1_weight,
                    bn1_bias,   bn1_mean, bn1_var,    bn1_eps,  batch_stats};
  const Problem p = make_problem(x, params, radix, cardinality);
  x = in_layout(x, p.layout);
  const Tensor out = empty_map(p, p.channels, x);
  advise_huge_pages(out);
  const ScalarType acc = p.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor gap = empty_on(x, {p.batch, p.channels}, acc);
  const Tensor hidden = empty_on(x, {p.batch, p.inter}, acc);
  const Tensor attention = empty_on(x, {p.batch, p.radix, p.channels}, acc);
  const int64_t stats = batch_stats ? p.inter : 0;
  const Tensor mean = empty_on(x, {stats}, acc);
  const Tensor var = empty_on(x, {stats}, acc);
  for_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    forward<T>(p, static_cast<const T*>(x.const_data_ptr()), params,
               {data<A>(gap), data<A>(hidden), data<A>(attention), data<A>(mean), data<A>(var)},
               data<T>(out));
  });
  return {out, gap, hidden, attention, mean, var};
}

Gradients split_attention_backward(Tensor dout, Tensor x, Tensor fc1_weight, Tensor fc2_weight,
                                   std::optional<Tensor> bn1_weight, std::optional<Tensor> bn1_bias,
                                   std::optional<Tensor> bn1_mean, std::optional<Tensor> bn1_var,
                                   Tensor gap, Tensor hidden, Tensor attention, double bn1_eps,
                                   bool batch_stats, int64_t radix, int64_t cardinality,
                                   std::vector<bool> needed) {
  Parameters params{fc1_weight, std::nullopt, fc2_weight, std::nullopt, bn1_weight,
                    bn1_bias,   bn1_mean,     bn1_var,    bn1_eps,      batch_stats};
  const Problem p = make_problem(x, params, radix, cardinality);
  STD_TORCH_CHECK(needed.size() == 7, "needed: expected 7 flags, got ", needed.size());
  const ScalarType acc = p.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_shape("dout", dout, {p.batch, p.channels, p.height, p.width}, x);
  STD_TORCH_CHECK(dout.scalar_type() == p.dtype, "dout: expected x's dtype");
  check_shape("gap", gap, {p.batch, p.channels}, x);
  check_shape("hidden", hidden, {p.batch, p.inter}, x);
  check_shape("attention", attention, {p.batch, p.radix, p.channels}, x);
  for (Tensor* crumb : {&gap, &hidden, &attention}) {
    STD_TORCH_CHECK(crumb->scalar_type() == acc,
                    "gap, hidden, attention: expected the dtype of split_attention_train");
    *crumb = in_layout(*crumb, Layout::kNchw);
  }
  x = in_layout(x, p.layout);
  dout = in_layout(dout, p.layout);
  Gradients grads;
  for_dtype(p.dtype, [&](auto tag) {
    grads = backward<decltype(tag)>(p, dout, x, params, gap, hidden, attention, needed);
  });
  return grads;
}

}  // namespace resnest_fused::cpu
