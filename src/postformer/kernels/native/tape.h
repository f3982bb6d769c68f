/* A tape: instructions on strided operands in memory that was laid out beforehand, run one after another without an
   allocation. kernels/tape.py writes it; the order of the kinds is the order of its table. Included once for float and
   once for double: REAL operands are of that type, others are int64 or one byte (bool). */

#define RANK 5

enum { IS_REAL, IS_INT, IS_BOOL };

typedef struct {
  char *p;
  int64_t type, s[RANK]; /* strides, in elements */
} operand;

typedef struct {
  int64_t kind, rank, n[RANK];
  operand y, a, b, c, d;
  double alpha, beta;
} instruction;

enum {
  COPY, NEG, EXP, LOG, LOG1P, EXPM1, SQRT, RSQRT, ABS, SIGMOID, SILU, TANH, SOFTPLUS, LOG_SIGMOID, RELU, GELU,
  GELU_TANH, RECIPROCAL, COS, SIN, SIGN, ROUND, FLOOR, NOT, ELU, CLAMP, ADD, MUL, DIV, MAXIMUM, MINIMUM, POW, REMAINDER, LT,
  LE, GT, GE, EQ, NE, AND, OR, GELU_BACKWARD, GELU_TANH_BACKWARD, ADDCMUL, WHERE, LERP, ELEMENTWISE_END,
  SUM, MEAN, AMAX, AMIN, NORM, ARGMAX, CUMSUM, SOFTMAX, LOG_SOFTMAX, LAYER_NORM, MATMUL, GATHER, ATTEND, SCAN_STEP, WHEN
};

#define CHUNK 256
#ifndef AHEAD
#define AHEAD 1
#endif
#define REAL_AT(o) ((REAL *)(o)->p)

INLINE double load(const char *p, int64_t type, long i) {
  return type == IS_REAL ? (double)((const REAL *)p)[i]
         : type == IS_INT ? (double)((const int64_t *)p)[i] : (double)((const unsigned char *)p)[i];
}

INLINE void store(char *p, int64_t type, long i, double v) {
  if (type == IS_REAL) ((REAL *)p)[i] = (REAL)v;
  else if (type == IS_INT) ((int64_t *)p)[i] = (int64_t)v;
  else ((unsigned char *)p)[i] = v != 0;
}

/* One value, for what is rare or not REAL. */
static double one(const instruction *I, double a, double b, double c) {
  switch (I->kind) {
    case COPY: return a;
    case NEG: return -a;
    case EXP: return exp(a);
    case LOG: return log(a);
    case LOG1P: return log1p(a);
    case EXPM1: return expm1(a);
    case SQRT: return sqrt(a);
    case RSQRT: return 1 / sqrt(a);
    case ABS: return fabs(a);
    case SIGMOID: return 1 / (1 + exp(-a));
    case SILU: return a / (1 + exp(-a));
    case TANH: return tanh(a);
    case SOFTPLUS: return a > 20 ? a : log1p(exp(a));
    case LOG_SIGMOID: return (a < 0 ? a : 0) - log1p(exp(-fabs(a)));
    case RELU: return a < 0 ? 0 : a;
    case GELU: return 0.5 * a * (1 + erf(a * 0.70710678118654752440));
    case GELU_TANH: return 0.5 * a * (1 + tanh(0.79788456080286535588 * (a + 0.044715 * a * a * a)));
    case RECIPROCAL: return 1 / a;
    case COS: return cos(a);
    case SIN: return sin(a);
    case SIGN: return a > 0 ? 1 : a < 0 ? -1 : a;
    case ROUND: return nearbyint(a);
    case FLOOR: return floor(a);
    case NOT: return a == 0;
    case ELU: return a > 0 ? a : expm1(a);
    case CLAMP: return a < I->alpha ? I->alpha : a > I->beta ? I->beta : a;
    case ADD: return a + I->alpha * b;
    case MUL: return a * b;
    case DIV: return a / b;
    case MAXIMUM: return a > b || a != a ? a : b;
    case MINIMUM: return a < b || a != a ? a : b;
    case POW: return pow(a, b);
    case REMAINDER: return a - b * floor(a / b);
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQ: return a == b;
    case NE: return a != b;
    case AND: return a != 0 && b != 0;
    case OR: return a != 0 || b != 0;
    case GELU_BACKWARD: /* a the gradient, b where */
      return a * (0.5 * (1 + erf(b * 0.70710678118654752440)) + b * exp(-0.5 * b * b) * 0.39894228040143267794);
    case GELU_TANH_BACKWARD: {
      const double k = 0.79788456080286535588, t = tanh(k * (b + 0.044715 * b * b * b));
      return a * 0.5 * (1 + t + b * (1 - t * t) * k * (1 + 3 * 0.044715 * b * b));
    }
    case ADDCMUL: return a + I->alpha * b * c;
    case WHERE: return a != 0 ? b : c;
    case LERP: return a + c * (b - a);
    default: return 0;
  }
}

