#define MOERGE_ISA isa_avx512
#include "micro_kernels.h"
