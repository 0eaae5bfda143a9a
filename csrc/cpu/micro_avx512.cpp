// The inner loops of the CPU kernels for AVX-512 (F, BW, VL, DQ); CMakeLists.txt gives the flags, dispatch.cpp chooses.
#define MOERGE_ISA isa_avx512
#include "micro_kernels.h"
//
#include "micro_bf16.h"
//
#include "micro_amx.h"
//
#include "micro_amx_route.h"
//
#include "micro_amx_few.h"

namespace moerge::cpu::MOERGE_ISA {

extern const Tiles tiles = {.ranks = 16,
                            .worth = 8,
                            .shrink = tiles_shrink,
                            .expand = tiles_expand,
                            .linear = tiles_linear,
                            .split = tiles_split,
                            .scores = tiles_scores,
                            .interleave = tiles_interleave,
                            .few = tiles_few};
extern const Tiles vectors = {
    .ranks = 8, .worth = 2, .shrink = vectors_shrink, .expand = vectors_expand, .rows = vectors_linear};

}  // namespace moerge::cpu::MOERGE_ISA
