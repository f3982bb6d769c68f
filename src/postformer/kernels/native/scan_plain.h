/* h_t = a_t h_{t-1} + b_t, or m_t = max(a_t + m_{t-1}, b_t), over [B, T, F]: one pass over the values. Work is cut along
   B and F; what a cut changes is only who does it. An argument whose last stride is 0 is one number per token. */

#define SLICE 64 /* a multiple of any vector's length */

typedef struct {
  REAL *p;
  long b, t, f;
} NAME(field);

#define field NAME(field)

INLINE const REAL *NAME(field_at)(const field *x, long b, long t, long f) {
  return x->p + b * x->b + t * x->t + f * x->f;
}

INLINE vec NAME(get)(const REAL *x, long f, int dense) {
  vec same = (vec){0} + x[0];
  if (dense) same = LOOSE(x + f);
  return same;
}

INLINE REAL NAME(larger)(REAL x, REAL y) { return x > y || x != x ? x : y; }

INLINE vec NAME(larger_vec)(vec x, vec y) {
  typedef __typeof__(x > y) mask;
  mask first = (x > y) | (x != x);
  return (vec)(((mask)x & first) | ((mask)y & ~first));
}

/* out[n] = one token; without h the previous value counts as nothing. */
INLINE void NAME(scan_token)(const REAL *a, const REAL *b, const REAL *h, REAL *out, long n, int max_plus, int da,
                             int db) {
  const REAL nothing = (REAL)-1e30;
  long f = 0;
  for (; f + VL <= n; f += VL) {
    vec in = NAME(get)(b, f, db), by = NAME(get)(a, f, da);
    vec was = (vec){0} + nothing;
    if (h) was = LOOSE(h + f);
    if (max_plus) in = NAME(larger_vec)(by + was, in);
    else if (h) in = by * was + in;
    LOOSE(out + f) = in;
  }
  for (; f < n; f++) {
    REAL in = b[f * db], by = a[f * da];
    if (max_plus) out[f] = NAME(larger)(by + (h ? h[f] : nothing), in);
    else out[f] = h ? by * h[f] + in : in;
  }
}

/* gh = gradient of the value from later tokens, in and out. */
INLINE void NAME(scan_token_back)(const REAL *a, const REAL *h, const REAL *grad, REAL *ga, REAL *gb, REAL *gh, long n,
                                  int da, int dg) {
  long f = 0;
  for (; f + VL <= n; f += VL) {
    vec total = NAME(get)(grad, f, dg) + AT(gh + f);
    LOOSE(gb + f) = total;
    vec by_a = {0}, by_h = {0};
    if (h) {
      by_a = total * LOOSE(h + f);
      by_h = total * NAME(get)(a, f, da);
    }
    if (ga) LOOSE(ga + f) = by_a;
    AT(gh + f) = by_h;
  }
  for (; f < n; f++) {
    REAL total = grad[f * dg] + gh[f];
    gb[f] = total;
    if (ga) ga[f] = h ? total * h[f] : 0;
    gh[f] = h ? total * a[f * da] : 0;
  }
}

/* Into how many slices of F the work is cut, so that there is some for every thread. */
INLINE long NAME(slices)(long B, long F, int threads) {
  long most = (F + SLICE - 1) / SLICE, wanted = threads > 1 ? (2 * threads + B - 1) / B : 1;
  return wanted < most ? wanted : most;
}

/* Sizes: B T F, max-plus or not. Pointers: a b h0 reset h [B, T, F]. Strides: a b (batch, token, feature), reset. */
int NAME(scan_forward)(const int64_t *n, void **p, const int64_t *s, int threads) {
  long B = n[0], T = n[1], F = n[2];
  const field a = {p[0], s[0], s[1], s[2]}, b = {p[1], s[3], s[4], s[5]};
  const REAL *h0 = p[2];
  const uint8_t *reset = p[3];
  REAL *h = p[4];
  long cuts = NAME(slices)(B, F, threads), each = ((F + cuts - 1) / cuts + SLICE - 1) / SLICE * SLICE;
  int max_plus = n[3], da = a.f != 0, db = b.f != 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long item = 0; item < B * cuts; item++) {
    long r = item / cuts, f = item % cuts * each, width = least(each, F - f);
    if (width <= 0) continue;
    const REAL *was = h0 + r * F + f;
    for (long t = 0; t < T; t++) {
      const REAL *at = NAME(field_at)(&a, r, t, f), *bt = NAME(field_at)(&b, r, t, f);
      REAL *out = h + (r * T + t) * F + f;
      if (reset && reset[r * s[6] + t * s[7]]) was = NULL;
      if (max_plus) NAME(scan_token)(at, bt, was, out, width, 1, da, db);
      else if (da && db) NAME(scan_token)(at, bt, was, out, width, 0, 1, 1);
      else NAME(scan_token)(at, bt, was, out, width, 0, da, db);
      was = out;
    }
  }
  return 0;
}

/* Sizes as above. Pointers: a h0 reset h, grad of h; grads of a (or missing), b, h0. Strides: a, grad, reset. */
int NAME(scan_backward)(const int64_t *n, void **p, const int64_t *s, int threads) {
  long B = n[0], T = n[1], F = n[2];
  const field a = {p[0], s[0], s[1], s[2]}, grad = {p[4], s[3], s[4], s[5]};
  const REAL *h0 = p[1], *h = p[3];
  const uint8_t *reset = p[2];
  REAL *ga = p[5], *gb = p[6], *gh0 = p[7];
  long cuts = NAME(slices)(B, F, threads), each = ((F + cuts - 1) / cuts + SLICE - 1) / SLICE * SLICE;
  int da = a.f != 0, dg = grad.f != 0, failed = 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long item = 0; item < B * cuts; item++) {
    long r = item / cuts, f = item % cuts * each, width = least(each, F - f);
    if (width <= 0) continue;
    arena space;
    if (!open_arena(&space, each * sizeof(REAL) + 64)) {
      failed = 1;
      continue;
    }
    REAL *gh = take(&space, each);
    memset(gh, 0, each * sizeof(REAL));
    for (long t = T - 1; t >= 0; t--) {
      long at = (r * T + t) * F + f;
      const REAL *was = t ? h + at - F : h0 + r * F + f;
      const REAL *by = NAME(field_at)(&a, r, t, f), *g = NAME(field_at)(&grad, r, t, f);
      if (reset && reset[r * s[6] + t * s[7]]) was = NULL;
      if (da && dg && ga) NAME(scan_token_back)(by, was, g, ga + at, gb + at, gh, width, 1, 1);
      else NAME(scan_token_back)(by, was, g, ga ? ga + at : NULL, gb + at, gh, width, da, dg);
    }
    memcpy(gh0 + r * F + f, gh, width * sizeof(REAL));
  }
  return failed;
}

#undef field
