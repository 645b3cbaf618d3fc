/* Vectors as wide as the processor's, in GCC's and clang's own notation. */

#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define W 16 /* floats in a vector */
#else
#define W 8
#endif
#define ROWS 8 /* rows whose sums are held in registers */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE long parts(long count, long size) { return (count + size - 1) / size; }
INLINE long smaller(long a, long b) { return a < b ? a : b; }

/* total + s · v, rounded once where the processor can. Said outright: for some processors (AMD's Zen) GCC turns a · b + c into one
 * instruction in one loop and into two in another, and a row's bits would depend on how many rows go along. */
INLINE vec plus(vec total, float s, vec v) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(s), (__m512)v, (__m512)total);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(s), (__m256)v, (__m256)total);
#else
    return total + s * v;
#endif
}

INLINE float plus_one(float total, float s, float v) {
#ifdef __FMA__
    return __builtin_fmaf(s, v, total);
#else
    return total + s * v;
#endif
}
