//! One connection, of whichever kind.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kvcache_core::{Error, ErrorKind, Result};
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep_until, timeout};

use super::decode::{COMMAND, Decoder, GREETING_BYTES, Received, corrupt, property};
use super::endpoint::Halves;
use super::outbox::Outbox;
use super::{Role, SEND_BYTES_MAX, SILENCE, Silence};

/// The longest context of a ping that a pong repeats.
const PING_CONTEXT_MAX: usize = 16;

/// A connection whose handshake is done.
pub(crate) struct Connection {
    /// Who is at the other end, for errors.
    peer: String,
    io: Halves,
    decoder: Decoder,
    out: Outbox,
    /// Bytes of pongs and small requests among what is not written, since all of it was.
    small: usize,
    /// When the peer took something last, or was sent something after it had taken all.
    taken_at: Instant,
    /// Whether the peer answers pings.
    can_ping: bool,
    silence: Silence,
    heard_at: Instant,
    /// When the peer was asked whether it is there, if it has not been heard of since.
    pinged_at: Option<Instant>,
}

/// What happened on a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The peer sent this.
    Message(Vec<Bytes>),
    /// The peer said this about the protocol; what concerns the connection itself has been answered.
    Command {
        /// Like `SUBSCRIBE`.
        name: Bytes,
        /// What follows the name.
        body: Bytes,
    },
    /// All that was queued is written.
    Sent,
}

impl Connection {
    /// The handshake with a peer that connected by itself.
    ///
    /// # Errors
    /// What [`Decoder::next`] refuses; `Invalid` for a socket type that does not fit; `Denied` with the peer's words;
    /// `PeerLost` when it closes; `Timeout` when it does not answer. With the peer's place.
    pub(crate) async fn accept(
        (io, from): (Halves, String),
        role: Role,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        let greeted = Self::greet(io, from.clone(), role, message_bytes_max);
        let greeted = timeout(deadline, greeted).await;
        greeted
            .unwrap_or_else(|_| Err(unanswered(deadline)))
            .map_err(|error| error.at(from))
    }

    /// As [`Connection::accept`], without deadline and place.
    pub(super) async fn greet(
        io: Halves,
        peer: String,
        role: Role,
        message_bytes_max: usize,
    ) -> Result<Self> {
        let now = Instant::now();
        let mut connection = Self {
            peer,
            io,
            decoder: Decoder::new(message_bytes_max),
            out: Outbox::default(),
            small: 0,
            taken_at: now,
            can_ping: false,
            silence: SILENCE,
            heard_at: now,
            pinged_at: None,
        };
        connection.out.push(Bytes::copy_from_slice(&greeting()));
        loop {
            match connection.turn().await? {
                Some(Received::Greeting { minor }) => {
                    connection.can_ping = minor >= 1;
                    connection.push_ready(role);
                }
                Some(Received::Command { name, body }) => match name.as_ref() {
                    b"READY" => {
                        check_kind(role, body)?;
                        connection.send_all().await?;
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
                Some(Received::Message(_)) => return Err(corrupt("a message before READY")),
                None => {}
            }
        }
    }

    /// Writes what is queued, and reads nothing meanwhile.
    async fn send_all(&mut self) -> Result<()> {
        while self.out.bytes() > 0 {
            self.out.write(&mut self.io.1).await.map_err(lost)?;
        }
        self.small = 0;
        Ok(())
    }

    /// Queues a message of any size, which is not copied; [`Connection::step`] sends it.
    #[cfg(feature = "client")]
    pub(crate) fn queue(&mut self, frames: &[Bytes]) {
        self.begin_sending();
        self.out.push_message(frames);
    }

    /// Bytes that were queued and are not written.
    #[cfg(feature = "client")]
    pub(crate) const fn unsent(&self) -> usize {
        self.out.bytes()
    }

    /// Since when the peer takes nothing of what is queued; none when nothing is.
    #[cfg(feature = "client")]
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        (self.out.bytes() > 0).then_some(self.taken_at)
    }

    #[cfg(test)]
    pub(super) fn with_silence(mut self, silence: Silence) -> Self {
        self.silence = silence;
        self
    }

    /// Reads and writes until something happened.
    ///
    /// # Errors
    /// What [`Decoder::next`] refuses, with the peer's place; `PeerLost` when it closed or does not answer a ping.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: what has arrived and what is to be sent stay here.
    pub(crate) async fn step(&mut self) -> Result<Step> {
        loop {
            let turn = self.turn().await;
            match turn.map_err(|error| error.at(&self.peer))? {
                None => return Ok(Step::Sent),
                Some(Received::Message(frames)) => return Ok(Step::Message(frames)),
                Some(Received::Command { name, body }) => match name.as_ref() {
                    b"PING" => {
                        // Two bytes say how long the peer waits, the rest comes back.
                        let context = body.get(2..).unwrap_or_default();
                        let context = &context[..context.len().min(PING_CONTEXT_MAX)];
                        let mut pong = BytesMut::from(&b"\x04PONG"[..]);
                        pong.put_slice(context);
                        self.push_small(COMMAND, &pong);
                    }
                    b"PONG" => {}
                    _ => return Ok(Step::Command { name, body }),
                },
                Some(Received::Greeting { .. }) => {}
            }
        }
    }

    /// What arrived; none when all that was queued is written.
    async fn turn(&mut self) -> Result<Option<Received>> {
        loop {
            if let Some(received) = self.decoder.next()? {
                return Ok(Some(received));
            }
            if self.small > SEND_BYTES_MAX {
                let context = format!("{} bytes of answers that it does not read", self.small);
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
                written = self.out.write(writer), if self.out.bytes() > 0 => {
                    written.map_err(lost)?;
                    self.taken_at = Instant::now();
                    if self.out.bytes() == 0 {
                        self.small = 0;
                        return Ok(None);
                    }
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
                    self.push_small(COMMAND, b"\x04PING\0\0");
                }
            }
        }
    }

    fn push_ready(&mut self, role: Role) {
        let mut ready = BytesMut::from(&b"\x05READY"[..]);
        ready.put_slice(b"\x0bSocket-Type");
        ready.put_u32(role.name().len() as u32);
        ready.put_slice(role.name().as_bytes());
        self.push_small(COMMAND, &ready);
    }

    /// A frame that is bounded with the others of its kind.
    pub(super) fn push_small(&mut self, flags: u8, body: &[u8]) {
        self.begin_sending();
        self.small += body.len();
        self.out.push_frame(flags, Bytes::copy_from_slice(body));
    }

    /// The peer is judged by what it takes from now on, if it had taken all.
    fn begin_sending(&mut self) {
        if self.out.bytes() == 0 {
            self.taken_at = Instant::now();
        }
    }
}

fn check_kind(role: Role, ready: Bytes) -> Result<()> {
    let kind = property(ready, b"Socket-Type")?.unwrap_or_default();
    if role.accepts(&kind) {
        return Ok(());
    }
    Err(Error::invalid(
        "socket type of the peer",
        format!("{:?}", String::from_utf8_lossy(&kind)),
        format_args!("what a {} socket talks to", role.name()),
    ))
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

pub(super) fn unanswered(deadline: Duration) -> Error {
    let context = format!("no handshake within {} ms", deadline.as_millis());
    Error::new(ErrorKind::Timeout, context)
}
