// Stands in for CUDA's <cuda_runtime.h> when csrc/*.cu are compiled by a C++ compiler for test_cuda_emulation.py: enough of
// it for one-dimensional grids, static shared memory, __syncthreads and the warp intrinsics below.
//
// A block's threads are fibers of one OS thread; blocks run one after another. Which fiber goes next is a policy, so that a
// race between barriers shows as a result that depends on it. Shared memory holds NaN when a block begins. What CUDA leaves
// undefined is reported by name (Error) instead of happening: a barrier that is not the whole block's, a shuffle or
// __syncwarp whose lanes are not all there, a value read from a lane that gave none, a grid that no GPU accepts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// one section for the shared memory of all kernels, whose bounds the linker knows
#define __shared__ static __attribute__((section("emulated_shared"), used))
extern "C" unsigned char __start_emulated_shared[], __stop_emulated_shared[];

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { ascending, descending, round_robin, random, warp_ahead };
constexpr const char* kOrders[] = {"ascending", "descending", "round robin", "random", "one warp ahead"};
inline Order order = Order::ascending;
inline std::mt19937 dice{0};

// A seeded fault: the barrier at this line does nothing, or the shuffle at this line reads a lane too far.
inline int dropped_line = 0, shifted_line = 0;

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class Wait { none, block, warp, over };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  Wait wait;
  int line;               // of the barrier or intrinsic it waits at
  unsigned mask;          // of lanes that have to come
  uint64_t given;         // to the shuffle
  uint64_t lanes[kWarp];  // what all of its warp gave
  void* fake_stack;       // AddressSanitizer's
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::function<void()> kernel;
  std::exception_ptr error;  // of a fiber, whose stack it cannot leave
  int running = 0;
};
inline Block block;

inline std::string where(int thread) {
  return " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread) + ", line " +
         std::to_string(block.fibers[thread].line) + ")";
}

#if defined(__SANITIZE_ADDRESS__)
inline void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
inline void arrive(void* fake, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

// From the scheduler to a fiber, until it waits or is over.
inline void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  block.running = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  void* fake = nullptr;
  leave(&fake, fiber.stack.get(), kStack);
  swapcontext(&block.scheduler, &fiber.context);
  arrive(fake, nullptr, nullptr);
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

// From a fiber to the scheduler, until what it waits for has come.
inline void suspend(Wait wait, int line) {
  Fiber& fiber = block.fibers[block.running];
  fiber.wait = wait;
  fiber.line = line;
  leave(&fiber.fake_stack, block.scheduler_stack, block.scheduler_size);
  swapcontext(&fiber.context, &block.scheduler);
  arrive(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_size);
}

inline void fiber_main() {
  arrive(nullptr, &block.scheduler_stack, &block.scheduler_size);
  try {
    block.kernel();
  } catch (...) {
    block.error = std::current_exception();
  }
  Fiber& fiber = block.fibers[block.running];
  fiber.wait = Wait::over;
  leave(nullptr, block.scheduler_stack, block.scheduler_size);  // null: its fake stack can go
  swapcontext(&fiber.context, &block.scheduler);
}

// Lets the block go on if all of it that is not over waits at one barrier; true if it did.
inline bool release_block() {
  int first = -1;
  for (size_t t = 0; t < block.fibers.size(); ++t) {
    if (block.fibers[t].wait == Wait::over) continue;
    if (block.fibers[t].wait != Wait::block) return false;
    if (first < 0) first = static_cast<int>(t);
    if (block.fibers[t].line != block.fibers[first].line)
      throw Error("threads of a block wait at different barriers" + where(first) + where(static_cast<int>(t)));
  }
  for (Fiber& fiber : block.fibers)
    if (fiber.wait == Wait::block) fiber.wait = Wait::none;
  return first >= 0;
}

// The same for the lanes of a warp that wait for each other.
inline bool release_warp(int warp) {
  const int lanes = std::min<int>(kWarp, static_cast<int>(block.fibers.size()) - warp);
  Fiber* fibers = &block.fibers[warp];
  int first = 0;
  while (first < lanes && fibers[first].wait != Wait::warp) ++first;
  if (first == lanes) return false;
  const unsigned mask = fibers[first].mask;
  bool complete = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes || fibers[lane].wait == Wait::over)
      throw Error("a warp waits for a lane that has left" + where(warp + first));
    if (fibers[lane].wait == Wait::block)
      throw Error("a warp waits for a lane that waits at a barrier" + where(warp + first) + where(warp + lane));
    if (fibers[lane].wait != Wait::warp) {
      complete = false;
    } else if (fibers[lane].line != fibers[first].line || fibers[lane].mask != mask) {
      throw Error("lanes of a warp wait at different intrinsics" + where(warp + first) + where(warp + lane));
    }
  }
  if (!complete) return false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int from = 0; from < lanes; ++from) fibers[lane].lanes[from] = fibers[from].given;
    fibers[lane].wait = Wait::none;
  }
  return true;
}

