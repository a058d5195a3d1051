// Runs kernels on the CPU, one after the other: CUDA threads are coroutines of the thread that
// launches, so that a barrier costs nanoseconds and every run of a kernel is repeatable.
//
// `resident_blocks` blocks at a time run concurrently, or one cluster; in which order they begin,
// and which of their threads goes on, is drawn at random from the `seed`. Shared memory starts as
// NaN. A launch fails when all of its threads wait for each other, at barriers or in loops, or when
// a warp operation is not one of the whole warp.
//
// ThreadSanitizer takes each coroutine for a thread. This file is compiled without it and declares
// what orders memory in CUDA: __syncthreads, __syncwarp, a cluster's barrier, copies that have
// arrived, the beginning and the end of a launch.
// Shuffles order nothing, nor does one block's end with another's beginning. (A coroutine runs
// threads of several blocks; which ones, is drawn too, so that such an order does not last.)
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#if defined(CUDA_ON_HOST_THREAD)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#elif defined(CUDA_ON_HOST_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

int64_t cuda_on_host::mistake = 0;

namespace {

constexpr unsigned kWarpThreads = 32;
constexpr unsigned kFullMask = 0xffffffff;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
// Loads of atomics after which a thread is taken to wait for another.
constexpr unsigned kLoads = 16;
// Turns, and turns a thread, in which nobody does anything but wait in a loop.
constexpr uint64_t kIdleTurns = 100'000;
constexpr uint64_t kIdleTurnsOfThread = 100;

struct Options {
  int64_t resident_blocks = 3;
  int64_t shared_memory_limit = 48 << 10;  // bytes a block
  int64_t shared_memory_optin = 0;         // that a kernel may ask for
  int64_t seed = 0;
} options;

// --- ThreadSanitizer: what came before a release is known to whoever acquires the same address

void release(void* address) {
#if defined(CUDA_ON_HOST_THREAD)
  __tsan_release(address);
#else
  static_cast<void>(address);
#endif
}

void acquire(void* address) {
#if defined(CUDA_ON_HOST_THREAD)
  __tsan_acquire(address);
#else
  static_cast<void>(address);
#endif
}

// While it lives, this thread's own reads, writes, allocations and frees go unseen.
struct Unseen {
#if defined(CUDA_ON_HOST_THREAD)
  Unseen() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Unseen() {}
#endif
};

// --- coroutines

// A place to continue from: what __builtin_setjmp stores, and what the sanitizer has to be told.
struct Context {
  void* registers[5];
#if defined(CUDA_ON_HOST_THREAD)
  void* fiber;
#elif defined(CUDA_ON_HOST_ADDRESS)
  void* fake_stack;
  const void* stack;
  size_t stack_bytes;
#endif
};

// These two are functions of their own because registers live only in the frame that saves them,
// and not to be analysed because between call and return all other registers change.
[[gnu::noipa]] void jump(Context& to) { __builtin_longjmp(to.registers, 1); }

[[gnu::noipa]] void save_and_jump(Context& from, Context& to) {
  if (!__builtin_setjmp(from.registers)) {
    jump(to);
  }
}

// The first thing that a context does after a switch from `previous`.
void arrive(Context& here, Context& previous) {
#if defined(CUDA_ON_HOST_ADDRESS)
  __sanitizer_finish_switch_fiber(here.fake_stack, &previous.stack, &previous.stack_bytes);
#else
  static_cast<void>(here), static_cast<void>(previous);
#endif
}

// Continue `to`, until it switches back.
void switch_context(Context& here, Context& to) {
#if defined(CUDA_ON_HOST_THREAD)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#elif defined(CUDA_ON_HOST_ADDRESS)
  __sanitizer_start_switch_fiber(&here.fake_stack, to.stack, to.stack_bytes);
#endif
  save_and_jump(here, to);
  arrive(here, to);
}

// Why a thread does not run.
enum class State {
  kReady,
  kInLoop,
  kAtSyncThreads,
  kAtSyncWarp,
  kAtClusterSync,
  kAtShuffle,
  kInPartOfWarp,
  kAtUnknownArrivals,
  kEnded,
};
constexpr const char* kStateNames[] = {"ready",
                                       "waiting in a loop",
                                       "at __syncthreads",
                                       "at __syncwarp",
                                       "at a cluster's barrier",
                                       "at a shuffle",
                                       "at an operation of part of a warp",
                                       "at copies that were never announced",
                                       "ended"};

struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Coroutine {
  Context context;
  char* stack;
  Block* block;
  unsigned thread;  // in its block
  unsigned loads;   // in this turn
  State state;
  bool waited;                    // for the launch before
  std::vector<Copy> copies;       // that have not come
  std::vector<size_t> committed;  // how many of them were there at each commit
};

// --- blocks

struct Launch {
  const cudaLaunchConfig_t& config;
  void (*run_thread)(const void*);
  const void* kernel;
  unsigned cluster;         // blocks of one
  bool early;               // may begin before the launch before has ended
  char begin = 0, end = 0;  // to release and acquire

