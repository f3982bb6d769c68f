/* The general diagonal + rank-one recurrence in chunks, one (batch row, head) after another: see gdr/chunk.py for the
   equations. Included once for float and once for double.

   Rows read (q, one per token) or erase (e, R per token); columns (w, and k_add) are what they see, R per token; rows of
   tokens and micro-steps follow one another in time, r = token * R + micro-step. L = C * R rows of a chunk, padded.

   With a decay per head, a table holds the decay from every column to every row. With a decay per channel, runs of PAD
   rows are walked through as the recurrence says, with the columns decaying on the way; rows of a later run see them
   through one product. Decays only ever multiply: no exponent is positive, nothing is divided by a decay. The backward
   pass is the same walk backwards; what a decay's gradient collects is a sum, never a difference. */

typedef struct {
  const REAL *p;
  long b, h, t;
} NAME(input);

typedef struct {
  REAL *p;
  long b, h, t;
} NAME(output);

typedef struct {
  long B, H, T, dk, dv, C, R, decay, early_erase, early_read, states, N; /* decay: 0 none, 1 per head, 2 per channel */
  long L, Lp, Cp, K, V;                                                 /* padded sizes; K of keys, V of values */
  int erases, adds;
} NAME(sizes);

/* What stands inside one chunk. Families of columns: w first where there are any, then k_add. */
typedef struct {
  REAL *q, *e, *col[2], *written[2]; /* written: delta, v_add */
  REAL *colT[2];                     /* columns by channel, [K, Lp] */
  REAL *decay;                       /* exp(g): [C] per head, [C, K] per channel */
  REAL *Me[2], *Mq[2];               /* rows against columns: [Lp, Lp], [Cp, Lp] */
  REAL *Pe, *Pq;                     /* per head: the decay from column to row */
  REAL *es, *qs;                     /* rows decayed from the chunk's start */
  REAL *es_of, *qs_of, *end_of;      /* per head: their factors, and each column's decay to the end */
  REAL *ce[2];                       /* columns decayed to the chunk's end: [Lp, K] per head, [K, Lp] per channel */
  REAL *own[2];                      /* per channel, backward: columns decayed to the end of their run, [Lp, K] */
  REAL *er, *qr;                     /* per channel: rows decayed from the start of their run */
  REAL *run;                         /* per channel: the decay of each run, [Lp / PAD, K] */
  REAL *whole;                       /* [K]: the decay of the chunk */
} NAME(chunk);

#define sizes NAME(sizes)
#define chunk NAME(chunk)
#define input NAME(input)
#define output NAME(output)

/* The tokens whose reads happen at rows [r0, r1). */
INLINE void NAME(readers)(const sizes *z, long r0, long r1, long *t0, long *t1) {
  long shift = z->early_read ? 0 : z->R - 1;
  *t0 = r0 <= shift ? 0 : (r0 - shift + z->R - 1) / z->R;
  *t1 = r1 <= shift ? 0 : least((r1 - shift + z->R - 1) / z->R, z->C);
}

/* How many columns the reads of tokens before t1 may see. */
INLINE long NAME(seen)(const sizes *z, long t1) { return least(ROUND_UP(t1 * z->R), z->Lp); }

static void NAME(load)(REAL *tile, long ld, long rows, const input *x, long b, long h, long t, long n, long d) {
  const REAL *from = x->p ? x->p + b * x->b + h * x->h + t * x->t : NULL;
  if (!from) n = 0;
  for (long i = 0; i < n; i++) {
    memcpy(tile + i * ld, from + i * x->t, d * sizeof(REAL));
    for (long j = d; j < ld; j++) tile[i * ld + j] = 0;
  }
  memset(tile + n * ld, 0, (rows - n) * ld * sizeof(REAL));
}

static void NAME(store)(const REAL *tile, long ld, const output *x, long b, long h, long t, long n, long d) {
  if (!x->p) return;
  REAL *to = x->p + b * x->b + h * x->h + t * x->t;
  for (long i = 0; i < n; i++) memcpy(to + i * x->t, tile + i * ld, d * sizeof(REAL));
}

