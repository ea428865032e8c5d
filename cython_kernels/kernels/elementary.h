/* Elementary functions that give the same bits on every machine: IEEE additions, multiplications and divisions of
 * doubles, and of the C library only what the standard defines exactly (rint, ldexp, frexp, fmod). Its sin, cos,
 * exp, log and erf differ in the last bit between libraries, their versions and architectures, and bits of logits
 * with them. Errors are below 1e-14 of the result: rounded to float, it is the float nearest to the function's
 * value but for one in millions.
 *
 * To be compiled with -ffp-contract=off, as everything here. */
#ifndef PI2_ELEMENTARY_H
#define PI2_ELEMENTARY_H
#include <math.h>
#include <stdint.h>

#define PI2_PORTABLE static inline __attribute__((unused))

/* Sine and cosine of x less the nearest multiple of pi/2, of which 130 bits are taken: up to |x| = 2^27. Beyond,
 * only what a double has of 2 pi, and the result says little of x; but it is the same everywhere. */
PI2_PORTABLE void pi2_sincos(double x, double *sine, double *cosine) {
  if (!(fabs(x) < 0x1p27)) x = fmod(x, 0x1.921fb54442d18p+2); /* NaN for NaN and infinity */
  const double n = rint(x * 0x1.45f306dc9c883p-1);
  /* Three parts of pi/2 of 26 bits, whose products with n are exact, and the rest; every difference with its error */
  const double a = x - n * 0x1.921fb5p+0; /* exact */
  const double b = n * 0x1.110b46p-26, h = a - b, hb = h - a, e = (a - (h - hb)) - (b + hb);
  const double c = n * 0x1.1a6262p-54, g = h - c, gc = g - h, f = (h - (g - gc)) - (c + gc);
  const double rest = e + f - n * 0x1.3145c06e0e689p-78;
  const double r = g + rest, low = (g - r) + rest;
  const double z = r * r;
  /* Taylor, for |r| <= pi/4: what is left out is below 1e-19 */
  double p = 1.0 / 355687428096000.0;
  p = -1.0 / 1307674368000.0 + z * p;
  p = 1.0 / 6227020800.0 + z * p;
  p = -1.0 / 39916800.0 + z * p;
  p = 1.0 / 362880.0 + z * p;
  p = -1.0 / 5040.0 + z * p;
  p = 1.0 / 120.0 + z * p;
  p = -1.0 / 6.0 + z * p;
  double q = 1.0 / 6402373705728000.0;
  q = -1.0 / 20922789888000.0 + z * -q;
  q = 1.0 / 87178291200.0 + z * q;
  q = -1.0 / 479001600.0 + z * q;
  q = 1.0 / 3628800.0 + z * q;
  q = -1.0 / 40320.0 + z * q;
  q = 1.0 / 720.0 + z * q;
  q = -1.0 / 24.0 + z * q;
  const double half = 0.5 * z, one = 1.0 - half;
  const double s = r + (r * z * p + low * one);
  const double k = one + (((1.0 - one) - half) - (z * z * q + r * low));
  const int64_t quadrant = n == n ? (int64_t)n & 3 : 0;
  const double first = quadrant & 1 ? k : s, second = quadrant & 1 ? s : k;
  *sine = quadrant & 2 ? -first : first;
  *cosine = (quadrant + 1) & 2 ? -second : second;
}

PI2_PORTABLE double pi2_exp(double x) {
  if (!(x < 710)) return x + (x == x ? (double)INFINITY : 0.0);
  if (x < -746) return 0.0;
  const double n = rint(x * 0x1.71547652b82fep+0);
  const double r = (x - n * 0x1.62e42fecp-1) - n * 0x1.d1cf79abc9e3bp-32; /* the first difference is exact */
  double p = 1.0 / 6227020800.0;
  p = 1.0 / 479001600.0 + r * p;
  p = 1.0 / 39916800.0 + r * p;
  p = 1.0 / 3628800.0 + r * p;
  p = 1.0 / 362880.0 + r * p;
  p = 1.0 / 40320.0 + r * p;
  p = 1.0 / 5040.0 + r * p;
  p = 1.0 / 720.0 + r * p;
  p = 1.0 / 120.0 + r * p;
  p = 1.0 / 24.0 + r * p;
  p = 1.0 / 6.0 + r * p;
  p = 0.5 + r * p;
  return ldexp(1.0 + (r + r * r * p), (int)n);
}

PI2_PORTABLE double pi2_log(double x) {
  if (!(x > 0)) return x == 0 ? -(double)INFINITY : (double)NAN;
  if (!(x < (double)INFINITY)) return x;
  int exponent;
  double m = frexp(x, &exponent); /* in [1/2, 1) */
  if (m < 0x1.6a09e667f3bcdp-1) m *= 2, exponent--;
  /* log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...), |s| < 0.172 */
  const double f = m - 1, s = f / (2 + f), z = s * s;
  double p = 1.0 / 23;
  for (int k = 21; k >= 3; k -= 2) p = 1.0 / k + z * p;
  /* 2 s = f - s f: f is exact */
  return exponent * 0x1.62e42fecp-1 + (f + (s * (2 * z * p - f) + exponent * 0x1.d1cf79abc9e3bp-32));
}

PI2_PORTABLE float pi2_expf(float x) { return (float)pi2_exp((double)x); }

/* Taylor up to 1/2, then polynomials in 4 (|x| - c) around the middles c of seven pieces of [1/2, 4] (Chebyshev's, in
 * powers); behind these the nearest float is 1. */
