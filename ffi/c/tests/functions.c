/*
 * What the library does when it is used as meant, beyond what the examples show: `functions [INDEX | FOLDER]`, where INDEX is
 * the "HOST:PORT" of an index without pods, and FOLDER an empty folder for a disk.
 */
#define _POSIX_C_SOURCE 200809L
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>

#include "expect.h"

#define IDENTITY "abababababababababababababababababababababababababababababababab"

enum {
    WAIT_MS = 20000,
    BLOCK_BYTES = 4096,
    BLOCK_TOKENS = 4,
    BLOCKS = 8,
    LOOKUPS_MAX = 100000,
};

static int is_readable(int fd, int timeout_ms)
{
    struct pollfd polled = {.fd = fd, .events = POLLIN};
    return poll(&polled, 1, timeout_ms) == 1;
}

static void write_all(kvf_agent *agent, kvf_list *local, kvf_list *remote, const uint32_t *from, const uint32_t *to,
                      size_t count, kvf_transfer **transfer)
{
    struct kvf_transfer_options options = {.size = sizeof options, .operation = KVF_WRITE};
    EXPECT_STATUS(KVF_OK, kvf_transfer_create_prepared(agent, local, remote, from, to, count, &options, transfer));
}

/* A pool and a range in it are one region; its memory is free when both are given back. */
static void ranges_share_a_region(void)
{
    struct kvf_agent_options options = {.size = sizeof options, .name = "pooled"};
    kvf_agent *agent = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    static unsigned char pool[8192];
    kvf_range *whole = NULL, *part = NULL, *beside = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_range_register(agent, NULL, 64, 0, &whole));
    EXPECT_STATUS(KVF_INVALID, kvf_range_register(agent, pool, 64, 4, &whole));
    EXPECT_STATUS(KVF_OK, kvf_range_register(agent, pool, 4096, 0, &whole));
    EXPECT_STATUS(KVF_OK, kvf_range_register(agent, pool + 1024, 64, 0, &part));
    EXPECT_STATUS(KVF_OK, kvf_range_register(agent, pool + 4096, 4096, 0, &beside));
    uint64_t region = 0, same = 0, other = 0, offset = 0;
    EXPECT_STATUS(KVF_OK, kvf_range_place(whole, &region, &offset));
    EXPECT(offset == 0);
    EXPECT_STATUS(KVF_OK, kvf_range_place(part, &same, &offset));
    EXPECT(same == region && offset == 1024);
    EXPECT_STATUS(KVF_OK, kvf_range_place(beside, &other, &offset));
    EXPECT(other != region && offset == 0);
    EXPECT_STATUS(KVF_INVALID, kvf_range_place(part, &same, NULL));

    memset(pool + 1024, 7, 64);
    struct kvf_descriptor to = {other, 64, 64}, from = {region, 1024, 64};
    struct kvf_transfer_options copy = {.size = sizeof copy, .operation = KVF_READ};
    kvf_transfer *transfer = NULL;
    EXPECT_STATUS(KVF_OK, kvf_transfer_create(agent, NULL, &to, &from, 1, &copy, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_assume_cost(agent, "memcpy", 5, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_assume_cost(agent, "pigeon", 5, 1));
    EXPECT_STATUS(KVF_OK, kvf_agent_assume_cost(agent, "memcpy", 5000000000, 64));
    struct kvf_estimate estimate = {.size = sizeof estimate};
    EXPECT_STATUS(KVF_OK, kvf_transfer_estimate(transfer, &estimate));
    EXPECT(estimate.expected_ns == 6000000000 && estimate.measured == 0);
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(transfer));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(transfer, WAIT_MS));
    EXPECT(pool[4096 + 64] == 7 && pool[4096 + 127] == 7 && pool[4096 + 128] == 0);
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(transfer));

    EXPECT_STATUS(KVF_BUSY, kvf_range_deregister(whole, 0));
    EXPECT_STATUS(KVF_BUSY, kvf_range_free(whole));
    EXPECT_STATUS(KVF_OK, kvf_range_free(part));
    EXPECT_STATUS(KVF_OK, kvf_range_deregister(whole, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_range_free(whole));
    EXPECT_STATUS(KVF_OK, kvf_range_free(beside));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

/* The ways that are wanted, the checksums of what arrives, what it is expected to take, and metadata of some regions. */
static void transfers_are_checked_and_estimated(void)
{
    struct kvf_agent_options options = {.size = sizeof options, .name = "choosy", .shm = 1, .prefer = "tcp"};
    kvf_agent *agent = NULL, *other = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.tcp_listen = "127.0.0.1:0";
    options.tcp_congestion = "no such control";
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_agent_create(&options, &agent));
    options.tcp_congestion = "reno";
    options.copy_threads = 17;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.copy_threads = 2;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    options.name = "owner";
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &other));
    kvf_region *local = NULL, *shown = NULL, *hidden = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 4096, 0, &local));
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(other, 4096, KVF_ACCESS_REMOTE_READ, &shown));
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(other, 4096, KVF_ACCESS_REMOTE_READ, &hidden));
    uint64_t id = 0, shown_id = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_id(local, &id));
    EXPECT_STATUS(KVF_OK, kvf_region_id(shown, &shown_id));

    unsigned char card[4096];
    size_t len = 0, count = 0;
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_agent_metadata_of(other, &id, 1, card, sizeof card, &len));
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata_of(other, &shown_id, 1, card, sizeof card, &len));
    kvf_peer *peer = NULL;
    EXPECT_STATUS(KVF_OK, kvf_peer_load(agent, card, len, &peer));
    struct kvf_remote_region region = {0};
    EXPECT_STATUS(KVF_OK, kvf_peer_regions(peer, &region, 1, &count));
    EXPECT(count == 1 && region.id == shown_id);

    /* Two ranges for one place: one of them does not find its bytes there. */
    unsigned char *from = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_base(shown, (void **)&from));
    memset(from, 1, 64);
    struct kvf_descriptor own[] = {{id, 0, 64}, {id, 64, 64}}, theirs[] = {{shown_id, 0, 64}, {shown_id, 64, 64}};
    struct kvf_transfer_options wanted = {.size = sizeof wanted, .operation = KVF_READ, .checksum = 2};
    kvf_transfer *whole = NULL, *torn = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, peer, own, theirs, 2, &wanted, &whole));
    wanted.checksum = 1;
    wanted.backends = "ucx";
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, peer, own, theirs, 2, &wanted, &whole));
    wanted.backends = "memcpy";
    EXPECT_STATUS(KVF_OK, kvf_transfer_create(agent, peer, own, theirs, 2, &wanted, &whole));
    own[1].offset = 0;
    EXPECT_STATUS(KVF_OK, kvf_transfer_create(agent, peer, own, theirs, 2, &wanted, &torn));
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(whole));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(whole, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(torn));
    EXPECT_STATUS(KVF_CORRUPT, kvf_transfer_wait(torn, WAIT_MS));
    EXPECT(strstr(kvf_last_error(), "descriptor 0") != NULL);
    struct kvf_telemetry telemetry = {.size = sizeof telemetry};
    EXPECT_STATUS(KVF_OK, kvf_transfer_telemetry(whole, &telemetry));
    EXPECT(telemetry.failovers == 0 && strcmp(telemetry.path, "memcpy") == 0);

    struct kvf_estimate estimate = {.size = sizeof estimate};
    EXPECT_STATUS(KVF_OK, kvf_transfer_estimate(whole, &estimate));
    EXPECT(strcmp(estimate.path, "memcpy") == 0 && estimate.expected_ns > 0);
    char path[512];
    EXPECT_STATUS(KVF_OK, kvf_transfer_path(whole, path, sizeof path, &len));
    EXPECT(strncmp(path, "memcpy", 6) == 0 && strstr(path, "not tcp: the request wants other backends") != NULL);

    EXPECT_STATUS(KVF_OK, kvf_transfer_free(whole));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(torn));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(peer));
    /* The peer lets go of it in its own time. */
    EXPECT_STATUS(KVF_OK, kvf_region_deregister(shown, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_region_free(local));
    EXPECT_STATUS(KVF_OK, kvf_region_free(shown));
    EXPECT_STATUS(KVF_OK, kvf_region_free(hidden));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(other));
}

