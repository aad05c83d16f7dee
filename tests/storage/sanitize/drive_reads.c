/* Drives _read_plan.c and _reads.c under a sanitizer: threads that submit, wait, abandon and drain at
   the same time, reads that fail, and readers that stop while reads are in flight.

   Every byte that arrived is compared with the file. Exits with 1 where one differs. */

#include "_reads.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { UNITS = 64, STRIDE = 5000, FIRST = 1000, READERS = 8, CLIENTS = 6 };
enum { SLOTS = 24, READ_AT_ONCE = 16 };

typedef struct {
    Reader *reader;
    int fd, rounds;
    unsigned seed;
} Client;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint8_t content(int64_t at) { return (uint8_t)(at * 31 + at / 251); }

static Reader *start_reader(void)
{
    Reader *r = calloc(1, sizeof *r);
    *r = (Reader){.max_gap = PAGE, .pid = getpid()};
    r->threads = calloc(READERS, sizeof *r->threads);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->done, NULL);
    for (; r->n_threads < READERS; r->n_threads++)
        pthread_create(&r->threads[r->n_threads], NULL, read_batches, r);
    return r;
}

static void stop_reader(Reader *r) /* as _reader.c does */
{
    pthread_mutex_lock(&r->lock);
    r->stop = 1;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < r->n_threads; i++)
        pthread_join(r->threads[i], NULL);
}

static void free_reader(Reader *r)
{
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->done);
    free(r->threads);
    free(r);
}

static Batch *plan(const Source *s, const Pick *picks, int64_t n)
{
    int64_t most = n * s->pieces_per_unit;
    Batch *b = malloc(sizeof *b + (size_t)n * sizeof(Pick) +
                      (size_t)most * (sizeof(Piece) + sizeof(Job)));
    *b = (Batch){.source = s, .submitted = monotonic_s()};
    b->picks = memcpy(b + 1, picks, (size_t)n * sizeof *picks);
    b->pieces = (Piece *)(b->picks + n);
    b->jobs = (Job *)(b->pieces + most);
    sort_picks(b, n);
    plan_reads(b, n, PAGE);
    b->done = b->n_jobs == 0;
    return b;
}

static void let_go(Reader *r, Batch *b)
{
    pthread_mutex_lock(&r->lock);
    int done = b->done;
    b->abandoned = 1;
    pthread_mutex_unlock(&r->lock);
    if (done)
        free(b);
}

static void check(const Part *parts, const Pick *picks, int n)
{
    for (int i = 0; i < n; i++)
        for (int p = 0; p < 2; p++) {
            int64_t at = picks[i].unit * STRIDE + parts[p].offset;
            const uint8_t *row = (uint8_t *)(intptr_t)parts[p].rows;
            row += picks[i].slot * parts[p].bytes;
            for (int64_t j = 0; j < parts[p].bytes; j++)
                if (row[j] != content(at + j))
                    fail("a slot has other bytes than the file");
        }
}

/* Batches in all sizes. One in eight is let go of unread, one in eight fails. */
static void *submit_batches(void *arg)
{
    Client *c = arg;
    uint8_t *rows = malloc(SLOTS * STRIDE);
    Part parts[] = {{(intptr_t)rows, 0, FIRST},
                    {(intptr_t)rows + SLOTS * FIRST, FIRST, STRIDE - FIRST}};
    Extent good = {c->fd, 1, 1, 0, STRIDE, 2, 0}, bad = {-1, 1, 1, 0, STRIDE, 2, 0};
    Source source = {.n_units = UNITS, .n_slots = SLOTS, .n_extents = 1,
                     .pieces_per_unit = 2, .extents = &good, .parts = parts};
    Source lost = source;
    lost.extents = &bad;
    for (int round = 0; round < c->rounds; round++) {
        Pick picks[READ_AT_ONCE];
        int n = rand_r(&c->seed) % READ_AT_ONCE, how = rand_r(&c->seed) % 8;
        for (int i = 0; i < n; i++)
            picks[i] = (Pick){rand_r(&c->seed) % UNITS, i};
        Batch *b = plan(how == 0 ? &lost : &source, picks, n);
        b->guess = rand_r(&c->seed) % 3 == 0;
        if (!queue_batch(c->reader, b)) {
            free(b);
            break; /* stopped */
        }
        if (how == 1) {
            let_go(c->reader, b);
            await_all(c->reader);
            continue;
        }
        await_batch(c->reader, b);
        if (!b->error != (how != 0 || n == 0))
            fail("a read failed, or one that had to fail did not");
        if (!b->error)
            check(parts, picks, n);
        let_go(c->reader, b);
    }
    /* Nothing may be read into rows any more: free them, and the sanitizer will see. */
    await_all(c->reader);
    free(rows);
    return NULL;
}

static void many_clients(int fd, int rounds, int stop_early)
{
    Reader *r = start_reader();
    pthread_t threads[CLIENTS];
    Client clients[CLIENTS];
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = (Client){r, fd, rounds, (unsigned)(i + 7 * rounds)};
        pthread_create(&threads[i], NULL, submit_batches, &clients[i]);
    }
    if (stop_early)
        stop_reader(r);
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    if (!stop_early)
        stop_reader(r);
    free_reader(r);
}

static void fork_in_flight(int fd)
{
    Reader *r = start_reader();
    pthread_t thread;
    Client client = {r, fd, 50, 1};
    pthread_create(&thread, NULL, submit_batches, &client);
    for (int i = 0; i < 5; i++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(r->pid == getpid()); /* what _reader.c asks before it takes a lock */
        if (waitpid(child, &status, 0) != child || status)
            fail("a forked child did not see that it is one");
    }
    pthread_join(thread, NULL);
    stop_reader(r);
    free_reader(r);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1500;
    FILE *file = tmpfile();
    for (int64_t at = 0; at < UNITS * STRIDE; at++)
        fputc(content(at), file);
    fflush(file);
    many_clients(fileno(file), rounds, 0);
    for (int i = 0; i < 20; i++)
        many_clients(fileno(file), 1000, 1);
    fork_in_flight(fileno(file));
    fclose(file);
    return 0;
}
