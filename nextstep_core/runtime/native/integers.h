/* Integers times integers on x86 processors with AVX2 or AVX-512: what the products and the flow head have in common.
 *
 * A row of floats is rounded to int8 twice, the second time what the first has left, 254 times finer. The weights are
 * read once for two rows.
 */
#ifndef NEXTSTEP_INTEGERS
#define NEXTSTEP_INTEGERS

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__)
#define BYTES 64 /* in a register */
typedef __m512i ints;
typedef __m512 floats;
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define NOTHING _mm512_setzero_si512()
#define AND _mm512_and_si512
#define ALL8(n) _mm512_set1_epi8((char)(n))
#define ALL32(n) _mm512_set1_epi32(n)
#define RIGHT4(v) _mm512_srli_epi16(v, 4)
#define LEFT16(v) _mm512_slli_epi32(v, 16)
#define FLOATS(v) _mm512_cvtepi32_ps(v)
#define AS_FLOATS(v) _mm512_castsi512_ps(v)
#define ALLF(n) _mm512_set1_ps(n)
#define MUL _mm512_mul_ps
#define FMA _mm512_fmadd_ps
#define SUM(v) _mm512_reduce_add_epi32(v)
#define DOT _mm512_dpbusd_epi32
#define SIGNED_DOT(sum, weight, x) DOT(sum, _mm512_xor_si512(weight, ALL8(-128)), x)
#define SHIFTED 128 /* what a weight is more in it */
#define TOGETHER 2 /* rows of x that go with what is loaded of a matrix */
#else
#define BYTES 32
typedef __m256i ints;
typedef __m256 floats;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define NOTHING _mm256_setzero_si256()
#define AND _mm256_and_si256
#define ALL8(n) _mm256_set1_epi8((char)(n))
#define ALL32(n) _mm256_set1_epi32(n)
#define RIGHT4(v) _mm256_srli_epi16(v, 4)
#define LEFT16(v) _mm256_slli_epi32(v, 16)
#define FLOATS(v) _mm256_cvtepi32_ps(v)
#define AS_FLOATS(v) _mm256_castsi256_ps(v)
#define ALLF(n) _mm256_set1_ps(n)
#define MUL _mm256_mul_ps
#define FMA _mm256_fmadd_ps
static inline int32_t SUM(ints v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#if defined(__AVXVNNI__)
#define DOT _mm256_dpbusd_avx_epi32
#define SIGNED_DOT(sum, weight, x) DOT(sum, _mm256_xor_si256(weight, ALL8(-128)), x)
#define SHIFTED 128
#else /* sums of two products fit into 16 bits: of 15 times 127, and of 128 times 127 */
#define DOT(sum, weight, x) \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, x), _mm256_set1_epi16(1)))
#define SIGNED_DOT(sum, weight, x) DOT(sum, _mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight))
#define SHIFTED 0
#endif
#define TOGETHER 1 /* there are half as many registers, each half as wide */
#endif

#define LANES (BYTES / 4)
#define HEIGHT 4          /* rows of an int8 matrix that go with what is loaded of x */
#define STRETCH 16        /* rows of an int8 matrix that stay in a near cache for the next rows of x */
#define AHEAD_IN_ROWS (HEIGHT * columns) /* bytes of an int8 matrix that are fetched early: in the next rows */
#define TOP 127
#define FINER 254
#define LEAST 1e-30f /* smaller rows count as empty: what brings them to 127 may be more than a float holds */
#define UNROLL _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))

/* bfloat16 is the upper half of a float; on the way to it a number goes to the nearest, of two to the even one. */
INLINE float wide(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* What a row of x, or a group of it, was rounded to: its step, and the sums of both kinds of integers. */
typedef struct {
    float step;
    int32_t sum, finer;
} Rounded;

/* x (columns) as first + second / 254, in units of a step; a step that is no number where one of x is not finite. */
INLINE Rounded rounded(const float *x, int8_t *first, int8_t *second, int64_t columns) {
    int32_t bits, top = 0; /* of floats without their sign, which are in the same order as integers */
    for (int64_t k = 0; k < columns; k++) {
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float most;
    memcpy(&most, &top, 4);
    Rounded found = {most / TOP, 0, 0};
    if (!(most < INFINITY)) {
        memset(first, 0, columns);
        memset(second, 0, columns);
        found.step = NAN;
        return found;
    }
    const float inverse = most > LEAST ? TOP / most : 0;
    for (int64_t k = 0; k < columns; k++) {
        const float scaled = x[k] * inverse, whole = rintf(scaled);
        const int32_t a = (int32_t)whole, b = (int32_t)rintf((scaled - whole) * FINER);
        first[k] = (int8_t)a;
        second[k] = (int8_t)b;
        found.sum += a;
        found.finer += b;
    }
    return found;
}

/* HEIGHT rows of a matrix with `count` rows of x. */
INLINE void int8_rows(const int8_t *weight, const uint16_t *scale, const int8_t *first, const int8_t *second,
                      const Rounded *units, float *out, int64_t rows, int64_t columns, const int count) {
    ints sum[HEIGHT][TOGETHER], finer[HEIGHT][TOGETHER];
    UNROLL for (int r = 0; r < HEIGHT; r++)
        UNROLL for (int m = 0; m < count; m++) sum[r][m] = finer[r][m] = NOTHING;
    for (int64_t k = 0; k < columns; k += BYTES) {
        UNROLL for (int r = 0; r < HEIGHT; r++) {
            const int8_t *own = weight + r * columns + k;
            _mm_prefetch((const char *)own + AHEAD_IN_ROWS, _MM_HINT_T0);
            const ints values = LOAD(own);
            UNROLL for (int m = 0; m < count; m++) {
                sum[r][m] = SIGNED_DOT(sum[r][m], values, LOAD(first + m * columns + k));
                finer[r][m] = SIGNED_DOT(finer[r][m], values, LOAD(second + m * columns + k));
            }
        }
    }
    UNROLL for (int r = 0; r < HEIGHT; r++) {
        const float factor = wide(scale[r]);
        UNROLL for (int m = 0; m < count; m++) {
            const int32_t whole = SUM(sum[r][m]) - SHIFTED * units[m].sum;
            const int32_t rest = SUM(finer[r][m]) - SHIFTED * units[m].finer;
            out[m * rows + r] = ((float)whole + (float)rest / FINER) * factor * units[m].step;
        }
    }
}

/* Rows `start` to `end` of an int8 matrix (rows, columns) with all rows of x. */
static void stretch(const int8_t *weight, const uint16_t *scale, const int8_t *first, const int8_t *second,
                    const Rounded *units, float *out, int64_t start, int64_t end, int64_t count, int64_t rows,
                    int64_t columns) {
    for (int64_t m = 0; m < count; m += TOGETHER)
        for (int64_t row = start; row < end; row += HEIGHT) {
#define SOME(some)                                                                                                 \
    int8_rows(weight + row * columns, scale + row, first + m * columns, second + m * columns, units + m,           \
              out + m * rows + row, rows, columns, some)
            if (count - m < TOGETHER)
                SOME(1);
            else
                SOME(TOGETHER);
#undef SOME
        }
}

#endif
