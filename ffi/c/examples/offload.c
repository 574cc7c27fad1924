/*
 * Offloads blocks of an engine's paged memory into a node's tiers, and restores them: `offload FOLDER`.
 *
 * The engine has two layers. It computes four blocks, stores them, loses them, and fetches them back from host memory, which
 * has room for just these. Then the blocks of another prompt push them out to disk. The node is shut down and opened again, as
 * after a restart of the engine, and the first blocks come from disk. FOLDER is the node's disk tier.
 */
#define _POSIX_C_SOURCE 200809L
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfabric.h"

enum {
    LAYERS = 2,
    LAYER_BYTES = 4096,
    BLOCK_TOKENS = 16,
    PROMPT_BLOCKS = 4,
    PAGES_BLOCKS = 8,
    WAIT_MS = 20000,
};

/* Layer by layer, as engines have it: block b of layer l is at pool + (l * PAGES_BLOCKS + b) * LAYER_BYTES. */
static unsigned char *pool;

static int failed(const char *what)
{
    fprintf(stderr, "offload: %s: %s\n", what, kvf_last_error());
    return 0;
}

struct engine {
    kvf_node *node;
    kvf_agent *agent;
    kvf_region *region;
    kvf_pages *pages;
    kvf_prefix *prompt;
    kvf_prefix *other;
};

/* The blocks of a prompt whose tokens count up from the first. */
static int name_blocks(kvf_node *node, uint32_t first, kvf_prefix **prefix)
{
    uint32_t tokens[PROMPT_BLOCKS * BLOCK_TOKENS];
    for (uint32_t i = 0; i < PROMPT_BLOCKS * BLOCK_TOKENS; i++) {
        tokens[i] = first + i;
    }
    size_t blocks = 0;
    if (kvf_prefix_create(node, NULL, prefix) != KVF_OK
        || kvf_prefix_extend(*prefix, tokens, PROMPT_BLOCKS * BLOCK_TOKENS, &blocks) != KVF_OK
        || blocks != PROMPT_BLOCKS) {
        return failed("name the blocks of a prompt");
    }
    return 1;
}

static int open_node(struct engine *engine, const char *folder)
{
    /* What shapes the bytes: a block stored under another identity is never found under this one. */
    char identity[KVF_IDENTITY_CAPACITY];
    struct kvf_model_options model = {
        .size = sizeof model,
        .name = "example weights, version 1",
        .element = "bf16",
        .layout = "example/1",
    };
    if (kvf_model_identity(&model, identity) != KVF_OK) {
        return failed("name the model");
    }
    static const char *const toml = "pod = \"example\"\n"
                                    "model = \"example-model\"\n"
                                    "block_bytes = 8192\n"
                                    "block_tokens = 16\n"
                                    "[host]\n"
                                    "bytes = 32768\n"
                                    "[disk]\n"
                                    "bytes = 1048576\n"
                                    "segment_bytes = 131072\n";
    struct kvf_setting settings[] = {{"model_identity", identity}, {"disk.path", folder}};
    struct kvf_node_options options = {
        .size = sizeof options,
        .toml = toml,
        .settings = settings,
        .setting_count = sizeof settings / sizeof *settings,
    };
    if (kvf_node_open(&options, &engine->node) != KVF_OK) {
        return failed("open the node");
    }
    if (kvf_node_agent(engine->node, &engine->agent) != KVF_OK
        || kvf_region_register(engine->agent, pool, (uint64_t)LAYERS * PAGES_BLOCKS * LAYER_BYTES, 0,
                               &engine->region)
            != KVF_OK) {
        return failed("register the pool");
    }
    struct kvf_segment segments[LAYERS] = {{0}};
    for (int layer = 0; layer < LAYERS; layer++) {
        kvf_region_id(engine->region, &segments[layer].region);
        segments[layer].offset = (uint64_t)layer * PAGES_BLOCKS * LAYER_BYTES;
        segments[layer].stride = LAYER_BYTES;
        segments[layer].len = LAYER_BYTES;
    }
    if (kvf_pages_create(engine->node, segments, LAYERS, PAGES_BLOCKS, &engine->pages) != KVF_OK) {
        return failed("describe the pool");
    }
    return name_blocks(engine->node, 0, &engine->prompt) && name_blocks(engine->node, 1000, &engine->other);
}

