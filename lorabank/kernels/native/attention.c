/* Softmax attention and its gradients on a CPU, fp32, for sequences without a mask (causal or full), several query heads to a
 * key head. The scores of a few queries at a time are held, never all of them (FlashAttention-2's backward, arXiv:2307.08691).
 * Shapes: B rows, H query heads, G key heads, T tokens, D features a head (a multiple of two vectors).
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define PAIR (2 * W)
#define BLOCK 64 /* queries whose probabilities are held at once in the backward pass */

typedef int ivec __attribute__((vector_size(W * 4), aligned(4), may_alias));

typedef struct {
    float *at;
    long row, head, token; /* strides; features lie side by side */
} Heads;

typedef struct {
    Heads q, k, v, o, d_o, dq, dk, dv;
    float *lse; /* (B, H, T) */
    long B, H, G, T, D;
    float scale;
    int causal;
} Attention;

INLINE float *head_of(Heads h, long b, long n) { return h.at + b * h.row + n * h.head; }
INLINE long padded(long T) { return parts(T, W) * W; }

INLINE vec pick(ivec which, vec a, vec b) { return (vec)((which & (ivec)a) | (~which & (ivec)b)); }

/* Within 2 units of the last place from e^-87 to e^88 (Cephes' polynomial). */
INLINE vec exp_(vec x) {
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    x = pick(x < low, low, x); /* a NaN stays one */
    x = pick(x > high, high, x);
    const vec k = x * 1.44269504088896341f + 12582912.0f; /* adding 1.5 · 2²³ rounds to a whole number */
    const vec whole = k - 12582912.0f;
    vec f = x - whole * 0.693359375f;
    f = f - whole * -2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const ivec power = ((ivec)k << 23) + 0x3f800000; /* the low bits of k hold the whole number */
    return p * (vec)power;
}

INLINE ivec lanes(void) {
    ivec l;
    for (int i = 0; i < W; i++) l[i] = i;
    return l;
}

INLINE float sum_of(vec v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}

INLINE float max_of(vec v) {
    float s = v[0];
    for (int i = 1; i < W; i++) s = v[i] > s ? v[i] : s;
    return s;
}

/* (T, D) → (D, padded T), zeros behind the last token. */
static void turn(const float *from, long stride, float *to, long T, long D) {
    const long P = padded(T);
    for (long t = 0; t < P; t += W)
        for (long d = 0; d < D; d++)
            for (int i = 0; i < W; i++) to[d * P + t + i] = t + i < T ? from[(t + i) * stride + d] : 0;
}

/* out[j][t] = Σ_d x[j][d] · turned[d][t] for the first `groups` vectors of t. */
INLINE void against(const float *x, long stride, const float *turned, long P, long D, long groups, float *out, const int rows) {
    for (long g = 0; g < groups; g++) {
        vec total[ROWS] = {{0}};
        for (long d = 0; d < D; d++) {
            const vec y = *(const vec *)(turned + d * P + g * W);
            for (int j = 0; j < rows; j++) total[j] = plus(total[j], x[j * stride + d], y);
        }
        for (int j = 0; j < rows; j++) *(vec *)(out + j * P + g * W) = total[j];
    }
}

/* out[j][d] (+)= factor[j] · Σ_t p[j][t] · y[t][d], t from `first` to `last`; p's element (j, t) lies at j · pj + t · pt. */
INLINE void gather(const float *p, long pj, long pt, const float *y, long stride, long D, long first, long last,
                   float *out, long out_stride, const float *factor, const int add, const int rows) {
    for (long d = 0; d < D; d += PAIR) {
        vec total[ROWS][2] = {{{0}}};
        for (long t = first; t < last; t++) {
            const vec a = *(const vec *)(y + t * stride + d), b = *(const vec *)(y + t * stride + d + W);
            for (int j = 0; j < rows; j++) {
                total[j][0] = plus(total[j][0], p[j * pj + t * pt], a);
                total[j][1] = plus(total[j][1], p[j * pj + t * pt], b);
            }
        }
        for (int j = 0; j < rows; j++)
            for (int k = 0; k < 2; k++) {
                vec *to = (vec *)(out + j * out_stride + d + k * W);
                if (factor) total[j][k] *= factor[j];
                if (add) total[j][k] += *to;
                *to = total[j][k];
            }
    }
}

INLINE long keys_of(const Attention *a, long i) { return a->causal ? smaller(i + 1, a->T) : a->T; }

INLINE void forward_rows(const Attention *a, long b, long h, long i, const float *kt, float *s, const int rows) {
    const long P = padded(a->T), g = h / (a->H / a->G), last = keys_of(a, i + rows - 1), groups = parts(last, W);
    const float *q = head_of(a->q, b, h) + i * a->q.token;
    float inverse[ROWS];
    against(q, a->q.token, kt, P, a->D, groups, s, rows);
    for (int j = 0; j < rows; j++) {
        const ivec keys = (ivec){0} + (int)keys_of(a, i + j);
        vec top = (vec){0} - INFINITY, total = {0};
        for (long n = 0; n < groups; n++) {
            vec *x = (vec *)(s + j * P + n * W);
            const ivec seen = lanes() + (int)(n * W) < keys;
            *x = pick(seen, *x * a->scale, (vec){0} - INFINITY);
            top = pick(*x > top, *x, top);
        }
        const float m = max_of(top);
        for (long n = 0; n < groups; n++) {
            vec *x = (vec *)(s + j * P + n * W);
            const ivec seen = lanes() + (int)(n * W) < keys;
            *x = pick(seen, exp_(*x - m), (vec){0});
            total += *x;
        }
        const float sum = sum_of(total);
        inverse[j] = 1 / sum;
        a->lse[(b * a->H + h) * a->T + i + j] = m + logf(sum);
    }
    gather(s, P, 1, head_of(a->v, b, g), a->v.token, a->D, 0, last, head_of(a->o, b, h) + i * a->o.token, a->o.token, inverse, 0,
           rows);
}

