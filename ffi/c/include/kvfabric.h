/*
 * kvfabric: moves and finds the KV cache of LLM inference engines.
 *
 * Every call answers a kvf_status. An output is written only when that is KVF_OK; the one exception is the length that
 * a call writes when a buffer is too small, and it is named there. A null argument, where the call does not allow
 * it, is KVF_INVALID. kvf_last_error() tells more about the last failure in this thread.
 *
 * Handles may be used from any thread, and by several at once. They look like pointers and are none: one that was freed, one of
 * another type and any other value answer KVF_INVALID. Freeing a handle that another thread uses takes effect when that
 * call ends. A handle keeps alive what it was made from. Every kvf_..._free accepts NULL.
 *
 * After an internal failure all handles of the same agent, node or index answer KVF_INTERNAL and are leaked by free, so that
 * no memory is given back that may still be in use. In a forked child every handle of the parent answers KVF_FORKED.
 *
 * Structures that begin with `size` grow with later versions: set it to the sizeof of the structure, and zero what you do
 * not set. Reserved fields must be zero.
 */

#ifndef KVFABRIC_H
#define KVFABRIC_H

/* Generated from ffi/c/src by cbindgen; change it there. */

#include <stddef.h>
#include <stdint.h>

/*
 All parts of a transfer.
 */
#define KVF_ALL_PARTS 4294967295

/*
 What a number is set to where zero stands for the default, and nothing at all is wanted.
 */
#define KVF_OFF 4294967295

/*
 Peers that have the metadata may read a region.
 */
#define KVF_ACCESS_REMOTE_READ 1

/*
 Peers that have the metadata may write to a region.
 */
#define KVF_ACCESS_REMOTE_WRITE 2

/*
 Where it can be, the page cache is passed by, or used on the way of what is not aligned.
 */
#define KVF_DIRECT_AUTO 0

/*
 The page cache is passed by, or the file is refused.
 */
#define KVF_DIRECT_ON 1

/*
 All goes through the page cache.
 */
#define KVF_DIRECT_OFF 2

/*
 io_uring, or threads where the system refuses that.
 */
#define KVF_FILES_AUTO 0

/*
 io_uring.
 */
#define KVF_FILES_URING 1

/*
 Threads that read and write one range at a time.
 */
#define KVF_FILES_THREADS 2

/*
 An object that is there is replaced, at once and whole.
 */
#define KVF_OBJECT_REPLACE 0

/*
 A write fails with KVF_DENIED when the object is there.
 */
#define KVF_OBJECT_CREATE 1

/*
 An object of the same size stays, and a write of it is done without sending anything.
 */
#define KVF_OBJECT_KEEP 2

/*
 SHA-256 goes with each write to S3 for the store to check.
 */
#define KVF_OBJECT_SHA256 0

/*
 CRC-64/NVME does.
 */
#define KVF_OBJECT_CRC64NVME 1

/*
 Nothing does, for stores that refuse it.
 */
#define KVF_OBJECT_UNCHECKED 2

/*
 By cuFile where that goes past host memory ([`kvf_cuda_options::storage`]).
 */
#define KVF_STORAGE_DIRECT 1

/*
 By cuFile wherever it takes a file ([`kvf_cuda_options::storage`]).
 */
#define KVF_STORAGE_CUFILE 2

/*
 What is faster is measured ([`kvf_cuda_options::fragments_bytes`]).
 */
#define KVF_MEASURED 4294967295

/*
 Bytes that the name of a path has room for, with its terminating NUL.
 */
#define KVF_PATH_CAPACITY 32

/*
 Bytes that the name of a counter has room for, with its terminating NUL.
 */
#define KVF_STAT_NAME_CAPACITY 56

/*
 Bytes of a model identity as text, with its terminating NUL.
 */
#define KVF_IDENTITY_CAPACITY 65

/*
 Bytes of a block's key.
 */
#define KVF_KEY_BYTES 32

/*
 Bytes that a name in an answer has room for, with its terminating NUL.
 */
#define KVF_NAME_CAPACITY 328

/*
 What became of a call. Numbers are never reused.
 */
enum kvf_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     It succeeded.
     */
    KVF_OK = 0,
    /*
     An argument is malformed; repeating the call cannot help.
     */
    KVF_INVALID = 1,
    /*
     A limit is reached, or something is still in flight; try again after completions.
     */
    KVF_BUSY = 2,
    /*
     Bytes do not match their checksum, length or version; drop this copy.
     */
    KVF_CORRUPT = 3,
    /*
     The peer is gone; other holders may do.
     */
    KVF_PEER_LOST = 4,
    /*
     This backend or build cannot do it, here or ever.
     */
    KVF_UNSUPPORTED = 5,
    /*
     The deadline passed first.
     */
    KVF_TIMEOUT = 6,
    /*
     The caller withdrew the request.
     */
    KVF_CANCELLED = 7,
    /*
     The other side speaks another version; both are named.
     */
    KVF_VERSION = 8,
    /*
     A disk, arena or store is full.
     */
    KVF_NO_SPACE = 9,
    /*
     The other side does not allow it: a wrong key, a stranger, read-only memory.
     */
    KVF_DENIED = 10,
    /*
     Something that this depends on became unusable.
     */
    KVF_POISONED = 11,
    /*
     What was named does not exist.
     */
    KVF_NOT_FOUND = 12,
    /*
     The operating system or a store refused.
     */
    KVF_IO = 13,
    /*
     The call was made in a forked child.
     */
    KVF_FORKED = 14,
    /*
     A promise of the library was broken; please report it.
     */
    KVF_INTERNAL = 15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_status kvf_status;
#else
typedef uint32_t kvf_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where a transfer stands.
 */
enum kvf_state
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Not posted.
     */
    KVF_IDLE = 0,
    /*
     Posted, not finished.
     */
    KVF_IN_FLIGHT = 1,
    /*
     Finished; it may be posted again.
     */
    KVF_DONE = 2,
    /*
     Failed; kvf_transfer_wait says why. It may be posted again once its memory is settled.
     */
    KVF_FAILED = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_state kvf_state;
#else
typedef uint32_t kvf_state;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 What may be done with the memory of a transfer.
 */
enum kvf_fate
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     No byte of it is in use: the memory may be reused. After a failed write the target's bytes are unspecified.
     */
    KVF_SETTLED = 0,
    /*
     Work may still land: keep the memory as it is.
     */
    KVF_MEMORY_IN_FLIGHT = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_fate kvf_fate;
#else
typedef uint32_t kvf_fate;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where a task stands.
 */
enum kvf_task_state
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Not finished.
     */
    KVF_TASK_RUNNING = 0,
    /*
     Finished: its report can be asked for.
     */
    KVF_TASK_DONE = 1,
    /*
     Failed; kvf_task_wait says why.
     */
    KVF_TASK_FAILED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_task_state kvf_task_state;
#else
typedef uint32_t kvf_task_state;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Which way bytes go, seen from the one who asks.
 */
enum kvf_operation
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     From the remote side into local memory.
     */
    KVF_READ = 1,
    /*
     From local memory to the remote side.
     */
    KVF_WRITE = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_operation kvf_operation;
#else
typedef uint32_t kvf_operation;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Who goes first where transfers wait for each other.
 */
enum kvf_priority
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Someone waits for it.
     */
    KVF_NORMAL = 0,
    /*
     Gives way to the others, such as an offload.
     */
    KVF_BACKGROUND = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_priority kvf_priority;
#else
typedef uint32_t kvf_priority;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where a block came from.
 */
enum kvf_source
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Nowhere in time: compute it. Its memory may have been written to.
     */
    KVF_SOURCE_MISS = 0,
    /*
     The node's host memory.
     */
    KVF_SOURCE_HOST = 1,
    /*
     The node's disk.
     */
    KVF_SOURCE_DISK = 2,
    /*
     Another pod.
     */
    KVF_SOURCE_PEER = 3,
    /*
     The shared object store.
     */
    KVF_SOURCE_OBJECT = 4,
    /*
     A slot of the node's HBM tier.
     */
    KVF_SOURCE_HBM = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_source kvf_source;
#else
typedef uint32_t kvf_source;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where an engine has blocks of its own.
 */
enum kvf_tier
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     The accelerator's memory.
     */
    KVF_TIER_DEVICE = 0,
    /*
     Host memory.
     */
    KVF_TIER_HOST = 1,
    /*
     A local disk.
     */
    KVF_TIER_DISK = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum kvf_tier kvf_tier;
#else
typedef uint32_t kvf_tier;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Moves bytes between registered memory of this process and its peers.
 */
typedef struct kvf_agent kvf_agent;

/*
 A connection to an index.
 */
typedef struct kvf_index kvf_index;

/*
 Byte ranges, by position from 0, of this agent's regions or of one peer's.
 */
typedef struct kvf_list kvf_list;

/*
 The names of a growing sequence's blocks, from its first.
 */
typedef struct kvf_names kvf_names;

/*
 Keeps blocks in host memory, on disk and in a shared store, reads those of its peers, and tells the index.
 */
typedef struct kvf_node kvf_node;

/*
 An engine's paged memory. Its regions must stay registered as long as blocks in it are stored or fetched.
 */
typedef struct kvf_pages kvf_pages;

/*
 Another agent, in this process or elsewhere.
 */
typedef struct kvf_peer kvf_peer;

/*
 The full blocks of a sequence from its first, or a run of blocks that an engine has named.
 */
typedef struct kvf_prefix kvf_prefix;

/*
 Publishes an engine's events, and keeps its pod registered with the index.
 */
typedef struct kvf_publisher kvf_publisher;

/*
 A range of memory that transfers may name, in a region that it may share with others.
 */
typedef struct kvf_range kvf_range;

/*
 Memory that transfers may name.
 */
typedef struct kvf_region kvf_region;

/*
 A connection to a node's peer service.
 */
typedef struct kvf_service kvf_service;

/*
 Work in progress, on a node or at a peer service. Giving the handle back stops nothing.
 */
typedef struct kvf_task kvf_task;

/*
 A transfer, which can be posted any number of times, once at a time.
 */
typedef struct kvf_transfer kvf_transfer;

/*
 Files in PEM of what TLS needs. They are read when the agent is made.
 */
typedef struct kvf_tls_options {
    /*
     sizeof(struct kvf_tls_options).
     */
    size_t size;
    /*
     The path of the certificates of the authorities that peers' must come from.
     */
    const char *authorities;
    /*
     The path of the agent's certificate, which has its name as a DNS name, and of those between it and the authority.
     */
    const char *certificates;
    /*
     The path of the key of the agent's certificate.
     */
    const char *key;
} kvf_tls_options;

/*
 One setting of a node's configuration, such as "host.bytes" = "1073741824", or of UCX.
 */
typedef struct kvf_setting {
    /*
     The key as in the configuration file, with a dot between a table and its key; UCX has no tables.
     */
    const char *key;
    /*
     Its value, as text.
     */
    const char *value;
} kvf_setting;

/*
 How RDMA is used. With all of it zero it is what is right for most networks.
 */