/* One agent is its own peer. */
static void transfers_from_prepared_lists(void)
{
    struct kvf_agent_options options = {.size = sizeof options, .name = "prepared", .shm = 1};
    kvf_agent *agent = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    kvf_region *source = NULL, *target = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 4096, 0, &source));
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 4096, KVF_ACCESS_REMOTE_WRITE, &target));
    unsigned char *from = NULL, *to = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_base(source, (void **)&from));
    EXPECT_STATUS(KVF_OK, kvf_region_base(target, (void **)&to));
    for (int i = 0; i < 4096; i++) {
        from[i] = (unsigned char)(i / 64);
    }

    unsigned char card[4096];
    size_t len = 0;
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata(agent, card, sizeof card, &len));
    kvf_peer *peer = NULL;
    EXPECT_STATUS(KVF_OK, kvf_peer_load(agent, card, len, &peer));
    char name[64] = "";
    EXPECT_STATUS(KVF_OK, kvf_peer_name(peer, name, sizeof name, &len));
    EXPECT(strcmp(name, "prepared") == 0 && len == sizeof "prepared");
    struct kvf_remote_region region = {0};
    size_t count = 0;
    EXPECT_STATUS(KVF_OK, kvf_peer_regions(peer, NULL, 0, &count));
    EXPECT(count == 1);
    EXPECT_STATUS(KVF_OK, kvf_peer_regions(peer, &region, 1, &count));
    uint64_t id = 0, target_id = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_id(source, &id));
    EXPECT_STATUS(KVF_OK, kvf_region_id(target, &target_id));
    EXPECT(region.id == target_id && region.len == 4096);

    /* Every second 64 bytes of the source, into 64 bytes one after the other; one list plain, one strided. */
    struct kvf_strided every_second = {.region = id, .offset = 64, .len = 64, .stride = 128, .count = 32};
    struct kvf_descriptor dense[32];
    for (uint64_t i = 0; i < 32; i++) {
        dense[i] = (struct kvf_descriptor){target_id, i * 64, 64};
    }
    kvf_list *local = NULL, *remote = NULL;
    EXPECT_STATUS(KVF_OK, kvf_list_create_strided(agent, NULL, &every_second, 1, &local));
    EXPECT_STATUS(KVF_OK, kvf_list_create(agent, peer, dense, 32, &remote));
    EXPECT_STATUS(KVF_OK, kvf_list_len(local, &count));
    EXPECT(count == 32);
    kvf_transfer *all = NULL, *some = NULL;
    write_all(agent, local, remote, NULL, NULL, 0, &all);
    const uint32_t positions[2][3] = {{31, 0, 5}, {0, 1, 2}};
    write_all(agent, local, remote, positions[0], positions[1], 3, &some);
    const uint32_t parts[] = {16, 16}, wrong[] = {16, 17};
    struct kvf_transfer_options layered = {
        .size = sizeof layered, .operation = KVF_WRITE, .parts = wrong, .part_count = 2, .priority = KVF_BACKGROUND};
    kvf_transfer *layers = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(agent, local, remote, NULL, NULL, 0, &layered, &layers));
    layered.parts = parts;
    layered.priority = 2;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(agent, local, remote, NULL, NULL, 0, &layered, &layers));
    layered.priority = KVF_BACKGROUND;
    EXPECT_STATUS(KVF_OK, kvf_transfer_create_prepared(agent, local, remote, NULL, NULL, 0, &layered, &layers));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_wait_part(layers, 0, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(layers));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait_part(layers, 0, WAIT_MS));
    EXPECT(to[0] == 1 && to[15 * 64] == 31);
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait_part(layers, 1, WAIT_MS));
    EXPECT(to[31 * 64] == 63);
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_wait_part(layers, 2, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(layers, WAIT_MS));
    /* One byte a second: the first goes on credit, the second has to wait for it. */
    EXPECT_STATUS(KVF_OK, kvf_agent_set_rate(agent, NULL, KVF_BACKGROUND, 1));
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(layers));
    kvf_state state = KVF_IDLE;
    EXPECT_STATUS(KVF_OK, kvf_transfer_poll(layers, &state));
    EXPECT(state == KVF_IN_FLIGHT);
    EXPECT_STATUS(KVF_OK, kvf_agent_set_rate(agent, NULL, KVF_BACKGROUND, 0));
    EXPECT_STATUS(KVF_OK, kvf_agent_set_rate(agent, peer, 0, 1 << 30));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_set_rate(agent, NULL, 2, 0));
    EXPECT_STATUS(KVF_OK, kvf_transfer_cancel(layers));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(layers));
    memset(to, 0, 4096);
    /* The transfers keep what they need. */
    EXPECT_STATUS(KVF_OK, kvf_list_free(local));
    EXPECT_STATUS(KVF_OK, kvf_list_free(remote));

    struct kvf_telemetry telemetry = {.size = sizeof telemetry};
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_transfer_telemetry(all, &telemetry));
    int done = -1, arrived = -1;
    EXPECT_STATUS(KVF_OK, kvf_transfer_eventfd(all, &done));
    EXPECT_STATUS(KVF_OK, kvf_agent_eventfd(agent, &arrived));
    EXPECT(!is_readable(done, 0) && !is_readable(arrived, 0));
    EXPECT_STATUS(KVF_OK, kvf_transfer_repost(all, "first", 5));
    EXPECT(is_readable(done, WAIT_MS) && is_readable(arrived, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(all, 0));
    EXPECT(to[0] == 1 && to[63] == 1 && to[64] == 3 && to[31 * 64] == 63);
    EXPECT_STATUS(KVF_OK, kvf_transfer_repost(all, "second", 6));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(all, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_transfer_repost(all, NULL, 0));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(all, WAIT_MS));
    char message[16];
    EXPECT_STATUS(KVF_OK, kvf_agent_receive(agent, WAIT_MS, name, sizeof name, message, sizeof message, &len));
    EXPECT(len == 5 && memcmp(message, "first", 5) == 0);
    EXPECT_STATUS(KVF_OK, kvf_agent_receive(agent, WAIT_MS, NULL, 0, message, sizeof message, &len));
    EXPECT(len == 6 && memcmp(message, "second", 6) == 0);
    EXPECT_STATUS(KVF_TIMEOUT, kvf_agent_receive(agent, 0, NULL, 0, message, sizeof message, &len));
    EXPECT(!is_readable(arrived, 0));

    EXPECT_STATUS(KVF_OK, kvf_transfer_telemetry(all, &telemetry));
    EXPECT(telemetry.bytes == 32 * 64 && telemetry.descriptors == 32 && telemetry.size == sizeof telemetry);
    EXPECT(telemetry.path[0] != '\0' && telemetry.transfer_ns > 0);
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(some));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(some, WAIT_MS));
    EXPECT(to[0] == 63 && to[64] == 1 && to[128] == 11 && to[192] == 7);

    EXPECT_STATUS(KVF_OK, kvf_transfer_free(all));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(some));
    EXPECT_STATUS(KVF_OK, kvf_region_free(source));
    EXPECT_STATUS(KVF_OK, kvf_region_free(target));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(peer));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

