//! The words that client and server share: sources, registrations and positions, and their gRPC messages.

use kvcache_core::id::{Epoch, Sequence};
use kvcache_core::place::Tier;
use kvcache_core::ports::Position;
use kvcache_core::{Error, ErrorKind, PodName, Result};
use kvfabric_proto::{PROTOCOL_VERSION, v1};

pub use crate::adapter::{CacheGroup, GroupRule, SourceKind};

/// The kind with this name in configuration.
///
/// # Errors
/// [`ErrorKind::Invalid`] naming the value and the accepted ones.
pub fn parse_source_kind(name: &str) -> Result<SourceKind> {
    [
        SourceKind::Vllm,
        SourceKind::VllmFull,
        SourceKind::Sglang,
        SourceKind::Node,
        SourceKind::Approximate,
    ]
    .into_iter()
    .find(|kind| kind.name() == name)
    .ok_or_else(|| {
        Error::invalid(
            "source kind",
            format!("{name:?}"),
            "vllm, vllm-full, sglang, node or approximate",
        )
    })
}

pub(crate) const fn source_kind_to_wire(kind: SourceKind) -> v1::SourceKind {
    match kind {
        SourceKind::Vllm => v1::SourceKind::Vllm,
        SourceKind::VllmFull => v1::SourceKind::VllmFull,
        SourceKind::Sglang => v1::SourceKind::Sglang,
        SourceKind::Node => v1::SourceKind::Node,
        SourceKind::Approximate => v1::SourceKind::Approximate,
    }
}

#[cfg(feature = "server")]
pub(crate) fn source_kind_from_wire(raw: i32) -> Result<SourceKind> {
    match v1::SourceKind::try_from(raw) {
        Ok(v1::SourceKind::Vllm) => Ok(SourceKind::Vllm),
        Ok(v1::SourceKind::VllmFull) => Ok(SourceKind::VllmFull),
        Ok(v1::SourceKind::Sglang) => Ok(SourceKind::Sglang),
        Ok(v1::SourceKind::Node) => Ok(SourceKind::Node),
        Ok(v1::SourceKind::Approximate) => Ok(SourceKind::Approximate),
        Ok(v1::SourceKind::Unspecified) | Err(_) => Err(Error::invalid(
            "source kind",
            raw,
            "a SourceKind of kvfabric.v1",
        )),
    }
}

/// One stream of events of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// Unique within the pod, like `engine` or `node`.
    pub name: String,
    /// What it sends.
    pub kind: SourceKind,
    /// ZMQ endpoint of the publisher, like `tcp://127.0.0.1:5557`.
    pub endpoint: String,
    /// ZMQ endpoint of its replay socket, if it has one.
    pub replay_endpoint: Option<String>,
    /// The data-parallel rank that it tells of; none: as its events say.
    pub data_parallel_rank: Option<u32>,
    /// The engine's cache groups as far as they are known beforehand; its events tell of the others.
    pub groups: Vec<CacheGroup>,
}

/// What a pod says of itself when it registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Its name in answers.
    pub pod: PodName,
    /// The model it serves.
    pub model: String,
    /// Tokens a block of its engine.
    pub block_size: u32,
    /// The scheme of its index keys, like `xxh3:1337`.
    pub key_scheme: String,
    /// Where its events come from.
    pub sources: Vec<SourceSpec>,
    /// Where its peer service listens, `host:port`, if it has one.
    pub peer_address: Option<String>,
    /// Not empty: this is no pod but a pool, and pods whose names begin with one of these may use what it holds.
    pub pool_for: Vec<String>,
}

pub(crate) fn group_to_wire(group: &CacheGroup) -> v1::CacheGroup {
    let (rule, window_tokens) = match group.rule {
        GroupRule::Full => (v1::GroupRule::Full, 0),
        GroupRule::Window { tokens } => (v1::GroupRule::Window, tokens),
        GroupRule::State => (v1::GroupRule::State, 0),
        GroupRule::Nothing => (v1::GroupRule::Nothing, 0),
    };
    v1::CacheGroup {
        number: group.number,
        rule: rule.into(),
        window_tokens,
        block_size: group.block_size,
    }
}

