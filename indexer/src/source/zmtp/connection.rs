//! One connection to a publisher.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kvcache_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep_until, timeout};

use super::decode::{Decoder, GREETING_BYTES, Received, corrupt, property};
use super::endpoint::{Endpoint, Halves};
use super::{Role, SEND_BYTES_MAX, SILENCE, Silence};

/// The longest context of a ping that a pong repeats.
const PING_CONTEXT_MAX: usize = 16;

/// A connection whose handshake is done.
pub(crate) struct Connection {
    /// Who is at the other end, for errors.
    peer: String,
    io: Halves,
    decoder: Decoder,
    /// What is not written yet.
    out: BytesMut,
    /// Whether the peer answers pings.
    can_ping: bool,
    silence: Silence,
    heard_at: Instant,
    /// When the peer was asked whether it is there, if it has not been heard of since.
    pinged_at: Option<Instant>,
}

impl Connection {
    /// Subscribes at a publisher to what begins with `topic`.
    ///
    /// # Errors
    /// As [`Connection::greet`]; `PeerLost` when nobody is there.
    pub(crate) async fn subscribe(
        endpoint: &Endpoint,
        topic: &str,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        Self::open(endpoint, Role::Subscriber, message_bytes_max, deadline)
            .await
            .map(|connection| connection.subscribed(topic))
    }

    /// Connects to a replay socket.
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub(crate) async fn dealer(
        endpoint: &Endpoint,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        Self::open(endpoint, Role::Dealer, message_bytes_max, deadline).await
    }

    async fn open(
        endpoint: &Endpoint,
        role: Role,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        let opened = timeout(deadline, async {
            let io = endpoint.open().await?;
            Self::greet(io, String::new(), role, message_bytes_max).await
        });
        let opened = opened.await.unwrap_or_else(|_| Err(unanswered(deadline)));
        let mut opened = opened.map_err(|error| error.at(endpoint))?;
        opened.peer = endpoint.to_string();
        Ok(opened)
    }

    /// Subscribes at a publisher that connected by itself.
    ///
    /// # Errors
    /// As [`Connection::greet`].
    pub(crate) async fn accepted(
        (io, from): (Halves, String),
        topic: &str,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        let greeted = Self::greet(io, from.clone(), Role::Subscriber, message_bytes_max);
        let greeted = timeout(deadline, greeted).await;
        greeted
            .unwrap_or_else(|_| Err(unanswered(deadline)))
            .map(|connection| connection.subscribed(topic))
            .map_err(|error| error.at(from))
    }

    /// The handshake.
    ///
    /// # Errors
    /// What [`Decoder::next`] refuses; `Invalid` for a socket type that does not fit; `Denied` with the peer's words;
    /// `PeerLost` when it closes; `Timeout` when it does not answer.
    async fn greet(io: Halves, peer: String, role: Role, message_bytes_max: usize) -> Result<Self> {
        let mut connection = Self {
            peer,
            io,
            decoder: Decoder::new(message_bytes_max),
            out: BytesMut::from(&greeting()[..]),
            can_ping: false,
            silence: SILENCE,
            heard_at: Instant::now(),
            pinged_at: None,
        };
        loop {
            match connection.receive().await? {
                Received::Greeting { minor } => {
                    connection.can_ping = minor >= 1;
                    connection.push_ready(role);
                }
                Received::Command { name, body } => match name.as_ref() {
                    b"READY" => {
                        let kind = property(body, b"Socket-Type")?.unwrap_or_default();
                        if !role.accepts(&kind) {
                            return Err(Error::invalid(
                                "socket type of the peer",
                                format!("{:?}", String::from_utf8_lossy(&kind)),
                                format_args!("what a {} socket talks to", role.name()),
                            ));
                        }
                        return Ok(connection);
                    }
                    b"ERROR" => {
                        let reason = body.get(1..).unwrap_or_default();
                        let reason = String::from_utf8_lossy(reason).into_owned();
                        let context = format!("the peer refuses: {reason:?}");
                        return Err(Error::new(ErrorKind::Denied, context));
                    }
                    _ => return Err(corrupt("a command before READY")),
                },
                Received::Message(_) => return Err(corrupt("a message before READY")),
            }
        }
    }