static void NAME(load_decay)(const sizes *z, chunk *c, const input *g, long b, long h, long t, long n) {
  if (z->decay == 2) {
    NAME(load)(c->decay, z->K, z->Cp, g, b, h, t, n, z->dk);
    for (long i = 0; i < z->Cp * z->K; i += VL) AT(c->decay + i) = exp_of(AT(c->decay + i));
  } else {
    for (long i = 0; i < z->Cp; i++)
      c->decay[i] = z->decay && i < n ? g->p[b * g->b + h * g->h + (t + i) * g->t] : 0;
    if (z->decay)
      for (long i = 0; i < z->Cp; i += VL) AT(c->decay + i) = exp_of(AT(c->decay + i));
    else
      fill(c->decay, z->Cp, 1);
  }
}

/* ---- one decay per head ---- */

/* Pe, Pq, es_of, qs_of, end_of, whole. */
static void NAME(head_decays)(const sizes *z, chunk *c) {
  long L = z->L, Lp = z->Lp, R = z->R;
  REAL *now = c->end_of, since = 1;
  memset(now, 0, Lp * sizeof(REAL));
  for (long r = 0; r < Lp; r++) {
    long t = r / R, m = r % R, upto = least(ROUND_UP(r + 1), Lp);
    REAL *pe = c->Pe + r * Lp;
    if (r >= L) {
      memset(pe, 0, Lp * sizeof(REAL));
      c->es_of[r] = 0;
      continue;
    }
    if (m == 0) {
      if (z->early_read) {
        memcpy(c->Pq + t * Lp, now, Lp * sizeof(REAL));
        c->qs_of[t] = since;
      }
      if (z->early_erase) {
        memcpy(pe, now, Lp * sizeof(REAL));
        c->es_of[r] = since;
      }
      scale_by(now, c->decay[t], upto);
      since *= c->decay[t];
    }
    if (m || !z->early_erase) {
      memcpy(pe, now, Lp * sizeof(REAL));
      c->es_of[r] = since;
    }
    now[r] = 1;
    if (m == R - 1 && !z->early_read) {
      memcpy(c->Pq + t * Lp, now, Lp * sizeof(REAL));
      c->qs_of[t] = since;
    }
  }
  for (long t = z->C; t < z->Cp; t++) {
    memset(c->Pq + t * Lp, 0, Lp * sizeof(REAL));
    c->qs_of[t] = 0;
  }
  fill(c->whole, z->K, since);
}

static void NAME(scale_rows)(const REAL *x, const REAL *by, REAL *out, long rows, long ld) {
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < ld; j += VL) AT(out + i * ld + j) = AT(x + i * ld + j) * by[i];
}

static void NAME(inside_head)(const sizes *z, chunk *c) {
  long Lp = z->Lp, K = z->K;
  NAME(head_decays)(z, c);
  NAME(scale_rows)(c->q, c->qs_of, c->qs, z->Cp, K);
  if (z->erases) NAME(scale_rows)(c->e, c->es_of, c->es, Lp, K);
  for (int f = 0; f < 2; f++) {
    if (!c->col[f]) continue;
    transpose(c->col[f], K, Lp, K, c->colT[f], Lp);
    NAME(scale_rows)(c->col[f], c->end_of, c->ce[f], Lp, K);
    for (long r = 0; z->erases && r < Lp; r += PAD) {
      REAL *M = c->Me[f] + r * Lp;
      gemm(PAD, r + PAD, K, c->e + r * K, K, 1, c->colT[f], Lp, M, Lp, 1, 0);
      for (long i = 0; i < PAD; i++) scale_row(M + i * Lp, c->Pe + (r + i) * Lp, r + PAD);
    }
    for (long t = 0; t < z->Cp; t += PAD) {
      long upto = NAME(seen)(z, t + PAD);
      REAL *M = c->Mq[f] + t * Lp;
      gemm(PAD, upto, K, c->q + t * K, K, 1, c->colT[f], Lp, M, Lp, 1, 0);
      for (long i = 0; i < PAD; i++) scale_row(M + i * Lp, c->Pq + (t + i) * Lp, upto);
    }
  }
}

/* ---- one decay per channel ---- */

