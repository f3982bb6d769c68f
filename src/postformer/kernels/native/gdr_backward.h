/* The backward pass of gdr.h: the inside of each chunk is made again, then mirrored. */

typedef struct {
  REAL *q, *e, *col[2];   /* of the arguments */
  REAL *Me[2], *Mq[2];    /* of rows against columns */
  REAL *qs, *es, *ce[2];  /* of rows decayed from the start, columns decayed to the end [Lp, K] */
  REAL *decay, *whole;    /* of log-decays; of the log-decay of the whole chunk by the state that passes, [K] */
  REAL *Fe, *Fq;          /* per head: gradients of the exponents in the tables */
  REAL *before, *er, *qr; /* per channel: columns at the end of the run before; rows since the run's start */
} NAME(gradients);

#define gradients NAME(gradients)

INLINE REAL NAME(dot)(const REAL *x, const REAL *y, long n) {
  vec s = {0};
  for (long i = 0; i < n; i += VL) s += AT(x + i) * AT(y + i);
  return sum_of(s);
}

/* out += by[i] x[i], row by row; returns nothing, flows[i] += <x[i], scaled[i]> */
static void NAME(unscale_rows)(const REAL *x, const REAL *scaled, const REAL *by, REAL *out, REAL *flows, long rows,
                               long ld) {
  for (long i = 0; i < rows; i++) {
    for (long j = 0; j < ld; j += VL) AT(out + i * ld + j) += AT(x + i * ld + j) * by[i];
    flows[i] += NAME(dot)(x + i * ld, scaled + i * ld, ld);
  }
}

/* One row of a table M = (rows against columns) . P: its gradient becomes that of the product, F gets that of the
   exponents in P. */
INLINE void NAME(through_decay)(REAL *grad, const REAL *M, const REAL *P, REAL *F, long upto, int first) {
  for (long i = 0; i < upto; i += VL) {
    vec d = AT(grad + i), flow = d * AT(M + i);
    if (!first) flow += AT(F + i);
    AT(F + i) = flow;
    AT(grad + i) = d * AT(P + i);
  }
}

static void NAME(inside_head_backward)(const sizes *z, chunk *c, gradients *g, REAL *flows) {
  long Lp = z->Lp, Cp = z->Cp, K = z->K, R = z->R;
  REAL *passing = flows, *from_e = flows + Lp, *from_q = flows + 2 * Lp;
  memset(flows, 0, (2 * Lp + Cp) * sizeof(REAL));
  memset(g->q, 0, Cp * K * sizeof(REAL));
  if (z->erases) memset(g->e, 0, Lp * K * sizeof(REAL));
  NAME(unscale_rows)(g->qs, c->qs, c->qs_of, g->q, from_q, Cp, K);
  if (z->erases) NAME(unscale_rows)(g->es, c->es, c->es_of, g->e, from_e, Lp, K);
  int first = 1;
  for (int f = 0; f < 2; f++) {
    if (!c->col[f]) continue;
    memset(g->col[f], 0, Lp * K * sizeof(REAL));
    NAME(unscale_rows)(g->ce[f], c->ce[f], c->end_of, g->col[f], passing, Lp, K);
    for (long r = 0; z->erases && r < Lp; r++) {
      long at = r * Lp;
      NAME(through_decay)(g->Me[f] + at, c->Me[f] + at, c->Pe + at, g->Fe + at, ROUND_UP(r + 1), first);
    }
    for (long t = 0; t < Cp; t++) {
      long at = t * Lp;
      NAME(through_decay)(g->Mq[f] + at, c->Mq[f] + at, c->Pq + at, g->Fq + at, NAME(seen)(z, ROUND_UP(t + 1)), first);
    }
    NAME(reads)(z, g->Mq[f], c->col[f], K, g->q, 1, 1);
    NAME(reads_transposed)(z, g->Mq[f], c->q, K, g->col[f], 1, 1);
    if (z->erases) {
      NAME(lower)(g->Me[f], Lp, c->col[f], K, g->e, 1, 1);
      NAME(lower_transposed)(g->Me[f], Lp, c->e, K, g->col[f], 1, 1);
    }
    first = 0;
  }
  if (!z->decay) return;
  REAL start = 0;
  for (long d = 0; d < K; d++) start += g->whole[d];
  for (long r = z->L - 1; r >= 0; r--) {
    long t = r / R, m = r % R;
    REAL *Fq = g->Fq + t * Lp, *Fe = g->Fe + r * Lp;
#define ADD_READ                                                                                                      \
  {                                                                                                                   \
    long upto = NAME(seen)(z, ROUND_UP(t + 1));                                                                       \
    for (long i = 0; i < upto; i += VL) AT(passing + i) += AT(Fq + i);                                                \
    start += from_q[t];                                                                                               \
  }
#define ADD_ERASE                                                                                                     \
  if (z->erases) {                                                                                                    \
    for (long i = 0; i < r; i += VL) AT(passing + i) += AT(Fe + i);                                                   \
    start += from_e[r];                                                                                               \
  }
    int early = z->early_erase && m == 0;
    if (m == R - 1 && !z->early_read) ADD_READ
    passing[r] = 0; /* born here: the decays before do not touch it */
    if (!early) ADD_ERASE
    if (m == 0) {
      vec s = {0};
      for (long i = 0; i < r; i += VL) s += AT(passing + i);
      g->decay[t] = start + sum_of(s);
    }
    if (early) ADD_ERASE
    if (m == 0 && z->early_read) ADD_READ
  }
}

