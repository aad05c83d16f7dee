/* What _reader.c (Python's side), _read_plan.c and _reads.c (reading) share.

   Words: a piece is a run of bytes with one destination, a job is one read. */

#ifndef MLX_FLASH_READS_H
#define MLX_FLASH_READS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* preadv */
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096            /* what direct I/O wants aligned */
#define MERGE_BYTES (1 << 18) /* the longest read that merging makes */
#define CHUNK_BYTES (1 << 20) /* longer parts are split, so that threads share them */
#define MERGE_IOVECS 512     /* IOV_MAX is 1024 on macOS and Linux */
#define SHORT_READ (-1)      /* beside the errnos: the file ends too early */

/* Extents and parts are filled in by reader.py, packed, hence 64 bits throughout. */
typedef struct { int64_t rows, offset, bytes; } Part; /* rows: address of slot 0 */
typedef struct {
    int64_t fd;
    int64_t align;   /* PAGE for direct I/O, else 1 */
    int64_t scatter; /* the same for each buffer of a read into several of them */
    int64_t offset, stride;
    int64_t n_parts; /* by offset, not overlapping */
    int64_t offsets; /* 0, or the address of a table in the place of offset and stride:
                        where each part of each unit lies, -1 if in another file */
} Extent;

typedef struct Source {
    struct Source *next;
    int64_t n_units, n_slots, n_extents, n_parts, pieces_per_unit;
    Extent *extents;
    Part *parts;             /* of all extents */
    uint32_t *stamps, stamp; /* per slot: the last batch that used it; own memory */
} Source;

typedef struct { int64_t unit, slot; } Pick;
typedef struct { int64_t offset, bytes; uint8_t *dst; } Piece;
typedef struct {
    const Extent *extent;
    int64_t start, end;   /* of the read, aligned */
    int32_t first, count; /* its pieces */
    int64_t ends; /* where its buffers begin and end, all bits in one number */
    int32_t iovecs;
    int32_t straight; /* lands in the slots; otherwise goes through a bounce buffer */
} Job;

typedef struct Batch { /* one block of memory, with the arrays that it points to */
    struct Batch *next;
    const Source *source;
    Pick *picks;
    Piece *pieces;
    Piece *places; /* for planning alone */
    Job *jobs;
    int64_t n_jobs, bytes;
    atomic_llong claimed;
    /* Under the reader's lock: */
    int users, done, abandoned, error; /* error: an errno or SHORT_READ */
    int guess;                         /* gives way to batches that are none */
    int64_t failed, got;               /* the job that failed, how far it came */
    double submitted, ended;
} Batch;

typedef struct { /* in submit order; only the head is being claimed */
    Batch *head, *tail;
} Queue;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    Queue needed, guessed;
    atomic_int waiting; /* whether jobs of `needed` are left to claim */
    Source *sources;
    int stop, joined, n_threads, idle; /* idle: asleep, and not being woken */
    int64_t in_flight; /* batches that have not ended */
    int64_t max_gap;
    pid_t pid; /* threads do not survive a fork: a child must not wait for them */
    pthread_t *threads;
} Reader;

/* align is a power of two; division here was half the cost of planning */
static inline int64_t floor_to(int64_t x, int64_t align) { return x & -align; }
static inline int64_t ceil_to(int64_t x, int64_t align)
{
    return (x + align - 1) & -align;
}
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* A batch with room for n picks and all that is planned of them; NULL if there is no
   memory. Its time begins now. */
Batch *new_batch(const Source *s, int64_t n);

/* Sorts the picks of a batch by unit. */
void sort_picks(Batch *b, int64_t n);

/* Sorts out the reads of a batch of n picks, which are sorted by unit. */
void plan_reads(Batch *b, int64_t n, int64_t max_gap);

/* Puts a planned batch into the queue; 0 if the reader was stopped. */
int queue_batch(Reader *r, Batch *b);

/* Sleeps until a batch has ended. */
void await_batch(Reader *r, Batch *b);

/* Sleeps until every batch has ended, also those that nobody waits for. */
void await_all(Reader *r);

/* Starts the threads of a reader whose `threads` have room for them; an errno or 0. */
int start_threads(Reader *r, int threads);

/* Ends them once everything in flight has ended. */
void end_threads(Reader *r);

/* Frees a reader without threads, and its sources. */
void free_all(Reader *r);

/* What a thread of the pool runs; arg is a Reader. */
void *read_batches(void *arg);

double monotonic_s(void);

#endif