/// # Errors
/// `Invalid` naming the group and the value.
pub(crate) fn group_from_wire(wire: &v1::CacheGroup) -> Result<CacheGroup> {
    let rule = match (v1::GroupRule::try_from(wire.rule), wire.window_tokens) {
        (Ok(v1::GroupRule::Full), _) => GroupRule::Full,
        (Ok(v1::GroupRule::Window), tokens) if tokens > 0 => GroupRule::Window { tokens },
        (Ok(v1::GroupRule::State), _) => GroupRule::State,
        (Ok(v1::GroupRule::Nothing), _) => GroupRule::Nothing,
        (rule, window) => {
            let told = format!("{rule:?} with a window of {window} tokens");
            let place = format!("rule of cache group {}", wire.number);
            return Err(Error::invalid(&place, told, "a GroupRule of kvfabric.v1"));
        }
    };
    Ok(CacheGroup {
        number: wire.number,
        rule,
        block_size: wire.block_size,
    })
}

/// The most sources a pod may have: an engine per data-parallel rank, and a node.
#[cfg(feature = "server")]
pub(crate) const SOURCES_PER_POD_MAX: usize = 64;

pub(crate) fn registration_to_wire(registration: &Registration) -> v1::RegisterRequest {
    let sources = registration.sources.iter().map(|source| v1::Source {
        name: source.name.clone(),
        kind: source_kind_to_wire(source.kind).into(),
        endpoint: source.endpoint.clone(),
        replay_endpoint: source.replay_endpoint.clone().unwrap_or_default(),
        data_parallel_rank: source.data_parallel_rank,
        groups: source.groups.iter().map(group_to_wire).collect(),
    });
    v1::RegisterRequest {
        protocol_version: PROTOCOL_VERSION,
        pod: registration.pod.as_str().to_owned(),
        model: registration.model.clone(),
        block_size: registration.block_size,
        key_scheme: registration.key_scheme.clone(),
        sources: sources.collect(),
        peer_address: registration.peer_address.clone().unwrap_or_default(),
        pool_for: registration.pool_for.clone(),
    }
}

/// # Errors
/// `Version` naming both versions; `Invalid` naming the field.
#[cfg(feature = "server")]
pub(crate) fn registration_from_wire(wire: v1::RegisterRequest) -> Result<Registration> {
    if wire.protocol_version != PROTOCOL_VERSION {
        let context = format!(
            "registration speaks protocol version {}, the indexer {PROTOCOL_VERSION}",
            wire.protocol_version
        );
        return Err(Error::new(ErrorKind::Version, context));
    }
    if wire.sources.len() > SOURCES_PER_POD_MAX {
        return Err(Error::invalid(
            "sources",
            wire.sources.len(),
            1..=SOURCES_PER_POD_MAX,
        ));
    }
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let sources = wire.sources.into_iter().map(|source| {
        Ok(SourceSpec {
            kind: source_kind_from_wire(source.kind)?,
            name: source.name,
            endpoint: source.endpoint,
            replay_endpoint: some(source.replay_endpoint),
            data_parallel_rank: source.data_parallel_rank,
            groups: source
                .groups
                .iter()
                .map(group_from_wire)
                .collect::<Result<_>>()?,
        })
    });
    Ok(Registration {
        pod: PodName::new(&wire.pod)?,
        model: wire.model,
        block_size: wire.block_size,
        key_scheme: wire.key_scheme,
        sources: sources.collect::<Result<_>>()?,
        peer_address: some(wire.peer_address),
        pool_for: wire.pool_for,
    })
}

/// The full name of a pod's source, as positions carry it: `pod/source`.
#[must_use]
pub fn source_name(pod: &PodName, source: &str) -> String {
    format!("{pod}/{source}")
}

/// A source's position, by the source's full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePosition {
    /// Full name: [`source_name`].
    pub source: String,
    /// How far.
    pub position: Position,
}