struct engine {
    kvf_node *node;
    kvf_agent *agent;
    kvf_region *region;
    kvf_pages *pages;
    unsigned char *pool;
};

/* With a disk in `folder`, or an index, or neither. */
static void open_engine_on(struct engine *engine, const char *pod, const char *index, const char *folder)
{
    char address[128] = "";
    snprintf(address, sizeof address, "http://%s", index == NULL ? "" : index);
    const struct kvf_setting disk[] = {{"disk.path", folder}, {"disk.bytes", "1048576"}, {"disk.segment_bytes", "131072"}};
    struct kvf_setting settings[] = {
        {"pod", pod},
        {"model", "m"},
        {"model_identity", IDENTITY},
        {"block_bytes", "4096"},
        {"block_tokens", "4"},
        {"host.bytes", "65536"},
        {"engine.name", "test/1"},
        {"engine.hash", "sha256"},
        {"", ""}, {"", ""}, {"", ""},
    };
    size_t count = sizeof settings / sizeof *settings - 3;
    if (index != NULL) {
        settings[count++] = (struct kvf_setting){"index.address", address};
    }
    if (folder != NULL) {
        memcpy(settings + count, disk, sizeof disk);
        count += 3;
    }
    struct kvf_node_options options = {.size = sizeof options, .settings = settings, .setting_count = count};
    EXPECT_STATUS(KVF_OK, kvf_node_open(&options, &engine->node));
    EXPECT_STATUS(KVF_OK, kvf_node_agent(engine->node, &engine->agent));
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(engine->agent, BLOCKS * BLOCK_BYTES, 0, &engine->region));
    EXPECT_STATUS(KVF_OK, kvf_region_base(engine->region, (void **)&engine->pool));
    struct kvf_segment segment = {.stride = BLOCK_BYTES, .len = BLOCK_BYTES};
    EXPECT_STATUS(KVF_OK, kvf_region_id(engine->region, &segment.region));
    EXPECT_STATUS(KVF_OK, kvf_pages_create(engine->node, &segment, 1, BLOCKS, &engine->pages));
}

