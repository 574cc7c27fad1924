/*
 * What wrong use gets: a status and a text, never a crash, and outputs untouched. `misuse FOLDER` keeps a node's disk there.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "expect.h"

static kvf_agent *agent_named(const char *name)
{
    struct kvf_agent_options options = {.size = sizeof options, .name = name};
    kvf_agent *agent = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    return agent;
}

static void statuses_have_names(void)
{
    EXPECT(strcmp(kvf_status_name(KVF_OK), "ok") == 0);
    EXPECT(strcmp(kvf_status_name(KVF_PEER_LOST), "peer_lost") == 0);
    EXPECT(strcmp(kvf_status_name(KVF_INTERNAL), "internal") == 0);
    EXPECT(strcmp(kvf_status_name(16), "unknown") == 0);
    EXPECT(strcmp(kvf_status_name(UINT32_MAX), "unknown") == 0);
    EXPECT(strlen(kvf_version()) >= 5);
    EXPECT(strcmp(kvf_last_error(), "") == 0);
}

static void null_is_refused_or_harmless(kvf_agent *agent)
{
    kvf_agent *untouched = UNTOUCHED(kvf_agent);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(NULL, &untouched));
    EXPECT(untouched == UNTOUCHED(kvf_agent));
    struct kvf_agent_options options = {.size = sizeof options, .name = "a"};
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, NULL));
    EXPECT_TEXT("agent_out is null");

    size_t len = 77;
    uint64_t id = 77;
    void *base = NULL;
    char byte = 0;
    kvf_state state = KVF_IDLE;
    kvf_fate fate = KVF_SETTLED;
    kvf_region *region = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_metadata(NULL, NULL, 0, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_metadata(agent, NULL, 0, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_metadata(agent, NULL, 1, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_notify(agent, NULL, "x", 1, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_receive(agent, 0, NULL, 0, &byte, 1, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register(agent, NULL, 8, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register(agent, &byte, 1, 0, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate(NULL, 8, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_id(NULL, &id));
    EXPECT_STATUS(KVF_INVALID, kvf_region_len(NULL, &id));
    EXPECT_STATUS(KVF_INVALID, kvf_region_base(NULL, &base));
    EXPECT_STATUS(KVF_INVALID, kvf_region_deregister(NULL, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_peer_path(NULL, NULL, 0, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_peer_forget(NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_post(NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_poll(NULL, &state));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_wait(NULL, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_cancel(NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_fate(NULL, 0, &fate));
    EXPECT_TEXT("transfer is null");
    EXPECT(len == 77 && id == 77 && region == NULL);

    size_t count = 77;
    int fd = 77;
    kvf_task_state running = KVF_TASK_RUNNING;
    kvf_task *task = NULL;
    struct kvf_telemetry telemetry = {.size = sizeof telemetry};
    EXPECT_STATUS(KVF_INVALID, kvf_agent_eventfd(NULL, &fd));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_eventfd(agent, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_peer_name(NULL, NULL, 0, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_peer_regions(NULL, NULL, 0, &count));
    EXPECT_STATUS(KVF_INVALID, kvf_list_len(NULL, &count));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_repost(NULL, NULL, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_eventfd(NULL, &fd));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_telemetry(NULL, &telemetry));
    EXPECT_STATUS(KVF_INVALID, kvf_node_agent(NULL, &agent));
    EXPECT_STATUS(KVF_INVALID, kvf_node_shutdown(NULL, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_node_stats(NULL, 0, NULL, 0, &count));
    EXPECT_STATUS(KVF_INVALID, kvf_node_clear(NULL, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_flush(NULL, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_held(NULL, NULL, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_prefix_len(NULL, &count));
    EXPECT_STATUS(KVF_INVALID, kvf_task_poll(NULL, &running));
    EXPECT_STATUS(KVF_INVALID, kvf_task_wait(NULL, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_task_eventfd(NULL, &fd));
    EXPECT_STATUS(KVF_INVALID, kvf_names_pack(NULL, 0, 0, NULL, 0, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_model_identity(NULL, &byte));
    EXPECT(len == 77 && count == 77 && fd == 77 && task == NULL);

    EXPECT_STATUS(KVF_OK, kvf_node_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_pages_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_task_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_list_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_names_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_region_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(NULL));
    EXPECT_STATUS(KVF_OK, kvf_index_free(NULL));
}

static void options_are_checked(void)
{
    kvf_agent *agent = UNTOUCHED(kvf_agent);
    struct kvf_agent_options options = {.size = 0, .name = "a"};
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    EXPECT_TEXT("kvf_agent_options.size is 0");
    /* Less than the first header had. */
    options.size = offsetof(struct kvf_agent_options, tcp_congestion) - 1;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.size = SIZE_MAX;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));

    /* A program built with a later header: what it leaves zero is fine, what it sets is not known here. */
    struct {
        struct kvf_agent_options known;
        uint64_t later;
    } grown = {.known = {.size = sizeof grown, .name = "grown"}, .later = 0};
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&grown.known, &agent));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    agent = UNTOUCHED(kvf_agent);
    grown.later = 1;
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_agent_create(&grown.known, &agent));

    options.size = sizeof options;
    options.cma = 2;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    EXPECT_TEXT("kvf_agent_options.cma is 2");
    options.cma = 0;
    options.ucx = 7;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    EXPECT_TEXT("kvf_agent_options.ucx is 7");
    options.ucx = 0;
    options.shm = 2;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.shm = 0;
    options.tcp_listen = "localhost";
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    EXPECT_TEXT("\"localhost\"");
    options.tcp_listen = NULL;
    options.name = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.name = "\xff";
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.name = "";
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    struct kvf_agent_options *odd = (struct kvf_agent_options *)(void *)((char *)&options + 1);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(odd, &agent));
    EXPECT(agent == UNTOUCHED(kvf_agent));
}

