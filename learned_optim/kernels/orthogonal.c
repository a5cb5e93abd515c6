/* Newton-Schulz iteration for many matrices; `orthogonalize` in `learned_optim/rule.py` says what it computes.
 *
 * Each iteration multiplies a matrix by a polynomial of its Gram matrix. Such polynomials are symmetric, and commute. So all iterations
 * together need products of them only, of which one half follows from the other, and the matrix itself is multiplied once, at the end.
 *
 * A caller describes its matrices in a table. Any number of threads may work on it together: each takes the next one until none is left. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU /* see `coordinate.c` */
#endif
#define INLINE static inline __attribute__((always_inline))

/* Products are computed in tiles, whose sums stay in twelve of the sixteen registers that processors with AVX2 have. */
enum { ROWS = 6, COLUMNS = 16, LANES = 8 };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Every field has 8 bytes. */
typedef struct {
    float *values; /* (fan_out, fan_in), which are replaced */
    int64_t fan_out, fan_in;
    double norm; /* the spectral norm to come */
} Matrix;

typedef struct {
    const Matrix *matrices;
    int64_t count;
    int64_t next; /* the first one that no thread has taken */
    int64_t steps;
    double a, b, c; /* of the polynomial */
    double epsilon; /* the floor of sums of squares */
} Job;

/* The number of this file's interface, see `interface` in `coordinate.c`. */
int64_t interface(void) { return 1; }

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A tile of `scale * left @ right + add * other`, sums of `terms` products. The factor of row i and term k is `left[i * row + k * term]`. A
 * row of `right` has the tile's columns only, one of `other` and of `out` has `width`. */
INLINE void tile(float *out, const float *left, int64_t row, int64_t term, const float *right, int64_t terms, int64_t width, float scale,
                 const float *other, float add) {
    Vector sums[ROWS][2] = {{{0}}};
    for (int64_t k = 0; k < terms; k++) {
        const Vector low = *(const Vector *)(right + k * COLUMNS), high = *(const Vector *)(right + k * COLUMNS + LANES);
        for (int i = 0; i < ROWS; i++) {
            const float factor = left[i * row + k * term];
            sums[i][0] += factor * low;
            sums[i][1] += factor * high;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int half = 0; half < 2; half++) {
            const int64_t at = i * width + half * LANES;
            Vector sum = scale * sums[i][half];
            if (other) sum += add * *(const Vector *)(other + at);
            *(Vector *)(out + at) = sum;
        }
    }
}

/* Columns of a matrix side by side, (terms, COLUMNS): where rows are long, they would get into each other's way in the cache. */
INLINE void pack(float *panel, const float *in, int64_t terms, int64_t width) {
    for (int64_t k = 0; k < terms; k++) memcpy(panel + k * COLUMNS, in + k * width, sizeof(float) * COLUMNS);
}

/* The transpose of (rows, columns); what is read and what is written stays in the cache. */
INLINE void transpose(float *out, int64_t out_width, const float *in, int64_t in_width, int64_t rows, int64_t columns) {
    for (int64_t i0 = 0; i0 < rows; i0 += COLUMNS)
        for (int64_t j0 = 0; j0 < columns; j0 += COLUMNS)
            for (int64_t i = i0; i < least(rows, i0 + COLUMNS); i++)
                for (int64_t j = j0; j < least(columns, j0 + COLUMNS); j++) out[j * out_width + i] = in[i * in_width + j];
}

/* `scale * left @ right + add * other`, which has to be symmetric, (n, n): the tiles that reach above the diagonal, and from these the
 * others. The last tiles of a column begin earlier, so that they end with the matrix. */
INLINE void symmetric(float *out, const float *left, int64_t row, int64_t term, const float *right, int64_t terms, int64_t n, int64_t width,
                      float scale, const float *other, float add, float *panel) {
    for (int64_t j = 0; j < n; j += COLUMNS) {
        pack(panel, right + j, terms, width);
        for (int64_t begin = 0; begin < least(n, j + COLUMNS); begin += ROWS) {
            const int64_t i = n > ROWS ? least(begin, n - ROWS) : 0, at = i * width + j;
            tile(out + at, left + i * row, row, term, panel, terms, width, scale, other ? other + at : 0, add);
        }
        transpose(out + j * width, width, out + j, width, j, least(COLUMNS, n - j));
    }
}