/* Decay the columns of one run [K, PAD] by D (or not), put in column `born` (or none), and let x (or nothing) see them. */
INLINE void NAME(walk)(REAL *now, long K, const REAL *D, const REAL *colT, long ld, long born, const REAL *x, REAL *out) {
  vec seen[2][PAD / VL], at[PAD / VL];
  for (long v = 0; v < PAD / VL; v++) {
    seen[0][v] = seen[1][v] = (vec){0};
    for (long i = 0; i < VL; i++) at[v][i] = v * VL + i == born;
  }
  for (long d = 0; d < K; d += 2)
    UNROLL for (long o = 0; o < 2; o++) UNROLL for (long v = 0; v < PAD / VL; v++) {
      vec y = AT(now + (d + o) * PAD + v * VL);
      if (D) y *= D[d + o];
      if (colT) y += at[v] * AT(colT + (d + o) * ld + v * VL);
      if (D || colT) AT(now + (d + o) * PAD + v * VL) = y;
      if (x) seen[o][v] += x[d + o] * y;
    }
  if (out)
    for (long v = 0; v < PAD / VL; v++) AT(out + v * VL) = seen[0][v] + seen[1][v];
}

/* Rows x since the run's start (xr) and since the chunk's (xs). */
INLINE void NAME(since)(const REAL *x, const REAL *run, const REAL *all, REAL *xr, REAL *xs, long K) {
  for (long d = 0; d < K; d += VL) {
    AT(xr + d) = AT(x + d) * AT(run + d);
    AT(xs + d) = AT(x + d) * AT(all + d);
  }
}

static void NAME(inside_channel)(const sizes *z, chunk *c, REAL *now0, REAL *now1, REAL *row, int backward) {
  long L = z->L, Lp = z->Lp, K = z->K, R = z->R;
  REAL *now[2] = {now0, now1};
  fill(c->whole, K, 1);
  if (z->erases) memset(c->es, 0, Lp * K * sizeof(REAL));
  if (z->erases) memset(c->er, 0, Lp * K * sizeof(REAL));
  memset(c->qs, 0, z->Cp * K * sizeof(REAL));
  memset(c->qr, 0, z->Cp * K * sizeof(REAL));
  for (int f = 0; f < 2; f++) {
    if (!c->col[f]) continue;
    transpose(c->col[f], K, Lp, K, c->colT[f], Lp);
    if (z->erases) memset(c->Me[f], 0, Lp * Lp * sizeof(REAL));
    memset(c->Mq[f], 0, z->Cp * Lp * sizeof(REAL));
  }
  for (long r0 = 0; r0 < Lp; r0 += PAD) {
    REAL *run = c->run + r0 / PAD * K;
    long r1 = least(r0 + PAD, L), t0, t1;
    fill(run, K, 1);
    for (int f = 0; f < 2; f++)
      if (c->col[f]) memset(now[f], 0, K * PAD * sizeof(REAL));
    for (long r = r0; r < r1; r++) {
      long t = r / R, m = r % R, lane = r - r0;
      int early = z->early_erase && m == 0;
      const REAL *D = m ? NULL : c->decay + t * K;
      if (m == 0 && z->early_read) {
        for (int f = 0; f < 2; f++)
          if (c->col[f]) NAME(walk)(now[f], K, NULL, NULL, 0, -1, c->q + t * K, c->Mq[f] + t * Lp + r0);
        NAME(since)(c->q + t * K, run, c->whole, c->qr + t * K, c->qs + t * K, K);
      }
      if (z->erases && early) {
        for (int f = 0; f < 2; f++)
          if (c->col[f]) NAME(walk)(now[f], K, NULL, NULL, 0, -1, c->e + r * K, c->Me[f] + r * Lp + r0);
        NAME(since)(c->e + r * K, run, c->whole, c->er + r * K, c->es + r * K, K);
      }
      if (D) {
        scale_row(run, D, K);
        scale_row(c->whole, D, K);
      }
      int sees = z->erases && !early;
      for (int f = 0; f < 2; f++) {
        if (!c->col[f]) continue;
        if (sees && D)
          NAME(walk)(now[f], K, D, NULL, 0, -1, c->e + r * K, c->Me[f] + r * Lp + r0);
        else if (sees)
          NAME(walk)(now[f], K, NULL, NULL, 0, -1, c->e + r * K, c->Me[f] + r * Lp + r0);
        else if (D)
          NAME(walk)(now[f], K, D, NULL, 0, -1, NULL, NULL);
        if (m == R - 1 && !z->early_read)
          NAME(walk)(now[f], K, NULL, c->colT[f] + r0, Lp, lane, c->q + t * K, c->Mq[f] + t * Lp + r0);
        else
          for (long d = 0; d < K; d++) now[f][d * PAD + lane] = c->col[f][r * K + d];
      }
      if (sees) NAME(since)(c->e + r * K, run, c->whole, c->er + r * K, c->es + r * K, K);
      if (m == R - 1 && !z->early_read)
        NAME(since)(c->q + t * K, run, c->whole, c->qr + t * K, c->qs + t * K, K);
    }
    NAME(readers)(z, r0, r0 + PAD, &t0, &t1);
    for (int f = 0; f < 2; f++) {
      if (!c->col[f]) continue;
      REAL *ce = c->ce[f];
      if (r0) {
        if (z->erases) gemm(PAD, r0, K, c->er + r0 * K, K, 1, ce, Lp, c->Me[f] + r0 * Lp, Lp, 1, 0);
        if (t1 > t0) gemm(t1 - t0, r0, K, c->qr + t0 * K, K, 1, ce, Lp, c->Mq[f] + t0 * Lp, Lp, 1, 0);
        for (long d = 0; d < K; d++) scale_by(ce + d * Lp, run[d], r0);
      }
      for (long d = 0; d < K; d++) memcpy(ce + d * Lp + r0, now[f] + d * PAD, PAD * sizeof(REAL));
      if (backward) transpose(now[f], PAD, K, PAD, c->own[f] + r0 * K, K);
    }
  }
  (void)row;
}

