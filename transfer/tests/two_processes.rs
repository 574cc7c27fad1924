//! Agents of two processes. The other process is this test binary, started again to run one function; it is told
//! what to do by environment variables and speaks by lines on its standard output.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and the other process speaks by printing"
)]

mod support;

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, HostMemory, MemoryFate, Operation, PeerHandle, Region, RegionId, RegionOptions,
    RequestOptions, Side,
};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use support::child::{Again, ROLE, hex, unhex};
use support::{OPEN, WAIT, Way, contents, pattern};

const WAYS: [Way; 4] = [Way::Shm, Way::Cma, Way::Tcp, Way::Ucx];
const BYTES: u64 = 8 << 20;
const SEED: u64 = 99;

/// Which way it is reached.
const WAY: &str = "KVFABRIC_TEST_WAY";
/// Metadata for it, in hexadecimal digits.
const PEER: &str = "KVFABRIC_TEST_PEER";

fn this_program() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// The other process, killed when dropped.
fn start(role: &str, way: Way, peer: &[u8]) -> Again {
    start_with(Command::new(this_program()), role, way, peer)
}

/// As another user, if this one may become anyone.
fn start_as(user: Option<u32>, role: &str, way: Way, peer: &[u8]) -> Again {
    let mut command = Command::new(this_program());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    start_with(command, role, way, peer)
}

/// `command` starts this program, with whatever arguments follow.
fn start_with(command: Command, role: &str, way: Way, peer: &[u8]) -> Again {
    let peer = hex(peer);
    let told = [(WAY, way.name()), (PEER, &peer)];
    Again::run(command, "the_other_process", role, &told)
}

/// The body of the other process; in the process that runs all tests there is nothing to do.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let name = std::env::var(WAY).unwrap();
    let way = WAYS.into_iter().find(|way| way.name() == name).unwrap();
    match role.as_str() {
        "target" => serve(way),
        "closed" => {
            // What a program that guards its memory does.
            set_dumpable_behavior(DumpableBehavior::NotDumpable).unwrap();
            serve(way);
        }
        "changeling" => change(way),
        "reporter" => report(way, &unhex(&std::env::var(PEER).unwrap())),
        "initiator" => hold(way, &unhex(&std::env::var(PEER).unwrap())),
        other => panic!("role {other}"),
    }
}

/// Exports memory with a pattern and says where it is.
fn offer(way: Way) -> (Agent, Region) {
    let agent = way.agent("other");
    let region = agent.register(way.memory(BYTES), OPEN).unwrap();
    region.write_at(0, &pattern(BYTES as usize, SEED)).unwrap();
    println!("REGION {}", region.id().0);
    println!("METADATA {}", hex(&agent.metadata()));
    (agent, region)
}

/// Exports memory, and becomes another program, which has the same number, when a line comes.
fn change(way: Way) {
    let (_agent, _region) = offer(way);
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let error = Command::new("sleep").arg("60").exec();
    panic!("sleep: {error}");
}

/// Says which way there is to a peer, and why no better one.
fn report(way: Way, metadata: &[u8]) {
    let agent = way.agent("other");
    let peer = agent.load_peer(metadata).unwrap();
    println!("REPORT {:?}", agent.path_to(&peer));
}

/// Exports memory with a pattern; answers each notification with the checksum of all memory.
fn serve(way: Way) {
    let (agent, region) = offer(way);
    let mut peer = None;
    loop {
        for notification in agent.wait_notifications(WAIT) {
            if peer.is_none() {
                peer = Some(agent.load_peer(&notification.bytes).unwrap());
            }
            let checksum = region.checksum(0, BYTES).unwrap();
            let answer = Bytes::copy_from_slice(&checksum.to_le_bytes());
            let peer = peer.as_ref().unwrap();
            agent.notify(peer, answer).unwrap().wait(WAIT).unwrap();
        }
    }
}

