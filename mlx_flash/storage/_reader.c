/* Reads batches of units from flash into slot arrays, with a pool of threads.

   submit() plans a batch on the caller's thread: the units sorted by file offset,
   neighbours merged into one read, large parts split. Worker threads claim its
   reads with an atomic counter and never touch Python. wait() sleeps, without the
   GIL, until the last read has ended. _pool_reader.py is the same in Python and
   plans the same reads: change both, a test compares them.

   reader.py checks every extent and array before it passes their addresses; the
   ids of a batch are checked here. So no read can land outside of a slot.

   Words: a piece is a run of bytes with one destination, a job is one read. */

#define Py_LIMITED_API 0x030A0000 /* one binary for Python 3.10 and later */
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* preadv */
#endif
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096            /* what direct I/O wants aligned */
#define MERGE_BYTES (1 << 18) /* the longest read that merging makes */
#define CHUNK_BYTES (1 << 20) /* longer parts are split, so that threads share them */
#define MERGE_IOVECS 512     /* IOV_MAX is 1024 on macOS and Linux */
#define STACK_BYTES (1 << 18)
#define SHORT_READ (-1)      /* beside the errnos: the file ends too early */

/* Extents and parts are filled in by reader.py, packed, hence 64 bits throughout. */
typedef struct { int64_t rows, offset, bytes; } Part; /* rows: address of slot 0 */
typedef struct {
    int64_t fd, align, offset, stride; /* align: PAGE for direct I/O, else 1 */
    int64_t n_parts; /* by offset, not overlapping */
} Extent;

typedef struct Source {
    struct Source *next;
    int64_t n_units, n_slots, n_extents, pieces_per_unit;
    Extent *extents;
    Part *parts; /* of all extents */
    uint32_t *stamps, stamp; /* per slot: the last batch that used it */
} Source;

typedef struct { int64_t unit, slot; } Pick;
typedef struct { int64_t offset, bytes; uint8_t *dst; } Piece;
typedef struct {
    const Extent *extent;
    int64_t start, end;   /* of the read, aligned */
    int32_t first, count; /* its pieces */
    int32_t iovecs;
    int32_t straight; /* lands in the slots; otherwise goes through a bounce buffer */
} Job;

