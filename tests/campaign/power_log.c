/* Notes, in order, all that a process changes in the files below a folder.

   POWER_ROOT is that folder, POWER_LOG the file that takes the notes. An event is a
   line, and the bytes that were written after it:
       create PATH | mkdir PATH | remove PATH | rename PATH TO
       write PATH OFFSET BYTES | cut PATH BYTES | sync PATH
   Fields end with a tab, an event with a newline. One lock holds an operation and its
   note together, so that the notes have the order of the operations. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

static void note(const char *line, int length, const void *data, size_t bytes)
{
    static int log = -1;
    if (log < 0)
        log = (int)syscall(SYS_openat, AT_FDCWD, getenv("POWER_LOG"),
                           O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    struct iovec parts[2] = {{(void *)line, (size_t)length}, {(void *)data, bytes}};
    if (syscall(SYS_writev, log, parts, data ? 2 : 1) != length + (ssize_t)bytes)
        abort();
}

static int inside(const char *path)
{
    const char *root = getenv("POWER_ROOT");
    size_t n = root ? strlen(root) : 0;
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

/* The absolute path of an open file; "" for what has none any more. */
static void path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    if (n > 10 && !strcmp(path + n - 10, " (deleted)"))
        path[0] = 0;
}

static void absolute(int folder, const char *name, char *path)
{
    char base[PATH_MAX];
    if (name[0] == '/')
        base[0] = 0;
    else if (folder == AT_FDCWD)
        syscall(SYS_getcwd, base, sizeof base);
    else
        path_of(folder, base);
    snprintf(path, PATH_MAX, base[0] ? "%s/%s" : "%s%s", base, name);
}

static void note_path(const char *what, const char *path)
{
    char line[PATH_MAX + 32];
    int n = snprintf(line, sizeof line, "%s\t%s\t\n", what, path);
    note(line, n, NULL, 0);
}

static void note_write(int fd, off_t offset, const void *data, ssize_t bytes)
{
    char path[PATH_MAX], line[PATH_MAX + 64];
    path_of(fd, path);
    if (bytes <= 0 || !inside(path))
        return;
    int n = snprintf(line, sizeof line, "write\t%s\t%lld\t%zd\t\n", path,
                     (long long)offset, bytes);
    note(line, n, data, (size_t)bytes);
}

static void note_cut(const char *path, off_t bytes)
{
    char line[PATH_MAX + 64];
    int n = snprintf(line, sizeof line, "cut\t%s\t%lld\t\n", path, (long long)bytes);
    if (inside(path))
        note(line, n, NULL, 0);
}

int openat(int folder, const char *name, int flags, ...)
{
    mode_t mode = 0;
    if (flags & (O_CREAT | __O_TMPFILE)) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    if (!(flags & (O_CREAT | O_TRUNC)))
        return (int)syscall(SYS_openat, folder, name, flags, mode);
    char path[PATH_MAX];
    struct stat before;
    pthread_mutex_lock(&order);
    absolute(folder, name, path);
    int existed = !stat(path, &before);
    int fd = (int)syscall(SYS_openat, folder, name, flags, mode);
    int error = errno;
    if (fd >= 0 && inside(path)) {
        if (!existed)
            note_path("create", path);
        else if (flags & O_TRUNC)
            note_cut(path, 0);
    }
    pthread_mutex_unlock(&order);
    errno = error;
    return fd;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...)                                         \
    {                                                                                  \
        va_list more;                                                                  \
        va_start(more, flags);                                                         \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                      \
        va_end(more);                                                                  \
        return openat(AT_FDCWD, path, flags, mode);                                    \
    }
OPEN(open)
OPEN(open64)

int openat64(int folder, const char *name, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return openat(folder, name, flags, mode);
}

/* One operation and its note. `done` is what the system call returned. */
#define NOTED(type, call, noted)                                                       \
    pthread_mutex_lock(&order);                                                        \
    type done = (type)(call);                                                          \
    int error = errno;                                                                 \
    noted;                                                                             \
    pthread_mutex_unlock(&order);                                                      \
    errno = error;                                                                     \
    return done;

ssize_t write(int fd, const void *data, size_t bytes)
{
    NOTED(ssize_t, syscall(SYS_write, fd, data, bytes),
          if (done > 0) note_write(fd, lseek(fd, 0, SEEK_CUR) - done, data, done))
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset)
{
    NOTED(ssize_t, syscall(SYS_pwrite64, fd, data, bytes, offset),
          note_write(fd, offset, data, done))
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t offset)
{
    return pwrite(fd, data, bytes, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int n)
{
    ssize_t total = 0;
    for (int i = 0; i < n; i++) {
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0)
            return total ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len)
            break;
    }
    return total;
}

int ftruncate(int fd, off_t bytes)
{
    char path[PATH_MAX];
    path_of(fd, path);
    NOTED(int, syscall(SYS_ftruncate, fd, bytes), if (!done) note_cut(path, bytes))
}

int ftruncate64(int fd, off_t bytes) { return ftruncate(fd, bytes); }

int fsync(int fd)
{
    char path[PATH_MAX];
    path_of(fd, path);
    NOTED(int, syscall(SYS_fsync, fd),
          if (!done && inside(path)) note_path("sync", path))
}

int fdatasync(int fd) { return fsync(fd); }

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    char a[PATH_MAX], b[PATH_MAX], line[2 * PATH_MAX + 32];
    absolute(from_folder, from, a);
    absolute(to_folder, to, b);
    int n = snprintf(line, sizeof line, "rename\t%s\t%s\t\n", a, b);
    NOTED(int, syscall(SYS_renameat2, from_folder, from, to_folder, to, 0),
          if (!done && (inside(a) || inside(b))) note(line, n, NULL, 0))
}

int rename(const char *from, const char *to)
{
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int unlinkat(int folder, const char *name, int flags)
{
    char path[PATH_MAX];
    absolute(folder, name, path);
    NOTED(int, syscall(SYS_unlinkat, folder, name, flags),
          if (!done && inside(path)) note_path("remove", path))
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode)
{
    char path[PATH_MAX];
    absolute(folder, name, path);
    NOTED(int, syscall(SYS_mkdirat, folder, name, mode),
          if (!done && inside(path)) note_path("mkdir", path))
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Copies inside the system would go past the notes: callers fall back to writing. */
ssize_t sendfile(int to, int from, off_t *offset, size_t bytes)
{
    (void)to, (void)from, (void)offset, (void)bytes;
    errno = ENOSYS;
    return -1;
}

ssize_t sendfile64(int to, int from, off_t *offset, size_t bytes)
{
    return sendfile(to, from, offset, bytes);
}

ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t n, unsigned flags)
{
    (void)from, (void)a, (void)to, (void)b, (void)n, (void)flags;
    errno = ENOSYS;
    return -1;
}