impl SourcePosition {
    /// The position of source `source` of `pod`.
    #[must_use]
    pub fn new(pod: &PodName, source: &str, position: Position) -> Self {
        Self {
            source: source_name(pod, source),
            position,
        }
    }

    pub(crate) fn to_wire(&self) -> v1::SourcePosition {
        v1::SourcePosition {
            source: self.source.clone(),
            epoch: self.position.epoch.0,
            next_sequence: self.position.next.0,
        }
    }

    pub(crate) fn from_wire(wire: v1::SourcePosition) -> Self {
        Self {
            source: wire.source,
            position: Position {
                epoch: Epoch(wire.epoch),
                next: Sequence(wire.next_sequence),
            },
        }
    }
}

#[cfg(feature = "server")]
pub(crate) const fn tier_to_wire(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Device => v1::Tier::Hbm,
        Tier::Host => v1::Tier::Dram,
        Tier::Disk => v1::Tier::Nvme,
        Tier::Object => v1::Tier::Object,
    }
}

#[cfg(feature = "client")]
pub(crate) fn tier_from_wire(raw: i32) -> Result<Tier> {
    match v1::Tier::try_from(raw) {
        Ok(v1::Tier::Hbm) => Ok(Tier::Device),
        Ok(v1::Tier::Dram) => Ok(Tier::Host),
        Ok(v1::Tier::Nvme) => Ok(Tier::Disk),
        Ok(v1::Tier::Object) => Ok(Tier::Object),
        Ok(v1::Tier::Unspecified) | Err(_) => Err(Error::new(
            ErrorKind::Invalid,
            format!("tier number {raw} is unknown"),
        )),
    }
}

/// The newest format of snapshots that this build writes and reads.
pub(crate) const SNAPSHOT_FORMAT: u32 = 3;

/// The longest gRPC message either side accepts, in bytes: four million tokens.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// The metadata entry that carries an error's kind, since several kinds share a gRPC code.
const KIND_METADATA: &str = "kvfabric-error";

/// An error as the gRPC status that carries it.
#[cfg(feature = "server")]
pub(crate) fn status_from_error(error: &Error) -> tonic::Status {
    use tonic::Code;
    let code = match error.kind() {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Version | ErrorKind::Unsupported => Code::FailedPrecondition,
        ErrorKind::Busy | ErrorKind::NoSpace => Code::ResourceExhausted,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::PeerLost => Code::Unavailable,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::NotFound => Code::NotFound,
        _ => Code::Internal,
    };
    let mut status = tonic::Status::new(code, error.to_string());
    let kind = tonic::metadata::MetadataValue::from_static(error.kind().name());
    status.metadata_mut().insert(KIND_METADATA, kind);
    status
}

/// The kind of error that [`status_from_error`] put into the status.
#[cfg(feature = "server")]
pub(crate) fn kind_of_status(status: &tonic::Status) -> &str {
    let kind = status.metadata().get(KIND_METADATA);
    kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default()
}

/// What a gRPC status means to the caller.
#[cfg(feature = "client")]
pub(crate) fn error_from_status(status: &tonic::Status) -> Error {
    use tonic::Code;
    let told = status
        .metadata()
        .get(KIND_METADATA)
        .and_then(|kind| kind.to_str().ok());
    let kind = match (told, status.code()) {
        (Some("version"), _) => ErrorKind::Version,
        (Some("unsupported"), _) | (_, Code::Unimplemented) => ErrorKind::Unsupported,
        (_, Code::DeadlineExceeded) => ErrorKind::Timeout,
        (_, Code::Cancelled) => ErrorKind::Cancelled,
        (_, Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange) => {
            ErrorKind::Invalid
        }
        (_, Code::NotFound) => ErrorKind::NotFound,
        (_, Code::ResourceExhausted) => ErrorKind::Busy,
        (_, Code::PermissionDenied | Code::Unauthenticated) => ErrorKind::Denied,
        (_, Code::Unavailable | Code::Aborted) => ErrorKind::PeerLost,
        (_, Code::DataLoss) => ErrorKind::Corrupt,
        _ => ErrorKind::Io,
    };
    Error::new(kind, status.message().to_owned())
}