static void regions_are_checked(kvf_agent *agent)
{
    static unsigned char memory[64];
    kvf_region *region = UNTOUCHED(kvf_region);
    EXPECT_STATUS(KVF_INVALID, kvf_region_register(agent, memory, 0, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register(agent, memory, UINT64_MAX, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register(agent, memory, sizeof memory, 4, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate(agent, 0, 0, &region));
    EXPECT(region == UNTOUCHED(kvf_region));

    EXPECT_STATUS(KVF_OK, kvf_region_register(agent, memory, sizeof memory, 0, &region));
    uint64_t len = 0;
    void *base = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_len(region, &len));
    EXPECT_STATUS(KVF_OK, kvf_region_base(region, &base));
    EXPECT(len == sizeof memory && base == memory);
    EXPECT_STATUS(KVF_INVALID, kvf_region_id(region, NULL));
    EXPECT_STATUS(KVF_OK, kvf_region_deregister(region, 0));
    EXPECT_STATUS(KVF_OK, kvf_region_deregister(region, 0));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
}

static void metadata_and_peers_are_checked(kvf_agent *agent)
{
    unsigned char metadata[4096];
    size_t len = 0;
    size_t needed = 0;
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata(agent, NULL, 0, &needed));
    EXPECT(needed > 0 && needed < sizeof metadata);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_metadata(agent, metadata, needed - 1, &len));
    EXPECT(len == needed);
    EXPECT_TEXT("do not fit");
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata(agent, metadata, sizeof metadata, &len));
    EXPECT(len == needed);

    kvf_peer *peer = UNTOUCHED(kvf_peer);
    EXPECT(kvf_peer_load(agent, "not metadata", 12, &peer) != KVF_OK);
    EXPECT(kvf_peer_load(agent, metadata, 0, &peer) != KVF_OK);
    metadata[len - 1] ^= 1;
    EXPECT_STATUS(KVF_CORRUPT, kvf_peer_load(agent, metadata, len, &peer));
    metadata[len - 1] ^= 1;
    EXPECT_STATUS(KVF_CORRUPT, kvf_peer_load(agent, metadata, len - 1, &peer));
    EXPECT_STATUS(KVF_INVALID, kvf_peer_load(agent, NULL, len, &peer));
    EXPECT(peer == UNTOUCHED(kvf_peer));

    kvf_agent *other = agent_named("other");
    EXPECT_STATUS(KVF_OK, kvf_peer_load(other, metadata, len, &peer));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_notify(agent, peer, "x", 1, 1000));
    EXPECT_TEXT("another agent");
    char path[8];
    size_t path_len = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_peer_path(peer, path, sizeof path, &path_len));
    EXPECT(path_len > sizeof path);
    EXPECT_STATUS(KVF_OK, kvf_agent_free(other));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(peer));
}

