/*
 * Round to nearest with the best representable scale of every group, and its inverse.
 *
 * quant/rtn.py holds the same arithmetic in torch and must give the same bits, so every sum below
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
    QuantizeRows run = quantize_rows_plain;
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
#ifdef EF_DISPATCH
    switch (instruction_set()) {
        case 2: run = quantize_rows_avx512; break;
        case 1: run = quantize_rows_avx2; break;
        default: break;
    }
#endif
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
    DequantizeRows run = dequantize_rows_plain;
#ifdef EF_DISPATCH
    switch (instruction_set()) {
        case 2: run = dequantize_rows_avx512; break;
        case 1: run = dequantize_rows_avx2; break;
        default: break;
    }
#endif
    run(&task, codes, scale, zero_point, out);
}

/*
 * Round columns in turn, each once it has its shares of the errors before it: on tables where there
 * are values in them, else on integer grids. Returns 0, or -2 when there was no memory.
 */
EF_EXPORT int64_t edgeforge_round_columns(const Rounding *task, const Tables *tables) {
    float *errors = malloc((size_t)task->cols * STRIP * sizeof(float));
    RoundColumns run = round_columns_plain;
    if (errors == NULL) return OUT_OF_MEMORY;
#ifdef EF_DISPATCH
    switch (instruction_set()) {
        case 2: run = round_columns_avx512; break;
        case 1: run = round_columns_avx2; break;
        default: break;
    }
#endif
    run(task, tables, errors);
    free(errors);
    return 0;
}

/*
 * Linkers that are told to export a module's entry find one here. It makes no module: quant.native
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

EF_TARGET EF_INLINE Block EF_NAME(load)(const float *p) {
    Block b;
    for (int k = 0; k < VECTORS; k++) b.v[k] = LOAD(p + k * VW);
    return b;
}

EF_TARGET EF_INLINE Block EF_NAME(fill)(float x) {
    Block b;
    for (int k = 0; k < VECTORS; k++) b.v[k] = SET1(x);
    return b;
}

/* Squared distance of w to its nearest step, in units of the scale, added to sum. */
EF_TARGET EF_INLINE void EF_NAME(add_error)(float w, const Block *inverse, const Block *low,
                                            const Block *high, int clip_low, int clip_high,
                                            Block *sum) {
    V weight = SET1(w);
    for (int k = 0; k < VECTORS; k++) {
        V x = MUL(weight, inverse->v[k]), error;
        if (clip_low || clip_high) {
            V q = x;
            if (clip_high) q = MIN(q, high->v[k]);
            if (clip_low) q = MAX(q, low->v[k]);
            error = SUB(x, ROUND(q));
        } else {
            error = FRACTION(x);
        }
        sum->v[k] = ADD(sum->v[k], MUL(error, error));
    }
}

/* Even and odd columns are summed apart over blocks of 128 columns; the blocks are then added. */
EF_TARGET EF_INLINE Block EF_NAME(unit_errors)(const float *w, int64_t n, const Block *inverse,
                                               const Block *low, const Block *high, int clip_low,
                                               int clip_high) {
    Block total = EF_NAME(fill)(0.0f);
    for (int64_t start = 0; start < n; start += SUM_COLUMNS) {
        Block even = EF_NAME(fill)(0.0f), odd = even;
        int64_t stop = n - start < SUM_COLUMNS ? n : start + SUM_COLUMNS, j = start;
        for (; j + 1 < stop; j += 2) {
            EF_NAME(add_error)(w[j], inverse, low, high, clip_low, clip_high, &even);
            EF_NAME(add_error)(w[j + 1], inverse, low, high, clip_low, clip_high, &odd);
        }
        if (j < stop) EF_NAME(add_error)(w[j], inverse, low, high, clip_low, clip_high, &even);
        for (int k = 0; k < VECTORS; k++)
            total.v[k] = ADD(total.v[k], ADD(even.v[k], odd.v[k]));
    }
    return total;
}

