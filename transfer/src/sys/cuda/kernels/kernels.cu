// What a device does with bytes beside copying ranges: many small pieces at once, checksums, page layouts, 8-bit numbers.
//
// This is C that is CUDA, too. `scripts/cuda-kernels` compiles it to PTX; tests compile it with the system's C compiler (`host.h`) and
// compare what it does with Rust that does the same another way. So it must not contract or approximate: both are compiled without.
// After a change run `scripts/cuda-kernels`.

#ifdef __CUDACC_RTC__
#define KERNEL extern "C" __global__ void
#define INLINE static __device__ __forceinline__
#else
#include "host.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Threads of a warp. */
#define LANES 32
/* Threads of a block, at most. */
#define THREADS 256

INLINE u32 lane(void) { return threadIdx.x % LANES; }
INLINE u32 thread(void) { return blockIdx.x * blockDim.x + threadIdx.x; }
INLINE u32 threads(void) { return gridDim.x * blockDim.x; }
INLINE u32 warp(void) { return thread() / LANES; }
INLINE u32 warps(void) { return threads() / LANES; }

// Pieces.

/* One copy: two addresses that the device reaches, and how many bytes. */
struct piece {
    u64 target;
    u64 source;
    u64 bytes;
};

/* Loads that a thread has under way at once. */
#define DEPTH 4

/* Copies `count` units, of which a warp's threads take turns; both addresses are multiples of a unit. */
#define COPY_UNITS(name, unit)                                              \
    INLINE void name(u64 target, u64 source, u64 count)                     \
    {                                                                       \
        unit *to = (unit *)target;                                          \
        const unit *from = (const unit *)source;                            \
        u64 at = lane();                                                    \
        for (; at + (DEPTH - 1) * LANES < count; at += DEPTH * LANES) {     \
            unit a = from[at], b = from[at + LANES];                        \
            unit c = from[at + 2 * LANES], d = from[at + 3 * LANES];        \
            to[at] = a;                                                     \
            to[at + LANES] = b;                                             \
            to[at + 2 * LANES] = c;                                         \
            to[at + 3 * LANES] = d;                                         \
        }                                                                   \
        for (; at < count; at += LANES)                                     \
            to[at] = from[at];                                              \
    }

COPY_UNITS(copy_16, uint4)
COPY_UNITS(copy_8, u64)
COPY_UNITS(copy_4, u32)

INLINE void copy_1(u64 target, u64 source, u64 count)
{
    for (u64 at = lane(); at < count; at += LANES)
        ((u8 *)target)[at] = ((const u8 *)source)[at];
}

INLINE void copy_piece(struct piece p)
{
    u64 apart = p.target ^ p.source;
    u64 unit = apart % 16 == 0 ? 16 : apart % 8 == 0 ? 8 : apart % 4 == 0 ? 4 : 1;
    u64 head = (0 - p.target) % unit;
    head = head < p.bytes ? head : p.bytes;
    u64 units = (p.bytes - head) / unit;
    u64 done = head + units * unit;
    copy_1(p.target, p.source, head);
    if (unit == 16)
        copy_16(p.target + head, p.source + head, units);
    else if (unit == 8)
        copy_8(p.target + head, p.source + head, units);
    else if (unit == 4)
        copy_4(p.target + head, p.source + head, units);
    else
        copy_1(p.target, p.source, units);
    copy_1(p.target + done, p.source + done, p.bytes - done);
}

/* A warp for each piece, as wide as both addresses allow. Pieces that overlap land in no order. */
KERNEL kvf_copy_pieces(const struct piece *pieces, u32 count)
{
    for (u32 at = warp(); at < count; at += warps())
        copy_piece(pieces[at]);
}

// Page layouts.

/* Runs of `bytes`, as many as `counts` along three axes; each axis has a step on either side, in bytes. All numbers but the counts are
   multiples of 16. */
struct grid {
    u64 target;
    u64 source;
    u64 target_steps[3];
    u64 source_steps[3];
    u32 counts[3];
    u32 bytes;
};

