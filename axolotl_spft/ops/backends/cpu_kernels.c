/* Kernels for CPUs, compiled once for each dtype: -DBFLOAT16 or -DFLOAT32.

   Symbols: a mask is CSR, with `columns` (nnz) of `column_bytes` each and `offsets` (rows + 1). A "run" of a feature is
   its numbers at consecutive tokens. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(BFLOAT16)

typedef uint16_t number;

static inline float widen(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* to the nearest, ties to even, as torch does */
static inline number narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    if (wide != wide) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#elif defined(FLOAT32)

typedef float number;

static inline float widen(number x) { return x; }
static inline number narrow(float wide) { return wide; }

#endif

/* What is small enough for the caches while it is used again: the tokens of a run that are multiplied at a time (the
   columns of a layer then fit the second level), the rows whose runs are collected at a time (the first), and the tokens
   of which a column is copied at a time (rows of x may begin at the same place of the cache, which holds few of them). */
enum { RUN = 2048 / sizeof(number), ROWS = 16, TOKENS = 8, TOGETHER = 8 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t index_at(const int32_t *indices, int64_t at) { return indices ? indices[at] : at; }

static inline int64_t column_at(const void *columns, int column_bytes, int64_t at) {
    return column_bytes == 2 ? ((const uint16_t *)columns)[at] : ((const int32_t *)columns)[at];
}

/* Copy `features` (all of the first `count` where NULL) of x, whose rows are `stride` apart, into runs that are
   `run_stride` apart. */
static inline void collect(const number *x, int64_t tokens, int64_t stride, const int32_t *features, int64_t count,
                           number *runs, int64_t run_stride) {
    for (int64_t start = 0; start < tokens; start += TOKENS) {
        int64_t size = least(TOKENS, tokens - start);
        for (int64_t i = 0; i < count; i++) {
            const number *from = x + start * stride + index_at(features, i);
            number *to = runs + i * run_stride + start;
            if (size == TOKENS)
                for (int t = 0; t < TOKENS; t++) to[t] = from[t * stride];
            else
                for (int t = 0; t < size; t++) to[t] = from[t * stride];
        }
    }
}

void select_columns(const number *x, int64_t tokens, int64_t stride, const int32_t *columns, int64_t count,
                    number *copy, int threads) {
    enum { PART = 8 * TOKENS };
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < tokens; start += PART)
        collect(x + start * stride, least(PART, tokens - start), stride, columns, count, copy + start, tokens);
}

/* The same for round(round(h * scales) * weight), h being float32 with rows of `features`; `weight` (count) is that of
   these columns, and the inner product is rounded where `rounds`. */
void select_normed_columns(const float *h, const float *scales, const float *weight, int rounds, int64_t tokens,
                           int64_t features, const int32_t *columns, int64_t count, number *copy, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < tokens; start += TOKENS) {
        int64_t size = least(TOKENS, tokens - start);
        for (int64_t i = 0; i < count; i++) {
            const float *from = h + start * features + index_at(columns, i);
            number *to = copy + i * tokens + start;
            for (int64_t t = 0; t < size; t++) {
                float normed = from[t * features] * scales[start + t];
                to[t] = narrow((rounds ? widen(narrow(normed)) : normed) * weight[i]);
            }
        }
    }
}

/* Sums, as many as a register holds. */
#if defined(__AVX512F__)

#include <immintrin.h>

enum { LANES = 16 };
typedef __m512 lanes;

static inline float total(lanes sums) { return _mm512_reduce_add_ps(sums); }

#else

#if defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

static inline float total(lanes sums) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

#endif

/* Add the products of STEP numbers of two runs. */
#if defined(BFLOAT16) && defined(__AVX512BF16__)

enum { STEP = 2 * LANES };

static inline lanes add_products(lanes sums, const number *left, const number *right) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(left), (__m512bh)_mm512_loadu_si512(right));
}

#elif defined(BFLOAT16)

enum { STEP = 2 * LANES };

static inline lanes add_products(lanes sums, const number *left, const number *right) {
    typedef uint32_t pairs __attribute__((vector_size(LANES * sizeof(uint32_t))));
    pairs x, y, upper = (pairs){0} + 0xffff0000u;
    memcpy(&x, left, sizeof x);
    memcpy(&y, right, sizeof y);
    sums += (lanes)(x << 16) * (lanes)(y << 16);
    return sums + (lanes)(x & upper) * (lanes)(y & upper);
}

#else

enum { STEP = LANES };

static inline lanes add_products(lanes sums, const number *left, const number *right) {
    lanes x, y;
    memcpy(&x, left, sizeof x);
    memcpy(&y, right, sizeof y);
    return sums + x * y;
}

