/* From a model file's rows to neuron bundles (layout in bundles.h), and back. Values move, they never change. */
#include "bundles.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

enum { GROUP = 32 }; /* values in a block, and neurons whose down columns share a file's blocks */

static uint16_t read16(const uint8_t *p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}
static uint32_t read32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
static uint64_t read64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
static void write32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }
static void write64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }
static int half_is_finite(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

static float half(const uint8_t *p) {
  uint16_t h = read16(p);
  int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  float f = exponent ? ldexpf((float)(mantissa | 0x400), exponent - 25) : ldexpf((float)mantissa, -24);
  return h & 0x8000 ? -f : f;
}

static int supported(int type) { return type == PI2_Q4_0 || type == PI2_Q4_1 || type == PI2_Q8_0; }
static int64_t scales_of(int type) { return type == PI2_Q4_1 ? 2 : 1; } /* numbers of a block */
static int64_t block_of(int type) { return 2 * scales_of(type) + (type == PI2_Q8_0 ? 32 : 16); } /* bytes in the file */

int64_t pi2_up_quants(int type, int64_t k) {
  if (!supported(type) || k % GROUP) return 0;
  return pi2_align(k, 512) / (type == PI2_Q8_0 ? 1 : 2);
}
int64_t pi2_down_quants(int type, int64_t rows) {
  if (!supported(type)) return 0;
  return type == PI2_Q8_0 ? pi2_align(rows, 64) : pi2_align(rows, 128) / 2;
}
int64_t pi2_up_scales(int type, int64_t k) {
  return supported(type) && k % GROUP == 0 ? 2 * scales_of(type) * pi2_align(k / GROUP, 16) : 0;
}
int64_t pi2_down_scales(int type, int64_t rows) {
  return supported(type) ? 2 * scales_of(type) * pi2_align(rows, 128) : 0;
}

static int64_t place_of(const pi2_bundle_layout *layout, int64_t neuron) {
  const int64_t page = neuron / layout->neurons_per_page;
  return page * layout->page_bytes + (neuron - page * layout->neurons_per_page) * layout->neuron_bytes;
}

/* Copies the scales of a block to entry `at` of arrays of `length` numbers; whether they are finite. */
static int copy_scales(int type, const uint8_t *block, uint8_t *to, int64_t at, int64_t length) {
  int finite = half_is_finite(read16(block));
  if (type == PI2_Q4_1) finite &= half_is_finite(read16(block + 2));
  if (to) {
    memcpy(to + 2 * at, block, 2);
    if (type == PI2_Q4_1) memcpy(to + 2 * (length + at), block + 2, 2);
  }
  return finite;
}

/* 32 quants, as the file has them, into lane L of the loads of 16 blocks that begin at dst + 4L. */
static void place_up(int type, const uint8_t *quants, uint8_t *dst) {
  if (type == PI2_Q8_0) {
    for (int i = 0; i < 8; i++) { /* columns 0, 2, 1, 3 of each four */
      uint32_t v = read32(quants + 4 * i);
      write32(dst + 64 * i, (v & 0xff0000ff) | (v >> 8 & 0xff00) | (v & 0xff00) << 8);
    }
    return;
  }
  for (int i = 0; i < 4; i++) { /* the file's low nibbles are columns 0..15, its high ones 16..31 */
    uint64_t n = read64(quants + 8 * (i & 1)) >> (i < 2 ? 0 : 4) & 0x0f0f0f0f0f0f0f0f;
    n |= n >> 12; /* byte j: columns j (low) and j+2 (high) of these 8 */
    write32(dst + 64 * i, (uint32_t)((n & 0xff) | (n >> 24 & 0xff00) | (n & 0xff00) << 8 | (n >> 16 & 0xff000000)));
  }
}

int64_t pi2_bundle_up(int type, const uint8_t *rows, int64_t n, int64_t k, const pi2_bundle_layout *layout, uint8_t *to,
                      uint8_t *scales) {
  const int64_t blocks = k / GROUP, length = pi2_align(blocks, 16), scale_bytes = pi2_up_scales(type, k);
  const int64_t size = block_of(type), chunk = type == PI2_Q8_0 ? 512 : 256, skip = 2 * scales_of(type);
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint8_t *row = rows + i * blocks * size;
    uint8_t *scale = scales ? scales + i * scale_bytes : NULL, *dst = to ? to + place_of(layout, i) : NULL;
    int finite = 1;
    if (scale) memset(scale, 0, (size_t)scale_bytes);
    if (dst && blocks % 16) memset(dst + blocks / 16 * chunk, 0, (size_t)chunk);
    for (int64_t b = 0; b < blocks; b++) {
      finite &= copy_scales(type, row + b * size, scale, b, length);
      if (dst) place_up(type, row + b * size + skip, dst + b / 16 * chunk + b % 16 * 4);
    }
    if (!finite && !bad) bad = i + 1;
  }
  return bad;
}