  unsigned threads() const { return config.blockDim.x * config.blockDim.y * config.blockDim.z; }
  uint64_t blocks() const {
    return uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
  }
};

// Threads that wait until all that have not ended are here.
struct Meeting {
  unsigned expected = 0;
  std::vector<Coroutine*> waiting;
  // Alternate, so that a thread leaving learns nothing of the next meeting.
  unsigned phase = 0;
  char releases[2] = {};
};

struct Warp {
  Meeting meeting;
  // Alternate, so that a thread may give before the others have taken what it gave before.
  uint64_t given[2][kWarpThreads] = {};
};

struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
};

// Copies that arrive together, once a thread has said how many bytes they are.
struct Arrivals {
  ptrdiff_t threads, bytes = 0;  // that are still to come
  std::vector<Copy> copies;
  bool done = false;
};

struct Block {
  Block(const Launch& launch, uint64_t index, std::shared_ptr<Cluster> of)
      : index(index),
        cluster(std::move(of)),
        coroutines(launch.threads()),
        // Of exactly the bytes asked for: AddressSanitizer guards them.
        shared_memory(static_cast<unsigned char*>(std::malloc(launch.config.dynamicSmemBytes))),
        warps((launch.threads() + kWarpThreads - 1) / kWarpThreads) {
    std::memset(shared_memory, 0xff, launch.config.dynamicSmemBytes);  // NaN in every dtype
    meeting.expected = launch.threads();
    cluster->meeting.expected += launch.threads();
    cluster->blocks.push_back(this);
    for (unsigned thread = 0; thread < launch.threads(); ++thread) {
      ++warps[thread / kWarpThreads].meeting.expected;
    }
  }
  ~Block() { std::free(shared_memory); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const uint64_t index;
  const std::shared_ptr<Cluster> cluster;
  std::vector<Coroutine*> coroutines;
  unsigned char* const shared_memory;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Arrivals>> arrivals;
};

// Runs launches for one thread of the host. A coroutine says what it waits for and stops; here the
// books are kept.
class Scheduler {
 public:
  // Why the launch failed, if it did.
  std::string run(Launch& launch);

  // For the coroutine that runs.
  void wait_as(State state) {
    current->state = state;
    switch_context(current->context, context_);
  }
  Warp& warp() { return current->block->warps[current->thread / kWarpThreads]; }
  [[noreturn]] void run_threads();

  Coroutine* current = nullptr;

 private:
  void begin_coroutine(Coroutine& coroutine);
  void begin_block(uint64_t index, const std::shared_ptr<Cluster>& cluster);
  void take_turn(size_t place);
  void join(Meeting& meeting);
  void leave(Meeting& meeting);
  void finish(Meeting& meeting);
  void give_up();
  std::string describe(const Block& block) const;

