//! What happens at the limits of a process: many descriptors, many peers, no file descriptors, no locked memory. What
//! changes a whole process is done in another one, which is this program run again.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, and the other process speaks by printing"
)]

mod support;

use std::fs::File;
use std::io::BufRead;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Descriptor, FileEngineMode, FileOptions, HostMemory, Operation, PeerHandle, Region,
    RegionOptions, Request, RequestOptions, Side,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use support::child::{Again, NOBODY, ROLE, hex, unhex};
use support::{OPEN, Pair, WAIT, WAYS, Way, contents, pattern};

/// The body of the other processes; in the process that runs all tests there is nothing to do.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    match role.split_once(' ') {
        Some(("poor-initiator", way)) => poor_initiator(named(way)),
        Some(("poor-target", way)) => poor_target(named(way)),
        Some(("crowd", way)) => crowd(named(way)),
        Some(("unlocked", _)) => unlocked(),
        Some(("narrow", _)) => narrow(),
        _ => panic!("role {role}"),
    }
}

fn named(name: &str) -> Way {
    WAYS.into_iter().find(|way| way.name() == name).unwrap()
}

const MANY: u64 = 100_000;
const SMALL: u64 = 64;

/// Pairs of (local, remote) places, so that no two neighbours are adjacent on both sides.
fn scattered() -> impl Iterator<Item = (u64, u64)> {
    // Odd and no multiple of 5, so that every place is visited once.
    (0..MANY).map(|n| (n * SMALL, n * 33_333 % MANY * SMALL))
}

fn expected(data: &[u8]) -> Vec<u8> {
    let mut model = vec![0; data.len()];
    for (to, from) in scattered() {
        let (to, from, len) = (to as usize, from as usize, SMALL as usize);
        model[to..to + len].copy_from_slice(&data[from..from + len]);
    }
    model
}

/// 100,000 descriptors, none of them next to another, read and written back in one request, by every way to a peer.
#[test]
fn one_request_of_100_000_descriptors_moves_them_all() {
    for way in WAYS {
        let pair = Pair::new(way, MANY * SMALL);
        let data = pattern((MANY * SMALL) as usize, 5);
        pair.remote.write_at(0, &data).unwrap();
        let places: Vec<_> = scattered().map(|(to, from)| (to, from, SMALL)).collect();
        for operation in [Operation::Read, Operation::Write] {
            let request = pair.moves(operation, &places, RequestOptions::default());
            let done = request.wait(WAIT).unwrap();
            assert_eq!((done.backend, done.bytes), (way.name(), MANY * SMALL));
            assert_eq!(u64::from(request.telemetry().unwrap().descriptors), MANY);
            if operation == Operation::Read {
                assert!(contents(&pair.local) == expected(&data), "{way:?}");
                pair.remote.fill_at(0, MANY * SMALL, 0).unwrap();
            }
        }
        assert!(contents(&pair.remote) == data, "{way:?}");
    }
}

