// The CPU kernels for what every processor of its kind has: SSE2 on x86-64, NEON on aarch64.
#include "cpu/kernels/includes.h"

#define RF_SET baseline
#define RF_REGISTER_BYTES 16

RF_KERNELS(cpu::baseline)

#include "cpu/kernels/phases.h"
#include "cpu/kernels/running.h"
#include "cpu/kernels/split_attention.h"