/* log(1 + u) for 0 <= u <= 1 */
INLINE vec log1p_of(vec u) {
#ifdef IS_FLOAT
  vec s = u / (u + 2.0f), z = s * s;
  vec p = z * (1 / 17.0f) + 1 / 15.0f;
  p = p * z + 1 / 13.0f;
  p = p * z + 1 / 11.0f;
  p = p * z + 1 / 9.0f;
  p = p * z + 1 / 7.0f;
  p = p * z + 1 / 5.0f;
  p = p * z + 1 / 3.0f;
  return s * 2.0f + s * 2.0f * z * p;
#else
  for (long i = 0; i < VL; i++) u[i] = log1p(u[i]);
  return u;
#endif
}

INLINE vec size_of(vec x) {
  typedef __typeof__(x < x) mask;
  return (vec)((mask)x & ~(mask)(-(vec){0}));
}

/* Vectors of n values, n a multiple of VL; 0 where this kind has no vector form. */
static int vectors(const instruction *I, long n, REAL *y, const REAL *a, const REAL *b, const REAL *c) {
#define EACH(value) for (long i = 0; i < n; i += VL) LOOSE(y + i) = (value); return 1;
#define A LOOSE(a + i)
#define B LOOSE(b + i)
#define C LOOSE(c + i)
  const REAL alpha = (REAL)I->alpha;
  switch (I->kind) {
    case COPY: EACH(A)
    case NEG: EACH(-A)
    case EXP: EACH(exp_of(A))
    case SIGMOID: EACH(1 / (1 + exp_of(-A)))
    case SILU: EACH(A / (1 + exp_of(-A)))
    case SOFTPLUS:
      for (long i = 0; i < n; i += VL) {
        vec x = A, size = size_of(x);
        LOOSE(y + i) = (x + size) * (REAL)0.5 + log1p_of(exp_of(-size));
      }
      return 1;
    case LOG_SIGMOID:
      for (long i = 0; i < n; i += VL) {
        vec x = A, size = size_of(x);
        LOOSE(y + i) = (x - size) * (REAL)0.5 - log1p_of(exp_of(-size));
      }
      return 1;
    case ABS: EACH(size_of(A))
    case RECIPROCAL: EACH(1 / A)
    case ADD:
      if (alpha == 1) { EACH(A + B) }
      EACH(A + alpha * B)
    case MUL: EACH(A * B)
    case DIV: EACH(A / B)
    case ADDCMUL: EACH(A + alpha * B * C)
    case LERP: EACH(A + C * (B - A))
    default: return 0;
  }
#undef EACH
#undef A
#undef B
#undef C
}

INLINE const REAL *gathered(const REAL *p, long stride, long n, long padded, REAL *into) {
  if (stride == 1 && n == padded) return p;
  if (stride == 1) memcpy(into, p, n * sizeof(REAL));
  else if (stride == 0) for (long i = 0; i < n; i++) into[i] = *p;
  else for (long i = 0; i < n; i++) into[i] = p[i * stride];
  for (long i = n; i < padded; i++) into[i] = 1;
  return into;
}

/* A run of y = a ? b : c, a of truth values and the others REAL. */
INLINE void choose(REAL *y, long sy, const unsigned char *a, long sa, const REAL *b, long sb, const REAL *c, long sc,
                   long n) {
  if (sa == 0) { /* one answer for all */
    const REAL *from = *a ? b : c;
    const long s = *a ? sb : sc;
    if (sy == 1 && s == 1) {
      if (from != y) memmove(y, from, n * sizeof(REAL));
    } else for (long i = 0; i < n; i++) y[i * sy] = from[i * s];
  } else if (sy == 1 && sa == 1 && sb == 1 && sc == 1)
    for (long i = 0; i < n; i++) y[i] = a[i] ? b[i] : c[i];
  else
    for (long i = 0; i < n; i++) y[i * sy] = a[i * sa] ? b[i * sb] : c[i * sc];
}

