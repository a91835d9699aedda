/* Preloaded into a process, it lets one system call on files below a folder fail, or all from that
 * one on.  Calls that the fault can't meet are not counted: only writes find a full disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, BAD_DISK, FULL_DISK, INTERRUPTED, SHORT, KILLED, UNSYNCED, NO_LOCKS, QUOTA, TOO_BIG, KINDS };
enum { READS = 1, WRITES = 2, OPENS = 4, SYNCS = 8, NAMES = 16, LOCKS = 32, SIZES = 64 };
static const int meets[] = {
    [NONE] = 0,
    [BAD_DISK] = READS | WRITES | OPENS | SYNCS | NAMES | LOCKS | SIZES,
    [FULL_DISK] = WRITES | NAMES | SIZES,
    [INTERRUPTED] = READS | WRITES | OPENS | SYNCS,
    [SHORT] = READS | WRITES,
    [KILLED] = WRITES | OPENS | SYNCS | NAMES | SIZES,
    [UNSYNCED] = SYNCS,
    [NO_LOCKS] = LOCKS,
    [QUOTA] = WRITES | NAMES | SIZES,
    [TOO_BIG] = WRITES | SIZES,
};
static const int numbers[] = {
    [BAD_DISK] = EIO, [FULL_DISK] = ENOSPC, [INTERRUPTED] = EINTR, [UNSYNCED] = EIO,
    [NO_LOCKS] = ENOLCK, [QUOTA] = EDQUOT, [TOO_BIG] = EFBIG};
static char root[4096];
static int kind, onwards;
static long first, calls[KINDS];

void faults_arm(const char *folder, int fault, long at, int from_then_on) {
  snprintf(root, sizeof root, "%s", folder);
  kind = fault, first = at, onwards = from_then_on;
  memset(calls, 0, sizeof calls);
}

/* How many calls on files below the folder such a fault can meet so far. */
long faults_calls(int fault) { return calls[fault]; }

/* Whether this call fails, with errno set; a short call returns SHORT. */
static int fails(const char *path, int sort) {
  if (!root[0] || strncmp(path, root, strlen(root))) return 0;
  long number = 0;
  for (int fault = BAD_DISK; fault < KINDS; ++fault) {
    if (!(meets[fault] & sort)) continue;
    long count = __atomic_add_fetch(&calls[fault], 1, __ATOMIC_SEQ_CST);
    if (fault == kind) number = count;
  }
  if (!number) return 0;
  if (number != first && !(onwards && number > first)) return 0;
  if (kind == KILLED) kill(getpid(), SIGKILL);
  errno = numbers[kind];
  return kind;
}

static int fails_open(int file, int sort) {
  if (!root[0]) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return fails(path, sort);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define TRANSFER(name, sort, buffer, position, ...)                 \
  ssize_t name(int file, buffer data, size_t size position) {       \
    REAL(name);                                                     \
    int fault = fails_open(file, sort);                             \
    if (fault == SHORT && size > 1) size /= 2;                      \
    return fault && fault != SHORT ? -1 : real(file, data, size __VA_ARGS__); \
  }
#define COMMA ,
TRANSFER(read, READS, void *, )
TRANSFER(write, WRITES, const void *, )
TRANSFER(pread, READS, void *, COMMA off_t offset, COMMA offset)
TRANSFER(pread64, READS, void *, COMMA off64_t offset, COMMA offset)
TRANSFER(pwrite, WRITES, const void *, COMMA off_t offset, COMMA offset)
TRANSFER(pwrite64, WRITES, const void *, COMMA off64_t offset, COMMA offset)

#define VECTOR(name, offset_type)                                             \
  ssize_t name(int file, const struct iovec *parts, int count, offset_type offset) { \
    REAL(name);                                                               \
    int fault = fails_open(file, READS);                                      \
    if (fault == SHORT) {                                                     \
      struct iovec half = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};    \
      return real(file, &half, 1, offset);                                    \
    }                                                                         \
    return fault ? -1 : real(file, parts, count, offset);                     \
  }
VECTOR(preadv, off_t)
VECTOR(preadv64, off64_t)

#define OPEN(name)                                                        \
  int name(const char *path, int flags, ...) {                            \
    REAL(name);                                                           \
    va_list rest;                                                         \
    va_start(rest, flags);                                                \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                         \
    return fails(path, flags & O_CREAT ? OPENS | NAMES : OPENS) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define ON_FILE(name, sort, more, ...)                                     \
  int name(int file more) {                                                \
    REAL(name);                                                            \
    return fails_open(file, sort) ? -1 : real(file __VA_ARGS__);           \
  }
ON_FILE(fsync, SYNCS, )
ON_FILE(fdatasync, SYNCS, )
ON_FILE(ftruncate, SIZES, COMMA off_t size, COMMA size)
ON_FILE(ftruncate64, SIZES, COMMA off64_t size, COMMA size)
ON_FILE(flock, LOCKS, COMMA int operation, COMMA operation)

void *mmap(void *near, size_t size, int access, int flags, int file, off_t offset) {
  if (file >= 0 && fails_open(file, READS)) return MAP_FAILED;
  return (void *)syscall(SYS_mmap, near, size, access, flags, file, offset);
}

#define ON_NAME(name, more, ...)                                           \
  int name(const char *path more) {                                        \
    REAL(name);                                                            \
    return fails(path, NAMES) ? -1 : real(path __VA_ARGS__);               \
  }
ON_NAME(unlink, )
ON_NAME(rmdir, )
ON_NAME(mkdir, COMMA mode_t mode, COMMA mode)
ON_NAME(rename, COMMA const char *to, COMMA to)