typedef struct kvf_verbs_options {
    /*
     sizeof(struct kvf_verbs_options).
     */
    size_t size;
    /*
     The ports that may be used, with commas between them, each a device, "mlx5_0", or device and port, "mlx5_0:2"; NULL: of
     those that are up all that are as near as the nearest one.
     */
    const char *device;
    /*
     Where peers ask for connections, by TCP, "IP:PORT"; NULL: the IP addresses of the GIDs and any free port. On InfiniBand,
     whose GIDs are no addresses, it must be said.
     */
    const char *listen;
    /*
     1: `gid_index` is the entry of each port's GID table; 0: RoCE v2 with an IPv4 address first, then RoCE v2, then any.
     */
    uint32_t has_gid_index;
    /*
     At most 255.
     */
    uint32_t gid_index;
    /*
     The most bytes of content in a packet: 256, 512, 1024, 2048 or 4096; 0: what both ports do.
     */
    uint32_t mtu;
    /*
     The traffic class of packets, at most 255; in RoCE v2 its upper six bits are the DSCP.
     */
    uint32_t traffic_class;
    /*
     The service level, at most 15.
     */
    uint32_t service_level;
    /*
     A packet that is not acknowledged is sent again after 4.096 microseconds times two to the power of this, at most
     31; 0: 14.
     */
    uint32_t timeout;
    /*
     How often it is sent again before the peer is given up, at most 7; 0: 7; KVF_OFF: never.
     */
    uint32_t retries;
    /*
     How long the agent's thread looks for completions before it sleeps, while work is under way; 0: 20; KVF_OFF: it sleeps
     at once.
     */
    uint32_t polling_us;
    /*
     What ports should be near to: the PCI address of a device, "0000:3b:00.0" for a GPU; NULL: the memory node whose
     processors alone this process may use, if it is bound to one.
     */
    const char *near;
    /*
     How many ports are used at most, the nearest first, at most 8; 0: 4. Large requests go over all of them.
     */
    uint32_t rails;
    /*
     How queue pairs are connected, the same on both sides: "exchange", by what both tell each other over TCP, or "rdma_cm",
     through librdmacm, which must be in the system then: the kernel finds the way between IP addresses; NULL: "exchange".
     */
    const char *connect;
} kvf_verbs_options;

/*
 How an object store is reached. What is NULL comes from the usual environment variables of its kind of store (AWS_...,
 GOOGLE_..., AZURE_...), and credentials after that from the instance.
 */
typedef struct kvf_object_store {
    /*
     sizeof(struct kvf_object_store).
     */
    size_t size;
    /*
     What kvf_region_open_object calls it.
     */
    const char *name;
    /*
     "file:///directory" (made when missing), "s3://bucket/prefix", "gs://bucket/prefix" or "az://container/prefix".
     */
    const char *url;
    /*
     The service's URL, when it is not the provider's own.
     */
    const char *endpoint;
    /*
     S3: the region to sign for.
     */
    const char *region;
    /*
     Who we are. S3: the id of the access key; Azure: the storage account.
     */
    const char *access_key;
    /*
     Proves it. S3: the secret key; GCS: the JSON of a service account's key; Azure: the account's key. Never logged.
     */
    const char *secret_key;
    /*
     S3: what belongs to temporary credentials; GCS and Azure: a bearer token. Never logged.
     */
    const char *session_token;
    /*
     PEM file of authorities that are believed beside the system's; NULL: none.
     */
    const char *authorities;
    /*
     Longer objects are written and read in parts of so many bytes, 5 MiB to 256 MiB; 0: 16 MiB.
     */
    uint64_t part_bytes;
    /*
     1: an endpoint without TLS is accepted; 0: it is not.
     */
    uint32_t allow_http;
    /*
     A KVF_OBJECT_ checksum: what goes with each write to S3 for the store to check.
     */
    uint32_t checksum;
    /*
     Parts of one object at once, at most 64; 0: 4.
     */
    uint32_t parts_in_flight;
    /*
     Requests to the store at once, at most 1,024; 0: 32.
     */
    uint32_t requests_in_flight;
    /*
     How long one attempt may go without an answer or a byte; 0: 10,000.
     */
    uint32_t attempt_timeout_ms;
    /*
     How often a failed attempt is repeated; 0: 3; KVF_OFF: never.
     */
    uint32_t retries;
} kvf_object_store;

/*
 How CUDA devices are used. With all of it zero it is what is right for most machines.
 */
typedef struct kvf_cuda_options {
    /*
     sizeof(struct kvf_cuda_options).
     */
    size_t size;
    /*
     Bytes of pinned buffers for each device, a multiple of 1 MiB, up to 1 GiB; 0: 16 MiB.
     */
    uint64_t staging_bytes;
    /*
     1: host memory is not pinned, and goes through those buffers; 0: all memory of a region is, when a transfer first names it
     beside a device's.
     */
    uint32_t no_pin;
    /*
     How long the device's thread looks whether copies are done before it sleeps in between, at most 10,000; 0: 20; KVF_OFF: it
     sleeps at once.
     */
    uint32_t polling_us;
    /*
     Ranges of up to so many bytes, of which a transfer has several, are copied by a kernel, many in one launch; 0: the driver
     copies all; KVF_MEASURED: whoever was faster when memory of the device was first registered.
     */
    uint32_t fragments_bytes;
    /*
     1: peers of this machine do not open memory of devices that is exported to them, nor this agent theirs; 0: they do, and
     devices copy.
     */
    uint32_t no_peers;
    /*
     Bytes of pinned memory for each device through which transfers with files, objects and peers go: a multiple of 1 MiB, from
     2 MiB to 1 GiB; 0: 16 MiB.
     */
    uint64_t window_bytes;
    /*
     How bytes go between memory of devices and files. 0: through pinned host memory; KVF_STORAGE_DIRECT: by cuFile (GPUDirect
     Storage) where it says that no copy of them is in host memory, which takes that its compatibility mode is off, and as for 0
     elsewhere; KVF_STORAGE_CUFILE: by cuFile wherever it takes a file, also where it may take them through host memory.
     */
    uint32_t storage;
    /*
     Threads that wait in cuFile, where that is used, at most 256; 0: 16.
     */
    uint32_t storage_threads;
} kvf_cuda_options;

/*
 How an agent is made.
 */
typedef struct kvf_agent_options {
    /*
     sizeof(struct kvf_agent_options).
     */
    size_t size;
    /*
     How peers know it.
     */
    const char *name;
    /*
     Where TCP is served, "127.0.0.1:0" for any free port; NULL: TCP is not used. Without `tls` traffic is neither encrypted
     nor authenticated beyond region keys: stay on loopback or a trusted network.
     */
    const char *tcp_listen;
    /*
     1: peers on this host are reached through shared memory; 0: they are not.
     */
    uint32_t shm;
    /*
     1: memory that cannot be shared is copied by the system between processes of one user on this host; 0: it is not.
     */
    uint32_t cma;
    /*
     1: peers are reached over UCX, which must be in the system then and takes its settings from the environment
     (UCX_TLS and others); 0: they are not. For trusted networks only.
     */
    uint32_t ucx;
    /*
     The congestion control of TCP connections, such as "cubic" or "bbr"; NULL: the system's.
     */
    const char *tcp_congestion;
    /*
     The ways to peers that go first, by name and the best first: "tcp" or "tcp,shm"; NULL: the usual order.
     */
    const char *prefer;
    /*
     How many threads share a copy of 8 MiB or more within the process, at most 16; 0: half of the processors, at most 4.
     */
    uint32_t copy_threads;
    /*
     The address that peers are told, where it differs from `tcp_listen`, as it must when that is unspecified; NULL: it does
     not.
     */
    const char *tcp_advertise;
    /*
     Further addresses to serve TCP on, at most 15, those of other network cards: "10.0.1.5:0,10.0.2.5:0". Peers are told
     all of them, and spread their connections over them. NULL: none.
     */
    const char *tcp_rails;
    /*
     Encrypts all TCP connections with TLS 1.3, and has both sides show certificates; NULL: neither.
     */
    const struct kvf_tls_options *tls;
    /*
     Settings of UCX by their names without "UCX_", such as "TLS"; others come from the environment. NULL: none.
     */
    const struct kvf_setting *ucx_settings;
    /*
     How many.
     */
    size_t ucx_setting_count;
    /*
     Reaches peers by RDMA, with libibverbs and a device of this system, and lets them reach this agent; NULL: not at all.
     For trusted networks only.
     */
    const struct kvf_verbs_options *verbs;
    /*
     Only agents of these names may connect; NULL: all that know a region's key.
     */
    const char *const *allow_peers;
    /*
     How many.
     */
    size_t allow_peer_count;
    /*
     How many TCP connections are made to a peer, at most 16, over which large transfers are striped; at least one to each
     of its addresses. 0: 1.
     */
    uint32_t tcp_connections;
    /*
     How long those who wait for a transfer or a message look for it before they sleep, at most 1,000, as long as that
     pays; 0: 50; KVF_OFF: they sleep at once.
     */
    uint32_t look_us;
    /*
     How long a way to a peer may stand still before what can be repeated goes another way; 0: 2,000; KVF_OFF: for ever.
     */
    uint32_t slow_after_ms;
    /*
     1: agents of this process are reached as those of other processes are; 0: by plain copies.
     */
    uint32_t no_memcpy;
    /*
     How long each way to a peer may take to connect, and over RDMA and UCX the peer to hand out a region, at most 60,000;
     0: 2,000. Ways are tried one after the other, so where a peer does not answer this delays the next one.
     */
    uint32_t connect_within_ms;
    /*
     Zero.
     */
    uint32_t reserved;
    /*
     Object stores for kvf_region_open_object; NULL: none.
     */
    const struct kvf_object_store *const *object_stores;
    /*
     How many.
     */
    size_t object_store_count;
    /*
     Copies between host memory and memory of GPUs, and within a GPU, with the CUDA driver of this system; NULL: not at all.
     */
    const struct kvf_cuda_options *cuda;
} kvf_agent_options;

/*
 How a file is opened. With all of it zero: a file that is there, of its length now.
 */
typedef struct kvf_file_options {
    /*
     sizeof(struct kvf_file_options).
     */
    size_t size;
    /*
     Its length as a region, in bytes; a shorter file is extended. 0: its length now.
     */
    uint64_t len;
    /*
     1: it is made when it is missing; 0: it is not.
     */
    uint32_t create;
    /*
     1: writes are refused; 0: they are not.
     */
    uint32_t read_only;
    /*
     1: the space of `len` is reserved at once, so that a full disk shows here; 0: it is not.
     */
    uint32_t preallocate;
    /*
     A KVF_DIRECT_ value.
     */
    uint32_t direct;
} kvf_file_options;

/*
 A region that a peer exports.
 */
typedef struct kvf_remote_region {
    /*
     Its number in descriptors.
     */
    uint64_t id;
    /*
     Its bytes.
     */
    uint64_t len;
} kvf_remote_region;

/*
 A byte range of a region.
 */
typedef struct kvf_descriptor {
    /*
     The region's kvf_region_id.
     */
    uint64_t region;
    /*
     Bytes from the region's start.
     */
    uint64_t offset;
    /*
     How many bytes; not 0.
     */
    uint64_t len;
} kvf_descriptor;

/*
 Byte ranges of one length at equal steps in a region. Range n begins at `offset` + n * `stride`.
 */