  Context context_;
  Launch* launch_ = nullptr;
  std::vector<Coroutine*> free_;
  std::vector<Coroutine*> ready_;
  // On the heap: what ThreadSanitizer knows of an address ends when it is freed.
  std::vector<std::unique_ptr<Block>> resident_;
  std::minstd_rand random_;
  uint64_t idle_turns_ = 0;  // in a row
  std::string failure_;
};

// A host thread keeps its own, as coroutines cannot move to another one, and for good.
Scheduler& scheduler() {
  static thread_local Scheduler& of_thread = *new Scheduler;
  return of_thread;
}

// The life of a coroutine: one thread of a block after the other.
void Scheduler::run_threads() {
  arrive(current->context, context_);
  for (;;) {
    Launch& launch = *launch_;
    acquire(&launch.begin);
    launch.run_thread(launch.kernel);
    release(&launch.end);
    wait_as(State::kEnded);
  }
}

void Scheduler::begin_coroutine(Coroutine& coroutine) {
#if defined(CUDA_ON_HOST_THREAD)
  coroutine.context.fiber = __tsan_create_fiber(0);
#elif defined(CUDA_ON_HOST_ADDRESS)
  // One that was given up leaves its frames' guards behind.
  __asan_unpoison_memory_region(coroutine.stack, kStackBytes);
  coroutine.context.fake_stack = nullptr;
  coroutine.context.stack = coroutine.stack;
  coroutine.context.stack_bytes = kStackBytes;
#endif
  // makecontext changes the stack once; from then on __builtin_setjmp does, without system calls.
  static thread_local ucontext_t entry, back;
  static thread_local Context* entered;
  getcontext(&entry);
  entry.uc_stack.ss_sp = coroutine.stack;
  entry.uc_stack.ss_size = kStackBytes;
  entry.uc_link = nullptr;
  entered = &coroutine.context;
  const auto enter = [] {
    if (!__builtin_setjmp(entered->registers)) {
      swapcontext(&entry, &back);
    }
    scheduler().run_threads();
  };
  makecontext(&entry, enter, 0);
  swapcontext(&back, &entry);
}

void Scheduler::begin_block(uint64_t index, const std::shared_ptr<Cluster>& cluster) {
  resident_.push_back(std::make_unique<Block>(*launch_, index, cluster));
  Block& block = *resident_.back();
  while (free_.size() < launch_->threads()) {
    const size_t guard = static_cast<size_t>(getpagesize());
    void* const memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) {
      std::perror("cuda_on_host: a stack");
      std::abort();
    }
    free_.push_back(new Coroutine{});
    free_.back()->stack = static_cast<char*>(memory) + guard;
    begin_coroutine(*free_.back());
  }
  std::shuffle(free_.begin(), free_.end(), random_);
  for (unsigned thread = 0; thread < launch_->threads(); ++thread) {
    Coroutine* const coroutine = free_.back();
    free_.pop_back();
    coroutine->block = &block;
    coroutine->thread = thread;
    coroutine->waited = false;
    coroutine->state = State::kReady;
    coroutine->copies.clear();
    coroutine->committed.clear();
    block.coroutines[thread] = coroutine;
    ready_.push_back(coroutine);
  }
}

void Scheduler::finish(Meeting& meeting) {
  for (Coroutine* coroutine : meeting.waiting) {
    coroutine->state = State::kReady;
    ready_.push_back(coroutine);
  }
  meeting.waiting.clear();
  meeting.phase ^= 1;
}

void Scheduler::join(Meeting& meeting) {
  if (!meeting.waiting.empty() && meeting.waiting[0]->state != current->state) {
    failure_ = "threads of a warp wait for each other at different operations";
  }
  meeting.waiting.push_back(current);
  if (meeting.waiting.size() == meeting.expected) {
    finish(meeting);
  }
}

// A thread that has ended keeps nobody waiting.
void Scheduler::leave(Meeting& meeting) {
  --meeting.expected;
  if (!meeting.waiting.empty() && meeting.waiting.size() == meeting.expected) {
    finish(meeting);
  }
}

