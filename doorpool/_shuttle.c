/*
 * The shuttle: calls by a page of memory that the two ends of a channel share.
 *
 * What costs in a call between two processes is not the copying but the waking up.  illumos hands
 * the CPU from the caller to the server thread and back (the "shuttle" of doorfs).  Here a side
 * that waits looks at a word in shared memory for a short, bounded while; then it says that it is
 * parked, and blocks on the channel's socket, on which the other side rings.  The socket is always
 * there: for blocking, for hang-ups, for descriptors, and for what does not fit.
 *
 * The page, a memfd that the server makes and seals against shrinking, growing and further seals:
 *
 *        0   state            the one word that decides; see below
 *       64   client parked    1: ring when the reply is there
 *       68   client's CPU     one more than its number, when it last waited; 0: not yet
 *      128   server parked    1: ring when a request is there
 *      132   server's CPU
 *      192   request: bytes (4), of these a manifest (4), nanoseconds left (8), when sent (8)
 *      216   the bytes, up to 65,320
 *   65,536   reply: bytes (4), of these a manifest (4)
 *   65,544   the bytes, up to 65,528
 *  131,072   end
 *
 * A small request is one line of the cache, a small reply another; what one side looks at again and
 * again shares a line with nothing that the other side writes meanwhile.
 *
 * The state is the number of a call, shifted by four, and in the low bits what has become of it.
 * Each arrow is a compare-and-swap, so of two sides that want something else one loses, and knows:
 *
 *               client                server               server
 *    ANSWERED ----------> POSTED ---------------> TAKEN ----------> ANSWERED
 *       (n-1)              (n) |                   (n)                (n)
 *                              | client gives up
 *                              +---------------> POSTED + WITHDRAWN        it did not and will not run
 *
 * POSTED_BY_SOCKET and ANSWERED_BY_SOCKET are POSTED and ANSWERED where the bytes go over the socket.
 * The server closes a channel by setting CLOSED beside whatever the state is: with POSTED the call
 * will not be run, with ANSWERED the reply is still good, and in any case no further call is posted.
 * There is no lock in the page: whoever dies leaves a word that says how far he came.
 *
 * Orders.  Who posts or answers writes the bytes, then the state with release; who sees the state
 * with acquire sees the bytes.  Parking is Dekker's dance: each side writes its own word and then
 * reads the other's, with a full fence between the two:
 *
 *     waits:  parked = 1;    fence;  is the state what I wait for?  if not, block
 *     tells:  state = ...;   fence;  was parked 1?                   if so, ring
 *
 * At least one of the two sees what the other wrote, so nobody blocks beside a call that is there.
 * Whoever tells takes the mark away, and rings; who finds, having seen what he waits for, that his mark
 * is gone, knows that a bell is on its way, and takes it.  So each parking has one bell or none.  Who tells
 * may come so late that he takes the mark of the next parking; so bells are taken away before one parks, and
 * not between parking and blocking.
 *
 * Trust.  A page exists only between processes of one user that may unpickle for each other, yet a
 * broken one must not break us: every word that the other side can write is read once, and only
 * the copy is checked and used; a state that cannot be ends the channel; no wait is without end,
 * for the caller looks after the process at the other end while it is parked.  A page is not
 * mapped in forked children (MADV_DONTFORK): a child that has changed its user could write to it.
 * A bell says who rang.  And whoever is about to ring, takes a channel out of the set, or has heard
 * nothing for 0.1 ms, looks whether the other side is still the user it was (Linux 6.13): a process
 * that has given up its user could misuse a page only in the moment between two such looks.
 *
 * Two halves.  `shuttle_*` knows no Python and runs without the interpreter's lock; `Page_*` wraps it.
 * The twin of this file is _shuttle_py.py, which makes no page, so that all goes over the socket.
 */

#define _GNU_SOURCE
#ifndef SHUTTLE_WITHOUT_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

/* linux/pidfd.h, since 6.13 */
struct process_info {
    uint64_t mask, cgroup;
    uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
};
#define GET_PROCESS_INFO _IOWR(0xFF, 11, struct process_info)
#define PROCESS_INFO_IDS 2U

/* -- the page ------------------------------------------------------------------------------ */

#define AREA 65536U
#define PAGE_BYTES (2 * AREA)
#define REQUEST_AT 216U
#define REQUEST_ROOM (AREA - REQUEST_AT)
#define REPLY_AT (AREA + 8U)
#define REPLY_ROOM (PAGE_BYTES - REPLY_AT)

struct words {
    _Atomic uint64_t state;
    char pad0[56];
    _Atomic uint32_t client_parked;
    _Atomic uint32_t client_cpu;
    char pad1[56];
    _Atomic uint32_t server_parked;
    _Atomic uint32_t server_cpu;
    char pad2[56];
    _Atomic uint32_t request_bytes;
    _Atomic uint32_t request_manifest;
    _Atomic uint64_t nanoseconds;
    _Atomic uint64_t sent;
    uint8_t request[REQUEST_ROOM];
    _Atomic uint32_t reply_bytes;
    _Atomic uint32_t reply_manifest;
    uint8_t reply[REPLY_ROOM];
};

_Static_assert(offsetof(struct words, client_parked) == 64, "as drawn above");
_Static_assert(offsetof(struct words, server_parked) == 128, "as drawn above");
_Static_assert(offsetof(struct words, request_bytes) == 192, "as drawn above");
_Static_assert(offsetof(struct words, request) == REQUEST_AT, "as drawn above");
_Static_assert(offsetof(struct words, reply_bytes) == AREA, "as drawn above");
_Static_assert(offsetof(struct words, reply) == REPLY_AT, "as drawn above");
_Static_assert(sizeof(struct words) == PAGE_BYTES, "as drawn above");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock of the C library is in one process only");

enum {
    ANSWERED,
    ANSWERED_BY_SOCKET,
    POSTED,
    POSTED_BY_SOCKET,
    TAKEN,
    PHASE = 7,
    CLOSED = 8,
    WITHDRAWN = TAKEN | 1 | 2, /* 7: no phase of a running call; beside the number of the call */
    SHIFT = 4,
};

static inline uint64_t
state_of(uint64_t number, unsigned phase)
{
    return number << SHIFT | phase;
}

/* What a wait has come to. */
enum outcome {
    NOTHING,   /* the time is over */
    GOT,       /* what was waited for is in the page */
    BY_SOCKET, /* look at the socket: it is there, or the other side has hung up */
    SHUT,      /* the server has closed the channel without an answer */
    SIGNAL,    /* a signal came */
    FAULT,     /* the page says what cannot be */
};

/* -- time, CPUs, forks: of the process, not of a page ----------------------------------------- */

