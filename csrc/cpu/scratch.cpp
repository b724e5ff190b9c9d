#include "scratch.h"

#include "huge_pages.h"

#include <cstddef>
#include <new>

namespace cvfast {
namespace {

constexpr int64_t kept_bytes = int64_t{32} << 20;
constexpr std::align_val_t alignment{64};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  void* request(int64_t bytes) {
    const bool too_large_to_keep = capacity_ > kept_bytes && bytes <= kept_bytes;
    if (bytes > capacity_ || too_large_to_keep) {
      release();
      data_ = ::operator new(static_cast<std::size_t>(bytes), alignment);
      capacity_ = bytes;
      prefer_huge_pages(data_, bytes);
    }
    return data_;
  }

 private:
  void release() {
    ::operator delete(data_, alignment);
    data_ = nullptr;
    capacity_ = 0;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace

void* thread_scratch(ScratchUse use, int64_t bytes) {
  thread_local Buffer buffers[3];
  return buffers[static_cast<int>(use)].request(bytes);
}

}  // namespace cvfast
