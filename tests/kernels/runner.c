/* Runs kernel variants on the cases that make_cases.py wrote and compares what comes out, bit for bit.
 *
 *   runner CASES [VARIANT...]
 *
 * Without names: every variant this processor runs. A named variant runs whatever the processor says (for emulation).
 * Needs no Python, so it runs under emulators and sanitizers: each array is in a heap
 * block of exactly its size, ending where the array ends, so that a read beyond it is caught. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bundles.h"
#include "elementary.h"
#include "kernels.h"

enum { /* the same in make_cases.py */
       QUANTIZE,
       GEMM,
       RMSNORM,
       ADD,
       ACTIVATE,
       ROPE,
       ATTENTION,
       SCALE,
       ARGMAX,
       LOGSUMEXP,
       SOFTCAP,
       READ,
       REPACK,
       UNPACK,
       NEURON_ROWS,
       NEURON_COLUMNS,
       ROTATION,
       EXPONENTIAL,
       KERNELS
};
static const char *const names[KERNELS] = {"quantize",       "gemm",      "rmsnorm",    "add",    "activate",
                                           "rope",           "attention", "scale",      "argmax", "logsumexp",
                                           "softcap",        "read",      "repack",     "unpack", "neuron rows",
                                           "neuron columns", "rotation",  "exponential"};
enum { BYTES, FLOATS, DOUBLES };

typedef struct {
  uint8_t *block, *data; /* data: `misalign` bytes into the block */
  uint64_t bytes;
  uint32_t kind;
} array;

typedef struct {
  uint32_t kernel, inputs, outputs;
  int64_t p[8];
  float f[4];
  array in[8], expected[6], out[6];
} test;

static void die(const char *why) {
  fprintf(stderr, "runner: %s\n", why);
  exit(2);
}
static void *allocate(uint64_t bytes) { /* aligned to 64, not a byte longer */
  void *p = NULL;
  if (posix_memalign(&p, 64, bytes ? bytes : 1)) die("out of memory");
  return p;
}
static void read_exactly(FILE *f, void *p, uint64_t bytes) {
  if (bytes && fread(p, 1, bytes, f) != bytes) die("the case file ends early");
}
static array read_array(FILE *f) {
  array a;
  uint32_t head[2];
  read_exactly(f, head, sizeof head);
  read_exactly(f, &a.bytes, sizeof a.bytes);
  a.kind = head[0];
  a.block = allocate(a.bytes + head[1]);
  a.data = a.block + head[1];
  read_exactly(f, a.data, a.bytes);
  return a;
}
static int read_test(FILE *f, test *t) {
  uint32_t head[3];
  size_t got = fread(head, 1, sizeof head, f);
  if (got == 0) return 0;
  if (got != sizeof head) die("the case file ends early");
  t->kernel = head[0], t->inputs = head[1], t->outputs = head[2];
  if (t->kernel >= KERNELS || t->inputs > 8 || t->outputs > 6) die("not a case file");
  read_exactly(f, t->p, sizeof t->p);
  read_exactly(f, t->f, sizeof t->f);
  for (uint32_t i = 0; i < t->inputs; i++) t->in[i] = read_array(f);
  for (uint32_t i = 0; i < t->outputs; i++) t->expected[i] = read_array(f);
  return 1;
}

static float *floats(const test *t, int i) { return (float *)t->in[i].data; }
static int64_t count(const test *t, int i) { return (int64_t)(t->in[i].bytes / 4); }
static float *out_floats(test *t, int i) { return (float *)t->out[i].data; }

/* How activations become integers. 0: int8, 1: int16, 2: int16 in two forms. */
static pi2_quantizer quantizer(const pi2_kernels *kernels, int64_t way) {
  return way == 2 ? kernels->quantize_mixed : way ? kernels->quantize16 : kernels->quantize8;
}

/* p: type, rows, k, n, activations (0 to 2, see quantizer), misalignment of their rows in elements, padding of these in
 * elements, several row blocks at once where the variant does that. in: rows as in a file, x (n, k). out: (n, rows) */
