/* A disk that keeps a diary and fails on demand, for LD_PRELOAD. See faulty_disk.py.
 *
 * FAULTY_DISK_ROOT: only files below this folder are of interest.
 * FAULTY_DISK_DIARY: where to write what happens to them, in order: one operation at a time.
 * FAULTY_DISK_FAULT: a file; while it is there, it says "CALL ERRNO PATTERN": calls of that sort, on
 *     files whose path has PATTERN in it (PATTERN$: at its end), fail with that number. CALL is one of
 *     write     nothing is written
 *     torn      every other write of two bytes or more writes half, the one after it fails
 *     short     every other write of two bytes or more writes half, and none fails
 *     sync      what was written is there, and may never reach the disk
 *     rename, create, truncate
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static int diary = -1;
static int was_half;

static void in_child(void) { pthread_mutex_unlock(&one_at_a_time); }
static void before_fork(void) { pthread_mutex_lock(&one_at_a_time); }

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULTY_DISK_DIARY");
    if (path) diary = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    pthread_atfork(before_fork, in_child, in_child);
}

static int is_ours(const char *path) {
    const char *root = getenv("FAULTY_DISK_ROOT");
    return root && strncmp(path, root, strlen(root)) == 0;
}

/* The file's present path, or the path of a name in a folder; 0 if it is none of ours. */
static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    if (length <= 0) return 0;
    path[length] = 0;
    return is_ours(path);
}

static int path_at(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, 4096, "%s", name);
    } else if (folder == AT_FDCWD) {
        if (!getcwd(path, 2048)) return 0;
        snprintf(path + strlen(path), 2048, "/%s", name);
    } else {
        char parent[4096];
        if (!path_of(folder, parent)) return 0;
        snprintf(path, 8192, "%s/%s", parent, name);
    }
    return is_ours(path);
}

static uint64_t number_of(const char *path) {
    struct stat about;
    return lstat(path, &about) ? 0 : about.st_ino;
}

static uint64_t number_of_fd(int fd) {
    struct stat about;
    return fstat(fd, &about) ? 0 : about.st_ino;
}

/* kind, inode, place, lengths of the two texts; then the texts. Native byte order. */
static void note(char kind, uint64_t inode, int64_t place, const char *first, const void *second,
                 uint64_t size) {
    if (diary < 0) return;
    struct { uint64_t kind, inode; int64_t place; uint64_t first, second; } head = {
        (uint64_t)kind, inode, place, strlen(first), size};
    __typeof__(&write) put = REAL(write);
    if (put(diary, &head, sizeof head) < 0 || put(diary, first, head.first) < 0) abort();
    for (uint64_t done = 0; done < size;) {
        ssize_t count = put(diary, (const char *)second + done, size - done);
        if (count < 0) abort();
        done += count;
    }
}