static void messages_wait_for_a_buffer_that_fits(kvf_agent *agent)
{
    unsigned char metadata[4096];
    size_t len = 0;
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata(agent, metadata, sizeof metadata, &len));
    kvf_agent *sender = agent_named("sender");
    kvf_peer *peer = NULL;
    EXPECT_STATUS(KVF_OK, kvf_peer_load(sender, metadata, len, &peer));
    EXPECT_STATUS(KVF_TIMEOUT, kvf_agent_receive(agent, 0, NULL, 0, metadata, 1, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_notify(sender, peer, NULL, 1, 1000));
    static char long_message[65537];
    EXPECT_STATUS(KVF_INVALID, kvf_agent_notify(sender, peer, long_message, sizeof long_message, 1000));
    EXPECT_STATUS(KVF_OK, kvf_agent_notify(sender, peer, "first", 5, 1000));
    EXPECT_STATUS(KVF_OK, kvf_agent_notify(sender, peer, NULL, 0, 1000));

    char name[16];
    char text[16];
    EXPECT_STATUS(KVF_OK, kvf_agent_receive(agent, 1000, NULL, 0, NULL, 0, &len));
    EXPECT(len == 5);
    len = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_receive(agent, 1000, NULL, 0, text, 4, &len));
    EXPECT(len == 5);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_receive(agent, 1000, name, 6, text, sizeof text, &len));
    EXPECT_STATUS(KVF_OK, kvf_agent_receive(agent, 1000, name, 7, text, 5, &len));
    EXPECT(strcmp(name, "sender") == 0 && len == 5 && memcmp(text, "first", 5) == 0);
    EXPECT_STATUS(KVF_OK, kvf_agent_receive(agent, 1000, name, sizeof name, text, sizeof text, &len));
    EXPECT(len == 0);
    EXPECT_STATUS(KVF_OK, kvf_peer_forget(peer));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(peer));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(sender));
}

static void transfers_are_checked(kvf_agent *agent)
{
    static unsigned char memory[64];
    kvf_region *region = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_register(agent, memory, sizeof memory, 0, &region));
    uint64_t id = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_id(region, &id));
    struct kvf_descriptor low = {id, 0, 32};
    struct kvf_descriptor high = {id, 32, 32};
    struct kvf_descriptor wrong = {id, 33, 32};
    struct kvf_transfer_options options = {.size = sizeof options, .operation = KVF_READ};
    kvf_transfer *transfer = UNTOUCHED(kvf_transfer);

    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &wrong, &high, 1, &options, &transfer));
    EXPECT_TEXT("local: descriptor 0");
    wrong = (struct kvf_descriptor){id, UINT64_MAX, 32};
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &wrong, 1, &options, &transfer));
    EXPECT_TEXT("remote: descriptor 0");
    wrong = (struct kvf_descriptor){id ^ 1, 0, 32};
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_transfer_create(agent, NULL, &wrong, &high, 1, &options, &transfer));
    wrong = (struct kvf_descriptor){id, 0, 31};
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &wrong, &high, 1, &options, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, NULL, &high, 1, &options, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, SIZE_MAX, &options, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, 1, NULL, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, 1, &options, NULL));
    options.operation = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, 1, &options, &transfer));
    EXPECT_TEXT("operation is 0");
    options.operation = KVF_READ;
    options.notification = "x";
    options.notification_len = 1;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, 1, &options, &transfer));
    options.notification = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create(agent, NULL, &low, &high, 1, &options, &transfer));
    EXPECT(transfer == UNTOUCHED(kvf_transfer));
    options.notification_len = 0;

    memset(memory + 32, 7, 32);
    EXPECT_STATUS(KVF_OK, kvf_transfer_create(agent, NULL, &low, &high, 1, &options, &transfer));
    kvf_state state = KVF_FAILED;
    EXPECT_STATUS(KVF_OK, kvf_transfer_poll(transfer, &state));
    EXPECT(state == KVF_IDLE);
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_wait(transfer, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_poll(transfer, NULL));
    for (int i = 0; i < 2; i++) {
        EXPECT_STATUS(KVF_OK, kvf_transfer_post(transfer));
        EXPECT_STATUS(KVF_OK, kvf_transfer_wait(transfer, 1000));
    }
    EXPECT_STATUS(KVF_OK, kvf_transfer_poll(transfer, &state));
    EXPECT(state == KVF_DONE && memory[0] == 7 && memory[31] == 7);
    EXPECT_STATUS(KVF_OK, kvf_transfer_cancel(transfer));
    EXPECT_STATUS(KVF_OK, kvf_transfer_wait(transfer, 0));
    EXPECT_STATUS(KVF_OK, kvf_region_deregister(region, 1000));
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_transfer_post(transfer));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(transfer));
}

