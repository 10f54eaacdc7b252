/*
 * System calls that fail when a test says so: a library to be preloaded, by faults.py.
 *
 * Each function below stands before the one of libc that has its name.  Unarmed it does nothing but call that.
 * Armed it counts, and one call, the n-th of one name since then in this process, is not made and fails with an
 * errno: exactly that one, in whichever thread it comes, and no other.  strace can do the same from outside, for
 * some hundred times the time, and takes the right to trace.
 *
 * Or all calls are slow: each waits for a while, by a dice that has a seed, before it is made or after it was,
 * and what is read from a file or written to one is cut short.
 *
 * All arguments and results are longs: that is how the machines that faults.py admits pass integers and
 * pointers, also to functions with "..." (x86-64 and arm64, System V).
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#define MOST 128

static const char *names[MOST];
static atomic_long counts[MOST];
static atomic_int known;
static atomic_int armed;       /* whether we count */
static atomic_int which = -1;  /* the index of what is to fail */
static atomic_long from, to;   /* the first and the last call of it that does */
static atomic_int number;      /* with this errno */
static atomic_int fired;
static void (*tell)(void);     /* is called when it does, in the same thread */
static _Thread_local int spared;
static atomic_long seed;        /* of the dice; 0: nothing is slow */
static _Thread_local long owed; /* nanoseconds that the call that is made is to take longer */

static int
index_of(const char *name)
{
    int count = atomic_load(&known);
    for (int at = 0; at < count; at++)
        if (strcmp(names[at], name) == 0)
            return at;
    return -1;
}

/* Called by constructors alone, before there is a second thread. */
static int
enlist(const char *name)
{
    int at = index_of(name);
    if (at < 0) {
        at = atomic_load(&known);
        names[at] = name;
        atomic_store(&known, at + 1);
    }
    return at;
}

static void
nap(long nanoseconds)
{
    struct timespec time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    int before = errno;

    while (nanosleep(&time, &time) != 0)
        continue;
    errno = before;
}

/* Wait before a call or have it take longer: half of them each, up to 2 ms, most of them less than one. */
static void
dawdle(int at, long nth)
{
    uint64_t dice = (uint64_t)atomic_load(&seed) * 0x9e3779b97f4a7c15u + (uint64_t)(at * 65536 + nth);

    dice = (dice ^ (dice >> 30)) * 0xbf58476d1ce4e5b9u;
    dice = (dice ^ (dice >> 27)) * 0x94d049bb133111ebu;
    long time = (long)(dice >> 32 & 1023) * (long)(dice >> 42 & 1023) * 2;
    if (dice >> 60 & 1)
        nap(time);
    else
        owed = time;
}

/* Return what a call has returned, when it is time. */
static long
later(long value)
{
    if (!atomic_load(&seed)) /* a sanitizer makes calls before any thread may look at what is its own */
        return value;
    if (owed > 0)
        nap(owed);
    owed = 0;
    return value;
}

/* Count a call; return whether it is to fail, errno being set then. */
static int
fails(int at)
{
    if (!atomic_load(&armed) || spared)
        return 0;
    long nth = atomic_fetch_add(&counts[at], 1) + 1;
    if (atomic_load(&seed))
        dawdle(at, nth);
    if (at != atomic_load(&which) || nth < atomic_load(&from) || nth > atomic_load(&to))
        return 0;
    atomic_fetch_add(&fired, 1);
    if (tell) {
        spared = 1; /* what the teller calls itself is not counted */
        tell();
        spared = 0;
    }
    errno = atomic_load(&number);
    return 1;
}

/* -- for faults.py, by ctypes -- */

int
fault_arm(const char *name, int error, long first, long last)
{
    for (int at = 0; at < MOST; at++)
        atomic_store(&counts[at], 0);
    atomic_store(&which, index_of(name));
    atomic_store(&number, error);
    atomic_store(&from, first);
    atomic_store(&to, last);
    atomic_store(&fired, 0);
    atomic_store(&armed, 1);
    return atomic_load(&which);
}

/* From the next arming on, until the end of that, all calls are slow. */
void
fault_slow(long with_seed)
{
    atomic_store(&seed, with_seed);
}

