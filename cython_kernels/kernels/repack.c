/* From a model file's rows to row blocks (layout in kernels.h), and back. Values move, they never change: unpack_row
 * after repack gives the file's own numbers, which the tests compare bit for bit. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "layout.h"

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
static void write16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
static int half_is_finite(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

static float half(uint16_t h) {
  int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  float f = exponent ? ldexpf((float)(mantissa | 0x400), exponent - 25) : ldexpf((float)mantissa, -24);
  return h & 0x8000 ? -f : f;
}

static int is_k_type(int type) { return type == PI2_Q4_K || type == PI2_Q5_K || type == PI2_Q6_K; }

/* bytes of one block in the file, and the values in it */
static int block_bytes(int type) {
  switch (type) {
  case PI2_F32: return 4;
  case PI2_F16:
  case PI2_BF16: return 2;
  case PI2_Q4_0: return 18;
  case PI2_Q4_1: return 20;
  case PI2_Q5_0: return 22;
  case PI2_Q5_1: return 24;
  case PI2_Q8_0: return 34;
  case PI2_Q4_K: return 144;
  case PI2_Q5_K: return 176;
  case PI2_Q6_K: return 210;
  default: return 0;
  }
}
static int block_values(int type) {
  return type == PI2_F32 || type == PI2_F16 || type == PI2_BF16 ? 1 : is_k_type(type) ? 256 : 32;
}

int64_t pi2_row_bytes(int type, int64_t k) {
  return k % block_values(type) ? 0 : k / block_values(type) * block_bytes(type);
}
int64_t pi2_scales_bytes(int type, int64_t k) { return pi2_scales_bytes_of(type, k); }
int64_t pi2_row_block_bytes(int type, int64_t k) { return pi2_scales_bytes_of(type, k) + pi2_quants_bytes_of(type, k); }

/* K types: 6-bit scale and min of sub-block j out of the 12 packed bytes */
static void fine_scale(const uint8_t *p, int j, uint8_t *scale, uint8_t *min) {
  if (j < 4) {
    *scale = p[j] & 63;
    *min = p[j + 4] & 63;
  } else {
    *scale = (uint8_t)((p[j + 4] & 15) | (p[j - 4] >> 6) << 4);
    *min = (uint8_t)((p[j + 4] >> 4) | (p[j] >> 6) << 4);
  }
}

/* The 32 quants of sub-block j (0..7) of a K block. */
static void k_quants(int type, const uint8_t *p, int j, uint8_t q[32]) {
  if (type == PI2_Q6_K) {
    const int half_block = j / 4, part = j % 4;
    const uint8_t *ql = p + 64 * half_block + (part & 1) * 32, *qh = p + 128 + 32 * half_block;
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)((part < 2 ? ql[i] & 15 : ql[i] >> 4) | (qh[i] >> 2 * part & 3) << 4);
    return;
  }
  const uint8_t *high = type == PI2_Q5_K ? p + 16 : NULL, *qs = p + (high ? 48 : 16) + 32 * (j / 2);
  for (int i = 0; i < 32; i++) {
    q[i] = j & 1 ? qs[i] >> 4 : qs[i] & 15;
    if (high) q[i] |= (uint8_t)((high[i] >> j & 1) << 4);
  }
}

/* Places one row's 32 quants into the block at dst (see kernels.h). */
static void place(int type, const uint8_t q[32], int row, uint8_t *dst) {
  for (int g = 0; g < 4; g++)
    for (int j = 0; j < 4; j++)
      dst[g * 64 + row * 4 + j] = (uint8_t)((q[4 * g + j] & 15) | (q[16 + 4 * g + j] & 15) << 4);
  if (type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K) {
    for (int g = 0; g < 8; g++) {
      uint8_t four = 0;
      for (int j = 0; j < 4; j++) four |= (uint8_t)((q[4 * g + j] >> 4 & 1) << j);
      dst[256 + g * 8 + row / 2] |= (uint8_t)(four << (row & 1) * 4);
    }
  } else if (type == PI2_Q6_K) {
    for (int h = 0; h < 2; h++)
      for (int j = 0; j < 4; j++) {
        uint8_t top = 0;
        for (int t = 0; t < 4; t++) top |= (uint8_t)((q[4 * (4 * h + t) + j] >> 4 & 3) << 2 * t);
        dst[256 + 64 * h + row * 4 + j] = top;
      }
  }
}

