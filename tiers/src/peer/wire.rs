//! Between the messages of `kvfabric.v1.Peer` and our types: the only place that trusts nothing in
//! them, so that everything behind it may.

use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{
    BlockKey, Checksum, ChecksumAlgorithm, Error, ErrorKind, LeaseId, PodName, Result, Tier,
};
use kvfabric_proto::{PROTOCOL_VERSION, v1};
use tonic::{Code, Status};

mod locate;

pub(crate) use locate::{
    LocateQuestion, check_locate, check_locate_response, check_unpin, locate_request,
    locate_response, unpin_request,
};

/// The most blocks one lease may ask for: 128 KiB of keys.
pub(crate) const LEASE_KEYS_MAX: usize = 4096;

/// The most agent metadata accepted, in bytes.
pub(crate) const METADATA_BYTES_MAX: usize = 256 << 10;

/// The longest message accepted, in bytes; the limits above and those of locating stay well below it.
pub(crate) const MESSAGE_BYTES_MAX: usize = 5 << 20;

const KEY_BYTES: usize = 32;

/// A peer that said hello: same protocol, same model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// What the holder calls itself.
    pub(crate) pod: PodName,
    /// For `Agent::load_peer`.
    pub(crate) agent_metadata: Bytes,
    /// Which run of the holder this is.
    pub(crate) incarnation: u64,
}

/// A request for a lease, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseQuestion {
    pub(crate) pod: PodName,
    pub(crate) incarnation: u64,
    pub(crate) keys: Vec<BlockKey>,
    pub(crate) block_bytes: u64,
    pub(crate) ttl: Duration,
}

/// A lease as the holder granted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseAnswer {
    pub(crate) lease: LeaseId,
    pub(crate) ttl: Duration,
    pub(crate) blocks: Vec<LeasedBlock>,
}

/// One block of a lease: where its bytes and its generation can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeasedBlock {
    /// The holder's region of the bytes, as its agent metadata names it.
    pub(crate) region: u64,
    pub(crate) offset: u64,
    pub(crate) checksum: Checksum,
    /// The generation word's value at the time of the lease.
    pub(crate) generation: u64,
    pub(crate) generation_region: u64,
    pub(crate) generation_offset: u64,
    /// Where the holder had the bytes when it was asked.
    pub(crate) tier: Tier,
}

/// Our greeting.
pub(crate) fn hello_request(pod: &PodName, model_identity: &[u8; 32]) -> v1::HelloRequest {
    v1::HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pod: pod.as_str().to_owned(),
        model_identity: Bytes::copy_from_slice(model_identity),
    }
}

/// Checks a greeting; the pod that sent it.
pub(crate) fn check_hello(
    message: &v1::HelloRequest,
    model_identity: &[u8; 32],
) -> Result<PodName> {
    check_version(message.protocol_version, &message.version)?;
    let pod = PodName::new(&message.pod)?;
    if message.model_identity[..] != model_identity[..] {
        let (theirs, ours) = (
            short_hex(&message.model_identity),
            short_hex(model_identity),
        );
        let context = format!("pod {pod} has model identity {theirs}…, this node {ours}…");
        return Err(Error::new(ErrorKind::Denied, context));
    }
    Ok(pod)
}

/// The answer to a greeting.
pub(crate) fn hello_response(hello: &Hello) -> v1::HelloResponse {
    v1::HelloResponse {
        protocol_version: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pod: hello.pod.as_str().to_owned(),
        agent_metadata: hello.agent_metadata.clone(),
        incarnation: hello.incarnation,
    }
}

/// Checks the answer to our greeting.
pub(crate) fn check_hello_response(message: v1::HelloResponse) -> Result<Hello> {
    check_version(message.protocol_version, &message.version)?;
    if message.agent_metadata.len() > METADATA_BYTES_MAX {
        let bytes = message.agent_metadata.len();
        return Err(Error::invalid(
            "bytes of agent_metadata",
            bytes,
            ..=METADATA_BYTES_MAX,
        ));
    }
    Ok(Hello {
        pod: PodName::new(&message.pod)?,
        agent_metadata: message.agent_metadata,
        incarnation: message.incarnation,
    })
}

fn check_version(theirs: u32, build: &str) -> Result<()> {
    if theirs == PROTOCOL_VERSION {
        return Ok(());
    }
    // The build is the other side's text: keep what is printable of it, and not too much.
    let build: String = build.chars().filter(|c| !c.is_control()).take(32).collect();
    let context = format!(
        "the peer (build {build:?}) speaks peer protocol version {theirs}, this node (build {:?}) \
         version {PROTOCOL_VERSION}",
        env!("CARGO_PKG_VERSION"),
    );
    Err(Error::new(ErrorKind::Version, context))
}

fn short_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Asks for a lease.
pub(crate) fn lease_request(question: &LeaseQuestion) -> v1::LeaseRequest {
    v1::LeaseRequest {
        pod: question.pod.as_str().to_owned(),
        incarnation: question.incarnation,
        keys: question
            .keys
            .iter()
            .flat_map(|key| key.0)
            .collect::<Vec<u8>>()
            .into(),
        block_bytes: question.block_bytes,
        ttl_ms: milliseconds(question.ttl),
    }
}