/// The same against a file, with each of the engines.
#[test]
fn one_request_of_100_000_descriptors_reads_and_writes_a_file() {
    for mode in [FileEngineMode::Uring, FileEngineMode::Blocking] {
        let agent = Agent::builder("files").build().unwrap();
        if let Err(error) = agent.start_file_engine(mode) {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            eprintln!("SKIPPED: {mode:?} does not run here: {error}");
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions {
            create: true,
            len_bytes: Some(MANY * SMALL),
            ..FileOptions::default()
        };
        let file = agent
            .open_file(folder.path().join("blocks"), &options)
            .unwrap();
        let data = pattern((MANY * SMALL) as usize, 6);
        let memory = || HostMemory::anonymous(MANY * SMALL).unwrap();
        let [from, to] = [(), ()].map(|()| agent.register(memory(), OPEN).unwrap());
        from.write_at(0, &data).unwrap();
        let moved = |operation, local: &Region, pairs: Vec<(u64, u64)>| {
            let pairs: Vec<(Descriptor, Descriptor)> = pairs
                .into_iter()
                .map(|(own, at)| (local.descriptor(own, SMALL), file.descriptor(at, SMALL)))
                .collect();
            let options = RequestOptions::default();
            let request = agent.transfer(operation, &pairs, Side::Local, options);
            request.unwrap().wait(WAIT).unwrap();
        };
        moved(Operation::Write, &from, scattered().collect());
        moved(
            Operation::Read,
            &to,
            (0..MANY).map(|n| (n * SMALL, n * SMALL)).collect(),
        );
        let mut model = vec![0; data.len()];
        for (own, at) in scattered() {
            let (own, at, len) = (own as usize, at as usize, SMALL as usize);
            model[at..at + len].copy_from_slice(&data[own..own + len]);
        }
        assert!(contents(&to) == model, "{mode:?}");
    }
}

const PEERS: usize = 1000;

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One agent reads from a thousand others at once. It starts no thread for them, and keeps a few file descriptors for
/// each, which it gives back with the peers.
#[test]
fn a_thousand_peers_cost_no_threads() {
    let wanted = 12 * PEERS as u64;
    if getrlimit(Resource::Nofile)
        .current
        .is_some_and(|limit| limit < wanted)
    {
        eprintln!("SKIPPED: a thousand agents in one process need {wanted} file descriptors");
        return;
    }
    for way in [Way::Memcpy, Way::Shm, Way::Tcp] {
        let role = format!("crowd {}", way.name());
        let status = Again::start("the_other_process", &role).finish();
        assert!(status.success(), "{way:?}: {status}");
    }
}

fn crowd(way: Way) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    let hub = way.agent("hub");
    let local = HostMemory::anonymous((PEERS * 4096) as u64).unwrap();
    let local = hub.register(local, RegionOptions::default()).unwrap();
    let others: Vec<(Agent, Region)> = (0..PEERS)
        .map(|n| {
            let agent = way.agent(&format!("peer {n}"));
            let region = agent.register(way.memory(4096), OPEN).unwrap();
            region.fill_at(0, 4096, n as u8).unwrap();
            (agent, region)
        })
        .collect();
    let (threads_before, files_before) = (threads(), open_files());
    let peers: Vec<PeerHandle> = others
        .iter()
        .map(|(agent, _)| hub.load_peer(&agent.metadata()).unwrap())
        .collect();
    let requests: Vec<Request> = peers
        .iter()
        .zip(&others)
        .enumerate()
        .map(|(n, (peer, (_, region)))| {
            let own = local.descriptor((n * 4096) as u64, 4096);
            let pairs = [(own, region.descriptor(0, 4096))];
            let options = RequestOptions::default();
            hub.transfer(Operation::Read, &pairs, Side::Peer(peer), options)
                .unwrap()
        })
        .collect();
    for request in &requests {
        assert_eq!(request.wait(WAIT).unwrap().backend, way.name());
    }
    for (n, block) in contents(&local).chunks(4096).enumerate() {
        assert!(block.iter().all(|&byte| byte == n as u8), "peer {n}");
    }
    assert_eq!(threads(), threads_before);
    // Both ends of each connection are in this process: a socket and, within the host, a descriptor of the process.
    let each = match way {
        Way::Memcpy => 0,
        Way::Shm => 4,
        _ => 2,
    };
    let files = open_files() - files_before;
    assert!(files <= each * PEERS, "{files} file descriptors");
    drop(requests);
    peers.iter().for_each(|peer| hub.forget_peer(peer));
    // The other ends notice by themselves.
    let until = std::time::Instant::now() + WAIT;
    while open_files() > files_before {
        assert!(std::time::Instant::now() < until, "{} stay", open_files());
        std::thread::yield_now();
    }
}

/// Every file descriptor that the process may have, but for some.
struct Hoard {
    _kept: Vec<File>,
}

impl Hoard {
    fn all_but(free: usize) -> Self {
        const LIMIT: u64 = 256;
        let maximum = getrlimit(Resource::Nofile).maximum;
        let limit = Rlimit {
            current: Some(LIMIT),
            maximum,
        };
        setrlimit(Resource::Nofile, limit).unwrap();
        let mut kept = Vec::new();
        let error = loop {
            match File::open("/dev/null") {
                Ok(file) => kept.push(file),
                Err(error) => break error,
            }
        };
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::MFILE.raw_os_error()),
            "{error}"
        );
        kept.truncate(kept.len() - free);
        Self { _kept: kept }
    }
}

const WITHIN_AND_BETWEEN_HOSTS: [Way; 3] = [Way::Shm, Way::Cma, Way::Tcp];