static void an_index_must_answer(void)
{
    kvf_index *index = UNTOUCHED(kvf_index);
    EXPECT_STATUS(KVF_INVALID, kvf_index_connect(NULL, 1000, &index));
    EXPECT_STATUS(KVF_INVALID, kvf_index_connect("127.0.0.1:1", 0, &index));
    EXPECT_STATUS(KVF_INVALID, kvf_index_connect("127.0.0.1:1", 1000, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_index_connect("not an address", 1000, &index));
    EXPECT_STATUS(KVF_PEER_LOST, kvf_index_connect("127.0.0.1:1", 1000, &index));
    EXPECT_TEXT("127.0.0.1:1");
    EXPECT(index == UNTOUCHED(kvf_index));
    uint32_t token = 0;
    struct kvf_pod_depth pod;
    struct kvf_lookup_summary summary;
    EXPECT_STATUS(KVF_INVALID, kvf_index_lookup(NULL, &token, 1, NULL, &pod, 1, &summary));
}

/* Freed twice, used after that, of another type, and made up; by the way every kind of handle is freed once. */
static void handles_that_are_none_are_told_apart(void)
{
    kvf_agent *agent = agent_named("handles");
    kvf_region *region = NULL;
    uint64_t id = 77;
    size_t len = 77;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 64, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_id((kvf_region *)agent, &id));
    EXPECT_TEXT("region is a kvf_agent, not a kvf_region");
    EXPECT_STATUS(KVF_INVALID, kvf_agent_free((kvf_agent *)region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_id((kvf_region *)(void *)&id, &id));
    EXPECT_STATUS(KVF_INVALID, kvf_region_id((kvf_region *)((char *)region + 1), &id));
    EXPECT(id == 77);
    EXPECT_STATUS(KVF_OK, kvf_region_id(region, &id));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_free(region));
    EXPECT_TEXT("region is no kvf_region, or was freed");
    id = 77;
    EXPECT_STATUS(KVF_INVALID, kvf_region_id(region, &id));
    EXPECT(id == 77);
    /* The next handle does not take the freed one's place. */
    kvf_region *next = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 64, 0, &next));
    EXPECT(next != region);
    EXPECT_STATUS(KVF_INVALID, kvf_region_free(region));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_free(agent));
    EXPECT_STATUS(KVF_INVALID, kvf_agent_metadata(agent, NULL, 0, &len));
    EXPECT(len == 77);
    EXPECT_STATUS(KVF_OK, kvf_region_id(next, &id));
    EXPECT_STATUS(KVF_OK, kvf_region_free(next));
}

