//! From one way to another: when a way breaks under a request or before it, when it cannot be made ready, when it stands
//! still; and back again. The target is another process, whose sockets are shut down from here, or a member of a simulated
//! network whose time is stopped.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and the other process speaks by printing"
)]

mod support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kvcache_core::ErrorKind;
use kvfabric_transfer::backend::sim::{ExchangeConfig, LinkProfile, SimNetwork};
use kvfabric_transfer::{
    Agent, AgentBuilder, Descriptor, HostMemory, Operation, PeerHandle, Region, RegionId,
    RegionOptions, Request, RequestOptions, Side, UcxOptions,
};

use support::child::{Again, ROLE, hex, unhex};
use support::sockets::{cut_all_but, cut_unix};
use support::{OPEN, Pair, WAIT, contents, loopback, pattern};

const BYTES: u64 = 32 << 20;
const PART: u64 = 1 << 20;
const SEED: u64 = 41;

/// So fast a request moves that shall be under way for a while.
const RATE: u64 = 8 << 20;

fn builder(name: &str, role: &str) -> AgentBuilder {
    let (host, ucx) = (role != "remote", role == "remote");
    // Connections that can be told from our own.
    let settings = vec![("TLS".to_owned(), "tcp,self".to_owned())];
    Agent::builder(name)
        .memcpy(false)
        .shm(host)
        .cma(host)
        .ucx(ucx.then_some(UcxOptions { settings }))
        .tcp(Some(loopback()))
}

/// The body of the other process; in the process that runs all tests there is nothing to do.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let agent = builder("other", &role).build().unwrap();
    let region = agent.register(HostMemory::shared(BYTES).unwrap(), OPEN);
    let region = region.unwrap();
    region.write_at(0, &pattern(BYTES as usize, SEED)).unwrap();
    println!("REGION {}", region.id().0);
    println!("ADDRESS {}", agent.tcp_address().unwrap());
    println!("METADATA {}", hex(&agent.metadata()));
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line).unwrap() > 0 {
        println!("CHECKSUM {}", region.checksum(0, BYTES).unwrap());
        line.clear();
    }
}

/// This process's agent, and the other one as its peer.
struct Reached {
    agent: Agent,
    local: Region,
    peer: PeerHandle,
    remote: RegionId,
    address: SocketAddr,
    other: Again,
}

impl Reached {
    fn new(role: &str) -> Self {
        let mut other = Again::start("the_other_process", role);
        let remote = RegionId(other.expect("REGION").parse().unwrap());
        let address = other.expect("ADDRESS").parse().unwrap();
        let metadata = unhex(&other.expect("METADATA"));
        let agent = builder("this", role).build().unwrap();
        let local = HostMemory::anonymous(BYTES).unwrap();
        let local = agent.register(local, RegionOptions::default()).unwrap();
        let peer = agent.load_peer(&metadata).unwrap();
        Self {
            agent,
            local,
            peer,
            remote,
            address,
            other,
        }
    }

    /// All of it, in parts.
    fn moves(&self, operation: Operation) -> Request {
        let pairs: Vec<_> = (0..BYTES / PART)
            .map(|part| {
                let remote = Descriptor {
                    region: self.remote,
                    offset: part * PART,
                    len: PART,
                };
                (self.local.descriptor(part * PART, PART), remote)
            })
            .collect();
        let options = RequestOptions {
            parts: vec![1; pairs.len()],
            ..RequestOptions::default()
        };
        let side = Side::Peer(&self.peer);
        let request = self.agent.transfer(operation, &pairs, side, options);
        request.unwrap()
    }

    fn way(&self) -> Option<&'static str> {
        self.agent.path_to(&self.peer).backend
    }

    /// Moves everything, and breaks something when the first part is in place.
    fn broken_under_way(&self, operation: Operation, cut: impl FnOnce()) -> Request {
        self.agent.set_peer_rate(&self.peer, Some(RATE)).unwrap();
        let request = self.moves(operation);
        request.wait_part(0, WAIT).unwrap();
        let before = self.agent.stats().failovers;
        cut();
        // Mapped memory works without its connection, so the rest waits until the loss is seen.
        until("it goes another way", || {
            self.agent.stats().failovers > before
        });
        self.agent.set_peer_rate(&self.peer, None).unwrap();
        request
    }
}