    fn subscribed(mut self, topic: &str) -> Self {
        // The message of ZMTP 3.0, which peers of 3.1 take as well.
        let mut body = BytesMut::with_capacity(1 + topic.len());
        body.put_u8(1);
        body.put_slice(topic.as_bytes());
        self.push_frame(0, &body);
        self
    }

    /// Queues a message of small frames; [`Connection::recv`] sends it.
    pub(crate) fn send(&mut self, frames: &[&[u8]]) {
        for (position, frame) in frames.iter().enumerate() {
            self.push_frame(u8::from(position + 1 < frames.len()), frame);
        }
    }

    #[cfg(test)]
    pub(super) fn with_silence(mut self, silence: Silence) -> Self {
        self.silence = silence;
        self
    }

    /// The next message.
    ///
    /// # Errors
    /// What [`Decoder::next`] refuses, with the peer's endpoint; `PeerLost` when it closed or does not answer a ping.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: what has arrived and what is to be sent stay here.
    pub(crate) async fn recv(&mut self) -> Result<Vec<Bytes>> {
        loop {
            let received = self.receive().await;
            match received.map_err(|error| error.at(&self.peer))? {
                Received::Message(frames) => return Ok(frames),
                Received::Command { name, body } if *name == *b"PING" => {
                    // Two bytes say how long the peer waits, the rest comes back.
                    let context = body.get(2..).unwrap_or_default();
                    let context = &context[..context.len().min(PING_CONTEXT_MAX)];
                    let mut pong = BytesMut::from(&b"\x04PONG"[..]);
                    pong.put_slice(context);
                    self.push_frame(4, &pong);
                }
                // Pongs, and what later versions may say.
                Received::Command { .. } | Received::Greeting { .. } => {}
            }
        }
    }

    async fn receive(&mut self) -> Result<Received> {
        loop {
            if let Some(received) = self.decoder.next()? {
                return Ok(received);
            }
            if self.out.len() > SEND_BYTES_MAX {
                let context = format!("{} bytes of answers that it does not read", self.out.len());
                return Err(Error::new(ErrorKind::PeerLost, context));
            }
            let silent_until = match self.pinged_at {
                Some(at) => at + self.silence.pong_within,
                None => self.heard_at + self.silence.ping_after,
            };
            let (reader, writer) = (&mut self.io.0, &mut self.io.1);
            tokio::select! {
                // What has arrived counts before the clock does.
                biased;
                written = writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    written.map_err(lost)?;
                }
                read = reader.read_buf(self.decoder.space()) => {
                    if read.map_err(lost)? == 0 {
                        return Err(Error::new(ErrorKind::PeerLost, "the peer closed the connection"));
                    }
                    (self.heard_at, self.pinged_at) = (Instant::now(), None);
                }
                () = sleep_until(silent_until), if self.can_ping => {
                    if self.pinged_at.is_some() {
                        return Err(Error::new(ErrorKind::PeerLost, "the peer does not answer a ping"));
                    }
                    self.pinged_at = Some(Instant::now());
                    // How long the peer should wait for more from here: for ever.
                    self.push_frame(4, b"\x04PING\0\0");
                }
            }
        }
    }

    fn push_ready(&mut self, role: Role) {
        let mut ready = BytesMut::from(&b"\x05READY"[..]);
        ready.put_slice(b"\x0bSocket-Type");
        ready.put_u32(role.name().len() as u32);
        ready.put_slice(role.name().as_bytes());
        self.push_frame(4, &ready);
    }

    fn push_frame(&mut self, flags: u8, body: &[u8]) {
        let length = u8::try_from(body.len());
        // Everything that is sent from here: topics to subscribe to, requests, pongs.
        assert!(length.is_ok(), "a frame of {} bytes to send", body.len());
        self.out.put_u8(flags);
        self.out.put_u8(length.unwrap_or_default());
        self.out.put_slice(body);
    }
}

fn greeting() -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    (greeting[10], greeting[11]) = (3, 1);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn lost(error: std::io::Error) -> Error {
    Error::new(ErrorKind::PeerLost, "the connection is lost").with_source(error)
}

fn unanswered(deadline: Duration) -> Error {
    let context = format!("no handshake within {} ms", deadline.as_millis());
    Error::new(ErrorKind::Timeout, context)
}
