//! The processes of a demo: one indexer, pods, and the folder where their tiers live.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::config::{
    DirectSetting, DiskEngineSetting, DiskSection, FabricSection, HostSection, IndexSection,
    NodeConfig, ObjectChecksumSetting, ObjectSection, ShardSection,
};
use kvfabric_indexer::client::{ClientConfig, IndexClient};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::args::{DemoArgs, TransportKind};
use super::indexer::{IndexerReady, IndexerSetup};
use super::plan::Plan;
use super::process::{PodProcess, write_line};
use super::protocol::PodSetup;

/// The model's name in the index.
const MODEL: &str = "demo";

/// How index keys are made in a demo.
const KEY_SCHEME: &str = "xxh3:1337";

/// How long the indexer may take to listen.
const INDEXER_START_DEADLINE: Duration = Duration::from_secs(20);

/// How long a fetch may take before blocks are computed instead.
const FETCH_DEADLINE_MS: u64 = 10_000;

/// Any free port, for this machine alone.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a pod does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Prefill,
    Decode,
}

/// A pod and what it does.
pub(crate) struct ClusterPod {
    role: Role,
    process: PodProcess,
}

impl ClusterPod {
    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn process(&self) -> &PodProcess {
        &self.process
    }
}

/// All processes of one run; they die with it.
pub(crate) struct Cluster {
    indexer: tokio::sync::Mutex<Child>,
    index: IndexClient,
    pods: Vec<ClusterPod>,
    prefill_tokens_per_second: f64,
    object_url: Option<String>,
}

impl Cluster {
    /// Starts the indexer, then all pods at once, and waits until they are ready.
    pub(crate) async fn start(args: &DemoArgs, plan: &Plan, folder: &Path) -> Result<Self> {
        let (indexer, address) = start_indexer(plan.block_tokens).await?;
        let index = IndexClient::new(ClientConfig {
            address: format!("http://{address}"),
            model: MODEL.to_owned(),
            deadline: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
        })?;
        let object_url = object_url(args, folder);
        let roles = (0..args.pods.prefill)
            .map(|number| (Role::Prefill, format!("prefill-{number}")))
            .chain((0..args.pods.decode).map(|n| (Role::Decode, format!("decode-{n}"))));
        let setups: Vec<(Role, PodSetup)> = roles
            .map(|(role, name)| {
                let setup = pod_setup(args, plan, folder, &name, address, object_url.clone());
                (role, setup)
            })
            .collect();
        let starts = setups.iter().map(|(_, setup)| PodProcess::start(setup));
        let processes = futures_util::future::try_join_all(starts).await?;
        let pods = setups
            .iter()
            .zip(processes)
            .map(|((role, _), process)| ClusterPod {
                role: *role,
                process,
            })
            .collect();
        Ok(Self {
            indexer: tokio::sync::Mutex::new(indexer),
            index,
            pods,
            prefill_tokens_per_second: args.prefill_tokens_per_second,
            object_url,
        })
    }

    pub(crate) fn pods(&self) -> &[ClusterPod] {
        &self.pods
    }

    pub(crate) fn index(&self) -> &IndexClient {
        &self.index
    }

    pub(crate) fn model(&self) -> &'static str {
        MODEL
    }

    pub(crate) fn prefill_tokens_per_second(&self) -> f64 {
        self.prefill_tokens_per_second
    }

    pub(crate) fn object_url(&self) -> Option<&str> {
        self.object_url.as_deref()
    }

    /// Stops every pod, then the indexer.
    pub(crate) async fn stop(&self) -> Result<()> {
        let stops = self.pods.iter().map(|pod| pod.process.stop());
        let results = futures_util::future::join_all(stops).await;
        let mut indexer = self.indexer.lock().await;
        // The indexer keeps nothing, so it need not be asked politely.
        let killed = indexer
            .kill()
            .await
            .map_err(|e| Error::io("stop the indexer", e));
        results.into_iter().collect::<Result<Vec<()>>>()?;
        killed
    }
}

