// Guarded memory (guarded.h).
#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define MOERGE_FORBID(begin, end) __asan_poison_memory_region(begin, (end) - (begin))
#define MOERGE_ALLOW(begin, end) __asan_unpoison_memory_region(begin, (end) - (begin))
#else
#define MOERGE_FORBID(begin, end) void()
#define MOERGE_ALLOW(begin, end) void()
#endif

namespace moerge::simt {

namespace {

Guarded* head = nullptr;

size_t page() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

Guarded::Guarded(size_t bytes) : bytes_(bytes) {
  const size_t data = std::max<size_t>(16, (bytes + 15) / 16 * 16);
  pages_ = (data + page() - 1) / page() * page();
  void* map = mmap(nullptr, pages_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + page(), pages_, PROT_READ | PROT_WRITE))
    throw std::bad_alloc();
  map_ = static_cast<char*>(map);
  data_ = map_ + page() + pages_ - data;
  std::memset(map_ + page(), 0xFF, pages_);
  forbid_margins();
  previous_ = nullptr, next_ = head;
  if (head) head->previous_ = this;
  head = this;
}

Guarded::~Guarded() {
  MOERGE_ALLOW(map_, map_ + pages_ + 2 * page());
  (previous_ ? previous_->next_ : head) = next_;
  if (next_) next_->previous_ = previous_;
  munmap(map_, pages_ + 2 * page());
}

void Guarded::forbid_margins() const {
  MOERGE_FORBID(map_ + page(), data_);
  MOERGE_FORBID(data_ + bytes_, map_ + page() + pages_);
}

void Guarded::poison() { std::memset(data_, 0xFF, bytes_); }

bool Guarded::intact() const {
  const auto untouched = [](const char* begin, const char* end) {
    return std::all_of(begin, end, [](char c) { return static_cast<unsigned char>(c) == 0xFF; });
  };
  const char* begin = map_ + page();
  MOERGE_ALLOW(begin, begin + pages_);
  const bool ok = untouched(begin, data_) && untouched(data_ + bytes_, begin + pages_);
  forbid_margins();
  return ok;
}

const char* Guarded::describe(const void* address) {
  static char text[96];
  const char* at = static_cast<const char*>(address);
  for (const Guarded* block = head; block; block = block->next_) {
    if (at < block->map_ || at >= block->map_ + block->pages_ + 2 * page()) continue;
    const char* end = block->data_ + block->bytes_;
    if (at >= end)
      std::snprintf(text, sizeof text, "%td bytes past the end of %zu bytes", at - end, block->bytes_);
    else
      std::snprintf(text, sizeof text, "%td bytes in front of %zu bytes", block->data_ - at, block->bytes_);
    return text;
  }
  return nullptr;
}

}  // namespace moerge::simt
