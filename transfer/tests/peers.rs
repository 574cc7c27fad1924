//! What peers are told, and how TCP reaches them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and skips aloud"
)]

mod support;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    HostMemory, Operation, Region, RegionId, RegionOptions, RequestOptions, Side,
};

use support::{OPEN, Pair, WAIT, WAYS, Way, contents, loopback};

fn read(pair: &Pair, region: &Region) -> kvcache_core::Result<()> {
    let pairs = [(pair.local.descriptor(0, 64), region.descriptor(0, 64))];
    let side = Side::Peer(&pair.peer);
    let options = RequestOptions::default();
    let request = pair
        .initiator
        .transfer(Operation::Read, &pairs, side, options)?;
    request.wait(WAIT).map(drop).map_err(Into::into)
}

/// Memory registered after a peer has the metadata is told of by itself: the peer keeps what it knows, its connection and
/// its prepared requests.
#[test]
fn regions_are_added_to_what_a_peer_knows() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let options = RequestOptions::default();
        let before = pair.moves(Operation::Read, &[(0, 0, 64)], options);
        before.wait(WAIT).unwrap();
        // What its connections have moved grows.
        let way_to = |region: &Region| {
            let report = pair.initiator.path_to_region(&pair.peer, region.id());
            report.map(|report| (report.backend, report.why, report.refused))
        };
        let path = way_to(&pair.remote).unwrap();
        let more = pair.target.register(way.memory(4096), OPEN).unwrap();
        more.fill_at(0, 4096, 0x77).unwrap();
        let unknown = read(&pair, &more).unwrap_err();
        assert_eq!(unknown.kind(), ErrorKind::NotFound, "{way:?}");
        let update = pair.target.metadata_of(&[more.id()]).unwrap();
        assert!(update.len() < pair.target.metadata().len());
        let same = pair.initiator.load_peer(&update).unwrap();
        assert_eq!(same.regions().len(), 2);
        read(&pair, &more).unwrap();
        assert!(contents(&pair.local)[..64].iter().all(|&byte| byte == 0x77));
        before.post().unwrap();
        before.wait(WAIT).unwrap();
        assert_eq!(path, way_to(&pair.remote).unwrap(), "{way:?}");
        // All of it replaces what was known.
        let closed = RegionOptions::default();
        drop(pair.remote);
        let whole = pair.target.metadata();
        assert_eq!(pair.initiator.load_peer(&whole).unwrap().regions().len(), 1);
        let hidden = HostMemory::anonymous(64).unwrap();
        let hidden = pair.target.register(hidden, closed).unwrap();
        for id in [hidden.id(), RegionId(1)] {
            let error = pair.target.metadata_of(&[more.id(), id]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert!(error.to_string().contains(&id.to_string()), "{error}");
        }
    }
}

/// Metadata of some regions is enough to reach an agent, and shows no others.
#[test]
fn a_peer_may_be_shown_one_region_alone() {
    let target = Way::Tcp.agent("target");
    let [shown, other] = [(), ()].map(|()| {
        let memory = HostMemory::anonymous(4096).unwrap();
        target.register(memory, OPEN).unwrap()
    });
    let initiator = Way::Tcp.agent("initiator");
    let peer = initiator
        .load_peer(&target.metadata_of(&[shown.id()]).unwrap())
        .unwrap();
    assert_eq!(peer.regions(), [(shown.id(), 4096)]);
    let local = HostMemory::anonymous(4096).unwrap();
    let local = initiator.register(local, RegionOptions::default()).unwrap();
    let pair = Pair {
        initiator,
        target,
        local,
        remote: shown.clone(),
        peer,
    };
    read(&pair, &shown).unwrap();
    assert_eq!(read(&pair, &other).unwrap_err().kind(), ErrorKind::NotFound);
}

/// Each congestion control that the system allows is the one in force; another is refused with those.
#[test]
fn congestion_control_is_the_one_that_was_asked_for() {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let Ok(allowed) = std::fs::read_to_string(ALLOWED) else {
        eprintln!("SKIPPED: the system does not say which congestion controls it allows");
        return;
    };
    for name in allowed.split_whitespace() {
        let build = |role| {
            let builder = Way::Tcp.builder(role).tcp_congestion(Some(name));
            builder.build().unwrap()
        };
        let pair = Pair::of(build("initiator"), build("target"), 4096, OPEN);
        let path = pair.initiator.path_to(&pair.peer);
        let wanted = format!("congestion control {name}");
        assert!(path.why.ends_with(&wanted), "{path:?}");
        read(&pair, &pair.remote).unwrap();
    }
    let refused = Way::Tcp
        .builder("agent")
        .tcp(Some(loopback()))
        .tcp_congestion(Some("pigeons"))
        .build()
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    for text in ["pigeons", allowed.trim()] {
        assert!(refused.to_string().contains(text), "{refused}");
    }
}