inline bool release() {
  bool released = release_block();
  for (size_t warp = 0; warp < block.fibers.size(); warp += kWarp) released |= release_warp(static_cast<int>(warp));
  return released;
}

// Which of the fibers that can go on does.
inline int next_of(const std::vector<int>& ready, int last) {
  switch (order) {
    case Order::ascending:
      return ready.front();
    case Order::descending:
      return ready.back();
    case Order::round_robin: {
      const auto after = std::upper_bound(ready.begin(), ready.end(), last);
      return after == ready.end() ? ready.front() : *after;
    }
    case Order::random:
      return ready[dice() % ready.size()];
    case Order::warp_ahead:
      for (int thread : ready)
        if (last >= 0 && thread / kWarp == last / kWarp) return thread;
      return ready[dice() % ready.size()];
  }
  throw Error("no such order");
}

inline void run_block(unsigned index, unsigned num_threads, std::function<void()> kernel) {
  blockIdx.x = index;
  block.kernel = std::move(kernel);
  block.fibers.resize(num_threads);
  const uint32_t nan = 0x7fc0dead;
  for (unsigned char* at = __start_emulated_shared; at + sizeof nan <= __stop_emulated_shared; at += sizeof nan)
    std::memcpy(at, &nan, sizeof nan);
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.wait = Wait::none;
    fiber.line = 0;
    fiber.fake_stack = nullptr;
  }
  std::vector<int> ready;
  for (int last = -1;;) {
    // One warp ahead: what its lanes wait for can be complete while other warps have not begun.
    if (order == Order::warp_ahead && last >= 0) release_warp(last / kWarp * kWarp);
    ready.clear();
    bool over = true;
    for (size_t t = 0; t < block.fibers.size(); ++t) {
      if (block.fibers[t].wait == Wait::none) ready.push_back(static_cast<int>(t));
      over &= block.fibers[t].wait == Wait::over;
    }
    if (over) return;
    if (ready.empty()) {
      if (!release()) throw Error("a block cannot go on" + where(last));
      continue;
    }
    last = next_of(ready, last);
    resume(last);
  }
}

// kernel<<<grid, num_threads, 0, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(unsigned grid, unsigned num_threads, cudaStream_t, void (*kernel)(Parameters...), Arguments... arguments) {
  if (grid == 0 || grid > 0x7fffffffu) throw Error("a grid of " + std::to_string(grid) + " blocks");
  if (num_threads == 0 || num_threads > 1024) throw Error("a block of " + std::to_string(num_threads) + " threads");
  gridDim.x = grid;
  blockDim.x = num_threads;
  std::vector<unsigned> blocks(grid);
  for (unsigned b = 0; b < grid; ++b) blocks[b] = b;
  if (order == Order::descending) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random || order == Order::warp_ahead) std::shuffle(blocks.begin(), blocks.end(), dice);
  for (unsigned b : blocks) run_block(b, num_threads, [&] { kernel(arguments...); });
}

inline void barrier(int line) {
  if (line != dropped_line) suspend(Wait::block, line);
}

// Waits for the lanes in mask.
inline void meet(unsigned mask, int line) {
  Fiber& fiber = block.fibers[block.running];
  fiber.line = line;
  fiber.mask = mask;
  if (!(mask >> block.running % kWarp & 1)) throw Error("a lane is not in its own mask" + where(block.running));
  suspend(Wait::warp, line);
}

inline void warp_barrier(int line, unsigned mask = 0xffffffffu) {
  if (line != dropped_line) meet(mask, line);
}

// The value of lane `from`, or the caller's own where the warp has no such lane.
template <class T>
T shuffle(unsigned mask, T value, int from, int toward, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "wider than a shuffle");
  const int lane = block.running % kWarp;
  if (line == shifted_line) from += toward;
  if (from < 0 || from >= kWarp) from = lane;
  Fiber& fiber = block.fibers[block.running];
  std::memcpy(&fiber.given, &value, sizeof value);
  meet(mask, line);
  if (!(mask >> from & 1)) throw Error("a shuffle reads a lane that is not in its mask" + where(block.running));
  T result;
  std::memcpy(&result, &fiber.lanes[from], sizeof result);
  return result;
}

}  // namespace emulation

#define EMULATED_LANE (emulation::block.running % emulation::kWarp)
#define __syncthreads() emulation::barrier(__LINE__)
#define __syncwarp(...) emulation::warp_barrier(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(mask, value, from) emulation::shuffle(mask, value, from, 1, __LINE__)
#define __shfl_up_sync(mask, value, delta) emulation::shuffle(mask, value, EMULATED_LANE - int(delta), -1, __LINE__)
#define __shfl_down_sync(mask, value, delta) emulation::shuffle(mask, value, EMULATED_LANE + int(delta), 1, __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulation::shuffle(mask, value, EMULATED_LANE ^ int(bits), 1, __LINE__)
