/*
 * What a call to a node costs from C: a store and a fetch of blocks in host memory.
 *
 * The work is that of benches/src/engines/overhead.rs, which says what the figures mean, and of overhead.py, call by call:
 * some calls for each line of its input, answered by figures, which are lines of JSON as in figures.py, and an empty line.
 */
#define _POSIX_C_SOURCE 200809L

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kvfabric.h"

enum {
    BLOCK_BYTES = 4096,
    BLOCK_TOKENS = 16,
    CALLS = 50,
    WARM_UP_CALLS = 10,
    BATCH_MAX = 64,
    PATIENCE_MS = 30000
};

static const char CONFIG[] =
    "pod = 'overhead'\n"
    "model = 'overhead'\n"
    "model_identity = '0000000000000000000000000000000000000000000000000000000000000000'\n"
    "block_bytes = 4096\n"
    "block_tokens = 16\n"
    "peer_listen = 'off'\n"
    "[host]\n"
    "bytes = 67108864\n"
    "[fabric]\n"
    "tcp_listen = 'off'\n";

static void check(kvf_status status, const char *what)
{
    if (status != KVF_OK) {
        fprintf(stderr, "overhead: %s: %s (%s)\n", what, kvf_last_error(), kvf_status_name(status));
        exit(1);
    }
}

static double now_us(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The times of one kind of calls, in microseconds. */
struct times {
    double whole[CALLS], own[CALLS], cpu[CALLS];
};

static void tell_median(const char *name, uint32_t batch, const char *metric, double *samples)
{
    qsort(samples, CALLS, sizeof *samples, compare);
    double middle = (samples[CALLS / 2 - 1] + samples[CALLS / 2]) / 2;
    printf("{\"subject\": \"c\", \"case\": \"%s-%u\", \"metric\": \"%s\", \"unit\": \"\\u00b5s\", \"samples\": [%.4f]}\n",
           name, (unsigned)batch, metric, middle);
}

static void tell(const char *name, uint32_t batch, struct times *times)
{
    tell_median(name, batch, "us_per_call", times->whole);
    tell_median(name, batch, "own_us_per_call", times->own);
    tell_median(name, batch, "cpu_us_per_call", times->cpu);
}

enum kind { STORE, FETCH };

/* What a call is made with. */
struct call {
    kvf_node *node;
    kvf_pages *pages;
    kvf_prefix *prefix;
    const uint32_t *blocks;
    uint32_t batch;
};

static kvf_task *begin(const struct call *call, enum kind kind)
{
    kvf_task *task;
    if (kind == STORE)
        check(kvf_node_store(call->node, call->prefix, 0, call->pages, call->blocks, call->batch, PATIENCE_MS, &task), "store");
    else
        check(kvf_node_fetch(call->node, call->prefix, 0, call->pages, call->blocks, call->batch, NULL, &task), "fetch");
    return task;
}

/* How many blocks were moved. */
static uint32_t finish(kvf_task *task, enum kind kind)
{
    kvf_store_report stored = {.size = sizeof stored};
    kvf_fetch_report fetched = {.size = sizeof fetched};
    check(kvf_task_wait(task, PATIENCE_MS), "wait");
    if (kind == STORE)
        check(kvf_task_store_report(task, &stored), "read a report");
    else
        check(kvf_task_fetch_report(task, &fetched), "read a report");
    check(kvf_task_free(task), "free a task");
    return kind == STORE ? stored.stored : fetched.depth;
}

/* Makes a call and notes its times: of the whole, or of what this thread does itself. */
static void make(const struct call *call, enum kind kind, int is_whole, struct times *times, uint32_t number)
{
    double cpu = now_us(CLOCK_PROCESS_CPUTIME_ID);
    double start = now_us(CLOCK_MONOTONIC);
    kvf_task *task = begin(call, kind);
    double begun = now_us(CLOCK_MONOTONIC), over = begun;
    if (!is_whole) {
        check(kvf_task_wait(task, PATIENCE_MS), "wait");
        over = now_us(CLOCK_MONOTONIC);
    }
    uint32_t moved = finish(task, kind);
    double end = now_us(CLOCK_MONOTONIC);
    if (is_whole) {
        times->whole[number] = end - start;
        times->cpu[number] = now_us(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    } else {
        times->own[number] = begun - start + end - over;
    }
    if (moved != call->batch) {
        fprintf(stderr, "overhead: of %u blocks %u were moved\n", call->batch, moved);
        exit(1);
    }
}

/* Stores and fetches the blocks of a prompt that no other call has. */
static void store_and_fetch(struct call *call, uint32_t prompt, int is_whole, struct times times[2], uint32_t number)
{
    uint32_t tokens[BATCH_MAX * BLOCK_TOKENS];
    for (uint32_t i = 0; i < call->batch * BLOCK_TOKENS; i++)
        tokens[i] = prompt;
    check(kvf_prefix_create(call->node, NULL, &call->prefix), "make a prefix");
    check(kvf_prefix_extend(call->prefix, tokens, call->batch * BLOCK_TOKENS, NULL), "extend it");
    make(call, STORE, is_whole, &times[STORE], number);
    make(call, FETCH, is_whole, &times[FETCH], number);
    check(kvf_prefix_free(call->prefix), "free a prefix");
}

static void measure(kvf_node *node, kvf_pages *pages, uint32_t batch, uint32_t *prompt)
{
    static struct times times[2];
    uint32_t blocks[BATCH_MAX];
    for (uint32_t i = 0; i < batch; i++)
        blocks[i] = i;
    struct call call = {.node = node, .pages = pages, .blocks = blocks, .batch = batch};
    for (uint32_t number = 0; number < WARM_UP_CALLS; number++)
        store_and_fetch(&call, (*prompt)++, 1, times, number);
    for (uint32_t number = 0; number < CALLS; number++) {
        store_and_fetch(&call, (*prompt)++, 1, times, number);
        store_and_fetch(&call, (*prompt)++, 0, times, number);
    }
    tell("store", batch, &times[STORE]);
    tell("fetch", batch, &times[FETCH]);
}

int main(void)
{
    static const uint32_t batches[] = {1, BATCH_MAX};
    kvf_node_options options = {.size = sizeof options, .toml = CONFIG};
    kvf_node *node;
    kvf_agent *agent;
    kvf_region *region;
    kvf_pages *pages;
    check(kvf_node_open(&options, &node), "open a node");
    check(kvf_node_agent(node, &agent), "find its agent");
    check(kvf_region_allocate(agent, (uint64_t)BATCH_MAX * BLOCK_BYTES, 0, &region), "allocate memory");
    kvf_segment segment = {.offset = 0, .stride = BLOCK_BYTES, .len = BLOCK_BYTES};
    check(kvf_region_id(region, &segment.region), "name the region");
    check(kvf_pages_create(node, &segment, 1, BATCH_MAX, &pages), "describe the blocks");

    uint32_t prompt = 0;
    for (int asked = getchar(); asked != EOF; asked = getchar()) {
        for (size_t at = 0; at < sizeof batches / sizeof *batches; at++)
            measure(node, pages, batches[at], &prompt);
        puts("");
        fflush(stdout);
    }

    check(kvf_node_shutdown(node, PATIENCE_MS), "shut the node down");
    check(kvf_pages_free(pages), "free the pages");
    check(kvf_region_deregister(region, PATIENCE_MS), "deregister the memory");
    check(kvf_region_free(region), "free the region");
    check(kvf_agent_free(agent), "free the agent");
    check(kvf_node_free(node), "free the node");
    return 0;
}
