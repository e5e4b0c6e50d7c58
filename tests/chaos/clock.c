/* A machine whose clock is off: preloaded into its processes, adds $CLOCK_SKEW seconds to what they are told of the wall clock, and takes
   them off again where they wait until a time of that clock: the kernel's own is right, and would let them wait as much longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static time_t skew(void) {
    const char *text = getenv("CLOCK_SKEW");
    return text ? (time_t)atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += skew();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}

/* Condition variables may go by the monotonic clock, whose seconds count from a machine's start. */
static const time_t WALL = 1000000000;

static const struct timespec *kernel(const struct timespec *until, struct timespec *there) {
    *there = *until;
    if (until->tv_sec > WALL) there->tv_sec -= skew();
    return there;
}

/* A plain dlsym may find the version of before 2002, whose condition variables are others. */
static void *next(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec there;
    if (!real) real = next("pthread_cond_timedwait");
    return real(condition, mutex, kernel(until, &there));
}

int pthread_cond_clockwait(
    pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, clockid_t clock, const struct timespec *restrict until
) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec there;
    if (!real) real = next("pthread_cond_clockwait");
    return real(condition, mutex, clock, kernel(until, &there));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec there;
    if (!real) real = next("sem_timedwait");
    return real(semaphore, kernel(until, &there));
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict until) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    struct timespec there;
    if (!real) real = next("sem_clockwait");
    return real(semaphore, clock, kernel(until, &there));
}