/// Checks a request for a lease.
pub(crate) fn check_lease(message: &v1::LeaseRequest) -> Result<LeaseQuestion> {
    let (chunks, rest) = message.keys.as_chunks::<KEY_BYTES>();
    if !rest.is_empty() || chunks.is_empty() || chunks.len() > LEASE_KEYS_MAX {
        let accepted = format!("{KEY_BYTES} each for 1 to {LEASE_KEYS_MAX} blocks");
        return Err(Error::invalid(
            "bytes of keys",
            message.keys.len(),
            accepted,
        ));
    }
    if message.ttl_ms == 0 {
        return Err(Error::invalid("ttl_ms", 0, 1..));
    }
    Ok(LeaseQuestion {
        pod: PodName::new(&message.pod)?,
        incarnation: message.incarnation,
        keys: chunks.iter().map(|key| BlockKey(*key)).collect(),
        block_bytes: message.block_bytes,
        ttl: Duration::from_millis(message.ttl_ms.into()),
    })
}

/// Grants a lease.
pub(crate) fn lease_response(answer: &LeaseAnswer) -> v1::LeaseResponse {
    let blocks = answer.blocks.iter().map(|block| v1::LeasedBlock {
        region: block.region,
        offset: block.offset,
        checksum_algorithm: u32::from(block.checksum.algorithm as u8),
        checksum: block.checksum.value,
        generation: block.generation,
        generation_region: block.generation_region,
        generation_offset: block.generation_offset,
        tier: tier_number(block.tier),
    });
    v1::LeaseResponse {
        lease: answer.lease.0,
        ttl_ms: milliseconds(answer.ttl),
        blocks: blocks.collect(),
    }
}

/// Checks a granted lease against what was asked: never more blocks, never a longer life.
pub(crate) fn check_lease_response(
    message: &v1::LeaseResponse,
    question: &LeaseQuestion,
) -> Result<LeaseAnswer> {
    if message.blocks.len() > question.keys.len() {
        let (blocks, asked) = (message.blocks.len(), question.keys.len());
        return Err(Error::invalid("blocks of the lease", blocks, ..=asked));
    }
    let ttl = Duration::from_millis(message.ttl_ms.into()).min(question.ttl);
    let blocks: Result<Vec<_>> = message
        .blocks
        .iter()
        .enumerate()
        .map(|(position, block)| {
            check_leased_block(block, question.block_bytes)
                .map_err(|error| error.at(format_args!("block {position} of the lease")))
        })
        .collect();
    Ok(LeaseAnswer {
        lease: LeaseId(message.lease),
        ttl,
        blocks: blocks?,
    })
}

fn check_leased_block(block: &v1::LeasedBlock, block_bytes: u64) -> Result<LeasedBlock> {
    let algorithm = u8::try_from(block.checksum_algorithm)
        .ok()
        .and_then(ChecksumAlgorithm::from_number)
        .ok_or_else(|| {
            let known = [ChecksumAlgorithm::Crc32c as u8];
            Error::invalid("checksum_algorithm", block.checksum_algorithm, known)
        })?;
    if block.offset.checked_add(block_bytes).is_none() {
        return Err(Error::invalid(
            "offset",
            block.offset,
            ..u64::MAX - block_bytes,
        ));
    }
    if block.generation_offset.checked_add(8).is_none() {
        return Err(Error::invalid(
            "generation_offset",
            block.generation_offset,
            ..u64::MAX - 8,
        ));
    }
    Ok(LeasedBlock {
        region: block.region,
        offset: block.offset,
        checksum: Checksum {
            algorithm,
            value: block.checksum,
        },
        generation: block.generation,
        generation_region: block.generation_region,
        generation_offset: block.generation_offset,
        tier: tier_of_number(block.tier)?,
    })
}

fn tier_number(tier: Tier) -> u32 {
    let tier = match tier {
        Tier::Device => v1::Tier::Hbm,
        Tier::Host => v1::Tier::Dram,
        Tier::Disk => v1::Tier::Nvme,
        Tier::Object => v1::Tier::Object,
    };
    tier as u32
}

fn tier_of_number(number: u32) -> Result<Tier> {
    let known = i32::try_from(number)
        .ok()
        .and_then(|number| v1::Tier::try_from(number).ok());
    match known {
        Some(v1::Tier::Hbm) => Ok(Tier::Device),
        Some(v1::Tier::Dram) => Ok(Tier::Host),
        Some(v1::Tier::Nvme) => Ok(Tier::Disk),
        Some(v1::Tier::Object) => Ok(Tier::Object),
        Some(v1::Tier::Unspecified) | None => Err(Error::invalid("tier", number, 1..=4)),
    }
}

fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Refuses a request that was meant for an earlier run of this node.
pub(crate) fn other_incarnation(asked: u64, ours: u64) -> Status {
    let text = format!("incarnation {asked:016x} was asked, this one is {ours:016x}");
    Status::new(Code::Aborted, text)
}

/// Whether the peer restarted since we greeted it.
pub(crate) fn is_other_incarnation(status: &Status) -> bool {
    status.code() == Code::Aborted
}

/// The status that a caller over gRPC gets.
pub(crate) fn status_of(error: &Error) -> Status {
    let code = match error.kind() {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Busy | ErrorKind::NoSpace => Code::ResourceExhausted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::PeerLost => Code::Unavailable,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Version => Code::FailedPrecondition,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::NotFound => Code::NotFound,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The error that a status from `peer` means to us: anything below gRPC itself is a lost peer.
pub(crate) fn error_of(status: &Status, peer: &str) -> Error {
    let kind = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
        Code::ResourceExhausted => ErrorKind::Busy,
        Code::DataLoss => ErrorKind::Corrupt,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        Code::FailedPrecondition => ErrorKind::Version,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Denied,
        Code::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::PeerLost,
    };
    let text: String = status
        .message()
        .chars()
        .filter(|c| !c.is_control())
        .take(512)
        .collect();
    Error::new(kind, format!("peer {peer}: {text}"))
}

#[cfg(test)]
mod tests;
