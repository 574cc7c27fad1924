/* Runs kernels on the processor, for tests: a thread of the system for each of a block's, so that those of a warp can wait for each other. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define KERNEL static void
#define INLINE static inline

typedef struct {
    unsigned x, y, z;
} uint3;

typedef struct {
    unsigned x, y, z, w;
} __attribute__((aligned(16))) uint4;

static __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

static inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What a warp's threads show each other. */
struct warp_state {
    pthread_barrier_t barrier;
    unsigned shown[32];
};

static __thread struct warp_state *own_warp;

static inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int other)
{
    (void)mask;
    unsigned own = threadIdx.x % 32;
    own_warp->shown[own] = value;
    pthread_barrier_wait(&own_warp->barrier);
    unsigned seen = own_warp->shown[own ^ (unsigned)other];
    pthread_barrier_wait(&own_warp->barrier);
    return seen;
}

static inline unsigned atomicXor(unsigned *at, unsigned value) { return __atomic_fetch_xor(at, value, __ATOMIC_RELAXED); }

/* A kernel with its arguments. */
typedef void (*kvf_call)(void **arguments);

struct kvf_thread {
    kvf_call call;
    void **arguments;
    unsigned index, block, threads, blocks;
    struct warp_state *warp;
};

static void *kvf_thread_main(void *given)
{
    struct kvf_thread *own = given;
    threadIdx.x = own->index;
    blockIdx.x = own->block;
    blockDim.x = own->threads;
    gridDim.x = own->blocks;
    own_warp = own->warp;
    own->call(own->arguments);
    return NULL;
}

/* Runs blocks one after the other; 0, or what went wrong. `threads` is a multiple of 32, up to 256. */
static int kvf_launch(kvf_call call, unsigned blocks, unsigned threads, void **arguments)
{
    static struct kvf_thread given[256];
    static pthread_t started[256];
    static struct warp_state warps[8];
    if (threads == 0 || threads > 256 || threads % 32 != 0)
        return 1;
    for (unsigned block = 0; block < blocks; block++) {
        for (unsigned warp = 0; warp < threads / 32; warp++)
            if (pthread_barrier_init(&warps[warp].barrier, NULL, 32) != 0)
                return 2;
        for (unsigned index = 0; index < threads; index++) {
            struct kvf_thread one = {call, arguments, index, block, threads, blocks, &warps[index / 32]};
            given[index] = one;
            if (pthread_create(&started[index], NULL, kvf_thread_main, &given[index]) != 0)
                abort();
        }
        for (unsigned index = 0; index < threads; index++)
            pthread_join(started[index], NULL);
        for (unsigned warp = 0; warp < threads / 32; warp++)
            pthread_barrier_destroy(&warps[warp].barrier);
    }
    return 0;
}
