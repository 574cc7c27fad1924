//! The simulated fabric: determinism, faults, and what may be believed about memory.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "what tests share fails like a test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kvcache_core::{ErrorKind, Time};
use kvfabric_transfer::backend::sim::{
    Chance, Direction, Effect, Exchange, ExchangeConfig, LinkProfile, SimNetwork, SimNode,
    SimTransfer, SimTransferId,
};
use kvfabric_transfer::{
    Agent, HostMemory, MemoryFate, Operation, PeerHandle, Region, RegionOptions, Request,
    RequestOptions, Side, Status,
};
use proptest::prelude::*;

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
const BYTES: u64 = 1 << 20;

struct Pair {
    network: SimNetwork,
    agent: Agent,
    /// Kept: a member that is dropped leaves the network.
    _peer: Agent,
    handle: PeerHandle,
    local: Region,
    remote: Region,
}

impl Pair {
    fn new(seed: u64, config: ExchangeConfig) -> Self {
        let network = SimNetwork::new(seed, config).expect("network");
        let build = |name| {
            Agent::builder(name)
                .memcpy(false)
                .shm(false)
                .simulated(&network)
                .build()
                .expect("agent")
        };
        let (agent, peer) = (build("a"), build("b"));
        let memory = || HostMemory::anonymous(BYTES).expect("memory");
        let local = agent
            .register(memory(), RegionOptions::default())
            .expect("region");
        let exported = RegionOptions {
            remote_read: true,
            remote_write: true,
        };
        let remote = peer.register(memory(), exported).expect("region");
        let handle = agent.load_peer(&peer.metadata()).expect("peer");
        Self {
            network,
            agent,
            _peer: peer,
            handle,
            local,
            remote,
        }
    }

    fn post(&self, operation: Operation, offset: u64, len: u64) -> Request {
        let pairs = [(
            self.local.descriptor(offset, len),
            self.remote.descriptor(offset, len),
        )];
        let side = Side::Peer(&self.handle);
        let options = RequestOptions::default();
        self.agent
            .transfer(operation, &pairs, side, options)
            .expect("accepted")
    }
}

/// Eight concurrent transfers over a bad link; answers how they ended and what the network did.
fn run(seed: u64) -> (Vec<bool>, u64) {
    let pair = Pair::new(seed, ExchangeConfig::over(LinkProfile::lossy()));
    pair.network.pause();
    let requests: Vec<_> = (0..8_u64)
        .map(|position| {
            let operation = if position % 2 == 0 {
                Operation::Write
            } else {
                Operation::Read
            };
            pair.post(operation, position * BYTES / 8, BYTES / 8)
        })
        .collect();
    pair.network.resume();
    let ended = requests
        .iter()
        .map(|request| request.wait(PATIENCE).is_ok())
        .collect();
    assert!(pair.network.wait_idle(PATIENCE));
    (ended, pair.network.trace_digest())
}

/// Whole agents with threads, twice with each seed.
#[test]
fn the_same_seed_gives_the_same_trace() {
    let runs: Vec<_> = (0..4).map(|seed| (run(seed), run(seed))).collect();
    for (seed, (first, second)) in runs.iter().enumerate() {
        assert_eq!(first, second, "seed {seed}");
    }
    let digests: BTreeSet<_> = runs.iter().map(|(first, _)| first.1).collect();
    assert_eq!(
        digests.len(),
        runs.len(),
        "different seeds give different traces"
    );
}

/// Cut, then mended; no time passes for it outside the simulation.
#[test]
fn a_partition_loses_the_peer_until_it_is_healed() {
    let pair = Pair::new(1, ExchangeConfig::over(LinkProfile::perfect()));
    pair.network.partition("a", "b").expect("members");
    let failed = pair
        .post(Operation::Write, 0, BYTES)
        .wait(PATIENCE)
        .expect_err("cut");
    assert_eq!(failed.kind(), ErrorKind::PeerLost, "{failed}");
    assert!(failed.to_string().contains("\"b\""), "{failed}");
    pair.network.heal("a", "b").expect("members");
    pair.local.fill_at(0, BYTES, 9).expect("filled");
    pair.post(Operation::Write, 0, BYTES)
        .wait(PATIENCE)
        .expect("healed");
    let mut found = vec![0; BYTES as usize];
    pair.remote.read_at(0, &mut found).expect("read");
    assert!(found.iter().all(|byte| *byte == 9));
    let unknown = pair.network.partition("a", "c").expect_err("no member");
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
}

