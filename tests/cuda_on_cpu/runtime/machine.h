// The simulated device: one fiber per CUDA thread, one block after another, in an order drawn from a seed. Fibers
// switch only where threads wait for each other, so a run is one of the schedules that a GPU may take; the record of
// accesses (memory.h) finds the races that this schedule happened to survive.
#pragma once
#include <algorithm>
#include <array>
#include <list>
#include <memory>
#include <random>

#include "fiber.h"
#include "memory.h"
#include "ptx.h"

namespace sim {

constexpr uint32_t kMaxThreads = 1024;  // of a block
constexpr uint64_t kSharedLimit = 48 << 10;  // bytes; more needs cudaFuncSetAttribute, which cudart.cpp lacks so far

struct Config {
  Dim3 grid, block;
  uint64_t dynamic_shared = 0;
};

// What the lanes of a warp bring to a collective instruction, and take from it.
using Payload = std::array<uint32_t, 8>;

struct Collective {
  const char* site;
  uint32_t mask, arrived = 0, left = 0;
  bool complete = false;
  std::array<Payload, kWarpSize> lanes{};
};

struct Warp {
  uint32_t members = 0, epoch = 0;
  std::list<Collective> collectives;
};

enum class State { ready, waiting, exited };

struct Thread {
  Context context;
  Stack stack;
  State state = State::ready;
  const char* waits_at = "";
  Dim3 index;
  uint32_t number = 0, lane = 0;
  Warp* warp = nullptr;
};

class Machine {
 public:
  uint64_t seed = 0;
  bool check_races = true;
  std::vector<Region> regions;  // global memory
  std::string error;  // of the last launch that failed

  // Runs a launch to its end; throws Error where a kernel does something it must not.
  void launch(const Kernel& kernel, const Config& config, const char* parameters) {
    const auto& [grid, block, dynamic_shared] = config;
    check(block.count() >= 1 && block.count() <= kMaxThreads && block.z <= 64, "block too large or empty");
    check(grid.count() >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535, "grid too large or empty");
    uint64_t shared_bytes = dynamic_shared;
    for (size_t i = 0; i < kernel.shared_count; ++i) shared_bytes += kernel.shared[i].bytes;
    check(shared_bytes <= kSharedLimit, "more shared memory than a block can have");

    kernel_ = &kernel;
    config_ = config;
    parameters_ = parameters;
    shared_.resize(dynamic_shared_offset() + dynamic_shared);
    random_.seed(seed);
    for (Region& region : regions) region.forget_accesses();
    std::vector<uint32_t> blocks(grid.count());
    for (uint32_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random_);
    for (uint32_t number : blocks) run_block(number);
  }

  // ---- what a kernel asks of the machine ----

  const Dim3& thread_index() const { return self_->index; }
  const Dim3& block_index() const { return block_index_; }
  const Dim3& block_size() const { return config_.block; }
  const Dim3& grid_size() const { return config_.grid; }
  uint32_t lane() const { return self_->lane; }
  uint64_t dynamic_shared_address() const { return kSharedBase + dynamic_shared_offset(); }

  const char* parameter(uint64_t offset, uint64_t bytes) const {
    check(offset + bytes <= kernel_->parameter_bytes, "parameter read beyond its end");
    return parameters_ + offset;
  }

  char* global(uint64_t address, uint64_t bytes, Mode mode) {
    if (address >= kSharedWindow) return shared(address - kSharedWindow, bytes, mode);
    check(address % bytes == 0, "misaligned access to global memory");
    for (Region& region : regions) {
      if (!region.contains(address, bytes)) continue;
      record(region, address, bytes, mode);
      return reinterpret_cast<char*>(address);
    }
    throw Error(std::to_string(bytes) + " bytes of global memory accessed outside every buffer" +
                nearest(regions, address));
  }

