// SPDX-License-Identifier: Apache-2.0
// Counts every call that changes files below one folder, and strikes at the n-th.
//
//   cc -shared -fPIC -O1 -o shim.so kill_shim.c -ldl;  LD_PRELOAD=shim.so python ...
//
// Python and tensorstore both go through these functions of the C library. `shim_arm`
// starts to count; what happens at call `at` (1 = the first) depends on `mode`:
//   0  nothing: only count
//   1  the process is killed before the call
//   2  half of what was to be written is written, then the process is killed
//   3  this call and all later ones that need space fail, an fsync of what the file
//      system has taken without a place for it among them: the disk is full

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static atomic_long calls = 0;
static long strike = 0;
static int mode = -1;

void shim_arm(const char *folder, long at, int what) {
  strncpy(prefix, folder, sizeof prefix - 1);
  atomic_store(&calls, 0);
  strike = at;
  mode = what;
}

long shim_calls(void) { return atomic_load(&calls); }

static int below(const char *path) {
  return strncmp(path, prefix, strlen(prefix)) == 0;
}

static int fd_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int at_below(int dir, const char *path) {
  return path[0] == '/' || dir == AT_FDCWD ? below(path) : fd_below(dir);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// 0: go on. 1: write half, then die. -1: fail.
static int count(int ours, int needs_space) {
  if (mode < 0 || !ours) return 0;
  long call = atomic_fetch_add(&calls, 1) + 1;
  if (mode == 3 && call >= strike && needs_space) {
    errno = ENOSPC;
    return -1;
  }
  if (call != strike) return 0;
  if (mode == 1) die();
  if (mode == 2) {
    if (!needs_space) die();
    return 1;
  }
  return 0;
}

#define REAL(type, name, ...)                                   \
  static type (*real)(__VA_ARGS__);                             \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define WRITE(name, real_call, half_call, ...)                  \
  ssize_t name(int fd, __VA_ARGS__) {                           \
    REAL(ssize_t, name, int, __VA_ARGS__);                      \
    int what = count(mode >= 0 && fd_below(fd), 1);             \
    if (what < 0) return -1;                                    \
    if (what > 0) {                                             \
      half_call;                                                \
      die();                                                    \
    }                                                           \
    return real_call;                                           \
  }

WRITE(write, real(fd, data, size), real(fd, data, size / 2), const void *data,
      size_t size)
WRITE(pwrite, real(fd, data, size, offset), real(fd, data, size / 2, offset),
      const void *data, size_t size, off_t offset)
WRITE(pwrite64, real(fd, data, size, offset), real(fd, data, size / 2, offset),
      const void *data, size_t size, off64_t offset)
WRITE(writev, real(fd, parts, n), real(fd, parts, n / 2), const struct iovec *parts,
      int n)
WRITE(pwritev, real(fd, parts, n, offset), real(fd, parts, n / 2, offset),
      const struct iovec *parts, int n, off_t offset)

// Between two descriptors: half of it is half of the length.
#define COPY(name, offset_t)                                                   \
  ssize_t name(int out, int in, offset_t *offset, size_t size) {               \
    REAL(ssize_t, name, int, int, offset_t *, size_t);                         \
    int what = count(mode >= 0 && fd_below(out), 1);                           \
    if (what < 0) return -1;                                                   \
    if (what > 0) {                                                            \
      real(out, in, offset, size / 2);                                         \
      die();                                                                   \
    }                                                                          \
    return real(out, in, offset, size);                                        \
  }

COPY(sendfile, off_t)
COPY(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset,
                        size_t size, unsigned flags) {
  REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
  int what = count(mode >= 0 && fd_below(out), 1);
  if (what < 0) return -1;
  if (what > 0) {
    real(in, in_offset, out, out_offset, size / 2, flags);
    die();
  }
  return real(in, in_offset, out, out_offset, size, flags);
}

// These two return their error.
#define RESERVE(name, offset_t)                                                \
  int name(int fd, offset_t offset, offset_t size) {                           \
    REAL(int, name, int, offset_t, offset_t);                                  \
    int what = count(mode >= 0 && fd_below(fd), 1);                            \
    if (what < 0) return ENOSPC;                                               \
    if (what > 0) die();                                                       \
    return real(fd, offset, size);                                             \
  }

RESERVE(posix_fallocate, off_t)
RESERVE(posix_fallocate64, off64_t)

#define CHANGE(name, ours, space, arguments, ...)               \
  int name(__VA_ARGS__) {                                       \
    REAL(int, name, __VA_ARGS__);                               \
    int what = count(mode >= 0 && (ours), space);               \
    if (what < 0) return -1;                                    \
    if (what > 0) die();                                        \
    return real arguments;                                      \
  }

CHANGE(fsync, fd_below(fd), 1, (fd), int fd)
CHANGE(fdatasync, fd_below(fd), 1, (fd), int fd)
CHANGE(ftruncate, fd_below(fd), 0, (fd, size), int fd, off_t size)
CHANGE(ftruncate64, fd_below(fd), 0, (fd, size), int fd, off64_t size)
CHANGE(rename, below(to), 0, (from, to), const char *from, const char *to)
CHANGE(renameat, at_below(to_dir, to), 0, (from_dir, from, to_dir, to), int from_dir,
       const char *from, int to_dir, const char *to)
CHANGE(renameat2, at_below(to_dir, to), 0, (from_dir, from, to_dir, to, flags),
       int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
CHANGE(link, below(to), 1, (from, to), const char *from, const char *to)
CHANGE(linkat, at_below(to_dir, to), 1, (from_dir, from, to_dir, to, flags),
       int from_dir, const char *from, int to_dir, const char *to, int flags)
CHANGE(symlink, below(path), 1, (to, path), const char *to, const char *path)
CHANGE(symlinkat, at_below(dir, path), 1, (to, dir, path), const char *to, int dir,
       const char *path)
CHANGE(truncate, below(path), 0, (path, size), const char *path, off_t size)
CHANGE(truncate64, below(path), 0, (path, size), const char *path, off64_t size)
CHANGE(fallocate, fd_below(fd), 1, (fd, how, offset, size), int fd, int how,
       off_t offset, off_t size)
CHANGE(fallocate64, fd_below(fd), 1, (fd, how, offset, size), int fd, int how,
       off64_t offset, off64_t size)
CHANGE(mkdir, below(path), 1, (path, rights), const char *path, mode_t rights)
CHANGE(mkdirat, at_below(dir, path), 1, (dir, path, rights), int dir,
       const char *path, mode_t rights)
CHANGE(unlink, below(path), 0, (path), const char *path)
CHANGE(unlinkat, at_below(dir, path), 0, (dir, path, flags), int dir,
       const char *path, int flags)
CHANGE(rmdir, below(path), 0, (path), const char *path)

#define OPEN(name, ours, arguments, ...)                                       \
  int name(__VA_ARGS__, int flags, ...) {                                      \
    static int (*real)(__VA_ARGS__, int, ...);                                 \
    if (!real) real = (int (*)(__VA_ARGS__, int, ...))dlsym(RTLD_NEXT, #name); \
    va_list rest;                                                              \
    va_start(rest, flags);                                                     \
    mode_t rights = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                              \
    int makes = flags & (O_CREAT | O_TRUNC);                                   \
    int what = count(mode >= 0 && makes && (ours), 1);                         \
    if (what < 0) return -1;                                                   \
    if (what > 0) die();                                                       \
    return real arguments;                                                     \
  }

OPEN(open, below(path), (path, flags, rights), const char *path)
OPEN(open64, below(path), (path, flags, rights), const char *path)
OPEN(openat, at_below(dir, path), (dir, path, flags, rights), int dir, const char *path)
OPEN(openat64, at_below(dir, path), (dir, path, flags, rights), int dir,
     const char *path)