static int repack_k_row(int type, const uint8_t *src, int64_t k, int row, uint8_t *scales, uint8_t *quants) {
  int finite = 1;
  const int stride = type == PI2_Q4_K ? 256 : type == PI2_Q5_K ? 320 : 384;
  for (int64_t s = 0; s < k / 256; s++, src += block_bytes(type)) {
    if (type == PI2_Q6_K) {
      uint8_t *super = scales + s * 288;
      finite &= half_is_finite(read16(src + 208));
      memcpy(super + row * 2, src + 208, 2);
      for (int i = 0; i < 16; i++) super[32 + i * 16 + row] = src[192 + i];
    } else {
      uint8_t *super = scales + s * 320;
      finite &= half_is_finite(read16(src)) & half_is_finite(read16(src + 2));
      memcpy(super + row * 2, src, 2);
      memcpy(super + 32 + row * 2, src + 2, 2);
      for (int j = 0; j < 8; j++) fine_scale(src + 4, j, super + 64 + j * 32 + row, super + 80 + j * 32 + row);
    }
    for (int j = 0; j < 8; j++) {
      uint8_t q[32];
      k_quants(type, src, j, q);
      place(type, q, row, quants + (s * 8 + j) * stride);
    }
  }
  return finite;
}

static int repack_legacy_row(int type, const uint8_t *src, int64_t k, int row, uint8_t *scales, uint8_t *quants) {
  int finite = 1;
  const int two = type == PI2_Q4_1 || type == PI2_Q5_1, five = type == PI2_Q5_0 || type == PI2_Q5_1;
  for (int64_t b = 0; b < k / 32; b++, src += block_bytes(type)) {
    uint8_t *scale = scales + b * (two ? 64 : 32) + row * 2;
    finite &= half_is_finite(read16(src));
    memcpy(scale, src, 2);
    if (two) {
      finite &= half_is_finite(read16(src + 2));
      memcpy(scale + 32, src + 2, 2);
    }
    const uint8_t *qs = src + (two ? 4 : 2);
    if (type == PI2_Q8_0) {
      for (int g = 0; g < 8; g++) memcpy(quants + b * 512 + g * 64 + row * 4, qs + 4 * g, 4);
    } else if (!five) { /* the file's byte i holds columns i and 16+i: so does ours */
      for (int g = 0; g < 4; g++) memcpy(quants + b * 256 + g * 64 + row * 4, qs + 4 * g, 4);
    } else {
      uint8_t *dst = quants + b * 320;
      uint32_t fifth = read32(qs);
      for (int g = 0; g < 4; g++) memcpy(dst + g * 64 + row * 4, qs + 4 + 4 * g, 4);
      for (int g = 0; g < 8; g++) dst[256 + g * 8 + row / 2] |= (uint8_t)((fifth >> 4 * g & 15) << (row & 1) * 4);
    }
  }
  return finite;
}

static int repack_float_row(int type, const uint8_t *src, int64_t k, int row, uint8_t *dst) {
  int finite = 1;
  for (int64_t i = 0; i < k; i++) {
    if (type == PI2_F32) {
      uint32_t v = read32(src + 4 * i);
      finite &= (v & 0x7f800000) != 0x7f800000;
      memcpy(dst + (i * 16 + row) * 4, &v, 4);
    } else {
      uint16_t v = read16(src + 2 * i);
      finite &= type == PI2_F16 ? half_is_finite(v) : (v & 0x7f80) != 0x7f80;
      write16(dst + (i * 16 + row) * 2, v);
    }
  }
  return finite;
}