/// Waits until `done`, which nothing tells of.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + 3 * WAIT;
    while !done() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// A way that is gone for good is followed by the next one, and the report says what became of it.
#[test]
fn the_next_way_within_the_host_is_taken_and_then_the_network() {
    let reached = Reached::new("host");
    let data = pattern(BYTES as usize, SEED);
    for (position, way, next) in [(0, "shm", "cma"), (1, "cma", "tcp")] {
        let request = reached.moves(Operation::Read);
        assert_eq!(request.wait(WAIT).unwrap().backend, way);
        cut_unix(&reached.other.child, position, true);
        until("the loss is seen", || reached.way() != Some(way));
        reached.local.fill_at(0, BYTES, 0).unwrap();
        request.post().unwrap();
        assert_eq!(request.wait(WAIT).unwrap().backend, next);
        assert!(contents(&reached.local) == data, "{next}");
        let report = reached.agent.path_to(&reached.peer);
        let (refused, reason) = &report.refused[position];
        assert_eq!(*refused, way);
        assert!(reason.contains("connect"), "{reason}");
    }
}

/// What is under way when its way breaks goes on over the next one, reads and writes: within the host nothing of what
/// failed can land any more. The request, its telemetry and the statistics tell.
#[test]
fn a_request_under_way_goes_on_over_the_next_way() {
    for operation in [Operation::Read, Operation::Write] {
        let mut reached = Reached::new("host");
        let data = match operation {
            Operation::Read => pattern(BYTES as usize, SEED),
            Operation::Write => pattern(BYTES as usize, SEED + 1),
        };
        if operation == Operation::Write {
            reached.local.write_at(0, &data).unwrap();
        }
        for (position, way, next) in [(0, "shm", "cma"), (1, "cma", "tcp")] {
            let before = reached.agent.stats().failovers;
            assert_eq!(reached.way(), Some(way));
            let request = reached
                .broken_under_way(operation, || cut_unix(&reached.other.child, position, true));
            let done = request.wait(WAIT).unwrap();
            assert_eq!(done.backend, next, "{operation:?}");
            assert!(done.failovers > 0);
            let telemetry = request.telemetry().unwrap();
            assert_eq!(telemetry.left, Some((way, ErrorKind::PeerLost)));
            let failovers = reached.agent.stats().failovers - before;
            assert_eq!(failovers, u64::from(done.failovers));
            let report = reached.agent.path_to(&reached.peer);
            assert_eq!(report.refused[position].0, way, "{report:?}");
            let sum = reached.local.checksum(0, BYTES).unwrap().to_string();
            assert_eq!(
                reached.other.ask("", "CHECKSUM"),
                sum,
                "{operation:?} {next}"
            );
        }
        assert!(contents(&reached.local) == data);
    }
}

/// Only the connection breaks: the request goes on the next way, others follow it for a while, and then the better way is
/// tried again and taken.
#[test]
fn a_better_way_that_was_left_is_taken_again() {
    let reached = Reached::new("host");
    let request =
        reached.broken_under_way(Operation::Read, || cut_unix(&reached.other.child, 0, false));
    assert_eq!(request.wait(WAIT).unwrap().backend, "cma");
    until("shm is used again", || {
        request.post().unwrap();
        request.wait(WAIT).unwrap().backend == "shm"
    });
    assert_eq!(reached.agent.path_to(&reached.peer).refused, []);
}

/// UCX's connections break under a read: it goes on over TCP.
#[test]
fn a_read_over_ucx_goes_on_over_tcp() {
    let reached = Reached::new("remote");
    assert_eq!(reached.way(), Some("ucx"));
    let (child, address) = (&reached.other.child, reached.address);
    let request = reached.broken_under_way(Operation::Read, || cut_all_but(child, address));
    let done = request.wait(WAIT).unwrap();
    assert_eq!(done.backend, "tcp");
    assert_eq!(
        request.telemetry().unwrap().left,
        Some(("ucx", ErrorKind::PeerLost))
    );
    assert!(contents(&reached.local) == pattern(BYTES as usize, SEED));
}

