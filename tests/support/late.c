/*
 * A signal at the worst moment: a library to be preloaded, by tests/public/test_signals.py.
 *
 * When the main thread is about to wait in epoll_wait for the first time, the signal comes after Python has
 * looked for signals, and before the kernel has begun to wait: it interrupts nothing.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

int
epoll_wait(int set, struct epoll_event *events, int most, int milliseconds)
{
    static int came;
    const char *number = getenv("LATE_SIGNAL");

    if (number && !came && milliseconds && syscall(SYS_gettid) == getpid()) {
        came = 1;
        raise(atoi(number));
    }
    int (*next)(int, struct epoll_event *, int, int) =
        (int (*)(int, struct epoll_event *, int, int))dlsym(RTLD_NEXT, "epoll_wait");
    return next(set, events, most, milliseconds);
}