static void open_engine(struct engine *engine, const char *pod, const char *index)
{
    open_engine_on(engine, pod, index, NULL);
}

static void close_engine(struct engine *engine)
{
    EXPECT_STATUS(KVF_OK, kvf_node_shutdown(engine->node, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_pages_free(engine->pages));
    EXPECT_STATUS(KVF_OK, kvf_region_free(engine->region));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(engine->agent));
    EXPECT_STATUS(KVF_OK, kvf_node_free(engine->node));
}

static void finish(kvf_task *task)
{
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
}

static void store(struct engine *engine, kvf_prefix *prefix, const uint32_t *numbers, size_t count)
{
    kvf_task *task = NULL;
    struct kvf_store_report report = {.size = sizeof report};
    EXPECT_STATUS(KVF_OK, kvf_node_store(engine->node, prefix, 0, engine->pages, numbers, count, 0, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_store_report(task, &report));
    EXPECT(report.stored + report.already_held == count);
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
}

static struct kvf_held held(struct engine *engine, kvf_prefix *prefix)
{
    kvf_task *task = NULL;
    struct kvf_held held = {.size = sizeof held};
    EXPECT_STATUS(KVF_OK, kvf_node_held(engine->node, prefix, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_held(task, &held));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    return held;
}

static struct kvf_removed removed(kvf_task *task)
{
    struct kvf_removed removed = {.size = sizeof removed};
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_removed(task, &removed));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    return removed;
}

static void blocks_are_kept_dropped_and_found(void)
{
    struct engine engine = {0};
    open_engine(&engine, "alone", NULL);
    const uint32_t tokens[4 * BLOCK_TOKENS] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    kvf_prefix *prefix = NULL;
    size_t blocks = 0;
    EXPECT_STATUS(KVF_OK, kvf_prefix_create(engine.node, NULL, &prefix));
    EXPECT_STATUS(KVF_OK, kvf_prefix_extend(prefix, tokens, 6, NULL));
    EXPECT_STATUS(KVF_OK, kvf_prefix_extend(prefix, tokens + 6, 10, &blocks));
    EXPECT(blocks == 4);
    const uint32_t numbers[4] = {3, 2, 1, 0};
    store(&engine, prefix, numbers, 4);
    EXPECT(held(&engine, prefix).host == 4 && held(&engine, prefix).expected == 4);

    kvf_task *task = NULL;
    struct kvf_reach reach = {.size = sizeof reach};
    size_t count = 77;
    EXPECT_STATUS(KVF_OK, kvf_node_locate(engine.node, prefix, WAIT_MS, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_reach(task, &reach));
    EXPECT(reach.depth == 4 && reach.own == 4 && reach.host == 4 && reach.disk == 0 && reach.holders == 0);
    EXPECT_STATUS(KVF_OK, kvf_task_holders(task, NULL, 0, &count));
    EXPECT(count == 0);
    EXPECT_STATUS(KVF_OK, kvf_task_shared(task, NULL, 0, &count));
    EXPECT(count == 0);
    EXPECT_STATUS(KVF_INVALID, kvf_task_store_report(task, &(struct kvf_store_report){.size = sizeof(struct kvf_store_report)}));
    EXPECT_TEXT("the task is a locate, not a store");
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));

    /* What is pinned stays when everything else goes. */
    struct kvf_pin pin = {.size = sizeof pin};
    struct kvf_pin_options keep = {.size = sizeof keep, .ttl_ms = 60000};
    EXPECT_STATUS(KVF_OK, kvf_node_pin(engine.node, prefix, &keep, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_pin(task, &pin));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT(pin.depth > 0 && pin.depth <= 4);
    EXPECT_STATUS(KVF_OK, kvf_node_clear(engine.node, &task));
    struct kvf_removed gone = removed(task);
    EXPECT(gone.kept == pin.depth && gone.removed == 4 - pin.depth);
    EXPECT(held(&engine, prefix).depth == pin.depth);
    EXPECT_STATUS(KVF_OK, kvf_node_release(engine.node, pin.id, &task));
    finish(task);
    /* A number that others know beforehand; who lets go of it before it comes has let go of it. */
    const uint64_t number = UINT64_MAX;
    keep.id = &number;
    EXPECT_STATUS(KVF_OK, kvf_node_pin(engine.node, prefix, &keep, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_pin(task, &pin));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT(pin.id == number && pin.depth > 0);
    EXPECT_STATUS(KVF_OK, kvf_node_pin(engine.node, prefix, &keep, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_task_wait(task, WAIT_MS));
    EXPECT_TEXT("18446744073709551615");
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    const uint64_t early = 0;
    keep.id = &early;
    EXPECT_STATUS(KVF_OK, kvf_node_release(engine.node, early, &task));
    finish(task);
    EXPECT_STATUS(KVF_OK, kvf_node_pin(engine.node, prefix, &keep, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    struct kvf_pin none = {.size = sizeof none};
    EXPECT_STATUS(KVF_OK, kvf_task_pin(task, &none));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT(none.id == early && none.depth == 0);
    EXPECT_STATUS(KVF_OK, kvf_node_release(engine.node, number, &task));
    finish(task);

    EXPECT_STATUS(KVF_OK, kvf_node_remove(engine.node, prefix, &task));
    EXPECT(removed(task).removed == pin.depth);
    EXPECT(held(&engine, prefix).depth == 0);
    EXPECT_STATUS(KVF_OK, kvf_node_flush(engine.node, WAIT_MS, &task));
    finish(task);

    struct kvf_stat stats[64];
    EXPECT_STATUS(KVF_OK, kvf_node_stats(engine.node, WAIT_MS, NULL, 0, &count));
    EXPECT(count > 10 && count <= 64);
    EXPECT_STATUS(KVF_OK, kvf_node_stats(engine.node, WAIT_MS, stats, 64, &count));
    uint64_t stored = 0;
    for (size_t i = 0; i < count; i++) {
        if (strcmp(stats[i].name, "stored") == 0) {
            stored = stats[i].value;
        }
    }
    EXPECT(stored == 4);
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(prefix));
    close_engine(&engine);
}

/* Host memory has room to spare, so that only the shutdown writes to the disk. */
static void a_restart_finds_what_only_host_memory_had(const char *folder)
{
    struct engine engine = {0};
    const uint32_t tokens[4 * BLOCK_TOKENS] = {7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10};
    const uint32_t numbers[4] = {0, 1, 2, 3};
    for (int run = 0; run < 2; run++) {
        open_engine_on(&engine, "again", NULL, folder);
        kvf_prefix *prefix = NULL;
        EXPECT_STATUS(KVF_OK, kvf_prefix_create(engine.node, NULL, &prefix));
        EXPECT_STATUS(KVF_OK, kvf_prefix_extend(prefix, tokens, 4 * BLOCK_TOKENS, NULL));
        struct kvf_held there = held(&engine, prefix);
        EXPECT(there.host == 0 && there.disk == (run == 0 ? 0u : 4u));
        if (run == 0) {
            memset(engine.pool, 'k', 4 * BLOCK_BYTES);
            store(&engine, prefix, numbers, 4);
        } else {
            kvf_task *task = NULL;
            struct kvf_fetch_report report = {.size = sizeof report};
            EXPECT_STATUS(KVF_OK, kvf_node_fetch(engine.node, prefix, 0, engine.pages, numbers, 4, NULL, &task));
            EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
            EXPECT_STATUS(KVF_OK, kvf_task_fetch_report(task, &report));
            EXPECT_STATUS(KVF_OK, kvf_task_free(task));
            EXPECT(report.depth == 4 && engine.pool[0] == 'k' && engine.pool[4 * BLOCK_BYTES - 1] == 'k');
        }
        EXPECT_STATUS(KVF_OK, kvf_prefix_free(prefix));
        close_engine(&engine);
    }
}

/* What an engine's scheduler packs, a worker's node stores and fetches under. */
static void names_of_an_engine_name_blocks(void)
{
    struct kvf_names_options options = {.size = sizeof options, .model = "m", .block_tokens = BLOCK_TOKENS};
    kvf_names *names = NULL;
    EXPECT_STATUS(KVF_OK, kvf_names_create(&options, &names));
    const uint32_t tokens[2 * BLOCK_TOKENS] = {1, 2, 3, 4, 5, 6, 7, 8};
    unsigned char hashes[2 * 32];
    memset(hashes, 1, 32);
    memset(hashes + 32, 2, 32);
    EXPECT_STATUS(KVF_OK, kvf_names_extend(names, tokens, 2 * BLOCK_TOKENS, hashes, 32, 2));
    unsigned char packed[2][256];
    size_t len[2] = {0, 0};
    EXPECT_STATUS(KVF_OK, kvf_names_pack(names, 0, 2, packed[0], sizeof packed[0], &len[0]));
    EXPECT_STATUS(KVF_OK, kvf_names_pack(names, 1, 1, packed[1], sizeof packed[1], &len[1]));
    EXPECT_STATUS(KVF_OK, kvf_names_free(names));

    struct engine engine = {0};
    open_engine(&engine, "worker", NULL);
    kvf_prefix *whole = NULL, *second = NULL, *adapted = NULL;
    const uint8_t adapter[KVF_KEY_BYTES] = {9};
    EXPECT_STATUS(KVF_OK, kvf_prefix_create_from_names(engine.node, packed[0], len[0], NULL, &whole));
    EXPECT_STATUS(KVF_OK, kvf_prefix_create_from_names(engine.node, packed[1], len[1], NULL, &second));
    EXPECT_STATUS(KVF_OK, kvf_prefix_create_from_names(engine.node, packed[0], len[0], adapter, &adapted));
    size_t blocks = 0;
    EXPECT_STATUS(KVF_OK, kvf_prefix_len(whole, &blocks));
    EXPECT(blocks == 2);
    uint8_t keys[2][KVF_KEY_BYTES];
    EXPECT_STATUS(KVF_OK, kvf_prefix_key(whole, 1, keys[0]));
    EXPECT_STATUS(KVF_OK, kvf_prefix_key(second, 0, keys[1]));
    EXPECT(memcmp(keys[0], keys[1], KVF_KEY_BYTES) == 0);
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_prefix_extend(whole, tokens, 4, &blocks));
    const uint32_t numbers[2] = {0, 1};
    store(&engine, whole, numbers, 2);
    EXPECT(held(&engine, second).depth == 1);
    EXPECT(held(&engine, adapted).depth == 0);
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(whole));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(second));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(adapted));
    close_engine(&engine);
}

