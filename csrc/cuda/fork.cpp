// Work on a second stream, beside the current one: the words of launch.h over CUDA's runtime.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace moerge::cuda {

namespace {

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("moerge_ext: ") + what + ": " + cudaGetErrorString(code));
}

// While it lives, this thread may do what is not to be part of a graph that it records: make a stream.
class NotRecorded {
 public:
  NotRecorded() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~NotRecorded() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Beside {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;

  // It comes first where both streams have blocks to run: others wait for what it does.
  void make() {
    const NotRecorded unrecorded;
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    if (!forked) check(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    if (!joined) check(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  }
};

// Of this thread and the current device: a stream that is recorded must not get another thread's work. They are kept
// for good, since at a thread's end CUDA may be gone already.
Beside& beside() {
  thread_local std::vector<Beside> all;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (static_cast<size_t>(device) >= all.size()) all.resize(device + 1);
  if (!all[device].stream) all[device].make();
  return all[device];
}

void follow(cudaStream_t follower, cudaStream_t leader, cudaEvent_t event) {
  check(cudaEventRecord(event, leader), "cudaEventRecord");
  check(cudaStreamWaitEvent(follower, event, 0), "cudaStreamWaitEvent");
}

}  // namespace

bool recording(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusActive;
}

Stream fork(Stream stream) {
  const Beside& second = beside();
  follow(second.stream, static_cast<cudaStream_t>(stream), second.forked);
  return second.stream;
}

void join(Stream stream, Stream forked) {
  follow(static_cast<cudaStream_t>(stream), static_cast<cudaStream_t>(forked), beside().joined);
}

}  // namespace moerge::cuda
