//! Keeps a pod registered: one stream, opened again whenever it ends.

use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::IndexClient;
use crate::wire::{self, Registration};

/// The first and the longest pause between attempts to register.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// How a registration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Never answered, or not again since.
    Pending {
        last_failure: Option<String>,
    },
    /// The stream is open; not every source is connected and replayed.
    Open,
    Ready,
    /// The index does not want this pod as it is.
    Refused {
        kind: ErrorKind,
        context: String,
    },
}

/// A pod's registration; dropping it withdraws the pod at once.
#[derive(Debug)]
pub struct Registered {
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

impl Registered {
    pub(super) fn start(client: IndexClient, registration: Registration) -> Self {
        let (sender, state) = watch::channel(State::Pending { last_failure: None });
        let task = tokio::spawn(keep_registered(client, registration, sender));
        Self { state, task }
    }

    /// Waits until the index has every source connected and replayed.
    ///
    /// # Errors
    /// `Timeout` with the last failure when `deadline` passes; the refusal (`Invalid`, `Version`, `Denied`) as soon as
    /// the index refuses the registration.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn ready(&self, deadline: Duration) -> Result<()> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|s| matches!(s, State::Ready | State::Refused { .. }));
        let settled = tokio::time::timeout(deadline, settled).await;
        let settled = settled.map(|found| found.map(|state| state.clone()));
        match settled {
            Ok(Ok(State::Refused { kind, context })) => Err(Error::new(kind, context)),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::new(
                ErrorKind::Cancelled,
                "the registration has ended",
            )),
            Err(_) => {
                let why = match &*self.state.borrow() {
                    State::Pending {
                        last_failure: Some(failure),
                    } => format!(": {failure}"),
                    State::Open => ": its sources are not all connected and replayed".to_owned(),
                    _ => String::new(),
                };
                let context = format!("pod not ready within {} ms{why}", deadline.as_millis());
                Err(Error::new(ErrorKind::Timeout, context))
            }
        }
    }

    /// Whether the index has every source connected and replayed, as far as is known now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.state.borrow() == State::Ready
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep_registered(
    client: IndexClient,
    registration: Registration,
    state: watch::Sender<State>,
) {
    let mut backoff = BACKOFF_MIN;
    loop {
        match hold_stream(&client, &registration, &state).await {
            Ok(()) => {
                backoff = BACKOFF_MIN;
                let last_failure = Some("the index closed the registration".to_owned());
                state.send_replace(State::Pending { last_failure });
            }
            Err(error) => {
                let refused = [ErrorKind::Invalid, ErrorKind::Version, ErrorKind::Denied]
                    .contains(&error.kind());
                if refused && !matches!(*state.borrow(), State::Refused { .. }) {
                    tracing::error!(pod = %registration.pod, %error, "the index refused this pod");
                } else {
                    tracing::debug!(pod = %registration.pod, %error, "register");
                }
                if matches!(*state.borrow(), State::Ready | State::Open) {
                    backoff = BACKOFF_MIN;
                }
                state.send_replace(if refused {
                    State::Refused {
                        kind: error.kind(),
                        context: error.to_string(),
                    }
                } else {
                    State::Pending {
                        last_failure: Some(error.to_string()),
                    }
                });
            }
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Registers, and returns when the stream has ended.
async fn hold_stream(
    client: &IndexClient,
    registration: &Registration,
    state: &watch::Sender<State>,
) -> Result<()> {
    let (sender, receiver) = mpsc::channel(1);
    let place = || format!("register at index {}", client.config().address);
    // The channel has room for this one message, and stays open as long as `sender` lives.
    let _ = sender.send(wire::registration_to_wire(registration)).await;
    let mut grpc = client.grpc();
    let answer = grpc.register(ReceiverStream::new(receiver)).await;
    let mut answers = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Err(wire::error_from_status(&status).at(place())),
    };
    state.send_replace(State::Open);
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                state.send_replace(if answer.ready {
                    State::Ready
                } else {
                    State::Open
                });
            }
            Ok(None) => return Ok(()),
            Err(status) => return Err(wire::error_from_status(&status).at(place())),
        }
    }
}