EF_TARGET EF_INLINE Block EF_NAME(errors)(const float *w, int64_t n, const Block *inverse,
                                          const Block *area, const Block *low, const Block *high,
                                          int clip_low, int clip_high) {
    Block e;
    if (clip_low && clip_high)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 1, 1);
    else if (clip_low)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 1, 0);
    else if (clip_high)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 0, 1);
    else
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 0, 0);
    for (int k = 0; k < VECTORS; k++) e.v[k] = MUL(area->v[k], e.v[k]);
    return e;
}

/* Least of 16 and the first lane that has it. */
EF_TARGET EF_INLINE float EF_NAME(first_least)(const Block *b, int *lane) {
#if VW == 16
    float least = _mm512_reduce_min_ps(b->v[0]);
    *lane = lowest_lane(_mm512_cmp_ps_mask(b->v[0], SET1(least), _CMP_EQ_OQ));
    return least;
#else
    float e[LANES], least;
    V m = b->v[0];
    for (int k = 1; k < VECTORS; k++) m = MIN(m, b->v[k]);
    STORE(e, m);
    least = e[0];
    for (int k = 1; k < VW; k++) least = at_most(least, e[k]);
    for (int k = 0; k < VECTORS; k++) STORE(e + k * VW, b->v[k]);
    *lane = 0;
    while (e[*lane] != least) ++*lane;
    return least;
#endif
}

/* Lanes of a that are at most those of b, as bits. */
EF_TARGET EF_INLINE unsigned EF_NAME(at_most_mask)(const Block *a, const Block *b) {
#if VW == 16
    return _mm512_cmp_ps_mask(a->v[0], b->v[0], _CMP_LE_OQ);
#elif VW == 8
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a->v[0], b->v[0], _CMP_LE_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a->v[1], b->v[1], _CMP_LE_OQ)) << 8;
#else
    float x[LANES], y[LANES];
    unsigned mask = 0;
    for (int k = 0; k < VECTORS; k++) {
        STORE(x + k * VW, a->v[k]);
        STORE(y + k * VW, b->v[k]);
    }
    for (int l = 0; l < LANES; l++) mask |= (unsigned)(x[l] <= y[l]) << l;
    return mask;
#endif
}

/* What clipping to [low, high] costs: a lower bound of the error of all narrower windows. */
EF_TARGET EF_INLINE float EF_NAME(clipping)(const float *w, int64_t n, float low, float high) {
    float parts[LANES], total = 0.0f;
    Block sum = EF_NAME(fill)(0.0f);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int k = 0; k < VECTORS; k++) {
            V x = LOAD(w + j + k * VW);
            V excess = SUB(x, MAX(MIN(x, SET1(high)), SET1(low)));
            sum.v[k] = ADD(sum.v[k], MUL(excess, excess));
        }
    for (int k = 1; k < VECTORS; k++) sum.v[0] = ADD(sum.v[0], sum.v[k]);
#if VW == 16
    (void)parts;
    total = _mm512_reduce_add_ps(sum.v[0]);
#else
    STORE(parts, sum.v[0]);
    for (int k = 0; k < VW; k++) total += parts[k];
#endif
    for (; j < n; j++) {
        float excess = w[j] - at_least(at_most(w[j], high), low);
        total += excess * excess;
    }
    return total;
}

/* Highest and lowest of the group, and zero. */
EF_TARGET EF_INLINE void EF_NAME(range)(const float *w, int64_t n, float *positive,
                                        float *negative) {
    float high[LANES], low[LANES], most = 0.0f, least = 0.0f;
    Block highest = EF_NAME(fill)(0.0f), lowest = highest;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int k = 0; k < VECTORS; k++) {
            V x = LOAD(w + j + k * VW);
            highest.v[k] = MAX(x, highest.v[k]);
            lowest.v[k] = MIN(x, lowest.v[k]);
        }
    for (int k = 1; k < VECTORS; k++) {
        highest.v[0] = MAX(highest.v[0], highest.v[k]);
        lowest.v[0] = MIN(lowest.v[0], lowest.v[k]);
    }
#if VW == 16
    (void)high, (void)low;
    most = _mm512_reduce_max_ps(highest.v[0]);
    least = _mm512_reduce_min_ps(lowest.v[0]);