#define INSIDE(z, c, backward)                                                                                        \
  do {                                                                                                                \
    if ((z)->decay == 2)                                                                                              \
      NAME(inside_channel)(z, c, now0, now1, NULL, backward);                                                         \
    else                                                                                                              \
      NAME(inside_head)(z, c);                                                                                        \
  } while (0)

/* Strides of a column decayed to the end, element (row, channel). */
#define CE_ROW(z) ((z)->decay == 2 ? 1 : (z)->K)
#define CE_CHANNEL(z) ((z)->decay == 2 ? (z)->Lp : 1)

/* (I + A) X = X in place, A strictly lower. */
static void NAME(solve)(const REAL *A, long Lp, REAL *X, long V) {
  for (long r0 = 0; r0 < Lp; r0 += PAD) {
    if (r0) gemm(PAD, V, r0, A + r0 * Lp, Lp, 1, X, V, X + r0 * V, V, -1, 1);
    for (long r = r0 + 1; r < r0 + PAD; r++)
      for (long v = 0; v < V; v += VL) {
        vec x = AT(X + r * V + v);
        for (long i = r0; i < r; i++) x -= A[r * Lp + i] * AT(X + i * V + v);
        AT(X + r * V + v) = x;
      }
  }
}

/* (I + A)^T X = X in place. */
static void NAME(solve_transposed)(const REAL *A, long Lp, REAL *X, long V) {
  for (long r0 = Lp - PAD; r0 >= 0; r0 -= PAD) {
    long below = r0 + PAD;
    if (below < Lp) gemm(PAD, V, Lp - below, A + below * Lp + r0, 1, Lp, X + below * V, V, X + r0 * V, V, -1, 1);
    for (long r = below - 2; r >= r0; r--)
      for (long v = 0; v < V; v += VL) {
        vec x = AT(X + r * V + v);
        for (long i = r + 1; i < below; i++) x -= A[i * Lp + r] * AT(X + i * V + v);
        AT(X + r * V + v) = x;
      }
  }
}

/* out (+)= alpha M x for a lower M [Lp, Lp] by blocks of PAD rows. */
static void NAME(lower)(const REAL *M, long Lp, const REAL *x, long width, REAL *out, REAL alpha, int add) {
  for (long r = 0; r < Lp; r += PAD)
    gemm(PAD, width, r + PAD, M + r * Lp, Lp, 1, x, width, out + r * width, width, alpha, add);
}