// Lets the coroutine at this place of the ready ones run until it waits.
void Scheduler::take_turn(size_t place) {
  std::swap(ready_[place], ready_.back());
  current = ready_.back();
  ready_.pop_back();
  Block& block = *current->block;
  const dim3 grid = launch_->config.gridDim, shape = launch_->config.blockDim;
  const unsigned thread = current->thread;
  threadIdx = {thread % shape.x, thread / shape.x % shape.y, thread / shape.x / shape.y};
  blockIdx = {static_cast<unsigned>(block.index % grid.x),
              static_cast<unsigned>(block.index / grid.x % grid.y),
              static_cast<unsigned>(block.index / grid.x / grid.y)};
  current->loads = 0;
  switch_context(context_, current->context);

  idle_turns_ = current->state == State::kInLoop ? idle_turns_ + 1 : 0;
  switch (current->state) {
    case State::kInLoop:
      ready_.push_back(current);
      if (idle_turns_ > kIdleTurns + kIdleTurnsOfThread * ready_.size()) {
        failure_ = "deadlock";
      }
      break;
    case State::kAtSyncThreads:
      join(block.meeting);
      break;
    case State::kAtClusterSync:
      join(block.cluster->meeting);
      break;
    case State::kAtShuffle:
      if (warp().meeting.expected != kWarpThreads) {
        failure_ = "a shuffle in a warp of fewer than 32 threads";
      }
      join(warp().meeting);
      break;
    case State::kAtSyncWarp:
      join(warp().meeting);
      break;
    case State::kInPartOfWarp:
      failure_ = "a warp operation that does not name the whole warp";
      break;
    case State::kAtUnknownArrivals:
      failure_ = "a thread makes or waits for copies that were never announced";
      break;
    case State::kEnded:
      if (launch_->early && !current->waited) {
        failure_ = "a thread that did not wait for the launch before";
      }
      leave(warp().meeting);
      leave(block.meeting);
      leave(block.cluster->meeting);
      free_.push_back(current);
      if (block.meeting.expected == 0) {
        std::erase_if(resident_, [&](const auto& one) { return one.get() == &block; });
      }
      break;
    case State::kReady:
      std::abort();  // a coroutine says why it stops
  }
}

std::string Scheduler::describe(const Block& block) const {
  size_t counts[std::size(kStateNames)] = {};
  for (const Coroutine* coroutine : block.coroutines) {
    // One that has ended may run in another block.
    const bool here = coroutine->block == &block;
    ++counts[static_cast<size_t>(here ? coroutine->state : State::kEnded)];
  }
  std::string text = "block " + std::to_string(block.index) + ":";
  for (size_t state = 0; state < std::size(kStateNames); ++state) {
    if (counts[state]) {
      text += " " + std::to_string(counts[state]) + " " + kStateNames[state] + ",";
    }
  }
  text.pop_back();
  return text;
}

// Ends the threads of a launch that has failed, wherever they are.
void Scheduler::give_up() {
  std::sort(resident_.begin(), resident_.end(),
            [](const auto& a, const auto& b) { return a->index < b->index; });
  for (const auto& block : resident_) {
    failure_ += "; " + describe(*block);
  }
  for (const auto& block : resident_) {
    for (Coroutine* coroutine : block->coroutines) {
      if (coroutine->block == block.get() && coroutine->state != State::kEnded) {
#if defined(CUDA_ON_HOST_THREAD)
        // What it has done is over for the host too.
        __tsan_switch_to_fiber(coroutine->context.fiber, __tsan_switch_to_fiber_no_sync);
        release(&launch_->end);
        __tsan_switch_to_fiber(context_.fiber, __tsan_switch_to_fiber_no_sync);
        __tsan_destroy_fiber(coroutine->context.fiber);
#endif
        begin_coroutine(*coroutine);
        free_.push_back(coroutine);
      }
    }
  }
  ready_.clear();
  resident_.clear();
}

std::string Scheduler::run(Launch& launch) {
#if defined(CUDA_ON_HOST_THREAD)
  context_.fiber = __tsan_get_current_fiber();
#endif
  release(&launch.begin);
  {
    const Unseen unseen;
    launch_ = &launch;
    gridDim = launch.config.gridDim;
    blockDim = launch.config.blockDim;
    random_.seed(static_cast<uint32_t>(options.seed));
    failure_.clear();
    idle_turns_ = 0;
    // Clusters, mostly of one block, that are still to begin, from the back.
    std::vector<uint64_t> clusters(launch.blocks() / launch.cluster);
    std::iota(clusters.begin(), clusters.end(), 0);
    std::shuffle(clusters.begin(), clusters.end(), random_);
    const size_t most = static_cast<size_t>(options.resident_blocks);
    do {
      while (!clusters.empty() &&
             (resident_.empty() || resident_.size() + launch.cluster <= most)) {
        const auto cluster = std::make_shared<Cluster>();
        for (unsigned rank = 0; rank < launch.cluster; ++rank) {
          begin_block(clusters.back() * launch.cluster + rank, cluster);
        }
        clusters.pop_back();
      }
      if (ready_.empty()) {
        failure_ = "deadlock";
      } else {
        take_turn(random_() % ready_.size());
      }
    } while (failure_.empty() && (!resident_.empty() || !clusters.empty()));
    if (!failure_.empty()) {
      give_up();
    }
  }
  acquire(&launch.end);
  return failure_;
}

