#define MOERGE_ISA isa_avx2
#include "micro_kernels.h"
