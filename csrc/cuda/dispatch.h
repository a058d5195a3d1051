// From a call's run-time properties to the kernel compiled for them.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launches.h"

namespace resnest_fused::cuda {

template <bool kValue>
using Flag = std::bool_constant<kValue>;
template <int kValue>
using Number = std::integral_constant<int, kValue>;

template <typename F>
void for_flag(bool flag, F f) {
  if (flag) {
    f(Flag<true>{});
  } else {
    f(Flag<false>{});
  }
}

// Call f(nhwc, vector): whole vectors, or single elements, the one path of float64.
template <typename T, typename F>
void for_layout(bool nhwc, const Tiling& tiling, F f) {
  for_flag(nhwc, [&](auto is_nhwc) {
    if constexpr (sizeof(T) < 8) {
      if (tiling.vector > 1) {
        return f(is_nhwc, Number<vector_elements(is_nhwc(), sizeof(T))>{});
      }
    }
    f(is_nhwc, Number<1>{});
  });
}

// Call f(nhwc, radix, vector, prologue). Radix 0 stands for any, as always with single elements.
template <typename T, typename F>
void for_map(Form form, const MapSizes& sizes, const Tiling& tiling, F f) {
  for_layout<T>(form.nhwc, tiling, [&](auto nhwc, auto vector) {
    for_flag(form.prologue, [&](auto prologue) {
      if constexpr (decltype(vector)::value > 1) {
        switch (sizes.radix) {
          case 1:
            return f(nhwc, Number<1>{}, vector, prologue);
          case 2:
            return f(nhwc, Number<2>{}, vector, prologue);
          case 4:
            return f(nhwc, Number<4>{}, vector, prologue);
          default:
            break;
        }
      }
      f(nhwc, Number<0>{}, vector, prologue);
    });
  });
}

// Define what launches.h declares, for a kernel with sums in A,
#define RF_LAUNCH(name, Args)                                                  \
  template <typename A>                                                        \
  void name(cudaStream_t stream, const Launch& planned, const Args<A>& args) { \
    launch(stream, name##_kernel<A>, planned, args);                           \
  }                                                                            \
  template void name(cudaStream_t, const Launch&, const Args<float>&);         \
  template void name(cudaStream_t, const Launch&, const Args<double>&);

// and for one of a map with elements T.
#define RF_LAUNCH_ON_MAP(name, Args)                                                              \
  template <typename T>                                                                           \
  void name(cudaStream_t stream, const Launch& planned, Form form, const Args<T>& args) {         \
    for_map<T>(                                                                                   \
        form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {   \
          launch(stream, name##_kernel<T, nhwc(), radix(), vector(), prologue()>, planned, args); \
        });                                                                                       \
  }                                                                                               \
  template void name(cudaStream_t, const Launch&, Form, const Args<float>&);                      \
  template void name(cudaStream_t, const Launch&, Form, const Args<double>&);                     \
  template void name(cudaStream_t, const Launch&, Form, const Args<__half>&);                     \
  template void name(cudaStream_t, const Launch&, Form, const Args<__nv_bfloat16>&);

}  // namespace resnest_fused::cuda
