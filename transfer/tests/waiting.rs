//! Those who wait read the sockets and copy themselves: nobody else's work may suffer from it, and what comes another way is not
//! missed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod support;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Completion, LOOK_DEFAULT, LOOK_MAX, Operation, Request, RequestOptions, TransferError,
};

use support::proxy::{Proxy, proxied_from};
use support::{OPEN, Pair, WAIT, Way, contents, loopback, pattern};

/// Longer than any test may take: a wait that is not ended by what it waits for is found by [`WAIT`].
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// How often what only sometimes meets a waiter is tried.
const TIMES: usize = 200;

/// Waits that sleep at once, those that look as long as it pays, and those that look for as long as can be asked for.
const LOOKS: [Duration; 3] = [Duration::ZERO, LOOK_DEFAULT, LOOK_MAX];

/// One waits over sockets while what it waits for comes from another thread of the process, without any socket.
#[test]
fn a_notification_that_comes_by_no_socket_wakes_who_waits() {
    LOOKS.into_iter().for_each(notify_by_no_socket);
}

fn notify_by_no_socket(look: Duration) {
    let builder = |name| Agent::builder(name).tcp(Some(loopback())).look(look);
    let build = |name| builder(name).build().unwrap();
    let (from, to) = (build("from"), build("to"));
    let peer = from.load_peer(&to.metadata()).unwrap();
    let (came, arrivals) = mpsc::channel();
    let waiter = thread::spawn(move || {
        for _ in 0..TIMES {
            came.send(to.wait_notifications(FOR_EVER).len()).unwrap();
        }
    });
    for number in 0..TIMES {
        let sent = from
            .notify(&peer, number.to_le_bytes().to_vec().into())
            .unwrap();
        assert_eq!(sent.wait(WAIT).unwrap().backend, "memcpy");
        assert_eq!(arrivals.recv_timeout(WAIT).expect("the waiter is woken"), 1);
    }
    waiter.join().unwrap();
}

/// After exchanges in quick succession, when the sockets are left to those who wait, a sender is told that its notification was
/// taken also when whoever took it does nothing more, and when that one's agent goes.
#[test]
fn a_sender_is_told_whatever_the_taker_does_next() {
    for way in [Way::Shm, Way::Cma, Way::Tcp] {
        let (one, other) = (way.agent("one"), way.agent("other"));
        let to_other = one.load_peer(&other.metadata()).unwrap();
        let to_one = other.load_peer(&one.metadata()).unwrap();
        for round in 0..TIMES {
            let exchanges = 1 + round % 20;
            let echo = thread::scope(|scope| {
                let echo = scope.spawn(|| {
                    for _ in 0..exchanges {
                        assert_eq!(other.wait_notifications(WAIT).len(), 1, "{way:?}");
                        let answer = other.notify(&to_one, vec![2].into()).unwrap();
                        answer.wait(WAIT).unwrap();
                    }
                    // Taken, and then nothing.
                    other.wait_notifications(WAIT).len()
                });
                for _ in 0..exchanges {
                    let sent = one.notify(&to_other, vec![1].into()).unwrap();
                    assert_eq!(one.wait_notifications(WAIT).len(), 1, "{way:?}");
                    sent.wait(WAIT).unwrap();
                }
                let last = one.notify(&to_other, vec![3].into()).unwrap();
                last.wait(WAIT).unwrap();
                echo.join().unwrap()
            });
            assert_eq!(echo, 1, "{way:?}");
        }
        let last = one.notify(&to_other, vec![4].into()).unwrap();
        assert_eq!(other.wait_notifications(WAIT).len(), 1);
        drop((to_one, other));
        // Told, or told that the other is gone.
        if let Err(error) = last.wait(WAIT) {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{way:?}: {error}");
        }
    }
}

/// A pair whose connection goes through a proxy, and a request that was moved once.
fn through_a_proxy(look: Duration) -> (Proxy, Pair, Request) {
    let initiator = Way::Tcp.builder("initiator").look(look).build().unwrap();
    let (pair, proxy) = proxied_from(initiator, 4096);
    let request = pair.moves(Operation::Read, &[(0, 0, 4096)], RequestOptions::default());
    request.wait(WAIT).unwrap();
    (proxy, pair, request)
}

type Ended = Result<Completion, TransferError>;

/// Cancels a request that another thread waits for, as often as [`TIMES`]: the other one is woken.
fn cancel_under_who_waits(request: &Request, wait: impl Fn(&Request) -> Ended + Sync) {
    for _ in 0..TIMES {
        request.post().unwrap();
        let (ended, ends) = mpsc::channel();
        thread::scope(|scope| {
            let (started, wait) = (mpsc::channel(), &wait);
            scope.spawn(move || {
                started.0.send(()).unwrap();
                ended.send(wait(request)).unwrap();
            });
            started.1.recv().unwrap();
            request.cancel();
            let outcome = ends.recv_timeout(WAIT).expect("the waiter is woken");
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Cancelled);
        });
        assert!(request.wait_drained(WAIT));
    }
}

/// The connection is stalled, so that the one who waits does so at the socket until another thread cancels.
#[test]
fn a_cancelled_request_wakes_who_waits_at_its_socket() {
    for look in LOOKS {
        let (proxy, _pair, request) = through_a_proxy(look);
        proxy.stall();
        cancel_under_who_waits(&request, |request| request.wait(FOR_EVER));
    }
}

