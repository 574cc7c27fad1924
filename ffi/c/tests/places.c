/*
 * Files and objects as regions: `places FOLDER`, a new folder for them.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdlib.h>

#include "expect.h"

enum {
    BYTES = 1 << 20,
    PATIENCE_MS = 20000,
};

static kvf_agent *agent_with(const struct kvf_object_store *const *stores, size_t count)
{
    struct kvf_agent_options options = {
        .size = sizeof options, .name = "places", .object_stores = stores, .object_store_count = count};
    kvf_agent *agent = NULL;
    EXPECT_STATUS(KVF_OK, kvf_agent_create(&options, &agent));
    return agent;
}

/* Moves `len` bytes from the start of both; how that ended. */
static kvf_status move(kvf_agent *agent, uint32_t operation, uint64_t memory, uint64_t place, uint64_t len)
{
    struct kvf_descriptor here = {memory, 0, len}, there = {place, 0, len};
    struct kvf_transfer_options options = {.size = sizeof options, .operation = operation};
    kvf_transfer *transfer = NULL;
    kvf_status status = kvf_transfer_create(agent, NULL, &here, &there, 1, &options, &transfer);
    if (status != KVF_OK) {
        return status;
    }
    EXPECT_STATUS(KVF_OK, kvf_transfer_post(transfer));
    status = kvf_transfer_wait(transfer, PATIENCE_MS);
    EXPECT_STATUS(KVF_OK, kvf_transfer_free(transfer));
    return status;
}

static kvf_region *memory_of(kvf_agent *agent, unsigned char **base, uint64_t *id)
{
    kvf_region *memory = NULL;
    void *start = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_allocate(agent, BYTES, 0, &memory));
    EXPECT_STATUS(KVF_OK, kvf_region_base(memory, &start));
    EXPECT_STATUS(KVF_OK, kvf_region_id(memory, id));
    *base = start;
    return memory;
}

/* What is written to a place is read back from it. */
static void holds_what_is_written(kvf_agent *agent, kvf_region *place)
{
    unsigned char *base = NULL, *expected = malloc(BYTES);
    uint64_t memory_id = 0, place_id = 0;
    kvf_region *memory = memory_of(agent, &base, &memory_id);
    EXPECT_STATUS(KVF_OK, kvf_region_id(place, &place_id));
    for (size_t i = 0; i < BYTES; i++) {
        expected[i] = (unsigned char)(i * 7 + i / 251);
    }
    memcpy(base, expected, BYTES);
    EXPECT_STATUS(KVF_OK, move(agent, KVF_WRITE, memory_id, place_id, BYTES));
    memset(base, 0, BYTES);
    EXPECT_STATUS(KVF_OK, move(agent, KVF_READ, memory_id, place_id, BYTES));
    EXPECT(memcmp(base, expected, BYTES) == 0);
    EXPECT_STATUS(KVF_OK, kvf_region_free(memory));
    free(expected);
}

static void files_are_places(const char *folder)
{
    kvf_agent *agent = agent_with(NULL, 0);
    kvf_region *file = UNTOUCHED(kvf_region);
    char path[512], report[256];
    size_t len = 0;
    snprintf(path, sizeof path, "%s/blocks", folder);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_start_files(agent, 3, report, sizeof report, &len));
    EXPECT_STATUS(KVF_OK, kvf_agent_start_files(agent, KVF_FILES_THREADS, report, sizeof report, &len));
    EXPECT(strstr(report, "threads") != NULL && len == strlen(report) + 1);
    EXPECT_STATUS(KVF_INVALID, kvf_agent_start_files(agent, KVF_FILES_AUTO, report, 3, &len));
    EXPECT(len == strlen(report) + 1);

    EXPECT_STATUS(KVF_NOT_FOUND, kvf_region_open_file(agent, path, NULL, &file));
    EXPECT_TEXT("blocks");
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_file(agent, folder, NULL, &file));
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_file(agent, NULL, NULL, &file));
    struct kvf_file_options options = {.size = sizeof options, .len = BYTES, .create = 1, .preallocate = 1};
    options.direct = 3;
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_file(agent, path, &options, &file));
    EXPECT_TEXT("kvf_file_options.direct");
    options.direct = KVF_DIRECT_OFF;
    options.read_only = 2;
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_file(agent, path, &options, &file));
    EXPECT_TEXT("kvf_file_options.read_only");
    EXPECT(file == UNTOUCHED(kvf_region));
    options.read_only = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_open_file(agent, path, &options, &file));
    holds_what_is_written(agent, file);
    EXPECT_STATUS(KVF_OK, kvf_region_sync(file, PATIENCE_MS));
    void *base = &options;
    uint64_t bytes = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_base(file, &base));
    EXPECT_STATUS(KVF_OK, kvf_region_len(file, &bytes));
    EXPECT(base == NULL && bytes == BYTES);
    EXPECT_STATUS(KVF_OK, kvf_region_free(file));

    /* Of its own length now, and not to be written to. */
    options = (struct kvf_file_options){.size = sizeof options, .read_only = 1};
    EXPECT_STATUS(KVF_OK, kvf_region_open_file(agent, path, &options, &file));
    EXPECT_STATUS(KVF_OK, kvf_region_len(file, &bytes));
    EXPECT(bytes == BYTES);
    unsigned char *here = NULL;
    uint64_t memory_id = 0, file_id = 0;
    kvf_region *memory = memory_of(agent, &here, &memory_id);
    EXPECT_STATUS(KVF_OK, kvf_region_id(file, &file_id));
    EXPECT_STATUS(KVF_DENIED, move(agent, KVF_WRITE, memory_id, file_id, BYTES));
    EXPECT_STATUS(KVF_OK, move(agent, KVF_READ, memory_id, file_id, BYTES));
    EXPECT(here[1] == 7);
    EXPECT_STATUS(KVF_UNSUPPORTED, kvf_region_sync(memory, PATIENCE_MS));
    EXPECT_STATUS(KVF_OK, kvf_region_free(memory));
    EXPECT_STATUS(KVF_OK, kvf_region_free(file));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