PI2_PORTABLE double pi2_erf(double x) {
  static const double piece[7][12] = {
      {0x1.6c1c9759d0e7ap-1, 0x1.492e42d78d343p-3, -0x1.edc5644362c8ep-6, 0x1.b6e8591dac133p-12, 0x1.349b5ec00709ap-11,
       -0x1.b42a182202f4ap-15, -0x1.b847a8572790cp-18, 0x1.2e0acb8170ae3p-20, 0x1.2de0a67e8f476p-25,
       -0x1.03fc83beaeb2cp-26, 0x1.5d66879f6686ap-33, 0x1.3f2d1a0f74100p-33},
      {0x1.d8865d98abe0ep-1, 0x1.e4652fadcb53fp-5, -0x1.2ebf3dcca6ff0p-6, 0x1.571d01c5ee0b8p-9, -0x1.93a9a64cddc01p-16,
       -0x1.8281ce5c887e3p-15, 0x1.5cffeb4223912p-18, 0x1.db44e0afc0db3p-23, -0x1.755b690cfa3b9p-24,
       0x1.cbadb357c449ap-29, 0x1.9acf81ec4bfb1p-31, -0x1.47f923e83e584p-34},
      {0x1.f92d077f8d55bp-1, 0x1.b0553032211e6p-7, -0x1.7a4a8a2bb4eaap-8, 0x1.7148c3d562c8fp-10, -0x1.8a0da57d55b5cp-13,
       0x1.b22258a8951cbp-18, 0x1.25b3b708ee22dp-19, -0x1.8d112725b2a4cp-22, 0x1.7e499af33b6e3p-27,
       0x1.d4f3a0302c50ap-29, -0x1.c2dd4182b7e76p-32, -0x1.2cb63b951046cp-39},
      {0x1.ff404760319bap-1, 0x1.d4143a9dfeaafp-10, -0x1.074b60f913263p-10, 0x1.63ef61e81b41cp-12,
       -0x1.38a983019d114p-14, 0x1.5d3b17c4d6d4bp-17, -0x1.7cae5e51cd905p-21, -0x1.5f833238aa569p-25,
       0x1.06167c2ef5809p-26, -0x1.834c8530fd861p-30, -0x1.067ab2cdd7b09p-36, 0x1.0ff84236af4e7p-36},
      {0x1.fff2cfb0453dap-1, 0x1.3360ccd23c8e9p-13, -0x1.a6a519a143fe8p-14, 0x1.69cf466d4e2abp-15,
       -0x1.ab0c2729aa28ep-17, 0x1.693595c64a510p-19, -0x1.b275650787abep-22, 0x1.52b65d317e99ap-25,
       -0x1.754643a9d6a0dp-30, -0x1.2ae90712674e2p-32, 0x1.cb7eb26e6d44bp-35, -0x1.00a80ddf556d1p-38},
      {0x1.ffff6f9f67e55p-1, 0x1.e9b5e8d0142e2p-18, -0x1.8de3cd248c497p-18, 0x1.9aa489e2330a7p-19,
       -0x1.2c7d5fc2004acp-20, 0x1.490a4d891c217p-22, -0x1.14542d004c194p-24, 0x1.647f464dbe36ap-27,
       -0x1.568f6f3477f54p-30, 0x1.b2e7b9f37c36cp-34, -0x1.08a5eb0fed109p-39, -0x1.8f28263953a6ap-41},
      {0x1.fffffc2f171e3p-1, 0x1.d9371e30121a2p-23, -0x1.bba3ac53234cbp-23, 0x1.0b6a7b0c3ae13p-23,
       -0x1.d06f573f8a544p-25, 0x1.3436bd5786074p-26, -0x1.4357dc1b65110p-28, 0x1.110dbd595dbcdp-30,
       -0x1.755d4d4556c87p-33, 0x1.9a060c743180ap-36, -0x1.5f8d2c2af33acp-39, 0x1.99d0bc66edd44p-43},
  };
  const double a = fabs(x);
  if (!(a < 4)) return x != x ? x : x < 0 ? -1.0 : 1.0;
  if (a < 0.5) {
    const double z = x * x;
    double q = 1.0 / (21 * 3628800.0);
    q = -1.0 / (19 * 362880.0) + z * q;
    q = 1.0 / (17 * 40320.0) + z * q;
    q = -1.0 / (15 * 5040.0) + z * q;
    q = 1.0 / (13 * 720.0) + z * q;
    q = -1.0 / (11 * 120.0) + z * q;
    q = 1.0 / (9 * 24.0) + z * q;
    q = -1.0 / (7 * 6.0) + z * q;
    q = 1.0 / (5 * 2.0) + z * q;
    q = -1.0 / 3 + z * q;
    return 0x1.20dd750429b6dp+0 * (x + x * z * q); /* 2 / sqrt(pi) */
  }
  const int i = (int)(2 * a);
  const double t = 4 * a - (2 * i + 1), *p = piece[i - 1];
  double y = p[11];
  for (int k = 10; k >= 0; k--) y = p[k] + t * y;
  return x < 0 ? -y : y;
}

/* The rotation of one position: (half) cosines and sines of position * frequencies, times the magnitude, in float. */
PI2_PORTABLE void pi2_rotation(const double *frequencies, int64_t half, int32_t position, float magnitude,
                               float *cosine, float *sine) {
  for (int64_t i = 0; i < half; i++) {
    double s, c;
    pi2_sincos(position * frequencies[i], &s, &c);
    cosine[i] = (float)c * magnitude;
    sine[i] = (float)s * magnitude;
  }
}
#endif
