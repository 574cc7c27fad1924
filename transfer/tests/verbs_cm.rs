//! Queue pairs that are connected by rdma_cm: what is told of it, and who is not connected. Skipped where there is no device;
//! `make test-rdma` has one. That paths work and end like others is seen by the other cases, run with
//! `KVFABRIC_RDMA_CONNECT=rdma_cm`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and a skipped one says so"
)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Operation, PathReport, RequestOptions, VerbsConnect, VerbsOptions, rdma_cm,
};

use support::{OPEN, Pair, WAIT, loopback};

/// The devices at the two ends of a link; none where there is no such link (`KVFABRIC_RDMA_ENDS`).
fn ends() -> Option<(String, String)> {
    let Ok(ends) = std::env::var("KVFABRIC_RDMA_ENDS") else {
        assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "no link");
        eprintln!("SKIPPED: no RDMA link");
        return None;
    };
    let (near, far) = ends.split_once(',').unwrap();
    Some((near.to_owned(), far.to_owned()))
}

fn options(device: &str, connect: VerbsConnect) -> VerbsOptions {
    VerbsOptions {
        device: Some(device.to_owned()),
        connect,
        ..VerbsOptions::default()
    }
}

fn agent(name: &str, options: VerbsOptions) -> Agent {
    let builder = Agent::builder(name).memcpy(false).shm(false);
    builder.verbs(Some(options)).build().unwrap()
}

/// Which way, and why not the wanted one.
fn refused(report: &PathReport) -> String {
    assert_eq!(report.backend, None, "{report:?}");
    format!("{:?}", report.refused)
}

/// What is missing is told before any device is looked for; what the route decides can't be set.
#[test]
fn what_rdma_cm_lacks_is_told() {
    let build = |options| Agent::builder("a").verbs(Some(options)).build();
    let by_cm = VerbsOptions {
        connect: VerbsConnect::RdmaCm,
        ..VerbsOptions::default()
    };
    let level = VerbsOptions {
        service_level: 3,
        ..by_cm.clone()
    };
    let error = build(level).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("service level by rdma_cm"),
        "{error}"
    );
    match rdma_cm() {
        Ok(()) => assert!(Path::new("/dev/infiniband/rdma_cm").exists()),
        Err(lacking) => {
            assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "{lacking}");
            assert_eq!(lacking.kind(), ErrorKind::Unsupported);
            let error = build(by_cm).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            let text = error.to_string();
            assert!(text.contains("rdma"), "{text}");
        }
    }
    assert!("tcp".parse::<VerbsConnect>().is_err());
    for way in [VerbsConnect::Exchange, VerbsConnect::RdmaCm] {
        assert_eq!(way.name().parse::<VerbsConnect>().unwrap(), way);
    }
}

/// The path report names the way, and the GID and MTU that the kernel took; the traffic class goes with it. Bytes arrive.
#[test]
fn a_path_by_rdma_cm_tells_what_the_kernel_found() {
    let Some((near, far)) = ends() else { return };
    let marked = VerbsOptions {
        traffic_class: 0x68,
        mtu: Some(1024),
        ..options(&near, VerbsConnect::RdmaCm)
    };
    let target = agent("target", options(&far, VerbsConnect::RdmaCm));
    let pair = Pair::of(agent("initiator", marked), target, 1 << 16, OPEN);
    let report = pair.initiator.path_to(&pair.peer);
    assert_eq!(report.backend, Some("verbs"), "{report:?}");
    for part in [
        ", GID 10.9.0.1 (index ",
        "RoCE v2), MTU 1024, traffic class 104",
        ", by rdma_cm from 10.9.0.1, to 10.9.0.2",
    ] {
        assert!(report.why.contains(part), "{part}: {report:?}");
    }
    let request = pair.moves(
        Operation::Write,
        &[(0, 0, 1 << 16)],
        RequestOptions::default(),
    );
    request.wait(WAIT).unwrap();
}

/// One side wants the exchange, the other one rdma_cm: neither waits for what the other does not do.
#[test]
fn both_sides_must_connect_the_same_way() {
    let Some((near, far)) = ends() else { return };
    for (own, other) in [
        (VerbsConnect::Exchange, VerbsConnect::RdmaCm),
        (VerbsConnect::RdmaCm, VerbsConnect::Exchange),
    ] {
        let target = agent("target", options(&far, other));
        let initiator = agent("initiator", options(&near, own));
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        let reason = refused(&initiator.path_to(&peer));
        let told = format!(
            "this side connects queue pairs by {}, the other one by {}",
            other.name(),
            own.name()
        );
        assert!(reason.contains(&told), "{reason}");
    }
}