INLINE double sum_of_squares(const float *in, int64_t rows, int64_t columns, int64_t width) {
    double total = 0;
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < columns; j++) sum += in[i * width + j] * in[i * width + j];
        total += sum;
    }
    return total;
}

/* The floats that a thread needs for a matrix: for itself, four of its Gram matrix's shape, and columns. */
int64_t scratch_size(int64_t fan_out, int64_t fan_in) {
    const int64_t n = least(fan_out, fan_in), tall = fan_out + fan_in - n, width = padded(n, COLUMNS);
    return padded(tall, ROWS) * width + 4 * (width + ROWS) * width + COLUMNS * tall;
}

INLINE void one(const Job *job, const Matrix *matrix, float *scratch) {
    const int64_t fan_out = matrix->fan_out, fan_in = matrix->fan_in;
    const int wide = fan_out < fan_in;
    /* Rows are laid along the longer side, and filled up with zeros to a multiple of a tile's columns. */
    const int64_t n = wide ? fan_out : fan_in, tall = wide ? fan_in : fan_out, width = padded(n, COLUMNS), square = (width + ROWS) * width;
    const float a = (float)job->a, b = (float)job->b, c = (float)job->c;
    float *x = scratch, *gram = x + padded(tall, ROWS) * width, *polynomial = gram + square, *product = polynomial + square;
    float *spare = product + square, *panel = spare + square;
    memset(scratch, 0, sizeof(float) * (size_t)(panel - scratch));
    if (wide) transpose(x, width, matrix->values, fan_in, fan_out, fan_in);
    else for (int64_t i = 0; i < tall; i++) memcpy(x + i * width, matrix->values + i * n, sizeof(float) * (size_t)n);

    double scale = 1 / sqrt(sum_of_squares(x, tall, n, width) + job->epsilon);
    symmetric(gram, x, 1, width, x, tall, n, width, (float)(scale * scale), 0, 0, panel);
    const double fourth = 1 / sqrt(sum_of_squares(gram, n, n, width) + job->epsilon);
    for (int64_t i = 0; i < n * width; i++) gram[i] *= (float)fourth;
    scale *= sqrt(fourth);

    for (int64_t step = 0; step < job->steps; step++) {
        symmetric(polynomial, gram, width, 1, gram, n, n, width, c, gram, b, panel);
        if (step == 0) {
            memcpy(product, polynomial, sizeof(float) * (size_t)(n * width));
            for (int64_t i = 0; i < n; i++) product[i * width + i] += a;
        } else {
            symmetric(spare, polynomial, width, 1, product, n, n, width, 1, product, a, panel);
            float *before = product;
            product = spare, spare = before;
        }
        if (step < job->steps - 1) {
            symmetric(spare, polynomial, width, 1, gram, n, n, width, 1, gram, a, panel);
            symmetric(gram, polynomial, width, 1, spare, n, n, width, 1, spare, a, panel);
        }
    }
    scale *= matrix->norm;
    for (int64_t j = 0; j < n; j += COLUMNS) {
        pack(panel, product + j, n, width);
        for (int64_t i = 0; i < tall; i += ROWS) {
            float part[ROWS * COLUMNS];
            tile(part, x + i * width, width, 1, panel, n, COLUMNS, (float)scale, 0, 0);
            const int64_t rows = least(ROWS, tall - i), columns = least(COLUMNS, n - j);
            if (wide) transpose(matrix->values + j * fan_in + i, fan_in, part, COLUMNS, rows, columns);
            else for (int64_t r = 0; r < rows; r++) memcpy(matrix->values + (i + r) * n + j, part + r * COLUMNS, sizeof(float) * (size_t)columns);
        }
    }
}

EACH_CPU void orthogonalize(Job *job, float *scratch) {
    for (int64_t next; (next = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count;)
        one(job, &job->matrices[next], scratch);
}