static void run_gemm(const pi2_kernels *kernels, test *t) {
  const int type = (int)t->p[0];
  const int wide = t->p[4] != 0;
  const int64_t rows = t->p[1], k = t->p[2], n = t->p[3], misalign = t->p[5] << wide;
  const int64_t ldq = (k + t->p[6]) << wide, ldh = k + t->p[6];
  const int64_t blocks = (rows + PI2_ROWS - 1) / PI2_ROWS, size = pi2_row_block_bytes(type, k), ldo = blocks * PI2_ROWS;
  uint8_t *w = allocate((uint64_t)(blocks * size));
  pi2_repack(type, t->in[0].data, rows, k, w);
  float *out = allocate((uint64_t)(n * ldo) * 4);
  const float *x = floats(t, 1);
  const pi2_gemm gemm = (wide ? kernels->gemm16 : kernels->gemm8)[type];
  if (gemm) {
    int8_t *q = allocate((uint64_t)(misalign + (n ? (n - 1) * ldq + (k << wide) : 0)));
    int8_t *high = t->p[4] == 2 ? allocate((uint64_t)(t->p[5] + 2 * n * ldh)) : NULL;
    const uint64_t scales = (uint64_t)(n * k / 32) * 4;
    pi2_q8 x8 = {.q = q + misalign,
                 .d = allocate(scales),
                 .s = allocate(scales),
                 .h = allocate(scales),
                 .ldq = ldq,
                 .ldh = ldh,
                 .ldb = k / 32};
    if (high) x8.high = high + t->p[5], x8.low = x8.high + n * ldh;
    for (int64_t c = 0; c < n; c++) {
      pi2_q8 row = {.q = x8.q + c * ldq, .d = x8.d + c * x8.ldb, .s = x8.s + c * x8.ldb, .h = x8.h + 2 * c * x8.ldb};
      if (high) row.high = x8.high + c * ldh, row.low = x8.low + c * ldh;
      quantizer(kernels, t->p[4])(x + c * k, k, &row);
    }
    int64_t b = 0;
    if (t->p[7]) {
      (wide ? kernels->panel16 : kernels->panel8)[type](w, size, (int)blocks, k, &x8, (int)n, out, ldo);
      b = blocks;
    }
    for (; b < blocks; b++) gemm(w + b * size, k, &x8, (int)n, out + b * PI2_ROWS, ldo);
    free(q);
    free(high);
    free(x8.d);
    free(x8.s);
    free(x8.h);
  } else {
    for (int64_t b = 0; b < blocks; b++)
      kernels->gemm_float[type](w + b * size, k, x, k, (int)n, out + b * PI2_ROWS, ldo);
  }
  for (int64_t c = 0; c < n; c++) memcpy(out_floats(t, 0) + c * rows, out + c * ldo, (size_t)rows * 4);
  free(out);
  free(w);
}

/* p: positions, head_dim, queries, pi2_kv_type, splits. f: softcap. in: keys, values, queries, lo, hi, (begin, end) of
 * each split as int64. out: (queries, head_dim) */
static void run_attention(const pi2_kernels *kernels, test *t) {
  const int64_t n = t->p[0], hd = t->p[1], nq = t->p[2], type = t->p[3], splits = t->p[4], pages = (n + 63) / 64;
  const int64_t half = PI2_PAGE * (type == PI2_KV_Q8 ? hd + 4 : type == PI2_KV_F16 ? 2 * hd : 4 * hd);
  uint8_t *memory = allocate((uint64_t)(2 * half * pages));
  memset(memory, 0xff, (size_t)(2 * half * pages)); /* what was not written is NaN: it must not leak */
  int32_t *table = allocate((uint64_t)pages * 4);
  for (int64_t i = 0; i < pages; i++) table[i] = (int32_t)(pages - 1 - i);
  pi2_kv kv = {.base = memory,
               .page_stride = 2 * half,
               .pages = table,
               .v_offset = half,
               .head_dim = (int)hd,
               .type = (int)type};
  for (int64_t i = 0; i < n; i++) kernels->kv_store(&kv, i, floats(t, 0) + i * hd, floats(t, 1) + i * hd);
  float *m[2], *s[2], *a[2], *scratch = allocate((uint64_t)(nq * PI2_PAGE) * 4);
  for (int i = 0; i < 2; i++) {
    m[i] = allocate((uint64_t)nq * 4);
    s[i] = allocate((uint64_t)nq * 4);
    a[i] = allocate((uint64_t)(nq * hd) * 4);
  }
  const int32_t *lo = (const int32_t *)t->in[3].data, *hi = (const int32_t *)t->in[4].data;
  for (int64_t i = 0; i < splits; i++) {
    int64_t range[2];
    memcpy(range, t->in[5].data + 16 * i, sizeof range);
    const int to = i > 0;
    kernels->attend(&kv, floats(t, 2), hd, (int)nq, lo, hi, range[0], range[1], t->f[0], m[to], s[to], a[to], scratch);
    for (int64_t j = 0; to && j < nq; j++)
      kernels->attend_merge(&m[0][j], &s[0][j], a[0] + j * hd, m[1][j], s[1][j], a[1] + j * hd, (int)hd);
  }
  for (int64_t j = 0; j < nq; j++)
    for (int64_t d = 0; d < hd; d++) out_floats(t, 0)[j * hd + d] = a[0][j * hd + d] / s[0][j];
  for (int i = 0; i < 2; i++) free(m[i]), free(s[i]), free(a[i]);
  free(scratch);
  free(table);
  free(memory);
}