#else
    STORE(high, highest.v[0]);
    STORE(low, lowest.v[0]);
    for (int k = 0; k < VW; k++) {
        most = at_least(high[k], most);
        least = at_most(low[k], least);
    }
#endif
    for (; j < n; j++) {
        most = at_least(w[j], most);
        least = at_most(w[j], least);
    }
    *positive = most;
    *negative = -least;
}

/* Reciprocals and squares of the sixteen scales with these bits. */
EF_TARGET EF_INLINE void EF_NAME(candidates)(const int *bits, Block *inverse, Block *area) {
    Lanes lanes;
    float scales[LANES];
    memcpy(&lanes, bits, sizeof lanes);
    LANES_SHIFT(lanes, lanes);
    memcpy(scales, &lanes, sizeof scales);
    for (int k = 0; k < VECTORS; k++) {
        V scale = LOAD(scales + k * VW);
        inverse->v[k] = DIV(SET1(1.0f), scale);
        area->v[k] = MUL(scale, scale);
    }
}

/* Errors of the scales with these bits, none of them below smallest. */
EF_TARGET EF_INLINE void EF_NAME(try_scales)(const Search *search, int64_t n, const int *bits,
                                             int smallest, float *out) {
    const float zero = search->zero;
    const Block low = EF_NAME(fill)(-zero), high = EF_NAME(fill)(zero - 1.0f);
    const float widest = 1.0f / float_of_bits((uint32_t)smallest << 16);
    int clip_low = search->negative * widest > zero + 0.5f;
    int clip_high = search->positive * widest > zero - 0.5f;
    Block inverse, area, error;
    EF_NAME(candidates)(bits, &inverse, &area);
    /* In a short group, a branch guessed wrong costs more than a clamp that does nothing. */
    if (n <= 64) clip_low = clip_high = clip_low | clip_high;
    error = EF_NAME(errors)(search->w, n, &inverse, &area, &low, &high, clip_low, clip_high);
    for (int k = 0; k < VECTORS; k++) STORE(out + k * VW, error.v[k]);
}

EF_INLINE int EF_NAME(lowest_of_third)(const Search *search, int block) {
    return search->last - 1 - 3 * (LANES - 1) - 3 * LANES * block;
}

/*
 * The search for the scale of a symmetric group, in five stages.
 *
 * Every third scale is tried, from the largest down, until clipping alone costs more than the best
 * error. A scale one step away from one tried has codes q with |q * scale| <= |w| + error, so by
 * the triangle inequality its error (as a length) is less by at most (step / scale) times that:
 * only those that could still win are tried too.
 */
EF_TARGET EF_INLINE void EF_NAME(try_every_third)(Search *search, int64_t n) {
    int bits[LANES];
    Lanes lanes;
    LANES_FROM(lanes, EF_NAME(lowest_of_third)(search, search->blocks));
    LANES_AT_LEAST(lanes, search->first);
    memcpy(bits, &lanes, sizeof bits);
    EF_NAME(try_scales)(search, n, bits, bits[0], search->tried[search->blocks]);
    search->blocks++;
}

EF_TARGET EF_INLINE void EF_NAME(start)(const Task *task, Search *search, int64_t n) {
    const float reach = at_least(search->positive, search->negative);
    search->first = scale_bits(reach * task->low_factor);
    search->last = scale_bits(reach * task->high_factor);
    search->zero = (float)(1 << (task->bits - 1));
    search->blocks = 0;
    EF_NAME(try_every_third)(search, n);
    /* Below 8 bits the second block is needed nearly always. */
    if (task->bits < 8) EF_NAME(try_every_third)(search, n);
}

EF_TARGET EF_INLINE float EF_NAME(least_of)(const float *errors) {
    Block block = EF_NAME(load)(errors);
    int lane;
    return EF_NAME(first_least)(&block, &lane);
}

