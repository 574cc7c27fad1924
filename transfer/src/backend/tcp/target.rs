//! The side that is asked: admits requests by region key, checks bounds, moves bytes, answers.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::connection::Connection;
use super::devices::{self, Allowance, Allowed, Staged};
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
    allowance: Allowance,
}

impl TargetSide {
    pub(super) fn new(exports: Arc<Exports>) -> Self {
        Self {
            door: exports.inbox().door(),
            exports,
            accepted: Instant::now(),
            initiator: OnceLock::new(),
            allowance: Allowance::default(),
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
                self.begin_read(connection, header, &Access::decode(head)?)?;
                Ok(Intake::NOTHING)
            }
            FrameKind::Write => self.begin_write(header, Access::decode(head)?),
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
        // The regions' use ends before the initiator hears of it.
        drop(intake.scatter);
        match intake.then {
            Then::Answer {
                mut outcome,
                notification,
            } => {
                if outcome.is_ok()
                    && let Some(notification) = notification
                {
                    // Without room the initiator sends it once more, alone: the data need not wait with it.
                    let inbox = self.exports.inbox();
                    outcome = inbox.try_deliver(self.from()?, notification.into());
                }
                answer(connection, done(header.id, &outcome))
            }
            Then::Store {
                staged,
                notification,
            } => self.store(connection, header.id, staged, notification),
            Then::Nothing | Then::Arrived(_) => Ok(()),
        }
    }

    /// The bytes of a write are in host memory: they go to devices, and then it is answered.
    fn store(
        &self,
        connection: &Connection,
        id: u64,
        staged: Staged,
        notification: Option<Vec<u8>>,
    ) -> Result<()> {
        let (exports, from) = (self.exports.clone(), self.from()?.clone());
        let answerer = connection.downgrade();
        let then = move |mut outcome: Result<()>, allowed: Allowed| {
            // Before the initiator, who keeps count, too, hears of it.
            drop(allowed);
            if outcome.is_ok()
                && let Some(notification) = notification
            {
                outcome = exports.inbox().try_deliver(&from, notification.into());
            }
            answer_later(&answerer, done(id, &outcome));
        };
        staged.copy(Operation::Write, connection.downgrade(), then);
        Ok(())
    }

    fn begin_read(&self, connection: &Connection, header: &Header, access: &Access) -> Result<()> {
        let bytes = access.bytes();
        if bytes > CHUNK_BYTES_MAX {
            return Err(Error::invalid("bytes asked for", bytes, CHUNK_BYTES_MAX));
        }
        let is_sums = header.kind == FrameKind::Sums;
        let frame = match self.admit(access, Operation::Read) {
            Ok(Admitted::Host(scatter)) if is_sums => sums(header.id, &scatter),
            Ok(Admitted::Host(scatter)) => Ok(data(header.id, scatter)),
            Ok(Admitted::Devices(_)) if is_sums => {
                let text = "nobody computes checksums of memory of a CUDA device";
                Err(Error::new(ErrorKind::Unsupported, text))
            }
            Ok(Admitted::Devices(staged)) => match load(connection, header.id, staged) {
                // It is answered when the bytes are there.
                Ok(()) => return Ok(()),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let frame = frame.unwrap_or_else(|error| done(header.id, &Err(error)));
        answer(connection, frame)
    }

    fn begin_write(&self, header: &Header, access: Access) -> Result<Intake> {
        let (bytes, left) = (access.bytes(), header.payload_bytes);
        if bytes != left {
            let text = format!("a write of {bytes} bytes brings {left}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let admitted = self.admit(&access, Operation::Write);
        let notification = access.notification;
        let answer = |outcome, notification| Then::Answer {
            outcome,
            notification,
        };
        let taken = admitted.and_then(|admitted| match admitted {
            Admitted::Host(scatter) => Ok((scatter, None)),
            Admitted::Devices(staged) => Ok((staged.scatter()?, Some(staged))),
        });
        let (scatter, then) = match taken {
            Ok((scatter, None)) => (Some(scatter), answer(Ok(()), notification)),
            Ok((scatter, Some(staged))) => {
                let then = Then::Store {
                    staged,
                    notification,
                };
                (Some(scatter), then)
            }
            Err(error) => (None, answer(Err(error), notification)),
        };
        Ok(Intake {
            left,
            scatter,
            then,
        })
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

    fn admit(&self, access: &Access, operation: Operation) -> Result<Admitted> {
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
        match devices::are_among(&uses) {
            false => Scatter::admitted(uses, pieces).map(Admitted::Host),
            true => Staged::new(uses, pieces, &self.allowance).map(Admitted::Devices),
        }
    }
}

/// What a peer was admitted to.
enum Admitted {
    Host(Scatter),
    Devices(Staged),
}

/// Whoever has sent a notification, by its number.
struct Notifier {
    connection: Weak<Connection>,
    id: u64,
}

impl Sender for Notifier {
    const IS_REMOTE: bool = true;

    fn answer(self, outcome: Result<()>) {
        answer_later(&self.connection, done(self.id, &outcome));
    }
}

/// Has devices copy what a read asks for, and answers it then.
fn load(connection: &Connection, id: u64, staged: Staged) -> Result<()> {
    let filled = staged.scatter()?;
    let answerer = connection.downgrade();
    let then = move |outcome: Result<()>, allowed: Allowed| {
        let frame = match outcome {
            Ok(()) => data(id, filled).keeping(allowed),
            Err(error) => {
                drop(allowed);
                done(id, &Err(error))
            }
        };
        answer_later(&answerer, frame);
    };
    staged.copy(Operation::Read, connection.downgrade(), then);
    Ok(())
}

/// Answers from another thread than that of the connection, if that is still there.
fn answer_later(connection: &Weak<Connection>, frame: Frame) {
    let Some(connection) = connection.upgrade() else {
        return;
    };
    match answer(&connection, frame) {
        Ok(()) => connection.pump_later(),
        Err(error) => connection.lose(&error.to_string()),
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
