// The inner loops of the CPU kernels for AVX-512 (F, BW, VL, DQ); CMakeLists.txt gives the flags, dispatch.cpp chooses.
#define MOERGE_ISA isa_avx512
#include "micro_kernels.h"
//
#include "micro_amx.h"
//
#include "micro_amx_route.h"
//
#include "micro_amx_few.h"

namespace moerge::cpu::MOERGE_ISA {

extern const Tiles tiles = {tiles_shrink, tiles_expand,     tiles_linear, tiles_split,
                            tiles_scores, tiles_interleave, tiles_few};

}  // namespace moerge::cpu::MOERGE_ISA
