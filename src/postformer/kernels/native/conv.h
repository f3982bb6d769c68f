/* Short causal depthwise convolution, with a bias and an activation, in one pass each way.

   a_t = bias + sum_k w_k x_{t-k} over the tokens of t's document (x_{-1}, x_{-2}, ... are the past's last), y_t = f(a_t).
   sizes B T D K kind; w [K, D], w_0 of the token itself; reset [B, T] bytes or none.
   Tokens are taken in pieces of PIECE, pieces in blocks, so that sums do not depend on the number of threads. */

#ifndef PIECE
enum { PIECE_OF_TOKENS = 256, MOST_TAPS = 64 };
#define PIECE PIECE_OF_TOKENS
#endif

typedef struct {
  long B, T, D, K, pieces;
  const REAL *x, *past, *w, *bias;
  const unsigned char *reset;
  long xb, xt, pb, pt;
} conv_of;

/* The rows that token t sees, itself first; returns how many */
INLINE long taps_of(const conv_of *z, long b, long t, const REAL **rows) {
  long n = 0;
  for (; n < z->K; n++) {
    long s = t - n;
    if (n && z->reset && s + 1 >= 0 && z->reset[b * z->T + s + 1]) break;
    if (s < 0 && !z->past) break;
    rows[n] = s >= 0 ? z->x + b * z->xb + s * z->xt : z->past + b * z->pb + (z->K - 1 + s) * z->pt;
  }
  return n;
}

INLINE vec before_activation(const conv_of *z, const REAL **rows, long n, long i, long left) {
  vec v = load_part(rows[0] + i, left) * load_part(z->w + i, left);
  if (z->bias) v += load_part(z->bias + i, left);
  for (long k = 1; k < n; k++) v += load_part(rows[k] + i, left) * load_part(z->w + k * z->D + i, left);
  return v;
}

INLINE void conv_row(int kind, const conv_of *z, const REAL **rows, long n, REAL *y) {
  ALONG(z->D, store_part(y + i, left, act_of(kind, before_activation(z, rows, n, i, left), NULL)))
}

/* gw [K, D], gb [D]: sums to add to, none for tokens of the next piece; gx: rows like `rows`, NULL where not wanted */
INLINE void conv_row_back(int kind, const conv_of *z, const REAL **rows, long n, const REAL *g, REAL **gx, int fresh,
                          REAL *gw, REAL *gb) {
  ALONG(z->D, {
    vec h = load_part(g + i, left);
    if (kind != ACT_NONE) {
      vec slope;
      act_of(kind, before_activation(z, rows, n, i, left), &slope);
      h *= slope;
    }
    if (gb) store_part(gb + i, left, load_part(gb + i, left) + h);
    for (long k = 0; k < n; k++) {
      if (gw) store_part(gw + k * z->D + i, left, load_part(gw + k * z->D + i, left) + h * load_part(rows[k] + i, left));
      if (!gx[k]) continue;
      vec v = h * load_part(z->w + k * z->D + i, left);
      if (k || !fresh) v += load_part(gx[k] + i, left);
      store_part(gx[k] + i, left, v);
    }
  })
}

static conv_of conv_from(const int64_t *sizes, void *const *pointers, const int64_t *strides) {
  return (conv_of){sizes[0], sizes[1], sizes[2], sizes[3], (sizes[1] + PIECE - 1) / PIECE, pointers[0], pointers[1],
                   pointers[2], pointers[3], pointers[4], strides[0], strides[1], strides[2], strides[3]};
}

/* pointers x past w bias reset y; strides of x past y over batch and token */
int NAME(conv_forward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  conv_of z = conv_from(sizes, pointers, strides);
  REAL *y = pointers[5];
  long tasks = z.B * z.pieces;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && z.B * z.T * z.D > WORTH_THREADS)
  for (long task = 0; task < tasks; task++) {
    long b = task / z.pieces, from = task % z.pieces * PIECE;
    const REAL *rows[MOST_TAPS];
    for (long t = from; t < least(from + PIECE, z.T); t++) {
      long n = taps_of(&z, b, t, rows);
      EACH_KIND(sizes[4], conv_row(KIND, &z, rows, n, y + b * strides[4] + t * strides[5]))
    }
  }
  return 0;
}

/* pointers x past w bias reset g gx gpast gw gbias parts; strides of x past g gx. sizes[5]: add to gx.
   gpast [B, K - 1, D] of zeros or none; gw [K, D]; parts [BLOCKS, K + 1, D] */
int NAME(conv_backward)(const int64_t *sizes, void *const *pointers, const int64_t *strides, int threads) {
  conv_of z = conv_from(sizes, pointers, strides);
  const REAL *g = pointers[5];
  REAL *gx = pointers[6], *gpast = pointers[7], *gw = pointers[8], *gbias = pointers[9], *parts = pointers[10];
  long tasks = z.B * z.pieces, blocks = least(BLOCKS, tasks), weights = z.K * z.D, step = weights + z.D;
  int fresh = !sizes[5];
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && z.B * z.T * z.D > WORTH_THREADS)
  for (long block = 0; block < blocks; block++) {
    REAL *sums = parts + block * step;
    memset(sums, 0, step * sizeof(REAL));
    for (long task = block_start(tasks, block, blocks); task < block_start(tasks, block + 1, blocks); task++) {
      long b = task / z.pieces, from = task % z.pieces * PIECE, to = least(from + PIECE, z.T);
      const REAL *rows[MOST_TAPS];
      REAL *out[MOST_TAPS];
      for (long t = from; t < least(to + z.K - 1, z.T); t++) { /* what later tokens give to this piece's, too */
        long n = taps_of(&z, b, t, rows), wanted = 0;
        for (long k = 0; k < n; k++) {
          long s = t - k;
          out[k] = s >= to ? NULL : s >= from ? gx + b * strides[6] + s * strides[7]
                 : s < 0 && from == 0 && gpast ? gpast + (b * (z.K - 1) + z.K - 1 + s) * z.D : NULL;
          wanted += out[k] != NULL;
        }
        if (!wanted) break;
        REAL *sum_w = t < to ? sums : NULL, *sum_b = t < to && z.bias ? sums + weights : NULL;
        const REAL *gr = g + b * strides[4] + t * strides[5];
        EACH_KIND(sizes[4], conv_row_back(KIND, &z, rows, n, gr, out, fresh, sum_w, sum_b))
      }
    }
  }
  add_parts(parts, blocks, step, weights, gw);
  if (gbias) add_parts(parts + weights, blocks, step, z.D, gbias);
  return 0;
}
