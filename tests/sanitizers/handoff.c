/*
 * The hand-off of _shuttle.c without Python: a client and a server, two threads on one mapping, so
 * that ThreadSanitizer sees both sides.  (Two mappings of one memfd would hide every race from it.)
 *
 *     handoff [calls]
 *
 * Each request says what its reply must be.  Now and then the client gives a call up: then either it
 * is withdrawn and the server never takes it, or the server has it.  Nobody may wait for ever.
 */

#ifdef DAWDLE
#include "dawdle.h"
#else
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/socket.h>

/* What happens, once, just as a side is about to hear what is on its socket. */
static void (*meanwhile)(void);

static ssize_t
hear(int sock, struct msghdr *message, int flags)
{
    void (*happen)(void) = meanwhile;

    if (happen) {
        meanwhile = NULL;
        happen();
    }
    return recvmsg(sock, message, flags);
}

#define recvmsg hear
#endif
#define SHUTTLE_WITHOUT_PYTHON
#include "../../doorpool/_shuttle.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

static struct shuttle client, server;
static uint64_t calls;
static _Atomic uint64_t taken; /* by the server, withdrawn ones not counted */

static uint32_t
size_of(uint64_t number)
{
    return (uint32_t)(number * 2654435761U % 700);
}

static void
fill(uint8_t *area, uint64_t number)
{
    uint32_t size = size_of(number);
    for (uint32_t i = 0; i < size; i++)
        area[i] = (uint8_t)(number + i);
}

static void
compare(const uint8_t *area, uint32_t size, uint64_t number)
{
    CHECK(size == size_of(number));
    for (uint32_t i = 0; i < size; i++)
        CHECK(area[i] == (uint8_t)(number + i));
}

/* Wait as a gate does: look for a while, then park and poll. */
static enum outcome
next_request(void)
{
    enum outcome seen = NOTHING;
    struct pollfd ready = {server.sock, POLLIN, 0};
    int64_t look = spin_time(&server);

    if (look > 0)
        seen = look_for(&server, look_for_request, true, look, -1);
    while (seen == NOTHING) {
        CHECK(park_server(&server) == NOTHING);
        if (state_now(&server) != state_of(server.number + 1, POSTED))
            CHECK(poll(&ready, 1, 20000) > 0); /* or a wake-up was lost */
        seen = shuttle_take(&server);
        if (seen == BY_SOCKET && state_now(&server) != state_of(server.number + 1, WITHDRAWN))
            seen = NOTHING; /* a bell for a request that was seen before, though the next may be there by now */
    }
    return seen;
}

static void *
serve(void *unused)
{
    (void)unused;
    for (;;) {
        enum outcome seen = next_request();
        if (seen == BY_SOCKET)
            return NULL; /* withdrawn: the channel is over */
        CHECK(seen == GOT);
        server.number++;
        atomic_fetch_add(&taken, 1);
        compare(server.words->request, atomic_load_explicit(&server.words->request_bytes, memory_order_relaxed),
                server.number);
        fill(server.words->reply, server.number + 1);
        atomic_store_explicit(&server.words->reply_bytes, size_of(server.number + 1), memory_order_relaxed);
        shuttle_answer(&server, ANSWERED);
        if (is_parked(&server.words->client_parked))
            ring(&server);
        if (server.number == calls)
            return NULL;
    }
}

static void
post(uint64_t number)
{
    fill(client.words->request, number);
    atomic_store_explicit(&client.words->request_bytes, size_of(number), memory_order_relaxed);
    CHECK(shuttle_post(&client, POSTED));
    if (is_parked(&client.words->server_parked))
        ring(&client);
}

