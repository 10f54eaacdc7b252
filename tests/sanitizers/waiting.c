/*
 * How long a side of _shuttle.c looks, how often it yields, and when it does not look at all.
 *
 * The clock, the number of CPUs, the CPU that we are on, and the yield are those of this file, so that each
 * look is counted and nothing depends on the machine: the clock goes on by one step each time it is looked at.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#define STEP 500 /* ns */

static int64_t clock_now = 1000000000;
static int cpus = 2, cpu_here = 0;
static uint64_t yields, looks, polls, affinities;
static uint64_t looks_at_yield; /* looks before the last yield */
static uint64_t most_looks;     /* between two yields, the first not counted */

static int
counted_yield(void)
{
    if (yields > 0 && looks - looks_at_yield > most_looks)
        most_looks = looks - looks_at_yield;
    looks_at_yield = looks;
    yields++;
    return 0;
}

static int
clock_of_steps(struct timespec *time)
{
    clock_now += STEP;
    *time = (struct timespec){clock_now / 1000000000, clock_now % 1000000000};
    return 0;
}

static int
affinity(cpu_set_t *set)
{
    affinities++;
    CPU_ZERO(set);
    for (int i = 0; i < cpus; i++)
        CPU_SET((size_t)i, set);
    return 0;
}

static int
counted_poll(struct pollfd *of, nfds_t count, int milliseconds)
{
    polls++;
    return poll(of, count, milliseconds);
}

#define sched_yield() counted_yield()
#define clock_gettime(clock, time) clock_of_steps(time)
#define sched_getaffinity(pid, size, set) affinity(set)
#define sched_getcpu() (cpu_here)
#define poll(of, count, milliseconds) counted_poll(of, count, milliseconds)

#define SHUTTLE_WITHOUT_PYTHON
#include "../../doorpool/_shuttle.c"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

static struct shuttle client, server;
static uint64_t found_at; /* the look that finds something; 0: none does */
static int spinners_meanwhile;

static enum outcome
look_and_count(struct shuttle *s)
{
    (void)s;
    looks++;
    spinners_meanwhile = atomic_load(&spinners);
    return looks == found_at ? GOT : NOTHING;
}

static void
forget(void)
{
    yields = looks = polls = affinities = looks_at_yield = most_looks = found_at = 0;
    atomic_store(&cpus_known_at, INT64_MIN / 2);
}

