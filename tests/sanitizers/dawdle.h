/*
 * A delay at each step of the hand-off, for handoff.c: before each look at a word that is shared, each change
 * of one, each fence, and each call that waits, hears or rings.  By a dice it is nothing, mostly, or a yield,
 * or a sleep, after which the other side may be several steps further on.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>

static _Thread_local uint64_t dice;

static inline void
dawdle(void)
{
    static _Atomic uint64_t seeds = 88172645463325252U;

    if (dice == 0)
        dice = atomic_fetch_add(&seeds, 1442695040888963407U);
    dice ^= dice << 13; /* xorshift64 */
    dice ^= dice >> 7;
    dice ^= dice << 17;
    switch (dice >> 32 & 255) {
    case 0:
        nanosleep(&(struct timespec){0, (long)(dice & 0xffff)}, NULL); /* up to 66 us, and what it takes to wake */
        break;
    case 1:
    case 2:
    case 3:
        sched_yield();
    }
}

#undef atomic_thread_fence
#define atomic_thread_fence(order) (dawdle(), __atomic_thread_fence(order), dawdle())
#ifndef __clang__ /* where these take no atomics, the fences and the calls must do */
#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_exchange_explicit
#undef atomic_compare_exchange_strong_explicit
#define atomic_load_explicit(at, order) (dawdle(), __atomic_load_n(at, order))
#define atomic_store_explicit(at, value, order) (dawdle(), __atomic_store_n(at, value, order))
#define atomic_exchange_explicit(at, value, order) (dawdle(), __atomic_exchange_n(at, value, order))
#define atomic_compare_exchange_strong_explicit(at, was, value, order, failing) \
    (dawdle(), __atomic_compare_exchange_n(at, was, value, 0, order, failing))
#endif
#define poll(...) (dawdle(), poll(__VA_ARGS__))
#define ppoll(...) (dawdle(), ppoll(__VA_ARGS__))
#define recvmsg(...) (dawdle(), recvmsg(__VA_ARGS__))
#define send(...) (dawdle(), send(__VA_ARGS__))