#define SPIN_MOST 200000   /* ns: what a wait looks at most by itself; see docs/performance.md */
#define YIELD_MOST 50000   /* ns: the same where it yields each time, and so takes from the other side */
#define SPIN_LEAST 2000    /* ns: below this a wait does not look at all */
#define TRY_AGAIN 32       /* waits after which one looks for the full time again */
#define BELL_MOST 100      /* ms: for a bell that is being rung by somebody who has lost the CPU */
#define MOST_BELLS 512     /* in a row; a full socket holds some 280 */
#define TRUSTED_FOR 100000 /* ns: after which one looks again who is at the other end */
#define SLICE 1000000      /* ns: of a long look, after which signals are heard */
#define LOOKS 8            /* looks between two yields, where both sides have a CPU */
#define FIRST_LOOKS 240    /* and before the first: a yield takes 0.5 us, a look 0.025, a small call up to 5 */
#define ROUNDS 4           /* yields between two looks at the set */
#define CPUS_FOR 100000000 /* ns: for which the number of CPUs is remembered */

static int64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void
cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* How many CPUs this process may use: its affinity, and what Python knows of its cgroup. */
static _Atomic int cpu_quota = 1 << 20;
static _Atomic int cpus_known = 1;
static _Atomic int64_t cpus_known_at = INT64_MIN / 2;

static int
cpus_allowed(int64_t now)
{
    cpu_set_t set;
    int count;

    if (now - atomic_load_explicit(&cpus_known_at, memory_order_relaxed) < CPUS_FOR)
        return atomic_load_explicit(&cpus_known, memory_order_relaxed);
    count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1 << 20; /* over 1,024 */
    if (count > atomic_load_explicit(&cpu_quota, memory_order_relaxed))
        count = atomic_load_explicit(&cpu_quota, memory_order_relaxed);
    atomic_store_explicit(&cpus_known, count, memory_order_relaxed);
    atomic_store_explicit(&cpus_known_at, now, memory_order_relaxed);
    return count;
}

/* How many threads of this process look, and how many of them may without yielding each time. */
static _Atomic int spinners;

static int
spinners_allowed(int64_t now)
{
    int cpus = cpus_allowed(now);
    /* Pinned to one CPU, and the other side to another: one may.  With the quota of one, none. */
    return cpus > 1 ? cpus - 1 : atomic_load_explicit(&cpu_quota, memory_order_relaxed) > 1;
}

/*
 * A mark that the kernel wipes in a forked child, where pages are not mapped: they must not be
 * touched there, nor unmapped, since something else may stand at their place.  As `_mark` in _sockets.
 *
 * One for all interpreters of the process, of which each may have a lock of its own.
 */
static _Atomic(_Atomic uint64_t *) mark;
static _Atomic uint64_t process_number = 1;

static uint64_t
this_process(void)
{
    /* acquire: pairs with the release in make_mark(), which this interpreter may not have made itself */
    _Atomic uint64_t *at = atomic_load_explicit(&mark, memory_order_acquire);
    uint64_t number = atomic_load_explicit(at, memory_order_relaxed);
    uint64_t nobody = 0;

    if (number != 0)
        return number;
    /* Of several threads that come first to a forked child, one gives it its number, and the others take that. */
    number = atomic_fetch_add(&process_number, 1) + 1;
    if (!atomic_compare_exchange_strong(at, &nobody, number))
        return nobody;
    atomic_store(&spinners, 0); /* those of the parent */
    return number;
}

static int
make_mark(void)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    _Atomic uint64_t *none = NULL;
    void *at;

    if (atomic_load(&mark) != NULL)
        return 0;
    at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return -1;
    if (madvise(at, size, MADV_WIPEONFORK) != 0) {
        munmap(at, size);
        return -1;
    }
    atomic_store((_Atomic uint64_t *)at, atomic_load(&process_number)); /* before anybody can see it */
    if (!atomic_compare_exchange_strong(&mark, &none, at)) /* another interpreter has made one meanwhile */
        munmap(at, size);
    return 0;
}

/* -- one end of a page ------------------------------------------------------------------------- */

struct shuttle {
    struct words *words;
    int sock;
    int pidfd; /* of the process at the other end, or -1 */
    struct ucred peer;
    uint64_t number;   /* of the call that is on, or was last */
    int64_t spin;      /* ns that each wait looks; -1: as long as it is worth it */
    int64_t budget;    /* ns that the next wait looks */
    unsigned waits;
    int64_t clock;     /* when it was last looked at */
    const char *fault; /* what cannot be */
};

static enum outcome
fault(struct shuttle *s, const char *text)
{
    s->fault = text;
    return FAULT;
}

static bool
swap_state(struct shuttle *s, uint64_t from, uint64_t to)
{
    /* acq_rel: publishes our bytes with a post; with a take, sees the other side's. */
    return atomic_compare_exchange_strong_explicit(&s->words->state, &from, to, memory_order_acq_rel,
                                                   memory_order_acquire);
}

static uint64_t
state_now(const struct shuttle *s)
{
    /* acquire: pairs with the release of whoever posted or answered */
    return atomic_load_explicit(&s->words->state, memory_order_acquire);
}

/* Tell whether the other side has parked, and is to be rung for; no second time. */
static bool
is_parked(_Atomic uint32_t *parked)
{
    atomic_thread_fence(memory_order_seq_cst); /* pairs with the fence in park() */
    return atomic_load_explicit(parked, memory_order_relaxed) != 0
           && atomic_exchange_explicit(parked, 0, memory_order_relaxed) != 0;
}

/*
 * Ring.
 *
 * A bell that finds no room has rung: something is there already.  One that fails otherwise (no memory)
 * would leave the other side asleep, perhaps for ever.  So the channel is shut down, which takes nothing and
 * wakes both: who waits for an answer that is here finds it, and all else is a hang-up.
 */
static void
ring(struct shuttle *s)
{
    static const char bell = 'B';
    int unread = 0;

    if (send(s->sock, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL) == 1)
        return;
    if (errno == EAGAIN && ioctl(s->sock, TIOCOUTQ, &unread) == 0 && unread > 0)
        return;
    (void)shutdown(s->sock, SHUT_RDWR);
}

static void
park(_Atomic uint32_t *parked)
{
    atomic_store_explicit(parked, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst); /* pairs with the fence in is_parked() */
}

/*
 * Look again who is at the other end: still the user who opened the channel; and that our own end
 * still asks, for somebody who has got hold of a copy could switch that off.
 */
