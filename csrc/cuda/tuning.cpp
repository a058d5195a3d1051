// The tuning's ranges, and its file.
#include "cuda/tuning.h"

#include <bit>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

namespace resnest_fused::cuda {
namespace {

// Far beyond what could be fast. The planner counts up to them without overflow; its loops end
// whatever they are, but a division by zero would not.
constexpr int64_t kMostOfBlock = 1024;
constexpr Tunable kTunables[] = {
    {"chunks", &Tuning::chunks, 1, kMostOfBlock},
    {"chunk_pixels", &Tuning::chunk_pixels, 1, kMostPixels},
    {"long_chunk_pixels", &Tuning::long_chunk_pixels, 1, kMostPixels},
    {"statistics_blocks", &Tuning::statistics_blocks, 1, kMostOfBlock},
    {"line_blocks", &Tuning::line_blocks, 1, kMostOfBlock},
    {"slab_blocks", &Tuning::slab_blocks, 1, kMostOfBlock},
    {"thread_vectors", &Tuning::thread_vectors, 1, kMostOfBlock},
    {"sample_slab_bytes", &Tuning::sample_slab_bytes, 16, kMostShared},
    {"slab_bytes", &Tuning::slab_bytes, 16, kMostShared},
    {"sample_lanes", &Tuning::sample_lanes, kLeastLanes, kWarp, true},  // a block has a warp
    {"on_chip_samples", &Tuning::on_chip_samples, 0, kHeldSamples},
    {"early_launches", &Tuning::early_launches, 0, 1},
};

// A text of somebody's for a message: ASCII alone, and no more than its beginning.
std::string shown(std::string_view text, size_t most = 60) {
  std::string result;
  for (const char c : text.substr(0, most)) {
    if (c >= ' ' && c <= '~') {
      result += c;
    } else {
      char escaped[5];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", static_cast<unsigned char>(c));
      result += escaped;
    }
  }
  return result + (text.size() > most ? "..." : "");
}

std::string_view without_spaces(std::string_view text) {
  constexpr const char* kSpaces = " \t\r";
  const size_t first = text.find_first_not_of(kSpaces);
  return first == text.npos ? std::string_view{}
                            : text.substr(first, text.find_last_not_of(kSpaces) + 1 - first);
}

const Tunable* find(std::string_view name) {
  for (const Tunable& tunable : kTunables) {
    if (name == tunable.name) {
      return &tunable;
    }
  }
  return nullptr;
}

int64_t value_of(const Tunable& tunable, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc{} && end == text.data() + text.size();
  if (!whole || value < tunable.least || value > tunable.most ||
      (tunable.power_of_two && !std::has_single_bit(static_cast<uint64_t>(value)))) {
    throw std::runtime_error(std::string(tunable.name) + ": expected " +
                             (tunable.power_of_two ? "a power of two" : "an integer") + " from " +
                             std::to_string(tunable.least) + " to " + std::to_string(tunable.most) +
                             ", got '" + shown(text) + "'");
  }
  return value;
}

// Take one line in; `given` are the names of those before.
void read_line(Tuning& tuning, std::set<std::string_view>& given, std::string_view line) {
  line = without_spaces(line.substr(0, line.find('#')));
  if (line.empty()) {
    return;
  }
  const size_t equals = line.find('=');
  if (equals == line.npos) {
    throw std::runtime_error("expected name = value, got '" + shown(line) + "'");
  }
  const std::string_view name = without_spaces(line.substr(0, equals));
  const Tunable* const tunable = find(name);
  if (!tunable) {
    throw std::runtime_error("nothing is named '" + shown(name) + "'");
  }
  if (!given.insert(tunable->name).second) {
    throw std::runtime_error(shown(name) + " is there twice");
  }
  tuning.*(tunable->value) = value_of(*tunable, without_spaces(line.substr(equals + 1)));
}

Tuning read_file(const std::string& path) {
  std::ifstream file(path);
  Tuning tuning;
  std::set<std::string_view> given;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (number == 1 && line.starts_with("\xef\xbb\xbf")) {
      line.erase(0, 3);  // the mark that some editors begin UTF-8 with
    }
    try {
      read_line(tuning, given, line);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(shown(path, path.size()) + ", line " + std::to_string(number) +
                               ": " + error.what());
    }
  }
  if (!file.eof()) {
    throw std::runtime_error("cannot read " + shown(path, path.size()));
  }
  return tuning;
}

// What was read, or why nothing was.
struct Reading {
  Tuning tuning;
  std::string error;
};

Reading read() {
  const char* const path = std::getenv("RESNEST_FUSED_CUDA_TUNING");
  if (path == nullptr || *path == '\0') {
    return {};
  }
  try {
    return {read_file(path), ""};
  } catch (const std::runtime_error& error) {
    return {{}, std::string("RESNEST_FUSED_CUDA_TUNING: ") + error.what()};
  }
}

// On loading: later the folder may be another one.
const Reading kReading = read();

}  // namespace

const Tuning& tuning() {
  if (!kReading.error.empty()) {
    throw std::runtime_error(kReading.error);
  }
  return kReading.tuning;
}

std::span<const Tunable> tunables() { return kTunables; }

}  // namespace resnest_fused::cuda
