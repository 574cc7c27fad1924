//! What the exchange is asked, and what it answers.

use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::link::LinkProfile;
use super::network::SimNode;

/// How transfers are cut, repeated and given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeConfig {
    /// Links without a profile of their own behave like this.
    pub link: LinkProfile,
    /// The data of one datagram.
    pub chunk_bytes: u64,
    /// Chunks of one transfer that may be unanswered.
    pub window_chunks: u32,
    /// The first waiting time for an answer; it doubles with each attempt.
    pub retransmit_after: Duration,
    /// After this many unanswered attempts for one chunk the peer counts as lost.
    pub attempts_max: u32,
}

impl ExchangeConfig {
    /// 64 KiB chunks, 64 in flight, 20 ms, 10 attempts, over `link`.
    #[must_use]
    pub fn over(link: LinkProfile) -> Self {
        Self {
            link,
            chunk_bytes: 64 << 10,
            window_chunks: 64,
            retransmit_after: Duration::from_millis(20),
            attempts_max: 10,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (field, value) in [
            ("chunk_bytes", self.chunk_bytes),
            ("window_chunks", u64::from(self.window_chunks)),
            ("attempts_max", u64::from(self.attempts_max)),
            (
                "retransmit_after in ns",
                self.retransmit_after.as_nanos() as u64,
            ),
        ] {
            if value == 0 {
                return Err(Error::invalid(field, value, 1..=u64::MAX));
            }
        }
        Ok(())
    }
}

/// Which way the bytes of a transfer go, seen from its initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the peer's memory.
    Read,
    /// Into the peer's memory.
    Write,
}

/// One transfer to simulate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimTransfer {
    /// Who asked.
    pub initiator: SimNode,
    /// Whose memory is read or written.
    pub peer: SimNode,
    /// Which way.
    pub direction: Direction,
    /// How much.
    pub bytes: u64,
    /// Whether the peer is told ([`Effect::Notified`]) after the last byte.
    pub notify: bool,
    /// When it fails with `Timeout`.
    pub deadline: Time,
}

/// A transfer's number, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SimTransferId(pub u64);

/// What the driver has to do or to know; in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// These bytes of the transfer arrive now: copy them, with the bit `corruption` modulo `len * 8` inverted.
    Landed {
        /// Of which transfer.
        transfer: SimTransferId,
        /// From the transfer's first byte.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The wrong bit.
        corruption: Option<u64>,
    },
    /// The peer learns of the transfer's end; all its bytes have landed.
    Notified {
        /// Of which transfer.
        transfer: SimTransferId,
    },
    /// The initiator learns how the transfer ended; at most once.
    Finished {
        /// Which transfer.
        transfer: SimTransferId,
        /// When.
        at: Time,
        /// `Timeout`, `PeerLost` or `Cancelled` when it failed.
        failure: Option<ErrorKind>,
        /// False: bytes may still land until [`Effect::Drained`].
        settled: bool,
    },
    /// Nothing of an unsettled transfer is in the network any more.
    Drained {
        /// Which transfer.
        transfer: SimTransferId,
    },
    /// A message of [`super::Exchange::handle_message`] arrives.
    Message {
        /// When.
        at: Time,
        /// The sender.
        from: SimNode,
        /// The receiver.
        to: SimNode,
        /// The sender's number for it.
        tag: u64,
        /// Whether its bytes are wrong.
        corrupted: bool,
    },
}
