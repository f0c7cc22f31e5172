/* Loaded before libc (LD_PRELOAD): counts every call that changes files below one folder, and at one of them kills the
 * process, writes half, or lets the disk fail. Quiet until fault_arm is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, HALF, SHORT, FULL, BROKEN };  /* what happens at call number `at` */
enum { NO_LINKS = 1, NO_RENAME2 = 2 };            /* what the file system does not know */
enum { OTHER, WRITES, TAKES_ROOM };               /* what a call does */

static char root[PATH_MAX];
static size_t root_length;
static long at;
static int mode, lacks, log_fd = -1;
static volatile long *count;

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

void fault_arm(const char *folder, long number, int what, int without, volatile long *counter, const char *log) {
    strncpy(root, folder, sizeof root - 1);
    at = number, mode = what, lacks = without, count = counter;
    if (log) log_fd = syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_APPEND | O_WRONLY, 0644);
    root_length = strlen(root);
}

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (got <= 0) return 0;
    path[got] = 0;
    return below(path);
}

static int of_path(int folder, const char *name, char *path) {
    if (name[0] == '/' || folder == AT_FDCWD) {
        strncpy(path, name, PATH_MAX - 1);
        path[PATH_MAX - 1] = 0;
        return below(path);
    }
    return of_fd(folder, path);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Number a call; return an errno where it is to fail, -1 where a write is to take half, else 0. */
static int step(const char *name, const char *path, int does, size_t bytes) {
    long number = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, path);
        syscall(SYS_write, log_fd, line, length);
    }
    if (mode == FULL && number >= at && does != OTHER) return ENOSPC;
    if (number != at) return 0;
    if (mode == KILL) die();
    if (mode == HALF) {
        if (does == WRITES && bytes > 1) return -1;
        die();
    }
    if (mode == SHORT && does == WRITES && bytes > 1) return -1;
    return mode == BROKEN ? EIO : 0;
}

#define FAIL(number) do { errno = number; return -1; } while (0)
#define BY_FD(fd, name, does, bytes, call)                                    \
    char path[PATH_MAX];                                                      \
    if (root_length && of_fd(fd, path)) {                                     \
        int why = step(name, path, does, bytes);                              \
        if (why > 0) FAIL(why);                                               \
    }                                                                         \
    return call
#define BY_PATH(folder, target, name, does, call)                             \
    char path[PATH_MAX];                                                      \
    if (root_length && of_path(folder, target, path)) {                       \
        int why = step(name, path, does, 0);                                  \
        if (why > 0) FAIL(why);                                               \
    }                                                                         \
    return call

#define WRITE_CALL(fd, name, bytes, half, whole)                              \
    char path[PATH_MAX];                                                      \
    if (root_length && of_fd(fd, path)) {                                     \
        int why = step(name, path, WRITES, bytes);                            \
        if (why > 0) FAIL(why);                                               \
        if (why < 0) {                                                        \
            ssize_t taken = half;                                             \
            if (mode == HALF) die();                                          \
            return taken;                                                     \
        }                                                                     \
    }                                                                         \
    return whole

