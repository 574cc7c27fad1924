//! TCP over a network that is cut and healed: two hosts, each a network namespace, and a switch between them. A namespace
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
use kvfabric_transfer::{Agent, MemoryFate, Operation, Request, RequestOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use support::{OPEN, Pair, WAIT, contents, pattern};

/// Longer than the 10 s that sent bytes may stay unacknowledged.
const LOST: Duration = Duration::from_secs(60);

const BYTES: u64 = 32 << 20;

/// Two hosts on a switch; taken down when dropped.
struct Network {
    names: [String; 3],
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
    fn new(name: &str) -> Option<Self> {
        let name = format!("kvf-{}-{name}", std::process::id());
        let network = Self {
            names: ["switch", "a", "b"].map(|role| format!("{name}-{role}")),
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
        let switch = &self.names[0];
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for (number, host) in [(1, &self.names[1]), (2, &self.names[2])] {
            ip(&format!("netns add {host}"))?;
            ip(&format!("-n {host} link set lo up"))?;
            ip(&format!(
                "-n {host} link add eth0 type veth peer name port{number} netns {switch}"
            ))?;
            ip(&format!("-n {switch} link set port{number} master br0 up"))?;
            ip(&format!("-n {host} addr add 10.77.0.{number}/24 dev eth0"))?;
            ip(&format!("-n {host} link set eth0 up"))?;
        }
        Ok(())
    }

    /// An agent on one of the two hosts, 1 or 2.
    fn agent(&self, host: u8, name: &str) -> Agent {
        let place = format!("/run/netns/{}", self.names[usize::from(host)]);
        let name = name.to_owned();
        let build = move || {
            let namespace = File::open(place).unwrap();
            let kind = LinkNameSpaceType::Network;
            move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
            let address = IpAddr::V4(Ipv4Addr::new(10, 77, 0, host));
            Agent::builder(&name)
                .memcpy(false)
                .shm(false)
                .tcp(Some(SocketAddr::new(address, 0)))
                .build()
                .unwrap()
        };
        thread::spawn(build).join().unwrap()
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

    /// From now on nothing arrives at either side, and neither is told.
    fn cut(&self) {
        ip(&format!("-n {} link set port2 nomaster", self.names[0])).unwrap();
    }

    fn heal(&self) {
        ip(&format!("-n {} link set port2 master br0", self.names[0])).unwrap();
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
    let Some(network) = Network::new("heal") else {
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
    let Some(network) = Network::new("lost") else {
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
    let refused = network.on(1, || read.post()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PeerLost);
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
    let Some(network) = Network::new("half") else {
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

fn again(request: &Request) -> Result<(), ErrorKind> {
    request.post().map_err(|error| error.kind())?;
    request.wait(LOST).map(drop).map_err(|error| error.kind())
}
