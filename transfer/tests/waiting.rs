//! Those who wait read the sockets themselves: nobody else's work may suffer from it, and what comes another way is not missed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, Operation, RequestOptions};

use support::proxy::Proxy;
use support::{OPEN, Pair, WAIT, Way, contents, loopback, pattern};

/// Longer than any test may take: a wait that is not ended by what it waits for is found by [`WAIT`].
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// How often what only sometimes meets a waiter is tried.
const TIMES: usize = 200;

/// One waits over sockets while what it waits for comes from another thread of the process, without any socket.
#[test]
fn a_notification_that_comes_by_no_socket_wakes_who_waits() {
    let build = |name| Agent::builder(name).tcp(Some(loopback())).build().unwrap();
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

/// The connection is stalled, so that the one who waits does so at the socket until another thread cancels.
#[test]
fn a_cancelled_request_wakes_who_waits_at_its_socket() {
    let proxy = Proxy::new();
    let target = Agent::builder("target")
        .memcpy(false)
        .shm(false)
        .tcp(Some(loopback()))
        .tcp_advertise(Some(proxy.address()))
        .build()
        .unwrap();
    proxy.run(target.tcp_address().unwrap());
    let pair = Pair::of(Way::Tcp.agent("initiator"), target, 4096, OPEN);
    let request = pair.moves(Operation::Read, &[(0, 0, 4096)], RequestOptions::default());
    request.wait(WAIT).unwrap();
    proxy.stall();
    for _ in 0..TIMES {
        request.post().unwrap();
        let (ended, ends) = mpsc::channel();
        thread::scope(|scope| {
            let (request, started) = (&request, mpsc::channel());
            scope.spawn(move || {
                started.0.send(()).unwrap();
                ended.send(request.wait(FOR_EVER)).unwrap();
            });
            started.1.recv().unwrap();
            request.cancel();
            let outcome = ends.recv_timeout(WAIT).expect("the waiter is woken");
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Cancelled);
        });
        assert!(request.wait_drained(WAIT));
    }
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
    for way in [Way::Tcp, Way::Shm] {
        let pair = Pair::new(way, 4096);
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
