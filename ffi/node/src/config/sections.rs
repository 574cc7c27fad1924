//! The tables of a node's configuration.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use kvcache_core::prefix::data::Shard;
use kvcache_core::shape::Tensor;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_indexer::client::{SourceKind, SourceSpec};
use kvfabric_indexer::wire::parse_source_kind;
use kvfabric_transfer::{CONNECT_WITHIN_DEFAULT, LOOK_DEFAULT, VerbsOptions};
use serde::{Deserialize, Serialize};

use super::listen;
use crate::blocks::EngineScheme;

/// One rank's part of each block; the default is all of it. Two ranks never share or overwrite bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardSection {
    /// The rank in its tensor-parallel group, from 0.
    pub tensor_rank: u32,
    /// Ranks in that group.
    pub tensor_size: u32,
    /// The first layer that this pod holds, by its number in the model.
    pub first_layer: u32,
    /// How many layers it holds.
    pub layers: u32,
    /// KV heads of the model, all ranks together; 1 for one latent shared by all.
    pub kv_heads: u32,
    /// The engine's cache group, for engines that keep several kinds of layers apart.
    pub cache_group: u32,
}

impl Default for ShardSection {
    fn default() -> Self {
        Self {
            tensor_rank: 0,
            tensor_size: 1,
            first_layer: 0,
            layers: 1,
            kv_heads: 1,
            cache_group: 0,
        }
    }
}

impl ShardSection {
    pub(super) fn to_shard(&self) -> Result<Shard> {
        let last = self.first_layer.checked_add(self.layers);
        let Some(end) = last.filter(|_| self.layers > 0) else {
            let accepted = 1..=u32::MAX - self.first_layer;
            return Err(Error::invalid("layers", self.layers, accepted));
        };
        let tensor = Tensor::new(self.tensor_rank, self.tensor_size)?;
        let heads = tensor.heads(self.kv_heads)?;
        Ok(Shard {
            tensor,
            layers: self.first_layer..end,
            heads,
            cache_group: self.cache_group,
        })
    }
}

/// The DRAM tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HostSection {
    /// Bytes, rounded down to whole blocks.
    pub bytes: u64,
}

/// The HBM tier, in memory of a GPU that the node allocates.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HbmSection {
    /// The GPU's number in this process.
    #[serde(default)]
    pub device: u32,
    /// Bytes, rounded down to whole blocks.
    pub bytes: u64,
}

/// The NVMe tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// A folder of this node's own; made if it is not there.
    pub path: PathBuf,
    /// Bytes of all segments together.
    pub bytes: u64,
    /// Bytes of one segment, in which space comes back.
    pub segment_bytes: u64,
    /// Past the page cache: "auto", "on" or "off".
    #[serde(default)]
    pub direct: DirectSetting,
    /// Who reads and writes: "auto", "io_uring" or "threads".
    #[serde(default)]
    pub engine: DiskEngineSetting,
}

/// Whether files are read and written past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectSetting {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; an error where it cannot be.
    On,
    /// Never.
    Off,
}

/// Who reads and writes files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskEngineSetting {
    /// io_uring, or threads where the kernel or the container refuses it.
    #[default]
    Auto,
    /// io_uring; an error where it is refused.
    IoUring,
    /// Threads that block in system calls.
    Threads,
}

/// How queue pairs of RDMA are connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VerbsConnectSetting {
    /// By what both sides tell each other over TCP.
    #[default]
    Exchange,
    /// Through librdmacm, which must be in the system then: the kernel finds the way between IP addresses.
    RdmaCm,
}

/// The shared object tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectSection {
    /// `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. Credentials come from the
    /// environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`) or the instance, never from this file.
    pub url: String,
    /// What every object's name begins with.
    #[serde(default)]
    pub prefix: String,
    /// Accept a service without TLS: for stores on this host or on a network that is trusted.
    #[serde(default)]
    pub allow_http: bool,
    /// PEM file of authorities that are believed beside those of the system.
    #[serde(default)]
    pub authorities: Option<PathBuf>,
    /// What goes with each write to an S3 store for it to check.
    #[serde(default)]
    pub checksum: ObjectChecksumSetting,
    /// Longer objects go in parts of so many bytes; 16 MiB if it is not given.
    #[serde(default)]
    pub part_bytes: Option<u64>,
}

