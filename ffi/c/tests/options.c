/*
 * How agents are made: `options [TLS]`, where TLS is the folder of the certificates for tests. Without it TLS is left out.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#include "expect.h"

enum {
    CARD_BYTES = 4096,
};

/* Reached over TCP alone, though they are in one process. */
static struct kvf_agent_options remote(const char *name)
{
    return (struct kvf_agent_options){
        .size = sizeof(struct kvf_agent_options), .name = name, .tcp_listen = "127.0.0.1:0", .no_memcpy = 1};
}

/* The way from one agent to another one, as the first tells it; `buffer` has room for 1024. */
static void path_between(kvf_agent *from, kvf_agent *to, char *buffer)
{
    unsigned char card[CARD_BYTES];
    size_t len = 0;
    kvf_peer *peer = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_metadata(to, card, sizeof card, &len));
    EXPECT_STATUS(KVF_OK, kvf_peer_load(from, card, len, &peer));
    EXPECT_STATUS(KVF_OK, kvf_peer_path(peer, buffer, 1024, &len));
    EXPECT_STATUS(KVF_OK, kvf_peer_free(peer));
}

/* Two agents are made, and the way from the first to the second has each of the words in it. */
static void expect_path(const struct kvf_agent_options *from, const struct kvf_agent_options *to, const char *first,
                        const char *second)
{
    kvf_agent *initiator = NULL, *target = NULL;
    char path[1024] = "";
    EXPECT_STATUS(KVF_OK, kvf_agent_create(from, &initiator));
    EXPECT_STATUS(KVF_OK, kvf_agent_create(to, &target));
    path_between(initiator, target, path);
    int holds = strstr(path, first) != NULL && strstr(path, second) != NULL;
    if (!holds) {
        fprintf(stderr, "no \"%s\" and \"%s\" in: %s\n", first, second, path);
    }
    EXPECT(holds);
    EXPECT_STATUS(KVF_OK, kvf_agent_free(initiator));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(target));
}

static void refused(const struct kvf_agent_options *options, kvf_status status, const char *text)
{
    kvf_agent *agent = UNTOUCHED(kvf_agent);
    EXPECT(kvf_agent_create(options, &agent) == status);
    EXPECT(agent == UNTOUCHED(kvf_agent));
    EXPECT(strstr(kvf_last_error(), text) != NULL);
}

/* Bytes go over two connections with TLS, and nowhere with certificates of another authority or none. */
static void agents_speak_tls(const char *folder)
{
    char authorities[512], certificates[512], key[512], other[512], missing[512];
    snprintf(authorities, sizeof authorities, "%s/own-ca.pem", folder);
    snprintf(other, sizeof other, "%s/other-ca.pem", folder);
    snprintf(certificates, sizeof certificates, "%s/member.pem", folder);
    snprintf(key, sizeof key, "%s/member.key", folder);
    snprintf(missing, sizeof missing, "%s/nobody.key", folder);
    struct kvf_tls_options tls = {.size = sizeof tls, .authorities = authorities, .certificates = certificates, .key = key};
    struct kvf_agent_options from = remote("initiator"), to = remote("target");
    from.tls = to.tls = &tls;
    from.tcp_connections = 2;
    expect_path(&from, &to, "TLS 1.3", "2 of 2 connections");

    struct kvf_tls_options elsewhere = tls;
    elsewhere.authorities = other;
    from.tls = &elsewhere;
    expect_path(&from, &to, "none", "UnknownIssuer");
    from.tls = NULL;
    expect_path(&from, &to, "none", "speaks TLS only");

    from.tls = &elsewhere;
    elsewhere.key = missing;
    refused(&from, KVF_NOT_FOUND, missing);
    elsewhere.key = NULL;
    refused(&from, KVF_INVALID, "kvf_tls_options.key is null");
    elsewhere.key = certificates;
    refused(&from, KVF_INVALID, "TLS key");
    elsewhere.size = 1;
    refused(&from, KVF_INVALID, "kvf_tls_options.size");
}