/// Reads what the peer exports, says so, and keeps what it has mapped until it is killed.
fn hold(way: Way, metadata: &[u8]) {
    let agent = way.agent("other");
    let peer = agent.load_peer(metadata).unwrap();
    let (region, bytes) = peer.regions()[0];
    let own = agent.register(
        HostMemory::anonymous(bytes).unwrap(),
        RegionOptions::default(),
    );
    let own = own.unwrap();
    let from = kvfabric_transfer::Descriptor {
        region,
        offset: 0,
        len: bytes,
    };
    let pairs = [(own.descriptor(0, bytes), from)];
    let options = RequestOptions::default();
    let read = agent
        .transfer(Operation::Read, &pairs, Side::Peer(&peer), options)
        .unwrap();
    read.wait(WAIT).unwrap();
    println!("CHECKSUM {}", own.checksum(0, bytes).unwrap());
    let mut end = Vec::new();
    std::io::stdin().read_to_end(&mut end).unwrap();
}

/// This process's agent, and the other one as its peer.
struct Reached {
    agent: Agent,
    local: Region,
    peer: PeerHandle,
    remote: RegionId,
    other: Again,
}

impl Reached {
    fn new(way: Way) -> Self {
        Self::through(way, start("target", way, &[]))
    }

    fn through(way: Way, mut other: Again) -> Self {
        let remote = RegionId(other.expect("REGION").parse().unwrap());
        let metadata = unhex(&other.expect("METADATA"));
        let agent = way.agent("this");
        let local = HostMemory::anonymous(BYTES).unwrap();
        let local = agent.register(local, RegionOptions::default()).unwrap();
        let peer = agent.load_peer(&metadata).unwrap();
        assert_eq!(agent.path_to(&peer).backend, Some(way.name()));
        Self {
            agent,
            local,
            peer,
            remote,
            other,
        }
    }

    fn start(
        &self,
        operation: Operation,
        pairs: &[(u64, u64, u64)],
        notification: Option<Bytes>,
    ) -> kvcache_core::Result<kvfabric_transfer::Request> {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|&(local, offset, len)| {
                let remote = kvfabric_transfer::Descriptor {
                    region: self.remote,
                    offset,
                    len,
                };
                (self.local.descriptor(local, len), remote)
            })
            .collect();
        let options = RequestOptions {
            notification,
            ..RequestOptions::default()
        };
        self.agent
            .transfer(operation, &pairs, Side::Peer(&self.peer), options)
    }
}

/// Contiguous and scattered, read, written, and looked at by the other process when a notification says so.
#[test]
fn bytes_and_notifications_go_between_processes() {
    for way in WAYS {
        let reached = Reached::new(way);
        let read = reached
            .start(Operation::Read, &[(0, 0, BYTES)], None)
            .unwrap();
        read.wait(WAIT).unwrap();
        assert!(
            contents(&reached.local) == pattern(BYTES as usize, SEED),
            "{way:?}"
        );
        let data = pattern(BYTES as usize, SEED + 1);
        reached.local.write_at(0, &data).unwrap();
        let blocks = BYTES / 4096;
        // Odd, so that every block of a power of two is visited once.
        let pairs: Vec<_> = (0..blocks)
            .map(|n| (n * 4096, n * 37 % blocks * 4096, 4096))
            .collect();
        let metadata = reached.agent.metadata();
        reached
            .start(Operation::Write, &pairs, Some(metadata))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        let mut model = vec![0; BYTES as usize];
        for (from, to, len) in pairs {
            let (from, to, len) = (from as usize, to as usize, len as usize);
            model[to..to + len].copy_from_slice(&data[from..from + len]);
        }
        let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &model) as u32;
        let answer = &reached.agent.wait_notifications(WAIT)[0];
        assert_eq!(answer.bytes[..], checksum.to_le_bytes(), "{way:?}");
        assert_eq!(&*answer.peer, "other");
    }
}

