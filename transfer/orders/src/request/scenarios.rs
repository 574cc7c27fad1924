//! One request, and what is done to it at the same time. However that goes: it ends once, as one of those who acted wanted
//! it; its regions are given back once, and not before nothing of it is open; whoever waits is woken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind};
use loom::thread::{self, JoinHandle};

use super::connecting::Unconnected;
use super::core::RequestCore;
use super::later::Due;
use super::slow::Slow;
use super::state::{PostNumber, Start, Taken};
use super::{Later, Priority};
use crate::agent::{AgentCore, PeerCore};
use crate::backend::{Backend, Channel, Job, Operation, Shelf};
use crate::explore;
use crate::outcome::{Completion, Status, TransferError};
use crate::plan::Plan;
use crate::sync::{AtomicU64, Ordering};

const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// A posted request and all that it knows.
struct Scene {
    agent: Arc<AgentCore>,
    peer: Arc<PeerCore>,
    request: Arc<RequestCore>,
    number: PostNumber,
    first: Arc<Shelf>,
    second: Arc<Shelf>,
}

impl Scene {
    /// A request of so many parts, posted to a backend beside which there is another. Of the first, `reaps` says whether it
    /// settles at once what was given up.
    fn new(parts: u64, notice: bool, reaps: bool) -> Self {
        Self::of(Plan::of(Operation::Read, parts), notice, reaps)
    }

    /// The same, of a plan whose extents are the parts.
    fn of(plan: Plan, notice: bool, reaps: bool) -> Self {
        let (first, second) = (Shelf::new("first", reaps), Shelf::new("second", true));
        let agent = AgentCore::new();
        let other: Arc<dyn Channel> = second.clone();
        let (request, peer) = idle(plan, &agent, Some(other));
        let backend: Arc<dyn Backend> = first.clone();
        let start = Start {
            way: Some((&backend, agent.stats().counters("first"))),
            deadline: FOR_EVER,
            notice: notice.then(|| Bytes::from_static(b"done")),
            closings: 0,
            after: None,
        };
        let number = request.start(start).expect("it is idle");
        request.post_pieces(number).expect("it is taken");
        request.watch(number, Some(&backend));
        Self {
            agent,
            peer,
            request,
            number,
            first,
            second,
        }
    }

    /// A request of one part, posted when there is no connection; to be had is that of the second backend, or none.
    fn unconnected(reachable: bool) -> Self {
        let (first, second) = (Shelf::new("first", true), Shelf::new("second", true));
        let agent = AgentCore::new();
        let other: Arc<dyn Channel> = second.clone();
        let plan = Plan::of(Operation::Read, 1);
        let (request, peer) = idle(plan, &agent, reachable.then_some(other));
        let start = Start {
            way: None,
            deadline: FOR_EVER,
            notice: None,
            closings: 0,
            after: None,
        };
        let number = request.start(start).expect("it is idle");
        peer.queued.store(1, Ordering::Release);
        let due = Due::Unconnected(Unconnected {
            core: request.clone(),
            number,
            agent: Arc::downgrade(&agent),
            peer: Arc::downgrade(&peer),
            closings: 0,
            posted_at: Instant::now(),
        });
        assert!(agent.later().add(Instant::now(), due).is_ok());
        request.watch(number, None);
        Self {
            agent,
            peer,
            request,
            number,
            first,
            second,
        }
    }

    fn wait(&self) -> Result<Completion, TransferError> {
        let over = self
            .request
            .wait(Instant::now() + FOR_EVER, |state| state.is_drained());
        assert!(over);
        assert_eq!(self.request.plan.left.load(Ordering::Relaxed), 1);
        match self.request.take_result() {
            Taken::Result(result) => result,
            Taken::Pending(_) => unreachable!("it is drained and not decided"),
        }
    }

    /// Ends the threads that post later, if any was started.
    fn close(&self) {
        for thread in self.agent.later().close() {
            thread.join().expect("it ends");
        }
    }
}

/// A request whose parts are the plan's extents, and its peer.
fn idle(
    plan: Plan,
    agent: &Arc<AgentCore>,
    other: Option<Arc<dyn Channel>>,
) -> (Arc<RequestCore>, Arc<PeerCore>) {
    let peer = Arc::new(PeerCore {
        other,
        queued: AtomicU64::new(0),
    });
    let ends: Vec<usize> = (1..=plan.extents.len()).collect();
    let request = RequestCore::new(plan, &ends, Priority::Normal, agent, Some(&peer));
    (Arc::new(request), peer)
}

/// Settles one job of a backend, when there is one.
fn settles(shelf: &Arc<Shelf>, outcome: fn() -> kvcache_core::Result<()>) -> JoinHandle<()> {
    let shelf = shelf.clone();
    thread::spawn(move || {
        if let Some(job) = shelf.take() {
            job.settle(outcome());
        }
    })
}

