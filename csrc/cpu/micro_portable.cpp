// The inner loops of the CPU kernels for any machine; CMakeLists.txt gives the flags, dispatch.cpp chooses.
#define MOERGE_ISA isa_portable
#include "micro_kernels.h"
