//! Lookups from end to end: a server process asked over loopback and fed by publishers over ZMQ, beside an echo that moves
//! as many bytes both ways through the same gRPC stack in the same process.
//!
//! One client asks one question after the other, the index and the echo in turns, so that both meet the same machine.

mod echo;
mod pods;
mod server;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_indexer::client::{ClientConfig, IndexClient};
use kvfabric_proto::v1::index_client::IndexClient as Grpc;
use kvfabric_proto::v1::{LookupRequest, LookupResponse, lookup_request};
use tonic::transport::{Channel, Endpoint};

use crate::recorder::Recorder;
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};
use crate::stop::Stop;

use self::echo::EchoClient;
use self::pods::{PATIENCE, Pods};
use self::server::ServerProcess;
use super::fill::{BLOCK_TOKENS, append_tokens};
use super::lookup::{LENGTHS, ROUNDS};
use super::workload::{EVENT_BLOCKS, Workload};
use super::wrong;

pub(crate) use self::server::serve_until_told;

const MODEL: &str = "bench";
const ECHO: &str = "grpc-echo";
/// Different questions of one length, asked in turns.
const QUESTIONS_MAX: u32 = 100;
/// Lookups in a round here, at most: each takes a hundred times as long as one in a process.
const LOOKUPS_MAX: u32 = 1000;
/// The length that is asked beside the publishers: 8,192 tokens.
const LENGTH_BESIDE_WRITERS: usize = 512;

/// Starts everything, waits until all is indexed, and asks.
///
/// # Errors
/// `Io` when something cannot listen; `Timeout` when the index does not follow; `Internal` for a wrong depth.
pub(super) fn measure(sequences: u32, lookups: u32, recorder: &mut Recorder) -> Result<()> {
    let server = ServerProcess::start()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the runtime", error))?;
    let measured = runtime.block_on(measure_with(&server, sequences, lookups, recorder));
    // The publishers' connections end before the server does.
    drop(runtime);
    measured
}

async fn measure_with(
    server: &ServerProcess,
    sequences: u32,
    lookups: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    let (lookups, stop) = (lookups.min(LOOKUPS_MAX), recorder.stop().clone());
    let mut config = ClientConfig::new(server.index.clone());
    config.deadline = PATIENCE;
    let client = IndexClient::new(config)?;
    let workload = Workload::new(sequences, 1, EVENT_BLOCKS);
    let pods = Pods::start(&client).await?;
    let goes_on = || !stop.is_set();
    pods.publish(&client, workload.events(), goes_on).await?;
    let held = client.status().await?.entries;
    if goes_on() && held != workload.pairs() {
        let pairs = workload.pairs();
        return Err(wrong(format!("the server holds {held} of {pairs} pairs")));
    }
    let mut asker = Asker {
        index: Grpc::new(connect(&server.index).await?),
        echo: EchoClient::new(connect(&server.echo).await?),
    };
    for length in [0].into_iter().chain(LENGTHS) {
        let questions = questions(&workload, length, lookups);
        let mut rounds = Rounds::default();
        for _ in 0..ROUNDS {
            asker.round(&questions, lookups, &stop, &mut rounds).await?;
        }
        rounds.record(&format!("grpc-lookup-{length}"), recorder);
    }
    let questions = questions(&workload, LENGTH_BESIDE_WRITERS, lookups);
    let is_published = AtomicBool::new(false);
    let publishing = async {
        let started = Instant::now();
        let published = pods
            .publish(&client, workload.extra_events(), goes_on)
            .await;
        let time = started.elapsed();
        is_published.store(true, Ordering::Release);
        published.map(|blocks| blocks as f64 / time.as_secs_f64())
    };
    let asking = async {
        let mut rounds = Rounds::default();
        // A round that was begun while others published counts; at least one always is.
        while goes_on() {
            asker.round(&questions, lookups, &stop, &mut rounds).await?;
            if is_published.load(Ordering::Acquire) {
                break;
            }
        }
        Ok::<_, Error>(rounds)
    };
    let (rate, rounds) = tokio::try_join!(publishing, asking)?;
    let name = "grpc-lookup-512-beside-writers";
    rounds.record(name, recorder);
    let case = Case {
        subject: OURS,
        name,
    };
    recorder.extend(case.single("blocks_per_s", "blocks/s", rate));
    Ok(())
}