/* Returns 0, or 1 without memory. */
int attention_forward(const Attention *a, int threads) {
    const long P = padded(a->T);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *kt = malloc(sizeof(float) * (size_t)(P * (a->D + ROWS))), *s = kt + P * a->D;
        if (!kt) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < a->B * a->H; n++) {
            if (!kt) continue;
            const long b = n / a->H, h = n % a->H;
            turn(head_of(a->k, b, h / (a->H / a->G)), a->k.token, kt, a->T, a->D);
            long i = 0;
            for (; i + ROWS <= a->T; i += ROWS) forward_rows(a, b, h, i, kt, s, ROWS);
            for (; i < a->T; i++) forward_rows(a, b, h, i, kt, s, 1);
        }
        free(kt);
    }
    return failed;
}

/* Probabilities and dS of some queries, and their dq. */
INLINE void backward_rows(const Attention *a, long b, long h, long i, const float *kt, const float *vt, float *p, float *ds,
                          const int rows) {
    const long P = padded(a->T), g = h / (a->H / a->G), last = keys_of(a, i + rows - 1), groups = parts(last, W);
    const float *d_o = head_of(a->d_o, b, h) + i * a->d_o.token, *o = head_of(a->o, b, h) + i * a->o.token;
    against(head_of(a->q, b, h) + i * a->q.token, a->q.token, kt, P, a->D, groups, p, rows);
    against(d_o, a->d_o.token, vt, P, a->D, groups, ds, rows);
    for (int j = 0; j < rows; j++) {
        vec delta = {0};
        for (long d = 0; d < a->D; d += W)
            delta += *(const vec *)(d_o + j * a->d_o.token + d) * *(const vec *)(o + j * a->o.token + d);
        const float offset = sum_of(delta), lse = a->lse[(b * a->H + h) * a->T + i + j];
        const ivec keys = (ivec){0} + (int)keys_of(a, i + j);
        for (long n = 0; n < groups; n++) {
            vec *x = (vec *)(p + j * P + n * W), *y = (vec *)(ds + j * P + n * W);
            const ivec seen = lanes() + (int)(n * W) < keys;
            *x = pick(seen, exp_(*x * a->scale - lse), (vec){0});
            *y = *x * (*y - offset) * a->scale;
        }
    }
    gather(ds, P, 1, head_of(a->k, b, g), a->k.token, a->D, 0, last, head_of(a->dq, b, h) + i * a->dq.token, a->dq.token, NULL, 0,
           rows);
}

/* What some keys get from the queries [start, stop). p and ds hold these queries' rows. */
INLINE void key_rows(const Attention *a, long b, long h, long n, long start, long stop, const float *p, const float *ds,
                     const int rows) {
    const long P = padded(a->T), g = h / (a->H / a->G), first = a->causal && n > start ? n : start;
    const Heads q = a->q, d_o = a->d_o;
    if (first >= stop) return;
    gather(ds - start * P + n, 1, P, head_of(q, b, h), q.token, a->D, first, stop, head_of(a->dk, b, g) + n * a->dk.token,
           a->dk.token, NULL, 1, rows);
    gather(p - start * P + n, 1, P, head_of(d_o, b, h), d_o.token, a->D, first, stop, head_of(a->dv, b, g) + n * a->dv.token,
           a->dv.token, NULL, 1, rows);
}

static void backward_head(const Attention *a, long b, long h, const float *kt, const float *vt, float *p, float *ds) {
    const long P = padded(a->T);
    for (long start = 0; start < a->T; start += BLOCK) {
        const long stop = smaller(start + BLOCK, a->T), keys = keys_of(a, stop - 1);
        memset(p, 0, sizeof(float) * (size_t)(BLOCK * P)); /* what a query doesn't see stays zero */
        memset(ds, 0, sizeof(float) * (size_t)(BLOCK * P));
        long i = start, n = 0;
        for (; i + ROWS <= stop; i += ROWS) backward_rows(a, b, h, i, kt, vt, p + (i - start) * P, ds + (i - start) * P, ROWS);
        for (; i < stop; i++) backward_rows(a, b, h, i, kt, vt, p + (i - start) * P, ds + (i - start) * P, 1);
        for (; n + ROWS <= keys; n += ROWS) key_rows(a, b, h, n, start, stop, p, ds, ROWS);
        for (; n < keys; n++) key_rows(a, b, h, n, start, stop, p, ds, 1);
    }
}

/* dk and dv come in as zeros. Returns 0, or 1 without memory. */
int attention_backward(const Attention *a, int threads) {
    const long P = padded(a->T), shared = a->H / a->G;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *kt = malloc(sizeof(float) * (size_t)(P * 2 * (a->D + BLOCK)));
        float *vt = kt + P * a->D, *p = vt + P * a->D, *ds = p + P * BLOCK;
        if (!kt) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < a->B * a->G; n++) {
            if (!kt) continue;
            const long b = n / a->G, g = n % a->G;
            turn(head_of(a->k, b, g), a->k.token, kt, a->T, a->D);
            turn(head_of(a->v, b, g), a->v.token, vt, a->T, a->D);
            for (long h = g * shared; h < (g + 1) * shared; h++) backward_head(a, b, h, kt, vt, p, ds);
        }
        free(kt);
    }
    return failed;
}
