/*
 * What UCX alone does with the blocks of a plan: two processes that do nothing else, and wait by polling. They time their
 * moves themselves.
 *
 * Arguments: read or write, the number of blocks, bytes of a block. Standard input: the places of all blocks on this side and
 * then on the other one (32-bit numbers of this machine), then commands: a (move all), b and a number (move that one), p
 * (poison the target), v (verify it), c (CPU time). Each is answered by one line: ok and two numbers, or what went wrong. The
 * numbers are bytes and nanoseconds of a move, wrong blocks, or microseconds of CPU of this process and of the other one. The
 * program ends with its input.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <ucp/api/ucp.h>

enum { WINDOW = 64, POISON = 0xa5, LOOKS_BETWEEN = 64 };

static int is_read;
static uint32_t blocks, *places[2];
static size_t block_bytes, total;
static uint8_t *memory;
static ucp_context_h context;
static ucp_worker_h worker;
static ucp_mem_h handle;
static ucp_ep_h endpoint;
static ucp_rkey_h key;
static uint64_t remote;
static int other = -1;

static void fail(const char *what, const char *why)
{
    printf("%s: %s\n", what, why);
    fflush(stdout);
    _exit(1);
}

static void check(ucs_status_t status, const char *what)
{
    if (status != UCS_OK) {
        fail(what, ucs_status_string(status));
    }
}

static void all_of(ssize_t (*call)(int, void *, size_t), int file, void *bytes, size_t len, const char *what)
{
    for (size_t done = 0; done < len;) {
        ssize_t count = call(file, (char *)bytes + done, len - done);
        if (count <= 0) {
            fail(what, count == 0 ? "end of input" : strerror(errno));
        }
        done += (size_t)count;
    }
}

static ssize_t put(int file, void *bytes, size_t len)
{
    return write(file, bytes, len);
}

/* The word at a place of the source, by splitmix64. */
static uint64_t word(uint64_t place)
{
    uint64_t z = (place + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void fill(void)
{
    for (size_t at = 0; at < total / 8; at++) {
        ((uint64_t *)memory)[at] = word(at);
    }
}

/* How many blocks of the target are not the source's; the source's side is the other one than the target's. */
static uint64_t wrong(int target)
{
    uint64_t count = 0;
    for (uint32_t n = 0; n < blocks; n++) {
        size_t from = (size_t)places[!target][n] * block_bytes / 8;
        size_t to = (size_t)places[target][n] * block_bytes / 8;
        for (size_t at = 0; at < block_bytes / 8; at++) {
            if (((uint64_t *)memory)[to + at] != word(from + at)) {
                count++;
                break;
            }
        }
    }
    return count;
}

static uint64_t cpu_us(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (uint64_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000u +
           (uint64_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void open_ucx(void)
{
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_RMA};
    ucp_worker_params_t worker_params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE, .thread_mode = UCS_THREAD_MODE_SINGLE};
    ucp_config_t *config;
    check(ucp_config_read(NULL, NULL, &config), "read the settings");
    check(ucp_init(&params, config, &context), "open");
    ucp_config_release(config);
    check(ucp_worker_create(context, &worker_params, &worker), "make a worker");
    memory = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail("memory", strerror(errno));
    }
    ucp_mem_map_params_t map = {.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
                                .address = memory,
                                .length = total};
    check(ucp_mem_map(context, &map, &handle), "register memory");
}

static void say_where(void)
{
    ucp_address_t *address;
    size_t len;
    void *packed;
    uint64_t base = (uint64_t)(uintptr_t)memory;
    check(ucp_worker_get_address(worker, &address, &len), "address");
    all_of(put, other, &len, sizeof len, "say");
    all_of(put, other, address, len, "say");
    ucp_worker_release_address(worker, address);
    check(ucp_rkey_pack(context, handle, &packed, &len), "pack a key");
    all_of(put, other, &len, sizeof len, "say");
    all_of(put, other, packed, len, "say");
    ucp_rkey_buffer_release(packed);
    all_of(put, other, &base, sizeof base, "say");
}

static void hear_where(void)
{
    size_t len;
    all_of(read, other, &len, sizeof len, "hear");
    void *address = malloc(len);
    all_of(read, other, address, len, "hear");
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
                              .address = address,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER};
    check(ucp_ep_create(worker, &params, &endpoint), "connect");
    free(address);
    all_of(read, other, &len, sizeof len, "hear");
    void *packed = malloc(len);
    all_of(read, other, packed, len, "hear");
    check(ucp_ep_rkey_unpack(endpoint, packed, &key), "unpack a key");
    free(packed);
    all_of(read, other, &remote, sizeof remote, "hear");
}

/* Works for the initiator until that is gone: polls while it moves, and sleeps between its moves, so that others have the
 * core then. */
static void serve(void)
{
    char command;
    open_ucx();
    if (is_read) {
        fill();
    } else {
        memset(memory, POISON, total);
    }
    say_where();
    int is_awake = 0;
    for (;;) {
        for (int n = 0; is_awake && n < LOOKS_BETWEEN; n++) {
            ucp_worker_progress(worker);
        }
        ssize_t count = recv(other, &command, 1, is_awake ? MSG_DONTWAIT : 0);
        if (count == 0) {
            _exit(0);
        }
        if (count < 0) {
            continue;
        }
        uint64_t answer = 0;
        is_awake = command == 'g';
        if (command == 'p') {
            memset(memory, POISON, total);
        } else if (command == 'v') {
            answer = wrong(1);
        } else if (command == 'c') {
            answer = cpu_us();
        }
        all_of(put, other, &answer, sizeof answer, "answer");
    }
}

static uint64_t ask(char command)
{
    uint64_t answer;
    all_of(put, other, &command, 1, "ask");
    all_of(read, other, &answer, sizeof answer, "ask");
    return answer;
}

static void settle(ucs_status_ptr_t request, const char *what)
{
    if (UCS_PTR_IS_PTR(request)) {
        ucs_status_t status;
        while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS) {
            ucp_worker_progress(worker);
        }
        ucp_request_free(request);
        check(status, what);
    } else {
        check(UCS_PTR_STATUS(request), what);
    }
}

