//! One pod's process: a simulated engine on a real node, told by lines what to do.

mod engine;
mod quarantine;
mod translate;

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, Stdin, Stdout};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::protocol::{Answer, Call, Done, PodSetup, Work};
use engine::Engine;

/// How long the node may take to leave in order.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// Calls worked on at once; the router keeps fewer in flight.
const CALLS_MAX: usize = 512;

/// Serves calls until it is told to stop, or until its router is gone.
pub(crate) async fn run() -> Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let answers = Arc::new(Answers(Mutex::new(tokio::io::stdout())));
    let engine = match start(&mut lines).await {
        Ok(engine) => Arc::new(engine),
        Err(error) => {
            return answers
                .send(&Answer::Broken {
                    reason: error.to_string(),
                })
                .await;
        }
    };
    answers
        .send(&Answer::Ready {
            peer_address: engine.peer_address(),
        })
        .await?;
    let mut work = JoinSet::new();
    let stopped = loop {
        // A router that is gone closes the pipe; nobody would read an answer.
        let Some(line) = next_line(&mut lines).await? else {
            break None;
        };
        let call: Call = parse(&line)?;
        if matches!(call.work, Work::Stop) {
            break Some(call.id);
        }
        while work.try_join_next().is_some() {}
        if work.len() >= CALLS_MAX {
            let reason = format!("{CALLS_MAX} calls are being worked on");
            answers
                .send(&Answer::Failed {
                    id: call.id,
                    reason,
                })
                .await?;
            continue;
        }
        let (engine, answers) = (Arc::clone(&engine), Arc::clone(&answers));
        work.spawn(async move {
            let answer = match serve(&engine, call.work).await {
                Ok(done) => Answer::Done { id: call.id, done },
                Err(error) => Answer::Failed {
                    id: call.id,
                    reason: error.to_string(),
                },
            };
            // If the router is gone, the main loop notices.
            let _ = answers.send(&answer).await;
        });
    };
    work.shutdown().await;
    engine.shutdown(SHUTDOWN_DEADLINE).await?;
    match stopped {
        Some(id) => {
            answers
                .send(&Answer::Done {
                    id,
                    done: Done::Stopped,
                })
                .await
        }
        None => Ok(()),
    }
}

async fn serve(engine: &Engine, work: Work) -> Result<Done> {
    match work {
        Work::Prefill(task) => engine.prefill(&task).await.map(Done::Served),
        Work::Decode(task) => engine.decode(&task).await.map(Done::Served),
        Work::Stats => engine.counters().await.map(Done::Stats),
        Work::Stop => Ok(Done::Stopped),
    }
}

async fn start(lines: &mut Lines<BufReader<Stdin>>) -> Result<Engine> {
    let no_setup = || {
        Error::new(
            ErrorKind::Invalid,
            "a demo pod is started by `kvfabric demo`",
        )
    };
    let line = next_line(lines).await?.ok_or_else(no_setup)?;
    let setup: PodSetup = parse(&line)?;
    Engine::open(setup).await
}

async fn next_line(lines: &mut Lines<BufReader<Stdin>>) -> Result<Option<String>> {
    lines
        .next_line()
        .await
        .map_err(|e| Error::io("read from the router", e))
}

/// Reads a line that the router wrote.
pub(super) fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T> {
    serde_json::from_str(line)
        .map_err(|e| Error::new(ErrorKind::Invalid, "line from the router").with_source(e))
}

/// Standard output, one whole line at a time.
struct Answers(Mutex<Stdout>);

impl Answers {
    async fn send(&self, answer: &Answer) -> Result<()> {
        let mut line = serde_json::to_vec(answer)
            .map_err(|e| Error::new(ErrorKind::Internal, "encode an answer").with_source(e))?;
        line.push(b'\n');
        let mut out = self.0.lock().await;
        let written = async {
            out.write_all(&line).await?;
            out.flush().await
        };
        written
            .await
            .map_err(|e| Error::io("write to the router", e))
    }
}