/// File descriptors that are left in turn, so that they run out at each step of a connection.
const FREE: std::ops::Range<usize> = 0..6;

fn names_the_limit(text: &str) -> bool {
    text.contains("Too many open files") || text.contains("file descriptors")
}

/// A process that has no file descriptors left says so, whatever it needs one for; the same agent goes on when there are
/// some.
#[test]
fn an_initiator_without_file_descriptors_says_so_and_recovers() {
    for way in WITHIN_AND_BETWEEN_HOSTS {
        let target = way.agent("target");
        let region = target.register(way.memory(4096), OPEN).unwrap();
        region.fill_at(0, 4096, 0x5a).unwrap();
        let role = format!("poor-initiator {}", way.name());
        let mut again = Again::start("the_other_process", &role);
        again.ask(&hex(&target.metadata()), "ENOUGH");
        assert!(again.finish().success(), "{way:?}");
    }
}

fn poor_initiator(way: Way) {
    let metadata = unhex(line().unwrap().trim());
    for free in FREE {
        let agent = way.agent("poor");
        let own = HostMemory::anonymous(4096).unwrap();
        let own = agent.register(own, RegionOptions::default()).unwrap();
        let peer = agent.load_peer(&metadata).unwrap();
        let read = || {
            let (region, _) = peer.regions()[0];
            let from = Descriptor {
                region,
                offset: 0,
                len: 4096,
            };
            let pairs = [(own.descriptor(0, 4096), from)];
            let options = RequestOptions::default();
            agent.transfer(Operation::Read, &pairs, Side::Peer(&peer), options)
        };
        let hoard = Hoard::all_but(free);
        let poor = read();
        if free == 0 {
            for refused in [
                HostMemory::shared(4096).map(drop),
                agent.notification_fd().map(drop),
                Way::Tcp.builder("another").build().map(drop),
            ] {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Io, "{error}");
                assert!(names_the_limit(&error.to_string()), "{error}");
            }
        }
        drop(hoard);
        match poor {
            Ok(request) => assert!(free > 0 && request.wait(WAIT).is_ok()),
            Err(error) => assert!(names_the_limit(&error.to_string()), "{free}: {error}"),
        }
        let request = read().unwrap();
        assert_eq!(request.wait(WAIT).unwrap().backend, way.name());
        assert!(contents(&own).iter().all(|&byte| byte == 0x5a));
    }
    println!("ENOUGH");
}

/// A process that has no file descriptors left for those who come does not let them wait, and does not spin; it serves
/// them when there are some.
#[test]
fn a_target_without_file_descriptors_turns_peers_away_and_recovers() {
    for way in WITHIN_AND_BETWEEN_HOSTS {
        let role = format!("poor-target {}", way.name());
        let mut again = Again::start("the_other_process", &role);
        let metadata = unhex(&again.expect("METADATA"));
        for free in FREE {
            let agent = way.agent("initiator");
            let peer = agent.load_peer(&metadata).unwrap();
            again.ask(&format!("hoard {free}"), "HOARDED");
            let poor = agent.path_to(&peer);
            again.ask("free", "FREED");
            if poor.backend.is_none() {
                let reasons = format!("{poor:?}");
                let ended = ["closed", "reset", "Broken pipe"];
                assert!(
                    ended.iter().any(|end| reasons.contains(end)),
                    "{free}: {reasons}"
                );
            } else {
                assert!(free > 0, "{poor:?}");
            }
            let rich = agent.path_to(&peer);
            assert_eq!(rich.backend, Some(way.name()), "{free}: {rich:?}");
        }
        assert!(again.finish().success(), "{way:?}");
    }
}

fn poor_target(way: Way) {
    let agent = way.agent("poor");
    let region = agent.register(way.memory(4096), OPEN).unwrap();
    region.fill_at(0, 4096, 0x5a).unwrap();
    println!("METADATA {}", hex(&agent.metadata()));
    let mut hoard = None;
    while let Some(order) = line() {
        match order.trim().split_once(' ') {
            Some((_, free)) => {
                hoard = Some(Hoard::all_but(free.parse().unwrap()));
                println!("HOARDED");
            }
            None => {
                drop(hoard.take());
                println!("FREED");
            }
        }
    }
}