/* What a scheduler without a node asks its worker's: where blocks are, and to let go of what was kept for it. */
static void a_scheduler_asks_a_nodes_peer_service(void)
{
    struct engine engine = {0};
    open_engine(&engine, "served", NULL);
    char address[64] = "";
    size_t len = 0;
    EXPECT_STATUS(KVF_OK, kvf_node_peer_address(engine.node, address, sizeof address, &len));
    unsigned char hashes[3 * 32], packed[256];
    for (int i = 0; i < 3; i++) {
        memset(hashes + 32 * i, i + 1, 32);
    }
    EXPECT_STATUS(KVF_OK, kvf_names_pack_hashes("root", 4, hashes, 32, 2, packed, sizeof packed, &len));
    kvf_prefix *prefix = NULL;
    EXPECT_STATUS(KVF_OK, kvf_prefix_create_from_names(engine.node, packed, len, NULL, &prefix));
    const uint32_t numbers[2] = {0, 1};
    store(&engine, prefix, numbers, 2);

    kvf_service *service = NULL;
    kvf_task *task = NULL;
    EXPECT_STATUS(KVF_OK, kvf_service_connect(address, &service));
    EXPECT_STATUS(KVF_OK, kvf_names_pack_hashes("root", 4, hashes, 32, 3, packed, sizeof packed, &len));
    EXPECT_STATUS(KVF_OK, kvf_service_locate(service, packed, len, WAIT_MS, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, WAIT_MS));
    struct kvf_reach reach = {.size = sizeof reach};
    EXPECT_STATUS(KVF_OK, kvf_task_reach(task, &reach));
    EXPECT(reach.depth == 2 && reach.own == 2 && reach.host == 2 && reach.expected == 2);
    /* What a program built against the first version has room for ends before the newer fields. */
    struct kvf_reach older = {.size = offsetof(struct kvf_reach, expected), .expected = 77};
    EXPECT_STATUS(KVF_OK, kvf_task_reach(task, &older));
    EXPECT(older.own == 2 && older.expected == 77);
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT_STATUS(KVF_OK, kvf_service_locate(service, packed, len - 1, WAIT_MS, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_task_wait(task, WAIT_MS));
    EXPECT_TEXT("names of blocks");
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));

    const uint64_t number = 4711;
    struct kvf_pin_options keep = {.size = sizeof keep, .id = &number, .ttl_ms = 60000};
    EXPECT_STATUS(KVF_OK, kvf_node_pin(engine.node, prefix, &keep, &task));
    finish(task);
    EXPECT_STATUS(KVF_OK, kvf_node_remove(engine.node, prefix, &task));
    EXPECT(removed(task).kept == 2);
    static const char stranger[] = "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd";
    EXPECT_STATUS(KVF_OK, kvf_service_unpin(service, number, stranger, WAIT_MS, &task));
    EXPECT_STATUS(KVF_DENIED, kvf_task_wait(task, WAIT_MS));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT_STATUS(KVF_OK, kvf_service_unpin(service, number, IDENTITY, WAIT_MS, &task));
    /* The task keeps its connection. */
    EXPECT_STATUS(KVF_OK, kvf_service_free(service));
    finish(task);
    EXPECT_STATUS(KVF_OK, kvf_node_remove(engine.node, prefix, &task));
    EXPECT(removed(task).removed == 2);

    task = UNTOUCHED(kvf_task);
    service = UNTOUCHED(kvf_service);
    EXPECT_STATUS(KVF_INVALID, kvf_service_connect("two words", &service));
    EXPECT_STATUS(KVF_INVALID, kvf_service_connect(NULL, &service));
    EXPECT_STATUS(KVF_INVALID, kvf_service_unpin(NULL, number, IDENTITY, 0, &task));
    EXPECT(service == UNTOUCHED(kvf_service) && task == UNTOUCHED(kvf_task));
    EXPECT_STATUS(KVF_OK, kvf_service_free(NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_names_pack_hashes("root", 4, hashes, 0, 2, packed, sizeof packed, &len));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(prefix));
    close_engine(&engine);
}