static void lists_are_checked(kvf_agent *agent)
{
    kvf_region *region = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 64, 0, &region));
    uint64_t id = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_id(region, &id));
    kvf_list *list = UNTOUCHED(kvf_list);
    struct kvf_descriptor range = {id, 32, 33};
    EXPECT_STATUS(KVF_INVALID, kvf_list_create(agent, NULL, &range, 1, &list));
    EXPECT_STATUS(KVF_INVALID, kvf_list_create(agent, NULL, NULL, 1, &list));
    EXPECT_STATUS(KVF_INVALID, kvf_list_create(NULL, NULL, &range, 1, &list));
    EXPECT_STATUS(KVF_INVALID, kvf_list_create(agent, NULL, &range, 1, NULL));
    struct kvf_strided entry = {.region = id, .len = 16, .stride = 17, .count = 4};
    EXPECT_STATUS(KVF_INVALID, kvf_list_create_strided(agent, NULL, &entry, 1, &list));
    EXPECT_TEXT("4 ranges of 16 bytes, every 17");
    entry.stride = UINT64_MAX;
    EXPECT_STATUS(KVF_INVALID, kvf_list_create_strided(agent, NULL, &entry, 1, &list));
    entry.stride = 16;
    entry.reserved = 1;
    EXPECT_STATUS(KVF_INVALID, kvf_list_create_strided(agent, NULL, &entry, 1, &list));
    entry.reserved = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_list_create_strided(agent, NULL, &entry, SIZE_MAX, &list));
    EXPECT(list == UNTOUCHED(kvf_list));
    EXPECT_STATUS(KVF_OK, kvf_list_create_strided(agent, NULL, &entry, 1, &list));

    kvf_transfer *transfer = UNTOUCHED(kvf_transfer);
    struct kvf_transfer_options options = {.size = sizeof options, .operation = KVF_READ};
    const uint32_t inside = 3, outside = 4;
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(agent, list, NULL, NULL, NULL, 0, &options, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(agent, list, list, &inside, &outside, 1, &options, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(agent, list, list, &inside, NULL, 1, &options, &transfer));
    kvf_agent *other = agent_named("other lists");
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_create_prepared(other, list, list, NULL, NULL, 0, &options, &transfer));
    EXPECT_TEXT("made by another agent");
    EXPECT_STATUS(KVF_OK, kvf_agent_free(other));
    EXPECT(transfer == UNTOUCHED(kvf_transfer));
    EXPECT_STATUS(KVF_OK, kvf_list_free(list));
    EXPECT_STATUS(KVF_INVALID, kvf_list_free(list));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
}

enum { MINIMUM = 6 };
static struct kvf_setting settings[MINIMUM + 1] = {
    {"pod", "misused"},
    {"model", "m"},
    {"model_identity", "abababababababababababababababababababababababababababababababab"},
    {"block_bytes", "4096"},
    {"block_tokens", "4"},
    {"host.bytes", "65536"},
};

static void configurations_are_checked(void)
{
    kvf_node *node = UNTOUCHED(kvf_node);
    struct kvf_node_options options = {.size = sizeof options, .settings = settings, .setting_count = MINIMUM};
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(NULL, &node));
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, NULL));
    options.size--;
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, &node));
    EXPECT_TEXT("kvf_node_options.size");
    options.size = sizeof options;
    settings[MINIMUM] = (struct kvf_setting){"colour", "blue"};
    options.setting_count = MINIMUM + 1;
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, &node));
    EXPECT_TEXT("colour");
    settings[MINIMUM] = (struct kvf_setting){NULL, "blue"};
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, &node));
    EXPECT_TEXT("setting 6: key is null");
    options.setting_count = MINIMUM;
    options.toml = "pods = 3";
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, &node));
    options.file = "/no/such/file";
    EXPECT_STATUS(KVF_INVALID, kvf_node_open(&options, &node));
    EXPECT_TEXT("both");
    options.toml = NULL;
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_node_open(&options, &node));
    EXPECT(node == UNTOUCHED(kvf_node));

    char identity[KVF_IDENTITY_CAPACITY] = "untouched";
    struct kvf_model_options model = {.size = sizeof model, .element = "bf16", .layout = "x/1"};
    EXPECT_STATUS(KVF_INVALID, kvf_model_identity(&model, identity));
    EXPECT_TEXT("nothing names the model's weights");
    model.path = "/no/such/model";
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_model_identity(&model, identity));
    EXPECT(strcmp(identity, "untouched") == 0);
}

