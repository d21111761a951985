/* Products of a few rows with int8 and int4 matrices. A matrix stays in a near cache for the rows after the first two.
 *
 * Compiled on the machine where it runs, for the processor that it has.
 */
#include "integers.h"

#define BLOCK (4 * LANES) /* rows of an int4 matrix whose values lie together */
#define AHEAD 8192        /* bytes of an int4 matrix that are fetched before they are needed; faster than 512 to 4096 */

const int64_t nextstep_block = BLOCK;

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
        for (int64_t start = 0; start < rows; start += STRETCH) {
            const int64_t end = start + STRETCH < rows ? start + STRETCH : rows;
            stretch(weight, scale, first, second, units, f.out, start, end, count, rows, columns);
        }
    }
    give_back(&f, out, count * rows, halves);
}