  char* shared(uint64_t address, uint64_t bytes, Mode mode) {
    check(address % bytes == 0, "misaligned access to shared memory");
    for (Region& region : shared_regions_) {
      if (!region.contains(address, bytes)) continue;
      record(region, address, bytes, mode);
      return shared_.data() + (address - kSharedBase);
    }
    throw Error(std::to_string(bytes) + " bytes of shared memory accessed outside every variable" +
                nearest(shared_regions_, address));
  }

  // bar.sync 0. All threads of the block must come to the same one.
  void block_barrier(const char* site) {
    check(exited_ == 0, "barrier after threads of the block have exited");
    check(at_barrier_ == 0 || barrier_site_ == site, "threads of a block wait at different barriers");
    barrier_site_ = site;
    prepare_to_wait(site);
    if (++at_barrier_ == threads_in_block()) {
      at_barrier_ = 0;
      ++block_epoch_;
      for (uint32_t i = 0; i < threads_in_block(); ++i) wake(*threads_[i]);
    }
    yield();
  }

  // Waits for the lanes of `mask`; the last to come runs `combine(lanes, mask)`, which turns what was brought into
  // what each takes away. Lanes that the block does not have are ignored, as the hardware does.
  template <class Combine>
  Payload collective(uint32_t mask, const char* site, const Payload& brought, Combine combine) {
    Thread& self = *self_;
    Warp& warp = *self.warp;
    mask &= warp.members;
    check(mask >> self.lane & 1, "a lane that is not in the mask executes a warp instruction");
    Collective& joined = find_collective(warp, mask, site);
    joined.lanes[self.lane] = brought;
    joined.arrived |= 1u << self.lane;
    prepare_to_wait(site);
    if (joined.arrived == mask) {
      combine(joined.lanes, mask);
      joined.complete = true;
      for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
        if (mask >> lane & 1) wake(*threads_[self.number - self.lane + lane]);
      }
    }
    yield();
    const Payload taken = joined.lanes[self.lane];
    joined.left |= 1u << self.lane;
    if (joined.left == mask) warp.collectives.remove_if([&](const Collective& c) { return &c == &joined; });
    return taken;
  }

  // bar.warp.sync. Orders memory where the whole warp takes part; a partial mask is not counted as an order, so
  // that the race check errs on the side of a report.
  void warp_barrier(uint32_t mask, const char* site) {
    Warp& warp = *self_->warp;
    collective(mask, site, {}, [&](auto&, uint32_t arrived) { warp.epoch += arrived == warp.members; });
  }

  void check(bool good, const char* complaint) const {
    if (!good) throw Error(complaint);
  }

 private:
  uint64_t dynamic_shared_offset() const {
    if (kernel_->shared_count == 0) return 0;
    const Extent& last = kernel_->shared[kernel_->shared_count - 1];
    return (last.offset + last.bytes + kSharedGap + 127) / 128 * 128;
  }
  uint32_t threads_in_block() const { return static_cast<uint32_t>(config_.block.count()); }

  void run_block(uint32_t number) {
    const Dim3& grid = config_.grid;
    block_number_ = number;
    block_index_ = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    std::fill(shared_.begin(), shared_.end(), char(0xff));  // NaN
    shared_regions_.clear();
    for (size_t i = 0; i < kernel_->shared_count; ++i) {
      add_shared("shared variable " + std::to_string(i), kernel_->shared[i]);
    }
    add_shared("dynamic shared memory", {dynamic_shared_offset(), config_.dynamic_shared});
    warps_.assign((threads_in_block() + kWarpSize - 1) / kWarpSize, Warp());
    at_barrier_ = exited_ = block_epoch_ = 0;
    failure_.clear();
    ready_.clear();
    for (uint32_t i = 0; i < threads_in_block(); ++i) start_thread(i);
    while (!ready_.empty() && failure_.empty()) {
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      self_ = ready_.back();
      ready_.pop_back();
      switch_context(scheduler_, self_->context);
    }
    if (!failure_.empty()) throw Error(failure_);
    if (exited_ < threads_in_block()) throw Error(deadlock());
  }

  void add_shared(const std::string& name, const Extent& extent) {
    shared_regions_.emplace_back(name, kSharedBase + extent.offset, extent.bytes, true, true);
  }

