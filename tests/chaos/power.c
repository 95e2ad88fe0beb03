/* Preloaded into a run: notes what it does to the files below a folder, and lets its disk fail at a chosen operation.

   BATCHGEN_CHAOS_ROOT     the folder that is watched; paths are compared as they are passed, so they must be absolute
   BATCHGEN_CHAOS_JOURNAL  a line an operation, outside of the folder; tests/chaos/power.py reads it
   BATCHGEN_CHAOS_KEPT     a folder for what files held that were replaced or removed
   BATCHGEN_CHAOS_AT       the operation, from 1, counted in each process; 0: none. Heartbeats, which come by the clock,
                           do not count, so that the same number is the same moment every time.
   BATCHGEN_CHAOS_ERROR    what it and all later ones fail with, as an errno; 0: the power goes, and the process with it
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(result, name, ...) \
    static result (*real_##name)(__VA_ARGS__); \
    if (!real_##name) real_##name = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);
#define PATH 4096

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static long operations, kept;
static int journal = -1;

static const char *root(void) {
    const char *path = getenv("BATCHGEN_CHAOS_ROOT");
    return path && *path ? path : NULL;
}

static int below(const char *path) {
    const char *folder = root();
    return folder && path && !strncmp(path, folder, strlen(folder)) && strchr("/", path[strlen(folder)]);
}

static int is_heartbeat(const char *path) {
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    if (*name == '.') name++;
    return strstr(path, "/attempts/") && strlen(name) > 5 && name[5] == '-';
}

static void note(const char *format, ...) {
    REAL(int, open, const char *, int, ...)
    REAL(ssize_t, write, int, const void *, size_t)
    char line[3 * PATH];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (journal < 0) journal = real_open(getenv("BATCHGEN_CHAOS_JOURNAL"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (real_write(journal, line, length) != length) abort();
}

/* Whether the operation on `path` must fail; sets errno. Where the power goes, it does not return. */
static int fails(const char *path, const char *what) {
    if (is_heartbeat(path) && operations < atol(getenv("BATCHGEN_CHAOS_AT"))) return 0;
    long at = atol(getenv("BATCHGEN_CHAOS_AT"));
    if (!is_heartbeat(path)) operations++;
    if (!at || operations < at) return 0;
    int error = atoi(getenv("BATCHGEN_CHAOS_ERROR"));
    if (operations == at && !is_heartbeat(path)) note("X\t%s\t%s\n", what, path);
    if (!error) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = error;
    return 1;
}

static int path_of(int descriptor, char *path) {
    char link[64];
    if (!root()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Copies what `path` holds away if this is its last name: after a cut it may be there again. */
static void keep(const char *path) {
    REAL(int, open, const char *, int, ...)
    REAL(ssize_t, write, int, const void *, size_t)
    struct stat stat_of;
    char copy[PATH], block[1 << 16];
    if (lstat(path, &stat_of) || !S_ISREG(stat_of.st_mode) || stat_of.st_nlink > 1) return;
    snprintf(copy, sizeof copy, "%s/%d-%ld", getenv("BATCHGEN_CHAOS_KEPT"), (int)getpid(), ++kept);
    int from = real_open(path, O_RDONLY), to = real_open(copy, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    for (ssize_t n; (n = read(from, block, sizeof block)) > 0;)
        if (real_write(to, block, n) != n) abort();
    close(from), close(to);
    note("K\t%lu\t%s\n", (unsigned long)stat_of.st_ino, copy);
}

static int opened(const char *path, int flags, mode_t mode, int (*really)(const char *, int, ...)) {
    if (!below(path) || !(flags & (O_CREAT | O_WRONLY | O_RDWR))) return really(path, flags, mode);
    pthread_mutex_lock(&one_at_a_time);
    struct stat stat_of;
    int is_new = lstat(path, &stat_of) != 0;
    int descriptor = (is_new || flags & O_TRUNC) && fails(path, "open") ? -1 : really(path, flags, mode);
    int error = errno;
    if (descriptor >= 0 && !fstat(descriptor, &stat_of)) {
        if (is_new) note("C\t%lu\t%s\n", (unsigned long)stat_of.st_ino, path);
        else if (flags & O_TRUNC) note("T\t%lu\n", (unsigned long)stat_of.st_ino);
    }
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return descriptor;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...) \
        va_list values; \
        va_start(values, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(values, mode_t) : 0; \
        va_end(values); \
        return opened(path, flags, mode, real_##name); \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *data, size_t length) {
    REAL(ssize_t, write, int, const void *, size_t)
    char path[PATH];
    if (!path_of(descriptor, path)) return real_write(descriptor, data, length);
    pthread_mutex_lock(&one_at_a_time);
    ssize_t written = -1;
    int before = operations < atol(getenv("BATCHGEN_CHAOS_AT"));
    if (!fails(path, "write")) written = real_write(descriptor, data, length);
    else if (before && errno == ENOSPC && length > 1) written = real_write(descriptor, data, length / 2);
    int error = errno;
    struct stat stat_of;
    if (written > 0 && !fstat(descriptor, &stat_of))
        note("W\t%lu\t%ld\n", (unsigned long)stat_of.st_ino, (long)stat_of.st_size);
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return written;
}

int fsync(int descriptor) {
    REAL(int, fsync, int)
    char path[PATH];
    if (!path_of(descriptor, path)) return real_fsync(descriptor);
    pthread_mutex_lock(&one_at_a_time);
    int result = fails(path, "fsync") ? -1 : 0; /* the journal stands for the disk, which need not turn */
    int error = errno;
    struct stat stat_of;
    if (!result && !fstat(descriptor, &stat_of)) {
        if (S_ISDIR(stat_of.st_mode)) note("D\t%s\n", path);
        else note("F\t%lu\t%ld\n", (unsigned long)stat_of.st_ino, (long)stat_of.st_size);
    }
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return result;
}

/* An operation on names: `path` is the one that changes, and what was there before is kept. */
#define NAMES(name, parameters, arguments, path, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__) \
        if (!below(path)) return real_##name arguments; \
        pthread_mutex_lock(&one_at_a_time); \
        int result = -1; \
        if (!fails(path, #name)) { \
            if (LOSES(#name)) keep(path); \
            result = real_##name arguments; \
        } \
        int error = errno; \
        if (!result) NOTE_##name; \
        pthread_mutex_unlock(&one_at_a_time); \
        errno = error; \
        return result; \
    }
#define LOSES(name) (!strcmp(name, "rename") || !strcmp(name, "unlink"))
#define NOTE_rename note("R\t%s\t%s\n", from, to)
#define NOTE_link note("L\t%s\t%s\n", from, to)
#define NOTE_unlink note("U\t%s\n", path)
#define NOTE_mkdir note("M\t%s\n", path)
NAMES(rename, (const char *from, const char *to), (from, to), to, const char *, const char *)
NAMES(link, (const char *from, const char *to), (from, to), to, const char *, const char *)
NAMES(unlink, (const char *path), (path), path, const char *)
NAMES(mkdir, (const char *path, mode_t mode), (path, mode), path, const char *, mode_t)
