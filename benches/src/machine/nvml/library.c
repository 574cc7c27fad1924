/* A libnvidia-ml.so.1 for tests, of as many functions as are asked: which machine it describes is a macro.
 *   SWITCHED   two GPUs with 18 links each to switches, whose addresses are not told
 *   DIRECT     three GPUs without switches: 4 links join the first two, the third has none
 *   UNLOADED   no driver; SILENT: a driver that never answers
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, BAD_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_LOADED = 9, LOST = 15 };

#ifdef DIRECT
#define GPUS 4 /* The last one is lost. */
#else
#define GPUS 2
#endif

struct pci {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
};

struct bytes {
    unsigned long long total, free, used;
};

struct bytes_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

static long number(void *device) { return (long)device - 1; }

static int address(long gpu, struct pci *out) {
    memset(out, 0, sizeof *out);
    out->bus = 0x10 + (unsigned)gpu;
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
    return OK;
}

int nvmlInit_v2(void) {
#ifdef SILENT
    for (;;)
        pause();
#endif
#ifdef UNLOADED
    return NOT_LOADED;
#else
    return OK;
#endif
}

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    snprintf(out, length, "570.86.15");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = GPUS;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
#ifdef DIRECT
    if (index == 3)
        return LOST;
#endif
    *device = (void *)(long)(index + 1);
    return OK;
}

int nvmlDeviceGetPciInfo_v3(void *device, struct pci *out) { return address(number(device), out); }

int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *out) {
    (void)device;
    *out = 4;
    return OK;
}

int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *out) {
    *out = number(device) == 0 ? 16 : 8;
    return OK;
}

int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *out) {
    (void)device;
    *out = 5;
    return OK;
}

int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *out) {
    (void)device;
    *out = 16;
    return OK;
}

int nvmlDeviceGetBAR1MemoryInfo(void *device, struct bytes *out) {
    (void)device;
    out->total = 256ull << 20;
    return OK;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct bytes_v2 *out) {
    (void)device;
    out->total = 80ull << 30;
    return OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *later) {
    *now = *later = number(device) == 1;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *out) {
    /* Idle, and on the second GPU heat. */
    *out = number(device) == 1 ? 0x21 : 0x1;
    return OK;
}

int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *state) {
#ifdef DIRECT
    if (number(device) == 2 || link >= 6)
        return NOT_SUPPORTED;
    *state = link < 4;
#else
    if (link >= 18)
        return BAD_ARGUMENT;
    /* The second GPU has lost one. */
    *state = number(device) == 0 || link != 17;
#endif
    return OK;
}

int nvmlDeviceGetNvLinkVersion(void *device, unsigned link, unsigned *version) {
    (void)device, (void)link;
    *version = 4;
    return OK;
}

int nvmlDeviceGetNvLinkErrorCounter(void *device, unsigned link, unsigned counter,
                                    unsigned long long *out) {
    *out = number(device) == 1 && link == 2 ? counter + 1 : 0;
    return OK;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, struct pci *out) {
    (void)link;
#ifdef DIRECT
    return address(1 - number(device), out);
#else
    (void)device, (void)out;
    return NOT_SUPPORTED;
#endif
}

int nvmlDeviceGetP2PStatus(void *one, void *other, unsigned what, unsigned *status) {
    enum { READ = 0, NVLINK = 2, P2P_OK = 0, CHIPSET = 1, UNSUPPORTED = 5 };
#ifdef DIRECT
    int is_third = number(one) == 2 || number(other) == 2;
    *status = what == READ && is_third ? CHIPSET : is_third ? UNSUPPORTED : P2P_OK;
#else
    (void)one, (void)other;
    *status = what == READ || what == NVLINK ? P2P_OK : UNSUPPORTED;
#endif
    return OK;
}
