// parallel_items with work that throws, for test_parallel.py.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"

struct Refusal : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Runs `items` work items of so many bytes, of which those from `first` on throw; what came of it.
extern "C" void run(int64_t items, int64_t bytes_per_item, int64_t first, char* told, size_t size) {
  std::string result = "nothing thrown";
  try {
    resnest_fused::cpu::parallel_items(items, bytes_per_item, [&](int64_t begin, int64_t end) {
      if (end > first) {
        throw Refusal("item " + std::to_string(std::max(begin, first)));
      }
    });
  } catch (const Refusal& refusal) {
    result = std::string("Refusal: ") + refusal.what();
  } catch (const std::exception& other) {
    result = std::string("another exception: ") + other.what();
  }
  std::strncpy(told, result.c_str(), size - 1);
}
