// The launch planner in Python, for devices and calls described by dicts: it needs no GPU.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/planner.h"
#include "cuda/tuning.h"
#include "pybind.h"

namespace resnest_fused::cuda {

// The fields of a dict. A wrong one is named by std::invalid_argument, in Python ValueError.
class Fields {
 public:
  Fields(const char* dict_name, const pybind11::dict& dict) : name_(dict_name), dict_(dict) {}

  int64_t integer(const char* field, int64_t least,
                  int64_t most = std::numeric_limits<int32_t>::max()) {
    const pybind11::handle given = take(field);
    int overflow = 0;
    const bool is_integer = PyLong_Check(given.ptr()) && !PyBool_Check(given.ptr());
    const int64_t value = is_integer ? PyLong_AsLongLongAndOverflow(given.ptr(), &overflow) : 0;
    if (!is_integer || overflow != 0 || value < least || value > most) {
      expected(field, "an integer from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value;
  }
  bool flag(const char* field) {
    const pybind11::handle given = take(field);
    if (!PyBool_Check(given.ptr())) {
      expected(field, "True or False");
    }
    return given.ptr() == Py_True;
  }
  std::string word(const char* field) {
    const pybind11::handle given = take(field);
    if (!PyUnicode_Check(given.ptr())) {
      expected(field, "a string");
    }
    return given.cast<std::string>();
  }

  // Behind the last field: refuses a dict with any other.
  void finish() const {
    if (dict_.size() == taken_.size()) {
      return;
    }
    pybind11::set known;
    for (const char* field : taken_) {
      known.add(field);
    }
    for (const auto& [key, value] : dict_) {
      if (!known.contains(key)) {
        throw std::invalid_argument(name_ + ": unknown field " + text(key));
      }
    }
  }

  [[noreturn]] void expected(const char* field, const std::string& what) const {
    throw std::invalid_argument(name_ + ": " + field + ": expected " + what + ", got " +
                                text(dict_[field]));
  }

 private:
  pybind11::handle take(const char* field) {
    PyObject* const given = PyDict_GetItemString(dict_.ptr(), field);
    if (!given) {
      throw std::invalid_argument(name_ + ": missing field " + field);
    }
    taken_.push_back(field);
    return given;
  }

  static std::string text(pybind11::handle value) { return pybind11::repr(value); }

  const std::string name_;
  const pybind11::dict& dict_;
  std::vector<const char*> taken_;
};

inline Device device_from(const pybind11::dict& dict) {
  Fields fields("device", dict);
  Device device{};
  device.multiprocessors = fields.integer("multiprocessors", 1);
  device.threads_per_block = fields.integer("threads_per_block", kWarp);
  device.threads_per_multiprocessor = fields.integer("threads_per_multiprocessor", kWarp);
  device.registers_per_multiprocessor = fields.integer("registers_per_multiprocessor", 1);
  device.shared_per_block = fields.integer("shared_per_block", 0);
  device.shared_per_block_optin = fields.integer("shared_per_block_optin", 0);
  device.shared_per_multiprocessor = fields.integer("shared_per_multiprocessor", 0);
  device.grid_blocks = fields.integer("grid_blocks", 1);
  device.cluster_blocks = fields.integer("cluster_blocks", 1);
  device.architecture = fields.integer("architecture", 75);
  device.driver = fields.integer("driver", 0);
  fields.finish();
  return device;
}

inline Workload workload_from(const pybind11::dict& dict) {
  Fields fields("workload", dict);
  Workload w{};
  const std::string pass = fields.word("pass");
  if (pass != "eval" && pass != "train" && pass != "backward") {
    fields.expected("pass", "eval, train or backward");
  }
  w.pass = pass == "eval" ? Pass::kEval : pass == "train" ? Pass::kTrain : Pass::kBackward;
  w.batch = fields.integer("batch", 0);
  w.radix = fields.integer("radix", 1);
  w.cardinality = fields.integer("cardinality", 1);
  w.channels = fields.integer("channels", 1);
  w.inter = fields.integer("inter", 1);
  w.pixels = fields.integer("pixels", 1);
  w.element_size = fields.integer("element_size", 2, 8);
  w.channels_last = fields.flag("channels_last");
  w.aligned = fields.flag("aligned");
  w.relu = fields.flag("relu");
  w.bn0 = fields.flag("bn0");
  w.batch_stats = fields.flag("batch_stats");
  w.bn1_batch_stats = fields.flag("bn1_batch_stats");
  fields.finish();
  const auto require = [&](bool holds, const char* field, const char* what) {
    if (!holds) {
      fields.expected(field, what);
    }
  };
  w.wanted = {true, w.bn0, true, true, true};
  require(w.element_size == 2 || w.element_size == 4 || w.element_size == 8, "element_size",
          "2, 4 or 8");
  require(w.channels % w.cardinality == 0, "channels", "a multiple of cardinality");
  require(w.inter % w.cardinality == 0, "inter", "a multiple of cardinality");
  require(w.relu || !w.bn0, "relu", "True behind bn0");
  require(w.bn0 || !w.batch_stats, "batch_stats", "False without bn0");
  require(w.pass != Pass::kEval || !w.batch_stats, "batch_stats", "False in evaluation");
  require(w.pass != Pass::kEval || !w.bn1_batch_stats, "bn1_batch_stats", "False in evaluation");
  // More than any memory has, and so few that small multiples fit 64 bits. An empty batch counts as
  // one sample.
  constexpr double kMostElements = 0x1p50;
  const double samples = std::max(static_cast<double>(w.batch), 1.0);
  require(samples * static_cast<double>(w.features()) * static_cast<double>(w.pixels) <=
                  kMostElements &&
              samples * static_cast<double>(w.inter) <= kMostElements,
          "batch", "at most 2^50 elements");
  return w;
}

inline pybind11::dict tiling_dict(const Tiling& t) {
  using pybind11::arg;
  return pybind11::dict(arg("threads") = t.threads, arg("lanes") = t.lanes,
                        arg("vector") = t.vector, arg("channel_blocks") = t.channel_blocks,
                        arg("chunk_pixels") = t.chunk_pixels, arg("chunks") = t.chunks,
                        arg("slab") = t.slab, arg("copies_at") = t.copies_at);
}

inline pybind11::dict plan(const pybind11::dict& of_device, const pybind11::dict& of_workload) {
  using pybind11::arg, pybind11::dict;
  const Device device = device_from(of_device);
  const Workload w = workload_from(of_workload);
  const Plan plan = make_plan(device, w);
  pybind11::list launches;
  for (const Launch& launch : launches_of(device, w, plan)) {
    dict one(arg("name") = launch.name, arg("blocks") = launch.blocks,
             arg("threads") = launch.threads, arg("shared_bytes") = launch.shared_bytes,
             arg("early") = launch.early);
    if (launch.kernel == Kernel::kAttention) {
      one["stages"] = forward_items(device, w, plan);
    } else if (launch.kernel == Kernel::kAttentionBackward) {
      one["stages"] = backward_items(device, w);
    }
    launches.append(one);
  }
  dict result(arg("tiling") = tiling_dict(plan.tiling),
              arg("recombine_tiling") = tiling_dict(plan.recombine_tiling),
              arg("workspace_bytes") = plan.workspace_bytes, arg("launches") = launches);
  if (const OnChip& kept = plan.on_chip; kept.cluster > 0) {
    result["on_chip"] = dict(
        arg("cluster") = kept.cluster, arg("samples") = kept.samples, arg("parts") = kept.parts,
        arg("held") = kept.held, arg("rows") = kept.rows, arg("row") = kept.row,
        arg("part_bytes") = kept.part_bytes, arg("x") = kept.x, arg("bytes") = kept.bytes);
  }
  if (w.batch_stats) {
    result["statistics_tiling"] = tiling_dict(statistics_tiling(device, w));
  }
  return result;
}

// The constants that tests compare with.
inline pybind11::dict plan_limits() {
  using pybind11::arg;
  return pybind11::dict(arg("map_threads") = kMapThreads, arg("product_threads") = kProductThreads,
                        arg("column_threads") = kColumnThreads, arg("columns") = kColumns,
                        arg("blocks_per_multiprocessor") = kBlocksPerMultiprocessor,
                        arg("slab_blocks") = kSlabBlocks, arg("registers") = kRegisters,
                        arg("tile_rows") = kTileRows, arg("tile_columns") = kTileColumns,
                        arg("most_blocks") = kMostBlocks, arg("most_pixels") = kMostPixels,
                        arg("most_channels") = kMostChannels, arg("counters") = kCounters,
                        arg("on_chip_radix") = kOnChipRadix, arg("held_samples") = kHeldSamples,
                        arg("line_bytes") = kLineBytes);
}

// What the planner is tuned with, and which values it takes: (value, least, most) by name.
inline pybind11::dict tuning_in_use() {
  pybind11::dict values;
  for (const Tunable& tunable : tunables()) {
    values[tunable.name] =
        pybind11::make_tuple(tuning().*(tunable.value), tunable.least, tunable.most);
  }
  return values;
}

inline void define_plan(pybind11::module_& m) {
  using pybind11::arg;
  m.def("plan", &plan, arg("device"), arg("workload"));
  m.def("plan_limits", &plan_limits);
  m.def("tuning", &tuning_in_use);
}

}  // namespace resnest_fused::cuda
