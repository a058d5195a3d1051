// Stands before torch's own functions, by LD_PRELOAD, and notes how work would be shared among any
// number of threads. It runs none of it. For test_parallel.py.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Shared {
  int64_t items, threads, largest;
};

int64_t threads = 1;
std::vector<Shared> noted;

}  // namespace

extern "C" {

using Piece = void (*)(int64_t begin, int64_t end, void* context);

// As at::parallel_for cuts [begin, end).
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Piece, void*) {
  const int64_t items = end - begin;
  const int64_t most = std::min(threads, (items + grain - 1) / grain);
  const int64_t largest = (items + most - 1) / most;
  noted.push_back({items, (items + largest - 1) / largest, largest});
  return 0;
}

int32_t torch_get_num_threads(uint32_t* result) {
  *result = static_cast<uint32_t>(threads);
  return 0;
}

void set_threads(int64_t count) {
  threads = count;
  noted.clear();
}

int64_t noted_count() { return static_cast<int64_t>(noted.size()); }
const Shared* noted_begin() { return noted.data(); }
}