static void objects_are_places(const char *folder)
{
    char url[512];
    snprintf(url, sizeof url, "file://%s/store", folder);
    struct kvf_object_store store = {.size = sizeof store, .name = "blocks", .url = url, .retries = KVF_OFF};
    const struct kvf_object_store *stores[] = {&store};
    kvf_agent *agent = agent_with(stores, 1);
    kvf_region *object = UNTOUCHED(kvf_region);
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_region_open_object(agent, "others", "a/b", KVF_OBJECT_REPLACE, &object));
    EXPECT_TEXT("others");
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_object(agent, "blocks", "", KVF_OBJECT_REPLACE, &object));
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_object(agent, "blocks", "a/b", 3, &object));
    EXPECT_STATUS(KVF_INVALID, kvf_region_open_object(agent, "blocks", NULL, 0, &object));
    EXPECT(object == UNTOUCHED(kvf_region));
    EXPECT_STATUS(KVF_OK, kvf_region_open_object(agent, "blocks", "a/b", KVF_OBJECT_REPLACE, &object));
    holds_what_is_written(agent, object);
    uint64_t len = 0;
    EXPECT_STATUS(KVF_OK, kvf_region_len(object, &len));
    EXPECT(len == UINT64_MAX);

    /* It is there now. */
    unsigned char *base = NULL;
    uint64_t memory_id = 0, new_id = 0, old_id = 0;
    kvf_region *memory = memory_of(agent, &base, &memory_id), *fresh = NULL;
    EXPECT_STATUS(KVF_OK, kvf_region_open_object(agent, "blocks", "a/b", KVF_OBJECT_CREATE, &fresh));
    EXPECT_STATUS(KVF_OK, kvf_region_id(fresh, &new_id));
    EXPECT_STATUS(KVF_OK, kvf_region_id(object, &old_id));
    EXPECT_STATUS(KVF_DENIED, move(agent, KVF_WRITE, memory_id, new_id, BYTES));
    EXPECT_STATUS(KVF_NOT_FOUND, kvf_agent_remove_object(agent, "others", "a/b", PATIENCE_MS));
    EXPECT_STATUS(KVF_OK, kvf_agent_remove_object(agent, "blocks", "a/b", PATIENCE_MS));
    EXPECT_STATUS(KVF_OK, kvf_agent_remove_object(agent, "blocks", "a/b", PATIENCE_MS));
    EXPECT_STATUS(KVF_NOT_FOUND, move(agent, KVF_READ, memory_id, old_id, BYTES));
    EXPECT_STATUS(KVF_OK, move(agent, KVF_WRITE, memory_id, new_id, BYTES));
    EXPECT_STATUS(KVF_OK, kvf_region_free(fresh));
    EXPECT_STATUS(KVF_OK, kvf_region_free(memory));
    EXPECT_STATUS(KVF_OK, kvf_region_free(object));
    EXPECT_STATUS(KVF_OK, kvf_agent_free(agent));
}

static void refused(kvf_status status, const struct kvf_object_store *store, const char *text)
{
    const struct kvf_object_store *stores[] = {store};
    struct kvf_agent_options options = {
        .size = sizeof options, .name = "places", .object_stores = stores, .object_store_count = 1};
    kvf_agent *agent = UNTOUCHED(kvf_agent);
    EXPECT_STATUS(status, kvf_agent_create(&options, &agent));
    EXPECT(agent == UNTOUCHED(kvf_agent));
    EXPECT(strstr(kvf_last_error(), text) != NULL);
    EXPECT(strstr(kvf_last_error(), "hush") == NULL);
}

/* What a store is told is checked, and what is secret is not said again. */
static void stores_are_checked(void)
{
    const struct kvf_object_store good = {
        .size = sizeof good, .name = "s", .url = "s3://bucket", .region = "r", .access_key = "id", .secret_key = "hush"};
    struct kvf_object_store store = good;
    refused(KVF_INVALID, NULL, "kvf_object_store");
    store.name = NULL;
    refused(KVF_INVALID, &store, "kvf_object_store.name");
    store = good;
    store.url = "pigeon://bucket";
    refused(KVF_UNSUPPORTED, &store, "pigeon");
    store = good;
    store.checksum = 3;
    refused(KVF_INVALID, &store, "kvf_object_store.checksum");
    store = good;
    store.allow_http = 2;
    refused(KVF_INVALID, &store, "kvf_object_store.allow_http");
    store = good;
    store.part_bytes = 1;
    refused(KVF_INVALID, &store, "part_bytes");
    store = good;
    store.parts_in_flight = 65;
    refused(KVF_INVALID, &store, "parts_in_flight");
    store = good;
    store.requests_in_flight = 1025;
    refused(KVF_INVALID, &store, "concurrency");
    store = good;
    store.secret_key = "\xff\xfe hush";
    refused(KVF_INVALID, &store, "kvf_object_store.secret_key");
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: places FOLDER\n");
        return 2;
    }
    files_are_places(argv[1]);
    objects_are_places(argv[1]);
    stores_are_checked();
    printf("places: %d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