typedef struct Batch { /* one block of memory, with the arrays that it points to */
    struct Batch *next;
    const Source *source;
    Pick *picks;
    Piece *pieces;
    Job *jobs;
    int64_t n_jobs, bytes;
    atomic_llong claimed;
    /* Under the reader's lock: */
    int users, done, abandoned, error; /* error: an errno or SHORT_READ */
    int64_t failed, got;               /* the job that failed, how far it came */
    double submitted, ended;
} Batch;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    Batch *head, *tail; /* in submit order; only the head is being claimed */
    Source *sources;
    int stop, joined, n_threads, idle; /* idle: asleep, and not being woken */
    int64_t max_gap;
    pid_t pid; /* threads do not survive a fork: a child must not wait for them */
    pthread_t *threads;
} Reader;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* align is a power of two; division here was half the cost of planning */
static int64_t floor_to(int64_t x, int64_t align) { return x & -align; }
static int64_t ceil_to(int64_t x, int64_t align) { return (x + align - 1) & -align; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- plan: on the caller's thread ---- */

static int by_unit(const void *a, const void *b)
{
    int64_t x = ((const Pick *)a)->unit, y = ((const Pick *)b)->unit;
    return (x > y) - (x < y);
}

/* Adds a piece to the last job if one read may serve both, else opens a new job.
   `gap` is how many unwanted bytes, beyond alignment, are worth reading over. */
static void add_piece(Batch *b, const Extent *e, Piece piece, int32_t index,
                      int64_t gap)
{
    int64_t start = floor_to(piece.offset, e->align);
    int64_t end = ceil_to(piece.offset + piece.bytes, e->align);
    int straight = e->align == 1 ||
        ((piece.offset | piece.bytes | (int64_t)(uintptr_t)piece.dst) % PAGE == 0);
    b->pieces[index] = piece;
    if (b->n_jobs) {
        Job *job = &b->jobs[b->n_jobs - 1];
        const Piece *last = &b->pieces[index - 1];
        int64_t skipped = piece.offset - (last->offset + last->bytes);
        int32_t iovecs = job->iovecs + (skipped > 0 ? 2 : 1);
        /* skipped < 0: the same unit a second time, for another slot */
        if (job->extent == e && skipped >= 0 && start - job->end <= gap &&
            end - job->start <= MERGE_BYTES && iovecs <= MERGE_IOVECS) {
            b->bytes += end - job->end;
            job->end = end;
            job->count++;
            job->iovecs = iovecs;
            job->straight &= straight;
            return;
        }
    }
    b->jobs[b->n_jobs++] = (Job){e, start, end, index, 1, 1, straight};
    b->bytes += end - start;
}

static void plan(Batch *b, int64_t n, int64_t max_gap)
{
    int32_t index = 0;
    const Part *part = b->source->parts;
    const Extent *e = b->source->extents, *end = e + b->source->n_extents;
    for (; e < end; part += e++->n_parts) {
        for (const Pick *pick = b->picks; pick < b->picks + n; pick++) {
            int64_t unit = e->offset + pick->unit * e->stride, gap = max_gap;
            for (const Part *p = part; p < part + e->n_parts; p++) {
                uint8_t *row = (uint8_t *)(intptr_t)p->rows + pick->slot * p->bytes;
                int64_t at = unit + p->offset, stop = at + p->bytes;
                while (at < stop) { /* large parts are cut at a page of the file */
                    int64_t cut = floor_to(at + CHUNK_BYTES, PAGE);
                    int64_t bytes = (stop - at > CHUNK_BYTES ? cut : stop) - at;
                    add_piece(b, e, (Piece){at, bytes, row}, index++, gap);
                    at += bytes;
                    row += bytes;
                }
                /* Padding inside a unit costs less than a second read. */
                gap = larger(max_gap, PAGE);
            }
        }
    }
}

/* ---- read: on the worker threads ---- */

static int fill_iovecs(const Batch *b, const Job *job, uint8_t *buffer, int64_t skip,
                       struct iovec *iov)
{
    int n = 0;
    if (!job->straight) {
        iov[0] = (struct iovec){buffer + skip, (size_t)(job->end - job->start - skip)};
        return 1;
    }
    int64_t at = job->start + skip; /* what is before it has been read */
    for (int i = 0; i < job->count; i++) {
        const Piece *p = &b->pieces[job->first + i];
        int64_t end = p->offset + p->bytes;
        if (end <= at)
            continue;
        if (p->offset > at) { /* a gap: all of them into the same scratch */
            iov[n++] = (struct iovec){buffer, (size_t)(p->offset - at)};
            at = p->offset;
        }
        iov[n++] = (struct iovec){p->dst + (at - p->offset), (size_t)(end - at)};
        at = end;
    }
    return n;
}

/* Returns 0, an errno, or SHORT_READ; *got is how far the read came. */
static int run_job(const Batch *b, const Job *job, uint8_t **buffer, int64_t *got)
{
    struct iovec iov[MERGE_IOVECS];
    const Piece *pieces = &b->pieces[job->first], *last = &pieces[job->count - 1];
    int64_t need = last->offset + last->bytes - job->start;
    *got = 0;
    /* Scratch of a read with gaps, bounce buffer of a read that is not aligned. */
    if (!*buffer && (!job->straight || job->iovecs > job->count) &&
        posix_memalign((void **)buffer, 4 * PAGE, CHUNK_BYTES + 2 * PAGE)) {
        *buffer = NULL;
        return ENOMEM;
    }
    while (*got < need) {
        /* Direct I/O that stopped inside a page goes on from the page's start; at the
           end of the file it may stop there, as long as it has what is wanted. */
        int64_t skip = floor_to(*got, job->extent->align);
        int n_iov = fill_iovecs(b, job, *buffer, skip, iov);
        off_t from = (off_t)(job->start + skip);
        ssize_t n = preadv((int)job->extent->fd, iov, n_iov, from);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        if (skip + n <= *got)
            return SHORT_READ;
        *got = skip + n;
    }
    if (!job->straight)
        for (int i = 0; i < job->count; i++)
            memcpy(pieces[i].dst, *buffer + (pieces[i].offset - job->start),
                   (size_t)pieces[i].bytes);
    return 0;
}

/* Threads to wake for so many jobs. submit() wakes one, every thread two more: waking
   all 32 at once held up the submitting thread for 0.2 to 1 ms (2 cores). */
static int reserve(Reader *r, int64_t jobs, int most)
{
    int wake = r->idle < most ? r->idle : most;
    wake = jobs < wake ? (int)larger(jobs, 0) : wake;
    r->idle -= wake;
    return wake;
}

/* The lock is taken twice per thread and batch, never per read. A batch has ended
   when it has left the queue, all its jobs claimed, and its last user lets go. */
static void *worker(void *arg)
{
    Reader *r = arg;
    uint8_t *buffer = NULL;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        while (!r->head && !r->stop) {
            r->idle++;
            pthread_cond_wait(&r->work, &r->lock);
        }
        Batch *b = r->head;
        if (!b)
            break; /* stopped, and nothing left in flight to claim */
        b->users++;
        int wake = reserve(r, b->n_jobs - atomic_load(&b->claimed) - 1, 2);
        pthread_mutex_unlock(&r->lock);
        while (wake-- > 0)
            pthread_cond_signal(&r->work);

        int64_t i, got;
        int error = 0;
        while (!error && (i = atomic_fetch_add(&b->claimed, 1)) < b->n_jobs)
            error = run_job(b, &b->jobs[i], &buffer, &got);
        if (error) /* the batch is lost: leave the rest unread */
            atomic_store(&b->claimed, b->n_jobs);

        pthread_mutex_lock(&r->lock);
        if (error && (!b->error || i < b->failed)) {
            b->error = error;
            b->failed = i;
            b->got = got;
        }
        if (r->head == b)
            r->head = b->next;
        if (--b->users == 0) {
            b->ended = now();
            b->done = 1;
            if (b->abandoned)
                free(b);
            else
                pthread_cond_broadcast(&r->done);
        }
    }
    pthread_mutex_unlock(&r->lock);
    free(buffer);
    return NULL;
}