#endif

/* The dot products of one run and `count` others, `count` being known when this is compiled: several, so that no addition
   waits for the one before it. */
static inline __attribute__((always_inline)) void dots(const number *run, const number *const *others, int count,
                                                       int64_t tokens, float *out) {
    lanes sums[TOGETHER];
    for (int i = 0; i < count; i++) sums[i] = (lanes){0};
    int64_t t = 0;
    for (; t + STEP <= tokens; t += STEP)
        for (int i = 0; i < count; i++) sums[i] = add_products(sums[i], run + t, others[i] + t);
    for (int i = 0; i < count; i++) out[i] = total(sums[i]);
    for (; t < tokens; t++)
        for (int i = 0; i < count; i++) out[i] += widen(run[t]) * widen(others[i][t]);
}

/* out[k] = sum over tokens of grad_y[t, row of k] * kept[column of k][t].

   rows: where the rows of `offsets` stand in grad_y, or NULL; ranks: where a column stands in `kept`, or NULL. */
void sampled_product(const number *grad_y, int64_t tokens, int64_t stride, const int32_t *rows, int64_t n_rows,
                     const int32_t *offsets, const void *columns, int column_bytes, const int32_t *ranks,
                     const number *kept, float *out, int threads) {
    memset(out, 0, offsets[n_rows] * sizeof *out);
#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tokens; start += RUN) {
        int64_t size = least(RUN, tokens - start);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < n_rows; first += ROWS) {
            number runs[ROWS * RUN];
            int64_t n = least(ROWS, n_rows - first);
            if (offsets[first] == offsets[first + n]) continue;
            const number *from = grad_y + start * stride + (rows ? 0 : first);
            collect(from, size, stride, rows ? rows + first : NULL, n, runs, RUN);
            for (int64_t i = 0; i < n; i++) {
                int64_t k = offsets[first + i], end = offsets[first + i + 1];
                while (k < end) {
                    const number *others[TOGETHER];
                    float found[TOGETHER];
                    int count = TOGETHER;
                    while (count > end - k) count /= 2;
                    for (int j = 0; j < count; j++)
                        others[j] = kept + index_at(ranks, column_at(columns, column_bytes, k + j)) * tokens + start;
                    switch (count) {
                        case 8: dots(runs + i * RUN, others, 8, size, found); break;
                        case 4: dots(runs + i * RUN, others, 4, size, found); break;
                        case 2: dots(runs + i * RUN, others, 2, size, found); break;
                        default: dots(runs + i * RUN, others, 1, size, found);
                    }
                    for (int j = 0; j < count; j++) out[k + j] += found[j];
                    k += count;
                }
            }
        }
    }
}

/* weight[mask] += values in the rows from `row` to `stop`, rounded once, keeping what stood there in `originals` unless
   that is NULL; where `values` is NULL the originals are put back. */
static inline void write_rows(number *weight, int64_t row_stride, int64_t column_stride, int64_t row, int64_t stop,
                              const int32_t *offsets, const void *columns, int column_bytes, number *originals,
                              const float *values) {
    for (; row < stop; row++)
        for (int64_t k = offsets[row]; k < offsets[row + 1]; k++) {
            number *entry = weight + row * row_stride + column_at(columns, column_bytes, k) * column_stride;
            if (!values) {
                *entry = originals[k];
                continue;
            }
            number before = *entry;
            if (originals) originals[k] = before;
            *entry = narrow(widen(before) + values[k]);
        }
}

void write_sum(number *weight, int64_t row_stride, int64_t column_stride, int64_t n_rows, const int32_t *offsets,
               const void *columns, int column_bytes, number *originals, const float *values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n_rows; row++)
        write_rows(weight, row_stride, column_stride, row, row + 1, offsets, columns, column_bytes, originals, values);
}

/* The same for many weights: `fields` (of `n_fields` each) and `groups` as ops/sums.py describes them; without their
   values where `restoring`. */
void write_sums(const int64_t *fields, int64_t n_fields, const int32_t *groups, int64_t n_groups, int64_t group_rows,
                int column_bytes, int restoring, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t group = 0; group < n_groups; group++) {
        const int64_t *field = fields + groups[group] * n_fields;
        int64_t row = (group - field[7]) * group_rows;
        write_rows((number *)field[0], field[5], field[6], row, least(row + group_rows, field[8]),
                   (const int32_t *)field[2], (const void *)field[1], column_bytes, (number *)field[3],
                   restoring ? NULL : (const float *)field[4]);
    }
}
