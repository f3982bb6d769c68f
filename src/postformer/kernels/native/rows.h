/* Elementwise and row-wise work in one pass: activations and products with them, norms with gates.

   A row is d dense numbers; rows lie at three strides. Sums over rows (gradients of weights) are taken in BLOCKS parts,
   whatever the number of threads, and added in order. */

#ifndef ROWS_SHARED
#define ROWS_SHARED
enum { ACT_NONE, ACT_SILU, ACT_SIGMOID, ACT_GELU_TANH, ACT_RELU, ACT_RELU_SQUARED };
enum { GATE_NONE, GATE_AFTER, GATE_BEFORE };
enum { BLOCKS = 64, WORTH_THREADS = 32768 };

static inline double number(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

typedef __typeof__(((vec){0}) < ((vec){0})) lanes;

INLINE vec pick_lanes(lanes where, vec yes, vec no) { return (vec)((where & (lanes)yes) | (~where & (lanes)no)); }

/* A vector of the next `left` numbers, zeros after them */
INLINE vec load_part(const REAL *p, long left) {
  if (left >= VL) return LOOSE(p);
  vec v = {0};
  for (long i = 0; i < left; i++) v[i] = p[i];
  return v;
}

INLINE void store_part(REAL *p, long left, vec v) {
  if (left >= VL)
    LOOSE(p) = v;
  else
    for (long i = 0; i < left; i++) p[i] = v[i];
}

/* A statement for i = 0, VL, ... below n with `left` numbers to go: only the last needs to look at how many */
#define ALONG(n, ...)                                                                                                 \
  {                                                                                                                   \
    long i = 0;                                                                                                       \
    for (; i + VL <= (n); i += VL) {                                                                                  \
      const long left = VL;                                                                                           \
      (void)left;                                                                                                     \
      __VA_ARGS__;                                                                                                    \
    }                                                                                                                 \
    if (i < (n)) {                                                                                                    \
      const long left = (n) - i;                                                                                      \
      (void)left;                                                                                                     \
      __VA_ARGS__;                                                                                                    \
    }                                                                                                                 \
  }

INLINE vec sigmoid_of(vec x) {
  vec e = exp_of(pick_lanes(x < 0, x, -x)), y = 1 / (1 + e);
  return pick_lanes(x < 0, e * y, y);
}

/* f(x), and f'(x) where asked for */
INLINE vec act_of(int kind, vec x, vec *slope) {
  vec zero = {0}, one = zero + 1, s, two;
  switch (kind) {
    case ACT_SILU:
      s = sigmoid_of(x);
      if (slope) *slope = s * (1 + x * (1 - s));
      return x * s;
    case ACT_SIGMOID:
      s = sigmoid_of(x);
      if (slope) *slope = s * (1 - s);
      return s;
    case ACT_GELU_TANH: /* (1 + tanh u) / 2 = sigmoid(2 u) */
      two = x * x;
      s = sigmoid_of(x * (two * (REAL)0.07135481627260025 + (REAL)1.5957691216057308));
      if (slope) *slope = s + x * s * (1 - s) * (two * (REAL)0.21406444881780075 + (REAL)1.5957691216057308);
      return x * s;
    case ACT_RELU:
      if (slope) *slope = pick_lanes(x <= 0, zero, one);
      return pick_lanes(x <= 0, zero, x);
    case ACT_RELU_SQUARED:
      s = pick_lanes(x <= 0, zero, x);
      if (slope) *slope = 2 * s;
      return s * s;
    default:
      if (slope) *slope = one;
      return x;
  }
}

/* Run a statement with KIND a constant of the compiler */
#define EACH_KIND(kind, ...)                                                                                          \
  switch (kind) {                                                                                                     \
    case ACT_SILU: { enum { KIND = ACT_SILU }; __VA_ARGS__; break; }                                                  \
    case ACT_SIGMOID: { enum { KIND = ACT_SIGMOID }; __VA_ARGS__; break; }                                            \
    case ACT_GELU_TANH: { enum { KIND = ACT_GELU_TANH }; __VA_ARGS__; break; }                                        \
    case ACT_RELU: { enum { KIND = ACT_RELU }; __VA_ARGS__; break; }                                                  \
    case ACT_RELU_SQUARED: { enum { KIND = ACT_RELU_SQUARED }; __VA_ARGS__; break; }                                  \
    default: { enum { KIND = ACT_NONE }; __VA_ARGS__; }                                                               \
  }

typedef struct {
  long a, b, c;
} row_steps;

INLINE row_steps row_steps_of(const int64_t *s) { return (row_steps){s[0], s[1], s[2]}; }

INLINE long row_at(row_steps s, long a, long b, long c) { return a * s.a + b * s.b + c * s.c; }

INLINE long block_start(long n, long block, long blocks) { return n * block / blocks; }

/* out[n] = the sum of the blocks' parts, which lie `step` apart */
static void add_parts(const REAL *parts, long blocks, long step, long n, REAL *out) {
  memcpy(out, parts, n * sizeof(REAL));
  for (long k = 1; k < blocks; k++)
    for (long i = 0; i < n; i++) out[i] += parts[k * step + i];
}

#define FOR_ROWS                                                                                                      \
  _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * C * d > WORTH_THREADS)")  \
  for (long r = 0; r < rows; r++)                                                                                     \
    for (long c = 0, a = r / B, b = r % B; c < C; c++)

