#include "fibers.h"

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "emulator.h"

#ifndef __x86_64__
#error "The emulator switches stacks by hand, on x86-64 only"
#endif

// void emulator_switch_stack(void** from, void* to): keeps the callee-saved registers on the
// running stack and its pointer in *from, and goes on where `to` was left. (swapcontext would cost
// a system call each time; a GEMM tile switches a hundred thousand times.)
asm(R"(
.text
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulator_switch_stack(void** from, void* to);

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Thread* current;
unsigned char* shared_memory;
std::mt19937 random_bits;

namespace {

constexpr size_t kStackBytes = 128 * 1024;

std::vector<std::unique_ptr<unsigned char[]>> stacks;  // of all blocks so far, reused
std::vector<Thread> threads;                           // of this block
size_t threads_at_barrier;
const std::function<void()>* block_body;
void* main_stack_pointer;
void* main_asan_stack;
const void* main_stack_bottom;
size_t main_stack_size;

// Warps run by random priorities, drawn anew now and then: one runs far ahead of another, which is
// what brings a missing barrier to light, where fair turns would keep them abreast.
std::vector<uint32_t> ready_lanes;  // per warp
std::vector<uint32_t> priorities;   // per warp

void make_ready(Thread& thread) {
  thread.state = Thread::kReady;
  ready_lanes[thread.number / 32] |= 1u << thread.number % 32;
}

// A random ready lane of the ready warp of the highest priority, or null.
Thread* choose_ready() {
  int best = -1;
  for (size_t warp = 0; warp < ready_lanes.size(); ++warp) {
    if (ready_lanes[warp] && (best < 0 || priorities[warp] > priorities[best])) {
      best = static_cast<int>(warp);
    }
  }
  if (best < 0) return nullptr;
  const int rotation = random_bits() % 32;
  const uint32_t lanes = ready_lanes[best];
  const int lane = (std::countr_zero(std::rotr(lanes, rotation)) + rotation) % 32;
  return &threads[best * 32 + lane];
}

// Its path would be that of a mutated copy.
const char* file_of(Where where) {
  const char* const slash = std::strrchr(where.file_name(), '/');
  return slash ? slash + 1 : where.file_name();
}

[[noreturn]] void deadlock() {
  std::fprintf(stderr, "emulator: deadlock in block %u: no thread can run\n", blockIdx.x);
  int lines = 0;
  for (size_t i = 0; i < threads.size() && lines < 24; ++lines) {
    const Thread& t = threads[i];
    size_t end = i + 1;  // of the threads that all wait alike
    auto alike = [&](const Thread& other) {
      return other.state == t.state && other.what == t.what && other.mask == t.mask &&
             other.where.line() == t.where.line();
    };
    while (end < threads.size() && alike(threads[end])) ++end;
    if (t.state == Thread::kExited) {
      std::fprintf(stderr, "  threads %zu..%zu have exited\n", i, end - 1);
    } else {
      std::fprintf(stderr, "  threads %zu..%zu wait in %s (mask %08x) at %s:%u\n", i, end - 1,
                   t.what, t.mask, file_of(t.where), t.where.line());
    }
    i = end;
  }
  std::_Exit(3);
}

void thread_main();

// Goes on with another thread (or the same one, if it's ready and chosen), or with run_block when
// all have exited. Returns when the current thread is chosen again.
void switch_thread() {
  Thread* const from = current;
  Thread* const to = choose_ready();
  if (to == from) {
    ready_lanes[to->number / 32] &= ~(1u << to->number % 32);
    return;
  }
  const bool exits = from && from->state == Thread::kExited;
  const bool all_exited = !to && std::all_of(threads.begin(), threads.end(), [](const Thread& t) {
    return t.state == Thread::kExited;
  });
  if (!to && !all_exited) deadlock();
  const void* bottom = main_stack_bottom;
  size_t size = main_stack_size;
  void* stack_pointer = main_stack_pointer;
  if (to) {
    ready_lanes[to->number / 32] &= ~(1u << to->number % 32);
    threadIdx.x = to->number;
    bottom = stacks[to->number].get();
    size = kStackBytes;
    stack_pointer = to->stack_pointer;
  }
  current = to;
  void** const asan_stack = from ? &from->asan_stack : &main_asan_stack;
  __sanitizer_start_switch_fiber(exits ? nullptr : asan_stack, bottom, size);
  emulator_switch_stack(from ? &from->stack_pointer : &main_stack_pointer, stack_pointer);
  __sanitizer_finish_switch_fiber(*asan_stack, nullptr, nullptr);
}

void thread_main() {
  const void* from_bottom;
  size_t from_size;
  __sanitizer_finish_switch_fiber(nullptr, &from_bottom, &from_size);
  if (!main_stack_bottom) {  // the first fiber ever is entered from there
    main_stack_bottom = from_bottom;
    main_stack_size = from_size;
  }
  (*block_body)();
  current->state = Thread::kExited;
  switch_thread();
  std::abort();
}

}  // namespace

void fail(const char* message, const char* what, Where where) {
  std::fprintf(stderr, "emulator: %s in %s at %s:%u (block %u, thread %u)\n", message, what,
               file_of(where), where.line(), blockIdx.x, threadIdx.x);
  std::_Exit(3);
}

void run_block(int count, size_t smem_bytes, const std::function<void()>& body) {
  void* smem;
  if (posix_memalign(&smem, 128, smem_bytes) != 0) std::abort();
  std::memset(smem, 0xFF, smem_bytes);
  shared_memory = static_cast<unsigned char*>(smem);
  block_body = &body;
  threads.assign(count, Thread());
  ready_lanes.assign((count + 31) / 32, 0);
  priorities.resize(ready_lanes.size());
  for (uint32_t& priority : priorities) priority = random_bits();
  for (int i = 0; i < count; ++i) {
    if (static_cast<int>(stacks.size()) == i) {
      stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
    }
    // thread_main of the last block never returned, and left its frame poisoned.
    ASAN_UNPOISON_MEMORY_REGION(stacks[i].get() + kStackBytes - 1024, 1024);
    // As emulator_switch_stack pops it: six registers and where to go, one slot under the top, so
    // that the stack is aligned as after a call.
    void** const top = reinterpret_cast<void**>(stacks[i].get() + kStackBytes) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(thread_main);
    threads[i].number = i;
    threads[i].stack_pointer = top;
    make_ready(threads[i]);
  }
  switch_thread();
  std::free(smem);
}

void maybe_switch(bool always) {
  if (random_bits() % 64 == 0) priorities[current->number / 32] = random_bits();
  if (!always && random_bits() % 8 != 0) return;
  make_ready(*current);
  switch_thread();
}

void barrier(const char* what, Where where) {
  current->state = Thread::kAtBarrier;
  current->what = what;
  current->where = where;
  current->mask = 0xffffffffu;
  // Exited threads don't count as arrived: a kernel that relies on that has its barrier in
  // divergent code.
  if (++threads_at_barrier == threads.size()) {
    threads_at_barrier = 0;
    for (uint32_t& priority : priorities) priority = random_bits();
    for (Thread& thread : threads) make_ready(thread);
  }
  switch_thread();
}

bool meet_lanes(const char* what, uint32_t mask, void* operands, void* (&lanes)[32], Where where) {
  Thread& self = *current;
  if (!(mask >> self.number % 32 & 1)) fail("a lane that is not in its own mask", what, where);
  self.state = Thread::kInCollective;
  self.what = what;
  self.where = where;
  self.mask = mask;
  self.operands = operands;
  const unsigned first = self.number / 32 * 32;
  for (unsigned lane = 0; lane < 32; ++lane) {
    lanes[lane] = nullptr;
    if (!(mask >> lane & 1)) continue;
    const Thread* const t = first + lane < threads.size() ? &threads[first + lane] : nullptr;
    if (!t || t->state != Thread::kInCollective || t->what != what || t->mask != mask) {
      switch_thread();
      return false;
    }
    lanes[lane] = t->operands;
  }
  return true;
}

void release_lanes(uint32_t mask) {
  const unsigned first = current->number / 32 * 32;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) make_ready(threads[first + lane]);
  }
  maybe_switch(true);
}

// Products of two 16-bit floats are exact in double; their sum is rounded to float32 once.
// (The real tensor core's rounding is undocumented; tests compare with a tolerance.)
__attribute__((no_sanitize("address"), optimize("O3"))) void multiply(
    MmaOperands* const (&lanes)[32], float (*to_float)(uint16_t)) {
  double a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& o = *lanes[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      auto part = [half](uint32_t x) { return static_cast<uint16_t>(x >> 16 * half); };
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = to_float(part(o.a[i]));
      }
      for (int i = 0; i < 2; ++i) b[group][pair + i * 8 + half] = to_float(part(o.b[i]));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& o = *lanes[lane];
    for (int i = 0; i < 4; ++i) {
      double sum = o.d[i];
      const double* const row = a[lane / 4 + i / 2 * 8];
      const double* const column = b[lane % 4 * 2 + i % 2];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      o.d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace emulator