typedef struct kvf_strided {
    /*
     The region's kvf_region_id.
     */
    uint64_t region;
    /*
     Bytes from the region's start to the first range.
     */
    uint64_t offset;
    /*
     Bytes of each range; not 0.
     */
    uint64_t len;
    /*
     Bytes from the start of one range to the start of the next.
     */
    uint64_t stride;
    /*
     How many ranges; not 0.
     */
    uint32_t count;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_strided;

/*
 What a transfer does.
 */
typedef struct kvf_transfer_options {
    /*
     sizeof(struct kvf_transfer_options).
     */
    size_t size;
    /*
     A kvf_operation.
     */
    uint32_t operation;
    /*
     Counted from the post, after which the transfer fails with KVF_TIMEOUT; 0: 30 seconds.
     */
    uint32_t deadline_ms;
    /*
     Delivered to the peer once all bytes are in place; NULL: nothing is.
     */
    const void *notification;
    /*
     Its bytes, at most 65,536.
     */
    size_t notification_len;
    /*
     How many pairs of ranges each part has, together all of them; NULL: one part. Parts move in order, and each can be
     waited for with kvf_transfer_wait_part.
     */
    const uint32_t *parts;
    /*
     How many parts, at most 4,096; 0: one.
     */
    size_t part_count;
    /*
     A kvf_priority.
     */
    uint32_t priority;
    /*
     1: the CRC-32C of each range is compared, in the memory where it was and in that where it arrived, before the transfer
     counts as done; KVF_CORRUPT names the range that differs. 0: it is not.
     */
    uint32_t checksum;
    /*
     The ways that may be used, by name: "shm" or "shm,tcp"; NULL: all.
     */
    const char *backends;
} kvf_transfer_options;

/*
 What a post would take now.
 */
typedef struct kvf_estimate {
    /*
     sizeof(struct kvf_estimate), set by the caller.
     */
    size_t size;
    /*
     From the post to its end, in nanoseconds, if nothing else is in its way.
     */
    uint64_t expected_ns;
    /*
     1: transfers of about this size have shown it; 0: it is what the way is taken to cost.
     */
    uint32_t measured;
    /*
     Zero.
     */
    uint32_t reserved;
    /*
     The way that it would go, such as "shm".
     */
    char path[KVF_PATH_CAPACITY];
} kvf_estimate;

/*
 What a post took.
 */
typedef struct kvf_telemetry {
    /*
     sizeof(struct kvf_telemetry), set by the caller.
     */
    size_t size;
    /*
     When it was posted, in nanoseconds since the agent was made.
     */
    uint64_t posted_ns;
    /*
     How long the call that posted it took. A small copy is done within it.
     */
    uint64_t post_ns;
    /*
     From the post to its end.
     */
    uint64_t transfer_ns;
    /*
     Bytes moved.
     */
    uint64_t bytes;
    /*
     Pairs of ranges that were moved, before neighbours were merged.
     */
    uint32_t descriptors;
    /*
     How often it, or a piece of it, was tried again after a failure.
     */
    uint32_t failovers;
    /*
     What moved them, such as "shm".
     */
    char path[KVF_PATH_CAPACITY];
} kvf_telemetry;

/*
 Where a node's configuration comes from: a text or a file, then variables KVFABRIC_NODE_..., then settings; the later
 one wins.
 */
typedef struct kvf_node_options {
    /*
     sizeof(struct kvf_node_options).
     */
    size_t size;
    /*
     TOML with the keys of docs/configuration.md; NULL for none.
     */
    const char *toml;
    /*
     The path of such a file; NULL for none. Not both.
     */
    const char *file;
    /*
     What overrides everything else; NULL for nothing.
     */
    const struct kvf_setting *settings;
    /*
     How many.
     */
    size_t setting_count;
} kvf_node_options;

/*
 A counter or a level of a node; docs/metrics.md says what each means.
 */
typedef struct kvf_stat {
    /*
     Its name, with a terminating NUL.
     */
    char name[KVF_STAT_NAME_CAPACITY];
    /*
     Its value.
     */
    uint64_t value;
} kvf_stat;

/*
 Which sequences these names are of.
 */
typedef struct kvf_names_options {
    /*
     sizeof(struct kvf_names_options).
     */
    size_t size;
    /*
     The key scheme of the nodes and of the index; NULL: "xxh3:1337".
     */
    const char *key_scheme;
    /*
     The model's name, as the nodes are configured.
     */
    const char *model;
    /*
     The adapter; NULL for the base model.
     */
    const char *lora;
    /*
     The tenant's cache salt; NULL for none.
     */
    const char *cache_salt;
    /*
     The 32-byte identity of the adapter's weights; NULL if its name says enough.
     */
    const uint8_t *adapter;
    /*
     Tokens of a block.
     */
    uint32_t block_tokens;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_names_options;

/*
 What shapes the bytes of a model's cache.
 */
typedef struct kvf_model_options {
    /*
     sizeof(struct kvf_model_options).
     */
    size_t size;
    /*
     The folder that the model was loaded from, or its one weight file; NULL if it is not known.
     */
    const char *path;
    /*
     A name that changes whenever the weights do, for when `path` tells nothing; NULL for none.
     */
    const char *name;
    /*
     The cache's element type, like "bf16".
     */
    const char *element;
    /*
     How weights and activations are quantised; NULL for not at all.
     */
    const char *quantisation;
    /*
     The order of bytes within a block, with its version.
     */
    const char *layout;
    /*
     Whatever else changes the bytes, each key once; NULL for nothing.
     */
    const struct kvf_setting *attributes;
    /*
     How many.
     */
    size_t attribute_count;
} kvf_model_options;

/*
 Whose blocks. Sequences that differ in one of these never share a block.
 */
typedef struct kvf_namespace {
    /*
     sizeof(struct kvf_namespace).
     */
    size_t size;
    /*
     The adapter; NULL for the base model.
     */
    const char *lora;
    /*
     The tenant's cache salt; NULL for none.
     */
    const char *cache_salt;
} kvf_namespace;

/*
 One part of every block, such as one layer's: of block b the `len` bytes at `offset` + b * `stride`.
 */
typedef struct kvf_segment {
    /*
     The kvf_region_id of a region of the node's agent.
     */
    uint64_t region;
    /*
     Where block 0 has this part, in bytes from the region's start.
     */
    uint64_t offset;
    /*
     Bytes from one block's part to the next one's; at least `len`.
     */
    uint64_t stride;
    /*
     Bytes of the part.
     */
    uint64_t len;
} kvf_segment;

/*
 A pod that holds the first blocks of a prefix.
 */
typedef struct kvf_holder {
    /*
     Its name, with a terminating NUL.
     */
    char pod[KVF_NAME_CAPACITY];
    /*
     Where its peer service listens, "host:port"; empty if that is not known.
     */
    char peer_address[KVF_NAME_CAPACITY];
    /*
     How many blocks, from the prefix's first, without a hole.
     */
    uint32_t depth;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_holder;

/*
 Blocks of a prefix, by position.
 */
typedef struct kvf_block_range {
    /*
     The first.
     */
    uint32_t start;
    /*
     Behind the last.
     */
    uint32_t end;
} kvf_block_range;

/*
 How a fetch is made. Without holders and shared ranges the index is asked, if there is one.
 */
typedef struct kvf_fetch_options {
    /*
     sizeof(struct kvf_fetch_options).
     */
    size_t size;
    /*
     Pods that are known to hold blocks; NULL for none.
     */
    const struct kvf_holder *holders;
    /*
     How many.
     */
    size_t holder_count;
    /*
     Blocks that are known to be in the shared object store: ascending, apart from each other; NULL for none.
     */
    const struct kvf_block_range *shared;
    /*
     How many ranges.
     */
    size_t shared_count;
    /*
     When what has not come is a miss; 0: after 5 seconds.
     */
    uint32_t deadline_ms;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_fetch_options;

/*
 What became of a promotion.
 */
typedef struct kvf_promote_report {
    /*
     sizeof(struct kvf_promote_report), set by the caller.
     */
    size_t size;
    /*
     Blocks that came up.
     */
    uint32_t promoted;
    /*
     Blocks that were up already.
     */
    uint32_t already_held;
    /*
     Blocks that could not be had in time, or that came after one that could not.
     */
    uint32_t missed;
    /*
     Blocks for which there was no slot.
     */
    uint32_t refused;
    /*
     Blocks whose copy failed.
     */
    uint32_t failed;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_promote_report;

/*
 What became of a store.
 */
typedef struct kvf_store_report {
    /*
     sizeof(struct kvf_store_report), set by the caller.
     */
    size_t size;
    /*
     Blocks copied.
     */
    uint32_t stored;
    /*
     Blocks that were there already.
     */
    uint32_t already_held;
    /*
     Blocks for which there was no room in time.
     */
    uint32_t refused;
    /*
     Blocks whose copy failed.
     */
    uint32_t failed;
} kvf_store_report;

/*
 What became of a fetch.
 */
typedef struct kvf_fetch_report {
    /*
     sizeof(struct kvf_fetch_report), set by the caller.
     */
    size_t size;
    /*
     Blocks that were asked for.
     */
    uint32_t blocks;
    /*
     How many of those, from the first, were brought without a hole: only these are of use.
     */
    uint32_t depth;
    /*
     Blocks whose memory may still be written to: see kvf_task_unsettled. Mostly 0.
     */
    uint32_t unsettled;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_fetch_report;

/*
 How much of a prefix a node has itself.
 */
typedef struct kvf_held {
    /*
     sizeof(struct kvf_held), set by the caller.
     */
    size_t size;
    /*
     Blocks from the first, without a hole, in host memory and on disk together.
     */
    uint32_t depth;
    /*
     How many of those are in host memory.
     */
    uint32_t host;
    /*
     How many of those are only on disk.
     */
    uint32_t disk;
    /*
     Blocks from the first that are here or that stores under way are bringing; never less than `depth`. While it is more, a
     store is worth waiting for.
     */
    uint32_t expected;
} kvf_held;

/*
 What is to be kept, and for how long.
 */
typedef struct kvf_pin_options {
    /*
     sizeof(struct kvf_pin_options).
     */
    size_t size;
    /*
     The position in the prefix of the first block.
     */
    size_t first;
    /*
     The pin's number; NULL: the node draws one. Whoever is told it beforehand may let go of the blocks even before they
     are kept. Draw it at random, and use it once.
     */
    const uint64_t *id;
    /*
     How long the blocks are kept.
     */
    uint32_t ttl_ms;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_pin_options;

/*
 How much of a prefix can be had.
 */
typedef struct kvf_reach {
    /*
     sizeof(struct kvf_reach), set by the caller.
     */
    size_t size;
    /*
     Blocks from the first, from the node's own tiers, its peers and shared objects together.
     */
    uint32_t depth;
    /*
     Blocks from the first that the node has itself.
     */
    uint32_t own;
    /*
     How many of its own are in host memory.
     */
    uint32_t host;
    /*
     How many of its own are only on disk.
     */
    uint32_t disk;
    /*
     Other pods that hold blocks: see kvf_task_holders.
     */
    uint32_t holders;
    /*
     Ranges of blocks in the shared object store: see kvf_task_shared.
     */
    uint32_t shared;
    /*
     Blocks from the first that the node itself has or that stores under way are bringing; never less than `own`.
     */
    uint32_t expected;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_reach;

/*
 What is kept.
 */
typedef struct kvf_pin {
    /*
     sizeof(struct kvf_pin), set by the caller.
     */
    size_t size;
    /*
     What kvf_node_release and kvf_node_unpin take; means something in this run of this node only.
     */
    uint64_t id;
    /*
     How many blocks, from the first, are kept; with 0 there is nothing to let go of.
     */
    uint32_t depth;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_pin;

/*
 What was dropped.
 */
typedef struct kvf_removed {
    /*
     sizeof(struct kvf_removed), set by the caller.
     */
    size_t size;
    /*
     Blocks that left host memory and disk.
     */
    uint32_t removed;
    /*
     Blocks that stay: pinned, lent to peers, or on their way somewhere.
     */
    uint32_t kept;
} kvf_removed;

/*
 Blocks that an engine has stored, in sequence order.
 */
typedef struct kvf_stored_event {
    /*
     sizeof(struct kvf_stored_event).
     */
    size_t size;
    /*
     The engine's hash of each block, shortened to 64 bits.
     */
    const uint64_t *hashes;
    /*
     How many blocks; not 0.
     */
    size_t count;
    /*
     The hash of the block before the first; NULL at the start of a sequence.
     */
    const uint64_t *parent;
    /*
     The tokens of all of them, one block after the other.
     */
    const uint32_t *tokens;
    /*
     How many tokens: `count` times those of a block.
     */
    size_t token_count;
    /*
     A kvf_tier.
     */
    uint32_t tier;
    /*
     Zero.
     */
    uint32_t reserved;
    /*
     Whose blocks; NULL: the base model's, without a salt.
     */
    const struct kvf_namespace *owner;
} kvf_stored_event;

/*
 Who publishes, and to whom.
 */
typedef struct kvf_publisher_options {
    /*
     sizeof(struct kvf_publisher_options).
     */
    size_t size;
    /*
     Where the index listens, "host:port".
     */
    const char *index;
    /*
     The name by which routers know the engine.
     */
    const char *pod;
    /*
     The model's name, as routers ask for it.
     */
    const char *model;
    /*
     How index keys are made; the index must use the same. NULL: "xxh3:1337".
     */
    const char *key_scheme;
    /*
     The host of this process as the index reaches it; the ports are the system's choice. NULL: "127.0.0.1".
     */
    const char *publish_host;
    /*
     Where the pod's peer service listens, "ip:port"; NULL if it has none.
     */
    const char *peer_address;
    /*
     Tokens of a block.
     */
    uint32_t block_tokens;
    /*
     How long each call to the index may take; 0: 2 seconds.
     */
    uint32_t deadline_ms;
} kvf_publisher_options;

/*
 Whose blocks a lookup asks for, and how long it may take. NULL strings are empty.
 */
typedef struct kvf_lookup_options {
    /*
     sizeof(struct kvf_lookup_options).
     */
    size_t size;
    /*
     The model; NULL when the index serves only one.
     */
    const char *model;
    /*
     The adapter; NULL for the base model.
     */
    const char *lora;
    /*
     The tenant's cache salt; NULL for none.
     */
    const char *cache_salt;
    /*
     How long the lookup may take; 0: as long as kvf_index_connect was told.
     */
    uint32_t deadline_ms;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_lookup_options;

/*
 What one pod holds of a prompt.
 */
typedef struct kvf_pod_depth {
    /*
     The pod's name, with a terminating NUL.
     */
    char pod[KVF_NAME_CAPACITY];
    /*
     Where its peer service listens; empty if it has none, or one with a longer name than fits.
     */
    char peer_address[KVF_NAME_CAPACITY];
    /*
     Blocks from the first, without a hole, in tiers that the pod reaches by itself.
     */
    uint32_t depth;
    /*
     For how many of those each tier is the fastest: accelerator, host memory, local disk, object store. They add up to
     `depth`.
     */
    uint32_t by_tier[4];
    /*
     Zero.
     */
    uint32_t reserved;
    /*
     The sum of weight times `by_tier`, with the index's weights.
     */
    double score;
} kvf_pod_depth;

/*
 What is true of a whole answer.
 */
typedef struct kvf_lookup_summary {
    /*
     Pods written.
     */
    size_t pods;
    /*
     Full blocks in the prompt.
     */
    uint32_t blocks;
    /*
     Tokens of a block.
     */
    uint32_t block_size;
    /*
     How many of the first blocks shared tiers hold.
     */
    uint32_t shared_depth;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_lookup_summary;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The library's version, such as "0.1.0"; valid for ever.
 */
const char *kvf_version(void);

/*
 The short name of a status, such as "peer_lost"; "unknown" for a number that is none. Valid for ever.
 */
const char *kvf_status_name(uint32_t status);

/*
 What went wrong in the last call of this thread that failed, as a sentence; empty if none has. Valid until the next
 call of this thread that fails.
 */
const char *kvf_last_error(void);

/*
 As kvf_transfer_post, of a transfer with memory of a GPU: nothing of it is read or written before the GPU has done all that
 `stream` of device number `device` has been given so far. `stream` is a CUstream or cudaStream_t as a number: 0 and 1 are the
 device's default stream, 2 the calling thread's. Nothing waits for it but the GPU. The deadline counts from the post.

 As kvf_transfer_post; KVF_UNSUPPORTED for a transfer that no GPU's copies move, without CUDA, for a stream that is captured into a
 graph, and for one of another context than the device's primary one; KVF_INVALID for a device that there is not, and a stream of
 another device.

 # Safety
 `transfer` is null or live; `stream` is a stream that lives, and on which no capture begins, during the call.
 */
kvf_status kvf_transfer_post_after(const struct kvf_transfer *transfer,
                                   uint32_t device,
                                   uint64_t stream);

/*
 As kvf_transfer_post_after, after what `event` of device number `device`, a CUevent or cudaEvent_t as a number, was last recorded
 behind. It may be recorded again afterwards.

 As kvf_transfer_post_after; KVF_INVALID also for 0, KVF_UNSUPPORTED also for an event that was recorded into a graph.

 # Safety
 `transfer` is null or live; `event` is an event that lives, and that no thread records, during the call.
 */
kvf_status kvf_transfer_post_after_event(const struct kvf_transfer *transfer,
                                         uint32_t device,
                                         uint64_t event);

/*
 Has `stream` of device number `device` wait for a part, counted from 0, or for KVF_ALL_PARTS: what it is given after this call is
 done after all copies of the part. Waits itself until they are queued, at most `timeout_ms`, not until they are made.

 After KVF_OK the stream goes on whatever becomes of the transfer, and finds the part's bytes in memory of the GPU: queued copies are
 taken back by nothing, and one that fails breaks the GPU's context, which the stream's own calls report. After any failure the
 stream waits for nothing: do not use the part. Memory of the host is in place when kvf_transfer_wait_part says so.

 Why the transfer failed before the copies were queued; KVF_TIMEOUT also when `timeout_ms` ran out; KVF_INVALID for a part that
 there is not, and when it was never posted; KVF_UNSUPPORTED also with checksums; otherwise as kvf_transfer_post_after.

 # Safety
 As kvf_transfer_post_after.
 */
kvf_status kvf_transfer_order_stream(const struct kvf_transfer *transfer,
                                     uint32_t device,
                                     uint64_t stream,
                                     size_t part,
                                     uint32_t timeout_ms);

/*
 Starts an agent.

 KVF_INVALID for a bad name, address, certificate or store and for a way that is not enabled, KVF_NOT_FOUND for a file of
 `tls` that is not there, which is named, KVF_IO when the address is in use, KVF_UNSUPPORTED when UCX, RDMA or a congestion
 control is asked for that the system does not have.

 # Safety
 Each pointer is null or valid: `options` with what it points to for reads, `agent_out` for a write.
 */
kvf_status kvf_agent_create(const struct kvf_agent_options *options,
                            struct kvf_agent **agent_out);

/*
 Gives an agent back. It ends when its regions, peers and transfers are freed too.

 # Safety
 `agent` is null or live, and not used again.
 */
kvf_status kvf_agent_free(struct kvf_agent *agent);

/*
 Copies out what peers need to reach this agent and the regions that it exports now: hand it to kvf_peer_load there. It
 contains the regions' keys, so whoever has it may do what the regions allow.

 With `buffer` NULL only the length is told. KVF_INVALID when `capacity` is too small; `len_out` is written then too.

 # Safety
 Each pointer is null or valid: `agent` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_agent_metadata(const struct kvf_agent *agent,
                              void *buffer,
                              size_t capacity,
                              size_t *len_out);

/*
 As kvf_agent_metadata, with `count` regions of kvf_region_id alone. A peer that has loaded metadata of this agent before
 keeps the regions that it knows: so regions can be added, or shown to some peers only.

 KVF_NOT_FOUND for a region that is not registered with this agent, or not exported.

 # Safety
 Each pointer is null or valid: `agent` live, `regions` for `count` reads, `buffer` for `capacity` writes, `len_out` for a
 write.
 */
kvf_status kvf_agent_metadata_of(const struct kvf_agent *agent,
                                 const uint64_t *regions,
                                 size_t count,
                                 void *buffer,
                                 size_t capacity,
                                 size_t *len_out);

/*
 Sends a message to a peer and waits until its agent has taken it, at most `timeout_ms`.

 While the peer's inbox is full it waits for room. KVF_INVALID above 65,536 bytes. After KVF_TIMEOUT it may still arrive.

 # Safety
 Each pointer is null or valid: `agent` and `peer` live, `message` for `len` reads.
 */
kvf_status kvf_agent_notify(const struct kvf_agent *agent,
                            const struct kvf_peer *peer,
                            const void *message,
                            size_t len,
                            uint32_t timeout_ms);

/*
 Takes the oldest message that a peer sent, waiting for one at most `timeout_ms`; KVF_TIMEOUT if there is none.

 The sender's name goes to `peer_buffer` with a terminating NUL, if that is not NULL; names have at most 255 bytes. With
 `buffer` NULL only the length is told, and the message stays. KVF_INVALID when a buffer is too small: the message stays,
 and `len_out` is written when it was `buffer`.

 # Safety
 Each pointer is null or valid: `agent` live, the buffers for their capacities in writes, `len_out` for a write.
 */
kvf_status kvf_agent_receive(const struct kvf_agent *agent,
                             uint32_t timeout_ms,
                             char *peer_buffer,
                             size_t peer_capacity,
                             void *buffer,
                             size_t capacity,
                             size_t *len_out);

/*
 Limits how fast transfers move, in bytes a second; 0: not at all. Those with `peer`, or if it is NULL all of a
 kvf_priority. For what is made from now on.

 # Safety
 `agent` and `peer` are null or live.
 */
kvf_status kvf_agent_set_rate(const struct kvf_agent *agent,
                              const struct kvf_peer *peer,
                              uint32_t priority,
                              uint64_t bytes_per_second);

/*
 A descriptor that polls as readable when messages have arrived: then take them with kvf_agent_receive until it answers
 KVF_TIMEOUT, because the first of these calls makes it unreadable again. It belongs to the agent, lives as long as
 that, and must be neither read from nor closed.

 # Safety
 Each pointer is null or valid: `agent` live, `fd_out` for a write.
 */
kvf_status kvf_agent_eventfd(const struct kvf_agent *agent,
                             int32_t *fd_out);

/*
 Registers memory of the caller's. `access` is 0 or a sum of KVF_ACCESS_ values: what peers may do with it.

 The memory must stay valid until kvf_region_deregister or kvf_region_free has answered KVF_OK for the region.

 # Safety
 Each pointer is null or valid: `agent` live, `base` for reads and writes of `len` bytes as said above, `region_out`
 for a write.
 */
kvf_status kvf_region_register(const struct kvf_agent *agent,
                               void *base,
                               uint64_t len,
                               uint32_t access,
                               struct kvf_region **region_out);

/*
 Allocates zeroed memory that peers on this host can map, and registers it. `access` as in kvf_region_register.

 KVF_INVALID for no bytes, KVF_IO when the system has none left.

 # Safety
 Each pointer is null or valid: `agent` live, `region_out` for a write.
 */
kvf_status kvf_region_allocate(const struct kvf_agent *agent,
                               uint64_t len,
                               uint32_t access,
                               struct kvf_region **region_out);

/*
 The number that names the region in descriptors, here and at peers.

 # Safety
 Each pointer is null or valid: `region` live, `id_out` for a write.
 */
kvf_status kvf_region_id(const struct kvf_region *region, uint64_t *id_out);

/*
 Where the region begins in this process; NULL for files, objects and memory of devices. Memory of kvf_region_allocate stays there until the region is freed.

 # Safety
 Each pointer is null or valid: `region` live, `base_out` for a write.
 */
kvf_status kvf_region_base(const struct kvf_region *region,
                           void **base_out);

/*
 How many bytes the region has.

 # Safety
 Each pointer is null or valid: `region` live, `len_out` for a write.
 */
kvf_status kvf_region_len(const struct kvf_region *region, uint64_t *len_out);

/*
 Refuses new transfers over the region at once, and waits at most `timeout_ms` for those in flight. KVF_BUSY if some are
 still in flight then: keep the memory and call again.

 # Safety
 `region` is null or live.
 */
kvf_status kvf_region_deregister(const struct kvf_region *region,
                                 uint32_t timeout_ms);

/*
 Deregisters the region and gives the handle back. KVF_BUSY while transfers over it are in flight: the handle stays valid,
 the memory must be kept, call again.

 # Safety
 `region` is null or live, and not used again after KVF_OK.
 */
kvf_status kvf_region_free(struct kvf_region *region);

/*
 Opens a file as a region, for the remote side of transfers without a peer. Its kvf_region_base is NULL.

 `options` NULL: a file that is there, of its length now. KVF_NOT_FOUND and KVF_DENIED as the system says, KVF_INVALID for
 something that is no regular file or is shorter than asked and read-only, KVF_NO_SPACE when the space cannot be reserved,
 KVF_UNSUPPORTED when the page cache is to be passed by and cannot be. All name the path.

 # Safety
 Each pointer is null or valid: `agent` live, `path` a string, `options` for its size in reads, `region_out` for a write.
 */
kvf_status kvf_region_open_file(const struct kvf_agent *agent,
                                const char *path,
                                const struct kvf_file_options *options,
                                struct kvf_region **region_out);

/*
 Has everything that was written to a file before brought to its device, and waits at most `timeout_ms` for that.

 KVF_UNSUPPORTED when the region is no file, KVF_IO and KVF_NO_SPACE as the device says.

 # Safety
 `region` is null or live.
 */
kvf_status kvf_region_sync(const struct kvf_region *region,
                           uint32_t timeout_ms);

/*
 Starts what reads and writes files, a KVF_FILES_ value, unless a file was opened before; copies out how it talks to the
 system, and why.

 With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID when `capacity` is too small;
 `len_out` is written then too. KVF_UNSUPPORTED when io_uring is wanted and the system refuses it.

 # Safety
 Each pointer is null or valid: `agent` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_agent_start_files(const struct kvf_agent *agent,
                                 uint32_t mode,
                                 char *buffer,
                                 size_t capacity,
                                 size_t *len_out);

/*
 An object of a store of kvf_agent_options as a region, for the remote side of transfers without a peer; it need not be
 there. A write puts the whole object, so its ranges must cover it from 0 on without a gap; a read gets ranges. `when_there`
 is what a write does then, a KVF_OBJECT_ value. Its kvf_region_base is NULL, and its kvf_region_len UINT64_MAX: only the
 store can tell.

 KVF_NOT_FOUND for an unknown store, KVF_INVALID for a bad key.

 # Safety
 Each pointer is null or valid: `agent` live, `store` and `key` strings, `region_out` for a write.
 */
kvf_status kvf_region_open_object(const struct kvf_agent *agent,
                                  const char *store,
                                  const char *key,
                                  uint32_t when_there,
                                  struct kvf_region **region_out);

/*
 Removes an object, and waits at most `timeout_ms` for that; that there is none is fine.

 KVF_NOT_FOUND for an unknown store, KVF_INVALID for a bad key, otherwise what the store says. After KVF_TIMEOUT it may still
 be removed.

 # Safety
 Each pointer is null or valid: `agent` live, `store` and `key` strings.
 */
kvf_status kvf_agent_remove_object(const struct kvf_agent *agent,
                                   const char *store,
                                   const char *key,
                                   uint32_t timeout_ms);

/*
 What the CUDA driver of this system serves to this process: how many devices, and in words a line for the driver and one for
 each device. Makes no context; the first call may take seconds.

 With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID when `capacity` is too small;
 `len_out` is written then too. KVF_UNSUPPORTED when CUDA cannot be used; kvf_last_error says why.

 # Safety
 Each pointer is null or valid: `device_count_out` for a write, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_cuda_probe(uint32_t *device_count_out,
                          char *buffer,
                          size_t capacity,
                          size_t *len_out);

/*
 Registers memory of a GPU that the caller has allocated, by its address on the device, in this process. The driver is asked
 whether all of it is there. Transfers move it from and to host memory of the same agent, and within the GPU; they begin at once:
 what computes the bytes must be done before. `access` as in kvf_region_register: peers that may reach it open it on the same
 machine, and reach it over network cards, or through host memory of this agent. Its kvf_region_base is NULL.

 The memory must stay allocated and mapped until kvf_region_deregister or kvf_region_free has answered KVF_OK for the region.

 KVF_UNSUPPORTED for an agent without kvf_agent_options.cuda, without CUDA, and for managed memory; KVF_INVALID for a device that
 there is not, for no bytes, for memory of the host or of another device, and for a range that goes past its allocation.

 # Safety
 Each pointer is null or valid: `agent` live, `region_out` for a write. The device's memory is kept as said above.
 */
kvf_status kvf_region_register_device(const struct kvf_agent *agent,
                                      uint32_t device,
                                      uint64_t address,
                                      uint64_t len,
                                      uint32_t access,
                                      struct kvf_region **region_out);

/*
 Allocates memory of the GPU with number `device`, of unspecified content, and registers it. It is freed after kvf_region_deregister
 or kvf_region_free has answered KVF_OK for the region; that makes the driver wait until the GPU has done all it was asked for, by
 anybody. Its address on the device goes to `address_out`. Otherwise as kvf_region_register_device.

 KVF_UNSUPPORTED for an agent without kvf_agent_options.cuda and without CUDA; KVF_INVALID for a device that there is not, and no
 bytes; KVF_BUSY when the device has no memory left.

 # Safety
 Each pointer is null or valid: `agent` live, `address_out` and `region_out` for a write.
 */
kvf_status kvf_region_allocate_device(const struct kvf_agent *agent,
                                      uint32_t device,
                                      uint64_t len,
                                      uint32_t access,
                                      uint64_t *address_out,
                                      struct kvf_region **region_out);

/*
 Registers memory of the caller's by its range: one that lies in a range that was registered in this way, and still is, with
 the same `access`, gets that one's region. So a pool and its thousand tensors are one region, in metadata and for peers.
 Ranges that merely touch or overlap get regions of their own. `access` as in kvf_region_register.

 The memory must stay valid until kvf_range_deregister or kvf_range_free has answered KVF_OK for the range.

 # Safety
 Each pointer is null or valid: `agent` live, `base` for reads and writes of `len` bytes as said above, `range_out` for a
 write.
 */
kvf_status kvf_range_register(const struct kvf_agent *agent,
                              void *base,
                              uint64_t len,
                              uint32_t access,
                              struct kvf_range **range_out);

/*
 How descriptors name the range, here and at peers: the number of the region that it lies in, and where it begins there.

 # Safety
 Each pointer is null or valid: `range` live, `region_out` and `offset_out` for a write each.
 */
kvf_status kvf_range_place(const struct kvf_range *range,
                           uint64_t *region_out,
                           uint64_t *offset_out);

/*
 Gives the range back, and waits at most `timeout_ms` until its memory is free. KVF_BUSY if it is not then, because transfers
 over the region are in flight, or because other ranges of it are registered: peers reach all of its memory until the last
 of them is given back. Keep the memory, and call again.

 # Safety
 `range` is null or live.
 */
kvf_status kvf_range_deregister(const struct kvf_range *range,
                                uint32_t timeout_ms);

/*
 Gives the range back and the handle. KVF_BUSY as in kvf_range_deregister: the handle stays valid, the memory must be kept,
 call again.

 # Safety
 `range` is null or live, and not used again after KVF_OK.
 */
kvf_status kvf_range_free(struct kvf_range *range);

/*
 Learns of a peer from its kvf_agent_metadata, or what is new about one.

 KVF_CORRUPT for damaged metadata, KVF_VERSION for another version's.

 # Safety
 Each pointer is null or valid: `agent` live, `metadata` for `len` reads, `peer_out` for a write.
 */
kvf_status kvf_peer_load(const struct kvf_agent *agent,
                         const void *metadata,
                         size_t len,
                         struct kvf_peer **peer_out);

/*
 Says which way bytes go to the peer, why, and what kept better ways from being used; connects if there is no connection.

 The text is for people and logs. With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID
 when `capacity` is too small; `len_out` is written then too.

 # Safety
 Each pointer is null or valid: `peer` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_peer_path(const struct kvf_peer *peer,
                         char *buffer,
                         size_t capacity,
                         size_t *len_out);

/*
 Copies out the name of the peer's agent. Buffers as in kvf_peer_path.

 # Safety
 Each pointer is null or valid: `peer` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_peer_name(const struct kvf_peer *peer,
                         char *buffer,
                         size_t capacity,
                         size_t *len_out);

/*
 Copies out the regions that the peer's metadata named, by number.

 With `regions` NULL only their count is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.

 # Safety
 Each pointer is null or valid: `peer` live, `regions` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_peer_regions(const struct kvf_peer *peer,
                            struct kvf_remote_region *regions,
                            size_t capacity,
                            size_t *count_out);

/*
 Ends the connections to a peer and forgets it: transfers in flight fail with KVF_PEER_LOST. The handle must still be freed.

 # Safety
 `peer` is null or live.
 */
kvf_status kvf_peer_forget(const struct kvf_peer *peer);

/*
 Gives a handle back. The agent stays connected to the peer, and knows it until kvf_peer_forget.

 # Safety
 `peer` is null or live, and not used again.
 */
kvf_status kvf_peer_free(struct kvf_peer *peer);

/*
 Checks `count` byte ranges of the peer's regions, or with `peer` NULL of this agent's own, and keeps them.

 KVF_INVALID for a range outside its region, KVF_NOT_FOUND for an unknown region; the text names the position.

 # Safety
 Each pointer is null or valid: `agent` and `peer` live, `descriptors` for `count` reads, `list_out` for a write.
 */
kvf_status kvf_list_create(const struct kvf_agent *agent,
                           const struct kvf_peer *peer,
                           const struct kvf_descriptor *descriptors,
                           size_t count,
                           struct kvf_list **list_out);

/*
 As kvf_list_create, with the ranges that `count` entries stand for, one entry after the other: the list has as many
 positions as all entries together have ranges.

 # Safety
 Each pointer is null or valid: `agent` and `peer` live, `entries` for `count` reads, `list_out` for a write.
 */
kvf_status kvf_list_create_strided(const struct kvf_agent *agent,
                                   const struct kvf_peer *peer,
                                   const struct kvf_strided *entries,
                                   size_t count,
                                   struct kvf_list **list_out);

/*
 How many ranges a list has.

 # Safety
 Each pointer is null or valid: `list` live, `count_out` for a write.
 */
kvf_status kvf_list_len(const struct kvf_list *list, size_t *count_out);

/*
 Gives a list back. Transfers that were made from it keep what they need.

 # Safety
 `list` is null or live, and not used again.
 */
kvf_status kvf_list_free(struct kvf_list *list);

/*
 Makes a transfer between `count` local ranges and as many remote ones, paired in order, of equal lengths. With `peer` NULL
 the remote ranges are this agent's own too. Connects to the peer; nothing moves before kvf_transfer_post.

 KVF_INVALID for a range outside its region or lists that do not pair, KVF_NOT_FOUND for an unknown region, KVF_DENIED
 for one that the peer does not export for this, KVF_PEER_LOST when the peer cannot be reached.

 # Safety
 Each pointer is null or valid: `agent` and `peer` live, `local` and `remote` for `count` reads, `options` with its
 notification, parts and backends for reads, `transfer_out` for a write.
 */
kvf_status kvf_transfer_create(const struct kvf_agent *agent,
                               const struct kvf_peer *peer,
                               const struct kvf_descriptor *local,
                               const struct kvf_descriptor *remote,
                               size_t count,
                               const struct kvf_transfer_options *options,
                               struct kvf_transfer **transfer_out);

/*
 Makes a transfer between the ranges of two lists, or, with `local_positions` and `remote_positions`, between `count` of
 each, by position, paired in order. Both NULL with a `count` of 0: all of both lists. The lists may be used for other
 transfers, and be freed, at any time. Connects to the peer; nothing moves before kvf_transfer_post.

 As kvf_transfer_create; KVF_INVALID also for a list of another agent, for a `local` list of a peer's regions, and for a
 position outside its list.

 # Safety
 Each pointer is null or valid: `agent`, `local` and `remote` live, the positions for `count` reads, `options` with its
 notification, parts and backends for reads, `transfer_out` for a write.
 */
kvf_status kvf_transfer_create_prepared(const struct kvf_agent *agent,
                                        const struct kvf_list *local,
                                        const struct kvf_list *remote,
                                        const uint32_t *local_positions,
                                        const uint32_t *remote_positions,
                                        size_t count,
                                        const struct kvf_transfer_options *options,
                                        struct kvf_transfer **transfer_out);

/*
 What a way is taken to cost in estimates, until transfers have shown it: `latency_ns` for one that moves next to nothing, and
 the bandwidth of long ones.

 KVF_INVALID for a bandwidth of 0, and for a name that is no way or kind of storage.

 # Safety
 `agent` is null or live, `backend` null or a string.
 */
kvf_status kvf_agent_assume_cost(const struct kvf_agent *agent,
                                 const char *backend,
                                 uint64_t latency_ns,
                                 uint64_t bytes_per_second);

/*
 What posting a transfer would take now, by what others took; connects to the peer if there is no connection.

 KVF_PEER_LOST when the peer cannot be reached.

 # Safety
 Each pointer is null or valid: `transfer` live, `estimate_out` for its size in reads and writes.
 */
kvf_status kvf_transfer_estimate(const struct kvf_transfer *transfer,
                                 struct kvf_estimate *estimate_out);

/*
 Says which way a transfer would go now, and what kept those that go before it from being chosen. Buffers as in
 kvf_peer_path.

 # Safety
 Each pointer is null or valid: `transfer` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_transfer_path(const struct kvf_transfer *transfer,
                             char *buffer,
                             size_t capacity,
                             size_t *len_out);

/*
 Starts a transfer, which may be finished when this returns.

 Nothing is started on failure: KVF_BUSY when it is in flight or a queue is full, KVF_PEER_LOST when the peer cannot be
 reached, KVF_NOT_FOUND when a region was deregistered.

 # Safety
 `transfer` is null or live.
 */
kvf_status kvf_transfer_post(const struct kvf_transfer *transfer);

/*
 As kvf_transfer_post, with `len` bytes at `notification` from now on in place of those given before; NULL: with none.

 KVF_BUSY also while another thread waits for it.

 # Safety
 Each pointer is null or valid: `transfer` live, `notification` for `len` reads.
 */
kvf_status kvf_transfer_repost(const struct kvf_transfer *transfer,
                               const void *notification,
                               size_t len);

/*
 Says where a transfer stands, without waiting. Failure of the transfer is no failure of this call.

 # Safety
 Each pointer is null or valid: `transfer` live, `state_out` for a write.
 */
kvf_status kvf_transfer_poll(const struct kvf_transfer *transfer, kvf_state *state_out);

/*
 Waits until a transfer is finished, at most `timeout_ms`: KVF_OK when it has succeeded, else why it failed.

 KVF_TIMEOUT also when `timeout_ms` ran out, which fails this call and not the transfer: kvf_transfer_poll tells the two
 apart. KVF_INVALID when it was never posted.

 # Safety
 `transfer` is null or live.
 */
kvf_status kvf_transfer_wait(const struct kvf_transfer *transfer,
                             uint32_t timeout_ms);

/*
 Waits until all bytes of a part, counted from 0, are in place, at most `timeout_ms`. A part that is in place stays so when
 the transfer fails later.

 Why the transfer failed before the part was in place; KVF_TIMEOUT also when `timeout_ms` ran out; KVF_INVALID for a part
 that there is not, and when it was never posted.

 # Safety
 `transfer` is null or live.
 */
kvf_status kvf_transfer_wait_part(const struct kvf_transfer *transfer,
                                  size_t part,
                                  uint32_t timeout_ms);

/*
 A descriptor that polls as readable while the last post is decided: done or failed. The next post makes it unreadable
 again. It belongs to the transfer, lives as long as that, and must be neither read from nor closed.

 # Safety
 Each pointer is null or valid: `transfer` live, `fd_out` for a write.
 */
kvf_status kvf_transfer_eventfd(const struct kvf_transfer *transfer,
                                int32_t *fd_out);

/*
 What the last post that succeeded took. KVF_NOT_FOUND before one has.

 # Safety
 Each pointer is null or valid: `transfer` live, `telemetry_out` for its size in reads and writes.
 */
kvf_status kvf_transfer_telemetry(const struct kvf_transfer *transfer,
                                  struct kvf_telemetry *telemetry_out);

/*
 Asks a transfer to end. If it is in flight it fails with KVF_CANCELLED now; its memory may be used once
 kvf_transfer_fate says KVF_SETTLED.

 # Safety
 `transfer` is null or live.
 */
kvf_status kvf_transfer_cancel(const struct kvf_transfer *transfer);

/*
 Says what may be done with the memory of a transfer, waiting at most `timeout_ms` for it to be settled.

 # Safety
 Each pointer is null or valid: `transfer` live, `fate_out` for a write.
 */
kvf_status kvf_transfer_fate(const struct kvf_transfer *transfer,
                             uint32_t timeout_ms,
                             kvf_fate *fate_out);

/*
 Gives a transfer back. One that is in flight goes on: its regions answer KVF_BUSY until it has ended.

 # Safety
 `transfer` is null or live, and not used again.
 */
kvf_status kvf_transfer_free(struct kvf_transfer *transfer);

/*
 Opens a node: takes its memory, recovers what its disk holds, serves its peers, and registers with the index if one is
 configured. Blocks until then.

 KVF_INVALID for a configuration that is not one, with the key; KVF_BUSY when another process uses its folder; what the
 system or the index says otherwise.

 # Safety
 Each pointer is null or valid: `options` with its strings and settings for reads, `node_out` for a write.
 */
kvf_status kvf_node_open(const struct kvf_node_options *options,
                         struct kvf_node **node_out);

/*
 Ends a node in order, within about `timeout_ms`: it lends nothing more, withdraws what it told the index, and writes out
 what is on its way to the disk. Later stores and fetches answer KVF_CANCELLED. The handle must still be freed.

 KVF_TIMEOUT when not everything was written in time: it is lost, and nothing is wrong.

 # Safety
 `node` is null or live.
 */
kvf_status kvf_node_shutdown(const struct kvf_node *node,
                             uint32_t timeout_ms);

/*
 Gives a node back. It ends when its agents, prefixes, pages and tasks are freed too; without kvf_node_shutdown before,
 what is still on its way to the disk may be lost.

 # Safety
 `node` is null or live, and not used again.
 */
kvf_status kvf_node_free(struct kvf_node *node);

/*
 The node's agent: register the engine's memory with it. To be freed with kvf_agent_free.

 # Safety
 Each pointer is null or valid: `node` live, `agent_out` for a write.
 */
kvf_status kvf_node_agent(const struct kvf_node *node, struct kvf_agent **agent_out);

/*
 Copies out where peers ask this node for blocks, "host:port"; empty if it serves none. Buffers as in kvf_peer_path.

 # Safety
 Each pointer is null or valid: `node` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_node_peer_address(const struct kvf_node *node,
                                 char *buffer,
                                 size_t capacity,
                                 size_t *len_out);

/*
 Copies out the node's counters and levels, always in the same order, waiting at most `timeout_ms`.

 With `stats` NULL only their number is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.

 # Safety
 Each pointer is null or valid: `node` live, `stats` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_node_stats(const struct kvf_node *node,
                          uint32_t timeout_ms,
                          struct kvf_stat *stats,
                          size_t capacity,
                          size_t *count_out);

/*
 Makes a chain of names without blocks.

 # Safety
 Each pointer is null or valid: `options` with what it points to for reads, `names_out` for a write.
 */
kvf_status kvf_names_create(const struct kvf_names_options *options, struct kvf_names **names_out);

/*
 Appends `count` full blocks: their tokens, one block after the other, and the engine's hash of each, `hash_len` bytes.

 KVF_INVALID when the tokens do not fill exactly as many blocks, or hashes have another length than before; nothing is
 appended then.

 # Safety
 Each pointer is null or valid: `names` live, `tokens` for `token_count` reads, `hashes` for `count` * `hash_len` reads.
 */
kvf_status kvf_names_extend(const struct kvf_names *names,
                            const uint32_t *tokens,
                            size_t token_count,
                            const uint8_t *hashes,
                            size_t hash_len,
                            size_t count);

/*
 Copies out the names of `count` blocks from position `first` on, for kvf_prefix_create_from_names in any process.
 Buffers as in kvf_agent_metadata.

 # Safety
 Each pointer is null or valid: `names` live, `buffer` for `capacity` writes, `len_out` for a write.
 */
kvf_status kvf_names_pack(const struct kvf_names *names,
                          size_t first,
                          size_t count,
                          void *buffer,
                          size_t capacity,
                          size_t *len_out);

/*
 Names blocks of which only the engine's hashes are known, `hash_len` bytes each, every block by itself: for
 kvf_prefix_create_from_names in any process. The index finds such a block by its hash and by `root`, which stands for
 whatever else shapes its bytes; routers, which ask by tokens, do not. Buffers as in kvf_agent_metadata.

 # Safety
 Each pointer is null or valid: `root` for `root_len` reads, `hashes` for `count` * `hash_len` reads, `buffer` for `capacity`
 writes, `len_out` for a write.
 */
kvf_status kvf_names_pack_hashes(const void *root,
                                 size_t root_len,
                                 const uint8_t *hashes,
                                 size_t hash_len,
                                 size_t count,
                                 void *buffer,
                                 size_t capacity,
                                 size_t *len_out);

/*
 Gives a chain of names back.

 # Safety
 `names` is null or live, and not used again.
 */
kvf_status kvf_names_free(struct kvf_names *names);

/*
 Derives the `model_identity` of a node's configuration: 64 digits and a terminating NUL. Weights are named by the commit
 of a model hub's snapshot, else by a digest of the weight files (read once, which takes as long as the disk needs), else
 by `name`.

 KVF_INVALID when nothing names them.

 # Safety
 Each pointer is null or valid: `options` with what it points to for reads, `identity_out` for KVF_IDENTITY_CAPACITY
 writes.
 */
kvf_status kvf_model_identity(const struct kvf_model_options *options,
                              char *identity_out);

/*
 Makes a prefix without tokens. `owner` may be NULL: the base model, no salt.

 # Safety
 Each pointer is null or valid: `node` live, `owner` with its strings for reads, `prefix_out` for a write.
 */
kvf_status kvf_prefix_create(const struct kvf_node *node,
                             const struct kvf_namespace *owner,
                             struct kvf_prefix **prefix_out);

/*
 Makes a prefix of the blocks that kvf_names_pack has packed, here or in another process. It cannot be extended.

 `adapter` is the 32-byte identity of the adapter's weights if the names do not carry it, or NULL. KVF_UNSUPPORTED when
 the node has no engine section configured, or when the engine's hashes are too weak to name blocks that outlive it;
 KVF_INVALID or KVF_VERSION for bytes that are not such names.

 # Safety
 Each pointer is null or valid: `node` live, `names` for `len` reads, `adapter` for 32 reads, `prefix_out` for a write.
 */
kvf_status kvf_prefix_create_from_names(const struct kvf_node *node,
                                        const void *names,
                                        size_t len,
                                        const uint8_t *adapter,
                                        struct kvf_prefix **prefix_out);

/*
 Appends tokens. `blocks_out` tells how many full blocks there are now, and may be NULL; tokens that fill none wait for the
 next ones. Threads must not extend one prefix at once if the order of their tokens matters.

 # Safety
 Each pointer is null or valid: `prefix` live, `tokens` for `count` reads, `blocks_out` for a write.
 */
kvf_status kvf_prefix_extend(const struct kvf_prefix *prefix,
                             const uint32_t *tokens,
                             size_t count,
                             size_t *blocks_out);

/*
 How many blocks a prefix has.

 # Safety
 Each pointer is null or valid: `prefix` live, `blocks_out` for a write.
 */
kvf_status kvf_prefix_len(const struct kvf_prefix *prefix, size_t *blocks_out);

/*
 Copies out the 32 bytes that name the block at `position`: equal exactly for blocks whose bytes are interchangeable.

 # Safety
 Each pointer is null or valid: `prefix` live, `key_out` for 32 writes.
 */
kvf_status kvf_prefix_key(const struct kvf_prefix *prefix,
                          size_t position,
                          uint8_t *key_out);

/*
 The place of the block at `position` in the global index: what kvf_index_lookup_keys takes.

 # Safety
 Each pointer is null or valid: `prefix` live, `key_out` for a write.
 */
kvf_status kvf_prefix_index_key(const struct kvf_prefix *prefix,
                                size_t position,
                                uint64_t *key_out);

/*
 Gives a prefix back. Operations in progress keep what they need.

 # Safety
 `prefix` is null or live, and not used again.
 */
kvf_status kvf_prefix_free(struct kvf_prefix *prefix);

/*
 Describes memory that holds `blocks` blocks, numbered from 0, each made of these `count` segments in order.

 KVF_INVALID when the segments do not add up to the configured block, or do not lie in their regions; KVF_NOT_FOUND for
 an unknown region.

 # Safety
 Each pointer is null or valid: `node` live, `segments` for `count` reads, `pages_out` for a write.
 */
kvf_status kvf_pages_create(const struct kvf_node *node,
                            const struct kvf_segment *segments,
                            size_t count,
                            uint32_t blocks,
                            struct kvf_pages **pages_out);

/*
 Gives pages back. Stores and fetches in progress go on.

 # Safety
 `pages` is null or live, and not used again.
 */
kvf_status kvf_pages_free(struct kvf_pages *pages);

/*
 Begins to store `count` blocks of a prefix, from position `first` on, which the engine has in `pages` under the numbers
 `blocks`. That memory must stay as it is until the task is finished. What has found no room after `deadline_ms` (0: 30
 seconds) is refused.

 KVF_INVALID for blocks outside the prefix or the pages. KVF_BUSY, by the task, when too much is in progress.

 # Safety
 Each pointer is null or valid: `node`, `prefix` and `pages` live, `blocks` for `count` reads, `task_out` for a write.
 */
kvf_status kvf_node_store(const struct kvf_node *node,
                          const struct kvf_prefix *prefix,
                          size_t first,
                          const struct kvf_pages *pages,
                          const uint32_t *blocks,
                          size_t count,
                          uint32_t deadline_ms,
                          struct kvf_task **task_out);

/*
 Begins to fetch `count` blocks of a prefix, from position `first` on, into `pages` under the numbers `blocks`: from the HBM tier, if
 there is one, and from wherever else they are. That memory is the node's until the task is finished, and that of kvf_task_unsettled blocks longer. `options` may be NULL.

 As kvf_node_store. A block that cannot be had is a miss, not a failure.

 # Safety
 Each pointer is null or valid: `node`, `prefix` and `pages` live, `blocks` for `count` reads, `options` with its arrays
 for reads, `task_out` for a write.
 */
kvf_status kvf_node_fetch(const struct kvf_node *node,
                          const struct kvf_prefix *prefix,
                          size_t first,
                          const struct kvf_pages *pages,
                          const uint32_t *blocks,
                          size_t count,
                          const struct kvf_fetch_options *options,
                          struct kvf_task **task_out);

/*
 Begins to count how many blocks of a prefix this node's own tiers hold; see kvf_task_held. Does not count as a use.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
 */
kvf_status kvf_node_held(const struct kvf_node *node,
                         const struct kvf_prefix *prefix,
                         struct kvf_task **task_out);

/*
 Opens a node's HBM tier in `len` bytes of memory of the GPU with number `device`: at `address`, where the caller has allocated it, or
 allocated for this with `address` 0. Its content is lost, and it is the node's until kvf_node_hbm_close has answered KVF_OK, or for
 ever. From then on kvf_node_fetch looks there first, and the index is told of what is there. The setting hbm.bytes of the node's
 configuration does the same when the node is opened.

 KVF_BUSY when the node has one; KVF_UNSUPPORTED without the setting fabric.cuda and without CUDA; KVF_INVALID for less than a block,
 and as kvf_region_register_device; KVF_BUSY also when the device has no memory left.

 # Safety
 `node` is null or live. The device's memory is kept as said above.
 */
kvf_status kvf_node_hbm_open(const struct kvf_node *node,
                             uint32_t device,
                             uint64_t address,
                             uint64_t len);

/*
 Begins to bring `count` blocks of a prefix, from position `first` on, up into the HBM tier, from wherever they are. Those that
 nobody has wanted for the longest time make room, and go down into the other tiers if those do not have them. What has not come
 after `deadline_ms` (0: 5 seconds) is missed.

 KVF_INVALID for blocks outside the prefix. KVF_UNSUPPORTED, by the task, without an HBM tier; KVF_BUSY, too, when too much is in
 progress. See kvf_task_promote_report.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
 */
kvf_status kvf_node_hbm_promote(const struct kvf_node *node,
                                const struct kvf_prefix *prefix,
                                size_t first,
                                size_t count,
                                uint32_t deadline_ms,
                                struct kvf_task **task_out);

/*
 Begins to copy `count` blocks of a prefix into the HBM tier within the GPU; otherwise as kvf_node_store. The other tiers get a block
 when it leaves its slot. Where the GPU does not compute checksums, and for other memory, blocks are stored in the other tiers and
 promoted. KVF_UNSUPPORTED, by the task, without an HBM tier. Its report is kvf_task_store_report.

 # Safety
 As kvf_node_store.
 */
kvf_status kvf_node_hbm_store(const struct kvf_node *node,
                              const struct kvf_prefix *prefix,
                              size_t first,
                              const struct kvf_pages *pages,
                              const uint32_t *blocks,
                              size_t count,
                              uint32_t deadline_ms,
                              struct kvf_task **task_out);

/*
 Begins to take `count` blocks of a prefix, from position `first` on, out of the HBM tier, down into the other tiers; those that are not
 up are passed over, and those that find no room after `deadline_ms` (0: 30 seconds) stay up. KVF_INVALID for blocks outside the prefix;
 KVF_UNSUPPORTED, by the task, without an HBM tier. Its report is kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
 */
kvf_status kvf_node_hbm_offload(const struct kvf_node *node,
                                const struct kvf_prefix *prefix,
                                size_t first,
                                size_t count,
                                uint32_t deadline_ms,
                                struct kvf_task **task_out);

/*
 Ends a node's HBM tier: what is only there is lost, and the index is told. After KVF_OK memory that was lent may be freed.

 KVF_UNSUPPORTED without an HBM tier; KVF_TIMEOUT when something still uses the memory after `timeout_ms`: keep it, and call again.

 # Safety
 `node` is null or live.
 */
kvf_status kvf_node_hbm_close(const struct kvf_node *node,
                              uint32_t timeout_ms);

/*
 The report of a kvf_node_hbm_promote; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
 */
kvf_status kvf_task_promote_report(const struct kvf_task *task,
                                   struct kvf_promote_report *report_out);

/*
 Says where a task stands, without waiting. Failure of the task is no failure of this call.

 # Safety
 Each pointer is null or valid: `task` live, `state_out` for a write.
 */
kvf_status kvf_task_poll(const struct kvf_task *task, kvf_task_state *state_out);

/*
 Waits until a task is finished, at most `timeout_ms`: KVF_OK when it is done, else why it failed.

 KVF_TIMEOUT also when `timeout_ms` ran out, which fails this call and not the task: kvf_task_poll tells the two apart.

 # Safety
 `task` is null or live.
 */
kvf_status kvf_task_wait(const struct kvf_task *task,
                         uint32_t timeout_ms);

/*
 A descriptor that polls as readable once the task is finished, and stays so. It belongs to the task, lives as long as
 that, and must be neither read from nor closed.

 # Safety
 Each pointer is null or valid: `task` live, `fd_out` for a write.
 */
kvf_status kvf_task_eventfd(const struct kvf_task *task,
                            int32_t *fd_out);

/*
 Gives a task back. If it is running it goes on, and the engine's memory is still its own until it has ended.

 # Safety
 `task` is null or live, and not used again.
 */
kvf_status kvf_task_free(struct kvf_task *task);

/*
 The report of a kvf_node_store. KVF_BUSY while it is running, why it failed if it did, KVF_INVALID for another task; so
 does every report.

 # Safety
 Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
 */
kvf_status kvf_task_store_report(const struct kvf_task *task,
                                 struct kvf_store_report *report_out);

/*
 The report of a kvf_node_fetch; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
 */
kvf_status kvf_task_fetch_report(const struct kvf_task *task, struct kvf_fetch_report *report_out);

/*
 Copies out where each block of a fetch came from, as kvf_source values, in the order of the blocks that were asked for.

 With `sources` NULL only their number is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.

 # Safety
 Each pointer is null or valid: `task` live, `sources` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_task_sources(const struct kvf_task *task,
                            uint32_t *sources,
                            size_t capacity,
                            size_t *count_out);

/*
 Copies out which blocks of a fetch, by position among those asked for, have memory that a failed transfer may still write
 to: do not use it before kvf_task_drain has answered KVF_OK. Arrays as in kvf_task_sources.

 # Safety
 Each pointer is null or valid: `task` live, `positions` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_task_unsettled(const struct kvf_task *task,
                              uint32_t *positions,
                              size_t capacity,
                              size_t *count_out);

/*
 Waits until no transfer can write to the memory of a fetch any more, at most `timeout_ms`.

 KVF_TIMEOUT when some still may then; KVF_CANCELLED when that will not be known, because the node has ended: keep the
 memory.

 # Safety
 `task` is null or live.
 */
kvf_status kvf_task_drain(const struct kvf_task *task,
                          uint32_t timeout_ms);

/*
 The answer of a kvf_node_held; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `held_out` for its size in reads and writes.
 */
kvf_status kvf_task_held(const struct kvf_task *task, struct kvf_held *held_out);

/*
 Begins to find out how much of a prefix can be had, from the node's own tiers, its peers and shared objects together; see
 kvf_task_reach. The index is asked if the node does not have all of it; no answer within `deadline_ms` counts as nobody.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
 */
kvf_status kvf_node_locate(const struct kvf_node *node,
                           const struct kvf_prefix *prefix,
                           uint32_t deadline_ms,
                           struct kvf_task **task_out);

/*
 Begins to keep the blocks of a prefix in host memory, for a time or until kvf_node_release; see kvf_task_pin for how many are
 kept.

 KVF_INVALID for a position outside the prefix; by the task, for the number of a pin that is in force.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `options` with its number for reads, `task_out` for a write.
 */
kvf_status kvf_node_pin(const struct kvf_node *node,
                        const struct kvf_prefix *prefix,
                        const struct kvf_pin_options *options,
                        struct kvf_task **task_out);

/*
 Begins to drop the blocks of a prefix from host memory and disk; see kvf_task_removed. Shared objects stay.

 # Safety
 Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
 */
kvf_status kvf_node_remove(const struct kvf_node *node,
                           const struct kvf_prefix *prefix,
                           struct kvf_task **task_out);

/*
 Begins to let go of what kvf_node_pin has kept. A pin that has ended is no failure.

 # Safety
 Each pointer is null or valid: `node` live, `task_out` for a write.
 */
kvf_status kvf_node_release(const struct kvf_node *node, uint64_t pin, struct kvf_task **task_out);

/*
 Begins to let go of what another node, whose peer service is at `peer_address`, has kept for this one.

 # Safety
 Each pointer is null or valid: `node` live, `peer_address` a string, `task_out` for a write.
 */
kvf_status kvf_node_unpin(const struct kvf_node *node,
                          const char *peer_address,
                          uint64_t pin,
                          uint32_t deadline_ms,
                          struct kvf_task **task_out);

/*
 Begins to drop everything from host memory and disk; see kvf_task_removed. Shared objects stay.

 # Safety
 Each pointer is null or valid: `node` live, `task_out` for a write.
 */
kvf_status kvf_node_clear(const struct kvf_node *node, struct kvf_task **task_out);

/*
 Begins to wait until all blocks that are on their way to disk or to the shared object store are there; the task fails with
 KVF_TIMEOUT after `deadline_ms`.

 # Safety
 Each pointer is null or valid: `node` live, `task_out` for a write.
 */
kvf_status kvf_node_flush(const struct kvf_node *node,
                          uint32_t deadline_ms,
                          struct kvf_task **task_out);

/*
 The answer of a kvf_node_locate; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `reach_out` for its size in reads and writes.
 */
kvf_status kvf_task_reach(const struct kvf_task *task, struct kvf_reach *reach_out);

/*
 Copies out the pods that a kvf_node_locate has found, deepest first: what kvf_fetch_options takes. Arrays as in
 kvf_task_sources.

 # Safety
 Each pointer is null or valid: `task` live, `holders` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_task_holders(const struct kvf_task *task,
                            struct kvf_holder *holders,
                            size_t capacity,
                            size_t *count_out);

/*
 Copies out which blocks a kvf_node_locate has found in the shared object store. Arrays as in kvf_task_sources.

 # Safety
 Each pointer is null or valid: `task` live, `ranges` for `capacity` writes, `count_out` for a write.
 */
kvf_status kvf_task_shared(const struct kvf_task *task,
                           struct kvf_block_range *ranges,
                           size_t capacity,
                           size_t *count_out);

/*
 What a kvf_node_pin keeps; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `pin_out` for its size in reads and writes.
 */
kvf_status kvf_task_pin(const struct kvf_task *task, struct kvf_pin *pin_out);

/*
 What a kvf_node_remove or kvf_node_clear has dropped; as kvf_task_store_report.

 # Safety
 Each pointer is null or valid: `task` live, `removed_out` for its size in reads and writes.
 */
kvf_status kvf_task_removed(const struct kvf_task *task, struct kvf_removed *removed_out);

/*
 Takes the way to a node's peer service, "host:port": for a process that has no node, such as a scheduler that asks what a
 worker's node could get. Nothing is connected before the first question, and a connection that is lost is made again by
 the next one.

 KVF_INVALID for a malformed address.

 # Safety
 Each pointer is null or valid: `address` a string, `service_out` for a write.
 */
kvf_status kvf_service_connect(const char *address,
                               struct kvf_service **service_out);

/*
 Begins to find out how much of a run of blocks the node could get, by the names that kvf_names_pack has packed; see
 kvf_task_reach.

 By the task: KVF_UNSUPPORTED from a node without an engine section, KVF_PEER_LOST when it cannot be reached, KVF_TIMEOUT
 after `deadline_ms`.

 # Safety
 Each pointer is null or valid: `service` live, `names` for `len` reads, `task_out` for a write.
 */
kvf_status kvf_service_locate(const struct kvf_service *service,
                              const void *names,
                              size_t len,
                              uint32_t deadline_ms,
                              struct kvf_task **task_out);

/*
 Begins to let go of what the node has kept by kvf_node_pin. `model_identity` is the node's, 64 hexadecimal digits. A pin that
 has ended is no failure.

 KVF_INVALID for what is no identity; by the task, KVF_DENIED for another one than the node's, else as kvf_service_locate.

 # Safety
 Each pointer is null or valid: `service` live, `model_identity` a string, `task_out` for a write.
 */
kvf_status kvf_service_unpin(const struct kvf_service *service,
                             uint64_t pin,
                             const char *model_identity,
                             uint32_t deadline_ms,
                             struct kvf_task **task_out);

/*
 Closes a connection. Tasks in progress go on.

 # Safety
 `service` is null or live, and not used again.
 */
kvf_status kvf_service_free(struct kvf_service *service);

/*
 Tells the index that the engine has stored blocks.

 KVF_UNSUPPORTED when the node has no index, or when the engine's own publisher is configured; KVF_INVALID for an owner
 whose names are too long for the index.

 # Safety
 Each pointer is null or valid: `node` live, `event` with its arrays and its owner for reads.
 */
kvf_status kvf_node_publish_stored(const struct kvf_node *node,
                                   const struct kvf_stored_event *event);

/*
 Tells the index that one copy of each of these blocks has left a tier of the engine's, a kvf_tier. As
 kvf_node_publish_stored.

 # Safety
 Each pointer is null or valid: `node` live, `hashes` for `count` reads.
 */
kvf_status kvf_node_publish_removed(const struct kvf_node *node,
                                    const uint64_t *hashes,
                                    size_t count,
                                    uint32_t tier);

/*
 Tells the index that the engine has dropped everything from the accelerator's memory. As kvf_node_publish_stored.

 # Safety
 `node` is null or live.
 */
kvf_status kvf_node_publish_cleared(const struct kvf_node *node);

/*
 Begins to publish for an engine that has no node, and registers its pod with the index. Blocks until the index follows.

 KVF_INVALID for a wrong setting, with its name; KVF_PEER_LOST or KVF_TIMEOUT when no index answers; what the index says when
 it refuses the pod.

 # Safety
 Each pointer is null or valid: `options` with its strings for reads, `publisher_out` for a write.
 */
kvf_status kvf_publisher_open(const struct kvf_publisher_options *options,
                              struct kvf_publisher **publisher_out);

/*
 Tells the index that the engine has stored blocks. Never blocks.

 KVF_INVALID for an owner whose names are too long for the index.

 # Safety
 Each pointer is null or valid: `publisher` live, `event` with its arrays and its owner for reads.
 */
kvf_status kvf_publisher_stored(const struct kvf_publisher *publisher,
                                const struct kvf_stored_event *event);

/*
 Tells the index that one copy of each of these blocks has left a tier of the engine's, a kvf_tier. Never blocks.

 # Safety
 Each pointer is null or valid: `publisher` live, `hashes` for `count` reads.
 */
kvf_status kvf_publisher_removed(const struct kvf_publisher *publisher,
                                 const uint64_t *hashes,
                                 size_t count,
                                 uint32_t tier);

/*
 Tells the index that the engine has dropped everything from the accelerator's memory. Never blocks.

 # Safety
 `publisher` is null or live.
 */
kvf_status kvf_publisher_cleared(const struct kvf_publisher *publisher);

/*
 Ends the registration and stops publishing: the index forgets the pod.

 # Safety
 `publisher` is null or live, and not used again.
 */
kvf_status kvf_publisher_free(struct kvf_publisher *publisher);

/*
 Connects to the index at `address`, "host:port". `deadline_ms` bounds this call, and each lookup that names no deadline.

 KVF_INVALID for a malformed address or a deadline of 0, KVF_PEER_LOST or KVF_TIMEOUT when no index answers there. A connection
 that is lost later is made again by the next lookup.

 # Safety
 Each pointer is null or valid: `address` a string, `index_out` for a write.
 */
kvf_status kvf_index_connect(const char *address,
                             uint32_t deadline_ms,
                             struct kvf_index **index_out);

/*
 Asks who holds the blocks of a prompt; a tail that does not fill a block is ignored. Writes the deepest pods first, at most
 `capacity` (not 0); no pod is a success too. `options` may be NULL.

 KVF_TIMEOUT when the deadline passed, KVF_PEER_LOST when the index cannot be reached, KVF_BUSY when it is overloaded.

 # Safety
 Each pointer is null or valid: `index` live, `tokens` for `token_count` reads, `options` with its strings for reads,
 `pods` for `capacity` writes, `summary_out` for a write.
 */
kvf_status kvf_index_lookup(const struct kvf_index *index,
                            const uint32_t *tokens,
                            size_t token_count,
                            const struct kvf_lookup_options *options,
                            struct kvf_pod_depth *pods,
                            size_t capacity,
                            struct kvf_lookup_summary *summary_out);

/*
 As kvf_index_lookup, by the index keys of the prompt's blocks in order, made with the index's key scheme.

 # Safety
 Each pointer is null or valid: `index` live, `keys` for `key_count` reads, `options` with its strings for reads, `pods`
 for `capacity` writes, `summary_out` for a write.
 */
kvf_status kvf_index_lookup_keys(const struct kvf_index *index,
                                 const uint64_t *keys,
                                 size_t key_count,
                                 const struct kvf_lookup_options *options,
                                 struct kvf_pod_depth *pods,
                                 size_t capacity,
                                 struct kvf_lookup_summary *summary_out);

/*
 Closes a connection.

 # Safety
 `index` is null or live, and not used again.
 */
kvf_status kvf_index_free(struct kvf_index *index);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVFABRIC_H */
