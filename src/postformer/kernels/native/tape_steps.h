/* Instructions of a tape that are a whole step of a memory: included by tape.h. */

#define PLACES 256

/* Places from..to-1 of a list as one query sees them, a tile of places after another: into, per head, the greatest
   logit, the sum of the weights against it, and the weighted values. A tile's keys and values lie next to each other. */
static void attend_to(const REAL *q, const REAL *list, long Hq, long Hk, long d, long from, long to, REAL scale,
                      REAL *into) {
  const long group = Hq / Hk, row = 2 * Hk * d;
  for (long h = 0; h < Hq; h++) {
    into[h * (d + 2)] = -INFINITY;
    memset(into + h * (d + 2) + 1, 0, (d + 1) * sizeof(REAL));
  }
  for (long i = from; i < to; i += VL) {
    const long tile = least(VL, to - i);
    for (long h = 0; h < Hq; h++) {
      REAL *found = into + h * (d + 2), *sums = found + 2, w[VL], top = found[0];
      const REAL *keys = list + i * row + h / group * d, *values = keys + Hk * d;
      for (long k = 0; k < VL; k++) {
        w[k] = k < tile ? dot(q + h * d, keys + k * row, d) * scale : -INFINITY;
        if (w[k] > top || w[k] != w[k]) top = w[k];
      }
      const REAL keep = (REAL)exp((double)(found[0] - top));
      LOOSE(w) = exp_of(LOOSE(w) - top);
      found[0] = top;
      found[1] = found[1] * keep + sum_of(LOOSE(w));
      long j = 0;
      for (; j + VL <= d; j += VL) {
        vec s = LOOSE(sums + j) * keep;
        for (long k = 0; k < tile; k++) s += w[k] * LOOSE(values + k * row + j);
        LOOSE(sums + j) = s;
      }
      for (; j < d; j++) {
        sums[j] *= keep;
        for (long k = 0; k < tile; k++) sums[j] += w[k] * values[k * row + j];
      }
    }
  }
}

/* One token of softmax attention. n: rows B, query heads, key heads, channels, places; y, a (query) [B, Hq, d] dense;
   b (new key and value) [B, 2, Hk, d] dense, or nothing: the list is only read; c: the list [B, places, 2, Hk, d]; d: its [B] count before the token.
   The token takes place count (mod places), and sees the last `places` tokens. alpha scales. Blocks of places are
   shared among threads and put together in order, the same for any number of threads. */
static int attend(const instruction *I, int threads) {
  const long B = I->n[0], Hq = I->n[1], Hk = I->n[2], d = I->n[3], P = I->n[4], row = 2 * Hk * d;
  const int64_t *count = (int64_t *)I->d.p;
  const long taken = I->b.p ? 1 : 0;
  long longest = 0;
  for (long b = 0; b < B; b++) {
    if (taken) memcpy(REAL_AT(&I->c) + b * I->c.s[0] + count[b] % P * row, REAL_AT(&I->b) + b * row, row * sizeof(REAL));
    if (longest < least(count[b] + taken, P)) longest = least(count[b] + taken, P);
  }
  const long blocks = (longest + PLACES - 1) / PLACES, each = Hq * (d + 2);
  arena room;
  if (!open_arena(&room, B * blocks * each * sizeof(REAL) + 256)) return 1;
  REAL *parts = take(&room, B * blocks * each);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && B * blocks > 1)
#endif
  for (long part = 0; part < B * blocks; part++) {
    const long b = part / blocks, from = part % blocks * PLACES, to = least(from + PLACES, least(count[b] + taken, P));
    if (from < to)
      attend_to(REAL_AT(&I->a) + b * Hq * d, REAL_AT(&I->c) + b * I->c.s[0], Hq, Hk, d, from, to, (REAL)I->alpha,
                parts + part * each);
  }
  for (long b = 0; b < B; b++)
    for (long h = 0; h < Hq; h++) {
      const long mine = (least(count[b] + taken, P) + PLACES - 1) / PLACES;
      const REAL *found = parts + b * blocks * each + h * (d + 2);
      REAL *y = REAL_AT(&I->y) + (b * Hq + h) * d, top = found[0], total = 0;
      for (long n = 1; n < mine; n++) {
        const REAL other = found[n * each];
        if (other > top || other != other) top = other;
      }
      memset(y, 0, d * sizeof(REAL));
      for (long n = 0; n < mine; n++) {
        const REAL *it = found + n * each, share = (REAL)exp((double)(it[0] - top));
        total += share * it[1];
        for (long j = 0; j < d; j++) y[j] += share * it[2 + j];
      }
      for (long j = 0; j < d; j++) y[j] /= total;
    }
  return 0;
}

/* One token of the selective scan. n: B, D, N; y, a (input), b (step size) [B, D]; c: [B, 2, N], what is written by
   and read from; d: state [B, D, N], overwritten; A [D, N] follows as the next instruction's a. */
static void scan_step(const instruction *I) {
  const long B = I->n[0], D = I->n[1], N = I->n[2];
  const REAL *A = REAL_AT(&(I + 1)->a);
  for (long b = 0; b < B; b++) {
    const REAL *x = REAL_AT(&I->a) + b * D, *dt = REAL_AT(&I->b) + b * D;
    const REAL *in = REAL_AT(&I->c) + b * I->c.s[0], *out = REAL_AT(&(I + 1)->b) + b * (I + 1)->b.s[0];
    for (long i = 0; i < D; i++) {
      REAL *h = REAL_AT(&I->d) + (b * D + i) * N;
      const REAL *decay = A + i * N, step = dt[i], value = dt[i] * x[i];
      vec sum = {0};
      REAL rest = 0;
      long n = 0;
      for (; n + VL <= N; n += VL) {
        vec s = exp_of(step * LOOSE(decay + n)) * LOOSE(h + n) + value * LOOSE(in + n);
        LOOSE(h + n) = s;
        sum += s * LOOSE(out + n);
      }
      for (; n < N; n++) {
        h[n] = (REAL)exp((double)(step * decay[n])) * h[n] + value * in[n];
        rest += h[n] * out[n];
      }
      REAL_AT(&I->y)[b * D + i] = sum_of(sum) + rest;
    }
  }
}