static enum outcome
look_again(struct shuttle *s)
{
    static _Atomic bool cannot;
    struct process_info info = {.mask = PROCESS_INFO_IDS};
    int asks = 0;
    socklen_t size = sizeof asks;

    if (getsockopt(s->sock, SOL_SOCKET, SO_PASSCRED, &asks, &size) == 0 && !asks)
        return fault(s, "somebody else has got hold of this end of the channel");
    if (s->pidfd < 0 || atomic_load_explicit(&cannot, memory_order_relaxed))
        return NOTHING;
    if (ioctl(s->pidfd, GET_PROCESS_INFO, &info) != 0) {
        if (errno == ENOTTY || errno == EINVAL)
            atomic_store_explicit(&cannot, true, memory_order_relaxed);
        return NOTHING; /* or it is dead, which the socket will say */
    }
    if (info.mask & PROCESS_INFO_IDS
        && (info.ruid != s->peer.uid || info.euid != s->peer.uid || info.suid != s->peer.uid
            || info.rgid != s->peer.gid || info.egid != s->peer.gid || info.sgid != s->peer.gid))
        return fault(s, "the process at the other end is somebody else than the one who opened the channel");
    return NOTHING;
}

/* Close what came in the place of credentials: there is room for them if our end does not ask any more. */
static void
close_rights(struct msghdr *message)
{
    for (struct cmsghdr *head = CMSG_FIRSTHDR(message); head; head = CMSG_NXTHDR(message, head))
        if (head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
            for (size_t at = 0; at + CMSG_LEN(sizeof(int)) <= head->cmsg_len; at += sizeof(int)) {
                int number;
                memcpy(&number, CMSG_DATA(head) + at, sizeof number);
                close(number);
            }
}

/*
 * Take one bell from the socket, or only look at what is there.
 *
 * Returns GOT for a bell; NOTHING if nothing is there; BY_SOCKET for anything else, which stays
 * there (with MSG_PEEK), a hang-up included.
 */
static enum outcome
hear_bell(struct shuttle *s, int flags)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(struct ucred))];
    } control;
    char byte[2];
    struct iovec vector = {byte, sizeof byte};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.room,
                             .msg_controllen = sizeof control.room};
    struct cmsghdr *head;
    struct ucred from;
    ssize_t size = recvmsg(s->sock, &message, flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (size < 0)
        return errno == EAGAIN || errno == EINTR ? NOTHING : BY_SOCKET;
    close_rights(&message);
    if (size != 1 || byte[0] != 'B' || message.msg_flags & MSG_TRUNC)
        return flags & MSG_PEEK ? BY_SOCKET : fault(s, "something else came in place of a bell");
    head = CMSG_FIRSTHDR(&message);
    if (head == NULL || head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_CREDENTIALS)
        return fault(s, "a bell by somebody else, who does not say who he is");
    memcpy(&from, CMSG_DATA(head), sizeof from);
    if (from.pid != s->peer.pid || from.uid != s->peer.uid || from.gid != s->peer.gid)
        return fault(s, "a bell by somebody else than the one who opened the channel");
    return GOT;
}

/*
 * Take all bells that wait.  Returns NOTHING, BY_SOCKET if something else is behind them, or FAULT.
 *
 * An honest peer rings once for each time that we parked; another can ring as fast as we hear.
 */
static enum outcome
hear_bells(struct shuttle *s)
{
    for (int heard_now = 0; heard_now < MOST_BELLS; heard_now++) {
        enum outcome heard = hear_bell(s, MSG_PEEK);
        if (heard == GOT)
            heard = hear_bell(s, 0);
        if (heard != GOT)
            return heard;
    }
    return fault(s, "bells without end");
}

/* -- looking ---------------------------------------------------------------------------------- */

typedef enum outcome (*look_t)(struct shuttle *);

/* Decide how long this wait looks before it parks. */
static int64_t
spin_time(struct shuttle *s)
{
    if (s->spin >= 0)
        return s->spin;
    if (s->budget >= SPIN_LEAST)
        return s->budget;
    return ++s->waits % TRY_AGAIN == 0 ? SPIN_MOST : 0;
}

/* A look that was rewarded lets the next take the full time; one that was not, half of its own. */
static void
adapt(struct shuttle *s, bool rewarded)
{
    s->budget = rewarded ? SPIN_MOST : s->budget / 2;
}

/* Tell whether the other side last ran on another CPU, leaving word for it on which one we do. */
static bool
is_elsewhere(_Atomic uint32_t *ours, const _Atomic uint32_t *theirs)
{
    uint32_t cpu = (uint32_t)sched_getcpu() + 1; /* 0, for "not known", if it fails */
    uint32_t other = atomic_load_explicit(theirs, memory_order_relaxed);

    if (atomic_load_explicit(ours, memory_order_relaxed) != cpu) /* rarely: the line is looked at */
        atomic_store_explicit(ours, cpu, memory_order_relaxed);
    return cpu != 0 && other != 0 && cpu != other;
}

/*
 * Look for so many nanoseconds, yielding the CPU between looks.
 *
 * Where the other side is on another CPU, a few looks go before each yield; where it is not, or
 * enough threads of this process look already, each look is followed by one: the yield hands the
 * CPU over.  `set` is an epoll descriptor, or -1; that something is ready there ends the look.  So does
 * what comes on the socket, which is not in the set meanwhile: mostly the hang-up of a client who came for
 * one call, and whose channel would stay open, and its end meet the opening of the next, for 0.2 ms.
 */
static enum outcome
look_for(struct shuttle *s, look_t look, bool elsewhere, int64_t time, int set)
{
    struct pollfd ready[] = {{set, POLLIN, 0}, {s->sock, POLLIN | POLLRDHUP, 0}};
    int64_t until = (s->clock = now_ns()) + time;
    bool alone = atomic_fetch_add(&spinners, 1) < spinners_allowed(s->clock);
    int looks = elsewhere && alone ? FIRST_LOOKS : 1;
    enum outcome seen = NOTHING;

    if (!elsewhere && s->spin < 0 && time > YIELD_MOST)
        until = s->clock + YIELD_MOST;
    for (unsigned rounds = 0;; rounds++) {
        for (int i = 0; i < looks && seen == NOTHING; i++) {
            seen = look(s);
            if (seen == NOTHING) /* a pause takes 0.02 us and more, and somebody waits for what was found */
                cpu_relax();
        }
        if (seen != NOTHING)
            break;
        looks = elsewhere && alone ? LOOKS : 1;
        if (set >= 0 && rounds % ROUNDS == ROUNDS - 1 && poll(ready, 2, 0) > 0) {
            if (ready[1].revents && (seen = look(s)) == NOTHING)
                seen = BY_SOCKET;
            break;
        }
        sched_yield();
        /* A yield may have given the CPU to somebody who has kept it.  Who had parked would have been
           woken sooner; and who looks so late is to look again at who is at the other end. */
        s->clock = now_ns();
        if (s->clock >= until)
            break;
    }
    atomic_fetch_sub(&spinners, 1);
    adapt(s, seen != NOTHING);
    return seen;
}

/* -- the client's side ------------------------------------------------------------------------- */