async fn connect(address: &str) -> Result<Channel> {
    let lost = |error: tonic::transport::Error| {
        Error::new(ErrorKind::PeerLost, format!("connect to {address}")).with_source(error)
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(lost)?;
    endpoint.tcp_nodelay(true).connect().await.map_err(lost)
}

/// A prompt's tokens on the wire, and the blocks of it that are stored.
struct Question {
    tokens: Vec<u8>,
    depth: usize,
}

fn questions(workload: &Workload, length: usize, lookups: u32) -> Vec<Question> {
    let question = |number: u32| {
        let mut tokens = Vec::with_capacity(length * BLOCK_TOKENS as usize);
        let contents = workload.query(number.into(), length, length / 2);
        contents
            .into_iter()
            .for_each(|content| append_tokens(content, &mut tokens));
        Question {
            tokens: tokens
                .iter()
                .flat_map(|token| token.to_le_bytes())
                .collect(),
            depth: length / 2,
        }
    };
    (0..lookups.min(QUESTIONS_MAX)).map(question).collect()
}

/// What several rounds took.
#[derive(Default)]
struct Rounds {
    index: Percentiles,
    echo: Percentiles,
    over: Samples,
    answer_bytes: Samples,
}

struct Asker {
    index: Grpc<Channel>,
    echo: EchoClient,
}

impl Asker {
    /// Asks the index and the echo in turns.
    async fn round(
        &mut self,
        questions: &[Question],
        lookups: u32,
        stop: &Stop,
        rounds: &mut Rounds,
    ) -> Result<()> {
        let (mut index, mut echo) = (Samples::default(), Samples::default());
        for question in questions.iter().cycle().take(lookups as usize) {
            if stop.is_set() {
                return Ok(());
            }
            let request = LookupRequest {
                model: MODEL.to_owned(),
                prompt: Some(lookup_request::Prompt::Tokens(
                    question.tokens.clone().into(),
                )),
                ..LookupRequest::default()
            };
            let bytes = question.tokens.clone();
            let started = Instant::now();
            let answer = self.index.lookup(request).await;
            index.push_us(started.elapsed());
            let answer = answer
                .map_err(|status| wrong(status.to_string()))?
                .into_inner();
            check(&answer, question.depth)?;
            let answer_bytes = encoded_bytes(&answer);
            rounds.answer_bytes.push(f64::from(answer_bytes));
            let started = Instant::now();
            self.echo.ask(bytes, answer_bytes).await?;
            echo.push_us(started.elapsed());
        }
        if let (Some(index), Some(echo)) = (index.percentile(50), echo.percentile(50)) {
            rounds.over.push(index - echo);
        }
        rounds.index.push_round(&index);
        rounds.echo.push_round(&echo);
        Ok(())
    }
}

/// The deepest pod has as much as is stored; nobody answers a question about nothing.
fn check(answer: &LookupResponse, depth: usize) -> Result<()> {
    let found = answer.pods.first().map_or(0, |pod| pod.depth) as usize;
    if found == depth {
        return Ok(());
    }
    Err(wrong(format!(
        "the deepest of {} pods has {found} blocks over gRPC instead of {depth}",
        answer.pods.len()
    )))
}

fn encoded_bytes(answer: &LookupResponse) -> u32 {
    prost::Message::encoded_len(answer) as u32
}

impl Rounds {
    fn record(&self, name: &str, recorder: &mut Recorder) {
        for (subject, percentiles) in [(OURS, &self.index), (ECHO, &self.echo)] {
            let case = Case { subject, name };
            recorder.extend(case.row("p50_us", "µs", &percentiles.p50));
            recorder.extend(case.row("p99_us", "µs", &percentiles.p99));
        }
        let case = Case {
            subject: OURS,
            name,
        };
        recorder.extend(case.row("p50_over_echo_us", "µs", &self.over));
        recorder.extend(case.row("answer_bytes", "bytes", &self.answer_bytes));
    }
}
