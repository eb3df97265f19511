/*
 * Converts integers of 1 to 8 bits, packed low bits first, to the floats they stand for, and
 * multiplies with them. The floats equal those of device_harness/coreml_interpreter/weights.py bit
 * for bit.
 *
 * Built together with _kernels.c and -ffp-contract=off: a fused multiply-add would round once where
 * that file rounds twice.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EF_EXPORT __declspec(dllexport)
#else
#define EF_EXPORT __attribute__((visibility("default")))
#endif

/* The compiler makes one copy per instruction set; loading the library chooses among them. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EF_CLONES
#endif

#if defined(__GNUC__)
#define EF_INLINE static inline __attribute__((always_inline))
#else
#define EF_INLINE static __inline
#endif

enum { LANES = 16 };

typedef struct {
    const uint8_t *packed;
    const float *scale;  /* [rows, groups], or tables [groups of rows, 1 << bits] */
    const float *offset; /* [rows, groups], or null */
    int64_t cols, group; /* columns of a row, and of a group */
    int64_t table_rows;  /* rows that share a table; 0 when there are scales */
    int32_t bits, is_signed, half;
} Blocks;

/* Rounds to the nearest float16, ties to even; the result is still a float32. */
EF_INLINE float to_half(float x) {
    float reach = x < 0 ? -x : x;
    float split = x * 8193.0f; /* Veltkamp's splitting by 2^13 + 1 keeps the upper 11 bits */
    float normal = split - (split - x);
    /* Subnormal float16: float32's spacing in [0.5, 1), 2^-24, is the step of those numbers. */
    float small = x < 0 ? -((reach + 0.75f) - 0.75f) : (reach + 0.75f) - 0.75f;
    float near = reach < 6.103515625e-05f ? small : normal;
    float infinite = x < 0 ? -INFINITY : INFINITY;
    return reach >= 65520.0f ? infinite : near;
}

/* Unpacks codes of a row, one per byte; `first` is the index of its first code in the matrix. */
EF_INLINE void unpack(const uint8_t *packed, int bits, int64_t first, int64_t count,
                      uint8_t *codes) {
    if (bits == 8) {
        memcpy(codes, packed + first, (size_t)count);
        return;
    }
    if (bits == 4 && first % 2 == 0) {
        const uint8_t *from = packed + first / 2;
        for (int64_t i = 0; i < count / 2; i++) {
            codes[2 * i] = from[i] & 15;
            codes[2 * i + 1] = from[i] >> 4;
        }
        if (count % 2) codes[count - 1] = from[count / 2] & 15;
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t bit = (first + i) * bits;
        int shift = (int)(bit % 8);
        unsigned word = packed[bit / 8];
        if (shift + bits > 8) word |= (unsigned)packed[bit / 8 + 1] << 8;
        codes[i] = (uint8_t)(word >> shift & ((1u << bits) - 1));
    }
}

EF_INLINE void row_values(const Blocks *b, int64_t row, uint8_t *codes, float *out) {
    unpack(b->packed, b->bits, row * b->cols, b->cols, codes);
    if (b->table_rows) {
        const float *table = b->scale + ((row / b->table_rows) << b->bits);
        for (int64_t c = 0; c < b->cols; c++) out[c] = table[codes[c]];
        return;
    }
    int32_t sign = b->is_signed ? 1 << (b->bits - 1) : 0;
    int64_t groups = b->cols / b->group;
    const float *scale = b->scale + row * groups;
    const float *offset = b->offset ? b->offset + row * groups : 0;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *code = codes + g * b->group;
        float *to = out + g * b->group;
        float s = scale[g], o = offset ? offset[g] : 0.0f;
        for (int64_t c = 0; c < b->group; c++)
            to[c] = ((float)(((int32_t)code[c] ^ sign) - sign) - o) * s;
    }
    if (b->half)
        for (int64_t c = 0; c < b->cols; c++) out[c] = to_half(out[c]);
}

/* Writes rows `first` to `last` as floats to out [last - first, cols]; codes [cols] is scratch. */
EF_CLONES EF_EXPORT void edgeforge_block_rows(const Blocks *b, int64_t first, int64_t last,
                                              uint8_t *codes, float *out) {
    for (int64_t row = first; row < last; row++)
        row_values(b, row, codes, out + (row - first) * b->cols);
}

/*
 * Writes the products of x [n, cols] with rows `first` to `last` to columns `first` to `last` of
 * out [n, stride]; codes [cols] and values [cols] are scratch. The lanes fix the order of each sum,
 * so that it does not depend on the instruction set.
 */
EF_CLONES EF_EXPORT void edgeforge_block_product(const Blocks *b, int64_t first, int64_t last,
                                                 const float *x, int64_t n, uint8_t *codes,
                                                 float *values, float *out, int64_t stride) {
    for (int64_t row = first; row < last; row++) {
        row_values(b, row, codes, values);
        for (int64_t t = 0; t < n; t++) {
            const float *y = x + t * b->cols;
            float lane[2 * LANES] = {0};
            int64_t c = 0;
            for (; c + 2 * LANES <= b->cols; c += 2 * LANES)
                for (int l = 0; l < 2 * LANES; l++) lane[l] += values[c + l] * y[c + l];
            float sum = 0;
            for (; c < b->cols; c++) sum += values[c] * y[c];
            for (int l = 0; l < 2 * LANES; l++) sum += lane[l];
            out[t * stride + row] = sum;
        }
    }
}
