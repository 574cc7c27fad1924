//! A peer whose memory this agent uses.

use std::collections::{HashMap, LinkedList, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind};

use super::tie::Tie;
use crate::agent::{ConnectionReport, RemoteRegion};
use crate::backend::Job;
use crate::backend::far_sums::Summing;
use crate::backend::giving_way::GivingWay;
use crate::backend::unix::{Call, Message, Unanswered, Waiting};
use crate::region::RegionId;

/// Questions that may be unanswered on a path: an answer takes two fragments at most.
const QUESTIONS_MAX: usize = 1024;
/// What is told of a rail.
pub(super) struct RailTold {
    /// What it is, in words.
    what: String,
    to: SocketAddr,
    pub(super) written: AtomicU64,
    pub(super) read: AtomicU64,
    /// Why it is not used; none if it is.
    lost: Mutex<Option<String>>,
}

impl RailTold {
    pub(super) fn new(what: String, to: SocketAddr) -> Self {
        Self {
            what,
            to,
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            lost: Mutex::new(Some("nothing has come by it yet".to_owned())),
        }
    }

    fn lost(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn rise(&self) {
        *self.lost() = None;
    }

    /// Whether it was in use.
    pub(super) fn lose(&self, reason: &str) -> bool {
        self.lost().replace(reason.to_owned()).is_none()
    }

    fn report(&self) -> ConnectionReport {
        ConnectionReport {
            to: self.to,
            sent: self.written.load(Ordering::Relaxed),
            received: self.read.load(Ordering::Relaxed),
            lost: self.lost().clone(),
        }
    }
}

/// What the channel and the driver both look at.
pub(super) struct Shared {
    /// In the order of the path's.
    pub(super) rails: Vec<RailTold>,
    /// Why nothing goes this way any more.
    lost: OnceLock<String>,
    /// It was lost, and the device did not say that it uses no memory for it any more.
    pub(super) undrained: AtomicBool,
    /// It was lost, and the peer did not say that nothing of it can land any more.
    pub(super) unfenced: AtomicBool,
    /// How often something of the peer arrived, or was found to have.
    pub(super) arrived: AtomicU64,
    /// Notifications.
    pub(super) unanswered: Unanswered,
}

impl Shared {
    pub(super) fn new(rails: Vec<RailTold>) -> Self {
        Self {
            rails,
            lost: OnceLock::new(),
            undrained: AtomicBool::new(false),
            unfenced: AtomicBool::new(false),
            arrived: AtomicU64::new(0),
            unanswered: Unanswered::default(),
        }
    }

    /// What the path is, in words.
    pub(super) fn describe(&self) -> String {
        let rails: Vec<String> = self
            .rails
            .iter()
            .map(|rail| match &*rail.lost() {
                None => rail.what.clone(),
                Some(reason) => format!("{} (not used: {reason})", rail.what),
            })
            .collect();
        format!("verbs over {}", rails.join("; "))
    }

    pub(super) fn report(&self) -> Vec<ConnectionReport> {
        self.rails.iter().map(RailTold::report).collect()
    }

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
    /// One for each rail.
    pub(super) keys: Vec<u32>,
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

/// A job that has moved everything, and whose notification waits.
pub(super) struct Unsent {
    pub(super) job: Job,
    /// Whom to ask for the rails that have not answered yet.
    pub(super) mark: Option<u64>,
}

pub(super) struct Using {
    pub(super) tie: Tie,
    /// Whoever waits for the first rail to be up.
    pub(super) opening: Option<Arc<Call>>,
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
    pub(super) unsent: LinkedList<Unsent>,
    /// Rails, as bits, that were asked whether all written by them is in place, by token.
    marks: HashMap<u64, u32>,
    /// Those of them that wait for room.
    pub(super) waiting: VecDeque<u64>,
    /// Threads that take its queue pairs away, beside those of single rails.
    pub(super) burials: usize,
    /// It is over, and everything of it is then, at the latest.
    pub(super) ending: Option<Instant>,
    /// After the end: whether something may still land is known, or will never be.
    pub(super) is_decided: bool,
    /// The peer went without a word.
    pub(super) is_gone: bool,
}

impl Using {
    pub(super) fn new(
        tie: Tie,
        stream: TcpStream,
        shared: Arc<Shared>,
        opening: Arc<Call>,
    ) -> Self {
        Self {
            tie,
            opening: Some(opening),
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
            marks: HashMap::new(),
            waiting: VecDeque::new(),
            burials: 0,
            ending: None,
            is_decided: false,
            is_gone: false,
        }
    }

    /// Whether a question may be asked: the answers to all that are open fit into what the peer may keep for us.
    pub(super) fn may_ask(&self) -> bool {
        self.questions < QUESTIONS_MAX && self.tie.speech.may_notify()
    }

    /// Whether the next notification may be sent.
    pub(super) fn may_notify(&self) -> bool {
        let first = self.unsent.front().and_then(|unsent| unsent.mark);
        let is_marked = first.is_some_and(|mark| self.marks.contains_key(&mark));
        !is_marked && self.shared.unanswered.has_room() && self.tie.speech.may_notify()
    }

    /// These rails, as bits, are asked with this token.
    pub(super) fn mark(&mut self, token: u64, rails: u32) {
        self.marks.insert(token, rails);
    }

    /// A rail has answered.
    pub(super) fn end_mark(&mut self, token: u64, rail: usize) {
        if let Some(rails) = self.marks.get_mut(&token) {
            *rails &= !(1 << rail);
            if *rails == 0 {
                self.marks.remove(&token);
            }
        }
    }

    /// A rail answers no more, and all that was written by it is in place.
    pub(super) fn end_marks(&mut self, rail: usize) {
        let tokens: Vec<u64> = self.marks.keys().copied().collect();
        tokens
            .into_iter()
            .for_each(|token| self.end_mark(token, rail));
    }

    /// The open question for a region.
    pub(super) fn question(&mut self, region: RegionId) -> Option<&mut Asked> {
        self.asked
            .values_mut()
            .find(|asked| asked.region.id == region && !asked.is_revoked)
    }

    /// Whether nothing of it is left.
    pub(super) fn is_over(&self) -> bool {
        let has_wires = self.tie.has_wires() || self.tie.going() > 0 || self.burials > 0;
        self.ending.is_some() && !has_wires && self.is_decided && self.jobs == 0
    }
}
