/*
 * What wrong use gets: a status and a text, never a crash, and outputs untouched. Not here because nothing detects them, as
 * the header says: freeing a handle twice, and using it after it was freed.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvfabric.h"

static int passed = 0;
static int failed = 0;

static void expect(int holds, const char *what, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        fprintf(stderr, "misuse.c:%d: %s (last error: %s)\n", line, what, kvf_last_error());
    }
}

#define EXPECT(condition) expect((condition), #condition, __LINE__)
#define EXPECT_STATUS(wanted, call) expect((call) == (wanted), #call " answers " #wanted, __LINE__)
#define EXPECT_TEXT(part) expect(strstr(kvf_last_error(), (part)) != NULL, "text has " #part, __LINE__)

/* No handle; must still be there after a call that failed. */
#define UNTOUCHED(type) ((type *)(void *)&passed)

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
    options.size = sizeof options - 1;
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
    options.reserved = 1;
    EXPECT_STATUS(KVF_INVALID, kvf_agent_create(&options, &agent));
    options.reserved = 0;
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

int main(void)
{
    statuses_have_names();
    kvf_agent *agent = agent_named("misused");
    null_is_refused_or_harmless(agent);
    options_are_checked();
    regions_are_checked(agent);
    metadata_and_peers_are_checked(agent);
    messages_wait_for_a_buffer_that_fits(agent);
    transfers_are_checked(agent);
    an_index_must_answer();
    a_forked_child_is_told(agent);
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    printf("misuse: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