/* One vector of channels of one run of rows, walked backwards. */
static void NAME(run_backward)(const sizes *z, const chunk *c, gradients *g, long r0, long d, vec base, vec prefix) {
  long K = z->K, R = z->R, Lp = z->Lp, r1 = least(r0 + PAD, z->L), n = r1 - r0;
  vec at[2][PAD][PAD], grad[2][PAD], since[PAD], run = (vec){0} + 1, earlier[PAD];
  for (long r = 0; r < n; r++) {
    long row = r0 + r, t = row / R;
    int decays = row % R == 0;
    vec D = AT(c->decay + t * K + d);
    earlier[r] = run;
    vec step = (vec){0} + 1;
    if (decays) step = D;
    run *= step;
    since[r] = run;
    for (int f = 0; f < 2; f++) {
      if (!c->col[f]) continue;
      for (long i = 0; i < r; i++) at[f][r][i] = at[f][r - 1][i] * step;
      at[f][r][r] = AT(c->col[f] + row * K + d);
    }
  }
  for (int f = 0; f < 2; f++)
    if (c->col[f])
      for (long i = 0; i < n; i++) grad[f][i] = AT(g->ce[f] + (r0 + i) * K + d);
  vec rows = base;
#define SEE(M, x, gx, xr, gxr, gxs, factor, line, upto)                                                               \
  {                                                                                                                   \
    vec value = AT(x), total = {0};                                                                                   \
    for (int f = 0; f < 2; f++) {                                                                                     \
      if (!c->col[f]) continue;                                                                                       \
      const REAL *a = (M)[f];                                                                                         \
      for (long i = 0; i < (upto); i++) {                                                                             \
        total += a[i] * at[f][line][i];                                                                               \
        grad[f][i] += a[i] * value;                                                                                   \
      }                                                                                                               \
    }                                                                                                                 \
    vec outside = AT(gxr) + AT(gxs) * prefix;                                                                         \
    AT(gx) = total + outside * factor;                                                                                \
    rows += outside * AT(xr);                                                                                         \
  }
#define SEE_READ(factor, line, upto)                                                                                  \
  {                                                                                                                   \
    const REAL *M[2] = {g->Mq[0] ? g->Mq[0] + t * Lp + r0 : NULL, g->Mq[1] ? g->Mq[1] + t * Lp + r0 : NULL};          \
    long o = t * K + d;                                                                                               \
    SEE(M, c->q + o, g->q + o, c->qr + o, g->qr + o, g->qs + o, factor, line, upto)                                   \
  }
#define SEE_ERASE(factor, line, upto)                                                                                 \
  {                                                                                                                   \
    const REAL *M[2] = {g->Me[0] ? g->Me[0] + row * Lp + r0 : NULL, g->Me[1] ? g->Me[1] + row * Lp + r0 : NULL};      \
    long o = row * K + d;                                                                                             \
    SEE(M, c->e + o, g->e + o, c->er + o, g->er + o, g->es + o, factor, line, upto)                                   \
  }
  for (long r = n - 1; r >= 0; r--) {
    long row = r0 + r, t = row / R, m = row % R;
    int early = z->early_erase && m == 0;
    if (m == R - 1 && !z->early_read) SEE_READ(since[r], r, r + 1)
    for (int f = 0; f < 2; f++)
      if (c->col[f]) AT(g->col[f] + row * K + d) = grad[f][r];
    if (z->erases && !early) SEE_ERASE(since[r], r, r)
    if (m == 0) {
      vec flow = rows, D = AT(c->decay + t * K + d);
      for (int f = 0; f < 2; f++) {
        if (!c->col[f]) continue;
        for (long i = 0; i < r; i++) {
          flow += grad[f][i] * at[f][r][i];
          grad[f][i] *= D;
        }
      }
      AT(g->decay + t * K + d) = flow;
    }
    if (z->erases && early) SEE_ERASE(earlier[r], r - 1, r)
    if (m == 0 && z->early_read) SEE_READ(earlier[r], r - 1, r)
  }
}