/// Time stands still while chunks are under way; the memory is free only when they are not.
#[test]
fn a_cancelled_transfer_is_in_flight_until_the_network_let_go() {
    for operation in [Operation::Write, Operation::Read] {
        let pair = Pair::new(2, ExchangeConfig::over(LinkProfile::perfect()));
        pair.network.pause();
        let request = pair.post(operation, 0, BYTES);
        // Half of the latency: everything is on its way, nothing has arrived.
        pair.network.advance(Duration::from_nanos(2500));
        request.cancel();
        let failed = request.wait(PATIENCE).expect_err("cancelled");
        assert_eq!(failed.kind(), ErrorKind::Cancelled);
        assert_eq!(failed.fate(), MemoryFate::InFlight);
        assert!(!request.wait_drained(Duration::ZERO));
        let busy = request.post().expect_err("its memory is in flight");
        assert_eq!(busy.kind(), ErrorKind::Busy);
        let deregistered = pair.local.deregister();
        let early = deregistered.wait(Duration::ZERO).expect_err("in use");
        assert_eq!(early.kind(), ErrorKind::Busy);
        pair.network.advance(Duration::from_secs(1));
        assert!(request.wait_drained(PATIENCE));
        deregistered.wait(PATIENCE).expect("free");
        let Status::Failed(failed) = request.poll() else {
            panic!("{:?}", request.poll())
        };
        assert_eq!(failed.fate(), MemoryFate::Settled);
    }
}

/// Every datagram with data is hit: each chunk arrives with exactly one wrong bit, and the transfer does not know.
#[test]
fn corruption_flips_one_bit_of_each_chunk() {
    let link = LinkProfile {
        corruption: Chance::ALWAYS,
        ..LinkProfile::perfect()
    };
    let pair = Pair::new(3, ExchangeConfig::over(LinkProfile::perfect()));
    pair.network.set_link("a", "b", link).expect("members");
    // Requests and answers without data would be lost, so only the way there is bad.
    pair.post(Operation::Write, 0, BYTES)
        .wait(PATIENCE)
        .expect("acknowledged");
    let mut found = vec![0; BYTES as usize];
    pair.remote.read_at(0, &mut found).expect("read");
    for (number, chunk) in found.chunks(64 << 10).enumerate() {
        let wrong: u32 = chunk.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(wrong, 1, "chunk {number}");
    }
    let sums = [&pair.local, &pair.remote].map(|region| region.checksum(0, BYTES).expect("sum"));
    assert_ne!(sums[0], sums[1]);
}

/// A member dies and another of its name takes its place.
#[test]
fn a_restarted_agent_is_reached_anew() {
    let network =
        SimNetwork::new(4, ExchangeConfig::over(LinkProfile::perfect())).expect("network");
    let build = |name| {
        Agent::builder(name)
            .memcpy(false)
            .shm(false)
            .simulated(&network)
            .build()
    };
    let agent = build("a").expect("agent");
    let taken = build("a").expect_err("a name is used once");
    assert_eq!(taken.kind(), ErrorKind::Invalid);
    let local = HostMemory::anonymous(BYTES).expect("memory");
    let local = agent
        .register(local, RegionOptions::default())
        .expect("region");
    for round in 1..4 {
        let peer = build("b").expect("agent");
        let exported = RegionOptions {
            remote_read: true,
            remote_write: true,
        };
        let memory = HostMemory::anonymous(BYTES).expect("memory");
        let remote = peer.register(memory, exported).expect("region");
        let handle = agent.load_peer(&peer.metadata()).expect("peer");
        local.fill_at(0, BYTES, round).expect("filled");
        let pairs = [(local.descriptor(0, BYTES), remote.descriptor(0, BYTES))];
        let options = RequestOptions::default;
        let request = agent
            .transfer(Operation::Write, &pairs, Side::Peer(&handle), options())
            .expect("accepted");
        request.wait(PATIENCE).expect("written");
        let mut last = [0];
        remote.read_at(BYTES - 1, &mut last).expect("read");
        assert_eq!(last[0], round);
        let report = agent.path_to(&handle);
        assert_eq!(report.backend, Some("sim"), "{report:?}");
        drop((peer, remote));
        // A thread of the network may still hold the agent for a moment: its region is refused by then.
        let until = Instant::now() + PATIENCE;
        let mut gone = again(&request).expect_err("gone").kind();
        while gone == ErrorKind::Denied && Instant::now() < until {
            std::thread::yield_now();
            gone = again(&request).expect_err("gone").kind();
        }
        assert_eq!(gone, ErrorKind::PeerLost);
    }
}

