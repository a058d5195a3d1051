// The CPU kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include "cpu/kernels/includes.h"

#define RF_SET avx2
#define RF_REGISTER_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

RF_KERNELS(cpu::avx2)

#include "cpu/kernels/phases.h"
#include "cpu/kernels/running.h"
#include "cpu/kernels/split_attention.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