fn lost() -> kvcache_core::Result<()> {
    Err(Error::new(ErrorKind::PeerLost, "cut"))
}

/// Done, cancelled and waited for at once. A caller who cancels in time is told so, although all has arrived.
pub fn a_request_is_done_or_cancelled_and_not_both() {
    explore(3, || {
        let scene = Scene::new(1, false, true);
        let done = settles(&scene.first, || Ok(()));
        let request = scene.request.clone();
        let cancels = thread::spawn(move || {
            request.give_up(Error::new(ErrorKind::Cancelled, "enough"));
        });
        match scene.wait() {
            Ok(done) => assert_eq!(done.bytes, 1),
            Err(failed) => assert_eq!(failed.kind(), ErrorKind::Cancelled),
        }
        done.join().expect("it ends");
        cancels.join().expect("it ends");
    });
}

/// The parts are settled on two threads; the notification goes once, when both are in place, and the one who waits for a
/// part is woken by it.
pub fn the_notification_goes_once_after_all_parts() {
    explore(2, || {
        let scene = Scene::new(2, true, true);
        let done = [(); 2].map(|()| settles(&scene.first, || Ok(())));
        let until = Instant::now() + FOR_EVER;
        assert!(scene.request.wait(until, |state| state.part(0).is_some()));
        done.into_iter()
            .for_each(|done| done.join().expect("it ends"));
        let notice = scene.first.take().expect("it was posted");
        assert!(notice.notification().is_some());
        assert!(scene.first.take().is_none());
        notice.settle(Ok(()));
        assert_eq!(scene.wait().expect("it is done").bytes, 2);
    });
}

/// One part fails for good while the other is settled: the request fails, once, when nothing of it is open.
pub fn a_part_that_fails_ends_the_request_when_the_others_have_settled() {
    explore(2, || {
        let scene = Scene::new(2, true, false);
        let done = settles(&scene.first, || Ok(()));
        let denied = || Err(Error::new(ErrorKind::Denied, "not yours"));
        let fails = settles(&scene.first, denied);
        let failed = scene.wait().expect_err("a part was denied");
        assert_eq!(failed.kind(), ErrorKind::Denied);
        [done, fails]
            .into_iter()
            .for_each(|thread| thread.join().expect("it ends"));
        assert!(scene.first.take().is_none(), "no notification of a failure");
    });
}

/// The first way is lost, the thread that posts later tries the second, and the caller cancels meanwhile.
pub fn a_lost_way_is_followed_by_the_next_or_the_cancel() {
    explore(2, || {
        let scene = Scene::new(1, false, true);
        let fails = settles(&scene.first, lost);
        let request = scene.request.clone();
        let cancels = thread::spawn(move || {
            request.give_up(Error::new(ErrorKind::Cancelled, "enough"));
        });
        fails.join().expect("it ends");
        cancels.join().expect("it ends");
        scene.close();
        if let Some(job) = scene.second.take() {
            job.settle(Ok(()));
        }
        let failed = scene.wait().expect_err("it was cancelled");
        assert!(matches!(failed.kind(), ErrorKind::Cancelled));
    });
}

/// Nothing is cancelled: what fails on the first way is done on the second.
pub fn a_lost_way_is_followed_by_the_next() {
    explore(2, || {
        let scene = Scene::new(1, false, true);
        let fails = settles(&scene.first, lost);
        fails.join().expect("it ends");
        // What waits is posted before the thread ends, or handed back as a failure.
        scene.close();
        let posted = scene.second.take();
        let was_posted = posted.is_some();
        if let Some(job) = posted {
            job.settle(Ok(()));
        }
        match scene.wait() {
            Ok(done) => assert_eq!(
                (was_posted, done.backend, done.failovers),
                (true, "second", 1)
            ),
            Err(failed) => assert_eq!((was_posted, failed.kind()), (false, ErrorKind::PeerLost)),
        }
    });
}

/// The path is found to stand still just when the last bytes arrive: the request is done on one of the two ways, and its
/// job is settled once.
pub fn a_path_that_is_left_may_still_be_in_time() {
    explore(2, || {
        let scene = Scene::new(1, false, true);
        let slow = Slow {
            core: scene.request.clone(),
            number: scene.number,
            backend: scene.first.clone(),
            seen_at: Instant::now(),
        };
        let leaves = thread::spawn(move || slow.leave());
        let done = settles(&scene.first, || Ok(()));
        leaves.join().expect("it ends");
        done.join().expect("it ends");
        scene.close();
        if let Some(job) = scene.second.take() {
            assert!(scene.first.take().is_none(), "on two ways at once");
            job.settle(Ok(()));
        }
        match scene.wait() {
            Ok(done) => assert!(matches!(done.backend, "first" | "second")),
            // The thread that posts later was closed first.
            Err(failed) => assert_eq!(failed.kind(), ErrorKind::Timeout),
        }
    });
}

