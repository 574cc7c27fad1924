//! Several RDMA ports between two agents: large requests use all of them, small ones the first, and what a lost one had not
//! finished goes over the others. Skipped where there are no two links that may be disturbed; `make test-rdma` has them.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says when it is skipped"
)]

mod support;

use std::process::Command;
use std::time::Instant;

use kvfabric_transfer::{
    Agent, ConnectionReport, HostMemory, NOTIFICATION_BYTES_MAX, Operation, PathReport, Request,
    RequestOptions, Side, Status, VerbsOptions,
};

use support::{OPEN, Pair, WAIT, contents, pattern, verbs_options};

/// So much that it takes soft-RoCE a while.
const LONG: u64 = 32 << 20;

/// As often as that is moved, so that it lasts longer than a program takes to start there.
const ROUNDS: u64 = 4;

/// The links, and the devices at their near and far ends; none where there are none (`KVFABRIC_RDMA_LINKS`,
/// `KVFABRIC_RDMA_NEAR`, `KVFABRIC_RDMA_FAR`).
fn links() -> Option<(Vec<String>, String, String)> {
    let named = |name: &str| std::env::var(format!("KVFABRIC_RDMA_{name}")).ok();
    let (Some(links), Some(near), Some(far)) = (named("LINKS"), named("NEAR"), named("FAR")) else {
        assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "no links");
        eprintln!("SKIPPED: no two RDMA links that may be disturbed");
        return None;
    };
    support::tell();
    let links = links.split(',').map(str::to_owned).collect();
    Some((links, near, far))
}

/// Soft-RoCE takes one more for ever.
const RETRIES: u8 = 6;

/// A quarter of a second for each of them: an emulated machine that is busy otherwise stands still for as long as devices try by
/// default, and a rail that was to stay is lost.
const TIMEOUT: u8 = 16;

fn agent(name: &str, devices: &str, rails: u8) -> Agent {
    agent_that_tries(RETRIES, name, devices, rails)
}

fn agent_that_tries(retries: u8, name: &str, devices: &str, rails: u8) -> Agent {
    let options = VerbsOptions {
        device: Some(devices.to_owned()),
        rails,
        retries,
        timeout: TIMEOUT,
        ..verbs_options()
    };
    let builder = Agent::builder(name).memcpy(false).shm(false);
    builder.verbs(Some(options)).build().unwrap()
}

fn pair(near: &str, far: &str, bytes: u64) -> Pair {
    pair_that_tries(RETRIES, near, far, bytes)
}

fn pair_that_tries(retries: u8, near: &str, far: &str, bytes: u64) -> Pair {
    let agent = |name, devices| agent_that_tries(retries, name, devices, 8);
    let (initiator, target) = (agent("initiator", near), agent("target", far));
    let pair = Pair::of(initiator, target, bytes, OPEN);
    // Each rail has been answered over.
    until(|| rails(&pair).len() == 2 && rails(&pair).iter().all(|rail| rail.lost.is_none()));
    pair
}

fn report(pair: &Pair) -> PathReport {
    pair.initiator.path_to(&pair.peer)
}

fn rails(pair: &Pair) -> Vec<ConnectionReport> {
    report(pair).connections
}

fn until(mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + WAIT;
    while !holds() {
        assert!(Instant::now() < end, "it never came so far");
        std::thread::yield_now();
    }
}

fn is_done(request: &Request) -> bool {
    !matches!(request.poll(), Status::InFlight)
}

fn runs(program: &str, arguments: &str) {
    let status = Command::new(program).args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "{program} {arguments}");
}

/// What a request has moved by each rail since.
fn moved(pair: &Pair, since: &[ConnectionReport]) -> Vec<u64> {
    let now = rails(pair);
    let pairs = now.iter().zip(since);
    pairs
        .map(|(now, then)| now.sent + now.received - then.sent - then.received)
        .collect()
}