/* Make so many calls, the last of which is given up if `give_up`; return how many were answered or taken. */
static void
converse(int64_t client_spin, int64_t server_spin, bool give_up)
{
    pthread_t thread;
    int pair[2], yes = 1;
    int fd = shuttle_make();

    CHECK(fd >= 0);
    CHECK(shuttle_objection(fd) == NULL && errno == 0);
    memset(&client, 0, sizeof client);
    client.words = shuttle_map(fd);
    CHECK(client.words != NULL);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
    CHECK(setsockopt(pair[0], SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) == 0);
    CHECK(setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) == 0);
    client.peer = (struct ucred){getpid(), geteuid(), getegid()};
    client.pidfd = -1;
    server = client;
    client.sock = pair[0];
    server.sock = pair[1];
    client.spin = client_spin;
    server.spin = server_spin;
    atomic_store(&taken, 0);
    CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
    for (uint64_t number = 1; number <= calls; number++) {
        post(number);
        if (give_up && number == calls) {
            bool withdrawn;
            for (uint64_t i = number % 97; i > 0; i--)
                cpu_relax();
            withdrawn = shuttle_withdraw(&client);
            shutdown(client.sock, SHUT_RDWR);
            pthread_join(thread, NULL);
            CHECK(atomic_load(&taken) == (withdrawn ? number - 1 : number));
            goto close;
        }
        CHECK(shuttle_await(&client, spin_time(&client), now_ns() + 20000000000) == GOT);
        compare(client.words->reply, atomic_load_explicit(&client.words->reply_bytes, memory_order_relaxed),
                number + 1);
    }
    pthread_join(thread, NULL);
close:
    munmap(client.words, PAGE_BYTES);
    close(fd);
    close(pair[0]);
    close(pair[1]);
}

#ifndef DAWDLE
static void
ring_late(void)
{
    if (is_parked(&client.words->server_parked))
        ring(&client);
}

/* A client that comes late to ring, its request being answered, leaves a server that parks a mark or a bell. */
static void
come_late(void)
{
    static struct words words;
    int pair[2], yes = 1;
    struct pollfd ready;

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
    CHECK(setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) == 0);
    memset(&client, 0, sizeof client);
    client.words = &words;
    client.peer = (struct ucred){getpid(), geteuid(), getegid()};
    client.pidfd = -1;
    server = client;
    client.sock = pair[0];
    server.sock = pair[1];
    meanwhile = ring_late;
    CHECK(park_server(&server) == NOTHING);
    CHECK(meanwhile == NULL);
    ready = (struct pollfd){server.sock, POLLIN, 0};
    CHECK(atomic_load(&words.server_parked) == 1 || poll(&ready, 1, 0) == 1);
    close(pair[0]);
    close(pair[1]);
}
#endif

/*
 * Threads that load the library at once, as interpreters do that have a lock each, share one mark; and of
 * those that come first to a forked child, where the kernel has wiped it, all have the same number.
 */
#define COMERS 4

static pthread_barrier_t together;

static void *
come(void *number)
{
    pthread_barrier_wait(&together);
    CHECK(make_mark() == 0);
    *(uint64_t *)number = this_process();
    return NULL;
}

static void
come_at_once(uint64_t expected)
{
    pthread_t threads[COMERS];
    uint64_t numbers[COMERS];

    CHECK(pthread_barrier_init(&together, NULL, COMERS) == 0);
    for (int i = 0; i < COMERS; i++)
        CHECK(pthread_create(&threads[i], NULL, come, &numbers[i]) == 0);
    for (int i = 0; i < COMERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < COMERS; i++)
        CHECK(numbers[i] == numbers[0] && numbers[i] >= expected);
    CHECK(this_process() == numbers[0]);
    pthread_barrier_destroy(&together);
}

static void
mark_processes(uint64_t times)
{
    for (uint64_t i = 0; i < times; i++) {
        uint64_t last;
        come_at_once(1);
        last = this_process();
        atomic_store(atomic_load(&mark), 0); /* as in a child */
        come_at_once(last + 1);
        munmap(atomic_exchange(&mark, NULL), (size_t)sysconf(_SC_PAGESIZE));
    }
}

int
main(int count, char **arguments)
{
    static const int64_t spins[] = {0, 1000, 20000, -1};
    uint64_t all = count > 1 ? strtoull(arguments[1], NULL, 10) : 100000;

#ifndef DAWDLE
    come_late();
#endif
    mark_processes(all / 200 + 1);
    CHECK(make_mark() == 0);
    CHECK(this_process() > 1);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            calls = all / 16 + 1;
            converse(spins[i], spins[j], false);
            for (uint64_t k = 0; k < all / 400 + 1; k++) {
                calls = 1 + k % 5;
                converse(spins[i], spins[j], true);
            }
        }
    printf("%llu calls, and %llu given up\n", (unsigned long long)(all / 16 + 1) * 16,
           (unsigned long long)(all / 400 + 1) * 16);
    return 0;
}