/* Puts each run of a grid where it belongs: heads and tokens change places, or heads go to other ranks' pages. */
KERNEL kvf_rearrange(struct grid g)
{
    u64 units = g.bytes / 16;
    u64 all = (u64)g.counts[0] * g.counts[1] * g.counts[2] * units;
    for (u64 at = thread(); at < all; at += threads()) {
        u64 unit = at % units, run = at / units;
        u64 c = run % g.counts[2], b = run / g.counts[2] % g.counts[1], a = run / g.counts[2] / g.counts[1];
        u64 to = g.target + a * g.target_steps[0] + b * g.target_steps[1] + c * g.target_steps[2];
        u64 from = g.source + a * g.source_steps[0] + b * g.source_steps[1] + c * g.source_steps[2];
        ((uint4 *)to)[unit] = ((const uint4 *)from)[unit];
    }
}

// 8-bit numbers (E4M3 without infinities) with a scale for each group.

/* The largest number. */
#define E4M3_MAX 448.0f

/* What stands for no number, whatever it was made of: devices and processors make different ones. */
#define E4M3_NAN 0x7f
#define BF16_NAN 0x7fc0
#define FLOAT_NAN 0x7fc00000u

/* The nearest number, ties to even; what is too large becomes the largest. */
INLINE u8 e4m3_of(float value)
{
    u32 bits = __float_as_uint(value);
    u32 sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return E4M3_NAN;
    if (size >= 0x43e00000)
        return (u8)(sign | 0x7e);
    if (size < 0x3c800000) {
        /* Below the smallest exponent all steps are 2^-9, as those of a float near 2^14: the addition rounds. */
        u32 steps = __float_as_uint(__uint_as_float(size) + 16384.0f) - __float_as_uint(16384.0f);
        return (u8)(sign | steps);
    }
    size += 0x7ffff + (size >> 20 & 1);
    return (u8)(sign | (size - (120u << 23)) >> 20);
}

INLINE float of_e4m3(u8 number)
{
    u32 sign = (u32)(number & 0x80) << 24, size = number & 0x7f;
    if (size == 0x7f)
        return __uint_as_float(FLOAT_NAN);
    if (size < 8)
        return __uint_as_float(sign | __float_as_uint((float)size * 0.001953125f));
    return __uint_as_float(sign | ((size << 20) + (120u << 23)));
}