/// Both ways, of what the devices count as well: each rail carries a good part of a large request, and the first one alone
/// what is small.
#[test]
fn large_requests_use_all_rails_and_small_ones_the_first() {
    let Some((_, near, far)) = links() else {
        return;
    };
    const BYTES: u64 = 8 << 20;
    let pair = pair(&near, &far, BYTES);
    let data = pattern(BYTES as usize, 1);
    pair.local.write_at(0, &data).unwrap();
    let device = near.split(',').nth(1).unwrap();
    let packets = || -> u64 {
        let counter = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
        std::fs::read_to_string(counter)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    for operation in [Operation::Write, Operation::Read] {
        let (before, sent) = (rails(&pair), packets());
        let whole = [(0, 0, BYTES)];
        let request = pair.moves(operation, &whole, RequestOptions::default());
        request.wait(WAIT).unwrap();
        let moved = moved(&pair, &before);
        assert_eq!(moved.iter().sum::<u64>(), BYTES);
        assert!(moved.iter().all(|&bytes| bytes >= BYTES / 8), "{moved:?}");
        // At the greatest MTU; reads are asked for by few packets.
        if operation == Operation::Write {
            assert!(packets() - sent >= moved[1] / 4096, "{moved:?}");
            assert!(contents(&pair.remote) == data);
            pair.local.write_at(0, &vec![0; BYTES as usize]).unwrap();
        }
        let before = rails(&pair);
        for at in 0..20 {
            let small = [(at * 4096, at * 4096, 4096)];
            let request = pair.moves(operation, &small, RequestOptions::default());
            request.wait(WAIT).unwrap();
        }
        assert_eq!(self::moved(&pair, &before), [20 * 4096, 0]);
        pair.local.write_at(0, &data).unwrap();
    }
    assert!(contents(&pair.local) == data);
    let text = report(&pair).why;
    for device in near.split(',') {
        assert!(text.contains(&format!("{device} port 1, GID ")), "{text}");
    }
}

/// Requests that are under way when one of their rails is lost.
fn lose_a_rail(operation: Operation, how: (&str, &str), lost: usize) {
    lose_a_rail_of(RETRIES, operation, how, lost);
}

fn lose_a_rail_of(retries: u8, operation: Operation, (lose, restore): (&str, &str), lost: usize) {
    let Some((links, near, far)) = links() else {
        return;
    };
    let pair = pair_that_tries(retries, &near, &far, LONG);
    let data = pattern(LONG as usize, 2);
    match operation {
        Operation::Write => pair.local.write_at(0, &data).unwrap(),
        Operation::Read => pair.remote.write_at(0, &data).unwrap(),
    }
    let before = rails(&pair);
    let whole = [(0, 0, LONG)];
    let requests: Vec<Request> = (0..ROUNDS)
        .map(|_| pair.moves(operation, &whole, RequestOptions::default()))
        .collect();
    until(|| moved(&pair, &before).iter().all(|&bytes| bytes > 0));
    let far_links = std::env::var("KVFABRIC_RDMA_FAR_LINKS").unwrap();
    let far_link = far_links.split(',').nth(lost).unwrap();
    let words = |text: &str| text.replace("LINK", &links[lost]).replace("FAR", far_link);
    let (program, arguments) = lose.split_once(' ').unwrap();
    runs(program, &words(arguments));
    let is_over = requests.iter().all(is_done);
    assert!(!is_over, "all was over before anything was lost");
    for request in &requests {
        request.wait(WAIT * 3).unwrap();
    }
    let there = match operation {
        Operation::Write => contents(&pair.remote),
        Operation::Read => contents(&pair.local),
    };
    assert!(there == data);
    // Each piece is done once: nothing was begun anew.
    assert_eq!(moved(&pair, &before).iter().sum::<u64>(), ROUNDS * LONG);
    let reports = rails(&pair);
    assert!(reports[lost].lost.is_some(), "{reports:?}");
    assert!(reports[1 - lost].lost.is_none(), "{reports:?}");
    let text = report(&pair).why;
    assert!(text.contains("(not used: "), "{text}");
    let ports = pair.initiator.stats().ports;
    assert!(ports[lost].rails_lost > 0, "{ports:?}");
    assert_eq!(ports[1 - lost].rails_lost, 0, "{ports:?}");
    assert!(ports[lost].pieces_repeated > 0, "{ports:?}");
    let counted: u64 = ports
        .iter()
        .map(|port| port.bytes_read + port.bytes_written)
        .sum();
    assert_eq!(counted, ROUNDS * LONG, "{ports:?}");
    // What comes now goes over the other one alone.
    let before = rails(&pair);
    let request = pair.moves(operation, &[(0, 0, 2 << 20)], RequestOptions::default());
    request.wait(WAIT).unwrap();
    assert_eq!(moved(&pair, &before)[lost], 0);
    let (program, arguments) = restore.split_once(' ').unwrap();
    runs(program, &words(arguments));
    until(|| rails(&pair)[lost].lost.is_none());
    let before = rails(&pair);
    let request = pair.moves(operation, &[(0, 0, 8 << 20)], RequestOptions::default());
    request.wait(WAIT).unwrap();
    assert!(moved(&pair, &before).iter().all(|&bytes| bytes > 0));
    pair.remote.deregister().wait(WAIT).unwrap();
    pair.local.deregister().wait(WAIT).unwrap();
}

const PULL: (&str, &str) = ("ip link set LINK down", "ip link set LINK up");
const DROWN: (&str, &str) = (
    "tc qdisc add dev LINK root netem loss 100%",
    "tc qdisc del dev LINK root",
);

/// The cable of the first rail, by which messages go, is pulled and plugged in again.
#[test]
fn a_write_outlives_the_cable_of_its_first_rail() {
    lose_a_rail(Operation::Write, PULL, 0);
}

#[test]
fn a_read_outlives_the_cable_of_its_second_rail() {
    lose_a_rail(Operation::Read, PULL, 1);
}

/// Nobody tells of it: the device gives up after it has sent often enough.
#[test]
fn a_write_outlives_a_rail_that_carries_nothing_any_more() {
    lose_a_rail(Operation::Write, DROWN, 1);
}

#[test]
fn a_read_outlives_a_rail_that_carries_nothing_any_more() {
    lose_a_rail(Operation::Read, DROWN, 0);
}

/// A device that never gives up: that nothing ends any more is seen without it.
#[test]
fn a_write_outlives_a_rail_whose_device_never_gives_up() {
    lose_a_rail_of(7, Operation::Write, DROWN, 1);
}

/// Packets wait in the port for longer than this test takes, and soft-RoCE takes a queue pair away only after its packets: the
/// others go on meanwhile. Of the side that sends what is written, and of the one that sends what is read.
const HOLD: (&str, &str) = (
    "tc qdisc add dev LINK root netem delay 200s",
    "tc qdisc del dev LINK root",
);

#[test]
fn a_write_outlives_a_rail_whose_packets_stay_in_the_port() {
    lose_a_rail(Operation::Write, HOLD, 1);
}

#[test]
fn a_read_outlives_a_rail_whose_packets_stay_in_the_peers_port() {
    let (lose, restore) = (HOLD.0.replace("LINK", "FAR"), HOLD.1.replace("LINK", "FAR"));
    lose_a_rail(Operation::Read, (&lose, &restore), 1);
}

/// Nothing is under way on it, so no device finds it out.
#[test]
fn an_idle_path_ends_when_its_only_port_stays_down() {
    let Some((links, near, far)) = links() else {
        return;
    };
    let first = |devices: &str| devices.split(',').next().unwrap().to_owned();
    let agents = (
        agent("initiator", &first(&near), 1),
        agent("target", &first(&far), 1),
    );
    let pair = Pair::of(agents.0, agents.1, 4096, OPEN);
    let whole = [(0, 0, 4096)];
    let request = pair.moves(Operation::Write, &whole, RequestOptions::default());
    request.wait(WAIT).unwrap();
    runs("ip", &format!("link set {} down", links[0]));
    // Asking connects again if there is no path, which comes to nothing.
    until(|| report(&pair).backend.is_none());
    runs("ip", &format!("link set {} up", links[0]));
}

/// Rails are asked about all writes at once, more than there are places to say something from: what is asked about regions
/// beside that is answered all the same, although nothing else is said.
#[test]
fn regions_are_handed_out_while_rails_are_asked_about_many_writes() {
    let Some((_, near, far)) = links() else {
        return;
    };
    const WRITES: u64 = 40;
    /// As little as goes over all rails.
    const BYTES: u64 = (256 << 10) + 4096;
    const ROUNDS: usize = 12;
    const INBOX_BYTES: usize = 8 << 20;
    let pair = pair(&near, &far, BYTES);
    // Nothing more is taken, so nothing more is answered.
    let long = vec![0; NOTIFICATION_BYTES_MAX];
    for _ in 0..INBOX_BYTES / NOTIFICATION_BYTES_MAX {
        let request = pair.initiator.notify(&pair.peer, long.clone().into());
        request.unwrap().wait(WAIT).unwrap();
    }
    for round in 0..ROUNDS {
        let memory = HostMemory::shared(4096).unwrap();
        let region = pair.target.register(memory, OPEN).unwrap();
        let peer = pair.initiator.load_peer(&pair.target.metadata()).unwrap();
        let options = || RequestOptions {
            notification: Some(vec![1].into()),
            ..RequestOptions::default()
        };
        let before = rails(&pair);
        let whole = [(0, 0, BYTES)];
        let writes: Vec<Request> = (0..WRITES)
            .map(|_| pair.moves(Operation::Write, &whole, options()))
            .collect();
        // All but the last ones are in place, and are asked about.
        until(|| moved(&pair, &before).iter().sum::<u64>() > (WRITES - 2) * BYTES);
        let pairs = [(pair.local.descriptor(0, 4096), region.descriptor(0, 4096))];
        let options = RequestOptions::default();
        let made = pair
            .initiator
            .transfer(Operation::Write, &pairs, Side::Peer(&peer), options)
            .unwrap();
        made.wait(WAIT)
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        for write in writes {
            write.cancel();
            assert!(write.wait(WAIT).is_err());
        }
        region.deregister().wait(WAIT).unwrap();
    }
}

/// Notifications are under way over the rail that is lost: each arrives once, in order.
#[test]
fn notifications_outlive_their_rail() {
    let Some((links, near, far)) = links() else {
        return;
    };
    const NOTIFICATIONS: u32 = 2000;
    let pair = pair(&near, &far, 4096);
    let notify = |number: u32| -> Request {
        let mut bytes = number.to_le_bytes().to_vec();
        bytes.resize(1000, 7);
        pair.initiator.notify(&pair.peer, bytes.into()).unwrap()
    };
    let mut requests: Vec<Request> = (0..NOTIFICATIONS / 2).map(notify).collect();
    until(|| is_done(&requests[100]));
    runs("ip", &format!("link set {} down", links[0]));
    assert!(
        !is_done(&requests[requests.len() - 1]),
        "all had arrived before"
    );
    requests.extend((NOTIFICATIONS / 2..NOTIFICATIONS).map(notify));
    for request in &requests {
        request.wait(WAIT).unwrap();
    }
    let came: Vec<u32> = pair
        .target
        .notifications()
        .iter()
        .map(|one| u32::from_le_bytes(one.bytes[..4].try_into().unwrap()))
        .collect();
    assert_eq!(came, (0..NOTIFICATIONS).collect::<Vec<u32>>());
    assert!(rails(&pair)[0].lost.is_some());
    runs("ip", &format!("link set {} up", links[0]));
}

/// A notification comes when all that was written before is in place, by whichever rail that came.
#[test]
fn notifications_come_after_what_was_written_by_all_rails() {
    let Some((_, near, far)) = links() else {
        return;
    };
    const BYTES: u64 = 4 << 20;
    let pair = pair(&near, &far, BYTES);
    for round in 1..=8 {
        pair.local.fill_at(0, BYTES, round).unwrap();
        let options = RequestOptions {
            notification: Some(vec![round].into()),
            ..RequestOptions::default()
        };
        let before = rails(&pair);
        let request = pair.moves(Operation::Write, &[(0, 0, BYTES)], options);
        let notified = pair.target.wait_notifications(WAIT);
        let there = contents(&pair.remote);
        assert_eq!(notified[0].bytes[..], [round]);
        assert!(there.iter().all(|&byte| byte == round), "round {round}");
        request.wait(WAIT).unwrap();
        assert!(moved(&pair, &before).iter().all(|&bytes| bytes > 0));
    }
}

/// Both rails are lost, in turn: the path ends, the request fails, and the agents meet again by what is back.
#[test]
fn a_path_ends_with_its_last_rail_and_comes_back() {
    let Some((links, near, far)) = links() else {
        return;
    };
    let pair = pair(&near, &far, LONG);
    let data = pattern(LONG as usize, 3);
    pair.local.write_at(0, &data).unwrap();
    let whole = [(0, 0, LONG)];
    let request = pair.moves(Operation::Write, &whole, RequestOptions::default());
    for link in &links {
        runs("ip", &format!("link set {link} down"));
    }
    let error = request.wait(WAIT * 2).unwrap_err();
    assert!(request.wait_drained(WAIT), "{error}");
    runs("ip", &format!("link set {} up", links[1]));
    let end = Instant::now() + WAIT * 2;
    loop {
        let there = [pair.remote.descriptor(0, 4096)];
        let local = [pair.local.descriptor(0, 4096)];
        let pairs: Vec<_> = local.into_iter().zip(there).collect();
        let made = pair.initiator.transfer(
            Operation::Write,
            &pairs,
            Side::Peer(&pair.peer),
            RequestOptions::default(),
        );
        match made.and_then(|request| Ok(request.wait(WAIT)?)) {
            Ok(_) => break,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    }
    assert!(contents(&pair.remote)[..4096] == data[..4096]);
    runs("ip", &format!("link set {} up", links[0]));
}

/// As many as are allowed, of those that are named; more on one side than on the other.
#[test]
fn as_many_rails_as_both_sides_have() {
    let Some((_, near, far)) = links() else {
        return;
    };
    let first = near.split(',').next().unwrap();
    let one = VerbsOptions {
        device: Some(first.to_owned()),
        ..verbs_options()
    };
    let builder = Agent::builder("one").memcpy(false).shm(false);
    let one = builder.verbs(Some(one)).build().unwrap();
    for (initiator, target) in [
        (agent("a", &near, 1), agent("b", &far, 8)),
        (agent("a", &near, 8), agent("b", &far, 1)),
        (one, agent("b", &far, 8)),
    ] {
        let pair = Pair::of(initiator, target, 1 << 20, OPEN);
        let request = pair.moves(
            Operation::Write,
            &[(0, 0, 1 << 20)],
            RequestOptions::default(),
        );
        request.wait(WAIT).unwrap();
        let rails = rails(&pair);
        assert_eq!((rails.len(), rails[0].sent), (1, 1 << 20), "{rails:?}");
    }
}
