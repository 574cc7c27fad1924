//! The side that is asked: admits requests by region key, checks bounds, moves bytes, answers.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::connection::Connection;
use super::frame::{
    Access, CHUNK_BYTES_MAX, FrameKind, Greeting, HEADER_BYTES, Header, encode_outcome,
    encode_welcome,
};
use super::outbox::Frame;
use super::receive::{Intake, Then};
use super::scatter::{Piece, Scatter};
use crate::agent::{Door, Exports, Sender};
use crate::backend::Operation;
use crate::plan::SUM_BYTES;
use crate::request::NOTIFICATION_BYTES_MAX;

/// Answers that may wait to be sent; an initiator that keeps to its window never gets there.
pub(super) const ANSWERS_MAX: usize = 4096;

/// How long a connection may stay without a greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// What a connection that was accepted needs to serve its initiator.
pub(super) struct TargetSide {
    exports: Arc<Exports>,
    door: Door,
    accepted: Instant,
    initiator: OnceLock<Arc<str>>,
}

impl TargetSide {
    pub(super) fn new(exports: Arc<Exports>) -> Self {
        Self {
            door: exports.inbox().door(),
            exports,
            accepted: Instant::now(),
            initiator: OnceLock::new(),
        }
    }

    /// Whether it has held a place for too long without saying who it is.
    pub(super) fn is_stale(&self) -> bool {
        self.initiator.get().is_none() && self.accepted.elapsed() > GREETING_TIMEOUT
    }

    pub(super) fn greeted(&self, connection: &Connection, greeting: &[u8]) -> Result<()> {
        let greeting = Greeting::decode(greeting)?;
        connection.check_name(&greeting.name)?;
        self.check(&greeting)?;
        let welcome = Frame::new(encode_welcome(&Ok(())), None);
        connection.outbox().frames.push_back(welcome);
        // A connection is greeted once: the receiver leaves that state for good.
        let _ = self.initiator.set(greeting.name.into());
        Ok(())
    }

    /// Tells a side that is not let in why, in an answer that names our version, too.
    pub(super) fn refuse(&self, connection: &Connection, error: &Error) {
        let outcome = Err(Error::new(error.kind(), error.to_string()));
        let welcome = Frame::new(encode_welcome(&outcome), None);
        connection.outbox().frames.push_back(welcome);
        connection.pump(u64::MAX);
    }

