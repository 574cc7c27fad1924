/*
 * Two processes move bytes both ways: `two_processes shm` or `two_processes tcp`.
 *
 * The parent owns memory and offers it. The child, a second run of this program, reads it, checks it, writes something
 * else back and says so; the parent checks that. What they must know of each other (metadata and the region's number)
 * goes through a socket pair; a real program uses whatever it has.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvfabric.h"

enum {
    BLOCKS = 64,
    BLOCK_BYTES = 4096,
    TIMEOUT_MS = 10000,
    METADATA_BYTES_MAX = 1 << 20,
};

#define REGION_BYTES ((uint64_t)BLOCKS * BLOCK_BYTES)

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "two_processes: %s: %s\n", what, why);
    exit(1);
}

/* Ends the program with the library's own words if a call failed. */
static void check(kvf_status status, const char *what)
{
    if (status != KVF_OK) {
        char text[512];
        snprintf(text, sizeof text, "%s (%s)", kvf_last_error(), kvf_status_name(status));
        fail(what, text);
    }
}

static void write_all(int file, const void *bytes, size_t len)
{
    const char *next = bytes;
    while (len > 0) {
        ssize_t written = write(file, next, len);
        if (written <= 0) {
            fail("write to the other process", strerror(errno));
        }
        next += written;
        len -= (size_t)written;
    }
}

static void read_all(int file, void *bytes, size_t len)
{
    char *next = bytes;
    while (len > 0) {
        ssize_t taken = read(file, next, len);
        if (taken <= 0) {
            fail("read from the other process", taken == 0 ? "it has ended" : strerror(errno));
        }
        next += taken;
        len -= (size_t)taken;
    }
}

static unsigned char expected(uint64_t position, unsigned salt)
{
    return (unsigned char)((position * 31u + position / 251u + salt) & 0xffu);
}

static void fill(unsigned char *bytes, unsigned salt)
{
    for (uint64_t i = 0; i < REGION_BYTES; i++) {
        bytes[i] = expected(i, salt);
    }
}

static void verify(const unsigned char *bytes, unsigned salt, const char *who)
{
    for (uint64_t i = 0; i < REGION_BYTES; i++) {
        if (bytes[i] != expected(i, salt)) {
            char text[80];
            snprintf(text, sizeof text, "byte %llu is wrong", (unsigned long long)i);
            fail(who, text);
        }
    }
}

static kvf_agent *create_agent(const char *name, const char *transport)
{
    struct kvf_agent_options options = {.size = sizeof options, .name = name};
    if (strcmp(transport, "shm") == 0) {
        options.shm = 1;
    } else {
        options.tcp_listen = "127.0.0.1:0";
    }
    kvf_agent *agent = NULL;
    check(kvf_agent_create(&options, &agent), "create an agent");
    return agent;
}

static void send_metadata(const kvf_agent *agent, int file)
{
    size_t len = 0;
    check(kvf_agent_metadata(agent, NULL, 0, &len), "size of the metadata");
    void *metadata = malloc(len);
    if (metadata == NULL) {
        fail("metadata", "out of memory");
    }
    check(kvf_agent_metadata(agent, metadata, len, &len), "metadata");
    write_all(file, &len, sizeof len);
    write_all(file, metadata, len);
    free(metadata);
}

static kvf_peer *receive_peer(const kvf_agent *agent, int file)
{
    size_t len = 0;
    read_all(file, &len, sizeof len);
    if (len > METADATA_BYTES_MAX) {
        fail("metadata", "too long");
    }
    void *metadata = malloc(len);
    if (metadata == NULL) {
        fail("metadata", "out of memory");
    }
    read_all(file, metadata, len);
    kvf_peer *peer = NULL;
    check(kvf_peer_load(agent, metadata, len, &peer), "load the peer");
    free(metadata);
    return peer;
}

/* Moves all blocks, the remote ones in reverse order and back, so that the descriptors matter. */
static void move(kvf_agent *agent, kvf_peer *peer, kvf_operation operation, uint64_t local_id,
                 uint64_t remote_id, const char *message)
{
    struct kvf_descriptor local[BLOCKS];
    struct kvf_descriptor remote[BLOCKS];
    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t offset = (BLOCKS - 1 - i) * BLOCK_BYTES;
        local[i] = (struct kvf_descriptor){local_id, offset, BLOCK_BYTES};
        remote[i] = (struct kvf_descriptor){remote_id, offset, BLOCK_BYTES};
    }
    struct kvf_transfer_options options = {
        .size = sizeof options,
        .operation = operation,
        .deadline_ms = TIMEOUT_MS,
        .notification = message,
        .notification_len = message == NULL ? 0 : strlen(message),
    };
    kvf_transfer *transfer = NULL;
    check(kvf_transfer_create(agent, peer, local, remote, BLOCKS, &options, &transfer),
          "make a transfer");
    check(kvf_transfer_post(transfer), "post a transfer");
    check(kvf_transfer_wait(transfer, TIMEOUT_MS), "wait for a transfer");
    kvf_fate fate = KVF_MEMORY_IN_FLIGHT;
    check(kvf_transfer_fate(transfer, 0, &fate), "fate of the memory");
    if (fate != KVF_SETTLED) {
        fail("fate of the memory", "in flight after success");
    }
    check(kvf_transfer_free(transfer), "free a transfer");
}

