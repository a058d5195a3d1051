// Includes torch's copy of pybind11. It refuses TORCH_TARGET_VERSION, the macro of the stable ABI,
// although it does not depend on that ABI.
#pragma once

#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
