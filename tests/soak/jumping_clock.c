/* Preloaded, it sets the wall clock of a process by JUMP_SECONDS, once it is JUMP_AFTER seconds old. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static int (*real)(clockid_t, struct timespec *);
static struct timespec began;
static double after;
static time_t jump;

__attribute__((constructor)) static void begin(void) {
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    after = atof(getenv("JUMP_AFTER"));
    jump = atoll(getenv("JUMP_SECONDS"));
    real(CLOCK_MONOTONIC, &began);
}

int clock_gettime(clockid_t clock, struct timespec *found) {
    if (!real) begin();
    int status = real(clock, found);
    if (status == 0 && clock == CLOCK_REALTIME) {
        struct timespec now;
        real(CLOCK_MONOTONIC, &now);
        double age = now.tv_sec - began.tv_sec + (now.tv_nsec - began.tv_nsec) / 1e9;
        if (age >= after) found->tv_sec += jump;
    }
    return status;
}

int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    int status = clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return status;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
