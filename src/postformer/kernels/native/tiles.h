/* Small dense matrices in vector registers, for float or double (REAL), with whatever width the compiler's target has.

   A tile is row-major, its rows padded with zeros to a multiple of PAD elements and aligned to 64 bytes. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define VL ((long)(VECTOR_BYTES / sizeof(REAL)))
#define PAD 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

#define ROUND_UP(n) (((n) + PAD - 1) / PAD * PAD)
#define AT(p) (*(vec *)(p))
#define LOOSE(p) (*(loose *)(p))

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE REAL sum_of(vec x) {
  REAL s = 0;
  for (long i = 0; i < VL; i++) s += x[i];
  return s;
}

/* C[MR, NR vectors] = sum_k A(m, k) B[k]; A(m, k) lies at A[m * ra + k * ca]; C = add C + alpha (...) */
#define TILE(MR, NR)                                                                                                  \
  static void tile_##MR##_##NR(long K, const REAL *restrict A, long ra, long ca, const REAL *restrict B, long ldb,    \
                               REAL *restrict C, long ldc, REAL alpha, int add) {                                     \
    vec c[MR][NR];                                                                                                    \
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NR; j++) c[i][j] = (vec){0};                       \
    for (long k = 0; k < K; k++) {                                                                                    \
      vec b[NR];                                                                                                      \
      UNROLL for (int j = 0; j < NR; j++) b[j] = AT(B + k * ldb + j * VL);                                            \
      UNROLL for (int i = 0; i < MR; i++) {                                                                           \
        REAL a = A[i * ra + k * ca];                                                                                  \
        UNROLL for (int j = 0; j < NR; j++) c[i][j] += a * b[j];                                                      \
      }                                                                                                               \
    }                                                                                                                 \
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NR; j++) {                                         \
      vec *out = (vec *)(C + i * ldc + j * VL);                                                                       \
      *out = add ? *out + alpha * c[i][j] : alpha * c[i][j];                                                          \
    }                                                                                                                 \
  }

TILE(1, 1)
TILE(1, 2)
TILE(4, 2)
#if VECTOR_BYTES != 32
TILE(1, 4)
TILE(4, 4)
TILE(8, 2)
TILE(16, 1)
#endif

#define RUN(MR, NR)                                                                                                   \
  for (; m + MR <= M; m += MR) tile_##MR##_##NR(K, A + m * ra, ra, ca, B + n, ldb, C + m * ldc + n, ldc, alpha, add);

/* C[M, N] = (add ? C : 0) + alpha A B with B [K, N] and C tiles, N a multiple of PAD, A in any layout */
static void gemm(long M, long N, long K, const REAL *A, long ra, long ca, const REAL *B, long ldb, REAL *C, long ldc,
                 REAL alpha, int add) {
  for (long n = 0, width; n < N; n += width) {
    long left = (N - n) / VL, m = 0;
#if VECTOR_BYTES != 32
    if (left >= 4) {
      width = 4 * VL;
      RUN(4, 4)
      RUN(1, 4)
      continue;
    }
#endif
    if (left >= 2) {
      width = 2 * VL;
#if VECTOR_BYTES != 32
      RUN(8, 2)
#endif
      RUN(4, 2)
      RUN(1, 2)
      continue;
    }
    width = VL;
#if VECTOR_BYTES != 32
    RUN(16, 1)
#endif
    RUN(1, 1)
  }
}

/* out[N, M] = A[M, N]^T for tiles; both sides multiples of PAD */
static void transpose(const REAL *restrict A, long lda, long M, long N, REAL *restrict out, long ldo) {
#if defined(__GNUC__) && !defined(__clang__)
  typedef __typeof__(((vec){0}) < ((vec){0})) mask;
  for (long m = 0; m < M; m += VL)
    for (long n = 0; n < N; n += VL) {
      vec r[VECTOR_BYTES / sizeof(REAL)];
      UNROLL for (int i = 0; i < VL; i++) r[i] = AT(A + (m + i) * lda + n);
      UNROLL for (int s = VL / 2; s > 0; s /= 2) {
        mask low, high; /* lanes of the pair (a, b): a's are 0 .. VL - 1 */
        UNROLL for (int j = 0; j < VL; j++) {
          low[j] = j & s ? VL + j - s : j;
          high[j] = j & s ? VL + j : j + s;
        }
        UNROLL for (int i = 0; i < VL; i++) if (!(i & s)) {
          vec a = r[i], b = r[i + s];
          r[i] = __builtin_shuffle(a, b, low);
          r[i + s] = __builtin_shuffle(a, b, high);
        }
      }
      UNROLL for (int i = 0; i < VL; i++) AT(out + (n + i) * ldo + m) = r[i];
    }
#else
  for (long m = 0; m < M; m++)
    for (long n = 0; n < N; n++) out[n * ldo + m] = A[m * lda + n];
#endif
}

