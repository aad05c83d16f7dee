/* Reads planned batches with a pool of threads, which claim the reads with an atomic
   counter. */

#include "_reads.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define STACK_BYTES (1 << 18) /* of a thread */

double monotonic_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

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

static Queue *queue_of(Reader *r, const Batch *b)
{
    return b->guess ? &r->guessed : &r->needed;
}

/* The lock is taken twice per thread and batch, never per read, but where a thread
   leaves a guess to read what is needed. A batch has ended when it has left the queue,
   all its jobs claimed, and its last user lets go. */
void *read_batches(void *arg)
{
    Reader *r = arg;
    uint8_t *buffer = NULL;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        Batch *b;
        while (!(b = r->needed.head) && !(b = r->guessed.head) && !r->stop) {
            r->idle++;
            pthread_cond_wait(&r->work, &r->lock);
        }
        if (!b)
            break; /* stopped, and nothing left in flight to claim */
        b->users++;
        int wake = reserve(r, b->n_jobs - atomic_load(&b->claimed) - 1, 2);
        pthread_mutex_unlock(&r->lock);
        while (wake-- > 0)
            pthread_cond_signal(&r->work);

        int64_t i, got;
        int error = 0;
        while (!error && !(b->guess && atomic_load(&r->waiting)) &&
               (i = atomic_fetch_add(&b->claimed, 1)) < b->n_jobs)
            error = run_job(b, &b->jobs[i], &buffer, &got);
        if (error) /* the batch is lost: leave the rest unread */
            atomic_store(&b->claimed, b->n_jobs);

        pthread_mutex_lock(&r->lock);
        if (error && (!b->error || i < b->failed)) {
            b->error = error;
            b->failed = i;
            b->got = got;
        }
        Queue *queue = queue_of(r, b);
        int claimed = atomic_load(&b->claimed) >= b->n_jobs;
        if (claimed && queue->head == b)
            queue->head = b->next;
        atomic_store(&r->waiting, r->needed.head != NULL);
        if (--b->users == 0 && claimed) {
            b->ended = monotonic_s();
            b->done = 1;
            r->in_flight--;
            if (b->abandoned)
                free(b);
            pthread_cond_broadcast(&r->done);
        }
    }
    pthread_mutex_unlock(&r->lock);
    free(buffer);
    return NULL;
}

int queue_batch(Reader *r, Batch *b)
{
    pthread_mutex_lock(&r->lock);
    int stop = r->stop, wake = 0;
    if (stop) {
        b->done = 1;
    } else if (b->n_jobs) {
        Queue *queue = queue_of(r, b);
        if (queue->head)
            queue->tail->next = b;
        else
            queue->head = b;
        queue->tail = b;
        atomic_store(&r->waiting, r->needed.head != NULL);
        r->in_flight++;
        wake = reserve(r, 1, 1);
    }
    pthread_mutex_unlock(&r->lock);
    if (wake)
        pthread_cond_signal(&r->work);
    return !stop;
}

void await_batch(Reader *r, Batch *b)
{
    pthread_mutex_lock(&r->lock);
    while (!b->done)
        pthread_cond_wait(&r->done, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

void await_all(Reader *r)
{
    pthread_mutex_lock(&r->lock);
    while (r->in_flight)
        pthread_cond_wait(&r->done, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

int start_threads(Reader *r, int threads)
{
    /* Signals belong to Python's main thread: the workers start with all blocked. */
    int error = 0;
    sigset_t all, before;
    pthread_attr_t small;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    while (!error && r->n_threads < threads) {
        error = pthread_create(&r->threads[r->n_threads], &small, read_batches, r);
        r->n_threads += !error;
    }
    pthread_attr_destroy(&small);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

void end_threads(Reader *r)
{
    pthread_mutex_lock(&r->lock);
    r->stop = 1;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < r->n_threads; i++)
        pthread_join(r->threads[i], NULL);
}

void free_all(Reader *r)
{
    for (Source *next, *s = r->sources; s; s = next) {
        next = s->next;
        free(s->stamps);
        free(s);
    }
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->done);
    free(r->threads);
    free(r);
}
