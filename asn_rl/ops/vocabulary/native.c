/* Passes over the vocabulary on a CPU: row after row, read from memory once and from the cache after that.
 *
 * A token below the head belongs to the half-octave h with from[h] <= logit - v < from[h + 1]. `from` (257 floats) is the
 * caller's, so that every implementation puts every token into the same one; those below
 * NOTHING hold no probability.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 1024
#define CHUNK 64
#define OCTAVES 256
#define NOTHING 2
#define COPIES 4
#define FLOOR_NATS -88.0f
#define OCTAVE_SHIFT 22
#define INSIDE ((1u << OCTAVE_SHIFT) - 1)
#define SLACK 16 /* ulp by which two implementations of exp may differ */

typedef struct { double mass, shifted; } Sum;

/* exp on [-88, 0], relative error below 2e-7: Cody and Waite's reduction, then the Taylor polynomial. 0 below 2^-126. */
static inline float exp_nats(float x) {
    float k = rintf(x * 1.44269504088896341f);
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = ((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* logit - v, its exponential and the half-octave; head tokens and impossible ones are nothing. */
static void weigh(const float *x, int64_t n, float v, const float *from, float *restrict shift, float *restrict weight,
                  int32_t *restrict octave) {
    int32_t near = 0;
#pragma omp simd reduction(| : near)
    for (int64_t i = 0; i < n; i++) {
        float s = x[i] - v;
        s = x[i] <= v ? s : FLOOR_NATS;
        s = s > FLOOR_NATS ? s : FLOOR_NATS;
        float w = exp_nats(s);
        uint32_t bits;
        memcpy(&bits, &w, 4);
        shift[i] = s;
        weight[i] = w;
        octave[i] = (int32_t)(bits >> OCTAVE_SHIFT);
        int32_t edge = ((bits + SLACK) & INSIDE) <= 2 * SLACK;
        near |= s > FLOOR_NATS ? edge : 0;
    }
    if (!near) return;
    for (int64_t i = 0; i < n; i++) {
        while (shift[i] < from[octave[i]]) octave[i]--;
        while (shift[i] >= from[octave[i] + 1]) octave[i]++;
    }
}

static inline int precedes(float a, int64_t i, float b, int64_t j) { return a > b || (a == b && i < j); }

/* Restore a heap whose root is the last in order. */
static void sift(float *value, int64_t *id, int64_t n) {
    for (int64_t at = 0;;) {
        int64_t last = at;
        for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < n; child++)
            if (precedes(value[last], id[last], value[child], id[child])) last = child;
        if (last == at) return;
        float v = value[at];
        value[at] = value[last];
        value[last] = v;
        int64_t i = id[at];
        id[at] = id[last];
        id[last] = i;
        at = last;
    }
}

static void empty_heap(float *value, int64_t *id, int64_t k) {
    for (int64_t i = 0; i < k; i++) {
        value[i] = -INFINITY;
        id[i] = INT64_MAX;
    }
}

static void offer(float x, int64_t i, float *value, int64_t *id, int64_t k) {
    if (!(x > value[0])) return;
    value[0] = x;
    id[0] = i;
    sift(value, id, k);
}

/* The largest value; `nan` is set where one is not a number. */
static float peak_of(const float *x, int64_t n, int32_t *nan) {
    float peak = -INFINITY;
    int32_t bad = 0;
#pragma omp simd reduction(max : peak) reduction(| : bad)
    for (int64_t i = 0; i < n; i++) {
        bad |= x[i] != x[i];
        peak = x[i] > peak ? x[i] : peak;
    }
    *nan |= bad;
    return peak;
}

/* The k largest in descending order, of equals the first; the first is NaN where the row holds one. The k-th largest peak
 * of the chunks bounds the k-th largest value from below, so that few chunks are looked into. */
static void largest(const float *x, int64_t vocab, int64_t k, float *peaks, float *value, int64_t *id) {
    int32_t nan = 0;
    empty_heap(value, id, k);
    for (int64_t start = 0, c = 0; start < vocab; start += CHUNK, c++) {
        peaks[c] = start + CHUNK <= vocab ? peak_of(x + start, CHUNK, &nan) : peak_of(x + start, vocab - start, &nan);
        offer(peaks[c], c, value, id, k);
    }
    float bound = value[0];
    empty_heap(value, id, k);
    for (int64_t start = 0, c = 0; start < vocab; start += CHUNK, c++) {
        if (peaks[c] < bound || !(peaks[c] > value[0])) continue;
        int64_t end = vocab - start < CHUNK ? vocab : start + CHUNK;
        for (int64_t i = start; i < end; i++)
            if (x[i] >= bound) offer(x[i], i, value, id, k);
    }
    for (int64_t n = k - 1; n > 0; n--) {
        float v = value[0];
        value[0] = value[n];
        value[n] = v;
        int64_t i = id[0];
        id[0] = id[n];
        id[n] = i;
        sift(value, id, n);
    }
    for (int64_t i = 0; i < k; i++)
        if (value[i] == -INFINITY) id[i] = 0;
    if (nan) value[0] = NAN;
}

/* A row as floats: as it lies there, or widened from bfloat16 into `scratch`. */
static const float *as_floats(const void *rows, int64_t stride, int64_t row, int64_t vocab, int bf16, float *scratch) {
    if (!bf16) return (const float *)rows + row * stride;
    const uint16_t *x = (const uint16_t *)rows + row * stride;
    for (int64_t i = 0; i < vocab; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(scratch + i, &bits, 4);
    }
    return scratch;
}

static inline int64_t block_size(int64_t start, int64_t vocab) { return vocab - start < BLOCK ? vocab - start : BLOCK; }

/* top (count, k), ids (count, k), sums (count, 3, bins): tokens, mass relative to v = top[k - 1], mass times shift. */
void summarise(const void *rows, int bf16, int64_t stride, int64_t count, int64_t vocab, int64_t k, int64_t bins,
               const float *from, float *scratch, const int32_t *bin_of, float *top, int64_t *ids, double *sums) {
    float shift[BLOCK], weight[BLOCK];
    int32_t octave[BLOCK];
    for (int64_t row = 0; row < count; row++) {
        const float *x = as_floats(rows, stride, row, vocab, bf16, scratch);
        largest(x, vocab, k, scratch + vocab, top + row * k, ids + row * k);
        double *out = sums + row * 3 * bins;
        memset(out, 0, 3 * bins * sizeof(double));
        float v = top[(row + 1) * k - 1];
        if (v == -INFINITY) continue;
        Sum sum[COPIES][OCTAVES]; /* neighbours add to different copies, so that no addition waits for another */
        int32_t tokens[COPIES][OCTAVES];
        memset(sum, 0, sizeof sum);
        memset(tokens, 0, sizeof tokens);
        for (int64_t start = 0; start < vocab; start += BLOCK) {
            int64_t n = block_size(start, vocab);
            weigh(x + start, n, v, from, shift, weight, octave);
            for (; n % COPIES; n++) octave[n] = weight[n] = shift[n] = 0;
            for (int64_t i = 0; i < n; i += COPIES)
                for (int copy = 0; copy < COPIES; copy++) {
                    int32_t h = octave[i + copy];
                    double w = weight[i + copy];
                    sum[copy][h].mass += w;
                    sum[copy][h].shifted += w * shift[i + copy];
                    tokens[copy][h]++;
                }
        }
        for (int copy = 0; copy < COPIES; copy++)
            for (int h = NOTHING; h < OCTAVES; h++) {
                out[bin_of[h]] += tokens[copy][h];
                out[bins + bin_of[h]] += sum[copy][h].mass;
                out[2 * bins + bin_of[h]] += sum[copy][h].shifted;
            }
    }
}

/* out (count, vocab) = logit + by[row][half-octave]. `out` may be the rows themselves. */
void move(const void *rows, int bf16, int64_t stride, int64_t count, int64_t vocab, const float *from, float *scratch,
          const float *boundary, const float *by, float *out) {
    float shift[BLOCK], weight[BLOCK];
    int32_t octave[BLOCK];
    for (int64_t row = 0; row < count; row++) {
        const float *x = as_floats(rows, stride, row, vocab, bf16, scratch), *table = by + row * OCTAVES;
        float v = boundary[row] > -INFINITY ? boundary[row] : INFINITY;
        for (int64_t start = 0; start < vocab; start += BLOCK) {
            int64_t n = block_size(start, vocab);
            weigh(x + start, n, v, from, shift, weight, octave);
            for (int64_t i = 0; i < n; i++) out[row * vocab + start + i] = x[start + i] + table[octave[i]];
        }
    }
}

/* Adds up the weights of the half-octaves [low, high) in a block, from `seen` on, until more than `goal` is reached.
 * `last` is the last of its tokens that was added. */
static double accumulate(const float *x, int64_t start, int64_t vocab, float v, const float *from, int32_t low,
                         int32_t high, double seen, double goal, int64_t *last) {
    float shift[BLOCK], weight[BLOCK];
    int32_t octave[BLOCK];
    int64_t n = block_size(start, vocab);
    weigh(x + start, n, v, from, shift, weight, octave);
    for (int64_t i = 0; i < n && seen <= goal; i++)
        if (octave[i] >= low && octave[i] < high) {
            seen += weight[i];
            *last = start + i;
        }
    return seen;
}

/* ids (count): a token of the half-octaves [low, high) of each row, by inverting the cumulative mass at u in [0, 1);
 * 0 where there are none. */
void draw(const void *rows, int bf16, int64_t stride, int64_t count, int64_t vocab, const float *from, float *scratch,
          const float *boundary, const int32_t *low, const int32_t *high, const double *u, int64_t *ids) {
    double *reached = (double *)(scratch + vocab + vocab % 2);
    for (int64_t row = 0; row < count; row++) {
        ids[row] = 0;
        if (low[row] >= high[row]) continue;
        const float *x = as_floats(rows, stride, row, vocab, bf16, scratch);
        double total = 0;
        int64_t blocks = 0;
        for (int64_t start = 0; start < vocab; start += BLOCK)
            reached[blocks++] = total =
                accumulate(x, start, vocab, boundary[row], from, low[row], high[row], total, INFINITY, ids + row);
        double goal = u[row] * total;
        if (goal >= total) continue; /* rounded up: the last token that adds weight */
        int64_t at = 0;
        while (reached[at] <= goal) at++;
        accumulate(x, at * BLOCK, vocab, boundary[row], from, low[row], high[row], at ? reached[at - 1] : 0, goal,
                   ids + row);
    }
}
