/*
 * Round to nearest with the best representable scale of every group, and its inverse.
 *
 * quant/quantizers/rtn.py holds the same arithmetic in torch and must give the same bits, so every sum below
 * has a fixed order and nothing is fused: compile with -ffp-contract=off, and never with
 * -ffast-math. Sixteen candidate scales are tried at once, one a lane, so that the order in which a
 * candidate's error is summed does not depend on the width of the machine's vectors.
 *
 * The file includes itself once for every instruction set, with EF_NAME defined.
 */
#ifndef EF_NAME

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
/* Blocks of every third scale that cover the widest interval, eight octaves of 128 scales. */
enum { MAX_BLOCKS = 22 };
/* Groups whose searches go side by side, one stage after the other: no stage waits for the last. */
enum { BATCH = 16 };
/* Rows that go through all columns together. */
enum { STRIP = 32 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { OUT_OF_MEMORY = -2, ALL_ROWS_FINE = -1 };

/* x + MAGIC - MAGIC rounds half to even for |x| < 2**22. */
#define MAGIC 12582912.0f
/* Margin of a lower bound over the best error: the rounding of either cannot matter. */
#define SURE 1.001f
/* From one bfloat16 number to the next, of their power of two; a little more, for it is a bound. */
#define STEP (1.01f / 128.0f)
#define LARGEST_SCALE 65504.0f

typedef struct {
    int64_t rows, cols, group;
    int bits, symmetric;
    float low_factor, high_factor;
} Task;

typedef struct {
    int bits;
    float zero;
} Choice;

/* The search for one symmetric group's scale. */
typedef struct {
    const float *w;
    float positive, negative, length, best, zero;
    int first, last, blocks, count, smallest;
    Choice choice;
    float tried[MAX_BLOCKS][LANES];
    int near_bits[(MAX_BLOCKS * 2 + 1) * LANES];
    float near_errors[MAX_BLOCKS * 2 + 1][LANES];
} Search;

typedef struct {
    float *values, *residual, *zeros;
    uint8_t *codes;
} Scratch;

/* Columns to round in turn; of every matrix, a column is contiguous. */
typedef struct {
    int64_t rows, cols, group, stride;
    const float *wanted, *weight, *shares;
    const int64_t *places;
    const float *scale, *zero;
    float max_code;
    uint8_t *codes;
    float *errors;
} Rounding;

/* A column's grid, from a strip's first row on. */
typedef struct {
    const float *scale, *zero;
    float max_code;
} Column;

/* Tables of ascending values, and the edges between them, each for so many rows. */
typedef struct {
    const float *values, *edges;
    int64_t entries, rows;
} Tables;

EF_INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Sixteen integers; loops over them would be unrolled into scalar code. */
#if defined(__GNUC__)
typedef int32_t Lanes __attribute__((vector_size(64), aligned(4)));
#define EVERY_THIRD \
    (Lanes) { 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45 }
#define LANES_FROM(out, start) (out) = EVERY_THIRD + (start)
#define LANES_SHIFT(out, a) (out) = (a) << 16
#define LANES_AND(out, a, mask) (out) = (a) & (mask)
#define LANES_AT_LEAST(out, low)                     \
    do {                                             \
        Lanes below = (Lanes)((out) < (low));        \
        (out) = (below & (low)) | (~below & (out));  \
    } while (0)
#else
typedef struct {
    int32_t lane[16];
} Lanes;
#define EACH_LANE for (int l = 0; l < 16; l++)
#define LANES_FROM(out, start) EACH_LANE (out).lane[l] = 3 * l + (start)
#define LANES_SHIFT(out, a) EACH_LANE (out).lane[l] = (a).lane[l] << 16
#define LANES_AND(out, a, mask) EACH_LANE (out).lane[l] = (a).lane[l] & (mask)
#define LANES_AT_LEAST(out, low) \
    EACH_LANE (out).lane[l] = (out).lane[l] < (low) ? (low) : (out).lane[l]
#endif

EF_INLINE int scale_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits >>= 16;
    if (bits < MIN_SCALE_BITS) bits = MIN_SCALE_BITS;
    return bits > MAX_SCALE_BITS ? MAX_SCALE_BITS : bits;
}

EF_INLINE float round_even(float x) {
    return (x + MAGIC) - MAGIC;
}

EF_INLINE float at_most(float x, float high) {
    return x < high ? x : high;
}

EF_INLINE float at_least(float x, float low) {
    return x > low ? x : low;
}

EF_INLINE int lowest_lane(unsigned mask) {
#if defined(__GNUC__)
    return __builtin_ctz(mask);
#else
    int lane = 0;
    while (!(mask >> lane & 1u)) ++lane;
    return lane;
#endif
}

EF_INLINE uint32_t widen_half(uint32_t half) {
    uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7FFFu) << 13, bits;
    float small = float_of_bits(rest | 0x38800000u) - float_of_bits(0x38800000u);
    uint32_t small_bits;
    memcpy(&small_bits, &small, sizeof small_bits);
    bits = rest + 0x38000000u;
    bits = rest >= 0x0F800000u ? rest | 0x7F800000u : bits;
    bits = rest < 0x00800000u ? small_bits : bits;
    return bits | sign;
}

/* ---- One instruction set after the other. ---- */

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
#define EF_DISPATCH 1