/* Asks until the index, which follows its pods at its own pace, knows so many blocks of one pod. */
static int is_found(kvf_index *index, const uint64_t *keys, const uint32_t *tokens, size_t blocks, uint32_t tier)
{
    struct kvf_pod_depth pod = {0};
    struct kvf_lookup_summary summary = {0};
    for (int i = 0; i < LOOKUPS_MAX; i++) {
        kvf_status status = keys != NULL
            ? kvf_index_lookup_keys(index, keys, blocks, NULL, &pod, 1, &summary)
            : kvf_index_lookup(index, tokens, blocks * BLOCK_TOKENS, NULL, &pod, 1, &summary);
        if (status != KVF_OK) {
            return 0;
        }
        if (summary.pods == 1 && pod.by_tier[tier] == blocks) {
            return strcmp(pod.pod, "known") == 0;
        }
    }
    return 0;
}

static void an_index_hears_of_the_node_and_of_its_engine(const char *address)
{
    struct engine engine = {0};
    open_engine(&engine, "known", address);
    kvf_index *index = NULL;
    EXPECT_STATUS(KVF_OK, kvf_index_connect(address, WAIT_MS, &index));
    const uint32_t tokens[2 * BLOCK_TOKENS] = {1, 2, 3, 4, 5, 6, 7, 8};
    kvf_prefix *prefix = NULL;
    EXPECT_STATUS(KVF_OK, kvf_prefix_create(engine.node, NULL, &prefix));
    EXPECT_STATUS(KVF_OK, kvf_prefix_extend(prefix, tokens, 2 * BLOCK_TOKENS, NULL));
    const uint32_t numbers[2] = {0, 1};
    store(&engine, prefix, numbers, 2);
    uint64_t keys[2] = {0, 0};
    EXPECT_STATUS(KVF_OK, kvf_prefix_index_key(prefix, 0, &keys[0]));
    EXPECT_STATUS(KVF_OK, kvf_prefix_index_key(prefix, 1, &keys[1]));
    EXPECT(is_found(index, keys, NULL, 2, KVF_TIER_HOST));

    const uint64_t hashes[2] = {11, 12};
    struct kvf_stored_event stored = {
        .size = sizeof stored,
        .hashes = hashes,
        .count = 2,
        .tokens = tokens,
        .token_count = 2 * BLOCK_TOKENS,
        .tier = KVF_TIER_DEVICE,
    };
    EXPECT_STATUS(KVF_OK, kvf_node_publish_stored(engine.node, &stored));
    EXPECT(is_found(index, NULL, tokens, 2, KVF_TIER_DEVICE));
    EXPECT_STATUS(KVF_OK, kvf_node_publish_removed(engine.node, &hashes[0], 2, KVF_TIER_DEVICE));
    EXPECT(is_found(index, NULL, tokens, 2, KVF_TIER_HOST));
    EXPECT_STATUS(KVF_OK, kvf_node_publish_stored(engine.node, &stored));
    EXPECT(is_found(index, NULL, tokens, 2, KVF_TIER_DEVICE));
    EXPECT_STATUS(KVF_OK, kvf_node_publish_cleared(engine.node));
    EXPECT(is_found(index, NULL, tokens, 2, KVF_TIER_HOST));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(prefix));
    EXPECT_STATUS(KVF_OK, kvf_index_free(index));
    close_engine(&engine);
}

