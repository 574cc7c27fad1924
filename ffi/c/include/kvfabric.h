/*
 * kvfabric: moves and finds the KV cache of LLM inference engines.
 *
 * Every call answers a kvf_status. An output is written only when that is KVF_OK; the one exception is the length that
 * a call writes when a buffer is too small, and it is named there. A null argument, where the call does not allow
 * it, is KVF_INVALID. kvf_last_error() tells more about the last failure in this thread.
 *
 * Handles may be used from any thread, and by several at once; freeing one that another thread still uses, or twice, is
 * not detected. A handle keeps alive what it was made from. Every kvf_..._free accepts NULL.
 *
 * After an internal failure all handles of the same agent, or that index, answer KVF_INTERNAL and are leaked by free, so that
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
 Peers that have the metadata may read a region.
 */
#define KVF_ACCESS_REMOTE_READ 1

/*
 Peers that have the metadata may write to a region.
 */
#define KVF_ACCESS_REMOTE_WRITE 2

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
 Moves bytes between registered memory of this process and its peers.
 */
typedef struct kvf_agent kvf_agent;

/*
 A connection to an index.
 */
typedef struct kvf_index kvf_index;

/*
 Another agent, in this process or elsewhere.
 */
typedef struct kvf_peer kvf_peer;

/*
 Memory that transfers may name.
 */
typedef struct kvf_region kvf_region;

/*
 A transfer, which can be posted any number of times, once at a time.
 */
typedef struct kvf_transfer kvf_transfer;

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
     Where TCP is served, "127.0.0.1:0" for any free port; NULL: TCP is not used. Traffic is neither encrypted nor
     authenticated beyond region keys: stay on loopback or a trusted network.
     */
    const char *tcp_listen;
    /*
     1: peers on this host are reached through shared memory; 0: they are not.
     */
    uint32_t shm;
    /*
     Zero.
     */
    uint32_t reserved;
} kvf_agent_options;

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
} kvf_transfer_options;

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
 Starts an agent.

 KVF_INVALID for a bad name or address, KVF_IO when the address is in use.

 # Safety
 Each pointer is null or valid: `options` with its strings for reads, `agent_out` for a write.
 */
kvf_status kvf_agent_create(const struct kvf_agent_options *options, struct kvf_agent **agent_out);

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
 Sends a message to a peer and waits until its agent has taken it, at most `timeout_ms`.

 KVF_BUSY when the peer's inbox is full, KVF_INVALID above 65,536 bytes. After KVF_TIMEOUT it may still arrive.

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
 Where the region begins in this process. Memory of kvf_region_allocate stays there until the region is freed.

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
 Makes a transfer between `count` local ranges and as many remote ones, paired in order, of equal lengths. With `peer` NULL
 the remote ranges are this agent's own too. Connects to the peer; nothing moves before kvf_transfer_post.

 KVF_INVALID for a range outside its region or lists that do not pair, KVF_NOT_FOUND for an unknown region, KVF_DENIED
 for one that the peer does not export for this, KVF_PEER_LOST when the peer cannot be reached.

 # Safety
 Each pointer is null or valid: `agent` and `peer` live, `local` and `remote` for `count` reads, `options` with its
 notification for reads, `transfer_out` for a write.
 */
kvf_status kvf_transfer_create(const struct kvf_agent *agent,
                               const struct kvf_peer *peer,
                               const struct kvf_descriptor *local,
                               const struct kvf_descriptor *remote,
                               size_t count,
                               const struct kvf_transfer_options *options,
                               struct kvf_transfer **transfer_out);

/*
 Starts a transfer, which may be finished when this returns.

 Nothing is started on failure: KVF_BUSY when it is in flight or a queue is full, KVF_PEER_LOST when the peer cannot be
 reached, KVF_NOT_FOUND when a region was deregistered.

 # Safety
 `transfer` is null or live.
 */
kvf_status kvf_transfer_post(const struct kvf_transfer *transfer);

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
 Closes a connection.

 # Safety
 `index` is null or live, and not used again.
 */
kvf_status kvf_index_free(struct kvf_index *index);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVFABRIC_H */
