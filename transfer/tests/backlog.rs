//! More requests than a way can take at once: they wait for their turn, and none is refused.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it skips"
)]

mod support;

use std::net::TcpListener;
use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, FileEngineMode, FileOptions, HostMemory, ObjectOptions, Operation, Priority,
    RegionOptions, Request, RequestOptions, Side, Status,
};

use support::hold::{Held, hold};
use support::proxy::proxied;
use support::{Pair, WAIT, Way, contents, loopback, pattern};

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

/// Makes requests until the thread that ends one of them is held.
fn hold_the_end(request: impl Fn() -> Request) -> (Request, Held) {
    loop {
        let request = request();
        // It may be over before anybody looks.
        if let Some(held) = hold(&mut request.completion()) {
            held.wait();
            return (request, held);
        }
        request.wait(WAIT).unwrap();
    }
}

/// Requests far beyond what a queue once held are taken though nobody goes on with them; one is late, and all but a thousand
/// are given up. Their memory is settled when somebody does.
fn wait_for_their_turn(held: Vec<(Request, Held)>, make: impl Fn(RequestOptions) -> Request) {
    let mut requests: Vec<Request> = (0..MANY).map(|_| make(patient())).collect();
    let late = make(RequestOptions {
        deadline: Some(Duration::from_millis(1)),
        ..patient()
    });
    assert_eq!(late.wait(WAIT).unwrap_err().kind(), ErrorKind::Timeout);
    let given_up = requests.split_off(1000);
    for request in &given_up {
        request.cancel();
        let cancelled = request.wait(WAIT).unwrap_err();
        assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    }
    drop(held);
    finish(&requests);
    for request in given_up.iter().chain([&late]) {
        assert!(request.wait_drained(WAIT));
    }
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
    for way in [Way::Shm, Way::Ucx] {
        notifications_wait_over(way);
    }
}

fn notifications_wait_over(way: Way) {
    const NOTIFICATIONS: u32 = 14_000;
    let pair = Pair::new(way, 4096);
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
    for way in [Way::Shm, Way::Ucx] {
        notifications_end_with(way);
    }
}

fn notifications_end_with(way: Way) {
    let pair = Pair::new(way, 4096);
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

/// The peer takes connections and says nothing: those who wait for one are taken, and can be given up.
#[test]
fn notifications_without_a_connection_wait_for_one() {
    let silent = TcpListener::bind(loopback()).unwrap();
    let target = Way::Tcp.builder("target");
    let target = target.tcp_advertise(Some(silent.local_addr().unwrap()));
    let (initiator, target) = (Way::Tcp.agent("initiator"), target.build().unwrap());
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let notify = |_| initiator.notify(&peer, b"one"[..].into()).unwrap();
    let requests: Vec<Request> = (0..MANY).map(notify).collect();
    for request in &requests {
        request.cancel();
        let cancelled = request.wait(WAIT).unwrap_err();
        assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    }
    for request in &requests {
        assert!(request.wait_drained(WAIT));
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

/// The thread of UCX is held.
#[test]
fn reads_beyond_what_ucx_takes_wait_for_their_turn() {
    let pair = Pair::new(Way::Ucx, 4096);
    // More pieces than the caller of `post` begins himself.
    let scattered: Vec<(u64, u64, u64)> = (0..65).map(|n| (n * 2, n * 2, 1)).collect();
    let read = |options| pair.moves(Operation::Read, &scattered, options);
    let held = hold_the_end(|| read(patient()));
    wait_for_their_turn(vec![held], read);
}

/// All threads of the file engine are held.
#[test]
fn reads_beyond_what_a_file_engine_takes_wait_for_their_turn() {
    for (mode, threads) in [(FileEngineMode::Blocking, 4), (FileEngineMode::Uring, 1)] {
        let agent = Agent::builder("files").build().unwrap();
        if let Err(error) = agent.start_file_engine(mode) {
            eprintln!("SKIPPED {mode:?}: {error}");
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions {
            create: true,
            len_bytes: Some(4096),
            ..FileOptions::default()
        };
        let file = agent.open_file(folder.path().join("f"), &options).unwrap();
        let memory = HostMemory::anonymous(4096).unwrap();
        let memory = agent.register(memory, RegionOptions::default()).unwrap();
        let read = |options| {
            let pairs = [(memory.descriptor(0, 8), file.descriptor(0, 8))];
            let side = Side::Local;
            agent
                .transfer(Operation::Read, &pairs, side, options)
                .unwrap()
        };
        let held = (0..threads).map(|_| hold_the_end(|| read(patient())));
        wait_for_their_turn(held.collect(), read);
    }
}

/// Both threads of the object stores are held.
#[test]
fn reads_beyond_what_a_store_takes_wait_for_their_turn() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let agent = Agent::builder("objects").object_store("s", &url, ObjectOptions::default());
    let agent = agent.build().unwrap();
    let memory = HostMemory::anonymous(4096).unwrap();
    let memory = agent.register(memory, RegionOptions::default()).unwrap();
    let object = agent.object("s", "o").unwrap();
    let moves = |operation, options| {
        let pairs = [(memory.descriptor(0, 8), object.descriptor(0, 8))];
        agent
            .transfer(operation, &pairs, Side::Local, options)
            .unwrap()
    };
    moves(Operation::Write, patient()).wait(WAIT).unwrap();
    let read = |options| moves(Operation::Read, options);
    let held = (0..2).map(|_| hold_the_end(|| read(patient())));
    wait_for_their_turn(held.collect(), read);
}
