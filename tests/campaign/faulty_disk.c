/* Stands in front of pread and preadv, and makes the disk a bad one.

   `set_faults` says how many of 1,000 reads meet which fault; FAULT_SEED seeds the
   choice. `hold_reads(1)` makes every read wait, before it begins, for
   `hold_reads(0)`. Bytes that a read does not vouch for are overwritten: a caller that
   takes them gets no numbers. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAILED, INTERRUPTED, SHORT, ENDED, DELAYED, FAULTS };

static atomic_int per_1000[FAULTS];
static atomic_long counted[FAULTS];
static atomic_ulong drawn;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER;
static int held;
static atomic_long waiting;

void set_faults(const int *rates)
{
    for (int i = 0; i < FAULTS; i++)
        per_1000[i] = rates[i];
}

long faults_counted(int fault) { return counted[fault]; }

void hold_reads(int hold)
{
    pthread_mutex_lock(&gate);
    held = hold;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&gate);
}

long reads_waiting(void) { return waiting; }

static void pass_gate(void)
{
    pthread_mutex_lock(&gate);
    waiting += held;
    int counted_here = held;
    while (held)
        pthread_cond_wait(&opened, &gate);
    waiting -= counted_here;
    pthread_mutex_unlock(&gate);
}

static uint64_t draw(void) /* splitmix64 of a counter: any thread may draw */
{
    const char *seed = getenv("FAULT_SEED");
    uint64_t z = (++drawn + (seed ? strtoull(seed, NULL, 10) << 32 : 0));
    z *= 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static int meets(int fault)
{
    int yes = (int)(draw() % 1000) < per_1000[fault];
    counted[fault] += yes;
    return yes;
}

static void spoil(const struct iovec *iov, int n, size_t from)
{
    for (int i = 0; i < n; i++) {
        size_t length = iov[i].iov_len, skip = from < length ? from : length;
        memset((char *)iov[i].iov_base + skip, 0xFF, length - skip);
        from -= skip;
    }
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    pass_gate();
    if (meets(DELAYED))
        usleep((useconds_t)(draw() % 3000));
    if (meets(INTERRUPTED)) {
        errno = EINTR;
        return -1;
    }
    if (meets(FAILED)) {
        spoil(iov, n, 0);
        errno = EIO;
        return -1;
    }
    if (meets(ENDED)) {
        spoil(iov, n, 0);
        return 0;
    }
    ssize_t got = syscall(SYS_preadv, fd, iov, n, offset, 0);
    if (got > 1 && meets(SHORT)) {
        got = 1 + (ssize_t)(draw() % (uint64_t)(got - 1));
        spoil(iov, n, (size_t)got);
    }
    return got;
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t offset)
{
    return preadv(fd, iov, n, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    (void)flags;
    return preadv(fd, iov, n, offset);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    return preadv64v2(fd, iov, n, offset, flags);
}

ssize_t pread(int fd, void *to, size_t bytes, off_t offset)
{
    struct iovec iov = {to, bytes};
    return preadv(fd, &iov, 1, offset);
}

ssize_t pread64(int fd, void *to, size_t bytes, off_t offset)
{
    return pread(fd, to, bytes, offset);
}
