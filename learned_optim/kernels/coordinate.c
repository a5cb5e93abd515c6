/* The passes of the update rule over coordinates, in place; `learned_optim/rule.py` says what they compute.
 *
 * A caller describes its tensors in a table and cuts them into blocks. Any number of threads may run one pass together: each takes the next
 * block until none is left. A block's sums have places of their own, so the result does not depend on which thread took it.
 *
 * There is no libm here but for the square root, which is an instruction. Loops marked `omp simd` do one coordinate an iteration; the
 * compiler turns them into vector code, once for each instruction set that is worth it.
 */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU /* NEON is there on every 64-bit ARM; elsewhere the compiler's flags decide */
#endif
#define INLINE static inline __attribute__((always_inline))

/* CHUNK: coordinates whose intermediate results fit into the L1 cache, and that share a scale in int8. */
enum { CHUNK = 256, MAX_UNITS = 8, ODD = 2, EVEN = 3 };

/* What the second pass needs to know of each tensor: see `scalars` in `learned_optim/kernels/__init__.py`. */
enum { INVERSE1, INVERSE2, MEAN, SCALARS };

/* What a tensor has once, as in `Control` of `learned_optim/rule.py`. */
enum { STEP, CONTROL = 6 };

/* The bits of 2^64, the least number whose square is none. */
static const uint32_t TOO_LARGE = 0x5f800000u;

/* Formats of stored state, as in `learned_optim/storage.py`. */
enum { FLOAT32, BFLOAT16, INT8 };

/* Constants of `learned_optim/features.py` and `learned_optim/rule.py`. */
static const float RELATIVE_FLOOR = 1e-8f, ABSOLUTE_FLOOR = 1e-20f, GRADIENT_BOUND = 3.0f;

/* Every field has 8 bytes, so that the caller may fill the table with integers. */
typedef struct {
    int64_t size;
    /* Where coordinates lie in the whole tensor, of which this may be a part: in stretches of `width`, the first one at `first`, each
     * `pitch` after the last. */
    int64_t first, width, pitch;
    float *param; /* none where it is not fp32 or has gaps */
    const float *grad;
    float *direction;
    float *control; /* (CONTROL,) */
    void *moments;     /* (2, size): momentum and second moment */
    void *lstm;        /* (2 * units, size): hidden units, then cells */
    float *lstm_scale; /* (2 * units, chunks of size), of int8 */
} Tensor;

typedef struct {
    int64_t tensor, begin, end;
} Block;

/* What all passes have in common. */
typedef struct {
    const Tensor *tensors;
    const Block *blocks;
    int64_t count; /* of blocks */
    int64_t next;  /* the first block that no thread has taken */
    double *sums;  /* (count, sums of the pass) */
    int64_t moment_format, lstm_format;
} Job;

typedef struct {
    int64_t units;
    const float *gate_weight, *gate_bias, *candidate_weight, *skip, *out; /* as in `learned_optim/network.py` */
} Network;

/* The index of a block that is now the caller's. */
static int64_t take(Job *job) { return __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED); }

/* What the caller will probably need after the chunk at `begin`: the block's next one, or the first of the block that it will take; nothing
 * at the end. Each pass has it fetched early, since a processor cannot guess where the next small tensor lies, and even in a large one it
 * loses track of the dozen places where something is kept of each coordinate. */
typedef struct {
    const Tensor *tensor;
    int64_t begin, n;
} Next;

INLINE Next after(const Job *job, const Block *block, int64_t begin) {
    int64_t end = block->end;
    begin += CHUNK;
    if (begin >= end) {
        const int64_t next = __atomic_load_n(&job->next, __ATOMIC_RELAXED);
        if (next < job->count) block = &job->blocks[next], begin = block->begin, end = block->end;
        else begin = end;
    }
    return (Next){&job->tensors[block->tensor], begin, end - begin < CHUNK ? end - begin : CHUNK};
}

/* Compiled to an instruction each. NaN may get lost here; it stays in the moments and in the direction. */
INLINE float at_most(float x, float bound) { return x > bound ? bound : x; }
INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bits of the larger size. Those of NaN and infinity are larger than of any number, which the compiler, told that there are none, cannot
 * see. */
INLINE uint32_t larger(uint32_t bits, float value) {
    const uint32_t others = float_to_bits(value) & 0x7fffffffu;
    return others > bits ? others : bits;
}

