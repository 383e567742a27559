// The emulated machine: the threads of one block are fibers on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <source_location>
#include <vector>

namespace emulator {

using Where = std::source_location;

// One cp.async on its way.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  unsigned number;  // in its block
  enum { kReady, kAtBarrier, kInCollective, kExited } state;
  const char* what;  // that it waits in
  Where where;
  uint32_t mask;   // of the collective
  void* operands;  // of the collective, on this thread's stack
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> committed_groups;  // the oldest first
  std::vector<std::function<void()>> open_products;
  std::vector<std::vector<std::function<void()>>> committed_products;  // the oldest first
  void* stack_pointer;
  void* asan_stack;
};

extern Thread* current;
extern unsigned char* shared_memory;  // of the running block
extern std::mt19937 random_bits;

// Runs `body` on every thread of one block.
void run_block(int threads, size_t smem_bytes, const std::function<void()>& body);

// A place where another thread may run on. `always`: does.
void maybe_switch(bool always = false);

void barrier(const char* what, Where where);

// Waits until all lanes of `mask` came here with the same `what`. The last to come gets true and
// every lane's operands (null outside the mask), computes for all and calls release_lanes.
bool meet_lanes(const char* what, uint32_t mask, void* operands, void* (&lanes)[32], Where where);
void release_lanes(uint32_t mask);

// Prints what is wrong and ends the process.
[[noreturn]] void fail(const char* message, const char* what, Where where);

// Four values a lane of d[16, 8] += a[16, 16] * b[16, 8].
struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
void multiply(MmaOperands* const (&lanes)[32], float (*to_float)(uint16_t));

}  // namespace emulator
