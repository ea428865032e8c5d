/* What Cython modules call of the shared library. Everything else is hidden (meson.build): so calls inside the library
 * are direct, and no name of it meets one of another library. */
#ifndef PI2_API_H
#define PI2_API_H

#define PI2_API __attribute__((visibility("default")))

#endif