/* 2^x for |x| <= 40, and 2^40 or 2^-40 beyond, so that products of three stay finite; relative error 3e-6.
 *
 * Adding 1.5 * 2^23 + 127 rounds x to an integer and leaves it, with the exponent's bias, in the lowest bits. The polynomial is the minimax
 * fit on [-1/2, 1/2]. */
INLINE float exp2_bounded(float x) {
    const float magic = 12583039.0f;
    x = at_least(at_most(x, 40.0f), -40.0f);
    float shifted = x + magic;
    float r = x - (shifted - magic);
    float power = 9.570102e-3f;
    power = power * r + 5.5917863e-2f;
    power = power * r + 2.40247448e-1f;
    power = power * r + 6.93121814e-1f;
    power = power * r + 9.99999261e-1f;
    return power * bits_to_float(float_to_bits(shifted) << 23);
}

/* ln x of a normal number, absolute error 1e-7 for x near 1 and relative error 2e-7 elsewhere; minimax fit on [sqrt(1/2), sqrt(2)]. */
INLINE float log_normal(float x) {
    uint32_t bits = float_to_bits(x) - 0x3f3504f3u; /* of sqrt(1/2) */
    float exponent = (float)((int32_t)bits >> 23);
    float r = bits_to_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float slope = -1.0102293e-1f;
    slope = slope * r + 1.6420090e-1f;
    slope = slope * r - 1.7333487e-1f;
    slope = slope * r + 1.9873035e-1f;
    slope = slope * r - 2.4959341e-1f;
    slope = slope * r + 3.3336183e-1f;
    slope = slope * r - 5.0000668e-1f;
    slope = slope * r + 9.9999982e-1f;
    return exponent * 0.69314718f + slope * r;
}

/* Makes a sum NaN. */
INLINE void poison(double *sum) {
    const uint64_t bits = 0x7ff8000000000000u;
    memcpy(sum, &bits, sizeof bits);
}

typedef struct {
    float numerator, denominator;
} Ratio;

/* tanh as a ratio, so that its division can be shared; odd to the last bit, relative error 2e-6; minimax fit on [0, 7]. */
INLINE Ratio tanh_ratio(float x) {
    x = at_least(at_most(x, 7.0f), -7.0f);
    float s = x * x;
    float p = 3.995905259e-6f;
    p = p * s + 2.293097681e-3f;
    p = p * s + 1.232206542e-1f;
    p = p * s + 9.999989669e-1f;
    float q = 1.439853416e-4f;
    q = q * s + 2.115165731e-2f;
    q = q * s + 4.565462535e-1f;
    q = q * s + 1.0f;
    return (Ratio){x * p, q};
}

/* The number of this file's interface, for the caller to check that it was written for it. Raise it with each change of a struct,
 * or of what a pass is given. */
int64_t interface(void) { return 15; }

/* What each of `count` tensors has once, into rows for torch to compute with, and back. */
void gather(const Tensor *tensors, int64_t count, float *rows) {
    for (int64_t k = 0; k < count; k++) {
        for (int64_t i = 0; i < CONTROL; i++) rows[i * count + k] = tensors[k].control[i];
    }
}

void scatter(const Tensor *tensors, int64_t count, const float *rows) {
    for (int64_t k = 0; k < count; k++) {
        for (int64_t i = 0; i < CONTROL; i++) tensors[k].control[i] = rows[i * count + k];
    }
}

/* See `scatter_bits` in `learned_optim/storage.py`. */
INLINE uint32_t scatter_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* The place in the whole tensor of a coordinate. */
INLINE int64_t place_of(const Tensor *tensor, int64_t j) { return tensor->first + j / tensor->width * tensor->pitch + j % tensor->width; }

/* Random bits for the `n` coordinates of a chunk: see `random_bits` in `learned_optim/storage.py`. */
INLINE void random_bits(uint32_t *restrict bits, const Tensor *tensor, int64_t begin, int64_t n, float step) {
    const uint32_t of_step = (uint32_t)(int64_t)step * 0x85ebca6bu;
    for (int64_t done = 0; done < n;) { /* mostly once: stretches are seldom shorter than a chunk */
        const int64_t left = tensor->width - (begin + done) % tensor->width;
        const uint32_t first = (uint32_t)place_of(tensor, begin + done) * 0x9e3779b1u + of_step, count = left < n - done ? left : n - done;
#pragma omp simd
        for (uint32_t j = 0; j < count; j++) bits[done + j] = scatter_bits(first + j * 0x9e3779b1u);
        done += count;
    }
}

