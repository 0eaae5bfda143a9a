#define MOERGE_ISA isa_portable
#include "micro_kernels.h"