/// More notifications than the socket holds, sent while the other process stands still; then it goes on and gets all.
#[test]
fn notifications_to_a_process_that_stands_still_arrive_when_it_goes_on() {
    const COUNT: usize = 100;
    for way in WAYS {
        let reached = Reached::new(way);
        let send = |bytes| reached.agent.notify(&reached.peer, bytes).unwrap();
        let metadata = reached.agent.metadata();
        send(metadata).wait(WAIT).unwrap();
        assert_eq!(reached.agent.wait_notifications(WAIT).len(), 1);
        reached.other.stop();
        let sent: Vec<_> = (0..COUNT)
            .map(|_| send(Bytes::from(vec![7; 60_000])))
            .collect();
        reached.other.go_on();
        for request in &sent {
            request.wait(WAIT).unwrap();
        }
        let mut answers = 0;
        while answers < COUNT {
            let more = reached.agent.wait_notifications(WAIT).len();
            assert!(more > 0, "{way:?}: {answers} answers");
            answers += more;
        }
    }
}

/// The other process is killed while requests of all sizes are in flight. Every one ends, with its memory settled;
/// later ones are refused; the region can be given back.
#[test]
fn every_request_settles_when_the_peer_is_killed() {
    for way in WAYS {
        every_request_settles(way, Reached::new(way), Again::kill);
    }
}

/// The other process becomes another program in the middle of it. It is alive and has its number, but not its memory.
#[test]
fn every_request_settles_when_the_peer_becomes_another_program() {
    for way in [Way::Cma, Way::Tcp] {
        let reached = Reached::through(way, start("changeling", way, &[]));
        every_request_settles(way, reached, |other| {
            let mut input = other.child.stdin.take().unwrap();
            input.write_all(b"now\n").unwrap();
        });
    }
}

fn every_request_settles(way: Way, mut reached: Reached, end: fn(&mut Again)) {
    let mut requests = Vec::new();
    for round in 0..40 {
        let operation = if round % 2 == 0 {
            Operation::Read
        } else {
            Operation::Write
        };
        for pairs in [vec![(0, 0, BYTES)], vec![(0, 64, 64), (4096, 8192, 4096)]] {
            requests.extend(reached.start(operation, &pairs, None));
        }
        if round == 20 {
            end(&mut reached.other);
        }
    }
    for request in &requests {
        if let Err(error) = request.wait(WAIT) {
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{way:?}: {error}");
            assert_eq!(error.fate(), MemoryFate::Settled, "{way:?}");
        }
    }
    // Its end is seen within the deadline, and from then on nothing is accepted.
    let until = std::time::Instant::now() + WAIT;
    let refused = loop {
        match reached.start(Operation::Read, &[(0, 0, 64)], None) {
            Err(error) => break error.kind(),
            Ok(request) => {
                if let Err(error) = request.wait(WAIT) {
                    break error.kind();
                }
            }
        }
        assert!(
            std::time::Instant::now() < until,
            "{way:?}: the end was not seen"
        );
    };
    assert_eq!(refused, ErrorKind::PeerLost, "{way:?}");
    assert_eq!(reached.agent.path_to(&reached.peer).backend, None);
    reached.local.deregister().wait(WAIT).unwrap();
}

const NOBODY: u32 = 65_534;

/// Root reaches anyone's memory, but not over this path.
#[test]
fn private_memory_of_another_user_s_process_is_refused_with_the_reason() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can start a process of another user");
        return;
    }
    let mut other = start_as(Some(NOBODY), "target", Way::Cma, &[]);
    let metadata = unhex(&other.expect("METADATA"));
    let agent = Way::Cma.agent("this");
    let peer = agent.load_peer(&metadata).unwrap();
    let report = agent.path_to(&peer);
    assert_eq!(report.backend, None);
    let (way, reason) = &report.refused[0];
    assert_eq!(*way, "cma");
    assert!(reason.contains("user 65534"), "{reason}");
}

