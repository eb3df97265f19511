/*
 * Compiles the kernels for each instruction set. Every section defines the names of its vectors and
 * of their operations; _one_set.h then compiles the kernels with these names and undefines them.
 */
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
#include "_one_set.h"

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
#include "_one_set.h"
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
#include "_one_set.h"