const SMALL: u64 = 1 << 20;

/// Two agents on a simulated network and, if there is to be another way, TCP.
fn simulated(tcp: bool, slow_after: Duration) -> (SimNetwork, Pair) {
    let config = ExchangeConfig::over(LinkProfile::perfect());
    let network = SimNetwork::new(7, config).unwrap();
    let build = |name| {
        Agent::builder(name)
            .memcpy(false)
            .shm(false)
            .tcp(tcp.then(loopback))
            .slow_after(Some(slow_after))
            .simulated(&network)
            .build()
            .unwrap()
    };
    let pair = Pair::of(build("initiator"), build("target"), SMALL, OPEN);
    pair.remote
        .write_at(0, &pattern(SMALL as usize, 3))
        .unwrap();
    (network, pair)
}

/// Time stands still on the network: what was posted to it goes another way as soon as nothing of it can land any more,
/// and so does what comes after.
#[test]
fn a_request_whose_path_stands_still_goes_another_way() {
    for operation in [Operation::Read, Operation::Write] {
        let (network, pair) = simulated(true, Duration::from_millis(50));
        network.pause();
        let request = pair.moves(operation, &[(0, 0, SMALL)], RequestOptions::default());
        until("the network is left", || {
            pair.initiator.path_to(&pair.peer).backend == Some("tcp")
        });
        let report = pair.initiator.path_to(&pair.peer);
        assert!(
            report.refused[0]
                .1
                .starts_with("left: no progress for 50ms"),
            "{report:?}"
        );
        let later = pair.moves(operation, &[(0, 0, SMALL)], RequestOptions::default());
        let done = later.wait(WAIT).unwrap();
        assert_eq!((done.backend, done.failovers), ("tcp", 0));
        // What is on its way may land as long as the network has it.
        assert_eq!(pair.initiator.stats().failovers, 0);
        network.resume();
        let done = request.wait(WAIT).unwrap();
        assert_eq!((done.backend, done.failovers), ("tcp", 1));
        assert_eq!(
            request.telemetry().unwrap().left,
            Some(("sim", ErrorKind::Timeout))
        );
        assert!(contents(&pair.local) == contents(&pair.remote));
    }
}

/// Without another way it stays where it is, however long that takes.
#[test]
fn a_request_stays_where_it_is_when_there_is_no_other_way() {
    let (network, pair) = simulated(false, Duration::from_millis(5));
    network.pause();
    let places = [(0, 0, SMALL)];
    let request = pair.moves(Operation::Read, &places, RequestOptions::default());
    let options = RequestOptions {
        deadline: Some(Duration::from_millis(200)),
        ..RequestOptions::default()
    };
    let late = pair.moves(Operation::Read, &places, options);
    assert_eq!(late.wait(WAIT).unwrap_err().kind(), ErrorKind::Timeout);
    network.resume();
    let done = request.wait(WAIT).unwrap();
    assert_eq!((done.backend, done.failovers), ("sim", 0));
    assert!(contents(&pair.local) == contents(&pair.remote));
}

/// A peer that the simulated network does not reach any more is reached over TCP.
#[test]
fn a_request_that_fails_on_one_network_goes_over_another() {
    let (network, pair) = simulated(true, WAIT);
    assert_eq!(pair.initiator.path_to(&pair.peer).backend, Some("sim"));
    network.partition("initiator", "target").unwrap();
    for operation in [Operation::Read, Operation::Write] {
        let request = pair.moves(operation, &[(0, 0, SMALL)], RequestOptions::default());
        let done = request.wait(WAIT).unwrap();
        assert_eq!(done.backend, "tcp");
        assert!(contents(&pair.local) == contents(&pair.remote));
    }
    assert_eq!(pair.initiator.stats().failovers, 1);
}