static enum outcome
look_for_reply(struct shuttle *s)
{
    uint64_t state = state_now(s);
    if (state >> SHIFT != s->number)
        return fault(s, "the state is of another call");
    switch (state & (PHASE | CLOSED)) {
    case POSTED:
    case POSTED_BY_SOCKET:
    case TAKEN:
        return NOTHING;
    case ANSWERED:
    case ANSWERED | CLOSED:
        return GOT;
    case ANSWERED_BY_SOCKET:
    case ANSWERED_BY_SOCKET | CLOSED:
        return BY_SOCKET;
    case POSTED | CLOSED:
    case POSTED_BY_SOCKET | CLOSED:
    case TAKEN | CLOSED:
        return SHUT;
    default:
        return fault(s, "there is no such state of a call");
    }
}

/* Post the next request; false if the server has closed the channel. */
static bool
shuttle_post(struct shuttle *s, unsigned phase)
{
    uint64_t before = s->number;
    s->clock = now_ns();
    if (phase == POSTED)
        atomic_store_explicit(&s->words->sent, (uint64_t)s->clock, memory_order_relaxed);
    s->number++;
    if (!swap_state(s, state_of(before, ANSWERED), state_of(s->number, phase))
        && !swap_state(s, state_of(before, ANSWERED_BY_SOCKET), state_of(s->number, phase))) {
        s->number = before;
        return false;
    }
    return true;
}

/* Block until something is on the socket, or the time is over. */
static enum outcome
block(struct shuttle *s, int64_t until)
{
    struct pollfd ready = {s->sock, POLLIN, 0};
    int64_t left = until - now_ns();
    struct timespec time = {left / 1000000000, left % 1000000000};

    if (left <= 0)
        return NOTHING;
    if (ppoll(&ready, 1, &time, NULL) < 0) /* no memory: who called waits again, having looked round */
        return errno == EINTR ? SIGNAL : NOTHING;
    return ready.revents ? GOT : NOTHING;
}

/* Take our mark away; if it is gone, the bell that rings for it is taken, in the moment that it may need. */
static enum outcome
unpark(struct shuttle *s, _Atomic uint32_t *parked)
{
    struct pollfd ready = {s->sock, POLLIN, 0};

    if (atomic_exchange_explicit(parked, 0, memory_order_acq_rel) != 0)
        return NOTHING;
    if (poll(&ready, 1, BELL_MOST) <= 0) /* a hang-up is an end of this, too */
        return NOTHING;
    if (hear_bell(s, MSG_PEEK) != GOT) /* who was to ring has died; what else is there stays */
        return NOTHING;
    return hear_bell(s, 0) == FAULT ? FAULT : NOTHING;
}

/*
 * Look at what is on the socket, and then at the page: the server may have answered, and closed the
 * channel with a goodbye, between a look at the page and one at the socket.
 */
static enum outcome
hear_and_look(struct shuttle *s)
{
    enum outcome heard = hear_bells(s);
    enum outcome seen = heard == FAULT ? FAULT : look_for_reply(s);
    return seen == NOTHING ? heard : seen;
}

/* Wait for the reply, parked. */
static enum outcome
await_parked(struct shuttle *s, int64_t until)
{
    enum outcome seen;
    for (;;) {
        park(&s->words->client_parked);
        if ((seen = look_for_reply(s)) != NOTHING)
            break;
        if ((seen = block(s, until)) != GOT)
            break;
        /* Whatever was to be told before this bell or hang-up is to be seen now. */
        if ((seen = look_for_reply(s)) != NOTHING)
            break;
        if ((seen = hear_and_look(s)) != NOTHING)
            break;
    }
    return seen == FAULT || (seen == GOT && unpark(s, &s->words->client_parked) == FAULT) ? FAULT : seen;
}

/* Wait for the reply of the call that was posted until `until`: look for so long, then park. */
static enum outcome
shuttle_await(struct shuttle *s, int64_t look, int64_t until)
{
    enum outcome seen = NOTHING;

    if (look > 0)
        seen = look_for(s, look_for_reply, is_elsewhere(&s->words->client_cpu, &s->words->server_cpu), look, -1);
    return seen == NOTHING ? await_parked(s, until) : seen;
}

/*
 * A part of a long look, at whose end all is heard that a parked one would hear.
 *
 * Returns SIGNAL if there is nothing yet, and signals should be looked after.
 */
static enum outcome
shuttle_look(struct shuttle *s, int64_t until)
{
    bool elsewhere = is_elsewhere(&s->words->client_cpu, &s->words->server_cpu);
    enum outcome seen = look_for(s, look_for_reply, elsewhere, SLICE, -1);
    if (seen == NOTHING)
        seen = hear_and_look(s);
    return seen == NOTHING && s->clock < until ? SIGNAL : seen;
}

/* Give the call up; true if it did not run and never will. */
static bool
shuttle_withdraw(struct shuttle *s)
{
    uint64_t state = state_now(s);
    /* An honest server writes three times at most while a call is withdrawn; another, without end. */
    for (int tries = 0; tries < 100; tries++) {
        unsigned phase = state & PHASE;
        if (state >> SHIFT != s->number || (phase != POSTED && phase != POSTED_BY_SOCKET))
            return phase == WITHDRAWN;
        if (state & CLOSED) /* the server has said that it will not take it */
            return true;
        if (atomic_compare_exchange_strong_explicit(&s->words->state, &state, state_of(s->number, WITHDRAWN),
                                                    memory_order_acq_rel, memory_order_acquire))
            return true;
    }
    return false;
}

/* -- the server's side ------------------------------------------------------------------------- */

static enum outcome
look_for_request(struct shuttle *s)
{
    uint64_t state = state_now(s);
    uint64_t next = s->number + 1;

    if (state == state_of(s->number, ANSWERED) || state == state_of(s->number, ANSWERED_BY_SOCKET))
        return NOTHING;
    if (state == state_of(next, POSTED))
        return swap_state(s, state, state_of(next, TAKEN)) ? GOT : BY_SOCKET;
    if (state == state_of(next, POSTED_BY_SOCKET) || state == state_of(next, WITHDRAWN))
        return BY_SOCKET; /* or the hang-up of a client that gave up is on its way */
    return fault(s, "the state is of another call");
}

/*
 * Park, without the bells that rang for earlier requests.
 *
 * They are taken before the mark is set: a client that comes late to look for it, the server having seen its
 * request already, takes this mark away and rings for it.  Were that bell taken after the mark, there would be
 * neither, and nobody to ring for the next request.  So it stays, and wakes us for nothing.
 */
static enum outcome
park_server(struct shuttle *s)
{
    if (hear_bells(s) == FAULT)
        return FAULT;
    park(&s->words->server_parked); /* what else is on the socket, the set tells */
    return NOTHING;
}

