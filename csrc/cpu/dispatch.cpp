// Chooses the widest instruction set that this machine has, this build contains and the environment allows.
#if defined(MOERGE_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MOERGE_AMX
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "micro.h"

namespace moerge::cpu {

#define MOERGE_DECLARE(isa)                \
  namespace isa {                          \
  extern const Micro<float> table_f32[4];  \
  extern const Micro<double> table_f64[4]; \
  extern const RowMicro<float> rows_f32;   \
  extern const RowMicro<double> rows_f64;  \
  }
MOERGE_DECLARE(isa_portable)
#ifdef MOERGE_X86
MOERGE_DECLARE(isa_avx2)
MOERGE_DECLARE(isa_avx512)
namespace isa_avx512 {
extern const Tiles tiles, vectors;
}
#endif
#undef MOERGE_DECLARE

namespace {

// Which sets this machine may use, by MOERGE_INSTRUCTION_SET: "amx" (as when unset), "avx512bf16", "avx512", "avx2" or
// "portable".
struct Allowed {
  bool avx2 = true, avx512 = true, bf16 = true, amx = true;

  Allowed() {
    const char* value = std::getenv("MOERGE_INSTRUCTION_SET");
    const std::string_view most = value && *value ? value : "amx";
    if (most != "amx" && most != "avx512bf16" && most != "avx512" && most != "avx2" && most != "portable")
      throw std::runtime_error(
          "moerge: MOERGE_INSTRUCTION_SET must be amx, avx512bf16, avx512, avx2 or portable, got " + std::string(most));
    avx2 = most != "portable";
    amx = most == "amx";
    bf16 = amx || most == "avx512bf16";
    avx512 = bf16 || most == "avx512";
  }
};

// Whether the processor multiplies bfloat16 by tiles and in vectors, and the system lets this process keep its tiles.
bool has_amx() {
#ifdef MOERGE_AMX
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

struct Choice {
  const char* name = "portable";
  const Micro<float>* f32 = isa_portable::table_f32;
  const Micro<double>* f64 = isa_portable::table_f64;
  const RowMicro<float>* rows_f32 = &isa_portable::rows_f32;
  const RowMicro<double>* rows_f64 = &isa_portable::rows_f64;
  const Tiles* tiles = nullptr;

  Choice() {
    [[maybe_unused]] const Allowed allowed;
#ifdef MOERGE_X86
    __builtin_cpu_init();
    if (allowed.avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      name = "avx512";
      f32 = isa_avx512::table_f32, f64 = isa_avx512::table_f64;
      rows_f32 = &isa_avx512::rows_f32, rows_f64 = &isa_avx512::rows_f64;
      if (allowed.amx && has_amx())
        name = "avx512 with amx", tiles = &isa_avx512::tiles;
      else if (allowed.bf16 && __builtin_cpu_supports("avx512bf16"))
        name = "avx512 with bf16", tiles = &isa_avx512::vectors;
    } else if (allowed.avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c")) {
      name = "avx2";
      f32 = isa_avx2::table_f32, f64 = isa_avx2::table_f64;
      rows_f32 = &isa_avx2::rows_f32, rows_f64 = &isa_avx2::rows_f64;
    }
#endif
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

const char* instruction_set() { return choice().name; }
const Tiles* tiles() { return choice().tiles; }

template <>
const Micro<float>& micro<float>(DType w) {
  return choice().f32[static_cast<int>(w)];
}
template <>
const Micro<double>& micro<double>(DType w) {
  return choice().f64[static_cast<int>(w)];
}
template <>
const RowMicro<float>& row_micro<float>() {
  return *choice().rows_f32;
}
template <>
const RowMicro<double>& row_micro<double>() {
  return *choice().rows_f64;
}

}  // namespace moerge::cpu
