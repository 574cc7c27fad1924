//! What is UCX's own: its settings, what is told of its paths, memory that is given back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, Operation, RequestOptions, UcxOptions};

use support::{Pair, WAIT, Way, contents, pattern};

fn with(name: &str, value: &str) -> Option<UcxOptions> {
    let settings = vec![(name.to_owned(), value.to_owned())];
    Some(UcxOptions { settings })
}

/// A value that is no size, and one that none of the transports has. (Of a name that it does not know UCX only warns.)
#[test]
fn settings_that_cannot_work_are_refused() {
    let built = Agent::builder("no-size")
        .ucx(with("RNDV_THRESH", "much"))
        .build();
    let error = built.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("RNDV_THRESH = \"much\""),
        "{error}"
    );
    let built = Agent::builder("nothing")
        .ucx(with("TLS", "nonsense"))
        .build();
    assert!(built.is_err());
}

/// The report names the version and the transports, which follow the settings.
#[test]
fn a_path_tells_version_and_transports() {
    let agent = |name: &str| {
        let builder = Agent::builder(name).memcpy(false).shm(false);
        builder.ucx(with("TLS", "tcp,self")).build().unwrap()
    };
    let (initiator, target) = (agent("initiator"), agent("target"));
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let report = initiator.path_to(&peer);
    assert_eq!(report.backend, Some("ucx"));
    // Of whatever is installed, unless this is a run with one that is named (scripts/test-ucx).
    let version = std::env::var("KVFABRIC_UCX_VERSION").unwrap_or_else(|_| "1.".to_owned());
    assert!(
        report.why.starts_with(&format!("ucx {version}")),
        "{report:?}"
    );
    assert!(report.why.contains("tcp/"), "{report:?}");
    assert!(!report.why.contains("cma"), "{report:?}");
}

/// An agent without UCX beside one with it: the reason is told, and nothing is tried in vain.
#[test]
fn a_peer_without_ucx_is_refused_with_the_reason() {
    let target = Agent::builder("target").build().unwrap();
    let builder = Agent::builder("initiator").memcpy(false).shm(false);
    let initiator = builder.ucx(Some(UcxOptions::default())).build().unwrap();
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let report = initiator.path_to(&peer);
    assert_eq!(report.backend, None);
    let reason = format!("{:?}", report.refused);
    assert!(reason.contains("does not offer ucx"), "{reason}");
}

/// A region that was used goes back to its owner while both sides live, again and again; later requests are refused.
#[test]
fn used_memory_is_given_back() {
    for round in 0..20 {
        let pair = Pair::new(Way::Ucx, 1 << 16);
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

/// Peers come and go: each is forgotten with requests in flight, and met again.
#[test]
fn a_forgotten_peer_is_met_again() {
    let (initiator, target) = (Way::Ucx.agent("initiator"), Way::Ucx.agent("target"));
    let bytes = 8 << 20;
    let local = initiator
        .register(Way::Ucx.memory(bytes), support::OPEN)
        .unwrap();
    let remote = target
        .register(Way::Ucx.memory(bytes), support::OPEN)
        .unwrap();
    for _ in 0..10 {
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        let pairs = [(local.descriptor(0, bytes), remote.descriptor(0, bytes))];
        let side = kvfabric_transfer::Side::Peer(&peer);
        let options = RequestOptions::default();
        let request = initiator
            .transfer(Operation::Write, &pairs, side, options)
            .unwrap();
        initiator.forget_peer(&peer);
        if let Err(error) = request.wait(WAIT) {
            assert_eq!(error.kind(), ErrorKind::PeerLost);
        }
        assert!(request.wait_drained(WAIT));
    }
    remote.deregister().wait(WAIT).unwrap();
}
