// What the kernels use that is not theirs. The file of an instruction set includes it before it
// turns the set on: what is compiled for the set must be in the set's namespace, or the linker may
// choose it for a machine that has no such instructions.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/dtype.h"
#include "cpu/elements.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/work_items.h"
#include "kernels.h"
#include "problem.h"
#include "prologue_sums.h"
