// In: an entry function and a stack. Out: contexts that one CPU thread switches between by hand, and the sanitizers'
// knowledge of them: a fiber has its own stack for ASan, and is a thread of its own for TSan.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_ASAN 1
#define SIMT_POISON(p, n) __asan_poison_memory_region(p, n)
#define SIMT_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define SIMT_ASAN 0
#define SIMT_POISON(p, n) ((void)0)
#define SIMT_UNPOISON(p, n) ((void)0)
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN 1
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
}
#else
#define SIMT_TSAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// Sanitized frames are several times as large.
constexpr size_t stack_bytes = SIMT_ASAN || SIMT_TSAN ? 256 << 10 : 32 << 10;
constexpr uint64_t canary = 0x51a7c0dedeadbeef;

struct Context {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t registers;
#endif
  char* stack = nullptr;  // its lowest address, where the canary is
  size_t bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* thread = nullptr;      // TSan's, and how many Quiets live on it
  int quiet = 0;
};

inline Context* running;
inline Context* left;  // the one that ran before

// The emulator's own accesses are not those of the program under test: TSan does not look while one of these lives.
struct Quiet {
#if SIMT_TSAN
  Quiet() { AnnotateIgnoreReadsBegin("", 0), ++running->quiet; }  // of writes too
  ~Quiet() { --running->quiet, AnnotateIgnoreReadsEnd("", 0); }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

// What one fiber did before release(p) happens before what another does after acquire(p).
inline void release([[maybe_unused]] const void* p) {
#if SIMT_TSAN
  __tsan_release(const_cast<void*>(p));
#endif
}
inline void acquire([[maybe_unused]] const void* p) {
#if SIMT_TSAN
  __tsan_acquire(const_cast<void*>(p));
#endif
}

#if defined(__x86_64__)
// Pushes what a function must preserve, and continues where the other context did the same.
__attribute__((naked, noipa, no_sanitize("address", "thread", "undefined"))) inline void swap_stacks(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// entry never returns. Tops are staggered by the caller, so that stacks do not all share a few lines of the cache.
inline void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  c.stack = stack, c.bytes = stack_bytes, c.fake_stack = nullptr;
  SIMT_UNPOISON(stack, stack_bytes);
  *reinterpret_cast<uint64_t*>(stack) = canary;
#if SIMT_TSAN
  if (c.thread != nullptr) {
    void* here = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(c.thread, __tsan_switch_to_fiber_no_sync);
    for (; c.quiet > 0; --c.quiet) AnnotateIgnoreReadsEnd("", 0);
    release(&c);  // what it did before it was abandoned
    __tsan_switch_to_fiber(here, __tsan_switch_to_fiber_no_sync);
    acquire(&c);
    __tsan_destroy_fiber(c.thread);
  }
  c.thread = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr, *--top = reinterpret_cast<void*>(entry);  // at entry, rsp is 8 more than a multiple of 16
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.sp = top;
#else
  getcontext(&c.registers);
  c.registers.uc_stack.ss_sp = stack, c.registers.uc_stack.ss_size = bytes, c.registers.uc_link = nullptr;
  makecontext(&c.registers, entry, 0);
#endif
}

// First thing in a context that was switched to. Tells ASan where the stack that was left is if nobody knew.
inline void arrived() {
#if SIMT_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(running->fake_stack, &bottom, &bytes);
  if (left->stack == nullptr) left->stack = const_cast<char*>(static_cast<const char*>(bottom)), left->bytes = bytes;
#endif
}

inline void switch_context(Context& from, Context& to) {
  left = &from, running = &to;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#elif SIMT_TSAN
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.sp, to.sp);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived();
}

}  // namespace simt
