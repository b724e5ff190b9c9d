// Threads that go through a loop together, without leaving it between two stages; and how samples and hidden units are
// cut among threads.
#pragma once
#include <sched.h>

#include "simd.h"

namespace cvfast {
namespace {

// Every stage is cut into the same number of shares. A member takes its own share, and others' that nobody has taken yet,
// then waits until the stage's shares are done. Nobody waits for a member that has not come: one thread alone gets through,
// too, so that a pool may run the members one after the other.
struct Team {
  int64_t shares;
  int64_t* counters;  // [shares + 1] cache lines, 0 at first: the next stage of each share; how many are done in all

  static constexpr int64_t line = 8;  // numbers
  static int64_t size(int64_t shares) { return (shares + 1) * line; }

  // Called by every member for the stages 0, 1, 2, ... in turn; work(share) runs once per share and stage.
  template <class Work>
  void stage(int64_t stage, int64_t own, Work&& work) const {
    if (shares == 1) return work(0);
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t share = (own + i) % shares;
      int64_t expected = stage;
      if (!__atomic_compare_exchange_n(counters + share * line, &expected, stage + 1, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED))
        continue;
      work(share);
      __atomic_fetch_add(counters + shares * line, 1, __ATOMIC_RELEASE);
    }
    for (int64_t turn = 0; __atomic_load_n(counters + shares * line, __ATOMIC_ACQUIRE) < (stage + 1) * shares; ++turn)
      turn < 4096 ? relax() : yield();
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  static void yield() { sched_yield(); }
};

// Threads are `groups` of `shares`: each group takes some of the samples through all steps, each share some of the hidden
// units in every step.
struct ThreadCut {
  int64_t groups, shares;

  static ThreadCut of(int64_t threads, int64_t batch, int64_t hidden, int64_t panels) {
    constexpr int64_t enough = 8;            // samples for a group: fewer leave a tile's registers empty
    constexpr int64_t worth = int64_t{1} << 14;  // multiply-adds per step and gate for which threads wait for each other
    const int64_t groups = max<int64_t>(1, min(threads, batch / enough));
    const int64_t shares = min(threads / groups, panels / 2);
    if (shares < 2 || batch * hidden * hidden < worth) return {max<int64_t>(1, min(threads, batch)), 1};
    return {groups, shares};
  }
  int64_t members() const { return groups * shares; }
};

}  // namespace
}  // namespace cvfast
