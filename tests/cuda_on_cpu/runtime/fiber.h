// A fiber: a stack of its own and the place where it stopped. Switching costs some 50 ns in assembly on x86-64;
// elsewhere ucontext does it (some 300 ns: it saves the signal mask too).
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim {

// Memory for one stack, with a page below it that faults when the stack overflows.
class Stack {
 public:
  static constexpr size_t kBytes = 64 << 10;

  Stack() {
    void* memory = mmap(nullptr, kBytes + guard(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, guard(), PROT_NONE);
  }
  ~Stack() { munmap(base_, kBytes + guard()); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* begin() const { return base_ + guard(); }

 private:
  static size_t guard() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  char* base_;
};

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

// Stores the callee-saved registers on the current stack, its pointer at *save, and goes on from the stack `load`.
extern "C" void sim_switch(void** save, void* load);
asm(R"(
    .text
    .weak sim_switch
    .type sim_switch, @function
sim_switch:
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
    .size sim_switch, . - sim_switch
)");

inline void switch_context(Context& from, Context& to) { sim_switch(&from.stack_pointer, to.stack_pointer); }

// Makes `context` begin at `entry` (which never returns) on `stack`.
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack.begin() + Stack::kBytes);
  *--top = nullptr;  // where entry would return to; keeps the stack aligned as the calling convention wants it
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.begin();
  context.state.uc_stack.ss_size = Stack::kBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace sim
