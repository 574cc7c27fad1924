//! A peer whose memory this agent uses.

use std::collections::{HashMap, LinkedList};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind};

use super::frame::Session;
use crate::agent::RemoteRegion;
use crate::backend::Job;
use crate::backend::far_sums::Summing;
use crate::backend::giving_way::GivingWay;
use crate::backend::unix::{Call, Unanswered, Waiting};
use crate::region::RegionId;
use crate::sys::ucx::EndpointId;

/// What the channel and the driver both look at.
#[derive(Default)]
pub(super) struct Shared {
    /// Why nothing goes this way any more.
    lost: OnceLock<String>,
    /// How often something of the peer arrived, or was found to have.
    pub(super) arrived: AtomicU64,
    /// The greeting (0), and notifications.
    pub(super) unanswered: Unanswered,
}

impl Shared {
    pub(super) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    pub(super) fn loss(&self) -> Error {
        let reason = self.lost.get().map_or("the path is closed", String::as_str);
        Error::new(ErrorKind::PeerLost, reason.to_owned())
    }

    /// Whether this is the first loss: its reason is the interesting one.
    pub(super) fn lose(&self, reason: &str) -> bool {
        self.lost.set(reason.to_owned()).is_ok()
    }

    /// Those who wait for an answer get none. Jobs are handed back, to be settled without a lock.
    pub(super) fn end_waiting(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for waiting in self.unanswered.close() {
            match waiting {
                Waiting::Call(call) => call.answer(Err(self.loss())),
                Waiting::Notification(job) => jobs.push(job),
                Waiting::GivenUp(_) => {}
            }
        }
        jobs
    }
}

/// A region that the peer has handed out.
#[derive(Default)]
pub(super) struct Held {
    /// Jobs that use it.
    pub(super) users: usize,
    /// The peer wants it back.
    pub(super) is_revoked: bool,
}

/// A region that the peer was asked for.
pub(super) struct Asked {
    pub(super) region: Arc<RemoteRegion>,
    /// The peer wanted it back before it was here: messages may overtake each other.
    pub(super) is_revoked: bool,
    pub(super) jobs: Vec<usize>,
    pub(super) calls: Vec<Arc<Call>>,
}

pub(super) struct Using {
    pub(super) endpoint: EndpointId,
    /// What the peer calls itself to us; none until it has answered the greeting.
    pub(super) to: Option<Session>,
    pub(super) shared: Arc<Shared>,
    pub(super) held: HashMap<RegionId, Held>,
    /// By the number of the question.
    pub(super) asked: HashMap<u64, Asked>,
    /// Questions for checksums, likewise.
    pub(super) summing: HashMap<u64, Summing<usize>>,
    /// Jobs that are not over.
    pub(super) jobs: usize,
    /// Those of them that give way to the others.
    pub(super) background: GivingWay<usize>,
    /// Jobs that have moved everything, and whose notifications wait for room.
    pub(super) unsent: LinkedList<Job>,
    /// It is over, and ends by force then at the latest.
    pub(super) ending: Option<Instant>,
    /// The endpoint is being closed.
    pub(super) is_parted: bool,
}

impl Using {
    /// Whether the peer has something to answer.
    pub(super) fn is_owed(&self) -> bool {
        let asks = self.to.is_none() || !self.asked.is_empty() || !self.summing.is_empty();
        !self.is_parted && (asks || self.shared.unanswered.is_notifying())
    }

    /// Whether a notification may be sent.
    pub(super) fn may_notify(&self) -> bool {
        self.shared.unanswered.has_room()
    }

    /// The open question for a region.
    pub(super) fn question(&mut self, region: RegionId) -> Option<&mut Asked> {
        self.asked
            .values_mut()
            .find(|asked| asked.region.id == region && !asked.is_revoked)
    }
}
