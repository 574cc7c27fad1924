//! Takes frames off a connection; payload goes straight to the memory it is for.

use std::io;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::active::Active;
use super::connection::Wire;
use super::devices::Staged;
use super::frame::{HEADER_BYTES, Header, PREAMBLE_BYTES, decode_preamble};
use super::scatter::Scatter;
use crate::sys::memory::Sink;
use crate::sys::socket::SPANS_MAX;

/// Headers and heads are received here. Payload that came along is copied out, so it is not larger than needed: what
/// is known to be payload is received in place, with this behind it for the next header.
const STAGING_BYTES: usize = 16 << 10;

/// What to do with a frame's payload.
pub(super) struct Intake {
    /// Bytes still to come.
    pub(super) left: u64,
    /// Where they go; none: nowhere.
    pub(super) scatter: Option<Scatter>,
    pub(super) then: Then,
}

/// What to do when a frame is complete.
pub(super) enum Then {
    /// Nothing more.
    Nothing,
    /// Target: answer a write, and deliver its notification.
    Answer {
        outcome: Result<()>,
        notification: Option<Vec<u8>>,
    },
    /// Target: copy a write's bytes to devices, deliver its notification, and answer.
    Store {
        staged: Staged,
        notification: Option<Vec<u8>>,
    },
    /// Initiator: a part of this read has arrived.
    Arrived(Arc<Active>),
}

impl Intake {
    /// A frame without payload that has been dealt with.
    pub(super) const NOTHING: Self = Self {
        left: 0,
        scatter: None,
        then: Then::Nothing,
    };

    /// Stops writing to memory whose owner wants it back.
    pub(super) fn yield_memory(&mut self) {
        match &mut self.then {
            Then::Arrived(active) if !active.is_live() => self.scatter = None,
            Then::Answer { outcome, .. }
                if self.scatter.as_ref().is_some_and(Scatter::is_withdrawn) =>
            {
                self.scatter = None;
                let text = "the region was deregistered during the write";
                *outcome = Err(Error::new(ErrorKind::NotFound, text));
            }
            Then::Store { staged, .. } if staged.is_withdrawn() => {
                self.scatter = None;
                let text = "the region was deregistered during the write";
                self.then = Then::Answer {
                    outcome: Err(Error::new(ErrorKind::NotFound, text)),
                    notification: None,
                };
            }
            _ => {}
        }
    }
}

/// The side of a connection that reacts to frames. Errors are breaches of the protocol and end the connection.
pub(super) trait Handler {
    /// The other side's greeting.
    fn greeted(&self, greeting: &[u8]) -> Result<()>;
    /// A frame's header and head are there.
    fn begin(&self, header: &Header, head: &[u8]) -> Result<Intake>;
    /// Its payload is too.
    fn finish(&self, header: &Header, intake: Intake) -> Result<()>;
}

enum State {
    Preamble,
    Greeting(usize),
    Header,
    Head(Header, Vec<u8>),
    Payload(Header, Intake),
    Ended,
}

/// How far the current frame is received.
pub(super) struct Receiver {
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    received: u64,
}

/// Why receiving stopped.
pub(super) enum Stopped {
    /// Nothing more is there for now.
    Empty,
    /// Enough for one turn.
    Budget,
}

impl Receiver {
    /// For the side that accepted: a greeting comes first.
    pub(super) fn of_accepted() -> Self {
        Self::new(State::Preamble)
    }

    /// For the side that connected, after the greetings.
    pub(super) fn of_connected() -> Self {
        Self::new(State::Header)
    }

    fn new(state: State) -> Self {
        Self {
            staging: vec![0; STAGING_BYTES].into(),
            start: 0,
            end: 0,
            state,
            received: 0,
        }
    }

    /// Bytes that came so far.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Whether the other side has not said yet who it is.
    pub(super) fn awaits_greeting(&self) -> bool {
        matches!(self.state, State::Preamble | State::Greeting(_))
    }

    /// No memory is touched after this.
    pub(super) fn end(&mut self) {
        self.state = State::Ended;
        (self.start, self.end) = (0, 0);
    }

    /// Stops writing to memory whose owner wants it back.
    pub(super) fn yield_memory(&mut self) {
        if let State::Payload(_, intake) = &mut self.state {
            intake.yield_memory();
        }
    }

    /// Stops writing what is being received to memory, if it is no longer wanted there.
    pub(super) fn drop_payload(&mut self, is_dropped: impl Fn(u64) -> bool) {
        if let State::Payload(header, intake) = &mut self.state
            && is_dropped(header.id)
        {
            intake.scatter = None;
        }
    }