static void NAME(inside_channel_backward)(const sizes *z, chunk *c, gradients *g, REAL *flows) {
  long Lp = z->Lp, K = z->K;
  REAL *base = flows, *from_start = flows + K, *prefix = flows + 2 * K;
  memset(from_start, 0, K * sizeof(REAL));
  memset(g->q, 0, z->Cp * K * sizeof(REAL));
  memset(g->decay, 0, z->Cp * K * sizeof(REAL));
  if (z->erases) memset(g->e, 0, Lp * K * sizeof(REAL));
  for (int f = 0; f < 2; f++)
    if (c->col[f]) memset(g->col[f], 0, Lp * K * sizeof(REAL));
  for (long r0 = Lp - PAD; r0 >= 0; r0 -= PAD) {
    const REAL *run = c->run + r0 / PAD * K;
    long t0, t1, rows = least(PAD, z->L - r0);
    if (rows <= 0) continue;
    NAME(readers)(z, r0, r0 + PAD, &t0, &t1);
    memcpy(base, g->whole, K * sizeof(REAL));
    for (long i = 0; i < K; i += VL) AT(base + i) += AT(from_start + i);
    fill(prefix, K, 1);
    for (long s = 0; s < r0; s += PAD) scale_row(prefix, c->run + s / PAD * K, K);
    if (z->erases) memset(g->er + r0 * K, 0, PAD * K * sizeof(REAL));
    if (t1 > t0) memset(g->qr + t0 * K, 0, (t1 - t0) * K * sizeof(REAL));
    for (int f = 0; f < 2 && r0; f++) {
      if (!c->col[f]) continue;
      for (long d = 0; d < K; d += VL) {
        vec factor = (vec){0} + 1, flow = {0}, D = AT(run + d);
        for (long s = r0 - PAD; s >= 0; s -= PAD) {
          for (long i = s; i < s + PAD; i++) {
            vec y = AT(c->own[f] + i * K + d) * factor, gy = AT(g->ce[f] + i * K + d) * D;
            AT(g->before + i * K + d) = y;
            AT(g->ce[f] + i * K + d) = gy;
            flow += y * gy;
          }
          factor *= AT(c->run + s / PAD * K + d);
        }
        AT(base + d) += flow;
      }
      if (z->erases) {
        REAL *M = g->Me[f] + r0 * Lp;
        gemm(PAD, K, r0, M, Lp, 1, g->before, K, g->er + r0 * K, K, 1, 1);
        gemm(r0, K, PAD, M, 1, Lp, c->er + r0 * K, K, g->ce[f], K, 1, 1);
      }
      if (t1 > t0) {
        REAL *M = g->Mq[f] + t0 * Lp;
        gemm(t1 - t0, K, r0, M, Lp, 1, g->before, K, g->qr + t0 * K, K, 1, 1);
        gemm(r0, K, t1 - t0, M, 1, Lp, c->qr + t0 * K, K, g->ce[f], K, 1, 1);
      }
    }
    for (long d = 0; d < K; d += VL) NAME(run_backward)(z, c, g, r0, d, AT(base + d), AT(prefix + d));
    for (long d = 0; d < K; d += VL) {
      vec flow = {0};
      for (long r = r0; z->erases && r < r0 + rows; r++) flow += AT(g->es + r * K + d) * AT(c->es + r * K + d);
      for (long t = t0; t < t1; t++) flow += AT(g->qs + t * K + d) * AT(c->qs + t * K + d);
      AT(from_start + d) += flow;
    }
  }
}

