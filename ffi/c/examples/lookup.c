/*
 * Asks an index which pods hold a prompt: `lookup HOST:PORT TOKEN_COUNT`. The prompt is the tokens 0, 1, 2, ...
 * Prints one line for each pod, and how many there are.
 */
#include <stdio.h>
#include <stdlib.h>

#include "kvfabric.h"

enum {
    PODS_MAX = 16,
    TOKENS_MAX = 1 << 20,
    DEADLINE_MS = 2000,
};

static int complain(const char *what, kvf_status status)
{
    fprintf(stderr, "lookup: %s: %s (%s)\n", what, kvf_last_error(), kvf_status_name(status));
    return 1;
}

int main(int argc, char **argv)
{
    unsigned long count = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    if (count == 0 || count > TOKENS_MAX) {
        fprintf(stderr, "usage: lookup HOST:PORT TOKEN_COUNT\n");
        return 2;
    }
    uint32_t *tokens = malloc(count * sizeof *tokens);
    if (tokens == NULL) {
        return 1;
    }
    for (unsigned long i = 0; i < count; i++) {
        tokens[i] = (uint32_t)i;
    }

    kvf_index *index = NULL;
    kvf_status status = kvf_index_connect(argv[1], DEADLINE_MS, &index);
    if (status != KVF_OK) {
        free(tokens);
        return complain("connect", status);
    }
    static struct kvf_pod_depth pods[PODS_MAX];
    struct kvf_lookup_summary summary = {0};
    status = kvf_index_lookup(index, tokens, count, NULL, pods, PODS_MAX, &summary);
    free(tokens);
    if (status != KVF_OK) {
        kvf_index_free(index);
        return complain("ask", status);
    }
    for (size_t i = 0; i < summary.pods; i++) {
        printf("%s: %u of %u blocks (%u %u %u %u), score %.2f, peers at \"%s\"\n", pods[i].pod,
               pods[i].depth, summary.blocks, pods[i].by_tier[0], pods[i].by_tier[1],
               pods[i].by_tier[2], pods[i].by_tier[3], pods[i].score, pods[i].peer_address);
    }
    printf("%zu pods\n", summary.pods);
    kvf_index_free(index);
    return 0;
}
