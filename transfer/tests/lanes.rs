//! Several TCP connections to a peer, over one address of it or several.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use kvcache_core::ErrorKind;
use kvfabric_transfer::{ConnectionReport, Operation, RequestOptions, Status};

use support::child::Again;
use support::proxy::{Proxy, proxied_from};
use support::{OPEN, Pair, WAIT, Way, contents, loopback, pattern};

const MIB: u64 = 1 << 20;

/// An initiator with so many connections, and a target behind a proxy.
fn proxied(connections: usize, bytes: u64) -> (Pair, Proxy) {
    let initiator = Way::Tcp
        .builder("initiator")
        .tcp_connections(connections)
        .build()
        .unwrap();
    proxied_from(initiator, bytes)
}

fn connections(pair: &Pair) -> Vec<ConnectionReport> {
    pair.initiator.path_to(&pair.peer).connections
}

fn whole(pair: &Pair, operation: Operation, options: RequestOptions) -> kvfabric_transfer::Request {
    pair.moves(operation, &[(0, 0, pair.local.bytes())], options)
}

/// A large request's bytes go over all of them, a small one's over the first.
#[test]
fn large_requests_are_striped_and_small_ones_are_not() {
    let (pair, _proxy) = proxied(4, 64 * MIB);
    let data = pattern(64 * MIB as usize, 3);
    pair.local.write_at(0, &data).unwrap();
    whole(&pair, Operation::Write, RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    assert!(contents(&pair.remote) == data);
    let before = connections(&pair);
    assert_eq!(before.len(), 4);
    for connection in &before {
        assert!(connection.sent > MIB, "{before:?}");
        assert_eq!(connection.lost, None);
    }
    for _ in 0..20 {
        let small = pair.moves(Operation::Read, &[(0, 0, 4096)], RequestOptions::default());
        small.wait(WAIT).unwrap();
    }
    let after = connections(&pair);
    assert!(after[0].received > before[0].received + 20 * 4096);
    assert_eq!(after[1..], before[1..]);
}

/// Two addresses of this host stand for two network cards.
#[test]
fn connections_are_spread_over_all_addresses_of_a_peer() {
    let other = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    let target = Way::Tcp
        .builder("target")
        .tcp_rails([other])
        .build()
        .unwrap();
    let initiator = Way::Tcp
        .builder("initiator")
        .tcp_connections(3)
        .build()
        .unwrap();
    let pair = Pair::of(initiator, target, 32 * MIB, OPEN);
    let data = pattern(32 * MIB as usize, 5);
    pair.remote.write_at(0, &data).unwrap();
    whole(&pair, Operation::Read, RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    assert!(contents(&pair.local) == data);
    let found = connections(&pair);
    let to = |address: Ipv4Addr| found.iter().filter(|one| one.to.ip() == address).count();
    assert_eq!(
        (to(Ipv4Addr::LOCALHOST), to(Ipv4Addr::new(127, 0, 0, 2))),
        (2, 1)
    );
    assert!(found.iter().all(|one| one.received > MIB), "{found:?}");
    let why = pair.initiator.path_to(&pair.peer).why;
    assert!(why.contains("3 of 3 connections"), "{why}");
}

/// The first address that the peer tells refuses connections: the path says so, and the second one serves.
#[test]
fn an_address_that_cannot_be_reached_is_told_and_done_without() {
    let nowhere = {
        // Nobody listens there once this is gone.
        let closed = std::net::TcpListener::bind(loopback()).unwrap();
        closed.local_addr().unwrap()
    };
    let target = Way::Tcp
        .builder("target")
        .tcp_advertise(Some(nowhere))
        .tcp_rails([loopback()])
        .build()
        .unwrap();
    let pair = Pair::of(
        Way::Tcp.builder("initiator").build().unwrap(),
        target,
        MIB,
        OPEN,
    );
    whole(&pair, Operation::Read, RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    let path = pair.initiator.path_to(&pair.peer);
    assert_eq!(path.connections.len(), 1);
    assert!(path.why.contains("1 of 2 connections"), "{}", path.why);
    assert!(path.why.contains(&nowhere.to_string()), "{}", path.why);
}

/// The proxy cuts every connection after so many bytes, while those made later pass: reads are finished over what is left, or
/// over new ones, and are never torn.
#[test]
fn a_read_goes_on_when_connections_of_several_break() {
    for cut_after in [1, MIB / 2, 5 * MIB, 20 * MIB, 31 * MIB] {
        let (pair, proxy) = proxied(4, 32 * MIB);
        let data = pattern(32 * MIB as usize, 9);
        pair.remote.write_at(0, &data).unwrap();
        whole(&pair, Operation::Read, RequestOptions::default())
            .wait(WAIT)
            .unwrap();
        pair.local.write_at(0, &vec![0; 32 * MIB as usize]).unwrap();
        proxy.cut_after(cut_after);
        whole(&pair, Operation::Read, RequestOptions::default())
            .wait(WAIT)
            .unwrap();
        assert!(contents(&pair.local) == data, "cut after {cut_after}");
    }
}

/// One connection of four is cut while a read is in flight: the three others bring what it owed, and the path tells.
#[test]
fn what_a_lost_connection_owed_comes_over_the_others() {
    let (pair, proxy) = proxied(4, 64 * MIB);
    let data = pattern(64 * MIB as usize, 11);
    pair.remote.write_at(0, &data).unwrap();
    whole(&pair, Operation::Read, RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    pair.local.write_at(0, &vec![0; 64 * MIB as usize]).unwrap();
    proxy.stall();
    let read = whole(&pair, Operation::Read, RequestOptions::default());
    proxy.cut_one();
    proxy.resume();
    let done = read.wait(WAIT).unwrap();
    assert!(contents(&pair.local) == data);
    assert_eq!(done.failovers, 0, "it went on over the same way");
    let lost = |found: &[ConnectionReport]| found.iter().filter(|one| one.lost.is_some()).count();
    assert_eq!(lost(&connections(&pair)), 1);
    // What is left goes on serving, small requests too.
    pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default())
        .wait(WAIT)
        .unwrap();
}

/// A write may have been applied in part by the connection that was lost: it fails, when nothing of it is open any more.
#[test]
fn a_write_fails_with_one_of_its_connections() {
    let (pair, proxy) = proxied(4, 64 * MIB);
    whole(&pair, Operation::Write, RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    proxy.stall();
    let write = whole(&pair, Operation::Write, RequestOptions::default());
    proxy.cut_one();
    proxy.resume();
    assert_eq!(write.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
    assert!(write.wait_drained(WAIT));
    // The memory is free, and the other connections serve the next one.
    write.post().unwrap();
    write.wait(WAIT).unwrap();
}

/// Given up while all connections are stalled, with frames open on each: settled at once, and what arrives later is dropped.
#[test]
fn a_read_over_several_connections_that_is_given_up_touches_no_memory() {
    let (pair, proxy) = proxied(4, 64 * MIB);
    let read = whole(&pair, Operation::Read, RequestOptions::default());
    read.wait(WAIT).unwrap();
    pair.remote
        .write_at(0, &pattern(64 * MIB as usize, 13))
        .unwrap();
    let before = contents(&pair.local);
    proxy.stall();
    read.post().unwrap();
    read.cancel();
    assert!(read.wait_drained(WAIT));
    proxy.resume();
    // Answers come in order, so this one comes after those that are dropped.
    for _ in 0..8 {
        let again = whole(&pair, Operation::Write, RequestOptions::default());
        again.wait(WAIT).unwrap();
    }
    assert!(contents(&pair.local) == before);
}

/// The target is another process, killed while a request is striped.
#[test]
fn a_killed_peer_fails_a_striped_request() {
    let initiator = Way::Tcp
        .builder("initiator")
        .tcp_connections(4)
        .build()
        .unwrap();
    let mut child = Again::start("killed_target", "target");
    let metadata = support::child::unhex(&child.expect("METADATA"));
    let peer = initiator.load_peer(&metadata).unwrap();
    let (region, bytes) = peer.regions()[0];
    let own = initiator
        .register(
            kvfabric_transfer::HostMemory::anonymous(bytes).unwrap(),
            OPEN,
        )
        .unwrap();
    let pairs = [(
        own.descriptor(0, bytes),
        kvfabric_transfer::Descriptor {
            region,
            offset: 0,
            len: bytes,
        },
    )];
    let post = |operation| {
        let side = kvfabric_transfer::Side::Peer(&peer);
        initiator.transfer(operation, &pairs, side, RequestOptions::default())
    };
    post(Operation::Write).unwrap().wait(WAIT).unwrap();
    child.stop();
    let requests = [
        post(Operation::Write).unwrap(),
        post(Operation::Read).unwrap(),
    ];
    child.kill();
    for request in requests {
        assert_eq!(request.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
        assert!(request.wait_drained(WAIT));
    }
}

/// What the test above runs in another process.
#[test]
fn killed_target() {
    if std::env::var(support::child::ROLE).is_err() {
        return;
    }
    let target = Way::Tcp.builder("target").build().unwrap();
    let memory = kvfabric_transfer::HostMemory::shared(32 * MIB).unwrap();
    let _region = target.register(memory, OPEN).unwrap();
    println!("METADATA {}", support::child::hex(&target.metadata()));
    std::thread::sleep(Duration::from_secs(60));
}

/// None, too many of either.
#[test]
fn numbers_out_of_range_are_refused() {
    let many = vec![loopback(); 16];
    for builder in [
        Way::Tcp.builder("none").tcp_connections(0),
        Way::Tcp.builder("many").tcp_connections(17),
        Way::Tcp.builder("rails").tcp_rails(many),
    ] {
        assert_eq!(builder.build().unwrap_err().kind(), ErrorKind::Invalid);
    }
}

/// A pair with two connections, the first of them, which small requests use, through a proxy.
fn half_proxied(bytes: u64) -> (Pair, Proxy) {
    let proxy = Proxy::new();
    let target = Way::Tcp
        .builder("target")
        .tcp_advertise(Some(proxy.address()))
        .tcp_rails([loopback()])
        .build()
        .unwrap();
    proxy.run(target.tcp_address().unwrap());
    let initiator = Way::Tcp
        .builder("initiator")
        .slow_after(Some(Duration::from_millis(50)))
        .build()
        .unwrap();
    (Pair::of(initiator, target, bytes, OPEN), proxy)
}

/// Longer than any test may take: whoever waits for it fails.
fn in_an_hour() -> RequestOptions {
    RequestOptions {
        deadline: Some(Duration::from_secs(3600)),
        ..RequestOptions::default()
    }
}

/// One of two connections stands still, after more and more of a large read: the other one brings what it owes, and the
/// bytes that it brings late are dropped.
#[test]
fn what_a_connection_that_stands_still_owes_comes_over_the_others() {
    for after in [0, MIB / 2, 5 * MIB] {
        let (pair, proxy) = half_proxied(32 * MIB);
        let data = pattern(32 * MIB as usize, 11);
        pair.remote.write_at(0, &data).unwrap();
        let read = whole(&pair, Operation::Read, in_an_hour());
        read.wait(WAIT).unwrap();
        pair.local.write_at(0, &vec![0; 32 * MIB as usize]).unwrap();
        match after {
            0 => proxy.stall(),
            bytes => proxy.stall_after(bytes),
        }
        read.post().unwrap();
        read.wait(WAIT).unwrap();
        assert!(contents(&pair.local) == data, "after {after}");
        assert!(connections(&pair).iter().all(|one| one.lost.is_none()));
        // Nothing of the request may be written to its memory any more.
        let other = pattern(32 * MIB as usize, 12);
        pair.local.write_at(0, &other).unwrap();
        let before = connections(&pair)[0].clone();
        proxy.resume();
        // It brings its answers in order: when it has brought that to a small write, it owes nothing any more.
        let until = Instant::now() + WAIT;
        while connections(&pair)[0].sent <= before.sent + 4096 {
            assert!(Instant::now() < until, "after {after}: it is not used");
            let small = pair.moves(Operation::Write, &[(0, 0, 4096)], in_an_hour());
            small.wait(WAIT).unwrap();
        }
        assert!(connections(&pair)[0].received > before.received);
        assert!(contents(&pair.local) == other, "after {after}");
    }
}

/// Small requests alone, which all use the connection that stands still: reads are moved to the other, later requests begin
/// there, and a write that was begun is not repeated.
#[test]
fn new_requests_avoid_a_connection_that_stands_still() {
    let (pair, proxy) = half_proxied(MIB);
    let data = pattern(MIB as usize, 13);
    pair.remote.write_at(0, &data).unwrap();
    let small = |operation, options| pair.moves(operation, &[(0, 0, 4096)], options);
    small(Operation::Read, in_an_hour()).wait(WAIT).unwrap();
    proxy.stall();
    let write = small(Operation::Write, in_an_hour());
    small(Operation::Read, in_an_hour()).wait(WAIT).unwrap();
    let before = connections(&pair);
    for _ in 0..10 {
        small(Operation::Write, in_an_hour()).wait(WAIT).unwrap();
    }
    let after = connections(&pair);
    assert_eq!(after[0], before[0]);
    assert!(after[1].sent > before[1].sent + 10 * 4096, "{after:?}");
    assert!(matches!(write.poll(), Status::InFlight));
    // What it brings says that it moves: small requests use it again.
    proxy.resume();
    write.wait(WAIT).unwrap();
    let before = connections(&pair)[0].received;
    small(Operation::Read, in_an_hour()).wait(WAIT).unwrap();
    assert!(connections(&pair)[0].received > before + 4096);
}
