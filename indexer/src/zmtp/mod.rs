//! The part of ZeroMQ's wire protocol (ZMTP 3.0 and 3.1, mechanism NULL) that events need: sockets of type SUB and DEALER
//! for those who read them, PUB and ROUTER for those who publish.
//!
//! It is spoken here and not by a library because a peer may be anybody: what a frame announces is checked before room is
//! made for it, a message has few frames, a handshake has a deadline, and a peer that falls silent is asked whether it is
//! there. [`Decoder`] is the protocol without I/O, [`Connection`] one connection.
//!
//! This module does not reconnect, encrypt, or queue for a peer that does not read: who sends decides how far ahead.

mod connection;
mod decode;
mod endpoint;
#[cfg(feature = "server")]
mod join;
mod outbox;
#[cfg(feature = "server")]
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use connection::Connection;
#[cfg(feature = "client")]
pub(crate) use connection::Step;
#[cfg(feature = "server")]
pub(crate) use endpoint::Endpoint;
pub(crate) use endpoint::{Halves, Listener};

/// The most frames of one message: events have three, replies of replay sockets up to five.
const FRAMES_MAX: usize = 8;
/// The longest command. The longest in use is a READY with the peer's identity of up to 255 bytes.
const COMMAND_BYTES_MAX: usize = 4096;
/// How much is read at once, and how little room is made at a time while a frame arrives.
const READ_BYTES: usize = 64 << 10;
/// The most bytes of answers to a peer's pings, and of our own small requests, that wait for it to read.
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
#[cfg_attr(not(all(feature = "client", feature = "server")), allow(dead_code))]
pub(crate) enum Role {
    /// Receives what publishers send.
    Subscriber,
    /// Asks, and receives any number of answers.
    Dealer,
    /// Sends to subscribers.
    Publisher,
    /// Answers those who ask.
    Router,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Subscriber => "SUB",
            Self::Dealer => "DEALER",
            Self::Publisher => "PUB",
            Self::Router => "ROUTER",
        }
    }

    /// Whether a socket of type `peer` is what this one can talk to.
    fn accepts(self, peer: &[u8]) -> bool {
        match self {
            Self::Subscriber => matches!(peer, b"PUB" | b"XPUB"),
            Self::Dealer => matches!(peer, b"ROUTER" | b"REP" | b"DEALER"),
            Self::Publisher => matches!(peer, b"SUB" | b"XSUB"),
            Self::Router => matches!(peer, b"DEALER" | b"REQ" | b"ROUTER"),
        }
    }
}