int64_t pi2_repack(int type, const uint8_t *src, int64_t rows, int64_t k, uint8_t *dst) {
  const int64_t row_bytes = pi2_row_bytes(type, k), size = pi2_row_block_bytes(type, k);
  const int64_t scales = pi2_scales_bytes_of(type, k);
  int64_t bad = 0;
  for (int64_t r = 0; r < rows; r++) {
    uint8_t *block = dst + r / PI2_ROWS * size;
    const int row = (int)(r % PI2_ROWS);
    if (row == 0) memset(block, 0, (size_t)size);
    const uint8_t *from = src + r * row_bytes;
    int finite = block_values(type) == 1 ? repack_float_row(type, from, k, row, block)
                 : is_k_type(type)       ? repack_k_row(type, from, k, row, block, block + scales)
                                         : repack_legacy_row(type, from, k, row, block, block + scales);
    if (!finite && !bad) bad = r + 1;
  }
  return bad;
}

static float float_of(int type, const uint8_t *p) {
  uint32_t bits = type == PI2_F32 ? read32(p) : (uint32_t)read16(p) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return type == PI2_F16 ? half(read16(p)) : f;
}

/* quant of column i (0..31) of a row in the block at p */
static int quant_of(int type, const uint8_t *p, int row, int i) {
  if (type == PI2_Q8_0) return (int8_t)p[(i / 4) * 64 + row * 4 + i % 4];
  const int g = i / 4 % 4, j = i % 4, byte = p[g * 64 + row * 4 + j];
  int q = i < 16 ? byte & 15 : byte >> 4;
  if (type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K)
    q |= (p[256 + i / 4 * 8 + row / 2] >> ((row & 1) * 4 + j) & 1) << 4;
  if (type == PI2_Q6_K) q |= (p[256 + 64 * (i / 16) + row * 4 + j] >> 2 * g & 3) << 4;
  return q;
}

void pi2_unpack_row(int type, const uint8_t *matrix, int64_t k, int64_t r, float *out) {
  const uint8_t *scales = matrix + r / PI2_ROWS * pi2_row_block_bytes(type, k);
  const uint8_t *quants = scales + pi2_scales_bytes_of(type, k);
  const int row = (int)(r % PI2_ROWS), stride = (int)(pi2_quants_bytes_of(type, 256) / 8);
  if (block_values(type) == 1) {
    const int size = type == PI2_F32 ? 4 : 2;
    for (int64_t i = 0; i < k; i++) out[i] = float_of(type, scales + (i * 16 + row) * size);
    return;
  }
  for (int64_t b = 0; b < k / 32; b++) {
    float d, m = 0;
    const uint8_t *s = scales;
    const int8_t *six = NULL;
    switch (type) {
    case PI2_Q4_1:
    case PI2_Q5_1:
      d = half(read16(s + b * 64 + row * 2));
      m = half(read16(s + b * 64 + 32 + row * 2));
      break;
    case PI2_Q4_K:
    case PI2_Q5_K:
      s += b / 8 * 320;
      d = half(read16(s + row * 2)) * s[64 + b % 8 * 32 + row];
      m = -(half(read16(s + 32 + row * 2)) * s[80 + b % 8 * 32 + row]);
      break;
    case PI2_Q6_K:
      s += b / 8 * 288;
      d = half(read16(s + row * 2));
      six = (const int8_t *)s + 32 + b % 8 * 32 + row;
      break;
    default: d = half(read16(s + b * 32 + row * 2));
    }
    const int zero = type == PI2_Q4_0 ? 8 : type == PI2_Q5_0 ? 16 : type == PI2_Q6_K ? 32 : 0;
    for (int i = 0; i < 32; i++) {
      int q = quant_of(type, quants + b * stride, row, i) - zero;
      float scale = six ? d * six[i / 16 * 16] : d; /* ggml's own order of products */
      out[b * 32 + i] = scale * (float)q + m;
    }
  }
}