static void elementwise(const instruction *I) {
  const operand *o[4] = {&I->y, &I->a, &I->b, &I->c};
  static const int width[3] = {sizeof(REAL), 8, 1};
  const long r = I->rank, inner = I->n[r - 1];
  long outer = 1, index[RANK] = {0};
  int real = 1;
  const int chooses = I->kind == WHERE && I->y.type == IS_REAL && I->a.type == IS_BOOL && I->b.type == IS_REAL &&
                      I->c.type == IS_REAL;
  for (long d = 0; d + 1 < r; d++) outer *= I->n[d];
  for (int k = 0; k < 4; k++) real &= !o[k]->p || o[k]->type == IS_REAL;
  REAL room[4][CHUNK] __attribute__((aligned(64)));
  for (long step = 0; step < outer; step++) {
    char *p[4];
    long s[4];
    for (int k = 0; k < 4; k++) {
      long at = 0;
      for (long d = 0; d + 1 < r; d++) at += index[d] * o[k]->s[d];
      p[k] = o[k]->p ? o[k]->p + at * width[o[k]->type] : NULL;
      s[k] = o[k]->s[r - 1];
    }
    if (chooses)
      choose((REAL *)p[0], s[0], (unsigned char *)p[1], s[1], (REAL *)p[2], s[2], (REAL *)p[3], s[3], inner);
    else for (long i = 0; i < inner; i += CHUNK) {
      const long n = least(CHUNK, inner - i), padded = (n + VL - 1) / VL * VL;
      if (real) {
        const REAL *in[3] = {NULL, NULL, NULL};
        REAL *y = (REAL *)p[0] + i * s[0], *out = s[0] == 1 && n == padded ? y : room[3];
        for (int k = 0; k < 3; k++)
          if (p[k + 1]) in[k] = gathered((REAL *)p[k + 1] + i * s[k + 1], s[k + 1], n, padded, room[k]);
        if (vectors(I, padded, out, in[0], in[1], in[2])) {
          if (out != y) for (long j = 0; j < n; j++) y[j * s[0]] = out[j];
          continue;
        }
      }
      for (long j = i; j < i + n; j++)
        store(p[0], I->y.type, j * s[0],
              one(I, load(p[1], I->a.type, j * s[1]), p[2] ? load(p[2], I->b.type, j * s[2]) : 0,
                  p[3] ? load(p[3], I->c.type, j * s[3]) : 0));
    }
    for (long d = r - 2; d >= 0; d--) {
      if (++index[d] < I->n[d]) break;
      index[d] = 0;
    }
  }
}

/* sum_i a_i b_i */
INLINE REAL dot(const REAL *a, const REAL *b, long n) {
  vec s0 = {0}, s1 = {0};
  long i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    s0 += LOOSE(a + i) * LOOSE(b + i);
    s1 += LOOSE(a + i + VL) * LOOSE(b + i + VL);
  }
  for (; i + VL <= n; i += VL) s0 += LOOSE(a + i) * LOOSE(b + i);
  REAL s = sum_of(s0 + s1);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

