// Chooses the widest instruction set that this machine has, this build contains and the environment allows.
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
#endif
#undef MOERGE_DECLARE

namespace {

// Which sets this machine may use, by MOERGE_INSTRUCTION_SET: "avx512" (as when unset), "avx2" or "portable".
struct Allowed {
  bool avx2 = true, avx512 = true;

  Allowed() {
    const char* value = std::getenv("MOERGE_INSTRUCTION_SET");
    const std::string_view most = value && *value ? value : "avx512";
    if (most != "avx512" && most != "avx2" && most != "portable")
      throw std::runtime_error("moerge: MOERGE_INSTRUCTION_SET must be avx512, avx2 or portable, got " +
                               std::string(most));
    avx2 = most != "portable";
    avx512 = most == "avx512";
  }
};

struct Choice {
  const char* name = "portable";
  const Micro<float>* f32 = isa_portable::table_f32;
  const Micro<double>* f64 = isa_portable::table_f64;
  const RowMicro<float>* rows_f32 = &isa_portable::rows_f32;
  const RowMicro<double>* rows_f64 = &isa_portable::rows_f64;

  Choice() {
    [[maybe_unused]] const Allowed allowed;
#ifdef MOERGE_X86
    __builtin_cpu_init();
    if (allowed.avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      name = "avx512";
      f32 = isa_avx512::table_f32, f64 = isa_avx512::table_f64;
      rows_f32 = &isa_avx512::rows_f32, rows_f64 = &isa_avx512::rows_f64;
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