/* One row of activations as integers. */
static pi2_q8 quantized(const pi2_kernels *kernels, const float *x, int64_t k, int wide) {
  pi2_q8 q = {.q = allocate((uint64_t)(k << wide)),
              .d = allocate((uint64_t)k / 8),
              .s = allocate((uint64_t)k / 8),
              .h = allocate((uint64_t)k / 8),
              .ldq = k << wide,
              .ldb = k / 32};
  quantizer(kernels, wide)(x, k, &q);
  return q;
}
static void free_quantized(pi2_q8 *q) { free(q->q), free(q->d), free(q->s), free(q->h); }

/* p: type, rows, k, int16 activations. in: rows as in a file, x (k). out: (rows) */
static void run_neuron_rows(const pi2_kernels *kernels, test *t) {
  const int type = (int)t->p[0], m = (int)t->p[1], wide = (int)t->p[3];
  const int64_t k = t->p[2], bytes = pi2_up_quants(type, k), stride = pi2_up_scales(type, k),
                padded = (k + 511) / 512 * 512;
  const pi2_bundle_layout layout = {m, m * bytes, bytes, bytes};
  uint8_t *quants = allocate((uint64_t)(m * bytes)), *scales = allocate((uint64_t)(m * stride));
  memset(quants, 0, (size_t)(m * bytes));
  pi2_bundle_up(type, t->in[0].data, m, k, &layout, quants, scales);
  pi2_q8 q = quantized(kernels, floats(t, 1), k, wide);
  int16_t *x = allocate((uint64_t)padded * 2);
  float *d = allocate((uint64_t)padded / 8), *s = allocate((uint64_t)padded / 8);
  pi2_arrange(&q, wide, k, x, d, s);
  const uint8_t *rows[16], *numbers[16];
  for (int i = 0; i < m; i++) rows[i] = quants + i * bytes, numbers[i] = scales + i * stride;
  kernels->neuron_rows[type](rows, numbers, m, k, x, d, s, out_floats(t, 0));
  free_quantized(&q);
  free(quants), free(scales), free(x), free(d), free(s);
}

/* p: type, rows, int16 activations. in: rows of 32 columns as in a file, their values (32). out: (rows) */
static void run_neuron_columns(const pi2_kernels *kernels, test *t) {
  static const uint8_t stored[4] = {0, 2, 1, 3};
  const int type = (int)t->p[0], wide = (int)t->p[2];
  const int64_t rows = t->p[1], bytes = pi2_down_quants(type, rows), padded = (rows + 127) / 128 * 128;
  const int64_t room = bytes * (type == PI2_Q8_0 ? 1 : 2) < padded ? bytes + 64 : bytes; /* whole 128 rows are read */
  const pi2_bundle_layout layout = {32, 32 * room, room, 0};
  uint8_t *quants = allocate((uint64_t)(32 * room)), *scales = allocate((uint64_t)pi2_down_scales(type, rows));
  memset(quants, 0, (size_t)(32 * room));
  pi2_bundle_down(type, t->in[0].data, rows, 32, 0, 32, &layout, quants, scales);
  pi2_q8 q = quantized(kernels, floats(t, 1), 32, wide);
  float *out = allocate((uint64_t)padded * 4);
  memset(out, 0, (size_t)padded * 4);
  const uint8_t *columns[32];
  int16_t values[32];
  int m = 0;
  for (int j = 0; j < 32; j++) {
    values[m] = wide ? ((const int16_t *)q.q)[(j & ~3) + stored[j & 3]] : q.q[j];
    if (values[m]) columns[m++] = quants + j * room;
  }
  if (m)
    kernels->neuron_columns[type](columns, values, m, scales, pi2_down_scales(type, rows) / 2, q.d[0], q.s[0], padded,
                                  out);
  memcpy(out_floats(t, 0), out, (size_t)rows * 4);
  free_quantized(&q);
  free(quants), free(scales), free(out);
}

