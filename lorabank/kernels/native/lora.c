/* LoRA's narrow products on a CPU, fp32, for many adapters in one call.
 *
 *   through   mid[n, r] = mid_scale · Σ_i in[n, i] · P[r, i]        xA = x Aᵀ, and dxA = dy Bᵀ
 *             out[n, o] += out_scale · Σ_r mid[n, r] · Q[r, o]      y += xA B, and dx += dxA A
 *   outer     out[r, c] = scale · Σ_n p[n, r] · x[n, c]             dA and dB
 *
 * Every matrix is row-major and contiguous. A sum always runs in the same order, whichever block or thread it falls into: a
 * row's result depends neither on the rows beside it nor on the number of threads.
 */

#include <stdlib.h>

#include "vectors.h"

#define BLOCK 16  /* rows of a task */
#define CHUNK 192 /* columns of a task */
#define SMALL 100000L /* multiplications below which one thread is faster */
#define OUTER_RANKS (W / 2)
#define OUTER_VECTORS (W == 16 ? 3 : 2)

typedef struct {
    const float *in, *P, *Q;
    float *mid, *out; /* out: NULL for none */
    long rows, inputs, outputs, ranks;
    float mid_scale, out_scale;
} Through;

typedef struct {
    const float *p, *x;
    float *out;
    long rows, ranks, columns;
    float scale, unused;
} Outer;

/* P[r, i] → packed[group of W ranks][i][rank in the group], with zeros beyond the last rank; inputs [start, stop) of it. */
static void pack(const Through *t, float *packed, long start, long stop) {
    const long I = t->inputs, R = t->ranks;
    for (long g = 0; g * W < R; g++) {
        const float *P = t->P + g * W * I;
        float *to = packed + g * W * I;
        if (R - g * W >= W) {
            for (long i = start; i < stop; i++)
                for (int k = 0; k < W; k++) to[i * W + k] = P[k * I + i];
        } else {
            for (long i = start; i < stop; i++)
                for (int k = 0; k < W; k++) to[i * W + k] = k < R - g * W ? P[k * I + i] : 0;
        }
    }
}

INLINE void shrink(const Through *t, const float *packed, long n, const int rows) {
    const long I = t->inputs, R = t->ranks;
    const float *in = t->in + n * I;
    for (long g = 0; g * W < R; g++) {
        vec total[ROWS] = {{0}};
        for (long i = 0; i < I; i++) {
            const vec p = *(const vec *)(packed + (g * I + i) * W);
            for (int j = 0; j < rows; j++) total[j] = plus(total[j], in[j * I + i], p);
        }
        for (int j = 0; j < rows; j++) {
            total[j] *= t->mid_scale;
            float *mid = t->mid + (n + j) * R + g * W;
            if (R - g * W >= W) *(vec *)mid = total[j];
            else for (long k = 0; k < R - g * W; k++) mid[k] = total[j][k];
        }
    }
}

INLINE void expand(const Through *t, long n, const int rows) {
    const long O = t->outputs, R = t->ranks;
    const float *mid = t->mid + n * R;
    float *out = t->out + n * O;
    long o = 0;
    for (; o + W <= O; o += W) {
        vec total[ROWS] = {{0}};
        for (long r = 0; r < R; r++) {
            const vec q = *(const vec *)(t->Q + r * O + o);
            for (int j = 0; j < rows; j++) total[j] = plus(total[j], mid[j * R + r], q);
        }
        for (int j = 0; j < rows; j++) {
            vec *to = (vec *)(out + j * O + o);
            *to = plus(*to, t->out_scale, total[j]);
        }
    }
    for (; o < O; o++)
        for (int j = 0; j < rows; j++) {
            float total = 0;
            for (long r = 0; r < R; r++) total = plus_one(total, mid[j * R + r], t->Q[r * O + o]);
            out[j * O + o] = plus_one(out[j * O + o], t->out_scale, total);
        }
}

static void through(const Through *t, const float *packed, long start, long stop) {
    long n = start;
    for (; n + ROWS <= stop; n += ROWS) {
        shrink(t, packed, n, ROWS);
        if (t->out) expand(t, n, ROWS);
    }
    for (; n < stop; n++) {
        shrink(t, packed, n, 1);
        if (t->out) expand(t, n, 1);
    }
}

