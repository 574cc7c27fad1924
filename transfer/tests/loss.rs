//! TCP connections that stall or break, through a proxy.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::thread;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{MemoryFate, Operation, Request, RequestOptions, Status};

use support::proxy::proxied;
use support::{Pair, WAIT, Way, contents, pattern};

fn deadline(deadline: Duration) -> RequestOptions {
    RequestOptions {
        deadline: Some(deadline),
        ..RequestOptions::default()
    }
}

fn kind(request: &Request) -> ErrorKind {
    request.wait(WAIT).unwrap_err().kind()
}

/// The cut is moved through the whole exchange, so that it falls into greetings, heads, payload and answers. Whatever
/// the moment, every request ends, its memory is settled, and what says that it is done has its bytes in place.
#[test]
fn every_request_settles_wherever_the_connection_breaks() {
    const LEN: u64 = 256 << 10;
    for step in 0..24 {
        let (pair, proxy) = proxied(8 * LEN);
        let data = pattern((8 * LEN) as usize, step + 1);
        pair.remote.write_at(0, &data).unwrap();
        // Connects before the cut is armed.
        assert_eq!(pair.initiator.path_to(&pair.peer).backend, Some("tcp"));
        proxy.cut_after(step * step * 4096 + 1);
        let requests: Vec<_> = (0..8)
            .filter_map(|n| {
                let pairs = [(
                    pair.local.descriptor(n * LEN, LEN),
                    pair.remote.descriptor(n * LEN, LEN),
                )];
                let side = kvfabric_transfer::Side::Peer(&pair.peer);
                let options = RequestOptions::default();
                let posted = pair
                    .initiator
                    .transfer(Operation::Read, &pairs, side, options);
                posted.ok().map(|request| (n, request))
            })
            .collect();
        let found = |n: u64| {
            let mut bytes = vec![0; LEN as usize];
            pair.local.read_at(n * LEN, &mut bytes).unwrap();
            bytes
        };
        for (n, request) in &requests {
            match request.wait(WAIT) {
                // Read again over a new connection, if it was not done before.
                Ok(_) => assert!(found(*n) == data[(n * LEN) as usize..][..LEN as usize]),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::PeerLost, "step {step} request {n}");
                    assert_eq!(error.fate(), MemoryFate::Settled);
                }
            }
        }
        // Nothing holds the memory.
        pair.local.deregister().wait(WAIT).unwrap();
        pair.remote.deregister().wait(WAIT).unwrap();
    }
}

/// After a break the same request is posted again and goes over a new connection.
#[test]
fn a_request_is_posted_again_after_a_loss() {
    let (pair, proxy) = proxied(1 << 20);
    let request = pair.moves(
        Operation::Read,
        &[(0, 0, 1 << 20)],
        RequestOptions::default(),
    );
    request.wait(WAIT).unwrap();
    proxy.stall();
    request.post().unwrap();
    proxy.cut();
    assert_eq!(kind(&request), ErrorKind::PeerLost);
    proxy.resume();
    request.post().unwrap();
    assert_eq!(request.wait(WAIT).unwrap().bytes, 1 << 20);
}

/// A read whose deadline passes is settled at once: what arrives later goes nowhere.
#[test]
fn a_late_read_touches_no_memory() {
    let (pair, proxy) = proxied(1 << 20);
    pair.remote.fill_at(0, 1 << 20, 0xee).unwrap();
    let warm = pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default());
    warm.wait(WAIT).unwrap();
    pair.local.fill_at(0, 1 << 20, 0).unwrap();
    proxy.stall();
    let late = pair.moves(
        Operation::Read,
        &[(0, 0, 1 << 20)],
        deadline(Duration::from_millis(50)),
    );
    assert_eq!(kind(&late), ErrorKind::Timeout);
    assert!(late.wait_drained(WAIT));
    let Status::Failed(failed) = late.poll() else {
        panic!("{:?}", late.poll())
    };
    assert_eq!(failed.fate(), MemoryFate::Settled);
    pair.local.deregister().wait(WAIT).unwrap();
    proxy.resume();
    // The connection is still good: what was late is dropped, what comes after is served.
    let own = pair.initiator.register(
        kvfabric_transfer::HostMemory::anonymous(64).unwrap(),
        kvfabric_transfer::RegionOptions::default(),
    );
    let own = own.unwrap();
    let pairs = [(own.descriptor(0, 64), pair.remote.descriptor(0, 64))];
    let side = kvfabric_transfer::Side::Peer(&pair.peer);
    let next = pair
        .initiator
        .transfer(Operation::Read, &pairs, side, RequestOptions::default())
        .unwrap();
    next.wait(WAIT).unwrap();
    assert!(contents(&own).iter().all(|&byte| byte == 0xee));
}