/// The same program once more, as an indexer.
async fn start_indexer(block_tokens: u32) -> Result<(Child, SocketAddr)> {
    let program = std::env::current_exe().map_err(|e| Error::io("path of this program", e))?;
    let mut child = Command::new(program)
        .arg("demo-indexer")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Error::io("start the indexer", e))?;
    let no_pipe = || Error::new(ErrorKind::Internal, "the indexer has no standard streams");
    let setup = IndexerSetup {
        key_scheme: KEY_SCHEME.to_owned(),
        block_tokens,
    };
    // The pipe stays open as long as the child is kept: its end is the indexer's signal to leave.
    write_line(child.stdin.as_mut().ok_or_else(no_pipe)?, &setup).await?;
    let mut lines = BufReader::new(child.stdout.take().ok_or_else(no_pipe)?).lines();
    let line = match tokio::time::timeout(INDEXER_START_DEADLINE, lines.next_line()).await {
        Ok(Ok(Some(line))) => line,
        Ok(Ok(None)) => {
            return Err(Error::new(
                ErrorKind::PeerLost,
                "the indexer ended at its start",
            ));
        }
        Ok(Err(error)) => return Err(Error::io("read from the indexer", error)),
        Err(_) => {
            return Err(Error::new(
                ErrorKind::Timeout,
                "the indexer did not start in time",
            ));
        }
    };
    let ready: IndexerReady = serde_json::from_str(&line).map_err(|e| {
        Error::new(ErrorKind::Internal, format!("the indexer said {line:?}")).with_source(e)
    })?;
    Ok((child, ready.grpc))
}

/// Where the shared tier is; none when switched off.
fn object_url(args: &DemoArgs, folder: &Path) -> Option<String> {
    match args.object.as_deref() {
        Some("none") => None,
        Some(url) => Some(url.to_owned()),
        None => Some(format!("file://{}", folder.join("object").display())),
    }
}

/// Only the ways that were asked for: a demo over one of them must not pass over another.
fn fabric(transport: TransportKind) -> FabricSection {
    use TransportKind::{Auto, Shm, Tcp, Verbs};
    FabricSection {
        shm: matches!(transport, Auto | Shm),
        tcp_listen: matches!(transport, Auto | Tcp).then_some(LOOPBACK),
        verbs: transport == Verbs,
        ..FabricSection::default()
    }
}

fn pod_setup(
    args: &DemoArgs,
    plan: &Plan,
    folder: &Path,
    name: &str,
    indexer: SocketAddr,
    object_url: Option<String>,
) -> PodSetup {
    let path: PathBuf = folder.join(name).join("nvme");
    PodSetup {
        node: NodeConfig {
            pod: name.to_owned(),
            model: MODEL.to_owned(),
            model_identity: "6b".repeat(32),
            block_bytes: plan.block_bytes,
            block_tokens: plan.block_tokens,
            shard: ShardSection::default(),
            key_scheme: KEY_SCHEME.to_owned(),
            host: HostSection {
                bytes: plan.dram_bytes,
            },
            hbm: None,
            disk: plan.nvme.map(|nvme| DiskSection {
                path,
                bytes: nvme.bytes,
                segment_bytes: nvme.segment_bytes,
                direct: DirectSetting::Auto,
                engine: DiskEngineSetting::Auto,
            }),
            object: object_url.map(|url| ObjectSection {
                url,
                prefix: "blocks".to_owned(),
                allow_http: true,
                authorities: None,
                checksum: ObjectChecksumSetting::default(),
                part_bytes: None,
            }),
            fabric: fabric(args.transport),
            peer_listen: Some(LOOPBACK),
            index: Some(IndexSection {
                address: format!("http://{indexer}"),
                publish_host: "127.0.0.1".to_owned(),
                lookup_deadline_ms: 2_000,
            }),
            engine: None,
            metrics_listen: None,
        },
        hbm_bytes: plan.hbm_bytes,
        layers: plan.layers,
        prefill_tokens_per_second: args.prefill_tokens_per_second,
        fetch_deadline_ms: FETCH_DEADLINE_MS,
        lossless: args.unbounded,
    }
}