/// Posts it once more and waits for its end.
fn again(request: &Request) -> kvcache_core::Result<()> {
    request.post()?;
    request.wait(PATIENCE)?;
    Ok(())
}

#[derive(Default)]
struct Seen {
    landed: BTreeMap<u64, u64>,
    notified: u32,
    finished: Option<(Option<ErrorKind>, bool)>,
    drained: bool,
}

fn check_effect(seen: &mut BTreeMap<SimTransferId, Seen>, effect: &Effect) {
    match effect {
        Effect::Landed {
            transfer,
            offset,
            len,
            ..
        } => {
            let seen = seen.entry(*transfer).or_default();
            assert!(!seen.drained, "bytes land after draining");
            let settled = seen.finished.is_some_and(|(_, settled)| settled);
            assert!(!settled, "bytes land in settled memory");
            assert!(
                seen.landed.insert(*offset, *len).is_none(),
                "bytes land twice"
            );
        }
        Effect::Notified { transfer } => seen.entry(*transfer).or_default().notified += 1,
        Effect::Finished {
            transfer,
            failure,
            settled,
            ..
        } => {
            let seen = seen.entry(*transfer).or_default();
            assert!(
                seen.finished.replace((*failure, *settled)).is_none(),
                "finished twice"
            );
        }
        Effect::Drained { transfer } => {
            let seen = seen.entry(*transfer).or_default();
            assert!(seen.finished.is_some_and(|(_, settled)| !settled));
            assert!(!std::mem::replace(&mut seen.drained, true), "drained twice");
        }
        Effect::Message { .. } => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// The state machine alone, with every fault at once, cancels at random, deadlines that some miss, and a node that
    /// dies: what is told about each transfer must hold together.
    #[test]
    fn transfers_end_once_and_bytes_land_once(
        seed in any::<u64>(),
        faults in (0_u32..300_000, 0_u32..300_000, 0_u32..500_000, 0_u32..200_000),
        plans in prop::collection::vec((1_u64..400_000, any::<bool>(), any::<bool>(), 0_u8..4), 1..20),
        killed in any::<bool>(),
    ) {
        let chance = |millionths| Chance::from_millionths(millionths).expect("below one");
        let link = LinkProfile {
            loss: chance(faults.0),
            duplicate: chance(faults.1),
            reorder: chance(faults.2),
            corruption: chance(faults.3),
            ..LinkProfile::lossy()
        };
        let mut exchange = Exchange::new(seed, ExchangeConfig::over(link)).expect("settings");
        let nodes: Vec<SimNode> =
            ["a", "b", "c"].iter().map(|name| exchange.add_node(name).expect("joins")).collect();
        let mut expected = BTreeMap::new();
        let mut cancels = Vec::new();
        for (position, (bytes, write, notify, ending)) in plans.iter().enumerate() {
            let deadline = if *ending == 0 { Time(300_000) } else { Time::MAX };
            let plan = SimTransfer {
                initiator: nodes[0],
                peer: nodes[1 + position % 2],
                direction: if *write { Direction::Write } else { Direction::Read },
                bytes: *bytes,
                notify: *notify,
                deadline,
            };
            let id = exchange.handle_transfer(Time(0), plan).expect("accepted");
            expected.insert(id, (*bytes, *notify));
            if *ending == 1 {
                cancels.push(id);
            }
        }
        let mut seen = BTreeMap::new();
        while let Some(due) = exchange.poll_timeout() {
            exchange.handle_timeout(due);
            if due > Time(200_000) {
                cancels.drain(..).for_each(|id| exchange.handle_cancel(due, id));
                if killed {
                    exchange.kill(nodes[2]);
                }
            }
            while let Some(effect) = exchange.poll_effect() {
                check_effect(&mut seen, &effect);
            }
        }
        prop_assert_eq!(exchange.in_flight(), 0);
        for (id, (bytes, notify)) in expected {
            let seen = seen.remove(&id).expect("it ended");
            let (failure, settled) = seen.finished.expect("it ended");
            prop_assert_eq!(settled, !seen.drained);
            prop_assert!(seen.notified <= u32::from(notify));
            if failure.is_none() {
                prop_assert_eq!(seen.landed.values().sum::<u64>(), bytes);
                prop_assert_eq!(seen.notified, u32::from(notify));
            }
            if seen.notified > 0 {
                prop_assert_eq!(seen.landed.values().sum::<u64>(), bytes, "told before the data");
            }
        }
    }
}