/// The bytes of two parts and their checksums come on two threads: the request is done when both have been compared, and not
/// before.
pub fn parts_are_done_when_their_checksums_were_compared() {
    explore(2, || {
        let plan = Plan::of(Operation::Read, 2).checked(false);
        let scene = Scene::of(plan, false, true);
        let twice = [(); 2].map(|()| {
            let shelf = scene.first.clone();
            thread::spawn(move || {
                for job in [shelf.take(), shelf.take()].into_iter().flatten() {
                    job.settle(Ok(()));
                }
            })
        });
        twice
            .into_iter()
            .for_each(|settles| settles.join().expect("it ends"));
        // What came when both threads had looked.
        let mut left = 0;
        while let Some(job) = scene.first.take() {
            assert!(matches!(scene.request.lock().status, Status::InFlight));
            job.settle(Ok(()));
            left += 1;
        }
        assert!(left <= 2);
        assert_eq!(scene.wait().expect("it is done").bytes, 2);
    });
}

/// The checksums differ, and the caller gives up meanwhile: the request fails, as one of both.
pub fn what_differs_fails_or_was_cancelled() {
    explore(2, || {
        let plan = Plan::of(Operation::Read, 1).checked(true);
        let scene = Scene::of(plan, false, true);
        settles(&scene.first, || Ok(())).join().expect("it ends");
        let compared = settles(&scene.first, || Ok(()));
        let request = scene.request.clone();
        let cancels = thread::spawn(move || {
            request.give_up(Error::new(ErrorKind::Cancelled, "enough"));
        });
        compared.join().expect("it ends");
        cancels.join().expect("it ends");
        scene.close();
        // What differs is tried once more, over the other way.
        while let Some(job) = scene.second.take() {
            job.settle(Ok(()));
        }
        let failed = scene.wait().expect_err("it differs");
        assert!(matches!(
            failed.kind(),
            ErrorKind::Corrupt | ErrorKind::Cancelled
        ));
    });
}

/// Posted again as soon as it is over: nothing of the first post touches the second.
pub fn a_request_is_posted_again_when_it_is_over() {
    explore(2, || {
        let scene = Scene::new(1, false, true);
        let done = settles(&scene.first, || Ok(()));
        let request = scene.request.clone();
        let number = scene.number;
        let late = thread::spawn(move || {
            request.fail_unposted(number, Error::new(ErrorKind::Busy, "late"));
        });
        scene.wait().expect("it is done");
        let backend: Arc<dyn Backend> = scene.second.clone();
        let start = Start {
            way: Some((&backend, scene.agent.stats().counters("second"))),
            deadline: FOR_EVER,
            notice: None,
            closings: 0,
            after: None,
        };
        let number = scene.request.start(start).expect("it is idle");
        scene.request.post_pieces(number).expect("it is taken");
        settles(&scene.second, || Ok(())).join().expect("it ends");
        [done, late]
            .into_iter()
            .for_each(|thread| thread.join().expect("it ends"));
        match scene.request.take_result() {
            Taken::Result(result) => assert_eq!(result.expect("it is done").backend, "second"),
            Taken::Pending(_) => unreachable!("it was settled"),
        }
    });
}

/// Posted without a connection, cancelled while one is made, the agent closed at once: it ends as one of them wants it, and
/// later posts need not wait for it.
pub fn a_post_without_a_connection_is_done_or_given_up() {
    explore(2, || {
        let scene = Scene::unconnected(true);
        let request = scene.request.clone();
        let cancels = thread::spawn(move || {
            request.give_up(Error::new(ErrorKind::Cancelled, "enough"));
        });
        let done = settles(&scene.second, || Ok(()));
        cancels.join().expect("it ends");
        done.join().expect("it ends");
        scene.close();
        if let Some(job) = scene.second.take() {
            job.settle(Ok(()));
        }
        match scene.wait() {
            Ok(done) => assert_eq!((done.backend, done.failovers), ("second", 0)),
            Err(failed) => assert_eq!(failed.kind(), ErrorKind::Cancelled),
        }
        assert_eq!(scene.peer.queued.load(Ordering::Acquire), 0);
    });
}

/// There is no connection to be had: the request fails by that, once, or by the end of the agent.
pub fn a_post_to_nobody_fails() {
    explore(3, || {
        let scene = Scene::unconnected(false);
        let agent = scene.agent.clone();
        let closes = thread::spawn(move || {
            for thread in agent.later().close() {
                thread.join().expect("it ends");
            }
        });
        let failed = scene.wait().expect_err("there is nobody");
        assert!(matches!(
            failed.kind(),
            ErrorKind::PeerLost | ErrorKind::Cancelled
        ));
        closes.join().expect("it ends");
        assert_eq!(scene.peer.queued.load(Ordering::Acquire), 0);
    });
}