/* exp(x), relative error below 2e-7 in float and 4e-16 in double; exactly 0 far below the smallest number, the largest
   it can say far above the largest, NaN stays NaN. What lies too low runs through as it is: its result is wiped out. */
INLINE vec exp_of(vec x) {
#ifdef IS_FLOAT
  typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES), may_alias));
  typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
  const REAL LOW = -87.3f, HIGH = 88.3f;
  const REAL ROUND = 12582912.0f; /* 1.5 * 2^23: rounds to a whole number in the low bits */
  const REAL LN2 = 0.693359375f, LN2_REST = -2.12194440e-4f;
  static const REAL C[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                           1.6666665459e-1f, 5.0000001201e-1f, 1, 1};
  const int BIAS = 127, SHIFT = 23;
#else
  typedef int64_t ints __attribute__((vector_size(VECTOR_BYTES), may_alias));
  typedef uint64_t bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
  const REAL LOW = -708, HIGH = 709;
  const REAL ROUND = 6755399441055744.0; /* 1.5 * 2^52 */
  const REAL LN2 = 6.93147180369123816490e-1, LN2_REST = 1.90821492927058770002e-10;
  static const REAL C[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                           1 / 40320.0, 1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1, 1};
  const int BIAS = 1023, SHIFT = 52;
#endif
  const REAL LOG2E = (REAL)1.44269504088896340736;
  ints under = x < LOW, over = x > HIGH;
  vec y = (vec)(((ints)x & ~over) | ((ints)((vec){0} + HIGH) & over));
  vec shifted = y * LOG2E + ROUND;
  bits n = (bits)shifted - (bits)((vec){0} + ROUND);
  vec whole = shifted - ROUND;
  vec r = y - whole * LN2 - whole * LN2_REST;
  vec p = (vec){0} + C[0];
  UNROLL for (size_t i = 1; i < sizeof C / sizeof *C; i++) p = p * r + C[i];
  vec scale = (vec)((n + BIAS) << SHIFT);
  return (vec)((ints)(p * scale) & ~under);
}

INLINE void fill(REAL *x, long n, REAL value) {
  vec v = (vec){0} + value;
  for (long i = 0; i < n; i += VL) AT(x + i) = v;
}

/* x[n] *= y[n], tiles' rows */
INLINE void scale_row(REAL *x, const REAL *y, long n) {
  for (long i = 0; i < n; i += VL) AT(x + i) *= AT(y + i);
}

INLINE void scale_by(REAL *x, REAL y, long n) {
  for (long i = 0; i < n; i += VL) AT(x + i) *= y;
}

/* Memory of one thread, kept from call to call: fresh pages cost more than what is done in them. */
typedef struct {
  char *next, *end;
} arena;

static _Thread_local char *kept = NULL;
static _Thread_local size_t kept_size = 0;

INLINE REAL *take(arena *a, long n) {
#ifdef __SANITIZE_ADDRESS__
  return aligned_alloc(64, (n * sizeof(REAL) + 63) / 64 * 64); /* guarded on both sides; never freed */
#endif
  REAL *p = (REAL *)a->next;
  a->next += (n * sizeof(REAL) + 63) / 64 * 64;
  return p;
}

static int open_arena(arena *a, size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  if (bytes > kept_size) {
    free(kept);
    kept = aligned_alloc(4096, bytes);
    kept_size = kept ? bytes : 0;
  }
  a->next = kept;
  a->end = kept + kept_size;
  return kept != NULL;
}
