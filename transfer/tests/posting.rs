//! Posts wait for no connection, and for no other peer's: agents on real sockets, and listeners that never answer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, Descriptor, Operation, PeerHandle, RequestOptions, Side, Status};

use support::proxy::Proxy;
use support::{OPEN, WAIT, Way};

const BYTES: u64 = 1 << 20;

/// As many as one thread would need half a minute for: each connects for two seconds.
const POSTS: usize = 15;

/// Takes the place of an agent that is gone: the kernel connects those who come, and nobody greets them.
fn silent(address: SocketAddr) -> TcpListener {
    let until = Instant::now() + WAIT;
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < until, "{address}: {error}"),
        }
        std::thread::yield_now();
    }
}

fn whole(
    initiator: &Agent,
    peer: &PeerHandle,
    (local, remote): (Descriptor, Descriptor),
) -> kvfabric_transfer::Request {
    let local = initiator.prepare(Side::Local, &[local]).unwrap();
    let remote = initiator.prepare(Side::Peer(peer), &[remote]).unwrap();
    let options = RequestOptions {
        // What one of them finds out says nothing to the others, then.
        backends: vec!["tcp".to_owned()],
        ..RequestOptions::default()
    };
    initiator
        .request(Operation::Read, &local, &remote, options)
        .unwrap()
}

/// One peer has died, and something that never answers sits in its place. What is posted to it is in flight at once, and
/// fails one after the other; what is posted to another peer afterwards, which is connected to for that, is done before.
#[test]
fn a_peer_that_does_not_answer_holds_up_nobody_else() {
    let initiator = Way::Tcp.agent("initiator");
    let local = initiator.register(Way::Tcp.memory(BYTES), OPEN).unwrap();
    let own = local.descriptor(0, BYTES);
    let dead = Way::Tcp.agent("dead");
    let region = dead.register(Way::Tcp.memory(BYTES), OPEN).unwrap();
    let peer = initiator.load_peer(&dead.metadata()).unwrap();
    let requests: Vec<_> = (0..POSTS)
        .map(|_| whole(&initiator, &peer, (own, region.descriptor(0, BYTES))))
        .collect();
    let address = dead.tcp_address().unwrap();
    drop((dead, region));
    let _silent = silent(address);
    // Whatever the first one went over, the others know that there is no connection.
    requests[0].post().unwrap();
    assert_eq!(
        requests[0].wait(WAIT).unwrap_err().kind(),
        ErrorKind::PeerLost
    );
    for request in &requests {
        request.post().unwrap();
        assert!(matches!(request.poll(), Status::InFlight));
    }

    let other = Way::Tcp.agent("other");
    let handle = initiator.load_peer(&other.metadata()).unwrap();
    let notice = initiator
        .notify(&handle, Bytes::from_static(b"hello"))
        .unwrap();
    notice.wait(WAIT).unwrap();
    assert!(
        requests
            .iter()
            .any(|r| matches!(r.poll(), Status::InFlight))
    );
    assert_eq!(other.wait_notifications(WAIT).len(), 1);

    requests.iter().for_each(kvfabric_transfer::Request::cancel);
    for request in &requests {
        let kind = request.wait(WAIT).unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::PeerLost | ErrorKind::Cancelled));
    }
}

/// A peer that greets later than the usual two seconds: who gives it more reaches it. No time, and too much, are no limits.
#[test]
fn a_slow_peer_is_reached_by_who_waits_for_it() {
    let limited = |limit| Way::Tcp.builder("initiator").connect_within(limit).build();
    for limit in [Duration::ZERO, Duration::from_secs(61)] {
        assert_eq!(limited(limit).unwrap_err().kind(), ErrorKind::Invalid);
    }
    let proxy = Proxy::new();
    let target = Way::Tcp.builder("target");
    let target = target.tcp_advertise(Some(proxy.address())).build().unwrap();
    proxy.run(target.tcp_address().unwrap());
    proxy.stall();
    let patient = limited(WAIT).unwrap();
    let peer = patient.load_peer(&target.metadata()).unwrap();
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(3));
            proxy.resume();
        });
        patient.path_to(&peer)
    });
    assert_eq!(report.backend, Some("tcp"), "{report:?}");
}
