//! Engines that do not register themselves, and endpoints that engines connect to.

use kvcache_core::{Error, ErrorKind, PodName, Result};
use serde::Deserialize;

use super::ServerConfig;
use crate::wire::{
    CacheGroup, GroupRule, SOURCES_PER_POD_MAX, SourceKind, SourceSpec, parse_source_kind,
};
use crate::zmtp::Endpoint;

/// A source that is known from the start.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticSource {
    /// The pod's name in answers.
    pub pod: String,
    /// The source's name, unique within the pod.
    #[serde(default = "default_source_name")]
    pub name: String,
    /// `vllm`, `vllm-full`, `sglang`, `node`, or `approximate` for an engine that publishes nothing.
    #[serde(default = "default_source_kind")]
    pub kind: String,
    /// ZMQ endpoint of the publisher; none of an approximate source.
    #[serde(default)]
    pub endpoint: String,
    /// ZMQ endpoint of its replay socket; without one, every reconnect starts from nothing.
    pub replay_endpoint: Option<String>,
    /// The model it serves.
    #[serde(default)]
    pub model: String,
    /// Where the pod's peer service listens, if it has one.
    pub peer_address: Option<String>,
    /// The data-parallel rank that it tells of; absent: as its events say.
    pub data_parallel_rank: Option<u32>,
    /// So many ranks tell on their own: rank r, as source `NAME-r`, at both ports + r as vLLM's ranks do.
    pub data_parallel_size: Option<u32>,
    /// Not empty: this is no pod but a pool, and pods whose names begin with one of these may use what it holds.
    #[serde(default)]
    pub pool_for: Vec<String>,
    /// Tokens a block of the pod's engine, a multiple of the index's; absent: the index's.
    pub engine_block_size: Option<u32>,
    /// The engine's cache groups as far as they are known; its events tell of the others.
    #[serde(default)]
    pub groups: Vec<GroupConfig>,
}

/// A cache group of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Its number among the engine's groups.
    pub number: u32,
    /// The kind of cache as vLLM names it: `full_attention`, `sliding_window`, `mamba`, ….
    pub kind: String,
    /// The sliding window, in tokens.
    pub window: Option<u32>,
    /// Tokens a block of the group; absent: the engine's.
    pub block_size: Option<u32>,
}

/// An endpoint that engines connect to; there is nobody to ask for what was missed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerConfig {
    /// `tcp://HOST:PORT`; host `*`: every interface, port 0: any free one.
    pub endpoint: String,
    /// The source's name in the pods that connect here, unique among listeners.
    #[serde(default = "default_source_name")]
    pub name: String,
    /// `vllm`, `vllm-full` or `sglang`.
    #[serde(default = "default_source_kind")]
    pub kind: String,
    /// So many data-parallel ranks connect each to a port of its own: rank r, as source `NAME-r`, to this one + r.
    pub data_parallel_size: Option<u32>,
    /// The rank of all that connect here; absent: as their events say.
    pub data_parallel_rank: Option<u32>,
    /// The models that pods may have here; empty: any, as far as `models_max` allows.
    #[serde(default)]
    pub models: Vec<String>,
    /// Models that are not known otherwise which may come to be known here.
    #[serde(default = "default_models_max")]
    pub models_max: usize,
    /// Pods at once that came to be known at any listener, so that they leave some of the server's to others; absent: seven
    /// eighths of them.
    pub pods_max: Option<usize>,
}

impl ListenerConfig {
    /// An endpoint with default settings.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            name: default_source_name(),
            kind: default_source_kind(),
            data_parallel_size: None,
            data_parallel_rank: None,
            models: Vec::new(),
            models_max: default_models_max(),
            pods_max: None,
        }
    }
}

const fn default_models_max() -> usize {
    16
}

fn default_source_name() -> String {
    "engine".to_owned()
}

fn default_source_kind() -> String {
    "vllm".to_owned()
}

impl ServerConfig {
    /// The endpoints that engines connect to, one a rank where ranks are told.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the listener and what does not fit.
    pub fn listeners_by_rank(&self) -> Result<Vec<ListenerConfig>> {
        let mut all = Vec::with_capacity(self.listeners.len());
        for (position, listener) in self.listeners.iter().enumerate() {
            let by_rank = listener.by_rank();
            all.extend(by_rank.map_err(|error| error.at(format_args!("listeners[{position}]")))?);
        }
        Ok(all)
    }

