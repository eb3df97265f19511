/*
 * Functions that need no vectors of floats: on single numbers, on their bits, and on vectors of
 * sixteen integers.
 */
EF_INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Sixteen integers. Compilers would unroll loops over them into scalar code. */
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

/* Returns the bits of the bfloat16 number at or below a positive value, clamped to the range. */
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

/* Returns the float32 bits of a float16; the subtraction normalizes subnormal numbers. */
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