/* The nearest bfloat16, ties to even. */
INLINE u16 bf16_of(float value)
{
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return BF16_NAN;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float of_bf16(u16 number) { return __uint_as_float((u32)number << 16); }

/* A warp for each group of `length` bfloat16: its scale is its largest size over E4M3_MAX, its numbers are divided by that. A group of
   zeros has the scale 0; one with an infinity, or with something that is no number, keeps none of its numbers. */
KERNEL kvf_to_e4m3(u8 *to, float *scales, const u16 *from, u32 groups, u32 length)
{
    for (u32 group = warp(); group < groups; group += warps()) {
        const u16 *of = from + (u64)group * length;
        u32 largest = 0;
        for (u32 at = lane(); at < length; at += LANES) {
            u32 size = of[at] & 0x7fff;
            largest = size > largest ? size : largest;
        }
        for (u32 step = LANES / 2; step > 0; step /= 2) {
            u32 other = __shfl_xor_sync(0xffffffff, largest, step);
            largest = other > largest ? other : largest;
        }
        float scale = largest > 0x7f80 ? __uint_as_float(FLOAT_NAN) : of_bf16((u16)largest) / E4M3_MAX;
        if (lane() == 0)
            scales[group] = scale;
        for (u32 at = lane(); at < length; at += LANES)
            to[(u64)group * length + at] = largest == 0 ? 0 : e4m3_of(of_bf16(of[at]) / scale);
    }
}

KERNEL kvf_of_e4m3(u16 *to, const u8 *from, const float *scales, u32 groups, u32 length)
{
    u64 all = (u64)groups * length;
    for (u64 at = thread(); at < all; at += threads())
        to[at] = bf16_of(of_e4m3(from[at]) * scales[at / length]);
}

// CRC-32C.

/* The polynomial, its highest power first, as the lowest bit. */
#define CRC_POLYNOMIAL 0x82f63b78u

/* Bytes that a thread takes. */
#define CRC_SEGMENT 1024

/* What a remainder begins with, and is changed by at the end. */
#define CRC_ONES 0xffffffffu

/* Remainders of bytes, four of them at a time. Filled by kvf_crc_table. */
struct crc_table {
    u32 of[4][256];
};

/* 256 threads make it, each for one byte. */
KERNEL kvf_crc_table(struct crc_table *table)
{
    u32 byte = thread();
    if (byte >= 256)
        return;
    u32 rest = byte;
    for (u32 place = 0; place < 4; place++) {
        for (u32 bit = 0; bit < 8; bit++)
            rest = rest >> 1 ^ (rest & 1 ? CRC_POLYNOMIAL : 0);
        table->of[place][byte] = rest;
    }
}

INLINE u32 crc_byte(const struct crc_table *table, u32 crc, u8 byte) { return crc >> 8 ^ table->of[0][(crc ^ byte) & 0xff]; }

INLINE u32 crc_word(const struct crc_table *table, u32 crc, u32 word)
{
    crc ^= word;
    return table->of[3][crc & 0xff] ^ table->of[2][crc >> 8 & 0xff] ^ table->of[1][crc >> 16 & 0xff] ^ table->of[0][crc >> 24];
}

/* The remainder of `count` bytes, from nothing. */
INLINE u32 crc_bytes(const struct crc_table *table, const u8 *from, u64 count)
{
    u32 crc = 0;
    for (; count > 0 && (u64)from % 16 != 0; count--)
        crc = crc_byte(table, crc, *from++);
    for (; count >= 16; count -= 16, from += 16) {
        uint4 words = *(const uint4 *)from;
        crc = crc_word(table, crc, words.x);
        crc = crc_word(table, crc, words.y);
        crc = crc_word(table, crc, words.z);
        crc = crc_word(table, crc, words.w);
    }
    for (; count > 0; count--)
        crc = crc_byte(table, crc, *from++);
    return crc;
}

/* The product of two polynomials, modulo ours. */
INLINE u32 crc_times(u32 a, u32 b)
{
    u32 product = 0;
    for (u32 bit = 0; bit < 32; bit++) {
        product ^= b & (0 - (a >> 31));
        a <<= 1;
        b = b >> 1 ^ (b & 1 ? CRC_POLYNOMIAL : 0);
    }
    return product;
}

/* x to the power of 8 times `bytes`: what so many bytes that follow do to a remainder. */
INLINE u32 crc_shift(u64 bytes)
{
    u32 power = 0x80000000u, square = 0x00800000u;
    for (; bytes > 0; bytes >>= 1) {
        if (bytes & 1)
            power = crc_times(power, square);
        square = crc_times(square, square);
    }
    return power;
}

/* A range whose checksum is wanted, and how many segments the ranges before it have. */
struct crc_range {
    u64 start;
    u64 bytes;
    u64 first;
};

/* The position of the range that a segment is of. */
INLINE u32 crc_owner(const struct crc_range *ranges, u32 count, u64 segment)
{
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (ranges[middle].first <= segment)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* A thread for each segment of each range: moves its remainder to where it stands in the range, and adds it to the range's. The checksum
   is the sum of all, so the order does not matter. `sums` are zero before. No range is empty; `segments` is of all ranges together. */
KERNEL kvf_crc_ranges(const struct crc_table *table, const struct crc_range *ranges, u32 count, u32 *sums, u64 segments)
{
    for (u64 at = thread(); at < segments; at += threads()) {
        u32 owner = crc_owner(ranges, count, at);
        struct crc_range range = ranges[owner];
        u64 begin = (at - range.first) * CRC_SEGMENT;
        u64 left = range.bytes - begin;
        u64 own = left < CRC_SEGMENT ? left : CRC_SEGMENT;
        u32 rest = crc_bytes(table, (const u8 *)(range.start + begin), own);
        u32 part = crc_times(rest, crc_shift(left - own));
        if (begin == 0)
            part ^= crc_times(CRC_ONES, crc_shift(range.bytes)) ^ CRC_ONES;
        atomicXor(&sums[owner], part);
    }
}