/* The last dimension of a is reduced, or mapped as a whole. */
static void rowwise(const instruction *I) {
  const long r = I->rank, n = I->n[r - 1], sa = I->a.s[r - 1], sy = I->y.s[r - 1];
  long outer = 1, index[RANK] = {0};
  static const int width[3] = {sizeof(REAL), 8, 1};
  for (long d = 0; d + 1 < r; d++) outer *= I->n[d];
  for (long step = 0; step < outer; step++) {
    long ya = 0, aa = 0;
    for (long d = 0; d + 1 < r; d++) ya += index[d] * I->y.s[d], aa += index[d] * I->a.s[d];
    const char *a = I->a.p + aa * width[I->a.type];
    char *y = I->y.p + ya * width[I->y.type];
    const int64_t ta = I->a.type, ty = I->y.type;
    const int plain = ta == IS_REAL && ty == IS_REAL;
    const REAL *x = (const REAL *)a;
    REAL *z = (REAL *)y;
    switch (I->kind) {
      case NORM:
        if (plain && sa == 1) *z = (REAL)sqrt(dot(x, x, n));
        else {
          double s = 0;
          for (long i = 0; i < n; i++) s += load(a, ta, i * sa) * load(a, ta, i * sa);
          store(y, ty, 0, sqrt(s));
        }
        break;
      case SUM: case MEAN: {
        double s = 0;
        for (long i = 0; i < n; i++) s += load(a, ta, i * sa);
        store(y, ty, 0, I->kind == MEAN ? s / n : s);
        break;
      }
      case CUMSUM: {
        double s = 0;
        for (long i = 0; i < n; i++) store(y, ty, i * sy, s += load(a, ta, i * sa));
        break;
      }
      case AMAX: case AMIN: case ARGMAX: {
        double best = load(a, ta, 0);
        long at = 0;
        for (long i = 1; i < n; i++) {
          double v = load(a, ta, i * sa);
          if (best == best && (I->kind == AMIN ? v < best : v > best || v != v)) best = v, at = i;
        }
        store(y, ty, 0, I->kind == ARGMAX ? at : best);
        break;
      }
      case SOFTMAX: case LOG_SOFTMAX: {
        double top = load(a, ta, 0), s = 0;
        for (long i = 1; i < n; i++) top = fmax(top, load(a, ta, i * sa));
        for (long i = 0; i < n; i++) s += exp(load(a, ta, i * sa) - top);
        for (long i = 0; i < n; i++) {
          double v = load(a, ta, i * sa) - top;
          store(y, ty, i * sy, I->kind == SOFTMAX ? exp(v) / s : v - log(s));
        }
        break;
      }
      case LAYER_NORM: {
        double m = 0, v = 0;
        for (long i = 0; i < n; i++) m += load(a, ta, i * sa);
        m /= n;
        for (long i = 0; i < n; i++) v += (load(a, ta, i * sa) - m) * (load(a, ta, i * sa) - m);
        v = 1 / sqrt(v / n + I->alpha);
        for (long i = 0; i < n; i++)
          z[i * sy] = (REAL)((x[i * sa] - m) * v * (I->b.p ? REAL_AT(&I->b)[i * I->b.s[r - 1]] : 1) +
                             (I->c.p ? REAL_AT(&I->c)[i * I->c.s[r - 1]] : 0));
        break;
      }
    }
    for (long d = r - 2; d >= 0; d--) {
      if (++index[d] < I->n[d]) break;
      index[d] = 0;
    }
  }
}

/* x [M, K] against rows of W [n, K], both dense: y[m, n] = x_m . W_n + c[m, n] */
static void rows_by_dots(const REAL *x, long ldx, const REAL *W, long ldw, REAL *y, long ym, long yn, const REAL *c,
                         long cm, long cn, long M, long N, long K) {
  long n = 0;
  for (; n + 4 <= N; n += 4) {
    const REAL *w = W + n * ldw;
    for (long m = 0; m < M; m++) {
      const REAL *v = x + m * ldx;
      vec s[4] = {{0}, {0}, {0}, {0}};
      long k = 0;
      for (; k + VL <= K; k += VL) {
        vec u = LOOSE(v + k);
        if (!m) UNROLL for (int j = 0; j < 4; j++) __builtin_prefetch(w + (4 * AHEAD + j) * ldw + k);
        UNROLL for (int j = 0; j < 4; j++) s[j] += u * LOOSE(w + j * ldw + k);
      }
      REAL t[4];
      UNROLL for (int j = 0; j < 4; j++) t[j] = sum_of(s[j]);
      for (; k < K; k++) for (int j = 0; j < 4; j++) t[j] += v[k] * w[j * ldw + k];
      for (int j = 0; j < 4; j++) y[m * ym + (n + j) * yn] = t[j] + (c ? c[m * cm + (n + j) * cn] : 0);
    }
  }
  for (; n < N; n++)
    for (long m = 0; m < M; m++)
      y[m * ym + n * yn] = dot(x + m * ldx, W + n * ldw, K) + (c ? c[m * cm + n * cn] : 0);
}

/* y[n] = sum_k x[k] W[k, n], rows of W dense */
static void row_by_columns(const REAL *x, long sx, const REAL *W, long ldw, REAL *y, long sy, const REAL *c, long cn,
                           long N, long K) {
  for (long n = 0; n < N; n += 4 * VL) {
    const long full = (N - n) / VL;
    if (full >= 4 && sy == 1 && !c) {
      vec s[4] = {{0}, {0}, {0}, {0}};
      for (long k = 0; k < K; k++) {
        REAL v = x[k * sx];
        UNROLL for (int j = 0; j < 4; j++) s[j] += v * LOOSE(W + k * ldw + n + j * VL);
      }
      UNROLL for (int j = 0; j < 4; j++) LOOSE(y + n + j * VL) = s[j];
      continue;
    }
    REAL s[4 * VECTOR_BYTES / sizeof(REAL)] = {0};
    const long width = least(4 * VL, N - n);
    for (long k = 0; k < K; k++) {
      REAL v = x[k * sx];
      for (long j = 0; j < width; j++) s[j] += v * W[k * ldw + n + j];
    }
    for (long j = 0; j < width; j++) y[(n + j) * sy] = s[j] + (c ? c[(n + j) * cn] : 0);
  }
}

