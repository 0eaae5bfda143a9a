// The inner loops of the CPU kernels for AVX2 with FMA and F16C; CMakeLists.txt gives the flags, dispatch.cpp chooses.
#define MOERGE_ISA isa_avx2
#include "micro_kernels.h"