/* Connections go to every address that a peer has told, and to the one that it tells in place of its own. */
static void addresses_are_told(void)
{
    struct kvf_agent_options from = remote("initiator"), to = remote("target");
    expect_path(&from, &to, "tcp", "127.0.0.1");
    to.tcp_rails = "127.0.0.2:0, 127.0.0.3:0";
    expect_path(&from, &to, "tcp", "3 of 3 connections");
    to.tcp_rails = "127.0.0.2";
    refused(&to, KVF_INVALID, "kvf_agent_options.tcp_rails");
    to.tcp_rails = NULL;
    /* A port that the system keeps for root. */
    to.tcp_advertise = "127.0.0.4:1";
    expect_path(&from, &to, "none", "127.0.0.4:1");
    to.tcp_advertise = "here";
    refused(&to, KVF_INVALID, "kvf_agent_options.tcp_advertise");
    to.tcp_advertise = NULL;
    to.tcp_connections = 17;
    refused(&to, KVF_INVALID, "connections");
}

/* Only who is on the list gets in; an empty list lets nobody in. */
static void strangers_are_kept_out(void)
{
    const char *names[] = {"somebody", "initiator"};
    struct kvf_agent_options from = remote("initiator"), to = remote("target");
    to.allow_peers = names;
    to.allow_peer_count = 2;
    expect_path(&from, &to, "tcp", "127.0.0.1");
    to.allow_peer_count = 1;
    expect_path(&from, &to, "none", "not tcp");
    to.allow_peer_count = 0;
    expect_path(&from, &to, "none", "not tcp");
    names[0] = NULL;
    to.allow_peer_count = 1;
    refused(&to, KVF_INVALID, "kvf_agent_options.allow_peers is null");
}

/* Agents of one process copy unless they are told not to. */
static void ways_and_times_can_be_turned_off(void)
{
    struct kvf_agent_options from = remote("initiator"), to = remote("target");
    from.no_memcpy = to.no_memcpy = 0;
    from.look_us = to.look_us = KVF_OFF;
    from.slow_after_ms = KVF_OFF;
    to.slow_after_ms = 100;
    expect_path(&from, &to, "memcpy", "");
    from.no_memcpy = 1;
    from.look_us = 1000;
    expect_path(&from, &to, "tcp", "");
    from.look_us = 1001;
    refused(&from, KVF_INVALID, "look");
    from.look_us = 0;
    from.no_memcpy = 2;
    refused(&from, KVF_INVALID, "kvf_agent_options.no_memcpy");
    from.no_memcpy = 1;
    from.connect_within_ms = 60000;
    expect_path(&from, &to, "tcp", "");
    from.connect_within_ms = 60001;
    refused(&from, KVF_INVALID, "connect within");
    from.connect_within_ms = 0;
    from.reserved = 1;
    refused(&from, KVF_INVALID, "kvf_agent_options.reserved");
}