INLINE void gated_row(int kind, long d, const REAL *x, const REAL *m, REAL *y) {
  ALONG(d, {
    vec v = act_of(kind, load_part(x + i, left), NULL);
    if (m) v *= load_part(m + i, left);
    store_part(y + i, left, v);
  })
}

INLINE void gated_row_back(int kind, long d, const REAL *x, const REAL *m, const REAL *g, REAL *gx, REAL *gm) {
  ALONG(d, {
    vec slope, gv = load_part(g + i, left), v = act_of(kind, load_part(x + i, left), &slope);
    if (m) {
      store_part(gm + i, left, gv * v);
      gv *= load_part(m + i, left);
    }
    store_part(gx + i, left, gv * slope);
  })
}

/* y = f(x) m, m of ones where there is none. sizes A B C d kind; pointers x m y; strides of each */
int NAME(gated_forward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  long B = sizes[1], C = sizes[2], d = sizes[3], rows = sizes[0] * B;
  const REAL *x = pointers[0], *m = pointers[1];
  REAL *y = pointers[2];
  row_steps sx = row_steps_of(strides), sm = row_steps_of(strides + 3), sy = row_steps_of(strides + 6);
  (void)threads;
  FOR_ROWS {
    const REAL *mr = m ? m + row_at(sm, a, b, c) : NULL;
    EACH_KIND(sizes[4], gated_row(KIND, d, x + row_at(sx, a, b, c), mr, y + row_at(sy, a, b, c)))
  }
  return 0;
}

/* pointers x m g gx gm */
int NAME(gated_backward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  long B = sizes[1], C = sizes[2], d = sizes[3], rows = sizes[0] * B;
  const REAL *x = pointers[0], *m = pointers[1], *g = pointers[2];
  REAL *gx = pointers[3], *gm = pointers[4];
  row_steps sx = row_steps_of(strides), sm = row_steps_of(strides + 3), sg = row_steps_of(strides + 6), sgx = row_steps_of(strides + 9),
        sgm = row_steps_of(strides + 12);
  (void)threads;
  FOR_ROWS {
    const REAL *mr = m ? m + row_at(sm, a, b, c) : NULL, *xr = x + row_at(sx, a, b, c), *gr = g + row_at(sg, a, b, c);
    REAL *gxr = gx + row_at(sgx, a, b, c), *gmr = m ? gm + row_at(sgm, a, b, c) : NULL;
    EACH_KIND(sizes[4], gated_row_back(KIND, d, xr, mr, gr, gxr, gmr))
  }
  return 0;
}

/* Norms: z = x, or x f(gate) (GATE_BEFORE); z -= mean z if centred; n = z / sqrt(sum z^2 / count + eps);
   y = scale n weight + bias; times f(gate) (GATE_AFTER). weight, bias [1 or C, d].
   sizes A B C d mode kind centred mean own-weight-a-group eps scale */
typedef struct {
  long B, C, d, rows, mode, centred, own;
  REAL count, eps, scale;
} norm_sizes;

static norm_sizes norm_of(const int64_t *z) {
  return (norm_sizes){z[1], z[2], z[3], z[0] * z[1], z[4], z[6], z[8], z[7] ? (REAL)z[3] : 1, (REAL)number(z[9]),
                      (REAL)number(z[10])};
}