/* Where to compute with what is stored from `begin` on: right there if it is fp32, else in `scratch`. */
INLINE float *place(int64_t format, void *stored, int64_t begin, float *scratch) {
    return format == FLOAT32 ? (float *)stored + begin : scratch;
}

/* The `n` values that are stored from `begin` on, at the start of a chunk. */
INLINE void load(int64_t format, const void *stored, const float *scale, int64_t begin, int64_t n, float *values) {
    if (format == FLOAT32) {
        const float *exact = (const float *)stored + begin;
        if (values != exact) memcpy(values, exact, n * sizeof *values);
    } else if (format == BFLOAT16) {
        const uint16_t *restrict halves = (const uint16_t *)stored + begin;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) values[j] = bits_to_float((uint32_t)halves[j] << 16);
    } else {
        const int8_t *restrict levels = (const int8_t *)stored + begin;
        const float unit = *scale;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) values[j] = (float)levels[j] * unit;
    }
}

/* Has the caches fetch the next chunk of what is stored in a row of a tensor. */
INLINE void prefetch(int64_t format, const void *stored, int64_t row, Next next) {
    const int64_t width = format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1;
    const char *first = (const char *)stored + width * (row * next.tensor->size + next.begin);
    for (int64_t byte = 0; byte < width * next.n; byte += 64) __builtin_prefetch(first + byte);
}

/* Stores values, rounded stochastically by the 16 bits of `bits` above `shift`. */
INLINE void store(int64_t format, void *stored, float *scale, int64_t begin, int64_t n, const float *values,
                  const uint32_t *restrict bits, const int shift) {
    if (format == FLOAT32) {
        float *exact = (float *)stored + begin;
        if (values != exact) memcpy(exact, values, n * sizeof *values);
    } else if (format == BFLOAT16) {
        uint16_t *restrict halves = (uint16_t *)stored + begin;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            uint32_t exact = float_to_bits(values[j]);
            uint32_t rounded = exact + (((bits[j] >> shift) & 0xffffu) & ((exact & 0x7f800000u) == 0x7f800000u ? 0u : ~0u));
            halves[j] = (uint16_t)(rounded >> 16);
        }
    } else {
        int8_t *restrict levels = (int8_t *)stored + begin;
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < n; j++) largest = at_least(largest, __builtin_fabsf(values[j]));
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        *scale = largest / 127.0f;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) { /* conversion to an integer cuts off, so it must see positive numbers */
            float uniform = (float)((bits[j] >> shift) & 0xffffu) * 0x1p-16f;
            levels[j] = (int8_t)((int32_t)(values[j] * inverse + 128.0f + uniform) - 128);
        }
    }
}

/* Whether what a tensor has once are numbers that steps leave there: finite, their squares too, and a clock that is not negative. */
INLINE int is_sound(const float *control) {
    uint32_t worst = 0;
    for (int64_t i = 0; i < CONTROL; i++) worst = larger(worst, control[i]);
    return worst < TOO_LARGE && control[STEP] >= 0;
}

/* Sums of step 1 of the rule: of squared gradients, of squared momenta before, of their products, and of new second moments. The last one
 * is NaN where one of these is negative, or something is wrong with what the tensor has once. Nothing is written yet, so that a tensor whose
 * sums are not finite may be left as it is; the second pass does. */
