//! More requests than a way can take at once: they wait for their turn, and none is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Operation, Priority, Request, RequestOptions, Side, Status};

use support::proxy::proxied;
use support::{Pair, WAIT, Way, contents, pattern};

/// More than any queue of the fabric once held.
const MANY: usize = 20_000;

/// Longer than any test may take.
const FAR: Duration = Duration::from_secs(3600);

/// How a request of this file is done unless it says otherwise.
fn patient() -> RequestOptions {
    RequestOptions {
        deadline: Some(FAR),
        ..RequestOptions::default()
    }
}

/// Whoever wakes it is held until the test lets go.
struct Holds(Mutex<(Sender<()>, Receiver<()>)>);

impl Wake for Holds {
    fn wake(self: Arc<Self>) {
        let (came, gone) = &*self.0.lock().unwrap();
        // Nobody waits for it in a test that has failed.
        let _ = came.send(());
        let _ = gone.recv();
    }
}

/// The test's end of it; dropped, it lets go.
struct Held {
    came: Receiver<()>,
    _go: Sender<()>,
}

impl Held {
    fn wait(&self) {
        self.came.recv_timeout(WAIT).unwrap();
    }
}

/// Holds the thread that resolves a future; none if it is resolved.
fn hold<F: Future + Unpin>(future: &mut F) -> Option<Held> {
    let ((says, came), (_go, gone)) = (channel(), channel());
    let waker = Waker::from(Arc::new(Holds(Mutex::new((says, gone)))));
    let polled = std::pin::Pin::new(future).poll(&mut Context::from_waker(&waker));
    polled.is_pending().then_some(Held { came, _go })
}

fn finish(requests: &[Request]) {
    for (number, request) in requests.iter().enumerate() {
        let done = request.wait(WAIT);
        assert!(done.is_ok(), "request {number}: {done:?}");
    }
}

/// The connection is stalled: reads far beyond its window are taken, those that are given up or late end while it is, and the
/// others are done when it goes on.
#[test]
fn reads_beyond_what_a_connection_takes_wait_for_their_turn() {
    let (pair, proxy) = proxied(4096);
    let data = pattern(4096, 3);
    pair.remote.write_at(0, &data).unwrap();
    pair.moves(Operation::Read, &[(0, 0, 8)], patient())
        .wait(WAIT)
        .unwrap();
    proxy.stall();
    let read = |number: usize| {
        let at = (number as u64 * 8) % 4096;
        pair.moves(Operation::Read, &[(at, at, 8)], patient())
    };
    let mut requests: Vec<Request> = (0..MANY).map(read).collect();
    let options = RequestOptions {
        deadline: Some(Duration::from_millis(1)),
        ..patient()
    };
    let late = pair.moves(Operation::Read, &[(0, 0, 8)], options);
    assert_eq!(late.wait(WAIT).unwrap_err().kind(), ErrorKind::Timeout);
    assert!(late.wait_drained(WAIT));
    for request in requests.split_off(MANY - 100) {
        request.cancel();
        assert!(request.wait_drained(WAIT));
    }
    proxy.resume();
    finish(&requests);
    assert!(contents(&pair.local) == data);
}

/// A stalled connection ends: what waits beyond its window ends with it.
#[test]
fn reads_that_wait_for_their_turn_end_with_the_connection() {
    let (pair, proxy) = proxied(4096);
    let first = pair.moves(Operation::Read, &[(0, 0, 8)], patient());
    first.wait(WAIT).unwrap();
    proxy.stall();
    let read = |_| pair.moves(Operation::Read, &[(0, 0, 8)], patient());
    let requests: Vec<Request> = (0..MANY).map(read).collect();
    pair.initiator.forget_peer(&pair.peer);
    for request in &requests {
        let lost = request.wait(WAIT).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::PeerLost);
    }
}

