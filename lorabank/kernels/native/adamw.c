/* AdamW (arXiv:1711.05101) and the norm of gradients over many small tensors on a CPU, fp32, each in one pass over memory. */

#include <math.h>

typedef struct {
    float *p, *g, *first, *second; /* parameters, gradients and the two moments */
    long count;
} Leaf;

typedef struct {
    double divisor; /* by which gradients are divided first */
    double rate, decay, beta1, beta2, eps;
    double correction1, correction2; /* 1 - beta^step */
} Numbers;

/* sums[i] = the sum of squares of leaf i's gradient. */
void squares(const Leaf *all, long count, double *sums, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const float *g = all[i].g;
        double part[16] = {0};
        long n = 0;
        for (; n + 16 <= all[i].count; n += 16)
            for (int k = 0; k < 16; k++) part[k] += (double)g[n + k] * g[n + k];
        for (; n < all[i].count; n++) part[0] += (double)g[n] * g[n];
        for (int k = 1; k < 16; k++) part[0] += part[k];
        sums[i] = part[0];
    }
}

void adamw(const Leaf *all, long count, const Numbers *numbers, int threads) {
    const float inverse = (float)(1 / numbers->divisor), shrink = (float)(1 - numbers->rate * numbers->decay);
    const float keep1 = (float)numbers->beta1, add1 = (float)(1 - numbers->beta1);
    const float keep2 = (float)numbers->beta2, add2 = (float)(1 - numbers->beta2);
    const float step = (float)(numbers->rate / numbers->correction1), root = (float)(1 / sqrt(numbers->correction2));
    const float eps = (float)numbers->eps;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (long i = 0; i < count; i++) {
        float *restrict p = all[i].p, *restrict m = all[i].first, *restrict v = all[i].second;
        const float *restrict g = all[i].g;
        for (long n = 0; n < all[i].count; n++) {
            const float gradient = g[n] * inverse;
            m[n] = keep1 * m[n] + add1 * gradient;
            v[n] = keep2 * v[n] + add2 * gradient * gradient;
            p[n] = shrink * p[n] - step * m[n] / (sqrtf(v[n]) * root + eps);
        }
    }
}
