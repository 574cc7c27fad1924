/* All kernels for the processor, by name, with their arguments as cuLaunchKernel has them. */

#include "kernels.cu"

#define ARGUMENT(type, at) (*(type *)arguments[at])

static void call_copy_pieces(void **arguments)
{
    kvf_copy_pieces(ARGUMENT(const struct piece *, 0), ARGUMENT(u32, 1));
}

static void call_rearrange(void **arguments) { kvf_rearrange(ARGUMENT(struct grid, 0)); }

static void call_to_e4m3(void **arguments)
{
    kvf_to_e4m3(ARGUMENT(u8 *, 0), ARGUMENT(float *, 1), ARGUMENT(const u16 *, 2), ARGUMENT(u32, 3), ARGUMENT(u32, 4));
}

static void call_of_e4m3(void **arguments)
{
    kvf_of_e4m3(ARGUMENT(u16 *, 0), ARGUMENT(const u8 *, 1), ARGUMENT(const float *, 2), ARGUMENT(u32, 3), ARGUMENT(u32, 4));
}

static void call_crc_table(void **arguments) { kvf_crc_table(ARGUMENT(struct crc_table *, 0)); }

static void call_crc_ranges(void **arguments)
{
    kvf_crc_ranges(ARGUMENT(const struct crc_table *, 0), ARGUMENT(const struct crc_range *, 1), ARGUMENT(u32, 2),
                   ARGUMENT(u32 *, 3), ARGUMENT(u64, 4));
}

static const struct {
    const char *name;
    kvf_call call;
} kernels[] = {
    {"kvf_copy_pieces", call_copy_pieces}, {"kvf_rearrange", call_rearrange}, {"kvf_to_e4m3", call_to_e4m3},
    {"kvf_of_e4m3", call_of_e4m3},         {"kvf_crc_table", call_crc_table}, {"kvf_crc_ranges", call_crc_ranges},
};

/* 0, or what went wrong. */
int kvf_host_launch(const char *name, unsigned blocks, unsigned threads, void **arguments)
{
    for (size_t at = 0; at < sizeof kernels / sizeof *kernels; at++)
        if (strcmp(kernels[at].name, name) == 0)
            return kvf_launch(kernels[at].call, blocks, threads, arguments);
    return 3;
}
