//! File descriptors that tell of completions and notifications, and what posts are said to have taken.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{Operation, Request, RequestOptions, Side, Status, Strided};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use support::proxy::proxied;
use support::{Pair, WAIT, WAYS, Way};

/// Whether it is readable within `patience`.
fn readable(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("{error}"),
            Ok(count) => return count == 1,
        }
    }
}

fn readable_now(fd: BorrowedFd<'_>) -> bool {
    readable(fd, Duration::ZERO)
}

fn whole(pair: &Pair, operation: Operation) -> Request {
    let options = RequestOptions::default();
    pair.moves(operation, &[(0, 0, pair.local.bytes())], options)
}

/// Held back, done, posted again and held back, cancelled, posted again and cut off.
#[test]
fn a_request_s_descriptor_is_readable_exactly_while_its_post_is_decided() {
    let (pair, proxy) = proxied(1 << 20);
    let request = whole(&pair, Operation::Read);
    let number = request.event_fd().unwrap().as_raw_fd();
    let fd = request.event_fd().unwrap();
    assert!(readable(fd, WAIT));
    assert!(matches!(request.poll(), Status::Done(_)));
    assert!(readable_now(fd), "looking takes nothing away");

    proxy.stall();
    request.post().unwrap();
    assert!(!readable_now(fd), "posted again");
    proxy.resume();
    assert!(readable(fd, WAIT));
    request.wait(WAIT).unwrap();

    proxy.stall();
    request.post().unwrap();
    assert!(!readable_now(fd));
    request.cancel();
    assert!(readable_now(fd), "cancelled");
    proxy.resume();
    assert!(request.wait_drained(WAIT));
    assert!(readable_now(fd), "settled after it was cancelled");

    proxy.stall();
    request.post().unwrap();
    assert!(!readable_now(fd));
    proxy.cut();
    assert!(readable(fd, WAIT));
    assert_eq!(request.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
    assert_eq!(request.event_fd().unwrap().as_raw_fd(), number);
}

/// The descriptor is asked for only after the end, or before there is anything.
#[test]
fn a_descriptor_made_late_tells_of_what_was_decided_before() {
    let pair = Pair::new(Way::Memcpy, 4096);
    let done = whole(&pair, Operation::Read);
    done.wait(WAIT).unwrap();
    assert!(readable_now(done.event_fd().unwrap()));
    let list = |region: &kvfabric_transfer::Region, side| {
        let range = [region.descriptor(0, 64)];
        pair.initiator.prepare(side, &range).unwrap()
    };
    let own = list(&pair.local, Side::Local);
    let other = list(&pair.remote, Side::Peer(&pair.peer));
    let idle = pair
        .initiator
        .request(Operation::Read, &own, &other, RequestOptions::default())
        .unwrap();
    assert!(!readable_now(idle.event_fd().unwrap()));
}

/// Refused before and after it reached the backend: the descriptor says what the status says.
#[test]
fn a_refused_post_leaves_descriptor_and_status_alike() {
    let pair = Pair::new(Way::Memcpy, 4096);
    let request = whole(&pair, Operation::Read);
    request.wait(WAIT).unwrap();
    let fd = request.event_fd().unwrap();
    pair.remote.deregister().wait(WAIT).unwrap();
    assert_eq!(request.post().unwrap_err().kind(), ErrorKind::Denied);
    assert!(matches!(request.poll(), Status::Idle));
    assert!(!readable_now(fd));

    let pair = Pair::new(Way::Memcpy, 4096);
    let request = whole(&pair, Operation::Read);
    request.wait(WAIT).unwrap();
    let fd = request.event_fd().unwrap();
    pair.local.deregister().wait(WAIT).unwrap();
    assert_eq!(request.post().unwrap_err().kind(), ErrorKind::NotFound);
    assert!(matches!(request.poll(), Status::Done(_)));
    assert!(readable_now(fd));
}

/// Many threads post small and large requests and sleep on nothing but their descriptors, over each way. A wake-up that
/// is lost shows as a descriptor that never becomes readable.
#[test]
fn no_completion_is_lost_when_many_threads_post() {
    const THREADS: u64 = 8;
    const ROUNDS: u64 = 60;
    const LEN: u64 = 400 << 10;
    for way in WAYS {
        let pair = Pair::new(way, THREADS * LEN);
        thread::scope(|scope| {
            for number in 0..THREADS {
                let pair = &pair;
                scope.spawn(move || {
                    let at = number * LEN;
                    let make = |len| {
                        let pairs = [(
                            pair.local.descriptor(at, len),
                            pair.remote.descriptor(at, len),
                        )];
                        let side = Side::Peer(&pair.peer);
                        let options = RequestOptions::default();
                        pair.initiator
                            .transfer(Operation::Write, &pairs, side, options)
                            .unwrap()
                    };
                    // One is done within the post, the other on another thread.
                    let (small, large) = (make(64), make(LEN));
                    for round in 0..ROUNDS {
                        for request in [&small, &large] {
                            let fd = request.event_fd().unwrap();
                            assert!(readable(fd, WAIT), "{way:?} round {round}");
                            assert!(matches!(request.poll(), Status::Done(_)), "{way:?}");
                            assert!(request.wait_drained(WAIT));
                            request.post().unwrap();
                        }
                    }
                    for request in [&small, &large] {
                        request.wait(WAIT).unwrap();
                    }
                });
            }
        });
    }
}

/// One thread posts while another asks for the descriptor for the first time: whichever comes first, it is told.
#[test]
fn a_descriptor_made_while_the_request_ends_is_not_too_late() {
    let pair = Arc::new(Pair::new(Way::Shm, 600 << 10));
    for round in 0..300 {
        let request = Arc::new(whole(&pair, Operation::Read));
        let waiter = {
            let request = request.clone();
            thread::spawn(move || readable(request.event_fd().unwrap(), WAIT))
        };
        assert!(waiter.join().unwrap(), "round {round}");
        request.wait(WAIT).unwrap();
    }
}

/// Nothing waits, one waits, several wait, all are taken, another comes; also when it is asked for late.
#[test]
fn the_notification_descriptor_is_readable_while_a_notification_waits() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let send = |text: &'static [u8]| {
            let sent = pair.initiator.notify(&pair.peer, Bytes::from_static(text));
            sent.unwrap().wait(WAIT).unwrap();
        };
        send(b"before");
        let fd = pair.target.notification_fd().unwrap();
        assert!(readable_now(fd), "{way:?}");
        assert_eq!(pair.target.notifications().len(), 1);
        assert!(!readable_now(fd), "{way:?}");
        send(b"one");
        send(b"two");
        assert!(readable_now(fd), "{way:?}");
        assert_eq!(pair.target.notifications().len(), 2);
        assert!(!readable_now(fd), "{way:?}");
        send(b"three");
        assert!(readable_now(fd), "{way:?}");
        let again = pair.target.notification_fd().unwrap();
        assert_eq!(fd.as_raw_fd(), again.as_raw_fd());
    }
}