EACH_CPU void moments(Job *job, float decay2) {
    const int64_t format = job->moment_format;
    float scratch[2][CHUNK];
    for (int64_t b; (b = take(job)) < job->count;) {
        const Block *block = &job->blocks[b];
        const Tensor *tensor = &job->tensors[block->tensor];
        double *sums = job->sums + 4 * b;
        float least = 0;
        memset(sums, 0, 4 * sizeof *sums);
        for (int64_t begin = block->begin; begin < block->end; begin += CHUNK) {
            const int64_t n = block->end - begin < CHUNK ? block->end - begin : CHUNK;
            const float *restrict grad = tensor->grad + begin;
            const Next next = after(job, block, begin);
            prefetch(FLOAT32, next.tensor->grad, 0, next);
            prefetch(format, next.tensor->moments, 0, next);
            prefetch(format, next.tensor->moments, 1, next);
            float *momentum = place(format, tensor->moments, begin, scratch[0]);
            float *second_moment = place(format, tensor->moments, tensor->size + begin, scratch[1]);
            load(format, tensor->moments, 0, begin, n, momentum);
            load(format, tensor->moments, 0, tensor->size + begin, n, second_moment);
            float grad_square = 0, momentum_square = 0, product = 0, second = 0;
#pragma omp simd reduction(+ : grad_square, momentum_square, product, second) reduction(min : least)
            for (int64_t j = 0; j < n; j++) {
                float g = grad[j], m = momentum[j], v = second_moment[j];
                grad_square += g * g;
                momentum_square += m * m;
                product += g * m;
                v += (1.0f - decay2) * (g * g - v);
                second += v;
                least = at_most(v, least);
            }
            sums[0] += grad_square, sums[1] += momentum_square, sums[2] += product, sums[3] += second;
        }
        if (least < 0 || (!block->begin && !is_sound(tensor->control))) poison(&sums[3]);
    }
}

/* Weights of the LSTM's gates: bias, features, units. They are multiplied by -log2(e): sigmoid(x) = 1 / (1 + 2^-x'). */
typedef float GateWeights[3 * MAX_UNITS][1 + EVEN + MAX_UNITS];

static void scale_gates(GateWeights weights, const Network *network) {
    const int64_t columns = EVEN + network->units;
    for (int64_t row = 0; row < 3 * network->units; row++) {
        weights[row][0] = -1.44269504f * network->gate_bias[row];
        for (int64_t i = 0; i < columns; i++) weights[row][1 + i] = -1.44269504f * network->gate_weight[row * columns + i];
    }
}

/* What is between the loops of a chunk; it stays in the L1 cache. */
typedef struct {
    float odd[ODD + MAX_UNITS][CHUNK], even[EVEN + MAX_UNITS][CHUNK]; /* features, then hidden units and their sizes */
    float gates[3 * MAX_UNITS][CHUNK];                                /* 1 / sigmoid */
    float moments[2][CHUNK], cell[CHUNK];
    uint32_t bits[CHUNK];
} Scratch;

/* Steps 1 and 3 of the rule for the `n` coordinates of a tensor from `begin` on; returns the sum of squared directions. `UNITS` is a
 * constant where this is inlined, so that sums over units are unrolled. Short loops one after the other let a processor work on several of
 * their iterations at once; in a long one each waits for its own results.
 *
 * scalars: the tensor's.
 * worst: becomes the bits of the largest number in the LSTM's state, if that is more. Bounds would hide most of what is not finite. */
