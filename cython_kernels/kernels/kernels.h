/* The kernel table: what every instruction set provides, and the layouts they agree on.
 *
 * Row blocks. A weight matrix W (rows, k) is stored as blocks of 16 rows, each block contiguous, rows padded with zeros
 * to a multiple of 16. One lane of a 16-lane vector belongs to one row, so a dot product never reduces across lanes,
 * and neurons can be read from flash and computed sixteen at a time.
 *
 * Inside a row block of a quantised matrix the scales come first, then the quants, both padded to 64 bytes, so that
 * quants load aligned. Per 32 columns ("block", 8 groups of 4 columns) the quants are
 *   4-bit part   256 B: byte [g][row][j], g < 4: low nibble = column 4g+j, high nibble = column 16+4g+j
 *   5th bit       64 B: bit (row*4 + j) of the 64-bit little-endian word g < 8 = column 4g+j
 *   6-bit top    128 B: byte [h][row][j], h < 2: bits 2t,2t+1 (t < 4) = column 4(4h+t)+j
 *   8-bit        512 B: byte [g][row][j], g < 8, signed
 * and the scales
 *   Q4_0 Q5_0 Q8_0   16 x f16 d
 *   Q4_1 Q5_1        16 x f16 d, 16 x f16 m
 *   Q4_K Q5_K        per 256 columns: 16 x f16 d, 16 x f16 dmin, 8 x (16 x u8 scale, 16 x u8 min)
 *   Q6_K             per 256 columns: 16 x f16 d, 16 x (16 x i8 scale)
 * F32, F16 and BF16 are [k][16 rows]. Every value is the file's, bit for bit (repack.c).
 *
 * Activations are integers with one float scale per 32 columns (pi2_q8). int8 is what others use and costs half the
 * multiplications of int16, but on SmolLM2-135M it changes the likeliest token at 4 % of positions
 * (docs/performance.md); int16 changes it at 0.1 %, and a mixture of both, the default, at 1.3 %. In int16 rows the
 * four columns of a group stand in the order 0, 2, 1, 3: even and odd bytes of a weight register, widened, meet
 * neighbouring pairs.
 *
 * Bit identity. All instruction sets perform the same float operations on the same lanes in the same order (fused
 * multiply-add, one fixed reduction tree, one polynomial for exp), and integer sums are exact: so every variant returns
 * the same bits, and a column's result does not depend on the columns beside it. Tests hold both. Compile with
 * -ffp-contract=off; never with -ffast-math.
 */
#ifndef PI2_KERNELS_H
#define PI2_KERNELS_H
#include <stddef.h>
#include <stdint.h>

#include "api.h"

#define PI2_ROWS 16  /* rows in a row block */
#define PI2_BLOCK 32 /* columns that share an activation scale */
#define PI2_PAGE 64  /* positions in a KV page */

enum pi2_type { /* ggml's numbers */
                PI2_F32 = 0,
                PI2_F16 = 1,
                PI2_Q4_0 = 2,
                PI2_Q4_1 = 3,
                PI2_Q5_0 = 6,
                PI2_Q5_1 = 7,
                PI2_Q8_0 = 8,
                PI2_Q4_K = 12,
                PI2_Q5_K = 13,
                PI2_Q6_K = 14,
                PI2_BF16 = 30,
                PI2_TYPES = 31
};

enum pi2_kv_type { PI2_KV_F16 = 0, PI2_KV_Q8 = 1, PI2_KV_F32 = 2 };

enum pi2_activation { PI2_NONE = 0, PI2_SILU = 1, PI2_GELU = 2, PI2_GELU_TANH = 3, PI2_RELU = 4, PI2_RELU2 = 5 };

#define PI2_FINE INT16_MIN
#define PI2_FINER                                                                                          \
  1.25 /* quantize_mixed: of a fine block's largest value over the root mean square of those of its row */

