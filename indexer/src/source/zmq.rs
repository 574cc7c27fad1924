//! One task per publisher: a SUB socket for what happens and a DEALER socket for what was missed.
//!
//! A `connect` of the ZMQ library must not be cancelled from outside (the endpoint would be lost for ever), so each
//! attempt is bounded by the library's own timeout and begins with fresh sockets. Those reach their peers at different
//! moments, and a subscription is only in force once the publisher has read it: what falls between is found by asking
//! for the tail again shortly after connecting, and whenever a lookup waits for something that has not arrived.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{OptionFuture, pending};
use kvcache_core::{Epoch, Sequence};
use tokio::time::{Instant, sleep_until};
use zeromq::{
    DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, SubSocket, ZmqMessage,
};

use super::Follower;
use crate::adapter::{SourceKind, Topic};

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first and the longest pause between attempts that failed at once.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The tail is asked for again so long after a connection was made.
const PROBE_AFTER_CONNECT: Duration = Duration::from_millis(100);
/// And whenever nothing was heard for so long: batches dropped by a full queue leave no trace if none follows.
const PROBE_IDLE: Duration = Duration::from_secs(15);
/// Two lookups that wait make the tail be asked for at most so often.
const PROBE_PAUSE: Duration = Duration::from_millis(20);

type Monitor = futures_util::stream::BoxStream<'static, SocketEvent>;

/// The two sockets of one connection.
struct Link {
    events: SubSocket,
    events_monitor: Monitor,
    replay: Option<(DealerSocket, Monitor)>,
}

/// What came over a link.
enum Input {
    Live(ZmqMessage),
    Reply(ZmqMessage),
    /// A socket failed or its peer went away.
    Lost,
    /// Ask whether something was missed.
    Probe,
    /// The state machine wanted to be called now.
    Timeout,
    /// What a snapshot said of the source was not verified in time.
    Unverified,
}