/// The checksum that an S3 store gets with each write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectChecksumSetting {
    /// None.
    Off,
    /// SHA-256.
    #[default]
    Sha256,
    /// CRC-64/NVME.
    Crc64Nvme,
}

/// How bytes move between pods.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FabricSection {
    /// Shared memory with pods on this host.
    pub shm: bool,
    /// Copies by the system between processes of this user on this host, for memory that cannot be shared; as `shm` if
    /// it is not given.
    pub cma: Option<bool>,
    /// Where TCP is served. Port 0 lets the system choose; "off": not at all.
    #[serde(with = "listen")]
    pub tcp_listen: Option<SocketAddr>,
    /// Further addresses to serve TCP on, those of other network cards; with `tcp_listen` at most 16.
    pub tcp_rails: Vec<SocketAddr>,
    /// How many TCP connections are made to each pod, at most 16.
    pub tcp_connections: usize,
    /// Certificates for TLS on all TCP connections of the fabric; without it they are in the clear.
    pub tls: Option<TlsSection>,
    /// The congestion control of TCP connections, such as `bbr`; the system's if it is not given.
    pub tcp_congestion: Option<String>,
    /// How long those who wait look before they sleep, in microseconds, at most 1,000; 0: they sleep at once.
    pub look_us: u64,
    /// How long each way to a pod may take to connect, in milliseconds, at most 60,000.
    pub connect_within_ms: u64,
    /// The ways to pods that go first, by name; the others follow in the usual order.
    pub prefer: Vec<String>,
    /// Bytes a second that fetches and other requests that someone waits for move at most.
    pub bytes_per_second: Option<u64>,
    /// Bytes a second that what gives way to them moves at most.
    pub background_bytes_per_second: Option<u64>,
    /// UCX, which must be in the system then: for RDMA. Only where the network is trusted.
    pub ucx: bool,
    /// Settings of UCX by their names without `UCX_`, such as `TLS`; others come from the environment.
    pub ucx_settings: BTreeMap<String, String>,
    /// RDMA by libibverbs, which must be in the system then, with a device. Only where the network is trusted.
    pub verbs: bool,
    /// The ports that may be used, with commas between them, each a device, or device and port (`mlx5_0:1`); of those that are
    /// up all that are as near as the nearest one otherwise.
    pub verbs_device: Option<String>,
    /// How many ports are used at most, the nearest first.
    pub verbs_rails: u8,
    /// The PCI address of what ports should be near to, such as a GPU; the memory node that the process is bound to otherwise.
    pub verbs_near: Option<String>,
    /// The entry of each port's GID table; RoCE v2 with an IPv4 address first otherwise.
    pub verbs_gid_index: Option<u8>,
    /// How queue pairs are connected; the same on all nodes.
    pub verbs_connect: VerbsConnectSetting,
    /// Where peers ask for connections; the GIDs' own IP addresses otherwise.
    pub verbs_listen: Option<SocketAddr>,
    /// The most bytes of content in a packet; what both ports do otherwise.
    pub verbs_mtu: Option<u32>,
    /// The traffic class of packets.
    pub verbs_traffic_class: u8,
    /// The service level of packets.
    pub verbs_service_level: u8,
    /// A packet that is not acknowledged is sent again after 4.096 µs × 2^this.
    pub verbs_timeout: u8,
    /// How often it is sent again before the peer is given up.
    pub verbs_retries: u8,
    /// How long the thread looks for completions before it sleeps, in microseconds.
    pub verbs_polling_us: u64,
    /// Copies from and to memory of GPUs that the engine registers with the node's agent, by the CUDA driver, which must be in the
    /// system then.
    pub cuda: bool,
    /// How bytes go between that memory and files.
    pub cuda_storage: StorageSetting,
    /// GPUs sum blocks that land in their memory, by kernels of ours; otherwise those blocks are summed in host memory first.
    pub cuda_sums: bool,
}

/// How bytes go between memory of GPUs and files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageSetting {
    /// Through pinned host memory.
    #[default]
    Staged,
    /// By cuFile where that goes past host memory.
    Direct,
    /// By cuFile wherever it takes a file.
    Cufile,
}