/* n rows of integer activations. Row i: q + i*ldq bytes, k values of int8 or int16; d, s + i*ldb, k/32 values;
 * h + i*2*ldb, k/16 values. value = d[b] * q. s[b] = d[b] * (sum of the block's q); h[2b], h[2b+1] = sums of an int8
 * block's q over its halves.
 * int16 rows may have a second form, `high` not NULL: row i of high and low, `ldh` apart, has k values of int8. Block b
 * is 256 times its high bytes, and its low ones added where h[2b] is PI2_FINE; elsewhere h has the sums of the high
 * bytes. A product may take either: integer sums are exact, and 256 is a power of two, so the bits are the same. q is
 * NULL in rows that have the second form alone. */
typedef struct {
  int8_t *q, *high, *low;
  float *d, *s;
  int16_t *h;
  int64_t ldq, ldh, ldb;
} pi2_q8;

/* One KV head's pages. K is [position/16][head_dim][16], V is [position][head_dim], f16, f32 or int8; with int8 a float
 * scale per position follows each. Strides in bytes. */
typedef struct {
  const uint8_t *base; /* of this layer and head in page 0 */
  int64_t page_stride;
  const int32_t *pages; /* page table of the sequence */
  int64_t v_offset;     /* from K to V inside a page */
  int head_dim;
  int type; /* pi2_kv_type */
} pi2_kv;

/* out[c*ldo + r], c < n columns, r < 16 rows: one row block against n activation rows. w is 64-byte aligned; x.q needs
 * no alignment; k is a multiple of 32 (256 for the K types). out may not alias anything. */
typedef void (*pi2_gemm)(const uint8_t *w, int64_t k, const pi2_q8 *x, int n, float *out, int64_t ldo);
/* The same for `blocks` row blocks, `stride` bytes apart, and many columns: out[c*ldo + r], r < 16*blocks. Same bits.
 */
typedef void (*pi2_panel)(const uint8_t *w, int64_t stride, int blocks, int64_t k, const pi2_q8 *x, int n, float *out,
                          int64_t ldo);
/* The same with float weights (F32, F16, BF16 by table entry) and float activations x[c*ldx + i]; any k >= 0. */
typedef void (*pi2_gemm_float)(const uint8_t *w, int64_t k, const float *x, int64_t ldx, int n, float *out,
                               int64_t ldo);

/* Single neurons, whose quants and scales lie apart (bundles.h), times activations that pi2_arrange has put in order.
 * Bits are those of the row blocks' kernels. NULL for types that bundles do not have. Rows of up: out[i], i < m <= 16.
 * rows[i]: quants, 64-byte aligned; scales[i]: 32-byte aligned. x, d, s: 64-byte aligned, padded with zeros to whole
 * chunks of 512 columns. Up to 1 KiB behind a row is prefetched. */
typedef void (*pi2_neuron_rows)(const uint8_t *const *rows, const uint8_t *const *scales, int m, int64_t k,
                                const int16_t *x, const float *d, const float *s, float *out);
/* Columns of down, of m <= 32 neurons of one group of 32: out[r] += for r < rows, a multiple of 128. columns[i]: quants
 * of the first row, 64-byte aligned; q[i]: its activation, d and s those of the group (pi2_q8); scales: the group's, at
 * the first row; plane: bytes from scales to minimums, where the type has them. */
typedef void (*pi2_neuron_columns)(const uint8_t *const *columns, const int16_t *q, int m, const uint8_t *scales,
                                   int64_t plane, float d, float s, int64_t rows, float *out);

/* One row of activations for pi2_neuron_rows: x[chunk of 16 blocks][16 pairs][16 blocks][2 columns], and its scales,
 * all padded with zeros to whole chunks (bundles.c). */
PI2_API void pi2_arrange(const pi2_q8 *x, int wide, int64_t k, int16_t *to, float *d, float *s);

/* x (k,), k a multiple of 32, to one row. */
typedef void (*pi2_quantizer)(const float *x, int64_t k, const pi2_q8 *row);