/* The number with which a call is to fail; 0: it is not. */
static int fault(const char *call, const char *path) {
    const char *file = getenv("FAULTY_DISK_FAULT");
    char text[512] = "", what[16], pattern[256];
    int number;
    if (!file) return 0;
    int fd = REAL(open)(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    REAL(close)(fd);
    if (length <= 0 || sscanf(text, "%15s %d %255s", what, &number, pattern) != 3) return 0;
    if (strcmp(what, call)) return 0;
    size_t size = strlen(pattern), whole = strlen(path);
    if (pattern[size - 1] != '$') return strstr(path, pattern) ? number : 0;
    return whole >= --size && memcmp(path + whole - size, pattern, size) == 0 ? number : 0;
}

/* How much of a write may be written; -1 with errno set: nothing. */
static ssize_t allowed(const char *path, size_t size) {
    int number = fault("write", path);
    if (!number && (number = fault("torn", path)) && !was_half && size > 1) {
        was_half = 1;
        return size / 2;
    }
    if (number) {
        was_half = 0;
        errno = number;
        return -1;
    }
    if (fault("short", path) && !(was_half = !was_half) && size > 1) return size / 2;
    return size;
}

static ssize_t put(int fd, const void *data, size_t size, off64_t place) {
    char path[4096];
    int is_placed = place >= 0;
    if (!path_of(fd, path))
        return is_placed ? REAL(pwrite64)(fd, data, size, place) : REAL(write)(fd, data, size);
    pthread_mutex_lock(&one_at_a_time);
    ssize_t count = allowed(path, size);
    if (count >= 0) {
        if (!is_placed) {
            place = fcntl(fd, F_GETFL) & O_APPEND ? lseek64(fd, 0, SEEK_END) : lseek64(fd, 0, SEEK_CUR);
            count = REAL(write)(fd, data, count);
        } else {
            count = REAL(pwrite64)(fd, data, count, place);
        }
        int kept = errno;
        if (count > 0) note('w', number_of_fd(fd), place, "", data, count);
        errno = kept;
    }
    pthread_mutex_unlock(&one_at_a_time);
    return count;
}

ssize_t write(int fd, const void *data, size_t size) { return put(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return put(fd, data, size, place); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) { return put(fd, data, size, place); }

static int sync_it(int fd, int (*real)(int)) {
    char path[4096];
    if (!path_of(fd, path)) return real(fd);
    pthread_mutex_lock(&one_at_a_time);
    int number = fault("sync", path), result = number ? -1 : real(fd);
    if (number) errno = number;
    if (result == 0) note('s', number_of_fd(fd), 0, "", "", 0);
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

int fsync(int fd) { return sync_it(fd, REAL(fsync)); }
int fdatasync(int fd) { return sync_it(fd, REAL(fdatasync)); }

static int cut(int fd, off64_t size) {
    char path[4096];
    if (!path_of(fd, path)) return REAL(ftruncate64)(fd, size);
    pthread_mutex_lock(&one_at_a_time);
    int number = fault("truncate", path), result = number ? -1 : REAL(ftruncate64)(fd, size);
    if (number) errno = number;
    if (result == 0) note('t', number_of_fd(fd), size, "", "", 0);
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int open_it(int folder, const char *name, int flags, mode_t mode) {
    char path[8192];
    if (!(flags & (O_CREAT | O_TRUNC)) || !path_at(folder, name, path))
        return REAL(openat)(folder, name, flags, mode);
    pthread_mutex_lock(&one_at_a_time);
    int is_new = !number_of(path), number = is_new ? fault("create", path) : 0;
    int fd = number ? -1 : REAL(openat)(folder, name, flags, mode);
    int kept = number ? number : errno;
    if (fd >= 0 && is_new) note('c', number_of_fd(fd), 0, path, "", 0);
    else if (fd >= 0 && flags & O_TRUNC) note('t', number_of_fd(fd), 0, "", "", 0);
    errno = kept;
    pthread_mutex_unlock(&one_at_a_time);
    return fd;
}

#define MODE                                   \
    mode_t mode = 0;                           \
    if (flags & (O_CREAT | O_TMPFILE)) {       \
        va_list more;                          \
        va_start(more, flags);                 \
        mode = va_arg(more, mode_t);           \
        va_end(more);                          \
    }

int open(const char *name, int flags, ...) { MODE return open_it(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return open_it(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE return open_it(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE return open_it(folder, name, flags, mode); }

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[8192];
    if (!path_at(folder, name, path)) return REAL(mkdirat)(folder, name, mode);
    pthread_mutex_lock(&one_at_a_time);
    int number = fault("create", path), result = number ? -1 : REAL(mkdirat)(folder, name, mode);
    if (number) errno = number;
    if (result == 0) note('d', number_of(path), 0, path, "", 0);
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int renameat(int from, const char *old, int to, const char *new) {
    char source[8192], target[8192];
    if (!path_at(from, old, source) || !path_at(to, new, target))
        return REAL(renameat)(from, old, to, new);
    pthread_mutex_lock(&one_at_a_time);
    int number = fault("rename", target), result = number ? -1 : REAL(renameat)(from, old, to, new);
    if (number) errno = number;
    if (result == 0) note('r', 0, 0, source, target, strlen(target));
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

int rename(const char *old, const char *new) { return renameat(AT_FDCWD, old, AT_FDCWD, new); }

int unlinkat(int folder, const char *name, int flags) {
    char path[8192];
    if (!path_at(folder, name, path)) return REAL(unlinkat)(folder, name, flags);
    pthread_mutex_lock(&one_at_a_time);
    int result = REAL(unlinkat)(folder, name, flags);
    int kept = errno;
    if (result == 0) note('u', 0, 0, path, "", 0);
    errno = kept;
    pthread_mutex_unlock(&one_at_a_time);
    return result;
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