int64_t launches = 0;
std::unordered_map<const void*, int64_t> opted_in;  // bytes of shared memory, by kernel
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string failure;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

// A barrier: what the threads did before it is known to all behind it.
void sync(Meeting& meeting, State state) {
  char* const releases = &meeting.releases[meeting.phase];
  release(releases);
  scheduler().wait_as(state);
  acquire(releases);
}

void check_mask(unsigned mask) {
  if (mask != kFullMask) {
    scheduler().wait_as(State::kInPartOfWarp);  // for good
  }
}

}  // namespace

// --- inside a kernel

void cuda_on_host::sync_block() {
  sync(scheduler().current->block->meeting, State::kAtSyncThreads);
}

void cuda_on_host::sync_warp(unsigned mask) {
  check_mask(mask);
  sync(scheduler().warp().meeting, State::kAtSyncWarp);
}

void cuda_on_host::sync_cluster() {
  sync(scheduler().current->block->cluster->meeting, State::kAtClusterSync);
}

unsigned cuda_on_host::block_rank() {
  const Block& block = *scheduler().current->block;
  return static_cast<unsigned>(block.index % cluster_blocks());
}

unsigned cuda_on_host::cluster_blocks() {
  return static_cast<unsigned>(scheduler().current->block->cluster->blocks.size());
}

unsigned char* cuda_on_host::in_block(unsigned char* address, int rank) {
  const Block& block = *scheduler().current->block;
  return block.cluster->blocks.at(static_cast<size_t>(rank))->shared_memory +
         (address - block.shared_memory);
}

void cuda_on_host::wait_for_launch_before() { scheduler().current->waited = true; }

void* cuda_on_host::begin_arrivals(ptrdiff_t expected) {
  const Unseen unseen;
  auto& arrivals = scheduler().current->block->arrivals;
  arrivals.push_back(std::make_unique<Arrivals>());
  arrivals.back()->threads = expected;
  return arrivals.back().get();
}

// Those at an address of the running block; who finds none there does not go on.
static Arrivals& known_arrivals(void* arrivals) {
  for (const auto& one : scheduler().current->block->arrivals) {
    if (one.get() == arrivals) {
      return *one;
    }
  }
  scheduler().wait_as(State::kAtUnknownArrivals);
  std::abort();
}

void cuda_on_host::arrive(void* arrivals, ptrdiff_t threads, ptrdiff_t bytes) {
  const Unseen unseen;
  Arrivals& one = known_arrivals(arrivals);
  one.threads -= threads;
  one.bytes += bytes;
}

// A copy whose bytes, from and to, are multiples of so many. Until it arrives, what was in its
// place may be gone already.
static Copy copy_in(size_t unit, void* to, const void* from, size_t bytes) {
  if (bytes % unit != 0 || reinterpret_cast<uintptr_t>(to) % unit != 0 ||
      reinterpret_cast<uintptr_t>(from) % unit != 0) {
    std::fprintf(stderr, "cuda_on_host: a copy of bytes that are no multiple of %zu\n", unit);
    std::abort();
  }
  std::memset(to, 0xff, bytes);
  return {to, from, bytes};
}

// A thread's: of 4, 8 or 16 bytes.
void cuda_on_host::copy_async(void* to, const void* from, size_t bytes) {
  const Unseen unseen;
  const size_t unit = bytes == 4 || bytes == 8 ? bytes : 16;
  if (bytes > unit) {
    std::fprintf(stderr, "cuda_on_host: a thread copies at most 16 bytes\n");
    std::abort();
  }
  scheduler().current->copies.push_back(copy_in(unit, to, from, bytes));
}

void cuda_on_host::commit_copies() {
  const Unseen unseen;
  Coroutine& thread = *scheduler().current;
  thread.committed.push_back(thread.copies.size());
}

