// The twin of csrc/cuda/fork.cpp for the emulator, which runs everything at once: there is one stream.
// MOERGE_SIMT_RECORDING=1 makes it take the ways that a recorded graph takes.
#include <cstdlib>
#include <cstring>

#include "../cuda/launch.h"

namespace moerge::cuda {

bool recording(Stream) {
  const char* asked = std::getenv("MOERGE_SIMT_RECORDING");
  return asked && std::strcmp(asked, "1") == 0;
}

Stream fork(Stream stream) { return stream; }

void join(Stream, Stream) {}

}  // namespace moerge::cuda
