// The device vocabulary: every word in which kernels speak of threads, memory and tensor cores, for CUDA (sm_80 and
// newer). csrc/simt/device.cuh has the same words for the host. A kernel is a struct with
//   static constexpr int kThreads;           threads per block, a multiple of 32
//   static constexpr const char* kName;      for messages
//   MOERGE_DEVICE void operator()() const;   what one thread does
// whose members are its arguments; `launch` runs it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

#define MOERGE_DEVICE __device__ __forceinline__
#define MOERGE_UNROLL _Pragma("unroll")  // before a loop whose arrays are to lie in registers

namespace moerge::cuda {

// ---- threads ------------------------------------------------------------------------------------------------------

MOERGE_DEVICE int thread() { return threadIdx.x; }
MOERGE_DEVICE int lane() { return threadIdx.x % 32; }
MOERGE_DEVICE int warp() { return threadIdx.x / 32; }
MOERGE_DEVICE int64_t block_x() { return blockIdx.x; }
MOERGE_DEVICE int64_t block_y() { return blockIdx.y; }
MOERGE_DEVICE int64_t block_z() { return blockIdx.z; }

// All threads of the block, or all lanes of the warp, must come here; what they wrote before is seen after.
MOERGE_DEVICE void sync_block() { __syncthreads(); }
MOERGE_DEVICE void sync_warp() { __syncwarp(); }

// Only in blocks that run together (launch_together), by all threads of all of them, in turns: what they wrote before
// they arrived is seen after the wait, and in between a block does what needs nobody else. Both are barriers of the
// block too.
MOERGE_DEVICE uint32_t grid_arrive() { return cooperative_groups::this_grid().barrier_arrive(); }
MOERGE_DEVICE void grid_wait(uint32_t arrival) {
  cooperative_groups::this_grid().barrier_wait(static_cast<uint32_t&&>(arrival));
}

// All lanes of the warp must come here.
template <class T>
MOERGE_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xFFFFFFFFu, value, from);
}
template <class T>
MOERGE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
MOERGE_DEVICE uint32_t warp_most(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
MOERGE_DEVICE uint32_t warp_least(uint32_t value) { return __reduce_min_sync(0xFFFFFFFFu, value); }
MOERGE_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
MOERGE_DEVICE uint32_t warp_highest(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }

MOERGE_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
MOERGE_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }

// ---- shared memory ------------------------------------------------------------------------------------------------

// Hands out the launch's shared memory; every thread must take the same arrays in the same order. Each starts at a
// multiple of 16 bytes, see `shared_size`.
struct Shared {
  char* next;

  MOERGE_DEVICE Shared() {
    extern __shared__ uint4 all[];
    next = reinterpret_cast<char*>(all);
  }
  template <class T>
  MOERGE_DEVICE T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += (count * sizeof(T) + 15) / 16 * 16;
    return taken;
  }
};

// Adds to a counter and returns what it was.
MOERGE_DEVICE int32_t atomic_add(int32_t* at, int32_t value) { return atomicAdd(at, value); }

// ---- 16-bit types -------------------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using f16 = __half;

MOERGE_DEVICE float to_float(float value) { return value; }
MOERGE_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
MOERGE_DEVICE float to_float(f16 value) { return __half2float(value); }
MOERGE_DEVICE void from_float(float value, bf16& out) { out = __float2bfloat16_rn(value); }
MOERGE_DEVICE void from_float(float value, f16& out) { out = __float2half_rn(value); }

// Two elements in a word, the first in its low half.
template <class T>
MOERGE_DEVICE float low_half(uint32_t word) {
  const uint16_t bits = static_cast<uint16_t>(word);
  return to_float(reinterpret_cast<const T&>(bits));
}
template <class T>
MOERGE_DEVICE float high_half(uint32_t word) {
  return low_half<T>(word >> 16);
}
template <>
MOERGE_DEVICE float high_half<bf16>(uint32_t word) {
  return __uint_as_float(word & 0xFFFF0000);
}
template <class T>
MOERGE_DEVICE uint32_t pack(float low, float high) {
  T a, b;
  from_float(low, a), from_float(high, b);
  return reinterpret_cast<const uint16_t&>(a) | uint32_t(reinterpret_cast<const uint16_t&>(b)) << 16;
}

// The low, or the high, halves of two words, a's in the low half.
MOERGE_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
MOERGE_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

template <class T>
MOERGE_DEVICE uint32_t load_pair(const T* from) {  // from: a multiple of 4
  return *reinterpret_cast<const uint32_t*>(from);
}

// ---- 16 bytes at once ---------------------------------------------------------------------------------------------

// Addresses are multiples of 16.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

