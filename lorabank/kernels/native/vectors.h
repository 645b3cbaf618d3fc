/* Vectors as wide as the processor's, in GCC's and clang's own notation. */

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