/* Return how often it failed. */
int
fault_disarm(void)
{
    atomic_store(&seed, 0);
    atomic_store(&armed, 0);
    return atomic_load(&fired);
}

const char *
fault_name(int at)
{
    return at < atomic_load(&known) ? names[at] : NULL;
}

long
fault_count(int at)
{
    return atomic_load(&counts[at]);
}

/* The calling thread is the test's own: what it calls is not counted. */
void
fault_spare(int on)
{
    spared = on;
}

void
fault_tell(void (*teller)(void))
{
    tell = teller;
}

/* -- the functions -- */

typedef long (*real_t)(long, long, long, long, long, long);

#define REAL(symbol, name)                                                                  \
    static real_t real_##symbol;                                                            \
    static int at_##symbol;                                                                 \
    __attribute__((constructor)) static void find_##symbol(void)                            \
    {                                                                                       \
        real_##symbol = (real_t)dlsym(RTLD_NEXT, #symbol);                                  \
        at_##symbol = enlist(name);                                                         \
    }                                                                                       \
    /* Another constructor may come before ours. */                                         \
    static real_t get_##symbol(void)                                                        \
    {                                                                                       \
        if (!real_##symbol)                                                                 \
            find_##symbol();                                                                \
        return real_##symbol;                                                               \
    }

/* By another name in C, for the headers declare theirs. */
#define HEAD(symbol)                                                                        \
    long faulty_##symbol(long, long, long, long, long, long) __asm__(#symbol);              \
    long faulty_##symbol(long a, long b, long c, long d, long e, long f)

/* Not made, if it is to fail: -1, or MAP_FAILED, which is the same. */
#define CALL(symbol, name)                                                                  \
    REAL(symbol, name)                                                                      \
    HEAD(symbol)                                                                            \
    {                                                                                       \
        return fails(at_##symbol) ? -1L : later(get_##symbol()(a, b, c, d, e, f));           \
    }

/* Returns its error, or a null pointer. */
#define SAYS(symbol, name, failure)                                                         \
    REAL(symbol, name)                                                                      \
    HEAD(symbol)                                                                            \
    {                                                                                       \
        return fails(at_##symbol) ? (long)(failure) : get_##symbol()(a, b, c, d, e, f);      \
    }

CALL(accept4, "accept4")
CALL(bind, "bind")
CALL(connect, "connect")
CALL(listen, "listen")
CALL(socket, "socket")
CALL(socketpair, "socketpair")
CALL(shutdown, "shutdown")
CALL(setsockopt, "setsockopt")
CALL(getsockopt, "getsockopt")
CALL(getsockname, "getsockname")
CALL(getpeername, "getpeername")
CALL(sendmsg, "sendmsg")
CALL(recvmsg, "recvmsg")
CALL(send, "send")
CALL(sendto, "send")
CALL(recv, "recv")
CALL(recvfrom, "recv")
CALL(read, "read")
CALL(write, "write")
CALL(pread64, "pread")
CALL(lseek64, "lseek")
CALL(poll, "poll")
CALL(ppoll, "ppoll")
CALL(epoll_create1, "epoll_create1")
CALL(epoll_ctl, "epoll_ctl")
CALL(epoll_wait, "epoll_wait")
CALL(eventfd, "eventfd")
CALL(eventfd_read, "eventfd_read")
CALL(eventfd_write, "eventfd_write")
CALL(memfd_create, "memfd_create")
CALL(ftruncate64, "ftruncate")
CALL(fcntl64, "fcntl")
CALL(ioctl, "ioctl")

#define SHORT 50000 /* bytes; less, and many a call would be made */

REAL(pwrite64, "pwrite")

HEAD(pwrite64)
{
    if (fails(at_pwrite64))
        return -1;
    if (atomic_load(&seed) && c > SHORT)
        c = SHORT;
    return later(get_pwrite64()(a, b, c, d, e, f));
}

#define READS(symbol)                                                                       \
    REAL(symbol, "preadv")                                                                  \
    HEAD(symbol)                                                                            \
    {                                                                                       \
        struct iovec first = *(struct iovec *)b;                                            \
        if (fails(at_##symbol))                                                             \
            return -1;                                                                      \
        if (!atomic_load(&seed) || first.iov_len <= SHORT)                                  \
            return later(get_##symbol()(a, b, c, d, e, f));                                 \
        first.iov_len = SHORT;                                                              \
        return later(get_##symbol()(a, (long)&first, 1, d, e, f));                          \
    }

READS(preadv64)
READS(preadv64v2)

/* A mapping of no file is nearly always an arena of the interpreter's allocator. */
#define MAPS(symbol)                                                                        \
    REAL(symbol, "mmap")                                                                    \
    HEAD(symbol)                                                                            \
    {                                                                                       \
        return (int)e >= 0 && fails(at_##symbol) ? -1L : get_##symbol()(a, b, c, d, e, f);   \
    }

MAPS(mmap)
MAPS(mmap64)
CALL(munmap, "munmap")
CALL(mremap, "mremap")
CALL(madvise, "madvise")
CALL(open64, "open")
CALL(openat64, "open")
CALL(link, "link")
CALL(linkat, "link")
CALL(rename, "rename")
CALL(renameat, "rename")
CALL(renameat2, "renameat2")
CALL(unlink, "unlink")
CALL(mkdir, "mkdir")
CALL(mkdirat, "mkdir")
CALL(rmdir, "rmdir")

/* rmdir() of a directory that is open, too. */
REAL(unlinkat, "unlink")

HEAD(unlinkat)
{
    int at = (int)c & AT_REMOVEDIR ? at_rmdir : at_unlinkat;

    return fails(at) ? -1L : later(get_unlinkat()(a, b, c, d, e, f));
}

CALL(fchmod, "chmod")
CALL(chmod, "chmod")
CALL(fchmodat, "chmod")
CALL(fchown, "chown")
CALL(chown, "chown")
CALL(lchown, "chown")
CALL(fchownat, "chown")
CALL(fstat64, "stat")
CALL(stat64, "stat")
CALL(lstat64, "stat")
CALL(fstatat64, "stat")
CALL(fstatfs64, "fstatfs")
CALL(fstatfs, "fstatfs")
CALL(readlink, "readlink")
CALL(readlinkat, "readlink")
CALL(flock, "flock")
CALL(dup2, "dup")
CALL(dup3, "dup")
CALL(sched_getaffinity, "sched_getaffinity")
CALL(waitid, "waitid")
CALL(capget, "capget")
CALL(getrandom, "getrandom")
CALL(getrlimit64, "getrlimit")
CALL(prlimit64, "getrlimit")
CALL(getresuid, "getresuid")
CALL(getresgid, "getresgid")

/* Sockets, pidfds and the like have nothing to flush: for them the kernel knows no error of close(). */
static int
may_fail_to_close(int fd)
{
    struct stat status;
    int before = errno;
    int is_file = fstat(fd, &status) == 0 && (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode));

    errno = before;
    return is_file;
}

REAL(close, "close")

/* Made all the same: the kernel lets the descriptor go whatever it answers. */
HEAD(close)
{
    int failed = may_fail_to_close((int)a) && fails(at_close), error = errno;
    long value = later(get_close()(a, b, c, d, e, f));
    if (failed)
        errno = error;
    return failed ? -1L : value;
}

SAYS(pthread_create, "pthread_create", errno)
SAYS(opendir, "opendir", 0)
SAYS(fdopendir, "opendir", 0)
SAYS(readdir64, "readdir", 0)

/* By number, with one argument more. */

typedef long (*syscall_t)(long, long, long, long, long, long, long);

static syscall_t real_syscall;
static int at_pidfd_open, at_pidfd_send_signal;

__attribute__((constructor)) static void
find_syscall(void)
{
    real_syscall = (syscall_t)dlsym(RTLD_NEXT, "syscall");
    at_pidfd_open = enlist("pidfd_open");
    at_pidfd_send_signal = enlist("pidfd_send_signal");
}

long faulty_syscall(long, long, long, long, long, long, long) __asm__("syscall");

long
faulty_syscall(long nr, long a, long b, long c, long d, long e, long f)
{
    if (!real_syscall)
        find_syscall();
    if (nr == SYS_pidfd_open && fails(at_pidfd_open))
        return -1;
    if (nr == SYS_pidfd_send_signal && fails(at_pidfd_send_signal))
        return -1;
    return real_syscall(nr, a, b, c, d, e, f);
}
