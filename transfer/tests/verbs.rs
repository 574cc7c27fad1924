//! RDMA: what is told of it, how it ends, and that nothing lands after the end. Skipped where there is no device;
//! `make test-rdma` has one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, and the other process speaks by printing"
)]

mod support;

use std::process::Command;
use std::time::Instant;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Descriptor, HostMemory, Operation, Priority, Request, RequestOptions, Side, VerbsOptions,
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use support::child::{Again, ROLE, hex, unhex};
use support::hold::hold;
use support::overtaking::overtakes;
use support::{OPEN, Pair, WAIT, Way, contents, has_rdma, pattern, verbs_options};

/// So much that it takes soft-RoCE a while.
const LONG: u64 = 32 << 20;

/// The reason says what is missing: the library, a device, or a port that is up.
#[test]
fn what_is_missing_is_told() {
    let wanted = VerbsOptions {
        device: Some("none:7".to_owned()),
        ..VerbsOptions::default()
    };
    let error = Agent::builder("a").verbs(Some(wanted)).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(
        text.contains("\"none\"") || text.contains("libibverbs not found"),
        "{text}"
    );
    let wrong = VerbsOptions {
        timeout: 99,
        ..VerbsOptions::default()
    };
    let error = Agent::builder("a").verbs(Some(wrong)).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// Device, port, GID and MTU, which is what both sides allow.
#[test]
fn a_path_tells_what_it_uses() {
    if !has_rdma() {
        return;
    }
    let target = Way::Verbs.agent("target");
    let small = VerbsOptions {
        mtu: Some(512),
        ..VerbsOptions::default()
    };
    for (options, mtu) in [(VerbsOptions::default(), "MTU "), (small, "MTU 512,")] {
        let builder = Agent::builder("initiator").memcpy(false).shm(false);
        let initiator = builder.verbs(Some(options)).build().unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        let report = initiator.path_to(&peer);
        assert_eq!(report.backend, Some("verbs"), "{report:?}");
        for part in ["verbs over ", " port 1, GID ", "RoCE v2", mtu] {
            assert!(report.why.contains(part), "{report:?}");
        }
    }
}

/// An agent without verbs beside one with it: the reason is told.
#[test]
fn a_peer_without_verbs_is_refused_with_the_reason() {
    if !has_rdma() {
        return;
    }
    let target = Agent::builder("target").build().unwrap();
    let initiator = Way::Verbs.agent("initiator");
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let reason = format!("{:?}", initiator.path_to(&peer).refused);
    assert!(reason.contains("does not offer verbs"), "{reason}");
}

/// Sizes around the message's fragments, empty and full; each arrives whole, and in order.
#[test]
fn notifications_of_all_sizes_arrive() {
    if !has_rdma() {
        return;
    }
    let pair = Pair::new(Way::Verbs, 1 << 16);
    let sizes = [0_usize, 1, 4000, 4085, 4086, 4087, 8192, 65_536];
    for (seed, &size) in sizes.iter().enumerate() {
        let sent = pattern(size, seed as u64);
        let request = pair
            .initiator
            .notify(&pair.peer, sent.clone().into())
            .unwrap();
        request.wait(WAIT).unwrap();
        let got = pair.target.notifications();
        assert_eq!(got.len(), 1);
        assert!(got[0].bytes == sent, "{size} bytes");
    }
}

/// More pieces than a send queue has room for, small and large, both ways: the queue never overflows.
#[test]
fn requests_wait_for_room_in_the_send_queue() {
    if !has_rdma() {
        return;
    }
    let pair = Pair::new(Way::Verbs, 4 << 20);
    let data = pattern(4 << 20, 1);
    pair.local.write_at(0, &data).unwrap();
    // Every second kilobyte, so that none are merged.
    let pieces: Vec<_> = (0..1500).map(|at| (at * 2048, at * 2048, 1024)).collect();
    let requests: Vec<_> = (0..3)
        .map(|_| pair.moves(Operation::Write, &pieces, RequestOptions::default()))
        .collect();
    for request in &requests {
        request.wait(WAIT).unwrap();
    }
    let there = contents(&pair.remote);
    for &(at, _, len) in &pieces {
        let range = at as usize..(at + len) as usize;
        assert!(there[range.clone()] == data[range], "at {at}");
    }
    pair.local.write_at(0, &vec![0; 4 << 20]).unwrap();
    let request = pair.moves(Operation::Read, &pieces, RequestOptions::default());
    request.wait(WAIT).unwrap();
    assert!(contents(&pair.local)[..1024] == data[..1024]);
}

/// Many offloads are posted, then one fetch: it is done before most of them.
#[test]
fn a_fetch_overtakes_offloads() {
    if !has_rdma() {
        return;
    }
    const BULK: u64 = 8 << 20;
    let pair = Pair::new(Way::Verbs, BULK);
    let background = RequestOptions {
        priority: Priority::Background,
        ..RequestOptions::default()
    };
    // Made before, as that takes its turn beside what is under way.
    let made = |request: Request| {
        request.wait(WAIT).unwrap();
        request
    };
    let offload = || made(pair.moves(Operation::Write, &[(0, 0, BULK)], background.clone()));
    let offloads: Vec<_> = std::iter::repeat_with(offload).take(8).collect();
    let options = RequestOptions::default();
    let fetch = made(pair.moves(Operation::Read, &[(0, 0, 4096)], options));
    overtakes("verbs", || {
        for request in offloads.iter().chain([&fetch]) {
            request.post().unwrap();
        }
        (offloads.iter().collect(), &fetch)
    });
}

/// The target is held while it takes the first notification: those beyond what may be unanswered wait, those that are given up
/// end at once, and the others arrive in order.
#[test]
fn notifications_beyond_what_a_path_takes_wait_for_their_turn() {
    if !has_rdma() {
        return;
    }
    const NOTIFICATIONS: u32 = 6000;
    let pair = Pair::new(Way::Verbs, 4096);
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
    for request in &requests {
        request.wait(WAIT).unwrap();
    }
    let came: Vec<u32> = pair
        .target
        .notifications()
        .iter()
        .map(|one| u32::from_le_bytes(one.bytes[..].try_into().unwrap()))
        .collect();
    assert_eq!(came, (1..NOTIFICATIONS - 100).collect::<Vec<u32>>());
}

/// A region that was used goes back to its owner while both sides live, again and again; later requests are refused.
#[test]
fn used_memory_is_given_back() {
    if !has_rdma() {
        return;
    }
    for round in 0..8 {
        let pair = Pair::new(Way::Verbs, 1 << 16);
        let data = pattern(1 << 16, round);
        pair.local.write_at(0, &data).unwrap();
        let whole = [(0, 0, 1 << 16)];
        let request = pair.moves(Operation::Write, &whole, RequestOptions::default());
        request.wait(WAIT).unwrap();
        assert!(contents(&pair.remote) == data);
        pair.remote.deregister().wait(WAIT).unwrap();
        request.post().unwrap();
        let error = request.wait(WAIT).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Denied),
            "{error}"
        );
        pair.local.deregister().wait(WAIT).unwrap();
    }
}

