//! The words that client and server share: sources, registrations and positions, and their gRPC messages.

use kvcache_core::id::{Epoch, Sequence};
use kvcache_core::place::Tier;
use kvcache_core::ports::Position;
use kvcache_core::{Error, ErrorKind, PodName, Result};
use kvfabric_proto::v1;

/// Which events a source sends, and so how its reports are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// vLLM's events: copies are counted.
    Vllm,
    /// vLLM configured to re-report reused prefixes: idempotent.
    VllmFull,
    /// SGLang's events: idempotent.
    Sglang,
    /// A kvfabric node's own events: hashes are index keys; idempotent.
    Node,
}

impl SourceKind {
    /// The name in configuration, status and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::VllmFull => "vllm-full",
            Self::Sglang => "sglang",
            Self::Node => "node",
        }
    }

    /// The kind with this name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the value and the accepted ones.
    pub fn parse(name: &str) -> Result<Self> {
        [Self::Vllm, Self::VllmFull, Self::Sglang, Self::Node]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| {
                Error::invalid(
                    "source kind",
                    format!("{name:?}"),
                    "one of vllm, vllm-full, sglang, node",
                )
            })
    }

    pub(crate) const fn to_wire(self) -> v1::SourceKind {
        match self {
            Self::Vllm => v1::SourceKind::Vllm,
            Self::VllmFull => v1::SourceKind::VllmFull,
            Self::Sglang => v1::SourceKind::Sglang,
            Self::Node => v1::SourceKind::Node,
        }
    }

    pub(crate) fn from_wire(raw: i32) -> Result<Self> {
        match v1::SourceKind::try_from(raw) {
            Ok(v1::SourceKind::Vllm) => Ok(Self::Vllm),
            Ok(v1::SourceKind::VllmFull) => Ok(Self::VllmFull),
            Ok(v1::SourceKind::Sglang) => Ok(Self::Sglang),
            Ok(v1::SourceKind::Node) => Ok(Self::Node),
            Ok(v1::SourceKind::Unspecified) | Err(_) => {
                Err(Error::invalid("source kind", raw, "a known SourceKind"))
            }
        }
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

pub(crate) const fn tier_to_wire(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Device => v1::Tier::Hbm,
        Tier::Host => v1::Tier::Dram,
        Tier::Disk => v1::Tier::Nvme,
        Tier::Object => v1::Tier::Object,
    }
}

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