/// As before, with the socket full of a write that nobody takes: the read is settled although nothing can be sent.
#[test]
fn a_late_read_is_settled_while_the_socket_is_full() {
    const BYTES: u64 = 64 << 20;
    let (pair, proxy) = proxied(BYTES);
    let warm = pair.moves(Operation::Write, &[(0, 0, 64)], RequestOptions::default());
    warm.wait(WAIT).unwrap();
    proxy.stall();
    let options = RequestOptions::default();
    let write = pair.moves(Operation::Write, &[(0, 0, BYTES)], options);
    let late = pair.moves(
        Operation::Read,
        &[(0, 0, 1 << 20)],
        deadline(Duration::from_millis(50)),
    );
    assert_eq!(kind(&late), ErrorKind::Timeout);
    assert!(late.wait_drained(WAIT));
    // It was not the end of the connection that settled it.
    assert!(matches!(write.poll(), Status::InFlight));
    proxy.resume();
    write.wait(WAIT).unwrap();
}

/// A write whose deadline passes may still land, so its memory stays in flight until the connection is gone.
#[test]
fn a_late_write_keeps_its_memory() {
    let (pair, proxy) = proxied(8 << 20);
    let warm = pair.moves(Operation::Write, &[(0, 0, 64)], RequestOptions::default());
    warm.wait(WAIT).unwrap();
    proxy.stall();
    let late = pair.moves(
        Operation::Write,
        &[(0, 0, 8 << 20)],
        deadline(Duration::from_millis(50)),
    );
    let error = late.wait(WAIT).unwrap_err();
    assert_eq!(
        (error.kind(), error.fate()),
        (ErrorKind::Timeout, MemoryFate::InFlight)
    );
    assert_eq!(late.post().unwrap_err().kind(), ErrorKind::Busy);
    let freed = pair.local.deregister();
    assert_eq!(
        freed.wait(Duration::from_millis(20)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    proxy.cut();
    freed.wait(WAIT).unwrap();
    assert!(late.wait_drained(WAIT));
}

/// A request in flight is cancelled, and another one dropped: the first says so, both keep their memory until the
/// connection is gone.
#[test]
fn a_cancelled_or_dropped_request_keeps_its_memory() {
    let (pair, proxy) = proxied(4 << 20);
    let warm = pair.moves(Operation::Write, &[(0, 0, 64)], RequestOptions::default());
    warm.wait(WAIT).unwrap();
    proxy.stall();
    let cancelled = pair.moves(
        Operation::Write,
        &[(0, 0, 4 << 20)],
        RequestOptions::default(),
    );
    let dropped = pair.moves(
        Operation::Write,
        &[(0, 0, 4 << 20)],
        RequestOptions::default(),
    );
    drop(dropped);
    cancelled.cancel();
    assert_eq!(kind(&cancelled), ErrorKind::Cancelled);
    let freed = pair.local.deregister();
    assert_eq!(
        freed.wait(Duration::from_millis(20)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    proxy.cut();
    freed.wait(WAIT).unwrap();
}

/// Forgetting a peer ends what is in flight to it.
#[test]
fn forgetting_a_peer_fails_its_requests() {
    let (pair, proxy) = proxied(1 << 20);
    let warm = pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default());
    warm.wait(WAIT).unwrap();
    proxy.stall();
    let request = pair.moves(
        Operation::Read,
        &[(0, 0, 1 << 20)],
        RequestOptions::default(),
    );
    pair.initiator.forget_peer(&pair.peer);
    assert_eq!(kind(&request), ErrorKind::PeerLost);
}

/// Whatever is on its way in either direction then: an answer that finds nobody, and a revocation that nobody reads, do not
/// stand before the word that memory was let go of.
#[test]
fn memory_is_given_back_whatever_is_under_way_when_its_user_forgets_it() {
    for way in [Way::Shm, Way::Cma] {
        for round in 0..100 {
            let pair = Pair::new(way, 4096);
            let moved = pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default());
            moved.wait(WAIT).unwrap();
            let _unanswered = pair
                .initiator
                .notify(&pair.peer, Bytes::from_static(b"last"));
            let given_back = thread::scope(|scope| {
                // Now before, now after the peer is forgotten.
                let deregistering = scope.spawn(|| pair.remote.deregister());
                pair.initiator.forget_peer(&pair.peer);
                deregistering.join().unwrap()
            });
            given_back
                .wait(WAIT)
                .unwrap_or_else(|error| panic!("{way:?}, round {round}: {error}"));
        }
    }
}

/// The agent goes while its requests are in flight and handles to them remain: they end, nothing hangs.
#[test]
fn a_target_that_closes_fails_the_requests_to_it() {
    let (pair, proxy) = proxied(1 << 20);
    let Pair {
        initiator,
        target,
        local,
        remote,
        peer,
    } = pair;
    let pairs = [(local.descriptor(0, 1 << 20), remote.descriptor(0, 1 << 20))];
    let side = kvfabric_transfer::Side::Peer(&peer);
    let options = RequestOptions::default;
    initiator
        .transfer(Operation::Read, &pairs, side, options())
        .unwrap()
        .wait(WAIT)
        .unwrap();
    proxy.stall();
    let request = initiator
        .transfer(Operation::Read, &pairs, side, options())
        .unwrap();
    drop((target, remote));
    proxy.resume();
    match request.wait(WAIT) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::PeerLost),
    }
    let again = initiator.transfer(Operation::Read, &pairs, side, options());
    let kind = again.map_or_else(|error| error.kind(), |again| kind(&again));
    assert_eq!(kind, ErrorKind::PeerLost);
}
