// Kernels for any processor: vectors of four floats, which every 64-bit instruction set has.
#include <stdint.h>
#include <string.h>

#define FFF_ISA generic
#define FFF_ISA_NAME "generic"
#include "kernels.inc"