/// What the process that started this one says; none at the end.
fn line() -> Option<String> {
    let mut line = String::new();
    let count = std::io::stdin().lock().read_line(&mut line).unwrap();
    (count > 0).then_some(line)
}

/// A user without rights who may lock no memory has every way that is there: nothing needs locked memory here.
#[test]
fn nothing_needs_locked_memory() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can start a process of another user");
        return;
    }
    let again = Again::start_as(Some(NOBODY), "the_other_process", "unlocked all");
    assert!(again.finish().success());
}

fn unlocked() {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Memlock, none).unwrap();
    for way in WAYS {
        let pair = Pair::new(way, 1 << 20);
        let data = pattern(1 << 20, 8);
        pair.remote.write_at(0, &data).unwrap();
        let places = [(0, 0, 1 << 20)];
        let read = pair.moves(Operation::Read, &places, RequestOptions::default());
        assert_eq!(read.wait(WAIT).unwrap().backend, way.name());
        assert!(contents(&pair.local) == data, "{way:?}");
    }
    let agent = Agent::builder("files").build().unwrap();
    let engine = agent.start_file_engine(FileEngineMode::Auto).unwrap();
    println!("files without locked memory: {engine:?}");
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions {
        create: true,
        len_bytes: Some(1 << 20),
        ..FileOptions::default()
    };
    let file = agent.open_file(folder.path().join("f"), &options).unwrap();
    let memory = HostMemory::anonymous(1 << 20).unwrap();
    let memory = agent.register(memory, RegionOptions::default()).unwrap();
    let data = pattern(1 << 20, 9);
    memory.write_at(0, &data).unwrap();
    let pairs = [(memory.descriptor(0, 1 << 20), file.descriptor(0, 1 << 20))];
    // So often that the engine would have the kernel hold this memory, if it might.
    for _ in 0..10 {
        for operation in [Operation::Write, Operation::Read] {
            let options = RequestOptions::default();
            let moved = agent.transfer(operation, &pairs, Side::Local, options);
            moved.unwrap().wait(WAIT).unwrap();
            if operation == Operation::Write {
                memory.fill_at(0, 1 << 20, 0).unwrap();
            }
        }
        assert!(contents(&memory) == data);
    }
}

/// Shared memory that this process has no address space left for is reached over the network, and the report says why. What
/// was mapped before stays in use.
#[test]
fn memory_that_cannot_be_mapped_is_reached_another_way() {
    let again = Again::start("the_other_process", "narrow all");
    assert!(again.finish().success());
}

/// How much of the address space is taken.
fn taken() -> u64 {
    let sizes = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = sizes.split(' ').next().unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

fn narrow() {
    const VAST: u64 = 4 << 30;
    let build = |name| {
        let builder = Agent::builder(name).memcpy(false).cma(false).shm(true);
        builder.tcp(Some(support::loopback())).build().unwrap()
    };
    let pair = Pair::of(build("initiator"), build("target"), 1 << 20, OPEN);
    let vast = HostMemory::shared(VAST).unwrap();
    let vast = pair.target.register(vast, OPEN).unwrap();
    vast.fill_at(VAST - 4096, 4096, 0x33).unwrap();
    let whole = || pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default());
    assert_eq!(whole().wait(WAIT).unwrap().backend, "shm");

    let maximum = getrlimit(Resource::As).maximum;
    let limit = Rlimit {
        current: Some(taken() + VAST / 2),
        maximum,
    };
    setrlimit(Resource::As, limit).unwrap();
    let peer = pair.initiator.load_peer(&pair.target.metadata()).unwrap();
    let places = [(
        pair.local.descriptor(0, 4096),
        vast.descriptor(VAST - 4096, 4096),
    )];
    let options = RequestOptions::default();
    let side = Side::Peer(&peer);
    let read = pair
        .initiator
        .transfer(Operation::Read, &places, side, options);
    let read = read.unwrap();
    assert_eq!(read.wait(WAIT).unwrap().backend, "tcp");
    assert!(contents(&pair.local)[..4096].iter().all(|&b| b == 0x33));
    let report = pair.initiator.path_to(&peer);
    assert_eq!(report.refused.len(), 1, "{report:?}");
    let (way, reason) = &report.refused[0];
    assert_eq!(*way, "shm");
    assert!(
        reason.contains("left: ") && reason.contains("Cannot allocate memory"),
        "{reason}"
    );
}
