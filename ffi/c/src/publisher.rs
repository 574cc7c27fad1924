//! Telling the index of an engine's cache without a node.

use std::ffi::c_char;
use std::sync::Arc;

use kvfabric::life::Life;
use kvfabric::{EngineEvent, EnginePublisher, EnginePublisherConfig, Error, Namespace, Result};

use crate::boundary::{
    Handle, Out, boundary, enter, into_raw, milliseconds, optional_text, take, text,
};
use crate::events::{kvf_stored_event, parse_removed, parse_stored};
use crate::options::{self, SizePrefixed};
use crate::status::kvf_status;

/// The longest call to the index that names no deadline, in milliseconds.
const DEADLINE_MS: u32 = 2_000;

/// Publishes an engine's events, and keeps its pod registered with the index.
pub struct kvf_publisher {
    publisher: EnginePublisher,
}

impl Handle for kvf_publisher {
    const NAME: &'static str = "publisher";

    fn life(&self) -> &Arc<Life> {
        self.publisher.life()
    }
}

/// Who publishes, and to whom.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_publisher_options {
    /// sizeof(struct kvf_publisher_options).
    pub size: usize,
    /// Where the index listens, "host:port".
    pub index: *const c_char,
    /// The name by which routers know the engine.
    pub pod: *const c_char,
    /// The model's name, as routers ask for it.
    pub model: *const c_char,
    /// How index keys are made; the index must use the same. NULL: "xxh3:1337".
    pub key_scheme: *const c_char,
    /// The host of this process as the index reaches it; the ports are the system's choice. NULL: "127.0.0.1".
    pub publish_host: *const c_char,
    /// Where the pod's peer service listens, "ip:port"; NULL if it has none.
    pub peer_address: *const c_char,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// How long each call to the index may take; 0: 2 seconds.
    pub deadline_ms: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_publisher_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_publisher_options";
}

/// Begins to publish for an engine that has no node, and registers its pod with the index. Blocks until the index follows.
///
/// KVF_INVALID for a wrong setting, with its name; KVF_PEER_LOST or KVF_TIMEOUT when no index answers; what the index says when
/// it refuses the pod.
///
/// # Safety
/// Each pointer is null or valid: `options` with its strings for reads, `publisher_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_publisher_open(
    options: *const kvf_publisher_options,
    publisher_out: *mut *mut kvf_publisher,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        // SAFETY: its strings are null or valid, by contract.
        let config = unsafe { parse(&options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(publisher_out, "publisher_out") }?;
        let publisher = EnginePublisher::open(config)?;
        out.write(into_raw(kvf_publisher { publisher }));
        Ok(())
    })
}

/// # Safety
/// The strings of `options` are null or valid.
unsafe fn parse(options: &kvf_publisher_options) -> Result<EnginePublisherConfig> {
    // SAFETY: null or a string, by this function's contract.
    let index = unsafe { text(options.index, "kvf_publisher_options.index") }?;
    // SAFETY: null or a string, by this function's contract.
    let pod = unsafe { text(options.pod, "kvf_publisher_options.pod") }?;
    // SAFETY: null or a string, by this function's contract.
    let model = unsafe { text(options.model, "kvf_publisher_options.model") }?;
    let place = "kvf_publisher_options.key_scheme";
    // SAFETY: null or a string, by this function's contract.
    let key_scheme = unsafe { optional_text(options.key_scheme, place) }?;
    let place = "kvf_publisher_options.publish_host";
    // SAFETY: null or a string, by this function's contract.
    let publish_host = unsafe { optional_text(options.publish_host, place) }?;
    let place = "kvf_publisher_options.peer_address";
    // SAFETY: null or a string, by this function's contract.
    let peer_address = unsafe { optional_text(options.peer_address, place) }?;
    let peer_address = peer_address.map(|address| {
        let parsed = address.parse();
        parsed.map_err(|_| Error::invalid(place, format!("{address:?}"), "\"ip:port\""))
    });
    let deadline_ms = match options.deadline_ms {
        0 => DEADLINE_MS,
        told => told,
    };
    Ok(EnginePublisherConfig {
        index: format!("http://{index}"),
        pod: pod.to_owned(),
        model: model.to_owned(),
        block_tokens: options.block_tokens,
        key_scheme: key_scheme.unwrap_or("xxh3:1337").to_owned(),
        publish_host: publish_host.unwrap_or("127.0.0.1").to_owned(),
        peer_address: peer_address.transpose()?,
        deadline: milliseconds(deadline_ms),
    })
}

/// Tells the index that the engine has stored blocks. Never blocks.
///
/// KVF_INVALID for an owner whose names are too long for the index.
///
/// # Safety
/// Each pointer is null or valid: `publisher` live, `event` with its arrays and its owner for reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_publisher_stored(
    publisher: *const kvf_publisher,
    event: *const kvf_stored_event,
) -> kvf_status {
    boundary(|| {
        let publisher = enter(publisher, "publisher")?;
        let publisher = &publisher.publisher;
        // SAFETY: null or readable with what it points to, by contract.
        let told = unsafe { parse_stored(event, publisher.block_tokens()) }?;
        publisher.publish(&told.owner, &[told.event]).map(drop)
    })
}

/// Tells the index that one copy of each of these blocks has left a tier of the engine's, a kvf_tier. Never blocks.
///
/// # Safety
/// Each pointer is null or valid: `publisher` live, `hashes` for `count` reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_publisher_removed(
    publisher: *const kvf_publisher,
    hashes: *const u64,
    count: usize,
    tier: u32,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for `count` values, by contract.
        let removed = unsafe { parse_removed(hashes, count, tier) }?;
        publish(publisher, removed)
    })
}

/// Tells the index that the engine has dropped everything from the accelerator's memory. Never blocks.
///
/// # Safety
/// `publisher` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_publisher_cleared(publisher: *const kvf_publisher) -> kvf_status {
    boundary(|| publish(publisher, EngineEvent::Cleared))
}

/// What is no block's in particular needs no owner.
fn publish(publisher: *const kvf_publisher, event: EngineEvent) -> Result<()> {
    let publisher = enter(publisher, "publisher")?;
    let publisher = &publisher.publisher;
    publisher.publish(&Namespace::default(), &[event]).map(drop)
}

/// Ends the registration and stops publishing: the index forgets the pod.
///
/// # Safety
/// `publisher` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_publisher_free(publisher: *mut kvf_publisher) -> kvf_status {
    boundary(|| take(publisher, "publisher", |_| Ok(())))
}