impl Default for FabricSection {
    fn default() -> Self {
        let verbs = VerbsOptions::default();
        Self {
            shm: true,
            cma: None,
            tcp_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            tcp_rails: Vec::new(),
            tcp_connections: 1,
            tls: None,
            tcp_congestion: None,
            look_us: LOOK_DEFAULT.as_micros() as u64,
            connect_within_ms: CONNECT_WITHIN_DEFAULT.as_millis() as u64,
            prefer: Vec::new(),
            bytes_per_second: None,
            background_bytes_per_second: None,
            ucx: false,
            ucx_settings: BTreeMap::new(),
            verbs: false,
            verbs_device: None,
            verbs_rails: verbs.rails,
            verbs_near: None,
            verbs_gid_index: None,
            verbs_connect: VerbsConnectSetting::Exchange,
            verbs_listen: None,
            verbs_mtu: None,
            verbs_traffic_class: verbs.traffic_class,
            verbs_service_level: verbs.service_level,
            verbs_timeout: verbs.timeout,
            verbs_retries: verbs.retries,
            verbs_polling_us: verbs.polling.as_micros() as u64,
            cuda: false,
            cuda_storage: StorageSetting::Staged,
            cuda_sums: false,
        }
    }
}

/// Files in PEM of what TLS needs.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// Certificates of the authorities that other pods' must come from.
    pub authorities: PathBuf,
    /// This pod's certificate, with its name as a DNS name, then those between it and the authority.
    pub certificates: PathBuf,
    /// The key of this pod's certificate.
    pub key: PathBuf,
}

/// The global index.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IndexSection {
    /// Its gRPC address, `http://host:port`.
    pub address: String,
    /// The address on which this node publishes events; the ports are the system's choice.
    #[serde(default = "default_publish_host")]
    pub publish_host: String,
    /// How long one question may take.
    #[serde(default = "default_lookup_deadline_ms")]
    pub lookup_deadline_ms: u64,
}

/// The engine that a pod serves: how it hashes blocks, and where it tells of its own cache.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSection {
    /// The engine, with whatever of its version changes the hashes, like `vllm/tagged`.
    pub name: String,
    /// Its hash algorithm, by the engine's own name; only cryptographic ones are taken.
    pub hash: String,
    /// The text that seeds the hashes, the same at each replica; empty for the engine's fixed default.
    #[serde(default)]
    pub seed: String,
    /// Where the engine publishes its KV events, `tcp://host:port`: registered with the index in place of events that
    /// this node publishes for it.
    pub events: Option<String>,
    /// Where the engine answers replays of them; without it every reconnect starts from nothing.
    pub events_replay: Option<String>,
    /// What these events are: `vllm`, `vllm-full` or `sglang`.
    #[serde(default = "default_events_kind")]
    pub events_kind: String,
}

impl EngineSection {
    pub(crate) fn scheme(&self) -> EngineScheme {
        EngineScheme {
            name: self.name.clone(),
            hash: self.hash.clone(),
            seed: self.seed.clone(),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::invalid("name", "empty", "the engine's name"));
        }
        if self.events.is_none() && self.events_replay.is_some() {
            let text = "events_replay is given without events";
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        self.events_source("engine")?;
        self.scheme().check()
    }

    /// The engine's own publisher, if it has one, as the source of this name that the index follows.
    pub(crate) fn events_source(&self, name: &str) -> Result<Option<SourceSpec>> {
        let kind = parse_source_kind(&self.events_kind).map_err(|e| e.at("events_kind"))?;
        if matches!(kind, SourceKind::Node | SourceKind::Approximate) {
            return Err(Error::invalid(
                "events_kind",
                kind.name(),
                "vllm, vllm-full or sglang",
            ));
        }
        Ok(self.events.as_ref().map(|endpoint| SourceSpec {
            name: name.to_owned(),
            kind,
            endpoint: endpoint.clone(),
            replay_endpoint: self.events_replay.clone(),
            data_parallel_rank: None,
            groups: Vec::new(),
        }))
    }
}

fn default_events_kind() -> String {
    "vllm".to_owned()
}

fn default_publish_host() -> String {
    "127.0.0.1".to_owned()
}

pub(super) const fn default_lookup_deadline_ms() -> u64 {
    500
}
