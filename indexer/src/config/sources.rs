//! Engines that do not register themselves, and endpoints that engines connect to.

use kvcache_core::{Error, ErrorKind, PodName, Result};
use serde::Deserialize;

use super::ServerConfig;
use crate::source::zmtp::Endpoint;
use crate::wire::{
    CacheGroup, GroupRule, SOURCES_PER_POD_MAX, SourceKind, SourceSpec, parse_source_kind,
};

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
}

fn default_source_name() -> String {
    "engine".to_owned()
}

fn default_source_kind() -> String {
    "vllm".to_owned()
}

impl ServerConfig {
    pub(super) fn check_listeners(&self) -> Result<()> {
        let mut names = std::collections::BTreeSet::new();
        if self.listeners.len() > SOURCES_PER_POD_MAX {
            let count = self.listeners.len();
            return Err(Error::invalid("listeners", count, 0..=SOURCES_PER_POD_MAX));
        }
        for (position, listener) in self.listeners.iter().enumerate() {
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

    /// The source as a registration would name it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an unknown kind.
    pub fn spec(&self) -> Result<SourceSpec> {
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
