//! The part of ZeroMQ's wire protocol (ZMTP 3.0 and 3.1, mechanism NULL) that a reader of events needs: sockets of type
//! SUB and DEALER.
//!
//! It is read here and not by a library because a publisher may be anybody: what a frame announces is checked before
//! room is made for it, a message has few frames, a handshake has a deadline, and a peer that falls silent is asked
//! whether it is there. [`Decoder`] is the protocol without I/O, [`Connection`] one connection.
//!
//! This module does not reconnect, encrypt, or send messages of any size: it asks and subscribes.

mod connection;
mod decode;
mod endpoint;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use connection::Connection;
pub(crate) use endpoint::{Endpoint, Listener};

/// The most frames of one message: events have three, replies of replay sockets up to five.
const FRAMES_MAX: usize = 8;
/// The longest command. The longest in use is a READY with the peer's identity of up to 255 bytes.
const COMMAND_BYTES_MAX: usize = 4096;
/// How much is read at once, and how little room is made at a time while a frame arrives.
const READ_BYTES: usize = 64 << 10;
/// The longest message of a queue to the peer: answers to its pings and our own small requests.
const SEND_BYTES_MAX: usize = 64 << 10;
/// How long a peer that speaks the version that can be asked may be silent.
const SILENCE: Silence = Silence {
    ping_after: Duration::from_secs(15),
    pong_within: Duration::from_secs(10),
};

/// When a silent peer is gone.
#[derive(Clone, Copy, Debug)]
struct Silence {
    /// After so long it is asked whether it is there.
    ping_after: Duration,
    /// It is gone if it says nothing for so long after that.
    pong_within: Duration,
}

/// What kind of socket this end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Receives what publishers send.
    Subscriber,
    /// Asks, and receives any number of answers.
    Dealer,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Subscriber => "SUB",
            Self::Dealer => "DEALER",
        }
    }

    /// Whether a socket of type `peer` is what this one can talk to.
    fn accepts(self, peer: &[u8]) -> bool {
        match self {
            Self::Subscriber => matches!(peer, b"PUB" | b"XPUB"),
            Self::Dealer => matches!(peer, b"ROUTER" | b"REP" | b"DEALER"),
        }
    }
}
