//! Requests that fail at completion and go another way: where that is safe, and where it is not.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{MemoryFate, Operation, RequestOptions};

use support::proxy::{self, Proxy};
use support::{Pair, WAIT, contents, pattern};

const BYTES: u64 = 8 << 20;

/// A pair whose TCP traffic goes through a proxy.
fn proxied() -> (Pair, Proxy) {
    let (pair, proxy) = proxy::proxied(BYTES);
    let data = pattern(BYTES as usize, 77);
    pair.remote.write_at(0, &data).unwrap();
    assert!(pair.initiator.path_to(&pair.peer).backend.is_some());
    (pair, proxy)
}

/// The connection breaks in the middle of a read: it is read again over a new one, and says so.
#[test]
fn a_read_goes_on_when_its_connection_breaks() {
    let (pair, proxy) = proxied();
    proxy.cut_after(BYTES / 2);
    let read = pair.moves(Operation::Read, &[(0, 0, BYTES)], RequestOptions::default());
    let done = read.wait(WAIT).unwrap();
    assert_eq!((done.backend, done.failovers), ("tcp", 1));
    assert_eq!(pair.initiator.stats().failovers, 1);
    assert!(contents(&pair.local) == pattern(BYTES as usize, 77));
    read.post().unwrap();
    assert_eq!(read.wait(WAIT).unwrap().failovers, 0);
}

/// In parts, only what was not in place is read again.
#[test]
fn parts_that_are_in_place_are_not_read_again() {
    let (pair, proxy) = proxied();
    let places: Vec<_> = (0..8).map(|n| (n << 20, n << 20, 1 << 20)).collect();
    let before = proxy.passed();
    proxy.cut_after(BYTES / 2);
    let options = RequestOptions {
        parts: vec![1; 8],
        ..RequestOptions::default()
    };
    let read = pair.moves(Operation::Read, &places, options);
    let done = read.wait(WAIT).unwrap();
    assert!(done.failovers > 0 && done.failovers < 8, "{done:?}");
    assert!(contents(&pair.local) == pattern(BYTES as usize, 77));
    let passed = proxy.passed() - before;
    assert!(passed < BYTES + BYTES / 2, "{passed} bytes for {BYTES}");
}

/// What was sent of a write over TCP may still land after the connection is gone, so it is not sent another way.
#[test]
fn a_write_over_tcp_is_not_repeated() {
    let (pair, proxy) = proxied();
    proxy.cut_after(BYTES / 2);
    let write = pair.moves(
        Operation::Write,
        &[(0, 0, BYTES)],
        RequestOptions::default(),
    );
    let failed = write.wait(WAIT).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::PeerLost, MemoryFate::Settled)
    );
    assert_eq!(pair.initiator.stats().failovers, 0);
    write.post().unwrap();
    write.wait(WAIT).unwrap();
}

/// A notification that may have arrived is not sent twice, whatever becomes of the read before it.
#[test]
fn a_notification_that_was_sent_is_not_repeated() {
    let (pair, proxy) = proxied();
    // The data passes, and the notification: its answer does not.
    proxy.cut_after(BYTES + (32 << 10));
    let options = RequestOptions {
        notification: Some(Bytes::from(vec![7; 60_000])),
        ..RequestOptions::default()
    };
    let read = pair.moves(Operation::Read, &[(0, 0, BYTES)], options);
    assert_eq!(read.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
    assert_eq!(pair.initiator.stats().failovers, 0);
}

/// Nobody is reached any more: the error says what failed first and what was tried then, and the memory is settled.
#[test]
fn a_peer_that_is_gone_for_good_fails_with_both_reasons() {
    let (pair, proxy) = proxied();
    proxy.stall();
    let read = pair.moves(Operation::Read, &[(0, 0, BYTES)], RequestOptions::default());
    drop((pair.target, pair.remote));
    proxy.refuse();
    let failed = read.wait(WAIT).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::PeerLost, MemoryFate::Settled)
    );
    let text = failed.to_string();
    assert!(
        text.contains("over tcp:") && text.contains("then:"),
        "{text}"
    );
}

/// Requests to a peer that is forgotten meanwhile fail: that is what was asked for.
#[test]
fn a_forgotten_peer_is_not_met_again_by_itself() {
    let (pair, proxy) = proxied();
    proxy.stall();
    let read = pair.moves(Operation::Read, &[(0, 0, BYTES)], RequestOptions::default());
    pair.initiator.forget_peer(&pair.peer);
    // A new connection would be served.
    proxy.resume();
    assert_eq!(read.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
    assert_eq!(pair.initiator.stats().failovers, 0);
}