EF_TARGET EF_INLINE void EF_NAME(descend)(Search *search, int64_t n) {
    const float zero = search->zero;
    float best = EF_NAME(least_of)(search->tried[0]);
    if (search->blocks == 2) best = at_most(EF_NAME(least_of)(search->tried[1]), best);
    while (search->blocks < MAX_BLOCKS) {
        const int above = search->last - 3 * LANES * search->blocks; /* all above are decided */
        float scale;
        if (above < search->first) break;
        scale = float_of_bits((uint32_t)above << 16);
        if (EF_NAME(clipping)(search->w, n, -zero * scale, (zero - 1.0f) * scale) > best * SURE)
            break;
        EF_NAME(try_every_third)(search, n);
        best = at_most(EF_NAME(least_of)(search->tried[search->blocks - 1]), best);
    }
    search->best = best;
    search->length = sqrtf(EF_NAME(clipping)(search->w, n, 0.0f, 0.0f));
}

/* Append the masked ones of every third number from bottom, unless below first. */
EF_TARGET EF_INLINE int EF_NAME(append)(int *list, int count, unsigned mask, int bottom,
                                        int first) {
#if VW == 16
    const __m512i third =
        _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
    const __m512i bits = _mm512_add_epi32(third, _mm512_set1_epi32(bottom));
    mask &= _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(first));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32((__mmask16)mask, bits));
    return count + __builtin_popcount(mask);
#else
    while (mask) {
        const int bits = bottom + 3 * lowest_lane(mask);
        mask &= mask - 1;
        list[count] = bits;
        count += bits >= first;
    }
    return count;
#endif
}

EF_TARGET EF_INLINE void EF_NAME(list_near)(Search *search) {
    const float best_length = sqrtf(search->best);
    const float near_length = (search->length + best_length) * SURE;
    const int first = search->first, last = search->last;
    int *near_bits = search->near_bits, count = 0, plus;
    unsigned masks[MAX_BLOCKS];
    for (int block = search->blocks - 1; block >= 0; block--) {
        const int bottom = EF_NAME(lowest_of_third)(search, block);
        float powers[LANES], scales[LANES];
        unsigned could_win;
        Block error = EF_NAME(load)(search->tried[block]), bound;
        Lanes bits, power;
        LANES_FROM(bits, bottom);
        LANES_AT_LEAST(bits, first);
        LANES_SHIFT(bits, bits);
        LANES_AND(power, bits, 0x7F800000);
        memcpy(scales, &bits, sizeof scales);
        memcpy(powers, &power, sizeof powers);
        for (int k = 0; k < VECTORS; k++) {
            V step = MUL(LOAD(powers + k * VW), SET1(STEP * near_length));
            V reachable = ADD(SET1(best_length), DIV(step, LOAD(scales + k * VW)));
            bound.v[k] = MUL(MUL(reachable, reachable), SET1(SURE));
        }
        could_win = EF_NAME(at_most_mask)(&error, &bound);
        /* Lanes below the first scale stood for it: the scales around them are out or tried. */
        if (bottom < first) {
            const int below = (first - bottom + 2) / 3;
            could_win = below < LANES ? could_win & ~0u << below : 0u;
        }
        count = EF_NAME(append)(near_bits, count, could_win, bottom - 1, first);
        masks[block] = could_win;
    }
    search->smallest = near_bits[0];
    plus = count;
    for (int block = search->blocks - 1; block >= 0; block--)
        count = EF_NAME(append)(near_bits, count, masks[block],
                                EF_NAME(lowest_of_third)(search, block) + 1, first);
    if (plus == 0 || (count > plus && near_bits[plus] < near_bits[0]))
        search->smallest = near_bits[plus];
    for (int l = 0; l < LANES - 1; l++) near_bits[count + l] = last;
    search->count = count;
}

EF_TARGET EF_INLINE void EF_NAME(try_near)(Search *search, int64_t n) {
    for (int start = 0; start < search->count; start += LANES)
        EF_NAME(try_scales)(search, n, search->near_bits + start, search->smallest,
                            search->near_errors[start / LANES]);
}

