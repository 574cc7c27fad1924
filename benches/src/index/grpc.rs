//! Lookups from end to end: a server in this process, asked over loopback, fed by publishers over ZMQ.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use kvcache_core::event::EngineEvent;
use kvcache_core::{EngineHash, Error, Result, Tier};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, LookupRequest, Prompt, Registered, Registration, SourceKind,
    SourcePosition,
};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::{ServerConfig, serve};

use crate::recorder::Recorder;
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};
use crate::stop::Stop;

use super::fill::{BLOCK_TOKENS, append_tokens, pod_name};
use super::lookup::{LENGTHS, ROUNDS};
use super::workload::{EVENT_BLOCKS, Stored, Workload};
use super::wrong;

const MODEL: &str = "bench";
const SOURCE: &str = "engine";
/// How many of the workload's workers publish.
const PODS: u32 = 8;
/// Sequences of each: the network is measured here, not the index.
const SEQUENCES: u32 = 10;
/// How long the index may take to follow.
const PATIENCE: Duration = Duration::from_secs(60);
/// Different questions of one length, asked in turns.
const QUESTIONS_MAX: u32 = 100;

/// An engine's publisher and its registration, which lasts as long as this.
struct Pod {
    publisher: Publisher,
    _registered: Registered,
}

/// Starts everything, waits until all is indexed, and asks.
///
/// # Errors
/// `Io` when something cannot listen; `Timeout` when the index does not follow; `Internal` for a wrong depth.
pub(super) fn measure(lookups: u32, recorder: &mut Recorder) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the runtime", error))?;
    runtime.block_on(measure_with_server(lookups, recorder))
}

async fn measure_with_server(lookups: u32, recorder: &mut Recorder) -> Result<()> {
    let server = serve(ServerConfig {
        grpc_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        metrics_listen: None,
        block_size: BLOCK_TOKENS,
        ..ServerConfig::default()
    })
    .await?;
    let mut config = ClientConfig::new(server.grpc_address().to_string());
    config.deadline = PATIENCE;
    let client = IndexClient::new(config)?;
    // All workers store the same, so that every question meets all pods.
    let workload = Workload::new(SEQUENCES, 64, EVENT_BLOCKS);
    let pods = publish(&client, &workload).await?;
    wait_until_applied(&client, &pods).await?;
    for length in [0].into_iter().chain(LENGTHS) {
        let name = format!("grpc-lookup-{length}");
        let questions = questions(&workload, length, lookups);
        let mut percentiles = Percentiles::default();
        for _ in 0..ROUNDS {
            let round = round(&client, &questions, lookups, length / 2, recorder.stop()).await?;
            percentiles.push_round(&round);
        }
        let case = Case {
            subject: OURS,
            name: &name,
        };
        recorder.extend(case.row("p50_us", "µs", &percentiles.p50));
        recorder.extend(case.row("p99_us", "µs", &percentiles.p99));
    }
    drop(pods);
    server.shutdown(PATIENCE).await
}

async fn publish(client: &IndexClient, workload: &Workload) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for worker in 0..PODS {
        let name = pod_name(worker)?;
        let config = PublisherConfig::new(name.clone(), MODEL, Stream::Engine);
        let publisher = Publisher::bind(config)?;
        let registered = client.register(Registration {
            pod: name,
            model: MODEL.to_owned(),
            block_size: BLOCK_TOKENS,
            key_scheme: ServerConfig::default().key_scheme,
            sources: vec![publisher.source(SOURCE, SourceKind::Vllm)],
            peer_address: None,
        });
        registered.ready(PATIENCE).await?;
        pods.push(Pod {
            publisher,
            _registered: registered,
        });
    }
    for stored in workload.events() {
        if let Some(pod) = pods.get(stored.worker as usize) {
            pod.publisher.publish_engine(vec![event(&stored)]);
        }
    }
    Ok(pods)
}

fn event(stored: &Stored) -> EngineEvent {
    let mut tokens = Vec::new();
    stored
        .blocks
        .iter()
        .for_each(|block| append_tokens(block.content, &mut tokens));
    EngineEvent::Stored {
        hashes: stored
            .blocks
            .iter()
            .map(|block| EngineHash(block.key))
            .collect(),
        parent: stored.parent.map(EngineHash),
        tokens,
        block_size: BLOCK_TOKENS,
        tier: Tier::Device,
    }
}

async fn wait_until_applied(client: &IndexClient, pods: &[Pod]) -> Result<()> {
    let mut request = LookupRequest::new(MODEL, Prompt::Keys(Vec::new()));
    for (worker, pod) in (0..).zip(pods) {
        let position = pod.publisher.position();
        request
            .min_position
            .push(SourcePosition::new(&pod_name(worker)?, SOURCE, position));
    }
    client.lookup(request).await?;
    Ok(())
}

fn questions(workload: &Workload, length: usize, lookups: u32) -> Vec<Vec<u32>> {
    (0..lookups.min(QUESTIONS_MAX))
        .map(|number| {
            let mut tokens = Vec::with_capacity(length * BLOCK_TOKENS as usize);
            let contents = workload.query(number.into(), length, length / 2);
            contents
                .into_iter()
                .for_each(|content| append_tokens(content, &mut tokens));
            tokens
        })
        .collect()
}

async fn round(
    client: &IndexClient,
    questions: &[Vec<u32>],
    lookups: u32,
    depth: usize,
    stop: &Stop,
) -> Result<Samples> {
    let mut samples = Samples::default();
    let pods_expected = if depth == 0 { 0 } else { PODS as usize };
    for tokens in questions.iter().cycle().take(lookups as usize) {
        if stop.is_set() {
            break;
        }
        let request = LookupRequest::new(MODEL, Prompt::Tokens(tokens.clone()));
        let start = Instant::now();
        let answer = client.lookup(request).await?;
        samples.push_us(start.elapsed());
        let found = answer
            .pods
            .iter()
            .filter(|pod| pod.depth as usize == depth)
            .count();
        if found != pods_expected || answer.pods.len() != found {
            let pods = answer.pods.len();
            return Err(wrong(format!(
                "{found} of {pods} pods have depth {depth} over gRPC"
            )));
        }
    }
    Ok(samples)
}