/* What RDMA and UCX are told is checked before the system is looked at, or by them. */
static void rdma_is_told_how(void)
{
    struct kvf_verbs_options verbs = {.size = sizeof verbs, .device = "pigeon0", .traffic_class = 256};
    struct kvf_agent_options options = remote("initiator");
    options.verbs = &verbs;
    refused(&options, KVF_INVALID, "kvf_verbs_options.traffic_class");
    verbs.traffic_class = 0;
    verbs.has_gid_index = 1;
    verbs.gid_index = 300;
    refused(&options, KVF_INVALID, "kvf_verbs_options.gid_index");
    verbs.gid_index = 3;
    verbs.has_gid_index = 2;
    refused(&options, KVF_INVALID, "kvf_verbs_options.has_gid_index");
    verbs.has_gid_index = 1;
    verbs.listen = "pigeon";
    refused(&options, KVF_INVALID, "kvf_verbs_options.listen");
    verbs.listen = "127.0.0.1:0";
    verbs.mtu = 1500;
    refused(&options, KVF_INVALID, "verbs mtu");
    verbs.mtu = 1024;
    verbs.retries = 8;
    refused(&options, KVF_INVALID, "verbs retries");
    verbs.retries = KVF_OFF;
    verbs.polling_us = KVF_OFF;
    verbs.rails = 9;
    refused(&options, KVF_INVALID, "verbs rails");
    verbs.rails = 8;
    verbs.near = "../etc";
    refused(&options, KVF_INVALID, "verbs near");
    verbs.near = NULL;
    verbs.connect = "pigeon";
    refused(&options, KVF_INVALID, "verbs connect");
    verbs.connect = "rdma_cm";
    verbs.service_level = 1;
    refused(&options, KVF_INVALID, "verbs service level by rdma_cm");
    verbs.service_level = 0;
    verbs.connect = NULL;
    verbs.timeout = 32;
    refused(&options, KVF_INVALID, "verbs timeout");
    verbs.timeout = 1;
    /* No library, no device at all, or not this one. */
    kvf_agent *agent = UNTOUCHED(kvf_agent);
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_agent_create(&options, &agent));
    EXPECT(agent == UNTOUCHED(kvf_agent));

    struct kvf_setting setting = {"RNDV_THRESH", "pigeon"};
    options = remote("initiator");
    options.ucx_settings = &setting;
    options.ucx_setting_count = 1;
    /* Nobody reads them without it. */
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    options.ucx = 1;
    agent = NULL;
    kvf_status status = kvf_agent_create(&options, &agent);
    if (status == KVF_UNSUPPORTED) {
        printf("SKIPPED settings of UCX: %s\n", kvf_last_error());
    } else {
        EXPECT(status == KVF_INVALID);
        EXPECT_TEXT("RNDV_THRESH");
    }
    setting.key = NULL;
    refused(&options, KVF_INVALID, "setting 0: key is null");
}

/* A transfer between memories of the host has no streams, whatever the driver. */
static void streams_are_checked(kvf_agent *agent, bool has_driver)
{
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_post_after(NULL, 0, 0));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_post_after_event(NULL, 0, 8));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_order_stream(NULL, 0, 0, KVF_ALL_PARTS, 1));
    EXPECT_TEXT("transfer");

    kvf_region *region = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, 4096, 0, &region));
    uint64_t id = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_id(region, &id));
    struct kvf_descriptor local = {id, 0, 64}, remote = {id, 64, 64};
    struct kvf_transfer_options move = {.size = sizeof move, .operation = KVF_READ};
    kvf_transfer *transfer = NULL;
    EXPECT_STATUS(KVF_OK,
                  kvf_transfer_create(agent, NULL, &local, &remote, 1, &move, &transfer));
    EXPECT_STATUS(KVF_INVALID, kvf_transfer_post_after_event(transfer, 0, 0));
    EXPECT_TEXT("event");
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_transfer_post_after(transfer, 0, 0));
    EXPECT_TEXT(has_driver ? "memcpy" : "CUDA");
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_transfer_order_stream(transfer, 0, 0, KVF_ALL_PARTS, 1));
    if (!has_driver)
        EXPECT_STATUS(KVF_UNSUPPORTED, kvf_transfer_post_after_event(transfer, 0, 8));
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(transfer));
    EXPECT_STATUS(KVF_OK, kvf_region_free(region));
}