/* Of equal errors the smaller scale wins. */
EF_TARGET EF_INLINE void EF_NAME(choose)(Search *search) {
    const int blocks = (search->count + LANES - 1) / LANES;
    float best = search->best;
    int chosen = MAX_SCALE_BITS;
    Block least;
    for (int block = 0; block < blocks; block++)
        best = at_most(EF_NAME(least_of)(search->near_errors[block]), best);
    least = EF_NAME(fill)(best);
    for (int block = 0; block < search->blocks; block++) {
        Block error = EF_NAME(load)(search->tried[block]);
        unsigned winners = EF_NAME(at_most_mask)(&error, &least);
        int bits = EF_NAME(lowest_of_third)(search, block) + 3 * lowest_lane(winners | 1u << 31);
        bits = bits < search->first ? search->first : bits;
        chosen = (winners != 0) & (bits < chosen) ? bits : chosen;
    }
    for (int block = 0; block < blocks; block++) {
        Block error = EF_NAME(load)(search->near_errors[block]);
        unsigned winners = EF_NAME(at_most_mask)(&error, &least);
        for (; winners; winners &= winners - 1) {
            int bits = search->near_bits[block * LANES + lowest_lane(winners)];
            chosen = bits < chosen ? bits : chosen;
        }
    }
    search->choice.bits = chosen;
    search->choice.zero = search->zero;
}

/* Sixteen scales at a time, from the largest down, each with the zero points that suit it. */
EF_TARGET EF_INLINE Choice EF_NAME(search_asymmetric)(const Task *task, const float *w, int64_t n,
                                                      float positive, float negative) {
    const float steps = (float)((1 << task->bits) - 1);
    const float reach = positive + negative;
    const int first = scale_bits(reach * task->low_factor), every = task->bits < 8;
    const V none = SET1(0.0f), all = SET1(steps);
    float best = float_of_bits(0x7F800000u);
    int top = scale_bits(reach * task->high_factor);
    Choice choice = {MAX_SCALE_BITS + 1, 0.0f};
    for (;;) {
        const float scale = float_of_bits((uint32_t)top << 16);
        float excess, lowest, highest;
        int bits[LANES], unused, trials;
        Block inverse, area, from, to, negated;
        for (int l = 0; l < LANES; l++) {
            int b = top - (LANES - 1) + l;
            bits[l] = b < first ? first : b;
        }
        EF_NAME(candidates)(bits, &inverse, &area);
        for (int k = 0; k < VECTORS; k++) {
            V above = SUB(all, ROUND(MUL(SET1(positive), inverse.v[k])));
            to.v[k] = MIN(MAX(ROUND(MUL(SET1(negative), inverse.v[k])), none), all);
            from.v[k] = MIN(MIN(MAX(above, none), all), to.v[k]);
            negated.v[k] = SUB(none, to.v[k]);
        }
        lowest = EF_NAME(first_least)(&from, &unused);
        highest = -EF_NAME(first_least)(&negated, &unused);
        trials = every ? (int)(highest - lowest) + 1 : 3;
        for (int trial = 0; trial < trials; trial++) {
            const float z = lowest + (float)trial;
            float zeros[LANES], least, widest;
            int lane, better, clip_low = 1, clip_high = 1;
            Block low, high, error;
            if (every) {
                if (EF_NAME(clipping)(w, n, -z * scale, (steps - z) * scale) > best * SURE)
                    continue;
                widest = 1.0f / float_of_bits((uint32_t)bits[0] << 16);
                clip_low = negative * widest > z + 0.5f;
                clip_high = positive * widest > (steps - z) + 0.5f;
                if (n <= 64) clip_low = clip_high = clip_low | clip_high;
            }
            for (int k = 0; k < VECTORS; k++) {
                V zero = SET1(z);
                if (!every) { /* the lower end, the middle rounded down, the upper end */
                    V way = MUL(SUB(to.v[k], from.v[k]), SET1(0.5f * (float)trial));
                    zero = ADD(from.v[k], ROUND(SUB(way, SET1(0.25f))));
                }
                STORE(zeros + k * VW, zero);
                low.v[k] = SUB(none, zero);
                high.v[k] = SUB(all, zero);
            }
            error = EF_NAME(errors)(w, n, &inverse, &area, &low, &high, clip_low, clip_high);
            if (every)
                for (int k = 0; k < VECTORS; k++) { /* put zero points of other scales out */
                    V outside = MAX(SUB(from.v[k], SET1(z)), SUB(SET1(z), to.v[k]));
                    V penalty = MUL(MAX(outside, none), SET1(1e38f));
                    error.v[k] = ADD(error.v[k], penalty);
                }
            least = EF_NAME(first_least)(&error, &lane);
            /* Of equal errors the smaller scale wins, then the smaller zero point. */
            better = (least < best) | ((least == best) & (bits[lane] < choice.bits)) |
                     ((least == best) & (bits[lane] == choice.bits) & (zeros[lane] < choice.zero));
            choice.bits = better ? bits[lane] : choice.bits;
            choice.zero = better ? zeros[lane] : choice.zero;
            best = better ? least : best;
        }
        top -= LANES;
        if (top < first) break;
        /* The two excesses add up to what the range is too wide by, however the window lies. */
        excess = reach - steps * float_of_bits((uint32_t)top << 16);
        if (excess > 0.0f && excess * excess * 0.5f > best * SURE) break;
    }
    return choice;
}