#define EF_NAME(x) x##_avx512
#define EF_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,popcnt")))
#define V __m512
#define VW 16
#define SET1 _mm512_set1_ps
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define ADD _mm512_add_ps
#define SUB _mm512_sub_ps
#define MUL _mm512_mul_ps
#define DIV _mm512_div_ps
#define MIN _mm512_min_ps
#define MAX _mm512_max_ps
#define ROUND(x) _mm512_roundscale_ps(x, 8)
#define FRACTION(x) _mm512_reduce_ps(x, 8)
#include "_kernels.c"
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

#define EF_NAME(x) x##_avx2
#define EF_TARGET __attribute__((target("avx2")))
#define V __m256
#define VW 8
#define SET1 _mm256_set1_ps
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define ADD _mm256_add_ps
#define SUB _mm256_sub_ps
#define MUL _mm256_mul_ps
#define DIV _mm256_div_ps
#define MIN _mm256_min_ps
#define MAX _mm256_max_ps
#define ROUND(x) _mm256_round_ps(x, 8)
#define FRACTION(x) SUB(x, ROUND(x))
#include "_kernels.c"
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
#endif

#define EF_NAME(x) x##_plain
#define EF_TARGET
#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define V float32x4_t
#define VW 4
#define SET1 vdupq_n_f32
#define LOAD vld1q_f32
#define STORE vst1q_f32
#define ADD vaddq_f32
#define SUB vsubq_f32
#define MUL vmulq_f32
#define DIV vdivq_f32
#define MIN vminq_f32
#define MAX vmaxq_f32
#define ROUND vrndnq_f32
#elif defined(__SSE2__)
#define V __m128
#define VW 4
#define SET1 _mm_set1_ps
#define LOAD _mm_loadu_ps
#define STORE _mm_storeu_ps
#define ADD _mm_add_ps
#define SUB _mm_sub_ps
#define MUL _mm_mul_ps
#define DIV _mm_div_ps
#define MIN _mm_min_ps
#define MAX _mm_max_ps
#define ROUND(x) SUB(ADD(x, SET1(MAGIC)), SET1(MAGIC))
#else
#define V float
#define VW 1
#define SET1(x) (x)
#define LOAD(p) (*(p))
#define STORE(p, x) (*(p) = (x))
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
#define MIN at_most
#define MAX at_least
#define ROUND round_even
#endif
#define FRACTION(x) SUB(x, ROUND(x))
#include "_kernels.c"

typedef int64_t (*QuantizeRows)(const Task *, const void *, int, uint8_t *, uint16_t *, uint8_t *,
                                double *, Scratch *);
typedef void (*DequantizeRows)(const Task *, const uint8_t *, const uint16_t *, const uint8_t *,
                               float *);
typedef void (*RoundColumns)(const Rounding *, const Tables *, float *);

/* Widest instruction set to use: 0 plain, 1 AVX2, 2 AVX-512. */
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

/* A function's copy for the widest instruction set to use. */
#ifdef EF_DISPATCH
#define EF_CHOICE(name)                             \
    (instruction_set() == 2   ? name##_avx512       \
     : instruction_set() == 1 ? name##_avx2         \
                              : name##_plain)
#else
#define EF_CHOICE(name) name##_plain
#endif

/* Restrict the instruction set, for tests and measurements; returns the one that will be used. */
EF_EXPORT int edgeforge_limit_instruction_set(int limit) {
    widest = limit;
    return instruction_set();
}

/*
 * Quantize rows. sums receives the squared error and the squared norm. Returns -1 when all rows
 * were fine, -2 when there was no memory, otherwise the first row that cannot be quantized.
 */
EF_EXPORT int64_t edgeforge_quantize_rows(const void *weight, int kind, int64_t rows, int64_t cols,
                                          int64_t group, int bits, int symmetric, float low_factor,
                                          float high_factor, uint8_t *codes, uint16_t *scale,
                                          uint8_t *zero_point, double *sums) {
    Task task = {rows, cols, group, bits, symmetric, low_factor, high_factor};
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

/* Write the float32 values that the stored parts stand for. */
EF_EXPORT void edgeforge_dequantize_rows(const uint8_t *codes, const uint16_t *scale,
                                         const uint8_t *zero_point, int64_t rows, int64_t cols,
                                         int64_t group, int bits, float *out) {
    Task task = {rows, cols, group, bits, zero_point == NULL, 0.0f, 0.0f};
    const DequantizeRows run = EF_CHOICE(dequantize_rows);
    run(&task, codes, scale, zero_point, out);
}

/*
 * Round columns in turn, each once it has its shares of the errors before it: on tables where there
 * are values in them, else on integer grids. Returns 0, or -2 when there was no memory.
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
 * Linkers that are told to export a module's entry find one here. It makes no module: quant.kernels.native
 * loads the library by ctypes, so that building it needs a C compiler and no Python headers.
 */
EF_EXPORT void *PyInit__kernels(void) {
    return NULL;
}

#else /* EF_NAME: the parts that are compiled for each instruction set. */

#define VECTORS (LANES / VW)

typedef struct {
    V v[VECTORS];
} EF_NAME(Block);
#define Block EF_NAME(Block)

#include "_search.h"

#include "_rows.h"

#include "_feedback.h"

#undef Block
#undef VECTORS
#endif