static void NAME(lower_transposed)(const REAL *M, long Lp, const REAL *x, long width, REAL *out, REAL alpha, int add) {
  for (long r = 0; r < Lp; r += PAD)
    gemm(PAD, width, Lp - r, M + r * Lp + r, 1, Lp, x + r * width, width, out + r * width, width, alpha, add);
}

/* The same for reads: rows are tokens. */
static void NAME(reads)(const sizes *z, const REAL *M, const REAL *x, long width, REAL *out, REAL alpha, int add) {
  for (long t = 0; t < z->Cp; t += PAD)
    gemm(PAD, width, NAME(seen)(z, t + PAD), M + t * z->Lp, z->Lp, 1, x, width, out + t * width, width, alpha, add);
}

static void NAME(reads_transposed)(const sizes *z, const REAL *M, const REAL *x, long width, REAL *out, REAL alpha,
                                   int add) {
  for (long r = 0; r < z->Lp; r += PAD) {
    long t = r / z->R / PAD * PAD; /* reads of earlier tokens see nothing of these columns */
    if (t >= z->Cp) t = z->Cp - PAD;
    gemm(PAD, width, z->Cp - t, M + t * z->Lp + r, 1, z->Lp, x + t * width, width, out + r * width, width, alpha, add);
  }
}

static long NAME(chunk_memory)(const sizes *z) {
  long Lp = z->Lp, Cp = z->Cp, K = z->K;
  return Cp * K * 3 + Lp * K * 3 + Lp * (K + z->V) * 2 + Lp * K * 6 + Cp * K + 2 * Lp * Lp * 2 + 2 * Cp * Lp +
         Lp * Lp + Cp * Lp + Lp * 4 + Cp + Lp / PAD * K + K * 2 + 2 * K * PAD + 64 * PAD;
}

static void NAME(lay_out)(const sizes *z, chunk *c, arena *a, int backward) {
  long Lp = z->Lp, Cp = z->Cp, K = z->K, V = z->V;
  int has[2] = {z->erases, z->adds};
  memset(c, 0, sizeof *c);
  c->q = take(a, Cp * K);
  c->qs = take(a, Cp * K);
  if (z->decay == 2) {
    c->qr = take(a, Cp * K);
    c->decay = take(a, Cp * K);
    c->run = take(a, Lp / PAD * K);
  } else {
    c->decay = take(a, Cp);
    c->Pe = take(a, Lp * Lp);
    c->Pq = take(a, Cp * Lp);
    c->es_of = take(a, Lp);
    c->qs_of = take(a, Cp);
    c->end_of = take(a, Lp);
  }
  if (z->erases) {
    c->e = take(a, Lp * K);
    c->es = take(a, Lp * K);
    if (z->decay == 2) c->er = take(a, Lp * K);
  }
  for (int f = 0; f < 2; f++) {
    if (!has[f]) continue;
    c->col[f] = take(a, Lp * K);
    c->written[f] = take(a, Lp * V);
    c->colT[f] = take(a, Lp * K);
    c->ce[f] = take(a, Lp * K);
    c->Mq[f] = take(a, Cp * Lp);
    if (z->erases) c->Me[f] = take(a, Lp * Lp);
    if (backward && z->decay == 2) c->own[f] = take(a, Lp * K);
  }
  c->whole = take(a, K);
}

static void NAME(load_chunk)(const sizes *z, chunk *c, const input *x, long b, long h, long t, long n) {
  long R = z->R, dk = z->dk;
  NAME(load)(c->q, z->K, z->Cp, &x[0], b, h, t, n, dk);
  NAME(load_decay)(z, c, &x[1], b, h, t, n);
  if (z->erases) {
    NAME(load)(c->col[0], z->K, z->Lp, &x[2], b, h, t * R, n * R, dk);
    NAME(load)(c->e, z->K, z->Lp, &x[3], b, h, t * R, n * R, dk);
  }
  if (z->adds) {
    NAME(load)(c->col[1], z->K, z->Lp, &x[5], b, h, t * R, n * R, dk);
    NAME(load)(c->written[1], z->V, z->Lp, &x[6], b, h, t * R, n * R, z->dv);
  }
}