INLINE float lstm(const int UNITS, const Job *job, const Tensor *tensor, int64_t begin, int64_t n, const Network *network,
                  const GateWeights gate_weights, float decay1, float decay2, const float *scalars, Next next, Scratch *restrict s, uint32_t *worst) {
    const float inverse1 = scalars[INVERSE1], inverse2 = scalars[INVERSE2], mean = scalars[MEAN];
    const float floor = RELATIVE_FLOOR * mean + ABSOLUTE_FLOOR, inverse_mean = 1.0f / (mean + ABSOLUTE_FLOOR);
    const float skip_slow = network->skip[0], skip_fast = network->skip[1];
    const int64_t moment_format = job->moment_format, format = job->lstm_format;
    const int64_t size = tensor->size, chunks = (size + CHUNK - 1) / CHUNK, chunk = begin / CHUNK;
    const float *restrict grad = tensor->grad + begin;
    float *restrict direction = tensor->direction + begin;
    uint32_t largest = *worst;
    float *momentum = place(moment_format, tensor->moments, begin, s->moments[0]);
    float *second_moment = place(moment_format, tensor->moments, size + begin, s->moments[1]);
    load(moment_format, tensor->moments, 0, begin, n, momentum);
    load(moment_format, tensor->moments, 0, size + begin, n, second_moment);
    __builtin_prefetch(next.tensor->control + STEP);
    if (format != FLOAT32 || moment_format != FLOAT32) random_bits(s->bits, tensor, begin, n, tensor->control[STEP]);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float g = grad[j], m = momentum[j], v = second_moment[j];
        momentum[j] = m + (1.0f - decay1) * (g - m);
        second_moment[j] = v + (1.0f - decay2) * (g * g - v);
    }
    if (moment_format != FLOAT32) { /* what follows reads them as they are stored */
        store(moment_format, tensor->moments, 0, begin, n, momentum, s->bits, 0);
        store(moment_format, tensor->moments, 0, size + begin, n, second_moment, s->bits, 16);
        load(moment_format, tensor->moments, 0, begin, n, momentum);
        load(moment_format, tensor->moments, 0, size + begin, n, second_moment);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float variance = second_moment[j] * inverse2 + floor;
        float scale = 1.0f / __builtin_sqrtf(variance);
        float slow = momentum[j] * inverse1 * scale;
        float fast = grad[j] * scale;
        fast = fast / __builtin_sqrtf(1.0f + fast * fast * (1.0f / (GRADIENT_BOUND * GRADIENT_BOUND)));
        s->odd[0][j] = slow;
        s->odd[1][j] = fast;
        s->even[0][j] = __builtin_fabsf(slow);
        s->even[1][j] = __builtin_fabsf(fast);
        s->even[2][j] = log_normal(variance * inverse_mean) * 0.125f;
        direction[j] = skip_slow * slow + skip_fast * fast;
    }
    for (int h = 0; h < UNITS; h++) {
        load(format, tensor->lstm, tensor->lstm_scale + h * chunks + chunk, h * size + begin, n, s->odd[ODD + h]);
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < n; j++) {
            s->even[EVEN + h][j] = __builtin_fabsf(s->odd[ODD + h][j]);
            largest = larger(largest, s->odd[ODD + h][j]);
        }
    }
    for (int row = 0; row < 3 * UNITS; row++) {
        const float *weights = gate_weights[row];
        if (row < 2 * UNITS) prefetch(format, next.tensor->lstm, row, next); /* little by little, since few requests can wait at once */
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float x = weights[0];
#pragma GCC unroll 16
            for (int i = 0; i < EVEN + UNITS; i++) x += weights[1 + i] * s->even[i][j];
            s->gates[row][j] = 1.0f + exp2_bounded(x);
        }
    }
    for (int h = 0; h < UNITS; h++) {
        const float *weights = network->candidate_weight + h * (ODD + UNITS), out_weight = network->out[h];
        const float *in = s->gates[h], *forget = s->gates[UNITS + h], *out = s->gates[2 * UNITS + h];
        float *restrict cell = s->cell, *restrict hidden = s->even[EVEN + h]; /* the gates have read it */
        const int64_t c = UNITS + h;
        load(format, tensor->lstm, tensor->lstm_scale + c * chunks + chunk, c * size + begin, n, cell);
        if (h == 0) prefetch(FLOAT32, next.tensor->grad, 0, next);
        if (h == UNITS / 2) prefetch(job->moment_format, next.tensor->moments, 0, next);
        if (h == UNITS - 1) prefetch(job->moment_format, next.tensor->moments, 1, next);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float x = 0;
#pragma GCC unroll 16
            for (int i = 0; i < ODD + UNITS; i++) x += weights[i] * s->odd[i][j];
            Ratio candidate = tanh_ratio(x);
            float divisor = in[j] * candidate.denominator; /* cell / forget + candidate / in, with one division */
            cell[j] = (cell[j] * divisor + candidate.numerator * forget[j]) / (divisor * forget[j]);
        }
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < n; j++) {
            largest = larger(largest, cell[j]);
            Ratio squashed = tanh_ratio(cell[j]);
            float unit = squashed.numerator / (squashed.denominator * out[j]);
            hidden[j] = unit;
            direction[j] += out_weight * unit;
        }
        store(format, tensor->lstm, tensor->lstm_scale + h * chunks + chunk, h * size + begin, n, hidden, s->bits, 0);
        store(format, tensor->lstm, tensor->lstm_scale + c * chunks + chunk, c * size + begin, n, cell, s->bits, 16);
    }
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < n; j++) square += direction[j] * direction[j];
    *worst = largest;
    return square;
}

/* Whether `n` numbers are zero, in their bits, from `first` on. */
INLINE int are_zero(int64_t format, const void *numbers, int64_t first, int64_t n) {
    const int64_t bytes = format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1;
    const uint8_t *begin = (const uint8_t *)numbers + bytes * first;
    uint8_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < bytes * n; i++) any |= begin[i];
    return any == 0;
}