/* What is wrong with the options is said first; then what the driver says, to whoever asks. */
static void devices_are_told_how(void)
{
    struct kvf_cuda_options cuda = {.size = sizeof cuda, .no_pin = 2};
    struct kvf_agent_options options = remote("device");
    options.cuda = &cuda;
    refused(&options, KVF_INVALID, "kvf_cuda_options.no_pin");
    cuda.size = 8;
    refused(&options, KVF_INVALID, "kvf_cuda_options");
    cuda = (struct kvf_cuda_options){.size = sizeof cuda, .no_peers = 2};
    refused(&options, KVF_INVALID, "kvf_cuda_options.no_peers");
    cuda = (struct kvf_cuda_options){.size = sizeof cuda, .storage = KVF_STORAGE_CUFILE + 1};
    refused(&options, KVF_INVALID, "kvf_cuda_options.storage");
    /* A caller that was built before the last options has all of them zero, whatever lies there. */
    cuda.size = offsetof(struct kvf_cuda_options, storage);
    cuda.no_peers = 2;
    refused(&options, KVF_INVALID, "kvf_cuda_options.no_peers");
    cuda = (struct kvf_cuda_options){
        .size = sizeof cuda,
        .polling_us = KVF_OFF,
        .fragments_bytes = KVF_MEASURED,
    };

    char report[4096] = "";
    uint32_t devices = 77;
    size_t len = 0;
    EXPECT_STATUS(KVF_INVALID, kvf_cuda_probe(NULL, report, sizeof report, &len));
    EXPECT_STATUS(KVF_INVALID, kvf_cuda_probe(&devices, report, sizeof report, NULL));
    kvf_agent *agent = NULL;
    kvf_region *region = UNTOUCHED(kvf_region);
    uint64_t address = 77;
    kvf_status status = kvf_cuda_probe(&devices, report, sizeof report, &len);
    if (status == KVF_OK) {
        EXPECT(devices > 0 && len == strlen(report) && strncmp(report, "CUDA ", 5) == 0);
        EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
        EXPECT_STATUS(KVF_INVALID, kvf_region_register_device(agent, devices, 1 << 20, 8, 0, &region));
    } else {
        EXPECT(status == KVF_UNSUPPORTED && devices == 77 && report[0] == '\0');
        char reason[1024];
        snprintf(reason, sizeof reason, "%s", kvf_last_error());
        printf("SKIPPED memory of devices: %s\n", reason);
        refused(&options, KVF_UNSUPPORTED, reason);
        options.cuda = NULL;
        EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
        EXPECT_STATUS(KVF_UNSUPPORTED, kvf_region_register_device(agent, 0, 1 << 20, 8, 0, &region));
        EXPECT_TEXT(reason);
    }
    EXPECT_STATUS(KVF_INVALID, kvf_region_register_device(NULL, 0, 1 << 20, 8, 0, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register_device(agent, 0, 0, 8, 0, &region));
    EXPECT_TEXT("address");
    EXPECT_STATUS(KVF_INVALID, kvf_region_register_device(agent, 0, 1 << 20, 8, 0, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_region_register_device(agent, 0, 1 << 20, 8, 4, &region));
    EXPECT_TEXT("access");
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate_device(agent, 0, 8, 4, &address, &region));
    EXPECT_TEXT("access");
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate_device(NULL, 0, 8, 0, &address, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate_device(agent, 0, 8, 0, NULL, &region));
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate_device(agent, 0, 8, 0, &address, NULL));
    EXPECT_STATUS(KVF_INVALID, kvf_region_allocate_device(agent, 0, 0, 0, &address, &region));
    EXPECT_TEXT("len");
    if (status != KVF_OK) {
        EXPECT_STATUS(KVF_UNSUPPORTED, kvf_region_allocate_device(agent, 0, 8, 0, &address, &region));
        EXPECT(address == 77);
    }
    EXPECT(region == UNTOUCHED(kvf_region));
    streams_are_checked(agent, status == KVF_OK);
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

/* A program that was built before the newer fields were known: what follows is none of its business. */
static void older_programs_are_served(void)
{
    struct kvf_agent_options options = remote("older");
    options.size = offsetof(struct kvf_agent_options, tcp_advertise);
    options.tcp_advertise = options.tcp_rails = "nonsense";
    options.look_us = 5000;
    options.no_memcpy = 9;
    options.connect_within_ms = 90000;
    options.object_store_count = 1;
    kvf_agent *agent = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
    options.size = sizeof options;
    refused(&options, KVF_INVALID, "kvf_agent_options");
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        agents_speak_tls(argv[1]);
    } else {
        printf("SKIPPED TLS: no folder of certificates is named\n");
    }
    addresses_are_told();
    strangers_are_kept_out();
    ways_and_times_can_be_turned_off();
    rdma_is_told_how();
    devices_are_told_how();
    older_programs_are_served();
    printf("options: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