/// Several threads send; the one that takes sleeps on the descriptor alone.
#[test]
fn no_notification_is_lost_when_many_threads_send() {
    const THREADS: usize = 4;
    const EACH: usize = 200;
    let pair = Pair::new(Way::Shm, 4096);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    let sent = pair.initiator.notify(&pair.peer, Bytes::from_static(b"x"));
                    sent.unwrap().wait(WAIT).unwrap();
                }
            });
        }
        let fd = pair.target.notification_fd().unwrap();
        let mut taken = 0;
        while taken < THREADS * EACH {
            assert!(readable(fd, WAIT), "{taken} were taken");
            taken += pair.target.notifications().len();
        }
        assert_eq!(taken, THREADS * EACH);
    });
}

/// Bytes, pairs and the way are those of the request; a post that fails changes nothing; the next one is later.
#[test]
fn telemetry_tells_of_the_last_post_that_was_done() {
    for way in WAYS {
        let pair = Pair::new(way, 64 << 10);
        let entry = |region: &kvfabric_transfer::Region| Strided {
            region: region.id(),
            offset: 0,
            len: 1000,
            stride: 2000,
            count: 30,
        };
        let own = pair
            .initiator
            .prepare_strided(Side::Local, &[entry(&pair.local)])
            .unwrap();
        let other = pair
            .initiator
            .prepare_strided(Side::Peer(&pair.peer), &[entry(&pair.remote)])
            .unwrap();
        let request = pair
            .initiator
            .request(Operation::Write, &own, &other, RequestOptions::default())
            .unwrap();
        assert_eq!(request.telemetry(), None);
        request.post().unwrap();
        let done = request.wait(WAIT).unwrap();
        assert!(request.wait_drained(WAIT));
        let first = request.telemetry().unwrap();
        assert_eq!((first.bytes, first.descriptors), (30_000, 30));
        assert_eq!((first.path, first.transfer), (way.name(), done.elapsed));
        request.post().unwrap();
        request.wait(WAIT).unwrap();
        let second = request.telemetry().unwrap();
        assert!(second.posted > first.posted + first.transfer, "{way:?}");
        pair.initiator.forget_peer(&pair.peer);
        pair.remote.deregister().wait(WAIT).unwrap();
        if request.post().is_ok() {
            assert!(request.wait(WAIT).is_err());
        }
        assert_eq!(request.telemetry(), Some(second), "{way:?}");
    }
}
