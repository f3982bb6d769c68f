/* Elementwise recurrences: h_t = a_t h_{t-1} + b_t, its max-plus sister, and Mamba's selective scan. Included once for
   float and once for double.

   The selective scan keeps its states only before each block of tokens and walks through a block again in the backward
   pass, so that nothing of tokens x channels x states is ever stored. Channels lie along the lanes of a vector: only
   the gradients of B and C sum across lanes, once per group of channels. A group's tiles are [channels / VL, L, VL],
   its states [N, W]. Groups do not depend on the number of threads, and no two of them add to the same number. */

#define TOGETHER 2 /* states that share what is loaded for a token */

typedef struct {
  REAL *p;
  long b, t;
} NAME(stream);

typedef struct {
  long B, T, D, N, blocks, L, emit, marks, group; /* L: most tokens of a block; group: channels worked on together */
  long W, G, Np;                                  /* padded sizes of a group and of N; number of groups */
  const int64_t *from;                            /* first token of each block, then T */
  NAME(stream) x, dt, b, c;
  const uint8_t *reset;
  long reset_b, reset_t;
} NAME(selective);

#define stream NAME(stream)
#define selective NAME(selective)

static const uint8_t *NAME(cuts)(const uint8_t *reset, long step, long n, uint8_t *cut) {
  int any = 0;
  for (long t = 0; reset && t < n; t++) any |= cut[t] = reset[t * step];
  return any ? cut : NULL;
}

static void NAME(fetch)(REAL *tile, const stream *x, long b, long t, long n, long d0, long width, long L) {
  for (long i = 0; i < n; i++, tile += VL) {
    const REAL *from = x->p + b * x->b + (t + i) * x->t + d0;
    long d = 0;
    for (; d + VL <= width; d += VL) AT(tile + d * L) = LOOSE(from + d);
    for (long j = 0; d < width && j < VL; j++) tile[d * L + j] = d + j < width ? from[d + j] : 0;
  }
}

static void NAME(put)(const REAL *tile, const stream *x, long b, long t, long n, long d0, long width, long L) {
  for (long i = 0; i < n; i++, tile += VL) {
    REAL *to = x->p + b * x->b + (t + i) * x->t + d0;
    long d = 0;
    for (; d + VL <= width; d += VL) LOOSE(to + d) = AT(tile + d * L);
    for (; d < width; d++) to[d] = tile[d / VL * VL * L + d % VL];
  }
}

/* S[N, W] = from[width, N]^T, zeros beside it; `rows` is working space [W, Np]. */
static void NAME(states_in)(const selective *z, const REAL *from, long width, REAL *rows, REAL *S) {
  if (!from) {
    memset(S, 0, z->Np * z->W * sizeof(REAL));
    return;
  }
  memset(rows, 0, z->W * z->Np * sizeof(REAL));
  for (long d = 0; d < width; d++) memcpy(rows + d * z->Np, from + d * z->N, z->N * sizeof(REAL));
  transpose(rows, z->Np, z->W, z->Np, S, z->W);
}

static void NAME(states_out)(const selective *z, const REAL *S, long width, REAL *rows, REAL *to) {
  transpose(S, z->W, z->Np, z->W, rows, z->Np);
  for (long d = 0; d < width; d++) memcpy(to + d * z->N, rows + d * z->Np, z->N * sizeof(REAL));
}

/* M states of one vector of channels through n tokens; b and c point at the first token's first of them. */
INLINE void NAME(advance)(int M, long n, const REAL *dt, const REAL *u, const REAL *b, long bt, const REAL *c, long ct,
                          const uint8_t *cut, const REAL *A, REAL *S, long W, REAL *y) {
  vec h[TOGETHER], a[TOGETHER];
  UNROLL for (int m = 0; m < M; m++) h[m] = AT(S + m * W), a[m] = AT(A + m * W);
  for (long t = 0; t < n; t++) {
    vec step = AT(dt + t * VL), in = AT(u + t * VL), out = AT(y + t * VL);
    UNROLL for (int m = 0; m < M; m++) {
      if (cut && cut[t]) h[m] = (vec){0};
      h[m] = exp_of(step * a[m]) * h[m] + in * b[t * bt + m];
      out += h[m] * c[t * ct + m];
    }
    AT(y + t * VL) = out;
  }
  UNROLL for (int m = 0; m < M; m++) AT(S + m * W) = h[m];
}

/* The same tokens backwards. carry: the gradient of the state after them, then before them; gu, gdt, gA, gb, gc add up.
   decay, found: working space [M, L, VL] as gb and gc are. */
