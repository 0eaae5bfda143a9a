// Memory that catches who leaves it: the data ends where an inaccessible page begins, and what is left between the page
// in front and the data is filled with a pattern that `intact` looks for. Everything starts as 0xFF bytes: NaN as any
// floating-point type, -1 as an id. Under address sanitizer what lies between data and page cannot be read either.
#pragma once

#include <cstddef>

namespace moerge::simt {

class Guarded {
 public:
  explicit Guarded(size_t bytes);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return data_; }
  size_t size() const { return bytes_; }
  void poison();        // the data: 0xFF again
  bool intact() const;  // nothing was written around the data

  // What of the living guarded blocks lies near an address: "12 bytes past the end of 256 bytes", or null.
  static const char* describe(const void* address);

 private:
  void forbid_margins() const;

  char *map_, *data_;
  size_t pages_, bytes_;  // pages_: bytes of the accessible part
  Guarded *previous_, *next_;
};

}  // namespace moerge::simt