static void matmul(const instruction *I, int threads) {
  const long Z = I->n[0], M = I->n[1], N = I->n[2], K = I->n[3];
  const int64_t *sy = I->y.s, *sa = I->a.s, *sb = I->b.s, *sc = I->c.s;
  for (long z = 0; z < Z; z++) {
    const REAL *a = REAL_AT(&I->a) + z * sa[0], *b = REAL_AT(&I->b) + z * sb[0];
    const REAL *c = I->c.p ? REAL_AT(&I->c) + z * sc[0] : NULL;
    REAL *y = REAL_AT(&I->y) + z * sy[0];
    if (sb[1] == 1 && sa[2] == 1 && K > 1) {
      const long parts = N * K * M > 32768 ? threads : 1, each = (N / 4 / parts + 1) * 4;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (parts > 1)
#endif
      for (long part = 0; part < parts; part++) {
        const long n = part * each, count = least(each, N - n);
        if (count > 0)
          rows_by_dots(a, sa[1], b + n * sb[2], sb[2], y + n * sy[2], sy[1], sy[2], c ? c + n * sc[2] : NULL, sc[1],
                       sc[2], M, count, K);
      }
    } else if (sb[2] == 1) {
      for (long m = 0; m < M; m++)
        row_by_columns(a + m * sa[1], sa[2], b, sb[1], y + m * sy[1], sy[2], c ? c + m * sc[1] : NULL, sc[2], N, K);
    } else {
      for (long m = 0; m < M; m++)
        for (long n = 0; n < N; n++) {
          REAL s = c ? c[m * sc[1] + n * sc[2]] : 0;
          for (long k = 0; k < K; k++) s += a[m * sa[1] + k * sa[2]] * b[k * sb[1] + n * sb[2]];
          y[m * sy[1] + n * sy[2]] = s;
        }
    }
  }
}

/* y = a at b of the dimension whose stride is alpha; the others go along with y */
static int gather(const instruction *I) {
  const long r = I->rank, inner = I->n[r - 1], size = (long)I->beta;
  long outer = 1, index[RANK] = {0};
  static const int width[3] = {sizeof(REAL), 8, 1};
  const long w = width[I->y.type];
  for (long d = 0; d + 1 < r; d++) outer *= I->n[d];
  for (long step = 0; step < outer; step++) {
    long ya = 0, aa = 0, ba = 0;
    for (long d = 0; d + 1 < r; d++)
      ya += index[d] * I->y.s[d], aa += index[d] * I->a.s[d], ba += index[d] * I->b.s[d];
    for (long i = 0; i < inner; i++) {
      long at = ((int64_t *)I->b.p)[ba + i * I->b.s[r - 1]];
      if (at < 0 || at >= size) return 2;
      memcpy(I->y.p + (ya + i * I->y.s[r - 1]) * w, I->a.p + (aa + i * I->a.s[r - 1] + at * (long)I->alpha) * w, w);
    }
    for (long d = r - 2; d >= 0; d--) {
      if (++index[d] < I->n[d]) break;
      index[d] = 0;
    }
  }
  return 0;
}

/* Whether any of the n[0..rank-1] booleans of a is true. */
static int any(const instruction *I) {
  long index[RANK] = {0}, total = 1;
  for (long d = 0; d < I->rank; d++) total *= I->n[d];
  for (long step = 0; step < total; step++) {
    long at = 0;
    for (long d = 0; d < I->rank; d++) at += index[d] * I->a.s[d];
    if (I->a.p[at]) return 1;
    for (long d = I->rank - 1; d >= 0; d--) {
      if (++index[d] < I->n[d]) break;
      index[d] = 0;
    }
  }
  return 0;
}

#include "tape_steps.h"

/* Runs the tape; 0, or 1 where there is no memory, or 2 where an index is out of range. */
int NAME(tape_run)(const instruction *I, int64_t count, int threads) {
  for (const instruction *end = I + count; I < end; I++) {
    int failed = 0;
    if (I->kind < ELEMENTWISE_END) elementwise(I);
    else if (I->kind <= LAYER_NORM) rowwise(I);
    else if (I->kind == MATMUL) matmul(I, threads);
    else if (I->kind == GATHER) failed = gather(I);
    else if (I->kind == ATTEND) failed = attend(I, threads);
    else if (I->kind == SCAN_STEP) scan_step(I++);
    else if (I->kind == WHEN && !any(I)) I += (long)I->alpha; /* so many instructions are left out */
    if (failed) return failed;
  }
  return 0;
}