impl Follower {
    /// Follows the source until the task is aborted.
    pub(crate) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        let mut lost_at = Some(Instant::now());
        loop {
            let gone_at = [lost_at.map(|at| at + self.ttl), self.unverified_until];
            let gone_at = gone_at.into_iter().flatten().min();
            match self.connect(gone_at).await {
                Some(link) => {
                    backoff = BACKOFF_MIN;
                    self.follow(link).await;
                    lost_at = Some(Instant::now());
                }
                None => {
                    if gone_at.is_some_and(|at| at <= Instant::now()) {
                        self.give_up().await;
                        lost_at = None;
                    }
                    // Not longer than until the source is given up.
                    let retry_at = Instant::now() + backoff;
                    sleep_until(gone_at.map_or(retry_at, |at| at.min(retry_at))).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
        }
    }

    /// One attempt; none when the publisher is not there.
    async fn connect(&self, gone_at: Option<Instant>) -> Option<Link> {
        let left = gone_at.map_or(CONNECT_TIMEOUT, |at| at - Instant::now());
        let timeout = left.clamp(BACKOFF_MIN, CONNECT_TIMEOUT);
        match self.open(timeout).await {
            Ok(link) => Some(link),
            Err(error) => {
                tracing::debug!(source = %self.name, %error, "connect to publisher");
                None
            }
        }
    }

    async fn open(&self, timeout: Duration) -> zeromq::ZmqResult<Link> {
        let options = || {
            let mut options = SocketOptions::default();
            options.connect_timeout(timeout);
            options
        };
        let mut events = SubSocket::with_options(options());
        // Every topic: an endpoint belongs to one source, whatever its publisher calls itself.
        events.subscribe("").await?;
        let events_monitor = events.monitor().boxed();
        events.connect(&self.spec.endpoint).await?;
        let replay = match &self.spec.replay_endpoint {
            None => None,
            Some(endpoint) => {
                let mut dealer = DealerSocket::with_options(options());
                let monitor = dealer.monitor().boxed();
                dealer.connect(endpoint).await?;
                Some((dealer, monitor))
            }
        };
        Ok(Link {
            events,
            events_monitor,
            replay,
        })
    }

    /// Ingests what comes over the link until it is lost.
    async fn follow(&mut self, mut link: Link) {
        self.set_connected(true);
        let now = self.now();
        self.ingest.handle_connected(now);
        let mut is_probing = false;
        let mut probe_at = Instant::now() + PROBE_AFTER_CONNECT;
        let mut replay_from = self.act(false).await;
        loop {
            if let Some(from) = replay_from.take()
                && link.request_replay(from).await.is_err()
            {
                break;
            }
            let is_current = self.ingest.is_current();
            is_probing &= !is_current;
            let input = self
                .next_input(&mut link, is_current.then_some(probe_at))
                .await;
            let now = self.now();
            if let Input::Live(_) | Input::Reply(_) = input {
                self.heard_at = Some(std::time::Instant::now());
            }
            match input {
                Input::Live(message) => {
                    probe_at = probe_at.max(Instant::now() + PROBE_IDLE);
                    self.take_live(message);
                }
                Input::Reply(message) => self.take_reply(message),
                Input::Lost => break,
                // An idle publisher that does not answer is not there: reconnecting decides, and the TTL.
                Input::Timeout if is_probing => break,
                Input::Timeout => self.ingest.handle_timeout(now),
                // The publisher may be slow or mute: what it says from now on counts from its start.
                Input::Unverified => {
                    self.give_up().await;
                    break;
                }
                Input::Probe => {
                    is_probing = true;
                    probe_at = Instant::now() + PROBE_IDLE;
                    self.ingest.handle_connected(now);
                }
            }
            replay_from = self.act(is_current).await;
            tokio::task::consume_budget().await;
        }
        self.ingest.handle_disconnected();
        self.set_connected(false);
        self.act(false).await;
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
        let poked = async {
            if probe_at.is_none() {
                pending::<()>().await;
            }
            self.state.poke.notified().await;
            tokio::time::sleep(PROBE_PAUSE).await;
        };
        let (dealer, dealer_monitor) = match &mut link.replay {
            Some((dealer, monitor)) => (Some(dealer.recv()), Some(lost(monitor))),
            None => (None, None),
        };
        tokio::select! {
            message = link.events.recv() => message.map_or(Input::Lost, Input::Live),
            Some(message) = OptionFuture::from(dealer) => message.map_or(Input::Lost, Input::Reply),
            () = lost(&mut link.events_monitor) => Input::Lost,
            Some(()) = OptionFuture::from(dealer_monitor) => Input::Lost,
            () = wait(deadline) => Input::Timeout,
            () = wait(probe_at) => Input::Probe,
            () = wait(self.unverified_until) => Input::Unverified,
            () = poked => Input::Probe,
        }
    }

    fn take_live(&mut self, message: ZmqMessage) {
        let frames = message.into_vec();
        let parsed = match frames.as_slice() {
            [topic, number, payload] => sequence(number).map(|number| (topic, number, payload)),
            _ => None,
        };
        let Some((topic, sequence, payload)) = parsed else {
            tracing::debug!(source = %self.name, frames = frames.len(), "not a KV event message");
            self.metrics.events_rejected(1);
            return;
        };
        let now = self.now();
        let epoch = self.epoch(topic);
        self.ingest
            .handle_frame(now, epoch, sequence, payload.clone());
    }

    /// `[empty, topic, sequence, batch]`, or without the topic from engines before 0.26; a sequence of ones ends it.
    fn take_reply(&mut self, message: ZmqMessage) {
        let frames = message.into_vec();
        let parsed = match frames.as_slice() {
            [_, topic, number, payload] => Some((Some(topic), sequence(number), payload)),
            [_, number, payload] => Some((None, sequence(number), payload)),
            _ => None,
        };
        let now = self.now();
        match parsed {
            Some((_, Some(Sequence(u64::MAX)), _)) => self.ingest.handle_replay_end(now),
            Some((topic, Some(sequence), payload)) => {
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
    async fn request_replay(&mut self, from: u64) -> zeromq::ZmqResult<()> {
        let Some((dealer, _)) = &mut self.replay else {
            return Ok(());
        };
        let mut request = ZmqMessage::from(Bytes::new());
        request.push_back(Bytes::copy_from_slice(&from.to_be_bytes()));
        dealer.send(request).await
    }
}

fn sequence(frame: &Bytes) -> Option<Sequence> {
    let bytes: [u8; 8] = frame.as_ref().try_into().ok()?;
    Some(Sequence(u64::from_be_bytes(bytes)))
}

/// Completes when the socket's peer is gone.
async fn lost(monitor: &mut Monitor) {
    while let Some(event) = monitor.next().await {
        if matches!(event, SocketEvent::Disconnected(_)) {
            return;
        }
    }
}