/* The normed row into n, which is padded; returns 1 / sqrt(...) */
INLINE REAL norm_row(const norm_sizes *z, int kind, const REAL *x, const REAL *gate, REAL *n) {
  long d = z->d;
  vec sum = {0}, squares = {0};
  ALONG(d, {
    vec v = load_part(x + i, left);
    if (z->mode == GATE_BEFORE) v *= act_of(kind, load_part(gate + i, left), NULL);
    AT(n + i) = v;
    sum += v;
    squares += v * v;
  })
  if (z->centred) {
    REAL mean = sum_of(sum) / d;
    squares = (vec){0};
    ALONG(d, {
      vec v = load_part(n + i, left) - mean;
      AT(n + i) = v;
      v = load_part(n + i, left);
      squares += v * v;
    })
  }
  REAL scale = 1 / (REAL)sqrt(sum_of(squares) / z->count + z->eps);
  ALONG(d, AT(n + i) *= scale)
  return scale;
}

INLINE void norm_row_forward(const norm_sizes *z, int kind, const REAL *x, const REAL *w, const REAL *b, const REAL *m,
                             REAL *y, REAL *n) {
  norm_row(z, kind, x, m, n);
  ALONG(z->d, {
    vec v = AT(n + i) * z->scale;
    if (w) v *= load_part(w + i, left);
    if (b) v += load_part(b + i, left);
    if (z->mode == GATE_AFTER) v *= act_of(kind, load_part(m + i, left), NULL);
    store_part(y + i, left, v);
  })
}

/* gw, gb: sums to add to */
INLINE void norm_row_backward(const norm_sizes *z, int kind, const REAL *x, const REAL *w, const REAL *b, const REAL *m,
                              const REAL *g, REAL *gx, REAL *gw, REAL *gb, REAL *gm, REAL *n, REAL *h) {
  REAL scale = norm_row(z, kind, x, m, n);
  vec inner = {0}, sum = {0};
  ALONG(z->d, {
    vec v = load_part(n + i, left), gv = load_part(g + i, left), u = v * z->scale;
    if (z->mode == GATE_AFTER) {
      vec slope, y = u, f = act_of(kind, load_part(m + i, left), &slope);
      if (w) y *= load_part(w + i, left);
      if (b) y += load_part(b + i, left);
      store_part(gm + i, left, gv * y * slope);
      gv *= f;
    }
    if (b) store_part(gb + i, left, load_part(gb + i, left) + gv);
    if (w) {
      store_part(gw + i, left, load_part(gw + i, left) + gv * u);
      gv *= load_part(w + i, left);
    }
    gv *= z->scale;
    AT(h + i) = gv;
    inner += gv * v;
    sum += gv;
  })
  REAL share = sum_of(inner) / z->count, mean = z->centred ? sum_of(sum) / z->d : 0;
  ALONG(z->d, {
    vec v = scale * (AT(h + i) - share * AT(n + i) - mean);
    if (z->mode == GATE_BEFORE) {
      vec slope, f = act_of(kind, load_part(m + i, left), &slope);
      store_part(gm + i, left, v * load_part(x + i, left) * slope);
      v *= f;
    }
    store_part(gx + i, left, v);
  })
}

#define FOR_BLOCKS                                                                                                    \
  _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1 && z.rows * z.C * d > WORTH_THREADS)") \
  for (long block = 0; block < blocks; block++)

/* pointers x weight bias gate y; strides of x gate y */
int NAME(norm_forward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  norm_sizes z = norm_of(sizes);
  const REAL *x = pointers[0], *weight = pointers[1], *bias = pointers[2], *gate = pointers[3];
  REAL *y = pointers[4];
  row_steps sx = row_steps_of(strides), sm = row_steps_of(strides + 3), sy = row_steps_of(strides + 6);
  long d = z.d, blocks = least(BLOCKS, z.rows);
  int failed = 0;
  (void)threads;
  FOR_BLOCKS {
    arena space;
    if (!open_arena(&space, (ROUND_UP(d) + PAD) * sizeof(REAL))) {
      failed = 1;
      continue;
    }
    REAL *n = take(&space, ROUND_UP(d));
    for (long r = block_start(z.rows, block, blocks); r < block_start(z.rows, block + 1, blocks); r++)
      for (long c = 0, a = r / z.B, b = r % z.B; c < z.C; c++) {
        const REAL *xr = x + row_at(sx, a, b, c), *mr = gate ? gate + row_at(sm, a, b, c) : NULL,
                   *w = weight ? weight + z.own * c * d : NULL, *shift = bias ? bias + z.own * c * d : NULL;
        REAL *yr = y + row_at(sy, a, b, c);
        EACH_KIND(sizes[5], norm_row_forward(&z, KIND, xr, w, shift, mr, yr, n))
      }
  }
  return failed;
}