/// Both are the same user's, not root's, and one does not let others look into its memory.
#[test]
fn memory_that_the_kernel_closes_is_refused_with_the_reason() {
    let user = rustix::process::geteuid().is_root().then_some(NOBODY);
    for (role, refused) in [("closed", true), ("target", false)] {
        let mut target = start_as(user, role, Way::Cma, &[]);
        let metadata = unhex(&target.expect("METADATA"));
        let mut reporter = start_as(user, "reporter", Way::Cma, &metadata);
        let report = reporter.expect("REPORT");
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let scoped = scope.is_ok_and(|scope| scope.trim() != "0");
        let expected = match (scoped, refused) {
            (true, _) => "ptrace_scope",
            (false, true) => "dumpable",
            (false, false) => "Some(\"cma\")",
        };
        assert!(report.contains(expected), "{report}");
    }
}

/// The process that asks cannot see the one that owns the memory, so it can't say whose memory to read.
#[test]
fn a_process_of_an_invisible_namespace_is_refused_with_the_reason() {
    let arguments = ["--pid", "--fork", "--kill-child"];
    let allowed = Command::new("unshare").args(arguments).arg("true").output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: unshare cannot make a process namespace here");
        return;
    }
    for way in [Way::Shm, Way::Cma] {
        let agent = way.agent("this");
        let _region = agent.register(way.memory(4096), OPEN).unwrap();
        let mut command = Command::new("unshare");
        command.args(arguments).arg(this_program());
        let mut other = start_with(command, "reporter", way, &agent.metadata());
        let report = other.expect("REPORT");
        assert!(report.contains("another pid namespace"), "{report}");
    }
}

/// The other process uses this one's memory. Stopped, it cannot give it back, so the region stays in use; dead, it
/// proves that it doesn't use it.
#[test]
fn memory_used_in_place_is_in_use_until_its_user_gives_it_back_or_is_dead() {
    for (way, dies) in [
        (Way::Shm, true),
        (Way::Shm, false),
        (Way::Cma, true),
        (Way::Cma, false),
        (Way::Ucx, true),
        (Way::Ucx, false),
    ] {
        let agent = way.agent("this");
        let export = agent.register(way.memory(4096), OPEN).unwrap();
        export.write_at(0, &pattern(4096, SEED)).unwrap();
        let metadata = agent.metadata();
        let mut other = start("initiator", way, &metadata);
        let checksum: u32 = other.expect("CHECKSUM").parse().unwrap();
        assert_eq!(checksum, export.checksum(0, 4096).unwrap());
        if dies {
            other.stop();
        }
        let returned = export.deregister();
        if dies {
            let busy = returned.wait(Duration::from_millis(50)).unwrap_err();
            assert_eq!(busy.kind(), ErrorKind::Busy, "{way:?}");
            other.kill();
        }
        returned.wait(WAIT).unwrap();
    }
}

/// The agent goes first, and the region that the other process uses is deregistered after. If the other process answers
/// the memory is free; if it cannot, the memory is never called free, although nobody listens for it any more.
#[test]
fn memory_used_in_place_outlives_its_agent_while_it_is_used() {
    for (way, stopped) in [
        (Way::Cma, false),
        (Way::Cma, true),
        (Way::Ucx, false),
        (Way::Ucx, true),
    ] {
        let agent = way.agent("this");
        let export = agent.register(way.memory(4096), OPEN).unwrap();
        let mut other = start("initiator", way, &agent.metadata());
        other.expect("CHECKSUM");
        if stopped {
            other.stop();
        }
        drop(agent);
        let returned = export.deregister();
        if stopped {
            let busy = returned.wait(Duration::from_millis(50)).unwrap_err();
            assert_eq!(busy.kind(), ErrorKind::Busy);
        } else {
            returned.wait(WAIT).unwrap();
        }
    }
}