static void blocks_are_checked(kvf_node *node, kvf_node *other)
{
    kvf_agent *agent = NULL;
    kvf_region *region = NULL;
    struct kvf_segment segment = {.stride = 4096, .len = 4096};
    EXPECT_STATUS(KVF_OK, kvf_node_agent(node, &agent));
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 8192, 0, &region));
    EXPECT_STATUS(KVF_OK, kvf_region_id(region, &segment.region));
    kvf_pages *pages = UNTOUCHED(kvf_pages);
    EXPECT_STATUS(KVF_INVALID, kvf_pages_create(node, &segment, 1, 3, &pages));
    EXPECT_STATUS(KVF_INVALID, kvf_pages_create(node, &segment, 0, 2, &pages));
    segment.len = 4095;
    EXPECT_STATUS(KVF_INVALID, kvf_pages_create(node, &segment, 1, 2, &pages));
    EXPECT_TEXT("4095");
    segment.len = 4096;
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_pages_create(other, &segment, 1, 2, &pages));
    EXPECT(pages == UNTOUCHED(kvf_pages));
    EXPECT_STATUS(KVF_OK, kvf_pages_create(node, &segment, 1, 2, &pages));

    kvf_prefix *prefix = UNTOUCHED(kvf_prefix);
    struct kvf_namespace owner = {.size = sizeof owner, .lora = "\xff"};
    EXPECT_STATUS(KVF_INVALID, kvf_prefix_create(node, &owner, &prefix));
    EXPECT_STATUS(KVF_VERSION, kvf_prefix_create_from_names(node, "xyz", 3, NULL, &prefix));
    const unsigned char none[8] = {1};
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_prefix_create_from_names(node, none, 8, NULL, &prefix));
    EXPECT_STATUS(KVF_INVALID, kvf_prefix_create_from_names(node, none, 7, NULL, &prefix));
    EXPECT(prefix == UNTOUCHED(kvf_prefix));
    EXPECT_STATUS(KVF_OK, kvf_prefix_create(node, NULL, &prefix));
    const uint32_t tokens[8] = {0};
    uint8_t key[KVF_KEY_BYTES];
    EXPECT_STATUS(KVF_INVALID, kvf_prefix_extend(prefix, NULL, 8, NULL));
    EXPECT_STATUS(KVF_OK, kvf_prefix_extend(prefix, tokens, 8, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_prefix_key(prefix, 2, key));

    kvf_task *task = UNTOUCHED(kvf_task);
    const uint32_t numbers[3] = {0, 1, 2};
    EXPECT_STATUS(KVF_INVALID, kvf_node_store(node, prefix, 0, pages, numbers, 3, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_store(node, prefix, 1, pages, numbers, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_store(node, prefix, SIZE_MAX, pages, numbers, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_store(node, prefix, 0, pages, numbers + 1, 2, 0, &task));
    EXPECT_TEXT("block number is 2");
    EXPECT_STATUS(KVF_INVALID, kvf_node_store(other, prefix, 0, pages, numbers, 2, 0, &task));
    EXPECT_TEXT("another node");
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_promote(node, prefix, 1, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_promote(node, prefix, SIZE_MAX, 1, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_promote(NULL, prefix, 0, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_promote(node, NULL, 0, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_promote(node, prefix, 0, 2, 0, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_offload(node, prefix, 1, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_store(node, prefix, 0, pages, numbers, 3, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_store(other, prefix, 0, pages, numbers, 2, 0, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_open(NULL, 0, 0, 4096));
    EXPECT_STATUS(KVF_INVALID, kvf_node_hbm_close(NULL, 0));
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_node_hbm_close(node, 0));
    EXPECT_TEXT("this node has no HBM tier");
    EXPECT(task == UNTOUCHED(kvf_task));
    struct kvf_promote_report promoted = {.size = sizeof promoted, .missed = 77};
    EXPECT_STATUS(KVF_OK, kvf_node_hbm_promote(node, prefix, 0, 2, 0, &task));
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_task_wait(task, 20000));
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_task_promote_report(task, &promoted));
    EXPECT(promoted.missed == 77);
    EXPECT_STATUS(KVF_INVALID, kvf_task_store_report(task, &(struct kvf_store_report){.size = sizeof(struct kvf_store_report)}));
    EXPECT_TEXT("the task is a promotion");
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    task = UNTOUCHED(kvf_task);
    struct kvf_pin_options beyond = {.size = sizeof beyond, .first = 3, .ttl_ms = 1000};
    EXPECT_STATUS(KVF_INVALID, kvf_node_pin(node, prefix, &beyond, &task));
    beyond.size = 4;
    EXPECT_STATUS(KVF_INVALID, kvf_node_pin(node, prefix, &beyond, &task));
    EXPECT_TEXT("kvf_pin_options.size");
    EXPECT_STATUS(KVF_INVALID, kvf_node_pin(node, prefix, NULL, &task));
    static struct kvf_holder holder;
    memset(holder.pod, 'p', sizeof holder.pod);
    struct kvf_block_range ranges[2] = {{0, 2}, {1, 3}};
    struct kvf_fetch_options fetch = {.size = sizeof fetch, .holders = &holder, .holder_count = 1};
    EXPECT_STATUS(KVF_INVALID, kvf_node_fetch(node, prefix, 0, pages, numbers, 2, &fetch, &task));
    EXPECT_TEXT("holder 0: pod has no terminating NUL");
    fetch.holder_count = 0;
    fetch.shared = ranges;
    fetch.shared_count = 2;
    EXPECT_STATUS(KVF_INVALID, kvf_node_fetch(node, prefix, 0, pages, numbers, 2, &fetch, &task));
    EXPECT_TEXT("shared[1]");
    EXPECT(task == UNTOUCHED(kvf_task));

    EXPECT_STATUS(KVF_OK, kvf_node_fetch(node, prefix, 0, pages, numbers, 2, NULL, &task));
    EXPECT_STATUS(KVF_OK, kvf_task_wait(task, 20000));
    struct kvf_fetch_report report = {.size = sizeof report, .depth = 77};
    struct kvf_held held = {.size = sizeof held};
    uint32_t sources[2] = {77, 77};
    size_t count = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_task_held(task, &held));
    report.size--;
    EXPECT_STATUS(KVF_INVALID, kvf_task_fetch_report(task, &report));
    EXPECT(report.depth == 77);
    report.size++;
    EXPECT_STATUS(KVF_INVALID, kvf_task_sources(task, sources, 1, &count));
    EXPECT(count == 2 && sources[0] == 77);
    EXPECT_STATUS(KVF_OK, kvf_task_sources(task, sources, 2, &count));
    EXPECT(sources[0] == KVF_SOURCE_MISS && sources[1] == KVF_SOURCE_MISS);
    EXPECT_STATUS(KVF_OK, kvf_task_drain(task, 0));
    struct {
        struct kvf_fetch_report known;
        uint64_t later;
    } grown = {.known = {.size = sizeof grown}, .later = 77};
    EXPECT_STATUS(KVF_OK, kvf_task_fetch_report(task, &grown.known));
    EXPECT(grown.known.blocks == 2 && grown.known.depth == 0 && grown.later == 0 && grown.known.size == sizeof grown);
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT_STATUS(KVF_INVALID, kvf_task_free(task));

    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_node_publish_cleared(node));
    EXPECT_TEXT("[index]");
    EXPECT_STATUS(KVF_OK, kvf_pages_free(pages));
    EXPECT_STATUS(KVF_OK, kvf_prefix_free(prefix));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

static void nodes_are_checked(const char *folder)
{
    struct kvf_node_options options = {.size = sizeof options, .settings = settings, .setting_count = MINIMUM};
    kvf_node *node = NULL, *other = NULL;
    EXPECT_STATUS(KVF_OK, kvf_node_open(&options, &other));
    char toml[4096];
    snprintf(toml, sizeof toml, "[disk]\npath = \"%s\"\nbytes = 1048576\nsegment_bytes = 131072\n"
             "engine = 'threads'\n", folder);
    options.toml = toml;
    EXPECT_STATUS(KVF_OK, kvf_node_open(&options, &node));
    kvf_node *second = UNTOUCHED(kvf_node);
    EXPECT_STATUS(KVF_BUSY, kvf_node_open(&options, &second));
    EXPECT(second == UNTOUCHED(kvf_node));
    blocks_are_checked(node, other);
    char address[64];
    size_t len = 0;
    EXPECT_STATUS(KVF_OK, kvf_node_peer_address(node, address, sizeof address, &len));
    EXPECT(strncmp(address, "127.0.0.1:", 10) == 0);
    EXPECT_STATUS(KVF_INVALID, kvf_node_peer_address(node, address, 3, &len));

    /* Used after its end, and after it was given back. */
    kvf_task *task = NULL;
    EXPECT_STATUS(KVF_OK, kvf_node_shutdown(other, 20000));
    EXPECT_STATUS(KVF_OK, kvf_node_clear(other, &task));
    EXPECT_STATUS(KVF_CANCELLED, kvf_task_wait(task, 20000));
    kvf_task_state state = KVF_TASK_RUNNING;
    EXPECT_STATUS(KVF_OK, kvf_task_poll(task, &state));
    EXPECT(state == KVF_TASK_FAILED);
    struct kvf_removed removed = {.size = sizeof removed};
    EXPECT_STATUS(KVF_CANCELLED, kvf_task_removed(task, &removed));
    EXPECT_STATUS(KVF_OK, kvf_task_free(task));
    EXPECT_STATUS(KVF_OK, kvf_node_free(other));
    EXPECT_STATUS(KVF_INVALID, kvf_node_clear(other, &task));
    EXPECT_STATUS(KVF_INVALID, kvf_node_free(other));

    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        int told = kvf_node_clear(node, &task) == KVF_FORKED && kvf_node_shutdown(node, 1000) == KVF_FORKED
            && kvf_node_free(node) == KVF_FORKED;
        _exit(told ? 0 : 1);
    }
    int status = 1;
    EXPECT(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    EXPECT_STATUS(KVF_OK, kvf_node_shutdown(node, 20000));
    EXPECT_STATUS(KVF_OK, kvf_node_free(node));
}

static void names_are_checked(void)
{
    kvf_names *names = UNTOUCHED(kvf_names);
    struct kvf_names_options options = {.size = sizeof options, .model = "m", .block_tokens = 0};
    EXPECT_STATUS(KVF_INVALID, kvf_names_create(&options, &names));
    options.block_tokens = 4;
    options.key_scheme = "md5";
    EXPECT_STATUS(KVF_INVALID, kvf_names_create(&options, &names));
    options.key_scheme = NULL;
    options.model = NULL;
    EXPECT_STATUS(KVF_INVALID, kvf_names_create(&options, &names));
    EXPECT(names == UNTOUCHED(kvf_names));
    options.model = "m";
    EXPECT_STATUS(KVF_OK, kvf_names_create(&options, &names));
    const uint32_t tokens[4] = {0};
    const uint8_t hash[32] = {0};
    unsigned char packed[64];
    size_t len = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_names_extend(names, tokens, 3, hash, 32, 1));
    EXPECT_STATUS(KVF_INVALID, kvf_names_extend(names, tokens, 4, hash, 0, 1));
    EXPECT_STATUS(KVF_INVALID, kvf_names_extend(names, tokens, 4, hash, SIZE_MAX, 2));
    EXPECT_STATUS(KVF_OK, kvf_names_extend(names, tokens, 4, hash, 32, 1));
    EXPECT_STATUS(KVF_INVALID, kvf_names_pack(names, 0, 2, packed, sizeof packed, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_names_pack(names, SIZE_MAX, SIZE_MAX, packed, sizeof packed, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_names_pack(names, 0, 1, packed, 47, &len));
    EXPECT(len == 48);
    EXPECT_STATUS(KVF_OK, kvf_names_pack(names, 0, 1, packed, 48, &len));
    EXPECT_STATUS(KVF_OK, kvf_names_free(names));
    EXPECT_STATUS(KVF_INVALID, kvf_names_free(names));
}

/* A child of fork has none of the library's threads: its calls say so instead of waiting for ever. */
static void a_forked_child_is_told(kvf_agent *agent)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        size_t len = 0;
        int told = kvf_agent_metadata(agent, NULL, 0, &len) == KVF_FORKED
            && kvf_agent_receive(agent, 1000, NULL, 0, NULL, 0, &len) == KVF_FORKED
            && kvf_agent_free(agent) == KVF_FORKED;
        _exit(told ? 0 : 1);
    }
    int status = 1;
    EXPECT(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: misuse FOLDER\n");
        return 2;
    }
    statuses_have_names();
    kvf_agent *agent = agent_named("misused");
    null_is_refused_or_harmless(agent);
    options_are_checked();
    regions_are_checked(agent);
    metadata_and_peers_are_checked(agent);
    messages_wait_for_a_buffer_that_fits(agent);
    transfers_are_checked(agent);
    handles_that_are_none_are_told_apart();
    lists_are_checked(agent);
    names_are_checked();
    configurations_are_checked();
    nodes_are_checked(argv[1]);
    an_index_must_answer();
    a_forked_child_is_told(agent);
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    printf("misuse: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