/// Where the address stands in the answer to a question of one rail: after lengths, head, count, position and queue pair.
const ADDRESS: usize = 2 + 6 + 2 + 1 + 29 + 1;
/// The ticket comes after it, and the secret is at its end.
const SECRET: usize = ADDRESS + 18 + 43;

/// Stands between two agents, and changes bits of a byte of what the target answers first, if any.
fn between(target: SocketAddr, change: Option<(usize, u8)>) -> SocketAddr {
    let listener = TcpListener::bind(loopback()).unwrap();
    let own = listener.local_addr().unwrap();
    thread::spawn(move || {
        for asking in listener.incoming() {
            let (mut asking, mut answering) =
                (asking.unwrap(), TcpStream::connect(target).unwrap());
            let (mut from, mut to) = (asking.try_clone().unwrap(), answering.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut to));
            thread::spawn(move || {
                let mut length = [0; 2];
                answering.read_exact(&mut length)?;
                let mut answer = vec![0; usize::from(u16::from_le_bytes(length))];
                answering.read_exact(&mut answer)?;
                let mut all = length.to_vec();
                all.extend(answer);
                if let Some((at, bits)) = change {
                    all[at] ^= bits;
                }
                asking.write_all(&all)?;
                std::io::copy(&mut answering, &mut asking)
            });
        }
    });
    own
}

/// As metadata has it at its end.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    let all = bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc))
    });
    !all
}

/// The target's metadata with another address for verbs.
fn moved(target: &Agent, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (from, to) = (from.to_string(), to.to_string());
    assert_eq!(from.len(), to.len());
    let mut metadata = target.metadata().to_vec();
    let body = metadata.len() - 4;
    let mut places = metadata.windows(from.len());
    let at = places.position(|place| place == from.as_bytes()).unwrap();
    metadata[at..at + to.len()].copy_from_slice(to.as_bytes());
    let checksum = crc32c(&metadata[..body]);
    metadata[body..].copy_from_slice(&checksum.to_le_bytes());
    metadata
}

/// A target whose first answers are changed so, and an initiator that asks it; then the same unchanged, from the same agents.
fn asks(change: (usize, u8), check: impl Fn(&str)) {
    let Some((near, far)) = ends() else { return };
    let port = TcpListener::bind(loopback()).unwrap();
    let listen = port.local_addr().unwrap();
    drop(port);
    let before = connections();
    let by_cm = VerbsOptions {
        listen: Some(listen),
        ..options(&far, VerbsConnect::RdmaCm)
    };
    let target = agent("target", by_cm);
    let initiator = agent("initiator", options(&near, VerbsConnect::RdmaCm));
    let there = between(listen, Some(change));
    let peer = initiator.load_peer(&moved(&target, listen, there)).unwrap();
    check(&refused(&initiator.path_to(&peer)));
    initiator.forget_peer(&peer);
    let there = between(listen, None);
    let peer = initiator.load_peer(&moved(&target, listen, there)).unwrap();
    let report = initiator.path_to(&peer);
    assert_eq!(report.backend, Some("verbs"), "{report:?}");
    assert_eq!(connections(), before + 2, "of {report:?}");
    initiator.forget_peer(&peer);
    drop(initiator);
    drop(target);
    let end = Instant::now() + WAIT;
    while connections() > before {
        assert!(Instant::now() < end, "connections stay");
        thread::yield_now();
    }
}

/// Connections by rdma_cm that are there, on this machine; they are known by the threads that made them.
fn connections() -> usize {
    let all = Command::new("rdma")
        .args(["resource", "show", "cm_id"])
        .output()
        .unwrap();
    let all = String::from_utf8(all.stdout).unwrap();
    let is_one = |line: &&str| line.contains(" state CONNECT ");
    all.lines().filter(is_one).count()
}

/// A neighbour that does not exist: the error says from where and to where, and the event. Nothing stays of it, and the next
/// one is connected.
#[test]
fn an_address_that_leads_nowhere_is_told() {
    asks((ADDRESS + 15, 2 ^ 77), |reason| {
        assert!(reason.contains("from 10.9.0.1 to 10.9.0.77:"), "{reason}");
        let is_event = reason.contains("(ADDR_ERROR, status -");
        assert!(
            is_event || reason.contains("look for the address: nothing has come in time"),
            "{reason}"
        );
    });
}

/// Who shows another ticket than it was given is refused with the reason; the place is still there for who has the right one.
#[test]
fn a_stranger_is_rejected_with_the_reason() {
    asks((SECRET, 1), |reason| {
        for part in [
            "the peer refuses it",
            "nobody is expected by this ticket",
            "(REJECTED, status 28)",
        ] {
            assert!(reason.contains(part), "{reason}");
        }
    });
}