static long NAME(gradient_memory)(const sizes *z) {
  long Lp = z->Lp, Cp = z->Cp, K = z->K, V = z->V;
  return Cp * K * 4 + Lp * K * 9 + Lp * Lp * 3 + Cp * Lp * 3 + K + 3 * (Lp + K) + Cp + Lp * V * 5 + Cp * V + 4 * K * V +
         64 * PAD;
}

static void NAME(lay_out_gradients)(const sizes *z, const chunk *c, gradients *g, arena *a) {
  long Lp = z->Lp, Cp = z->Cp, K = z->K;
  memset(g, 0, sizeof *g);
  g->q = take(a, Cp * K);
  g->qs = take(a, Cp * K);
  g->whole = take(a, K);
  g->decay = take(a, z->decay == 2 ? Cp * K : Cp);
  if (z->erases) {
    g->e = take(a, Lp * K);
    g->es = take(a, Lp * K);
  }
  for (int f = 0; f < 2; f++) {
    if (!c->col[f]) continue;
    g->col[f] = take(a, Lp * K);
    g->ce[f] = take(a, Lp * K);
    g->Mq[f] = take(a, Cp * Lp);
    if (z->erases) g->Me[f] = take(a, Lp * Lp);
  }
  if (z->decay == 2) {
    g->before = take(a, Lp * K);
    g->qr = take(a, Cp * K);
    if (z->erases) g->er = take(a, Lp * K);
  } else {
    g->Fq = take(a, Cp * Lp);
    if (z->erases) g->Fe = take(a, Lp * Lp);
  }
}

/* Pointers: q g w e u k v | states, delta, grad_o, grad_last, grad_states (may be NULL) | gradients of q g w e u k v,
   start; strides of q .. v, grad_o, then of the seven gradients. */
