//! Takes the host tier's pages from the kernel ahead of use.
//!
//! The first write to a page of fresh memory waits for the kernel to find and clear it, which takes longer than the copy
//! that it holds up. Slots are handed out in order until each has been used once, so a thread keeps some distance before
//! the last slot in use; memory that nobody comes near is never taken. Without it everything works, only slower.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;

use kvfabric_transfer::Region;

/// How far pages are taken before the last slot in use.
const AHEAD_BYTES: u64 = 256 << 20;

/// What is taken at a time; the end of the host tier waits for one such step at most.
const STEP_BYTES: u64 = 2 << 20;

/// The distance at which the thread is woken.
const WAKE_BYTES: u64 = AHEAD_BYTES / 2;

/// The thread that goes ahead; it ends when all pages are there, or with this.
#[derive(Debug)]
pub(super) struct Ahead {
    way: Arc<Way>,
    /// None where the system had no thread to give.
    thread: Option<Thread>,
}

/// How far things have come, in bytes from the first slot on.
#[derive(Debug, Default)]
struct Way {
    used: AtomicU64,
    taken: AtomicU64,
    is_stopped: AtomicBool,
}

/// What there is to do next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Take { offset: u64, len: u64 },
    Wait,
    End,
}

impl Ahead {
    /// Goes ahead in `region`, from its first byte on.
    pub(super) fn start(region: &Region) -> Self {
        let way = Arc::new(Way::default());
        let (shared, region) = (way.clone(), region.clone());
        let thread = std::thread::Builder::new()
            .name("kvf-pages".into())
            .spawn(move || shared.run(&region));
        let thread = match thread {
            Ok(thread) => Some(thread.thread().clone()),
            Err(error) => {
                tracing::warn!(%error, "no thread to take the host tier's pages ahead of use");
                None
            }
        };
        Self { way, thread }
    }

    /// The slots up to this byte are in use.
    pub(super) fn reached(&self, used: u64) {
        let before = self.way.used.fetch_max(used, Ordering::AcqRel);
        if used > before && used.saturating_add(WAKE_BYTES) > self.way.taken.load(Ordering::Acquire)
        {
            self.wake();
        }
    }

    /// No more pages are needed.
    pub(super) fn stop(&self) {
        self.way.is_stopped.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Way {
    fn run(&self, region: &Region) {
        loop {
            match self.next(region.bytes()) {
                Next::End => return,
                Next::Wait => std::thread::park(),
                Next::Take { offset, len } => {
                    if let Err(error) = region.populate(offset, len) {
                        tracing::debug!(%error, "the host tier's pages are no longer taken ahead of use");
                        return;
                    }
                    self.taken.store(offset + len, Ordering::Release);
                }
            }
        }
    }

    fn next(&self, total: u64) -> Next {
        let used = self.used.load(Ordering::Acquire);
        // What is in use already is taken by whoever writes to it.
        let offset = self.taken.load(Ordering::Acquire).max(used);
        if self.is_stopped.load(Ordering::Acquire) || offset >= total {
            return Next::End;
        }
        if offset >= used.saturating_add(AHEAD_BYTES) {
            return Next::Wait;
        }
        Next::Take {
            offset,
            len: STEP_BYTES.min(total - offset),
        }
    }
}

#[cfg(test)]
mod tests {
    //! The decisions, one by one; and the thread over real memory.

    use kvfabric_transfer::{Agent, HostMemory, RegionOptions};

    use super::*;

    fn way(used: u64, taken: u64) -> Way {
        Way {
            used: AtomicU64::new(used),
            taken: AtomicU64::new(taken),
            is_stopped: AtomicBool::new(false),
        }
    }

    #[test]
    fn pages_are_taken_up_to_the_distance_and_not_beyond() {
        let total = 4 * AHEAD_BYTES;
        let first = Next::Take {
            offset: 0,
            len: STEP_BYTES,
        };
        assert_eq!(way(0, 0).next(total), first);
        assert_eq!(way(0, AHEAD_BYTES).next(total), Next::Wait);
        let further = Next::Take {
            offset: AHEAD_BYTES,
            len: STEP_BYTES,
        };
        assert_eq!(way(4096, AHEAD_BYTES).next(total), further);
    }

    #[test]
    fn what_is_in_use_already_is_passed_over() {
        let next = way(AHEAD_BYTES, 0).next(4 * AHEAD_BYTES);
        let expected = Next::Take {
            offset: AHEAD_BYTES,
            len: STEP_BYTES,
        };
        assert_eq!(next, expected);
    }

    #[test]
    fn it_ends_when_all_is_taken_or_nobody_needs_it() {
        assert_eq!(way(0, 100).next(100), Next::End);
        assert_eq!(way(100, 0).next(100), Next::End);
        let last = Next::Take {
            offset: 60,
            len: 40,
        };
        assert_eq!(way(0, 60).next(100), last);
        let stopped = way(0, 0);
        stopped.is_stopped.store(true, Ordering::Release);
        assert_eq!(stopped.next(100), Next::End);
    }

    #[test]
    fn the_thread_takes_all_pages_of_a_small_tier_and_ends() {
        let agent = Agent::builder("pages").build().expect("agent");
        let memory = HostMemory::shared(3 * STEP_BYTES + 4096).expect("memory");
        let region = agent
            .register(memory, RegionOptions::default())
            .expect("region");
        region.write_at(17, b"stays").expect("written");
        let way = Arc::new(Way::default());
        let (shared, of_thread) = (way.clone(), region.clone());
        std::thread::spawn(move || shared.run(&of_thread))
            .join()
            .expect("ended");
        assert_eq!(way.taken.load(Ordering::Acquire), region.bytes());
        let mut bytes = [0; 5];
        region.read_at(17, &mut bytes).expect("read");
        assert_eq!(&bytes, b"stays");
    }
}
