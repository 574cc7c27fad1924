//! What the files of this crate meet elsewhere: as much of it as they ask for.

pub(crate) mod plan {
    //! A move of some extents, of which only the number of users is looked at.

    use std::sync::Arc;

    use kvcache_core::{Error, ErrorKind, Result};

    use super::backend::Operation;
    use crate::sync::{AtomicU64, Ordering};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Extent {
        pub(crate) local: u32,
        pub(crate) remote: u32,
        pub(crate) local_offset: u64,
        pub(crate) remote_offset: u64,
        pub(crate) len: u64,
    }

    pub(crate) struct Plan {
        pub(crate) operation: Operation,
        pub(crate) extents: Vec<Extent>,
        pub(crate) bytes: u64,
        /// Of which pair each extent is, if what arrives is checked.
        pub(crate) pairs: Vec<u32>,
        /// Whether what arrives is not what was sent.
        pub(crate) differs: bool,
        /// How often its regions were given back.
        pub(crate) left: AtomicU64,
    }

    impl Plan {
        pub(crate) fn of(operation: Operation, pieces: u64) -> Self {
            let extent = |n: u64| Extent {
                local: 0,
                remote: 0,
                local_offset: 2 * n,
                remote_offset: 2 * n,
                len: 1,
            };
            Self {
                operation,
                extents: (0..pieces).map(extent).collect(),
                bytes: pieces,
                pairs: Vec::new(),
                differs: false,
                left: AtomicU64::new(0),
            }
        }

        pub(crate) fn empty() -> Self {
            Self::of(Operation::Write, 0)
        }

        /// The same, with checksums.
        pub(crate) fn checked(self, differs: bool) -> Self {
            Self {
                pairs: (0..self.extents.len() as u32).collect(),
                differs,
                ..self
            }
        }

        pub(crate) fn with(&self, extents: Vec<Extent>, pairs: Vec<u32>) -> Self {
            Self {
                bytes: extents.len() as u64,
                extents,
                pairs,
                differs: self.differs,
                ..Self::of(self.operation, 0)
            }
        }

        pub(crate) fn is_checked(&self) -> bool {
            !self.pairs.is_empty()
        }

        pub(crate) fn asking_for_sums(&self) -> Result<Self> {
            Ok(Self::of(Operation::Read, self.extents.len() as u64))
        }

        pub(crate) fn compare(&self, _sums: &Self) -> Result<()> {
            match self.differs {
                true => Err(Error::new(ErrorKind::Corrupt, "it differs")),
                false => Ok(()),
            }
        }

        pub(crate) fn leave(&self) {
            self.left.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(crate) mod backend {
    //! A backend that only keeps what it is handed, for the scenario to settle.

    use std::sync::{Arc, PoisonError};
    use std::time::{Duration, Instant};

    use kvcache_core::{Error, Result};

    use crate::plan::Plan;
    use crate::sync::Mutex;

    pub(crate) use crate::job::{Job, Refusal, abandoned};

    /// Where a device's stream is: there is none here.
    #[derive(Clone)]
    pub(crate) enum Point {}

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Operation {
        Read,
        Write,
    }

    pub(crate) trait Backend: Send + Sync {
        fn name(&self) -> &'static str;
        fn prepare(&self, plan: &Plan) -> Result<()>;
        fn fences(&self, operation: Operation) -> bool;
        fn progress(&self) -> Option<u64>;
        fn relieve(&self, _now: Instant, _after: Duration) -> bool {
            false
        }
        fn post(&self, job: Job) -> Result<(), Refusal>;
        fn reap(&self);
        fn give_way(&self);
    }

    pub(crate) trait Channel: Backend {}

    /// What it is handed.
    pub(crate) struct Shelf {
        name: &'static str,
        jobs: Mutex<Vec<Job>>,
        /// Whether it settles at once what was given up.
        reaps: bool,
    }

    impl Shelf {
        pub(crate) fn new(name: &'static str, reaps: bool) -> Arc<Self> {
            Arc::new(Self {
                name,
                jobs: Mutex::default(),
                reaps,
            })
        }

        /// Takes one job out, if there is one.
        pub(crate) fn take(&self) -> Option<Job> {
            self.jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop()
        }
    }

    impl Backend for Shelf {
        fn name(&self) -> &'static str {
            self.name
        }

        fn prepare(&self, _plan: &Plan) -> Result<()> {
            Ok(())
        }

        fn fences(&self, operation: Operation) -> bool {
            operation == Operation::Read
        }

        fn progress(&self) -> Option<u64> {
            Some(0)
        }

        fn post(&self, job: Job) -> Result<(), Refusal> {
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            jobs.push(job);
            Ok(())
        }

        fn reap(&self) {
            if !self.reaps {
                return;
            }
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            let (given_up, kept): (Vec<Job>, Vec<Job>) =
                jobs.drain(..).partition(Job::is_abandoned);
            *jobs = kept;
            drop(jobs);
            given_up
                .into_iter()
                .for_each(|job| job.settle(Err(abandoned())));
        }

        fn give_way(&self) {
            self.reap();
        }
    }

    impl Channel for Shelf {}
}

pub(crate) mod reactor {
    //! A reactor that nobody leads.

