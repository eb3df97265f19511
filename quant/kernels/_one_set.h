/*
 * The kernels for one instruction set. _instruction_sets.h includes this file once for each set,
 * with EF_NAME and the names of vectors and their operations defined.
 */
#define VECTORS (LANES / VW)

typedef struct {
    V v[VECTORS];
} EF_NAME(Block);
#define Block EF_NAME(Block)

/* The order matters: each header calls functions of those above it. */
#include "_candidates.h"
#include "_search.h"
#include "_rows.h"
#include "_feedback.h"

#undef Block
#undef VECTORS
#undef EF_NAME
#undef EF_TARGET
#undef V
#undef VW
#undef SET1
#undef LOAD
#undef STORE
#undef ADD
#undef SUB
#undef MUL
#undef DIV
#undef MIN
#undef MAX
#undef ROUND
#undef FRACTION