static void
open_both(int pair[2], int64_t spin)
{
    int yes = 1, fd = shuttle_make();

    CHECK(fd >= 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(setsockopt(pair[i], SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) == 0);
    memset(&client, 0, sizeof client);
    client.words = shuttle_map(fd);
    CHECK(client.words != NULL);
    close(fd);
    client.peer = (struct ucred){getpid(), geteuid(), getegid()};
    client.pidfd = -1;
    client.spin = spin;
    client.budget = SPIN_MOST;
    server = client;
    client.sock = pair[0];
    server.sock = pair[1];
    cpus = 2;
    cpu_here = 0;
    forget();
}

static void
close_both(int pair[2])
{
    munmap(client.words, PAGE_BYTES);
    close(pair[0]);
    close(pair[1]);
}

/* Wait for a reply that does not come, as the client does, and not parked for any time. */
static void
wait_in_vain(void)
{
    CHECK(shuttle_await(&client, spin_time(&client), clock_now) == NOTHING);
}

/* -- how long ---------------------------------------------------------------------------------- */

static void
spin_of_nothing_never_looks(void)
{
    int pair[2];

    open_both(pair, 0);
    CHECK(shuttle_post(&client, POSTED));
    for (int i = 0; i < 10 * TRY_AGAIN; i++) {
        CHECK(spin_time(&client) == 0);
        wait_in_vain();
        adapt(&client, i % 2); /* whatever became of it */
    }
    CHECK(yields == 0 && affinities == 0);
    CHECK(atomic_load(&client.words->client_cpu) == 0); /* which a look writes */
    CHECK(atomic_load(&client.words->client_parked) == 1);
    close_both(pair);
}

static void
spin_that_was_said_is_that_long_each_time(void)
{
    int pair[2];

    for (int64_t spin = STEP; spin <= 1000 * STEP; spin *= 10) {
        open_both(pair, spin);
        CHECK(shuttle_post(&client, POSTED));
        atomic_store(&client.words->server_cpu, 2);
        for (int i = 0; i < 2 * TRY_AGAIN; i++) {
            forget();
            CHECK(spin_time(&client) == spin);
            wait_in_vain();
            CHECK(yields == (uint64_t)(spin / STEP));
        }
        close_both(pair);
    }
}

/* One wait after the other, in vain: each looks so long, and not at all from `SPIN_LEAST` on. */
static void
unrewarded_looks_halve_to_none(void)
{
    for (int64_t time = SPIN_MOST; time >= SPIN_LEAST; time /= 2) {
        CHECK(spin_time(&client) == time);
        forget();
        wait_in_vain();
        CHECK(yields == (uint64_t)((time + STEP - 1) / STEP));
    }
}

static void
one_look_in(int waits)
{
    for (int i = 1; i < waits; i++) {
        int64_t time = spin_time(&client);
        CHECK(time == 0);
        forget();
        CHECK(shuttle_await(&client, time, clock_now) == NOTHING);
        CHECK(yields == 0);
    }
}

static void
budget_adapts(void)
{
    int pair[2];

    open_both(pair, -1);
    CHECK(shuttle_post(&client, POSTED));
    atomic_store(&client.words->server_cpu, 2); /* elsewhere */
    unrewarded_looks_halve_to_none();
    for (int i = 0; i < 3; i++) { /* it tries again, for the full time; in vain */
        one_look_in(TRY_AGAIN);
        forget();
        wait_in_vain();
        CHECK(yields == SPIN_MOST / STEP);
    }
    one_look_in(TRY_AGAIN);
    found_at = looks + 1;
    CHECK(look_for(&client, look_and_count, true, spin_time(&client), -1) == GOT);
    CHECK(spin_time(&client) == SPIN_MOST); /* rewarded */
    forget();
    unrewarded_looks_halve_to_none();
    one_look_in(TRY_AGAIN);
    close_both(pair);
}

/* -- how often the CPU is given away ------------------------------------------------------------- */

static void
cpus_less_one_may_spin(void)
{
    static const int quotas[] = {1 << 20, 3, 2, 1};
    int pair[2];

    open_both(pair, -1);
    for (int quota = 0; quota < 4; quota++)
        for (cpus = 1; cpus <= 5; cpus++) {
            int usable = cpus < quotas[quota] ? cpus : quotas[quota];
            int allowed = usable > 1 ? usable - 1 : quotas[quota] > 1;
            atomic_store(&cpu_quota, quotas[quota]);
            forget();
            CHECK(spinners_allowed(clock_now) == allowed);
            for (int already = 0; already < 6; already++) {
                forget();
                atomic_store(&spinners, already);
                CHECK(look_for(&client, look_and_count, true, 100 * STEP, -1) == NOTHING);
                CHECK(spinners_meanwhile == already + 1);
                CHECK(atomic_load(&spinners) == already);
                CHECK(yields == 100);
                if (already < allowed)
                    CHECK(looks == FIRST_LOOKS + 99 * LOOKS && most_looks == LOOKS);
                else
                    CHECK(looks == yields && most_looks == 1);
            }
        }
    atomic_store(&spinners, 0);
    atomic_store(&cpu_quota, 1 << 20);
    close_both(pair);
}

static void
cpus_are_counted_again_after_a_while(void)
{
    forget();
    cpus = 4;
    CHECK(spinners_allowed(clock_now) == 3);
    cpus = 2;
    CHECK(spinners_allowed(clock_now + CPUS_FOR - 1) == 3 && affinities == 1);
    CHECK(spinners_allowed(clock_now + CPUS_FOR) == 1 && affinities == 2);
}

static void
on_one_cpu_each_look_is_followed_by_a_yield(void)
{
    int pair[2];

    open_both(pair, -1);
    cpus = 8;
    CHECK(look_for(&client, look_and_count, false, 100 * STEP, -1) == NOTHING);
    CHECK(yields == 100 && looks == 100 && most_looks == 1);
    forget();
    found_at = 7;
    CHECK(look_for(&client, look_and_count, false, 100 * STEP, -1) == GOT);
    CHECK(yields == 6 && looks == 7);
    close_both(pair);
}

/* As told by the words of both sides; what is looked for comes before, and after, the first yield. */
static void
who_is_where(void)
{
    int pair[2];

    open_both(pair, -1);
    CHECK(shuttle_post(&client, POSTED));
    for (int ours = -1; ours < 3; ours++)
        for (uint32_t theirs = 0; theirs < 4; theirs++) {
            bool elsewhere = ours >= 0 && theirs > 0 && (uint32_t)ours + 1 != theirs;
            cpu_here = ours;
            client.budget = SPIN_MOST;
            atomic_store(&client.words->server_cpu, theirs);
            CHECK(is_elsewhere(&client.words->client_cpu, &client.words->server_cpu) == elsewhere);
            CHECK(atomic_load(&client.words->client_cpu) == (uint32_t)(ours + 1));
            forget();
            wait_in_vain(); /* which takes less from the other side, if that is on the same CPU */
            CHECK(yields == (elsewhere ? SPIN_MOST : YIELD_MOST) / STEP);
        }
    client.spin = SPIN_MOST; /* whoever says how long has it */
    forget();
    cpu_here = 1;
    atomic_store(&client.words->server_cpu, 2);
    wait_in_vain();
    CHECK(yields == SPIN_MOST / STEP);
    close_both(pair);
}

/* -- what else ends it ------------------------------------------------------------------------------ */

static void
the_set_and_the_socket_end_a_look(void)
{
    int pair[2];
    int set = eventfd(0, EFD_NONBLOCK);

    CHECK(set >= 0);
    open_both(pair, -1);
    CHECK(look_for(&server, look_and_count, false, 100 * STEP, set) == NOTHING);
    CHECK(yields == 100 && polls == 100 / ROUNDS);
    forget();
    CHECK(eventfd_write(set, 1) == 0);
    CHECK(look_for(&server, look_and_count, false, 100 * STEP, set) == NOTHING);
    CHECK(yields == ROUNDS - 1 && looks == ROUNDS && polls == 1);
    forget();
    CHECK(look_for(&server, look_and_count, false, 100 * STEP, -1) == NOTHING); /* a client has no set */
    CHECK(yields == 100 && polls == 0);
    close(set);
    set = eventfd(0, EFD_NONBLOCK);
    CHECK(set >= 0);
    CHECK(shutdown(pair[0], SHUT_RDWR) == 0);
    forget();
    CHECK(look_for(&server, look_and_count, false, 100 * STEP, set) == BY_SOCKET);
    CHECK(yields == ROUNDS - 1 && looks == ROUNDS + 1);
    forget();
    found_at = ROUNDS + 1; /* what was posted before the hang-up comes first */
    CHECK(look_for(&server, look_and_count, false, 100 * STEP, set) == GOT);
    close(set);
    close_both(pair);
}

int
main(void)
{
    CHECK(make_mark() == 0);
    CHECK(this_process() == 1);
    spin_of_nothing_never_looks();
    spin_that_was_said_is_that_long_each_time();
    budget_adapts();
    cpus_less_one_may_spin();
    cpus_are_counted_again_after_a_while();
    on_one_cpu_each_look_is_followed_by_a_yield();
    who_is_where();
    the_set_and_the_socket_end_a_look();
    printf("it waits by the rules\n");
    return 0;
}