static void expect_message(kvf_agent *agent, const char *sender, const char *message)
{
    char name[256];
    char text[64];
    size_t len = 0;
    check(kvf_agent_receive(agent, TIMEOUT_MS, name, sizeof name, text, sizeof text, &len),
          "receive a message");
    if (strcmp(name, sender) != 0 || len != strlen(message) || memcmp(text, message, len) != 0) {
        fail("receive a message", "another one came");
    }
}

static int run_child(const char *transport, int file)
{
    kvf_agent *agent = create_agent("child", transport);
    unsigned char *memory = malloc(REGION_BYTES);
    if (memory == NULL) {
        fail("memory", "out of memory");
    }
    kvf_region *region = NULL;
    check(kvf_region_register(agent, memory, REGION_BYTES, 0, &region), "register memory");
    uint64_t local_id = 0;
    check(kvf_region_id(region, &local_id), "number of the region");

    kvf_peer *parent = receive_peer(agent, file);
    uint64_t remote_id = 0;
    read_all(file, &remote_id, sizeof remote_id);
    send_metadata(agent, file);

    char path[512];
    size_t path_len = 0;
    check(kvf_peer_path(parent, path, sizeof path, &path_len), "path to the parent");
    printf("path: %s\n", path);
    if (strncmp(path, transport, strlen(transport)) != 0) {
        fail("path to the parent", "not the one that was asked for");
    }

    move(agent, parent, KVF_READ, local_id, remote_id, NULL);
    verify(memory, 1, "what the child read");
    fill(memory, 2);
    move(agent, parent, KVF_WRITE, local_id, remote_id, "written");
    expect_message(agent, "parent", "seen");

    check(kvf_region_free(region), "free the region");
    free(memory);
    check(kvf_peer_free(parent), "free the peer");
    check(kvf_agent_free(agent), "free the agent");
    return 0;
}

static int run_parent(const char *program, const char *transport)
{
    int files[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, files) != 0) {
        fail("socketpair", strerror(errno));
    }
    pid_t child = fork();
    if (child < 0) {
        fail("fork", strerror(errno));
    }
    if (child == 0) {
        char file[16];
        snprintf(file, sizeof file, "%d", files[1]);
        close(files[0]);
        execl(program, program, transport, file, (char *)NULL);
        _exit(127);
    }
    close(files[1]);
    int file = files[0];

    kvf_agent *agent = create_agent("parent", transport);
    kvf_region *region = NULL;
    uint32_t access = KVF_ACCESS_REMOTE_READ | KVF_ACCESS_REMOTE_WRITE;
    check(kvf_region_allocate(agent, REGION_BYTES, access, &region), "allocate memory");
    void *base = NULL;
    check(kvf_region_base(region, &base), "address of the region");
    fill(base, 1);

    send_metadata(agent, file);
    uint64_t id = 0;
    check(kvf_region_id(region, &id), "number of the region");
    write_all(file, &id, sizeof id);
    kvf_peer *peer = receive_peer(agent, file);

    expect_message(agent, "child", "written");
    verify(base, 2, "what the child wrote");
    check(kvf_agent_notify(agent, peer, "seen", 4, TIMEOUT_MS), "answer the child");

    int status = 0;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fail("the child", "failed");
    }
    check(kvf_region_deregister(region, TIMEOUT_MS), "deregister the region");
    check(kvf_region_free(region), "free the region");
    check(kvf_peer_free(peer), "free the peer");
    check(kvf_agent_free(agent), "free the agent");
    close(file);
    printf("%s: %d blocks of %d bytes read, written and verified\n", transport, BLOCKS, BLOCK_BYTES);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2 || (strcmp(argv[1], "shm") != 0 && strcmp(argv[1], "tcp") != 0)) {
        fprintf(stderr, "usage: two_processes shm|tcp\n");
        return 2;
    }
    return argc == 3 ? run_child(argv[1], atoi(argv[2])) : run_parent(argv[0], argv[1]);
}
