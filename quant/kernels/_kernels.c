/*
 * Rounds rows to nearest with the best representable scale of every group, dequantizes rows, and
 * rounds columns in turn.
 *
 * quant/quantizers/rtn_torch.py does the same arithmetic in torch and must give the same bits, so
 * every sum has a fixed order and nothing is fused: compile with -ffp-contract=off, and never with
 * -ffast-math. The search tries sixteen candidate scales at once, one per lane, so that the order
 * in which a candidate's error is summed does not depend on the width of the machine's vectors.
 *
 * The headers hold the code that is compiled once for every instruction set. This file holds the
 * types that they share, the choice of an instruction set, and the functions that Python calls.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(_WIN32)
#define EF_EXPORT __declspec(dllexport)
#else
#define EF_EXPORT __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define EF_INLINE static inline __attribute__((always_inline))
#else
#define EF_INLINE static __inline
#endif

enum { LANES = 16, SUM_COLUMNS = 128, MIN_SCALE_BITS = 0x3700, MAX_SCALE_BITS = 0x477F };
/* Blocks of 16 candidates, every third scale, that cover the widest interval: 8 octaves of 128. */
enum { MAX_BLOCKS = 22 };
/*
 * Groups that go through the search's stages side by side, so that the processor can work on one
 * group while the result of another is not ready.
 */
enum { BATCH = 16 };
/* Rows whose columns are all rounded before the next rows': see _feedback.h. */
enum { STRIP = 32 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { OUT_OF_MEMORY = -2, ALL_ROWS_FINE = -1 };

/* x + MAGIC - MAGIC rounds half to even for |x| < 2**22. */
#define MAGIC 12582912.0f
/* Margin of a lower bound over the best error, wider than the rounding errors of both. */
#define SURE 1.001f
/* The distance of neighbouring bfloat16 numbers over their power of two; 1 % more, as it bounds. */
#define STEP (1.01f / 128.0f)
/* Added to the magnitudes by which errors are weighted, over the largest magnitude of the group. */
#define OFFSET 0.375f
#define LARGEST_SCALE 65504.0f

typedef struct {
    int64_t rows, cols, group;
    int bits, symmetric, weighted;
    float low_factor, high_factor;
} Task;

typedef struct {
    int bits;
    float zero;
} Choice;

/* The search for one symmetric group's scale. */
typedef struct {
    const float *w;
    float positive, negative, length, best, zero, offset;
    int first, last, blocks, count, smallest, weighted;
    Choice choice;
    float tried[MAX_BLOCKS][LANES];
    int near_bits[(MAX_BLOCKS * 2 + 1) * LANES];
    float near_errors[MAX_BLOCKS * 2 + 1][LANES];
} Search;

typedef struct {
    float *values, *residual, *zeros;
    uint8_t *codes;
} Scratch;

/* Columns to round in turn. Every matrix holds its columns contiguously. */
typedef struct {
    int64_t rows, cols, group, stride;
    const float *wanted, *weight, *shares;
    const int64_t *places;
    const float *scale, *zero;
    float max_code;
    uint8_t *codes;
    float *errors;
} Rounding;

/* The integer grids of a column's rows, from the first row of a strip on. */
typedef struct {
    const float *scale, *zero;
    float max_code;
} Column;

/* Tables of ascending values and the edges between them; each table is for `rows` rows. */
typedef struct {
    const float *values, *edges;
    int64_t entries, rows;
} Tables;

#include "_scalars.h"

#include "_instruction_sets.h"

typedef int64_t (*QuantizeRows)(const Task *, const void *, int, uint8_t *, uint16_t *, uint8_t *,
                                double *, Scratch *);
typedef void (*DequantizeRows)(const Task *, const uint8_t *, const uint16_t *, const uint8_t *,
                               float *);
typedef void (*RoundColumns)(const Rounding *, const Tables *, float *);

/* The widest instruction set that may be used: 0 plain, 1 AVX2, 2 AVX-512. */
static int widest = 2;

static int instruction_set(void) {
#ifdef EF_DISPATCH
    __builtin_cpu_init();
    if (widest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (widest >= 1 && __builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* A function's copy for the widest instruction set that may be used and that the processor has. */
#ifdef EF_DISPATCH
#define EF_CHOICE(name)                             \
    (instruction_set() == 2   ? name##_avx512       \
     : instruction_set() == 1 ? name##_avx2         \
                              : name##_plain)
#else
#define EF_CHOICE(name) name##_plain
#endif

/* Limits the instruction set, for tests and measurements; returns the one that will be used. */
EF_EXPORT int edgeforge_limit_instruction_set(int limit) {
    widest = limit;
    return instruction_set();
}

/*
 * Quantizes rows; weighted searches count errors of large weights more. sums receives the squared error and the squared norm. Returns -1 when all rows
 * are quantized, -2 when there is no memory, otherwise the first row that cannot be quantized.
 */
EF_EXPORT int64_t edgeforge_round_rows(const void *weight, int kind, int64_t rows, int64_t cols,
                                          int64_t group, int bits, int symmetric, int weighted,
                                          float low_factor, float high_factor, uint8_t *codes,
                                          uint16_t *scale, uint8_t *zero_point, double *sums) {
    Task task = {rows, cols, group, bits, symmetric, weighted, low_factor, high_factor};
    size_t padded = (size_t)(cols + LANES - 1) / LANES * LANES;
    Scratch scratch;
    const QuantizeRows run = EF_CHOICE(quantize_rows);
    int64_t outcome;
    scratch.values = calloc(padded * 3, sizeof(float));
    scratch.codes = malloc(padded);
    if (scratch.values == NULL || scratch.codes == NULL) {
        free(scratch.values);
        free(scratch.codes);
        return OUT_OF_MEMORY;
    }
    scratch.residual = scratch.values + padded;
    scratch.zeros = scratch.residual + padded;
    outcome = run(&task, weight, kind, codes, scale, zero_point, sums, &scratch);
    free(scratch.values);
    free(scratch.codes);
    return outcome;
}

/* Writes the float32 values that the stored parts stand for. */
EF_EXPORT void edgeforge_dequantize_rows(const uint8_t *codes, const uint16_t *scale,
                                         const uint8_t *zero_point, int64_t rows, int64_t cols,
                                         int64_t group, int bits, float *out) {
    Task task = {rows, cols, group, bits, zero_point == NULL, 0, 0.0f, 0.0f};
    const DequantizeRows run = EF_CHOICE(dequantize_rows);
    run(&task, codes, scale, zero_point, out);
}

/*
 * Rounds columns in turn, each after adding its shares of the errors before it: to the entries of
 * tables, or to integer grids where tables->values is null. Returns 0, or -2 when there is no
 * memory.
 */
EF_EXPORT int64_t edgeforge_round_columns(const Rounding *task, const Tables *tables) {
    float *errors = malloc((size_t)task->cols * STRIP * sizeof(float));
    const RoundColumns run = EF_CHOICE(round_columns);
    if (errors == NULL) return OUT_OF_MEMORY;
    run(task, tables, errors);
    free(errors);
    return 0;
}

/*
 * The build tells some linkers to export a Python module's entry function, so there must be one. It
 * creates no module: quant.kernels.native loads the library by ctypes, so that building it needs a
 * C compiler but no Python headers.
 */
EF_EXPORT void *PyInit__kernels(void) {
    return NULL;
}