static const uint8_t NO_ROW[34]; /* the quants of a row that is not there: zeros */

/* The quants of 32 neurons in 8 (4-bit) or 4 (8-bit) rows of a file: word j has those of neuron j, the first row
 * lowest. */
static void transpose(int type, const uint8_t *const rows[8], uint32_t words[GROUP]) {
  uint8_t bytes[4][GROUP];
  for (int i = 0; i < 4; i++) {
    if (type == PI2_Q8_0) {
      memcpy(bytes[i], rows[i], GROUP);
      continue;
    }
    for (int half_row = 0; half_row < 16; half_row += 8) {
      const uint64_t low = 0x0f0f0f0f0f0f0f0f;
      const uint64_t a = read64(rows[2 * i] + half_row), b = read64(rows[2 * i + 1] + half_row);
      write64(bytes[i] + half_row, (a & low) | (b & low) << 4);
      write64(bytes[i] + 16 + half_row, (a >> 4 & low) | (b & ~low));
    }
  }
  for (int j = 0; j < GROUP; j++)
    words[j] = bytes[0][j] | (uint32_t)bytes[1][j] << 8 | (uint32_t)bytes[2][j] << 16 | (uint32_t)bytes[3][j] << 24;
}

int64_t pi2_bundle_down(int type, const uint8_t *matrix, int64_t rows, int64_t hidden, int64_t first, int64_t count,
                        const pi2_bundle_layout *layout, uint8_t *to, uint8_t *scales) {
  const int64_t size = block_of(type), row_bytes = hidden / GROUP * size, skip = 2 * scales_of(type);
  const int64_t scale_bytes = pi2_down_scales(type, rows), length = pi2_align(rows, 128);
  const int in_word = type == PI2_Q8_0 ? 4 : 8;
  int64_t bad = 0;
  for (int64_t g = 0; g < count / GROUP; g++) {
    const uint8_t *column = matrix + (first / GROUP + g) * size; /* of blocks */
    uint8_t *scale = scales ? scales + g * scale_bytes : NULL;
    if (scale) memset(scale, 0, (size_t)scale_bytes);
    for (int64_t r = 0; r < rows; r++)
      if (!copy_scales(type, column + r * row_bytes, scale, r, length) && (!bad || r < bad)) bad = r + 1;
    if (!to) continue;
    uint8_t *neuron[GROUP];
    for (int j = 0; j < GROUP; j++) neuron[j] = to + place_of(layout, g * GROUP + j) + layout->up_bytes;
    for (int64_t line = 0; line * 16 * in_word < rows; line++)
      for (int lane = 0; lane < 16; lane++) {
        const uint8_t *quants[8];
        uint32_t words[GROUP];
        for (int i = 0; i < in_word; i++) {
          const int64_t r = (line * in_word + i) * 16 + lane;
          quants[i] = r < rows ? column + r * row_bytes + skip : NO_ROW;
        }
        transpose(type, quants, words);
        for (int j = 0; j < GROUP; j++) write32(neuron[j] + line * 64 + lane * 4, words[j]);
      }
  }
  return bad;
}