/* Whether the `n` coordinates from `begin` on never had a gradient, as the rows of most words have none. Then all that is kept of them is
 * zero, stays zero, and so is their direction. Of others the first gradient mostly says so. */
INLINE int is_untouched(const int UNITS, const Job *job, const Tensor *tensor, int64_t begin, int64_t n) {
    if (tensor->grad[begin] != 0 || !are_zero(FLOAT32, tensor->grad, begin, n)) return 0;
    for (int piece = 0; piece < 2; piece++)
        if (!are_zero(job->moment_format, tensor->moments, piece * tensor->size + begin, n)) return 0;
    for (int piece = 0; piece < 2 * UNITS; piece++)
        if (!are_zero(job->lstm_format, tensor->lstm, piece * tensor->size + begin, n)) return 0;
    return 1;
}

INLINE void directions_by(const int UNITS, Job *job, const Network *network, float decay1, float decay2, const float *scalars) {
    GateWeights weights;
    Scratch scratch;
    scale_gates(weights, network);
    for (int64_t b; (b = take(job)) < job->count;) {
        const Block *block = &job->blocks[b];
        const Tensor *tensor = &job->tensors[block->tensor];
        const float *own = scalars + SCALARS * block->tensor;
        double sum = 0;
        uint32_t worst = 0;
        for (int64_t begin = block->begin; begin < block->end; begin += CHUNK) {
            const int64_t n = block->end - begin < CHUNK ? block->end - begin : CHUNK;
            if (is_untouched(UNITS, job, tensor, begin, n)) {
                memset(tensor->direction + begin, 0, sizeof(float) * (size_t)n);
                continue;
            }
            const Next next = after(job, block, begin);
            sum += lstm(UNITS, job, tensor, begin, n, network, weights, decay1, decay2, own, next, &scratch, &worst);
        }
        if (worst >= TOO_LARGE) poison(&sum);
        job->sums[b] = sum;
    }
}

/* A function for each number of units: compilers take several times as long for one that holds all of them. */
#define DIRECTIONS(UNITS)                                                                                                        \
    EACH_CPU static void directions##UNITS(Job *job, const Network *network, float decay1, float decay2, const float *scalars) { \
        directions_by(UNITS, job, network, decay1, decay2, scalars);                                                             \
    }
DIRECTIONS(1)
DIRECTIONS(2)
DIRECTIONS(3)
DIRECTIONS(4)
DIRECTIONS(5)
DIRECTIONS(6)
DIRECTIONS(7)
DIRECTIONS(8)

/* Steps 1 and 3 of the rule, and the sum of squared directions; NaN where the LSTM's state, or its square, is not
 * finite.
 *
 * scalars: (tensors, SCALARS). */
void directions(Job *job, const Network *network, float decay1, float decay2, const float *scalars) {
    static void (*const of_units[MAX_UNITS])(Job *, const Network *, float, float, const float *) = {
        directions1, directions2, directions3, directions4, directions5, directions6, directions7, directions8,
    };
    of_units[network->units - 1](job, network, decay1, decay2, scalars);
}

/* The rest of steps 4 and 5, and weight decay: parameters lose the share `shrink` and get `scale` times the direction.
 *
 * factors: of each tensor shrink and scale. */
EACH_CPU void apply(Job *job, const float *factors) {
    for (int64_t b; (b = take(job)) < job->count;) {
        const Block *block = &job->blocks[b];
        const Tensor *tensor = &job->tensors[block->tensor];
        const float shrink = factors[2 * block->tensor], scale = factors[2 * block->tensor + 1];
        float *restrict param = tensor->param;
        const float *restrict direction = tensor->direction;
        if (!param) continue;
        for (int64_t begin = block->begin; begin < block->end; begin += CHUNK) {
            const int64_t end = begin + CHUNK < block->end ? begin + CHUNK : block->end;
            const Next next = after(job, block, begin);
            prefetch(FLOAT32, next.tensor->direction, 0, next);
            if (next.tensor->param) prefetch(FLOAT32, next.tensor->param, 0, next);
#pragma omp simd
            for (int64_t j = begin; j < end; j++) param[j] += scale * direction[j] - shrink * param[j];
        }
    }
}