    fn check(&self, greeting: &Greeting) -> Result<()> {
        let own = self.exports.incarnation();
        if greeting.wanted != own {
            let text = format!(
                "incarnation {:?} of agent {:?} is gone, this is {own:?}",
                greeting.wanted,
                self.exports.name()
            );
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        self.exports.check_allowed(&greeting.name)
    }

    /// A request's header and head are there.
    pub(super) fn begin(
        &self,
        connection: &Connection,
        header: &Header,
        head: &[u8],
    ) -> Result<Intake> {
        match header.kind {
            FrameKind::Read | FrameKind::Sums if header.payload_bytes == 0 => {
                let access = Access::decode(head)?;
                if access.bytes() > CHUNK_BYTES_MAX {
                    return Err(Error::invalid(
                        "bytes asked for",
                        access.bytes(),
                        CHUNK_BYTES_MAX,
                    ));
                }
                let frame = match self.admit(&access, Operation::Read) {
                    Ok(scatter) if header.kind == FrameKind::Sums => sums(header.id, &scatter),
                    Ok(scatter) => Ok(data(header.id, scatter)),
                    Err(error) => Err(error),
                };
                let frame = frame.unwrap_or_else(|error| done(header.id, &Err(error)));
                answer(connection, frame)?;
                Ok(Intake::NOTHING)
            }
            FrameKind::Write => {
                let access = Access::decode(head)?;
                if access.bytes() != header.payload_bytes {
                    let text = format!(
                        "a write of {} bytes brings {}",
                        access.bytes(),
                        header.payload_bytes
                    );
                    return Err(Error::new(ErrorKind::Corrupt, text));
                }
                let (scatter, outcome) = match self.admit(&access, Operation::Write) {
                    Ok(scatter) => (Some(scatter), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                let then = Then::Answer {
                    outcome,
                    notification: access.notification,
                };
                Ok(Intake {
                    left: header.payload_bytes,
                    scatter,
                    then,
                })
            }
            FrameKind::Notify if header.payload_bytes == 0 => {
                if head.len() > NOTIFICATION_BYTES_MAX {
                    return Err(Error::invalid("notification length", head.len(), ..65536));
                }
                let sender = Notifier {
                    connection: connection.downgrade(),
                    id: header.id,
                };
                let (inbox, bytes) = (self.exports.inbox(), head.to_vec().into());
                let delivered = inbox.deliver(self.door, self.from()?, bytes, sender);
                if let Some((_, outcome)) = delivered {
                    answer(connection, done(header.id, &outcome))?;
                }
                Ok(Intake::NOTHING)
            }
            kind => {
                let text = format!(
                    "{kind:?} frame of {} bytes at a target",
                    header.payload_bytes
                );
                Err(Error::new(ErrorKind::Corrupt, text))
            }
        }
    }

    /// A request's payload is in place.
    pub(super) fn finish(
        &self,
        connection: &Connection,
        header: &Header,
        intake: Intake,
    ) -> Result<()> {
        let Then::Answer {
            mut outcome,
            notification,
        } = intake.then
        else {
            return Ok(());
        };
        // The regions' use ends before the initiator hears of it.
        drop(intake.scatter);
        if outcome.is_ok()
            && let Some(notification) = notification
        {
            // Without room the initiator sends it once more, alone: the data need not wait with it.
            let inbox = self.exports.inbox();
            outcome = inbox.try_deliver(self.from()?, notification.into());
        }
        answer(connection, done(header.id, &outcome))
    }

    fn from(&self) -> Result<&Arc<str>> {
        let text = "a notification before the greeting";
        let from = self.initiator.get();
        from.ok_or_else(|| Error::new(ErrorKind::Internal, text))
    }

    /// Nothing comes or goes any more: notifications that wait for room are not taken.
    pub(super) fn end(&self) {
        self.exports
            .inbox()
            .shut(self.door, "the connection has ended");
    }

    fn admit(&self, access: &Access, operation: Operation) -> Result<Scatter> {
        let mut uses = Vec::with_capacity(access.regions.len());
        for (id, key) in &access.regions {
            uses.push(self.exports.admit(*id, key, operation)?);
        }
        let pieces = access
            .ranges
            .iter()
            .map(|range| Piece {
                region: range.region,
                offset: range.offset,
                len: u64::from(range.len),
            })
            .collect();
        Scatter::admitted(uses, pieces)
    }
}

/// Whoever has sent a notification, by its number.
struct Notifier {
    connection: Weak<Connection>,
    id: u64,
}

impl Sender for Notifier {
    const IS_REMOTE: bool = true;

    fn answer(self, outcome: Result<()>) {
        let Some(connection) = self.connection.upgrade() else {
            return;
        };
        match answer(&connection, done(self.id, &outcome)) {
            Ok(()) => connection.pump_later(),
            Err(error) => connection.lose(&error.to_string()),
        }
    }
}

fn answer(connection: &Connection, frame: Frame) -> Result<()> {
    let mut outbox = connection.outbox();
    if outbox.frames.len() >= ANSWERS_MAX {
        let text = format!("the initiator leaves {ANSWERS_MAX} answers unread");
        return Err(Error::new(ErrorKind::Busy, text));
    }
    outbox.frames.push_back(frame);
    Ok(())
}

fn data(id: u64, scatter: Scatter) -> Frame {
    let header = Header {
        kind: FrameKind::Data,
        head_bytes: 0,
        id,
        payload_bytes: scatter.left(),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    header.encode(&mut bytes);
    Frame::new(bytes, Some(scatter))
}

/// The checksum of each range, as the answer's payload.
fn sums(id: u64, scatter: &Scatter) -> Result<Frame> {
    let sums = scatter.checksums()?;
    let header = Header {
        kind: FrameKind::Data,
        head_bytes: 0,
        id,
        payload_bytes: sums.len() as u64 * SUM_BYTES,
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + header.payload_bytes as usize);
    header.encode(&mut bytes);
    for sum in sums {
        bytes.extend_from_slice(&sum.to_le_bytes());
    }
    Ok(Frame::new(bytes, None))
}

fn done(id: u64, outcome: &Result<()>) -> Frame {
    let mut head = Vec::new();
    encode_outcome(outcome, &mut head);
    let header = Header {
        kind: FrameKind::Done,
        head_bytes: head.len() as u32,
        id,
        payload_bytes: 0,
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + head.len());
    header.encode(&mut bytes);
    bytes.append(&mut head);
    Frame::new(bytes, None)
}
