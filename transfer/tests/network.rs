//! Networks that are cut and healed: two hosts, each a network namespace, and a switch between them, or two. A namespace
//! belongs to a thread, so both agents are in this process and share nothing but the wire.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and skips aloud"
)]

mod support;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, MemoryFate, Operation, Request, RequestOptions, UcxOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use support::{OPEN, Pair, WAIT, contents, pattern};

/// Longer than the 10 s that sent bytes may stay unacknowledged.
const LOST: Duration = Duration::from_secs(60);

const BYTES: u64 = 32 << 20;

/// Two hosts, on as many networks as they have links; taken down when dropped.
struct Network {
    /// What switches, and the hosts.
    names: [String; 3],
    links: u8,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {arguments}: {text}"))
}

impl Network {
    /// None, and a loud line, where namespaces cannot be made.
    fn new(name: &str, links: u8) -> Option<Self> {
        let name = format!("kvf-{}-{name}", std::process::id());
        let network = Self {
            names: ["switch", "a", "b"].map(|role| format!("{name}-{role}")),
            links,
        };
        match network.set_up() {
            Ok(()) => Some(network),
            Err(error) => {
                eprintln!("SKIPPED: network namespaces cannot be made here: {error}");
                None
            }
        }
    }

    fn set_up(&self) -> Result<(), String> {
        let [switch, hosts @ ..] = &self.names;
        ip(&format!("netns add {switch}"))?;
        for host in hosts {
            ip(&format!("netns add {host}"))?;
            ip(&format!("-n {host} link set lo up"))?;
        }
        for link in 0..self.links {
            ip(&format!("-n {switch} link add br{link} type bridge"))?;
            ip(&format!("-n {switch} link set br{link} up"))?;
            for (number, host) in (1..).zip(hosts) {
                let port = format!("port{link}{number}");
                ip(&format!(
                    "-n {host} link add eth{link} type veth peer name {port} netns {switch}"
                ))?;
                ip(&format!("-n {switch} link set {port} master br{link} up"))?;
                let address = address(link, number);
                ip(&format!("-n {host} addr add {address}/24 dev eth{link}"))?;
                ip(&format!("-n {host} link set eth{link} up"))?;
            }
        }
        Ok(())
    }

    /// An agent on one of the two hosts, 1 or 2, that listens on its last link, and uses UCX on the first if there are two.
    fn agent(&self, host: u8, name: &str) -> Agent {
        let listen = SocketAddr::new(address(self.links - 1, host), 0);
        let settings = [("TLS", "tcp,self"), ("NET_DEVICES", "eth0")];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let ucx = UcxOptions {
            settings: settings.to_vec(),
        };
        let builder = Agent::builder(name)
            .memcpy(false)
            .shm(false)
            .ucx((self.links > 1).then_some(ucx))
            .tcp(Some(listen))
            .slow_after(Some(Duration::from_millis(500)));
        self.on(host, || builder.build().unwrap())
    }

    /// Runs `body` on a host: sockets that it makes are there.
    fn on<T: Send>(&self, host: u8, body: impl FnOnce() -> T + Send) -> T {
        let place = format!("/run/netns/{}", self.names[usize::from(host)]);
        thread::scope(|scope| {
            let run = || {
                let namespace = File::open(place).unwrap();
                let kind = LinkNameSpaceType::Network;
                move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
                body()
            };
            scope.spawn(run).join().unwrap()
        })
    }

    /// From now on nothing arrives at either side of the first link, and neither is told.
    fn cut(&self) {
        ip(&format!("-n {} link set port02 nomaster", self.names[0])).unwrap();
    }

    fn heal(&self) {
        ip(&format!("-n {} link set port02 master br0", self.names[0])).unwrap();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have been made.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Of a host, 1 or 2, on a link.
fn address(link: u8, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 77 + link, 0, host))
}

fn within(deadline: Duration) -> RequestOptions {
    RequestOptions {
        deadline: Some(deadline),
        ..RequestOptions::default()
    }
}

fn pair(network: &Network, data: &[u8]) -> Pair {
    let pair = Pair::of(
        network.agent(1, "initiator"),
        network.agent(2, "target"),
        BYTES,
        OPEN,
    );
    pair.remote.write_at(0, data).unwrap();
    pair
}

fn all(pair: &Pair, operation: Operation, deadline: Duration) -> Request {
    pair.moves(operation, &[(0, 0, BYTES)], within(deadline))
}

/// Cut under requests of both directions: they fail at their deadlines, the read with its memory settled. Healed, the same
/// connection goes on: what was late is dropped, and the write's memory is settled by its answers.
#[test]
fn a_network_that_is_cut_and_healed_goes_on() {
    let Some(network) = Network::new("heal", 1) else {
        return;
    };
    let data = pattern(BYTES as usize, 3);
    let pair = pair(&network, &data);
    let read = network.on(1, || all(&pair, Operation::Read, WAIT));
    read.wait(WAIT).unwrap();
    assert!(contents(&pair.local) == data);
    network.cut();
    // The write first: it would have sent nothing yet behind a read that fills the window.
    let write = all(&pair, Operation::Write, Duration::from_millis(200));
    let read = all(&pair, Operation::Read, Duration::from_millis(200));
    let failed = read.wait(WAIT).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Timeout);
    assert!(read.wait_drained(WAIT));
    let failed = write.wait(WAIT).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::Timeout, MemoryFate::InFlight)
    );
    network.heal();
    assert!(write.wait_drained(WAIT));
    pair.local.fill_at(0, BYTES, 0).unwrap();
    all(&pair, Operation::Read, WAIT).wait(WAIT).unwrap();
    assert!(contents(&pair.local) == data);
}

