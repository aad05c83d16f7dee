/* Python's side of the reader: readers, sources and tickets are capsules.

   submit() plans a batch on the caller's thread; the threads of _reads.c read it;
   wait() sleeps, without the GIL, until the last read has ended. A ticket's context is
   its reader's capsule.

   source.py checks extents and arrays before native_reader.py passes their addresses,
   ids are checked here: no read can land outside of a slot. */

#define Py_LIMITED_API 0x030B0000 /* one binary for Python 3.11 and later */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_reads.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void stop_threads(Reader *r)
{
    if (r->joined || r->pid != getpid())
        return;
    r->joined = 1; /* under the GIL */
    Py_BEGIN_ALLOW_THREADS
    end_threads(r);
    Py_END_ALLOW_THREADS
}

static void free_reader(PyObject *capsule)
{
    Reader *r = PyCapsule_GetPointer(capsule, "reader");
    if (r->pid != getpid())
        return; /* a forked child: the lock's state is unknown, so let it leak */
    stop_threads(r);
    free_all(r);
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
    int threads, error;
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
    if ((error = start_threads(r, threads))) {
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
    Source *s = calloc(1, sizeof *s + arrays);
    if (!s || !(s->stamps = calloc((size_t)n_slots, sizeof(uint32_t)))) {
        free(s);
        return PyErr_NoMemory();
    }
    s->n_units = n_units;
    s->n_slots = n_slots;
    s->n_extents = extents_size / (Py_ssize_t)sizeof(Extent);
    s->extents = memcpy(s + 1, extents, (size_t)extents_size);
    s->parts = memcpy(s->extents + s->n_extents, parts, (size_t)parts_size);
    s->n_parts = parts_size / (Py_ssize_t)sizeof(Part);
    for (int64_t i = 0; i < s->n_parts; i++) /* a cut may be a page early */
        s->pieces_per_unit += s->parts[i].bytes / (CHUNK_BYTES - PAGE) + 1;
    s->next = r->sources;
    r->sources = s;
    return PyCapsule_New(s, "source", NULL); /* the reader frees it */
}

/* A source's slots lie elsewhere now. Nothing of the reader may be in flight. */
static PyObject *py_move_source(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *capsule, *source;
    const char *parts;
    Py_ssize_t size;
    long long n_slots;
    if (!PyArg_ParseTuple(args, "OOy#L", &capsule, &source, &parts, &size, &n_slots))
        return NULL;
    Reader *r = get_reader(capsule);
    Source *s = r ? PyCapsule_GetPointer(source, "source") : NULL;
    if (!s)
        return NULL;
    if (r->in_flight || size != s->n_parts * (Py_ssize_t)sizeof(Part)) {
        PyErr_SetString(PyExc_ValueError, "a source in use, or another one's parts");
        return NULL;
    }
    uint32_t *stamps = calloc((size_t)n_slots, sizeof(uint32_t));
    if (!stamps)
        return PyErr_NoMemory();
    free(s->stamps);
    s->stamps = stamps;
    s->stamp = 0;
    s->n_slots = n_slots;
    memcpy(s->parts, parts, (size_t)size);
    Py_RETURN_NONE;
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
        sort_picks(b, n);
    return 1;
}

static PyObject *py_submit(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *capsule, *source;
    unsigned long long units, slots;
    long long n;
    int guess;
    if (!PyArg_ParseTuple(args, "OOKKLp", &capsule, &source, &units, &slots, &n,
                          &guess))
        return NULL;
    Reader *r = get_reader(capsule);
    Source *s = r ? PyCapsule_GetPointer(source, "source") : NULL;
    if (!s)
        return NULL;
    /* Before memory is asked for */
    if (n > s->n_slots || n * s->pieces_per_unit > INT32_MAX) {
        refuse("a batch of %lld units is too large for %lld slots", n, s->n_slots);
        return NULL;
    }
    Batch *b = new_batch(s, n);
    if (!b)
        return PyErr_NoMemory();
    b->guess = guess;
    const int64_t *from = (int64_t *)(uintptr_t)units;
    const int64_t *to = (int64_t *)(uintptr_t)slots;
    if (!check_picks(b, s, from, to, n)) {
        free(b);
        return NULL;
    }
    plan_reads(b, n, r->max_gap);
    b->done = b->n_jobs == 0;
    PyObject *ticket = PyCapsule_New(b, "ticket", NULL);
    if (!ticket || PyCapsule_SetContext(ticket, capsule) ||
        PyCapsule_SetDestructor(ticket, free_ticket)) {
        Py_XDECREF(ticket);
        free(b);
        return NULL;
    }
    Py_INCREF(capsule);
    if (!queue_batch(r, b)) {
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
    await_batch(r, b);
    Py_END_ALLOW_THREADS
    Job job = {.extent = b->source->extents};
    if (b->error)
        job = b->jobs[b->failed];
    return Py_BuildValue(
        "LLdiiLLL", (long long)b->bytes, (long long)b->n_jobs, b->ended - b->submitted,
        b->error, (int)(job.extent - b->source->extents), (long long)job.start,
        (long long)(job.end - job.start), (long long)b->got);
}

static PyObject *py_drain(PyObject *Py_UNUSED(self), PyObject *capsule)
{
    Reader *r = get_reader(capsule);
    if (!r)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    await_all(r);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
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
    {"move_source", py_move_source, METH_VARARGS,
     "move_source(reader, source, parts, n_slots)"},
    {"submit", py_submit, METH_VARARGS,
     "submit(reader, source, address of units, of slots, length, guess) -> ticket"},
    {"wait", py_wait, METH_VARARGS, "wait(ticket) -> what it read, or what failed"},
    {"drain", py_drain, METH_O, "drain(reader): waits until nothing is in flight"},
    {"close", py_close, METH_O, "close(reader): ends all flights, joins the threads"},
    {0},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_reader", .m_size = -1, .m_methods = methods,
    .m_doc = "Threads that read batches of units; use it through reader.py."};

PyMODINIT_FUNC PyInit__reader(void) { return PyModule_Create(&module); }
