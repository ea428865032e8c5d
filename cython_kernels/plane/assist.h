/* Threads of assistants: they take parts of the gang's work, and nobody waits for them.
 *
 * The first `members` threads of a gang meet at barriers; the others, on slower or contended cores, do not. A core that
 * the system takes away in the middle of an operation would else hold the whole step: under a quota of 30 % of a core,
 * for 70 of each 100 ms.
 *
 * An assistant computes a part of an operation into memory of its own. Meanwhile it claims it:
 *
 *   FREE -> TAKING -> HELD -> WRITING -> FREE     the assistant
 *                     HELD -> FREE                a member takes the part over
 *
 * TAKING and WRITING last for moments, and members wait for their end. HELD lasts as long as the arithmetic does: a
 * member that has nothing else left takes a part over when it is late, and computes it again. The assistant then finds
 * its claim gone and writes nothing. So each part is written once, and bits do not depend on who computed it.
 *
 * Stages. Thread 0 publishes which stage is open: an operation of a run whose input is complete. An assistant may be
 * suspended at any instruction and go on when that run is long over. What it reads then may be changing, and is never
 * used; it lies within the buffers of the program, which waits for its assistants before it frees them
 * (pi2_gang_assist). What parts are taken from carries a tag of the run, so that none of another run is taken. */
#ifndef PI2_ASSIST_H
#define PI2_ASSIST_H
#include <stdatomic.h>
#include <stdint.h>

#include "gang.h"

struct pi2_program;
struct pi2_run;

enum pi2_claim_state { PI2_FREE, PI2_TAKING, PI2_HELD, PI2_WRITING };

/* Part of an operation: row blocks [first, last), and rows [row, row + rows) of the step. */
typedef struct {
  int64_t first, last;
  int row, rows;
} pi2_part;

typedef struct {
  _Alignas(64) _Atomic uint64_t claim; /* number of the claim << 2 | pi2_claim_state */
  _Atomic uint64_t stage;              /* of the claim. It and what follows are written before HELD */
  _Atomic uint64_t since;              /* ticks */
  _Atomic int64_t first, last;
  _Atomic int row, rows;
  _Atomic uint64_t busy; /* ticks in parts that it wrote, since the program was made; only the thread itself adds */
  uint64_t told;         /* of these, those of runs that have ended; thread 0 */
} pi2_assistant;

/* -- members */
/* The input of operation `index` is complete, thread 0 says. */
void pi2_stage_open(struct pi2_run *run, int index, const pi2_worker *w);
/* When a thread finds no part of the operation any more. 1: *part was an assistant's, and is this thread's now. 0: no
 * assistant has one. `began`, `blocks`: since when this thread has multiplied, and how many row blocks times rows. A
 * part is late when it takes four times as long as it would take here. */
int pi2_take_over(struct pi2_run *run, int index, const pi2_worker *w, uint64_t began, int64_t blocks, pi2_part *part);
/* Thread 0, when a run begins and when it ends. */
void pi2_assistants_begin(struct pi2_run *run);
void pi2_assistants_end(struct pi2_run *run);

/* -- an assistant's thread */
/* Its job: parts of whatever is open, until no run is left. */
uint32_t pi2_assist(void *program, pi2_worker *w);
/* 1: the stage that the assistant works on is still open, and no run of it ends before pi2_claim_hold or _drop. */
int pi2_claim_begin(struct pi2_program *p, const pi2_worker *w);
void pi2_claim_hold(struct pi2_program *p, const pi2_worker *w, const pi2_part *part);
void pi2_claim_drop(struct pi2_program *p, const pi2_worker *w);
/* Before the first byte of the results is written. 0: the part was taken over, and nothing may be written. Else the run
 * goes on only behind pi2_claim_end. */
int pi2_claim_write(struct pi2_program *p, const pi2_worker *w);
void pi2_claim_end(struct pi2_run *run, int index, const pi2_worker *w);
/* The tag of what parts of the stage are taken from. */
uint64_t pi2_stage_tag(const struct pi2_program *p, const pi2_worker *w);
#endif
