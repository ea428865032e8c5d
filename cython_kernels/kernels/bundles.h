/* Neuron bundles: the up row and the down column of each neuron side by side, so that only those that are active are
 * read.
 *
 * Scales and quants lie apart: scales are resident, quants are read page by page. Types Q4_0, Q4_1 and Q8_0. A block is
 * 32 values that share a scale; q is the file's quant (4-bit: unsigned, before 8 is subtracted; 8-bit: signed).
 *
 * Up quants of a neuron: its row of k columns, padded with zero bytes to a multiple of 512. Columns come 16 blocks
 * (512) at a time, c = 0, 1, ...: lane L of a 16-lane vector has block 16c+L, with bytes in the order in which int16
 * activations stand (kernels.h).
 *   4-bit  256 B: load i < 4 of 64 B; byte 4L+b, half h (0: low nibble): column 8i + 2*(2*(b%2)+h) + b/2 of the block
 *   8-bit  512 B: load i < 8 of 64 B; byte 4L+b: column 4i + 2*(b%2) + b/2 of the block
 * Down quants of a neuron: its column of D rows, padded with zeros. Line c of 64 B, lane L a 32-bit little-endian word:
 *   4-bit  128 rows: bits 4i..4i+3, i < 8: row 128c + 16i + L
 *   8-bit   64 rows: byte i < 4: row 64c + 16i + L
 * Up scales of a neuron: f16 d[align(k/32, 16)]; down scales of 32 neurons: f16 d[align(D, 128)], entry r of row r's
 * block. Q4_1: an array of m, as long, after each array of d. Padded with zeros.
 * Neuron i is at page i / neurons_per_page, byte (i % neurons_per_page) * neuron_bytes of it: up quants, then down
 * quants.
 */
#ifndef PI2_BUNDLES_H
#define PI2_BUNDLES_H
#include <stdint.h>

#include "api.h"

/* up_bytes: of a neuron's up quants, which its down quants follow; 0 in a block without gate. */
typedef struct {
  int64_t neurons_per_page, page_bytes, neuron_bytes, up_bytes;
} pi2_bundle_layout;

/* Bytes; 0 where the type has no bundles, or k is no multiple of 32. */
PI2_API int64_t pi2_up_quants(int type, int64_t k);      /* of a neuron */
PI2_API int64_t pi2_down_quants(int type, int64_t rows); /* of a neuron */
PI2_API int64_t pi2_up_scales(int type, int64_t k);      /* of a neuron */
PI2_API int64_t pi2_down_scales(int type, int64_t rows); /* of 32 neurons */

/* n rows of a model file (k columns): neuron 0 goes to the beginning of the page at `to`. scales: n * pi2_up_scales.
 * Either may be NULL. Writes no byte outside of these neurons' up quants. Returns 0, or the index + 1 of the first row
 * with a scale that is not finite. */
PI2_API int64_t pi2_bundle_up(int type, const uint8_t *rows, int64_t n, int64_t k, const pi2_bundle_layout *layout,
                              uint8_t *to, uint8_t *scales);
/* Columns first .. first + count of a model file's matrix (rows, hidden); first, count and hidden are multiples of 32.
 * Neuron `first` goes to the beginning of the page at `to`. scales: count / 32 * pi2_down_scales. As above; the index
 * is that of a row. */
PI2_API int64_t pi2_bundle_down(int type, const uint8_t *matrix, int64_t rows, int64_t hidden, int64_t first,
                                int64_t count, const pi2_bundle_layout *layout, uint8_t *to, uint8_t *scales);

/* Back to floats, with the file format's arithmetic. `from` begins with neuron 0 of n. up: out (n, k).
 * down: out[r * ld + i], r < rows, neuron i < n, n a multiple of 32. */
PI2_API void pi2_unbundle_up(int type, const uint8_t *from, const uint8_t *scales, int64_t n, int64_t k,
                             const pi2_bundle_layout *layout, float *out);
PI2_API void pi2_unbundle_down(int type, const uint8_t *from, const uint8_t *scales, int64_t rows, int64_t n,
                               const pi2_bundle_layout *layout, float *out, int64_t ld);
#endif
