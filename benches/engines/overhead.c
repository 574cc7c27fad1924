/*
 * What a call to a node costs from C: a store and a fetch of blocks in host memory.
 *
 * The work is that of benches/src/engines/overhead.rs and of overhead.py, call by call: some calls for each line of its
 * input, answered by figures, which are lines of JSON as in figures.py, and an empty line.
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

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void tell(const char *name, uint32_t batch, double *samples)
{
    qsort(samples, CALLS, sizeof *samples, compare);
    double middle = (samples[CALLS / 2 - 1] + samples[CALLS / 2]) / 2;
    printf("{\"subject\": \"c\", \"case\": \"%s-%u\", \"metric\": \"us_per_call\", \"unit\": \"\\u00b5s\", \"samples\": [%.4f]}\n",
           name, (unsigned)batch, middle);
}

/* Stores and fetches `batch` blocks of a prompt that no other call has, and adds the times of both. */
static void call(kvf_node *node, kvf_pages *pages, uint32_t batch, uint32_t prompt, double *store_us, double *fetch_us)
{
    uint32_t tokens[BATCH_MAX * BLOCK_TOKENS], blocks[BATCH_MAX];
    for (uint32_t i = 0; i < batch * BLOCK_TOKENS; i++)
        tokens[i] = prompt;
    for (uint32_t i = 0; i < batch; i++)
        blocks[i] = i;
    kvf_prefix *prefix;
    check(kvf_prefix_create(node, NULL, &prefix), "make a prefix");
    check(kvf_prefix_extend(prefix, tokens, batch * BLOCK_TOKENS, NULL), "extend it");

    kvf_task *task;
    kvf_store_report stored = {.size = sizeof stored};
    double begin = now_us();
    check(kvf_node_store(node, prefix, 0, pages, blocks, batch, PATIENCE_MS, &task), "store");
    check(kvf_task_wait(task, PATIENCE_MS), "store");
    check(kvf_task_store_report(task, &stored), "store");
    check(kvf_task_free(task), "free a task");
    double between = now_us();
    kvf_fetch_report fetched = {.size = sizeof fetched};
    check(kvf_node_fetch(node, prefix, 0, pages, blocks, batch, NULL, &task), "fetch");
    check(kvf_task_wait(task, PATIENCE_MS), "fetch");
    check(kvf_task_fetch_report(task, &fetched), "fetch");
    check(kvf_task_free(task), "free a task");
    *fetch_us = now_us() - between;
    *store_us = between - begin;

    if (stored.stored != batch || fetched.depth != batch) {
        fprintf(stderr, "overhead: of %u blocks %u were stored and %u fetched\n", batch, stored.stored, fetched.depth);
        exit(1);
    }
    check(kvf_prefix_free(prefix), "free a prefix");
}

static void measure(kvf_node *node, kvf_pages *pages, uint32_t batch, uint32_t *prompt)
{
    static double stores[CALLS], fetches[CALLS];
    double store_us, fetch_us;
    for (uint32_t number = 0; number < WARM_UP_CALLS + CALLS; number++) {
        call(node, pages, batch, (*prompt)++, &store_us, &fetch_us);
        if (number >= WARM_UP_CALLS) {
            stores[number - WARM_UP_CALLS] = store_us;
            fetches[number - WARM_UP_CALLS] = fetch_us;
        }
    }
    tell("store", batch, stores);
    tell("fetch", batch, fetches);
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
