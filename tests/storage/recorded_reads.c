/* Stands in front of preadv, and notes where each read lands.

   For every read a line goes to the file READS_LOG: address and length of each of its
   buffers, as "address+length address+length …". */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LINE = 1 << 16 };

static void note(const struct iovec *iov, int n)
{
    static _Thread_local char line[LINE];
    const char *path = getenv("READS_LOG");
    if (!path)
        return;
    int used = 0;
    for (int i = 0; i < n && used < LINE - 64; i++)
        used += sprintf(line + used, "%lu+%lu ", (unsigned long)iov[i].iov_base,
                        (unsigned long)iov[i].iov_len);
    line[used++] = '\n';
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (fd < 0 || write(fd, line, (size_t)used) != used)
        abort();
    close(fd);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    note(iov, n);
    return syscall(SYS_preadv, fd, iov, (long)n, (long)offset, 0L);
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t offset)
{
    return preadv(fd, iov, n, offset);
}

/* Python's os.preadv calls these. */
ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    note(iov, n);
    return syscall(SYS_preadv2, fd, iov, (long)n, (long)offset, 0L, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    return preadv2(fd, iov, n, offset, flags);
}
