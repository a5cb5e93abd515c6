/* Arithmetic on a few numbers, as `learned_optim/kernels/replay.py` has recorded it of PyTorch operations, each of which would take a
 * microsecond to start.
 *
 * All numbers are in one array, the arena. Unlike `coordinate.c`, this file must be compiled for numbers that are not finite, too. */

#include <math.h>
#include <stdint.h>

/* As in `replay.py`. */
enum {
    LOAD, COPY, ADD, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM, GREATER, LESS, EQUAL, UNEQUAL, ABS, NEG, EXP, LOG, SQRT, RSQRT, RECIPROCAL,
    WHERE, CLAMP, LERP, SUM
};

/* Numbers in the arena, (rows, columns): where the first one is, and how far those of the next row and column are from it. */
typedef struct {
    int64_t first, row, column;
} Place;

typedef struct {
    int64_t operation, rows, columns;
    Place out, in[3];
} Instruction;

#define EACH(VALUE)                                                            \
    for (int64_t i = 0; i < rows; i++) {                                       \
        for (int64_t j = 0; j < columns; j++) {                                \
            const float x = arena[in[0].first + i * in[0].row + j * in[0].column]; \
            const float y = arena[in[1].first + i * in[1].row + j * in[1].column]; \
            const float z = arena[in[2].first + i * in[2].row + j * in[2].column]; \
            (void)y, (void)z;                                                  \
            arena[out.first + i * out.row + j * out.column] = (VALUE);         \
        }                                                                      \
    }                                                                          \
    break

/* The number of this file's interface, see `interface` in `coordinate.c`. */
int64_t interface(void) { return 1; }

/* sources: numbers from outside, without gaps, one address for each LOAD. */
void replay(const Instruction *program, int64_t count, float *restrict arena, const float *const *sources) {
    for (const Instruction *one = program; one < program + count; one++) {
        const int64_t rows = one->rows, columns = one->columns;
        const Place out = one->out, *in = one->in;
        switch (one->operation) {
        case LOAD:
            for (int64_t i = 0; i < rows * columns; i++) arena[out.first + i] = sources[in[0].first][i];
            break;
        case COPY: EACH(x);
        case ADD: EACH(x + y);
        case SUB: EACH(x - y);
        case MUL: EACH(x * y);
        case DIV: EACH(x / y);
        case POW: EACH(powf(x, y));
        case MAXIMUM: EACH(x > y || x != x ? x : y);
        case MINIMUM: EACH(x < y || x != x ? x : y);
        case GREATER: EACH(x > y);
        case LESS: EACH(x < y);
        case EQUAL: EACH(x == y);
        case UNEQUAL: EACH(x != y);
        case ABS: EACH(fabsf(x));
        case NEG: EACH(-x);
        case EXP: EACH(expf(x));
        case LOG: EACH(logf(x));
        case SQRT: EACH(sqrtf(x));
        case RSQRT: EACH(1.0f / sqrtf(x));
        case RECIPROCAL: EACH(1.0f / x);
        case WHERE: EACH(x != 0 ? y : z);
        case CLAMP: EACH(x < y ? y : x > z ? z : x); /* NaN stays */
        case LERP: EACH(fabsf(z) < 0.5f ? x + z * (y - x) : y - (y - x) * (1.0f - z));
        case SUM: /* over columns */
            for (int64_t i = 0; i < rows; i++) {
                double sum = 0;
                for (int64_t j = 0; j < columns; j++) sum += arena[in[0].first + i * in[0].row + j * in[0].column];
                arena[out.first + i * out.row] = (float)sum;
            }
            break;
        }
    }
}

/* Means over each tensor of its blocks' sums; returns whether all are finite.
 *
 * sums: (count, columns); blocks: (count, 3), the first of which is the tensor; sizes: (tensors,); totals: (tensors, columns), room to add
 * in; means: (columns, tensors). */
int64_t means(const double *sums, const int64_t *blocks, int64_t count, int64_t columns, const int64_t *sizes, int64_t tensors,
              double *totals, float *means) {
    int64_t finite = 1;
    for (int64_t i = 0; i < tensors * columns; i++) totals[i] = 0;
    for (int64_t b = 0; b < count; b++) {
        for (int64_t j = 0; j < columns; j++) totals[blocks[3 * b] * columns + j] += sums[b * columns + j];
    }
    for (int64_t k = 0; k < tensors; k++) {
        for (int64_t j = 0; j < columns; j++) {
            const float mean = (float)(totals[k * columns + j] / (double)sizes[k]);
            means[j * tensors + k] = mean;
            finite &= mean - mean == 0;
        }
    }
    return finite;
}