ssize_t write(int fd, const void *from, size_t bytes) {
    WRITE_CALL(fd, "write", bytes, REAL(write)(fd, from, bytes / 2), REAL(write)(fd, from, bytes));
}
ssize_t pwrite(int fd, const void *from, size_t bytes, off_t where) {
    WRITE_CALL(fd, "pwrite", bytes, REAL(pwrite)(fd, from, bytes / 2, where), REAL(pwrite)(fd, from, bytes, where));
}
ssize_t pwrite64(int fd, const void *from, size_t bytes, off64_t where) {
    WRITE_CALL(fd, "pwrite", bytes, REAL(pwrite64)(fd, from, bytes / 2, where), REAL(pwrite64)(fd, from, bytes, where));
}
ssize_t writev(int fd, const struct iovec *parts, int many) {
    WRITE_CALL(fd, "writev", parts[0].iov_len, REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2),
               REAL(writev)(fd, parts, many));
}
int fsync(int fd) { BY_FD(fd, "fsync", TAKES_ROOM, 0, REAL(fsync)(fd)); }
int fdatasync(int fd) { BY_FD(fd, "fdatasync", TAKES_ROOM, 0, REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t size) { BY_FD(fd, "ftruncate", OTHER, 0, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { BY_FD(fd, "ftruncate", OTHER, 0, REAL(ftruncate64)(fd, size)); }
int fchmod(int fd, mode_t bits) { BY_FD(fd, "fchmod", OTHER, 0, REAL(fchmod)(fd, bits)); }
int chmod(const char *name, mode_t bits) { BY_PATH(AT_FDCWD, name, "chmod", OTHER, REAL(chmod)(name, bits)); }
int truncate(const char *name, off_t size) { BY_PATH(AT_FDCWD, name, "truncate", OTHER, REAL(truncate)(name, size)); }
int mkdir(const char *name, mode_t bits) { BY_PATH(AT_FDCWD, name, "mkdir", TAKES_ROOM, REAL(mkdir)(name, bits)); }
int mkdirat(int in, const char *name, mode_t bits) {
    BY_PATH(in, name, "mkdir", TAKES_ROOM, REAL(mkdirat)(in, name, bits));
}
int rmdir(const char *name) { BY_PATH(AT_FDCWD, name, "rmdir", OTHER, REAL(rmdir)(name)); }
int unlink(const char *name) { BY_PATH(AT_FDCWD, name, "unlink", OTHER, REAL(unlink)(name)); }
int unlinkat(int in, const char *name, int flags) { BY_PATH(in, name, "unlink", OTHER, REAL(unlinkat)(in, name, flags)); }
int symlink(const char *to, const char *name) {
    BY_PATH(AT_FDCWD, name, "symlink", TAKES_ROOM, REAL(symlink)(to, name));
}
int rename(const char *old, const char *new) { BY_PATH(AT_FDCWD, new, "rename", OTHER, REAL(rename)(old, new)); }
int renameat(int in, const char *old, int to, const char *new) {
    BY_PATH(to, new, "rename", OTHER, REAL(renameat)(in, old, to, new));
}
int renameat2(int in, const char *old, int to, const char *new, unsigned flags) {
    char path[PATH_MAX];
    if (root_length && of_path(to, new, path)) {
        if (lacks & NO_RENAME2 && flags) FAIL(EINVAL);
        int why = step("renameat2", path, OTHER, 0);
        if (why > 0) FAIL(why);
    }
    return REAL(renameat2)(in, old, to, new, flags);
}
int linkat(int in, const char *old, int to, const char *new, int flags) {
    char path[PATH_MAX];
    if (root_length && of_path(to, new, path)) {
        if (lacks & NO_LINKS) FAIL(EPERM);
        int why = step("link", path, TAKES_ROOM, 0);
        if (why > 0) FAIL(why);
    }
    return REAL(linkat)(in, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

#define OPEN(folder, name, flags, call)                                       \
    mode_t bits = 0;                                                          \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                    \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        bits = va_arg(more, mode_t);                                          \
        va_end(more);                                                         \
    }                                                                         \
    char path[PATH_MAX];                                                      \
    if (root_length && (flags) & (O_CREAT | O_TRUNC) && of_path(folder, name, path)) { \
        int why = step("create", path, TAKES_ROOM, 0);                        \
        if (why > 0) FAIL(why);                                               \
    }                                                                         \
    return call

int open(const char *name, int flags, ...) { OPEN(AT_FDCWD, name, flags, REAL(open)(name, flags, bits)); }
int open64(const char *name, int flags, ...) { OPEN(AT_FDCWD, name, flags, REAL(open64)(name, flags, bits)); }
int openat(int in, const char *name, int flags, ...) { OPEN(in, name, flags, REAL(openat)(in, name, flags, bits)); }
int openat64(int in, const char *name, int flags, ...) { OPEN(in, name, flags, REAL(openat64)(in, name, flags, bits)); }
