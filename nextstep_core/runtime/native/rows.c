/* Products of a few rows with int8 and int4 matrices, for x86 processors with AVX2 or AVX-512.
 *
 * The weights are read once for two rows and stay in a near cache for the next two. Integers are multiplied: each row
 * is rounded to int8 twice, the second time what the first has left, 254 times finer. Compiled on the machine where it
 * runs, for the processor that it has.
 */
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
#define BLOCK (4 * LANES) /* rows of an int4 matrix whose values lie together */
#define HEIGHT 4          /* rows of an int8 matrix that go with what is loaded of x */
#define STRETCH 16        /* rows of an int8 matrix that stay in a near cache for the next rows of x */
#define AHEAD 8192        /* bytes of an int4 matrix that are fetched before they are needed; faster than 512 to 4096 */
#define AHEAD_IN_ROWS (HEIGHT * columns) /* the same of an int8 matrix: in the next rows */
#define TOP 127
#define FINER 254
const int64_t nextstep_block = BLOCK;

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
    const float inverse = found.step > 0 ? TOP / most : 0;
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

/* Of four columns of a block, which lie one after the other, the bytes of a row side by side: the first LANES of the
 * bytes of each column, and the others. */
INLINE void transposed(const uint8_t *columns, ints *near, ints *far) {
    const ints a = LOAD(columns), b = LOAD(columns + BYTES);
#if BYTES == 64 && defined(__AVX512VBMI__)
    static const uint8_t index[128] = {
#define ROW(r) (r), 32 + (r), 64 + (r), 96 + (r)
        ROW(0),  ROW(1),  ROW(2),  ROW(3),  ROW(4),  ROW(5),  ROW(6),  ROW(7),  ROW(8),  ROW(9),  ROW(10),
        ROW(11), ROW(12), ROW(13), ROW(14), ROW(15), ROW(16), ROW(17), ROW(18), ROW(19), ROW(20), ROW(21),
        ROW(22), ROW(23), ROW(24), ROW(25), ROW(26), ROW(27), ROW(28), ROW(29), ROW(30), ROW(31)};
    *near = _mm512_permutex2var_epi8(a, LOAD(index), b);
    *far = _mm512_permutex2var_epi8(a, LOAD(index + 64), b);
#elif BYTES == 64
    const ints low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
    const ints pairs = _mm512_broadcast_i32x4(_mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0));
    const ints first = _mm512_set_epi64(13, 9, 12, 8, 5, 1, 4, 0), second = _mm512_set_epi64(15, 11, 14, 10, 7, 3, 6, 2);
    *near = _mm512_shuffle_epi8(_mm512_permutex2var_epi64(low, first, high), pairs);
    *far = _mm512_shuffle_epi8(_mm512_permutex2var_epi64(low, second, high), pairs);
#else
    const ints low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    const ints pairs = _mm256_broadcastsi128_si256(_mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0));
    *near = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(low, 0xd8), pairs);
    *far = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(high, 0xd8), pairs);
#endif
}

