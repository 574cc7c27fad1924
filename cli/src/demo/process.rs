//! A pod's process as its router holds it: calls go in as lines, answers come back in any order.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

use super::protocol::{Answer, Call, Done, PodSetup, Work};

/// How long a pod may take from its start to `Ready`.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How long a pod may take to stop before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// One pod, running or dead.
pub(crate) struct PodProcess {
    name: String,
    peer_address: String,
    stdin: tokio::sync::Mutex<ChildStdin>,
    child: tokio::sync::Mutex<Child>,
    calls: Arc<Calls>,
    next_call: AtomicU64,
}

/// Calls without an answer; none once the pod is dead.
struct Calls {
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Result<Done>>>>>,
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Result<Done>>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, id: u64, result: Result<Done>) {
        if let Some(caller) = self.lock().as_mut().and_then(|waiting| waiting.remove(&id)) {
            // A caller that gave up at its deadline is no concern of ours.
            let _ = caller.send(result);
        }
    }

    /// Every waiting call fails by being dropped, and later ones at once.
    fn close(&self) {
        self.lock().take();
    }
}

impl PodProcess {
    /// Starts a pod and waits until the indexer listens to it.
    pub(crate) async fn start(setup: &PodSetup) -> Result<Self> {
        let name = setup.node.pod.clone();
        let program = std::env::current_exe().map_err(|e| Error::io("path of this program", e))?;
        let mut child = Command::new(program)
            .arg("demo-pod")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Error::io(format!("start {name}"), e))?;
        let broken_pipe = || Error::new(ErrorKind::Internal, "a pod without standard streams");
        let mut stdin = child.stdin.take().ok_or_else(broken_pipe)?;
        let stdout = child.stdout.take().ok_or_else(broken_pipe)?;
        write_line(&mut stdin, setup)
            .await
            .map_err(|e| e.at(&name))?;
        let mut answers = BufReader::new(stdout);
        let first = tokio::time::timeout(START_DEADLINE, read_answer(&mut answers)).await;
        let peer_address = match first {
            Ok(Ok(Some(Answer::Ready { peer_address }))) => peer_address,
            Ok(Ok(Some(Answer::Broken { reason }))) => {
                return Err(Error::new(ErrorKind::Invalid, format!("{name}: {reason}")));
            }
            Ok(Ok(_)) => {
                return Err(Error::new(
                    ErrorKind::PeerLost,
                    format!("{name} ended at its start"),
                ));
            }
            Ok(Err(error)) => return Err(error.at(&name)),
            Err(_) => {
                let limit = START_DEADLINE.as_secs();
                let text = format!("{name} was not ready after {limit} s");
                return Err(Error::new(ErrorKind::Timeout, text));
            }
        };
        let calls = Arc::new(Calls {
            waiting: Mutex::new(Some(HashMap::new())),
        });
        tokio::spawn(hand_out_answers(answers, Arc::clone(&calls)));
        Ok(Self {
            name,
            peer_address,
            stdin: tokio::sync::Mutex::new(stdin),
            child: tokio::sync::Mutex::new(child),
            calls,
            next_call: AtomicU64::new(0),
        })
    }

    /// The pod's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where it leases blocks to its peers.
    pub(crate) fn peer_address(&self) -> &str {
        &self.peer_address
    }

    /// Whether its process is there.
    pub(crate) fn is_alive(&self) -> bool {
        self.calls.lock().is_some()
    }

    /// Sends work and waits for what comes of it.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] if the pod is dead or dies meanwhile, [`ErrorKind::Timeout`] at the deadline.
    pub(crate) async fn call(&self, work: Work, deadline: Duration) -> Result<Done> {
        let dead = || Error::new(ErrorKind::PeerLost, format!("{} is gone", self.name));
        let id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let (caller, answer) = oneshot::channel();
        match self.calls.lock().as_mut() {
            Some(waiting) => waiting.insert(id, caller),
            None => return Err(dead()),
        };
        let written = async { write_line(&mut *self.stdin.lock().await, &Call { id, work }).await };
        // After a line that was written in part, or to a pod that reads nothing for so long, no other can follow.
        if !matches!(tokio::time::timeout(deadline, written).await, Ok(Ok(()))) {
            self.calls.close();
            return Err(dead());
        }
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(dead()),
            Err(_) => {
                self.calls.answer(id, Err(dead()));
                let text = format!("{} gave no answer in {deadline:?}", self.name);
                Err(Error::new(ErrorKind::Timeout, text))
            }
        }
    }

    /// Kills the process with SIGKILL and waits until it is gone.
    pub(crate) async fn kill(&self) -> Result<()> {
        let result = self.child.lock().await.kill().await;
        self.calls.close();
        result.map_err(|e| Error::io(format!("kill {}", self.name), e))
    }

    /// Lets the pod shut down by itself; kills it if it does not.
    pub(crate) async fn stop(&self) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        let asked = self.call(Work::Stop, STOP_DEADLINE).await;
        let mut child = self.child.lock().await;
        match tokio::time::timeout(STOP_DEADLINE, child.wait()).await {
            Ok(Ok(status)) if status.success() && asked.is_ok() => Ok(()),
            Ok(Ok(status)) => Err(Error::new(
                ErrorKind::Internal,
                format!("{} ended with {status}", self.name),
            )),
            Ok(Err(error)) => Err(Error::io(format!("wait for {}", self.name), error)),
            Err(_) => {
                let killed = child.kill().await;
                let text = format!("{} did not stop and was killed: {killed:?}", self.name);
                Err(Error::new(ErrorKind::Timeout, text))
            }
        }
    }
}

/// Ends when the pod closes its output: that is, when it dies.
async fn hand_out_answers(mut answers: BufReader<ChildStdout>, calls: Arc<Calls>) {
    while let Ok(Some(answer)) = read_answer(&mut answers).await {
        match answer {
            Answer::Done { id, done } => calls.answer(id, Ok(done)),
            Answer::Failed { id, reason } => {
                calls.answer(id, Err(Error::new(ErrorKind::Internal, reason)));
            }
            Answer::Ready { .. } | Answer::Broken { .. } => break,
        }
    }
    calls.close();
}

async fn read_answer(answers: &mut BufReader<ChildStdout>) -> Result<Option<Answer>> {
    let mut line = String::new();
    let length = answers
        .read_line(&mut line)
        .await
        .map_err(|e| Error::io("answer", e))?;
    if length == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).map_err(|e| {
        let start: String = line.chars().take(80).collect();
        Error::new(ErrorKind::Invalid, format!("answer {start:?}")).with_source(e)
    })
}

/// One JSON line.
pub(super) async fn write_line(
    pipe: &mut ChildStdin,
    message: &impl serde::Serialize,
) -> Result<()> {
    let mut line = serde_json::to_vec(message)
        .map_err(|e| Error::new(ErrorKind::Internal, "encode a message").with_source(e))?;
    line.push(b'\n');
    pipe.write_all(&line)
        .await
        .map_err(|e| Error::io("write to a pod", e))
}
