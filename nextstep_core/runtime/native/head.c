/* The velocity of a noisy token by the flow head with int8 matrices, in one call: `FlowHead.velocity`.
 *
 * Between two products stand a norm, a modulation, a SiLU and a gate, each of which takes less time than calling it.
 */
#include "integers.h"

typedef struct {
    const float *gain, *offset; /* of the norm */
    const int8_t *first;
    const uint16_t *first_scale;
    const float *first_bias;
    const int8_t *second;
    const uint16_t *second_scale;
    const float *second_bias;
} Block;

/* Rows of `dim` numbers that lie one after the other, as floats or, where there are `halves`, as bfloat16. */
INLINE float read(const void *numbers, int64_t at, int64_t halves) {
    return halves ? wide(((const uint16_t *)numbers)[at]) : ((const float *)numbers)[at];
}

/* e to the power of -|x|, to 2e-7 of it: a polynomial for what is left of a power of two. */
INLINE float exp_of_minus(float x) {
    const float limited = x > 87.0f ? 87.0f : x, whole = rintf(limited * -1.44269504f);
    const float rest = -limited - whole * 0.693359375f + whole * 2.12194440e-4f;
    float value = 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1;
    const uint32_t bits = ((uint32_t)(int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return value * power;
}

INLINE float silu(float x) {
    const float small = exp_of_minus(fabsf(x));
    return x >= 0 ? x / (1 + small) : x * small / (1 + small);
}

INLINE float product(const float *row, const float *x, int64_t columns) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < columns; k++) sum += row[k] * x[k];
    return sum;
}

/* u = (x - mean) / deviation * gain + offset, times factor, plus shift; without gain and offset where there are none. */
static void modulated(const float *x, const float *gain, const float *offset, const void *modulation, int64_t at,
                      float *u, int64_t dim, float eps, int64_t halves) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < dim; k++) sum += x[k];
    const float mean = sum / dim;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < dim; k++) squares += (x[k] - mean) * (x[k] - mean);
    const float inverse = 1 / sqrtf(squares / dim + eps);
    for (int64_t k = 0; k < dim; k++) {
        const float normal = (x[k] - mean) * inverse;
        const float own = gain ? normal * gain[k] + offset[k] : normal;
        u[k] = own * read(modulation, at + dim + k, halves) + read(modulation, at + k, halves);
    }
}

/* out (count, token), x (count, token). The blocks' matrices are (dim, dim), with `dim` a multiple of BYTES; `input`
 * (dim, token) and `final` (token, dim) are floats. modulations: for each block (count, 3 * dim): shift, factor, gate,
 * and the last (count, 2 * dim). `room`, at a multiple of 64 bytes, holds count * (14 * dim + 4 * token + 12) + 64. */
void nextstep_velocity(const Block *blocks, const void *const *modulations, const float *input, const float *input_bias,
                       const float *final, const float *final_bias, const void *x, void *out, char *room,
                       int64_t count, int64_t dim, int64_t token, int64_t number, int64_t threads, int64_t halves,
                       float eps) {
    int8_t *first = (int8_t *)room, *second = first + count * dim;
    float *h = (float *)(second + count * dim), *u = h + count * dim, *noisy = u + 2 * count * dim;
    float *answer = u + count * dim;
    Rounded *units = (Rounded *)(noisy + count * token);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < count * token; n++) noisy[n] = read(x, n, halves);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < dim; row++)
            for (int64_t m = 0; m < count; m++)
                h[m * dim + row] = input_bias[row] + product(input + row * token, noisy + m * token, token);
        for (int64_t b = 0; b < number; b++) {
            const Block *block = blocks + b;
            const void *modulation = modulations[b];
#pragma omp for schedule(static)
            for (int64_t m = 0; m < count; m++) {
                float *own = u + m * dim;
                modulated(h + m * dim, block->gain, block->offset, modulation, 3 * m * dim, own, dim, eps, halves);
                units[m] = rounded(own, first + m * dim, second + m * dim, dim);
            }
#pragma omp for schedule(static)
            for (int64_t start = 0; start < dim; start += STRETCH) {
                const int64_t end = start + STRETCH < dim ? start + STRETCH : dim;
                stretch(block->first, block->first_scale, first, second, units, u, start, end, count, dim, dim);
                for (int64_t m = 0; m < count; m++)
                    for (int64_t row = start; row < end; row++)
                        u[m * dim + row] = silu(u[m * dim + row] + block->first_bias[row]);
            }
#pragma omp for schedule(static)
            for (int64_t m = 0; m < count; m++)
                units[m] = rounded(u + m * dim, first + m * dim, second + m * dim, dim);
#pragma omp for schedule(static)
            for (int64_t start = 0; start < dim; start += STRETCH) {
                const int64_t end = start + STRETCH < dim ? start + STRETCH : dim;
                stretch(block->second, block->second_scale, first, second, units, answer, start, end, count, dim, dim);
                for (int64_t m = 0; m < count; m++)
                    for (int64_t row = start; row < end; row++) {
                        const float gate = read(modulation, (3 * m + 2) * dim + row, halves);
                        h[m * dim + row] += gate * (answer[m * dim + row] + block->second_bias[row]);
                    }
            }
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < count; m++)
            modulated(h + m * dim, 0, 0, modulations[number], 2 * m * dim, u + m * dim, dim, eps, halves);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < token; row++)
            for (int64_t m = 0; m < count; m++) {
                const float value = final_bias[row] + product(final + row * dim, u + m * dim, dim);
                if (halves)
                    ((uint16_t *)out)[m * token + row] = narrow(value);
                else
                    ((float *)out)[m * token + row] = value;
            }
    }
}