/* ---- Python: handles are capsules; a ticket's context is its reader's capsule ---- */

static void stop_threads(Reader *r)
{
    if (r->joined || r->pid != getpid())
        return;
    r->joined = 1; /* under the GIL */
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&r->lock);
    r->stop = 1;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < r->n_threads; i++)
        pthread_join(r->threads[i], NULL);
    Py_END_ALLOW_THREADS
}

static void free_reader(PyObject *capsule)
{
    Reader *r = PyCapsule_GetPointer(capsule, "reader");
    if (r->pid != getpid())
        return; /* a forked child: the lock's state is unknown, so let it leak */
    stop_threads(r);
    for (Source *next, *s = r->sources; s; s = next) {
        next = s->next;
        free(s);
    }
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->done);
    free(r->threads);
    free(r);
}

static void free_ticket(PyObject *capsule)
{
    Batch *b = PyCapsule_GetPointer(capsule, "ticket");
    PyObject *owner = PyCapsule_GetContext(capsule);
    Reader *r = PyCapsule_GetPointer(owner, "reader");
    if (r->pid == getpid()) {
        pthread_mutex_lock(&r->lock);
        int done = b->done;
        b->abandoned = 1; /* never waited for: its last worker frees it */
        pthread_mutex_unlock(&r->lock);
        if (done)
            free(b);
    }
    Py_DECREF(owner);
}

static Reader *get_reader(PyObject *capsule)
{
    Reader *r = PyCapsule_GetPointer(capsule, "reader");
    if (r && r->pid != getpid()) {
        PyErr_SetString(PyExc_ValueError, "the reader was opened before a fork; "
                        "open another one in the child process");
        return NULL;
    }
    return r;
}