/* After an event in the set: take the request, if there is one. */
static enum outcome
shuttle_take(struct shuttle *s)
{
    enum outcome seen = look_again(s), heard = hear_bell(s, MSG_PEEK);

    if (heard == GOT)
        heard = hear_bell(s, 0);
    if (seen == FAULT || heard == FAULT)
        return FAULT;
    atomic_store_explicit(&s->words->server_parked, 0, memory_order_relaxed);
    seen = look_for_request(s);
    return seen == NOTHING ? BY_SOCKET : seen;
}

static void
shuttle_answer(struct shuttle *s, unsigned phase)
{
    /* release: pairs with the acquire in look_for_reply(); nobody else writes while it is TAKEN */
    atomic_store_explicit(&s->words->state, state_of(s->number, phase), memory_order_release);
}

/* -- making and mapping one -------------------------------------------------------------------- */

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Make a sealed page; return its descriptor, or -1 with errno. */
static int
shuttle_make(void)
{
    static const char name[] = "doorpool-page";
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);

    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    /* Only our own user may open it anew, by /proc/PID/fd; a new memfd's mode is for all. */
    if (fchmod(fd, 0600) == 0 && ftruncate(fd, PAGE_BYTES) == 0 && fcntl(fd, F_ADD_SEALS, SEALS) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Say what is wrong with a descriptor that should be a page; NULL if nothing is, or with errno set. */
static const char *
shuttle_objection(int fd)
{
    struct stat status;
    struct statfs system;
    int seals, flags;

    errno = 0;
    if (fstatfs(fd, &system) != 0 || fstat(fd, &status) != 0)
        return NULL;
    if (system.f_type != TMPFS_MAGIC || !S_ISREG(status.st_mode))
        return "it is no memfd";
    if (status.st_size != PAGE_BYTES)
        return "it has another size";
    seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0) {
        errno = 0;
        return "it cannot be sealed";
    }
    if ((seals & SEALS) != SEALS)
        return "it is not sealed";
    flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return NULL;
    if ((flags & O_ACCMODE) != O_RDWR || (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0)
        return "it cannot be written"; /* mmap() would say so, too, but as it does of a want of rights */
    return NULL;
}

static struct words *
shuttle_map(int fd)
{
    void *at = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return NULL;
    if (madvise(at, PAGE_BYTES, MADV_DONTFORK) != 0) {
        int error = errno;
        munmap(at, PAGE_BYTES);
        errno = error;
        return NULL;
    }
    return at;
}

#ifndef SHUTTLE_WITHOUT_PYTHON

/* ============================================================================================== */
/* What Python sees.                                                                              */

typedef struct {
    PyObject *page_error;
    PyTypeObject *page_type;
} State;

typedef struct {
    PyObject_HEAD
    struct shuttle shuttle;
    uint64_t process;      /* in which it is mapped */
    _Atomic int busy;      /* a thread is inside */
    _Atomic int closing;   /* unmap when it leaves */
} Page;

static State *
state_of_type(PyTypeObject *type)
{
    return PyType_GetModuleState(type);
}

static void
Page_unmap(Page *self)
{
    if (self->shuttle.words != NULL && self->process == this_process())
        munmap(self->shuttle.words, PAGE_BYTES);
    self->shuttle.words = NULL;
}

#define TOO_LARGE (-1L) /* what `post` returns for what does not fit */

/*
 * Whether a thread is inside.  Where the interpreter has its lock, that guards the mark; an atomic one
 * would take a twentieth of a call.
 */
static bool
Page_claim(Page *self)
{
#ifdef Py_GIL_DISABLED
    return atomic_exchange_explicit(&self->busy, 1, memory_order_acquire) == 0;
#else
    bool free = atomic_load_explicit(&self->busy, memory_order_relaxed) == 0;
    atomic_store_explicit(&self->busy, 1, memory_order_relaxed);
    return free;
#endif
}

/* Begin to use a page: one thread at a time, in the process that mapped it, and not once it is closed. */
static int
Page_enter(Page *self)
{
    if (!Page_claim(self)) {
        PyErr_SetString(PyExc_RuntimeError, "a page is for one thread at a time");
        return -1;
    }
    if (self->shuttle.words != NULL && self->process == this_process())
        return 0;
    atomic_store_explicit(&self->busy, 0, memory_order_release);
    PyErr_SetString(PyExc_ValueError, "this page is closed");
    return -1;
}

/*
 * Let the next thread in, having unmapped the page if it was closed meanwhile.
 *
 * Dekker's dance again, where the interpreter has no lock: who closes says so, and then looks whether a
 * thread is inside; who leaves says so, and then looks again whether it was closed.  One of the two sees
 * what the other did, and unmaps; without the second look a page might stay mapped as long as it is known.
 */
static void
Page_leave(Page *self)
{
    bool closing;

    do {
        closing = atomic_load_explicit(&self->closing, memory_order_relaxed);
        if (closing)
            Page_unmap(self);
        atomic_store_explicit(&self->busy, 0, memory_order_release);
#ifdef Py_GIL_DISABLED
        atomic_thread_fence(memory_order_seq_cst); /* pairs with the fence in Page_close() */
#endif
    } while (!closing && atomic_load_explicit(&self->closing, memory_order_relaxed) && Page_claim(self));
}

static PyObject *
Page_fault(Page *self)
{
    State *state = state_of_type(Py_TYPE(self));
    PyErr_Format(state->page_error, "the shared page is broken: %s", self->shuttle.fault);
    return NULL;
}

/* Copy so many bytes out of an area, the number having been read once, and checked. */
static PyObject *
copied(struct shuttle *s, const uint8_t *area, uint32_t size, uint32_t manifest, uint32_t room)
{
    if (size > room || manifest > size) {
        s->fault = "more bytes than there can be";
        return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)area, size);
}

/* Put bytes into an area; 1 if they do not fit, -1 with an exception. */
static int
put(PyObject *data, uint8_t *area, uint32_t room, uint32_t *size)
{
    Py_buffer view;

    if (PyBytes_CheckExact(data)) {
        if (PyBytes_GET_SIZE(data) > (Py_ssize_t)room)
            return 1;
        *size = (uint32_t)PyBytes_GET_SIZE(data);
        memcpy(area, PyBytes_AS_STRING(data), *size);
        return 0;
    }
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) != 0)
        return -1;
    if (view.len <= (Py_ssize_t)room) {
        *size = (uint32_t)view.len;
        memcpy(area, view.buf, *size);
        PyBuffer_Release(&view);
        return 0;
    }
    PyBuffer_Release(&view);
    return 1;
}

static int
as_u32(PyObject *number, uint32_t *value)
{
    unsigned long got = PyLong_AsUnsignedLong(number);
    if (got == (unsigned long)-1 && PyErr_Occurred())
        return -1;
    if (got > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "too large for a page");
        return -1;
    }
    *value = (uint32_t)got;
    return 0;
}