void cuda_on_host::wait_for_copies(size_t but_groups) {
  Coroutine& thread = *scheduler().current;
  std::vector<Copy> come;
  {
    const Unseen unseen;
    if (thread.committed.size() > but_groups) {
      const size_t groups = thread.committed.size() - but_groups;
      const size_t count = thread.committed[groups - 1];
      const auto end = thread.copies.begin() + static_cast<ptrdiff_t>(count);
      come.assign(thread.copies.begin(), end);
      thread.copies.erase(thread.copies.begin(), end);
      thread.committed.erase(thread.committed.begin(),
                             thread.committed.begin() + static_cast<ptrdiff_t>(groups));
      for (size_t& later : thread.committed) {
        later -= count;
      }
    }
  }
  for (const Copy& copy : come) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void cuda_on_host::copy_later(void* arrivals, void* to, const void* from, size_t bytes) {
  const Unseen unseen;
  Arrivals& one = known_arrivals(arrivals);
  one.bytes -= static_cast<ptrdiff_t>(bytes);
  one.copies.push_back(copy_in(16, to, from, bytes));
}

void cuda_on_host::wait_for_arrivals(void* arrivals, bool) {
  Arrivals& one = known_arrivals(arrivals);
  const auto have_come = [&] {
    const Unseen unseen;
    return one.done || (one.threads == 0 && one.bytes == 0);
  };
  while (!have_come()) {
    spin();
  }
  bool first;
  {
    const Unseen unseen;
    first = !one.done;
    one.done = true;
  }
  if (first) {
    for (const Copy& copy : one.copies) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    release(arrivals);
  }
  acquire(arrivals);
}

unsigned cuda_on_host::lane() { return scheduler().current->thread % kWarpThreads; }

uint64_t cuda_on_host::exchange(unsigned mask, uint64_t bits, unsigned from_lane) {
  check_mask(mask);
  Scheduler& here = scheduler();
  Warp& warp = here.warp();
  const unsigned lane = here.current->thread % kWarpThreads;
  uint64_t* const given = warp.given[warp.meeting.phase];
  given[lane] = bits;
  here.wait_as(State::kAtShuffle);
  return given[from_lane % kWarpThreads];
}

void cuda_on_host::spin() { scheduler().wait_as(State::kInLoop); }

void cuda_on_host::count_load() {
  if (++scheduler().current->loads > kLoads) {
    spin();
  }
}

unsigned char* resnest_fused::cuda::shared_memory() {
  return scheduler().current->block->shared_memory;
}

// --- outside

cudaError_t cuda_on_host::opt_in(const void* function, int shared_bytes) {
  if (shared_bytes > std::max(options.shared_memory_limit, options.shared_memory_optin)) {
    return remember(cudaErrorInvalidValue);
  }
  opted_in[function] = shared_bytes;
  return cudaSuccess;
}

cudaError_t cuda_on_host::launch(const cudaLaunchConfig_t& config, void (*run_thread)(const void*),
                                 const void* kernel, const void* function) {
  ++launches;
  unsigned cluster = 1;
  bool early = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = attribute.val.clusterDim.x;
    } else {
      early = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  Launch launch{config, run_thread, kernel, cluster, early};
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > 64 || launch.blocks() == 0 ||
      cluster == 0 || grid.x % cluster != 0 || grid.x > 0x7fffffff || grid.y > 0xffff ||
      grid.z > 0xffff) {
    return remember(cudaErrorInvalidConfiguration);
  }
  const auto asked = opted_in.find(function);
  const int64_t allowed = asked != opted_in.end()
                              ? std::max(options.shared_memory_limit, asked->second)
                              : options.shared_memory_limit;
  if (config.dynamicSmemBytes > static_cast<size_t>(allowed)) {
    return remember(cudaErrorInvalidValue);
  }
  std::string reason = scheduler().run(launch);
  if (reason.empty()) {
    return cudaSuccess;
  }
  failure = std::move(reason);
  return remember(cudaErrorLaunchFailure);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return failure.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// --- for the tests

// Sets one of the Options, or the mistake; false when there is none of that name.
extern "C" __attribute__((visibility("default"))) bool cuda_on_host_set(const char* name,
                                                                        int64_t value) {
  const std::string_view wanted = name;
  if (wanted == "resident_blocks") {
    options.resident_blocks = value;
  } else if (wanted == "shared_memory_limit") {
    options.shared_memory_limit = value;
  } else if (wanted == "shared_memory_optin") {
    options.shared_memory_optin = value;
  } else if (wanted == "seed") {
    options.seed = value;
  } else if (wanted == "mistake") {
    cuda_on_host::mistake = value;
  } else {
    return false;
  }
  return true;
}

// How many launches there were so far.
extern "C" __attribute__((visibility("default"))) int64_t cuda_on_host_launches() {
  return launches;
}