MOERGE_DEVICE Bytes16 load16(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}
// From global memory that no kernel writes meanwhile and nobody reads again: not kept in the first-level cache.
MOERGE_DEVICE Bytes16 load16_once(const void* from) {
  Bytes16 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(from));
  return value;
}
// Asks for the 32 bytes at `from` of global memory to be brought to the second-level cache.
MOERGE_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// To global memory. In PTX, since the compiler may take a store of four words apart.
MOERGE_DEVICE void store16(void* to, Bytes16 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// 1, 2 or 4 words at an address that is a multiple of their size, in any memory.
template <int n>
MOERGE_DEVICE void load_words(uint32_t (&out)[n], const void* from) {
  if constexpr (n == 1) {
    out[0] = *static_cast<const uint32_t*>(from);
  } else if constexpr (n == 2) {
    const uint2 value = *static_cast<const uint2*>(from);
    out[0] = value.x, out[1] = value.y;
  } else {
    static_assert(n == 4);
    const uint4 value = *static_cast<const uint4*>(from);
    out[0] = value.x, out[1] = value.y, out[2] = value.z, out[3] = value.w;
  }
}
template <int n>
MOERGE_DEVICE void store_words(void* to, const uint32_t (&words)[n]) {
  if constexpr (n == 1) {
    *static_cast<uint32_t*>(to) = words[0];
  } else if constexpr (n == 2) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    static_assert(n == 4);
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

MOERGE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 4 bytes of shared memory into whichever register is best: loads of neighbours are not made one, whose four registers
// would have to be adjacent and be moved from there.
MOERGE_DEVICE uint32_t load_shared(const void* from) {
  uint32_t value;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared_address(from)) : "memory");
  return value;
}

// Starts a copy of 16 bytes from global to shared memory; zeros are written, and nothing is read, when not valid.
// Copies started since the last async_commit form a group; async_wait<n> waits until at most n of this thread's groups
// are under way. Other threads see the data after a sync_block that follows the wait.
MOERGE_DEVICE void async_copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
MOERGE_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
MOERGE_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// ---- tensor cores -------------------------------------------------------------------------------------------------
// All lanes of the warp must come here. Fragments are those of PTX: with g = lane / 4 and i = lane % 4,
//   c[0..1]: row g, columns 2i and 2i+1;   c[2..3]: the same of row g + 8

// Four 8 x 8 matrices of 16-bit elements from shared memory: lanes 8m .. 8m+7 point at the rows (16 bytes) of matrix m,
// and out[m] holds its row g, columns 2i and 2i+1; transposed: its column g, rows 2i and 2i+1.
template <bool transposed>
MOERGE_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16,8] += a [16,16] b [16,8], T bf16 or f16. a[0]: row g, columns 2i, 2i+1; a[1]: row g+8; a[2], a[3]: the same 8
// columns on. b[0]: column g, rows 2i, 2i+1; b[1]: 8 rows on.
template <class T>
MOERGE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
MOERGE_DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
MOERGE_DEVICE void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest number of 11 significant bits; the multiplication below ignores the rest.
MOERGE_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
MOERGE_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
MOERGE_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

// c [16,8] += a [16,8] b [8,8]. a[0]: row g, column i; a[1]: row g+8; a[2], a[3]: the same 4 columns on. b[0]: column
// g, row i; b[1]: 4 rows on.
MOERGE_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launch -------------------------------------------------------------------------------------------------------

// Blocks per processor that a kernel's registers must allow; without kLeastBlocks the compiler chooses.
template <class Kernel>
constexpr int least_blocks() {
  if constexpr (requires { Kernel::kLeastBlocks; })
    return Kernel::kLeastBlocks;
  else
    return 0;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, least_blocks<Kernel>()) run(const __grid_constant__ Kernel kernel) {
  kernel();
}

inline void check_cuda(cudaError_t code, const char* kernel) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("moerge_ext: ") + kernel +
                             " could not be launched: " + cudaGetErrorString(code));
}

template <class Kernel>
void allow_shared(size_t shared_bytes) {
  if (shared_bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        Kernel::kName);
}

// Enqueues the kernel with `shared_bytes` of shared memory per block.
template <class Kernel>
void launch(const Grid& grid, size_t shared_bytes, Stream stream, const Kernel& kernel) {
  allow_shared<Kernel>(shared_bytes);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  run<Kernel><<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(kernel);
  check_cuda(cudaGetLastError(), Kernel::kName);
}

// How many blocks of the kernel fit on the device at the same time; 0: it cannot run blocks together, or a block takes
// more shared memory than there is.
template <class Kernel>
int64_t most_together(size_t shared_bytes) {
  int device = 0, able = 0, processors = 0, blocks = 0, most = 0;
  check_cuda(cudaGetDevice(&device), Kernel::kName);
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), Kernel::kName);
  if (shared_bytes > static_cast<size_t>(most)) return 0;
  allow_shared<Kernel>(shared_bytes);
  check_cuda(cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device), Kernel::kName);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), Kernel::kName);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, run<Kernel>, Kernel::kThreads, shared_bytes),
             Kernel::kName);
  return able ? int64_t(blocks) * processors : 0;
}

// The same with all blocks, at most most_together of them, on the device at the same time.
template <class Kernel>
void launch_together(int64_t blocks, size_t shared_bytes, Stream stream, const Kernel& kernel) {
  allow_shared<Kernel>(shared_bytes);
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  check_cuda(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(run<Kernel>), dim3(static_cast<unsigned>(blocks)),
                                  dim3(Kernel::kThreads), arguments, shared_bytes, static_cast<cudaStream_t>(stream)),
      Kernel::kName);
}

}  // namespace moerge::cuda