/* Returns 0, or 1 without memory for the packed P's. */
int lora_through(const Through *all, long count, int threads) {
    long blocks = 0, chunks = 0, work = 0, size = 0;
    for (long s = 0; s < count; s++) {
        blocks += parts(all[s].rows, BLOCK);
        chunks += parts(all[s].inputs, CHUNK);
        work += all[s].rows * all[s].ranks * (all[s].inputs + all[s].outputs);
        size += parts(all[s].ranks, W) * W * all[s].inputs;
    }
    float *packed = malloc((size_t)(size ? size : 1) * sizeof(float));
    if (!packed) return 1;
#pragma omp parallel num_threads(threads) if (work > SMALL)
    {
#pragma omp for schedule(static)
        for (long b = 0; b < chunks; b++) {
            const Through *t = all;
            float *to = packed;
            long chunk = b;
            for (; chunk >= parts(t->inputs, CHUNK); t++) {
                chunk -= parts(t->inputs, CHUNK);
                to += parts(t->ranks, W) * W * t->inputs;
            }
            pack(t, to, chunk * CHUNK, smaller((chunk + 1) * CHUNK, t->inputs));
        }
#pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++) {
            const Through *t = all;
            const float *from = packed;
            long block = b;
            for (; block >= parts(t->rows, BLOCK); t++) {
                block -= parts(t->rows, BLOCK);
                from += parts(t->ranks, W) * W * t->inputs;
            }
            through(t, from, block * BLOCK, smaller((block + 1) * BLOCK, t->rows));
        }
    }
    free(packed);
    return 0;
}

INLINE void outer_block(const Outer *t, long r, long c, const int ranks, const int vectors) {
    vec total[OUTER_RANKS][OUTER_VECTORS] = {{{0}}};
    const long C = t->columns, R = t->ranks;
    for (long n = 0; n < t->rows; n++) {
        vec x[OUTER_VECTORS];
        for (int k = 0; k < vectors; k++) x[k] = *(const vec *)(t->x + n * C + c + k * W);
        for (int j = 0; j < ranks; j++)
            for (int k = 0; k < vectors; k++) total[j][k] = plus(total[j][k], t->p[n * R + r + j], x[k]);
    }
    for (int j = 0; j < ranks; j++)
        for (int k = 0; k < vectors; k++) *(vec *)(t->out + (r + j) * C + c + k * W) = t->scale * total[j][k];
}

INLINE void outer_columns(const Outer *t, long c, const int vectors) {
    long r = 0;
    for (; r + OUTER_RANKS <= t->ranks; r += OUTER_RANKS) outer_block(t, r, c, OUTER_RANKS, vectors);
    for (; r + 4 <= t->ranks; r += 4) outer_block(t, r, c, 4, vectors);
    for (; r < t->ranks; r++) outer_block(t, r, c, 1, vectors);
}

static void outer(const Outer *t, long start, long stop) {
    const long C = t->columns, R = t->ranks;
    long c = start;
    for (; c + OUTER_VECTORS * W <= stop; c += OUTER_VECTORS * W) outer_columns(t, c, OUTER_VECTORS);
    for (; c + W <= stop; c += W) outer_columns(t, c, 1);
    for (; c < stop; c++)
        for (long r = 0; r < R; r++) {
            float total = 0;
            for (long n = 0; n < t->rows; n++) total = plus_one(total, t->p[n * R + r], t->x[n * C + c]);
            t->out[r * C + c] = t->scale * total;
        }
}

void lora_outer(const Outer *all, long count, int threads) {
    long chunks = 0, work = 0;
    for (long s = 0; s < count; s++) {
        chunks += parts(all[s].columns, CHUNK);
        work += all[s].rows * all[s].ranks * all[s].columns;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (work > SMALL)
    for (long b = 0; b < chunks; b++) {
        const Outer *t = all;
        long chunk = b;
        for (; chunk >= parts(t->columns, CHUNK); t++) chunk -= parts(t->columns, CHUNK);
        outer(t, chunk * CHUNK, smaller((chunk + 1) * CHUNK, t->columns));
    }
}