/* pointers x weight bias gate g gx gweight gbias ggate parts; strides of x gate g gx ggate.
   parts: [BLOCKS, 2, 1 or C, d], where there is a weight or a bias */
int NAME(norm_backward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  norm_sizes z = norm_of(sizes);
  const REAL *x = pointers[0], *weight = pointers[1], *bias = pointers[2], *gate = pointers[3], *g = pointers[4];
  REAL *gx = pointers[5], *gweight = pointers[6], *gbias = pointers[7], *ggate = pointers[8], *parts = pointers[9];
  row_steps sx = row_steps_of(strides), sm = row_steps_of(strides + 3), sg = row_steps_of(strides + 6), sgx = row_steps_of(strides + 9),
        sgm = row_steps_of(strides + 12);
  long d = z.d, blocks = least(BLOCKS, z.rows), weights = (z.own ? z.C : 1) * d;
  int failed = 0;
  (void)threads;
  FOR_BLOCKS {
    arena space;
    if (!open_arena(&space, 2 * (ROUND_UP(d) + PAD) * sizeof(REAL))) {
      failed = 1;
      continue;
    }
    REAL *n = take(&space, ROUND_UP(d)), *h = take(&space, ROUND_UP(d)), *sums = parts ? parts + block * 2 * weights : NULL;
    if (sums) memset(sums, 0, 2 * weights * sizeof(REAL));
    for (long r = block_start(z.rows, block, blocks); r < block_start(z.rows, block + 1, blocks); r++)
      for (long c = 0, a = r / z.B, b = r % z.B; c < z.C; c++) {
        long at = z.own * c * d;
        const REAL *xr = x + row_at(sx, a, b, c), *mr = gate ? gate + row_at(sm, a, b, c) : NULL,
                   *gr = g + row_at(sg, a, b, c), *w = weight ? weight + at : NULL, *shift = bias ? bias + at : NULL;
        REAL *gxr = gx + row_at(sgx, a, b, c), *gmr = gate ? ggate + row_at(sgm, a, b, c) : NULL,
             *gw = w ? sums + at : NULL, *gb = shift ? sums + weights + at : NULL;
        EACH_KIND(sizes[5], norm_row_backward(&z, KIND, xr, w, shift, mr, gr, gxr, gw, gb, gmr, n, h))
      }
  }
  if (gweight) add_parts(parts, blocks, 2 * weights, weights, gweight);
  if (gbias) add_parts(parts + weights, blocks, 2 * weights, weights, gbias);
  return failed;
}

/* The first 2 n numbers of a row in pairs (i, n + i), or (2 i, 2 i + 1) interleaved, turned by angles; the rest as it is.
   sizes A B C d n interleaved back; pointers x cos sin y; strides of each */
int NAME(turned)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  long B = sizes[1], C = sizes[2], d = sizes[3], n = sizes[4], rows = sizes[0] * B;
  const REAL *x = pointers[0], *cosines = pointers[1], *sines = pointers[2];
  REAL *y = pointers[3], sign = sizes[6] ? -1 : 1;
  row_steps sx = row_steps_of(strides), sc = row_steps_of(strides + 3), ss = row_steps_of(strides + 6),
            sy = row_steps_of(strides + 9);
  (void)threads;
  FOR_ROWS {
    const REAL *xr = x + row_at(sx, a, b, c), *cr = cosines + row_at(sc, a, b, c), *sr = sines + row_at(ss, a, b, c);
    REAL *yr = y + row_at(sy, a, b, c);
    if (sizes[5])
      for (long i = 0; i < n; i++) {
        REAL one = xr[2 * i], two = xr[2 * i + 1], sine = sign * sr[i];
        yr[2 * i] = one * cr[i] - two * sine;
        yr[2 * i + 1] = two * cr[i] + one * sine;
      }
    else
      ALONG(n, {
        vec one = load_part(xr + i, left), two = load_part(xr + n + i, left), cosine = load_part(cr + i, left);
        vec sine = load_part(sr + i, left) * sign;
        store_part(yr + i, left, one * cosine - two * sine);
        store_part(yr + n + i, left, two * cosine + one * sine);
      })
    memcpy(yr + 2 * n, xr + 2 * n, (d - 2 * n) * sizeof(REAL));
  }
  return 0;
}
