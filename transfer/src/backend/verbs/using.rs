//! A peer whose memory this agent uses.

use std::collections::{HashMap, LinkedList, VecDeque};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind};

use super::wire::Wire;
use crate::agent::RemoteRegion;
use crate::backend::Job;
use crate::backend::far_sums::Summing;
use crate::backend::giving_way::GivingWay;
use crate::backend::unix::{Call, Message, Unanswered, Waiting};
use crate::region::RegionId;

/// Questions that may be unanswered on a path: an answer takes two fragments at most.
const QUESTIONS_MAX: usize = 1024;

/// What the channel and the driver both look at.
#[derive(Default)]
pub(super) struct Shared {
    /// Why nothing goes this way any more.
    lost: OnceLock<String>,
    /// It was lost, and the peer did not say that nothing of it can land any more.
    pub(super) unfenced: AtomicBool,
    /// How often something of the peer arrived, or was found to have.
    pub(super) arrived: AtomicU64,
    /// Notifications.
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
pub(super) struct Held {
    pub(super) address: u64,
    pub(super) key: u32,
    /// Jobs that use it.
    pub(super) users: usize,
    /// The peer wants it back.
    pub(super) is_revoked: bool,
}

/// A region that the peer was asked for.
pub(super) struct Asked {
    pub(super) region: Arc<RemoteRegion>,
    /// The peer wanted it back before it was here.
    pub(super) is_revoked: bool,
    pub(super) jobs: Vec<u64>,
    pub(super) calls: Vec<Arc<Call>>,
}

pub(super) struct Using {
    /// None once it is drained, or was destroyed, after the path's end.
    pub(super) wire: Option<Wire>,
    /// None once the peer has closed it.
    pub(super) stream: Option<TcpStream>,
    pub(super) shared: Arc<Shared>,
    pub(super) held: HashMap<RegionId, Held>,
    /// By the number of the question.
    pub(super) asked: HashMap<u64, Asked>,
    /// Checksums that the peer was asked for, by the number of the question.
    pub(super) summing: HashMap<u64, Summing<u64>>,
    /// Questions that wait until earlier ones are answered: some for each job, and one for each region.
    pub(super) unasked: VecDeque<Message>,
    /// Questions that were asked and are not answered, whoever still waits for that.
    pub(super) questions: usize,
    /// Jobs that are not over.
    pub(super) jobs: usize,
    /// Those of them that give way to the others.
    pub(super) background: GivingWay<u64>,
    /// Jobs that have moved everything, and whose notifications wait for room.
    pub(super) unsent: LinkedList<Job>,
    /// Those of them that wait for room.
    pub(super) waiting: VecDeque<u64>,
    /// It is over, and everything of it is then, at the latest.
    pub(super) ending: Option<Instant>,
    /// After the end: whether something may still land is known, or will never be.
    pub(super) is_decided: bool,
    /// The peer went without a word.
    pub(super) is_gone: bool,
}

impl Using {
    pub(super) fn new(wire: Wire, stream: TcpStream, shared: Arc<Shared>) -> Self {
        Self {
            wire: Some(wire),
            stream: Some(stream),
            shared,
            held: HashMap::new(),
            asked: HashMap::new(),
            summing: HashMap::new(),
            unasked: VecDeque::new(),
            questions: 0,
            jobs: 0,
            background: GivingWay::default(),
            unsent: LinkedList::new(),
            waiting: VecDeque::new(),
            ending: None,
            is_decided: false,
            is_gone: false,
        }
    }

    /// Whether a question may be asked: the answers to all that are open fit into what the peer may keep for us.
    pub(super) fn may_ask(&self) -> bool {
        let outbox = self.wire.as_ref().is_none_or(Wire::may_notify);
        self.questions < QUESTIONS_MAX && outbox
    }

    /// Whether a notification may be sent.
    pub(super) fn may_notify(&self) -> bool {
        let outbox = self.wire.as_ref().is_none_or(Wire::may_notify);
        self.shared.unanswered.has_room() && outbox
    }

    /// The open question for a region.
    pub(super) fn question(&mut self, region: RegionId) -> Option<&mut Asked> {
        self.asked
            .values_mut()
            .find(|asked| asked.region.id == region && !asked.is_revoked)
    }

    /// Whether nothing of it is left.
    pub(super) fn is_over(&self) -> bool {
        self.ending.is_some() && self.wire.is_none() && self.is_decided && self.jobs == 0
    }
}