/// Cut for longer than sent bytes may stay unacknowledged: the peer is lost, the write's memory settled. Healed, the same
/// request to the same peer goes over a new connection.
#[test]
fn a_peer_that_was_lost_is_reached_again_with_the_same_handle() {
    let Some(network) = Network::new("lost", 1) else {
        return;
    };
    let data = pattern(BYTES as usize, 4);
    let pair = pair(&network, &data);
    let read = network.on(1, || all(&pair, Operation::Read, LOST));
    read.wait(WAIT).unwrap();
    network.cut();
    let write = all(&pair, Operation::Write, LOST);
    let failed = write.wait(LOST).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::PeerLost, MemoryFate::Settled),
        "{failed}"
    );
    network.on(1, || read.post()).unwrap();
    assert_eq!(read.wait(WAIT).unwrap_err().kind(), ErrorKind::PeerLost);
    network.heal();
    pair.local.fill_at(0, BYTES, 0).unwrap();
    network.on(1, || read.post()).unwrap();
    read.wait(WAIT).unwrap();
    assert!(contents(&pair.local) == data);
}

/// The peer goes while the network is cut, so nobody hears of it, and comes back under the same name. The half of the
/// connection that is left is found dead by the first request or, without one, by the probes of an idle connection.
#[test]
fn a_half_open_connection_is_found_out() {
    let Some(network) = Network::new("half", 1) else {
        return;
    };
    let data = pattern(BYTES as usize, 5);
    for asks in [true, false] {
        let mut pair = pair(&network, &data);
        let read = network.on(1, || all(&pair, Operation::Read, WAIT));
        read.wait(WAIT).unwrap();
        network.cut();
        let gone = std::mem::replace(&mut pair.target, network.agent(2, "target"));
        drop((gone, pair.remote));
        network.heal();
        if asks {
            let failed = again(&read).unwrap_err();
            assert_eq!(failed, ErrorKind::PeerLost);
        } else {
            let until = Instant::now() + LOST;
            while network
                .on(1, || pair.initiator.path_to(&pair.peer))
                .backend
                .is_some()
            {
                assert!(Instant::now() < until, "it still counts as connected");
                // Only to leave the processor to others meanwhile.
                thread::sleep(Duration::from_millis(50));
            }
        }
        let remote = kvfabric_transfer::HostMemory::anonymous(BYTES).unwrap();
        pair.remote = pair.target.register(remote, OPEN).unwrap();
        pair.remote.write_at(0, &data).unwrap();
        pair.peer = pair.initiator.load_peer(&pair.target.metadata()).unwrap();
        pair.local.fill_at(0, BYTES, 0).unwrap();
        let read = network.on(1, || all(&pair, Operation::Read, WAIT));
        read.wait(WAIT).unwrap();
        assert!(contents(&pair.local) == data);
    }
}

/// Two hosts with two links, UCX on one and TCP on the other. The first is cut: a read that stands still goes on over the
/// second before anything has found the first one dead. Healed, the first is used again.
#[test]
fn a_read_goes_on_over_the_other_link_when_one_is_cut() {
    let Some(network) = Network::new("links", 2) else {
        return;
    };
    let data = pattern(BYTES as usize, 6);
    let pair = pair(&network, &data);
    let read = network.on(1, || all(&pair, Operation::Read, LOST));
    assert_eq!(read.wait(WAIT).unwrap().backend, "ucx");
    network.cut();
    pair.local.fill_at(0, BYTES, 0).unwrap();
    network.on(1, || read.post()).unwrap();
    let done = read.wait(LOST).unwrap();
    assert_eq!((done.backend, done.failovers), ("tcp", 1));
    let left = read.telemetry().unwrap().left;
    assert_eq!(left, Some(("ucx", ErrorKind::Timeout)));
    assert!(contents(&pair.local) == data);
    let report = network.on(1, || pair.initiator.path_to(&pair.peer));
    assert_eq!(report.backend, Some("tcp"));
    assert!(
        report.refused.iter().any(|(way, _)| *way == "ucx"),
        "{report:?}"
    );
    network.heal();
    let until = Instant::now() + LOST;
    while read.wait(LOST).unwrap().backend != "ucx" {
        assert!(Instant::now() < until, "ucx is not used again");
        network.on(1, || read.post()).unwrap();
    }
}

fn again(request: &Request) -> Result<(), ErrorKind> {
    request.post().map_err(|error| error.kind())?;
    request.wait(LOST).map(drop).map_err(|error| error.kind())
}
