/* The embedding of a program. */
#ifndef PI2_OPS_EMBED_H
#define PI2_OPS_EMBED_H
#include "op.h"
#include "rows.h"

typedef struct {        /* the data of PI2_EMBED */
  pi2_matrix matrix;    /* data NULL: its rows are read */
  pi2_row_reader *rows; /* through this, or NULL */
  float scale;
} pi2_embed;
#endif