  void start_thread(uint32_t number) {
    const Dim3& block = config_.block;
    if (number == threads_.size()) threads_.push_back(std::make_unique<Thread>());
    Thread& thread = *threads_[number];
    thread.number = number;
    thread.lane = number % kWarpSize;
    thread.index = {number % block.x, number / block.x % block.y, number / block.x / block.y};
    thread.warp = &warps_[number / kWarpSize];
    thread.warp->members |= 1u << thread.lane;
    prepare(thread.context, thread.stack, &Machine::thread_main);
    wake(thread);
  }

  static void thread_main();

  // A failed thread never resumes, nor do the others: translated kernels own nothing that would need unwinding.
  void run_thread() {
    try {
      kernel_->run();
    } catch (const std::exception& e) {
      failure_ = std::string(e.what()) + " [block " + std::to_string(block_number_) + ", thread " +
                 std::to_string(self_->number) + "]";
    }
    self_->state = State::exited;
    ++exited_;
    switch_context(self_->context, scheduler_);
  }

  void wake(Thread& thread) {
    thread.state = State::ready;
    ready_.push_back(&thread);
  }

  void prepare_to_wait(const char* site) {
    self_->state = State::waiting;
    self_->waits_at = site;
  }

  // Lets others run until somebody wakes the current thread, who may have done so already.
  void yield() { switch_context(self_->context, scheduler_); }

  Collective& find_collective(Warp& warp, uint32_t mask, const char* site) {
    for (Collective& open : warp.collectives) {
      if (open.complete || !(open.mask & mask)) continue;
      check(open.mask == mask && open.site == site, "lanes of a warp wait for each other at different instructions");
      return open;
    }
    return warp.collectives.emplace_back(Collective{site, mask});
  }

  void record(Region& region, uint64_t address, uint64_t bytes, Mode mode) {
    if (!check_races) return;
    const Access now{static_cast<int32_t>(block_number_), static_cast<int32_t>(self_->number), block_epoch_,
                     self_->warp->epoch};
    if (mode == Mode::write) {
      region.record_write(address, bytes, now);
    } else {
      region.record_read(address, bytes, now, mode == Mode::read_constant);
    }
  }

  // Where a stray address lies, as seen from a region that is at most 64 bytes away.
  static std::string nearest(const std::vector<Region>& regions, uint64_t address) {
    for (const Region& region : regions) {
      for (uint64_t distance = 1; distance <= 64; ++distance) {
        if (region.contains(address - distance, 1)) {
          return ", " + std::to_string(distance - 1) + " bytes past the end of " + region.name();
        }
        if (region.contains(address + distance, 1)) {
          return ", " + std::to_string(distance) + " bytes before " + region.name();
        }
      }
    }
    return "";
  }

  std::string deadlock() const {
    std::string text = "deadlock in block " + std::to_string(block_number_) + ": " + std::to_string(exited_) + " of " +
                       std::to_string(threads_in_block()) + " threads exited";
    for (uint32_t i = 0; i < threads_in_block(); ++i) {
      const Thread& thread = *threads_[i];
      if (thread.state != State::waiting) continue;
      return text + ", thread " + std::to_string(i) + " waits at " + thread.waits_at;
    }
    return text;
  }

  const Kernel* kernel_ = nullptr;
  Config config_;
  const char* parameters_ = nullptr;
  std::mt19937_64 random_;

  uint32_t block_number_ = 0;
  Dim3 block_index_;
  uint32_t block_epoch_ = 0, at_barrier_ = 0, exited_ = 0;
  const char* barrier_site_ = nullptr;
  std::vector<char> shared_;
  std::vector<Region> shared_regions_;
  std::vector<Warp> warps_;

  std::vector<std::unique_ptr<Thread>> threads_;  // kept from block to block
  std::vector<Thread*> ready_;
  Thread* self_ = nullptr;
  Context scheduler_;
  std::string failure_;
};

inline Machine machine;

inline void Machine::thread_main() { machine.run_thread(); }

}  // namespace sim
