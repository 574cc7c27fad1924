//! One task per publisher that the index connects to: a SUB socket for what happens and a DEALER socket for what was
//! missed.
//!
//! The two reach their peers at different moments, and a subscription is only in force once the publisher has read it:
//! what falls between is found by asking for the tail again shortly after connecting, and whenever a lookup waits for
//! something that has not arrived.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{OptionFuture, pending};
use kvcache_core::{Epoch, Error, ErrorKind, Result, Sequence};
use tokio::time::{Instant, sleep_until};

use super::Follower;
use crate::adapter::{SourceKind, Topic};
use crate::ingest::ImagePiece;
use crate::zmtp::{Connection, Endpoint};

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first and the longest pause between attempts that failed at once.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// When the tail is asked for though nothing shows that any is missing: batches dropped by a full queue leave no trace if
/// none follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probes {
    /// So long after a connection was made.
    pub(crate) after_connect: Duration,
    /// And whenever nothing was heard for so long.
    pub(crate) when_silent: Duration,
    /// And when somebody waits for what has not come after so long: those who wait make it be asked for at most so often.
    pub(crate) when_waited_for: Duration,
}

impl Default for Probes {
    /// 100 ms, as a subscription is in force by then, 15 s, and 20 ms.
    fn default() -> Self {
        Self {
            after_connect: Duration::from_millis(100),
            when_silent: Duration::from_secs(15),
            when_waited_for: Duration::from_millis(20),
        }
    }
}

/// The two sockets of one connection.
struct Link {
    events: Connection,
    replay: Option<Connection>,
}

/// What came over a link.
enum Input {
    Live(Vec<Bytes>),
    Reply(Vec<Bytes>),
    /// A socket failed, its peer went away, or it sent what nobody may send.
    Lost(Error),
    /// Somebody waits for what may have been missed.
    Wanted,
    /// Ask whether something was missed.
    Probe,
    /// The state machine wanted to be called now.
    Timeout,
    /// What a snapshot said of the source was not verified in time.
    Unverified,
}

/// Whether the peer is there but is no publisher of events, or one that sends more than is taken.
fn is_refusal(error: &Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::PeerLost | ErrorKind::Timeout | ErrorKind::Io
    )
}