static float value_of(int type, int q, const uint8_t *scales, int64_t at, int64_t length) {
  const float d = half(scales + 2 * at);
  if (type == PI2_Q4_1) return d * (float)q + half(scales + 2 * (length + at));
  return d * (float)(type == PI2_Q4_0 ? q - 8 : q);
}

void pi2_unbundle_up(int type, const uint8_t *from, const uint8_t *scales, int64_t n, int64_t k,
                     const pi2_bundle_layout *layout, float *out) {
  const int64_t length = pi2_align(k / GROUP, 16), scale_bytes = pi2_up_scales(type, k);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t *quants = from + place_of(layout, i);
    for (int64_t column = 0; column < k; column++) {
      const int64_t block = column / GROUP, c = block / 16, lane = block % 16;
      const int j = (int)(column % GROUP);
      int q;
      if (type == PI2_Q8_0) {
        const int b = j / 2 % 2 + 2 * (j % 2);
        q = (int8_t)quants[c * 512 + j / 4 * 64 + lane * 4 + b];
      } else {
        const int pair = j / 2 % 4, b = pair / 2 + 2 * (j % 2), byte = quants[c * 256 + j / 8 * 64 + lane * 4 + b];
        q = pair % 2 ? byte >> 4 : byte & 15;
      }
      out[i * k + column] = value_of(type, q, scales + i * scale_bytes, block, length);
    }
  }
}

void pi2_unbundle_down(int type, const uint8_t *from, const uint8_t *scales, int64_t rows, int64_t n,
                       const pi2_bundle_layout *layout, float *out, int64_t ld) {
  const int64_t length = pi2_align(rows, 128), scale_bytes = pi2_down_scales(type, rows);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t *quants = from + place_of(layout, i) + layout->up_bytes;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t part = r / 16, lane = r % 16;
      int q;
      if (type == PI2_Q8_0) {
        q = (int8_t)quants[part / 4 * 64 + lane * 4 + part % 4];
      } else {
        const int byte = quants[part / 8 * 64 + lane * 4 + part % 8 / 2];
        q = part % 2 ? byte >> 4 : byte & 15;
      }
      out[r * ld + i] = value_of(type, q, scales + i / GROUP * scale_bytes, r, length);
    }
  }
}

/* Activations in the order of neuron_rows: x[chunk of 16 blocks][16 pairs][16 blocks][2 columns]. */
void pi2_arrange(const pi2_q8 *x, int wide, int64_t k, int16_t *to, float *d, float *s) {
  const int64_t blocks = k / PI2_BLOCK, padded = pi2_align(blocks, 16);
  for (int64_t b = 0; b < blocks; b++) {
    int16_t *o = to + b / 16 * 512 + b % 16 * 2;
    if (wide) { /* stored 0 2 1 3 */
      const int16_t *q = (const int16_t *)x->q + b * PI2_BLOCK;
      for (int g = 0; g < 8; g++, o += 64)
        o[0] = q[4 * g], o[1] = q[4 * g + 2], o[32] = q[4 * g + 1], o[33] = q[4 * g + 3];
    } else {
      const int8_t *q = x->q + b * PI2_BLOCK;
      for (int v = 0; v < 16; v++, o += 32) o[0] = q[2 * v], o[1] = q[2 * v + 1];
    }
  }
  for (int64_t b = blocks; b < padded; b++)
    for (int v = 0; v < 16; v++) memset(to + b / 16 * 512 + v * 32 + b % 16 * 2, 0, 4);
  memcpy(d, x->d, (size_t)blocks * 4);
  memcpy(s, x->s, (size_t)blocks * 4);
  memset(d + blocks, 0, (size_t)(padded - blocks) * 4);
  memset(s + blocks, 0, (size_t)(padded - blocks) * 4);
}