static int
as_i64(PyObject *number, int64_t *value)
{
    *value = PyLong_AsLongLong(number);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

static int
check_count(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", name, wanted, given);
    return -1;
}

/* Ring, with the interpreter's lock released: it wakes somebody, who may want the CPU at once. */
static void
Page_ring(Page *self)
{
    Py_BEGIN_ALLOW_THREADS
    ring(&self->shuttle);
    Py_END_ALLOW_THREADS
}

/* -- the client's methods -- */

/* Wait for the reply with the interpreter's lock released; signals are heard now and then. */
static enum outcome
Page_await(Page *self, int64_t patience)
{
    struct shuttle *s = &self->shuttle;
    int64_t look = spin_time(s), until = now_ns() + patience;
    enum outcome seen;

    do {
        Py_BEGIN_ALLOW_THREADS
        if (look > SLICE) {
            seen = shuttle_look(s, until);
            look -= SLICE;
        }
        else
            seen = shuttle_await(s, look, until);
        Py_END_ALLOW_THREADS
    } while (seen == SIGNAL && PyErr_CheckSignals() == 0);
    return seen;
}

static PyObject *
Page_reply(Page *self, enum outcome seen)
{
    struct shuttle *s = &self->shuttle;
    struct words *w = s->words;
    PyObject *data, *pair;
    uint32_t size, manifest;

    if (seen == SIGNAL)
        return NULL;
    if (seen == FAULT)
        return Page_fault(self);
    if (seen != GOT)
        return PyLong_FromLong(seen);
    size = atomic_load_explicit(&w->reply_bytes, memory_order_relaxed);
    manifest = atomic_load_explicit(&w->reply_manifest, memory_order_relaxed);
    data = copied(s, w->reply, size, manifest, REPLY_ROOM);
    if (data == NULL && !PyErr_Occurred())
        return Page_fault(self);
    if (data == NULL || manifest == 0)
        return data;
    pair = Py_BuildValue("(Nk)", data, (unsigned long)manifest);
    return pair;
}

PyDoc_STRVAR(post_doc,
"post(data, manifest, nanoseconds)\n--\n\n"
"Post a request.\n\n"
"Args:\n"
"    data: bytes, of which the first `manifest` are one.\n"
"    nanoseconds: what is left for the call; 0 for no deadline.\n\n"
"Returns:\n"
"    True; False if the server has closed the channel; or what is to go over the socket, nothing\n"
"    having been posted: TOO_LARGE, for it does not fit; BY_SOCKET, for something waits there.\n\n"
"Raises:\n"
"    PageError: the other side is somebody else by now.");

static PyObject *
Page_post(Page *self, PyObject *const *args, Py_ssize_t count)
{
    struct shuttle *s = &self->shuttle;
    uint32_t size, manifest;
    int64_t left;
    bool posted;
    int fits;

    if (check_count("post", count, 3) != 0 || as_u32(args[1], &manifest) != 0 || as_i64(args[2], &left) != 0
        || Page_enter(self) != 0)
        return NULL;
    fits = put(args[0], s->words->request, REQUEST_ROOM, &size);
    if (fits != 0) {
        Page_leave(self);
        return fits < 0 ? NULL : PyLong_FromLong(TOO_LARGE);
    }
    atomic_store_explicit(&s->words->request_bytes, size, memory_order_relaxed);
    atomic_store_explicit(&s->words->request_manifest, manifest, memory_order_relaxed);
    atomic_store_explicit(&s->words->nanoseconds, (uint64_t)left, memory_order_relaxed);
    if (atomic_load_explicit(&s->words->server_parked, memory_order_relaxed)
        || now_ns() - s->clock > TRUSTED_FOR) {
        enum outcome seen = look_again(s);
        if (seen == NOTHING)
            seen = hear_bell(s, MSG_PEEK);
        if (seen != NOTHING) {
            Page_leave(self);
            return seen == FAULT ? Page_fault(self) : PyLong_FromLong(BY_SOCKET);
        }
    }
    posted = shuttle_post(s, POSTED);
    if (posted && is_parked(&s->words->server_parked))
        Page_ring(self);
    Page_leave(self);
    return PyBool_FromLong(posted);
}

PyDoc_STRVAR(wait_doc,
"wait(patience)\n--\n\n"
"Wait for the reply of the call that was posted.\n\n"
"Args:\n"
"    patience: nanoseconds to wait at most.\n\n"
"Returns:\n"
"    bytes; or (bytes, manifest), of which the first `manifest` are one; or one of the numbers\n"
"    NOTHING   no reply yet,\n"
"    BY_SOCKET look at the socket: it is there, or the server has hung up,\n"
"    SHUT      the server has closed the channel without answering.\n\n"
"Raises:\n"
"    PageError: what stands in the page cannot be.\n"
"    BaseException: what a signal handler has raised; the call is still on.");

static PyObject *
Page_wait(Page *self, PyObject *number)
{
    PyObject *result;
    int64_t patience;

    if (as_i64(number, &patience) != 0 || Page_enter(self) != 0)
        return NULL;
    result = Page_reply(self, Page_await(self, patience));
    Page_leave(self);
    return result;
}

PyDoc_STRVAR(announce_doc,
"announce()\n--\n\n"
"Post a request whose bytes go over the socket, before the first of them does.\n\n"
"Returns False if the server has closed the channel.");

static PyObject *
Page_announce(Page *self, PyObject *Py_UNUSED(none))
{
    bool posted;
    if (Page_enter(self) != 0)
        return NULL;
    posted = shuttle_post(&self->shuttle, POSTED_BY_SOCKET);
    Page_leave(self);
    return PyBool_FromLong(posted);
}

PyDoc_STRVAR(withdraw_doc,
"withdraw()\n--\n\n"
"Give up the call that was posted, for good.\n\n"
"Returns True if it was not run and never will be.");

static PyObject *
Page_withdraw(Page *self, PyObject *Py_UNUSED(none))
{
    bool withdrawn;
    if (Page_enter(self) != 0)
        return NULL;
    withdrawn = shuttle_withdraw(&self->shuttle);
    Page_leave(self);
    return PyBool_FromLong(withdrawn);
}

/* -- the server's methods -- */

/* A tuple of four; Py_BuildValue takes 0.1 us longer. */
static PyObject *
packed(PyObject *data, uint32_t manifest, uint64_t left, uint64_t sent)
{
    PyObject *tuple = PyTuple_New(4);
    PyObject *numbers[] = {PyLong_FromUnsignedLong(manifest), PyLong_FromUnsignedLongLong(left),
                           PyLong_FromUnsignedLongLong(sent)};

    if (tuple != NULL && numbers[0] != NULL && numbers[1] != NULL && numbers[2] != NULL) {
        PyTuple_SET_ITEM(tuple, 0, data);
        for (int i = 0; i < 3; i++)
            PyTuple_SET_ITEM(tuple, i + 1, numbers[i]);
        return tuple;
    }
    Py_XDECREF(tuple);
    Py_DECREF(data);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(numbers[i]);
    return NULL;
}

static PyObject *
Page_request(Page *self, enum outcome seen)
{
    struct shuttle *s = &self->shuttle;
    struct words *w = s->words;
    PyObject *data;
    uint32_t size, manifest;
    uint64_t left, sent;

    if (seen == FAULT)
        return Page_fault(self);
    if (seen != GOT)
        return PyLong_FromLong(seen);
    s->number++;
    size = atomic_load_explicit(&w->request_bytes, memory_order_relaxed);
    manifest = atomic_load_explicit(&w->request_manifest, memory_order_relaxed);
    left = atomic_load_explicit(&w->nanoseconds, memory_order_relaxed);
    sent = atomic_load_explicit(&w->sent, memory_order_relaxed);
    data = copied(s, w->request, size, manifest, REQUEST_ROOM);
    if (data == NULL && !PyErr_Occurred())
        return Page_fault(self);
    if (data == NULL)
        return NULL;
    return packed(data, manifest, left, sent);
}

PyDoc_STRVAR(linger_doc,
"linger(set)\n--\n\n"
"Look for the next request for a moment, as long as nothing is ready in an epoll set.\n\n"
"Returns:\n"
"    (bytes, manifest, nanoseconds, sent): a request, which is taken from here on: what is left for it,\n"
"    and when it was sent, by CLOCK_MONOTONIC; or one of the numbers\n"
"    NOTHING   none yet: park, and have the set watch the socket,\n"
"    BY_SOCKET look at the socket.\n\n"
"Raises:\n"
"    PageError: what stands in the page cannot be.");

static PyObject *
Page_linger(Page *self, PyObject *number)
{
    struct shuttle *s = &self->shuttle;
    enum outcome seen = NOTHING;
    PyObject *result;
    int64_t set, look, started;

    if (as_i64(number, &set) != 0 || Page_enter(self) != 0)
        return NULL;
    look = spin_time(s);
    Py_BEGIN_ALLOW_THREADS
    started = now_ns();
    if (look > 0)
        seen = look_for(s, look_for_request, is_elsewhere(&s->words->server_cpu, &s->words->client_cpu), look,
                        (int)set);
    if (seen == GOT && s->clock - started > TRUSTED_FOR && look_again(s) == FAULT)
        seen = FAULT;
    Py_END_ALLOW_THREADS
    result = Page_request(self, seen);
    Page_leave(self);
    return result;
}

PyDoc_STRVAR(take_doc,
"take()\n--\n\n"
"Take the next request after an event of the socket; as `linger`.");

static PyObject *
Page_take(Page *self, PyObject *Py_UNUSED(none))
{
    PyObject *result;
    if (Page_enter(self) != 0)
        return NULL;
    result = Page_request(self, shuttle_take(&self->shuttle));
    Page_leave(self);
    return result;
}

PyDoc_STRVAR(park_doc,
"park()\n--\n\n"
"Park.  Returns False if a request is there already, for which no bell will ring: have it taken.");

static PyObject *
Page_park(Page *self, PyObject *Py_UNUSED(none))
{
    struct shuttle *s = &self->shuttle;
    enum outcome seen;
    bool posted;

    if (Page_enter(self) != 0)
        return NULL;
    seen = park_server(s);
    posted = state_now(s) == state_of(s->number + 1, POSTED);
    Page_leave(self);
    return seen == FAULT ? Page_fault(self) : PyBool_FromLong(!posted);
}

PyDoc_STRVAR(accept_doc,
"accept()\n--\n\n"
"Take a request that has come over the socket, whole.\n\n"
"Returns False if the client has given it up, or never announced it.");

static PyObject *
Page_accept(Page *self, PyObject *Py_UNUSED(none))
{
    struct shuttle *s = &self->shuttle;
    uint64_t next;
    bool taken;

    if (Page_enter(self) != 0)
        return NULL;
    next = s->number + 1;
    taken = swap_state(s, state_of(next, POSTED_BY_SOCKET), state_of(next, TAKEN));
    if (taken)
        s->number = next;
    Page_leave(self);
    return PyBool_FromLong(taken);
}

PyDoc_STRVAR(answer_doc,
"answer(data, manifest)\n--\n\n"
"Answer the request that was taken.  Returns False if the bytes do not fit: nothing was done.");

static PyObject *
Page_answer(Page *self, PyObject *const *args, Py_ssize_t count)
{
    struct shuttle *s = &self->shuttle;
    uint32_t size, manifest;
    int fits;

    if (check_count("answer", count, 2) != 0 || as_u32(args[1], &manifest) != 0 || Page_enter(self) != 0)
        return NULL;
    fits = put(args[0], s->words->reply, REPLY_ROOM, &size);
    if (fits == 0) {
        atomic_store_explicit(&s->words->reply_bytes, size, memory_order_relaxed);
        atomic_store_explicit(&s->words->reply_manifest, manifest, memory_order_relaxed);
        shuttle_answer(s, ANSWERED);
        if (is_parked(&s->words->client_parked))
            Page_ring(self);
    }
    Page_leave(self);
    return fits < 0 ? NULL : PyBool_FromLong(fits == 0);
}

PyDoc_STRVAR(answer_by_socket_doc,
"answer_by_socket()\n--\n\n"
"Say that the answer goes over the socket, before its first byte does.");

static PyObject *
Page_answer_by_socket(Page *self, PyObject *Py_UNUSED(none))
{
    if (Page_enter(self) != 0)
        return NULL;
    shuttle_answer(&self->shuttle, ANSWERED_BY_SOCKET);
    Page_leave(self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(shut_doc,
"shut()\n--\n\n"
"Say that the server takes no further call, and that what is posted and not taken will not be run.\n\n"
"Harmless on a closed page.");

static PyObject *
Page_shut(Page *self, PyObject *Py_UNUSED(none))
{
    if (Page_enter(self) != 0) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError))
            return NULL;
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    atomic_fetch_or_explicit(&self->shuttle.words->state, CLOSED, memory_order_acq_rel);
    Page_leave(self);
    Py_RETURN_NONE;
}

/* -- both sides -- */

PyDoc_STRVAR(close_doc,
"close()\n--\n\n"
"Unmap the page, now or when the thread that uses it has left; idempotent, any thread.");

static PyObject *
Page_close(Page *self, PyObject *Py_UNUSED(none))
{
    atomic_store(&self->closing, 1);
#ifdef Py_GIL_DISABLED
    atomic_thread_fence(memory_order_seq_cst); /* pairs with the fence in Page_leave() */
#endif
    if (Page_claim(self))
        Page_leave(self);
    Py_RETURN_NONE;
}

static void
Page_dealloc(Page *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Page_unmap(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

PyDoc_STRVAR(page_doc,
"Page(memfd, socket, ucred, pidfd, spin)\n--\n\n"
"One end of the page of a channel.\n\n"
"Args:\n"
"    memfd: as `make_page` makes it; it stays the caller's, and may be closed.\n"
"    socket: the channel's, whose number must stay open as long as the page is used.\n"
"    ucred: of the other side, as the kernel gives it with each message.\n"
"    pidfd: of its process, or -1; as the socket, it must stay open.\n"
"    spin: nanoseconds that a wait looks before it parks; -1: as long as it is worth it.\n\n"
"Raises:\n"
"    PageError: it is no page.\n"
"    OSError: it cannot be mapped.");

static PyObject *
Page_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memfd", "socket", "ucred", "pidfd", "spin", NULL};
    int memfd, sock, pidfd;
    long long spin;
    const char *ucred, *objection;
    Py_ssize_t size;
    Page *self;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiy#iL:Page", names, &memfd, &sock, &ucred, &size, &pidfd, &spin))
        return NULL;
    if (size != sizeof(struct ucred)) {
        PyErr_SetString(PyExc_ValueError, "these are no credentials");
        return NULL;
    }
    objection = shuttle_objection(memfd);
    if (objection != NULL)
        return PyErr_Format(state_of_type(type)->page_error, "the shared page is no page: %s", objection);
    if (errno != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    self = (Page *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->process = this_process();
    self->shuttle.sock = sock;
    self->shuttle.pidfd = pidfd;
    self->shuttle.spin = spin < 0 ? -1 : spin;
    self->shuttle.budget = SPIN_MOST;
    memcpy(&self->shuttle.peer, ucred, sizeof(struct ucred));
    self->shuttle.words = shuttle_map(memfd);
    if (self->shuttle.words == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *
Page_number(Page *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->shuttle.number);
}

static PyObject *
Page_closed(Page *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&self->closing)); /* `words` is for who is inside */
}

static PyGetSetDef Page_fields[] = {
    {"number", (getter)Page_number, NULL, "The number of the call that is on, or was last.", NULL},
    {"closed", (getter)Page_closed, NULL, "Whether it was closed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef Page_methods[] = {
    {"post", FAST(Page_post), METH_FASTCALL, post_doc},
    {"wait", (PyCFunction)Page_wait, METH_O, wait_doc},
    {"announce", (PyCFunction)Page_announce, METH_NOARGS, announce_doc},
    {"withdraw", (PyCFunction)Page_withdraw, METH_NOARGS, withdraw_doc},
    {"linger", (PyCFunction)Page_linger, METH_O, linger_doc},
    {"take", (PyCFunction)Page_take, METH_NOARGS, take_doc},
    {"park", (PyCFunction)Page_park, METH_NOARGS, park_doc},
    {"accept", (PyCFunction)Page_accept, METH_NOARGS, accept_doc},
    {"answer", FAST(Page_answer), METH_FASTCALL, answer_doc},
    {"answer_by_socket", (PyCFunction)Page_answer_by_socket, METH_NOARGS, answer_by_socket_doc},
    {"shut", (PyCFunction)Page_shut, METH_NOARGS, shut_doc},
    {"close", (PyCFunction)Page_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Page_slots[] = {
    {Py_tp_doc, (void *)page_doc},
    {Py_tp_new, Page_new},
    {Py_tp_dealloc, Page_dealloc},
    {Py_tp_methods, Page_methods},
    {Py_tp_getset, Page_fields},
    {0, NULL},
};

static PyType_Spec Page_spec = {
    .name = "doorpool._shuttle.Page",
    .basicsize = sizeof(Page),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Page_slots,
};

/* -- the module -- */

/* Of _atoms.c, _batches.c and _keys.c, which are compiled into the same module. */
extern PyMethodDef doorpool_atoms_methods[], doorpool_batches_methods[], doorpool_keys_methods[];

PyDoc_STRVAR(make_page_doc,
"make_page()\n--\n\n"
"Make a page; return the descriptor of its memory, which is the caller's.\n\n"
"Raises:\n"
"    OSError: no memory, or no descriptor.");

static PyObject *
module_make_page(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    int fd = shuttle_make();
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

PyDoc_STRVAR(limit_cpus_doc,
"limit_cpus(count)\n--\n\n"
"Say how many CPUs this process may use at most, whatever its affinity allows.");

static PyObject *
module_limit_cpus(PyObject *Py_UNUSED(module), PyObject *number)
{
    long count = PyLong_AsLong(number);
    if (count == -1 && PyErr_Occurred())
        return NULL;
    atomic_store(&cpu_quota, count > INT_MAX ? INT_MAX : (int)count);
    atomic_store(&cpus_known_at, INT64_MIN / 2);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"make_page", module_make_page, METH_NOARGS, make_page_doc},
    {"limit_cpus", module_limit_cpus, METH_O, limit_cpus_doc},
    {NULL, NULL, 0, NULL},
};

static int
module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);

    if (make_mark() != 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    state->page_error = PyErr_NewExceptionWithDoc("doorpool._shuttle.PageError",
                                                  "What stands in a shared page cannot be.", NULL, NULL);
    if (PyModule_AddObjectRef(module, "PageError", state->page_error) != 0)
        return -1;
    state->page_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &Page_spec, NULL);
    if (PyModule_AddObjectRef(module, "Page", (PyObject *)state->page_type) != 0
        || PyModule_AddFunctions(module, doorpool_atoms_methods) != 0
        || PyModule_AddFunctions(module, doorpool_batches_methods) != 0
        || PyModule_AddFunctions(module, doorpool_keys_methods) != 0)
        return -1;
    if (PyModule_AddIntConstant(module, "NOTHING", NOTHING) != 0
        || PyModule_AddIntConstant(module, "BY_SOCKET", BY_SOCKET) != 0
        || PyModule_AddIntConstant(module, "SHUT", SHUT) != 0
        || PyModule_AddIntConstant(module, "TOO_LARGE", TOO_LARGE) != 0
        || PyModule_AddIntConstant(module, "PAGE_BYTES", PAGE_BYTES) != 0
        || PyModule_AddIntConstant(module, "ROOM", REQUEST_ROOM) != 0)
        return -1;
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->page_error);
    Py_VISIT(state->page_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->page_error);
    Py_CLEAR(state->page_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "doorpool._shuttle",
    .m_doc = "Calls by a page of memory that the two ends of a channel share.",
    .m_size = sizeof(State),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__shuttle(void)
{
    return PyModuleDef_Init(&module_definition);
}

#endif /* SHUTTLE_WITHOUT_PYTHON */