static sizes NAME(read_sizes)(const int64_t *n) {
  sizes z = {.B = n[0], .H = n[1], .T = n[2], .dk = n[3], .dv = n[4], .C = n[5], .R = n[6], .decay = n[7],
             .early_erase = n[8], .early_read = n[9], .states = n[10], .erases = (int)n[11], .adds = (int)n[12]};
  z.N = (z.T + z.C - 1) / z.C;
  z.L = z.C * z.R;
  z.Lp = ROUND_UP(z.L);
  z.Cp = ROUND_UP(z.C);
  z.K = ROUND_UP(z.dk);
  z.V = ROUND_UP(z.dv);
  return z;
}

/* q g w e u k v */
static void NAME(read_inputs)(input *x, void **p, const int64_t *strides) {
  for (int i = 0; i < 7; i++) x[i] = (input){p[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
}

/* Pointers: q g w e u k v | start, o, last, states [N, G, dk, dv], delta [N, G, L, dv]; strides of q .. v and o. */
int NAME(gdr_forward)(const int64_t *n, void **p, const int64_t *strides, int threads) {
  const sizes whole = NAME(read_sizes)(n), *z = &whole;
  input x[7];
  NAME(read_inputs)(x, p, strides);
  output o = {p[8], strides[21], strides[22], strides[23]};
  const REAL *start = p[7];
  REAL *last = p[9], *states = p[10], *deltas = p[11];
  long G = z->B * z->H, K = z->K, V = z->V, dk = z->dk, dv = z->dv;
  int failed = 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (long G0 = 0; G0 < G; G0++) {
    long b = G0 / z->H, h = G0 % z->H;
    arena a;
    if (!open_arena(&a, (NAME(chunk_memory)(z) + K * V + z->Cp * V + z->Lp * V + 2 * K * PAD) * sizeof(REAL) + 65536)) {
      failed = 1;
      continue;
    }
    chunk c;
    NAME(lay_out)(z, &c, &a, 0);
    REAL *S = take(&a, K * V), *out = take(&a, z->Cp * V), *now0 = take(&a, K * PAD), *now1 = take(&a, K * PAD);
    memset(S, 0, K * V * sizeof(REAL));
    for (long d = 0; d < dk; d++) memcpy(S + d * V, start + (G0 * dk + d) * dv, dv * sizeof(REAL));
    for (long m = 0; m < z->N; m++) {
      long t = m * z->C, tokens = least(z->C, z->T - t);
      if (z->states)
        for (long d = 0; d < dk; d++) memcpy(states + ((m * G + G0) * dk + d) * dv, S + d * V, dv * sizeof(REAL));
      NAME(load_chunk)(z, &c, x, b, h, t, tokens);
      INSIDE(z, &c, 0);
      REAL *X = c.written[0];
      if (z->erases) {
        NAME(load)(X, V, z->Lp, &x[4], b, h, t * z->R, tokens * z->R, dv);
        if (z->adds) NAME(lower)(c.Me[1], z->Lp, c.written[1], V, X, -1, 1);
        gemm(z->Lp, V, K, c.es, K, 1, S, V, X, V, -1, 1);
        NAME(solve)(c.Me[0], z->Lp, X, V);
        for (long r = 0; deltas && r < z->L; r++) { /* zeros where there is no token */
          REAL *to = deltas + ((m * G + G0) * z->L + r) * dv;
          if (r < tokens * z->R)
            memcpy(to, X + r * V, dv * sizeof(REAL));
          else
            memset(to, 0, dv * sizeof(REAL));
        }
      }
      gemm(z->Cp, V, K, c.qs, K, 1, S, V, out, V, 1, 0);
      for (long d = 0; d < K; d++) scale_by(S + d * V, c.whole[d], V);
      for (int f = 0; f < 2; f++)
        if (c.col[f]) {
          NAME(reads)(z, c.Mq[f], c.written[f], V, out, 1, 1);
          gemm(K, V, z->Lp, c.ce[f], CE_CHANNEL(z), CE_ROW(z), c.written[f], V, S, V, 1, 1);
        }
      NAME(store)(out, V, &o, b, h, t, tokens, dv);
    }
    for (long d = 0; d < dk; d++) memcpy(last + (G0 * dk + d) * dv, S + d * V, dv * sizeof(REAL));
  }
  return failed;
}

#include "gdr_backward.h"
#undef sizes
#undef chunk
#undef input
#undef output