    pub(super) fn check_listeners(&self) -> Result<()> {
        let mut names = std::collections::BTreeSet::new();
        let listeners = self.listeners_by_rank()?;
        if listeners.len() > SOURCES_PER_POD_MAX {
            let count = listeners.len();
            return Err(Error::invalid("listeners", count, 0..=SOURCES_PER_POD_MAX));
        }
        for (position, listener) in listeners.iter().enumerate() {
            let place = format!("listeners[{position}]");
            let at = |error: Error| error.at(&place);
            if !matches!(listener.endpoint.parse().map_err(at)?, Endpoint::Tcp { .. }) {
                let endpoint = format!("{:?}", listener.endpoint);
                return Err(at(Error::invalid("endpoint", endpoint, "tcp://HOST:PORT")));
            }
            let kind = parse_source_kind(&listener.kind).map_err(at)?;
            if matches!(kind, SourceKind::Node | SourceKind::Approximate) {
                // A node's epochs would be of no use without its replay socket; approximate ones connect nowhere.
                return Err(at(Error::invalid(
                    "kind",
                    format!("{:?}", listener.kind),
                    "vllm, vllm-full or sglang",
                )));
            }
            if listener.name.is_empty()
                || listener.name.contains('/')
                || !names.insert(&listener.name)
            {
                let context = format!(
                    "name {:?} is empty, has a '/' or is there twice",
                    listener.name
                );
                return Err(at(Error::new(ErrorKind::Invalid, context)));
            }
        }
        Ok(())
    }
}

impl ListenerConfig {
    fn by_rank(&self) -> Result<Vec<Self>> {
        let Some(size) = self.data_parallel_size else {
            return Ok(vec![self.clone()]);
        };
        check_size(size, self.data_parallel_rank)?;
        let of_rank = |rank| {
            Ok(Self {
                endpoint: at_rank(&self.endpoint, rank)?,
                name: format!("{}-{rank}", self.name),
                data_parallel_size: None,
                data_parallel_rank: Some(rank),
                ..self.clone()
            })
        };
        (0..size).map(of_rank).collect()
    }
}

/// # Errors
/// [`ErrorKind::Invalid`] naming the key and the number.
fn check_size(size: u32, rank: Option<u32>) -> Result<()> {
    if !(1..=SOURCES_PER_POD_MAX as u32).contains(&size) {
        let most = SOURCES_PER_POD_MAX as u32;
        return Err(Error::invalid("data_parallel_size", size, 1..=most));
    }
    match rank {
        Some(rank) => Err(Error::invalid(
            "data_parallel_rank",
            rank,
            "none beside data_parallel_size",
        )),
        None => Ok(()),
    }
}

/// Where a rank publishes, or connects to, when rank 0 does at `endpoint`: vLLM adds the rank to the port.
///
/// # Errors
/// [`ErrorKind::Invalid`] naming the endpoint when it has no port that could be added to.
fn at_rank(endpoint: &str, rank: u32) -> Result<String> {
    let parsed: Endpoint = endpoint.parse()?;
    let shifted = match parsed {
        Endpoint::Tcp { host, port } if port > 0 => u16::try_from(rank)
            .ok()
            .and_then(|rank| port.checked_add(rank))
            .map(|port| Endpoint::Tcp { host, port }),
        _ => None,
    };
    shifted.map(|endpoint| endpoint.to_string()).ok_or_else(|| {
        Error::invalid(
            "endpoint with data_parallel_size",
            format!("{endpoint:?}"),
            "tcp://HOST:PORT, whose ports PORT to PORT + size - 1 there are",
        )
    })
}

impl StaticSource {
    /// The pod's name, checked.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the name and the rule it breaks.
    pub fn pod_name(&self) -> Result<PodName> {
        PodName::new(&self.pod)
    }

    fn group(&self, group: &GroupConfig) -> CacheGroup {
        CacheGroup {
            number: group.number,
            rule: GroupRule::of_kind(Some(&group.kind), group.window),
            block_size: group.block_size.or(self.engine_block_size).unwrap_or(0),
        }
    }

    /// The sources that it stands for, as a registration would name them: one, or one a rank.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an unknown kind, or ranks whose ports there are not.
    pub fn specs(&self) -> Result<Vec<SourceSpec>> {
        let whole = self.spec()?;
        let Some(size) = self.data_parallel_size else {
            return Ok(vec![whole]);
        };
        check_size(size, self.data_parallel_rank)?;
        let of_rank = |rank| {
            Ok(SourceSpec {
                name: format!("{}-{rank}", self.name),
                endpoint: at_rank(&self.endpoint, rank)?,
                replay_endpoint: self
                    .replay_endpoint
                    .as_ref()
                    .map(|endpoint| at_rank(endpoint, rank))
                    .transpose()?,
                data_parallel_rank: Some(rank),
                ..whole.clone()
            })
        };
        (0..size).map(of_rank).collect()
    }

    /// # Errors
    /// [`ErrorKind::Invalid`] for an unknown kind.
    fn spec(&self) -> Result<SourceSpec> {
        Ok(SourceSpec {
            name: self.name.clone(),
            kind: parse_source_kind(&self.kind)?,
            endpoint: self.endpoint.clone(),
            replay_endpoint: self.replay_endpoint.clone(),
            data_parallel_rank: self.data_parallel_rank,
            groups: self.groups.iter().map(|group| self.group(group)).collect(),
        })
    }
}
