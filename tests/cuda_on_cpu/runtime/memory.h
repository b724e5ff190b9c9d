// The memory a kernel may touch, who touched it last, and whether that was allowed.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who accessed memory and when: epochs count the barriers that the block, and its warp, had passed.
struct Access {
  int32_t block = -1;  // -1: nobody yet
  int32_t thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;

  bool happened() const { return block >= 0; }

  // Whether a barrier (or program order) puts this access before `later`, which ran after it in this schedule.
  bool ordered_before(const Access& later) const {
    if (!happened()) return true;
    if (block != later.block) return false;
    if (thread == later.thread || block_epoch != later.block_epoch) return true;
    return thread / 32 == later.thread / 32 && warp_epoch != later.warp_epoch;
  }
};

// The last accesses to one word of memory (or byte, where accesses are narrower). Of the readers two are kept that are
// not ordered with each other: a writer differs from at least one.
struct Cell {
  Access write, reads[2];
};

// A stretch of memory with its bounds and its history.
class Region {
 public:
  Region(std::string name, uint64_t begin, uint64_t bytes, bool writable, bool poisoned)
      : name_(std::move(name)), begin_(begin), bytes_(bytes), writable_(writable), poisoned_(poisoned) {}

  bool contains(uint64_t address, uint64_t bytes) const {
    return address >= begin_ && address - begin_ <= bytes_ && bytes <= bytes_ - (address - begin_);
  }

  void forget_accesses() { cells_.clear(); }

  void record_read(uint64_t address, uint64_t bytes, const Access& now, bool never_written_by_kernel) {
    for_cells(address, bytes, [&](Cell& cell, uint64_t at) {
      if (!cell.write.happened() && poisoned_) throw Error(describe(at) + " is read before it was written");
      if (cell.write.happened() && never_written_by_kernel) {
        throw Error(describe(at) + " is read by ld.nc though thread " + who(cell.write) + " wrote it in this launch");
      }
      if (!cell.write.ordered_before(now)) report("written", cell.write, "read", now, at);
      Access& slot = cell.reads[cell.reads[0].ordered_before(now) ? 0 : 1];
      if (slot.ordered_before(now)) slot = now;
    });
  }

  void record_write(uint64_t address, uint64_t bytes, const Access& now) {
    if (!writable_) throw Error(name_ + " is written though it is an input");
    for_cells(address, bytes, [&](Cell& cell, uint64_t at) {
      if (!cell.write.ordered_before(now)) report("written", cell.write, "written", now, at);
      for (const Access& read : cell.reads) {
        if (!read.ordered_before(now)) report("read", read, "written", now, at);
      }
      cell = Cell{now, {}};
    });
  }

  const std::string& name() const { return name_; }

 private:
  static constexpr uint64_t kWord = 4;

  template <class Visit>
  void for_cells(uint64_t address, uint64_t bytes, Visit visit) {
    if (cells_.empty()) {
      by_word_ = true;
      cells_.resize(bytes_ / kWord + 1);
    }
    const uint64_t offset = address - begin_;
    if (by_word_ && (offset % kWord != 0 || bytes % kWord != 0)) split_cells();
    if (by_word_) {
      for (uint64_t at = offset; at < offset + bytes; at += kWord) visit(cells_[at / kWord], at);
    } else {
      for (uint64_t at = offset; at < offset + bytes; ++at) visit(cells_[at], at);
    }
  }

  // An access narrower than a word has come: from now on each byte has a cell.
  void split_cells() {
    std::vector<Cell> bytes(bytes_);
    for (uint64_t i = 0; i < bytes_; ++i) bytes[i] = cells_[i / kWord];
    cells_ = std::move(bytes);
    by_word_ = false;
  }

  static std::string who(const Access& access) {
    return std::to_string(access.thread) + " of block " + std::to_string(access.block);
  }

  std::string describe(uint64_t offset) const { return name_ + " at byte " + std::to_string(offset); }

  [[noreturn]] void report(const char* before, const Access& first, const char* after, const Access& second,
                           uint64_t offset) const {
    throw Error("race: " + describe(offset) + " is " + before + " by thread " + who(first) + " and " + after +
                " by thread " + who(second) + " with no barrier between");
  }

  std::string name_;
  uint64_t begin_, bytes_;
  bool writable_;
  bool poisoned_;  // holds nothing until written (shared memory)
  bool by_word_ = true;  // a cell per word, or per byte
  std::vector<Cell> cells_;
};

}  // namespace sim