/// Memory is deregistered while a long write to it is under way: its owner gets it back all the same, and from then on
/// no byte of it changes.
#[test]
fn memory_that_is_deregistered_early_is_written_no_more() {
    if !has_rdma() {
        return;
    }
    let (initiator, target) = (Way::Verbs.agent("initiator"), Way::Verbs.agent("target"));
    let file = memfd_create("verbs", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, LONG).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    let memory = || HostMemory::of_file(file.try_clone().unwrap()).unwrap();
    // The same memory, for looking at it afterwards.
    let view = Agent::builder("view")
        .build()
        .unwrap()
        .register(memory(), OPEN)
        .unwrap();
    let local = initiator
        .register(HostMemory::anonymous(LONG).unwrap(), OPEN)
        .unwrap();
    let remote = target.register(memory(), OPEN).unwrap();
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    local.fill_at(0, LONG, 1).unwrap();
    let pairs = [(local.descriptor(0, LONG), remote.descriptor(0, LONG))];
    let request = initiator
        .transfer(
            Operation::Write,
            &pairs,
            Side::Peer(&peer),
            RequestOptions::default(),
        )
        .unwrap();
    remote.deregister().wait(WAIT).unwrap();
    view.fill_at(0, LONG, 2).unwrap();
    if let Err(error) = request.wait(WAIT) {
        let kinds = [ErrorKind::Denied, ErrorKind::NotFound, ErrorKind::PeerLost];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
    assert!(request.wait_drained(WAIT));
    assert!(contents(&view).iter().all(|&byte| byte == 2));
    local.deregister().wait(WAIT).unwrap();
}

/// A long write is given up: once its memory is settled neither side's changes any more, and the path goes on.
#[test]
fn a_write_that_was_given_up_lands_no_later_than_it_is_settled() {
    if !has_rdma() {
        return;
    }
    let pair = Pair::new(Way::Verbs, LONG);
    pair.local.write_at(0, &vec![1; LONG as usize]).unwrap();
    for _ in 0..3 {
        let request = pair.moves(Operation::Write, &[(0, 0, LONG)], RequestOptions::default());
        request.cancel();
        let error = request.wait(WAIT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(request.wait_drained(WAIT));
        pair.remote.write_at(0, &vec![2; LONG as usize]).unwrap();
        let request = pair.moves(Operation::Write, &[(0, 0, 8)], RequestOptions::default());
        request.wait(WAIT).unwrap();
        let there = contents(&pair.remote);
        assert!(there[..8] == [1; 8] && there[8..].iter().all(|&byte| byte == 2));
    }
}

/// Peers come and go: each is forgotten with requests in flight, and met again.
#[test]
fn a_forgotten_peer_is_met_again() {
    if !has_rdma() {
        return;
    }
    let (initiator, target) = (Way::Verbs.agent("initiator"), Way::Verbs.agent("target"));
    let bytes = 4 << 20;
    let memory = || Way::Verbs.memory(bytes);
    let local = initiator.register(memory(), OPEN).unwrap();
    let remote = target.register(memory(), OPEN).unwrap();
    for _ in 0..5 {
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        let pairs = [(local.descriptor(0, bytes), remote.descriptor(0, bytes))];
        let request = initiator
            .transfer(
                Operation::Write,
                &pairs,
                Side::Peer(&peer),
                RequestOptions::default(),
            )
            .unwrap();
        initiator.forget_peer(&peer);
        if let Err(error) = request.wait(WAIT) {
            assert_eq!(error.kind(), ErrorKind::PeerLost);
        }
        assert!(request.wait_drained(WAIT));
    }
    remote.deregister().wait(WAIT).unwrap();
}

/// Two agents at the two ends of a link that may be disturbed, and the interface at the first one's end; none where there
/// is no such link (`KVFABRIC_RDMA_LINK`, `KVFABRIC_RDMA_ENDS`).
fn ends() -> Option<(Pair, String)> {
    let (Ok(link), Ok(devices)) = (
        std::env::var("KVFABRIC_RDMA_LINK"),
        std::env::var("KVFABRIC_RDMA_ENDS"),
    ) else {
        eprintln!("SKIPPED: no RDMA link that may be disturbed");
        return None;
    };
    let (near, far) = devices.split_once(',').unwrap();
    let agent = |name: &str, device: &str| {
        let device = Some(device.to_owned());
        let options = VerbsOptions {
            device,
            ..verbs_options()
        };
        let builder = Agent::builder(name).memcpy(false).shm(false);
        builder.verbs(Some(options)).build().unwrap()
    };
    let (initiator, target) = (agent("initiator", near), agent("target", far));
    Some((Pair::of(initiator, target, 4 << 20, OPEN), link))
}

fn runs(program: &str, arguments: &str) {
    let status = Command::new(program).args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "{program} {arguments}");
}

/// How often the device of the first end has sent something again.
fn sent_again() -> u64 {
    let devices = std::env::var("KVFABRIC_RDMA_ENDS").unwrap();
    let device = devices.split(',').next().unwrap();
    let counter = |name: &str| -> u64 {
        let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/{name}");
        std::fs::read_to_string(file)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    counter("completer_retry_err") + counter("rcvd_seq_err")
}

/// Two of a hundred packets are lost, and all are late: everything arrives whole, both ways.
#[test]
fn bytes_arrive_whole_over_a_link_that_loses_packets() {
    let Some((pair, link)) = ends() else { return };
    let data = pattern(1 << 20, 3);
    pair.local.write_at(0, &data).unwrap();
    let before = sent_again();
    runs(
        "tc",
        &format!("qdisc add dev {link} root netem loss 2% delay 1ms"),
    );
    let there = [(0, 0, 1 << 20)];
    let back = [(1 << 20, 0, 1 << 20)];
    for (operation, pieces) in [(Operation::Write, there), (Operation::Read, back)] {
        let request = pair.moves(operation, &pieces, RequestOptions::default());
        request.wait(WAIT * 2).unwrap();
    }
    runs("tc", &format!("qdisc del dev {link} root"));
    assert!(contents(&pair.remote)[..1 << 20] == data);
    assert!(contents(&pair.local)[1 << 20..2 << 20] == data);
    assert!(sent_again() > before, "nothing was lost");
}

/// A write is given up that stands behind others on a slow link, for longer than what stands still may: it ends when they have, and they
/// and those behind it are done on the same path.
#[test]
fn what_was_given_up_behind_others_ends_none_of_them() {
    const BYTES: u64 = 4 << 20;
    let Some((pair, link)) = ends() else { return };
    let written = || pair.initiator.path_to(&pair.peer).connections[0].sent;
    let before = written();
    runs(
        "tc",
        &format!("qdisc add dev {link} root netem rate 80mbit"),
    );
    let mut requests: Vec<Request> = (0..10)
        .map(|_| {
            pair.moves(
                Operation::Write,
                &[(0, 0, BYTES)],
                RequestOptions::default(),
            )
        })
        .collect();
    let until = Instant::now() + WAIT;
    while written() == before {
        assert!(Instant::now() < until, "nothing is written");
    }
    // As much as a path has open stands before it and behind it.
    let given_up = requests.remove(6);
    given_up.cancel();
    let error = given_up.wait(WAIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert!(given_up.wait_drained(WAIT));
    for request in &requests {
        request.wait(WAIT * 2).unwrap();
    }
    runs("tc", &format!("qdisc del dev {link} root"));
    assert!(written() - before >= 9 * BYTES, "another path was made");
}

/// The cable is pulled in the middle of a write: the request fails with the device's reason, its memory is settled. Plugged
/// in again, the same agents reach each other again.
#[test]
fn a_path_over_a_link_that_goes_down_is_lost_and_comes_back() {
    let Some((pair, link)) = ends() else { return };
    let data = pattern(4 << 20, 4);
    pair.local.write_at(0, &data).unwrap();
    let all = [(0, 0, 4 << 20)];
    let options = RequestOptions::default;
    pair.moves(Operation::Write, &all, options())
        .wait(WAIT)
        .unwrap();
    runs("ip", &format!("link set {link} down"));
    let error = pair
        .moves(Operation::Write, &all, options())
        .wait(WAIT)
        .unwrap_err();
    let of_the_link = matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io);
    assert!(of_the_link, "{error}");
    assert!(error.to_string().contains("vendor code"), "{error}");
    runs("ip", &format!("link set {link} up"));
    pair.remote.write_at(0, &vec![0; 4 << 20]).unwrap();
    let until = Instant::now() + WAIT * 2;
    loop {
        let local = pair
            .initiator
            .prepare(Side::Local, &[pair.local.descriptor(0, 4 << 20)]);
        let there = [pair.remote.descriptor(0, 4 << 20)];
        let remote = pair
            .initiator
            .prepare(Side::Peer(&pair.peer), &there)
            .unwrap();
        let made = pair
            .initiator
            .request(Operation::Write, &local.unwrap(), &remote, options());
        let done = made.map_err(|e| e.to_string()).and_then(|request| {
            request.post().map_err(|e| e.to_string())?;
            request.wait(WAIT).map_err(|e| e.to_string())
        });
        match done {
            Ok(_) => break,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::yield_now();
    }
    assert!(contents(&pair.remote) == data);
}

/// The target's thread is held: checksums far beyond what the path asks for at once are waited for, those that are given up
/// end, and the others agree when it goes on.
#[test]
fn questions_beyond_what_a_path_takes_wait_for_their_turn() {
    /// One question each.
    const REQUESTS: usize = 1300;
    const RANGES: u64 = 8;
    const BYTES: u64 = RANGES * 8;
    if !has_rdma() {
        return;
    }
    let pair = Pair::new(Way::Verbs, BYTES);
    let data = pattern(BYTES as usize, 31);
    pair.remote.write_at(0, &data).unwrap();
    // Moved as one, and asked for one by one.
    let ranges: Vec<(u64, u64, u64)> = (0..RANGES).map(|n| (n * 8, n * 8, 8)).collect();
    let read = || {
        let options = RequestOptions {
            checksum: true,
            deadline: Some(10 * WAIT),
            ..RequestOptions::default()
        };
        pair.moves(Operation::Read, &ranges, options)
    };
    read().wait(WAIT).unwrap();
    let mut notified = pair.target.notified();
    let held = hold(&mut notified).unwrap();
    let notice = pair
        .initiator
        .notify(&pair.peer, b"one"[..].into())
        .unwrap();
    held.wait();
    let mut requests: Vec<Request> = (0..REQUESTS).map(|_| read()).collect();
    for request in requests.split_off(REQUESTS - 50) {
        request.cancel();
        assert!(request.wait_drained(WAIT));
    }
    drop(held);
    notice.wait(WAIT).unwrap();
    for request in &requests {
        request.wait(10 * WAIT).unwrap();
    }
    assert!(contents(&pair.local) == data);
}

/// What a target in another process does: offers memory, says so, and waits.
#[test]
fn body_of_another_process() {
    if std::env::var(ROLE).as_deref() != Ok("verbs target") {
        return;
    }
    let agent = Way::Verbs.agent("target");
    let _region = agent
        .register(HostMemory::shared(LONG).unwrap(), OPEN)
        .unwrap();
    println!("METADATA {}", hex(&agent.metadata()));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// The target's process is killed in the middle of a write: the request fails, its memory is settled, and another target
/// is reached from the same agent.
#[test]
fn a_peer_killed_in_the_middle_of_a_write_is_lost() {
    if !has_rdma() {
        return;
    }
    let initiator = Way::Verbs.agent("initiator");
    let local = initiator
        .register(HostMemory::anonymous(LONG).unwrap(), OPEN)
        .unwrap();
    for kills in [true, true, false] {
        let mut target = Again::start("body_of_another_process", "verbs target");
        let told = target.expect("METADATA ");
        let metadata = unhex(&told);
        let peer = initiator.load_peer(&metadata).unwrap();
        let region = peer.regions()[0].0;
        let bytes = if kills { LONG } else { 1 << 20 };
        let there = Descriptor {
            region,
            offset: 0,
            len: bytes,
        };
        let pairs = [(local.descriptor(0, bytes), there)];
        let options = RequestOptions::default();
        let request = initiator
            .transfer(Operation::Write, &pairs, Side::Peer(&peer), options)
            .unwrap();
        if !kills {
            request.wait(WAIT).unwrap();
            continue;
        }
        target.kill();
        let error = request.wait(WAIT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        assert!(request.wait_drained(WAIT));
        initiator.forget_peer(&peer);
    }
    local.deregister().wait(WAIT).unwrap();
}