INLINE void NAME(retreat)(int M, long n, long L, const REAL *dt, const REAL *u, const REAL *gy, const REAL *b, long bt,
                          const REAL *c, long ct, const uint8_t *cut, const REAL *A, const REAL *S, REAL *carry,
                          REAL *gA, long W, REAL *gu, REAL *gdt, REAL *gb, REAL *gc, REAL *decay, REAL *found) {
  vec h[TOGETHER], a[TOGETHER], sum[TOGETHER];
  UNROLL for (int m = 0; m < M; m++) h[m] = AT(S + m * W), a[m] = AT(A + m * W);
  for (long t = 0; t < n; t++) {
    vec step = AT(dt + t * VL), in = AT(u + t * VL), g = AT(gy + t * VL);
    UNROLL for (int m = 0; m < M; m++) {
      long at = (m * L + t) * VL;
      vec d = exp_of(step * a[m]), f = d * h[m];
      if (cut && cut[t]) d = f = (vec){0};
      h[m] = f + in * b[t * bt + m];
      AT(decay + at) = d;
      AT(found + at) = f;
      AT(gc + at) += g * h[m];
    }
  }
  UNROLL for (int m = 0; m < M; m++) h[m] = AT(carry + m * W), sum[m] = AT(gA + m * W);
  for (long t = n - 1; t >= 0; t--) {
    vec step = AT(dt + t * VL), in = AT(u + t * VL), g = AT(gy + t * VL);
    vec in_gu = AT(gu + t * VL), in_gdt = AT(gdt + t * VL);
    UNROLL for (int m = 0; m < M; m++) {
      long at = (m * L + t) * VL;
      vec total = g * c[t * ct + m] + h[m], exponent = AT(found + at) * total;
      AT(gb + at) += in * total;
      in_gu += total * b[t * bt + m];
      in_gdt += exponent * a[m];
      sum[m] += exponent * step;
      h[m] = AT(decay + at) * total;
      if (cut && cut[t]) h[m] = (vec){0};
    }
    AT(gu + t * VL) = in_gu;
    AT(gdt + t * VL) = in_gdt;
  }
  UNROLL for (int m = 0; m < M; m++) AT(carry + m * W) = h[m], AT(gA + m * W) = sum[m];
}

/* out[t * step] = the sum over lanes of x[t]; `turned` is working space [VL, L]. */
static void NAME(sum_lanes)(const REAL *x, long n, long L, REAL *turned, REAL *out, long step) {
  long rows = (n + VL - 1) / VL * VL;
  transpose(x, VL, rows, VL, turned, L);
  for (long t = 0; t < n; t += VL) {
    vec sum = AT(turned + t);
    for (long i = 1; i < VL; i++) sum += AT(turned + i * L + t);
    for (long i = 0; i < least(VL, n - t); i++) out[(t + i) * step] = sum[i];
  }
}

/* Sizes: B T D N, blocks, L, emit (0: none), marks, group (a multiple of PAD). Strides of batch and token: x, dt, b, c, reset. */
static selective NAME(read_selective)(const int64_t *n, void **p, const int64_t *s) {
  selective z = {.B = n[0], .T = n[1], .D = n[2], .N = n[3], .blocks = n[4], .L = ROUND_UP(n[5]), .emit = n[6], .marks = n[7],
                 .group = n[8],
                 .x = {p[0], s[0], s[1]}, .dt = {p[1], s[2], s[3]}, .b = {p[2], s[4], s[5]}, .c = {p[3], s[6], s[7]},
                 .reset = p[4], .reset_b = s[8], .reset_t = s[9], .from = p[5]};
  z.W = least(z.group, ROUND_UP(z.D));
  z.G = (z.D + z.group - 1) / z.group;
  z.Np = ROUND_UP(z.N);
  return z;
}

/* Pointers: x dt b c reset from | A h0 y last emitted kept [blocks, B, D, N] in some
   order of their own, skip [D]; h0, emitted, kept, skip may be missing. */