static int close_node(struct engine *engine)
{
    kvf_task *flush = NULL;
    int good = (kvf_node_flush(engine->node, WAIT_MS, &flush) == KVF_OK && kvf_task_wait(flush, WAIT_MS) == KVF_OK)
        || failed("flush");
    kvf_task_free(flush);
    good = (kvf_node_shutdown(engine->node, WAIT_MS) == KVF_OK || failed("shut down")) && good;
    kvf_prefix_free(engine->prompt);
    kvf_prefix_free(engine->other);
    kvf_pages_free(engine->pages);
    /* Nothing is in flight after the shutdown, so that this cannot be KVF_BUSY. */
    good = (kvf_region_free(engine->region) == KVF_OK || failed("deregister the pool")) && good;
    kvf_agent_free(engine->agent);
    kvf_node_free(engine->node);
    return good;
}

/* Waits as an engine with an event loop would; kvf_task_wait does it in one call. */
static int finish(kvf_task *task)
{
    struct pollfd ready = {.events = POLLIN};
    kvf_task_state state = KVF_TASK_RUNNING;
    return kvf_task_eventfd(task, &ready.fd) == KVF_OK && poll(&ready, 1, WAIT_MS) == 1
        && kvf_task_poll(task, &state) == KVF_OK && state == KVF_TASK_DONE;
}

static unsigned char *page(int layer, int block)
{
    return pool + ((size_t)layer * PAGES_BLOCKS + (size_t)block) * LAYER_BYTES;
}

static void compute(void)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int block = 0; block < PROMPT_BLOCKS; block++) {
            memset(page(layer, block), 16 * (layer + 1) + block, LAYER_BYTES);
        }
    }
}

static int store(struct engine *engine, kvf_prefix *prompt)
{
    const uint32_t numbers[PROMPT_BLOCKS] = {0, 1, 2, 3};
    kvf_task *task = NULL;
    struct kvf_store_report report = {.size = sizeof report};
    if (kvf_node_store(engine->node, prompt, 0, engine->pages, numbers, PROMPT_BLOCKS, 0, &task) != KVF_OK) {
        return failed("store");
    }
    int good = finish(task) && kvf_task_store_report(task, &report) == KVF_OK;
    kvf_task_free(task);
    if (!good) {
        return failed("store");
    }
    printf("stored %u blocks\n", report.stored);
    return report.stored == PROMPT_BLOCKS;
}

/* Fetches into the other half of the pool, in reverse order, and compares. */
static int restore(struct engine *engine, uint32_t source)
{
    const uint32_t numbers[PROMPT_BLOCKS] = {7, 6, 5, 4};
    memset(pool, 0, (size_t)LAYERS * PAGES_BLOCKS * LAYER_BYTES);
    kvf_task *task = NULL;
    struct kvf_fetch_report report = {.size = sizeof report};
    if (kvf_node_fetch(engine->node, engine->prompt, 0, engine->pages, numbers, PROMPT_BLOCKS, NULL, &task) != KVF_OK) {
        return failed("fetch");
    }
    uint32_t sources[PROMPT_BLOCKS];
    size_t count = 0;
    int good = finish(task) && kvf_task_fetch_report(task, &report) == KVF_OK
        && kvf_task_sources(task, sources, PROMPT_BLOCKS, &count) == KVF_OK;
    kvf_task_free(task);
    if (!good || count != PROMPT_BLOCKS) {
        return failed("fetch");
    }
    printf("fetched %u blocks from source %u\n", report.depth, sources[0]);
    for (int block = 0; block < PROMPT_BLOCKS; block++) {
        for (int layer = 0; layer < LAYERS; layer++) {
            const unsigned char *bytes = page(layer, (int)numbers[block]);
            for (int i = 0; i < LAYER_BYTES; i++) {
                if (bytes[i] != 16 * (layer + 1) + block) {
                    fprintf(stderr, "offload: byte %d of block %d, layer %d is %u\n", i, block, layer, bytes[i]);
                    return 0;
                }
            }
        }
        good = good && sources[block] == source;
    }
    return good && report.depth == PROMPT_BLOCKS && report.unsettled == 0;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: offload FOLDER\n");
        return 2;
    }
    pool = calloc((size_t)LAYERS * PAGES_BLOCKS, LAYER_BYTES);
    if (pool == NULL) {
        return 1;
    }
    struct engine engine = {0};
    int good = open_node(&engine, argv[1]);
    if (good) {
        compute();
        good = store(&engine, engine.prompt) && restore(&engine, KVF_SOURCE_HOST) && store(&engine, engine.other);
        good = close_node(&engine) && good;
    }
    if (good && open_node(&engine, argv[1])) {
        good = restore(&engine, KVF_SOURCE_DISK);
        good = close_node(&engine) && good;
    }
    free(pool);
    puts(good ? "all bytes came back" : "failed");
    return good ? 0 : 1;
}