int NAME(gdr_backward)(const int64_t *n, void **p, const int64_t *strides, int threads) {
  const sizes whole = NAME(read_sizes)(n), *z = &whole;
  input x[7], grad_o;
  output gx[7];
  NAME(read_inputs)(x, p, strides);
  grad_o = (input){p[9], strides[21], strides[22], strides[23]};
  for (int i = 0; i < 7; i++)
    gx[i] = (output){p[12 + i], strides[24 + 3 * i], strides[25 + 3 * i], strides[26 + 3 * i]};
  const REAL *states = p[7], *deltas = p[8], *grad_last = p[10], *grad_states = p[11];
  REAL *grad_start = p[19];
  long G = z->B * z->H, K = z->K, V = z->V, dk = z->dk, dv = z->dv, Lp = z->Lp, Cp = z->Cp;
  int failed = 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (long G0 = 0; G0 < G; G0++) {
    long b = G0 / z->H, h = G0 % z->H;
    arena a;
    if (!open_arena(&a, (NAME(chunk_memory)(z) + NAME(gradient_memory)(z) + 2 * K * PAD) * sizeof(REAL) + 131072)) {
      failed = 1;
      continue;
    }
    chunk c;
    gradients g;
    NAME(lay_out)(z, &c, &a, 1);
    NAME(lay_out_gradients)(z, &c, &g, &a);
    REAL *now0 = take(&a, K * PAD), *now1 = take(&a, K * PAD), *flows = take(&a, 3 * (Lp + K) + Cp);
    REAL *S = take(&a, K * V), *ST = take(&a, K * V), *later = take(&a, K * V), *laterT = take(&a, K * V);
    REAL *go = take(&a, Cp * V), *rho = take(&a, Lp * V), *gv = take(&a, Lp * V), *writtenT = take(&a, Lp * V);
    memset(later, 0, K * V * sizeof(REAL));
    memset(S, 0, K * V * sizeof(REAL));
    for (long d = 0; grad_last && d < dk; d++)
      memcpy(later + d * V, grad_last + (G0 * dk + d) * dv, dv * sizeof(REAL));
    for (long m = z->N - 1; m >= 0; m--) {
      long t = m * z->C, tokens = least(z->C, z->T - t), rows = tokens * z->R;
      for (long d = 0; d < dk; d++) memcpy(S + d * V, states + ((m * G + G0) * dk + d) * dv, dv * sizeof(REAL));
      NAME(load_chunk)(z, &c, x, b, h, t, tokens);
      NAME(load)(go, V, Cp, &grad_o, b, h, t, tokens, dv);
      INSIDE(z, &c, 1);
      transpose(S, V, K, V, ST, K);
      transpose(later, V, K, V, laterT, K);
      if (z->erases) {
        for (long r = 0; r < rows; r++) {
          REAL *to = c.written[0] + r * V;
          memcpy(to, deltas + ((m * G + G0) * z->L + r) * dv, dv * sizeof(REAL));
          for (long j = dv; j < V; j++) to[j] = 0;
        }
        memset(c.written[0] + rows * V, 0, (Lp - rows) * V * sizeof(REAL));
        NAME(reads_transposed)(z, c.Mq[0], go, V, rho, 1, 0);
        gemm(Lp, V, K, c.ce[0], CE_ROW(z), CE_CHANNEL(z), later, V, rho, V, 1, 1);
        NAME(solve_transposed)(c.Me[0], Lp, rho, V);
        NAME(store)(rho, V, &gx[4], b, h, t * z->R, rows, dv);
        gemm(Lp, K, V, rho, V, 1, ST, K, g.es, K, -1, 0);
      }
      gemm(Cp, K, V, go, V, 1, ST, K, g.qs, K, 1, 0);
      for (int f = 0; f < 2; f++) {
        if (!c.col[f]) continue;
        transpose(c.written[f], V, Lp, V, writtenT, Lp);
        for (long r = 0; z->erases && r < Lp; r += PAD)
          gemm(PAD, r + PAD, V, rho + r * V, V, 1, writtenT, Lp, g.Me[f] + r * Lp, Lp, -1, 0);
        for (long i = 0; i < Cp; i += PAD)
          gemm(PAD, NAME(seen)(z, i + PAD), V, go + i * V, V, 1, writtenT, Lp, g.Mq[f] + i * Lp, Lp, 1, 0);
        gemm(Lp, K, V, c.written[f], V, 1, laterT, K, g.ce[f], K, 1, 0);
      }
      if (z->adds) {
        NAME(reads_transposed)(z, c.Mq[1], go, V, gv, 1, 0);
        gemm(Lp, V, K, c.ce[1], CE_ROW(z), CE_CHANNEL(z), later, V, gv, V, 1, 1);
        if (z->erases) NAME(lower_transposed)(c.Me[1], Lp, rho, V, gv, -1, 1);
        NAME(store)(gv, V, &gx[6], b, h, t * z->R, rows, dv);
      }
      for (long d = 0; d < K; d++) g.whole[d] = c.whole[d] * NAME(dot)(S + d * V, later + d * V, V);
      if (z->decay == 2)
        NAME(inside_channel_backward)(z, &c, &g, flows);
      else
        NAME(inside_head_backward)(z, &c, &g, flows);
      NAME(store)(g.q, K, &gx[0], b, h, t, tokens, dk);
      if (z->decay == 2)
        NAME(store)(g.decay, K, &gx[1], b, h, t, tokens, dk);
      else if (z->decay)
        NAME(store)(g.decay, 1, &gx[1], b, h, t, tokens, 1);
      NAME(store)(g.col[0], K, &gx[2], b, h, t * z->R, rows, dk);
      NAME(store)(g.e, K, &gx[3], b, h, t * z->R, rows, dk);
      NAME(store)(g.col[1], K, &gx[5], b, h, t * z->R, rows, dk);
      for (long d = 0; d < K; d++) scale_by(later + d * V, c.whole[d], V);
      gemm(K, V, Cp, c.qs, 1, K, go, V, later, V, 1, 1);
      if (z->erases) gemm(K, V, Lp, c.es, 1, K, rho, V, later, V, -1, 1);
      for (long d = 0; grad_states && d < dk; d++)
        for (long j = 0; j < dv; j++) later[d * V + j] += grad_states[((m * G + G0) * dk + d) * dv + j];
    }
    for (long d = 0; grad_start && d < dk; d++)
      memcpy(grad_start + (G0 * dk + d) * dv, later + d * V, dv * sizeof(REAL));
  }
  return failed;
}
#undef gradients
#undef SEE
#undef SEE_READ
#undef SEE_ERASE
#undef ADD_READ
#undef ADD_ERASE