/// The same with one who waits for a part.
#[test]
fn a_cancelled_request_wakes_who_waits_for_a_part() {
    for look in LOOKS {
        let (proxy, _pair, request) = through_a_proxy(look);
        proxy.stall();
        let wait = |request: &Request| match request.wait_part(0, FOR_EVER) {
            Ok(()) => request.wait(WAIT),
            Err(error) => Err(error),
        };
        cancel_under_who_waits(&request, wait);
    }
}

/// More than may be asked for is refused.
#[test]
fn a_look_that_is_too_long_is_refused() {
    let look = LOOK_MAX + Duration::from_millis(1);
    let refused = Agent::builder("agent").look(look).build().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
}

/// The target waits for a notification that never comes before all of its memory was read and written by another.
#[test]
fn who_waits_serves_the_others() {
    for way in [Way::Tcp, Way::Shm] {
        let pair = Pair::new(way, 1 << 20);
        let data = pattern(1 << 20, 7);
        pair.remote.write_at(0, &data).unwrap();
        let own = pair.target.clone();
        let waiter = thread::spawn(move || own.wait_notifications(FOR_EVER).len());
        for _ in 0..TIMES {
            let read = pair.moves(
                Operation::Read,
                &[(0, 0, 1 << 20)],
                RequestOptions::default(),
            );
            read.wait(WAIT).unwrap();
        }
        assert!(contents(&pair.local) == data);
        pair.initiator
            .notify(&pair.peer, b"over"[..].into())
            .unwrap()
            .wait(WAIT)
            .unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
    }
}

/// More threads wait than can lead, each for its own request, and one for notifications that two others send.
#[test]
fn many_who_wait_at_once_are_all_woken() {
    const THREADS: usize = 6;
    let looks = [Way::Tcp, Way::Shm].map(|way| LOOKS.map(|look| (way, look)));
    for (way, look) in looks.into_iter().flatten() {
        let build = |name| way.builder(name).look(look).build().unwrap();
        let pair = Pair::of(build("initiator"), build("target"), 4096, OPEN);
        let back = pair.target.load_peer(&pair.initiator.metadata()).unwrap();
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..TIMES {
                        let read =
                            pair.moves(Operation::Read, &[(0, 0, 8)], RequestOptions::default());
                        read.wait(WAIT).unwrap();
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..TIMES {
                    let sent = pair.target.notify(&back, b"one"[..].into()).unwrap();
                    sent.wait(WAIT).unwrap();
                }
            });
            let mut count = 0;
            while count < TIMES {
                let came = pair.initiator.wait_notifications(WAIT).len();
                assert!(came > 0, "after {count} notifications");
                count += came;
            }
        });
    }
}

/// The ways on which a process copies by itself.
const COPYING: [Way; 3] = [Way::Memcpy, Way::Shm, Way::Cma];

/// Keeps on which thread it was woken.
#[derive(Default)]
struct Where(Mutex<Option<ThreadId>>);

impl Wake for Where {
    fn wake(self: Arc<Self>) {
        *self.0.lock().unwrap() = Some(thread::current().id());
    }
}

/// Waits for copies that are too large for a post, until one of them was settled by the waiting thread.
#[test]
fn who_waits_for_a_copy_makes_it() {
    for way in COPYING {
        let pair = Pair::new(way, 2 << 20);
        let until = Instant::now() + WAIT;
        loop {
            let copy = pair.moves(
                Operation::Write,
                &[(0, 0, 2 << 20)],
                RequestOptions::default(),
            );
            let woken = Arc::new(Where::default());
            let waker = Waker::from(woken.clone());
            let mut completion = pin!(copy.completion());
            let is_over = completion.as_mut().poll(&mut Context::from_waker(&waker));
            copy.wait(WAIT).unwrap();
            if is_over.is_pending() && *woken.0.lock().unwrap() == Some(thread::current().id()) {
                break;
            }
            assert!(Instant::now() < until, "{way:?}: others copied each time");
        }
    }
}

/// Several wait for next to no time, again and again, so that each leaves copies to others half-way.
#[test]
fn a_copy_that_many_begin_is_whole() {
    const BYTES: u64 = 24 << 20;
    const THREADS: u64 = 3;
    for way in COPYING {
        let pair = Pair::new(way, THREADS * BYTES);
        let data = pattern((THREADS * BYTES) as usize, 3);
        pair.remote.write_at(0, &data).unwrap();
        thread::scope(|scope| {
            for number in 0..THREADS {
                let (pair, at) = (&pair, number * BYTES);
                scope.spawn(move || {
                    let places = [(at, at, BYTES)];
                    let read = pair.moves(Operation::Read, &places, RequestOptions::default());
                    let until = Instant::now() + WAIT;
                    while let Err(error) = read.wait(Duration::from_micros(1)) {
                        assert_eq!(error.kind(), ErrorKind::Timeout);
                        assert!(Instant::now() < until, "{way:?}: {error}");
                    }
                });
            }
        });
        assert!(contents(&pair.local) == data, "{way:?}");
    }
}