typedef struct {
  const char *name;
  int lanes;                    /* of the widest register, in floats; for reports */
  int bytes_alone;              /* of rows in two forms, panel16 reads the second alone, so that they need no first */
  pi2_gemm gemm8[PI2_TYPES];    /* int8 activations; NULL where the type is float */
  pi2_gemm gemm16[PI2_TYPES];   /* int16 activations */
  pi2_panel panel8[PI2_TYPES];  /* many columns of int8 activations */
  pi2_panel panel16[PI2_TYPES]; /* many columns of int16 activations */
  pi2_gemm_float gemm_float[PI2_TYPES]; /* NULL where the type is quantised */
  pi2_neuron_rows neuron_rows[PI2_TYPES];
  pi2_neuron_columns neuron_columns[PI2_TYPES];
  pi2_quantizer quantize8, quantize16, quantize_mixed; /* to int8, to int16, to int16 of which some blocks are fine */
  /* y = x * rsqrt(mean(x^2) + eps) * (w + offset); y may be x. */
  void (*rmsnorm)(const float *x, const float *w, float offset, float eps, float *y, int64_t n);
  /* y += x */
  void (*add)(const float *x, float *y, int64_t n);
  /* out = act(gate) * up_act(up); gate NULL: out = act(up). out may be gate or up. */
  void (*activate)(int act, int up_act, const float *gate, const float *up, float *out, int64_t n);
  /* Rotates one head in place: half = rotated pairs; interleaved pairs (2i, 2i+1), else (i, i+half). */
  void (*rope)(float *x, const float *cos, const float *sin, int half, int interleaved);
  /* Writes one position of one KV head; k, v: head_dim floats. */
  void (*kv_store)(const pi2_kv *kv, int64_t position, const float *k, const float *v);
  /* Attention of nq query vectors of one KV head over positions [begin, end) of one split.
   * q[i*ldq], head_dim floats, already scaled. Query i sees positions in [lo[i], hi[i]).
   * Results, overwritten: max[i], sum[i], acc[i*head_dim] (not divided by sum). scratch: nq*64 floats.
   * softcap 0: none. head_dim multiple of 16. */
  void (*attend)(const pi2_kv *kv, const float *q, int64_t ldq, int nq, const int32_t *lo, const int32_t *hi,
                 int64_t begin, int64_t end, float softcap, float *max, float *sum, float *acc, float *scratch);
  /* Folds a later split into (max, sum, acc), head_dim floats. */
  void (*attend_merge)(float *max, float *sum, float *acc, float max2, float sum2, const float *acc2, int head_dim);
  /* y = x * a */
  void (*scale)(const float *x, float a, float *y, int64_t n);
  /* Largest value's index, the lowest among equals; n >= 1. NaN counts as smaller than all. */
  int64_t (*argmax)(const float *x, int64_t n);
  /* log(sum(exp(x))) by max and sum, in double at the end */
  double (*logsumexp)(const float *x, int64_t n);
  /* x = cap * tanh(x / cap) */
  void (*softcap)(float *x, float cap, int64_t n);
  /* Reads n bytes as fast as it can (bandwidth measurement); returns a checksum. p 64-byte aligned, n multiple of 256.
   */
  uint64_t (*read)(const uint8_t *p, int64_t n);
} pi2_kernels;

/* Variants built into this binary, worst first, NULL-terminated; and the best one this processor can run. */
PI2_API const pi2_kernels *const *pi2_variants(void);
PI2_API int pi2_variant_runs(const pi2_kernels *kernels);

/* repack.c: the layout. Sizes in bytes; 0 for an unknown type. */
PI2_API int64_t pi2_row_bytes(int type, int64_t k);       /* one row in the file's format */
PI2_API int64_t pi2_row_block_bytes(int type, int64_t k); /* one row block, multiple of 64 */
int64_t pi2_scales_bytes(int type, int64_t k);            /* the scales part of a row block */
/* src: `rows` rows in the file's format, contiguous. Fills ceil(rows/16) row blocks at dst (64-byte aligned).
 * Returns 0, or 1 + the index of the first row with a scale or float that is not finite. */
PI2_API int64_t pi2_repack(int type, const uint8_t *src, int64_t rows, int64_t k, uint8_t *dst);
/* One row back to floats: the embedding lookup, and the proof that nothing was lost. */
PI2_API void pi2_unpack_row(int type, const uint8_t *matrix, int64_t k, int64_t row, float *out);

static inline int64_t pi2_align(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
#endif