/* A block of a matrix with `count` rows of x. */
INLINE void int4_block(const uint8_t *weight, const uint32_t *scale, const int8_t *first, const int8_t *second,
                       const Rounded *units, float *out, int64_t rows, int64_t columns, int64_t group, const int count) {
    const int64_t groups = columns / group;
    floats total[TOGETHER][4];
    UNROLL for (int m = 0; m < count; m++) UNROLL for (int r = 0; r < 4; r++) total[m][r] = ALLF(0);
    for (int64_t g = 0; g < groups; g++) {
        ints sum[TOGETHER][4], finer[TOGETHER][4];
        UNROLL for (int m = 0; m < count; m++) UNROLL for (int r = 0; r < 4; r++) sum[m][r] = finer[m][r] = NOTHING;
        for (int64_t k = g * group; k < (g + 1) * group; k += 4) {
            const uint8_t *own = weight + k * BYTES / 2;
            _mm_prefetch((const char *)own + AHEAD, _MM_HINT_T0);
            if (BYTES == 64) _mm_prefetch((const char *)own + AHEAD + 64, _MM_HINT_T0);
            ints near, far;
            transposed(own, &near, &far);
            const ints values[4] = {AND(near, ALL8(15)), AND(far, ALL8(15)), AND(RIGHT4(near), ALL8(15)),
                                    AND(RIGHT4(far), ALL8(15))};
            UNROLL for (int m = 0; m < count; m++) {
                int32_t four, finer_four;
                memcpy(&four, first + m * columns + k, 4);
                memcpy(&finer_four, second + m * columns + k, 4);
                UNROLL for (int r = 0; r < 4; r++) {
                    sum[m][r] = DOT(sum[m][r], values[r], ALL32(four));
                    finer[m][r] = DOT(finer[m][r], values[r], ALL32(finer_four));
                }
            }
        }
        UNROLL for (int r = 0; r < 4; r++) {
            /* bfloat16: the scale in the lower half, the zero in the upper; a value is (q - 8) * scale + zero */
            const ints pair = LOAD(scale + g * rows + r * LANES);
            const floats factor = AS_FLOATS(LEFT16(pair)), zero = AS_FLOATS(AND(pair, ALL32((int32_t)0xffff0000)));
            const floats offset = FMA(ALLF(-8), factor, zero);
            UNROLL for (int m = 0; m < count; m++) {
                const floats whole = FMA(FLOATS(finer[m][r]), ALLF(1.0f / FINER), FLOATS(sum[m][r]));
                const Rounded unit = units[m * groups + g];
                const float all = (unit.sum + (float)unit.finer / FINER) * unit.step;
                total[m][r] = FMA(whole, MUL(factor, ALLF(unit.step)), FMA(offset, ALLF(all), total[m][r]));
            }
        }
    }
    UNROLL for (int m = 0; m < count; m++)
        UNROLL for (int r = 0; r < 4; r++) STOREF(out + m * rows + r * LANES, total[m][r]);
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

/* x and out as floats, which the products take: themselves, or a place in `room` where they are bfloat16. */
typedef struct {
    const float *x;
    float *out;
    void *room; /* what is left of it, at a multiple of 64 bytes */
} Floats;

static Floats floats_of(const void *x, void *out, char *room, int64_t columns, int64_t rows, int64_t halves) {
    if (!halves) return (Floats){x, out, room};
    float *own = (float *)room, *result = own + columns;
    for (int64_t k = 0; k < columns; k++) own[k] = wide(((const uint16_t *)x)[k]);
    return (Floats){own, result, room + (4 * (columns + rows) + 63) / 64 * 64};
}

static void give_back(const Floats *floats, uint16_t *out, int64_t rows, int64_t halves) {
    if (!halves) return;
    for (int64_t r = 0; r < rows; r++) out[r] = narrow(floats->out[r]);
}

/* out (count, rows) = x (count, columns) times an int4 matrix: weight (rows / BLOCK, columns, BLOCK / 2), a byte's low
 * half being of the first BLOCK / 2 rows; scale (groups, rows, 2) as bfloat16: scales and zeros. x and out are floats,
 * or bfloat16 where there are `halves`. `rows` is a multiple of BLOCK, `group` of 4. `room`, at a multiple of 64 bytes,
 * holds count * (6 * columns + 4 * rows + 12 * columns / group) + 64. */
void nextstep_int4(const uint8_t *weight, const uint32_t *scale, const void *x, void *out, char *room, int64_t count,
                   int64_t rows, int64_t columns, int64_t threads, int64_t halves, int64_t group) {
    const int64_t groups = columns / group;
    const Floats f = floats_of(x, out, room, count * columns, count * rows, halves);
    int8_t *first = f.room, *second = first + count * columns;
    Rounded *units = (Rounded *)(second + count * columns);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t g = 0; g < count * groups; g++)
            units[g] = rounded(f.x + g * group, first + g * group, second + g * group, group);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += BLOCK)
            for (int64_t m = 0; m < count; m += TOGETHER) {
#define SOME(some)                                                                                                   \
    int4_block(weight + row * columns / 2, scale + row, first + m * columns, second + m * columns, units + m * groups, \
               f.out + m * rows + row, rows, columns, group, some)
                if (count - m < TOGETHER)
                    SOME(1);
                else
                    SOME(TOGETHER);
#undef SOME
            }
    }
    give_back(&f, out, count * rows, halves);
}

/* The same with an int8 matrix: weight (rows, columns), scale (rows) as bfloat16. `columns` is a multiple of BYTES,
 * `rows` of HEIGHT. `room` holds count * (6 * columns + 4 * rows + 12) + 64 bytes. */
void nextstep_int8(const int8_t *weight, const uint16_t *scale, const void *x, void *out, char *room, int64_t count,
                   int64_t rows, int64_t columns, int64_t threads, int64_t halves) {
    const Floats f = floats_of(x, out, room, count * columns, count * rows, halves);
    int8_t *first = f.room, *second = first + count * columns;
    Rounded *units = (Rounded *)(second + count * columns);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < count; m++)
            units[m] = rounded(f.x + m * columns, first + m * columns, second + m * columns, columns);
#pragma omp for schedule(static)
        for (int64_t start = 0; start < rows; start += STRETCH)
            for (int64_t m = 0; m < count; m += TOGETHER)
                for (int64_t row = start; row < rows && row < start + STRETCH; row += HEIGHT) {
#define SOME(some)                                                                                        \
    int8_rows(weight + row * columns, scale + row, first + m * columns, second + m * columns, units + m, \
              f.out + m * rows + row, rows, columns, some)
                    if (count - m < TOGETHER)
                        SOME(1);
                    else
                        SOME(TOGETHER);
#undef SOME
                }
    }
    give_back(&f, out, count * rows, halves);
}