/* Returns the nanoseconds that it took. */
static uint64_t move(uint32_t first, uint32_t count)
{
    ask('g');
    uint64_t start = now_ns();
    ucs_status_ptr_t open[WINDOW] = {NULL};
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH, .memh = handle};
    for (uint32_t n = 0; n < count; n++) {
        uint8_t *own = memory + (size_t)places[0][first + n] * block_bytes;
        uint64_t there = remote + (uint64_t)places[1][first + n] * block_bytes;
        settle(open[n % WINDOW], "move");
        open[n % WINDOW] = is_read ? ucp_get_nbx(endpoint, own, block_bytes, there, key, &params)
                                   : ucp_put_nbx(endpoint, own, block_bytes, there, key, &params);
    }
    for (int n = 0; n < WINDOW; n++) {
        settle(open[n], "move");
    }
    if (!is_read) {
        ucp_request_param_t none = {0};
        settle(ucp_ep_flush_nbx(endpoint, &none), "flush");
    }
    uint64_t taken = now_ns() - start;
    ask('s');
    return taken;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fail("arguments", "read|write BLOCKS BLOCK_BYTES");
    }
    is_read = strcmp(argv[1], "read") == 0;
    blocks = (uint32_t)strtoul(argv[2], NULL, 10);
    block_bytes = strtoull(argv[3], NULL, 10);
    total = blocks * block_bytes;
    for (int side = 0; side < 2; side++) {
        places[side] = malloc(blocks * sizeof(uint32_t));
        all_of(read, 0, places[side], blocks * sizeof(uint32_t), "places");
    }
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) {
        fail("socket pair", strerror(errno));
    }
    pid_t child = fork();
    if (child < 0) {
        fail("fork", strerror(errno));
    }
    other = pair[child == 0];
    close(pair[child != 0]);
    if (child == 0) {
        serve();
    }
    open_ucx();
    if (is_read) {
        memset(memory, POISON, total);
    } else {
        fill();
    }
    hear_where();
    char command;
    while (read(0, &command, 1) == 1) {
        uint64_t answer = 0, second = 0;
        uint32_t position = 0;
        switch (command) {
        case 'a':
            answer = total;
            second = move(0, blocks);
            break;
        case 'b':
            all_of(read, 0, &position, sizeof position, "position");
            if (position >= blocks) {
                fail("position", "too large");
            }
            answer = block_bytes;
            second = move(position, 1);
            break;
        case 'p':
            is_read ? (void)memset(memory, POISON, total) : (void)ask('p');
            break;
        case 'v':
            answer = is_read ? wrong(0) : ask('v');
            break;
        case 'c':
            answer = cpu_us();
            second = ask('c');
            break;
        default:
            fail("command", "unknown");
        }
        printf("ok %llu %llu\n", (unsigned long long)answer, (unsigned long long)second);
        fflush(stdout);
    }
    return 0;
}
