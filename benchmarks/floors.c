/*
 * What two processes of this machine take to hand each other eight bytes, without Python.
 *
 *     floors socket|spin CPU[,CPU...]
 *
 * Reads numbers of round trips from standard input, one a line, and for each forks who answers, who is
 * pinned to the CPUs given, and prints the nanoseconds that each round trip took.  The caller is where
 * this process has been put.
 */

#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Looks between two yields: with one CPU only a yield lets the other side go on. */
enum { LOOKS = 64 };

/* One cache line for each direction. */
struct page {
    _Alignas(64) atomic_long request;
    _Alignas(64) atomic_long reply;
};

static struct page *page;
static int ends[2];

static void
fail(const char *what)
{
    perror(what);
    exit(1);
}

static long
now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* acquire: pairs with the release of the other side's store */
static void
wait_for(atomic_long *word, long value)
{
    for (long looks = 1; atomic_load_explicit(word, memory_order_acquire) != value; looks++)
        if (looks % LOOKS == 0)
            sched_yield();
}

static void
transfer(int end, long *word, int sends)
{
    ssize_t done = sends ? write(end, word, sizeof *word) : read(end, word, sizeof *word);

    if (done != sizeof *word)
        fail("socket");
}

static void
spin_call(long i)
{
    atomic_store_explicit(&page->request, i, memory_order_release);
    wait_for(&page->reply, i);
}

static void
spin_answer(long i)
{
    wait_for(&page->request, i);
    atomic_store_explicit(&page->reply, i, memory_order_release);
}

static void
socket_call(long i)
{
    transfer(ends[0], &i, 1);
    transfer(ends[0], &i, 0);
}

static void
socket_answer(long i)
{
    transfer(ends[1], &i, 0);
    transfer(ends[1], &i, 1);
}

static void
pin(const char *list)
{
    cpu_set_t cpus;
    char *next = (char *)list;

    CPU_ZERO(&cpus);
    while (*next) {
        CPU_SET(strtoul(next, &next, 10), &cpus);
        next += *next == ',';
    }
    if (sched_setaffinity(0, sizeof cpus, &cpus))
        fail("sched_setaffinity");
}

static pid_t
fork_answerer(void (*answer)(long), long trips, const char *cpus)
{
    pid_t child = fork();

    if (child < 0)
        fail("fork");
    if (child > 0)
        return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pin(cpus);
    for (long i = 1; i <= trips; i++)
        answer(i);
    _exit(0);
}

static void
measure(long trips, int spins, const char *cpus)
{
    long warm = trips / 10 + 1, all = warm + trips, start;
    long *took = calloc((size_t)all + 1, sizeof *took);
    pid_t child;

    if (!took)
        fail("calloc");
    atomic_store(&page->request, 0);
    atomic_store(&page->reply, 0);
    child = fork_answerer(spins ? spin_answer : socket_answer, all, cpus);
    for (long i = 1; i <= all; i++) {
        start = now_ns();
        (spins ? spin_call : socket_call)(i);
        took[i] = now_ns() - start;
    }
    waitpid(child, NULL, 0);
    for (long i = warm + 1; i <= all; i++)
        printf("%ld ", took[i]);
    printf("\n");
    fflush(stdout);
    free(took);
}

int
main(int count, char **words)
{
    long trips;

    if (count != 3)
        return 2;
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        fail("mmap");
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        fail("socketpair");
    while (scanf("%ld", &trips) == 1)
        measure(trips, strcmp(words[1], "spin") == 0, words[2]);
    return 0;
}