impl Follower {
    /// Follows the source until the task is aborted.
    pub(crate) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        let mut lost_at = Some(Instant::now());
        loop {
            let ended = match self.connect(self.gone_at(lost_at)).await {
                Ok(link) => {
                    let before = self.ingest.position();
                    let error = self.follow(link).await;
                    let has_advanced = self.ingest.position() != before;
                    // Who goes no further because what comes next is refused is as good as not there: neither the pause
                    // between attempts nor the time until the source is given up begins anew, and what a source that
                    // is given up says before that is worth nothing.
                    if !is_refusal(&error) || (has_advanced && lost_at.is_some()) {
                        backoff = BACKOFF_MIN;
                        lost_at = Some(Instant::now());
                    } else if lost_at.is_none() {
                        self.give_up().await;
                    }
                    error
                }
                Err(error) => error,
            };
            if is_refusal(&ended) {
                tracing::warn!(source = %self.name, error = %ended, "publisher refused");
                self.metrics.publisher_refused();
            } else {
                tracing::debug!(source = %self.name, error = %ended, "publisher not connected");
            }
            if self.gone_at(lost_at).is_some_and(|at| at <= Instant::now()) {
                self.give_up().await;
                lost_at = None;
            }
            self.set_given_up(lost_at.is_none());
            // Not longer than until the source is given up.
            let retry_at = Instant::now() + backoff;
            let gone_at = self.gone_at(lost_at);
            sleep_until(gone_at.map_or(retry_at, |at| at.min(retry_at))).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// When the source is given up if it is not connected until then; never when it is given up already.
    fn gone_at(&self, lost_at: Option<Instant>) -> Option<Instant> {
        let ends = [
            lost_at.map(|at| at + self.limits.ttl),
            self.unverified_until,
        ];
        ends.into_iter().flatten().min()
    }

    /// One attempt.
    ///
    /// # Errors
    /// Why the publisher cannot be followed.
    async fn connect(&self, gone_at: Option<Instant>) -> Result<Link> {
        let left = gone_at.map_or(CONNECT_TIMEOUT, |at| at - Instant::now());
        let timeout = left.clamp(BACKOFF_MIN, CONNECT_TIMEOUT);
        let most = self.limits.message_bytes_max;
        let endpoint: Endpoint = self.spec.endpoint.parse()?;
        // Every topic: an endpoint belongs to one source, whatever its publisher calls itself.
        let events = Connection::subscribe(&endpoint, "", most, timeout).await?;
        let replay = match &self.spec.replay_endpoint {
            None => None,
            Some(endpoint) => Some(Connection::dealer(&endpoint.parse()?, most, timeout).await?),
        };
        Ok(Link { events, replay })
    }

    /// Ingests what comes over the link until it is lost; returns why it is.
    async fn follow(&mut self, mut link: Link) -> Error {
        self.set_connected(true);
        let now = self.now();
        self.ingest.handle_connected(now);
        let mut is_probing = false;
        let probes = self.limits.probes;
        let mut probe_at = Instant::now() + probes.after_connect;
        // What comes meanwhile does not put this off: who waits may wait for what comes after it.
        let mut wanted_at = None;
        let mut replay_from = self.act(false).await;
        let ended = loop {
            if let Some(from) = replay_from.take() {
                link.request_replay(from);
            }
            let is_current = self.ingest.is_current();
            is_probing &= !is_current;
            let ask_at = wanted_at.map_or(probe_at, |at| probe_at.min(at));
            let input = self
                .next_input(&mut link, is_current.then_some(ask_at))
                .await;
            let now = self.now();
            match input {
                Input::Live(frames) => {
                    probe_at = probe_at.max(Instant::now() + probes.when_silent);
                    self.take_live(&frames);
                }
                Input::Reply(frames) => self.take_reply(&frames),
                Input::Lost(error) => break error,
                // An idle publisher that does not answer is not there: reconnecting decides, and the TTL.
                Input::Timeout if is_probing => {
                    break Error::new(ErrorKind::Timeout, "no answer of the replay socket");
                }
                Input::Timeout => self.ingest.handle_timeout(now),
                // The publisher may be slow or mute: what it says from now on counts from its start.
                Input::Unverified => {
                    self.give_up().await;
                    break Error::new(ErrorKind::Timeout, "not verified in time");
                }
                Input::Wanted => {
                    let at = Instant::now() + probes.when_waited_for;
                    wanted_at = wanted_at.or(Some(at));
                }
                Input::Probe => {
                    wanted_at = None;
                    let position = self.ingest.position();
                    if Instant::now() >= probe_at || self.state.is_wanted_beyond(position) {
                        is_probing = true;
                        probe_at = Instant::now() + probes.when_silent;
                        self.ingest.handle_connected(now);
                    }
                }
            }
            replay_from = self.act(is_current).await;
            tokio::task::consume_budget().await;
        };
        self.ingest.handle_disconnected();
        self.set_connected(false);
        self.act(false).await;
        ended
    }

    /// Waits for what happens first. `probe_at` is none while a replay is under way.
    async fn next_input(&self, link: &mut Link, probe_at: Option<Instant>) -> Input {
        // Without a replay socket there is nobody to ask.
        let probe_at = probe_at.filter(|_| link.replay.is_some());
        let deadline = self
            .ingest
            .poll_timeout()
            .map(|at| Instant::now() + at.since(self.now()));
        let wait = async |at: Option<Instant>| match at {
            Some(at) => sleep_until(at).await,
            None => pending().await,
        };
        let wanted = async {
            if probe_at.is_none() {
                pending::<()>().await;
            }
            self.state.poke.notified().await;
        };
        let dealer = link.replay.as_mut().map(Connection::recv);
        tokio::select! {
            frames = link.events.recv() => frames.map_or_else(Input::Lost, Input::Live),
            Some(frames) = OptionFuture::from(dealer) => {
                frames.map_or_else(Input::Lost, Input::Reply)
            }
            () = wait(deadline) => Input::Timeout,
            () = wait(probe_at) => Input::Probe,
            () = wait(self.unverified_until) => Input::Unverified,
            () = wanted => Input::Wanted,
        }
    }

    pub(super) fn take_live(&mut self, frames: &[Bytes]) {
        let parsed = match frames {
            [topic, number, payload] => sequence(number).map(|number| (topic, number, payload)),
            _ => None,
        };
        let Some((topic, sequence, payload)) = parsed else {
            tracing::debug!(source = %self.name, frames = frames.len(), "not a KV event message");
            self.metrics.events_rejected(1);
            return;
        };
        self.heard();
        let now = self.now();
        let epoch = self.epoch(topic);
        self.ingest
            .handle_frame(now, epoch, sequence, payload.clone());
    }

    /// `[empty, topic, sequence, batch]`, or without the topic from engines before 0.26; a sequence of ones ends it. Nodes
    /// may begin with `[empty, topic, sequence, batch, place]`, the pieces of an image.
    pub(super) fn take_reply(&mut self, frames: &[Bytes]) {
        if let [_, topic, number, payload, place] = frames
            && self.spec.kind == SourceKind::Node
            && let (Some(cut), Some(place)) = (sequence(number), sequence(place))
        {
            self.heard();
            let (now, epoch) = (self.now(), self.epoch(topic));
            let piece = ImagePiece {
                cut,
                number: (place.0 >> 32) as u32,
                count: place.0 as u32,
                payload: payload.clone(),
            };
            self.ingest.handle_image(now, epoch, piece);
            return;
        }
        let parsed = match frames {
            [_, topic, number, payload] => Some((Some(topic), sequence(number), payload)),
            [_, number, payload] => Some((None, sequence(number), payload)),
            _ => None,
        };
        let now = self.now();
        match parsed {
            Some((_, Some(Sequence(u64::MAX)), _)) => {
                self.heard();
                self.ingest.handle_replay_end(now);
            }
            Some((topic, Some(sequence), payload)) => {
                self.heard();
                let epoch = topic.and_then(|topic| self.epoch(topic));
                self.ingest
                    .handle_replayed(now, epoch, sequence, payload.clone());
            }
            _ => {
                tracing::debug!(source = %self.name, frames = frames.len(), "not a replay reply");
                self.metrics.events_rejected(1);
            }
        }
    }

    /// The publisher's incarnation, which only nodes tell.
    fn epoch(&self, topic: &[u8]) -> Option<Epoch> {
        if self.spec.kind != SourceKind::Node {
            return None;
        }
        Topic::parse(topic, self.spec.kind)
            .inspect_err(|error| tracing::debug!(source = %self.name, %error, "topic"))
            .ok()
            .and_then(|topic| topic.epoch)
    }
}

impl Link {
    fn request_replay(&mut self, from: u64) {
        if let Some(dealer) = &mut self.replay {
            dealer.send(&[b"", &from.to_be_bytes()]);
        }
    }
}

fn sequence(frame: &Bytes) -> Option<Sequence> {
    let bytes: [u8; 8] = frame.as_ref().try_into().ok()?;
    Some(Sequence(u64::from_be_bytes(bytes)))
}