EF_TARGET EF_INLINE void EF_NAME(encode)(const float *w, int64_t n, float scale, float zero,
                                         float max_code, uint8_t *codes, float *residual) {
    const float inverse = 1.0f / scale, low = -zero, high = max_code - zero;
    for (int64_t j = 0; j < n; j++) {
        float q = round_even(at_least(at_most(w[j] * inverse, high), low));
        residual[j] = w[j] - q * scale;
        codes[j] = (uint8_t)(int32_t)(q + zero);
    }
}

EF_TARGET EF_INLINE void EF_NAME(pack)(const uint8_t *codes, int64_t n, int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, codes, (size_t)n);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < n / 2; i++)
            out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        if (n % 2) out[n / 2] = codes[n - 1];
        return;
    }
    /* A stream of bits, the lowest of each byte first. */
    uint32_t held = 0;
    int count = 0;
    for (int64_t j = 0; j < n; j++) {
        held |= (uint32_t)codes[j] << count;
        for (count += bits; count >= 8; count -= 8, held >>= 8) *out++ = (uint8_t)held;
    }
    if (count) *out = (uint8_t)held;
}

/* The code at a place of a stream of bits. */
EF_INLINE int EF_NAME(code_at)(const uint8_t *in, int64_t index, int bits) {
    const int64_t place = index * bits, byte = place / 8;
    const int shift = (int)(place % 8);
    int code = in[byte] >> shift;
    if (shift + bits > 8) code |= in[byte + 1] << (8 - shift);
    return code & ((1 << bits) - 1);
}