int NAME(selective_forward)(const int64_t *n, void **p, const int64_t *strides, int threads) {
  const selective whole = NAME(read_selective)(n, p, strides), *z = &whole;
  const REAL *A0 = p[6], *h0 = p[7];
  const stream y0 = {p[8], strides[10], strides[11]};
  REAL *last = p[9], *emitted = p[10], *kept = p[11];
  const REAL *skip0 = p[12];
  long N = z->N, D = z->D, W = z->W, L = z->L;
  int failed = 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (long item = 0; item < z->B * z->G; item++) {
    long b = item / z->G, d0 = item % z->G * z->group, width = least(z->group, D - d0);
    arena a;
    if (!open_arena(&a, (3 * W * z->Np + W + (3 * W + 1) * L) * sizeof(REAL) + 4096)) {
      failed = 1;
      continue;
    }
    REAL *A = take(&a, W * z->Np), *S = take(&a, W * z->Np), *rows = take(&a, W * z->Np);
    REAL *dt = take(&a, W * L), *u = take(&a, W * L), *y = take(&a, W * L), *skip = take(&a, W);
    uint8_t *cut_here = (uint8_t *)take(&a, L);
    NAME(states_in)(z, A0 + d0 * N, width, rows, A);
    NAME(states_in)(z, h0 ? h0 + (b * D + d0) * N : NULL, width, rows, S);
    memset(skip, 0, W * sizeof(REAL));
    if (skip0) memcpy(skip, skip0 + d0, width * sizeof(REAL));
    for (long m = 0; m < z->blocks; m++) {
      long t = z->from[m], len = z->from[m + 1] - t;
      if (z->emit && t % z->emit == 0)
        NAME(states_out)(z, S, width, rows, emitted + ((b * z->marks + t / z->emit) * D + d0) * N);
      if (kept)
        for (long s = 0; s < N; s++)
          memcpy(kept + ((m * z->B + b) * D + d0) * N + s * width, S + s * W, width * sizeof(REAL));
      const uint8_t *cut = NAME(cuts)(z->reset ? z->reset + b * z->reset_b + t * z->reset_t : NULL, z->reset_t, len,
                                      cut_here);
      NAME(fetch)(dt, &z->dt, b, t, len, d0, width, L);
      NAME(fetch)(u, &z->x, b, t, len, d0, width, L);
      for (long v = 0; v < width; v += VL) {
        for (long i = v * L; i < v * L + len * VL; i += VL) {
          AT(y + i) = (vec){0};
          if (skip0) AT(y + i) = AT(skip + v) * AT(u + i);
          AT(u + i) *= AT(dt + i);
        }
        for (long s = 0, M; s < N; s += M) {
          const REAL *B = z->b.p + b * z->b.b + t * z->b.t + s, *C = z->c.p + b * z->c.b + t * z->c.t + s;
          M = least(TOGETHER, N - s);
#define RUN_ADVANCE(M, CUT) \
  NAME(advance)(M, len, dt + v * L, u + v * L, B, z->b.t, C, z->c.t, CUT, A + s * W + v, S + s * W + v, W, y + v * L)
          if (M == TOGETHER && !cut) RUN_ADVANCE(TOGETHER, NULL);
          else if (M == TOGETHER) RUN_ADVANCE(TOGETHER, cut);
          else M = 1, RUN_ADVANCE(1, cut);
        }
      }
      NAME(put)(y, &y0, b, t, len, d0, width, L);
    }
    NAME(states_out)(z, S, width, rows, last + (b * D + d0) * N);
  }
  return failed;
}

/* Pointers: x dt b c reset from | A kept, grads of y, last, emitted; grads of x, dt, b and c [G, B, T, N], of A
   [B, D, N], of h0; skip, its grads [B, D]. Missing may be the given gradients of last and emitted, and skip. Strides
   of the grads of y, x, dt. */
