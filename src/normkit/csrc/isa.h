// What the build says of an instruction set: its name, which is the namespace of its kernels; and the types it has kernels
// for, as bits in the order of Type. For other types choose.cpp takes the next lower instruction set.
#pragma once

#ifndef NORMKIT_ISA
#define NORMKIT_ISA baseline
#endif
#ifndef NORMKIT_TYPES
#define NORMKIT_TYPES 15
#endif