/* Sum of squares of a row padded with zeros: lane j sums columns j, j + 16, ..., then a tree. */
EF_TARGET EF_INLINE double EF_NAME(sum_of_squares)(const float *row, int64_t cols) {
    double lanes[LANES] = {0.0};
    for (int64_t j = 0; j < cols; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)row[j + l] * (double)row[j + l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* Read a row as float32; returns whether all of it is finite. */
EF_TARGET EF_INLINE int EF_NAME(read_row)(const void *weight, int kind, int64_t row, int64_t cols,
                                          float *values) {
    uint32_t *out = (uint32_t *)(void *)values;
    uint32_t bad = 0;
    if (kind == FLOAT32) {
        memcpy(values, (const float *)weight + row * cols, (size_t)cols * sizeof(float));
    } else if (kind == BFLOAT16) {
        const uint16_t *in = (const uint16_t *)weight + row * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = (uint32_t)in[j] << 16;
    } else {
        const uint16_t *in = (const uint16_t *)weight + row * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = widen_half(in[j]);
    }
    for (int64_t j = 0; j < cols; j++) bad |= (out[j] & 0x7F800000u) == 0x7F800000u;
    return !bad;
}

EF_TARGET static int64_t EF_NAME(quantize_rows)(const Task *task, const void *weight, int kind,
                                                uint8_t *codes, uint16_t *scale,
                                                uint8_t *zero_point, double *sums,
                                                Scratch *scratch) {
    const int64_t cols = task->cols, n = task->group, groups = cols / n;
    const float max_code = (float)((1 << task->bits) - 1);
    const float limit = LARGEST_SCALE * (task->symmetric ? (max_code - 1.0f) / 2.0f : max_code);
    double error = 0.0, norm = 0.0;
    Search searches[BATCH];
    for (int64_t row = 0; row < task->rows; row++) {
        if (!EF_NAME(read_row)(weight, kind, row, cols, scratch->values)) return row;
        for (int64_t begin = 0; begin < groups; begin += BATCH) {
            const int64_t left = groups - begin;
            const int batch = left < BATCH ? (int)left : BATCH;
            for (int i = 0; i < batch; i++) {
                Search *one = &searches[i];
                float reach;
                one->w = scratch->values + (begin + i) * n;
                EF_NAME(range)(one->w, n, &one->positive, &one->negative);
                reach = task->symmetric ? at_least(one->positive, one->negative)
                                        : one->positive + one->negative;
                if (!(reach <= limit)) return row;
                if (task->symmetric)
                    EF_NAME(start)(task, one, n);
                else
                    one->choice = EF_NAME(search_asymmetric)(task, one->w, n, one->positive,
                                                             one->negative);
            }
            if (task->symmetric) {
                for (int i = 0; i < batch; i++) EF_NAME(descend)(&searches[i], n);
                for (int i = 0; i < batch; i++) EF_NAME(list_near)(&searches[i]);
                for (int i = 0; i < batch; i++) EF_NAME(try_near)(&searches[i], n);
                for (int i = 0; i < batch; i++) EF_NAME(choose)(&searches[i]);
            }
            for (int i = 0; i < batch; i++) {
                const int64_t g = begin + i;
                const Choice choice = searches[i].choice;
                EF_NAME(encode)(searches[i].w, n, float_of_bits((uint32_t)choice.bits << 16),
                                choice.zero, max_code, scratch->codes + g * n,
                                scratch->residual + g * n);
                scale[row * groups + g] = (uint16_t)choice.bits;
                scratch->zeros[g] = choice.zero;
            }
        }
        EF_NAME(pack)(scratch->codes, cols, task->bits, codes + row * (cols * task->bits / 8));
        if (!task->symmetric) {
            uint8_t *points = scratch->codes; /* this row's codes are packed and gone */
            for (int64_t g = 0; g < groups; g++) points[g] = (uint8_t)(int)scratch->zeros[g];
            EF_NAME(pack)(points, groups, task->bits,
                          zero_point + row * ((groups * task->bits + 7) / 8));
        }
        error += EF_NAME(sum_of_squares)(scratch->residual, cols);
        norm += EF_NAME(sum_of_squares)(scratch->values, cols);
    }
    sums[0] = error;
    sums[1] = norm;
    return ALL_ROWS_FINE;
}

EF_TARGET static void EF_NAME(dequantize_rows)(const Task *task, const uint8_t *codes,
                                               const uint16_t *scale, const uint8_t *zero_point,
                                               float *out) {
    const int64_t cols = task->cols, n = task->group, groups = cols / n;
    const int bits = task->bits;
    for (int64_t row = 0; row < task->rows; row++) {
        const uint8_t *row_codes = codes + row * (cols * task->bits / 8);
        const uint8_t *row_zeros = zero_point + row * ((groups * task->bits + 7) / 8);
        for (int64_t g = 0; g < groups; g++) {
            const float s = float_of_bits((uint32_t)scale[row * groups + g] << 16);
            float *o = out + row * cols + g * n;
            int zero = 1 << (bits - 1);
            if (!task->symmetric) zero = EF_NAME(code_at)(row_zeros, g, bits);
            if (bits == 4) {
                const uint8_t *in = row_codes + g * n / 2;
                for (int64_t i = 0; i < n / 2; i++) {
                    o[2 * i] = (float)((in[i] & 15) - zero) * s;
                    o[2 * i + 1] = (float)((in[i] >> 4) - zero) * s;
                }
            } else if (bits == 8) {
                const uint8_t *in = row_codes + g * n;
                for (int64_t j = 0; j < n; j++) o[j] = (float)(in[j] - zero) * s;
            } else {
                for (int64_t j = 0; j < n; j++)
                    o[j] = (float)(EF_NAME(code_at)(row_codes, g * n + j, bits) - zero) * s;
            }
        }
    }
}

#include "_feedback.h"

#undef Block
#undef VECTORS
#endif
