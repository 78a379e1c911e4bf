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

/* The dot products of one run and `count` others, `count` being known when this is compiled. */
#if defined(BFLOAT16) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

static inline __attribute__((always_inline)) void dots(const number *run, const number *const *others, int count,
                                                       int64_t tokens, float *out) {
    __m512 sums[TOGETHER];
    for (int i = 0; i < count; i++) sums[i] = _mm512_setzero_ps();
    int64_t t = 0;
    for (; t + 32 <= tokens; t += 32) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(run + t);
        for (int i = 0; i < count; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], left, (__m512bh)_mm512_loadu_si512(others[i] + t));
    }
    if (t < tokens) {
        __mmask32 rest = (1u << (tokens - t)) - 1;
        __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(rest, run + t);
        for (int i = 0; i < count; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], left, (__m512bh)_mm512_maskz_loadu_epi16(rest, others[i] + t));
    }
    for (int i = 0; i < count; i++) out[i] = _mm512_reduce_add_ps(sums[i]);
}

#else

static inline __attribute__((always_inline)) void dots(const number *run, const number *const *others, int count,
                                                       int64_t tokens, float *out) {
    for (int i = 0; i < count; i++) {
        const number *other = others[i];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < tokens; t++) sum += widen(run[t]) * widen(other[t]);
        out[i] = sum;
    }
}

#endif

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
                    int count = end - k < TOGETHER ? 1 : TOGETHER;
                    for (int j = 0; j < count; j++)
                        others[j] = kept + index_at(ranks, column_at(columns, column_bytes, k + j)) * tokens + start;
                    if (count == TOGETHER)
                        dots(runs + i * RUN, others, TOGETHER, size, found);
                    else
                        dots(runs + i * RUN, others, 1, size, found);
                    for (int j = 0; j < count; j++) out[k + j] += found[j];
                    k += count;
                }
            }
        }
    }
}

/* weight[mask] = before + values in the rows from `row` to `stop`, rounded once; `before` is the weight itself where
   NULL. */
static inline void write_rows(number *weight, int64_t row_stride, int64_t column_stride, int64_t row, int64_t stop,
                              const int32_t *offsets, const void *columns, int column_bytes, const number *before,
                              const float *values) {
    for (; row < stop; row++)
        for (int64_t k = offsets[row]; k < offsets[row + 1]; k++) {
            number *entry = weight + row * row_stride + column_at(columns, column_bytes, k) * column_stride;
            *entry = narrow(widen(before ? before[k] : *entry) + values[k]);
        }
}

void write_sum(number *weight, int64_t row_stride, int64_t column_stride, int64_t n_rows, const int32_t *offsets,
               const void *columns, int column_bytes, const number *before, const float *values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n_rows; row++)
        write_rows(weight, row_stride, column_stride, row, row + 1, offsets, columns, column_bytes, before, values);
}

/* The same for many weights: `fields` (of `n_fields` each) and `groups` as ops/sums.py describes them. */
void write_sums(const int64_t *fields, int64_t n_fields, const int32_t *groups, int64_t n_groups, int64_t group_rows,
                int column_bytes, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t group = 0; group < n_groups; group++) {
        const int64_t *field = fields + groups[group] * n_fields;
        int64_t row = (group - field[7]) * group_rows;
        write_rows((number *)field[0], field[5], field[6], row, least(row + group_rows, field[8]),
                   (const int32_t *)field[2], (const void *)field[1], column_bytes, (const number *)field[3],
                   (const float *)field[4]);
    }
}