    /// Receives and handles frames until the socket is empty, or about `budget` bytes.
    pub(super) fn run(
        &mut self,
        wire: &Wire<'_>,
        handler: &impl Handler,
        mut budget: u64,
    ) -> Result<Stopped> {
        loop {
            while self.step(handler)? {}
            if budget == 0 {
                return Ok(Stopped::Budget);
            }
            match self.receive(wire) {
                Ok(Got { count: 0, .. }) => {
                    let text = "the other side closed the connection";
                    return Err(Error::new(ErrorKind::PeerLost, text));
                }
                // The socket is most likely empty: answer first; whatever is left is told again.
                Ok(Got { short: true, .. }) => {
                    while self.step(handler)? {}
                    return Ok(Stopped::Empty);
                }
                Ok(Got { count, .. }) => budget = budget.saturating_sub(count),
                Err(Failure::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Stopped::Empty);
                }
                Err(Failure::Socket(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(Failure::Socket(e)) if e.kind() == io::ErrorKind::InvalidData => {
                    return Err(Error::new(ErrorKind::Denied, format!("TLS: {e}")));
                }
                Err(Failure::Socket(e)) => {
                    let text = "receive from the other side";
                    return Err(Error::new(ErrorKind::PeerLost, text).with_source(e));
                }
                Err(Failure::Memory(error)) => return Err(error),
            }
        }
    }

    fn staged(&self) -> usize {
        self.end - self.start
    }

    /// Advances by what is staged. Whether something changed.
    fn step(&mut self, handler: &impl Handler) -> Result<bool> {
        match &mut self.state {
            State::Ended => Ok(false),
            State::Preamble => {
                let staged = &self.staging[self.start..self.end];
                let Some((preamble, _)) = staged.split_first_chunk::<PREAMBLE_BYTES>() else {
                    return Ok(false);
                };
                self.state = State::Greeting(decode_preamble(preamble)?);
                self.start += PREAMBLE_BYTES;
                Ok(true)
            }
            &mut State::Greeting(len) => {
                if self.staged() < len {
                    return Ok(false);
                }
                handler.greeted(&self.staging[self.start..self.start + len])?;
                self.start += len;
                self.state = State::Header;
                Ok(true)
            }
            State::Header => {
                if self.staged() < HEADER_BYTES {
                    return Ok(false);
                }
                let header = Header::decode(&self.staging[self.start..self.start + HEADER_BYTES])?;
                self.start += HEADER_BYTES;
                self.state = State::Head(header, Vec::with_capacity(header.head_bytes as usize));
                Ok(true)
            }
            State::Head(header, head) => {
                let missing = header.head_bytes as usize - head.len();
                let count = missing.min(self.end - self.start);
                head.extend_from_slice(&self.staging[self.start..self.start + count]);
                self.start += count;
                if count < missing {
                    return Ok(false);
                }
                let intake = handler.begin(header, head)?;
                self.state = State::Payload(*header, intake);
                Ok(true)
            }
            State::Payload(..) => self.step_payload(handler),
        }
    }

    fn step_payload(&mut self, handler: &impl Handler) -> Result<bool> {
        let State::Payload(_, intake) = &mut self.state else {
            return Ok(false);
        };
        intake.yield_memory();
        let staged = &self.staging[self.start..self.end];
        let count = intake.left.min(staged.len() as u64) as usize;
        if let Some(scatter) = &mut intake.scatter {
            scatter.fill(&staged[..count])?;
        }
        intake.left -= count as u64;
        self.start += count;
        if intake.left > 0 {
            return Ok(false);
        }
        if let State::Payload(header, intake) = std::mem::replace(&mut self.state, State::Header) {
            handler.finish(&header, intake)?;
        }
        Ok(true)
    }

    /// One system call: the rest of the payload in place, and what follows into the staging area.
    fn receive(&mut self, wire: &Wire<'_>) -> Result<Got, Failure> {
        self.staging.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.staged());
        let free = &mut self.staging[self.end..];
        let mut sinks = Vec::with_capacity(8);
        let mut in_place = 0_u64;
        let mut reaches_end = true;
        if let State::Payload(
            _,
            Intake {
                scatter: Some(scatter),
                ..
            },
        ) = &self.state
        {
            scatter
                .sinks(&mut sinks, SPANS_MAX - 1)
                .map_err(Failure::Memory)?;
            in_place = sinks.iter().map(|sink| sink.len() as u64).sum();
            reaches_end = in_place == scatter.left();
        }
        if reaches_end {
            sinks.push(Sink::of_bytes(free));
        }
        let asked = sinks.iter().map(|sink| sink.len() as u64).sum::<u64>();
        let count = wire.receive(&sinks).map_err(Failure::Socket)? as u64;
        let placed = count.min(in_place);
        if let State::Payload(
            _,
            Intake {
                scatter: Some(scatter),
                left,
                ..
            },
        ) = &mut self.state
        {
            scatter.advance(placed);
            *left -= placed;
        }
        self.end += (count - placed) as usize;
        self.received += count;
        Ok(Got {
            count,
            short: count < asked,
        })
    }
}

/// What one system call brought.
struct Got {
    count: u64,
    /// Less than there was room for.
    short: bool,
}

enum Failure {
    Socket(io::Error),
    Memory(Error),
}
