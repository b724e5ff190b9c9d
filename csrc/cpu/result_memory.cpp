#include "result_memory.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <mutex>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace cvfast {
namespace {

constexpr int64_t all_bytes = int64_t{64} << 20;
constexpr int64_t least_bytes = int64_t{16} << 10;  // malloc is as good below
constexpr int64_t alignment = 64;
constexpr int64_t gap = 5 * alignment;  // results whose sizes are multiples of a page start at other places within theirs
constexpr std::align_val_t page{2 << 20};

class Arena {
 public:
  Arena() : data_(static_cast<char*>(::operator new(all_bytes, page, std::nothrow))) {
    if (data_) prefer_huge_pages(data_, all_bytes);
  }

  void* borrow(int64_t bytes) {
    if (!data_ || bytes < least_bytes || bytes > all_bytes - gap) return nullptr;
    const int64_t size = (bytes + alignment - 1) / alignment * alignment + gap;
    std::lock_guard<std::mutex> lock(mutex);
    int64_t end = 0;  // of the block before
    for (auto block = used_.begin();; ++block) {
      const bool last = block == used_.end();
      if ((last ? all_bytes : block->begin) - end >= size) {
        used_.insert(block, {end, end + size});
        return data_ + end;
      }
      if (last) return nullptr;
      end = block->end;
    }
  }

  void give_back(void* data) {
    const int64_t begin = static_cast<char*>(data) - data_;
    std::lock_guard<std::mutex> lock(mutex);
    for (auto block = used_.begin(); block != used_.end(); ++block)
      if (block->begin == begin) {
        used_.erase(block);
        return;
      }
  }

  std::mutex mutex;

 private:
  struct Block {
    int64_t begin, end;
  };
  char* data_;
  std::vector<Block> used_;  // in order
};

// Never destroyed: tensors may outlive everything else. A forked child gets it unlocked.
Arena& arena() {
  static Arena* const all = [] {
    auto* made = new Arena;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
#endif
    return made;
  }();
  return *all;
}

}  // namespace

void* borrow_result(int64_t bytes) { return arena().borrow(bytes); }
void return_result(void* data) { arena().give_back(data); }

}  // namespace cvfast