/// The target's reactor is held while it takes the first notification: those far beyond what may be unanswered are taken,
/// those that are given up end at once, and the others arrive in the order in which they were posted.
#[test]
fn notifications_beyond_what_a_path_takes_wait_for_their_turn() {
    const NOTIFICATIONS: u32 = 14_000;
    let pair = Pair::new(Way::Shm, 4096);
    let notify = |number: u32| {
        let bytes = number.to_le_bytes().to_vec();
        pair.initiator.notify(&pair.peer, bytes.into()).unwrap()
    };
    notify(0).wait(WAIT).unwrap();
    assert_eq!(pair.target.notifications().len(), 1);
    let mut notified = pair.target.notified();
    let held = hold(&mut notified).unwrap();
    let mut requests = vec![notify(1)];
    held.wait();
    requests.extend((2..NOTIFICATIONS).map(notify));
    for request in requests.split_off(requests.len() - 100) {
        request.cancel();
        assert!(request.wait_drained(WAIT));
    }
    drop(held);
    finish(&requests);
    let came: Vec<u32> = pair
        .target
        .notifications()
        .iter()
        .map(|one| u32::from_le_bytes(one.bytes[..].try_into().unwrap()))
        .collect();
    assert_eq!(came, (1..NOTIFICATIONS - 100).collect::<Vec<u32>>());
}

/// The path ends while its notifications wait: all of them do.
#[test]
fn notifications_that_wait_for_their_turn_end_with_the_path() {
    let pair = Pair::new(Way::Shm, 4096);
    let notify = |_| {
        pair.initiator
            .notify(&pair.peer, b"one"[..].into())
            .unwrap()
    };
    notify(0).wait(WAIT).unwrap();
    assert_eq!(pair.target.notifications().len(), 1);
    let mut notified = pair.target.notified();
    let held = hold(&mut notified).unwrap();
    let first = notify(1);
    held.wait();
    let requests: Vec<Request> = (0..10_000).map(notify).collect();
    pair.initiator.forget_peer(&pair.peer);
    for request in requests.iter().chain([&first]) {
        let lost = request.wait(WAIT).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::PeerLost);
    }
}

/// The copying thread is held: copies far beyond what its queue once held are taken, and done when it goes on.
#[test]
fn copies_beyond_what_a_thread_takes_wait_for_their_turn() {
    const BYTES: u64 = 300 << 10;
    let pair = Pair::new(Way::Shm, BYTES);
    let list = [pair.local.descriptor(0, BYTES)];
    let own = pair.initiator.prepare(Side::Local, &list).unwrap();
    let list = [pair.remote.descriptor(0, BYTES)];
    let other = pair
        .initiator
        .prepare(Side::Peer(&pair.peer), &list)
        .unwrap();
    let request = |_| {
        let options = patient();
        pair.initiator
            .request(Operation::Write, &own, &other, options)
            .unwrap()
    };
    let requests: Vec<Request> = (0..MANY).map(request).collect();
    let first = pair.moves(Operation::Write, &[(0, 0, BYTES)], patient());
    first.wait(WAIT).unwrap();
    let held = loop {
        first.post().unwrap();
        // It may be over before anybody looks.
        if let Some(held) = hold(&mut first.completion()) {
            break held;
        }
        first.wait(WAIT).unwrap();
    };
    held.wait();
    for request in &requests {
        request.post().unwrap();
    }
    drop(held);
    finish(&requests);
}

/// A rate that lets nothing through in a lifetime: all requests wait for it, and can be given up.
#[test]
fn requests_beyond_what_a_rate_lets_through_wait_for_their_turn() {
    let pair = Pair::new(Way::Shm, 1 << 20);
    pair.initiator.set_rate(Priority::Normal, Some(1)).unwrap();
    let options = || RequestOptions {
        deadline: Some(24 * FAR),
        ..RequestOptions::default()
    };
    let large = pair.moves(Operation::Read, &[(0, 0, 1 << 20)], options());
    large.wait(WAIT).unwrap();
    let read = |_| pair.moves(Operation::Read, &[(0, 0, 4096)], options());
    let requests: Vec<Request> = (0..MANY).map(read).collect();
    for request in &requests {
        assert!(matches!(request.poll(), Status::InFlight));
    }
    for request in &requests {
        request.cancel();
        assert!(request.wait_drained(WAIT));
    }
}