static PyObject *py_create(PyObject *Py_UNUSED(self), PyObject *args)
{
    int threads, error = 0;
    long long max_gap;
    if (!PyArg_ParseTuple(args, "iL", &threads, &max_gap))
        return NULL;
    Reader *r = calloc(1, sizeof *r);
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    if (!r || !ids) {
        free(r);
        free(ids);
        return PyErr_NoMemory();
    }
    *r = (Reader){.max_gap = max_gap, .pid = getpid(), .threads = ids};
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->done, NULL);
    PyObject *capsule = PyCapsule_New(r, "reader", free_reader);
    if (!capsule)
        return NULL;

    /* Signals belong to Python's main thread: the workers start with all blocked. */
    sigset_t all, before;
    pthread_attr_t small;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    while (!error && r->n_threads < threads) {
        error = pthread_create(&ids[r->n_threads], &small, worker, r);
        r->n_threads += !error;
    }
    pthread_attr_destroy(&small);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        Py_DECREF(capsule);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return capsule;
}

/* extents and parts: bytes that hold an array of Extent and of Part */
static PyObject *py_add_source(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *capsule;
    const char *extents, *parts;
    Py_ssize_t extents_size, parts_size;
    long long n_units, n_slots;
    if (!PyArg_ParseTuple(args, "Oy#y#LL", &capsule, &extents, &extents_size, &parts,
                          &parts_size, &n_units, &n_slots))
        return NULL;
    Reader *r = get_reader(capsule);
    if (!r)
        return NULL;
    size_t arrays = (size_t)extents_size + (size_t)parts_size;
    Source *s = calloc(1, sizeof *s + arrays + (size_t)n_slots * sizeof(uint32_t));
    if (!s)
        return PyErr_NoMemory();
    s->n_units = n_units;
    s->n_slots = n_slots;
    s->n_extents = extents_size / (Py_ssize_t)sizeof(Extent);
    s->extents = memcpy(s + 1, extents, (size_t)extents_size);
    s->parts = memcpy(s->extents + s->n_extents, parts, (size_t)parts_size);
    s->stamps = (uint32_t *)((char *)s->parts + parts_size);
    for (Part *p = s->parts; p < (Part *)s->stamps; p++) /* a cut may be a page early */
        s->pieces_per_unit += p->bytes / (CHUNK_BYTES - PAGE) + 1;
    s->next = r->sources;
    r->sources = s;
    return PyCapsule_New(s, "source", NULL); /* the reader frees it */
}

static int refuse(const char *format, int64_t value, int64_t limit)
{
    PyErr_Format(PyExc_ValueError, format, (long long)value, (long long)limit);
    return 0;
}

/* Copies the ids, each of them checked, and sorts by unit. 0: one is refused. */
static int check_picks(Batch *b, Source *s, const int64_t *units, const int64_t *slots,
                       int64_t n)
{
    int sorted = 1;
    if (++s->stamp == 0) { /* wrapped around: forget the old stamps */
        memset(s->stamps, 0, (size_t)s->n_slots * sizeof(uint32_t));
        s->stamp = 1;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t unit = units[i], slot = slots[i];
        if (unit < 0 || unit >= s->n_units)
            return refuse("unit %lld is not in [0, %lld)", unit, s->n_units);
        if (slot < 0 || slot >= s->n_slots)
            return refuse("slot %lld is not in [0, %lld)", slot, s->n_slots);
        if (s->stamps[slot] == s->stamp)
            return refuse("slot %lld is twice in a batch of %lld", slot, n);
        s->stamps[slot] = s->stamp;
        b->picks[i] = (Pick){unit, slot};
        sorted &= !i || units[i - 1] <= unit;
    }
    if (!sorted)
        qsort(b->picks, (size_t)n, sizeof(Pick), by_unit);
    return 1;
}