    pub(crate) struct Reactor;

    impl Reactor {
        pub(crate) fn kick(&self) {}
    }
}

pub(crate) mod agent {
    //! An agent with one peer, which has another way if it was given one.

    use std::sync::{Arc, Weak};
    use std::time::{Duration, Instant};

    use kvcache_core::{Error, ErrorKind, Result};

    use super::backend::{Backend, Channel};
    use crate::plan::Plan;
    use crate::request::{Bucket, Later, Priority, RequestCore};
    use crate::stats::{Counters, Stats};
    use crate::sync::{AtomicU64, Ordering};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct TimerKey(pub(crate) Instant);

    /// It never rings by itself.
    pub(crate) struct Timer;

    impl Timer {
        pub(crate) fn add(&self, at: Instant, _request: Weak<RequestCore>) -> TimerKey {
            TimerKey(at)
        }

        pub(crate) fn remove(&self, _key: TimerKey) {}
    }

    pub(crate) struct AgentCore {
        pub(crate) stats: Stats,
        pub(crate) timer: Arc<Timer>,
        pub(crate) later: Arc<Later>,
    }

    impl AgentCore {
        pub(crate) fn new() -> Arc<Self> {
            Arc::new(Self {
                stats: Stats::default(),
                timer: Arc::new(Timer),
                later: Arc::default(),
            })
        }

        pub(crate) fn stats(&self) -> &Stats {
            &self.stats
        }

        pub(crate) fn timer(&self) -> &Arc<Timer> {
            &self.timer
        }

        pub(crate) fn later(&self) -> &Arc<Later> {
            &self.later
        }

        pub(crate) fn slow_after(&self) -> Option<Duration> {
            Some(Duration::ZERO)
        }

        pub(crate) fn rates(
            &self,
            _priority: Priority,
            _peer: Option<&Arc<PeerCore>>,
        ) -> Vec<Arc<Bucket>> {
            Vec::new()
        }
    }

    pub(crate) struct Failure<'a> {
        pub(crate) backend: Option<&'a Arc<dyn Backend>>,
        pub(crate) at: Instant,
        pub(crate) closings: u64,
    }

    pub(crate) struct PeerCore {
        pub(crate) other: Option<Arc<dyn Channel>>,
        /// Posts that wait for a connection.
        pub(crate) queued: AtomicU64,
    }

    impl PeerCore {
        pub(crate) fn name(&self) -> &str {
            "peer"
        }

        pub(crate) fn leave_queue(&self) {
            self.queued.fetch_sub(1, Ordering::AcqRel);
        }

        pub(crate) fn made_ready(
            self: &Arc<Self>,
            _agent: &Arc<AgentCore>,
            _plan: &Plan,
            channel: Arc<dyn Channel>,
        ) -> Result<Arc<dyn Channel>> {
            Ok(channel)
        }

        pub(crate) fn leave(&self, _failed: &Arc<dyn Backend>, _why: &str) {}

        pub(crate) fn counters(&self, agent: &AgentCore, backend: &'static str) -> Arc<Counters> {
            agent.stats().counters(backend)
        }

        pub(crate) fn channel_after(
            self: &Arc<Self>,
            _agent: &Arc<AgentCore>,
            _plan: &Plan,
            _failure: &Failure<'_>,
        ) -> Result<Arc<dyn Channel>> {
            let lost = || Error::new(ErrorKind::PeerLost, "no other way");
            self.other.clone().ok_or_else(lost)
        }

        pub(crate) fn channel_beside(
            self: &Arc<Self>,
            agent: &Arc<AgentCore>,
            plan: &Plan,
            slow: &Failure<'_>,
            _why: &str,
        ) -> Result<Arc<dyn Channel>> {
            self.channel_after(agent, plan, slow)
        }

        pub(crate) fn reconnect(&self, _agent: &AgentCore, _ways: &[usize]) {}
    }
}