static void run(const pi2_kernels *kernels, test *t) {
  const int64_t *p = t->p;
  switch (t->kernel) {
  case QUANTIZE: { /* p: see quantizer. out: q, d, s, h, and high and low where there are two forms */
    pi2_q8 row = {
        .q = (int8_t *)t->out[0].data, .d = out_floats(t, 1), .s = out_floats(t, 2), .h = (int16_t *)t->out[3].data};
    if (p[0] == 2) row.high = (int8_t *)t->out[4].data, row.low = memset(t->out[5].data, 0, t->out[5].bytes);
    quantizer(kernels, p[0])(floats(t, 0), count(t, 0), &row);
    break;
  }
  case GEMM: run_gemm(kernels, t); break;
  case RMSNORM: /* f: offset, eps. p: in place */
    if (p[0]) memcpy(t->out[0].data, t->in[0].data, t->in[0].bytes);
    kernels->rmsnorm(p[0] ? out_floats(t, 0) : floats(t, 0), floats(t, 1), t->f[0], t->f[1], out_floats(t, 0),
                     count(t, 0));
    break;
  case ADD:
    memcpy(t->out[0].data, t->in[1].data, t->in[1].bytes);
    kernels->add(floats(t, 0), out_floats(t, 0), count(t, 0));
    break;
  case ACTIVATE: /* p: activation, of up, has a gate. in: up, gate */
    kernels->activate((int)p[0], (int)p[1], p[2] ? floats(t, 1) : NULL, floats(t, 0), out_floats(t, 0), count(t, 0));
    break;
  case ROPE: /* p: interleaved. in: x, cosine, sine */
    memcpy(t->out[0].data, t->in[0].data, t->in[0].bytes);
    kernels->rope(out_floats(t, 0), floats(t, 1), floats(t, 2), (int)count(t, 1), (int)p[0]);
    break;
  case ATTENTION: run_attention(kernels, t); break;
  case SCALE: kernels->scale(floats(t, 0), t->f[0], out_floats(t, 0), count(t, 0)); break;
  case ARGMAX: {
    int64_t at = kernels->argmax(floats(t, 0), count(t, 0));
    memcpy(t->out[0].data, &at, sizeof at);
    break;
  }
  case LOGSUMEXP: {
    double x = kernels->logsumexp(floats(t, 0), count(t, 0));
    memcpy(t->out[0].data, &x, sizeof x);
    break;
  }
  case ROTATION: /* of no variant: the same for all */
    for (int64_t i = 0; i < t->p[1]; i++) {
      const int64_t half = (int64_t)(t->in[0].bytes / 8);
      pi2_rotation((const double *)(const void *)t->in[0].data, half, (int32_t)(t->p[0] + i), t->f[0],
                   out_floats(t, 0) + i * half, out_floats(t, 1) + i * half);
    }
    break;
  case EXPONENTIAL:
    for (uint64_t i = 0; i < t->in[0].bytes / 8; i++)
      ((double *)(void *)t->out[0].data)[i] = pi2_exp(((const double *)(const void *)t->in[0].data)[i]);
    break;
  case SOFTCAP:
    memcpy(t->out[0].data, t->in[0].data, t->in[0].bytes);
    kernels->softcap(out_floats(t, 0), t->f[0], count(t, 0));
    break;
  case READ: {
    uint64_t sum = kernels->read(t->in[0].data, (int64_t)t->in[0].bytes);
    memcpy(t->out[0].data, &sum, sizeof sum);
    break;
  }
  case REPACK: { /* p: type, rows, k. out: row blocks, the returned number */
    int64_t bad = pi2_repack((int)p[0], t->in[0].data, p[1], p[2], t->out[0].data);
    memcpy(t->out[1].data, &bad, sizeof bad);
    break;
  }
  case NEURON_ROWS: run_neuron_rows(kernels, t); break;
  case NEURON_COLUMNS: run_neuron_columns(kernels, t); break;
  case UNPACK: /* p: type, rows, k. in: row blocks */
    for (int64_t i = 0; i < p[1]; i++) pi2_unpack_row((int)p[0], t->in[0].data, p[2], i, out_floats(t, 0) + i * p[2]);
    break;
  }
}