/* How many blocks of a prompt the index knows of for one owner; it follows at its own pace, so this asks until it is `wanted`. */
static uint32_t depth_of(kvf_index *index, const uint32_t *tokens, const char *lora, const char *salt, uint32_t wanted)
{
    struct kvf_lookup_options options = {.size = sizeof options, .lora = lora, .cache_salt = salt};
    uint32_t depth = UINT32_MAX;
    for (int i = 0; i < LOOKUPS_MAX && depth != wanted; i++) {
        struct kvf_pod_depth pod = {0};
        struct kvf_lookup_summary summary = {0};
        if (kvf_index_lookup(index, tokens, 2 * BLOCK_TOKENS, &options, &pod, 1, &summary) != KVF_OK) {
            return UINT32_MAX;
        }
        depth = pod.depth;
    }
    return depth;
}

/* An engine that has no node: its blocks are found for their owner, and for nobody else. */
static void an_engine_publishes_without_a_node(const char *address)
{
    struct kvf_publisher_options options = {
        .size = sizeof options, .index = address, .pod = "bare", .model = "m", .block_tokens = BLOCK_TOKENS};
    kvf_publisher *publisher = NULL;
    EXPECT_STATUS(KVF_OK, kvf_publisher_open(&options, &publisher));
    kvf_index *index = NULL;
    EXPECT_STATUS(KVF_OK, kvf_index_connect(address, WAIT_MS, &index));
    const uint32_t tokens[2 * BLOCK_TOKENS] = {9, 8, 7, 6, 5, 4, 3, 2};
    const uint64_t hashes[2] = {21, 22};
    struct kvf_namespace owner = {.size = sizeof owner, .lora = "adapter", .cache_salt = "tenant"};
    struct kvf_stored_event first = {
        .size = sizeof first, .hashes = hashes, .count = 1, .tokens = tokens, .token_count = BLOCK_TOKENS, .owner = &owner};
    struct kvf_stored_event second = first;
    second.hashes = &hashes[1];
    second.parent = &hashes[0];
    second.tokens = tokens + BLOCK_TOKENS;
    EXPECT_STATUS(KVF_OK, kvf_publisher_stored(publisher, &first));
    EXPECT_STATUS(KVF_OK, kvf_publisher_stored(publisher, &second));
    EXPECT(depth_of(index, tokens, "adapter", "tenant", 2) == 2);
    EXPECT(depth_of(index, tokens, "adapter", NULL, 0) == 0);
    EXPECT(depth_of(index, tokens, NULL, "tenant", 0) == 0);
    EXPECT(depth_of(index, tokens, NULL, NULL, 0) == 0);
    EXPECT_STATUS(KVF_OK, kvf_publisher_removed(publisher, &hashes[1], 1, KVF_TIER_DEVICE));
    EXPECT(depth_of(index, tokens, "adapter", "tenant", 1) == 1);

    /* A program that was built before owners were known sends a smaller structure, of the base model. */
    const uint64_t plain[1] = {31};
    struct kvf_stored_event old = {
        .size = offsetof(struct kvf_stored_event, owner), .hashes = plain, .count = 1, .tokens = tokens,
        .token_count = BLOCK_TOKENS, .owner = &owner};
    EXPECT_STATUS(KVF_OK, kvf_publisher_stored(publisher, &old));
    EXPECT(depth_of(index, tokens, NULL, NULL, 1) == 1);
    EXPECT_STATUS(KVF_OK, kvf_publisher_cleared(publisher));
    EXPECT(depth_of(index, tokens, "adapter", "tenant", 0) == 0);
    EXPECT(depth_of(index, tokens, NULL, NULL, 0) == 0);

    char endless[2000];
    memset(endless, 'x', sizeof endless - 1);
    endless[sizeof endless - 1] = '\0';
    owner.cache_salt = endless;
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_stored(publisher, &first));
    EXPECT_TEXT("cache_salt is 1999 bytes");
    first.token_count = 1;
    owner.cache_salt = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_stored(publisher, &first));
    EXPECT_TEXT("kvf_stored_event.token_count");
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_removed(publisher, hashes, 1, 7));
    EXPECT_STATUS(KVF_OK, kvf_publisher_free(publisher));
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_cleared(publisher));
    EXPECT_STATUS(KVF_OK, kvf_publisher_free(NULL));

    publisher = UNTOUCHED(kvf_publisher);
    options.index = "127.0.0.1:1";
    EXPECT_STATUS(KVF_PEER_LOST, kvf_publisher_open(&options, &publisher));
    options.key_scheme = "md5";
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_open(&options, &publisher));
    EXPECT_TEXT("md5");
    options.pod = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_publisher_open(&options, &publisher));
    EXPECT_TEXT("kvf_publisher_options.pod is null");
    EXPECT(publisher == UNTOUCHED(kvf_publisher));
    EXPECT_STATUS(KVF_OK, kvf_index_free(index));
}

int main(int argc, char **argv)
{
    ranges_share_a_region();
    transfers_are_checked_and_estimated();
    transfers_from_prepared_lists();
    blocks_are_kept_dropped_and_found();
    names_of_an_engine_name_blocks();
    a_scheduler_asks_a_nodes_peer_service();
    if (argc > 1 && strchr(argv[1], '/') != NULL) {
        a_restart_finds_what_only_host_memory_had(argv[1]);
    } else if (argc > 1) {
        an_index_hears_of_the_node_and_of_its_engine(argv[1]);
        an_engine_publishes_without_a_node(argv[1]);
    }
    printf("functions: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
