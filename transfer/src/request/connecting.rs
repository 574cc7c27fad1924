//! What may have to wait for a connection: each peer's in order, and no peer's behind another's.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::core::{Failed, RequestCore};
use super::later::{Due, WAITING_MAX};
use super::state::PostNumber;
use crate::agent::{AgentCore, Failure, PeerCore};
use crate::backend::Backend;
use crate::sync::thread::{Builder, JoinHandle};
use crate::sync::{Mutex, MutexGuard};

/// Threads that connect at the same time. With more peers than this that do not answer, the others wait their turn.
const CONNECTING_MAX: usize = 64;

/// What waits, by peer, and the threads that see to it. There are none when nothing waits.
#[derive(Default)]
pub(super) struct Connecting(Mutex<Lanes>);

#[derive(Default)]
struct Lanes {
    /// By peer. One that a thread sees to is here, even if nothing more waits.
    lanes: BTreeMap<usize, VecDeque<Due>>,
    /// Peers for which something waits, and that no thread sees to.
    ready: VecDeque<usize>,
    waiting: usize,
    threads: BTreeMap<u64, JoinHandle<()>>,
    /// Threads that have nothing more to do.
    ended: Vec<JoinHandle<()>>,
    next_thread: u64,
    closed: bool,
}

impl Connecting {
    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it after all that waits for the same peer, or hands it back when there is no room, or no thread.
    pub(super) fn add(self: &Arc<Self>, peer: &Weak<PeerCore>, due: Due) -> Result<(), Due> {
        let key = Weak::as_ptr(peer).addr();
        let mut lanes = self.lock();
        let counts = is_bounded(&due);
        if lanes.closed || (counts && lanes.waiting >= WAITING_MAX) {
            return Err(due);
        }
        if let Some(lane) = lanes.lanes.get_mut(&key) {
            lane.push_back(due);
            lanes.waiting += usize::from(counts);
            return Ok(());
        }
        let ended = std::mem::take(&mut lanes.ended);
        if lanes.threads.len() < CONNECTING_MAX
            && let Err(error) = self.start_thread(&mut lanes)
        {
            tracing::warn!(%error, "start a thread that connects");
            if lanes.threads.is_empty() {
                return Err(due);
            }
        }
        lanes.lanes.insert(key, VecDeque::from([due]));
        lanes.ready.push_back(key);
        lanes.waiting += usize::from(counts);
        drop(lanes);
        join(ended);
        Ok(())
    }

    fn start_thread(self: &Arc<Self>, lanes: &mut Lanes) -> std::io::Result<()> {
        let (own, number) = (self.clone(), lanes.next_thread);
        let thread = Builder::new().name("kvf-connecting".into());
        let thread = thread.spawn(move || own.run(number))?;
        lanes.threads.insert(number, thread);
        lanes.next_thread += 1;
        Ok(())
    }

    fn run(&self, thread: u64) {
        let mut lanes = self.lock();
        while let Some(key) = lanes.ready.pop_front() {
            let due = lanes.lanes.get_mut(&key).and_then(VecDeque::pop_front);
            lanes.waiting -= usize::from(due.as_ref().is_some_and(is_bounded));
            drop(lanes);
            if let Some(due) = due {
                due.post();
            }
            lanes = self.lock();
            // One at a time, so that no peer keeps a thread from the others.
            match lanes.lanes.get(&key) {
                Some(lane) if !lane.is_empty() => lanes.ready.push_back(key),
                _ => drop(lanes.lanes.remove(&key)),
            }
        }
        if let Some(own) = lanes.threads.remove(&thread) {
            lanes.ended.push(own);
        }
    }

    /// Whatever waits fails, and the threads end.
    pub(super) fn close(&self) -> Vec<JoinHandle<()>> {
        let mut lanes = self.lock();
        lanes.closed = true;
        lanes.ready.clear();
        lanes.waiting = 0;
        let left = std::mem::take(&mut lanes.lanes);
        let running = std::mem::take(&mut lanes.threads);
        let mut threads = std::mem::take(&mut lanes.ended);
        drop(lanes);
        left.into_values().flatten().for_each(Due::fail);
        threads.extend(running.into_values());
        threads
    }
}

/// Whether there is a limit to how many of its kind wait. There is none to posts: they wait for their turn.
fn is_bounded(due: &Due) -> bool {
    !matches!(due, Due::Unconnected(_))
}

/// Takes back what has ended.
fn join(ended: Vec<JoinHandle<()>>) {
    for thread in ended {
        if thread.join().is_err() {
            tracing::error!("a thread that connects panicked");
        }
    }
}

/// A request that was posted when there was no connection that serves it.
pub(super) struct Unconnected {
    pub(super) core: Arc<RequestCore>,
    pub(super) number: PostNumber,
    pub(super) agent: Weak<AgentCore>,
    pub(super) peer: Weak<PeerCore>,
    /// How often the peer's connections had been ended when the request was posted.
    pub(super) closings: u64,
    pub(super) posted_at: Instant,
}

impl Unconnected {
    /// Connects, and posts.
    pub(super) fn post(self) {
        match self.connect() {
            Ok(()) => {}
            Err(error) => self.core.fail_unposted(self.number, error),
        }
    }

    fn connect(&self) -> Result<()> {
        let gone = || {
            let text = "the agent is closed or the peer forgotten";
            Error::new(ErrorKind::PeerLost, text)
        };
        let agent = self.agent.upgrade().ok_or_else(gone)?;
        let peer = self.peer.upgrade().ok_or_else(gone)?;
        // Not for a caller who has given up meanwhile.
        if !self.core.is_unposted(self.number) {
            return Ok(());
        }
        let nothing = Failure {
            backend: None,
            at: self.posted_at,
            closings: self.closings,
        };
        let plan = &self.core.plan;
        let channel = peer.channel_after(&agent, plan, &nothing)?;
        let backend: Arc<dyn Backend> = peer.made_ready(&agent, plan, channel)?;
        let counters = peer.counters(&agent, backend.name());
        if self.core.take_way(self.number, &backend, counters)
            && let Err(error) = self.core.post_pieces(self.number)
        {
            self.core.piece_failed(Failed {
                backend: &backend,
                piece: 0,
                tries: 1,
                error,
                began: false,
            });
        }
        Ok(())
    }
}

impl Drop for Unconnected {
    /// Later posts need not wait for this one any more.
    fn drop(&mut self) {
        if let Some(peer) = self.peer.upgrade() {
            peer.leave_queue();
        }
    }
}