int NAME(selective_backward)(const int64_t *n, void **p, const int64_t *strides, int threads) {
  const selective whole = NAME(read_selective)(n, p, strides), *z = &whole;
  const REAL *A0 = p[6], *kept = p[7], *grad_last = p[9], *grad_emitted = p[10];
  const stream gy0 = {p[8], strides[10], strides[11]}, gx0 = {p[11], strides[12], strides[13]},
               gdt0 = {p[12], strides[14], strides[15]};
  REAL *gb0 = p[13], *gc0 = p[14], *gA0 = p[15], *gh0 = p[16], *gskip0 = p[18];
  const REAL *skip0 = p[17];
  long N = z->N, D = z->D, W = z->W, L = z->L;
  int failed = 0;
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (long item = 0; item < z->B * z->G; item++) {
    long b = item / z->G, g = item % z->G, d0 = g * z->group, width = least(z->group, D - d0);
    arena a;
    if (!open_arena(&a, (5 * W * z->Np + 2 * W + (6 * W + 1) * L + (4 * TOGETHER + 1) * VL * L) * sizeof(REAL) + 4096)) {
      failed = 1;
      continue;
    }
    REAL *A = take(&a, W * z->Np), *S = take(&a, W * z->Np), *rows = take(&a, W * z->Np);
    REAL *carry = take(&a, W * z->Np), *gA = take(&a, W * z->Np);
    REAL *dt = take(&a, W * L), *x = take(&a, W * L), *u = take(&a, W * L), *gy = take(&a, W * L);
    REAL *gu = take(&a, W * L), *gdt = take(&a, W * L);
    REAL *gb = take(&a, TOGETHER * VL * L), *gc = take(&a, TOGETHER * VL * L), *turned = take(&a, VL * L);
    REAL *decay = take(&a, TOGETHER * VL * L), *found = take(&a, TOGETHER * VL * L);
    REAL *skip = take(&a, W), *gskip = take(&a, W);
    uint8_t *cut_here = (uint8_t *)take(&a, L);
    NAME(states_in)(z, A0 + d0 * N, width, rows, A);
    NAME(states_in)(z, grad_last ? grad_last + (b * D + d0) * N : NULL, width, rows, carry);
    memset(gA, 0, W * z->Np * sizeof(REAL));
    memset(skip, 0, W * sizeof(REAL));
    memset(gskip, 0, W * sizeof(REAL));
    if (skip0) memcpy(skip, skip0 + d0, width * sizeof(REAL));
    for (long m = z->blocks - 1; m >= 0; m--) {
      long t = z->from[m], len = z->from[m + 1] - t;
      memset(S, 0, N * W * sizeof(REAL));
      for (long s = 0; s < N; s++)
        memcpy(S + s * W, kept + ((m * z->B + b) * D + d0) * N + s * width, width * sizeof(REAL));
      const uint8_t *cut = NAME(cuts)(z->reset ? z->reset + b * z->reset_b + t * z->reset_t : NULL, z->reset_t, len,
                                      cut_here);
      NAME(fetch)(dt, &z->dt, b, t, len, d0, width, L);
      NAME(fetch)(x, &z->x, b, t, len, d0, width, L);
      NAME(fetch)(gy, &gy0, b, t, len, d0, width, L);
      for (long v = 0; v < width; v += VL)
        for (long i = v * L; i < v * L + len * VL; i += VL)
          AT(u + i) = AT(dt + i) * AT(x + i), AT(gu + i) = AT(gdt + i) = (vec){0};
      for (long s = 0, M; s < N; s += M) {
        const REAL *B = z->b.p + b * z->b.b + t * z->b.t + s, *C = z->c.p + b * z->c.b + t * z->c.t + s;
        M = N - s >= TOGETHER ? TOGETHER : 1;
        memset(gb, 0, TOGETHER * VL * L * sizeof(REAL));
        memset(gc, 0, TOGETHER * VL * L * sizeof(REAL));
        for (long v = 0; v < width; v += VL) {
#define RUN_RETREAT(M, CUT)                                                                                         \
  NAME(retreat)(M, len, L, dt + v * L, u + v * L, gy + v * L, B, z->b.t, C, z->c.t, CUT, A + s * W + v, S + s * W + v, \
                carry + s * W + v, gA + s * W + v, W, gu + v * L, gdt + v * L, gb, gc, decay, found)
          if (M == TOGETHER && !cut) RUN_RETREAT(TOGETHER, NULL);
          else if (M == TOGETHER) RUN_RETREAT(TOGETHER, cut);
          else RUN_RETREAT(1, cut);
        }
        for (long i = 0; i < M; i++) {
          long to = ((g * z->B + b) * z->T + t) * N + s + i;
          NAME(sum_lanes)(gb + i * VL * L, len, L, turned, gb0 + to, N);
          NAME(sum_lanes)(gc + i * VL * L, len, L, turned, gc0 + to, N);
        }
      }
      for (long v = 0; v < width; v += VL)
        for (long i = v * L; i < v * L + len * VL; i += VL) {
          AT(gdt + i) += AT(gu + i) * AT(x + i);
          AT(gu + i) *= AT(dt + i);
          if (skip0) AT(gu + i) += AT(skip + v) * AT(gy + i), AT(gskip + v) += AT(gy + i) * AT(x + i);
        }
      NAME(put)(gu, &gx0, b, t, len, d0, width, L);
      NAME(put)(gdt, &gdt0, b, t, len, d0, width, L);
      if (z->emit && t % z->emit == 0 && grad_emitted) {
        NAME(states_in)(z, grad_emitted + ((b * z->marks + t / z->emit) * D + d0) * N, width, rows, S);
        for (long i = 0; i < N * W; i += VL) AT(carry + i) += AT(S + i);
      }
    }
    NAME(states_out)(z, carry, width, rows, gh0 + (b * D + d0) * N);
    NAME(states_out)(z, gA, width, rows, gA0 + (b * D + d0) * N);
    if (skip0) memcpy(gskip0 + b * D + d0, gskip, width * sizeof(REAL));
  }
  return failed;
}

#include "scan_plain.h"
#undef stream
#undef selective