static PyObject *py_submit(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *capsule, *source;
    unsigned long long units, slots;
    long long n;
    if (!PyArg_ParseTuple(args, "OOKKL", &capsule, &source, &units, &slots, &n))
        return NULL;
    Reader *r = get_reader(capsule);
    Source *s = r ? PyCapsule_GetPointer(source, "source") : NULL;
    if (!s)
        return NULL;
    int64_t most = n * s->pieces_per_unit; /* pieces, and so jobs */
    if (n > s->n_slots || most > INT32_MAX) { /* before memory is asked for */
        refuse("a batch of %lld units is too large for %lld slots", n, s->n_slots);
        return NULL;
    }
    double submitted = now();
    Batch *b = malloc(sizeof *b + (size_t)n * sizeof(Pick) +
                      (size_t)most * (sizeof(Piece) + sizeof(Job)));
    if (!b)
        return PyErr_NoMemory();
    *b = (Batch){.source = s, .submitted = submitted, .ended = submitted};
    b->picks = (Pick *)(b + 1);
    b->pieces = (Piece *)(b->picks + n);
    b->jobs = (Job *)(b->pieces + most);
    const int64_t *from = (int64_t *)(uintptr_t)units;
    const int64_t *to = (int64_t *)(uintptr_t)slots;
    if (!check_picks(b, s, from, to, n)) {
        free(b);
        return NULL;
    }
    plan(b, n, r->max_gap);
    b->done = b->n_jobs == 0;

    PyObject *ticket = PyCapsule_New(b, "ticket", NULL);
    if (!ticket || PyCapsule_SetContext(ticket, capsule) ||
        PyCapsule_SetDestructor(ticket, free_ticket)) {
        Py_XDECREF(ticket);
        free(b);
        return NULL;
    }
    Py_INCREF(capsule);
    pthread_mutex_lock(&r->lock);
    int stop = r->stop, wake = 0;
    if (stop) {
        b->done = 1;
    } else if (b->n_jobs) {
        if (r->head)
            r->tail->next = b;
        else
            r->head = b;
        r->tail = b;
        wake = reserve(r, 1, 1);
    }
    pthread_mutex_unlock(&r->lock);
    if (wake)
        pthread_cond_signal(&r->work);
    if (stop) {
        Py_DECREF(ticket);
        PyErr_SetString(PyExc_ValueError, "the reader is closed");
        return NULL;
    }
    return ticket;
}

/* -> (bytes, reads, seconds, error, extent, offset, bytes of the failed read, got) */
static PyObject *py_wait(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *ticket;
    if (!PyArg_ParseTuple(args, "O", &ticket))
        return NULL;
    Batch *b = PyCapsule_GetPointer(ticket, "ticket");
    if (!b)
        return NULL;
    Reader *r = get_reader(PyCapsule_GetContext(ticket));
    if (!r)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&r->lock);
    while (!b->done)
        pthread_cond_wait(&r->done, &r->lock);
    pthread_mutex_unlock(&r->lock);
    Py_END_ALLOW_THREADS
    Job job = {.extent = b->source->extents};
    if (b->error)
        job = b->jobs[b->failed];
    return Py_BuildValue(
        "LLdiiLLL", (long long)b->bytes, (long long)b->n_jobs, b->ended - b->submitted,
        b->error, (int)(job.extent - b->source->extents), (long long)job.start,
        (long long)(job.end - job.start), (long long)b->got);
}

static PyObject *py_close(PyObject *Py_UNUSED(self), PyObject *capsule)
{
    Reader *r = PyCapsule_GetPointer(capsule, "reader");
    if (!r)
        return NULL;
    stop_threads(r);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"create", py_create, METH_VARARGS, "create(threads, max_gap_bytes) -> reader"},
    {"add_source", py_add_source, METH_VARARGS,
     "add_source(reader, extents, parts, n_units, n_slots) -> source"},
    {"submit", py_submit, METH_VARARGS,
     "submit(reader, source, address of units, of slots, length) -> ticket"},
    {"wait", py_wait, METH_VARARGS, "wait(ticket) -> what it read, or what failed"},
    {"close", py_close, METH_O, "close(reader): ends all flights, joins the threads"},
    {0},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_reader", .m_size = -1, .m_methods = methods,
    .m_doc = "Threads that read batches of units; use it through storage/reader.py."};

PyMODINIT_FUNC PyInit__reader(void) { return PyModule_Create(&module); }