/* Index of the first element that differs, or -1. All NaN are one. */
static int64_t differs(const array *a, const array *b) {
  const uint64_t size = a->kind == FLOATS ? 4 : a->kind == DOUBLES ? 8 : 1;
  for (uint64_t i = 0; i < a->bytes / size; i++) {
    if (!memcmp(a->data + i * size, b->data + i * size, size)) continue;
    if (a->kind == BYTES) return (int64_t)i;
    double x, y;
    if (a->kind == FLOATS) {
      float u, v;
      memcpy(&u, a->data + i * size, size);
      memcpy(&v, b->data + i * size, size);
      x = u, y = v;
    } else {
      memcpy(&x, a->data + i * size, size);
      memcpy(&y, b->data + i * size, size);
    }
    if (isnan(x) && isnan(y)) continue;
    return (int64_t)i;
  }
  return -1;
}
static void print_element(const array *a, int64_t i) {
  if (a->kind == FLOATS)
    printf("%a", (double)((float *)a->data)[i]);
  else if (a->kind == DOUBLES)
    printf("%a", ((double *)a->data)[i]);
  else
    printf("%d", a->data[i]);
}

static int run_all(const char *path, const pi2_kernels *kernels) {
  FILE *f = fopen(path, "rb");
  if (!f) die("cannot open the case file");
  int cases = 0, failed = 0;
  for (test t; read_test(f, &t); cases++) {
    for (uint32_t i = 0; i < t.outputs; i++) {
      array *o = &t.out[i];
      *o = t.expected[i];
      o->block = allocate(o->bytes + (uint64_t)(t.expected[i].data - t.expected[i].block));
      o->data = o->block + (t.expected[i].data - t.expected[i].block);
      memset(o->data, 0xa5, o->bytes);
    }
    run(kernels, &t);
    int bad = 0;
    for (uint32_t i = 0; i < t.outputs; i++) {
      int64_t at = differs(&t.expected[i], &t.out[i]);
      if (at < 0) continue;
      if (!bad && failed < 20) {
        printf("%s: case %d, %s(", kernels->name, cases, names[t.kernel]);
        for (int j = 0; j < 6; j++) printf("%s%" PRId64, j ? ", " : "", t.p[j]);
        printf("): output %u, element %" PRId64 ": ", i, at);
        print_element(&t.out[i], at);
        printf(" instead of ");
        print_element(&t.expected[i], at);
        printf("\n");
      }
      bad = 1;
    }
    failed += bad;
    for (uint32_t i = 0; i < t.inputs; i++) free(t.in[i].block);
    for (uint32_t i = 0; i < t.outputs; i++) free(t.expected[i].block), free(t.out[i].block);
  }
  fclose(f);
  printf("%-12s %d cases, %d differ\n", kernels->name, cases, failed);
  fflush(stdout);
  return failed || !cases;
}

int main(int argc, char **argv) {
  int named = argc > 2, ran = 0, bad = 0;
  if (argc < 2) die("usage: runner CASES [VARIANT...]");
  for (const pi2_kernels *const *v = pi2_variants(); *v; v++) {
    int wanted = !named && pi2_variant_runs(*v);
    for (int i = 2; i < argc; i++) wanted |= !strcmp(argv[i], (*v)->name);
    if (!wanted) continue;
    bad |= run_all(argv[1], *v);
    ran++;
  }
  if (!ran) die("no such variant");
  return bad;
}
